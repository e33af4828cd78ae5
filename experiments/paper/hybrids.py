"""The four hybrids of Table 6: MHA with its keys or its values replaced by MLA's or MFA's.

    key side                           value side
    multi       Q_c K_c^T      n d     multi       V_c O_c^T       n d   elements per token
    compressed  Q_c K_c^T S_k^T        compressed  S_v V_c O_c^T   C     as in MLA
                           C + d_r
    single      Q_c K^T        d       single      V O_c^T         d     as in MFA

Table 6 pairs each of the two designs with the multi-head form of the other side. The paper does not
say whether the queries are compressed; here they come straight from x, as in MHA. Then a compressed
key costs 60M more parameters than a single key, as Table 6 has it (1.12B and 1.06B); with a query
latent as wide as the key's it would be 24M. A compressed key needs MLA's rotary dimensions under
rope; the others rotate as MHA does.
"""

import torch
from torch import Tensor, cat

from mfa import GPT, Attention, Config, Counts, KVCache, linear, per_head, require, split_heads


class Hybrid(Attention):
    """Attention with a `key` and a `value` side of its own kind, on the widths of an mla Config."""

    key = value = "multi"

    @classmethod
    def rotary_width(cls, cfg: Config) -> int:
        """d_r, of a compressed key under rope."""
        return cfg.rope_dim if cls.key == "compressed" and cfg.pos == "rope" else 0

    def build(self, cfg: Config) -> None:
        H, n, d, C = cfg.dim, cfg.heads, cfg.head_dim, cfg.latent
        self.rope_dim = d_r = self.rotary_width(cfg)
        whole_heads_rotate = cfg.pos == "rope" and not d_r
        what = f"since pos='rope' rotates pairs, not {d}"
        require(not whole_heads_rotate or d % 2 == 0, f"head_dim must be even, {what}")
        self.q = linear(H, n * d)
        self.o = linear(n * d, H)
        heads = {"multi": n, "single": 1, "compressed": n}
        n_in = {"multi": H, "single": H, "compressed": C}
        self.k = linear(n_in[self.key], heads[self.key] * d)
        self.v = linear(n_in[self.value], heads[self.value] * d)
        if self.key == "compressed":
            self.s_k = linear(H, C)
        if self.value == "compressed":
            self.s_v = linear(H, C)
        if d_r:
            self.q_rope = linear(H, n * d_r)
            self.k_rope = linear(H, d_r)
        shape = {"multi": (n, d), "single": (1, d), "compressed": (1, C)}
        self.key_shapes = [shape[self.key]] + [(1, d_r)] * (d_r > 0)
        self.value_shapes = [shape[self.value]]
        self.cache_shapes = self.key_shapes + self.value_shapes
        self.scale = (d + d_r) ** -0.5

    @classmethod
    def counts(cls, cfg: Config) -> Counts:
        H, n, d, C = cfg.dim, cfg.heads, cfg.head_dim, cfg.latent
        d_r = cls.rotary_width(cfg)
        width = {"multi": n * d, "single": d, "compressed": C}
        weights = {"multi": H * n * d, "single": H * d, "compressed": C * (H + n * d)}
        params = 2 * H * n * d + weights[cls.key] + weights[cls.value] + d_r * (n + 1) * H
        rank = min(d, H, C) if cls.key == "compressed" else min(d, H)
        shared = min(width[cls.key], H, n * rank)
        kv_cache = width[cls.key] + d_r + width[cls.value]
        return Counts(kv_cache, params, n, rank, shared, n * rank)

    def query(self, x, pos):
        q = split_heads(self.q(x), self.n_head)  # (B, n, T, d)
        if not self.rope_dim:
            return self.rotate(q, pos)
        rotary = self.rotate(split_heads(self.q_rope(x), self.n_head), pos)  # (B, n, T, d_r)
        return cat((q, rotary), dim=-1)  # (B, n, T, d + d_r)

    def to_cache(self, x, pos):
        if self.key == "compressed":
            cached = [self.s_k(x)[:, None]]  # (B, 1, T, C)
        else:
            n_key, _ = self.key_shapes[0]
            cached = [self.rotate(split_heads(self.k(x), n_key), pos)]  # (B, n or 1, T, d)
        if self.rope_dim:
            cached.append(self.rotate(self.k_rope(x), pos)[:, None])  # (B, 1, T, d_r)
        if self.value == "compressed":
            cached.append(self.s_v(x)[:, None])  # (B, 1, T, C)
        else:
            n_value, _ = self.value_shapes[0]
            cached.append(split_heads(self.v(x), n_value))  # (B, n or 1, T, d)
        return tuple(cached)

    def from_cache(self, k, *others):
        *rotary, v = others
        n = self.n_head
        if self.key == "compressed":
            k = split_heads(self.k(k[:, 0]), n)  # (B, n, S, d)
        if rotary:
            k = cat((k, rotary[0].expand(-1, n, -1, -1)), dim=-1)  # (B, n, S, d + d_r)
        if self.value == "compressed":
            v = split_heads(self.v(v[:, 0]), n)  # (B, n, S, d)
        # SDPA shares keys and values alike: where one side has a single head and the other n, the
        # single one is repeated.
        return k.expand(-1, n, -1, -1), v.expand(-1, n, -1, -1)

    def qk_circuit(self, offset: int = 0) -> Tensor:
        n = self.n_head
        Q = per_head(self.q.weight, n)  # (n, H, d)
        K = per_head(self.k.weight, 1 if self.key == "single" else n)  # (n or 1, H or C, d)
        if self.key != "compressed":
            return Q @ self.rotation(offset, Q, self.cfg.head_dim) @ K.mT  # (n, H, H)
        W = Q @ K.mT @ self.s_k.weight  # (n, H, H)
        if self.rope_dim:
            R = self.rotation(offset, Q, self.rope_dim)  # (d_r, d_r)
            W = W + per_head(self.q_rope.weight, n) @ R @ self.k_rope.weight
        return W

    def vo_circuit(self, query: int = 0, key: int = 0) -> Tensor:
        V = per_head(self.v.weight, 1 if self.value == "single" else self.n_head)
        if self.value == "compressed":
            V = self.s_v.weight.mT @ V
        return V @ self.o_heads()  # (n, H, H)


class CompressedKey(Hybrid):
    key = "compressed"


class SingleKey(Hybrid):
    key = "single"


class CompressedValue(Hybrid):
    value = "compressed"


class SingleValue(Hybrid):
    value = "single"


HYBRIDS = dict(
    compressed_key=CompressedKey, single_key=SingleKey, compressed_value=CompressedValue,
    single_value=SingleValue,
)  # fmt: skip


def hybrid_gpt(name: str, cfg: Config) -> GPT:
    """A GPT with a hybrid in every block; cfg is an mla Config, whose widths it takes."""
    model = GPT(cfg)
    for layer, block in enumerate(model.blocks):
        block.attn = HYBRIDS[name](cfg, layer)
    return model


def measured_cache_bytes(model: GPT) -> int:
    """Bytes of cache per token at 16 bit, of any model: measured on a cache made for it.

    mfa.cache_bytes counts the same from a Config; a hybrid has none of its own.
    """
    return KVCache(model, batch_size=1, capacity=1, dtype=torch.bfloat16).nbytes()
