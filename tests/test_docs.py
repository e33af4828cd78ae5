"""docs/: the page is in step with its source, complete, and right in a browser; the README's tables are the script's; links."""

import importlib.util
import json
import math
import re
import shlex
import shutil
import statistics
import subprocess
import sys
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from study_rows import pairs

import train
from mfa import ATTENTION, PRESETS, Config, preset
from support.cli import BadInput, run_command
from train import Train

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
INDEX = DOCS / "index.html"
sys.path.insert(0, str(DOCS))

import family  # noqa: E402
import font  # noqa: E402
import published  # noqa: E402
import quick_start as start  # noqa: E402
import results_table as figures  # noqa: E402

from experiments.study import plot, studies  # noqa: E402


@pytest.fixture(scope="module")
def build():
    for name in ("latex2mathml", "markdown_it", "mdit_py_plugins"):
        pytest.importorskip(name)
    spec = importlib.util.spec_from_file_location("docs_build", DOCS / "build.py")  # notebooks/ has a build.py of its own
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


# ---------------------------------------------------------------------------------------------------------------------
# The page as a file


def test_the_page_and_the_readme_are_what_the_script_makes(build):
    for path, text in build.built().items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name}: run python docs/build.py"


def test_check_names_what_is_out_of_date_and_writes_nothing(build, monkeypatch):
    build.main(build.Args(check=True))  # nothing is
    before = INDEX.read_bytes()
    monkeypatch.setattr(build, "built", lambda: {INDEX: "another page"})
    with pytest.raises(BadInput, match="docs/index.html is not up to date"):
        build.main(build.Args(check=True))
    assert INDEX.read_bytes() == before


def test_a_figure_typed_into_a_made_block_is_out_of_date():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert figures.with_table(readme) == readme
    for name in ("quick_start", "advice", "results"):
        head, tail = figures.between(readme, name)
        assert figures.with_table(f"{head}\n1.05\n{tail}") == readme


def test_it_is_a_quarter_of_an_hour_of_reading(build):
    minutes = build.words((DOCS / "walkthrough.md").read_text(encoding="utf-8")) / 230
    assert round(minutes) == 15
    assert "in a quarter of an hour" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert "About 15 minutes." in INDEX.read_text(encoding="utf-8")


