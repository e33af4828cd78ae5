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
    assert "| paper-7b, mfa | 2 | yes | yes | 1 x 32 |" in capsys.readouterr().out


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
