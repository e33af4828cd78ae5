"""Training speed and quality beside nanoGPT, unmodified, in the same run: python experiments/bench_train.py --nanogpt FOLDER

FOLDER is a checkout of karpathy/nanoGPT. Five parts, each with its entry in experiments/results/train.json:

    small    124M parameters, 32 x 1024 tokens a step, compiled, random tokens: steps of nanoGPT, of our MHA and of our
             MFA in turn on one GPU; the median, the peak of memory, the share of the card's own bf16 matrix rate
    baby     tinyshakespeare: each trainer as its own command with its own recipe, one at a time; seconds from the end of
             the first (compiling) step to the first validation loss of 1.48, evaluations included
    seeds    the baby preset's best validation loss over seeds, side by side on the card
    cpu      nanoGPT's recipe for a CPU against our tiny preset: seconds to 1.88, whole commands
    steps    on a CPU, tokens/s at nanoGPT's own size and batch, steps in turn, with and without torch.compile
"""

import importlib
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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import torch._inductor.config
from gpu_time import kernel_times
from provenance import ROOT, provenance, read_json

from mfa import GPT, Config, preset
from prepare_data import DATA, BadInput, load, prepare, run_command, tokenizer_from
from train import (
    Train,
    attention_kernels,
    cache_bytes,
    keep_memory,
    loss_function,
    make_optimizer,
    match_params,
    mha_of,
    pick_device,
    write_atomically,
)

RESULTS = ROOT / "experiments" / "results" / "train.json"
CPU_RECIPE = (
    "--device=cpu --compile=False --eval_iters=20 --log_interval=1 --block_size=64 --batch_size=12 --n_layer=4 --n_head=4 "
    "--n_embd=128 --max_iters=2000 --lr_decay_iters=2000 --dropout=0.0"
)  # nanoGPT's README, "I only have a macbook"


@dataclass
class Bench:
    """Training speed and quality beside nanoGPT in the same run."""

    nanogpt: Path
    """A checkout of karpathy/nanoGPT."""
    part: Literal["small", "baby", "seeds", "cpu", "steps"] = "cpu"
    """What to measure: small, baby and seeds want a GPU, cpu and steps two quiet cores."""
    source: Path | None = None
    """tinyshakespeare's text, where it cannot be downloaded."""
    data_dir: Path = DATA
    """Where prepared corpora are kept."""
    results: Path = RESULTS
    """The file to add to."""
    seeds: int = 3
    """Seeds of each attention in part seeds."""
    first_seed: int = 1337
    """The first of them."""
    preset_flags: str = ""
    """Part seeds: flags of train.py on top of the preset, as --preset_flags="--max_iters 3000"."""
    smoke: bool = False
    """Toy sizes, to see that it runs: the figures mean nothing."""


# ---------------------------------------------------------------------------------------------------------------------
# Steps in turn


