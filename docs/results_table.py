"""The README's tables and the page's figures: counted by mfa.py, measured by experiments/.

What is measured is read from experiments/results/study.jsonl (quality) and decode.json (speed); a
figure that is not there is "not measured". No figure is typed here. `python docs/build.py` writes
the tables into README.md.
"""

import statistics
import sys
from pathlib import Path
from typing import NamedTuple

from mfa import Config, cache_bytes, preset
from support.generated import around, fill
from support.provenance import read_json

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.append(str(ROOT))

from experiments.bench import equal_time  # noqa: E402
from experiments.bench.decoding import quickest  # noqa: E402
from experiments.paper.tables import FIGURE1_MLA  # noqa: E402, F401 (the page asks for it)
from experiments.study import words  # noqa: E402
from experiments.study.plot import Results, outcome, spread, words_by_arm  # noqa: E402
from experiments.study.studies import BEST_KR, RATIOS, STUDIES, read_results, untrained  # noqa: E402, F401
from experiments.study.studies import Arm as Planned  # noqa: E402

RESULTS = ROOT / "experiments" / "results"
MISSING = "not measured"
PRESET, SHAPE = "paper-1b", "1B"  # the shape of the counted columns and of the speeds
LONG = "1B, context 8192"
BATCH, CONTEXT = 32, 16384  # of the speeds
between = around  # (head, tail) of a README around one of its tables


ORDER = ["mha", "gqa", "mqa", "mla", "mfa", "mfa_kr"]  # of the page's bars


class Model(NamedTuple):
    """A row of the README: a model, and its arms in study "modern" and, of AdamW, in "figure1"."""

    name: str
    norm: str | None  # Muon, with a norm on query and key, of MLA on its latent
    plain: str | None  # Muon, without one
    adamw: str | None

    @property
    def muon(self) -> str:
        """What is shown at the top of its column."""
        return self.norm or self.plain

    @property
    def planned(self) -> Planned:
        return STUDIES["modern"][self.muon]

    @property
    def attn(self) -> str:
        return self.planned.model["attn"]


MODELS = [
    Model("MHA", "mha_norm", "mha", "mha"),
    Model("GQA", "gqa2_norm", "gqa2", "gqa2"),
    Model("MLA as DeepSeek-V2's", "mla_deepseek", None, "mla_deepseek"),
    Model("MFA", "mfa_norm", "mfa", "mfa"),
    Model("MQA", "mqa_norm", "mqa", "mqa"),
    Model("MFA-KR, newer form", BEST_KR, "mfa_kr_half", None),
    Model("MFA-KR, as in the paper", None, "mfa_kr", "mfa_kr"),
    Model("MQA, 16 heads of d = 32", None, "mqa_16", None),
]


def cache_share(cfg: Config) -> float:
    """Of what MHA keeps at the preset's shape."""
    return cache_bytes(cfg) / cache_bytes(preset(PRESET, "mha"))


# --------------------------------------------------------------------------------------------------
# Reading what experiments/ measured


def read_decode(folder: Path = RESULTS) -> dict:
    """decode.json, or no rows where it is missing. Raises BadInput where it is not JSON."""
    return {"rows": [], "largest_batch": []} | read_json(folder / "decode.json")


class Arm(NamedTuple):
    """What a model of a study reached, at the best learning rate of its grid."""

    name: str
    rows: list[dict]  # of study.jsonl, one a seed

    @property
    def ppl(self) -> list[float]:
        """One a seed, of those that trained."""
        return [row["ppl"] for row in self.rows if not untrained(row)]

    @property
    def mean(self) -> str:
        """± deviation, of those that trained."""
        return spread(self.ppl, 2) if self.ppl else "failed"

    @property
    def share(self) -> float:
        """Of the cache of an MHA of the same size."""
        return self.rows[0]["cache_share"]

    def __str__(self) -> str:
        return outcome(self.rows)


def arms(study: str, folder: Path = RESULTS, recipe: str = "") -> list[Arm]:
    """The arms of a study, or of a recipe of one, that were trained, large caches first."""
    results = Results(read_results(folder / "study.jsonl"))
    planned = {arm: a.name for arm, a in STUDIES[study].items() if arm.startswith(recipe)}
    every = [Arm(name, results.of(study, arm)) for arm, name in planned.items()]
    return sorted((arm for arm in every if arm.rows), key=lambda arm: -arm.share)


def recalled(folder: Path, study: str) -> dict[str, str]:
    """Loss on pairs of tokens that the context has had and that are rare in training, in nats."""
    results = Results(read_results(folder / "study.jsonl"))
    costs = words_by_arm(results, words.read(folder / words.RESULTS.name))
    names = dict(mha="mha_norm", mfa="mfa_norm", kr=BEST_KR)
    found = {}
    for name, arm in names.items():
        cost = costs.get((study, f"muon_{arm}"))
        losses = [each["rare"][1] for each in cost.recall if each["rare"][0]] if cost else []
        found[f"rare_{name}"] = f"{statistics.mean(losses):.1f}" if losses else MISSING
    return found


