"""The models in the page: their files, that JavaScript and PyTorch compute the same, and what a reader can do with them."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_docs import CHROMIUM, DOCS, INDEX, ROOT, browser, probed

import sample
import train
from mfa import GPT, KVCache, preset
from prepare_data import prepare
from support import shipped
from support.cli import BadInput
from support.data_set import load
from support.run_folder import FORMAT, model_from
from support.tokenizers import CharTokenizer

sys.path.insert(0, str(DOCS))

import export_model  # noqa: E402

ATTENTIONS = export_model.ATTENTIONS
CPU = torch.device("cpu")
PROMPTS = [
    "ROMEO:", "JULIET:", "To be, or not to be", "First Citizen:", "KING RICHARD III:", "O", "the ", "\n", "What say you?", "I will not",
    "My lord,", "a", "A horse! a horse! my kingdom for a horse!", "'Tis", "Now is the winter of our discontent", ";;;", "QUEEN MARGARET:\nAnd",
    "zzzz", "Good night, good night!", "I do remember an apothecary,\nAnd hereabouts he dwells; noted.",
]  # fmt: skip
assert len(PROMPTS) == 20 and max(map(len, PROMPTS)) > 60


def shipped_model(attn: str) -> tuple[GPT, CharTokenizer, dict]:
    path = shipped.FOLDER / f"{attn}.js"
    ckpt = shipped.read_model(path)
    return model_from(ckpt, path, CPU).eval(), CharTokenizer(ckpt["tokenizer"]["characters"]), ckpt


# ---------------------------------------------------------------------------------------------------------------------
# The files


def test_the_files_are_small():
    sizes = {path.stem: path.stat().st_size for path in shipped.FOLDER.glob("*.js")}
    assert sizes.keys() == set(ATTENTIONS)
    assert max(sizes.values()) <= 1.5e6 and sum(sizes.values()) <= 4e6


@pytest.fixture(scope="module")
def validation_text(tmp_path_factory):
    return torch.from_numpy(load(prepare("shakespeare", data_dir=tmp_path_factory.mktemp("char")))[1].astype("int64"))


@pytest.mark.parametrize("attn", ATTENTIONS)
def test_eight_bits_cost_less_than_0_005(attn, validation_text):
    model, _, ckpt = shipped_model(attn)
    loss = train.evaluate(model, validation_text, SimpleNamespace(device=CPU, rank=0, world=1, autocast=torch.no_grad, sum=lambda t: t))
    assert ckpt["best_loss"] - 0.005 < loss < ckpt["best_loss"] + 0.005 and loss < 1.8


def checkpoint(path: Path, **changes) -> Path:
    """A checkpoint of train.py with a small random model; changes: of its Config."""
    torch.manual_seed(0)
    cfg = replace(preset("tiny", "mfa", dim=32, vocab_size=3, n_layer=2), **changes)
    model, tokenizer = GPT(cfg), CharTokenizer("\nab")
    torch.save(
        dict(format=FORMAT, model=model.state_dict(), optimizer={}, scaler={}, config=vars(cfg), tokenizer=dict(kind="char", characters=tokenizer.characters),
             data={}, args={"seed": 5}, rng=torch.zeros(1), step=3, best_loss=1.5, seconds=1.0), path)  # fmt: skip
    return path


@pytest.mark.parametrize("attn", ATTENTIONS)
def test_a_model_comes_back_within_half_a_step_of_its_rows(tmp_path, attn):
    path = checkpoint(tmp_path / "best.pt", attn=attn)
    export_model.main(export_model.Args(path, tmp_path))
    before, after = torch.load(path)["model"], shipped.read_model(tmp_path / f"{attn}.js")["model"]
    assert before.keys() == after.keys()
    for name, weight in before.items():
        step = weight.abs().amax(dim=-1, keepdim=True) / 127 if weight.dim() == 2 else torch.zeros(1)
        assert ((weight - after[name]).abs() <= 0.51 * step).all(), name


@pytest.mark.parametrize(
    "changes, says",
    [
        (dict(attn="mqa"), "is of attn mqa: the page runs mha, mfa, mfa_kr"),
        (dict(qk_norm=True), "has qk_norm True: the page runs qk_norm False alone"),
        (dict(attn="mfa_kr", key_reuse_rope="post"), "has key_reuse_rope 'post': the page runs key_reuse_rope 'pre' alone"),
        (dict(ffn_dim=20_000), "the limit is 1.5: train the tiny preset"),
    ],
)
def test_a_model_that_the_page_cannot_run_is_refused(tmp_path, changes, says):
    path = checkpoint(tmp_path / "best.pt", **changes)
    with pytest.raises(BadInput, match=says):
        export_model.main(export_model.Args(path, tmp_path / "models"))
    assert not (tmp_path / "models").exists()


def run(*command: str, cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *command], cwd=cwd, capture_output=True, text=True, encoding="utf-8", timeout=300)


def test_bad_input_is_one_line_and_code_2(tmp_path):
    done = run(str(DOCS / "export_model.py"), "nothing.pt", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr == "error: checkpoint nothing.pt is not there: train one with python train.py\n"


@pytest.mark.parametrize("text", ["", "(globalThis.MODELS ??= {}).mfa = {", 'M.mfa = {"config": 5};', "M.mfa = {\xff};", 'M.mfa = {"config": {}};'])
def test_a_damaged_model_is_refused(tmp_path, text):
    (tmp_path / "mfa.js").write_bytes(text.encode("latin-1"))
    with pytest.raises(BadInput, match="mfa.js is not a model of docs/export_model.py, or a damaged one"):
        shipped.open_checkpoint(tmp_path / "mfa.js")


# ---------------------------------------------------------------------------------------------------------------------
# In the terminal


def test_a_fresh_clone_is_offered_the_model(tmp_path):
    done = run(str(ROOT / "sample.py"), cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "--checkpoint shipped-mfa_kr, which is here already" in done.stderr


@pytest.mark.parametrize("name", ["shipped-mfa_kr", str(DOCS / "models" / "mfa_kr.js")])
def test_a_name_or_a_path_loads_it(capsys, name):
    sample.main(sample.Sample(Path(name), prompt="ROMEO:", max_new_tokens=20, device="cpu"))
    said = capsys.readouterr().out
    assert "mfa_kr, step 700, best validation loss 1." in said and "\nROMEO:" in said


def test_another_name_is_told_which_there_are():
    with pytest.raises(BadInput, match="--checkpoint shipped-gqa: the shipped models are shipped-mfa, shipped-mfa_kr, shipped-mha"):
        shipped.open_checkpoint(Path("shipped-gqa"))


# ---------------------------------------------------------------------------------------------------------------------
# In a browser


def browse(path: Path, seconds: int = 20) -> tuple[str, list[str]]:
    """A page in headless Chromium: its DOM after so many seconds of its own time, and the console's messages."""
    flags = "--headless --no-sandbox --disable-gpu --disable-extensions --no-first-run --hide-scrollbars --enable-logging=stderr"
    flags += f" --virtual-time-budget={1000 * seconds} --window-size=1000,900 --dump-dom"
    done = subprocess.run([CHROMIUM, *flags.split(), path.as_uri()], capture_output=True, timeout=900)
    assert done.returncode == 0
    console = [line for line in done.stderr.decode(errors="replace").splitlines() if ":CONSOLE" in line]
    return done.stdout.decode("utf-8"), console


