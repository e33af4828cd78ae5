"""experiments/export.py: what transformers makes of an exported model is what the model itself makes.

Runs where transformers is installed; .ci/run has a job that installs it.
"""

import functools
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from attentions import ALL, MAIN, config, difference
from hub import SIZES, checkpoint, small_gpt, some_ids
from runs import command, files_below
from texts import MIXED, ROOT, SHAKESPEARE
from tiktoken_ext.openai_public import r50k_pat_str

from mfa import ATTENTION, MFA, Config, cache_bytes
from support.tokenizers import EOT, PATTERN, BPETokenizer, ByteTokenizer, CharTokenizer, train_bpe

transformers = pytest.importorskip("transformers", minversion="5.10")

from transformers import AutoModelForCausalLM, AutoTokenizer, dynamic_module_utils  # noqa: E402

from experiments import export  # noqa: E402
from experiments.hub.tokenizer import read_tokenizer, save_tokenizer  # noqa: E402

LATENT = dict(attn="mla", joint_kv=True, latent_norm=True)
NATIVE = {
    "mha": dict(attn="mha"),
    "gqa": dict(attn="gqa"),
    "gqa untied": dict(attn="gqa", tied=False),
    "mqa": dict(attn="mqa"),
    "mla straight query": dict(**LATENT, compress_query=False),
    "mla compressed query": dict(**LATENT, q_rank=5),
}
# In ALL the width is no multiple of the heads, which transformers asks for: none of these is native.
ODD = dict(vocab_size=257, block_size=48)
REUSE = ("vanilla", "proj", "residual")  # cached as "gated" is
REMOTE = {f"{name}, odd": config(name, **ODD) for name in ALL if not any(reuse in name for reuse in REUSE)}
REMOTE |= {f"{name} {pos}": config(name, pos, **ODD) for name in MAIN for pos in ("alibi", "none")}
REMOTE |= {
    "mfa": dict(attn="mfa"),
    "mfa_kr": dict(attn="mfa_kr"),
    "mfa with experts": dict(attn="mfa", n_expert=3, moe_ffn_dim=8, shared_ffn_dim=8),
    "mfa untied": dict(attn="mfa", tied=False),
    "mha with experts": dict(attn="mha", n_expert=3, moe_ffn_dim=8),
    "mha partly rotated": dict(attn="mha", rope_fraction=0.5),
    "mha qk_norm": dict(attn="mha", qk_norm=True),
    "mla joint": dict(attn="mla", joint_kv=True),
}


@pytest.fixture(scope="module", autouse=True)
def modules(tmp_path_factory):
    """Where transformers copies the code of models that bring theirs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        yield


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Of a case: our model, transformers' and the folder between them."""

    @functools.cache
    def of(case: str):
        fields = {**NATIVE, **REMOTE}[case]
        ours = small_gpt(fields if isinstance(fields, Config) else Config(**SIZES | fields))
        folder = tmp_path_factory.mktemp("export") / "hf"
        written = export.export(ours, ByteTokenizer(), folder)
        theirs = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code="auto_map" in written)
        theirs.generation_config.eos_token_id = None  # our generate() goes on, too
        return ours, theirs, folder

    return of


@pytest.mark.parametrize("case", [*NATIVE, *REMOTE])
class TestOf:
    def test_the_logits_are_the_same(self, both, case):
        ours, theirs, _ = both(case)
        with torch.no_grad():
            assert difference(theirs(some_ids()).logits, ours(some_ids())[0]) < 1e-5

    def test_the_greedy_text_is_the_same_and_the_cache_as_large_as_counted(self, both, case):
        """Of two prompts of one length, until the context is full."""
        ours, theirs, _ = both(case)
        made = theirs.generate(some_ids(), max_new_tokens=28, do_sample=False, return_dict_in_generate=True)
        assert torch.equal(made.sequences, ours.generate(some_ids(), 28, temperature=0))
        cache = made.cache if hasattr(made, "cache") else made.past_key_values
        if case.startswith("mla") and case in NATIVE and not keeps_latents():
            pytest.skip("this version of transformers caches DeepSeek-V2's keys and values, not its latents")
        held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        assert held == 2 * 47 * cache_bytes(ours.cfg, itemsize=4)  # the last token has not been read


def keeps_latents() -> bool:
    from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Attention

    return hasattr(DeepseekV2Attention, "expand_kv")


@pytest.mark.parametrize("case", list(NATIVE))
def test_transformers_has_the_class_itself(both, case):
    _, theirs, folder = both(case)
    assert type(theirs).__module__.startswith("transformers.models.")
    assert not list(folder.glob("*.py"))


@pytest.mark.parametrize("case", list(REMOTE))
def test_else_the_code_comes_along(both, case):
    _, theirs, folder = both(case)
    assert type(theirs).__module__.startswith("transformers_modules.")
    assert (folder / "mfa.py").read_bytes() == (ROOT / "mfa.py").read_bytes()


