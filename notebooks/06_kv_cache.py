# %% [markdown]
# # 6. The KV cache: bytes, memory, time
#
# **The story.** A KV cache is bytes: so many per token, times tokens, times sequences. We count them for every attention, check
# the count on real caches, and redraw Table 2 and the right panel of Figure 3 from our own counts. Then the harder question:
# when do fewer bytes mean less time? The roofline answers it, and the answer is not "always". An appendix recomputes
# the paper: every misprint and gap we know of, with its arithmetic.
#
# **After this notebook you can**
#
# 1. count the bytes of any attention's cache, and check the count against memory;
# 2. say how many sequences of a given length fit on a GPU, next to the weights;
# 3. work out the arithmetic intensity of decoding, and tell whether a step waits for memory or for arithmetic;
# 4. predict the speed-up that a smaller cache can bring, and name four cases in which it brings none;
# 5. read a paper's numbers with a calculator at hand.
#
# **Time:** 60 minutes, exercises included. It runs in about 15 seconds. **Before:** 04 and 05 (MFA and MFA-KR). 03 (MLA) helps.

# %%
import sys

sys.path[:0] = ["notebooks", ".", ".."]  # nb.py is in one of them
import nb

nb.start()  # plot style, float64, seed, no gradients

# %%
import json
from dataclasses import replace

from experiments.paper import containment
import matplotlib.pyplot as plt
from experiments.paper import tables as paper
import torch
from nb import COLOR, MARKER, NAME, close

from mfa import ATTENTION, GPT, Config, KVCache, preset

check, hint = nb.exercises("06")

# %% [markdown]
# ## Bytes, counted and measured
#
# A token leaves a number of elements in every layer, the column "KV Cache" of Table 1: $2nd$ for MHA, $2gd$ for GQA, $2C$ for
# MFA, $C$ for MFA-KR. At 16 bits each,
#
# $$\text{bytes per token} = 2 \times \text{layers} \times \text{elements}.$$
#
# `counts()` computes the elements from a formula. `KVCache` allocates what a model really keeps. The two are independent code,
# so their agreement means something. We take the paper's 1B model, on the `meta` device, which has shapes and no memory. MLA
# appears twice: as Table 1 counts it, with separate latents for keys and values, and as DeepSeek-V2-Lite has it (Figure 1),
# with one joint latent of 512.


# %%
def counted(cfg):
    return 2 * cfg.n_layer * ATTENTION[cfg.attn].counts(cfg).kv_cache


def measured(cfg, tokens=1, batch=1):
    return KVCache(paper.model(cfg), batch, tokens, dtype=torch.bfloat16).nbytes()  # paper.model: a GPT on the meta device


lite = dict(latent_dim=512, rope_dim=64, joint_kv=True, compress_query=False, latent_norm=True)
model_1b = {NAME[attn]: preset("paper-1b", attn) for attn in ATTENTION} | {"MLA, joint": preset("paper-1b", "mla", **lite)}
for name, cfg in model_1b.items():
    share = counted(cfg) / counted(model_1b["MHA"])
    print(f"{name:10} {counted(cfg):>13,} bytes per token {share:>12.2%} of MHA's")
    assert measured(cfg) == counted(cfg) and measured(cfg, tokens=100, batch=3) == 300 * counted(cfg)

# %% [markdown]
# (Separate latents of 256 and a joint latent of 512 make the same number here, since $2 \cdot 256 + 64 = 512 + 64$. A joint
# latent of 256 would need less; separate ones of 512 need nearly twice as much.)
#
# A skeptic will say: allocated is not used. So here are real models in real memory. Ten tokens are read at once, fourteen
# follow one by one, through the cache; the logits must be those of the model without a cache. Then nothing was forgotten, and
# nothing else was kept.

# %%
ids = torch.randint(64, (2, 24))
for attn in ATTENTION:
    model = nb.new_model(attn=attn, n_layer=1, dim=32, rope_dim=8).double().eval()
    cache = KVCache(model, batch_size=2, capacity=24)
    steps = [model(part, cache=cache)[0] for part in ids.split([10] + [1] * 14, dim=1)]
    held = sum(kept.untyped_storage().nbytes() for layer in cache.layers for kept in layer)
    assert held == cache.nbytes() == 8 * 2 * 24 * ATTENTION[attn].counts(model.cfg).kv_cache  # float64: 8 bytes
    close(f"{NAME[attn]:6} {held:>7,} bytes; logits", torch.cat(steps, dim=1), model(ids)[0], tol=1e-10)

# %% [markdown]
# *Caveat.* These are the bytes an attention *needs*. A library may keep more. Some implementations of MLA cache the expanded
# keys and values of all heads, which is MHA's cache. A server that hands out memory in pages wastes part of the last one. And
# 8-bit caches halve every row of the table alike.
#
# ## Table 2 and Figure 3, redrawn
#
# Table 2 compares three 7B models. Its cache row follows from the architecture, so we can recompute it.

