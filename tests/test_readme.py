"""The commands of the READMEs and the walkthrough: each is run in a copy of the tree, as a user would, or NOT_RUN says why not.

Here they are shown to work; that what they do is right, other tests show. A command changed here is said so: RUN, INSTEAD.
"""

import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from support.cli import run_command

markdown_it = pytest.importorskip("markdown_it")
ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = ["README.md", "data/README.md", "experiments/README.md", "experiments/RESULTS.md", "notebooks/README.md", "docs/walkthrough.md"]

QUICK = "--max_iters 2 --eval_interval 2 --eval_tokens 600 --batch_size 2"
TOY = f"{QUICK} --batch_size 32 --n_layer 1 --dim 64 --head_dim 16 --block_size 32"
# Command, in the order of the documents: what is added to it, and what it prints. Of a flag given twice the last counts.
RUN = {
    "python train.py --attn mfa_kr": (QUICK, "6.25% of MHA's"),
    'python sample.py --prompt "ROMEO:"': ("--max_new_tokens 20", "out/tiny-mfa_kr/best.pt: mfa_kr, step 2"),
    "python sample.py --checkpoint shipped-mfa_kr": ("--max_new_tokens 20", "20 tokens in "),
    "python train.py --attn mha": (QUICK, "100.00% of MHA's"),
    "python -m support.compare out/*": ("", "drawn: "),  # it opens the * itself, as on Windows
    "python train.py --file my_notes.txt --tokenizer byte --out out/notes": (QUICK, "text: file-my_notes-byte"),
    "python train.py --plugin examples/my_attention.py --attn tied2": (QUICK, "in out/tiny-tied2: best.pt"),
    "python experiments/paper.py": ("", "Table 8"),
    "torchrun --nproc_per_node=8 train.py --preset small --tokenizer gpt2 --dataset wikitext-2 --grad_accum 2 --resume": (
        TOY,
        "in out/small-mfa: best.pt",
    ),
    "python experiments/study/plot.py": ("", "experiments/RESULTS.md: "),
    "python docs/build.py": ("", "docs/index.html: "),
    "python experiments/study/run.py --study all --dry_run": ("", "still to make: "),
    "python notebooks/build.py 04": ("", "04_mfa_solutions.ipynb: "),
    "python notebooks/build.py --check": ("", ""),
}
# What stands in a command that is run, and what is run instead.
INSTEAD = {
    "--tokenizer gpt2 --dataset wikitext-2": "--tokenizer byte --dataset shakespeare",  # those are downloads
    "--nproc_per_node=8": "--nproc_per_node=2 --standalone",  # two processes on a CPU (gloo), at a port that is free
}
NOT_RUN = {
    "pip install -e .": "the copy is put on PYTHONPATH; .ci/run installs",
    'pip install -e ".[dev]"': ".ci/run does it",
    'pip install -e ".[hub]"': ".ci/run does it",
    "python experiments/export.py --checkpoint shipped-mfa_kr --to out/hf": "needs the extra hub; tests/test_export.py does it",
    "python experiments/import_llama.py --folder FOLDER --out out/llama": "needs a Llama; tests/test_import_llama.py makes small ones",
    "python experiments/harness.py --file blimp.jsonl.xz --to out/blimp": "needs BLiMP; tests/test_harness.py has a few pairs",
    "lm_eval --model hf --model_args pretrained=out/hf,trust_remote_code=True --include_path out/blimp --tasks blimp_local":
        "needs the extra hub; tests/test_harness.py does it from Python",
    "lm_eval --model hf --model_args pretrained=out/hf,trust_remote_code=True --tasks "
    "bbh,mmlu,hellaswag,winogrande,boolq,piqa,social_iqa,sciq,openbookqa,ruler": "downloads",
    "python experiments/study/words.py --checkpoint FILE --blimp FILE": "tests/test_words.py does it with a few pairs",
    "python experiments/bench/equal_time.py": "needs a GPU; tests/test_equal_time.py runs it at toy size",
    "python experiments/bench/sharding.py --processes 2 --preset small --shard": "needs GPUs; tests/test_sharding_bench.py runs it at toy size",
    "python experiments/probes/many_gpus.py --processes 8": "needs GPUs; tests/test_many_gpus.py runs it at toy size",
    "pip install .": "the same but for what may be edited",
    "python -m pytest": ".ci/run does it, or you do",
    "python train.py --preset small --tokenizer gpt2 --dataset wikitext-2": "a download; the next one runs with other text",
    "torchrun --nnodes=8 --nproc_per_node=8 --max-restarts=3 --rdzv-backend=c10d --rdzv-endpoint=HOST train.py --preset paper-7b "
    "--tokenizer gpt2 --dataset wikitext-2 --shard --checkpoint_blocks --grad_accum 7 --resume": "needs eight machines",
    "python experiments/bench/training.py --nanogpt FOLDER --part small": "needs a checkout of nanoGPT and a GPU",
    "python experiments/study/run.py --study modern": "needs the text of pg-books, and an hour of a GPU",
    "python experiments/study/run.py --study all --source DIR": "needs the text of pg-books, and hours of a GPU",
    "python experiments/study/run.py --study figure1 --dataset wikitext-2": "needs a download, and hours of a GPU",
    "python experiments/study/run.py --study all --smoke": "tests/test_run.py does it",
    "python experiments/convert.py --checkpoint out/tiny-mha/best.pt --to mfa --out out/converted": "tests/test_convert.py does it",
    "python experiments/study/conversion.py --source DIR": "needs the text of pg-books and a GPU; tests/test_convert.py does it with --smoke",
    "python experiments/probes/kill_test.py --results FILE": "minutes; tests/test_train.py kills three times",
    "python docs/quick_start.py": "minutes; the quick start's commands are run for two steps",
    "python experiments/bench/decoding.py --nanogpt FOLDER": "needs a checkout of nanoGPT and a GPU",
    "python experiments/probes/copying.py --jobs 2": "half an hour; tests/test_copying.py runs it for two steps",
    "python experiments/probes/rounding.py": "three quarters of an hour; tests/test_rounding.py runs it with small models",
    "python train.py --attn mfa --optimizer muon --learning_rate 1e-2 --batch_size 32 --max_iters 700 --seed 1337":
        "minutes; tests/test_live.py takes what it made",
    "python notebooks/build.py": "a minute and more; .ci/run executes every notebook",
    "python -m pytest --nbmake --nbmake-timeout=120 notebooks": ".ci/run does it",
}


