"""Tokenizers: plain classes with encode, decode, to_bytes, spec, n_vocab and eot.

Ids run from 0 to n_vocab - 1; eot is the end-of-text id, or None. to_bytes lets a sampler show text
as it grows: a token may end inside a character. spec() is what JSON keeps of a tokenizer.
"""

import heapq
import re
from base64 import b64decode, b64encode
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import regex  # comes with tiktoken; unlike re it knows \p{L}
import tiktoken

from support.cli import BadInput, progress_bar

EOT = "<|endoftext|>"


def id_dtype(n_vocab: int) -> np.dtype:
    """The smallest type that holds ids below n_vocab: uint16 or uint32."""
    return np.dtype(np.uint16 if n_vocab <= 1 << 16 else np.uint32)


class CharTokenizer:
    """One token a character, for the characters of one text. No end-of-text token."""

    eot = None

    def __init__(self, characters: str):
        """characters: each once; its position is its id."""
        self.characters = characters
        self.n_vocab = len(characters)
        self.code_points = code_points(characters)  # (n_vocab,): id -> code point
        self.ids = np.full(0x110000, -1, np.int32)  # code point -> id, -1 where there is none
        self.ids[self.code_points] = np.arange(self.n_vocab)

    def encode(self, text: str) -> np.ndarray:
        """Text of n characters -> (n,) ids. BadInput names the first character that has none."""
        ids = self.ids[code_points(text)]
        if ids.size and ids.min() < 0:
            position = int(np.argmax(ids < 0))
            character = text[position]
            known = f" ({self.characters!r})" if self.n_vocab <= 100 else ""
            raise BadInput(
                f"character {character!r} (U+{ord(character):04X}) at position {position} is not "
                f"among the {self.n_vocab} characters of this vocabulary{known}"
            )
        return ids.astype(id_dtype(self.n_vocab))

    def decode(self, ids) -> str:
        """(n,) ids -> text of n characters."""
        codes = self.code_points[np.asarray(ids, np.int64)]
        return codes.tobytes().decode("utf-32-le", "surrogatepass")

    def to_bytes(self, ids) -> bytes:
        return self.decode(ids).encode("utf-8", "surrogatepass")

    def spec(self) -> dict:
        return {"kind": "char", "characters": self.characters}


