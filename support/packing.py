"""Best-fit packing (Ding et al. 2024, "Fewer truncations improve language modeling").

Contexts that are cut from a stream of documents end to end cut most documents that are not much
shorter. Packed, a document that fits into a context lies whole in one, and a longer one is cut
only where it must be, into whole contexts and a rest. Rests and short documents go where they
leave the least room. As in a stream, a token sees what stands before its document, too.

Paper: A.1 has "bin size of 8" and no more. It is read as the eight contexts that are open at a
time. So the documents stay nearly in their order, "without disturbing the data distribution", and
memory is bounded; Ding et al. sort the whole corpus by length, which leaves less padding.
"""

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from support.cli import BadInput
from support.data_set import DATA_SET, is_data_set, load, read_meta
from support.files import finish_replacing, replace_folder, write_atomically
from support.tokenizers import tokenizer_from

if TYPE_CHECKING:  # prepare_data.py needs no torch
    from torch import Tensor

BINS = 8  # contexts that are open
BLOCK = 1 << 20  # tokens looked at together
Piece = tuple[int, int]  # from the first token of a stream to the one after the last


def documents(ids: np.ndarray, eot: int) -> Iterator[Piece]:
    """Where the documents of a stream (tokens,) lie, each with its end-of-text token."""
    start = 0
    for first in range(0, len(ids), BLOCK):
        for at in np.flatnonzero(ids[first : first + BLOCK] == eot).tolist():
            yield start, first + at + 1
            start = first + at + 1


def best_fit(documents: Iterable[Piece], size: int) -> Iterator[list[Piece]]:
    """What lies in each row of size tokens, row after row as they are closed.

    A rest that is the end-of-text token alone is left out: it would be a row of no target.
    """
    rows: list[list[Piece]] = []  # that are open
    room: list[int] = []  # tokens left in each
    for start, stop in documents:
        while stop - start >= size:
            yield [(start, start + size)]
            start += size
        length = stop - start
        if length < 2:
            continue
        fitting = [at for at in range(len(rows)) if room[at] >= length]
        if fitting:
            at = min(fitting, key=room.__getitem__)
        else:
            if len(rows) == BINS:
                fullest = room.index(min(room))
                room.pop(fullest)
                yield rows.pop(fullest)
            at = len(rows)
            rows.append([])
            room.append(size)
        rows[at].append((start, stop))
        room[at] -= length
    yield from rows


def fraction_cut(ids: np.ndarray, eot: int, context: int) -> float:
    """Of the documents in ids, the fraction that does not lie whole in one of the contexts of so
    many tokens, laid end to end."""
    cut = [start // context != (stop - 1) // context for start, stop in documents(ids, eot)]
    return sum(cut) / len(cut)


def cuts_told(train: np.ndarray, meta: dict, eot: int, context: int) -> str:
    """What contexts of so many tokens do to the documents of a data set."""
    packing = meta.get("packing")
    cut = packing["cut_in_stream"] if packing else fraction_cut(train, eot, context)
    line = f"contexts of {context} tokens, end to end, cut {cut:.1%} of the train documents"
    if not packing:
        return line
    padding = packing["padding"] / len(train)
    return f"{line}\npacked best-fit, they cut {packing['cut']:.1%}, and {padding:.2%} is padding"


def require_end_of_text(tokenizer: str | dict) -> None:
    """BadInput for the one kind of tokenizer, char, that has no token for it."""
    kind = tokenizer["kind"] if isinstance(tokenizer, dict) else tokenizer
    if kind == "char":
        what = "where documents end is not to be seen with --tokenizer char"
        raise BadInput(f"--packing best-fit: {what}; give byte, bpe or gpt2")


def pack(folder: Path, context: int, overwrite: bool = False) -> Path:
    """The data set in folder once more, beside it, its train.bin packed for contexts of so many
    tokens; returns that folder. val.bin stays a stream, so that losses compare.

    train.bin is then rows of context + 1 tokens, inputs and targets, filled up with end-of-text
    tokens. No document is empty, so one that follows another is padding.
    """
    ids, _, meta = load(folder)
    eot = tokenizer_from(meta["tokenizer"]).eot
    packed = folder.with_name(f"{folder.name}.best_fit{context}")
    finish_replacing(packed, DATA_SET)
    if is_data_set(packed) and not overwrite:
        old = read_meta(packed)
        if all(old.get(key) == meta.get(key) for key in ("sources", "separator", "tokenizer")):
            return packed

    size, n_rows, used = context + 1, 0, 0
    temporary = packed.with_name(f".{packed.name}.{os.getpid()}.tmp")

    def write(file) -> None:
        nonlocal n_rows, used
        for pieces in best_fit(documents(ids, eot), size):
            row = np.concatenate([ids[start:stop] for start, stop in pieces])
            padding = np.full(size - len(row), eot, ids.dtype)
            file.write(np.concatenate([row, padding]).tobytes())
            n_rows, used = n_rows + 1, used + len(row)

    try:
        temporary.mkdir(parents=True, exist_ok=True)
        write_atomically(temporary / "train.bin", write)
        shutil.copyfile(folder / "val.bin", temporary / "val.bin")
        long = [stop - start > size for start, stop in documents(ids, eot)]
        packing = dict(
            context=context, eot=eot, padding=n_rows * size - used,
            cut=sum(long) / len(long), cut_in_stream=fraction_cut(ids, eot, context),
        )  # fmt: skip
        encoded = json.dumps(meta | dict(train_tokens=n_rows * size, packing=packing), indent=1)
        write_atomically(temporary / "meta.json", lambda file: file.write(encoded.encode("ascii")))
        replace_folder(temporary, packed, DATA_SET)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return packed


def hide_padding(tokens: "Tensor", meta: dict) -> "Tensor":
    """Rows (B, T + 1) of a packed text, their padding -1: a target that does not count."""
    eot = meta["packing"]["eot"]
    padding = (tokens[:, 1:] == eot) & (tokens[:, :-1] == eot)  # (B, T)
    tokens = tokens.clone()
    tokens[:, 1:].masked_fill_(padding, -1)
    return tokens
