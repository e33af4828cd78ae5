"""Runs side by side: what the table and the picture say, and what no neighbour can break."""

import json
import os
import re
from pathlib import Path

import pytest
import torch
from runs import ROOT, command, small

from mfa import ATTENTION, GPT, Config
from prepare_data import prepare
from support import compare
from support.cli import BadInput
from support.compare import Compare, read_run, spread
from support.plugins import load_plugin
from support.run_folder import load_checkpoint
from train import train

pytestmark = pytest.mark.usefixtures("no_ceremony")


@pytest.fixture(scope="module")
def made(data, tmp_path_factory) -> Path:
    """An out/ with three finished runs on one text."""
    out = tmp_path_factory.mktemp("made") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("support.progress.Progress.plot", lambda *_: None)
        patch.setattr("support.progress.Progress.finish", lambda *_: None)
        for attn in ("mha", "mfa", "mfa_kr"):
            train(small(data, out / attn, attn))
    return out


@pytest.fixture
def out(made, tmp_path) -> Path:
    """The same, to spoil."""
    for path in made.glob("*/*"):
        copy = tmp_path / "out" / path.relative_to(made)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    return tmp_path / "out"


def on_another_text(folder: Path, tmp_path: Path, data: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "story.txt").write_text((data / "play.txt").read_text(encoding="utf-8")[5000:], encoding="utf-8")
    prepare(file=str(other / "story.txt"), data_dir=other)
    train(small(other, folder, file=str(other / "story.txt")))


def rewritten(path: Path, **changes) -> None:
    ckpt = load_checkpoint(path) | changes
    torch.save({k: v for k, v in ckpt.items() if v is not None}, path)


def table_of(printed: str) -> dict[str, list[str]]:
    """The rows of a printed table, by run."""
    lines = [re.split(r"  +", line) for line in printed.splitlines()]
    return {line[0]: line[1:] for line in lines if len(line) >= 7}


# At a run's end


def test_a_run_with_a_neighbour_on_its_text_ends_with_a_table_and_a_picture(data, tmp_path, capsys):
    first = train(small(data, tmp_path / "one", "mha"))
    assert "best first" not in capsys.readouterr().out and not (tmp_path / "compare.png").exists()
    second = train(small(data, tmp_path / "two", "mfa", seed=7))
    printed = capsys.readouterr().out
    rows = table_of(printed)
    for name, attention, cache, result in (("one", "MHA", "128 B", first), ("two", "MFA", "16 B", second)):
        minutes = f"{result['seconds'] / 60:.1f}"
        loss, params = f"{result['best_loss']:.4f}", f"{result['params']:,}"
        assert rows[name] == [attention, cache, params, loss, "20", minutes]
    better, worse = sorted(("one", "two"), key=lambda name: float(rows[name][3]))
    assert printed.index(f"\n{better} ") < printed.index(f"\n{worse} ")
    assert "they differ in --seed as well" in printed
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")


def test_no_neighbour_can_break_a_finished_run(out, data, tmp_path, capsys):
    on_another_text(out / "story", tmp_path, data)
    for name in ("empty", "cut", "odd", "torn", "young"):
        (out / name).mkdir()
        for file in ("best.pt", "metrics.jsonl"):
            (out / name / file).write_bytes((out / "mha" / file).read_bytes())
    for file in ("best.pt", "metrics.jsonl"):
        (out / "empty" / file).unlink()
    (out / "cut" / "best.pt").write_bytes((out / "mha" / "best.pt").read_bytes()[:3000])
    rewritten(out / "odd" / "best.pt", config=dict(attn=3), counted=None)
    (out / "torn" / "metrics.jsonl").write_text("[1]\nnot json\n")
    (out / "young" / "best.pt").unlink()
    capsys.readouterr()
    assert train(small(data, out / "mine", "mqa"))["step"] == 20
    printed = capsys.readouterr().out
    assert set(table_of(printed)) == {"run", "mha", "mfa", "mfa_kr", "mine"}
    told = printed[printed.index("not compared: ") :]
    for name in ("cut", "odd", "torn", "young", "story"):
        assert name in told, name
    assert "and 1 more" in told  # five are named


def test_a_picture_that_cannot_be_written_leaves_the_run_finished(out, data, capsys):
    (out / "compare.png").mkdir()
    assert train(small(data, out / "mine", "mqa"))["step"] == 20
    printed = capsys.readouterr().out
    assert "not compared with its neighbours: " in printed and "compare.png" in printed


