"""What prepare_data.py promises, one statement of fact a test. No test touches a network other than this machine's own."""

import codecs
import errno
import gzip
import hashlib
import http.server
import io
import json
import lzma
import random
import re
import socket
import subprocess
import sys
import threading
import zipfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import regex
import tiktoken

import prepare_data as pd
from prepare_data import BadInput, BPETokenizer, ByteTokenizer, CharTokenizer, load, prepare, tokenizer_from, train_bpe

ROOT = Path(pd.__file__).parent
SHAKESPEARE = (ROOT / "data" / "shakespeare.txt").read_text(encoding="utf-8")
MIXED = (
    "naïve café, 東京 2024: don't!\n\n  def f(x):\r\n\treturn x  # 🙂 ok\n" * 3 + "aaaa aaaaaaa bababab\u00a0\u2003x   \n   y"
)


@pytest.fixture(scope="module")
def bpe() -> BPETokenizer:
    return BPETokenizer(train_bpe([SHAKESPEARE[:200_000], MIXED], 600), pd.PATTERN)


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def run(capsys, *argv: str) -> tuple[int, str, str]:
    """prepare_data.py's exit code, stdout and stderr for these arguments."""
    code = 0
    try:
        pd.run_command(pd.main, pd.Args, list(argv))
    except SystemExit as e:
        code = e.code
    return code, *capsys.readouterr()


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def text_of(ids: np.ndarray, meta: dict) -> str:
    return tokenizer_from(meta["tokenizer"]).decode(ids)


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers


def test_char_has_one_token_a_character_and_names_the_first_it_does_not_know():
    tok = CharTokenizer("".join(sorted(set("hello 🙂"))))
    assert tok.decode(tok.encode("ole 🙂 hell")) == "ole 🙂 hell"
    assert (tok.n_vocab, tok.eot, tok.to_bytes(tok.encode("🙂"))) == (6, None, "🙂".encode())
    with pytest.raises(BadInput, match=r"'é' \(U\+00E9\) at position 4 is not among the 6 characters .*' ehlo🙂'"):
        tok.encode("hellé?")
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
    words = [(list(chunk.encode()), n) for chunk, n in Counter(regex.findall(pd.PATTERN, text)).items()]
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
    for chunk in set(regex.findall(pd.PATTERN, SHAKESPEARE[200_000:230_000] + MIXED)):
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
        {"kind": "bpe", "pattern": pd.PATTERN, "tokens": ""}, {"kind": "bpe", "pattern": pd.PATTERN, "tokens": "!!"},
        {"kind": "bpe", "pattern": "(", "tokens": ByteTokenizer and " ".join(["AA=="] * 256)},
    ],
)  # fmt: skip
def test_a_malformed_description_is_bad_input(spec):
    with pytest.raises(BadInput, match="malformed"):
        tokenizer_from(spec)


def test_gpt2_says_in_one_line_how_to_provide_its_file(monkeypatch, tmp_path, capsys):
    def offline(name):
        raise ConnectionError("no route")

    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    code, _, err = run(capsys, "--tokenizer", "gpt2", "--data_dir", str(tmp_path))
    assert code == 2 and err.count("\n") == 1 and "TIKTOKEN_CACHE_DIR" in err and not content(tmp_path)


def test_gpt2_once_fetched_travels_in_the_meta_data(monkeypatch, tmp_path):
    order = list(range(33, 256)) + list(range(33))  # GPT-2's bytes do not come in the order of their values, either
    ranks = {bytes([b]): i for i, b in enumerate(order)} | {b"th": 256, b"the": 257}
    fake = tiktoken.Encoding("gpt2", pat_str=r"\S+|\s+", mergeable_ranks=ranks, special_tokens={pd.EOT: 258})
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: fake)
    train, val, meta = load(prepare(tokenizer="gpt2", data_dir=tmp_path))
    monkeypatch.undo()
    assert meta["vocab_size"] == 259 and train[-1] == val[-1] == 258
    assert text_of(np.concatenate([train[:-1], val[:-1]]), meta) == SHAKESPEARE
    assert tokenizer_from(meta["tokenizer"]).encode("the").tolist() == [257]


# ---------------------------------------------------------------------------------------------------------------------
# What is written


