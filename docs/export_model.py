"""Put a trained model into the page: python docs/export_model.py out/shipped-mfa/best.pt

Writes docs/models/<attn>.js, which docs/model.js runs in a browser and sample.py on a machine
(--checkpoint shipped-<attn>). A weight takes 8 bits; the loss moves by less than 0.005, which
tests/test_live.py measures. The three models of the page come from these commands, for each of
mha, mfa and mfa_kr in the place of mfa:

    python train.py --attn mfa --optimizer muon --learning_rate 1e-2 --batch_size 32 \\
        --max_iters 700 --seed 1337 --out out/shipped-mfa
    python docs/export_model.py out/shipped-mfa/best.pt
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro

from mfa import Config
from support.cli import BadInput, run_command
from support.files import write_atomically
from support.run_folder import load_checkpoint, model_from
from support.shipped import FOLDER, PREFIX, pack

LARGEST = 1_500_000  # bytes of a file: a page with three should open on a phone
ATTENTIONS = ("mha", "mfa", "mfa_kr")
ONLY = dict(  # what docs/model.js does; its other fields may be anything
    pos="rope", rope_fraction=1.0, qk_norm=False, latent_norm=False, tied=True, n_expert=0,
    key_reuse="gated", key_reuse_rope="pre",
)  # fmt: skip
RECIPE = "optimizer learning_rate batch_size max_iters seed".split()


@dataclass
class Args:
    """Put a trained model into the page."""

    checkpoint: Annotated[Path, tyro.conf.Positional]
    """A best.pt of train.py."""
    folder: Path = FOLDER
    """Where the script file goes."""


def check(cfg: Config, tokenizer: dict, path: Path) -> None:
    """BadInput for a model that docs/model.js cannot run."""
    if cfg.attn not in ATTENTIONS:
        raise BadInput(f"{path} is of attn {cfg.attn}: the page runs {', '.join(ATTENTIONS)}")
    for name, value in ONLY.items():
        if getattr(cfg, name) != value:
            got = getattr(cfg, name)
            raise BadInput(f"{path} has {name} {got!r}: the page runs {name} {value!r} alone")
    if tokenizer.get("kind") != "char":
        raise BadInput(f"{path} has another tokenizer: the page reads characters, --tokenizer char")


def script(ckpt: dict, path: Path) -> str:
    """The file's text: a line for each field, and for each weight."""
    model = model_from(ckpt, path, torch.device("cpu"))
    cfg = model.cfg
    check(cfg, ckpt["tokenizer"], path)
    names = "vocab_size block_size n_layer dim head_dim rope_base norm_eps".split()
    config = {name: getattr(cfg, name) for name in names}
    config |= dict(attn=cfg.attn, n_head=cfg.heads, latent_dim=cfg.latent, q_rank=cfg.query_rank)
    config |= dict(ffn_dim=cfg.ffn)
    recipe = " ".join(f"--{name} {ckpt['args'][name]}" for name in RECIPE if name in ckpt["args"])
    fields = dict(
        config=config,
        tokenizer=ckpt["tokenizer"],
        step=ckpt["step"],
        best_loss=ckpt["best_loss"],
        command=f"python train.py --attn {cfg.attn} {recipe}".strip(),
    )
    lines = [f'"{name}": {json.dumps(value)},' for name, value in fields.items()]
    weights = {name: pack(p.detach()) for name, p in model.named_parameters()}  # the tied head once
    rows = ",\n".join(f'"{name}": {json.dumps(packed)}' for name, packed in weights.items())
    head = f"// Made by docs/export_model.py; read by docs/model.js and support/shipped.py.\n{OPEN}"
    return f"{head.format(cfg.attn)}\n" + "\n".join([*lines, '"weights": {']) + f"\n{rows}\n}}}};\n"


OPEN = "(globalThis.MODELS ??= {{}}).{} = {{"


def main(args: Args) -> None:
    ckpt = load_checkpoint(args.checkpoint)
    text = script(ckpt, args.checkpoint)
    size = len(text.encode())
    if size > LARGEST:
        what = f"would take {size / 1e6:.1f} MB in the page, the limit is {LARGEST / 1e6:.1f}"
        raise BadInput(f"{args.checkpoint} {what}: train the tiny preset")
    args.folder.mkdir(parents=True, exist_ok=True)
    attn = ckpt["config"]["attn"]
    path = args.folder / f"{attn}.js"
    write_atomically(path, lambda file: file.write(text.encode()))
    print(f"{path}: {size / 1e6:.2f} MB; python sample.py --checkpoint {PREFIX}{attn} reads it too")


if __name__ == "__main__":
    run_command(main, Args)
