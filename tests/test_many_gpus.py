"""What experiments/probes/many_gpus.py does at toy size, two processes on a CPU."""

import json
import sys
from pathlib import Path

import pytest
from runs import command

from experiments.probes import many_gpus
from experiments.probes.many_gpus import Args, compared, main


def call(tmp_path, *flags) -> int:
    return command(main, Args, ["--smoke", f"--results={tmp_path / 'r.json'}", f"--data_dir={tmp_path}", *flags])


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="reads /proc")
def test_a_killed_process_is_replaced_and_the_run_ends_as_if_nothing_had_been(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["many_gpus.py", f"--results={tmp_path / 'r.json'}"])
    flags = "--processes=2 --parts killed --dataset=shakespeare --batch_size=4 --steps=400 --every=200".split()
    assert call(tmp_path, *flags, "--flags=--eval_tokens 640") == 0  # so many that the kill comes before the end
    (part,) = json.loads((tmp_path / "r.json").read_text()).values()
    figures = part["figures"]
    assert part["processes"] == 2 and part["commit"] and part["command"] == "python many_gpus.py --results=r.json"
    assert figures["killed_at"] == 300 and figures["resumed_at"] == [200]
    assert figures["largest_difference"] < 1e-6 and 1 < figures["val_loss"] < 5


def write(folder, losses: dict) -> None:
    folder.mkdir()
    lines = [json.dumps(dict(step=step, val_loss=loss)) + "\n" for step, loss in losses.items()]
    (folder / "metrics.jsonl").write_text("".join(lines))


def test_the_difference_is_told_at_the_end_and_at_its_largest(tmp_path):
    write(tmp_path / "alone", {4: 3.0, 8: 2.0})
    write(tmp_path / "other", {4: 3.25, 8: 2.125})
    found = compared(tmp_path / "alone", tmp_path / "other", "resumed at step 6\n")
    assert (found["difference"], found["largest_difference"], found["resumed_at"]) == (0.125, 0.25, [6])
    write(tmp_path / "short", {4: 3.0})
    with pytest.raises(SystemExit, match=r"steps \[4\] were evaluated, not \[4, 8\]"):
        compared(tmp_path / "alone", tmp_path / "short", "")


def test_speed_is_told_beside_that_of_one_process(tmp_path, monkeypatch, capsys):
    def torchrun(bench, context):
        row = dict(tokens_per_s={1: 100.0, 2: 190.0}[bench.processes], matrix_flops=1.0, peak_bytes=0)
        bench.results.write_text(json.dumps(row | dict(pieces=bench.grad_accum, processes=bench.processes)))
        return True

    monkeypatch.setattr(many_gpus.sharding, "torchrun", torchrun)
    assert call(tmp_path, "--processes=2", "--parts", "speed") == 0
    one, two = json.loads((tmp_path / "r.json").read_text())["speed"]["figures"]
    assert (one["scaling"], two["scaling"]) == (1.0, 0.95)
    assert (one["pieces"], two["pieces"]) == (16, 8)  # 512 sequences in pieces of 32
    assert "| 2 | 190 | 95.0% | 0.0 |" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, says",
    [
        (["--processes=3"], "--processes 3: give a power of two"),
        (["--steps=10", "--every=9"], "--steps 10 must be at least twice --every 9"),
        (["--processes=8", "--batch_size=9"], "--batch_size 9 must be a multiple of 8"),
        (["--processes=4", "--batch_size=224"], "--batch_size 224 must be a multiple of 128"),
    ],
)
def test_what_does_not_fit_is_refused(flags, says, tmp_path, capsys):
    assert call(tmp_path, *flags) == 2 and says in capsys.readouterr().err
    assert not (tmp_path / "r.json").exists()
