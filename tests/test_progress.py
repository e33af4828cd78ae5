"""What is said of a training's pace, without a clock."""

import pytest
import torch
from runs import small

from support.machine import Machine
from support.progress import Pace, Progress
from train import train


def told(*seconds: float, steps: int = 50) -> list[float]:
    pace = Pace()
    return [pace.slower(steps, each) for each in seconds]


def test_steps_that_take_far_longer_than_the_ones_before_are_noticed_once():
    assert told(5, 5.5, 50, 55, 5, 500) == [0, 0, 10, 0, 0, 0]


def test_the_pace_is_that_of_a_step_whatever_their_number():
    pace = Pace()
    assert [pace.slower(50, 5.0), pace.slower(500, 50.0), pace.slower(10, 8.0)] == [0, 0, pytest.approx(8)]


def test_neither_the_first_steps_nor_faster_ones_nor_a_little_slower_ones_are_told():
    assert told(500) == [0] and told(50, 5, 1) == [0] * 3 and told(5, 19) == [0, 0]


def test_in_less_than_two_seconds_chance_decides():
    assert told(0.01, 1.9) == [0, 0] and told(0.01, 2.1)[1] > 100 and told(0, 0) == [0, 0]


@pytest.mark.parametrize(("threads", "lines"), [(2, 1), (1, 0)])
def test_the_line_names_the_way_out_where_there_is_one(threads, lines, data, tmp_path, monkeypatch, capsys):
    laps = iter([5.0] * 10 + [60.0] + [5.0] * 90)
    monkeypatch.setattr(Progress, "lap", lambda self: next(laps))
    monkeypatch.setattr(Progress, "finish", lambda *_: None)
    monkeypatch.setattr(Progress, "plot", lambda *_: None)
    train(small(data, tmp_path, threads=threads))
    line = "times as long as the ones before: on a shared machine two threads can be ten times slower than one: try --threads 1\n"
    assert capsys.readouterr().out.count(line) == lines


def test_a_training_has_the_threads_asked_for_and_gives_them_back():
    before = torch.get_num_threads()
    with Machine("cpu", threads=before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before
    with Machine("cpu"):
        assert torch.get_num_threads() == before
