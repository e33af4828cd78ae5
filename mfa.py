"""Multi-matrix Factorization Attention (MFA), MFA-Key-Reuse, and the five attentions they are
compared with, after Hu et al., "Multi-matrix Factorization Attention" (arXiv:2412.19255).

The paper sees every attention as one Generalized Multi-Head Attention. Head c scores with a
QK circuit W_c and writes with a VO circuit U_c:

    O_i = sum_c sum_{j<=i} softmax_j(scale * x_i W_c x_j^T) x_j U_c                      (Eq. 1)

Vectors are rows, W_c and U_c are (H, H), scale is (query width)^-0.5. The attentions differ only
in how they factor the two, and each class below says the same thing twice:

    factorization formulation   form W_c and U_c, apply Eq. 1: the definition, slow
                                qk_circuit(), vo_circuit(), factorization(x)
    inference formulation       multiply the same factors in the order that makes the cache small:
                                query(), to_cache(), from_cache(), output(), forward(x, cache)

             W_c                       U_c                               cached per token and layer
    FPBA     W_c                       U_c                               2 H^2
    MHA      Q_c K_c^T                 V_c O_c^T                         2 n d
    GQA      Q_c K_g^T                 V_g O_c^T    (head c in group g)  2 g d     (MQA: g = 1)
    MLA      S_q Q_c K_c^T S_k^T       S_v V_c O_c^T                     2 C + d_r (joint: C + d_r)
    MFA      S_q Q_c S_k^T             S_v O_c^T                         2 C
    MFA-KR   S_q Q_c S_k^T             S_k (I + N^T diag(alpha)) O_c^T   C

Config gives the paper's letter of each width: H, n or m, d, g, C, d_r. Weights are named after the
paper's: s_q, s_k, s_v are S_q, S_k, S_v, shared by all heads; q, k, v, o are Q_c, K_c, V_c, O_c,
all heads in one nn.Linear, stacked on the output rows of q, k, v and on the input columns of o;
n and alpha are N and alpha of Eqs. 8-9. In the shapes of comments B is sequences, T tokens, S all
tokens so far, r the query rank, w the width of a query or a key, w_v that of a value.

    cfg = Config(attn="mfa_kr", vocab_size=65, block_size=64, n_layer=2, dim=64, head_dim=16)
    model = GPT(cfg)
    logits, loss = model(idx, targets)                       # idx, targets: (B, T)
    cache = KVCache(model, batch_size=1, capacity=64)
    logits, _ = model(idx[:1], cache=cache)                  # the next call goes on from here
    text = model.generate(idx[:1], max_new_tokens=30, top_k=10)
    ATTENTION["mfa_kr"].counts(cfg).kv_cache                 # elements cached per token and layer
    y = MFA(Config(dim=512, latent_dim=64))(x)               # (B, T, 512), in a block of your own

Where the paper is misprinted or silent, a line that begins "Paper:" says what is done here.
"""

import contextlib
import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ATTENTION: dict[str, type["Attention"]] = {}  # name -> class: filled below, and by your own file

# --------------------------------------------------------------------------------------------------
# Configuration


def require(ok: bool, message: str) -> None:
    if not ok:
        raise ValueError(message)


def require_choice(cfg: "Config", name: str, choices) -> None:
    got = getattr(cfg, name)
    require(got in choices, f"{name} must be one of {', '.join(choices)}, not {got!r}")


def require_least(cfg: "Config", least: int, *names: str) -> None:
    words = "be at least 1" if least else "not be negative"
    for name in names:
        got = getattr(cfg, name)
        require(got >= least, f"{name} must {words}, not {got}")


@dataclass(frozen=True)
class Config:
    """Everything that shapes a model. Each attention checks the fields it uses, and no others.

    0 in n_head, latent_dim, q_rank, ffn_dim, init_std or vo_std means a default, worked out on use,
    so that `dataclasses.replace(cfg, attn="mha")` stays right. Raises ValueError, in one sentence.
    """

    attn: str = "mfa"  # fpba, mha, mqa, gqa, mla, mfa, mfa_kr or another name in ATTENTION
    vocab_size: int = 65  # tokens in the vocabulary (train.py: 0 takes the tokenizer's)
    block_size: int = 64  # context: the most tokens a forward pass takes
    n_layer: int = 4  # blocks
    dim: int = 128  # H: residual width
    n_head: int = 0  # n, m: query heads; 0: the attention's default_heads
    head_dim: int = 32  # d: head width of mha, mqa, gqa and mla
    n_kv_head: int = 2  # g: key/value heads of gqa
    latent_dim: int = 0  # C: shared latent width of mla, mfa and mfa_kr; 0: dim // 8
    q_rank: int = 0  # r: rank of the query of mla, mfa and mfa_kr; 0: latent_dim, as in the paper
    rope_dim: int = 16  # d_r: width of mla's rotary key
    mfa_n_head: int = 16  # m of mfa and mfa_kr where n_head is 0, so that a preset serves them all
    ffn_dim: int = 0  # width of the SwiGLU; 0: 8/3 dim, rounded up to a multiple of 8
    pos: str = "rope"  # position embedding: rope, alibi or none
    rope_base: float = 500_000.0  # base of the rotary frequencies
    rope_fraction: float = 1.0  # share of a query's and key's width, its end, to rotate; not mla
    qk_norm: bool = False  # RMSNorm of each head's query and key, before RoPE; not mla, fpba
    dropout: float = 0.0  # on embedding, attention weights, and what a layer adds to the residual
    norm_eps: float = 1e-5  # of every RMSNorm
    tied: bool = True  # the output head is the embedding
    joint_kv: bool = False  # mla: one latent for keys and values (DeepSeek), not two (Table 1)
    compress_query: bool = True  # mla: queries from a latent; False: from x (DeepSeek-V2-Lite)
    latent_norm: bool = False  # RMSNorm on query latents and mla's joint latent (Step-3, DeepSeek)
    key_reuse: str = "gated"  # mfa_kr: gated, or Table 4's steps vanilla, proj, residual
    key_reuse_rope: str = "pre"  # mfa_kr: values before RoPE (pre), after (post), undone (inverse)
    init_std: float = 0.0  # std of the weights at the start; 0: 0.02 * sqrt(2048 / dim)
    vo_std: float = 0.0  # that of the values and outputs (V, O; S_v; U); 0: as the others
    n_expert: int = 0  # routed experts; 0: dense FFNs
    n_expert_active: int = 2  # routed experts a token visits
    moe_ffn_dim: int = 0  # width of one routed expert
    shared_ffn_dim: int = 0  # width of the expert that every token visits; 0: none
    balance_coef: float = 0.01  # factor of the expert-level load balance loss

    def __post_init__(self):
        require_choice(self, "attn", ATTENTION)
        require_choice(self, "pos", ("rope", "alibi", "none"))
        require_least(self, 1, "block_size", "n_layer", "dim")
        require_least(self, 0, "vocab_size", "n_head", "latent_dim", "q_rank", "ffn_dim")
        require_least(self, 0, "init_std", "vo_std", "n_expert", "shared_ffn_dim")
        for name in ("rope_base", "norm_eps", "init_std", "vo_std", "balance_coef"):
            got = getattr(self, name)
            require(math.isfinite(got), f"{name} must be a finite number, not {got}")
        require(0 <= self.dropout < 1, f"dropout must be in [0, 1), not {self.dropout}")
        require(self.norm_eps > 0, f"norm_eps must be positive, not {self.norm_eps}")
        if self.pos == "rope":
            require(self.rope_base > 1, f"rope_base must be more than 1, not {self.rope_base}")
            fraction = self.rope_fraction
            require(0 < fraction <= 1, f"rope_fraction must be in (0, 1], not {fraction}")
        if self.n_expert:
            k, E = self.n_expert_active, self.n_expert
            require_least(self, 1, "n_expert_active", "moe_ffn_dim")
            require(k <= E, f"n_expert_active {k} is more than n_expert {E}")
        ATTENTION[self.attn].check(self)
        ATTENTION[self.attn].counts(self)  # resolves the widths, so that a wrong one is told here

    @property
    def heads(self) -> int:
        """Query heads: n (MHA, MQA, GQA, MLA), m (MFA, MFA-KR) or H (FPBA)."""
        n = self.n_head or ATTENTION[self.attn].default_heads(self)
        what = f"head_dim {self.head_dim} leaves no head in dim {self.dim}"
        require(n >= 1, f"{what}: make it smaller, or give n_head")
        return n

    @property
    def latent(self) -> int:
        """C. H / 8 makes MFA's cache 12.5% of MHA's at every width."""
        C = self.latent_dim or self.dim // 8
        what = f"latent_dim 0 means dim // 8, which is 0 at dim {self.dim}"
        require(C >= 1, f"{what}: give latent_dim")
        return C

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
        """Paper: 0.02, at H = 2048. A score is a product of up to four matrices: at a tenth of that
        width 0.02 starts the factored attentions almost uniform, and they lose for that reason
        alone. sqrt(2048 / H) keeps the size of scores and values (notebook 07).
        """
        return self.init_std or 0.02 * math.sqrt(2048 / self.dim)


