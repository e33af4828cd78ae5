"""experiments/convert.py and paper/truncation.py: what is exact, what a cut loses, and that a converted checkpoint is one."""

import math

import pytest
import torch
from attentions import difference, randomized, tokens
from runs import FLAGS, command, rows, text
from torch import Tensor

import sample
import train as trainer
from experiments import convert as converter
from experiments.convert import Args, choose_ladder, convert, target
from experiments.paper.containment import stack
from experiments.paper.truncation import Layer, Seen, low_rank, see
from experiments.study import conversion, plot
from mfa import ATTENTION, GPT, Config, cache_bytes, rotate
from support.run_folder import load_checkpoint, model_from
from train import Train, defaults

SIZES = dict(vocab_size=31, block_size=24, n_layer=2, dim=24, n_head=4, head_dim=4, rope_dim=4, n_kv_head=2, ffn_dim=24)
SOURCES = dict(mha=4, gqa=2, mqa=1)  # with their heads of keys


def model_of(attn: str, pos: str, **fields) -> GPT:
    return randomized(GPT(Config(**{**SIZES, "attn": attn, "pos": pos, **fields}))).eval()


def seen_by(model: GPT) -> list[Seen]:
    return see(model, tokens(model.cfg, B=4, T=24))


def loss_of(model: GPT, other: GPT) -> float:
    """How far the logits of the two are apart."""
    idx = tokens(model.cfg)
    return difference(other(idx)[0], model(idx)[0])


# --------------------------------------------------------------------------------------------------
# What is exact

WIDE = [
    ("gqa", lambda g: dict(n_kv_head=g)),
    ("mla", lambda g: dict(latent_dim=4 * g)),
    ("mla", lambda g: dict(latent_dim=min(24, 8 * g), joint_kv=True)),
    ("mfa", lambda g: dict(latent_dim=4 * g)),
    ("mfa", lambda g: dict(latent_dim=4 * g + 5)),  # wider than the keys
    ("mfa_kr", lambda g: dict(latent_dim=min(24, 8 * g))),
]


@pytest.mark.parametrize("looked", [False, True])
@pytest.mark.parametrize("pos", ["none", "alibi"])
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(("attn", "widths"), WIDE)
def test_without_rotation_a_latent_as_wide_as_all_keys_loses_nothing(attn, widths, source, pos, looked):
    model = model_of(source, pos)
    cfg = target(model.cfg, attn, **widths(SOURCES[source]))
    assert loss_of(model, convert(model, cfg, seen_by(model) if looked else None)) < 1e-10


def test_one_number_less_and_something_is_lost():
    model = model_of("gqa", "none")
    assert loss_of(model, convert(model, target(model.cfg, "mla", latent_dim=7))) > 1e-4


def test_with_rotation_as_many_heads_lose_nothing_and_one_head_is_an_mfa_that_turns_as_a_whole():
    for source, g in SOURCES.items():
        model = model_of(source, "rope")
        assert loss_of(model, convert(model, target(model.cfg, "gqa", n_kv_head=g, rope_fraction=1.0))) < 1e-10
    model = model_of("mqa", "rope")
    assert loss_of(model, convert(model, target(model.cfg, "mfa", latent_dim=4, rope_fraction=1.0))) < 1e-10
    kr = target(model.cfg, "mfa_kr", latent_dim=8, rope_fraction=0.5, key_reuse_rope="pre")
    assert loss_of(model, convert(model, kr)) < 1e-10


def test_heads_whose_keys_differ_by_a_turn_and_a_factor_of_each_frequency_are_one_head():
    """Complex numbers commute with the rotation, so these need no mean: MQA is exact, and so is MFA."""
    model = model_of("mha", "rope")
    for block in model.blocks:
        attn = block.attn
        shared = torch.complex(*torch.randn(2, 1, 24, 2, dtype=torch.float64))  # (1, H, frequencies)
        factor = torch.complex(*torch.randn(2, 4, 1, 2, dtype=torch.float64))  # of each head
        k = shared * factor  # (n, H, frequencies)
        values = torch.randn(24, 4, dtype=torch.float64) @ torch.randn(4, 4, 4, dtype=torch.float64)  # (n, H, d)
        attn.k.weight.data = stack(torch.cat((k.real, k.imag), dim=-1))
        attn.v.weight.data = stack(values)
    for attn, fields in (("mqa", {}), ("mfa", dict(latent_dim=4))):
        assert loss_of(model, convert(model, target(model.cfg, attn, rope_fraction=1.0, **fields))) < 1e-10
        assert loss_of(model, convert(model, target(model.cfg, attn, rope_fraction=0.5, **fields))) > 1e-4


