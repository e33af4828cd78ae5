"""What train.py promises, one statement of fact a test."""

import json
import math
import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from runs import FLAGS, ROOT, command, files_below, rows, small, state, text, train_losses

import train as trainer
from experiments.probes.kill_test import identical, kill_test
from mfa import ATTENTION, GPT, PRESETS, Config, preset
from prepare_data import load
from support import files, machine, run_folder
from support.cli import BadInput
from support.machine import Machine
from support.progress import Progress, duration
from support.run_folder import Run, load_checkpoint, model_from
from train import (
    RECIPES,
    Train,
    batch_starts,
    count_params,
    defaults,
    evaluate,
    match_params,
    mha_of,
    train,
)

quick = pytest.mark.usefixtures("no_ceremony")
CPU = torch.device("cpu")
COMPILE = trainer.can_compile(trainer.pick_device("auto"))  # the default where the tests run


def signals_at(monkeypatch, moments: dict[int, int]) -> None:
    """Raise a signal within each given step (the learning rate is asked for once a step)."""
    plain = trainer.learning_rate

    def learning_rate(step, args):
        if step + 1 in moments:
            signal.raise_signal(moments.pop(step + 1))
        return plain(step, args)

    monkeypatch.setattr(trainer, "learning_rate", learning_rate)


# ---------------------------------------------------------------------------------------------------------------------
# Training


@quick
@pytest.mark.parametrize("attn", ATTENTION)
def test_every_attention_trains_and_its_loss_falls(attn, data, tmp_path):
    result = train(small(data, tmp_path, attn, max_iters=50, eval_interval=25, learning_rate=1e-2))
    losses = train_losses(tmp_path)
    assert len(losses) == 50 and sum(losses[-5:]) / 5 < sum(losses[:5]) / 5 - 0.3
    assert result["best_loss"] < math.log(58) - 0.3  # 58 characters, all equally likely at the start
    assert result["stopped"] == 0 and result["step"] == 50


def test_a_run_ends_with_a_sample_the_figures_where_everything_is_and_the_next_command(data, tmp_path, capsys):
    out = tmp_path / "run"
    assert command(trainer.main, Train, [*FLAGS, "--attn=mfa_kr", f"--out={out}", *text(data)], defaults) == 0
    printed = capsys.readouterr()
    ckpt = load_checkpoint(out / "best.pt")
    for part in (
        "a sample at temperature 0.8:\n",
        f"best validation loss {ckpt['best_loss']:.4f} nats per character",
        f"{sum(p.numel() for p in GPT(Config(**ckpt['config'])).parameters()):,} parameters",
        "cache: 8 bytes per token at 16 bit, 6.25% of MHA's 128",  # 2 bytes x latent_dim 4; 2 bytes x 2 x 4 heads x 8
        f"next: python sample.py --checkpoint {out / 'best.pt'}",
    ):
        assert part in printed.out
    assert printed.err == ""
    assert {path.name for path in out.iterdir()} == {"best.pt", "latest.pt", "metrics.jsonl", "loss.png"}
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")


@quick
def test_each_line_on_the_terminal_has_step_loss_speed_and_time_left_and_the_file_has_the_same(data, tmp_path, capsys):
    train(small(data, tmp_path, max_iters=20, log_interval=5))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ") and "tokens/s" in line]
    assert [int(line.split()[1]) for line in lines] == [5, 10, 15, 20]
    assert [line.split()[3] for line in lines] == [f"{loss:.4f}" for loss in train_losses(tmp_path)]
    assert all(line.endswith(" left") for line in lines)
    validation = [row for row in rows(tmp_path) if "val_loss" in row]
    assert [row["step"] for row in validation] == [10, 20]
    meta = json.loads((data / "file-play-char" / "meta.json").read_text())
    assert all(row["val_bpb"] == pytest.approx(row["val_loss"] / math.log(2)) for row in validation)  # 1 byte a character
    assert meta["val_tokens"] == meta["val_bytes"]


