# %% [markdown]
# # 8. Convert: worked solutions
#
# The exercises of [08_convert](../08_convert.ipynb). Try them there first.

# %%
import sys

sys.path[:0] = ["notebooks", ".", ".."]  # nb.py is in one of them
import nb

nb.start()  # plot style, float64, seed, no gradients

# %%
import torch

from mfa import Config, cache_bytes

check, hint = nb.exercises("08")

# %% [markdown]
# **1.** MHA keeps $2 n d = 2 \cdot 32 \cdot 128 = 8192$ numbers a layer, the MLA $512 + 64 = 576$: 7.0%. Layers and bits cancel.
# `mfa.py` counts the same.

# %%
large = dict(n_layer=32, dim=4096, head_dim=128)
mla = Config(attn="mla", joint_kv=True, latent_dim=512, rope_dim=64, **large)
share = 576 / 8192
assert share == cache_bytes(mla) / cache_bytes(Config(attn="mha", **large))
check(1, share)

# %% [markdown]
# **2.** A geometric sum: $\frac18 \big| \frac{1 - e^{8 i\omega}}{1 - e^{i\omega}} \big| = \big| \frac{\sin 4\omega}{8 \sin
# (\omega/2)} \big|$. A frequency of 1 loses four fifths of its size when it stops, one of 0.01 next to nothing. What counts is
# $\omega$ times the spread of the distances, so heads that look at their neighbours let more frequencies rest.

# %%
omega = torch.tensor([1.0, 0.1, 0.01])
sizes = (torch.sin(4 * omega) / (8 * torch.sin(omega / 2))).abs().tolist()
check(2, sizes)
print([f"{size:.4f}" for size in sizes])

# %% [markdown]
# **3.** The first term of the SVD, $u_1 s_1 v_1^\dagger$: $p = u_1$ and $\sigma = s_1 v_1^\dagger$. As real matrices the pairs of
# all heads are $(2n, H)$, and a real cut to two numbers would be nearer: it may give the two numbers of a pair different
# partners. But it does not commute with the turning.

# %%
number = torch.arange(4 * 6.0).view(4, 6)
K = torch.polar(1 + number % 3, number**2)


def shared(K):
    U, s, Vh = torch.linalg.svd(K, full_matrices=False)
    return U[:, :1] * s[0] @ Vh[:1]


check(3, torch.view_as_real(shared(K)))

# %%
both = torch.cat((K.real, K.imag))  # (2n, H)
U, s, Vh = torch.linalg.svd(both, full_matrices=False)
real = (both - U[:, :2] * s[:2] @ Vh[:2]).norm()
print(f"left out: {(K - shared(K)).norm():.2f} by one complex number, {real:.2f} by two real ones")
assert real < (K - shared(K)).norm()

# %%
nb.all_right()