def setting(row: dict) -> str:
    """The text and the size of a run."""
    size = f"{row['params'] / 1e6:.1f}M parameters, {row['tokens'] / 1e6:.1f}M tokens a run"
    return f"{row['dataset']}, {size}"


def speeds(decode: dict, attn: str) -> dict[str, dict]:
    """The quickest measured row of an attention by mode, "" where there is one.

    At the preset's shape, BATCH and CONTEXT.
    """
    wanted = dict(model=PRESET, attn=attn, engine="ours", batch=BATCH, context=CONTEXT)
    modes = dict.fromkeys(row["mode"] for row in decode["rows"] if row["attn"] == attn)
    rows = {mode: quickest(decode["rows"], mode=mode, **wanted) for mode in modes}
    return {mode: row for mode, row in rows.items() if row}


# --------------------------------------------------------------------------------------------------
# The README's tables


class Measured:
    """What the results say of MODELS."""

    def __init__(self, folder: Path = RESULTS):
        self.results = Results(read_results(folder / "study.jsonl"))
        self.decode = read_decode(folder)
        self.times = equal_time.read(folder / equal_time.RESULTS.name)

    def arm(self, study: str, arm: str | None) -> Arm | None:
        """What an arm reached; None if it was not made."""
        rows = self.results.of(study, arm) if arm else []
        return Arm(STUDIES[study][arm].name, rows) if rows else None

    def arms(self, model: Model) -> list[Arm | None]:
        """By Muon with a norm and without, and by AdamW."""
        muon = [self.arm("modern", arm) for arm in (model.norm, model.plain)]
        return [*muon, self.arm("figure1", model.adamw)]

    def ppl(self, muon: str, study: str = "modern", missing: str = MISSING) -> str:
        arm = self.arm(study, muon)
        return f"{statistics.mean(arm.ppl):.1f}" if arm and arm.ppl else missing

    def rate(self, muon: str) -> str:
        """The peak rate that was best for Muon, and whether it was the only one."""
        arm = self.arm("modern", muon)
        if not arm:
            return "–"
        mantissa, exponent = f"{arm.rows[0]['lr']:e}".split("e")
        alone = len(self.results.losses_by_rate("modern", muon)) < 2
        return f"{float(mantissa):g}e{int(exponent)}" + " only" * alone

    def speed(self, arm: Arm) -> str:
        """Tokens/s at PRESET's shape, where a model of this attention and share was measured."""
        config = arm.rows[0]["config"]
        if config["q_rank"]:
            return "–"
        mode = config["key_reuse_rope"] if config["attn"] == "mfa_kr" else ""
        row = speeds(self.decode, config["attn"]).get(mode)
        whole = cache_bytes(preset(PRESET, "mha")) * BATCH * CONTEXT
        same = row and row["counts_bytes"] == arm.share * whole
        return f"{row['tokens_per_s']:,.0f}" if same else "–"

    def of_mha(self, attn: str) -> str:
        """How many times as many tokens/s as MHA an attention decodes at PRESET's shape."""
        mode = dict(mla="joint", mfa_kr="inverse").get(attn, "")
        ours, mha = speeds(self.decode, attn).get(mode), speeds(self.decode, "mha").get("")
        return f"{ours['tokens_per_s'] / mha['tokens_per_s']:.1f}" if ours and mha else MISSING

    def training(self, arms: list[Arm]) -> str:
        """Speed beside MHA's at PRESET's shape, where such a model of this share was measured."""
        names = "attn", "q_rank", "qk_norm", "key_reuse_rope"
        configs = [Config(**arm.rows[0]["config"]) for arm in arms]
        wanted = [
            (arm.share, *(getattr(cfg, name) for name in names))
            for arm, cfg in zip(arms, configs, strict=True)
        ]
        for (shape, what, _), row in self.times.items():
            found = cache_share(Config(**row["config"])), *(row["config"][name] for name in names)
            if (shape, what) == (SHAPE, "train") and found in wanted:
                return f"{row['of_mha']:.2f}"
        return "–"


def flags(planned: Planned) -> str:
    """What train.py takes for it."""
    words = []
    for name, value in planned.model.items():
        switch = {True: f"--{name}", False: f"--no_{name}"} if isinstance(value, bool) else {}
        words.append(switch.get(value, f"--{name} {value}"))
    return f"`{' '.join(words)}`"