# %%
fig, ax = plt.subplots(figsize=(6.4, 2.8))
for attn, printed in dict(mha="196.6K", mfa="24.6K", mfa_kr="12.3K").items():
    cfg = preset("paper-7b", attn)
    size, score = measured(cfg), sum(paper.SCORES[attn]) / 12
    share = size / measured(preset("paper-7b", "mha"))
    print(f"{NAME[attn]:6} {cfg.n_layer} layers, {size:>7,} bytes per token ({share:.2%}), printed {printed}; {score:.2f}")
    assert paper.as_printed(size, printed) == printed and size == counted(cfg)
    ax.plot(size / 1e3, score, MARKER[attn], color=COLOR[attn], markersize=9)
    ax.annotate(NAME[attn], (size / 1e3, score), (10, -4), textcoords="offset points")
ax.set(xlim=(0, 220), ylim=(47.5, 50.5), xlabel="cache, kB per token (our count)", ylabel="average score\n(the paper's)")
ax.set_title("Table 2")
plt.show()

# %% [markdown]
# The bytes are ours, the scores the paper's, from one run each. The vertical axis does not start at zero: the differences are
# one point of fifty.
#
# The right panel of **Figure 3** shows bytes per token for the four sizes of Table 8, and the text says "the relative savings
# grow with larger model sizes". Table 8 gives layers, $H$ and $n$. It does not give $C$. With $C = H/8$ at every size, the
# relative saving would be 87.5% everywhere. With $C = 256$ at every size, the value of the 7B model, it grows. We draw both.
# (The vertical axis is logarithmic, so that equal distances are equal relative savings.)

# %%
kept, settings = {}, [(layers, H) for layers, H, *_ in paper.TABLE8.values()]
for attn, C in (("mha", 0), ("mfa", 0), ("mfa", 256), ("mfa_kr", 0), ("mfa_kr", 256)):  # 0 is H / 8
    kept[attn, C] = [measured(Config(attn=attn, n_layer=L, dim=H, head_dim=128, latent_dim=C)) for L, H in settings]
    label = NAME[attn] + ("" if attn == "mha" else ", $C = 256$" if C else ", $C = H/8$")
    style = dict(color=COLOR[attn], marker=MARKER[attn], linestyle="-" if C or attn == "mha" else "--")
    plt.plot(list(paper.TABLE8), [size / 1e3 for size in kept[attn, C]], label=label, **style)
plt.gca().set(xlabel="model of Table 8", ylabel="cache, kB per token", title="Figure 3, right panel", yscale="log")
plt.yticks(ticks := [5, 10, 20, 50, 100, 200], ticks)
plt.legend(fontsize=9, loc="upper left", bbox_to_anchor=(1, 1))
plt.show()
saved = {C: [1 - less / more for less, more in zip(kept["mfa", C], kept["mha", 0], strict=True)] for C in (0, 256)}
for C, shares in saved.items():
    print("MFA saves, with", f"C = {C or 'H/8'}:", ", ".join(f"{share:.1%}" for share in shares))
assert set(saved[0]) == {0.875} and saved[256] == sorted(saved[256]) and saved[256][0] < 0.78 and saved[256][-1] == 0.875

# %% [markdown]
# The sentence is true of the solid lines and false of the dashed ones. So the small models of Figure 3 probably had $C = 256$
# too, and MFA saved 78% at 1B, not 87.5%. The paper does not say.
#
# ## How much is that?
#
# Take three shapes: the paper's 1B model, a 7B model of 32 layers and width 4096, and a 70B model of 80 layers and width 8192
# (the shapes of Llama 2). For each attention we ask what one long sequence takes, and how many of them fit beside the weights:
# on one GPU of 80 GB for the first two, on eight for the third.
#
# MLA is DeepSeek's: one joint latent of 512 and 64 rotary dimensions at every size. MFA has $C = H/8$, GQA eight key and value
# heads. Two of the counts are well known, and we check against them: Llama 2 7B (MHA) needs 512 KiB per token, 70B (GQA) 320.

