"""What --packing best-fit promises, one statement of fact a test."""

import json
import random
from collections import defaultdict
from itertools import product

import numpy as np
import pytest
import torch
from runs import command, files_below, rows, small

import prepare_data as pd
from mfa import GPT, Config
from support import packing
from support.cli import BadInput
from support.data_set import load
from support.machine import Machine
from support.packing import BINS, best_fit, documents, fraction_cut, hide_padding
from train import Train, train

EOT = 256  # of --tokenizer byte


def laid_end_to_end(lengths: list[int]) -> list[tuple[int, int]]:
    ends = np.cumsum(lengths).tolist()
    return list(zip([0, *ends[:-1]], ends, strict=True))


def random_lengths(seed: int, n: int, longest: int) -> list[int]:
    g = random.Random(seed)
    return [g.randint(2, longest) for _ in range(n)]


def test_documents_lie_between_their_end_of_text_tokens(monkeypatch):
    ids = np.array([1, 1, 1, 9, 1, 9, 1, 1, 9, 1, 1, 1, 9])
    found = [(0, 4), (4, 6), (6, 9), (9, 13)]
    assert list(documents(ids, 9)) == found
    monkeypatch.setattr(packing, "BLOCK", 3)
    assert list(documents(ids, 9)) == found


def test_the_fraction_of_documents_cut_is_counted_on_contexts_end_to_end():
    ids = np.array([1, 1, 1, 9, 1, 9, 1, 1, 9, 1, 1, 1, 9])
    assert [fraction_cut(ids, 9, context) for context in (4, 1, 13, 2)] == [0.5, 1.0, 0.0, 0.75]


@pytest.mark.parametrize("longest", [9, 40])
def test_every_token_lies_in_one_row_and_a_document_s_in_their_order(longest):
    lengths = random_lengths(0, 500, longest)
    lengths = [n + (n % 10 == 1) for n in lengths]  # no rest is an end of text alone
    pieces = [piece for row in best_fit(laid_end_to_end(lengths), 10) for piece in row]
    of = defaultdict(list)
    starts = np.cumsum([0, *lengths])
    for start, stop in pieces:
        document = int(np.searchsorted(starts, start, side="right")) - 1
        of[document] += range(start, stop)
    assert [of[i] for i in range(len(lengths))] == [list(range(*piece)) for piece in laid_end_to_end(lengths)]


