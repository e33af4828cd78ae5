"""What support/tokenizers.py promises, one statement of fact a test."""

import json
import random
import re
import time
from collections import Counter

import numpy as np
import pytest
import regex
import tiktoken
from texts import MIXED, SHAKESPEARE

from support import tokenizers
from support.cli import BadInput
from support.tokenizers import (
    PATTERN,
    BPETokenizer,
    ByteTokenizer,
    CharTokenizer,
    cut_long_runs,
    safe_pieces,
    tokenizer_from,
    train_bpe,
)


@pytest.fixture(scope="module")
def bpe() -> BPETokenizer:
    return BPETokenizer(train_bpe([SHAKESPEARE[:200_000], MIXED], 600), PATTERN)


def test_char_has_one_token_a_character_and_names_the_first_it_does_not_know():
    tok = CharTokenizer("".join(sorted(set("hello 🙂"))))
    assert tok.decode(tok.encode("ole 🙂 hell")) == "ole 🙂 hell"
    assert (tok.n_vocab, tok.eot, tok.to_bytes(tok.encode("🙂"))) == (6, None, "🙂".encode())
    with pytest.raises(BadInput, match=r"'é' \(U\+00E9\) at position 4 is not among the 6 characters .*' ehlo🙂'"):
        tok.encode("hellé?")
    with pytest.raises(BadInput, match=r"'x' .* at position 1 "):
        tok.encode(" x")
    assert tok.encode("").shape == (0,)


def test_byte_is_256_bytes_and_the_end_of_text():
    tok = ByteTokenizer()
    assert (tok.n_vocab, tok.eot) == (257, 256)
    assert tok.encode("é").tolist() == [0xC3, 0xA9]
    assert tok.to_bytes([104, 105, 256]) == b"hi<|endoftext|>"


@pytest.mark.parametrize("seed", range(20))
def test_any_bytes_round_trip_through_byte_and_bpe(bpe, seed):
    rng = random.Random(seed)
    data = b"".join(
        rng.choice([rng.randbytes(rng.randrange(9)), rng.choice(MIXED).encode(), b" the", b"\n\n", "東".encode()[:2]])
        for _ in range(60)
    )
    for tok in (ByteTokenizer(), bpe):
        ids = tok.encode_bytes(data)
        assert tok.to_bytes(ids) == data
        assert b"".join(tok.to_bytes([i]) for i in ids) == data  # token by token, as a sampler streams
        assert tok.to_bytes(tok.encode(data.decode("utf-8", "surrogateescape"))) == data
        assert tok.encode_bytes(b"").shape == (0,)


def test_valid_utf8_has_the_same_tokens_as_text_and_as_bytes(bpe):
    for tok in (ByteTokenizer(), bpe):
        assert tok.encode_bytes(MIXED.encode()).tolist() == tok.encode(MIXED).tolist()
        assert tok.decode(tok.encode(MIXED)) == MIXED


def test_the_special_token_never_comes_out_of_text(bpe):
    assert bpe.eot == bpe.n_vocab - 1 == 599
    assert bpe.eot not in bpe.encode("a<|endoftext|>b")
    assert bpe.decode(bpe.encode("a<|endoftext|>b")) == "a<|endoftext|>b"
    assert bpe.to_bytes([bpe.eot]) == b"<|endoftext|>"


def naive_bpe(text: str, vocab_size: int) -> list[bytes]:
    """The definition: count every pair anew, merge the most frequent (of equals the smallest) everywhere, repeat."""
    words = [(list(chunk.encode()), n) for chunk, n in Counter(regex.findall(PATTERN, text)).items()]
    tokens = [bytes([b]) for b in range(256)]
    while len(tokens) < vocab_size - 1:
        count = Counter()
        for word, n in words:
            for pair in zip(word, word[1:], strict=False):
                count[pair] += n
        best = min(count, key=lambda pair: (-count[pair], pair), default=None)
        if best is None or count[best] < 2:
            break
        for word, _ in words:
            k = 0
            while k < len(word) - 1:
                if (word[k], word[k + 1]) == best:
                    word[k : k + 2] = [len(tokens)]
                k += 1
        tokens.append(tokens[best[0]] + tokens[best[1]])
    return tokens


