# %% [markdown]
# # 7. Train and compare: worked solutions
#
# The exercises of [07_train_and_compare](../07_train_and_compare.ipynb). Try them there first.

# %%
import sys

sys.path[:0] = ["notebooks", ".", ".."]  # nb.py is in one of them
import nb

nb.start()  # plot style, float64, seed, no gradients

# %%
import math

import torch

from mfa import ATTENTION, Config

check, hint = nb.exercises("07")

# %% [markdown]
# **1.** Perplexity is $e^\text{loss}$, so the difference of the losses is the logarithm of the ratio: 0.0094 nats per token.

# %%
nats = math.log(6.41) - math.log(6.35)
check(1, nats)
print(f"{nats:.4f} nats")

# %% [markdown]
# **2.** The mean of $k$ runs has variance $\sigma^2 / k$, the difference of two such means $2\sigma^2 / k$. From
# $\delta \ge 2 \sqrt{2\sigma^2 / k}$ follows $k \ge 8 \sigma^2 / \delta^2$.


# %%
def seeds_needed(delta, sigma):
    return math.ceil(8 * sigma**2 / delta**2)


answer = [seeds_needed(0.0094, sigma) for sigma in (0.02, 0.005, 0.001)]
check(2, answer)

# %% [markdown]
# Two standard errors are a modest demand: a real difference of just $\delta$ is then missed in half of all experiments. We draw
# such experiments to see it.

# %%
delta, sigma, k = 0.0094, 0.02, 37
one, other = torch.randn(2, 20_000, k) * sigma
difference = delta + (other.mean(-1) - one.mean(-1))  # (20000,): two attentions that differ by delta, k seeds each
found = (difference > 2 * sigma * math.sqrt(2 / k)).double().mean().item()
print(f"seen as more than two standard errors in {found:.0%} of the experiments")
assert abs(found - 0.5) < 0.05

# %% [markdown]
# **3.** With the gains $g_H = \sqrt H s$ and $g_C = \sqrt C s$: in the first part query and key have entries of size $g_H g_C$
# each, so a product of two entries has standard deviation $a = (g_H g_C)^2$. In the rotary part it is $b = g_H g_C \cdot g_H$,
# and the rotation changes no size. A score is a sum of $d$ products of the first kind and $d_r$ of the second, over
# $\sqrt{d + d_r}$. Variances add up.


# %%
def mla_score_std(H, C, d, d_r, s):
    g_H, g_C = math.sqrt(H) * s, math.sqrt(C) * s
    a, b = (g_H * g_C) ** 2, g_H * g_C * g_H
    return math.sqrt((d * a**2 + d_r * b**2) / (d + d_r))


H, C, d, d_r, s = 512, 64, 64, 32, 0.04
check(3, mla_score_std(H, C, d, d_r, s))

# %% [markdown]
# And measured, on the class. The weights are cut at three standard deviations, which leaves 0.9866 of $s$.

# %%
mla = ATTENTION["mla"](Config(attn="mla", dim=H, head_dim=d, latent_dim=C, rope_dim=d_r, init_std=s))
x, pos = torch.randn(8, 64, H), torch.arange(64)
q, (k, _) = mla.query(x, pos), mla.from_cache(*mla.to_cache(x, pos))
measured = (mla.scale * q @ k.mT).std().item()
print(f"measured {measured:.4f}, predicted {mla_score_std(H, C, d, d_r, s):.4f}, {mla_score_std(H, C, d, d_r, 0.9866 * s):.4f}")
assert abs(measured / mla_score_std(H, C, d, d_r, 0.9866 * s) - 1) < 0.1

# %%
nb.all_right()
