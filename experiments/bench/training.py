"""Training speed and quality beside nanoGPT, unmodified, in the same run.

    python experiments/bench/training.py --nanogpt FOLDER

FOLDER is a checkout of karpathy/nanoGPT. Six parts, each with its entry in
experiments/results/train.json:

    small    124M parameters, 32 x 1024 tokens a step, compiled, random tokens: steps of nanoGPT, of
             our MHA and of our MFA in turn on one GPU; the median, the peak of memory, the share of
             the card's own bf16 matrix rate
    baby     tinyshakespeare: each trainer as its own command with its own recipe, one at a time;
             seconds from the end of the first (compiling) step to the first validation loss of
             1.48, evaluations included
    seeds    the baby preset's best validation loss over seeds, side by side on the card
    cpu      nanoGPT's recipe for a CPU against our tiny preset: seconds to 1.88, whole commands
    steps    on a CPU, tokens/s at nanoGPT's own size and batch, steps in turn, with and without
             torch.compile
    muon     what Muon adds to AdamW's step of the presets small and baby, in turn
"""

import importlib
import itertools
import json
import multiprocessing
import os
import queue
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import torch._inductor.config
from torch import Tensor

from experiments.bench.gpu_time import kernel_times
from experiments.flags import require_at_least_1, require_other_results
from experiments.study.run import compiled_loss
from mfa import GPT, Config, cache_bytes, preset
from prepare_data import load, prepare
from support.cli import BadInput, run_command
from support.corpora import DATA
from support.files import write_atomically
from support.machine import Machine, attention_kernels, pick_device
from support.provenance import ROOT, child_environment, provenance, read_json
from support.tokenizers import tokenizer_from
from train import (
    RECIPES,
    Train,
    make_optimizer,
    match_params,
    mha_of,
    set_learning_rate,
    train_step,
)

RESULTS = ROOT / "experiments" / "results" / "train.json"
# nanoGPT's README, "I only have a macbook"
CPU_RECIPE = (
    "--device=cpu --compile=False --eval_iters=20 --log_interval=1 --block_size=64 --batch_size=12 "
    "--n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000 --lr_decay_iters=2000 --dropout=0.0"
)


@dataclass
class Bench:
    """Training speed and quality beside nanoGPT in the same run."""

    nanogpt: Path  # a checkout of karpathy/nanoGPT
    part: Literal["small", "baby", "seeds", "cpu", "steps", "muon"] = "cpu"
    """What to measure: cpu and steps want two quiet cores, the others a GPU."""
    source: Path | None = None  # tinyshakespeare's text, where it cannot be downloaded
    data_dir: Path = DATA  # where prepared corpora are kept
    results: Path = RESULTS  # the file to add to
    seeds: int = 3  # seeds of each attention in part seeds
    first_seed: int = 1337  # the first of them
    preset_flags: str = ""
    """Part seeds: flags of train.py on top of the preset, as --preset_flags="--max_iters 3000"."""
    smoke: bool = False  # toy sizes, to see that it runs: the figures mean nothing


# --------------------------------------------------------------------------------------------------
# Steps in turn


class Stepper:
    """One training step, on the same random tokens each time."""

    def __init__(self, model, loss_of: Callable, optimizer, machine: Machine, size: tuple):
        """size: (B, T + 1) and the vocabulary's."""
        self.model, self.loss_of, self.optimizer = model, loss_of, optimizer
        self.machine = machine
        shape, n_vocab = size
        self.tokens = torch.randint(n_vocab, shape, device=machine.device)
        self.params = sum(p.numel() for p in model.parameters())

    def __call__(self) -> None:
        train_step(self.model, self.loss_of, [self.tokens], self.optimizer, self.machine)


