"""The studies: their configs are what they claim to be, and the queue has every run once."""

import json
from collections import Counter

import pytest
import torch
from study_rows import row
from torch import nn

from experiments.study import studies
from experiments.study.plot import sizes_of
from experiments.study.studies import (
    CORE,
    GRID,
    STUDIES,
    best_rate,
    queue,
    results_by_run,
    run_for,
    run_of,
)
from mfa import Config
from train import count_params

EVERYTHING = [(study, arm) for study, arms in STUDIES.items() for arm in arms]


@pytest.mark.parametrize(("study", "arm"), EVERYTHING)
def test_equal_parameters(study, arm):
    a, cfg = STUDIES[study][arm], run_for(study, arm, 1, 0).cfg
    size = {k: v for k, v in studies.SIZES[a.size].items() if k in Config.__dataclass_fields__}
    if a.matched:
        assert (
            abs(
                count_params(cfg)
                / count_params(Config(attn="mha", vocab_size=studies.VOCAB, **size))
                - 1
            )
            < 0.005
        )
    else:
        assert cfg.ffn_dim == size["ffn_dim"]


def test_tokens():
    runs = {
        size: run_for("figure3", f"mha_{size.lower()}", 1, 0)
        for size in ("2M", "7M", "30M", "60M", "MoE")
    }
    per_parameter = [
        r.max_iters * r.batch_size * r.cfg.block_size / count_params(r.cfg) for r in runs.values()
    ]
    assert max(per_parameter) / min(per_parameter) < 1.02
    for arm in STUDIES["length"]:
        r = run_for("length", arm, 1, 0)
        assert r.max_iters * r.batch_size * r.cfg.block_size == 65_536_000


def test_table3_adds_what_the_paper_adds():
    plain, wide, factored = (
        count_params(run_for("table3", arm, 1, 0).cfg) for arm in ("plain", "wide", "factored")
    )
    H, C = 512, 64
    assert wide - plain == 8 * 2 * 6 * C * H  # 8 layers, Q and O of 6 more heads
    assert factored - plain == 8 * (
        6 * C * H + H * C + 14 * C * C - 8 * C * H
    )  # O; S_q and Q instead of Q


def test_the_attention_alone_can_start_at_the_papers_std():
    run = run_for("question_b", "mfa_30m_attn", 1, 0)
    torch.manual_seed(0)
    block = studies.build(run).blocks[1]
    found = [
        p.detach().std().item()
        for p in (block.attn.q.weight, block.attn.o.weight, block.ffn.w1.weight)
    ]
    assert found == pytest.approx([0.02, 0.02 / 4**0.5, 0.04], rel=0.05)


def test_values_and_outputs_alone_can_start_at_the_papers_std():
    run = run_for("question_b", "mfa_30m_vo", 1, 0)
    torch.manual_seed(0)
    attn = studies.build(run).blocks[1].attn
    found = [
        p.detach().std().item()
        for p in (attn.q.weight, attn.s_k.weight, attn.s_v.weight, attn.o.weight)
    ]
    assert found == pytest.approx([0.04, 0.04, 0.02, 0.02 / 4**0.5], rel=0.05)


def test_deepseek_init():
    torch.manual_seed(0)
    model = studies.build(run_for("figure1", "mla_deepseek", 1, 0))
    assert model.embed.weight.std().item() == pytest.approx(0.006, rel=0.01)
    matrices = [m.weight for m in model.blocks.modules() if isinstance(m, nn.Linear)]
    assert all(
        w.std().item() == pytest.approx(0.012, rel=0.03) for w in matrices
    )  # output projections too
    assert all(
        torch.equal(m.weight, torch.ones_like(m.weight))
        for m in model.modules()
        if isinstance(m, nn.RMSNorm)
    )


def test_queue():
    tasks = list(queue())
    assert len({task.run for task in tasks}) == len(tasks)
    assert {task.study for task in tasks} == set(STUDIES)
    assert [task.arm for task in tasks[: len(CORE)]] == list(CORE)  # what the claims rest on
    assert {(task.run.lr, task.run.seed) for task in tasks[: len(CORE)]} == {(1.4e-3, 0)}
    planned = {task.run for task in tasks}
    for study, arm in EVERYTHING:
        rates = GRID if study in ("figure1", "table3", "table4", "table5") else (1,)
        seeds = (0,) if study in studies.RATIOS or arm in studies.HEADS_30M else (0, 1, 2)
        assert {run_for(study, arm, times, seed) for times in rates for seed in seeds} <= planned


