"""Rebuild the notebooks: python notebooks/build.py [NAME ...] [--check]

Each notebooks/NN_name.py, a script in jupytext's percent format, is executed in its folder and written as
NN_name.ipynb with its outputs; likewise notebooks/solutions/. NAME is any part of a name: `04` is 04_mfa and its
solutions. What would change from run to run (times, cell ids, the Python version) is left out, so that a rebuild
shows only real differences. --check executes nothing and says which notebooks differ from their scripts.

If the git remote `origin` is a GitHub repository, each notebook gets a badge that opens it in Colab and a first cell
that fetches the rest there. The scripts have neither, and --check accepts notebooks with and without.
"""

import argparse
import base64
import io
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from PIL import Image

HERE = Path(__file__).resolve().parent
GITHUB = re.compile(r"github\.com[:/]([\w.-]+/[\w.-]+?)(?:\.git)?/?$")
COLAB = "https://colab.research.google.com"
FETCH = '''\
import os
import subprocess
import sys

if "google.colab" in sys.modules and not os.path.exists("nb.py"):  # Colab holds this file alone: fetch the rest
    fetch = "git clone -q --depth 1 https://github.com/{repository} mfa && pip install -q -e ./mfa"
    subprocess.run(fetch, shell=True, check=True)
    os.chdir("mfa/notebooks")
'''


def scripts() -> list[Path]:
    return sorted(HERE.glob("[0-9]*.py")) + sorted((HERE / "solutions").glob("[0-9]*.py"))


def repository() -> str | None:
    """OWNER/NAME of the git remote, if it is on GitHub."""
    ask = ["git", "-C", str(HERE), "remote", "get-url", "origin"]
    try:
        url = subprocess.run(ask, capture_output=True, text=True).stdout.strip()
    except OSError:  # no git
        return None
    found = GITHUB.search(url)
    return found[1] if found else None


def badge(script: Path, repo: str) -> str:
    path = script.relative_to(HERE).with_suffix(".ipynb").as_posix()
    return f"[![Open In Colab]({COLAB}/assets/colab-badge.svg)]({COLAB}/github/{repo}/blob/main/notebooks/{path})\n\n"


def with_colab(notebook: nbformat.NotebookNode, script: Path, repo: str) -> None:
    """Puts the badge below the title, and what fetches the repository into the first code cell."""
    title, rest = notebook.cells[0].source.split("\n\n", 1)
    notebook.cells[0].source = f"{title}\n\n{badge(script, repo)}{rest}"
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    first.source = first.source.replace("import sys\n\n", FETCH.format(repository=repo), 1)


def without_colab(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """What with_colab has added, whatever the repository, taken away."""
    notebook.cells[0].source = re.sub(r"\[!\[Open In Colab\].*\n\n", "", notebook.cells[0].source)
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    fetch = re.escape(FETCH).replace(re.escape("{repository}"), r"[\w.-]+/[\w.-]+")
    first.source = re.sub(fetch, "import sys\n\n", first.source)
    return notebook


def read(script: Path) -> nbformat.NotebookNode:
    """The notebook of a script, not executed: cells with stable ids, no metadata but the kernel."""
    notebook = jupytext.read(script, fmt="py:percent")
    notebook.metadata = dict(
        kernelspec=dict(display_name="Python 3", language="python", name="python3"), language_info=dict(name="python")
    )
    for i, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f"cell-{i:02d}", {}
    return notebook


def sources(notebook: nbformat.NotebookNode) -> list[tuple[str, str]]:
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


def in_step(script: Path) -> bool:
    """The .ipynb beside the script has the same cells, every code cell was executed, in order, without an error."""
    path = script.with_suffix(".ipynb")
    if not path.exists():
        return False
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    ran = [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    failed = any(output.output_type == "error" for cell in code for output in cell.outputs)
    return sources(without_colab(notebook)) == sources(read(script)) and ran and not failed


def shrink(notebook: nbformat.NotebookNode) -> None:
    """Pictures with at most 256 colours: a third of the bytes, in a repository that keeps every version of them."""
    for output in (output for cell in notebook.cells for output in cell.get("outputs", [])):
        if "image/png" in output.get("data", {}):
            file = io.BytesIO()
            picture = Image.open(io.BytesIO(base64.b64decode(output.data["image/png"])))
            picture.convert("RGB").quantize(256).save(file, "png", optimize=True)
            output.data["image/png"] = base64.b64encode(file.getvalue()).decode()


def build(script: Path) -> None:
    notebook, repo, start = read(script), repository(), time.perf_counter()
    if repo:
        with_colab(notebook, script, repo)
    client = NotebookClient(notebook, timeout=300, kernel_name="python3", record_timing=False, coalesce_streams=True)
    client.execute(cwd=script.parent)
    seconds = time.perf_counter() - start
    notebook.metadata.language_info = dict(name="python")
    shrink(notebook)
    path = script.with_suffix(".ipynb")
    nbformat.validate(notebook)
    path.write_text(nbformat.writes(notebook).rstrip("\n") + "\n", encoding="utf-8")
    n_code = sum(cell.cell_type == "code" for cell in notebook.cells)
    print(f"{path.relative_to(HERE)}: {n_code} code cells, {seconds:.1f} s, {path.stat().st_size / 1e3:.0f} kB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="part of a notebook's name; default all")
    parser.add_argument("--check", action="store_true", help="execute nothing; fail if a notebook differs from its script")
    args = parser.parse_args()
    chosen = [s for s in scripts() if not args.names or any(name in s.stem for name in args.names)]
    if not chosen:
        sys.exit(f"no notebook is called {', '.join(args.names)}; there are {', '.join(s.stem for s in scripts())}")
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # sums in the same order on every machine: smaller diffs
    if args.check:
        stale = [s.stem for s in chosen if not in_step(s)]
        sys.exit(f"rebuild with python notebooks/build.py {' '.join(stale)}" if stale else 0)
    for script in chosen:
        build(script)


if __name__ == "__main__":
    main()
