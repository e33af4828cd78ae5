"""What the README's quick start prints: python docs/quick_start.py

Runs its two commands in an empty folder, on one thread, keeps what they print, shortened, in
docs/quick_start.txt, and the run's loss curve in docs/loss.png. Minutes. `python docs/build.py`
then puts the text into README.md.
"""

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
INSTALL = "pip install -e ."
TRAIN = "python train.py --attn mfa_kr"
SAMPLE = 'python sample.py --prompt "ROMEO:"'


def printed(command: str, folder: str) -> list[str]:
    """The lines that a command of the README prints in a folder."""
    _, script, *flags = shlex.split(command)
    words = [sys.executable, str(HERE.parent / script), *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    how = dict(cwd=folder, env=environment, check=True, capture_output=True, text=True)
    return subprocess.run(words, **how, encoding="utf-8").stdout.splitlines()


def shortened(train: list[str], sample: list[str]) -> str:
    """A few lines of each: what is trained, its first and last losses, and the text's beginning."""
    steps = [line for line in train if line.startswith("step ")]
    model = next(i for i, line in enumerate(train) if line.startswith("mfa_kr: "))
    best = next(i for i, line in enumerate(train) if "best validation loss" in line)
    lines = [f"$ {INSTALL}", f"$ {TRAIN}", *train[model : model + 3]]
    lines += [steps[0], "...", *steps[-2:], train[best + 1]]
    lines += [f"$ {SAMPLE}", *sample[2:7], "..."]
    return "\n".join(lines) + "\n"


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        text = shortened(printed(TRAIN, folder), printed(SAMPLE, folder))
        shutil.copy(next(Path(folder).glob("out/*/loss.png")), HERE / "loss.png")
    (HERE / "quick_start.txt").write_text(text, encoding="utf-8", newline="\n")
    print(text)


if __name__ == "__main__":
    main()
