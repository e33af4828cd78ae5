"""Trains the runs of the studies, in the order of studies.QUEUE: python experiments/run.py --study all

    python experiments/run.py --study all --dry_run                  # the queue: what is made, and how long the rest takes
    python experiments/run.py --study all --jobs 2                   # each GPU has two: one compiles while the other trains
    python experiments/run.py --study all --limit_seconds 3000       # start nothing that would not end in time
    python experiments/run.py --study all --smoke                    # every run at toy size, half a minute on a CPU

Each run appends its line to the results as it ends, and one whose line is there is not made again, so the queue goes on where
it stopped. There are no checkpoints: a run takes a minute or two. The pieces are train.py's; what is left out is what a long
training needs. The text is pg-books, which cannot be downloaded: --source or --data_dir says where it is. Any corpus of
prepare_data.py can take its place.
"""

import contextlib
import itertools
import json
import math
import os
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Literal

import torch
import torch.nn.functional as F
from provenance import ROOT, provenance
from studies import RESULTS, STUDIES, VOCAB, Run, Task, build, cache_of, made, queue, read_results, row_of
from torch import Tensor

from mfa import GPT, widen
from prepare_data import DATA, BadInput, load, prepare, run_command
from train import (
    Train,
    as_tensor,
    attention_kernels,
    batch_starts,
    cache_bytes,
    can_compile,
    count_params,
    evaluate,
    learning_rate,
    loss_function,
    make_optimizer,
    mha_of,
    naming,
    pick_device,
    pick_dtype,
    window,
    write_atomically,
)

POINTS = 8  # of the curve, each on
COMPILING = 3  # steps, before the one that becomes a CUDA graph
TURNS: dict[str, contextlib.AbstractContextManager] = {}  # a lock for each device, in the processes of --jobs 2 and more
PART = 1 << 17  # validation tokens, always the first; the loss that counts is a sweep over all of them at the end
TOY_VAL = 1025  # of which --smoke makes do with so many


@dataclass
class Args:
    """Train the runs of a study, or of all, that are not in the results yet."""

    study: Literal["all", *STUDIES] = "all"
    """Which study; runs that two studies share are made once."""
    smoke: bool = False
    """Toy models, four steps each, on the embedded text: does everything run?"""
    dry_run: bool = False
    """Only print the queue."""
    results: Path | None = None
    """File of the results; default experiments/results/study.jsonl, and with --smoke a new out/smoke.jsonl."""
    dataset: str = "pg-books"
    """Corpus, with a BPE of 8,192 trained on it."""
    source: str | None = None
    """Folder that holds the corpus' text, if it is not prepared yet."""
    data_dir: Path = DATA
    """Where prepared corpora are kept."""
    device: str = "auto"
    """auto (all GPUs, if there are several), cpu, cuda:1, mps ..."""
    compile: Literal["auto", "blocks", "model", "no"] = "auto"
    """torch.compile: one block, which serves for all of them, or the whole model. auto: blocks, where it pays."""
    jobs: int = 1
    """Runs at a time on each device. They take turns at training, so the next one is compiled when its turn comes."""
    limit_seconds: float = math.inf
    """Start no run that is not likely to end within this time."""
    guess_seconds: float = 60
    """What a run at 30M is thought to take, until some were made on this device."""


# ---------------------------------------------------------------------------------------------------------------------
# One run


@cache
def data(folder: Path, device: torch.device) -> tuple[Tensor, Tensor, dict]:
    train_ids, val_ids, meta = load(folder)
    return as_tensor(train_ids, device), as_tensor(val_ids, device), meta


def compiled_loss(model: GPT, dtype: torch.dtype, how: str) -> Callable[[Tensor], Tensor]:
    """train.py's training loss of tokens (B, T + 1), compiled: "model" as a whole; "blocks" one block, for all; or "no"."""
    torch.compiler.reset()  # or the models of earlier runs would count as recompilations of this one, which are limited
    loss_of = loss_function(model, model, dtype, compile=how == "model", graphs=False)
    if how != "blocks":
        return loss_of
    for block in model.blocks:
        block.compile(dynamic=False)

    @torch.compile(dynamic=False)
    def head_loss(h: Tensor, targets: Tensor) -> Tensor:  # GPT.forward's: uncompiled, its float32 logits go through memory
        return F.cross_entropy(widen(model.head(h).flatten(0, 1)), targets.flatten())

    return lambda tokens: head_loss(model.hidden(tokens[:, :-1]), tokens[:, 1:])


