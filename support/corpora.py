"""The corpora: where each text is from, its sums and its licence, and how its files are found."""

import http.client
import sysconfig
import urllib.error
import urllib.request
from dataclasses import dataclass, replace
from pathlib import Path

from support.cli import BadInput, progress_bar
from support.files import rename
from support.text_files import DOWNLOADS, LONGEST_SEPARATOR, checksum, describe, find_texts

CHECKOUT = Path(__file__).resolve().parents[1]
if (CHECKOUT / "data" / "shakespeare.txt").is_file():
    EMBEDDED = CHECKOUT / "data"  # the folder of shakespeare.txt
    DATA = EMBEDDED  # where data sets and downloads are kept
else:  # installed: the text is in the package, and what is made belongs to the working directory
    EMBEDDED = Path(__file__).resolve().parent / "data"
    DATA = Path("data")

# How a corpus is split; meta.json keeps this sentence.
CHARACTERS = "first 90% of the characters train, the rest val"
WHOLE_DOCUMENTS = "first 90% of the characters train, the rest val, cut between two documents"
DOCUMENTS = (
    "every tenth document val, sorted by path "
    "(of fewer than ten, the one nearest to a tenth of the text)"
)
OFFICIAL = "the corpus' own training and validation files"
HUTTER = (
    "first 90,000,000 bytes train, next 5,000,000 val "
    "(the last 5,000,000, by custom the test set, are left out)"
)
HUTTER_ENDS = 90_000_000, 95_000_000  # in bytes; multiples of text_files.BLOCK

# Regular expressions for what stands between documents.
EOT_LINE = r"(?m)^<\|endoftext\|>\n"  # the line goes, the end-of-text token comes
WIKI_TITLE = r"(?m)^(?= \n = [^=\n].* = \n \n)"  # before " = Title = " between two blank lines

PUBLIC_DOMAIN = "public domain"
WIKIPEDIA = "CC BY-SA 3.0 and GFDL (Wikipedia contributors)"
GITHUB = "https://raw.githubusercontent.com/"
WIKITEXT_2 = GITHUB + "pytorch/examples/main/word_language_model/data/wikitext-2/"
TINYSTORIES = "https://huggingface.co/datasets/roneneldan/TinyStories/resolve/main/"


@dataclass(frozen=True)
class File:
    """One file of a corpus. size and sha256 are those of the text, once xz, gz or zip is opened."""

    split: str  # "train", "val", or "both": cut by position
    name: str
    size: int  # in bytes
    sha256: str
    url: str = ""  # "": cannot be downloaded

    def source(self) -> dict:
        """What meta.json says of it."""
        return {"name": self.name, "bytes": self.size, "sha256": self.sha256}


@dataclass(frozen=True)
class Corpus:
    """One row of the table. separator: see above; "" makes every file one document."""

    rule: str
    separator: str
    licence: str
    files: tuple[File, ...] = ()


# fmt: off
PG_BOOKS = (
    File("train", "train-0.txt", 87_828_528,
         "b05fa97b37a52f5aa80e3a899587c8c9b8208a0c363d705fca914521c6201ef3"),
    File("train", "train-1.txt", 87_488_038,
         "c6b286bb16b48752c43b37a3111ae901fa203110c04d1ef595279dd2baf34322"),
    File("train", "train-2.txt", 83_972_461,
         "94fabd1fb06157ec5a9ece723f5b8c157abd63e31c233641edcb637a0f4bad25"),
    File("train", "train-3.txt", 84_383_492,
         "1a7a290e5899179679dfe87b809cbd469db75ac9eb2bac1a44ac7be8db93320c"),
    File("train", "train-4.txt", 83_815_165,
         "d72247733317ff45570a6e245774c9d31d8cff0da02ebe94b4636f83dd0f1cbe"),
    File("train", "train-5.txt", 83_838_125,
         "670a5b3152d10995d9dd6ebd64303159793f07fecfe39fc705af89952d603213"),
    File("train", "train-6.txt", 84_147_086,
         "912dc276543c6e826db578b33fd879497f3dedb792003d8791e6c97477a32bec"),
    File("val", "val.txt", 4_342_410,
         "49f603b5a621b904fb223919967631437a790955e3328b8230e0b4156b816621"),
)

