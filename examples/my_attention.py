"""Two attentions of your own, without touching mfa.py:

    python train.py --plugin examples/my_attention.py --attn tied2
    python sample.py

A class says how its weights are made (build), what it caches and counts, how it computes
(query, to_cache, from_cache) and what it is (qk_circuit, vo_circuit: Eq. 1's W_c and U_c). The
last two are the definition: attn.factorization(x) must give what attn(x) gives.
"""

from mfa import ATTENTION, MQA, Attention, Counts, linear, per_head, require, split_heads


class TiedTwo(Attention):
    """Two cached heads, each its queries' key and value: W_c = Q_c K_g^T, U_c = K_g O_c^T."""

    @classmethod
    def check(cls, cfg):
        super().check(cfg)  # head_dim, and that it is even under rope
        require(cfg.heads % 2 == 0, f"tied2 needs an even n_head, not {cfg.heads}")

    def build(self, cfg):
        H, n, d = cfg.dim, cfg.heads, cfg.head_dim
        self.q, self.k, self.o = linear(H, n * d), linear(H, 2 * d), linear(n * d, H)
        self.scale, self.cache_shapes = d**-0.5, [(2, d)]

    @staticmethod
    def counts(cfg):
        H, n, d = cfg.dim, cfg.heads, cfg.head_dim
        rank = min(d, H)
        return Counts(2 * d, 2 * H * d * (n + 1), n, rank, min(2 * d, H), n * rank)

    def query(self, x, pos):
        return self.rotate(split_heads(self.q(x), self.n_head), pos)  # (B, n, T, d)

    def to_cache(self, x, pos):
        return (split_heads(self.k(x), 2),)  # (B, 2, T, d), not rotated: it is the value, too

    def from_cache(self, k):
        return self.rotate(k, self.positions(k)), k  # (B, 2, S, d) twice

    def keys(self):
        return per_head(self.k.weight, 2).repeat_interleave(self.n_head // 2, dim=0)  # (n, H, d)

    def qk_circuit(self, offset=0):
        Q = per_head(self.q.weight, self.n_head)  # (n, H, d)
        return Q @ self.rotation(offset, Q, self.cfg.head_dim) @ self.keys().mT  # (n, H, H)

    def vo_circuit(self, query=0, key=0):
        return self.keys() @ self.o_heads()  # (n, H, H)


class WindowMQA(MQA):
    """MQA that sees the last 32 tokens. The same mask serves both formulations."""

    def visible(self, query, key):
        return (key <= query) & (key > query - 32)


ATTENTION["tied2"] = TiedTwo
ATTENTION["window_mqa"] = WindowMQA