NUMBERS = """<!doctype html><meta charset="utf-8"><script src="model.js"></script>MODELS_HERE<pre id="probe"></pre><script>
const found = {}, prompts = PROMPTS_HERE;
for (const [attn, shipped] of Object.entries(MODELS)) {
  const model = new GPT(shipped), known = shipped.tokenizer.characters, ids = (text) => [...text].map((c) => known.indexOf(c));
  const logits = prompts.map((prompt) => {
    const cache = new KVCache(model);
    return ids(prompt).map((id) => Array.from(model.next_logits(id, cache)));
  });
  const texts = [true, false].map((use_cache) => {
    const idx = ids("ROMEO:"), steps = generate(model, idx, new KVCache(model), {temperature: 0, random: Math.random, use_cache});
    for (let i = 0; i < 200; i++) steps.next();
    return idx;
  });
  const cache = new KVCache(model);
  ids("to be").forEach((id) => model.next_logits(id, cache));
  const looked = cache.looked.at(-1).map((heads) => heads.map((weights) => weights.reduce((a, b) => a + b)));
  found[attn] = {logits, texts, numel: cache.numel(), looked};
}
document.getElementById("probe").textContent = JSON.stringify(found);
</script>"""


@pytest.fixture(scope="module")
def computed(tmp_path_factory):
    """What model.js computes of the three models."""
    folder = tmp_path_factory.mktemp("numbers")
    shutil.copy(DOCS / "model.js", folder)
    shutil.copytree(DOCS / "models", folder / "models")
    models = "".join(f'<script src="models/{attn}.js"></script>' for attn in ATTENTIONS)
    page = NUMBERS.replace("MODELS_HERE", models).replace("PROMPTS_HERE", json.dumps(PROMPTS))
    (folder / "numbers.html").write_text(page, encoding="utf-8")
    dom, console = browse(folder / "numbers.html", seconds=2)
    assert console == []
    return probed(dom)


