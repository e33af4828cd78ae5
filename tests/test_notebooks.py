"""Notebooks: script and .ipynb in step, and the structure that makes them readable. .ci/run executes them with nbmake."""

import functools
import re
import sys
from pathlib import Path

import nbformat
import pytest

pytest.importorskip("jupytext")
pytest.importorskip("nbclient")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "notebooks"))

import build  # noqa: E402

SCRIPTS = build.scripts()
LESSONS = [script for script in SCRIPTS if script.parent == build.HERE]
CHECK = re.compile(r"^\s*(assert|close\(|nb\.close\(|check\()", re.M)
MACHINE = re.compile(r"/work\b|/tmp\b|/home/|/Users/|/root/|site-packages")
NETWORK = re.compile(r"\b(urllib|requests|socket|subprocess|wget|curl|https?:)")


@functools.cache
def cells(script: Path, kind: str) -> list[str]:
    return [source for cell_type, source in build.sources(build.read(script)) if cell_type == kind]


@functools.cache
def executed(script: Path) -> list[nbformat.NotebookNode]:
    """The code cells of the .ipynb, with their outputs."""
    notebook = nbformat.read(script.with_suffix(".ipynb"), as_version=4)
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(script: Path) -> str:
    return "".join(output.get("text", "") for cell in executed(script) for output in cell.outputs)


def name(script: Path) -> str:
    return script.stem


everything = pytest.mark.parametrize("script", SCRIPTS, ids=name)
lessons = pytest.mark.parametrize("script", LESSONS, ids=name)


def test_lessons_are_numbered_and_each_has_a_solution_and_nothing_lies_about():
    assert len(LESSONS) >= 6 and [s.stem[:2] for s in LESSONS] == [f"{n:02}" for n in range(1, len(LESSONS) + 1)]
    assert [s.stem.removesuffix("_solutions") for s in SCRIPTS if s not in LESSONS] == [s.stem for s in LESSONS]
    built = {p.stem for p in build.HERE.rglob("[0-9]*.ipynb") if ".ipynb_checkpoints" not in p.parts}
    assert built == {s.stem for s in SCRIPTS}


@everything
def test_the_notebook_is_its_script_executed(script):
    assert build.in_step(script), f"run python notebooks/build.py {script.stem}"


@everything
def test_every_plot_is_a_picture_in_the_notebook(script):
    for cell in executed(script):
        pictures = [output for output in cell.outputs if "image/png" in output.get("data", {})]
        assert bool(pictures) == ("plt." in cell.source and "plt.show()" in cell.source), cell.source


@everything
def test_one_repository_address(script):
    text = script.read_text(encoding="utf-8")
    assert build.with_repository(text) == text and text.count(build.REPOSITORY) == 2  # badge, first cell
    assert f"/notebooks/{script.relative_to(build.HERE).with_suffix('.ipynb').as_posix()})" in text


@everything
def test_small_and_free_of_the_machine_it_was_built_on(script):
    path = script.with_suffix(".ipynb")
    assert path.stat().st_size < 300_000
    assert not MACHINE.search(path.read_text(encoding="utf-8"))


@everything
def test_code_cells_are_short(script):
    lines = {cell: sum(bool(line.strip()) for line in cell.splitlines()) for cell in cells(script, "code")}
    long = {cell.splitlines()[0]: n for cell, n in lines.items() if n > 15}
    assert not long, f"over 15 lines: {long}"


@everything
def test_the_first_cell_is_the_common_one_and_the_others_need_no_network(script):
    assert cells(script, "code")[0] == cells(SCRIPTS[0], "code")[0]
    assert not any(NETWORK.search(cell) for cell in cells(script, "code")[1:])


@lessons
def test_structure(script):
    code, prose = cells(script, "code"), cells(script, "markdown")
    assert 15 <= len(code) <= 25
    assert sum(bool(CHECK.search(cell)) for cell in code) >= 8, "most cells should be able to fail"
    assert sum("plt.show()" in cell for cell in code) >= 2
    for needed in ("**The story.**", "**After this notebook you can**", "**Time:**"):
        assert needed in prose[0]
    words, code_words = (sum(len(re.findall(r"\w+", cell)) for cell in part) for part in (prose, code))
    assert 0.5 < words / code_words < 2, "about as much prose as code"


@lessons
def test_exercises_are_open_in_the_lesson_and_right_in_the_solution(script):
    solution = build.HERE / "solutions" / f"{script.stem}_solutions.py"
    for notebook in (script, solution):
        assert re.findall(r"^check\((\d)", "\n".join(cells(notebook, "code")), re.M) == ["1", "2", "3"]
    assert "## Exercises" in "\n".join(cells(script, "markdown"))
    assert re.findall(r"Exercise (\d): not answered yet. Hint: \w", printed(script)) == ["1", "2", "3"]
    assert re.findall(r"Exercise (\d): right\.", printed(solution)) == ["1", "2", "3"]
    assert cells(solution, "code")[-1] == "nb.all_right()"  # so that CI fails where an answer is wrong


@lessons
def test_nothing_of_the_model_is_redefined(script):
    text = "\n".join(cells(script, "code"))
    assert not re.search(r"^class ", text, re.M), "attentions are imported from mfa.py"
    assert re.search(r"^from mfa import ", text, re.M)


@lessons
def test_the_readme_lists_it(script):
    assert f"[{script.stem}]({script.stem}.ipynb)" in (build.HERE / "README.md").read_text(encoding="utf-8")


def test_a_wrong_answer_gets_the_hint_and_only_a_right_one_counts(capsys):
    import nb

    for answer in (..., 3.0, float("nan"), [3.0, 2.0]):
        nb.check(1, answer, 2.0, "think.")
        assert "right." not in capsys.readouterr().out and nb.OUTCOME[1] is False
    nb.check(1, 2, 2.0, "think.")
    assert capsys.readouterr().out == "Exercise 1: right.\n" and nb.OUTCOME[1] is True


def test_close_fails_where_numbers_shapes_or_nan_differ():
    import nb
    import torch

    one = torch.ones(2, dtype=torch.float64)
    nb.close("the same", one, one.clone())
    for other in (one + 1e-9, torch.ones(3, dtype=torch.float64), one * torch.nan):
        with pytest.raises(AssertionError):
            nb.close("different", other, one)