def nanogpt_step(folder: Path, cfg: Config, batch: int, device: torch.device, compile: bool) -> tuple[Callable, int]:
    """One training step of nanoGPT's model as its train.py takes it, at cfg's size; and its parameters."""
    sys.path.insert(0, str(folder))
    nano = importlib.import_module("model")
    sys.path.remove(str(folder))
    sizes = dict(n_layer=cfg.n_layer, n_head=cfg.dim // cfg.head_dim, n_embd=cfg.dim, block_size=cfg.block_size)
    model = nano.GPT(nano.GPTConfig(vocab_size=cfg.vocab_size, dropout=0.0, bias=False, **sizes)).to(device)
    optimizer = model.configure_optimizers(0.1, 1e-4, (0.9, 0.95), device.type)
    loss_of = torch.compile(model) if compile else model
    return stepper(
        lambda tokens: loss_of(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())[1], model, optimizer, cfg, batch
    )


def our_step(cfg: Config, batch: int, device: torch.device, compile: bool, tuned: bool = False) -> tuple[Callable, int]:
    """The same of ours, with what train.py does to make it fast. tuned: inductor tries many shapes of each kernel."""
    model, on_gpu = GPT(cfg).to(device).train(), device.type == "cuda"
    optimizer = make_optimizer(model, Train(model=cfg), device)
    for group in optimizer.param_groups:
        group["lr"] = 1e-4
    loss_of = loss_function(
        model, model, torch.bfloat16 if on_gpu else torch.float32, compile=compile and not tuned, graphs=on_gpu
    )
    if tuned:
        loss_of = torch.compile(loss_of, options={"triton.cudagraphs": True, "coordinate_descent_tuning": True})
    return stepper(loss_of, model, optimizer, cfg, batch)


def stepper(loss_of, model, optimizer, cfg: Config, batch: int) -> tuple[Callable, int]:
    device = next(model.parameters()).device
    tokens = torch.randint(cfg.vocab_size, (batch, cfg.block_size + 1), device=device)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = loss_of(tokens)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step, sum(p.numel() for p in model.parameters())


def in_turn(steps: dict[str, Callable], device: torch.device, rounds: int, per_round: int) -> dict[str, float]:
    """Median milliseconds of a step of each, measured in alternating rounds."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    taken = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            step()  # after another's, the first one finds cold caches
            wait()
            clock = time.perf_counter()
            for _ in range(per_round):
                step()
            wait()
            taken[name].append((time.perf_counter() - clock) / per_round * 1e3)
    return {name: statistics.median(times) for name, times in taken.items()}


def matrix_rate(device: torch.device) -> float:
    """bf16 multiply-adds of large random matrices, in floating-point operations a second."""
    n = 8192 if device.type == "cuda" else 512
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    ms = in_turn({"matmul": lambda: a @ b}, device, 5, 10)["matmul"]
    return 2 * n**3 / ms * 1e3


def flops(cfg: Config) -> float:
    """Floating-point operations of training on one token, by the paper-and-pencil count that nanoGPT prints (PaLM,
    appendix B): 6 for each weight in a matrix product, and 6 n (w_k + w_v) for each of block_size tokens, as if attention
    were not causal.
    """
    with torch.device("meta"):
        model = GPT(cfg)
    weights = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2 and name != "embed.weight")
    weights += cfg.tied * model.embed.weight.numel()  # the output head's product
    widths = {"mha": 2 * cfg.head_dim, "mfa": 2 * cfg.latent}[cfg.attn] * cfg.heads
    return 6 * (weights + cfg.n_layer * widths * cfg.block_size)


TRAINERS = ("nanoGPT", "ours, mha", "ours, mfa", "ours, mfa, 14 heads", "ours, mfa, 12 heads")
TUNED = "ours, mha, kernels tuned"  # measured last, in a round of its own: it compiles for minutes


def sizes_of(name: str, smoke: bool) -> Config:
    """Our preset's 16 heads have Table 3's 2H of query width; 14 have 1.75H, as Section 4.4's own models, and 12 have 1.5H."""
    heads = re.search(r"(\d+) heads", name)
    toy = dict(n_layer=2, dim=128, ffn_dim=344, vocab_size=300, block_size=64) if smoke else {}
    if "mfa" not in name:
        return preset("small", "mha", **toy)
    return match_params(preset("small", "mfa", mfa_n_head=int(heads[1]) if heads else 16, **toy))


def make_step(name: str, nanogpt: Path, smoke: bool, device: torch.device) -> tuple[Callable, int]:
    cfg, batch, on_gpu = sizes_of(name, smoke), 2 if smoke else 32, device.type == "cuda"
    if name == "nanoGPT":
        return nanogpt_step(nanogpt, cfg, batch, device, on_gpu)
    return our_step(cfg, batch, device, on_gpu, tuned="tuned" in name and on_gpu)


def peak(name: str, nanogpt: Path, smoke: bool) -> int:
    """Bytes that PyTorch took from the GPU for five steps, CUDA graphs' pools included; in a process of its own."""
    device = pick_device("auto")
    if device.type != "cuda":
        return 0
    torch.set_float32_matmul_precision("high")
    with attention_kernels(device):
        step, _ = make_step(name, nanogpt, smoke, device)
        for _ in range(5):
            step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_reserved()


def small(args: Bench) -> dict:
    device = pick_device("auto")
    if device.type != "cuda" and not args.smoke:
        raise BadInput("--part small needs a CUDA GPU; --smoke shows on a CPU that it runs")
    rounds, per_round = (2, 1) if args.smoke else (7, 10)
    nanogpt, made, rows = args.nanogpt.resolve(), {}, {}
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=spawn, max_tasks_per_child=1) as pool:
        peaks = list(pool.map(peak, TRAINERS, [nanogpt] * len(TRAINERS), [args.smoke] * len(TRAINERS)))
    memory = dict(zip(TRAINERS, peaks, strict=True))  # tuning changes none
    print("peak memory, GB: " + ", ".join(f"{name} {m / 1e9:.1f}" for name, m in memory.items()), flush=True)
    torch.set_float32_matmul_precision("high")
    rate = matrix_rate(device)
    print(f"bf16 matrix products: {rate / 1e12:.0f} TFLOP/s", flush=True)
    cfg, batch = sizes_of("nanoGPT", args.smoke), 2 if args.smoke else 32
    tokens = batch * cfg.block_size
    result = {"matrix_flops": rate, "batch": batch, "context": cfg.block_size, "rows": rows}
    with attention_kernels(device):
        for names in (TRAINERS, (TUNED,)):
            for name in names:
                clock = time.perf_counter()
                made[name], params = make_step(name, nanogpt, args.smoke, device)
                for _ in range(5):
                    made[name]()
                print(f"{name}: {params:,} parameters, compiled in {time.perf_counter() - clock:.0f} s", flush=True)
                rows[name] = {"params": params, "peak_bytes": memory.get(name)}
            ms = in_turn(made, device, rounds, per_round)
            for name in names:
                count, speed = flops(sizes_of(name, args.smoke)), tokens / ms[name] * 1e3
                rows[name] |= {"ms": ms[name], "tokens_per_s": speed, "flops_per_token": count}
                rows[name] |= {"share_of_rate": speed * count / rate, "of_nanogpt": ms["nanoGPT"] / ms[name]}
                rows[name]["of_our_mha"] = ms["ours, mha"] / ms[name]
                rows[name]["gpu_us"], kernels = kernel_times(made[name], 3)
                rows[name]["kernels"] = kernels[:25]
            store(args, "small", result)
    return result


