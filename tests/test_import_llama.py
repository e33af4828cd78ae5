"""experiments/import_llama.py: our GPT with a Llama's weights computes what transformers' Llama computes.

On small models with random weights that transformers itself has written: none can be downloaded here. Runs where
transformers is installed; .ci/run has a job that installs it.
"""

import json
import math
import re

import pytest
import torch
from hub import SIZES, small_gpt, some_ids
from runs import command, files_below

from experiments import import_llama
from mfa import Config
from sample import Sample
from sample import main as sample_main
from support.run_folder import load_checkpoint, model_from
from support.tokenizers import ByteTokenizer

transformers = pytest.importorskip("transformers", minversion="5.10")

from transformers import LlamaConfig, MistralConfig, Qwen3Config  # noqa: E402

from experiments.export import export  # noqa: E402

SMALL = dict(
    vocab_size=300, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=64, rms_norm_eps=3e-5, rope_parameters=dict(rope_type="default", rope_theta=500.0),
)  # fmt: skip
MODELS = {
    "mha": LlamaConfig(**SMALL, num_key_value_heads=4),
    "gqa": LlamaConfig(**SMALL, num_key_value_heads=2),
    "mqa": LlamaConfig(**SMALL, num_key_value_heads=1),
    "tied": LlamaConfig(**SMALL, num_key_value_heads=2, tie_word_embeddings=True),
    "wide heads": LlamaConfig(**SMALL, num_key_value_heads=2, head_dim=10),
    "mistral": MistralConfig(**SMALL, num_key_value_heads=2, head_dim=6, sliding_window=None),
    "qwen3": Qwen3Config(**SMALL, num_key_value_heads=2, head_dim=8),
}


def write(cfg, folder, **how):
    """A model of random weights, large enough for logits far from flat, and norms that matter."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(cfg).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.3)
    model.save_pretrained(folder, **how)
    return model


def imported(folder, out):
    assert command(import_llama.main, import_llama.Args, [f"--folder={folder}", f"--out={out}"]) == 0
    path = out / "best.pt"
    return model_from(load_checkpoint(path), path, torch.device("cpu")).eval()


def edit(folder, **changes):
    """Changes config.json; None takes a field out."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))


