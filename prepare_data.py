"""Turns text into tokens on disk: train.bin, val.bin and meta.json in one folder.

    python prepare_data.py                                              # the embedded Shakespeare, by character
    python prepare_data.py --dataset wikitext-2 --tokenizer bpe --vocab_size 8192
    python prepare_data.py --file my_notes/ --tokenizer byte            # your own file or folder

The .bin files are flat streams of token ids (uint16, or uint32 above 65,536 tokens): documents one after the other, each
closed by the end-of-text token where the tokenizer has one. meta.json has everything needed to encode and decode, and
the counts that turn a loss into bits per byte: loss / ln 2 * tokens / bytes. Text is streamed, never held whole.
"""

import codecs
import contextlib
import gzip
import hashlib
import heapq
import http.client
import io
import itertools
import json
import lzma
import os
import platform
import re
import shutil
import sys
import sysconfig
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from base64 import b64decode, b64encode
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import regex  # comes with tiktoken; unlike re it knows \p{L}
import tiktoken
import tqdm
import tyro

DATA = Path(__file__).resolve().parent / "data"
VERSION = 1  # of the layout and of meta.json
EOT = "<|endoftext|>"
BLOCK = 1_000_000  # bytes read, and characters tokenized, at a time
DEFAULT_VOCAB = 8192
BPE_TRAIN_CHARACTERS = 20_000_000  # merges are learned from this much of the train split at most
progress = partial(tqdm.tqdm, unit="B", unit_scale=True, delay=2, disable=None, leave=False)  # None: on terminals only


class BadInput(ValueError):
    """The user gave something unusable. The message is one sentence: which flag or file, what is wrong, what is right."""


# ---------------------------------------------------------------------------------------------------------------------
# The corpora

CHARACTERS = "first 90% of the characters train, the rest val"
DOCUMENTS = "every tenth document val, sorted by path (of fewer than ten, the one nearest to a tenth of the text)"
OFFICIAL = "the corpus' own training and validation files"
HUTTER = "first 90,000,000 bytes train, next 5,000,000 val (the last 5,000,000, by custom the test set, are left out)"
HUTTER_ENDS = 90_000_000, 95_000_000  # in bytes; multiples of BLOCK
EOT_LINE = r"(?m)^<\|endoftext\|>\n"  # what ends a document: the line goes, the end-of-text token comes
WIKI_TITLE = r"(?m)^(?= \n = [^=\n].* = \n \n)"  # where an article begins: " = Title = " between two blank lines
PUBLIC_DOMAIN = "public domain"
WIKIPEDIA = "CC BY-SA 3.0 and GFDL (Wikipedia contributors)"


@dataclass(frozen=True)
class File:
    """One file of a corpus. size and sha256 are those of the text, once xz, gz or zip is opened. No url: no download."""

    split: str  # "train", "val", or "both": cut by position
    name: str
    size: int
    sha256: str
    url: str = ""

    def source(self) -> dict:
        """What meta.json says of it."""
        return {"name": self.name, "bytes": self.size, "sha256": self.sha256}


@dataclass(frozen=True)
class Corpus:
    """One row of the table. separator: the regex at which documents end; "" makes every file one document."""

    rule: str
    separator: str
    licence: str
    files: tuple[File, ...] = ()


GITHUB = "https://raw.githubusercontent.com/"
TINYSTORIES = "https://huggingface.co/datasets/roneneldan/TinyStories/resolve/main/"
# fmt: off
CORPORA = {
    "shakespeare": Corpus(CHARACTERS, "", PUBLIC_DOMAIN, (  # embedded; data/README.md says where it is from
        File("both", "shakespeare.txt", 1_189_023, "acc15167fbb4f1235b3faaedac1fe2b656550191e302fefadf9cb0c03dcf26d0"),
    )),
    "tinyshakespeare": Corpus(CHARACTERS, "", PUBLIC_DOMAIN, (
        File("both", "tinyshakespeare.txt", 1115394, "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
             GITHUB + "karpathy/char-rnn/master/data/tinyshakespeare/input.txt"),
    )),
    "wikitext-2": Corpus(OFFICIAL, WIKI_TITLE, WIKIPEDIA, (
        File("train", "train.txt", 10_797_148, "9e9fa1ad55b1c2c95b08e37dd8e653f638fac2c6de904b79e813611eefbc985f",
             GITHUB + "pytorch/examples/main/word_language_model/data/wikitext-2/train.txt"),
        File("val", "valid.txt", 1_121_681, "f0737ed31fc1329026e95cb8b98e19c2a182c39c240ab909dc31abf2f8af58e8",
             GITHUB + "pytorch/examples/main/word_language_model/data/wikitext-2/valid.txt"),
    )),
    "tinystories": Corpus(OFFICIAL, EOT_LINE, "CDLA-Sharing-1.0 (Eldan and Li, 2023)", (
        File("train", "train.txt", 2_227_753_162, "6418d412de72888f52b5142c761ac21a582f7d1166f0bfbdb5f03ccfdec90443",
             TINYSTORIES + "TinyStoriesV2-GPT4-train.txt"),
        File("val", "valid.txt", 22_502_601, "6874bae9a4c1a4e7edcf0e53b86c17817e9cf881fc75ff2368da457b80c0585d",
             TINYSTORIES + "TinyStoriesV2-GPT4-valid.txt"),
    )),
    "enwik8": Corpus(HUTTER, "", WIKIPEDIA, (
        File("both", "enwik8", 100_000_000, "2b49720ec4d78c3c9fabaee6e4179a5e997302b3a70029f30f2d582218c024a8",
             "https://mattmahoney.net/dc/enwik8.zip"),
    )),
    "text8": Corpus(HUTTER, "", WIKIPEDIA, (
        File("both", "text8", 100_000_000, "6e890197040d37d85beb962ae1f041ff1d9a9ca8d20c7d99c85027eebf51dca7",
             "https://mattmahoney.net/dc/text8.zip"),
    )),
    "python": Corpus(DOCUMENTS, "", "PSF-2.0"),  # the standard library of the Python that runs this, without its tests
    "pg-books": Corpus(OFFICIAL, EOT_LINE, PUBLIC_DOMAIN, (  # 444 English books; only through --source
        File("train", "train-0.txt", 87_828_528, "b05fa97b37a52f5aa80e3a899587c8c9b8208a0c363d705fca914521c6201ef3"),
        File("train", "train-1.txt", 87_488_038, "c6b286bb16b48752c43b37a3111ae901fa203110c04d1ef595279dd2baf34322"),
        File("val", "val.txt", 4_342_410, "49f603b5a621b904fb223919967631437a790955e3328b8230e0b4156b816621"),
    )),
}
# fmt: on


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers: plain classes with encode, decode, to_bytes, spec, n_vocab and eot (the end-of-text id, or None).
# Ids run from 0 to n_vocab - 1. to_bytes lets a sampler show text as it grows: a token may end inside a character.


