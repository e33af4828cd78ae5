"""What support/muon.py promises, one statement of fact a test."""

import copy
import itertools
import pickle

import pytest
import torch
from attentions import MAIN, gpt

from support.muon import Both, Launch, Muon, orthogonalize
from train import Train, make_optimizer


def test_singular_values_are_moved_to_about_one():
    g = torch.Generator().manual_seed(0)
    for shape in ((40, 40), (64, 16), (16, 64), (3, 24, 32)):
        s = torch.linalg.svdvals(orthogonalize(torch.randn(shape, generator=g)))
        assert 0.5 < s.min() and s.max() < 1.3, shape


def test_the_direction_of_singular_vectors_stays():
    G = torch.randn(12, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    U, _, V = torch.linalg.svd(G, full_matrices=False)
    inner = U.T @ orthogonalize(G) @ V.T  # (12, 12)
    assert (inner - inner.diag().diag()).abs().max() < 1e-12


@pytest.mark.parametrize("shape", [(24, 24), (48, 16), (16, 48)])
def test_it_is_pytorch_s_muon_but_for_bfloat16(shape):
    g = torch.Generator().manual_seed(0)
    start = torch.randn(3, *shape, generator=g)
    ours, theirs = ([torch.nn.Parameter(w.clone()) for w in start] for _ in range(2))
    how = dict(lr=0.02, weight_decay=0.3)
    both = Muon(ours, **how), torch.optim.Muon(theirs, **how, adjust_lr_fn="match_rms_adamw")
    for _ in range(4):
        for grad, a, b in zip(torch.randn(3, *shape, generator=g), ours, theirs, strict=True):
            a.grad, b.grad = grad.clone(), grad.clone()
        for optimizer in both:
            optimizer.step()
    for w, a, b in zip(start, ours, theirs, strict=True):
        assert (a - b).norm() < 0.02 * (b - w).norm()


def test_a_matrix_steps_alike_alone_and_beside_others():
    g = torch.Generator().manual_seed(0)
    start = torch.randn(5, 8, 12, dtype=torch.float64, generator=g)
    grads = torch.randn(5, 8, 12, dtype=torch.float64, generator=g)
    together = [torch.nn.Parameter(w.clone()) for w in start]
    alone = [torch.nn.Parameter(w.clone()) for w in start]
    for optimizer in (Muon(together, lr=0.1), *(Muon([p], lr=0.1) for p in alone)):
        for group in optimizer.param_groups:
            for p in group["params"]:
                at = next(i for i, w in enumerate(start) if torch.equal(w, p))
                p.grad = grads[at].clone()
        optimizer.step()
    for a, b in zip(together, alone, strict=True):
        assert torch.allclose(a, b, rtol=1e-13, atol=1e-13)


def test_a_graph_of_the_step_is_made_anew_when_what_it_fixed_changes():
    muon = stepped_muon()
    (p,) = muon.params
    seen = [muon.fixed()]
    moved, muon.param_groups[0]["weight_decay"] = p.data, 0.5
    seen.append(muon.fixed())
    p.data = moved.clone()
    seen.append(muon.fixed())
    muon.load_state_dict(copy.deepcopy(muon.state_dict()))  # its tensors are others
    seen.append(muon.fixed())
    assert all(a != b for a, b in itertools.pairwise(seen)) and muon.fixed() == seen[-1]


@pytest.mark.parametrize("again", [copy.deepcopy, lambda muon: pickle.loads(pickle.dumps(muon))])
def test_a_copy_steps_as_the_original_does(again):
    muon = stepped_muon()
    other = again(muon)
    for each in (muon, other):
        (p,) = each.params
        p.grad = torch.ones(4, 6) + torch.eye(4, 6)
        each.step()
    assert torch.equal(muon.params[0], other.params[0])


def stepped_muon() -> Muon:
    p = torch.nn.Parameter(torch.randn(4, 6, generator=torch.Generator().manual_seed(0)))
    p.grad = torch.ones(4, 6)
    muon = Muon([p])
    muon.step()
    return muon


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("optimizer", ["muon", "muon_heads"])
def test_one_launch_gives_what_many_do(optimizer, monkeypatch):
    ends = []
    for one in (True, False):
        if not one:
            monkeypatch.setattr(Muon, "fits_one_launch", lambda self: False)
        torch.manual_seed(0)
        model = gpt("mfa_kr gated pre").float().cuda()
        both = make_optimizer(model, Train(optimizer=optimizer))
        for step in range(8):
            g = torch.Generator("cuda").manual_seed(step)
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=g, device="cuda")
            for group in both.param_groups:
                group["lr"] = 0.01 * (step + 1)
            if step == 3:
                both.muon.param_groups[0]["weight_decay"] = 0.5
            if step == 5:
                both.load_state_dict(both.state_dict())
            if step == 6:
                for p in model.parameters():
                    p.data = p.data.clone()
            both.step()
        assert isinstance(both.muon.launch, Launch) == one
        ends.append([p.detach().clone() for p in model.parameters()])
    for a, b in zip(*ends, strict=True):  # the graph's rate is rounded to float32
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("case", MAIN)
def test_muon_takes_the_matrices_of_the_blocks_and_adamw_the_rest(case):
    for tied in (True, False):
        model = gpt(case, tied=tied)
        optimizer = make_optimizer(model, Train(optimizer="muon", weight_decay=0.3))
        assert isinstance(optimizer, Both)
        names = {p: name for name, p in model.named_parameters()}
        muon, tables, gains = ([names[p] for p in g["params"]] for g in optimizer.param_groups)
        assert all(name.startswith("blocks.") for name in muon)
        assert {n for n in names.values() if "norm" in n or "alpha" in n} == set(gains)
        assert set(tables) == {"embed.weight"} | ({"head.weight"} if not tied else set())
        assert len(muon) + len(tables) + len(gains) == len(names)
        assert [g["weight_decay"] for g in optimizer.param_groups] == [0.3, 0.3, 0.0]


