"""mfa.py: what is true of the attentions, the cache, the model around them, and what they refuse."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from attentions import (
    ALL,
    CASES,
    KEY_REUSE,
    MAIN,
    NORMED,
    POSITIONS,
    READINGS,
    attention,
    config,
    difference,
    gpt,
    randomized,
    states,
    tokens,
)
from torch.func import functional_call

from experiments.paper.tables import params_without_embedding, ranks
from mfa import (
    ATTENTION,
    GPT,
    PRESETS,
    Attention,
    Config,
    KVCache,
    MoE,
    SwiGLU,
    alibi,
    preset,
    rotate,
)
from mfa import draw as pick
from support.machine import attention_kernels

every_case = pytest.mark.parametrize("case", CASES)
every_case_normed_too = pytest.mark.parametrize("case", ALL)
the_seven = pytest.mark.parametrize("case", MAIN)
every_position = pytest.mark.parametrize("pos", POSITIONS)

# ---------------------------------------------------------------------------------------------------------------------
# The two formulations


@every_position
@every_case
def test_the_two_formulations_coincide(case, pos):
    attn = attention(case, pos)
    x = states(attn.cfg)
    defined = attn.factorization(x)
    assert difference(attn.train()(x), defined) < 1e-12
    assert difference(attn.eval()(x), defined) < 1e-12


def test_mfa_is_equation_6_written_with_loops():
    attn = attention("mfa", "none")
    x = states(attn.cfg, B=1)[0]  # (T, H)
    S_q, S_k, S_v = attn.s_q.weight.T, attn.s_k.weight.T, attn.s_v.weight.T  # (H, C)
    C = attn.cfg.latent
    out = torch.zeros_like(x)
    for c in range(attn.n_head):
        Q_c, O_c = attn.q.weight.T[:, c * C : (c + 1) * C], attn.o.weight[:, c * C : (c + 1) * C]  # (C, C), (H, C)
        for i in range(len(x)):
            score = torch.stack([(x[i] @ S_q @ Q_c) @ (x[j] @ S_k) / math.sqrt(C) for j in range(i + 1)])
            out[i] += sum(p * (x[j] @ S_v) @ O_c.T for j, p in enumerate(score.softmax(0)))
    assert difference(attn(x[None])[0], out) < 1e-12


@pytest.mark.parametrize("reuse", KEY_REUSE)
def test_key_reuse_is_equation_9_with_shapes_that_conform(reuse):
    """W_V = (I + diag(alpha) N) W_K; the other three are Table 4's steps towards it."""
    attn = attention(f"mfa_kr {reuse} pre", "none")
    W_K, I = attn.s_k.weight, torch.eye(attn.cfg.latent, dtype=torch.float64)  # (C, H), (C, C)
    N = None if reuse == "vanilla" else attn.n.weight
    M = I if N is None else N if reuse == "proj" else I + N if reuse == "residual" else I + torch.diag(attn.alpha) @ N
    O = attn.o.weight.unflatten(1, (attn.n_head, -1))  # (H, m, C)
    assert difference(attn.vo_circuit(), torch.einsum("ch,kmc->mhk", M @ W_K, O)) < 1e-12


def outputs_and_gradients(attn, batches):
    """The batches' outputs, each computed by itself, and what the parameters get from them."""
    outputs = torch.cat([attn(x) for x in batches])
    return outputs, torch.autograd.grad(outputs.square().sum(), list(attn.parameters()))


@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("reuse", KEY_REUSE)
def test_m_on_the_outputs_or_on_o_is_the_same(reuse, reading):
    """M multiplies what has fewer rows: 7 tokens are fewer than dim 22, 4 sequences of them are more."""
    attn, on_outputs = attention(f"mfa_kr {reuse} {reading}"), []
    attn.o.register_forward_hook(lambda *_: on_outputs.append(True))
    x = states(attn.cfg, B=4, T=7)
    folded, gradients = outputs_and_gradients(attn, [x])
    assert not on_outputs
    apart, expected = outputs_and_gradients(attn, x.split(1))
    assert len(on_outputs) == 4
    assert difference(folded, apart) < 1e-12
    for ours, theirs in zip(gradients, expected, strict=True):
        assert difference(ours, theirs) < 1e-12


@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("reuse", KEY_REUSE)
def test_a_token_decoded_with_m_on_its_output_is_that_of_the_folded_pass(reuse, reading):
    attn = attention(f"mfa_kr {reuse} {reading}")
    x, cache = states(attn.cfg, B=2, T=13), KVCache(attn, 2, 13)  # 26 rows, then 2
    attn(x[:, :12], cache)
    cache.length = 12
    assert difference(attn(x[:, 12:], cache), attn(x)[:, 12:]) < 1e-12


def test_a_gate_too_small_for_bfloat16_is_folded_into_o_without_loss_under_autocast():
    """1 + 2^-20 is 1 in bfloat16: a product with M as one matrix would lose the gate."""
    attn = attention("mfa_kr gated pre", "none").float()
    torch.nn.init.constant_(attn.alpha, 2**-20)
    with torch.autocast("cpu", torch.bfloat16):
        O = attn.o.weight.unflatten(1, (attn.n_head, -1)).detach()  # (H, m, C)
        folded = attn.times_M(O, transposed=True)
    expected = O + 2**-20 * (O @ attn.n.weight)
    assert folded.dtype == torch.float32 and not torch.equal(folded, O)
    assert difference(folded - O, expected - O) < 0.2  # a product in bfloat16, a sum in float32


@every_position
@every_case
def test_scores_are_scaled_by_the_width_of_a_query(case, pos):
    attn = attention(case, pos)
    assert attn.scale == pytest.approx(attn.query(states(attn.cfg), torch.arange(7)).shape[-1] ** -0.5)


@every_position
@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("reuse", KEY_REUSE)
def test_readings_of_key_reuse_differ_only_under_rope(reuse, reading, pos):
    pre, other = attention(f"mfa_kr {reuse} pre", pos), attention(f"mfa_kr {reuse} {reading}", pos)
    same = difference(other(states(pre.cfg)), pre(states(pre.cfg))) < 1e-12
    assert same == (reading == "pre" or pos != "rope")


