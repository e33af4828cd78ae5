"""What the tests of train.py and sample.py share: small runs on a small text, and commands called as a user calls them."""

import json
from pathlib import Path

from mfa import Config
from support.cli import run_command
from support.run_folder import load_checkpoint
from train import Train

ROOT = Path(__file__).resolve().parents[1]
SIZES = dict(block_size=16, n_layer=1, dim=32, head_dim=8, rope_dim=4, ffn_dim=88, vocab_size=0)
RECIPE = dict(max_iters=20, batch_size=4, warmup_iters=5, eval_interval=10, log_interval=1, device="cpu")
# The same as flags.
FLAGS = [f"--{name}={value}" for name, value in (SIZES | RECIPE).items()]


def small(data: Path, out: Path, attn: str = "mfa", **changes) -> Train:
    """A Train that takes a fraction of a second, on the text of the fixture `data`; changes go to Config or to Train."""
    model = {k: changes.pop(k) for k in list(changes) if k in Config.__dataclass_fields__}
    model = Config(**{"attn": attn, **SIZES, **model})
    return Train(**{**RECIPE, "model": model, "file": str(data / "play.txt"), "data_dir": data, "out": out, **changes})


def rows(out: Path) -> list[dict]:
    """metrics.jsonl without what a clock says."""
    found = [json.loads(row) for row in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{k: v for k, v in row.items() if k not in ("seconds", "tokens_per_s")} for row in found]


def train_losses(out: Path) -> list[float]:
    return [row["train_loss"] for row in rows(out) if "train_loss" in row]


def state(path: Path) -> dict:
    """What a checkpoint says, without the clock and without the flags."""
    return {k: v for k, v in load_checkpoint(path).items() if k not in ("seconds", "args")}


def command(main, args_type, argv: list, defaults=None) -> int:
    """The exit code of a command. What it prints is left to capsys."""
    try:
        run_command(main, args_type, [str(arg) for arg in argv], defaults)
    except SystemExit as e:
        return e.code if isinstance(e.code, int) else 0 if e.code is None else 1
    return 0


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def text(data: Path) -> list[str]:
    return [f"--file={data / 'play.txt'}", f"--data_dir={data}"]
