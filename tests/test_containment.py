"""experiments/paper/containment.py: weights copied from one attention into another give the same outputs."""

import math

import pytest
import torch
from attentions import CASES, KEY_REUSE, POSITIONS, READINGS, attention, difference, states

from experiments.paper.containment import (
    fold_key_reuse,
    gqa_to_mha,
    mfa_from_step3,
    mfa_to_fpba,
    mfa_to_mqa,
    mfakr_to_mfa,
    mha_to_fpba,
    mha_to_mfa,
    mla_from_deepseek,
    mla_to_fpba,
    mqa_to_mfa,
    mqa_to_mha,
    to_fpba,
)
from experiments.paper.tables import ranks
from mfa import FPBA, MFA, MFAKR, MHA, MLA, MQA

every_position = pytest.mark.parametrize("pos", POSITIONS)


def same(new, old):
    x = states(old.cfg)
    return difference(new(x), old(x)) < 1e-12


# --------------------------------------------------------------------------------------------------
# Between our own


@pytest.mark.parametrize("case", [case for case in CASES if not case.startswith("fpba")])
def test_fpba_contains_every_attention_without_positions(case):
    attn = attention(case, "none")
    fpba = to_fpba(attn)
    assert type(fpba) is FPBA and same(fpba, attn)
    assert fpba.U[attn.n_head :].abs().max() == 0  # spare channels write nothing


def test_mha_mla_and_mfa_into_fpba_are_one_function():
    assert mha_to_fpba is mla_to_fpba is mfa_to_fpba is to_fpba


def test_with_as_many_heads_as_channels_fpba_contains_them_under_alibi_too():
    attn = attention("mha", "alibi", n_head=22)
    assert same(to_fpba(attn), attn)


@every_position
@pytest.mark.parametrize("case", ["gqa", "mqa"])
def test_mha_contains_gqa_and_mqa(case, pos):
    attn = attention(case, pos)
    assert type(gqa_to_mha(attn)) is MHA and same(gqa_to_mha(attn), attn)
    assert mqa_to_mha is gqa_to_mha


@every_position
@pytest.mark.parametrize("case", ["mfa", "mfa low q_rank", "mfa high q_rank"])
def test_mfa_is_an_mqa_of_head_width_c(case, pos):
    attn = attention(case, pos)
    mqa = mfa_to_mqa(attn)
    assert type(mqa) is MQA and mqa.cfg.head_dim == attn.cfg.latent and same(mqa, attn)
    assert mqa.counts(mqa.cfg).kv_cache == attn.counts(attn.cfg).kv_cache


@every_position
@pytest.mark.parametrize("n_head", [2, 3, 5])  # n d below and above H
def test_mfa_contains_mqa_when_its_query_rank_is_large_enough(n_head, pos):
    mqa = attention("mqa", pos, n_head=n_head)
    least = min(mqa.cfg.dim, n_head * mqa.cfg.head_dim)
    for q_rank in (0, least, least + 3):
        mfa = mqa_to_mfa(mqa, q_rank)
        assert type(mfa) is MFA and mfa.cfg.query_rank == (q_rank or least) and same(mfa, mqa)
    with pytest.raises(ValueError, match=f"q_rank must be at least .* = {least}, not {least - 1}"):
        mqa_to_mfa(mqa, least - 1)
    assert least == ranks(mqa).query_side  # and for random weights no smaller one can do


@pytest.mark.parametrize("pos", ["alibi", "none"])
@pytest.mark.parametrize("latent_dim", [0, 22, 27])
def test_mfa_contains_mha_when_its_subspace_is_the_whole_residual(latent_dim, pos):
    mha = attention("mha", pos)
    mfa = mha_to_mfa(mha, latent_dim)
    assert type(mfa) is MFA and mfa.cfg.latent == (latent_dim or 22) and same(mfa, mha)


def test_a_smaller_subspace_holds_no_mha():
    mha = attention("mha", "none", n_head=4)
    assert ranks(mha).key_side == 20 > mha.cfg.latent == 9  # an MFA's would be at most its C
    with pytest.raises(ValueError, match="latent_dim must be at least dim 22, not 9"):
        mha_to_mfa(mha, 9)


@every_position
@pytest.mark.parametrize("reuse", KEY_REUSE)
def test_mfa_contains_mfa_kr(reuse, pos):
    kr = attention(f"mfa_kr {reuse} pre", pos)
    mfa = mfakr_to_mfa(kr)
    assert type(mfa) is MFA and same(mfa, kr)


