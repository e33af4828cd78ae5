"""What a small cache costs in words: grammar, and recall from the context, of trained models.

    python experiments/study/words.py --checkpoint KEPT --blimp blimp.jsonl.xz --data FOLDER

BLiMP (Warstadt et al. 2020) has 67,000 pairs of sentences, one of them wrong; a model is right
where it gives the good one, from its first word to its last, a higher probability.

The loss on the validation text is split as in "Zoology" (Arora et al. 2023): a token that ends a
pair of tokens which the window has had before can be recalled, by looking back to where the pair
was; the others have to be known. A pair that is frequent in the training text can be known, too:
those that it has at most ten times stand apart.

Checkpoints are what run.py keeps, a best.pt of train.py, or docs/models/mfa.js. What is measured is
appended to results/words.jsonl, and not measured again where the file's sha256 is there.
"""

import json
import lzma
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from mfa import GPT, at_least_float32, evaluating
from prepare_data import load
from support.cli import BadInput, run_command
from support.files import sha256_of
from support.machine import Machine, attention_kernels
from support.provenance import ROOT, provenance, read_jsonl
from support.run_folder import append_line, drop_cut_line, model_from
from support.shipped import open_checkpoint, path_of
from support.tokenizers import Tokenizer, start_of_text, tokenizer_from
from train import take, to_device

RESULTS = ROOT / "experiments" / "results" / "words.jsonl"
# Means over the 67 paradigms, in percent, from BLiMP's own repository; people: as published.
PUBLISHED = {
    "n-gram": 61.2, "LSTM": 69.8, "Transformer-XL": 69.6, "GPT-2": 83.0, "people": 88.6,
}  # fmt: skip
BLIMP_FIELDS = ("uid", "phenomenon", "good", "bad")
PARTS = ("new", "seen", "rare")  # see recall
RARE = 10  # times in the training text, at most
TOKENS = 16384  # at a time: their logits take half a GB at 8,192 tokens in the vocabulary


@dataclass
class Args:
    """Measure BLiMP and the loss on recalled and on other tokens."""

    checkpoint: tuple[Path, ...]  # files, or folders of .pt
    blimp: Path | None = None  # blimp.jsonl, or .xz of it: uid, phenomenon, good, bad a line
    data: Path | None = None  # prepared text, whose val.bin is read: run.py's, data/pg-books...
    device: str = "auto"  # auto, cpu, cuda ...
    results: Path = RESULTS  # file of the results


# --------------------------------------------------------------------------------------------------
# BLiMP


def token_losses(model: GPT, tokens: Tensor, targets: Tensor) -> Tensor:
    """(B, T + 1) twice -> (B, T), in nats; 0 where the target is -1."""
    logits = at_least_float32(model(tokens[:, :-1])[0])  # (B, T, vocab_size)
    return F.cross_entropy(logits.mT, targets[:, 1:], ignore_index=-1, reduction="none")


def windows(ids: Tensor, T: int, device: torch.device) -> Iterator[Tensor]:
    """The text ids (tokens,) in windows side by side, as many as TOKENS takes: (B, T + 1).

    Each begins with the last token of the one before.
    """
    n_window, rows = (len(ids) - 1) // T, max(1, TOKENS // T)
    for first in range(0, n_window, rows):
        starts = torch.arange(first, min(first + rows, n_window)) * T
        yield take(ids, starts, T + 1, device)


