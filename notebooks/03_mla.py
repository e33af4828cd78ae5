# %% [markdown]
# # 3. MLA: cache a latent, not the keys
#
# **The story.** Notebook 01 asked why nobody caches the state $x_j$ and makes keys from it when they are needed. Multi-head
# Latent Attention (MLA, from DeepSeek-V2) does just that, with a state made thin: a *latent* of width $C$. Keys and values
# never have to exist. One trick makes this cheap, rotary positions break the trick, and a second trick repairs it. After that
# it is easy to see what MFA does differently.
#
# **After this notebook you can**
#
# 1. write MLA in both formulations and read off its rank and its cache;
# 2. decode with $K_c$ and $V_c$ absorbed, and count what that saves;
# 3. explain why a rotation between $Q_c$ and $K_c^T$ forbids absorbing, and how the decoupled key gets around it;
# 4. say which MLA Table 1 means and which one Figure 1 means, and why the abstract's 56% needs the second.
#
# **Time:** 50 minutes, exercises included. It runs in seconds. **Before:** 02 (heads as low-rank matrices).

# %%
import sys

sys.path[:0] = ["notebooks", ".", ".."]  # nb.py is in one of them
import nb

nb.start()  # plot style, float64, seed, no gradients

# %%
from dataclasses import replace

import matplotlib.pyplot as plt
import torch
from nb import close
from torch.utils.flop_counter import FlopCounterMode

from mfa import ATTENTION, GPT, Config, KVCache, preset, rotate

check, hint = nb.exercises("03")

cfg = Config(attn="mla", dim=32, n_head=4, head_dim=8, latent_dim=12, rope_dim=4, pos="none")
H, m, d, C, T = cfg.dim, cfg.heads, cfg.head_dim, cfg.latent, 10
mla = ATTENTION["mla"](cfg)
x = torch.randn(1, T, H)
future = torch.ones(T, T).triu(1).bool()  # j > i
print(f"H = {H}, m = {m} heads of width d = {d}, latent C = {C}")

# %% [markdown]
# ## Equation 4: keys and values from latents
#
# $S_q, S_k, S_v$, each $(H, C)$, are shared by all heads and make three latents of a token: short summaries of its state. Each
# head makes its query, key and value from these, with $Q_c, K_c, V_c$, each $(C, d)$:
#
# $$O_i = \sum_{c=1}^{m} \Big( \sum_{j \le i} \phi\Big( \frac{x_i S_q Q_c\,(x_j S_k K_c)^T}{\sqrt d} \Big)\,
# x_j S_v V_c \Big) O_c^T \qquad (4)$$
#
# Cached are the latents $x_j S_k$ and $x_j S_v$: $2C$ numbers per token, for all heads together. Rotary positions are left out
# for now, as in the paper.


# %%
def heads_of(linear):
    return linear.weight.unflatten(0, (m, -1)).mT  # (m, inputs, outputs of one head)


def causal_softmax(scores):
    return scores.masked_fill(future, -torch.inf).softmax(dim=-1)


S_q, S_k, S_v = mla.s_q.weight.T, mla.s_k.weight.T, mla.s_v.weight.T  # (H, C) each
Q, K, V = heads_of(mla.q), heads_of(mla.k), heads_of(mla.v)  # (m, C, d) each
O_T = mla.o.weight.T.unflatten(0, (m, d))  # (m, d, H)
c_k, c_v = x[0] @ S_k, x[0] @ S_v  # (T, C) each: the cache
p = causal_softmax(x[0] @ S_q @ Q @ (c_k @ K).mT / d**0.5)
eq4 = (p @ (c_v @ V) @ O_T).sum(0)
close("Eq. 4 and the class", eq4, mla(x)[0])

