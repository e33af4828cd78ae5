"""experiments/probes/copying.py: its task, and the step at which a model is found to copy."""

import torch
from runs import command

from experiments.probes import copying
from experiments.study import plot
from mfa import GPT
from train import count_params


def test_every_target_of_the_copying_task_was_seen_before():
    tokens, targets = copying.batch(torch.Generator().manual_seed(0))
    for sequence, target in zip(tokens.tolist(), targets.tolist(), strict=True):
        new = target.count(-1)  # the first of these are the rest of the block
        assert (
            all(t == -1 for t in target[:new])
            and copying.PERIODS[0] <= new + 1 < copying.PERIODS[1]
        )
        assert target[new:] == sequence[: len(sequence) - new]


def test_models_of_the_copying_task_have_equal_parameters():
    counts = [count_params(copying.config(arm)) for arm in copying.ARMS]
    assert max(counts) / min(counts) < 1.02


def test_a_model_that_copies_is_found_and_one_that_guesses_is_not(monkeypatch):
    class Known(GPT):  # the loss is whatever `losses` says
        def forward(self, tokens, targets):
            return None, next(losses) + 0 * self.embed.weight.sum()

    monkeypatch.setattr(copying, "GPT", Known)
    losses = iter([4.0] * 100 + [0.0] * 100)
    found = copying.train_run("mha", 0, 200)
    # the mean is 4.0 by then, and below ln(64) / 2 = 2.08 after seven zeros: 4.0 * 0.9^6 = 2.13, 4.0 * 0.9^7 = 1.91
    assert found["step"] == 107 and found["curve"][-1][0] == 107
    losses = iter([4.0] * 30)
    assert copying.train_run("mha", 0, 30)["step"] is None


def test_copying_goes_on_where_it_stopped(tmp_path, capsys):
    flags = [f"--results={tmp_path / 'copying.jsonl'}", "--jobs=2", "--steps=2"]
    assert command(copying.main, copying.Args, [*flags, "--seeds=1"]) == 0
    first = (tmp_path / "copying.jsonl").read_bytes()
    n = len(copying.ARMS)
    assert (
        f"{n} runs to make, 0 are made" in capsys.readouterr().out and len(first.splitlines()) == n
    )
    assert command(copying.main, copying.Args, [*flags, "--seeds=1"]) == 0
    assert (
        f"0 runs to make, {n} are made" in capsys.readouterr().out
        and (tmp_path / "copying.jsonl").read_bytes() == first
    )
    rows = copying.read(tmp_path / "copying.jsonl")
    assert "| > 2 | > 2 |" in plot.copying_part(rows) and len(plot.copying_plot(rows).axes) == 1
    assert command(copying.main, copying.Args, [*flags, "--seeds=0"]) == 2
    assert "--seeds must be at least 1, not 0" in capsys.readouterr().err
