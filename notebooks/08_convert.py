# %% [markdown]
# # 8. Convert: a trained model with a smaller cache
#
# **The story.** Most models that people have are MHA or GQA. To get MFA's cache, must one train anew? A trained attention can be
# *cut*: put the keys of all heads side by side, and keep the few directions that carry most of the scores. We show when that is
# exact, what it loses, and which directions count. Then comes the hard part, rotary positions, which forbid most cuts. A few
# steps of further training repair a good deal of what is left. The model that we convert comes with this project.
#
# **After this notebook you can**
#
# 1. say when MHA becomes MLA, MFA or MFA-KR without any loss, and check it;
# 2. predict the error of a cut from the singular values that it leaves out;
# 3. explain why rotary positions allow only complex numbers between heads, and what becomes of a frequency that stops turning;
# 4. convert a checkpoint, train it a little further, and compare it with one trained from scratch.
#
# **Time:** 45 minutes, exercises included. It runs in half a minute. **Before:** 04 (MFA), 03 (why MLA's position has dimensions
# of its own).

# %%
import sys

sys.path[:0] = ["notebooks", ".", ".."]  # nb.py is in one of them
import nb

nb.start()  # plot style, float64, seed, no gradients

# %%
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from nb import COLOR, MARKER, NAME, close

from experiments.convert import convert, target
from experiments.paper.truncation import Layer, low_rank, see
from mfa import GPT, Config, cache_bytes, rotate
from support.run_folder import model_from
from support.shipped import open_checkpoint

check, hint = nb.exercises("08")

# %% [markdown]
# ## When nothing is lost
#
# Head $c$ of MHA scores with $W_c = Q_c K_c^T$ and writes with $U_c = V_c O_c^T$. MFA has one $S_k$ for all heads, $(H, C)$. If
# there are matrices $P_c$, $(C, d)$, with $K_c = S_k P_c$ for every head, then
#
# $$Q_c K_c^T = \underbrace{Q_c P_c^T}_{\text{MFA's query}} S_k^T ,$$
#
# so the head is MFA's, and what is particular to it has moved into the query. The values go the same way, with $P_c O_c^T$ as
# the new output. All $K_c$ side by side have rank $nd$ at most, so $C = nd$ always suffices. So far there are no positions.

# %%
small = GPT(Config(attn="mha", dim=48, n_head=4, head_dim=6, n_layer=2, ffn_dim=64, pos="none"))
idx = torch.randint(65, (2, 40))
for attn, widths in (("mla", dict(latent_dim=24)), ("mfa", dict(latent_dim=24)), ("mfa_kr", dict(latent_dim=48))):
    new = convert(small, target(small.cfg, attn, **widths))
    close(f"{NAME[attn]:7} as wide as all keys: logits", new(idx)[0], small(idx)[0], tol=1e-11)
narrow = convert(small, target(small.cfg, "mfa", latent_dim=23))
lost = (narrow(idx)[0] - small(idx)[0]).abs().max().item()
print(f"MFA, one number narrower: logits move by up to {lost:.1e}")
assert lost > 1e-6

# %% [markdown]
# MFA-KR uses its key as the value too, so its latent must hold both: $2nd = 48$ here. A latent so wide saves nothing. What
# saves is a *cut*.
#
# ## What a cut loses
#
# What must come out right is not the key but the score $x_i Q_c (x_j K_c)^T$. Call $X$ the root of the second moments of $x$,
# $X^T X = E[x^T x]$, and $G_c$ the root of those of head $c$'s queries. Then the squared error of all scores is
#
# $$\sum_c \big\| X\, (K_c - S_k P_c)\, G_c \big\|^2 ,$$
#
# and the best cut is that of a truncated SVD of all $X K_c G_c$ side by side. Its error is the sum of the squared singular
# values that it leaves out (Eckart and Young). We take the trained MHA of this project, look at what its attentions meet in
# 8,192 characters, and check that for one layer, apart from positions.

# %%
checkpoint = open_checkpoint(Path("shipped-mha"))
mha = model_from(checkpoint, Path("shipped-mha"), torch.device("cpu")).float().eval()
ids, val, characters = nb.shakespeare()
starts = torch.linspace(0, len(ids) - 64, 128).long()  # of 128 lines of 64 characters, all over the text
seen = see(mha, ids[starts[:, None] + torch.arange(64)].long())
layer = Layer(mha.blocks[2].attn, seen[2])
loss_of_mha = nb.validate(mha, val)
print(f"MHA: validation loss {loss_of_mha:.3f}, {cache_bytes(mha.cfg):,} bytes of cache per token")
assert loss_of_mha < 1.5