def test_further_heads_and_a_wider_query_change_nothing_and_learn():
    model = model_of("mha", "none")
    cfg = target(model.cfg, "mfa", latent_dim=20, n_head=7, q_rank=30)
    new = convert(model, cfg)
    assert loss_of(model, new) < 1e-10
    idx = tokens(model.cfg)
    new(idx[:, :-1], idx[:, 1:])[1].backward()
    attn = new.blocks[0].attn
    assert attn.o.weight.grad[:, 4 * 20 :].norm() > 0, "what further heads write"
    assert attn.q.weight.grad.unflatten(0, (7, 20))[:4, 16:].norm() > 0, "queries for the spare width"


# --------------------------------------------------------------------------------------------------
# What a cut loses


def random_spd(*shape: int) -> Tensor:
    A = torch.randn(*shape, shape[-1], dtype=torch.float64)
    return A @ A.mT


@pytest.mark.parametrize("rank", [0, 1, 5, 9, 12])
def test_a_cut_loses_the_singular_values_that_it_leaves_out(rank):
    torch.manual_seed(rank)
    B, grams, X = torch.randn(3, 10, 4, dtype=torch.float64), random_spd(3, 4), random_spd(10)
    S, P, size = low_rank(B, grams, X, rank)
    G = torch.linalg.cholesky(grams)
    error = (X @ (B - S @ P) @ G).square().sum()
    assert S.shape == (10, rank) and P.shape == (3, rank, 4)
    assert error.item() == pytest.approx(size[rank:].square().sum().item(), rel=1e-9, abs=1e-9)
    if 0 < rank < 10:
        plain = low_rank(B, torch.eye(4).expand(3, 4, 4).double(), torch.eye(10).double(), rank)
        assert error < (X @ (B - plain[0] @ plain[1]) @ G).square().sum(), "another measure's cut is worse in this one"


def test_the_squared_error_of_all_scores_is_what_is_left_out():
    """Of x with the covariance seen, each head's weighed by the size of what it writes."""
    model = model_of("mha", "none")
    old, seen = model.blocks[0].attn, seen_by(model)[0]
    layer = Layer(old, seen)
    new = layer.convert(target(model.cfg, "mfa", latent_dim=6), 0, [])
    root = torch.linalg.cholesky(seen.covariance + 1e-12 * torch.eye(24)).mT
    W, W_new = old.scale * old.qk_circuit(), new.scale * new.qk_circuit()
    written = (root @ old.vo_circuit()).square().sum((1, 2))  # (n,)
    error = ((root @ (W - W_new) @ root.mT).square().sum((1, 2)) * written).sum()
    size = low_rank(layer.K, layer.query_gram, layer.X, 6)[2]
    assert error.item() == pytest.approx(size[6:].square().sum().item(), rel=1e-6)


def test_the_error_falls_as_the_latent_grows():
    model = model_of("mha", "none")
    seen = seen_by(model)
    for attn, fields in (("mla", dict(joint_kv=True)), ("mfa_kr", {}), ("mla", {})):
        errors = [loss_of(model, convert(model, target(model.cfg, attn, latent_dim=C, **fields), seen)) for C in (4, 12, 24)]
        assert errors[0] > errors[1] > errors[2]


# --------------------------------------------------------------------------------------------------
# Rotary positions


def test_the_ladder_keeps_the_frequencies_that_gain_most():
    assert choose_ladder([5.0, 4, 1, 1], 2) == 1
    assert choose_ladder([5.0, 1, 4, 1], 2) == 2
    assert choose_ladder([5.0, 1, 1, 9, 9], 2) == 3, "the first of two that are equal, within reach"
    assert choose_ladder([1.0, 0, 9], 3) == 1 and choose_ladder([1.0], 1) == 1


@pytest.mark.parametrize("k", [1, 2, 3])
def test_the_base_of_a_ladder_gives_every_kth_frequency_of_the_source(k, monkeypatch):
    monkeypatch.setattr(converter, "choose_ladder", lambda *_: k)
    model = model_of("mqa", "rope", head_dim=12)
    cfg = convert(model, target(model.cfg, "mla", latent_dim=4, rope_dim=4)).cfg
    of = [base ** (-torch.arange(0, w, 2) / w) for base, w in ((500_000.0, 12), (cfg.rope_base, 4))]
    assert torch.allclose(of[1], of[0][::k][:2], rtol=1e-6)