# %%
shapes = {
    "1B": dict(n_layer=20, dim=2048, ffn_dim=4992, vocab_size=65536),
    "7B": dict(n_layer=32, dim=4096, ffn_dim=11008, vocab_size=32000, tied=False),
    "70B": dict(n_layer=80, dim=8192, ffn_dim=28672, vocab_size=32000, tied=False),
}
kinds = {"mha": {}, "gqa": dict(n_kv_head=8), "mla": lite, "mfa": {}, "mfa_kr": {}}
contexts = [1024 * 2**i for i in range(8)]
weights, per_token, memory = {}, {}, {"1B": 80e9, "7B": 80e9, "70B": 640e9}
for name, shape in shapes.items():
    usual = Config(attn="gqa" if name == "70B" else "mha", head_dim=128, n_kv_head=8, **shape)
    weights[name] = 2 * paper.params(paper.model(usual))
    per_token[name] = {attn: counted(Config(attn=attn, head_dim=128, **more, **shape)) for attn, more in kinds.items()}
    print(f"{name:4}{weights[name] / 1e9:6.1f} GB of weights; bytes per token: {per_token[name]}")
assert per_token["7B"]["mha"] == 512 * 1024 and per_token["70B"]["gqa"] == 320 * 1024
assert [round(w / 2e9, 1) for w in weights.values()] == [1.1, 6.7, 69.0]

# %%
fig, axes = plt.subplots(2, 3, figsize=(8.4, 5.8), sharex=True, sharey="row")
for (top, bottom), name in zip(axes.T, shapes, strict=True):
    for attn in kinds:
        GB = [per_token[name][attn] * tokens / 1e9 for tokens in contexts]
        room = [(memory[name] - weights[name]) / 1e9 / size for size in GB]
        for ax, values in ((top, GB), (bottom, room)):
            ax.loglog(contexts, values, MARKER[attn] + "-", color=COLOR[attn], ms=8 if attn == "gqa" else 4, label=NAME[attn])
    top.axhline(weights[name] / 1e9, color="gray", linestyle=":", label="the weights")
    top.set_title(f"{name} on {memory[name] / 1e9:.0f} GB")
    bottom.axhspan(0.04, 1, color="gray", alpha=0.2)
    bottom.set(xlabel="context, tokens", xticks=[1024, 8192, 65536], xticklabels=["1k", "8k", "64k"], ylim=(0.5, None))
axes[0, 0].set_ylabel("cache of one sequence, GB")
axes[1, 0].set_ylabel("sequences that fit")
fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
plt.show()

# %% [markdown]
# Read the lower row: the distance between two lines is how many times more users fit, at every context, since all lines have
# slope $-1$. In the gray zone not even one does. At 7B and 64k tokens MHA holds one sequence; MFA holds fifteen.
#
# *Caveat.* The order of MFA and MLA changes with the size. MLA's 576 elements stay, and MFA's $2C = H/4$ grows: at 70B it is
# 2048, as much as eight heads of GQA. That follows from our rule $C = H/8$, not from MFA. StepFun's Step-3, at $H = 7168$, has
# $C = 256$, and so 512 elements (exercise 1). Whether a given $C$ is enough at a given $H$ is a question of quality, and no
# count answers it.
#
# ## Arithmetic intensity
#
# Bytes are also time, if reading them is what a step waits for. A GPU can be busy in two ways: moving bytes or multiplying. The
# **arithmetic intensity** of a computation is
#
# $$I = \frac{\text{floating-point operations}}{\text{bytes moved}} .$$
#
# Take the attention of one decoding step. Head $c$ compares its query, of width $w$, with every cached key, and adds up values
# of width $w_v$: $2(w + w_v)$ operations per cached token. All $n$ heads do so, and read the same cache if they share it:
#
# $$I = \frac{2\,n\,(w + w_v)}{2 \times \text{elements}} .$$
#
# | attention | $n (w + w_v)$ | elements | $I$ |
# |---|---|---|---|
# | MHA | $2nd$ | $2nd$ | 1 |
# | GQA, MQA | $2nd$ | $2gd$ | $n/g$ |
# | MLA, joint, absorbed (notebook 03) | $m(2C + d_r)$ | $C + d_r$ | almost $2m$ |
# | MFA | $2mC$ | $2C$ | $m$ |
# | MFA-KR | $2mC$ | $C$ | $2m$ |
#
# **MFA buys its intensity with heads**: each further head works on bytes that are read anyway. We check the table on the
# classes themselves, with PyTorch's operation counter: decode one token behind 2,000 others and behind 1,000, and subtract.

# %%
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def operations(cfg, tokens):  # of one layer's matrix products, for one new token
    with torch.device("meta"), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model = GPT(replace(cfg, n_layer=1)).eval()
        cache = KVCache(model, batch_size=1, capacity=tokens + 1)
        cache.length = tokens
        model.blocks[0].attn(torch.empty(1, 1, cfg.dim), cache)
    return counter.get_total_flops()


per_cached = {name: (operations(cfg, 2000) - operations(cfg, 1000)) / 1000 for name, cfg in model_1b.items()}


