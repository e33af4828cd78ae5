"""Trains the runs of the studies, in the order of studies.QUEUE.

    python experiments/study/run.py --study all --dry_run          # the queue, and its seconds
    python experiments/study/run.py --study all --jobs 2           # two on each GPU: one compiles
                                                                   # while the other trains
    python experiments/study/run.py --study all --limit_seconds 3000   # start nothing longer
    python experiments/study/run.py --study ratio --limit_seconds 540 --keep FOLDER
                                                                   # stop then, go on next time
    python experiments/study/run.py --study all --smoke            # toy sizes, a minute on a CPU

Each run appends its line to the results as it ends, and is not trained again if its line is there,
so the queue goes on where it stopped. Most runs take a minute or two and leave no checkpoint. With
--keep a run stops when the time is up and goes on in the next call, to the same weights bit for bit
on a CPU; and its last weights stay in that folder, in bfloat16, for words.py. The text is pg-books,
of the studies ratio and ratio_7m pg-books-large, which cannot be downloaded: --source or --data_dir
says where it is. Any corpus of prepare_data.py can take its place.
"""

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import (
    FIRST_COMPLETED,
    BrokenExecutor,
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
    wait,
)
from dataclasses import asdict, dataclass, field
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.flags import require_positive
from experiments.paper.hybrids import measured_cache_bytes
from experiments.study.studies import (
    RESULTS,
    STUDIES,
    TEXTS,
    VOCAB,
    Run,
    Task,
    build,
    dataset_asked_for,
    dataset_of,
    queue,
    read_results,
    results_by_run,
    row_of,
)
from experiments.study.words import token_losses, windows
from mfa import GPT, at_least_float32, cache_bytes, evaluating
from prepare_data import load, prepare
from support.cli import BadInput, run_command
from support.corpora import DATA
from support.files import sha256_of, write_atomically
from support.machine import Machine, attention_kernels, can_compile, pick_device
from support.progress import source_of
from support.provenance import ROOT, provenance
from support.run_folder import FORMAT, append_line, drop_cut_line
from train import (
    Train,
    batch_starts,
    count_params,
    evaluate,
    learning_rate,
    make_optimizer,
    mha_of,
    take,
    to_device,
    train_step,
)

POINTS = 8  # of the curve, each on
CURVE_TOKENS = 1 << 17  # validation tokens, always the first; the loss that counts is of all
SMOKE_TOKENS = 1025  # validation tokens that --smoke has
STEPS_BEFORE_CAPTURE = 3  # they compile; the next one becomes a CUDA graph
STEPS_BETWEEN_LOOKS = 100  # at the clock
WORTH_BEGINNING = 90  # seconds that a run which can stop needs at least: it compiles for thirty
DEVICE_LOCKS: dict = {}  # of devices, in the processes of --jobs 2


@dataclass
class Args:
    """Train the runs of a study, or of all, that are not in the results yet."""

    study: Literal["all", *STUDIES] = "all"  # runs that two studies share are trained once
    smoke: bool = False  # toy models, four steps each, on the embedded text: does everything run?
    dry_run: bool = False  # only print the queue
    results: Path | None = None
    """File of the results; default experiments/results/study.jsonl, with --smoke a new
    out/smoke.jsonl."""
    dataset: str = ""
    """Corpus, with a BPE of 8,192 trained on it; default pg-books, of the two ratios
    pg-books-large."""
    source: str | None = None  # folder that holds the corpus' text, if it is not prepared yet
    data_dir: Path = DATA  # where prepared corpora are kept
    device: str = "auto"  # auto (all GPUs, if there are several), cpu, cuda:1, mps ...
    compile: Literal["auto", "blocks", "model", "no"] = "auto"
    """torch.compile: one block, which serves for all of them, or the whole model. auto: blocks,
    where it pays."""
    jobs: int = 1
    """Runs at a time on each device. They train one after the other, so that the next one is
    compiled when it may begin."""
    limit_seconds: float = math.inf
    """Start no run that is not likely to end within this time; with --keep, stop there."""
    keep: Path | None = None
    """Folder of stopped runs, which go on in the next call, and of each run's last weights."""
    guess_seconds: float = 60  # of a run at 30M, until some were trained on this device


