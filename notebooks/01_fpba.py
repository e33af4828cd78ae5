# %% [markdown]
# # 1. FPBA: attention with nothing saved
#
# **The story.** Every attention in this course is one formula with some matrices made smaller. So we begin with the formula in
# which *nothing* is made smaller: Fully Parameterized Bilinear Attention (FPBA). Nobody trains it. It is the yardstick: the
# most an attention of this kind with at most $H$ heads can do, and what that would cost in parameters and in cache.
#
# **After this notebook you can**
#
# 1. read an attention score as a bilinear form $x_i W x_j^T$, and write a $W$ that looks where you want;
# 2. write Eq. 1 of the paper with loops and as three products, and check one against the other;
# 3. say what $2H^3$ parameters buy, and what they cost at real widths;
# 4. say what FPBA would cache, and why nobody caches the state itself.
#
# **Time:** 40 minutes, exercises included. It runs in seconds. **Before:** matrix products, softmax, and having seen attention
# once.

# %%
import sys

sys.path[:0] = ["notebooks", ".", ".."]  # nb.py is in one of them
import nb

nb.start()  # plot style, float64, seed, no gradients

# %%
import matplotlib.pyplot as plt
import torch
from nb import COLOR, MARKER, NAME, close

from mfa import ATTENTION, GPT, Config, KVCache, preset

check, hint = nb.exercises("01")

H, T = 6, 5
x = torch.randn(T, H)  # T tokens; x[i] is the state of token i, a row of H numbers
W = torch.randn(H, H)
print(f"{T} tokens of width {H}; W is {tuple(W.shape)}")

# %% [markdown]
# ## A score is a bilinear form
#
# How much should token $i$ look at token $j$? Attention answers with a number that depends on both states:
#
# $$s_{ij} = x_i\, W\, x_j^T = \sum_{a=1}^{H} \sum_{b=1}^{H} x_{ia}\, W_{ab}\, x_{jb} .$$
#
# Vectors are rows here, as in the paper. Read one term of the sum: $W_{ab}$ says how much it counts when the *looking* token
# has feature $a$ and the *looked-at* token has feature $b$. Every pair of features has its own weight.

# %%
s = torch.zeros(T, T)
for i in range(T):
    for j in range(T):
        s[i, j] = sum(x[i, a] * W[a, b] * x[j, b] for a in range(H) for b in range(H))
close("double sum and x W x^T", x @ W @ x.T, s)

# %% [markdown]
# "Bilinear" means linear in each of the two, with the other one held still. It does not mean linear in both at once: double
# both states and the score is four times as large.

# %%
y, z = torch.randn(2, H)
close("linear in the first", (2 * x[0] + 3 * y) @ W @ z, 2 * (x[0] @ W @ z) + 3 * (y @ W @ z))
close("linear in the second", z @ W @ (2 * x[0] + 3 * y), 2 * (z @ W @ x[0]) + 3 * (z @ W @ y))
close("both doubled: four times", (2 * y) @ W @ (2 * z), 4 * (y @ W @ z))

# %% [markdown]
# ## What a W can ask
#
# Three hand-made $W$. Give six tokens two features each: which *word* they are (three words, two of each) and which *position*
# they have. A state is one-hot in both: 3 + 6 numbers.
#
# - $W = I$ on the word part: "who is the same word as I?"
# - one entry, $W_{ab} = 1$: "if I am word 0, look at word 1". This $W$ has rank one.
# - ones below the diagonal on the position part: "who stands right before me?"

# %%
words = torch.tensor([0, 1, 2, 0, 1, 2])
state = torch.cat((torch.eye(3)[words], torch.eye(6)), dim=1)  # (6, 9)
same, pair, before = torch.zeros(3, 9, 9)
same[:3, :3] = torch.eye(3)
pair[0, 1] = 1
before[3:, 3:] = torch.eye(6).roll(1, dims=0).tril()  # row i, column i - 1
assert (state @ before @ state.T).nonzero().tolist() == [[i, i - 1] for i in range(1, 6)]

