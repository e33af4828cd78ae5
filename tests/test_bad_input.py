"""What the four commands and the Python API answer to bad input: one line, exit code 2, and nothing half written.

Each row of a table below is one mistake. The line must name the flag or the file, and say what is wrong and what would
be right. Every row starts in a folder with a text (play.txt), its data set (data/) and a finished run of ten steps (run/).
"""

import codecs
import gzip
import io
import json
import lzma
import math
import os
import pickle
import shlex
import shutil
import signal
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from runs import FLAGS, ROOT, command, state

import prepare_data
import sample
import train as trainer
from experiments.paper.tables import Args as Paper
from experiments.paper.tables import main as paper_main
from experiments.probes.kill_test import identical
from prepare_data import load, prepare
from support import files
from support.cli import BadInput
from support.run_folder import load_checkpoint
from support.tokenizers import ByteTokenizer
from train import Train

DATA = Path("data/file-play-char")
# What a row's command line starts from. Flags that come later win.
COMMANDS = {
    "train.py": (trainer.main, Train, [*FLAGS, "--file=play.txt", "--data_dir=data", "--out=new"], trainer.defaults),
    "sample.py": (sample.main, sample.Sample, ["--checkpoint=run/best.pt", "--device=cpu", "--max_new_tokens=5"]),
    "prepare_data.py": (prepare_data.main, prepare_data.Args, ["--data_dir=data"]),
    "paper.py": (paper_main, Paper, []),
}
RESUME = "train.py --out run --resume --max_iters 15"
BEGIN = "train.py --init_from run/best.pt --vocab_size 58 --ffn_dim 103"  # 103: matched to MHA's parameters


