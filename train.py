"""Train a language model with any of the seven attentions: python train.py --attn mfa_kr

The paper's recipe (Section 4.1): AdamW (0.9, 0.95), eps 1e-8, weight decay 0.1 on matrices, clipping at 1.0, linear
warm-up, cosine decay to 1e-5. Attentions are compared at equal parameters: the FFN takes what the attention saves.

A run lives in one folder, out/<preset>-<attn> unless --out says otherwise:

    latest.pt, best.pt    all that is needed to go on (--resume) or to sample: weights, optimizer, config, tokenizer
    metrics.jsonl         one object a line; validation rows have step, val_loss (nats per token) and val_bpb
    loss.png              the curves

Everything random in step s is drawn from (seed, s), so a run that was stopped and resumed, on any number of
processes, sees the same batches as one that was not. torchrun --nproc_per_node=N train.py ... shares each batch out.
"""

import argparse
import contextlib
import ctypes
import importlib.util
import json
import math
import os
import re
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import torch.distributed as dist
import tyro
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel

from mfa import ATTENTION, GPT, PRESETS, Config, preset
from prepare_data import DATA, BadInput, load, prepare, run_command, tokenizer_from

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

FORMAT = 1  # of a checkpoint; raised when old ones can no longer be read
NEEDED = dict.fromkeys("model optimizer scaler config tokenizer data args".split(), dict)  # what it must hold
NEEDED |= dict(rng=Tensor, step=int, best_loss=float, seconds=float)


@dataclass
class Train:
    """Train a language model with any of the seven attentions and compare them at equal parameters."""

    model: Annotated[Config, tyro.conf.arg(name="")] = field(default_factory=Config)
    preset: Literal["tiny", "baby", "small", "paper-1b", "paper-7b"] = "tiny"  # sizes and recipe that other flags start from
    dataset: str = "shakespeare"  # corpus, as in prepare_data.py, which is run when its data is missing
    file: str | None = None  # your own text, a file or a folder, instead of a corpus
    tokenizer: Literal["char", "byte", "bpe", "gpt2"] = "char"  # bpe is trained on the text, with --vocab_size tokens
    out: Path | None = None  # folder of the run; default out/<preset>-<attn>
    resume: bool = False  # go on from latest.pt in --out; flags that are not given are taken from there
    overwrite: bool = False  # replace the run that --out holds
    data_dir: Path = DATA  # where prepared corpora are kept

    max_iters: int = 2000  # optimizer steps
    batch_size: int = 16  # sequences per step, over all processes and accumulation steps
    grad_accum: int = 1  # pieces each process cuts its share of the batch into, to save memory
    learning_rate: float = 3e-3  # peak, after the warm-up
    min_lr: float = 1e-5  # end of the cosine decay
    warmup_iters: int = 100  # steps of linear warm-up
    weight_decay: float = 0.1  # on matrices; gains and gates have none
    beta2: float = 0.95  # decay of AdamW's second moment
    grad_clip: float = 1.0  # largest norm of the gradient; 0: not clipped
    match_params: bool = True  # choose the FFN width so that the total parameters equal those of MHA (fpba excepted)

    eval_interval: int = 250  # steps between evaluations, each a sweep over the whole validation split, and checkpoints
    eval_tokens: int = 0  # evaluate on this many validation tokens, always the same; 0: all of them
    log_interval: int = 50  # steps between lines on the terminal
    seed: int = 1337  # of the weights and the batches
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps ...
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of products alone; auto: bfloat16 if the GPU has it
    compile: bool = False  # torch.compile: a slow start, then faster steps; the default on a GPU; a CPU needs a C++ compiler


# What each preset's recipe changes in the defaults above.
RECIPES = {
    "tiny": {},
    # A million characters, read forty times: what helps most is a weight decay far from the paper's 0.1.
    "baby": dict(batch_size=64, max_iters=2000, learning_rate=2e-3, weight_decay=4.0, beta2=0.99, eval_interval=100),
    "small": dict(batch_size=512, grad_accum=16, max_iters=20_000, learning_rate=6e-4, warmup_iters=700),
    "paper-1b": dict(batch_size=24, grad_accum=24, max_iters=50_000, learning_rate=9.63e-4, warmup_iters=2000),
    "paper-7b": dict(batch_size=448, grad_accum=448, max_iters=140_000, learning_rate=8.4e-4, warmup_iters=2000),
}
# Flags that may change when a run is resumed; a change of any other would make it another run.
FREE = {"resume", "overwrite", "out", "data_dir", "max_iters", "grad_accum", "eval_interval", "log_interval", "device",
        "dtype", "compile"}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Sizes


