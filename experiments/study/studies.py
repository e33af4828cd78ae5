"""The studies as plain data: what is trained, in which order, and what the paper found.

run.py trains, plot.py shows. The setting: 8 layers, dim 512, context 512, 29.9M parameters with
tied embeddings, 4,000 steps of 32 x 512 tokens: 65.5M tokens, 2.2 a parameter. Long enough for a
whole cosine schedule, short enough for three seeds of every claim. In 2,000 steps of 64 x 512, the
same tokens, MHA and MFA both end worse (study "why"). All models of a size have MHA's number of
parameters, which the FFN width makes up, except in Tables 3 and 6, where the paper has one FFN for
all. Heads are dim / 8 wide at every size, MFA has 16 heads of C = dim / 8, so its cache is 12.5% of
MHA's at every size.
"""

from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

from torch import nn

from experiments.paper.hybrids import HYBRIDS, hybrid_gpt
from experiments.paper.tables import DEEPSEEK_MLA
from mfa import GPT, Config, init_weights
from support.provenance import read_jsonl
from train import match_params

RESULTS = Path(__file__).resolve().parents[1] / "results" / "study.jsonl"
VOCAB = 8192  # of a BPE trained on the text
RATIOS = ("ratio", "ratio_7m")  # studies at the paper's ratio of tokens to parameters
TEXTS = dict.fromkeys(RATIOS, "pg-books-large")  # the corpus of a study; of the others pg-books

# Width, depth, and tokens in proportion to the parameters (a small model gets a small batch, for
# the sake of steps). lr is the middle of the grid at 30M; at other widths it goes with dim^-0.5.
AT_2M = dict(n_layer=4, dim=128, head_dim=16, rope_dim=8, ffn_dim=352)
AT_7M = dict(n_layer=6, dim=256, head_dim=32, rope_dim=16, ffn_dim=728)
AT_30M = dict(n_layer=8, dim=512, head_dim=64, rope_dim=32, ffn_dim=1408)
AT_60M = dict(n_layer=11, dim=640, head_dim=80, rope_dim=40, ffn_dim=1760)
# The 7M model with 8 routed experts of which 2 are visited, one shared expert, and Table 7's wide
# first FFN: 18M.
EXPERTS = dict(n_expert=8, n_expert_active=2, moe_ffn_dim=352, shared_ffn_dim=704, ffn_dim=1408)
AT_MOE = {**AT_7M, **EXPERTS}
SIZES = {
    "2M": dict(**AT_2M, batch_size=8, max_iters=1000, lr=2.8e-3),
    "7M": dict(**AT_7M, batch_size=16, max_iters=1880, lr=2e-3),
    "30M": dict(**AT_30M, batch_size=32, max_iters=4000, lr=1.4e-3),
    "60M": dict(**AT_60M, batch_size=32, max_iters=8080, lr=1.25e-3),
    "MoE": dict(**AT_MOE, batch_size=32, max_iters=2440, lr=2e-3),
    "30M, context 2048": dict(**AT_30M, block_size=2048, batch_size=8, max_iters=4000, lr=1.4e-3),
    # As many tokens in other numbers of steps, for the questions B and "why".
    "7M, 940 steps": dict(**AT_7M, batch_size=32, max_iters=940, lr=2.8e-3),
    "30M, 2,000 steps": dict(**AT_30M, batch_size=64, max_iters=2000, lr=2e-3),
    "30M, 8,000 steps": dict(**AT_30M, batch_size=16, max_iters=8000, lr=2e-3),
    # Muon's steps are as long as AdamW's, and it stands higher rates.
    "30M, Muon": dict(**AT_30M, batch_size=32, max_iters=4000, lr=3e-3),
    "7M, Muon": dict(**AT_7M, batch_size=16, max_iters=1880, lr=4.2e-3),
    # The paper's 18.5 tokens a parameter: 555M, 8.5 times the above. The best batch grows with the
    # work: DeepSeek's law (2401.02954), compute^0.33, doubles it, and a GPU likes that. Twice the
    # batch asks for 2^0.5 times the rate, so many more tokens for about as much less (Bjorck et
    # al. 2024: tokens^-0.32), so the middle of the grid stays; study "ratio" tries both sides.
    "30M, ratio": dict(**AT_30M, batch_size=64, max_iters=16_940, lr=1.4e-3),
    "30M, ratio, Muon": dict(**AT_30M, batch_size=64, max_iters=16_940, lr=3e-3),
    "7M, ratio": dict(**AT_7M, batch_size=32, max_iters=7940, lr=2e-3),
    "7M, ratio, Muon": dict(**AT_7M, batch_size=32, max_iters=7940, lr=4.2e-3),
}
SEEDS = (0, 1, 2)
# Peak learning rates, as factors of the size's lr.
GRID = (5 / 7, 1, 10 / 7)  # at 30M 1e-3, 1.4e-3, 2e-3
MUON_GRID = (2 / 3, 1, 3 / 2, 9 / 4, 27 / 8)  # 2e-3, 3e-3, 4.5e-3, 6.75e-3, 1.01e-2; see queue()
BROKEN = 0.03  # nats that a loss rises by in the last eighth of a run, see untrained()
BEST = ()  # in QUEUE: the best of them so far


