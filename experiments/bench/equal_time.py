"""What an attention costs in training and in prefill, so that it can be compared at equal time.

    python experiments/bench/equal_time.py --limit_seconds 540

Three shapes: the studies' 30M, GPT-2's 124M and the paper's 1B, each attention at MHA's number of
parameters. Training is steps of random tokens, float32 weights with products in bfloat16; prefill
is the next token's logits of a batch of prompts, weights in bfloat16. Blocks are compiled in both.
Every attention is timed in turn with an MHA of the same shape: the medians, and their ratio, in
which the state of the card cancels. The optimizer is that of Muon's study at 30M, AdamW elsewhere.
What is measured is appended to results/equal_time.jsonl, the important first, and not measured
again if its line is there. study/plot.py puts it beside the losses.
"""

import gc
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch._dynamo as dynamo

from experiments.bench.training import flops, in_turn, our_step
from experiments.flags import require_other_results, require_positive
from experiments.study.studies import AT_30M, MODERN, RATIO_CORE, VOCAB
from mfa import GPT, Config, cache_bytes, preset
from support.cli import run_command
from support.machine import Machine, attention_kernels, can_compile
from support.provenance import ROOT, provenance, read_jsonl
from support.run_folder import append_line, drop_cut_line
from train import count_params, match_params

RESULTS = ROOT / "experiments" / "results" / "equal_time.jsonl"
ARMS = ("mha", "mfa", "mfa_kr_half_norm", "mqa", "mla_joint", "gqa2", "mfa_half", "mfa_kr")
WITH_NORM = tuple(arm for arm in RATIO_CORE if arm not in ARMS)  # at 30M, beside the losses


class Shape(NamedTuple):
    sizes: dict  # fields of Config
    batch: int
    context: int
    optimizer: str = "adamw"
    per_round: int = 10  # steps


PAPER_1B = asdict(preset("paper-1b", "mha"))
SHAPES = {
    "30M": Shape(dict(**AT_30M, vocab_size=VOCAB), 64, 512, "muon"),
    "124M": Shape(asdict(preset("small", "mha")), 32, 1024, per_round=5),
    "1B": Shape(PAPER_1B, 8, 2048, per_round=3),
    "1B, context 8192": Shape(PAPER_1B, 2, 8192, per_round=3),
}
TOY = dict(n_layer=2, dim=64, head_dim=8, latent_dim=0, rope_dim=4, ffn_dim=176, vocab_size=64)
QUEUE = [  # (shape, what), the important first
    ("30M", "train"), ("1B", "prefill"), ("1B", "train"), ("124M", "train"), ("124M", "prefill"),
    ("30M", "prefill"), ("1B, context 8192", "prefill"), ("1B, context 8192", "train"),
]  # fmt: skip


@dataclass
class Args:
    """Time training and prefill of each attention, in turn with MHA."""

    device: str = "auto"  # auto, cpu, cuda ...
    limit_seconds: float = 540  # begin nothing after this time
    shapes: tuple[Literal[tuple(SHAPES)], ...] = tuple(SHAPES)  # only these
    rounds: int = 5  # in turn, of which the median counts
    results: Path | None = None
    """File of the results; default experiments/results/equal_time.jsonl, with --smoke
    out/equal_time.jsonl."""
    smoke: bool = False  # toy sizes, seconds on a CPU: does it run?


def arms_of(shape: str) -> tuple[str, ...]:
    return ARMS + WITH_NORM if shape == "30M" else ARMS


def config(shape: str, arm: str, toy: bool = False) -> Config:
    """An arm of the study "modern" at a shape: its widths grow with dim, its cache keeps its share
    of MHA's.
    """
    sizes = SHAPES[shape].sizes | (TOY if toy else {})
    context = 16 if toy else SHAPES[shape].context
    fields = dict(MODERN[arm].model)
    for name in {"latent_dim", "q_rank"} & fields.keys():
        fields[name] = fields[name] * sizes["dim"] // AT_30M["dim"]
    if "n_kv_head" in fields:
        fields["n_kv_head"] = sizes["dim"] // sizes["head_dim"] // 4
    return match_params(Config(**{**sizes, **fields, "block_size": context}))


