"""experiments/harness.py, and what lm-evaluation-harness asks of an exported model: it gets our own answers.

Runs where lm-eval is installed: pip install -e ".[hub]".
"""

import json
import lzma
import os

import pytest
import torch
import torch.nn.functional as F
from hub import SIZES, small_gpt
from runs import command, files_below
from texts import SHAKESPEARE

from experiments import harness
from mfa import Config
from support.tokenizers import PATTERN, BPETokenizer, train_bpe

PAIRS = [  # BLiMP's kind
    ("agreement", "The cats sleep.", "The cats sleeps."),
    ("agreement", "A cat has slept.", "A cat have slept."),
    ("agreement", "These dogs were barking at him.", "This dogs were barking at him."),
    ("agreement", "All of the lamps are on.", "All of the lamps is on."),
    ("island", "Who should Ann hug after meeting Tom?", "Who should Ann hug Tom after meeting?"),
    ("island", "What did he see while walking?", "What did he see the sea while walking?"),
    ("island", "Who left?", "Who left who?"),
]
ROWS = [dict(uid=uid, phenomenon="any", good=good, bad=bad) for uid, good, bad in PAIRS]


def write(path, rows=ROWS):
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(lzma.compress(text.encode()) if path.suffix == ".xz" else text.encode())
    return path


@pytest.mark.parametrize("name", ["blimp.jsonl", "blimp.jsonl.xz"])
def test_each_uid_becomes_a_task_with_its_pairs(name, tmp_path, capsys):
    to = tmp_path / "tasks"
    assert command(harness.main, harness.Args, [f"--file={write(tmp_path / name)}", f"--to={to}"]) == 0
    assert "7 pairs in 2 tasks" in capsys.readouterr().out
    assert [json.loads(line)["good"] for line in open(to / "island.jsonl")] == [good for uid, good, _ in PAIRS if uid == "island"]
    assert json.loads((to / "group.yaml").read_text())["task"] == ["blimp_local_agreement", "blimp_local_island"]