# %% [markdown]
# ## Equation 5: the factorization
#
# $$W_c = S_q Q_c K_c^T S_k^T, \qquad U_c = S_v V_c O_c^T \qquad (5)$$
#
# A product is never of higher rank than its thinnest factor. The latent is $C = 12$ wide, but $Q_c K_c^T$ goes through $d = 8$
# dimensions. So a head has rank $d$, and all heads together see $C$ directions of the key side.

# %%
W, U = S_q @ Q @ K.mT @ S_k.T, S_v @ V @ O_T
eq5 = (causal_softmax(x[0] @ W @ x[0].T / d**0.5) @ (x[0] @ U)).sum(0)
close("Eq. 5 and Eq. 4", eq5, eq4)
close("Eq. 5 and factorization()", eq5, mla.factorization(x)[0])
rank = torch.linalg.matrix_rank
print("rank of each W_c:", rank(W).tolist(), "  of all stacked on the key side:", rank(W.flatten(0, 1)).item())
assert rank(W).tolist() == [d] * m and rank(W.flatten(0, 1)) == C

# %% [markdown]
# This is the paper's objection to MLA: the intermediate width $C$ is larger than $d$, yet a head does not get more than rank
# $d$ out of it. Now count parameters and cache. Table 1 has $H(3C + d_r + md) + mC(3d + d_r)$ and $2C + d_r$, where $d_r$
# belongs to the rotary part that we come to below.

# %%
for pos, d_r in dict(none=0, rope=4).items():
    one = GPT(replace(cfg, pos=pos, n_layer=1))
    params = sum(t.numel() for t in one.blocks[0].attn.parameters())
    kept = KVCache(one, batch_size=1, capacity=1).numel()
    print(f"{pos}: {params:,} parameters, {kept} elements cached per token and layer")
    assert params == H * (3 * C + d_r + m * d) + m * C * (3 * d + d_r) and kept == 2 * C + d_r

# %% [markdown]
# ## Absorbing: keys that never exist
#
# As written, Eq. 4 has to expand every cached latent into $m$ keys and $m$ values in each decoding step. Move the brackets:
#
# $$x_i S_q Q_c\,(c_j K_c)^T = \underbrace{\big(x_i S_q Q_c K_c^T\big)}_{\text{once per step, } C \text{ wide}} c_j^T, \qquad
# \sum_j p_{ij}\,(c_j V_c)\, O_c^T = \Big(\sum_j p_{ij}\, c_j\Big) V_c O_c^T .$$
#
# $K_c$ is *absorbed* into the query, and $V_c$ acts once, after the sum. What meets the cache is $C$ wide on both sides: an
# attention with $m$ queries and one shared key. We decode token by token.

# %%
rows = []
for i in range(T):
    query = x[0, i : i + 1] @ S_q @ Q @ K.mT  # (m, 1, C): K_c absorbed
    p_i = (query @ c_k[: i + 1].T / d**0.5).softmax(dim=-1)  # (m, 1, i + 1)
    summary = p_i @ c_v[: i + 1]  # (m, 1, C): a mean of latents
    rows.append((summary @ V @ O_T).sum(0))  # (1, H)
close("decoding with K_c and V_c absorbed", torch.cat(rows), eq4)

# %% [markdown]
# **What does it save?** Let PyTorch count floating point operations, on the `meta` device (shapes, no memory), for one decoded
# token in one layer of a DeepSeek-V2-Lite shape: 16 heads of 128, $C = 512$. MHA with the same heads, all its keys cached, is
# the comparison.


# %%
def flops(way, S, n=16, d=128, C=512):
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        latent, K, V, q = torch.empty(S, C), torch.empty(n, C, d), torch.empty(n, C, d), torch.empty(n, 1, d)
        if way == "expand every step":
            q @ (latent @ K).mT @ (latent @ V)
        elif way == "absorb":
            (q @ K.mT @ latent.T @ latent) @ V
        else:
            q @ torch.empty(n, d, S) @ torch.empty(n, S, d)
    return counter.get_total_flops()


