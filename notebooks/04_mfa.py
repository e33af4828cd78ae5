# %% [markdown]
# # 4. MFA: many heads on one key
#
# **The story.** A KV cache is small when all heads share one key and one value. MQA does that and loses accuracy. MFA shares
# the key too, but makes it twice as wide, and can afford about as many of these wide heads as before, because their query is
# factored. We derive this, measure it, and then say plainly what it does not do.
#
# **After this notebook you can**
#
# 1. write MFA in both formulations and check that they agree;
# 2. say what one more head costs in MHA, MQA and MFA, and what it adds to the cache;
# 3. explain why rotary positions cost MFA nothing;
# 4. say what "MFA is MQA with a factored query" gets right, and what "total effective rank" does not measure;
# 5. explain why an optimizer that treats all directions alike suits a product of matrices.
#
# **Time:** 55 minutes, exercises included. It runs in half a minute. **Before:** 02 (heads as low-rank matrices). 03 (MLA) helps but
# is not needed.

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
from nb import COLOR, NAME, close

from mfa import ATTENTION, GPT, Config, KVCache, preset

check, hint = nb.exercises("04")

cfg = Config(attn="mfa", dim=32, n_head=6, latent_dim=8, pos="none")
H, m, C, T = cfg.dim, cfg.heads, cfg.latent, 10
mfa = ATTENTION["mfa"](cfg)
x = torch.randn(1, T, H)
print(f"H = {H}, m = {m} heads, C = {C};", {name: tuple(p.shape) for name, p in mfa.named_parameters()})

# %% [markdown]
# ## Equation 6: the order of products that keeps the cache small
#
# Vectors are rows. Token $j$ has the state $x_j$, of width $H$. Three matrices $S_q, S_k, S_v$, each $(H, C)$, are shared by
# all heads. Head $c$ owns $Q_c$, $(C, C)$, and $O_c$, $(H, C)$:
#
# $$O_i = \sum_{c=1}^{m} \Big( \sum_{j \le i} \phi\Big( \frac{x_i S_q Q_c\,(x_j S_k)^T}{\sqrt C} \Big)\, x_j S_v \Big) O_c^T
# \qquad (6)$$
#
# $\phi$ is the softmax over $j$. Look at what depends on $j$: only $x_j S_k$ and $x_j S_v$. These two, $2C$ numbers, are all
# that a token must leave in the cache. There is no $c$ in them, so the number of heads does not matter.
#
# `mfa.py` stores $S_q$ as the weight of a linear layer, which is its transpose: hence the `.T`.

# %%
S_q, S_k, S_v = mfa.s_q.weight.T, mfa.s_k.weight.T, mfa.s_v.weight.T  # (H, C) each
Q = mfa.q.weight.unflatten(0, (m, C)).mT  # (m, C, C): Q_c
O_T = mfa.o.weight.T.unflatten(0, (m, C))  # (m, C, H): O_c^T
future = torch.ones(T, T).triu(1).bool()  # j > i


def causal_softmax(scores):
    return scores.masked_fill(future, -torch.inf).softmax(dim=-1)


k, v = x[0] @ S_k, x[0] @ S_v  # (T, C) each: the cache
q = x[0] @ S_q @ Q  # (m, T, C)
eq6 = (causal_softmax(q @ k.T / C**0.5) @ v @ O_T).sum(0)  # (T, H)
close("Eq. 6 and the class", eq6, mfa(x)[0])

# %% [markdown]
# ## Equation 7: the same numbers, read as a factorization
#
# Move the brackets. Nothing else changes:
#
# $$O_i = \sum_{c=1}^{m} \sum_{j \le i} \phi\Big( \frac{x_i\,W_c\,x_j^T}{\sqrt C} \Big)\, x_j U_c,
# \qquad W_c = S_q Q_c S_k^T, \quad U_c = S_v O_c^T \qquad (7)$$
#
# $W_c$ is the head's *QK circuit*: it decides where the head looks. $U_c$ is its *VO circuit*: it decides what the head writes.
# Both are $(H, H)$, far too large to store for every head, but good for asking what a head can do.