def commands(markdown: str) -> list[str]:
    """Every line of a code block, and every code span that begins with a program's name; without comments, parted at &&.

    A fence that names a language other than the shell's is none: Python is tried by itself, and the rest is for reading.
    """
    tokens = markdown_it.MarkdownIt("commonmark").parse(markdown)
    lines = []
    for token in tokens:
        if token.type in ("code_block", "fence") and token.info in ("", "bash"):
            lines += token.content.splitlines()
        if token.type == "fence" and token.info == "console":  # what is typed, and what it prints
            lines += [line[2:] for line in token.content.splitlines() if line.startswith("$ ")]
        spans = [child.content for child in token.children or [] if child.type == "code_inline"]
        lines += [span for span in spans if re.match(r"(python3?|pip|uvx?|torchrun|git|bash|curl) ", span)]
    parts = [part for line in lines for part in re.sub(r"(^|\s)#.*", "", line).split("&&")]
    return [part.strip() for part in parts if part.strip()]


FOUND = {name: commands((ROOT / name).read_text(encoding="utf-8")) for name in DOCUMENTS}
EACH_ONCE = list(dict.fromkeys(command for found in FOUND.values() for command in found))


def as_run(command: str) -> str:
    run, added = command, RUN[command][0]
    for shown, instead in INSTEAD.items():
        run = run.replace(shown, instead)
    return f"{run} {added}".strip()


def test_what_a_command_is():
    markdown = "a\n\n    pip install x && python y.py  # why\n    # no\n\n```\nz --n=1\n```\n```python\nno\n```\n```console\n$ w\nno\n```\n`uv run y.py` makes `y.py`\n\n- b\n\n      c d\n"
    assert commands(markdown) == ["pip install x", "python y.py", "z --n=1", "w", "uv run y.py", "c d"]


def test_every_command_is_run_in_its_order_or_has_a_reason():
    assert [command for command in EACH_ONCE if command not in NOT_RUN] == list(RUN)
    assert set(NOT_RUN) <= set(EACH_ONCE), "a reason for a command that no document has"
    assert all(any(shown in command for command in RUN) for shown in INSTEAD), "a replacement for nothing"


