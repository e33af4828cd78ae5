"""Make the page, and the README's tables and drawing: python docs/build.py

Needs pip install -e ".[dev]".

docs/index.html is one file that needs no network: the text of docs/walkthrough.md, its formulas as
MathML in the font docs/math.woff2, the pictures of the executed notebooks, docs/page.css and
docs/page.js, the figures of docs/results_table.py, docs/calculator.js with docs/published.py, and
docs/model.js with docs/live.js, which read docs/models when the reader presses play. In the text
{{name}} stands for a figure or a block made here, and an image of a notebook is the one whose code
cell contains the image's title:

    ![what can be seen](../notebooks/04_mfa.ipynb "A random MQA, written as an MFA")
    its caption
"""

import base64
import html
import json
import re
import statistics
import struct
from dataclasses import dataclass
from pathlib import Path

import family as drawing
import published
import results_table as figures
import torch
from latex2mathml.converter import convert
from markdown_it import MarkdownIt
from mdit_py_plugins.dollarmath import dollarmath_plugin

from mfa import ATTENTION, GPT, PRESETS, cache_bytes, preset
from support.cli import BadInput, run_command
from support.palette import COLOR, NAME

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
DESCRIPTION = (
    "Multi-matrix Factorization Attention, derived, counted, measured; a KV-cache calculator."
)


def tex(source: str, block: bool = False) -> str:
    """LaTeX as MathML."""
    math = convert(source.strip(), display="block" if block else "inline")
    return f'<div class="formula">{math}</div>' if block else math


# --------------------------------------------------------------------------------------------------
# Blocks of the page

FAMILY = {attn: factors for attn, factors in drawing.FACTORS.items() if attn != "gqa"}


def family() -> str:
    """The two circuits of every attention as boxes, true to scale at the paper's 1B shape."""
    cfg = preset("paper-1b", "mha")
    size = {"H": 96, "C": 96 * cfg.latent / cfg.dim, "d": 96 * cfg.head_dim / cfg.dim}  # pixels

    def circuit(name: str, factors: str) -> str:
        boxes = (
            [f'<div class="factor"><span>{tex(name + " =")}</span></div>']
            if ", " in factors
            else []
        )
        for factor in factors.split(", "):
            label, rows, columns = factor.lstrip("*").split()
            shared = " shared" * factor.startswith("*")
            box = f'<i style="width:{size[columns]:g}px;height:{size[rows]:g}px"></i>'
            boxes.append(f'<div class="factor{shared}">{box}<span>{tex(label)}</span></div>')
        return f'<div class="circuit">{"".join(boxes)}</div>'

    members = []
    for attn, (W, U) in FAMILY.items():
        counts = ATTENTION[attn].counts(preset("paper-1b", attn))
        heads = f"{counts.heads:,} heads of rank {counts.rank:,}"
        says = f"{heads}, {counts.kv_cache:,} numbers kept, {short(counts.params)} weights"
        members.append(
            f'<div class="member" style="--color:var(--{attn})">'
            f"<header><strong>{NAME[attn]}</strong><span>{says}</span></header>"
            f'<div class="circuits">{circuit("W_c", W)}{circuit("U_c", U)}</div></div>'
        )
    return f'<div class="family">{"".join(members)}</div>'


def calculator() -> str:
    """The places that calculator.js fills."""
    serving = "attention|kept, per token and layer|bytes per token|cache|read once"
    serving += "|tokens/s at most|sequences that fit"
    roofline = "attention|FLOP per byte|arithmetic takes|waits for"
    capacity = "attention|parameters of a layer|heads|rank of a head|shared dimension|total rank"
    precisions = {4: "32 bits (float32)", 2: "16 bits (bfloat16)", 1: "8 bits", 0.5: "4 bits"}
    options = "".join(
        f'<option value="{size:g}">{name}</option>' for size, name in precisions.items()
    )
    choices = {"preset": "model", "bytes": "cache in", "card": "card"}
    selects = "".join(
        f'<span class="choice"><label for="calc-{name}">{label} </label>'
        f'<select id="calc-{name}">{options if name == "bytes" else ""}</select></span>'
        for name, label in choices.items()
    )
    return (
        '<div id="calculator"><noscript>The calculator needs JavaScript.</noscript>'
        f'{selects}<p class="note" id="calc-source"></p><div><ul class="bars" id="calc-bars"></ul>'
        '<div id="calc-fields"></div></div>'
        f"{html_table(serving.split('|'), [], 'calc-serving')}"
        '<p class="note" id="calc-ridge"></p>'
        f"{html_table(roofline.split('|'), [], 'calc-roofline')}"
        f"{html_table(capacity.split('|'), [], 'calc-capacity')}</div>"
    )