@pytest.mark.parametrize(
    "text",
    [SHAKESPEARE[:20_000], MIXED, "aaaaaaa aaaa aaa aaaaaaaaa" * 2, "abababab baba abab aab baab " * 3, "x"],
    ids=["shakespeare", "mixed", "runs", "overlaps", "nothing to merge"],
)
def test_bpe_training_is_the_exact_algorithm(text):
    tokens = train_bpe([text], 500)
    assert tokens == naive_bpe(text, 500)
    assert len(set(tokens)) == len(tokens)


def test_tiktoken_merges_as_the_training_did(bpe):
    ranks = {token: i for i, token in enumerate(bpe.tokens)}
    for chunk in set(regex.findall(PATTERN, SHAKESPEARE[200_000:230_000] + MIXED)):
        parts = [bytes([b]) for b in chunk.encode()]
        while pairs := [(ranks[a + b], k) for k, (a, b) in enumerate(zip(parts, parts[1:], strict=False)) if a + b in ranks]:
            k = min(pairs)[1]
            parts[k : k + 2] = [parts[k] + parts[k + 1]]
        assert bpe.encode(chunk).tolist() == [ranks[part] for part in parts]


def test_every_tokenizer_survives_json(bpe):
    for tok in (CharTokenizer("\n ab🙂"), ByteTokenizer(), bpe):
        again = tokenizer_from(json.loads(json.dumps(tok.spec())))
        assert (again.n_vocab, again.eot, type(again)) == (tok.n_vocab, tok.eot, type(tok))
        assert again.encode("ab 🙂").tolist() == tok.encode("ab 🙂").tolist()


@pytest.mark.parametrize(
    "spec",
    [
        None, [], {}, {"kind": "word"}, {"kind": "char"}, {"kind": "char", "characters": ""}, {"kind": "bpe"},
        {"kind": "char", "characters": "aa"}, {"kind": "char", "characters": 3}, {"kind": "char", "characters": ["a"]},
        {"kind": "bpe", "pattern": PATTERN, "tokens": ""}, {"kind": "bpe", "pattern": PATTERN, "tokens": "!!"},
        {"kind": "bpe", "pattern": "(", "tokens": ByteTokenizer and " ".join(["AA=="] * 256)},
    ],
)  # fmt: skip
def test_a_malformed_description_is_bad_input(spec):
    with pytest.raises(BadInput, match="malformed"):
        tokenizer_from(spec)


@pytest.mark.parametrize("seed", range(12))
def test_streamed_text_has_the_tokens_of_the_whole(monkeypatch, bpe, seed):
    rng = random.Random(seed)
    text = "".join(rng.choice([*" \n\t\r'é東🙂1.", "  ", " \n", "the", "don't ", "\u2003"]) for _ in range(2000))
    cuts = sorted(rng.sample(range(len(text)), 60))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    safe = list(safe_pieces(pieces))
    assert "".join(safe) == text and len(safe) > 30
    gpt2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    for tok in (bpe, BPETokenizer(bpe.tokens, gpt2)):
        assert np.concatenate([tok.encode(piece) for piece in safe]).tolist() == tok.encode(text).tolist()


def test_long_words_do_not_hold_the_stream_up():
    assert list(safe_pieces(["a b" + "c" * 9000, "d" * 9000 + " e"])) == ["a", " b" + "c" * 9000 + "d" * 9000, " e"]


# --------------------------------------------------------------------------------------------------
# Cuts: text in pieces, and long runs

BLANKS = [chr(c) for c in range(0x110000) if re.match(r"\s", chr(c))]  # what Python calls one, 29
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def test_regex_and_tiktoken_call_the_same_characters_blank():
    keep_blanks = tiktoken.Encoding(
        "blanks", pat_str=r"\s", mergeable_ranks={bytes([b]): b for b in range(256)}, special_tokens={}
    )
    text = "".join(chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000)
    blanks = keep_blanks.decode(keep_blanks.encode_ordinary(text))  # what the pattern misses is dropped
    assert blanks == "".join(regex.findall(r"\s", text))
    assert "\x1c" not in blanks and "\x85" in blanks and "\u3000" in blanks


def random_text(rng: random.Random, n: int) -> str:
    return "".join(rng.choice([rng.choice(BLANKS), rng.choice("!a1é東'\u0301\u200b\ufeff"), "don't"]) for _ in range(n))


@pytest.fixture(scope="module")
def bpe_of_blanks() -> list[bytes]:
    rng = random.Random(0)
    return train_bpe([random_text(rng, 20_000)] + ["!\x1c!" * 9], 3000)


