"""Train a language model with any of the attentions: python train.py --attn mfa_kr

The paper's recipe (Section 4.1) unless RECIPES says otherwise: AdamW (0.9, 0.95), eps 1e-8, weight
decay 0.1 on matrices, clipping at 1.0, linear warm-up, cosine decay to 1e-5. Attentions are
compared at equal parameters: the FFN takes what the attention saves. A run lives in one folder,
out/<preset>-<attn> unless --out says otherwise:

    latest.pt, best.pt    all that is needed to go on (--resume) or to sample
    metrics.jsonl         a line of JSON each; at evaluations val_loss (nats per token), val_bpb
    loss.png              the curves

Everything random in step s is drawn from (seed, s), so a run that was stopped and resumed, on any
number of processes, sees the same batches as one that was not. torchrun --nproc_per_node=N
train.py ... shares each batch out. To read: train() at the end is the loop.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import tyro
from torch import Tensor, nn

from mfa import GPT, PRESETS, Config, evaluating, preset
from prepare_data import load, prepare, unescape
from support.cli import BadInput, run_command
from support.corpora import DATA
from support.machine import (
    Machine,
    can_compile,
    is_out_of_memory,
    leave,
    pick_device,
    require_compiler,
)
from support.muon import Both, Muon, groups_of
from support.packing import hide_padding
from support.progress import Progress
from support.run_folder import Run, load_checkpoint, load_weights
from support.train_flags import check_flags, first_flags, flags_from, flags_of, origin_of

# --------------------------------------------------------------------------------------------------
# Flags and recipes


@dataclass
class Train:
    """Train a language model with any of the attentions and compare them at equal parameters."""

    model: Annotated[Config, tyro.conf.arg(name="")] = field(default_factory=Config)
    preset: Literal["tiny", "baby", "small", "paper-1b", "paper-7b"] = "tiny"  # sizes and recipe
    dataset: str = "shakespeare"  # corpus of prepare_data.py, prepared when it is missing
    file: str | None = None  # your own text, a file or a folder, instead of a corpus
    separator: str | None = None  # what stands between the documents of --file: '\n\n', say
    tokenizer: Literal["char", "byte", "bpe", "gpt2"] = "char"  # bpe learns --vocab_size tokens
    packing: Literal["stream", "best-fit"] = "stream"  # best-fit cuts as few documents as it can
    out: Path | None = None  # folder of the run; default out/<preset>-<attn>
    resume: bool = False  # go on from latest.pt in --out; flags not given are taken from there
    overwrite: bool = False  # replace the run that --out holds
    init_from: Path | None = None  # begin with this checkpoint's weights, sizes and tokenizer
    data_dir: Path = DATA  # where prepared corpora are kept
    plugin: Path | None = None  # Python file with an attention of your own, for --attn

    max_iters: int = 2000  # optimizer steps
    batch_size: int = 16  # sequences per step, over all processes and accumulation steps
    grad_accum: int = 1  # pieces each process cuts its share of the batch into, to save memory
    optimizer: Literal["adamw", "muon", "muon_heads"] = "adamw"
    """muon: of the blocks' matrices, and adamw for others; muon_heads: of heads one by one."""
    learning_rate: float = 3e-3  # peak, after the warm-up
    min_lr: float = 1e-5  # end of the cosine decay
    warmup_iters: int = 100  # steps of linear warm-up
    weight_decay: float = 0.1  # on matrices; gains and gates have none
    beta2: float = 0.95  # decay of AdamW's second moment
    grad_clip: float = 1.0  # largest norm of the gradient; 0: not clipped
    match_params: bool = True  # choose the FFN width that gives MHA's parameters (not for fpba)

    eval_interval: int = 250  # steps between evaluations and checkpoints
    eval_tokens: int = 0  # evaluate on this many validation tokens, always the same; 0: all
    log_interval: int = 50  # steps between lines on the terminal
    seed: int = 1337  # of the weights and the batches
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps ...
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of matrix products
    shard: bool = False  # each process of torchrun keeps its part of the model alone (FSDP2)
    checkpoint_blocks: bool = False  # compute blocks twice instead of keeping what is in them
    compile: bool = False  # torch.compile: the default on a GPU; a CPU needs a C++ compiler
    threads: int = 0  # of a CPU; 0: as many as it has cores
    log: Literal["none", "wandb", "trackio", "tensorboard"] = "none"  # beside metrics.jsonl