def id_dtype(n_vocab: int) -> np.dtype:
    """The smallest type that holds ids below n_vocab: uint16 or uint32."""
    return np.dtype(np.uint16 if n_vocab <= 1 << 16 else np.uint32)


class CharTokenizer:
    """One token a character, for the characters of one text. No end-of-text token."""

    eot = None

    def __init__(self, characters: str):
        """characters: each once; its position is its id."""
        self.characters, self.n_vocab = characters, len(characters)
        self.codes = np.frombuffer(characters.encode("utf-32-le", "surrogatepass"), np.uint32)  # id -> code point
        self.ids = np.full(0x110000, -1, np.int32)  # code point -> id
        self.ids[self.codes] = np.arange(self.n_vocab)

    def encode(self, text: str) -> np.ndarray:
        """Text of n characters -> (n,) ids. BadInput names the first character that has none."""
        ids = self.ids[np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)]
        if ids.size and ids.min() < 0:
            at = int(np.argmax(ids < 0))
            known = f" ({self.characters!r})" if self.n_vocab <= 100 else ""
            what = f"character {text[at]!r} (U+{ord(text[at]):04X}) at position {at}"
            raise BadInput(f"{what} is not among the {self.n_vocab} characters of this vocabulary{known}")
        return ids.astype(id_dtype(self.n_vocab))

    def decode(self, ids) -> str:
        """(n,) ids -> text of n characters."""
        return self.codes[np.asarray(ids, np.int64)].tobytes().decode("utf-32-le", "surrogatepass")

    def to_bytes(self, ids) -> bytes:
        return self.decode(ids).encode("utf-8", "surrogatepass")

    def spec(self) -> dict:
        return {"kind": "char", "characters": self.characters}


class ByteTokenizer:
    """One token a byte of UTF-8. In a str, bytes that are not UTF-8 are what Python's "surrogateescape" makes of them."""

    n_vocab, eot = 257, 256

    def encode(self, text: str) -> np.ndarray:
        """Text of n bytes -> (n,) ids."""
        return np.frombuffer(text.encode("utf-8", "surrogateescape"), np.uint8).astype(np.uint16)

    def encode_bytes(self, data: bytes) -> np.ndarray:
        """Any bytes -> ids, from which to_bytes gives them back."""
        return self.encode(data.decode("utf-8", "surrogateescape"))

    def decode(self, ids) -> str:
        """Ids -> text; what is not UTF-8 becomes U+FFFD."""
        return self.to_bytes(ids).decode("utf-8", "replace")

    def to_bytes(self, ids) -> bytes:
        return b"".join(bytes([i]) if i != self.eot else EOT.encode() for i in np.asarray(ids, np.int64).tolist())

    def spec(self) -> dict:
        return {"kind": "byte"}


class BPETokenizer(ByteTokenizer):
    """Bytes, merged as train_bpe learned it, by tiktoken. Id i is tokens[i] and its rank; the last id is the end of text.

    The characters "<|endoftext|>" in a text are ordinary text, never that token.
    """

    def __init__(self, tokens: list[bytes], pattern: str, kind: str = "bpe"):
        """tokens: each once, the 256 bytes among them. pattern: cuts text into chunks. kind: "bpe" or "gpt2"."""
        ranks = {token: i for i, token in enumerate(tokens)}
        if len(ranks) != len(tokens):
            raise BadInput("a token occurs twice")
        self.tokens, self.pattern, self.kind = tokens, pattern, kind
        self.n_vocab, self.eot = len(tokens) + 1, len(tokens)
        self.byte_ids = np.array([ranks[bytes([b])] for b in range(256)], id_dtype(self.n_vocab))
        special = {EOT: self.eot}
        self.encoding = tiktoken.Encoding(kind, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)

    def encode(self, text: str) -> np.ndarray:
        """Text -> (n,) ids. A byte that is not UTF-8 (see ByteTokenizer) is a token of its own."""
        plain = partial(self.encoding.encode_to_numpy, disallowed_special=())
        try:
            ids = plain(text)
        except UnicodeEncodeError:
            parts = re.split("([\udc80-\udcff])", text)  # at odd places one such byte each
            ids = np.concatenate([self.byte_ids[[ord(part) & 255]] if k % 2 else plain(part) for k, part in enumerate(parts)])
        return ids.astype(id_dtype(self.n_vocab))

    def to_bytes(self, ids) -> bytes:
        return self.encoding.decode_bytes(np.asarray(ids, np.int64).tolist())

    def spec(self) -> dict:
        tokens = " ".join(b64encode(token).decode("ascii") for token in self.tokens)
        return {"kind": self.kind, "pattern": self.pattern, "tokens": tokens}


