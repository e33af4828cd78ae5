"""Training speed and memory of our presets on several GPUs of one host, shared out and not.

    python experiments/bench/sharding.py --processes 2 --preset paper-7b --shard --checkpoint_blocks

One call measures one setting, at the longest of --contexts that fits: torchrun starts that many
processes for each context in turn, until none runs out of memory. Steps as train.py takes them, of
random tokens, or of --text, whose losses are then told one by one. A line of JSON is added to
--results for each context, what did not fit included:

    tokens_per_s          of all processes together
    share_of_rate         of the GPUs' own bf16 matrix rate, by activated parameters: 6 operations
                          for each weight that a token meets in a matrix product
    share_with_attention  the same and causal attention, 3 n (w_k + w_v) for each token of the
                          context and layer
    peak_bytes            that PyTorch took from a GPU for the steps, of the process with the most
"""

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist

from experiments.bench.training import matrix_rate
from experiments.flags import (
    require_at_least_1,
    require_gpus,
    require_other_results,
    require_positive,
)
from mfa import GPT, Config, preset
from prepare_data import load
from support.cli import BadInput, run_command
from support.machine import Machine, attention_kernels, is_out_of_memory, leave
from support.provenance import ROOT, child_environment, provenance, read_jsonl
from support.run_folder import append_line
from train import (
    Tokens,
    Train,
    make_optimizer,
    match_params,
    set_learning_rate,
    to_device,
    train_step,
)

RESULTS = ROOT / "experiments" / "results" / "sharding.jsonl"
SETTING = (
    "preset", "attn", "processes", "shard", "checkpoint_blocks", "compile", "optimizer",
    "grad_accum", "sequences", "text",
)  # fmt: skip


@dataclass
class Bench:
    """Training speed and memory of a preset on several GPUs of one host."""

    preset: Literal["small", "paper-1b", "paper-7b"] = "small"
    attn: str = "mfa"
    processes: int = 2  # one for each GPU
    shard: bool = False  # as in train.py
    checkpoint_blocks: bool = False  # as in train.py
    compile: bool = False  # as in train.py
    optimizer: Literal["adamw", "muon", "muon_heads"] = "adamw"
    sequences: int = 1  # of each process in a piece of a step
    grad_accum: int = 1  # pieces of each process in a step
    contexts: tuple[int, ...] = (16384, 8192, 4096, 2048, 1024)  # tried in this order
    steps: int = 5  # that are timed, after two that are not
    text: Path | None = None  # a folder of prepare_data.py's; default random tokens
    learning_rate: float = 1e-4  # of all steps
    matrix_flops: float = 0.0  # bf16 operations a second of one GPU; 0: measured
    results: Path = RESULTS  # the file to add to
    smoke: bool = False  # toy sizes on a CPU, to see that it runs: the figures mean nothing


# --------------------------------------------------------------------------------------------------
# One of the processes


def sizes(args: Bench, context: int) -> Config:
    toy = dict(n_layer=2, dim=64, head_dim=16, vocab_size=300, ffn_dim=176, mfa_n_head=4)
    if args.smoke and args.preset == "paper-7b":
        toy |= dict(n_expert=5, moe_ffn_dim=48, shared_ffn_dim=96)
    cfg = preset(args.preset, args.attn, block_size=context, **(toy if args.smoke else {}))
    return cfg if args.attn in ("mha", "fpba") else match_params(cfg)


def operations(cfg: Config) -> tuple[int, float, float]:
    """Weights that a token meets in matrix products; operations of training on one token for them,
    and for causal attention.
    """
    with torch.device("meta"):
        model = GPT(cfg)
    share = cfg.n_expert_active / max(1, cfg.n_expert)
    weights = cfg.tied * model.embed.weight.numel()  # the output head's product
    for name, p in model.named_parameters():
        if p.dim() >= 2 and name != "embed.weight":
            weights += p.numel() * (share if ".experts." in name else 1)
    widths = cfg.heads * 2 * (cfg.latent if cfg.attn in ("mfa", "mfa_kr") else cfg.head_dim)
    weights = round(weights)
    return weights, 6 * weights, 3 * cfg.n_layer * widths * cfg.block_size


