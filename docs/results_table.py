"""The figures of the README's table and of the page: counted by mfa.py's counts(), measured by experiments/.

What is measured is read from experiments/results/study.jsonl (quality) and decode.json (speed); a figure that is not there is
"not measured". No figure is typed here. `python docs/build.py` writes the table into README.md.
"""

import sys
from pathlib import Path
from typing import NamedTuple

from mfa import ATTENTION, Config, preset
from prepare_data import BadInput

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "experiments"))

import bench_train  # noqa: E402
from bench_decode import quickest  # noqa: E402
from plot import Results, outcome  # noqa: E402
from provenance import read_json  # noqa: E402
from studies import STUDIES, read_results, untrained  # noqa: E402

RESULTS = ROOT / "experiments" / "results"
MISSING = "not measured"
PRESET = "paper-1b"  # the shape of the counted columns and of the speeds
BATCH, CONTEXT = 32, 16384  # of the speeds
FIGURE1_MLA = dict(
    joint_kv=True, latent_dim=512, compress_query=False, latent_norm=True
)  # DeepSeek-V2-Lite's, as in the paper's Figure 1


class Row(NamedTuple):
    label: str
    attn: str
    options: dict  # of Config, beside the preset's
    W: str
    U: str
    kept: str

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


def cache_bytes(cfg: Config) -> int:
    """Bytes that one token leaves in the whole model, in 16 bits."""
    return 2 * cfg.n_layer * ATTENTION[cfg.attn].counts(cfg).kv_cache


def cache_share(cfg: Config) -> float:
    """Of what MHA keeps at the preset's shape."""
    return cache_bytes(cfg) / cache_bytes(preset(PRESET, "mha"))


# ---------------------------------------------------------------------------------------------------------------------
# Reading what experiments/ measured


def read_decode(folder: Path = RESULTS) -> dict:
    """decode.json, or {"rows": [], "largest_batch": []} where it is missing. Raises BadInput where it is not JSON."""
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
    found = [Arm(arm.name, rows) for name, arm in STUDIES[study].items() if (rows := results.of(study, name))]
    return sorted(found, key=lambda arm: -arm.share)


def setting(row: dict) -> str:
    """The text and the size of a run."""
    return f"{row['dataset']}, {row['params'] / 1e6:.1f}M parameters, {row['tokens'] / 1e6:.1f}M tokens a run"


def nearest(found: list[Arm], row: Row) -> Arm | None:
    """The arm of a row's attention, in its form, whose share of MHA's cache is nearest to the row's."""
    names = ("attn", "joint_kv", "compress_query", "q_rank")
    form = [getattr(row.cfg, name) for name in names]
    same = [arm for arm in found if [arm.rows[0]["config"][name] for name in names] == form]
    return min(same, key=lambda arm: abs(arm.share - cache_share(row.cfg)), default=None)


def speeds(decode: dict, attn: str) -> dict[str, dict]:
    """The quickest measured row of an attention at the preset's shape, BATCH and CONTEXT, by mode ("" where there is one)."""
    wanted = dict(model=PRESET, attn=attn, engine="ours", batch=BATCH, context=CONTEXT)
    modes = dict.fromkeys(row["mode"] for row in decode["rows"] if row["attn"] == attn)
    return {mode: row for mode in modes if (row := quickest(decode["rows"], mode=mode, **wanted))}


# ---------------------------------------------------------------------------------------------------------------------
# The README's table


def table(folder: Path = RESULTS) -> str:
    """The README's table, with the conditions below it, in Markdown."""
    found, decode = arms("figure1", folder), read_decode(folder)
    lines = [
        "| | W_c | U_c | kept per token and layer | bytes per token | attention parameters | perplexity | tokens/s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in ROWS:
        cfg, arm = row.cfg, nearest(found, row)
        whole = cache_bytes(cfg) * BATCH * CONTEXT  # a speed counts where it is this row's: MLA comes in several sizes
        measured = {mode: m for mode, m in speeds(decode, row.attn).items() if m["counts_bytes"] == whole}
        params = cfg.n_layer * ATTENTION[row.attn].counts(cfg).params
        quality = f"{arm} (at {100 * arm.share:.4g}%)" if arm else MISSING
        several = len(measured) > 1
        speed = ", ".join(f"{mode} " * several + f"{m['tokens_per_s']:,.0f}" for mode, m in measured.items()) or MISSING
        cache = f"{cache_bytes(cfg):,} ({100 * cache_share(cfg):.4g}%)"
        lines.append(f"| {' | '.join((row.label, row.W, row.U, row.kept, cache, f'{params / 1e6:,.0f}M', quality, speed))} |")
    return "\n".join([*lines, "", *conditions(found, decode)])


def conditions(found: list[Arm], decode: dict) -> list[str]:
    """Under which conditions the columns hold, a line each."""
    cfg = preset(PRESET)
    shape = f"{cfg.n_layer} layers of width {cfg.dim:,}"
    lines = ["n heads of width d, g key/value heads, latent width C, rotary key d_r; W_c and U_c stand in the equation above."]
    lines += [f"Bytes (16 bits; share of MHA's) and parameters, of all layers: counted at the paper's 1B shape, {shape}."]
    if found:
        counts = sorted({len(arm.rows) for arm in found})
        several = " or ".join(str(n) for n in counts if n > 1)
        spread = f"± is the standard deviation over {several} seeds" if several else "one seed, so far"
        spread += ", a number without it is one seed" if several and counts[0] == 1 else ""
        where = "in brackets the share of MHA's cache in that study"
        lines.append(f"Perplexity: validation, {setting(found[0].rows[0])}; {where}; {spread}.")
    if decode["rows"]:
        shape = "the 1B shape, FFN not matched, random weights"
        lines.append(f"Tokens/s: {shape}, batch {BATCH}, context {CONTEXT:,}, on one {decode['device']}.")
    return lines


def training(folder: Path = RESULTS) -> str:
    """What experiments/bench_train.py has measured, in Markdown."""
    path = folder / "train.json"
    if not path.exists():
        return "Training speed: not measured yet."
    return bench_train.table(read_json(path), least_seeds=2).strip()  # README has single seeds in words


def between(text: str, name: str) -> tuple[str, str]:
    """A README up to its marker <!-- name --> and from <!-- /name --> on."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    head, found, rest = text.partition(begin)
    _, found_too, tail = rest.partition(end)
    if not (found and found_too):
        raise BadInput(f"README.md should have the two lines {begin} and {end}, with a table of results between them")
    return head + begin, end + tail


def with_table(readme: str, folder: Path = RESULTS) -> str:
    """The README with its tables made anew."""
    for name, made in (("results", table(folder)), ("training", training(folder))):
        head, tail = between(readme, name)
        readme = f"{head}\n{made}\n{tail}"
    return readme