# %%
W = S_q @ Q @ S_k.T  # (m, H, H)
U = S_v @ O_T  # (m, H, H)
eq7 = (causal_softmax(x[0] @ W @ x[0].T / C**0.5) @ (x[0] @ U)).sum(0)
close("Eq. 7 and Eq. 6", eq7, eq6)
close("Eq. 7 and factorization() of the class", eq7, mfa.factorization(x)[0])
close("W_c and qk_circuit()", W, mfa.qk_circuit())

# %% [markdown]
# ## Three misprints, and how to notice them
#
# If you read the paper beside this notebook you will find three differences. Equations 6 and 7 in print have
#
# 1. $O_c \in \mathbb R^{C \times C}$. Then head $c$ would give a vector of width $C$, and $O_i$ could not be added to a
#    residual of width $H$. Table 1 counts $mCH$ parameters for the $O_c$, so $(H, C)$ is meant.
# 2. $\sqrt d$ under the scores. MFA has no $d$. The usual reason for the division is that a sum of $C$ products of unit
#    variance has standard deviation $\sqrt C$.
# 3. $n$ heads, where Table 1 writes $m$.
#
# Shapes and counts decide the first one. Let us make the computer say so.

# %%
table1 = H * (3 * C + m * C) + m * C**2  # as printed
measured = sum(p.numel() for p in mfa.parameters())
with_square_O = measured - m * C * H + m * C * C
print(f"Table 1: {table1:,}   measured: {measured:,}   with a square O_c: {with_square_O:,}")
assert table1 == measured != with_square_O
try:
    (v @ torch.randn(m, C, C)).sum(0) + x[0]
    raise AssertionError("a (C, C) matrix fitted")
except RuntimeError as error:
    print("a square O_c:", error)

# %% [markdown]
# The second one is a question of size, so measure it. Take keys and queries with entries of variance 1.

# %%
for width in (8, 64, 256):
    dots = (torch.randn(20_000, width) * torch.randn(20_000, width)).sum(1)
    ratio = dots.std() / width**0.5
    print(f"width {width:3d}: std of a dot product {dots.std():6.2f}, divided by sqrt(width) {ratio:.3f}")
    assert abs(ratio - 1) < 0.03

# %% [markdown]
# ## What does a head cost?
#
# Take the paper's 1B model: $H = 2048$, and $C = 256$. One more head adds
#
# | attention | new parameters of one head | new cache elements |
# |---|---|---|
# | MHA, heads of width $d$ | $4Hd$ | $2d$ |
# | MQA, heads of width $C$ | $2HC$ | 0 |
# | MFA, heads of width $C$ | $HC + C^2$ | 0 |
#
# An MQA head brings a query matrix $(H, C)$ and an output matrix $(H, C)$. An MFA head brings the output matrix too, but its
# query matrix is only $(C, C)$. The paper says "about $CH$"; at $C = H/8$ it is $1.125\,CH$. We count on the `meta` device,
# which has shapes but no memory.


# %%
def count(attn, **fields):
    with torch.device("meta"):
        attention = ATTENTION[attn](preset("paper-1b", attn, **fields))
    elements = ATTENTION[attn].counts(attention.cfg).kv_cache
    return sum(p.numel() for p in attention.parameters()), elements


big_H, big_C = 2048, 256
widths = dict(mha=dict(head_dim=128), mqa=dict(head_dim=256), mfa=dict(latent_dim=256))
for attn, cost in dict(mha=4 * big_H * 128, mqa=2 * big_H * big_C, mfa=big_H * big_C + big_C**2).items():
    one_more = count(attn, n_head=15, **widths[attn])[0] - count(attn, n_head=14, **widths[attn])[0]
    print(f"{NAME[attn]}: one more head costs {one_more:,} parameters, {one_more / (big_C * big_H):.3f} CH")
    assert one_more == cost

# %%
heads = range(2, 41, 2)
fig, (left, right) = plt.subplots(1, 2, figsize=(8.4, 3.5))
for attn, width in dict(mha=128, mqa=256, mfa=256).items():
    params, elements = zip(*(count(attn, n_head=n, **widths[attn]) for n in heads), strict=True)
    style = dict(color=COLOR[attn], marker=nb.MARKER[attn], markersize=4)
    left.plot([n * width for n in heads], [p / 1e6 for p in params], label=f"{NAME[attn]}, heads of {width}", **style)
    right.plot([n * width for n in heads], elements, **style | dict(markersize=8 if attn == "mqa" else 4))