def as_graph(step: Callable[[], None]) -> Callable[[], None]:
    """step on a GPU, from its fourth call on as one CUDA graph: a small model's kernels take longer to launch than to run."""
    graph, side, calls = torch.cuda.CUDAGraph(), torch.cuda.Stream(), itertools.count()  # the stream is of this device

    def call() -> None:
        n = next(calls)
        if n < COMPILING:  # real steps, which compile, choose kernels and make the optimizer's state
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                step()
            torch.cuda.current_stream().wait_stream(side)
            return
        if n == COMPILING:
            with torch.cuda.graph(graph, stream=side):
                step()
        graph.replay()

    return call


def gradient(model: GPT, loss_of: Callable, tokens: Tensor, dtype: torch.dtype, parts: int = 1) -> tuple[Tensor, Tensor]:
    """The loss of tokens (B, T + 1), computed in dtype, and its whole gradient as one vector (parameters,).

    parts: of the batch, one after another, where memory is short.
    """
    model.zero_grad(set_to_none=True)
    total = torch.zeros((), device=tokens.device)
    for part in tokens.chunk(parts):
        with torch.autocast(tokens.device.type, dtype, enabled=dtype != torch.float32):
            loss = loss_of(part) * (len(part) / len(tokens))
        loss.backward()
        total += loss.detach()
    of = (torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters())  # None: an expert without tokens
    return total, torch.cat([g.flatten() for g in of])


@torch.no_grad()
def loss_by_position(model: GPT, ids: Tensor, device: torch.device, autocast) -> list[list]:
    """What the context before a token is worth: [[p, mean loss], ...] over positions p to 2p - 1 of windows side by side."""
    T = model.cfg.block_size
    n_window, rows = (len(ids) - 1) // T, max(1, 16384 // T)
    total = torch.zeros(T, device=device)
    model.eval()
    for first in range(0, n_window, rows):
        tokens = window(ids, torch.arange(first, min(first + rows, n_window)) * T, T + 1, device)  # (B, T + 1)
        with autocast():
            logits = model(tokens[:, :-1])[0]  # (B, T, vocab_size)
        total += F.cross_entropy(logits.float().mT, tokens[:, 1:], reduction="none").sum(0)  # (T,)
    mean = (total / n_window).tolist()
    edges = [0, *(1 << i for i in range(T.bit_length() - 1)), T]  # 0, 1, 2, 4, ... T / 2, T
    return [[a, sum(mean[a:b]) / (b - a)] for a, b in zip(edges, edges[1:], strict=False)]