# ---------------------------------------------------------------------------------------------------------------------
# Whole commands


def timed_lines(command: list[str], cwd: Path):
    """(seconds since the start, line) for each line that a command prints. Closing this ends the command."""
    began, lines = time.perf_counter(), queue.Queue()
    environment = {
        **os.environ,
        "PYTHONUNBUFFERED": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path[1:]]),
    }
    process = subprocess.Popen(
        command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8"
    )

    def read() -> None:  # in a thread of its own, so that a slow reader does not shift the times
        for line in process.stdout:
            lines.put((time.perf_counter() - began, line.rstrip()))
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    said = []
    try:
        while (item := lines.get()) is not None:
            said.append(item[1])
            yield item
        if process.wait():
            raise BadInput("the command failed: " + " ".join(command) + "\n" + "\n".join(said[-15:]))
    finally:
        process.kill()
        process.wait()


def race(command: list[str], cwd: Path, start: str, validation: str, target: float, to_end: bool = True) -> dict:
    """Run a trainer. Seconds count from the first line that matches start; validation captures step and loss."""
    first, hit, curve, end = None, None, [], 0.0
    lines = timed_lines(command, cwd)
    for at, line in lines:
        end = at
        if first is None and re.search(start, line):
            first = at
        if found := re.search(validation, line):
            step, loss = int(found[1]), float(found[2])
            curve.append([step, loss, None if first is None else round(at - first, 3)])
            if hit is None and loss <= target and first is not None:
                hit = [step, round(at - first, 3)]
                if not to_end:
                    lines.close()
                    break
    step, loss, _ = min(curve, key=lambda row: row[1])
    return {"seconds_to_target": hit and hit[1], "step_at_target": hit and hit[0], "best": loss, "best_step": step,
            "whole_seconds": round(end, 1), "curve": curve}  # fmt: skip


