# %% [markdown]
# # 3. MLA: worked solutions
#
# The exercises of [03_mla](../03_mla.ipynb). Try them there first.

# %%
import sys

sys.path[:0] = ["notebooks", ".", ".."]  # nb.py is in one of them
import nb

nb.start()  # plot style, float64, seed, no gradients

# %%
from dataclasses import replace

import torch
from nb import close

from mfa import ATTENTION, Config

check, hint = nb.exercises("03")

cfg = Config(attn="mla", dim=32, n_head=4, head_dim=8, latent_dim=12, rope_dim=4, pos="none")
H, m, d, C = cfg.dim, cfg.heads, cfg.head_dim, cfg.latent
mla, x = ATTENTION["mla"](cfg), torch.randn(1, 10, H)


def heads_of(linear):
    return linear.weight.unflatten(0, (m, -1)).mT


# %% [markdown]
# **1.** $(512 + 64) \cdot 27 \cdot 2 = 31{,}104$ bytes. (With Table 1's two latents it would be 58,752.)

# %%
lite_bytes = (512 + 64) * 27 * 2
check(1, lite_bytes)

# %% [markdown]
# **2.** One wide latent holds both narrow ones. `k` has zeros where the value's half is, `v` where the key's half is. Half of
# the new `k` and `v` are zeros, so a joint latent of width $2C$ can do more than we ask of it here.


# %%
def as_joint(mla):
    zero = torch.zeros(m * d, C)
    s_kv = torch.cat((mla.s_k.weight, mla.s_v.weight))  # (2C, H)
    return dict(s_kv=s_kv, k=torch.cat((mla.k.weight, zero), 1), v=torch.cat((zero, mla.v.weight), 1))


def filled(cfg, mla, same, new):
    other = ATTENTION[cfg.attn](cfg)
    kept = {f"{name}.weight": getattr(mla, name).weight for name in same}
    other.load_state_dict({**kept, **{f"{name}.weight": w for name, w in new.items()}})
    return other


double = filled(replace(cfg, joint_kv=True, latent_dim=2 * C, q_rank=C), mla, ("s_q", "q", "o"), as_joint(mla))
check(2, double(x), mla(x))

# %% [markdown]
# **3.** $W_c = S_q (Q_c K_c^T) S_k^T$ has MFA's form with $Q'_c = Q_c K_c^T \sqrt{C/d}$, and $U_c = S_v (V_c O_c^T)$ has it
# with $O'^T_c = V_c O_c^T$.
#
# So without positions **every MLA is an MFA**: one whose $Q'_c$ and $O'_c$ have rank $d$ instead of $C$. MFA drops the
# restriction. A head of it has $C^2 + HC$ parameters, one of MLA $3Cd + Hd$; with $C = 2d$ the two agree in $Q'_c$, and what
# MFA pays for is $O_c$. And under rotary positions MFA rotates the latent (second check), where MLA needs the decoupled key.


# %%
def as_mfa(mla):
    q = heads_of(mla.q) @ heads_of(mla.k).mT * (C / d) ** 0.5  # (m, C, C)
    o = heads_of(mla.v) @ mla.o_heads()  # (m, C, H)
    return dict(q=q.mT.flatten(0, 1), o=o.flatten(0, 1).T)


mfa = filled(replace(cfg, attn="mfa"), mla, ("s_q", "s_k", "s_v"), as_mfa(mla))
check(3, mfa(x), mla(x))
print("rank of each W_c:", torch.linalg.matrix_rank(mfa.qk_circuit()).tolist(), "of", C)

# %%
rotated = filled(replace(cfg, attn="mfa", pos="rope"), mla, ("s_q", "s_k", "s_v"), as_mfa(mla))
R = rotated.rotation(5, x, C)
W_5 = mla.s_q.weight.T @ heads_of(mla.q) @ heads_of(mla.k).mT @ R @ mla.s_k.weight * (C / d) ** 0.5
close("S_q Q_c K_c^T R S_k^T at distance 5", rotated.qk_circuit(5), W_5)

# %%
nb.all_right()
