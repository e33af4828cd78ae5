"""The fast decode step against mfa.py's own, and that its benchmark runs. What needs a GPU is skipped without one."""

import gc
import json
import runpy
import weakref
from dataclasses import replace

import pytest
import torch
from attentions import ALL, MAIN, POSITIONS, READINGS, difference, gpt, tokens
from runs import ROOT, command
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func

from experiments.bench import decoding as bench_decode
from mfa import ATTENTION, GPT, MFAKR, MHA, MLA, Attention, KVCache, preset
from sample import stream
from support import decode
from support.decode import Decoder

MODES = (*MAIN, "mfa_kr gated post", "mfa_kr gated inverse", "mla joint")
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
KERNELS = "cuda" if torch.cuda.is_available() else "cpu"  # there Triton interprets them: conftest.py


@torch.no_grad()
def logits(model: GPT, idx: torch.Tensor, step=None, prompt: int = 5, dtype=None) -> torch.Tensor:
    """Of every token from the prompt's end on, fed one by one: (T - prompt + 1, B, vocab_size)."""
    cache = KVCache(model, len(idx), idx.shape[1], dtype)
    out = [model.next_logits(idx[:, :prompt], cache)]
    for t in range(prompt, idx.shape[1]):
        out.append((step or GPT.next_logits)(model, idx[:, t : t + 1], cache).clone())
    assert cache.length == idx.shape[1]
    return torch.stack(out)


def text(model: GPT, idx: torch.Tensor, n: int, **how) -> torch.Tensor:
    """The prompts idx (B, T) and what sample.py streams after them: (B, T + n)."""
    return torch.cat((idx, *stream(model, idx, n, **how)), dim=1)


# ---------------------------------------------------------------------------------------------------------------------
# The step, without graphs


@pytest.mark.parametrize("pos", POSITIONS)
@pytest.mark.parametrize("case", ALL)
def test_the_step_gives_the_logits_of_the_model(case, pos):
    model = gpt(case, pos)
    idx = tokens(model.cfg)
    assert difference(logits(model, idx, Decoder(model)), logits(model, idx)) < 1e-13


@pytest.mark.parametrize("case", MODES)
def test_greedy_text_is_the_same_with_the_step_with_the_cache_and_without(case):
    model = gpt(case).float()
    idx = tokens(model.cfg, B=3, T=4)
    fast, cached, plain = (
        text(model, idx, 50, temperature=0, **how)  # a context of 24: the window starts anew several times
        for how in (dict(decode=Decoder(model)), {}, dict(use_cache=False))
    )
    assert torch.equal(fast, cached) and torch.equal(cached, plain)


def test_equal_seeds_give_equal_texts():
    model = gpt("mfa").float()
    idx, step = tokens(model.cfg, T=3), Decoder(model)
    a, b = (
        text(model, idx, 20, top_k=9, top_p=0.9, generator=torch.Generator().manual_seed(7), decode=how)
        for how in (step, None)
    )
    assert torch.equal(a, b)


@pytest.mark.parametrize("case", MODES)
def test_what_is_not_filled_is_not_read(case):
    model = gpt(case)
    idx, cache = tokens(model.cfg, T=6), KVCache(model, 2, 20)
    with torch.no_grad():
        expected = model.next_logits(idx, None)
        model.next_logits(idx[:, :5], cache)
    for kept in (t for layer in cache.layers for t in layer):
        kept[:, :, 5:] = torch.nan
    assert difference(Decoder(model)(model, idx[:, 5:], cache), expected) < 1e-13


def test_the_cache_may_be_of_another_type():
    model = gpt("mfa").float()
    idx = tokens(model.cfg)
    assert difference(logits(model, idx, Decoder(model), dtype=torch.bfloat16), logits(model, idx, dtype=torch.bfloat16)) < 1e-5


def test_one_decoder_serves_one_cache_after_the_other():
    model = gpt("gqa")
    step = Decoder(model)
    for B, T in ((2, 9), (3, 12), (2, 9)):
        idx = tokens(model.cfg, B, T)
        assert difference(logits(model, idx, step), logits(model, idx)) < 1e-13