@pytest.mark.parametrize("pattern", [PATTERN, GPT2_PATTERN], ids=["ours", "GPT-2's"])
def test_pieces_of_any_text_with_any_blanks_have_the_tokens_of_the_whole(bpe_of_blanks, pattern):
    tok = BPETokenizer(bpe_of_blanks, pattern)
    rng = random.Random(1)
    texts = ["!\x1c!", *(random_text(rng, rng.randrange(30)) for _ in range(1000))]
    for text in texts:
        cut = rng.randrange(1, 4)
        pieces = list(safe_pieces(text[i : i + cut] for i in range(0, len(text), cut)))
        assert "".join(pieces) == text
        assert sum((tok.encode(piece).tolist() for piece in pieces), []) == tok.encode(text).tolist()


KINDS = {"blanks": " ", "tabs and line ends": " \t\n", "letters": "a", "東": "東", "marks": "\u0301", "digits": "1", "signs": "=", "line ends": "\n"}


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_of_1_500_000_is_learned_and_encoded_in_linear_time(kind):
    run = (KINDS[kind] * 1_500_000)[:1_500_000]
    started = time.perf_counter()
    tok = BPETokenizer(train_bpe(["a b", run, "b a"], 300), PATTERN)
    for text in (run, "a" + run + "b", run + "a"):
        ids = tok.encode(text)
        assert tok.decode(ids) == text
    assert time.perf_counter() - started < 60  # it was not done in 200 s, or ended in "Max stack size"


@pytest.mark.parametrize("kind", ["blanks", "letters", "東", "digits", "signs"])
@pytest.mark.parametrize("pattern", [PATTERN, GPT2_PATTERN], ids=["ours", "GPT-2's"])
def test_only_runs_of_more_than_max_run_are_cut(bpe, kind, pattern):
    tok = BPETokenizer(bpe.tokens, pattern)

    def whole(text):
        return tok.encoding.encode_ordinary(text)

    for n in (1, 2999, 3000):
        text = "x1 " + KINDS[kind] * n + "!b"
        if kind not in ("letters", "signs") or n < 3000:  # those go on before or after
            assert tok.encode(text).tolist() == whole(text)
    text = KINDS[kind] * 7000
    assert tok.encode(text).tolist() == whole(text[:3000]) + whole(text[3000:6000]) + whole(text[6000:])


def test_runs_are_cut_after_3000_characters_a_multiple_of_three():
    assert [len(piece) for piece in cut_long_runs("a" + " " * 7000 + "b" * 3000)] == [3001, 3000, 4000]


def test_long_runs_are_found_wherever_they_lie(monkeypatch):
    monkeypatch.setattr(tokenizers, "MAX_RUN", 6)
    rng = random.Random(0)
    for _ in range(3000):
        text = "".join(rng.choice(" a1!\u0301") * rng.randrange(1, 9) for _ in range(rng.randrange(6)))
        pieces = cut_long_runs(text)
        assert "".join(pieces) == text
        runs = [run for piece in pieces for run in regex.findall(tokenizers.RUN, piece)]
        assert all(len(run) <= 6 for run in runs)
        expected = [run[i : i + 6] for run in regex.findall(tokenizers.RUN, text) for i in range(0, len(run), 6)]
        assert runs == expected


def test_a_run_is_cut_alike_in_pieces_and_whole(bpe):
    text = "a" + " " * 10_000 + "b" * 10_000 + "  " + "!" * 4000 + " c"
    for size in (1000, 4999, 30_000):
        pieces = list(safe_pieces(text[i : i + size] for i in range(0, len(text), size)))
        assert sum((bpe.encode(piece).tolist() for piece in pieces), []) == bpe.encode(text).tolist()


def test_many_bytes_that_are_not_utf8_are_encoded_in_linear_time(bpe):
    data = b"\xff" * 100_000
    started = time.perf_counter()
    assert bpe.to_bytes(bpe.encode_bytes(data)) == data
    assert time.perf_counter() - started < 30


def test_text_without_blanks_is_held_back_in_linear_time():
    started = time.perf_counter()
    assert sum(map(len, safe_pieces("東" * 100_000 for _ in range(100)))) == 10_000_000
    assert time.perf_counter() - started < 30


def test_a_large_vocabulary_is_not_recited():
    tok = CharTokenizer("".join(map(chr, range(0x4E00, 0x4E00 + 101))))
    with pytest.raises(BadInput, match=r"is not among the 101 characters of this vocabulary$"):
        tok.encode("a")