@pytest.mark.parametrize("attn", ["mla", "mfa", "mqa", "gqa"])
def test_what_goes_on_turning_is_exact_and_the_rest_is_its_mean(attn):
    """One head of keys, so that nothing else is lost: W(distance) of the new layer, written down by hand."""
    model = model_of("mqa", "rope", head_dim=8)
    fields = dict(mla=dict(latent_dim=8, rope_dim=4), gqa=dict(n_kv_head=1), mfa=dict(latent_dim=8)).get(attn, {})
    new = convert(model, target(model.cfg, attn, **fields))
    old = model.blocks[1].attn
    k = round(math.log(new.cfg.rope_base) / math.log(500_000.0) * 4 / 2)
    turning = [0, k]
    Q, K = old.q.weight.unflatten(0, (4, 8)).mT, old.k.weight.mT  # (n, H, d), (H, d)
    seen = torch.tensor([[1 / (i + 1) if j <= i else 0 for j in range(24)] for i in range(24)], dtype=torch.float64) / 24
    eye = torch.eye(8, dtype=torch.float64)
    turns = [rotate(eye, torch.full((8,), t), 500_000.0) for t in range(24)]
    mean = sum(seen[i, i - t] * turns[t] for i in range(24) for t in range(i + 1))
    for distance in (0, 1, 7, 20):
        R = mean.clone()
        for f in turning:
            R[[f, f + 4]] = turns[distance][[f, f + 4]]
        W = Q @ R @ K.mT * old.scale
        layer = new.blocks[1].attn
        assert difference(layer.qk_circuit(distance) * layer.scale, W) < 1e-10


def test_the_distances_that_a_head_looks_at_are_weighed():
    """A head that looks at its own position alone needs no rotation: nothing is lost by stopping it."""
    model = model_of("mqa", "rope")
    seen = seen_by(model)
    here = torch.zeros(4, 24)
    here[:, 0] = 1
    for layer, block in zip(seen, model.blocks, strict=True):
        cut = Layer(block.attn, Seen(layer.covariance, here))
        assert difference(cut.mean_turn, torch.eye(4).double().expand(4, 4, 4)) < 1e-12
        assert max(abs(cut.share_pair(slice(None), f)[2]) for f in (0, 1)) < 1e-9


def test_see_measures_covariance_and_distances_and_leaves_no_hook():
    for source in SOURCES:
        model = model_of(source, "rope")
        idx = tokens(model.cfg, B=3, T=11)
        found = see(model, idx)
        attn, x = model.blocks[0].attn, model.blocks[0].attn_norm(model.embed(idx))
        assert difference(found[0].covariance, torch.einsum("bth,btk->hk", x, x) / 33) < 1e-12
        share = torch.zeros(4, 24)
        for i in range(11):
            scores = [torch.einsum("bh,nhk,bk->bn", x[:, i], attn.qk_circuit(i - j), x[:, j]) for j in range(i + 1)]
            p = (attn.scale * torch.stack(scores, dim=-1)).softmax(-1).mean(0)  # (n, i + 1)
            for j in range(i + 1):
                share[:, i - j] += p[:, j].detach() / 11
        assert torch.allclose(found[0].distances, share, atol=1e-6)
        assert torch.allclose(found[1].distances.sum(1), torch.ones(4), atol=1e-5)
        assert not any(block.attn._forward_pre_hooks for block in model.blocks)


@pytest.mark.parametrize("reading", ["pre", "post", "inverse"])
def test_key_reuse_under_rotation_in_all_three_readings(reading):
    model = model_of("mqa", "rope", head_dim=8)
    seen = seen_by(model)
    errors = [
        loss_of(model, convert(model, target(model.cfg, "mfa_kr", latent_dim=C, rope_fraction=4 / C, key_reuse_rope=reading), seen))
        for C in (8, 20)
    ]
    exact = convert(model, target(model.cfg, "mfa", latent_dim=8, rope_fraction=0.5), seen)
    assert errors[0] > errors[1] and errors[1] == pytest.approx(loss_of(model, exact), rel=1e-6)