left.axhline(4 * big_H**2 / 1e6, color="gray", linestyle=":", label="MHA at $n d = H$")
left.set(xlabel="heads × rank of each", ylabel="parameters of one layer, millions", ylim=(0, 52), xlim=(0, 8500))
right.set(xlabel="heads × rank of each", ylabel="cache elements per token, one layer", xlim=(0, 8500), ylim=(0, None))
right.text(8300, 950, "MQA and MFA: always 512", fontsize=9, ha="right")
left.legend(fontsize=9)
plt.show()

# %% [markdown]
# Same horizontal axis, so read it vertically: at the budget of an ordinary MHA layer (dotted) MFA affords about
# $25{\times}256=6400$, MQA at most 15 heads and MHA 16 of half the width. On the right, MHA pays for every head in cache.
#
# **Table 3 of the paper** is this argument in two numbers. It starts from 8 heads of 256 on one key and value, queries not
# factored, and goes to 14 heads ($14 \times 256 = 1.75 H$), once without and once with the factored query.

# %%
start = count("mqa", n_head=8, head_dim=256)[0]
plain = 20 * (count("mqa", n_head=14, head_dim=256)[0] - start)
factored = 20 * (count("mfa", n_head=14, latent_dim=256)[0] - start)
print(f"20 layers, 8 heads -> 14: not factored +{plain / 1e6:.1f}M, factored +{factored / 1e6:.1f}M")
assert (round(plain / 1e6, 1), round(factored / 1e6, 1)) == (125.8, 7.9)

# %% [markdown]
# Table 3 prints 1.08B, 1.20B and 1.08B for these three models: a difference of 0.12B, and one that disappears in rounding. (It
# reports perplexity 6.36 for the third; Table 4 has the same model at 6.35.)
#
# ## The cache, measured
#
# A formula for the cache is worth little if the code keeps something else. `KVCache` allocates exactly what a token leaves
# behind, so ask it. Twelve times the heads, the same cache:

# %%
small = dict(dim=32, latent_dim=8, n_layer=2)
for n_head in (2, 6, 24):
    cache = KVCache(GPT(Config(attn="mfa", n_head=n_head, **small)), batch_size=1, capacity=1)
    print(f"m = {n_head:2d}: {cache.numel()} elements per token in 2 layers")
    assert cache.numel() == 2 * 2 * C

# %% [markdown]
# ## Total effective rank: what it counts
#
# Table 1 compares attentions by *total effective rank*: heads times the rank of each $W_c$. For MFA that is $mC$, the largest
# in the table after FPBA. Is it the rank of anything? Let us measure three ranks of our small MFA:
#
# - of each $W_c$ alone;
# - of all $W_c$ stacked on the key side, $(mH, H)$: how many directions of $x_j$ any head can see;
# - of all $W_c$ side by side on the query side, $(H, mH)$: how many directions of $x_i$ any head can use.

# %%
rank = torch.linalg.matrix_rank
each = rank(W).tolist()
key_side, query_side = rank(W.flatten(0, 1)).item(), rank(W.mT.flatten(0, 1)).item()
print(f"each W_c: {each}, all on the key side: {key_side}, all on the query side: {query_side}, m C = {m * C}")
assert each == [C] * m and key_side == query_side == C

# %% [markdown]
# $mC = 48$ is a **count**: six heads of rank eight each. All six look at the *same* eight directions of the key, since $S_k$ is
# shared. They also use the same eight directions of the query, since $S_q$ is shared. Nothing in the layer has rank 48 (it
# could not: $H = 32$).
#
# So what do more heads buy? **Different bilinear forms on one shared subspace.** Head $c$ is the $C \times C$ matrix $Q_c$, a
# form that compares a query latent with a key latent, and there are $C^2$ independent ones to choose from. Look at the singular
# values: stack the $W_c$ as they act on keys, and as plain vectors of $H^2$ numbers.

