"""experiments/bench/equal_time.py: what it counts and times is the models that it says."""

import pytest
import torch
from runs import command
from torch.utils.flop_counter import FlopCounterMode

from experiments.bench import equal_time
from experiments.bench.training import flops
from experiments.study.studies import MODERN, run_for
from mfa import GPT
from train import count_params


@pytest.mark.parametrize("arm", equal_time.arms_of("30M"))
def test_the_operations_of_a_token_are_those_of_its_matrix_products(arm):
    """On tensors without memory, where attention is two products: forward, of which training has three."""
    cfg = equal_time.config("1B", arm, toy=True)
    with torch.device("meta"):
        model, ids = GPT(cfg), torch.zeros(3, cfg.block_size, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(ids)
    assert 3 * counter.get_total_flops() == 3 * cfg.block_size * flops(cfg)


def share_of(cfg, mha) -> float:
    return equal_time.cache_bytes(cfg) / equal_time.cache_bytes(mha)


@pytest.mark.parametrize("shape", equal_time.SHAPES)
def test_models_of_a_shape_have_equal_parameters_and_the_studys_share_of_the_cache(shape):
    configs = {arm: equal_time.config(shape, arm) for arm in equal_time.arms_of(shape)}
    params = {arm: count_params(cfg) for arm, cfg in configs.items()}
    assert all(n == pytest.approx(params["mha"], rel=0.01) for n in params.values())
    study = {arm: run_for("modern", arm, 1, 0).cfg for arm in configs}
    for arm, cfg in configs.items():
        share = share_of(cfg, configs["mha"])
        if arm.startswith("mqa"):  # one head of more
            assert share == 1 / configs["mha"].heads
        else:  # a rotary key of half a head is less beside a latent of dim / 4
            wanted = share_of(study[arm], study["mha"])
            assert share == wanted or (arm.startswith("mla") and 0.85 * wanted < share < wanted)


def test_the_30M_shape_is_the_studys():
    for arm in equal_time.arms_of("30M"):
        assert equal_time.config("30M", arm) == run_for("modern", arm, 1, 0).cfg
        assert MODERN[arm].build in ("", "deepseek_init")  # the rest of build() has other shapes


def test_it_goes_on_where_it_stopped_and_stops_in_time(tmp_path, monkeypatch, capsys):
    path = tmp_path / "equal_time.jsonl"
    monkeypatch.setattr(equal_time, "QUEUE", [("30M", "train"), ("1B", "prefill")])
    monkeypatch.setattr(equal_time, "ARMS", ("mha", "mfa"))
    monkeypatch.setattr(equal_time, "WITH_NORM", ("mha_norm",))
    flags = ["--smoke", "--device=cpu", "--rounds=1", f"--results={path}"]

    def call(*more) -> int:
        return command(equal_time.main, equal_time.Args, [*flags, *more])

    assert call("--shapes", "1B", f"--results={tmp_path / 'one.jsonl'}") == 0
    assert {shape for shape, _, _ in equal_time.read(tmp_path / "one.jsonl")} == {"1B"}
    capsys.readouterr()
    assert call("--limit_seconds=1e-9") == 0 and not path.exists()
    assert "out of time: 30M train mha" in capsys.readouterr().out
    assert call() == 0
    rows = equal_time.read(path)
    assert list(rows) == [("30M", "train", arm) for arm in ("mha", "mfa", "mha_norm")] + [("1B", "prefill", arm) for arm in ("mha", "mfa")]
    for (_, what, arm), row in rows.items():
        assert row["tokens_per_s"] == pytest.approx(2 * 16 / row["ms"] * 1e3)
        assert ("flops_per_token" in row) == (what == "train") and (arm != "mha" or row["of_mha"] == 1)
    text = path.read_text(encoding="utf-8")
    last = text.splitlines(keepends=True)[-1]
    path.write_text(text.removesuffix(last) + last[:40], encoding="utf-8")  # a kill in the middle
    assert call() == 0 and list(equal_time.read(path)) == list(rows)
    assert path.read_text(encoding="utf-8").startswith(text.removesuffix(last))


def test_bad_flags(tmp_path, capsys):
    path = tmp_path / "damaged.jsonl"
    path.write_text("{}\n", encoding="utf-8")
    for flags, says in (
        (["--rounds=0"], "--rounds must be positive"),
        (["--limit_seconds=-1"], "--limit_seconds must be positive"),
        ([f"--results={equal_time.RESULTS}"], "does not belong among the results"),
        ([f"--results={path}"], "line 1 is not a result of equal_time.py"),
    ):
        assert command(equal_time.main, equal_time.Args, ["--smoke", "--device=cpu", *flags]) == 2
        assert says in capsys.readouterr().err
