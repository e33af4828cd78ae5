# %% [markdown]
# # 2. From FPBA to MHA: worked solutions
#
# The exercises of [02_fpba_to_mha](../02_fpba_to_mha.ipynb). Try them there first.

# %%
import sys

sys.path[:0] = ["notebooks", ".", ".."]  # nb.py is in one of them
import nb

nb.start()  # plot style, float64, seed, no gradients

# %%
from dataclasses import replace

import torch

from mfa import ATTENTION, Config

check, hint = nb.exercises("02")

cfg = Config(attn="mha", dim=32, n_head=4, head_dim=8, pos="none")
H, n, d, T = cfg.dim, cfg.heads, cfg.head_dim, 10
mha, x = ATTENTION["mha"](cfg), torch.randn(1, T, H)

# %% [markdown]
# **1.** MHA keeps a key and a value of width 128 for each of 32 heads in each of 32 layers, two bytes each: 524,288 bytes, half
# a megabyte for every token. GQA keeps 8 heads instead of 32: a quarter. A context of 8,192 tokens takes 4.3 GB and 1.1 GB.

# %%
mha_bytes = 2 * 32 * 2 * 32 * 128
gqa_bytes = 2 * 32 * 2 * 8 * 128
for name, size in dict(MHA=mha_bytes, GQA=gqa_bytes).items():
    print(f"{name}: {size:,} bytes per token, {size * 8192 / 1e9:.1f} GB for 8,192 tokens")
check(1, [mha_bytes, gqa_bytes])

# %% [markdown]
# **2.** The heads of `k` and `v` are stacked on the rows of the weight. All heads are equal, so the one block is repeated $n$
# times.


# %%
def repeated(mqa):
    return mqa.k.weight.repeat(n, 1), mqa.v.weight.repeat(n, 1)


mqa, wide = ATTENTION["mqa"](replace(cfg, attn="mqa")), ATTENTION["mha"](cfg)
k_weight, v_weight = repeated(mqa)
wide.load_state_dict({**mqa.state_dict(), "k.weight": k_weight, "v.weight": v_weight})
check(2, wide(x), mqa(x))

# %% [markdown]
# **3.** The cut of a matrix that has rank $d$ loses nothing. The factors we find are not those we started from: any $Q_c A$ and
# $K_c A^{-T}$ would do as well. The circuits are what matters; the factors are a choice. (The product $W_c$ keeps $2Hd - d^2$
# numbers of the factors' $2Hd$.)


# %%
def to_mha(W, U, d):
    weights = {}
    for names, circuit in (("qk", W), ("vo", U)):
        a, s, bT = torch.linalg.svd(circuit)
        left, right = a[..., :d] * s[..., None, :d], bT[..., :d, :]  # (n, H, d), (n, d, H)
        weights[names[0]] = left.mT.flatten(0, 1)
        weights[names[1]] = right.flatten(0, 1)
    weights["o"] = weights["o"].T
    return weights


again = ATTENTION["mha"](cfg)
again.load_state_dict({f"{name}.weight": w for name, w in to_mha(mha.qk_circuit(), mha.vo_circuit(), d).items()})
check(3, again(x), mha(x))
print(f"other factors than before: q differs by {(again.q.weight - mha.q.weight).abs().max():.2f}")

# %%
nb.all_right()