# %%
many = replace(cfg, n_head=96)
W_mfa = ATTENTION["mfa"](many).qk_circuit()
W_mqa = ATTENTION["mqa"](replace(many, attn="mqa", head_dim=C)).qk_circuit()
forms = {name: rank(w.flatten(1)).item() for name, w in dict(mfa=W_mfa, mqa=W_mqa).items()}
print("independent forms among 96 heads:", forms, f"   C^2 = {C * C}, H C = {H * C}")
assert forms == dict(mfa=C * C, mqa=96)
fig, axes = plt.subplots(1, 2, figsize=(8.4, 3.2), sharey=True)
for ax, side in zip(axes, ("query", "key"), strict=True):
    for name, w in dict(mqa=W_mqa, mfa=W_mfa).items():
        s = torch.linalg.svdvals((w.mT if side == "query" else w).flatten(0, 1))
        ax.semilogy(range(1, H + 1), (s / s[0]).clamp_min(1e-17), nb.MARKER[name], color=COLOR[name], label=NAME[name], ms=5)
    ax.set(xlabel=f"direction on the {side} side", title=f"96 heads of width {C}, {side} side", ylim=(1e-18, 8))
axes[0].set_ylabel("singular value / largest")
axes[0].legend(loc="lower left")
plt.show()

# %% [markdown]
# On the key side both attentions stop at $C = 8$ directions: this is the price of the small cache, and both pay it. On the
# query side MQA uses all 32 directions of $x_i$, MFA only 8. Ninety-six MFA heads contain at most $C^2 = 64$ independent forms;
# MQA heads of the same width can have up to $HC = 256$. (The values near $10^{-17}$ are rounding, not signal.)
#
# ## "MFA is MQA with a factored query"
#
# That sentence can be checked. MQA with heads of width $C$ has $W_c = Q'_c K^T$ with one key $K$, $(H, C)$, and free $Q'_c$,
# $(H, C)$. Put
#
# $$Q'_c = S_q Q_c, \qquad K = S_k, \qquad V = S_v .$$
#
# Then the MQA has the same $W_c$ and $U_c$ as the MFA: **every MFA is an MQA.** We copy the weights into `mfa.py`'s MQA. We do
# it with rotary positions on, since nothing in the argument touches the key.

# %%
rope = ATTENTION["mfa"](replace(cfg, pos="rope"))
mqa = ATTENTION["mqa"](replace(cfg, attn="mqa", head_dim=C, pos="rope"))
mqa.q.weight.copy_(rope.q.weight @ rope.s_q.weight)  # stored transposed, so the factors change places
mqa.k.weight.copy_(rope.s_k.weight)
mqa.v.weight.copy_(rope.s_v.weight)
mqa.o.weight.copy_(rope.o.weight)
close("MQA of width C with MFA's weights, and the MFA", mqa(x), rope(x))
close("the same by containment.mfa_to_mqa", containment.mfa_to_mqa(rope)(x), rope(x))

# %% [markdown]
# **The other way round it is false**, unless the factored query is as wide as the query side of the MQA, $\min(H, mC)$.
# `mfa.py` has an option for that width, `q_rank`; in the paper it is $C$. We cut a random MQA's stacked query matrix to rank
# $r$ by its singular values and watch the error of the output. It should vanish exactly at $r = H = 32$.

# %%
other = ATTENTION["mqa"](replace(cfg, attn="mqa", head_dim=C))
a, s, b = torch.linalg.svd(other.q.weight, full_matrices=False)  # weight (mC, H) = a diag(s) b
error = {}
for r in range(1, H + 1):
    part = ATTENTION["mfa"](replace(cfg, q_rank=r))
    part.q.weight.copy_(a[:, :r] * s[:r])
    part.s_q.weight.copy_(b[:r])
    for name, weight in dict(s_k=other.k.weight, s_v=other.v.weight, o=other.o.weight).items():
        getattr(part, name).weight.copy_(weight)
    error[r] = ((part(x) - other(x)).norm() / other(x).norm()).item()
print(f"relative error at r = C: {error[C]:.3f}, at r = {H - 1}: {error[H - 1]:.1e}, at r = H: {error[H]:.1e}")
assert error[H] < 1e-12 < 1e-6 < error[H - 1]
close("containment.mqa_to_mfa", containment.mqa_to_mfa(other)(x), other(x))

