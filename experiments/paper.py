"""The paper's numbers, recomputed: python experiments/paper.py [--preset paper-1b]

The work is in paper/tables.py.
"""

from experiments.paper.tables import Args, main
from support.cli import run_command

if __name__ == "__main__":
    run_command(main, Args)
