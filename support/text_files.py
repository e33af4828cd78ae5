"""Text files: opened and decoded a block at a time; and which files of a folder are text."""

import codecs
import gzip
import hashlib
import io
import itertools
import lzma
import os
import re
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from support.cli import BadInput
from support.data_set import DATA_SET
from support.files import is_hidden

BLOCK = 1_000_000  # bytes read at a time
LONGEST_SEPARATOR = 10_000  # characters: what stands between two documents is shorter

# --------------------------------------------------------------------------------------------------
# One file


def read_blocks(path: Path) -> Iterator[bytes]:
    """The bytes of a file, BLOCK at a time, with xz, gz and zip opened."""
    suffix = Path(path.name.removesuffix(".part")).suffix.lower()
    try:
        if suffix == ".zip":
            archive = zipfile.ZipFile(path)
            names = [m.filename for m in archive.infolist() if not m.is_dir()]
            members = [name for name in names if not is_hidden(name)]
            if len(members) != 1:
                reason = f"holds {len(members)} files; a zip must hold exactly one, the text"
                raise BadInput(f"{path}: {reason}")
            file = archive.open(members[0])
        else:
            file = {".xz": lzma.open, ".gz": gzip.open}.get(suffix, open)(path, "rb")
        with file:
            while block := file.read(BLOCK):
                yield block
    except (lzma.LZMAError, zlib.error, zipfile.BadZipFile, EOFError, RuntimeError, OSError) as e:
        if getattr(e, "errno", None) is not None:  # from the operating system, not from a format
            raise
        reason = f"cannot be unpacked, it is damaged or no {suffix} file ({e})"
        raise BadInput(f"{path}: {reason}") from None


def checksum(path: Path) -> tuple[int, str]:
    """Bytes and sha256 of what read_blocks gives."""
    size = 0
    sha256 = hashlib.sha256()
    for block in read_blocks(path):
        size += len(block)
        sha256.update(block)
    return size, sha256.hexdigest()


def wide_encoding(head: bytes) -> str | None:
    """What a byte order mark other than UTF-8's announces: Windows writes such texts."""
    if head.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):  # one begins like UTF-16's
        return "UTF-32"
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "UTF-16"
    return None


def read_text(path: Path, raw: bool) -> Iterator[str]:
    """The text of a file: one piece for every block, and one for the end.

    It is UTF-8, or what its byte order mark says. Line ends become "\\n" and the mark goes. raw
    (for bytes as tokens) keeps the line ends, UTF-8's mark, and as surrogates what is not UTF-8.
    BadInput names the first NUL byte, or the first that cannot be decoded.
    """
    blocks = read_blocks(path)
    first_block = next(blocks, b"")
    wide = wide_encoding(first_block)
    if wide:
        decoder = codecs.getincrementaldecoder(wide)("strict")
    elif raw:
        decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
    else:
        decoder = codecs.getincrementaldecoder("utf-8-sig")("strict")
    if not raw:
        decoder = io.IncrementalNewlineDecoder(decoder, translate=True)

    offset = 0
    for block in itertools.chain([first_block], blocks, [b""]):
        if not wide and b"\0" in block:
            where = f"there is a NUL byte at offset {offset + block.index(0):,}"
            raise BadInput(f"{path}: is not text, {where}; give a text file in UTF-8")
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as e:
            # e.object begins with what the decoder had kept back
            where = offset + len(block) - len(e.object) + e.start
            byte = f"at offset {where:,} there is the byte 0x{e.object[e.start]:02x}"
            advice = "save it as UTF-8" + (", or use --tokenizer byte" if not wide else "")
            raise BadInput(f"{path}: is not {wide or 'UTF-8'}, {byte}; {advice}") from None
        if wide and "\0" in text:
            raise BadInput(f"{path}: is not text, there is a NUL in it; give a text file in UTF-8")
        yield text
        offset += len(block)


# --------------------------------------------------------------------------------------------------
# Texts in pieces, which need not fit in memory


def slice_text(texts: Iterable[str], start: int, stop: int) -> Iterator[str]:
    """text[start:stop] of a text that comes in pieces."""
    position = 0  # of the piece's first character
    for text in texts:
        yield text[max(0, start - position) : max(0, stop - position)]
        position += len(text)
        if position >= stop:
            return