# %%
C = 32
S_k, P, singular = low_rank(layer.K, layer.query_gram, layer.X, C)
error = 0
for c in range(len(layer.K)):
    difference = layer.Q[c] @ (layer.K[c] - S_k @ P[c]).T * layer.scale  # of W_c: (H, H)
    error += (layer.X @ difference @ layer.X.T).square().sum() * layer.heads_weigh[c].item()
close("squared error of all scores, and what was left out", error, singular[C:].square().sum(), tol=1e-9)
print(f"{C} of {len(singular)} numbers keep {1 - error / singular.square().sum():.1%} of the scores")

# %% [markdown]
# `heads_weigh` is the size of what a head writes: an error in the scores of a head that hardly writes does not matter. It
# also makes errors of scores and errors of values comparable where both come from one latent.
#
# Is it worth looking at a text? One can also cut by the weights alone, as if the entries of $x$ were independent. The plot
# shows how much of the scores each kind of cut leaves out.


# %%
def left_out(C, seen_by_it):
    """The share of the scores, as they are in the text, that a cut to C numbers loses."""
    grams, X = (layer.query_gram, layer.X) if seen_by_it else (Layer(mha.blocks[2].attn, None).query_gram, torch.eye(128))
    S, P, _ = low_rank(layer.K, grams, X, C)
    rest = torch.cat(list(layer.X @ (layer.K - S @ P) @ torch.linalg.cholesky(layer.query_gram)), dim=-1)
    return (rest.square().sum() / singular.square().sum()).item()


widths = (8, 16, 24, 32, 48, 64, 96)
lost = {way: [left_out(C, way) for C in widths] for way in (True, False)}
assert all(a < b for a, b in zip(lost[True], lost[False], strict=True))
print(f"32 numbers: {lost[True][3]:.2%} left out by the one, {lost[False][3]:.2%} by the other")

# %%
plt.plot(widths, lost[False], "o--", color="#999999", label="cut by the weights alone")
plt.plot(widths, lost[True], "o-", color=COLOR["mfa"], label="cut by the scores in a text")
plt.yscale("log")
plt.xlabel("$C$, numbers kept of 128")
plt.ylabel("share of the squared scores left out")
plt.legend()
plt.show()

# %% [markdown]
# What comes into an attention lies in few directions, and a cut that knows them loses far less. `seen` holds them for each layer.
#
# ## Why rotation is the hard part
#
# RoPE turns the pair of dimensions $(f, f + d/2)$ of a key at position $j$ by the angle $\omega_f j$. Read such a pair as one
# complex number $k$: then the score of a pair is
#
# $$\mathrm{Re}\big( q\, \bar k\, e^{i \omega_f (i - j)} \big) .$$
#
# A cut puts a matrix between key and query. It must commute with the turning, or the score no longer depends on the distance
# alone. Complex numbers do: they turn too. A matrix that mixes two frequencies does not.

# %%
d, pos = 8, torch.arange(20)
q, k = torch.randn(2, 20, d)
factor = torch.polar(torch.rand(4), 6 * torch.rand(4))  # a complex number for each frequency
as_matrix = torch.cat((torch.cat((factor.real.diag(), factor.imag.diag()), 1), torch.cat((-factor.imag.diag(), factor.real.diag()), 1)))
for name, A in (("complex numbers", as_matrix), ("any matrix", torch.randn(d, d))):
    before, after = rotate(k @ A, pos, 1e4), rotate(k, pos, 1e4) @ A
    print(f"{name}: turned before and after differ by {(before - after).norm() / after.norm():.1e}")
    assert ((before - after).norm() < 1e-12 * after.norm()) == (name == "complex numbers")

# %% [markdown]
# So heads may share a turning key only frequency by frequency, $k_c = p_c\, \sigma$ with a complex $p_c$: one complex number of
# all $n$ that were there. That is a bad bargain. MHA2MLA and TransMLA, which convert large models to MLA, find the same: let
# only some frequencies rotate, and cut the rest as freely as without positions.
#
# What does a frequency lose that stops turning? Its $e^{i\omega D}$ becomes a constant. The best constant is the mean over
# the distances $D$ that a head looks at. If that mean has size 1, nothing is lost. If it is 0, everything is.

# %%
attn = mha.blocks[2].attn
omega = mha.cfg.rope_base ** (-torch.arange(16) / 16)
turns = torch.polar(torch.tensor(1.0), omega[:, None] * torch.arange(64))  # (frequencies, distances)
mean = (seen[2].distances.double() @ turns.mT.real).square() + (seen[2].distances.double() @ turns.mT.imag).square()
for f, size in enumerate(mean.sqrt().T):
    i, j = layer.pairs[f]
    by_layer = (layer.mean_turn[:, i, i].square() + layer.mean_turn[:, i, j].square()).sqrt()
    assert torch.allclose(by_layer, size, atol=1e-5)