def nanogpt_step(folder: Path, cfg: Config, batch: int, machine: Machine, compile: bool) -> Stepper:
    """nanoGPT's model, optimizer and compilation at cfg's size."""
    sys.path.insert(0, str(folder))
    nano = importlib.import_module("model")
    sys.path.remove(str(folder))
    model = nano.GPT(
        nano.GPTConfig(
            vocab_size=cfg.vocab_size, block_size=cfg.block_size, n_layer=cfg.n_layer,
            n_head=cfg.dim // cfg.head_dim, n_embd=cfg.dim, dropout=0.0, bias=False,
        )
    ).to(machine.device)  # fmt: skip
    optimizer = model.configure_optimizers(0.1, 1e-4, (0.9, 0.95), machine.device.type)
    runner = torch.compile(model) if compile else model

    def loss_of(tokens: Tensor) -> Tensor:
        return runner(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())[1]

    size = (batch, cfg.block_size + 1), cfg.vocab_size
    return Stepper(model, loss_of, optimizer, machine, size)


def our_step(
    cfg: Config, batch: int, machine: Machine, compile: bool, tuned: bool = False,
    blocks: bool = False, optimizer: str = "adamw",
) -> Stepper:  # fmt: skip
    """The same of ours, with what train.py does to make it fast.

    tuned: inductor tries many shapes of each kernel. blocks: compiled as run.py does it, one block
    for all, which takes seconds.
    """
    with machine.device:
        model = GPT(cfg).train()
    optimizer = make_optimizer(model, Train(model=cfg, optimizer=optimizer))
    set_learning_rate(optimizer, 1e-4)
    graphs = machine.device.type == "cuda"
    if blocks:
        loss_of = compiled_loss(model, machine, "blocks" if compile else "no")
    else:
        loss_of = machine.loss_function(model, compile and not tuned, graphs)
    if tuned:
        options = {"triton.cudagraphs": True, "coordinate_descent_tuning": True}
        loss_of = torch.compile(loss_of, options=options)
    size = (batch, cfg.block_size + 1), cfg.vocab_size
    return Stepper(model, loss_of, optimizer, machine, size)