def nanogpt_copy(folder: Path, text: Path, place: Path) -> Path:
    """A copy of the checkout with tinyshakespeare in it, prepared by nanoGPT's own script."""
    copy = place / "nanoGPT"
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns(".git", "assets", "out*"))
    data = copy / "data" / "shakespeare_char"
    shutil.copyfile(text, data / "input.txt")
    (place / "stand-in").mkdir()
    (place / "stand-in" / "requests.py").write_text(
        "# imported by prepare.py, which needs it only to download\n", encoding="utf-8"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path[1:], str(place / "stand-in")])}
    subprocess.run([sys.executable, "prepare.py"], cwd=data, env=environment, check=True, stdout=subprocess.DEVNULL)
    return copy


# Recipes for reaching nanoGPT's loss soon, where the preset's is for reaching its own best.
QUICK = [
    "--max_iters 425 --learning_rate 3e-3 --dropout 0 --weight_decay 4 --eval_interval 425",
    "--max_iters 375 --learning_rate 3e-3 --dropout 0 --weight_decay 4 --eval_interval 375 --vo_std 0.02",
    "--max_iters 450 --learning_rate 3e-3 --dropout 0 --weight_decay 4 --eval_interval 225",
]
NANO_VALIDATION = r"^step (\d+): train loss [\d.]+, val loss ([\d.]+)"
OUR_VALIDATION = r"^step +(\d+)  validation ([\d.]+)"


def ours(args: Bench, out: Path, *flags: str) -> list[str]:
    places = ["--dataset", "tinyshakespeare", "--data_dir", str(args.data_dir.resolve()), "--out", str(out)]
    return [sys.executable, str(ROOT / "train.py"), *flags, *places]


def baby_run(args: Bench, place: Path, attn: str, seed: int, more: str = "", target: float = 1.48) -> dict:
    toy = "--max_iters 4 --eval_interval 2 --n_layer 1 --dim 64 --eval_tokens 600 --batch_size 4 --log_interval 1"
    flags = ["--preset", "baby", "--attn", attn, "--seed", str(seed), *more.split(), *(toy.split() if args.smoke else [])]
    start = r"^compiled" if torch.cuda.is_available() else r"^step +1 "
    out = Path(tempfile.mkdtemp(dir=place)) / "run"
    return race(ours(args, out, *flags), place, start, OUR_VALIDATION, target)


def baby(args: Bench, text: Path, place: Path) -> dict:
    copy, target = nanogpt_copy(args.nanogpt, text, place), 3.3 if args.smoke else 1.48
    theirs = "--max_iters=4 --eval_interval=2 --eval_iters=1 --n_layer=1 --n_embd=48 --batch_size=2 --log_interval=1"
    theirs = theirs if args.smoke else ""
    if not torch.cuda.is_available():
        theirs += " --device=cpu --compile=False"
    command = [sys.executable, "train.py", "config/train_shakespeare_char.py", *theirs.split()]
    result = {"target": target}
    print("nanoGPT ...", flush=True)
    result["nanoGPT"] = race(command, copy, r"^iter 0:", NANO_VALIDATION, target, to_end=False)
    print(f"nanoGPT: {result['nanoGPT']['seconds_to_target']} s to {target}", flush=True)
    result["quick"] = []
    for attn, more in [*(("mfa", more) for more in QUICK), ("mfa", ""), ("mfa_kr", "")]:
        timed = baby_run(args, place, attn, 1337, more, target)
        print(f"{attn} {more}: {timed['seconds_to_target']} s, best {timed['best']} at {timed['best_step']}", flush=True)
        if more:
            result["quick"].append({"flags": more, "timed": timed})
        else:
            result[attn] = {"timed": timed}
        store(args, "baby", result)
    return result


