"""Checks that the commands of this folder share."""

from pathlib import Path
from typing import Any

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


def require_other_results(args: Any, committed: Path) -> None:
    """What --smoke measures must not go to the committed results."""
    if args.smoke and args.results.resolve() == committed.resolve():
        what = "measures a toy, which does not belong among the results"
        raise BadInput(f"--smoke {what}: name another file with --results")
