# %% [markdown]
# # 2. From FPBA to MHA: cut every W to rank d
#
# **The story.** FPBA gives every head a full matrix $W_c$ and nobody can afford it. Ordinary multi-head attention (MHA) is what
# remains when each $W_c$ and $U_c$ is replaced by a product of two thin matrices. We make the cut, show that nothing else
# changes, look at the $W_c$ of a model we train ourselves, and then share factors between heads: that gives GQA and MQA. At the
# end we measure the capacity table of the paper.
#
# **After this notebook you can**
#
# 1. write MHA in the inference and in the factorization formulation, and check that they agree;
# 2. copy an MHA into an FPBA, and say why the way back is closed;
# 3. read the singular values of a trained head, and know what to compare them with;
# 4. measure each column of Table 1 on a real module.
#
# **Time:** 45 minutes, exercises included. It runs in about 20 seconds. **Before:** 01 (a score is a bilinear form), and the
# singular value decomposition from linear algebra.

# %%
import sys

sys.path[:0] = ["notebooks", ".", ".."]  # nb.py is in one of them
import nb

nb.start()  # plot style, float64, seed, no gradients

# %%
import copy
from dataclasses import replace

from experiments.paper import containment
import matplotlib.pyplot as plt
from experiments.paper import tables as paper
import torch
from nb import COLOR, MARKER, NAME, close

from mfa import ATTENTION, GPT, Config, KVCache

check, hint = nb.exercises("02")

cfg = Config(attn="mha", dim=32, n_head=4, head_dim=8, pos="none")
H, n, d, T = cfg.dim, cfg.heads, cfg.head_dim, 10
x = torch.randn(1, T, H)
rank = torch.linalg.matrix_rank
print(f"H = {H}, n = {n} heads of width d = {d}, T = {T} tokens")

# %% [markdown]
# ## A cut of rank d
#
# Any matrix is a sum of rank-one matrices, ordered by size: $W = \sum_r s_r\, a_r b_r^T$, with singular values $s_1 \ge s_2 \ge
# \dots$ Keep the first $d$ terms and you have the best approximation of rank $d$. What is lost is exactly the rest of the
# singular values:
#
# $$\| W - W_{(d)} \|^2 = \sum_{r > d} s_r^2, \qquad W_{(d)} = Q K^T, \quad Q, K \in \mathbb R^{H \times d}.$$
#
# A full $W$ has $H^2$ parameters, the two factors have $2Hd$. At $d = H/n$ that is $2H^2/n$.


# %%
def cut(W, d):
    """The best factors of rank d: W (..., H, H) -> Q, K (..., H, d)."""
    a, s, bT = torch.linalg.svd(W)
    root = s[..., None, :d].sqrt()
    return a[..., :d] * root, bT[..., :d, :].mT * root


full = torch.randn(H, H)
Q, K = cut(full, d)
s = torch.linalg.svdvals(full)
close("what the cut loses", (full - Q @ K.T).norm(), s[d:].norm())
print(f"rank {rank(Q @ K.T)} of {H}; a random W loses {s[d:].norm() / s.norm():.0%} of its norm")

# %% [markdown]
# A random $W$ has no small directions, so the cut hurts. Whether it hurts a *trained* head is another question. We ask it
# below.
#
# ## Equation 2: MHA as it runs
#
# $$O_i = \sum_{c=1}^{n} \Big( \sum_{j \le i} \phi\Big( \frac{x_i Q_c\,(x_j K_c)^T}{\sqrt d} \Big)\, x_j V_c \Big) O_c^T
# \qquad (2)$$
#
# Each of the four matrices of a head is $(H, d)$. First make $n$ short queries, keys and values, then let them meet. The keys
# and values are cached: $2nd$ numbers per token, $2H$ when $nd = H$. (The paper says "given that typically $nh = H$". The $h$
# is a misprint for $d$.)

# %%
mha = ATTENTION["mha"](cfg)
Q, K, V = (layer.weight.unflatten(0, (n, d)).mT for layer in (mha.q, mha.k, mha.v))  # (n, H, d) each
O_T = mha.o.weight.T.unflatten(0, (n, d))  # (n, d, H): O_c^T
future = torch.ones(T, T).triu(1).bool()  # j > i


def causal_softmax(scores):
    return scores.masked_fill(future, -torch.inf).softmax(dim=-1)


q, k, v = x @ Q, x @ K, x @ V  # (n, T, d) each; k and v are the cache
eq2 = (causal_softmax(q @ k.mT / d**0.5) @ v @ O_T).sum(0)
close("Eq. 2 and the class", eq2, mha(x)[0])