ways = {"expand every step": ("#CC79A7", "--", "o"), "absorb": ("#CC79A7", "-", "D"), "MHA, keys cached": ("#0072B2", "-", "o")}
for way in ways:
    print(f"{way:18} {flops(way, 4096) / 1e6:10,.0f} million operations at 4,096 tokens")
assert flops("absorb", 4096) < 5 * flops("MHA, keys cached", 4096) < flops("expand every step", 4096) / 50

# %%
contexts = [2**k for k in range(4, 17, 2)]
fig, ax = plt.subplots()
for way, (color, line, marker) in ways.items():
    ax.loglog(contexts, [flops(way, S) for S in contexts], line, color=color, marker=marker, label=way)
ax.set(xlabel="tokens in the cache", ylabel="operations for one token, one layer", title="Decoding with a latent of 512")
ax.set_xticks(contexts, [f"{S:,}" for S in contexts])
ax.legend()
plt.show()

# %% [markdown]
# Absorbing is more than a hundred times cheaper than expanding in every step, and four times as expensive as MHA, since scores
# are taken over $C = 512$ numbers instead of $d = 128$. For that price the cache is a quarter of MHA's here ($2C$ against
# $2nd$), or an eighth with one joint latent. Reading the cache is what decoding usually waits for; notebook 06 measures when.
#
# *Caveat.* In training, and when a prompt is read, all queries come at once. Then each latent is expanded once for many
# queries, and expanding is the cheaper way. `mfa.py` expands always: absorbing changes the speed, never a number.
#
# ## Rotary positions break it
#
# MHA rotates queries and keys, so that $R_{i-j}$ stands between $Q_c$ and $K_c^T$. Put it there in MLA, and the absorbed query
# would be
#
# $$x_i S_q\; Q_c\, R_{i-j}\, K_c^T .$$
#
# It now depends on $j$. A different query for every past token: nothing can be computed "once per step" any more. How
# different? We measure the change of $Q_c R_r K_c^T$ with the distance $r$, for the standard base and width 8.

# %%
absorbed = torch.stack([Q @ rotate(torch.eye(d), torch.full((d,), r), cfg.rope_base) @ K.mT for r in range(T)])  # (T, m, C, C)
change = (absorbed - absorbed[0]).flatten(1).norm(dim=1) / absorbed[0].norm()
print("change of the absorbed matrix at distance 0, 1, 2, ...:", [round(c, 2) for c in change.tolist()])
assert (change[1:] > 0.1).all()
qk_rotated = [rotate(t, torch.arange(T), cfg.rope_base) for t in (x[0] @ S_q @ Q, c_k @ K)]
true_scores = qk_rotated[0] @ qk_rotated[1].mT
wrong_scores = x[0] @ S_q @ absorbed[0] @ c_k.T  # with the matrix of distance 0 for all
error = ((true_scores - wrong_scores).norm() / true_scores.norm()).item()
print(f"scores with one absorbed matrix for all distances: relative error {error:.2f}")
assert error > 0.3

# %% [markdown]
# (At distance 6 the fastest pair of dimensions has almost come round, $2\pi = 6.28$; the slower ones have not.)
#
# The model with rotated keys is a perfectly good model. It is just that one must cache its keys, $md$ numbers, or expand all
# latents in every step. Both give up what the latent was for.
#
# ## The decoupled key
#
# DeepSeek's repair: leave the $d$ dimensions of content without position, and send the position through $d_r$ **further**
# dimensions. All heads share one rotary key $x_j K_r$, made straight from the state. The scores add up:
#
# $$W_c(i - j) = S_q Q_c K_c^T S_k^T \;+\; S_q Q'_c\, R_{i-j}\, K_r^T, \qquad \text{scale } (d + d_r)^{-1/2} .$$
#
# The first term can be absorbed. The second is ordinary rotary attention with one key of width $d_r$. The cache is $2C + d_r$.