@pytest.mark.parametrize("case", NORMED)
def test_a_norm_between_the_factors_leaves_no_factorization(case):
    attn = attention(case)
    for circuit in (attn.qk_circuit, partial(attn.factorization, states(attn.cfg))):
        with pytest.raises(ValueError, match="no longer bilinear"):
            circuit()


def test_a_key_with_a_norm_that_is_the_value_leaves_no_output_circuit():
    assert ATTENTION["mfa_kr"](Config(attn="mfa_kr", latent_norm=True)).vo_circuit().dim() == 3
    with pytest.raises(ValueError, match="qk_norm is in the value, too, so there is no U_c"):
        ATTENTION["mfa_kr"](Config(attn="mfa_kr", qk_norm=True)).vo_circuit()


@pytest.mark.parametrize("case", ["mfa normed", "mfa_kr normed", "mla joint normed"])
def test_latent_norm_makes_the_query_blind_to_the_scale_of_s_q(case):
    attn = attention(case, norm_eps=1e-30)
    x = states(attn.cfg)
    before = attn(x)
    attn.s_q.weight.data *= 7
    assert difference(attn(x), before) < 1e-12


@every_position
@every_case_normed_too
def test_a_token_sees_nothing_that_comes_after_it(case, pos):
    model = gpt(case, pos)
    idx = tokens(model.cfg, T=9)
    changed = idx.clone()
    changed[:, 5] = (changed[:, 5] + 1) % model.cfg.vocab_size
    a, b = model(idx)[0], model(changed)[0]
    assert difference(a[:, :5], b[:, :5]) < 1e-12
    assert difference(a[:, 5:], b[:, 5:]) > 1e-3


@every_position
@the_seven
def test_gradients_are_right(case, pos):
    small = dict(dim=4 if case == "fpba" else 5, n_kv_head=1, head_dim=4, latent_dim=4, rope_dim=2)
    attn = attention(case, pos, **small, n_head=0 if case == "fpba" else 2)
    names, values = zip(*attn.named_parameters(), strict=True)

    def f(x, *weights):
        return functional_call(attn, dict(zip(names, weights, strict=True)), (x,))

    assert torch.autograd.gradcheck(f, (states(attn.cfg, B=1, T=3).requires_grad_(), *values))


@pytest.mark.parametrize("reading", READINGS)
def test_the_gradient_reaches_alpha_first_and_then_n(reading):
    torch.manual_seed(0)
    cfg = config("mfa_kr gated pre", key_reuse_rope=reading)
    attn, x = ATTENTION["mfa_kr"](cfg).double(), states(cfg)
    attn(x).square().sum().backward()
    assert attn.alpha.grad.abs().min() > 0 and attn.n.weight.grad.abs().max() == 0
    torch.optim.SGD(attn.parameters(), lr=1.0).step()
    attn.zero_grad()
    attn(x).square().sum().backward()
    assert attn.n.weight.grad.abs().max() > 0


def test_with_n_zero_at_the_start_neither_alpha_nor_n_would_ever_train():
    cfg = config("mfa_kr gated pre")
    attn = ATTENTION["mfa_kr"](cfg).double()
    torch.nn.init.zeros_(attn.n.weight)
    attn(states(cfg)).square().sum().backward()
    assert attn.alpha.grad.abs().max() == 0 and attn.n.weight.grad.abs().max() == 0


# ---------------------------------------------------------------------------------------------------------------------
# Table 1: counts equal tensors, ranks equal ranks


@every_position
@every_case_normed_too
def test_counts_are_those_of_the_tensors(case, pos):
    attn = attention(case, pos)
    counts = attn.counts(attn.cfg)
    assert counts.params == sum(p.numel() for p in attn.parameters())
    assert counts.kv_cache == sum(heads * width for heads, width in attn.cache_shapes)
    assert counts.heads == attn.n_head
    assert counts.total_rank == counts.heads * counts.rank


@every_position
@every_case
def test_ranks_are_those_of_the_matrices(case, pos):
    attn = attention(case, pos)
    counts, cfg, measured = attn.counts(attn.cfg), attn.cfg, ranks(attn, offset=3)
    r = cfg.dim  # the query's rank
    if cfg.attn in ("mfa", "mfa_kr") or cfg.attn == "mla" and cfg.compress_query:
        r = min(cfg.query_rank, cfg.dim)
    # The rank columns leave out MLA's rotary dimensions: under rope they add d_r to the key side, and as much to each
    # head unless a narrow query latent stands in the way.
    rotary = cfg.rope_dim if cfg.attn == "mla" and pos == "rope" else 0
    assert measured.heads == [min(counts.rank + rotary, r)] * counts.heads
    assert measured.key_side == (min(counts.shared_dim + rotary, sum(measured.heads)) if rotary else counts.shared_dim)
    assert measured.query_side == min(r, sum(measured.heads))


def test_all_heads_of_mfa_share_their_key_directions_whatever_their_total_rank():
    attn = attention("mfa high q_rank", n_head=5)
    assert attn.counts(attn.cfg).total_rank == 50 > attn.cfg.dim
    assert ranks(attn).key_side == attn.cfg.latent == 10
    assert ranks(attn).query_side == attn.cfg.dim == 22


# ---------------------------------------------------------------------------------------------------------------------
# The cache


@every_position
@every_case_normed_too
def test_cached_chunks_equal_the_full_pass(case, pos):
    model = gpt(case, pos)
    idx = tokens(model.cfg, T=19)
    cache = KVCache(model, batch_size=2, capacity=20)
    chunks = idx.split([5, 1, 1, 7, 1, 2, 2], dim=1)
    logits = torch.cat([model(chunk, cache=cache)[0] for chunk in chunks], dim=1)
    assert difference(logits, model(idx)[0]) < 1e-12
    assert cache.length == 19


@every_position
@every_case_normed_too
def test_the_cache_holds_what_is_counted(case, pos):
    model = gpt(case, pos)
    cfg = model.cfg
    cache = KVCache(model, batch_size=3, capacity=20)
    assert cache.numel() == cfg.n_layer * 3 * 20 * ATTENTION[cfg.attn].counts(cfg).kv_cache
    assert cache.nbytes() == 8 * cache.numel()
    assert KVCache(model, 3, 20, dtype=torch.bfloat16).nbytes() == 2 * cache.numel()


