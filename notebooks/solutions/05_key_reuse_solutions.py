# %% [markdown]
# # 5. Key reuse: worked solutions
#
# The exercises of [05_key_reuse](../05_key_reuse.ipynb). Try them there first.

# %%
import sys

sys.path[:0] = ["notebooks", ".", ".."]  # nb.py is in one of them
import nb

nb.start()  # plot style, float64, seed, no gradients

# %%
from dataclasses import replace

from experiments.paper import containment
import torch

from mfa import ATTENTION, Config

check, hint = nb.exercises("05")

cfg = Config(attn="mfa_kr", dim=32, n_head=4, latent_dim=8, pos="none")
H, m, C = cfg.dim, cfg.heads, cfg.latent
kr, x = ATTENTION["mfa_kr"](cfg), torch.randn(1, 10, cfg.dim)
kr.alpha.copy_(torch.randn(C))
M = torch.eye(C) + kr.n.weight.T @ kr.alpha.diag()

# %% [markdown]
# **1.** $256 \times 24 \times 2 = 12{,}288$ bytes, Table 2's 12.3K.

# %%
kr_bytes = 256 * 24 * 2
check(1, kr_bytes)

# %% [markdown]
# **2.** $M O_c^T$ for every head, $(m, C, H)$; stacked on the rows it is the transpose of the weight.


# %%
def folded_output(attn):
    M = torch.eye(C) + attn.n.weight.T @ attn.alpha.diag()
    return (M @ attn.o_heads()).flatten(0, 1).T


plain = ATTENTION["mfa_kr"](replace(cfg, key_reuse="vanilla"))
weights = {**kr.state_dict(), "o.weight": folded_output(kr)}
plain.load_state_dict({name: w for name, w in weights.items() if name not in ("n.weight", "alpha")})
check(2, plain(x), kr(x))

# %% [markdown]
# **3.** A least-squares problem with $C$ columns: $\min_M \|S_k M - S_v\|$. The layer stores $S_k^T$ and $S_v^T$.


# %%
def recover_M(mfa):
    return torch.linalg.lstsq(mfa.s_k.weight.T, mfa.s_v.weight.T).solution


check(3, recover_M(containment.mfakr_to_mfa(kr)), M)

# %% [markdown]
# For a random MFA the best $M$ leaves most of $S_v$ unexplained. Its columns are random directions of $\mathbb R^H$, and the
# $C$ columns of $S_k$ span $C/H$ of the space: one expects a share of $\sqrt{1 - C/H}$ to remain. So key reuse has to be
# trained; it cannot be put on later for nothing.

# %%
mfa = ATTENTION["mfa"](Config(attn="mfa", dim=512, n_head=4, latent_dim=64, pos="none"))
S_k, S_v = mfa.s_k.weight.T, mfa.s_v.weight.T
left = ((S_v - S_k @ recover_M(mfa)).norm() / S_v.norm()).item()
print(f"unexplained share of S_v: {left:.3f}, expected sqrt(1 - C/H) = {(1 - 64 / 512) ** 0.5:.3f}")
assert abs(left - (1 - 64 / 512) ** 0.5) < 0.01

# %%
nb.all_right()
