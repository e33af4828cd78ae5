"""docs/family.svg, the README's drawing of the seven attentions: python docs/build.py makes it.

The factors of W_c and U_c true to scale at the paper's 1B shape, beside what is cached for a token
in a layer.
"""

from html import escape

from mfa import ATTENTION, preset
from support.palette import COLOR, NAME

PRESET = "paper-1b"
# The factors of W_c and U_c, each with its rows and columns. * marks what all heads share, + what
# the heads of a group share.
FACTORS = {
    "fpba": ("W_c H H", "U_c H H"),
    "mha": ("Q_c H d, K_c^T d H", "V_c H d, O_c^T d H"),
    "gqa": ("Q_c H d, +K_g^T d H", "+V_g H d, O_c^T d H"),
    "mqa": ("Q_c H d, *K^T d H", "*V H d, O_c^T d H"),
    "mla": ("*S_q H C, Q_c C d, K_c^T d C, *S_k^T C H", "*S_v H C, V_c C d, O_c^T d H"),
    "mfa": ("*S_q H C, Q_c C C, *S_k^T C H", "*S_v H C, O_c^T C H"),
    "mfa_kr": ("*S_q H C, Q_c C C, *S_k^T C H", "*S_k H C, *M C C, O_c^T C H"),
}
OPTIONS = {"gqa": dict(n_kv_head=4)}
SIDE = 64  # pixels of H
ROW = SIDE + 32
W_AT, U_AT, CACHE_AT = 100, 370, 570  # where the columns begin
WIDTH, BAR, EDGE = 840, 210, 6
STYLE = """
text { font: 13px system-ui, sans-serif; fill: #1f2328; }
.soft { fill: #59636e; } .name { font-weight: 600; } .sub { font-size: 9px; }
.ground { fill: #ffffff; }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3; } .soft { fill: #9198a1; } .ground { fill: #0d1117; }
}
"""


def svg() -> str:
    """The drawing."""
    heads = ["", "W_c: how it scores", "U_c: what it writes", "cached, per token and layer"]
    places = [EDGE, W_AT, U_AT, CACHE_AT]
    parts = [text(x, 16, head, "soft") for x, head in zip(places, heads, strict=True)]
    for i, attn in enumerate(FACTORS):
        parts += row(attn, 30 + i * ROW)
    height = 30 + len(FACTORS) * ROW + 22
    note = "filled: shared by all heads; half filled: by a group of heads; hollow: of one head"
    parts.append(text(EDGE, height - 8, note, "soft"))
    size = f'width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}"'
    ground = f'<rect class="ground" width="{WIDTH}" height="{height}"/>'
    lines = [f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">']
    lines += ["<title>The factors of seven attentions, to scale, and what each caches</title>"]
    return "\n".join([*lines, f"<style>{STYLE}</style>", ground, *parts, "</svg>"]) + "\n"


def row(attn: str, y: float) -> list[str]:
    """One attention: its name, its circuits and its cache."""
    cfg = preset(PRESET, attn, **OPTIONS.get(attn, {}))
    counts = ATTENTION[attn].counts(cfg)
    bottom = y + SIDE
    parts = [text(EDGE, y + SIDE / 2, NAME[attn], "name")]
    parts.append(text(EDGE, y + SIDE / 2 + 17, f"{counts.heads:,} heads", "soft"))
    for x, factors in zip((W_AT, U_AT), FACTORS[attn], strict=True):
        for factor in factors.split(", "):
            shapes, width = box(attn, factor, x, bottom)
            parts += shapes
            x += width
    most = ATTENTION["mha"].counts(preset(PRESET, "mha")).kv_cache
    share = counts.kv_cache / most
    bar = BAR * min(share, 1)
    style = f'fill="{COLOR[attn] if attn != "fpba" else "#8c959f"}"'
    parts.append(
        f'<rect x="{CACHE_AT}" y="{y + SIDE / 2 - 14}" width="{bar:.1f}" height="18" {style}/>'
    )
    says = f"{counts.kv_cache:,} numbers"
    if share > 1:
        says += f", {share:,.0f} times MHA's"
    elif share < 1:
        exact = (1 / share).is_integer()
        says += f", 1/{1 / share:.0f} of MHA's" if exact else f", {share:.0%} of MHA's"
    parts.append(text(CACHE_AT, y + SIDE / 2 + 22, says))
    if share > 1:  # the bar does not end where it is cut
        x = CACHE_AT + bar - 16
        parts.append(f'<path class="ground" d="M{x} {y + SIDE / 2 + 6} l6 -22 h5 l-6 22 z"/>')
    return parts


def box(attn: str, factor: str, x: float, bottom: float) -> tuple[list[str], float]:
    """A factor with its name below, and the width that the two take."""
    cfg = preset(PRESET, attn)
    pixels = {"H": SIDE, "C": SIDE * cfg.latent / cfg.dim, "d": SIDE * cfg.head_dim / cfg.dim}
    label, rows, columns = factor.lstrip("*+").split()
    wide, high = pixels[columns], pixels[rows]
    filled = {"*": 1, "+": 0.45}.get(factor[0], 0)
    column = max(wide, 30)
    left = x + (column - wide) / 2
    color = COLOR[attn] if attn != "fpba" else "#8c959f"
    where = f'x="{left:.1f}" y="{bottom - high:.1f}" width="{wide:.1f}" height="{high:.1f}"'
    look = f'stroke="{color}" stroke-width="1.5" fill="{color}" fill-opacity="{filled}"'
    shapes = [f"<rect {where} {look}/>", text(x + column / 2, bottom + 17, label, "middle")]
    return shapes, column + 8


def text(x: float, y: float, words: str, how: str = "") -> str:
    """A line of text; X_y and X^T are set as in a formula."""
    anchor = ' text-anchor="middle"' if how == "middle" else ""
    kind = f' class="{how}"' if how and how != "middle" else ""
    return f'<text x="{x:g}" y="{y:g}"{anchor}{kind}>{formula(words)}</text>'


def formula(words: str) -> str:
    """K_c^T -> K with c below and T above."""
    parts, lowered = [], 0
    for sign, rest in pieces(words):
        if sign:
            step = {"_": 4, "^": -6}[sign]
            parts.append(f'<tspan class="sub" dy="{step - lowered}">{escape(rest)}</tspan>')
            lowered = step
        elif lowered:
            parts.append(f'<tspan dy="{-lowered}">{escape(rest)}</tspan>')
            lowered = 0
        else:
            parts.append(escape(rest))
    return "".join(parts)


def pieces(words: str) -> list[tuple[str, str]]:
    """ "K_c^T x" -> [("", "K"), ("_", "c"), ("^", "T"), ("", " x")]: a script is one letter."""
    found, i = [], 0
    while i < len(words):
        if words[i] in "_^":
            found.append((words[i], words[i + 1]))
            i += 2
        else:
            end = next((j for j in range(i, len(words)) if words[j] in "_^"), len(words))
            found.append(("", words[i:end]))
            i = end
    return found
