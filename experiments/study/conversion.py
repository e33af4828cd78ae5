"""What a conversion costs: a trained MHA as other attentions, at once and trained a little further.

    python experiments/study/conversion.py --data_dir DIR       # a GPU: the 30M model of "modern"
    python experiments/study/conversion.py --smoke              # toy sizes, seconds on a CPU

One MHA is trained as in study "modern" and kept in --base. Each of TARGETS is made from it by
convert.py, evaluated, and trained further by 1%, 3% and 10% of the base's steps, each time from the
conversion on, with a warm-up and a decay of its own, at --rates of the base's peak rate, on batches
that the base did not see in this order. The MHA itself is trained further, too: what more tokens
bring without a conversion. Each target is a process, which appends its lines to the results as it
ends; what is there already is not made again. plot.py shows them beside models trained from
scratch.
"""

import math
import time
from concurrent.futures import as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch

from experiments.convert import convert, target
from experiments.flags import require_other_results, require_positive
from experiments.paper.truncation import Seen, see
from experiments.study.run import SMOKE_TOKENS, Training, eagerly, sizes, workers
from experiments.study.studies import VOCAB, Run, run_for
from mfa import GPT
from prepare_data import prepare
from support.cli import BadInput, run_command
from support.corpora import DATA
from support.files import write_atomically
from support.machine import Machine, attention_kernels, can_compile, pick_device
from support.provenance import ROOT, provenance, read_jsonl
from support.run_folder import append_line, drop_cut_line
from train import batch_starts, evaluate, take

RESULTS = ROOT / "experiments" / "results" / "convert.jsonl"
SHARES = (0.01, 0.03, 0.1)  # of the base's steps
SEEN = 16  # sequences of the training text that the conversion looks at
SEED = 1  # of the further training's batches; the base's is 0


class Target(NamedTuple):
    name: str
    attn: str
    share: int = 8  # latent_dim is dim over this
    fields: dict = {}  # of target()


INVERSE = dict(key_reuse_rope="inverse")
TARGETS = {
    "mha": Target("MHA, trained further", "mha"),
    "gqa2": Target("GQA, 2 KV heads", "gqa", fields=dict(n_kv_head=2)),
    "mla_joint": Target("MLA, joint latent of dim/4", "mla", 4, dict(joint_kv=True)),
    "mfa": Target("MFA, C = dim/8, 16 heads", "mfa", 8, dict(n_head=16)),
    "mfa_kr": Target("MFA-KR, C = dim/8, 16 heads", "mfa_kr", 8, dict(n_head=16, **INVERSE)),
    "mqa": Target("MQA", "mqa"),
    "mfa_2d": Target("MFA, C = 2d, 8 heads", "mfa", 4),
    "mfa_kr_2d": Target("MFA-KR, C = 2d, 8 heads", "mfa_kr", 4, INVERSE),
    "mla_joint_64": Target("MLA, joint latent of dim/8", "mla", 8, dict(joint_kv=True)),
    "mqa_all_turn": Target("MQA, all dimensions turn", "mqa", fields=dict(rope_fraction=1.0)),
}

# The arm of study "modern" that a target is compared with: the same attention from scratch, at
# MHA's parameters. Its MFA has a query of rank C, where a converted one has what the query needs.
SCRATCH = {
    "mha": "mha", "gqa2": "gqa2", "mla_joint": "mla_joint", "mfa": "mfa", "mfa_kr": "mfa_kr_half",
    "mqa": "mqa", "mqa_all_turn": "mqa",
}  # fmt: skip


@dataclass
class Args:
    """Convert a trained MHA to every target, and train each a little further."""

    smoke: bool = False  # a toy model on the embedded text: does everything run?
    results: Path | None = None
    """File of the results; default experiments/results/convert.jsonl, with --smoke
    out/smoke-convert.jsonl."""
    base: Path | None = None  # the trained MHA, made if missing; default out/conversion-base.pt
    rates: tuple[float, ...] = (0.2,)  # of the further training, of the base's peak
    dataset: str = "pg-books"  # corpus, with a BPE of 8,192 trained on it
    source: str | None = None  # folder that holds the corpus' text, if it is not prepared yet
    data_dir: Path = DATA  # where prepared corpora are kept
    device: str = "auto"  # auto, cpu, cuda:1, mps ...
    jobs: int = 2  # targets at a time


# --------------------------------------------------------------------------------------------------
# Training


def train_all(training: Training) -> None:
    """All steps of training.args; RuntimeError if the last was not that of eager code."""
    steps = training.args.max_iters
    for step in range(steps):
        training.prepare_step(step)
        if step + 1 == steps:
            expected, moved = training.eager_gradient()
        training.step()
    training.check_step(steps, expected, moved)


def validate(training: Training, tokens: int | None) -> float:
    with eagerly():
        return evaluate(training.model, training.val_ids[:tokens], training.machine)


def train_base(run: Run, folder: Path, device: str, path: Path, tokens: int | None) -> None:
    """Train the MHA of run into path, with what its attentions meet in a text."""
    with Machine(device) as machine, attention_kernels(machine.device):
        how = "blocks" if can_compile(machine.device) else "no"
        training = Training(run, folder, machine, how)
        train_all(training)
        loss = validate(training, tokens)
        model, device = training.model, machine.device
        starts = batch_starts(training.args, run.max_iters, len(training.train_ids))[:SEEN]
        text = take(training.train_ids, starts, run.cfg.block_size, device)  # (SEEN, T)
        with eagerly():
            seen = [tuple(t.cpu() for t in layer) for layer in see(model, text)]
    state = {name: p.cpu() for name, p in model.state_dict().items()}
    found = dict(model=state, seen=seen, loss=loss, run=repr(run))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: torch.save(found, file))