@browser
@pytest.mark.parametrize("attn", ATTENTIONS)
def test_its_logits_are_pytorchs(computed, attn):
    model, tokenizer, _ = shipped_model(attn)
    for prompt, got in zip(PROMPTS, computed[attn]["logits"], strict=True):
        idx = torch.from_numpy(tokenizer.encode(prompt).astype("int64"))[None]  # (1, T)
        with torch.no_grad():
            expected = model(idx)[0][0]  # (T, vocab_size)
            cache = KVCache(model, 1, idx.shape[1])
            by_token = torch.cat([model(idx[:, i : i + 1], cache=cache)[0][0] for i in range(idx.shape[1])])
        for logits in (expected, by_token):
            torch.testing.assert_close(torch.tensor(got), logits, atol=1e-3, rtol=0)


@browser
@pytest.mark.parametrize("attn", ATTENTIONS)
def test_its_greedy_text_is_pytorchs_with_and_without_the_cache(computed, attn):
    model, tokenizer, _ = shipped_model(attn)
    idx = torch.from_numpy(tokenizer.encode("ROMEO:").astype("int64"))[None]
    expected = [model.generate(idx, 200, temperature=0, use_cache=use_cache)[0].tolist() for use_cache in (True, False)]
    assert computed[attn]["texts"] == expected and expected[0] == expected[1]


@browser
@pytest.mark.parametrize("attn", ATTENTIONS)
def test_its_cache_is_as_large_as_pytorchs(computed, attn):
    model, *_ = shipped_model(attn)
    assert computed[attn]["numel"] == KVCache(model, 1, 5).numel()
    sums = [share for layer in computed[attn]["looked"] for share in layer]
    assert len(sums) == 4 * model.cfg.heads and sums == pytest.approx([1] * len(sums))


READER = """<pre id="probe"></pre><script>
(async () => {
  const at = (id) => document.getElementById("live-" + id), found = {}, all = (what) => [...document.querySelectorAll("#live " + what)];
  const done = () => new Promise((go) => { const t = setInterval(() => { if (at("play").textContent === "play") { clearInterval(t); go(); } }, 50); });
  const texts = () => all(".text").map((text) => text.textContent);
  const cells = (attn) => [...at("count-" + attn).children].map((cell) => cell.textContent);
  const press = (line, key) => line.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true, cancelable: true}));
  found.before = {scripts: all("script").length + document.head.querySelectorAll("script[src]").length, hidden: at("results").hidden};
  at("length").value = 20;
  at("play").click();
  await done();
  found.texts = texts();
  found.status = at("status").textContent;
  found.cells = ["mha", "mfa", "mfa_kr"].map(cells);
  found.painted = ["mha", "mfa", "mfa_kr"].map((attn) => {
    const canvas = at("canvas-" + attn), {data} = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
    let painted = 0;
    for (let i = 3; i < data.length; i += 4) painted += data[i] > 0;
    return painted;
  });
  found.heads = all(".text").map((line) => {
    line.children[10].dispatchEvent(new PointerEvent("pointerover", {bubbles: true}));
    return [all(".head").length, all(".head")[0].children.length - 1, line.getAttribute("aria-valuetext"), all(".head")[0].getAttribute("aria-label")];
  });
  found.strips = all(".text").map((line) => {
    line.children[10].click();
    const strips = all(".strip").map((strip) => [strip.querySelector("span").textContent, strip.querySelectorAll("b").length, strip.querySelectorAll("i").length]);
    return strips;
  });
  at("key").click();
  found.closed = [at("keys").hidden, at("key").getAttribute("aria-expanded")];
  const line = all(".text")[1];
  line.focus();
  press(line, "Home");
  const first = line.getAttribute("aria-valuenow");
  press(line, "ArrowRight");
  press(line, "Enter");
  found.keyboard = [first, line.getAttribute("aria-valuenow"), at("keys").hidden];
  press(line, "End");
  found.last = [at("title").textContent, at("keys").hidden];
  at("cache").click();
  at("play").click();
  await done();
  found.uncached = {texts: texts(), cells: cells("mha"), spoken: all(".for-ears").map((p) => p.textContent)};
  at("cache").click();
  at("seed").value = 2;
  at("models").value = "mfa";
  at("play").click();
  await done();
  found.other = {texts: texts(), cells: cells("mha"), shown: all("section").map((section) => !section.hidden)};
  at("prompt").value = "3";
  at("play").click();
  await done();
  found.unknown = at("status").textContent;
  at("prompt").value = "A";
  at("length").value = 1000;
  at("play").click();
  setTimeout(() => at("play").click(), 500);
  await done();
  found.stopped = [at("status").textContent, texts()[1].length];
  document.getElementById("probe").textContent = JSON.stringify(found);
})();
</script>"""