def seeds(args: Bench, text: Path, place: Path) -> dict:
    jobs = [(attn, args.first_seed + k) for k in range(args.seeds) for attn in ("mfa", "mfa_kr")]
    with ThreadPoolExecutor(len(jobs)) as pool:  # side by side: their losses count, not their times
        found = list(pool.map(lambda job: baby_run(args, place, *job, args.preset_flags), jobs))
    origin = provenance(pick_device("auto"))  # of each row, since a recipe's may be of several runs
    rows = [
        {"attn": attn, "seed": seed} | {k: run[k] for k in ("best", "best_step", "curve")} | origin
        for (attn, seed), run in zip(jobs, found, strict=True)
    ]
    new = {(row["attn"], row["seed"], row["device"]) for row in rows}
    recipes = read_json(args.results).get("seeds", {}).get("recipes", {})
    # Rows of another --first_seed or another card stay.
    kept = [row for row in recipes.get(args.preset_flags, []) if (row["attn"], row["seed"], row["device"]) not in new]
    recipes[args.preset_flags] = sorted(kept + rows, key=lambda row: (row["attn"], row["seed"]))
    return {"recipes": recipes}


def cpu(args: Bench, text: Path, place: Path) -> dict:
    copy, target = nanogpt_copy(args.nanogpt, text, place), 3.5 if args.smoke else 1.88
    theirs = "--max_iters=4 --eval_interval=2 --eval_iters=1" if args.smoke else ""
    toy = "--max_iters 4 --eval_interval 2 --eval_tokens 600 --log_interval 1" if args.smoke else ""
    config = "config/train_shakespeare_char.py"
    result: dict = {"target": target, "threads": torch.get_num_threads()}
    races = {
        "nanoGPT": (
            [sys.executable, "train.py", config, *CPU_RECIPE.split(), *theirs.split()],
            copy,
            r"^iter 0:",
            NANO_VALIDATION,
        )
    }
    for attn in ("mfa_kr", "mfa"):
        flags = ["--preset", "tiny", "--attn", attn, "--log_interval", "1", "--device", "cpu", *toy.split()]
        races[attn] = (ours(args, place / attn, *flags), place, r"^step +1 ", OUR_VALIDATION)
    for name, (command, cwd, start, validation) in races.items():
        print(f"{name} ...", flush=True)
        result[name] = race(command, cwd, start, validation, target)
        print(f"{name}: {result[name]['seconds_to_target']} s to {target}, best {result[name]['best']}", flush=True)
    return result


def steps(args: Bench) -> dict:
    """nanoGPT's feed-forward has 8 H^2 weights, as much as a SwiGLU of 8/3 H, so the parameters are equal."""
    device, sizes = torch.device("cpu"), dict(vocab_size=65, block_size=64, n_layer=4, dim=128, head_dim=32, ffn_dim=344)
    nano = Config(attn="mha", **sizes)
    keep_memory(device)  # in this one process nanoGPT's steps have it, too
    torch.set_float32_matmul_precision("high")
    torch._inductor.config.force_disable_caches = True  # the first step as on a new machine
    rows, made = {}, {}
    for compile in (False, True):
        more = ", compiled" if compile else ""
        for name in ("nanoGPT", "mha", "mfa", "mfa_kr"):
            began, label = time.perf_counter(), name if name == "nanoGPT" else f"ours, {name}"
            if name == "nanoGPT":
                step, params = nanogpt_step(args.nanogpt.resolve(), nano, 12, device, compile)
            else:
                cfg = nano if name == "mha" else match_params(replace(nano, attn=name))
                step, params = our_step(cfg, 12, device, compile)
            step()
            made[label + more] = step
            rows[label + more] = {"params": params, "first_step_s": round(time.perf_counter() - began, 1)}
            print(f"{label}{more}: first step after {rows[label + more]['first_step_s']} s", flush=True)
    ms = in_turn(made, device, 2 if args.smoke else 9, 2 if args.smoke else 40)
    for name, row in rows.items():
        row |= {"ms": ms[name], "tokens_per_s": 12 * 64 / ms[name] * 1e3, "of_nanogpt": ms["nanoGPT"] / ms[name]}
    return {"threads": torch.get_num_threads(), "rows": rows}