def count_params(cfg: Config) -> int:
    """Parameters of the whole model, counted on tensors that take no memory."""
    with torch.device("meta"):
        model = GPT(replace(cfg, n_layer=min(cfg.n_layer, 2)))  # every layer but the first is like the second
    more = cfg.n_layer - len(model.blocks)
    return sum(p.numel() for p in model.parameters()) + more * sum(p.numel() for p in model.blocks[-1].parameters())


def mha_of(cfg: Config) -> Config:
    """The MHA model that cfg is compared with. Table 7 gives MHA experts of its own; elsewhere all else is equal."""
    table7, own = PRESETS["paper-7b"], PRESETS["paper-7b"].get(cfg.attn, {})
    other = {k: table7[k] for k in own} if all(getattr(cfg, k) == v for k, v in own.items()) else {}
    return replace(cfg, attn="mha", n_head=0, **other)


def match_params(cfg: Config) -> Config:
    """cfg with the FFN (or routed expert) width at which its total parameters equal its MHA model's, within 1%.

    A width already that close stays (Table 7 brings its own). Raises ValueError if the attention alone is too large.
    """
    name, width = ("moe_ffn_dim", cfg.moe_ffn_dim) if cfg.n_expert else ("ffn_dim", cfg.ffn)
    want, have = count_params(mha_of(cfg)), count_params(cfg)
    if abs(have - want) < 0.005 * want:
        return cfg
    unit = count_params(replace(cfg, **{name: width + 1})) - count_params(replace(cfg, **{name: width}))
    exact = width + (want - have) / unit
    for multiple in (64, 8, 1):  # round widths suit the matrix units, where there is room for them
        rounded = max(multiple, round(exact / multiple) * multiple)
        if abs(rounded - exact) * unit < 0.008 * want:
            return replace(cfg, **{name: rounded})
    raise ValueError(f"no {name} gives {cfg.attn} MHA's {want:,} parameters: make the attention smaller, or --no-match_params")


# ---------------------------------------------------------------------------------------------------------------------
# Data: one long tensor of ids, on the device if it fits


def as_tensor(ids: np.ndarray, device: torch.device) -> Tensor:
    """The memory-mapped ids as a tensor of the same bytes: in a GPU's memory up to a quarter of it, else left on disk."""
    signed = torch.from_numpy(ids.view(f"i{ids.itemsize}"))  # torch cannot index uint16; `window` undoes the sign
    if device.type == "cuda" and ids.nbytes < torch.cuda.get_device_properties(device).total_memory / 4:
        return signed.to(device)
    return signed


def window(ids: Tensor, starts: Tensor, length: int, device: torch.device) -> Tensor:
    """ids[s : s + length] for each s of starts (B,): (B, length), int64."""
    at = starts.to(ids.device, non_blocking=True)[:, None] + torch.arange(length, device=ids.device)  # (B, length)
    tokens = ids[at].to(device, non_blocking=True).long()
    return tokens & 0xFFFF if ids.dtype == torch.int16 else tokens


def batch_starts(args: Train, step: int, n_tokens: int) -> Tensor:
    """Where the sequences of a step begin, whatever has run before: (batch_size,)."""
    g = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
    return torch.randint(n_tokens - args.model.block_size, (args.batch_size,), generator=g)