def reset(training: Training, state: dict) -> None:
    """Weights and optimizer as at the start, in the places that a CUDA graph knows."""
    training.model.load_state_dict(state)
    optimizer = training.optimizer
    for one in getattr(optimizer, "muon", optimizer), getattr(optimizer, "adamw", optimizer):
        for tensors in one.state.values():
            for tensor in tensors.values():
                tensor.zero_()


def convert_and_train(
    name: str, lengths: list[tuple[float, int]], base: Run, folder: Path, device: str, path: Path,
    tokens: int | None,
) -> list[dict]:  # fmt: skip
    """A target's rows: one for each (rate, steps) of lengths, rate in parts of the base's."""
    began = time.perf_counter()
    trained = torch.load(path, weights_only=True)
    model = GPT(base.cfg)
    model.load_state_dict(trained["model"])
    kind = TARGETS[name]
    if kind.attn != "mha":
        torch.manual_seed(SEED)  # of what begins at random, as MFA-KR's N does
        seen = [Seen(*layer) for layer in trained["seen"]]
        latent = base.cfg.dim // kind.share
        cfg = target(base.cfg, kind.attn, latent_dim=latent, **kind.fields)
        model = convert(model, cfg, seen)
    state = model.state_dict()
    rows = []
    with Machine(device) as machine, attention_kernels(machine.device):
        longest = max([steps for _, steps in lengths] + [1])
        run = base._replace(cfg=model.cfg, seed=SEED, max_iters=longest)
        training = Training(run, folder, machine, "no")  # compiling takes longer than it saves
        for rate, steps in lengths:
            reset(training, state)
            if steps:
                training.args = replace(
                    training.args, max_iters=steps, warmup_iters=max(1, steps // 20),
                    learning_rate=base.lr * rate,
                )  # fmt: skip
                train_all(training)
            loss = validate(training, tokens)
            rows.append(
                dict(
                    target=name, name=kind.name, steps=steps, rate=rate, val_loss=loss,
                    ppl=math.exp(loss), base_loss=trained["loss"], base_steps=base.max_iters,
                    lr=base.lr * rate, optimizer=base.optimizer, batch_size=base.batch_size,
                    seed=SEED, **sizes(training.model), config=asdict(model.cfg),
                    seconds=round(time.perf_counter() - began, 1),
                )
            )  # fmt: skip
    return rows


# --------------------------------------------------------------------------------------------------
# The queue


def key(target: str, rate: float, steps: int, **others) -> tuple:
    """What tells the rows of a file apart."""
    return target, round(rate, 4), steps


def read_results(path: Path) -> list[dict]:
    return read_jsonl(path, "conversion.py", lambda row: (key(**row), row["val_loss"]))


def lengths_of(args: Args, base: Run) -> list[tuple[float, int]]:
    """(rate, steps): straight after the conversion, and every share of the steps at every rate."""
    further = [max(1, round(share * base.max_iters)) for share in SHARES]
    return [(0.0, 0)] + [(rate, steps) for rate in args.rates for steps in further]


def main(args: Args) -> None:
    require_positive(args, "jobs")
    device = pick_device(args.device)
    args.results = args.results or (ROOT / "out" / "smoke-convert.jsonl" if args.smoke else RESULTS)
    require_other_results(args, RESULTS)
    args.base = args.base or ROOT / "out" / f"conversion-base{'-smoke' * args.smoke}.pt"
    base = run_for("modern", "mha", 1, 0, toy=args.smoke)
    if args.smoke:
        base = base._replace(max_iters=100)
        text = dict(dataset="shakespeare", tokenizer="byte")
    else:
        text = dict(dataset=args.dataset, tokenizer="bpe", vocab_size=VOCAB)
    folder = prepare(**text, source=args.source, data_dir=args.data_dir)
    args.results.parent.mkdir(parents=True, exist_ok=True)
    drop_cut_line(args.results)
    done = {key(**row) for row in read_results(args.results)}
    lengths = lengths_of(args, base)
    origin = dict(dataset=folder.name, **provenance(device))
    tokens = SMOKE_TOKENS if args.smoke else None
    jobs = args.jobs if device.type == "cuda" else 1
    with workers(jobs, [args.device]) as start:
        if not args.base.exists():
            start(train_base, base, folder, args.device, args.base, tokens).result()
        trained = torch.load(args.base, weights_only=True, mmap=True)
        if trained["run"] != repr(base):
            raise BadInput(f"--base {args.base} is of another run: remove it, or name another file")
        loss = trained["loss"]
        print(f"MHA: loss {loss:.4f} after {base.max_iters} steps, in {args.base}", flush=True)
        left = {}
        for name in TARGETS:
            todo = [(rate, steps) for rate, steps in lengths if key(name, rate, steps) not in done]
            if todo:
                values = name, todo, base, folder, args.device, args.base, tokens
                left[start(convert_and_train, *values)] = name
        for future in as_completed(left):
            for row in future.result():
                append_line(args.results, row | origin)
                what = f"{row['steps']:4} steps at {row['rate']:.2f}"
                print(f"{row['name']:28} {what}  loss {row['val_loss']:.4f}", flush=True)


if __name__ == "__main__":
    run_command(main, Args)
