"""Kills a training process at random moments and resumes it each time: python experiments/kill_test.py

SIGKILL leaves a process no moment to tidy up, as a power cut or an operator's kill -9 does. The kills aim in turn at
start-up (imports, preparing the text, reading the checkpoint), at the steps, and at the writing of a checkpoint, each at
a random moment. After each kill every file of the run must be readable; after the last the run goes on to its end, and
must then equal one that was never interrupted, to the last bit: weights, optimizer, best checkpoint and metrics.
"""

import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from provenance import ROOT, provenance

from prepare_data import DATA, BadInput, run_command
from train import load_checkpoint, model_from

PHASES = ("start-up", "training", "writing")
MODEL = "--attn mfa_kr --n_layer 2 --dim 64 --head_dim 16 --block_size 32 --dropout 0.1"
EVERY = 8  # steps between checkpoints
RECIPE = f"--batch_size 8 --warmup_iters 20 --log_interval 1 --eval_interval {EVERY} --device cpu"


@dataclass
class Args:
    """Kill a training process at random moments, resume it each time, and compare it with one that was left alone."""

    kills: int = 50
    """How many."""
    seed: int = 0
    """Of the moments."""
    results: Path | None = None
    """Write the result there, as JSON."""


def start(folder: Path, steps: int) -> subprocess.Popen:
    """Begin or resume the run in folder, as a user would."""
    flags = f"{MODEL} {RECIPE} --max_iters {steps} --resume".split()
    places = ["--file", str(folder.parent / "text.txt"), "--data_dir", str(folder / "data"), "--out", str(folder / "out")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "train.py"), *flags, *places]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, encoding="utf-8")


def lines_with_steps(process: subprocess.Popen):
    """The step of each line on the terminal that has one, as it comes."""
    for line in process.stdout:
        if line.startswith("step "):
            yield int(line.split()[1])


def whole(folder: Path, steps: int) -> float:
    """Let the run go to its end; returns the seconds until its first step."""
    began = time.perf_counter()
    with start(folder, steps) as process:
        first = 0.0
        for _ in lines_with_steps(process):
            first = first or time.perf_counter() - began
    if process.returncode:
        raise SystemExit(f"the run in {folder} failed with exit code {process.returncode}")
    return first


def parts(out: Path) -> set[tuple]:
    """Name, time and size of the files that are being written, or were when a process died."""
    found = set()
    for path in out.glob("*.part"):
        with contextlib.suppress(FileNotFoundError):  # renamed in this very moment
            found.add((path.name, path.stat().st_mtime_ns, path.stat().st_size))
    return found


def kill_once(folder: Path, steps: int, phase: str, target: int, startup: float, rng: random.Random) -> str:
    """Resume the run and kill it, in a phase at or after a step. Returns the phase in which it died."""
    out, before = folder / "out", parts(folder / "out")
    with start(folder, steps) as process:
        if phase == "start-up":
            time.sleep(rng.uniform(0, startup))
        else:
            next((step for step in lines_with_steps(process) if step >= target), None)
            while phase == "writing" and parts(out) <= before and process.poll() is None:
                pass
            time.sleep(rng.uniform(0, 0.005))
        ended = process.poll()
        process.kill()
        trained = phase != "start-up" or any(lines_with_steps(process))
    if ended is not None or process.returncode == 0:
        raise SystemExit(f"the run ended, with exit code {process.returncode}, before it could be killed")
    return "writing" if parts(out) - before else "training" if trained else "start-up"


def check(out: Path) -> tuple[int, int]:
    """Every file in the run's folder is readable. Returns the steps of the latest checkpoint and of the last row logged."""
    step = logged = 0
    for path in sorted(out.glob("*")):
        if path.name in ("latest.pt", "best.pt"):
            ckpt = load_checkpoint(path)
            model_from(ckpt, path, torch.device("cpu"))
            step = ckpt["step"] if path.name == "latest.pt" else step
        elif path.name == "metrics.jsonl":
            *whole_lines, last = path.read_text(encoding="utf-8").split("\n")  # last: empty, or cut short by the kill
            logged = max([json.loads(line)["step"] for line in whole_lines], default=0)
        elif path.suffix != ".part" and path.name != "loss.png":
            raise SystemExit(f"{path}: was not expected")
    return step, logged


def outcome(out: Path) -> tuple[dict, dict, list[dict]]:
    """What a run leaves, less what a clock and its flags say."""
    kept = [load_checkpoint(out / name) for name in ("latest.pt", "best.pt")]
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    for found in (*kept, *rows):
        for name in ("seconds", "tokens_per_s", "args"):
            found.pop(name, None)
    return *kept, rows


def identical(a, b) -> bool:
    """Are two nests of dicts, lists and tensors equal to the last bit?"""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(identical(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(identical, a, b))
    return a == b


def kill_test(kills: int, seed: int = 0) -> dict:
    """The figures of the result. Raises SystemExit, or BadInput, at the first thing that is not as it should be."""
    rng, began, steps = random.Random(seed), time.perf_counter(), 4 * EVERY + 8 * kills
    targets = sorted(rng.randrange(1, steps - 3 * EVERY) for _ in range(kills))
    died, at, twice = Counter(), 0, 0
    with tempfile.TemporaryDirectory() as temporary:
        alone, killed = Path(temporary) / "alone", Path(temporary) / "killed"
        text = (DATA / "shakespeare.txt").read_text(encoding="utf-8")[:50_000]
        (Path(temporary) / "text.txt").write_text(text, encoding="utf-8")
        startup = whole(alone, steps)
        print(f"an uninterrupted run of {steps} steps: first step after {startup:.1f} s", flush=True)
        for k, target in enumerate(targets):
            phase = kill_once(killed, steps, PHASES[k % 3], target, startup, rng)
            died[phase] += 1
            step, logged = check(killed / "out")
            if step < at:
                raise SystemExit(f"kill {k + 1}: the latest checkpoint went back from step {at} to {step}")
            at, twice = step, twice + max(0, logged - step)
            print(f"kill {k + 1} of {kills} after step {logged}, {phase}: all readable, goes on from {at}", flush=True)
        whole(killed, steps)
        check(killed / "out")
        same = [identical(a, b) for a, b in zip(outcome(alone / "out"), outcome(killed / "out"), strict=True)]
        left = sorted(path.name for path in (killed / "out").glob("*.part"))
    if not all(same):
        raise SystemExit(f"not the uninterrupted run: latest.pt, best.pt and metrics.jsonl are the same: {same}")
    if left:
        raise SystemExit(f"left behind: {', '.join(left)}")
    return {
        "kills": kills, "died_in": {phase: died[phase] for phase in PHASES}, "steps": steps, "checkpoint_every": EVERY,
        "steps_done_twice": twice, "unreadable_files": 0, "identical_to_uninterrupted": True,
        "seconds": round(time.perf_counter() - began, 1),
    }  # fmt: skip


def main(args: Args) -> None:
    if args.kills < 1:
        raise BadInput(f"--kills must be at least 1, not {args.kills}")
    result = provenance() | kill_test(args.kills, args.seed)
    print(
        f"{args.kills} kills ({', '.join(f'{n} in {phase}' for phase, n in result['died_in'].items())}): no unreadable file, "
        f"{result['steps_done_twice']} steps done twice, the end identical to the uninterrupted run's; {result['seconds']} s"
    )
    if args.results:
        args.results.parent.mkdir(parents=True, exist_ok=True)
        args.results.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_command(main, Args)
