"""Checkpoints by name: the trained models in docs/models, which the page and sample.py both read.

Such a file is a script for a browser, MODELS.mfa = {...};, whose braces are JSON: config,
tokenizer, step, best_loss, command, and weights. A matrix is int8 with a float32 scale for each
row, a vector is float32, both in base64. docs/export_model.py writes them.
"""

import base64
import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from support.cli import BadInput
from support.run_folder import load_checkpoint

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "models"
PREFIX = "shipped-"  # shipped-mfa is docs/models/mfa.js
FIRST = "shipped-mfa_kr"  # the one that is offered
FIELDS = dict(config=dict, tokenizer=dict, weights=dict, step=int, best_loss=float)


def names() -> list[str]:
    """What --checkpoint takes instead of a path."""
    return [PREFIX + path.stem for path in sorted(FOLDER.glob("*.js"))]


def offer() -> str:
    """The shipped model, for whom has not trained one."""
    there = [name for name in names() if name == FIRST]
    return f", for instance --checkpoint {FIRST}, which is here already" if there else ""


def path_of(path: Path) -> Path:
    """Of a checkpoint, which may be a shipped model's name."""
    if path.name != str(path) or not path.name.startswith(PREFIX) or path.exists():
        return path
    if path.name not in names():
        here = ", ".join(names()) or "not installed, a checkout has them"
        raise BadInput(f"--checkpoint {path}: the shipped models are {here}")
    return FOLDER / f"{path.name.removeprefix(PREFIX)}.js"


def open_checkpoint(path: Path) -> dict:
    """A run's checkpoint, or as much of one as sample.py needs from a shipped model."""
    path = path_of(path)
    return read_model(path) if path.suffix == ".js" and path.is_file() else load_checkpoint(path)


def read_model(path: Path) -> dict:
    """config, tokenizer, step, best_loss and the state dict `model` of a script file."""
    try:
        text = path.read_text(encoding="utf-8")
        found = json.loads(text[text.index(" = {") + 3 : text.rindex(";")])
        wrong = [name for name, kind in FIELDS.items() if not isinstance(found[name], kind)]
        if wrong:
            raise ValueError(f"its {wrong[0]} is of another type")
        model = {name: unpack(packed) for name, packed in found["weights"].items()}
        model["head.weight"] = model["embed.weight"]
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        what = "is not a model of docs/export_model.py, or a damaged one"
        raise BadInput(f"{path} {what} ({type(e).__name__}): make it again") from e
    return found | dict(model=model, args={})


def pack(weight: Tensor) -> dict:
    """A matrix in a quarter of its bytes: the largest of a row becomes +-127."""
    if weight.dim() == 1:
        return dict(shape=list(weight.shape), float32=in_base64(weight, np.float32))
    largest = weight.abs().amax(dim=1).clamp(min=1e-12)  # (rows,)
    scale = (largest / 127).float()  # (rows,)
    whole = (weight / scale[:, None]).round().clamp(-127, 127)  # (rows, columns)
    packed = dict(scale=in_base64(scale, np.float32), int8=in_base64(whole, np.int8))
    return dict(shape=list(weight.shape), **packed)


def unpack(packed: dict) -> Tensor:
    if "float32" in packed:
        return from_base64(packed["float32"], np.float32).view(packed["shape"])
    scale = from_base64(packed["scale"], np.float32)  # (rows,)
    return from_base64(packed["int8"], np.int8).view(packed["shape"]) * scale[:, None]


def in_base64(t: Tensor, dtype: type) -> str:
    little = np.dtype(dtype).newbyteorder("<")
    return base64.b64encode(t.numpy().astype(little).tobytes()).decode("ascii")


def from_base64(text: str, dtype: type) -> Tensor:
    little = np.dtype(dtype).newbyteorder("<")
    raw = np.frombuffer(base64.b64decode(text, validate=True), little)
    return torch.from_numpy(raw.astype(np.float32))