# Keyword arguments of Config; what differs for one attention stands under its name.
PRESETS = {
    "tiny": dict(vocab_size=65, block_size=64, n_layer=4, dim=128, head_dim=32, n_kv_head=2,
                 rope_dim=16, ffn_dim=344,
                 fpba=dict(dim=32, ffn_dim=0)),  # it has 2 H^3 parameters a layer
    "baby": dict(vocab_size=65, block_size=256, n_layer=6, dim=384, head_dim=64, n_kv_head=2,
                 rope_dim=32, ffn_dim=1024, rope_base=10_000.0, dropout=0.25,
                 fpba=dict(dim=64, ffn_dim=0)),
    "small": dict(vocab_size=50304, block_size=1024, n_layer=12, dim=768, head_dim=64, n_kv_head=4,
                  rope_dim=32, ffn_dim=2048),
    # Section 4.4. Paper: the FFN width is in the missing Table 9; at 4992 MHA has its 1.08B.
    "paper-1b": dict(vocab_size=65536, block_size=16384, n_layer=20, dim=2048, head_dim=128,
                     n_kv_head=4, rope_dim=64, mfa_n_head=14, ffn_dim=4992),
    # Table 7. Paper: the first, dense FFN is 2F + F_shared wide; the routed experts do not count
    # the shared one; MFA-KR's expert width 1536 would make 7.05B without the embedding, and 1508,
    # half its shared width as in the other columns, makes its 6.9B.
    "paper-7b": dict(vocab_size=65536, block_size=16384, n_layer=24, dim=2048, head_dim=128,
                     n_kv_head=4, rope_dim=64, mfa_n_head=18, n_expert=33, n_expert_active=2,
                     moe_ffn_dim=1312, shared_ffn_dim=2624, ffn_dim=5248,
                     mfa=dict(n_expert=29, moe_ffn_dim=1504, shared_ffn_dim=3008, ffn_dim=6016),
                     mfa_kr=dict(n_expert=29, moe_ffn_dim=1508, shared_ffn_dim=3016, ffn_dim=6032)),
}  # fmt: skip


def preset(name: str, attn: str = "mfa", **overrides) -> Config:
    """The Config of a preset for one attention, with any field overridden."""
    require(name in PRESETS, f"preset must be one of {', '.join(PRESETS)}, not {name!r}")
    shared = {k: v for k, v in PRESETS[name].items() if not isinstance(v, dict)}
    own = PRESETS[name].get(attn, {})
    return Config(**{"attn": attn, **shared, **own, **overrides})


# --------------------------------------------------------------------------------------------------
# Positions


