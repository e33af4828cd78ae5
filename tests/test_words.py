"""experiments/study/words.py: its probabilities, distances and losses are those of the plain definition."""

import json
import lzma
import math
from collections import Counter

import pytest
import torch
from runs import command, small
from study_rows import toy

from experiments.study import run, words
from mfa import GPT, Config
from prepare_data import load
from support.files import sha256_of
from support.machine import Machine
from support.tokenizers import ByteTokenizer, CharTokenizer
from train import evaluate, train

CPU = torch.device("cpu")


def model(**fields) -> GPT:
    torch.manual_seed(0)
    sizes = dict(vocab_size=11, block_size=16, n_layer=2, dim=32, head_dim=8, ffn_dim=32)
    return GPT(Config(**{"attn": "mfa", **sizes, **fields, "init_std": 0.2})).double()


@torch.no_grad()
def one_by_one(gpt: GPT, ids: list[int]) -> float:
    """The log probability of all but the first, each from as much context as there may be."""
    total, start, T = 0.0, 0, gpt.cfg.block_size
    for end in range(1, len(ids)):
        if end - start > T:
            start = end - 1 - T // 2
        logits = gpt(torch.tensor([ids[start:end]]))[0][0, -1]
        total += logits.log_softmax(0)[ids[end]].item()
    return total


def test_the_probability_of_a_text_is_the_product_of_its_tokens(monkeypatch):
    """In batches of unequal lengths, and beyond the context."""
    g = torch.Generator().manual_seed(0)
    texts = [torch.randint(11, (n,), generator=g).tolist() for n in (2, 17, 5, 9, 16, 2, 18, 40, 60)]
    for attn, limit in (("mfa", 40), ("mha", 10**6)):
        monkeypatch.setattr(words, "TOKENS", limit)
        gpt = model(attn=attn)
        found = words.log_probabilities(gpt, texts, CPU)
        assert found.tolist() == pytest.approx([one_by_one(gpt, ids) for ids in texts], rel=1e-9)


