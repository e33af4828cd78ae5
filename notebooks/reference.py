"""The exercises' hints and right answers, kept out of the lessons' sight. Reading on spoils them.

REFERENCE["04"][1] is exercise 1 of notebook 04: a hint, and a function without arguments that works
the answer out. Where there is none, the lesson itself compares: what is right is then no secret,
such as the output of a layer that the answer has to reproduce.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from mfa import ATTENTION, Config, preset


class Exercise(NamedTuple):
    hint: str
    right: Callable[[], Any] | None = None


def cached_bytes(cfg: Config, layers: int) -> int:
    return 2 * layers * ATTENTION[cfg.attn].counts(cfg).kv_cache


def words_looked_for() -> torch.Tensor:
    words = torch.tensor([0, 1, 2, 0, 1, 2])
    return ((words[:, None] == words) | (words == 2)).double()


def both_bytes() -> list[int]:
    large = dict(dim=4096, head_dim=128, n_kv_head=8)
    return [cached_bytes(Config(attn=attn, **large), 32) for attn in ("mha", "gqa")]


def most_mfa_heads() -> int:
    sizes = (ATTENTION["mfa"].counts(Config(dim=1024, latent_dim=128, n_head=n)).params for n in range(1, 100))
    return sum(size <= 4 * 1024**2 for size in sizes)


def heads_below_the_ridge() -> list[int]:
    """Heads are added until two matrix products, counted by their shapes, take longer than the bytes."""
    found, C, S, ridge = [], 64, 1000, 790 / 4.25
    for attn, bits, new in (("mfa", 16, 1), ("mfa_kr", 16, 1), ("mfa", 8, 1), ("mfa", 16, 4), ("mfa_kr", 4, 2)):
        m, bytes_read = 0, S * C * (1 if attn == "mfa_kr" else 2) * bits / 8
        while 2 * (2 * (m + 1) * new * S * C) / bytes_read <= ridge:
            m += 1
        found.append(m)
    return found


def fewest_seeds() -> list[int]:
    fits = [[k for k in range(1, 100) if 0.0094 >= 2 * sigma * math.sqrt(2 / k)] for sigma in (0.02, 0.005, 0.001)]
    return [k[0] for k in fits]


def mla_std() -> float:
    H, C, d, d_r, s = 512, 64, 64, 32, 0.04
    return H * C * s**4 * math.sqrt((d + d_r / (C * s**2)) / (d + d_r))


def means_of_turns() -> list[float]:
    turns = torch.polar(torch.tensor(1.0), torch.tensor([1.0, 0.1, 0.01])[:, None] * torch.arange(8))
    return turns.mean(1).abs().tolist()


def shared_key() -> torch.Tensor:
    number = torch.arange(4 * 6, dtype=torch.float64).view(4, 6)
    U, s, Vh = torch.linalg.svd(torch.polar(1 + number % 3, number**2), full_matrices=False)
    return torch.view_as_real(U[:, :1] * s[0] @ Vh[:1])


REFERENCE = {
    "01": {
        1: Exercise(
            "Table 1 gives elements per token and layer; two bytes each.",
            lambda: cached_bytes(preset("paper-1b", "fpba"), 20),
        ),
        2: Exercise("W[a, b] is the score when the looking token is word a, the other word b.", words_looked_for),
        3: Exercise(
            "x_i turned one step back is x_j for j = i - 1. Which matrix turns? How sharp must softmax be?", lambda: True
        ),
    },
    "02": {
        1: Exercise("2 bytes, times layers, times 2 (key and value), times heads kept, times width.", both_bytes),
        2: Exercise("mqa.k.weight is (d, H); every one of the n heads needs a copy of it, one below the other."),
        3: Exercise("cut() gives two factors; (n, H, d) becomes (n d, H) by .mT.flatten(0, 1). o is (H, n d)."),
    },
    "03": {
        1: Exercise(
            "joint: C + d_r elements per layer.",
            lambda: cached_bytes(preset("paper-1b", "mla", latent_dim=512, rope_dim=64, joint_kv=True), 27),
        ),
        2: Exercise("put S_k and S_v side by side; k reads the first half of the latent and v the second."),
        3: Exercise("Q'_c = Q_c K_c^T and O'_c^T = V_c O_c^T; correct the scale; stack the heads as mfa.py does."),
    },
    "04": {
        1: Exercise("a layer has H(3C + mC) + mC^2 parameters; solve for m and round down.", most_mfa_heads),
        2: Exercise("qk_circuit() and vo_circuit() give (m, H, H); correct the scale, fill up with zeros."),
        3: Exercise("S_k A enters W_c as A^T S_k^T. What must stand before it?"),
    },
    "05": {
        1: Exercise(
            "C elements per layer, two bytes each.", lambda: cached_bytes(Config(attn="mfa_kr", dim=2048), 24)
        ),
        2: Exercise("o_heads() gives O_c^T, (m, C, H). Multiply M from the left, then stack to (H, m C)."),
        3: Exercise("least squares: torch.linalg.lstsq(A, B) minimises |A X - B|. Mind the transposes of the weights."),
    },
    "06": {
        1: Exercise(
            "two bytes, times 80 layers, times 2C elements, times the tokens.",
            lambda: 32_768 * cached_bytes(Config(attn="mfa", dim=8192, latent_dim=256), 80),
        ),
        2: Exercise(
            "set (W + t c_mha) / (W + t c) equal to the factor and solve for t.", lambda: [1.0, 2.0, 4.0, 6.0]
        ),
        3: Exercise("fewer bits: fewer bytes. More new tokens: more operations on the same bytes.", heads_below_the_ridge),
    },
    "07": {
        1: Exercise(
            "loss = ln(perplexity); subtract MFA's from MHA's, not the perplexities.", lambda: math.log(6.41 / 6.35)
        ),
        2: Exercise(
            "a mean of k runs has variance sigma^2 / k, a difference of two such means twice that. Round up.", fewest_seeds
        ),
        3: Exercise(
            "one gain per matrix. The two parts add: d products with one std, d_r with another; variances add up.", mla_std
        ),
    },
    "08": {
        1: Exercise("MHA: 2 n d numbers a layer. MLA: C + d_r. Bits and layers cancel.", lambda: 576 / 8192),
        2: Exercise("the mean of eight complex numbers of size 1, at the angles 0, w, 2w ... 7w.", means_of_turns),
        3: Exercise("keep the first singular value: U[:, :1] * s[0] @ Vh[:1].", shared_key),
    },
}  # fmt: skip
