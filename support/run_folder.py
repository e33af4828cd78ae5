"""A run's folder: one training at a time in it, checkpoints, metrics. `Run` is the one door."""

import contextlib
import json
import math
import os
import re
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mfa import GPT, Config
from support.cli import BadInput
from support.files import name_the_file, rename, write_atomically
from support.plugins import load_plugin_of

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

FORMAT = 1  # of a checkpoint; raised when old ones can no longer be read
CONTENTS = dict(
    model=dict, optimizer=dict, scaler=dict, config=dict, tokenizer=dict, data=dict, args=dict,
    rng=Tensor, step=int, best_loss=float, seconds=float,
)  # fmt: skip


# --------------------------------------------------------------------------------------------------
# Checkpoints


def load_checkpoint(path: Path, map_location="cpu", mmap: bool = False) -> dict:
    """What train.py saved. Nothing in the file is executed. mmap: weights are read when used, as
    in all processes but the first they always are.

    Raises BadInput if it is not a checkpoint of this version.
    """
    if path.is_dir():
        raise BadInput(f"checkpoint {path} is a folder: give {path / 'best.pt'}")
    if not path.is_file():
        there = ", ".join(str(found) for found in sorted(Path("out").glob("*/best.pt"))[:5])
        or_take = f", or take {there}" if there else ""
        raise BadInput(f"checkpoint {path} is not there: train one with python train.py{or_take}")
    give = "give a best.pt or latest.pt of a run"
    mmap = mmap or (int(os.environ.get("RANK", 0)) > 0 and os.name != "nt")  # which locks the file
    try:
        with warnings.catch_warnings(action="ignore"):  # what torch finds odd about other files
            ckpt = torch.load(path, map_location, weights_only=True, mmap=mmap)
    except Exception as e:  # a damaged file can raise nearly anything
        damaged = "is not a checkpoint of train.py, or a damaged one"
        what = damaged if path.stat().st_size else "is empty"
        raise BadInput(f"{path} {what} ({type(e).__name__}): {give}") from e
    if not isinstance(ckpt, dict) or "format" not in ckpt:
        raise BadInput(f"{path} is not a checkpoint of train.py: {give}")
    if ckpt["format"] != FORMAT:
        what = f"is of format {ckpt['format']}, not {FORMAT}"
        raise BadInput(f"{path} {what}: train it again with this train.py")
    missing = [name for name, kind in CONTENTS.items() if not isinstance(ckpt.get(name), kind)]
    if missing:
        raise BadInput(f"{path} is damaged: it has no {', '.join(missing)}")
    return ckpt


def config_of(ckpt: dict, path: Path) -> Config:
    """The Config of a checkpoint. BadInput if it is none."""
    load_plugin_of(ckpt, path)
    try:
        return Config(**ckpt["config"])
    except (ValueError, TypeError) as e:
        raise unfit(e, path) from e


def load_weights(model: GPT, ckpt: dict, path: Path) -> None:
    """The checkpoint's weights. BadInput if they are not those of such a model."""
    from support.sharded_state import load_weights_of  # imports what sampling can do without

    try:
        load_weights_of(model, ckpt["model"])
    except (RuntimeError, TypeError) as e:
        raise unfit(e, path) from e


def model_from(ckpt: dict, path: Path, device: torch.device) -> GPT:
    """The model of a checkpoint. BadInput if weights and config do not belong together."""
    try:
        model = GPT(config_of(ckpt, path))
        model.load_state_dict(ckpt["model"])
    except (RuntimeError, KeyError, TypeError) as e:
        raise unfit(e, path) from e
    return model.to(device)


def unfit(e: Exception, path: Path) -> BadInput:
    reason = str(e).splitlines()[-1].strip()
    return BadInput(f"{path} does not fit its own config: {reason}")


# --------------------------------------------------------------------------------------------------
# Lines of JSON


def append_line(path: Path, row: dict) -> None:
    """One line of JSON more, on the disk when this returns."""
    with name_the_file(path), open(path, "a", encoding="utf-8", newline="\n") as file:
        file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())


def drop_cut_line(path: Path) -> None:
    """Removes the line that a kill has cut short at the end of a file."""
    text = path.read_bytes() if path.exists() else b""
    if text and not text.endswith(b"\n"):
        whole = text[: text.rfind(b"\n") + 1]
        write_atomically(path, lambda file: file.write(whole))


