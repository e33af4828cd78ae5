"""The paper's numbers, recomputed: python experiments/paper.py [--preset paper-1b]

Prints Table 1 for a preset, then every number of the paper that follows from an architecture,
beside the printed one. Parameters and cache sizes are those of real modules on the meta device,
which has shapes and no memory; ranks are matrix ranks of a small instance. `table1`, `ranks` and
`figures` return the same as data.
"""

import math
import re
import shutil
import textwrap
from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

import torch
from torch import nn

from experiments.paper.hybrids import hybrid_gpt, measured_cache_bytes
from mfa import ATTENTION, GPT, Attention, Config, Counts, KVCache, MoE, preset
from support.cli import BadInput, run_command
from support.palette import NAME

# The form of DeepSeek-V2-Lite's MLA, and its widths beside the paper's 1B shape (A.4).
DEEPSEEK_MLA = dict(joint_kv=True, compress_query=False, latent_norm=True)
FIGURE1_MLA = dict(**DEEPSEEK_MLA, latent_dim=512, rope_dim=64)

# --------------------------------------------------------------------------------------------------
# Counting on the meta device


@cache
def model(cfg: Config, hybrid: str = "") -> GPT:
    with torch.device("meta"):
        return hybrid_gpt(hybrid, cfg) if hybrid else GPT(cfg)


