"""What support/cli.py promises, here with the flags of prepare_data.py."""

import errno
import io
import json
import os
import subprocess
import sys

import pytest
from texts import ROOT, run

from prepare_data import Args
from support.cli import BadInput, run_command, typed


def ends_with(capsys, error: BaseException) -> tuple[int, str]:
    def main(args):
        raise error

    with pytest.raises(SystemExit) as stop:
        run_command(main, Args, [])
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
        run_command(main, Args, [])


def test_run_command_takes_hyphens_underscores_and_defaults(capsys):
    seen = []
    for flag in ("--vocab_size", "--vocab-size"):
        run_command(seen.append, Args, [flag, "300"], defaults=lambda argv: Args(context=len(argv)))
    assert seen == [Args(vocab_size=300, context=2)] * 2
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


# Where Python believes that everything is ASCII, as in some containers.
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def test_what_is_typed_outside_ascii_is_what_is_meant_whatever_the_locale(tmp_path):
    def done(*argv: str) -> str:
        environment = {**os.environ, **ASCII, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, *argv]
        return subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, check=True).stdout.decode("utf-8")

    (tmp_path / "a.txt").write_text("un été — l'hiver — " * 200, encoding="utf-8")
    sizes = "--block_size=16 --n_layer=1 --dim=32 --head_dim=8 --max_iters=1 --device=cpu --data_dir=d --out=run".split()
    done(str(ROOT / "train.py"), "--file=a.txt", "--separator= — ", "--tokenizer=byte", *sizes)
    meta = json.loads((tmp_path / "d" / "file-a-byte" / "meta.json").read_text())
    assert meta["separator"] == " — " and meta["train_documents"] == 360
    said = done(str(ROOT / "sample.py"), "--checkpoint=run/best.pt", "--prompt=été", "--max_new_tokens=1", "--device=cpu")
    assert said.split("\n\n")[1].startswith("été")


@pytest.mark.parametrize("text", ["été", "東京", "", "plain", "\ud800", "caf\udce9"])
def test_what_was_typed_in_utf8_or_cannot_be_known_stays_as_it_is(text):
    assert typed(text) == text


def test_output_is_utf8_whatever_the_terminal_says(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="cp1252"))
    run_command(lambda args: print("東京 \udcff"), Args, [])
    assert raw.getvalue().decode("utf-8").strip() == "東京 ?"
