"""How many steps an attention needs to learn to look back and copy.

    python experiments/probes/copying.py --jobs 2

A block of 12 to 47 random tokens, repeated to fill the context; what counts is the loss on the
repetitions. It can only be lowered by finding where the last tokens occurred before and taking what
followed them there, which needs two layers. For many steps next to nothing happens, then the loss
falls at once (Olsson et al. 2022, arXiv:2209.11895, see the same in the training of language
models, and find it in their loss late in a context). The moment differs from seed to seed, hence
five.

The models are those of Figure 1 at a quarter of the width, with equal parameters. A run takes about
a minute on one core; each appends its line to results/copying.jsonl as it ends, and is not trained
again if its line is there. plot.py shows them.
"""

import math
import statistics
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import Tensor

from experiments.flags import require_at_least_1
from experiments.study.studies import GQA2, KR, MFA, MHA, MQA, ROPE_BASE, Arm
from mfa import GPT, Config
from support.cli import run_command
from support.machine import Machine
from support.provenance import ROOT, provenance, read_jsonl
from support.run_folder import append_line, drop_cut_line
from train import Train, make_optimizer, match_params, set_learning_rate, train_step

RESULTS = ROOT / "experiments" / "results" / "copying.jsonl"
VOCAB, CONTEXT, BATCH = 64, 96, 16
STEPS, WARMUP, RATE = 2000, 50, 2e-3
PERIODS = (12, 48)  # of the repetition, the second excluded
SIZE = dict(
    vocab_size=VOCAB, block_size=CONTEXT, n_layer=2, dim=128, head_dim=16, rope_dim=8, ffn_dim=344,
)  # fmt: skip
ARMS = {  # fields of Config, on top of SIZE
    "mha": Arm("MHA", MHA),
    "gqa2": Arm("GQA, 2 KV heads", GQA2),
    "mqa": Arm("MQA", MQA),
    "mla": Arm("MLA, joint latent of dim/4", dict(attn="mla", joint_kv=True, latent_dim=32)),
    "mfa": Arm("MFA, C = dim/8, 16 heads", MFA),
    "mfa_2d": Arm("MFA, C = 2d, 8 heads", dict(**MFA, latent_dim=32, mfa_n_head=8)),
    "mfa_kr": Arm("MFA-KR, C = dim/8, 16 heads", KR),
    "mfa_kr_post": Arm("MFA-KR, post", dict(**KR, key_reuse_rope="post")),
    "mfa_kr_inverse": Arm("MFA-KR, inverse", dict(**KR, key_reuse_rope="inverse")),
    "mfa_kr_full": Arm("MFA-KR, query rank dim", dict(**KR, q_rank=128)),
    "mfa_quarter": Arm("MFA, query rank dim/4 = 2 C", dict(**MFA, q_rank=32)),
    "mfa_half": Arm("MFA, query rank dim/2", dict(**MFA, q_rank=64)),
    "mfa_full": Arm("MFA, query rank dim", dict(**MFA, q_rank=128)),
    "mfa_norm": Arm("MFA, RMSNorm on the query latent", dict(**MFA, latent_norm=True)),
    "mfa_base": Arm("MFA, rotary base 10,000", dict(**MFA, **ROPE_BASE)),
    "mha_base": Arm("MHA, rotary base 10,000", dict(**MHA, **ROPE_BASE)),
}


@dataclass
class Args:
    """Train small models to copy and note the step at which each begins to."""

    jobs: int = 1  # runs side by side, on a core each
    steps: int = STEPS  # after which a run is given up
    seeds: int = 5  # of each attention
    results: Path = RESULTS  # file of the results


def batch(g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Tokens (BATCH, CONTEXT) and targets, -1 where the next token is new."""
    block = torch.randint(VOCAB, (BATCH, CONTEXT + 1), generator=g)
    period = torch.randint(*PERIODS, (BATCH, 1), generator=g)
    at = torch.arange(CONTEXT + 1)
    tokens = block.gather(1, at % period)  # (BATCH, CONTEXT + 1)
    return tokens[:, :-1], tokens[:, 1:].masked_fill(at[1:] < period, -1)


def config(arm: str) -> Config:
    return match_params(Config(**SIZE, **ARMS[arm].model))


def train_run(arm: str, seed: int, steps: int) -> dict:
    """Train until the loss is below half of that of guessing; `step` says when.

    The loss is a running mean over some ten steps.
    """
    began = time.perf_counter()
    torch.set_num_threads(1)
    cfg = config(arm)
    torch.manual_seed(seed)
    model, g = GPT(cfg).train(), torch.Generator().manual_seed(seed)
    optimizer = make_optimizer(model, Train(model=cfg))
    guessing = math.log(VOCAB)
    step, mean, curve, copies = 0, guessing, [], False
    with Machine("cpu", "float32") as machine:
        while step < steps and not copies:
            set_learning_rate(optimizer, RATE * min(1, (step + 1) / WARMUP))
            loss, _ = train_step(
                model, lambda pair: model(*pair)[1], [batch(g)], optimizer, machine
            )
            step += 1
            mean = 0.9 * mean + 0.1 * loss.item()
            copies = mean < guessing / 2
            if step % 50 == 0 or copies:
                curve.append([step, round(mean, 4)])
    params = sum(p.numel() for p in model.parameters())
    seconds = round(time.perf_counter() - began, 1)
    found = step if copies else None
    return dict(step=found, of=steps, params=params, curve=curve, seconds=seconds)


def read(path: Path) -> dict[tuple[str, int], dict]:
    """The results, by arm and seed."""
    rows = read_jsonl(path, "copying.py", lambda row: (row["arm"], row["seed"], row["step"]))
    return {(row["arm"], row["seed"]): row for row in rows}


def steps_by_arm(rows: dict[tuple[str, int], dict]) -> dict[str, list[float]]:
    """The steps at which an arm's seeds began to copy, in order; infinity for one that did not."""
    steps: dict[str, list[float]] = {}
    for arm in ARMS:
        of_arm = [row["step"] or math.inf for (name, _), row in rows.items() if name == arm]
        if of_arm:
            steps[arm] = sorted(of_arm)
    return steps


def main(args: Args) -> None:
    require_at_least_1(args, "jobs", "steps", "seeds")
    done, origin = read(args.results), provenance()
    args.results.parent.mkdir(parents=True, exist_ok=True)
    drop_cut_line(args.results)
    runs = [(arm, seed) for seed in range(args.seeds) for arm in ARMS]
    left = [run for run in runs if run not in done]
    print(f"{len(left)} runs to make, {len(done)} are made", flush=True)
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
        running = {pool.submit(train_run, *run, args.steps): run for run in left}
        for n, future in enumerate(as_completed(running), 1):
            (arm, seed), found = running[future], future.result()
            append_line(args.results, dict(arm=arm, seed=seed, **found, **origin))
            given_up = f"not within {found['of']} steps"
            when = f"step {found['step']}" if found["step"] else given_up
            line = f"{ARMS[arm].name:34} seed {seed}  {when}  {found['seconds']:.0f} s"
            print(f"{n:3}/{len(left)}  {line}", flush=True)
    for arm, steps in steps_by_arm(read(args.results)).items():
        print(f"{ARMS[arm].name:34} median {statistics.median_high(steps):6.0f}  {steps}")
    print(f"{args.results}\nnext: python experiments/study/plot.py")


if __name__ == "__main__":
    run_command(main, Args)