PYTHON = re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("block", PYTHON)
def test_the_python_of_the_readme_runs(block):
    """As a user would, who has the four files on the path."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    how = dict(capture_output=True, text=True, encoding="utf-8", env=environment)
    done = subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", block], **how)
    assert done.returncode == 0, done.stderr
    for says in re.findall(r"print\(.*: (\d+)$", block, re.MULTILINE):  # what a comment says is printed
        assert done.stdout.split() == [says]


def test_the_quick_start_is_what_its_commands_print(ran):
    """What does not depend on the machine or the number of steps: the lines of what is trained."""
    shown = (ROOT / "docs" / "quick_start.txt").read_text(encoding="utf-8").splitlines()
    commands = [line.removeprefix("$ ") for line in shown if line.startswith("$ ")]
    assert commands == ["pip install -e .", *list(RUN)[:2]]
    before = shown[2 : next(i for i, line in enumerate(shown) if line.startswith("step "))]
    assert len(before) == 3 and set(before) <= set(ran[commands[1]].stdout.splitlines())
    assert shown[shown.index(f"$ {commands[2]}") + 1] == "ROMEO:"


def follow(commands: list[str], place: Path) -> dict[str, subprocess.CompletedProcess]:
    """Type the commands one after the other in a new copy of the tree, on a machine without a GPU."""
    caches = shutil.ignore_patterns("__pycache__", ".*")
    for folder in ("docs", "examples", "experiments", "notebooks", "support"):
        shutil.copytree(ROOT / folder, place / folder, ignore=caches)
    (place / "data").mkdir()
    for path in (*ROOT.glob("*.py"), ROOT / "README.md", ROOT / "data" / "shakespeare.txt"):
        shutil.copy(path, place / path.relative_to(ROOT))
    (place / "my_notes.txt").write_text("Buy milk. Read the paper again.\n" * 100, encoding="utf-8")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(place), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

    def run(words: list[str]) -> subprocess.CompletedProcess:
        how = dict(capture_output=True, text=True, encoding="utf-8", timeout=120)
        try:
            return subprocess.run(words, cwd=place, env=environment, **how)
        except (OSError, subprocess.TimeoutExpired) as e:  # the others still have their turn
            return subprocess.CompletedProcess(words, 1, "", str(e))

    return {command: run(shlex.split(as_run(command))) for command in commands}


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """All of RUN: two documents at a time, each in a copy of its own."""
    first = {command: name for name in reversed(DOCUMENTS) for command in FOUND[name]}
    todo = [[command for command in RUN if first.get(command) == name] for name in DOCUMENTS]
    todo = [commands for commands in todo if commands]
    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(follow, todo, [tmp_path_factory.mktemp("copy") for _ in todo]))
    return {command: process for part in done for command, process in part.items()}


@pytest.mark.parametrize("command", RUN)
def test_a_command_works(command, ran):
    done = ran[command]
    assert done.returncode == 0, f"{as_run(command)}\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}"
    assert RUN[command][1] in done.stdout


# `python x.py --flags`, but for notebooks/build.py, which is run and has no run_command
PROGRAM = re.compile(r"(?:python|uv run|torchrun .*?) ((?:experiments/(?:\w+/)?)?\w+\.py.*)")
OTHERWISE = [c for c in EACH_ONCE if PROGRAM.match(c) and (c in NOT_RUN or any(shown in c for shown in INSTEAD))]
FLAGS = {"train": "Train", "sample": "Sample", "training": "Bench", "sharding": "Bench"}  # the class of a program's flags, where it is not Args


@pytest.mark.parametrize("command", OTHERWISE)
def test_what_is_not_run_as_it_stands_is_taken_by_its_program(command, tmp_path, monkeypatch):
    script, *argv = shlex.split(PROGRAM.match(command)[1])
    monkeypatch.chdir(tmp_path)  # --resume looks for no run of ours
    module = importlib.import_module(".".join(Path(script).with_suffix("").parts))
    got = []
    run_command(got.append, getattr(module, FLAGS.get(Path(script).stem, "Args")), argv, getattr(module, "defaults", None))
    assert len(got) == 1