def at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rotate(x: Tensor, pos: Tensor, base: float) -> Tensor:
    """RoPE: each row of x (..., T, w) times R_pos, the rotation of its position in pos (T,).

    Half-split: dimension i pairs with i + w/2 and turns by pos * base^(-2i/w) radians. R_i R_j^T =
    R_(i-j), so a score of rotated rows depends on the distance alone. pos is (T, 1) for x
    (..., T, n, w). Angles are never less than float32: bfloat16 cannot count to 300.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    half = x.shape[-1] // 2
    frequency = base ** (torch.arange(half, device=x.device, dtype=wide) / -half)  # (w/2,)
    angle = pos.to(wide)[..., None] * torch.cat((-frequency, frequency))  # (T, w)
    # One tensor of both, or torch.compile would take every element's cosine anew.
    cos, sin = torch.cat((angle.cos(), angle.sin()), dim=-1).chunk(2, dim=-1)  # (T, w) twice
    # The halves (a, b) of a row become (a cos - b sin, b cos + a sin).
    return torch.addcmul(x * cos, x.roll(half, dims=-1), sin).to(x.dtype)  # (..., T, w)


def alibi(n_head: int, query: Tensor, key: Tensor, dtype: torch.dtype) -> Tensor:
    """ALiBi: what is added to a score, -slope_c * (i - j): query (T,), key (S,) -> (n, T, S).

    The slopes are 2^(-8/p), 2^(-16/p), ... 2^-8 for the largest power of two p <= n; further heads
    take every other slope of the sequence for 2p (Press et al. 2021).
    """
    p = 1 << (n_head.bit_length() - 1)
    head = torch.arange(n_head, device=query.device, dtype=dtype)
    slope = torch.exp2(torch.where(head < p, head + 1, head - p + 0.5) * (-8 / p))  # (n,)
    return slope[:, None, None] * (key[None, :] - query[:, None])  # (n, T, S)


# --------------------------------------------------------------------------------------------------
# The cache


class KVCache:
    """What every token leaves behind in every layer: preallocated tensors, made for a model.

    layers[l] is a list of (B, heads, capacity, width), one for each of the attention's
    cache_shapes. It is handed to a model's calls and never kept on it. Attentions append; the model
    alone advances `length`. model may be any module with attentions in it; dtype is its weights'.
    """

    def __init__(self, model: nn.Module, batch_size: int, capacity: int, dtype=None):
        message = f"batch_size and capacity must be at least 1, not {batch_size}, {capacity}"
        require(min(batch_size, capacity) >= 1, message)
        attentions = [module for module in model.modules() if isinstance(module, Attention)]
        numbers = [attn.layer for attn in attentions]
        message = f"the attentions of a model have layer=0, 1, 2 ..., each its own, not {numbers}"
        require(numbers == list(range(len(numbers))), message)
        weight = next(model.parameters())
        self.layers = []
        for attn in attentions:
            shapes = [(batch_size, n, capacity, width) for n, width in attn.cache_shapes]
            self.layers.append([weight.new_zeros(shape, dtype=dtype) for shape in shapes])
        self.batch_size, self.capacity, self.length = batch_size, capacity, 0
        self.writers: dict[int, Attention] = {}  # which attention a layer is of

    def append(self, attn: "Attention", new: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Write T tokens' (B, heads, T, width) behind the first `length`; return all S of them."""
        B, end = new[0].shape[0], self.length + new[0].shape[2]
        made_for = f"the cache was made for a batch of {self.batch_size}"
        require(B == self.batch_size, f"{made_for}, not {B}")
        require(end <= self.capacity, f"the cache holds {self.capacity} tokens; {end} do not fit")
        first = self.writers.setdefault(attn.layer, attn)
        require(first is attn, f"two attentions have layer={attn.layer}: give each its own")
        cached = self.layers[attn.layer]
        for tensor, t in zip(cached, new, strict=True):
            tensor[:, :, self.length : end] = t
        return tuple(tensor[:, :, :end].to(new[0].dtype) for tensor in cached)

    def numel(self) -> int:
        return sum(tensor.numel() for layer in self.layers for tensor in layer)

    def nbytes(self) -> int:
        return sum(tensor.nbytes for layer in self.layers for tensor in layer)


# --------------------------------------------------------------------------------------------------
# Attention


class Counts(NamedTuple):
    """A row of Table 1, for one layer. The rank columns leave rotary dimensions out."""

    kv_cache: int  # elements cached per token
    params: int
    heads: int
    rank: int  # factorization rank per head (FRH): the rank of W_c
    shared_dim: int  # shared latent subspace dimension (SLSD): rank of the W_c stacked key-side
    total_rank: int  # total effective rank (TER): heads * rank


def cache_bytes(cfg: Config, itemsize: int = 2) -> int:
    """Cache of the whole model per token, in bytes; itemsize 2 is 16-bit."""
    return itemsize * cfg.n_layer * ATTENTION[cfg.attn].counts(cfg).kv_cache


def linear(n_in: int, n_out: int) -> nn.Linear:
    return nn.Linear(n_in, n_out, bias=False)


def rms_norm(width: int, cfg: Config, wanted: bool = True) -> nn.Module:
    return nn.RMSNorm(width, eps=cfg.norm_eps) if wanted else nn.Identity()


def split_heads(x: Tensor, n: int) -> Tensor:
    """(B, T, n*w) -> (B, n, T, w)."""
    return x.unflatten(-1, (n, -1)).transpose(1, 2)


def per_head(weight: Tensor, n: int) -> Tensor:
    """(n*w, r) -> (n, r, w): the paper's Q_c, K_c, V_c from a weight that stacks them on rows."""
    return weight.unflatten(0, (n, -1)).mT


def init_weights(module: nn.Module, cfg: Config, layer: int) -> None:
    """Section 4.1: a truncated normal. o, U, w2 write into the residual: over sqrt(2 * depth).

    Paper: sqrt(2 * layer_idx), read as a one-based depth: zero would divide the first layer.
    """
    for name, p in module.named_parameters():
        leaf = name.removesuffix(".weight").split(".")[-1]
        if p.dim() == 1:
            nn.init.constant_(p, 0 if leaf == "alpha" else 1)  # 1: the gain of a norm
            continue
        std = (cfg.vo_std or cfg.std) if leaf in ("s_v", "v", "o", "U") else cfg.std
        if leaf in ("o", "U", "w2"):
            std = std / math.sqrt(2 * (layer + 1))
        nn.init.trunc_normal_(p, std=std, a=-3 * std, b=3 * std)  # the default +-2 cuts nothing


