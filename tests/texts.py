"""What the tests of texts and data sets share."""

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np

from prepare_data import Args, main
from support.cli import run_command
from support.corpora import CORPORA
from support.tokenizers import tokenizer_from

ROOT = Path(__file__).resolve().parents[1]
SHAKESPEARE = (ROOT / "data" / "shakespeare.txt").read_text(encoding="utf-8")
MIXED = (
    "naïve café, 東京 2024: don't!\n\n  def f(x):\r\n\treturn x  # 🙂 ok\n" * 3 + "aaaa aaaaaaa bababab\u00a0\u2003x   \n   y"
)


def run(capsys, *argv: str) -> tuple[int, str, str]:
    """prepare_data.py's exit code, stdout and stderr for these arguments."""
    code = 0
    try:
        run_command(main, Args, list(argv))
    except SystemExit as e:
        code = e.code
    return code, *capsys.readouterr()


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def text_of(ids: np.ndarray, meta: dict) -> str:
    return tokenizer_from(meta["tokenizer"]).decode(ids)


def small(monkeypatch, name: str, folder: Path, *texts: str) -> Path:
    """Put these texts in the place of a corpus' files, in folder and in the table."""
    folder.mkdir(exist_ok=True)
    files = []
    for file, text in zip(CORPORA[name].files, texts, strict=True):
        (folder / file.name).write_bytes(text.encode())
        sha256 = hashlib.sha256(text.encode()).hexdigest()
        files.append(replace(file, size=len(text.encode()), sha256=sha256))
    monkeypatch.setitem(CORPORA, name, replace(CORPORA[name], files=tuple(files)))
    return folder
