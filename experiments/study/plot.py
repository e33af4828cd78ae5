"""Plots and tables from the results of run.py: python experiments/study/plot.py

Writes the plots beside the results and fills the generated parts of experiments/RESULTS.md, with
the paper's figure beside ours. Every number is taken from a line of the results; a row none of
whose runs was made says so. Seeds are shown as mean ± standard deviation (of the sample, n - 1).
"""

import itertools
import math
import os
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure

from experiments.bench import decoding, equal_time, sharding
from experiments.bench import training as training_bench
from experiments.paper.hybrids import HYBRIDS, measured_cache_bytes
from experiments.paper.tables import FIGURE1_MLA
from experiments.probes import copying, many_gpus, rounding
from experiments.study import conversion, words
from experiments.study.studies import (
    ADAMW_7M,
    BEST_KR,
    FIGURE1,
    FIGURE3,
    GRID,
    HEADS_CORE,
    LENGTH,
    MODERN,
    MUON_GRID,
    QUESTION_A,
    QUEUE,
    RATIOS,
    RESULTS,
    SEEDS,
    STUDIES,
    WHY,
    Run,
    best_rate,
    build,
    dataset_asked_for,
    dataset_of,
    grid_of,
    losses_by_rate,
    queue,
    read_results,
    results_by_run,
    run_for,
    settings,
    untrained,
)
from mfa import ATTENTION, Config, cache_bytes, preset
from support.cli import BadInput, run_command
from support.files import write_atomically
from support.generated import fill
from support.palette import COLOR, MARKER, NAME
from support.provenance import ROOT, read_json
from train import mha_of

WITH_GRID = {study for study, _, factors, _ in QUEUE if factors in (GRID, MUON_GRID)}
TOO_HIGH = 20 / 7  # of figure1's middle rate: 4e-3, which the first three arms do not stand
COMPARED = ("mha", "mfa", "mfa_kr")
SCALED = {attn: NAME[attn] for attn in COMPARED} | {"mfa_half": "MFA, query rank dim/2"}
# Student's t of a two-sided 95% interval, by degrees of freedom; more than 12 count as 12.
T95 = [math.inf, 12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179]


class Results:
    """The results on one text, by default each study's own. toy: those of --smoke.

    done[run] is the line of a run.
    """

    def __init__(self, rows: list[dict], dataset: str = "", toy: bool = False):
        self.rows, self.done, self.toy = rows, results_by_run(rows, dataset), toy

    def run(self, study: str, arm: str, factor: float = 1) -> Run:
        """The run of the first seed."""
        return run_for(study, arm, factor, 0, self.toy)

    def of(self, study: str, arm: str, factor: float | None = None) -> list[dict]:
        """The lines of an arm, one a seed, at `factor` times its middle learning rate.

        By default at the best rate, if the study has a grid of them.
        """
        if factor is None and study in WITH_GRID:
            factor = best_rate(study, arm, self.done, self.toy)
        factor = factor or 1  # None: no other rate is in the plan, or none has a loss
        runs = [run_for(study, arm, factor, seed, self.toy) for seed in SEEDS]
        return [self.done[run] for run in runs if run in self.done]

    def trained(self, study: str, arm: str) -> list[dict]:
        """Those of them, at the best learning rate, that trained."""
        return [row for row in self.of(study, arm) if not untrained(row)]

    def losses_by_rate(self, study: str, arm: str) -> dict[float, dict[int, float | None]]:
        return losses_by_rate(study, arm, self.done, self.toy)


# --------------------------------------------------------------------------------------------------
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
    texts = [spread(trained, digits)] if trained else []
    if len(trained) < len(rows):
        texts.append(f"{len(rows) - len(trained)} of {len(rows)} failed")
    return ", ".join(texts)


class Pooled(NamedTuple):
    """One variance for several arms: of a run, over the seeds."""

    variance: float
    degrees: int

    def half_interval(self, n: int, m: int) -> float:
        """Half the 95% interval, Student's t, of a difference of means of n and of m runs."""
        t = T95[min(self.degrees, len(T95) - 1)]
        return t * math.sqrt(self.variance * (1 / n + 1 / m))


def pooled(arms: Iterable[list[float]]) -> Pooled | None:
    """Of the arms with two runs or more; None if there is none."""
    several = [values for values in arms if len(values) > 1]
    degrees = sum(len(values) - 1 for values in several)
    squares = sum((len(values) - 1) * statistics.variance(values) for values in several)
    return Pooled(squares / degrees, degrees) if several else None


def difference(
    ours: list[float], theirs: list[float], pool: Pooled | None = None
) -> tuple[float, float | None]:
    """Mean of theirs less mean of ours, and half its 95% interval.

    By the variance of pool, else by one variance for these two, None for single runs. Not paired
    by seed: over our arms the losses of equal seeds do not go together.
    """
    if pool is None and min(len(ours), len(theirs)) > 1:
        pool = pooled([ours, theirs])
    half = pool.half_interval(len(ours), len(theirs)) if pool else None
    return statistics.mean(theirs) - statistics.mean(ours), half


