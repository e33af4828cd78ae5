"""A trained MHA, GQA or MQA as GQA, MQA, MLA, MFA or MFA-KR, by truncated SVD; then train it on.

    python experiments/convert.py --checkpoint out/tiny-mha/best.pt --to mfa --out out/converted
    python train.py --init_from out/converted/best.pt --out out/converted-mfa --max_iters 200

paper/truncation.py has the mathematics, for one layer. Here the frequencies that go on rotating are
chosen, the same for all layers: a ladder, every k-th of the source's, counted from the fastest,
with k such that they keep most.

Exact: without rotary positions, if the latent is as wide as all keys (and values, where they share
it), or GQA of as many heads. All else is lost: what the cut leaves out, and the rotation of the
frequencies that stop. FFN, norms and embedding are copied, so the parameters are not MHA's number.
MHA2MLA (arXiv:2502.14837) and TransMLA (arXiv:2502.07864) convert to MLA in this spirit.
"""

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from experiments.paper.truncation import Layer, Seen, see
from mfa import ATTENTION, GPT, Config, cache_bytes, require
from prepare_data import folder_for, load
from support.cli import BadInput, run_command
from support.files import write_atomically
from support.machine import Machine
from support.progress import count
from support.run_folder import FORMAT, load_checkpoint, model_from, new_run, shell_quoted
from train import evaluate, take, to_device

TARGETS = ("gqa", "mqa", "mla", "mfa", "mfa_kr")
EVAL_TOKENS = 1 << 17  # validation tokens

# --------------------------------------------------------------------------------------------------
# The model