LIVE = ("mha", "mfa", "mfa_kr")  # the models of docs/models


def live() -> str:
    """The places that live.js fills. A canvas has a pixel for each number of a full cache."""
    cfg = {attn: preset("tiny", attn) for attn in LIVE}
    kept = {attn: ATTENTION[attn].counts(cfg[attn]).kv_cache for attn in LIVE}
    layers, context = cfg["mha"].n_layer, cfg["mha"].block_size
    height = layers * (context + 2) - 2  # a gap of two pixels between layers
    canvases = "".join(
        f'<figure style="--width:{kept[attn]};--height:{height}">'
        f'<figcaption>{NAME[attn]}</figcaption><canvas id="live-canvas-{attn}" role="img" '
        f'aria-label="the cache of {NAME[attn]}; the table below counts it" '
        f'width="{kept[attn]}" height="{height}"></canvas></figure>'
        for attn in LIVE
    )
    rows = "".join(
        f'<tr id="live-count-{attn}"><th scope="row">{NAME[attn]}</th>'
        f'{"<td class=number></td>" * 3}<td class="number">{kept[attn] * layers:,}</td></tr>'
        for attn in LIVE
    )
    heads = "".join(
        f"<th>{name}</th>"
        for name in ("", "tokens", "numbers kept", "bytes (float32)", "numbers a token")
    )
    choices = "".join(f'<option value="{attn}">{NAME[attn]}</option>' for attn in LIVE)
    numbers = "".join(f'<option value="{layer}">{layer + 1}</option>' for layer in range(layers))
    fields = (
        ("prompt", "prompt", 'type="text" value="ROMEO:" maxlength="64" autocomplete="off"'),
        ("temperature", "temperature", 'type="number" value="0.8" min="0" max="10" step="0.1"'),
        ("seed", "seed", 'type="number" value="1" min="0" step="1"'),
        ("length", "characters", 'type="number" value="300" min="1" max="1000" step="1"'),
    )
    inputs = "".join(
        f'<label for="live-{name}">{label} <input id="live-{name}" {attributes}></label>'
        for name, label, attributes in fields
    )
    return (
        '<div id="live"><noscript>The models need JavaScript. Without it, '
        "<code>python sample.py --checkpoint shipped-mfa_kr</code> writes in a terminal."
        '</noscript><form id="live-form" hidden>'
        f'{inputs}<label for="live-models">models <select id="live-models">'
        f'<option value="all">all three</option>{choices}</select></label>'
        '<label for="live-cache"><input id="live-cache" type="checkbox" checked> keep the '
        'cache</label><button id="live-play" type="submit">play</button></form>'
        '<p id="live-status" role="status"></p><div id="live-results" hidden>'
        '<div id="live-texts"></div><div id="live-look" hidden><p id="live-title"></p>'
        f'<p><label for="live-layer">layer <select id="live-layer">{numbers}</select></label>'
        '<button id="live-key" type="button" aria-expanded="false" aria-controls="live-keys">its '
        'key</button></p><div id="live-keys" hidden></div><div id="live-heads"></div></div>'
        f'<div id="live-caches">{canvases}</div><div class="scroll"><table><thead><tr>{heads}'
        f'</tr></thead><tbody>{rows}</tbody></table></div></div></div>'
    )


def missing(file: str, script: str) -> str:
    what = f"there is no <code>{file}</code> (<code>{script}</code> makes it)"
    return f'<p class="missing">Not measured yet: {what}.</p>'


