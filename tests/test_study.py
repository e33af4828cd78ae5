"""The study: its configs are what they claim to be, its queue goes on where it stopped, its tables say what the results say."""

import contextlib
import itertools
import json
import math
import os
import shutil
import time
from collections import Counter
from concurrent.futures import BrokenExecutor, ThreadPoolExecutor

import copying
import plot
import pytest
import rounding
import run
import studies
import torch
from runs import ROOT, command
from studies import CORE, FIGURE1, FIGURE3, GRID, STUDIES, Run, best, made, queue, read_results, run_for, run_of
from torch import nn

from mfa import GPT, Config
from prepare_data import BadInput, prepare
from train import count_params, evaluate, loss_function, window

EVERYTHING = [(study, arm) for study, arms in STUDIES.items() for arm in arms]


# ---------------------------------------------------------------------------------------------------------------------
# The configs


@pytest.mark.parametrize(("study", "arm"), EVERYTHING)
def test_equal_parameters(study, arm):
    a, cfg = STUDIES[study][arm], run_for(study, arm, 1, 0).cfg
    size = {k: v for k, v in studies.SIZES[a.size].items() if k in Config.__dataclass_fields__}
    if a.matched:
        assert abs(count_params(cfg) / count_params(Config(attn="mha", vocab_size=studies.VOCAB, **size)) - 1) < 0.005
    else:
        assert cfg.ffn_dim == size["ffn_dim"]


def test_cache_of_figure1():
    """Of MHA's: the comparisons that the claims rest on are at these sizes."""
    share = {arm: plot.on_paper(run_for("figure1", arm, 1, 0))[2] for arm in FIGURE1}
    assert share["mha"] == 1 and share["mfa"] == share["mqa"] == share["mfa_kr_2d"] == 0.125
    assert share["mfa_half"] == 0.125 and share["mfa_kr"] == share["mfa_kr_half"] == 0.0625
    assert share["mfa_2d"] == share["gqa2"] == 0.25 and share["gqa4"] == 0.5
    assert share["mla_joint"] == share["mla_separate"] == share["mla_deepseek"] == 160 / 1024
    assert share["mla_joint_256"] == share["mla_separate_128"] == 288 / 1024


def test_tokens():
    runs = {size: run_for("figure3", f"mha_{size.lower()}", 1, 0) for size in ("2M", "7M", "30M", "60M", "MoE")}
    per_parameter = [r.max_iters * r.batch_size * r.cfg.block_size / count_params(r.cfg) for r in runs.values()]
    assert max(per_parameter) / min(per_parameter) < 1.02
    for arm in STUDIES["length"]:
        r = run_for("length", arm, 1, 0)
        assert r.max_iters * r.batch_size * r.cfg.block_size == 65_536_000


def test_table3_adds_what_the_paper_adds():
    plain, wide, factored = (count_params(run_for("table3", arm, 1, 0).cfg) for arm in ("plain", "wide", "factored"))
    H, C = 512, 64
    assert wide - plain == 8 * 2 * 6 * C * H  # 8 layers, Q and O of 6 more heads
    assert factored - plain == 8 * (6 * C * H + H * C + 14 * C * C - 8 * C * H)  # O; S_q and Q instead of Q


def test_the_attention_alone_can_start_at_the_papers_std():
    run = run_for("question_b", "mfa_30m_attn", 1, 0)
    torch.manual_seed(0)
    block = studies.build(run).blocks[1]
    found = [p.detach().std().item() for p in (block.attn.q.weight, block.attn.o.weight, block.ffn.w1.weight)]
    assert found == pytest.approx([0.02, 0.02 / 4**0.5, 0.04], rel=0.05)


def test_values_and_outputs_alone_can_start_at_the_papers_std():
    run = run_for("question_b", "mfa_30m_vo", 1, 0)
    torch.manual_seed(0)
    attn = studies.build(run).blocks[1].attn
    found = [p.detach().std().item() for p in (attn.q.weight, attn.s_k.weight, attn.s_v.weight, attn.o.weight)]
    assert found == pytest.approx([0.04, 0.04, 0.02, 0.02 / 4**0.5], rel=0.05)