@torch.no_grad()
def evaluate(model: GPT, ids: Tensor, device: torch.device, autocast, rank: int = 0, world: int = 1) -> float:
    """Mean cross-entropy in nats per token over all of ids but its first, in windows of block_size side by side."""
    T, training = model.cfg.block_size, model.training
    rows = max(1, 16384 // T)
    n_window = math.ceil((len(ids) - 1) / T)
    total, count = torch.zeros((), device=device, dtype=torch.float64 if device.type != "mps" else None), 0
    model.eval()
    for first in range(rank * rows, n_window, world * rows):
        starts = torch.arange(first, min(first + rows, n_window)) * T
        short = int(starts[-1]) + T + 1 - len(ids)  # the last window may reach over the end: its tokens there count -1
        if short > 0:
            starts[-1] -= short
        tokens = window(ids, starts, T + 1, device)
        targets = tokens[:, 1:].clone()
        if short > 0:
            targets[-1, :short] = -1  # seen by the window before
        with autocast():
            loss = model(tokens[:, :-1], targets)[1]
        n = targets.numel() - max(short, 0)
        total, count = total + loss * n, count + n
    model.train(training)
    if world > 1:
        both = torch.stack((total, torch.full_like(total, count)))
        dist.all_reduce(both)
        total, count = both[0], both[1].item()
    return total.item() / count


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


@contextlib.contextmanager
def naming(path: Path):
    """Makes an OSError name the file: that of a full disk does not, and torch.save hides it behind a RuntimeError."""
    try:
        yield
    except (OSError, RuntimeError) as e:
        first = e if isinstance(e, OSError) else e.__context__
        if not isinstance(first, OSError):
            raise
        raise OSError(first.errno, first.strerror, str(path)) from e


def write_atomically(path: Path, write) -> None:
    """write(file) into a neighbour of path, flushed to the disk, then renamed: path is whole or not there."""
    part = path.with_name(path.name + ".part")
    try:
        with naming(path), open(part, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def same_file(path: Path, other: Path) -> None:
    """Makes other the same file as path, which costs nothing, or a copy of it where the disk has no links."""
    part = other.with_name(other.name + ".part")
    part.unlink(missing_ok=True)
    try:
        os.link(path, part)
        os.replace(part, other)
    except OSError:
        write_atomically(other, lambda f: f.write(path.read_bytes()))


def load_checkpoint(path: Path, map_location="cpu") -> dict:
    """What `train` saved. Nothing in the file is executed. Raises BadInput if it is not a checkpoint of this version."""
    if not path.is_file():
        what = f"is a folder: give {path / 'best.pt'}" if path.is_dir() else "is not there: train one with python train.py"
        raise BadInput(f"checkpoint {path} {what}")
    try:
        with warnings.catch_warnings(action="ignore"):  # what torch finds odd about a file that is none
            ckpt = torch.load(path, map_location=map_location, weights_only=True)
    except Exception as e:  # a damaged file can raise nearly anything
        what = "is not a checkpoint of train.py, or a damaged one" if path.stat().st_size else "is empty"
        raise BadInput(f"{path} {what} ({type(e).__name__}): give a best.pt or latest.pt of a run") from e
    if not isinstance(ckpt, dict) or "format" not in ckpt:
        raise BadInput(f"{path} is not a checkpoint of train.py: give a best.pt or latest.pt of a run")
    if ckpt["format"] != FORMAT:
        raise BadInput(f"{path} is of format {ckpt['format']}, not {FORMAT}: train it again with this train.py")
    if missing := [name for name, kind in NEEDED.items() if not isinstance(ckpt.get(name), kind)]:
        raise BadInput(f"{path} is damaged: it has no {', '.join(missing)}")
    return ckpt


def model_from(ckpt: dict, path: Path, device: torch.device) -> GPT:
    """The model of a checkpoint. Raises BadInput when weights and config do not belong together."""
    try:
        model = GPT(Config(**ckpt["config"]))
        model.load_state_dict(ckpt["model"])
    except (RuntimeError, ValueError, TypeError, KeyError) as e:
        raise BadInput(f"{path} does not fit its own config: {str(e).splitlines()[-1].strip()}") from e
    return model.to(device)


def start_of_text(tokenizer) -> list[int]:
    """What a new text goes on from: the token between documents, else a new line, else the first token there is."""
    if tokenizer.eot is not None:
        return [tokenizer.eot]
    try:
        return tokenizer.encode("\n").tolist()
    except BadInput:  # a text of one line
        return [0]


# ---------------------------------------------------------------------------------------------------------------------
# Device


def pick_device(name: str) -> torch.device:
    """The device called name; for "auto", what this machine has: cuda, else mps, else cpu."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as e:
        raise BadInput(f"--device {name}: not on this machine; --device auto takes what there is") from e
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        name = "bfloat16" if fast else "float32"
    return getattr(torch, name)


def can_compile(device: torch.device) -> bool:
    """torch.compile always pays on a GPU; it needs Triton (not on Windows) and compute capability 7."""
    found = device.type == "cuda" and importlib.util.find_spec("triton") is not None
    return found and torch.cuda.get_device_capability(device) >= (7, 0)


def keep_memory(device: torch.device) -> None:
    """Keeps freed memory in the process. glibc gives it back after each step and takes it anew: a fifth of a step on a CPU."""
    if device.type == "cpu" and sys.platform == "linux":
        with contextlib.suppress(AttributeError, OSError):  # another C library
            mallopt, trim_threshold, mmap_threshold = ctypes.CDLL(None).mallopt, -1, -3
            mallopt(trim_threshold, 1 << 30)
            mallopt(mmap_threshold, 1 << 25)  # the most it takes


def attention_kernels(device: torch.device, decoding: bool = False):
    """On a GPU, cuDNN's attention first: it trains 1.7 times as fast as FlashAttention at MFA's head width of 256.

    Not in decoding, where it plans anew for every length: 40 ms for each token of a new text. PyTorch keeps its plan of a
    backward pass by the sizes and strides of q, k and v, and reads every later gradient of o, whatever its strides, as that
    of the first (torch 2.11, ATen/native/cudnn/MHA.cpp): in one process these strides must be the same in all models.
    """
    order = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    order = order if decoding else [SDPBackend.CUDNN_ATTENTION, *order]
    return sdpa_kernel(order, set_priority=True) if device.type == "cuda" else contextlib.nullcontext()


def loss_function(model: GPT, runner: nn.Module, dtype: torch.dtype, compile: bool, graphs: bool):
    """What a step differentiates: tokens (B, T + 1) -> the mean loss. runner is model, or wraps it.

    In bfloat16 the residual stream is bfloat16 too. graphs: CUDA graphs, since launching a small model's kernels one by
    one takes twice as long as running them. experiments/bench_train.py has the measurements.
    """
    if dtype == torch.bfloat16:
        model.embed.register_forward_hook(lambda module, ids, x: x.to(dtype) if torch.is_autocast_enabled(x.device.type) else x)
        warnings.filterwarnings("ignore", "Mismatch dtype between input and weight")  # RMSNorm's gains stay float32

    def loss_of(tokens: Tensor) -> Tensor:
        return runner(tokens[:, :-1], tokens[:, 1:])[1]  # logits that left the compiled graph would get a gradient of zeros

    return torch.compile(loss_of, mode="reduce-overhead" if graphs else None) if compile else loss_of


# ---------------------------------------------------------------------------------------------------------------------
# The run


def defaults(argv: list[str]) -> Train:
    """What the flags start from: the preset's sizes and recipe or, with --resume, the stopped run's own flags."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name, default in dict(preset="tiny", attn="mfa", out=None, device="auto").items():
        first.add_argument(f"--{name}", nargs="?", default=default, const=default)
    first.add_argument("--resume", nargs="?", default=False, const=True)
    given = first.parse_known_args(argv)[0]
    out = Path(f"out/{given.preset}-{given.attn}" if given.out is None else given.out)
    if given.resume and (out / "latest.pt").is_file():
        return replace(unpack_args(load_checkpoint(out / "latest.pt")["args"], out / "latest.pt"), out=out)
    try:
        model = preset(given.preset, given.attn, vocab_size=0)
    except ValueError as e:
        raise BadInput(f"--{e}") from e
    compile = can_compile(pick_device(given.device))
    return Train(model=model, preset=given.preset, compile=compile, **RECIPES[given.preset])


def pack_args(args: Train) -> dict:
    return {k: str(v) if isinstance(v, Path) else v for k, v in asdict(args).items()}


def unpack_args(saved: dict, latest: Path) -> Train:
    try:
        paths = {k: saved[k] and Path(saved[k]) for k in ("out", "data_dir")}
        return Train(**{**saved, **paths, "model": Config(**saved["model"]), "resume": False, "overwrite": False})
    except (TypeError, KeyError, ValueError) as e:
        raise BadInput(f"--resume: {latest} has other flags than this train.py ({e}): train it again") from e


def check(args: Train) -> None:
    for name in ("max_iters", "batch_size", "grad_accum", "eval_interval", "log_interval", "learning_rate"):
        if not 0 < getattr(args, name) < math.inf:
            raise BadInput(f"--{name} must be positive, not {getattr(args, name)}")
    for name in ("min_lr", "warmup_iters", "weight_decay", "grad_clip", "eval_tokens", "seed"):
        if not 0 <= getattr(args, name) < math.inf:
            raise BadInput(f"--{name} must not be negative, not {getattr(args, name)}")
    if args.model.n_expert and args.model.n_layer < 2:
        raise BadInput("--n_expert: --n_layer must be at least 2, since the first block's FFN stays dense")
    if not 0 <= args.beta2 < 1:
        raise BadInput(f"--beta2 must be in [0, 1), not {args.beta2}")
    if args.seed >= 2**32:
        raise BadInput(f"--seed must be less than 2^32, not {args.seed}")


def learning_rate(step: int, args: Train) -> float:
    """Linear warm-up to the peak, then a cosine to min_lr at max_iters."""
    if step < args.warmup_iters:
        return args.learning_rate * (step + 1) / args.warmup_iters
    done = (step - args.warmup_iters) / max(1, args.max_iters - args.warmup_iters)
    return args.min_lr + (args.learning_rate - args.min_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def make_optimizer(model: GPT, args: Train, device: torch.device) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [dict(params=matrices, weight_decay=args.weight_decay), dict(params=others, weight_decay=0.0)]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, args.beta2), eps=1e-8, fused=device.type in ("cuda", "cpu"))


def compare(ckpt: dict, args: Train, cfg: Config, source: dict, path: Path) -> None:
    """BadInput if these flags, this model or this text are not those of the checkpoint."""

    def of_text(data: dict) -> str:
        files = ", ".join(f"{file['name']} of sha256 {file['sha256'][:8]}" for file in data["sources"])
        return f"{files}, {data['train_tokens']:,} + {data['val_tokens']:,} tokens"

    old = {**asdict(Config()), **ckpt["args"], **ckpt["config"], "the text": of_text(ckpt["data"])}
    new = {**pack_args(args), **asdict(cfg), "the text": of_text(source)}
    changed = [k for k in new if k not in FREE | {"model"} and old.get(k) != new[k]]
    if changed:
        what = ", ".join(f"{k} was {old.get(k)!r} and is now {new[k]!r}" for k in changed)
        raise BadInput(f"--resume: {path} is of another run: {what}; leave them as they were, or give another --out")


def step_of(row: str) -> float:
    """The step that a row of metrics.jsonl belongs to; infinity for one that a crash has cut short."""
    try:
        return float(json.loads(row)["step"])
    except (ValueError, TypeError, KeyError):
        return math.inf


def cut_back(metrics: Path, step: int) -> None:
    """Drop the rows of metrics.jsonl that lie beyond step, and those that cannot be read."""
    if metrics.exists():
        rows = metrics.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        keep = [row for row in rows if row.endswith("\n") and step_of(row) <= step]
        write_atomically(metrics, lambda f: f.write("".join(keep).encode()))


def cache_bytes(cfg: Config) -> int:
    """Cache of the whole model per token, in bytes at 16 bit."""
    return 2 * cfg.n_layer * ATTENTION[cfg.attn].counts(cfg).kv_cache


def cache_line(cfg: Config) -> str:
    ours, mha = cache_bytes(cfg), cache_bytes(mha_of(cfg))
    return f"cache: {ours:,} bytes per token at 16 bit, {ours / mha:.2%} of MHA's {mha:,}"


def span(seconds: float) -> str:
    return f"{seconds // 60:.0f} min {seconds % 60:02.0f} s" if seconds >= 60 else f"{seconds:.0f} s"


def stop_unless_finite(value: float, what: str, step: int, latest: Path) -> None:
    if not math.isfinite(value):
        raise SystemExit(
            f"{what} is {value} at step {step}: stopped. {latest} holds the last good state. Try half the --learning_rate, "
            f"a longer --warmup_iters, or --dtype float32, with another --out"
        )


def quoted(path: Path) -> str:
    """path as it can be given to a shell again."""
    return f'"{path}"' if re.search(r"\s", str(path)) else str(path)


@contextlib.contextmanager
def alone_in(out: Path):
    """Keeps other trainings out of the folder, where the system can lock one. BadInput if one is in it already."""
    if fcntl is None:
        yield
        return
    folder = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
        os.close(folder)
        raise BadInput(f"--out {out}: another process trains there; give another --out, or wait for it") from e
    except OSError:  # a file system without locks
        pass
    try:
        yield
    finally:
        os.close(folder)


def first_in_one(work: Callable, rank: int, world: int):
    """work() in the first process, then in the others, which find it done. What goes wrong in the first ends all, told once."""
    if world == 1:
        return work()
    found = failed = None
    if rank == 0:
        try:
            found = work()
        except (BadInput, OSError) as e:
            failed = e
    ended = [failed is not None]
    dist.broadcast_object_list(ended)
    if ended[0]:
        raise failed or SystemExit(2)
    return found if rank == 0 else work()


class Stop:
    """Catches SIGINT and SIGTERM: the step is finished and saved first. A second Ctrl-C ends at once."""

    def __enter__(self):
        self.caught = self.signal = 0  # what this process got, and what all of them know
        self.before = {s: signal.signal(s, self.note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def note(self, number, frame):
        self.caught = number
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def agree(self, device: torch.device, world: int) -> None:
        """All processes call this at the same step, and stop there if any of them got a signal."""
        self.signal = self.caught
        if world > 1:
            flag = torch.tensor(self.caught, device=device)
            dist.all_reduce(flag, dist.ReduceOp.MAX)
            self.signal = int(flag)

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def open_run(args: Train, latest: Path, best: Path, metrics: Path) -> dict | None:
    """The checkpoint to go on from, if any. BadInput where --resume and --overwrite do not fit what the folder holds."""
    out = latest.parent
    if out.exists() and not out.is_dir():
        raise BadInput(f"--out {out} is a file: give a folder")
    if args.resume and args.overwrite:
        raise BadInput("--resume goes on with the run that --overwrite would replace: give one of the two")
    if not (args.resume or args.overwrite) and (latest.exists() or metrics.exists() or best.exists()):
        raise BadInput(f"--out {out} holds a run: --resume continues it, --overwrite replaces it, another --out keeps it")
    if args.resume and not latest.exists() and (metrics.exists() or best.exists()):
        raise BadInput(f"--resume: {latest} is missing, no going on: --overwrite begins anew, another --out keeps the rest")
    ckpt = load_checkpoint(latest) if args.resume and latest.is_file() else None
    if ckpt and args.max_iters < ckpt["step"] + (ckpt["best_loss"] == math.inf):
        raise BadInput(f"--max_iters {args.max_iters}: {latest} is at step {ckpt['step']} already, give more")
    return ckpt


def open_text(args: Train, rank: int, world: int) -> tuple[Path, np.ndarray, np.ndarray, dict]:
    """The corpus' folder, its ids for training and validation, and meta.json. The first process prepares it, if need be."""
    bpe_size = args.model.vocab_size or None if args.tokenizer == "bpe" else None
    text = dict(dataset=args.dataset, file=args.file, tokenizer=args.tokenizer, vocab_size=bpe_size, data_dir=args.data_dir)
    folder = first_in_one(lambda: prepare(**text), rank, world)
    train_ids, val_ids, meta = load(folder)
    T = args.model.block_size
    if 0 < args.eval_tokens < T:
        raise BadInput(f"--eval_tokens {args.eval_tokens}: must be 0, for all, or at least --block_size {T}")
    for name, ids in (("training", train_ids), ("validation", val_ids)):
        if len(ids) <= T:
            raise BadInput(f"--block_size {T}: the {name} text of {folder} has {len(ids)} tokens, and more are needed")
    return folder, train_ids, val_ids[: args.eval_tokens + 1] if args.eval_tokens else val_ids, meta


def new_model(args: Train, n_vocab: int, folder: Path) -> GPT:
    """A model for a text of n_vocab tokens, at MHA's number of parameters."""
    if 0 < args.model.vocab_size < n_vocab:
        raise BadInput(f"--vocab_size {args.model.vocab_size}: {folder} has {n_vocab} tokens, give as many or more")
    try:
        cfg = replace(args.model, vocab_size=max(args.model.vocab_size, n_vocab))
        torch.manual_seed(args.seed)
        return GPT(match_params(cfg) if args.match_params and cfg.attn not in ("mha", "fpba") else cfg)
    except ValueError as e:
        raise BadInput(f"--attn {args.model.attn}: {e}") from e


def train(args: Train) -> dict:
    """Run or resume a training; BadInput comes before anything is written.

    Returns out (its folder), step, best_loss (nats per token), seconds, params and stopped (0, or the signal's number).
    """
    check(args)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = pick_device(args.device)
    if device.type == "cuda" and world > 1:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    with contextlib.ExitStack() as at_end:
        if world > 1:
            on_gpu = device.type == "cuda"
            dist.init_process_group("nccl" if on_gpu else "gloo", device_id=device if on_gpu else None)
            at_end.callback(dist.destroy_process_group)
        return run(args, device, rank, world, at_end)


def run(args: Train, device: torch.device, rank: int, world: int, at_end: contextlib.ExitStack) -> dict:
    say = print if rank == 0 else lambda *_, **__: None
    keep_memory(device)
    out = args.out or Path("out") / f"{args.preset}-{args.model.attn}"
    latest, best, metrics = out / "latest.pt", out / "best.pt", out / "metrics.jsonl"
    ckpt = open_run(args, latest, best, metrics)
    compilers = (os.environ.get("CXX", "g++"), "g++", "clang++", "cl")
    if args.compile and device.type == "cpu" and not any(map(shutil.which, compilers)):
        raise BadInput("--compile needs a C++ compiler on a CPU, and there is no g++, clang++ or cl: leave it out")
    share, left_over = divmod(args.batch_size, world * args.grad_accum)
    if left_over:
        raise BadInput(f"--batch_size {args.batch_size} must be a multiple of {world} processes x {args.grad_accum} grad_accum")
    folder, train_ids, val_ids, meta = open_text(args, rank, world)
    T, unit = args.model.block_size, "character" if args.tokenizer == "char" else "token"
    model = new_model(args, meta["vocab_size"], folder)
    cfg, mha = model.cfg, mha_of(replace(args.model, vocab_size=model.cfg.vocab_size))
    source = {k: meta[k] for k in ("sources", "train_tokens", "val_tokens")}
    if ckpt:
        compare(ckpt, args, cfg, source, latest)
        model = model_from(ckpt, latest, device)
    model = model.to(device).train()
    optimizer, dtype = make_optimizer(model, args, device), pick_dtype(args.dtype, device)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)  # bfloat16 needs none
    step, best_loss, seconds = 0, math.inf, 0.0
    if ckpt:
        optimizer.load_state_dict(ckpt["optimizer"])
        scaler.load_state_dict(ckpt["scaler"])
        torch.set_rng_state(ckpt["rng"])  # nothing below draws from it, but what you add may
        step, best_loss, seconds = ckpt["step"], ckpt["best_loss"], ckpt["seconds"]
    n_params, n_mha = sum(p.numel() for p in model.parameters()), count_params(mha)
    say(f"{cfg.attn}: {cfg.n_layer} layers, dim {cfg.dim}, {cfg.heads} heads, context {T}, on {device}, {str(dtype)[6:]}")
    say(f"{n_params:,} parameters, {n_params / n_mha:.1%} of MHA's {n_mha:,} (FFN {cfg.ffn} wide, MHA's {mha.ffn})")
    say(cache_line(cfg))
    say(f"text: {folder.name}, {len(train_ids):,} + {len(val_ids):,} tokens, vocabulary {cfg.vocab_size:,}")
    how = f", resumed at step {step}" if ckpt else ", from the start: there is no latest.pt" if args.resume else ""
    say(f"run: {out}, {args.max_iters} steps of {args.batch_size} x {T} tokens{how}")

    if rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        at_end.enter_context(alone_in(out))
        if args.resume:
            cut_back(metrics, step if ckpt else -1)

    def log(**row) -> None:
        if rank == 0:
            with naming(metrics), open(metrics, "a", encoding="utf-8") as f:
                f.write(json.dumps(row) + "\n")

    def save(*paths: Path) -> None:
        if rank == 0:
            versions = dict(torch=str(torch.__version__), numpy=np.__version__, python=sys.version.split()[0])
            state = dict(
                format=FORMAT, model=model.state_dict(), optimizer=optimizer.state_dict(), scaler=scaler.state_dict(),
                rng=torch.get_rng_state(), step=step, tokens=step * args.batch_size * T, best_loss=best_loss,
                seconds=seconds, config=asdict(cfg), tokenizer=meta["tokenizer"], data=source, args=pack_args(args),
                versions=versions,
            )  # fmt: skip
            write_atomically(paths[0], lambda f: torch.save(state, f))
            for path in paths[1:]:
                same_file(paths[0], path)

    # What the steps run through. `model` itself stays plain: it is what is saved and evaluated.
    torch.set_float32_matmul_precision("high")
    runner = model
    if world > 1:
        runner = DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)
    if args.compile:
        say("compiling: the first step takes up to half a minute ...", flush=True)
    graphs = device.type == "cuda" and world == 1 and args.grad_accum == 1
    loss_of = loss_function(model, runner, dtype, args.compile, graphs)
    train_ids, val_ids = as_tensor(train_ids, device), as_tensor(val_ids, device)
    pending: list[Tensor] = []  # losses of the steps since the last line, still on the device: reading one waits for it

    def autocast():
        return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)

    def read_losses() -> float:
        losses = torch.stack(pending) / world
        pending.clear()
        if world > 1:
            dist.all_reduce(losses)
        for at, loss in enumerate(losses.tolist(), step - len(losses) + 1):
            stop_unless_finite(loss, "the loss", at, latest)
        return losses.mean().item()

    def forget(kind, *_) -> None:
        if kind is not None and issubclass(kind, RuntimeError) and rank == step == 0:  # out of memory: nothing has begun
            latest.unlink(missing_ok=True)

    with attention_kernels(device), Stop() as stop:
        if not ckpt:
            save(latest)
            at_end.push(forget)
        if rank == 0 and not args.resume:  # --overwrite: the old run goes when the new one is there
            for old in (best, metrics, out / "loss.png"):
                old.unlink(missing_ok=True)
        clock, n_logged, compiling = time.perf_counter(), step, args.compile
        while step < args.max_iters and not stop.signal:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, args)
            if cfg.dropout:
                torch.manual_seed((args.seed * 1_000_003 + step) * 4096 + rank)
            pieces = batch_starts(args, step, len(train_ids)).view(world, args.grad_accum, share)[rank]
            total = torch.zeros((), device=device)
            for i, starts in enumerate(pieces):
                tokens = window(train_ids, starts, T + 1, device)  # (share, T + 1)
                wait = world > 1 and i < args.grad_accum - 1  # gradients are averaged over processes once a step
                with runner.no_sync() if wait else contextlib.nullcontext():
                    with autocast():
                        loss = loss_of(tokens) / args.grad_accum
                    scaler.scale(loss).backward()
                total += loss.detach()
            if args.grad_clip:
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            pending.append(total)
            step += 1
            if compiling:  # this step's time is no measure of the others'
                read_losses()
                say(f"compiled in {time.perf_counter() - clock:.0f} s", flush=True)
                clock, n_logged, compiling = time.perf_counter(), step, False

            to_evaluate = step % args.eval_interval == 0 or step == args.max_iters
            if pending and (to_evaluate or step % args.log_interval == 0 or stop.caught and world == 1):
                loss = read_losses()
                elapsed = time.perf_counter() - clock
                seconds, rate = seconds + elapsed, (step - n_logged) / elapsed
                speed, n_logged = round(rate * args.batch_size * T), step
                left = span((args.max_iters - step) / rate)
                say(f"step {step:>6}  loss {loss:.4f}  {speed:>11,} tokens/s  {left} left", flush=True)
                log(step=step, train_loss=loss, lr=group["lr"], tokens_per_s=speed, seconds=round(seconds, 3))
                stop.agree(device, world)
                clock = time.perf_counter()
            if to_evaluate:
                val_loss = evaluate(model, val_ids, device, autocast, rank, world)
                stop_unless_finite(val_loss, "the validation loss", step, latest)
                bpb = val_loss / math.log(2) * meta["val_tokens"] / meta["val_bytes"]
                better, best_loss = val_loss < best_loss, min(best_loss, val_loss)
                seconds, clock = seconds + time.perf_counter() - clock, time.perf_counter()
                note = "  best so far" if better else ""
                say(f"step {step:>6}  validation {val_loss:.4f} nats per {unit}, {bpb:.4f} bits per byte{note}", flush=True)
                log(step=step, val_loss=val_loss, val_bpb=bpb, best_loss=best_loss, seconds=round(seconds, 3))
                save(*[best] * better, latest)
            elif stop.signal:
                stop_unless_finite(sum(p.sum().item() for p in model.parameters()), "the sum of the weights", step, latest)
                save(latest)
    stopped = stop.signal if step < args.max_iters else 0
    if rank == 0 and stopped:
        print(f"stopped at step {step}, saved in {latest}\nto go on: python train.py --resume --out {quoted(out)}")
    elif rank == 0:
        plot(out, best_loss)
        finish(best, n_params, seconds, unit, device)
    return dict(out=out, step=step, best_loss=best_loss, seconds=seconds, params=n_params, stopped=stopped)