def test_the_embedded_default_needs_no_network(no_network, tmp_path):
    folder = prepare(data_dir=tmp_path)
    train, val, meta = load(folder)
    assert folder == pd.folder_for("shakespeare", "char", None, data_dir=tmp_path) == tmp_path / "shakespeare-char"
    assert sorted(content(folder)) == ["meta.json", "train.bin", "val.bin"]
    assert isinstance(train, np.memmap) and train.dtype == np.uint16
    assert text_of(train, meta) == SHAKESPEARE[: int(0.9 * len(SHAKESPEARE))]
    assert text_of(train, meta) + text_of(val, meta) == SHAKESPEARE
    assert meta["vocab_size"] == 64 and meta["sources"][0]["sha256"] == hashlib.sha256(SHAKESPEARE.encode()).hexdigest()


@pytest.mark.parametrize("tokenizer", ["char", "byte", "bpe"])
def test_counts_say_what_is_in_the_files(tmp_path, tokenizer):
    (tmp_path / "my text.txt").write_bytes((MIXED * 20).encode())
    size = 300 if tokenizer == "bpe" else None
    folder = prepare(file=tmp_path / "my text.txt", tokenizer=tokenizer, vocab_size=size, data_dir=tmp_path)
    train, val, meta = load(folder)
    assert folder.name == f"file-my-text-{tokenizer}{size or ''}"
    eot = tokenizer_from(meta["tokenizer"]).eot
    for split, ids in (("train", train), ("val", val)):
        text = tokenizer_from(meta["tokenizer"]).to_bytes(ids if eot is None else ids[:-1])
        assert eot is None or ids[-1] == eot
        assert (meta[f"{split}_tokens"], meta[f"{split}_bytes"], meta[f"{split}_documents"]) == (len(ids), len(text), 1)


def test_a_folder_is_split_by_document_and_each_ends_with_the_end_of_text(tmp_path):
    own = tmp_path / "own"
    (own / "sub").mkdir(parents=True)
    for i in range(21):
        (own / "sub" / f"{i:02}.txt").write_text(f"document {i:02}\n", encoding="utf-8")
    (own / "empty.txt").write_bytes(b"")
    (own / "picture.png").write_bytes(b"\x89PNG\0\0")
    (own / ".hidden").write_text("secret", encoding="utf-8")
    train, val, meta = load(prepare(file=own, tokenizer="byte", data_dir=tmp_path))
    whole = [f"document {i:02}\n" for i in range(21)]
    assert text_of(val, meta) == "".join(d + pd.EOT for d in whole[9::10])
    assert text_of(train, meta) == "".join(d + pd.EOT for i, d in enumerate(whole) if i % 10 != 9)
    assert (meta["train_documents"], meta["val_documents"]) == (19, 2)
    assert len(load(prepare(file=own, tokenizer="char", data_dir=tmp_path))[1]) == 2 * len(whole[0])  # no such token


def test_of_a_few_documents_the_one_nearest_to_a_tenth_is_val(tmp_path):
    own = tmp_path / "own"
    own.mkdir()
    for name, n in (("a", 5), ("b", 100), ("c", 900)):
        (own / name).write_text(name * n, encoding="utf-8")
    _, val, meta = load(prepare(file=own, tokenizer="byte", data_dir=tmp_path))
    assert text_of(val, meta) == "b" * 100 + pd.EOT


def test_a_folder_of_one_file_is_split_by_position(tmp_path):
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "a.txt").write_text("0123456789" * 10, encoding="utf-8")
    train, val, _ = load(prepare(file=tmp_path / "own", data_dir=tmp_path))
    assert (len(train), len(val)) == (90, 10)


def small(monkeypatch, name: str, folder: Path, *texts: str) -> Path:
    """Put these texts in the place of a corpus' files, in folder and in the table."""
    folder.mkdir(exist_ok=True)
    files = []
    for file, text in zip(pd.CORPORA[name].files, texts, strict=True):
        (folder / file.name).write_bytes(text.encode())
        sha256 = hashlib.sha256(text.encode()).hexdigest()
        files.append(replace(file, size=len(text.encode()), sha256=sha256))
    monkeypatch.setitem(pd.CORPORA, name, replace(pd.CORPORA[name], files=tuple(files)))
    return folder