class Arm(NamedTuple):
    """One row of a study."""

    name: str
    model: dict  # fields of Config, on top of the size's
    paper: str = ""  # the paper's perplexity
    size: str = "30M"
    build: str = ""  # see build(): "deepseek_init", "attention_0.02", or one of Table 6's hybrids
    matched: bool = True  # the FFN takes what the attention saves
    optimizer: str = "adamw"  # of train.py


# Fields of Config, on top of a size's.
MHA = dict(attn="mha")
GQA4 = dict(attn="gqa", n_kv_head=4)
GQA2 = dict(attn="gqa", n_kv_head=2)
MQA = dict(attn="mqa")
MFA = dict(attn="mfa")
MFA_2D = dict(**MFA, latent_dim=128, mfa_n_head=8)
KR = dict(attn="mfa_kr")
KR_2D = dict(**KR, latent_dim=128, mfa_n_head=8)
MLA_JOINT = dict(attn="mla", joint_kv=True, latent_dim=128)
MLA_SEPARATE = dict(attn="mla", latent_dim=64)
MLA_DEEPSEEK = dict(attn="mla", **DEEPSEEK_MLA, latent_dim=128)  # C = H / 4, d_r = d / 2, as there
HYBRID = dict(attn="mla", latent_dim=64)  # Table 6: C = H / 8, d_r = d / 2
ROPE_BASE = dict(rope_base=10_000.0)  # for a context of 512, not the paper's 16k