# ---------------------------------------------------------------------------------------------------------------------


def table(results: dict, least_seeds: int = 1) -> str:
    """What was measured so far, as Markdown. Of part seeds, the recipes with that many seeds."""

    def reached(row: dict) -> str:
        """Seconds to the target."""
        return f"{row['seconds_to_target']:.1f}" if row["seconds_to_target"] else "not reached"

    lines = []
    if "small" in results:
        part = results["small"]
        lines += [f"124M, {part['batch']} x {part['context']} tokens a step, {part['device']}:", ""]
        columns = {
            "parameters": lambda row: f"{row['params'] / 1e6:.1f}M",
            "ms a step": lambda row: f"{row['ms']:.1f}",
            "of it products": lambda row: f"{row['gpu_us']['matrix products'] / 1000:.1f}" if "gpu_us" in row else "",
            "attention": lambda row: f"{row['gpu_us']['attention'] / 1000:.1f}" if "gpu_us" in row else "",
            "tokens/s": lambda row: f"{row['tokens_per_s']:,.0f}",
            "nanoGPT = 1": lambda row: f"{row['of_nanogpt']:.2f}",
            "share of bf16 rate": lambda row: f"{row['share_of_rate']:.0%}",
            "peak GB": lambda row: f"{row['peak_bytes'] / 1e9:.1f}" if row.get("peak_bytes") else "",
        }
        columns = {head: cell for head, cell in columns.items() if any(map(cell, part["rows"].values()))}
        lines += ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
        for name, row in part["rows"].items():
            lines.append(f"| {name} | " + " | ".join(cell(row) for cell in columns.values()) + " |")
        lines.append("")
    if "baby" in results:
        part = results["baby"]
        lines += [f"baby on tinyshakespeare, {part['device']}:", ""]
        lines += [f"| | seconds to {part['target']} | at step | best validation loss |", "|---|---|---|---|"]
        lines.append(f"| nanoGPT | {reached(part['nanoGPT'])} | {part['nanoGPT']['step_at_target'] or ''} | (stopped there) |")
        for row in part["quick"]:
            timed = row["timed"]
            figures = f"{reached(timed)} | {timed['step_at_target'] or ''} | {timed['best']:.4f}"
            lines.append(f"| ours, mfa, `{row['flags']}` | {figures} |")
        for attn in ("mfa", "mfa_kr"):
            if attn in part:
                timed = part[attn]["timed"]
                lines.append(f"| ours, {attn} | {reached(timed)} | {timed['step_at_target'] or ''} | {timed['best']:.4f} |")
        lines.append("")
    if "seeds" in results:
        best = defaultdict(list)
        for flags, rows in results["seeds"]["recipes"].items():
            for row in rows:
                best[row["attn"], flags, row["device"]].append(row["best"])
        lines += ["Best validation loss of the baby preset with these flags:", ""]
        lines += ["| | cache, of MHA's | flags | GPU | seeds | best, mean | standard deviation |", "|---" * 7 + "|"]
        for (attn, flags, device), losses in sorted(best.items(), key=lambda item: item[0][0]):
            if len(losses) < least_seeds:
                continue
            cfg = preset("baby", attn)
            share = cache_bytes(cfg) / cache_bytes(mha_of(cfg))
            spread = f"{statistics.stdev(losses):.4f}" if len(losses) > 1 else ""
            cells = [attn, f"{share:.2%}", f"`{flags}`" if flags else "none", device, str(len(losses))]
            lines.append(f"| {' | '.join(cells)} | {statistics.mean(losses):.4f} | {spread} |")
        lines.append("")
    if "cpu" in results:
        part = results["cpu"]
        lines += [f"tinyshakespeare on {part['device']}, {part['threads']} threads. nanoGPT: the CPU recipe of its README,"]
        lines += ["2,000 steps of 12 x 64 characters; ours: the tiny preset, 2,000 steps of 16 x 64.", ""]
        lines += [f"| | seconds to {part['target']} | best | whole command, s |", "|---|---|---|---|"]
        for name in ("nanoGPT", "mfa_kr", "mfa"):
            row = part[name]
            ours_or = name if name == "nanoGPT" else f"ours, {name}"
            lines.append(f"| {ours_or} | {reached(row)} | {row['best']:.4f} | {row['whole_seconds']:.0f} |")
        lines.append("")
    if "steps" in results:
        part = results["steps"]
        lines += [f"Steps of 12 x 64 tokens on {part['device']}, {part['threads']} threads:", ""]
        lines += ["| | parameters | tokens/s | nanoGPT = 1 | first step, s |", "|---|---|---|---|---|"]
        for name, row in part["rows"].items():
            speed = f"{row['tokens_per_s']:,.0f} | {row['of_nanogpt']:.2f} | {row['first_step_s']}"
            lines.append(f"| {name} | {row['params'] / 1e6:.2f}M | {speed} |")
        lines.append("")
    return "\n".join(lines)