def test_the_ratio_is_the_papers():
    """20B tokens for 1.08B parameters. Two seeds of four models, and both sides of two's rates."""
    runs = [task.run for task in queue("ratio")]
    for r in runs:
        tokens = r.max_iters * r.batch_size * r.cfg.block_size
        assert tokens / count_params(r.cfg) == pytest.approx(20 / 1.08, rel=0.01)
    settings = Counter((task.arm, task.run.lr, task.run.seed) for task in queue("ratio"))
    arms = {arm: [k for k in settings if k[0] == arm] for arm in studies.RATIO}
    assert len(settings) == len(runs) and {arm: len(found) for arm, found in arms.items()} == {
        "muon_mha_norm": 4, "muon_mfa_norm": 4, "muon_mqa_norm": 2, "muon_mfa_kr_half_norm": 2,
        "muon_mla_deepseek": 1, "muon_gqa2_norm": 1, "adamw_mha": 4, "adamw_mfa": 4, "adamw_mqa": 2,
        "adamw_mfa_kr": 2, "adamw_mha_16": 1,
    }  # fmt: skip
    assert {lr for _, lr, _ in arms["muon_mha_norm"]} == {2e-3, 3e-3, 4.5e-3}
    assert {lr for _, lr, _ in arms["adamw_mfa"]} == {1e-3, 1.4e-3, 2e-3}


def test_at_7m_each_of_the_ratios_arms_has_the_width_of_its_size():
    """18.5 tokens a parameter, 2.2 of the short arms, and caches of the same shares as at 30M."""
    for task in queue("ratio_7m"):
        r, wanted = task.run, 2.2 if task.arm.startswith("short") else 20 / 1.08
        assert r.max_iters * r.batch_size * r.cfg.block_size / count_params(r.cfg) == pytest.approx(wanted, rel=0.01)
        study, arm = studies.short_run_of(task.arm)
        shares = [sizes_of(run)[2] for run in (r, run_for(study, arm, 1, 0))]
        assert shares[0] == shares[1]


def test_the_ratio_begins_at_the_best_rate_of_cheaper_runs():
    """Of those on fewer tokens, and at 30M, where there are some, of those at 7M on as many a parameter."""
    made = [("modern", "mfa_norm", 1, 3.7), ("modern", "mfa_norm", 3 / 2, 3.6), ("figure1", "mfa_kr", 10 / 7, 3.8), ("why", "mha_16", 1, 3.7)]
    tasks = [(studies.Task(study, arm, run_for(study, arm, factor, 0)), loss) for study, arm, factor, loss in made]
    done = results_by_run([row(*each) for each in tasks])
    rates = {}
    for task in queue("ratio", done=done):
        rates.setdefault(task.arm, []).append(task.run.lr)
    assert rates["muon_mfa_norm"][:2] == [4.5e-3] * 2 and set(rates["muon_mfa_norm"]) == {3e-3, 4.5e-3, 6.75e-3}  # and its neighbours
    assert set(rates["adamw_mfa_kr"]) == {2e-3}
    assert set(rates["muon_mqa_norm"]) == {3e-3} and set(rates["adamw_mha_16"]) == {1.4e-3}
    small = studies.Task("ratio_7m", "muon_mfa_norm", run_for("ratio_7m", "muon_mfa_norm", 9 / 4, 0))
    of_small = done | results_by_run([row(small, 3.6) | dict(dataset=studies.dataset_of("ratio_7m"))])
    assert next(task.run.lr for task in queue("ratio", done=of_small) if task.arm == "muon_mfa_norm") == 6.75e-3
    longer = studies.Task("ratio", "muon_mfa_norm", run_for("ratio", "muon_mfa_norm", 9 / 4, 0))
    done |= results_by_run([row(longer, 3.2) | dict(dataset=studies.dataset_of("ratio"))])
    seeds = [task.run for task in queue("ratio", done=done) if task.arm == "muon_mfa_norm" and task.run.seed]
    assert [run.lr for run in seeds] == [6.75e-3]  # now its own results say what is best
    done |= results_by_run([row(longer, None) | dict(dataset=studies.dataset_of("ratio"), diverged=True)])
    rates = [task.run.lr for task in queue("ratio", done=done) if task.arm == "muon_mfa_norm"]
    assert rates[0] == 4.5e-3  # it did not stand that rate


