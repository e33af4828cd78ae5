# %% [markdown]
# # 5. Key reuse: the key is the value
#
# **The story.** MFA caches one key and one value per token. MFA-KR caches the key alone, and makes the value from it. That
# halves the cache once more. The paper adds a small gated matrix and says that it matters. We get the equation into a form
# whose shapes fit, watch the gate open in the first steps of a run, and find that the gate adds nothing to what the layer can
# express. Then we turn to a question the paper does not answer: is the key reused before or after its rotation?
#
# **After this notebook you can**
#
# 1. write MFA-KR's value with shapes that conform, and say where the gate acts;
# 2. predict which parameter moves first, and what goes wrong if both start at zero;
# 3. explain why Table 4's variants are one class of functions, and what its differences are then;
# 4. tell the three readings of "reuse the rotated key" apart, with what each costs.
#
# **Time:** 50 minutes, exercises included. It runs in about 20 seconds. **Before:** 04 (MFA).

# %%
import sys

sys.path[:0] = ["notebooks", ".", ".."]  # nb.py is in one of them
import nb

nb.start()  # plot style, float64, seed, no gradients

# %%
from dataclasses import replace

from experiments.paper import containment
import matplotlib.pyplot as plt
import torch
from nb import close

from mfa import ATTENTION, GPT, Config, KVCache

check, hint = nb.exercises("05")

cfg = Config(attn="mfa_kr", dim=32, n_head=4, latent_dim=8, pos="none")
H, m, C, T = cfg.dim, cfg.heads, cfg.latent, 10
x, kr = torch.randn(1, T, H), ATTENTION["mfa_kr"](cfg)
kr.alpha.copy_(torch.randn(C))  # an open gate: in a new layer alpha is zero


# %%
def layer(**changes):
    """kr's weights in a layer with other options (one without a gate leaves N or alpha out)."""
    attn = ATTENTION["mfa_kr"](replace(cfg, **changes))
    attn.load_state_dict({name: kr.state_dict()[name] for name in attn.state_dict()})
    return attn


# %% [markdown]
# ## Equations 8 and 9, and which of them conforms
#
# The paper prints
#
# $$S_v = S_k + \alpha \odot N S_k \quad (8) \qquad\qquad = (I + \operatorname{diag}(\alpha) N)\, W_K \quad (9)$$
#
# with $S_k$ of shape $(H, C)$, $N$ of shape $(C, C)$, and $\alpha$ with $C$ entries. Try the first.

# %%
S_k, N, alpha = kr.s_k.weight.T, kr.n.weight, kr.alpha  # (H, C), (C, C), (C,)
try:
    N @ S_k
    raise AssertionError("it conforms")
except RuntimeError as error:
    print("N S_k:", error)
W_K = S_k.T  # (C, H): the key as a linear layer stores it
S_v = ((torch.eye(C) + alpha.diag() @ N) @ W_K).T  # Eq. 9, transposed back to (H, C)
print("Eq. 9 with W_K = S_k^T:", tuple(S_v.shape))

# %% [markdown]
# Eq. 9 works if $W_K$ is $S_k^T$, $(C, H)$. So vectors are *columns* there, and rows in all other equations of the paper. For
# one token, in both conventions:
#
# $$v_j = k_j + \alpha \odot (N k_j) \;\text{(columns)}, \qquad
# v_j = k_j\, M, \quad M = I + N^T \operatorname{diag}(\alpha) \;\text{(rows)}.$$
#
# The gate $\alpha$ multiplies the *output* of $N$. It would be easy to build it on the input by mistake, $N(\alpha \odot k_j)$.
# The shapes do not object. Only a comparison does:

# %%
M = torch.eye(C) + N.T @ alpha.diag()
k = x[0] @ S_k  # (T, C)
close("row form and Eq. 9", k @ M, x[0] @ S_v)
close("elementwise form and Eq. 9", k + alpha * (k @ N.T), x[0] @ S_v)
on_input = k + (alpha * k) @ N.T
print(f"gate on the input instead: relative difference {(on_input - k @ M).norm() / (k @ M).norm():.2f}")
assert (on_input - k @ M).norm() > 0.1 * (k @ M).norm()

# %% [markdown]
# ## The whole layer, by hand
#
# $$O_i = \sum_c \Big( \sum_{j \le i} \phi\Big( \frac{x_i S_q Q_c\, k_j^T}{\sqrt C} \Big)\, k_j M \Big) O_c^T,
# \qquad k_j = x_j S_k, \qquad U_c = S_k M O_c^T$$
#
# Only $k_j$ depends on the past: $C$ numbers per token.

# %%
Q, O_T = kr.q.weight.unflatten(0, (m, C)).mT, kr.o.weight.T.unflatten(0, (m, C))  # (m, C, C), (m, C, H)
future = torch.ones(T, T).triu(1).bool()
scores = x[0] @ kr.s_q.weight.T @ Q @ k.T / C**0.5  # (m, T, T)
p = scores.masked_fill(future, -torch.inf).softmax(dim=-1)
by_hand = (p @ (k @ M) @ O_T).sum(0)
close("by hand and the class", by_hand, kr(x)[0])
close("inference and factorization", kr(x), kr.factorization(x))
kept = KVCache(GPT(replace(cfg, n_layer=1)), batch_size=1, capacity=1).numel()
print(f"cached per token and layer: {kept} = C; MFA caches {2 * C}")
assert kept == C

# %% [markdown]
# ## What sharing costs
#
# Put $S_v = S_k M$ into an ordinary MFA, and it computes the same. So **every MFA-KR is an MFA.** Not the other way round: an
# MFA reads values from $C$ further directions of $x_j$. The rank of $[S_k\; S_v]$ counts the directions of a token that the
# layer can see at all.

# %%
mfa = ATTENTION["mfa"](replace(cfg, attn="mfa"))
rank = {name: torch.linalg.matrix_rank(torch.cat(pair, 1)).item()
        for name, pair in dict(kr=(S_k, S_v), mfa=(mfa.s_k.weight.T, mfa.s_v.weight.T)).items()}  # fmt: skip
close("MFA-KR as MFA with S_v = S_k M", containment.mfakr_to_mfa(kr)(x), kr(x))
print(f"directions of x_j that the layer sees: MFA-KR {rank['kr']}, MFA {rank['mfa']}")
assert rank == dict(kr=C, mfa=2 * C)

# %% [markdown]
# ## Alpha starts at zero
#
# With $\alpha = 0$ the value *is* the key. The paper sets this at the start and calls it crucial for stability. So at step 0
# gated and vanilla reuse (no $N$ at all) are the same function. And what can then be learned? Write $g_j$ for the gradient of
# the loss with respect to $v_j$. By the product rule
#
# $$\frac{\partial L}{\partial \alpha} = \sum_j g_j \odot (k_j N^T), \qquad
# \frac{\partial L}{\partial N} = \operatorname{diag}(\alpha) \sum_j g_j^T k_j .$$
#
# The second has $\alpha$ as a factor. At $\alpha = 0$ it is exactly zero: **$\alpha$ must move first.** And the first has $N$
# as a factor: if $N$ were zero as well, neither would ever move.


# %%
def gradients(attn):
    with torch.enable_grad():
        attn.requires_grad_(True)
        attn(x).square().sum().backward()
    return attn.alpha.grad.norm().item(), attn.n.weight.grad.norm().item()


fresh, dead = layer(), layer()
fresh.alpha.zero_()
close("at alpha = 0, gated and vanilla", fresh(x), layer(key_reuse="vanilla")(x))
dead.load_state_dict(fresh.state_dict())
dead.n.weight.zero_()
for name, attn in dict(fresh=fresh, dead=dead).items():
    d_alpha, d_n = gradients(attn)
    print(f"{name}: gradient of alpha {d_alpha:.3f}, of N {d_n:.3f}")
    assert d_n == 0 and (d_alpha > 0) == (name == "fresh")

