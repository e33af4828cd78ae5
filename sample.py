"""Generate text from a checkpoint of train.py: python sample.py --prompt "ROMEO:"

The checkpoint holds config and tokenizer, so nothing else is needed. The text streams as it is made; the last line
says how fast it was and how large the cache.
"""

import codecs
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from mfa import ATTENTION, GPT
from prepare_data import BadInput, run_command, tokenizer_from
from train import attention_kernels, load_checkpoint, model_from, pick_device, start_of_text


@dataclass
class Sample:
    """Generate text from a checkpoint of train.py."""

    checkpoint: Path | None = None
    """A best.pt or latest.pt; default: the newest below ./out."""
    prompt: str = ""
    """Text to go on from; empty: a new document, or a new line where the tokenizer knows no documents."""
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
    """On a GPU decode with CUDA graphs, which do not wait for the host; --no-graphs: as elsewhere."""
    compile: bool = False
    """Compile what the graphs replay: some seconds to start, then faster."""
    device: str = "auto"
    """auto, cpu, cuda, mps ..."""


def newest_checkpoint(out: Path = Path("out")) -> Path:
    """The best.pt of the run below out that was written to last, or its latest.pt if it has not been evaluated."""
    found = [*out.glob("*/latest.pt"), *out.glob("*/best.pt")]
    if not found:
        raise BadInput(f"no checkpoint below {out}: train one with python train.py, or name one with --checkpoint")
    newest = max(found, key=lambda path: path.stat().st_mtime_ns)
    best = newest.with_name("best.pt")
    return best if best.is_file() else newest


def fast_decode(model: GPT, compiled: bool) -> Callable | None:
    """The decode step of experiments/decode.py on a GPU; elsewhere, and for experts, None: mfa.py's own."""
    if model.embed.weight.device.type != "cuda" or model.cfg.n_expert:
        return None
    try:
        from experiments.decode import Decoder
    except ImportError:  # installed without the experiments
        return None
    return Decoder(model, compiled=compiled)


def main(args: Sample) -> None:
    for name in ("max_new_tokens", "num_samples"):
        if getattr(args, name) < 1:
            raise BadInput(f"--{name} must be at least 1, not {getattr(args, name)}")
    if not 0 <= args.temperature < math.inf:
        raise BadInput(f"--temperature must be 0 (greedy) or positive, not {args.temperature}")
    if args.top_k is not None and args.top_k < 1:
        raise BadInput(f"--top_k must be at least 1, not {args.top_k}")
    if args.top_p is not None and not 0 < args.top_p <= 1:
        raise BadInput(f"--top_p must be in (0, 1], not {args.top_p}")
    if not 0 <= args.seed < 2**32:
        raise BadInput(f"--seed must be from 0 to 2^32 - 1, not {args.seed}")
    path, device = args.checkpoint or newest_checkpoint(), pick_device(args.device)
    ckpt = load_checkpoint(path)
    model, tokenizer = model_from(ckpt, path, device).eval(), tokenizer_from(ckpt["tokenizer"], path)
    cfg = model.cfg
    if tokenizer.n_vocab > cfg.vocab_size:
        raise BadInput(f"{path} is of another tokenizer: it has {tokenizer.n_vocab} tokens, the model {cfg.vocab_size}")
    try:
        words = os.fsencode(args.prompt).decode("utf-8", "surrogateescape")  # where the terminal is not in UTF-8
        prompt = tokenizer.encode(words).tolist() if words else start_of_text(tokenizer)
    except BadInput as e:
        raise BadInput(f"--prompt: {e}") from e
    if len(prompt) > cfg.block_size and not args.keep_end:
        what = f"--prompt has {len(prompt)} tokens; the model's context is {cfg.block_size}"
        raise BadInput(f"{what}: shorten it, or use its end with --keep_end")
    cache_dtype = model.embed.weight.dtype if args.cache_dtype == "model" else getattr(torch, args.cache_dtype)
    stop = tokenizer.eot if args.stop else None
    options = dict(temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, stop=stop, keep_end=args.keep_end)
    options |= dict(use_cache=args.cache, cache_dtype=cache_dtype)
    if args.graphs:
        options["decode"] = fast_decode(model, args.compile)
    if args.compile and not options.get("decode"):
        raise BadInput("--compile compiles what --graphs replays, on a GPU and without experts: leave it out here")
    print(f"{path}: {cfg.attn}, step {ckpt['step']}, best validation loss {ckpt['best_loss']:.4f}\n", flush=True)

    idx, seconds, made = torch.tensor([prompt], device=device), 0.0, 0
    for k in range(args.num_samples):
        generator = torch.Generator(device).manual_seed(args.seed + k)
        stream = model.stream(idx, args.max_new_tokens, generator=generator, **options)
        decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a token may end inside a character
        sys.stdout.write(args.prompt)
        clock = time.perf_counter()
        with attention_kernels(device, decoding=True):
            for new in stream:
                token, made = new.item(), made + 1
                if token < tokenizer.n_vocab and token != stop:  # --vocab_size may leave room above the tokenizer's ids
                    sys.stdout.write(decoder.decode(tokenizer.to_bytes([token])))
                sys.stdout.flush()
        seconds += time.perf_counter() - clock
        sys.stdout.write(decoder.decode(b"", final=True) + "\n" + "-" * 40 + "\n")

    tokens = min(cfg.block_size, len(prompt) + args.max_new_tokens)
    size = tokens * cfg.n_layer * ATTENTION[cfg.attn].counts(cfg).kv_cache * cache_dtype.itemsize
    kept = f"cache {size:,} bytes for {tokens:,} tokens" if args.cache else "no cache"
    print(f"{made:,} tokens in {seconds:.2f} s, {made / seconds:,.0f} tokens/s, {kept}")


if __name__ == "__main__":
    run_command(main, Sample)
