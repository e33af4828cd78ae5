"""--log: what metrics.jsonl gets, sent to a tracker too. Each is an optional package.

A tracker may not stop a training: where it fails on the way, it is left alone from then on.
"""

import importlib
import secrets
from pathlib import Path

from support.cli import BadInput

PACKAGES = dict(wandb="wandb", trackio="trackio", tensorboard="torch.utils.tensorboard")
PROJECT = "mfa"  # in wandb and trackio


def require_tracker(name: str):
    """The tracker's module. BadInput if it is not installed."""
    try:
        return importlib.import_module(PACKAGES[name])
    except ImportError as e:
        raise BadInput(f"--log {name}: it is not installed: pip install {name}") from e


class Tracker:
    """A run of a folder in a tracker. It has a name of its own, kept in the folder's log_id.txt, so
    that a training that goes on is the same run there, and one that replaces it another.

    flags: what is shown beside the curves. step: where a training goes on; None: it is new.
    """

    def __init__(self, kind: str, folder: Path, flags: dict, step: int | None):
        module, self.kind, known = require_tracker(kind), kind, folder / "log_id.txt"
        name = f"{folder.name}-{secrets.token_hex(4)}"
        if step is not None and known.exists():
            name = known.read_text(encoding="utf-8")
        try:
            if kind == "tensorboard":
                beyond = None if step is None else step + 1
                where = folder / "tensorboard" / name
                self.run = module.SummaryWriter(str(where), purge_step=beyond)
                self.run.add_text("flags", "\n".join(f"    {k}: {v}" for k, v in flags.items()))
            else:
                own = dict(id=name, dir=str(folder)) if kind == "wandb" else {}
                about = dict(project=PROJECT, name=name, config=flags, resume="allow")
                self.run = module.init(**about, **own)
        except Exception as e:  # no account, no network
            raise BadInput(f"--log {kind}: {first_line(e)}: set it up, or leave --log out") from e
        known.write_text(name, encoding="utf-8")

    def log(self, step: int, **row: float) -> None:
        """A row of metrics.jsonl."""
        if self.run is None:
            return
        try:
            if self.kind == "tensorboard":
                for key, value in row.items():
                    self.run.add_scalar(key, value, step)
                self.run.flush()
            else:
                self.run.log(row, step=step)
        except Exception as e:
            print(f"--log {self.kind} has failed and is left out from here on: {first_line(e)}")
            self.run = None

    def close(self) -> None:
        if self.run is not None:
            self.run.close() if self.kind == "tensorboard" else self.run.finish()


def first_line(e: Exception) -> str:
    return f"{type(e).__name__}: {e}".splitlines()[0]