def test_it_keeps_no_cache_alive():
    model = gpt("mfa")
    step, cache = Decoder(model), KVCache(model, 1, 4)
    step(model, tokens(model.cfg, 1, 1), cache)
    kept = weakref.ref(cache.layers[0][0])
    del cache
    gc.collect()
    assert kept() is None


def test_a_full_cache_another_batch_another_model_and_experts_are_refused():
    model = gpt("mfa")
    step, cache, new = Decoder(model), KVCache(model, 2, 1), tokens(model.cfg, 2, 1)
    step(model, new, cache)
    for wrong, told in ((new, "behind 1 tokens"), (new[:1], "(2, 1) new ids")):
        with pytest.raises(ValueError, match=told.replace("(", r"\(").replace(")", r"\)")):
            step(model, wrong, cache)
    with pytest.raises(ValueError, match="another model"):
        step(gpt("mfa"), new, KVCache(model, 2, 4))
    with pytest.raises(ValueError, match="experts"):
        Decoder(GPT(replace(model.cfg, n_expert=4, moe_ffn_dim=8)))


# ---------------------------------------------------------------------------------------------------------------------
# Its parts


@pytest.mark.skipif(decode.triton is None, reason="needs Triton")
def test_parts_of_a_softmax_merge_into_the_whole():
    s, v = torch.randn(12, 220, device=KERNELS), torch.randn(12, 220, 6, device=KERNELS)  # (rows, S), (rows, S, w)
    cuts = [*range(0, 220, 20), 220]  # eleven parts, and one without keys
    P = len(cuts)
    acc, top, total = s.new_zeros(P, 12, 6), s.new_full((P, 12), -torch.inf), s.new_zeros(P, 12)
    for i, (a, b) in enumerate(zip(cuts, cuts[1:], strict=False)):
        top[i] = s[:, a:b].amax(-1)
        p = (s[:, a:b] - top[i][:, None]).exp()
        acc[i], total[i] = torch.einsum("rs,rsw->rw", p, v[:, a:b]), p.sum(-1)
    y = s.new_empty(12, 6)
    decode.merge_kernel[(12, 2)](acc, top, total, y, 12, P, 6, 16, 4)
    assert difference(y, torch.einsum("rs,rsw->rw", s.softmax(-1), v)) < 1e-6


@pytest.mark.parametrize("pairs", [1, 4, 32, 128, 512, 1000])
def test_the_cut_of_the_keys_keeps_the_gpu_busy(pairs):
    slots = 396
    n = decode.number_of_splits(pairs, steps=512, programs=slots)
    rounds = -(-pairs * n // slots)
    assert 1 <= n <= 128 and (pairs * n / (rounds * slots) > 0.85 or pairs * 128 < slots)


def test_all_layers_and_all_batches_above_one_share_a_compilation(monkeypatch):
    seen = []

    def counting(graph, _):
        seen.append(graph)
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(decode.attention_to_query, dynamic=True, fullgraph=True, backend=counting)
    monkeypatch.setattr(decode, "compile_once", lambda function: compiled if function is decode.attention_to_query else function)
    model = gpt("mfa", n_layer=4, n_head=4)
    step = Decoder(model, compiled=True)
    for B, T, expected in ((5, 9, 1), (7, 13, 1), (1, 9, 2)):
        idx = tokens(model.cfg, B, T)
        assert difference(logits(model, idx, step), logits(model, idx)) < 1e-13
        assert len(seen) == expected
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("case", "products"),  # besides O, W_2, and those on a latent: the joint one of W_1 and W_3, and the one named
    [("mha", 4), ("gqa", 4), ("mfa", 5), ("mfa_kr gated post", 6), ("mla joint straight query", 4)],
)
def test_matrices_of_one_vector_take_one_product(case, products):
    """MHA: q k v | o | w1 w3 | w2. MFA: s_q s_k s_v | q | ... MFA-KR also N. MLA: q q_rope s_kv k_rope."""
    counted = []

    def count(graph, _):
        counted.append(sum(node.target is torch.ops.aten.mm.default for node in graph.graph.nodes))
        return make_boxed_func(graph.forward)

    torch.compiler.reset()
    model = gpt(case, n_layer=2)
    idx, kept = tokens(model.cfg, B=3, T=7), {name: p.clone() for name, p in model.state_dict().items()}
    expected = logits(model, idx)
    step = Decoder(model, compiled=True)
    step.embed_to_query, step.attention_to_logits = decode.embed_to_query, decode.attention_to_logits
    step.attention_to_query = torch.compile(decode.attention_to_query, dynamic=True, fullgraph=True, backend=aot_autograd(fw_compiler=count))
    assert difference(logits(model, idx, step), expected) < 1e-13
    assert counted == [products]
    assert all(torch.equal(kept[name], p) for name, p in model.state_dict().items())
    torch.compiler.reset()


