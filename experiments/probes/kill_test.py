"""Ends a training process at random moments, in five ways, and resumes it each time.

    python experiments/probes/kill_test.py

SIGKILL leaves a process no moment to tidy up, as a power cut or an operator's kill -9 does. SIGHUP
(the terminal is lost), SIGTERM, SIGINT (Ctrl-C) and a closed pipe (`| head`) leave it that moment:
then not one finished step may be lost. The ends aim in turn at start-up (imports, preparing the
text, reading the checkpoint), at the steps, and at the writing of a checkpoint, each at a random
moment. After each of them every file of the run must be readable; after the last the run goes on to
its end, and must then equal one that was never interrupted, to the last bit: weights, optimizer,
best checkpoint and metrics.
"""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from experiments.flags import require_at_least_1
from support.cli import run_command
from support.corpora import DATA
from support.machine import PIPE_CLOSED
from support.provenance import ROOT, child_environment, provenance
from support.run_folder import load_checkpoint, model_from

PHASES = ("start-up", "training", "writing")
PIPE = "a closed pipe"
WAYS = ("SIGKILL", "SIGHUP", PIPE, "SIGTERM", "SIGINT") if os.name == "posix" else ("SIGKILL",)
MODEL = "--attn mfa_kr --n_layer 2 --dim 64 --head_dim 16 --block_size 32 --dropout 0.1"
EVERY = 8  # steps between checkpoints
RECIPE = f"--batch_size 8 --warmup_iters 20 --log_interval 1 --eval_interval {EVERY} --device cpu"


@dataclass
class Args:
    """End a training process at random moments in many ways, resume it, and compare it with another
    that was left alone.
    """

    kills: int = 50  # how many
    seed: int = 0  # of the moments
    optimizer: Literal["adamw", "muon"] = "adamw"  # of train.py
    results: Path | None = None  # write the result there, as JSON


def start(folder: Path, steps: int, optimizer: str) -> subprocess.Popen:
    """Begin or resume the run in folder, as a user would."""
    flags = f"{MODEL} {RECIPE} --optimizer {optimizer} --max_iters {steps} --resume".split()
    flags += ["--file", str(folder.parent / "text.txt")]
    flags += ["--data_dir", str(folder / "data"), "--out", str(folder / "out")]
    command = [sys.executable, str(ROOT / "train.py"), *flags]
    environment = child_environment(OMP_NUM_THREADS="1")
    pipe = dict(stdout=subprocess.PIPE, text=True, encoding="utf-8")
    before = heed_signals if os.name == "posix" else None
    return subprocess.Popen(command, env=environment, preexec_fn=before, **pipe)


def heed_signals() -> None:
    """Undoes what nohup, or a shell's &, makes a new process ignore."""
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


def lines_with_steps(process: subprocess.Popen):
    """The step of each line on the terminal that has one, as it comes."""
    for line in process.stdout:
        if line.startswith("step "):
            yield int(line.split()[1])


def run_to_end(folder: Path, steps: int, optimizer: str) -> float:
    """Returns the seconds until the run's first step."""
    began = time.perf_counter()
    with start(folder, steps, optimizer) as process:
        first = 0.0
        for _ in lines_with_steps(process):
            first = first or time.perf_counter() - began
    if process.returncode:
        raise SystemExit(f"the run in {folder} failed with exit code {process.returncode}")
    return first


def unfinished_files(out: Path) -> set[tuple]:
    """Name, time and size of the files that are being written, or were when a process died."""
    files = set()
    for path in out.glob("*.part"):
        with contextlib.suppress(FileNotFoundError):  # renamed in this very moment
            files.add((path.name, path.stat().st_mtime_ns, path.stat().st_size))
    return files


def kill_once(
    folder: Path, steps: int, optimizer: str, phase: str, way: str, target: int, startups: list,
    rng: random.Random,
) -> tuple[str, bool]:  # fmt: skip
    """Resume the run and end it, in a phase at or after a step.

    Returns the phase in which it was struck, and whether it had the time to save. startups: what
    the start-ups so far took, in seconds; on a busy machine ten times as long as on an idle one.
    """
    out = folder / "out"
    began = time.perf_counter()
    before = unfinished_files(out)
    with start(folder, steps, optimizer) as process:
        if phase == "start-up":
            time.sleep(rng.uniform(0, min(startups)))
        else:
            done = lines_with_steps(process)
            next(done, None)
            startups.append(time.perf_counter() - began)
            next((step for step in done if step >= target), None)
            if phase == "writing":
                while unfinished_files(out) <= before and process.poll() is None:
                    pass
            time.sleep(rng.uniform(0, 0.005))
        ended = process.poll()
        writing = unfinished_files(out) - before
        strike(process, way)
        trained = phase != "start-up" or way != PIPE and any(lines_with_steps(process))
        code = process.wait()
    if ended is not None or code == 0:
        raise SystemExit(f"the run ended, with exit code {code}, before {way} could end it")
    if way == "SIGKILL":
        writing = unfinished_files(out) - before  # of a dead process: certain
    number = PIPE_CLOSED if way == PIPE else getattr(signal, way)
    saved = code == 128 + number  # as Signals, or run_command, reports it
    if not saved and (code != -number or way != "SIGKILL" and phase != "start-up"):
        raise SystemExit(f"{way} in {phase}: the run ended with exit code {code}")
    struck = "writing" if writing else "training" if trained else "start-up"
    return struck, saved and (trained or way == PIPE)