CORPORA = {
    # Embedded; data/README.md says where it is from.
    "shakespeare": Corpus(CHARACTERS, "", PUBLIC_DOMAIN, (
        File("both", "shakespeare.txt", 1_189_023,
             "acc15167fbb4f1235b3faaedac1fe2b656550191e302fefadf9cb0c03dcf26d0"),
    )),
    "tinyshakespeare": Corpus(CHARACTERS, "", PUBLIC_DOMAIN, (
        File("both", "tinyshakespeare.txt", 1_115_394,
             "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
             GITHUB + "karpathy/char-rnn/master/data/tinyshakespeare/input.txt"),
    )),
    "wikitext-2": Corpus(OFFICIAL, WIKI_TITLE, WIKIPEDIA, (
        File("train", "train.txt", 10_797_148,
             "9e9fa1ad55b1c2c95b08e37dd8e653f638fac2c6de904b79e813611eefbc985f",
             WIKITEXT_2 + "train.txt"),
        File("val", "valid.txt", 1_121_681,
             "f0737ed31fc1329026e95cb8b98e19c2a182c39c240ab909dc31abf2f8af58e8",
             WIKITEXT_2 + "valid.txt"),
    )),
    "tinystories": Corpus(OFFICIAL, EOT_LINE, "CDLA-Sharing-1.0 (Eldan and Li, 2023)", (
        File("train", "train.txt", 2_227_753_162,
             "6418d412de72888f52b5142c761ac21a582f7d1166f0bfbdb5f03ccfdec90443",
             TINYSTORIES + "TinyStoriesV2-GPT4-train.txt"),
        File("val", "valid.txt", 22_502_601,
             "6874bae9a4c1a4e7edcf0e53b86c17817e9cf881fc75ff2368da457b80c0585d",
             TINYSTORIES + "TinyStoriesV2-GPT4-valid.txt"),
    )),
    "enwik8": Corpus(HUTTER, "", WIKIPEDIA, (
        File("both", "enwik8", 100_000_000,
             "2b49720ec4d78c3c9fabaee6e4179a5e997302b3a70029f30f2d582218c024a8",
             "https://mattmahoney.net/dc/enwik8.zip"),
    )),
    "text8": Corpus(HUTTER, "", WIKIPEDIA, (
        File("both", "text8", 100_000_000,
             "6e890197040d37d85beb962ae1f041ff1d9a9ca8d20c7d99c85027eebf51dca7",
             "https://mattmahoney.net/dc/text8.zip"),
    )),
    # The standard library of the Python that runs this, without its tests.
    "python": Corpus(DOCUMENTS, "", "PSF-2.0"),
    # 444 English books, and the same with 882 more to train on. Only through --source.
    "pg-books": Corpus(OFFICIAL, EOT_LINE, PUBLIC_DOMAIN, (*PG_BOOKS[:2], PG_BOOKS[-1])),
    "pg-books-large": Corpus(OFFICIAL, EOT_LINE, PUBLIC_DOMAIN, PG_BOOKS),
}
# fmt: on
OWN_TEXT = Corpus(DOCUMENTS, "", "your own text")
NOT_THE_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test"}


def check_text_flags(
    dataset: str,
    file: str | None,
    source: str | None,
    tokenizer: str,
    vocab_size: int | None,
    data_dir: str | Path,
    separator: str | None,
) -> None:
    """BadInput for flags that cannot be, or do not go together."""
    if dataset not in CORPORA:
        names = ", ".join(CORPORA)
        wrong = f"--dataset {dataset}: is not one of {names}; for a text of your own use --file"
    elif file is not None and not str(file):
        wrong = "--file: is empty; give a text file or a folder of them"
    elif file is not None and dataset != "shakespeare":
        wrong = f"--file {file}: does not go with --dataset {dataset}; give one of the two"
    elif source is not None and (file is not None or dataset == "python"):
        other = "--file" if file else dataset
        wrong = f"--source {source}: goes with a corpus that has files, not with {other}"
    elif tokenizer not in ("char", "byte", "bpe", "gpt2"):
        wrong = f"--tokenizer {tokenizer}: is not one of char, byte, bpe, gpt2"
    elif vocab_size is not None and tokenizer != "bpe":
        wrong = f"--vocab_size {vocab_size}: goes with --tokenizer bpe only, not with {tokenizer}"
    elif vocab_size is not None and not 257 <= vocab_size <= 1_000_000:
        limits = "must be 257 (256 bytes and the end of text) to 1000000"
        wrong = f"--vocab_size {vocab_size}: {limits}"
    elif separator and file is None:
        wrong = f"--separator {separator!r}: goes with --file, a corpus has its own"
    elif separator and len(separator) > LONGEST_SEPARATOR:
        wrong = f"--separator: is longer than {LONGEST_SEPARATOR:,} characters"
    elif Path(data_dir).is_file():
        wrong = f"--data_dir {data_dir}: is a file; give a folder"
    else:
        return
    raise BadInput(wrong)


def find_files(
    dataset: str, file: str | None, source: str | None, data_dir: Path
) -> tuple[Corpus, list[tuple[str, Path]]]:
    """The corpus (for the user's own text, what stands for one) and its files as (split, path)."""
    if file is not None:
        return split_by_file(OWN_TEXT, find_own_texts(Path(file)))
    if dataset == "python":
        library = Path(sysconfig.get_path("stdlib"))
        texts, _ = find_texts(library, ".py", skip=NOT_THE_LIBRARY)
        return split_by_file(CORPORA[dataset], texts)
    corpus = CORPORA[dataset]
    files = [(file.split, find_file(dataset, file, source, data_dir)) for file in corpus.files]
    return corpus, files