# %%
fig, axes = plt.subplots(1, 3, figsize=(8.4, 3.0), sharey=True)
for ax, (name, w) in zip(axes, {"same word": same, "word 0 → word 1": pair, "one before": before}.items(), strict=True):
    ax.imshow(state @ w @ state.T, cmap="Blues", vmin=0, vmax=1.4)
    labels = [f"{p}: w{c}" for p, c in enumerate(words.tolist())]
    ax.set(title=f"{name}, rank {torch.linalg.matrix_rank(w)}", xticks=range(6), yticks=range(6))
    ax.set_xticklabels(labels, rotation=60)
    ax.set_xlabel("looked-at token $j$")
    ax.grid(False)
axes[0].set(ylabel="looking token $i$", yticklabels=labels)
plt.show()

# %% [markdown]
# Dark squares have score 1. The matrix does not have to be symmetric: token 0 asks for word 1, and word 1 does not ask back.
# Keep the ranks in mind. "One before", done this way, needs almost all dimensions; a cheaper attention will have to do it
# differently (exercise 3).
#
# ## Equation 1, with loops
#
# The **QK circuit** $W_c$ decides where head $c$ looks. Softmax turns the scores of token $i$ over all $j \le i$ into weights
# that sum to 1. The **VO circuit** $U_c$, $(H, H)$ as well, decides what is fetched from there and into which channels it is
# written. FPBA has one such pair for every channel, $c = 1 \dots H$:
#
# $$O_i = \sum_{c=1}^{H} \Big( \sum_{j=1}^{i} \phi\Big( \frac{x_i W_c\, x_j^T}{\sqrt H} \Big)\, x_j U_c \Big) \qquad (1)$$
#
# (In print $x_j$ lacks the transpose: vectors are rows, so it is needed.) Division by $\sqrt H$ keeps the scores from growing
# with the width. $j \le i$ means that a token sees the past only.

# %%
W, U = torch.randn(2, H, H, H)


def eq1_loops(x, W, U):
    O = torch.zeros_like(x)
    for i in range(len(x)):
        for c in range(len(W)):
            scores = torch.stack([x[i] @ W[c] @ x[j] for j in range(i + 1)]) / x.shape[1] ** 0.5
            p = scores.softmax(dim=0)
            for j in range(i + 1):
                O[i] += p[j] * (x[j] @ U[c])
    return O


# %% [markdown]
# ## The same as three products
#
# Loops are clear and slow. `einsum` names the axes: `i`, `j` tokens, `c` channels, `a`, `b` features. Tokens in the future get
# score $-\infty$, so that their weight is exactly zero.


# %%
def attention_maps(x, W):
    scores = torch.einsum("ia,cab,jb->cij", x, W, x) / x.shape[1] ** 0.5
    future = torch.ones(len(x), len(x)).triu(1).bool()
    return scores.masked_fill(future, -torch.inf).softmax(dim=-1)  # (c, i, j)


def eq1(x, W, U):
    return torch.einsum("cij,ja,cab->ib", attention_maps(x, W), x, U)


close("einsum and loops", eq1(x, W, U), eq1_loops(x, W, U))
close("weights sum to one", attention_maps(x, W).sum(-1), torch.ones(H, T))

# %% [markdown]
# And the third time, as the class in `mfa.py`. All attentions there can be called in two ways. `factorization(x)` is Eq. 1 as
# it stands. `forward(x)` is the *inference formulation*: it first makes what a cache would keep, $W_c x_j^T$ and $x_j U_c$, and
# then lets the queries meet it. That both agree is the central check of this project.

# %%
fpba = ATTENTION["fpba"](Config(attn="fpba", dim=H, pos="none"))
fpba.W.copy_(W)
fpba.U.copy_(U)
close("class, inference formulation", fpba(x[None])[0], eq1(x, W, U))
close("class, factorization formulation", fpba.factorization(x[None])[0], eq1(x, W, U))
changed = x.clone()
changed[3] += 1.0  # a change at token 3 must not reach tokens 0 to 2
effect = (eq1(changed, W, U) - eq1(x, W, U)).abs().amax(1)
print("effect of changing token 3, on each token:", [round(e, 3) for e in effect.tolist()])
assert (effect[:3] == 0).all() and (effect[3:] > 0).all()

# %% [markdown]
# ## What 2H³ parameters buy
#
# Each channel looks somewhere else. In ordinary attention, the channels of a head look at the same tokens. Here is a task that
# shows it: let channel $c$ of the output be a copy of channel $c$ *from $c$ tokens ago*. So every channel needs its own delay.
# We build it by hand: the state holds a one-hot position and $D$ numbers, $W_c$ is the shift by $c$ positions (times 100, to
# make softmax sharp), and $U_c$ copies one channel.