def html_table(head: list[str], rows: list[list[str]], name: str = "") -> str:
    """A table whose first column is text and whose others are numbers; name: the id of its body."""

    def line(tag: str, texts: list[str]) -> str:
        first, *numbers = (f"{text}</{tag}>" for text in texts)
        cell = '<td class="number">' if tag == "td" else "<th>"
        return f"<tr><{tag}>{first}{''.join(cell + number for number in numbers)}</tr>"

    body = "".join(line("td", row) for row in rows)
    place = f' id="{name}"' if name else ""
    titles = f"<thead>{line('th', head)}</thead>"
    return f'<div class="scroll"><table>{titles}<tbody{place}>{body}</tbody></table></div>'


# Of a study: the two that a sentence compares.
COMPARED = {
    "figure1": ("mha", "mfa"),
    "modern": ("mha_norm", "mfa_norm"),
    **dict.fromkeys(figures.RATIOS, ("muon_mha_norm", "muon_mfa_norm")),
}


def perplexity(folder: Path, study: str = "figure1", recipe: str = "") -> str:
    """Figure 1 at our size: a strip per model, a dot per seed, large caches first."""
    found = figures.arms(study, folder, recipe)
    every = [ppl for arm in found for ppl in arm.ppl]
    if not every:
        return missing(
            "experiments/results/study.jsonl", f"python experiments/study/run.py --study {study}"
        )
    low, high = min(every), max(every)
    lines = []
    for arm in found:
        color = f"var(--{arm.rows[0]['attn']})"
        places = [4 + 92 * (ppl - low) / max(high - low, 1e-9) for ppl in arm.ppl]  # % of the strip
        dots = "".join(f'<b style="left:{place:.1f}%;background:{color}"></b>' for place in places)
        name = f"{html.escape(arm.name)} ({100 * arm.share:.3g}%)"
        lines.append(
            f'<li><span class="name">{name}</span><span class="track">{dots}</span>'
            f'<span class="value">{arm.mean}</span></li>'
        )
    devices = sorted({row["device"] for arm in found for row in arm.rows})
    note = (
        f"Validation perplexity, lower is better: {low:.2f} at the left, {high:.2f} at the right. "
        f"In brackets, the cache's share of MHA's. A dot is one seed; the number is their mean and "
        f"standard deviation. "
        f"{figures.setting(found[0].rows[0])}, {html.escape(' and '.join(devices))}."
    )
    planned = {k: arm for k, arm in figures.STUDIES[study].items() if k.startswith(recipe)}
    by_name = {arm.name: arm for arm in found if arm.ppl}
    mha, mfa = (by_name.get(planned[arm].name) for arm in COMPARED[study])
    few = min(len(arm.ppl) for arm in found) < 3
    if mha and mfa and (len(found) < len(planned) or few):
        at = f"{mfa.name.partition(', C =')[0]} at {100 * mfa.share:.3g}% of its cache"
        lower = statistics.mean(mha.ppl) < statistics.mean(mfa.ppl)
        average = "On average " if len(mha.ppl + mfa.ppl) > 2 else ""
        than, how = ("better", "unlike") if lower else ("worse", "as")
        ahead = f"{average}{mha.name} is {than} than {at}"
        so_far = f"{len(found)} of {len(planned)} models so far" + (
            ", not all with three rates and seeds" if few else ""
        )
        note = f"{ahead}, {how} in the paper. {so_far}. {note}"
    rows = [row for arm in found for row in arm.rows]
    if lost := sum(map(figures.untrained, rows)):
        note += f" {lost} of {len(rows)} runs failed, and {'is' if lost == 1 else 'are'} left out."
    if any(arm.rows[0]["config"]["q_rank"] for arm in found):
        note += " A query rank of dim/2 is ours; the paper's is C."
    return f'<ul class="bars wide">{"".join(lines)}</ul><p class="note">{note}</p>'


ORDER = figures.ORDER


def mode_name(attn: str, mode: str) -> str:
    return f"{NAME[attn]}, {mode}" if mode else NAME[attn]


def bars(rows: list[tuple[str, str, float, str]]) -> str:
    """Bars of (name, attention, value, text), as wide as their values."""
    most = max(value for _, _, value, _ in rows)
    lines = [
        f'<li><span class="name">{name}</span><span class="track">'
        f'<i style="width:{100 * value / most:.1f}%;'
        f'background:var(--{attn})"></i></span><span class="value">{text}</span></li>'
        for name, attn, value, text in rows
    ]
    return f'<ul class="bars">{"".join(lines)}</ul>'


