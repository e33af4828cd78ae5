"""Notebooks: script and .ipynb in step, and the structure that makes them readable. .ci/run executes them with nbmake."""

import functools
import re
import sys
from pathlib import Path
from types import SimpleNamespace

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
        drawn = "plt.show()" in cell.source or "_plot(" in cell.source  # a figure of study/plot.py's
        assert bool(pictures) == drawn, cell.source


@everything
def test_the_badge_is_built_from_a_github_remote_and_no_script_names_one(script):
    text = script.read_text(encoding="utf-8")
    assert "github.com" not in text and "colab" not in text
    notebook = build.read(script)
    build.with_colab(notebook, script, "someone/my.fork")
    path = script.relative_to(build.HERE).with_suffix(".ipynb").as_posix()
    title, badge = notebook.cells[0].source.split("\n\n")[:2]
    assert title.startswith("# ") and badge.endswith(f"/github/someone/my.fork/blob/main/notebooks/{path})")
    first = next(cell.source for cell in notebook.cells if cell.cell_type == "code")
    assert "git clone -q --depth 1 https://github.com/someone/my.fork mfa" in first and first.count("import sys") == 1
    compile(first, "first cell", "exec")
    assert build.sources(build.without_colab(notebook)) == build.sources(build.read(script))


@pytest.mark.parametrize(
    "url, repo",
    [
        ("https://github.com/someone/mfa.git", "someone/mfa"),
        ("git@github.com:someone/mfa.git", "someone/mfa"),
        ("https://github.com/some-one/m.f_a/", "some-one/m.f_a"),
        ("https://example.org/someone/mfa.git", None),
        ("/srv/git/mfa", None),
        ("", None),
    ],
)
def test_the_repository_is_that_of_the_remote_if_it_is_on_github(url, repo, monkeypatch):
    monkeypatch.setattr(build.subprocess, "run", lambda *_, **__: SimpleNamespace(stdout=f"{url}\n"))
    assert build.repository() == repo


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
    assert not any(NETWORK.search(cell) for cell in cells(script, "code"))


@lessons
def test_structure(script):
    code, prose = cells(script, "code"), cells(script, "markdown")
    assert 15 <= len(code) <= 35
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
    assert re.findall(r"Exercise (\d): not answered yet. For a hint: hint\(\1\)", printed(script)) == ["1", "2", "3"]
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


@lessons
def test_hints_and_right_answers_are_out_of_sight(script):
    import nb

    text = script.read_text(encoding="utf-8") + printed(script)
    known = nb.REFERENCE[script.stem[:2]]
    assert list(known) == [1, 2, 3]
    for number, exercise in known.items():
        assert exercise.hint not in text
        compared = re.search(rf"^check\({number}, .*$", text, re.M)[0]
        in_the_open = re.search(r", (\w+\(x\)|eq6|M)\)$", compared)  # what a layer gives is no secret
        assert bool(in_the_open) == (exercise.right is None), compared


@pytest.mark.parametrize("notebook", [f"{n:02}" for n in range(1, 9)])
def test_a_right_answer_can_be_worked_out_and_another_is_refused(notebook, capsys):
    import nb
    import torch

    check, _ = nb.exercises(notebook)
    for number, exercise in nb.REFERENCE[notebook].items():
        if exercise.right:
            right = torch.as_tensor(exercise.right()).double()
            for answer in (right, right * 1.01 + 0.01):
                check(number, answer)
                assert nb.OUTCOME[number] == (answer is right)
    assert "right." in capsys.readouterr().out


def test_only_a_wrong_answer_and_who_asks_get_the_hint_and_only_a_right_one_counts(capsys, monkeypatch):
    import nb

    monkeypatch.setitem(nb.REFERENCE, "00", {1: nb.REFERENCE["01"][1]._replace(hint="think.", right=lambda: 2.0)})
    check, hint = nb.exercises("00")
    for answer in (..., [..., 1], (1, ...)):
        check(1, answer)
        assert capsys.readouterr().out == "Exercise 1: not answered yet. For a hint: hint(1)\n" and nb.OUTCOME[1] is False
    for answer in (3.0, float("nan"), [3.0, 2.0]):
        check(1, answer)
        printed = capsys.readouterr().out
        assert "not yet" in printed and "think." in printed and nb.OUTCOME[1] is False
    hint(1)
    assert capsys.readouterr().out == "Exercise 1, hint: think.\n"
    check(1, 2)
    assert capsys.readouterr().out == "Exercise 1: right.\n" and nb.OUTCOME[1] is True
    check(1, 3, 3)  # compared in the open
    assert capsys.readouterr().out == "Exercise 1: right.\n"


def test_close_fails_where_numbers_shapes_or_nan_differ():
    import nb
    import torch

    one = torch.ones(2, dtype=torch.float64)
    nb.close("the same", one, one.clone())
    for other in (one + 1e-9, torch.ones(3, dtype=torch.float64), one * torch.nan):
        with pytest.raises(AssertionError):
            nb.close("different", other, one)