def test_no_document_is_cut_more_often_than_its_length_demands():
    lengths = random_lengths(1, 400, 45)
    starts = np.cumsum([0, *lengths])
    pieces = [piece for row in best_fit(laid_end_to_end(lengths), 10) for piece in row]
    found = np.bincount(np.searchsorted(starts, [start for start, _ in pieces], side="right") - 1)
    least = [max(1, -(-n // 10) - (n % 10 == 1)) for n in lengths]
    assert found.tolist() == least


def fewest_rows(lengths: list[int], size: int) -> int:
    """The fewest rows that hold pieces of these lengths, of all ways to lay them."""
    for n in range(1, len(lengths) + 1):
        for rows_of in product(range(n), repeat=len(lengths)):
            if max(np.bincount(rows_of, lengths, n)) <= size:
                return n
    return 0


def test_on_small_cases_it_takes_at_most_one_row_more_than_the_best_of_all_ways():
    more = []
    for seed in range(60):
        lengths = random_lengths(seed, 6, 10)
        found = sum(1 for _ in best_fit(laid_end_to_end(lengths), 10))
        more.append(found - fewest_rows(lengths, 10))
    assert min(more) == 0 and max(more) <= 1 and sum(more) < len(more) / 4


def test_no_more_rows_than_eight_are_open():
    seen = []
    for row in best_fit(((1000 * i, 1000 * i + 51) for i in range(100)), 100):
        seen.append(row[0][0] // 1000)
    assert seen == list(range(100)) and BINS == 8  # the first row closes when the ninth document comes


def test_a_rest_that_is_the_end_of_text_alone_is_left_out():
    assert list(best_fit([(0, 11), (11, 15)], 10)) == [[(0, 10)], [(11, 15)]]


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A folder of 60 texts of 10 to 400 letters."""
    folder = tmp_path_factory.mktemp("packing") / "own"
    folder.mkdir()
    g = random.Random(0)
    for i in range(60):
        text = "".join(g.choice("abcdefgh \n") for _ in range(g.randint(10, 400)))
        (folder / f"{i:02}.txt").write_text(text + ".", encoding="utf-8")
    return folder


def prepared(own, **changes):
    how = dict(file=str(own), tokenizer="byte", data_dir=own.parent, packing="best-fit", context=100)
    return pd.prepare(**{**how, **changes})


def test_a_packed_text_is_rows_of_documents_and_padding(own):
    stream, _, _ = load(prepared(own, packing="stream"))
    train_ids, _, meta = load(prepared(own))
    rows_of = train_ids.reshape(-1, 101)
    assert meta["packing"]["context"] == 100 and meta["train_tokens"] == rows_of.size
    padding = (rows_of[:, 1:] == EOT) & (rows_of[:, :-1] == EOT)
    assert padding.sum() == meta["packing"]["padding"] and 0 < padding.sum() < 0.1 * rows_of.size
    ends_alone = sum((stop - start) % 101 == 1 for start, stop in documents(stream, EOT))
    assert rows_of.size - padding.sum() == len(stream) - ends_alone
    assert not (np.diff(padding.astype(int), axis=1) < 0).any()  # nothing comes after padding
    counts = [np.bincount(ids, minlength=257)[:EOT] for ids in (stream, train_ids)]
    assert (counts[0] == counts[1]).all()  # every letter, as often


def test_validation_is_never_packed_and_all_is_the_same_to_the_byte_when_made_again(own):
    stream, packed = prepared(own, packing="stream"), prepared(own)
    assert (stream / "val.bin").read_bytes() == (packed / "val.bin").read_bytes()
    before = files_below(packed)
    assert files_below(prepared(own, overwrite=True)) == before


def test_the_folder_s_name_tells_packing_and_context_apart(own):
    names = [prepared(own, **how).name for how in ({"packing": "stream"}, {}, {"context": 50})]
    assert names == ["file-own-byte", "file-own-byte.best_fit100", "file-own-byte.best_fit50"]


def test_a_text_that_has_changed_is_packed_again(own, tmp_path):
    (tmp_path / "own").mkdir()
    for i in range(3):
        (tmp_path / "own" / f"{i}.txt").write_text("one two three " * (i + 3), encoding="utf-8")
    before = load(prepared(tmp_path / "own"))[2]["packing"]
    (tmp_path / "own" / "0.txt").write_text("four five six " * 40, encoding="utf-8")
    assert load(prepared(tmp_path / "own"))[2]["packing"] != before


def test_a_tokenizer_without_an_end_of_text_is_refused(own):
    with pytest.raises(BadInput, match="--packing best-fit: .*; give byte, bpe or gpt2"):
        prepared(own, tokenizer="char")
    assert not list(own.parent.glob("*char*"))


@pytest.mark.parametrize("damaged", [3, {}, {"context": 100, "eot": 256, "padding": "none"}])
def test_a_damaged_meta_json_is_refused(damaged, own):
    path = prepared(own, context=70) / "meta.json"
    good = path.read_text()
    path.write_text(json.dumps(json.loads(good) | dict(packing=damaged)))
    with pytest.raises(BadInput, match="meta.json: 'packing' is damaged; make it again"):
        load(path.parent)
    path.write_text(good)


def test_padding_is_no_target_and_changes_no_loss(own):
    torch.manual_seed(0)
    model = GPT(Config(vocab_size=257, block_size=100, n_layer=1, dim=32, head_dim=8)).double()
    loss_of = Machine("cpu").loss_function(model)
    train_ids, _, meta = load(prepared(own))
    padded = [row for row in train_ids.reshape(-1, 101) if (row[-2:] == EOT).all()]
    assert padded
    for row in padded:
        tokens = torch.from_numpy(row.astype(np.int64))[None]
        used = 101 - int(((tokens[0, 1:] == EOT) & (tokens[0, :-1] == EOT)).sum())
        loss = loss_of(hide_padding(tokens, meta))
        assert loss.item() == pytest.approx(loss_of(tokens[:, :used]).item(), rel=1e-6)


def test_train_reads_a_packed_text_in_whole_rows(own, data, tmp_path, no_ceremony, monkeypatch):
    seen = []
    plain = hide_padding
    monkeypatch.setattr("train.hide_padding", lambda tokens, meta: seen.append(plain(tokens, meta)) or seen[-1])
    how = dict(file=str(own), data_dir=own.parent, tokenizer="byte", packing="best-fit", block_size=50)
    result = train(small(data, tmp_path / "run", **how))
    assert result["step"] == 20 and rows(tmp_path / "run")[-1]["val_loss"] < 5.5
    train_ids, _, meta = load(own.parent / "file-own-byte.best_fit50")
    all_rows = {tuple(row) for row in train_ids.reshape(-1, 51).tolist()}
    batch = torch.cat(seen)
    assert {tuple(row) for row in batch.where(batch >= 0, EOT).tolist()} <= all_rows
    hidden = (batch < 0).sum().item()
    assert hidden and (batch[:, 0] >= 0).all()
    with pytest.raises(BadInput, match="packing was 'best-fit' and is now 'stream'"):
        train(small(data, tmp_path / "run", **{**how, "packing": "stream"}, resume=True, max_iters=30))


def test_the_command_says_what_is_cut_and_what_is_padding_and_trains_next(own, capsys):
    flags = ["--file", own, "--tokenizer", "byte", "--data_dir", own.parent, "--packing", "best-fit", "--context", 100]
    assert command(pd.main, pd.Args, flags) == 0
    out = capsys.readouterr().out
    meta = load(own.parent / "file-own-byte.best_fit100")[2]
    cut, stream = (f"{meta['packing'][name]:.1%}" for name in ("cut", "cut_in_stream"))
    assert f"end to end, cut {stream} of the train documents\npacked best-fit, they cut {cut}, and" in out
    assert meta["packing"]["cut"] < meta["packing"]["cut_in_stream"]
    assert "--packing best-fit --block_size 100" in out.splitlines()[-1]
    assert Train().packing == "stream"