# %%
def intensity(cfg):
    C, d = cfg.latent, cfg.head_dim
    widths = dict(fpba=2 * cfg.dim, mla=2 * C + cfg.rope_dim, mfa=2 * C, mfa_kr=2 * C).get(cfg.attn, 2 * d)  # w + w_v
    return 2 * cfg.heads * widths / (2 * ATTENTION[cfg.attn].counts(cfg).kv_cache)


for name, cfg in model_1b.items():
    of_class = per_cached[name] / (2 * ATTENTION[cfg.attn].counts(cfg).kv_cache)
    print(f"{name:10} {intensity(cfg):6.1f} operations per byte; the class in mfa.py: {of_class:8.1f}")
    assert intensity(cfg) == of_class or cfg.attn == "mla"
assert [intensity(model_1b[name]) for name in ("MHA", "GQA", "MQA", "MFA", "MFA-KR")] == [1, 4, 16, 14, 28]
step3 = Config(attn="mfa", dim=7168, n_head=64, latent_dim=256)
deepseek_v3 = Config(attn="mla", dim=7168, n_head=128, head_dim=128, **lite)
print(f"Step-3's MFA, 64 heads: {intensity(step3):.0f}; DeepSeek-V3's MLA, 128 heads: {intensity(deepseek_v3):.0f}")

# %% [markdown]
# MLA is the exception, and it should be: the class in `mfa.py` expands every latent in every step, for clarity, which costs
# more than a hundred times the operations. The formula counts the absorbed form, as a decoder would run it.
#
# ## The roofline
#
# A machine has a bandwidth $\beta$ and a peak $\pi$ of operations per second. Work of intensity $I$ cannot run faster than
#
# $$\min(\pi,\; \beta I),$$
#
# a slope and a flat roof that meet at $I = \pi / \beta$, the *ridge*. On an H200 this project measured $\beta = 4.25$ TB/s (a
# copy) and $\pi = 790$ TFLOP/s (a bfloat16 matrix product). Left of the ridge time is bytes over $\beta$; the arithmetic is
# free. Right of it time is operations over $\pi$; the bytes are free.
#
# The weights belong in the picture too. A step reads each weight once, two bytes, and uses it for every sequence of the batch,
# two operations each. So the intensity of all matrix products with weights is the batch size $B$. Attention's does not depend
# on $B$: every sequence has a cache of its own.

# %%
bandwidth, peak, (fig, ax) = 4.25e12, 790e12, plt.subplots(figsize=(8.4, 4.0))
shown = {name: model_1b[name] for name in ("MHA", "GQA", "MQA", "MFA", "MLA, joint", "MFA-KR")}
shown |= {"Step-3's MFA": step3, "DeepSeek-V3's MLA": deepseek_v3}
assert [name for name, cfg in shown.items() if intensity(cfg) > peak / bandwidth] == ["DeepSeek-V3's MLA"]
ax.loglog([0.6, peak / bandwidth, 900], [0.6 * bandwidth / 1e12, peak / 1e12, peak / 1e12], color="black")
for (name, cfg), i in zip(shown.items(), map(intensity, shown.values()), strict=True):
    style = dict(color=COLOR[cfg.attn], marker=MARKER[cfg.attn], markerfacecolor="white" if cfg.dim > 2048 else None)
    ax.plot(i, min(peak, bandwidth * i) / 1e12, linestyle="", markersize=9, label=f"{name}: {i:.0f}", **style)
for batch in (1, 8, 64, 512):
    ax.axvline(batch, color="gray", linestyle=":", linewidth=1)
    ax.text(batch * 1.07, 1.2, f"weights at\nbatch {batch}", color="gray", fontsize=8)
ax.set(xlabel="operations per byte", ylabel="at most, TFLOP/s", ylim=(1, 1500), title="An H200, one decoding step")
ax.legend(fontsize=9, title="attention", loc="upper left", bbox_to_anchor=(1, 1))
plt.show()

# %% [markdown]
# The ridge is at 186 operations per byte. All attentions of the 1B model lie far to the left of it: their decoding waits for
# memory, MFA's with fourteen heads no less than MHA's. That is why MFA can put many heads on one key and pay nothing for them
# in decoding. DeepSeek-V3's MLA, with 128 heads on one latent, lies on the other side. A smaller cache would not make its
# attention faster (it would still save memory). The weights come over the ridge at batch 186.
#
# *Caveat.* This is about decoding. Training, and reading a prompt, use each key for all the queries that follow it, so their
# intensity grows with the length of the text: compute-bound, for all attentions, unless the text is short. There only the
# operations count, and MFA's $n(w + w_v) = 14 \cdot 512 = 7168$ per pair of tokens is $1.75$ times MHA's $4096$.
#
# ## When savings become speed
#
# Left of the ridge a step takes at least as long as its bytes. With $W$ bytes of weights, $B$ sequences of $S$ tokens, and $c$
# bytes of cache per token,
#
# $$\text{time of a step} \;\ge\; \frac{W + B S\,c}{\beta}, \qquad
# \text{speed-up over MHA} \;\approx\; \frac{W + BS\,c_{\text{MHA}}}{W + BS\,c}$$
#
# if both come equally close to their floors. Batch and context enter only as their product, the number of cached tokens. For
# few of them the speed-up is 1, however small the cache; for many it approaches $c_{\text{MHA}}/c$, here 8 for MFA and 16 for
# MFA-KR. At $BS = W/c$ the cache takes as long as the weights.
#
# That is the prediction. What does a GPU do? `experiments/bench/decoding.py` measures it; the next cell reads its results, if
# they are there, and the plot after it puts those of 32 sequences (marks) beside the prediction (lines).