def test_weights_are_laid_side_by_side_once():
    model = gpt("mfa")
    first, second = Decoder(model, compiled=True), Decoder(model, compiled=True)
    for a, b in zip(first.blocks, second.blocks, strict=True):
        assert (
            a.attn_norm[1].weight.data_ptr()
            == b.attn_norm[1].weight.data_ptr()
            == model.blocks[a.attn.layer].attn.s_q.weight.data_ptr()
        )
    model.load_state_dict({name: torch.randn_like(p) for name, p in model.state_dict().items()})
    idx = tokens(model.cfg)
    assert difference(logits(model, idx, Decoder(model)), logits(model, idx)) < 1e-13  # the plain blocks
    second.embed_to_query, second.attention_to_query, second.attention_to_logits = decode.embed_to_query, decode.attention_to_query, decode.attention_to_logits  # the joint ones, uncompiled
    assert difference(logits(model, idx, second), logits(model, idx)) < 1e-13


@pytest.mark.skipif(decode.triton is None, reason="needs Triton")
@pytest.mark.parametrize("pos", POSITIONS)
@pytest.mark.parametrize("case", ["mha", "gqa", "mla", "mla joint", "mfa", *(f"mfa_kr gated {r}" for r in READINGS)])
def test_the_kernel_computes_attention_on_what_is_filled(case, pos):
    layer = gpt(case, pos, block_size=300).float().to(KERNELS).blocks[0].attn
    kept = [torch.randn(2, g, 300, w, device=KERNELS) for g, w in layer.cache_shapes]
    q = torch.randn(2, layer.n_head, 1, sum(k.shape[-1] for k in decode.keys_and_values(layer, kept)[0]), device=KERNELS)
    table = decode.rotary_table(layer, 300, kept[0]) if decode.rotates_on_read(layer) else None
    for length in (1, 100, 299):
        exact = decode.attend_sdpa(layer, q, kept, length, decode.keys_and_values)
        for t in kept:
            t[:, :, length:] = torch.nan
        got = decode.attend_triton(layer, q, kept, torch.tensor([length - 1], device=KERNELS), table)
        assert difference(got, exact) < 1e-5
        for t in kept:
            t[:, :, length:] = torch.randn_like(t[:, :, length:])


@pytest.mark.parametrize("fraction", [0.2, 0.6])
@pytest.mark.parametrize("case", ["mha", "gqa", "mfa", *(f"mfa_kr gated {r}" for r in READINGS)])
def test_keys_may_turn_in_part(case, fraction):
    model = gpt(case, head_dim=10, rope_fraction=fraction)
    idx = tokens(model.cfg)
    assert difference(logits(model, idx, Decoder(model)), logits(model, idx)) < 1e-13


