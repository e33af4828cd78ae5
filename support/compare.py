"""Runs side by side: python -m support.compare out/*

A table of the runs, best loss first, and a picture: loss against step, and best loss against cache.
train.py does the same at a run's end with the runs beside it. Runs on different texts are refused.
Nothing is executed: figures come from metrics.jsonl and the small parts of best.pt, so that a run
of a plug-in needs no plug-in.
"""

import glob
import io
import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from mfa import Config, cache_bytes
from support.cli import BadInput, run_command
from support.files import name_the_file
from support.palette import COLOR, MARKER, NAME
from support.progress import MAY_CHANGE, same_text, text_of
from support.run_folder import load_checkpoint

FILES = ("best.pt", "latest.pt", "metrics.jsonl")  # a folder with any of them is a run's
BUILT_IN = tuple(NAME)  # the attentions whose cache can be counted from a config alone
# What the table or the text says already, or what changes no loss.
SAID = MAY_CHANGE - {"max_iters"} | {"model", "preset", "file", "dataset", "optimizer"}
SHAPE = ("vocab_size", "block_size", "n_layer", "dim", "dropout", "tied", "pos", "n_expert")


# --------------------------------------------------------------------------------------------------
# One run


@dataclass
class Figures:
    """What is said of one run."""

    folder: Path
    attn: str
    optimizer: str
    cache: int | None  # bytes per token at 16 bit; None: only the plug-in's code could tell
    params: int
    best_loss: float  # nats per token
    step: int  # as far as it has come
    max_iters: int
    seconds: float
    curve: list[tuple[int, float]]  # step, validation loss
    text: dict  # of support.progress.source_of
    flags: dict  # that a reader should know to differ

    @property
    def name(self) -> str:
        return os.fsencode(self.folder.name).decode("utf-8", "replace")

    @property
    def attention(self) -> str:
        return NAME.get(self.attn, self.attn)


def is_run(folder: Path) -> bool:
    return any((folder / name).is_file() for name in FILES)


def read_run(folder: Path) -> Figures:
    """The figures of a run. BadInput says why there are none."""
    if not is_run(folder):
        raise BadInput(f"{folder} is not a run of train.py")
    if not (folder / "best.pt").exists():
        raise BadInput(f"{folder} has no best.pt: it has not been evaluated yet")
    ckpt = load_checkpoint(folder / "best.pt", mmap=True)
    try:
        return figures_of(folder, ckpt, read_metrics(folder / "metrics.jsonl"))
    except BadInput:
        raise
    except Exception as e:  # a damaged file can raise nearly anything
        raise BadInput(f"{folder} is damaged ({type(e).__name__}: {e})") from e


def read_metrics(path: Path) -> list[dict]:
    """The rows of a metrics.jsonl, but for a last one that is not whole yet."""
    lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else []
    return [json.loads(line) for line in lines[:-1] if line]


def figures_of(folder: Path, ckpt: dict, rows: list[dict]) -> Figures:
    args, config = ckpt["args"], ckpt["config"]
    curve = [(int(row["step"]), float(row["val_loss"])) for row in rows if "val_loss" in row]
    if not curve:
        raise BadInput(f"{folder} has no evaluation in metrics.jsonl")
    if not math.isfinite(ckpt["best_loss"]):
        raise BadInput(f"{folder / 'best.pt'} has a loss of {ckpt['best_loss']}")
    text_of(ckpt["data"])  # is it all there?
    if not isinstance(config["attn"], str):
        raise TypeError(f"attn is {config['attn']!r}")
    counted = ckpt.get("counted", {})  # older checkpoints have none
    return Figures(
        folder=folder, attn=config["attn"], optimizer=args.get("optimizer", "adamw"),
        cache=counted["cache_bytes"] if counted else cache_of(config, args),
        params=counted["params"] if counted else count_weights(ckpt["model"]),
        best_loss=ckpt["best_loss"], step=int(rows[-1]["step"]), max_iters=args["max_iters"],
        seconds=float(rows[-1]["seconds"]), curve=curve, text=ckpt["data"],
        flags={k: args[k] for k in args if k not in SAID} | {k: config.get(k) for k in SHAPE},
    )  # fmt: skip