def test_a_stopped_neighbour_says_how_far_it_came(out, capsys):
    rows = (out / "mha" / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    to_10 = [row for row in rows if json.loads(row)["step"] <= 10]
    (out / "mha" / "metrics.jsonl").write_text("".join(to_10) + '{"step": 11, "tra')  # killed
    assert command(compare.main, Compare, [out]) == 0
    assert table_of(capsys.readouterr().out)["mha"][4] == "10 of 20"


# At any time


@pytest.mark.parametrize("given", ["out", "out/*", "out/m??", "out/mha/best.pt", "./out/mha/"])
def test_folders_patterns_and_files_name_runs(made, given, monkeypatch, capsys):
    monkeypatch.chdir(made.parent)
    (made / "notes.txt").write_text("not a run")
    assert command(compare.main, Compare, [given]) == 0
    printed = capsys.readouterr().out
    runs = {"out": 3, "out/*": 3, "out/m??": 2}.get(given, 1)
    assert len(table_of(printed)) == 1 + runs
    assert f"drawn: {Path('out') / 'compare.png'}" in printed and (made / "compare.png").exists()


def test_different_texts_are_refused_by_one_line_that_names_both(out, data, tmp_path, capsys):
    on_another_text(out / "story", tmp_path, data)
    capsys.readouterr()
    assert command(compare.main, Compare, [out / "mha", out / "story"]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1
    sums = [load_checkpoint(out / name / "best.pt")["data"]["sources"][0]["sha256"] for name in ("mha", "story")]
    for part in (out / "mha", out / "story", "play.txt", "story.txt", sums[0][:8], sums[1][:8]):
        assert str(part) in printed.err


def test_the_same_text_under_another_name_is_compared(made, data, tmp_path, capsys):
    other = tmp_path / "other"
    other.mkdir()
    (other / "same.txt").write_bytes((data / "play.txt").read_bytes())
    train(small(other, tmp_path / "run", file=str(other / "same.txt")))
    assert command(compare.main, Compare, [made / "mha", tmp_path / "run", f"--picture={tmp_path / 'both.png'}"]) == 0
    assert "same.txt" not in capsys.readouterr().err and (tmp_path / "both.png").exists()


@pytest.mark.parametrize("given", ["nowhere", "empty", "no*such"])
def test_without_a_run_there_is_nothing_to_show(given, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    assert command(compare.main, Compare, [given]) == 2
    assert capsys.readouterr().err.startswith("error: ")


# The figures


@pytest.mark.parametrize("attn", ["mha", "mfa", "mfa_kr"])
@pytest.mark.parametrize("older", [False, True], ids=["today", "of an older train.py"])
def test_figures_are_the_model_s_own(out, attn, older):
    best = out / attn / "best.pt"
    if older:
        rewritten(best, counted=None)
    run, cfg = read_run(out / attn), Config(**load_checkpoint(best)["config"])
    assert run.params == sum(p.numel() for p in GPT(cfg).parameters()) and cfg.tied
    assert run.cache == 2 * cfg.n_layer * ATTENTION[attn].counts(cfg).kv_cache
    assert run.best_loss == min(loss for _, loss in run.curve)
    assert [step for step, _ in run.curve] == [10, 20] and run.step == run.max_iters == 20


def test_the_optimizer_is_said_where_it_differs(out, data, capsys):
    assert command(compare.main, Compare, [out]) == 0
    assert "optimizer" not in table_of(capsys.readouterr().out)["run"]
    train(small(data, out / "muon", optimizer="muon"))
    rows = table_of(capsys.readouterr().out)
    assert rows["run"][1] == "optimizer" and rows["muon"][1] == "muon" and rows["mfa"][1] == "adamw"


def test_a_plug_in_is_shown_and_none_of_it_is_run(out, data, monkeypatch, capsys):
    before = dict(ATTENTION)
    load_plugin(ROOT / "examples" / "my_attention.py")
    try:
        train(small(data, out / "mine", "tied2", plugin=ROOT / "examples" / "my_attention.py"))
    finally:
        ATTENTION.clear()
        ATTENTION.update(before)
    (out / "mine" / "my_attention.py").write_text("raise AssertionError('it was run')")
    capsys.readouterr()
    assert command(compare.main, Compare, [out]) == 0
    assert table_of(capsys.readouterr().out)["mine"][:2] == ["tied2", f"{read_run(out / 'mine').cache} B"]
    rewritten(out / "mine" / "best.pt", counted=None)  # of a train.py that did not keep them
    assert command(compare.main, Compare, [out]) == 0
    printed = capsys.readouterr().out
    assert table_of(printed)["mine"][1] == "?" and "?: of an older run of a plug-in" in printed


def test_weights_are_not_read(out, monkeypatch):
    seen = {}
    load = torch.load
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: seen.update(kwargs) or load(*args, **kwargs))
    read_run(out / "mha")
    assert seen["mmap"] and seen["weights_only"]


@pytest.mark.parametrize("values", [[1.0], [1.0, 1.0, 1.0], [3.0, 1.0, 1.05, 1.1, 2.95], [0.0, 0.2, 0.1, 0.35]])
def test_labels_keep_their_order_and_their_distance(values):
    places = spread(values, gap=0.1)
    order = sorted(range(len(values)), key=lambda i: values[i])
    sorted_places = [places[i] for i in order]
    assert all(b - a >= 0.1 - 1e-9 for a, b in zip(sorted_places, sorted_places[1:], strict=False))
    assert abs(sum(places) - sum(values)) < 1e-9  # they are moved no further than they must


def test_a_run_that_diverged_or_was_never_evaluated_is_no_run_to_show(out):
    rewritten(out / "mha" / "best.pt", best_loss=float("inf"))
    (out / "mfa" / "metrics.jsonl").write_text('{"step": 1, "train_loss": 4.0, "seconds": 0.1}\n')
    os.remove(out / "mfa_kr" / "best.pt")
    for name in ("mha", "mfa", "mfa_kr"):
        with pytest.raises(BadInput, match=name):
            read_run(out / name)