def finish(best: Path, n_params: int, seconds: float, unit: str, device: torch.device) -> None:
    """A sample from the best checkpoint, the figures, and what to do next."""
    ckpt = load_checkpoint(best)
    model, tokenizer = model_from(ckpt, best, device), tokenizer_from(ckpt["tokenizer"])
    prompt = torch.tensor([start_of_text(tokenizer)], device=device)
    with attention_kernels(device, decoding=True):
        ids = model.generate(prompt, 200, temperature=0.8, generator=torch.Generator(device).manual_seed(0))[0, 1:]
    ids = ids[ids < tokenizer.n_vocab]  # --vocab_size may leave room above the tokenizer's ids
    attn = model.cfg.attn
    print(f"\na sample at temperature 0.8:\n{tokenizer.decode(ids.tolist()).strip()}\n")
    print(f"{attn}: best validation loss {ckpt['best_loss']:.4f} nats per {unit}, at step {ckpt['step']}")
    print(f"{n_params:,} parameters, {span(seconds)} of training and evaluation")
    print(cache_line(model.cfg))
    print(f"in {best.parent}: best.pt, latest.pt, metrics.jsonl, loss.png")
    print(f"next: python sample.py --checkpoint {quoted(best)}")
    print(f"  or: the same with --attn {'mha' if attn != 'mha' else 'mfa_kr'}, to compare")


