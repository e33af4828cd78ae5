"""train.py's flags: what they start from, and what they cannot be.

They start from a preset, from the run that --resume goes on with, or from the checkpoint whose
weights a new run begins with (--init_from).
"""

import argparse
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from mfa import GPT, PRESETS, Config
from support.cli import BadInput
from support.log import require_tracker
from support.plugins import load_plugin, load_plugin_of
from support.run_folder import Run, config_of, load_checkpoint
from support.tokenizers import tokenizer_from

MAY_DIFFER = {"dropout", "balance_coef"}  # how the weights are trained, not what they are


def first_flags(argv: list[str]) -> argparse.Namespace:
    """The few flags that decide what all the others start from. Runs the plug-in they name."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name, default in dict(preset="tiny", attn="mfa", out=None, device="auto").items():
        first.add_argument(f"--{name}", nargs="?", default=default, const=default)
    first.add_argument("--plugin", nargs="?", type=Path)
    first.add_argument("--init_from", "--init-from", nargs="?", type=Path)
    first.add_argument("--resume", nargs="?", default=False, const=True)
    given = first.parse_known_args(argv)[0]
    if given.plugin:
        load_plugin(given.plugin)
    return given


def flags_of(ckpt: dict, path: Path, kind: type) -> Any:
    """The flags, of the dataclass kind, that a checkpoint was trained with."""
    load_plugin_of(ckpt, path)
    try:
        paths = ("out", "data_dir", "plugin", "init_from")
        saved = dict(ckpt["args"], resume=False, overwrite=False)
        saved |= {k: Path(saved[k]) for k in paths if saved.get(k)}
        return kind(**{**saved, "model": Config(**saved["model"])})
    except (TypeError, KeyError, ValueError) as e:
        what = f"{path} has other flags than this train.py ({e})"
        raise BadInput(f"--resume: {what}: train it again") from e


def check_flags(args: Any) -> None:
    positive = "max_iters batch_size grad_accum eval_interval log_interval learning_rate"
    for name in positive.split():
        if not 0 < getattr(args, name) < math.inf:
            raise BadInput(f"--{name} must be positive, not {getattr(args, name)}")
    for name in "min_lr warmup_iters weight_decay grad_clip eval_tokens seed threads".split():
        if not 0 <= getattr(args, name) < math.inf:
            raise BadInput(f"--{name} must not be negative, not {getattr(args, name)}")
    if args.model.n_expert and args.model.n_layer < 2:
        what = "--n_layer must be at least 2, since the first block's FFN stays dense"
        raise BadInput(f"--n_expert: {what}")
    if args.min_lr > args.learning_rate:
        what = f"is more than the peak, --learning_rate {args.learning_rate}"
        raise BadInput(f"--min_lr {args.min_lr} {what}: give at most that, or the rate would climb")
    if not 0 <= args.beta2 < 1:
        raise BadInput(f"--beta2 must be in [0, 1), not {args.beta2}")
    if args.log != "none":
        require_tracker(args.log)
    if args.seed >= 2**32:
        raise BadInput(f"--seed must be less than 2^32, not {args.seed}")


class Watched(Config):
    """A Config that notes which of its fields are read."""

    read: set[str] = set()

    def __getattribute__(self, name: str) -> Any:
        Watched.read.add(name)
        return super().__getattribute__(name)


READ_LATER = {"n_layer", "block_size", "pos", "rope_base", "rope_fraction"}  # as the model runs


def not_used(cfg: Config, start: Config) -> list[str]:
    """Fields that cfg has changed from start, and that making its model does not read."""
    watched = Watched(**vars(cfg) | dict(n_layer=min(cfg.n_layer, 2), vocab_size=1))
    Watched.read.clear()
    if cfg.n_expert:
        Watched.read.add("balance_coef")  # in training
    with torch.device("meta"):
        GPT(watched)
    changed = [name for name, value in vars(cfg).items() if value != getattr(start, name)]
    return [name for name in changed if name not in Watched.read | READ_LATER]


# --------------------------------------------------------------------------------------------------
# --init_from


def flags_from(ckpt: dict, path: Path) -> dict:
    """The flags that a new run takes from the checkpoint whose weights it begins with."""
    config = config_of(ckpt, path)
    tokenizer_from(ckpt["tokenizer"], path)
    name, plugin = ckpt["args"].get("preset"), ckpt["args"].get("plugin")
    return dict(
        init_from=path,
        model=config,
        preset=name if name in PRESETS else "tiny",
        tokenizer=ckpt["tokenizer"]["kind"],
        plugin=path.parent / Path(plugin).name if plugin else None,
    )


def origin_of(args: Any, run: Run) -> dict | None:
    """The checkpoint that --init_from names; of a run that goes on, which needs it no more, the
    run's own; None where the run began or begins by itself. BadInput if flags contradict it.
    """
    if run.checkpoint:
        return run.checkpoint if run.checkpoint["args"].get("init_from") else None
    if not args.init_from:
        return None
    path = args.init_from
    ckpt = load_checkpoint(path)
    taken = flags_from(ckpt, path)
    there, here = (
        {**asdict(model), "preset": preset, "tokenizer": tokenizer}
        for model, preset, tokenizer in (
            (taken["model"], taken["preset"], taken["tokenizer"]),
            (args.model, args.preset, args.tokenizer),
        )
    )
    other = [
        f"{name} is {there[name]!r} there, not {here[name]!r}"
        for name in here
        if name not in MAY_DIFFER and here[name] != there[name]
    ]
    if taken["plugin"] and contents(args.plugin) != contents(taken["plugin"]):
        other.append(f"its attention is that of {taken['plugin']}, not of {args.plugin}")
    if other:
        what = "leave these flags out, or train a new model without --init_from"
        raise BadInput(f"--init_from {path}: {', '.join(other)}; {what}")
    return ckpt


def contents(file: Path | None) -> bytes:
    return file.read_bytes() if file else b""