@pytest.mark.parametrize("case", ["mha", "mla straight query", "mfa", "mfa_kr", "mfa untied"])
def test_a_model_that_is_saved_again_is_the_same(both, case, tmp_path):
    _, theirs, folder = both(case)
    theirs.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    assert torch.equal(again(some_ids()).logits, theirs(some_ids()).logits)
    assert {path.name for path in tmp_path.glob("*.py")} == {path.name for path in folder.glob("*.py")}


def test_it_trains_on_transformers_labels(both):
    ours, theirs, _ = both("mfa_kr")
    ids = some_ids()
    assert torch.allclose(theirs(ids, labels=ids).loss, ours(ids[:, :-1], ids[:, 1:])[1])


def test_beams_find_the_same_with_the_cache_as_without(both):
    _, theirs, _ = both("mfa_kr")
    found = [theirs.generate(some_ids(), max_new_tokens=9, num_beams=3, do_sample=False, use_cache=c) for c in (True, False)]
    assert torch.equal(*found)


@pytest.mark.parametrize(
    "changes, says",
    [
        (dict(attention_mask=torch.tensor([[0] + 19 * [1], 20 * [1]])), "give prompts of one length"),
        (dict(cache_implementation="static"), "no static cache"),
        (dict(max_new_tokens=30), "the model takes 1 to 48 tokens"),
    ],
)
def test_what_it_cannot_do_is_refused_in_one_line(both, changes, says):
    _, theirs, _ = both("mfa")
    with pytest.raises(ValueError, match=says) as refused:
        theirs.generate(some_ids(), **{"max_new_tokens": 2, "do_sample": False, **changes})
    assert "\n" not in str(refused.value)


# A new process that knows neither the repository nor, by the hook, any module of it.
FRESH = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("mfa", "train", "sample", "prepare_data", "support", "experiments"):
            raise AssertionError(f"{name} was imported")