def speed(folder: Path) -> str:
    """Decoding at the paper's 1B shape: bars of tokens/s, and what lies behind them."""
    decode = figures.read_decode(folder)
    found = [
        (attn, mode, row) for attn in ORDER for mode, row in figures.speeds(decode, attn).items()
    ]
    if not found:
        return missing("experiments/results/decode.json", "python experiments/bench/decoding.py")
    head = ["attention", "ms a step", "floor, ms", "share of the floor"]
    head += ["cache measured, GB", "cache counted, GB"]
    rows = []
    for attn, mode, row in found:
        times = [f"{row['ms']:.2f}", f"{row['floor_ms']:.2f}", f"{100 * row['floor_share']:.0f}%"]
        sizes = [f"{row[name] / 1e9:.3f}" for name in ("cache_bytes", "counts_bytes")]
        rows.append([mode_name(attn, mode), *times, *sizes])
    bandwidth = min(
        decode.get("runs", {}).get(row.get("run"), decode)["bandwidth"] for *_, row in found
    )
    note = (
        f"{figures.BATCH} sequences of {figures.CONTEXT:,} tokens, random weights, "
        f"one {html.escape(decode['device'])}, "
        f"whose measured copy bandwidth is {bandwidth / 1e12:.2f} TB/s."
    )
    rate = {attn: row["tokens_per_s"] for attn, _, row in found}
    if {"mha", "mfa"} <= rate.keys():
        note += f" MFA makes {rate['mfa'] / rate['mha']:.1f} times MHA's tokens per second here."
    most, card = max(row["floor_share"] for *_, row in found), data_sheet(decode)
    if most > 1 and card:
        note += (
            f" A share of the floor of {most:.0%} is possible: the floor takes the speed of a "
            f"copy, and a step mostly reads, at up to {card['bandwidth']} TB/s by the data sheet."
        )
    drawn = [
        (mode_name(attn, mode), attn, row["tokens_per_s"], f"{row['tokens_per_s']:,.0f} tokens/s")
        for attn, mode, row in found
    ]
    return f'{bars(drawn)}<p class="note">{note}</p>{html_table(head, rows)}'


def data_sheet(decode: dict) -> dict | None:
    """Of the card that was measured, where docs/published.py has it."""
    cards = published.CARDS.items()
    return next((card for name, card in cards if name in decode["device"].split()), None)


def profile(folder: Path) -> str:
    """Where the milliseconds of a step go."""
    decode = figures.read_decode(folder)
    found = decode.get("profile")
    if not found or not found["steps"]:
        return missing(
            "experiments/results/decode.json", "python experiments/bench/decoding.py --part profile"
        )
    kinds = list(found["steps"][0]["us"])
    rows = [
        [
            mode_name(step["attn"], step["mode"]),
            *(f"{step['us'][kind] / 1000:.2f}" for kind in kinds),
        ]
        for step in found["steps"]
    ]
    runs = {decode["runs"][step["run"]]["commit"][:7] for step in found["steps"]}
    note = f'<p class="note">Steps of a run of their own, at commit {", ".join(sorted(runs))}.</p>'
    return html_table(["ms of a step in", *kinds], rows) + note


def step_time(folder: Path, mode: str, kernel: str) -> str:
    """Of MFA-KR."""
    wanted = dict(
        model=figures.PRESET,
        attn="mfa_kr",
        mode=mode,
        kernel=kernel,
        batch=figures.BATCH,
        context=figures.CONTEXT,
    )
    row = figures.quickest(figures.read_decode(folder)["rows"], **wanted)
    return f"{row['ms']:.1f} ms" if row else figures.MISSING


