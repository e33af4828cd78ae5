"""Multi-matrix Factorization Attention (MFA), MFA-Key-Reuse, and the five attentions they are compared with.

After Hu et al., "Multi-matrix Factorization Attention" (arXiv:2412.19255). The paper sees every attention as one
Generalized Multi-Head Attention, whose heads c score with a QK circuit W_c and write with a VO circuit U_c:

    O_i = sum_c sum_{j<=i} softmax_j(scale * x_i W_c x_j^T) x_j U_c                                       (Eq. 1)

Vectors are rows, W_c and U_c are (H, H), scale is (query width)^-0.5. The attentions differ only in how they factor
the two, and each class below says the same thing twice:

    factorization formulation    form W_c and U_c, apply Eq. 1      qk_circuit(), vo_circuit(), factorization(x)
    inference formulation        the same factors, multiplied in    forward(x, cache): what trains, prefills and
                                 the order that keeps little        decodes

             W_c                                U_c                                      kept per token and layer
    FPBA     W_c                                U_c                                      2 H^2
    MHA      Q_c K_c^T                          V_c O_c^T                                2 n d
    GQA      Q_c K_g^T                          V_g O_c^T          (head c is in group g)  2 g d    (MQA: g = 1)
    MLA      S_q Q_c K_c^T S_k^T (+ rotary)     S_v V_c O_c^T                            2 C + d_r  (joint: C + d_r)
    MFA      S_q Q_c S_k^T                      S_v O_c^T                                2 C
    MFA-KR   S_q Q_c S_k^T                      S_k (I + N^T diag(alpha)) O_c^T          C

From code to paper (the shapes in comments use the paper's letters, B for sequences, T for tokens, S for all tokens
so far, r for the query rank):

    dim           H     residual width             q, k, v, o       Q_c, K_c, V_c, O_c, all heads in one nn.Linear:
    n_head        n, m  query heads                                 stacked on the output rows of q, k, v and on the
    head_dim      d     head width                                  input columns of o
    n_kv_head     g     key/value heads of GQA     s_q, s_k, s_v    S_q, S_k, S_v, shared by all heads
    latent_dim    C     shared latent subspace     n, alpha         N and alpha of the key reuse (Eqs. 8-9)
    rope_dim      d_r   MLA's rotary key           kv_cache         KV Cache of Table 1, in elements
    rank, shared_dim, total_rank                   FRH, SLSD and TER of Table 1

Where the paper is misprinted or silent, a line that begins "Paper:" says what is done here.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# ---------------------------------------------------------------------------------------------------------------------
# Configuration


def need(ok: bool, what: str) -> None:
    if not ok:
        raise ValueError(what)


@dataclass(frozen=True)
class Config:
    """Everything that shapes a model; `Config(attn="mfa_kr")` is a small one.

    Fields that the chosen attention does not use are ignored. 0 in n_head, latent_dim, q_rank, ffn_dim, init_std or
    vo_std means a default that is worked out on use, so `dataclasses.replace(cfg, attn="mha")` stays right.
    Raises ValueError, in one sentence, when no model of this shape can exist.
    """

    attn: str = "mfa"  # fpba, mha, mqa, gqa, mla, mfa or mfa_kr
    vocab_size: int = 65  # tokens in the vocabulary (train.py: 0 takes the tokenizer's)
    block_size: int = 64  # context: the most tokens a forward pass takes
    n_layer: int = 4  # blocks
    dim: int = 128  # H: residual width
    n_head: int = 0  # n, m: query heads; 0: dim for fpba, mfa_n_head for mfa and mfa_kr, else dim // head_dim
    head_dim: int = 32  # d: head width of mha, mqa, gqa and mla
    n_kv_head: int = 2  # g: key/value heads of gqa
    latent_dim: int = 0  # C: shared latent width of mla, mfa and mfa_kr; 0: dim // 8
    q_rank: int = 0  # rank of the compressed query of mla, mfa and mfa_kr; 0: latent_dim, as in the paper
    rope_dim: int = 16  # d_r: width of mla's rotary key
    mfa_n_head: int = 16  # m of mfa and mfa_kr where n_head is 0 (so that one preset serves every attention)
    ffn_dim: int = 0  # width of the SwiGLU; 0: 8/3 dim, rounded up to a multiple of 8
    pos: str = "rope"  # position embedding: rope, alibi or none
    rope_base: float = 500_000.0  # base of the rotary frequencies
    dropout: float = 0.0  # on the embedding, the attention weights, and what each attention and FFN adds to the residual
    norm_eps: float = 1e-5  # of every RMSNorm
    tied: bool = True  # the output head is the embedding
    joint_kv: bool = False  # mla: one latent for keys and values (DeepSeek) instead of two (Table 1)
    compress_query: bool = True  # mla: queries from a latent; False: straight from x (DeepSeek-V2-Lite)
    latent_norm: bool = False  # RMSNorm on the query latent (mfa, mla) and on mla's joint latent (Step-3, DeepSeek)
    key_reuse: str = "gated"  # mfa_kr: gated (the paper's), or Table 4's steps vanilla, proj, residual
    key_reuse_rope: str = "pre"  # mfa_kr: where rotary keys are reused: pre, post or inverse (see MFAKR)
    init_std: float = 0.0  # std of the weights at the start; 0: 0.02 * sqrt(2048 / dim)
    vo_std: float = 0.0  # that of the attention's values and outputs (V, O; S_v; U); 0: as the others
    n_expert: int = 0  # routed experts; 0: dense FFNs
    n_expert_active: int = 2  # routed experts a token visits
    moe_ffn_dim: int = 0  # width of one routed expert
    shared_ffn_dim: int = 0  # width of the expert that every token visits; 0: none
    balance_coef: float = 0.01  # factor of the expert-level load balance loss

    def __post_init__(self):
        attn, rope, E, k = self.attn, self.pos == "rope", self.n_expert, self.n_expert_active
        choices = {"attn": "fpba mha mqa gqa mla mfa mfa_kr", "pos": "rope alibi none"}
        if attn == "mfa_kr":
            choices |= {"key_reuse": "gated vanilla proj residual", "key_reuse_rope": "pre post inverse"}
        for name, allowed in choices.items():
            got = getattr(self, name)
            need(got in allowed.split(), f"{name} must be one of {allowed.replace(' ', ', ')}, not {got!r}")
        widths = {"fpba": "dim", "mla": "head_dim rope_dim" if rope else "head_dim", "gqa": "head_dim n_kv_head"}
        widths |= {"mha": "head_dim", "mqa": "head_dim", "mfa": "mfa_n_head", "mfa_kr": "mfa_n_head"}
        positive = f"block_size n_layer dim {widths[attn]} {'n_expert_active moe_ffn_dim' if E > 0 else ''}"
        for name in positive.split():
            need(getattr(self, name) >= 1, f"{name} must be at least 1, not {getattr(self, name)}")
        for name in "vocab_size n_head latent_dim q_rank ffn_dim init_std vo_std n_expert shared_ffn_dim".split():
            need(getattr(self, name) >= 0, f"{name} must not be negative, not {getattr(self, name)}")
        for name in "rope_base norm_eps init_std vo_std balance_coef".split():
            need(math.isfinite(getattr(self, name)), f"{name} must be a finite number, not {getattr(self, name)}")
        need(0 <= self.dropout < 1, f"dropout must be in [0, 1), not {self.dropout}")
        need(self.norm_eps > 0, f"norm_eps must be positive, not {self.norm_eps}")
        need(not E or k <= E, f"n_expert_active {k} is more than n_expert {E}")
        n, g, no_latent = self.heads, self.n_kv_head, f"latent_dim 0 means dim // 8, which is 0 at dim {self.dim}"
        need(n >= 1, f"head_dim {self.head_dim} leaves no head in dim {self.dim}: make it smaller, or give n_head")
        need(attn != "fpba" or n == self.dim, f"fpba has one head per channel: n_head must be 0 or {self.dim}, not {n}")
        need(attn != "gqa" or n % g == 0, f"n_head {n} must be a multiple of n_kv_head {g}")
        need(attn not in ("mla", "mfa", "mfa_kr") or self.latent >= 1, f"{no_latent}: give latent_dim")
        separate = attn == "mla" and not self.joint_kv
        need(not (self.latent_norm and separate), "latent_norm of mla needs joint_kv: it has no place on separate latents")
        if rope:
            need(self.rope_base > 1, f"rope_base must be more than 1, not {self.rope_base}")
            rotated = {"fpba": ("dim", self.dim), "mla": ("rope_dim", self.rope_dim)}
            rotated |= dict.fromkeys(("mfa", "mfa_kr"), ("latent_dim", self.latent))
            name, width = rotated.get(attn, ("head_dim", self.head_dim))
            need(width % 2 == 0, f"{name} must be even, since pos='rope' rotates pairs, not {width}")

    # The five defaults that depend on other fields, resolved.

    @property
    def heads(self) -> int:
        """Query heads: n (MHA, MQA, GQA, MLA), m (MFA, MFA-KR) or H (FPBA)."""
        default = {"fpba": self.dim, "mfa": self.mfa_n_head, "mfa_kr": self.mfa_n_head}
        return self.n_head or default.get(self.attn, self.dim // max(self.head_dim, 1))

    @property
    def latent(self) -> int:
        """C. H / 8 makes MFA's cache 12.5% of MHA's at every width."""
        return self.latent_dim or self.dim // 8

    @property
    def query_rank(self) -> int:
        """r, the width of S_q."""
        return self.q_rank or self.latent

    @property
    def ffn(self) -> int:
        """Width of the dense SwiGLU."""
        return self.ffn_dim or math.ceil(self.dim / 3) * 8

    @property
    def std(self) -> float:
        """Std of the initial weights.

        Paper: 0.02, at H = 2048. A score is a product of up to four matrices: at a tenth of that width 0.02 starts the
        factored attentions almost uniform. sqrt(2048 / H) keeps the scores' size, and the values'; notebook 07 takes
        the two apart, and question B of experiments/README.md asks what it does to the loss.
        """
        return self.init_std or 0.02 * math.sqrt(2048 / self.dim)


# Keyword arguments of Config; what differs for one attention stands under its name. See `preset`.
PRESETS = {
    "tiny": dict(vocab_size=65, block_size=64, n_layer=4, dim=128, head_dim=32, n_kv_head=2, rope_dim=16, ffn_dim=344),
    "baby": dict(vocab_size=65, block_size=256, n_layer=6, dim=384, head_dim=64, n_kv_head=2, rope_dim=32, ffn_dim=1024,
                 rope_base=10_000.0, dropout=0.25),
    "small": dict(vocab_size=50304, block_size=1024, n_layer=12, dim=768, head_dim=64, n_kv_head=4, rope_dim=32,
                  ffn_dim=2048),
    # Section 4.4. Paper: the FFN width is in the missing Table 9; 4992 gives MHA the 1.08B of Table 3.
    "paper-1b": dict(vocab_size=65536, block_size=16384, n_layer=20, dim=2048, head_dim=128, n_kv_head=4, rope_dim=64,
                     mfa_n_head=14, ffn_dim=4992),
    # Table 7. Paper: the first, dense FFN is 2F + F_shared wide, the routed experts do not count the shared one, and
    # MFA-KR's expert width 1536 would make 7.0B; 1508, half its shared width as in the other columns, makes 6.93B.
    "paper-7b": dict(vocab_size=65536, block_size=16384, n_layer=24, dim=2048, head_dim=128, n_kv_head=4, rope_dim=64,
                     mfa_n_head=18, n_expert=33, n_expert_active=2, moe_ffn_dim=1312, shared_ffn_dim=2624, ffn_dim=5248,
                     mfa=dict(n_expert=29, moe_ffn_dim=1504, shared_ffn_dim=3008, ffn_dim=6016),
                     mfa_kr=dict(n_expert=29, moe_ffn_dim=1508, shared_ffn_dim=3016, ffn_dim=6032)),
}  # fmt: skip


def preset(name: str, attn: str = "mfa", **overrides) -> Config:
    """The Config of a preset for one attention, with any field overridden."""
    need(name in PRESETS, f"preset must be one of {', '.join(PRESETS)}, not {name!r}")
    fields = {k: v for k, v in PRESETS[name].items() if not isinstance(v, dict)}
    return Config(**{"attn": attn, **fields, **PRESETS[name].get(attn, {}), **overrides})


# ---------------------------------------------------------------------------------------------------------------------
# Positions


def widen(x: Tensor) -> Tensor:
    """x in no less than float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rotate(x: Tensor, pos: Tensor, base: float) -> Tensor:
    """RoPE: x (..., T, w) with each row multiplied by R_pos, the rotation that belongs to its position in pos (T,),
    or (T, 1) for x (..., T, n, w).

    Half-split: dimension i pairs with i + w/2 and turns by pos * base^(-2i/w) radians. R_i R_j^T = R_(i-j), so a score
    of rotated rows depends on the distance alone. Angles are never less than float32: bfloat16 cannot count to 300.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    half = x.shape[-1] // 2
    frequency = base ** (torch.arange(half, device=x.device, dtype=wide) / -half)  # (w/2,)
    angle = pos.to(wide)[..., None] * torch.cat((-frequency, frequency))  # (T, w): the sines of the halves differ in sign
    # One tensor of both: else torch.compile takes every element's cosine anew, 20% of a training step on an H200.
    cos, sin = torch.cat((angle.cos(), angle.sin()), dim=-1).chunk(2, dim=-1)  # (T, w) twice
    return torch.addcmul(x * cos, x.roll(half, dims=-1), sin).to(x.dtype)  # x cos + (x rolled) sin: (..., T, w)


def alibi(n_head: int, query: Tensor, key: Tensor, dtype: torch.dtype) -> Tensor:
    """ALiBi: what is added to the scores, -slope_c * (i - j), for positions query (T,) and key (S,): (n, T, S).

    The slopes are 2^(-8/p), 2^(-16/p), ... 2^-8 for the largest power of two p <= n; further heads take every other
    slope of the sequence for 2p (Press et al. 2021).
    """
    p = 1 << (n_head.bit_length() - 1)
    head = torch.arange(n_head, device=query.device, dtype=dtype)
    slope = torch.exp2(torch.where(head < p, head + 1, head - p + 0.5) * (-8 / p))  # (n,)
    return slope[:, None, None] * (key[None, :] - query[:, None])  # (n, T, S)


# ---------------------------------------------------------------------------------------------------------------------
# The cache


class KVCache:
    """What every token leaves behind in every layer: preallocated, one set of (B, heads, capacity, width) per layer.

    numel() == n_layer * batch_size * capacity * ATTENTION[attn].counts(cfg).kv_cache. Made for a model, handed to its
    calls, never kept on it; attention writes, and the model alone advances `length`. dtype defaults to the weights'.
    """

    def __init__(self, model: "GPT", batch_size: int, capacity: int, dtype: torch.dtype | None = None):
        need(min(batch_size, capacity) >= 1, f"batch_size and capacity must be at least 1, not {batch_size}, {capacity}")
        like = dict(dtype=dtype or model.embed.weight.dtype, device=model.embed.weight.device)
        self.layers = [
            [torch.zeros(batch_size, heads, capacity, width, **like) for heads, width in block.attn.kept]
            for block in model.blocks
        ]
        self.batch_size, self.capacity, self.length = batch_size, capacity, 0

    def append(self, layer: int, new: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Write T new tokens' (B, heads, T, width) behind the first `length`; return all S, in the dtype of `new`."""
        B, end = new[0].shape[0], self.length + new[0].shape[2]
        need(B == self.batch_size, f"the cache was made for a batch of {self.batch_size}, not {B}")
        need(end <= self.capacity, f"the cache holds {self.capacity} tokens; {end} do not fit")
        for kept, tensor in zip(self.layers[layer], new, strict=True):
            kept[:, :, self.length : end] = tensor
        return tuple(kept[:, :, :end].to(new[0].dtype) for kept in self.layers[layer])

    def numel(self) -> int:
        """Elements allocated."""
        return sum(kept.numel() for layer in self.layers for kept in layer)

    def nbytes(self) -> int:
        """Bytes allocated."""
        return sum(kept.nbytes for layer in self.layers for kept in layer)