print("half of the frequencies keep at least", f"{mean.sqrt()[:, 8:].min():.4f} of their size")
assert mean.sqrt()[:, 8:].min() > 0.9 > mean.sqrt()[:, 0].max()

# %%
for head, size in enumerate(mean.sqrt()):
    plt.plot(range(16), size, "o-", label=f"head {head}")
plt.xlabel("frequency, from the fastest to the slowest")
plt.ylabel(r"size of the mean of $e^{i\omega D}$")
plt.legend()
plt.show()

# %% [markdown]
# Half of the frequencies turn so slowly that within 64 characters they hardly move. They may stop. Which of the others should go
# on? `convert` weighs each by the scores that it carries, and takes a ladder (every frequency, every second, ...), since a
# model has one base for all its layers. Now the same MQA with more and more of its key turning:

# %%
turning, losses = (0.125, 0.25, 0.5, 0.75, 1.0), []
for fraction in turning:
    mqa = convert(mha, target(mha.cfg, "mqa", rope_fraction=fraction), seen)
    losses.append(nb.validate(mqa, val, tokens=8192))
    print(f"{fraction:6.1%} of the key turns, base {mqa.cfg.rope_base:9,.0f}: loss {losses[-1]:.3f}")
best = turning[losses.index(min(losses))]
assert losses[-1] > min(losses) + 0.2 and best < 1

# %% [markdown]
# Half is best here: letting everything turn, as an average of heads does, is far worse, and so is letting too little turn. The
# base shrinks with the ladder: with half of the key it is $\sqrt{500000} = 707$, and the frequencies are the source's own.
#
# ## Straight after the conversion
#
# Now all targets, by a list of bytes. `target` fills in what is not given: half of the rotary width, and a query of full rank,
# so that the query loses nothing.

# %%
CASES = [
    ("gqa", dict(n_kv_head=2)), ("mfa", dict(latent_dim=64)), ("mqa", {}), ("mfa", dict(latent_dim=32)),
    ("mla", dict(latent_dim=32, joint_kv=True)), ("mfa_kr", dict(latent_dim=32)), ("mfa", dict(latent_dim=16)),
]  # fmt: skip
found = []
for attn, fields in CASES:
    new = convert(mha, target(mha.cfg, attn, **fields), seen)
    found.append((attn, cache_bytes(new.cfg), nb.validate(new, val, tokens=8192), new))
    width = f"C = {new.cfg.latent}" if "latent_dim" in fields else f"{new.blocks[0].attn.g} heads"
    print(f"{NAME[attn]:7} {width:8} {found[-1][1]:5,} bytes of {cache_bytes(mha.cfg):,}: loss {found[-1][2]:.3f}")
by_mfa = [loss for attn, _, loss, _ in found if attn == "mfa"]
assert by_mfa == sorted(by_mfa) and abs(found[2][2] - found[3][2]) < 0.02 and found[5][2] < found[6][2]

# %% [markdown]
# The third and the fourth line agree, as they must: MFA with $C = d$ is MQA with a factored query (notebook 04), and the cut
# finds the same directions. MHA of these four heads has no more than four keys to share, so an eighth of its cache is half of one. With so
# little, one wide latent for both (MFA-KR, $C = 32$) is better than two narrow ones (MFA, $C = 16$).
#
# ## A little further training
#
# The cut is the start of a training, with everything else in place. We train three of them for 8 and 24 steps, each with a
# schedule of its own, at a tenth of the rate that the model was made with. Beside them stand the MFA and the MFA-KR that come
# with this project: trained from scratch, 700 steps.

# %%
further = {}
for attn, size, loss, new in (found[3], found[5], found[6]):
    state = {name: p.clone() for name, p in new.state_dict().items()}
    further[attn, size] = [loss]
    for steps in (8, 24):
        new.load_state_dict(state)
        nb.fit(new, ids, steps, seed=1, lr=1e-3, optimizer="muon")
        further[attn, size].append(nb.validate(new.eval(), val, tokens=8192))
    print(f"{NAME[attn]:7} {size:4} bytes:", "  ".join(f"{value:.3f}" for value in further[attn, size]))
    assert further[attn, size][2] < further[attn, size][1] < loss