def in_turn(
    steps: dict[str, Callable], device: torch.device, rounds: int, per_round: int
) -> dict[str, float]:
    """Median milliseconds of a step of each, measured in alternating rounds."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    taken = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            step()  # after another's, the first one finds cold caches
            wait()
            began = time.perf_counter()
            for _ in range(per_round):
                step()
            wait()
            taken[name].append((time.perf_counter() - began) / per_round * 1e3)
    return {name: statistics.median(times) for name, times in taken.items()}


def matrix_rate(device: torch.device) -> float:
    """bf16 multiply-adds of large random matrices, in floating-point operations a second."""
    n = 8192 if device.type == "cuda" else 512
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    ms = in_turn({"matmul": lambda: a @ b}, device, 5, 10)["matmul"]
    return 2 * n**3 / ms * 1e3


def flops(cfg: Config) -> float:
    """Floating-point operations of training on one token, by the count that nanoGPT prints (PaLM,
    appendix B): 6 for each weight of a matrix that the token is multiplied by, and 6 n (w_k + w_v)
    for each of block_size tokens, as if attention were not causal. The embedding is a look-up.
    """
    with torch.device("meta"):
        model = GPT(cfg)
        attn, x, pos = model.blocks[0].attn, torch.empty(1, 1, cfg.dim), torch.arange(1)
        q = attn.query(x, pos)  # (1, n, 1, w_k)
        _, v = attn.from_cache(*attn.to_cache(x, pos))  # (1, g, 1, w_v)
    matrices = {name: p for name, p in model.named_parameters() if p.dim() == 2}
    weights = sum(p.numel() for name, p in matrices.items() if name != "embed.weight")
    weights += cfg.tied * model.embed.weight.numel()  # the output head's product
    if hasattr(attn, "n"):  # key reuse: each head's output is multiplied by N
        weights += cfg.n_layer * (cfg.heads - 1) * attn.n.weight.numel()
    widths = cfg.heads * (q.shape[-1] + v.shape[-1])
    return 6 * (weights + cfg.n_layer * widths * cfg.block_size)


TRAINERS = ("nanoGPT", "ours, mha", "ours, mfa", "ours, mfa, 14 heads", "ours, mfa, 12 heads")
# Measured last, in a round of its own: it compiles for minutes.
TUNED = "ours, mha, kernels tuned"


def sizes_of(name: str, smoke: bool) -> Config:
    """Our preset's 16 heads have Table 3's 2H of query width.

    14 have 1.75H, as Section 4.4's own models, and 12 have 1.5H.
    """
    toy = dict(n_layer=2, dim=128, ffn_dim=344, vocab_size=300, block_size=64) if smoke else {}
    if "mfa" not in name:
        return preset("small", "mha", **toy)
    heads = re.search(r"(\d+) heads", name)
    return match_params(preset("small", "mfa", mfa_n_head=int(heads[1]) if heads else 16, **toy))


def batch_of(smoke: bool) -> int:
    return 2 if smoke else 32


def make_step(name: str, nanogpt: Path, smoke: bool, machine: Machine) -> Stepper:
    cfg, batch, on_gpu = sizes_of(name, smoke), batch_of(smoke), machine.device.type == "cuda"
    if name == "nanoGPT":
        return nanogpt_step(nanogpt, cfg, batch, machine, compile=on_gpu)
    return our_step(cfg, batch, machine, compile=on_gpu, tuned="tuned" in name and on_gpu)


def peak_memory(name: str, nanogpt: Path, smoke: bool) -> int:
    """Bytes that PyTorch took from the GPU for five steps, CUDA graphs' pools included.

    To be called in a process of its own.
    """
    with Machine() as machine:
        if machine.device.type != "cuda":
            return 0
        with attention_kernels(machine.device):
            step = make_step(name, nanogpt, smoke, machine)
            for _ in range(5):
                step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_reserved()


def peak_memories(nanogpt: Path, smoke: bool) -> dict[str, int]:
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=spawn, max_tasks_per_child=1) as pool:
        same = [nanogpt] * len(TRAINERS), [smoke] * len(TRAINERS)
        memory = dict(zip(TRAINERS, pool.map(peak_memory, TRAINERS, *same), strict=True))
    line = ", ".join(f"{name} {peak / 1e9:.1f}" for name, peak in memory.items())
    print(f"peak memory, GB: {line}", flush=True)
    return memory


def small(args: Bench) -> dict:
    if pick_device("auto").type != "cuda" and not args.smoke:
        raise BadInput("--part small needs a CUDA GPU; --smoke shows on a CPU that it runs")
    rounds, per_round = (2, 1) if args.smoke else (7, 10)
    nanogpt = args.nanogpt.resolve()
    memory = peak_memories(nanogpt, args.smoke)
    cfg, batch = sizes_of("nanoGPT", args.smoke), batch_of(args.smoke)
    tokens = batch * cfg.block_size
    steps: dict[str, Stepper] = {}
    with Machine() as machine, attention_kernels(machine.device):
        rate = matrix_rate(machine.device)
        print(f"bf16 matrix products: {rate / 1e12:.0f} TFLOP/s", flush=True)
        rows: dict[str, dict] = {}
        result = dict(matrix_flops=rate, batch=batch, context=cfg.block_size, rows=rows)
        for names in (TRAINERS, (TUNED,)):
            for name in names:
                steps[name] = compiled(name, nanogpt, args.smoke, machine)
                # Tuning changes no memory.
                rows[name] = {"params": steps[name].params, "peak_bytes": memory.get(name)}
            ms = in_turn(steps, machine.device, rounds, per_round)
            for name in names:
                count, speed = flops(sizes_of(name, args.smoke)), tokens / ms[name] * 1e3
                rows[name] |= dict(ms=ms[name], tokens_per_s=speed, flops_per_token=count)
                rows[name]["share_of_rate"] = speed * count / rate
                rows[name]["of_nanogpt"] = ms["nanoGPT"] / ms[name]
                rows[name]["of_our_mha"] = ms["ours, mha"] / ms[name]
                rows[name]["gpu_us"], kernels = kernel_times(steps[name], 3)
                rows[name]["kernels"] = kernels[:25]
            store(args, "small", result)
    return result


def compiled(name: str, nanogpt: Path, smoke: bool, machine: Machine) -> Stepper:
    """A step that has been taken five times."""
    began = time.perf_counter()
    step = make_step(name, nanogpt, smoke, machine)
    for _ in range(5):
        step()
    seconds = time.perf_counter() - began
    print(f"{name}: {step.params:,} parameters, compiled in {seconds:.0f} s", flush=True)
    return step


# --------------------------------------------------------------------------------------------------
# Whole commands


def timed_lines(command: list[str], cwd: Path):
    """(seconds since the start, line) for each line that a command prints.

    Closing this ends the command.
    """
    began, lines = time.perf_counter(), queue.Queue()
    environment = child_environment(PYTHONUNBUFFERED="1")
    pipe = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8")
    process = subprocess.Popen(command, cwd=cwd, env=environment, **pipe)

    def read() -> None:  # in a thread of its own, so that a slow reader does not shift the times
        for line in process.stdout:
            lines.put((time.perf_counter() - began, line.rstrip()))
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    printed = []
    try:
        while (item := lines.get()) is not None:
            printed.append(item[1])
            yield item
        if process.wait():
            end = "\n".join(printed[-15:])
            raise BadInput(f"the command failed: {' '.join(command)}\n{end}")
    finally:
        process.kill()
        process.wait()


@dataclass
class Trainer:
    """A training command and what its output looks like, as regular expressions."""

    command: list[str]
    cwd: Path
    start: str  # the line from which seconds count
    validation: str  # captures step and loss


def race(trainer: Trainer, target: float, to_end: bool = True) -> dict:
    """Run a trainer until it reaches the target, or to its end."""
    first, hit, curve, end = None, None, [], 0.0
    lines = timed_lines(trainer.command, trainer.cwd)
    for at, line in lines:
        end = at
        if first is None and re.search(trainer.start, line):
            first = at
        if found := re.search(trainer.validation, line):
            step, loss = int(found[1]), float(found[2])
            curve.append([step, loss, None if first is None else round(at - first, 3)])
            if hit is None and loss <= target and first is not None:
                hit = [step, round(at - first, 3)]
                if not to_end:
                    lines.close()
                    break
    step, loss, _ = min(curve, key=lambda row: row[1])
    return {
        "seconds_to_target": hit and hit[1], "step_at_target": hit and hit[0], "best": loss,
        "best_step": step, "whole_seconds": round(end, 1), "curve": curve,
    }  # fmt: skip


def nanogpt_copy(folder: Path, text: Path, place: Path) -> Path:
    """A copy of the checkout with tinyshakespeare in it, prepared by nanoGPT's own script."""
    copy = place / "nanoGPT"
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns(".git", "assets", "out*"))
    data = copy / "data" / "shakespeare_char"
    shutil.copyfile(text, data / "input.txt")
    stand_in = place / "stand-in"
    stand_in.mkdir()
    comment = "# imported by prepare.py, which needs it only to download\n"
    (stand_in / "requests.py").write_text(comment, encoding="utf-8")
    path = os.pathsep.join([*sys.path[1:], str(stand_in)])
    environment = {**os.environ, "PYTHONPATH": path}
    command = [sys.executable, "prepare.py"]
    subprocess.run(command, cwd=data, env=environment, check=True, stdout=subprocess.DEVNULL)
    return copy