def params(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def params_without_embedding(gpt: GPT) -> int:
    """Nor with the output head, which is tied to it."""
    return params(gpt) - params(gpt.embed)


def activated(gpt: GPT) -> int:
    """Parameters without the embedding that one token uses: n_expert_active routed experts."""
    moes = [block.ffn for block in gpt.blocks if isinstance(block.ffn, MoE)]
    idle = sum((len(moe.experts) - moe.k) * params(moe.experts[0]) for moe in moes)
    return params_without_embedding(gpt) - idle


# --------------------------------------------------------------------------------------------------
# Table 1

# As printed, but MFA-KR's row, which the paper leaves out. H^2 is written H**2 so that Python can
# evaluate it. KV cache, parameters, heads, factorization rank per head, shared latent subspace
# dimension, total effective rank.
TABLE1 = {
    "fpba": ("2*H**2", "2*H**3", "H", "H", "H", "H**2"),
    "mha": ("2*H", "4*H**2", "n", "d", "H", "n*d"),
    "mqa": ("2*d", "(2 + 2/n)*H**2", "n", "d", "d", "n*d"),
    "gqa": ("2*g*d", "(2 + 2*g/n)*H**2", "n", "d", "g*d", "n*d"),
    "mla": ("2*C + d_r", "H*(3*C + d_r + m*d) + m*C*(3*d + d_r)", "m", "d", "C", "m*d"),
    "mfa": ("2*C", "H*(3*C + m*C) + m*C**2", "m", "C", "C", "m*C"),
    "mfa_kr": ("C", "H*(2*C + m*C) + (m + 1)*C**2 + C", "m", "C", "C", "m*C"),
}


class Row(NamedTuple):
    """One attention of Table 1, for one layer."""

    attn: str
    formulas: tuple[str, ...]  # of TABLE1
    printed: Counts  # the formulas' values
    counts: Counts  # mfa.py's closed form
    kv_cache: int  # measured: elements of a cache for one token
    params: int  # measured: elements of the weights


def table1(preset_name: str = "paper-1b") -> list[Row]:
    return [table1_row(attn, preset(preset_name, attn, n_layer=1)) for attn in TABLE1]


def table1_row(attn: str, cfg: Config) -> Row:
    letters = dict(
        H=cfg.dim, n=cfg.heads, m=cfg.heads, d=cfg.head_dim, g=cfg.n_kv_head, C=cfg.latent,
        d_r=cfg.rope_dim,
    )  # fmt: skip
    formulas = TABLE1[attn]
    printed = Counts(*(round(eval(formula, {}, letters)) for formula in formulas))
    gpt = model(cfg)
    kv_cache = KVCache(gpt, batch_size=1, capacity=1).numel()
    n_params = params(gpt.blocks[0].attn)
    return Row(attn, formulas, printed, ATTENTION[attn].counts(cfg), kv_cache, n_params)


class Ranks(NamedTuple):
    """Matrix ranks of an attention's QK circuits W_c (n, H, H): rows query, columns key."""

    heads: list[int]  # of each W_c
    key_side: int  # of all W_c stacked, (n*H, H): the directions of a key that any head looks at
    query_side: int  # of all W_c side by side, (H, n*H): the directions of a query


def ranks(attn: Attention, offset: int = 0) -> Ranks:
    rank = torch.linalg.matrix_rank
    with torch.no_grad():
        W = attn.qk_circuit(offset)  # (n, H, H)
        key_side = rank(W.flatten(0, 1)).item()
        query_side = rank(W.mT.flatten(0, 1)).item()
        return Ranks(rank(W).tolist(), key_side, query_side)


def shrunk(cfg: Config) -> Config:
    """The same attention with every width divided by the same number, and without rotation.

    Small enough to measure ranks.
    """
    factor = max(math.gcd(cfg.dim, cfg.head_dim, cfg.latent) // 4, 1)
    widths = {name: getattr(cfg, name) // factor for name in ("dim", "head_dim")}
    return replace(cfg, **widths, latent_dim=cfg.latent // factor, n_layer=1, pos="none")


def measured_ranks(preset_name: str = "paper-1b") -> list[tuple[str, Counts, Ranks]]:
    """Of each attention: the closed form of the shrunk instance, and that of random weights."""
    rows = []
    for attn in TABLE1:
        cfg = shrunk(preset(preset_name, attn))
        with torch.random.fork_rng():
            torch.manual_seed(0)
            rows.append((attn, ATTENTION[attn].counts(cfg), ranks(ATTENTION[attn](cfg).double())))
    return rows


# --------------------------------------------------------------------------------------------------
# Every other figure


class Figure(NamedTuple):
    where: str
    what: str
    ours: float
    paper: str  # as printed, or "" where it is not
    note: str = ""

    @property
    def rounded(self) -> str:
        """Ours, to the digits and in the unit of the paper's."""
        return as_printed(self.ours, self.paper) if self.paper else ""

    @property
    def agrees(self) -> bool:
        return self.paper != "" and self.rounded == self.paper


def as_printed(value: float, like: str) -> str:
    """value rounded to the decimals and unit of `like`: as_printed(196608, "1.2K") == "196.6K"."""
    decimals, unit = re.fullmatch(r"\d+(?:\.(\d+))?([KMB%]?)", like).groups(default="")
    size = {"": 1, "K": 1e3, "M": 1e6, "B": 1e9, "%": 0.01}[unit]
    return f"{value / size:.{len(decimals)}f}{unit}"


TRUNCATED = "Cut off, not rounded."


def share_saved(less: int, more: int) -> float:
    return 1 - less / more


def abstract() -> list[Figure]:
    def bytes_of(attn: str, **fields) -> int:
        return measured_cache_bytes(model(preset("paper-1b", attn, **fields)))

    mha, mfa, kr = (bytes_of(attn) for attn in ("mha", "mfa", "mfa_kr"))
    mla = bytes_of("mla", **FIGURE1_MLA)
    separate = bytes_of("mla", latent_dim=512)
    note = (
        f"The 56% needs DeepSeek-V2-Lite's joint latent, C + d_r with C = 512 (A.4). Table 1's MLA "
        f"has two latents, 2C + d_r: {separate:,} bytes, of which MFA-KR would save "
        f"{share_saved(kr, separate):.0%}."
    )
    what = "MLA as in DeepSeek-V2-Lite: bytes of cache per token"
    return [
        Figure("Figure 1", what, mla, "", note),
        Figure("Abstract", "MFA-KR saves of MLA's cache", share_saved(kr, mla), "56%"),
        Figure("Abstract", "MFA-KR saves of MHA's cache", share_saved(kr, mha), "93.7%", TRUNCATED),
        Figure("Section 4.4", "MFA's cache, of MHA's", mfa / mha, "12.5%"),
    ]


# MHA, MFA-KR, MFA on the twelve benchmarks of Table 2, from BBH to Math.
SCORES = {
    "mha": (35.9, 45.2, 68.6, 60.2, 66.0, 76.0, 45.7, 71.6, 37.2, 60.9, 11.2, 9.1),
    "mfa_kr": (34.4, 43.5, 67.5, 62.0, 63.4, 75.5, 45.2, 68.8, 36.0, 60.9, 11.0, 8.1),
    "mfa": (37.8, 45.5, 68.6, 60.7, 66.2, 77.0, 47.9, 74.3, 38.8, 61.7, 12.1, 9.4),
}


def table2() -> list[Figure]:
    size = {attn: measured_cache_bytes(model(preset("paper-7b", attn))) for attn in SCORES}
    rows = [
        Figure("Table 2", f"{NAME[attn]}: bytes of cache per token", size[attn], paper)
        for attn, paper in zip(SCORES, ("196.6K", "12.3K", "24.6K"), strict=True)
    ]
    share = size["mfa_kr"] / size["mha"]
    rows.append(Figure("Table 2", "MFA-KR's cache, of MHA's", share, "6.25%"))
    saved = share_saved(size["mfa"], size["mha"])
    rows.append(Figure("Section 4.2", "MFA saves of MHA's cache", saved, "87.5%"))
    mean = "The twelve scores printed above it add up to 600.0. Section 4.2 repeats the 49.9."
    for attn, paper, note in (("mha", "49.0", ""), ("mfa_kr", "48.0", ""), ("mfa", "49.9", mean)):
        average = sum(SCORES[attn]) / len(SCORES[attn])
        what = f"{NAME[attn]}: average of the twelve scores"
        rows.append(Figure("Table 2", what, average, paper, note))
    return rows


def fit_ffn(totals: list[int], paper: list[str], cfg: Config) -> tuple[list[int], list[int]]:
    """The FFN widths that make every total come out as printed, and the totals at the middle one.

    totals: parameters at cfg's own FFN width; all models have the same. Widths go in steps of 8.
    """
    per_width = 3 * cfg.dim * cfg.n_layer

    def totals_at(width: int) -> list[int]:
        return [total + (width - cfg.ffn) * per_width for total in totals]

    def fits(width: int) -> bool:
        pairs = zip(totals_at(width), paper, strict=True)
        return all(as_printed(total, printed) == printed for total, printed in pairs)

    widths = [width for width in range(8, 4 * cfg.dim, 8) if fits(width)]
    return widths, totals_at(widths[len(widths) // 2])


def ffn_note(widths: list[int], which: str) -> str:
    return (
        f"The FFN width of these models is not given (Table 9 is missing from our copy). With tied "
        f"embeddings and one width for all, any multiple of 8 from {widths[0]} to {widths[-1]} "
        f"gives {which}; here {widths[len(widths) // 2]}."
    )


def table3() -> list[Figure]:
    cfg = preset("paper-1b", "mfa")

    def not_factored(n_head: int) -> GPT:
        """MFA less S_q, which is an MQA of head width C."""
        return model(preset("paper-1b", "mqa", n_head=n_head, head_dim=cfg.latent))

    gpts = {
        "d n = H, not factored": not_factored(cfg.dim // cfg.latent),
        "d n = 1.75 H, not factored": not_factored(cfg.heads),
        "d n = 1.75 H, factored": model(cfg),
    }
    paper = ["1.08B", "1.20B", "1.08B"]
    widths, totals = fit_ffn([params(gpt) for gpt in gpts.values()], paper, cfg)
    note = ffn_note(widths, "the three totals")
    rows = [
        Figure("Table 3", f"{name}: parameters", total, printed, note)
        for name, total, printed in zip(gpts, totals, paper, strict=True)
    ]
    plain, wide, factored = totals
    ten = "Section 4.4 says 10% more in the text; 1.08B to 1.20B, as printed, is 11%."
    added = "parameters added by 1.75 H"
    rows += [
        Figure("Table 3", f"{added}, not factored", wide - plain, ""),
        Figure("Table 3", f"{added}, factored", factored - plain, ""),
        Figure("Section 4.4", f"{added}, not factored", wide / plain - 1, "10%", ten),
    ]
    return rows + [cache_figure("Table 3", name, gpt, "20K") for name, gpt in gpts.items()]


def cache_figure(where: str, name: str, gpt: GPT, paper: str, note: str = "") -> Figure:
    what = f"{name}: bytes of cache per token"
    return Figure(where, what, measured_cache_bytes(gpt), paper, note)


def table4() -> list[Figure]:
    mha, mfa = (model(preset("paper-1b", attn)) for attn in ("mha", "mfa"))
    perplexity = "For this model Table 4 prints perplexity 6.35, Table 3 prints 6.36."
    rows = [
        cache_figure("Table 4", "MHA", mha, "163K", TRUNCATED),
        cache_figure("Table 4", "MFA", mfa, "20K", perplexity),
    ]
    note = (
        "The four are one class of functions: any folds into vanilla's output projection "
        "(containment.py)."
    )
    for reuse in ("vanilla", "proj", "residual", "gated"):
        gpt = model(preset("paper-1b", "mfa_kr", key_reuse=reuse))
        rows.append(cache_figure("Table 4", f"{reuse} key reuse", gpt, "10K", note))
    return rows


def table5() -> list[Figure]:
    paper = dict(mha=("163K", TRUNCATED), mfa_kr=("10K", ""), mfa=("20K", ""))
    rows = []
    for attn, printed in paper.items():
        gpt = model(preset("paper-1b", attn, pos="alibi"))
        rows.append(cache_figure("Table 5", f"{NAME[attn]}, ALiBi", gpt, *printed))
    return rows


def table6() -> list[Figure]:
    cfg = preset("paper-1b", "mla", latent_dim=256, rope_dim=64)
    paper = {  # parameters, and bytes of the replaced half of the cache
        "compressed_key": ("1.12B", "12.8K"),
        "single_key": ("1.06B", "5.1K"),
        "compressed_value": ("1.07B", "10.2K"),
        "single_value": ("1.06B", "5.1K"),
    }
    gpts = {name: model(cfg, name) for name in paper}
    printed = [total for total, _ in paper.values()]
    widths, totals = fit_ffn([params(gpt) for gpt in gpts.values()], printed, cfg)
    note = ffn_note(widths, "the four totals, if queries come straight from x")
    rows = []
    for (name, gpt), total in zip(gpts.items(), totals, strict=True):
        attn, label = gpt.blocks[0].attn, name.replace("_", " ")
        shapes = attn.value_shapes if "value" in name else attn.key_shapes
        half = 2 * cfg.n_layer * sum(heads * width for heads, width in shapes)
        printed_total, printed_half = paper[name]
        what = f"{label}: bytes of its half of the cache per token"
        rows.append(Figure("Table 6", what, half, printed_half))
        rows.append(Figure("Table 6", f"{label}: parameters", total, printed_total, note))
    return rows


def table7() -> list[Figure]:
    without = (
        "Without embeddings; with their 0.13B more the printed 6.9B would be 7.1B. The 33 or 29 "
        "experts are the routed ones, the shared one comes on top, and the first layer's dense "
        "FFN, which Table 7 does not give, is two expert widths and the shared width wide."
    )
    kr = preset("paper-7b", "mfa_kr")
    as_in_table7 = replace(kr, moe_ffn_dim=1536, ffn_dim=2 * 1536 + kr.shared_ffn_dim)
    misprint = (
        f"The experts are 1536 wide in Table 7, which makes 7.0B. In the other columns they are "
        f"half as wide as the shared one: {kr.shared_ffn_dim} / 2 = {kr.moe_ffn_dim} makes 6.9B, "
        f"and is what the preset has."
    )
    rows = []
    for name, cfg, note in (
        ("MHA", preset("paper-7b", "mha"), without),
        ("MFA", preset("paper-7b", "mfa"), without),
        ("MFA-KR, experts as printed", as_in_table7, misprint),
        (f"MFA-KR, experts {kr.moe_ffn_dim} wide", kr, misprint),
    ):
        gpt = model(cfg)
        total = params_without_embedding(gpt)
        rows.append(Figure("Table 7", f"{name}: parameters", total, "6.9B", note))
        rows.append(Figure("Table 7", f"{name}: activated parameters", activated(gpt), "1.2B"))
    return rows


# Setting of the scalability experiments: layers, hidden size, parameters, activated parameters.
TABLE8 = {
    "1B": (13, 1152, "1.0B", "0.2B"),
    "2B": (16, 1408, "2.2B", "0.4B"),
    "5B": (22, 1920, "5.5B", "0.9B"),
    "7B": (24, 2048, "6.9B", "1.2B"),
}


def table8_model(layers: int, H: int) -> GPT:
    """MHA with Table 7's experts, all FFN widths in proportion to H."""
    base = preset("paper-7b", "mha")
    names = ("moe_ffn_dim", "shared_ffn_dim", "ffn_dim")
    widths = {name: getattr(base, name) * H // base.dim for name in names}
    return model(replace(base, n_layer=layers, dim=H, **widths))


def experts_for(gpt: GPT, total: str) -> float:
    """The number of routed experts that would make the printed total, as "2.2B"."""
    expert = (gpt.cfg.n_layer - 1) * params(gpt.blocks[1].ffn.experts[0])
    missing = float(total.removesuffix("B")) * 1e9 - params_without_embedding(gpt)
    return gpt.cfg.n_expert + missing / expert


def table8() -> list[Figure]:
    gpts = {setting: table8_model(layers, H) for setting, (layers, H, *_) in TABLE8.items()}
    implied = ", ".join(
        f"{experts_for(gpts[setting], total):.1f} ({setting})"
        for setting, (_, _, total, _) in TABLE8.items()
    )
    assumed = (
        f"Table 8 gives H, layers and heads, and so the attention and its cache; the number and "
        f"the widths of the experts it does not give. Assumed here: MHA with Table 7's "
        f"{gpts['7B'].cfg.n_expert} experts and all FFN widths in proportion to H. The printed "
        f"totals would take {implied} experts. The text disagrees with the table on 2B (2.1B "
        f"parameters) and 5B (48B tokens, not 47B)."
    )
    rows = []
    for setting, (_, _, total, active) in TABLE8.items():
        gpt, cache = gpts[setting], "196.6K" if setting == "7B" else ""
        ours = params_without_embedding(gpt)
        rows += [
            Figure("Table 8", f"{setting}: parameters", ours, total, assumed),
            Figure("Table 8", f"{setting}: activated parameters", activated(gpt), active),
            cache_figure("Figure 3", f"{setting}, MHA", gpt, cache),
        ]
    return rows


def figures() -> list[Figure]:
    """Every figure but Table 1's, in the paper's order."""
    tables = (abstract, table2, table3, table4, table5, table6, table7, table8)
    return [figure for table in tables for figure in table()]


# --------------------------------------------------------------------------------------------------
# Printing

EFFECTIVE_RANK = (
    "What total effective rank counts: heads times the rank of each, mC for MFA. It is a count, "
    "not the rank of one matrix. S_k is shared, so all m matrices W_c stacked on the key side have "
    "rank C together; on the query side they have rank min(H, q_rank), since S_q is shared too. "
    "MFA is an MQA of head width C whose query is factored (containment.py: mfa_to_mqa); what it "
    "buys is m different bilinear forms on one subspace, for C² + CH parameters each. MLA likewise "
    "has C key directions for its m heads of rank d."
)
MEASURED = (
    "Rotary dimensions are left out, as in the paper: under rope MLA's W_c have d_r more, per head "
    "and stacked."
)
CHECKED = (
    "✓: the formula, counts() in mfa.py and, in the first two columns, real tensors (on the meta "
    "device) give this number. The paper's formulas take n d = H. It leaves MFA-KR out; that row "
    "is ours."
)
NEXT = (
    "Next: experiments/paper/containment.py proves which attention contains which, python -m "
    "pytest tests/test_tables.py holds these figures, python train.py --attn mfa_kr trains one, "
    "and the notebooks derive them."
)


def print_wrapped(text: str, indent: str = "") -> None:
    width = min(shutil.get_terminal_size((120, 24)).columns, 120)
    hang = " " * len(indent)
    print(textwrap.fill(text, width, initial_indent=indent, subsequent_indent=hang))


def superscripts(formula: str) -> str:
    return formula.replace("**2", "²").replace("**3", "³").replace("*", "")


def in_full(figure: Figure) -> str:
    if figure.paper.endswith("%"):
        return f"{figure.ours:.2%}"
    return f"{figure.ours:,}" if isinstance(figure.ours, int) else f"{figure.ours:.2f}"


def print_table1(name: str) -> None:
    mha, gqa, mla, mfa = (preset(name, attn) for attn in ("mha", "gqa", "mla", "mfa"))
    print(
        f"Table 1 for {name}, one layer: H {mha.dim}; n {mha.heads}, d {mha.head_dim}; "
        f"g {gqa.n_kv_head}; MLA: m {mla.heads}, C {mla.latent}, d_r {mla.rope_dim}; "
        f"MFA: m {mfa.heads}, C {mfa.latent}\n"
    )
    widths = (12, 35, 7, 15, 17, 13)

    def print_cells(title: str, cells, mark: str = "") -> None:
        line = "  ".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
        print(f"{title:8}{line}{mark}")

    ranks = ("rank per head", "shared subspace", "total eff. rank")
    print_cells("", ("KV cache", "parameters", "heads", *ranks))
    for row in table1(name):
        print_cells(NAME[row.attn], map(superscripts, row.formulas))
        measured = (row.counts.kv_cache, row.counts.params) == (row.kv_cache, row.params)
        agrees = measured and row.printed == row.counts
        print_cells("", [f"{count:,}" for count in row.counts], "  ✓" if agrees else "  ≠")
    print()
    print_wrapped(CHECKED)
    if mla.latent < mla.head_dim:
        print_wrapped(
            f"≠: the paper takes C > d. Here C is {mla.latent} and d {mla.head_dim}, and MLA's "
            f"heads have rank C."
        )


def print_ranks(name: str) -> None:
    mha = preset(name, "mha")
    small = shrunk(mha)
    print(
        f"\nThe ranks, measured on random weights with every width divided by "
        f"{mha.dim // small.dim}: H {small.dim}, d {small.head_dim}, C {small.latent}\n"
    )
    widths = (20, 20, 32, 32)

    def line(title: str, cells) -> str:
        text = "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
        return f"{title:8}{text}"

    stacked = "all W_c stacked:"
    print(line("", ("each W_c", "heads x rank", f"{stacked} key side", f"{stacked} query side")))
    for attn, counts, ranks in measured_ranks(name):
        total = sum(ranks.heads)
        agrees = (
            set(ranks.heads) == {counts.rank},
            total == counts.total_rank,
            ranks.key_side == counts.shared_dim,
        )
        values = zip((ranks.heads[0], total, ranks.key_side), agrees, strict=True)
        cells = [f"{value:,} {'✓' if same else '≠'}" for value, same in values]
        print(line(NAME[attn], [*cells, f"{ranks.query_side}  "]).rstrip())
    print()
    print_wrapped(MEASURED)
    print()
    print_wrapped(EFFECTIVE_RANK)


def print_figures(rows: list[Figure]) -> None:
    notes: list[str] = []
    print(f"{'':76}{'recomputed':>14}{'rounded':>10}{'paper':>10}")
    last = ""
    for figure in rows:
        if figure.note and figure.note not in notes:
            notes.append(figure.note)
        mark = f"[{notes.index(figure.note) + 1}]" if figure.note else ""
        sign = "✓" if figure.agrees else "≠" if figure.paper else ""
        where = figure.where if figure.where != last else ""
        last = figure.where
        numbers = f"{in_full(figure):>14}{figure.rounded or '–':>10}{figure.paper or '–':>10}"
        print(f"{where:13}{figure.what:63}{numbers} {sign:1} {mark}".rstrip())
    print()
    for i, note in enumerate(notes, 1):
        print_wrapped(note, f"[{i}] ".rjust(5))


@dataclass
class Args:
    """The paper's numbers, recomputed: Table 1 for a preset, then everything else."""

    preset: str = "paper-1b"
    """whose shapes Table 1 is printed for: tiny, baby, small, paper-1b or paper-7b"""


def main(args: Args) -> None:
    try:
        preset(args.preset)
    except ValueError as e:
        raise BadInput(f"--{e}") from e
    print_table1(args.preset)
    print_ranks(args.preset)
    print()
    print_figures(figures())
    print()
    print_wrapped(NEXT)


if __name__ == "__main__":
    run_command(main, Args)
