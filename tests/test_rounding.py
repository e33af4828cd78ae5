"""experiments/probes/rounding.py: how far apart scores are, and its command."""

import pytest
import torch
from runs import command

from experiments.probes import rounding
from experiments.study import plot
from mfa import GPT, Config


@pytest.mark.parametrize("attn", ["mha", "mqa"])
def test_the_range_of_the_scores_is_that_of_eq_1(attn):
    torch.manual_seed(0)
    model = GPT(
        Config(
            attn=attn,
            vocab_size=11,
            block_size=8,
            n_layer=1,
            dim=32,
            head_dim=8,
            ffn_dim=32,
            init_std=0.5,
        )
    )
    attn, tokens = model.blocks[0].attn, torch.randint(11, (2, 6))
    x, seen = model.blocks[0].attn_norm(model.embed(tokens)), []
    for i in range(6):
        y = torch.stack(
            [
                torch.einsum("bh,chk,bk->bc", x[:, i], attn.qk_circuit(i - j), x[:, j])
                for j in range(i + 1)
            ]
        )
        seen.append((attn.scale * (y.amax(0) - y.amin(0))).max().item())
    assert rounding.score_range(model, tokens) == pytest.approx(max(seen), rel=1e-5)
    assert "attend" not in vars(attn)  # as it was


def test_rounding_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        rounding, "SIZE", dict(block_size=16, n_layer=1, dim=32, head_dim=8, rope_dim=4, ffn_dim=88)
    )
    monkeypatch.setattr(rounding, "ARMS", {arm: rounding.ARMS[arm] for arm in ("mha", "mqa")})
    flags = [f"--results={tmp_path / 'rounding.jsonl'}", "--steps=50"]
    assert command(rounding.main, rounding.Args, flags) == 0
    assert "8 runs to make, 0 are made" in capsys.readouterr().out
    rows = rounding.read(tmp_path / "rounding.jsonl")
    dtypes = ("float32", "bfloat16")
    assert list(rows) == [
        (arm, lr, dtype) for dtype in dtypes for lr in rounding.RATES for arm in ("mha", "mqa")
    ]
    ends = {rows["mha", lr, dtype]["curve"][-1][1] for lr in rounding.RATES for dtype in dtypes}
    assert len(ends) == 4  # each is a training of its own
    for row in rows.values():
        assert [step for step, *_ in row["curve"]] == [25, 50]
        assert all(
            abs(norm) <= off + 1e-4 for _, _, off, norm, _ in row["curve"]
        )  # the triangle's inequality
    assert (
        command(rounding.main, rounding.Args, flags) == 0
        and "0 runs to make, 8 are made" in capsys.readouterr().out
    )
    assert plot.rounding_part(rows).count("\n| M") == 4
    assert command(rounding.main, rounding.Args, [flags[0], "--steps=24"]) == 2
    assert "--steps must be at least 25" in capsys.readouterr().err
