"""A Llama's weights in our GPT: what a notebook asks of W_c can be asked of a model that exists.

    python experiments/import_llama.py --folder FOLDER --out out/llama

FOLDER has config.json and safetensors, as Llama, Mistral without its window, and Qwen3 publish
them: MHA, GQA or MQA. Nothing of what they compute is changed; a model that does anything else is
refused. out/llama/best.pt is a checkpoint of ours. The tokenizer comes along if it is one that
export.py wrote. If not, sample.py and --init_from refuse the checkpoint, and ids are made by
transformers' AutoTokenizer.

    import torch
    from pathlib import Path
    from support.run_folder import load_checkpoint, model_from

    path = Path("out/llama/best.pt")
    model = model_from(load_checkpoint(path), path, torch.device("cpu"))
    attn = model.blocks[0].attn
    W = attn.qk_circuit()  # W_c of every head at distance 0: (n_head, H, H)
    print(torch.linalg.svdvals(W)[:, : model.cfg.head_dim])  # its rank is head_dim: the rest are 0
    print(torch.linalg.svdvals(attn.k.weight))  # of all keys together
"""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from experiments.export import require_extra
from experiments.hub.layouts import HEADS, QK_NORM, names
from experiments.hub.tokenizer import read_tokenizer
from mfa import GPT, Config
from support.cli import BadInput, run_command
from support.files import write_atomically
from support.run_folder import FORMAT, new_run

# What a config.json may say, or leave out: anything else is something that our model lacks.
ONLY = dict(
    model_type=("llama", "mistral", "qwen3"), hidden_act=("silu", None),
    attention_bias=(False, None), mlp_bias=(False, None), partial_rotary_factor=(1, None),
    rope_interleaved=(False, None), quantization_config=(None,),
)  # fmt: skip
ROPE = dict(rope_type=("default", None), type=("default", None), partial_rotary_factor=(1, None))


@dataclass
class Args:
    """Make a checkpoint of ours from a Llama's weights."""

    folder: Path
    """config.json and model.safetensors, or several with model.safetensors.index.json."""
    out: Path
    """Folder of the checkpoint."""


def require_only(found: dict, allowed: dict, path: Path) -> None:
    for name, values in allowed.items():
        got = found.get(name)
        if got not in values:
            known = " or ".join(str(value) for value in values if value is not None) or "none"
            raise BadInput(f"{path} has {name} {got!r}: our model has {known} alone")


def read_json(path: Path) -> dict:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInput(f"{path} is not there: give the folder of a Llama") from None
    except ValueError as e:
        raise BadInput(f"{path} is not JSON: {e}") from e
    if not isinstance(found, dict):
        raise BadInput(f"{path} is not a config: give the folder of a Llama")
    return found


def config_from(found: dict, path: Path) -> Config:
    """Our Config of a Llama's config.json, as transformers 5 or an older version writes it."""
    require_only(found, ONLY, path)
    rope = found.get("rope_parameters") or found.get("rope_scaling") or {}
    require_only(rope, ROPE, path)
    window = found.get("sliding_window")
    if window is not None and found.get("use_sliding_window", True):
        raise BadInput(f"{path} has sliding_window {window}: our model sees the whole context")
    try:
        n, dim = found["num_attention_heads"], found["hidden_size"]
        g = found.get("num_key_value_heads") or n
        cfg = Config(
            attn="mha" if g == n else "mqa" if g == 1 else "gqa", n_head=n, n_kv_head=g,
            head_dim=found.get("head_dim") or dim // n, dim=dim, n_layer=found["num_hidden_layers"],
            vocab_size=found["vocab_size"], ffn_dim=found["intermediate_size"],
            block_size=found["max_position_embeddings"], norm_eps=found.get("rms_norm_eps", 1e-6),
            rope_base=float(rope.get("rope_theta") or found.get("rope_theta") or 10_000.0),
            qk_norm=found["model_type"] == "qwen3", tied=found.get("tie_word_embeddings", False),
        )  # fmt: skip
    except KeyError as e:
        raise BadInput(f"{path} has no {e}: it is not a Llama's") from e
    except (ValueError, TypeError) as e:
        raise BadInput(f"{path} makes no model: {e}") from e
    return cfg


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All weights of the folder's safetensors, in float32."""
    from safetensors import SafetensorError, safe_open

    index = folder / "model.safetensors.index.json"
    parts = ["model.safetensors"]
    if index.is_file():
        parts = sorted(set(read_json(index).get("weight_map", {}).values()))
    weights = {}
    for part in parts:
        path = folder / part
        if not path.is_file():
            raise BadInput(f"{path} is not there: give a folder with all its safetensors")
        try:
            with safe_open(path, framework="pt") as file:
                weights |= {name: file.get_tensor(name).float() for name in file.keys()}
        except SafetensorError as e:
            raise BadInput(f"{path} is damaged: {e}") from e
    return weights


def state_from(theirs: dict[str, Tensor], cfg: Config, folder: Path) -> dict[str, Tensor]:
    """Our state dict. BadInput for a weight too many, too few, or of another shape."""
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in GPT(cfg).state_dict().items()}
    wanted = names(cfg.n_layer, HEADS | QK_NORM if cfg.qk_norm else HEADS)
    if cfg.tied:
        theirs["lm_head.weight"] = theirs.get("model.embed_tokens.weight")
    known = {*wanted.values()}
    extra = [name for name in theirs if name not in known and not name.endswith("inv_freq")]
    if extra:
        raise BadInput(f"{folder} has {extra[0]}, for which our model has no place")
    for ours, name in wanted.items():
        if theirs.get(name) is None:
            raise BadInput(f"{folder} has no {name}: it is not whole, or not a Llama's")
        if theirs[name].shape != shapes[ours]:
            got, expected = tuple(theirs[name].shape), tuple(shapes[ours])
            raise BadInput(f"{folder} has {name} of {got}, where its config.json means {expected}")
    return {ours: theirs[name] for ours, name in wanted.items()}


def main(args: Args) -> None:
    require_extra("safetensors", "tokenizers")
    run = new_run(args.out)
    cfg = config_from(read_json(args.folder / "config.json"), args.folder / "config.json")
    state = state_from(read_weights(args.folder), cfg, args.folder)
    tokenizer = read_tokenizer(args.folder)
    ckpt = dict(
        format=FORMAT, model=state, config=asdict(cfg), tokenizer=tokenizer or {"kind": "another"},
        optimizer={}, scaler={}, rng=torch.get_rng_state(), data={}, args={},
        step=0, best_loss=math.nan, seconds=0.0,
    )  # fmt: skip
    args.out.mkdir(parents=True, exist_ok=True)
    write_atomically(run.best, lambda file: torch.save(ckpt, file))
    n = sum(p.numel() for name, p in state.items() if not (cfg.tied and name == "head.weight"))
    print(f"{run.best}: {cfg.attn}, {cfg.n_layer} layers, {n:,} parameters, float32")
    if tokenizer is None:
        what = "sample.py cannot read text for this model: its tokenizer is not one of ours"
        print(f"{what}; make ids with transformers' AutoTokenizer, and call model.generate(ids)")


if __name__ == "__main__":
    run_command(main, Args)