@torch.no_grad()
def log_probabilities(model: GPT, texts: list[list[int]], device: torch.device) -> Tensor:
    """Of each text's tokens after its first: (texts,), in nats.

    A text longer than the context goes on, as in GPT.generate, from the last half of it.
    """
    T, pieces = model.cfg.block_size, []  # (text, tokens, how many of them are scored already)
    for text, ids in enumerate(texts):
        start, end = 0, 1
        while end < len(ids):
            pieces.append((text, ids[start : start + T + 1], end - start))
            end = start + T + 1
            start = end - 1 - T // 2
    pieces.sort(key=lambda piece: len(piece[1]))  # little padding
    total = torch.zeros(len(texts), dtype=torch.float64)
    with evaluating(model):
        while pieces:
            width = len(pieces[-1][1])
            rows = max(1, TOKENS // width)
            batch, pieces = pieces[-rows:], pieces[:-rows]
            tokens = torch.zeros(len(batch), width, dtype=torch.long)
            targets = torch.full_like(tokens, -1)
            for row, (_, ids, scored) in enumerate(batch):
                tokens[row, : len(ids)] = torch.tensor(ids)  # what follows it no token sees
                targets[row, scored : len(ids)] = tokens[row, scored : len(ids)]
            losses = token_losses(model, tokens.to(device), targets.to(device))  # (B, width - 1)
            which = torch.tensor([text for text, _, _ in batch])
            total.index_add_(0, which, -losses.sum(1).double().cpu())
    return total


def read_blimp(path: Path) -> list[dict]:
    """BadInput if it is not BLiMP's lines."""
    try:
        data = path.read_bytes()
        data = lzma.decompress(data) if path.suffix == ".xz" else data
        pairs = [json.loads(line) for line in data.splitlines()]
        wrong = [n for n, pair in enumerate(pairs, 1) if not {*BLIMP_FIELDS} <= pair.keys()]
    except (lzma.LZMAError, ValueError, AttributeError) as e:
        raise BadInput(f"--blimp {path}: is not JSON lines or .xz of them ({e})") from None
    if wrong or not pairs:
        where = f"line {wrong[0]} lacks one of" if wrong else "is empty; its lines have"
        raise BadInput(f"--blimp {path}: {where} {', '.join(BLIMP_FIELDS)}")
    return pairs


def blimp(model: GPT, tokenizer: Tokenizer, pairs: list[dict], device: torch.device) -> dict:
    """{phenomenon: {uid: share of its pairs in which good is likelier than bad}}."""
    start = start_of_text(tokenizer)
    texts = [start + tokenizer.encode(pair[k]).tolist() for k in ("good", "bad") for pair in pairs]
    good, bad = log_probabilities(model, texts, device).chunk(2)  # (pairs,) each
    right, found = (good > bad).double(), defaultdict(dict)
    for uid, phenomenon in dict.fromkeys((pair["uid"], pair["phenomenon"]) for pair in pairs):
        of_uid = torch.tensor([pair["uid"] == uid for pair in pairs])
        found[phenomenon][uid] = right[of_uid].mean().item()
    return dict(found)


# --------------------------------------------------------------------------------------------------
# Recall and knowledge


def pairs_of(tokens: Tensor, n_vocab: int) -> Tensor:
    """Each token and the next as one number: (..., T + 1) -> (..., T)."""
    return tokens[..., :-1] * n_vocab + tokens[..., 1:]


def distances(pairs: Tensor) -> Tensor:
    """How far back each row has the same pair last, 0 if nowhere: (B, T) -> (B, T)."""
    ordered, place = pairs.sort(dim=1, stable=True)
    back = place.diff(dim=1) * (ordered.diff(dim=1) == 0)  # (B, T - 1)
    return torch.zeros_like(pairs).scatter(1, place[:, 1:], back)


def times_in(ids: Tensor, wanted: Tensor, n_vocab: int, device: torch.device) -> Tensor:
    """How often the text ids (tokens,) has each of the pairs wanted (K,), in order: (K,)."""
    count = torch.zeros_like(wanted)
    for first in range(0, len(ids) - 1, 1 << 24):
        length = min(1 << 24, len(ids) - 1 - first) + 1
        pairs = pairs_of(take(ids, torch.tensor([first]), length, device)[0], n_vocab)
        place = torch.searchsorted(wanted, pairs).clamp(max=len(wanted) - 1)
        count += torch.bincount(place[wanted[place] == pairs], minlength=len(wanted))
    return count


@torch.no_grad()
def recall(model: GPT, train_ids: Tensor, val_ids: Tensor, device: torch.device) -> dict:
    """Tokens and mean loss, over windows side by side, of the pairs that the window has had before
    (seen), of those of them that are rare in the training text (rare), and of the others (new).

    distance: [d, tokens, loss, rare tokens, rare loss] of pairs seen d to 2 d - 1 tokens ago.
    """
    T, n_vocab = model.cfg.block_size, model.cfg.vocab_size
    n_bin = T.bit_length() + 1
    text = take(val_ids, torch.zeros(1, dtype=torch.long), len(val_ids), device)[0]  # (tokens,)
    wanted = pairs_of(text, n_vocab).unique()  # (K,)
    rare = times_in(train_ids, wanted, n_vocab, device) <= RARE  # (K,)
    # By rare or not, and by distance: 0 for new, 1 + i for 2^i to 2^(i + 1) - 1.
    count, total = (torch.zeros(2 * n_bin, dtype=torch.float64) for _ in range(2))
    with evaluating(model):
        for tokens in windows(val_ids, T, device):  # (B, T + 1)
            pairs = pairs_of(tokens, n_vocab)  # (B, T)
            losses = token_losses(model, tokens, tokens).flatten()  # (B*T,)
            bins = distances(pairs).double().frexp().exponent.flatten()  # (B*T,): 1 + log2, or 0
            bins = bins + n_bin * rare[torch.searchsorted(wanted, pairs)].flatten()
            count += torch.bincount(bins, minlength=2 * n_bin).cpu()
            total += torch.bincount(bins, losses.double(), minlength=2 * n_bin).cpu()
    count, total = count.view(2, n_bin), total.view(2, n_bin)  # [rare or not, distance]

    def mean(*where) -> list:
        n = count[where].sum().item()
        return [int(n), total[where].sum().item() / n if n else None]

    both, is_rare, seen = slice(None), 1, slice(1, None)
    by = [[1 << i, *mean(both, i + 1), *mean(is_rare, i + 1)] for i in range(n_bin - 1)]
    parts = dict(new=mean(both, 0), seen=mean(both, seen), rare=mean(is_rare, seen))
    return dict(**parts, distance=[line for line in by if line[1]])


# --------------------------------------------------------------------------------------------------
# The results: a line of JSON for each checkpoint and measurement


def read(path: Path) -> dict[tuple[str, str], dict]:
    """By the sha256 of the checkpoint and by what was measured: blimp or recall."""
    rows = read_jsonl(path, "words.py", lambda row: (row["sha256"], row["what"], row["found"]))
    return {(row["sha256"], row["what"]): row for row in rows}


def mean_of(by_phenomenon: dict[str, dict[str, float]]) -> float:
    """Over all paradigms."""
    shares = [share for by in by_phenomenon.values() for share in by.values()]
    return sum(shares) / len(shares)


def checkpoints_in(paths: tuple[Path, ...]) -> list[Path]:
    """The files, and those of the folders. BadInput if a folder has none."""
    found = []
    for path in paths:
        found += sorted(path.glob("*.pt")) if path.is_dir() else [path]
        if path.is_dir() and path not in {file.parent for file in found}:
            raise BadInput(f"--checkpoint {path}: has no .pt file; run.py --keep makes some")
    return found


def describe(what: str, found: dict) -> str:
    if what == "blimp":
        return f"BLiMP {100 * mean_of(found):.1f}%"
    return ", ".join(f"{name} {found[name][1]:.4f}" for name in PARTS if found[name][0])


def main(args: Args) -> None:
    if not (args.blimp or args.data):
        raise BadInput("--blimp or --data: give one of them, or both, or nothing is measured")
    done = read(args.results)
    pairs = read_blimp(args.blimp) if args.blimp else []
    if args.data and not (args.data / "meta.json").is_file():
        raise BadInput(f"--data {args.data}: has no meta.json; give a folder of prepare_data.py")
    *texts, meta = load(args.data) if args.data else (None,)
    args.results.parent.mkdir(parents=True, exist_ok=True)
    drop_cut_line(args.results)
    with Machine(args.device, "float32") as machine:
        device = machine.device
        texts = [to_device(ids, device) for ids in texts]
        for path in checkpoints_in(args.checkpoint):
            path, checkpoint = path_of(path), open_checkpoint(path)
            if meta and meta["tokenizer"] != checkpoint["tokenizer"]:
                raise BadInput(f"--data {args.data}: has other tokens than {path} was trained on")
            tokenizer = tokenizer_from(checkpoint["tokenizer"], path)
            model = model_from(checkpoint, path, device)
            which = dict(checkpoint=path.name, sha256=sha256_of(path))
            which |= {k: checkpoint.get(k) for k in ("config", "step", "run")}
            for what in ["blimp"] * bool(pairs) + ["recall"] * bool(meta):
                row = done.get((which["sha256"], what))
                if row is None:
                    with attention_kernels(device, decoding=True):
                        if what == "blimp":
                            found = blimp(model, tokenizer, pairs, device)
                        else:
                            found = recall(model, *texts, device)
                    row = dict(**which, what=what, found=found, **provenance(device))
                    append_line(args.results, row)
                print(f"{path.name}: {describe(what, row['found'])}", flush=True)


if __name__ == "__main__":
    run_command(main, Args)