# %% [markdown]
# The zeros are exact, not small. The "dead" layer could be trained for a year: $\alpha$ and $N$ stay zero. (LoRA, which writes
# a change of weights as a product $BA$, starts in the same way for the same reason: one factor zero, the other not.)
#
# ## Watched over the first 20 steps
#
# Now in a real run: a small MFA-KR on Shakespeare's plays, one layer, rotary positions. `watch` is called in every step after
# the backward pass, before the weights move.

# %%
ids, val, characters = nb.shakespeare()
small = dict(attn="mfa_kr", n_layer=1, n_head=8, latent_dim=16)
seen = []


def watch(step, model):
    attn = model.blocks[0].attn
    seen.append((attn.alpha.grad.norm().item(), attn.n.weight.grad.norm().item(), attn.alpha.abs().max().item()))


nb.fit(nb.new_model(**small), ids, steps=20, watch=watch, batch_size=8)
for step, (d_alpha, d_n, size) in enumerate(seen[:4]):
    print(f"step {step}: gradient of alpha {d_alpha:.5f}, of N {d_n:.6f}; largest alpha {size:.4f}")
assert seen[0][1] == 0 and seen[0][2] == 0 and seen[1][1] > 0 and seen[0][0] > 0

# %%
fig, (left, right) = plt.subplots(1, 2, figsize=(8.4, 3.3))
d_alpha, d_n, size = zip(*seen, strict=True)
left.semilogy(d_alpha, color="#0072B2", marker="o", markersize=4, label="gradient of $\\alpha$")
left.semilogy(range(1, 20), d_n[1:], color="#D55E00", marker="^", markersize=4, label="gradient of $N$ (zero at step 0)")
left.set(xlabel="step", ylabel="norm", xticks=range(0, 20, 4))
left.margins(y=0.3)  # room for the legend
left.legend(fontsize=9)
right.plot(size, color="#009E73", marker="X")
right.set(xlabel="step", ylabel="largest entry of $|\\alpha|$", xticks=range(0, 20, 4), ylim=(0, None))
plt.show()

# %% [markdown]
# $\alpha$ leaves zero in the first step. AdamW, the optimizer, divides each gradient by its own size, so the first step of
# every entry is about the learning rate (0.003 here) whatever the gradient is. From the second step on $N$ learns too, with a
# gradient that is small because $\alpha$ is small. ($\alpha$ flattens at the end because this run of 20 steps lowers its
# learning rate to almost zero.)
#
# ## Table 4's steps
#
# The paper arrives at MFA-KR in four steps. In our terms they differ in $M$ alone:
#
# | Table 4 | `key_reuse` | $v_j = k_j M$ with $M =$ | perplexity in the paper |
# |---|---|---|---|
# | MFA | | ($S_v$ of its own) | 6.35 |
# | + vanilla KR | `vanilla` | $I$ | 6.55 |
# | + extra value proj. | `proj` | $N^T$ | 7.88 |
# | + residual connect | `residual` | $I + N^T$ | 6.65 |
# | + gating = MFA-KR | `gated` | $I + N^T \operatorname{diag}(\alpha)$ | 6.45 |
#
# Now use $U_c = S_k\, (M\, O_c^T)$. The output matrix is free. Whatever $M$ is, an $O'^T_c = M O_c^T$ does the same with
# vanilla reuse. We check it for all four.

# %%
for reuse in ("vanilla", "proj", "residual", "gated"):
    attn = layer(key_reuse=reuse)
    folded = containment.fold_key_reuse(attn)
    n_params = sum(p.numel() for p in attn.parameters())
    close(f"{reuse:8} {n_params} parameters; folded into vanilla", folded(x), attn(x))
    assert folded.cfg.key_reuse == "vanilla"