# ---------------------------------------------------------------------------------------------------------------------
# Attention


class Counts(NamedTuple):
    """A row of Table 1, for one layer. The rank columns leave rotary dimensions out."""

    kv_cache: int  # elements kept per token
    params: int
    heads: int
    rank: int  # factorization rank per head (FRH): the rank of W_c
    shared_dim: int  # shared latent subspace dimension (SLSD): the rank of all W_c stacked on the key side
    total_rank: int  # total effective rank (TER): heads * rank


def linear(n_in: int, n_out: int) -> nn.Linear:
    return nn.Linear(n_in, n_out, bias=False)


def norm(width: int, cfg: Config, wanted: bool = True) -> nn.Module:
    return nn.RMSNorm(width, eps=cfg.norm_eps) if wanted else nn.Identity()


def split(x: Tensor, n: int) -> Tensor:
    """(B, T, n*w) -> (B, n, T, w): heads apart."""
    return x.unflatten(-1, (n, -1)).transpose(1, 2)


def per_head(weight: Tensor, n: int) -> Tensor:
    """(n*w, r) -> (n, r, w): the paper's Q_c, K_c, V_c from a weight that stacks the heads on its rows."""
    return weight.unflatten(0, (n, -1)).mT


def init_weights(module: nn.Module, cfg: Config, layer: int) -> None:
    """Section 4.1: truncated normal; what writes into the residual is divided by sqrt(2 * depth), depth from 1."""
    for name, p in module.named_parameters():
        leaf = name.removesuffix(".weight").split(".")[-1]
        if leaf == "alpha":
            nn.init.zeros_(p)
        elif p.dim() == 1:
            nn.init.ones_(p)  # RMSNorm
        else:
            std = cfg.vo_std or cfg.std if leaf in ("s_v", "v", "o", "U") else cfg.std
            # Paper: sqrt(2 * layer_idx); read as a one-based depth, or the first layer would be divided by zero.
            std = std / math.sqrt(2 * (layer + 1)) if leaf in ("o", "U", "w2") else std
            nn.init.trunc_normal_(p, std=std, a=-3 * std, b=3 * std)  # the default a, b = -2, 2 would cut nothing


