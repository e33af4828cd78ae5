"""How fast a token is decoded, and how many texts fit:

    python experiments/bench/decoding.py --nanogpt FOLDER

Parts, in the order in which they run (--part picks some):

    kernels   not by default: attention alone, support/decode.py's kernel cut in other ways, and
              PyTorch's backends
    must      paper-1b with random weights in bf16, every attention: batch 32 at a context of
              16,384, and the largest batch
    profile   where a step's time goes in the must cell: every kernel of four attentions
    baby      one text of 500 tokens at a context of 1,024, against nanoGPT's own generate(), if
              --nanogpt names its folder
    llama     transformers' Llama of the same dimensions, its static cache and torch.compile, if it
              is installed
    grid      batch 1, 8, 32 and 128 at contexts of 1k to 64k, where they fit
    tiny      on a CPU: 512 tokens with the cache and without
    plot      two pictures from the results

A cell's cache is filled with random numbers, which cost the same as any, and decoding goes on from
there, greedily, for some steps: ms is the median. The floor is the time to read the weights and the
filled part of the cache once, at the bandwidth of a large copy measured in the same run;
floor_share is floor over median. A cell that fails is recorded with its error. Results are written
after each; a later run replaces the rows that it measures again.
"""

import gc
import importlib.util
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from experiments.bench.gpu_time import kernel_times
from experiments.flags import require_at_least_1, require_other_results
from mfa import ATTENTION, GPT, Attention, Config, KVCache, cache_bytes, preset
from sample import stream
from support import decode as engine
from support import palette
from support.cli import BadInput, run_command
from support.decode import Decoder, attend_sdpa, attend_triton, keys_and_values
from support.files import write_atomically
from support.machine import attention_kernels
from support.provenance import ROOT, provenance, read_json

RESULTS = ROOT / "experiments" / "results" / "decode.json"
RESULTS_OF_A_CPU = Path("out") / "decode.json"

# (attention, mode), those that the targets name first. Mode: MFA-KR's key_reuse_rope, MLA's latent.
VARIANTS = [
    ("mfa", ""), ("mha", ""), ("gqa", ""), ("mfa_kr", "post"), ("mfa_kr", "inverse"),
    ("mfa_kr", "pre"), ("mla", "joint"), ("mqa", ""),
]  # fmt: skip
NAMES = {
    ("mha", ""): "MHA", ("gqa", ""): "GQA, 4 heads", ("mqa", ""): "MQA",
    ("mla", "joint"): "MLA, joint", ("mfa", ""): "MFA", ("mfa_kr", "pre"): "MFA-KR pre",
    ("mfa_kr", "post"): "MFA-KR post", ("mfa_kr", "inverse"): "MFA-KR inverse",
}  # fmt: skip
# Figure 1's MLA, as in DeepSeek-V2-Lite.
JOINT_MLA = dict(joint_kv=True, latent_dim=512, compress_query=False, latent_norm=True)
TOY = dict(
    n_layer=2, dim=64, head_dim=16, latent_dim=16, rope_dim=8, mfa_n_head=3, ffn_dim=64,
    vocab_size=64,
)  # fmt: skip
WARMUP = 3  # steps before the measured ones; the first compiles and captures


