"""Generate text from a checkpoint of train.py: python sample.py --prompt "ROMEO:"

The checkpoint holds config and tokenizer, so nothing else is needed. The text streams as it is
made; the last line says how fast it was and how large the cache. `stream` is the library's part:

    for token in stream(model, idx, 500, top_k=50, decode=Decoder(model)):    # each (B, 1)
"""

import codecs
import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from mfa import GPT, KVCache, cache_bytes, check_ids, check_sampling, draw, evaluating, require
from support.cli import BadInput, run_command, typed
from support.decode import Decoder
from support.machine import attention_kernels, is_out_of_memory, pick_device
from support.run_folder import model_from
from support.shipped import offer, open_checkpoint
from support.tokenizers import start_of_text, tokenizer_from

# --------------------------------------------------------------------------------------------------
# Streaming


@torch.no_grad()
def stream(
    model: GPT,
    idx: Tensor,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    use_cache: bool = True,
    generator: torch.Generator | None = None,
    stop: int | None = None,
    keep_end: bool = False,
    cache_dtype: torch.dtype | None = None,
    decode: Callable[[GPT, Tensor, KVCache], Tensor] | None = None,
) -> Iterator[Tensor]:
    """Yield what follows the prompts idx (B, T), one (B, 1) at a time, as GPT.generate draws it.

    A sequence that has drawn `stop` repeats it, and the stream ends when all have. A prompt beyond
    block_size is a ValueError, or cut to its end with keep_end. cache_dtype: what the cache keeps.
    decode(model, new, cache) stands in for the model wherever a single token follows cached ones,
    as support.decode.Decoder does. Raises ValueError where GPT.generate does.
    """
    limit, T = model.cfg.block_size, idx.shape[1]
    check_sampling(max_new_tokens, temperature, top_k, top_p)
    fits = 1 <= T <= limit or (keep_end and T)
    require(fits, f"the prompt must have 1 to {limit} tokens (block_size), not {T}")
    check_ids(idx, model.cfg.vocab_size)
    context = idx[:, -limit:]  # all that the model may look at
    cache = None
    if use_cache:
        capacity = min(limit, context.shape[1] + max_new_tokens)
        cache = KVCache(model, len(idx), capacity, cache_dtype)
    stopped = torch.zeros_like(idx[:, :1], dtype=torch.bool)  # (B, 1)
    with evaluating(model):
        for _ in range(max_new_tokens):
            if context.shape[1] > limit:
                context = context[:, -max(limit // 2, 1) :]
                if use_cache:
                    cache.length = 0
            new = context[:, cache.length :] if use_cache else context
            if decode is not None and use_cache and cache.length:
                logits = decode(model, new, cache)  # (B, vocab_size)
            else:
                logits = model.next_logits(new, cache)  # (B, vocab_size)
            drawn = draw(logits, temperature, top_k, top_p, generator)  # (B, 1)
            if stop is not None:
                drawn = drawn.masked_fill(stopped, stop)
                stopped = drawn == stop
            context = torch.cat((context, drawn), dim=1)
            yield drawn
            if stop is not None and stopped.all():
                return


# --------------------------------------------------------------------------------------------------
# Flags


@dataclass
class Sample:
    """Generate text from a checkpoint of train.py."""

    checkpoint: Path | None = None
    """A best.pt or latest.pt; default: the newest below ./out. shipped-mfa_kr, shipped-mfa and
    shipped-mha are here already."""
    prompt: str = ""
    """Text to go on from; empty: a new document, or a new line where there are no documents."""
    max_new_tokens: int = 500
    """Tokens to make for each sample."""
    temperature: float = 0.8
    """Below 1 sharpens the distribution, above 1 flattens it; 0 takes the likeliest token."""
    top_k: int | None = None
    """Draw from this many likeliest tokens only."""
    top_p: float | None = None
    """Draw from the fewest likeliest tokens whose probability reaches this."""
    num_samples: int = 1
    """How many texts."""
    seed: int = 1337
    """Of the draws; sample k uses seed + k."""
    cache: bool = True
    """Keep keys and values; --no-cache recomputes them for every token: the same text, slower."""
    cache_dtype: Literal["model", "bfloat16", "float32"] = "model"
    """What the cache keeps; model: the weights' own."""
    keep_end: bool = False
    """Of a prompt longer than the context keep the end; otherwise it is refused."""
    stop: bool = False
    """End a text where the model ends the document, if its tokenizer has a token for that."""
    graphs: bool = True
    """On a GPU decode with CUDA graphs, which do not wait for the host."""
    compile: bool = False
    """Compile what the graphs replay: some seconds to start, then faster."""
    device: str = "auto"
    """auto, cpu, cuda, mps ..."""


def check_flags(args: Sample) -> None:
    for name in ("max_new_tokens", "num_samples"):
        if getattr(args, name) < 1:
            raise BadInput(f"--{name} must be at least 1, not {getattr(args, name)}")
    if not 0 <= args.seed < 2**32:
        raise BadInput(f"--seed must be from 0 to 2^32 - 1, not {args.seed}")
    try:
        check_sampling(args.max_new_tokens, args.temperature, args.top_k, args.top_p)
    except ValueError as e:
        raise BadInput(f"--{e}") from e


def newest_checkpoint(out: Path = Path("out")) -> Path:
    """The best.pt of the run below out written to last, or its latest.pt if there is no best."""
    found = [*out.glob("*/latest.pt"), *out.glob("*/best.pt")]
    if not found:
        what = f"no checkpoint below {out}: train one with python train.py"
        raise BadInput(f"{what}, or name one with --checkpoint{offer()}")
    newest = max(found, key=lambda path: path.stat().st_mtime_ns)
    best = newest.with_name("best.pt")
    return best if best.is_file() else newest


def encode_prompt(args: Sample, tokenizer, block_size: int) -> list[int]:
    """The prompt's ids. BadInput if the tokenizer does not know its characters, or it is long."""
    try:
        words = typed(args.prompt)
        ids = tokenizer.encode(words).tolist() if words else start_of_text(tokenizer)
    except BadInput as e:
        raise BadInput(f"--prompt: {e}") from e
    if len(ids) > block_size and not args.keep_end:
        what = f"--prompt has {len(ids)} tokens; the model's context is {block_size}"
        raise BadInput(f"{what}: shorten it, or use its end with --keep_end")
    return ids


def fast_decode(model: GPT, args: Sample) -> Decoder | None:
    """CUDA graphs on a GPU; None where the model's own step must do."""
    decoder = None
    if args.graphs and model.embed.weight.is_cuda:
        with contextlib.suppress(ValueError):  # experts, or a plug-in that it does not know
            decoder = Decoder(model, compiled=args.compile)
    if args.compile and not decoder:
        what = "--compile compiles what --graphs replays, on a GPU and without experts"
        raise BadInput(f"{what}: leave it out here")
    return decoder


# --------------------------------------------------------------------------------------------------
# The command


def generate_texts(args: Sample) -> None:
    check_flags(args)
    path, device = args.checkpoint or newest_checkpoint(), pick_device(args.device)
    ckpt = open_checkpoint(path)
    model = model_from(ckpt, path, device).eval()
    tokenizer = tokenizer_from(ckpt["tokenizer"], path)
    cfg = model.cfg
    if tokenizer.n_vocab > cfg.vocab_size:
        what = f"it has {tokenizer.n_vocab} tokens, the model {cfg.vocab_size}"
        raise BadInput(f"{path} is of another tokenizer: {what}")
    prompt = encode_prompt(args, tokenizer, cfg.block_size)
    dtype = model.embed.weight.dtype
    if args.cache_dtype != "model":
        dtype = getattr(torch, args.cache_dtype)
    options = dict(
        temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, use_cache=args.cache,
        stop=tokenizer.eot if args.stop else None, keep_end=args.keep_end, cache_dtype=dtype,
        decode=fast_decode(model, args),
    )  # fmt: skip
    loss = f"best validation loss {ckpt['best_loss']:.4f}"
    print(f"{path}: {cfg.attn}, step {ckpt['step']}, {loss}")
    if args.temperature == 0 and not args.prompt:
        print(
            "no --prompt: the text begins after the end of a line or of a document, and at "
            "--temperature 0 what follows may be such an end again, for ever: blank lines"
        )
    print(flush=True)

    idx, seconds, made = torch.tensor([prompt], device=device), 0.0, 0  # idx: (1, T)
    for k in range(args.num_samples):
        generator = torch.Generator(device).manual_seed(args.seed + k)
        tokens = stream(model, idx, args.max_new_tokens, generator=generator, **options)
        sys.stdout.write(typed(args.prompt))
        clock = time.perf_counter()
        with attention_kernels(device, decoding=True):
            made += show(tokens, tokenizer, options["stop"])
        seconds += time.perf_counter() - clock
        sys.stdout.write("\n" + "-" * 40 + "\n")

    cached = min(cfg.block_size, len(prompt) + args.max_new_tokens)
    size = cached * cache_bytes(cfg, dtype.itemsize)
    cache = f"cache {size:,} bytes for {cached:,} tokens" if args.cache else "no cache"
    print(f"{made:,} tokens in {seconds:.2f} s, {made / seconds:,.0f} tokens/s, {cache}")


def show(tokens: Iterator[Tensor], tokenizer, stop: int | None) -> int:
    """Writes each token's text as it comes. Returns how many there were."""
    text = codecs.getincrementaldecoder("utf-8")("replace")  # a token may end inside a character
    made = 0
    for new in tokens:
        token, made = new.item(), made + 1
        if token < tokenizer.n_vocab and token != stop:  # the model's vocabulary may be larger
            sys.stdout.write(text.decode(tokenizer.to_bytes([token])))
        sys.stdout.flush()
    sys.stdout.write(text.decode(b"", final=True))
    return made


def main(args: Sample) -> None:
    try:
        generate_texts(args)
    except (RuntimeError, MemoryError) as e:
        if not is_out_of_memory(e):
            raise
        raise BadInput("out of memory: try fewer --max_new_tokens, or --device cpu") from e


if __name__ == "__main__":
    run_command(main, Sample)
