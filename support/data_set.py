"""A data set on disk, as prepare_data.py makes it: its files, checked and loaded."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from support.cli import BadInput
from support.files import is_hidden
from support.tokenizers import id_dtype, tokenizer_from

VERSION = 1  # of the layout and of meta.json
DATA_SET = {"train.bin", "val.bin", "meta.json"}
META_FIELDS = {
    "version": int,
    "dataset": str,
    "split": str,
    "licence": str,
    "sources": list,
    "vocab_size": int,
    "dtype": str,
    "tokenizer": dict,
    **dict.fromkeys(("train_tokens", "train_bytes", "train_documents"), int),
    **dict.fromkeys(("val_tokens", "val_bytes", "val_documents"), int),
}
MAKE_AGAIN = (
    "make it again: remove the folder and do what made it, or python prepare_data.py with its "
    "flags and --overwrite"
)


def load(folder: str | Path) -> tuple[np.memmap, np.memmap, dict[str, Any]]:
    """(train, val, meta): two (tokens,) arrays of ids and the dict of meta.json.

    The arrays stay on the disk and are copied on write. BadInput for files that are missing,
    truncated, damaged, of another version or tokenizer, or hold unknown ids.
    """
    folder = Path(folder)
    meta = read_meta(folder)
    n_vocab = tokenizer_from(meta["tokenizer"], folder / "meta.json").n_vocab
    if n_vocab != meta["vocab_size"]:
        theirs = f"has a vocabulary of {meta['vocab_size']:,}, but the tokenizer in it one of"
        reason = f"{theirs} {n_vocab:,}: it is of another tokenizer"
        raise BadInput(f"{folder / 'meta.json'}: {reason}; {MAKE_AGAIN}")
    train, val = (np.memmap(folder / f"{s}.bin", id_dtype(n_vocab), "c") for s in ("train", "val"))
    for ids in (train, val):
        if ids.max() >= n_vocab:
            theirs = f"holds the id {ids.max()}, but the vocabulary ends at {n_vocab - 1}"
            reason = f"{theirs}: it is damaged or of another tokenizer"
            raise BadInput(f"{ids.filename}: {reason}; {MAKE_AGAIN}")
    return train, val, meta


def is_data_set(folder: Path) -> bool:
    """Whether a data set is there, whole or damaged. BadInput if anything else is in its place.

    What others have put beside the files of one, .DS_Store for instance, does not count.
    """
    if not folder.exists():
        return False
    if folder.is_dir():
        names = {path.name for path in folder.iterdir()}
        if names & DATA_SET:
            return True
        if all(map(is_hidden, names)):
            return False
    raise BadInput(f"{folder}: is not a data set; move it, or give another --data_dir")


def read_meta(folder: Path) -> dict[str, Any]:
    """meta.json, checked, and the sizes of the two .bin files against it. BadInput if wrong."""

    def require(good: bool, name: str, reason: str) -> None:
        if not good:
            raise BadInput(f"{folder / name}: {reason}; {MAKE_AGAIN}")

    if not folder.is_dir():
        raise BadInput(f"{folder}: there is no such folder; make it with python prepare_data.py")
    for name in sorted(DATA_SET):
        require((folder / name).is_file(), name, "is missing")
    try:
        meta = json.loads((folder / "meta.json").read_bytes().decode("utf-8"))
    except (ValueError, RecursionError) as e:
        require(False, "meta.json", f"is not JSON in UTF-8 ({e})")
    version = meta.get("version") if isinstance(meta, dict) else None
    require(version == VERSION, "meta.json", f"is of version {version!r}, not {VERSION}")
    for key, kind in META_FIELDS.items():
        good = type(meta.get(key)) is kind and (kind is not int or meta[key] > 0)
        positive = "positive " if kind is int else ""
        require(good, "meta.json", f"{key!r} is missing or no {positive}{kind.__name__}")
    good = isinstance(meta.get("separator", ""), str)  # only of a text split at one
    require(good, "meta.json", "'separator' is no str")
    packing = meta.get("packing", {})  # only of a text that is packed
    numbers = dict(context=int, eot=int, padding=int, cut=float, cut_in_stream=float)
    good = isinstance(packing, dict) and all(
        type(packing.get(key)) is kind for key, kind in numbers.items() if "packing" in meta
    )
    require(good, "meta.json", "'packing' is damaged")
    dtype = id_dtype(meta["vocab_size"])
    reason = f"dtype is {meta['dtype']!r}, but {meta['vocab_size']} tokens need {dtype}"
    require(meta["dtype"] == dtype.name, "meta.json", reason)
    for split in ("train", "val"):
        size = (folder / f"{split}.bin").stat().st_size
        tokens = meta[f"{split}_tokens"]
        expected = f"{tokens:,} tokens of {dtype.itemsize} bytes"
        reason = f"is damaged: meta.json says {expected}, it has {size:,} bytes"
        require(size == tokens * dtype.itemsize, f"{split}.bin", reason)
    return meta
