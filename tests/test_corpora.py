"""What support/corpora.py promises. No test touches a network other than this machine's own."""

import gzip
import hashlib
import http.server
import io
import lzma
import re
import socket
import threading
import zipfile
from dataclasses import replace

import pytest
from texts import SHAKESPEARE, content, run, small, text_of

import prepare_data as pd
from prepare_data import load, prepare
from support import corpora, text_files
from support.corpora import CORPORA, File
from support.tokenizers import EOT


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
    monkeypatch.setattr(corpora.sysconfig, "get_path", lambda name: str(library))
    train, val, meta = load(prepare("python", tokenizer="byte", data_dir=tmp_path))
    assert sorted(re.findall(r"# (\S+)", text_of(train, meta) + text_of(val, meta))) == ["a.py", "b/c.py"]
    assert meta["sources"][0]["name"].startswith("the standard library of Python 3")


def test_enwik8_leaves_its_test_set_out(monkeypatch, tmp_path):
    monkeypatch.setattr(text_files, "BLOCK", 10)
    monkeypatch.setattr(pd, "HUTTER_ENDS", (90, 100))
    folder = small(monkeypatch, "enwik8", tmp_path / "hutter", "a" * 89 + "é" + "b" * 9 + "T" * 10)
    train, val, meta = load(prepare("enwik8", source=folder / "enwik8", tokenizer="byte", data_dir=tmp_path))
    assert text_of(train, meta) == "a" * 89 + EOT  # é begins in the train bytes and ends in the val bytes
    assert text_of(val, meta) == "é" + "b" * 9 + EOT


@pytest.mark.parametrize("block", [1, 7, 1_000_000])
def test_lines_of_endoftext_become_the_token(monkeypatch, tmp_path, block):
    monkeypatch.setattr(text_files, "BLOCK", block)
    texts = ("one\n<|endoftext|>\ntwo\n\n<|endoftext|>\n", "three <|endoftext|> 3\n<|endoftext|>\n", "four\n<|endoftext|>")
    folder = small(monkeypatch, "pg-books", tmp_path / "books", *texts)
    train, val, meta = load(prepare("pg-books", source=folder, tokenizer="byte", data_dir=tmp_path))
    assert [d for d in text_of(train, meta).split(EOT)] == ["one\n", "two\n\n", "three ", " 3\n", ""]
    assert (train == 256).sum() == meta["train_documents"] == 3
    assert meta["train_bytes"] == len("one\ntwo\n\nthree <|endoftext|> 3\n")
    assert text_of(val, meta) == "four\n<|endoftext|>" and val[-1] == 256


@pytest.mark.parametrize("block", [1, 1_000_000])
def test_articles_of_wikitext_are_documents(monkeypatch, tmp_path, block):
    monkeypatch.setattr(text_files, "BLOCK", block)
    article = " \n = Title = \n \n Some text . \n \n = = Part = = \n \n a = b \n"
    folder = small(monkeypatch, "wikitext-2", tmp_path / "wiki", article * 3, article)
    train, val, meta = load(prepare("wikitext-2", source=folder, tokenizer="byte", data_dir=tmp_path))
    assert text_of(train, meta) == (article + EOT) * 3 and text_of(val, meta) == article + EOT


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
    file = File("both", "tinyshakespeare.txt", len(WHOLE), hashlib.sha256(WHOLE).hexdigest(), url)
    corpus = replace(CORPORA["tinyshakespeare"], files=(file,))
    monkeypatch.setitem(CORPORA, "tinyshakespeare", corpus)
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
    files = (replace(CORPORA["tinyshakespeare"].files[0], size=len(WHOLE), sha256=sha256),)
    monkeypatch.setitem(CORPORA, "tinyshakespeare", replace(CORPORA["tinyshakespeare"], files=files))
    assert fetch(capsys, tmp_path)[0] == 0


@pytest.mark.parametrize("body", [WHOLE[:-1], b"X" + WHOLE[1:]], ids=["short", "changed"])
def test_a_file_with_a_wrong_sum_is_removed(server, capsys, tmp_path, body):
    server.body = body
    code, err = fetch(capsys, tmp_path)
    assert code == 2 and "sha256" in err and "was removed" in err
    assert not server.part.exists() and not server.path_kept.exists()


def test_another_text_of_a_corpus_size_is_not_the_corpus(monkeypatch, capsys, tmp_path):
    folder = small(monkeypatch, "tinyshakespeare", tmp_path / "tiny", "to be or not to be\n" * 9)
    path = folder / "tinyshakespeare.txt"
    path.write_bytes(path.read_bytes().replace(b"not", b"nit"))
    flags = ["--dataset=tinyshakespeare", f"--source={folder}", f"--data_dir={tmp_path}"]
    code, _, err = run(capsys, *flags)
    assert code == 2 and f"{path}: is not the tinyshakespeare.txt of this corpus" in err
    assert not (tmp_path / "tinyshakespeare-char").exists()


@pytest.fixture
def zipped(server, monkeypatch):
    """The server, with its file as a zip, as mattmahoney.net has enwik8."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("tiny", WHOLE)
    server.body, corpus = packed.getvalue(), CORPORA["tinyshakespeare"]
    file = replace(corpus.files[0], url=corpus.files[0].url.replace("input.txt", "tiny.zip"))
    monkeypatch.setitem(CORPORA, "tinyshakespeare", replace(corpus, files=(file,)))
    return server


def test_a_zip_is_checked_by_what_is_in_it_and_kept_packed(zipped, capsys, tmp_path):
    assert fetch(capsys, tmp_path)[0] == 0
    kept = tmp_path / "raw" / "tinyshakespeare" / "tiny.zip"
    assert kept.read_bytes() == zipped.body and len(zipped.log) == 1


def test_a_server_that_has_no_bytes_at_all_is_given_up(server, capsys, tmp_path):
    server.status = 416
    code, err = fetch(capsys, tmp_path)
    assert code == 2 and "HTTP 416" in err and len(server.log) == 1
