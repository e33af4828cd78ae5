# %% [markdown]
# # 6. The KV cache: worked solutions
#
# The exercises of [06_kv_cache](../06_kv_cache.ipynb). Try them there first.

# %%
import sys

sys.path[:0] = ["notebooks", ".", ".."]  # nb.py is in one of them
import nb

nb.start()  # plot style, float64, seed, no gradients

# %%
import torch

from mfa import ATTENTION, GPT, Config, KVCache, preset

check, hint = nb.exercises("06")

# %% [markdown]
# **1.** Two bytes, 80 layers, $2C = 512$ elements: 81,920 bytes per token, 2.7 GB for 32,768 tokens. With $C = H/8 = 1024$ it was
# four times as much. The check asks a cache on the `meta` device; narrow FFNs are enough, since the cache does not see them.

# %%
sequence_bytes = 2 * 80 * (2 * 256) * 32_768
with torch.device("meta"):
    model = GPT(Config(attn="mfa", latent_dim=256, n_layer=80, dim=8192, ffn_dim=8))
assert KVCache(model, batch_size=1, capacity=32_768, dtype=torch.bfloat16).nbytes() == sequence_bytes
fits = (640e9 - 138e9) / sequence_bytes  # eight GPUs of 80 GB, less the weights
print(f"{sequence_bytes:,} bytes, {sequence_bytes / 1e9:.1f} GB; {fits:.0f} such sequences fit")
check(1, sequence_bytes)

# %% [markdown]
# **2.** Let $f$ be the factor and $t = BS$. From $W + t\,c_{\text{MHA}} = f\,(W + t\,c)$ follows
#
# $$t = \frac{(f - 1)\,W}{c_{\text{MHA}} - f\,c} .$$
#
# The denominator vanishes at $f = c_{\text{MHA}}/c = 8$: no number of tokens makes MFA eight times as fast, it only comes close.
# The numerator says that a larger model needs more tokens, in proportion to its weights. For the 1B model twice as fast takes
# 18,000 tokens, four times 79,000, six times 264,000: a long document, several of them, and a busy server.


# %%
def tokens_for(factor, W, c_mha, c):
    return (factor - 1) * W / (c_mha - factor * c)


def bytes_of(attn):
    return 2 * 20 * ATTENTION[attn].counts(preset("paper-1b", attn)).kv_cache


with torch.device("meta"):
    W = 2 * sum(p.numel() for p in GPT(preset("paper-1b", "mha")).parameters())
factors = torch.tensor([1.0, 2.0, 4.0, 6.0])
t = tokens_for(factors, W, bytes_of("mha"), bytes_of("mfa"))
print({factor: f"{tokens:,.0f} tokens" for factor, tokens in zip(factors.tolist(), t.tolist(), strict=True)})
check(2, (W + t * bytes_of("mha")) / (W + t * bytes_of("mfa")))

# %% [markdown]
# **3.** $m$ heads do $4mC$ operations per cached token and new token. MFA reads $2C$ elements of `bits` / 8 bytes for them, MFA-KR
# half as many:
#
# $$I_{\text{MFA}} = \frac{4\,m\,C \cdot \text{new}}{2\,C \cdot \text{bits}/8} = \frac{16\,m \cdot \text{new}}{\text{bits}}, \qquad
# I_{\text{MFA-KR}} = 2\,I_{\text{MFA}} .$$
#
# $C$ cancels: a wider head does more work on proportionally more bytes. So the ridge limits $m \cdot \text{new} / \text{bits}$. At
# 16 bits and one token, 185 heads are free. Four tokens at once (speculative decoding) leave 46; an 8-bit cache, 92. This is why
# a model that will be served with an 8-bit cache and speculative decoding should not take too many heads. Step-3 took 64.
#
# The assertion does not use the formula: it adds heads until the operations of the two matrix products, counted by their shapes,
# take longer than the bytes.


# %%
def most_heads(attn, ridge, bits=16, new=1):
    per_head = 16 * new / bits * (2 if attn == "mfa_kr" else 1)
    return int(ridge / per_head)


def counted_heads(attn, ridge, bits, new, C=64, S=1000):
    m, bytes_read = 0, S * C * (1 if attn == "mfa_kr" else 2) * bits / 8
    while 2 * (2 * (m + 1) * new * S * C) / bytes_read <= ridge:  # q k^T and p v, two operations per multiplication
        m += 1
    return m


cases = [("mfa", 16, 1), ("mfa_kr", 16, 1), ("mfa", 8, 1), ("mfa", 16, 4), ("mfa_kr", 4, 2)]
answer = [most_heads(attn, 790 / 4.25, bits, new) for attn, bits, new in cases]
print(dict(zip(cases, answer, strict=True)))
assert answer == [counted_heads(attn, 790 / 4.25, bits, new) for attn, bits, new in cases]
check(3, answer)

# %%
nb.all_right()