def code_points(text: str) -> np.ndarray:
    """Text of n characters -> (n,) uint32 code points."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


class ByteTokenizer:
    """One token a byte of UTF-8.

    In a str, bytes that are not UTF-8 are what Python's "surrogateescape" makes of them.
    """

    n_vocab = 257
    eot = 256

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
        ids = np.asarray(ids, np.int64).tolist()
        return b"".join(bytes([i]) if i != self.eot else EOT.encode() for i in ids)

    def spec(self) -> dict:
        return {"kind": "byte"}


class BPETokenizer(ByteTokenizer):
    """Bytes, merged by tiktoken as train_bpe learned it.

    Id i is tokens[i] and its rank; the last id is the end of text. The characters "<|endoftext|>"
    in a text are ordinary text, never that token.
    """

    def __init__(self, tokens: list[bytes], pattern: str, kind: str = "bpe"):
        """tokens: each once, all 256 bytes among them. pattern: see PATTERN. kind: bpe or gpt2."""
        ranks = {token: i for i, token in enumerate(tokens)}
        if len(ranks) != len(tokens):
            raise BadInput("a token occurs twice")
        self.tokens = tokens
        self.pattern = pattern
        self.kind = kind
        self.n_vocab = len(tokens) + 1
        self.eot = len(tokens)
        self.byte_ids = np.array([ranks[bytes([b])] for b in range(256)], id_dtype(self.n_vocab))
        self.encoding = tiktoken.Encoding(
            kind, pat_str=pattern, mergeable_ranks=ranks, special_tokens={EOT: self.eot}
        )

    def encode(self, text: str) -> np.ndarray:
        """Text -> (n,) ids. A byte that is not UTF-8 (see ByteTokenizer) is a token of its own."""
        try:
            ids = self._encode_utf8(text)
        except UnicodeEncodeError:
            parts = re.split("([\udc80-\udcff])", text)  # every second one is such a byte
            ids = np.concatenate(
                [
                    self.byte_ids[[ord(part) & 0xFF]] if i % 2 else self._encode_utf8(part)
                    for i, part in enumerate(parts)
                ]
            )
        return ids.astype(id_dtype(self.n_vocab))

    def _encode_utf8(self, text: str) -> np.ndarray:
        """The same, for a text without such bytes; else it raises UnicodeEncodeError."""
        encode = partial(self.encoding.encode_to_numpy, disallowed_special=())
        return np.concatenate([encode(piece) for piece in cut_long_runs(text)])

    def to_bytes(self, ids) -> bytes:
        return self.encoding.decode_bytes(np.asarray(ids, np.int64).tolist())

    def spec(self) -> dict:
        tokens = " ".join(b64encode(token).decode("ascii") for token in self.tokens)
        return {"kind": self.kind, "pattern": self.pattern, "tokens": tokens}


Tokenizer = CharTokenizer | ByteTokenizer | BPETokenizer


def tokenizer_from(spec: dict, path: str | Path = "tokenizer") -> Tokenizer:
    """The tokenizer that spec() described in the file path. BadInput if malformed."""
    try:
        kind = spec["kind"]
        if kind == "char":
            characters = spec["characters"]
            if not characters or len(set(characters)) != len(characters):
                raise ValueError("it has no characters, or one twice")
            return CharTokenizer(characters)
        if kind == "byte":
            return ByteTokenizer()
        if kind in ("bpe", "gpt2"):
            tokens = [b64decode(token, validate=True) for token in spec["tokens"].split(" ")]
            return BPETokenizer(tokens, spec["pattern"], kind)
        raise ValueError(f"its kind is {kind!r}, not char, byte, bpe or gpt2")
    except (KeyError, TypeError, AttributeError, ValueError) as e:
        reason = f"it has no {e}" if isinstance(e, KeyError) else e
        raise BadInput(
            f"{path}: the tokenizer's description is malformed: {reason}; prepare the data again"
        ) from None


# How text is cut into chunks, across which BPE never merges: contractions; a word, a number of up
# to three digits or a run of signs, each with the one space before it; line ends with the blanks
# before them; other blanks, less the last, which goes with the next word. No chunk runs from a
# non-blank into a blank: safe_pieces relies on that.
PATTERN = (
    r"'(?:[sdmt]|ll|ve|re)| ?[\p{L}\p{M}]+| ?\p{N}{1,3}| ?[^\s\p{L}\p{M}\p{N}]+"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


MAX_RUN = 3_000  # characters; a multiple of three, as numbers are cut by threes
RUN = regex.compile(r"\s+|[\p{L}\p{M}]+|\p{N}+|[^\s\p{L}\p{M}\p{N}]+")


def cut_long_runs(text: str) -> list[str]:
    """The text, cut within runs of blanks, letters, digits or signs after every MAX_RUN characters.

    BPE costs the square of a chunk's length, and tiktoken gives up at a million blanks. Training
    and encoding both cut here; texts without such runs, as nearly all are, are not touched.
    """
    step = MAX_RUN // 2  # a longer run has half of itself after one of these places
    if all(RUN.match(text, at).end() - at < step for at in range(0, len(text), step)):
        return [text]
    cuts = [0]
    for run in RUN.finditer(text):
        cuts += range(run.start() + MAX_RUN, run.end(), MAX_RUN)
    return [text[start:end] for start, end in pairwise([*cuts, len(text)])]


def safe_pieces(texts: Iterable[str]) -> Iterator[str]:
    """The same text, cut only between a non-blank and a blank.

    There no chunk of BPE (ours or GPT-2's) reaches across: the pieces have the tokens of the whole.
    What a blank is must be tiktoken's answer: regex gives it, re adds four control characters.
    """
    held = []  # what came since the last cut
    last = ""  # its last character
    for text in texts:
        # (?r): the first match from the end. The cut lies after it.
        cut = regex.search(r"(?r)\S(?=\s)", last + text)
        if cut:
            end = cut.end() - len(last)
            yield "".join([*held, text[:end]])
            held = [text[end:]]
        else:
            held.append(text)
        last = text[-1:] or last
    yield "".join(held)


def train_bpe(texts: Iterable[str], vocab_size: int) -> list[bytes]:
    """Learn byte pair encoding: merge the most frequent pair of neighbours, and again.

    Of equally frequent pairs the one of smaller ids. Returns vocab_size - 1 tokens, the 256 bytes
    and then the merges; fewer if no pair is left that occurs twice.

    Exact, yet fast: equal chunks are counted once, a merge visits only words that hold its pair,
    and the queue is put right lazily (the count of a pair only falls once the pair is queued, so an
    entry is an upper bound till checked).
    """
    chunks = Counter()
    for text in progress_bar(texts, desc="counting chunks", unit=" pieces"):
        for piece in cut_long_runs(text):
            chunks.update(regex.findall(PATTERN, piece))
    words = [list(chunk.encode("utf-8")) for chunk in chunks]
    frequency = list(chunks.values())
    count = Counter()  # pair -> how often it occurs
    words_with = defaultdict(set)  # pair -> the words that hold it, or once did
    for i, word in enumerate(words):
        for pair in pairwise(word):
            count[pair] += frequency[i]
            words_with[pair].add(i)
    queue = [(-n, pair) for pair, n in count.items()]
    heapq.heapify(queue)

    tokens = [bytes([b]) for b in range(256)]
    with progress_bar(total=vocab_size - 257, desc="learning merges", unit=" merges") as bar:
        while len(tokens) < vocab_size - 1 and queue:
            expected, pair = heapq.heappop(queue)
            if -expected != count[pair]:  # out of date: back, with what it is worth now
                heapq.heappush(queue, (-count[pair], pair))
                continue
            if count[pair] < 2:
                break
            new = len(tokens)
            tokens.append(tokens[pair[0]] + tokens[pair[1]])
            new_pairs = set()
            for i in words_with.pop(pair):
                for lost, gained in merge(words[i], pair, new):
                    count[lost] -= frequency[i]
                    count[gained] += frequency[i]
                    words_with[gained].add(i)
                    new_pairs.add(gained)
            del count[pair]
            for new_pair in new_pairs:
                heapq.heappush(queue, (-count[new_pair], new_pair))
            bar.update()
    return tokens


def merge(word: list[int], pair: tuple[int, int], new: int) -> Iterator[tuple]:
    """Replace pair in word by new; yields (neighbours lost, neighbours gained) as pairs of ids."""
    left, right = pair
    k = 0
    while k < len(word) - 1:
        if word[k] == left and word[k + 1] == right:
            word[k : k + 2] = [new]
            if k > 0:
                yield (word[k - 1], left), (word[k - 1], new)
            if k + 1 < len(word):
                yield (right, word[k + 1]), (new, word[k + 1])
        k += 1


def gpt2_tokenizer() -> BPETokenizer:
    """GPT-2's own 50,257 tokens, from tiktoken's cache or downloaded by it."""
    try:
        gpt2 = tiktoken.get_encoding("gpt2")
    except Exception as e:  # whatever it was, the vocabulary cannot be had
        raise BadInput(
            f"--tokenizer gpt2: tiktoken could not fetch its vocabulary ({type(e).__name__}); "
            "run it once where there is a network with TIKTOKEN_CACHE_DIR=FOLDER, "
            "copy FOLDER here and set TIKTOKEN_CACHE_DIR to it, or use bpe"
        ) from None
    ranks = gpt2._mergeable_ranks
    return BPETokenizer(sorted(ranks, key=ranks.get), gpt2._pat_str, "gpt2")


def start_of_text(tokenizer: Tokenizer) -> list[int]:
    """What a new text goes on from: the end-of-text id, else a new line's, else the first id."""
    if tokenizer.eot is not None:
        return [tokenizer.eot]
    try:
        return tokenizer.encode("\n").tolist()
    except BadInput:  # a text of one line
        return [0]