def table(folder: Path = RESULTS) -> str:
    """The README's results, one model a row, with the conditions below them, in Markdown."""
    measured = Measured(folder)
    head = ["", "flags of `train.py`", "cache"]
    head += ["perplexity: Muon and the norm", "Muon, no norm", "AdamW, no norm"]
    head += ["tokens/s, 1B", "training, MHA = 1"]
    lines = [f"| {' | '.join(head)} |", "|---|---|---:|---:|---:|---:|---:|---:|"]
    found = []
    for model in MODELS:
        arms = measured.arms(model)
        made = [arm for arm in arms if arm]
        found += made
        rates = [f" at {measured.rate(arm)}" for arm in (model.norm, model.plain)] + [""]
        cells = [f"{arm}{rate}" if arm else "–" for arm, rate in zip(arms, rates, strict=True)]
        size = f"{100 * made[0].share:.4g}%" if made else MISSING
        speeds = [measured.speed(made[0]), measured.training(made)] if made else [MISSING] * 2
        words = [model.name, flags(model.planned), size, *cells, *speeds]
        lines.append(f"| {' | '.join(words)} |")
    return "\n".join([*lines, "", *conditions(found, measured)])


def conditions(found: list[Arm], measured: Measured) -> list[str]:
    """Under which conditions the columns hold, a line each."""
    lines = []
    if found:
        study = f"validation, {setting(found[0].rows[0])}; ± over three seeds with"
        study += " AdamW and two with Muon, else one seed"
        heads = "MHA has 8 heads of d = 64 here, so MQA keeps an eighth; with 16 heads, as in the"
        heads += " drawing and in the paper's 1B, a sixteenth"
        heads += ". The flags are for that shape, at dim 512 and with the norm; add `--optimizer"
        heads += " muon` and the `--learning_rate`, the best of two to five where it is not the"
        heads += " only one tried."
        heads += (
            " DeepSeek's MLA has a norm on its latent, with AdamW too, and begins with DeepSeek's"
        )
        heads += " init, for which there is no flag"
        cache = "The cache is a share of MHA's"
        lines.append(f"Perplexity: {study}. {cache}. {heads}.")
    decode = measured.decode
    if decode["rows"]:
        shape = "the paper's 1B shape, our kernels (`sample.py`), the same attention and share, but"
        shape += " all rotated, no norm"
        cell = f"random weights, batch {BATCH}, context {CONTEXT:,}, one {decode['device']}"
        text = f"Tokens/s: {shape}; {cell}."
        if ours := measured.times.get((SHAPE, "train", "mfa")):
            text += f" Training: steps a second at 1B beside MHA's, context {ours['context']:,},"
            text += " without a norm but for the newer form."
        lines.append(text)
    return lines


def advice(folder: Path = RESULTS) -> str:
    """Which attention for which cache. tests/test_docs.py holds the sentences to the results."""
    measured = Measured(folder)
    mha, gqa, mla, mfa, mqa, newer, _, narrow = MODELS
    slower, ppl = measured.of_mha(mla.attn), measured.ppl
    deepseek = measured.arm("modern", mla.norm)
    share = f"{deepseek.share:.1%}" if deepseek else MISSING
    rows = [
        ("all of it", "MHA", mha, "Nothing here is better."),
        ("a quarter", "GQA, 2 of 8 heads", gqa, "The simplest way to save."),
        (
            "an eighth",
            "**MFA**",
            mfa,
            f"Better than MQA with as much ({ppl(mqa.norm)}), and than DeepSeek's MLA with {share} "
            f"({ppl(mla.norm)}; at 7M as good). An MLA decodes {slower} times as fast as MHA.",
        ),
        (
            "a sixteenth",
            "**MFA-KR**, newer form",
            newer,
            f"A little worse than MQA with twice as much ({ppl(mqa.norm)}). Neither with a norm, "
            f"it has {ppl(newer.plain)} and an MQA with as much {ppl(narrow.plain)}.",
        ),
    ]
    rates = {measured.rate(model.muon) for _, _, model, _ in rows}
    rate = f" --learning_rate {rates.pop()}" if len(rates) == 1 and "–" not in rates else ""
    head = f"| your cache, of MHA's | take | `train.py --optimizer muon{rate}` and (at dim 512) "
    head += "| perplexity, 30M, 66M tokens | 555M tokens | decodes 1B, MHA = 1 | trains | |"
    lines = [head, "|---|---|---|---:|---:|---:|---:|---|"]
    for budget, take, model, why in rows:
        arms = [arm for arm in measured.arms(model) if arm]
        speeds = measured.of_mha(model.attn), measured.training(arms) if arms else MISSING
        ppls = ppl(model.muon), ppl(f"muon_{model.muon}", "ratio", "–")
        cells = [budget, take, flags(model.planned), *ppls, *speeds, why]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def quick_start() -> str:
    """What docs/quick_start.py has kept, as a block of text."""
    return f"```console\n{(HERE / 'quick_start.txt').read_text(encoding='utf-8').strip()}\n```"


def with_table(readme: str, folder: Path = RESULTS) -> str:
    """The README with its generated parts made anew."""
    parts = dict(quick_start=quick_start(), advice=advice(folder), results=table(folder))
    return fill(readme, parts)
