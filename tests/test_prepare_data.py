"""What prepare_data.py promises, one statement of fact a test. No test touches a network."""

import errno
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiktoken
from texts import MIXED, ROOT, SHAKESPEARE, content, run, small, text_of

import prepare_data as pd
from prepare_data import load, prepare
from support import text_files
from support.cli import BadInput
from support.tokenizers import EOT, tokenizer_from


def test_gpt2_says_in_one_line_how_to_provide_its_file(monkeypatch, tmp_path, capsys):
    def offline(name):
        raise ConnectionError("no route")

    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    code, _, err = run(capsys, "--tokenizer", "gpt2", "--data_dir", str(tmp_path))
    assert code == 2 and err.count("\n") == 1 and "TIKTOKEN_CACHE_DIR" in err and not content(tmp_path)


def test_gpt2_once_fetched_travels_in_the_meta_data(monkeypatch, tmp_path):
    order = list(range(33, 256)) + list(range(33))  # GPT-2's bytes do not come in the order of their values, either
    ranks = {bytes([b]): i for i, b in enumerate(order)} | {b"th": 256, b"the": 257}
    fake = tiktoken.Encoding("gpt2", pat_str=r"\S+|\s+", mergeable_ranks=ranks, special_tokens={EOT: 258})
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: fake)
    train, val, meta = load(prepare(tokenizer="gpt2", data_dir=tmp_path))
    monkeypatch.undo()
    assert meta["vocab_size"] == 259 and train[-1] == val[-1] == 258
    assert text_of(np.concatenate([train[:-1], val[:-1]]), meta) == SHAKESPEARE
    assert tokenizer_from(meta["tokenizer"]).encode("the").tolist() == [257]


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
        (own / "sub" / f"{i:02}.txt").write_text(f"document {i:02}\n", encoding="utf-8", newline="\n")
    (own / "empty.txt").write_bytes(b"")
    (own / "picture.png").write_bytes(b"\x89PNG\0\0")
    (own / ".hidden").write_text("secret", encoding="utf-8")
    train, val, meta = load(prepare(file=own, tokenizer="byte", data_dir=tmp_path))
    whole = [f"document {i:02}\n" for i in range(21)]
    assert text_of(val, meta) == "".join(d + EOT for d in whole[9::10])
    assert text_of(train, meta) == "".join(d + EOT for i, d in enumerate(whole) if i % 10 != 9)
    assert (meta["train_documents"], meta["val_documents"]) == (19, 2)
    assert len(load(prepare(file=own, tokenizer="char", data_dir=tmp_path))[1]) == 2 * len(whole[0])  # no such token


def test_of_a_few_documents_the_one_nearest_to_a_tenth_is_val(tmp_path):
    own = tmp_path / "own"
    own.mkdir()
    for name, n in (("a", 5), ("b", 100), ("c", 900)):
        (own / name).write_text(name * n, encoding="utf-8")
    _, val, meta = load(prepare(file=own, tokenizer="byte", data_dir=tmp_path))
    assert text_of(val, meta) == "b" * 100 + EOT


def test_a_folder_of_one_file_is_split_by_position(tmp_path):
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "a.txt").write_text("0123456789" * 10, encoding="utf-8")
    train, val, _ = load(prepare(file=tmp_path / "own", data_dir=tmp_path))
    assert (len(train), len(val)) == (90, 10)


def test_more_than_65536_tokens_take_uint32(tmp_path):
    text = "".join(map(chr, range(0x10000, 0x10000 + 70_000)))
    (tmp_path / "many.txt").write_bytes(text.encode())
    train, val, meta = load(prepare(file=tmp_path / "many.txt", data_dir=tmp_path))
    assert train.dtype == np.uint32 and meta["dtype"] == "uint32" and meta["vocab_size"] == 70_000
    assert text_of(train, meta) + text_of(val, meta) == text


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