@pytest.mark.skipif(decode.triton is None, reason="needs Triton")
@pytest.mark.parametrize(("latent_dim", "fraction"), [(10, 0.2), (10, 0.6), (64, 0.5), (48, 0.75), (10, 1.0)])
def test_the_kernel_rotates_what_turns(latent_dim, fraction):
    """Keys that are cached unrotated; the last of their dimensions are rotated."""
    layer = gpt("mfa_kr gated pre", latent_dim=latent_dim, rope_fraction=fraction).float().to(KERNELS).blocks[0].attn
    pairs = torch.cat(decode.rotary_pairs(layer))
    assert pairs.sort().values.tolist() == list(range(latent_dim))
    kept = [torch.randn(2, 1, 90, latent_dim, device=KERNELS)]
    q = torch.randn(2, layer.n_head, 1, latent_dim, device=KERNELS)
    pos = torch.tensor([76], device=KERNELS)
    got = decode.attend_triton(layer, q, kept, pos, decode.rotary_table(layer, 90, q))
    exact = decode.attend_sdpa(layer, q, kept, 77, decode.keys_and_values)
    assert difference(got, exact) < 1e-5
    assert difference(decode.attend_triton(layer, q, kept, pos), exact) < 1e-5  # rotated by from_cache


# ---------------------------------------------------------------------------------------------------------------------
# The whole step by the kernel, and the edges of kernel, cache and context


@pytest.mark.skipif(decode.triton is None, reason="needs Triton")
@pytest.mark.parametrize(
    "case", ["gqa", "mla joint", "mfa", "mfa_kr gated pre", "mfa_kr gated post"]
)
def test_the_whole_step_with_the_kernel_gives_the_logits_of_the_model(case):
    model = gpt(case).float().to(KERNELS)
    idx, step = tokens(model.cfg, T=12).to(KERNELS), Decoder(model, "triton", compiled=False)
    for T in (8, 12):  # a second cache is longer than the first
        expected = logits(model, idx[:, :T])
        assert difference(logits(model, idx[:, :T], step), expected) < 1e-5


@pytest.mark.skipif(decode.triton is None, reason="needs Triton")
@pytest.mark.parametrize("case", ["mha", "mla joint", "mfa", "mfa_kr gated pre"])
def test_the_kernel_reads_a_cache_narrower_than_the_queries(case):
    layer = gpt(case, block_size=40).float().to(KERNELS).blocks[0].attn
    kept = [torch.randn(2, g, 40, w, device=KERNELS).bfloat16() for g, w in layer.cache_shapes]
    width = sum(k.shape[-1] for k in decode.keys_and_values(layer, kept)[0])
    q = torch.randn(2, layer.n_head, 1, width, device=KERNELS)
    table = decode.rotary_table(layer, 40, q) if decode.rotates_on_read(layer) else None
    got = decode.attend_triton(layer, q, kept, torch.tensor([29], device=KERNELS), table)
    assert difference(got, decode.attend_sdpa(layer, q, kept, 30, decode.keys_and_values)) < 1e-5


def test_cosines_and_sines_of_a_narrow_cache_are_kept_in_float16_which_is_finer():
    layer = gpt("mfa_kr gated pre").blocks[0].attn
    exact, found = (
        decode.rotary_table(layer, 300, torch.zeros(1, dtype=d))
        for d in (torch.float64, torch.bfloat16)
    )
    assert exact.dtype == torch.float64 and (found.double() - exact).abs().max() < 2**-11
    assert decode.rotary_table(layer, 9, torch.zeros(1)).dtype == torch.float32


@pytest.mark.skipif(decode.triton is None, reason="needs Triton")
def test_the_kernel_writes_heads_wider_than_one_block_of_columns():
    layer = gpt("mha", head_dim=70, block_size=40).float().to(KERNELS).blocks[0].attn
    kept = [torch.randn(1, g, 40, w, device=KERNELS) for g, w in layer.cache_shapes]
    q = torch.randn(1, layer.n_head, 1, 70, device=KERNELS)
    got = decode.attend_triton(layer, q, kept, torch.tensor([39], device=KERNELS))
    assert difference(got, decode.attend_sdpa(layer, q, kept, 40, decode.keys_and_values)) < 1e-5


def test_a_roomy_cache_does_not_lengthen_the_context_of_the_step():
    model = gpt("mfa")  # block_size 24
    cache, idx = KVCache(model, 2, 40), tokens(model.cfg, T=24)
    step = Decoder(model)
    model.next_logits(idx[:, :23], cache)
    step(model, idx[:, 23:], cache)
    with pytest.raises(ValueError, match="room for at most 24 tokens"):
        step(model, idx[:, :1], cache)