@dataclass
class Args:
    """Measure decoding: time per step, cache, largest batch, beside transformers' Llama and
    nanoGPT.
    """

    part: tuple[
        Literal["must", "profile", "baby", "llama", "grid", "tiny", "plot", "kernels"], ...
    ] = ()
    """Which parts; default: all but kernels and tiny on a GPU, tiny on a CPU."""
    only: tuple[str, ...] = ()
    """Only these attentions, as "mfa" or "mfa_kr post"; default: all."""
    batches: tuple[int, ...] = ()
    """Only these batch sizes of the grid; default: all."""
    nanogpt: Path | None = None
    """Folder of a nanoGPT checkout (its model.py is used)."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """cuda or cpu."""
    results: Path | None = None
    """JSON that is read, completed and written; the pictures go beside it. Default:
    experiments/results/decode.json, but out/decode.json for what is measured on a CPU."""
    seconds: float = 330
    """No cell of the grid begins after this many seconds."""
    steps: int = 30
    """Measured steps a cell."""
    smoke: bool = False
    """Toy sizes, seconds on a CPU: does it run? Needs --results elsewhere."""


class Bench:
    """Sizes, the results file, and what every measurement needs."""

    def __init__(self, args: Args):
        self.args = args
        self.began = time.perf_counter()
        self.device = torch.device(args.device)
        self.cuda = self.device.type == "cuda"
        self.dtype = torch.bfloat16 if self.cuda else torch.float32
        self.variants = [v for v in VARIANTS if not args.only or spelled(v) in args.only]
        self.must = (2, 48) if args.smoke else (32, 16384)  # batch, context
        self.batches = (1, 2) if args.smoke else (1, 8, 32, 128)
        self.contexts = (32,) if args.smoke else (1024, 4096, 16384, 65536)
        self.fastest: dict[tuple[str, str], str] = {}  # variant -> kernel, from the must part
        self.found = read_json(args.results)
        self.rows = self.found.get("rows", [])
        self.largest = self.found.get("largest_batch", [])
        self.here = provenance(args.device)
        self.bandwidth = self.copy_bandwidth()
        self.here["bandwidth"] = self.bandwidth
        clock = time.strftime("%H:%M:%S", time.gmtime())
        self.run = f"{self.here['date']} {clock}"  # names this run in its rows
        self.runs = self.found.get("runs", {}) | {self.run: self.here}
        # Where a CPU's rows are added to a GPU's, the file stays about the GPU.
        if self.cuda or "command" not in self.found:
            self.found |= self.here
        device, terabytes = self.here["device"], self.bandwidth / 1e12
        print(f"{device}: copy bandwidth {terabytes:.3f} TB/s", flush=True)

    # -- measuring

    def copy_bandwidth(self) -> float:
        """Bytes/s read plus written by a copy far larger than any cache."""
        size = 2**31 if self.cuda else 2**25
        source = torch.empty(size, dtype=torch.uint8, device=self.device).random_()
        target = torch.empty_like(source)
        ms = self.median(lambda: target.copy_(source), 10)
        return 2 * source.nbytes / (ms / 1000)

    def median(self, work: Callable, n: int) -> float:
        """Median milliseconds of n calls, one behind the other: the host does not wait between."""
        work()
        if not self.cuda:
            times = [time.perf_counter()]
            for _ in range(n):
                work()
                times.append(time.perf_counter())
            return 1000 * statistics.median(b - a for a, b in itertools.pairwise(times))
        events = [torch.cuda.Event(enable_timing=True) for _ in range(n + 1)]
        events[0].record()
        for event in events[1:]:
            work()
            event.record()
        torch.cuda.synchronize()
        return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(events))

    def clean(self) -> None:
        """Give back unused memory; raises if a kernel has broken the device."""
        if self.cuda:
            gc.collect()
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def allocated(self) -> int:
        """Bytes asked of PyTorch's allocator, which may round up what it hands out."""
        return torch.cuda.memory_stats()["requested_bytes.all.current"] if self.cuda else 0

    def free(self) -> int:
        """Bytes that may be allocated; on a CPU, where only --smoke comes here, a megabyte."""
        return torch.cuda.mem_get_info()[0] if self.cuda else 2**20

    def config(self, attn: str, mode: str = "") -> Config:
        """paper-1b, or a toy of the same kind; the context allows for the longest cell."""
        fields = {}
        if attn == "mfa_kr":
            fields = dict(key_reuse_rope=mode or "pre")
        if (attn, mode) == ("mla", "joint"):
            fields = dict(JOINT_MLA)
        fields["block_size"] = max(*self.contexts, self.must[1])
        if self.args.smoke:
            fields |= TOY
        return preset("paper-1b", attn, **fields)

    def model(self, cfg: Config) -> GPT:
        self.clean()
        torch.manual_seed(0)
        with self.device:
            return GPT(cfg).to(self.dtype).eval()

    # -- the results file

    def add(self, row: dict, to: list[dict] | None = None) -> None:
        """Put a row in the place of the one with the same name, write the file, print the row."""
        to = self.rows if to is None else to
        keys = ["model", "attn", "mode", "engine", "kernel", "context"]
        if to is self.rows:
            keys.append("batch")
        to[:] = [r for r in to if any(r.get(k) != row.get(k) for k in keys)]
        to.append(row | {"run": self.run})
        self.write()
        shown = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items() if v != ""}
        print(" ".join(f"{k}={v}" for k, v in shown.items()), flush=True)

    def write(self) -> None:
        steps = self.found.get("profile", {"steps": []})["steps"]
        used = {r["run"] for r in [*self.rows, *self.largest, *steps]}
        runs = {k: v for k, v in self.runs.items() if k in used}
        result = self.found | {"rows": self.rows, "largest_batch": self.largest, "runs": runs}
        text = json.dumps(result, indent=1) + "\n"
        self.args.results.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.args.results, lambda file: file.write(text.encode()))

    def attempt(self, row: dict, work: Callable[[], dict]) -> dict | None:
        """Add the row with what work() measures, or with its error. None after an error."""
        error = None
        try:
            row = row | work()
        except Exception as e:  # a cell that fails must not take the others with it
            error = first_line(e)
        self.add(row if error is None else row | {"error": error})
        self.clean()  # outside the handler, whose traceback holds the tensors
        return None if error else row


def spelled(variant: tuple[str, str]) -> str:
    """As --only takes it."""
    return " ".join(variant).strip()


def first_line(e: Exception) -> str:
    lines = str(e).strip().splitlines() or [""]
    return f"{type(e).__name__}: {lines[0][:200]}"


# --------------------------------------------------------------------------------------------------
# Decoding with this project's models


def kernels_here(bench: Bench) -> list[str]:
    """What Decoder's `attention` can be."""
    return ["triton", "sdpa"] if bench.cuda and engine.triton is not None else ["sdpa"]


def fill(cache: KVCache) -> None:
    """With random numbers."""
    for layer in cache.layers:
        for tensor in layer:
            tensor.normal_()


def itemsize(model: GPT) -> int:
    return model.embed.weight.element_size()