def nanogpt_trainer(copy: Path, flags: str) -> Trainer:
    command = [sys.executable, "train.py", "config/train_shakespeare_char.py", *flags.split()]
    validation = r"^step (\d+): train loss [\d.]+, val loss ([\d.]+)"
    return Trainer(command, copy, r"^iter 0:", validation)


def our_trainer(args: Bench, place: Path, out: Path, start: str, flags: str) -> Trainer:
    command = [sys.executable, str(ROOT / "train.py"), *flags.split()]
    command += ["--dataset", "tinyshakespeare"]
    command += ["--data_dir", str(args.data_dir.resolve()), "--out", str(out)]
    return Trainer(command, place, start, r"^step +(\d+)  validation ([\d.]+)")


# Recipes for reaching nanoGPT's loss soon, where the preset's is for reaching its own best.
REGULARIZED = "--optimizer adamw --batch_size 64 --learning_rate 3e-3 --dropout 0 --weight_decay 4"
MUON = "--optimizer muon --batch_size 32 --learning_rate 8e-3 --dropout 0 --weight_decay 2"
QUICK = [
    f"--max_iters 425 {REGULARIZED} --eval_interval 425",
    f"--max_iters 375 {REGULARIZED} --eval_interval 375 --vo_std 0.02",
    f"--max_iters 450 {REGULARIZED} --eval_interval 225",
    *(f"--max_iters {n} {MUON} --eval_interval {n}" for n in (400, 450)),
]