# %%
path, ms, floors = nb.ROOT / "experiments" / "results" / "decode.json", {}, {}
decode = json.loads(path.read_text(encoding="utf-8")) if path.exists() else dict(rows=[])
rows = [row for row in decode["rows"] if (row["model"], row["engine"]) == ("paper-1b", "ours") and "ms" in row]
W, c, bandwidth = weights["1B"], {cfg.attn: counted(cfg) for cfg in model_1b.values()}, decode.get("bandwidth", bandwidth)
for row in sorted(rows, key=lambda row: -row["ms"]):  # some cells have several kernels: the quickest comes last and stays
    assert row.get("cache_bytes", row["counts_bytes"]) == row["counts_bytes"], row  # what was allocated is what counts() says
    ms[row["attn"], row["mode"], row["batch"], row["context"]] = row["ms"]
    floors[row["ms"]] = row["floor_ms"]  # with that model's weights, in that run
    c[row["attn"]] = row["counts_bytes"] // (row["batch"] * row["context"])  # of the very model that was measured
missing = "No measured steps yet: experiments/results/decode.json is missing. The plot below shows the prediction alone."
print(f"Measured on one {decode['device']}" if rows else missing)
most = max((size for (attn, _, *size) in ms if attn == "mha"), key=lambda size: size[0] * size[1], default=None)
for (attn, mode, *size), time in ms.items():
    if size == most:
        print(f"{NAME[attn]:6} {mode:7} {size[0]} sequences of {size[1]:,}: {time:6.2f} ms, floor {floors[time]:.2f} ms")

# %%
best = {}  # the quickest step of 32 sequences, by attention and context: MFA-KR has three modes
for (attn, _, batch, context), time in ms.items():
    if batch == 32:
        best[attn, context] = min(time, best.get((attn, context), time))
contexts = sorted(context for attn, context in best if attn == "mha")

# %%
tokens, fig, ax = torch.logspace(3, 7.5, 50), *plt.subplots(figsize=(7.4, 4.4))
predicted = {attn: (W + tokens * c["mha"]) / (W + tokens * c[attn]) for attn in c}
for attn in ("mfa_kr", "mfa", "mla", "gqa"):
    ax.semilogx(tokens, predicted[attn], color=COLOR[attn])
    ax.text(1.1 * tokens[-1], predicted[attn][-1], NAME[attn], va="center", fontsize=11, color=COLOR[attn])
    gains = [best["mha", context] / best[attn, context] for context in contexts]
    ax.plot([32 * context for context in contexts], gains, ":", marker=MARKER[attn], ms=8, color=COLOR[attn])
assert predicted["mfa"][0] < 1.1 and 7.5 < predicted["mfa"][-1] < 8 and 14 < predicted["mfa_kr"][-1] < 16
ax.set(xlabel="cached tokens, batch × context", ylabel="times as fast as MHA", title="1B model, decoding", ylim=(0, None))
ax.set_xlim(1e3, 1.5e8)  # room for the names
plt.show()

# %% [markdown]
# One user with a short chat (a few thousand tokens, on the left) gains nothing: for one sequence of 1,024 tokens MFA was
# measured a little slower than MHA, and a step takes three times its floor, so it waits for something other than memory. A
# server with 64 users at 16k tokens, a million in all, could become about seven times as fast with MFA. Marks were
# measured, with 32 sequences, MFA-KR in its fastest form. They lie below their lines, since a floor is a limit and not a
# promise.
#
# So when do smaller caches **not** make decoding faster?
#
# 1. *Few cached tokens.* The weights dominate, and with a single sequence small kernels. Fewer bytes of weights help a little.
# 2. *Right of the ridge.* Very many heads on one latent; or several tokens decoded at once (speculative decoding), which
#    multiplies the intensity by their number (exercise 3).
# 3. *Training and prompts.* Compute-bound; see above.
# 4. *The kernel does something else.* The formula lets MFA-KR read its key once for two uses. PyTorch's attention takes key and
#    value as two tensors and reads both, so in an early measurement of this project MFA-KR gained 10% over MFA instead of a
#    factor of 2. With `pre`, PyTorch's operations write all keys, rotated, to memory and read them back, in every step; in a
#    kernel that turns them as they pass through (`support/decode.py`) it costs a sixth of a step. And a tiny model waits
#    for its launches, not for its bytes.
#
# Even then, wherever there is a cache, a smaller one means more users or longer contexts on the same GPU.
#
# **What this does not say.** Counts decide what a model costs. They say nothing about what it learns: notebook 07 trains them.
#
# ## Exercises
#
# **1 (easy).** Give the 70B shape (80 layers) an MFA with $C = 256$, as Step-3 has it. How many bytes of cache does one
# sequence of 32,768 tokens take, at 16 bits?