def strike(process: subprocess.Popen, way: str) -> None:
    if way == PIPE:
        process.stdout.close()
    elif way == "SIGKILL":
        process.kill()
    else:
        process.send_signal(getattr(signal, way))


def check_files(out: Path) -> tuple[int, int]:
    """Every file of the run is readable. Returns the steps of its checkpoint and its last row."""
    step = logged = 0
    for path in sorted(out.glob("*")):
        if path.name in ("latest.pt", "best.pt"):
            ckpt = load_checkpoint(path)
            model_from(ckpt, path, torch.device("cpu"))
            step = ckpt["step"] if path.name == "latest.pt" else step
        elif path.name == "metrics.jsonl":
            # The last line is empty, or cut short by the kill.
            *lines, _ = path.read_text(encoding="utf-8").split("\n")
            logged = max([json.loads(line)["step"] for line in lines], default=0)
        elif path.suffix != ".part" and path.name != "loss.png":
            raise SystemExit(f"{path}: was not expected")
    return step, logged


def result_of(out: Path) -> dict[str, object]:
    """What a run leaves, by file, less what a clock and its flags say."""
    latest, best = (load_checkpoint(out / name) for name in ("latest.pt", "best.pt"))
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    for part in (latest, best, *rows):
        for name in ("seconds", "tokens_per_s", "args"):
            part.pop(name, None)
    return {"latest.pt": latest, "best.pt": best, "metrics.jsonl": rows}


def identical(a, b) -> bool:
    """Are two nests of dicts, lists and tensors equal to the last bit?"""
    if isinstance(a, torch.Tensor):
        same_kind = a.dtype == b.dtype and a.shape == b.shape
        return same_kind and a.numpy().tobytes() == b.numpy().tobytes()
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(identical(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(identical, a, b))
    return a == b


def kill_test(kills: int, seed: int = 0, optimizer: str = "adamw") -> dict:
    """The figures of the result. SystemExit, or BadInput, at the first thing that is wrong."""
    began, rng = time.perf_counter(), random.Random(seed)
    steps = 4 * EVERY + 8 * kills
    targets = sorted(rng.randrange(1, steps - 3 * EVERY) for _ in range(kills))
    died, ways, reached, repeated = Counter(), Counter(), 0, 0
    with tempfile.TemporaryDirectory() as temporary:
        alone, killed = Path(temporary) / "alone", Path(temporary) / "killed"
        text = (DATA / "shakespeare.txt").read_text(encoding="utf-8")[:50_000]
        (Path(temporary) / "text.txt").write_text(text, encoding="utf-8")
        startups = [run_to_end(alone, steps, optimizer)]
        print(f"an uninterrupted run of {steps} steps: first after {startups[0]:.1f} s", flush=True)
        for k, target in enumerate(targets):
            way = WAYS[k % len(WAYS)]
            aim = PHASES[k % 3]
            phase, had_time = kill_once(
                killed, steps, optimizer, aim, way, target, startups, rng
            )
            died[phase] += 1
            ways[way] += 1
            step, logged = check_files(killed / "out")
            if step < reached:
                what = f"the latest checkpoint went back from step {reached} to {step}"
                raise SystemExit(f"kill {k + 1}, {way}: {what}")
            if had_time and step < logged:
                what = f"step {logged} was done, and saved is step {step}"
                raise SystemExit(f"kill {k + 1}, {way}: {what}")
            reached = step
            repeated += max(0, logged - step)
            state = f"{way} in {phase}, after step {logged}: all readable, goes on from {reached}"
            print(f"kill {k + 1} of {kills}: {state}", flush=True)
        run_to_end(killed, steps, optimizer)
        check_files(killed / "out")
        expected, found = result_of(alone / "out"), result_of(killed / "out")
        left = sorted(path.name for path in (killed / "out").glob("*.part"))
    differ = [name for name in expected if not identical(expected[name], found[name])]
    if differ:
        raise SystemExit(f"not the uninterrupted run: {', '.join(differ)} differ")
    if left:
        raise SystemExit(f"left behind: {', '.join(left)}")
    return {
        "optimizer": optimizer, "kills": kills, "by": {way: ways[way] for way in WAYS},
        "died_in": {phase: died[phase] for phase in PHASES}, "steps": steps,
        "checkpoint_every": EVERY, "steps_done_twice": repeated, "unreadable_files": 0,
        "identical_to_uninterrupted": True, "seconds": round(time.perf_counter() - began, 1),
    }  # fmt: skip


def main(args: Args) -> None:
    require_at_least_1(args, "kills")
    result = provenance() | kill_test(args.kills, args.seed, args.optimizer)
    phases = ", ".join(f"{n} in {phase}" for phase, n in result["died_in"].items())
    ways = ", ".join(f"{n} by {way}" for way, n in result["by"].items())
    print(
        f"{args.kills} kills ({ways}; {phases}): no unreadable file, "
        f"{result['steps_done_twice']} steps done twice, the end identical to the uninterrupted "
        f"run's; {result['seconds']} s"
    )
    if args.results:
        args.results.parent.mkdir(parents=True, exist_ok=True)
        args.results.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_command(main, Args)