def test_good_is_right_where_it_is_likelier_as_a_whole_sentence():
    tokenizer = CharTokenizer("\nabcdefghi.")
    g = torch.Generator().manual_seed(1)
    pairs = []
    for n in range(30):
        good, bad = (tokenizer.decode(torch.randint(1, 11, (n // 5 + k,), generator=g)) for k in (4, 3 + n % 4 % 3))
        phenomenon, uid = [("one", "a"), ("one", "b"), ("two", "c")][n % 3]
        pairs.append(dict(uid=uid, phenomenon=phenomenon, good=good, bad=bad))
    gpt, right = model(), Counter()
    for pair in pairs:
        good, bad = (one_by_one(gpt, tokenizer.encode("\n" + pair[k]).tolist()) for k in ("good", "bad"))
        right[pair["uid"]] += good > bad
    found = words.blimp(gpt, tokenizer, pairs, CPU)
    assert found == {"one": {k: right[k] / 10 for k in "ab"}, "two": {"c": right["c"] / 10}}
    assert 0 < sum(right.values()) < 30
    assert words.mean_of(found) == pytest.approx(sum(right.values()) / 30)


def test_a_text_begins_after_the_end_of_another():
    gpt, pair = model(vocab_size=257), dict(uid="u", phenomenon="p", good="ab", bad="ba")
    ids = [[256, *ByteTokenizer().encode(pair[k]).tolist()] for k in ("good", "bad")]
    good, bad = (one_by_one(gpt, text) for text in ids)
    assert words.blimp(gpt, ByteTokenizer(), [pair], CPU) == {"p": {"u": float(good > bad)}}


def slowly(gpt: GPT, train_ids: list[int], val_ids: list[int]) -> dict:
    """words.recall by loops, as losses by (rare or not, distance or 0)."""
    T, losses = gpt.cfg.block_size, {}
    times = Counter(zip(train_ids, train_ids[1:], strict=False))
    for first in range(0, len(val_ids) - T, T):
        window = val_ids[first : first + T + 1]
        with torch.no_grad():
            logits = gpt(torch.tensor([window[:-1]]))[0][0]
        for t in range(T):
            pair = window[t], window[t + 1]
            before = [t - s for s in range(t) if (window[s], window[s + 1]) == pair]
            loss = -logits[t].log_softmax(0)[window[t + 1]].item()
            losses.setdefault((times[pair] <= words.RARE, min(before, default=0)), []).append(loss)
    return losses


def test_the_loss_is_split_by_whether_the_window_has_had_the_pair_before(monkeypatch):
    monkeypatch.setattr(words, "TOKENS", 40)  # two windows at a time
    g = torch.Generator().manual_seed(2)
    gpt = model(vocab_size=5)
    train_ids, val_ids = (torch.randint(5, (n,), generator=g) for n in (260, 16 * 7 + 9))
    found = words.recall(gpt, train_ids, val_ids, CPU)
    want = slowly(gpt, train_ids.tolist(), val_ids.tolist())

    def mean(wanted) -> list:
        of = [loss for key, losses in want.items() if wanted(*key) for loss in losses]
        return [len(of), sum(of) / len(of) if of else None]

    parts = [found[name] for name in words.PARTS]
    expected = [
        mean(lambda rare, d: d == 0), mean(lambda rare, d: d > 0), mean(lambda rare, d: rare and d > 0)
    ]  # fmt: skip
    for each, other in zip(parts, expected, strict=True):
        assert each[0] == other[0] > 5 and each[1] == pytest.approx(other[1], rel=1e-9)
    assert parts[0][0] + parts[1][0] == 16 * 7
    assert [line[0] for line in found["distance"]] == [1, 2, 4, 8]
    for d, *counts in found["distance"]:
        every = mean(lambda rare, at, d=d: d <= at < 2 * d)
        rare = mean(lambda rare, at, d=d: rare and d <= at < 2 * d)
        assert counts == pytest.approx([*every, *rare], rel=1e-9)


def test_pairs_are_counted_over_the_whole_training_text():
    ids = torch.tensor([1, 2, 1, 2, 1, 3, 3, 3])
    wanted = torch.tensor([1 * 5 + 2, 2 * 5 + 1, 3 * 5 + 3, 4 * 5 + 4])
    assert words.times_in(ids, wanted, 5, CPU).tolist() == [2, 2, 2, 0]


@pytest.fixture
def blimp_file(tmp_path):
    lines = [dict(uid="u", phenomenon="p", field="f", good="He runs.", bad="He run.")] * 3
    path = tmp_path / "blimp.jsonl.xz"
    path.write_bytes(lzma.compress("".join(json.dumps(line) + "\n" for line in lines).encode()))
    return path


def call(*flags) -> int:
    return command(words.main, words.Args, ["--device=cpu", *flags])


def test_kept_weights_and_checkpoints_of_train_are_measured_once(
    folder, data, tmp_path, blimp_file, capsys, no_ceremony
):
    kept, results = tmp_path / "kept.pt", tmp_path / "words.jsonl"
    run.train_run(toy(), folder, "cpu", val_tokens=1025, keep=run.Keep(kept))
    flags = ["--blimp", blimp_file, f"--results={results}"]
    assert call("--checkpoint", kept, *flags, "--data", folder) == 0
    blimp, recall = words.read(results).values()
    assert blimp["sha256"] == recall["sha256"] == sha256_of(kept)
    assert blimp["found"]["p"]["u"] in (0, 1) and blimp["run"]["seed"] == 0
    (n, new), (m, seen), _ = (recall["found"][name] for name in words.PARTS)
    gpt = words.model_from(words.open_checkpoint(kept), kept, CPU)
    val = torch.from_numpy(load(folder)[1].astype("int64"))[: n + m + 1]
    assert (n * new + m * seen) / (n + m) == pytest.approx(evaluate(gpt, val, Machine("cpu")), rel=1e-4)
    assert {"command", "commit", "device", "versions", "date"} <= recall.keys()
    assert "BLiMP" in capsys.readouterr().out
    before = results.read_bytes()
    for path in (kept, tmp_path):  # a folder: the .pt files in it
        assert call("--checkpoint", path, *flags) == 0 and results.read_bytes() == before
    out = tmp_path / "run"
    train(small(data, out, max_iters=2))
    assert call("--checkpoint", kept, out / "best.pt", *flags) == 0
    assert len(words.read(results)) == 3 and math.isfinite(recall["found"]["new"][1])


def test_bad_input(folder, data, tmp_path, blimp_file, capsys):
    kept, results = tmp_path / "kept.pt", f"--results={tmp_path / 'words.jsonl'}"
    run.train_run(toy(max_iters=1), folder, "cpu", val_tokens=1025, keep=run.Keep(kept))
    (tmp_path / "text").write_text("no json\n", encoding="utf-8")
    (tmp_path / "other").write_text('{"uid": 1}\n', encoding="utf-8")
    (tmp_path / "empty").write_text("", encoding="utf-8")
    other_tokens = next(path for path in data.iterdir() if path.is_dir())
    for flags, says in (
        ([], "--blimp or --data: give one of them"),
        (["--blimp", tmp_path / "text"], "is not JSON lines or .xz of them"),
        (["--blimp", tmp_path / "other"], "line 1 lacks one of uid, phenomenon, good, bad"),
        (["--blimp", tmp_path / "empty"], "is empty; its lines have uid"),
        (["--blimp", tmp_path / "none"], "none: No such file"),
        (["--data", other_tokens], "has other tokens than"),
    ):
        assert call("--checkpoint", kept, results, *flags) == 2
        error = capsys.readouterr().err
        assert says in error and error.startswith("error: ") and error.count("\n") == 1
    assert call("--checkpoint", tmp_path / "gone.pt", results, "--blimp", blimp_file) == 2
    assert "gone.pt is not there" in capsys.readouterr().err
    (tmp_path / "folder").mkdir()
    assert call("--checkpoint", tmp_path / "folder", results, "--blimp", blimp_file) == 2
    assert "folder: has no .pt file" in capsys.readouterr().err