# %%
scratch = {}
for attn in ("mha", "mfa", "mfa_kr"):
    model = model_from(open_checkpoint(Path(f"shipped-{attn}")), Path(attn), torch.device("cpu")).float().eval()
    scratch[attn] = cache_bytes(model.cfg), nb.validate(model, val, tokens=8192)
    print(f"{NAME[attn]:7} from scratch: {scratch[attn][0]:5,} bytes, loss {scratch[attn][1]:.3f}")
assert scratch["mfa"][0] == found[6][1] and further["mfa", found[6][1]][2] > scratch["mfa"][1]

# %%
for (attn, size), values in further.items():
    plt.plot([size] * 3, values, color=COLOR[attn], marker=MARKER[attn], linestyle=":")
    for steps, value in zip((0, 8, 24), values, strict=True):
        plt.annotate(f"{steps}", (size, value), xytext=(5, -3), textcoords="offset points", fontsize=8)
for attn, (size, value) in scratch.items():
    plt.plot(size, value, color=COLOR[attn], marker=MARKER[attn], markersize=10, markerfacecolor="none", linestyle="")
    plt.annotate(f"{NAME[attn]}, from scratch", (size, value), xytext=(0, -16), textcoords="offset points", ha="center", fontsize=8)
plt.ylim(1.38, None)
plt.xscale("log", base=2)
plt.xlabel("bytes of cache per token")
plt.ylabel("validation loss, nats")
plt.show()

# %% [markdown]
# Small numbers are steps of further training. Within 24 steps, 3% of 700, most of what the cut lost is back where the cache is a
# quarter of MHA's. At an eighth and less there is still a gap to the model trained from scratch.
#
# **What this does not show.** Four heads are few. The model has seen its text several times, and context 64 lets most
# frequencies rest. The study converts an MHA of 30M parameters with eight heads and a context of 512, and trains it further by
# 1%, 3% and 10% of its steps:

# %%
from experiments.study import conversion, plot, studies

rows, results = conversion.read_results(conversion.RESULTS), plot.Results(studies.read_results(studies.RESULTS))
left = {}
for one in plot.converted(rows, results):
    losses = list(one.losses.values())
    left[one.attn] = losses[-1] - one.scratch
    print(f"{one.name:28} {one.cache_share:6.1%}  ", *(f"{loss:.3f}" for loss in losses), f"  from scratch {one.scratch:.3f}")
    assert one.attn == "mha" or losses == sorted(losses, reverse=True)
assert not rows or 0.03 < left["gqa"] < left["mla"] < left["mfa"] < left["mfa_kr"] and left["mha"] < 0.01
plot.conversion_plot(rows, results) if rows else print("experiments/results/convert.jsonl is not there yet")

# %% [markdown]
# After 10% of the steps a quarter of the cache (GQA) is 0.03 nats from the same attention trained from scratch, MLA 0.04, MFA 0.07,
# MFA-KR 0.2: the fewer the numbers that a token keeps, the longer the way. Training from scratch is better for all four. Some of
# what is left is the further training's own: its rate climbs again, and MHA itself does not come back to where it was in 400
# steps. One seed, one rate.

# %% [markdown]
# ## The same from the command line
#
#     python experiments/convert.py --checkpoint out/tiny-mha/best.pt --to mfa --out out/converted
#     python train.py --init_from out/converted/best.pt --out out/converted-mfa --max_iters 200 --learning_rate 3e-4
#
# The FFN is copied, so a converted model does not have MHA's number of parameters, as models trained here do.
#
# ## Exercises
#
# **1 (easy).** A model of 32 layers has 32 heads of width 128, 16 bits a number. It becomes an MLA with a joint latent of 512 and
# a rotary key of 64. What share of its cache is left?

# %%
share = ...

# %%
check(1, share)

# %% [markdown]
# **2 (medium).** A head looks at itself and the seven positions before it, equally often. How large is the mean of $e^{i\omega
# D}$ for $\omega = 1$, $0.1$ and $0.01$? A list of three sizes.

# %%
sizes = ...

# %%
check(2, sizes)

# %% [markdown]
# **3 (hard).** `K[c]` is the key of head $c$ for one frequency, as complex numbers, $(n, H)$. Give the nearest $p_c\, \sigma$,
# $(n, H)$: what heads can share of a key that turns. (`torch.linalg.svd` takes complex matrices.)

# %%
number = torch.arange(4 * 6.0).view(4, 6)
K = torch.polar(1 + number % 3, number**2)


def shared(K):
    """The nearest matrix of complex rank 1: (n, H) -> (n, H)."""
    return ...


# %%
check(3, ... if shared(K) is ... else torch.view_as_real(shared(K)))

# %% [markdown]
# Worked solutions: [solutions/08_convert_solutions.ipynb](solutions/08_convert_solutions.ipynb).