def target(cfg: Config, attn: str, **fields) -> Config:
    """The Config of what cfg's model becomes. Fields as in Config; those not given:

    heads are cfg's; latent_dim dim // 8; q_rank all that the queries need; half of a key is
    rotated, or of MLA's d_r = d / 2. ValueError if there is none.
    """
    kinds = ("mha", *TARGETS[:2])
    require(cfg.attn in kinds, f"only mha, gqa and mqa are converted, not {cfg.attn}")
    require(attn in TARGETS, f"must become one of {', '.join(TARGETS)}, not {attn}")
    require(not cfg.qk_norm, "qk_norm is no product of matrices: such a model cannot be converted")
    n = cfg.heads
    own = dict(attn=attn, n_head=n, latent_dim=0, compress_query=False, latent_norm=False)
    own |= dict(ffn_dim=cfg.ffn, rope_dim=cfg.head_dim // 2) | fields
    C = own["latent_dim"] or cfg.dim // 8
    rotated = int(cfg.rope_fraction * cfg.head_dim)
    if attn.startswith("mfa"):
        own["q_rank"] = own.get("q_rank") or min(cfg.dim, own["n_head"] * C)
        own.setdefault("rope_fraction", 2 * max(1, min(rotated // 4, C // 4)) / C)
    own.setdefault("rope_fraction", 2 * max(1, rotated // 4) / cfg.head_dim)
    new = replace(cfg, **own)
    g, heads = ATTENTION[cfg.attn].kv_heads(cfg), new.heads
    more = attn.startswith("mfa") and cfg.pos != "alibi"
    what = f"n_head must be {n}, as in the checkpoint{', or more' if more else ''}, not {heads}"
    require(heads == n or more and heads > n, what)
    if attn == "gqa":
        fits = g % new.n_kv_head == 0
        require(fits, f"n_kv_head must divide the checkpoint's {g}, not be {new.n_kv_head}")
    if cfg.pos == "rope":
        flag, wanted = "rope_dim" if attn == "mla" else "rope_fraction", rotated_width(new)
        what = f"{flag} rotates {wanted} dimensions, and the checkpoint rotates {rotated}"
        require(wanted <= rotated, f"{what}: lower it")
    return new


def rotated_width(cfg: Config) -> int:
    """Dimensions of a key that are rotated."""
    if cfg.pos != "rope":
        return 0
    kind = ATTENTION[cfg.attn]
    width = cfg.latent if kind.rotary == "latent_dim" else getattr(cfg, kind.rotary)
    return int(kind.rotated_width(cfg, width))


def choose_ladder(gains: list[float], slots: int) -> int:
    """k such that frequencies 0, k, 2k ... (slots of them) gain most."""
    fit = [k for k in range(1, len(gains) + 1) if (slots - 1) * k < len(gains)]
    return max(fit, key=lambda k: sum(gains[::k][:slots]))


@torch.no_grad()
def convert(model: GPT, cfg: Config, seen: list[Seen] | None = None) -> GPT:
    """model as a model of cfg, which is a target() of its own. seen: by see(), for each layer."""
    attentions = [block.attn for block in model.blocks]
    layers = [Layer(a, seen[a.layer] if seen else None) for a in attentions]
    slots, turning = rotated_width(cfg) // 2, []
    if slots:
        g, frequencies = len(layers[0].K), range(len(layers[0].pairs))
        groups = ATTENTION[cfg.attn].kv_heads(cfg) if cfg.attn in ("gqa", "mqa") else 1
        starts = range(0, g, g // groups)
        gains = [
            sum(a.share_pair(slice(at, at + g // groups), f)[2] for a in layers for at in starts)
            for f in frequencies
        ]
        k = choose_ladder(gains, slots)
        turning = list(frequencies[::k][:slots])
        base = model.cfg.rope_base ** (k * slots / len(frequencies))
        cfg = replace(cfg, rope_base=max(base, 1.0001))
    new = GPT(cfg).to(next(model.parameters()))
    kept = {name: p for name, p in model.state_dict().items() if ".attn." not in name}
    new.load_state_dict(kept, strict=False)
    for old, layer, block in zip(attentions, layers, new.blocks, strict=True):
        block.attn.load_state_dict(layer.convert(cfg, old.layer, turning).state_dict())
    return new.train(model.training)


# --------------------------------------------------------------------------------------------------
# The command


@dataclass
class Args:
    """Convert a trained MHA, GQA or MQA into another attention, by truncated SVD."""

    checkpoint: Path  # best.pt of a run of train.py
    to: Literal["gqa", "mqa", "mla", "mfa", "mfa_kr"]  # what it becomes
    out: Path  # new folder for best.pt, which train.py --init_from and sample.py take
    n_kv_head: int = 2  # gqa: key/value heads
    latent_dim: int = 0  # C of mla, mfa and mfa_kr; 0: dim // 8
    joint_kv: bool = True  # mla: one latent for keys and values
    key_reuse_rope: Literal["pre", "post", "inverse"] = "pre"  # mfa_kr
    q_rank: int = 0  # mfa, mfa_kr: rank of the query; 0: all that it needs, so that it is exact
    n_head: int = 0  # mfa, mfa_kr: heads, where more than the checkpoint's; the rest begins silent
    rope_fraction: float | None = None  # rotated share of a key; default: half as much as now
    rope_dim: int | None = None  # mla: width of the rotary key; default: half of head_dim
    look_at: int = 16384  # tokens of the checkpoint's own training text to look at; 0: none


def own_text(ckpt: dict) -> tuple[Tensor, Tensor] | None:
    """The ids that the checkpoint was trained and validated on, where they are still there."""
    args, spec = ckpt["args"], ckpt["tokenizer"]
    for tokenizer in (args["tokenizer"], spec):
        size = args["model"]["vocab_size"] or None
        folder = folder_for(args["dataset"], tokenizer, size, args["file"], args["data_dir"])
        if folder.is_dir():
            *ids, meta = load(folder)
            if meta["tokenizer"] == spec:
                return tuple(to_device(part, torch.device("cpu")) for part in ids)
    return None


def main(args: Args) -> None:
    ckpt = load_checkpoint(args.checkpoint)
    best = new_run(args.out).best
    with Machine("cpu") as machine:
        model = model_from(ckpt, args.checkpoint, machine.device)
        fields = dict(latent_dim=args.latent_dim, key_reuse_rope=args.key_reuse_rope)
        fields |= dict(n_kv_head=args.n_kv_head, joint_kv=args.joint_kv)
        optional = ("q_rank", "n_head", "rope_fraction", "rope_dim")
        fields |= {name: getattr(args, name) for name in optional if getattr(args, name)}
        try:
            cfg = target(model.cfg, args.to, **fields)
        except ValueError as e:
            raise BadInput(f"--to {args.to}: {e}") from e
        text, seen, losses = own_text(ckpt), None, [math.inf] * 2
        if text and args.look_at:
            T = cfg.block_size
            starts = torch.linspace(0, len(text[0]) - T, max(1, args.look_at // T)).long()
            seen = see(model, take(text[0], starts, T, machine.device))
        torch.manual_seed(0)  # of what begins at random
        new = convert(model, cfg, seen)
        if text:
            losses = [evaluate(m, text[1][: EVAL_TOKENS + 1], machine) for m in (model, new)]
    state = ckpt | dict(
        format=FORMAT, model=new.state_dict(), optimizer={}, scaler={}, step=0, tokens=0,
        seconds=0.0, best_loss=losses[1], config=asdict(new.cfg),
        args=ckpt["args"] | dict(model=asdict(new.cfg)),
        counted=dict(params=count(new), cache_bytes=cache_bytes(new.cfg)),
    )  # fmt: skip
    args.out.mkdir(parents=True, exist_ok=True)
    write_atomically(best, lambda file: torch.save(state, file))
    how = "as its attentions met it in its own text" if seen else "unseen, as its text is not there"
    print(f"{model.cfg.attn} became {args.to}, what comes in weighed {how}")
    before, after = cache_bytes(model.cfg), cache_bytes(new.cfg)
    print(f"cache: {before:,} -> {after:,} bytes per token at 16 bit")
    print(f"parameters: {count(model):,} -> {count(new):,}")
    if text:
        print(f"validation loss: {losses[0]:.4f} -> {losses[1]:.4f} nats per token")
    print(f"next: python train.py --init_from {shell_quoted(best)} --out FOLDER")
    print("  on the same text, for a tenth of its steps at a tenth of its learning rate")


if __name__ == "__main__":
    run_command(main, Args)
