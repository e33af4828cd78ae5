"""The paper's numbers, recomputed: python experiments/paper.py [--preset paper-1b]

Prints Table 1 for a preset, then every number of the paper that follows from an architecture, beside the printed one.
Parameters and cache sizes are those of real modules on the meta device, which has shapes and no memory; ranks are
matrix ranks of a small instance. `table1`, `ranks` and `figures` return the same as data.
"""

import math
import re
import shutil
import textwrap
from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

import torch
from hybrids import hybrid_gpt
from torch import nn

from mfa import ATTENTION, GPT, Attention, Config, Counts, KVCache, MoE, preset
from prepare_data import BadInput, run_command

# ---------------------------------------------------------------------------------------------------------------------
# Counting on the meta device


@cache
def model(cfg: Config, hybrid: str = "") -> GPT:
    with torch.device("meta"):
        return hybrid_gpt(hybrid, cfg) if hybrid else GPT(cfg)


def params(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def body(gpt: GPT) -> int:
    """Parameters without the embedding (and without the output head that is tied to it)."""
    return params(gpt) - params(gpt.embed)


def activated(gpt: GPT) -> int:
    """Parameters without the embedding that one token uses: of the routed experts only n_expert_active."""
    moes = [block.ffn for block in gpt.blocks if isinstance(block.ffn, MoE)]
    return body(gpt) - sum((len(moe.experts) - moe.k) * params(moe.experts[0]) for moe in moes)


def cache_bytes(gpt: GPT) -> int:
    """Bytes of KV cache per token, in 16 bits, measured on a cache made for the model."""
    return KVCache(gpt, batch_size=1, capacity=1, dtype=torch.bfloat16).nbytes()


# ---------------------------------------------------------------------------------------------------------------------
# Table 1

# As printed, but MFA-KR's row, which the paper leaves out. H^2 is written H**2 so that Python can evaluate it.
# KV cache, parameters, heads, factorization rank per head, shared latent subspace dimension, total effective rank.
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
    rows = []
    for attn, formulas in TABLE1.items():
        cfg = replace(preset(preset_name, attn), n_layer=1)
        n = cfg.heads  # which of the two letters a row uses says which it means
        letters = dict(H=cfg.dim, n=n, m=n, d=cfg.head_dim, g=cfg.n_kv_head, C=cfg.latent, d_r=cfg.rope_dim)
        printed = Counts(*(round(eval(formula, {}, letters)) for formula in formulas))
        gpt = model(cfg)
        kept = KVCache(gpt, batch_size=1, capacity=1).numel()
        rows.append(Row(attn, formulas, printed, ATTENTION[attn].counts(cfg), kept, params(gpt.blocks[0].attn)))
    return rows


class Ranks(NamedTuple):
    """Matrix ranks of an attention's QK circuits W_c (n, H, H), of which rows belong to queries, columns to keys."""

    heads: list[int]  # of each W_c
    key_side: int  # of all W_c stacked, (n*H, H): the directions of a key that any head looks at
    query_side: int  # of all W_c side by side, (H, n*H): the directions of a query


def ranks(attn: Attention, offset: int = 0) -> Ranks:
    with torch.no_grad():
        W = attn.qk_circuit(offset)
        rank = torch.linalg.matrix_rank
        return Ranks(rank(W).tolist(), rank(W.flatten(0, 1)).item(), rank(W.mT.flatten(0, 1)).item())


def shrunk(cfg: Config) -> Config:
    """The same attention with every width divided by the same number, small enough to measure ranks, and no rotary."""
    factor = max(math.gcd(cfg.dim, cfg.head_dim, cfg.latent) // 4, 1)
    widths = dict(dim=cfg.dim // factor, head_dim=cfg.head_dim // factor, latent_dim=cfg.latent // factor)
    return replace(cfg, **widths, n_layer=1, pos="none")


def measured_ranks(preset_name: str = "paper-1b") -> list[tuple[str, Counts, Ranks]]:
    """Per attention: the closed form of the shrunk instance, and what its random weights measure."""
    rows = []
    for attn in TABLE1:
        cfg = shrunk(preset(preset_name, attn))
        with torch.random.fork_rng():
            torch.manual_seed(0)
            rows.append((attn, ATTENTION[attn].counts(cfg), ranks(ATTENTION[attn](cfg).double())))
    return rows


# ---------------------------------------------------------------------------------------------------------------------
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
    return f"{value / {'': 1, 'K': 1e3, 'M': 1e6, 'B': 1e9, '%': 0.01}[unit]:.{len(decimals)}f}{unit}"


NAME = dict(fpba="FPBA", mha="MHA", mqa="MQA", gqa="GQA", mla="MLA", mfa="MFA", mfa_kr="MFA-KR")
TRUNCATED = "Cut off, not rounded."


def saved(less: int, more: int) -> float:
    return 1 - less / more


def abstract() -> list[Figure]:
    mha, mfa, kr = (cache_bytes(model(preset("paper-1b", attn))) for attn in ("mha", "mfa", "mfa_kr"))
    lite = preset("paper-1b", "mla", latent_dim=512, rope_dim=64, joint_kv=True, compress_query=False, latent_norm=True)
    mla, separate = cache_bytes(model(lite)), cache_bytes(model(preset("paper-1b", "mla", latent_dim=512)))
    joint = (
        f"The 56% needs DeepSeek-V2-Lite's joint latent, C + d_r with C = 512 (A.4). Table 1's MLA has two latents, "
        f"2C + d_r: {separate:,} bytes, of which MFA-KR would save {saved(kr, separate):.0%}."
    )
    return [
        Figure("Figure 1", "MLA as in DeepSeek-V2-Lite: bytes of cache per token", mla, "", joint),
        Figure("Abstract", "MFA-KR saves of MLA's cache", saved(kr, mla), "56%"),
        Figure("Abstract", "MFA-KR saves of MHA's cache", saved(kr, mha), "93.7%", TRUNCATED),
        Figure("Section 4.4", "MFA's cache, of MHA's", mfa / mha, "12.5%"),
    ]


# MHA, MFA-KR, MFA on the twelve benchmarks of Table 2, from BBH to Math.
SCORES = {
    "mha": (35.9, 45.2, 68.6, 60.2, 66.0, 76.0, 45.7, 71.6, 37.2, 60.9, 11.2, 9.1),
    "mfa_kr": (34.4, 43.5, 67.5, 62.0, 63.4, 75.5, 45.2, 68.8, 36.0, 60.9, 11.0, 8.1),
    "mfa": (37.8, 45.5, 68.6, 60.7, 66.2, 77.0, 47.9, 74.3, 38.8, 61.7, 12.1, 9.4),
}


def table2() -> list[Figure]:
    kept = {attn: cache_bytes(model(preset("paper-7b", attn))) for attn in SCORES}
    rows = [
        Figure("Table 2", f"{NAME[attn]}: bytes of cache per token", kept[attn], paper)
        for attn, paper in zip(SCORES, ("196.6K", "12.3K", "24.6K"), strict=True)
    ]
    rows.append(Figure("Table 2", "MFA-KR's cache, of MHA's", kept["mfa_kr"] / kept["mha"], "6.25%"))
    rows.append(Figure("Section 4.2", "MFA saves of MHA's cache", saved(kept["mfa"], kept["mha"]), "87.5%"))
    mean = "The twelve scores printed above it add up to 600.0. Section 4.2 repeats the 49.9."
    for attn, paper, note in (("mha", "49.0", ""), ("mfa_kr", "48.0", ""), ("mfa", "49.9", mean)):
        average = sum(SCORES[attn]) / len(SCORES[attn])
        rows.append(Figure("Table 2", f"{NAME[attn]}: average of the twelve scores", average, paper, note))
    return rows


def with_ffn(totals: dict[str, tuple[int, str]], cfg: Config) -> tuple[list[int], list[int]]:
    """FFN widths, in steps of 8, with which every total comes out as printed; and the totals at the middle one.

    totals: name -> parameters at cfg's own FFN width, and what the paper prints. All models have the same FFN.
    """
    per_width = 3 * cfg.dim * cfg.n_layer
    shifted = {F: [t + (F - cfg.ffn) * per_width for t, _ in totals.values()] for F in range(8, 4 * cfg.dim, 8)}
    printed = [paper for _, paper in totals.values()]
    fits = [F for F, ours in shifted.items() if all(map(lambda t, p: as_printed(t, p) == p, ours, printed))]
    return fits, shifted[fits[len(fits) // 2]]


def ffn_note(fits: list[int], which: str) -> str:
    return (
        f"The FFN width of these models is not given (Table 9 is missing from our copy). With tied embeddings and one "
        f"width for all, any multiple of 8 from {fits[0]} to {fits[-1]} gives {which}; here {fits[len(fits) // 2]}."
    )


def table3() -> list[Figure]:
    cfg = preset("paper-1b", "mfa")
    C, m = cfg.latent, cfg.heads
    plain = [preset("paper-1b", "mqa", head_dim=C, n_head=n) for n in (cfg.dim // C, m)]  # MFA less S_q is an MQA
    gpts = dict(zip(("d n = H, not factored", "d n = 1.75 H, not factored", "d n = 1.75 H, factored"),
                    map(model, (*plain, cfg)), strict=True))  # fmt: skip
    paper = ("1.08B", "1.20B", "1.08B")
    fits, totals = with_ffn({k: (params(g), p) for (k, g), p in zip(gpts.items(), paper, strict=True)}, cfg)
    rows = [
        Figure("Table 3", f"{name}: parameters", total, printed, ffn_note(fits, "the three totals"))
        for name, total, printed in zip(gpts, totals, paper, strict=True)
    ]
    ten = "Section 4.4 says 10% more in the text; 1.08B to 1.20B, as printed, is 11%."
    rows += [
        Figure("Table 3", "parameters added by 1.75 H, not factored", totals[1] - totals[0], ""),
        Figure("Table 3", "parameters added by 1.75 H, factored", totals[2] - totals[0], ""),
        Figure("Section 4.4", "parameters added by 1.75 H, not factored", totals[1] / totals[0] - 1, "10%", ten),
    ]
    rows += [Figure("Table 3", f"{name}: bytes of cache per token", cache_bytes(g), "20K") for name, g in gpts.items()]
    return rows


def tables4and5() -> list[Figure]:
    rows, perplexity = [], "For this model Table 4 prints perplexity 6.35, Table 3 prints 6.36."
    for attn, paper, note in (("mha", "163K", TRUNCATED), ("mfa", "20K", perplexity)):
        gpt = model(preset("paper-1b", attn))
        rows.append(Figure("Table 4", f"{NAME[attn]}: bytes of cache per token", cache_bytes(gpt), paper, note))
    for reuse in ("vanilla", "proj", "residual", "gated"):
        gpt = model(preset("paper-1b", "mfa_kr", key_reuse=reuse))
        note = "The four are one class of functions: any folds into vanilla's output projection (containment.py)."
        rows.append(Figure("Table 4", f"{reuse} key reuse: bytes of cache per token", cache_bytes(gpt), "10K", note))
    for attn, paper, note in (("mha", "163K", TRUNCATED), ("mfa_kr", "10K", ""), ("mfa", "20K", "")):
        gpt = model(preset("paper-1b", attn, pos="alibi"))
        rows.append(Figure("Table 5", f"{NAME[attn]}, ALiBi: bytes of cache per token", cache_bytes(gpt), paper, note))
    return rows


def table6() -> list[Figure]:
    cfg = preset("paper-1b", "mla", latent_dim=256, rope_dim=64)
    paper = dict(compressed_key=("1.12B", "12.8K"), single_key=("1.06B", "5.1K"),
                 compressed_value=("1.07B", "10.2K"), single_value=("1.06B", "5.1K"))  # fmt: skip
    gpts = {name: model(cfg, name) for name in paper}
    fits, totals = with_ffn({name: (params(g), paper[name][0]) for name, g in gpts.items()}, cfg)
    note = ffn_note(fits, "the four totals, if queries come straight from x")
    rows = []
    for (name, gpt), total in zip(gpts.items(), totals, strict=True):
        side = [gpt.blocks[0].attn.kept_keys, gpt.blocks[0].attn.kept_values]["value" in name]
        kept = 2 * cfg.n_layer * sum(heads * width for heads, width in side)
        label = name.replace("_", " ")
        rows.append(Figure("Table 6", f"{label}: bytes of its half of the cache per token", kept, paper[name][1]))
        rows.append(Figure("Table 6", f"{label}: parameters", total, paper[name][0], note))
    return rows


def table7() -> list[Figure]:
    without = (
        "Without embeddings; with their 0.13B more the printed 6.9B would be 7.1B. The 33 or 29 experts are the routed "
        "ones, the shared one comes on top, and the first layer's dense FFN, which Table 7 does not give, is two "
        "expert widths and the shared width wide."
    )
    kr = preset("paper-7b", "mfa_kr")
    printed = replace(kr, moe_ffn_dim=1536, ffn_dim=2 * 1536 + kr.shared_ffn_dim)
    misprint = (
        f"The experts are 1536 wide in Table 7, which makes 7.0B. In the other columns they are half as wide as the "
        f"shared one: {kr.shared_ffn_dim} / 2 = {kr.moe_ffn_dim} makes 6.9B, and is what the preset has."
    )
    rows = []
    for name, cfg, note in (("MHA", preset("paper-7b", "mha"), without), ("MFA", preset("paper-7b", "mfa"), without),
                            ("MFA-KR, experts as printed", printed, misprint),
                            (f"MFA-KR, experts {kr.moe_ffn_dim} wide", kr, misprint)):  # fmt: skip
        gpt = model(cfg)
        rows.append(Figure("Table 7", f"{name}: parameters", body(gpt), "6.9B", note))
        rows.append(Figure("Table 7", f"{name}: activated parameters", activated(gpt), "1.2B"))
    return rows


# Setting of the scalability experiments: layers, hidden size, parameters, activated parameters.
TABLE8 = {"1B": (13, 1152, "1.0B", "0.2B"), "2B": (16, 1408, "2.2B", "0.4B"), "5B": (22, 1920, "5.5B", "0.9B"),
          "7B": (24, 2048, "6.9B", "1.2B")}  # fmt: skip


def table8() -> list[Figure]:
    base, gpts, implied = preset("paper-7b", "mha"), {}, {}
    for setting, (layers, H, total, _) in TABLE8.items():
        widths = {name: getattr(base, name) * H // base.dim for name in ("moe_ffn_dim", "shared_ffn_dim", "ffn_dim")}
        gpts[setting] = gpt = model(replace(base, n_layer=layers, dim=H, **widths))
        expert = (layers - 1) * params(gpt.blocks[1].ffn.experts[0])
        implied[setting] = base.n_expert + (float(total.removesuffix("B")) * 1e9 - body(gpt)) / expert
    assumed = (
        f"Table 8 gives H, layers and heads, and so the attention and its cache; the number and the widths of the "
        f"experts it does not give. Assumed here: MHA with Table 7's {base.n_expert} experts and all FFN widths in "
        f"proportion to H. The printed totals would take {', '.join(f'{n:.1f} ({s})' for s, n in implied.items())} "
        f"experts. The text disagrees with the table on 2B (2.1B parameters) and 5B (48B tokens, not 47B)."
    )
    rows = []
    for setting, (_, _, total, active) in TABLE8.items():
        gpt, kept = gpts[setting], "196.6K" if setting == "7B" else ""
        rows += [
            Figure("Table 8", f"{setting}: parameters", body(gpt), total, assumed),
            Figure("Table 8", f"{setting}: activated parameters", activated(gpt), active),
            Figure("Figure 3", f"{setting}, MHA: bytes of cache per token", cache_bytes(gpt), kept),
        ]
    return rows


def figures() -> list[Figure]:
    """Every figure but Table 1's, in the paper's order."""
    parts = (abstract, table2, table3, tables4and5, table6, table7, table8)
    return [figure for part in parts for figure in part()]


# ---------------------------------------------------------------------------------------------------------------------
# Printing

EFFECTIVE_RANK = (
    "What total effective rank counts: heads times the rank of each, mC for MFA. It is a count, not the rank of one "
    "matrix. S_k is shared, so all m matrices W_c stacked on the key side have rank C together; on the query side they "
    "have rank min(H, q_rank), since S_q is shared too. MFA is an MQA of head width C whose query is factored "
    "(containment.py: mfa_to_mqa); what it buys is m different bilinear forms on one subspace, for C² + CH parameters "
    "each. MLA likewise has C key directions for its m heads of rank d."
)
MEASURED = "Rotary dimensions are left out, as in the paper: under rope MLA's W_c have d_r more, per head and stacked."


def say(text: str, indent: str = "") -> None:
    width = min(shutil.get_terminal_size((120, 24)).columns, 120)
    print(textwrap.fill(text, width, initial_indent=indent, subsequent_indent=" " * len(indent)))


def pretty(formula: str) -> str:
    return formula.replace("**2", "²").replace("**3", "³").replace("*", "")


def in_full(figure: Figure) -> str:
    if figure.paper.endswith("%"):
        return f"{figure.ours:.2%}"
    return f"{figure.ours:,}" if isinstance(figure.ours, int) else f"{figure.ours:.2f}"


def print_table1(name: str) -> None:
    cfgs = {attn: preset(name, attn) for attn in TABLE1}
    mha, gqa, mla, mfa = (cfgs[attn] for attn in ("mha", "gqa", "mla", "mfa"))
    print(f"Table 1 for {name}, one layer: H {mha.dim}; n {mha.heads}, d {mha.head_dim}; g {gqa.n_kv_head}; "
          f"MLA: m {mla.heads}, C {mla.latent}, d_r {mla.rope_dim}; MFA: m {mfa.heads}, C {mfa.latent}\n")  # fmt: skip
    widths = (12, 35, 7, 15, 17, 13)
    head = ("KV cache", "parameters", "heads", "rank per head", "shared subspace", "total eff. rank")
    print("        " + "  ".join(f"{h:>{w}}" for h, w in zip(head, widths, strict=True)))
    for row in table1(name):
        print(f"{NAME[row.attn]:8}" + "  ".join(f"{pretty(f):>{w}}" for f, w in zip(row.formulas, widths, strict=True)))
        same = (row.printed == row.counts, row.kv_cache == row.counts.kv_cache, row.params == row.counts.params)
        mark = "  ✓" if all(same) else "  ≠"
        print(" " * 8 + "  ".join(f"{c:>{w},}" for c, w in zip(row.counts, widths, strict=True)) + mark)
    print()
    say("✓: the formula, counts() in mfa.py and, in the first two columns, real tensors (on the meta device) give this "
        "number. The paper's formulas take n d = H. It leaves MFA-KR out; that row is ours.")  # fmt: skip
    if mla.latent < mla.head_dim:
        say(f"≠: the paper takes C > d. Here C is {mla.latent} and d {mla.head_dim}, and MLA's heads have rank C.")

    small = shrunk(mha)
    print(f"\nThe ranks, measured on random weights with every width divided by {mha.dim // small.dim}: "
          f"H {small.dim}, d {small.head_dim}, C {small.latent}\n")  # fmt: skip
    widths = (20, 20, 32, 32)
    head = ("each W_c", "heads x rank", "all W_c stacked: key side", "all W_c stacked: query side")
    print("        " + "".join(f"{h:>{w}}" for h, w in zip(head, widths, strict=True)))
    for attn, counts, got in measured_ranks(name):
        values = (got.heads[0], sum(got.heads), got.key_side)
        same = (set(got.heads) == {counts.rank}, values[1] == counts.total_rank, values[2] == counts.shared_dim)
        cells = [f"{value:,} {'✓' if ok else '≠'}" for value, ok in zip(values, same, strict=True)]
        cells.append(f"{got.query_side}  ")
        print((f"{NAME[attn]:8}" + "".join(f"{c:>{w}}" for c, w in zip(cells, widths, strict=True))).rstrip())
    print()
    say(MEASURED)
    print()
    say(EFFECTIVE_RANK)


def print_figures(rows: list[Figure]) -> None:
    notes: list[str] = []
    print(f"{'':76}{'recomputed':>14}{'rounded':>10}{'paper':>10}")
    last = ""
    for figure in rows:
        if figure.note and figure.note not in notes:
            notes.append(figure.note)
        mark = f"[{notes.index(figure.note) + 1}]" if figure.note else ""
        sign = "✓" if figure.agrees else "≠" if figure.paper else ""
        where, last = (figure.where if figure.where != last else ""), figure.where
        cells = f"{in_full(figure):>14}{figure.rounded or '–':>10}{figure.paper or '–':>10} {sign:1} {mark}"
        print(f"{where:13}{figure.what:63}{cells}".rstrip())
    print()
    for i, note in enumerate(notes, 1):
        say(note, f"[{i}] ".rjust(5))


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
    print()
    print_figures(figures())
    print()
    say("Next: experiments/containment.py proves which attention contains which, python -m pytest tests/test_paper.py "
        "holds these figures, python train.py --attn mfa_kr trains one, and the notebooks derive them.")  # fmt: skip


if __name__ == "__main__":
    run_command(main, Args)
