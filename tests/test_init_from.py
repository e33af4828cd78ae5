"""--init_from: a new run that begins with another's weights, in its tokens."""

import re
import signal

import pytest
import torch
from runs import ROOT, command, files_below, rows, state, text
from test_train import signals_at

import prepare_data
import sample
import train as trainer
from experiments.probes.kill_test import identical
from mfa import ATTENTION
from prepare_data import load, prepare
from support.run_folder import load_checkpoint
from support.tokenizers import tokenizer_from
from train import Train, defaults

pytestmark = pytest.mark.usefixtures("no_ceremony")
SIZES = "--block_size=16 --n_layer=1 --dim=32 --head_dim=8".split()
RECIPE = "--max_iters=20 --batch_size=4 --warmup_iters=5 --eval_interval=10 --log_interval=1 --device=cpu".split()


def run_train(*flags) -> int:
    return command(trainer.main, Train, [*RECIPE, *flags], defaults)


@pytest.fixture(scope="module")
def origins(data, tmp_path_factory):
    """Runs of MHA on play.txt in three tokenizers, and a second text of the same characters, other.txt."""
    folder = tmp_path_factory.mktemp("origins")
    play = (data / "play.txt").read_text(encoding="utf-8")
    (folder / "other.txt").write_text(play[::-1], encoding="utf-8", newline="\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.Progress, "plot", lambda *_: None)
        patch.setattr(trainer.Progress, "finish", lambda *_: None)
        for kind, more in (("char", []), ("byte", []), ("bpe", ["--vocab_size=300"])):
            flags = ["--attn=mha", f"--tokenizer={kind}", f"--out={folder / kind}", *more]
            assert run_train(*SIZES, *flags, *text(data)) == 0
    return folder


def beginning(origins, tmp_path, kind: str = "char", file: str = "other.txt") -> list[str]:
    """The flags of a run in tmp_path / new that begins with the weights of origins / kind."""
    own = file if "/" in file else origins / file
    flags = [f"--init_from={origins / kind / 'best.pt'}", f"--file={own}", f"--data_dir={tmp_path / 'data'}"]
    return [*flags, f"--out={tmp_path / 'new'}"]


def test_a_new_run_begins_with_the_weights_and_sizes_of_a_checkpoint_at_step_0(origins, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(trainer, "learning_rate", lambda *_: 0.0)
    assert run_train(*beginning(origins, tmp_path), "--max_iters=2") == 0
    begun, origin = (load_checkpoint(path) for path in (tmp_path / "new" / "latest.pt", origins / "char" / "best.pt"))
    assert identical(begun["model"], origin["model"]) and begun["config"] == origin["config"]
    assert begun["step"] == 2 and [row["step"] for row in rows(tmp_path / "new")] == [1, 2, 2]
    assert {int(moments["step"]) for moments in begun["optimizer"]["state"].values()} == {2}, "a fresh optimizer"
    assert f"weights: begun with those of {origins / 'char' / 'best.pt'}\n" in capsys.readouterr().out


def test_it_learns_the_other_text_from_where_the_weights_are(origins, tmp_path):
    assert run_train(*beginning(origins, tmp_path, "byte", str(ROOT / "data" / "shakespeare.txt"))) == 0
    first = next(row for row in rows(tmp_path / "new") if "train_loss" in row)["train_loss"]
    began = next(row for row in rows(origins / "byte") if "train_loss" in row)["train_loss"]
    assert first < began - 0.3


@pytest.mark.parametrize("kind", ["char", "byte", "bpe"])
def test_the_text_is_encoded_by_the_checkpoint_s_tokenizer_in_a_data_set_of_its_own(kind, origins, tmp_path):
    other = origins / "other.txt"
    plain = prepare(file=str(other), tokenizer=kind, vocab_size=300 if kind == "bpe" else None, data_dir=tmp_path / "data")
    before = files_below(plain)
    assert run_train(*beginning(origins, tmp_path, kind)) == 0
    spec = load_checkpoint(origins / kind / "best.pt")["tokenizer"]
    assert load_checkpoint(tmp_path / "new" / "best.pt")["tokenizer"] == spec
    folders = {path.name for path in (tmp_path / "data").iterdir()}
    own = folders - {plain.name}
    assert len(own) == 1 and re.fullmatch(rf"file-other-{kind}\.[0-9a-f]{{8}}", min(own))
    train, val, meta = load(tmp_path / "data" / min(own))
    tokenizer = tokenizer_from(spec)
    ids = [i for part in (train, val) for i in part.tolist() if i != tokenizer.eot]
    assert tokenizer.decode(ids) == other.read_text(encoding="utf-8")
    assert meta["tokenizer"] == spec and meta["dataset"] == "file-other"
    assert files_below(plain) == before
    if kind == "bpe":
        assert load(plain)[2]["tokenizer"] != spec, "merges of its own"


def test_the_first_character_that_the_tokenizer_lacks_is_named(origins, tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("to be, or\n" * 900 + "ça été\n" * 100, encoding="utf-8", newline="\n")
    assert run_train(*beginning(origins, tmp_path, file=str(tmp_path / "mine.txt"))) == 2
    err = capsys.readouterr().err
    what = "mine.txt: character 'ç' (U+00E7) at position 9,000 is not among the 58 characters of the checkpoint's tokenizer"
    assert what in err and err.count("\n") == 1 and "begin with a checkpoint of --tokenizer byte or bpe" in err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    for kind in ("byte", "bpe"):
        out = f"--out={tmp_path / kind}"
        assert run_train(*beginning(origins, tmp_path, kind, str(tmp_path / "mine.txt")), out, "--max_iters=1") == 0


@pytest.mark.parametrize(
    ("flag", "says"),
    [
        ("--dim=64", "dim is 32 there, not 64"),
        ("--attn=mfa", "attn is 'mha' there, not 'mfa'"),
        ("--pos=alibi", "pos is 'rope' there, not 'alibi'"),
        ("--vocab_size=100", "vocab_size is 58 there, not 100"),
        ("--tokenizer=byte", "tokenizer is 'char' there, not 'byte'"),
        ("--preset=baby", "preset is 'tiny' there, not 'baby'"),
    ],
)
def test_a_flag_that_contradicts_the_checkpoint_is_refused_in_one_line(flag, says, origins, tmp_path, capsys):
    assert run_train(*beginning(origins, tmp_path), flag) == 2
    err = capsys.readouterr().err
    assert err == f"error: --init_from {origins / 'char' / 'best.pt'}: {says}; leave these flags out, or train a new model without --init_from\n"
    assert not list(tmp_path.iterdir())


def test_what_is_about_training_alone_may_differ(origins, tmp_path):
    flags = "--dropout=0.1 --learning_rate=1e-4 --batch_size=8 --optimizer=muon".split()
    assert run_train(*beginning(origins, tmp_path), *flags) == 0
    assert load_checkpoint(tmp_path / "new" / "best.pt")["config"]["dropout"] == 0.1


def test_such_a_run_is_resumed_to_the_last_bit_when_its_origin_is_gone(origins, tmp_path, monkeypatch, capsys):
    copy = tmp_path / "copy" / "char" / "best.pt"
    copy.parent.mkdir(parents=True)
    copy.write_bytes((origins / "char" / "best.pt").read_bytes())
    (tmp_path / "copy" / "other.txt").write_bytes((origins / "other.txt").read_bytes())
    flags = [*beginning(tmp_path / "copy", tmp_path), "--dropout=0.1"]
    assert run_train(*flags, f"--out={tmp_path / 'whole'}") == 0
    signals_at(monkeypatch, {13: signal.SIGTERM})
    assert run_train(*flags) == 128 + signal.SIGTERM
    copy.unlink()
    capsys.readouterr()
    assert run_train("--resume", f"--out={tmp_path / 'new'}") == 0
    assert f"begun with those of {copy}" in capsys.readouterr().out
    assert identical(state(tmp_path / "new" / "latest.pt"), state(tmp_path / "whole" / "latest.pt"))
    assert rows(tmp_path / "new") == rows(tmp_path / "whole")
    other = f"--init_from={origins / 'byte' / 'best.pt'}"
    assert run_train("--resume", f"--out={tmp_path / 'new'}", "--max_iters=25", other) == 2
    assert "is of another run: init_from was" in capsys.readouterr().err


def test_a_run_begun_with_an_attention_of_ones_own_keeps_its_file_too(data, origins, tmp_path):
    before = dict(ATTENTION)
    try:
        mine = tmp_path / "mine.py"
        mine.write_bytes((ROOT / "examples" / "my_attention.py").read_bytes())
        flags = [f"--plugin={mine}", "--attn=tied2", "--n_head=4", f"--out={tmp_path / 'char'}"]
        assert run_train(*SIZES, *flags, *text(data)) == 0
        mine.unlink()
        ATTENTION.pop("tied2")  # as in a new process
        (tmp_path / "other.txt").write_bytes((origins / "other.txt").read_bytes())
        assert run_train(*beginning(tmp_path, tmp_path)) == 0
        for path in (tmp_path / "char").iterdir():
            path.unlink()
        ATTENTION.pop("tied2")
        assert run_train("--resume", f"--out={tmp_path / 'new'}", "--max_iters=24") == 0
        ATTENTION.pop("tied2")
        best = f"--checkpoint={tmp_path / 'new' / 'best.pt'}"
        assert command(sample.main, sample.Sample, [best, "--max_new_tokens=5", "--device=cpu"]) == 0
    finally:
        ATTENTION.clear()
        ATTENTION.update(before)


def test_another_version_of_that_attention_is_refused(data, origins, tmp_path, capsys):
    before = dict(ATTENTION)
    try:
        mine = tmp_path / "mine.py"
        mine.write_bytes((ROOT / "examples" / "my_attention.py").read_bytes())
        flags = [f"--plugin={mine}", "--attn=tied2", "--n_head=4", f"--out={tmp_path / 'char'}"]
        assert run_train(*SIZES, *flags, "--max_iters=1", *text(data)) == 0
        mine.write_bytes(mine.read_bytes() + b"\n# changed\n")
        assert run_train(*beginning(tmp_path, tmp_path, file=str(origins / "other.txt")), f"--plugin={mine}") == 2
        assert f"its attention is that of {tmp_path / 'char' / 'mine.py'}, not of {mine}" in capsys.readouterr().err
    finally:
        ATTENTION.clear()
        ATTENTION.update(before)


def test_documents_of_the_other_text_are_divided_by_the_separator(origins, tmp_path):
    (tmp_path / "mine.txt").write_text("to be, or\n\nnot to be\n\n" * 100, encoding="utf-8", newline="\n")
    flags = beginning(origins, tmp_path, "byte", str(tmp_path / "mine.txt"))
    assert run_train(*flags, "--separator=\\n\\n", "--max_iters=1") == 0
    _, _, meta = load(next((tmp_path / "data").iterdir()))
    assert meta["separator"] == "\n\n" and meta["train_documents"] + meta["val_documents"] == 200


def test_prepare_takes_a_tokenizer_that_there_is(origins, tmp_path):
    spec = load_checkpoint(origins / "bpe" / "best.pt")["tokenizer"]
    one, again = (prepare(file=str(origins / "other.txt"), tokenizer=spec, data_dir=tmp_path) for _ in range(2))
    assert one == again == prepare_data.folder_for("shakespeare", spec, None, str(origins / "other.txt"), tmp_path)
    assert torch.tensor(load(one)[0][:100].astype("int64")).max() < 300
    with pytest.raises(ValueError, match="malformed"):
        prepare(tokenizer={"kind": "words"}, data_dir=tmp_path)
