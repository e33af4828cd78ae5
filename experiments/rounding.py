"""How far rounding to bfloat16 moves an attention's gradient, on the way through a training: python experiments/rounding.py

Small models learn the embedded Shakespeare in float32. Every 25 steps the gradient of the batch that comes next is computed
twice by the same eager code on a CPU, in float32 and under bfloat16's autocast, and compared: |g16 - g32| / |g32|. What differs
is rounding and nothing else; no GPU's kernel is involved. run.py, which stops a run whose gradient is not that of other
kernels, has to allow for it. Beside it stands how far the scores of one query are apart, at most: the larger scores are, the
more does rounding of queries and keys move the weights. Then the same models learn the same batches with bfloat16's gradients:
do they end higher?

A run takes one to three minutes; each appends its line to results/rounding.jsonl as it ends, and one whose line is there is
not made again. plot.py shows them.
"""

import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from provenance import ROOT, provenance
from run import append, gradient, without_rest
from studies import MFA, MHA, MQA, Arm, read_lines
from torch import Tensor

from mfa import GPT, Attention, Config
from prepare_data import BadInput, load, prepare, run_command
from train import (
    Train,
    as_tensor,
    batch_starts,
    keep_memory,
    learning_rate,
    loss_function,
    make_optimizer,
    match_params,
    window,
)

RESULTS = ROOT / "experiments" / "results" / "rounding.jsonl"
STEPS, EVERY, RATES, DTYPES = 500, 25, (4e-3, 8e-3), (torch.float32, torch.bfloat16)
SIZE = dict(block_size=256, n_layer=4, dim=128, head_dim=16, rope_dim=8, ffn_dim=352)
MLA, MLA_HALF = dict(attn="mla", joint_kv=True, latent_dim=32), dict(attn="mla", joint_kv=True, latent_dim=64)
ARMS = {  # fields of Config, on top of SIZE
    "mha": Arm("MHA", MHA),
    "mqa": Arm("MQA", MQA),
    "mfa": Arm("MFA, C = dim/8, 16 heads", MFA),
    "mfa_half": Arm("MFA, query rank dim/2", dict(**MFA, q_rank=64)),
    "mla": Arm("MLA, joint latent of dim/4", MLA),
    "mla_half": Arm("MLA, joint latent of dim/2", MLA_HALF),
    "mla_norm": Arm("MLA, joint latent of dim/2 with its RMSNorm", dict(**MLA_HALF, latent_norm=True)),
}


@dataclass
class Args:
    """Train small models in float32 and in bfloat16 and compare the two gradients on the way."""

    steps: int = STEPS
    """Of each run."""
    results: Path = RESULTS
    """File of the results."""


@torch.no_grad()
def score_range(model: GPT, tokens: Tensor) -> float:
    """The largest difference between two scores of one query, over the layers, heads and positions of tokens (B, T)."""

    def watched(attn: Attention):
        def attend(q: Tensor, k: Tensor, v: Tensor, pos: Tensor) -> Tensor:
            scores = attn.scale * q @ k.repeat_interleave(q.shape[1] // k.shape[1], dim=1).mT  # (B, n, T, T)
            future = torch.ones_like(scores[0, 0]).triu(1).bool()
            largest, least = scores.masked_fill(future, -torch.inf).amax(-1), scores.masked_fill(future, torch.inf).amin(-1)
            found.append((largest - least).max().item())
            return type(attn).attend(attn, q, k, v, pos)

        return attend

    found: list[float] = []
    for block in model.blocks:
        block.attn.attend = watched(block.attn)
    model(tokens)
    for block in model.blocks:
        del block.attn.attend
    return max(found)


def train_run(arm: str, lr: float, dtype: torch.dtype, steps: int) -> dict:
    """dtype: of the gradients that it learns from.

    curve: [[step, loss in float32, |g16 - g32| / |g32|, |g16| / |g32| - 1, range of a query's scores], ...]
    """
    device, began = torch.device("cpu"), time.perf_counter()
    keep_memory(device)
    ids, _, meta = load(prepare())
    ids = as_tensor(ids, device)
    cfg = match_params(Config(vocab_size=meta["vocab_size"], **SIZE, **ARMS[arm].model))
    args = Train(model=cfg, batch_size=8, max_iters=1000, learning_rate=lr, warmup_iters=50, seed=0)
    torch.manual_seed(args.seed)
    model, curve = GPT(cfg).train(), []
    optimizer, loss_of = make_optimizer(model, args, device), loss_function(model, model, torch.bfloat16, False, False)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args)
        tokens = window(ids, batch_starts(args, step, len(ids)), cfg.block_size + 1, device)  # (B, T + 1)
        if step % EVERY == EVERY - 1:
            (_, g16), (loss, g32) = (gradient(model, loss_of, tokens, each) for each in (torch.bfloat16, torch.float32))
            off, norm = ((g16 - g32).norm() / g32.norm()).item(), (g16.norm() / g32.norm()).item() - 1
            scores = score_range(model, tokens[:, :-1])
            curve.append([step + 1, round(loss.item(), 4), round(off, 4), round(norm, 4), round(scores, 2)])
        gradient(model, loss_of, tokens, dtype)
        torch.nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip)
        optimizer.step()
    params, seconds = sum(p.numel() for p in model.parameters()), round(time.perf_counter() - began, 1)
    return dict(curve=curve, params=params, of=steps, seconds=seconds)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def read(path: Path) -> dict[tuple[str, float, str], dict]:
    """The results, by arm, learning rate and the name of the dtype that it learned in (float32 where a line has none)."""
    rows = read_lines(path, "rounding.py", lambda row: (row["arm"], row["lr"], row["curve"][0][4]))
    return {(row["arm"], row["lr"], row.get("dtype", "float32")): row for row in rows}


def summary(row: dict) -> list[str]:
    """Of a line: median and largest distance, largest difference of the norms, median range of the scores, mean of the last
    four losses."""
    _, loss, off, norm, scores = zip(*row["curve"], strict=True)
    median, most = f"{statistics.median(off):.1%}", f"{max(off):.1%}"
    return [median, most, f"{max(map(abs, norm)):.1%}", f"{statistics.median(scores):.0f}", f"{statistics.mean(loss[-4:]):.2f}"]


def main(args: Args) -> None:
    if args.steps < EVERY:
        raise BadInput(f"--steps must be at least {EVERY}, after which the gradients are compared first, not {args.steps}")
    done, origin = read(args.results), provenance()
    args.results.parent.mkdir(parents=True, exist_ok=True)
    without_rest(args.results)
    runs = [(arm, lr, dtype) for dtype in DTYPES for lr in RATES for arm in ARMS]
    left = [(arm, lr, dtype) for arm, lr, dtype in runs if (arm, lr, name_of(dtype)) not in done]
    print(f"{len(left)} runs to make, {len(done)} are made", flush=True)
    for n, (arm, lr, dtype) in enumerate(left, 1):
        row = dict(arm=arm, lr=lr, dtype=name_of(dtype), **train_run(arm, lr, dtype, args.steps), **origin)
        append(args.results, row)
        text = "gradient off by {} (median), {} (most), its norm by {}, scores apart by {}, loss {}".format(*summary(row))
        print(f"{n:3}/{len(left)}  {ARMS[arm].name:43} lr {lr:g}, {row['dtype']:8}  {text}  {row['seconds']:.0f} s", flush=True)
    print(f"{args.results}\nnext: python experiments/plot.py")


if __name__ == "__main__":
    run_command(main, Args)