def prefill(cfg: Config, batch: int, machine: Machine, compile: bool) -> Callable[[], None]:
    """A call that takes `batch` prompts of a whole context each."""
    with machine.device:
        model = GPT(cfg).to(torch.bfloat16).eval()
        prompts = torch.randint(cfg.vocab_size, (batch, cfg.block_size))  # (B, T)
    for block in model.blocks if compile else ():
        block.compile(dynamic=False)

    @torch.no_grad()
    def call() -> None:
        model.next_logits(prompts, None)

    return call


def make(shape: str, arm: str, what: str, toy: bool, machine: Machine) -> Callable[[], None]:
    """One step of it, which has been taken three times."""
    cfg, compile = config(shape, arm, toy), can_compile(machine.device) and not toy
    batch = 2 if toy else SHAPES[shape].batch
    if what == "prefill":
        step = prefill(cfg, batch, machine, compile)
    else:
        how = dict(blocks=True, optimizer=SHAPES[shape].optimizer)
        step = our_step(cfg, batch, machine, compile, **how)
    for _ in range(3):
        step()
    return step


def row_of(shape: str, what: str, arm: str, ms: dict[str, float], toy: bool) -> dict:
    """ms: of a step of the arm and of MHA."""
    cfg = config(shape, arm, toy)
    batch = 2 if toy else SHAPES[shape].batch
    row = dict(shape=shape, what=what, arm=arm, batch=batch, context=cfg.block_size)
    if what == "train":
        row |= dict(optimizer=SHAPES[shape].optimizer, flops_per_token=flops(cfg))
    row |= dict(params=count_params(cfg), cache_bytes=cache_bytes(cfg), config=asdict(cfg))
    speed = batch * cfg.block_size / ms[arm] * 1e3
    return row | dict(ms=ms[arm], tokens_per_s=speed, of_mha=ms["mha"] / ms[arm])


def read(path: Path) -> dict[tuple[str, str, str], dict]:
    """The results, by shape, what and arm."""
    rows = read_jsonl(path, "equal_time.py", lambda row: (key_of(row), row["tokens_per_s"]))
    return {key_of(row): row for row in rows}


def key_of(row: dict) -> tuple[str, str, str]:
    return row["shape"], row["what"], row["arm"]


def free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def main(args: Args) -> None:
    require_positive(args, "limit_seconds", "rounds")
    began, toy = time.perf_counter(), args.smoke
    args.results = args.results or (ROOT / "out" / RESULTS.name if toy else RESULTS)
    require_other_results(args, RESULTS)
    done = read(args.results)
    args.results.parent.mkdir(parents=True, exist_ok=True)
    drop_cut_line(args.results)
    no_limit = dynamo.config.patch(recompile_limit=1000)  # all attentions in one process
    with Machine(args.device) as machine, attention_kernels(machine.device), no_limit:
        origin = provenance(machine.device)
        for shape, what in [pair for pair in QUEUE if pair[0] in args.shapes]:
            mha, per_round = None, 1 if toy else SHAPES[shape].per_round
            free(machine.device)
            for arm in arms_of(shape):
                if (shape, what, arm) in done:
                    continue
                if time.perf_counter() - began > args.limit_seconds:
                    print(f"out of time: {shape} {what} {arm} and what follows is left out")
                    return
                try:
                    mha = mha or make(shape, "mha", what, toy, machine)
                    steps = dict(mha=mha)
                    if arm != "mha":
                        steps[arm] = make(shape, arm, what, toy, machine)
                    ms = in_turn(steps, machine.device, args.rounds, per_round)
                except torch.OutOfMemoryError as e:
                    print(f"{shape} {what} {arm}: {str(e).splitlines()[0]}", flush=True)
                else:
                    row = row_of(shape, what, arm, ms, toy)
                    append_line(args.results, row | origin)
                    speed = f"{row['tokens_per_s']:,.0f} tokens/s, {row['of_mha']:.2f} of MHA's"
                    print(f"{shape:17}{what:9}{arm:18}{speed}", flush=True)
                steps = None
                free(machine.device)


if __name__ == "__main__":
    run_command(main, Args)
