"""Turns text into tokens on disk: train.bin, val.bin and meta.json in one folder.

    python prepare_data.py                                  # the embedded Shakespeare, by character
    python prepare_data.py --dataset wikitext-2 --tokenizer bpe --vocab_size 8192
    python prepare_data.py --file my_notes/ --tokenizer byte        # your own file or folder
    python prepare_data.py --file logs.txt --separator '\\n\\n'       # documents in one file

The .bin files are flat streams of token ids (uint16, or uint32 above 65,536 tokens): documents one
after the other, each closed by the end-of-text token where the tokenizer has one. meta.json has
everything needed to encode and decode, and the counts that turn a loss into bits per byte:
loss / ln 2 * tokens / bytes. Text is streamed, never held whole.
"""

import hashlib
import itertools
import json
import os
import platform
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple

import numpy as np

from support import text_files
from support.cli import BadInput, progress_bar, run_command, typed
from support.corpora import (
    CHARACTERS,
    CORPORA,
    DATA,
    DOCUMENTS,
    HUTTER,
    HUTTER_ENDS,
    WHOLE_DOCUMENTS,
    Corpus,
    check_text_flags,
    find_files,
)
from support.data_set import DATA_SET, VERSION, is_data_set, load, read_meta
from support.files import finish_replacing, replace_folder, write_atomically
from support.packing import cuts_told, pack, require_end_of_text
from support.text_files import checksum, document_ends, read_text, slice_text, split_documents
from support.tokenizers import (
    PATTERN,
    BPETokenizer,
    ByteTokenizer,
    CharTokenizer,
    Tokenizer,
    gpt2_tokenizer,
    id_dtype,
    safe_pieces,
    tokenizer_from,
    train_bpe,
)

DEFAULT_VOCAB = 8192
BPE_TRAIN_CHARACTERS = 20_000_000  # merges are learned from this much of the train split at most

# --------------------------------------------------------------------------------------------------
# The text of a data set


class Part(NamedTuple):
    """Characters start .. stop - 1 of a file."""

    split: str  # "train" or "val"
    path: Path
    start: int
    stop: int


@dataclass
class Text:
    """The text of one data set, read once and found good."""

    corpus: Corpus
    raw: bool  # see read_text
    parts: list[Part]
    sources: list[dict]  # name, bytes and sha256 of each file; of a folder as a whole
    characters: str  # those that occur; all of them only if the char tokenizer asks

    def stream(self, split: str) -> Iterator[str]:
        """The documents of a split, in pieces that can be tokenized one by one, "" after each."""
        for part in self.parts:
            if part.split == split:
                texts = slice_text(read_text(part.path, self.raw), part.start, part.stop)
                pieces = split_documents(texts, self.corpus.separator)
                for ended, document in itertools.groupby(pieces, lambda p: isinstance(p, int)):
                    if ended:
                        continue
                    piece = ""
                    for piece in filter(None, safe_pieces(document)):
                        yield piece
                    if piece:  # an empty document says nothing
                        yield ""