def test_seeds_come_after_the_rates_and_at_the_best_of_them():
    arms, core = list(studies.MODERN), studies.MODERN_CORE
    others = [arm for arm in arms if arm not in core]
    before = list(queue("modern"))
    low, middle, high, highest, _ = studies.MUON_GRID
    plan = [(arm, middle, 0) for arm in arms]
    plan += [(arm, high, 0) for arm in studies.NORMED]  # a norm stands higher rates
    rates = {arm: (low,) if arm in studies.NORMED else (low, high) for arm in core}
    plan += [(arm, factor, 0) for arm in core for factor in rates[arm]]
    plan += [(arm, middle, 1) for arm in core]  # two seeds, on which a claim may rest
    plan += [(arm, factor, 0) for arm in others for factor in (low, high)]
    plan += [(arm, middle, 1) for arm in others] + [(arm, middle, 2) for arm in arms]
    assert [task.run for task in before] == [run_for("modern", *each) for each in plan]
    losses = {middle: 3.6, high: 3.5, low: None}  # of MFA alone
    tasks = [studies.Task("modern", "mfa", run_for("modern", "mfa", f, 0)) for f in losses]
    rows = [row(*each) for each in zip(tasks, losses.values(), strict=True)]
    done = results_by_run(rows, f"pg-books-bpe{studies.VOCAB}")
    after = list(queue("modern", done=done))
    changed = {task.run.lr for task in after if task.run.seed and task.arm == "mfa"}
    assert changed == {0.0045} and len(after) == len(before) + 1  # a rate beyond the best
    assert [task for task in after if task.run == run_for("modern", "mfa", highest, 0)]
    others = [[task for task in tasks if task.arm != "mfa"] for tasks in (before, after)]
    assert others[0] == others[1]


def test_studies_share_runs():
    mha = run_for("figure1", "mha", 1, 0)
    assert all(
        run_for(*at, 1, 0) == mha
        for at in (("table4", "mha"), ("length", "mha_512"), ("figure3", "mha_30m"))
    )
    assert (
        run_for("question_a", "pre", 1, 0)
        == run_for("table4", "gated", 1, 0)
        == run_for("figure1", "mfa_kr", 1, 0)
    )
    assert run_for("question_a", "post", 1, 0) != run_for("question_a", "pre", 1, 0)


def test_the_best_learning_rate_is_one_that_trains():
    for losses, wanted in (
        ((3.7, None, 3.6), 2),
        ((None, 3.5, 3.6), 1),
        ((None, None, None), None),
    ):
        tasks = [
            studies.Task("table4", "vanilla", run_for("table4", "vanilla", times, 0))
            for times in GRID
        ]
        done = results_by_run(
            [row(*each) for each in zip(tasks, losses, strict=True)], f"pg-books-bpe{studies.VOCAB}"
        )
        assert best_rate("table4", "vanilla", done) == (None if wanted is None else GRID[wanted])


def test_the_best_learning_rate_is_of_the_seeds_that_all_rates_have():
    losses = {
        (GRID[0], 0): 3.5,
        (GRID[1], 0): 3.6,
        (GRID[2], 0): 3.7,
        (GRID[0], 1): 3.9,
        (GRID[1], 1): 3.6,
        (GRID[2], 1): 3.7,
    }
    done = {}
    for (times, seed), loss in losses.items():
        done |= results_by_run(
            [row(studies.Task("figure1", "mha", run_for("figure1", "mha", times, seed)), loss)],
            f"pg-books-bpe{studies.VOCAB}",
        )
        assert best_rate("figure1", "mha", done) == (
            GRID[1] if len(done) == len(losses) else GRID[0]
        )


def test_results_say_which_run_they_are_of():
    for task in queue():
        assert run_of(json.loads(json.dumps(studies.row_of(task.run)))) == task.run


def test_a_run_that_ends_where_it_began_did_not_train():
    def curve(*losses, diverged=False):
        return dict(curve=[[i, loss] for i, loss in enumerate(losses)], diverged=diverged)

    assert studies.untrained(curve(4.7, 3.7, 4.7)) and studies.untrained(curve(4.7, diverged=True))
    assert studies.untrained(curve(4.7, 3.6, 3.7)) and not studies.untrained(curve(4.7, 3.6, 3.61))
    assert not studies.untrained(curve(4.7, 4.6)) and not studies.untrained(curve(4.7))