# What each preset's recipe changes in the defaults above.
RECIPES = {
    "tiny": {},
    # A million characters, read thirty times: a weight decay far from the paper's 0.1 helps most.
    "baby": dict(optimizer="muon", batch_size=32, max_iters=4000, weight_decay=2.0, beta2=0.99),
    "small": dict(batch_size=512, grad_accum=16, max_iters=20_000, learning_rate=6e-4,
                  warmup_iters=700),
    "paper-1b": dict(batch_size=24, grad_accum=24, max_iters=50_000, learning_rate=9.63e-4,
                     warmup_iters=2000),
    "paper-7b": dict(batch_size=448, grad_accum=448, max_iters=140_000, learning_rate=8.4e-4,
                     warmup_iters=2000),
}  # fmt: skip


def defaults(argv: list[str]) -> Train:
    """What the flags start from: the preset's sizes and recipe, the run's own (--resume), or the
    sizes of the checkpoint that it begins with (--init_from).
    """
    given = first_flags(argv)
    out = Path(f"out/{given.preset}-{given.attn}" if given.out is None else given.out)
    latest = out / "latest.pt"
    if given.resume and latest.is_file():
        return replace(flags_of(load_checkpoint(latest, mmap=True), latest, Train), out=out)
    compile = can_compile(pick_device(given.device))
    if given.init_from:
        taken = flags_from(load_checkpoint(given.init_from, mmap=True), given.init_from)
        return Train(**RECIPES[taken["preset"]], **taken, compile=compile)
    try:
        model = preset(given.preset, given.attn, vocab_size=0)
    except ValueError as e:
        raise BadInput(f"--{e}") from e
    return Train(model=model, preset=given.preset, compile=compile, **RECIPES[given.preset])


# --------------------------------------------------------------------------------------------------
# Equal parameters


def count_params(cfg: Config) -> int:
    """Parameters of the whole model, counted on tensors that take no memory."""
    with torch.device("meta"):
        model = GPT(replace(cfg, n_layer=min(cfg.n_layer, 2)))  # layers beyond are like the second
    more = cfg.n_layer - len(model.blocks)
    per_layer = sum(p.numel() for p in model.blocks[-1].parameters())
    return sum(p.numel() for p in model.parameters()) + more * per_layer


def mha_of(cfg: Config) -> Config:
    """The MHA model that cfg is compared with: all else equal, but for Table 7's own experts."""
    own = PRESETS["paper-7b"].get(cfg.attn, {})
    is_table7 = all(getattr(cfg, k) == v for k, v in own.items())
    experts = {k: PRESETS["paper-7b"][k] for k in own} if is_table7 else {}
    try:
        return replace(cfg, attn="mha", n_head=0, **experts)
    except ValueError as e:
        raise BadInput(f"--attn {cfg.attn}: the MHA that it is compared with: {e}") from e


def match_params(cfg: Config) -> Config:
    """cfg with the FFN (or routed expert) width at which it has its MHA model's parameters.

    Within 0.8%; a width within 0.5% stays (Table 7 brings its own). Raises ValueError if the
    attention alone is too large.
    """
    name, width = ("moe_ffn_dim", cfg.moe_ffn_dim) if cfg.n_expert else ("ffn_dim", cfg.ffn)
    want, have = count_params(mha_of(cfg)), count_params(cfg)
    if abs(have - want) < 0.005 * want:
        return cfg
    wider = count_params(replace(cfg, **{name: width + 1}))
    per_unit = wider - count_params(replace(cfg, **{name: width}))
    exact = width + (want - have) / per_unit
    for multiple in (64, 8, 1):  # round widths suit the matrix units, where there is room for them
        rounded = max(multiple, round(exact / multiple) * multiple)
        if abs(rounded - exact) * per_unit < 0.008 * want:
            return replace(cfg, **{name: rounded})
    what = f"no {name} gives {cfg.attn} MHA's {want:,} parameters"
    raise ValueError(f"{what}: make the attention smaller, or --no_match_params")