# %% [markdown]
# ## Equation 3: the same MHA as a factorization
#
# $$O_i = \sum_{c=1}^{n} \sum_{j \le i} \phi\Big( \frac{x_i\,(Q_c K_c^T)\,x_j^T}{\sqrt d} \Big)\, x_j\,(V_c O_c^T)
# \qquad (3)$$
#
# Matrix products may be bracketed as one likes. So Eq. 3 is Eq. 1, FPBA, with $W_c = Q_c K_c^T$ and $U_c = V_c O_c^T$, both of
# rank $d$.

# %%
W, U = Q @ K.mT, V @ O_T  # (n, H, H) each
eq3 = (causal_softmax(x @ W @ x.mT / d**0.5) @ (x @ U)).sum(0)
close("Eq. 3 and Eq. 2", eq3, eq2)
close("Eq. 3 and factorization()", eq3, mha.factorization(x)[0])
assert rank(W).tolist() == rank(U).tolist() == [d] * n
rope = ATTENTION["mha"](replace(cfg, pos="rope"))
close("with rotary positions, both formulations", rope(x), rope.factorization(x))

# %% [markdown]
# The differences are a few units in the sixteenth digit. They are not zero, because floating point addition is not associative,
# while matrix multiplication on paper is. In float32 the same check would show about $10^{-7}$.
#
# ## MHA inside FPBA
#
# If MHA is a special FPBA, then there is an FPBA with the same outputs. FPBA has $H$ heads, MHA only $n$: the other heads get
# $U_c = 0$. They look somewhere and write nothing. Let us copy $W_c$ and $U_c$ as they are.

# %%
fpba = ATTENTION["fpba"](replace(cfg, attn="fpba", n_head=0))
fpba.W.zero_()
fpba.U.zero_()
fpba.W[:n], fpba.U[:n] = W, U
off = ((fpba(x) - mha(x)).norm() / mha(x).norm()).item()
print(f"relative difference: {off:.4f}")
assert off > 1e-3  # not the same!

# %% [markdown]
# That failed. Can you see why before you read on? The matrices are right, but the two attentions divide their scores by
# different numbers: FPBA by $\sqrt H$, MHA by $\sqrt d$. The paper's sentence that MHA *is* FPBA with low-rank $W_c$ hides this
# factor. It is harmless, because $W_c$ is free to take it up.

# %%
fpba.W[:n] = W * (H / d) ** 0.5
close("FPBA with MHA's weights, scale corrected", fpba(x), mha(x))
close("the same by containment.to_fpba", containment.to_fpba(mha)(x), mha(x))

# %% [markdown]
# **The way back is closed.** A random FPBA has $W_c$ of rank $H$, and $H$ heads of them. We cut all of its $W_c$ and $U_c$ to
# rank $r$ and watch what the layer puts out.

# %%
free = ATTENTION["fpba"](replace(cfg, attn="fpba", n_head=0))
free.W.mul_(8)  # sharper attention, so that W_c matters
cuts, target = {}, free(x)
for r in range(2, H + 1, 2):
    thin = copy.deepcopy(free)
    for name in ("W", "U"):
        left, right = cut(getattr(free, name), r)
        getattr(thin, name).copy_(left @ right.mT)
    cuts[r] = ((thin(x) - target).norm() / target.norm()).item()
assert cuts[H] < 1e-12 and min(cuts[r] for r in range(2, H, 2)) > 1e-2
print(f"error at rank d = {d}: {cuts[d]:.2f}; at rank {H - 2}: {cuts[H - 2]:.3f}; at rank H: {cuts[H]:.0e}")

# %%
fig, ax = plt.subplots()
ax.plot(list(cuts), list(cuts.values()), color=COLOR["fpba"], marker=MARKER["fpba"])
ax.axvline(d, color=COLOR["mha"], linestyle=":")
ax.text(d + 0.4, 0.05, "rank $d$ of the MHA above", color=COLOR["mha"], fontsize=9)
ax.set(xlabel="rank kept of every $W_c$ and $U_c$", ylabel="relative error of the output", ylim=(0, None))
ax.set_title("A random FPBA of width 32, cut")
plt.show()

# %% [markdown]
# ## A trained model
#
# Random matrices are the worst case for a cut. What does training do? We train a small MHA on Shakespeare's plays, two layers
# of four heads of width 16, for 250 steps. Positions come from ALiBi: it subtracts a multiple of the distance $i - j$ from the
# score and leaves $W_c$ alone. (With rotary positions there is one $W_c$ for every distance.) The text and the loop are in
# `nb.py`; the optimizer is `train.py`'s.