def baby_run(
    args: Bench, place: Path, attn: str, seed: int, more: str = "", target: float = 1.48
) -> dict:
    flags = f"--preset baby --attn {attn} --seed {seed} {more}"
    if args.smoke:
        flags += " --max_iters 4 --eval_interval 2 --n_layer 1 --dim 64 --eval_tokens 600"
        flags += " --batch_size 4 --log_interval 1"
    start = r"^compiled" if torch.cuda.is_available() else r"^step +1 "
    out = Path(tempfile.mkdtemp(dir=place)) / "run"
    return race(our_trainer(args, place, out, start, flags), target)


def baby(args: Bench, text: Path, place: Path) -> dict:
    copy, target = nanogpt_copy(args.nanogpt, text, place), 3.3 if args.smoke else 1.48
    flags = ""
    if args.smoke:
        flags = "--max_iters=4 --eval_interval=2 --eval_iters=1 --n_layer=1 --n_embd=48"
        flags += " --batch_size=2 --log_interval=1"
    if not torch.cuda.is_available():
        flags += " --device=cpu --compile=False"
    print("nanoGPT ...", flush=True)
    nano = race(nanogpt_trainer(copy, flags), target, to_end=False)
    print(f"nanoGPT: {nano['seconds_to_target']} s to {target}", flush=True)
    result = {"target": target, "nanoGPT": nano, "quick": []}
    for attn, more in [*(("mfa", more) for more in QUICK), ("mfa", ""), ("mfa_kr", "")]:
        timed = baby_run(args, place, attn, 1337, more, target)
        best = f"best {timed['best']} at {timed['best_step']}"
        print(f"{attn} {more}: {timed['seconds_to_target']} s, {best}", flush=True)
        if more:
            result["quick"].append({"flags": more, "timed": timed})
        else:
            result[attn] = {"timed": timed}
        store(args, "baby", result)
    return result


def seeds(args: Bench, text: Path, place: Path) -> dict:
    jobs = [(attn, args.first_seed + k) for k in range(args.seeds) for attn in ("mfa", "mfa_kr")]
    with ThreadPoolExecutor(len(jobs)) as pool:  # side by side: their losses count, not their times
        runs = list(pool.map(lambda job: baby_run(args, place, *job, args.preset_flags), jobs))
    origin = provenance(pick_device("auto"))  # of each row, since a recipe's may be of several runs
    rows = [
        dict(attn=attn, seed=seed) | {k: run[k] for k in ("best", "best_step", "curve")} | origin
        for (attn, seed), run in zip(jobs, runs, strict=True)
    ]

    def which(row: dict) -> tuple:
        return row["attn"], row["seed"], row["device"]

    new = set(map(which, rows))
    recipes = read_json(args.results).get("seeds", {}).get("recipes", {})
    # Rows of another --first_seed or another card stay.
    old = [row for row in recipes.get(args.preset_flags, []) if which(row) not in new]
    recipes[args.preset_flags] = sorted(old + rows, key=lambda row: (row["attn"], row["seed"]))
    return {"recipes": recipes}