# --------------------------------------------------------------------------------------------------
# Batches


def to_device(ids: np.ndarray, device: torch.device) -> Tensor:
    """Memory-mapped ids (tokens,) as a tensor of the same bytes, in the GPU's memory if it fits.

    It fits if it takes less than a quarter; otherwise it stays on the disk.
    """
    signed = torch.from_numpy(ids.view(f"i{ids.itemsize}"))  # older torch cannot index uint16
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
        return signed.to(device) if ids.nbytes < memory / 4 else signed
    return signed


def take(ids: Tensor, starts: Tensor, length: int, device: torch.device) -> Tensor:
    """ids[s : s + length] for each s of starts (B,): (B, length), int64."""
    starts = starts.to(ids.device, non_blocking=True)  # a CPU or a CUDA GPU
    at = starts[:, None] + torch.arange(length, device=ids.device)  # (B, length)
    tokens = ids[at].to(device, non_blocking=device.type != "mps").long()  # pytorch#189690
    return tokens & 0xFFFF if ids.dtype == torch.int16 else tokens  # to_device made them signed


def batch_starts(args: Train, step: int, n_tokens: int, every: int = 1) -> Tensor:
    """Where the sequences of a step begin, whatever has run before: (batch_size,)."""
    g = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
    n_start = (n_tokens - args.model.block_size - 1) // every + 1
    return torch.randint(n_start, (args.batch_size,), generator=g) * every


@dataclass
class Tokens:
    """A text as ids on the device. meta is its meta.json, folder where it lies."""

    folder: Path
    train: Tensor  # (tokens,)
    val: Tensor  # (tokens,)
    meta: dict

    def batches(self, args: Train, step: int, machine: Machine) -> list[Tensor]:
        """This process' share of the step's batch, in grad_accum pieces: each (B, T + 1)."""
        T, packed = args.model.block_size, "packing" in self.meta
        starts = batch_starts(args, step, len(self.train), T + 1 if packed else 1)  # (batch_size,)
        mine = starts.view(machine.world, args.grad_accum, -1)[machine.rank]  # (grad_accum, B)
        pieces = [take(self.train, piece, T + 1, machine.device) for piece in mine]
        return [hide_padding(piece, self.meta) for piece in pieces] if packed else pieces


def open_text(args: Train, machine: Machine, origin: dict | None) -> Tokens:
    """The text that the flags name. The first process prepares it, if need be.

    With --init_from it gets the tokens of the checkpoint origin.
    """
    tokenizer = origin["tokenizer"] if origin else args.tokenizer
    T = args.model.block_size
    folder = machine.once(
        lambda: prepare(
            dataset=args.dataset, file=args.file, tokenizer=tokenizer, packing=args.packing,
            vocab_size=args.model.vocab_size or None if tokenizer == "bpe" else None,
            data_dir=args.data_dir, separator=unescape(args.separator), context=T,
        )  # fmt: skip
    )
    train_ids, val_ids, meta = load(folder)
    if 0 < args.eval_tokens < T:
        what = f"must be 0, for all, or at least --block_size {T}"
        raise BadInput(f"--eval_tokens {args.eval_tokens}: {what}")
    for name, ids in (("training", train_ids), ("validation", val_ids)):
        if len(ids) <= T:
            what = f"the {name} text of {folder} has {len(ids)} tokens, and more are needed"
            raise BadInput(f"--block_size {T}: {what}")
    if args.eval_tokens:
        val_ids = val_ids[: args.eval_tokens + 1]
    ids = [to_device(part, machine.device) for part in (train_ids, val_ids)]
    return Tokens(folder, *ids, meta | {"name": folder.name})


