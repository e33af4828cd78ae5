"""The figures of the README's table and of the page: counted by mfa.py, measured by experiments/.

What is measured is read from experiments/results/study.jsonl (quality) and decode.json (speed); a
figure that is not there is "not measured". No figure is typed here. `python docs/build.py` writes
the table into README.md.
"""

import sys
from pathlib import Path
from typing import NamedTuple

from mfa import ATTENTION, Config, cache_bytes, preset
from support.generated import around, fill
from support.provenance import read_json

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))

from experiments.bench import training as training_bench  # noqa: E402
from experiments.bench.decoding import quickest  # noqa: E402
from experiments.paper.tables import FIGURE1_MLA  # noqa: E402
from experiments.study.plot import Results, outcome  # noqa: E402
from experiments.study.studies import STUDIES, read_results, untrained  # noqa: E402

RESULTS = ROOT / "experiments" / "results"
MISSING = "not measured"
PRESET = "paper-1b"  # the shape of the counted columns and of the speeds
BATCH, CONTEXT = 32, 16384  # of the speeds
between = around  # (head, tail) of a README around one of its tables


class Row(NamedTuple):
    label: str
    attn: str
    options: dict  # of Config, beside the preset's
    W: str
    U: str
    cached: str  # per token and layer

    @property
    def cfg(self) -> Config:
        return preset(PRESET, self.attn, **self.options)


ROWS = [
    Row("MHA", "mha", {}, "Q_c K_c^T", "V_c O_c^T", "2 n d"),
    Row("GQA, g = 4", "gqa", dict(n_kv_head=4), "Q_c K_g^T", "V_g O_c^T", "2 g d"),
    Row("MQA", "mqa", {}, "Q_c K^T", "V O_c^T", "2 d"),
    Row("MLA, DeepSeek-V2-Lite's", "mla", FIGURE1_MLA, "Q_c K_c^T S^T", "S V_c O_c^T", "C + d_r"),
    Row("**MFA**", "mfa", {}, "S_q Q_c S_k^T", "S_v O_c^T", "2 C"),
    Row("**MFA-KR**", "mfa_kr", {}, "S_q Q_c S_k^T", "S_k (I + N^T diag(alpha)) O_c^T", "C"),
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
    def share(self) -> float:
        """Of the cache of an MHA of the same size."""
        return self.rows[0]["cache_share"]

    def __str__(self) -> str:
        return outcome(self.rows)


def arms(study: str, folder: Path = RESULTS) -> list[Arm]:
    """The arms of a study that were trained, large caches first."""
    results = Results(read_results(folder / "study.jsonl"))
    every = [Arm(a.name, results.of(study, arm)) for arm, a in STUDIES[study].items()]
    return sorted((arm for arm in every if arm.rows), key=lambda arm: -arm.share)


def setting(row: dict) -> str:
    """The text and the size of a run."""
    size = f"{row['params'] / 1e6:.1f}M parameters, {row['tokens'] / 1e6:.1f}M tokens a run"
    return f"{row['dataset']}, {size}"


def nearest(found: list[Arm], row: Row) -> Arm | None:
    """The arm of a row's attention, in its form, whose share of MHA's cache is nearest to it."""
    names = ("attn", "joint_kv", "compress_query", "q_rank")
    form = [getattr(row.cfg, name) for name in names]
    same = [arm for arm in found if [arm.rows[0]["config"][name] for name in names] == form]
    return min(same, key=lambda arm: abs(arm.share - cache_share(row.cfg)), default=None)


def speeds(decode: dict, attn: str) -> dict[str, dict]:
    """The quickest measured row of an attention by mode, "" where there is one.

    At the preset's shape, BATCH and CONTEXT.
    """
    wanted = dict(model=PRESET, attn=attn, engine="ours", batch=BATCH, context=CONTEXT)
    modes = dict.fromkeys(row["mode"] for row in decode["rows"] if row["attn"] == attn)
    rows = {mode: quickest(decode["rows"], mode=mode, **wanted) for mode in modes}
    return {mode: row for mode, row in rows.items() if row}


# --------------------------------------------------------------------------------------------------
# The README's table


def table(folder: Path = RESULTS) -> str:
    """The README's table, with the conditions below it, in Markdown."""
    found, decode = arms("figure1", folder), read_decode(folder)
    head = ["W_c", "U_c", "kept per token and layer", "bytes per token", "attention parameters"]
    head += ["perplexity", "tokens/s"]
    lines = [f"| | {' | '.join(head)} |", "|---" * (len(head) + 1) + "|"]
    lines += [f"| {' | '.join(cells(row, found, decode))} |" for row in ROWS]
    return "\n".join([*lines, "", *conditions(found, decode)])


def cells(row: Row, found: list[Arm], decode: dict) -> list[str]:
    cfg, arm = row.cfg, nearest(found, row)
    size = f"{cache_bytes(cfg):,} ({100 * cache_share(cfg):.4g}%)"
    params = cfg.n_layer * ATTENTION[row.attn].counts(cfg).params
    quality = f"{arm} (at {100 * arm.share:.4g}%)" if arm else MISSING
    # A speed counts where it is this row's: MLA comes in several sizes.
    whole = cache_bytes(cfg) * BATCH * CONTEXT
    rates = {
        mode: f"{measured['tokens_per_s']:,.0f}"
        for mode, measured in speeds(decode, row.attn).items()
        if measured["counts_bytes"] == whole
    }
    if len(rates) > 1:
        rates = {mode: f"{mode} {rate}" for mode, rate in rates.items()}
    speed = ", ".join(rates.values()) or MISSING
    return [row.label, row.W, row.U, row.cached, size, f"{params / 1e6:,.0f}M", quality, speed]


def conditions(found: list[Arm], decode: dict) -> list[str]:
    """Under which conditions the columns hold, a line each."""
    cfg = preset(PRESET)
    shape = f"the paper's 1B shape, {cfg.n_layer} layers of width {cfg.dim:,}"
    lines = [
        "n heads of width d, g key/value heads, latent width C, rotary key d_r; W_c and U_c stand "
        "in the equation above.",
        f"Bytes (16 bits; share of MHA's) and parameters, of all layers: counted at {shape}.",
    ]
    if found:
        counts = sorted({len(arm.rows) for arm in found})
        several = " or ".join(str(n) for n in counts if n > 1)
        spread = "one seed, so far"
        if several:
            spread = f"± is the standard deviation over {several} seeds"
            spread += ", a number without it is one seed" if counts[0] == 1 else ""
        where = "in brackets the share of MHA's cache in that study"
        study = f"validation, {setting(found[0].rows[0])}"
        lines.append(f"Perplexity: {study}; {where}; {spread}.")
    if decode["rows"]:
        shape = "the 1B shape, FFN not matched, random weights"
        cell = f"batch {BATCH}, context {CONTEXT:,}, on one {decode['device']}"
        lines.append(f"Tokens/s: {shape}, {cell}.")
    return lines


def training(folder: Path = RESULTS) -> str:
    """What experiments/bench/training.py has measured, in Markdown."""
    path = folder / "train.json"
    if not path.exists():
        return "Training speed: not measured yet."
    # README has single seeds in words.
    return training_bench.table(read_json(path), least_seeds=2).strip()


def with_table(readme: str, folder: Path = RESULTS) -> str:
    """The README with its tables made anew."""
    return fill(readme, {"results": table(folder), "training": training(folder)})