# %%
sequence_bytes = ...

# %%
check(1, sequence_bytes)

# %% [markdown]
# **2 (medium).** By the formula, how many cached tokens $BS$ does it take until MFA's step is exactly `factor` times as fast as
# MHA's? Write it for weights of `W` bytes, and `c_mha` and `c` bytes per cached token.


# %%
def tokens_for(factor, W, c_mha, c):
    return ...


# %%
c_mha, c_mfa, answer = counted(model_1b["MHA"]), counted(model_1b["MFA"]), ...
if tokens_for(2, W, c_mha, c_mfa) is not ...:
    t = torch.tensor([tokens_for(factor, W, c_mha, c_mfa) for factor in (1, 2, 4, 6)])
    answer = (W + t * c_mha) / (W + t * c_mfa)  # must come back as the factors
check(2, answer)

# %% [markdown]
# **3 (hard).** How many heads may share one key before decoding waits for arithmetic? Write the largest $m$ at which the
# intensity of MFA (`"mfa"`) or MFA-KR (`"mfa_kr"`) does not exceed `ridge`, if the cache has `bits` bits per element and `new`
# tokens are decoded in one step (they read the cache once, together).


# %%
def most_heads(attn, ridge, bits=16, new=1):
    return ...


# %%
cases = [("mfa", 16, 1), ("mfa_kr", 16, 1), ("mfa", 8, 1), ("mfa", 16, 4), ("mfa_kr", 4, 2)]
answer = [most_heads(attn, 790 / 4.25, bits, new) for attn, bits, new in cases]
check(3, answer)

# %% [markdown]
# Worked solutions: [solutions/06_kv_cache_solutions.ipynb](solutions/06_kv_cache_solutions.ipynb). Next:
# [07_train_and_compare](07_train_and_compare.ipynb) trains what was counted here.

# %% [markdown]
# ## Appendix: the paper's misprints and gaps, recomputed
#
# What follows goes through the misprints and gaps that change a number, each with the arithmetic that shows it, grouped by what
# shows them. (Notebooks 01 and 02 meet three that do not: a transpose in Eq. 1, the text's $nh = H$, and Table 1's shared
# dimension of MHA.) None of them touches the idea. Together they decide whether somebody else's implementation gives the same
# model.
#
# **1. Equations 6 and 7.** $O_c$ is printed $C \times C$. Table 1's parameters $H(3C + mC) + mC^2$ contain $mCH$ for it: $H
# \times C$. The scores are printed over $\sqrt d$; the key is $C$ wide, so $\sqrt C$. The sum runs to $n$; Table 1 says $m$.
#
# **2. Equation 8.** $\alpha \odot N S_k$ multiplies $(C, C)$ by $(H, C)$, which fits only at $H = C$. Equation 9 with $W_K =
# S_k^T$ fits: $S_v^T = (I + \operatorname{diag}(\alpha) N)\, S_k^T$. So the gate acts on the *output* of $N$.

# %%
layer = paper.model(preset("paper-1b", "mfa")).blocks[0].attn
H, m, C = 2048, 14, 256
table1, square = H * (3 * C + m * C) + m * C**2, H * 3 * C + 2 * m * C**2
print(f"1. Table 1: {table1:,} parameters, the class: {paper.params(layer):,}; with a square O_c: {square:,}")
assert paper.params(layer) == table1 != square and layer.scale == C**-0.5
kr = ATTENTION["mfa_kr"](Config(attn="mfa_kr", dim=32, n_head=4, latent_dim=8, pos="none"))
kr.alpha.copy_(torch.randn(8))
S_k, N, O_T = kr.s_k.weight.T, kr.n.weight, kr.o.weight.T.unflatten(0, (4, 8))  # (H, C), (C, C), (m, C, H)
try:
    raise AssertionError(f"N S_k conforms: {(N @ S_k).shape}")
except RuntimeError as error:
    print("2. N S_k:", error)