def largest_batch(folder: Path) -> str:
    """The most sequences that fit, as bars."""
    decode = figures.read_decode(folder)
    rows = [
        row
        for row in decode["largest_batch"]
        if row["context"] == figures.CONTEXT and "batch" in row  # else it has an error
    ]
    if not rows:
        return missing("experiments/results/decode.json", "python experiments/bench/decoding.py")
    rows.sort(key=lambda row: ORDER.index(row["attn"]))
    found = [
        (
            mode_name(row["attn"], row["mode"]),
            row["attn"],
            row["batch"],
            f"{row['batch']:,} sequences",
        )
        for row in rows
    ]
    what = f"The most sequences of {figures.CONTEXT:,} tokens before memory ran out."
    fits, card = [row["batch"] for row in rows if row["attn"] == "mha"], data_sheet(decode)
    if fits and card:
        per_sequence = cache_bytes(preset(figures.PRESET, "mha")) * figures.CONTEXT
        counted = card["memory"] * 1e9 // per_sequence
        used = (fits[0] * per_sequence + weight_bytes()) / 1e9
        what += (
            f" The calculator says {counted:.0f} for MHA, not {fits[0]}: it divides the data "
            f"sheet's {card['memory']} GB by the cache of a sequence, and the card has more: "
            f"{fits[0]} sequences and the weights take {used:.0f} GB."
        )
    return f'{bars(found)}<p class="note">{what}</p>'


# --------------------------------------------------------------------------------------------------
# Figures in the text


def short(n: float) -> str:
    """16777216 -> "16.8M"."""
    for unit, size in {"T": 1e12, "B": 1e9, "M": 1e6, "K": 1e3}.items():
        if n >= size:
            return f"{n / size:.3g}{unit}"
    return f"{n:.3g}"


def weight_bytes() -> int:
    """Of the paper's 1B model with MHA, at 16 bits."""
    with torch.device("meta"):
        return 2 * sum(p.numel() for p in GPT(preset(figures.PRESET, "mha")).parameters())


def values(folder: Path) -> dict[str, str]:
    """What {{name}} stands for."""
    cfg = {attn: preset("paper-1b", attn) for attn in ATTENTION}
    kept = {attn: ATTENTION[attn].counts(cfg[attn]).kv_cache for attn in ATTENTION}
    token = {attn: cache_bytes(cfg[attn]) for attn in ATTENTION}
    context, batch = figures.CONTEXT, figures.BATCH
    mla = preset("paper-1b", "mla", **figures.FIGURE1_MLA)
    wider = [ATTENTION["mfa"].counts(preset("paper-1b", "mfa", n_head=m)).params for m in (14, 15)]
    mha_heads = [
        ATTENTION["mha"].counts(preset("paper-1b", "mha", n_head=n)).params for n in (16, 17)
    ]
    mqa_heads = [
        ATTENTION["mqa"].counts(preset("paper-1b", "mqa", n_head=n, head_dim=256)).params
        for n in (14, 15)
    ]
    return {
        "context": f"{context:,}",
        "batch": f"{batch}",
        "mha_kept": f"{kept['mha']:,}",
        "mqa_kept": f"{kept['mqa']:,}",
        "mfa_kept": f"{kept['mfa']:,}",
        "fpba_kept": f"{kept['fpba']:,}",
        "mha_token": f"{token['mha']:,}",
        "kr_token": f"{token['mfa_kr']:,}",
        "joint_token": f"{cache_bytes(mla):,}",
        "kr_saves": f"{100 * (1 - token['mfa_kr'] / cache_bytes(mla)):.1f}%",
        "mha_sequence": f"{token['mha'] * context / 1e9:.2f} GB",
        "kr_sequence": f"{token['mfa_kr'] * context / 1e9:.2f} GB",
        "mha_all": f"{token['mha'] * context * batch / 1e9:.0f} GB",
        "weights": f"{weight_bytes() / 1e9:.2f} GB",
        "fpba_params": short(ATTENTION["fpba"].counts(cfg["fpba"]).params),
        "mha_params": short(ATTENTION["mha"].counts(cfg["mha"]).params),
        "mha_head": short(mha_heads[1] - mha_heads[0]),
        "mqa_head": short(mqa_heads[1] - mqa_heads[0]),
        "mfa_head": short(wider[1] - wider[0]),
        "mfa_rank": f"{ATTENTION['mfa'].counts(cfg['mfa']).total_rank:,}",
        "mha_rank": f"{ATTENTION['mha'].counts(cfg['mha']).total_rank:,}",
        "family": family(),
        "calculator": calculator(),
        "live": live(),
        "perplexity": perplexity(folder),
        "perplexity_muon": perplexity(folder, "modern"),
        "perplexity_ratio": perplexity(folder, "ratio", "muon"),
        "perplexity_ratio_7m": perplexity(folder, "ratio_7m", "muon"),
        "speed": speed(folder),
        "profile": profile(folder),
        "pre_torch": step_time(folder, "pre", "sdpa"),
        "pre_kernel": step_time(folder, "pre", "triton"),
        "post_kernel": step_time(folder, "post", "triton"),
        "largest_batch": largest_batch(folder),
        **training_and_prefill(folder),
        **figures.recalled(folder, "ratio"),
        **{f"{name}_7m": cost for name, cost in figures.recalled(folder, "ratio_7m").items()},
    }


