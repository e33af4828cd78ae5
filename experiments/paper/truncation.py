"""Cutting an attention's keys and values to fewer numbers: the nearest where containment.py has
none that is equal.

Keys. What must come out right is a score, q_c k_c^T = x_i Q_c (x_j K_c)^T, so the keys of all heads
side by side, each times the root of its queries' second moments, are cut to the C directions that
carry most: K_c ~ S_k P_c, and P_c^T goes into the query. Values likewise: V_c, times the root of
O_c^T's Gram matrix, ~ S_v P_c, and P_c goes into O_c. Where both come from one latent (MLA joint,
MFA-KR), the error of a score counts as much as the size of what its head writes, since it moves
that much output about. x counts by its second moments over a text, or as if its entries were
independent where there is none.

Rotary positions are the hard part. The score of a pair of dimensions is Re(q conj(k) e^(i w D)) for
complex q and k, a frequency w and the distance D. A cut may mix the heads' pairs of one frequency,
by complex numbers, which commute with the rotation; it may not mix frequencies. So each frequency
that still turns keeps one pair, which all heads share, from a complex SVD. Everything else stops
turning: its e^(i w D) becomes the mean over the distances that a head looks at, near 1 for
frequencies that hardly turn there and near 0 for fast ones, whose scores are lost.
"""

import copy
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.paper.containment import filled, stack, stack_output
from mfa import (
    ATTENTION,
    GPT,
    GQA,
    MFA,
    MFAKR,
    MHA,
    MLA,
    MQA,
    Attention,
    Config,
    evaluating,
    per_head,
)

# --------------------------------------------------------------------------------------------------
# The cut


def roots(gram: Tensor) -> tuple[Tensor, Tensor]:
    """The root of a Gram matrix (..., w, w), and the root's inverse where it has one."""
    size, U = torch.linalg.eigh(gram)
    there = size > 1e-14 * size[..., -1:]
    size = size.clamp(min=0).sqrt()  # (..., w)
    inverse = torch.where(there, 1 / size, 0)
    return (U * size[..., None, :]) @ U.mH, (U * inverse[..., None, :]) @ U.mH