def call(line: str) -> int:
    """The exit code of a command line."""
    name, *flags = shlex.split(line)
    main, args_type, start, *more = COMMANDS[name]
    return command(main, args_type, [*start, *flags], *more)


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    folder = tmp_path_factory.mktemp("template")
    text = (ROOT / "data" / "shakespeare.txt").read_text(encoding="utf-8")
    (folder / "play.txt").write_text(text[:20_000], encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert call("train.py --out run --max_iters 10") == 0
    return folder


@pytest.fixture
def place(template, tmp_path, monkeypatch):
    """The folder in which a row begins."""
    shutil.copytree(template, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def encrypted() -> bytes:
    """A zip that says of its only file that it is encrypted."""
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w") as archive:
        archive.writestr("a.txt", "a text\n" * 50)
    raw = bytearray(whole.getvalue())
    for mark, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):  # the flags, in both of its headers
        raw[raw.index(mark) + at] |= 1
    return bytes(raw)


def zipped(*names: str) -> bytes:
    """A zip of a text under each of these names."""
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w") as archive:
        for name in names:
            archive.writestr(name, "a text\n" * 50)
    return whole.getvalue()


def everything() -> dict:
    """Files with their bytes, and folders."""
    return {path: path.read_bytes() if path.is_file() else None for path in Path().rglob("*")}


def one_line(capsys, says: list[str]) -> None:
    err = capsys.readouterr().err.replace("\\", "/")  # Windows' paths
    assert err.startswith("error: ") and err.count("\n") == 1, err
    assert [text for text in says if text not in err] == [], err


# ---------------------------------------------------------------------------------------------------------------------
# What is done to the folder


def nothing() -> None:
    pass


def write(files: dict[str, bytes], folder: str = ""):
    """Files with these bytes; in folder, where one is named, a file of somebody else's."""

    def do() -> None:
        for name, data in (files | ({f"{folder}/thesis.txt": b"years"} if folder else {})).items():
            Path(name).parent.mkdir(exist_ok=True)
            Path(name).write_bytes(data)

    return do


def text(data: bytes):
    return write({"a.txt": data})


def checkpoint(**changes):
    """Parts of both checkpoints replaced; a callable gets the old part."""

    def do() -> None:
        for path in Path("run").glob("*.pt"):
            ckpt = load_checkpoint(path)
            torch.save(ckpt | {name: new(ckpt[name]) if callable(new) else new for name, new in changes.items()}, path)

    return do


def both(change):
    """change(path) for both checkpoints."""
    return lambda: [change(path) for path in Path("run").glob("*.pt")]


def meta(**changes):
    def do() -> None:
        path = DATA / "meta.json"
        path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")

    return do


def cut(name: str, size: int):
    return lambda: os.truncate(DATA / name, size)


class RunsCode:
    """What a pickle that runs code looks like: to load it is to call Path("it_ran").touch()."""

    def __reduce__(self):
        return Path.touch, (Path("it_ran"),)


# ---------------------------------------------------------------------------------------------------------------------
# The commands: what is wrong, what is done to the folder first, the command line, what the answer says

TABLE = {
    # Texts
    "empty": (text(b""), "prepare_data.py --file a.txt", "a.txt: is empty"),
    "empty, for bpe": (text(b""), "prepare_data.py --file a.txt --tokenizer bpe", "a.txt: is empty"),
    "empty, to train on": (text(b""), "train.py --file a.txt", "a.txt: is empty"),
    "only a mark": (text(codecs.BOM_UTF8), "prepare_data.py --file a.txt", "a.txt: is empty"),
    "one character": (text(b"a"), "prepare_data.py --file a.txt", "a.txt: has only the one character 'a'"),
    "one character, often": (
        text(b"a" * 5000), "prepare_data.py --file a.txt --tokenizer byte", "only the one character 'a'",
    ),
    "binary": (text(b"text\0not"), "prepare_data.py --file a.txt", "a.txt: is not text", "NUL byte at offset 4"),
    "binary, as bytes": (text(b"text\0"), "prepare_data.py --file a.txt --tokenizer byte", "NUL byte at offset 4"),
    "UTF-16 without a mark": (text("text".encode("utf-16-le")), "prepare_data.py --file a.txt", "a.txt", "in UTF-8"),
    "UTF-16 cut short": (
        text("text".encode("utf-16")[:-1]), "prepare_data.py --file a.txt",
        "a.txt: is not UTF-16, at offset 8 there is the byte 0x74; save it as UTF-8",
    ),
    "UTF-16 cut short, as bytes": (
        text("text".encode("utf-16")[:-1]), "prepare_data.py --file a.txt --tokenizer byte", "a.txt: is not UTF-16, at offset 8",
    ),
    "UTF-16 that is binary": (text("te\0xt".encode("utf-16")), "prepare_data.py --file a.txt", "a.txt: is not text, there is a NUL in it"),
    "UTF-16 of nothing": (text(codecs.BOM_UTF16_BE), "prepare_data.py --file a.txt", "a.txt: is empty"),
    "UTF-32 beyond Unicode": (
        text(codecs.BOM_UTF32_LE + b"a\0\0\0\0\0\x11\0"), "prepare_data.py --file a.txt", "a.txt: is not UTF-32, at offset 8",
    ),
    "Latin-1": (
        text(b"x" * 1_000_001 + b"caf\xe9"), "prepare_data.py --file a.txt --tokenizer bpe",
        "a.txt: is not UTF-8, at offset 1,000,004 there is the byte 0xe9; save it as UTF-8, or use --tokenizer byte",
    ),
    "Latin-1, to train on": (text(b"caf\xe9"), "train.py --file a.txt", "a.txt: is not UTF-8"),
    "cut inside a character": (text("日本".encode()[:-1]), "prepare_data.py --file a.txt", "offset 3", "0xe6"),
    "no such file": (nothing, "prepare_data.py --file a.txt", "--file a.txt: there is no such file or folder"),
    "no such file, to train on": (nothing, "train.py --file a.txt", "--file a.txt: there is no such file or folder"),
    "damaged xz": (write({"a.xz": b"x"}), "prepare_data.py --file a.xz", "a.xz: cannot be unpacked"),
    "damaged gz": (write({"a.gz": b"x"}), "prepare_data.py --file a.gz", "a.gz: cannot be unpacked"),
    "gz cut short": (
        write({"a.gz": gzip.compress(b"a text\n" * 50)[:-9]}), "prepare_data.py --file a.gz", "a.gz: cannot be unpacked, it is damaged",
    ),
    "xz cut short": (
        write({"a.xz": lzma.compress(b"a text\n" * 50)[:-9]}), "prepare_data.py --file a.xz", "a.xz: cannot be unpacked, it is damaged",
    ),
    "gz of a picture": (write({"a.gz": gzip.compress(b"\x89PNG\0")}), "prepare_data.py --file a.gz", "a.gz: is not text, there is a NUL byte"),
    "zip of two": (write({"a.zip": zipped("a.txt", "b.txt")}), "prepare_data.py --file a.zip", "a.zip: holds 2 files; a zip must hold exactly one"),
    "zip of nothing": (write({"a.zip": zipped()}), "prepare_data.py --file a.zip", "a.zip: holds 0 files; a zip must hold exactly one"),
    "zip of what macOS adds": (write({"a.zip": zipped("__MACOSX/._a.txt")}), "prepare_data.py --file a.zip", "a.zip: holds 0 files"),
    "encrypted zip": (write({"a.zip": encrypted()}), "prepare_data.py --file a.zip", "a.zip: cannot be unpacked"),
    "file without a name": (nothing, "prepare_data.py --file ''", "--file: is empty"),
    "few tokens to evaluate on": (nothing, "train.py --eval_tokens 3", "--eval_tokens 3: must be 0, for all, or at least"),
    "experts in no layer": (
        nothing, "train.py --n_expert 2 --moe_ffn_dim 8 --n_layer 1", "--n_layer must be at least 2",
    ),
    "endless init": (nothing, "train.py --init_std inf", "init_std must be a finite number, not inf"),
    "damaged zip": (write({"a.zip": b"x"}), "prepare_data.py --file a.zip", "a.zip: cannot be unpacked"),
    "folder of an empty file": (write({"my/a.txt": b""}), "prepare_data.py --file my", "my: there is no text file"),
    "folder of a picture": (write({"my/a.png": b"\x89\0"}), "prepare_data.py --file my", "my: there is no text file"),
    "folder with a bad text": (
        write({"my/a.txt": b"good", "my/b.txt": b"bad \xff"}), "prepare_data.py --file my", "b.txt: is not UTF-8, at offset 4",
    ),
    "folder of nothing": (lambda: Path("my").mkdir(), "prepare_data.py --file my", "my: there is no text file in this folder"),
    "folder of hidden files": (write({"my/.a.txt": b"text"}), "prepare_data.py --file my", "my: there is no text file in this folder"),
    "folder of a run": (nothing, "prepare_data.py --file run", "run: there is no text file in this folder"),
    "folder of a run, to train on": (nothing, "train.py --file run", "run: there is no text file in this folder"),
    "folder of a data set": (nothing, "prepare_data.py --file data/file-play-char", "there is no text file in this folder"),
    "folder of data sets": (nothing, "prepare_data.py --file data", "data: there is no text file in this folder"),
    "folder of packed pictures": (
        write({"my/a.gz": gzip.compress(b"\x89PNG\0")}), "prepare_data.py --file my", "my: there is no text file in this folder",
    ),
    "folder with a damaged UTF-16 text": (
        write({"my/a.txt": b"good", "my/b.txt": codecs.BOM_UTF16_LE + b"x"}), "prepare_data.py --file my", "b.txt: is not UTF-16, at offset 2",
    ),
    "folder with a binary that begins as a text": (
        write({"my/a.txt": b"good", "my/b.txt": b"x" * 10_000 + b"\0"}), "prepare_data.py --file my", "b.txt: is not text, there is a NUL byte at offset 10,000",
    ),
    # --separator
    "separator that is nowhere": (
        nothing, "prepare_data.py --file play.txt --separator ===", "--separator: stands between no two documents in play.txt; give one that does",
    ),
    "separator at the end only": (
        text(b"to be or not\n---\n"), "prepare_data.py --file a.txt --separator '---\\n'", "--separator: stands between no two documents in a.txt",
    ),
    "separator at the beginning only": (
        text(b"---to be or not\n"), "prepare_data.py --file a.txt --separator ---", "--separator: stands between no two documents in a.txt",
    ),
    "separator that is nowhere in a folder": (
        write({"my/a.txt": b"one", "my/b.txt": b"two"}), "prepare_data.py --file my --separator ===", "--separator: stands between no two documents in my",
    ),
    "nothing but separators": (text(b"-=-=-="), "prepare_data.py --file a.txt --separator -=", "stands between no two documents in a.txt"),
    "separator of a corpus": (nothing, "prepare_data.py --separator '\\n\\n'", "--separator", "goes with --file, a corpus has its own"),
    "separator without end": (nothing, f"prepare_data.py --file play.txt --separator {'-' * 10_001}", "--separator: is longer than 10,000 characters"),
    # What is in the way of a data set
    "a file in the way": (
        write({"data/file-a-char": b"x", "a.txt": b"text"}), "prepare_data.py --file a.txt", "data/file-a-char: is not a data set; move it, or give another --data_dir",
    ),
    "a folder in the way": (
        write({"a.txt": b"text"}, folder="data/file-a-char"), "prepare_data.py --file a.txt", "data/file-a-char: is not a data set; move it",
    ),
    "a folder in the way of --overwrite": (
        write({"a.txt": b"text"}, folder="data/file-a-char"), "prepare_data.py --file a.txt --overwrite", "data/file-a-char: is not a data set; move it",
    ),
    # prepare_data.py's flags
    "no such corpus": (nothing, "prepare_data.py --dataset bible", "--dataset bible: is not one of shakespeare", "--file"),
    "two texts": (nothing, "prepare_data.py --file play.txt --dataset text8", "--file play.txt: does not go with", "text8"),
    "two sources": (nothing, "prepare_data.py --file play.txt --source play.txt", "--source play.txt", "not with --file"),
    "a source for python": (nothing, "prepare_data.py --dataset python --source .", "--source .: goes with a corpus"),
    "vocabulary too small": (nothing, "prepare_data.py --tokenizer bpe --vocab_size 256", "--vocab_size 256: must be 257"),
    "negative vocabulary": (nothing, "prepare_data.py --tokenizer bpe --vocab_size -1", "--vocab_size -1: must be 257"),
    "vocabulary too large": (nothing, "prepare_data.py --tokenizer bpe --vocab_size 1000001", "to 1000000"),
    "vocabulary of characters": (nothing, "prepare_data.py --vocab_size 512", "--vocab_size 512: goes with --tokenizer bpe"),
    "vocabulary of bytes": (nothing, "prepare_data.py --tokenizer byte --vocab_size 512", "goes with --tokenizer bpe only, not with byte"),
    "half a vocabulary": (nothing, "prepare_data.py --tokenizer bpe --vocab_size 512.5", "--vocab_size", "'512.5'"),
    "no name of a corpus": (nothing, "prepare_data.py --dataset ''", "--dataset : is not one of shakespeare"),
    "corpus in capitals": (nothing, "prepare_data.py --dataset Shakespeare", "--dataset Shakespeare: is not one of shakespeare"),
    "fewer contexts than none": (nothing, "prepare_data.py --context -5", "--context -5: must be 1 or more"),
    "no source for the large one": (nothing, "prepare_data.py --dataset pg-books-large", "pg-books-large: cannot be downloaded; run", "train-6.txt"),
    "large source that is the small one": (
        write({f"books/train-{i}.txt": b"x" for i in range(2)}), "prepare_data.py --dataset pg-books-large --source books",
        "--source books: there is no train-2.txt in it; give the folder that holds train-0.txt, train-1.txt, train-2.txt",
    ),
    "another text of the right name": (
        write({"wiki/train.txt": b"x", "wiki/valid.txt": b"x"}), "prepare_data.py --dataset wikitext-2 --source wiki", "train.txt: is not the train.txt of this corpus",
    ),
    "damaged source": (
        write({"wiki/train.txt.xz": b"x", "wiki/valid.txt": b"x"}), "prepare_data.py --dataset wikitext-2 --source wiki", "train.txt.xz: cannot be unpacked",
    ),
    "no such tokenizer": (nothing, "prepare_data.py --tokenizer words", "words", "--tokenizer", "'char', 'byte', 'bpe'"),
    "contexts of nothing": (nothing, "prepare_data.py --context 0", "--context 0: must be 1 or more"),
    "not a number": (nothing, "prepare_data.py --context many", "--context", "'many'"),
    "no source": (nothing, "prepare_data.py --dataset pg-books", "pg-books: cannot be downloaded; run", "--source", "val.txt"),
    "no source, to train on": (
        nothing, "train.py --file None --dataset pg-books", "--dataset pg-books: cannot be downloaded; run prepare_data.py --source",
    ),
    "no such source": (nothing, "prepare_data.py --dataset pg-books --source a", "--source a: there is no train-0.txt in it; give the folder that holds"),
    "one file for three": (nothing, "prepare_data.py --dataset pg-books --source play.txt", "give the folder that holds train-0.txt, train-1.txt"),
    "source without the text": (nothing, "prepare_data.py --dataset wikitext-2 --source .", "--source .: there is no train.txt in it"),
    "another text": (
        nothing, "prepare_data.py --dataset tinyshakespeare --source play.txt",
        "play.txt: is not the tinyshakespeare.txt of this corpus; for a text of your own use --file",
    ),
    "--data_dir is a file": (nothing, "prepare_data.py --data_dir play.txt", "--data_dir play.txt: is a file; give a folder"),
    "--data_dir below a file": (nothing, "prepare_data.py --data_dir play.txt/data", "error: play.txt"),
    # train.py's flags
    "batch of nothing": (nothing, "train.py --batch_size 0", "--batch_size must be positive, not 0"),
    "odd batch": (nothing, "train.py --grad_accum 3", "--batch_size 4 must be a multiple of 1 processes x 3"),
    "vocabulary below the text's": (nothing, "train.py --vocab_size 5", "--vocab_size 5: ", "tokens, give as many or more"),
    "no steps": (nothing, "train.py --max_iters 0", "--max_iters must be positive, not 0"),
    "negative learning rate": (nothing, "train.py --learning_rate -0.1", "--learning_rate must be positive, not -0.1"),
    "learning rate NaN": (nothing, "train.py --learning_rate nan", "--learning_rate must be positive, not nan"),
    "endless learning rate": (nothing, "train.py --learning_rate inf", "--learning_rate must be positive, not inf"),
    "a rate that climbs": (
        nothing, "train.py --learning_rate 1e-6", "--min_lr 1e-05 is more than the peak, --learning_rate 1e-06: give at most that",
    ),
    "a rate that climbs by its minimum": (nothing, "train.py --min_lr 0.1", "--min_lr 0.1 is more than the peak, --learning_rate 0.003"),
    "negative decay": (nothing, "train.py --weight_decay -1", "--weight_decay must not be negative, not -1.0"),
    "seed too large": (nothing, "train.py --seed 4294967296", "--seed must be less than 2^32"),
    "context longer than the text": (
        nothing, "train.py --block_size 20000", "--block_size 20000: the training text", "has 18000 tokens, and more are needed",
    ),
    "context longer than the validation text": (nothing, "train.py --block_size 2000", "the validation text", "2000 tokens"),
    "no context": (nothing, "train.py --block_size 0", "error: --block_size must be at least 1, not 0"),
    "no such attention": (nothing, "train.py --attn flash", "--attn must be one of fpba, mha", "not 'flash'"),
    "no MHA to compare with": (nothing, "train.py --attn fpba --dim 8 --head_dim 16", "--attn fpba: the MHA that it is compared with: head_dim 16 leaves no head in dim 8", "make it smaller"),
    "no such preset": (nothing, "train.py --preset huge", "--preset must be one of tiny, baby", "not 'huge'"),
    "impossible model": (nothing, "train.py --dropout 2", "dropout must be in [0, 1), not 2.0"),
    "heads that do not divide": (nothing, "train.py --attn gqa --n_kv_head 3", "--n_head 4 must be a multiple of n_kv_head 3"),
    "width of MHA's heads": (nothing, "train.py --head_dim 33", "--attn mfa: the MHA that it is compared with: head_dim must be even"),
    "attention too large": (nothing, "train.py --n_head 500", "--attn mfa: no ffn_dim gives mfa MHA's", "or --no_match_params"),
    "misspelt flag": (nothing, "train.py --batchsize 8", "--batchsize", "Perhaps you meant: --batch_size"),
    "no GPU": (nothing, "train.py --device cuda:99", "--device cuda:99: not on this machine; --device auto takes what"),
    "no such device": (nothing, "train.py --device abacus", "--device abacus: not on this machine"),
    # Folders for a run
    "--out is a file": (nothing, "train.py --out play.txt", "--out play.txt is a file: give a folder"),
    "--out below a file": (nothing, "train.py --out play.txt/run", "error: play.txt"),
    "--out holds a run": (nothing, "train.py --out run", "--out run holds a run: --resume continues it, --overwrite replaces"),
    # --resume
    "resumed with another width": (nothing, RESUME + " --dim 64", "--resume: run/latest.pt", "dim was 32 and is now 64"),
    "resumed with another attention": (nothing, RESUME + " --attn mha", "attn was 'mfa' and is now 'mha'"),
    "resumed with another reuse": (nothing, RESUME + " --key_reuse_rope post", "was 'pre' and is now 'post'"),
    "resumed with another seed": (nothing, RESUME + " --seed 1", "seed was 1337 and is now 1; leave them as they were"),
    "resumed with another rate": (nothing, RESUME + " --learning_rate 0.5", "learning_rate was 0.003 and is now 0.5"),
    "resumed with another batch": (nothing, RESUME + " --batch_size 8", "batch_size was 4 and is now 8", "another --out"),
    "resumed with other parameters": (nothing, RESUME + " --no-match_params", "match_params was True and is now False"),
    "resumed beyond its end": (nothing, RESUME + " --max_iters 9", "--max_iters 9: run/latest.pt is at step 10 already"),
    "resumed with other flags": (checkpoint(args=lambda args: args | {"colour": "red"}), RESUME, "other flags", "colour"),
    # --init_from
    "begun with no file": (nothing, "train.py --init_from a.pt", "checkpoint a.pt is not there: train one with python train.py"),
    "begun with a folder": (nothing, "train.py --init_from run", "checkpoint run is a folder: give run/best.pt"),
    "begun with a text": (nothing, "train.py --init_from play.txt", "play.txt is not a checkpoint of train.py"),
    "begun without a value": (nothing, "train.py --init_from", "Missing value for argument", "--init_from"),
    "begun at another width": (nothing, "train.py --init_from run/best.pt --dim 64", "--init_from run/best.pt: ", "dim is 32 there, not 64", "leave these flags out"),
    "begun with another attention": (nothing, "train.py --init_from run/best.pt --attn mha", "attn is 'mfa' there, not 'mha'"),
    "begun with a malformed tokenizer": (
        checkpoint(tokenizer={"kind": "bpe"}), "train.py --init_from run/best.pt", "run/best.pt: the tokenizer's description is malformed",
    ),
    "begun with an impossible model": (
        checkpoint(config=lambda config: config | {"dim": -1}), "train.py --init_from run/best.pt", "does not fit its own config: dim must be at least 1",
    ),
    "begun in a folder that holds a run": (nothing, f"{BEGIN} --out run", "--out run holds a run: --resume continues it"),
    "begun on a text of other characters": (
        text("to bé\n".encode() * 500), f"{BEGIN} --file a.txt", "a.txt: character 'é' (U+00E9) at position 4 is not among the 58 characters",
    ),
    "begun on an empty text": (text(b""), f"{BEGIN} --file a.txt", "a.txt: is empty"),
    "resumed from another beginning": (nothing, RESUME + " --init_from run/best.pt", "init_from was None and is now"),
    "threads below nothing": (nothing, "train.py --threads -1", "--threads must not be negative, not -1"),
    "half a thread": (nothing, "train.py --threads 1.5", "--threads", "'1.5'"),
    "separator of a corpus, to train on": (
        nothing, "train.py --file None --separator x", "--separator 'x': goes with --file, a corpus has its own",
    ),
    "separator that is nowhere, to train on": (nothing, "train.py --separator ===", "--separator: stands between no two documents in play.txt"),
    # sample.py
    "temperature NaN": (nothing, "sample.py --temperature nan", "--temperature must be 0 (greedy) or positive, not nan"),
    "negative temperature": (nothing, "sample.py --temperature -1", "--temperature must be 0 (greedy) or positive, not -1.0"),
    "top_p 0": (nothing, "sample.py --top_p 0", "--top_p must be in (0, 1], not 0.0"),
    "top_p above 1": (nothing, "sample.py --top_p 1.5", "--top_p must be in (0, 1], not 1.5"),
    "top_p NaN": (nothing, "sample.py --top_p nan", "--top_p must be in (0, 1], not nan"),
    "top_k 0": (nothing, "sample.py --top_k 0", "--top_k must be at least 1, not 0"),
    "no tokens": (nothing, "sample.py --max_new_tokens 0", "--max_new_tokens must be at least 1, not 0"),
    "no samples": (nothing, "sample.py --num_samples 0", "--num_samples must be at least 1, not 0"),
    "negative seed": (nothing, "sample.py --seed -1", "--seed must be from 0 to 2^32 - 1, not -1"),
    "no GPU to sample on": (nothing, "sample.py --device cuda:99", "--device cuda:99: not on this machine"),
    "compiling without graphs": (nothing, "sample.py --compile", "--compile compiles what --graphs replays, on a GPU"),
    "no such checkpoint": (nothing, "sample.py --checkpoint a.pt", "checkpoint a.pt is not there: train one with python train.py"),
    "a folder for a checkpoint": (nothing, "sample.py --checkpoint run", "checkpoint run is a folder: give run/best.pt"),
    "another tokenizer in it": (
        checkpoint(tokenizer=ByteTokenizer().spec()), "sample.py", "run/best.pt is of another tokenizer: it has 257 tokens",
    ),
    "malformed tokenizer in it": (
        checkpoint(tokenizer={"kind": "bpe"}), "sample.py", "run/best.pt: the tokenizer's description is malformed",
    ),
    "an impossible model in it": (
        checkpoint(config=lambda config: config | {"dim": -1}), "sample.py", "does not fit its own config: dim must be at least 1",
    ),
    # experiments/paper.py
    "no such preset of the paper's": (nothing, "paper.py --preset nano", "--preset must be one of tiny, baby, small"),
    "nothing for a preset": (nothing, "paper.py --preset ''", "--preset must be one of tiny, baby", "not ''"),
    "no value for a preset": (nothing, "paper.py --preset", "--preset", "Missing value"),
    "no such flag": (nothing, "paper.py --table 1", "Unrecognized options: --table"),
}  # fmt: skip


@pytest.mark.parametrize("what", TABLE)
def test_a_command_answers_in_one_line_and_leaves_nothing_half_written(what, place, capsys):
    before, line, *says = TABLE[what]
    before()
    kept = everything()
    assert call(line) == 2
    one_line(capsys, says)
    assert everything() == kept


# ---------------------------------------------------------------------------------------------------------------------
# Damaged data sets, whoever reads them

DAMAGED = {
    "no train.bin": (lambda: (DATA / "train.bin").unlink(), "train.bin: is missing"),
    "no val.bin": (lambda: (DATA / "val.bin").unlink(), "val.bin: is missing"),
    "train.bin truncated": (cut("train.bin", 1700), "train.bin: is damaged: meta.json says 18,000 tokens of 2 bytes, it has 1,700"),
    "train.bin of odd length": (cut("train.bin", 35_999), "train.bin: is damaged: meta.json says 18,000 tokens of 2 bytes, it has 35,999"),
    "train.bin empty": (cut("train.bin", 0), "train.bin: is damaged: meta.json says 18,000 tokens of 2 bytes, it has 0"),
    "an id beyond the vocabulary": (
        write({DATA / "val.bin": b"\x3a\0" * 2000}), "val.bin: holds the id 58, but the vocabulary ends at 57",
    ),
    "no meta.json": (lambda: (DATA / "meta.json").unlink(), "meta.json: is missing"),
    "meta.json empty": (cut("meta.json", 0), "meta.json: is not JSON"),
    "meta.json cut short": (cut("meta.json", 50), "meta.json: is not JSON"),
    "meta.json not UTF-8": (write({DATA / "meta.json": b"\xff\xfe"}), "meta.json: is not JSON in UTF-8"),
    "meta.json endless": (write({DATA / "meta.json": b"[" * 100_000}), "meta.json: is not JSON"),
    "meta.json a list": (write({DATA / "meta.json": b"[1]"}), "meta.json: is of version None, not 1"),
    "meta.json of another version": (meta(version=99), "meta.json: is of version 99, not 1"),
    "a count that is none": (meta(val_tokens="100"), "meta.json: 'val_tokens' is missing or no positive int"),
    "no count of bytes": (meta(train_bytes=0), "meta.json: 'train_bytes' is missing or no positive int"),
    "another type": (meta(dtype="uint32"), "meta.json: dtype is 'uint32', but 58 tokens need uint16"),
    "another tokenizer": (meta(tokenizer={"kind": "byte"}), "vocabulary of 58, but the tokenizer in it one of 257"),
    "a smaller tokenizer": (
        meta(tokenizer={"kind": "char", "characters": "ab"}, vocab_size=2), "train.bin: holds the id 57, but the vocabulary ends at 1",
    ),
    "a separator that is none": (meta(separator=3), "meta.json: 'separator' is no str"),
    "a version that is true": (meta(version=True), "meta.json: 'version' is missing or no positive int"),
    "sources that are none": (meta(sources={}), "meta.json: 'sources' is missing or no list"),
    "a vocabulary below nothing": (meta(vocab_size=-1), "meta.json: 'vocab_size' is missing or no positive int"),
    "more tokens than there are": (meta(train_tokens=18_001), "train.bin: is damaged: meta.json says 18,001 tokens of 2 bytes, it has 36,000"),
    "no split": (meta(split=None), "meta.json: 'split' is missing or no str"),
    "no tokenizer": (meta(tokenizer={"kind": "bpe"}), "meta.json: the tokenizer's description is malformed: it has no 'tokens'"),
}  # fmt: skip


@pytest.mark.parametrize("reader", ["train.py", "prepare_data.py --file play.txt", "load()"])
@pytest.mark.parametrize("what", DAMAGED)
def test_a_damaged_data_set_is_refused_with_the_name_of_the_file_and_left_as_it_is(what, reader, place, capsys):
    damage, says = DAMAGED[what]
    damage()
    kept = everything()
    if reader == "load()":
        with pytest.raises(BadInput) as error:
            load(DATA)
        assert says in str(error.value) and str(DATA) in str(error.value) and "\n" not in str(error.value)
    else:
        assert call(reader) == 2
        one_line(capsys, [str(DATA), says, "again"])
    assert everything() == kept


# ---------------------------------------------------------------------------------------------------------------------
# Damaged checkpoints, whoever reads them

BROKEN = {
    "truncated": (both(lambda path: os.truncate(path, 5000)), "is not a checkpoint of train.py, or a damaged one"),
    "empty": (both(lambda path: os.truncate(path, 0)), "is empty"),
    "a text": (both(lambda path: shutil.copy("play.txt", path)), "is not a checkpoint of train.py"),
    "a list": (both(lambda path: torch.save([1], path)), "is not a checkpoint of train.py"),
    "of another version": (checkpoint(format=99), "is of format 99, not 1: train it again with this train.py"),
    "with parts missing": (both(lambda path: torch.save({"format": 1, "step": 1}, path)), "is damaged: it has no model, optim"),
    "with parts of another type": (checkpoint(step="ten", best_loss=None), "is damaged: it has no step, best_loss"),
    "with other shapes": (
        checkpoint(model=lambda model: model | {"norm.weight": torch.ones(5)}), "does not fit its own config: size mismatch for norm",
    ),
    "with other names": (checkpoint(model={"weight": torch.ones(5)}), "does not fit its own config"),
    "with an unknown field": (checkpoint(config=lambda config: config | {"colour": 1}), "own config", "colour"),
    "a pickle that runs code": (both(lambda path: path.write_bytes(pickle.dumps(RunsCode()))), "is not a checkpoint of train.py"),
    "that runs code inside": (checkpoint(model=RunsCode()), "is not a checkpoint of train.py, or a damaged one"),
}  # fmt: skip


@pytest.mark.parametrize("reader", ["sample.py", RESUME, BEGIN])
@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_checkpoint_is_refused_with_its_name_left_as_it_is_and_never_executed(what, reader, place, capsys):
    damage, *says = BROKEN[what]
    if reader == BEGIN:  # the data set in the checkpoint's tokens
        prepare(file="play.txt", tokenizer=load_checkpoint(Path("run/best.pt"))["tokenizer"], data_dir="data")
    damage()
    kept = everything()
    assert call(reader) == 2
    one_line(capsys, ["run/latest.pt" if reader == RESUME else "run/best.pt", *says])
    assert everything() == kept  # it_ran is not among them


def test_the_pickle_of_these_tests_does_run_code_where_it_is_trusted(place):
    checkpoint(model=RunsCode())()
    torch.load("run/best.pt", weights_only=False)
    assert Path("it_ran").exists()


# ---------------------------------------------------------------------------------------------------------------------
# The Python API: BadInput, a ValueError, of one sentence (the model's are in test_mfa.py)

API = {
    "no such corpus": (lambda: prepare("bible", data_dir="data"), "--dataset bible: is not one of shakespeare"),
    "no such file": (lambda: prepare(file="a.txt", data_dir="data"), "--file a.txt: there is no such file or folder"),
    "no such tokenizer": (lambda: prepare(tokenizer="words", data_dir="data"), "--tokenizer words: is not one of char, byte"),
    "no such folder": (lambda: load("nowhere"), "nowhere: there is no such folder; make it with python prepare_data.py"),
    "a file for a folder": (lambda: load("play.txt"), "play.txt: there is no such folder"),
    "no checkpoint": (lambda: load_checkpoint(Path("a.pt")), "checkpoint a.pt is not there"),
    "a text for a checkpoint": (lambda: load_checkpoint(Path("play.txt")), "play.txt is not a checkpoint of train.py"),
    "a batch of nothing": (lambda: trainer.train(Train(batch_size=0)), "--batch_size must be positive, not 0"),
    "no GPU": (lambda: trainer.train(Train(device="cuda:99")), "--device cuda:99: not on this machine"),
    "a prompt that is too long": (
        lambda: sample.main(sample.Sample(Path("run/best.pt"), prompt="to be or not to be", device="cpu")), "--prompt has 18 tokens",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", API)
def test_a_call_raises_bad_input_of_one_sentence_and_leaves_nothing_half_written(what, place):
    call_it, says = API[what]
    kept = everything()
    with pytest.raises(BadInput) as error:
        call_it()
    assert says in str(error.value) and "\n" not in str(error.value)
    assert everything() == kept


# ---------------------------------------------------------------------------------------------------------------------
# Disks that are full, and folders that may not be written to


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no device that is always full")
@pytest.mark.parametrize(
    "line, file",
    [
        ("train.py", "new/latest.pt"),
        (RESUME, "run/best.pt"),
        ("prepare_data.py --tokenizer byte", "data/.shakespeare-byte.{pid}.tmp/val.bin"),
        ("prepare_data.py --file play.txt --overwrite", "data/.file-play-char.{pid}.tmp/meta.json"),
    ],
)
def test_a_full_disk_is_told_with_the_file_and_leaves_what_was_complete(line, file, place, capsys):
    def complete() -> dict:
        return {path: data for path, data in everything().items() if data is not None and path.name != "metrics.jsonl"}

    kept, path = complete(), Path(file.format(pid=os.getpid()))
    path.parent.mkdir(exist_ok=True)
    written = path.with_name(path.name + ".part")
    written.symlink_to("/dev/full")
    assert call(line) == 2
    one_line(capsys, [f"{path}: No space left on device"])
    assert complete() == kept


@pytest.fixture
def not_root(place):
    """As root every folder is writable: for these tests root becomes user 65534, who is held to permissions like others."""
    if not hasattr(os, "geteuid"):
        pytest.skip("Windows' folders have no such permission")
    locked = place / "locked"
    shutil.copytree("run", locked)
    place.chmod(0o755)
    locked.chmod(0o555)
    before = os.geteuid()
    if before == 0:
        os.seteuid(65534)
    yield
    os.seteuid(before)
    locked.chmod(0o755)


@pytest.mark.parametrize(
    "line, names",
    [
        ("train.py --out locked/new", "locked/new"),
        ("train.py --out locked --resume --max_iters 15", "locked/"),
        ("train.py --data_dir locked", "locked/"),
        ("prepare_data.py --file play.txt --data_dir locked", "locked/"),
        ("prepare_data.py --file play.txt --data_dir locked/data", "locked/data"),
    ],
)
def test_a_read_only_folder_is_named_and_left_as_it_is(line, names, not_root, place, capsys):
    kept = everything()
    assert call(line) == 2
    one_line(capsys, [names, "Permission denied"])
    assert everything() == kept


# ---------------------------------------------------------------------------------------------------------------------
# Ctrl-C, which may come at any line


def press_ctrl_c(sources: list[str], at: float, call_it) -> int:
    """Call call_it, with Ctrl-C when the at-th line of these source files is reached; returns how many lines were."""
    reached, tracer_before = 0, sys.gettrace()

    def tracer(frame, event, _):
        nonlocal reached
        # count_params: an interrupt at the end of its `with torch.device("meta")` would leave that on for this process.
        if frame.f_code.co_filename not in sources or frame.f_code.co_name == "count_params":
            return None
        if event == "line":
            reached += 1
            if reached == at:
                signal.raise_signal(signal.SIGINT)
        return tracer

    sys.settrace(tracer)
    try:
        call_it()
    finally:
        sys.settrace(tracer_before)
    return reached


def moments(lines: int, n: int) -> list[int]:
    """n lines of so many, evenly spread."""
    return [1 + round(k * (lines - 1) / (n - 1)) for k in range(n)]


def test_ctrl_c_at_any_line_of_preparing_leaves_the_data_set_of_before_or_after(place, capsys):
    def bytes_of_both() -> bytes:
        train, val, _ = load(DATA)
        return train.tobytes() + val.tobytes()

    def prepare_again():
        return prepare(file="play.txt", data_dir="data", overwrite=True)

    old, sources = bytes_of_both(), [prepare_data.__file__, files.__file__, shutil.__file__]
    Path("play.txt").write_text(Path("play.txt").read_text(encoding="utf-8")[::-1], encoding="utf-8")
    shutil.copytree("data", "spare")
    lines = press_ctrl_c(sources, math.inf, prepare_again)
    new = bytes_of_both()
    assert new != old and lines > 200
    for at in [*moments(lines, 40), *range(lines - 100, lines + 1)]:  # the folders change places near the end
        shutil.rmtree("data")
        shutil.copytree("spare", "data")
        with pytest.raises((KeyboardInterrupt, OSError)):  # OSError: shutil, interrupted, may close a file twice
            press_ctrl_c(sources, at, prepare_again)
        assert bytes_of_both() in (old, new), at
    prepare_again()
    assert bytes_of_both() == new


def test_ctrl_c_at_any_line_of_training_leaves_a_run_that_resumes_to_the_same_end(place, capsys, no_ceremony):
    line, codes = "train.py --max_iters 6 --eval_interval 2 --out ", []
    lines = press_ctrl_c([trainer.__file__], math.inf, lambda: call(line + "whole"))
    for at in moments(lines, 12):
        out = f"stopped{at}"
        press_ctrl_c([trainer.__file__], at, lambda: codes.append(call(line + out)))  # noqa: B023
        for path in Path(out).glob("*.pt"):
            load_checkpoint(path)
        assert call(f"{line}{out} --resume") == 0
        assert identical(state(Path(out, "latest.pt")), state(Path("whole/latest.pt")))
        assert not list(Path(out).glob("*.part"))
    assert set(codes) <= {0, 130} and codes.count(130) >= 10  # 0: it came when the last step was saved already


def test_ctrl_c_while_sampling_ends_it_in_one_word(place, capsys):
    kept = everything()
    lines = press_ctrl_c([sample.__file__], math.inf, lambda: call("sample.py"))
    for at in moments(lines, 6)[:-1]:
        codes = []
        press_ctrl_c([sample.__file__], at, lambda: codes.append(call("sample.py")))  # noqa: B023
        assert codes == [130] and capsys.readouterr().err == "interrupted\n"
    assert everything() == kept