S_v = ((torch.eye(8) + kr.alpha.diag() @ N) @ S_k.T).T  # Eq. 9, transposed
close("2. Eq. 9 and the class", S_v @ O_T, kr.vo_circuit())

# %% [markdown]
# **3. Which MLA?** Table 1 gives MLA two latents, $2C + d_r$. Figure 1's MLA is DeepSeek-V2-Lite's: one joint latent, 512 wide,
# $d_r = 64$, a norm on the latent, no query compression. The abstract's 56% needs the joint one. (Its other saving, 93.7%, is
# 93.75% cut off. And Section 3 calls the shared subspaces of MFA and MLA "equivalent": both are $C$ in Table 1, but with the
# experiments' $C$ they are 256 and 512.)
#
# **4. Numbers that do not add up.** Table 7's 6.9B leaves out the embeddings and takes 33 or 29 *routed* experts, with the
# shared one extra and a first dense FFN as wide as two experts and the shared one, which is stated nowhere. Then MFA-KR's
# printed expert width, 1536, gives 7.0B; 1508, half of the shared width as in the other columns, gives 6.9B. Table 2's MFA
# average is 50.0, not 49.9. Tables 3 and 4 disagree on the same model (6.36, 6.35). "10% more" parameters are 11% from the
# table's own 1.08B and 1.20B. 163K bytes are 163.84K, cut off. Section 4.3 says 2.1B parameters and 48B tokens where Table 8
# has 2.2B and 47B.
#
# We print all numbers of the paper that our counts do not reproduce. (Table 8 does not give the experts of its models. Its rows
# rest on an assumption of ours, all widths in proportion to $H$, and only say that the assumption is not exact.)

# %%
mha, kr_, joint = (counted(model_1b[name]) for name in ("MHA", "MFA-KR", "MLA, joint"))
separate = counted(preset("paper-1b", "mla", latent_dim=512))
for less, more, what in ((kr_, joint, "joint MLA"), (kr_, separate, "separate MLA, C = 512"), (kr_, mha, "MHA")):
    print(f"3. 1 - {less:,} / {more:,} = {1 - less / more:.2%} saved against {what}")
assert f"{1 - kr_ / joint:.0%}" == "56%" != f"{1 - kr_ / separate:.0%}" and 1 - kr_ / mha == 0.9375
off = [f for f in paper.figures() if f.paper and not f.agrees]
for f in off:
    print(f"4. {f.where:12} {f.what:45} {paper.in_full(f):>14}, printed {f.paper}")
assert [ATTENTION[c.attn].counts(c).shared_dim for c in (model_1b["MFA"], model_1b["MLA, joint"])] == [256, 512]
assert {f.where for f in off} == {"Abstract", "Table 2", "Section 4.4", "Table 4", "Table 5", "Table 7", "Table 8"}
total = {f.what: f.rounded for f in paper.table7()}
assert total["MFA-KR, experts as printed: parameters"] == "7.0B" and total["MFA-KR, experts 1508 wide: parameters"] == "6.9B"
assert round(sum(paper.SCORES["mfa"]), 1) == 600.0 and round(100 * (1.20 / 1.08 - 1)) == 11

# %% [markdown]
# **5. The division at the start.** Output projections are divided by $\sqrt{2 \cdot \text{layer\_idx}}$. If the first layer has
# index 0, this divides by zero, so the index is a depth counted from 1.
#
# **6. The init does not transfer to small widths.** Multiply the standard deviations. With weights of std $s$ and states of
# variance 1, a score of MHA has std $Hs^2$, of MFA $H \sqrt{C}\, s^3$, of Table 1's MLA $H C s^4$ (one factor $s$ for each
# matrix). At $H = 2048$ the paper's 0.02 gives 0.8 for MHA. At $H = 128$ it leaves 0.05, 0.004 and 0.0003: uniform attention.
# With $s = 0.02 \sqrt{2048/H}$ and $C = H/8$, all three are the same at every width. The std of a score is
# $\|W_c\|_F$ times the scale, so we can read it off the circuit. (Cutting the normal at 3 std makes it 1.3% narrower.)

# %%
for depth in (1, 2, 12):
    layer = ATTENTION["mfa"](Config(dim=256), layer=depth - 1)
    ratio = (layer.q.weight.std() / layer.o.weight.std()).item()
    print(f"5. depth {depth:2}: output projection smaller by {ratio:.3f}; sqrt(2 x {depth}) = {(2 * depth) ** 0.5:.3f}")
    assert abs(ratio / (2 * depth) ** 0.5 - 1) < 0.02
