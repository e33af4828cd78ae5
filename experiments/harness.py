"""BLiMP as tasks of EleutherAI's lm-evaluation-harness, from a file on this machine.

    python experiments/export.py --checkpoint out/run/best.pt --to out/hf
    python experiments/harness.py --file blimp.jsonl.xz --to out/blimp
    lm_eval --model hf --model_args pretrained=out/hf,trust_remote_code=True \\
        --include_path out/blimp --tasks blimp_local --batch_size 64

The file has a pair of sentences a line, {"uid": ..., "good": ..., "bad": ...}; each uid becomes a
task, and blimp_local their mean. A pair is right if the good sentence is the likelier, each a
document of its own. The harness's own task blimp, a download, has a space before each sentence.

Of a model of characters add prefix_token_id=N, the id of its line's end, to --model_args: it has no
token that ends a text, without which the harness generates nothing. Tasks that generate take
--batch_size 1, since a model that brings its code takes prompts of one length.
"""

import json
import lzma
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from experiments.export import require_new, write_json
from support.cli import BadInput, run_command

GROUP = "blimp_local"


@dataclass
class Args:
    """Write BLiMP as tasks of lm-evaluation-harness."""

    file: Path
    """blimp.jsonl or blimp.jsonl.xz: a pair of sentences a line."""
    to: Path
    """The folder to write: new, or empty."""


def read_pairs(path: Path) -> dict[str, list[dict]]:
    """uid -> its pairs, each with good and bad. BadInput for a file of something else."""
    pairs = defaultdict(list)
    with (lzma.open if path.suffix == ".xz" else open)(path, "rt", encoding="utf-8") as file:
        try:
            for line in file:
                row = json.loads(line)
                pairs[row["uid"]].append({kind: row[kind] for kind in ("good", "bad")})
        except (ValueError, KeyError, TypeError, EOFError, lzma.LZMAError) as e:
            what = f"is not a file of pairs ({type(e).__name__})"
            raise BadInput(f"--file {path} {what}: each line is JSON with uid, good, bad") from e
    if not pairs:
        raise BadInput(f"--file {path} is empty: give a pair of sentences a line")
    return pairs


def task(uid: str, data: Path) -> dict:
    """The harness's description of a task: the likelihoods of two whole sentences."""
    return dict(
        task=f"{GROUP}_{uid}", output_type="multiple_choice", num_fewshot=0, test_split="test",
        dataset_path="json", dataset_kwargs=dict(data_files=dict(test=str(data))),
        doc_to_text="", doc_to_choice="{{[good, bad]}}", doc_to_target=0, target_delimiter="",
        metric_list=[dict(metric="acc", aggregation="mean", higher_is_better=True)],
    )  # fmt: skip


def write_tasks(pairs: dict[str, list[dict]], folder: Path) -> None:
    """Of each uid its pairs and its task; and the group. A .yaml file may hold JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    for uid, rows in pairs.items():
        data = folder.resolve() / f"{uid}.jsonl"
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        data.write_text(lines, encoding="utf-8")
        write_json(folder / f"{uid}.yaml", task(uid, data))
    mean = dict(metric="acc", aggregation="mean", weight_by_size=False)
    tasks = [f"{GROUP}_{uid}" for uid in pairs]
    write_json(folder / "group.yaml", dict(group=GROUP, task=tasks, aggregate_metric_list=[mean]))


def main(args: Args) -> None:
    require_new(args.to)
    pairs = read_pairs(args.file)
    write_tasks(pairs, args.to)
    n = sum(len(rows) for rows in pairs.values())
    print(f"{args.to} holds {n:,} pairs in {len(pairs)} tasks:")
    print(f"    lm_eval --model hf --model_args pretrained=FOLDER --include_path {args.to} \\")
    print(f"        --tasks {GROUP} --batch_size 64")


if __name__ == "__main__":
    run_command(main, Args)
