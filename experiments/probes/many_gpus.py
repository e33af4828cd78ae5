"""Whether a training on several GPUs of one host scales, survives the death of a process, and can
be handed to another number of processes and back.

    python experiments/probes/many_gpus.py --processes 8 --dataset pg-books

    speed    steps of the preset small on 1, 2, 4 ... processes, 512 sequences of 1,024 each: what N
             of them do in a second, beside N times what one does; the peak of memory
    killed   one process dies by SIGKILL under torchrun's --max-restarts: the others are started
             again with it, go on from the last checkpoint, and end as a run that was left alone
    handed   a run that one process began and all of them end, and one the other way round

Each is written to --results as it ends, with the differences in loss from the run that was left
alone. Other processes than those it starts are not touched. Linux only: it reads /proc.
"""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from experiments.bench import sharding
from experiments.flags import require_at_least_1, require_gpus, require_other_results
from support.cli import BadInput, run_command
from support.corpora import DATA
from support.files import write_atomically
from support.provenance import ROOT, child_environment, provenance, read_json

PIECE = 32  # sequences that a GPU takes at a time
RESULTS = ROOT / "experiments" / "results" / "many_gpus.json"
TOY = "--n_layer 2 --dim 64 --head_dim 16 --block_size 32 --device cpu --warmup_iters 5"


@dataclass
class Args:
    """Scaling, the death of a process, and a change of their number, on the GPUs of one host."""

    processes: int = 8  # one for each GPU; a power of two
    parts: tuple[Literal["speed", "killed", "handed"], ...] = ("speed", "killed", "handed")
    dataset: str = "wikitext-2"  # corpus of prepare_data.py, with GPT-2's tokens unless --flags
    data_dir: Path = DATA  # where prepared corpora are kept
    steps: int = 40  # of each run in killed and handed
    every: int = 10  # steps between checkpoints
    batch_size: int = 512  # sequences a step, over all processes
    flags: str = ""  # more of train.py's, as --flags="--tokenizer bpe --no-compile"
    results: Path = RESULTS  # the file to add to
    smoke: bool = False  # toy sizes on a CPU, to see that it runs: the speeds mean nothing


# --------------------------------------------------------------------------------------------------
# Speed


