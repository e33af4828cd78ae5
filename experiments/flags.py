"""Checks that the commands of this folder share."""

from pathlib import Path
from typing import Any

import torch

from support.cli import BadInput


def require_at_least_1(args: Any, *names: str) -> None:
    for name in names:
        got = getattr(args, name)
        if got < 1:
            raise BadInput(f"--{name} must be at least 1, not {got}")


def require_positive(args: Any, *names: str) -> None:
    for name in names:
        got = getattr(args, name)
        if not got > 0:
            raise BadInput(f"--{name} must be positive, not {got}")


def require_gpus(args: Any) -> None:
    """One for each of --processes, but with --smoke."""
    n = torch.cuda.device_count()
    if not args.smoke and n < args.processes:
        what = f"this machine has {n} GPUs; --smoke shows that it runs"
        raise BadInput(f"--processes {args.processes}: {what}")


def require_other_results(args: Any, committed: Path) -> None:
    """What --smoke measures must not go to the committed results."""
    if args.smoke and args.results.resolve() == committed.resolve():
        what = "measures a toy, which does not belong among the results"
        raise BadInput(f"--smoke {what}: name another file with --results")