# %%
ids, val, characters = nb.shakespeare()
model = nb.new_model(attn="mha", pos="alibi")
before = [block.attn.qk_circuit().double() for block in model.blocks]
losses = nb.fit(model, ids, steps=250)
val_loss = nb.validate(model, val)
print(f"loss {losses[0]:.2f} at the start, validation {val_loss:.2f} at the end (nats per character)")
assert val_loss < 2.5 < losses[0]

# %%
fig, axes = plt.subplots(1, 2, figsize=(8.4, 3.4), sharey=True)
for layer, (ax, block) in enumerate(zip(axes, model.blocks, strict=True)):
    after = block.attn.qk_circuit().double()
    for W_c, style in [(w, dict(color="0.65", ls="--")) for w in before[layer]] + [(w, dict(color="#0072B2")) for w in after]:
        s = torch.linalg.svdvals(W_c)[:16]
        ax.plot(range(1, 17), s / s[0], **style)
    ax.set(title=f"layer {layer + 1}: four heads", xlabel="singular value number")
axes[0].set(ylabel="singular value of $W_c$ / largest", ylim=(0, 1.03))
axes[0].plot([], [], color="0.65", ls="--", label="before training")
axes[0].plot([], [], color="#0072B2", label="after 250 steps")
axes[0].legend()
plt.show()

# %% [markdown]
# The curves fall. It would be easy to write "the trained heads have low rank". But the dashed curves fall as well, and those
# are random products $Q_c K_c^T$. **Always plot the untrained model beside the trained one.** The difference between the two is
# what training did, and here it is small: the blue curves lie a little lower.
#
# Does the model use the small directions? Cut every head's $W_c$ to rank $r$ and evaluate again. At $r = 0$ all scores are
# zero, and only ALiBi's distances are left: this is what is left of *this* model when where it looks no longer depends on
# content.

# %%
loss_at = {}
for r in (0, 1, 2, 4, 6, 8, 10, 12, 14, 16):
    thin = copy.deepcopy(model)
    for block in thin.blocks:
        left, right = cut(block.attn.qk_circuit().double(), r)  # (4, 64, r) each
        for layer, factor in ((block.attn.q, left), (block.attn.k, right)):
            layer.weight.unflatten(0, (4, 16)).zero_()[:, :r] = factor.mT.float()
    loss_at[r] = nb.validate(thin, val)
print({r: round(loss, 3) for r, loss in loss_at.items()})
assert abs(loss_at[16] - val_loss) < 1e-3 and loss_at[1] > loss_at[4] > loss_at[16]
assert loss_at[0] - loss_at[1] > (loss_at[0] - val_loss) / 2 and loss_at[10] - val_loss < 0.05

# %%
fig, ax = plt.subplots()
ax.plot(list(loss_at), list(loss_at.values()), color=COLOR["mha"], marker=MARKER["mha"])
ax.axhline(val_loss, color="gray", linestyle=":")
ax.text(0, val_loss - 0.012, "not cut", color="gray", fontsize=9, va="top")
ax.set(xlabel="rank kept of every $W_c$", ylabel="validation loss, nats per character", xticks=list(loss_at))
ax.set_title("A trained MHA, heads of width 16, cut after training")
ax.margins(y=0.12)
plt.show()

# %% [markdown]
# One direction per head already brings back more than half of what the cut to 0 costs, and rank 10 comes within 0.05 nats of
# the whole. (A model trained without content would do better than this one without it, so the whole is less than what was cut
# off.) No single direction beyond that matters much, but there is no step in the curve either, nor in the spectrum above:
# nothing here says "the rank of this head is 5". *Caveats.* One seed, a tiny model, ten seconds of training. And a model that
# is cut after training had no chance to adapt; one that is trained at rank 8 from the start may do better.
#
# ## Sharing: GQA and MQA
#
# The cut made heads cheap in parameters. The cache is still $2nd$. The next step is to let heads **share** keys and values. In
# GQA, head $c$ uses the key of its group $g(c)$; in MQA there is one group:
#
# $$W_c = Q_c K_{g(c)}^T, \qquad U_c = V_{g(c)} O_c^T.$$
#
# So GQA is an MHA in which some $K_c$ are equal. `containment.gqa_to_mha` repeats them. What it costs shows on the key side:
# stack all $W_c$, $(nH, H)$, and count the directions of $x_j$ that any head can see.