def low_rank(blocks: Tensor, grams: Tensor, X: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """S (H, rank) and P (n, rank, w) with blocks B_c ~ S P_c, (n, H, w), and the singular values.

    They minimise sum_c |X (B_c - S P_c) G_c|^2 for the roots G_c of grams (n, w, w). A rank beyond
    that of the blocks is filled with random columns of S that P does not use: they can learn.
    """
    G, inverse = roots(grams)
    weighed = torch.cat(list(blocks @ G), dim=-1)  # (H, n*w)
    _, size, Vh = torch.linalg.svd(X.to(weighed) @ weighed, full_matrices=False)
    kept = min(rank, int((size > 1e-10 * size[:1]).sum()))
    Vh = Vh[:kept]  # (kept, n*w)
    S, P = weighed @ Vh.mH, Vh.unflatten(-1, (len(blocks), -1)).transpose(0, 1) @ inverse
    even = (size[:kept] * len(blocks) ** 0.5).rsqrt()  # makes q and k, or v and o, of one size
    S, P = S * even, P / even[:, None]  # (H, kept), (n, kept, w)
    more = rank - kept
    spare = torch.randn(len(S), more).to(S) * (S.abs().square().mean().sqrt() if kept else 1)
    return torch.cat((S, spare), dim=-1), F.pad(P, (0, 0, 0, more)), size


# --------------------------------------------------------------------------------------------------
# One layer


class Seen(NamedTuple):
    """What an attention met in a text: E[x^T x] (H, H), and how its heads divide their attention
    among the distances, (n, T)."""

    covariance: Tensor
    distances: Tensor


class Layer:
    """A trained attention in float64, and what weighs its errors.

    Not seen at work, its x has independent entries, and a query looks at all it sees alike.
    """

    def __init__(self, attn: MHA, seen: Seen | None):
        attn = copy.deepcopy(attn).double()
        n, g, d, T = attn.n_head, attn.g, attn.cfg.head_dim, attn.cfg.block_size
        self.Q, self.K = per_head(attn.q.weight, n), per_head(attn.k.weight, g)  # (n or g, H, d)
        self.V, self.O = per_head(attn.v.weight, g), attn.o_heads()  # (g, H, d), (n, d, H)
        eye = torch.eye(attn.cfg.dim).to(self.Q)  # (H, H)
        self.X = roots(seen.covariance)[0] if seen else eye
        self.kv = torch.arange(n, device=eye.device) // (n // g)  # of a query head
        self.scale = attn.scale
        written = (self.X @ self.V[self.kv] @ self.O).square().sum((-2, -1))  # (n,)
        self.heads_weigh = written[:, None, None]  # (n, 1, 1)
        XQ = self.X @ self.Q * self.scale  # (n, H, d)
        self.query_gram = XQ.mT @ XQ * self.heads_weigh  # (n, d, d)
        self.output_gram = self.for_each_key(self.O @ self.O.mT)  # (g, d, d)
        alike = (1 / torch.arange(1.0, T + 1).to(eye)).flip(0).cumsum(0).flip(0) / T  # (T,)
        distances = seen.distances.to(eye) if seen else alike.expand(n, T)
        distances = distances / distances.sum(-1, keepdim=True)  # in float64 now
        pos = torch.arange(T, device=eye.device)[:, None]  # (T, 1)
        R = attn.rotate(eye[:d, :d].expand(T, d, d), pos)  # (T, d, d)
        self.mean_turn = torch.einsum("nt,tij->nij", distances, R)  # (n, d, d)
        turned = int(attn.rotated_width(attn.cfg, d)) if attn.cfg.pos == "rope" else 0
        first = torch.arange(d - turned, d - turned // 2)
        self.pairs = torch.stack((first, first + turned // 2), dim=-1).tolist()  # of dimensions

    def for_each_key(self, x: Tensor) -> Tensor:
        """Sums over the query heads that share a key: (n, ...) -> (g, ...)."""
        return x.new_zeros(len(self.K), *x.shape[1:]).index_add(0, self.kv, x)

    def share_pair(self, heads: slice, f: int) -> tuple[Tensor, Tensor, float]:
        """One complex key for the f-th frequency of these heads: S (H, 1), P (g, 1, 1), its gain.

        The gain is how much of its scores a mean rotation would lose.
        """
        i, j = self.pairs[f]
        K = torch.complex(self.K[heads, :, i], self.K[heads, :, j])[..., None]  # (g, H, 1)
        gram = (self.query_gram[:, i, i] + self.query_gram[:, j, j]) / 2  # (n,)
        still = self.mean_turn[:, i, i] ** 2 + self.mean_turn[:, i, j] ** 2  # (n,)
        weight, lost = (self.for_each_key(w)[heads, None, None] for w in (gram, gram * (1 - still)))
        S, P, _ = low_rank(K, weight.to(K), self.X, 1)
        size = (self.X.to(S) @ S).abs().square().sum()
        return S, P, (size * (P.abs().square() * lost).sum()).item()

    def share_pairs(self, heads: slice, turning: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """The keys that turn, S (H, w), what takes a query there, for each head of keys (g, d, w),
        and the rest of the keys, (g, H, d).
        """
        rest = self.K[heads].clone()
        g, H, d = rest.shape
        S, into = rest.new_zeros(2, len(turning), H), rest.new_zeros(2, len(turning), g, d)
        for slot, f in enumerate(turning):
            i, j = self.pairs[f]
            key, P, _ = self.share_pair(heads, f)
            p = P[:, 0, 0]  # (g,), complex
            S[:, slot] = torch.view_as_real(key[:, 0]).T
            # conj(p) (q_i + i q_j)
            into[0, slot, :, i] = into[1, slot, :, j] = p.real
            into[0, slot, :, j], into[1, slot, :, i] = p.imag, -p.imag
            shared = key[:, 0] * p[:, None]  # (g, H)
            rest[:, :, i] -= shared.real
            rest[:, :, j] -= shared.imag
        return S.flatten(0, 1).T, into.flatten(0, 1).permute(1, 2, 0), rest

    def share_rest(self, heads: slice, K: Tensor, V: Tensor, rank: int, joint: bool):
        """S_k, S_v (H, rank), one of the two twice if joint, and P_k, P_v (g, rank, d)."""
        of_queries = self.for_each_key(self.mean_turn.mT @ self.query_gram @ self.mean_turn)
        grams = of_queries[heads], self.output_gram[heads]  # (g, d, d) twice
        if not joint:
            S_k, P_k, _ = low_rank(K, grams[0], self.X, rank)
            S_v, P_v, _ = low_rank(V, grams[1], self.X, rank)
            return S_k, S_v, P_k, P_v
        S, P, _ = low_rank(torch.cat((K, V)), torch.cat(grams), self.X, rank)
        return S, S, P[: len(K)], P[len(K) :]

    def share_head(self, heads: slice, width: int, turning: list[int], values: str = "own"):
        """One key and value head for these heads: S_k, S_v (H, width), what takes a head's query
        there (g, d, width) and what its value is there, (g, width, d).

        values: "own", or of MFA-KR the keys, as key_reuse_rope has it.
        """
        S, into, rest = self.share_pairs(heads, turning)
        V, still = self.V[heads], width - S.shape[1]
        if values == "own":
            S_k, _, P_k, _ = self.share_rest(heads, rest, V, still, joint=False)
            S_v, P_v, _ = low_rank(V, self.output_gram[heads], self.X, width)
        else:
            found = into.new_zeros(len(V), S.shape[1], V.shape[-1])  # (g, w, d)
            if values == "pre" and turning:  # else what turns is no value
                found = torch.linalg.pinv(self.X @ S) @ self.X @ V  # (g, w, d)
            S_k, _, P_k, P_v = self.share_rest(heads, rest, V - S @ found, still, joint=True)
            S_v, P_v = None, torch.cat((P_v, found), dim=1)
        into = torch.cat((P_k.mT, into), dim=-1)  # (g, d, width)
        return torch.cat((S_k, S), dim=-1), S_v, into, P_v

    def query(self, into: Tensor, scale: float, turning: list[int]) -> Tensor:
        """Q_c for the new keys and their scale, (n, H, width)."""
        into, still = into[self.kv], into.shape[-1] - 2 * len(turning)  # (n, d, width)
        into = torch.cat((self.mean_turn @ into[..., :still], into[..., still:]), dim=-1)
        return self.Q @ into * (self.scale / scale)

    def convert(self, cfg: Config, layer: int, turning: list[int]) -> Attention:
        """These outputs, as nearly as an attention of this Config has them.

        turning: which of this attention's frequencies are the new one's.
        """
        new = ATTENTION[cfg.attn](cfg, layer).to(self.Q)
        ways = dict(mla=self.to_mla, gqa=self.to_gqa, mqa=self.to_gqa)
        return filled(cfg, self.Q, layer, **ways.get(cfg.attn, self.to_mfa)(new, turning))

    def to_mla(self, new: MLA, turning: list[int]) -> dict[str, Tensor]:
        S, into, rest = self.share_pairs(slice(None), turning)
        args = rest, self.V, new.cfg.latent, new.cfg.joint_kv
        S_k, S_v, P_k, P_v = self.share_rest(slice(None), *args)
        latents = dict(s_kv=S_k.mT) if new.cfg.joint_kv else dict(s_k=S_k.mT, s_v=S_v.mT)
        Q = self.Q * (self.scale / new.scale)  # (n, H, d)
        weights = dict(q=stack(Q @ self.mean_turn), o=stack_output(self.O))
        weights |= dict(k=stack(P_k[self.kv]), v=stack(P_v[self.kv]))
        if turning:
            weights |= dict(q_rope=stack(Q @ into[self.kv]), k_rope=S.mT)
        return latents | weights

    def to_gqa(self, new: GQA | MQA, turning: list[int]) -> dict[str, Tensor]:
        each = len(self.K) // new.g  # of our heads, to one new one
        groups = [slice(first, first + each) for first in range(0, len(self.K), each)]
        shared = [self.share_head(group, new.cfg.head_dim, turning) for group in groups]
        S_k, S_v, into, P_v = zip(*shared, strict=True)
        q = stack(self.query(torch.cat(into), new.scale, turning))  # (n*d, H)
        o = stack_output(torch.cat(P_v)[self.kv] @ self.O)  # (H, n*d)
        return dict(q=q, k=torch.cat(S_k, dim=-1).mT, v=torch.cat(S_v, dim=-1).mT, o=o)

    def to_mfa(self, new: MFA | MFAKR, turning: list[int]) -> dict[str, Tensor]:
        reuse = isinstance(new, MFAKR)
        values = new.cfg.key_reuse_rope if reuse else "own"
        S_k, S_v, into, P_v = self.share_head(slice(None), new.cfg.latent, turning, values)
        XS = self.X @ S_k  # (H, C)
        Q = self.query(into, new.scale, turning)  # (n, H, C)
        grams = XS.mT @ XS * self.heads_weigh  # (n, C, C)
        S_q, P_q, _ = low_rank(Q, grams, self.X, new.cfg.query_rank)
        even = (P_q.norm() / S_q.norm() * (S_q.numel() / P_q.numel()) ** 0.5).sqrt()
        S_q, P_q = S_q * even, P_q / even  # of one size, so that they train alike
        # Further heads look about at random and write nothing.
        q, o = new.q.weight.clone(), torch.zeros_like(new.o.weight)
        used = len(Q) * new.cfg.latent
        q[:used] = stack(P_q)
        o[:, :used] = stack_output(P_v[self.kv] @ self.O)
        weights = dict(s_q=S_q.mT, s_k=S_k.mT, q=q, o=o)
        if not reuse:
            return weights | dict(s_v=S_v.mT)
        gate = {name: p for name, p in new.named_parameters() if name in ("n.weight", "alpha")}
        return weights | {name.removesuffix(".weight"): p for name, p in gate.items()}


# --------------------------------------------------------------------------------------------------
# What it meets in a text


@torch.no_grad()
def see(model: GPT, tokens: Tensor) -> list[Seen]:
    """What each layer's attention meets in tokens (B, T)."""
    found = []

    def look(attn: MHA, inputs: tuple) -> None:
        x = inputs[0]  # (B, T, H)
        wide = x.double().flatten(0, 1)  # (B*T, H)
        T = x.shape[1]
        pos = torch.arange(T, device=x.device)
        q, k = attn.query(x, pos), attn.to_cache(x, pos)[0]  # (B, n, T, d), (B, g, T, d)
        share = torch.zeros(attn.n_head, T, T, device=x.device)
        future = torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1)
        for one_q, one_k in zip(q, k, strict=True):
            scores = attn.scale * one_q @ one_k.repeat_interleave(attn.n_head // attn.g, 0).mT
            share += scores.float().masked_fill(future, -math.inf).softmax(-1)  # (n, T, T)
        distance = (pos[:, None] - pos).clamp(min=0).flatten()  # (T*T,)
        distances = share.new_zeros(attn.n_head, attn.cfg.block_size)
        distances.index_add_(1, distance, share.flatten(1) / (len(x) * T))  # (n, block_size)
        found.append(Seen(wide.mT @ wide / len(wide), distances))

    hooks = [block.attn.register_forward_pre_hook(look) for block in model.blocks]
    try:
        with evaluating(model):
            model.hidden(tokens)
    finally:
        for hook in hooks:
            hook.remove()
    return found