def step_of(line: str) -> float:
    """The step of a row of metrics.jsonl; infinity for one that a crash has cut short."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        return math.inf


# --------------------------------------------------------------------------------------------------
# The door


def shell_quoted(path: Path) -> str:
    """path as it can be given to a shell again."""
    return f'"{path}"' if re.search(r"\s", str(path)) else str(path)


@dataclass
class Run:
    """The folder of a run, with latest.pt, best.pt, metrics.jsonl and loss.png.

    Made, it has checked that --resume and --overwrite fit what the folder holds, and written
    nothing. `checkpoint` is what to go on from, or None. Entered, it is locked and ready; the old
    run that overwrite replaces goes with the first save. writes: False in all processes but one.
    """

    folder: Path
    resume: bool = False
    overwrite: bool = False
    writes: bool = True

    def __post_init__(self):
        out = self.folder
        self.latest, self.best = out / "latest.pt", out / "best.pt"
        self.metrics, self.curve = out / "metrics.jsonl", out / "loss.png"
        others = self.metrics.exists() or self.best.exists()
        self.holds_run = self.latest.exists() or others
        if out.exists() and not out.is_dir():
            raise BadInput(f"--out {out} is a file: give a folder")
        if self.resume and self.overwrite:
            what = "--resume goes on with the run that --overwrite would replace"
            raise BadInput(f"{what}: give one of the two")
        if not (self.resume or self.overwrite) and self.holds_run:
            what = "--resume continues it, --overwrite replaces it, another --out keeps it"
            raise BadInput(f"--out {out} holds a run: {what}")
        if self.resume and not self.latest.exists() and others:
            what = "--overwrite begins anew, another --out keeps the rest"
            raise BadInput(f"cannot resume: {self.latest} is missing: {what}")
        found = self.resume and self.latest.is_file()
        self.checkpoint = load_checkpoint(self.latest) if found else None
        self.at_end, self.tracker = contextlib.ExitStack(), None

    def __enter__(self) -> "Run":
        if self.writes:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.lock()
            if self.resume:
                self.cut_back(self.checkpoint["step"] if self.checkpoint else -1)
        return self

    def __exit__(self, kind, *_) -> None:
        self.at_end.close()

    def lock(self) -> None:
        """Keeps other trainings out, where the system can lock a folder. BadInput if one is in."""
        if fcntl is None:
            return
        folder = os.open(self.folder, os.O_RDONLY)
        self.at_end.callback(os.close, folder)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            self.at_end.close()
            what = "another process trains there; give another --out, or wait for it"
            raise BadInput(f"--out {self.folder}: {what}") from e
        except OSError:  # a file system without locks
            pass

    def cut_back(self, step: int) -> None:
        """Drops the rows of metrics.jsonl beyond step, and those that cannot be read."""
        if not self.metrics.exists():
            return
        lines = self.metrics.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        keep = [line for line in lines if line.endswith("\n") and step_of(line) <= step]
        write_atomically(self.metrics, lambda file: file.write("".join(keep).encode()))

    def follow(self, tracker) -> None:
        """Sends each row of metrics.jsonl there too, until the run is left."""
        self.tracker = tracker
        self.at_end.callback(tracker.close)

    def log(self, **row) -> None:
        """A row of metrics.jsonl."""
        if self.writes:
            path, line = self.metrics, json.dumps(row) + "\n"
            with name_the_file(path), open(path, "a", encoding="utf-8", newline="\n") as file:
                file.write(line)
        if self.tracker:
            self.tracker.log(**row)

    def save(self, state: dict, best: bool = False) -> None:
        """Writes latest.pt, and makes best.pt the same file if this is the best so far."""
        if not self.writes:
            return
        path = self.best if best else self.latest
        write_atomically(path, lambda file: torch.save(dict(format=FORMAT, **state), file))
        if best:
            self.link(path, self.latest)

    def link(self, path: Path, other: Path) -> None:
        """Makes other the same file as path, which costs nothing, or a copy where links are not."""
        part = other.with_name(other.name + ".part")
        part.unlink(missing_ok=True)
        try:
            os.link(path, part)
            rename(part, other)
        except OSError:
            write_atomically(other, lambda file: file.write(path.read_bytes()))

    def keep(self, file: Path) -> None:
        """Keeps the text of a plug-in, which the checkpoints need, beside them."""
        if self.writes:
            text = file.read_bytes()
            write_atomically(self.folder / file.name, lambda copy: copy.write(text))

    def begin(self, state: dict) -> None:
        """The first save of a new run; only now the old run that it replaces is removed."""
        self.save(state)
        if self.writes and not self.resume:
            for path in (self.best, self.metrics, self.curve):
                path.unlink(missing_ok=True)

    def withdraw(self) -> None:
        """Takes the first save back: the run has failed before its first step."""
        if self.writes:
            self.latest.unlink(missing_ok=True)

    def rows(self) -> list[dict]:
        """The rows of metrics.jsonl."""
        return [json.loads(line) for line in self.metrics.read_text(encoding="utf-8").splitlines()]


def new_run(folder: Path) -> Run:
    """For a command that makes a run and has no --resume. BadInput if the folder holds one."""
    run = Run(folder, overwrite=True)
    if run.holds_run:
        raise BadInput(f"--out {folder} holds a run: give a new folder")
    return run
