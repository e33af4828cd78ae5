"""What every result carries so that it can be repeated, and how files of results are read."""

import datetime
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from support.cli import BadInput

ROOT = Path(__file__).resolve().parents[1]


def child_environment(**more: str) -> dict[str, str]:
    """For a Python process that is to find this project, and the packages that this one finds."""
    path = os.pathsep.join([str(ROOT), *sys.path[1:]])
    return {**os.environ, "PYTHONPATH": path, **more}


# --------------------------------------------------------------------------------------------------
# Where a result comes from


def provenance(device: torch.device | str = "cpu") -> dict:
    """command, commit, device, versions and date (UTC) of the process that asks."""
    python = platform.python_version()
    return {
        "command": command(),
        "commit": commit(),
        "device": device_name(device),
        "versions": {"python": python, "torch": str(torch.__version__), "numpy": np.__version__},
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
    }


def command() -> str:
    """This process' command line, absolute paths without their folders, also behind a --flag=."""
    script = Path(sys.argv[0]).resolve()
    inside = script.is_relative_to(ROOT)
    name = script.relative_to(ROOT).as_posix() if inside else Path(sys.argv[0]).name
    flags = []
    for word in sys.argv[1:]:
        flag, equals, value = word.rpartition("=")
        value = Path(value).name if Path(value).is_absolute() else value
        flags.append(f"{flag}{equals}{value}")
    return " ".join(["python", name, *flags])


def commit() -> str:
    """$COMMIT, for a copy of the tree whose git is missing or older; else what git says.

    It also says whether code was changed since.
    """
    if os.environ.get("COMMIT"):
        return os.environ["COMMIT"]
    try:
        changed = git("status", "--porcelain", "--", "*.py")
        return git("rev-parse", "HEAD") + (" with uncommitted changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def git(*words: str) -> str:
    options = dict(cwd=ROOT, capture_output=True, text=True, check=True)
    return subprocess.run(["git", *words], **options).stdout.strip()


def device_name(device: torch.device | str) -> str:
    """The GPU's name, or the processor's with the number of its cores."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.partition(": ")[2] for line in lines if "model name" in line]
    model = models[0] if models else platform.machine()
    return f"{model}, {os.cpu_count()} cores, {platform.system()}"


# --------------------------------------------------------------------------------------------------
# Files of results


def read_json(path: Path) -> dict:
    """The results in a file, {} if there is none. BadInput if it is no JSON object."""
    if not path.is_file():
        return {}
    try:
        results = json.loads(path.read_bytes())
    except ValueError as e:
        raise BadInput(f"{path} is not JSON ({e}): mend or remove it") from None
    if not isinstance(results, dict):
        raise BadInput(f"{path} holds no JSON object, as results are: mend or remove it")
    return results


def read_jsonl(path: Path, script: str, check: Callable[[dict], object]) -> list[dict]:
    """The rows that a script appended to a file, less the line that a kill has cut short.

    BadInput where a line is no JSON, or where check(row) raises.
    """
    if not path.exists():
        return []
    rows = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            row = json.loads(line)
            check(row)
        except (ValueError, KeyError, TypeError) as e:
            what = f"line {number} is not a result of {script} ({e}); mend or remove it"
            raise BadInput(f"--results {path}: {what}") from e
        rows.append(row)
    return rows
