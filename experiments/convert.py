"""A trained MHA, GQA or MQA as GQA, MQA, MLA, MFA or MFA-KR, by truncated SVD; then train it on.

    python experiments/convert.py --checkpoint out/tiny-mha/best.pt --to mfa --out out/converted
    python train.py --init_from out/converted/best.pt --out out/converted-mfa --max_iters 200

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
turning: its e^(i w D) becomes the mean over the distances, near 1 for frequencies that hardly turn
within the context and near 0 for fast ones, whose scores are lost. The target's frequencies are a
ladder, every k-th of the source's, counted from the fastest: k is chosen so that they keep most.

Exact: without rotary positions, if the latent is as wide as all keys (and values, where they share
it), or GQA of as many heads. All else is lost: what the cut leaves out, and the turning of the
frequencies that stop. FFN, norms and embedding are copied, so that parameters are not MHA's.
MHA2MLA (arXiv:2502.14837) and TransMLA (arXiv:2502.07864) convert to MLA in this spirit.
"""

import copy
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.paper.containment import filled, stack, stack_output
from mfa import ATTENTION, GPT, MHA, Attention, Config, cache_bytes, evaluating, per_head, require
from prepare_data import folder_for, load
from support.cli import BadInput, run_command
from support.files import write_atomically
from support.machine import Machine
from support.progress import count
from support.run_folder import FORMAT, load_checkpoint, model_from, shell_quoted
from train import evaluate, take, to_device

TARGETS = ("gqa", "mqa", "mla", "mfa", "mfa_kr")
EVAL_TOKENS = 1 << 17  # validation tokens

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
        distances = seen.distances if seen else alike.expand(n, T)
        pos = torch.arange(T, device=eye.device)[:, None]  # (T, 1)
        R = attn.rotate(eye[:d, :d].expand(T, d, d), pos)  # (T, d, d)
        self.mean_turn = torch.einsum("nt,tij->nij", distances.to(eye), R)  # (n, d, d)
        turned = int(attn.turned_width(attn.cfg, d)) if attn.cfg.pos == "rope" else 0
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

    def query(self, into: Tensor, still: int) -> Tensor:
        """Q_c for the new keys, (n, H, width), whose first `still` dimensions do not turn."""
        into = into[self.kv]  # (n, d, width)
        into = torch.cat((self.mean_turn @ into[..., :still], into[..., still:]), dim=-1)
        return self.Q @ into

    def convert(self, cfg: Config, layer: int, turning: list[int]) -> Attention:
        """These outputs, as nearly as an attention of this Config has them."""
        new = ATTENTION[cfg.attn](cfg, layer).to(self.Q)
        everything, ratio = slice(None), self.scale / new.scale
        kv, weights = self.kv, {}
        if cfg.attn == "mla":
            S, into, rest = self.share_pairs(everything, turning)
            args = everything, rest, self.V, cfg.latent, cfg.joint_kv
            S_k, S_v, P_k, P_v = self.share_rest(*args)
            weights = dict(s_kv=S_k.mT) if cfg.joint_kv else dict(s_k=S_k.mT, s_v=S_v.mT)
            weights |= dict(k=stack(P_k[kv]), v=stack(P_v[kv]), o=stack_output(self.O))
            weights |= dict(q=stack(self.Q @ self.mean_turn * ratio))
            if turning:
                weights |= dict(q_rope=stack(self.query(into, 0) * ratio), k_rope=S.mT)
        elif cfg.attn in ("gqa", "mqa"):
            each = len(self.K) // new.g  # of our heads, to one new one
            groups = [slice(first, first + each) for first in range(0, len(self.K), each)]
            shared = [self.share_head(group, cfg.head_dim, turning) for group in groups]
            S_k, S_v, into, P_v = zip(*shared, strict=True)
            Q = self.query(torch.cat(into), cfg.head_dim - 2 * len(turning)) * ratio  # (n, H, d)
            weights = dict(q=stack(Q), o=stack_output(torch.cat(P_v)[kv] @ self.O))
            weights |= dict(k=torch.cat(S_k, dim=-1).mT, v=torch.cat(S_v, dim=-1).mT)
        else:
            values = cfg.key_reuse_rope if cfg.attn == "mfa_kr" else "own"
            shared = self.share_head(everything, cfg.latent, turning, values)
            S_k, S_v, into, P_v = shared
            XS = self.X @ S_k  # (H, C)
            grams = XS.mT @ XS * self.heads_weigh  # (n, C, C)
            Q = self.query(into, cfg.latent - 2 * len(turning)) * ratio  # (n, H, C)
            S_q, P_q, _ = low_rank(Q, grams, self.X, cfg.query_rank)
            even = (P_q.norm() / S_q.norm() * (S_q.numel() / P_q.numel()) ** 0.5).sqrt()
            S_q, P_q = S_q * even, P_q / even  # of one size, so that they train alike
            # Further heads look about at random and write nothing.
            q, o = new.q.weight.clone(), torch.zeros_like(new.o.weight)
            q[: len(Q) * cfg.latent] = stack(P_q)
            o[:, : len(Q) * cfg.latent] = stack_output(P_v[kv] @ self.O)
            weights = dict(s_q=S_q.mT, s_k=S_k.mT, q=q, o=o)
            weights |= dict(s_v=S_v.mT) if S_v is not None else {}
            weights |= {name: getattr(new, name).data for name in ("alpha",) if hasattr(new, name)}
            weights |= dict(n=new.n.weight) if hasattr(new, "n") else {}
        return filled(cfg, self.Q, layer, **weights)


