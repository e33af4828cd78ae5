"""A trained model as a folder that transformers loads.

    python experiments/export.py --checkpoint out/tiny-mfa_kr/best.pt --to out/hf

    AutoModelForCausalLM.from_pretrained("out/hf", trust_remote_code=True)
    AutoTokenizer.from_pretrained("out/hf", trust_remote_code=True)

MHA, GQA and MQA become a Llama, and MLA with --joint_kv and --latent_norm a DeepSeek-V2, which
transformers knows by itself, so that they need no trust_remote_code. Everything else comes with
its code: hub/modeling_mfa.py beside a copy of mfa.py. It refuses more than block_size tokens, where
our generate() starts anew from the last half, and prompts of several lengths in one batch.
"""

import importlib.util
import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

import mfa
from experiments.hub.layouts import exported
from experiments.hub.tokenizer import save_tokenizer
from mfa import GPT
from support.cli import BadInput, run_command
from support.run_folder import model_from
from support.shipped import open_checkpoint
from support.tokenizers import Tokenizer, tokenizer_from

CODE = Path(__file__).parent / "hub" / "modeling_mfa.py"


@dataclass
class Args:
    """Write a trained model as a folder that transformers loads."""

    checkpoint: Path
    """A best.pt or latest.pt of train.py, or shipped-mfa_kr, shipped-mfa, shipped-mha."""
    to: Path
    """The folder to write: new, or empty."""


def require_extra(*modules: str) -> None:
    """BadInput if a library of the extra `hub` is not installed."""
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        what = f"this needs {' and '.join(missing)}, which this environment lacks"
        raise BadInput(f'{what}: pip install -e ".[hub]"')


def require_new(folder: Path) -> None:
    if folder.is_file():
        raise BadInput(f"--to {folder} is a file: give a folder")
    if folder.is_dir() and any(folder.iterdir()):
        raise BadInput(f"--to {folder} holds something already: give a new folder")


def export(model: GPT, tokenizer: Tokenizer, folder: Path) -> dict:
    """Writes the folder, whole or not at all. Returns its config.json."""
    from safetensors.torch import save_file

    config, weights = exported(model, tokenizer.eot)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".export-") as scratch:
        part = Path(scratch) / folder.name
        part.mkdir()
        write_json(part / "config.json", config)
        ends = {name: config[name] for name in ("bos_token_id", "eos_token_id")}
        write_json(part / "generation_config.json", ends)
        save_file(weights, str(part / "model.safetensors"), metadata={"format": "pt"})
        save_tokenizer(tokenizer, part, model.cfg.block_size)
        if "auto_map" in config:
            shutil.copy(CODE, part / CODE.name)
            shutil.copy(mfa.__file__, part / "mfa.py")
        if folder.is_dir():  # empty
            folder.rmdir()
        part.rename(folder)
    return config


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def main(args: Args) -> None:
    require_extra("safetensors", "tokenizers")
    require_new(args.to)
    ckpt = open_checkpoint(args.checkpoint)
    model = model_from(ckpt, args.checkpoint, torch.device("cpu"))
    attn = type(model.blocks[0].attn)
    if attn.__module__ != mfa.__name__:
        what = f"{args.checkpoint} has {attn.__name__}, an attention of a plug-in"
        raise BadInput(f"{what}: only those of mfa.py are exported; put the class there first")
    config = export(model, tokenizer_from(ckpt["tokenizer"], args.checkpoint), args.to)
    trust = ", trust_remote_code=True" if "auto_map" in config else ""
    print(f"{args.to} holds a {config['architectures'][0]} and its tokenizer:")
    print(f'    AutoModelForCausalLM.from_pretrained("{args.to}"{trust})')
    print(f'    AutoTokenizer.from_pretrained("{args.to}"{trust})')


if __name__ == "__main__":
    run_command(main, Args)