@torch.no_grad()
def same(ours, theirs) -> bool:
    ids = some_ids(T=50)
    return torch.allclose(ours(ids)[0], theirs(ids).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", list(MODELS))
def test_the_logits_are_the_same(name, tmp_path):
    theirs = write(MODELS[name], tmp_path / "llama")
    ours = imported(tmp_path / "llama", tmp_path / "out")
    assert same(ours, theirs)
    assert ours.cfg.attn == (name if name in ("mha", "mqa") else "gqa")
    assert ours.cfg.tied == (name == "tied") and ours.cfg.qk_norm == (name == "qwen3")


def test_the_greedy_text_is_the_same(tmp_path):
    theirs = write(MODELS["gqa"], tmp_path / "llama")
    ours = imported(tmp_path / "llama", tmp_path / "out")
    made = theirs.generate(some_ids(), max_new_tokens=20, do_sample=False, eos_token_id=-1)
    assert torch.equal(ours.generate(some_ids(), 20, temperature=0), made)


def test_the_config_of_older_versions_says_the_same(tmp_path):
    theirs = write(MODELS["gqa"], tmp_path / "llama")
    edit(tmp_path / "llama", rope_parameters=None, rope_theta=500.0, rope_scaling=None, head_dim=None)
    assert same(imported(tmp_path / "llama", tmp_path / "out"), theirs)


def test_weights_in_several_files_and_in_bfloat16(tmp_path):
    cfg = LlamaConfig(**SMALL, num_key_value_heads=2)
    theirs = write(cfg, tmp_path / "one")
    theirs.bfloat16().save_pretrained(tmp_path / "llama", max_shard_size="20KB")
    assert len(list((tmp_path / "llama").glob("*.safetensors"))) > 2
    assert same(imported(tmp_path / "llama", tmp_path / "out"), theirs.float())


def test_w_c_has_the_rank_of_a_head(tmp_path, monkeypatch):
    """As the example in its docstring asks."""
    write(MODELS["mha"], tmp_path / "llama")
    imported(tmp_path / "llama", tmp_path / "out" / "llama")
    monkeypatch.chdir(tmp_path)
    example = import_llama.__doc__[import_llama.__doc__.index("    import torch") :]
    found = {}
    exec(re.sub("(?m)^    ", "", example), found)
    values = torch.linalg.svdvals(found["W"].double())  # (n_head, H)
    assert values.shape == (4, 24)
    assert (values[:, :6] > 1e-3).all() and (values[:, 6:] < 1e-6).all()


def test_what_export_wrote_comes_back_with_its_tokenizer(tmp_path, capsys):
    model = small_gpt(Config(**SIZES, attn="gqa"))
    export(model, ByteTokenizer(), tmp_path / "hf")
    again = imported(tmp_path / "hf", tmp_path / "out")
    assert again.cfg.attn == "gqa" and torch.equal(again(some_ids())[0], model(some_ids())[0])
    capsys.readouterr()
    flags = [f"--checkpoint={tmp_path / 'out' / 'best.pt'}", "--prompt=a", "--max_new_tokens=5", "--device=cpu"]
    assert command(sample_main, Sample, flags) == 0
    assert "gqa, step 0" in capsys.readouterr().out


def test_without_a_tokenizer_of_ours_it_says_so_and_sample_refuses_in_one_line(tmp_path, capsys):
    write(MODELS["gqa"], tmp_path / "llama")
    imported(tmp_path / "llama", tmp_path / "out")
    assert "its tokenizer is not one of ours" in capsys.readouterr().out
    assert math.isnan(load_checkpoint(tmp_path / "out" / "best.pt")["best_loss"])
    assert command(sample_main, Sample, [f"--checkpoint={tmp_path / 'out' / 'best.pt'}", "--device=cpu"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    "changes, says",
    [
        (dict(attention_bias=True), "attention_bias True: our model has False alone"),
        (dict(mlp_bias=True), "mlp_bias True"),
        (dict(hidden_act="gelu"), "hidden_act 'gelu': our model has silu alone"),
        (dict(model_type="gemma"), "model_type 'gemma': our model has llama or mistral or qwen3 alone"),
        (dict(rope_parameters=dict(rope_type="llama3", rope_theta=500.0)), "rope_type 'llama3'"),
        (dict(rope_parameters=None, rope_scaling=dict(type="linear", factor=2.0)), "type 'linear'"),
        (dict(rope_parameters=dict(rope_theta=500.0, partial_rotary_factor=0.5)), "partial_rotary_factor 0.5"),
        (dict(sliding_window=16), "sliding_window 16: our model sees the whole context"),
        (dict(quantization_config=dict(bits=4)), "quantization_config"),
        (dict(hidden_size=None), "has no 'hidden_size'"),
        (dict(num_key_value_heads=3), "makes no model: n_head 4 must be a multiple of n_kv_head 3"),
        (dict(vocab_size=301), "model.embed_tokens.weight of (300, 24), where its config.json means (301, 24)"),
        (dict(num_hidden_layers=1), "has model.layers.1."),
        (dict(num_hidden_layers=3), "has no model.layers.2."),
    ],
)
def test_what_our_model_lacks_is_refused_in_one_line(changes, says, tmp_path, capsys):
    write(MODELS["gqa"], tmp_path / "llama")
    edit(tmp_path / "llama", **changes)
    refused(tmp_path, says, capsys)


def refused(place, says, capsys):
    before = files_below(place)
    capsys.readouterr()
    assert command(import_llama.main, import_llama.Args, [f"--folder={place / 'llama'}", f"--out={place / 'out'}"]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1
    assert files_below(place) == before


def test_a_folder_of_something_else_is_refused_in_one_line(tmp_path, capsys):
    refused(tmp_path, "config.json is not there", capsys)
    write(MODELS["gqa"], tmp_path / "llama")
    (tmp_path / "llama" / "model.safetensors").write_bytes(b"12345678")
    refused(tmp_path, "model.safetensors is damaged", capsys)
    (tmp_path / "llama" / "model.safetensors").unlink()
    refused(tmp_path, "model.safetensors is not there", capsys)
    (tmp_path / "llama" / "config.json").write_text("{")
    refused(tmp_path, "config.json is not JSON", capsys)


def test_a_run_is_not_overwritten(tmp_path, capsys):
    write(MODELS["gqa"], tmp_path / "llama")
    imported(tmp_path / "llama", tmp_path / "out")
    refused(tmp_path, "holds a run", capsys)