def tokenizer_from(spec: dict, path: str | Path = "tokenizer") -> CharTokenizer | ByteTokenizer | BPETokenizer:
    """The tokenizer that spec() described in the file path. BadInput if the description is malformed."""
    try:
        kind = spec["kind"]
        if kind == "char":
            if not spec["characters"] or len(set(spec["characters"])) != len(spec["characters"]):
                raise ValueError("it has no characters, or one twice")
            return CharTokenizer(spec["characters"])
        if kind == "byte":
            return ByteTokenizer()
        if kind in ("bpe", "gpt2"):
            tokens = [b64decode(token, validate=True) for token in spec["tokens"].split(" ")]
            return BPETokenizer(tokens, spec["pattern"], kind)
        raise ValueError(f"its kind is {kind!r}, not char, byte, bpe or gpt2")
    except (KeyError, TypeError, AttributeError, ValueError) as e:
        reason = f"it has no {e}" if isinstance(e, KeyError) else e
        raise BadInput(f"{path}: the tokenizer's description is malformed: {reason}; prepare the data again") from None


# How text is cut into chunks, across which BPE never merges: contractions; a word, a number of up to three digits or a
# run of signs, each with the one space before it; line ends with the blanks before them; other blanks, less the last,
# which goes with the next word. No chunk runs from a non-blank into a blank: safe_pieces relies on that.
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?[\p{L}\p{M}]+| ?\p{N}{1,3}| ?[^\s\p{L}\p{M}\p{N}]+|\s*[\r\n]+|\s+(?!\S)|\s+"  # fmt: skip


def train_bpe(texts: Iterable[str], vocab_size: int) -> list[bytes]:
    """Learn byte pair encoding: merge the most frequent pair of neighbours (of equals, the smaller ids), and again.

    Exact, yet fast: equal chunks are counted once, a merge visits only words that hold its pair, and the queue is put
    right lazily (the count of a pair only falls once the pair is queued, so an entry is an upper bound till checked).
    Returns vocab_size - 1 tokens, the 256 bytes and then the merges; fewer if no pair is left that occurs twice.
    """
    chunks = Counter()
    for text in progress(texts, desc="counting chunks", unit=" pieces"):
        chunks.update(regex.findall(PATTERN, text))
    words, times = [list(chunk.encode("utf-8")) for chunk in chunks], list(chunks.values())
    count, where = Counter(), defaultdict(set)  # pair -> how often; pair -> the words that hold it, or once did
    for i, word in enumerate(words):
        for pair in zip(word, word[1:], strict=False):
            count[pair] += times[i]
            where[pair].add(i)
    queue = [(-n, pair) for pair, n in count.items()]
    heapq.heapify(queue)
    tokens = [bytes([b]) for b in range(256)]
    with progress(total=vocab_size - 257, desc="learning merges", unit=" merges") as bar:
        while len(tokens) < vocab_size - 1 and queue:
            n, pair = heapq.heappop(queue)
            if -n != count[pair]:  # out of date: back into the queue with what it is worth now
                heapq.heappush(queue, (-count[pair], pair))
                continue
            if -n < 2:
                break
            (left, right), new, born = pair, len(tokens), set()  # born: the pairs that the new token makes
            tokens.append(tokens[left] + tokens[right])
            for i in where.pop(pair):
                word, n, k = words[i], times[i], 0
                while k < len(word) - 1:
                    if word[k] == left and word[k + 1] == right:
                        word[k : k + 2] = [new]
                        if k > 0:
                            before = word[k - 1]
                            count[before, left] -= n
                            count[before, new] += n
                            where[before, new].add(i)
                            born.add((before, new))
                        if k + 1 < len(word):
                            after = word[k + 1]
                            count[right, after] -= n
                            count[new, after] += n
                            where[new, after].add(i)
                            born.add((new, after))
                    k += 1
            del count[pair]
            for pair in born:
                heapq.heappush(queue, (-count[pair], pair))
            bar.update()
    return tokens


def gpt2_tokenizer() -> BPETokenizer:
    """GPT-2's own 50,257 tokens, from tiktoken's cache or downloaded by it."""
    try:
        gpt2 = tiktoken.get_encoding("gpt2")
    except Exception as e:  # whatever requests or the file system raised, the vocabulary cannot be had
        raise BadInput(
            f"--tokenizer gpt2: tiktoken could not fetch its vocabulary ({type(e).__name__}); run it once where there is "
            "a network with TIKTOKEN_CACHE_DIR=FOLDER, copy FOLDER here and set TIKTOKEN_CACHE_DIR to it, or use bpe"
        ) from None
    return BPETokenizer(sorted(gpt2._mergeable_ranks, key=gpt2._mergeable_ranks.get), gpt2._pat_str, "gpt2")


# ---------------------------------------------------------------------------------------------------------------------
# Reading text, a piece at a time


