"""What experiments/bench/sharding.py measures and keeps."""

import json

import pytest
from runs import command

from experiments.bench import sharding
from experiments.bench.sharding import Bench, main, operations, sizes
from mfa import Config, preset


def test_two_processes_on_a_cpu_leave_a_row_with_figures_and_their_origin(tmp_path, capsys):
    results = tmp_path / "sharding.jsonl"
    flags = ["--smoke", "--preset=paper-7b", "--shard", "--checkpoint_blocks", "--steps=1", "--contexts", 32, f"--results={results}"]
    assert command(main, Bench, flags) == 0
    (row,) = map(json.loads, results.read_text().splitlines())
    assert row["fits"] and row["shard"] and row["checkpoint_blocks"] and row["processes"] == 2 and row["context"] == 32
    assert row["tokens_per_s"] == pytest.approx(2 * 32 / row["ms"] * 1e3)
    _, of_weights, _ = operations(sizes(Bench("paper-7b", smoke=True), 32))
    assert row["share_of_rate"] == pytest.approx(row["tokens_per_s"] / 2 * of_weights / row["matrix_flops"])
    assert row["commit"] and row["versions"]["torch"] and str(tmp_path) not in row["command"]
    assert "| paper-7b, mfa | 2 | yes | yes | adamw, eager, random | 1 x 32 |" in capsys.readouterr().out


def test_a_text_in_pieces_tells_the_loss_of_every_step(tmp_path, data):
    results, folder = tmp_path / "sharding.jsonl", next(data.glob("*/meta.json")).parent
    flags = ["--smoke", "--processes=1", "--steps=8", "--grad_accum=2", "--sequences=4", "--learning_rate=1e-2", "--contexts", 32]
    assert command(main, Bench, [*flags, f"--text={folder}", f"--results={results}"]) == 0
    (row,) = map(json.loads, results.read_text().splitlines())
    assert row["tokens_per_s"] == pytest.approx(2 * 4 * 32 / row["ms"] * 1e3)
    assert (row["text"], row["learning_rate"], len(row["losses"])) == (folder.name, 0.01, 10)
    assert row["losses"][-1] < row["losses"][0] - 0.5  # of real text, which can be learnt


@pytest.mark.parametrize("text, says", [("none", "there is no such folder"), ("wide", "tokens in its vocabulary, the model 300")])
def test_a_text_that_does_not_fit_is_refused_before_anything_starts(text, says, tmp_path, capsys, monkeypatch):
    if text == "wide":
        monkeypatch.setattr(sharding, "load", lambda folder: (None, None, dict(vocab_size=301)))
    monkeypatch.setattr(sharding, "torchrun", None)
    assert command(main, Bench, ["--smoke", f"--text={tmp_path / text}", f"--results={tmp_path / 'r.jsonl'}"]) == 2
    assert says in capsys.readouterr().err


def test_the_longest_context_that_fits_is_looked_for(tmp_path, capsys, monkeypatch):
    tried, results = [], tmp_path / "sharding.jsonl"
    monkeypatch.setattr(sharding, "torchrun", lambda args, context: tried.append(context))
    assert command(main, Bench, ["--smoke", "--contexts", 64, 32, f"--results={results}"]) == 0
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    assert tried == [64, 32] and [(row["context"], row["fits"]) for row in rows] == [(64, False), (32, False)]
    assert "64: out of memory\n" in capsys.readouterr().out


def test_table_7_s_activated_parameters_are_counted():
    cfg = preset("paper-7b", "mfa")
    weights, of_weights, of_attention = operations(cfg)
    assert weights - cfg.vocab_size * cfg.dim == pytest.approx(1.18e9, rel=0.01)
    assert of_weights == 6 * weights
    assert of_attention == 3 * 24 * 18 * 512 * 16384
    dense = Config(attn="mha", dim=64, head_dim=16, n_layer=1, ffn_dim=100, vocab_size=10)
    assert operations(dense)[0] == 4 * 64 * 64 + 3 * 64 * 100 + 10 * 64


def test_more_processes_than_gpus_are_refused(tmp_path, capsys):
    assert command(main, Bench, ["--processes=99", f"--results={tmp_path / 'r.jsonl'}"]) == 2
    assert "--processes 99: this machine has" in capsys.readouterr().err