@pytest.fixture(scope="module")
def read(tmp_path_factory):
    """What a reader finds who plays, looks, unchecks the cache, chooses one model, mistypes and stops."""
    folder = tmp_path_factory.mktemp("reader")
    shutil.copytree(DOCS / "models", folder / "models")
    (folder / "index.html").write_text(INDEX.read_text(encoding="utf-8").replace("</body>", READER + "</body>"), encoding="utf-8")
    dom, console = browse(folder / "index.html")
    assert console == []
    return probed(dom)


@browser
def test_nothing_runs_until_asked(read):
    assert read["before"] == dict(scripts=0, hidden=True)


@browser
def test_three_models_write_and_their_caches_grow(read):
    assert all(text.startswith("ROMEO:") and len(text) == 26 for text in read["texts"]) and len(set(read["texts"])) == 3
    assert "20 characters written" in read["status"]
    numbers = [25 * width for width in (1024, 128, 64)]  # the last character has not been read
    assert read["cells"] == [[name, "25", f"{n:,}", f"{4 * n:,}", f"{n // 25:,}"] for name, n in zip(("MHA", "MFA", "MFA-KR"), numbers, strict=True)]
    assert read["painted"] == numbers


@browser
def test_a_character_shows_its_heads_and_its_key(read):
    for (heads, seen, says, label), n in zip(read["heads"], (4, 16, 16), strict=True):
        assert (heads, seen) == (n, 11) and f"character 11 of 26; its {n} heads look most at" in says and label.startswith("head 1: ")
    (mha, _), (mfa, after), (kr, turned) = read["strips"]
    assert mha[1:] == [4, 128] and mfa[1:] == after[1:] == kr[1:] == [1, 16]
    assert "in the cache" in after[0] and "in the cache" in kr[0] and "not kept" in mfa[0] and "not kept" in turned[0]
    assert read["closed"] == [True, "false"]


@browser
def test_the_keyboard_does_it_too(read):
    assert read["keyboard"] == ["1", "2", False]
    assert read["last"][0].endswith("it is the last it wrote.") and read["last"][1]


@browser
def test_without_the_cache_the_text_is_the_same(read):
    assert read["uncached"]["texts"] == read["texts"] == read["uncached"]["spoken"]
    assert read["uncached"]["cells"][2:4] == ["0", "0"]


@browser
def test_another_seed_one_model_an_unknown_character_and_stop(read):
    assert read["other"]["shown"] == [False, True, False] and read["other"]["cells"][1:4] == ["25", "25,600", "102,400"]
    assert read["other"]["texts"][1] != read["texts"][1]
    assert "do not know the character 3" in read["unknown"]
    assert read["stopped"][0].startswith("Stopped.") and 1 < read["stopped"][1] < 1000


@browser
def test_without_the_models_the_page_says_so(tmp_path):
    press = "<script>document.getElementById('live-play').click()</script></body>"
    (tmp_path / "index.html").write_text(INDEX.read_text(encoding="utf-8").replace("</body>", press), encoding="utf-8")
    dom, _ = browse(tmp_path / "index.html", seconds=3)
    assert "models/mha.js should lie beside this page and cannot be read" in dom


def test_without_javascript_it_says_how_else():
    block = INDEX.read_text(encoding="utf-8").split('<div id="live">')[1]
    assert block.startswith("<noscript>The models need JavaScript.") and "sample.py --checkpoint shipped-mfa_kr" in block
    assert '<form id="live-form" hidden>' in block and '<div id="live-results" hidden>' in block