# %% [markdown]
# **All four are one class of functions.** $N$ and $\alpha$ add parameters, and nothing to what the layer can express. So the
# differences in Table 4, from 6.45 to 7.88, are differences of *optimisation*: the same functions, reached along other roads.
# That makes the table more interesting, and also more fragile: a change in initialisation or learning rate may reorder it.
#
# Can we see the differences here? Four variants, two seeds each, 100 steps of a one-layer model.

# %%
runs = {}
for reuse in ("vanilla", "proj", "residual", "gated"):
    for seed in (0, 1):
        model = nb.new_model(seed=seed, key_reuse=reuse, **small)
        runs[reuse, seed] = nb.fit(model, ids, steps=100, seed=seed, batch_size=8)
last = {key: sum(losses[-20:]) / 20 for key, losses in runs.items()}  # mean of the last 20 steps
for reuse in ("vanilla", "proj", "residual", "gated"):
    print(f"{reuse:8} training loss at the end, two seeds: {last[reuse, 0]:.3f} {last[reuse, 1]:.3f}")
assert max(last.values()) < 3.2  # all of them learn

# %%
fig, ax = plt.subplots()
styles = dict(vanilla=("#0072B2", "-"), proj=("#D55E00", "--"), residual=("#CC79A7", "-."), gated=("#009E73", "-"))
for (reuse, seed), losses in runs.items():
    smooth = torch.tensor(losses).unfold(0, 10, 1).mean(-1)
    color, line = styles[reuse]
    ax.plot(range(9, 100), smooth, line, color=color, alpha=1 if seed == 0 else 0.45, label=None if seed else reuse)
ax.set(xlabel="step", ylabel="training loss, mean of 10 steps", title="Table 4's variants at toy size (faint: second seed)")
ax.legend()
plt.show()

# %% [markdown]
# We cannot see Table 4 here: the variants lie as close to each other as two seeds of the same variant. That is a negative
# result worth keeping. The paper's runs have 20 layers, 2048 channels and 50,000 steps, and report instability for `proj`; a
# hundred steps of a toy neither confirm that nor contradict it. Notebook 07 shows the larger runs of this project.
#
# ## The question the paper leaves open
#
# With rotary positions the key is rotated before it meets the query. Is the *value* the key before or after the rotation? The
# paper does not say. There are three sensible answers, `key_reuse_rope`:
#
# | | cached | value | $U_c$ for query $i$ and key $j$ |
# |---|---|---|---|
# | `pre` (default) | $k_j$ | from $k_j$; the key is rotated on every read | $S_k\, M\, O_c^T$ |
# | `post` | $k_j R_j$ | from $k_j R_j$ | $S_k R_j\, M\, O_c^T$ |
# | `inverse` | $k_j R_j$ | from $k_j R_j$; the output is rotated back by $i$ | $S_k R_j R_i^{-1} M\, O_c^T$ |
#
# In `pre` a value does not know its position. In `post` it carries its *absolute* position. In `inverse` it carries the
# distance, $R_j R_i^{-1} = R_{j-i}$.

# %%
reading = {name: layer(pos="rope", rope_base=100.0, key_reuse_rope=name) for name in ("pre", "post", "inverse")}
for name, attn in reading.items():
    close(f"{name:8} inference and factorization", attn(x), attn.factorization(x))
    assert KVCache(GPT(replace(attn.cfg, n_layer=1)), 1, 1).numel() == C
difference = (reading["pre"](x) - reading["post"](x)).norm() / reading["pre"](x).norm()
print(f"same weights, pre and post: relative difference {difference:.2f}")
shifted = {name: (a.vo_circuit(17, 13) - a.vo_circuit(7, 3)).abs().max().item() for name, a in reading.items()}
print("U_c changes when both positions move by 10:", {name: f"{e:.1e}" for name, e in shifted.items()})
assert shifted["pre"] == 0 and shifted["inverse"] < 1e-14 and shifted["post"] > 0.01