class Attention(nn.Module):
    """Generalized Multi-Head Attention: Eq. 1, whose W_c and U_c a variant fills in, in both formulations.

    A variant gives: build (its weights; `kept`, the (heads, width) that one token leaves in the cache), counts;
    query, remember, recall and output for the inference formulation; qk_circuit and vo_circuit for the other.
    """

    kept: list[tuple[int, int]]

    def __init__(self, cfg: Config, layer: int = 0):
        super().__init__()
        self.cfg, self.layer, self.n_head = cfg, layer, cfg.heads
        self.build(cfg)
        init_weights(self, cfg, layer)

    def forward(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
        """Inference formulation: (B, T, H) -> (B, T, H). With a cache, x is what follows its first `length` tokens."""
        start = 0 if cache is None else cache.length
        pos = torch.arange(start, start + x.shape[1], device=x.device)  # (T,)
        q = self.query(x, pos)  # (B, n, T, w)
        kept = self.remember(x, pos)  # each (B, heads, T, width): what the cache keeps
        if cache is not None:
            kept = cache.append(self.layer, kept)  # each (B, heads, S, width)
        k, v = self.recall(*kept)  # (B, g, S, w), (B, g, S, w_v)
        return self.output(self.attend(q, k, v, pos), pos)  # (B, T, H)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, pos: Tensor) -> Tensor:
        """Causal softmax attention of queries at positions pos (T,): (B, n, T, w) -> (B, T, n, w_v)."""
        T, S = q.shape[2], k.shape[2]
        grouped = k.shape[1] != q.shape[1]
        if grouped and q.device.type not in ("cpu", "cuda"):  # enable_gqa may be missing there
            k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
            grouped = False
        mask = None
        if self.cfg.pos == "alibi" or 1 < T < S:  # is_causal is aligned top left: right only from an empty cache
            key = torch.arange(S, device=q.device)
            mask = key <= pos[:, None]  # (T, S)
            if self.cfg.pos == "alibi":
                bias = alibi(q.shape[1], pos, key, torch.promote_types(q.dtype, torch.float32))
                mask = bias.masked_fill(~mask, -math.inf).to(q.dtype)[None]  # (1, n, T, S)
        drop, causal = self.cfg.dropout if self.training else 0.0, mask is None and T > 1
        y = F.scaled_dot_product_attention(q, k, v, mask, drop, causal, scale=self.scale, enable_gqa=grouped)
        return y.transpose(1, 2)  # (B, T, n, w_v): output must not change this order in memory (train.attention_kernels)

    def factorization(self, x: Tensor) -> Tensor:
        """Factorization formulation: Eq. 1 as it stands, position by position: (B, T, H) -> (B, T, H). Slow."""
        self.check_bilinear()
        out, T = torch.zeros_like(x), x.shape[1]
        pos = torch.arange(T, device=x.device)
        W = [self.qk_circuit(offset) for offset in range(T)] if self.cfg.pos == "rope" else [self.qk_circuit()] * T
        for i in range(T):
            scores = [torch.einsum("bh,chk,bk->bc", x[:, i], W[i - j], x[:, j]) for j in range(i + 1)]
            scores = self.scale * torch.stack(scores, dim=-1)  # (B, n, i + 1)
            if self.cfg.pos == "alibi":
                scores = scores + alibi(self.n_head, pos[i : i + 1], pos[: i + 1], x.dtype)[:, 0]
            p = scores.softmax(dim=-1)
            for j in range(i + 1):
                out[:, i] += torch.einsum("bc,bh,chk->bk", p[:, :, j], x[:, j], self.vo_circuit(i, j))
        return out

    def check_bilinear(self) -> None:
        normed = any(isinstance(module, nn.RMSNorm) for module in self.modules())
        need(not normed, "latent_norm puts a norm between the factors: no longer bilinear, so there is no W_c")

    def rotate(self, x: Tensor, pos: Tensor) -> Tensor:
        return rotate(x, pos, self.cfg.rope_base) if self.cfg.pos == "rope" else x

    def rotation(self, offset: int, like: Tensor, width: int) -> Tensor:
        """R_offset as a (width, width) matrix: rotate(x, i) = x R_i. The identity without rope."""
        eye = torch.eye(width, dtype=like.dtype, device=like.device)
        return self.rotate(eye, torch.full((width,), offset, device=like.device))

    def recall(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values from what is kept; where they are kept themselves there is nothing to do."""
        return k, v

    def output(self, y: Tensor, pos: Tensor) -> Tensor:
        """sum_c y_c O_c^T: (B, T, n, w) -> (B, T, H)."""
        return self.o(y.flatten(2))

    def o_heads(self) -> Tensor:
        """O_c^T: (n, w, H)."""
        return per_head(self.o.weight.mT, self.n_head).mT


class FPBA(Attention):
    """Fully Parameterized Bilinear Attention (Section 2.1): one full W_c and U_c for each of the H channels."""

    LIMIT = 16e9  # bytes of weights beyond which a mistake is likelier than a wish

    def build(self, cfg: Config) -> None:
        H = cfg.dim
        size = 2 * H**3 * cfg.n_layer * torch.get_default_dtype().itemsize
        fits = size <= self.LIMIT or torch.empty(0).device.type == "meta"
        need(fits, f"fpba at dim {H} and n_layer {cfg.n_layer} takes {size / 1e9:,.0f} GB: make dim smaller")
        self.W = nn.Parameter(torch.empty(H, H, H))  # W_c
        self.U = nn.Parameter(torch.empty(H, H, H))  # U_c
        self.scale, self.kept = H**-0.5, [(H, H), (H, H)]

    @staticmethod
    def counts(cfg: Config) -> Counts:
        H = cfg.dim
        return Counts(2 * H**2, 2 * H**3, H, H, H, H**2)

    def query(self, x, pos):
        return self.rotate(x, pos)[:, None].expand(-1, self.n_head, -1, -1)  # (B, H, T, H)

    def remember(self, x, pos):
        k = torch.einsum("btk,chk->bcth", x, self.W)  # W_c x_j: (B, H, T, H)
        return self.rotate(k, pos), torch.einsum("bth,chk->bctk", x, self.U)  # x_j U_c: (B, H, T, H)

    def output(self, y, pos):
        return y.sum(2)  # (B, T, H)

    def qk_circuit(self, offset: int = 0) -> Tensor:
        return self.rotation(offset, self.W, self.cfg.dim) @ self.W  # (n, H, H)

    def vo_circuit(self, query: int = 0, key: int = 0) -> Tensor:
        return self.U  # (n, H, H)


class MHA(Attention):
    """Multi-Head Attention (Eqs. 2-3): W_c = Q_c K_c^T, U_c = V_c O_c^T."""

    kv_heads = staticmethod(lambda cfg: cfg.heads)  # g

    def build(self, cfg: Config) -> None:
        H, n, d = cfg.dim, cfg.heads, cfg.head_dim
        self.g = g = self.kv_heads(cfg)
        self.q, self.k, self.v, self.o = linear(H, n * d), linear(H, g * d), linear(H, g * d), linear(n * d, H)
        self.scale, self.kept = d**-0.5, [(g, d), (g, d)]

    @classmethod
    def counts(cls, cfg: Config) -> Counts:
        H, n, g, d = cfg.dim, cfg.heads, cls.kv_heads(cfg), cfg.head_dim
        rank = min(d, H)
        return Counts(2 * g * d, 2 * H * (n + g) * d, n, rank, min(g * d, H), n * rank)

    def query(self, x, pos):
        return self.rotate(split(self.q(x), self.n_head), pos)  # (B, n, T, d)

    def remember(self, x, pos):
        return self.rotate(split(self.k(x), self.g), pos), split(self.v(x), self.g)  # (B, g, T, d) twice

    def qk_circuit(self, offset: int = 0) -> Tensor:
        Q = per_head(self.q.weight, self.n_head)  # (n, H, d)
        K = per_head(self.k.weight, self.g).repeat_interleave(self.n_head // self.g, dim=0)  # (n, H, d)
        return Q @ self.rotation(offset, Q, self.cfg.head_dim) @ K.mT  # (n, H, H)

    def vo_circuit(self, query: int = 0, key: int = 0) -> Tensor:
        V = per_head(self.v.weight, self.g).repeat_interleave(self.n_head // self.g, dim=0)  # (n, H, d)
        return V @ self.o_heads()  # (n, H, H)


class GQA(MHA):
    """Grouped-Query Attention: MHA whose n heads share g keys and values, in groups of n/g neighbours."""

    kv_heads = staticmethod(lambda cfg: cfg.n_kv_head)


class MQA(MHA):
    """Multi-Query Attention: MHA whose heads share one key and one value."""

    kv_heads = staticmethod(lambda cfg: 1)


class MLA(Attention):
    """Multi-head Latent Attention (Eqs. 4-5): W_c = S_q Q_c K_c^T S_k^T, U_c = S_v V_c O_c^T; the latents are cached.

    R_(i-j) would stand between Q_c and K_c^T, and K_c could no longer be absorbed into the query; so under rope the
    position goes through d_r further dimensions, S_q Q'_c R_(i-j) K_r^T, with one rotary key K_r for all heads.
    joint_kv: one latent S_kv for keys and values. compress_query=False: Q_c and Q'_c (H, .) straight from x.
    Decoding with absorbed K_c and V_c is a matter of speed and is left to the decoding code.
    """

    def build(self, cfg: Config) -> None:
        H, m, d, C = cfg.dim, cfg.heads, cfg.head_dim, cfg.latent
        r = cfg.query_rank if cfg.compress_query else H
        self.rope_dim = d_r = cfg.rope_dim if cfg.pos == "rope" else 0
        self.s_q = linear(H, r) if cfg.compress_query else nn.Identity()
        self.q_norm = norm(r, cfg, cfg.latent_norm and cfg.compress_query)
        self.q, self.k, self.v, self.o = linear(r, m * d), linear(C, m * d), linear(C, m * d), linear(m * d, H)
        if cfg.joint_kv:
            self.s_kv = linear(H, C)
        else:
            self.s_k, self.s_v = linear(H, C), linear(H, C)
        self.kv_norm = norm(C, cfg, cfg.latent_norm)
        if d_r:
            self.q_rope, self.k_rope = linear(r, m * d_r), linear(H, d_r)
        self.kept = [(1, C)] * len(self.latents) + [(1, d_r)] * (d_r > 0)
        self.scale = (d + d_r) ** -0.5

    @property
    def latents(self) -> list[nn.Linear]:
        """S_k and S_v, or S_kv alone."""
        return [self.s_kv] if self.cfg.joint_kv else [self.s_k, self.s_v]

    @staticmethod
    def counts(cfg: Config) -> Counts:
        H, m, d, C, latents = cfg.dim, cfg.heads, cfg.head_dim, cfg.latent, 1 if cfg.joint_kv else 2
        d_r = cfg.rope_dim if cfg.pos == "rope" else 0
        r = cfg.query_rank if cfg.compress_query else H
        compression = (H * r + r * cfg.latent_norm) if cfg.compress_query else 0
        params = H * (latents * C + d_r + m * d) + 2 * C * m * d + r * m * (d + d_r) + C * cfg.latent_norm + compression
        rank = min(d, C, r, H)
        return Counts(latents * C + d_r, params, m, rank, min(C, H, m * rank), m * rank)

    def query(self, x, pos):
        x = self.q_norm(self.s_q(x))  # (B, T, r)
        q = split(self.q(x), self.n_head)  # (B, m, T, d)
        if not self.rope_dim:
            return q
        q_rope = self.rotate(split(self.q_rope(x), self.n_head), pos)  # (B, m, T, d_r)
        return torch.cat((q, q_rope), dim=-1)  # (B, m, T, d + d_r)

    def remember(self, x, pos):
        kept = [self.kv_norm(S(x)) for S in self.latents]  # each (B, T, C)
        if self.rope_dim:
            kept.append(self.rotate(self.k_rope(x), pos))  # (B, T, d_r)
        return tuple(c[:, None] for c in kept)  # each (B, 1, T, C or d_r)

    def recall(self, *kept):
        c_k, c_v = kept[0], kept[len(self.latents) - 1]  # (B, 1, S, C) twice
        k, v = (split(up(c[:, 0]), self.n_head) for up, c in ((self.k, c_k), (self.v, c_v)))  # (B, m, S, d) twice
        if self.rope_dim:
            k = torch.cat((k, kept[-1].expand(-1, self.n_head, -1, -1)), dim=-1)  # (B, m, S, d + d_r)
        return k, v

    def qk_circuit(self, offset: int = 0) -> Tensor:
        self.check_bilinear()
        K = self.latents[0].weight.mT @ per_head(self.k.weight, self.n_head)  # S_k K_c: (m, H, d)
        W = per_head(self.q.weight, self.n_head) @ K.mT  # (m, r, H)
        if self.rope_dim:
            R = self.rotation(offset, W, self.rope_dim)  # (d_r, d_r)
            W = W + per_head(self.q_rope.weight, self.n_head) @ R @ self.k_rope.weight  # (m, r, H)
        return self.s_q.weight.mT @ W if self.cfg.compress_query else W  # (m, H, H)

    def vo_circuit(self, query: int = 0, key: int = 0) -> Tensor:
        self.check_bilinear()
        return self.latents[-1].weight.mT @ per_head(self.v.weight, self.n_head) @ self.o_heads()  # (m, H, H)


class MFA(Attention):
    """Multi-matrix Factorization Attention (Eqs. 6-7): W_c = S_q Q_c S_k^T, U_c = S_v O_c^T, one key and value head.

    Under rope W_c = S_q Q_c R_(i-j) S_k^T: the rotation falls between two factors and costs nothing.
    Paper: O_c is printed (C, C); Table 1's parameters, and the product with x_j S_v, need (H, C). The scores are
    printed over sqrt(d); the key is C wide, so sqrt(C). n heads there are Table 1's m.
    """

    def build(self, cfg: Config) -> None:
        H, m, C, r = cfg.dim, cfg.heads, cfg.latent, cfg.query_rank
        self.s_q, self.s_k = linear(H, r), linear(H, C)
        self.q_norm = norm(r, cfg, cfg.latent_norm)
        self.q, self.o = linear(r, m * C), linear(m * C, H)
        self.scale = C**-0.5
        self.build_value(cfg)

    def build_value(self, cfg: Config) -> None:
        self.s_v = linear(cfg.dim, cfg.latent)
        self.kept = [(1, cfg.latent), (1, cfg.latent)]

    @staticmethod
    def counts(cfg: Config) -> Counts:
        H, m, C, r = cfg.dim, cfg.heads, cfg.latent, cfg.query_rank
        params = H * (2 * C + r + m * C) + r * m * C + (r if cfg.latent_norm else 0)
        rank = min(C, r, H)
        return Counts(2 * C, params, m, rank, min(C, H, m * rank), m * rank)

    def query(self, x, pos):
        x = self.q_norm(self.s_q(x))  # (B, T, r)
        return self.rotate(split(self.q(x), self.n_head), pos)  # (B, m, T, C)

    def remember(self, x, pos):
        return self.rotate(self.s_k(x)[:, None], pos), self.s_v(x)[:, None]  # (B, 1, T, C) twice

    def qk_circuit(self, offset: int = 0) -> Tensor:
        self.check_bilinear()
        Q = per_head(self.q.weight, self.n_head)  # (m, r, C)
        return self.s_q.weight.mT @ Q @ self.rotation(offset, Q, self.cfg.latent) @ self.s_k.weight  # (m, H, H)

    def vo_circuit(self, query: int = 0, key: int = 0) -> Tensor:
        return self.s_v.weight.mT @ self.o_heads()  # (m, H, H)


class MFAKR(MFA):
    """MFA-Key-Reuse (Eqs. 8-9): the cached key serves as the value, v_j = k_j + alpha * (N k_j) = k_j M.

    M = I + N^T diag(alpha) for "gated"; Table 4's steps: I ("vanilla"), N^T ("proj"), I + N^T ("residual").
    Paper: Eq. 8's N S_k does not conform; Eq. 9 does, with the gate on N's output. Whether the key is reused before or
    after its rotation is not said; key_reuse_rope:
        pre        unrotated keys are cached, and rotated on every read    U_c = S_k M O_c^T
        post       rotated keys are cached, and are the values             U_c = S_k R_j M O_c^T
        inverse    likewise, and the output is rotated back by R_i^-1      U_c = S_k R_j R_i^-1 M O_c^T
    """

    def build_value(self, cfg: Config) -> None:
        C = cfg.latent
        if cfg.key_reuse != "vanilla":
            self.n = linear(C, C)
        if cfg.key_reuse == "gated":
            self.alpha = nn.Parameter(torch.empty(C))
        self.kept = [(1, C)]
        self.reading = cfg.key_reuse_rope if cfg.pos == "rope" else "pre"  # without rope the three are one

    @staticmethod
    def counts(cfg: Config) -> Counts:
        C, mfa = cfg.latent, MFA.counts(cfg)
        reuse = {"vanilla": 0, "proj": C * C, "residual": C * C, "gated": C * C + C}[cfg.key_reuse]
        return mfa._replace(kv_cache=C, params=mfa.params - cfg.dim * C + reuse)

    def reuse(self, k: Tensor) -> Tensor:
        """k M: (..., C) -> (..., C)."""
        if self.cfg.key_reuse == "vanilla":
            return k
        if self.cfg.key_reuse == "proj":
            return self.n(k)
        return k + (self.alpha if self.cfg.key_reuse == "gated" else 1) * self.n(k)

    @property
    def reuse_late(self) -> bool:
        """M may act before the sum over j, cheap in training (one key head), or after it, in decoding (one token)."""
        return self.reading == "inverse" or not self.training

    def remember(self, x, pos):
        k = self.s_k(x)[:, None]
        return (k if self.reading == "pre" else self.rotate(k, pos),)  # (B, 1, T, C)

    def recall(self, k):
        v = k if self.reuse_late else self.reuse(k)
        if self.reading == "pre":
            k = self.rotate(k, torch.arange(k.shape[2], device=k.device))
        return k, v  # (B, 1, S, C) twice

    def output(self, y, pos):
        if self.reading == "inverse":
            y = self.rotate(y, -pos[:, None])
        return super().output(self.reuse(y) if self.reuse_late else y, pos)

    def vo_circuit(self, query: int = 0, key: int = 0) -> Tensor:
        S_k = self.s_k.weight.mT  # (H, C)
        angle = {"pre": 0, "post": key, "inverse": key - query}[self.reading]
        M = self.reuse(torch.eye(self.cfg.latent).to(S_k))  # (C, C)
        return S_k @ self.rotation(angle, S_k, self.cfg.latent) @ M @ self.o_heads()  # (m, H, H)


ATTENTION = {"fpba": FPBA, "mha": MHA, "mqa": MQA, "gqa": GQA, "mla": MLA, "mfa": MFA, "mfa_kr": MFAKR}

# ---------------------------------------------------------------------------------------------------------------------
# The model around it (Section 4.1): pre-norm RMSNorm, SwiGLU, no biases


class SwiGLU(nn.Module):
    """W_2 (silu(W_1 x) * W_3 x) (Shazeer 2020): (..., H) -> (..., H)."""

    def __init__(self, dim: int, width: int):
        super().__init__()
        self.w1, self.w3, self.w2 = linear(dim, width), linear(dim, width), linear(width, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class MoE(nn.Module):
    """DeepSeekMoE's layer: each token visits its top-k routed experts, weighted by softmax, and the shared expert.

    After a forward pass, `load` (E,) holds the share of the visits that each expert got (they sum to 1), and
    `balance` the expert-level loss E * sum_i load_i * (mean router probability of i): 1 when the load is even.
    """

    def __init__(self, cfg: Config):
        super().__init__()
        self.k, self.load, self.balance = cfg.n_expert_active, None, None
        self.router = linear(cfg.dim, cfg.n_expert)
        self.experts = nn.ModuleList(SwiGLU(cfg.dim, cfg.moe_ffn_dim) for _ in range(cfg.n_expert))
        self.shared = SwiGLU(cfg.dim, cfg.shared_ffn_dim) if cfg.shared_ffn_dim else None

    def forward(self, x: Tensor) -> Tensor:
        flat, E = x.flatten(0, -2), len(self.experts)  # (B*T, H)
        prob = widen(self.router(flat)).softmax(dim=-1)  # (B*T, E)
        weight, visited = prob.topk(self.k, dim=-1)  # (B*T, k), not renormalised
        y = torch.zeros_like(flat) if self.shared is None else self.shared(flat)  # (B*T, H)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(visited == e)
            y = y.index_add(0, token, (expert(flat[token]) * weight[token, slot, None]).to(y.dtype))
        self.load = torch.bincount(visited.flatten(), minlength=E) / visited.numel()  # (E,)
        self.balance = E * (self.load * prob.mean(0)).sum()
        return y.view_as(x)


class Block(nn.Module):
    """x + attention, then x + FFN, each on an RMSNorm of x. With experts, the first block's FFN stays dense."""

    def __init__(self, cfg: Config, layer: int):
        super().__init__()
        self.attn_norm = norm(cfg.dim, cfg)
        self.attn = ATTENTION[cfg.attn](cfg, layer)
        self.ffn_norm = norm(cfg.dim, cfg)
        self.ffn = MoE(cfg) if cfg.n_expert and layer > 0 else SwiGLU(cfg.dim, cfg.ffn)
        init_weights(self.ffn, cfg, layer)
        self.drop = nn.Dropout(cfg.dropout)

    def forward(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
        x = x + self.drop(self.attn(self.attn_norm(x), cache))  # (B, T, H)
        return x + self.drop(self.ffn(self.ffn_norm(x)))  # (B, T, H)


def check_ids(idx: Tensor, vocab_size: int) -> None:
    low, high = idx.min().item(), idx.max().item()
    wrong = low if low < 0 else high
    need(0 <= wrong < vocab_size, f"token ids must be 0 to {vocab_size - 1} (vocab_size), not {wrong}")


def pick(logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator) -> Tensor:
    """One id for each row of logits: (B, vocab_size) -> (B, 1). See GPT.generate."""
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    if top_k is not None and top_k < logits.shape[-1]:
        kept = logits.topk(top_k)  # values and ids, (B, top_k) each
        logits = torch.full_like(logits, -math.inf).scatter_(-1, kept.indices, kept.values)
    if top_p is not None:
        ordered, order = (logits / max(temperature, 1e-30)).softmax(dim=-1).sort(dim=-1, descending=True)
        beyond = ordered.cumsum(dim=-1) - ordered >= max(top_p, 1e-30)  # what comes before it is enough already
        logits = logits.masked_fill(beyond.scatter(-1, order, beyond), -math.inf)
    # Of exponential times over exp(logit / temperature), the least falls on i with probability softmax_i. Here in logarithms
    # and times the temperature: few steps, since each is a launch, and torch.multinomial would wait for the GPU.
    time = torch.empty_like(logits).exponential_(generator=generator).clamp_(min=1e-30)
    return logits.sub(time.log_(), alpha=temperature).argmax(dim=-1, keepdim=True)


class GPT(nn.Module):
    """A decoder-only language model around any of the attentions."""

    def __init__(self, cfg: Config):
        super().__init__()
        need(cfg.vocab_size >= 1, "vocab_size must be at least 1 to build a model")
        self.cfg = cfg
        self.blocks = nn.ModuleList(Block(cfg, layer) for layer in range(cfg.n_layer))
        self.embed = nn.Embedding(cfg.vocab_size, cfg.dim)
        self.drop = nn.Dropout(cfg.dropout)
        self.norm = norm(cfg.dim, cfg)
        self.head = linear(cfg.dim, cfg.vocab_size)
        for table in (self.head, self.embed):
            nn.init.trunc_normal_(table.weight, std=0.02, a=-0.06, b=0.06)  # at every width, unlike what lies between
        if cfg.tied:
            self.head.weight = self.embed.weight

    def forward(self, idx: Tensor, targets: Tensor | None = None, cache: KVCache | None = None):
        """Logits (B, T, vocab_size) for token ids idx (B, T), and the loss, or None without targets (B, T).

        The loss is the mean cross-entropy in nats over targets other than -1; in training, MoE's balance loss is added.
        Raises ValueError for ids outside the vocabulary (not checked on a GPU, which would have to wait for the
        answer), for more than block_size tokens, and for a cache that is full or of another batch size.
        """
        logits = self.head(self.hidden(idx, cache))  # (B, T, vocab_size)
        if targets is None:
            return logits, None
        loss = F.cross_entropy(widen(logits.flatten(0, 1)), targets.flatten(), ignore_index=-1)
        if self.training and self.cfg.n_expert:
            loss = loss + self.cfg.balance_coef * sum(b.ffn.balance for b in self.blocks if isinstance(b.ffn, MoE))
        return logits, loss

    def hidden(self, idx: Tensor, cache: KVCache | None = None) -> Tensor:
        """The normed residual before the output head: (B, T) -> (B, T, H). Advances the cache by T tokens."""
        end = idx.shape[1] + (0 if cache is None else cache.length)
        limit = self.cfg.block_size
        need(1 <= end <= limit, f"the model takes 1 to {limit} tokens (block_size), not {end}")
        if idx.device.type == "cpu" and not torch.compiler.is_compiling():
            check_ids(idx, self.cfg.vocab_size)
        x = self.drop(self.embed(idx))  # (B, T, H)
        for block in self.blocks:
            x = block(x, cache)
        if cache is not None:
            cache.length = end
        return self.norm(x)

    def generate(self, idx: Tensor, max_new_tokens: int, *args, **options) -> Tensor:
        """The prompt idx (B, T) and what stream() yields for it: (B, T + max_new_tokens), or less with stop."""
        return torch.cat((idx, *self.stream(idx, max_new_tokens, *args, **options)), dim=1)

    def next_logits(self, new: Tensor, cache: KVCache | None) -> Tensor:
        """Logits of what follows the last token of new, (B, T) behind what the cache holds: (B, vocab_size)."""
        return self.head(self.hidden(new, cache)[:, -1])

    @torch.no_grad()
    def stream(
        self,
        idx: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        use_cache: bool = True,
        generator: torch.Generator | None = None,
        stop: int | None = None,
        keep_end: bool = False,
        cache_dtype: torch.dtype | None = None,
        decode: Callable | None = None,
    ) -> Iterator[Tensor]:
        """Yield what follows the prompt idx (B, T), one (B, 1) at a time.

        Each token is drawn from softmax(logits / temperature), cut to the top_k likeliest and then to the smallest set
        whose probability reaches top_p; temperature 0 takes the likeliest. A sequence that has drawn `stop` repeats it,
        and the stream ends when all have. When the context has reached block_size it starts anew from its last
        block_size / 2 tokens, with or without the cache: use_cache changes the speed alone. A prompt beyond block_size
        is a ValueError, or cut to its end with keep_end. decode(model, new, cache) may stand in for next_logits at
        each new (B, 1), where a faster one is at hand.
        """
        limit, T = self.cfg.block_size, idx.shape[1]
        need(0 <= temperature < math.inf, f"temperature must be 0 (greedy) or a positive number, not {temperature}")
        need(top_k is None or top_k >= 1, f"top_k must be at least 1, not {top_k}")
        need(top_p is None or 0 < top_p <= 1, f"top_p must be in (0, 1], not {top_p}")
        need(max_new_tokens >= 0, f"max_new_tokens must not be negative, not {max_new_tokens}")
        need(1 <= T <= limit or (keep_end and T), f"the prompt must have 1 to {limit} tokens (block_size), not {T}")
        check_ids(idx, self.cfg.vocab_size)
        training = self.training
        self.eval()
        try:
            new = idx[:, -limit:]
            context, length = [new], new.shape[1]  # all that the model may look at; new is what of it the cache has not seen
            capacity = min(limit, length + max_new_tokens)
            cache = KVCache(self, len(idx), capacity, cache_dtype) if use_cache else None
            stopped = torch.zeros_like(idx[:, :1], dtype=torch.bool)  # (B, 1)
            for _ in range(max_new_tokens):
                if length > limit:
                    new = torch.cat(context, dim=1)[:, -max(limit // 2, 1) :]
                    context, length = [new], new.shape[1]
                    if cache is not None:
                        cache.length = 0
                if decode is not None and cache is not None and cache.length:
                    logits = decode(self, new, cache)
                else:
                    whole = new if cache is not None else torch.cat(context, dim=1)
                    logits = self.next_logits(whole, cache)  # (B, vocab_size)
                new = pick(widen(logits), temperature, top_k, top_p, generator)  # (B, 1)
                if stop is not None:
                    new = new.masked_fill(stopped, stop)
                    stopped = new == stop
                context.append(new)
                length += 1
                yield new
                if stop is not None and stopped.all():
                    return
        finally:
            self.train(training)
