"""How far rounding to bfloat16 moves an attention's gradient, on the way through a training.

    python experiments/probes/rounding.py

Small models learn the embedded Shakespeare in float32. Every 25 steps the gradient of the batch
that comes next is computed twice by the same eager code on a CPU, in float32 and under bfloat16's
autocast, and compared: |g16 - g32| / |g32|. What differs is rounding and nothing else; no GPU's
kernel is involved. run.py, which stops a run whose gradient is not that of other kernels, has to
allow for it. Beside it stands how far the scores of one query are apart, at most: the larger scores
are, the more does rounding of queries and keys move the weights. Then the same models learn the
same batches with bfloat16's gradients: do they end worse?

A run takes one to three minutes; each appends its line to results/rounding.jsonl as it ends, and is
not trained again if its line is there. plot.py shows them.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from experiments.study.run import gradient
from experiments.study.studies import MFA, MHA, MQA, Arm
from mfa import GPT, Attention, Config
from prepare_data import load, prepare
from support.cli import BadInput, run_command
from support.machine import Machine
from support.provenance import ROOT, provenance, read_jsonl
from support.run_folder import append_line, drop_cut_line
from train import (
    Train,
    batch_starts,
    learning_rate,
    make_optimizer,
    match_params,
    set_learning_rate,
    take,
    to_device,
    train_step,
)

RESULTS = ROOT / "experiments" / "results" / "rounding.jsonl"
STEPS, EVERY = 500, 25
RATES, DTYPES = (4e-3, 8e-3), ("float32", "bfloat16")
SIZE = dict(block_size=256, n_layer=4, dim=128, head_dim=16, rope_dim=8, ffn_dim=352)
MLA = dict(attn="mla", joint_kv=True, latent_dim=32)
MLA_HALF = dict(attn="mla", joint_kv=True, latent_dim=64)
ARMS = {  # fields of Config, on top of SIZE
    "mha": Arm("MHA", MHA),
    "mqa": Arm("MQA", MQA),
    "mfa": Arm("MFA, C = dim/8, 16 heads", MFA),
    "mfa_half": Arm("MFA, query rank dim/2", dict(**MFA, q_rank=64)),
    "mla": Arm("MLA, joint latent of dim/4", MLA),
    "mla_half": Arm("MLA, joint latent of dim/2", MLA_HALF),
    "mla_norm": Arm(
        "MLA, joint latent of dim/2 with its RMSNorm", dict(**MLA_HALF, latent_norm=True)
    ),
}


@dataclass
class Args:
    """Train small models in float32 and in bfloat16 and compare the two gradients on the way."""

    steps: int = STEPS  # of each run
    results: Path = RESULTS  # file of the results


@torch.no_grad()
def score_range(model: GPT, tokens: Tensor) -> float:
    """The largest difference between two scores of one query, over layers, heads and positions.

    tokens: (B, T).
    """
    ranges: list[float] = []

    def watched(attn: Attention) -> Callable:
        def attend(q: Tensor, k: Tensor, v: Tensor, pos: Tensor) -> Tensor:
            keys = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)  # (B, n, T, w)
            scores = attn.scale * q @ keys.mT  # (B, n, T, T)
            future = torch.ones_like(scores[0, 0]).triu(1).bool()  # (T, T)
            largest = scores.masked_fill(future, -torch.inf).amax(-1)  # (B, n, T)
            least = scores.masked_fill(future, torch.inf).amin(-1)  # (B, n, T)
            ranges.append((largest - least).max().item())
            return type(attn).attend(attn, q, k, v, pos)

        return attend

    for block in model.blocks:
        block.attn.attend = watched(block.attn)
    model(tokens)
    for block in model.blocks:
        del block.attn.attend
    return max(ranges)


def compare(model: GPT, loss_of: Callable, tokens: Tensor) -> list[float]:
    """A point of the curve, after its step.

    The loss in float32, |g16 - g32| / |g32|, |g16| / |g32| - 1, and score_range.
    """
    _, g16 = gradient(model, loss_of, tokens, torch.bfloat16)
    loss, g32 = gradient(model, loss_of, tokens, torch.float32)
    moved = ((g16 - g32).norm() / g32.norm()).item()
    norm = (g16.norm() / g32.norm()).item() - 1
    scores = score_range(model, tokens[:, :-1])
    return [round(loss.item(), 4), round(moved, 4), round(norm, 4), round(scores, 2)]


def train_run(arm: str, lr: float, dtype: str, steps: int) -> dict:
    """dtype: of the gradients that it learns from. curve: [[step, *compare()], ...]."""
    began = time.perf_counter()
    train_ids, _, meta = load(prepare())
    cfg = match_params(Config(vocab_size=meta["vocab_size"], **SIZE, **ARMS[arm].model))
    args = Train(
        model=cfg, batch_size=8, max_iters=1000, learning_rate=lr, warmup_iters=50, seed=0
    )
    torch.manual_seed(args.seed)
    model, curve = GPT(cfg).train(), []
    optimizer = make_optimizer(model, args)
    # Under autocast the residual stream is bfloat16; without it this is the loss in float32.
    loss_of = Machine("cpu", "bfloat16").loss_function(model)
    with Machine("cpu", dtype) as machine:
        ids = to_device(train_ids, machine.device)
        for step in range(steps):
            set_learning_rate(optimizer, learning_rate(step, args))
            starts = batch_starts(args, step, len(ids))
            tokens = take(ids, starts, cfg.block_size + 1, machine.device)  # (B, T + 1)
            if step % EVERY == EVERY - 1:
                curve.append([step + 1, *compare(model, loss_of, tokens)])
            train_step(model, loss_of, [tokens], optimizer, machine, args.grad_clip)
    params = sum(p.numel() for p in model.parameters())
    seconds = round(time.perf_counter() - began, 1)
    return dict(curve=curve, params=params, of=steps, seconds=seconds)


def read(path: Path) -> dict[tuple[str, float, str], dict]:
    """The results, by arm, learning rate and dtype of training (float32 where a line has none)."""
    rows = read_jsonl(
        path, "rounding.py", lambda row: (row["arm"], row["lr"], row["curve"][0][4])
    )
    return {(row["arm"], row["lr"], row.get("dtype", "float32")): row for row in rows}


def summary(row: dict) -> list[str]:
    """Of a line: median and largest distance of the gradients, largest difference of their norms,
    median range of the scores, mean of the last four losses.
    """
    _, loss, moved, norm, scores = zip(*row["curve"], strict=True)
    return [
        f"{statistics.median(moved):.1%}",
        f"{max(moved):.1%}",
        f"{max(map(abs, norm)):.1%}",
        f"{statistics.median(scores):.0f}",
        f"{statistics.mean(loss[-4:]):.2f}",
    ]


def main(args: Args) -> None:
    if args.steps < EVERY:
        what = f"at least {EVERY}, after which the gradients are compared first"
        raise BadInput(f"--steps must be {what}, not {args.steps}")
    done, origin = read(args.results), provenance()
    args.results.parent.mkdir(parents=True, exist_ok=True)
    drop_cut_line(args.results)
    runs = [(arm, lr, dtype) for dtype in DTYPES for lr in RATES for arm in ARMS]
    left = [run for run in runs if run not in done]
    print(f"{len(left)} runs to make, {len(done)} are made", flush=True)
    for n, (arm, lr, dtype) in enumerate(left, 1):
        found = train_run(arm, lr, dtype, args.steps)
        row = dict(arm=arm, lr=lr, dtype=dtype, **found, **origin)
        append_line(args.results, row)
        median, most, norm, scores, loss = summary(row)
        moved = f"gradient off by {median} (median), {most} (most), its norm by {norm}"
        text = f"{moved}, scores apart by {scores}, loss {loss}"
        name = f"{ARMS[arm].name:43} lr {lr:g}, {dtype:8}"
        print(f"{n:3}/{len(left)}  {name}  {text}  {row['seconds']:.0f} s", flush=True)
    print(f"{args.results}\nnext: python experiments/study/plot.py")


if __name__ == "__main__":
    run_command(main, Args)