def test_deepseek_init():
    torch.manual_seed(0)
    model = studies.build(run_for("figure1", "mla_deepseek", 1, 0))
    assert model.embed.weight.std().item() == pytest.approx(0.006, rel=0.01)
    matrices = [m.weight for m in model.blocks.modules() if isinstance(m, nn.Linear)]
    assert all(w.std().item() == pytest.approx(0.012, rel=0.03) for w in matrices)  # output projections too
    assert all(torch.equal(m.weight, torch.ones_like(m.weight)) for m in model.modules() if isinstance(m, nn.RMSNorm))


# ---------------------------------------------------------------------------------------------------------------------
# The queue


def row(task: studies.Task, loss: float | None) -> dict:
    """A line of results as the queue reads it. Its loss is none that was measured."""
    text = dict(dataset=f"pg-books-bpe{studies.VOCAB}", seconds=60, device="x", jobs=1, params=1, tokens=1, by_position=[])
    known = dict(val_loss=loss, ppl=loss and math.exp(loss), bpb=loss, diverged=loss is None, curve=[])
    return {"study": task.study, "arm": task.arm, **studies.row_of(task.run), **text, **known}


def test_queue():
    tasks = list(queue())
    assert len({task.run for task in tasks}) == len(tasks)
    assert {task.study for task in tasks} == set(STUDIES)
    assert [task.arm for task in tasks[: len(CORE)]] == list(CORE)  # what the claims rest on
    assert {(task.run.lr, task.run.seed) for task in tasks[: len(CORE)]} == {(1.4e-3, 0)}
    planned = {task.run for task in tasks}
    for study, arm in EVERYTHING:
        rates = GRID if study in ("figure1", "table3", "table4", "table5") else (1,)
        assert {run_for(study, arm, times, seed) for times in rates for seed in (0, 1, 2)} <= planned


def test_studies_share_runs():
    mha = run_for("figure1", "mha", 1, 0)
    assert all(run_for(*at, 1, 0) == mha for at in (("table4", "mha"), ("length", "mha_512"), ("figure3", "mha_30m")))
    assert run_for("question_a", "pre", 1, 0) == run_for("table4", "gated", 1, 0) == run_for("figure1", "mfa_kr", 1, 0)
    assert run_for("question_a", "post", 1, 0) != run_for("question_a", "pre", 1, 0)


def test_the_best_learning_rate_is_one_that_trains():
    for losses, wanted in (((3.7, None, 3.6), 2), ((None, 3.5, 3.6), 1), ((None, None, None), None)):
        tasks = [studies.Task("table4", "vanilla", run_for("table4", "vanilla", times, 0)) for times in GRID]
        done = made([row(*each) for each in zip(tasks, losses, strict=True)], f"pg-books-bpe{studies.VOCAB}")
        assert best("table4", "vanilla", done) == (None if wanted is None else GRID[wanted])


def test_the_best_learning_rate_is_of_the_seeds_that_all_rates_have():
    losses = {(GRID[0], 0): 3.5, (GRID[1], 0): 3.6, (GRID[2], 0): 3.7, (GRID[0], 1): 3.9, (GRID[1], 1): 3.6, (GRID[2], 1): 3.7}
    done = {}
    for (times, seed), loss in losses.items():
        done |= made(
            [row(studies.Task("figure1", "mha", run_for("figure1", "mha", times, seed)), loss)], f"pg-books-bpe{studies.VOCAB}"
        )
        assert best("figure1", "mha", done) == (GRID[1] if len(done) == len(losses) else GRID[0])


def test_results_say_which_run_they_are_of():
    for task in queue():
        assert run_of(json.loads(json.dumps(studies.row_of(task.run)))) == task.run


# ---------------------------------------------------------------------------------------------------------------------
# Training


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return prepare("shakespeare", tokenizer="byte", data_dir=tmp_path_factory.mktemp("data"))


def toy(arm: str = "mfa_kr", **changes) -> Run:
    return run_for("figure1", arm, 1, 0, toy=True)._replace(**changes)


def test_divergence_is_a_result(folder):
    found = run.train_run(toy(lr=1e20), folder, "cpu", val_tokens=1025)
    assert found["diverged"] and found["val_loss"] is None and found["by_position"] == []
    json.dumps(found, allow_nan=False)