class Page(HTMLParser):
    """What a page loads, links to and names, and its text outside of scripts and styles."""

    def __init__(self, text: str):
        super().__init__()
        self.loads, self.links, self.ids, self.text, self.inside = [], [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.inside.append(tag)
        self.ids += [attrs["id"]] if "id" in attrs else []
        self.links += [attrs["href"]] if tag == "a" else []
        self.loads += [attrs[name] for name in ("src", "srcset", "data", "poster") if name in attrs]
        self.loads += [attrs["href"]] if tag == "link" else []

    def handle_endtag(self, tag):
        while self.inside and self.inside.pop() != tag:  # tags that need no end
            pass

    def handle_data(self, data):
        if not {"script", "style"} & set(self.inside):
            self.text.append(data)


@pytest.fixture(scope="module")
def page():
    return Page(INDEX.read_text(encoding="utf-8"))


def test_it_needs_no_network_and_no_second_file_until_play_is_pressed(page):
    text = INDEX.read_text(encoding="utf-8")
    assert all(address.startswith("data:") for address in page.loads), page.loads
    assert not re.search(r"@import|url\((?!data:)|fetch\(|XMLHttpRequest|importScripts|\bimport ", text)
    assert len([a for a in page.loads if a.startswith("data:image/png")]) >= 6, "the notebooks' pictures"
    assert INDEX.stat().st_size < 350_000


def test_every_formula_became_mathml(page):
    source = (DOCS / "walkthrough.md").read_text(encoding="utf-8")
    blocks = re.findall(r"\$\$.*?\$\$", source, flags=re.DOTALL)
    inline = re.findall(r"\$[^$\n]+\$", re.sub(r"\$\$.*?\$\$|`[^`]*`|\"[^\"\n]*\"\)|!\[[^\]]*\]", "", source, flags=re.DOTALL))
    made = INDEX.read_text(encoding="utf-8")
    assert made.count('<math xmlns="http://www.w3.org/1998/Math/MathML" display="block"') == len(blocks) > 5
    body = (
        made.split('class="family"')[0] + made.split("Cut: multi-head attention</h2>")[1]
    )  # the family's labels are formulas too
    assert body.count('display="inline"') == len(inline) > 40
    text = "".join(page.text)
    assert "$" not in text and "\\" not in text and "{{" not in text


def test_the_theme_is_set_before_anything_is_drawn():
    head, _, body = INDEX.read_text(encoding="utf-8").partition("<body>")
    assert (DOCS / "page.js").read_text(encoding="utf-8") in head and "root.dataset.theme = wanted" in head
    assert '<button id="theme"' in body


def test_the_font_has_every_character_of_the_formulas_and_stretches_them(build):
    pytest.importorskip("brotli")
    ttLib = pytest.importorskip("fontTools.ttLib")
    made = ttLib.TTFont(DOCS / "math.woff2")
    text = INDEX.read_text(encoding="utf-8")
    used = set(unescape("".join(re.sub(r"<[^>]*>", "", formula) for formula in re.findall(r"<math .*?</math>", text))))
    letters = {ord(c) for c in used if c.isalpha() and c.isascii()}
    italic = {0x210E if c == ord("h") else c - 65 + 0x1D434 if c < 97 else c - 97 + 0x1D44E for c in letters}
    cmap, math_table = made.getBestCmap(), made["MATH"].table
    assert {ord(c) for c in used if c.isprintable() and c != " "} - {0x2061, 0x2062, 0x00A0, 0x2003} | italic <= cmap.keys()
    assert cmap.keys() >= font.characters() and made["name"].getDebugName(1) == font.NAME != "STIX Math"
    variants = math_table.MathVariants
    vertical = dict(zip(variants.VertGlyphCoverage.glyphs, variants.VertGlyphConstruction, strict=True))
    for c in "()∑√":  # larger forms, and for brackets pieces
        assert len(vertical[cmap[ord(c)]].MathGlyphVariantRecord) > 1
    assert vertical[cmap[ord("(")]].GlyphAssembly.PartRecords
    assert "SIL OPEN FONT LICENSE" in (DOCS / "math-licence.txt").read_text(encoding="utf-8")


def test_what_is_no_font_is_refused(tmp_path):
    (tmp_path / "a.otf").write_text("no font")
    with pytest.raises(BadInput, match="a.otf: not a font that can be read|brotli is missing: pip install"):
        font.main(font.Args(tmp_path / "a.otf"))


@pytest.mark.parametrize("word", [*(f"/{folder}/" for folder in ("work", "tmp", "home", "root")), "site-packages"])
def test_no_path_of_the_machine_it_was_built_on(word):
    assert word not in INDEX.read_text(encoding="utf-8")


def broken_links(path: Path, links: list[str], ids: list[str]) -> list[str]:
    """Relative links that lead nowhere, and anchors into the page itself that are not there."""
    bad = []
    for link in links:
        target, _, anchor = unescape(link).partition("#")
        if re.match(r"[a-z]+:", link):
            continue
        if (target and not (path.parent / target).exists()) or (not target and anchor and anchor not in ids):
            bad.append(link)
    return bad


def markdown_links(text: str) -> tuple[list[str], list[str]]:
    text = re.sub(r"(?s:```.*?```)|`[^`\n]*`|^    .*$", "", text, flags=re.MULTILINE)
    links = re.findall(r"\]\(\s*<?([^)\s>]+)", text) + re.findall(r"^\[[^\]]+\]:\s*(\S+)", text, flags=re.MULTILINE)
    titles = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return links, [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]


@pytest.mark.parametrize(
    "name", ["README.md", "docs/walkthrough.md", "notebooks/README.md", "experiments/README.md", "experiments/RESULTS.md", "data/README.md"]
)
def test_every_relative_link_resolves(name):
    path = ROOT / name
    links, ids = markdown_links(path.read_text(encoding="utf-8"))
    assert broken_links(path, links, ids) == []


def test_every_relative_link_of_the_page_resolves(page):
    assert len(set(page.ids)) == len(page.ids)
    assert broken_links(INDEX, page.links, page.ids) == []
    assert len(page.links) > 20


def test_a_broken_link_is_found():
    links, ids = markdown_links(
        "# A title\n\n    some code\n\n[a](mfa.py) [b](no.py) [c](#a-title) [d](#b) `[e](no.py)` [f](https://x.org/no)\n\n    [g](no)\n"
    )
    assert broken_links(ROOT / "README.md", links, ids) == ["no.py", "#b"]


# ---------------------------------------------------------------------------------------------------------------------
# The README's table, and what the results files bring


def test_what_is_typed_of_decoding_and_of_the_kills_is_in_the_results():
    text = " ".join((ROOT / "experiments" / "README.md").read_text(encoding="utf-8").split())
    decode = figures.read_decode()
    largest = [row for row in decode["largest_batch"] if row["context"] == figures.CONTEXT and "batch" in row]
    mha, mfa, reused = (max(row["batch"] for row in largest if row["attn"] == attn) for attn in ("mha", "mfa", "mfa_kr"))
    assert f"{reused} of 16k tokens with MFA-KR, {mfa} with MFA and {mha} with MHA" in text
    mha, mfa = (figures.speeds(decode, attn)[""]["tokens_per_s"] for attn in ("mha", "mfa"))
    reused = figures.speeds(decode, "mfa_kr")["inverse"]["tokens_per_s"]
    llama = next(row for row in decode["rows"] if (row["engine"], row["attn"]) == ("transformers", "gqa"))["tokens_per_s"]
    assert f"MFA decodes {mfa / mha:.1f} times as fast as MHA" in text
    assert f"MFA-KR makes {reused / mha:.1f} times as many tokens/s with `inverse`" in text
    assert f"decodes {mfa / llama:.0f} times slower than MFA" in text
    for name in ("kill_test.json", "kill_test_muon.json"):
        killed = json.loads((figures.RESULTS / name).read_text(encoding="utf-8"))
        assert f"After {killed['kills']} ends" in text and len(killed["by"]) == 5
        assert not killed["unreadable_files"] and killed["identical_to_uninterrupted"]
    small = json.loads((figures.RESULTS / "train.json").read_text(encoding="utf-8"))["small"]["rows"]
    ours = {name: row["of_nanogpt"] for name, row in small.items()}
    slower, faster = 1 - ours["ours, mfa"], ours["ours, mha"] - 1
    assert f"MFA trains {slower:.0%} slower than nanoGPT at 124M, MHA {faster:.0%} faster" in text


def test_the_advice_is_what_the_results_say():
    """Which attention for which cache: the README's sentences, one by one."""
    measured = figures.Measured()
    ppl = {arm: float(measured.ppl(arm)) for arm in studies.MODERN if measured.arm("modern", arm)}
    share = {arm: measured.arm("modern", arm).share for arm in ppl}
    advised = ("mha_norm", "gqa2_norm", "mfa_norm", "mfa_kr_half_norm")
    assert [share[arm] for arm in advised] == [1, 1 / 4, 1 / 8, 1 / 16]
    assert [ppl[arm] for arm in advised] == sorted(ppl[arm] for arm in advised) and ppl["mha_norm"] == min(ppl.values())
    seeds = {arm: len(measured.arm("modern", arm).ppl) for arm in (*advised, "mha", "gqa2", "mfa", "mqa", "mqa_norm", "mla_deepseek")}
    assert set(seeds.values()) == {2}
    for arm in advised:  # the best of the rates that its neighbours were tried of, and the highest
        tried = measured.results.losses_by_rate("modern", arm)
        assert measured.rate(arm) == "1.0125e-2" and max(tried) == 27 / 8 and len(tried) >= 3
    assert "`train.py --optimizer muon --learning_rate 1.0125e-2` and" in figures.advice()
    results, study = measured.results, "modern"
    pool = plot.pooled_seeds(results, study, studies.MODERN)
    half = pool.half_interval(2, 2)

    def further(one, other):
        """By how much the loss of other is higher."""
        losses = [[row["val_loss"] for row in results.trained(study, arm)] for arm in (one, other)]
        return plot.difference(*losses, pool)[0]

    same = pairs(results, study, "mfa_norm", "mqa_norm")
    assert len(same) >= 5 and min(same) > 0 and share["mqa_norm"] == share["mfa_norm"]  # better than MQA with as much
    assert further("mfa_norm", "mla_deepseek") > half and share["mla_deepseek"] > share["mfa_norm"]  # and than MLA with more
    assert min(pairs(results, study, "mqa_norm", "mfa_kr_half_norm")) > 0  # a little worse than MQA with twice as much
    assert further("mfa_kr_half_norm", "mqa") > half and share["mqa_16"] == share["mfa_kr_half_norm"]
    assert abs(further("mfa", "mha")) < half < further("mfa", "gqa2")  # without the norm
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    best, plain, ours = (statistics.mean(measured.arm("modern", arm).ppl) for arm in ("mha_norm", "mha", "mfa_norm"))
    gained, costs = plain - best, ours - best
    assert f"with the rate that it bears it gains MHA {gained:.1f}, more than MFA costs. Without it MFA ({ppl['mfa']}) is as good as MHA ({ppl['mha']}), and better than GQA." in readme
    assert gained > costs and f"MFA costs {costs:.1f} in perplexity and, at 1B," in readme
    of_7m = [statistics.mean(row["ppl"] for row in results.trained("ratio_7m", f"muon_{arm}")) for arm in advised]
    assert of_7m == sorted(of_7m)  # at 7M the order is the same
    ours, mla = ([row["val_loss"] for row in results.trained("ratio_7m", f"muon_{arm}")] for arm in ("mfa_norm", "mla_deepseek"))
    pool_7m = plot.pooled_seeds(results, "ratio_7m", [arm for arm in studies.RATIO_7M if arm.startswith("muon")])
    assert abs(plot.difference(ours, mla, pool_7m)[0]) < pool_7m.half_interval(2, 2) and "at 7M as good)" in readme
    # Of AdamW's three seeds.
    mfa, mqa, wider, mha = (statistics.mean(measured.arm("figure1", arm).ppl) for arm in ("mfa", "mqa", "mfa_half", "mha"))
    assert abs(mfa - mqa) < 0.2 and abs(wider - mha) < 0.1


def test_the_flags_of_a_model_are_its_config():
    for model in figures.MODELS:
        words = shlex.split(figures.flags(model.planned).strip("`"))
        got = []
        run_command(got.append, Train, words, train.defaults)
        assert {name: getattr(got[0].model, name) for name in model.planned.model} == model.planned.model


def test_the_drawing_is_to_scale():
    """Of the family: a bar a cache, as wide as counts() says, and in words."""
    cached = {attn: figures.cache_share(preset("paper-1b", attn, **family.OPTIONS.get(attn, {}))) for attn in family.FACTORS}
    tree = ElementTree.fromstring(family.svg())
    bars = [tag for tag in tree if tag.get("x") == str(family.CACHE_AT) and tag.tag.endswith("rect")]
    assert [float(bar.get("width")) for bar in bars] == [
        pytest.approx(family.BAR * min(share, 1), abs=0.06) for share in cached.values()
    ]
    text = ["".join(tag.itertext()) for tag in tree]
    assert "4,096 numbers" in text and "512 numbers, 1/8 of MHA's" in text and "256 numbers, 1/16 of MHA's" in text


def test_the_quick_start_keeps_a_few_lines_of_each():
    train = ["prepared x", "mfa_kr: small", "parameters", "cache", "text", "step 1", "step 2", "step 3", "step 3 val"]
    train += ["", "a sample", "mfa_kr: best validation loss 1", "minutes"]
    text = start.shortened(train, ["out", "", *(f"line {i}" for i in range(20))]).splitlines()
    assert text[2:10] == ["mfa_kr: small", "parameters", "cache", "step 1", "...", "step 3", "step 3 val", "minutes"]
    assert text[11:] == [*(f"line {i}" for i in range(5)), "..."]
    shown = (DOCS / "quick_start.txt").read_text(encoding="utf-8").splitlines()
    assert [line for line in shown if line.startswith("$ ")] == [f"$ {c}" for c in (start.INSTALL, start.TRAIN, start.SAMPLE)]


def run(arm, seed, ppl, share, times=1, study="figure1"):
    """A line of study.jsonl; ppl None: diverged."""
    made = studies.run_for(study, arm, times, seed)
    return dict(**studies.row_of(made), study=study, arm=arm, attn=made.cfg.attn, dataset="pg-books-bpe8192", cache_share=share, ppl=ppl,
                val_loss=ppl and math.log(ppl), params=29.9e6, tokens=65.5e6, device="a GPU", diverged=ppl is None, curve=[])  # fmt: skip


def speed(attn, tokens_per_s, mode="", **other):
    size = 32 * 16384 * figures.cache_bytes(preset("paper-1b", attn))
    row = dict(model="paper-1b", attn=attn, mode=mode, engine="ours", batch=32, context=16384, ms=32e3 / tokens_per_s,
               tokens_per_s=tokens_per_s, cache_bytes=size, counts_bytes=size, floor_ms=0.9, floor_share=0.9)  # fmt: skip
    return row | other


@pytest.fixture
def results(tmp_path):
    runs = [
        run("mfa", 0, 41.0, 0.125),
        run("mfa", 1, 43.0, 0.125),
        run("mfa", 0, 44.0, 0.125, times=2),
        run("gqa2", 0, 39.0, 0.25),
    ]
    runs += [run("mha", 0, 50.0, 1.0), run("mla_separate", 0, 45.0, 0.15)]
    runs += [run("mha_norm", 0, 49.0, 1.0, study="modern")]
    runs += [run("mfa_kr", 0, 60.0, 0.0625), run("mfa_kr", 1, None, 0.0625)]
    (tmp_path / "study.jsonl").write_text("".join(json.dumps(r) + "\n" for r in runs), encoding="utf-8")
    rows = [speed("mha", 1000.0), speed("mfa", 6500.0), speed("mfa", 9e9, batch=1), speed("mfa", 9e9, engine="transformers")]
    rows += [
        speed("mfa", 6400.0, kernel="slower"),
        speed("mla", 9e9, "joint", counts_bytes=1),
    ]  # of another size than the table's
    rows += [{k: v for k, v in speed("mqa", 1.0).items() if k != "ms"} | dict(error="out of memory")]
    rows += [speed("mfa_kr", 7000.0, "pre"), speed("mfa_kr", 8000.0, "post")]
    largest = [
        dict(attn="mqa", mode="", context=16384, error="e"),
        dict(attn="mha", mode="", context=16384, batch=40),
        dict(attn="mfa", mode="", context=16384, batch=320),
    ]
    decode = dict(device="a GPU", bandwidth=4.0e12, rows=rows, largest_batch=largest)
    (tmp_path / "decode.json").write_text(json.dumps(decode), encoding="utf-8")
    trained = [trained_at(what, attn) for what in ("prefill", "train") for attn in ("mha", "mfa")]
    trained.append(trained_at("train", "mfa", q_rank=1024))  # another model of that share
    (tmp_path / "equal_time.jsonl").write_text("".join(json.dumps(r) + "\n" for r in trained), encoding="utf-8")
    return tmp_path


def trained_at(what, attn, **more):
    """A line of equal_time.jsonl at the preset's shape."""
    of_mha = 1.0 if attn == "mha" else 0.5 if more else 0.8
    cfg = preset("paper-1b", attn, **more)
    return dict(shape="1B", what=what, arm=attn + "_half" * bool(more), context=2048, tokens_per_s=1e5 * of_mha, of_mha=of_mha, config=vars(cfg))


def line(table: str, label: str) -> list[str]:
    return next([cell.strip() for cell in row.split("|")[1:-1]] for row in table.splitlines() if row.startswith(f"| {label} |"))


def test_the_table_counts(tmp_path):
    table = figures.table(tmp_path)  # an empty folder: nothing was measured
    assert line(table, "MHA") == ["MHA", "`--attn mha --qk_norm`", "not measured", *"–––", *["not measured"] * 2]
    assert "Perplexity" not in table and "Tokens/s" not in table
    assert figures.advice(tmp_path).count("not measured") == 3 * 4 + 7


def test_the_table_takes_what_was_measured(results):
    table = figures.table(results)
    assert line(table, "MFA")[2:] == ["12.5%", "–", "–", "42.00 ± 1.41", "6,500", "0.80"]  # at the better rate
    assert line(table, "MHA")[2:] == ["100%", "49.00 at 3e-3 only", "–", "50.00", "1,000", "1.00"]
    assert line(table, "MFA-KR, as in the paper")[2:] == ["6.25%", "–", "–", "60.00, 1 of 2 failed", "7,000", "–"]
    assert line(table, "GQA")[2:] == ["25%", "–", "–", "39.00", "–", "–"]  # no such share was timed
    assert line(table, "MQA")[2:] == ["not measured", *"–––", *["not measured"] * 2]
    assert "49.0" in figures.advice(results)
    assert (
        "pg-books-bpe8192, 29.9M parameters, 65.5M tokens a run" in table and "batch 32, context 16,384, one a GPU" in table
    )


def test_the_page_takes_what_was_measured(build, results):
    learned, fast, batch = build.perplexity(results), build.speed(results), build.largest_batch(results)
    assert learned.count("<b ") == 6 and "GQA, 2 KV heads (25%)" in learned  # a dot per seed that did not diverge
    assert learned.index(">MHA (") < learned.index(">GQA, 2 KV heads") < learned.index(">MFA-KR, C = dim/8")
    muon = build.perplexity(results, "modern")
    assert muon.count("<b ") == 1 and ">MHA, qk_norm (100%)" in muon and "models so far" not in muon  # no MFA to compare
    assert "6,500 tokens/s" in fast and "MFA makes 6.5 times MHA" in fast and "copy bandwidth is 4.00 TB/s" in fast
    assert "320 sequences" in batch and "width:12.5%" in batch


def test_the_page_says_what_was_not_measured(build, tmp_path):
    for block in (build.perplexity, build.speed, build.largest_batch):
        assert "Not measured yet" in block(tmp_path)


@pytest.mark.parametrize("name", ["study.jsonl", "decode.json"])
def test_a_broken_results_file_is_named(tmp_path, name):
    (tmp_path / name).write_text("no json\n", encoding="utf-8")
    with pytest.raises(BadInput, match=name):
        figures.table(tmp_path)


def test_a_readme_without_markers_is_refused():
    with pytest.raises(BadInput, match="<!-- quick_start -->"):
        figures.with_table("# A title\n")


def test_a_picture_must_be_found_exactly_once(build):
    notebook = ROOT / "notebooks" / "04_mfa.ipynb"
    with pytest.raises(BadInput, match="not 0"):
        build.picture(notebook, "no cell says this")
    with pytest.raises(BadInput, match="04_nothing.ipynb"):
        build.picture(notebook.with_name("04_nothing.ipynb"), "plt")


# ---------------------------------------------------------------------------------------------------------------------
# The calculator

FIELDS = ["kv_cache", "params", "heads", "rank", "shared_dim", "total_rank"]
ODD = [  # beside the five presets: n_layer, dim, n_head, head_dim, n_kv_head, latent_dim, mfa_n_head, rope_dim, joint_dim, q_rank
    (1, 64, 1, 8, 1, 8, 1, 2, 8, 0),
    (3, 96, 6, 48, 2, 120, 5, 6, 200, 24),  # wider heads than dim / n_head, latents wider than dim
    (32, 4096, 32, 128, 8, 512, 40, 64, 1024, 0),
    (7, 640, 10, 24, 5, 10, 33, 0, 18, 7),
    (61, 7168, 64, 256, 16, 256, 64, 64, 512, 2048),
]


def calculators() -> list[dict]:
    names = "n_layer dim n_head head_dim n_kv_head latent_dim mfa_n_head rope_dim joint_dim q_rank".split()
    found = [dict(zip(names, numbers, strict=True)) for numbers in ODD]
    for name in PRESETS:
        c = preset(name, "mha")
        given = {field: getattr(c, field) for field in names if hasattr(c, field)}
        found.append(given | dict(n_head=c.heads, latent_dim=c.latent, joint_dim=2 * c.latent))
    return found + [{name: published.fields(model)[name] for name in names} for model in published.MODELS.values()]


def counted(c: dict) -> dict[str, list[int]]:
    """What counts() says, under the calculator's names."""
    base = dict(
        n_layer=c["n_layer"], dim=c["dim"], head_dim=c["head_dim"], n_kv_head=c["n_kv_head"], mfa_n_head=c["mfa_n_head"]
    )
    base |= dict(latent_dim=c["latent_dim"], rope_dim=max(c["rope_dim"], 2), q_rank=c["q_rank"])
    found = {}
    for attn in ATTENTION:
        cfg = Config(attn=attn, n_head=c["n_head"] if attn in ("mha", "gqa", "mqa", "mla") else 0, **base)
        if attn == "mla":
            cfg = cfg if c["rope_dim"] else replace(cfg, pos="none")  # d_r = 0 is no rotary key
            joint = replace(cfg, joint_kv=True, compress_query=c["q_rank"] > 0, latent_dim=c["joint_dim"])
            found["mla_joint"] = [getattr(ATTENTION["mla"].counts(joint), field) for field in FIELDS]
        found[attn] = [getattr(ATTENTION[attn].counts(cfg), field) for field in FIELDS]
    return found


def in_node(expression: str, **names):
    """What an expression on calculator.js gives, with some names set."""
    node = shutil.which("node")
    if not node:
        pytest.skip("no node")
    setting = "".join(f"const {name} = {json.dumps(value)};\n" for name, value in names.items())
    script = (DOCS / "calculator.js").read_text(encoding="utf-8") + f"\n{setting}console.log(JSON.stringify({expression}));"
    how = dict(capture_output=True, text=True, encoding="utf-8", check=True)
    return json.loads(subprocess.run([node, "-"], input=script, **how).stdout)


def test_the_formula_in_javascript_is_counts():
    each = "all.map((c) => Object.fromEntries(attentions.map((a) => [a, fields.map((f) => counts(a, c)[f])])))"
    got = in_node(each, all=calculators(), attentions=list(counted(calculators()[0])), fields=FIELDS)
    assert got == [counted(c) for c in calculators()]


SERVED = dict(context=32768, batch=1, memory=80, bandwidth=4.0, tflops=296, bytes=1)  # an H20, a cache of 8 bits


def served(name: str, **changes) -> dict:
    """What the calculator finds for a published model with its own attention."""
    model = published.MODELS[name]
    c = published.fields(model) | SERVED | changes
    return in_node("({...serving(attn, c), work: work(attn, c), ridge: ridge(c)})", attn=model.attn, c=c) | dict(layers=c["n_layer"])


@pytest.mark.parametrize(
    "name, cache, flop, intensity", [("Step-3", 1.02e9, 1.31e11, 128), ("DeepSeek-V3", 1.15e9, 5.89e11, 512), ("Qwen3-235B-A22B", 3.15e9, 1.01e11, 32)]
)
def test_the_roofline_is_the_one_of_step_3_s_report(name, cache, flop, intensity):
    """arXiv 2507.19427: bytes of cache and FLOP of attention at 32k tokens, 8 bits, and their quotient."""
    got = served(name)
    work = got["work"] * got["layers"] * 32768
    assert got["total"] == pytest.approx(cache, rel=0.005)
    if name == "DeepSeek-V3":  # the report lets MLA's value be as wide as its key, with the rotary 64
        assert got["intensity"] == pytest.approx(483.6, abs=0.1)  # ours
        latent, key = 512, 512 + 64
        work *= (key + key) / (key + latent)
    assert work == pytest.approx(flop, rel=0.005)
    assert work / got["total"] == pytest.approx(intensity)


def test_what_a_step_waits_for():
    got = {name: served(name) for name in ("Step-3", "DeepSeek-V3", "Qwen3-235B-A22B")}
    assert all(row["ridge"] == 74 for row in got.values())
    assert [row["arithmetic"] > row["seconds"] for row in got.values()] == [True, True, False]
    for row in got.values():
        assert row["limit"] == pytest.approx(1 / max(row["arithmetic"], row["seconds"]))
        assert row["arithmetic"] == pytest.approx(row["work"] * row["layers"] * 32768 / 296e12)
    half = served("Step-3", bytes=0.5)
    assert half["intensity"] == 256 and half["total"] == got["Step-3"]["total"] / 2
    cards = in_node("Object.values(cards).map((card) => [4, 2, 1, 0.5].map((bytes) => on_card(card, bytes).tflops))", cards=published.CARDS)
    assert cards[0] == [495, 989, 1979, 1979] and all(len(row) == 4 and None not in row for row in cards)


@pytest.mark.parametrize("context", [512, 1024, 32768, 262144])
def test_a_layer_with_a_window_keeps_the_window_alone(context):
    """Gemma 4 31B, layer by layer: every sixth sees all, with 4 key/value heads of 512, the others have 16 of 256."""
    bytes_ = sum(2 * 4 * 512 * context if layer % 6 == 5 else 2 * 16 * 256 * min(context, 1024) for layer in range(60))
    got = served("Gemma 4 31B", context=context, bytes=2)
    assert got["total"] == 2 * bytes_
    assert got["per_token"] == 2 * 2 * (10 * 4 * 512 + (50 * 16 * 256 if context < 1024 else 0))
    c = published.fields(published.MODELS["Gemma 4 31B"]) | SERVED | dict(context=context, local_layers=3, n_layer=5, local_kept=0)
    alike = in_node("serving('mha', c).total", c=c)  # layers of one kind
    assert alike == 2 * 32 * 512 * (2 * context + 3 * min(context, 1024))


def test_published_models_are_models():
    assert set(published.MODELS) >= {"Llama-3-8B", "Qwen3-8B", "DeepSeek-V3", "Step-3", "Gemma 4 31B"}
    kept = {"Llama-3-8B": 2 * 8 * 128, "Qwen3-8B": 2 * 8 * 128, "DeepSeek-V3": 512 + 64, "Step-3": 2 * 256, "Gemma 4 31B": 2 * 4 * 512}
    for name, model in published.MODELS.items():
        c = published.fields(model)
        numbers = counted(c)
        assert numbers[model.attn][0] == kept.get(name, 2 * 4 * 128) and model.url.startswith("https://") and model.source
        assert c | model.fields == c  # a source's number is taken as it is
        one_more = counted(c | dict(mfa_n_head=c["mfa_n_head"] + 1))["mfa"][1]
        if model.attn != "mfa":
            assert numbers["mfa"][1] <= numbers[model.attn][1] < one_more


@pytest.mark.parametrize(
    "attn, wrong",
    [("fpba", dict(dim=63)), *((attn, dict(head_dim=7)) for attn in ("mha", "gqa", "mqa")), ("mla", dict(rope_dim=5)),
     ("mfa", dict(latent_dim=9)), ("mfa_kr", dict(latent_dim=9)), ("gqa", dict(n_head=10, n_kv_head=4)), ("mfa", {}), ("gqa", {})],
)  # fmt: skip
def test_it_refuses_what_config_refuses_in_its_words(attn, wrong):
    c = dict(dim=64, n_head=8, head_dim=8, n_kv_head=4, latent_dim=16, rope_dim=8, joint_dim=16, mfa_n_head=4) | wrong
    fields = {name: value for name, value in c.items() if name != "joint_dim" and (name != "n_head" or attn in ("mha", "gqa", "mqa", "mla"))}
    says = ""
    try:
        Config(attn=attn, **fields)
    except ValueError as e:
        says = str(e)
    assert bool(says) == bool(wrong) and in_node("impossible(attn, c)", attn=attn, c=c) == says
    if attn == "mla":
        assert in_node("impossible('mla_joint', c)", c=c) == says


# ---------------------------------------------------------------------------------------------------------------------
# In a browser

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
browser = pytest.mark.skipif(not CHROMIUM, reason="no Chromium or Chrome on the path")

PROBE = """
<pre id="probe"></pre><script>
document.fonts.ready.then(() => {
const found = {};
found.math = [...document.querySelectorAll("math")].map((m) => { const r = m.getBoundingClientRect(); return [r.width, r.height]; });
const fraction = document.querySelector("mfrac").children;
found.fraction = [...fraction].map((part) => part.getBoundingClientRect().top);
const height = (element) => element.getBoundingClientRect().height;
const signs = (text) => [...document.querySelectorAll("math[display=block] mo")].filter((mo) => mo.textContent === text).map(height);
found.stretched = {fraction: height(document.querySelector("mfrac")), brackets: signs("("), sums: signs("∑"), letter: height(document.querySelector("math mi"))};
found.fonts = [...document.fonts].map((face) => [face.family, face.status]);
found.colors = ["light", "dark"].map((theme) => {
  document.documentElement.dataset.theme = theme;
  const style = getComputedStyle(document.body);
  return [style.backgroundColor, style.color];
});
found.configs = CONFIGS.map((c) => {  // through the inputs, as a reader would
  for (const [name, value] of Object.entries(c)) {
    const input = document.getElementById("calc-" + name);
    input.value = value;
    input.dispatchEvent(new Event("input"));
  }
  const rows = {};
  for (const cell of document.querySelectorAll("#calculator td[data-field]")) {
    (rows[cell.closest("tr").dataset.attn] ||= {})[cell.dataset.field] = +cell.dataset.value;
  }
  const bars = [...document.querySelectorAll("#calc-bars .track i")].map((bar) => parseFloat(bar.style.width));
  return {rows, bars, hash: location.hash};
});
document.getElementById("probe").textContent = JSON.stringify(found);
});
</script>"""

PHONE = """<!doctype html><iframe width="390" height="800" style="border:0" src="index.html"></iframe><pre id="probe"></pre><script>
document.querySelector("iframe").onload = (event) => {
  const doc = event.target.contentDocument, found = {sizes: [doc.documentElement.clientWidth, doc.documentElement.scrollWidth]};
  const at = (id) => doc.getElementById(id), box = (id) => at(id).getBoundingClientRect();
  found.sliders = [...doc.querySelectorAll("#calc-fields input[type=range]")].map((slider) => {
    slider.scrollIntoView({block: "center", behavior: "instant"});
    return [box("calc-bars").top, box("calc-bars").bottom, slider.getBoundingClientRect().top, innerHeight];
  });
  const place = at("calc-serving").closest(".scroll"), fades = () => ["more-left", "more-right"].map((name) => place.classList.contains(name));
  const wait = () => new Promise((resolve) => setTimeout(resolve, 150));
  const until = async (ready) => { for (let i = 0; i < 20 && !ready(); i++) await wait(); };  // a busy machine is slow to lay out
  const figures = () => [...doc.querySelectorAll("figure .scroll")].map((figure) => [figure.scrollWidth > figure.clientWidth + 1, figure.classList.contains("more-right")]);
  (async () => {
    await until(() => fades()[1]);
    found.start = [...fades(), place.tabIndex];
    place.scrollLeft = 1e6;
    place.dispatchEvent(new Event("scroll"));  // no frame is drawn here that would send one
    await until(() => fades()[0] && figures().every(([wider, fading]) => wider === fading));
    found.end = fades();
    found.figures = figures();
    document.getElementById("probe").textContent = JSON.stringify(found);
  })();
};</script>"""

THEME = """<!doctype html><iframe id="open"></iframe><iframe id="blocked" sandbox="allow-scripts" src="blocked.html"></iframe><pre id="probe"></pre><script>
const found = {}, open_ = document.getElementById("open"), root = () => open_.contentDocument.documentElement;
addEventListener("message", (event) => { found.blocked = event.data; });
const load = (address) => new Promise((resolve) => { open_.onload = resolve; open_.src = address; });
(async () => {
  await load("index.html");
  found.before = root().dataset.theme || "";
  found.clicks = [0, 1, 2].map(() => { open_.contentDocument.getElementById("theme").click(); return root().dataset.theme; });
  await load("index.html?again");
  found.after = root().dataset.theme;
  await load("index.html?theme=light");
  found.asked = root().dataset.theme;
  await load("index.html?again");
  found.still = root().dataset.theme;
  await new Promise((resolve) => setTimeout(resolve, 300));
  document.getElementById("probe").textContent = JSON.stringify(found);
})();
</script>"""
BLOCKED = """<script>
const read = () => { try { return String(localStorage); } catch { return "refused"; } };
addEventListener("load", () => {
  document.getElementById("theme").click();
  parent.postMessage([read(), document.documentElement.dataset.theme, document.querySelectorAll("#calc-serving tr").length], "*");
});
</script></body>"""


def browse(path: Path, query: str = "", seconds: int = 2) -> tuple[str, list[str]]:
    """A page in headless Chromium: its DOM after the scripts, and the console's messages."""
    flags = "--headless --no-sandbox --disable-gpu --disable-extensions --no-first-run --allow-file-access-from-files"
    flags += f" --hide-scrollbars --enable-logging=stderr --virtual-time-budget={1000 * seconds} --window-size=1000,900 --dump-dom"
    done = subprocess.run([CHROMIUM, *flags.split(), path.as_uri() + query], capture_output=True, timeout=120)
    assert done.returncode == 0
    console = [line for line in done.stderr.decode(errors="replace").splitlines() if ":CONSOLE" in line]
    return done.stdout.decode("utf-8"), console


def probed(dom: str):
    return json.loads(unescape(re.search(r'<pre id="probe">(.*?)</pre>', dom, flags=re.DOTALL)[1]))


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """The page with the probe at its end."""
    folder = tmp_path_factory.mktemp("page")
    probe = PROBE.replace("CONFIGS", json.dumps(calculators()))
    (folder / "index.html").write_text(
        INDEX.read_text(encoding="utf-8").replace("</body>", probe + "</body>"), encoding="utf-8"
    )
    dom, console = browse(folder / "index.html")
    return probed(dom), console


@browser
def test_no_message_on_the_console(seen, tmp_path):
    assert seen[1] == []
    (tmp_path / "bad.html").write_text("<!doctype html><script>undefinedName()</script>", encoding="utf-8")
    assert "undefinedName is not defined" in browse(tmp_path / "bad.html")[1][0]  # what the line above would have found


@browser
def test_the_formulas_are_laid_out(seen):
    sizes = seen[0]["math"]
    assert len(sizes) == INDEX.read_text(encoding="utf-8").count("<math ")
    assert all(width > 4 and height > 4 for width, height in sizes)
    above, below = seen[0]["fraction"]
    assert below > above + 8  # a fraction has a numerator above a denominator
    assert seen[0]["fonts"] == [["Page Math", "loaded"]]
    size = seen[0]["stretched"]
    assert len(size["brackets"]) == 3 and len(size["sums"]) == 4
    assert sum(bracket >= size["fraction"] for bracket in size["brackets"]) == 2  # the pair of Eq. 1 holds its fraction
    assert min(size["sums"]) > 1.3 * size["letter"]


@browser
def test_the_calculator_shows_what_counts_says(seen):
    assert len(calculators()) == 16
    for c, got in zip(calculators(), seen[0]["configs"], strict=True):
        shown = {attn: [row[field] for field in FIELDS] for attn, row in got["rows"].items()}
        assert shown == counted(c)
        tokens, widest = 16384 * 32, max(row["total"] for attn, row in got["rows"].items() if attn != "fpba")
        for row, bar in zip(got["rows"].values(), got["bars"], strict=True):
            assert row["total"] == row["kv_cache"] * c["n_layer"] * 2 * tokens
            assert bar == pytest.approx(min(100, 100 * row["total"] / widest), abs=0.01)
            assert row["seconds"] == pytest.approx(row["total"] / 4.8e12)
            assert row["fit"] == 141 * 10**9 // (row["total"] // 32)
            assert row["limit"] == pytest.approx(32 / max(row["seconds"], row["arithmetic"]))
            assert row["arithmetic"] == pytest.approx(row["intensity"] * row["total"] / 989e12)
        assert f"&dim={c['dim']}&" in got["hash"]


@browser
def test_an_address_holds_a_configuration():
    dom, console = browse(INDEX, "?theme=dark#n_layer=3&latent_dim=40&bytes=4&context=100&batch=2&unknown=5&dim=nothing")
    assert console == [] and 'data-theme="dark"' in dom
    row = re.search(r'<tr data-attn="mfa">(.*?)</tr>', dom)[1]
    assert re.search(r'data-field="kv_cache" data-value="80"', row) and re.search(
        r'data-field="total" data-value="192000"', row
    )


@browser
def test_impossible_numbers_are_refused_in_words():
    dom, _ = browse(INDEX, "#n_head=10&n_kv_head=4&latent_dim=7")
    gqa, mfa = (re.search(rf'<tr data-attn="{attn}">(.*?)</tr>', dom)[1] for attn in ("gqa", "mfa"))
    assert "n_head 10 must be a multiple of n_kv_head 4" in gqa and "latent_dim must be even" in mfa and "data-value" not in gqa + mfa


@browser
def test_a_published_model_has_its_source_and_a_card_its_numbers():
    c = published.fields(published.MODELS["Step-3"])
    address = "&".join(f"{name}={value}" for name, value in c.items())
    dom, console = browse(INDEX, f"#{address}&memory=96&bandwidth=4&tflops=296&bytes=1")
    assert console == [] and "Step-3, by" in dom and 'href="https://github.com/stepfun-ai/Step3"' in dom and "MFA •" in dom
    assert "The card does 74.0 FLOP while it reads a byte" in dom
    row = re.search(r'id="calc-roofline">.*?<tr data-attn="mfa">(.*?)</tr>', dom)[1]
    assert 'data-field="intensity" data-value="128"' in row and ">arithmetic<" in row


@browser
def test_light_and_dark_differ_and_can_be_read(seen):
    def brightness(color: str) -> float:
        return sum(float(x) for x in re.findall(r"[\d.]+", color)[:3])

    (light, ink), (dark, chalk) = seen[0]["colors"]
    assert brightness(light) - brightness(ink) > 450 and brightness(chalk) - brightness(dark) > 450


@browser
def test_the_theme_is_remembered_where_it_may_be(tmp_path):
    text = INDEX.read_text(encoding="utf-8")
    (tmp_path / "index.html").write_text(text, encoding="utf-8")
    (tmp_path / "blocked.html").write_text(text.replace("</body>", BLOCKED), encoding="utf-8")
    (tmp_path / "theme.html").write_text(THEME, encoding="utf-8")
    found = probed(browse(tmp_path / "theme.html", seconds=4)[0])
    first, second, third = found["clicks"]
    assert found["before"] == "" and {first, second} == {"light", "dark"} and third == first
    assert found["after"] == found["still"] == third and found["asked"] == "light"
    assert found["blocked"][0] == "refused" and found["blocked"][1] in ("light", "dark") and found["blocked"][2] == 8


@pytest.fixture(scope="module")
def phone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("phone")
    shutil.copy(INDEX, folder / "index.html")
    (folder / "phone.html").write_text(PHONE, encoding="utf-8")
    return probed(browse(folder / "phone.html", seconds=8)[0])


@browser
def test_a_phone_shows_it_without_scrolling_sideways(phone):
    assert phone["sizes"] == [390, 390]


@browser
def test_the_bars_are_seen_while_a_slider_moves(phone):
    assert len(phone["sliders"]) == 18
    for top, bottom, slider, height in phone["sliders"]:
        assert -1 <= top < bottom < slider < height


@browser
def test_what_goes_on_beyond_the_edge_fades_there(phone):
    assert phone["start"] == [False, True, 0] and phone["end"] == [True, False]  # tabindex 0: arrow keys scroll it
    assert phone["figures"] and all(wider == fades for wider, fades in phone["figures"])
    assert any(wider for wider, _ in phone["figures"])