# --------------------------------------------------------------------------------------------------
# The model


def target(cfg: Config, attn: str, **fields) -> Config:
    """The Config of what cfg's model becomes. Fields as in Config; those not given:

    heads are cfg's; latent_dim dim // 8; q_rank all that the queries need; half of a key turns,
    or of MLA's d_r = d / 2. ValueError if there is none.
    """
    kinds = ("mha", *TARGETS[:2])
    require(cfg.attn in kinds, f"only mha, gqa and mqa are converted, not {cfg.attn}")
    require(attn in TARGETS, f"must become one of {', '.join(TARGETS)}, not {attn}")
    require(not cfg.qk_norm, "qk_norm is no product of matrices: such a model cannot be converted")
    n = cfg.heads
    own = dict(attn=attn, n_head=n, latent_dim=0, compress_query=False, latent_norm=False)
    own |= dict(ffn_dim=cfg.ffn, rope_dim=cfg.head_dim // 2) | fields
    C = own["latent_dim"] or cfg.dim // 8
    turned = int(cfg.rope_fraction * cfg.head_dim)
    if attn.startswith("mfa"):
        own["q_rank"] = own.get("q_rank") or min(cfg.dim, own["n_head"] * C)
        own.setdefault("rope_fraction", 2 * max(1, min(turned // 4, C // 4)) / C)
    own.setdefault("rope_fraction", 2 * max(1, turned // 4) / cfg.head_dim)
    new = replace(cfg, **own)
    g, heads = ATTENTION[cfg.attn].kv_heads(cfg), new.heads
    more = attn.startswith("mfa") and cfg.pos != "alibi"
    what = f"n_head must be {n}, as in the checkpoint{', or more' if more else ''}, not {heads}"
    require(heads == n or more and heads > n, what)
    if attn == "gqa":
        fits = g % new.n_kv_head == 0
        require(fits, f"n_kv_head must divide the checkpoint's {g}, not be {new.n_kv_head}")
    if cfg.pos == "rope":
        flag, wanted = "rope_dim" if attn == "mla" else "rope_fraction", turned_width(new)
        what = f"{flag} makes {wanted} dimensions turn, and in the checkpoint {turned} do"
        require(wanted <= turned, f"{what}: lower it")
    return new


def turned_width(cfg: Config) -> int:
    """Dimensions of a key that turn."""
    if cfg.pos != "rope":
        return 0
    kind = ATTENTION[cfg.attn]
    width = cfg.latent if kind.rotary == "latent_dim" else getattr(cfg, kind.rotary)
    return int(kind.turned_width(cfg, width))


def choose_ladder(gains: list[float], slots: int) -> int:
    """k such that frequencies 0, k, 2k ... (slots of them) gain most."""
    fit = [k for k in range(1, len(gains) + 1) if (slots - 1) * k < len(gains)]
    return max(fit, key=lambda k: sum(gains[::k][:slots]))


@torch.no_grad()
def convert(model: GPT, cfg: Config, seen: list[Seen] | None = None) -> GPT:
    """model as a model of cfg, which is a target() of its own. seen: by see(), for each layer."""
    attentions = [block.attn for block in model.blocks]
    layers = [Layer(a, seen[a.layer] if seen else None) for a in attentions]
    slots, turning = turned_width(cfg) // 2, []
    if slots:
        g, frequencies = len(layers[0].K), range(len(layers[0].pairs))
        groups = ATTENTION[cfg.attn].kv_heads(cfg) if cfg.attn in ("gqa", "mqa") else 1
        starts = range(0, g, g // groups)
        gains = [
            sum(a.share_pair(slice(at, at + g // groups), f)[2] for a in layers for at in starts)
            for f in frequencies
        ]
        k = choose_ladder(gains, slots)
        turning = list(frequencies[::k][:slots])
        base = model.cfg.rope_base ** (k * slots / len(frequencies))
        cfg = replace(cfg, rope_base=max(base, 1.0001))
    new = GPT(cfg).to(next(model.parameters()))
    kept = {name: p for name, p in model.state_dict().items() if ".attn." not in name}
    new.load_state_dict(kept, strict=False)
    for old, layer, block in zip(attentions, layers, new.blocks, strict=True):
        block.attn.load_state_dict(layer.convert(cfg, old.layer, turning).state_dict())
    return new.train(model.training)


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


# --------------------------------------------------------------------------------------------------
# The command


@dataclass
class Args:
    """Convert a trained MHA, GQA or MQA into another attention, by truncated SVD."""

    checkpoint: Path  # best.pt of a run of train.py
    to: Literal["gqa", "mqa", "mla", "mfa", "mfa_kr"]  # what it becomes
    out: Path  # new folder for best.pt, which train.py --init_from and sample.py take
    n_kv_head: int = 2  # gqa: key/value heads
    latent_dim: int = 0  # C of mla, mfa and mfa_kr; 0: dim // 8
    joint_kv: bool = True  # mla: one latent for keys and values
    key_reuse_rope: Literal["pre", "post", "inverse"] = "pre"  # mfa_kr
    q_rank: int = 0  # mfa, mfa_kr: rank of the query; 0: all that it needs, so that it is exact
    n_head: int = 0  # mfa, mfa_kr: heads, where more than the checkpoint's; the rest begins silent
    rope_fraction: float | None = None  # share of a key that turns; default: half as much as now
    rope_dim: int | None = None  # mla: width of the rotary key; default: half of head_dim
    look_at: int = 16384  # tokens of the checkpoint's own training text to look at; 0: none


def own_text(ckpt: dict) -> tuple[Tensor, Tensor] | None:
    """The ids that the checkpoint was trained and validated on, where they are still there."""
    args, spec = ckpt["args"], ckpt["tokenizer"]
    for tokenizer in (args["tokenizer"], spec):
        size = args["model"]["vocab_size"] or None
        folder = folder_for(args["dataset"], tokenizer, size, args["file"], args["data_dir"])
        if folder.is_dir():
            *ids, meta = load(folder)
            if meta["tokenizer"] == spec:
                return tuple(to_device(part, torch.device("cpu")) for part in ids)
    return None


def main(args: Args) -> None:
    ckpt = load_checkpoint(args.checkpoint)
    if any((args.out / name).exists() for name in ("best.pt", "latest.pt", "metrics.jsonl")):
        raise BadInput(f"--out {args.out} holds a run: give a new folder")
    with Machine("cpu") as machine:
        model = model_from(ckpt, args.checkpoint, machine.device)
        fields = dict(latent_dim=args.latent_dim, key_reuse_rope=args.key_reuse_rope)
        fields |= dict(n_kv_head=args.n_kv_head, joint_kv=args.joint_kv)
        optional = ("q_rank", "n_head", "rope_fraction", "rope_dim")
        fields |= {name: getattr(args, name) for name in optional if getattr(args, name)}
        try:
            cfg = target(model.cfg, args.to, **fields)
        except ValueError as e:
            raise BadInput(f"--to {args.to}: {e}") from e
        text, seen, losses = own_text(ckpt), None, [math.inf] * 2
        if text and args.look_at:
            T = cfg.block_size
            starts = torch.linspace(0, len(text[0]) - T, max(1, args.look_at // T)).long()
            seen = see(model, take(text[0], starts, T, machine.device))
        torch.manual_seed(0)  # of what begins at random
        new = convert(model, cfg, seen)
        if text:
            losses = [evaluate(m, text[1][: EVAL_TOKENS + 1], machine) for m in (model, new)]
    state = ckpt | dict(
        format=FORMAT, model=new.state_dict(), optimizer={}, scaler={}, step=0, tokens=0,
        seconds=0.0, best_loss=losses[1], config=asdict(new.cfg),
        args=ckpt["args"] | dict(model=asdict(new.cfg)),
        counted=dict(params=count(new), cache_bytes=cache_bytes(new.cfg)),
    )  # fmt: skip
    args.out.mkdir(parents=True, exist_ok=True)
    best = args.out / "best.pt"
    write_atomically(best, lambda file: torch.save(state, file))
    how = "as its attentions met it in its own text" if seen else "unseen, as its text is not there"
    print(f"{model.cfg.attn} became {args.to}, what comes in weighed {how}")
    before, after = cache_bytes(model.cfg), cache_bytes(new.cfg)
    print(f"cache: {before:,} -> {after:,} bytes per token at 16 bit")
    print(f"parameters: {count(model):,} -> {count(new):,}")
    if text:
        print(f"validation loss: {losses[0]:.4f} -> {losses[1]:.4f} nats per token")
    print(f"next: python train.py --init_from {shell_quoted(best)} --out FOLDER")
    print("  on the same text, for a tenth of its steps at a tenth of its learning rate")


if __name__ == "__main__":
    run_command(main, Args)
