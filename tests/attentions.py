"""What the tests of mfa.py and experiments/ share: every attention at odd sizes, with random weights, in float64."""

import torch

from mfa import ATTENTION, GPT, Config

POSITIONS = ("rope", "alibi", "none")
READINGS = ("pre", "post", "inverse")
KEY_REUSE = ("gated", "vanilla", "proj", "residual")

# name -> what differs from SIZES. Heads are no power of two, no width is the model's divided by the heads.
CASES = {
    "fpba": dict(attn="fpba", dim=10, n_head=0),
    "mha": dict(attn="mha"),
    "mqa": dict(attn="mqa"),
    "gqa": dict(attn="gqa", n_head=6),
    "mla": dict(attn="mla"),
    "mla q_rank": dict(attn="mla", q_rank=4),
    "mla straight query": dict(attn="mla", compress_query=False),
    "mla joint": dict(attn="mla", joint_kv=True),
    "mla joint straight query": dict(attn="mla", joint_kv=True, compress_query=False),
    "mfa": dict(attn="mfa"),
    "mfa low q_rank": dict(attn="mfa", q_rank=3),
    "mfa high q_rank": dict(attn="mfa", q_rank=25),
    "fpba partly rotated": dict(attn="fpba", dim=10, n_head=0, rope_fraction=0.4),
    "mha partly rotated": dict(attn="mha", rope_fraction=1 / 3),
    "gqa partly rotated": dict(attn="gqa", n_head=6, rope_fraction=2 / 3),
    "mla with a rope_fraction, which is not for it": dict(attn="mla", rope_fraction=0.5),
    "mfa partly rotated": dict(attn="mfa", rope_fraction=0.4),
    **{
        f"mfa_kr partly rotated {reading}": dict(attn="mfa_kr", key_reuse_rope=reading, rope_fraction=0.4)
        for reading in READINGS
    },
    **{
        f"mfa_kr {reuse} {reading}": dict(attn="mfa_kr", key_reuse=reuse, key_reuse_rope=reading)
        for reuse in KEY_REUSE
        for reading in READINGS
    },
}
# A norm between the factors: no factorization formulation, everything else as usual.
NORMED = {
    "mla joint normed": dict(attn="mla", joint_kv=True, latent_norm=True),
    "mla joint straight query normed": dict(attn="mla", joint_kv=True, compress_query=False, latent_norm=True),
    "mfa normed": dict(attn="mfa", latent_norm=True, q_rank=7),
    "mfa_kr normed": dict(attn="mfa_kr", latent_norm=True),
    "mha qk_norm": dict(attn="mha", qk_norm=True),
    "gqa qk_norm": dict(attn="gqa", n_head=6, qk_norm=True),
    "mqa qk_norm": dict(attn="mqa", qk_norm=True),
    "mfa qk_norm": dict(attn="mfa", qk_norm=True),
    **{
        f"mfa_kr qk_norm {reading}": dict(attn="mfa_kr", qk_norm=True, key_reuse_rope=reading, rope_fraction=0.4)
        for reading in READINGS
    },
}
ALL = CASES | NORMED
MAIN = ("fpba", "mha", "mqa", "gqa", "mla", "mfa", "mfa_kr gated pre")  # the seven, as they come

SIZES = dict(vocab_size=31, block_size=24, n_layer=2, dim=22, n_head=3, n_kv_head=2, rope_dim=4, ffn_dim=24)


def config(case: str, pos: str = "rope", **fields) -> Config:
    widths = dict(head_dim=6, latent_dim=10) if pos == "rope" else dict(head_dim=5, latent_dim=9)
    return Config(**{**SIZES, **widths, "pos": pos, **ALL[case], **fields})


def randomized(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """In float64, all weights drawn anew, alpha and norms included, large enough for softmaxes far from flat."""
    generator = torch.Generator().manual_seed(seed)
    module = module.double()
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(0, 0.3, generator=generator)
    return module


def attention(case: str, pos: str = "rope", **fields):
    cfg = config(case, pos, **fields)
    return randomized(ATTENTION[cfg.attn](cfg))


def gpt(case: str, pos: str = "rope", **fields) -> GPT:
    return randomized(GPT(config(case, pos, **fields))).eval()


def states(cfg: Config, B: int = 2, T: int = 7) -> torch.Tensor:
    """Random x (B, T, H)."""
    return torch.randn(B, T, cfg.dim, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def tokens(cfg: Config, B: int = 2, T: int = 17) -> torch.Tensor:
    """Random ids (B, T)."""
    return torch.randint(cfg.vocab_size, (B, T), generator=torch.Generator().manual_seed(2))


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference, relative to the largest entry."""
    assert a.shape == b.shape and a.dtype == b.dtype
    return ((a - b).abs().max() / b.abs().max()).item()