# %%
fig, ax = plt.subplots()
ax.plot(list(error), list(error.values()), color=COLOR["mfa"], marker=nb.MARKER["mfa"], markersize=4)
for r, y, text in ((C, 0.1, "$r = C$: the paper's MFA"), (H, 0.4, "$r = H$: any MQA")):
    ax.axvline(r, color="gray", linestyle=":")
    ax.text(r - 0.3, y, text, rotation=90, ha="right", va="bottom", fontsize=9, transform=ax.get_xaxis_transform())
ax.set(ylim=(0, None), xlabel="query rank r of the MFA", ylabel="relative error of the output")
ax.set_title("A random MQA, written as an MFA")
plt.show()

# %% [markdown]
# So: **true** is that MFA is contained in an MQA of head width $C$, and that it adds no capacity to that MQA. **Also true** is
# that the MQA one would have used instead is a different one: with $n$ heads of width $d = C/2$, and half the cache. At the
# same parameters MFA has a key twice as wide and somewhat fewer heads (at the paper's shape 14 of 256 against 18 of 128), so
# that heads times width is 3,584 against 2,304. The comparison that matters is at equal parameters and equal cache, and it is
# empirical. **False** is that a total effective rank of $mC$ makes MFA larger than an MQA of width $C$ with the same number of
# heads.
#
# *Caveat.* A random MQA is the worst case for a cut. A trained one might have a query matrix of lower rank, and the paper's bet
# is that little is lost.
#
# ## Rotary positions cost nothing
#
# RoPE multiplies query $i$ and key $j$ by rotations $R_i$ and $R_j$, with $R_i R_j^T = R_{i-j}$. MFA's factors leave a place
# for it, between $Q_c$ and $S_k^T$, and the cached key is simply rotated before it is stored:
#
# $$W_c(i - j) = S_q\, Q_c\, R_{i-j}\, S_k^T .$$
#
# $W_c$ still has rank $C$, the cache is still $2C$, and no head knows about it. (MLA has no such place: notebook 03.)

# %%
close("with rope: inference and factorization", rope(x), rope.factorization(x))
S, Q_r, S_k_T = rope.s_q.weight.T, rope.q.weight.unflatten(0, (m, C)).mT, rope.s_k.weight
for offset in (0, 1, 7):
    R = rope.rotation(offset, Q_r, C)  # (C, C)
    close(f"W_c({offset})", S @ Q_r @ R @ S_k_T, rope.qk_circuit(offset))
    assert rank(rope.qk_circuit(offset)).tolist() == [C] * m
cached = {p: KVCache(GPT(replace(cfg, pos=p, n_layer=1)), 1, 1).numel() for p in ("none", "rope")}  # as allocated
print("cached per token and layer:", cached)
assert cached == dict(none=2 * C, rope=2 * C)

# %% [markdown]
# ## A variant that is no longer bilinear
#
# StepFun's own model Step-3 ships MFA with a wide query (`q_rank` 2048 at $C = 256$), and with an RMSNorm on the query latent
# $x_i S_q$. The wide query moves it towards MQA, as in the plot above, and costs no cache; in our own study at 30M parameters
# with AdamW it closes MFA's gap to MHA in mean perplexity (notebook 07, the hollow points). The norm is another
# matter: it divides by the size of the latent, so twice the input no longer gives twice the score. There is no $W_c$ any more,
# and Eq. 7 does not exist.

# %%
q_of = {}
for latent_norm in (False, True):
    step3 = ATTENTION["mfa"](replace(cfg, latent_norm=latent_norm))
    once, twice = (step3.query(t * x, torch.arange(T)) for t in (1, 2))
    q_of[latent_norm] = (twice.norm() / once.norm()).item()
print(f"twice the state makes the query {q_of[False]:.3f} times as long; with the norm {q_of[True]:.3f} times")
assert abs(q_of[False] - 2) < 1e-12 and q_of[True] < 1.2
try:
    step3.factorization(x)
except ValueError as error:
    print("factorization():", error)