def table(head: list[str], body: list[list[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


class Sizes(NamedTuple):
    params: int
    cache_bytes: int  # per token, at 16 bit
    cache_share: float  # of MHA's


@cache
def sizes_of(run: Run) -> Sizes:
    """Without training anything."""
    with torch.device("meta"):
        model = build(run)
    params = sum(p.numel() for p in model.parameters())
    size = measured_cache_bytes(model)
    return Sizes(params, size, size / cache_bytes(mha_of(run.cfg)))


def main_table(results: Results, study: str) -> str:
    body = []
    for arm, a in STUDIES[study].items():
        rows = results.of(study, arm)
        sizes = sizes_of(results.run(study, arm))
        lr = f"{rows[0]['lr']:.3g}" if rows else "–"
        n_rates = len(results.losses_by_rate(study, arm))
        if rows and study in WITH_GRID and n_rates < len(GRID):
            lr += f", of {n_rates} tried"
        counts = [f"{sizes.cache_bytes:,}", f"{sizes.cache_share:.2%}"]
        counts += [f"{sizes.params / 1e6:.2f}M", lr, str(len(rows))]
        bpb = outcome(rows, "bpb", 4) if rows else "–"
        body.append([a.name, *counts, outcome(rows), bpb, a.paper or "–"])
    head = ["", "cache, bytes per token", "of MHA's", "parameters", "peak lr", "seeds"]
    return table([*head, "perplexity", "bits per byte", "paper"], body)


def order(results: Results, study: str) -> str:
    """Does the order of the rows agree with the paper's? Pairs that differ are named."""
    arms = {arm: a for arm, a in STUDIES[study].items() if a.paper}
    ppl = {arm: [row["ppl"] for row in results.trained(study, arm)] for arm in arms}
    ours = {arm: statistics.mean(values) for arm, values in ppl.items() if values}
    pairs = [
        (a, b)
        for a, b in itertools.permutations(ours, 2)
        if float(arms[a].paper) < float(arms[b].paper)
    ]
    if not pairs:
        return "Order: no two rows that the paper has a figure for were made."
    differ = [
        f"{arms[b].name} ({ours[b]:.2f}) better than {arms[a].name} ({ours[a]:.2f})"
        for a, b in pairs
        if ours[b] < ours[a]
    ]
    text = f"Order: {len(pairs) - len(differ)} of {len(pairs)} pairs as in the paper."
    return text + (f" The other way round here: {'; '.join(differ)}." if differ else "")


StudyArm = tuple[str, str]  # (study, arm)


def losses_by_seed(results: Results, which: StudyArm, factor: float | None) -> dict[int, float]:
    """Of the runs that trained, at `factor` of the arm's rate, by default at its best."""
    return {r["seed"]: r["val_loss"] for r in results.of(*which, factor) if not untrained(r)}


def difference_cells(
    results: Results,
    one: StudyArm,
    other: StudyArm,
    factor: float | None = None,
    pool: Pooled | None = None,
) -> list[str]:
    """The loss of other less that of one, see losses_by_seed."""
    ours, theirs = (losses_by_seed(results, which, factor) for which in (one, other))
    text, verdict = "–", "not made"
    if ours and theirs:
        mean, half = difference([*ours.values()], [*theirs.values()], pool)
        text = f"{mean:z.4f}" + (f" ± {half:.4f}" if half is not None else "")
        seeds = ours.keys() & theirs.keys()
        wins = sum(theirs[seed] > ours[seed] for seed in seeds)
        verdict = f"in {wins} of {len(seeds)} seeds"
    names = [STUDIES[study][arm].name for study, arm in (one, other)]
    share = sizes_of(results.run(*other)).cache_share
    return [*names, f"{share:.2%}", text, verdict]


def differences(
    results: Results,
    pairs: Iterable[tuple[StudyArm, StudyArm]],
    factor: float | None = None,
    pool: Pooled | None = None,
) -> str:
    head = ["", "against", "whose cache is", "its loss less ours, nats (95%)", "ours is better"]
    return table(head, [difference_cells(results, *pair, factor, pool) for pair in pairs])


# --------------------------------------------------------------------------------------------------
# The parts of RESULTS.md


def status_part(results: Results) -> str:
    body = []
    for study in STUDIES:
        runs = [task.run for task in queue(study, results.toy, results.done)]
        made = sum(run in results.done for run in runs)
        lost = sum(untrained(row) for row in results.rows if row["study"] == study)
        body.append([study, str(len(runs)), str(made), str(lost)])
    runs = [task.run for task in queue("all", results.toy, results.done)]
    made = sum(run in results.done for run in runs)
    together = f"Together {len(runs)} runs, since studies share some; {made} are made."
    if more := len(results.done) - made:
        together += f" {more} more are at rates that are not in the plan."
    return table(["study", "runs", "made", "of them failed"], body) + "\n\n" + together


def figure1_part(results: Results) -> str:
    others = [arm for arm in FIGURE1 if not arm.startswith("mfa")]
    pairs = [("mfa", arm) for arm in (*others, "mfa_kr")]
    pairs += [("mfa_half", arm) for arm in (*others, "mfa")]
    pairs += [("mfa_2d", arm) for arm in ("mha", "gqa2", "gqa4", "mfa", "mfa_kr_2d")]
    pairs += [("mfa_kr", arm) for arm in ("mha", "gqa2", "mfa_kr_half")]
    claims = differences(results, ((("figure1", one), ("figure1", other)) for one, other in pairs))
    return "\n\n".join([main_table(results, "figure1"), order(results, "figure1"), claims])


def heads_part(results: Results) -> str:
    arms = [arm for arm in WHY if arm.endswith("_16")]
    ours = ("mfa", "mfa_half", "mfa_kr")
    return differences(results, ((("figure1", one), ("why", arm)) for one in ours for arm in arms))


def why_part(results: Results) -> str:
    pairs = [(f"mha_{steps}", f"mfa_{steps}") for steps in ("2000", "8000", "base_2000", "base")]
    both = [(("why", one), ("why", other)) for one, other in pairs]
    plain = dict(mha_base="mha", mfa_base="mfa", mfa_kr_base="mfa_kr", mha_16="mha")
    both += [(("why", arm), ("figure1", other)) for arm, other in plain.items()]
    both += [(("why", arm), ("figure1", "mfa_half")) for arm in ("mfa_quarter", "mfa_full")]
    return main_table(results, "why") + "\n\nAt one rate:\n\n" + differences(results, both, 1)


def rates_of(results: Results, study: str, arm: str, factors: Iterable[float]) -> list[str]:
    return [f"{results.run(study, arm, factor).lr:.3g}" for factor in factors]


def grid_part(results: Results) -> str:
    arms = [("figure1", arm) for arm in FIGURE1]
    arms += [("table4", arm) for arm in ("vanilla", "proj", "residual")]
    arms += [(study, arm) for study in ("table3", "table5") for arm in STUDIES[study]]
    factors = (*GRID, TOO_HIGH)
    body = []
    for study, arm in arms:
        losses = results.losses_by_rate(study, arm)
        best = None
        if len(losses) == len(GRID):
            best = best_rate(study, arm, results.done, results.toy)
        cells = []
        for factor in factors:
            seeds = losses.get(factor, {0})
            rows = [row for row in results.of(study, arm, factor) if row["seed"] in seeds]
            text = "–" if factor == TOO_HIGH and not rows else outcome(rows)
            cells.append(f"**{text}**" if rows and factor == best else text)
        body.append([STUDIES[study][arm].name, *cells])
    head = ["perplexity, peak lr", *rates_of(results, "figure1", "mha", factors)]
    return table(head, body)


def rates_table(results: Results, study: str, arms: Iterable[str]) -> str:
    """Perplexity at the best rate, over the seeds, and at each rate of the first seed."""
    arms = [*arms]
    planned = {task.run for task in queue(study, results.toy, results.done)}
    grid = grid_of(study, arms[0])
    body = []
    for arm in arms:
        rows, sizes = results.of(study, arm), sizes_of(results.run(study, arm))
        counts = [f"{sizes.cache_bytes:,}", f"{sizes.cache_share:.2%}"]
        counts += [f"{sizes.params / 1e6:.2f}M", f"{rows[0]['lr']:.3g}" if rows else "–"]
        runs = [results.run(study, arm, factor) for factor in grid]
        cells = [
            outcome([results.done[run]] if run in results.done else []) if run in planned else "–"
            for run in runs
        ]
        body.append([STUDIES[study][arm].name, *counts, str(len(rows)), outcome(rows), *cells])
    head = ["", "cache, bytes per token", "of MHA's", "parameters", "peak lr", "seeds"]
    rates = [f"{rate}, seed 0" for rate in rates_of(results, study, arms[0], grid)]
    return table([*head, "perplexity", *rates], body)


def pooled_seeds(results: Results, study: str, arms: Iterable[str]) -> Pooled | None:
    """Of some arms of a study, each at its best rate."""
    return pooled([*losses_by_seed(results, (study, arm), None).values()] for arm in arms)


def against_others(
    results: Results,
    study: str,
    ours: Iterable[str],
    arms: Iterable[str],
    factor: float | None = None,
    pool: Pooled | None = None,
) -> str:
    """Distances of some arms from every other that was made."""
    made = [arm for arm in arms if results.of(study, arm, factor)]
    pairs = [(arm, other) for arm in ours for other in made if arm in made and other != arm]
    return differences(results, (((study, one), (study, two)) for one, two in pairs), factor, pool)


def interval_text(pool: Pooled | None) -> str:
    if not pool:
        return ""
    return (
        f"An interval takes a run's deviation, {pool.variance**0.5:.4f} nats, from all arms with "
        f"several seeds together, {pool.degrees} degrees of freedom: two seeds of one arm say "
        f"little of it. It leaves out that seed 0 has chosen the rate, too."
    )


def modern_part(results: Results) -> str:
    """All rates, and how far apart the arms with a grid of them are, each at its best."""
    pool = pooled_seeds(results, "modern", MODERN)
    tried = [arm for arm in MODERN if len(results.losses_by_rate("modern", arm)) >= len(GRID)]
    ours = ("mfa_norm", "mfa", BEST_KR)
    texts = [rates_table(results, "modern", MODERN), interval_text(pool)]
    texts += ["Each at its best of three or more rates:"]
    texts.append(against_others(results, "modern", ours, tried, pool=pool))
    return "\n\n".join(filter(None, texts))


RECIPES = dict(muon="Muon", adamw="AdamW", short="Muon, 2.2 tokens a parameter")  # RATIOS' arms


def ratio_part(results: Results) -> str:
    texts = []
    for study in RATIOS:
        if made := ratio_tables(results, study):
            run = results.run(study, "muon_mha_norm")
            tokens = run.max_iters * run.batch_size * run.cfg.block_size
            size = STUDIES[study]["muon_mha_norm"].size.partition(",")[0]
            what = f"{tokens / 1e6:.0f}M tokens, {tokens / sizes_of(run).params:.1f} a parameter"
            steps = f"{run.max_iters:,} steps of {run.batch_size} x {run.cfg.block_size}"
            texts += [f"**{size}**: {what}, in {steps}.", *made]
    if not texts:
        return ""
    head = "## The paper's ratio of tokens to parameters"
    rates = "Rates begin at the best of shorter runs at 30M; – is a rate that was not to be tried."
    return "\n\n".join(filter(None, [head, rates, *texts]))


def ratio_tables(results: Results, study: str) -> list[str]:
    texts = []
    for recipe, title in RECIPES.items():
        arms = [arm for arm in STUDIES[study] if arm.startswith(recipe)]
        if any(results.of(study, arm) for arm in arms):
            pool = pooled_seeds(results, study, arms)
            ours = [arm for arm in arms if STUDIES[study][arm].model["attn"] in ("mfa", "mfa_kr")]
            texts += [f"{title}:", rates_table(results, study, arms), interval_text(pool)]
            texts.append(against_others(results, study, ours, arms, pool=pool))
    return texts


# (study, arm) of the stacked one, arm of the other, size
HEADS = [
    *((("muon_heads", f"{attn}_stacked"), f"{attn}_apart", "7M") for attn in ("mha", "mfa")),
    *((("modern", arm), f"{arm}_30m", "30M") for arm in HEADS_CORE),
]


def muon_heads_part(results: Results) -> str:
    body = []
    for (study, arm), apart, size in HEADS:
        of = {row["seed"]: row for row in results.of("muon_heads", apart)}
        rows = [row for row in results.of(study, arm, 1) if row["seed"] in of]
        if rows:
            pair = rows, [of[row["seed"]] for row in rows]
            gains = [a["val_loss"] - b["val_loss"] for a, b in zip(*pair, strict=True)]
            gain = f"{statistics.mean(gains):.4f}, in {sum(x > 0 for x in gains)} of {len(gains)}"
            losses = (outcome(made, "val_loss", 4) for made in pair)
            name = rows[0]["name"].removesuffix(", heads stacked")
            body.append([name, size, *losses, gain])
    if not body:
        return ""
    question = "Does Muon do better on heads one by one (`muon_heads`) than on the stacked matrix?"
    head = ["", "parameters", "loss, nats per token, stacked", "one by one"]
    head += ["less by, in how many seeds"]
    return "\n\n".join([question, table(head, body)])


def table_part(study: str, *pairs: tuple[str, str]) -> Callable[[Results], str]:
    """The table of a study, its order against the paper's, and differences between its arms.

    An arm of another study is named "study/arm".
    """

    def which(name: str) -> StudyArm:
        one, _, other = name.rpartition("/")
        return (one or study, other)

    def part(results: Results) -> str:
        parts = [main_table(results, study), order(results, study)]
        if pairs:
            both = [(which(one), which(other)) for one, other in pairs]
            parts.append(differences(results, both))
        return "\n\n".join(parts)

    return part


# What the findings compare, of each of the paper's tables.
TABLE3_PAIRS = [("wide", "plain"), ("factored", "plain"), ("factored", "wide")]
TABLE4_PAIRS = [("gated", arm) for arm in ("mha", "mfa", "vanilla", "proj", "residual")]
TABLE5_PAIRS = [("mfa", "mha"), ("mfa_kr", "mha")]
TABLE5_PAIRS += [(arm, f"figure1/{arm}") for arm in ("mha", "mfa", "mfa_kr")]
TABLE6_PAIRS = [("single_value", "compressed_value"), ("single_key", "compressed_key")]
TABLE6_PAIRS += [(arm, "figure1/mha") for arm in STUDIES["table6"]]


def question_a_part(results: Results) -> str:
    planned = {task.run for task in queue("question_a", results.toy)}
    factors = GRID[1:]
    body = []
    for arm, a in QUESTION_A.items():
        cells = [
            outcome(results.of("question_a", arm, factor))
            if results.run("question_a", arm, factor) in planned
            else "–"
            for factor in factors
        ]
        body.append([a.name, *cells])
    head = ["perplexity, peak lr", *rates_of(results, "question_a", "pre", factors)]
    pairs = [("pre", "post"), ("pre", "inverse"), ("inverse", "post"), ("pre", "none")]
    text = [table(head, body)]
    for factor, rate in zip(factors, head[1:], strict=True):
        known = [pair for pair in pairs if factor == 1 or "none" not in pair]
        both = [[("question_a", arm) for arm in pair] for pair in known]
        text.append(f"At {rate}:\n\n" + differences(results, both, factor))
    return "\n\n".join(text)


def question_b_part(results: Results) -> str:
    names = dict(mha="MHA", mqa="MQA", mla="MLA, joint latent of dim/4", mfa="MFA, C = dim/8")
    inits = ("scaled", "plain", "attn", "vo")
    body = []
    for attn, name in names.items():
        arms = [f"{attn}_{size}_{init}" for size in ("30m", "7m") for init in inits]
        body.append([name, *(outcome(results.of("question_b", arm)) for arm in arms)])
    head = ["perplexity by init std"]
    for dim in (512, 256):
        stds = [f"{0.02 * (2048 / dim) ** 0.5:.3f}", "0.02", "0.02 in attention", "0.02 in V, O"]
        head += [f"dim {dim}, {std}" for std in stds]
    both = []
    for size, attn, init in itertools.product(("30m", "7m"), names, inits[1:]):
        both.append([("question_b", f"{attn}_{size}_{which}") for which in (init, "scaled")])
    return table(head, body) + "\n\n" + differences(results, both)


def gradient_part(results: Results) -> str:
    """The runs whose gradient rounding moved by more than 5% at some point of the curve."""
    measured = [row for row in results.done.values() if row.get("rounding")]
    body, others = [], []
    for row in measured:
        moved = [math.inf if share is None else share for _, share in row["rounding"]]
        if max(moved) <= 0.05:
            others.append(max(moved))
            continue
        first, most, last = (
            f"{share:.0%}" if share < math.inf else "not finite"
            for share in (moved[0], max(moved), moved[-1])
        )
        which = [f"{row['study']}: {row['name']}", f"{row['lr']:.3g}", str(row["seed"])]
        body.append([*which, first, most, last, outcome([row])])
    head = ["", "peak lr", "seed", "gradient off by, first look", "most", "last look", "perplexity"]
    text = f"Rounding moves the gradient of the other {len(others)} of {len(measured)} runs"
    text += " that were asked"
    text += f" by {max(others):.1%} at most." if others else "."
    return table(head, body) + "\n\n" + text


def same_seeds(results: Results, study: str) -> dict[str, list[dict]]:
    """The trained lines of each arm, of seeds that all arms of its size have.

    A mean beside one seed would not be even.
    """
    arms, common = STUDIES[study], {}
    trained = {arm: results.trained(study, arm) for arm in arms}
    for arm, rows in trained.items():
        if rows:
            size, seeds = arms[arm].size, {row["seed"] for row in rows}
            common[size] = common.get(size, seeds) & seeds
    return {
        arm: [row for row in rows if row["seed"] in common[arms[arm].size]]
        for arm, rows in trained.items()
    }


def length_part(results: Results) -> str:
    short, long = (
        results.run("length", arm).cfg.block_size for arm in ("mha_512", "mha_2048")
    )  # fmt: skip
    bins = [b for b in (1 << i for i in range(20)) if short // 8 <= b < long]
    body = []
    for arm, rows in same_seeds(results, "length").items():
        by = [dict(row["by_position"]) for row in rows]
        cells = [spread([d[b] for d in by], 4) if by and b in by[0] else "–" for b in bins]
        whole = outcome(rows or results.of("length", arm), "val_loss", 4)
        body.append([LENGTH[arm].name, whole, *cells])
    positions = [f"{b} to {2 * b - 1}" for b in bins]
    return table(["loss, nats per token", "all positions", *positions], body)


def scaling(results: Results) -> dict[str, list[tuple[float, float]]]:
    """Figure 3's points of each attention, dense: (N D, mean loss)."""
    points = {attn: [] for attn in SCALED}
    for arm, rows in same_seeds(results, "figure3").items():
        attn, _, size = arm.rpartition("_")
        if rows and size != "moe":
            loss = statistics.mean(row["val_loss"] for row in rows)
            points[attn].append((rows[0]["params"] * rows[0]["tokens"], loss))
    return {attn: sorted(of_attn) for attn, of_attn in points.items()}


def power_law(points: list[tuple[float, float]]) -> tuple[float, float, float]:
    """(a, b, rms): loss = a (N D)^-b by least squares on the logarithms.

    rms: the root mean square of what is left, in nats.
    """
    x, y = np.log(points).T
    slope, intercept = np.polyfit(x, y, 1)
    left = np.exp(y) - np.exp(intercept + slope * x)
    return float(np.exp(intercept)), float(-slope), float(np.sqrt(np.mean(left**2)))


def figure3_part(results: Results) -> str:
    body = []
    for arm, rows in same_seeds(results, "figure3").items():
        run = results.run("figure3", arm)
        sizes = sizes_of(run)
        tokens = run.max_iters * run.batch_size * run.cfg.block_size
        counts = [f"{sizes.params / 1e6:.2f}M", f"{tokens / 1e6:.1f}M"]
        counts += [f"{sizes.cache_bytes:,}", f"{sizes.cache_share:.2%}"]
        loss = outcome(rows or results.of("figure3", arm), "val_loss", 4)
        body.append([FIGURE3[arm].name, *counts, loss])
    head = ["", "parameters N", "tokens D", "cache, bytes per token", "of MHA's"]
    lines = [law_of(SCALED[attn], points) for attn, points in scaling(results).items()]
    return table([*head, "loss, nats per token"], body) + "\n\n" + "\n".join(lines)


def law_of(name: str, points: list[tuple[float, float]]) -> str:
    if len(points) < 3:
        return f"- {name}: no fit, {len(points)} of 4 dense sizes made."
    a, b, rms = power_law(points)
    law = f"loss = {a:.2f} (N D)^-{b:.4f}, off by {rms:.4f} nats (rms)"
    return f"- {name}: {law}, over {len(points)} of 4 dense sizes."


def context_gains(results: Results) -> list[tuple[str, float, float]]:
    """(attention, gain, perplexity) of every 30M run of AdamW at a context of 512 that trained.

    gain: how much lower the loss is at positions 256 to 511 than at 32 to 63, in nats. Hybrids and
    ruinous learning rates are left out.
    """
    middle = results.run("figure1", "mha")
    cfg = middle.cfg
    early, late = cfg.block_size // 16, cfg.block_size // 2
    gains = []
    for run, row in results.done.items():
        same_size = (run.cfg.dim, run.cfg.block_size) == (cfg.dim, cfg.block_size)
        plain = not run.cfg.n_expert and run.build not in HYBRIDS
        plain = plain and run.optimizer == "adamw"
        if same_size and plain and run.lr < TOO_HIGH * middle.lr and not untrained(row):
            by = dict(row["by_position"])
            gains.append((run.cfg.attn, by[early] - by[late], row["ppl"]))
    return gains


def positions_part(results: Results) -> str:
    """How much worse than MHA each attention of Figure 1 is at each position, means over seeds."""
    mean = {}
    for arm in FIGURE1:
        by = [dict(row["by_position"]) for row in results.trained("figure1", arm)]
        if by:
            mean[arm] = {p: statistics.mean(losses[p] for losses in by) for p in by[0]}
    if "mha" not in mean:
        return "MHA was not made."
    body = []
    for arm, a in FIGURE1.items():
        if arm != "mha":
            cells = [
                f"{mean[arm][p] - mha:z.3f}" if arm in mean else "not made"
                for p, mha in mean["mha"].items()
            ]
            body.append([a.name, *cells])
    positions = [str(p) if p < 2 else f"{p} to {2 * p - 1}" for p in mean["mha"]]
    return table(["nats worse than MHA, position", *positions], body)


def context_part(results: Results) -> str:
    gains = context_gains(results)
    if len(gains) < 3:
        return "Not enough runs were made."
    _, gain, ppl = zip(*gains, strict=True)
    r = float(np.corrcoef(gain, np.log(ppl))[0, 1])
    what = "the correlation of the gain with the logarithm of the perplexity"
    return f"{len(gains)} runs; {what} is {r:.2f}."


PARTS = {
    "modern": modern_part,
    "ratio": ratio_part,
    "muon_heads": muon_heads_part,
    "status": status_part,
    "figure1_adamw": figure1_part,
    "heads": heads_part,
    "grid": grid_part,
    "table3": table_part("table3", *TABLE3_PAIRS),
    "table4": table_part("table4", *TABLE4_PAIRS),
    "table5": table_part("table5", *TABLE5_PAIRS),
    "table6": table_part("table6", *TABLE6_PAIRS),
    "figure3": figure3_part,
    "question_a": question_a_part,
    "question_b": question_b_part,
    "checked": gradient_part,
    "why": why_part,
    "positions": positions_part,
    "context": context_part,
    "length": length_part,
}


def origin_of(rows: Iterable[dict]) -> str:
    """On what, and by which commit, results were made. Their files have the commands, too."""
    return "\n".join(
        dict.fromkeys(
            f"{row['device']}, torch {row['versions']['torch']}, commit {row['commit'][:7]}."
            for row in rows
        )
    )


def copying_part(rows: dict[tuple[str, int], dict]) -> str:
    most = max(row["of"] for row in rows.values())

    def text(step: float) -> str:
        return f"{step:.0f}" if step < math.inf else f"> {most}"

    body = []
    for arm, steps in copying.steps_by_arm(rows).items():
        params = next(row["params"] for (name, _), row in rows.items() if name == arm)
        median = text(statistics.median_high(steps))
        counts = [f"{params:,}", str(len(steps)), median]
        body.append([copying.ARMS[arm].name, *counts, ", ".join(map(text, steps))])
    head = ["", "parameters", "seeds", "median step", "each seed's"]
    return table(head, body) + "\n\n" + origin_of(rows.values())


def rounding_part(rows: dict[tuple[str, float, str], dict]) -> str:
    body = []
    for arm, lr, dtype in rows:
        if dtype == "float32":
            in_float32 = rounding.summary(rows[arm, lr, dtype])
            other = rows.get((arm, lr, "bfloat16"))
            loss = rounding.summary(other)[-1] if other else "–"
            body.append([rounding.ARMS[arm].name, f"{lr:g}", *in_float32, loss])
    head = ["", "peak lr", "gradient off by, median", "most", "its norm by, most"]
    head += ["range of scores, median", "loss, trained in float32", "in bfloat16"]
    return table(head, body) + "\n\n" + origin_of(rows.values())


class Converted(NamedTuple):
    """A target of conversion.py: losses[steps] are of the best rate, scratch is the loss of the
    same attention trained from scratch, None where that was not made."""

    name: str
    attn: str
    params: int
    cache_bytes: int
    cache_share: float
    losses: dict[int, float]
    scratch: float | None


def converted(rows: list[dict], results: Results) -> list[Converted]:
    """The targets in the order of their caches, largest first."""
    found = []
    for target in dict.fromkeys(row["target"] for row in rows):
        mine = [row for row in rows if row["target"] == target]
        losses = {}
        for row in mine:
            steps, loss = row["steps"], row["val_loss"]
            losses[steps] = min(loss, losses.get(steps, loss))
        arm = conversion.SCRATCH.get(target)
        made = results.trained("modern", arm) if arm else []
        scratch = statistics.mean(row["val_loss"] for row in made) if made else None
        columns = (
            mine[0][name] for name in ("name", "attn", "params", "cache_bytes", "cache_share")
        )
        found.append(Converted(*columns, dict(sorted(losses.items())), scratch))
    return sorted(found, key=lambda one: -one.cache_bytes)


def conversion_part(rows: list[dict], results: Results) -> str:
    if not rows:
        return "Not made yet."
    body = []
    for one in converted(rows, results):
        sizes = [f"{one.cache_bytes:,}", f"{one.cache_share:.2%}", f"{one.params / 1e6:.2f}M"]
        scratch = "not made" if one.scratch is None else f"{math.exp(one.scratch):.2f}"
        body.append(
            [one.name, *sizes, *(f"{math.exp(x):.2f}" for x in one.losses.values()), scratch]
        )
    steps = sorted({row["steps"] for row in rows})
    head = ["", "cache, bytes per token", "of MHA's", "parameters", "perplexity, converted"]
    head += [f"and {n:,} steps" for n in steps[1:]] + ["from scratch"]
    return table(head, body) + "\n\n" + origin_of(rows)


class Shape(NamedTuple):
    """An attention at the paper's 1B shape."""

    name: str
    attn: str
    W: str
    U: str
    cached: str  # per token and layer
    options: dict = {}  # of Config, beside the preset's


SHAPES = [
    Shape("MHA", "mha", "Q_c K_c^T", "V_c O_c^T", "2 n d"),
    Shape("GQA, g = 4", "gqa", "Q_c K_g^T", "V_g O_c^T", "2 g d", dict(n_kv_head=4)),
    Shape("MQA", "mqa", "Q_c K^T", "V O_c^T", "2 d"),
    Shape("MLA, DeepSeek-V2-Lite's", "mla", "Q_c K_c^T S^T", "S V_c O_c^T", "C + d_r", FIGURE1_MLA),
    Shape("MFA", "mfa", "S_q Q_c S_k^T", "S_v O_c^T", "2 C"),
    Shape("MFA-KR", "mfa_kr", "S_q Q_c S_k^T", "S_k (I + N^T diag(alpha)) O_c^T", "C"),
]
SPEED_AT = dict(batch=32, context=16384)


def shapes_part(decode: dict) -> str:
    """Factors, cache, parameters and speed of each attention, all of one model: paper-1b."""
    mha = cache_bytes(preset("paper-1b", "mha"))
    body = []
    for shape in SHAPES:
        cfg = preset("paper-1b", shape.attn, **shape.options)
        size, params = cache_bytes(cfg), cfg.n_layer * ATTENTION[shape.attn].counts(cfg).params
        wanted = dict(model="paper-1b", attn=shape.attn, engine="ours", **SPEED_AT)
        modes = dict.fromkeys(r["mode"] for r in decode["rows"] if r["attn"] == shape.attn)
        rates = {}
        for mode in modes:
            row = decoding.quickest(decode["rows"], mode=mode, **wanted)
            if row and row["counts_bytes"] == size * SPEED_AT["batch"] * SPEED_AT["context"]:
                rates[mode] = f"{row['tokens_per_s']:,.0f}"
        speed = ", ".join(f"{mode} {rate}" for mode, rate in rates.items())
        speed = [*rates.values()][0] if len(rates) == 1 else speed or "not measured"
        counts = [f"{size:,}", f"{100 * size / mha:.4g}%", f"{params / 1e6:,.0f}M", speed]
        body.append([shape.name, shape.W, shape.U, shape.cached, *counts])
    head = ["", "W_c", "U_c", "cached per token and layer", "bytes per token", "of MHA's"]
    return table([*head, "attention parameters", "tokens/s"], body)


# --------------------------------------------------------------------------------------------------
# What a small cache costs: in words, and at equal time


class Cost(NamedTuple):
    """What words.py found of a model of a study: over its seeds, at its best rate."""

    rows: list[dict]  # the study's
    blimp: list[dict]
    recall: list[dict]


def words_by_arm(results: Results, measured: dict) -> dict[StudyArm, Cost]:
    """measured: what words.read returns."""
    costs = {}
    for study in (*RATIOS, "modern", "figure1"):
        for arm in STUDIES[study]:
            rows = [row for row in results.trained(study, arm) if "weights" in row]
            sums = [row["weights"]["sha256"] for row in rows]
            found = [
                [measured[sha256, what]["found"] for sha256 in sums if (sha256, what) in measured]
                for what in ("blimp", "recall")
            ]
            if any(found):
                costs[study, arm] = Cost(rows, *found)
    return costs


def title_of(study: str, arm: str) -> str:
    a = STUDIES[study][arm]
    cfg, batch_size, steps, _ = settings(study, arm)
    tokens = f"{batch_size * cfg.block_size * steps / 1e6:.0f}M tokens"
    recipe, size = "AdamW" if a.optimizer == "adamw" else "Muon", a.size.partition(",")[0]
    return f"{a.name}, {recipe}, {size}, {tokens}"


def percent(shares: list[float]) -> str:
    return spread([100 * share for share in shares], 1) if shares else "–"


def mean_loss(found: list[dict], part: str) -> str:
    losses = [each[part][1] for each in found if each[part][0]]
    return spread(losses, 4) if losses else "–"


def words_part(results: Results, measured: dict) -> str:
    """BLiMP and recall beside the cache; BLiMP by phenomenon; recall by distance."""
    costs = words_by_arm(results, measured)
    if not costs:
        return ""
    body = []
    for which, cost in costs.items():
        sizes = sizes_of(results.run(*which))
        counts = [f"{sizes.cache_bytes:,}", f"{sizes.cache_share:.2%}", outcome(cost.rows)]
        counts.append(percent([words.mean_of(found) for found in cost.blimp]))
        body.append([title_of(*which), *counts, *(mean_loss(cost.recall, p) for p in words.PARTS)])
    for name, share in words.PUBLISHED.items():
        body.append([f"{name}, published", "–", "–", "–", f"{share}", "–", "–", "–"])
    head = ["", "cache, bytes per token", "of MHA's", "perplexity", "BLiMP, %"]
    head += ["loss where the pair is new", "seen in the window", "seen, and rare in training"]
    what = "BLiMP: the mean of 67 paradigms. A pair is a token and the one before it; rare is one"
    what += f" that the training text has {words.RARE} times at most. Loss in nats per token."
    parts = ["## What a small cache costs in words", what, table(head, body)]
    titles = [title_of(*which) for which in costs]
    blimps = [cost.blimp for cost in costs.values()]
    if phenomena := next((found[0] for found in blimps if found), {}):
        body = []
        for phenomenon, by_uid in phenomena.items():
            of_each = [[words.mean_of({0: f[phenomenon]}) for f in found] for found in blimps]
            name = f"{phenomenon.replace('_', ' ')}, {len(by_uid)} paradigms"
            body.append([name, *map(percent, of_each)])
        parts.append(table(["BLiMP, %", *titles], body))
    distances = [recall_by_distance(cost.recall) for cost in costs.values()]
    if places := next(filter(None, distances), {}):
        head = ["loss where the pair was seen, tokens ago"]
        head += [str(d) if d < 2 else f"{d} to {2 * d - 1}" for d in places]
        body = [
            [title, *(f"{by[d]:.4f}" if d in by else "–" for d in places)]
            for title, by in zip(titles, distances, strict=True)
        ]
        parts.append(table(head, body))
    return "\n\n".join(parts)


def recall_by_distance(found: list[dict]) -> dict[int, float]:
    """{d: mean loss, over the seeds, on pairs seen d to 2 d - 1 tokens ago}, where there are more
    than a thousandth of all."""
    seen = [sum(tokens for _, tokens, *_ in each["distance"]) for each in found]
    by = [
        {d: loss for d, tokens, loss, *_ in each["distance"] if tokens > total / 1000}
        for each, total in zip(found, seen, strict=True)
    ]
    return {d: statistics.mean(losses[d] for losses in by) for d in by[0]} if by else {}


def words_plot(results: Results, measured: dict) -> Figure | None:
    """BLiMP and the loss on recalled pairs against the cache, and MHA's lead by distance."""
    costs = words_by_arm(results, measured)
    if not costs:
        return None
    figure = Figure(figsize=(15, 4.6), layout="constrained")
    grammar, recalled, distance = figure.subplots(1, 3)
    lengths = sorted({cost.rows[0]["tokens"] for cost in costs.values()}, reverse=True)
    for (study, arm), cost in costs.items():
        adamw = STUDIES[study][arm].optimizer == "adamw"
        place = lengths.index(cost.rows[0]["tokens"])  # 0: the longest runs
        look = look_of_arm(study, arm) | dict(alpha=(1, 0.5, 0.25)[min(place, 2)])
        look |= dict(markerfacecolor="none") if adamw else {}
        share = sizes_of(results.run(study, arm)).cache_share
        rare = [found["rare"][1] for found in cost.recall if found["rare"][0]]
        right = [100 * words.mean_of(found) for found in cost.blimp]
        for ax, seeds in ((grammar, right), (recalled, rare)):
            ax.plot([share] * len(seeds), seeds, **look, linestyle="none", markersize=8)
        if adamw and any(STUDIES[s][other].optimizer == "muon" for s, other in costs):
            continue  # lines enough
        mha = costs.get((study, mha_beside(study, arm)))
        by, of_mha = recall_by_distance(cost.recall), recall_by_distance(mha.recall if mha else [])
        places = [d for d in by if d in of_mha]
        line = dict(markersize=5, label=title_of(study, arm), linestyle=":" if place > 1 else "-")
        if places:
            distance.plot(places, [by[d] - of_mha[d] for d in places], **look, **line)
    for ax in (grammar, recalled):
        ax.set_xscale("log", base=2)
        ax.set_xticks([1 / 16, 1 / 8, 1 / 4, 1 / 2, 1], ["1/16", "1/8", "1/4", "1/2", "all"])
        ax.set_xlabel("KV cache, share of MHA's")
    figure.suptitle("a point a seed; hollow: AdamW; the paler, the fewer tokens", fontsize=10)
    grammar.set_ylabel("BLiMP, %")
    recalled.set_ylabel("loss where the pair is seen, and rare in training")
    distance.set_xscale("log", base=2)
    distance.xaxis.set_major_formatter(lambda x, _: f"{x:.0f}")
    distance.set(xlabel="distance d to where the pair was (mean over d to 2d - 1)")
    distance.set_ylabel("loss on seen pairs, less MHA's of the recipe")
    distance.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.02, 1))
    for ax in (grammar, recalled, distance):
        ax.grid(alpha=0.3)
    return figure


def mha_beside(study: str, arm: str) -> str:
    """The MHA of the same study and recipe, with a norm if the arm has one."""
    if study in RATIOS:
        recipe = arm.partition("_")[0]
        return "adamw_mha" if recipe == "adamw" else f"{recipe}_mha_norm"
    model = STUDIES[study][arm].model
    norm = study == "modern" and (model.get("qk_norm") or model.get("latent_norm"))
    return "mha_norm" if norm else "mha"


SHARES = dict(mla_joint="MLA, joint latent", gqa2="GQA, a quarter of the heads")  # at every shape
SECONDS = """\
GPU seconds are MHA's, by its tokens/s above, over "MHA = 1". That ratio is of two models timed in
turn; tokens/s of two rows are of different moments, and the machine changes. At 30M a ratio errs by
0.05: the two MFAs do as many operations. Timed are 64 x 512 tokens a step, and the losses are of 32
x 512. Evaluations are left out."""
IN_TIME = """\
The loss in MHA's seconds is an estimate: a slower model has seen fewer tokens by then, and between
the two lengths that were trained to their end the loss falls along the logarithm of the tokens."""
Speeds = dict[tuple[str, str, str], dict]  # what equal_time.read returns


def equal_time_part(results: Results, speeds: Speeds) -> str:
    """Speeds at each shape, and losses beside operations and seconds."""
    if not speeds:
        return ""
    parts = ["## At equal time"]
    for shape, sizes in equal_time.SHAPES.items():
        body = []
        for arm in equal_time.arms_of(shape):
            both = [speeds.get((shape, what, arm)) for what in ("train", "prefill")]
            known = next(filter(None, both), None)
            if known is None:
                continue
            share = known["cache_bytes"] / cache_bytes(mha_of(Config(**known["config"])))
            operations = f"{both[0]['flops_per_token'] / 1e9:.3f}" if both[0] else "–"
            cells = [f"{known['params'] / 1e6:,.1f}M", f"{share:.2%}", operations]
            for row in both:
                cells += [f"{row['tokens_per_s']:,.0f}", f"{row['of_mha']:.2f}"] if row else "––"
            body.append([SHARES.get(arm, MODERN[arm].name), *cells])
        if body:
            size = f"{shape}, {sizes.batch} x {sizes.context} tokens, {sizes.optimizer}"
            head = [size, "parameters", "cache, of MHA's", "GFLOP to train on a token"]
            head += ["training, tokens/s", "MHA = 1", "prefill, tokens/s", "MHA = 1"]
            parts.append(table(head, body))
    parts += equal_time_losses(results, speeds)
    return "\n\n".join([*parts, origin_of(speeds.values())])


class Spent(NamedTuple):
    """What a training at 30M came to: its loss, its operations, and the seconds of one GPU."""

    rows: list[dict]
    loss: float
    tokens: int
    operations: float
    seconds: float
    of_mha: float  # its speed


def spent(results: Results, speeds: Speeds, study: str) -> dict[str, Spent]:
    """By the name of the arm in MODERN; study: modern, or ratio."""
    found = {}
    mha = speeds.get(("30M", "train", "mha"))
    for arm in equal_time.arms_of("30M") if mha else ():
        name = f"muon_{arm}" if study == "ratio" else arm
        rows = results.trained(study, name) if name in STUDIES[study] else []
        speed = speeds.get(("30M", "train", arm))
        if rows and speed:
            tokens, loss = rows[0]["tokens"], statistics.mean(row["val_loss"] for row in rows)
            seconds = tokens / (mha["tokens_per_s"] * speed["of_mha"])
            cost = tokens * speed["flops_per_token"], seconds
            found[arm] = Spent(rows, loss, tokens, *cost, speed["of_mha"])
    return found


def equal_time_losses(results: Results, speeds: Speeds) -> list[str]:
    """A table and what its columns are."""
    short, long = (spent(results, speeds, study) for study in ("modern", "ratio"))
    slopes = {
        arm: (long[arm].loss - short[arm].loss) / math.log(long[arm].tokens / short[arm].tokens)
        for arm in short.keys() & long.keys()
    }
    body = []
    for arm, one in [*short.items(), *long.items()]:
        cells = [f"{one.tokens / 1e6:.0f}M", outcome(one.rows, "val_loss", 4)]
        cells += [f"{one.operations / 1e15:.1f}", f"{one.seconds:.0f}"]
        if slopes:
            lost = slopes[arm] * math.log(one.of_mha) if arm in slopes else math.nan
            cells.append("–" if math.isnan(lost) else f"{one.loss + lost:.4f}")
        body.append([MODERN[arm].name, *cells])
    head = ["30M, Muon", "tokens", "loss, nats per token", "PFLOP", "GPU seconds"]
    if not body:
        return []
    if not slopes:
        return [table(head, body), SECONDS]
    return [table([*head, "loss in MHA's seconds"], body), SECONDS, IN_TIME]


def equal_time_plot(results: Results, speeds: Speeds) -> Figure | None:
    """Loss at the end against training operations and against seconds, a line for each length."""
    lengths = [spent(results, speeds, study) for study in ("modern", "ratio")]
    lengths = [found for found in lengths if len(found) > 1]
    if not lengths:
        return None
    figure = Figure(figsize=(11, 4.4 * len(lengths)), layout="constrained")
    axes = figure.subplots(len(lengths), 2, squeeze=False, sharey="row")
    for line, found in zip(axes, lengths, strict=True):
        for ax, what, unit in zip(line, ("operations", "seconds"), (1e15, 1), strict=True):
            for arm, one in found.items():
                look = look_of_arm("modern", arm) | dict(linestyle="none", markersize=8)
                if arm == "mfa_kr":  # beside the newer form
                    look["markerfacecolor"] = "none"
                cost = getattr(one, what) / unit
                ax.plot(cost, one.loss, **look, label=MODERN[arm].name)
            ax.grid(alpha=0.3)
            ax.margins(x=0.12, y=0.12)
        tokens = next(iter(found.values())).tokens
        line[0].set_xlabel("training, PFLOP")
        line[1].set_xlabel("training, seconds of one GPU")
        line[0].set_ylabel(f"validation loss after {tokens / 1e6:.0f}M tokens")
        line[1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1.02, 0.5))
    return figure


# --------------------------------------------------------------------------------------------------
# The plots


# The panels of figure1.png: a study, its arms, and where their names stand. The rest is in tables.
WITH_NORM = {  # in MODERN
    "mha_norm": ("MHA", "above"),
    "gqa2_norm": ("GQA, 2 heads", "right"),
    "mla_deepseek": ("MLA, DeepSeek's", "right"),
    "mqa_norm": ("MQA", "above"),
    "mfa_norm": ("MFA", "below"),
    BEST_KR: (MODERN[BEST_KR].name.replace(", half", ",\nhalf"), "right"),
}
ADAMW_AT_RATIO = {  # in RATIOS
    "adamw_mha": ("MHA", "above"),
    "adamw_mha_16": ("MHA, 16 heads", "below"),  # at 30M
    "adamw_mqa": ("MQA", "above"),
    "adamw_mfa": ("MFA", "below"),
    "adamw_mfa_kr": ("MFA-KR, pre", "right"),
}
MUON_AT_RATIO = {f"muon_{arm}": label for arm, label in WITH_NORM.items()}
SHORT, LONG = "2.2 tokens a parameter", "the paper's 18.5 a parameter"
PANELS = {  # two a row: one recipe, at 65M tokens and at the paper's ratio
    f"AdamW, 30M, {SHORT}": ("figure1", {
        "mha": ("MHA", "left"),
        "gqa2": ("GQA, 2 heads", "right"),
        "mfa_2d": ("MFA, C = 2d", "right"),
        "mla_joint": ("MLA, joint", "right"),
        "mqa": ("MQA", "left"),
        "mfa": ("MFA", "right"),
        "mfa_half": ("MFA, wider query", "below"),
        "mfa_kr": ("MFA-KR, pre", "right"),
    }),
    f"AdamW, 7M, {LONG}": ("ratio_7m", {a: ADAMW_AT_RATIO[a] for a in ADAMW_7M}),
    f"Muon and a norm, 30M, {SHORT}": ("modern", WITH_NORM),
    f"Muon and a norm, 7M, {LONG}": ("ratio_7m", MUON_AT_RATIO),
    f"Muon without a norm, 30M, {SHORT}": ("modern", {
        "mha": ("MHA", "left"),
        "gqa2": ("GQA, 2 heads", "right"),
        "mla_joint": ("MLA, joint", "right"),
        "mqa": ("MQA", "right"),
        "mfa": ("MFA", "left"),
        "mfa_kr": ("MFA-KR, pre", "right"),
        "mqa_16": ("MQA, 16 narrower heads", "right"),
    }),
    f"AdamW, 30M, {LONG}": ("ratio", ADAMW_AT_RATIO),
    f"Muon and a norm, 30M, {LONG}": ("ratio", MUON_AT_RATIO),
}  # fmt: skip


def figure1(results: Results) -> Figure | None:
    """Perplexity against cache, as the paper's Figure 1, by both recipes and for both lengths."""
    made = [
        (title, study, labels)
        for title, (study, labels) in PANELS.items()
        if any(results.trained(study, arm) for arm in labels)
    ]
    if not made:
        return None
    columns, rows = min(2, len(made)), (len(made) + 1) // 2
    figure = Figure(figsize=(5.6 * columns, 4.8 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flat
    for ax, panel in zip(axes, made, strict=False):
        draw_perplexities(ax, results, *panel)
        ax.set_ylabel("validation perplexity")
    for ax in axes[len(made) :]:
        ax.remove()
    return figure


def draw_perplexities(ax, results: Results, title: str, study: str, labels: dict) -> None:
    points, seeds = [], []  # (share of MHA's cache, mean perplexity); how many of each arm
    tried = [len(losses) for arm in labels if (losses := results.losses_by_rate(study, arm))]
    for arm, (label, side) in labels.items():
        ppl = [row["ppl"] for row in results.trained(study, arm)]
        if not ppl:
            continue
        share = sizes_of(results.run(study, arm)).cache_share
        points.append((share, statistics.mean(ppl)))
        seeds.append(len(ppl))
        error = statistics.stdev(ppl) if len(ppl) > 1 else 0
        look = look_of_arm(study, arm) | dict(markersize=8, capsize=3 if error else 0, zorder=3)
        # Two models of one cache stand a little apart, or one would hide the other.
        point = share * {"left": 0.98, "right": 1.02}.get(side, 1), statistics.mean(ppl)
        ax.errorbar(*point, [error], **look, linestyle="none")
        x, y, ha, va = {
            "left": (-9, 0, "right", "center"),
            "right": (9, 0, "left", "center"),
            "above": (0, 8, "center", "bottom"),
            "below": (0, -14, "center", "top"),
        }[side]
        place = dict(xytext=(x, y), textcoords="offset points", ha=ha, va=va)
        ax.annotate(label, point, **place, fontsize=9, color=look["color"])
    ax.plot(*zip(*pareto(points), strict=True), color="0.6", linewidth=1.2, zorder=1)
    spread = f"mean ± deviation of {span(seeds)} seeds" if max(seeds) > 1 else "one seed"
    rates = f"best of {span(tried)} rates" if max(tried) > 1 else "one rate"
    ax.set_title(f"{title}\n{rates}, {spread}", fontsize=10)
    ax.set_xscale("log", base=2)
    ticks = [1 / 16, 1 / 8, 1 / 4, 1 / 2, 1]
    ax.set_xticks(ticks, ["1/16", "1/8", "1/4", "1/2", "all"])
    ax.set_xlim(1 / 30, 1.4)
    ax.margins(y=0.12)
    ax.set_xlabel("KV cache, share of MHA's (grey: the best for their cache)")
    ax.grid(alpha=0.3)


def span(counts: list[int]) -> str:
    low, high = min(counts), max(counts)
    return str(high) if low == high else f"{low} to {high}"


def look_of_arm(study: str, arm: str) -> dict:
    """Hollow: a wider query than MFA's, or heads of half the width."""
    hollow = arm.endswith(("_half", "_16"))
    return look_of(STUDIES[study][arm].model["attn"] + "_half" * hollow)


def pareto(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those with no other of as small a cache and a better perplexity, small caches first."""
    best = []
    for share, ppl in sorted(points):
        if not best or ppl < best[-1][1]:
            best.append((share, ppl))
    return best


def look_of(attn: str) -> dict:
    """Colour and marker; MFA with a wider query is a hollow MFA."""
    plain = attn.removesuffix("_half")
    face = "none" if attn.endswith("_half") else COLOR[plain]
    return dict(color=COLOR[plain], marker=MARKER[plain], markerfacecolor=face)


# All of the cache, a quarter, an eighth, a sixteenth; and the studies that have them.
BY_CACHE = {"mha_norm": "MHA", "gqa2_norm": "GQA", "mfa_norm": "MFA", BEST_KR: "MFA-KR"}
BY_LENGTH = (("ratio_7m", "short_"), ("ratio_7m", "muon_"), ("modern", ""), ("ratio", "muon_"))


class Behind(NamedTuple):
    """A model beside MHA, both with Muon and a norm."""

    name: str
    attn: str
    cache_share: float
    nats: float  # worse than MHA


def behind_mha(results: Results) -> dict[str, list[Behind]]:
    """By size and tokens a parameter, large caches first; only what is made."""
    found = {}
    for study, recipe in BY_LENGTH:
        arms = {arm: f"{recipe}{arm}" for arm in BY_CACHE if f"{recipe}{arm}" in STUDIES[study]}
        rows = {arm: results.trained(study, name) for arm, name in arms.items()}
        rows = {arm: of for arm, of in rows.items() if of}
        if len(rows) < 2 or "mha_norm" not in rows:
            continue
        loss = {arm: statistics.mean(row["val_loss"] for row in of) for arm, of in rows.items()}
        first = rows["mha_norm"][0]
        ratio = f"{first['tokens'] / first['params']:.1f} tokens a parameter"
        ratio += ", one seed" if min(map(len, rows.values())) == 1 else ""
        found[f"{first['params'] / 1e6:.0f}M, {ratio}"] = [
            Behind(BY_CACHE[arm], of[0]["attn"], of[0]["cache_share"], loss[arm] - loss["mha_norm"])
            for arm, of in rows.items()
        ]
    return found


def behind_plot(results: Results) -> Figure | None:
    """How far behind MHA a smaller cache is, a line for each size and length of training."""
    lines = behind_mha(results)
    if not lines:
        return None
    figure = Figure(figsize=(8.4, 3.8), layout="constrained")
    ax = figure.subplots()
    names = {}
    for line, points in lines.items():
        shares, nats = ([getattr(p, of) for p in points] for of in ("cache_share", "nats"))
        ax.plot(shares, nats, color="0.6", linewidth=1.2, zorder=1)
        last = points[-1]
        place = dict(xytext=(-9, 0), textcoords="offset points", ha="right", va="center")
        ax.annotate(line, (last.cache_share, last.nats), **place, fontsize=9)
        for point in points:
            look = dict(color=COLOR[point.attn], marker=MARKER[point.attn], markersize=8)
            ax.plot(point.cache_share, point.nats, **look)
            names.setdefault(point.name, point)
    top = max(point.nats for points in lines.values() for point in points)
    for name, point in names.items():
        place = dict(ha="center", va="bottom", fontsize=10, color=COLOR[point.attn])
        ax.text(point.cache_share, 1.08 * top, name, **place)
    ax.set_xscale("log", base=2)
    ax.set_xticks([1 / 16, 1 / 8, 1 / 4, 1 / 2, 1], ["1/16", "1/8", "1/4", "1/2", "all"])
    ax.set_xlim(1 / 110, 1.4)
    ax.set_ylim(-0.05 * top, 1.2 * top)
    ax.set_xlabel("KV cache, share of MHA's")
    ax.set_ylabel("nats worse than MHA (0.01: 1% of perplexity)")
    ax.grid(alpha=0.3)
    return figure


def figure3(results: Results) -> Figure | None:
    """Loss against N D with the power laws, and cache against size, as the paper's Figure 3."""
    points = scaling(results)
    if max(map(len, points.values())) < 2:  # one size says nothing of scaling
        return None
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for attn, of_attn in points.items():
        if of_attn:
            draw_losses(left, attn, of_attn)
            draw_caches(right, attn, results)
    left.set(xscale="log", xlabel="parameters x tokens")
    left.set(yscale="log", ylabel="validation loss, nats per token")
    low, high = left.get_ylim()
    left.set_yticks([loss for loss in np.arange(2, 8, 0.25) if low <= loss <= high])
    left.yaxis.set_major_formatter("{x:.2f}")
    left.yaxis.set_minor_formatter("")
    # A new scale forgets its ticks. Any attention's sizes: they are alike.
    right.set(xscale="log", xlabel="parameters")
    right.set(yscale="log", ylabel="KV cache, bytes per token at 16 bit")
    right.set_xticks(right.lines[-1].get_xdata(), [size.upper() for size in DENSE_SIZES])
    right.xaxis.set_minor_formatter("")
    for ax in (left, right):
        ax.grid(alpha=0.3)
        ax.legend(fontsize=8)
    return figure


DENSE_SIZES = ("2m", "7m", "30m", "60m")


def draw_losses(ax, attn: str, points: list[tuple[float, float]]) -> None:
    """The points of one attention, and their power law where there are three."""
    nd, loss = zip(*points, strict=True)
    label, line = SCALED[attn], "--" if attn.endswith("_half") else "-"
    if len(nd) > 2:
        a, b, _ = power_law(points)
        x = np.geomspace(min(nd), max(nd), 50)
        ax.plot(x, a * x**-b, line, color=look_of(attn)["color"], linewidth=1)
        label += f": {a:.1f} (N D)^-{b:.3f}"
    ax.plot(nd, loss, **look_of(attn), linestyle="none", label=label)


def draw_caches(ax, attn: str, results: Results) -> None:
    sizes = [sizes_of(results.run("figure3", f"{attn}_{size}")) for size in DENSE_SIZES]
    line = "--" if attn.endswith("_half") else "-"
    params, caches = [s.params for s in sizes], [s.cache_bytes for s in sizes]
    ax.plot(params, caches, line, **look_of(attn), label=SCALED[attn])


def length(results: Results) -> Figure | None:
    """Loss by position for contexts of 512 and 2,048, and how far it is from MHA's."""
    losses = {}  # (attention, context) -> {first position of a bin: mean loss over the seeds}
    for arm, rows in same_seeds(results, "length").items():
        if rows:
            attn, _, context = arm.rpartition("_")
            curves = [[loss for _, loss in row["by_position"]] for row in rows]
            starts = [p for p, _ in rows[0]["by_position"]]
            losses[attn, context] = dict(zip(starts, np.mean(curves, axis=0), strict=True))
    if not losses:
        return None
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for attn, (context, line) in itertools.product(COMPARED, (("512", "--"), ("2048", "-"))):
        by, mha = losses.get((attn, context)), losses.get(("mha", context))
        if by:
            label = f"{NAME[attn]}, context {context}"
            style = dict(**look_of(attn), markersize=5, linestyle=line, label=label)
            places = [max(p, 0.5) for p in by]
            left.plot(places, by.values(), **style)
            if mha and attn != "mha":
                right.plot(places, [by[p] - mha[p] for p in by], **style)
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
    gains = context_gains(results)
    if not gains:
        return None
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    ax = figure.subplots()
    for attn in COLOR:
        points = [(gain, ppl) for name, gain, ppl in gains if name == attn]
        if points:
            look = dict(**look_of(attn), linestyle="none", alpha=0.8, label=NAME[attn])
            ax.plot(*zip(*points, strict=True), **look)
    ax.set(xlabel="loss at positions 32 to 63 less loss at 256 to 511, nats")
    ax.set(ylabel="validation perplexity", yscale="log")
    ax.yaxis.set_major_formatter("{x:.0f}")
    ax.yaxis.set_minor_formatter("{x:.0f}")
    ax.grid(alpha=0.3, which="both")
    ax.legend(fontsize=8)
    return figure


def copying_plot(rows: dict[tuple[str, int], dict]) -> Figure:
    """The step at which each seed of each attention began to copy.

    At the right edge, hollow, those that did not.
    """
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    ax, by_arm = figure.subplots(), copying.steps_by_arm(rows)
    edge = max(row["of"] for row in rows.values())
    for y, (arm, steps) in enumerate(by_arm.items()):
        look = look_of(copying.ARMS[arm].model["attn"])
        for step in steps:
            hollow = dict(markerfacecolor="none") if step == math.inf else {}
            ax.plot(min(step, edge), y, **(look | hollow), alpha=0.8, linestyle="none")
        median = min(statistics.median_high(steps), edge)
        ax.plot([median] * 2, [y - 0.3, y + 0.3], color=look["color"])
    ax.set_yticks(range(len(by_arm)), [copying.ARMS[arm].name for arm in by_arm])
    ax.invert_yaxis()
    ax.set_xlabel("step at which the loss on the repetitions is half of guessing's; | median")
    ax.set_xlim(0, None)
    ax.grid(alpha=0.3)
    return figure


def conversion_plot(rows: list[dict], results: Results) -> Figure:
    """Perplexity against bytes of cache: converted, trained further, and from scratch (hollow)."""
    figure = Figure(figsize=(8, 4.4), layout="constrained")
    ax, seen = figure.subplots(), []
    for one in converted(rows, results):
        x = one.cache_bytes * 1.07 ** seen.count(one.cache_bytes)  # side by side
        seen.append(one.cache_bytes)
        look, ppl = look_of(one.attn), [math.exp(loss) for loss in one.losses.values()]
        ax.plot([x] * len(ppl), ppl, color=look["color"], linestyle=":", linewidth=1)
        for size, y in enumerate(ppl):
            name = one.name if size == len(ppl) - 1 else None
            ax.plot(x, y, **look, linestyle="none", markersize=3 + 1.5 * size, label=name)
        if one.scratch is not None:
            hollow = dict(markerfacecolor="none", markersize=12, linestyle="none")
            ax.plot(x, math.exp(one.scratch), **(look | hollow))
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ticks = sorted(set(seen))
    ax.set_xticks(ticks, [f"{tick:,}" for tick in ticks], rotation=30)
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_formatter("{x:g}")
    shares = ", ".join(f"{share:.0%}" for share in conversion.SHARES)
    figure.legend(
        loc="outside right upper", fontsize=8, frameon=False, alignment="left", title_fontsize=8,
        title=f"small to large: converted,\nand {shares} of the steps;\nhollow: from scratch",
    )  # fmt: skip
    ax.set_xlabel("bytes of cache per token (16 bit)")
    ax.set_ylabel("perplexity")
    ax.grid(alpha=0.3)
    return figure


PLOTS = dict(
    figure1=figure1, behind_plot=behind_plot, context=context, figure3=figure3, length=length
)


@dataclass
class Args:
    """Make the plots and fill the tables of experiments/RESULTS.md."""

    results: Path = RESULTS  # what run.py wrote; the plots go beside it
    page: Path = ROOT / "experiments" / "RESULTS.md"  # file whose generated parts are filled
    dataset: str = ""  # which text's results; default: each study's own
    smoke: bool = False  # the results are those of run.py --smoke


def save_plot(figure: Figure, path: Path) -> None:
    options = dict(dpi=100, metadata={"Software": None})
    write_atomically(path, lambda file: figure.savefig(file, **options))
    print(path)


def main(args: Args) -> None:
    dataset = dataset_asked_for(args.dataset, args.smoke)
    results = Results(read_results(args.results), dataset, args.smoke)
    if not results.done:  # and do not empty the tables
        dataset = dataset or dataset_of("figure1")
        what = f"has no result on {dataset}; --dataset or --smoke may say another"
        what = what if args.results.is_file() else "is not there"
        advice = "python experiments/study/run.py makes results"
        raise BadInput(f"--results {args.results}: {what}; {advice}")
    parts = {name: part(results) for name, part in PARTS.items()}
    plots = {name: plot(results) for name, plot in PLOTS.items()}
    if rows := copying.read(args.results.with_name(copying.RESULTS.name)):
        parts["copying"], plots["copying"] = copying_part(rows), copying_plot(rows)
    if rows := rounding.read(args.results.with_name(rounding.RESULTS.name)):
        parts["rounding"] = rounding_part(rows)
    measured = words.read(args.results.with_name(words.RESULTS.name))
    speeds = equal_time.read(args.results.with_name(equal_time.RESULTS.name))
    parts["words"] = words_part(results, measured)
    parts["equal_time"] = equal_time_part(results, speeds)
    plots["words_plot"] = words_plot(results, measured)
    plots["equal_time_plot"] = equal_time_plot(results, speeds)
    rows = conversion.read_results(args.results.with_name(conversion.RESULTS.name))
    rows = [row for row in rows if row["dataset"] == (dataset or dataset_of("modern"))]
    parts["convert"] = conversion_part(rows, results)
    plots["convert"] = conversion_plot(rows, results) if rows else None
    if decode := read_json(args.results.with_name("decode.json")):
        parts["shapes"] = shapes_part(decode)
        parts["decode"] = decoding.grid_tables(decode)
        plots |= decoding.plots(decode)
    if rows := sharding.read(args.results.with_name(sharding.RESULTS.name)):
        parts["sharding"] = sharding.table(rows)
    for name in ("many_gpus", "many_gpus_cpu"):
        if found := read_json(args.results.with_name(f"{name}.json")):
            if name.endswith("cpu"):
                found.pop("speed", None)  # of toys
            parts[name] = f"{many_gpus.tables(found)}\n\n{origin_of(found.values())}"
    if train := read_json(args.results.with_name("train.json")):
        parts["training"] = training_bench.table(train).strip()
    text = args.page.read_text(encoding="utf-8")
    for name, figure in plots.items():
        if figure:
            path = args.results.with_name(f"{name}.png")
            save_plot(figure, path)
            link = Path(os.path.relpath(path, args.page.parent)).as_posix()
            parts[name] = "\n\n".join([f"![{name}]({link})", *filter(None, [parts.get(name)])])
        elif name.endswith("_plot"):
            parts[name] = ""
    text = fill(text, parts, f"--page {args.page}")
    write_atomically(args.page, lambda file: file.write(text.encode()))
    print(f"{args.page}: {len(results.done)} results")


if __name__ == "__main__":
    run_command(main, Args)
