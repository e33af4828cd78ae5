"""What tests of several files ask for by name."""

import os
import signal
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before experiments/decode.py is imported: its kernel then runs on a CPU
signal.signal(signal.SIGINT, signal.default_int_handler)  # under nohup it is ignored, and so it would be in the commands tested


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """A folder with a small text, play.txt, and what prepare_data.py makes of it."""
    from prepare_data import prepare

    folder = tmp_path_factory.mktemp("data")
    text = (Path(__file__).resolve().parents[1] / "data" / "shakespeare.txt").read_text(encoding="utf-8")
    (folder / "play.txt").write_text(text[:20_000], encoding="utf-8")
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
    import train

    monkeypatch.setattr(train, "plot", lambda *_: None)
    monkeypatch.setattr(train, "finish", lambda *_: None)
