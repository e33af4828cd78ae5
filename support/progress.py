"""Where a training stands: what a checkpoint holds of it, and what is said of it on the way.

Everything that train.py's loop would otherwise have to say in between: lines on the terminal, rows
of metrics.jsonl, the first and the last words of a run.
"""

import contextlib
import math
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mfa import GPT, Config, cache_bytes, preset
from support.cli import BadInput
from support.files import name_the_file
from support.log import Tracker
from support.machine import Machine, attention_kernels
from support.run_folder import (
    Run,
    config_of,
    load_checkpoint,
    load_weights,
    model_from,
    shell_quoted,
)
from support.sharded_state import load_state_of, state_of, weights_of, whole
from support.tokenizers import start_of_text, tokenizer_from
from support.train_flags import not_used

# Flags that a resumed run may change; a change of any other would make it another run.
MAY_CHANGE = {
    "resume", "overwrite", "out", "data_dir", "plugin", "max_iters", "grad_accum", "eval_interval",
    "log_interval", "device", "dtype", "compile", "threads", "shard", "checkpoint_blocks", "log",
}  # fmt: skip


def duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes} min {seconds:02} s" if minutes else f"{seconds} s"


def count(model: GPT) -> int:
    return sum(p.numel() for p in model.parameters())


def plain(args: Any) -> dict:
    """Flags as a checkpoint keeps them: no objects, and files where any folder finds them."""
    flags = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(args).items()}
    for name in ("file", "data_dir", "init_from"):
        if flags[name]:
            flags[name] = os.path.abspath(flags[name])
    return flags


def source_of(meta: dict) -> dict:
    """What a checkpoint remembers of its text: of the meta.json that prepare_data.py wrote."""
    return {k: meta[k] for k in ("sources", "train_tokens", "val_tokens")}


def text_of(source: dict) -> str:
    files = [f"{file['name']} of sha256 {file['sha256'][:8]}" for file in source["sources"]]
    return f"{', '.join(files)}, {source['train_tokens']:,} + {source['val_tokens']:,} tokens"


def same_text(a: dict, b: dict) -> bool:
    """Are two texts the same, and cut into as many tokens? Their names do not matter."""
    sums = [[file["sha256"] for file in source["sources"]] for source in (a, b)]
    sizes = [(source["train_tokens"], source["val_tokens"]) for source in (a, b)]
    return sums[0] == sums[1] and sizes[0] == sizes[1]


def cache_line(cfg: Config, mha: Config) -> str:
    ours, theirs = cache_bytes(cfg), cache_bytes(mha)
    return f"cache: {ours:,} bytes per token at 16 bit, {ours / theirs:.2%} of MHA's {theirs:,}"


class Pace:
    """Notices, once, that steps have come to take far longer than the ones before."""

    times, seconds = 4, 2.0  # so many times as long; in less time chance decides

    def __init__(self):
        self.best, self.told = math.inf, False  # best: seconds a step

    def slower(self, steps: int, seconds: float) -> float:
        """How many times as long as the best before these steps took, or 0: not worth a line."""
        each = max(seconds, 1e-9) / steps
        times, self.best = each / self.best, min(each, self.best)
        if self.told or times < self.times or seconds < self.seconds:
            return 0.0
        self.told = True
        return times


