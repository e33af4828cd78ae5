"""--log: what metrics.jsonl gets goes to a tracker too. The trackers here are stand-ins that remember what they are told."""

import signal
import sys
from types import ModuleType

import pytest
from runs import FLAGS, command, rows, small, text
from test_train import signals_at

import train as trainer
from support.log import Tracker
from support.run_folder import Run
from train import Train, defaults, train

pytestmark = pytest.mark.usefixtures("no_ceremony")


class Remembering:
    """A run of wandb or trackio, and a SummaryWriter."""

    def __init__(self, *args, **options):
        self.args, self.options, self.logged, self.closed = args, options, [], False

    def log(self, row, step):
        self.logged.append((step, dict(row)))

    def add_scalar(self, key, value, step):
        self.logged.append((step, {key: value}))

    def add_text(self, *_):
        pass

    def flush(self):
        pass

    def finish(self):
        self.closed = True

    close = finish


@pytest.fixture
def runs(monkeypatch):
    """The runs that were begun, in each of the three trackers."""
    found = {name: [] for name in ("wandb", "trackio", "tensorboard")}

    def begin(name):
        def init(*args, **options):
            found[name].append(Remembering(*args, **options))
            return found[name][-1]

        return init

    for name in found:
        module = ModuleType(name)
        module.init = module.SummaryWriter = begin(name)
        monkeypatch.setitem(sys.modules, "torch.utils.tensorboard" if name == "tensorboard" else name, module)
    return found


def sent(run: Remembering) -> dict[int, dict]:
    """What a run was told, by step, without what a clock says."""
    by_step = {}
    for step, row in run.logged:
        by_step.setdefault(step, {}).update({k: v for k, v in row.items() if k not in ("seconds", "tokens_per_s")})
    return by_step


def written(out) -> dict[int, dict]:
    by_step = {}
    for row in rows(out):
        by_step.setdefault(row.pop("step"), {}).update(row)
    return by_step


@pytest.mark.parametrize("kind", ["wandb", "trackio", "tensorboard"])
def test_every_row_of_metrics_goes_there_and_the_run_is_closed(kind, data, tmp_path, runs):
    train(small(data, tmp_path / "mine", log=kind))
    (run,) = runs[kind]
    assert sent(run) == written(tmp_path / "mine") and len(sent(run)) == 20 and run.closed
    if kind == "tensorboard":
        assert run.args[0].startswith(str(tmp_path / "mine" / "tensorboard"))
    else:
        assert run.options["name"].startswith("mine-") and run.options["config"]["max_iters"] == 20


@pytest.mark.parametrize("kind", ["wandb", "trackio", "tensorboard"])
def test_a_training_that_goes_on_is_the_same_run_and_one_that_replaces_it_another(kind, data, tmp_path, runs, monkeypatch):
    signals_at(monkeypatch, {13: signal.SIGTERM})
    assert train(small(data, tmp_path, log=kind))["stopped"]
    train(small(data, tmp_path, log=kind, resume=True))
    train(small(data, tmp_path, log=kind, overwrite=True))
    first, second, other = runs[kind]
    assert sent(first) | sent(second) == written(tmp_path) and min(sent(second)) == 14
    if kind == "tensorboard":
        assert first.args == second.args != other.args
        assert [run.options["purge_step"] for run in (first, second, other)] == [None, 14, None]
    else:
        assert first.options["name"] == second.options["name"] != other.options["name"]
        assert second.options["resume"] == "allow"
        assert kind == "trackio" or first.options["id"] == second.options["id"]


def test_a_run_may_begin_or_cease_to_be_followed(data, tmp_path, runs):
    train(small(data, tmp_path))
    assert not any(runs.values()) and not (tmp_path / "log_id.txt").exists()
    train(small(data, tmp_path, log="wandb", resume=True, max_iters=24))
    assert min(sent(runs["wandb"][0])) == 21
    train(small(data, tmp_path, resume=True, max_iters=26))
    assert len(runs["wandb"]) == 1


def test_processes_other_than_the_first_tell_nothing(data, tmp_path, runs, monkeypatch):
    monkeypatch.setattr(trainer.Machine, "first", property(lambda self: False))
    monkeypatch.setattr(Run, "rows", lambda self: [])
    train(small(data, tmp_path, log="wandb"))
    assert not any(runs.values())


@pytest.mark.parametrize("kind", ["wandb", "trackio", "tensorboard"])
def test_a_tracker_that_is_not_installed_is_one_line_before_anything_is_written(kind, data, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard" if kind == "tensorboard" else kind, None)
    assert command(trainer.main, Train, [*FLAGS, f"--log={kind}", f"--out={tmp_path / 'new'}", *text(data)], defaults) == 2
    assert capsys.readouterr().err == f"error: --log {kind}: it is not installed: pip install {kind}\n"
    assert not (tmp_path / "new").exists()


def test_a_tracker_that_cannot_begin_is_one_line_and_there_is_no_run(data, tmp_path, runs, monkeypatch, capsys):
    def refuse(**_):
        raise RuntimeError("no API key\nfor anybody")

    monkeypatch.setattr(sys.modules["wandb"], "init", refuse)
    assert command(trainer.main, Train, [*FLAGS, "--log=wandb", f"--out={tmp_path / 'new'}", *text(data)], defaults) == 2
    assert capsys.readouterr().err == "error: --log wandb: RuntimeError: no API key: set it up, or leave --log out\n"
    assert not list((tmp_path / "new").iterdir())


def test_a_tracker_that_fails_on_the_way_does_not_stop_the_training(data, tmp_path, runs, monkeypatch, capsys):
    def fail(self, row, step):
        raise ConnectionError("gone")

    monkeypatch.setattr(Remembering, "log", fail)
    assert train(small(data, tmp_path, log="wandb"))["step"] == 20
    assert capsys.readouterr().out.count("--log wandb has failed and is left out from here on: ConnectionError: gone") == 1


def test_the_losses_are_those_of_a_run_that_nobody_follows(data, tmp_path, runs):
    for name, kind in (("a", "none"), ("b", "tensorboard")):
        train(small(data, tmp_path / name, log=kind))
    assert rows(tmp_path / "a") == rows(tmp_path / "b")


def test_a_folder_with_a_tracker_of_its_own_name(tmp_path, runs):
    for step in (None, 3, None):
        Tracker("trackio", tmp_path, {}, step).close()
    names = [run.options["name"] for run in runs["trackio"]]
    assert names[0] == names[1] != names[2]
