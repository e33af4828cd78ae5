"""Plots and tables from the results of run.py: python experiments/plot.py

Writes the plots beside the results and fills the marked parts of experiments/README.md, with the paper's figure beside ours.
Every number is taken from a line of the results; a row none of whose runs was made says so. Seeds are shown as mean ± standard
deviation (of the sample, n - 1).
"""

import itertools
import math
import os
import re
import statistics
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import copying
import numpy as np
import rounding
import torch
from bench_decode import grid_tables
from hybrids import HYBRIDS
from matplotlib.figure import Figure
from provenance import ROOT, read_json
from studies import (
    BEYOND,
    FIGURE1,
    FIGURE3,
    GRID,
    LENGTH,
    QUESTION_A,
    QUEUE,
    RESULTS,
    SEEDS,
    STUDIES,
    VOCAB,
    WHY,
    Run,
    best,
    build,
    cache_of,
    made,
    queue,
    read_results,
    run_for,
    tried,
    untrained,
)

from prepare_data import BadInput, run_command
from train import cache_bytes, mha_of, write_atomically

GRIDDED = {study for study, _, rates, _ in QUEUE if rates == GRID}
ATTENTIONS = (("mha", "MHA"), ("mfa", "MFA"), ("mfa_kr", "MFA-KR"))
SCALED = (*ATTENTIONS, ("mfa_half", "MFA, query rank dim/2"))
T95 = {2: 4.303, 3: 3.182, 4: 2.776}  # Student's t of a two-sided 95% interval, by degrees of freedom
STYLE = {"mha": ("black", "o"), "gqa": ("tab:gray", "s"), "mqa": ("tab:brown", "v"), "mla": ("tab:blue", "D"),
         "mfa": ("tab:red", "*"), "mfa_kr": ("tab:orange", "P"), "mfa_half": ("tab:pink", "X")}  # fmt: skip


class Results:
    """The results on one text: done[run] is the line of a run. toy: those of --smoke."""

    def __init__(self, rows: list[dict], dataset: str = f"pg-books-bpe{VOCAB}", toy: bool = False):
        self.done, self.toy = made(rows, dataset), toy

    def of(self, study: str, arm: str, times: float | None = None) -> list[dict]:
        """The lines of an arm, one a seed, at `times` its middle learning rate; by default at the best, if it has a grid."""
        if times is None:
            times = best(study, arm, self.done, self.toy) if study in GRIDDED else 1
        if times is None:  # none of the grid was made, or none of it has a loss
            times = 1
        runs = [run_for(study, arm, times, seed, self.toy) for seed in SEEDS]
        return [self.done[run] for run in runs if run in self.done]

    def trained(self, study: str, arm: str) -> list[dict]:
        """Those of them, at the best learning rate, that trained."""
        return [row for row in self.of(study, arm) if not untrained(row)]


# ---------------------------------------------------------------------------------------------------------------------
# Pieces of tables


def spread(values: list[float], digits: int) -> str:
    """mean ± standard deviation, or the only value."""
    text = f"{statistics.mean(values):.{digits}f}"
    return f"{text} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else text


def outcome(rows: list[dict], what: str = "ppl", digits: int = 2) -> str:
    """A cell: mean ± deviation over the seeds that trained, and how many did not."""
    if not rows:
        return "not made"
    trained = [row[what] for row in rows if not untrained(row)]
    lost = f"{len(rows) - len(trained)} of {len(rows)} did not train" if len(trained) < len(rows) else ""
    return ", ".join(filter(None, [spread(trained, digits) if trained else "", lost]))


def difference(ours: list[float], theirs: list[float]) -> tuple[float, float | None]:
    """Mean of theirs less mean of ours, and half its 95% interval, None for single runs.

    Student's t with one variance for both. Not paired by seed: over our arms the losses of equal seeds do not go together.
    """
    n, m = len(ours), len(theirs)
    d = statistics.mean(theirs) - statistics.mean(ours)
    if min(n, m) < 2:
        return d, None
    pooled = ((n - 1) * statistics.variance(ours) + (m - 1) * statistics.variance(theirs)) / (n + m - 2)
    return d, T95[n + m - 2] * math.sqrt(pooled * (1 / n + 1 / m))