@pytest.mark.parametrize("block", [1, 7, 1_000_000])
def test_lines_of_endoftext_become_the_token(monkeypatch, tmp_path, block):
    monkeypatch.setattr(pd, "BLOCK", block)
    texts = ("one\n<|endoftext|>\ntwo\n\n<|endoftext|>\n", "three <|endoftext|> 3\n<|endoftext|>\n", "four\n<|endoftext|>")
    folder = small(monkeypatch, "pg-books", tmp_path / "books", *texts)
    train, val, meta = load(prepare("pg-books", source=folder, tokenizer="byte", data_dir=tmp_path))
    assert [d for d in text_of(train, meta).split(pd.EOT)] == ["one\n", "two\n\n", "three ", " 3\n", ""]
    assert (train == 256).sum() == meta["train_documents"] == 3
    assert meta["train_bytes"] == len("one\ntwo\n\nthree <|endoftext|> 3\n")
    assert text_of(val, meta) == "four\n<|endoftext|>" and val[-1] == 256


@pytest.mark.parametrize("block", [1, 1_000_000])
def test_articles_of_wikitext_are_documents(monkeypatch, tmp_path, block):
    monkeypatch.setattr(pd, "BLOCK", block)
    article = " \n = Title = \n \n Some text . \n \n = = Part = = \n \n a = b \n"
    folder = small(monkeypatch, "wikitext-2", tmp_path / "wiki", article * 3, article)
    train, val, meta = load(prepare("wikitext-2", source=folder, tokenizer="byte", data_dir=tmp_path))
    assert text_of(train, meta) == (article + pd.EOT) * 3 and text_of(val, meta) == article + pd.EOT


def test_enwik8_leaves_its_test_set_out(monkeypatch, tmp_path):
    monkeypatch.setattr(pd, "BLOCK", 10)
    monkeypatch.setattr(pd, "HUTTER_ENDS", (90, 100))
    folder = small(monkeypatch, "enwik8", tmp_path / "hutter", "a" * 89 + "é" + "b" * 9 + "T" * 10)
    train, val, meta = load(prepare("enwik8", source=folder / "enwik8", tokenizer="byte", data_dir=tmp_path))
    assert text_of(train, meta) == "a" * 89 + pd.EOT  # é begins in the train bytes and ends in the val bytes
    assert text_of(val, meta) == "é" + "b" * 9 + pd.EOT


@pytest.mark.parametrize("seed", range(12))
def test_streamed_text_has_the_tokens_of_the_whole(monkeypatch, bpe, seed):
    rng = random.Random(seed)
    text = "".join(rng.choice([*" \n\t\r'é東🙂1.", "  ", " \n", "the", "don't ", "\u2003"]) for _ in range(2000))
    cuts = sorted(rng.sample(range(len(text)), 60))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    safe = list(pd.safe_pieces(pieces))
    assert "".join(safe) == text and len(safe) > 30
    gpt2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    for tok in (bpe, BPETokenizer(bpe.tokens, gpt2)):
        assert np.concatenate([tok.encode(piece) for piece in safe]).tolist() == tok.encode(text).tolist()


def test_long_words_do_not_hold_the_stream_up():
    assert list(pd.safe_pieces(["a b" + "c" * 9000, "d" * 9000 + " e"])) == ["a", " b" + "c" * 9000 + "d" * 9000, " e"]


def test_more_than_65536_tokens_take_uint32(tmp_path):
    text = "".join(map(chr, range(0x10000, 0x10000 + 70_000)))
    (tmp_path / "many.txt").write_bytes(text.encode())
    train, val, meta = load(prepare(file=tmp_path / "many.txt", data_dir=tmp_path))
    assert train.dtype == np.uint32 and meta["dtype"] == "uint32" and meta["vocab_size"] == 70_000
    assert text_of(train, meta) + text_of(val, meta) == text


def test_line_ends_become_lf_and_the_mark_goes_except_for_bytes(monkeypatch, tmp_path):
    monkeypatch.setattr(pd, "BLOCK", 3)
    data = codecs.BOM_UTF8 + "a\r\nb\rc\né".encode() * 4
    (tmp_path / "dos.txt").write_bytes(data)
    train, val, meta = load(prepare(file=tmp_path / "dos.txt", data_dir=tmp_path))
    assert text_of(train, meta) + text_of(val, meta) == "a\nb\nc\né" * 4
    train, val, meta = load(prepare(file=tmp_path / "dos.txt", tokenizer="byte", data_dir=tmp_path))
    assert ByteTokenizer().to_bytes(train[:-1]) + ByteTokenizer().to_bytes(val[:-1]) == data


