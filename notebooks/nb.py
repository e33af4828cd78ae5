"""What the notebooks share: paths, plot style, the two checks, a small training loop.

close(what, a, b)       two tensors agree: prints the largest difference, raises AssertionError
                        beyond `tol`
check(n, answer)        an exercise: right, not yet (with the hint), or not answered while it is
                        still `...`; check(n, answer, right) where what is right is no secret
hint(n)                 the hint, for whoever wants it before a try

check, hint = nb.exercises("04") gives the last two for one notebook; what is right stands in
reference.py. Everything else the notebooks write out.
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # the checkout's own mfa.py, whatever is installed

import train as recipe  # noqa: E402
from mfa import GPT, Config  # noqa: E402
from reference import REFERENCE  # noqa: E402
from support.machine import Machine  # noqa: E402
from support.palette import COLOR, MARKER, NAME  # noqa: E402, F401

STYLE = {
    "figure.figsize": (6.4, 3.6), "figure.dpi": 100, "figure.constrained_layout.use": True,
    "figure.constrained_layout.wspace": 0.05, "figure.facecolor": "white", "font.size": 10,
    "axes.titlesize": 11, "axes.grid": True, "axes.axisbelow": True, "grid.alpha": 0.3,
    "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
    "lines.linewidth": 1.8, "xtick.minor.size": 0,
}  # fmt: skip


def start(grad: bool = False) -> None:
    """Plots in one style, float64, a fixed seed, gradients if wanted.

    In float64 "equal" can mean equal to 15 digits.
    """
    plt.rcParams.update(STYLE)
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    torch.set_grad_enabled(grad)


def close(what: str, a: Tensor, b: Tensor, tol: float = 1e-12) -> None:
    """Assert that two tensors agree: largest difference over largest entry of b at most tol."""
    assert a.shape == b.shape, f"{what}: shapes {tuple(a.shape)} and {tuple(b.shape)} differ"
    error = ((a - b).abs().max() / b.abs().max().clamp_min(1e-300)).item()
    assert error <= tol, f"{what}: relative difference {error:.1e}, allowed {tol:.0e}"
    print(f"{what}: relative difference {error:.1e} (allowed {tol:.0e})")


OUTCOME: dict[int, bool] = {}  # of the exercises checked so far


def exercises(notebook: str):
    """check and hint for the exercises of a notebook, "01" to "08"."""
    known = REFERENCE[notebook]

    def hint(number: int) -> None:
        """Print the hint of an exercise."""
        print(f"Exercise {number}, hint: {known[number].hint}")

    def check(number: int, answer, right=None, tol: float = 1e-9) -> None:
        """Tell whether `answer` is right: a number, a bool, a list or a tensor."""
        right = known[number].right() if right is None else right
        OUTCOME[number] = False
        if is_open(answer):
            print(f"Exercise {number}: not answered yet. For a hint: hint({number})")
            return
        wrong = difference(answer, right, tol)
        if wrong is not None:
            print(f"Exercise {number}: not yet{wrong}.")
            hint(number)
            return
        OUTCOME[number] = True
        print(f"Exercise {number}: right.")

    return check, hint


def is_open(answer) -> bool:
    """Is it, or a part of it, still `...`?"""
    parts = answer if isinstance(answer, (list, tuple)) else [answer]
    return any(part is ... for part in parts)


def difference(answer, right, tol: float) -> str | None:
    """What is wrong with an answer, as the end of a sentence; None if nothing is."""
    a, b = (torch.as_tensor(value).detach().double() for value in (answer, right))
    if a.shape != b.shape:
        return f", the shape is {tuple(a.shape)} and should be {tuple(b.shape)}"
    close_enough = (a - b).abs().max() <= tol * b.abs().max().clamp_min(1e-30)
    return None if close_enough else ""  # NaN is not close


def all_right(how_many: int = 3) -> None:
    """The last cell of a solution: every exercise was checked and found right."""
    assert OUTCOME == {n: True for n in range(1, how_many + 1)}, OUTCOME
    print(f"All {how_many} are right.")


def shakespeare() -> tuple[Tensor, Tensor, str]:
    """data/shakespeare.txt as character ids, 90% to train on and the rest to validate, and the
    characters.
    """
    text = (ROOT / "data" / "shakespeare.txt").read_text(encoding="ascii")
    chars = "".join(sorted(set(text)))
    number = {c: i for i, c in enumerate(chars)}
    ids = torch.tensor([number[c] for c in text], dtype=torch.int32)
    cut = len(ids) * 9 // 10
    return ids[:cut], ids[cut:], chars


@torch.enable_grad()
def fit(model: GPT, ids: Tensor, steps: int, watch=None, seed: int = 0, lr: float = 3e-3,
        batch_size: int = 16, optimizer: str = "adamw") -> list[float]:  # fmt: skip
    """Train by train.py's recipe and train_step; the training losses, one a step.

    watch(step, model) is called when the gradients of a step are there, before they are clipped,
    and the weights have not moved yet.
    """
    args = recipe.Train(
        model=model.cfg, max_iters=steps, batch_size=batch_size, learning_rate=lr, seed=seed,
        warmup_iters=max(1, steps // 20), optimizer=optimizer,
    )  # fmt: skip
    machine, losses = Machine("cpu"), []
    both = recipe.make_optimizer(model.train(), args)
    loss_of = machine.loss_function(model)

    def before_the_weights_move(*_) -> None:
        if watch:
            watch(step, model)
        torch.nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip)

    first = both.muon if optimizer == "muon" else both  # of two optimizers the first one to step
    first.register_step_pre_hook(before_the_weights_move)
    for step in range(steps):
        recipe.set_learning_rate(both, recipe.learning_rate(step, args))
        starts = recipe.batch_starts(args, step, len(ids))
        tokens = recipe.take(ids, starts, model.cfg.block_size + 1, machine.device)  # (B, T + 1)
        loss, _ = recipe.train_step(model, loss_of, [tokens], both, machine, clip=0)
        losses.append(loss.item())
    return losses


def validate(model: GPT, ids: Tensor, tokens: int = 16384) -> float:
    """Mean loss in nats per character over the first `tokens` of ids, by train.py's evaluate."""
    return recipe.evaluate(model, ids[: tokens + 1], Machine("cpu"))


def new_model(seed: int = 0, **fields) -> GPT:
    """A small float32 GPT on the 64 characters; the same weights for the same seed."""
    torch.manual_seed(seed)
    small = dict(vocab_size=64, block_size=64, n_layer=2, dim=64, head_dim=16)
    return GPT(Config(**{**small, **fields})).float()
