"""The four hybrid attentions of Table 6: one side of MHA, its keys or its values, replaced by MLA's or by MFA's.

    key side                                               value side
    multi         W_c = Q_c K_c^T              n d         U_c = V_c O_c^T            n d      elements kept per token
    compressed    W_c = Q_c K_c^T S_k^T    C + d_r         U_c = S_v V_c O_c^T          C      as in MLA
    single        W_c = Q_c K^T                  d         U_c = V O_c^T                d      as in MFA

Table 6 pairs each of the two designs with the multi-head form of the other side. The paper does not say whether the
queries are compressed; here they come straight from x, as in MHA. Then a compressed key costs 60M more parameters than
a single key, as Table 6 has it (1.12B and 1.06B); with a query latent as wide as the key's it would be 24M.
A compressed key needs MLA's rotary dimensions under rope; the others rotate as MHA does.
"""

from torch import Tensor, cat

from mfa import GPT, Attention, Config, Counts, linear, per_head, split


class Hybrid(Attention):
    """Attention with a `key` and a `value` side of its own kind. Config(attn="mla") names all the widths it needs."""

    key = value = "multi"

    def build(self, cfg: Config) -> None:
        H, n, d, C = cfg.dim, cfg.heads, cfg.head_dim, cfg.latent
        self.rope_dim = d_r = cfg.rope_dim if self.key == "compressed" and cfg.pos == "rope" else 0
        if cfg.pos == "rope" and not d_r and d % 2:
            raise ValueError(f"head_dim must be even, since pos='rope' rotates pairs, not {d}")
        self.q, self.o = linear(H, n * d), linear(n * d, H)
        heads, n_in = {"multi": n, "single": 1, "compressed": n}, {"multi": H, "single": H, "compressed": C}
        self.k, self.v = (linear(n_in[side], heads[side] * d) for side in (self.key, self.value))
        if self.key == "compressed":
            self.s_k = linear(H, C)
        if self.value == "compressed":
            self.s_v = linear(H, C)
        if d_r:
            self.q_rope, self.k_rope = linear(H, n * d_r), linear(H, d_r)
        shape = {"multi": (n, d), "single": (1, d), "compressed": (1, C)}
        self.kept_keys, self.kept_values = [shape[self.key]] + [(1, d_r)] * (d_r > 0), [shape[self.value]]
        self.kept = self.kept_keys + self.kept_values
        self.scale = (d + d_r) ** -0.5

    @classmethod
    def counts(cls, cfg: Config) -> Counts:
        H, n, d, C = cfg.dim, cfg.heads, cfg.head_dim, cfg.latent
        d_r = cfg.rope_dim if cls.key == "compressed" and cfg.pos == "rope" else 0
        kept = {"multi": n * d, "single": d, "compressed": C}
        weights = {"multi": H * n * d, "single": H * d, "compressed": C * (H + n * d)}
        rank = min(d, H, C) if cls.key == "compressed" else min(d, H)
        params = 2 * H * n * d + weights[cls.key] + weights[cls.value] + d_r * (n + 1) * H
        shared = min(kept[cls.key], H, n * rank)
        return Counts(kept[cls.key] + d_r + kept[cls.value], params, n, rank, shared, n * rank)

    def query(self, x, pos):
        q = split(self.q(x), self.n_head)  # (B, n, T, d)
        if not self.rope_dim:
            return self.rotate(q, pos)
        return cat((q, self.rotate(split(self.q_rope(x), self.n_head), pos)), dim=-1)  # (B, n, T, d + d_r)

    def remember(self, x, pos):
        if self.key == "compressed":
            keys = [self.s_k(x)[:, None]]  # (B, 1, T, C)
        else:
            keys = [self.rotate(split(self.k(x), self.kept[0][0]), pos)]  # (B, n or 1, T, d)
        if self.rope_dim:
            keys.append(self.rotate(self.k_rope(x), pos)[:, None])  # (B, 1, T, d_r)
        return *keys, self.s_v(x)[:, None] if self.value == "compressed" else split(self.v(x), self.kept[-1][0])

    def recall(self, k, *others):
        v, n = others[-1], self.n_head
        if self.key == "compressed":
            k = split(self.k(k[:, 0]), n)  # (B, n, S, d)
        if self.rope_dim:
            k = cat((k, others[0].expand(-1, n, -1, -1)), dim=-1)  # (B, n, S, d + d_r)
        if self.value == "compressed":
            v = split(self.v(v[:, 0]), n)  # (B, n, S, d)
        # SDPA shares keys and values alike: where one side has a single head and the other n, repeat the single one
        return k.expand(-1, n, -1, -1), v.expand(-1, n, -1, -1)

    def qk_circuit(self, offset: int = 0) -> Tensor:
        n = self.n_head
        Q, K = per_head(self.q.weight, n), per_head(self.k.weight, 1 if self.key == "single" else n)  # (n or 1, ., d)
        if self.key != "compressed":
            return Q @ self.rotation(offset, Q, self.cfg.head_dim) @ K.mT  # (n, H, H)
        W = Q @ K.mT @ self.s_k.weight  # (n, H, H)
        if self.rope_dim:
            W = W + per_head(self.q_rope.weight, n) @ self.rotation(offset, Q, self.rope_dim) @ self.k_rope.weight
        return W

    def vo_circuit(self, query: int = 0, key: int = 0) -> Tensor:
        V = per_head(self.v.weight, 1 if self.value == "single" else self.n_head)  # (n or 1, H or C, d)
        return (self.s_v.weight.mT @ V if self.value == "compressed" else V) @ self.o_heads()  # (n, H, H)


class CompressedKey(Hybrid):
    key = "compressed"


class SingleKey(Hybrid):
    key = "single"


class CompressedValue(Hybrid):
    value = "compressed"


class SingleValue(Hybrid):
    value = "single"


HYBRIDS = dict(compressed_key=CompressedKey, single_key=SingleKey, compressed_value=CompressedValue,
               single_value=SingleValue)  # fmt: skip


def hybrid_gpt(name: str, cfg: Config) -> GPT:
    """A GPT with a hybrid in every block; cfg is an mla Config, whose widths it takes. Trains and generates as any."""
    model = GPT(cfg)
    for layer, block in enumerate(model.blocks):
        block.attn = HYBRIDS[name](cfg, layer)
    return model
