"""What experiments/bench/training.py keeps of its runs."""

from pathlib import Path

from experiments.bench import training
from experiments.bench.training import Bench
from support.provenance import read_json


def test_seeds_keep_every_recipe_and_every_seed(tmp_path, monkeypatch):
    def run(args, place, attn, seed, flags):
        return dict(
            best=1.5 + seed / 1000 + (attn == "mfa_kr") / 10, best_step=4, curve=[[4, 1.5, 1.0]]
        )

    def measure(first_seed, seeds, flags=""):
        args = Bench(
            tmp_path,
            part="seeds",
            results=path,
            first_seed=first_seed,
            seeds=seeds,
            preset_flags=flags,
        )
        training.store(args, "seeds", training.seeds(args, Path(), Path()))

    path, now = tmp_path / "train.json", dict(device="a card", commit="old")
    monkeypatch.setattr(training, "baby_run", run)
    monkeypatch.setattr(training, "provenance", lambda device: dict(now))
    measure(1, 2)
    now["commit"] = "new"
    measure(2, 2)
    measure(1, 1, "--max_iters 9")
    recipes = read_json(path)["seeds"]["recipes"]
    assert [(row["attn"], row["seed"], row["commit"]) for row in recipes[""]] == [
        *(("mfa", seed, commit) for seed, commit in ((1, "old"), (2, "new"), (3, "new"))),
        *(("mfa_kr", seed, commit) for seed, commit in ((1, "old"), (2, "new"), (3, "new"))),
    ]
    table = training.table(read_json(path))
    assert "| mfa | 12.50% | none | a card | 3 | 1.5020 | 0.0010 |" in table
    assert "| mfa_kr | 6.25% | `--max_iters 9` | a card | 1 | 1.6010 |  |" in table
    assert "| mfa_kr | 6.25% | none | a card | 3 | 1.6020 | 0.0010 |" in table
    assert "--max_iters 9" not in training.table(read_json(path), least_seeds=2)


def test_muon_s_share_is_of_the_recipe_s_step(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "in_turn", lambda steps, *_: {name: 10.0 + 2 * (name != "adamw") for name in steps})
    args = Bench(tmp_path, part="muon", results=tmp_path / "train.json", smoke=True)
    rows = training.muon(args)["rows"]
    assert read_json(args.results)["muon"]["rows"] == rows
    assert training.added(rows["baby, mfa"], "muon_heads") == 0.2  # a step is one batch
    assert training.added(rows["small, mha"], "muon") == 0.2 / 16  # 16 pieces, of which one is timed
    assert "| small, mha | 2 | 10.00 | 12.00 | 12.00 | 1.2% | 1.2% |" in training.table(read_json(args.results))
