"""What support/text_files.py promises, one statement of fact a test."""

import codecs
import gzip
import os
import random
import re
import zipfile
from pathlib import Path

import pytest
from texts import content, text_of

from prepare_data import load, prepare
from support import text_files
from support.cli import BadInput
from support.corpora import CORPORA
from support.text_files import (
    checksum,
    describe,
    document_ends,
    find_texts,
    read_text,
    slice_text,
    split_documents,
)
from support.tokenizers import ByteTokenizer


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


# --------------------------------------------------------------------------------------------------
# One file


def test_line_ends_become_lf_and_the_mark_goes_except_for_bytes(monkeypatch, tmp_path):
    monkeypatch.setattr(text_files, "BLOCK", 3)
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


@pytest.mark.parametrize("block", [5, 1_000_000])
@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize(
    "mark, encoding",
    [
        (codecs.BOM_UTF16_LE, "utf-16-le"),
        (codecs.BOM_UTF16_BE, "utf-16-be"),
        (codecs.BOM_UTF32_LE, "utf-32-le"),
        (codecs.BOM_UTF32_BE, "utf-32-be"),
    ],
)
def test_a_text_that_windows_wrote_in_utf16_or_utf32_is_read(monkeypatch, tmp_path, mark, encoding, raw, block):
    monkeypatch.setattr(text_files, "BLOCK", block)
    text = "naïve café,\r\n東京 🙂 ok\r\n" * 5
    (tmp_path / "a.txt").write_bytes(mark + text.encode(encoding))
    assert "".join(read_text(tmp_path / "a.txt", raw)) == (text if raw else text.replace("\r\n", "\n"))


@pytest.mark.parametrize("other", ["__MACOSX/._a.txt", ".DS_Store", "folder/.DS_Store", "Thumbs.db"])
def test_what_file_managers_leave_in_a_zip_is_not_a_second_text(tmp_path, other):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a.txt", "the text")
        archive.writestr(other, b"\0\1")
    assert checksum(tmp_path / "a.zip")[0] == len("the text")


# --------------------------------------------------------------------------------------------------
# Texts in pieces


def in_pieces(text: str, size: int) -> list[str]:
    return [text[i : i + size] for i in range(0, len(text), size)]


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_a_slice_of_pieces_is_that_of_the_text(size):
    text = "0123456789" * 3
    for start, stop in ((0, 30), (0, 0), (7, 8), (5, 25), (29, 99)):
        assert "".join(slice_text(in_pieces(text, size), start, stop)) == text[start:stop]


def documents(texts: list[str], separator: str) -> list[str]:
    found = [""]
    for piece in split_documents(texts, separator):
        if isinstance(piece, int):
            found.append("")
        else:
            found[-1] += piece
    return [document for document in found if document]


@pytest.mark.parametrize("longest", [4, 10_000])
@pytest.mark.parametrize("size", [1, 2, 7, 1000])
@pytest.mark.parametrize("separator", ["--", "\n\n", "ab", "aab", "-\n-"])
def test_documents_are_the_same_however_the_text_is_cut(monkeypatch, separator, size, longest):
    monkeypatch.setattr(text_files, "LONGEST_SEPARATOR", longest)
    rng = random.Random(separator + str(size))
    for _ in range(20):
        text = "".join(rng.choices("ab-\n", k=200))
        *expected, last = text.split(separator)
        if separator in last + "\n":  # the last line lacks its end
            last = (last + "\n").removesuffix(separator)
        found = documents(in_pieces(text, size), re.escape(separator))
        assert found == [document for document in [*expected, last] if document]
        ends = document_ends(in_pieces(text, size), re.escape(separator))
        assert len(ends) == len(found)
        for start, end in zip([0, *ends], ends, strict=False):
            assert len(documents([text[start:end]], re.escape(separator))) == 1


def test_a_long_document_is_not_held_whole():
    pieces = split_documents(("x" * 1_000_000 for _ in range(30)), "---")
    assert max(len(piece) for piece in pieces if isinstance(piece, str)) <= 1_010_000


# --------------------------------------------------------------------------------------------------
# The files of a folder

TEXTS = {"a.txt": b"one\n", "b/c.md": b"two\n"}
RUN = {"latest.pt": b"PK\x03\x04\0", "best.pt": b"PK\x03\x04\0", "metrics.jsonl": b'{"step": 1}\n', "plugin.py": b"x = 1\n"}
DATA_SET = {"train.bin": b"\1\1", "val.bin": b"\1\1", "meta.json": b"{}\n"}