def test_bytes_take_text_that_is_not_utf8(tmp_path):
    data = bytes(range(1, 256)) * 4
    (tmp_path / "latin.txt").write_bytes(data)
    train, val, meta = load(prepare(file=tmp_path / "latin.txt", tokenizer="byte", data_dir=tmp_path))
    assert ByteTokenizer().to_bytes(train[:-1]) + ByteTokenizer().to_bytes(val[:-1]) == data
    assert meta["train_bytes"] + meta["val_bytes"] == len(data)


@pytest.mark.parametrize("ending", [".xz", ".gz", ".zip"])
def test_packed_files_are_opened(monkeypatch, tmp_path, ending):
    folder = small(monkeypatch, "tinyshakespeare", tmp_path / "tiny", SHAKESPEARE[:5000])
    plain = folder / "tinyshakespeare.txt"
    packed = plain.with_name(plain.name + ending)
    if ending == ".zip":
        with zipfile.ZipFile(packed, "w") as archive:
            archive.write(plain, "input.txt")
    else:
        packed.write_bytes((lzma if ending == ".xz" else gzip).compress(plain.read_bytes()))
    one = content(prepare("tinyshakespeare", source=plain, data_dir=tmp_path / "one"))
    plain.unlink()
    assert content(prepare("tinyshakespeare", source=packed, data_dir=tmp_path / "two")) == one
    assert content(prepare("tinyshakespeare", source=folder, data_dir=tmp_path / "three")) == one


def test_the_python_corpus_is_on_every_machine(no_network, tmp_path, monkeypatch):
    library = tmp_path / "lib"
    for name in ("a.py", "b/c.py", "test/d.py", "site-packages/e.py", "b/tests/f.py", "g.txt"):
        (library / name).parent.mkdir(parents=True, exist_ok=True)
        (library / name).write_text(f"# {name} {'x' * 50}\n", encoding="utf-8")
    monkeypatch.setattr(pd.sysconfig, "get_path", lambda name: str(library))
    train, val, meta = load(prepare("python", tokenizer="byte", data_dir=tmp_path))
    assert sorted(re.findall(r"# (\S+)", text_of(train, meta) + text_of(val, meta))) == ["a.py", "b/c.py"]
    assert meta["sources"][0]["name"].startswith("the standard library of Python 3")


def test_a_data_set_is_made_once_until_its_text_changes(tmp_path, capsys):
    path = tmp_path / "notes.txt"
    path.write_text("abc " * 100, encoding="utf-8")
    folder = prepare(file=path, data_dir=tmp_path)
    first = (folder / "train.bin").stat().st_ino, content(folder)
    prepare(file=path, data_dir=tmp_path)
    assert ((folder / "train.bin").stat().st_ino, content(folder)) == first and capsys.readouterr().out.count("\n") == 1
    prepare(file=path, data_dir=tmp_path, overwrite=True)
    assert content(folder) == first[1] and capsys.readouterr().out.count("\n") == 1  # made again, byte for byte
    path.write_text("abd " * 100, encoding="utf-8")
    _, val, meta = load(prepare(file=path, data_dir=tmp_path))
    assert text_of(val, meta)[-4:] == "abd "


def test_a_prepared_corpus_needs_its_source_no_more(no_network, monkeypatch, tmp_path):
    source = small(monkeypatch, "pg-books", tmp_path / "books", *["a b\n<|endoftext|>\n" * 3] * 3)
    folder = prepare("pg-books", source=source, tokenizer="byte", data_dir=tmp_path)
    assert prepare("pg-books", tokenizer="byte", data_dir=tmp_path) == folder


def test_a_damaged_data_set_is_refused_and_with_overwrite_made_again_from_its_source(no_network, monkeypatch, tmp_path):
    source = small(monkeypatch, "pg-books", tmp_path / "books", *["a b\n<|endoftext|>\n" * 3] * 3)
    folder = prepare("pg-books", source=source, tokenizer="byte", data_dir=tmp_path)
    whole = content(folder)
    (folder / "train.bin").write_bytes(whole["train.bin"][:6])
    damaged = content(folder)
    with pytest.raises(BadInput, match=r"train.bin: is damaged: .*, it has 6 bytes; make it again: .* --overwrite"):
        prepare("pg-books", source=source, tokenizer="byte", data_dir=tmp_path)
    with pytest.raises(BadInput, match="--source with the folder that holds train-0.txt"):
        prepare("pg-books", tokenizer="byte", data_dir=tmp_path, overwrite=True)
    assert content(folder) == damaged  # what cannot be made again is left as it is
    assert content(prepare("pg-books", source=source, tokenizer="byte", data_dir=tmp_path, overwrite=True)) == whole


