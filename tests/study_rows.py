"""Lines of the studies' results, as tests of several files make them up."""

import math

from experiments.study import studies
from experiments.study.studies import Run, run_for


def row(task: studies.Task, loss: float | None) -> dict:
    """A line of results as the queue reads it. Its loss is none that was measured."""
    text = dict(
        dataset=f"pg-books-bpe{studies.VOCAB}",
        seconds=60,
        device="x",
        jobs=1,
        params=1,
        tokens=1,
        by_position=[],
    )
    known = dict(
        val_loss=loss, ppl=loss and math.exp(loss), bpb=loss, diverged=loss is None, curve=[]
    )
    return {"study": task.study, "arm": task.arm, **studies.row_of(task.run), **text, **known}


def toy(arm: str = "mfa_kr", **changes) -> Run:
    return run_for("figure1", arm, 1, 0, toy=True)._replace(**changes)


def pairs(results, study: str, one: str, other: str) -> list[float]:
    """The loss of other less that of one, of every two runs at one rate and seed."""
    lost = []
    for factor in studies.grid_of(study, one):
        ours, theirs = ({row["seed"]: row["val_loss"] for row in results.of(study, arm, factor)} for arm in (one, other))
        lost += [theirs[seed] - ours[seed] for seed in ours if seed in theirs]
    return lost