# --------------------------------------------------------------------------------------------------
# One run


@cache
def load_tokens(folder: Path, device: torch.device) -> tuple[Tensor, Tensor, dict]:
    train_ids, val_ids, meta = load(folder)
    return to_device(train_ids, device), to_device(val_ids, device), meta


def compiled_loss(model: GPT, machine: Machine, how: str) -> Callable[[Tensor], Tensor]:
    """train.py's training loss of tokens (B, T + 1), compiled.

    how: "model" as a whole; "blocks" one block, which serves for all; or "no".
    """
    loss_of = machine.loss_function(model, compile=how == "model", graphs=False)
    if how != "blocks":
        return loss_of
    for block in model.blocks:
        block.compile(dynamic=False)

    # GPT.forward's: uncompiled, its float32 logits would go through memory.
    @torch.compile(dynamic=False)
    def head_loss(h: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(at_least_float32(model.head(h).flatten(0, 1)), targets.flatten())

    return lambda tokens: head_loss(model.hidden(tokens[:, :-1]), tokens[:, 1:])


def as_graph(step: Callable[[], None]) -> Callable[[], None]:
    """step on a GPU, from its fourth call on as one CUDA graph.

    A small model's kernels take longer to launch than to run.
    """
    graph = torch.cuda.CUDAGraph()
    side = torch.cuda.Stream()  # of this device
    calls = itertools.count()

    def call() -> None:
        n = next(calls)
        if n < STEPS_BEFORE_CAPTURE:  # compile, choose kernels, make the optimizer's state
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                step()
            torch.cuda.current_stream().wait_stream(side)
            return
        if n == STEPS_BEFORE_CAPTURE:
            with torch.cuda.graph(graph, stream=side):
                step()
        graph.replay()

    return call


def eagerly():
    """Uncompiled code: compiling for an evaluation alone would not pay."""
    return torch.compiler.set_stance("force_eager")


def gradient(
    model: GPT, loss_of: Callable, tokens: Tensor, dtype: torch.dtype, parts: int = 1
) -> tuple[Tensor, Tensor]:
    """The loss of tokens (B, T + 1), computed in dtype, and its gradient as a vector (parameters,).

    parts: of the batch, one after another, where memory is short. Leaves no gradient behind.
    """
    model.zero_grad(set_to_none=True)
    total = torch.zeros((), device=tokens.device)
    for part in tokens.chunk(parts):
        with torch.autocast(tokens.device.type, dtype, enabled=dtype != torch.float32):
            loss = loss_of(part) * (len(part) / len(tokens))
        loss.backward()
        total += loss.detach()
    # None: an expert that no token has visited.
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    whole = torch.cat([grad.flatten() for grad in grads])
    model.zero_grad(set_to_none=True)
    return total, whole


@torch.no_grad()
def loss_by_position(model: GPT, ids: Tensor, machine: Machine) -> list[list]:
    """What the context before a token is worth, over windows side by side.

    [[p, mean loss], ...] over positions p to 2p - 1.
    """
    T = model.cfg.block_size
    total = torch.zeros(T, device=machine.device)
    with evaluating(model):
        for tokens in windows(ids, T, machine.device):  # (B, T + 1)
            with machine.autocast():
                total += token_losses(model, tokens, tokens).sum(0)  # (T,)
    mean = (total / ((len(ids) - 1) // T)).tolist()
    edges = [0, *(1 << i for i in range(T.bit_length() - 1)), T]  # 0, 1, 2, 4, ... T / 2, T
    return [[a, sum(mean[a:b]) / (b - a)] for a, b in itertools.pairwise(edges)]


class Training:
    """A run while it is trained: train.py's recipe, made ready for one CUDA graph."""

    def __init__(self, run: Run, folder: Path, machine: Machine, compile: str):
        cfg, device = run.cfg, machine.device
        self.machine = machine
        self.train_ids, self.val_ids, self.meta = load_tokens(folder, device)
        self.args = Train(
            model=cfg, batch_size=run.batch_size, max_iters=run.max_iters, learning_rate=run.lr,
            warmup_iters=run.max_iters // 20, seed=run.seed,
            optimizer=run.optimizer,
        )  # fmt: skip
        torch.manual_seed(run.seed)
        self.model = build(run).to(device).train()
        self.optimizer = make_optimizer(self.model, self.args)
        self.fixed_shapes = cfg.n_expert == 0  # an expert's share is known only as it runs
        # Or the models of earlier runs would count as recompilations of this one: they are limited.
        torch.compiler.reset()
        self.loss_of = compiled_loss(self.model, machine, compile if self.fixed_shapes else "no")
        # A graph reads its inputs and leaves its results always at the same places.
        self.tokens = torch.zeros(
            run.batch_size, cfg.block_size + 1, dtype=torch.long, device=device
        )
        self.rate = torch.zeros((), device=device)
        self.loss_and_norm = torch.zeros(2, device=device)
        self.use_rate()
        graph = device.type == "cuda" and self.fixed_shapes
        self.step = as_graph(self.one_step) if graph else self.one_step

    def use_rate(self) -> None:
        for group in self.optimizer.param_groups:
            group |= dict(lr=self.rate, capturable=self.machine.device.type == "cuda")

    def one_step(self) -> None:
        clip = self.args.grad_clip
        batches = [self.tokens]
        found = train_step(self.model, self.loss_of, batches, self.optimizer, self.machine, clip)
        self.loss_and_norm.copy_(torch.stack(found))

    def prepare_step(self, step: int) -> None:
        self.rate.fill_(learning_rate(step, self.args))
        starts = batch_starts(self.args, step, len(self.train_ids))
        T = self.args.model.block_size
        self.tokens.copy_(take(self.train_ids, starts, T + 1, self.machine.device))  # (B, T + 1)

    def eager_gradient(self) -> tuple[Tensor, float]:
        """The next step's loss and gradient norm (2,), and how far rounding moves its gradient.

        |g16 - g32| / |g32|, by eager code and other attention kernels than in training.
        """
        dtype = self.machine.dtype
        # In parts, as GPUs have no kernel for shared keys in float32; but experts balance their
        # load over a batch.
        parts = 4 if self.fixed_shapes else 1
        with eagerly(), attention_kernels(self.machine.device, decoding=True):
            loss, g16 = gradient(self.model, self.loss_of, self.tokens, dtype)
            _, g32 = gradient(self.model, self.loss_of, self.tokens, torch.float32, parts)
        moved = ((g16 - g32).norm() / g32.norm()).item()
        return torch.stack((loss, g16.norm())), moved

    def check_step(self, step: int, expected: Tensor, moved: float) -> None:
        """RuntimeError if the step was not that of eager code: a fault of ours."""
        # Each of two sound gradients may be off by as much as rounding moves one.
        tolerances = 0.05, 0.05 + (2 * moved if math.isfinite(moved) else 0)
        pairs = zip(self.loss_and_norm, expected, tolerances, strict=True)
        if not all(torch.allclose(a, b, rtol=rtol, equal_nan=True) for a, b, rtol in pairs):
            found = f"{self.loss_and_norm.tolist()}, run eagerly {expected.tolist()}"
            where = f"where rounding to {self.machine.dtype} moves the gradient by {moved:.1%}"
            raise RuntimeError(f"step {step}: loss and gradient norm are {found}, {where}")


@dataclass
class Point:
    """How far a run has come."""

    step: int = 0
    curve: list = field(default_factory=list)  # [step, validation loss]
    rounding: list = field(default_factory=list)  # [step, how far rounding moves the gradient]
    seconds: float = 0.0
    stops: list = field(default_factory=list)  # the steps at which it was saved
    diverged: bool = False


class Keep(NamedTuple):
    """A run's files in --keep: what it goes on from, and its weights when it is done."""

    weights: Path
    until: float = math.inf  # time.time() at which it is to stop

    @property
    def state(self) -> Path:
        return self.weights.with_suffix(".state")  # no .pt: words.py takes FOLDER/*.pt

    def time_is_up(self, steps: int, device: torch.device) -> bool:
        """Asked before each step, and answered after every hundred."""
        if steps == 0 or steps % STEPS_BETWEEN_LOOKS:
            return False
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # or the host would be hundreds of steps ahead
        return time.time() >= self.until

    def save(self, run: Run, training: Training, at: Point) -> None:
        state = dict(
            run=row_of(run), text=training.meta["sources"], at=asdict(at),
            model=training.model.state_dict(), optimizer=training.optimizer.state_dict(),
        )  # fmt: skip
        write_atomically(self.state, lambda file: torch.save(state, file))

    def restore(self, run: Run, training: Training) -> Point:
        """Where the run was stopped, the start if it was not. RuntimeError if it is another."""
        if not self.state.is_file():
            return Point()
        state = torch.load(self.state, training.machine.device, weights_only=True)
        if (state["run"], state["text"]) != (row_of(run), training.meta["sources"]):
            raise RuntimeError(f"{self.state} is of another run or text: remove it")
        training.model.load_state_dict(state["model"])
        training.optimizer.load_state_dict(state["optimizer"])
        training.use_rate()  # what was loaded has a tensor of its own
        return Point(**state["at"])

    def finish(self, run: Run, training: Training, val_loss: float) -> dict:
        """Keeps the weights as a checkpoint that sample.py and words.py read.

        Returns the file's name and sha256, which depends on the run alone.
        """
        model = {k: w.to("cpu", torch.bfloat16) for k, w in training.model.state_dict().items()}
        if run.cfg.tied:
            model["head.weight"] = model["embed.weight"]  # once in the file
        checkpoint = dict(
            format=FORMAT, model=model, config=asdict(run.cfg), step=run.max_iters,
            best_loss=val_loss, tokenizer=training.meta["tokenizer"], run=row_of(run),
            data=source_of(training.meta), args={}, optimizer={}, scaler={},
            rng=torch.zeros(0), seconds=0.0,
        )  # fmt: skip
        write_atomically(self.weights, lambda file: torch.save(checkpoint, file))
        return dict(file=self.weights.name, sha256=sha256_of(self.weights))


def train_run(
    run: Run, folder: Path, device_name: str = "auto", compile: str = "no",
    val_tokens: int | None = None, keep: Keep | None = None,
) -> dict:  # fmt: skip
    """Train one model and return its line of the results, less what the queue knows.

    val_tokens: validation tokens that count, from the first; None: all. keep: go on from there; if
    the time is up before the end, only stopped_at, a step, is returned.
    """
    began, waited = time.perf_counter(), 0.0
    with Machine(device_name) as machine:
        training = Training(run, folder, machine, compile)
        model, val_ids = training.model, training.val_ids[:val_tokens]
        interval = math.ceil(run.max_iters / POINTS)
        at = keep.restore(run, training) if keep else Point()
        first = at.step
        with attention_kernels(machine.device), contextlib.ExitStack() as lock:
            while at.step < run.max_iters and not at.diverged:
                if at.step == first + STEPS_BEFORE_CAPTURE and device_name in DEVICE_LOCKS:
                    asked = time.perf_counter()
                    lock.enter_context(held(DEVICE_LOCKS[device_name]))
                    waited = time.perf_counter() - asked
                if keep and keep.time_is_up(at.step - first, machine.device):
                    at.stops.append(at.step)
                    at.seconds += time.perf_counter() - began - waited
                    keep.save(run, training, at)
                    return dict(stopped_at=at.step)
                training.prepare_step(at.step)
                at.step += 1
                evaluation_due = at.step % interval == 0 or at.step == run.max_iters
                if evaluation_due:
                    expected, moved = training.eager_gradient()
                    at.rounding.append([at.step, moved if math.isfinite(moved) else None])
                training.step()
                if evaluation_due:
                    training.check_step(at.step, expected, moved)
                    with eagerly():
                        loss = evaluate(model, val_ids[: CURVE_TOKENS + 1], machine)
                    at.diverged = not math.isfinite(loss)
                    at.curve += [] if at.diverged else [[at.step, loss]]
            lock.close()  # the next run trains while this one is evaluated, within its seconds
            with eagerly():
                val_loss = None if at.diverged else evaluate(model, val_ids, machine)
                by_position = [] if at.diverged else loss_by_position(model, val_ids, machine)
            kept = {}
            if keep and not at.diverged:
                kept = dict(stops=at.stops, weights=keep.finish(run, training, val_loss))
    seconds = at.seconds + time.perf_counter() - began - waited
    return dict(
        **sizes(model), tokens=at.step * run.batch_size * run.cfg.block_size,
        **losses(val_loss, at.curve, training.meta), by_position=by_position,
        rounding=at.rounding, seconds=round(seconds, 1), compile=compile, **kept,
    )  # fmt: skip


def sizes(model: GPT) -> dict:
    size = measured_cache_bytes(model)
    share = size / cache_bytes(mha_of(model.cfg))
    params = sum(p.numel() for p in model.parameters())
    return dict(attn=model.cfg.attn, params=params, cache_bytes=size, cache_share=share)


def losses(val_loss: float | None, curve: list, meta: dict) -> dict:
    """The columns of losses; val_loss None: it is no longer finite."""
    best = min((loss for _, loss in curve), default=None)
    columns = dict(val_loss=val_loss, best_val_loss=best, ppl=None, bpb=None, curve=curve)
    if val_loss is not None:
        columns["ppl"] = math.exp(val_loss)
        columns["bpb"] = val_loss / math.log(2) * meta["val_tokens"] / meta["val_bytes"]
    return columns | dict(diverged=val_loss is None)


# --------------------------------------------------------------------------------------------------
# The queue


def size_of(cfg: dict, steps: int, batch_size: int) -> tuple:
    """Runs of equal size take equally long."""
    return cfg["n_layer"], cfg["dim"], steps, batch_size


def work_of(cfg: dict, params: float, steps: int, batch_size: int) -> float:
    return params * steps * batch_size * cfg["block_size"]


def estimate(run: Run, rows: list[dict], args: Args, device: str) -> float:
    """Seconds a run will take: those of the latest of its size here, else in proportion to work."""
    cfg = asdict(run.cfg)
    known = [
        row for row in rows
        if (row["device"], row["jobs"], row["diverged"]) == (device, args.jobs, False)
    ]  # fmt: skip
    for row in reversed(known):
        size = size_of(row["config"], row["steps"], row["batch_size"])
        if size == size_of(cfg, run.max_iters, run.batch_size):
            return row["seconds"]
    work = work_of(cfg, count_params(run.cfg), run.max_iters, run.batch_size)
    if not known:
        work_of_guess = 29.9e6 * 65.5e6
        return args.guess_seconds / work_of_guess * work
    shape = ("config", "params", "steps", "batch_size")
    rates = [row["seconds"] / work_of(*(row[name] for name in shape)) for row in known]
    return median(rates) * work


def describe(task: Task) -> str:
    return f"{task.study:10} {task.arm:20} lr {task.run.lr:<7.3g} seed {task.run.seed}"


def print_queue(args: Args, rows: list[dict], device: str) -> None:
    dataset = dataset_asked_for(args.dataset, args.smoke)
    done, total = results_by_run(rows, dataset), 0.0
    for number, task in enumerate(queue(args.study, args.smoke, done), 1):
        row = done.get(task.run)
        if row is None:
            seconds = estimate(task.run, rows, args, device)
            total += seconds
            state = f"{seconds:5.0f} s"
        else:
            state = "diverged" if row["diverged"] else f"loss {row['val_loss']:.4f}"
        print(f"{number:4}  {describe(task)}  {state}")
    minutes = total / len(devices_of(args.device)) / 60
    print(f"still to make: about {minutes:.0f} minutes")


def devices_of(name: str) -> list[str]:
    """Where runs may go: every GPU for "auto", else the one device."""
    count = torch.cuda.device_count() if name == "auto" else 0
    return [f"cuda:{i}" for i in range(count)] if count > 1 else [name]


@contextlib.contextmanager
def workers(jobs: int, devices: list[str]) -> Iterator[Callable[..., Future]]:
    """A function that starts work(*values) and returns its Future, `jobs` at a time on each device.

    Each has a process of its own: compiled code, captured graphs and cuDNN's plans would outlive a
    run, and have spoilt later ones. A single job on a CPU runs in this process.
    """
    spawn = get_context("spawn")
    locks = {device: spawn.Lock() for device in devices} if jobs > 1 else {}

    def in_own_process(work: Callable, *values):
        options = dict(mp_context=spawn, initializer=share_locks, initargs=(locks,))
        try:
            with ProcessPoolExecutor(1, **options) as process:
                return process.submit(work, *values).result()
        except BrokenExecutor:  # it was killed, perhaps with the lock; others are only slowed down
            for lock in locks.values():
                with contextlib.suppress(ValueError):  # nobody has it
                    lock.release()
            raise

    if jobs * len(devices) == 1 and pick_device(devices[0]).type == "cpu":
        yield in_this_process
    else:
        with ThreadPoolExecutor(jobs * len(devices)) as pool:
            yield lambda work, *values: pool.submit(in_own_process, work, *values)


@contextlib.contextmanager
def held(lock) -> Iterator[None]:
    """lock, which the parent releases for all if it sees a process that was killed."""
    lock.acquire()
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            lock.release()


def share_locks(locks: dict) -> None:
    """What a process begins with: a lock for each device."""
    DEVICE_LOCKS.update(locks)


def in_this_process(work: Callable, *values) -> Future:
    future = Future()
    try:
        future.set_result(work(*values))
    except Exception as e:
        future.set_exception(e)
    return future


class Scheduler:
    """Which run comes next, and what has become of those that were started."""

    def __init__(self, args: Args, path: Path, rows: list[dict], origin: dict):
        self.args, self.path, self.rows = args, path, rows
        self.columns = dict(jobs=args.jobs, **origin)
        self.dataset = dataset_asked_for(args.dataset, args.smoke)
        self.done = results_by_run(rows, self.dataset)
        self.stopped: set[Run] = set()
        self.failed: set[Run] = set()
        self.running: dict[Future, tuple[Task, str]] = {}  # with its device
        self.devices = devices_of(args.device)
        self.began = time.perf_counter()
        self.until = time.time() + args.limit_seconds

    @property
    def tasks(self) -> list[Task]:
        """The queue; results may change what is best, and so its end."""
        return list(queue(self.args.study, self.args.smoke, self.done))

    def train_all(self, start: Callable[..., Future], *values) -> None:
        """values: what train_run takes between the device and what is kept."""
        while True:
            for task, device in self.next_tasks():
                which = task.run, prepare_text(self.args, task.study), device
                self.running[start(train_run, *which, *values, self.keep(task))] = task, device
            if not self.running:
                break
            for future in wait(self.running, return_when=FIRST_COMPLETED).done:
                self.finish(future)

    def keep(self, task: Task) -> Keep | None:
        if self.args.keep is None:
            return None
        which = task.study, task.arm, f"{task.run.lr:g}", str(task.run.seed), self.text_of(task)
        return Keep(self.args.keep / f"{'-'.join(which)}.pt", self.until)

    def text_of(self, task: Task) -> str:
        return self.dataset or dataset_of(task.study)

    def next_tasks(self) -> Iterator[tuple[Task, str]]:
        """What to start now, and where: on the device with the fewest runs."""
        while len(self.running) < self.args.jobs * len(self.devices):
            busy = [device for _, device in self.running.values()]
            device = min(self.devices, key=busy.count)
            task = self.next_task(device)
            if task is None:
                return
            yield task, device

    def next_task(self, device: str) -> Task | None:
        """The first of the queue that is neither done nor failed nor running, and fits the time.

        No second seed beside a run of its arm, which may change what rate is best.
        """
        passed = time.perf_counter() - self.began
        running = [(task.run, place) for task, place in self.running.values()]
        ahead = sum(self.seconds(run) for run, place in running if place == device)
        taken = self.failed | self.stopped | {run for run, _ in running}
        unsure = {(task.study, task.arm) for task, _ in self.running.values()}  # of the best rate
        for task in self.tasks:
            if task.run in self.done or task.run in taken:
                continue
            if task.run.seed and (task.study, task.arm) in unsure:
                continue
            needed = self.seconds(task.run)
            if self.args.keep:
                needed = min(needed, WORTH_BEGINNING)
            if passed + ahead + needed <= self.args.limit_seconds:
                return task
        return None

    def seconds(self, run: Run) -> float:
        return estimate(run, self.rows, self.args, self.columns["device"])

    def finish(self, future: Future) -> None:
        """Append the line of a run that has ended, or say that it failed."""
        task, _ = self.running.pop(future)
        try:
            result = future.result()
        except Exception as e:  # out of memory, say: the others go on
            self.failed.add(task.run)
            print(f"{describe(task)}  failed: {type(e).__name__}: {e}", flush=True)
            return
        if "stopped_at" in result:
            self.stopped.add(task.run)
            step = f"step {result['stopped_at']:,} of {task.run.max_iters:,}"
            print(f"{describe(task)}  stopped at {step}, kept in {self.args.keep}", flush=True)
            return
        name = STUDIES[task.study][task.arm].name
        which = dict(study=task.study, arm=task.arm, name=name)
        which |= dict(dataset=self.text_of(task))
        row = {**which, **row_of(task.run), **result, **self.columns}
        self.rows.append(row)
        self.done[task.run] = row
        append_line(self.path, row)
        if keep := self.keep(task):
            keep.state.unlink(missing_ok=True)
        outcome = "diverged"
        if not row["diverged"]:
            outcome = f"loss {row['val_loss']:.4f}  perplexity {row['ppl']:.2f}"
        print(f"{describe(task)}  {outcome}  {row['seconds']:.0f} s", flush=True)


def prepare_text(args: Args, study: str) -> Path:
    if args.smoke:
        text = dict(dataset="shakespeare", tokenizer="byte")
    else:
        corpus = args.dataset or TEXTS.get(study, "pg-books")
        text = dict(dataset=corpus, tokenizer="bpe", vocab_size=VOCAB)
    return prepare(**text, source=args.source, data_dir=args.data_dir)


def main(args: Args) -> None:
    require_positive(args, "jobs", "limit_seconds", "guess_seconds")
    device = pick_device(args.device)
    if args.keep and args.keep.is_file():
        raise BadInput(f"--keep {args.keep}: is a file, give a folder")
    path = args.results or (ROOT / "out" / "smoke.jsonl" if args.smoke else RESULTS)
    if args.smoke and not args.results and not args.dry_run:
        path.unlink(missing_ok=True)
    rows, origin = read_results(path), provenance(device)
    if args.dry_run:
        print_queue(args, rows, origin["device"])
        return
    scheduler = Scheduler(args, path, rows, origin)
    for folder in filter(None, (path.parent, args.keep)):
        folder.mkdir(parents=True, exist_ok=True)
    drop_cut_line(path)
    how = args.compile
    if how == "auto":
        how = "blocks" if can_compile(device) else "no"
    with workers(args.jobs, scheduler.devices) as start:
        scheduler.train_all(start, how, SMOKE_TOKENS if args.smoke else None)
    left = sum(task.run not in scheduler.done for task in scheduler.tasks)
    print(f"{len(rows)} results in {path}, {left} runs still to make")
    print("next: python experiments/study/plot.py")
    if scheduler.failed:
        raise SystemExit(1)


if __name__ == "__main__":
    run_command(main, Args)