for H, std in ((2048, 0.02), (128, 0.02), (128, 0.08)):
    C, s = H // 8, 0.9866 * std
    for attn, formula in dict(mha=H * s**2, mfa=H * C**0.5 * s**3, mla=H * C * s**4).items():
        cfg = Config(attn=attn, dim=H, n_head=2, head_dim=H // 16, pos="none", init_std=std)
        layer = ATTENTION[attn](cfg)
        spread = (layer.scale * layer.qk_circuit().flatten(1).norm(dim=1)).mean().item()
        print(f"6. H = {H:4}, std {std}: {NAME[attn]} starts with scores of std {spread:.4f}; formula {formula:.4f}")
        assert abs(spread / formula - 1) < 0.1

# %% [markdown]
# **7. Key reuse under RoPE.** The paper does not say whether the reused key is taken before or after its rotation. There are
# three readings (notebook 05), the same without rotary positions and different with them.
#
# **8. RoPE and the rank columns.** Under RoPE MFA's $W_c$ keeps rank $C$. MLA's has $d + d_r$, and the rank columns of Table 1
# leave the $d_r$ out.
#
# **9. Total effective rank** is a count, heads times rank. MFA's $mC$ is the rank of nothing: all $W_c$ together have rank $C$
# on the key side, since they share $S_k$, and rank $\min(H, \text{q\_rank})$ on the query side, since they share $S_q$.

# %%
small, x = dict(dim=32, n_head=6, latent_dim=8, head_dim=4, rope_dim=2), torch.randn(1, 12, 32)
reused = {}
for pos in ("none", "rope"):
    for reading in ("pre", "post", "inverse"):
        torch.manual_seed(1)  # the same weights for all
        reused[pos, reading] = ATTENTION["mfa_kr"](Config(attn="mfa_kr", pos=pos, key_reuse_rope=reading, **small))(x)
    others = [(reused[pos, r] - reused[pos, "pre"]).abs().max().item() for r in ("post", "inverse")]
    print(f"7. pos = {pos}: post and inverse differ from pre by {others[0]:.3f} and {others[1]:.3f}")
    assert (max(others) == 0) if pos == "none" else (min(others) > 0.01)
rank = {a: paper.ranks(ATTENTION[a](Config(attn=a, pos="rope", **small)), offset=3) for a in ("mla", "mfa")}
for attn, printed in dict(mla=4, mfa=8).items():
    print(f"8. {NAME[attn]}: Table 1 has rank {printed} per head; under rope {rank[attn].heads}")
print(f"9. MFA: m C = {6 * 8}; all W_c have rank {rank['mfa'].key_side} (keys) and {rank['mfa'].query_side} (queries)")
assert rank["mla"].heads == [4 + 2] * 6 and rank["mfa"] == ([8] * 6, 8, 8)

# %% [markdown]
# **10. What ships.** Step-3 puts an RMSNorm on the query latent. A norm between the factors is not linear, so there is no $W_c$
# and no Eq. 7: `factorization()` refuses. Its query rank is 2048, so item 9's query side is wider there.
#
# **11. Table 4 compares one class of functions with itself.** $M = I + N^T \operatorname{diag}(\alpha)$ folds into the output
# projection, exactly, whatever $M$ is. The perplexities from 6.45 to 7.88 are differences of optimisation.
#
# **12. MLA's initialisation.** The paper finds DeepSeek's initialisation essential for MLA and describes it in Appendix B,
# which our copy lacks (like Table 9). There is no arithmetic for a missing page. What can be checked is that the fair baseline
# exists: a joint latent with its norm and no query compression. It has no query latent, and the norm costs $C$ parameters and
# no cache.

# %%
try:
    raise AssertionError(ATTENTION["mfa"](Config(latent_norm=True, **small)).factorization(x))
except ValueError as error:
    print("10. factorization():", error)
wide = paper.ranks(ATTENTION["mfa"](Config(pos="none", q_rank=20, **small)))
print(f"10. with q_rank 20: rank {wide.query_side} on the query side, {wide.key_side} on the key side")
assert (wide.query_side, wide.key_side) == (20, 8)
for reuse in ("vanilla", "proj", "residual", "gated"):
    attn = ATTENTION["mfa_kr"](Config(attn="mfa_kr", key_reuse=reuse, **small))
    if reuse == "gated":
        attn.alpha.copy_(torch.randn(8))  # as after training; zero would leave nothing to fold
    close(f"11. {reuse:8} folded into vanilla", containment.fold_key_reuse(attn)(x), attn(x))
with_norm, without = (ATTENTION["mla"].counts(replace(model_1b["MLA, joint"], latent_norm=n)) for n in (True, False))
print(f"12. the fair MLA caches {with_norm.kv_cache} elements; its norm adds {with_norm.params - without.params} parameters")
assert with_norm.kv_cache == without.kv_cache == 576 and with_norm.params - without.params == 512
