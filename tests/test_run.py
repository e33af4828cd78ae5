"""experiments/study/run.py: a run is the training it says it is, and the queue goes on where it stopped."""

import contextlib
import hashlib
import itertools
import json
import math
import os
import time
from collections import Counter
from concurrent.futures import BrokenExecutor, ThreadPoolExecutor

import numpy as np
import pytest
import torch
from runs import command
from study_rows import row, toy

from experiments.study import plot, run, studies
from experiments.study.studies import (
    Run,
    queue,
    read_results,
    results_by_run,
    run_for,
)
from mfa import GPT, Config
from prepare_data import load, prepare
from support import machine
from support.machine import Machine
from support.provenance import device_name
from support.run_folder import load_checkpoint, model_from
from train import Train, batch_starts, evaluate, take


def call(data, *flags) -> int:
    return command(run.main, run.Args, ["--smoke", "--device=cpu", f"--data_dir={data}", *flags])


def test_divergence_is_a_result(folder):
    found = run.train_run(toy(lr=1e20), folder, "cpu", val_tokens=1025)
    assert found["diverged"] and found["val_loss"] is None and found["by_position"] == []
    json.dumps(found, allow_nan=False)


def test_loss_by_position(folder):
    model = studies.build(toy())
    T, device = model.cfg.block_size, torch.device("cpu")
    _, ids, _ = run.load_tokens(folder, device)
    ids = ids[: 20 * T + 1]
    positions = run.loss_by_position(model, ids, Machine("cpu"))
    assert [p for p, _ in positions] == [0, 1, 2, 4, 8, 16]
    widths = [1, 1, 2, 4, 8, 16]
    mean = sum(w * loss for w, (_, loss) in zip(widths, positions, strict=True)) / T
    assert mean == pytest.approx(evaluate(model, ids, Machine("cpu")), rel=1e-5)