def plot(out: Path, best_loss: float) -> None:
    """loss.png from metrics.jsonl."""
    import matplotlib.figure  # slow to import, and needed once

    rows = [json.loads(row) for row in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    figure = matplotlib.figure.Figure(figsize=(7, 4.5), layout="constrained")
    ax = figure.subplots()
    for key, label, style in (("train_loss", "training", "-"), ("val_loss", "validation", "o-")):
        points = [(row["step"], row[key]) for row in rows if key in row]
        if points:
            ax.plot(*zip(*points, strict=True), style, label=label, markersize=4)
    name = os.fsencode(out.name).decode("utf-8", "replace")
    ax.set_title(f"{name}: validation {best_loss:.4f} at best", parse_math=False)
    ax.set(xlabel="step", ylabel="loss, nats per token")
    ax.grid(alpha=0.3)
    ax.legend()
    with naming(out / "loss.png"):
        figure.savefig(out / "loss.png", dpi=120)


def main(args: Train) -> None:
    try:
        stopped = train(args)["stopped"]
    except RuntimeError as e:  # torch.OutOfMemoryError on a GPU
        if "memory" not in str(e):
            raise
        raise BadInput("out of memory: try a smaller --batch_size, more --grad_accum, or a smaller model") from e
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:  # a thread of gloo may hold a tensor yet: torch 2.13 aborts if Python ends
        sys.stdout.flush()
        os._exit(128 + stopped if stopped else 0)
    if stopped:
        raise SystemExit(128 + stopped)


if __name__ == "__main__":
    run_command(main, Train, defaults=defaults)