@the_seven
def test_a_cache_in_bfloat16_serves_a_model_in_float32(case):
    model = gpt(case).float()
    idx = tokens(model.cfg, T=12)
    cache = KVCache(model, 2, 12, dtype=torch.bfloat16)
    logits = torch.cat([model(chunk, cache=cache)[0] for chunk in idx.split([6, 1, 5], dim=1)], dim=1)
    assert logits.dtype == torch.float32
    assert difference(logits, model(idx)[0]) < 0.1


def test_a_cache_is_used_again_from_length_zero():
    model = gpt("mfa")
    first, second = tokens(model.cfg, T=9), tokens(model.cfg, T=19)[:, 10:]
    cache = KVCache(model, 2, 9)
    model(first, cache=cache)
    cache.length = 0
    assert difference(model(second, cache=cache)[0], model(second)[0]) < 1e-12


def test_a_refused_call_leaves_the_cache_as_it_was():
    model = gpt("mfa")
    idx, cache = tokens(model.cfg, T=12), KVCache(model, 2, 8)
    model(idx[:, :6], cache=cache)
    with pytest.raises(ValueError, match="holds 8 tokens"):
        model(idx[:, 6:9], cache=cache)
    assert cache.length == 6
    assert difference(model(idx[:, 6:8], cache=cache)[0], model(idx[:, :8])[0][:, 6:]) < 1e-12


# ---------------------------------------------------------------------------------------------------------------------
# Positions