# Figure 1 is a plot: the three perplexities printed in Table 4 are of the same setting, the others
# cannot be read off it.
FIGURE1 = {
    "mha": Arm("MHA", MHA, "6.41"),
    "mfa": Arm("MFA, C = dim/8, 16 heads", MFA, "6.35"),
    "mfa_kr": Arm("MFA-KR, C = dim/8, 16 heads", KR, "6.45"),
    "mqa": Arm("MQA", MQA),
    "mfa_2d": Arm("MFA, C = 2d, 8 heads", MFA_2D),
    "gqa2": Arm("GQA, 2 KV heads", GQA2),
    "mla_joint": Arm("MLA, joint latent of 128", MLA_JOINT),
    "mla_deepseek": Arm("MLA as DeepSeek-V2-Lite's", MLA_DEEPSEEK, build="deepseek_init"),
    # Not the paper's, whose rank is C; Step-3's is 8 C.
    "mfa_half": Arm("MFA, query rank dim/2", dict(**MFA, q_rank=256)),
    "mfa_kr_half": Arm("MFA-KR, query rank dim/2", dict(**KR, q_rank=256)),
    "gqa4": Arm("GQA, 4 KV heads", GQA4),
    "mfa_kr_2d": Arm("MFA-KR, C = 2d, 8 heads", KR_2D),
    "mla_joint_256": Arm("MLA, joint latent of 256", {**MLA_JOINT, "latent_dim": 256}),
    "mla_separate": Arm("MLA, two latents of 64", MLA_SEPARATE),
    "mla_separate_128": Arm("MLA, two latents of 128", {**MLA_SEPARATE, "latent_dim": 128}),
}
CORE = tuple(FIGURE1)[:10]
# The paper's counts of heads: with C = dim / 8 as the head width, 8 heads make d n = H and 14 make
# 1.75 H.
TABLE3 = {
    "plain": Arm("not factored, d n = H", dict(**MQA, n_head=8), "6.54", matched=False),
    "wide": Arm("not factored, d n = 1.75 H", dict(**MQA, n_head=14), "6.38", matched=False),
    "factored": Arm(
        "factored, d n = 1.75 H (MFA)", dict(**MFA, mfa_n_head=14), "6.36", matched=False
    ),
}
TABLE4 = {
    "mha": Arm("MHA", MHA, "6.41"),
    "mfa": Arm("MFA", MFA, "6.35"),
    "vanilla": Arm("+ vanilla key reuse", dict(**KR, key_reuse="vanilla"), "6.55"),
    "proj": Arm("+ extra value projection", dict(**KR, key_reuse="proj"), "7.88"),
    "residual": Arm("+ residual connection", dict(**KR, key_reuse="residual"), "6.65"),
    "gated": Arm("+ gating = MFA-KR", KR, "6.45"),
}
TABLE5 = {
    "mha": Arm("MHA, ALiBi", dict(**MHA, pos="alibi"), "6.60"),
    "mfa_kr": Arm("MFA-KR, ALiBi", dict(**KR, pos="alibi"), "6.48"),
    "mfa": Arm("MFA, ALiBi", dict(**MFA, pos="alibi"), "6.45"),
}
TABLE6 = {
    name: Arm(name.replace("_", " "), HYBRID, paper, build=name, matched=False)
    for name, paper in (
        ("compressed_key", "6.36"),
        ("single_key", "6.34"),
        ("compressed_value", "6.60"),
        ("single_value", "6.33"),
    )
}
THREE = (("mha", "MHA", MHA), ("mfa", "MFA", MFA), ("mfa_kr", "MFA-KR", KR))
FIGURE3 = {
    f"{attn}_{size.lower()}": Arm(f"{name}, {size}", model, size=size)
    for size in ("30M", "2M", "7M", "60M", "MoE")
    for attn, name, model in THREE
    if (attn, size) != ("mfa_kr", "MoE")
} | {
    f"mfa_half_{size.lower()}": Arm(
        f"MFA, query rank dim/2, {size}", dict(**MFA, q_rank=rank), size=size
    )
    # 328: at 320 match_params stays 0.75% below MHA's parameters
    for size, rank in (("30M", 256), ("2M", 64), ("7M", 128), ("60M", 328))
}
QUESTION_A = {
    "pre": Arm("pre: unrotated keys are the values", KR),
    "post": Arm("post: rotated keys are the values", dict(**KR, key_reuse_rope="post")),
    "inverse": Arm("inverse: rotated, and rotated back", dict(**KR, key_reuse_rope="inverse")),
    "none": Arm("no position embedding", dict(**KR, pos="none")),
}
SHORT = {"30M": "30M, 2,000 steps", "7M": "7M, 940 steps"}  # the start matters most in short runs
INITS = (
    ("scaled", "0.02 sqrt(2048 / dim)", {}, ""),
    ("plain", "0.02", dict(init_std=0.02), ""),
    ("attn", "0.02 in the attention alone", {}, "attention_0.02"),
    # notebook 07: at toy size this is the best start
    ("vo", "0.02 in values and outputs alone", dict(vo_std=0.02), ""),
)