# %% [markdown]
# All three are valid attentions and all three cache $C$ numbers. They are different functions. To see how, compare each $U_c(i,
# j)$ with the one at positions $(0, 0)$: 1 means that the value says the same as there.

# %%
size = 32
fig, axes = plt.subplots(1, 3, figsize=(8.4, 3.0), sharey=True)
for ax, (name, attn) in zip(axes, reading.items(), strict=True):
    origin = attn.vo_circuit(0, 0).flatten()
    U = torch.stack([torch.stack([attn.vo_circuit(i, j).flatten() for j in range(size)]) for i in range(size)])
    overlap = (U @ origin) / (U.norm(dim=-1) * origin.norm())
    overlap[torch.ones(size, size).triu(1).bool()] = torch.nan
    picture = ax.imshow(overlap, cmap="PuOr", vmin=-1, vmax=1)
    ax.set(title=name, xlabel="key position $j$")
    ax.grid(False)
axes[0].set_ylabel("query position $i$")
fig.colorbar(picture, ax=axes, label="similarity of $U_c(i, j)$ to $U_c(0, 0)$", shrink=0.85)
plt.show()

# %% [markdown]
# Constant (`pre`), vertical stripes (`post`: only $j$ matters), diagonal stripes (`inverse`: only $i - j$ matters).
#
# What do they cost in decoding? Count the rows that go through `rotate` when one token is decoded behind a cache of 100.