def cache_of(config: dict, args: dict) -> int | None:
    """Bytes per token of a checkpoint that does not say; None for a plug-in, which is not run."""
    if args.get("plugin") or config["attn"] not in BUILT_IN:
        return None
    return cache_bytes(Config(**config))


def count_weights(weights: dict) -> int:
    """Parameters, a shared one once."""
    return sum({t.untyped_storage().data_ptr(): t.numel() for t in weights.values()}.values())


# --------------------------------------------------------------------------------------------------
# The table


def table(runs: Sequence[Figures]) -> str:
    """A line for each run, the best first, and a line on what else differs between them."""
    optimizers = len({run.optimizer for run in runs}) > 1
    head = "run, attention, optimizer, cache/token, parameters, best loss, steps, minutes"
    lines = [head.split(", ")] + [row_of(run) for run in runs]
    lines = [line if optimizers else line[:2] + line[3:] for line in lines]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    n_words = 3 if optimizers else 2  # the columns of words are aligned left, the numbers right
    aligned = []
    for line in lines:
        cells = [
            cell.ljust(width) if i < n_words else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        aligned.append("  ".join(cells).rstrip())
    return "\n".join(aligned + notes(runs))


def row_of(run: Figures) -> list[str]:
    cache = "?" if run.cache is None else f"{run.cache:,} B"
    steps = f"{run.step:,}" if run.step >= run.max_iters else f"{run.step:,} of {run.max_iters:,}"
    loss, minutes = f"{run.best_loss:.4f}", f"{run.seconds / 60:.1f}"
    return [
        run.name, run.attention, run.optimizer, cache, f"{run.params:,}", loss, steps, minutes
    ]  # fmt: skip


def notes(runs: Sequence[Figures]) -> list[str]:
    """What a reader of the table has to know besides."""
    told = []
    names = sorted({name for run in runs for name in run.flags})
    differ = [k for k in names if len({str(run.flags.get(k)) for run in runs}) > 1]
    if differ:
        told.append("they differ in --" + ", --".join(differ) + " as well")
    if "eval_tokens" in differ:
        told.append("--eval_tokens differs: not all losses are over the same validation text")
    if any(run.cache is None for run in runs):
        told.append("?: of an older run of a plug-in, whose code would have to say")
    return told


# --------------------------------------------------------------------------------------------------
# The picture


def draw(runs: Sequence[Figures]):
    """A figure: validation loss against step, and the best against the cache."""
    import matplotlib.figure  # slow to import

    figure = matplotlib.figure.Figure(figsize=(11, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for ax, points in ((left, draw_curves(left, runs)), (right, draw_caches(right, runs))):
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
        label_points(ax, points)
    left.set(xlabel="step", ylabel="validation loss, nats per token")
    right.set(xlabel="cache, bytes per token at 16 bit", ylabel="best validation loss")
    return figure


def draw_curves(ax, runs: Sequence[Figures]) -> list[tuple]:
    """The curves; returns what to label: (x, y, text, colour), the end of each."""
    last = max(run.curve[-1][0] for run in runs)
    lowest = min(run.best_loss for run in runs)
    highest = max(loss for run in runs for step, loss in run.curve if step >= 0.1 * last)
    ax.set_ylim(lowest - 0.06 * (highest - lowest + 1e-3), highest + 0.03 * (highest - lowest))
    ax.set_xlim(0, last * 1.25)  # room for the labels
    seen: dict[str, int] = {}
    for run in runs:
        line = ("-", "--", ":", "-.")[seen.get(run.attn, 0) % 4]
        seen[run.attn] = seen.get(run.attn, 0) + 1
        marker = MARKER.get(run.attn, "*") if len(run.curve) <= 20 else ""
        style = dict(color=COLOR.get(run.attn, "0.4"), marker=marker, markersize=4)
        ax.plot(*zip(*run.curve, strict=True), line, **style)
    return [(*run.curve[-1], *label_of(run, runs)) for run in runs]


def draw_caches(ax, runs: Sequence[Figures]) -> list[tuple]:
    """The points; returns what to label."""
    known = [run for run in runs if run.cache is not None]
    if not known:
        return []
    for run in known:
        style = dict(color=COLOR.get(run.attn, "0.4"), marker=MARKER.get(run.attn, "*"))
        ax.plot(run.cache, run.best_loss, linestyle="", markersize=8, **style)
    caches = sorted({run.cache for run in known})
    ax.set_xscale("log", base=2)
    ax.set_xlim(caches[0] / 1.5, caches[-1] * 2.5)
    far_apart = [c for i, c in enumerate(caches) if i == 0 or c >= 1.25 * caches[i - 1]]
    ax.set_xticks(far_apart, [f"{c:,}" for c in far_apart])
    ax.minorticks_off()
    return [(run.cache, run.best_loss, *label_of(run, runs)) for run in known]


def label_of(run: Figures, runs: Sequence[Figures]) -> tuple[str, str]:
    """Text and colour: the attention, or the folder where several runs have one attention."""
    alone = sum(other.attn == run.attn for other in runs) == 1
    text = run.attention if alone else run.name
    return text if len(text) <= 24 else f"{text[:23]}…", COLOR.get(run.attn, "0.4")


def label_points(ax, points: list[tuple]) -> None:
    """Writes beside each point what it is, moved up or down where two would overlap."""
    bottom, top = ax.get_ylim()
    places = spread([y for _, y, _, _ in points], gap=0.045 * (top - bottom))
    for (x, y, text, color), place in zip(points, places, strict=True):
        style = dict(color=color, fontsize=9, va="center", parse_math=False)
        thin = dict(arrowstyle="-", color=color, lw=0.5, shrinkA=0, shrinkB=3)
        at = ax.transData.transform((x, place)) - ax.transData.transform((x, y))
        offset = (10, at[1] * 72 / ax.figure.dpi)
        ax.annotate(text, (x, y), offset, textcoords="offset points", arrowprops=thin, **style)


def spread(values: Sequence[float], gap: float) -> list[float]:
    """The values, moved as little as pushing takes so that any two are `gap` apart."""
    order = sorted(range(len(values)), key=lambda i: values[i])
    groups: list[list[int]] = []
    for i in order:
        groups.append([i])
        while len(groups) > 1 and overlap(groups[-2], groups[-1], values, gap):
            last = groups.pop()
            groups[-1] += last
    places = list(values)
    for group in groups:
        for at, i in enumerate(group):
            places[i] = bottom_of(group, values, gap) + at * gap
    return places


def bottom_of(group: list[int], values: Sequence[float], gap: float) -> float:
    """Where the lowest of a group stands, if the group is centred on the mean of its values."""
    return sum(values[i] for i in group) / len(group) - gap * (len(group) - 1) / 2


def overlap(lower: list[int], upper: list[int], values: Sequence[float], gap: float) -> bool:
    top = bottom_of(lower, values, gap) + gap * (len(lower) - 1)
    return top + gap > bottom_of(upper, values, gap)


def save_picture(runs: Sequence[Figures], path: Path) -> None:
    drawn = io.BytesIO()
    draw(runs).savefig(drawn, dpi=120, format="png")
    with name_the_file(path):
        path.write_bytes(drawn.getvalue())


# --------------------------------------------------------------------------------------------------
# At a run's end


def compare_neighbours(folder: Path, at_most: int = 20) -> None:
    """The run beside the others on its text in the folder above it, if there are any.

    A finished training is not to fail for its neighbours: whatever is wrong is said, not raised.
    """
    try:
        above = folder.parent if folder.name not in ("", "..") else folder.resolve().parent
        mine = read_run(folder)
        beside = sorted(neighbours(folder, above))
        others, left_out = read_all(path for path in beside if is_run(path))
        same = [run for run in others if same_text(run.text, mine.text)]
        if same:
            runs = best_first([mine, *same])
            shown = [run for i, run in enumerate(runs) if i < at_most or run is mine]
            picture = above / "compare.png"
            print(f"\non this text, best first:\n{table(shown)}")
            save_picture(shown, picture)
            print(f"drawn: {picture}")
            if len(shown) < len(runs):
                print(f"{len(runs) - len(shown)} more: python -m support.compare {above / '*'}")
            other_texts = [run for run in others if run not in same]
            left_out += [f"{run.folder} is of another text" for run in other_texts]
            left_out += [f"{path} is not a run" for path in beside if not is_run(path)]
        if left_out:
            print(f"not compared: {some(left_out)}")
    except Exception as e:  # a full disk, a folder that may not be read, a file of another program
        print(f"not compared with its neighbours: {type(e).__name__}: {e}")


def neighbours(folder: Path, above: Path) -> Iterable[Path]:
    """The other folders in the one above a run."""
    mine = folder.resolve()
    for path in above.iterdir():
        if path.is_dir() and not path.name.startswith(".") and path.resolve() != mine:
            yield path


def read_all(folders: Iterable[Path]) -> tuple[list[Figures], list[str]]:
    """The runs, and why the rest of the folders are none."""
    runs, left_out = [], []
    for folder in folders:
        try:
            runs.append(read_run(folder))
        except (BadInput, OSError) as e:
            left_out.append(str(e))
    return runs, left_out


def best_first(runs: Iterable[Figures]) -> list[Figures]:
    return sorted(runs, key=lambda run: run.best_loss)


def some(what: list[str], most: int = 5) -> str:
    more = f" and {len(what) - most} more" if len(what) > most else ""
    return "; ".join(what[:most]) + more


# --------------------------------------------------------------------------------------------------
# At any time


@dataclass
class Compare:
    """Runs of train.py side by side: a table, and a picture beside them."""

    runs: tyro.conf.Positional[tuple[str, ...]]  # folders of runs, or that hold runs; * is expanded
    picture: Annotated[Path | None, tyro.conf.arg(name="picture")] = None  # default: compare.png in
    # the folder that holds them


def folders_of(given: Sequence[str]) -> list[Path]:
    """The folders that are meant: a folder, one full of runs, a file in one, or a pattern."""
    found: dict[Path, None] = {}  # in order, each once
    for word in given:
        matches = [word] if os.path.exists(word) else sorted(glob.glob(word))
        if not matches:
            raise BadInput(f"{word} is not there: give folders of runs, such as out/*")
        for path in map(Path, matches):
            if path.is_dir():
                inner = [path] if is_run(path) else [p for p in sorted(path.iterdir()) if is_run(p)]
                found |= dict.fromkeys(inner or [path])
            elif path.name in FILES:
                found[path.parent] = None
    return list(found)


def same_or_refuse(runs: Sequence[Figures]) -> None:
    for run in runs[1:]:
        if not same_text(run.text, runs[0].text):
            texts = f"{text_of(runs[0].text)}; and {text_of(run.text)}"
            what = f"{runs[0].folder} and {run.folder} are of different texts"
            raise BadInput(f"{what}, so their losses cannot be compared: {texts}")


def main(args: Compare) -> None:
    runs, left_out = read_all(folders_of(args.runs))
    if not runs:
        raise BadInput(f"no run to show: {some(left_out) or 'give folders of runs, such as out/*'}")
    same_or_refuse(runs)
    runs = best_first(runs)
    print(table(runs))
    picture = args.picture or common_folder(runs) / "compare.png"
    save_picture(runs, picture)
    print(f"drawn: {picture}")
    if left_out:
        print(f"not compared: {some(left_out)}")


def common_folder(runs: Sequence[Figures]) -> Path:
    """The folder that holds all runs, or else the present one."""
    above = {run.folder.absolute().parent for run in runs}
    return runs[0].folder.parent if len(above) == 1 else Path()


if __name__ == "__main__":
    run_command(main, Compare)