# --------------------------------------------------------------------------------------------------
# Model, optimizer, schedule


def new_model(args: Train, text: Tokens) -> GPT:
    """A model for the text, at MHA's number of parameters."""
    n_vocab = text.meta["vocab_size"]
    if 0 < args.model.vocab_size < n_vocab:
        what = f"{text.folder} has {n_vocab} tokens, give as many or more"
        raise BadInput(f"--vocab_size {args.model.vocab_size}: {what}")
    try:
        cfg = replace(args.model, vocab_size=max(args.model.vocab_size, n_vocab))
        torch.manual_seed(args.seed)
        keep = args.init_from or not args.match_params or cfg.attn in ("mha", "fpba")
        return GPT(cfg if keep else match_params(cfg))
    except ValueError as e:
        raise BadInput(f"--attn {args.model.attn}: {e}") from e


def make_optimizer(model: GPT, args: Train) -> torch.optim.Optimizer | Both:
    """AdamW, or Muon for the matrices of the blocks and AdamW for the rest."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    gains = [p for p in model.parameters() if p.dim() < 2]
    if args.optimizer != "adamw":
        matrices = list(dict.fromkeys((model.embed.weight, model.head.weight)))  # one if tied
    groups = [
        dict(params=matrices, weight_decay=args.weight_decay),
        dict(params=gains, weight_decay=0.0),
    ]
    fused = matrices[0].device.type in ("cuda", "cpu")
    adamw = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, args.beta2), eps=1e-8, fused=fused)
    if args.optimizer == "adamw":
        return adamw
    inner = groups_of(model.blocks, apart=args.optimizer == "muon_heads")
    return Both(Muon(inner, lr=0.0, weight_decay=args.weight_decay), adamw)


def learning_rate(step: int, args: Train) -> float:
    """Linear warm-up to the peak, then a cosine to min_lr at max_iters."""
    if step < args.warmup_iters:
        return args.learning_rate * (step + 1) / args.warmup_iters
    done = (step - args.warmup_iters) / max(1, args.max_iters - args.warmup_iters)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    return args.min_lr + (args.learning_rate - args.min_lr) * cosine


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


# --------------------------------------------------------------------------------------------------
# A step, and an evaluation


def train_step(
    model: nn.Module,
    loss_of: Callable[[Tensor], Tensor],
    batches: list,
    optimizer: torch.optim.Optimizer,
    machine: Machine,
    clip: float = 1.0,
) -> tuple[Tensor, Tensor | None]:
    """One step on the mean loss of the batches: the loss, and the gradient's norm before clipping.

    Both stay on the device, since reading them would wait for it. clip 0: no clipping, no norm.
    """
    scaler, norm, total = machine.scaler, None, torch.zeros((), device=machine.device)
    for i, batch in enumerate(batches):
        with machine.accumulating(more=i + 1 < len(batches)):
            with machine.autocast():
                loss = loss_of(batch) / len(batches)
            scaler.scale(loss).backward()
        total += loss.detach()
    if clip:
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(model.parameters(), clip)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return total, norm


@torch.no_grad()
def evaluate(model: GPT, ids: Tensor, machine: Machine) -> float:
    """Mean cross-entropy in nats over all of ids but its first, in windows of block_size tokens."""
    T = model.cfg.block_size
    rows = max(1, 16384 // T)  # windows at a time
    n_window = math.ceil((len(ids) - 1) / T)
    float64 = torch.float64 if machine.device.type != "mps" else None
    total = torch.zeros((), device=machine.device, dtype=float64)
    count = 0
    with evaluating(model):
        # A sharded model needs every process as often, some for a window that does not count.
        for start in range(0, n_window, machine.world * rows):
            first = start + machine.rank * rows
            starts = torch.arange(min(first, n_window - 1), min(first + rows, n_window)) * T
            # The last window may reach over the end: it begins earlier, and targets that the window
            # before has scored become -1, which the loss leaves out.
            short = max(0, int(starts[-1]) + T + 1 - len(ids))
            starts[-1] -= short
            tokens = take(ids, starts, T + 1, machine.device)  # (rows, T + 1)
            targets = tokens[:, 1:].clone()
            targets[-1, :short] = -1
            with machine.autocast():
                loss = model(tokens[:, :-1], targets)[1]
            n = (targets.numel() - short) * (first < n_window)
            total, count = total + loss * n, count + n
    count = machine.sum(torch.tensor(count, device=machine.device))
    return machine.sum(total).item() / count.item()


# --------------------------------------------------------------------------------------------------
# The run


def check_machine(args: Train, machine: Machine) -> None:
    """BadInput if these flags do not fit this machine."""
    if args.compile:
        require_compiler(machine.device)
    if args.batch_size % (machine.world * args.grad_accum):
        shares = f"{machine.world} processes x {args.grad_accum} grad_accum"
        raise BadInput(f"--batch_size {args.batch_size} must be a multiple of {shares}")


def seed_dropout(args: Train, step: int, machine: Machine) -> None:
    if args.model.dropout:
        torch.manual_seed((args.seed * 1_000_003 + step) * 4096 + machine.rank)


def train(args: Train) -> dict:
    """Run or resume a training; BadInput comes before anything is written.

    Returns out (its folder), step, best_loss (nats per token), seconds, params and stopped (0, or
    the number of the signal that ended it).
    """
    check_flags(args)
    mha = mha_of(args.model)  # with which the run is compared
    with Machine(args.device, args.dtype, args.threads, args.shard) as machine:
        check_machine(args, machine)
        out = args.out or Path("out") / f"{args.preset}-{args.model.attn}"
        run = Run(out, args.resume, args.overwrite, writes=machine.first)
        origin = origin_of(args, run)
        text = open_text(args, machine, origin)
        model = machine.place(new_model(args, text), args.checkpoint_blocks).train()
        optimizer = make_optimizer(model, args)
        progress = Progress(args, machine, run, text.meta)
        if run.checkpoint:
            progress.restore(model, optimizer)
        elif origin:
            load_weights(model, origin, args.init_from)
        mha = replace(mha, vocab_size=model.cfg.vocab_size)
        progress.describe(model, mha, count_params(mha), (len(text.train), len(text.val)))
        graphs = machine.device.type == "cuda" and machine.world == args.grad_accum == 1
        loss_of = machine.loss_function(model, args.compile, graphs)

        with run, machine.training(), progress.begun(model, optimizer):
            while progress.step < args.max_iters and not machine.signal:
                rate = learning_rate(progress.step, args)
                set_learning_rate(optimizer, rate)
                seed_dropout(args, progress.step, machine)
                batches = text.batches(args, progress.step, machine)  # each (B, T + 1)
                loss, _ = train_step(model, loss_of, batches, optimizer, machine, args.grad_clip)
                progress.stepped(loss)

                last = progress.step == args.max_iters
                evaluation_due = last or progress.step % args.eval_interval == 0
                if evaluation_due or progress.line_due:
                    progress.tell_training(rate)
                if evaluation_due:
                    better = progress.tell_validation(evaluate(model, text.val, machine))
                    run.save(progress.state(model, optimizer), best=better)
                elif machine.signal:
                    progress.check_weights(model)
                    run.save(progress.state(model, optimizer))
        return progress.end(model, mha)


def main(args: Train) -> None:
    try:
        stopped = train(args)["stopped"]
    except (RuntimeError, MemoryError) as e:
        if not is_out_of_memory(e):
            raise
        what = "try a smaller --batch_size, more --grad_accum, --checkpoint_blocks or --shard"
        raise BadInput(f"out of memory: {what}") from e
    leave(stopped)


if __name__ == "__main__":
    run_command(main, Train, defaults=defaults)