# %%
rope = ATTENTION["mla"](replace(cfg, pos="rope"))
close("inference and factorization", rope(x), rope.factorization(x))
Q2, K_r = heads_of(rope.q_rope), rope.k_rope.weight.T  # (m, C, d_r), (H, d_r)
content = rope.s_q.weight.T @ heads_of(rope.q) @ heads_of(rope.k).mT @ rope.s_k.weight  # (m, H, H)
for offset in (0, 3, 9):
    R = rope.rotation(offset, K_r, 4)
    rotary = rope.s_q.weight.T @ Q2 @ R @ K_r.T
    close(f"W_c({offset}) is content + rotary", content + rotary, rope.qk_circuit(offset))
    print(f"   rank: content {rank(content[0])}, rotary {rank(rotary[0])}, sum {rank(rope.qk_circuit(offset)[0])}")
    assert rank(rope.qk_circuit(offset)).tolist() == [d + 4] * m

# %% [markdown]
# (So under rotary positions the rank of a head is $d + d_r$. Table 1 leaves rotary dimensions out of its rank columns.) And
# decoding with $K_c$ absorbed works again, from a cache of $c^k_j$, $c^v_j$ and the rotated $k^r_j$:

# %%
c_k, c_v = x[0] @ rope.s_k.weight.T, x[0] @ rope.s_v.weight.T
k_r = rotate(x[0] @ K_r, torch.arange(T), cfg.rope_base)  # (T, d_r)
rows = []
for i in range(T):
    latent = x[0, i : i + 1] @ rope.s_q.weight.T  # (1, C)
    query = latent @ heads_of(rope.q) @ heads_of(rope.k).mT  # (m, 1, C)
    query_r = rotate(latent @ Q2, torch.tensor([i]), cfg.rope_base)  # (m, 1, d_r)
    scores = query @ c_k[: i + 1].T + query_r @ k_r[: i + 1].T
    p_i = (scores / (d + 4) ** 0.5).softmax(dim=-1)
    rows.append((p_i @ c_v[: i + 1] @ heads_of(rope.v) @ rope.o_heads()).sum(0))
close("decoding with rope, K_c and V_c absorbed", torch.cat(rows), rope(x)[0])

# %% [markdown]
# What does the second term do to a head? Give every position the same state, so that only distance is left, and look at both
# parts of the score (a layer with $d_r = 16$, random weights).

# %%
wide = ATTENTION["mla"](replace(cfg, pos="rope", rope_dim=16, rope_base=10_000.0))
still, distance = torch.randn(H), range(64)
total = torch.stack([still @ wide.qk_circuit(r) @ still for r in distance]) * wide.scale  # (64, m)
content = heads_of(wide.q) @ heads_of(wide.k).mT
level = still @ wide.s_q.weight.T @ content @ wide.s_k.weight @ still * wide.scale  # (m,)
fig, ax = plt.subplots()
for c, color in enumerate(("#0072B2", "#D55E00", "#009E73", "#CC79A7")):
    ax.plot(distance, total[:, c], color=color, label=f"head {c}")
    ax.axhline(level[c], color=color, linestyle=":", linewidth=1.2)
ax.set(xlabel="distance $i - j$", ylabel="score", title="Same state everywhere: content (dotted) plus rotary part")
ax.legend(ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.18))
plt.show()
assert total.std(0).min() > 0.01

# %% [markdown]
# The content part is the same at all distances (dotted); the rotary part adds waves (and, from its slowest pairs of dimensions,
# almost a constant). It took a second query matrix, a further key and a special case in every decoder. MFA gets its positions
# for nothing (notebook 04), and exercise 3 shows how close MLA is to that.
#
# ## Two latents or one
#
# Table 1's MLA has separate latents for keys and values. DeepSeek's own models have **one** joint latent, $S_k = S_v = S_{kv}$,
# and cache $C + d_r$. In code: `joint_kv`. A joint MLA is a separate one with two equal matrices:

# %%
joint = ATTENTION["mla"](replace(cfg, pos="rope", joint_kv=True))
separate = ATTENTION["mla"](replace(cfg, pos="rope"))
weights = dict(joint.state_dict())
shared = weights.pop("s_kv.weight")
separate.load_state_dict({**weights, "s_k.weight": shared, "s_v.weight": shared})
close("joint MLA copied into a separate one", separate(x), joint(x))
kept = {name: a.counts(a.cfg).kv_cache for name, a in dict(joint=joint, separate=separate).items()}
print("cached per token and layer:", kept)
assert kept == dict(joint=C + 4, separate=2 * C + 4)

# %% [markdown]
# So at equal $C$ the separate form can do more, for twice the latents. At equal *cache* it is the other way round: a joint
# latent of width $2C$ contains the separate form (exercise 2), with twice the parameters in $K_c$ and $V_c$. Whether it learns
# more is not shown here. But one must ask which MLA a number belongs to.
#
# **The paper uses both.** Table 1 has $2C + d_r$. Figure 1's MLA follows DeepSeek-V2-Lite: one joint latent with $C = 512$,
# $d_r = 64$, an RMSNorm on it, and queries made straight from the state. The abstract's "56%" comes from the second. At 16 bits
# and 20 layers:

# %%
lite = preset("paper-1b", "mla", latent_dim=512, rope_dim=64, joint_kv=True, compress_query=False, latent_norm=True)
table1 = preset("paper-1b", "mla", latent_dim=512, rope_dim=64)
kr = preset("paper-1b", "mfa_kr")
size = {name: 2 * 20 * ATTENTION[c.attn].counts(c).kv_cache for name, c in dict(joint=lite, separate=table1, kr=kr).items()}
for name in ("joint", "separate"):
    print(f"MLA, {name}: {size[name]:,} bytes; MFA-KR has {size['kr']:,} and saves {1 - size['kr'] / size[name]:.1%}")
assert size == dict(joint=23_040, separate=43_520, kr=10_240)
assert round(100 * (1 - size["kr"] / size["joint"])) == 56

# %% [markdown]
# ## A norm between the factors
#
# DeepSeek normalises the latent (`latent_norm`). With the norm, keys are no longer linear in $x_j$, so there is no $W_c$, and
# Eq. 5 does not exist. `factorization()` refuses. What about absorbing? The norm is applied *before* the latent is cached. So
# the cache holds normalised latents, and everything above works from there.

# %%
normed = ATTENTION["mla"](replace(cfg, joint_kv=True, latent_norm=True))
try:
    normed.factorization(x)
    raise AssertionError("it has a factorization")
except ValueError as error:
    print("factorization():", error)
c = normed.kv_norm(normed.s_kv(x[0]))  # (T, C): cached
query = normed.q_norm(normed.s_q(x[0])) @ heads_of(normed.q) @ heads_of(normed.k).mT  # (m, T, C)
p = causal_softmax(query @ c.T / d**0.5)
close("absorbed, from normalised latents", (p @ c @ heads_of(normed.v) @ normed.o_heads()).sum(0), normed(x)[0])

# %% [markdown]
# ## Why MLA is sensitive to its initialisation
#
# The paper reports that MLA works only with DeepSeek's initialisation. What an initialisation does to the first scores can be
# computed. A score of MHA is a product of two weight matrices; one of MLA is a product of four. If each makes its input a
# little smaller, four make it much smaller. We measure the standard deviation of the scores of a new layer, also for
# DeepSeek-V2's own 0.006.


