# %% [markdown]
# # 1. FPBA: worked solutions
#
# The exercises of [01_fpba](../01_fpba.ipynb). Try them there first.

# %%
import sys

sys.path[:0] = ["notebooks", ".", ".."]  # nb.py is in one of them
import nb

nb.start()  # plot style, float64, seed, no gradients

# %%
import torch


check, hint = nb.exercises("01")

words = torch.tensor([0, 1, 2, 0, 1, 2])
state = torch.cat((torch.eye(3)[words], torch.eye(6)), dim=1)


def attention_maps(x, W):
    scores = torch.einsum("ia,cab,jb->cij", x, W, x) / x.shape[1] ** 0.5
    future = torch.ones(len(x), len(x)).triu(1).bool()
    return scores.masked_fill(future, -torch.inf).softmax(dim=-1)


# %% [markdown]
# **1.** $2H^2 = 8{,}388{,}608$ elements per layer, 20 layers, two bytes: 336 MB for *one token*. A context of 16,384 tokens
# would take 5.5 TB. MHA takes 163,840 bytes per token, 2048 times less.

# %%
fpba_bytes = 2 * 2048**2 * 20 * 2
check(1, fpba_bytes)
print(f"{fpba_bytes / 1e6:.0f} MB per token, {fpba_bytes * 16384 / 1e12:.1f} TB for 16,384 tokens")

# %% [markdown]
# **2.** Row $a$ of the corner lists what word $a$ looks for. Each looks for itself and for word 2. Since words are one-hot, any
# table of wishes is a matrix. Entries are set, not added, so "both" counts once.

# %%
W_answer = torch.zeros(9, 9)
W_answer[:3, :3] = torch.eye(3)
W_answer[:3, 2] = 1
check(2, state @ W_answer @ state.T)

# %% [markdown]
# **3.** Let $W$ rotate by one step: the score is $g \cos(\theta_i - \theta_j - \tfrac{2\pi}{12})$ times $1/\sqrt 2$, largest at
# $j = i - 1$. The runners-up are one step away, lower by $1 - \cos(2\pi/12) = 0.134$, times the gain $g$. So the gain must be
# large: softmax makes the best score win, whatever the rank.
#
# The lesson: **rank bounds what a head can compare, not where it can look.** With sharp scores, two dimensions find a neighbour
# among twelve. That is also how rotary positions work. (A longer circle needs a larger gain, and precision sets the limit.)

# %%
step = torch.tensor(2 * torch.pi / 12)
rotate_back = torch.stack((torch.stack((step.cos(), -step.sin())), torch.stack((step.sin(), step.cos()))))
theta = 2 * torch.pi * torch.arange(12) / 12
circle = torch.stack((theta.cos(), theta.sin()), dim=1)
for gain in (1, 10, 30, 50):
    weight = attention_maps(circle, gain * rotate_back[None])[0].diagonal(-1).min()
    print(f"gain {gain:2d}: smallest weight on the token before {weight:.3f}")
check(3, weight > 0.9)

# %%
nb.all_right()
