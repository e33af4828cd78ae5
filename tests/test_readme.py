"""README.md: every command in it is one that its program takes. What they do is tested where they are tested."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

from prepare_data import run_command

ROOT = Path(__file__).resolve().parent.parent
TEXT = "\n".join((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "experiments/README.md"))
# python x.py --flags or torchrun --n=8 x.py --flags, up to a comment, the end of a code span, or &&
FOUND = sorted(set(re.findall(r"(?:python|torchrun [^`\n]*?) ((?:experiments/)?\w+\.py(?: [^`#&\n]*)?)", TEXT)))
TYPES = {"train": "Train", "sample": "Sample", "prepare_data": "Args", "bench_train": "Bench"}


def test_there_are_commands():
    assert len(FOUND) >= 10 and any(command.startswith("train.py --attn mfa_kr") for command in FOUND)


@pytest.mark.parametrize("command", FOUND)
def test_a_command_of_the_readme_is_taken(command, tmp_path, monkeypatch):
    script, *argv = shlex.split(command)
    monkeypatch.chdir(tmp_path)  # --resume looks for no run of ours
    module = importlib.import_module(Path(script).stem)
    got = []
    run_command(got.append, getattr(module, TYPES.get(module.__name__, "Args")), argv, getattr(module, "defaults", None))
    assert len(got) == 1