# %%
for attn, g in dict(mha=4, gqa=2, mqa=1).items():
    shared = ATTENTION[attn](replace(cfg, attn=attn, n_kv_head=2))
    if g < n:
        close(f"{NAME[attn]} copied into MHA", containment.gqa_to_mha(shared)(x), shared(x))
    W_c = shared.qk_circuit()
    each, stacked = rank(W_c).tolist(), rank(W_c.flatten(0, 1)).item()
    print(f"{NAME[attn]}: rank of each W_c {each}, of all stacked {stacked}, cache {shared.counts(shared.cfg).kv_cache}")
    assert each == [d] * n and stacked == g * d == shared.counts(shared.cfg).kv_cache // 2

# %% [markdown]
# Each head keeps its rank $d$. What shrinks is the *shared* space, and with it the cache, in the same proportion: half of the
# cache is the key, and the rank on the key side is its width. This is the trade that the rest of the course is about. (A
# caution on Table 1: its "shared latent subspace dimension" for MHA is $H$. It is $nd$, if $nd < H$.)
#
# ## The capacity table, measured
#
# Table 1 lists, for each attention, cache, parameters, heads, rank per head, shared dimension and total effective rank (heads
# $\times$ rank). We quote nothing. We build each attention small, count its parameters, allocate its cache, and take the ranks
# of its $W_c$ by SVD.

# %%
small = Config(dim=32, head_dim=8, n_kv_head=2, latent_dim=12, mfa_n_head=6, n_layer=1, pos="none")
print(f"{'':8}{'cache':>6}{'params':>8}{'heads':>6}{'rank':>6}{'shared':>7}{'total':>7}")
for attn in ATTENTION:
    model_of = GPT(replace(small, attn=attn))
    module = model_of.blocks[0].attn
    found = paper.ranks(module)
    cache = KVCache(model_of, batch_size=1, capacity=1).numel()
    params = sum(p.numel() for p in module.parameters())
    row = (cache, params, module.n_head, max(found.heads), found.key_side, sum(found.heads))
    print(f"{NAME[attn]:8}{cache:6}{params:8,}{row[2]:6}{row[3]:6}{row[4]:7}{row[5]:7}")
    assert row == tuple(module.counts(module.cfg))

# %% [markdown]
# Every row agrees with `counts()`, the closed form in `mfa.py`, or the last line would have stopped us. MFA-KR is not in the
# paper's table; its row is ours. Read the last two columns together. "Total" is a *sum* of ranks, so it may exceed $H = 32$; no
# single matrix has that rank. "Shared" is a rank. Notebook 04 returns to the difference.
#
# ## Exercises
#
# **1 (easy).** A model has $H = 4096$, 32 layers, 32 heads of width 128, and keeps its cache in 16 bits. How many bytes of
# cache does one token take with MHA, and with GQA at $g = 8$?

# %%
mha_bytes, gqa_bytes = ..., ...

# %%
check(1, [mha_bytes, gqa_bytes])

# %% [markdown]
# **2 (medium).** Copy an MQA into an MHA yourself. Given an `mqa`, return the weights `k` and `v`, each $(nd, H)$, of the MHA
# that computes the same.


# %%
def repeated(mqa):
    return ..., ...


# %%
mqa, answer = ATTENTION["mqa"](replace(cfg, attn="mqa")), ...
k_weight, v_weight = repeated(mqa)
if k_weight is not ...:
    wide = ATTENTION["mha"](cfg)
    wide.load_state_dict({**mqa.state_dict(), "k.weight": k_weight, "v.weight": v_weight})
    answer = wide(x)
check(2, answer, mqa(x))

# %% [markdown]
# **3 (hard).** The way back is open after all when the ranks allow it. You get the circuits `W` and `U`, each $(n, H, H)$, of
# an attention whose heads have rank at most $d$, with scores divided by $\sqrt d$. You do not get the factors. Return the four
# weights `q, k, v, o` of an MHA with these circuits. (`q, k, v` are $(nd, H)$ and `o` is $(H, nd)$.)


# %%
def to_mha(W, U, d):
    return dict(q=..., k=..., v=..., o=...)


# %%
weights, answer = to_mha(mha.qk_circuit(), mha.vo_circuit(), d), ...
if all(w is not ... for w in weights.values()):
    again = ATTENTION["mha"](cfg)
    again.load_state_dict({f"{name}.weight": w for name, w in weights.items()})
    answer = again(x)
check(3, answer, mha(x))

# %% [markdown]
# Worked solutions: [solutions/02_fpba_to_mha_solutions.ipynb](solutions/02_fpba_to_mha_solutions.ipynb). Next:
# [03_mla](03_mla.ipynb) compresses keys and values into a shared latent.