class Attention(nn.Module):
    """Generalized Multi-Head Attention: Eq. 1, whose W_c and U_c a variant fills in, twice.

    A variant gives

        build(cfg)     its weights, `scale`, and `cache_shapes`: (heads, width) of what is cached
        counts(cfg)    its row of Table 1
        query, to_cache                inference: q, and what a token leaves in the cache
        qk_circuit(offset)             factorization: W_c where i - j = offset, (n, H, H)
        vo_circuit(query, key)         U_c for the query at i = query and the key at j = key

    and may give from_cache, output, check, default_heads and visible. examples/my_attention.py has
    two of 15 lines.
    """

    uses = ("head_dim",)  # the fields of Config that must be at least 1
    rotary = "head_dim"  # the one that RoPE rotates
    can_norm = True  # does it take qk_norm?

    def __init__(self, cfg: Config, layer: int = 0):
        super().__init__()
        self.cfg, self.layer, self.n_head = cfg, layer, cfg.heads
        self.build(cfg)
        init_weights(self, cfg, layer)

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        wanted = "build counts query to_cache qk_circuit vo_circuit".split()
        lacks = ", ".join(f"{name}()" for name in wanted if not hasattr(cls, name))
        if lacks:
            raise TypeError(f"{cls.__name__} is an Attention without {lacks}: write it")

    @classmethod
    def check(cls, cfg: Config) -> None:
        """ValueError if the fields of Config that this attention uses cannot make one."""
        require_least(cfg, 1, *cls.uses)
        if cfg.pos == "rope" and cls.rotary:
            width = cfg.latent if cls.rotary == "latent_dim" else getattr(cfg, cls.rotary)
            what = f"since pos='rope' rotates pairs, not {width}"
            require(width % 2 == 0, f"{cls.rotary} must be even, {what}")
            rotated = cls.rotated_width(cfg, width)
            what = f"rope_fraction {cfg.rope_fraction} of {cls.rotary} {width} must be even, not"
            require(rotated % 2 == 0 and rotated > 0, f"{what} {rotated:g}")
        require(not cfg.qk_norm or cls.can_norm, f"qk_norm is not for {cfg.attn}")

    @classmethod
    def default_heads(cls, cfg: Config) -> int:
        """What n_head = 0 means."""
        return cfg.dim // max(cfg.head_dim, 1)

    def visible(self, query: Tensor, key: Tensor) -> Tensor:
        """May the query at position i see the key at j? (T, 1) and (S,) -> (T, S), bool."""
        return key <= query

    # Positions, in both formulations

    @staticmethod
    def rotated_width(cfg: Config, width: int) -> float:
        """How many of a query's `width` dimensions RoPE rotates: the last."""
        return cfg.rope_fraction * width

    def rotate(self, x: Tensor, pos: Tensor) -> Tensor:
        """x (..., T, w) at positions pos (T,), where the attention has rotary positions."""
        if self.cfg.pos != "rope":
            return x
        plain = x.shape[-1] - int(self.rotated_width(self.cfg, x.shape[-1]))
        if plain == 0:
            return rotate(x, pos, self.cfg.rope_base)
        rotated = rotate(x[..., plain:], pos, self.cfg.rope_base)  # (..., T, w - plain)
        return torch.cat((x[..., :plain], rotated), dim=-1)  # (..., T, w)

    def positions(self, cached: Tensor) -> Tensor:
        """Of what the cache holds, (B, heads, S, width): (S,)."""
        return torch.arange(cached.shape[2], device=cached.device)

    def rotation(self, offset: int, like: Tensor, width: int) -> Tensor:
        """R_offset as a (width, width) matrix: rotate(x, i) = x R_i. Without rope the identity."""
        eye = torch.eye(width, dtype=like.dtype, device=like.device)
        return self.rotate(eye, torch.full((width,), offset, device=like.device))

    # Inference formulation

    def forward(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
        """(B, T, H) -> (B, T, H). With a cache, x is what follows its first `length` tokens."""
        start = 0 if cache is None else cache.length
        pos = torch.arange(start, start + x.shape[1], device=x.device)  # (T,)
        q = self.query(x, pos)  # (B, n, T, w)
        cached = self.to_cache(x, pos)  # each (B, heads, T, width)
        if cache is not None:
            cached = cache.append(self, cached)  # each (B, heads, S, width)
        k, v = self.from_cache(*cached)  # (B, g, S, w), (B, g, S, w_v)
        y = self.attend(q, k, v, pos)  # (B, T, n, w_v)
        return self.output(y, pos)  # (B, T, H)

    def from_cache(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values, from what was cached: the same two where they are cached themselves."""
        return k, v

    def output(self, y: Tensor, pos: Tensor) -> Tensor:
        """sum_c y_c O_c^T: (B, T, n, w_v) -> (B, T, H)."""
        return self.o(y.flatten(2))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, pos: Tensor) -> Tensor:
        """softmax(scale * q k^T + mask) v; g key/value heads serve n queries at positions pos (T,).

        q (B, n, T, w), k (B, g, S, w), v (B, g, S, w_v) -> (B, T, n, w_v).
        """
        mask = self.mask(q, k.shape[2], pos)
        causal = mask is None and q.shape[2] > 1
        dropout = self.cfg.dropout if self.training else 0.0
        if q.device.type not in ("cpu", "cuda"):
            # enable_gqa may be missing; Apple misreads strided tensors (PyTorch 163597, 181133).
            k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
            q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        how = dict(scale=self.scale, enable_gqa=k.shape[1] != q.shape[1])
        y = F.scaled_dot_product_attention(q, k, v, mask, dropout, causal, **how)
        return y.transpose(1, 2)  # (B, T, n, w_v)

    def mask(self, q: Tensor, S: int, pos: Tensor) -> Tensor | None:
        """Which scores count, (T, S), or with ALiBi what is added to them, (1, n, T, S).

        None where SDPA's own is_causal does: it is aligned top left, so right only from an empty
        cache; and a single query sees all there is.
        """
        windowed = type(self).visible is not Attention.visible
        if self.cfg.pos != "alibi" and not windowed and q.shape[2] in (1, S):
            return None
        key = torch.arange(S, device=q.device)  # (S,)
        seen = self.visible(pos[:, None], key)  # (T, S)
        if self.cfg.pos != "alibi":
            return seen
        bias = alibi(self.n_head, pos, key, torch.promote_types(q.dtype, torch.float32))
        return bias.masked_fill(~seen, -math.inf).to(q.dtype)[None]  # (1, n, T, S)

    # Factorization formulation

    def factorization(self, x: Tensor) -> Tensor:
        """Eq. 1 as it stands, position by position: (B, T, H) -> (B, T, H). Slow."""
        T = x.shape[1]
        pos = torch.arange(T, device=x.device)  # (T,)
        W = functools.cache(self.qk_circuit)  # distance -> (n, H, H)
        out = torch.zeros_like(x)
        for i in range(T):
            seen = [j for j in range(T) if self.visible(pos[i], pos[j])]
            scores = [torch.einsum("bh,chk,bk->bc", x[:, i], W(i - j), x[:, j]) for j in seen]
            scores = self.scale * torch.stack(scores, dim=-1)  # (B, n, seen)
            if self.cfg.pos == "alibi":
                scores = scores + alibi(self.n_head, pos[i : i + 1], pos[seen], x.dtype)[:, 0]
            weights = scores.softmax(dim=-1).unbind(dim=-1)  # each (B, n)
            for p, j in zip(weights, seen, strict=True):
                out[:, i] += torch.einsum("bc,bh,chk->bk", p, x[:, j], self.vo_circuit(i, j))
        return out

    def o_heads(self) -> Tensor:
        """O_c^T: (n, w_v, H)."""
        return self.o.weight.mT.unflatten(0, (self.n_head, -1))

    def check_bilinear(self) -> None:
        normed = any(isinstance(module, nn.RMSNorm) for module in self.modules())
        what = "latent_norm or qk_norm puts a norm between the factors: no longer bilinear"
        require(not normed, f"{what}, so there is no W_c")


class FPBA(Attention):
    """Fully Parameterized Bilinear Attention (Section 2.1): a full W_c and U_c for each channel."""

    uses, rotary, can_norm = (), "dim", False

    @classmethod
    def check(cls, cfg):
        super().check(cfg)
        n, H = cfg.heads, cfg.dim
        require(n == H, f"fpba has one head per channel: n_head must be 0 or {H}, not {n}")

    @classmethod
    def default_heads(cls, cfg):
        return cfg.dim

    def build(self, cfg):
        H = cfg.dim
        size = 2 * H**3 * cfg.n_layer * torch.get_default_dtype().itemsize  # bytes
        what = f"fpba at dim {H} and n_layer {cfg.n_layer} takes {size / 1e9:,.0f} GB"
        fits = size < 16e9 or torch.get_default_device().type == "meta"
        require(fits, f"{what}: make dim smaller")
        self.W = nn.Parameter(torch.empty(H, H, H))  # W_c
        self.U = nn.Parameter(torch.empty(H, H, H))  # U_c
        self.scale = H**-0.5
        self.cache_shapes = [(H, H), (H, H)]

    @staticmethod
    def counts(cfg):
        H = cfg.dim
        return Counts(2 * H**2, 2 * H**3, heads=H, rank=H, shared_dim=H, total_rank=H**2)

    def query(self, x, pos):
        return self.rotate(x, pos)[:, None].expand(-1, self.n_head, -1, -1)  # (B, H, T, H)

    def to_cache(self, x, pos):
        k = torch.einsum("btk,chk->bcth", x, self.W)  # W_c x_j^T: (B, H, T, H)
        v = torch.einsum("bth,chk->bctk", x, self.U)  # x_j U_c: (B, H, T, H)
        return self.rotate(k, pos), v

    def output(self, y, pos):
        return y.sum(2)  # (B, T, H)

    def qk_circuit(self, offset: int = 0) -> Tensor:
        return self.rotation(offset, self.W, self.cfg.dim) @ self.W  # (H, H, H)

    def vo_circuit(self, query: int = 0, key: int = 0) -> Tensor:
        return self.U  # (H, H, H)


class MHA(Attention):
    """Multi-Head Attention (Eqs. 2-3): W_c = Q_c K_c^T, U_c = V_c O_c^T."""

    @staticmethod
    def kv_heads(cfg: Config) -> int:
        """g, the key/value heads."""
        return cfg.heads

    def build(self, cfg):
        H, n, d = cfg.dim, cfg.heads, cfg.head_dim
        self.g = g = self.kv_heads(cfg)
        self.q = linear(H, n * d)
        self.k = linear(H, g * d)
        self.v = linear(H, g * d)
        self.o = linear(n * d, H)
        self.query_norm = rms_norm(d, cfg, cfg.qk_norm)
        self.key_norm = rms_norm(d, cfg, cfg.qk_norm)
        self.scale = d**-0.5
        self.cache_shapes = [(g, d), (g, d)]

    @classmethod
    def counts(cls, cfg):
        H, n, g, d = cfg.dim, cfg.heads, cls.kv_heads(cfg), cfg.head_dim
        rank, norms = min(d, H), 2 * d * cfg.qk_norm
        return Counts(2 * g * d, 2 * H * (n + g) * d + norms, n, rank, min(g * d, H), n * rank)

    def query(self, x, pos):
        q = self.query_norm(split_heads(self.q(x), self.n_head))  # (B, n, T, d)
        return self.rotate(q, pos)

    def to_cache(self, x, pos):
        k = self.rotate(self.key_norm(split_heads(self.k(x), self.g)), pos)  # (B, g, T, d)
        v = split_heads(self.v(x), self.g)  # (B, g, T, d)
        return k, v

    def qk_circuit(self, offset: int = 0) -> Tensor:
        self.check_bilinear()
        Q = per_head(self.q.weight, self.n_head)  # (n, H, d)
        K = per_head(self.k.weight, self.g).repeat_interleave(self.n_head // self.g, dim=0)
        return Q @ self.rotation(offset, Q, self.cfg.head_dim) @ K.mT  # (n, H, H)

    def vo_circuit(self, query: int = 0, key: int = 0) -> Tensor:
        V = per_head(self.v.weight, self.g).repeat_interleave(self.n_head // self.g, dim=0)
        return V @ self.o_heads()  # (n, H, H)


class GQA(MHA):
    """Grouped-Query Attention: n heads share g keys and values, in groups of n/g neighbours."""

    uses = ("head_dim", "n_kv_head")

    @classmethod
    def check(cls, cfg):
        super().check(cfg)
        n, g = cfg.heads, cfg.n_kv_head
        require(n % g == 0, f"n_head {n} must be a multiple of n_kv_head {g}")

    @staticmethod
    def kv_heads(cfg):
        return cfg.n_kv_head


class MQA(MHA):
    """Multi-Query Attention: all heads share one key and one value."""

    @staticmethod
    def kv_heads(cfg):
        return 1


class MLA(Attention):
    """Multi-head Latent Attention (Eqs. 4-5): W_c = S_q Q_c K_c^T S_k^T, U_c = S_v V_c O_c^T.

    The latents are cached. R_(i-j) would stand between Q_c and K_c^T, and K_c could no longer be
    absorbed into the query (support/decode.py does that); so under rope the position goes through
    d_r further dimensions, S_q Q'_c R_(i-j) K_r^T (q_rope and k_rope), with one rotary key K_r for
    all heads. joint_kv: one latent S_kv for keys and values. compress_query=False: Q_c and Q'_c are
    straight from x.
    """

    rotary, can_norm = "rope_dim", False

    @staticmethod
    def rotated_width(cfg, width):
        return width  # d_r of its own

    @classmethod
    def check(cls, cfg):
        if cfg.pos == "rope":
            require_least(cfg, 1, "rope_dim")
        super().check(cfg)
        what = "latent_norm of mla needs joint_kv: it has no place on separate latents"
        require(cfg.joint_kv or not cfg.latent_norm, what)

    def build(self, cfg):
        H, m, d, C = cfg.dim, cfg.heads, cfg.head_dim, cfg.latent
        r = cfg.query_rank if cfg.compress_query else H
        self.rope_dim = d_r = cfg.rope_dim if cfg.pos == "rope" else 0
        self.s_q = linear(H, r) if cfg.compress_query else nn.Identity()
        self.q_norm = rms_norm(r, cfg, cfg.latent_norm and cfg.compress_query)  # of x S_q
        self.q = linear(r, m * d)
        self.k = linear(C, m * d)
        self.v = linear(C, m * d)
        self.o = linear(m * d, H)
        if cfg.joint_kv:
            self.s_kv = linear(H, C)
        else:
            self.s_k = linear(H, C)
            self.s_v = linear(H, C)
        self.kv_norm = rms_norm(C, cfg, cfg.latent_norm)
        self.cache_shapes = [(1, C)] * len(self.latents)
        if d_r:
            self.q_rope = linear(r, m * d_r)
            self.k_rope = linear(H, d_r)
            self.cache_shapes.append((1, d_r))
        self.scale = (d + d_r) ** -0.5

    @property
    def latents(self) -> list[nn.Linear]:
        """S_k and S_v, or S_kv alone."""
        return [self.s_kv] if self.cfg.joint_kv else [self.s_k, self.s_v]

    @staticmethod
    def counts(cfg):
        H, m, d, C = cfg.dim, cfg.heads, cfg.head_dim, cfg.latent
        n_latent = 1 if cfg.joint_kv else 2
        d_r = cfg.rope_dim if cfg.pos == "rope" else 0
        r = cfg.query_rank if cfg.compress_query else H
        params = H * (n_latent * C + d_r + m * d) + 2 * C * m * d + r * m * (d + d_r)
        params += cfg.compress_query * H * r
        params += cfg.latent_norm * (C + cfg.compress_query * r)
        rank = min(d, C, r, H)
        return Counts(n_latent * C + d_r, params, m, rank, min(C, H, m * rank), m * rank)

    def query(self, x, pos):
        c_q = self.q_norm(self.s_q(x))  # (B, T, r)
        q = split_heads(self.q(c_q), self.n_head)  # (B, m, T, d)
        if not self.rope_dim:
            return q
        q_rope = self.rotate(split_heads(self.q_rope(c_q), self.n_head), pos)  # (B, m, T, d_r)
        return torch.cat((q, q_rope), dim=-1)  # (B, m, T, d + d_r)

    def to_cache(self, x, pos):
        cached = [self.kv_norm(latent(x)) for latent in self.latents]  # each (B, T, C)
        if self.rope_dim:
            cached.append(self.rotate(self.k_rope(x), pos))  # (B, T, d_r)
        return tuple(c[:, None] for c in cached)  # each (B, 1, T, C or d_r)

    def from_cache(self, *cached):
        c_k, c_v = cached[0], cached[len(self.latents) - 1]  # (B, 1, S, C) twice
        k = split_heads(self.k(c_k[:, 0]), self.n_head)  # (B, m, S, d)
        v = split_heads(self.v(c_v[:, 0]), self.n_head)  # (B, m, S, d)
        if self.rope_dim:
            k_rope = cached[-1].expand(-1, self.n_head, -1, -1)  # (B, m, S, d_r)
            k = torch.cat((k, k_rope), dim=-1)  # (B, m, S, d + d_r)
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
        V = self.latents[-1].weight.mT @ per_head(self.v.weight, self.n_head)  # S_v V_c: (m, H, d)
        return V @ self.o_heads()  # (m, H, H)


class MFA(Attention):
    """Multi-matrix Factorization Attention (Eqs. 6-7): W_c = S_q Q_c S_k^T, U_c = S_v O_c^T.

    One key head and one value head, C wide. Under rope W_c = S_q Q_c R_(i-j) S_k^T: the rotation
    falls between two factors and costs nothing. Step-3's is this with latent_norm and q_rank = 8 C.
    Paper: O_c is printed (C, C); Table 1's parameters, and the product with x_j S_v, need (H, C).
    Scores are printed over sqrt(d); the key is C wide, so sqrt(C). n heads there are Table 1's m.
    """

    uses, rotary = ("mfa_n_head",), "latent_dim"

    @classmethod
    def default_heads(cls, cfg):
        return cfg.mfa_n_head

    def build(self, cfg):
        H, m, C, r = cfg.dim, cfg.heads, cfg.latent, cfg.query_rank
        self.s_q = linear(H, r)
        self.s_k = linear(H, C)
        self.q_norm = rms_norm(r, cfg, cfg.latent_norm)  # of x S_q
        self.q = linear(r, m * C)
        self.o = linear(m * C, H)
        self.query_norm = rms_norm(C, cfg, cfg.qk_norm)  # of each head
        self.key_norm = rms_norm(C, cfg, cfg.qk_norm)
        self.scale = C**-0.5
        self.build_value(cfg)

    def build_value(self, cfg: Config) -> None:
        self.s_v = linear(cfg.dim, cfg.latent)
        self.cache_shapes = [(1, cfg.latent), (1, cfg.latent)]

    @staticmethod
    def counts(cfg):
        H, m, C, r = cfg.dim, cfg.heads, cfg.latent, cfg.query_rank
        params = H * (2 * C + r + m * C) + r * m * C + r * cfg.latent_norm + 2 * C * cfg.qk_norm
        rank = min(C, r, H)
        return Counts(2 * C, params, m, rank, min(C, H, m * rank), m * rank)

    def query(self, x, pos):
        c_q = self.q_norm(self.s_q(x))  # (B, T, r)
        q = self.query_norm(split_heads(self.q(c_q), self.n_head))  # (B, m, T, C)
        return self.rotate(q, pos)

    def to_cache(self, x, pos):
        k = self.rotate(self.key_norm(self.s_k(x))[:, None], pos)  # (B, 1, T, C)
        v = self.s_v(x)[:, None]  # (B, 1, T, C)
        return k, v

    def qk_circuit(self, offset: int = 0) -> Tensor:
        self.check_bilinear()
        Q = per_head(self.q.weight, self.n_head)  # (m, r, C)
        R = self.rotation(offset, Q, self.cfg.latent)  # (C, C)
        return self.s_q.weight.mT @ Q @ R @ self.s_k.weight  # (m, H, H)

    def vo_circuit(self, query: int = 0, key: int = 0) -> Tensor:
        return self.s_v.weight.mT @ self.o_heads()  # (m, H, H)


class MFAKR(MFA):
    """MFA-Key-Reuse (Eqs. 8-9): the cached key serves as the value, v_j = k_j + alpha * (k_j N^T).

    As a matrix, v_j = k_j M with M = I + N^T diag(alpha) for key_reuse "gated"; Table 4's steps to
    it are I ("vanilla"), N^T ("proj") and I + N^T ("residual"). M stands between the softmax and
    O_c, so no cached key needs it. DeepSeek-V4's core is "vanilla" and "inverse" with
    rope_fraction, q_rank, qk_norm, latent_norm.
    Paper: Eq. 8's N S_k does not conform; Eq. 9 does, with the gate on N's output. Whether the key
    is reused before or after its rotation is not said; key_reuse_rope is one of

        pre      cache unrotated keys, rotate on every read            U_c = S_k M O_c^T
        post     cache rotated keys, which are the values              U_c = S_k R_j M O_c^T
        inverse  likewise, and rotate each output back by R_i^-1       U_c = S_k R_j R_i^-1 M O_c^T
    """

    @classmethod
    def check(cls, cfg):
        super().check(cfg)
        require_choice(cfg, "key_reuse", ("gated", "vanilla", "proj", "residual"))
        require_choice(cfg, "key_reuse_rope", ("pre", "post", "inverse"))

    def build_value(self, cfg):
        C = cfg.latent
        if cfg.key_reuse != "vanilla":
            self.n = linear(C, C)
        if cfg.key_reuse == "gated":
            self.alpha = nn.Parameter(torch.empty(C))
        self.cache_shapes = [(1, C)]
        self.key_reuse_rope = cfg.key_reuse_rope if cfg.pos == "rope" else "pre"  # all alike

    @staticmethod
    def counts(cfg):
        C, mfa = cfg.latent, MFA.counts(cfg)
        M = {"vanilla": 0, "proj": C * C, "residual": C * C, "gated": C * C + C}[cfg.key_reuse]
        return mfa._replace(kv_cache=C, params=mfa.params - cfg.dim * C + M)

    def to_cache(self, x, pos):
        k = self.key_norm(self.s_k(x))[:, None]  # (B, 1, T, C)
        return (k if self.key_reuse_rope == "pre" else self.rotate(k, pos),)

    def from_cache(self, k):
        v = k  # (B, 1, S, C)
        if self.key_reuse_rope == "pre":
            k = self.rotate(k, self.positions(k))
        return k, v  # (B, 1, S, C) twice

    def output(self, y, pos):
        """(y M) O_c^T = y (M O_c^T): M multiplies what has fewer rows, B T tokens or O_c's H."""
        if self.key_reuse_rope == "inverse":
            y = self.rotate(y, -pos[:, None])  # (B, T, m, C)
        B, T, m, C = y.shape
        if B * T <= self.cfg.dim:  # few tokens, as in decoding
            return super().output(self.times_M(y), pos)  # (B, T, H)
        O = self.times_M(self.o.weight.unflatten(1, (m, C)), transposed=True)  # (H, m, C)
        return F.linear(y.flatten(2), O.flatten(1))  # (B, T, H)

    def times_M(self, x: Tensor, transposed: bool = False) -> Tensor:
        """x M, or x M^T with M^T = I + diag(alpha) N: (..., C) -> (..., C). The identity stays out
        of the product, where autocast would round a small gate away.
        """
        if self.cfg.key_reuse == "vanilla":
            return x
        alpha = self.alpha if self.cfg.key_reuse == "gated" else 1
        change = (x * alpha) @ self.n.weight if transposed else alpha * self.n(x)
        return change if self.cfg.key_reuse == "proj" else x + change

    def vo_circuit(self, query: int = 0, key: int = 0) -> Tensor:
        require(not self.cfg.qk_norm, "qk_norm is in the value, too, so there is no U_c")
        S_k = self.s_k.weight.mT  # (H, C)
        offset = {"pre": 0, "post": key, "inverse": key - query}[self.key_reuse_rope]
        R = self.rotation(offset, S_k, self.cfg.latent)  # (C, C)
        M = self.times_M(torch.eye(self.cfg.latent).to(S_k))  # (C, C)
        return S_k @ R @ M @ self.o_heads()  # (m, H, H)


ATTENTION.update(fpba=FPBA, mha=MHA, mqa=MQA, gqa=GQA, mla=MLA, mfa=MFA, mfa_kr=MFAKR)

# --------------------------------------------------------------------------------------------------
# The model around it (Section 4.1): pre-norm RMSNorm, SwiGLU, no biases


class SwiGLU(nn.Module):
    """W_2 (silu(W_1 x) * W_3 x) (Shazeer 2020): (..., H) -> (..., H)."""

    def __init__(self, dim: int, width: int):
        super().__init__()
        self.w1 = linear(dim, width)
        self.w3 = linear(dim, width)
        self.w2 = linear(width, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class MoE(nn.Module):
    """DeepSeekMoE's layer: the shared expert, and the top-k routed ones, weighted by softmax.

    After a forward pass `load` (E,) holds the share of the visits that each expert got, and
    `balance` the expert-level loss E * sum_i load_i * (mean router probability of i): 1 if even.
    """

    def __init__(self, cfg: Config):
        super().__init__()
        self.k, self.load, self.balance = cfg.n_expert_active, None, None
        self.router = linear(cfg.dim, cfg.n_expert)
        experts = (SwiGLU(cfg.dim, cfg.moe_ffn_dim) for _ in range(cfg.n_expert))
        self.experts = nn.ModuleList(experts)
        self.shared = SwiGLU(cfg.dim, cfg.shared_ffn_dim) if cfg.shared_ffn_dim else None

    def forward(self, x: Tensor) -> Tensor:
        flat, E = x.flatten(0, -2), len(self.experts)  # (B*T, H)
        prob = at_least_float32(self.router(flat)).softmax(dim=-1)  # (B*T, E)
        weight, visited = prob.topk(self.k, dim=-1)  # (B*T, k), not renormalised
        y = torch.zeros_like(flat) if self.shared is None else self.shared(flat)  # (B*T, H)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(visited == e)  # (visits,) twice
            out = expert(flat[token]) * weight[token, slot, None]  # (visits, H)
            y = y.index_add(0, token, out.to(y.dtype))
        self.load = torch.bincount(visited.flatten(), minlength=E) / visited.numel()  # (E,)
        self.balance = E * (self.load * prob.mean(0)).sum()
        return y.view_as(x)


class Block(nn.Module):
    """x + attention, then x + FFN, each of an RMSNorm of x. The first block's FFN is never MoE."""

    def __init__(self, cfg: Config, layer: int):
        super().__init__()
        self.attn_norm = rms_norm(cfg.dim, cfg)
        self.attn = ATTENTION[cfg.attn](cfg, layer)
        self.ffn_norm = rms_norm(cfg.dim, cfg)
        self.ffn = MoE(cfg) if cfg.n_expert and layer > 0 else SwiGLU(cfg.dim, cfg.ffn)
        init_weights(self.ffn, cfg, layer)
        self.drop = nn.Dropout(cfg.dropout)

    def forward(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
        x = x + self.drop(self.attn(self.attn_norm(x), cache))  # (B, T, H)
        return x + self.drop(self.ffn(self.ffn_norm(x)))  # (B, T, H)


# --------------------------------------------------------------------------------------------------
# The language model


def check_ids(idx: Tensor, vocab_size: int) -> None:
    low, high = idx.min().item(), idx.max().item()
    wrong = low if low < 0 else high
    what = f"token ids must be 0 to {vocab_size - 1} (vocab_size), not {wrong}"
    require(0 <= wrong < vocab_size, what)


def check_sampling(n: int, temperature: float, top_k: int | None, top_p: float | None) -> None:
    what = f"temperature must be 0 (greedy) or positive, not {temperature}"
    require(0 <= temperature < math.inf, what)
    require(top_k is None or top_k >= 1, f"top_k must be at least 1, not {top_k}")
    require(top_p is None or 0 < top_p <= 1, f"top_p must be in (0, 1], not {top_p}")
    require(n >= 0, f"max_new_tokens must not be negative, not {n}")


def draw(logits: Tensor, temperature=1.0, top_k=None, top_p=None, generator=None) -> Tensor:
    """One id for each row of logits, from softmax(logits / temperature): (B, V) -> (B, 1).

    V is vocab_size. top_k keeps the likeliest so many; of these, top_p keeps the fewest whose
    probability reaches it. Temperature 0 takes the likeliest.
    """
    logits = at_least_float32(logits)  # (B, V)
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    if top_k is not None and top_k < logits.shape[-1]:
        values, ids = logits.topk(top_k)  # (B, top_k) twice
        logits = torch.full_like(logits, -math.inf).scatter_(-1, ids, values)
    if top_p is not None and top_p < 1:
        p, order = (logits / max(temperature, 1e-30)).softmax(dim=-1).sort(dim=-1, descending=True)
        enough = p.cumsum(dim=-1) - p >= max(top_p, 1e-30)  # (B, V), reached before this one
        logits = logits.masked_fill(enough.scatter(-1, order, enough), -math.inf)
    return exponential_race(logits, temperature, generator)


def exponential_race(logits: Tensor, temperature: float, generator) -> Tensor:
    """Index i with probability softmax_i(logits / temperature): (B, V) -> (B, 1).

    The least of exponential times, each over exp(logit_i / temperature), is at i that often.
    torch.multinomial, which draws the same, would make the host wait for a GPU.
    """
    time = torch.empty_like(logits).exponential_(generator=generator).clamp_(min=1e-30)  # (B, V)
    return logits.sub(time.log_(), alpha=temperature).argmax(dim=-1, keepdim=True)


@contextlib.contextmanager
def evaluating(model: nn.Module):
    """The model without dropout; afterwards in the mode it was in before."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


class GPT(nn.Module):
    """A decoder-only language model around any of the attentions."""

    def __init__(self, cfg: Config):
        super().__init__()
        require(cfg.vocab_size >= 1, "vocab_size must be at least 1 to build a model")
        self.cfg = cfg
        self.blocks = nn.ModuleList(Block(cfg, layer) for layer in range(cfg.n_layer))
        self.embed = nn.Embedding(cfg.vocab_size, cfg.dim)
        self.drop = nn.Dropout(cfg.dropout)
        self.norm = rms_norm(cfg.dim, cfg)
        self.head = linear(cfg.dim, cfg.vocab_size)
        for table in (self.head, self.embed):  # 0.02 at every width, unlike what lies between
            nn.init.trunc_normal_(table.weight, std=0.02, a=-0.06, b=0.06)
        if cfg.tied:
            self.head.weight = self.embed.weight

    def forward(self, idx: Tensor, targets: Tensor | None = None, cache: KVCache | None = None):
        """Logits (B, T, vocab_size) of token ids idx (B, T), and the loss, or None without targets.

        The loss is the mean cross-entropy in nats over the targets (B, T) other than -1, at t the
        token that follows idx[:, t]; in training, MoE's balance loss is added. Raises ValueError
        for ids outside the vocabulary (not on a GPU, which would have to wait), more than
        block_size tokens, and a cache that is full.
        """
        logits = self.head(self.hidden(idx, cache))  # (B, T, vocab_size)
        if targets is None:
            return logits, None
        flat = at_least_float32(logits.flatten(0, 1))  # (B*T, vocab_size)
        loss = F.cross_entropy(flat, targets.flatten(), ignore_index=-1)
        if self.training and self.cfg.n_expert:
            balance = sum(b.ffn.balance for b in self.blocks if isinstance(b.ffn, MoE))
            loss = loss + self.cfg.balance_coef * balance
        return logits, loss

    def hidden(self, idx: Tensor, cache: KVCache | None = None) -> Tensor:
        """The normed residual before the head: (B, T) -> (B, T, H). Advances the cache by T."""
        end = idx.shape[1] + (0 if cache is None else cache.length)
        limit = self.cfg.block_size
        require(1 <= end <= limit, f"the model takes 1 to {limit} tokens (block_size), not {end}")
        if idx.device.type == "cpu" and not torch.compiler.is_compiling():
            check_ids(idx, self.cfg.vocab_size)
        x = self.drop(self.embed(idx))  # (B, T, H)
        for block in self.blocks:
            x = block(x, cache)
        if cache is not None:
            cache.length = end
        return self.norm(x)

    def next_logits(self, new: Tensor, cache: KVCache | None) -> Tensor:
        """Logits of what follows new (B, T), itself behind the cache's tokens: (B, vocab_size)."""
        return self.head(self.hidden(new, cache)[:, -1])

    @torch.no_grad()
    def generate(self, idx: Tensor, max_new_tokens: int, temperature: float = 1.0,
                 top_k: int | None = None, top_p: float | None = None, use_cache: bool = True,
                 generator: torch.Generator | None = None) -> Tensor:  # fmt: skip
        """The prompt idx (B, T) and what is drawn after it: (B, T + max_new_tokens).

        When the context has reached block_size it starts anew from its last block_size / 2 tokens.
        use_cache changes the speed alone. See draw for temperature, top_k and top_p; ValueError if
        one of them, or the prompt, cannot be used. sample.py streams, stops, and decodes faster.
        """
        limit, T = self.cfg.block_size, idx.shape[1]
        check_sampling(max_new_tokens, temperature, top_k, top_p)
        require(1 <= T <= limit, f"the prompt must have 1 to {limit} tokens (block_size), not {T}")
        check_ids(idx, self.cfg.vocab_size)
        cache = KVCache(self, len(idx), min(limit, T + max_new_tokens)) if use_cache else None
        start = 0  # of the context: the model looks at idx[:, start:]
        with evaluating(self):
            for _ in range(max_new_tokens):
                if idx.shape[1] - start > limit:
                    start = idx.shape[1] - max(limit // 2, 1)
                    if use_cache:
                        cache.length = 0
                new = idx[:, start + (cache.length if use_cache else 0) :]
                logits = self.next_logits(new, cache)  # (B, vocab_size)
                drawn = draw(logits, temperature, top_k, top_p, generator)  # (B, 1)
                idx = torch.cat((idx, drawn), dim=1)  # (B, T + 1), then T + 2 ...
        return idx