def test_a_cache_of_another_shape_in_the_same_place_is_another_cache():
    model = gpt("mfa")
    step, idx = Decoder(model), tokens(model.cfg, B=4, T=9)
    wide, narrow = KVCache(model, 4, 9), KVCache(model, 2, 9)
    assert difference(run_in(wide, model, idx, step), logits(model, idx)[1]) < 1e-13
    narrow.layers = [[t[:2] for t in layer] for layer in wide.layers]
    assert difference(run_in(narrow, model, idx[:2], step), logits(model, idx[:2])[1]) < 1e-13


@torch.no_grad()
def run_in(cache: KVCache, model: GPT, idx: torch.Tensor, step) -> torch.Tensor:
    """Logits of the sixth token, decoded in this cache."""
    model.next_logits(idx[:, :5], cache)
    return step(model, idx[:, 5:6], cache).clone()


def test_logits_of_the_step_are_float32_in_a_model_in_bfloat16():
    model = gpt("mfa").bfloat16()
    out = Decoder(model)(model, tokens(model.cfg, T=1), KVCache(model, 2, 4))
    assert out.dtype == torch.float32


# ---------------------------------------------------------------------------------------------------------------------
# Attentions of which it knows nothing

TRITON = ["triton"] if decode.triton is not None else []


def plugin(monkeypatch, base: type[Attention], case: str, **methods) -> GPT:
    """A model whose attention is base with these methods."""
    own = type("Own", (base,), methods)
    monkeypatch.setitem(ATTENTION, "own", own)
    return gpt(case, attn="own")


@pytest.mark.parametrize("name", ["visible", "mask", "attend", "forward"])
def test_an_attention_that_decides_by_itself_what_is_seen_is_refused_in_one_line(name, monkeypatch):
    model = plugin(monkeypatch, MHA, "mha", **{name: lambda self, *args: getattr(MHA, name)(self, *args)})
    with pytest.raises(ValueError, match=rf"^Own has its own {name}\(\), .*: decode this model eagerly$"):
        Decoder(model)


def test_the_examples_own_attentions(monkeypatch):
    for name in ("tied2", "window_mqa"):
        monkeypatch.setitem(ATTENTION, name, None)  # so that what the file puts there goes again
    runpy.run_path(str(ROOT / "examples" / "my_attention.py"))
    assert "WindowMQA has its own visible()" in decode.refusal(gpt("mqa", attn="window_mqa"))
    model = gpt("gqa", attn="tied2")
    assert decode.refusal(model) is None
    check_all_ways(model)


def twice_the_value(base: type[Attention]):
    def from_cache(self, *cached):
        k, v = base.from_cache(self, *cached)
        return k, 2 * v

    return from_cache


@pytest.mark.parametrize(
    ("base", "case"), [(MHA, "mha"), (MLA, "mla"), (MLA, "mla joint"), (MFAKR, "mfa_kr gated pre"), (MFAKR, "mfa_kr gated post")]
)
def test_an_attention_with_its_own_from_cache_is_decoded_by_it(base, case, monkeypatch):
    check_all_ways(plugin(monkeypatch, base, case, from_cache=twice_the_value(base)))


def test_keys_may_have_other_heads_than_values(monkeypatch):
    def from_cache(self, k, v):
        return k, v[:, :1]

    check_all_ways(plugin(monkeypatch, MHA, "mha", from_cache=from_cache))


def test_a_matrix_may_have_a_bias_and_be_used_twice(monkeypatch):
    def build(self, cfg):
        MHA.build(self, cfg)
        self.q = torch.nn.Linear(cfg.dim, cfg.dim)  # with a bias, and n * d == H

    def output(self, y, pos):
        return self.q(self.o(y.flatten(2)))

    def query(self, x, pos):
        q = self.q(x)[..., : self.n_head * self.cfg.head_dim]
        return self.rotate(q.unflatten(-1, (self.n_head, -1)).transpose(1, 2), pos)

    check_all_ways(plugin(monkeypatch, MHA, "mha", build=build, output=output, query=query))


