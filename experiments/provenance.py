"""What every result in this folder carries, so that it can be repeated: command, commit, device, versions, date."""

import datetime
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from prepare_data import BadInput

ROOT = Path(__file__).resolve().parents[1]


def commit() -> str:
    """$COMMIT, for a copy of the tree whose git is missing or older; else what git says, and whether code was changed since."""
    if os.environ.get("COMMIT"):
        return os.environ["COMMIT"]

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", "*.py")
        return git("rev-parse", "HEAD") + (" with uncommitted changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def device_name(device: torch.device | str) -> str:
    """The GPU's name, or the processor's with the number of its cores."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    names = [line.partition(": ")[2] for line in info.read_text().splitlines() if "model name" in line] if info.exists() else []
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores, {platform.system()}"


def read_json(path: Path) -> dict:
    """The results in a file, {} if there is none. BadInput if it is no JSON object."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_bytes())
    except ValueError as e:
        raise BadInput(f"{path} is not JSON ({e}): mend or remove it") from None
    if not isinstance(found, dict):
        raise BadInput(f"{path} holds no JSON object, as results are: mend or remove it")
    return found


def provenance(device: torch.device | str = "cpu") -> dict:
    """command (absolute paths without their folders), commit, device, versions and date (UTC) of the process that asks."""
    script = Path(sys.argv[0])
    name = script.resolve().relative_to(ROOT).as_posix() if script.resolve().is_relative_to(ROOT) else script.name
    return {
        "command": " ".join(["python", name, *(Path(a).name if Path(a).is_absolute() else a for a in sys.argv[1:])]),
        "commit": commit(),
        "device": device_name(device),
        "versions": {"python": platform.python_version(), "torch": str(torch.__version__), "numpy": np.__version__},
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
    }