def training_and_prefill(folder: Path) -> dict[str, str]:
    """MFA's speeds as shares of MHA's, with the short and with the long context."""
    times = figures.equal_time.read(folder / figures.equal_time.RESULTS.name)
    shapes = {"": figures.SHAPE, "_long": figures.LONG}
    found = {}
    for name, what in (("mfa_trains", "train"), ("mfa_reads", "prefill")):
        for end, shape in shapes.items():
            row = times.get((shape, what, "mfa"))
            found[name + end] = f"{row['of_mha']:.2f}" if row else figures.MISSING
    return found


def picture(path: Path, marker: str) -> str:
    """The PNG, in base64, of the one code cell of a notebook with a text and a picture."""
    if not path.exists():
        raise BadInput(f"walkthrough.md: {path.name} should be in notebooks/, and is not")
    found = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        shown = [
            output["data"]["image/png"]
            for output in cell.get("outputs", [])
            if "image/png" in output.get("data", {})
        ]
        if marker in "".join(cell["source"]):
            found += shown
    if len(found) != 1:
        raise BadInput(
            f'walkthrough.md: "{marker}" should be in one cell of {path.name} with one picture, '
            f"not {len(found)}"
        )
    return "".join(found[0]).replace("\n", "")


# --------------------------------------------------------------------------------------------------
# The page


def render(markdown: str) -> tuple[str, str]:
    """Markdown as HTML, and the links to its sections."""
    md = MarkdownIt("commonmark", {"html": True}).enable("table")
    md.use(
        dollarmath_plugin,
        double_inline=False,
        renderer=lambda source, options: tex(source, options["display_mode"]),
    )
    for rule in ("math_inline", "math_block"):
        md.add_render_rule(
            rule,
            lambda self, tokens, i, options, env: tex(
                tokens[i].content, tokens[i].type == "math_block"
            ),
        )
    tokens, links = md.parse(markdown), []
    for i, token in enumerate(tokens):
        if token.type == "heading_open" and token.tag == "h2":
            name = tokens[i + 1].content
            token.attrSet("id", re.sub(r"\W+", "-", name.lower()).strip("-"))
            links.append(f'<a href="#{token.attrGet("id")}">{name}</a>')
        for child in token.children or []:
            source = child.attrGet("src") or ""
            if child.type == "image" and source.endswith(".ipynb"):
                png = picture((HERE / source).resolve(), child.attrs.pop("title"))
                width, height = struct.unpack(
                    ">II", base64.b64decode(png)[16:24]
                )  # of a PNG, in its first 24 bytes
                # On a phone a picture scrolls rather than shrink until its letters cannot be read.
                size = {
                    "width": width,
                    "height": height,
                    "style": f"min-width:{0.64 * width:.0f}px",
                }
                child.attrs |= {"src": f"data:image/png;base64,{png}"} | size
    body = md.renderer.render(tokens, md.options, {})
    body = re.sub(
        r"<p>(<img [^>]*>)\s*(.*?)</p>",
        r'<figure><div class="scroll">\1</div><figcaption>\2</figcaption></figure>',
        body,
        flags=re.DOTALL,
    )
    return body.replace("<table>", '<div class="scroll"><table>').replace(
        "</table>", "</table></div>"
    ), "".join(links)


def words(markdown: str) -> int:
    """Words of prose: formulas count as one, what is made elsewhere and addresses as none."""
    text = re.sub(r"\$\$.*?\$\$|\$[^$]+\$", " x ", markdown, flags=re.DOTALL)
    text = re.sub(r"\{\{\w+\}\}", " x ", re.sub(r"\]\([^)]*\)", "]", text))
    return len(re.findall(r"[\w’'-]*\w", text))


