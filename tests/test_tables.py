"""experiments/paper/tables.py: the paper's numbers come out, to the printed digit or with a reason."""

import os
import subprocess
import sys

import pytest
from runs import ROOT

from experiments.paper.tables import (
    Args,
    Figure,
    as_printed,
    figures,
    main,
    measured_ranks,
    table1,
)
from mfa import PRESETS


@pytest.fixture(scope="module")
def rows() -> list[Figure]:
    return figures()


def ours(rows, where: str, what: str) -> float:
    (row,) = [row for row in rows if row.where == where and what in row.what]
    return row.ours


# --------------------------------------------------------------------------------------------------
# Figures


def test_what_differs_from_the_paper_is_known_and_has_a_footnote(rows):
    differs = [
        (row.where, row.what, row.rounded, row.paper)
        for row in rows
        if row.paper and not row.agrees
    ]
    assert differs == [
        ("Abstract", "MFA-KR saves of MHA's cache", "93.8%", "93.7%"),
        ("Table 2", "MFA: average of the twelve scores", "50.0", "49.9"),
        ("Section 4.4", "parameters added by 1.75 H, not factored", "12%", "10%"),
        ("Table 4", "MHA: bytes of cache per token", "164K", "163K"),
        ("Table 5", "MHA, ALiBi: bytes of cache per token", "164K", "163K"),
        ("Table 7", "MFA-KR, experts as printed: parameters", "7.0B", "6.9B"),
        ("Table 8", "1B: parameters", "1.2B", "1.0B"),
        ("Table 8", "2B: parameters", "2.1B", "2.2B"),
        ("Table 8", "5B: parameters", "5.6B", "5.5B"),
    ]
    assert all(row.note for row in rows if row.paper and not row.agrees)


@pytest.mark.parametrize(
    "where, what, figure",
    [
        ("Table 2", "MHA: bytes", 196_608),
        ("Table 2", "MFA: bytes", 24_576),
        ("Table 2", "MFA-KR: bytes", 12_288),
        ("Table 4", "MHA: bytes", 163_840),
        ("Table 4", "MFA: bytes", 20_480),
        ("Table 4", "gated key reuse: bytes", 10_240),
        ("Figure 1", "MLA", 23_040),
        ("Table 6", "compressed key: bytes", 12_800),
        ("Table 6", "single key: bytes", 5_120),
        ("Table 6", "compressed value: bytes", 10_240),
        ("Table 6", "single value: bytes", 5_120),
        ("Abstract", "MFA-KR saves of MLA's", 1 - 10_240 / 23_040),
        ("Abstract", "MFA-KR saves of MHA's", 0.9375),
    ],
)
def test_the_figures_of_the_design(rows, where, what, figure):
    assert ours(rows, where, what) == figure


def test_figures_given_to_fewer_digits(rows):
    added = [
        ours(rows, "Table 3", f"parameters added by 1.75 H, {how}")
        for how in ("not factored", "factored")
    ]
    assert [f"{a / 1e6:.1f}M" for a in added] == ["125.8M", "7.9M"]
    total = [ours(rows, "Table 7", f"{name}: parameters") for name in ("MHA", "MFA")]
    active = [ours(rows, "Table 7", f"{name}: activated") for name in ("MHA", "MFA")]
    assert [f"{t / 1e9:.2f}" for t in total + active] == ["6.93", "6.92", "1.18", "1.18"]


@pytest.mark.parametrize(
    "value, like, printed",
    [(196_608, "1.2K", "196.6K"), (0.5556, "56%", "56%"), (1.083e9, "1.08B", "1.08B"), (49.96, "49.9", "50.0"),
     (7_864_320, "1.0M", "7.9M")],
)  # fmt: skip
def test_rounding_follows_the_printed_form(value, like, printed):
    assert as_printed(value, like) == printed


# --------------------------------------------------------------------------------------------------
# Table 1


@pytest.mark.parametrize("name", PRESETS)
def test_table_1_holds_for_every_preset(name):
    """The paper's formulas, counts() and real tensors agree; the paper takes C > d, which tiny MLAs have not."""
    for row in table1(name):
        assert (row.counts.kv_cache, row.counts.params) == (row.kv_cache, row.params)
        if row.attn != "mla" or row.counts.shared_dim > row.printed.rank:
            assert row.printed == row.counts, row.attn
        else:
            assert row.printed[:3] == row.counts[:3] and row.counts.rank == row.counts.shared_dim


@pytest.mark.parametrize("name", ["tiny", "paper-1b"])
def test_its_rank_columns_are_measured(name):
    for attn, counts, measured in measured_ranks(name):
        assert measured.heads == [counts.rank] * counts.heads, attn
        assert (sum(measured.heads), measured.key_side) == (counts.total_rank, counts.shared_dim), (
            attn
        )


# --------------------------------------------------------------------------------------------------
# The command


def test_the_command_prints_table_1_and_every_figure_within_120_columns(rows, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    main(Args(preset="tiny"))
    printed = capsys.readouterr().out
    assert "Table 1 for tiny" in printed and all(row.what in printed for row in rows)
    assert max(map(len, printed.splitlines())) <= 120
    assert "Next: " in printed.splitlines()[-2]


def test_the_command_runs_in_any_folder_and_refuses_an_unknown_preset_in_one_line(tmp_path):
    path = os.pathsep.join(
        [str(ROOT), os.environ.get("PYTHONPATH", "")]
    )  # so that it also runs where not installed
    command = [sys.executable, str(ROOT / "experiments" / "paper.py"), "--preset", "nano"]
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stdout == ""
    assert (
        done.stderr.startswith("error: --preset must be one of tiny, baby")
        and done.stderr.count("\n") == 1
    )