@quick
def test_equal_seeds_give_equal_losses_and_other_seeds_others(data, tmp_path, capsys):
    printed = {}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        torch.manual_seed(len(printed))  # what was drawn before does not matter
        train(small(data, tmp_path / name, seed=seed, dropout=0.1))
        printed[name] = [line.split()[:4] for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert rows(tmp_path / "a") == rows(tmp_path / "b") and printed["a"] == printed["b"]
    assert identical(state(tmp_path / "a" / "latest.pt"), state(tmp_path / "b" / "latest.pt"))
    assert rows(tmp_path / "a") != rows(tmp_path / "c")


@quick
def test_accumulating_gradients_over_pieces_of_a_batch_gives_the_losses_of_the_whole(data, tmp_path):
    train(small(data, tmp_path / "whole"))
    train(small(data, tmp_path / "pieces", grad_accum=4))
    assert train_losses(tmp_path / "pieces") == pytest.approx(train_losses(tmp_path / "whole"), abs=1e-5)


def test_batches_depend_on_seed_and_step_alone_and_stay_inside_the_text(data, tmp_path):
    args = small(data, tmp_path, batch_size=64)
    again = replace(args, max_iters=9, learning_rate=1.0, out=None)
    n = args.model.block_size + 3  # room for three starts
    seen = set()
    for step in range(50):
        starts = batch_starts(args, step, n)
        assert torch.equal(starts, batch_starts(again, step, n))
        seen |= set(starts.tolist())
        assert not torch.equal(starts, batch_starts(args, step + 1, n))
        assert not torch.equal(starts, batch_starts(replace(args, seed=args.seed + 1), step, n))
    assert seen == {0, 1, 2}  # the last window ends with the last token


def test_the_learning_rate_warms_up_in_a_line_and_decays_in_a_cosine():
    args = Train(learning_rate=1.0, min_lr=0.1, warmup_iters=10, max_iters=110)
    rate = [trainer.learning_rate(step, args) for step in range(120)]
    assert rate[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert rate[10] == 1.0 and rate[60] == pytest.approx(0.55) and rate[110:] == pytest.approx([0.1] * 10)
    assert all(a > b for a, b in zip(rate[10:110], rate[11:111], strict=True))
    assert trainer.learning_rate(0, replace(args, warmup_iters=0)) == 1.0
    assert trainer.learning_rate(5, replace(args, warmup_iters=5, max_iters=5)) == 1.0  # no step is left to decay in


@pytest.mark.parametrize("attn", ATTENTION)
def test_weight_decay_is_on_matrices_only(attn):
    model = GPT(Config(attn=attn, dim=32, n_layer=2, head_dim=8, n_expert=2, moe_ffn_dim=8))
    decayed, others = trainer.make_optimizer(model, Train(weight_decay=0.3)).param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    assert decayed["weight_decay"] == 0.3 and others["weight_decay"] == 0.0
    assert sorted(names[id(p)] for p in decayed["params"] + others["params"]) == sorted(names.values())
    assert all("norm" in names[id(p)] or "alpha" in names[id(p)] for p in others["params"])
    assert not any("norm" in names[id(p)] or "alpha" in names[id(p)] for p in decayed["params"])
    assert (decayed["betas"], decayed["eps"]) == ((0.9, 0.95), 1e-8)


@quick
def test_the_gradient_is_clipped_before_each_step(data, tmp_path, monkeypatch):
    seen, plain = [], torch.optim.AdamW.step

    def step(self, *rest, **more):
        grads = [p.grad for group in self.param_groups for p in group["params"]]
        seen.append(torch.nn.utils.get_total_norm(grads).item())
        return plain(self, *rest, **more)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    train(small(data, tmp_path / "clipped", grad_clip=0.01))
    assert len(seen) == 20 and max(seen) <= 0.01 * (1 + 1e-4)
    seen.clear()
    train(small(data, tmp_path / "free", grad_clip=0.0))
    assert min(seen) > 0.01


@quick
def test_a_text_without_line_ends_and_a_vocabulary_larger_than_the_text_s_train_and_sample(data, tmp_path, monkeypatch, capsys):
    monkeypatch.undo()  # the ceremony is what is tested
    (tmp_path / "line.txt").write_text("to be or not to be that is the question " * 50)
    args = small(data, tmp_path / "out", vocab_size=100, max_iters=2)
    train(replace(args, file=str(tmp_path / "line.txt"), data_dir=tmp_path))
    assert "a sample at temperature 0.8:" in capsys.readouterr().out
    assert load_checkpoint(tmp_path / "out" / "best.pt")["config"]["vocab_size"] == 100


# ---------------------------------------------------------------------------------------------------------------------
# Sizes and flags


@pytest.mark.parametrize("name", PRESETS)
def test_every_attention_but_fpba_gets_mha_s_parameters_within_one_percent(name):
    for attn in set(ATTENTION) - {"fpba", "mha"}:
        cfg = match_params(preset(name, attn))
        assert count_params(cfg) == pytest.approx(count_params(preset(name, "mha")), rel=0.01)


@pytest.mark.parametrize("attn", ATTENTION)
def test_parameters_are_counted_right_without_making_them(attn):
    for more in (dict(n_layer=1), dict(n_layer=5, tied=False), dict(n_layer=4, n_expert=3, moe_ffn_dim=8, ffn_dim=40)):
        cfg = Config(attn=attn, dim=16, head_dim=4, rope_dim=4, **more)
        assert count_params(cfg) == sum(p.numel() for p in GPT(cfg).parameters())


@pytest.mark.parametrize("attn", ["mha", "mfa", "mfa_kr"])
def test_paper_7b_keeps_table_7_s_own_experts(attn):
    cfg = preset("paper-7b", attn)
    assert match_params(cfg) == cfg and mha_of(cfg) == preset("paper-7b", "mha")


def test_match_params_says_when_the_attention_alone_is_too_large():
    with pytest.raises(ValueError, match="no ffn_dim gives mfa MHA's .* parameters"):
        match_params(Config(attn="mfa", dim=32, head_dim=8, ffn_dim=8, n_head=200))


@quick
def test_matching_can_be_switched_off(data, tmp_path):
    train(small(data, tmp_path / "on", max_iters=1))
    train(small(data, tmp_path / "off", max_iters=1, match_params=False))
    width = {name: load_checkpoint(tmp_path / name / "best.pt")["config"]["ffn_dim"] for name in ("on", "off")}
    assert width["off"] == 88 and width["on"] > 88


def parsed(*argv: str) -> Train:
    got = []
    assert command(got.append, Train, list(argv), defaults) == 0
    return got[0]


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("attn", ["mha", "mfa", "mfa_kr"])
def test_flags_start_from_the_preset_of_the_attention_and_its_recipe(name, attn):
    args = parsed("--preset", name, "--attn", attn)
    assert args == Train(model=preset(name, attn, vocab_size=0), preset=name, compile=COMPILE, **RECIPES[name])


def test_without_flags_it_is_mfa_on_the_tiny_preset():
    assert parsed() == Train(model=preset("tiny", "mfa", vocab_size=0), compile=COMPILE)


@pytest.mark.parametrize("flag", ["--n_head", "--n-head"])
def test_flags_take_underscores_and_hyphens(flag):
    assert parsed(flag, "5").model.n_head == 5


def test_any_field_of_preset_and_recipe_can_be_overridden():
    argv = "--preset=baby --attn=gqa --n_kv-head=3 --dropout=0.5 --batch-size=7 --learning_rate=1 --no-match-params --out=x".split()
    args = parsed(*argv)
    assert args.model == preset("baby", "gqa", vocab_size=0, n_kv_head=3, dropout=0.5)
    assert args == Train(
        model=args.model,
        preset="baby",
        match_params=False,
        out=Path("x"),
        compile=COMPILE,
        **RECIPES["baby"] | dict(batch_size=7, learning_rate=1.0),
    )


def test_help_mentions_every_flag(capsys):
    assert command(trainer.main, Train, ["--help"], defaults) == 0
    told = capsys.readouterr().out
    flags = (
        "attn preset dataset max_iters batch_size block_size learning_rate seed device compile no_compile out resume overwrite"
    )
    fields = {*flags.split(), *Config.__dataclass_fields__, *Train.__dataclass_fields__} - {"model"}
    assert [name for name in fields if f"--{name}" not in told] == []


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation


def plain_loss(model: GPT, ids: torch.Tensor) -> float:
    """One forward pass for each token but the first, from the start of its window; the last window is full, too."""
    T, total = model.cfg.block_size, 0.0
    for at in range(1, len(ids)):
        start = min((at - 1) // T * T, len(ids) - 1 - T)
        logits = model(ids[None, start:at].long())[0][0, -1]
        total += F.cross_entropy(logits.double(), ids[at].long()).item()
    return total / (len(ids) - 1)


@pytest.mark.parametrize("n", [17, 33, 50, 75])
def test_evaluation_is_a_plain_loop_over_every_token_of_the_split_once(n):
    torch.manual_seed(0)
    model = GPT(Config(dim=32, n_layer=1, head_dim=8, block_size=16, dropout=0.5)).double()
    ids = torch.randint(65, (n,)).to(torch.int16)
    found = evaluate(model, ids, Machine("cpu"))
    assert model.training
    assert found == pytest.approx(plain_loss(model.eval(), ids), rel=1e-6)  # forward() takes the loss in float32


@pytest.mark.parametrize("world", [2, 3, 5])
def test_evaluation_is_the_same_however_it_is_split(world, monkeypatch):
    model = GPT(Config(dim=32, n_layer=1, head_dim=8, block_size=16)).double()
    ids = torch.randint(65, (2 * 16384 + 777,)).to(torch.int16)  # three batches
    alone_machine = Machine("cpu")
    alone, counts, totals = evaluate(model, ids, alone_machine), [], []

    def all_reduce(x):
        (totals if x.is_floating_point() else counts).append(x.item())
        x.fill_(1)

    monkeypatch.setattr("support.machine.dist.all_reduce", all_reduce)
    alone_machine.world = world
    for rank in range(world):
        alone_machine.rank = rank
        evaluate(model, ids, alone_machine)
    assert sum(counts) == len(ids) - 1 and sum(totals) / sum(counts) == pytest.approx(alone, rel=1e-9)


@quick
def test_evaluation_does_not_change_training(data, tmp_path):
    train(small(data, tmp_path / "often", eval_interval=3, dropout=0.2))
    train(small(data, tmp_path / "once", eval_interval=20, dropout=0.2))
    assert train_losses(tmp_path / "often") == train_losses(tmp_path / "once")
    last = [state(tmp_path / name / "latest.pt")["model"] for name in ("often", "once")]
    assert identical(*last)


@quick
def test_the_validation_loss_is_over_the_whole_split_or_its_first_tokens(data, tmp_path):
    train(small(data, tmp_path / "all"))
    train(small(data, tmp_path / "part", eval_tokens=100))
    model = model_from(load_checkpoint(tmp_path / "all" / "latest.pt"), tmp_path, CPU)
    val = torch.from_numpy(load(data / "file-play-char")[1].astype("int16"))
    for name, ids in (("all", val), ("part", val[:101])):
        assert rows(tmp_path / name)[-1]["val_loss"] == pytest.approx(evaluate(model, ids, Machine("cpu")), rel=1e-9)
    assert len(val) == 2000


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


@quick
def test_a_checkpoint_holds_all_that_is_needed_to_go_on_and_no_code(data, tmp_path):
    train(small(data, tmp_path, attn="mfa_kr"))
    ckpt = torch.load(tmp_path / "latest.pt", weights_only=True)
    assert (ckpt["format"], ckpt["step"], ckpt["tokens"]) == (1, 20, 20 * 4 * 16)
    assert ckpt["config"]["attn"] == "mfa_kr" and ckpt["tokenizer"]["kind"] == "char"
    assert ckpt["model"].keys() == GPT(Config(**ckpt["config"])).state_dict().keys()
    assert {"torch", "python", "numpy"} <= ckpt["versions"].keys() and ckpt["data"]["val_tokens"] == 2000
    assert len(ckpt["optimizer"]["param_groups"]) == 2 and ckpt["rng"].dtype == torch.uint8
    assert ckpt["args"]["seed"] == 1337 and ckpt["best_loss"] == rows(tmp_path)[-1]["best_loss"]
    assert not [*tmp_path.glob("*.part")]


@quick
def test_a_compiled_run_s_checkpoint_has_the_plain_names(data, tmp_path, monkeypatch):
    class Compiled(torch.nn.Module):  # as torch.compile wraps
        def __init__(self, model):
            super().__init__()
            self._orig_mod = model

        def forward(self, *args):
            return self._orig_mod(*args)

    monkeypatch.setattr(torch, "compile", lambda model, **_: Compiled(model))
    train(small(data, tmp_path / "compiled", compile=True))
    train(small(data, tmp_path / "plain"))
    assert identical(state(tmp_path / "compiled" / "latest.pt")["model"], state(tmp_path / "plain" / "latest.pt")["model"])


@quick
def test_best_is_the_checkpoint_of_the_lowest_validation_loss_and_latest_the_last(data, tmp_path, monkeypatch):
    scripted = iter([3.0, 2.0, 2.5, 2.25])
    monkeypatch.setattr(trainer, "evaluate", lambda *_: next(scripted))
    result = train(small(data, tmp_path, max_iters=20, eval_interval=5))
    best, latest = (load_checkpoint(tmp_path / f"{name}.pt") for name in ("best", "latest"))
    assert (best["step"], latest["step"]) == (10, 20)
    assert best["best_loss"] == latest["best_loss"] == result["best_loss"] == 2.0
    assert not identical(best["model"], latest["model"])


@quick
def test_a_disk_that_fills_up_leaves_the_last_complete_checkpoint(data, tmp_path, monkeypatch):
    train(small(data, tmp_path, max_iters=10))
    before = files_below(tmp_path)

    class Full:  # takes 10,000 bytes
        def __init__(self, file):
            self.file, self.room = file, 10_000

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def write(self, data):
            self.room -= len(data)
            if self.room < 0:
                raise OSError(28, "No space left on device")
            return self.file.write(data)

    plain = open
    full = lambda path, mode, **more: Full(plain(path, mode)) if str(path).endswith(".pt.part") else plain(path, mode, **more)  # noqa: E731
    monkeypatch.setattr(files, "open", full, raising=False)
    with pytest.raises(OSError, match="No space left on device: .*best.pt"):
        train(small(data, tmp_path, max_iters=20, resume=True))
    after = files_below(tmp_path)
    assert {name: after[name] for name in after if name.endswith(".pt")} == {
        name: before[name] for name in before if name.endswith(".pt")
    }
    monkeypatch.undo()


# ---------------------------------------------------------------------------------------------------------------------
# Stop and resume


STEPS = dict(max_iters=200, warmup_iters=100, eval_interval=40)


@pytest.fixture(scope="module", params=[0.0, 0.2], ids=["no dropout", "dropout"])
def uninterrupted(request, data, tmp_path_factory):
    out = tmp_path_factory.mktemp("uninterrupted")
    args = small(data, out, dropout=request.param, **STEPS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Progress, "plot", lambda *_: None)
        patch.setattr(Progress, "finish", lambda *_: None)
        train(args)
    return args


def same_run(a: Path, b: Path) -> bool:
    return rows(a) == rows(b) and all(identical(state(a / name), state(b / name)) for name in ("latest.pt", "best.pt"))


@quick
def test_a_run_stopped_by_signals_and_resumed_is_the_uninterrupted_one_to_the_last_bit(
    uninterrupted, tmp_path, monkeypatch, capsys
):
    args = replace(uninterrupted, out=tmp_path)
    signals_at(monkeypatch, {37: signal.SIGINT, 121: signal.SIGTERM})
    for step, number in ((37, signal.SIGINT), (121, signal.SIGTERM)):
        result = train(replace(args, resume=step > 37))
        assert (result["step"], result["stopped"]) == (step, number)  # the step in which it came is finished
        assert f"python train.py --resume --out {tmp_path}" in capsys.readouterr().out
        assert load_checkpoint(tmp_path / "latest.pt")["step"] == step
        torch.rand(step)  # a new process would not have this generator's state
    assert train(replace(args, resume=True))["stopped"] == 0
    assert same_run(uninterrupted.out, tmp_path)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler  # the handlers are put back


@quick
def test_a_run_that_was_given_more_steps_is_the_longer_one_to_the_last_bit(uninterrupted, tmp_path):
    train(replace(uninterrupted, out=tmp_path, max_iters=80))  # within the warm-up, which does not know the end
    train(replace(uninterrupted, out=tmp_path, resume=True))
    assert same_run(uninterrupted.out, tmp_path)


@quick
def test_what_was_done_after_the_checkpoint_is_done_again_and_metrics_are_cut_back_to_it(uninterrupted, tmp_path, monkeypatch):
    class Crash(Exception):
        pass

    def crash(step, args, plain=trainer.learning_rate):
        if step == 71:
            raise Crash
        return plain(step, args)

    with monkeypatch.context() as patch, pytest.raises(Crash):
        patch.setattr(trainer, "learning_rate", crash)
        train(replace(uninterrupted, out=tmp_path))
    assert load_checkpoint(tmp_path / "latest.pt")["step"] == 40 and rows(tmp_path)[-1]["step"] == 71
    with open(tmp_path / "metrics.jsonl", "a") as f:
        f.write('{"step": 72, "train_lo')  # as a crash leaves it
    train(replace(uninterrupted, out=tmp_path, resume=True))
    assert same_run(uninterrupted.out, tmp_path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_command_exits_as_a_shell_reports_the_signal(number, data, tmp_path, monkeypatch):
    signals_at(monkeypatch, {3: number})
    assert command(trainer.main, Train, [*FLAGS, *text(data), f"--out={tmp_path}"], defaults) == 128 + number


@quick
def test_a_second_ctrl_c_ends_at_once_and_keeps_the_last_checkpoint(data, tmp_path, monkeypatch, capsys):
    def twice(step, args, plain=trainer.learning_rate):
        if step == 13:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        return plain(step, args)

    monkeypatch.setattr(trainer, "learning_rate", twice)
    assert command(trainer.main, Train, [*FLAGS, *text(data), f"--out={tmp_path}"], defaults) == 130
    assert capsys.readouterr().err == "interrupted\n"
    assert load_checkpoint(tmp_path / "latest.pt")["step"] == 10


@pytest.fixture(scope="module")
def stopped(data, tmp_path_factory):
    """The folder of a run of ten steps."""
    out = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Progress, "finish", lambda *_: None)
        train(small(data, out, max_iters=10))
    return out


@quick
def test_resuming_on_another_text_says_so(stopped, data, tmp_path):
    (tmp_path / "play.txt").write_text((data / "play.txt").read_text()[::-1])
    before = files_below(stopped)
    with pytest.raises(BadInput, match="file was .*text was 'play.txt of sha256 .* tokens' and is now 'play.txt of"):
        train(replace(small(tmp_path, stopped), resume=True))
    assert files_below(stopped) == before


@quick
def test_resume_takes_the_flags_that_are_not_given_from_the_run(data, tmp_path):
    train(small(data, tmp_path, attn="mla", max_iters=10, weight_decay=0.25))
    assert command(trainer.main, Train, ["--resume", f"--out={tmp_path}", "--max_iters=12", "--log-interval=2"], defaults) == 0
    ckpt = load_checkpoint(tmp_path / "latest.pt")
    assert (ckpt["step"], ckpt["config"]["attn"], ckpt["args"]["weight_decay"]) == (12, "mla", 0.25)
    assert [row["step"] for row in rows(tmp_path)][-2:] == [12, 12]


@quick
def test_resume_on_an_empty_folder_starts(data, tmp_path):
    (tmp_path / "run").mkdir()
    assert train(small(data, tmp_path / "run", resume=True))["step"] == 20
    assert train(small(data, tmp_path / "new", resume=True))["step"] == 20


def test_resuming_a_finished_run_says_again_how_it_ended(data, tmp_path, capsys):
    train(small(data, tmp_path, max_iters=10))
    first, before = capsys.readouterr().out, files_below(tmp_path)
    train(small(data, tmp_path, max_iters=10, resume=True))
    again = capsys.readouterr().out
    assert first[first.index("a sample") :] == again[again.index("a sample") :]
    assert {name: kept for name, kept in files_below(tmp_path).items() if name != "loss.png"} == {
        name: kept for name, kept in before.items() if name != "loss.png"
    }


def test_flags_that_cannot_work_are_refused_before_anything_is_written(data, tmp_path, monkeypatch):
    with pytest.raises(BadInput, match="--resume goes on with the run that --overwrite would replace"):
        train(small(data, tmp_path / "run", resume=True, overwrite=True))
    monkeypatch.setattr(machine.shutil, "which", lambda name: None)
    with pytest.raises(BadInput, match=r"--compile needs a C\+\+ compiler on a CPU"):
        train(small(data, tmp_path / "run", compile=True))
    assert not (tmp_path / "run").exists()


@quick
def test_a_new_run_refuses_a_folder_that_holds_one_and_overwrite_replaces_it(data, tmp_path, monkeypatch):
    def no_room(*_):
        raise OSError(28, "no room")

    train(small(data, tmp_path, max_iters=20))
    before = files_below(tmp_path)
    with pytest.raises(BadInput, match="holds a run: --resume continues it, --overwrite replaces it"):
        train(small(data, tmp_path))
    assert files_below(tmp_path) == before
    with monkeypatch.context() as patch, pytest.raises(OSError, match="no room"):
        patch.setattr(trainer.torch, "save", no_room)
        train(small(data, tmp_path, overwrite=True))
    assert files_below(tmp_path) == before  # the old run stays until the new one can be saved
    train(small(data, tmp_path, max_iters=4, eval_interval=100, log_interval=2, overwrite=True))
    assert load_checkpoint(tmp_path / "best.pt")["step"] == 4 and [row["step"] for row in rows(tmp_path)] == [2, 4, 4]


@pytest.mark.parametrize("optimizer, kills", [("adamw", 3), ("muon", 2)])
def test_a_process_killed_at_random_moments_loses_nothing_and_leaves_no_unreadable_file(optimizer, kills):
    result = kill_test(kills, optimizer=optimizer)  # experiments/probes/kill_test.py does it 50 times
    assert sum(result["died_in"].values()) == kills and result["identical_to_uninterrupted"]


# ---------------------------------------------------------------------------------------------------------------------
# Losses that are not finite


@quick
def test_a_loss_that_is_not_finite_stops_the_run_names_the_step_and_leaves_the_last_good_checkpoint(
    data, tmp_path, monkeypatch
):
    plain = trainer.learning_rate
    monkeypatch.setattr(trainer, "learning_rate", lambda step, args: plain(step, args) if step < 12 else math.inf)
    with pytest.raises(SystemExit) as stopped:
        train(small(data, tmp_path, log_interval=4))
    assert f"the loss is nan at step 14: stopped. {tmp_path / 'latest.pt'} holds the last good state. Try half" in str(
        stopped.value
    )
    ckpt = load_checkpoint(tmp_path / "latest.pt")
    assert ckpt["step"] == 10 and all(p.isfinite().all() for p in ckpt["model"].values())
    assert rows(tmp_path)[-1]["step"] == 12
    monkeypatch.undo()
    assert train(small(data, tmp_path, resume=True))["step"] == 20


@quick
def test_a_validation_loss_that_is_not_finite_does_too(data, tmp_path, monkeypatch):
    plain = trainer.learning_rate
    monkeypatch.setattr(trainer, "learning_rate", lambda step, args: plain(step, args) if step < 19 else math.inf)
    with pytest.raises(SystemExit, match="the validation loss is nan at step 20"):
        train(small(data, tmp_path))
    assert load_checkpoint(tmp_path / "latest.pt")["step"] == load_checkpoint(tmp_path / "best.pt")["step"] == 10


@quick
def test_ctrl_c_does_not_save_weights_that_are_not_finite(data, tmp_path, monkeypatch):
    plain = trainer.learning_rate
    monkeypatch.setattr(trainer, "learning_rate", lambda step, args: plain(step, args) if step < 14 else math.inf)
    signals_at(monkeypatch, {15: signal.SIGINT})
    with pytest.raises(SystemExit, match="the sum of the weights is nan at step 15"):
        train(small(data, tmp_path))
    assert load_checkpoint(tmp_path / "latest.pt")["step"] == 10


@quick
def test_a_run_that_replaced_another_is_resumed_as_it_says(data, tmp_path):
    for more in (dict(), dict(overwrite=True)):
        train(small(data, tmp_path, max_iters=2, **more))
    args = parsed(f"--out={tmp_path}", "--resume", "--max_iters=4", "--device=cpu")
    assert args.resume and not args.overwrite and train(args)["step"] == 4


@quick
def test_a_folder_that_was_moved_is_resumed_where_it_is(data, tmp_path):
    train(small(data, tmp_path / "before", max_iters=2))
    (tmp_path / "before").rename(tmp_path / "after")
    train(parsed(f"--out={tmp_path / 'after'}", "--resume", "--max_iters=4", "--device=cpu"))
    assert load_checkpoint(tmp_path / "after" / "latest.pt")["step"] == 4 and not (tmp_path / "before").exists()


@quick
@pytest.mark.parametrize("more", [dict(), dict(resume=True)])
def test_a_best_checkpoint_that_stands_alone_is_kept(stopped, data, tmp_path, more):
    (tmp_path / "best.pt").write_bytes((stopped / "latest.pt").read_bytes())
    before = files_below(tmp_path)
    with pytest.raises(BadInput, match="latest.pt is missing" if more else "holds a run"):
        train(small(data, tmp_path, **more))
    assert files_below(tmp_path) == before


@pytest.mark.skipif(run_folder.fcntl is None, reason="no locks on folders here")
def test_two_trainings_do_not_share_a_folder(data, tmp_path):
    with Run(tmp_path):
        with pytest.raises(BadInput, match="another process trains there"):
            train(small(data, tmp_path, max_iters=2))
    assert files_below(tmp_path) == {}
    with Run(tmp_path):
        pass  # it was let go


@quick
def test_a_run_that_never_began_leaves_no_checkpoint(data, tmp_path, monkeypatch):
    def too_large(self, *_):
        def fail(tokens):
            raise RuntimeError("not enough memory: you tried to allocate 1 EB")

        return fail

    with monkeypatch.context() as patch:
        patch.setattr(Machine, "loss_function", too_large)
        with pytest.raises(BadInput, match="out of memory: try a smaller --batch_size"):
            trainer.main(small(data, tmp_path, max_iters=2))
    assert train(small(data, tmp_path, max_iters=2))["step"] == 2


def test_any_folder_name_can_stand_above_the_plot(tmp_path):
    names = ("lr_$\\frac$", os.fsdecode(b"caf\xe9")) if sys.platform == "linux" else ()  # others refuse them
    for name in ("a$b^$c", *names):
        out = tmp_path / name
        out.mkdir()
        (out / "metrics.jsonl").write_text('{"step": 1, "val_loss": 2.0}\n', encoding="utf-8")
        at = Progress(Train(), Machine("cpu"), Run(out, resume=False, overwrite=True), {}, best_loss=2.0)
        at.plot()
        assert (out / "loss.png").stat().st_size > 1000


# ---------------------------------------------------------------------------------------------------------------------
# Several processes


def torchrun(script: Path, out: Path, data: Path, *flags: str, restarts: int = 0) -> subprocess.CompletedProcess:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        f"--max-restarts={restarts}",
    ]
    command += [str(script), *FLAGS, "--max_iters=50", f"--out={out}", *text(data), *flags]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    # Without the second, restarted gloo processes may read each other's addresses of the life before (PyTorch issue 135712).
    environment = {**os.environ, "PYTHONPATH": path, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def one_process(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("one_process")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Progress, "finish", lambda *_: None)
        train(small(data, out, max_iters=50))
    return out


def test_bad_input_ends_both_processes_with_one_message(data, tmp_path):
    done = torchrun(ROOT / "train.py", tmp_path / "out", data, f"--file={tmp_path / 'none.txt'}")
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode and len(said) == 1 and "there is no such file or folder" in said[0]
    assert "[rank" not in done.stderr  # torchrun has a traceback of its own; what a process of ours dies of bears its rank
    assert not (tmp_path / "out").exists()


def test_two_processes_give_the_losses_of_one(one_process, data, tmp_path):
    done = torchrun(ROOT / "train.py", tmp_path, data)
    assert done.returncode == 0, done.stderr
    assert [row["step"] for row in rows(tmp_path)] == [row["step"] for row in rows(one_process)]
    for one, two in zip(rows(one_process), rows(tmp_path), strict=True):
        assert two == pytest.approx(one, abs=1e-5)
    assert done.stdout.count("a sample at temperature 0.8:") == 1  # only the first process speaks


@quick
def test_two_processes_take_over_from_one_restart_when_one_dies_stop_together_and_hand_back(one_process, data, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        signals_at(patch, {17: signal.SIGTERM})
        train(small(data, tmp_path, max_iters=50))
    script = tmp_path / "unlucky.py"
    script.write_text(
        "import os, signal, train\n"
        "plain, life = train.learning_rate, os.environ['TORCHELASTIC_RESTART_COUNT']\n"
        "def learning_rate(step, args):\n"
        "    now = os.environ['RANK'] == '1', life, step\n"
        "    if now == (True, '0', 35):\n"
        "        os._exit(1)\n"  # one of the two dies in step 36
        "    if now == (True, '1', 44):\n"
        "        signal.raise_signal(signal.SIGTERM)\n"  # one of the two is told to stop in step 45
        "    return plain(step, args)\n"
        "train.learning_rate = learning_rate\n"
        "train.run_command(train.main, train.Train, defaults=train.defaults)\n"
    )
    done = torchrun(script, tmp_path, data, "--resume", restarts=1)
    for told in ("resumed at step 17\n", "resumed at step 30\n", "stopped at step 45"):
        assert done.stdout.count(told) == 1, done.stderr
    assert train(small(data, tmp_path, max_iters=50, resume=True))["stopped"] == 0
    assert [row["step"] for row in rows(tmp_path)] == [row["step"] for row in rows(one_process)]
    for one, two in zip(rows(one_process), rows(tmp_path), strict=True):
        assert two == pytest.approx(one, abs=1e-5)


# --------------------------------------------------------------------------------------------------
# In people's hands


@quick
@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has no SIGHUP")
def test_a_lost_terminal_saves_the_work(data, tmp_path, monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup may have started the tests
    signals_at(monkeypatch, {13: signal.SIGHUP})
    try:
        result = train(small(data, tmp_path))
    finally:
        signal.signal(signal.SIGHUP, before)
    assert (result["step"], result["stopped"]) == (13, signal.SIGHUP)
    assert load_checkpoint(tmp_path / "latest.pt")["step"] == 13


@quick
@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has no SIGHUP")
def test_a_lost_terminal_that_nohup_ignores_stays_ignored(data, tmp_path, monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        signals_at(monkeypatch, {13: signal.SIGHUP})
        assert train(small(data, tmp_path))["step"] == 20
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_reader_of_the_output_that_has_gone_ends_the_run_saved(data, tmp_path):
    argv = [sys.executable, str(ROOT / "train.py"), *FLAGS, *text(data), f"--out={tmp_path / 'run'}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*argv, "--max_iters=5000"], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    for line in process.stdout:
        if line.startswith(b"step     12"):
            break
    process.stdout.close()
    errors = process.stderr.read()
    assert (process.wait(), errors) == (141, b"")
    assert 12 < load_checkpoint(tmp_path / "run" / "latest.pt")["step"] < 5000


@quick
def test_another_fault_of_the_device_keeps_its_traceback(data, tmp_path, monkeypatch):
    def broken(self, *_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(Machine, "loss_function", broken)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        trainer.main(small(data, tmp_path))


@quick
def test_a_text_is_known_by_its_content_however_it_is_called(data, tmp_path, monkeypatch):
    (tmp_path / "notes.txt").write_bytes((data / "play.txt").read_bytes())
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    out = ["--out=run", "--data_dir=d", *FLAGS]
    assert command(trainer.main, Train, ["--file=notes.txt", *out], defaults) == 0
    more = ["--resume", "--max_iters=22"]
    assert command(trainer.main, Train, [*more, "--out=run", "--file=./notes.txt"], defaults) == 0
    monkeypatch.chdir(tmp_path / "elsewhere")
    more = ["--resume", "--max_iters=24", "--out=../run"]
    assert command(trainer.main, Train, more, defaults) == 0
    assert load_checkpoint(tmp_path / "run" / "latest.pt")["step"] == 24
    assert not [*(tmp_path / "elsewhere").iterdir()]


@quick
def test_a_rate_that_jumps_since_more_steps_were_asked_for_is_told(data, tmp_path, capsys):
    train(small(data, tmp_path, max_iters=20))
    capsys.readouterr()
    train(small(data, tmp_path, max_iters=40, resume=True))
    assert "--max_iters was 20 and is 40: the learning rate now decays to there" in (
        capsys.readouterr().out
    )


@quick
def test_a_training_can_be_started_from_a_thread(data, tmp_path):
    results = []
    thread = threading.Thread(target=lambda: results.append(train(small(data, tmp_path))))
    thread.start()
    thread.join()
    assert results[0]["step"] == 20


@pytest.mark.skipif(os.name == "nt", reason="Windows sends no Ctrl-C to one process")
def test_ctrl_c_saves_a_training_in_a_thread(data, tmp_path):
    flags = [*FLAGS, *text(data), f"--out={tmp_path / 'run'}", "--max_iters=100000", "--eval_interval=100000"]
    script = tmp_path / "notebook.py"
    script.write_text(
        "import threading, train\n"
        "train.run_command(lambda args: setattr(train, 'args', args), train.Train, defaults=train.defaults)\n"
        "thread = threading.Thread(target=train.train, args=[train.args])\n"
        "thread.start()\n"
        "thread.join()\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    with subprocess.Popen([sys.executable, str(script), *flags], env=environment, **pipes) as process:
        for line in process.stdout:
            if line.startswith("step     12"):
                process.send_signal(signal.SIGINT)
    assert process.returncode and 12 <= load_checkpoint(tmp_path / "run" / "latest.pt")["step"] < 100_000


@quick
@pytest.mark.parametrize("attn", ["mha", "mfa_kr"])
def test_muon_resumes_to_the_last_bit(attn, data, tmp_path, monkeypatch):
    how = dict(optimizer="muon", attn=attn, max_iters=40, dropout=0.2, eval_interval=10)
    train(small(data, tmp_path / "whole", **how))
    signals_at(monkeypatch, {17: signal.SIGTERM})
    train(small(data, tmp_path / "parts", **how))
    train(small(data, tmp_path / "parts", resume=True, **how))
    assert same_run(tmp_path / "whole", tmp_path / "parts")


def test_two_processes_give_the_losses_of_one_with_muon(data, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Progress, "finish", lambda *_: None)
        train(small(data, tmp_path / "one", optimizer="muon", max_iters=50))
    done = torchrun(ROOT / "train.py", tmp_path / "two", data, "--optimizer=muon")
    assert done.returncode == 0, done.stderr
    for one, two in zip(rows(tmp_path / "one"), rows(tmp_path / "two"), strict=True):
        assert two == pytest.approx(one, abs=1e-5)


# --------------------------------------------------------------------------------------------------
# What a rebuilding might lose without a word


def scripted(monkeypatch, *losses: float) -> None:
    """These validation losses, one an evaluation."""
    left = iter(losses)
    monkeypatch.setattr(trainer, "evaluate", lambda *_: next(left))


@quick
def test_a_resumed_run_remembers_its_best_loss_and_keeps_that_checkpoint(
    data, tmp_path, monkeypatch
):
    scripted(monkeypatch, 2.0, 3.0, 2.5, 2.75)
    train(small(data, tmp_path, max_iters=10, eval_interval=5))
    best = (tmp_path / "best.pt").read_bytes()
    result = train(small(data, tmp_path, max_iters=20, eval_interval=5, resume=True))
    assert (tmp_path / "best.pt").read_bytes() == best and load_checkpoint(tmp_path / "best.pt")[
        "step"
    ] == 5
    assert load_checkpoint(tmp_path / "latest.pt")["best_loss"] == result["best_loss"] == 2.0


@quick
def test_of_equal_losses_the_first_is_the_best(data, tmp_path, monkeypatch):
    scripted(monkeypatch, 2.0, 2.0)
    train(small(data, tmp_path, eval_interval=10))
    assert load_checkpoint(tmp_path / "best.pt")["step"] == 10


@quick
def test_bits_per_byte_are_of_the_validation_text(tmp_path):
    (tmp_path / "own.txt").write_text("abcdefghij" * 900 + "éü" * 500, encoding="utf-8")
    train(replace(small(tmp_path, tmp_path / "out"), file=str(tmp_path / "own.txt")))
    for row in rows(tmp_path / "out"):
        if "val_loss" in row:  # 2 bytes a character there, 1 in what is trained on
            assert row["val_bpb"] == pytest.approx(row["val_loss"] / math.log(2) / 2)


@pytest.mark.parametrize("dtype, top", [("uint16", 65_535), ("uint32", 1_000_000)])
def test_ids_of_any_size_arrive_as_they_are(dtype, top, tmp_path):
    ids = np.memmap(tmp_path / "ids", dtype, "w+", shape=6)
    ids[:] = [0, 32_767, 32_768, top - 1, top, 5]
    tokens = trainer.take(trainer.to_device(ids, CPU), torch.tensor([0, 2]), 4, CPU)
    assert tokens.dtype == torch.int64
    assert tokens.tolist() == [[0, 32_767, 32_768, top - 1], [32_768, top - 1, top, 5]]


def test_the_next_seed_does_not_see_the_next_steps_batches(data, tmp_path):
    args = small(data, tmp_path, batch_size=64)
    late, other = (
        batch_starts(args, 8, 10_000),
        batch_starts(replace(args, seed=args.seed + 1), 7, 10_000),
    )
    assert not torch.equal(late, other)


def test_a_context_beyond_a_batch_of_evaluation_is_evaluated_one_window_at_a_time():
    class Long(torch.nn.Module):
        cfg = Config(block_size=20_000)

        def forward(self, tokens, targets):
            sizes.append(tuple(tokens.shape))
            return None, torch.tensor(1.5)

    sizes = []
    assert evaluate(Long(), torch.zeros(60_001, dtype=torch.int16), Machine("cpu")) == 1.5
    assert sizes == [(1, 20_000)] * 3


@quick
def test_a_bpe_of_the_size_asked_for_is_trained_for_the_run(data, tmp_path):
    train(small(data, tmp_path, max_iters=1, tokenizer="bpe", vocab_size=300))
    ckpt = load_checkpoint(tmp_path / "latest.pt")
    assert ckpt["tokenizer"]["kind"] == "bpe" and ckpt["config"]["vocab_size"] == 300
    assert load(data / "file-play-bpe300")[2]["tokenizer"] == ckpt["tokenizer"]


@quick
def test_the_seed_chooses_the_weights(data, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "learning_rate", lambda *_: 0.0)
    for seed in (1, 2):
        train(small(data, tmp_path / str(seed), max_iters=1, seed=seed))
    one, other = (state(tmp_path / seed / "latest.pt")["model"]["embed.weight"] for seed in "12")
    assert (one != other).double().mean() > 0.9


def test_widths_are_matched_in_multiples_of_64_where_there_is_room():
    assert (
        match_params(preset("small", "mfa")).ffn % 64
        == match_params(preset("paper-1b", "mqa")).ffn % 64
        == 0
    )


@quick
def test_a_checkpoint_is_on_the_disk_before_it_gets_its_name(data, tmp_path, monkeypatch):
    said, fsync, rename = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda f: (said.append("flushed"), fsync(f))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (said.append(Path(b).name), rename(a, b))[1])
    train(small(data, tmp_path, max_iters=1))
    assert said == [
        "flushed",
        "latest.pt",
        "flushed",
        "best.pt",
        "latest.pt",
    ]  # the last is a link to best.pt


@quick
def test_where_a_disk_has_no_links_latest_is_a_copy_of_best(data, tmp_path, monkeypatch):
    def no_links(*_):
        raise OSError(1, "no links here")

    monkeypatch.setattr(os, "link", no_links)
    train(small(data, tmp_path, max_iters=10))
    assert (tmp_path / "latest.pt").read_bytes() == (tmp_path / "best.pt").read_bytes()
    assert load_checkpoint(tmp_path / "latest.pt")["step"] == 10 and not list(
        tmp_path.glob("*.part")
    )


@quick
def test_the_clock_goes_on_where_a_run_stopped(data, tmp_path):
    train(small(data, tmp_path, max_iters=5))
    ckpt = load_checkpoint(tmp_path / "latest.pt")
    torch.save(ckpt | {"seconds": 1000.0}, tmp_path / "latest.pt")
    assert 1000 < train(small(data, tmp_path, max_iters=6, resume=True))["seconds"] < 1100


@quick
def test_float16_scales_its_loss_clips_the_true_gradient_and_resumes_with_its_scale(
    data, tmp_path, monkeypatch
):
    norms, clip = [], torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(
        torch.nn.utils, "clip_grad_norm_", lambda p, most: norms.append(clip(p, most).item())
    )
    train(small(data, tmp_path / "32", max_iters=6))
    train(small(data, tmp_path / "16", max_iters=6, dtype="float16"))
    assert norms[6:] == pytest.approx(norms[:6], rel=0.05)
    scaler = load_checkpoint(tmp_path / "16" / "latest.pt")["scaler"]
    assert scaler["scale"] == 65_536 and scaler["_growth_tracker"] == 6
    assert load_checkpoint(tmp_path / "32" / "latest.pt")["scaler"] == {}
    train(small(data, tmp_path / "16", max_iters=9, dtype="float16", resume=True))
    assert load_checkpoint(tmp_path / "16" / "latest.pt")["scaler"]["_growth_tracker"] == 9


@quick
def test_a_run_that_replaced_another_keeps_no_best_of_it(data, tmp_path, monkeypatch):
    train(small(data, tmp_path, max_iters=2))
    signals_at(monkeypatch, {2: signal.SIGINT})
    assert train(small(data, tmp_path, overwrite=True))["stopped"] == signal.SIGINT
    assert {path.name for path in tmp_path.iterdir()} == {"latest.pt", "metrics.jsonl"}


def test_without_out_resume_looks_in_the_folder_of_preset_and_attention(
    stopped, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out" / "baby-mha").mkdir(parents=True)
    (tmp_path / "out" / "baby-mha" / "latest.pt").write_bytes((stopped / "latest.pt").read_bytes())
    args = defaults(["--preset=baby", "--attn=mha", "--resume"])
    assert (args.out, args.max_iters) == (Path("out/baby-mha"), 10)


@quick
def test_what_may_change_on_resume_may_and_nothing_else(stopped, data, tmp_path):
    free = dict(
        max_iters=12,
        grad_accum=2,
        eval_interval=3,
        log_interval=5,
        dtype="bfloat16",
        data_dir=tmp_path / "data",
    )
    for path in stopped.glob("*.*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    before = files_below(tmp_path)
    fixed = dict(
        batch_size=8,
        learning_rate=1e-4,
        min_lr=2e-5,
        warmup_iters=7,
        weight_decay=0.2,
        beta2=0.9,
        grad_clip=2.0,
    )
    fixed |= dict(match_params=False, eval_tokens=64, seed=3, tokenizer="byte", preset="baby")
    fixed |= dict(
        dropout=0.1,
        norm_eps=1e-6,
        rope_base=100.0,
        tied=False,
        n_layer=2,
        init_std=0.1,
        balance_coef=0.5,
    )
    for name, value in fixed.items():
        with pytest.raises(
            BadInput, match=f"another run: .*{name} was .* and is now {value}|{name} was '.*{value}"
        ):
            train(small(data, tmp_path, resume=True, **{"max_iters": 12, name: value}))
    assert files_below(tmp_path) == before
    assert train(small(data, tmp_path, resume=True, **free))["step"] == 12


@pytest.mark.parametrize("name", ["grad_accum", "eval_interval", "log_interval"])
def test_a_number_of_steps_or_pieces_is_positive(name, data, tmp_path):
    with pytest.raises(BadInput, match=f"--{name} must be positive, not 0"):
        train(small(data, tmp_path, **{name: 0}))


@pytest.mark.parametrize("name", ["min_lr", "warmup_iters", "grad_clip", "eval_tokens"])
def test_a_rate_or_a_size_is_not_negative(name, data, tmp_path):
    with pytest.raises(BadInput, match=f"--{name} must not be negative, not -1"):
        train(small(data, tmp_path, **{name: -1}))


def test_beta2_is_less_than_one(data, tmp_path):
    with pytest.raises(BadInput, match=r"--beta2 must be in \[0, 1\), not 1"):
        train(small(data, tmp_path, beta2=1.0))


@quick
def test_a_run_that_was_never_evaluated_cannot_end_where_it_stopped(data, tmp_path, monkeypatch):
    signals_at(monkeypatch, {3: signal.SIGINT})
    train(small(data, tmp_path))
    with pytest.raises(BadInput, match="--max_iters 3: .* is at step 3 already, give more"):
        train(small(data, tmp_path, max_iters=3, resume=True))
    assert train(small(data, tmp_path, max_iters=4, resume=True))["step"] == 4


@quick
def test_each_step_takes_the_rate_of_its_own_number_and_the_metrics_say_which(
    data, tmp_path, monkeypatch
):
    taken, step = [], torch.optim.AdamW.step
    monkeypatch.setattr(
        torch.optim.AdamW,
        "step",
        lambda self: (taken.append(self.param_groups[0]["lr"]), step(self))[1],
    )
    args = small(data, tmp_path)
    train(args)
    expected = [trainer.learning_rate(i, args) for i in range(20)]
    assert taken == expected == [row["lr"] for row in rows(tmp_path) if "lr" in row]


def test_the_optimizers_second_moment_decays_as_asked():
    model = GPT(Config(dim=32, n_layer=1, head_dim=8))
    assert trainer.make_optimizer(model, Train(beta2=0.8)).param_groups[1]["betas"] == (
        0.9,
        0.8,
    )


@quick
def test_every_step_has_a_dropout_of_its_own(data, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "learning_rate", lambda *_: 0.0)
    monkeypatch.setattr(trainer, "batch_starts", lambda args, *_: torch.arange(args.batch_size))
    for name, dropout, different in (("with", 0.3, 20), ("without", 0.0, 1)):
        train(small(data, tmp_path / name, dropout=dropout))
        assert len(set(train_losses(tmp_path / name))) == different


def test_in_bfloat16_the_residual_stream_is_bfloat16_too():
    model, seen = GPT(Config(vocab_size=11, dim=32, n_layer=2, head_dim=8)), []
    loss_of = Machine("cpu", "bfloat16").loss_function(model)
    model.blocks[1].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(torch.zeros(2, 9, dtype=torch.long))
    loss_of(torch.zeros(2, 9, dtype=torch.long))
    assert seen == [torch.bfloat16, torch.float32] and loss.dtype == torch.float32


@quick
def test_a_signal_in_the_last_step_stops_nothing(data, tmp_path, monkeypatch):
    signals_at(monkeypatch, {20: signal.SIGTERM})
    assert train(small(data, tmp_path))["stopped"] == 0


@quick
def test_a_folder_with_a_blank_in_its_name_is_quoted_in_the_next_command(
    data, tmp_path, monkeypatch, capsys
):
    signals_at(monkeypatch, {2: signal.SIGINT})
    train(small(data, tmp_path / "my run"))
    assert capsys.readouterr().out.endswith(
        f'to go on: python train.py --resume --out "{tmp_path / "my run"}"\n'
    )


@quick
def test_the_dtype_may_change_on_resume(data, tmp_path):
    for step, dtype in ((4, "float32"), (8, "float16"), (12, "float32")):
        result = train(small(data, tmp_path, max_iters=step, dtype=dtype, resume=step > 4))
        assert result["step"] == step


def test_durations_are_whole_minutes_and_seconds():
    seconds = (0.4, 59.4, 59.7, 119.7, 3599.6)
    assert [duration(s) for s in seconds] == ["0 s", "59 s", "1 min 00 s", "2 min 00 s", "60 min 00 s"]