def page(folder: Path = figures.RESULTS) -> str:
    """docs/index.html."""
    markdown = (HERE / "walkthrough.md").read_text(encoding="utf-8")
    body, links = render(markdown)
    known = values(folder) | {
        "minutes": f"{round(words(markdown) / 230)}",
        "contents": f"<nav>{links}</nav>",
    }
    asked = set(re.findall(r"\{\{(\w+)\}\}", body))
    if asked != known.keys():
        raise BadInput(
            f"walkthrough.md: {{{{name}}}} without a value, or a value without a place: "
            f"{sorted(asked ^ known.keys())}"
        )
    for name, value in known.items():
        body = body.replace(f"<p>{{{{{name}}}}}</p>", value).replace(f"{{{{{name}}}}}", value)
    colors = "".join(f"--{attn}: {color};" for attn, color in COLOR.items() if attn != "fpba")
    style = f":root {{ {colors} --fpba: var(--ink); }}\n" + (HERE / "page.css").read_text(
        encoding="utf-8"
    )
    scripts = [
        (HERE / name).read_text(encoding="utf-8")
        for name in ("page.js", "calculator.js", "model.js", "live.js")
    ]
    for place, data in (("presets", presets()), ("models", models()), ("cards", published.CARDS)):
        scripts[1] = scripts[1].replace(f"/*{place}*/{{}}", json.dumps(data))
    first, calculator, model, watch = scripts
    font = base64.b64encode((HERE / "math.woff2").read_bytes()).decode()
    return f"""<!doctype html>
<html lang="en">
<!-- Made by docs/build.py from docs/walkthrough.md: edit that. -->
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="description" content="{DESCRIPTION}">
<link rel="icon" href="data:,">
<title>{re.search("^# (.*)", markdown)[1]}</title>
<style>
/* Page Math: a part of STIX Math 1.1.1, (c) 2001-2011 by the STI Pub Companies,
   under the SIL Open Font License 1.1: docs/math-licence.txt. */
@font-face {{ font-family: "Page Math"; src: url(data:font/woff2;base64,{font}) format("woff2"); }}
{style}</style>
<script>
{first}</script>
</head>
<body>
<main>
<button id="theme" type="button">light / dark</button>
{body}</main>
<script>
{calculator}</script>
<script>
{model}</script>
<script>
{watch}</script>
</body>
</html>
"""


def presets() -> dict[str, dict]:
    """mfa.py's presets under the calculator's names."""
    found = {}
    for name in PRESETS:
        cfg = preset(name, "mha")
        same = {
            field: getattr(cfg, field)
            for field in ("n_layer", "dim", "head_dim", "n_kv_head", "mfa_n_head", "rope_dim")
        }
        found[name] = same | dict(
            n_head=cfg.heads,
            latent_dim=cfg.latent,
            joint_dim=2 * cfg.latent,
            context=cfg.block_size,
            **dict(q_rank=0, local_layers=0, window=4096, local_kept=0),
        )
    return found


def models() -> dict[str, dict]:
    """docs/published.py's models under the calculator's names."""
    return {
        name: model._asdict() | dict(fields=published.fields(model))
        for name, model in published.MODELS.items()
    }


def built() -> dict[Path, str]:
    """Every file that is made here, as it should be."""
    readme = ROOT / "README.md"
    return {
        HERE / "index.html": page(),
        HERE / "family.svg": drawing.svg(),
        readme: figures.with_table(readme.read_text(encoding="utf-8")),
    }


@dataclass
class Args:
    """Make docs/index.html, docs/family.svg and the tables in README.md."""

    check: bool = False
    """Write nothing; fail where a file is not what would be written."""


def main(args: Args) -> None:
    for path, text in built().items():
        name = path.relative_to(ROOT).as_posix()
        same = path.exists() and path.read_text(encoding="utf-8") == text
        if args.check and not same:
            raise BadInput(f"{name} is not up to date: run python docs/build.py")
        if not args.check:
            path.write_text(text, encoding="utf-8", newline="\n")
            print(f"{name}: {len(text.encode()) / 1e3:,.0f} kB{'' if same else ', changed'}")


if __name__ == "__main__":
    run_command(main, Args)