# --------------------------------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize(
    ("source", "attn", "fields", "says"),
    [
        (dict(attn="mfa", latent_dim=4), "mla", {}, "only mha, gqa and mqa are converted, not mfa"),
        (dict(attn="mha", qk_norm=True), "mla", {}, "qk_norm is no product of matrices"),
        (dict(attn="mha"), "fpba", {}, "must become one of gqa, mqa, mla, mfa, mfa_kr, not fpba"),
        (dict(attn="mha"), "gqa", dict(n_kv_head=3), "multiple of n_kv_head 3"),
        (dict(attn="gqa"), "gqa", dict(n_kv_head=4), "n_kv_head must divide the checkpoint's 2, not be 4"),
        (dict(attn="mha"), "mfa", dict(n_head=3, latent_dim=8), "n_head must be 4, as in the checkpoint, or more, not 3"),
        (dict(attn="mha", pos="alibi"), "mfa", dict(n_head=8), "n_head must be 4, as in the checkpoint, not 8"),
        (dict(attn="mha"), "mla", dict(rope_dim=8), "rope_dim rotates 8 dimensions, and the checkpoint rotates 4"),
        (dict(attn="mha"), "mfa", dict(latent_dim=8, rope_fraction=1.0), "rope_fraction rotates 8 dimensions"),
    ],
)
def test_what_cannot_be_converted_is_said(source, attn, fields, says):
    with pytest.raises(ValueError, match=says):
        target(Config(**{**SIZES, **source}), attn, **fields)


# --------------------------------------------------------------------------------------------------
# Checkpoints


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """best.pt of a small MHA."""
    out = tmp_path_factory.mktemp("origin") / "mha"
    flags = [flag for flag in FLAGS if "vocab_size" not in flag]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.Progress, "plot", lambda *_: None)
        patch.setattr(trainer.Progress, "finish", lambda *_: None)
        assert command(trainer.main, Train, [*flags, "--attn=mha", f"--out={out}", *text(data)], defaults) == 0
    return out / "best.pt"


def call(trained, out, *flags) -> int:
    return command(converter.main, Args, [f"--checkpoint={trained}", f"--out={out}", *flags])


@pytest.mark.parametrize("attn", converter.TARGETS)
def test_a_converted_checkpoint_is_trained_further_and_writes(attn, trained, data, tmp_path, capsys, no_ceremony):
    assert call(trained, tmp_path / "new", f"--to={attn}") == 0
    printed = capsys.readouterr().out
    best = tmp_path / "new" / "best.pt"
    before, after = load_checkpoint(trained), load_checkpoint(best)
    model = model_from(after, best, torch.device("cpu"))
    assert f"-> {cache_bytes(model.cfg):,} bytes per token" in printed and f"-> {after['best_loss']:.4f} nats" in printed
    assert model.cfg.attn == attn and cache_bytes(model.cfg) < cache_bytes(model_from(before, trained, "cpu").cfg)
    kept = [name for name in before["model"] if ".attn." not in name]
    assert kept and all(torch.equal(before["model"][name], after["model"][name]) for name in kept)
    further = [f"--init_from={best}", f"--out={tmp_path / 'further'}", *text(data), "--device=cpu"]
    recipe = "--max_iters=4 --batch_size=4 --warmup_iters=1 --eval_interval=4 --learning_rate=1e-4".split()
    assert command(trainer.main, Train, further + recipe, defaults) == 0
    found = rows(tmp_path / "further")[-1]["val_loss"]
    assert found == pytest.approx(after["best_loss"], abs=0.05), "it goes on from there"
    assert command(sample.main, sample.Sample, [f"--checkpoint={best}", "--max_new_tokens=5", "--device=cpu"]) == 0


def test_a_conversion_is_the_same_each_time_and_looking_at_its_text_matters(trained, tmp_path):
    losses = {}
    for name, flags in (("a", []), ("b", []), ("unseen", ["--look_at=0"])):
        assert call(trained, tmp_path / name, "--to=mfa_kr", *flags) == 0
        losses[name] = load_checkpoint(tmp_path / name / "best.pt")
    assert all(torch.equal(p, losses["b"]["model"][name]) for name, p in losses["a"]["model"].items())
    assert losses["unseen"]["best_loss"] != losses["a"]["best_loss"]


def test_where_its_text_is_gone_the_weights_alone_must_do(trained, tmp_path, capsys):
    ckpt = torch.load(trained, weights_only=True)
    ckpt["args"]["data_dir"] = str(tmp_path / "gone")
    torch.save(ckpt, tmp_path / "best.pt")
    assert call(tmp_path / "best.pt", tmp_path / "new", "--to=mla") == 0
    assert "unseen, as its text is not there" in capsys.readouterr().out
    assert load_checkpoint(tmp_path / "new" / "best.pt")["best_loss"] == math.inf


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--to=gqa", "--n_kv_head=3"], "error: --to gqa: n_head 4 must be a multiple of n_kv_head 3"),
        (["--to=mfa", "--n_head=2"], "error: --to mfa: n_head must be 4, as in the checkpoint, or more, not 2"),
        (["--to=mla", "--rope_dim=16"], "error: --to mla: rope_dim rotates 16 dimensions"),
        (["--to=mha"], "invalid choice"),
    ],
)
def test_bad_flags_are_one_line_and_nothing_is_written(flags, says, trained, tmp_path, capsys):
    assert call(trained, tmp_path / "new", *flags) == 2
    err = capsys.readouterr().err
    assert says in err and err.count("\n") == 1 and not (tmp_path / "new").exists()