def test_its_steps_are_as_long_as_adamw_s():
    p = torch.nn.Parameter(torch.zeros(64, 256))
    p.grad = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    Muon([p], lr=1.0, weight_decay=0.0).step()
    assert p.square().mean().sqrt().item() == pytest.approx(0.2, rel=0.25)


@pytest.mark.parametrize("sign", [1, -1])
def test_heads_taken_one_by_one_step_as_matrices_of_their_own(sign):
    g = torch.Generator().manual_seed(0)
    start, grad = torch.randn(2, 4, 6, 10, dtype=torch.float64, generator=g)  # 4 heads

    def stacked(x):
        return x.flatten(0, 1) if sign > 0 else x.transpose(0, 1).flatten(1)

    whole = torch.nn.Parameter(stacked(start).clone())
    alone = [torch.nn.Parameter(w.clone()) for w in start]
    whole.grad = stacked(grad).clone()
    for p, each in zip(alone, grad, strict=True):
        p.grad = each.clone()
    Muon([dict(params=[whole], heads=4 * sign)], lr=0.1).step()
    Muon(alone, lr=0.1).step()
    assert torch.allclose(whole, stacked(torch.stack(alone)), rtol=1e-13, atol=1e-13)


WHOLE = {"s_q", "s_k", "s_v", "s_kv", "k_rope", "n", "w1", "w2", "w3"}


@pytest.mark.parametrize("case", MAIN)
def test_heads_apart_are_the_matrices_that_carry_a_head_s_number(case):
    model = gpt(case)
    optimizer = make_optimizer(model, Train(optimizer="muon_heads"))
    heads = {p: group["heads"] for group in optimizer.muon.param_groups for p in group["params"]}
    assert len(heads) == sum(p.dim() >= 2 for p in model.blocks.parameters())
    attn = model.blocks[0].attn
    for name, p in attn.named_parameters():
        leaf = name.removesuffix(".weight")
        if p.dim() == 2 and leaf not in WHOLE:
            width = p.shape[1 if heads[p] < 0 else 0] / abs(heads[p])
            assert width in (model.cfg.head_dim, model.cfg.latent, model.cfg.rope_dim), name
        elif p.dim() >= 2:
            assert heads[p] == 0, name


@pytest.mark.parametrize("optimizer, alike", [("muon_heads", True), ("muon", False)])
def test_a_head_s_step_depends_on_its_own_gradient_alone_if_heads_are_apart(optimizer, alike):
    ends = []
    for scale in (1.0, -3.0):  # of the gradient of every head but the first
        model = gpt("mha").double()
        q, d = model.blocks[0].attn.q.weight, model.cfg.head_dim
        q.grad = torch.linspace(1, 9, q.numel(), dtype=q.dtype).sin().view_as(q)
        q.grad[d:] *= scale
        both = make_optimizer(model, Train(optimizer=optimizer))
        for group in both.param_groups:
            group["lr"] = 0.1
        both.step()
        ends.append(q[:d].detach().clone())
    assert torch.allclose(*ends, rtol=1e-13, atol=1e-13) == alike