def test_at_alpha_zero_mfa_kr_is_an_mfa_whose_values_are_its_keys():
    kr = attention("mfa_kr gated pre")
    kr.alpha.data.zero_()
    mfa = mfakr_to_mfa(kr)
    assert torch.equal(mfa.s_v.weight, mfa.s_k.weight) and same(mfa, kr)


@pytest.mark.parametrize("reading", READINGS[1:])
@every_position
def test_values_that_carry_positions_fit_into_mfa_only_without_rope(reading, pos):
    kr = attention(f"mfa_kr gated {reading}", pos)
    if pos != "rope":
        assert same(mfakr_to_mfa(kr), kr)
    else:
        with pytest.raises(ValueError, match="puts positions into the values"):
            mfakr_to_mfa(kr)


@every_position
@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("reuse", KEY_REUSE)
def test_key_reuse_folds_into_the_output_projection(reuse, reading, pos):
    kr = attention(f"mfa_kr {reuse} {reading}", pos)
    folded = fold_key_reuse(kr)
    assert type(folded) is MFAKR and not hasattr(folded, "n") and not hasattr(folded, "alpha")
    assert same(folded, kr) and same(folded.eval(), kr.eval())


@pytest.mark.parametrize("turn", [fold_key_reuse, mfakr_to_mfa])
def test_a_norm_on_the_query_latent_is_carried_along(turn):
    kr = attention("mfa_kr normed")
    assert same(turn(kr), kr)


@pytest.mark.parametrize(
    "turn, case, pos, sentence",
    [
        (to_fpba, "mha", "rope", "fpba cannot hold another attention's rotary positions"),
        (to_fpba, "mha", "alibi", "the alibi slopes of 3 heads are not those of fpba's 22"),
        (mha_to_mfa, "mha", "rope", "mfa cannot hold another attention's rotary positions"),
        (mha_to_mfa, "mfa normed", "none", "no longer bilinear"),
        (mfa_to_mqa, "mfa normed", "none", "no longer bilinear"),
        (mfa_to_mqa, "mfa_kr gated pre", "none", "takes mfa, not mfa_kr"),
        (gqa_to_mha, "mfa", "none", "takes gqa or mqa, not mfa"),
        (mqa_to_mfa, "gqa", "none", "takes one key and value head, not 2"),
    ],
)
def test_what_cannot_be_contained_is_refused_in_one_sentence(turn, case, pos, sentence):
    with pytest.raises(ValueError, match=sentence) as e:
        turn(attention(case, pos))
    assert "\n" not in str(e.value)


def test_fpba_has_no_room_for_more_heads_than_channels():
    with pytest.raises(ValueError, match="23 heads do not fit into dim 22"):
        to_fpba(attention("mha", "none", n_head=23))


# --------------------------------------------------------------------------------------------------
# Weights of others, against their attention written down from its public description


def draw(**shapes):
    generator = torch.Generator().manual_seed(5)
    return {
        f"{name}.weight": torch.randn(*shape, dtype=torch.float64, generator=generator) * 0.3
        for name, shape in shapes.items()
    }


def rms(x, weight, eps):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def causal_attention(scores, v):
    """scores (B, n, T, T), v (B, n, T, w) -> (B, T, n*w)"""
    T = scores.shape[-1]
    scores = scores.masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), -math.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def deepseek_attention(w, x, n, d, C, d_r, base, eps):
    """DeepSeek-V2's Multi-head Latent Attention (arXiv:2405.04434, section 2.1), pairs of neighbours turned as complex
    numbers."""
    B, T, _ = x.shape

    def turned(t):  # (B, heads, T, d_r)
        pairs = torch.view_as_complex(t.unflatten(-1, (-1, 2)).contiguous())
        angle = torch.arange(T)[:, None] * base ** (
            -torch.arange(0, d_r, 2, dtype=torch.float64) / d_r
        )
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(-2)

    if "q_proj.weight" in w:
        q = x @ w["q_proj.weight"].T
    else:
        q = rms(x @ w["q_a_proj.weight"].T, w["q_a_layernorm.weight"], eps) @ w["q_b_proj.weight"].T
    q_c, q_r = q.view(B, T, n, d + d_r).transpose(1, 2).split([d, d_r], dim=-1)
    c, k_r = (x @ w["kv_a_proj_with_mqa.weight"].T).split([C, d_r], dim=-1)
    kv = rms(c, w["kv_a_layernorm.weight"], eps) @ w["kv_b_proj.weight"].T
    k_c, v = kv.view(B, T, n, 2 * d).transpose(1, 2).chunk(2, dim=-1)
    scores = (q_c @ k_c.mT + turned(q_r) @ turned(k_r[:, None]).mT) / math.sqrt(d + d_r)
    return causal_attention(scores, v) @ w["o_proj.weight"].T


