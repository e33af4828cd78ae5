"""Which attention contains which: copying weights into another attention with the same outputs.

Section 2 of the paper made checkable. An arrow says that every attention on its left can be written
as the one on its right; the softmax scale is absorbed where the two differ in it, and spare weights
are zero:

    MHA, MLA, MFA, MFA-KR -> FPBA    to_fpba         no position embedding, n_head <= dim
    GQA, MQA              -> MHA     gqa_to_mha      always
    MFA                   -> MQA     mfa_to_mqa      always: an MQA of head width C, query factored
    MQA                   -> MFA     mqa_to_mfa      q_rank >= min(dim, n_head * head_dim)
    MHA                   -> MFA     mha_to_mfa      latent_dim >= dim, not under rotary
    MFA-KR                -> MFA     mfakr_to_mfa    under rotary for key_reuse_rope="pre"
    MFA-KR                -> MFA-KR  fold_key_reuse  any key_reuse is "vanilla" with another O_c

and two loaders, for one layer of weights that others have trained: mla_from_deepseek,
mfa_from_step3. Each takes an attention (or tensors) and returns a new module; where no such module
exists it raises ValueError.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from mfa import ATTENTION, FPBA, GQA, MFA, MFAKR, MHA, MLA, MQA, Attention, Config, require


def filled(cfg: Config, like: Tensor, layer: int = 0, **weights: Tensor) -> Attention:
    """A new attention with these parameters, padded with zeros, in `like`'s dtype and device."""
    new = ATTENTION[cfg.attn](cfg, layer).to(like)
    assert {name.removesuffix(".weight") for name, _ in new.named_parameters()} == set(weights)
    with torch.no_grad():
        for name, value in weights.items():
            target = getattr(new, name)
            target = (target.weight if isinstance(target, nn.Module) else target).zero_()
            target[tuple(slice(size) for size in value.shape)] = value
    return new


def refit(attn: Attention, weights: dict[str, Tensor], /, **changes) -> Attention:
    """`filled`, for the Config of attn with these changes."""
    return filled(replace(attn.cfg, **changes), next(attn.parameters()), attn.layer, **weights)


def weights_of(attn: Attention, *names: str) -> dict[str, Tensor]:
    """The weights of the sub-modules called so, where they have any: no norm, no weight."""
    modules = {name: getattr(attn, name) for name in names}
    return {name: module.weight for name, module in modules.items() if hasattr(module, "weight")}


def stack(heads: Tensor) -> Tensor:
    """(n, r, w) -> (n*w, r): the weight of q, k or v whose per_head() it is."""
    return heads.mT.flatten(0, 1)


def stack_output(heads: Tensor) -> Tensor:
    """O_c^T (n, w, H) -> (H, n*w): the weight of o whose o_heads() it is."""
    return heads.flatten(0, 1).mT


def require_no_rotation(attn: Attention, into: str) -> None:
    attn.check_bilinear()
    what = f"{into} cannot hold another attention's rotary positions: W_c depends on i - j"
    require(attn.cfg.pos != "rope", what)


# --------------------------------------------------------------------------------------------------
# Between our own


def to_fpba(attn: Attention) -> FPBA:
    """Any attention of n <= H heads without position embedding as FPBA.

    W'_c = W_c scale sqrt(H), U'_c = U_c; FPBA's other H - n channels write nothing (U_c = 0). With
    ALiBi it is not possible in general: the slopes belong to a number of heads, and FPBA has H.
    """
    require_no_rotation(attn, "fpba")
    H, n = attn.cfg.dim, attn.n_head
    slopes = f"the alibi slopes of {n} heads are not those of fpba's {H}"
    require(attn.cfg.pos == "none" or n == H, slopes)
    require(n <= H, f"fpba has one head per channel: {n} heads do not fit into dim {H}")
    W = attn.qk_circuit() * (attn.scale * H**0.5)  # (n, H, H)
    return refit(attn, dict(W=W, U=attn.vo_circuit()), attn="fpba", n_head=0)


mha_to_fpba = mla_to_fpba = mfa_to_fpba = to_fpba  # Eq. 3, Eq. 5 and Eq. 7 read as Eq. 1