def measure(bench: Bench, model: GPT, decoder: Decoder, batch: int, context: int) -> dict:
    """One cell: what a row says beyond its name.

    workspace_bytes: what a sequence takes while decoding besides its cache.
    """
    steps = min(bench.args.steps, context // 2 - WARMUP - 1)
    before = bench.allocated()
    cache = KVCache(model, batch, context)
    measured = bench.allocated() - before if bench.cuda else cache.nbytes()
    counted = batch * context * cache_bytes(model.cfg, itemsize(model))
    reserved = torch.cuda.memory_reserved() if bench.cuda else 0
    fill(cache)
    cache.length = context - steps - WARMUP - 1
    new = torch.zeros(batch, 1, dtype=torch.long, device=bench.device)

    def step():
        nonlocal new
        new = decoder(model, new, cache).argmax(dim=-1, keepdim=True)  # (B, 1)

    began = time.perf_counter()
    for _ in range(WARMUP):
        step()
    startup = time.perf_counter() - began
    ms = bench.median(step, steps)
    workspace = 0
    if bench.cuda:
        workspace = (torch.cuda.max_memory_reserved() - reserved) / batch
    filled = counted * (1 - steps / 2 / context)  # in the middle of the measured steps
    return {
        **speed(bench, ms, batch, weight_bytes(model) + filled),
        "cache_bytes": measured,
        "counts_bytes": counted,
        "startup_s": startup,
        "workspace_bytes": workspace,
    }


def weight_bytes(model: torch.nn.Module) -> int:
    return sum(p.nbytes for p in model.parameters())


def speed(bench: Bench, ms: float, batch: int, read_bytes: float) -> dict:
    """Of a step that has to read so many bytes."""
    floor = 1000 * read_bytes / bench.bandwidth
    tokens_per_s = 1000 * batch / ms
    return dict(ms=ms, tokens_per_s=tokens_per_s, floor_ms=floor, floor_share=floor / ms)


def largest_batch(bench: Bench, model: GPT, kernel: str, context: int, workspace: float) -> dict:
    """The most sequences of `context` tokens that fit: each guess allocates their cache and takes
    one real step.
    """
    each = context * cache_bytes(model.cfg, itemsize(model))

    def left(batch: int) -> int:
        """Bytes that are left after a step of so many sequences; negative if they do not fit."""
        bench.clean()
        if not bench.cuda:
            return bench.free() - batch * each
        try:
            cache = KVCache(model, batch, context)
            cache.length = context - 1
            new = torch.zeros(batch, 1, dtype=torch.long, device=bench.device)
            Decoder(model, kernel)(model, new, cache)
            torch.cuda.synchronize()
            return bench.free()
        except RuntimeError as e:
            during_capture = "captur" in str(e)  # where memory that runs out has other words
            if not isinstance(e, torch.OutOfMemoryError) and not during_capture:
                raise
        return -1

    bench.clean()
    fits, too_many = 0, int(bench.free() // each) + 1
    per_sequence = each + workspace
    left_over = bench.free()  # beside `fits` sequences
    tries = 0
    while too_many - fits > 1:
        guess = min(fits + max(1, int(left_over / per_sequence)), too_many - 1)
        if tries > 4:
            guess = (fits + too_many) // 2
        tries += 1
        rest = left(guess)
        if rest >= 0:
            if fits:
                per_sequence = max(each, (left_over - rest) / (guess - fits))
            fits, left_over = guess, rest
        else:
            too_many = guess
            left_over *= 1 if fits else 0.9
    return {"batch": fits, "cache_bytes_per_sequence": each, "tries": tries}


def must(bench: Bench) -> None:
    batch, context = bench.must
    for attn, mode in bench.variants:
        reset_compiler()
        model = bench.model(bench.config(attn, mode))
        measured = {}
        for kernel in kernels_here(bench):
            row = dict(
                model="paper-1b", attn=attn, mode=mode, engine="ours", kernel=kernel, batch=batch,
                context=context,
            )  # fmt: skip
            row = bench.attempt(row, cell(bench, model, kernel, batch, context))
            if row:
                measured[kernel] = row
        if not measured:
            continue
        kernel = min(measured, key=lambda k: measured[k]["ms"])
        bench.fastest[attn, mode] = kernel
        workspace = measured[kernel]["workspace_bytes"]
        try:
            found = largest_batch(bench, model, kernel, context, workspace)
        except Exception as e:
            found = {"error": first_line(e)}
        bench.add(dict(attn=attn, mode=mode, context=context) | found, bench.largest)
        del model


def cell(bench: Bench, model: GPT, kernel: str, batch: int, context: int) -> Callable[[], dict]:
    return lambda: measure(bench, model, Decoder(model, kernel), batch, context)


def profile(bench: Bench) -> None:
    """Microseconds of every kernel in one step of the must cell, by name.

    "idle" is what no kernel accounts for.
    """
    batch, context = bench.must
    found = bench.found.setdefault("profile", {"batch": batch, "context": context, "steps": []})

    def step_of(attn: str, mode: str) -> dict:
        model = bench.model(bench.config(attn, mode))
        decoder = Decoder(model)
        cache = KVCache(model, batch, context)
        fill(cache)
        steps = 5
        new = torch.zeros(batch, 1, dtype=torch.long, device=bench.device)
        cache.length = context - 3 * steps
        ms = bench.median(lambda: decoder(model, new, cache), steps)
        groups, kernels = kernel_times(lambda: decoder(model, new, cache), steps)
        groups["idle"] = 1000 * ms - sum(groups.values())
        return dict(attn=attn, mode=mode, ms=ms, us=groups, kernels=kernels[:20], run=bench.run)

    for attn, mode in bench.variants:
        if attn not in ("mfa", "mfa_kr", "mla") or mode == "inverse":
            continue
        reset_compiler()
        try:
            step = step_of(attn, mode)
        except Exception as e:  # the other parts go on
            print(f"profile {attn} {mode}: {first_line(e)}", flush=True)
            continue
        others = [s for s in found["steps"] if (s["attn"], s["mode"]) != (attn, mode)]
        found["steps"] = [*others, step]
        bench.write()
        kinds = ", ".join(f"{kind} {us:,.0f} us" for kind, us in step["us"].items())
        print(f"{NAMES[attn, mode]}: {step['ms']:.2f} ms = {kinds}", flush=True)
        for k in step["kernels"][:12]:
            print(f"  {k['us']:8.1f} us {k['calls']:5.0f} x {k['name'][:90]}", flush=True)


def grid(bench: Bench) -> None:
    for attn, mode in bench.variants:
        kernel = bench.fastest.get((attn, mode)) or kernels_here(bench)[0]
        reset_compiler()
        cfg = bench.config(attn, mode)
        model = None
        # Batches of 1 last: they need a compilation of their own.
        batches = sorted(bench.args.batches or bench.batches, key=lambda b: (b == 1, b))
        for batch, context in itertools.product(batches, bench.contexts):
            if (batch, context) == bench.must and (attn, mode) in bench.fastest:
                continue  # measured just now
            if time.perf_counter() - bench.began > bench.args.seconds:
                here = f"{attn} {mode} {batch} x {context}"
                print(f"out of time: {here} and what follows is left out", flush=True)
                return
            model = model or bench.model(cfg)
            row = dict(
                model="paper-1b", attn=attn, mode=mode, engine="ours", kernel=kernel, batch=batch,
                context=context,
            )  # fmt: skip
            bench.clean()
            size = batch * context * cache_bytes(cfg, itemsize(model))
            if bench.cuda and size > 0.98 * bench.free():
                bench.add(row | {"error": "the cache does not fit"})
                continue
            bench.attempt(row, cell(bench, model, kernel, batch, context))
        del model


def reset_compiler() -> None:
    """Forget the last model's code: torch.compile gives up on a function compiled for many."""
    torch.compiler.reset()


# --------------------------------------------------------------------------------------------------
# Others


def llama(bench: Bench) -> None:
    """transformers' Llama, as generate() runs it with cache_implementation="static": compiled, its
    whole cache read.
    """
    try:
        from transformers import LlamaConfig, LlamaForCausalLM, StaticCache
    except ImportError:
        print("llama: transformers is not installed, left out", flush=True)
        return
    batch, context = bench.must

    def llama_cell(attn: str) -> dict:
        ours = bench.config(attn)
        cfg = LlamaConfig(
            vocab_size=ours.vocab_size,
            hidden_size=ours.dim,
            intermediate_size=ours.ffn,
            num_hidden_layers=ours.n_layer,
            num_attention_heads=ours.heads,
            num_key_value_heads=ours.n_kv_head if attn == "gqa" else ours.heads,
            head_dim=ours.head_dim,
            max_position_embeddings=ours.block_size,
            tie_word_embeddings=True,
            rope_theta=ours.rope_base,
            attn_implementation="sdpa",
        )
        torch.manual_seed(0)
        with bench.device:
            model = LlamaForCausalLM(cfg).to(bench.dtype).eval()
        before = bench.allocated()
        cache = StaticCache(config=cfg, max_cache_len=context)
        shape = batch, cfg.num_key_value_heads, cfg.head_dim
        cache.early_initialization(*shape, bench.dtype, bench.device)
        steps = min(bench.args.steps, context // 2 - WARMUP - 1)
        for layer in cache.layers:
            layer.keys.normal_()
            layer.values.normal_()
            layer.cumulative_length.fill_(context - steps - WARMUP - 1)
        size = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        taken = bench.allocated() - before if bench.cuda else size
        forward = model.forward
        if bench.cuda:
            forward = torch.compile(forward, mode="reduce-overhead")
        new = torch.zeros(batch, 1, dtype=torch.long, device=bench.device)

        def step():
            nonlocal new
            if bench.cuda:
                torch.compiler.cudagraph_mark_step_begin()
            logits = forward(input_ids=new, past_key_values=cache, use_cache=True).logits
            new = logits[:, -1].argmax(dim=-1, keepdim=True)

        began = time.perf_counter()
        with torch.no_grad():
            for _ in range(WARMUP):
                step()
            startup = time.perf_counter() - began
            ms = bench.median(step, steps)
        return {
            **speed(bench, ms, batch, weight_bytes(model) + size),
            "cache_bytes": taken,
            "counts_bytes": size,
            "startup_s": startup,
        }

    for attn in ("gqa", "mha"):
        reset_compiler()
        row = dict(
            model="paper-1b", attn=attn, mode="", engine="transformers", kernel="", batch=batch,
            context=context,
        )  # fmt: skip
        bench.attempt(row, lambda attn=attn: llama_cell(attn))


def baby(bench: Bench) -> None:
    """One text from one token on, as nanoGPT's sample.py does it: temperature 0.8, top_k 200."""
    smoke = bench.args.smoke
    length, context = (20, 32) if smoke else (500, 1024)
    sampling = dict(temperature=0.8, top_k=200)
    start = torch.zeros(1, 1, dtype=torch.long, device=bench.device)

    def timed(generate: Callable) -> dict:
        began = time.perf_counter()
        generate()
        generate()
        startup = time.perf_counter() - began
        seconds = bench.median(generate, 1 if smoke else 5) / 1000
        row = dict(ms=1000 * seconds / length, tokens_per_s=length / seconds)
        row |= dict(tokens=length, startup_s=startup)
        if bench.cuda:  # what the kernels take; the rest of ms the GPU waits for the host
            row["gpu_ms"] = sum(kernel_times(generate, 1)[0].values()) / 1000 / length
        return row

    def ours(cfg: Config, **how) -> dict:
        model = bench.model(cfg)
        decoder = Decoder(model, **how) if how else None
        with attention_kernels(bench.device, decoding=True):
            result = timed(lambda: list(stream(model, start, length, **sampling, decode=decoder)))
        result["counts_bytes"] = context * cache_bytes(cfg, itemsize(model))
        if decoder:
            result["captures"] = decoder.captures
        return result

    def nanogpt() -> dict:
        path = bench.args.nanogpt / "model.py"
        spec = importlib.util.spec_from_file_location("nanogpt_model", path)
        module = sys.modules["nanogpt_model"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        torch.manual_seed(0)
        sizes = dict(n_layer=6, n_head=6, n_embd=384)
        if smoke:
            sizes = dict(n_layer=2, n_head=2, n_embd=32)
        fixed = dict(block_size=context, vocab_size=65, dropout=0.0, bias=False)
        model = module.GPT(module.GPTConfig(**fixed, **sizes)).to(bench.device).eval()
        autocast = torch.autocast(bench.device.type, torch.bfloat16, enabled=bench.cuda)

        def generate():
            with torch.no_grad(), autocast:
                model.generate(start, length, **sampling)

        tf32 = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = True  # as its sample.py
        try:
            return timed(generate)
        finally:
            torch.backends.cuda.matmul.allow_tf32 = tf32

    row = dict(model="baby", attn="mha", mode="", kernel="", batch=1, context=context)
    if bench.args.nanogpt:
        bench.attempt(row | {"engine": "nanogpt"}, nanogpt)
    else:
        print("baby: without --nanogpt nothing to compare with", flush=True)
    sizes = dict(block_size=context)
    if smoke:
        sizes |= dict(n_layer=2, dim=32, head_dim=16)
    ways = {"eager": {}, "steps": dict(compiled=False)}
    if bench.cuda:
        ways = {
            "graphs, compiled": dict(compiled=True),
            "graphs": dict(compiled=False),
            "eager": {},
        }
    for attn, mode in (("mfa", ""), ("mha", ""), ("mfa_kr", "pre"), ("mfa_kr", "post")):
        if (attn, mode) not in bench.variants:
            continue
        fields = sizes | ({"key_reuse_rope": mode} if mode else {})
        cfg = preset("baby", attn, **fields)
        for kernel, how in ways.items():
            reset_compiler()
            named = row | dict(attn=attn, mode=mode, engine="ours", kernel=kernel)
            bench.attempt(named, lambda cfg=cfg, how=how: ours(cfg, **how))


def tiny(bench: Bench) -> None:
    """train.py's default model with a context of 512, on this CPU: a text that fills it."""
    context = 32 if bench.args.smoke else 512
    start = torch.zeros(1, 1, dtype=torch.long)
    for attn in ("mfa", "mha", "mfa_kr"):
        torch.manual_seed(0)
        model = GPT(preset("tiny", attn, block_size=context)).eval()
        for cached in (True, False):

            def work(model=model, cached=cached):
                model.generate(start, context - 1, temperature=0, use_cache=cached)

            ms = bench.median(work, 3 if cached else 1) / (context - 1)
            row = dict(
                model="tiny", attn=attn, mode="pre" if attn == "mfa_kr" else "",
                engine="ours" if cached else "ours, no cache", kernel="eager", batch=1,
                context=context, ms=ms, tokens_per_s=1000 / ms,
                counts_bytes=context * cache_bytes(model.cfg, itemsize(model)) if cached else 0,
            )  # fmt: skip
            bench.add(row)


# --------------------------------------------------------------------------------------------------
# Attention alone

CUT = ("BYTES_PER_STEP", "NUM_WARPS", "NUM_STAGES", "PROGRAMS_PER_SM")  # in support/decode.py


def cut_kernel(constants: tuple[int, ...]) -> None:
    for name, value in zip(CUT, constants, strict=True):
        setattr(engine, name, value)


def kernels(bench: Bench) -> None:
    """Every way to attend on one layer of the must cell: milliseconds, share of the bandwidth."""
    bench.found["kernels"] = table = []
    for attn, mode in bench.variants:
        if mode == "inverse":
            continue  # as post
        with bench.device:
            layer = ATTENTION[attn](bench.config(attn, mode)).to(bench.dtype).eval()
        # Each set of constants takes a compilation of a second: all of them for some.
        every = mode in ("pre", "post") or attn in ("mfa", "mha")
        table += kernels_of(bench, layer, spelled((attn, mode)), attn, mode, every)
        bench.clean()
    bench.write()
    shares = {}
    for row in table:
        if "ms" in row and row["what"].startswith("triton"):
            shares.setdefault(row["what"], []).append(row["floor_share"])
    for what in sorted(shares, key=lambda what: -min(shares[what]))[:5]:
        least, mean = min(shares[what]), statistics.mean(shares[what])
        print(f"least share {least:.1%}, mean {mean:.1%}: {what}")


def kernels_of(
    bench: Bench, layer: Attention, name: str, attn: str, mode: str, every: bool
) -> list[dict]:
    batch, context = bench.must
    like = dict(dtype=bench.dtype, device=bench.device)
    cached = [torch.randn(batch, g, context, w, **like) for g, w in layer.cache_shapes]
    keys, _ = keys_and_values(layer, [t[:, :, :1] for t in cached])
    q = torch.randn(batch, layer.n_head, 1, sum(k.shape[-1] for k in keys), **like)
    pos = torch.tensor([context - 1], device=bench.device)
    floor = 1000 * sum(t.nbytes for t in cached) / bench.bandwidth
    angles = None
    if engine.rotates_on_read(layer):
        angles = engine.rotary_table(layer, context, q)
    rows = []

    def report(what: str, work: Callable, n: int = 20) -> None:
        row = dict(attn=attn, mode=mode, what=what)
        try:
            with torch.no_grad():
                ms = bench.median(work, n)
            row |= dict(ms=ms, floor_share=floor / ms)
            print(f"{name:10} {what:60} {ms:8.3f} ms {floor / ms:6.1%}", flush=True)
        except Exception as e:
            row["error"] = first_line(e)
            print(f"{name:10} {what:60} {row['error'][:120]}", flush=True)
        rows.append(row)

    if "triton" in kernels_here(bench):
        usual = tuple(getattr(engine, name) for name in CUT)
        others = itertools.product((16384, 32768, 65536), (4, 8), (3, 4), (1, 2, 3, 4))
        for constants in others if every else [usual]:
            cut_kernel(constants)
            words = " ".join(f"{name} {value}" for name, value in zip(CUT, constants, strict=True))
            report(f"triton {words}", lambda: attend_triton(layer, q, cached, pos, angles))
        cut_kernel(usual)
    backends = (
        SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION,
    )  # fmt: skip
    for backend in backends:
        with sdpa_kernel(backend):
            report(backend.name.lower(), lambda: attend_sdpa(layer, q, cached, context))
    lengths = iter(range(context - 100, context))
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        what = "cudnn_attention, another length each time"
        report(what, lambda: attend_sdpa(layer, q, cached, next(lengths)), 5)
    return rows


# --------------------------------------------------------------------------------------------------
# What is shown


def quickest(rows: list[dict], **wanted) -> dict | None:
    """The row with the least time among those that match."""
    rows = [r for r in rows if "ms" in r and all(r.get(k) == v for k, v in wanted.items())]
    return min(rows, key=lambda r: r["ms"]) if rows else None


def grid_tables(found: dict) -> str:
    """Everything measured at the paper's 1B shape, in Markdown, a table for each batch: tokens/s
    and the share of the floor.
    """
    rows = [r for r in found.get("rows", []) if r["model"] == "paper-1b"]
    contexts = sorted({r["context"] for r in rows})
    names = {("ours", *variant): name for variant, name in NAMES.items()}
    if any(r["engine"] == "transformers" for r in rows):
        for attn in ("mha", "gqa"):
            names["transformers", attn, ""] = f"transformers' Llama, {attn.upper()}"
    lines = []
    for batch in sorted({r["batch"] for r in rows}):
        head = " | ".join(f"{context:,}" for context in contexts)
        lines += ["", f"| batch {batch}: tokens/s (share of the floor) | {head} |"]
        lines.append("|---" + "|---:" * len(contexts) + "|")
        for (engine_name, attn, mode), name in names.items():
            wanted = dict(engine=engine_name, attn=attn, mode=mode, batch=batch)
            cells = [grid_cell(rows, wanted | {"context": context}) for context in contexts]
            if set(cells) != {"–"}:
                lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines).strip() or "not measured"


def grid_cell(rows: list[dict], wanted: dict) -> str:
    row = quickest(rows, **wanted)
    if row:
        return f"{row['tokens_per_s']:,.0f} ({row['floor_share']:.0%})"
    errors = [r.get("error") for r in rows if wanted.items() <= r.items()]
    return "full" if "the cache does not fit" in errors else "–"


def table(bench: Bench) -> None:
    """The must-show figures, from the file: also those of earlier runs."""
    batch, context = bench.must
    cell = dict(model="paper-1b", batch=batch, context=context)
    found = {}
    for attn, mode in VARIANTS:
        found[attn, mode] = quickest(bench.rows, **cell, attn=attn, mode=mode, engine="ours")
    largest = {(r["attn"], r["mode"]): r["batch"] for r in bench.largest if "batch" in r}
    if any(found.values()):
        columns = "ms    floor  share   tokens/s  cache = counts  largest batch"
        print(f"\nbatch {batch} at {context} tokens{'':10} {columns}")
    for variant, row in found.items():
        if row:
            same = "yes" if row["cache_bytes"] == row["counts_bytes"] else "NO"
            print(
                f"{NAMES[variant]:16} {row['kernel']:8} {row['ms']:14.2f} {row['floor_ms']:8.2f} "
                f"{row['floor_share']:6.0%} {row['tokens_per_s']:10,.0f}  {same:>14}  "
                f"{largest.get(variant, ''):>13}"
            )
    speeds = {variant: row["tokens_per_s"] for variant, row in found.items() if row}
    for attn in ("gqa", "mha"):
        row = quickest(bench.rows, **cell, attn=attn, engine="transformers")
        if row:
            tokens_per_s = row["tokens_per_s"]
            print(f"transformers' Llama {attn}: {row['ms']:.2f} ms, {tokens_per_s:,.0f} tokens/s")
            speeds["llama " + attn] = tokens_per_s

    def ratio(what: str, a, b, figures: dict) -> None:
        if figures.get(a) and figures.get(b):
            print(f"{what}: {figures[a] / figures[b]:.2f}")

    mfa, mha = ("mfa", ""), ("mha", "")
    ratio("MFA / MHA, tokens/s (5 wanted)", mfa, mha, speeds)
    ratio("MFA / transformers' Llama GQA, tokens/s (1.5 wanted)", mfa, "llama gqa", speeds)
    ratio("MFA / MHA, largest batch (7 wanted)", mfa, mha, largest)
    for mode in ("post", "inverse", "pre"):
        what = f"MFA-KR {mode} / MHA, largest batch (13 wanted of post and inverse)"
        ratio(what, ("mfa_kr", mode), mha, largest)

    nanogpt = quickest(bench.rows, model="baby", engine="nanogpt")
    for row in bench.rows:
        if row["model"] != "baby" or "ms" not in row:
            continue
        words = f"{row['tokens_per_s']:,.0f} tokens/s"
        if nanogpt:
            times = row["tokens_per_s"] / nanogpt["tokens_per_s"]
            words += f", {times:.1f} times nanoGPT (10 wanted)"
        if "gpu_ms" in row:
            words += f", the GPU is busy {row['gpu_ms'] / row['ms']:.0%} of the time"
        print(f"baby {row['engine']} {row['attn']} {row['kernel']}: {words}")
    for attn in ("mfa", "mha", "mfa_kr"):
        cached = quickest(bench.rows, model="tiny", attn=attn, engine="ours")
        uncached = quickest(bench.rows, model="tiny", attn=attn, engine="ours, no cache")
        if cached and uncached:
            times = uncached["ms"] / cached["ms"]
            what = f"cached {times:.1f} times uncached, {cached['context']} tokens (4 wanted)"
            print(f"tiny {attn}: {what}")
    for row in bench.rows + bench.largest:
        if "error" in row and row["error"] != "the cache does not fit":
            print("failed:", " ".join(str(v) for k, v in row.items() if k != "run"))


def plot(bench: Bench) -> None:
    """decode_tokens.png and decode_largest.png."""
    found = bench.found | {"rows": bench.rows, "largest_batch": bench.largest, "runs": bench.runs}
    for name, figure in plots(found).items():
        figure.savefig(bench.args.results.with_name(f"{name}.png"), dpi=100)


def plots(found: dict) -> dict:
    """The figures of a results file, by the names of their files."""
    drawn = dict(decode_tokens=tokens_plot(found), decode_largest=largest_plot(found))
    return {name: figure for name, figure in drawn.items() if figure}


def tokens_plot(found: dict):
    """Tokens/s against context, for a small and a large batch."""
    from matplotlib.figure import Figure

    rows = [r for r in found["rows"] if r["model"] == "paper-1b" and "ms" in r]
    if not rows:
        return None
    run = found.get("runs", {}).get(rows[0].get("run"), found)
    measured = sorted({r["batch"] for r in rows})
    batches = [b for b in (1, 32) if b in measured] or measured[:2]
    figure = Figure(figsize=(5.6 * len(batches), 5), layout="constrained")
    axes = figure.subplots(1, len(batches), squeeze=False)[0]
    for axis, batch in zip(axes, batches, strict=True):
        plot_speed(axis, [r for r in rows if r["batch"] == batch], batch)
    bandwidth = f"copy bandwidth {run['bandwidth'] / 1e12:.2f} TB/s"
    title = f"Decoding, paper-1b in bf16, {run['device']}, {bandwidth}"
    figure.suptitle(title, fontsize=12)
    return figure


# One line an attention: MFA-KR's quickest mode stands for it, and RESULTS.md has the others.
LINES = {
    ("mha", ""): "MHA", ("gqa", ""): "GQA", ("mqa", ""): "MQA", ("mla", "joint"): "MLA",
    ("mfa", ""): "MFA", ("mfa_kr", "post"): "MFA-KR",
}  # fmt: skip


def plot_speed(axis, rows: list[dict], batch: int) -> None:
    """Tokens/s of one batch against context, a line for each of LINES and a mark for each Llama.

    A name stands at the end of its line, or at its mark.
    """
    from matplotlib.ticker import LogLocator

    contexts = sorted({r["context"] for r in rows})
    ends = []  # (attention, name, context, tokens/s)
    for (attn, mode), name in LINES.items():
        of = dict(attn=attn, mode=mode, engine="ours")
        points = [row for c in contexts if (row := quickest(rows, context=c, **of))]
        if points:
            axis.plot(
                [r["context"] for r in points],
                [r["tokens_per_s"] for r in points],
                marker=palette.MARKER[attn], ms=7, lw=2, color=palette.COLOR[attn],
            )  # fmt: skip
            ends.append((attn, name, points[-1]["context"], points[-1]["tokens_per_s"]))
    for attn, marker in (("mha", "x"), ("gqa", "+")):
        for row in rows:
            if (row["engine"], row["attn"]) == ("transformers", attn):
                color, name = palette.COLOR[attn], f"transformers' Llama, {attn.upper()}"
                point = row["context"], row["tokens_per_s"]
                axis.plot(*point, marker, ms=9, mew=2, color=color)
                place = dict(xytext=(-9, 0), textcoords="offset points", ha="right", va="center")
                axis.annotate(name, point, **place, fontsize=10, color=color)
    axis.set(xscale="log", yscale="log")
    axis.set_title(f"batch {batch}", fontsize=13)
    axis.set_xlabel("context, tokens", fontsize=12)
    axis.set_ylabel("tokens per second", fontsize=12)
    axis.tick_params(labelsize=11)
    axis.set_xlim(contexts[0] / 1.3, contexts[-1] * (contexts[-1] / contexts[0] + 1) ** 0.33)
    write_names(axis, ends)
    axis.set_xticks(contexts, [f"{c // 1024}k" if c >= 1024 else str(c) for c in contexts])
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter("{x:,.0f}")
    axis.minorticks_off()
    axis.grid(alpha=0.3)


def write_names(axis, ends: list[tuple[str, str, int, float]]) -> None:
    """Each name right of its line's end, and no closer to the next than a line of text."""
    low, high = axis.get_ylim()
    gap = (high / low) ** 0.055
    below = {}  # the last place taken, by context
    for attn, name, context, speed in sorted(ends, key=lambda end: end[-1]):
        place = max(speed, below.get(context, 0) * gap)
        below[context] = place
        text = dict(fontsize=12, va="center", color=palette.COLOR[attn])
        axis.annotate(name, (context, place), (7, 0), textcoords="offset points", **text)


def largest_plot(found: dict):
    """The most sequences that fit, as bars."""
    from matplotlib.figure import Figure

    largest = [r for r in found["largest_batch"] if "batch" in r]
    if not largest:
        return None
    largest.sort(key=lambda r: r["batch"])
    figure = Figure(figsize=(7, 3.4), layout="constrained")
    axis = figure.subplots()
    # MFA-KR's three modes cache as much, and fit as often.
    bars = {}
    for r in largest:
        name = NAMES[r["attn"], r["mode"]]
        if r["attn"] == "mfa_kr" and (r["attn"], r["batch"]) in bars:
            name = palette.NAME["mfa_kr"]
        bars[r["attn"], r["batch"]] = name
    colors = [palette.COLOR[attn] for attn, _ in bars]
    drawn = axis.barh([*bars.values()], [batch for _, batch in bars], color=colors)
    axis.bar_label(drawn, padding=3)
    what = f"sequences of {largest[0]['context']:,} tokens decoded together"
    axis.set(xlabel=what, xmargin=0.1)
    axis.set_title(f"Largest batch that fits beside paper-1b, {found['device']}", fontsize=10)
    return figure


# --------------------------------------------------------------------------------------------------

PARTS = dict(
    kernels=kernels, must=must, profile=profile, baby=baby, llama=llama, grid=grid, tiny=tiny,
    plot=plot,
)  # fmt: skip


def parts_of(args: Args) -> tuple[str, ...]:
    if args.part:
        return args.part
    if args.device == "cpu":
        return ("tiny",)
    return ("must", "profile", "baby", "llama", "grid", "plot")


def results_of(args: Args) -> Path:
    """A CPU's figures do not replace the committed ones, unless --results asks for it."""
    if args.results:
        return args.results
    measures = set(parts_of(args)) != {"plot"}
    return RESULTS_OF_A_CPU if args.device == "cpu" and measures else RESULTS


def check(args: Args) -> None:
    if args.device != "cpu" and not args.device.startswith("cuda"):
        raise BadInput(f"--device must be cpu or cuda, not {args.device!r}")
    if args.device != "cpu" and not torch.cuda.is_available():
        raise BadInput(f"--device {args.device}: no such device here; use cpu")
    require_other_results(replace(args, results=args.results or RESULTS), RESULTS)
    known = [spelled(v) for v in VARIANTS]
    for name in args.only:
        if name not in known:
            raise BadInput(f"--only {name!r}: take any of {', '.join(known)}")
    if any(batch < 1 for batch in args.batches):
        raise BadInput(f"--batches must be positive, not {args.batches}")
    require_at_least_1(args, "steps")
    if args.nanogpt and not (args.nanogpt / "model.py").is_file():
        what = "no model.py there; name the folder of a nanoGPT checkout"
        raise BadInput(f"--nanogpt {args.nanogpt}: {what}")
    parts = parts_of(args)
    slow = [part for part in parts if part not in ("tiny", "plot")]
    if args.device == "cpu" and slow and not args.smoke:
        what = "these need a GPU; on a CPU there are tiny and plot"
        raise BadInput(f"--part {' '.join(slow)}: {what}")
    if parts == ("plot",) and not results_of(args).is_file():
        raise BadInput(f"--part plot: {results_of(args)} is not there; measure first")


def main(args: Args) -> None:
    check(args)
    args = replace(args, results=results_of(args))
    bench = Bench(args)
    for name, part in PARTS.items():
        if name in parts_of(args):
            began = time.perf_counter()
            part(bench)
            print(f"{name}: {time.perf_counter() - began:.0f} s", flush=True)
    table(bench)
    if args.results == RESULTS_OF_A_CPU:
        print(f"in {args.results}; --results {RESULTS.relative_to(ROOT)} adds to the committed")


if __name__ == "__main__":
    run_command(main, Args)