def cpu(args: Bench, text: Path, place: Path) -> dict:
    copy, target = nanogpt_copy(args.nanogpt, text, place), 3.5 if args.smoke else 1.88
    theirs, ours = CPU_RECIPE, "--preset tiny --log_interval 1 --device cpu"
    if args.smoke:
        theirs += " --max_iters=4 --eval_interval=2 --eval_iters=1"
        ours += " --max_iters 4 --eval_interval 2 --eval_tokens 600"
    trainers = {"nanoGPT": nanogpt_trainer(copy, theirs)}
    for attn in ("mfa_kr", "mfa"):
        flags = f"{ours} --attn {attn}"
        trainers[attn] = our_trainer(args, place, place / attn, r"^step +1 ", flags)
    result: dict = {"target": target, "threads": torch.get_num_threads()}
    for name, trainer in trainers.items():
        print(f"{name} ...", flush=True)
        result[name] = timed = race(trainer, target)
        seconds, best = timed["seconds_to_target"], timed["best"]
        print(f"{name}: {seconds} s to {target}, best {best}", flush=True)
    return result


def steps(args: Bench) -> dict:
    """nanoGPT's feed-forward has as many weights as a SwiGLU of 8/3 H: the parameters are equal."""
    nano = Config(
        attn="mha", vocab_size=65, block_size=64, n_layer=4, dim=128, head_dim=32, ffn_dim=344
    )
    torch._inductor.config.force_disable_caches = True  # the first step as on a new machine
    rows, made = {}, {}
    with Machine("cpu") as machine:
        for compile, name in itertools.product((False, True), ("nanoGPT", "mha", "mfa", "mfa_kr")):
            began = time.perf_counter()
            if name == "nanoGPT":
                step = nanogpt_step(args.nanogpt.resolve(), nano, 12, machine, compile)
            else:
                cfg = nano if name == "mha" else match_params(replace(nano, attn=name))
                step = our_step(cfg, 12, machine, compile)
            step()
            label = name if name == "nanoGPT" else f"ours, {name}"
            label += ", compiled" if compile else ""
            made[label] = step
            seconds = round(time.perf_counter() - began, 1)
            rows[label] = {"params": step.params, "first_step_s": seconds}
            print(f"{label}: first step after {seconds} s", flush=True)
        rounds = (2, 2) if args.smoke else (9, 40)
        ms = in_turn(made, machine.device, *rounds)
    for name, row in rows.items():
        row |= dict(ms=ms[name], tokens_per_s=12 * 64 / ms[name] * 1e3)
        row["of_nanogpt"] = ms["nanoGPT"] / ms[name]
    return {"threads": torch.get_num_threads(), "rows": rows}


def muon(args: Bench) -> dict:
    """Steps with either optimizer, on the same model.

    small's recipe takes a step after 16 pieces of a batch: one is timed, and added() counts 16.
    """
    rounds = (2, 2) if args.smoke else (9, 20)
    rows: dict[str, dict] = {}
    for name, attn in itertools.product(("baby", "small"), ("mha", "mfa", "mfa_kr")):
        pieces = RECIPES[name].get("grad_accum", 1)
        batch = 2 if args.smoke else RECIPES[name]["batch_size"] // pieces
        toy = dict(n_layer=2, dim=64, head_dim=16, ffn_dim=172, vocab_size=100, block_size=32)
        cfg = match_params(preset(name, attn, dropout=0.0, **(toy if args.smoke else {})))
        with Machine() as machine, attention_kernels(machine.device):
            adamw = our_step(cfg, batch, machine, compile=machine.device.type == "cuda")
            steps = dict(adamw=adamw)
            for optimizer in ("muon", "muon_heads"):
                other = copy(adamw)
                other.optimizer = make_optimizer(adamw.model, Train(model=cfg, optimizer=optimizer))
                set_learning_rate(other.optimizer, 1e-5)
                steps[optimizer] = other
            for step in [*steps.values()] * 5:
                step()
            ms = in_turn(steps, machine.device, *rounds)
        row = dict(ms=ms, batch=batch, pieces=pieces)
        rows[f"{name}, {attn}"] = row
        shares = (f"{added(row, optimizer):.1%}" for optimizer in ("muon", "muon_heads"))
        print(f"{name}, {attn}: {ms}, {' and '.join(shares)} of a step", flush=True)
        store(args, "muon", {"rows": rows})
    return {"rows": rows}


def added(row: dict, optimizer: str) -> float:
    """What Muon adds to the recipe's step with AdamW, as a share of it."""
    ms = row["ms"]
    return (ms[optimizer] - ms["adamw"]) / (row["pieces"] * ms["adamw"])