def measure(args: Bench, context: int) -> dict:
    """What a line of the results has, in every process."""
    device = "cpu" if args.smoke else "auto"
    with Machine(device, shard=args.shard) as machine, attention_kernels(machine.device):
        on_gpu = machine.device.type == "cuda"
        rate = args.matrix_flops or matrix_rate(machine.device)
        cfg = sizes(args, context)
        torch.manual_seed(0)
        with torch.device(machine.device):  # a 7B takes minutes to fill on a CPU
            model = GPT(cfg)
        params = sum(p.numel() for p in model.parameters())
        model = machine.place(model, args.checkpoint_blocks).train()
        size = machine.world * args.grad_accum * args.sequences
        recipe = Train(
            model=cfg, batch_size=size, grad_accum=args.grad_accum, optimizer=args.optimizer
        )
        optimizer = make_optimizer(model, recipe)
        set_learning_rate(optimizer, args.learning_rate)
        loss_of = machine.loss_function(model, args.compile)
        batches = batches_of(args, recipe, machine)

        def wait() -> None:
            if on_gpu:
                torch.cuda.synchronize()
            machine.sum(torch.zeros(1, device=machine.device)).item()  # for the other processes

        if on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        losses = []
        for step in range(2 + args.steps):
            if step == 2:
                wait()
                began = time.perf_counter()
            losses.append(train_step(model, loss_of, batches(step), optimizer, machine)[0])
        wait()
        seconds = (time.perf_counter() - began) / args.steps
        peak = torch.cuda.max_memory_reserved() if on_gpu else 0
        peaks = torch.tensor([peak], device=machine.device)
        if machine.world > 1:
            dist.all_reduce(peaks, dist.ReduceOp.MAX)
        means = (machine.sum(torch.stack(losses)) / machine.world).tolist()
        where = provenance(machine.device)
    activated, of_weights, of_attention = operations(cfg)
    speed = size * context / seconds  # tokens/s
    share = speed / machine.world / rate
    return dict(
        fits=True, params=params, activated=activated, ms=seconds * 1e3, tokens_per_s=speed,
        matrix_flops=rate, share_of_rate=share * of_weights,
        share_with_attention=share * (of_weights + of_attention), peak_bytes=int(peaks),
        losses=means if args.text else [means[0], means[-1]], **where,
    )  # fmt: skip


def batches_of(args: Bench, recipe: Train, machine: Machine) -> Callable[[int], list]:
    """step -> this process' pieces of its batch, each (sequences, T + 1)."""
    if args.text:
        train_ids, val_ids, meta = load(args.text)
        text = Tokens(args.text, to_device(train_ids, machine.device), val_ids, meta)
        return lambda step: text.batches(recipe, step, machine)
    torch.manual_seed(machine.rank)
    shape = args.grad_accum, args.sequences, recipe.model.block_size + 1
    same = list(torch.randint(recipe.model.vocab_size, shape, device=machine.device))
    return lambda step: same


def setting(args: Bench, context: int) -> dict:
    named = {name: getattr(args, name) for name in SETTING}
    named["text"] = args.text.name if args.text else "random"
    return named | dict(context=context, steps=args.steps, learning_rate=args.learning_rate)


def one_process(args: Bench) -> None:
    """What torchrun starts: exit code 1 and "out of memory" where a context does not fit."""
    (context,) = args.contexts
    try:
        row = measure(args, context)
    except (RuntimeError, MemoryError) as e:
        if not is_out_of_memory(e):
            raise
        print("out of memory", flush=True)
        os._exit(1)  # without waiting for the others, which torchrun ends
    if int(os.environ["RANK"]) == 0:
        append_line(args.results, setting(args, context) | row)
    leave(0)


# --------------------------------------------------------------------------------------------------
# The command


def launcher(processes: int, *flags: str) -> list[str]:
    """torchrun by this Python, with that many processes on this machine."""
    how = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [sys.executable, *how, *flags]