def vectors(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def test_rope_turns_dimension_i_with_dimension_i_plus_half():
    w, base, at = 8, 100.0, 5
    for i in range(w // 2):
        angle = at * base ** (-2 * i / w)
        turned = rotate(torch.eye(w, dtype=torch.float64)[i : i + 1], torch.tensor([at]), base)[0]
        expected = torch.zeros(w, dtype=torch.float64)
        expected[i], expected[i + w // 2] = math.cos(angle), math.sin(angle)
        assert torch.allclose(turned, expected, rtol=0, atol=1e-14)


def test_rope_keeps_norms_and_does_nothing_at_position_zero():
    x, pos = vectors(2, 3, 7, 10), torch.arange(7)
    turned = rotate(x, pos, 10_000.0)
    assert torch.allclose(turned.norm(dim=-1), x.norm(dim=-1), rtol=1e-14)
    assert torch.equal(turned[..., 0, :], x[..., 0, :])


def test_scores_of_rotated_vectors_depend_on_the_distance_alone():
    q, k = vectors(2, 1, 10)
    scores = [rotate(q, torch.tensor([i]), 1e4) @ rotate(k, torch.tensor([i - 6]), 1e4).T for i in (6, 7, 400)]
    assert torch.allclose(scores[0], scores[1], rtol=1e-12) and torch.allclose(scores[0], scores[2], rtol=1e-12)


def test_rope_angles_are_exact_in_bfloat16():
    x, pos = vectors(1, 8).bfloat16().expand(4, 8), torch.tensor([1, 257, 1001, 16383])
    turned = rotate(x, pos, 500_000.0)
    assert turned.dtype == torch.bfloat16
    exact = rotate(x.double(), pos, 500_000.0)
    assert difference(turned.double(), exact) < 2**-8  # half a step of bfloat16, and float32's angle at 16383


@the_seven
def test_models_survive_bfloat16(case):
    """No buffer holds angles that .to(bfloat16) could round."""
    model = gpt(case)
    assert not list(model.buffers())
    idx = tokens(model.cfg)
    exact = model(idx)[0]
    assert difference(model.to(torch.bfloat16)(idx)[0].double(), exact) < 0.1


@pytest.mark.parametrize("n", range(1, 21))
def test_alibi_slopes_follow_the_rule_for_any_number_of_heads(n):
    power = 2 ** math.floor(math.log2(n))
    sequence = [2 ** (-8 * k / power) for k in range(1, power + 1)]
    between = [2 ** (-8 * k / (2 * power)) for k in range(1, 2 * power + 1, 2)]
    slopes = torch.tensor(sequence + between[: n - power], dtype=torch.float64)
    bias = alibi(n, torch.tensor([3, 6]), torch.arange(7), torch.float64)  # (n, 2, 7)
    assert torch.allclose(-bias[:, 1, 0] / 6, slopes, rtol=1e-14)
    assert torch.allclose(-bias[:, 0, 1] / 2, slopes, rtol=1e-14)


# ---------------------------------------------------------------------------------------------------------------------
# How weights start

TRUNCATED = 0.98658  # std of a normal distribution of std 1 that is cut at 3


@pytest.mark.parametrize("attn", ATTENTION)
def test_weights_start_as_section_4_1_says_scaled_by_width(attn):
    torch.manual_seed(0)
    wide = dict(dim=64, n_expert=32) if attn == "fpba" else dict(dim=256, head_dim=64, latent_dim=48, n_expert=8)
    model = GPT(Config(attn=attn, n_layer=3, vocab_size=1000, moe_ffn_dim=300, shared_ffn_dim=300, **wide))
    base = 0.02 * math.sqrt(2048 / wide["dim"])
    for name, p in model.named_parameters():
        depth = int(name.split(".")[1]) + 1 if name.startswith("blocks") else None
        leaf = name.removesuffix(".weight").split(".")[-1]
        if p.dim() == 1:
            assert (p == (0 if leaf == "alpha" else 1)).all(), name
            continue
        std = 0.02 if depth is None else base / math.sqrt(2 * depth) if leaf in ("o", "U", "w2") else base
        assert p.std().item() == pytest.approx(std * TRUNCATED, rel=0.06 if p.numel() < 5000 else 0.025), name
        assert p.abs().max() <= 3 * std * (1 + 1e-6), name
        assert p.numel() < 5000 or p.abs().max() > 2.8 * std, name


def test_init_std_and_n_are_as_asked():
    torch.manual_seed(0)
    attn = ATTENTION["mfa_kr"](Config(attn="mfa_kr", dim=256, latent_dim=64, init_std=0.5))
    assert attn.s_q.weight.std().item() == pytest.approx(0.5 * TRUNCATED, rel=0.03)
    assert attn.n.weight.std().item() == pytest.approx(0.5 * TRUNCATED, rel=0.05)
    assert (attn.alpha == 0).all()


@pytest.mark.parametrize("attn", ["fpba", "mha", "mla", "mfa"])
def test_values_and_outputs_can_start_smaller(attn):
    torch.manual_seed(0)
    layer = ATTENTION[attn](Config(attn=attn, dim=64, vo_std=0.01), layer=1)
    for name, p in layer.named_parameters():
        leaf = name.removesuffix(".weight")
        std = 0.01 if leaf in ("s_v", "v", "o", "U") else layer.cfg.std
        assert p.std().item() == pytest.approx(std / (2 if leaf in ("o", "U") else 1) * TRUNCATED, rel=0.1), name


def test_the_paper_width_needs_no_scaling():
    assert preset("paper-1b").std == preset("paper-7b").std == 0.02


# ---------------------------------------------------------------------------------------------------------------------
# Mixture of experts


def moe(**fields) -> MoE:
    sizes = dict(n_expert=5, n_expert_active=2, moe_ffn_dim=7, shared_ffn_dim=9)
    return randomized(MoE(config("mfa", **{**sizes, **fields})))


def test_the_first_layer_is_dense_and_the_others_have_experts():
    model = GPT(config("mha", n_layer=3, n_expert=4, moe_ffn_dim=8))
    assert [type(block.ffn) for block in model.blocks] == [SwiGLU, MoE, MoE]
    assert [type(block.ffn) for block in GPT(config("mha")).blocks] == [SwiGLU, SwiGLU]


@pytest.mark.parametrize("shared", [0, 9])
@pytest.mark.parametrize("k", [1, 2, 5])
def test_experts_equal_a_dense_sum_whose_weights_are_not_renormalised(k, shared):
    layer = moe(n_expert_active=k, shared_ffn_dim=shared)
    x = vectors(2, 6, 22)
    p = (x @ layer.router.weight.T).softmax(-1)  # (B, T, E)
    least = p.sort(dim=-1, descending=True).values[..., k - 1 : k]
    p = torch.where(p >= least, p, 0)
    assert k == 5 or (p.sum(-1) < 1).all()
    y = sum(p[..., e, None] * expert(x) for e, expert in enumerate(layer.experts))
    assert difference(layer(x), y + layer.shared(x) if shared else y) < 1e-12


def test_the_balance_loss_is_one_when_the_load_is_even_and_more_when_it_is_not():
    layer = moe(n_expert=22, n_expert_active=1)
    layer.router.weight.data = 9 * torch.eye(22, dtype=torch.float64)
    layer(torch.eye(22, dtype=torch.float64))  # one token for each expert
    assert torch.allclose(layer.load, torch.tensor(1 / 22))
    assert layer.balance.item() == pytest.approx(1, rel=1e-6)
    layer(torch.eye(22, dtype=torch.float64)[:1].expand(22, -1))  # all tokens for the first
    assert layer.load[0] == 1 and layer.balance > 20


def test_loads_add_up_to_one():
    layer = moe()
    layer(vectors(3, 11, 22))
    assert layer.load.shape == (5,) and layer.load.sum().item() == pytest.approx(1)


def test_the_balance_loss_is_added_in_training_alone():
    model = gpt("mha", n_layer=3, n_expert=4, moe_ffn_dim=8, balance_coef=0.25)
    idx = tokens(model.cfg)
    entropy = model.eval()(idx, idx)[1]
    loss = model.train()(idx, idx)[1]
    balance = sum(block.ffn.balance for block in model.blocks[1:])
    assert loss.item() == pytest.approx((entropy + 0.25 * balance).item(), rel=1e-12) and balance > 1


def test_experts_and_router_train():
    model = gpt("mfa", n_expert=4, moe_ffn_dim=8).train()
    idx = tokens(model.cfg, B=8)
    model(idx, idx)[1].backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


@pytest.mark.parametrize("case", ["mha", "mfa_kr gated pre"])
def test_cached_chunks_equal_the_full_pass_with_experts(case):
    model = gpt(case, n_layer=3, n_expert=4, moe_ffn_dim=8, shared_ffn_dim=8)
    idx, cache = tokens(model.cfg), KVCache(model, 2, 17)
    logits = torch.cat([model(chunk, cache=cache)[0] for chunk in idx.split([5, 1, 1, 10], dim=1)], dim=1)
    assert difference(logits, model(idx)[0]) < 1e-12


# ---------------------------------------------------------------------------------------------------------------------
# The model


def test_the_loss_is_the_mean_over_targets_other_than_minus_one():
    model = gpt("mfa")
    idx, targets = tokens(model.cfg), tokens(model.cfg).flip(1)
    targets[0, :9] = -1
    logits, loss = model(idx, targets)
    at = targets != -1
    expected = -logits.log_softmax(-1)[at].gather(1, targets[at][:, None]).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    assert model(idx)[1] is None


def test_the_output_head_is_the_embedding_or_another_matrix():
    tied, untied = GPT(config("mha")), GPT(config("mha", tied=False))
    assert tied.head.weight is tied.embed.weight and untied.head.weight is not untied.embed.weight
    sizes = [sum(p.numel() for p in model.parameters()) for model in (tied, untied)]
    assert sizes[1] - sizes[0] == tied.cfg.vocab_size * tied.cfg.dim


def test_dropout_acts_in_training_alone():
    model = gpt("mfa", dropout=0.5)
    idx = tokens(model.cfg)
    assert torch.equal(model.eval()(idx)[0], model(idx)[0])
    assert not torch.equal(model.train()(idx)[0], model(idx)[0])
    embedded = []
    model.blocks[0].register_forward_pre_hook(lambda _, inputs: embedded.append(inputs[0]))
    model(idx)
    assert 0.4 < (embedded[0] == 0).double().mean() < 0.6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@every_case_normed_too
def test_generation_is_the_same_with_and_without_the_cache(case, dtype):
    """Also past block_size, where the context starts anew."""
    model = gpt(case, block_size=12).to(dtype)
    prompt = tokens(model.cfg, T=5)
    for how in (dict(temperature=0), dict(top_k=20, top_p=0.95, temperature=0.8)):
        with_cache, without = (
            model.generate(prompt, 20, use_cache=use, generator=torch.Generator().manual_seed(4), **how)
            for use in (True, False)
        )
        assert torch.equal(with_cache, without)
        assert with_cache.shape == (2, 25) and torch.equal(with_cache[:, :5], prompt)


@pytest.mark.parametrize("block_size, lengths", [(6, [4, 5, 6, 3, 4, 5, 6, 3, 4]), (1, [1, 1, 1, 1])])
def test_at_block_size_the_context_starts_anew_from_its_last_half(block_size, lengths):
    model = gpt("mha", block_size=block_size)
    contexts = []
    model.embed.register_forward_pre_hook(lambda _, inputs: contexts.append(inputs[0]))
    prompt = tokens(model.cfg, T=min(4, block_size))
    out = model.generate(prompt, len(lengths), use_cache=False, generator=torch.Generator().manual_seed(0))
    assert [context.shape[1] for context in contexts] == lengths
    for end, context in enumerate(contexts, prompt.shape[1]):
        assert torch.equal(context, out[:, end - context.shape[1] : end])


def test_generate_leaves_training_mode_as_it_was():
    model = gpt("mfa")
    for mode in (True, False):
        model.train(mode)
        model.generate(tokens(model.cfg, T=3), 2)
        assert model.training is model.blocks[0].training is mode


def test_equal_generators_draw_equal_tokens():
    model = gpt("mfa")
    draw = [model.generate(tokens(model.cfg, T=3), 15, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert torch.equal(draw[0], draw[1]) and not torch.equal(draw[0], draw[2])


def test_pick_draws_from_what_top_k_and_top_p_leave():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().expand(4000, -1)
    generator = torch.Generator().manual_seed(0)

    def share(**how):
        how = dict(temperature=1.0, top_k=None, top_p=None) | how
        return torch.bincount(pick(logits, **how, generator=generator)[:, 0], minlength=4) / len(logits)

    def close(got, *expected):
        return torch.allclose(got, torch.tensor(expected), atol=0.03) and all(got[torch.tensor(expected) == 0] == 0)

    assert close(share(), 0.5, 0.3, 0.15, 0.05)
    assert close(share(temperature=0), 1.0, 0.0, 0.0, 0.0)
    assert close(share(temperature=1e-300), 1.0, 0.0, 0.0, 0.0)
    assert close(share(top_k=1), 1.0, 0.0, 0.0, 0.0)
    assert close(share(top_k=2), 0.625, 0.375, 0.0, 0.0)
    assert close(share(top_k=9), 0.5, 0.3, 0.15, 0.05)
    assert close(share(top_p=0.4), 1.0, 0.0, 0.0, 0.0)
    assert close(share(top_p=1e-50), 1.0, 0.0, 0.0, 0.0)
    even = pick(torch.zeros(500, 9), 1.0, 3, None, generator)
    assert len(even.unique()) == 3  # of ties no more are left than were asked for
    assert close(share(top_p=0.7), 0.625, 0.375, 0.0, 0.0)
    assert close(share(top_p=1.0), 0.5, 0.3, 0.15, 0.05)
    assert close(share(temperature=0.5), 0.25 / 0.365, 0.09 / 0.365, 0.0225 / 0.365, 0.0025 / 0.365)


# ---------------------------------------------------------------------------------------------------------------------
# Configurations


@pytest.mark.parametrize(
    "name, attn, millions",
    [
        ("tiny", "mha", 0.8),
        ("baby", "mha", 10.7),
        ("small", "mha", 123.6),
        ("paper-1b", "mha", 1083),
    ],
)
def test_presets_have_the_sizes_they_are_named_for(name, attn, millions):
    with torch.device("meta"):
        model = GPT(preset(name, attn))
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.01)


@pytest.mark.parametrize("attn, billions", [("mha", "6.93"), ("mfa", "6.92"), ("mfa_kr", "6.93")])
def test_the_7b_preset_adds_up_as_table_7_does(attn, billions):
    with torch.device("meta"):
        assert f"{params_without_embedding(GPT(preset('paper-7b', attn))) / 1e9:.2f}" == billions


@pytest.mark.parametrize("name", PRESETS)
def test_mfa_keeps_an_eighth_of_mhas_cache_and_key_reuse_a_sixteenth_at_every_preset(name):
    mha, mfa, kr = (ATTENTION[attn].counts(preset(name, attn)).kv_cache for attn in ("mha", "mfa", "mfa_kr"))
    assert mfa * 8 == kr * 16 == mha


def test_defaults_are_resolved_on_use_so_replace_stays_right():
    cfg = preset("paper-1b", "mfa")
    heads = {attn: replace(cfg, attn=attn).heads for attn in ATTENTION}
    assert heads == dict(fpba=2048, mha=16, mqa=16, gqa=16, mla=16, mfa=14, mfa_kr=14)
    assert (cfg.latent, cfg.query_rank, cfg.std) == (256, 256, 0.02)
    half = replace(cfg, dim=1024)
    assert (half.latent, half.query_rank, half.std) == (128, 128, pytest.approx(0.02 * math.sqrt(2)))
    assert replace(cfg, attn="mha", dim=1024).heads == 8
    assert (replace(cfg, latent_dim=100).query_rank, replace(cfg, q_rank=77).latent) == (100, 256)
    assert Config(dim=128).ffn == 344 and Config(attn="mfa").heads == 16 and preset("tiny", "mla", dim=64).heads == 2


IMPOSSIBLE = [
    (dict(attn="mfa2"), "attn must be one of fpba, mha, mqa, gqa, mla, mfa, mfa_kr, not 'mfa2'"),
    (dict(pos="learned"), "pos must be one of rope, alibi, none, not 'learned'"),
    (dict(dim=0), "dim must be at least 1, not 0"),
    (dict(dim=-8), "dim must be at least 1, not -8"),
    (dict(n_layer=0), "n_layer must be at least 1, not 0"),
    (dict(block_size=0), "block_size must be at least 1, not 0"),
    (dict(vocab_size=-1), "vocab_size must not be negative, not -1"),
    (dict(n_head=-2), "n_head must not be negative, not -2"),
    (dict(latent_dim=-1), "latent_dim must not be negative, not -1"),
    (dict(q_rank=-1), "q_rank must not be negative, not -1"),
    (dict(ffn_dim=-1), "ffn_dim must not be negative, not -1"),
    (dict(init_std=-0.1), "init_std must not be negative, not -0.1"),
    (dict(vo_std=-0.1), "vo_std must not be negative, not -0.1"),
    (dict(n_expert=-1), "n_expert must not be negative, not -1"),
    (dict(shared_ffn_dim=-1), "shared_ffn_dim must not be negative, not -1"),
    (dict(dropout=1.0), "dropout must be in [0, 1), not 1.0"),
    (dict(norm_eps=0), "norm_eps must be positive, not 0"),
    (dict(rope_base=1), "rope_base must be more than 1, not 1"),
    (dict(attn="mha", head_dim=0), "head_dim must be at least 1, not 0"),
    (dict(attn="mha", head_dim=31), "head_dim must be even, since pos='rope' rotates pairs, not 31"),
    (dict(attn="mha", head_dim=256), "head_dim 256 leaves no head in dim 128: make it smaller, or give n_head"),
    (dict(attn="gqa", n_head=5), "n_head 5 must be a multiple of n_kv_head 2"),
    (dict(attn="gqa", n_kv_head=0), "n_kv_head must be at least 1, not 0"),
    (dict(attn="mla", rope_dim=7), "rope_dim must be even, since pos='rope' rotates pairs, not 7"),
    (dict(attn="mla", rope_dim=0), "rope_dim must be at least 1, not 0"),
    (dict(attn="mla", latent_norm=True), "latent_norm of mla needs joint_kv: it has no place on separate latents"),
    (dict(attn="mfa", latent_dim=9), "latent_dim must be even, since pos='rope' rotates pairs, not 9"),
    (dict(attn="mfa", dim=6), "latent_dim 0 means dim // 8, which is 0 at dim 6: give latent_dim"),
    (dict(attn="mfa", mfa_n_head=0), "mfa_n_head must be at least 1, not 0"),
    (dict(attn="mfa_kr", key_reuse="twice"), "key_reuse must be one of gated, vanilla, proj, residual, not 'twice'"),
    (dict(attn="mfa_kr", key_reuse_rope="x"), "key_reuse_rope must be one of pre, post, inverse, not 'x'"),
    (dict(attn="fpba", n_head=4), "fpba has one head per channel: n_head must be 0 or 128, not 4"),
    (dict(attn="fpba", dim=33), "dim must be even, since pos='rope' rotates pairs, not 33"),
    (dict(n_expert=4), "moe_ffn_dim must be at least 1, not 0"),
    (dict(n_expert=4, moe_ffn_dim=8, n_expert_active=0), "n_expert_active must be at least 1, not 0"),
    (dict(n_expert=4, moe_ffn_dim=8, n_expert_active=5), "n_expert_active 5 is more than n_expert 4"),
]


@pytest.mark.parametrize("fields, sentence", IMPOSSIBLE)
def test_an_impossible_config_is_refused_in_one_sentence(fields, sentence):
    with pytest.raises(ValueError) as e:
        Config(**fields)
    assert str(e.value) == sentence


@pytest.mark.parametrize(
    "fields",
    [
        dict(attn="mha", rope_dim=7, latent_dim=9, n_kv_head=0, key_reuse="twice", latent_norm=True, mfa_n_head=0),
        dict(attn="mfa", head_dim=0, rope_dim=7),
        dict(attn="mla", pos="none", rope_dim=7, latent_dim=9, head_dim=5),
        dict(attn="mqa", n_kv_head=3, n_head=4),
    ],
)
def test_an_attention_checks_only_the_fields_it_uses(fields):
    GPT(Config(n_layer=1, **fields))(torch.zeros(1, 3, dtype=torch.long))


def model_and(**fields):
    model = gpt("mfa", **fields)
    return model, tokens(model.cfg)


REFUSED = {
    "a preset that does not exist": (lambda m, i: preset("nano"), "preset must be one of tiny, baby"),
    "a model without a vocabulary": (lambda m, i: GPT(Config(vocab_size=0)), "vocab_size must be at least 1"),
    "an id too large": (lambda m, i: m(i * 0 + 31), "token ids must be 0 to 30 .vocab_size., not 31"),
    "a negative id": (lambda m, i: m(i * 0 - 1), "token ids must be 0 to 30 .vocab_size., not -1"),
    "more tokens than block_size": (lambda m, i: m(i.repeat(1, 2)), "takes 1 to 24 tokens .block_size., not 34"),
    "no token": (lambda m, i: m(i[:, :0]), "takes 1 to 24 tokens .block_size., not 0"),
    "a cache for nobody": (lambda m, i: KVCache(m, 0, 5), "at least 1, not 0, 5"),
    "a cache for nothing": (lambda m, i: KVCache(m, 1, 0), "at least 1, not 1, 0"),
    "a cache that overflows": (lambda m, i: m(i, cache=KVCache(m, 2, 16)), "the cache holds 16 tokens; 17 do not fit"),
    "a cache of another batch": (lambda m, i: m(i, cache=KVCache(m, 3, 20)), "made for a batch of 3, not 2"),
    "a prompt too long": (lambda m, i: m.generate(i.repeat(1, 2), 1), "prompt must have 1 to 24 tokens"),
    "an empty prompt": (lambda m, i: m.generate(i[:, :0], 1), "prompt must have 1 to 24 tokens"),
    "a prompt of unknown ids": (lambda m, i: m.generate(i + 31, 1), "token ids must be 0 to 30"),
    "a negative temperature": (lambda m, i: m.generate(i, 1, temperature=-1), "temperature must be 0"),
    "no temperature": (lambda m, i: m.generate(i, 1, temperature=math.nan), "temperature must be 0"),
    "top_k of nothing": (lambda m, i: m.generate(i, 1, top_k=0), "top_k must be at least 1, not 0"),
    "top_p of nothing": (lambda m, i: m.generate(i, 1, top_p=0.0), "top_p must be in .0, 1., not 0"),
    "a negative number of tokens": (lambda m, i: m.generate(i, -1), "max_new_tokens must not be negative"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_call_that_cannot_be_served_is_refused_in_one_sentence(what):
    call, sentence = REFUSED[what]
    with pytest.raises(ValueError, match=sentence) as e:
        call(*model_and())
    assert "\n" not in str(e.value)


def test_an_fpba_too_large_to_allocate_says_how_large_and_can_be_counted_on_the_meta_device():
    cfg = preset("paper-1b", "fpba")
    with pytest.raises(ValueError, match="fpba at dim 2048 and n_layer 20 takes 1,374 GB"):
        GPT(replace(cfg, vocab_size=10**15))  # an embedding that could not be made either: it is not tried
    with torch.device("meta"):
        attn = ATTENTION["fpba"](cfg)
    assert sum(p.numel() for p in attn.parameters()) == attn.counts(cfg).params == 2 * 2048**3


def test_the_loss_falls_within_a_few_steps_for_every_attention():
    for attn in ATTENTION:
        torch.manual_seed(0)
        cfg = Config(attn=attn, vocab_size=16, block_size=16, n_layer=1, dim=16, head_dim=8, latent_dim=8, rope_dim=4)
        model = GPT(cfg)
        idx = torch.randint(16, (4, 17))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        losses = []
        for _ in range(20):
            _, loss = model(idx[:, :-1], idx[:, 1:])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[0] == pytest.approx(math.log(16), rel=0.05) and losses[-1] < 0.8 * losses[0], attn


class Elsewhere(torch.Tensor):
    """A tensor that says it lies on a Mac's GPU."""

    device = torch.device("mps")


def test_scores_without_sdpas_grouping_are_the_same(monkeypatch):
    """enable_gqa may be missing on other devices; there keys and values are repeated."""
    attn = attention("gqa")
    x = states(attn.cfg)
    expected = attn(x)
    sdpa, arange, heads = F.scaled_dot_product_attention, torch.arange, []

    def without_grouping(q, k, v, *args, enable_gqa=False, **kwargs):
        assert not enable_gqa and all(t.is_contiguous() for t in (q, k, v))
        heads.append((q.shape[1], k.shape[1], v.shape[1]))
        return sdpa(q, k, v, *args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", without_grouping)
    monkeypatch.setattr(torch, "arange", lambda *args, device=None, **how: arange(*args, **how))
    found = attn(x.as_subclass(Elsewhere)).as_subclass(torch.Tensor)
    assert difference(found, expected) < 1e-12 and heads == [(6, 6, 6)]


@pytest.mark.parametrize("case", [case for case in ALL if "fpba" not in case])  # no other has FPBA's width of H
def test_the_gradient_reaches_attention_with_the_same_strides_in_all_models(case, monkeypatch):
    """cuDNN's plan of a backward pass is kept for the next model, and knows no other strides (train.attention_kernels)."""

    def noted(*args, **kwargs):
        o = attend(*args, **kwargs)
        o.register_hook(strides.append)
        return o

    attend, strides = F.scaled_dot_product_attention, []
    monkeypatch.setattr(F, "scaled_dot_product_attention", noted)
    attn = attention(case)
    attn(states(attn.cfg)).square().sum().backward()
    (gradient,) = strides  # (B, n, T, w)
    assert gradient.transpose(1, 2).is_contiguous()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("T", "order"), [(128, ("inverse", "pre", "post")), (192, ("pre", "inverse", "post"))])
def test_models_after_one_another_get_the_gradients_that_other_kernels_give(T, order):
    """Each order at a length of its own: its first model makes the plan, which the others meet."""
    sizes = dict(vocab_size=101, block_size=T, n_layer=2, dim=128, n_head=4, latent_dim=64, ffn_dim=128)
    device = torch.device("cuda")
    for reading in order:
        torch.manual_seed(0)
        model = GPT(Config(attn="mfa_kr", key_reuse_rope=reading, **sizes)).to(device)
        weights = [p for block in model.blocks for p in block.attn.parameters()]
        for block in model.blocks:
            torch.nn.init.normal_(block.attn.alpha, 0.5)
        idx, found = torch.randint(101, (8, T + 1), device=device), []
        for others in (False, True):
            with attention_kernels(device, decoding=others), torch.autocast("cuda", torch.bfloat16):
                loss = model(idx[:, :-1], idx[:, 1:])[1]
            found.append(torch.autograd.grad(loss, weights))
        for ours, theirs in zip(*found, strict=True):
            assert ((ours - theirs).norm() / theirs.norm()).item() < 0.05, reading


# --------------------------------------------------------------------------------------------------
# What a rebuilding might lose without a word


@the_seven
def test_dropout_acts_on_attention_weights_in_training_alone(case):
    attn = attention(case, dropout=0.5)
    x = states(attn.cfg)
    whole = attn.eval()(x)
    assert torch.equal(attn(x), whole)
    attn.train()
    assert difference(attn(x), whole) > 1e-2 and difference(attn(x), attn(x)) > 1e-2


@pytest.mark.parametrize("silent", ["attn.o", "ffn.w2"])
def test_dropout_acts_on_what_attention_and_ffn_add_to_the_residual(silent):
    block = gpt("mha", dropout=0.5).train().blocks[0]
    torch.nn.init.zeros_(block.get_parameter(f"{silent}.weight"))
    x = states(block.attn.cfg)
    assert 0.4 < (block(x) == x).double().mean() < 0.6


def test_swiglu_gates_w3_with_the_silu_of_w1():
    ffn = randomized(SwiGLU(5, 8))
    x, (w1, w3, w2) = vectors(3, 5), (getattr(ffn, name).weight.T for name in ("w1", "w3", "w2"))
    gate = x @ w1
    assert difference(ffn(x), (gate * gate.sigmoid() * (x @ w3)) @ w2) < 1e-12


@the_seven
def test_the_rotary_base_is_the_configs(case):
    one, other = (attention(case, rope_base=base) for base in (100.0, 10_000.0))
    assert difference(one(states(one.cfg)), other(states(one.cfg))) > 1e-3


@pytest.mark.parametrize("case", ["mha", "mla", "mla straight query", "mfa high q_rank"])
def test_no_rank_exceeds_the_models_width(case):
    attn = attention(case, "none", dim=4)
    counts, measured = attn.counts(attn.cfg), ranks(attn)
    assert measured.heads == [4] * counts.heads and measured.key_side == 4
    assert (counts.rank, counts.shared_dim, counts.total_rank) == (4, 4, 4 * counts.heads)


def test_the_ffn_is_eight_thirds_of_the_width_rounded_up_to_a_multiple_of_eight():
    for dim in range(2, 200, 2):
        ffn = Config(attn="mha", dim=dim, head_dim=2).ffn
        assert ffn % 8 == 0 and ffn - 8 < 8 * dim / 3 <= ffn


def test_what_is_given_beats_what_the_preset_has_for_the_attention():
    assert preset("paper-7b", "mfa", n_expert=5, moe_ffn_dim=16).n_expert == 5


def test_router_and_loss_are_no_less_than_float32():
    layer, x = moe().bfloat16(), vectors(3, 50, 22).bfloat16()
    layer(x)
    share = layer.router(x).double().softmax(-1).flatten(0, 1).mean(0)
    assert layer.balance.item() == pytest.approx(5 * (layer.load * share).sum().item(), rel=1e-5)
    model = gpt("mfa").bfloat16()
    assert model(tokens(model.cfg), tokens(model.cfg))[1].dtype == torch.float32


def test_a_roomy_cache_does_not_lengthen_the_context():
    model = gpt("mfa")  # block_size 24
    cache = KVCache(model, 2, 40)
    model(tokens(model.cfg), cache=cache)
    with pytest.raises(ValueError, match="takes 1 to 24 tokens .block_size., not 25"):
        model(tokens(model.cfg, T=8), cache=cache)


def test_temperature_top_k_and_top_p_act_one_after_the_other():
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log().expand(4000, -1)

    def drawn(logits, **how):
        how = dict(temperature=1.0, top_k=None, top_p=None) | how
        return pick(logits, **how, generator=torch.Generator().manual_seed(0)).unique().tolist()

    assert drawn(logits, top_p=0.5) == [0, 1] and drawn(logits, top_p=0.5, temperature=0.4) == [0]
    assert drawn(logits, top_k=2, top_p=0.5) == [0]  # 0.4 of the 0.7 that top_k leaves
    assert drawn(logits, top_k=2, top_p=1.0) == [0, 1]
    even = torch.zeros(4000, 4)
    assert (
        len(drawn(even, top_p=0.5)) == 2 and len(drawn(even, top_p=0.51)) == 3
    )  # reached exactly, and not


def test_generation_in_training_mode_knows_neither_dropout_nor_gradients():
    model, grads = gpt("mfa", dropout=0.5), []
    prompt = tokens(model.cfg, T=3)
    quiet = model.generate(prompt, 9, temperature=0)
    model.norm.register_forward_hook(lambda *_: grads.append(torch.is_grad_enabled()))
    assert torch.equal(model.train().generate(prompt, 9, temperature=0), quiet)
    assert grads == [False] * 9


def test_a_model_in_bfloat16_draws_from_its_logits_in_float32():
    model = gpt("mfa").bfloat16()
    prompt = tokens(model.cfg, B=5000, T=2)
    one, other = (torch.Generator().manual_seed(0) for _ in range(2))
    drawn = pick(model.next_logits(prompt, None).float(), 1.0, None, None, one)
    assert torch.equal(model.generate(prompt, 1, generator=other)[:, 2:], drawn)


def test_every_norm_adds_the_configs_epsilon():
    model = gpt("mfa normed", norm_eps=0.5)
    norms = [module for module in model.modules() if isinstance(module, torch.nn.RMSNorm)]
    assert len(norms) == 2 * 3 + 1  # before and inside each attention, before each FFN, at the end
    for norm in norms:
        x = vectors(3, *norm.weight.shape)
        expected = x / (x.square().mean(-1, keepdim=True) + 0.5).sqrt() * norm.weight
        assert difference(norm(x), expected) < 1e-12


# --------------------------------------------------------------------------------------------------
# One attention in a block of one's own


def test_two_attentions_of_the_same_layer_do_not_share_a_cache():
    cfg = config("mfa")
    one, other = (randomized(ATTENTION["mfa"](cfg)) for _ in range(2))
    with pytest.raises(ValueError, match="layer=0, 1, 2 ..., each its own, not .0, 0."):
        KVCache(torch.nn.ModuleList([one, other]), 2, 8)
    cache = KVCache(one, 2, 8)
    one(states(cfg), cache)
    with pytest.raises(ValueError, match="two attentions have layer=0: give each its own"):
        other(states(cfg), cache)


@the_seven
def test_attentions_in_a_module_of_ones_own_decode_with_a_cache_as_without(case):
    cfg = config(case)
    mine = torch.nn.ModuleList(randomized(ATTENTION[cfg.attn](cfg, layer)) for layer in (0, 1))
    x = states(cfg)
    cache = KVCache(mine, 2, 7)
    parts = []
    for part in x.split([4, 1, 2], dim=1):
        parts.append(mine[1](mine[0](part, cache), cache))
        cache.length += part.shape[1]
    assert difference(torch.cat(parts, dim=1), mine[1](mine[0](x))) < 1e-12


def test_top_p_of_one_cuts_nothing():
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 50_304, generator=g).expand(2000, -1) * 1e-3
    seeds = [torch.Generator().manual_seed(1) for _ in range(2)]
    assert torch.equal(pick(logits, top_p=1.0, generator=seeds[0]), pick(logits, generator=seeds[1]))


def test_the_preset_of_fpba_is_small():
    sizes = [
        sum(p.numel() for p in GPT(preset("tiny", attn)).parameters()) for attn in ("fpba", "mha")
    ]
    assert sizes[0] < 2 * sizes[1]


def test_a_class_that_lacks_a_method_says_which():
    with pytest.raises(TypeError, match="Half is an Attention without to_cache.., qk_circuit"):

        class Half(Attention):
            build = counts = query = vo_circuit = None