# --------------------------------------------------------------------------------------------------
# What is shown


def table(results: dict, least_seeds: int = 1) -> str:
    """What was measured so far, as Markdown. Of part seeds, the recipes with that many seeds."""
    tables = dict(
        small=small_table,
        baby=baby_table,
        seeds=lambda part: seeds_table(part, least_seeds),
        cpu=cpu_table,
        steps=steps_table,
        muon=muon_table,
    )
    lines = []
    for part, lines_of in tables.items():
        if part in results:
            lines += [*lines_of(results[part]), ""]
    return "\n".join(lines)


def seconds_to_target(row: dict) -> str:
    return f"{row['seconds_to_target']:.1f}" if row["seconds_to_target"] else "not reached"


def small_table(part: dict) -> list[str]:
    def kernels(kind: str) -> Callable[[dict], str]:
        return lambda row: f"{row['gpu_us'][kind] / 1000:.1f}" if "gpu_us" in row else ""

    columns = {
        "parameters": lambda row: f"{row['params'] / 1e6:.1f}M",
        "ms a step": lambda row: f"{row['ms']:.1f}",
        "of it products": kernels("matrix products"),
        "attention": kernels("attention"),
        "tokens/s": lambda row: f"{row['tokens_per_s']:,.0f}",
        "nanoGPT = 1": lambda row: f"{row['of_nanogpt']:.2f}",
        "share of bf16 rate": lambda row: f"{row['share_of_rate']:.0%}",
        "peak GB": lambda row: f"{row['peak_bytes'] / 1e9:.1f}" if row.get("peak_bytes") else "",
    }
    rows = part["rows"].values()
    filled = {head: cell for head, cell in columns.items() if any(map(cell, rows))}
    size = f"{part['batch']} x {part['context']} tokens a step"
    lines = [f"124M, {size}, {part['device']}:", ""]
    lines += ["| | " + " | ".join(filled) + " |", "|---" * (len(filled) + 1) + "|"]
    for name, row in part["rows"].items():
        lines.append(f"| {name} | " + " | ".join(cell(row) for cell in filled.values()) + " |")
    return lines


def baby_table(part: dict) -> list[str]:
    head = f"| | seconds to {part['target']} | at step | best validation loss |"
    lines = [f"baby on tinyshakespeare, {part['device']}:", "", head, "|---|---|---|---|"]

    def add(name: str, row: dict, best: str) -> None:
        step = row["step_at_target"] or ""
        lines.append(f"| {name} | {seconds_to_target(row)} | {step} | {best} |")

    add("nanoGPT", part["nanoGPT"], "(stopped there)")
    runs = [(f"ours, mfa, `{row['flags']}`", row["timed"]) for row in part["quick"]]
    runs += [(f"ours, {attn}", part[attn]["timed"]) for attn in ("mfa", "mfa_kr") if attn in part]
    for name, timed in runs:
        add(name, timed, f"{timed['best']:.4f}")
    return lines


def seeds_table(part: dict, least_seeds: int) -> list[str]:
    best = defaultdict(list)
    for flags, rows in part["recipes"].items():
        for row in rows:
            best[row["attn"], flags, row["device"]].append(row["best"])
    head = "| | cache, of MHA's | flags | GPU | seeds | best, mean | standard deviation |"
    lines = ["Best validation loss of the baby preset with these flags:", ""]
    lines += [head, "|---" * 7 + "|"]
    for (attn, flags, device), losses in sorted(best.items(), key=lambda item: item[0][0]):
        if len(losses) < least_seeds:
            continue
        cfg = preset("baby", attn)
        share = cache_bytes(cfg) / cache_bytes(mha_of(cfg))
        spread = f"{statistics.stdev(losses):.4f}" if len(losses) > 1 else ""
        text = f"`{flags}`" if flags else "none"
        cells = [attn, f"{share:.2%}", text, device, str(len(losses))]
        lines.append(f"| {' | '.join(cells)} | {statistics.mean(losses):.4f} | {spread} |")
    return lines


