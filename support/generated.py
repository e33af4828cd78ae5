"""The generated parts of a Markdown file, each between <!-- NAME --> and <!-- /NAME -->."""

from support.cli import BadInput


def around(text: str, name: str, file: str = "README.md") -> tuple[str, str]:
    """The text up to its marker <!-- name -->, and from <!-- /name --> on, markers included.

    BadInput, which calls the text `file`, where a marker is missing or there twice.
    """
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(end) < text.index(begin):
        what = f"should have the two lines {begin} and {end} once"
        raise BadInput(f"{file} {what}, with what is generated between them")
    head, _, rest = text.partition(begin)
    _, _, tail = rest.partition(end)
    return head + begin, end + tail


def fill(text: str, parts: dict[str, str], file: str = "README.md") -> str:
    """The text with each part put between its two markers."""
    for name, part in parts.items():
        head, tail = around(text, name, file)
        text = f"{head}\n{part}\n{tail}"
    return text
