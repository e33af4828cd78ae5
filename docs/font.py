"""Make the page's font of formulas, docs/math.woff2: python docs/font.py STIXMath-Regular.otf

Needs pip install fonttools brotli, and STIX Math 1.1.1 (Debian: fonts-stix), which is under the
SIL Open Font License 1.1; docs/math-licence.txt comes along, and the part that is kept has a name
of its own, as the licence asks. Kept are letters, digits and signs of formulas, with the larger
forms and the pieces that the font's MATH table stretches sums, roots and brackets with.
"""

import string
from dataclasses import dataclass
from pathlib import Path

import tyro

from support.cli import BadInput, run_command

HERE = Path(__file__).resolve().parent
NAME = "Page Math"
SIGNS = "()[]{}|‖+-−=<>≤≥≠≈∈→←·×⊙⊕∘/,.;:!∑∏∫√∞…⋯′^~¯ℝαβγδελμσθπρτφϕωΔΣΠ"


def characters() -> set[int]:
    """Code points: ASCII letters and digits, SIGNS, and italic letters, Latin and Greek."""
    italic = {*range(0x1D434, 0x1D468), *range(0x1D6E2, 0x1D71C)} - {0x1D455}
    planck = 0x210E  # what Unicode has for an italic h
    return {ord(c) for c in string.ascii_letters + string.digits + SIGNS} | italic | {planck}


@dataclass
class Args:
    """Make docs/math.woff2."""

    source: tyro.conf.Positional[Path]
    """STIXMath-Regular.otf"""


def main(args: Args) -> None:
    try:
        import brotli  # noqa: F401 (fontTools writes woff2 with it)
        from fontTools import subset, ttLib
    except ImportError as e:
        raise BadInput(f"{e.name} is missing: pip install fonttools brotli") from None
    try:
        font = ttLib.TTFont(args.source)
    except (OSError, ttLib.TTLibError) as e:
        raise BadInput(f"{args.source}: not a font that can be read: {e}") from None
    if "MATH" not in font:
        raise BadInput(f"{args.source}: has no MATH table, so nothing in it can be stretched")
    lacks = characters() - font.getBestCmap().keys()
    if lacks:
        raise BadInput(f"{args.source}: lacks {' '.join(map(chr, sorted(lacks)))}")
    options = subset.Options(
        flavor="woff2", hinting=False, desubroutinize=True, name_IDs=[0, 5, 13, 14],
        layout_features=["ssty", "dtls", "flac", "kern", "ccmp"], drop_tables=["FFTM", "DSIG"],
    )  # fmt: skip
    kept = subset.Subsetter(options)
    kept.populate(unicodes=characters())
    kept.subset(font)
    for number, text in {1: NAME, 2: "Regular", 4: NAME, 6: NAME.replace(" ", "")}.items():
        font["name"].setName(text, number, 3, 1, 0x409)
    subset.save_font(font, HERE / "math.woff2", options)
    print(f"docs/math.woff2: {(HERE / 'math.woff2').stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    run_command(main, Args)