@pytest.mark.skipif(decode.triton is None, reason="needs Triton")
def test_the_kernel_refuses_keys_that_are_not_those_of_the_cache(monkeypatch):
    def from_cache(self, k, v):
        return k[:, :, -4:], v[:, :, -4:]

    model = plugin(monkeypatch, MHA, "mha", from_cache=from_cache).float().to(KERNELS)
    with pytest.raises(ValueError, match="Own.from_cache gives fewer tokens than it gets: use attention='sdpa'"):
        Decoder(model, "triton")(model, tokens(model.cfg, 1, 1).to(KERNELS), KVCache(model, 1, 9))


def check_all_ways(model: GPT) -> None:
    """By PyTorch, with the twins of the compiled step, and by Triton."""
    idx = tokens(model.cfg, T=9)
    expected = logits(model, idx)
    assert difference(logits(model, idx, Decoder(model)), expected) < 1e-13
    assert difference(logits(model, idx, uncompiled(Decoder(model, compiled=True))), expected) < 1e-13
    model = model.float().to(KERNELS)
    for attention in TRITON:
        step = Decoder(model, attention, compiled=False)
        for dtype in (None, torch.bfloat16):
            found, expected = (logits(model, idx.to(KERNELS), way, dtype=dtype) for way in (step, None))
            assert difference(found, expected) < 1e-5


def uncompiled(step: Decoder) -> Decoder:
    """The fused projections without the compiler."""
    for name in ("embed_to_query", "attention_to_query", "attention_to_logits", "keys_and_values"):
        setattr(step, name, getattr(decode, name))
    return step


# ---------------------------------------------------------------------------------------------------------------------
# On a GPU


@gpu
@pytest.mark.parametrize(
    ("case", "pos"), [(case, "rope") for case in MODES] + [("gqa", "alibi"), ("mfa", "alibi"), ("mfa", "none")]
)
def test_graphs_give_the_logits_of_the_model(case, pos):
    model = gpt(case, pos, block_size=300).float().cuda()
    idx = tokens(model.cfg, B=3, T=24 if case == "fpba" else 270).cuda()
    prompt = idx.shape[1] - 10
    step = Decoder(model, compiled=False)
    assert difference(logits(model, idx, step, prompt), logits(model, idx, None, prompt)) < 1e-5
    assert step.captures == 1


@gpu
@pytest.mark.parametrize("case", MODES)
def test_greedy_text_is_the_same_eager_uncached_and_compiled(case):
    torch.compiler.reset()
    model = gpt(case).float().cuda()
    for B in (3, 1):  # of one text, small matrices are multiplied by sums
        idx = tokens(model.cfg, B, T=4).cuda()
        ways = (dict(decode=Decoder(model)), dict(decode=Decoder(model, "sdpa")), {}, dict(use_cache=False))
        texts = [text(model, idx, 50, temperature=0, **how) for how in ways]
        assert all(torch.equal(each, texts[-1]) for each in texts)


@gpu
@pytest.mark.parametrize("case", ["mha", "gqa", "mfa", "mla joint", "mfa_kr gated pre", "mfa_kr gated inverse"])
def test_the_kernel_agrees_with_sdpa_in_bfloat16(case):
    model = gpt(case, block_size=3000, head_dim=64, latent_dim=128, rope_dim=64).bfloat16().cuda()
    layer = model.blocks[0].attn
    kept = [torch.randn(3, g, 3000, w, device="cuda", dtype=torch.bfloat16) for g, w in layer.cache_shapes]
    width = sum(k.shape[-1] for k in decode.keys_and_values(layer, kept)[0])
    q = torch.randn(3, layer.n_head, 1, width, device="cuda", dtype=torch.bfloat16)
    table = decode.rotary_table(layer, 3000, q) if decode.rotates_on_read(layer) else None
    for length in (1, 100, 2999):
        for t in kept:
            t[:, :, length:] = torch.nan
        got = decode.attend_triton(layer, q, kept, torch.tensor([length - 1], device="cuda"), table)
        exact = decode.attend_sdpa(layer, q.double(), kept, length, decode.keys_and_values)
        assert ((got - exact).norm() / exact.norm()).item() < 1e-2
        for t in kept:
            t.copy_(torch.randn_like(t))