def read_blocks(path: Path) -> Iterator[bytes]:
    """The bytes of a file, BLOCK at a time, with xz, gz and zip opened."""
    suffix = Path(path.name.removesuffix(".part")).suffix.lower()
    try:
        if suffix == ".zip":
            archive = zipfile.ZipFile(path)
            members = [member for member in archive.infolist() if not member.is_dir()]
            if len(members) != 1:
                raise BadInput(f"{path}: holds {len(members)} files; a zip must hold exactly one, the text")
            file = archive.open(members[0])
        else:
            file = {".xz": lzma.open, ".gz": gzip.open}.get(suffix, open)(path, "rb")
        with file:
            while block := file.read(BLOCK):
                yield block
    except (lzma.LZMAError, zlib.error, zipfile.BadZipFile, EOFError, RuntimeError, OSError) as e:
        if getattr(e, "errno", None) is not None:  # from the operating system, not from one of the formats
            raise
        raise BadInput(f"{path}: cannot be unpacked, it is damaged or no {suffix} file ({e})") from None


def checksum(path: Path) -> tuple[int, str]:
    """Bytes and sha256 of what read_blocks gives."""
    size, sha256 = 0, hashlib.sha256()
    for block in read_blocks(path):
        size += len(block)
        sha256.update(block)
    return size, sha256.hexdigest()


def read_text(path: Path, raw: bool) -> Iterator[str]:
    """The text of a file: one piece for every block, and one for the end.

    Line ends become "\\n" and a byte order mark goes. raw (for bytes as tokens) keeps both, and what is not UTF-8.
    BadInput names the first NUL byte, or the first that is not UTF-8.
    """
    decoder = codecs.getincrementaldecoder("utf-8" if raw else "utf-8-sig")("surrogateescape" if raw else "strict")
    if not raw:
        decoder = io.IncrementalNewlineDecoder(decoder, translate=True)
    offset = 0
    for block in itertools.chain(read_blocks(path), [b""]):
        if b"\0" in block:
            at = offset + block.index(0)
            raise BadInput(f"{path}: is not text, there is a NUL byte at offset {at:,}; give a text file in UTF-8")
        try:
            yield decoder.decode(block, final=not block)
        except UnicodeDecodeError as e:
            at = offset + len(block) - len(e.object) + e.start  # e.object begins with what the decoder had kept back
            what = f"is not UTF-8, at offset {at:,} there is the byte 0x{e.object[e.start]:02x}"
            raise BadInput(f"{path}: {what}; save it as UTF-8, or use --tokenizer byte") from None
        offset += len(block)


def window(texts: Iterable[str], start: int, stop: int) -> Iterator[str]:
    """Characters start .. stop - 1 of a text that comes in pieces."""
    at = 0
    for text in texts:
        yield text[max(0, start - at) : max(0, stop - at)]
        at += len(text)
        if at >= stop:
            return


def split_documents(texts: Iterable[str], separator: str) -> Iterator[Iterable[str]]:
    """The documents of a text that comes in pieces, each in pieces again. What separator matches belongs to none."""
    if not separator:
        yield texts
        return
    rest = ""
    for text in texts:
        *documents, rest = re.split(separator, rest + text)
        for document in documents:
            yield [document]
    if rest == EOT or rest.endswith("\n" + EOT):  # the last line may lack its end
        rest += "\n"
    for document in re.split(separator, rest):
        yield [document]


def safe_pieces(texts: Iterable[str]) -> Iterator[str]:
    """The same text, cut only between a non-blank and a blank: there no chunk of BPE (ours or GPT-2's) reaches across."""
    rest = ""
    for text in texts:
        old, rest = len(rest), rest + text
        for start in (max(old, len(rest) - 4096), max(old - 1, 0)):  # look near the end first: the last place will do
            cuts = [match.end() for match in re.finditer(r"\S(?=\s)", rest[start:])]
            if cuts:
                yield rest[: start + cuts[-1]]
                rest = rest[start + cuts[-1] :]
                break
    yield rest


# ---------------------------------------------------------------------------------------------------------------------
# Finding text


def find_files(dataset: str, file: str | None, source: str | None, data_dir: Path) -> tuple[Corpus, list]:
    """The corpus (for a file or folder of the user's own, what stands for one) and its files as (split, path)."""
    if file is None and dataset != "python":
        corpus = CORPORA[dataset]
        return corpus, [(wanted.split, find_file(dataset, wanted, source, data_dir)) for wanted in corpus.files]
    path = Path(file if file is not None else sysconfig.get_path("stdlib"))
    corpus = CORPORA["python"] if file is None else Corpus(DOCUMENTS, "", "your own text")
    skip = {"site-packages", "dist-packages", "test", "tests", "idle_test"} if file is None else set()
    if not path.exists():
        raise BadInput(f"--file {path}: there is no such file or folder")
    paths = [path] if path.is_file() else []
    for found in sorted(path.rglob("*.py" if file is None else "*"), key=lambda p: p.relative_to(path).as_posix()):
        names = found.relative_to(path).parts
        if found.is_file() and not skip.intersection(names) and not any(name[0] == "." for name in names):
            with open(found, "rb") as f:
                head = f.read(8192)
            if head and b"\0" not in head:  # empty files say nothing; a NUL byte is what git, too, knows binaries by
                paths.append(found)
    if not paths:
        raise BadInput(f"{path}: there is no text file in this folder")
    if len(paths) == 1:
        return replace(corpus, rule=CHARACTERS), [("both", paths[0])]
    tenth = sum(p.stat().st_size for p in paths) / 10
    val = set(paths[9::10]) or {min(paths, key=lambda p: abs(p.stat().st_size - tenth))}
    return corpus, [("val" if p in val else "train", p) for p in paths]