@pytest.mark.parametrize("r", [0, 11])
def test_mla_takes_deepseeks_weights(r):
    H, n, d, C, d_r = 20, 3, 6, 14, 4
    query = (
        dict(q_a_proj=(r, H), q_a_layernorm=(r,), q_b_proj=(n * (d + d_r), r))
        if r
        else dict(q_proj=(n * (d + d_r), H))
    )
    w = draw(
        **query,
        kv_a_proj_with_mqa=(C + d_r, H),
        kv_a_layernorm=(C,),
        kv_b_proj=(n * 2 * d, C),
        o_proj=(H, n * d),
    )
    mla = mla_from_deepseek(w, rope_base=100.0)
    x = states(mla.cfg)
    assert (
        type(mla) is MLA
        and difference(mla(x), deepseek_attention(w, x, n, d, C, d_r, 100.0, 1e-6)) < 1e-12
    )

    layer = {f"model.layers.7.self_attn.{name}": tensor for name, tensor in w.items()}
    others = {
        "model.layers.7.mlp.gate_proj.weight": torch.zeros(1),
        "model.layers.77.self_attn.o_proj.weight": x,
    }
    again = mla_from_deepseek(layer | others, "model.layers.7.self_attn.", rope_base=100.0)
    assert torch.equal(again(x), mla(x))


def test_mla_takes_no_values_wider_than_its_keys():
    w = draw(q_proj=(3 * 10, 20), kv_a_proj_with_mqa=(18, 20), kv_a_layernorm=(14,), kv_b_proj=(3 * 14, 14),
             o_proj=(20, 3 * 8))  # fmt: skip
    with pytest.raises(ValueError, match="one head_dim for keys and values, not 6 and 8"):
        mla_from_deepseek(w)


def step3_attention(w, x, m, C, base, eps):
    """Step-3's attention (arXiv:2507.19427): one key and value head, a normed query latent, half-split rotary pairs."""
    B, T, _ = x.shape
    angle = torch.arange(T)[:, None] * base ** (
        -torch.arange(0, C, 2, dtype=torch.float64) / C
    )  # (T, C/2)
    turn = torch.polar(torch.ones_like(angle), angle)

    def turned(t):  # (B, heads, T, C): dimension i and i + C/2 are the real and the imaginary part
        z = torch.complex(*t.chunk(2, dim=-1)) * turn
        return torch.cat((z.real, z.imag), dim=-1)

    q = rms(x @ w["q_proj.weight"].T, w["inter_norm.weight"], eps) @ w["wq.weight"].T
    k, v = ((x @ w[f"{name}_proj.weight"].T)[:, None] for name in "kv")  # (B, 1, T, C)
    scores = turned(q.view(B, T, m, C).transpose(1, 2)) @ turned(k).mT / math.sqrt(C)
    return causal_attention(scores, v) @ w["o_proj.weight"].T


def test_mfa_takes_step3s_weights():
    H, m, C, r = 20, 3, 6, 11
    w = draw(
        q_proj=(r, H),
        inter_norm=(r,),
        wq=(m * C, r),
        k_proj=(C, H),
        v_proj=(C, H),
        o_proj=(H, m * C),
    )
    layer = {f"model.layers.0.self_attn.{name}": tensor for name, tensor in w.items()}
    mfa = mfa_from_step3(layer, "model.layers.0.self_attn.")
    x = states(mfa.cfg)
    assert (
        type(mfa) is MFA
        and difference(mfa(x), step3_attention(w, x, m, C, 500_000.0, 1e-5)) < 1e-12
    )


def test_step3s_own_shape_fits():
    """Hidden 7168, 64 heads of 256, share_q_dim 2048; nothing is allocated."""
    shapes = dict(q_proj=(2048, 7168), inter_norm=(2048,), wq=(64 * 256, 2048), k_proj=(256, 7168), v_proj=(256, 7168),
                  o_proj=(7168, 64 * 256))  # fmt: skip
    with torch.device("meta"):
        mfa = mfa_from_step3(
            {f"{name}.weight": torch.empty(shape) for name, shape in shapes.items()}
        )
    assert (mfa.cfg.query_rank, mfa.cfg.latent, mfa.n_head) == (2048, 256, 64)
    assert mfa.counts(mfa.cfg).kv_cache == 512