def test_the_fraction_of_documents_cut_is_counted_on_contexts_end_to_end(monkeypatch):
    ids = np.array([1, 1, 1, 9, 1, 9, 1, 1, 9, 1, 1, 1, 9])  # documents at 0-3, 4-5, 6-8, 9-12
    assert [pd.fraction_cut(ids, 9, context) for context in (4, 1, 13, 2)] == [0.5, 1.0, 0.0, 0.75]
    monkeypatch.setattr(pd, "BLOCK", 3)
    assert pd.fraction_cut(ids, 9, 4) == 0.5


def test_the_command_says_what_there_is_and_what_to_run_next(tmp_path, capsys):
    own = tmp_path / "own"
    own.mkdir()
    for i in range(3):
        (own / f"{i}.txt").write_text("words and more words\n" * 9, encoding="utf-8")
    flags = ["--file", str(own), "--tokenizer", "byte", "--context", "100", "--data-dir", str(tmp_path)]
    code, out, _ = run(capsys, *flags)
    assert code == 0
    for said in ("a second", "train: 380 tokens, 378 bytes", "2 documents", "cut 100.0%", str(tmp_path / "file-own-byte")):
        assert said in out
    assert out.splitlines()[-1].startswith("next: python train.py --file") and "--tokenizer byte" in out.splitlines()[-1]


# ---------------------------------------------------------------------------------------------------------------------
# All or nothing


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("at", ["train.bin", "val.bin", "meta.json"])
def test_a_failure_while_writing_leaves_the_earlier_state(monkeypatch, tmp_path, failure, at):
    path = tmp_path / "notes.txt"
    path.write_text("abc " * 100, encoding="utf-8")
    data = tmp_path / "data"
    write_file = pd.write_file

    def fail(target, blocks):
        write_file(target, blocks)
        if target.name == at:
            raise failure

    monkeypatch.setattr(pd, "write_file", fail)
    with pytest.raises(type(failure)):
        prepare(file=path, data_dir=data)
    assert list(data.iterdir()) == []
    monkeypatch.setattr(pd, "write_file", write_file)
    prepare(file=path, data_dir=data)
    before = content(data)
    path.write_text("other " * 100, encoding="utf-8")
    monkeypatch.setattr(pd, "write_file", fail)
    with pytest.raises(type(failure)):
        prepare(file=path, data_dir=data)
    assert content(data) == before


def test_a_failure_between_the_two_renames_leaves_the_earlier_state(monkeypatch, tmp_path):
    folder = prepare(data_dir=tmp_path)
    before = content(tmp_path)
    rename = Path.rename

    def fail(self, target):
        if self.name.endswith(".tmp"):
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(KeyboardInterrupt):
        prepare(data_dir=tmp_path, overwrite=True)
    assert content(tmp_path) == before
    monkeypatch.undo()
    same_file = (folder / "train.bin").stat().st_ino
    folder.rename(folder.with_name(".shakespeare-char.old"))  # what a kill at that moment would leave
    prepare(data_dir=tmp_path)
    assert content(tmp_path) == before and (folder / "train.bin").stat().st_ino == same_file


# ---------------------------------------------------------------------------------------------------------------------
# Downloads, from a server on this machine

WHOLE = SHAKESPEARE[:300_000].encode()