def question_b() -> dict[str, Arm]:
    arms = {}
    for size, short in SHORT.items():
        mla = dict(MLA_JOINT, latent_dim=64) if size == "7M" else MLA_JOINT
        four = (("mha", "MHA", MHA), ("mqa", "MQA", MQA), ("mla", "MLA", mla), ("mfa", "MFA", MFA))
        for attn, name, model in four:
            for init, text, std, build in INITS:
                arm = Arm(f"{name}, {size}, {text}", model | std, size=short, build=build)
                arms[f"{attn}_{size.lower()}_{init}"] = arm
    return arms


QUESTION_B = question_b()
# What MFA's distance from MHA depends on.
WHY = {
    f"{attn}_{what}": Arm(f"{name}, {text}", model | more, size=size)
    for what, text, size, more in (
        ("2000", "2,000 steps of 64 x 512", "30M, 2,000 steps", {}),
        ("8000", "8,000 steps of 16 x 512", "30M, 8,000 steps", {}),
        ("base_2000", "2,000 steps, rotary base 10,000", "30M, 2,000 steps", ROPE_BASE),
        ("base", "rotary base 10,000", "30M", ROPE_BASE),
    )
    for attn, name, model in (("mfa", "MFA", MFA), ("mha", "MHA", MHA), ("mfa_kr", "MFA-KR", KR))
    if attn != "mfa_kr" or what in ("2000", "base")
} | {
    # The paper has C = 2 d at C = H / 8, so 16 heads of d = H / 16 in MHA, where the rest of this
    # file has 8 of H / 8.
    "mha_16": Arm("MHA, 16 heads of dim/16", dict(**MHA, head_dim=32)),
    "gqa4_16": Arm("GQA, 16 heads of dim/16, 4 KV heads", dict(**GQA4, head_dim=32)),
    "gqa2_16": Arm("GQA, 16 heads of dim/16, 2 KV heads", dict(**GQA2, head_dim=32)),
    "mqa_16": Arm("MQA, 16 heads of dim/16", dict(**MQA, head_dim=32)),
    "mfa_full": Arm("MFA, query rank dim", dict(**MFA, q_rank=512)),
    "mfa_quarter": Arm("MFA, query rank dim/4 = 2 C", dict(**MFA, q_rank=128)),
}
LENGTH = {
    f"{attn}_{context}": Arm(f"{name}, context {context}", model, size=size)
    for context, size in ((512, "30M"), (2048, "30M, context 2048"))
    for attn, name, model in THREE
}
MUON = dict(size="30M, Muon", optimizer="muon")
HALF = dict(rope_fraction=0.5, key_reuse_rope="inverse")
# Figure 1 by today's recipe, with what published models add to its attentions.
MODERN = {
    "mha": Arm("MHA", MHA, **MUON),
    "mfa": Arm("MFA", MFA, **MUON),
    "mfa_kr_half_norm": Arm(
        "MFA-KR, inverse, half rotated, qk_norm", dict(**KR, **HALF, qk_norm=True), **MUON
    ),
    "mqa": Arm("MQA", MQA, **MUON),
    "mla_joint": Arm("MLA, joint latent of 128", MLA_JOINT, **MUON),
    "gqa2": Arm("GQA, 2 KV heads", GQA2, **MUON),
    "mfa_kr": Arm("MFA-KR, pre", KR, **MUON),
    # A sixteenth of MHA's cache, as MFA-KR's.
    "mqa_16": Arm("MQA, 16 heads of dim/16", dict(**MQA, head_dim=32), **MUON),
    "mfa_half": Arm("MFA, query rank dim/2", dict(**MFA, q_rank=256), **MUON),
    "mfa_kr_v4": Arm(
        "MFA-KR as DeepSeek-V4's core: inverse, half rotated, qk_norm, query rank dim/2, vanilla",
        dict(**KR, **HALF, qk_norm=True, q_rank=256, key_reuse="vanilla"),
        **MUON,
    ),
    "mha_norm": Arm("MHA, qk_norm", dict(**MHA, qk_norm=True), **MUON),
    "mfa_kr_inverse": Arm("MFA-KR, inverse", dict(**KR, key_reuse_rope="inverse"), **MUON),
    "mfa_kr_half": Arm("MFA-KR, inverse, half rotated", dict(**KR, **HALF), **MUON),
    "mfa_step3": Arm(
        "MFA as Step-3's: latent_norm, query rank 8 C",
        dict(**MFA, latent_norm=True, q_rank=512),
        **MUON,
    ),
    "mla_deepseek": Arm(
        "MLA as DeepSeek-V2-Lite's", MLA_DEEPSEEK, build="deepseek_init", **MUON
    ),
    "mfa_norm": Arm("MFA, qk_norm", dict(**MFA, qk_norm=True), **MUON),
    "mqa_norm": Arm("MQA, qk_norm", dict(**MQA, qk_norm=True), **MUON),
    "gqa2_norm": Arm("GQA, 2 KV heads, qk_norm", dict(**GQA2, qk_norm=True), **MUON),
}
BEST_KR = "mfa_kr_half_norm"  # of MODERN's MFA-KRs
HEADS_CORE = ("mha", "mfa", "mqa", BEST_KR)
NORMED = ("mfa_norm", "mqa_norm", "gqa2_norm")
# What the claims rest on, without a norm and with one.
MODERN_CORE = (*HEADS_CORE, "mla_joint", "gqa2", "mha_norm", "mla_deepseek", *NORMED)
# All with a norm, MLA's on its latent: it gains MHA more than lies between MHA and MFA, and without
# one a rate just beyond the best costs 0.07 to 0.17 nats, a risk that longer runs would add to.
RATIO_CORE = ("mha_norm", "mfa_norm", "mqa_norm", BEST_KR, "mla_deepseek", "gqa2_norm")
# Does Muon do better on heads one by one than on the matrix that stacks them? At 30M the stacked
# ones are MODERN's.
MUON_HEADS = {
    f"{name}_{how}": Arm(f"{title}, {text}", model, size="7M, Muon", optimizer=optimizer)
    for name, title, model in (("mfa", "MFA", MFA), ("mha", "MHA", MHA))
    for how, text, optimizer in (
        ("stacked", "heads stacked", "muon"),
        ("apart", "heads one by one", "muon_heads"),
    )
} | {
    f"{arm}_30m": MODERN[arm]._replace(
        name=f"{MODERN[arm].name}, heads one by one", optimizer="muon_heads"
    )
    for arm in HEADS_CORE
}
# Figure 1 at the paper's ratio of tokens to parameters, by both recipes.
RATIO = {
    f"muon_{arm}": MODERN[arm]._replace(size="30M, ratio, Muon") for arm in RATIO_CORE
} | {
    f"adamw_{arm}": a._replace(size="30M, ratio", paper="")
    for arm, a in (*((arm, FIGURE1[arm]) for arm in ("mha", "mfa", "mqa", "mfa_kr")),
                   ("mha_16", WHY["mha_16"]))
}  # fmt: skip
# The same at 7M, where a run takes an eighth of the time, so that each arm has its rates and seeds;
# and, to compare, its core on 2.2 tokens a parameter.
RATIO_7M = {
    f"{recipe}_{arm}": a._replace(
        size=size, paper="", model=a.model | ({"latent_dim": 64} if arm == "mla_deepseek" else {})
    )
    for recipe, size, study, arms in (
        ("muon", "7M, ratio, Muon", MODERN, RATIO_CORE),
        ("adamw", "7M, ratio", FIGURE1, ("mha", "mfa", "mqa", "mfa_kr")),
        ("short", "7M, Muon", MODERN, RATIO_CORE[:4]),
    )
    for arm, a in ((arm, study[arm]) for arm in arms)
}
ADAMW_STUDIES = dict(
    figure1=FIGURE1, table4=TABLE4, question_a=QUESTION_A, question_b=QUESTION_B, why=WHY,
    table3=TABLE3, table6=TABLE6, table5=TABLE5, length=LENGTH, figure3=FIGURE3,
)  # fmt: skip
STUDIES = dict(
    **ADAMW_STUDIES, modern=MODERN, ratio=RATIO, ratio_7m=RATIO_7M, muon_heads=MUON_HEADS,
)  # fmt: skip