def find_file(dataset: str, wanted: File, source: str | None, data_dir: Path) -> Path:
    """A file of a corpus: in --source, else in <data_dir>/raw/<dataset> (embedded: in data), else downloaded to there."""
    files = CORPORA[dataset].files
    needed = "the folder that holds " + ", ".join(file.name for file in files) + " (or .xz, .gz, .zip of it)"
    folder = Path(source) if source is not None else DATA if dataset == "shakespeare" else data_dir / "raw" / dataset
    if folder.is_file() and len(files) == 1:  # --source may be the file itself
        return folder
    for name in (wanted.name, wanted.url.rpartition("/")[2] or wanted.name):
        for ending in ("", ".xz", ".gz", ".zip"):
            if (folder / (name + ending)).is_file():
                return folder / (name + ending)
    if source is not None:
        raise BadInput(f"--source {source}: there is no {wanted.name} in it; give {needed}")
    if not wanted.url:
        raise BadInput(f"--dataset {dataset}: cannot be downloaded; run prepare_data.py --source with {needed}")
    return download(dataset, wanted, folder)


def download(dataset: str, wanted: File, folder: Path) -> Path:
    """Fetch a file of a corpus into folder. It appears under its name only once size and sha256 are found right.

    What has arrived is kept as .part beside it, from which a cut connection, or the next run, goes on.
    """
    path = folder / wanted.url.rpartition("/")[2]
    part = path.with_name(path.name + ".part")
    by_hand = (
        f"put it at {folder / wanted.name} by hand, run prepare_data.py --source, or use the embedded --dataset shakespeare"
    )
    folder.mkdir(parents=True, exist_ok=True)
    while True:
        kept = had = part.stat().st_size if part.exists() else 0
        headers = {"User-Agent": "prepare_data.py (Python urllib)"} | ({"Range": f"bytes={had}-"} if had else {})
        try:
            with urllib.request.urlopen(urllib.request.Request(wanted.url, headers=headers), timeout=30) as reply:
                kept = had if reply.status == 206 else 0  # 200: the server ignores Range and sends all of it
                total = kept + int(reply.headers.get("Content-Length") or 0)
                bar = progress(total=total or None, initial=kept, desc=path.name)
                with open(part, "ab" if kept else "wb") as f, bar:
                    while block := reply.read(1 << 16):
                        kept += f.write(block)
                        bar.update(len(block))
            if kept >= total:
                break
            reason = f"the connection was cut after {kept:,} of {total:,} bytes"
        except urllib.error.HTTPError as e:
            if e.code == 416 and had:  # nothing lies beyond what we have
                break
            reason = f"HTTP {e.code} {e.reason}"
        except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError) as e:
            reason = getattr(e, "reason", None) or e
        if kept <= had:  # no headway: give up
            raise BadInput(f"--dataset {dataset}: {wanted.url} could not be downloaded: {reason}; {by_hand}") from None
    try:
        size, sha256 = checksum(part)
    except BadInput:  # not even an archive
        size, sha256 = 0, "none"
    if (size, sha256) != (wanted.size, wanted.sha256):
        part.unlink()
        if had:  # perhaps a rest of something else was continued: once more, from the beginning
            return download(dataset, wanted, folder)
        what = f"{size:,} bytes with sha256 {sha256[:12]}..., not {wanted.size:,} with {wanted.sha256[:12]}..."
        raise BadInput(f"--dataset {dataset}: {wanted.url} gave {what}, and was removed; {by_hand}")
    part.replace(path)
    return path


@dataclass
class Text:
    """The text of one data set, read once and found good. parts: (split, file, first character, last character + 1)."""

    corpus: Corpus
    raw: bool  # see read_text
    parts: list[tuple[str, Path, int, int]]
    sources: list[dict]  # name, bytes and sha256 of each file; of a folder as a whole
    characters: str  # those that occur; all of them only if the char tokenizer asks

    def stream(self, split: str) -> Iterator[str]:
        """The documents of a split in pieces that can be tokenized one by one, and "" after each document."""
        for part, path, start, stop in self.parts:
            if part == split:
                texts = window(read_text(path, self.raw), start, stop)
                for document in split_documents(texts, self.corpus.separator):
                    piece = ""
                    for piece in filter(None, safe_pieces(document)):
                        yield piece
                    if piece:  # an empty document says nothing
                        yield ""