@dataclass
class Progress:
    """args: train.py's flags. meta: the text's meta.json."""

    args: Any
    machine: Machine
    run: Run
    meta: dict
    step: int = 0
    best_loss: float = math.inf
    seconds: float = 0.0  # of training and evaluation, over all resumptions
    evaluation_seconds: float = 0.0  # of the last one

    def __post_init__(self):
        self.losses: list[Tensor] = []  # of the steps since the last line, still on the device
        self.pace = Pace()
        self.unit = "character" if self.args.tokenizer == "char" else "token"

    # Checkpoints

    def state(self, model: GPT, optimizer: torch.optim.Optimizer) -> dict:
        """All that is needed to go on."""
        python = sys.version.split()[0]
        versions = dict(torch=str(torch.__version__), numpy=np.__version__, python=python)
        counted = dict(params=count(model), cache_bytes=cache_bytes(model.cfg))
        return dict(
            model=weights_of(model), optimizer=state_of(model, optimizer),
            scaler=self.machine.scaler.state_dict(), rng=torch.get_rng_state(), step=self.step,
            tokens=self.step * self.args.batch_size * self.args.model.block_size,
            best_loss=self.best_loss, seconds=self.seconds, config=asdict(model.cfg),
            tokenizer=self.meta["tokenizer"], data=source_of(self.meta), args=plain(self.args),
            versions=versions, counted=counted,  # compare.py runs no plug-in to know them
        )  # fmt: skip

    def restore(self, model: GPT, optimizer: torch.optim.Optimizer) -> None:
        """Goes on from the run's checkpoint. BadInput if it is of another model or text."""
        ckpt, latest = self.run.checkpoint, self.run.latest
        if self.args.max_iters < ckpt["step"] + (ckpt["best_loss"] == math.inf):
            what = f"{latest} is at step {ckpt['step']} already, give more"
            raise BadInput(f"--max_iters {self.args.max_iters}: {what}")
        now = {**plain(self.args), **asdict(model.cfg), "the text": text_of(source_of(self.meta))}
        then = {**plain(type(self.args)()), **asdict(Config()), **ckpt["args"], **ckpt["config"]}
        then["the text"] = text_of(ckpt["data"])
        changed = [k for k in now if k not in MAY_CHANGE | {"model"} and then.get(k) != now[k]]
        if same_text(ckpt["data"], source_of(self.meta)):  # however it was called
            changed = [k for k in changed if k not in ("file", "dataset", "the text")]
        if changed:
            what = ", ".join(f"{k} was {then.get(k)!r} and is now {now[k]!r}" for k in changed)
            advice = "leave them as they were, or give another --out"
            raise BadInput(f"--resume: {latest} is of another run: {what}; {advice}")
        config_of(ckpt, latest)
        load_weights(model, ckpt, latest)
        load_state_of(model, optimizer, ckpt["optimizer"])
        if ckpt["scaler"]:  # of float16; --dtype may have changed
            self.machine.scaler.load_state_dict(ckpt["scaler"])
        torch.set_rng_state(ckpt["rng"])  # nothing below draws from it, but what you add may
        self.step, self.best_loss = ckpt["step"], ckpt["best_loss"]
        self.seconds = ckpt["seconds"]
        before = then["max_iters"]
        if before != self.args.max_iters and self.step > self.args.warmup_iters:
            self.machine.print(
                f"--max_iters was {before:,} and is {self.args.max_iters:,}: the learning rate now "
                f"decays to there, so it jumps at step {self.step:,}"
            )

    @contextlib.contextmanager
    def begun(self, model: GPT, optimizer: torch.optim.Optimizer):
        """The first save, which is taken back where not even one step succeeds."""
        if self.args.log != "none" and self.machine.first:
            went_on = self.step if self.run.checkpoint else None
            self.run.follow(Tracker(self.args.log, self.run.folder, plain(self.args), went_on))
        if not self.run.checkpoint:
            if self.args.plugin:
                self.run.keep(self.args.plugin)
            self.run.begin(self.state(model, optimizer))
        if self.args.compile:
            self.machine.print("compiling: the first step takes up to half a minute ...")
        self.clock = time.perf_counter()
        self.started = self.told = self.step
        try:
            yield
        except RuntimeError:  # out of memory, say
            if self.step == 0:
                self.run.withdraw()
            raise

    # On the way

    def stepped(self, loss: Tensor) -> None:
        self.losses.append(loss)
        self.step += 1
        if self.args.compile and self.step == self.started + 1:
            self.read_losses()  # waits for the step, whose time is no measure of the others'
            self.machine.print(f"compiled in {self.lap():.0f} s")
            self.told = self.step

    @property
    def line_due(self) -> bool:
        """Is it time for a line? A process alone need not wait to tell others of a signal."""
        caught = self.machine.world == 1 and self.machine.signals.caught
        return bool(self.step % self.args.log_interval == 0 or caught)

    def lap(self) -> float:
        """Seconds since the last lap."""
        now = time.perf_counter()
        elapsed, self.clock = now - self.clock, now
        return elapsed

    def read_losses(self) -> float:
        """The mean loss of the steps since the last line. Ends the run if one is not finite."""
        losses = self.machine.sum(torch.stack(self.losses) / self.machine.world)
        self.losses.clear()
        for at, loss in enumerate(losses.tolist(), self.step - len(losses) + 1):
            self.stop_unless_finite(loss, "the loss", at)
        return losses.mean().item()

    def tell_training(self, rate: float) -> None:
        """A line about the steps since the last one; after it all processes know of signals."""
        if not self.losses:
            return
        args, loss, elapsed = self.args, self.read_losses(), self.lap()
        self.seconds += elapsed
        steps = self.step - self.told
        speed = steps / elapsed  # steps a second
        self.told = self.step
        tokens = round(speed * args.batch_size * args.model.block_size)
        line = f"step {self.step:>6}  loss {loss:.4f}  {tokens:>11,} tokens/s"
        self.machine.print(f"{line}  {self.left(speed)} left")
        row = dict(train_loss=loss, lr=rate, tokens_per_s=tokens, seconds=round(self.seconds, 3))
        self.run.log(step=self.step, **row)
        self.tell_pace(self.pace.slower(steps, elapsed))
        self.machine.agree()
        self.lap()

    def left(self, speed: float) -> str:
        """Of the steps, speed a second, and of the evaluations, once there was one."""
        args = self.args
        evaluations = math.ceil(args.max_iters / args.eval_interval)
        evaluations -= (self.step - 1) // args.eval_interval  # the one that is due comes later
        seconds = (args.max_iters - self.step) / speed + evaluations * self.evaluation_seconds
        return duration(seconds)

    def tell_pace(self, times: float) -> None:
        if times and self.machine.device.type == "cpu" and torch.get_num_threads() > 1:
            self.machine.print(
                f"these steps took {times:.0f} times as long as the ones before: on a shared "
                f"machine two threads can be ten times slower than one: try --threads 1"
            )

    def tell_validation(self, loss: float) -> bool:
        """A line about an evaluation. Is it the best so far?"""
        self.stop_unless_finite(loss, "the validation loss", self.step)
        bpb = loss / math.log(2) * self.meta["val_tokens"] / self.meta["val_bytes"]
        better = loss < self.best_loss
        self.best_loss = min(self.best_loss, loss)
        self.evaluation_seconds = self.lap()
        self.seconds += self.evaluation_seconds
        note = "  best so far" if better else ""
        value = f"{loss:.4f} nats per {self.unit}, {bpb:.4f} bits per byte"
        self.machine.print(f"step {self.step:>6}  validation {value}{note}")
        row = dict(val_loss=loss, val_bpb=bpb, best_loss=self.best_loss)
        self.run.log(step=self.step, **row, seconds=round(self.seconds, 3))
        return better

    def stop_unless_finite(self, value: float, what: str, step: int) -> None:
        if not math.isfinite(value):
            raise SystemExit(
                f"{what} is {value} at step {step}: stopped. {self.run.latest} holds the last good "
                f"state. Try half the --learning_rate, a longer --warmup_iters, or --dtype "
                f"float32, with another --out"
            )

    def check_weights(self, model: GPT) -> None:
        total = sum(whole(p.sum()).item() for p in model.parameters())
        self.stop_unless_finite(total, "the sum of the weights", self.step)

    # The first and the last words

    def describe(self, model: GPT, mha: Config, n_mha: int, n_tokens: tuple[int, int]) -> None:
        """What is going to be trained, on what, and where it goes. n_mha: parameters of MHA's."""
        args, machine, cfg, run = self.args, self.machine, model.cfg, self.run
        n = count(model)
        sizes = f"{cfg.n_layer} layers, dim {cfg.dim}, {cfg.heads} heads, context {cfg.block_size}"
        machine.print(f"{cfg.attn}: {sizes}, on {machine.device}, {str(machine.dtype)[6:]}")
        widths = f"(FFN {cfg.ffn} wide, MHA's {mha.ffn})"
        machine.print(f"{n:,} parameters, {n / n_mha:.1%} of MHA's {n_mha:,} {widths}")
        machine.print(cache_line(cfg, mha))
        for name in [] if run.checkpoint else not_used(args.model, preset(args.preset, cfg.attn)):
            machine.print(f"note: {cfg.attn} does not use --{name}")
        if args.plugin:
            kept = run.folder / args.plugin.name
            machine.print(f"attention: {cfg.attn} of {kept if run.checkpoint else args.plugin}")
        if args.init_from:
            machine.print(f"weights: begun with those of {args.init_from}")
        sizes = f"{n_tokens[0]:,} + {n_tokens[1]:,} tokens, vocabulary {cfg.vocab_size:,}"
        machine.print(f"text: {self.meta['name']}, {sizes}")
        how = f", resumed at step {self.step}" if run.checkpoint else ""
        if args.resume and not run.checkpoint:
            how = ", from the start: there is no latest.pt"
        steps = f"{args.max_iters} steps of {args.batch_size} x {cfg.block_size} tokens"
        machine.print(f"run: {run.folder}, {steps}{how}")

    def finish(self, mha: Config) -> None:
        """A sample from the best checkpoint, the figures, and what to do next."""
        best, device = self.run.best, self.machine.device
        if self.machine.shard:  # it may be too large for this one
            device = torch.device("cpu")
        ckpt = load_checkpoint(best, mmap=True)
        model, tokenizer = model_from(ckpt, best, device), tokenizer_from(ckpt["tokenizer"])
        prompt = torch.tensor([start_of_text(tokenizer)], device=device)  # (1, T)
        g = torch.Generator(device).manual_seed(0)
        with attention_kernels(device, decoding=True):
            ids = model.generate(prompt, 200, temperature=0.8, generator=g)[0, 1:]
        ids = ids[ids < tokenizer.n_vocab]  # --vocab_size may leave room beyond the tokenizer's
        attn, n = model.cfg.attn, count(model)
        value = f"{ckpt['best_loss']:.4f} nats per {self.unit}"
        print(f"\na sample at temperature 0.8:\n{tokenizer.decode(ids.tolist()).strip()}\n")
        print(f"{attn}: best validation loss {value}, at step {ckpt['step']}")
        print(f"{n:,} parameters, {duration(self.seconds)} of training and evaluation")
        print(cache_line(model.cfg, mha))
        print(f"in {best.parent}: best.pt, latest.pt, metrics.jsonl, loss.png")
        print(f"next: python sample.py --checkpoint {shell_quoted(best)}")
        if not self.args.init_from:  # another attention has no use for those weights
            print(f"  or: the same with --attn {'mha' if attn != 'mha' else 'mfa_kr'}, to compare")

    def plot(self) -> None:
        """loss.png from metrics.jsonl."""
        import matplotlib.figure  # slow to import, and needed once

        figure = matplotlib.figure.Figure(figsize=(7, 4.5), layout="constrained")
        ax = figure.subplots()
        rows = self.run.rows()
        for key, label, style in (
            ("train_loss", "training", "-"), ("val_loss", "validation", "o-"),
        ):  # fmt: skip
            points = [(row["step"], row[key]) for row in rows if key in row]
            if points:
                ax.plot(*zip(*points, strict=True), style, label=label, markersize=4)
        name = os.fsencode(self.run.folder.name).decode("utf-8", "replace")
        ax.set_title(f"{name}: validation {self.best_loss:.4f} at best", parse_math=False)
        ax.set(xlabel="step", ylabel="loss, nats per token")
        ax.grid(alpha=0.3)
        ax.legend()
        with name_the_file(self.run.curve):
            figure.savefig(self.run.curve, dpi=120)

    def end(self, model: GPT, mha: Config) -> dict:
        """The last words, and what train() returns."""
        stopped = self.machine.signal if self.step < self.args.max_iters else 0
        if self.machine.first and stopped:
            out = shell_quoted(self.run.folder)
            print(f"stopped at step {self.step}, saved in {self.run.latest}")
            print(f"to go on: python train.py --resume --out {out}")
        elif self.machine.first:
            self.plot()
            self.finish(mha)
            from support.compare import compare_neighbours  # which imports this file

            compare_neighbours(self.run.folder)
        return dict(
            out=self.run.folder, step=self.step, best_loss=self.best_loss, seconds=self.seconds,
            params=count(model), stopped=stopped,
        )  # fmt: skip
