"""Files and folders that are whole or not there, and errors that name theirs."""

import contextlib
import hashlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

WINDOWS = os.name == "nt"
SYSTEM_FILES = {"Thumbs.db", "desktop.ini", "Desktop.ini", "Icon\r"}


@contextlib.contextmanager
def name_the_file(path: Path) -> Iterator[None]:
    """Makes an OSError name path: a full disk's does not, and torch.save hides it entirely."""
    handled = sys.exc_info()[1]  # what a caller is busy with is no cause
    try:
        yield
    except (OSError, RuntimeError) as e:
        cause = e if isinstance(e, OSError) else e.__context__
        if not isinstance(cause, OSError) or cause is handled:
            raise
        raise OSError(cause.errno, cause.strerror, str(path)) from e


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """write(file) into path.part, flush it to the disk, rename it: path is whole or not there."""
    part = path.with_name(path.name + ".part")
    try:
        with name_the_file(path), open(part, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        rename(part, path)
    finally:
        part.unlink(missing_ok=True)


def rename(new: Path, path: Path) -> None:
    """new in the place of path. Windows refuses while another program has path open, a virus
    scanner, say: there it is tried for 3 seconds.
    """
    for wait in (0.05, 0.1, 0.2, 0.4, 0.8, 1.6) if WINDOWS else ():
        with contextlib.suppress(PermissionError):
            return os.replace(new, path)
        time.sleep(wait)
    with name_the_file(path):
        os.replace(new, path)


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def replace_folder(new: Path, folder: Path, names: set[str]) -> None:
    """Put the finished folder new in the place of folder, whose files are called names.

    Other files that someone has put into folder stay in it. No folder can replace another in one
    step: the old one waits beside it, and after a kill finish_replacing puts things right.
    """
    old = backup_of(folder)
    try:
        if folder.exists():
            rename(folder, old)
        rename(new, folder)
    except BaseException:
        if old.exists() and not folder.exists():
            old.rename(folder)
        raise
    finish_replacing(folder, names)


def finish_replacing(folder: Path, names: set[str]) -> None:
    """Do what a killed replace_folder has left to do; nothing if there was none."""
    old = backup_of(folder)
    if not old.exists():
        return
    if not folder.exists():
        old.rename(folder)
        return
    with contextlib.suppress(FileNotFoundError):  # another process may do the same just now
        for path in old.iterdir():
            if path.name in names:
                path.unlink()
                continue
            kept = folder / path.name
            while kept.exists():  # somebody has put one into the new folder already
                kept = kept.with_name(kept.name + ".old")
            path.rename(kept)
        old.rmdir()


def backup_of(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")


def is_hidden(path: str | Path) -> bool:
    """Whether a name is one that file managers hide, as they do .DS_Store, which macOS leaves in
    every folder, and __MACOSX, which it leaves in every zip."""
    names = Path(path).parts
    return any(name.startswith((".", "__MACOSX")) for name in names) or names[-1] in SYSTEM_FILES