# %%
def score_std(H, std, attn, **fields):
    layer = ATTENTION[attn](Config(attn=attn, dim=H, head_dim=H // 16, init_std=std, pos="none", **fields))
    state = torch.randn(1, 64, H)
    q, (k, _) = layer.query(state, None), layer.from_cache(*layer.to_cache(state, None))
    return (q @ k.mT * layer.scale).std().item()


spread = {}
for H_, std in ((2048, 0.02), (2048, 0.006), (128, 0.02), (128, 0.0)):  # 0.0: the default of mfa.py
    direct = dict(attn="mla", compress_query=False, latent_dim=H_ // 4)  # as in DeepSeek-V2-Lite
    layers = {"MHA": dict(attn="mha"), "MFA": dict(attn="mfa"), "MLA, direct query": direct, "MLA, Table 1": dict(attn="mla")}
    spread[H_, std] = {name: score_std(H_, std, **fields) for name, fields in layers.items()}
    print(f"H = {H_:4}, std {std or 'default'}:", {name: round(value, 4) for name, value in spread[H_, std].items()})
assert spread[128, 0.02]["MLA, Table 1"] < 0.001 < 0.05 < spread[128, 0.0]["MLA, Table 1"]

# %% [markdown]
# At $H = 2048$, the standard deviation 0.02 starts MHA with scores of spread 0.8. Each further factor leaves less than half of
# it: Table 1's MLA starts at a tenth of MHA's. At $H = 128$ the same 0.02 leaves nothing at all: softmax starts uniform, and
# the layer averages all tokens. Notebook 07 asks how much that costs. `mfa.py`'s default is $0.02 \sqrt{2048/H}$, which keeps
# the spread of the large model at every width (last line).
#
# **This does not explain the paper's finding.** DeepSeek's own 0.006 is smaller than 0.02, and makes the first scores of all
# attentions smaller still. So it is not larger scores that DeepSeek's start brings. The paper describes its MLA initialisation
# in Appendix B, which our copy lacks.
#
# ## Exercises
#
# **1 (easy).** DeepSeek-V2-Lite has 27 layers, a joint latent of 512 and a rotary key of 64. How many bytes of cache is one
# token, at 16 bits?

# %%
lite_bytes = ...

# %%
check(1, lite_bytes)

# %% [markdown]
# **2 (medium).** Write the separate `mla` of the beginning as a joint MLA with a latent of width $2C$. Return its weights
# `s_kv`, $(2C, H)$, and `k` and `v`, each $(md, 2C)$.


# %%
def as_joint(mla):
    return dict(s_kv=..., k=..., v=...)


# %%
new, answer = as_joint(mla), ...
if all(w is not ... for w in new.values()):
    double = ATTENTION["mla"](replace(cfg, joint_kv=True, latent_dim=2 * C, q_rank=C))
    kept = {f"{name}.weight": getattr(mla, name).weight for name in ("s_q", "q", "o")}
    double.load_state_dict({**kept, **{f"{name}.weight": w for name, w in new.items()}})
    answer = double(x)
check(2, answer, mla(x))

# %% [markdown]
# **3 (hard).** Where could a rotation stand so that nothing breaks? Between $K_c^T$ and $S_k^T$: then it turns the *latent*,
# which is cached, and $Q_c K_c^T$ can still be absorbed. That attention is an MFA. Write `mla` (without positions) as an MFA:
# return its weights `q`, $(mC, C)$, and `o`, $(H, mC)$. MFA divides scores by $\sqrt C$, MLA by $\sqrt d$.


# %%
def as_mfa(mla):
    return dict(q=..., o=...)


# %%
new, answer = as_mfa(mla), ...
if all(w is not ... for w in new.values()):
    mfa = ATTENTION["mfa"](replace(cfg, attn="mfa"))
    kept = {f"{name}.weight": getattr(mla, name).weight for name in ("s_q", "s_k", "s_v")}
    mfa.load_state_dict({**kept, **{f"{name}.weight": w for name, w in new.items()}})
    answer = mfa(x)
check(3, answer, mla(x))

# %% [markdown]
# Worked solutions: [solutions/03_mla_solutions.ipynb](solutions/03_mla_solutions.ipynb). Next: [04_mfa](04_mfa.ipynb) gives
# each head the whole width $C$ that MLA's heads only pass through.