def test_compiled_runs_give_the_same_losses(folder, monkeypatch):
    """Blocks: one graph for all blocks and one for the head. The backend here only captures; inductor takes a minute."""
    from torch._dynamo.utils import counters

    compile = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda *a, **k: compile(*a, **(k | dict(backend="eager", mode=None)))
    )
    monkeypatch.setattr(run, "POINTS", 3)
    found = {}
    for how, graphs in (("no", 0), ("model", 1), ("blocks", 2)):
        counters.clear()
        found[how] = run.train_run(toy(max_iters=6), folder, "cpu", how, 1025)
        assert counters["stats"]["unique_graphs"] == graphs
    assert found["no"]["curve"] == found["model"]["curve"] == found["blocks"]["curve"]
    assert found["no"]["val_loss"] == found["blocks"]["val_loss"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("what", ["gradient", "loss"])
def test_a_step_whose_gradient_is_not_that_of_eager_code_ends_the_run(
    folder, monkeypatch, dtype, what
):
    def faulty(model, *rest):
        loss_of, weight = compiled_loss(model, *rest), model.blocks[0].attn.o.weight

        def with_fault(tokens):
            loss = loss_of(tokens)
            fault = (
                (weight - weight.detach()).sum() if what == "gradient" else 0.6 * loss.detach()
            )  # 6%, where 5 are allowed
            return loss + next(wrong) * fault

        return with_fault

    compiled_loss, wrong = (
        run.compiled_loss,
        itertools.cycle((0, 0, 0, 0.1)),
    )  # eagerly, eagerly in two parts, the step
    monkeypatch.setattr(run, "compiled_loss", faulty)
    monkeypatch.setattr(machine, "pick_dtype", lambda name, device: dtype)
    with pytest.raises(
        RuntimeError,
        match=f"step 1: loss and gradient norm are .*, run eagerly .*, where rounding to {dtype}",
    ):
        run.train_run(toy(max_iters=2), folder, "cpu", val_tokens=1025)


def test_a_run_says_how_far_rounding_moves_its_gradient(folder, monkeypatch):
    found = run.train_run(
        toy(max_iters=2), folder, "cpu", val_tokens=1025
    )  # in float32: the order of sums is left
    assert [step for step, _ in found["rounding"]] == [1, 2] and all(
        off < 1e-5 for _, off in found["rounding"]
    )
    monkeypatch.setattr(machine, "pick_dtype", lambda name, device: torch.bfloat16)
    found = run.train_run(toy(max_iters=2), folder, "cpu", val_tokens=1025)
    assert [step for step, _ in found["rounding"]] == [1, 2] and all(
        2**-12 < off < 2**-4 for _, off in found["rounding"]
    )


def test_every_study_runs(smoke):
    rows = read_results(smoke)
    done = results_by_run(rows, "shakespeare-byte")
    assert len(done) == len(rows)
    assert [task.run for task in queue("all", True, done) if task.run not in done] == []
    for r, line in done.items():
        assert (line["params"], line["cache_bytes"], line["cache_share"]) == plot.sizes_of(r)
        assert line["tokens"] == r.max_iters * r.batch_size * r.cfg.block_size
        assert math.isfinite(line["val_loss"]) and line["ppl"] == pytest.approx(
            math.exp(line["val_loss"])
        )
        assert line["val_loss"] == line["curve"][-1][1]  # toy: the part is all there is
        assert {"command", "commit", "device", "versions", "date"} <= line.keys()


def test_it_goes_on_where_it_stopped(smoke, folder, tmp_path, capsys):
    """A kill in the middle of a line loses that line; everything else is left as it is."""
    path, text = tmp_path / "study.jsonl", smoke.read_text(encoding="utf-8")
    cut = text[: text.rindex("\n", 0, -1) + 50]
    path.write_text(cut, encoding="utf-8")
    assert call(folder.parent, f"--results={path}") == 0
    after = path.read_text(encoding="utf-8")
    assert after.startswith(text[: text.rindex("\n", 0, -1) + 1]) and after.endswith("\n")
    old, new = json.loads(text.splitlines()[-1]), json.loads(after.splitlines()[-1])
    assert len(after.splitlines()) == len(text.splitlines()) and old["val_loss"] == new["val_loss"]
    capsys.readouterr()
    assert call(folder.parent, f"--results={path}") == 0  # nothing is left to do
    assert (
        path.read_text(encoding="utf-8") == after
        and ", 0 runs still to make" in capsys.readouterr().out
    )


def test_time_limit_and_dry_run(folder, tmp_path, capsys):
    path = tmp_path / "study.jsonl"
    assert (
        call(
            folder.parent,
            "--study=table6",
            f"--results={path}",
            "--limit_seconds=1",
            "--guess_seconds=1e9",
        )
        == 0
    )
    assert not path.exists() and "12 runs still to make" in capsys.readouterr().out
    assert call(folder.parent, "--study=table6", f"--results={path}", "--dry_run") == 0
    assert not path.exists() and len(capsys.readouterr().out.splitlines()) == 13


def test_a_run_that_fails_does_not_stop_the_others(folder, tmp_path, monkeypatch, capsys):
    def no_room(r, *rest):
        if r.build == "single_key":
            raise torch.OutOfMemoryError("no room")
        return train_run(r, *rest)

    train_run, path = run.train_run, tmp_path / "study.jsonl"
    monkeypatch.setattr(run, "train_run", no_room)
    assert call(folder.parent, "--study=table6", f"--results={path}") == 1
    assert (
        len(read_results(path)) == 9
        and "failed: OutOfMemoryError: no room" in capsys.readouterr().out
    )


def test_runs_are_shared_out_over_all_gpus(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert run.devices_of("auto") == ["cuda:0", "cuda:1"] and run.devices_of("cuda:1") == ["cuda:1"]
    used, busy, train_run = Counter(), Counter(), run.train_run

    def noted(r, folder, device, *rest):
        busy[device] += 1
        assert device in ("one", "other") and busy[device] == 1  # one job for each device
        used[device] += 1
        found = train_run(r, folder, "cpu", *rest)
        busy[device] -= 1
        return found

    @contextlib.contextmanager
    def threads(jobs, devices):
        assert (jobs, devices) == (1, ["one", "other"])
        with ThreadPoolExecutor(jobs * len(devices)) as pool:
            yield pool.submit
        torch.compiler.set_stance(
            "default"
        )  # the process' own, which threads leave as it happens; the runner has processes

    monkeypatch.setattr(run, "devices_of", lambda name: ["one", "other"])
    monkeypatch.setattr(run, "train_run", noted)
    monkeypatch.setattr(run, "workers", threads)
    assert call(folder.parent, "--study=table6", f"--results={tmp_path / 'study.jsonl'}") == 0
    assert used.total() == 12 and min(used.values()) >= 3


def test_jobs_on_one_device_take_turns_at_training(folder, monkeypatch):
    """A run that has compiled waits for its turn, trains, lets go and is evaluated; the wait is not among its seconds."""

    class Turn:
        def acquire(self):
            said.append("taken")
            clock[0] += 1000

        def release(self):
            said.append("given back")
            raise ValueError("the parent has released it, since another process was killed")

    said, clock, evaluate, perf_counter = [], [0], run.evaluate, time.perf_counter
    monkeypatch.setattr(run.time, "perf_counter", lambda: perf_counter() + clock[0])
    monkeypatch.setattr(run, "evaluate", lambda *a: (said.append("evaluated"), evaluate(*a))[1])
    monkeypatch.setattr(run, "take", lambda *a: (said.append("step"), take(*a))[1])
    monkeypatch.setattr(run, "loss_by_position", lambda *a: [])
    monkeypatch.setattr(run, "DEVICE_LOCKS", {"cpu": Turn()})
    monkeypatch.setattr(run, "POINTS", 1)
    found = run.train_run(
        toy(max_iters=run.STEPS_BEFORE_CAPTURE + 1), folder, "cpu", val_tokens=1025
    )
    assert said == ["step"] * run.STEPS_BEFORE_CAPTURE + [
        "taken",
        "step",
        "evaluated",
        "given back",
        "evaluated",
    ]
    assert found["seconds"] < 1000


def test_the_processes_of_two_jobs_share_a_lock_for_each_device():
    def take(device):
        return start(
            eval,
            f"__import__('experiments.study.run', fromlist=['run']).DEVICE_LOCKS['{device}'].acquire(timeout=0.2)",
        ).result()

    with run.workers(2, ["one", "other"]) as start:
        assert take("one") and not take("one") and take("other")
    with run.workers(1, ["one", "other"]) as start:
        assert (
            start(
                eval, "__import__('experiments.study.run', fromlist=['run']).DEVICE_LOCKS"
            ).result()
            == {}
        )


def test_each_run_on_a_gpu_has_a_process_of_its_own_and_one_that_dies_gives_back_its_turn():
    with run.workers(2, ["one"]) as start:
        assert len({start(os.getpid).result() for _ in range(2)} | {os.getpid()}) == 3
        with pytest.raises(BrokenExecutor):
            start(
                eval,
                "__import__('experiments.study.run', fromlist=['run']).DEVICE_LOCKS['one'].acquire() and __import__('os')._exit(1)",
            ).result()
        assert start(
            eval,
            "__import__('experiments.study.run', fromlist=['run']).DEVICE_LOCKS['one'].acquire(timeout=0.2)",
        ).result()
    with run.workers(1, ["cpu"]) as start:
        assert start(os.getpid).result() == os.getpid()


@pytest.mark.parametrize("flag", ["--jobs=0", "--limit_seconds=0", "--guess_seconds=-1"])
def test_bad_flags(folder, tmp_path, capsys, flag):
    assert call(folder.parent, f"--results={tmp_path / 'r'}", flag) == 2
    assert capsys.readouterr().err.startswith(f"error: {flag.split('=')[0]} must be positive")


def test_damaged_results(folder, tmp_path, capsys):
    path = tmp_path / "study.jsonl"
    path.write_text("{}\n", encoding="utf-8")
    assert call(folder.parent, f"--results={path}") == 2
    assert f"{path}: line 1 is not a result of run.py" in capsys.readouterr().err
    assert path.read_text(encoding="utf-8") == "{}\n"


def test_the_gradient_is_that_of_a_step_and_bfloat16_moves_it_a_little():
    torch.manual_seed(0)
    model = GPT(Config(vocab_size=11, block_size=16, n_layer=1, dim=32, head_dim=8, ffn_dim=32))
    loss_of, tokens = Machine("cpu", "bfloat16").loss_function(model), torch.randint(11, (5, 17))
    loss, g32 = run.gradient(model, loss_of, tokens, torch.float32)
    want = torch.autograd.grad(model(tokens[:, :-1], tokens[:, 1:])[1], list(model.parameters()))
    assert (
        torch.equal(g32, torch.cat([g.flatten() for g in want])) and loss == loss_of(tokens).item()
    )
    for parts in (2, 3):  # of 3 and 2, of 2, 2 and 1
        one, other = run.gradient(model, loss_of, tokens, torch.float32, parts)
        assert (
            one.item() == pytest.approx(loss.item(), rel=1e-6)
            and (other - g32).norm() < 1e-5 * g32.norm()
        )
    off = (run.gradient(model, loss_of, tokens, torch.bfloat16)[1] - g32).norm() / g32.norm()
    assert 2**-12 < off < 2**-4


def plainly_trained(r: Run, folder) -> tuple[GPT, list[float]]:
    """A study's recipe, spelled out: the model at the end, its losses on the first 100 tokens."""
    torch.manual_seed(r.seed)
    model = studies.build(r)
    matrices, others = (
        [p for p in model.parameters() if (p.dim() > 1) == many] for many in (True, False)
    )
    groups = [dict(params=matrices, weight_decay=0.1), dict(params=others, weight_decay=0.0)]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    train_ids, val_ids, _ = load(folder)
    val, losses, warmup, T = (
        torch.from_numpy(val_ids.astype("int64")),
        [],
        r.max_iters // 20,
        r.cfg.block_size,
    )
    for step in range(r.max_iters):
        done = (step - warmup) / (r.max_iters - warmup)
        lr = (
            r.lr * (step + 1) / warmup
            if step < warmup
            else 1e-5 + (r.lr - 1e-5) * (1 + math.cos(math.pi * done)) / 2
        )
        starts = batch_starts(
            Train(model=r.cfg, batch_size=r.batch_size, seed=r.seed), step, len(train_ids)
        ).tolist()
        batch = torch.from_numpy(
            np.stack([train_ids[s : s + T + 1] for s in starts]).astype("int64")
        )
        model.train()(batch[:, :-1], batch[:, 1:])[1].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
        losses.append(evaluate(model, val[:101], Machine("cpu")))
    return model, losses


def test_a_run_of_a_study_is_the_plain_training_it_says_it_is(folder, monkeypatch):
    """The curve is of the text's first tokens, the loss that counts of all that is given."""
    monkeypatch.setattr(run, "CURVE_TOKENS", 100)
    r = toy(max_iters=41, seed=3, lr=8e-3)
    found = run.train_run(r, folder, "cpu", val_tokens=1025)
    model, losses = plainly_trained(r, folder)
    looks = [*range(6, 41, 6), 41]  # eight, and the end
    assert [step for step, _ in found["curve"]] == looks
    assert [loss for _, loss in found["curve"]] == pytest.approx(
        [losses[step - 1] for step in looks], rel=1e-4
    )
    assert found["best_val_loss"] == min(loss for _, loss in found["curve"])
    val = torch.from_numpy(load(folder)[1][:1025].astype("int64"))
    whole = evaluate(model, val, Machine("cpu"))
    assert (
        found["val_loss"] == pytest.approx(whole, rel=1e-4)
        and found["val_loss"] != found["curve"][-1][1]
    )
    widths = [1, 1, 2, 4, 8, 16]
    mean = sum(w * loss for w, (_, loss) in zip(widths, found["by_position"], strict=True)) / 32
    assert mean == pytest.approx(whole, rel=1e-4)


def test_each_seed_of_a_study_has_weights_of_its_own(folder):
    losses = {
        seed: run.train_run(toy(max_iters=1, seed=seed, lr=1e-9), folder, "cpu", val_tokens=257)
        for seed in (0, 1)
    }
    assert (
        abs(losses[0]["val_loss"] - losses[1]["val_loss"]) > 1e-4
    )  # nothing was learned: the weights are others


def test_bits_per_byte_of_a_study_are_of_the_validation_text(tmp_path):
    (tmp_path / "own.txt").write_text("abcdefghij" * 900 + "éü" * 500, encoding="utf-8")
    found = run.train_run(
        toy(max_iters=2), prepare(file=tmp_path / "own.txt", data_dir=tmp_path), "cpu"
    )
    assert found["bpb"] == pytest.approx(found["val_loss"] / math.log(2) / 2)  # 2 bytes a character


def test_the_time_left_is_of_the_latest_equal_run_on_this_device_with_as_many_jobs(
    tmp_path, capsys
):
    def line(arm, seed, seconds, **more):
        task = studies.Task("why", arm, run_for("why", arm, 1, seed))
        return (
            row(task, 3.7) | dict(device=device_name("cpu"), seconds=seconds, params=29.9e6) | more
        )

    rows = [line("mfa_2000", 0, 500), line("mfa_2000", 1, 600), line("mfa_base", 0, 1200)]
    rows += [line("mfa_base", 1, 7, jobs=2), line("mfa_base", 2, 8, device="another")]
    rows += [line("mha_2000", 0, 9, dataset="another-bpe8192")]
    path = tmp_path / "study.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in rows), encoding="utf-8")
    assert (
        command(
            run.main, run.Args, ["--dry_run", "--study=why", "--device=cpu", f"--results={path}"]
        )
        == 0
    )
    *lines, last = capsys.readouterr().out.splitlines()
    found = {(words[2], words[6]): words[7:] for words in map(str.split, lines)}
    assert found["mfa_2000", "0"] == ["loss", "3.7000"] and found["mfa_2000", "2"] == ["9", "s"]
    assert found["mha_2000", "0"] == ["9", "s"] and found["mha_base", "0"] == ["1200", "s"]
    assert found["mha_16", "1"] == ["1200", "s"] and last.startswith("still to make: about ")
    seconds = [int(words[0]) for words in found.values() if words[0] != "loss"]
    assert len(found) - len(seconds) == 5 and last.split()[4] == f"{sum(seconds) / 60:.0f}"


@pytest.fixture
def full_size(tmp_path, monkeypatch):
    """Calls run.py at full size with runs that take no time; what they were given is noted."""
    noted, going = dict(runs=[], most=0, prepared=None, flushed=0), []

    def no_training(r, folder, device, how, val_tokens, keep):
        going.append(r)
        noted["most"] = max(noted["most"], len(going))
        time.sleep(0.02)
        going.remove(r)
        noted["runs"].append((folder, device, val_tokens))
        return {
            k: v
            for k, v in row(studies.Task("", "", r), 3.7).items()
            if k in ("val_loss", "ppl", "seconds", "diverged", "params", "curve")
        }

    @contextlib.contextmanager
    def threads(jobs, devices):
        with ThreadPoolExecutor(jobs * len(devices)) as pool:
            yield pool.submit

    def flushed(f, fsync=os.fsync):
        noted["flushed"] += 1
        return fsync(f)

    monkeypatch.setattr(
        run, "prepare", lambda **how: noted.update(prepared=how) or tmp_path / "text"
    )
    monkeypatch.setattr(run, "train_run", no_training)
    monkeypatch.setattr(run, "workers", threads)
    monkeypatch.setattr(os, "fsync", flushed)
    path = tmp_path / "study.jsonl"

    def call(*flags):
        flags = ["--device=cpu", f"--results={path}", f"--data_dir={tmp_path}", *flags]
        assert command(run.main, run.Args, flags) == 0
        return noted, read_results(path)

    return call


def test_at_full_size_a_study_is_of_the_corpus_asked_for_and_of_its_whole_validation_text(
    full_size, tmp_path
):
    noted, rows = full_size("--study=table6", "--source=books", "--jobs=3")
    text = dict(dataset="pg-books", tokenizer="bpe", vocab_size=8192)
    assert noted["prepared"] == dict(**text, source="books", data_dir=tmp_path)
    assert noted["runs"] == [(tmp_path / "text", "cpu", None)] * 12 and noted["flushed"] == 12
    assert {(line["dataset"], line["jobs"]) for line in rows} == {("pg-books-bpe8192", 3)}
    noted, rows = full_size(
        "--study=table6", "--dataset=enwik8"
    )  # results on one text are none on another
    assert (
        len(noted["runs"]) == 24
        and rows[-1]["dataset"] == "enwik8-bpe8192"
        and rows[-1]["jobs"] == 1
    )
    assert len(full_size("--study=table6", "--dataset=enwik8")[1]) == 24


def test_within_a_time_limit_no_run_begins_that_would_end_after_its_turn(full_size):
    noted, rows = full_size(
        "--study=table6", "--jobs=2", "--guess_seconds=60", "--limit_seconds=100"
    )
    assert noted["most"] == 1 and len(rows) == 12


def test_a_run_that_is_stopped_goes_on_as_if_it_was_not(folder, tmp_path, monkeypatch):
    """Bit for bit on a CPU: losses, gradients' roundings, and the sha256 of the weights."""
    monkeypatch.setattr(run, "STEPS_BETWEEN_LOOKS", 7)
    for optimizer in ("adamw", "muon"):
        r = toy(max_iters=41, lr=8e-3, optimizer=optimizer)
        whole = run.Keep(tmp_path / "whole" / "weights.pt")
        parts = run.Keep(tmp_path / "parts" / "weights.pt", until=0)  # long ago
        for keep in (whole, parts):
            keep.weights.parent.mkdir(exist_ok=True)
        want = run.train_run(r, folder, "cpu", val_tokens=1025, keep=whole)
        for stop in (7, 14, 21, 28, 35):
            found = run.train_run(r, folder, "cpu", val_tokens=1025, keep=parts)
            assert found == dict(stopped_at=stop) and parts.state.is_file()
            assert not parts.weights.exists()
            torch.rand(stop)  # what others draw in between is of no account
        found = run.train_run(r, folder, "cpu", val_tokens=1025, keep=parts)
        assert (want.pop("stops"), found.pop("stops")) == ([], [7, 14, 21, 28, 35])
        assert want.pop("seconds") > 0 and found.pop("seconds") > 0 and found == want
        alone = run.train_run(r, folder, "cpu", val_tokens=1025)
        assert "weights" not in alone and alone["curve"] == want["curve"]
        parts.state.unlink()
        parts.weights.unlink()


def test_a_run_does_not_go_on_from_another(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "STEPS_BETWEEN_LOOKS", 1)
    keep = run.Keep(tmp_path / "weights.pt", until=0)
    run.train_run(toy(), folder, "cpu", val_tokens=1025, keep=keep)
    with pytest.raises(RuntimeError, match="weights.state is of another run or text: remove it"):
        run.train_run(toy(seed=1), folder, "cpu", val_tokens=1025, keep=keep)


def test_kept_weights_are_a_checkpoint_in_bfloat16(folder, tmp_path):
    keep = run.Keep(tmp_path / "weights.pt")
    found = run.train_run(toy(), folder, "cpu", val_tokens=1025, keep=keep)
    data = keep.weights.read_bytes()
    assert found["weights"] == dict(file="weights.pt", sha256=hashlib.sha256(data).hexdigest())
    checkpoint = load_checkpoint(keep.weights)
    assert {w.dtype for w in checkpoint["model"].values()} == {torch.bfloat16}
    model = model_from(checkpoint, keep.weights, torch.device("cpu"))
    val = torch.from_numpy(load(folder)[1][:1025].astype("int64"))
    assert evaluate(model, val, Machine("cpu")) == pytest.approx(found["val_loss"], rel=2e-3)


def test_the_queue_stops_at_the_limit_and_goes_on_in_the_next_call(
    folder, tmp_path, monkeypatch, capsys
):
    clock = [0.0]

    def later():
        clock[0] += 100
        return clock[0]

    monkeypatch.setattr(run, "STEPS_BETWEEN_LOOKS", 3)
    monkeypatch.setattr(run.time, "time", later)
    path, kept = tmp_path / "study.jsonl", tmp_path / "kept"
    flags = ["--study=muon_heads", f"--results={path}", f"--keep={kept}", "--limit_seconds=250"]
    assert call(folder.parent, *flags) == 0
    assert "stopped at step 3 of 4, kept in" in capsys.readouterr().out
    states = sorted(file.name for file in kept.glob("*.state"))
    assert len(states) == 14 and states[0] == "muon_heads-mfa_30m-0.003-0-shakespeare-byte.state"
    assert len(read_results(path)) == 2  # before the time was up
    assert call(folder.parent, *flags[:-1]) == 0
    rows = read_results(path)
    assert len(rows) == 16 and [row["stops"] for row in rows] == [[]] * 2 + [[3]] * 14
    weights = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in kept.iterdir()}
    assert {row["weights"]["file"]: row["weights"]["sha256"] for row in rows} == weights


def test_a_second_seed_waits_for_the_rates_of_its_arm(tmp_path):
    """A run that is trained may change what rate is best, and so which one the seed gets."""
    rows = [row for row in read_results(studies.RESULTS) if not row["seed"] and (row["arm"], row["lr"]) != ("mfa_norm", 0.010125)]
    scheduler = run.Scheduler(run.Args(study="modern"), tmp_path / "r", rows, dict(device="cpu"))
    first = next(task for task in queue("modern", done=scheduler.done) if task.arm == "mfa_norm" and task.run not in scheduler.done)
    scheduler.running[object()] = first, "cpu"
    asked = []
    while (task := scheduler.next_task("cpu")) is not None:
        asked.append(task)
        scheduler.failed.add(task.run)
    assert first.run.seed == 0 and any(task.run.seed for task in asked)
    assert not [task for task in asked if task.arm == "mfa_norm" and task.run.seed]


def test_a_run_that_can_stop_begins_where_it_would_not_end_in_time(full_size, tmp_path):
    flags = "--study=table6", "--guess_seconds=600", "--limit_seconds=100"
    assert len(full_size(*flags)[1]) == 0
    assert len(full_size(*flags, f"--keep={tmp_path / 'kept'}")[1]) == 12


def test_the_ratio_is_of_the_larger_corpus(full_size):
    noted, rows = full_size("--study=ratio")
    assert noted["prepared"]["dataset"] == "pg-books-large"
    assert {line["dataset"] for line in rows} == {"pg-books-large-bpe8192"}
    done = results_by_run(rows)
    assert {task.run for task in queue("ratio", done=done)} <= done.keys()  # which rates, their results say
    assert len(full_size("--study=ratio")[1]) == len(rows)