# ---------------------------------------------------------------------------------------------------------------------
# The benchmark

NANOGPT = """
from dataclasses import dataclass
import torch
@dataclass
class GPTConfig:
    block_size: int; vocab_size: int; n_layer: int; n_head: int; n_embd: int; dropout: float; bias: bool
class GPT(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
    def generate(self, idx, n, temperature, top_k):
        return torch.cat((idx, idx.new_zeros(len(idx), n)), dim=1)
"""


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """decode.json of all parts that run on a CPU, with the file's folder."""
    folder = tmp_path_factory.mktemp("decode")
    (folder / "model.py").write_text(NANOGPT, encoding="utf-8")
    flags = f"--smoke --device cpu --steps 2 --results {folder}/decode.json --nanogpt {folder}".split()
    assert (
        command(bench_decode.main, bench_decode.Args, [*flags, "--part", "must", "profile", "baby", "grid", "tiny", "plot"])
        == 0
    )
    return folder, json.loads((folder / "decode.json").read_text(encoding="utf-8"))


def test_every_part_of_the_benchmark_leaves_its_rows(toy):
    folder, result = toy
    rows = result["rows"]
    assert not [r for r in rows if "error" in r]
    for name in ("command", "commit", "device", "versions", "date", "bandwidth"):
        assert result[name] == result["runs"][rows[0]["run"]][name]
    cells = [(r["attn"], r["mode"], r["batch"], r["context"]) for r in rows if r["model"] == "paper-1b"]
    assert sorted(cells) == sorted((a, m, b, c) for a, m in bench_decode.VARIANTS for b, c in ((2, 48), (1, 32), (2, 32)))
    assert {r["engine"] for r in rows if r["model"] == "baby"} == {"ours", "nanogpt"}
    assert {r["engine"] for r in rows if r["model"] == "tiny"} == {"ours", "ours, no cache"}
    assert all((folder / name).is_file() for name in ("decode_tokens.png", "decode_largest.png"))
    assert not list(folder.glob("*.part"))


def test_the_profile_accounts_for_every_millisecond(toy):
    profile = toy[1]["profile"]
    assert [(s["attn"], s["mode"]) for s in profile["steps"]] == [
        ("mfa", ""),
        ("mfa_kr", "post"),
        ("mfa_kr", "pre"),
        ("mla", "joint"),
    ]
    for step in profile["steps"]:
        assert step["run"] in toy[1]["runs"]
        assert sum(step["us"].values()) == pytest.approx(1000 * step["ms"])


def test_a_row_of_the_benchmark_adds_up(toy):
    for row in (r for r in toy[1]["rows"] if r["model"] == "paper-1b"):
        assert row["cache_bytes"] == row["counts_bytes"]
        assert row["tokens_per_s"] == pytest.approx(1000 * row["batch"] / row["ms"])
        assert row["floor_share"] == pytest.approx(row["floor_ms"] / row["ms"])


def test_the_largest_batch_is_the_largest_that_fits(toy):
    largest = toy[1]["largest_batch"]
    assert [(r["attn"], r["mode"]) for r in largest] == bench_decode.VARIANTS
    for row in largest:
        each = row["cache_bytes_per_sequence"]
        assert row["batch"] * each <= 2**20 < (row["batch"] + 1) * each