def test_the_command_says_what_there_is_and_what_to_run_next(tmp_path, capsys):
    own = tmp_path / "own"
    own.mkdir()
    for i in range(3):
        (own / f"{i}.txt").write_text("words and more words\n" * 9, encoding="utf-8", newline="\n")
    flags = ["--file", str(own), "--tokenizer", "byte", "--context", "100", "--data-dir", str(tmp_path)]
    code, out, _ = run(capsys, *flags)
    assert code == 0
    for said in ("a second", "train: 380 tokens, 378 bytes", "2 documents", "cut 100.0%", str(tmp_path / "file-own-byte")):
        assert said in out
    assert out.splitlines()[-1].startswith("next: python train.py --file") and "--tokenizer byte" in out.splitlines()[-1]


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("at", ["train.bin", "val.bin", "meta.json"])
def test_a_failure_while_writing_leaves_the_earlier_state(monkeypatch, tmp_path, failure, at):
    path = tmp_path / "notes.txt"
    path.write_text("abc " * 100, encoding="utf-8")
    data = tmp_path / "data"
    write_atomically = pd.write_atomically

    def fail(target, write):
        write_atomically(target, write)
        if target.name == at:
            raise failure

    monkeypatch.setattr(pd, "write_atomically", fail)
    with pytest.raises(type(failure)):
        prepare(file=path, data_dir=data)
    assert list(data.iterdir()) == []
    monkeypatch.setattr(pd, "write_atomically", write_atomically)
    prepare(file=path, data_dir=data)
    before = content(data)
    path.write_text("other " * 100, encoding="utf-8")
    monkeypatch.setattr(pd, "write_atomically", fail)
    with pytest.raises(type(failure)):
        prepare(file=path, data_dir=data)
    assert content(data) == before