sys.meta_path.insert(0, Refuse())
sys.path = [path for path in sys.path if path not in ("", sys.argv[2])]
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
ids = tokenizer("To be", return_tensors="pt").input_ids
made = model.generate(ids, max_new_tokens=20, do_sample=False, eos_token_id=-1)
print(made[0].tolist())
"""


def test_a_process_without_the_repository_loads_an_mfa_kr_and_generates(both, tmp_path):
    ours, _, folder = both("mfa_kr")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    how = dict(cwd=tmp_path, env=environment, capture_output=True, text=True)
    done = subprocess.run([sys.executable, "-c", FRESH, str(folder), str(ROOT)], **how)
    assert done.returncode == 0, done.stderr
    ids = torch.tensor(ByteTokenizer().encode("To be").astype(int))[None]
    assert json.loads(done.stdout.splitlines()[-1]) == ours.generate(ids, 20, temperature=0)[0].tolist()


# Tokenizers


def random_texts(seed: int = 0) -> list[str]:
    """Of few letters, so that all merges meet each other; of blanks and signs; of any character."""
    rnd = random.Random(seed)
    alphabets = ["ab", "ab c\n'é東1 \t\r"]
    texts = ["".join(rnd.choices(alphabet, k=rnd.randrange(200))) for alphabet in alphabets for _ in range(100)]
    valid = [*range(0xD800), *range(0xE000, 0x110000)]
    return texts + ["".join(map(chr, rnd.choices(valid, k=50))) for _ in range(100)]


TEXTS = [
    SHAKESPEARE[:20_000], MIXED, "", " ", "\n", "  \n \n", EOT, f"x{EOT}y", "don't I'LL 's", "\x85 \x1c\u180e\u200b x",
    "e" * 2999, " " * 3000, "x" + " " * 3001 + "y", " " + "e" * 3000 + "f g", "e" * 9000 + " " + "1" * 7000, "x" + "ab" * 4000,
    *random_texts(),
]  # fmt: skip


@functools.cache
def tokenizer(kind: str):
    if kind == "char":
        return CharTokenizer("".join(sorted(set(MIXED))))
    if kind == "byte":
        return ByteTokenizer()
    tokens = train_bpe([SHAKESPEARE[:200_000], "ab" * 50, *random_texts(1)[:100]], 1000)
    return BPETokenizer(tokens, {"bpe": PATTERN, "gpt2": r50k_pat_str}[kind], kind)  # GPT-2's tokens are a download


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Of a kind: the folder with the tokenizer's files."""

    @functools.cache
    def of(kind: str) -> Path:
        folder = tmp_path_factory.mktemp("tokenizer")
        save_tokenizer(tokenizer(kind), folder, 1_000_000)
        (folder / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
        return folder

    return of


@pytest.mark.parametrize("kind", ["byte", "bpe", "gpt2"])
def test_the_ids_and_the_text_of_a_tokenizer_are_the_same(saved, kind):
    ours, theirs = tokenizer(kind), AutoTokenizer.from_pretrained(saved(kind))
    assert len(theirs) == ours.n_vocab
    assert theirs.eos_token_id == theirs.bos_token_id == ours.eot
    assert theirs.decode([ours.eot]) == EOT
    for text in TEXTS:
        ids = ours.encode(text).tolist()
        assert theirs.encode(text) == ids, text[:100]
        assert theirs.decode(ids) == text


def test_a_token_that_no_merges_lead_to_is_still_found_where_it_is_a_whole_chunk(tmp_path):
    ours = BPETokenizer([*(bytes([b]) for b in range(256)), b"abc"], PATTERN)
    save_tokenizer(ours, tmp_path, 64)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    for text in ("abc", "abc abc", "abcd"):
        assert theirs.encode(text) == ours.encode(text).tolist()
    assert ours.encode("abc").tolist() == [256]


def test_a_character_tokenizer_knows_its_characters_and_refuses_others_as_ours_does(saved):
    ours, theirs = tokenizer("char"), AutoTokenizer.from_pretrained(saved("char"))
    assert theirs.encode(MIXED) == ours.encode(MIXED).tolist()
    assert theirs.decode(theirs.encode(MIXED)) == MIXED
    assert len(theirs) == ours.n_vocab and theirs.eos_token_id is None
    for tokenize in (ours.encode, theirs.encode):
        with pytest.raises(Exception, match="not among|Missing"):
            tokenize("é€")


@pytest.mark.parametrize("kind", ["char", "byte", "bpe", "gpt2"])
def test_a_saved_tokenizer_is_read_back(saved, kind):
    spec = tokenizer(kind).spec()
    assert read_tokenizer(saved(kind)) == {**spec, "kind": "bpe" if kind == "gpt2" else kind}


def test_a_tokenizer_that_transformers_saves_again_is_still_ours_and_any_other_is_not(saved, tmp_path):
    AutoTokenizer.from_pretrained(saved("bpe")).save_pretrained(tmp_path)
    assert read_tokenizer(tmp_path) == tokenizer("bpe").spec()
    path = tmp_path / "tokenizer.json"
    file = json.loads(path.read_text(encoding="utf-8"))
    for change in (dict(normalizer={"type": "NFC"}), dict(added_tokens=[]), dict(model={"type": "Unigram", "vocab": []})):
        path.write_text(json.dumps({**file, **change}), encoding="utf-8")
        assert read_tokenizer(tmp_path) is None
    path.unlink()
    assert read_tokenizer(tmp_path) is None


# The command


def export_command(path, to) -> int:
    return command(export.main, export.Args, [f"--checkpoint={path}", f"--to={to}"])


@pytest.fixture
def trained(tmp_path) -> Path:
    return checkpoint(tmp_path / "best.pt", small_gpt(Config(**SIZES, attn="mfa_kr")), ByteTokenizer())


def test_the_command_says_how_to_load_what_it_wrote(trained, tmp_path, capsys):
    to = tmp_path / "new" / "hf"
    assert export_command(trained, to) == 0
    said = capsys.readouterr().out
    assert "a MFAForCausalLM and its tokenizer" in said
    names = dict(AutoModelForCausalLM=AutoModelForCausalLM, AutoTokenizer=AutoTokenizer)
    model, tokenizer = (eval(line, names) for line in said.splitlines()[1:])
    assert model.gpt.cfg.attn == "mfa_kr" and len(tokenizer) == 257


def test_a_shipped_model_is_exported_as_any_other(tmp_path):
    assert export_command("shipped-mha", tmp_path / "hf") == 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "hf").config.model_type == "llama"


@pytest.mark.parametrize(
    "path, to, says",
    [
        ("none.pt", "hf", "checkpoint none.pt is not there"),
        (None, "best.pt", "best.pt is a file: give a folder"),
        (None, ".", "holds something already: give a new folder"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(path, to, says, trained, tmp_path, capsys):
    before = files_below(tmp_path)
    assert export_command(path or trained, tmp_path / to) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1
    assert files_below(tmp_path) == before


def test_a_character_that_no_file_can_hold_is_refused_and_nothing_is_written(tmp_path, capsys):
    path = checkpoint(tmp_path / "best.pt", small_gpt(Config(**SIZES | dict(vocab_size=2))), CharTokenizer("a\udc80"))
    assert export_command(path, tmp_path / "hf") == 2
    assert "U+DC80" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["best.pt"]


def test_without_the_extra_one_line_says_what_to_install(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None)
    assert export_command(trained, tmp_path / "hf") == 2
    error = capsys.readouterr().err
    assert 'pip install -e ".[hub]"' in error and error.count("\n") == 1


def test_an_attention_of_a_plug_in_is_refused(tmp_path, capsys, monkeypatch):
    class Own(MFA):
        pass

    monkeypatch.setitem(ATTENTION, "own", Own)
    path = checkpoint(tmp_path / "best.pt", small_gpt(Config(**SIZES, attn="own")), ByteTokenizer())
    assert export_command(path, tmp_path / "hf") == 2
    assert "Own, an attention of a plug-in" in capsys.readouterr().err