# %%
D, steps = 8, 24
signal = torch.randn(steps, D)
tokens = torch.cat((torch.eye(steps), signal), dim=1)  # (24, 32): position, then D numbers
width = steps + D
W_shift, U_copy = torch.zeros(2, width, width, width)
for c in range(D):
    W_shift[c, :steps, :steps] = 100 * torch.eye(steps).roll(c, dims=0).tril() * width**0.5
    U_copy[c, steps + c, steps + c] = 1
out = eq1(tokens, W_shift, U_copy)[:, steps:]
for c in range(D):
    close(f"channel {c} is {c} tokens late", out[c:, c], signal[: steps - c, c])

# %%
fig, axes = plt.subplots(1, 4, figsize=(8.4, 2.5), sharey=True)
for ax, c in zip(axes, (0, 1, 3, 7), strict=True):
    ax.imshow(attention_maps(tokens, W_shift)[c], vmin=0, vmax=1)
    ax.set(title=f"channel {c}", xlabel="looks at token $j$")
    ax.grid(False)
axes[0].set_ylabel("token $i$")
plt.show()

# %% [markdown]
# Each channel has a map of its own. (The blue-green corners are the first tokens. They have no token $c$ steps back, so they
# look at everything alike.) Ordinary attention, with one map per head, would need $D$ heads for this.
#
# *Caveat.* "Can represent" is not "will learn", and it is not "needs all of it". Here 8 channels of 32 do something, and each
# $U_c$ has a single entry. FPBA is an upper bound, and most of it lies idle.
#
# ## What they cost
#
# $H$ channels with two $(H, H)$ matrices each make $2H^3$ parameters. MHA has $4H^2$. The ratio is $H/2$.

# %%
for width in (16, 64, 128):
    cfg = Config(attn="fpba", dim=width, pos="none")
    measured = sum(p.numel() for p in ATTENTION["fpba"](cfg).parameters())
    print(f"H = {width}: {measured:,} parameters")
    assert measured == 2 * width**3 == ATTENTION["fpba"].counts(cfg).params
try:
    ATTENTION["fpba"](Config(attn="fpba", dim=2048, n_layer=1))
except ValueError as error:
    print("H = 2048:", error)

# %%
widths = [2**k for k in range(6, 14)]
fig, ax = plt.subplots()
for attn in ("fpba", "mha"):
    counts = [ATTENTION[attn].counts(Config(attn=attn, dim=w, head_dim=32)).params for w in widths]
    ax.loglog(widths, counts, color=COLOR[attn], marker=MARKER[attn], label=NAME[attn])
ax.axhline(1e9, color="gray", linestyle=":")
ax.text(64, 1.3e9, "a whole 1B model", color="gray", fontsize=9)
ax.set(xlabel="width $H$", ylabel="parameters of one layer", title="One attention layer")
ax.set_xticks(widths, widths)
ax.legend()
plt.show()

# %% [markdown]
# At $H = 2048$, the width of the paper's models, one layer would have 17 billion parameters.
#
# ## What it would cache
#
# When a model writes text, token after token, the past does not change. So one keeps what the past contributes. FPBA's
# inference formulation keeps, for every channel, $W_c x_j^T$ and $x_j U_c$: that is $2H^2$ numbers per token and layer, as
# Table 1 says. `KVCache` allocates just this; we ask it.

# %%
cfg = Config(attn="fpba", dim=16, n_layer=1, pos="none")
kept = KVCache(GPT(cfg), batch_size=1, capacity=1).numel()
print(f"H = 16: {kept} elements per token and layer, 2 H^2 = {2 * 16**2}")
assert kept == 2 * 16**2

# %% [markdown]
# **But why keep all that?** Everything can be computed from $x_j$, which has $H$ numbers. Move the brackets: $x_i W_c$ depends
# on the new token alone, and $U_c$ may act after the sum over $j$:
#
# $$O_i = \sum_c \Big( \sum_{j} p^c_{ij}\, x_j \Big) U_c, \qquad p^c_{ij} = \phi\big( (x_i W_c)\, x_j^T / \sqrt H \big).$$
#
# Now the cache is the states $x_j$ themselves. Let us decode token by token with nothing else.