# %% [markdown]
# ## Why a product of matrices likes Muon
#
# A score goes through three matrices, $W_c = S_q Q_c S_k^T$. So does a gradient, from the other side:
#
# $$\frac{\partial L}{\partial Q_c} = S_q^T\, G_c\, S_k, \qquad G_c = \frac{\partial L}{\partial W_c} .$$
#
# A direction in which $S_q$ or $S_k$ is small is small in this gradient too, so $Q_c$ hardly learns there, and the other way
# round. What counts is the *condition number* $\kappa$, the largest singular value over the smallest. AdamW divides every
# entry by its own size, which is nearly the entry's sign, and knows nothing of directions. Muon (Jordan et al. 2024), an
# optimizer for matrices, divides every *singular value* by its own size: the step is nearly $U V^T$ for a gradient
# $U \Sigma V^T$. `--optimizer muon` does it to the matrix that stacks all $Q_c$, `muon_heads` to each $Q_c$. We take the
# gradients of the 21st step of a small MFA on Shakespeare and compare: the gradient, its sign, and what Muon makes of it.

# %%
from support.muon import orthogonalize

torch.set_default_dtype(torch.float32)  # as models are trained
ids, val, characters = nb.shakespeare()


def kappa(M, rank):
    """Largest over rank-th singular value; of several matrices (..., r, c) the geometric mean."""
    s = torch.linalg.svdvals(M.double())
    return (s[..., 0] / s[..., rank - 1]).log().mean().exp().item()


def train_small(optimizer, seed, steps, watch):
    model = nb.new_model(seed=seed, attn="mfa", n_layer=1, n_head=16, latent_dim=16)
    return nb.fit(model, ids, steps, watch, seed=seed, batch_size=8, lr=6e-3, optimizer=optimizer)


# %%
def compare_steps(step, model):
    for name in ("s_q", "q", "s_k") if step == 20 else ():
        gradient = getattr(model.blocks[0].attn, name).weight.grad
        steps = dict(gradient=gradient, sign=gradient.sign(), muon=orthogonalize(gradient))
        numbers = {how: kappa(matrix, rank=16) for how, matrix in steps.items()}
        print(f"{name:3} {tuple(gradient.shape)!s:9}", {how: f"{min(number, 1e6):.1f}" for how, number in numbers.items()})
        assert numbers["muon"] < 3 < 10 < numbers["gradient"] and numbers["muon"] < 0.7 * numbers["sign"]


losses = train_small("adamw", 0, 21, compare_steps)

# %% [markdown]
# (A million stands for all that is larger: taking the sign can even lose a direction.) Muon moves all directions alike. Does it
# show in the weights? We train from the same start with both optimizers, two seeds
# each, and keep the condition numbers of the factors and of $W_c$ (of $Q_c$ and $W_c$ the geometric mean over 16 heads).


# %%
def factors_of(attn):
    S_q, S_k = attn.s_q.weight.T, attn.s_k.weight.T  # (H, C) each
    Q = attn.q.weight.unflatten(0, (16, 16)).mT  # (m, C, C)
    return {"$S_q$": S_q, "$Q_c$": Q, "$S_k$": S_k, "$W_c$": S_q @ Q @ S_k.T}


history, final_loss = {}, {}
for optimizer in ("adamw", "muon"):
    for seed in (0, 1):
        seen = history[optimizer, seed] = {"$S_q$": [], "$Q_c$": [], "$S_k$": [], "$W_c$": []}

        def watch(step, model, seen=seen):
            for name, matrix in factors_of(model.blocks[0].attn).items() if step % 10 == 0 else ():
                seen[name].append(kappa(matrix.detach(), rank=16))

        final_loss[optimizer, seed] = sum(train_small(optimizer, seed, 151, watch)[-20:]) / 20

# %%
for (optimizer, seed), seen in history.items():
    change = ", ".join(f"{name.strip('$')} {numbers[0]:.1f} -> {numbers[-1]:.1f}" for name, numbers in seen.items())
    print(f"{optimizer:5} seed {seed}: {change}; training loss {final_loss[optimizer, seed]:.3f}")