def torchrun(args: Bench, context: int) -> bool:
    """Does the context fit?"""
    flags = [f"--{name}={getattr(args, name)}" for name in ("preset", "attn", "optimizer")]
    numbers = "processes", "sequences", "grad_accum", "steps", "learning_rate", "matrix_flops"
    flags += [f"--{name}={getattr(args, name)}" for name in numbers]
    if args.text:
        flags += ["--text", str(args.text.resolve())]  # of which the results keep the name
    for name in ("shard", "checkpoint_blocks", "compile", "smoke"):
        flags += [f"--{name}"] if getattr(args, name) else []
    command = [*launcher(args.processes), str(Path(__file__).resolve()), *flags]
    done = subprocess.run(
        [*command, f"--contexts={context}", "--results", str(args.results.resolve())],
        env=child_environment(), capture_output=True, text=True, encoding="utf-8",
    )  # fmt: skip
    if done.returncode and "out of memory" not in done.stdout + done.stderr:  # NCCL has its own
        raise SystemExit(f"{done.stdout}{done.stderr}\nthe processes failed, see above")
    return done.returncode == 0


def read(path: Path) -> list[dict]:
    return read_jsonl(path, "sharding.py", lambda row: [row[name] for name in SETTING])


def table(rows: list[dict]) -> str:
    """What fits and how fast, as Markdown, one row a setting: the last measured."""
    lines = [
        "| | GPUs | `--shard` | `--checkpoint_blocks` | how | batch of each GPU | tokens/s "
        "| share of bf16 rate | with attention | peak GB |",
        "|---|---:|---|---|---|---:|---:|---:|---:|---:|",
    ]
    last = {tuple(row[name] for name in SETTING): row for row in rows}
    for row in last.values():
        yes = ["yes" if row[name] else "no" for name in ("shard", "checkpoint_blocks")]
        how = [row["optimizer"], "compiled" if row["compile"] else "eager", row["text"]]
        cells = [f"{row['preset']}, {row['attn']}", str(row["processes"]), *yes, ", ".join(how)]
        if row["fits"]:
            shares = (f"{row[name]:.0%}" for name in ("share_of_rate", "share_with_attention"))
            pieces = f"{row['grad_accum']} x " if row["grad_accum"] > 1 else ""
            size = f"{pieces}{row['sequences']} x {row['context']:,}"
            peak = f"{row['peak_bytes'] / 1e9:.1f}"
            cells += [size, f"{row['tokens_per_s']:,.0f}", *shares, peak]
        else:
            cells += [f"not even {row['context']:,}", "", "", "", ""]
        lines.append(f"| {' | '.join(cells)} |")
    told = [learned(row) for row in last.values() if row["fits"] and row["text"] != "random"]
    return "\n".join([*lines, *told])


def learned(row: dict) -> str:
    """How the loss fell on a text."""
    losses, size = row["losses"], row["processes"] * row["grad_accum"] * row["sequences"]
    what = f"{row['preset']}, {row['attn']} on {row['text']}, {size} x {row['context']:,} a step"
    last = f"{statistics.mean(losses[-5:]):.2f} in the mean of the last five"
    rate = f"rate {row['learning_rate']:g} from the first step on"
    return f"\n{what}, {rate}: loss {losses[0]:.2f} at first, {last} of {len(losses)} steps."


def main(args: Bench) -> None:
    require_at_least_1(args, "processes", "sequences", "grad_accum", "steps")
    require_positive(args, "learning_rate")
    if "RANK" in os.environ:
        return one_process(args)
    require_other_results(args, RESULTS)
    require_gpus(args)
    if not args.contexts or min(args.contexts) < 1:
        raise BadInput(f"--contexts {args.contexts}: give one or more, each at least 1")
    if args.text:
        n_vocab, ours = load(args.text)[2]["vocab_size"], sizes(args, args.contexts[0]).vocab_size
        if n_vocab > ours:
            what = f"has {n_vocab} tokens in its vocabulary, the model {ours}"
            raise BadInput(f"--text {args.text} {what}: give another")
    args.results.parent.mkdir(parents=True, exist_ok=True)
    for context in args.contexts:
        if torchrun(args, context):
            break
        print(f"{context}: out of memory", flush=True)
        device = "cpu" if args.smoke else "cuda"
        row = setting(args, context) | dict(fits=False, **provenance(device))
        append_line(args.results, row)
    print(f"{table(read(args.results))}\nin {args.results}")


if __name__ == "__main__":
    run_command(main, Bench)