def find_own_texts(path: Path) -> list[Path]:
    """The file itself, or the text files of a folder; says what it leaves out."""
    if not path.exists():
        raise BadInput(f"--file {path}: there is no such file or folder")
    if not path.is_dir():
        return [path]
    texts, left_out = find_texts(path, corpora=CORPORA)
    if left_out:
        print(describe(path, len(texts), left_out))
    if not texts:
        raise BadInput(f"{path}: there is no text file in this folder")
    return texts


def split_by_file(corpus: Corpus, paths: list[Path]) -> tuple[Corpus, list[tuple[str, Path]]]:
    """The files as (split, path) by the rule DOCUMENTS; a single file is cut by position."""
    if len(paths) == 1:
        return replace(corpus, rule=CHARACTERS), [("both", paths[0])]
    sizes = {path: path.stat().st_size for path in paths}
    tenth = sum(sizes.values()) / 10
    val = set(paths[9::10]) or {min(paths, key=lambda path: abs(sizes[path] - tenth))}
    return corpus, [("val" if path in val else "train", path) for path in paths]


def find_file(dataset: str, file: File, source: str | None, data_dir: Path) -> Path:
    """A file of a corpus: in --source, else where it is kept, else downloaded to there."""
    files = CORPORA[dataset].files
    if source is not None:
        folder = Path(source)
    elif dataset == "shakespeare":
        folder = EMBEDDED
    else:
        folder = data_dir / DOWNLOADS / dataset
    if folder.is_file() and len(files) == 1:  # --source may be the file itself
        return folder
    for name in (file.name, file.url.rpartition("/")[2] or file.name):
        for ending in ("", ".xz", ".gz", ".zip"):
            if (folder / (name + ending)).is_file():
                return folder / (name + ending)
    names = ", ".join(file.name for file in files)
    needed = f"the folder that holds {names} (or .xz, .gz, .zip of it)"
    if source is not None:
        raise BadInput(f"--source {source}: there is no {file.name} in it; give {needed}")
    if dataset == "shakespeare":
        raise BadInput(
            f"--dataset shakespeare: its text, {folder / file.name}, is missing; "
            f"install this project again, or run prepare_data.py --source with {needed}"
        )
    if not file.url:
        raise BadInput(
            f"--dataset {dataset}: cannot be downloaded; run prepare_data.py --source with {needed}"
        )
    return download(dataset, file, folder)


def download(dataset: str, file: File, folder: Path) -> Path:
    """Fetch a file of a corpus into folder: under its name only once size and sha256 are right.

    What has arrived is kept as .part beside it, from which a cut connection, or the next run, goes
    on. BadInput if it cannot be had.
    """
    path = folder / file.url.rpartition("/")[2]
    part = path.with_name(path.name + ".part")
    way_out = (
        f"put it at {folder / file.name} by hand, run prepare_data.py --source, "
        "or use the embedded --dataset shakespeare"
    )
    folder.mkdir(parents=True, exist_ok=True)
    problem = "nothing has arrived yet"
    while problem:
        size_before = size_of(part)
        problem = receive(file.url, part)
        if problem and size_of(part) <= size_before:  # no headway: give up
            raise BadInput(
                f"--dataset {dataset}: {file.url} could not be downloaded: {problem}; {way_out}"
            )
    try:
        size, sha256 = checksum(part)
    except BadInput:  # not even an archive
        size, sha256 = 0, "none"
    if (size, sha256) != (file.size, file.sha256):
        part.unlink()
        if size_before:  # perhaps a rest of something else was continued: once more, from the start
            return download(dataset, file, folder)
        got = f"{size:,} bytes with sha256 {sha256[:12]}..."
        right = f"{file.size:,} with {file.sha256[:12]}..."
        raise BadInput(
            f"--dataset {dataset}: {file.url} gave {got}, not {right}, and was removed; {way_out}"
        )
    rename(part, path)
    return path


def receive(url: str, part: Path) -> str:
    """Append to part what is missing in it of url; returns what went wrong, or ""."""
    start = size_of(part)
    headers = {"User-Agent": "prepare_data.py (Python urllib)"}
    if start:
        headers["Range"] = f"bytes={start}-"
    try:
        request = urllib.request.Request(url, headers=headers)
        with urllib.request.urlopen(request, timeout=30) as reply:
            if reply.status != 206:  # the server ignores Range and sends all of it
                start = 0
            received = start
            total = start + int(reply.headers.get("Content-Length") or 0)
            bar = progress_bar(total=total or None, initial=start, desc=part.name)
            with open(part, "ab" if start else "wb") as f, bar:
                while block := reply.read(1 << 16):
                    received += f.write(block)
                    bar.update(len(block))
        if received < total:
            return f"the connection was cut after {received:,} of {total:,} bytes"
        return ""
    except urllib.error.HTTPError as e:
        if e.code == 416 and start:  # nothing lies beyond what we have
            return ""
        return f"HTTP {e.code} {e.reason}"
    except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError) as e:
        return str(getattr(e, "reason", None) or e)


def size_of(path: Path) -> int:
    """Bytes of a file, 0 for none."""
    return path.stat().st_size if path.exists() else 0