class Server(http.server.BaseHTTPRequestHandler):
    ranges, cuts, body, status = True, 0, WHOLE, 200  # honour Range; how many replies to cut; what to send
    log: list[tuple[str | None, str]] = []

    def do_GET(self):
        cls, asked = type(self), self.headers.get("Range")
        cls.log.append((asked, self.headers.get("User-Agent")))
        if cls.status != 200:
            return self.send_error(cls.status)
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and cls.ranges else 0
        if start >= len(cls.body):
            return self.send_error(416)
        rest = cls.body[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(rest)))
        self.end_headers()
        if cls.cuts:
            cls.cuts -= 1
            rest = rest[:100_000]
        self.wfile.write(rest)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch, tmp_path):
    """The handler's class, to be told how to behave, with tinyshakespeare in the table as the file it serves."""

    class Handler(Server):
        log = []

    web = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=web.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setenv("no_proxy", "*")
    url = f"http://127.0.0.1:{web.server_port}/some/input.txt"
    file = pd.File("both", "tinyshakespeare.txt", len(WHOLE), hashlib.sha256(WHOLE).hexdigest(), url)
    corpus = replace(pd.CORPORA["tinyshakespeare"], files=(file,))
    monkeypatch.setitem(pd.CORPORA, "tinyshakespeare", corpus)
    Handler.path_kept = tmp_path / "raw" / "tinyshakespeare" / "input.txt"
    Handler.part = tmp_path / "raw" / "tinyshakespeare" / "input.txt.part"
    yield Handler
    web.shutdown()
    web.server_close()


def fetch(capsys, tmp_path) -> tuple[int, str]:
    code, _, err = run(capsys, "--dataset", "tinyshakespeare", "--data_dir", str(tmp_path))
    assert code == 0 or (code == 2 and err.count("\n") == 1 and err.startswith("error: --dataset tinyshakespeare: "))
    assert code == 0 or not (tmp_path / "tinyshakespeare-char").exists()
    return code, err


def test_a_corpus_is_downloaded_once(server, capsys, tmp_path):
    assert fetch(capsys, tmp_path)[0] == 0
    assert server.path_kept.read_bytes() == WHOLE and not server.part.exists()
    assert len(server.log) == 1 and server.log[0][0] is None and "prepare_data.py" in server.log[0][1]
    prepare("tinyshakespeare", tokenizer="byte", data_dir=tmp_path)
    assert len(server.log) == 1


def test_a_cut_connection_is_continued(server, capsys, tmp_path):
    server.cuts = 2
    assert fetch(capsys, tmp_path)[0] == 0
    assert [asked for asked, _ in server.log] == [None, "bytes=100000-", "bytes=200000-"]
    assert server.path_kept.read_bytes() == WHOLE


def test_a_server_that_ignores_range_sends_the_whole_again(server, capsys, tmp_path):
    server.ranges, server.cuts = False, 1
    assert fetch(capsys, tmp_path)[0] == 0
    assert len(server.log) == 2 and server.path_kept.read_bytes() == WHOLE


def test_a_server_that_always_cuts_at_one_place_is_given_up(server, capsys, tmp_path):
    server.ranges, server.cuts = False, 1000
    code, err = fetch(capsys, tmp_path)
    assert code == 2 and "cut after 100,000 of 300,000 bytes" in err and len(server.log) == 2


def test_a_later_run_goes_on_from_the_part(server, capsys, tmp_path):
    server.part.parent.mkdir(parents=True)
    server.part.write_bytes(WHOLE[:250_000])
    assert fetch(capsys, tmp_path)[0] == 0 and server.log[0][0] == "bytes=250000-" and len(server.log) == 1


@pytest.mark.parametrize("part", [WHOLE, b"something else", WHOLE + b"and more"], ids=["whole", "other", "longer"])
def test_a_part_that_is_whole_is_used_and_one_of_something_else_is_not(server, capsys, tmp_path, part):
    server.part.parent.mkdir(parents=True)
    server.part.write_bytes(part)
    assert fetch(capsys, tmp_path)[0] == 0 and server.path_kept.read_bytes() == WHOLE


def test_a_refusal_names_the_corpus_the_path_and_the_ways_out(server, capsys, tmp_path):
    server.status = 403
    code, err = fetch(capsys, tmp_path)
    assert code == 2 and "HTTP 403" in err
    for said in ("tinyshakespeare.txt by hand", str(server.part.parent), "--source", "--dataset shakespeare"):
        assert said in err