def test_bad_files_are_one_line(trained, tmp_path, capsys):
    for checkpoint, out, says in (
        (tmp_path / "none.pt", tmp_path / "new", "is not there"),
        (trained, trained.parent, "holds a run: give a new folder"),
    ):
        assert call(checkpoint, out, "--to=mfa") == 2
        err = capsys.readouterr().err
        assert says in err and err.count("\n") == 1


# --------------------------------------------------------------------------------------------------
# The study


def test_the_study_converts_trains_and_goes_on_where_it_stopped(folder, tmp_path, monkeypatch, capsys):
    some = {name: conversion.TARGETS[name] for name in ("mha", "mfa_kr")}
    monkeypatch.setattr(conversion, "TARGETS", some)
    flags = ["--smoke", "--device=cpu", f"--data_dir={folder.parent}"]
    flags += [f"--base={tmp_path / 'base.pt'}", f"--results={tmp_path / 'rows.jsonl'}"]
    assert command(conversion.main, conversion.Args, flags) == 0
    found = conversion.read_results(tmp_path / "rows.jsonl")
    assert sorted((row["target"], row["steps"]) for row in found) == sorted((t, n) for t in some for n in (0, 1, 3, 10))
    losses = {(row["target"], row["steps"]): row["val_loss"] for row in found}
    assert {row["base_loss"] for row in found} == {losses["mha", 0]} and losses["mha", 10] < losses["mha", 0]
    assert losses["mha", 0] < losses["mfa_kr", 0] and losses["mfa_kr", 10] < losses["mfa_kr", 0]
    assert all(row["commit"] and row["cache_share"] == (1 if row["target"] == "mha" else 1 / 16) for row in found)
    kept = (tmp_path / "rows.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "rows.jsonl").write_text("".join(kept[:-1]), encoding="utf-8")
    assert command(conversion.main, conversion.Args, flags) == 0
    again = conversion.read_results(tmp_path / "rows.jsonl")
    assert len(again) == 8 and again[-1] == found[-1] | dict(seconds=again[-1]["seconds"])
    capsys.readouterr()
    torch.save(torch.load(tmp_path / "base.pt") | dict(run="another"), tmp_path / "base.pt")
    assert command(conversion.main, conversion.Args, flags) == 2
    assert "is of another run: remove it" in capsys.readouterr().err


def test_every_target_of_the_study_exists_at_full_size():
    base = conversion.run_for("modern", "mha", 1, 0)
    shares = {}
    for name, kind in conversion.TARGETS.items():
        if kind.attn != "mha":
            cfg = target(base.cfg, kind.attn, latent_dim=base.cfg.dim // kind.share, **kind.fields)
            shares[name] = cache_bytes(cfg) / cache_bytes(base.cfg)
            assert cfg.ffn_dim == base.cfg.ffn_dim and ATTENTION[cfg.attn].counts(cfg).heads >= 8
    assert shares["mfa_kr"] == 1 / 16 and shares["mfa"] == shares["mqa"] == 1 / 8 and shares["gqa2"] == 1 / 4


def test_the_table_has_the_best_rate_of_each_length_and_the_loss_from_scratch(monkeypatch):
    base = dict(name="MQA", attn="mqa", params=3_000_000, cache_bytes=64, cache_share=0.125, base_steps=100, target="mqa")
    origin = dict(command="python experiments/study/conversion.py", commit="abcdefghij", device="x", versions=dict(torch="2"))
    made = [base | origin | dict(steps=n, rate=r, val_loss=loss) for n, r, loss in ((0, 0, 5.0), (1, 0.1, 4.0), (1, 0.3, 3.5))]
    results = plot.Results([])
    monkeypatch.setattr(results, "trained", lambda study, arm: [dict(val_loss=3.0), dict(val_loss=3.2)])
    (one,) = plot.converted(made, results)
    assert one.losses == {0: 5.0, 1: 3.5} and one.scratch == pytest.approx(3.1)
    cells = plot.conversion_part(made, results).splitlines()[2].split(" | ")
    assert cells == ["| MQA", "64", "12.50%", "3.00M", "148.41", "33.12", "22.20 |"]
    assert "x, torch 2, commit abcdefg." in plot.conversion_part(made, results)
    assert plot.conversion_part([], results) == "Not made yet."
    assert len(plot.conversion_plot(made, results).axes) == 1