def test_a_failure_between_the_two_renames_leaves_the_earlier_state(monkeypatch, tmp_path):
    folder = prepare(data_dir=tmp_path)
    before = content(tmp_path)
    replace = os.replace

    def fail(path, target):
        if str(path).endswith(".tmp"):
            raise KeyboardInterrupt
        return replace(path, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(KeyboardInterrupt):
        prepare(data_dir=tmp_path, overwrite=True)
    assert content(tmp_path) == before
    monkeypatch.undo()
    same_file = (folder / "train.bin").stat().st_ino
    folder.rename(folder.with_name(".shakespeare-char.old"))  # what a kill at that moment would leave
    prepare(data_dir=tmp_path)
    assert content(tmp_path) == before and (folder / "train.bin").stat().st_ino == same_file


def test_what_is_in_the_way_is_left_alone(capsys, tmp_path):
    (tmp_path / "shakespeare-char").mkdir()
    (tmp_path / "shakespeare-char" / "thesis.txt").write_text("years of work", encoding="utf-8")
    (tmp_path / "shakespeare-byte").write_text("a file", encoding="utf-8")
    before = content(tmp_path)
    for flags in ([], ["--overwrite"], ["--tokenizer", "byte", "--overwrite"]):
        code, _, err = run(capsys, *flags, "--data_dir", str(tmp_path))
        assert code == 2 and err.count("\n") == 1 and "move it" in err and content(tmp_path) == before


# --------------------------------------------------------------------------------------------------
# The user's own text


def own(tmp_path, text: str, name: str = "notes.txt") -> Path:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8", newline="\n")
    return path


def test_a_runs_files_do_not_become_the_text_of_the_next(tmp_path, capsys):
    for name in "abc":
        own(tmp_path, f"text {name}\n" * 20, name + ".txt")
    folder = prepare(file=tmp_path, data_dir=tmp_path / "data")
    first = content(folder)
    run = tmp_path / "out" / "tiny-mfa"
    run.mkdir(parents=True)
    (run / "latest.pt").write_bytes(b"PK\3\4\0")
    (run / "metrics.jsonl").write_text('{"step": 1}\n' * 20, encoding="utf-8", newline="\n")
    capsys.readouterr()
    assert prepare(file=tmp_path, data_dir=tmp_path / "data") == folder and content(folder) == first
    out = capsys.readouterr().out
    assert "3 text files; left out: " in out and "1 as a run (out/tiny-mfa)" in out and "1 as a data set (data/" in out
    assert prepare(file=tmp_path, data_dir=tmp_path / "data", overwrite=True) == folder and content(folder) == first


@pytest.mark.parametrize("block", [1, 7, 1_000_000])
@pytest.mark.parametrize("separator", ["<|endoftext|>", "<|endoftext|>\n", "\n\n", "."])
def test_documents_in_one_file_end_with_the_end_of_text_and_are_split_between_two(monkeypatch, tmp_path, separator, block):
    monkeypatch.setattr(text_files, "BLOCK", block)
    documents = [f"document {i}" for i in range(20)]
    path = own(tmp_path, separator.join(documents))
    train, val, meta = load(prepare(file=path, tokenizer="byte", data_dir=tmp_path, separator=separator))
    assert text_of(train, meta) == "".join(d + EOT for d in documents[:18])
    assert text_of(val, meta) == "".join(d + EOT for d in documents[18:])
    assert (meta["train_documents"], meta["val_documents"]) == (18, 2)
    assert meta["separator"] == separator and meta["split"].endswith("cut between two documents")


def test_documents_of_a_folders_files_are_separated_too(tmp_path):
    (tmp_path / "my").mkdir()
    for i in range(3):
        own(tmp_path, f"one {i}---two {i}---", f"my/{i}.txt")
    train, val, meta = load(prepare(file=tmp_path / "my", tokenizer="byte", data_dir=tmp_path, separator="---"))
    found = (text_of(train, meta) + text_of(val, meta)).split(EOT)
    assert sorted(found) == ["", *(f"one {i}" for i in range(3)), *(f"two {i}" for i in range(3))]


def test_a_separator_is_remembered_changed_and_taken_back(tmp_path):
    path = own(tmp_path, "a b\n--\nc d\n--\ne f\n==\n" * 9)
    flags = dict(file=path, tokenizer="byte", data_dir=tmp_path)
    plain = content(prepare(**flags))
    split = content(prepare(**flags, separator="--\n"))
    assert split != plain
    assert content(prepare(**flags)) == split  # as train.py calls it
    path.write_text(path.read_text() + "a b\n--\nc d\n")
    assert load(prepare(**flags))[2]["separator"] == "--\n"
    path.write_text("a b\n--\nc d\n--\ne f\n==\n" * 9)
    assert content(prepare(**flags, separator="==\n")) != split
    assert content(prepare(**flags, separator="")) == plain


def test_the_separator_of_the_command_line_may_have_line_ends(tmp_path, capsys):
    path = own(tmp_path, "a b\n\nc d\n\ne f\n\ng\\h\n\n")
    for given, meant in ((r"\n\n", "\n\n"), (r"\\", "\\"), (" ", " ")):
        code, out, _ = run(capsys, "--file", str(path), "--separator", given, "--tokenizer", "byte", "--data_dir", str(tmp_path))
        assert code == 0 and load(tmp_path / "file-notes-byte")[2]["separator"] == meant


def test_files_and_folders_of_other_names_have_data_sets_of_their_own(tmp_path):
    (tmp_path / "v1.2").mkdir()
    (tmp_path / "v1.3").mkdir()
    names = ["notes.md", "notes.txt", "notes", "notes.txt.gz.txt", "v1.2/a.txt", "v1.3/a.txt"]
    paths = [own(tmp_path, f"the text of {name} " * 9, name) for name in names[:-2]]
    for name in names[-2:]:
        paths.append(own(tmp_path, f"the text of {name} " * 9, name).parent)
    paths.remove(tmp_path / "notes")  # one of notes and notes.txt takes the place of the other
    folders = [prepare(file=path, data_dir=tmp_path / "data") for path in paths]
    assert [folder.name for folder in folders] == [
        "file-notes.md-char", "file-notes-char", "file-notes.txt.gz-char", "file-v1.2-char", "file-v1.3-char",
    ]  # fmt: skip
    for name, folder in zip([names[0], names[1], *names[3:]], folders, strict=True):
        train, val, meta = load(folder)
        assert text_of(train, meta) + text_of(val, meta) == f"the text of {name} " * 9


def test_where_two_texts_share_a_data_set_it_is_made_again_and_said(tmp_path, capsys):
    text = "the text of a " * 9
    one = own(tmp_path, text)
    (tmp_path / "other").mkdir()
    two = own(tmp_path, text.upper(), "other/notes.txt")
    three = own(tmp_path, text.title(), "notes")
    said = []
    for path in (one, two, three, one):
        capsys.readouterr()
        train, val, meta = load(prepare(file=path, data_dir=tmp_path))
        assert text_of(train, meta) + text_of(val, meta) == path.read_text()
        assert meta["sources"][0]["name"] == path.name
        said.append("again, as its text or separator has changed" in capsys.readouterr().out)
    assert said == [False, True, True, True]


def test_a_small_text_has_the_merges_there_are(tmp_path, capsys):
    path = own(tmp_path, "to be or not to be\n" * 9)
    folder = prepare(file=path, tokenizer="bpe", data_dir=tmp_path)
    meta = load(folder)[2]
    assert folder.name == "file-notes-bpe8192" and 257 < meta["vocab_size"] < 300
    said = capsys.readouterr().out
    assert f"smaller than --vocab_size 8192: after {meta['vocab_size']} tokens no pair in this text occurs twice" in said
    made = (folder / "train.bin").stat().st_ino
    assert prepare(file=path, tokenizer="bpe", data_dir=tmp_path) == folder and (folder / "train.bin").stat().st_ino == made


# --------------------------------------------------------------------------------------------------
# What others put into a data set's folder

FOREIGN = {".DS_Store": b"\0", "Thumbs.db": b"\0", "desktop.ini": b"[x]\n", "my remarks.txt": b"years of work"}


def put_foreign_files(folder: Path) -> dict[str, bytes]:
    for name, data in FOREIGN.items():
        (folder / name).write_bytes(data)
    (folder / "@eaDir").mkdir()
    (folder / "@eaDir" / "thumb.jpg").write_bytes(b"x")
    return FOREIGN | {"@eaDir/thumb.jpg": b"x"}


def test_foreign_files_in_a_data_set_do_not_matter_and_are_never_deleted(tmp_path):
    path = own(tmp_path, "abc " * 100)
    folder = prepare(file=path, data_dir=tmp_path / "data")
    foreign = put_foreign_files(folder)
    before = content(folder)
    prepare(file=path, data_dir=tmp_path / "data")
    load(folder)
    assert content(folder) == before
    prepare(file=path, data_dir=tmp_path / "data", overwrite=True)
    assert content(folder) == before
    own(tmp_path, "abd " * 100)
    prepare(file=path, data_dir=tmp_path / "data")
    after = content(folder)
    assert after != before and {name: after[name] for name in foreign} == foreign
    assert [p.name for p in (tmp_path / "data").iterdir()] == [folder.name]


@pytest.mark.parametrize("name", [".DS_Store", "Thumbs.db", None])
def test_a_folder_with_nothing_but_what_a_file_manager_left_becomes_a_data_set(tmp_path, name):
    folder = tmp_path / "shakespeare-char"
    folder.mkdir()
    if name:
        (folder / name).write_bytes(b"\0")
    assert prepare(data_dir=tmp_path) == folder and len(load(folder)[0]) == 1_070_120
    assert not name or (folder / name).read_bytes() == b"\0"


@pytest.mark.parametrize("at", ["first", "second", "third"])
def test_a_kill_while_foreign_files_move_loses_none(monkeypatch, tmp_path, at):
    folder = prepare(data_dir=tmp_path)
    foreign = put_foreign_files(folder)
    before = content(tmp_path)
    rename, moves = Path.rename, []

    def killed(self, target):
        if self.parent.name == ".shakespeare-char.old":
            moves.append(self)
            if len(moves) == {"first": 1, "second": 2, "third": 3}[at]:
                raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        prepare(data_dir=tmp_path, overwrite=True)
    monkeypatch.undo()
    kept = {path.split("/", 1)[1]: data for path, data in content(tmp_path).items()}
    assert {name: kept[name] for name in foreign} == foreign
    prepare(data_dir=tmp_path)
    assert content(tmp_path) == before


# --------------------------------------------------------------------------------------------------
# Installed, without this checkout


def test_installed_the_text_comes_with_the_package_and_data_goes_to_the_working_directory(tmp_path):
    site, here = tmp_path / "site-packages", tmp_path / "here"
    here.mkdir()
    shutil.copytree(ROOT / "support", site / "support", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "prepare_data.py", site)
    (site / "support" / "data").mkdir()
    shutil.copy(ROOT / "data" / "shakespeare.txt", site / "support" / "data")
    command = [sys.executable, "-m", "prepare_data"]
    done = subprocess.run(command, cwd=here, env=os.environ | {"PYTHONPATH": str(site)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert sorted(content(here)) == [f"data/shakespeare-char/{name}" for name in ("meta.json", "train.bin", "val.bin")]
    assert not (site / "data").exists()
    (site / "support" / "data" / "shakespeare.txt").unlink()
    command += ["--tokenizer", "byte"]
    done = subprocess.run(command, cwd=here, env=os.environ | {"PYTHONPATH": str(site)}, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "--dataset shakespeare: its text, " in done.stderr and "is missing; install this project again" in done.stderr


def test_a_plain_pip_install_trains_on_its_text_from_any_folder(tmp_path):
    source, site, here = (tmp_path / name for name in ("source", "site-packages", "here"))
    here.mkdir()
    generated = shutil.ignore_patterns("__pycache__", "results", "*-char", "*-byte", "*-bpe*", "raw", ".*")
    for name in ("support", "experiments", "data"):
        shutil.copytree(ROOT / name, source / name, ignore=generated)
    for path in (*ROOT.glob("*.py"), ROOT / "pyproject.toml", ROOT / "README.md", ROOT / "LICENSE"):
        shutil.copy(path, source)
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*pip, "--target", str(site), "."], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shutil.rmtree(source)
    sizes = "--n_layer=1 --dim=32 --head_dim=8 --block_size=16 --eval_tokens=64 --max_iters=1 --device=cpu"
    command = [sys.executable, "-m", "train", *sizes.split()]
    environment = os.environ | {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "text: shakespeare-char, 1,070,120 + " in done.stdout
    assert {path.name for path in here.iterdir()} == {"data", "out"} and (here / "out" / "tiny-mfa" / "best.pt").is_file()


@pytest.mark.parametrize("n, dtype", [(65_536, np.uint16), (65_537, np.uint32)])
def test_ids_take_16_bits_up_to_65536_tokens_and_no_further(tmp_path, n, dtype):
    text = "".join(map(chr, range(0x10000, 0x10000 + n)))
    (tmp_path / "many.txt").write_bytes(text.encode())
    train, val, meta = load(prepare(file=tmp_path / "many.txt", data_dir=tmp_path))
    assert train.dtype == val.dtype == dtype and meta["vocab_size"] == n
    assert text_of(train, meta) + text_of(val, meta) == text


def test_a_folder_is_prepared_again_when_a_text_or_a_name_changes_at_equal_size(tmp_path):
    own = tmp_path / "own"
    own.mkdir()
    for name in "ab":
        (own / name).write_text(f"text {name}\n" * 9, encoding="utf-8", newline="\n")

    def val() -> str:
        _, ids, meta = load(prepare(file=own, tokenizer="byte", data_dir=tmp_path))
        return text_of(ids, meta).removesuffix(EOT)

    first, source = val(), load(tmp_path / "file-own-byte")[2]["sources"]
    assert first == "text a\n" * 9
    (own / "a").write_text("word a\n" * 9, encoding="utf-8", newline="\n")
    assert val() == "word a\n" * 9
    (own / "a").write_text("text a\n" * 9, encoding="utf-8", newline="\n")
    assert val() == first and load(tmp_path / "file-own-byte")[2]["sources"] == source
    (own / "b").rename(own / "c")
    assert val() == first and load(tmp_path / "file-own-byte")[2]["sources"] != source


def test_bpe_learns_from_the_train_split_alone(tmp_path):
    (tmp_path / "own.txt").write_text("abc " * 900 + "xyz " * 100, encoding="utf-8")
    folder = prepare(file=tmp_path / "own.txt", tokenizer="bpe", vocab_size=259, data_dir=tmp_path)
    tokens = tokenizer_from(load(folder)[2]["tokenizer"]).tokens[256:]
    assert len(tokens) == 2 and not set(b"xyz") & set(b"".join(tokens))


def test_a_bpe_may_have_257_tokens_and_all_that_its_text_gives(tmp_path, capsys):
    path = tmp_path / "own.txt"
    path.write_text("ab " * 20, encoding="utf-8")
    how = dict(file=path, tokenizer="bpe", data_dir=tmp_path)
    most = load(prepare(**how, vocab_size=400))[2]["vocab_size"]
    assert f"--vocab_size 400: after {most} tokens no pair" in capsys.readouterr().out
    for size in (257, most):
        assert load(prepare(**how, vocab_size=size))[2]["vocab_size"] == size
        assert "no pair" not in capsys.readouterr().out
    assert load(prepare(**how, vocab_size=most + 1))[2]["vocab_size"] == most
    assert f"after {most} tokens no pair" in capsys.readouterr().out


def test_a_bpe_has_8192_tokens_if_not_asked_for_others(tmp_path, capsys):
    (tmp_path / "own.txt").write_text("too short for that\n" * 9, encoding="utf-8", newline="\n")
    prepare(file=tmp_path / "own.txt", tokenizer="bpe", data_dir=tmp_path)
    assert "--vocab_size 8192: " in capsys.readouterr().out


def test_documents_come_in_the_order_of_their_paths(tmp_path):
    own = tmp_path / "own"
    for name in ("b/1", "a/2", "c", "a/0"):
        (own / name).parent.mkdir(parents=True, exist_ok=True)
        (own / name).write_text(f"{name}\n" * (1 if name == "c" else 90), encoding="utf-8", newline="\n")
    train, val, meta = load(prepare(file=own, tokenizer="byte", data_dir=tmp_path))
    documents = [document.split("\n")[0] for document in text_of(train, meta).split(EOT)]
    assert documents == ["a/0", "a/2", "b/1", ""] and text_of(val, meta) == "c\n" + EOT


def test_the_command_that_comes_next_has_all_flags_of_this_one(tmp_path, capsys):
    path = tmp_path / "my own.txt"
    path.write_text("as it was in the beginning\n" * 99, encoding="utf-8", newline="\n")
    flags = ["--tokenizer", "bpe", "--vocab_size", "270", "--data_dir", str(tmp_path)]
    code, out, _ = run(capsys, "--file", str(path), *flags)
    command = shlex.split(out.splitlines()[-1].removeprefix("next: "))
    assert code == 0 and command == ["python", "train.py", "--file", str(path), *flags]
    _, _, meta = load(tmp_path / "file-my-own-bpe270")
    size, tokens = meta["train_bytes"], meta["train_tokens"]
    assert f"train: {tokens:,} tokens, {size:,} bytes ({size / tokens:.3f} bytes a token)" in out


def test_all_three_files_are_on_the_disk_before_the_folder_gets_its_name(tmp_path, monkeypatch):
    said, fsync, replace = [], pd.os.fsync, os.replace
    monkeypatch.setattr(pd.os, "fsync", lambda f: (said.append("flushed"), fsync(f))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (said.append(Path(b).name), replace(a, b))[1])
    prepare(data_dir=tmp_path)
    assert said == ["flushed", "train.bin", "flushed", "val.bin", "flushed", "meta.json", "shakespeare-char"]


def test_bpe_learns_from_the_first_character_on(tmp_path):
    path = own(tmp_path, "zq " + "ab " * 9 + "zq " + "ab " * 9)
    folder = prepare(file=path, tokenizer="bpe", data_dir=tmp_path)
    assert b"zq" in tokenizer_from(load(folder)[2]["tokenizer"]).tokens