def main(args: Bench) -> None:
    if not (args.nanogpt / "config" / "train_shakespeare_char.py").is_file():
        raise BadInput(f"--nanogpt {args.nanogpt} is not a checkout of nanoGPT: git clone https://github.com/karpathy/nanoGPT")
    read_json(args.results)  # a damaged one is found before the measurement
    if args.smoke and args.results.resolve() == RESULTS.resolve():
        raise BadInput("--smoke measures a toy, which does not belong among the results: name another file with --results")
    if args.seeds < 1:
        raise BadInput(f"--seeds must be at least 1, not {args.seeds}")
    with tempfile.TemporaryDirectory() as temporary:
        if args.part in ("small", "steps"):
            found = (small if args.part == "small" else steps)(args)
        else:
            folder = prepare("tinyshakespeare", source=args.source and str(args.source), data_dir=args.data_dir)
            text = Path(temporary) / "input.txt"
            text.write_bytes(whole_text(folder))
            found = {"baby": baby, "seeds": seeds, "cpu": cpu}[args.part](args, text, Path(temporary))
    results = store(args, args.part, found)
    print(f"\n{table({args.part: results[args.part]})}\nin {args.results}")


def store(args: Bench, part: str, found: dict) -> dict:
    """Writes what a part has found so far; returns all results."""
    results = read_json(args.results)
    origin = provenance("cpu" if part in ("cpu", "steps") or not torch.cuda.is_available() else "cuda")
    results[part] = found if part == "seeds" else origin | found  # seeds: each row has its own
    args.results.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(args.results, lambda f: f.write((json.dumps(results, indent=1) + "\n").encode()))
    return results


def whole_text(folder: Path) -> bytes:
    """The text that a prepared character-level corpus was made from."""
    train_ids, val_ids, meta = load(folder)
    tokenizer = tokenizer_from(meta["tokenizer"])
    return tokenizer.to_bytes(train_ids.tolist()) + tokenizer.to_bytes(val_ids.tolist())


if __name__ == "__main__":
    run_command(main, Bench)
