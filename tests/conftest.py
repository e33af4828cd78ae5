"""What tests of several files ask for by name."""

import os
import signal
import socket
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before support/decode.py is imported: its kernel then runs on a CPU
if os.name == "nt":
    os.environ["USE_LIBUV"] = "0"  # which PyTorch's wheels for Windows lack: torchrun fails without this
signal.signal(signal.SIGINT, signal.default_int_handler)  # under nohup it is ignored, and so it would be in the commands tested


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """A folder with a small text, play.txt, and what prepare_data.py makes of it."""
    from prepare_data import prepare

    folder = tmp_path_factory.mktemp("data")
    text = (Path(__file__).resolve().parents[1] / "data" / "shakespeare.txt").read_text(encoding="utf-8")
    (folder / "play.txt").write_text(text[:20_000], encoding="utf-8", newline="\n")
    prepare(file=str(folder / "play.txt"), data_dir=folder)
    return folder


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Small models are faster on one thread, and tests of speed-less things need no more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def no_ceremony(monkeypatch):
    """Runs end without a plot and a sample, which take longer than the rest of a small run."""
    from support.progress import Progress

    monkeypatch.setattr(Progress, "plot", lambda *_: None)
    monkeypatch.setattr(Progress, "finish", lambda *_: None)


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """The embedded Shakespeare by byte: the text of the studies at toy size."""
    from prepare_data import prepare

    data_dir = tmp_path_factory.mktemp("study_text")
    return prepare("shakespeare", tokenizer="byte", data_dir=data_dir)


@pytest.fixture(scope="session")
def smoke(tmp_path_factory, folder) -> Path:
    """The results of every study at toy size: a minute."""
    from runs import command

    from experiments.study import run

    path = tmp_path_factory.mktemp("smoke") / "results" / "study.jsonl"
    flags = ["--smoke", "--device=cpu", f"--data_dir={folder.parent}", "--study=all"]
    torch.set_num_threads(1)
    assert command(run.main, run.Args, [*flags, f"--results={path}"]) == 0
    return path
