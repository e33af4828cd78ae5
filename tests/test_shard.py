"""What --shard and --checkpoint_blocks promise, one statement of fact a test. Two processes talk through gloo on a CPU."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from runs import ROOT, rows, small, state

import train as trainer
from mfa import GPT, MFA, Config
from support.cli import BadInput
from support.machine import Machine
from support.progress import Progress
from train import train

# Trains case after case in processes that meet once.
SCRIPT = """
import json, signal, sys
from pathlib import Path
import torch.distributed as dist
import train
from runs import small
from support.machine import leave
from support.progress import Progress

Progress.finish = Progress.plot = lambda *_: None
dist.init_process_group("gloo")
dist.init_process_group = lambda *_, **__: None
dist.destroy_process_group = lambda: None
plain = train.learning_rate

def learning_rate(step, args):
    if dist.get_rank() == 1 and step + 1 == stop:
        signal.raise_signal(signal.SIGTERM)
    return plain(step, args)

train.learning_rate = learning_rate
for case in json.loads(sys.argv[2]):
    stop = case.pop("stop", None)
    train.train(small(Path(sys.argv[1]), Path(case.pop("out")), **case))
    dist.barrier()
leave(0)
"""
HOW = dict(max_iters=50, n_layer=2, eval_interval=25, log_interval=10)
CASES = {
    "adamw": dict(attn="mfa_kr"),
    "muon": dict(optimizer="muon_heads", grad_accum=2),
    "moe": dict(
        n_expert=5, n_expert_active=1, moe_ffn_dim=30, balance_coef=0.5, tied=False, match_params=False,
        max_iters=20, eval_interval=10,
    ),
}  # fmt: skip


def two_processes(data: Path, folder: Path, cases: list[dict]) -> None:
    script = folder / "script.py"
    script.write_text(SCRIPT, encoding="utf-8")
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [str(script), str(data), json.dumps(cases, default=str)]
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    """Every case not sharded, <name>; sharded over two, -two; that stopped and resumed, -stop; begun by one process,
    taken over by two that are sharded, by two that are not, and by one again, -parts."""
    folder = tmp_path_factory.mktemp("shard")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Progress, "plot", lambda *_: None)
        patch.setattr(Progress, "finish", lambda *_: None)
        plain, jobs = trainer.learning_rate, []
        for name, case in CASES.items():
            case = HOW | case
            sharded = case | dict(shard=True)
            jobs.append(sharded | dict(out=folder / f"{name}-two", checkpoint_blocks=name == "moe"))
            if name == "moe":  # the balance loss is of each process' own tokens: two, but not sharded
                jobs.append(case | dict(out=folder / name))
                continue
            train(small(data, folder / name, **case))
            patch.setattr(trainer, "learning_rate", lambda step, args: plain(step + stop(step), args))
            train(small(data, folder / f"{name}-parts", **case))
            patch.setattr(trainer, "learning_rate", plain)
            jobs += [
                sharded | dict(out=folder / f"{name}-stop", stop=17),
                sharded | dict(out=folder / f"{name}-stop", resume=True),
                sharded | dict(out=folder / f"{name}-parts", resume=True, stop=18),
                case | dict(out=folder / f"{name}-parts", resume=True, stop=28),
            ]
        two_processes(data, folder, jobs)
        for name in ("adamw", "muon"):
            train(small(data, folder / f"{name}-parts", **HOW, **CASES[name], resume=True))
    return folder


def stop(step: int, at: int = 8) -> int:
    """0; the run ends with step `at`."""
    if step + 1 == at:
        signal.raise_signal(signal.SIGTERM)
    return 0


@pytest.mark.parametrize("name", CASES)
def test_two_processes_that_share_a_model_out_give_the_losses_of_a_whole_one(name, runs):
    for one, two in zip(rows(runs / name), rows(runs / f"{name}-two"), strict=True):
        assert two == pytest.approx(one, abs=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_a_checkpoint_is_that_of_one_process_whole_under_plain_names(name, runs):
    one, two = (state(runs / f"{name}{of}" / "latest.pt") for of in ("", "-two"))
    assert close(one["model"], two["model"]) and close(one["optimizer"], two["optimizer"])
    if name != "moe":  # a tied embedding is one tensor in the file
        assert two["model"]["head.weight"].data_ptr() == two["model"]["embed.weight"].data_ptr()


def close(a, b) -> bool:
    """Of one shape, to the names, the types and the order, and equal but for rounding."""
    if isinstance(a, dict):
        return list(a) == list(b) and all(close(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(close, a, b))
    if isinstance(a, torch.Tensor):
        alike = (type(a), a.dtype, a.shape, a.device) == (type(b), b.dtype, b.shape, b.device)
        return alike and torch.allclose(a, b, rtol=1e-4, atol=1e-5)
    return a == b


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_sharded_run_that_was_stopped_and_resumed_is_the_uninterrupted_one_to_the_last_bit(name, runs):
    whole, parts = (state(runs / f"{name}{of}" / "latest.pt") for of in ("-two", "-stop"))
    assert rows(runs / f"{name}-two") == rows(runs / f"{name}-stop")
    assert exactly(whole, parts)


def exactly(a, b) -> bool:
    if isinstance(a, dict):
        return list(a) == list(b) and all(exactly(a[key], b[key]) for key in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_one_process_and_many_sharded_or_not_take_over_from_one_another(name, runs):
    one, parts = (state(runs / f"{name}{of}" / "latest.pt") for of in ("", "-parts"))
    assert close(one["model"], parts["model"]) and close(one["optimizer"], parts["optimizer"])
    assert parts["best_loss"] == pytest.approx(one["best_loss"], abs=1e-5)


@pytest.mark.parametrize("how", [{}, dict(optimizer="muon", grad_accum=2), dict(n_expert=3, moe_ffn_dim=30, match_params=False)])
def test_checkpoint_blocks_computes_twice_and_changes_nothing_dropout_included(how, data, tmp_path, no_ceremony, monkeypatch):
    how = dict(dropout=0.2, n_layer=2, max_iters=6, attn="mfa", eval_interval=3, **how)
    train(small(data, tmp_path / "kept", **how))
    calls, plain = [], MFA.forward
    monkeypatch.setattr(MFA, "forward", lambda *args: calls.append(torch.is_grad_enabled()) or plain(*args))
    train(small(data, tmp_path / "twice", checkpoint_blocks=True, **how))
    assert sum(calls) == 2 * 6 * 2 * how.get("grad_accum", 1)
    assert rows(tmp_path / "kept") == rows(tmp_path / "twice")
    assert exactly(*(state(tmp_path / name / "latest.pt") for name in ("kept", "twice")))


def test_one_process_says_that_it_shares_nothing_out_and_trains(data, tmp_path, no_ceremony, capsys):
    assert train(small(data, tmp_path, shard=True))["step"] == 20
    assert "--shard: one process alone keeps everything; torchrun starts more" in capsys.readouterr().out


def test_float16_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(BadInput, match="--shard: float16 .*: give --dtype bfloat16 or float32"):
        Machine("cpu", "float16", shard=True)


def test_a_number_by_itself_in_a_plug_in_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    model = GPT(Config(n_layer=1))
    model.blocks[0].attn.gain = torch.nn.Parameter(torch.ones(()))
    with pytest.raises(BadInput, match="--shard: blocks.0.attn.gain is a number by itself, .*: make it a vector of one"):
        Machine("cpu", shard=True).place(model)