def cpu_table(part: dict) -> list[str]:
    lines = [
        f"tinyshakespeare on {part['device']}, {part['threads']} threads. nanoGPT: the CPU recipe "
        f"of its README,",
        "2,000 steps of 12 x 64 characters; ours: the tiny preset, 2,000 steps of 16 x 64.",
        "",
        f"| | seconds to {part['target']} | best | whole command, s |",
        "|---|---|---|---|",
    ]
    for name in ("nanoGPT", "mfa_kr", "mfa"):
        row, label = part[name], name if name == "nanoGPT" else f"ours, {name}"
        figures = f"{seconds_to_target(row)} | {row['best']:.4f} | {row['whole_seconds']:.0f}"
        lines.append(f"| {label} | {figures} |")
    return lines


def steps_table(part: dict) -> list[str]:
    lines = [f"Steps of 12 x 64 tokens on {part['device']}, {part['threads']} threads:", ""]
    lines += ["| | parameters | tokens/s | nanoGPT = 1 | first step, s |", "|---|---|---|---|---|"]
    for name, row in part["rows"].items():
        speed = f"{row['tokens_per_s']:,.0f} | {row['of_nanogpt']:.2f} | {row['first_step_s']}"
        lines.append(f"| {name} | {row['params'] / 1e6:.2f}M | {speed} |")
    return lines


def muon_table(part: dict) -> list[str]:
    lines = [f"Muon beside AdamW, {part['device']}, in turn:", ""]
    kinds = {"muon": "Muon", "muon_heads": "Muon, heads one by one"}  # older results have not both
    kinds = {k: v for k, v in kinds.items() if all(k in row["ms"] for row in part["rows"].values())}
    heads = ["", "sequences", "ms, AdamW", *(f"ms, {name}" for name in kinds.values())]
    heads += [f"{name} adds, of the recipe's step" for name in kinds.values()]
    lines += [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, row in part["rows"].items():
        cells = [name, str(row["batch"]), f"{row['ms']['adamw']:.2f}"]
        cells += [f"{row['ms'][k]:.2f}" for k in kinds]
        cells += [f"{added(row, k):.1%}" for k in kinds]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main(args: Bench) -> None:
    if not (args.nanogpt / "config" / "train_shakespeare_char.py").is_file():
        what = "is not a checkout of nanoGPT: git clone https://github.com/karpathy/nanoGPT"
        raise BadInput(f"--nanogpt {args.nanogpt} {what}")
    read_json(args.results)  # a damaged one is found before the measurement
    require_other_results(args, RESULTS)
    require_at_least_1(args, "seeds")
    with tempfile.TemporaryDirectory() as temporary:
        if args.part in ("small", "steps", "muon"):
            found = dict(small=small, steps=steps, muon=muon)[args.part](args)
        else:
            source = args.source and str(args.source)
            folder = prepare("tinyshakespeare", source=source, data_dir=args.data_dir)
            text = Path(temporary) / "input.txt"
            text.write_bytes(whole_text(folder))
            measure = {"baby": baby, "seeds": seeds, "cpu": cpu}[args.part]
            found = measure(args, text, Path(temporary))
    results = store(args, args.part, found)
    print(f"\n{table({args.part: results[args.part]})}\nin {args.results}")


def store(args: Bench, part: str, found: dict) -> dict:
    """Writes what a part has found so far; returns all results."""
    results = read_json(args.results)
    on_cpu = part in ("cpu", "steps") or not torch.cuda.is_available()
    origin = provenance("cpu" if on_cpu else "cuda")
    results[part] = found if part == "seeds" else origin | found  # seeds: each row has its own
    args.results.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(results, indent=1) + "\n"
    write_atomically(args.results, lambda file: file.write(text.encode()))
    return results


def whole_text(folder: Path) -> bytes:
    """The text that a prepared character-level corpus was made from."""
    train_ids, val_ids, meta = load(folder)
    tokenizer = tokenizer_from(meta["tokenizer"])
    return tokenizer.to_bytes(train_ids.tolist()) + tokenizer.to_bytes(val_ids.tolist())


if __name__ == "__main__":
    run_command(main, Bench)