def split_documents(texts: Iterable[str], separator: str) -> Iterator[str | int]:
    """The documents of a text in pieces, in pieces again, without what the separator matches.

    separator: a regex, "" for none. After a document comes an int: where in the text (in
    characters) the next one begins. Pieces, and documents, may be empty.
    """
    pattern = re.compile(separator or r"(?!)")  # which matches nowhere
    position = 0  # of window[0] in the text
    window = ""
    start = 0  # in window, of what was not given out yet; ^ may look at the character before it
    for text in texts:
        window += text
        for match in pattern.finditer(window, start):
            yield window[start : match.start()]
            yield position + match.end()
            start = match.end()
        end = max(start, len(window) - LONGEST_SEPARATOR)  # no separator begins before it any more
        yield window[start:end]
        cut = max(end - 1, 0)
        window = window[cut:]
        position += cut
        start = end - cut
    for match in pattern.finditer(window + "\n", start):
        if match.end() > len(window):  # a separator in the last line, which lacks its end
            window = window[: match.start()]
    yield window[start:]
    yield position + len(window)


def document_ends(texts: Iterable[str], separator: str) -> list[int]:
    """Where the documents of a text end that are not empty, in characters, separator included."""
    ends = []
    is_empty = True
    for piece in split_documents(texts, separator):
        if isinstance(piece, str):
            is_empty = is_empty and not piece
        elif not is_empty:
            ends.append(piece)
            is_empty = True
    return ends


# --------------------------------------------------------------------------------------------------
# The files of a folder

RUN = {"latest.pt", "best.pt", "metrics.jsonl"}  # a folder with one of these is a run
DOWNLOADS = "raw"  # the folder of downloads, with a folder for each corpus
PRODUCTS = {"metrics.jsonl", "loss.png", "compare.png", "smoke.jsonl"}  # written outside them, too


def find_texts(
    folder: Path, suffix: str = "", skip: Collection[str] = (), corpora: Collection[str] = ()
) -> tuple[list[Path], dict[str, list[str]]]:
    """The text files of a folder, sorted by path, and what else is in it: why left out -> names.

    Only files whose names end in suffix, and no folder whose name is in skip. corpora: the names by
    which a folder of downloads is known. OSError for what may not be read.
    """
    texts = []
    left_out = defaultdict(list)

    def fail(error: OSError) -> None:
        raise error

    for parent, folders, files in os.walk(folder, onerror=fail):
        parent = Path(parent)
        reasons = {name: why_no_folder(parent / name, corpora) for name in folders}
        reasons |= dict.fromkeys(reasons.keys() & skip, "unwanted")
        folders[:] = [name for name in folders if not reasons[name]]  # os.walk visits only these
        own = PRODUCTS | (DATA_SET if DATA_SET <= set(files) else set())
        for name in files:
            if name.endswith(suffix):
                path = parent / name
                reasons[name] = "written by this project" if name in own else why_no_text(path)
                if not reasons[name]:
                    texts.append(path)
        for name, reason in reasons.items():
            if reason:
                left_out[reason].append((parent / name).relative_to(folder).as_posix())
    texts.sort(key=lambda path: path.relative_to(folder).as_posix())
    return texts, {reason: sorted(names) for reason, names in sorted(left_out.items())}


def why_no_folder(folder: Path, corpora: Collection[str]) -> str:
    """Why a folder's files are no texts of the user's, or ""."""
    if is_hidden(folder.name):
        return "hidden"
    if folder.is_symlink():
        return "a link to a folder"
    names = {path.name for path in folder.iterdir()}
    if names >= DATA_SET:
        return "a data set"
    if names & RUN:
        return "a run"
    if folder.name == DOWNLOADS and names & set(corpora):
        return "downloads"
    return ""


def why_no_text(path: Path) -> str:
    """Why a file is no text, or ""."""
    if is_hidden(path.name):
        return "hidden"
    if path.suffix == ".part":
        return "half written"
    if not path.is_file():
        return "not a file"
    try:
        head = next(read_blocks(path), b"")[:8192]
    except BadInput:
        return "packed, but not one text"
    if not head:
        return "empty"
    if b"\0" in head and not wide_encoding(head):  # by a NUL byte git, too, knows binaries
        return "binary"
    return ""


def describe(folder: Path, found: int, left_out: dict[str, list[str]]) -> str:
    """What find_texts left out, in one line: how many, why, and three names of each kind."""
    kinds = [
        f"{len(names)} as {reason} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for reason, names in left_out.items()
    ]
    return f"{folder}: {found} text files; left out: {'; '.join(kinds)}"