# %%
rows = []
for i in range(T):
    states = x[: i + 1]  # the cache: H numbers per token
    query = x[i] @ W  # (c, H), from the new token alone
    p = (query @ states.T / H**0.5).softmax(dim=-1)  # (c, i + 1)
    rows.append(torch.einsum("cb,cbd->d", p @ states, U))
close("decoding from cached states", torch.stack(rows), eq1(x, W, U))

# %% [markdown]
# It works, at no extra arithmetic: each of the $H$ channels still compares $H$ numbers with every past token. **So why does
# nobody cache the state?**
#
# 1. *The arithmetic, in every cheaper attention.* A head of MHA compares $d$ numbers per past token. With cached states it
#    would have to compare all $H$: $n$ times as much work with $n$ heads. Or it recomputes all keys in every step, which is
#    worse.
# 2. *Rotary positions.* They put a rotation that depends on $i - j$ into the middle of the product, and then $x_i W_c$ is no
#    longer the same for all $j$. Notebook 03 shows how this breaks, and what it costs to repair.
# 3. *One can do better than $H$.* If keys and values need only a few dimensions, keep those. MQA keeps $2d$, MLA $2C + d_r$,
#    MFA $2C$, MFA-KR $C$, all far below $H$. MLA *is* the idea of caching a state, made thin.

# %%
kept = {attn: ATTENTION[attn].counts(preset("paper-1b", attn)).kv_cache for attn in ATTENTION}
styles = {NAME[attn]: (nb.MARKER[attn], COLOR[attn]) for attn in kept} | {"the state": ("*", "0.5")}
fig, ax = plt.subplots(figsize=(6.4, 3.2))
for (name, (marker, color)), elements in zip(styles.items(), [*kept.values(), 2048], strict=True):
    ax.plot(elements, name, marker, color=color, markersize=9)
    ax.annotate(f"{elements:,}", (elements, name), (9, -4), textcoords="offset points", fontsize=9)
ax.set(xscale="log", xlim=(100, 2e8), xlabel="elements cached per token and layer", title="The paper's 1B shape, $H = 2048$")
ax.invert_yaxis()
plt.show()
assert kept["fpba"] == 2 * 2048**2 and kept["mha"] == 2 * 2048 > 2048 > kept["mla"]

# %% [markdown]
# Note the scale: it is logarithmic, and each grid line is ten times the one before. Caching the state (the star) is half of
# MHA's cache, which is why the question is fair.
#
# ## Exercises
#
# **1 (easy).** The paper's 1B model has $H = 2048$ and 20 layers. If it used FPBA and kept Table 1's cache in 16 bits, how many
# bytes would one token leave behind?

# %%
fpba_bytes = ...

# %%
check(1, fpba_bytes)

# %% [markdown]
# **2 (medium).** Use `state` from above (words in columns 0 to 2, positions in columns 3 to 8). Write a $W$, $(9, 9)$, whose
# scores are 1 where $j$ is the same word as $i$ *or* word 2, and 0 elsewhere (if both hold, 1 too).

# %%
W_answer = ...

# %%
answer = ... if W_answer is ... else state @ W_answer @ state.T
check(2, answer)

# %% [markdown]
# **3 (hard).** "One before" took rank 5 of 6 positions above. With better features for positions, rank 2 is enough. Let 12
# tokens sit on a circle: state $i$ is $(\cos \theta_i, \sin \theta_i)$ with $\theta_i = 2\pi i / 12$. Find a $W$, $(2, 2)$,
# with which every token from 1 on gives a weight of more than 0.9 to the token before it, under causal softmax with scores
# divided by $\sqrt 2$.

# %%
theta = 2 * torch.pi * torch.arange(12) / 12
circle = torch.stack((theta.cos(), theta.sin()), dim=1)  # (12, 2)
W_circle = ...

# %%
answer = ... if W_circle is ... else attention_maps(circle, W_circle[None])[0].diagonal(-1).min() > 0.9
check(3, answer)

# %% [markdown]
# Worked solutions: [solutions/01_fpba_solutions.ipynb](solutions/01_fpba_solutions.ipynb). Next:
# [02_fpba_to_mha](02_fpba_to_mha.ipynb) replaces each $W_c$ by a product of two thin matrices.