@pytest.mark.parametrize(
    "files, reason",
    [
        ({"out/tiny/" + name: data for name, data in RUN.items()}, "a run"),
        ({"out/tiny/metrics.jsonl": b"{}\n"}, "a run"),
        ({"deep/er/out/best.pt": b"no NUL here"}, "a run"),
        ({"data/x-char/" + name: data for name, data in DATA_SET.items()}, "a data set"),
        ({"data/raw/wikitext-2/train.txt": b"text\n"}, "downloads"),
        ({"raw/text8/text8.zip.part": b"text\n"}, "downloads"),
        ({"loss.png": b"no NUL here"}, "written by this project"),
        ({"out/compare.png": b"no NUL here"}, "written by this project"),
        ({"metrics.jsonl": b"{}\n"}, "written by this project"),
        ({"out/smoke.jsonl": b"{}\n"}, "written by this project"),
        ({"out/smoke.jsonl.part": b"{}\n"}, "half written"),
        (DATA_SET, "written by this project"),
        ({".git/config": b"text\n"}, "hidden"),
        ({".notes": b"text\n"}, "hidden"),
        ({"desktop.ini": b"text\n"}, "hidden"),
        ({"b/Thumbs.db": b"text\n"}, "hidden"),
        ({"picture.png": b"\x89PNG\0"}, "binary"),
        ({"utf16-without-a-mark.txt": "text".encode("utf-16-le")}, "binary"),
        ({"empty.txt": b""}, "empty"),
        ({"empty.txt.gz": gzip.compress(b"")}, "empty"),
        ({"picture.gz": gzip.compress(b"\x89PNG\0")}, "binary"),
        ({"damaged.xz": b"text\n"}, "packed, but not one text"),
    ],
)
def test_what_is_no_text_of_the_users_is_left_out_and_counted(tmp_path, capsys, files, reason):
    alone = content(prepare(file=write(tmp_path / "my", TEXTS), data_dir=tmp_path / "one"))
    assert "left out" not in capsys.readouterr().out
    write(tmp_path / "my", files)
    again = content(prepare(file=tmp_path / "my", data_dir=tmp_path / "two"))
    assert again == alone
    out = capsys.readouterr().out
    assert re.search(rf"my: 2 text files; left out: {len(files) if files is DATA_SET else 1} as {reason} \(\w*", out)


def test_the_files_of_a_run_in_the_folder_itself_are_left_out_and_the_texts_beside_them_are_not(tmp_path):
    write(tmp_path, TEXTS | {name: data for name, data in RUN.items() if name != "plugin.py"})
    texts, left_out = find_texts(tmp_path)
    assert [path.name for path in texts] == ["a.txt", "c.md"]
    assert left_out == {"binary": ["best.pt", "latest.pt"], "written by this project": ["metrics.jsonl"]}


def test_a_folder_called_raw_is_the_users_unless_a_corpus_is_in_it(tmp_path):
    write(tmp_path, {"raw/mine/a.txt": b"text\n", "other/wikitext-2/b.txt": b"text\n", "c/meta.json": b"{}\n"})
    texts, left_out = find_texts(tmp_path, corpora=CORPORA)
    assert [path.name for path in texts] == ["meta.json", "b.txt", "a.txt"] and not left_out


def test_packed_texts_and_those_of_windows_are_taken_from_a_folder(tmp_path):
    files = {
        "a.txt": b"plain\n",
        "b.txt.gz": gzip.compress(b"packed\n"),
        "c.txt": codecs.BOM_UTF16_LE + "wide\r\n".encode("utf-16-le"),
    }
    train, val, meta = load(prepare(file=write(tmp_path / "my", files), data_dir=tmp_path))
    assert sorted((text_of(train, meta) + text_of(val, meta)).split()) == ["packed", "plain", "wide"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows")
def test_links_and_pipes_are_named(tmp_path):
    write(tmp_path, {"my/a.txt": b"text\n", "other/b.txt": b"text\n"})
    (tmp_path / "my" / "link.txt").symlink_to(tmp_path / "other" / "b.txt")
    (tmp_path / "my" / "folder").symlink_to(tmp_path / "other")
    (tmp_path / "my" / "broken.txt").symlink_to("nowhere")
    os.mkfifo(tmp_path / "my" / "pipe")
    texts, left_out = find_texts(tmp_path / "my")
    assert [path.name for path in texts] == ["a.txt", "link.txt"]
    assert left_out == {"a link to a folder": ["folder"], "not a file": ["broken.txt", "pipe"]}


def test_what_was_left_out_is_said_in_one_line(tmp_path):
    left_out = {"binary": ["a", "b", "c", "d"], "empty": ["e"]}
    assert describe(Path("my"), 3, left_out) == "my: 3 text files; left out: 4 as binary (a, b, c, ...); 1 as empty (e)"


def test_a_folder_that_may_not_be_read_is_an_error_that_names_it(monkeypatch, tmp_path):
    write(tmp_path, {"my/a.txt": b"text\n", "my/locked/b.txt": b"text\n"})
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    monkeypatch.setattr(os, "listdir", refuse)
    with pytest.raises(PermissionError, match="locked"):
        find_texts(tmp_path / "my")


def test_a_folder_of_nothing_but_a_run_has_no_text(tmp_path):
    with pytest.raises(BadInput, match="my: there is no text file in this folder"):
        prepare(file=write(tmp_path / "my", {"run/" + name: data for name, data in RUN.items()}), data_dir=tmp_path)


def test_packed_files_are_opened_however_their_ending_is_written(tmp_path):
    (tmp_path / "OWN.TXT.GZ").write_bytes(gzip.compress(b"some text\n" * 50))
    train, val, meta = load(prepare(file=tmp_path / "OWN.TXT.GZ", data_dir=tmp_path))
    assert text_of(train, meta) + text_of(val, meta) == "some text\n" * 50


def test_a_nul_byte_far_into_a_file_of_a_folder_makes_it_no_text(tmp_path):
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "a.txt").write_text("some text\n" * 50, encoding="utf-8")
    (tmp_path / "own" / "b.bin").write_bytes(b"x" * 5000 + b"\0")
    _, _, meta = load(prepare(file=tmp_path / "own", data_dir=tmp_path))
    assert [source["name"] for source in meta["sources"]] == ["a.txt"]