def gqa_to_mha(attn: GQA | MQA) -> MHA:
    """GQA or MQA as MHA: K'_c = K_g, V'_c = V_g for every head c of group g.

    Under any position embedding.
    """
    require(isinstance(attn, MHA), f"gqa_to_mha takes gqa or mqa, not {attn.cfg.attn}")

    def repeated(weight: Tensor) -> Tensor:
        groups = weight.unflatten(0, (attn.g, -1))  # (g, d, H)
        return groups.repeat_interleave(attn.n_head // attn.g, dim=0).flatten(0, 1)  # (n*d, H)

    k, v = repeated(attn.k.weight), repeated(attn.v.weight)
    weights = dict(k=k, v=v, **weights_of(attn, "q", "o"))
    return refit(attn, weights, attn="mha", n_head=attn.n_head)


mqa_to_mha = gqa_to_mha  # one group


def mfa_to_mqa(attn: MFA) -> MQA:
    """MFA as an MQA of head width C: Q'_c = S_q Q_c (H, C), K = S_k, V = S_v.

    Under any position embedding. This is what "total effective rank" does not show: all m heads of
    rank C score against one key of width C. Stacked on the key side the W_c have rank C; on the
    query side min(H, r), since S_q is shared too. What MFA buys is m different bilinear forms on
    that subspace, for C^2 + C H parameters each instead of MQA's 2 C H.
    """
    require(type(attn) is MFA, f"mfa_to_mqa takes mfa, not {attn.cfg.attn}: use mfakr_to_mfa first")
    attn.check_bilinear()
    q = attn.q.weight @ attn.s_q.weight  # (m*C, H)
    weights = dict(q=q, k=attn.s_k.weight, v=attn.s_v.weight, o=attn.o.weight)
    return refit(attn, weights, attn="mqa", n_head=attn.n_head, head_dim=attn.cfg.latent)


def mqa_to_mfa(attn: MQA, q_rank: int = 0) -> MFA:
    """MQA as MFA with C = d.

    All Q_c side by side, (H, n d), = S_q [Q'_1 ... Q'_n], one of the two being the identity. q_rank
    0 is the least that holds any MQA, min(H, n d). Under any position embedding.
    """
    require(attn.g == 1, f"mqa_to_mfa takes one key and value head, not {attn.g}")
    least = min(attn.q.weight.shape)
    what = f"q_rank must be at least min(dim, n_head * head_dim) = {least}, not {q_rank}"
    require(q_rank == 0 or q_rank >= least, what)
    Q = attn.q.weight  # (n*d, H)
    one = torch.eye(least).to(Q)
    s_q, q = (one, Q) if Q.shape[1] == least else (Q, one)
    weights = dict(s_q=s_q, q=q, s_k=attn.k.weight, s_v=attn.v.weight, o=attn.o.weight)
    changes = dict(latent_dim=attn.cfg.head_dim, q_rank=q_rank or least, latent_norm=False)
    return refit(attn, weights, attn="mfa", n_head=attn.n_head, **changes)


def mha_to_mfa(attn: Attention, latent_dim: int = 0) -> MFA:
    """Any attention without rotary positions as MFA with C >= H.

    S = I, Q'_c = W_c scale sqrt(C), O'_c^T = U_c. The shared subspace is then the whole residual,
    so nothing is saved; latent_dim 0 is H.
    """
    require_no_rotation(attn, "mfa")
    H, C = attn.cfg.dim, latent_dim or attn.cfg.dim
    what = f"latent_dim must be at least dim {H}, not {C}"
    require(C >= H, f"{what}: a smaller subspace cannot hold every head")
    W = attn.qk_circuit() * (attn.scale * C**0.5)  # (n, H, H)
    U, n = attn.vo_circuit(), attn.n_head  # (n, H, H)
    S = torch.eye(H).to(W)
    Q, O = W.new_zeros(n, C, C), W.new_zeros(n, C, H)
    Q[:, :H, :H] = W.detach()
    O[:, :H] = U.detach()
    weights = dict(s_q=S, s_k=S, s_v=S, q=stack(Q), o=stack_output(O))
    return refit(attn, weights, attn="mfa", n_head=n, latent_dim=C, q_rank=C, latent_norm=False)


def mfakr_to_mfa(attn: MFAKR) -> MFA:
    """MFA-KR as MFA: S_v = S_k M, with M = I + N^T diag(alpha) (Eq. 9). At alpha = 0 S_v is S_k.

    Under rotary only where unrotated keys are the values ("pre"): otherwise the value carries its
    position.
    """
    how = f"key_reuse_rope={attn.key_reuse_rope!r}"
    what = f"{how} puts positions into the values: mfa has none there"
    require(attn.key_reuse_rope == "pre", what)
    S_v = attn.times_M(attn.s_k.weight.mT)  # (H, C)
    weights = dict(s_v=S_v.mT, **weights_of(attn, "s_q", "q_norm", "q", "s_k", "o"))
    return refit(attn, weights, attn="mfa")


def fold_key_reuse(attn: MFAKR) -> MFAKR:
    """The same outputs with key_reuse="vanilla", in every key_reuse_rope.

    O'_c^T = M O_c^T; decoding needs k_j alone. Hence Table 4's variants are one class of functions,
    and their differences are differences of optimisation.
    """
    M = attn.times_M(torch.eye(attn.cfg.latent).to(attn.o.weight))  # (C, C)
    o = stack_output(M @ attn.o_heads())  # (H, m*C)
    weights = dict(o=o, **weights_of(attn, "s_q", "q_norm", "q", "s_k"))
    return refit(attn, weights, key_reuse="vanilla")


# --------------------------------------------------------------------------------------------------
# From weights that others have trained


def tensors_under(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """By the first part of what is left of their names: "q_proj" for "q_proj.weight"."""
    return {
        name.removeprefix(prefix).removesuffix(".weight"): tensor
        for name, tensor in state.items()
        if name.startswith(prefix)
    }


def mla_from_deepseek(
    state: dict[str, Tensor], prefix: str = "", rope_base: float = 10_000.0,
    norm_eps: float = 1e-6, **fields,
) -> MLA:  # fmt: skip
    """One layer of DeepSeek-V2 or -V2-Lite as MLA with joint_kv and latent_norm.

    Widths are read off the shapes. state holds, under prefix ("model.layers.0.self_attn."), what
    their published checkpoints call
        q_proj (n (d + d_r), H), or
        q_a_proj (r, H), q_a_layernorm (r), q_b_proj (n (d + d_r), r); in each head d, d_r
        kv_a_proj_with_mqa (C + d_r, H): S_kv^T, then the rotary key; kv_a_layernorm (C)
        kv_b_proj (n (d + d_v), C): in each head K_c^T, V_c^T
        o_proj (H, n d_v).
    Their rotary pairs are neighbours, (2i, 2i + 1), ours (i, i + d_r/2): the rows are reordered.
    Their YaRN, which stretches the rotary frequencies and rescales the scores of the published
    models, is not here.
    """
    w = tensors_under(state, prefix)
    compress = "q_a_proj" in w
    q_name = "q_b_proj" if compress else "q_proj"
    C = w["kv_a_layernorm"].shape[0]
    d_r = w["kv_a_proj_with_mqa"].shape[0] - C
    H, n_dv = w["o_proj"].shape
    n_d = w["kv_b_proj"].shape[0] - n_dv
    n = (w[q_name].shape[0] - n_d) // d_r
    what = f"mla has one head_dim for keys and values, not {n_d // n} and {n_dv // n}"
    require(n_d == n_dv, what)
    d = n_d // n
    half_split = torch.cat((torch.arange(0, d_r, 2), torch.arange(1, d_r, 2)))

    q = w[q_name].unflatten(0, (n, d + d_r))  # (n, d + d_r, H or r)
    kv = w["kv_b_proj"].unflatten(0, (n, 2 * d))  # (n, 2 d, C)
    weights = dict(
        q=q[:, :d].flatten(0, 1),
        q_rope=q[:, d:][:, half_split].flatten(0, 1),
        s_kv=w["kv_a_proj_with_mqa"][:C],
        k_rope=w["kv_a_proj_with_mqa"][C:][half_split],
        kv_norm=w["kv_a_layernorm"],
        k=kv[:, :d].flatten(0, 1),
        v=kv[:, d:].flatten(0, 1),
        o=w["o_proj"],
    )
    if compress:
        weights |= dict(s_q=w["q_a_proj"], q_norm=w["q_a_layernorm"])
        fields["q_rank"] = w["q_a_proj"].shape[0]
    cfg = Config(
        attn="mla", joint_kv=True, latent_norm=True, compress_query=compress, dim=H, n_head=n,
        head_dim=d, latent_dim=C, rope_dim=d_r, rope_base=rope_base, norm_eps=norm_eps, **fields,
    )  # fmt: skip
    return filled(cfg, w["o_proj"], **weights)


def mfa_from_step3(
    state: dict[str, Tensor], prefix: str = "", rope_base: float = 500_000.0,
    norm_eps: float = 1e-5, **fields,
) -> MFA:  # fmt: skip
    """One layer of StepFun's Step-3 as MFA with latent_norm; widths are read off the shapes.

    state holds, under prefix ("model.layers.0.self_attn."), q_proj (r, H), inter_norm (r),
    wq (m C, r), k_proj and v_proj (C, H), o_proj (H, m C); r is their share_q_dim (2048), C their
    head_dim (256), m 64. Half-split, as here.
    """
    w = tensors_under(state, prefix)
    names = dict(q_proj="s_q", inter_norm="q_norm", wq="q", k_proj="s_k", v_proj="s_v", o_proj="o")
    C, H = w["k_proj"].shape
    r = w["q_proj"].shape[0]
    m = w["wq"].shape[0] // C
    cfg = Config(
        attn="mfa", latent_norm=True, dim=H, n_head=m, latent_dim=C, q_rank=r,
        rope_base=rope_base, norm_eps=norm_eps, **fields,
    )  # fmt: skip
    return filled(cfg, w["o_proj"], **{ours: w[theirs] for theirs, ours in names.items()})