def table(head: list[str], body: list[list[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


@cache
def on_paper(run: Run) -> tuple[int, int, float]:
    """Parameters, bytes of cache per token, and the cache as a share of MHA's, without training anything."""
    with torch.device("meta"):
        model = build(run)
    kept = cache_of(model)
    return sum(p.numel() for p in model.parameters()), kept, kept / cache_bytes(mha_of(run.cfg))


def main_table(results: Results, study: str) -> str:
    body = []
    for arm, a in STUDIES[study].items():
        rows = results.of(study, arm)
        params, kept, share = on_paper(run_for(study, arm, 1, 0, results.toy))
        lr = f"{rows[0]['lr']:.2g}" if rows else "–"
        rates = len(tried(study, arm, results.done, results.toy))
        lr += f", of {rates} tried" if rows and study in GRIDDED and rates < len(GRID) else ""
        counts = [f"{kept:,}", f"{share:.2%}", f"{params / 1e6:.2f}M", lr, str(len(rows))]
        body.append([a.name, *counts, outcome(rows), outcome(rows, "bpb", 4) if rows else "–", a.paper or "–"])
    head = ["", "cache, bytes per token", "of MHA's", "parameters", "peak lr", "seeds", "perplexity", "bits per byte", "paper"]
    return table(head, body)


def order(results: Results, study: str) -> str:
    """Does the order of the rows agree with the paper's? Pairs that differ are named."""
    arms = STUDIES[study]
    found = {arm: [row["ppl"] for row in results.trained(study, arm)] for arm in arms if arms[arm].paper}
    ours = {arm: statistics.mean(ppl) for arm, ppl in found.items() if ppl}
    pairs = [(a, b) for a, b in itertools.permutations(ours, 2) if float(arms[a].paper) < float(arms[b].paper)]
    if not pairs:
        return "Order: no two rows that the paper has a figure for were made."
    other = [f"{arms[b].name} ({ours[b]:.2f}) below {arms[a].name} ({ours[a]:.2f})" for a, b in pairs if ours[b] < ours[a]]
    text = f"Order: {len(pairs) - len(other)} of {len(pairs)} pairs as in the paper."
    return text + (f" The other way round here: {'; '.join(other)}." if other else "")


def against(results: Results, one: tuple[str, str], other: tuple[str, str]) -> list[str]:
    """A line of the table of differences: loss of other less that of one, each (study, arm), at its best learning rate."""
    a, b = ({row["seed"]: row["val_loss"] for row in results.trained(*at)} for at in (one, other))
    share, text, verdict = on_paper(run_for(*other, 1, 0, results.toy))[2], "–", "not made"
    if a and b:
        d, half = difference([*a.values()], [*b.values()])
        text = f"{d:z.4f}" + (f" ± {half:.4f}" if half is not None else "")
        seeds = a.keys() & b.keys()
        verdict = f"in {sum(b[seed] > a[seed] for seed in seeds)} of {len(seeds)} seeds"
    return [*(STUDIES[study][arm].name for study, arm in (one, other)), f"{share:.2%}", text, verdict]


def differences(results: Results, pairs: Iterable[tuple[tuple[str, str], tuple[str, str]]]) -> str:
    """The table of the lines of `against`."""
    head = ["", "against", "whose cache is", "its loss less ours, nats (95%)", "ours is lower"]
    return table(head, [against(results, *pair) for pair in pairs])


# ---------------------------------------------------------------------------------------------------------------------
# The parts of README.md


def status(results: Results) -> str:
    body = []
    for study in STUDIES:
        tasks = [task.run for task in queue(study, results.toy)]
        lost = sum(untrained(results.done[run]) for run in tasks if run in results.done)
        body.append([study, str(len(tasks)), str(sum(run in results.done for run in tasks)), str(lost)])
    runs = [task.run for task in queue("all", results.toy)]
    shared = f"Together {len(runs)} runs, since studies share some; {sum(run in results.done for run in runs)} are made."
    return table(["study", "runs", "made", "of them did not train"], body) + "\n\n" + shared


def figure1_part(results: Results) -> str:
    others = [arm for arm in FIGURE1 if not arm.startswith("mfa")]
    pairs = [("mfa", arm) for arm in (*others, "mfa_kr")] + [("mfa_half", arm) for arm in (*others, "mfa")]
    pairs += [("mfa_2d", arm) for arm in ("mha", "gqa2", "gqa4", "mfa", "mfa_kr_2d")]
    pairs += [("mfa_kr", arm) for arm in ("mha", "gqa2", "mfa_kr_half")]
    claims = differences(results, ((("figure1", one), ("figure1", other)) for one, other in pairs))
    return "\n\n".join([main_table(results, "figure1"), order(results, "figure1"), claims])


def heads_part(results: Results) -> str:
    arms = [arm for arm in WHY if arm.endswith("_16")]
    return differences(results, ((("figure1", one), ("why", arm)) for one in ("mfa", "mfa_half", "mfa_kr") for arm in arms))


def grid_part(results: Results) -> str:
    body = []
    arms = [("figure1", arm) for arm in FIGURE1] + [("table4", arm) for arm in ("vanilla", "proj", "residual")]
    arms += [(study, arm) for study in ("table3", "table5") for arm in STUDIES[study]]
    for study, arm in arms:
        made = tried(study, arm, results.done, results.toy)
        lowest, cells = best(study, arm, results.done, results.toy) if len(made) == len(GRID) else None, []
        for times in (*GRID, BEYOND):
            rows = [row for row in results.of(study, arm, times) if row["seed"] in made.get(times, {0})]
            text = "–" if times == BEYOND and not rows else outcome(rows)
            cells.append(f"**{text}**" if rows and times == lowest else text)
        body.append([STUDIES[study][arm].name, *cells])
    rates = [f"{run_for('figure1', 'mha', times, 0, results.toy).lr:.2g}" for times in (*GRID, BEYOND)]
    return table(["perplexity, peak lr", *rates], body)


def table_part(study: str):
    return lambda results: main_table(results, study) + "\n\n" + order(results, study)


def question_a_part(results: Results) -> str:
    planned, both = {task.run for task in queue("question_a", results.toy)}, GRID[1:]
    body = []
    for arm, a in QUESTION_A.items():
        wanted = [run_for("question_a", arm, times, 0, results.toy) in planned for times in both]
        cells = [outcome(results.of("question_a", arm, times)) for times in both]
        body.append([a.name, *(cell if want else "–" for want, cell in zip(wanted, cells, strict=True))])
    rates = [f"{run_for('question_a', 'pre', times, 0, results.toy).lr:.2g}" for times in both]
    return table(["perplexity, peak lr", *rates], body)


def question_b_part(results: Results) -> str:
    body = []
    for attn, name in (("mha", "MHA"), ("mqa", "MQA"), ("mla", "MLA, joint latent of dim/4"), ("mfa", "MFA, C = dim/8")):
        arms = [f"{attn}_{size}_{init}" for size in ("30m", "7m") for init in ("scaled", "plain", "attn", "vo")]
        body.append([name, *(outcome(results.of("question_b", arm)) for arm in arms)])
    heads = [
        f"dim {dim}, {std}"
        for dim in (512, 256)
        for std in (f"{0.02 * (2048 / dim) ** 0.5:.3f}", "0.02", "0.02 in attention", "0.02 in V, O")
    ]
    return table(["perplexity by init std", *heads], body)


def checked_part(results: Results) -> str:
    """Of the runs that say how far rounding moves their gradient: those where it is by more than 5% at some look."""
    body, rest, asked = [], [], [row for row in results.done.values() if row.get("rounding")]
    for row in asked:
        off = [math.inf if off is None else off for _, off in row["rounding"]]
        if max(off) > 0.05:
            shares = (f"{part:.0%}" if part < math.inf else "not finite" for part in (off[0], max(off), off[-1]))
            body.append([f"{row['study']}: {row['name']}", f"{row['lr']:.2g}", str(row["seed"]), *shares, outcome([row])])
        else:
            rest.append(max(off))
    head = ["", "peak lr", "seed", "gradient off by, first look", "most", "last look", "perplexity"]
    text = f"Rounding moves the gradient of the other {len(rest)} of {len(asked)} runs that were asked"
    return table(head, body) + "\n\n" + text + (f" by {max(rest):.1%} at most." if rest else ".")


def same_seeds(results: Results, study: str) -> dict[str, list[dict]]:
    """The trained lines of each arm, of seeds that all arms of its size have: a mean beside one seed would not be even."""
    arms, common = STUDIES[study], {}
    found = {arm: results.trained(study, arm) for arm in arms}
    for arm, rows in found.items():
        if rows:
            seeds = {row["seed"] for row in rows}
            common[arms[arm].size] = common.get(arms[arm].size, seeds) & seeds
    return {arm: [row for row in rows if row["seed"] in common[arms[arm].size]] for arm, rows in found.items()}


def length_part(results: Results) -> str:
    starts = [run_for("length", arm, 1, 0, results.toy).cfg.block_size for arm in ("mha_512", "mha_2048")]
    bins = [b for b in (1 << i for i in range(20)) if starts[0] // 8 <= b < starts[1]]
    body = []
    for arm, rows in same_seeds(results, "length").items():
        by = [dict(row["by_position"]) for row in rows]
        cells = [spread([d[b] for d in by], 4) if by and b in by[0] else "–" for b in bins]
        body.append([LENGTH[arm].name, outcome(rows or results.of("length", arm), "val_loss", 4), *cells])
    return table(["loss, nats per token", "all positions", *(f"{b} to {2 * b - 1}" for b in bins)], body)


def scaling(results: Results) -> dict[str, list[tuple[float, float]]]:
    """Figure 3's points of each attention, dense: (N D, mean loss)."""
    points = {attn: [] for attn, _ in SCALED}
    for arm, rows in same_seeds(results, "figure3").items():
        attn, _, size = arm.rpartition("_")
        if rows and size != "moe":
            loss = statistics.mean(row["val_loss"] for row in rows)
            points[attn].append((rows[0]["params"] * rows[0]["tokens"], loss))
    return {attn: sorted(found) for attn, found in points.items()}


def power_law(points: list[tuple[float, float]]) -> tuple[float, float, float]:
    """(a, b, rms): loss = a (N D)^-b by least squares on the logarithms, and the root mean square of what is left, in nats."""
    x, y = np.log(points).T
    slope, intercept = np.polyfit(x, y, 1)
    left = np.exp(y) - np.exp(intercept + slope * x)
    return float(np.exp(intercept)), float(-slope), float(np.sqrt(np.mean(left**2)))


def figure3_part(results: Results) -> str:
    body = []
    for arm, rows in same_seeds(results, "figure3").items():
        run = run_for("figure3", arm, 1, 0, results.toy)
        params, kept, share = on_paper(run)
        tokens = run.max_iters * run.batch_size * run.cfg.block_size
        counts = [f"{params / 1e6:.2f}M", f"{tokens / 1e6:.1f}M", f"{kept:,}", f"{share:.2%}"]
        body.append([FIGURE3[arm].name, *counts, outcome(rows or results.of("figure3", arm), "val_loss", 4)])
    head = ["", "parameters N", "tokens D", "cache, bytes per token", "of MHA's", "loss, nats per token"]
    lines, found = [], scaling(results)
    for attn, name in SCALED:
        points = found[attn]
        if len(points) < 3:
            lines.append(f"- {name}: no fit, {len(points)} of 4 dense sizes made.")
        else:
            a, b, rms = power_law(points)
            law = f"loss = {a:.2f} (N D)^-{b:.4f}, off by {rms:.4f} nats (rms)"
            lines.append(f"- {name}: {law}, over {len(points)} of 4 dense sizes.")
    return table(head, body) + "\n\n" + "\n".join(lines)


def context_gains(results: Results) -> list[tuple[str, float, float]]:
    """(attention, gain, perplexity) of every 30M run at a context of 512, less hybrids and those at a ruinous learning rate.

    gain: how much lower the loss is at positions 256 to 511 than at 32 to 63, in nats.
    """
    middle, found = run_for("figure1", "mha", 1, 0, results.toy), []
    cfg = middle.cfg
    early, late = cfg.block_size // 16, cfg.block_size // 2
    for run, row in results.done.items():
        like = (run.cfg.dim, run.cfg.block_size) == (cfg.dim, cfg.block_size) and not run.cfg.n_expert
        if like and not untrained(row) and run.build not in HYBRIDS and run.lr < BEYOND * middle.lr:
            by = dict(row["by_position"])
            found.append((run.cfg.attn, by[early] - by[late], row["ppl"]))
    return found


def positions_part(results: Results) -> str:
    """How far each attention of Figure 1 is above MHA at each position of a context, means over seeds."""
    found = {arm: [dict(row["by_position"]) for row in results.trained("figure1", arm)] for arm in FIGURE1}
    if not found["mha"]:
        return "MHA was not made."
    mean = {arm: {b: statistics.mean(by[b] for by in rows) for b in found["mha"][0]} for arm, rows in found.items() if rows}

    def above(arm: str) -> list[str]:
        return [f"{mean[arm][b] - mha:z.3f}" if arm in mean else "not made" for b, mha in mean["mha"].items()]

    head = ["nats above MHA, position", *(str(b) if b < 2 else f"{b} to {2 * b - 1}" for b in mean["mha"])]
    return table(head, [[a.name, *above(arm)] for arm, a in FIGURE1.items() if arm != "mha"])


def context_part(results: Results) -> str:
    found = context_gains(results)
    if len(found) < 3:
        return "Not enough runs were made."
    _, gain, ppl = zip(*found, strict=True)
    r = float(np.corrcoef(gain, np.log(ppl))[0, 1])
    return f"{len(found)} runs; the correlation of the gain with the logarithm of the perplexity is {r:.2f}."


PARTS = {
    "status": status,
    "figure1": figure1_part,
    "heads": heads_part,
    "grid": grid_part,
    **{study: table_part(study) for study in ("table3", "table4", "table5", "table6")},
    "figure3": figure3_part,
    "question_a": question_a_part,
    "question_b": question_b_part,
    "checked": checked_part,
    "why": lambda results: main_table(results, "why"),
    "positions": positions_part,
    "context": context_part,
    "length": length_part,
}


def made_by(rows: dict[tuple, dict]) -> str:
    """Where and by which commands lines of results were made."""
    runs = [(row["device"], row["versions"]["torch"], row["commit"][:7], row["command"]) for row in rows.values()]
    return "\n".join(f"{on}, torch {torch}, commit {at}, `{how}`." for on, torch, at, how in dict.fromkeys(runs))


def copying_part(rows: dict[tuple[str, int], dict]) -> str:
    body, given_up = [], max(row["of"] for row in rows.values())

    def text(step: float) -> str:
        return f"{step:.0f}" if step < math.inf else f"> {given_up}"

    for arm, steps in copying.steps_of(rows).items():
        params = next(row["params"] for (name, _), row in rows.items() if name == arm)
        each = ", ".join(map(text, steps))
        body.append([copying.ARMS[arm].name, f"{params:,}", str(len(steps)), text(statistics.median_high(steps)), each])
    return table(["", "parameters", "seeds", "median step", "each seed's"], body) + "\n\n" + made_by(rows)


def rounding_part(rows: dict[tuple[str, float, str], dict]) -> str:
    body = []
    for arm, lr, dtype in rows:
        if dtype == "float32":
            trained = [rounding.summary(rows[at]) for at in ((arm, lr, dtype), (arm, lr, "bfloat16")) if at in rows]
            body.append([rounding.ARMS[arm].name, f"{lr:g}", *trained[0], trained[1][-1] if trained[1:] else "–"])
    head = ["", "peak lr", "gradient off by, median", "most", "its norm by, most", "range of scores, median"]
    head += ["loss, trained in float32", "in bfloat16"]
    return table(head, body) + "\n\n" + made_by(rows)


def fill(text: str, parts: dict[str, str]) -> str:
    """text with what stands between <!-- begin NAME --> and <!-- end NAME --> replaced. BadInput where a mark is missing."""
    for name, part in parts.items():
        marked = re.compile(rf"(?<=<!-- begin {name} -->\n).*?(?=<!-- end {name} -->)", re.S)
        text, n = marked.subn(part.replace("\\", r"\\") + "\n", text)
        if n != 1:
            raise BadInput(f"--readme: needs <!-- begin {name} --> and <!-- end {name} --> once, each on its own line")
    return text


# ---------------------------------------------------------------------------------------------------------------------
# The plots


def figure1(results: Results) -> Figure | None:
    """Perplexity against cache, as the paper's Figure 1."""
    figure = Figure(figsize=(9, 4.8), layout="constrained")
    ax, drawn = figure.subplots(), Counter()  # arms so far, by color and by cache
    for arm, a in FIGURE1.items():
        ppl = [row["ppl"] for row in results.trained("figure1", arm)]
        if ppl:
            color, _ = STYLE[a.model["attn"]]
            kept = on_paper(run_for("figure1", arm, 1, 0, results.toy))[1]
            error = statistics.stdev(ppl) if len(ppl) > 1 else 0
            place = kept * 1.05 ** drawn[kept]  # arms of one cache stand beside each other
            look = dict(color=color, marker="osD^v"[drawn[color]], markersize=8, capsize=3, linestyle="none", alpha=0.8)
            ax.errorbar([place], [statistics.mean(ppl)], [error], label=f"{a.name} ({len(ppl)})", **look)
            drawn.update([color, kept])
    if not drawn:
        return None
    ax.set_xscale("log", base=2)
    low, high = ax.get_xlim()
    ticks = [2**i for i in range(4, 20) if low <= 2**i <= high]
    ax.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    ax.set(xlabel="KV cache, bytes per token at 16 bit (equal ones side by side)", ylabel="validation perplexity")
    ax.grid(alpha=0.3)
    figure.legend(*ax.get_legend_handles_labels(), loc="outside right upper", fontsize=8, title="(seeds)")
    return figure


def figure3(results: Results) -> Figure | None:
    """Loss against N D with the power laws, and cache against size, as the paper's Figure 3."""
    found = scaling(results)
    if max(map(len, found.values())) < 2:  # one size says nothing of scaling
        return None
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    sizes = ("2m", "7m", "30m", "60m")
    for attn, name in SCALED:
        color, marker = STYLE[attn]
        if not found[attn]:
            continue
        nd, loss = zip(*found[attn], strict=True)
        label = name
        if len(nd) > 2:
            a, b, _ = power_law(found[attn])
            x = np.geomspace(min(nd), max(nd), 50)
            left.plot(x, a * x**-b, color=color, linewidth=1)
            label += f": {a:.1f} (N D)^-{b:.3f}"
        left.plot(nd, loss, color=color, marker=marker, linestyle="none", label=label)
        runs = [run_for("figure3", f"{attn}_{size}", 1, 0, results.toy) for size in sizes]
        params, kept, _ = zip(*map(on_paper, runs), strict=True)
        right.plot(params, kept, color=color, marker=marker, label=name)
    left.set(xscale="log", yscale="log", xlabel="parameters x tokens", ylabel="validation loss, nats per token")
    low, high = left.get_ylim()
    left.set_yticks([loss for loss in np.arange(2, 8, 0.25) if low <= loss <= high])
    left.yaxis.set_major_formatter("{x:.2f}")
    left.yaxis.set_minor_formatter("")
    right.set(xscale="log", yscale="log", xlabel="parameters", ylabel="KV cache, bytes per token at 16 bit")
    right.set_xticks(params, [size.upper() for size in sizes])  # any attention's: they are alike. A new scale forgets its ticks
    right.xaxis.set_minor_formatter("")
    for ax in (left, right):
        ax.grid(alpha=0.3)
        ax.legend(fontsize=8)
    return figure


def length(results: Results) -> Figure | None:
    """Loss by position for contexts of 512 and 2,048, and how far it is from MHA's."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    losses = {}  # (attention, context) -> {first position of a bin: mean loss over the seeds}
    for arm, rows in same_seeds(results, "length").items():
        attn, _, context = arm.rpartition("_")
        means = np.mean([[loss for _, loss in row["by_position"]] for row in rows], axis=0) if rows else []
        losses[attn, context] = {p: loss for (p, _), loss in zip(rows[0]["by_position"], means, strict=True)} if rows else {}
    if not any(losses.values()):
        return None
    for attn, name in ATTENTIONS:
        for context, line in (("512", "--"), ("2048", "-")):
            by, mha = losses[attn, context], losses["mha", context]
            style = dict(
                color=STYLE[attn][0], marker=STYLE[attn][1], markersize=5, linestyle=line, label=f"{name}, context {context}"
            )
            if by:
                left.plot([max(p, 0.5) for p in by], by.values(), **style)
            if by and mha and attn != "mha":
                right.plot([max(p, 0.5) for p in by], [by[p] - mha[p] for p in by], **style)
    left.set_ylabel("validation loss, nats per token")
    right.set_ylabel("less MHA's at the same context")
    right.axhline(0, color="black", linewidth=0.8)
    for ax in (left, right):
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_formatter(lambda x, _: f"{x:.0f}")
        ax.set_xlabel("position p (mean over p to 2p - 1)")
        ax.grid(alpha=0.3)
        if ax.lines:
            ax.legend(fontsize=8)
    return figure


def context(results: Results) -> Figure | None:
    """Perplexity against what a long context is worth to a model, run by run."""
    found = context_gains(results)
    if not found:
        return None
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    ax = figure.subplots()
    for attn, (color, marker) in STYLE.items():
        if points := [(gain, ppl) for name, gain, ppl in found if name == attn]:
            ax.plot(*zip(*points, strict=True), color=color, marker=marker, linestyle="none", alpha=0.8,
                    label=attn.upper().replace("_", "-"))  # fmt: skip
    ax.set(xlabel="loss at positions 32 to 63 less loss at 256 to 511, nats", ylabel="validation perplexity", yscale="log")
    ax.yaxis.set_major_formatter("{x:.0f}")
    ax.yaxis.set_minor_formatter("{x:.0f}")
    ax.grid(alpha=0.3, which="both")
    ax.legend(fontsize=8)
    return figure


def copying_plot(rows: dict[tuple[str, int], dict]) -> Figure:
    """The step at which each seed of each attention began to copy; at the right edge, hollow, those that did not."""
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    ax, found = figure.subplots(), copying.steps_of(rows)
    edge = max(row["of"] for row in rows.values())
    for y, (arm, steps) in enumerate(found.items()):
        color, marker = STYLE[copying.ARMS[arm].model["attn"]]
        for step in steps:
            face = color if step < math.inf else "none"
            ax.plot(min(step, edge), y, color=color, marker=marker, markerfacecolor=face, alpha=0.8, linestyle="none")
        ax.plot([min(statistics.median_high(steps), edge)] * 2, [y - 0.3, y + 0.3], color=color)
    ax.set_yticks(range(len(found)), [copying.ARMS[arm].name for arm in found])
    ax.invert_yaxis()
    ax.set(xlabel="step at which the loss on the repetitions is half of guessing's; | median", xlim=(0, None))
    ax.grid(alpha=0.3)
    return figure


PLOTS = {"figure1": figure1, "context": context, "figure3": figure3, "length": length}


@dataclass
class Args:
    """Make the plots and fill the tables of experiments/README.md."""

    results: Path = RESULTS
    """What run.py wrote; the plots go beside it."""
    readme: Path = ROOT / "experiments" / "README.md"
    """File whose marked parts are filled."""
    dataset: str = "pg-books"
    """Which text's results."""
    smoke: bool = False
    """The results are those of run.py --smoke."""


def main(args: Args) -> None:
    dataset = "shakespeare-byte" if args.smoke else f"{args.dataset}-bpe{VOCAB}"
    results = Results(read_results(args.results), dataset, args.smoke)
    if not results.done:  # and do not empty the tables
        what = f"has no result on {dataset}; --dataset or --smoke may say another" if args.results.is_file() else "is not there"
        raise BadInput(f"--results {args.results}: {what}; python experiments/run.py makes results")
    parts = {name: part(results) for name, part in PARTS.items()}
    plots = {name: plot(results) for name, plot in PLOTS.items()}
    if rows := copying.read(args.results.with_name(copying.RESULTS.name)):
        parts["copying"], plots["copying"] = copying_part(rows), copying_plot(rows)
    if rows := rounding.read(args.results.with_name(rounding.RESULTS.name)):
        parts["rounding"] = rounding_part(rows)
    for name, figure in plots.items():
        path = args.results.with_name(f"{name}.png")
        if figure:
            write_atomically(path, lambda f, figure=figure: figure.savefig(f, dpi=100, metadata={"Software": None}))
            link = Path(os.path.relpath(path, args.readme.parent)).as_posix()
            parts[name] = f"![{name}]({link})\n\n{parts[name]}"
            print(path)
    decode = args.results.with_name("decode.json")
    if decode.is_file():
        parts["decode"] = grid_tables(read_json(decode))
    text = fill(args.readme.read_text(encoding="utf-8"), parts)
    write_atomically(args.readme, lambda f: f.write(text.encode()))
    print(f"{args.readme}: {len(results.done)} results")


if __name__ == "__main__":
    run_command(main, Args)