# What is trained first: the arms that the claims rest on, then Table 4, question A and the rest of
# Figure 1, with all their seeds; one seed of everything; the other seeds. Then the modern recipe
# once, its core at all rates and at two seeds, and the paper's ratio, Muon's arms first, since
# their seeds lie closer. Last the other arms of the modern recipe.
# (study, arms, learning rates as factors of the size's, seeds)
ROTATED = ("pre", "post", "inverse")
AT_ONE_RATE = ("table6", "length", "question_a", "why", "figure3", "question_b")
MUON_ARMS = tuple(arm for arm in RATIO if arm.startswith("muon"))  # of RATIO_7M, too
ADAMW_ARMS = tuple(arm for arm in RATIO if arm.startswith("adamw"))
ADAMW_7M = tuple(arm for arm in RATIO_7M if arm.startswith("adamw"))
SHORT_7M = tuple(arm for arm in RATIO_7M if arm.startswith("short"))
HEADS_30M = tuple(f"{arm}_30m" for arm in HEADS_CORE)
HEADS_7M = tuple(arm for arm in MUON_HEADS if arm not in HEADS_30M)
QUEUE = [
    ("figure1", CORE, (1,), (0,)),
    ("figure1", CORE, GRID, SEEDS),
    ("table4", TABLE4, GRID, SEEDS),
    ("question_a", ROTATED, GRID[1:], SEEDS),
    ("figure1", FIGURE1, GRID, SEEDS),
    *((study, arms, (1,), (0,)) for study, arms in ADAMW_STUDIES.items()),
    *((study, STUDIES[study], GRID, SEEDS) for study in ("table3", "table5")),
    *((study, STUDIES[study], (1,), SEEDS) for study in AT_ONE_RATE),
    ("modern", MODERN, (1,), (0,)),
    ("muon_heads", HEADS_7M, (1,), SEEDS),
    ("modern", NORMED, MUON_GRID[2:], (0,)),  # a norm stands higher rates
    ("modern", MODERN_CORE, MUON_GRID, (0,)),
    ("modern", MODERN_CORE, BEST, SEEDS[:2]),
    ("ratio_7m", MUON_ARMS, BEST, (0,)),
    ("ratio_7m", MUON_ARMS[:4], MUON_GRID, (0,)),
    ("ratio_7m", MUON_ARMS[:4], BEST, SEEDS[:2]),
    ("ratio_7m", SHORT_7M, BEST, SEEDS[:2]),
    ("ratio_7m", ADAMW_7M, BEST, (0,)),
    ("ratio_7m", ADAMW_7M[:2], GRID, (0,)),
    ("ratio_7m", MUON_ARMS, BEST, SEEDS[:2]),
    ("ratio_7m", ADAMW_7M, BEST, SEEDS),
    ("ratio", ("muon_mha_norm", "muon_mfa_norm", f"muon_{BEST_KR}"), BEST, SEEDS[:2]),
    ("ratio", MUON_ARMS[:4], BEST, SEEDS[:2]),
    ("ratio", MUON_ARMS, BEST, (0,)),
    ("ratio", ADAMW_ARMS[:4], BEST, (0,)),
    ("muon_heads", HEADS_30M, (1,), (0,)),
    ("ratio", MUON_ARMS[:2], MUON_GRID, (0,)),
    ("ratio", ADAMW_ARMS, BEST, (0,)),
    ("ratio", ADAMW_ARMS[:2], GRID, (0,)),
    ("ratio", ADAMW_ARMS[:4], BEST, SEEDS[:2]),
    ("modern", MODERN, MUON_GRID, (0,)),
    ("modern", MODERN, BEST, SEEDS),
]


