"""Published models and cards for the page's calculator, each with its source."""

from typing import NamedTuple

from mfa import ATTENTION, Config


class Model(NamedTuple):
    attn: str  # its own attention, by the calculator's names
    fields: dict[str, int]  # what its source gives
    source: str
    url: str
    note: str = ""


QWEN3 = "https://arxiv.org/abs/2505.09388"
MODELS = {
    "Llama-3-8B": Model(
        "gqa",
        dict(n_layer=32, dim=4096, n_head=32, head_dim=128, n_kv_head=8),
        "Llama 3's report, Table 3",
        "https://arxiv.org/abs/2407.21783",
    ),
    "Qwen3-8B": Model(
        "gqa",
        dict(n_layer=36, dim=4096, n_head=32, head_dim=128, n_kv_head=8),
        "Qwen3's report, Table 1",
        QWEN3,
    ),
    "Qwen3-235B-A22B": Model(
        "gqa",
        dict(n_layer=94, dim=4096, n_head=64, head_dim=128, n_kv_head=4),
        "Qwen3's report, Table 2",
        QWEN3,
    ),
    "DeepSeek-V3": Model(
        "mla_joint",
        dict(n_layer=61, dim=7168, n_head=128, head_dim=128, joint_dim=512, rope_dim=64,
             q_rank=1536),
        "DeepSeek-V3's report, Section 4.2",
        "https://arxiv.org/abs/2412.19437",
    ),
    "Step-3": Model(
        "mfa",
        dict(n_layer=61, dim=7168, mfa_n_head=64, latent_dim=256, q_rank=2048),
        "its model card",
        "https://github.com/stepfun-ai/Step3",
    ),
    # Its full layers project keys and values with one matrix, but norm and turn the keys alone:
    # transformers and vLLM cache both. The other 50 have 16 key/value heads of 256.
    "Gemma 4 31B": Model(
        "gqa",
        dict(n_layer=60, dim=5376, n_head=32, head_dim=512, n_kv_head=4,
             local_layers=50, window=1024, local_kept=2 * 16 * 256),
        "its config.json",
        "https://huggingface.co/google/gemma-4-31B-it",
        "The 50 layers with a window stay as they are in every row; their arithmetic is counted at "
        "the other layers' FLOP per byte.",
    ),
}  # fmt: skip


def fields(model: Model) -> dict[str, int]:
    """All fields of the calculator's model.

    What a model does not have itself takes our defaults: heads of 128, 8 groups, latents of
    dim / 8 and dim / 4, and as many heads of MFA as its own attention has parameters for.
    """
    H = model.fields["dim"]
    usual = dict(n_head=H // 128, head_dim=128, n_kv_head=8, latent_dim=H // 8, joint_dim=H // 4,
                 rope_dim=64, q_rank=0, local_layers=0, window=4096, local_kept=0)  # fmt: skip
    c = usual | model.fields
    return {"mfa_n_head": mfa_heads(model.attn, c)} | c


def mfa_heads(attn: str, c: dict[str, int]) -> int:
    """The most heads of MFA with no more parameters than this attention, but at least one."""
    shape = {name: c[name] for name in ("dim", "head_dim", "n_kv_head", "rope_dim", "q_rank")}
    mla = dict(joint_kv=True, compress_query=c["q_rank"] > 0, latent_dim=c["joint_dim"])
    if attn == "mla_joint":
        own = Config(attn="mla", n_head=c["n_head"], **mla, **shape)
    else:
        own = Config(attn=attn, n_head=c["n_head"], **shape)
    budget = ATTENTION[own.attn].counts(own).params
    one, two = (
        ATTENTION["mfa"].counts(
            Config(attn="mfa", n_head=m, latent_dim=c["latent_dim"], **shape)
        ).params
        for m in (1, 2)
    )
    return max(1, 1 + (budget - one) // (two - one))


# By their data sheets: GB, TB/s, and dense TFLOP/s of the tensor cores by bytes a number (4:
# TF32, 2: bfloat16, 1: FP8, and below). An A100 has no FP8.
CARDS = {
    "H200": dict(memory=141, bandwidth=4.8, tflops={4: 495, 2: 989, 1: 1979}),
    "H100": dict(memory=80, bandwidth=3.35, tflops={4: 495, 2: 989, 1: 1979}),
    "A100 80 GB": dict(memory=80, bandwidth=2.04, tflops={4: 156, 2: 312, 1: 312}),
    "H20": dict(memory=96, bandwidth=4.0, tflops={4: 74, 2: 148, 1: 296}),
}