def survey(corpus: Corpus, files: list[tuple[str, Path]], label: str, tokenizer: str) -> Text:
    """Read everything once: sums, encoding, the characters in use, and where the split falls. label: of a folder."""
    text, characters = Text(corpus, tokenizer == "byte", [], [], ""), set()
    for (split, path), known in itertools.zip_longest(files, corpus.files):
        size, sha256 = checksum(path)
        found = {"name": known.name if known else path.name, "bytes": size, "sha256": sha256}
        if known and found != known.source():
            raise BadInput(f"{path}: is not the {known.name} of this corpus; for a text of your own use --file")
        text.sources.append(found)
        ends = [0]  # characters up to the end of each block
        with progress(total=size, desc=f"checking {path.name}") as bar:
            for piece in read_text(path, text.raw):
                ends.append(ends[-1] + len(piece))
                bar.update(len(piece))
                if tokenizer == "char" or len(characters) < 2:
                    characters.update(piece)
        n = ends[-1]
        train, val = {"train": (n, n), "val": (0, n), "both": (int(0.9 * n), n)}[split]
        if corpus.rule == HUTTER:
            train, val = (ends[end // BLOCK] for end in HUTTER_ENDS)
        text.parts += [part for part in (("train", path, 0, train), ("val", path, train, val)) if part[2] < part[3]]
    where = label if len(files) > 1 else files[0][1]
    if len(characters) < 2:
        what = f"has only the one character {min(characters)!r}" if characters else "is empty"
        raise BadInput(f"{where}: {what}; there is nothing to learn from it")
    for split in ("train", "val"):
        if split not in [part[0] for part in text.parts]:
            raise BadInput(f"{where}: nothing is left for the {split} split; give more text")
    if corpus.rule == DOCUMENTS:
        sums = "".join(f"{source['name']} {source['sha256']}\n" for source in text.sources)
        size = sum(source["bytes"] for source in text.sources)
        text.sources = [{"name": label, "bytes": size, "sha256": hashlib.sha256(os.fsencode(sums)).hexdigest()}]
    text.characters = "".join(sorted(characters))
    return text


# ---------------------------------------------------------------------------------------------------------------------
# Writing and reading a data set

FILES = {"train.bin", "val.bin", "meta.json"}
META = {  # what meta.json must hold
    "version": int, "dataset": str, "tokenizer": dict, "vocab_size": int, "dtype": str, "split": str, "licence": str,
    "train_tokens": int, "train_bytes": int, "train_documents": int,
    "val_tokens": int, "val_bytes": int, "val_documents": int, "sources": list,
}  # fmt: skip
AGAIN = "make it again: python prepare_data.py with the flags it was made with, and --overwrite"


def folder_for(dataset: str, tokenizer: str, vocab_size: int | None, file: str | None = None, data_dir=DATA) -> Path:
    """Where a data set is kept: <data_dir>/<name>-<tokenizer>, bpe with its vocabulary, as in python-bpe8192."""
    if file is not None:  # "file-" keeps a text of the user's called shakespeare.txt apart from the corpus
        dataset = "file-" + re.sub(r"[^\w.-]+", "-", Path(os.path.abspath(file)).stem)
    return Path(data_dir) / f"{dataset}-{tokenizer}{vocab_size or DEFAULT_VOCAB if tokenizer == 'bpe' else ''}"


def prepare(
    dataset: str = "shakespeare",
    file: str | None = None,
    source: str | None = None,
    tokenizer: str = "char",
    vocab_size: int | None = None,
    data_dir: str | Path = DATA,
    overwrite: bool = False,
) -> Path:
    """Make a data set unless it is there already, and return its folder with train.bin, val.bin and meta.json.

    dataset: a name in CORPORA. file: a text file or folder of the user's own instead. source: the file or folder that
    has the corpus' text, instead of a download. tokenizer: char, byte, bpe or gpt2. vocab_size: of bpe, the 256 bytes
    and the end-of-text token included (8192). overwrite: make it in any case. The three files appear together or not
    at all. One that is there is made again only if its text has changed, never because it is damaged. Raises BadInput
    for that and for what else the user got wrong, OSError for what the disk refuses.
    """
    if dataset not in CORPORA:
        raise BadInput(f"--dataset {dataset}: is not one of {', '.join(CORPORA)}; for a text of your own use --file")
    if file is not None and not str(file):
        raise BadInput("--file: is empty; give a text file or a folder of them")
    if file is not None and dataset != "shakespeare":
        raise BadInput(f"--file {file}: does not go with --dataset {dataset}; give one of the two")
    if source is not None and (file is not None or dataset == "python"):
        raise BadInput(f"--source {source}: goes with a corpus that has files, not with {'--file' if file else dataset}")
    if tokenizer not in ("char", "byte", "bpe", "gpt2"):
        raise BadInput(f"--tokenizer {tokenizer}: is not one of char, byte, bpe, gpt2")
    if vocab_size is not None and tokenizer != "bpe":
        raise BadInput(f"--vocab_size {vocab_size}: goes with --tokenizer bpe only, not with {tokenizer}")
    if vocab_size is not None and not 257 <= vocab_size <= 1_000_000:
        raise BadInput(f"--vocab_size {vocab_size}: must be 257 (256 bytes and the end of text) to 1000000")
    if Path(data_dir).is_file():
        raise BadInput(f"--data_dir {data_dir}: is a file; give a folder")
    folder = folder_for(dataset, tokenizer, vocab_size, file, data_dir)
    backup = folder.with_name(f".{folder.name}.old")
    if backup.exists() and not folder.exists():  # this program was killed inside install()
        backup.rename(folder)
    if folder.exists() and not (folder.is_dir() and {path.name for path in folder.iterdir()} <= FILES):
        raise BadInput(f"{folder}: is not, or not only, a data set; move it, or give another --data_dir")
    made_from = read_meta(folder)["sources"] if folder.exists() and not overwrite else None
    if file is None and made_from and made_from == [f.source() for f in CORPORA[dataset].files]:
        return folder  # and the source may be gone

    corpus, files = find_files(dataset, file, source, Path(data_dir))
    label = f"the standard library of Python {platform.python_version()}" if file is None else Path(os.path.abspath(file)).name
    text = survey(corpus, files, label, tokenizer)
    if made_from == text.sources:
        return folder
    tok = make_tokenizer(tokenizer, vocab_size or DEFAULT_VOCAB, text)
    meta = {"version": VERSION, "dataset": folder.name[: folder.name.rindex("-")], "split": corpus.rule}
    meta |= {"licence": corpus.licence, "sources": text.sources, "vocab_size": tok.n_vocab, "dtype": id_dtype(tok.n_vocab).name}
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True, exist_ok=True)
        began = time.perf_counter()
        for split in ("train", "val"):
            meta |= write_tokens(temporary, split, text, tok)
        seconds = time.perf_counter() - began
        write_file(temporary / "meta.json", [json.dumps(meta | {"tokenizer": tok.spec()}, indent=1).encode("ascii")])
        if overwrite or made_from or not folder.exists():  # or else another process was faster
            install(temporary, folder, backup)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    tokens = meta["train_tokens"] + meta["val_tokens"]
    print(f"prepared {folder}: {tokens:,} tokens, {tokens / seconds:,.0f} a second")
    return folder


def make_tokenizer(kind: str, vocab_size: int, text: Text) -> CharTokenizer | ByteTokenizer | BPETokenizer:
    """The tokenizer for a text. Characters are taken from all of it (there is no unknown one), BPE from the train split."""
    if kind == "char":
        return CharTokenizer(text.characters)
    if kind == "byte":
        return ByteTokenizer()
    if kind == "gpt2":
        return gpt2_tokenizer()
    tokens = train_bpe(window(text.stream("train"), 0, BPE_TRAIN_CHARACTERS), vocab_size)
    most = len(tokens) + 1
    if most < vocab_size:
        why = f"no pair in this text occurs twice after {most} tokens"
        raise BadInput(f"--vocab_size {vocab_size}: {why}; give {most} or less, or --tokenizer char")
    return BPETokenizer(tokens, PATTERN)


def write_tokens(folder: Path, split: str, text: Text, tok: Any) -> dict[str, int]:
    """Write <split>.bin; returns how many tokens, bytes (of UTF-8 text behind them) and documents it holds."""
    end = np.array([] if tok.eot is None else [tok.eot], id_dtype(tok.n_vocab))
    totals = np.zeros(3, np.int64)

    def blocks() -> Iterator[bytes]:
        with progress(total=sum(source["bytes"] for source in text.sources), desc=f"tokenizing {split}") as bar:
            for piece in text.stream(split):
                ids = tok.encode(piece) if piece else end
                size = len(piece.encode("utf-8", "surrogateescape"))
                totals[:] += len(ids), size, not piece
                bar.update(size)
                yield ids.tobytes()

    write_file(folder / f"{split}.bin", blocks())
    return dict(zip((f"{split}_tokens", f"{split}_bytes", f"{split}_documents"), totals.tolist(), strict=True))


def write_file(path: Path, blocks: Iterable[bytes]) -> None:
    """Write a file, and wait until it is on the disk."""
    try:
        with open(path, "wb") as f:
            for block in blocks:
                f.write(block)
            f.flush()
            os.fsync(f.fileno())
    except OSError as e:  # that of a full disk does not name the file
        raise OSError(e.errno, e.strerror, e.filename or str(path)) from e


def install(temporary: Path, folder: Path, backup: Path) -> None:
    """Put a finished folder in folder's place. No folder can replace another in one step: the old one waits as backup."""
    try:
        if folder.exists():
            shutil.rmtree(backup, ignore_errors=True)
            folder.rename(backup)
        temporary.rename(folder)
    except BaseException:
        if backup.exists() and not folder.exists():
            backup.rename(folder)
        raise
    shutil.rmtree(backup, ignore_errors=True)


def read_meta(folder: Path) -> dict[str, Any]:
    """meta.json, checked, and the sizes of the two .bin files against it. BadInput says what is wrong with which."""

    def need(ok: bool, name: str, what: str) -> None:
        if not ok:
            raise BadInput(f"{folder / name}: {what}; {AGAIN}")

    if not folder.is_dir():
        raise BadInput(f"{folder}: there is no such folder; make it with python prepare_data.py")
    for name in sorted(FILES):
        need((folder / name).is_file(), name, "is missing")
    try:
        meta = json.loads((folder / "meta.json").read_bytes().decode("utf-8"))
    except (ValueError, RecursionError) as e:
        raise BadInput(f"{folder / 'meta.json'}: is not JSON in UTF-8 ({e}); {AGAIN}") from None
    version = meta.get("version") if isinstance(meta, dict) else None
    need(version == VERSION, "meta.json", f"is of version {version!r}, not {VERSION}")
    for key, kind in META.items():
        good = type(meta.get(key)) is kind and (kind is not int or meta[key] > 0)
        need(good, "meta.json", f"{key!r} is missing or no {'positive ' * (kind is int)}{kind.__name__}")
    dtype = id_dtype(meta["vocab_size"])
    need(meta["dtype"] == dtype.name, "meta.json", f"dtype is {meta['dtype']!r}, but {meta['vocab_size']} tokens need {dtype}")
    for split in ("train", "val"):
        size, tokens = (folder / f"{split}.bin").stat().st_size, meta[f"{split}_tokens"]
        expected = f"{tokens:,} tokens of {dtype.itemsize} bytes"
        need(size == tokens * dtype.itemsize, f"{split}.bin", f"is damaged: meta.json says {expected}, it has {size:,} bytes")
    return meta


def load(folder: str | Path) -> tuple[np.memmap, np.memmap, dict[str, Any]]:
    """(train, val, meta): two (tokens,) arrays of ids that stay on the disk, copied on write, and the dict of meta.json.

    BadInput for files that are missing, truncated, damaged, of another version or tokenizer, or hold unknown ids.
    """
    folder = Path(folder)
    meta = read_meta(folder)
    n_vocab = tokenizer_from(meta["tokenizer"], folder / "meta.json").n_vocab
    if n_vocab != meta["vocab_size"]:
        what = f"has a vocabulary of {meta['vocab_size']:,}, but the tokenizer in it one of {n_vocab:,}"
        raise BadInput(f"{folder / 'meta.json'}: {what}: it is of another tokenizer; {AGAIN}")
    arrays = [np.memmap(folder / f"{split}.bin", id_dtype(n_vocab), "c") for split in ("train", "val")]
    for ids in arrays:
        if ids.max() >= n_vocab:
            what = f"holds the id {ids.max()}, but the vocabulary ends at {n_vocab - 1}"
            raise BadInput(f"{ids.filename}: {what}: it is damaged or of another tokenizer; {AGAIN}")
    return arrays[0], arrays[1], meta


# ---------------------------------------------------------------------------------------------------------------------
# The command line


def run_command(main: Callable, args_type: type, argv: list[str] | None = None, defaults: Callable | None = None) -> None:
    """Run a command: read argv (sys.argv) into the dataclass args_type with tyro and call main with it.

    defaults: given argv, returns the args_type that the flags start from. Ends with exit code 2 and one line on stderr
    for BadInput and for what the operating system refuses (disk full, no permission), with 130 for Ctrl-C, and without
    a word when whoever read the output has gone (| head).
    """
    sys.stdout = sys.stdout or open(os.devnull, "w")  # None where they were closed
    sys.stderr = sys.stderr or open(os.devnull, "w")
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # Windows' own encoding cannot print every text
            stream.reconfigure(encoding="utf-8", errors="replace")
    argv = sys.argv[1:] if argv is None else argv
    try:
        main(parse(args_type, argv, {"default": defaults(argv)} if defaults else {}))
        sys.stdout.flush()
    except BadInput as e:
        stop(f"error: {e}", 2)
    except KeyboardInterrupt:
        stop("interrupted", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it flushes at its end
        sys.exit(141)  # as a shell reports it
    except OSError as e:
        if e.errno is None:  # not from the operating system
            raise
        stop(f"error: {e.filename}: {e.strerror}" if e.filename else f"error: {e.strerror}", 2)


def parse(args_type: type, argv: list[str], default: dict) -> Any:
    """tyro.cli, with its complaint, a box of several lines, made one line."""
    told = io.StringIO()
    try:
        with contextlib.redirect_stderr(told):
            return tyro.cli(args_type, args=argv, use_underscores=True, **default)
    except SystemExit as e:
        if not e.code:  # --help
            raise
        words = re.sub("[─-╿]+|-{3,}", " ", told.getvalue().partition("\n")[2]).split()  # without title and frame
        raise BadInput(re.split(" Argument helptext| For full helptext", " ".join(words))[0]) from None
    except ValueError as e:  # a dataclass that refuses its values, as mfa.Config does
        raise BadInput(str(e)) from None


def stop(line: str, code: int) -> None:
    print(line.replace("\n", " "), file=sys.stderr)
    sys.exit(code)


@dataclass
class Args:
    """Turn text into tokens for train.py: train.bin, val.bin and meta.json in <data_dir>/<name>-<tokenizer>/."""

    dataset: str = "shakespeare"
    """shakespeare (embedded), tinyshakespeare, wikitext-2, tinystories, enwik8, text8, python or pg-books (--source)."""
    file: str | None = None
    """A text file or a folder of your own instead. Of a file the first 90% train; of a folder each file is a document."""
    source: str | None = None
    """The file or folder that has the corpus' text, instead of a download. xz, gz and zip are opened."""
    tokenizer: Literal["char", "byte", "bpe", "gpt2"] = "char"
    """bpe is trained here on the train split; gpt2 is tiktoken's, and downloaded."""
    vocab_size: int | None = None
    """Tokens of bpe, the 256 bytes and the end of text included; 8192 if not given."""
    context: int = 256
    """Say how many documents are cut by contexts of so many tokens, laid end to end."""
    data_dir: str = str(DATA)
    """Where data sets and downloads are kept."""
    overwrite: bool = False
    """Prepare again, even if the data set is there."""


def fraction_cut(ids: np.ndarray, eot: int, context: int) -> float:
    """Of the documents in ids, the fraction that does not lie whole in one of the contexts laid end to end."""
    last = np.flatnonzero(ids == eot)
    first = np.concatenate([[0], last[:-1] + 1])
    return float(np.mean(first // context != last // context))


def main(args: Args) -> None:
    if args.context < 1:
        raise BadInput(f"--context {args.context}: must be 1 or more")
    folder = prepare(args.dataset, args.file, args.source, args.tokenizer, args.vocab_size, args.data_dir, args.overwrite)
    train, _, meta = load(folder)
    for split in ("train", "val"):
        tokens, size, documents = (meta[f"{split}_{what}"] for what in ("tokens", "bytes", "documents"))
        per = f"{size / tokens:.3f} bytes a token"
        print(f"{split}: {tokens:,} tokens, {size:,} bytes ({per}), {documents:,} document{'s' * (documents != 1)}")
    eot = tokenizer_from(meta["tokenizer"]).eot
    if eot is not None:
        cut = fraction_cut(train, eot, args.context)
        print(f"contexts of {args.context} tokens, end to end, cut {cut:.1%} of the train documents")
    print(f"vocabulary: {meta['vocab_size']:,} tokens; split: {meta['split']}; licence: {meta['licence']}")
    print(f"files: {folder}")
    options = f" --tokenizer {args.tokenizer}" if args.tokenizer != "char" else ""
    options += f" --vocab_size {args.vocab_size}" if args.vocab_size else ""
    options += f' --data_dir "{args.data_dir}"' if args.data_dir != str(DATA) else ""
    which = f'--file "{args.file}"' if args.file else f"--dataset {args.dataset}"
    print(f"next: python train.py {which}{options}")


if __name__ == "__main__":
    run_command(main, Args)