def test_without_a_network_the_error_says_the_same(monkeypatch, capsys, tmp_path):
    def offline(*args, **kwargs):
        raise OSError(-2, "Name or service not known")

    monkeypatch.setattr(socket, "create_connection", offline)
    monkeypatch.setattr(socket, "getaddrinfo", offline)
    monkeypatch.setenv("no_proxy", "*")
    code, err = fetch(capsys, tmp_path)
    assert code == 2 and "Name or service not known" in err and "--source" in err and "--dataset shakespeare" in err
    put = tmp_path / "raw" / "tinyshakespeare" / "tinyshakespeare.txt"  # the file the message asks for
    assert str(put) in err
    put.write_bytes(WHOLE)
    sha256 = hashlib.sha256(WHOLE).hexdigest()
    files = (replace(pd.CORPORA["tinyshakespeare"].files[0], size=len(WHOLE), sha256=sha256),)
    monkeypatch.setitem(pd.CORPORA, "tinyshakespeare", replace(pd.CORPORA["tinyshakespeare"], files=files))
    assert fetch(capsys, tmp_path)[0] == 0


@pytest.mark.parametrize("body", [WHOLE[:-1], b"X" + WHOLE[1:]], ids=["short", "changed"])
def test_a_file_with_a_wrong_sum_is_removed(server, capsys, tmp_path, body):
    server.body = body
    code, err = fetch(capsys, tmp_path)
    assert code == 2 and "sha256" in err and "was removed" in err
    assert not server.part.exists() and not server.path_kept.exists()


# ---------------------------------------------------------------------------------------------------------------------
# What is in the way (for bad input see test_bad_input.py)


def test_what_is_in_the_way_is_left_alone(capsys, tmp_path):
    (tmp_path / "shakespeare-char").mkdir()
    (tmp_path / "shakespeare-char" / "thesis.txt").write_text("years of work", encoding="utf-8")
    (tmp_path / "shakespeare-byte").write_text("a file", encoding="utf-8")
    before = content(tmp_path)
    for flags in ([], ["--overwrite"], ["--tokenizer", "byte", "--overwrite"]):
        code, _, err = run(capsys, *flags, "--data_dir", str(tmp_path))
        assert code == 2 and err.count("\n") == 1 and "move it" in err and content(tmp_path) == before


# ---------------------------------------------------------------------------------------------------------------------
# run_command, which all four commands share


def ends_with(capsys, error: BaseException) -> tuple[int, str]:
    def main(args):
        raise error

    with pytest.raises(SystemExit) as stop:
        pd.run_command(main, pd.Args, [])
    return stop.value.code, capsys.readouterr().err


def test_run_command_ends_in_one_line(capsys):
    assert ends_with(capsys, BadInput("--x 1: two\nlines")) == (2, "error: --x 1: two lines\n")
    assert ends_with(capsys, KeyboardInterrupt()) == (130, "interrupted\n")
    assert ends_with(capsys, OSError(errno.ENOSPC, "No space left on device")) == (2, "error: No space left on device\n")
    code, err = ends_with(capsys, PermissionError(errno.EACCES, "Permission denied", "/x/y"))
    assert (code, err) == (2, "error: /x/y: Permission denied\n")


def test_run_command_hides_no_mistake_of_the_program():
    def main(args):
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        pd.run_command(main, pd.Args, [])


def test_run_command_takes_hyphens_underscores_and_defaults(capsys):
    seen = []
    for flag in ("--vocab_size", "--vocab-size"):
        pd.run_command(seen.append, pd.Args, [flag, "300"], defaults=lambda argv: pd.Args(context=len(argv)))
    assert seen == [pd.Args(vocab_size=300, context=2)] * 2
    for argv in (["--nonsense", "1"], ["--tokenizer", "words"], ["--context", "many"]):
        code, _, err = run(capsys, *argv)
        assert code == 2 and "Traceback" not in err
    code, out, _ = run(capsys, "--help")
    assert code == 0 and "--vocab_size" in out and "trained here" in out


def test_the_command_line_works_from_anywhere_and_when_nobody_reads(tmp_path):
    script = [sys.executable, str(ROOT / "prepare_data.py")]
    done = subprocess.run([*script, "--file", "nowhere"], cwd=tmp_path, capture_output=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr.count(b"\n")) == (2, b"", 1)
    assert b"Traceback" not in done.stderr and list(tmp_path.iterdir()) == []
    code = "import prepare_data as p; p.run_command(lambda args: print('unread'), p.Args, [])"
    pipe = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    pipe.stdout.close()
    assert pipe.stderr.read() == b"" and pipe.wait(timeout=60) == 141


def test_output_is_utf8_whatever_the_terminal_says(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="cp1252"))
    pd.run_command(lambda args: print("東京 \udcff"), pd.Args, [])
    assert raw.getvalue().decode("utf-8").strip() == "東京 ?"