def train_run(run: Run, folder: Path, device_name: str = "auto", compile: str = "no", val_tokens: int | None = None) -> dict:
    """Train one model and return its line of the results, less what the queue knows. val_tokens: of the text, None: all."""
    torch.set_float32_matmul_precision("high")
    began = time.perf_counter()
    device = pick_device(device_name)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # where kernels are compiled and launched
    train_ids, val_ids, meta = data(folder, device)
    val_ids = val_ids[:val_tokens]
    cfg, T = run.cfg, run.cfg.block_size
    args = Train(model=cfg, batch_size=run.batch_size, max_iters=run.max_iters, learning_rate=run.lr, seed=run.seed,
                 warmup_iters=run.max_iters // 20)  # fmt: skip
    torch.manual_seed(run.seed)
    model = build(run).to(device).train()
    optimizer, dtype = make_optimizer(model, args, device), pick_dtype("auto", device)
    fixed = cfg.n_expert == 0  # an expert's share is known only as it runs
    loss_of = compiled_loss(model, dtype, compile if fixed else "no")
    tokens = torch.zeros(args.batch_size, T + 1, dtype=torch.long, device=device)
    lr, found = torch.zeros((), device=device), torch.zeros(2, device=device)
    for group in optimizer.param_groups:
        group |= dict(lr=lr, capturable=device.type == "cuda")

    def autocast():
        return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)

    def eagerly():  # for evaluation: a compilation for that alone would not pay
        return torch.compiler.set_stance("force_eager")

    def one_step() -> None:
        with autocast():
            loss = loss_of(tokens)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip)
        found.copy_(torch.stack((loss.detach(), norm)))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    take_step = as_graph(one_step) if device.type == "cuda" and fixed else one_step
    curve, rounding, step, diverged, waited = [], [], 0, False, 0.0
    with attention_kernels(device), contextlib.ExitStack() as turn:
        while step < args.max_iters:
            if step == COMPILING and device_name in TURNS:
                asked = time.perf_counter()
                turn.enter_context(TURNS[device_name])
                waited = time.perf_counter() - asked
            lr.fill_(learning_rate(step, args))
            tokens.copy_(window(train_ids, batch_starts(args, step, len(train_ids)), T + 1, device))  # (B, T + 1)
            step += 1
            look = step % math.ceil(args.max_iters / POINTS) == 0 or step == args.max_iters
            if look:
                with eagerly(), attention_kernels(device, decoding=True):  # other ones than in training
                    loss, g16 = gradient(model, loss_of, tokens, dtype)
                    # In parts, as GPUs have no kernel for shared keys in float32; but experts balance their load over a batch.
                    g32 = gradient(model, loss_of, tokens, torch.float32, parts=4 if fixed else 1)[1]
                want, off = torch.stack((loss, g16.norm())), ((g16 - g32).norm() / g32.norm()).item()
                rounding.append([step, off if math.isfinite(off) else None])
                del g16, g32
                optimizer.zero_grad(set_to_none=True)
            take_step()
            if look:
                rtol = 0.05, 0.05 + (2 * off if math.isfinite(off) else 0)  # each of two sound gradients may be off by as much
                near = (torch.allclose(*pair, rtol=r, equal_nan=True) for *pair, r in zip(found, want, rtol, strict=True))
                if not all(near):  # a fault of ours, not of the attention
                    text = f"loss and gradient norm are {found.tolist()}, run eagerly {want.tolist()}"
                    raise RuntimeError(f"step {step}: {text}, where rounding to {dtype} moves the gradient by {off:.1%}")
                with eagerly():
                    loss = evaluate(model, val_ids[: PART + 1], device, autocast)
                if diverged := not math.isfinite(loss):
                    break
                curve.append([step, loss])
        with eagerly():
            val_loss = None if diverged else evaluate(model, val_ids, device, autocast)
            positions = [] if diverged else loss_by_position(model, val_ids, device, autocast)
    kept = cache_of(model)
    return dict(
        attn=cfg.attn, params=sum(p.numel() for p in model.parameters()), cache_bytes=kept,
        cache_share=kept / cache_bytes(mha_of(cfg)), tokens=step * run.batch_size * T, val_loss=val_loss,
        best_val_loss=min((loss for _, loss in curve), default=None), ppl=None if diverged else math.exp(val_loss),
        bpb=None if diverged else val_loss / math.log(2) * meta["val_tokens"] / meta["val_bytes"],
        seconds=round(time.perf_counter() - began - waited, 1), curve=curve, rounding=rounding, by_position=positions,
        diverged=diverged, compile=compile,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# The queue


def append(path: Path, row: dict) -> None:
    """One line more, on the disk when this returns."""
    with naming(path), open(path, "a", encoding="utf-8") as f:
        f.write(json.dumps(row) + "\n")
        f.flush()
        os.fsync(f.fileno())


def without_rest(path: Path) -> None:
    """Remove the line that a kill has cut short at the end of a file."""
    text = path.read_bytes() if path.exists() else b""
    if text and not text.endswith(b"\n"):
        write_atomically(path, lambda f: f.write(text[: text.rfind(b"\n") + 1]))


def estimate(run: Run, rows: list[dict], args: Args, device: str) -> float:
    """Seconds a run will take: those of the latest of its size here, else in proportion to parameters times tokens."""

    def size(cfg: dict, params: float, steps: int, batch_size: int) -> tuple:
        return cfg["n_layer"], cfg["dim"], steps, batch_size, params * steps * batch_size * cfg["block_size"]

    want = size(asdict(run.cfg), count_params(run.cfg), run.max_iters, run.batch_size)
    known = [
        (row["seconds"], size(row["config"], row["params"], row["steps"], row["batch_size"]))
        for row in rows
        if (row["device"], row["jobs"], row["diverged"]) == (device, args.jobs, False)
    ]
    for seconds, found in reversed(known):
        if found[:-1] == want[:-1]:
            return seconds
    work = 29.9e6 * 65.5e6  # what guess_seconds is for
    each = median(seconds / found[-1] for seconds, found in known) if known else args.guess_seconds / work
    return each * want[-1]


def show(task: Task) -> str:
    return f"{task.study:10} {task.arm:20} lr {task.run.lr:<7.2g} seed {task.run.seed}"


def print_queue(args: Args, rows: list[dict], dataset: str, device: str) -> None:
    done, total = made(rows, dataset), 0.0
    for i, task in enumerate(queue(args.study, args.smoke), 1):
        row, seconds = done.get(task.run), estimate(task.run, rows, args, device)
        state = f"{seconds:5.0f} s" if row is None else "diverged" if row["diverged"] else f"loss {row['val_loss']:.4f}"
        total += seconds * (row is None)
        print(f"{i:4}  {show(task)}  {state}")
    print(f"still to make: about {total / len(devices_of(args.device)) / 60:.0f} minutes")


def devices_of(name: str) -> list[str]:
    """Where runs may go: every GPU for "auto", else the one device."""
    count = torch.cuda.device_count() if name == "auto" else 0
    return [f"cuda:{i}" for i in range(count)] if count > 1 else [name]


@contextlib.contextmanager
def workers(jobs: int, devices: list[str]):
    """A function that starts work(*values) and returns its Future, as many at a time as there are jobs on all devices.

    Each has a process of its own: compiled code, captured graphs and cuDNN's plans would outlive a run, and have spoilt
    later ones. A single job on a CPU runs here and now.
    """

    def here(work: Callable, *values) -> Future:
        future = Future()
        try:
            future.set_result(work(*values))
        except Exception as e:
            future.set_exception(e)
        return future

    def apart(work: Callable, *values):
        try:
            with ProcessPoolExecutor(1, spawn, initializer=keep_turns, initargs=(turns,)) as process:
                return process.submit(work, *values).result()
        except BrokenExecutor:  # it was killed, perhaps in its turn; who else has one is only slowed down
            for turn in turns.values():
                with contextlib.suppress(ValueError):  # nobody has it
                    turn.release()
            raise

    spawn = get_context("spawn")
    turns = {device: spawn.Lock() for device in devices} if jobs > 1 else {}
    if jobs * len(devices) == 1 and pick_device(devices[0]).type == "cpu":
        yield here
    else:
        with ThreadPoolExecutor(jobs * len(devices)) as pool:
            yield lambda work, *values: pool.submit(apart, work, *values)


def keep_turns(locks: dict) -> None:
    """What a process of --jobs 2 begins with: a lock for each device."""
    TURNS.update(locks)


def main(args: Args) -> None:
    began = time.perf_counter()
    for name in ("jobs", "limit_seconds", "guess_seconds"):
        if not getattr(args, name) > 0:
            raise BadInput(f"--{name} must be positive, not {getattr(args, name)}")
    device = pick_device(args.device)
    path = args.results or (ROOT / "out" / "smoke.jsonl" if args.smoke else RESULTS)
    if args.smoke and not args.results and not args.dry_run:
        path.unlink(missing_ok=True)
    rows, origin = read_results(path), provenance(device)
    dataset = "shakespeare-byte" if args.smoke else f"{args.dataset}-bpe{VOCAB}"
    if args.dry_run:
        print_queue(args, rows, dataset, origin["device"])
        return
    text = dict(dataset=args.dataset, tokenizer="bpe", vocab_size=VOCAB)
    text = dict(dataset="shakespeare", tokenizer="byte") if args.smoke else text
    folder = prepare(**text, source=args.source, data_dir=args.data_dir)
    path.parent.mkdir(parents=True, exist_ok=True)
    without_rest(path)
    how = args.compile if args.compile != "auto" else "blocks" if can_compile(device) else "no"
    tasks, done = list(queue(args.study, args.smoke)), made(rows, dataset)
    failed, going, devices = set(), {}, devices_of(args.device)  # going: Future -> (task, device)

    def seconds(run: Run) -> float:
        return estimate(run, rows, args, origin["device"])

    def following(device: str) -> Task | None:
        """The first run of the queue that is not made, can be, and fits into the time."""
        busy = failed | {task.run for task, _ in going.values()}
        before = sum(seconds(task.run) for task, place in going.values() if place == device)  # their turns come first
        for task in tasks:
            if task.run not in done and task.run not in busy:
                if time.perf_counter() - began + before + seconds(task.run) <= args.limit_seconds:
                    return task
        return None

    with workers(args.jobs, devices) as start:
        while True:
            while len(going) < args.jobs * len(devices):
                busy = [device for _, device in going.values()]
                device = min(devices, key=busy.count)
                if (task := following(device)) is None:
                    break
                going[start(train_run, task.run, folder, device, how, TOY_VAL if args.smoke else None)] = task, device
            if not going:
                break
            for future in wait(going, return_when=FIRST_COMPLETED).done:
                task, _ = going.pop(future)
                try:
                    found = future.result()
                except Exception as e:  # out of memory, say: the others go on
                    failed.add(task.run)
                    print(f"{show(task)}  failed: {type(e).__name__}: {e}", flush=True)
                    continue
                which = dict(study=task.study, arm=task.arm, name=STUDIES[task.study][task.arm].name)
                row = {**which, **row_of(task.run), **found, "dataset": dataset, "jobs": args.jobs, **origin}
                rows.append(row)
                done[task.run] = row
                append(path, row)
                outcome = "diverged" if row["diverged"] else f"loss {row['val_loss']:.4f}  perplexity {row['ppl']:.2f}"
                print(f"{show(task)}  {outcome}  {row['seconds']:.0f} s", flush=True)
    left = sum(task.run not in done for task in tasks)
    print(f"{len(rows)} results in {path}, {left} runs still to make\nnext: python experiments/plot.py")
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    run_command(main, Args)