def test_loss_by_position(folder):
    model = studies.build(toy())
    T, device = model.cfg.block_size, torch.device("cpu")
    _, ids, _ = run.data(folder, device)
    ids = ids[: 20 * T + 1]
    positions = run.loss_by_position(model, ids, device, torch.no_grad)
    assert [p for p, _ in positions] == [0, 1, 2, 4, 8, 16]
    widths = [1, 1, 2, 4, 8, 16]
    mean = sum(w * loss for w, (_, loss) in zip(widths, positions, strict=True)) / T
    assert mean == pytest.approx(evaluate(model, ids, device, torch.no_grad), rel=1e-5)


def test_compiled_runs_give_the_same_losses(folder, monkeypatch):
    """Blocks: one graph for all blocks and one for the head. The backend here only captures; inductor takes a minute."""
    from torch._dynamo.utils import counters

    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *a, **k: compile(*a, **(k | dict(backend="eager", mode=None))))
    monkeypatch.setattr(run, "POINTS", 3)
    found = {}
    for how, graphs in (("no", 0), ("model", 1), ("blocks", 2)):
        counters.clear()
        found[how] = run.train_run(toy(max_iters=6), folder, "cpu", how, 1025)
        assert counters["stats"]["unique_graphs"] == graphs
    assert found["no"]["curve"] == found["model"]["curve"] == found["blocks"]["curve"]
    assert found["no"]["val_loss"] == found["blocks"]["val_loss"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("what", ["gradient", "loss"])
def test_a_step_whose_gradient_is_not_that_of_eager_code_ends_the_run(folder, monkeypatch, dtype, what):
    def faulty(model, *rest):
        loss_of, weight = compiled_loss(model, *rest), model.blocks[0].attn.o.weight

        def with_fault(tokens):
            loss = loss_of(tokens)
            fault = (weight - weight.detach()).sum() if what == "gradient" else 0.6 * loss.detach()  # 6%, where 5 are allowed
            return loss + next(wrong) * fault

        return with_fault

    compiled_loss, wrong = run.compiled_loss, itertools.cycle((0, 0, 0, 0.1))  # eagerly, eagerly in two parts, the step
    monkeypatch.setattr(run, "compiled_loss", faulty)
    monkeypatch.setattr(run, "pick_dtype", lambda name, device: dtype)
    with pytest.raises(RuntimeError, match=f"step 1: loss and gradient norm are .*, run eagerly .*, where rounding to {dtype}"):
        run.train_run(toy(max_iters=2), folder, "cpu", val_tokens=1025)


def test_a_run_says_how_far_rounding_moves_its_gradient(folder, monkeypatch):
    found = run.train_run(toy(max_iters=2), folder, "cpu", val_tokens=1025)  # in float32: the order of sums is left
    assert [step for step, _ in found["rounding"]] == [1, 2] and all(off < 1e-5 for _, off in found["rounding"])
    monkeypatch.setattr(run, "pick_dtype", lambda name, device: torch.bfloat16)
    found = run.train_run(toy(max_iters=2), folder, "cpu", val_tokens=1025)
    assert [step for step, _ in found["rounding"]] == [1, 2] and all(2**-12 < off < 2**-4 for _, off in found["rounding"])


# ---------------------------------------------------------------------------------------------------------------------
# The commands


def call(data, *flags) -> int:
    return command(run.main, run.Args, ["--smoke", "--device=cpu", f"--data_dir={data}", *flags])


@pytest.fixture(scope="module")
def smoke(tmp_path_factory, folder):
    """The results of every study at toy size."""
    path = tmp_path_factory.mktemp("smoke") / "results" / "study.jsonl"
    torch.set_num_threads(1)
    assert call(folder.parent, "--study=all", f"--results={path}") == 0
    return path


def test_every_study_runs(smoke):
    rows = read_results(smoke)
    done = made(rows, "shakespeare-byte")
    assert len(done) == len(rows)
    assert [task.run for task in queue(toy=True) if task.run not in done] == []
    for r, line in done.items():
        assert (line["params"], line["cache_bytes"], line["cache_share"]) == plot.on_paper(r)
        assert line["tokens"] == r.max_iters * r.batch_size * r.cfg.block_size
        assert math.isfinite(line["val_loss"]) and line["ppl"] == pytest.approx(math.exp(line["val_loss"]))
        assert line["val_loss"] == line["curve"][-1][1]  # toy: the part is all there is
        assert {"command", "commit", "device", "versions", "date"} <= line.keys()


def test_it_goes_on_where_it_stopped(smoke, folder, tmp_path, capsys):
    """A kill in the middle of a line loses that line; everything else is left as it is."""
    path, text = tmp_path / "study.jsonl", smoke.read_text(encoding="utf-8")
    cut = text[: text.rindex("\n", 0, -1) + 50]
    path.write_text(cut, encoding="utf-8")
    assert call(folder.parent, f"--results={path}") == 0
    after = path.read_text(encoding="utf-8")
    assert after.startswith(text[: text.rindex("\n", 0, -1) + 1]) and after.endswith("\n")
    old, new = json.loads(text.splitlines()[-1]), json.loads(after.splitlines()[-1])
    assert len(after.splitlines()) == len(text.splitlines()) and old["val_loss"] == new["val_loss"]
    capsys.readouterr()
    assert call(folder.parent, f"--results={path}") == 0  # nothing is left to do
    assert path.read_text(encoding="utf-8") == after and ", 0 runs still to make" in capsys.readouterr().out


def test_time_limit_and_dry_run(folder, tmp_path, capsys):
    path = tmp_path / "study.jsonl"
    assert call(folder.parent, "--study=table6", f"--results={path}", "--limit_seconds=1", "--guess_seconds=1e9") == 0
    assert not path.exists() and "12 runs still to make" in capsys.readouterr().out
    assert call(folder.parent, "--study=table6", f"--results={path}", "--dry_run") == 0
    assert not path.exists() and len(capsys.readouterr().out.splitlines()) == 13


def test_a_run_that_fails_does_not_stop_the_others(folder, tmp_path, monkeypatch, capsys):
    def no_room(r, *rest):
        if r.build == "single_key":
            raise torch.OutOfMemoryError("no room")
        return train_run(r, *rest)

    train_run, path = run.train_run, tmp_path / "study.jsonl"
    monkeypatch.setattr(run, "train_run", no_room)
    assert call(folder.parent, "--study=table6", f"--results={path}") == 1
    assert len(read_results(path)) == 9 and "failed: OutOfMemoryError: no room" in capsys.readouterr().out


def test_runs_are_shared_out_over_all_gpus(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert run.devices_of("auto") == ["cuda:0", "cuda:1"] and run.devices_of("cuda:1") == ["cuda:1"]
    used, busy, train_run = Counter(), Counter(), run.train_run

    def noted(r, folder, device, *rest):
        busy[device] += 1
        assert device in ("one", "other") and busy[device] == 1  # one job for each device
        used[device] += 1
        found = train_run(r, folder, "cpu", *rest)
        busy[device] -= 1
        return found

    @contextlib.contextmanager
    def threads(jobs, devices):
        assert (jobs, devices) == (1, ["one", "other"])
        with ThreadPoolExecutor(jobs * len(devices)) as pool:
            yield pool.submit
        torch.compiler.set_stance("default")  # the process' own, which threads leave as it happens; the runner has processes

    monkeypatch.setattr(run, "devices_of", lambda name: ["one", "other"])
    monkeypatch.setattr(run, "train_run", noted)
    monkeypatch.setattr(run, "workers", threads)
    assert call(folder.parent, "--study=table6", f"--results={tmp_path / 'study.jsonl'}") == 0
    assert used.total() == 12 and min(used.values()) >= 3


def test_jobs_on_one_device_take_turns_at_training(folder, monkeypatch):
    """A run that has compiled waits for its turn, trains, evaluates and lets go; the wait is not among its seconds."""

    class Turn:
        def __enter__(self):
            said.append("taken")
            clock[0] += 1000

        def __exit__(self, *_):
            said.append("given back")

    said, clock, evaluate, perf_counter = [], [0], run.evaluate, time.perf_counter
    monkeypatch.setattr(run.time, "perf_counter", lambda: perf_counter() + clock[0])
    monkeypatch.setattr(run, "evaluate", lambda *a: (said.append("evaluated"), evaluate(*a))[1])
    monkeypatch.setattr(run, "window", lambda *a: (said.append("step"), window(*a))[1])
    monkeypatch.setattr(run, "loss_by_position", lambda *a: [])
    monkeypatch.setattr(run, "TURNS", {"cpu": Turn()})
    monkeypatch.setattr(run, "POINTS", 1)
    found = run.train_run(toy(max_iters=run.COMPILING + 1), folder, "cpu", val_tokens=1025)
    assert said == ["step"] * run.COMPILING + ["taken", "step", "evaluated", "evaluated", "given back"]
    assert found["seconds"] < 1000


def test_the_processes_of_two_jobs_share_a_lock_for_each_device():
    def take(device):
        return start(eval, f"__import__('run').TURNS['{device}'].acquire(timeout=0.2)").result()

    with run.workers(2, ["one", "other"]) as start:
        assert take("one") and not take("one") and take("other")
    with run.workers(1, ["one", "other"]) as start:
        assert start(eval, "__import__('run').TURNS").result() == {}


def test_each_run_on_a_gpu_has_a_process_of_its_own_and_one_that_dies_gives_back_its_turn():
    with run.workers(2, ["one"]) as start:
        assert len({start(os.getpid).result() for _ in range(2)} | {os.getpid()}) == 3
        with pytest.raises(BrokenExecutor):
            start(eval, "__import__('run').TURNS['one'].acquire() and __import__('os')._exit(1)").result()
        assert start(eval, "__import__('run').TURNS['one'].acquire(timeout=0.2)").result()
    with run.workers(1, ["cpu"]) as start:
        assert start(os.getpid).result() == os.getpid()


@pytest.mark.parametrize("flag", ["--jobs=0", "--limit_seconds=0", "--guess_seconds=-1"])
def test_bad_flags(folder, tmp_path, capsys, flag):
    assert call(folder.parent, f"--results={tmp_path / 'r'}", flag) == 2
    assert capsys.readouterr().err.startswith(f"error: {flag.split('=')[0]} must be positive")


def test_no_results_do_not_empty_the_tables(tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_bytes(before := (studies.RESULTS.parent.parent / "README.md").read_bytes())
    (tmp_path / "other.jsonl").write_text("", encoding="utf-8")
    for name, says in (("none.jsonl", "is not there"), ("other.jsonl", "has no result on pg-books-bpe8192")):
        assert command(plot.main, plot.Args, [f"--results={tmp_path / name}", f"--readme={readme}"]) == 2
        assert says in capsys.readouterr().err and readme.read_bytes() == before


def test_damaged_results(folder, tmp_path, capsys):
    path = tmp_path / "study.jsonl"
    path.write_text("{}\n", encoding="utf-8")
    assert call(folder.parent, f"--results={path}") == 2
    assert f"{path}: line 1 is not a result of run.py" in capsys.readouterr().err
    assert path.read_text(encoding="utf-8") == "{}\n"


# ---------------------------------------------------------------------------------------------------------------------
# Plots and tables


def test_plots_and_tables(smoke):
    readme = smoke.parents[1] / "README.md"
    shutil.copy(ROOT / "experiments" / "README.md", readme)
    assert command(plot.main, plot.Args, ["--smoke", f"--results={smoke}", f"--readme={readme}"]) == 0
    text = readme.read_text(encoding="utf-8")
    for name in plot.PLOTS:
        assert smoke.with_name(f"{name}.png").stat().st_size < 200_000 and f"![{name}](results/{name}.png)" in text
    assert "| not made |" not in text
    mqa = [r["ppl"] for r in plot.Results(read_results(smoke), "shakespeare-byte", toy=True).of("figure1", "mqa")]
    assert f"| {sum(mqa) / 3:.2f} ± {torch.tensor(mqa, dtype=torch.float64).std():.2f} |" in text


def test_the_readme_shows_the_committed_results(tmp_path):
    """python experiments/plot.py was run after the last change of results, tables or arms."""
    readme, results = tmp_path / "README.md", tmp_path / "results" / "study.jsonl"
    results.parent.mkdir()
    for name in ("study.jsonl", "decode.json", "copying.jsonl", "rounding.jsonl"):
        shutil.copy(studies.RESULTS.with_name(name), results.with_name(name))
    shutil.copy(ROOT / "experiments" / "README.md", readme)
    assert command(plot.main, plot.Args, [f"--results={results}", f"--readme={readme}"]) == 0
    assert readme.read_text(encoding="utf-8") == (ROOT / "experiments" / "README.md").read_text(encoding="utf-8")
    for name in plot.PLOTS:
        assert results.with_name(f"{name}.png").exists() == studies.RESULTS.with_name(f"{name}.png").exists()


def test_order_names_the_pairs_that_differ():
    losses = dict(mha=3.7, mfa=3.8, vanilla=3.9, gated=None)
    rows = [row(studies.Task("table4", arm, run_for("table4", arm, 1, 0)), loss) for arm, loss in losses.items()]
    text = plot.order(plot.Results(rows), "table4")
    assert (
        text
        == f"Order: 2 of 3 pairs as in the paper. The other way round here: MHA ({math.exp(3.7):.2f}) below MFA ({math.exp(3.8):.2f})."
    )
    table = plot.main_table(plot.Results(rows), "table4")
    assert "1 of 1 did not train" in table and table.count("not made") == 2
    mfa, mha, proj = (("table4", arm) for arm in ("mfa", "mha", "proj"))
    assert plot.against(plot.Results(rows), mfa, mha)[3:] == ["-0.1000", "in 0 of 1 seeds"]
    assert plot.against(plot.Results(rows), mfa, proj)[1:] == ["+ extra value projection", "6.25%", "–", "not made"]


def test_a_run_that_did_not_train_is_counted_and_not_averaged():
    def rows(*ends):
        tasks = [studies.Task("why", "mha_16", run_for("why", "mha_16", 1, seed)) for seed in range(len(ends))]
        return [row(task, end) | dict(curve=[[500, 4.7], [4000, end]]) for task, end in zip(tasks, ends, strict=True)]

    results = plot.Results(rows(3.7, 4.7, 3.9))
    assert plot.outcome(results.of("why", "mha_16"), "val_loss") == "3.80 ± 0.14, 1 of 3 did not train"
    assert [found["val_loss"] for found in results.trained("why", "mha_16")] == [3.7, 3.9]
    assert plot.outcome(rows(5.0)) == "1 of 1 did not train"


def test_runs_whose_gradient_rounding_moves_far_are_named():
    def line(seed, *off):
        looks = [[step, each] for step, each in enumerate(off, 1)]
        return row(studies.Task("why", "mha_16", run_for("why", "mha_16", 1, seed)), 3.7) | dict(name="MHA", rounding=looks)

    rows = [line(0, 0.01, 0.3, 0.2), line(1, 0.01, 0.04), line(2, 0.02, None)]
    *head, last = plot.checked_part(plot.Results([*rows, line(0) | dict(seed=3)])).splitlines()
    assert head[2:4] == [
        "| why: MHA | 0.0014 | 0 | 1% | 30% | 20% | 40.45 |",
        "| why: MHA | 0.0014 | 2 | 2% | not finite | not finite | 40.45 |",
    ]
    assert last == "Rounding moves the gradient of the other 1 of 3 runs that were asked by 4.0% at most."


def test_a_difference_of_means_has_students_interval():
    d, half = plot.difference([1.0, 2.0, 3.0], [2.0, 3.0, 4.0])
    assert d == 1 and half == pytest.approx(2.776 * math.sqrt(2 / 3))  # equal variances of 1, 4 degrees of freedom
    assert plot.difference([1.0], [2.0, 3.0, 4.0]) == (2.0, None)


def test_a_size_is_compared_at_the_seeds_that_all_its_attentions_have_trained():
    def line(arm, seed, end):
        return row(studies.Task("figure3", arm, run_for("figure3", arm, 1, seed)), end) | dict(curve=[[1, 4.7], [2, end]])

    rows = [line(arm, seed, 3.7) for arm in ("mha_2m", "mfa_2m", "mha_7m") for seed in (0, 1)]
    rows += [line("mfa_kr_2m", 0, 3.8), line("mfa_kr_2m", 1, 4.8)]  # the second did not train
    seeds = {arm: [found["seed"] for found in lines] for arm, lines in plot.same_seeds(plot.Results(rows), "figure3").items()}
    assert seeds["mha_2m"] == seeds["mfa_2m"] == seeds["mfa_kr_2m"] == [0]
    assert seeds["mha_7m"] == [0, 1] and seeds["mha_60m"] == []
    table = plot.figure3_part(plot.Results([*rows, line("mfa_7m", 0, 4.8)]))
    assert "| 1 of 1 did not train |" in table and table.count("not made") == len(FIGURE3) - 5


def test_distances_from_mha_by_position_are_of_means_over_seeds():
    def line(arm, seed, *losses):
        by = dict(by_position=[[1 << i >> 1, loss] for i, loss in enumerate(losses)])
        return row(studies.Task("figure1", arm, run_for("figure1", arm, 1, seed)), 3.7) | by

    rows = [line("mfa", 0, 5.0, 4.0, 3.0), line("mfa", 1, 5.2, 4.0, 3.0)]
    assert plot.positions_part(plot.Results(rows)) == "MHA was not made."
    text = plot.positions_part(plot.Results([*rows, line("mha", 0, 5.0, 4.1, 3.0)]))
    assert text.startswith("| nats above MHA, position | 0 | 1 | 2 to 3 |") and "MHA |" not in text
    assert "| 0.100 | -0.100 | 0.000 |" in text and text.count("| not made | not made | not made |") == len(FIGURE1) - 2


def test_power_law():
    a, b, rms = plot.power_law([(x, 20 * x**-0.05) for x in (1e12, 1e13, 1e15)])
    assert (a, b) == (pytest.approx(20), pytest.approx(0.05)) and rms < 1e-9


def test_a_missing_mark():
    with pytest.raises(BadInput, match="begin status"):
        plot.fill("no marks", {"status": "text"})
    assert (
        plot.fill("a\n<!-- begin x -->\nold\n<!-- end x -->\nb", {"x": r"\new"})
        == "a\n<!-- begin x -->\n\\new\n<!-- end x -->\nb"
    )


# ---------------------------------------------------------------------------------------------------------------------
# Copying


def test_every_target_of_the_copying_task_was_seen_before():
    tokens, targets = copying.batch(torch.Generator().manual_seed(0))
    for sequence, target in zip(tokens.tolist(), targets.tolist(), strict=True):
        new = target.count(-1)  # the first of these are the rest of the block
        assert all(t == -1 for t in target[:new]) and copying.PERIODS[0] <= new + 1 < copying.PERIODS[1]
        assert target[new:] == sequence[: len(sequence) - new]


def test_models_of_the_copying_task_have_equal_parameters():
    counts = [count_params(copying.config(arm)) for arm in copying.ARMS]
    assert max(counts) / min(counts) < 1.02


def test_a_model_that_copies_is_found_and_one_that_guesses_is_not(monkeypatch):
    class Known(torch.nn.Module):  # in place of GPT: the loss is whatever `losses` says
        def __init__(self, cfg):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, tokens, targets):
            return None, next(losses) + 0 * self.weight.sum()

    monkeypatch.setattr(copying, "GPT", Known)
    losses = iter([4.0] * 100 + [0.0] * 100)
    found = copying.train_run("mha", 0, 200)
    # the mean is 4.0 by then, and below ln(64) / 2 = 2.08 after seven zeros: 4.0 * 0.9^6 = 2.13, 4.0 * 0.9^7 = 1.91
    assert found["step"] == 107 and found["curve"][-1][0] == 107
    losses = iter([4.0] * 30)
    assert copying.train_run("mha", 0, 30)["step"] is None


def test_copying_goes_on_where_it_stopped(tmp_path, capsys):
    flags = [f"--results={tmp_path / 'copying.jsonl'}", "--jobs=2", "--steps=2"]
    assert command(copying.main, copying.Args, [*flags, "--seeds=1"]) == 0
    first = (tmp_path / "copying.jsonl").read_bytes()
    n = len(copying.ARMS)
    assert f"{n} runs to make, 0 are made" in capsys.readouterr().out and len(first.splitlines()) == n
    assert command(copying.main, copying.Args, [*flags, "--seeds=1"]) == 0
    assert f"0 runs to make, {n} are made" in capsys.readouterr().out and (tmp_path / "copying.jsonl").read_bytes() == first
    rows = copying.read(tmp_path / "copying.jsonl")
    assert "| > 2 | > 2 |" in plot.copying_part(rows) and len(plot.copying_plot(rows).axes) == 1
    assert command(copying.main, copying.Args, [*flags, "--seeds=0"]) == 2
    assert "--seeds must be at least 1, not 0" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# Rounding


def test_the_gradient_is_that_of_a_step_and_bfloat16_moves_it_a_little():
    torch.manual_seed(0)
    model = GPT(Config(vocab_size=11, block_size=16, n_layer=1, dim=32, head_dim=8, ffn_dim=32))
    loss_of, tokens = loss_function(model, model, torch.bfloat16, False, False), torch.randint(11, (5, 17))
    loss, g32 = run.gradient(model, loss_of, tokens, torch.float32)
    want = torch.autograd.grad(model(tokens[:, :-1], tokens[:, 1:])[1], list(model.parameters()))
    assert torch.equal(g32, torch.cat([g.flatten() for g in want])) and loss == loss_of(tokens).item()
    for parts in (2, 3):  # of 3 and 2, of 2, 2 and 1
        one, other = run.gradient(model, loss_of, tokens, torch.float32, parts)
        assert one.item() == pytest.approx(loss.item(), rel=1e-6) and (other - g32).norm() < 1e-5 * g32.norm()
    off = (run.gradient(model, loss_of, tokens, torch.bfloat16)[1] - g32).norm() / g32.norm()
    assert 2**-12 < off < 2**-4


@pytest.mark.parametrize("attn", ["mha", "mqa"])
def test_the_range_of_the_scores_is_that_of_eq_1(attn):
    torch.manual_seed(0)
    model = GPT(Config(attn=attn, vocab_size=11, block_size=8, n_layer=1, dim=32, head_dim=8, ffn_dim=32, init_std=0.5))
    attn, tokens = model.blocks[0].attn, torch.randint(11, (2, 6))
    x, seen = model.blocks[0].attn_norm(model.embed(tokens)), []
    for i in range(6):
        y = torch.stack([torch.einsum("bh,chk,bk->bc", x[:, i], attn.qk_circuit(i - j), x[:, j]) for j in range(i + 1)])
        seen.append((attn.scale * (y.amax(0) - y.amin(0))).max().item())
    assert rounding.score_range(model, tokens) == pytest.approx(max(seen), rel=1e-5)
    assert "attend" not in vars(attn)  # as it was


def test_rounding_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(rounding, "SIZE", dict(block_size=16, n_layer=1, dim=32, head_dim=8, rope_dim=4, ffn_dim=88))
    monkeypatch.setattr(rounding, "ARMS", {arm: rounding.ARMS[arm] for arm in ("mha", "mqa")})
    flags = [f"--results={tmp_path / 'rounding.jsonl'}", "--steps=50"]
    assert command(rounding.main, rounding.Args, flags) == 0
    assert "8 runs to make, 0 are made" in capsys.readouterr().out
    rows = rounding.read(tmp_path / "rounding.jsonl")
    dtypes = ("float32", "bfloat16")
    assert list(rows) == [(arm, lr, dtype) for dtype in dtypes for lr in rounding.RATES for arm in ("mha", "mqa")]
    ends = {rows["mha", lr, dtype]["curve"][-1][1] for lr in rounding.RATES for dtype in dtypes}
    assert len(ends) == 4  # each is a training of its own
    for row in rows.values():
        assert [step for step, *_ in row["curve"]] == [25, 50]
        assert all(abs(norm) <= off + 1e-4 for _, _, off, norm, _ in row["curve"])  # the triangle's inequality
    assert command(rounding.main, rounding.Args, flags) == 0 and "0 runs to make, 8 are made" in capsys.readouterr().out
    assert plot.rounding_part(rows).count("\n| M") == 4
    assert command(rounding.main, rounding.Args, [flags[0], "--steps=24"]) == 2
    assert "--steps must be at least 25" in capsys.readouterr().err
