"""Our tokenizers as files of the library `tokenizers`, and back.

Ids and text stay the same: tests/test_export.py compares them. What is otherwise usual there is
switched off: nothing is put before or behind a text, and "<|endoftext|>" in one is ordinary text.
"""

import json
from base64 import b64encode
from pathlib import Path

from support.cli import BadInput
from support.tokenizers import (
    EOT,
    MAX_RUN,
    BPETokenizer,
    CharTokenizer,
    Tokenizer,
    tokenizer_from,
)

TEXT = "[\\s\\S]"  # any character, a line's end too
CLASSES = r"\s", r"[\p{L}\p{M}]", r"\p{N}", r"[^\s\p{L}\p{M}\p{N}]"  # of runs that are cut

PARTS = "added_tokens normalizer pre_tokenizer decoder model".split()


def save_tokenizer(tokenizer: Tokenizer, folder: Path, context: int) -> None:
    """Writes tokenizer.json and tokenizer_config.json. BadInput for what they cannot express."""
    end = {} if tokenizer.eot is None else dict(bos_token=EOT, eos_token=EOT)
    settings = dict(
        tokenizer_class="PreTrainedTokenizerFast", model_max_length=context,
        clean_up_tokenization_spaces=False, split_special_tokens=True, **end,
    )  # fmt: skip
    backend(tokenizer).save(str(folder / "tokenizer.json"))
    text = json.dumps(settings, indent=2)
    (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")


def backend(tokenizer: Tokenizer):
    """A tokenizers.Tokenizer with the ids of ours."""
    if isinstance(tokenizer, CharTokenizer):
        return of_characters(tokenizer.characters)
    if isinstance(tokenizer, BPETokenizer):
        return of_bytes(tokenizer.tokens, tokenizer.pattern)
    return of_bytes([bytes([b]) for b in range(256)], None)


def of_characters(characters: str):
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    lonely = [c for c in characters if "\ud800" <= c <= "\udfff"]
    if lonely:
        what = f"character U+{ord(lonely[0]):04X} of its vocabulary is half of a pair"
        raise BadInput(f"the tokenizer cannot be exported: {what}; train on text without it")
    # Without a token for unknown characters these are an error, as they are for us.
    made = Tokenizer(models.WordLevel({c: i for i, c in enumerate(characters)}))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(TEXT), "isolated")
    made.decoder = decoders.Fuse()
    return made


def of_bytes(tokens: list[bytes], pattern: str | None):
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    written = [as_letters(token) for token in tokens]
    vocabulary = {letters: i for i, letters in enumerate(written)}
    model = models.BPE(vocabulary, merges_of(written, vocabulary), ignore_merges=True)
    made = Tokenizer(model)
    chunks = []
    if pattern is not None:
        long = "|".join(f"{kind}{{{MAX_RUN}}}(?={kind})" for kind in CLASSES)
        chunks.append(pre_tokenizers.Split(Regex(long), "merged_with_previous"))  # cut_long_runs
        chunks.append(pre_tokenizers.Split(Regex(pattern), "isolated"))
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.pre_tokenizer = pre_tokenizers.Sequence([*chunks, letters])
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(EOT, special=True, normalized=False)])
    return made


def merges_of(written: list[str], vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """Every way to make each token of two: tiktoken merges whatever gives a token, by its rank."""
    pairs = []
    for token in written:
        halves = [(token[:k], token[k:]) for k in range(1, len(token))]
        pairs += [half for half in halves if half[0] in vocabulary and half[1] in vocabulary]
    return pairs


def byte_letters() -> list[str]:
    """The letter by which the library writes each byte: itself where it can be seen."""
    seen = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(b) if b in seen else chr(next(others)) for b in range(256)]


LETTERS = byte_letters()
BYTES = {letter: byte for byte, letter in enumerate(LETTERS)}


def as_letters(token: bytes) -> str:
    return "".join(LETTERS[b] for b in token)


def read_tokenizer(folder: Path) -> dict | None:
    """The spec of the tokenizer that save_tokenizer wrote there; None if it is another."""
    path = folder / "tokenizer.json"
    try:
        file = json.loads(path.read_text(encoding="utf-8"))
        spec = described(file)
        same = json.loads(backend(tokenizer_from(spec)).to_str())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # BadInput is a ValueError
    return spec if all(same[part] == file.get(part) for part in PARTS) else None


def described(file: dict) -> dict:
    """What the spec would be if tokenizer.json were of one of ours."""
    ids = file["model"]["vocab"]
    ordered = sorted(ids, key=ids.get)
    if file["model"]["type"] == "WordLevel":
        return {"kind": "char", "characters": "".join(ordered)}
    splits = file["pre_tokenizer"]["pretokenizers"][:-1]
    if not splits:
        return {"kind": "byte"}
    tokens = [bytes(BYTES[letter] for letter in letters) for letters in ordered]
    in_base64 = " ".join(b64encode(token).decode("ascii") for token in tokens)
    return {"kind": "bpe", "pattern": splits[-1]["pattern"]["Regex"], "tokens": in_base64}