# %%
for name in ("pre", "post", "inverse"):
    model = GPT(replace(cfg, pos="rope", key_reuse_rope=name, n_layer=1, block_size=128)).eval()
    cache, attn, rows = KVCache(model, 1, 128), model.blocks[0].attn, []
    model(torch.zeros(1, 100, dtype=torch.long), cache=cache)
    plain = attn.rotate
    attn.rotate = lambda t, pos, plain=plain, rows=rows: (rows.append(t.numel() // t.shape[-1]), plain(t, pos))[1]
    model(torch.zeros(1, 1, dtype=torch.long), cache=cache)
    print(f"{name:8} rows rotated for one token: {sum(rows)}  {rows}")
    assert sum(rows) == {"pre": m + 101, "post": m + 1, "inverse": 2 * m + 1}[name]

# %% [markdown]
# `pre` rotates every cached key in every step. With PyTorch's operations a step then takes many times as long; a kernel that
# rotates keys as they pass costs a sixth of a step (notebook 06). `post` costs nothing extra; `inverse` rotates one output per
# head. Which of them learns best is question A of `experiments/RESULTS.md`; notebook 07 prints what is measured. At 30M
# parameters `post` is worse than `pre` in all three seeds, at rates of 1.4e-3 and 2e-3. We know of no published comparison.
#
# ## Folding
#
# After training, $M$ can be folded behind the attention, exactly, and in every reading: it always stands directly before
# $O_c^T$. So decoding needs $k_j$ and nothing else. In formulas, $\sum_j p_{ij}\,(k_j M)\, O_c^T = \big(\sum_j p_{ij}\,
# k_j\big)\,(M O_c^T)$. The class uses it: $M$ multiplies what has fewer rows, the output of a few tokens or $O_c^T$.

# %%
for name, attn in reading.items():
    close(f"{name:8} folded", containment.fold_key_reuse(attn)(x), attn(x))
    many = x.repeat(attn.cfg.dim, 1, 1)  # more tokens than O_c^T has rows
    close(f"{name:8} few and many tokens", attn(x), attn(many)[: len(x)])

# %% [markdown]
# *Caveat.* Exact means up to rounding. In bfloat16 the folded matrix $M O_c^T$ is rounded once more; fold in float32 and
# convert after.

# %% [markdown]
# ## Which published model is which setting
#
# Key reuse, a wider query and a norm on it have all been shipped since, one way or another. In this project's words:
#
# | model | `attn` | settings | bilinear |
# |---|---|---|---|
# | MFA-KR of the paper | `mfa_kr` | `key_reuse="gated"`, `key_reuse_rope="pre"` (our reading) | yes |
# | Step-3 | `mfa` | `latent_norm=True`, `q_rank` = 8 C | no |
# | DeepSeek-V4, the core of its attention | `mfa_kr` | `key_reuse="vanilla"`, `key_reuse_rope="inverse"`, `rope_fraction` = 1/8 (64 of 512), `q_rank` = 2 C (1,024), `qk_norm=True`, `latent_norm=True` | without its norms |
#
# What surrounds the attention in a real model is left out. We build each one small and check three things. Its parameters are
# those of `counts()`, and so is its cache. Where there is no norm between the factors, Eq. 1 gives the same numbers.

# %%
core = dict(key_reuse="vanilla", key_reuse_rope="inverse", rope_fraction=1 / 8, q_rank=32)
PUBLISHED = {
    "MFA-KR of the paper": dict(attn="mfa_kr", key_reuse="gated", key_reuse_rope="pre"),
    "Step-3": dict(attn="mfa", latent_norm=True, q_rank=8 * 16),
    "Step-3 without its norm": dict(attn="mfa", q_rank=8 * 16),
    "DeepSeek-V4's core": dict(attn="mfa_kr", qk_norm=True, latent_norm=True, **core),
    "DeepSeek-V4's core without its norms": dict(attn="mfa_kr", **core),
}
built = {}
for name, settings in PUBLISHED.items():
    published = Config(dim=64, latent_dim=16, n_head=4, n_layer=1, **settings)
    built[name], counts = ATTENTION[published.attn](published), ATTENTION[published.attn].counts(published)
    assert sum(p.numel() for p in built[name].parameters()) == counts.params
    assert KVCache(GPT(published), 1, 1).numel() == counts.kv_cache == (16 if published.attn == "mfa_kr" else 32)

# %%
states = torch.randn(1, T, 64)
for name, attn in built.items():
    if attn.cfg.latent_norm or attn.cfg.qk_norm:
        try:
            raise AssertionError(attn.factorization(states))
        except ValueError as error:
            print(f"{name}: {error}")
    else:
        close(f"{name}: inference and factorization", attn(states), attn.factorization(states))

# %% [markdown]
# ## Exercises
#
# **1 (easy).** Table 2's MFA-KR has $H = 2048$, 24 layers and $C = 256$. How many bytes of cache is one token, at 16 bits?

# %%
kr_bytes = ...

# %%
check(1, kr_bytes)

# %% [markdown]
# **2 (medium).** Write the fold. Given an MFA-KR with an open gate, return the weight of the output projection, $(H, mC)$, with
# which the *vanilla* layer computes the same.


# %%
def folded_output(attn):
    return ...


# %%
plain, answer = layer(key_reuse="vanilla"), ...
if folded_output(kr) is not ...:
    plain.o.weight.copy_(folded_output(kr))
    answer = plain(x)
check(2, answer, kr(x))

# %% [markdown]
# **3 (hard).** Which MFA can be turned into an MFA-KR? Only one whose $S_v$ has the form $S_k M$. Given an `mfa`, return the
# $M$, $(C, C)$, with the least $\| S_v - S_k M \|$. We try it on an MFA that has such an $M$.


# %%
def recover_M(mfa):
    return ...


# %%
answer = recover_M(containment.mfakr_to_mfa(kr))
check(3, answer, M)

# %% [markdown]
# Worked solutions: [solutions/05_key_reuse_solutions.ipynb](solutions/05_key_reuse_solutions.ipynb). They also ask how far a
# *random* MFA is from key reuse.