def speed(args: Args) -> list[dict]:
    """A row of bench/sharding.py for 1, 2, 4 ... processes, with its share of one's speed."""
    rows: list[dict] = []
    n, context = 1, 1024
    with tempfile.TemporaryDirectory() as folder:
        while n <= args.processes:
            file = Path(folder) / f"{n}.jsonl"
            sequences = min(PIECE, args.batch_size // n)
            bench = sharding.Bench(
                "small", processes=n, sequences=sequences, results=file, smoke=args.smoke,
                grad_accum=args.batch_size // (sequences * n), compile=not args.smoke,
                matrix_flops=rows[0]["matrix_flops"] if rows else 0.0,
            )  # fmt: skip
            if not sharding.torchrun(bench, 64 if args.smoke else context):
                raise SystemExit(f"{n} processes: out of memory")
            row = json.loads(file.read_text(encoding="utf-8"))
            one = rows[0]["tokens_per_s"] if rows else row["tokens_per_s"]
            row["scaling"] = row["tokens_per_s"] / (n * one)
            figures = f"{row['tokens_per_s']:,.0f} tokens/s, {row['scaling']:.1%} of {n} times one"
            print(f"{n} processes: {figures}, {row['peak_bytes'] / 1e9:.1f} GB", flush=True)
            rows.append(row)
            n *= 2
    return rows


# --------------------------------------------------------------------------------------------------
# Runs of train.py


def train(
    args: Args, out: Path, processes: int, restarts: int = 0,
    at: int = 0, do: Callable[[int], None] | None = None,
) -> str:  # fmt: skip
    """Begin or resume the run in out, and return what it said.

    do(pid of torchrun, or of the process alone) is called once, when step `at` is told.
    """
    share = args.batch_size // processes
    flags = f"--preset small --tokenizer gpt2 --grad_accum {max(1, share // PIECE)}".split()
    flags = TOY.split() if args.smoke else flags
    flags += [f"--dataset={args.dataset}", f"--data_dir={args.data_dir.resolve()}"]
    flags += [f"--max_iters={args.steps}", f"--eval_interval={args.every}", "--log_interval=1"]
    flags += [f"--batch_size={args.batch_size}", f"--out={out}", "--resume"]
    many = sharding.launcher(processes, f"--max-restarts={restarts}")
    start = many if processes > 1 else [sys.executable]
    command = [*start, str(ROOT / "train.py"), *flags, *shlex.split(args.flags)]
    # Without the last, restarted gloo processes may read addresses of the life before them
    # (PyTorch's issue 135712).
    environment = child_environment(OMP_NUM_THREADS="1", TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
    said = []
    with tempfile.TemporaryFile("w+", encoding="utf-8") as errors, subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True, encoding="utf-8"
    ) as process:
        for line in process.stdout:
            said.append(line)
            step = re.match(r"step +(\d+)", line)
            if do and step and int(step[1]) >= at:
                do(process.pid)
                do = None
        stopped = process.wait()
        errors.seek(0)
        if stopped and "stopped at step" not in "".join(said):
            raise SystemExit(f"{errors.read()}{''.join(said)}\n{shlex.join(command)} failed")
    if do:
        raise SystemExit(f"the run ended before it told step {at}: {''.join(said)}")
    return "".join(said)


def workers(torchrun: int) -> dict[int, int]:
    """Rank -> pid of the processes that torchrun, a pid, has started."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            environment = (folder / "environ").read_bytes() if parent == torchrun else b""
        except OSError:  # it has ended
            continue
        if rank := re.search(rb"(?:^|\0)RANK=(\d+)", environment):
            found[int(rank[1])] = int(folder.name)
    return found


def kill_the_last(torchrun: int) -> None:
    ranks = workers(torchrun)
    os.kill(ranks[max(ranks)], signal.SIGKILL)


def stop(pid: int) -> None:
    """Asks one of the processes to save and end, which all of them then do."""
    ranks = workers(pid) or {0: pid}
    os.kill(ranks[max(ranks)], signal.SIGTERM)


def losses(out: Path) -> dict[int, float]:
    """Step -> validation loss."""
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return {row["step"]: row["val_loss"] for row in map(json.loads, lines) if "val_loss" in row}


def compared(alone: Path, out: Path, said: str) -> dict:
    """A run beside the one that was left alone: at its end, and the largest difference."""
    expected, found = losses(alone), losses(out)
    if expected.keys() != found.keys():
        raise SystemExit(f"steps {sorted(found)} were evaluated, not {sorted(expected)}:\n{said}")
    apart = {step: abs(found[step] - expected[step]) for step in expected}
    last = max(apart)
    resumed = [int(step) for step in re.findall(r"resumed at step (\d+)", said)]
    result = dict(
        val_loss=found[last], alone=expected[last], difference=apart[last],
        largest_difference=max(apart.values()), resumed_at=resumed,
    )  # fmt: skip
    end = f"loss {found[last]:.5f}, left alone {expected[last]:.5f}"
    print(f"  resumed at {resumed}; {end}, apart {apart[last]:.1e} at the end", flush=True)
    return result


def killed(args: Args, alone: Path, folder: Path) -> dict:
    at = args.steps - args.every // 2  # between two checkpoints
    print(f"one of {args.processes} processes dies after step {at}", flush=True)
    out = folder / "killed"
    said = train(args, out, args.processes, restarts=1, at=at, do=kill_the_last)
    return dict(killed_at=at) | compared(alone, out, said)


def handed(args: Args, alone: Path, folder: Path) -> dict:
    result, middle = {}, args.steps // 2 + 1
    for first, then in ((1, args.processes), (args.processes, 1)):
        print(f"{first} and then {then}, from step {middle} or soon after", flush=True)
        out = folder / f"{first}-{then}"
        said = train(args, out, first, at=middle, do=stop)
        said += train(args, out, then)
        result[f"{first} to {then}"] = compared(alone, out, said)
    return result


def tables(results: dict) -> str:
    """What was measured, as Markdown."""
    lines = []
    if part := results.get("speed"):
        lines += ["| GPUs | tokens/s | of N times one GPU's | peak GB each |"]
        lines += ["|---:|---:|---:|---:|"]
        for row in part["figures"]:
            figures = f"{row['tokens_per_s']:,.0f} | {row['scaling']:.1%}"
            lines.append(f"| {row['processes']} | {figures} | {row['peak_bytes'] / 1e9:.1f} |")
    changes = results.get("handed", {}).get("figures", {})
    ends = {f"{change} processes": found for change, found in changes.items()}
    if part := results.get("killed"):
        ends = {f"one of {part['processes']} killed": part["figures"]} | ends
    if ends:
        lines += ["", "| | goes on from step | loss at its end | less an uninterrupted run's |"]
        lines += ["|---|---:|---:|---:|"]
    for name, found in ends.items():
        at = ", ".join(map(str, found["resumed_at"]))
        less = found["val_loss"] - found["alone"]
        lines.append(f"| {name} | {at} | {found['val_loss']:.5f} | {less:.0e} |")
    return "\n".join(lines).strip()


def main(args: Args) -> None:
    require_at_least_1(args, "processes", "steps", "every", "batch_size")
    require_other_results(args, RESULTS)
    if args.processes & (args.processes - 1) or args.processes < 2:
        raise BadInput(f"--processes {args.processes}: give a power of two, at least 2")
    if args.steps < 2 * args.every:
        raise BadInput(f"--steps {args.steps} must be at least twice --every {args.every}")
    pieces = PIECE * args.processes
    least = pieces if args.batch_size > pieces else args.processes
    if args.batch_size % least:
        raise BadInput(f"--batch_size {args.batch_size} must be a multiple of {least}")
    if {"killed", "handed"} & set(args.parts) and not Path("/proc").is_dir():
        raise BadInput("--parts killed handed: need Linux, give --parts speed")
    require_gpus(args)
    where = provenance("cpu" if args.smoke else "cuda") | dict(processes=args.processes)
    results = read_json(args.results)
    args.results.parent.mkdir(parents=True, exist_ok=True)

    def keep(part: str, figures) -> None:
        results[part] = where | dict(figures=figures)
        text = json.dumps(results, indent=1) + "\n"
        write_atomically(args.results, lambda file: file.write(text.encode()))

    if "speed" in args.parts:
        keep("speed", speed(args))
    if {"killed", "handed"} & set(args.parts):
        with tempfile.TemporaryDirectory() as folder:
            print(f"a run of {args.processes} processes that is left alone", flush=True)
            alone = Path(folder) / "alone"
            train(args, alone, args.processes)
            if "killed" in args.parts:
                keep("killed", killed(args, alone, Path(folder)))
            if "handed" in args.parts:
                keep("handed", handed(args, alone, Path(folder)))
    print(f"{tables(results)}\nin {args.results}")


if __name__ == "__main__":
    run_command(main, Args)