def test_the_largest_batch_is_found_by_trying(monkeypatch):
    """With a workspace that no formula knows: the search must end between a batch that fits and one that does not."""

    class Card:
        cuda, device, held = True, torch.device("cpu"), 0

        def clean(self):
            self.held = 0

        def free(self):
            return 10**6 - self.held

    card = Card()

    def cache(model, batch, context):
        card.held = 1024 * batch + 3 * batch**2
        if card.held > 10**6:
            raise torch.OutOfMemoryError("out of memory")
        return KVCacheStub()

    class KVCacheStub:
        length = 0

    monkeypatch.setattr(bench_decode, "KVCache", cache)
    monkeypatch.setattr(bench_decode, "Decoder", lambda *a: lambda *b: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    model = GPT(preset("tiny", "mfa", latent_dim=16))  # 4 layers x 2 x 16 elements x 4 bytes x 2 tokens = 1,024 bytes
    for workspace in (0, 3, 5000):
        found = bench_decode.largest_batch(card, model, "triton", 2, workspace)
        assert found["cache_bytes_per_sequence"] == 1024
        assert 1024 * found["batch"] + 3 * found["batch"] ** 2 <= 10**6
        assert 1024 * (found["batch"] + 1) + 3 * (found["batch"] + 1) ** 2 > 10**6 and found["tries"] < 20


def test_a_second_run_replaces_what_it_measures_again(toy, capsys):
    folder, before = toy
    flags = f"--smoke --device cpu --steps 2 --results {folder}/decode.json --part tiny".split()
    assert command(bench_decode.main, bench_decode.Args, flags) == 0
    after = json.loads((folder / "decode.json").read_text(encoding="utf-8"))
    names = [{(r["model"], r["attn"], r["engine"], r["batch"], r["context"]) for r in x["rows"]} for x in (before, after)]
    assert names[0] == names[1] and len(after["rows"]) == len(before["rows"]) and len(after["runs"]) == 2
    assert after["command"] == before["command"]


def test_a_cell_that_fails_is_recorded_and_the_others_go_on(tmp_path, monkeypatch):
    plain = bench_decode.measure
    monkeypatch.setattr(bench_decode, "measure", lambda *a: 1 / 0 if a[1].cfg.attn == "mha" else plain(*a))
    flags = f"--smoke --device cpu --steps 2 --results {tmp_path}/decode.json --part must".split()
    assert command(bench_decode.main, bench_decode.Args, flags) == 0
    rows = json.loads((tmp_path / "decode.json").read_text(encoding="utf-8"))["rows"]
    assert {r["attn"] for r in rows if "error" in r} == {"mha"} and sum("ms" in r for r in rows) == 7
    assert next(r for r in rows if r["attn"] == "mha")["error"].startswith("ZeroDivisionError")


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ("--device cpu --part must", "--part must: these need a GPU"),
        ("--device tpu", "--device must be cpu or cuda"),
        ("--device cpu --smoke", "--smoke measures a toy"),
        ("--device cpu --part tiny --only mfo", "--only 'mfo': take any of mfa, mha"),
        ("--device cpu --part tiny --steps 0", "--steps must be at least 1"),
        ("--device cpu --part tiny --nanogpt nowhere", "--nanogpt nowhere: no model.py there"),
        ("--device cpu --part plot --results nowhere.json", "--part plot: nowhere.json is not there"),
    ],
)
def test_bad_flags_get_one_line(flags, told, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert command(bench_decode.main, bench_decode.Args, flags.split()) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {told}") and err.count("\n") == 1 and not list(tmp_path.iterdir())


def test_what_a_cpu_measures_does_not_go_to_the_committed_results(tmp_path, monkeypatch):
    committed = bench_decode.RESULTS.read_bytes()
    row = dict(model="tiny", attn="mfa", mode="", engine="ours", kernel="eager", batch=1, context=512, ms=1.0)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(bench_decode.PARTS, "tiny", lambda bench: bench.add(row))
    assert command(bench_decode.main, bench_decode.Args, ["--device=cpu"]) == 0
    found = json.loads((tmp_path / "out" / "decode.json").read_text(encoding="utf-8"))
    assert [r["ms"] for r in found["rows"]] == [1.0] and bench_decode.RESULTS.read_bytes() == committed

    asked = tmp_path / "decode.json"
    assert command(bench_decode.main, bench_decode.Args, ["--device=cpu", f"--results={asked}"]) == 0
    assert asked.is_file()
    assert bench_decode.results_of(bench_decode.Args(device="cpu", part=("plot",))) == bench_decode.RESULTS
    assert bench_decode.results_of(bench_decode.Args(device="cuda")) == bench_decode.RESULTS
