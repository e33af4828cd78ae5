# %% [markdown]
# # 4. MFA: worked solutions
#
# The exercises of [04_mfa](../04_mfa.ipynb). Try them there first.

# %%
import sys

sys.path[:0] = ["notebooks", ".", ".."]  # nb.py is in one of them
import nb

nb.start()  # plot style, float64, seed, no gradients

# %%
from dataclasses import replace

import torch

from mfa import ATTENTION, Config

check, hint = nb.exercises("04")

cfg = Config(attn="mfa", dim=32, n_head=6, latent_dim=8, pos="none")
H, m, C, T = cfg.dim, cfg.heads, cfg.latent, 10
mfa, x = ATTENTION["mfa"](cfg), torch.randn(1, T, cfg.dim)

# %% [markdown]
# **1.** $H(3C + mC) + mC^2 \le 4H^2$. With $C = H/8$, divide by $H^2$: $\tfrac38 + m\,(\tfrac18 + \tfrac1{64}) \le 4$, so $m
# \le 3.625 \cdot \tfrac{64}{9} = 25.8$. This holds at every $H$: an MFA layer with MHA's parameters has 25 heads, and a total
# effective rank of $25 H / 8 \approx 3.1 H$. The paper takes 14, and gives the difference to the FFN.

# %%
most_heads = int((4 - 3 / 8) / (1 / 8 + 1 / 64))
check(1, most_heads)

# %% [markdown]
# **2.** $W_c$ and $U_c$ are already $(H, H)$. FPBA divides by $\sqrt H$ where MFA divides by $\sqrt C$, so multiply by
# $\sqrt{H/C}$. The other $H - m$ heads get $U_c = 0$: they look somewhere, and write nothing. This is `containment.to_fpba`.


# %%
def as_fpba(mfa):
    W, U = torch.zeros(2, H, H, H)
    W[:m], U[:m] = mfa.qk_circuit() * (H / C) ** 0.5, mfa.vo_circuit()
    return W, U


W_H, U_H = as_fpba(mfa)
fpba = ATTENTION["fpba"](replace(cfg, attn="fpba", n_head=0))
fpba.load_state_dict(dict(W=W_H, U=U_H))
check(2, fpba(x), mfa(x))

# %% [markdown]
# **3.** $W_c = S_q Q_c S_k^T$ must stay. With $S_k A$ in place of $S_k$ the last factor is $A^T S_k^T$, so $Q_c A^{-T}$ undoes
# it. So $C^2$ of the parameters of an MFA without positions are redundant on the key side (and as many in $S_q$).
#
# Under RoPE $Q_c A^{-T} R_{i-j} A^T S_k^T$ must equal $Q_c R_{i-j} S_k^T$, so $A$ must commute with every rotation. RoPE turns
# each pair of dimensions $(i, i + C/2)$ at a speed of its own; what commutes with that turns and stretches each pair: $C$
# numbers, not $C^2$. The second check takes such an $A$ and the whole class, rotary positions included.


# %%
def new_Q(Q, A):
    return Q @ torch.linalg.inv(A).mT


def with_new_factors(attn, A):
    new = ATTENTION["mfa"](attn.cfg)
    new.load_state_dict(attn.state_dict())
    Q = attn.q.weight.unflatten(0, (m, C)).mT
    new.q.weight.copy_(new_Q(Q, A).mT.flatten(0, 1))
    new.s_k.weight.copy_(A.T @ attn.s_k.weight)
    return new


check(3, with_new_factors(mfa, torch.randn(C, C))(x), mfa(x))

# %%
a, b = torch.randn(2, C // 2)  # each pair is multiplied by the complex number a + ib
A = torch.cat((torch.cat((a.diag(), b.diag()), 1), torch.cat((-b.diag(), a.diag()), 1)))
rope = ATTENTION["mfa"](replace(cfg, pos="rope"))
nb.close("under RoPE, an A that commutes with it", with_new_factors(rope, A)(x), rope(x))
wrong = (with_new_factors(rope, torch.randn(C, C))(x) - rope(x)).abs().max().item()
print(f"under RoPE, any other A: difference {wrong:.3f}")
assert wrong > 1e-3

# %%
nb.all_right()