for seed in (0, 1):
    shared = {}  # how much worse conditioned the two shared factors have become, together
    for optimizer in ("adamw", "muon"):
        S_q_numbers, S_k_numbers = history[optimizer, seed]["$S_q$"], history[optimizer, seed]["$S_k$"]
        shared[optimizer] = S_q_numbers[-1] * S_k_numbers[-1] / (S_q_numbers[0] * S_k_numbers[0])
    assert shared["adamw"] > 1.3 * shared["muon"], shared

# %%
fig, axes = plt.subplots(1, 4, figsize=(9.6, 2.9))
for ax, name in zip(axes, ("$S_q$", "$Q_c$", "$S_k$", "$W_c$"), strict=True):
    for (optimizer, seed), seen in history.items():
        style = dict(color="#0072B2", ls="--") if optimizer == "adamw" else dict(color="#D55E00")
        label = dict(adamw="AdamW", muon="Muon")[optimizer] if seed == 0 else None
        ax.plot(range(0, 151, 10), seen[name], alpha=1 - 0.55 * seed, label=label, **style)
    ax.set(title=f"$\\kappa$ of {name}", xlabel="step", ylim=(0, None))
axes[0].legend()
plt.show()
torch.set_default_dtype(torch.float64)

# %% [markdown]
# (Faint: the second seed.) AdamW stretches the shared factors: $S_k$ ends about twice as badly conditioned as it began. Muon
# leaves them nearly as they were. $Q_c$ alone tells little: its smallest singular value is mostly the luck of a random square
# matrix. The product has all three in it, and AdamW's $W_c$ ends several times as badly conditioned as Muon's in one of the
# two runs kept here, and twice in the other.
#
# *Caveat.* 150 steps of a toy show the mechanism and decide nothing about losses: look at those printed. At 30M parameters
# (`experiments/results/study.jsonl`) the same tokens take MFA from perplexity 43.2 with AdamW to 38.6 with Muon, and MQA with
# the same cache from 43.1 to 39.4 (Muon: two seeds). MFA has a product of matrices in its query and MQA has none. But a norm on
# query and key (`qk_norm`) leaves little of that: 37.9 and 38.3.
#
# ## Exercises
#
# **1 (easy).** $H = 1024$ and $C = 128$. What is the largest number of MFA heads whose layer has no more parameters than MHA's
# $4H^2$?

# %%
most_heads = ...

# %%
check(1, most_heads)

# %% [markdown]
# **2 (medium).** Without rotary positions every MFA of at most $H$ heads is an FPBA too. Give the two weights, `W` and `U`,
# both $(H, H, H)$, of an FPBA that computes the same as `mfa`. FPBA divides its scores by $\sqrt H$, not $\sqrt C$, and has $H$
# heads, of which you need only $m$.


# %%
def as_fpba(mfa):
    return ..., ...


# %%
W_H, U_H = as_fpba(mfa)
fpba, answer = ATTENTION["fpba"](replace(cfg, attn="fpba", n_head=0)), ...
if W_H is not ...:
    fpba.load_state_dict(dict(W=W_H, U=U_H))
    answer = fpba(x)
check(2, answer, mfa(x))

# %% [markdown]
# **3 (hard).** The factors of $W_c$ are not unique. Let $A$ be any invertible $(C, C)$ matrix. Replace $S_k$ by $S_k A$. Which
# new $Q_c$ gives the same outputs? Fill in `new_Q` for `mfa` (no positions). Then think: which $A$ are still allowed under
# RoPE, where $R_{i-j}$ stands between the two?


# %%
def new_Q(Q, A):
    """Q (m, C, C), A (C, C) -> (m, C, C)."""
    return ...


# %%
A, answer = torch.randn(C, C), ...
if new_Q(Q, A) is not ...:
    scores = x[0] @ S_q @ new_Q(Q, A) @ (x[0] @ S_k @ A).T / C**0.5
    answer = (causal_softmax(scores) @ v @ O_T).sum(0)
check(3, answer, eq6)

# %% [markdown]
# Worked solutions: [solutions/04_mfa_solutions.ipynb](solutions/04_mfa_solutions.ipynb). Next:
# [05_key_reuse](05_key_reuse.ipynb) halves this cache once more.
