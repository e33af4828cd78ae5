"""train.py --help is in groups, --attn first, and leaves no flag out."""

import re
from dataclasses import fields

from runs import command

from mfa import Config
from sample import Sample
from support.help import GROUPS
from train import Train, defaults


def shown(capsys, args_type, start=None) -> str:
    assert command(lambda args: None, args_type, ["--help"], start) == 0
    return capsys.readouterr().out


def test_every_flag_of_train_is_in_a_group_and_shown_once(capsys):
    text = shown(capsys, Train, defaults)
    flags = re.findall(r"(?m)^ +--(\w+)", text)
    names = {f.name for f in (*fields(Train), *fields(Config))} - {"model"}
    assert set(flags) == names and len(flags) == len(names)
    assert names <= set(" ".join(GROUPS.values()).split())
    assert flags[0] == "attn"


def test_the_groups_have_titles_in_their_order(capsys):
    text = shown(capsys, Train, defaults)
    assert re.findall(r"(?m)^(\S.*):$", text) == list(GROUPS)


def test_the_help_of_other_commands_is_tyro_s_own(capsys):
    text = shown(capsys, Sample)
    assert "options" in text and "--prompt" in text and "the run:" not in text
