"""What a plug-in, an attention of one's own, can do without touching mfa.py."""

import re
from pathlib import Path

import pytest
import torch
from attentions import difference, randomized, states
from runs import FLAGS, ROOT, command, files_below, text

import sample
from mfa import ATTENTION, GPT, Config, KVCache
from sample import Sample
from support.cli import BadInput
from support.plugins import load_plugin
from support.run_folder import load_checkpoint
from train import Train, defaults, main

EXAMPLE = ROOT / "examples" / "my_attention.py"
SMALL = dict(n_layer=2, dim=24, head_dim=4, vocab_size=31, block_size=80, ffn_dim=32)


@pytest.fixture(autouse=True)
def no_plugins_left():
    before = dict(ATTENTION)
    yield
    ATTENTION.clear()
    ATTENTION.update(before)


@pytest.mark.parametrize("pos", ["rope", "alibi", "none"])
@pytest.mark.parametrize("attn", ["tied2", "window_mqa"])
def test_both_formulations_of_the_examples_agree(attn, pos):
    load_plugin(EXAMPLE)
    cfg = Config(attn=attn, pos=pos, **SMALL)
    layer = randomized(ATTENTION[attn](cfg))
    x = states(cfg, T=40)  # longer than the window
    assert difference(layer(x), layer.factorization(x)) < 1e-12


@pytest.mark.parametrize("attn", ["tied2", "window_mqa"])
def test_cached_decoding_of_the_examples_equals_the_full_pass(attn):
    load_plugin(EXAMPLE)
    model = randomized(GPT(Config(attn=attn, **SMALL))).eval()
    idx = torch.randint(31, (2, 70), generator=torch.Generator().manual_seed(0))
    cache = KVCache(model, 2, 70)
    assert cache.numel() == 2 * 2 * 70 * ATTENTION[attn].counts(model.cfg).kv_cache
    parts = [model(part, cache=cache)[0] for part in idx.split([50, 1, 1, 18], dim=1)]
    assert difference(torch.cat(parts, dim=1), model(idx)[0]) < 1e-12


def test_a_window_forgets_what_lies_before_it():
    load_plugin(EXAMPLE)
    cfg = Config(attn="window_mqa", **SMALL)
    layer = randomized(ATTENTION["window_mqa"](cfg))
    x = states(cfg, T=40)
    other = x.clone()
    other[:, :8] += 1
    assert torch.equal(layer(x)[:, 39], layer(other)[:, 39])
    assert not torch.equal(layer(x)[:, 38], layer(other)[:, 38])


@pytest.mark.parametrize("attn", ["tied2", "window_mqa"])
def test_a_plugin_trains_resumes_and_samples_without_its_file(attn, data, tmp_path, capsys):
    mine = tmp_path / "mine.py"
    mine.write_bytes(EXAMPLE.read_bytes())
    flags = [*FLAGS, "--n_head=4", f"--out={tmp_path / 'run'}", *text(data)]
    assert command(main, Train, [f"--plugin={mine}", f"--attn={attn}", *flags], defaults) == 0
    told = capsys.readouterr().out
    share = float(re.search(r"([\d.]+)% of MHA's", told)[1])
    assert 99 <= share <= 101, "the FFN takes what the attention saves"
    assert f"attention: {attn} of {mine}" in told
    mine.unlink()
    ATTENTION.pop(attn)  # as in a new process
    resume = ["--resume", f"--out={tmp_path / 'run'}", "--max_iters=24"]
    assert command(main, Train, resume, defaults) == 0
    assert load_checkpoint(tmp_path / "run" / "latest.pt")["step"] == 24
    ATTENTION.pop(attn)
    capsys.readouterr()
    best = f"--checkpoint={tmp_path / 'run' / 'best.pt'}"
    texts = []
    for how in ("--cache", "--no-cache"):
        assert command(sample.main, Sample, [best, "--max_new_tokens=60", how, "--device=cpu"]) == 0
        texts.append(capsys.readouterr().out.split("-" * 40)[0])
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("import nothing_such", "ModuleNotFoundError: No module named 'nothing_such'"),
        ("x = (", "SyntaxError"),
        ("", 'adds nothing; end it with ATTENTION["name"] = YourClass'),
        (
            "from mfa import Attention\nclass Mine(Attention):\n    def build(self, cfg): ...",
            "Mine is an Attention without counts(), query(), to_cache(), qk_circuit(), vo_circuit(): write",
        ),
    ],
)
def test_a_plugin_that_cannot_be_used_is_named_in_one_line(content, says, tmp_path, capsys):
    path = tmp_path / "mine.py"
    path.write_text(content, encoding="utf-8")
    assert command(main, Train, [f"--plugin={path}", f"--out={tmp_path / 'run'}"], defaults) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: --plugin {path}: ") and says in err and err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_plugin_that_is_not_there_is_named(tmp_path):
    with pytest.raises(BadInput, match="there is no such file"):
        load_plugin(tmp_path / "none.py")


def test_a_run_whose_plugin_is_gone_says_so(data, tmp_path, capsys):
    flags = [*FLAGS, "--n_head=4", f"--out={tmp_path / 'run'}", *text(data)]
    assert command(main, Train, [f"--plugin={EXAMPLE}", "--attn=tied2", *flags], defaults) == 0
    (tmp_path / "run" / EXAMPLE.name).unlink()
    before = files_below(tmp_path)
    capsys.readouterr()
    assert command(sample.main, Sample, [f"--checkpoint={tmp_path / 'run' / 'best.pt'}"]) == 2
    assert "my_attention.py: there is no such file" in capsys.readouterr().err
    assert files_below(tmp_path) == before


def test_an_attention_that_the_config_refuses_is_named_before_anything_is_written(tmp_path, capsys):
    flags = [*FLAGS, "--n_head=3", f"--out={tmp_path / 'run'}"]
    assert command(main, Train, [f"--plugin={EXAMPLE}", "--attn=tied2", *flags], defaults) == 2
    assert "tied2 needs an even n_head, not 3" in capsys.readouterr().err
    assert not Path(tmp_path / "run").exists()