def scan(corpus: Corpus, files: list[tuple[str, Path]], label: str, tokenizer: str) -> Text:
    """Read everything once: sums, encoding, the characters in use, and where the split falls.

    files: (split, path), as find_files gives them. label: the name of a folder as a whole.
    """
    text = Text(corpus, tokenizer == "byte", [], [], "")
    characters = set()
    documents = 0  # that the user's --separator divides
    for (split, path), listed in itertools.zip_longest(files, corpus.files):
        size, sha256 = checksum(path)
        source = {"name": listed.name if listed else path.name, "bytes": size, "sha256": sha256}
        if listed and source != listed.source():
            reason = f"is not the {listed.name} of this corpus"
            raise BadInput(f"{path}: {reason}; for a text of your own use --file")
        text.sources.append(source)
        block_ends = [0]  # in characters, of each block of bytes
        with progress_bar(total=size, desc=f"checking {path.name}") as bar:
            for piece in read_text(path, text.raw):
                block_ends.append(block_ends[-1] + len(piece))
                bar.update(len(piece))
                if tokenizer == "char" or len(characters) < 2:
                    characters.update(piece)
        n = block_ends[-1]
        train_end, val_end = {"train": n, "val": 0, "both": int(0.9 * n)}[split], n
        if corpus.rule == HUTTER:
            train_end, val_end = (block_ends[end // text_files.BLOCK] for end in HUTTER_ENDS)
        if corpus.separator and not listed:
            ends = document_ends(read_text(path, text.raw), corpus.separator)
            documents += len(ends)
            if split == "both":
                train_end = min(ends[:-1], key=lambda end: abs(end - 0.9 * n), default=n)
        for part in (Part("train", path, 0, train_end), Part("val", path, train_end, val_end)):
            if part.start < part.stop:
                text.parts.append(part)

    where = label if len(files) > 1 else files[0][1]
    if len(characters) < 2:
        reason = f"has only the one character {min(characters)!r}" if characters else "is empty"
        raise BadInput(f"{where}: {reason}; there is nothing to learn from it")
    if corpus.separator and not corpus.files and documents <= len(files):
        reason = f"stands between no two documents in {where}"
        if text.raw and any("\r\n" in next(read_text(path, True), "") for _, path in files):
            reason += r", whose lines end in \r\n"
        raise BadInput(f"--separator: {reason}; give one that does, or '' for none")
    for split in ("train", "val"):
        if split not in [part.split for part in text.parts]:
            raise BadInput(f"{where}: nothing is left for the {split} split; give more text")
    if corpus.rule == DOCUMENTS:
        sums = "".join(f"{source['name']} {source['sha256']}\n" for source in text.sources)
        size = sum(source["bytes"] for source in text.sources)
        sha256 = hashlib.sha256(os.fsencode(sums)).hexdigest()
        text.sources = [{"name": label, "bytes": size, "sha256": sha256}]
    text.characters = "".join(sorted(characters))
    return text


# --------------------------------------------------------------------------------------------------
# Making a data set


def folder_for(
    dataset: str,
    tokenizer: str | dict,
    vocab_size: int | None,
    file: str | None = None,
    data_dir: str | Path = DATA,
) -> Path:
    """Where a data set is kept: <data_dir>/<name>-<tokenizer>, as in python-bpe8192.

    Of a tokenizer that is given by its spec() the name has its sum: python-bpe.5f3a09c1.
    """
    if file is not None:  # "file-" keeps a text of the user's called shakespeare.txt apart
        name = Path(os.path.abspath(file)).name
        if not Path(file).is_dir():
            name = name.removesuffix(".txt")
        dataset = "file-" + re.sub(r"[^\w.-]+", "-", name)
    size = str(vocab_size or DEFAULT_VOCAB) if tokenizer == "bpe" else ""
    if isinstance(tokenizer, dict):
        spec = json.dumps(tokenizer, sort_keys=True).encode()
        tokenizer, size = tokenizer["kind"], f".{hashlib.sha256(spec).hexdigest()[:8]}"
    return Path(data_dir) / f"{dataset}-{tokenizer}{size}"


def prepare(
    dataset: str = "shakespeare",
    file: str | None = None,
    source: str | None = None,
    tokenizer: str | dict = "char",
    vocab_size: int | None = None,
    data_dir: str | Path = DATA,
    overwrite: bool = False,
    separator: str | None = None,
    packing: str = "stream",
    context: int = 0,
) -> Path:
    """Make a data set unless it is there, and return its folder: train.bin, val.bin, meta.json.

    dataset: a name in CORPORA. file: a text file or folder of the user's own instead. source: the
    file or folder that has the corpus' text, instead of a download. tokenizer: char, byte, bpe or
    gpt2, or the spec() of one that there is already. vocab_size: of bpe, the 256 bytes and the
    end-of-text token included (8192). overwrite: make it in any case. separator: the text that
    stands between the documents of file, "" for none, None for the one that an earlier call gave.
    packing: "best-fit" packs it, once made, into a second one, for contexts of `context` tokens.

    The three files appear together or not at all. One that is there is made again only if its text
    has changed, never because it is damaged. Raises BadInput for that and for what else the user
    got wrong, OSError for what the disk refuses.
    """
    if packing == "best-fit":
        require_end_of_text(tokenizer)
        how = dataset, file, source, tokenizer, vocab_size, data_dir, overwrite, separator
        return pack(prepare(*how), context, overwrite)
    tok = tokenizer_from(tokenizer) if isinstance(tokenizer, dict) else None
    kind = tokenizer["kind"] if tok else tokenizer
    check_text_flags(dataset, file, source, kind, vocab_size, data_dir, separator)
    folder = folder_for(dataset, tokenizer, vocab_size, file, data_dir)
    finish_replacing(folder, DATA_SET)
    old = read_meta(folder) if is_data_set(folder) and not overwrite else {}
    if file is None and old:
        if old["sources"] == [listed.source() for listed in CORPORA[dataset].files]:
            return folder  # and the source may be gone

    corpus, files = find_files(dataset, file, source, Path(data_dir))
    if separator is None:
        separator = old.get("separator", "")
    if separator:
        rule = WHOLE_DOCUMENTS if corpus.rule == CHARACTERS else corpus.rule
        corpus = replace(corpus, rule=rule, separator=re.escape(separator))
    if file is None:
        label = f"the standard library of Python {platform.python_version()}"
    else:
        label = Path(os.path.abspath(file)).name
    text = scan(corpus, files, label, kind)
    if old and (old["sources"], old.get("separator", "")) == (text.sources, separator):
        return folder

    if isinstance(tok, CharTokenizer):
        require_known(text, tok)
    tok = tok or make_tokenizer(kind, vocab_size or DEFAULT_VOCAB, text)
    meta = {
        "version": VERSION,
        "dataset": folder.name[: folder.name.rindex("-")],
        "split": corpus.rule,
        "licence": corpus.licence,
        "sources": text.sources,
        "vocab_size": tok.n_vocab,
        "dtype": id_dtype(tok.n_vocab).name,
    }
    if separator:
        meta["separator"] = separator
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True, exist_ok=True)
        started = time.perf_counter()
        for split in ("train", "val"):
            meta |= write_tokens(temporary, split, text, tok)
        seconds = time.perf_counter() - started
        meta["tokenizer"] = tok.spec()
        encoded = json.dumps(meta, indent=1).encode("ascii")
        write_atomically(temporary / "meta.json", lambda f: f.write(encoded))
        if overwrite or old or not is_data_set(folder):  # or else another process was faster
            replace_folder(temporary, folder, DATA_SET)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    tokens = meta["train_tokens"] + meta["val_tokens"]
    again = " again, as its text or separator has changed" if old else ""
    print(f"prepared {folder}{again}: {tokens:,} tokens, {tokens / seconds:,.0f} a second")
    return folder


def make_tokenizer(kind: str, vocab_size: int, text: Text) -> Tokenizer:
    """The tokenizer for a text.

    Characters are taken from all of it (there is no unknown one), BPE from the train split.
    """
    if kind == "char":
        return CharTokenizer(text.characters)
    if kind == "byte":
        return ByteTokenizer()
    if kind == "gpt2":
        return gpt2_tokenizer()
    tokens = train_bpe(slice_text(text.stream("train"), 0, BPE_TRAIN_CHARACTERS), vocab_size)
    if len(tokens) + 1 < vocab_size:
        reason = f"after {len(tokens) + 1:,} tokens no pair in this text occurs twice"
        print(f"the vocabulary is smaller than --vocab_size {vocab_size}: {reason}")
    return BPETokenizer(tokens, PATTERN)


def require_known(text: Text, tok: CharTokenizer) -> None:
    """BadInput names the text's first character that a tokenizer of other characters lacks."""
    unknown = set(text.characters) - set(tok.characters)
    if not unknown:
        return
    pattern = re.compile(f"[{re.escape(''.join(unknown))}]")
    for part in text.parts:
        position = part.start
        for piece in slice_text(read_text(part.path, text.raw), part.start, part.stop):
            found = pattern.search(piece)
            if found:
                character = f"{found[0]!r} (U+{ord(found[0]):04X})"
                where = f"character {character} at position {position + found.start():,}"
                reason = f"is not among the {tok.n_vocab} characters of the checkpoint's tokenizer"
                advice = "remove it, or begin with a checkpoint of --tokenizer byte or bpe"
                raise BadInput(f"{part.path}: {where} {reason}; {advice}")
            position += len(piece)


def write_tokens(folder: Path, split: str, text: Text, tok: Tokenizer) -> dict[str, int]:
    """Write <split>.bin; returns how many tokens, bytes (of UTF-8) and documents it holds."""
    end_of_text = np.array([] if tok.eot is None else [tok.eot], id_dtype(tok.n_vocab))
    tokens, size, documents = 0, 0, 0

    def write(f: BinaryIO) -> None:
        nonlocal tokens, size, documents
        total = sum(source["bytes"] for source in text.sources)
        with progress_bar(total=total, desc=f"tokenizing {split}") as bar:
            for piece in text.stream(split):
                ids = tok.encode(piece) if piece else end_of_text  # (n,)
                f.write(ids.tobytes())
                n_bytes = len(piece.encode("utf-8", "surrogateescape"))
                bar.update(n_bytes)
                tokens += len(ids)
                size += n_bytes
                documents += not piece

    write_atomically(folder / f"{split}.bin", write)
    return {f"{split}_tokens": tokens, f"{split}_bytes": size, f"{split}_documents": documents}


# --------------------------------------------------------------------------------------------------
# The command line


@dataclass
class Args:
    """Turn text into tokens for train.py: train.bin, val.bin and meta.json in
    <data_dir>/<name>-<tokenizer>/."""

    dataset: str = "shakespeare"
    """shakespeare (embedded), tinyshakespeare, wikitext-2, tinystories, enwik8, text8, python, and
    with --source pg-books or pg-books-large."""
    file: str | None = None
    """A text file or a folder of your own instead. Of a file the first 90% train; of a folder each
    file is a document, and what is no text or was made by this project is left out."""
    source: str | None = None
    """The file or folder that has the corpus' text, instead of a download. xz, gz and zip are
    opened."""
    tokenizer: Literal["char", "byte", "bpe", "gpt2"] = "char"
    """bpe is trained here on the train split; gpt2 is tiktoken's, and downloaded."""
    vocab_size: int | None = None
    """Tokens of bpe, the 256 bytes and the end of text included; 8192 if not given."""
    packing: Literal["stream", "best-fit"] = "stream"
    """best-fit lays whole documents into contexts and pads them, instead of cutting a stream."""
    context: int = 256
    """The context: tokens of a packed one, or how long ones to count cut documents for."""
    data_dir: str = str(DATA)
    """Where data sets and downloads are kept."""
    overwrite: bool = False
    """Prepare again, even if the data set is there."""
    separator: str | None = None
    """What stands between the documents in --file, as it is and no pattern: '<|endoftext|>', or
    '\\n\\n' for a blank line. '' for nothing; if not given, what it was when last prepared."""


def unescape(text: str | None) -> str | None:
    """Line ends and tabs as one writes them in a shell: \\n, \\r, \\t, and \\\\ for a backslash."""
    meant = {"n": "\n", "r": "\r", "t": "\t", "\\": "\\"}
    return text and re.sub(r"\\([nrt\\])", lambda match: meant[match[1]], typed(text))


def main(args: Args) -> None:
    if args.context < 1:
        raise BadInput(f"--context {args.context}: must be 1 or more")
    flags = vars(args) | {"separator": unescape(args.separator)}
    folder = prepare(**flags)
    train, _, meta = load(folder)
    padding = {"train": meta["packing"]["padding"]} if "packing" in meta else {}
    for split in ("train", "val"):
        tokens, size = meta[f"{split}_tokens"] - padding.get(split, 0), meta[f"{split}_bytes"]
        documents = meta[f"{split}_documents"]
        plural = "s" if documents != 1 else ""
        print(
            f"{split}: {tokens:,} tokens, {size:,} bytes ({size / tokens:.3f} bytes a token), "
            f"{documents:,} document{plural}"
        )
    eot = tokenizer_from(meta["tokenizer"]).eot
    if eot is not None:
        print(cuts_told(train, meta, eot, args.context))
    print(
        f"vocabulary: {meta['vocab_size']:,} tokens; split: {meta['split']}; "
        f"licence: {meta['licence']}"
    )
    print(f"files: {folder}")
    command = f'--file "{args.file}"' if args.file else f"--dataset {args.dataset}"
    if args.tokenizer != "char":
        command += f" --tokenizer {args.tokenizer}"
    if args.vocab_size:
        command += f" --vocab_size {args.vocab_size}"
    if args.packing != "stream":
        command += f" --packing best-fit --block_size {args.context}"
    if args.data_dir != str(DATA):
        command += f' --data_dir "{args.data_dir}"'
    print(f"next: python train.py {command}")


if __name__ == "__main__":
    run_command(main, Args)