@pytest.mark.parametrize(
    "content, says",
    [
        (b"", "is empty"),
        (b"not json\n", "is not a file of pairs (JSONDecodeError)"),
        (b'{"uid": "a", "good": "b"}\n', "is not a file of pairs (KeyError)"),
        (b"\xff\xfe", "is not a file of pairs (UnicodeDecodeError)"),
    ],
)
def test_a_file_of_something_else_is_one_line_and_nothing_is_written(content, says, tmp_path, capsys):
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(content)
    before = files_below(tmp_path)
    assert command(harness.main, harness.Args, [f"--file={path}", f"--to={tmp_path / 'tasks'}"]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1
    assert files_below(tmp_path) == before


def test_a_missing_file_is_one_line(tmp_path, capsys):
    assert command(harness.main, harness.Args, [f"--file={tmp_path / 'no.xz'}", f"--to={tmp_path / 'tasks'}"]) == 2
    assert "no.xz: No such file" in capsys.readouterr().err


# With the harness


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    """The harness' model of an exported MFA-KR of few BPE tokens, ours, and its tokenizer."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
            patch.setitem(os.environ, name, "1")
        for name in ("HF_HOME", "HF_DATASETS_CACHE"):
            patch.setitem(os.environ, name, str(home))
        pytest.importorskip("lm_eval")
        from lm_eval.models.huggingface import HFLM
        from transformers import dynamic_module_utils

        from experiments.export import export

        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(home / "modules"))
        tokenizer = BPETokenizer(train_bpe([SHAKESPEARE[:50_000]], 400), PATTERN)
        ours = small_gpt(Config(**SIZES | dict(attn="mfa_kr", vocab_size=tokenizer.n_vocab)))
        export(ours, tokenizer, home / "hf")
        yield HFLM(pretrained=str(home / "hf"), trust_remote_code=True, device="cpu", batch_size=4), ours, tokenizer


def log_probability(model, context: list[int], text: list[int]) -> float:
    """Of text after context, in nats."""
    ids = torch.tensor([context + text])
    with torch.no_grad():
        rows = F.log_softmax(model(ids[:, :-1])[0][0], dim=-1)  # (T - 1, vocab_size)
    return rows[len(context) - 1 :].gather(1, ids[0, len(context) :, None]).sum().item()


def ask(what: str, *arguments) -> list:
    from lm_eval.api.instance import Instance

    return [Instance(what, doc={}, arguments=given, idx=0) for given in arguments]


def test_loglikelihood_is_ours(lm):
    lm, ours, tokenizer = lm
    asked = [("To be, or not", " to be"), ("", "A question."), ("Who", " is there?"), ("", "Ay")]
    answers = lm.loglikelihood(ask("loglikelihood", *asked), disable_tqdm=True)
    for (context, text), (found, _) in zip(asked, answers, strict=True):
        context = tokenizer.encode(context).tolist() or [tokenizer.eot]
        assert found == pytest.approx(log_probability(ours, context, tokenizer.encode(text).tolist()), abs=1e-3)


def test_loglikelihood_rolling_is_ours_in_windows_of_the_context(lm):
    """Each window begins with the last token of the one before; the first, with the end of text."""
    lm, ours, tokenizer = lm
    text, T = SHAKESPEARE[:300], ours.cfg.block_size
    ids = tokenizer.encode(text).tolist()
    assert len(ids) > 2 * T
    (found,) = lm.loglikelihood_rolling(ask("loglikelihood_rolling", (text,)), disable_tqdm=True)
    expected, before = 0.0, [tokenizer.eot]
    for start in range(0, len(ids) - len(ids) % T, T):
        expected += log_probability(ours, before, ids[start : start + T])
        before = [ids[start + T - 1]]
    rest = len(ids) % T  # the last window is full, too; what it has of the one before is not counted
    expected += log_probability(ours, ids[-T - 1 : -rest], ids[-rest:])
    assert found == pytest.approx(expected, rel=1e-5)


def test_generate_until_is_our_greedy_text(lm):
    lm, ours, tokenizer = lm
    lm.batch_size_per_gpu, before = 1, lm.batch_size_per_gpu  # prompts of several lengths, one by one
    asked = [("To be, or", {"until": ["\n\n"], "max_gen_toks": 20}), ("Who is there", {"until": ["e"], "max_gen_toks": 20})]
    answers = lm.generate_until(ask("generate_until", *asked), disable_tqdm=True)
    lm.batch_size_per_gpu = before
    for (prompt, settings), found in zip(asked, answers, strict=True):
        ids = torch.tensor(tokenizer.encode(prompt).astype(int))[None]
        made = ours.generate(ids, 20, temperature=0)[0, ids.shape[1] :].tolist()
        made = made[: made.index(tokenizer.eot)] if tokenizer.eot in made else made
        assert found == tokenizer.decode(made).split(settings["until"][0])[0]


def test_blimp_s_accuracies_are_ours(lm, tmp_path, no_network):
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    lm, ours, tokenizer = lm
    harness.write_tasks(harness.read_pairs(write(tmp_path / "blimp.jsonl")), tmp_path / "tasks")
    manager = TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False)
    found = simple_evaluate(lm, tasks=["blimp_local"], task_manager=manager, bootstrap_iters=0)["results"]
    right = {"agreement": [], "island": []}
    for uid, *pair in PAIRS:
        good, bad = (log_probability(ours, [tokenizer.eot], tokenizer.encode(text).tolist()) for text in pair)
        right[uid].append(good > bad)
    shares = {uid: sum(pairs) / len(pairs) for uid, pairs in right.items()}
    assert {uid: found[f"blimp_local_{uid}"]["acc,none"] for uid in shares} == shares
    assert found["blimp_local"]["acc,none"] == pytest.approx(sum(shares.values()) / 2)
    assert set(shares.values()) != {0.0, 1.0}