# --------------------------------------------------------------------------------------------------
# From data to runs


class Run(NamedTuple):
    """All that determines a loss. Equal runs of two studies are one, and share their result."""

    cfg: Config
    build: str
    batch_size: int
    max_iters: int
    seed: int
    lr: float
    optimizer: str = "adamw"


class Task(NamedTuple):
    study: str
    arm: str
    run: Run


@cache
def settings(study: str, arm: str, toy: bool = False) -> tuple[Config, int, int, float]:
    """An arm's config, batch size, steps and middle learning rate.

    toy: an eighth of every width, two layers.
    """
    a = STUDIES[study][arm]
    fields = dict(vocab_size=VOCAB, block_size=512) | SIZES[a.size] | a.model
    batch_size, max_iters, lr = (fields.pop(name) for name in ("batch_size", "max_iters", "lr"))
    if toy:
        batch_size, max_iters = 2, 4
        fields |= dict(vocab_size=257, n_layer=2, block_size=fields["block_size"] // 16)
        fields |= {k: v // 8 for k, v in fields.items() if k.endswith(("dim", "q_rank"))}
    cfg = Config(**fields)
    return match_params(cfg) if a.matched else cfg, batch_size, max_iters, lr


def run_for(study: str, arm: str, factor: float, seed: int, toy: bool = False) -> Run:
    """The run of an arm at `factor` times its middle learning rate."""
    cfg, batch_size, max_iters, lr = settings(study, arm, toy)
    rate = round(factor * lr, 6)
    a = STUDIES[study][arm]
    return Run(cfg, a.build, batch_size, max_iters, seed, rate, a.optimizer)


def queue(
    study: str = "all", toy: bool = False, done: dict[Run, dict] | None = None
) -> Iterator[Task]:
    """Every run of a study, or of all, once, in order.

    done: the results, which say what rate is best; without them the middle one stands for it, in
    RATIOS the best one of cheaper_runs. Of MUON_GRID only the best rate's neighbours are tried.
    """
    done, seen = done or {}, set()
    for name, arms, factors, seeds in QUEUE:
        if study not in ("all", name):
            continue
        for seed in seeds:
            for arm in arms:
                best = best_so_far(name, arm, done, toy)
                for factor in factors or [best]:
                    run = run_for(name, arm, factor, seed, toy)
                    too_far = run not in done and is_far(factor, best, grid_of(name, arm))
                    if run in seen or too_far:
                        continue
                    seen.add(run)
                    yield Task(name, arm, run)


def best_so_far(study: str, arm: str, done: dict[Run, dict], toy: bool) -> float:
    """The factor to go on with: the best, a lower one if none has trained, the first at first."""
    if best := best_rate(study, arm, done, toy):
        return best
    if tried := losses_by_rate(study, arm, done, toy):
        lower = [factor for factor in grid_of(study, arm) if factor < min(tried)]
        return max(lower, default=min(tried))
    if study not in RATIOS:
        return 1
    found = (best_rate(*which, done, toy) for which in cheaper_runs(study, arm))
    return next(filter(None, found), 1)


def cheaper_runs(study: str, arm: str) -> list[tuple[str, str]]:
    """Study and arm of the same attention at 7M on as many tokens a parameter, and on fewer."""
    small = [("ratio_7m", arm)] if study == "ratio" and arm in RATIO_7M else []
    return [*small, short_run_of(arm)]


def short_run_of(arm: str) -> tuple[str, str]:
    """Study and arm of the same attention at 30M as one of RATIOS', on fewer tokens."""
    recipe, _, name = arm.partition("_")
    if recipe != "adamw":
        return "modern", name
    return ("figure1" if name in FIGURE1 else "why"), name


def is_far(factor: float, best: float, grid: tuple[float, ...]) -> bool:
    """Is a rate of MUON_GRID no neighbour of the best?"""
    return grid == MUON_GRID and abs(grid.index(factor) - grid.index(best)) > 1


def build(run: Run) -> GPT:
    """The model of a run, initialised from torch's generator."""
    if run.build in HYBRIDS:
        return hybrid_gpt(run.build, run.cfg)
    model = GPT(run.cfg)
    if run.build == "attention_0.02":
        for layer, block in enumerate(model.blocks):
            init_weights(block.attn, replace(run.cfg, init_std=0.02), layer)
    if run.build == "deepseek_init":
        init_as_deepseek(model)
    return model


def init_as_deepseek(model: GPT) -> None:
    """DeepSeek-V2, Section 3.1.2: all parameters normal with std 0.006, output projections too.

    The MFA paper takes that at H = 2048; here it goes with the width as our own 0.02 does, and the
    embedding keeps 0.006, as ours keeps 0.02.
    """
    for p in model.parameters():
        if p.dim() >= 2:
            nn.init.normal_(p, std=0.006 * (2048 / model.cfg.dim) ** 0.5)
    nn.init.normal_(model.embed.weight, std=0.006)


# --------------------------------------------------------------------------------------------------
# Results: one line of JSON a run


def run_of(row: dict) -> Run:
    """The run that a line of the results is of."""
    cfg = Config(**row["config"])
    recipe = (row[name] for name in ("build", "batch_size", "steps", "seed", "lr"))
    return Run(cfg, *recipe, row.get("optimizer", "adamw"))  # older lines are all of AdamW


def row_of(run: Run) -> dict:
    """What run_of reads."""
    recipe = dict(batch_size=run.batch_size, steps=run.max_iters, seed=run.seed, lr=run.lr)
    recipe |= dict(optimizer=run.optimizer)
    return dict(config=asdict(run.cfg), build=run.build, **recipe)


def read_results(path: Path) -> list[dict]:
    """The lines that run.py wrote."""
    return read_jsonl(path, "run.py", lambda row: (run_of(row), row["dataset"]))


def dataset_of(study: str) -> str:
    """What a study's results say of their text."""
    return f"{TEXTS.get(study, 'pg-books')}-bpe{VOCAB}"


def dataset_asked_for(corpus: str, smoke: bool) -> str:
    """The one that --dataset and --smoke name; "": each study's own."""
    if smoke:
        return "shakespeare-byte"
    return f"{corpus}-bpe{VOCAB}" if corpus else ""


def results_by_run(rows: list[dict], dataset: str = "") -> dict[Run, dict]:
    """The results on one text; by default, of each study on its own."""
    return {
        run_of(row): row
        for row in rows
        if row["dataset"] == (dataset or dataset_of(row["study"]))
    }


def untrained(row: dict) -> bool:
    """Is the loss no longer finite, at the end no lower than at first, or higher than an eighth
    before? The rate falls to 0 there: something broke."""
    curve = [loss for _, loss in row["curve"]]
    rose = len(curve) > 1 and curve[-1] >= min(curve[0], curve[-2] + BROKEN)
    return row["diverged"] or rose


def grid_of(study: str, arm: str) -> tuple[float, ...]:
    """Its learning rates, as factors of the size's."""
    return MUON_GRID if STUDIES[study][arm].optimizer.startswith("muon") else GRID


def losses_by_rate(
    study: str, arm: str, done: dict[Run, dict], toy: bool = False
) -> dict[float, dict[int, float | None]]:
    """For each factor of its grid that was trained: the loss by seed, None where it failed.

    Of the seeds that all of these have.
    """
    grid = grid_of(study, arm)
    runs = {(f, seed): run_for(study, arm, f, seed, toy) for f in grid for seed in SEEDS}
    factors = [f for f in grid if runs[f, 0] in done]
    seeds = [seed for seed in SEEDS if all(runs[f, seed] in done for f in factors)]
    rows = {f: {seed: done[runs[f, seed]] for seed in seeds} for f in factors}
    return {
        f: {seed: None if untrained(row) else row["val_loss"] for seed, row in by.items()}
        for f, by in rows.items()
    }


def best_rate(study: str, arm: str, done: dict[Run, dict], toy: bool = False) -> float | None:
    """The factor of its grid with the lowest mean loss, of those that trained; None if none did."""
    losses = losses_by_rate(study, arm, done, toy)
    totals = {f: sum(by.values()) for f, by in losses.items() if None not in by.values()}
    return min(totals, key=totals.get, default=None)
