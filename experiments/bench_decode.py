"""How fast a token is decoded, and how many texts fit: python experiments/bench_decode.py --nanogpt FOLDER

Parts, in the order in which they run (--part picks some):

    kernels   not by default: attention alone, experiments/decode.py's kernel with other constants, and PyTorch's backends
    must      paper-1b with random weights in bf16, every attention: batch 32 at a context of 16,384, and the largest batch
    profile   where a step's time goes in the must cell: every kernel of four attentions
    baby      one text of 500 tokens at a context of 1,024, against nanoGPT's own generate(), if --nanogpt names its folder
    llama     transformers' Llama of the same dimensions, its static cache and torch.compile, if it is installed
    grid      batch 1, 8, 32 and 128 at contexts of 1k to 64k, where they fit
    tiny      on a CPU: 512 tokens with the cache and without
    plot      two pictures from the results

A cell's cache is filled with random numbers, which cost the same as any, and decoding goes on from there, greedily, for some
steps: ms is the median. The floor is the time to read the weights and the filled part of the cache once, at the bandwidth
of a large copy measured in the same run; floor_share is floor over median. A cell that fails is recorded with its error.
Results are written after each; a later run replaces the rows that it measures again.
"""

import gc
import importlib.util
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import decode as engine
import torch
from decode import Decoder, attend_sdpa, attend_triton, read, rotary_table, rotates
from gpu_time import kernel_times
from provenance import ROOT, provenance, read_json
from torch.nn.attention import SDPBackend, sdpa_kernel

from mfa import ATTENTION, GPT, Config, KVCache, preset
from prepare_data import BadInput, run_command
from train import attention_kernels

RESULTS = ROOT / "experiments" / "results" / "decode.json"
# (attention, mode): the three that the targets name come first. Mode: MFA-KR's key_reuse_rope, MLA's joint latent.
VARIANTS = [
    ("mfa", ""), ("mha", ""), ("gqa", ""), ("mfa_kr", "post"), ("mfa_kr", "inverse"), ("mfa_kr", "pre"), ("mla", "joint"),
    ("mqa", ""),
]  # fmt: skip
WARMUP = 3  # steps before the measured ones; the first compiles and captures


@dataclass
class Args:
    """Measure decoding: time per step, cache, largest batch, beside transformers' Llama and nanoGPT."""

    part: tuple[Literal["must", "profile", "baby", "llama", "grid", "tiny", "plot", "kernels"], ...] = ()
    """Which parts; default: all but kernels and tiny on a GPU, tiny on a CPU."""
    only: tuple[str, ...] = ()
    """Only these attentions, as "mfa" or "mfa_kr post"; default: all."""
    batches: tuple[int, ...] = ()
    """Only these batch sizes of the grid; default: all."""
    nanogpt: Path | None = None
    """Folder of a nanoGPT checkout (its model.py is used)."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """cuda or cpu."""
    results: Path = RESULTS
    """JSON that is read, completed and written; the pictures go beside it."""
    seconds: float = 330
    """No cell of the grid begins after this many seconds."""
    steps: int = 30
    """Measured steps a cell."""
    smoke: bool = False
    """Toy sizes, seconds on a CPU: does it run? Needs --results elsewhere."""


class Bench:
    """Sizes, the results file, and what every measurement needs."""

    def __init__(self, args: Args):
        self.args, self.began = args, time.perf_counter()
        self.device, self.cuda = torch.device(args.device), args.device.startswith("cuda")
        self.dtype = torch.bfloat16 if self.cuda else torch.float32
        self.variants = [v for v in VARIANTS if not args.only or " ".join(v).strip() in args.only]
        self.must = (32, 16384) if not args.smoke else (2, 48)
        self.batches, self.contexts = ((1, 8, 32, 128), (1024, 4096, 16384, 65536)) if not args.smoke else ((1, 2), (32,))
        self.fastest: dict[tuple[str, str], str] = {}  # (attn, mode) -> the faster way to attend, seen in the must part
        self.found = read_json(args.results)
        self.rows, self.largest = self.found.get("rows", []), self.found.get("largest_batch", [])
        self.here = provenance(args.device)
        self.bandwidth = self.copy_bandwidth()
        self.here["bandwidth"] = self.bandwidth
        self.run = f"{self.here['date']} {time.strftime('%H:%M:%S', time.gmtime())}"  # names this run in its rows
        self.runs = self.found.get("runs", {}) | {self.run: self.here}
        if self.cuda or "command" not in self.found:  # a CPU's rows stand beside a GPU's, which the file is about
            self.found |= self.here
        print(f"{self.here['device']}: copy bandwidth {self.bandwidth / 1e12:.3f} TB/s", flush=True)

    # -- measuring

    def copy_bandwidth(self) -> float:
        """Bytes/s read plus written by a copy far larger than any cache."""
        source = torch.empty(2**31 if self.cuda else 2**25, dtype=torch.uint8, device=self.device).random_()
        target = torch.empty_like(source)
        ms = self.median(lambda: target.copy_(source), 10)
        return 2 * source.nbytes / (ms / 1000)

    def median(self, work: Callable, n: int) -> float:
        """Median milliseconds of n calls, one behind the other: the host does not wait between them."""
        work()
        if not self.cuda:
            times = [time.perf_counter()]
            for _ in range(n):
                work()
                times.append(time.perf_counter())
            return 1000 * statistics.median(b - a for a, b in zip(times, times[1:], strict=False))
        events = [torch.cuda.Event(enable_timing=True) for _ in range(n + 1)]
        events[0].record()
        for event in events[1:]:
            work()
            event.record()
        torch.cuda.synchronize()
        return statistics.median(a.elapsed_time(b) for a, b in zip(events, events[1:], strict=False))

    def clean(self) -> None:
        """Give back the memory of what is no longer used; raises if a kernel has broken the device."""
        if self.cuda:
            gc.collect()
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def allocated(self) -> int:
        """Bytes asked of PyTorch's allocator and not given back; it may round up what it hands out."""
        return torch.cuda.memory_stats()["requested_bytes.all.current"] if self.cuda else 0

    def free(self) -> int:
        """Bytes that may be allocated; on a CPU, where only --smoke comes here, a megabyte."""
        return torch.cuda.mem_get_info()[0] if self.cuda else 2**20

    def config(self, attn: str, mode: str = "") -> Config:
        """paper-1b, or a toy of the same kind; the context allows for the longest cell."""
        lite = dict(
            joint_kv=True, latent_dim=512, compress_query=False, latent_norm=True
        )  # Figure 1's MLA, as in DeepSeek-V2-Lite
        fields = {"mfa_kr": {"key_reuse_rope": mode or "pre"}, "mla": lite if mode == "joint" else {}}.get(attn, {})
        fields["block_size"] = max(*self.contexts, self.must[1])
        if self.args.smoke:
            fields |= dict(n_layer=2, dim=64, head_dim=16, latent_dim=16, rope_dim=8, mfa_n_head=3, ffn_dim=64, vocab_size=64)
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
        keys = ["model", "attn", "mode", "engine", "kernel", "context"] + ["batch"] * (to is self.rows)
        to[:] = [r for r in to if any(r.get(k) != row.get(k) for k in keys)]
        to.append(row | {"run": self.run})
        self.write()
        print(" ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items() if v != ""), flush=True)

    def write(self) -> None:
        """The file, at once or not at all."""
        used = {r["run"] for r in self.rows + self.largest}
        used |= {step["run"] for step in self.found.get("profile", {"steps": []})["steps"]}
        runs = {k: v for k, v in self.runs.items() if k in used}
        result = self.found | {"rows": self.rows, "largest_batch": self.largest, "runs": runs}
        path = self.args.results
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        part.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        os.replace(part, path)

    def attempt(self, row: dict, work: Callable[[], dict]) -> dict | None:
        """Add the row with what work() measures, or with its error. None after an error."""
        error = None
        try:
            row = row | work()
        except Exception as e:  # a cell that fails must not take the others with it
            error = f"{type(e).__name__}: {str(e).strip().splitlines()[0][:200] if str(e).strip() else ''}"
        self.add(row if error is None else row | {"error": error})
        self.clean()  # outside the handler, whose traceback holds the tensors
        return None if error else row


# ---------------------------------------------------------------------------------------------------------------------
# Decoding with this project's models


def kernels_for(bench: Bench, attn: str, mode: str) -> list[str]:
    """The ways to attend that decode.py has for this attention here; see Decoder."""
    if not bench.cuda or engine.triton is None:
        return ["sdpa"]
    return ["triton", "sdpa"]


def measure(bench: Bench, model: GPT, decoder: Decoder, batch: int, context: int) -> dict:
    """One cell: what a row says beyond its name. workspace_bytes: what a sequence takes while decoding besides its cache."""
    cfg, steps, before = model.cfg, min(bench.args.steps, context // 2 - WARMUP - 1), bench.allocated()
    cache = KVCache(model, batch, context)
    measured = bench.allocated() - before if bench.cuda else cache.nbytes()
    size = cache.layers[0][0].element_size()
    counted = cfg.n_layer * batch * context * ATTENTION[cfg.attn].counts(cfg).kv_cache * size
    reserved = torch.cuda.memory_reserved() if bench.cuda else 0
    for kept in (t for layer in cache.layers for t in layer):
        kept.normal_()
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
    weights = sum(p.nbytes for p in model.parameters())
    filled = counted / context * (context - steps / 2)  # in the middle of the measured steps
    floor = 1000 * (weights + filled) / bench.bandwidth
    return {
        "ms": ms, "tokens_per_s": 1000 * batch / ms, "cache_bytes": measured, "counts_bytes": counted, "floor_ms": floor,
        "floor_share": floor / ms, "startup_s": startup,
        "workspace_bytes": (torch.cuda.max_memory_reserved() - reserved) / batch if bench.cuda else 0,
    }  # fmt: skip


def largest_batch(bench: Bench, model: GPT, kernel: str, context: int, workspace: float) -> dict:
    """The most sequences of `context` tokens that fit: each guess allocates their cache and takes one real step."""
    cfg = model.cfg
    each = cfg.n_layer * context * ATTENTION[cfg.attn].counts(cfg).kv_cache * model.embed.weight.element_size()

    def left(batch: int) -> int:
        """Bytes that are left after a step of so many sequences; negative if they do not fit."""
        bench.clean()
        if not bench.cuda:
            return bench.free() - batch * each
        try:
            cache = KVCache(model, batch, context)
            cache.length = context - 1
            Decoder(model, kernel)(model, torch.zeros(batch, 1, dtype=torch.long, device=bench.device), cache)
            torch.cuda.synchronize()
            return bench.free()
        except RuntimeError as e:
            if not isinstance(e, torch.OutOfMemoryError) and "captur" not in str(e):  # memory that ran out during a capture
                raise
        return -1

    bench.clean()
    low, high = 0, int(bench.free() // each) + 1  # low fits, high does not
    per, last, tries = each + workspace, bench.free(), 0  # per: bytes that one more sequence takes; last: left at low
    while high - low > 1:
        guess = min(low + max(1, int(last / per)), high - 1)
        if tries > 4:
            guess = (low + high) // 2
        tries += 1
        if (rest := left(guess)) >= 0:
            per = max(each, (last - rest) / (guess - low)) if low else per
            low, last = guess, rest
        else:
            high, last = guess, last if low else 0.9 * last
    return {"batch": low, "cache_bytes_per_sequence": each, "tries": tries}


def must(bench: Bench) -> None:
    for attn, mode in bench.variants:
        reset_compiler()
        model = bench.model(bench.config(attn, mode))
        batch, context = bench.must
        times = {}
        for kernel in kernels_for(bench, attn, mode):
            row = dict(model="paper-1b", attn=attn, mode=mode, engine="ours", kernel=kernel, batch=batch, context=context)
            row = bench.attempt(row, lambda m=model, k=kernel, b=batch, c=context: measure(bench, m, Decoder(m, k), b, c))
            if row:
                times[kernel] = row["ms"], row["workspace_bytes"]
        if not times:
            continue
        bench.fastest[attn, mode] = kernel = min(times, key=times.get)
        try:
            found = largest_batch(bench, model, kernel, context, times[kernel][1])
        except Exception as e:
            found = {"error": f"{type(e).__name__}: {e}"[:200]}
        bench.add(dict(attn=attn, mode=mode, context=context) | found, bench.largest)
        del model


def profile(bench: Bench) -> None:
    """Microseconds of every kernel in one step of the must cell, by name; "idle" is what no kernel accounts for."""
    batch, context = bench.must
    found = bench.found.setdefault("profile", {"batch": batch, "context": context, "steps": []})

    def step_of(attn: str, mode: str) -> dict:
        model = bench.model(bench.config(attn, mode))
        decoder, cache = Decoder(model), KVCache(model, batch, context)
        for kept in (t for layer in cache.layers for t in layer):
            kept.normal_()
        new, steps = torch.zeros(batch, 1, dtype=torch.long, device=bench.device), 5
        cache.length = context - 3 * steps
        ms = bench.median(lambda: decoder(model, new, cache), steps)
        groups, kernels = kernel_times(lambda: decoder(model, new, cache), steps)
        groups["idle"] = 1000 * ms - sum(groups.values())
        return dict(attn=attn, mode=mode, ms=ms, us=groups, kernels=kernels[:20], run=bench.run)

    for attn, mode in [v for v in bench.variants if v[0] in ("mfa", "mfa_kr", "mla") and v[1] != "inverse"]:
        reset_compiler()
        try:
            step = step_of(attn, mode)
        except Exception as e:  # the other parts go on
            print(f"profile {attn} {mode}: {type(e).__name__}: {str(e)[:200]}", flush=True)
            continue
        found["steps"] = [s for s in found["steps"] if (s["attn"], s["mode"]) != (attn, mode)] + [step]
        bench.write()
        kinds = ", ".join(f"{kind} {us:,.0f} us" for kind, us in step["us"].items())
        print(f"{NAMES[attn, mode]}: {step['ms']:.2f} ms = {kinds}", flush=True)
        for k in step["kernels"][:12]:
            print(f"  {k['us']:8.1f} us {k['calls']:5.0f} x {k['name'][:90]}", flush=True)


def grid(bench: Bench) -> None:
    for attn, mode in bench.variants:
        kernel = bench.fastest.get((attn, mode)) or kernels_for(bench, attn, mode)[0]
        reset_compiler()
        model = None
        # Batches of 1 last: they need a compilation of their own.
        for batch in sorted(bench.args.batches or bench.batches, key=lambda b: (b == 1, b)):
            for context in bench.contexts:
                cfg = bench.config(attn, mode)
                row = dict(model="paper-1b", attn=attn, mode=mode, engine="ours", kernel=kernel, batch=batch, context=context)
                if (batch, context) == bench.must and (attn, mode) in bench.fastest:
                    continue  # measured just now
                if time.perf_counter() - bench.began > bench.args.seconds:
                    print(f"out of time: {attn} {mode} {batch} x {context} and what follows is left out", flush=True)
                    return
                model = model or bench.model(cfg)
                each = cfg.n_layer * context * ATTENTION[attn].counts(cfg).kv_cache * model.embed.weight.element_size()
                bench.clean()
                if bench.cuda and batch * each > 0.98 * bench.free():
                    bench.add(row | {"error": "the cache does not fit"})
                    continue
                bench.attempt(row, lambda m=model, k=kernel, b=batch, c=context: measure(bench, m, Decoder(m, k), b, c))
        del model


def reset_compiler() -> None:
    """Forget the last model's code: torch.compile gives up on a function that has been compiled for many."""
    torch.compiler.reset()


# ---------------------------------------------------------------------------------------------------------------------
# Others


def llama(bench: Bench) -> None:
    """transformers' Llama, as generate() runs it with cache_implementation="static": compiled, its whole cache read."""
    try:
        from transformers import LlamaConfig, LlamaForCausalLM, StaticCache
    except ImportError:
        print("llama: transformers is not installed, left out", flush=True)
        return
    batch, context = bench.must

    def cell(attn: str) -> dict:
        ours = bench.config(attn)
        cfg = LlamaConfig(
            vocab_size=ours.vocab_size, hidden_size=ours.dim, intermediate_size=ours.ffn, num_hidden_layers=ours.n_layer,
            num_attention_heads=ours.heads, num_key_value_heads=ours.n_kv_head if attn == "gqa" else ours.heads,
            head_dim=ours.head_dim, max_position_embeddings=ours.block_size, tie_word_embeddings=True,
            rope_theta=ours.rope_base, attn_implementation="sdpa",
        )  # fmt: skip
        torch.manual_seed(0)
        with bench.device:
            model = LlamaForCausalLM(cfg).to(bench.dtype).eval()
        before = bench.allocated()
        cache = StaticCache(config=cfg, max_cache_len=context)
        cache.early_initialization(batch, cfg.num_key_value_heads, cfg.head_dim, bench.dtype, bench.device)
        steps = min(bench.args.steps, context // 2 - WARMUP - 1)
        for layer in cache.layers:
            layer.keys.normal_(), layer.values.normal_()
            layer.cumulative_length.fill_(context - steps - WARMUP - 1)
        size = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        taken = bench.allocated() - before if bench.cuda else size
        forward = torch.compile(model.forward, mode="reduce-overhead") if bench.cuda else model.forward
        new = torch.zeros(batch, 1, dtype=torch.long, device=bench.device)

        def step():
            nonlocal new
            if bench.cuda:
                torch.compiler.cudagraph_mark_step_begin()
            new = forward(input_ids=new, past_key_values=cache, use_cache=True).logits[:, -1].argmax(dim=-1, keepdim=True)

        began = time.perf_counter()
        with torch.no_grad():
            for _ in range(WARMUP):
                step()
            startup = time.perf_counter() - began
            ms = bench.median(step, steps)
        floor = 1000 * (sum(p.nbytes for p in model.parameters()) + size) / bench.bandwidth
        return {
            "ms": ms, "tokens_per_s": 1000 * batch / ms, "cache_bytes": taken, "counts_bytes": size, "floor_ms": floor,
            "floor_share": floor / ms, "startup_s": startup,
        }  # fmt: skip

    for attn in ("gqa", "mha"):
        reset_compiler()
        row = dict(model="paper-1b", attn=attn, mode="", engine="transformers", kernel="", batch=batch, context=context)
        bench.attempt(row, lambda a=attn: cell(a))


def baby(bench: Bench) -> None:
    """One text from one token on, sampled as nanoGPT's sample.py does by default: temperature 0.8, top_k 200."""
    length, context = (500, 1024) if not bench.args.smoke else (20, 32)
    start = torch.zeros(1, 1, dtype=torch.long, device=bench.device)

    def timed(generate: Callable) -> dict:
        began = time.perf_counter()
        generate()
        generate()
        startup = time.perf_counter() - began
        seconds = bench.median(generate, 5 if not bench.args.smoke else 1) / 1000
        row = {"ms": 1000 * seconds / length, "tokens_per_s": length / seconds, "tokens": length, "startup_s": startup}
        if bench.cuda:  # what the kernels take; the rest of ms the GPU waits for the host
            row["gpu_ms"] = sum(kernel_times(generate, 1)[0].values()) / 1000 / length
        return row

    def ours(cfg: Config, **how) -> dict:
        model = bench.model(cfg)
        decoder = Decoder(model, **how) if how else None
        with attention_kernels(bench.device, decoding=True):
            result = timed(lambda: model.generate(start, length, temperature=0.8, top_k=200, decode=decoder))
        size = KVCache(model, 1, 1).nbytes() * context
        return result | {"counts_bytes": size} | ({"captures": decoder.captures} if decoder else {})

    def nanogpt() -> dict:
        path = bench.args.nanogpt / "model.py"
        spec = importlib.util.spec_from_file_location("nanogpt_model", path)
        module = sys.modules["nanogpt_model"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        torch.manual_seed(0)
        sizes = dict(n_layer=6, n_head=6, n_embd=384) if not bench.args.smoke else dict(n_layer=2, n_head=2, n_embd=32)
        model = module.GPT(module.GPTConfig(block_size=context, vocab_size=65, dropout=0.0, bias=False, **sizes))
        model = model.to(bench.device).eval()

        def generate():
            with torch.no_grad(), torch.autocast(bench.device.type, torch.bfloat16, enabled=bench.cuda):
                model.generate(start, length, temperature=0.8, top_k=200)

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
    sizes = dict(block_size=context) if not bench.args.smoke else dict(block_size=context, n_layer=2, dim=32, head_dim=16)
    for attn, mode in [v for v in (("mfa", ""), ("mha", ""), ("mfa_kr", "pre"), ("mfa_kr", "post")) if v in bench.variants]:
        fields = sizes | ({"key_reuse_rope": mode} if mode else {})
        ways = {"graphs, compiled": dict(compiled=True), "graphs": dict(compiled=False), "eager": {}}
        if not bench.cuda:
            ways = {"eager": {}, "steps": dict(compiled=False)}
        for kernel, how in ways.items():
            reset_compiler()
            named = row | dict(attn=attn, mode=mode, engine="ours", kernel=kernel)
            bench.attempt(named, lambda a=attn, f=fields, h=how: ours(preset("baby", a, **f), **h))


def tiny(bench: Bench) -> None:
    """train.py's default model with a context of 512, on this CPU: a text that fills it, with the cache and without."""
    context = 512 if not bench.args.smoke else 32
    start = torch.zeros(1, 1, dtype=torch.long)
    for attn in ("mfa", "mha", "mfa_kr"):
        torch.manual_seed(0)
        model = GPT(preset("tiny", attn, block_size=context)).eval()
        for engine_name, cached in (("ours", True), ("ours, no cache", False)):
            work = lambda m=model, c=cached: m.generate(start, context - 1, temperature=0, use_cache=c)  # noqa: E731
            ms = bench.median(work, 3 if cached else 1) / (context - 1)
            size = KVCache(model, 1, context).nbytes() if cached else 0
            row = dict(model="tiny", attn=attn, mode="pre" if attn == "mfa_kr" else "", engine=engine_name, kernel="eager")
            bench.add(row | dict(batch=1, context=context, ms=ms, tokens_per_s=1000 / ms, counts_bytes=size))


# ---------------------------------------------------------------------------------------------------------------------
# Attention alone


def kernels(bench: Bench) -> None:
    """Every way to attend on one layer of the must cell: milliseconds, and the share of the copy bandwidth."""
    batch, context = bench.must
    bench.found["kernels"] = table = []
    usual = engine.TILE, engine.WARPS, engine.STAGES, engine.PER_SM
    for attn, mode in bench.variants:
        if mode == "inverse":
            continue  # as post
        full = mode in ("pre", "post") or attn in ("mfa", "mha")  # each set of constants takes a compilation of a second
        cfg = bench.config(attn, mode)
        with bench.device:
            layer = ATTENTION[attn](cfg).to(bench.dtype).eval()
        kept = [torch.randn(batch, g, context, w, dtype=bench.dtype, device=bench.device) for g, w in layer.kept]
        width = sum(k.shape[-1] for k in read(layer, [t[:, :, :1] for t in kept])[0])
        q = torch.randn(batch, cfg.heads, 1, width, dtype=bench.dtype, device=bench.device)
        pos = torch.tensor([context - 1], device=bench.device)
        floor = 1000 * sum(t.nbytes for t in kept) / bench.bandwidth
        angles = rotary_table(layer, context, q) if rotates(layer) else None

        def report(what: str, work: Callable, n: int = 20, name=(attn, mode), floor=floor) -> None:
            try:
                with torch.no_grad():
                    ms = bench.median(work, n)
                table.append(dict(attn=name[0], mode=name[1], what=what, ms=ms, floor_share=floor / ms))
                print(f"{' '.join(name):10} {what:60} {ms:8.3f} ms {floor / ms:6.1%}", flush=True)
            except Exception as e:
                table.append(dict(attn=name[0], mode=name[1], what=what, error=f"{type(e).__name__}: {e}"[:200]))
                print(f"{' '.join(name):10} {what:60} {type(e).__name__}: {str(e)[:100]}", flush=True)

        if "triton" in kernels_for(bench, attn, mode):
            others = itertools.product((16384, 32768, 65536), (4, 8), (3, 4), (1, 2, 3, 4)) if full else [usual]
            for constants in others:
                engine.TILE, engine.WARPS, engine.STAGES, engine.PER_SM = constants
                what = "triton TILE {} WARPS {} STAGES {} PER_SM {}".format(*constants)
                report(what, lambda a=layer, q=q, k=kept, p=pos, t=angles: attend_triton(a, q, k, p, t))
            engine.TILE, engine.WARPS, engine.STAGES, engine.PER_SM = usual
        for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION):
            with sdpa_kernel(backend):
                report(backend.name.lower(), lambda a=layer, q=q, k=kept: attend_sdpa(a, q, k, context, read))
        lengths = iter(range(context - 100, context))

        def growing(layer=layer, q=q, kept=kept, lengths=lengths):
            attend_sdpa(layer, q, kept, next(lengths), read)

        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            report("cudnn_attention, another length each time", growing, 5)
        del kept, q
        bench.clean()
    bench.write()
    best = {}
    for row in (r for r in table if "ms" in r and r["what"].startswith("triton")):
        best.setdefault(row["what"], []).append(row["floor_share"])
    for what, shares in sorted(best.items(), key=lambda x: -min(x[1]))[:5]:
        print(f"least share {min(shares):.1%}, mean {statistics.mean(shares):.1%}: {what}")


# ---------------------------------------------------------------------------------------------------------------------
# What is shown

NAMES = {
    ("mha", ""): "MHA", ("gqa", ""): "GQA, 4 heads", ("mqa", ""): "MQA", ("mla", "joint"): "MLA, joint", ("mfa", ""): "MFA",
    ("mfa_kr", "pre"): "MFA-KR pre", ("mfa_kr", "post"): "MFA-KR post", ("mfa_kr", "inverse"): "MFA-KR inverse",
}  # fmt: skip


def quickest(rows: list[dict], **wanted) -> dict | None:
    """The row with the least time among those that match."""
    rows = [r for r in rows if "ms" in r and all(r.get(k) == v for k, v in wanted.items())]
    return min(rows, key=lambda r: r["ms"]) if rows else None


def grid_tables(found: dict) -> str:
    """Everything measured at the paper's 1B shape, in Markdown: tokens/s and the share of the floor, a table for each batch."""
    rows = [r for r in found.get("rows", []) if r["model"] == "paper-1b"]
    contexts = sorted({r["context"] for r in rows})
    lines = []
    for batch in sorted({r["batch"] for r in rows}):
        lines += ["", f"| batch {batch}: tokens/s (share of the floor) | {' | '.join(f'{c:,}' for c in contexts)} |"]
        lines += ["|---" + "|---:" * len(contexts) + "|"]
        others = [("transformers", attn, "") for attn in ("mha", "gqa") if any(r["engine"] == "transformers" for r in rows)]
        for engine_name, attn, mode in [*(("ours", *v) for v in NAMES), *others]:
            cells = []
            for context in contexts:
                cell = dict(engine=engine_name, attn=attn, mode=mode, batch=batch, context=context)
                row = quickest(rows, **cell)
                full = any(r.get("error") == "the cache does not fit" for r in rows if cell.items() <= r.items())
                cells.append(f"{row['tokens_per_s']:,.0f} ({row['floor_share']:.0%})" if row else "full" if full else "–")
            name = NAMES[attn, mode] if engine_name == "ours" else f"transformers' Llama, {attn.upper()}"
            if set(cells) != {"–"}:
                lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines).strip() or "not measured"


def table(bench: Bench) -> None:
    """The must-show figures, from the file: also those of earlier runs."""
    batch, context = bench.must
    cell = dict(model="paper-1b", batch=batch, context=context)
    found = {v: quickest(bench.rows, **cell, attn=v[0], mode=v[1], engine="ours") for v in VARIANTS}
    most = {(r["attn"], r["mode"]): r["batch"] for r in bench.largest if "batch" in r}
    if any(found.values()):
        print(f"\nbatch {batch} at {context} tokens{'':10} ms    floor  share   tokens/s  cache = counts  largest batch")
    for variant, row in found.items():
        if row:
            same = "yes" if row["cache_bytes"] == row["counts_bytes"] else "NO"
            print(
                f"{NAMES[variant]:16} {row['kernel']:8} {row['ms']:14.2f} {row['floor_ms']:8.2f} {row['floor_share']:6.0%} "
                f"{row['tokens_per_s']:10,.0f}  {same:>14}  {most.get(variant, ''):>13}"
            )
    speed = {v: r["tokens_per_s"] for v, r in found.items() if r}
    for attn in ("gqa", "mha"):
        row = quickest(bench.rows, **cell, attn=attn, engine="transformers")
        if row:
            print(f"transformers' Llama {attn}: {row['ms']:.2f} ms, {row['tokens_per_s']:,.0f} tokens/s")
            speed["llama " + attn] = row["tokens_per_s"]

    def ratio(what: str, a, b, figures: dict) -> None:
        if figures.get(a) and figures.get(b):
            print(f"{what}: {figures[a] / figures[b]:.2f}")

    mfa, mha = ("mfa", ""), ("mha", "")
    ratio("MFA / MHA, tokens/s (5 wanted)", mfa, mha, speed)
    ratio("MFA / transformers' Llama GQA, tokens/s (1.5 wanted)", mfa, "llama gqa", speed)
    ratio("MFA / MHA, largest batch (7 wanted)", mfa, mha, most)
    for mode in ("post", "inverse", "pre"):
        ratio(f"MFA-KR {mode} / MHA, largest batch (13 wanted of post and inverse)", ("mfa_kr", mode), mha, most)
    other = quickest(bench.rows, model="baby", engine="nanogpt")
    for row in (r for r in bench.rows if r["model"] == "baby" and "ms" in r):
        times = f", {row['tokens_per_s'] / other['tokens_per_s']:.1f} times nanoGPT (10 wanted)" if other else ""
        busy = f", the GPU is busy {row['gpu_ms'] / row['ms']:.0%} of the time" if "gpu_ms" in row else ""
        print(f"baby {row['engine']} {row['attn']} {row['kernel']}: {row['tokens_per_s']:,.0f} tokens/s{times}{busy}")
    for attn in ("mfa", "mha", "mfa_kr"):
        with_, without = (quickest(bench.rows, model="tiny", attn=attn, engine=e) for e in ("ours", "ours, no cache"))
        if with_ and without:
            print(f"tiny {attn}: cached {without['ms'] / with_['ms']:.1f} times uncached, {with_['context']} tokens (4 wanted)")
    for row in bench.rows + bench.largest:
        if "error" in row and row["error"] != "the cache does not fit":
            print("failed:", " ".join(str(v) for k, v in row.items() if k != "run"))


def plot(bench: Bench) -> None:
    """decode_tokens.png: tokens/s against context. decode_largest.png: the largest batch of each attention."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import LogLocator

    rows = [r for r in bench.rows if r["model"] == "paper-1b" and "ms" in r]
    shown = [v for v in NAMES if any((r["attn"], r["mode"]) == v for r in rows)]
    colours = {v: f"C{i}" for i, v in enumerate(NAMES)}
    bandwidth, device = bench.bandwidth, bench.here["device"]
    if rows:
        run = bench.runs[rows[0]["run"]]
        bandwidth, device = run.get("bandwidth", bandwidth), run["device"]
        batches = [b for b in (1, 32) if any(r["batch"] == b for r in rows)] or sorted({r["batch"] for r in rows})[:2]
        figure, axes = plt.subplots(1, len(batches), figsize=(5 * len(batches) + 2, 4.4), squeeze=False, layout="constrained")
        for axis, batch in zip(axes[0], batches, strict=True):
            contexts = sorted({r["context"] for r in rows if r["batch"] == batch})
            for variant in shown:
                of = dict(attn=variant[0], mode=variant[1], engine="ours", batch=batch)
                best = [quickest(rows, context=c, **of) for c in contexts]
                points = [(r["context"], r["tokens_per_s"]) for r in best if r]
                style = "--" if variant[0] == "mfa_kr" else "-"
                axis.plot(*zip(*points, strict=True), style, marker="o", ms=4, color=colours[variant], label=NAMES[variant])
            for attn, marker in (("mha", "x"), ("gqa", "+")):
                for row in (r for r in rows if r["engine"] == "transformers" and r["attn"] == attn and r["batch"] == batch):
                    name = f"transformers' Llama, {attn.upper()}"
                    axis.plot(row["context"], row["tokens_per_s"], marker, ms=9, mew=2, color=colours[attn, ""], label=name)
            axis.set(xscale="log", yscale="log", xlabel="context, tokens", ylabel="tokens per second", title=f"batch {batch}")
            axis.set_xticks(contexts, [f"{c // 1024}k" if c >= 1024 else str(c) for c in contexts], minor=False)
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter("{x:,.0f}")
            axis.minorticks_off()
            axis.grid(alpha=0.3)
        figure.legend(*axes[0][-1].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
        figure.suptitle(f"Decoding, paper-1b in bf16, {device}, copy bandwidth {bandwidth / 1e12:.2f} TB/s", fontsize=10)
        figure.savefig(bench.args.results.with_name("decode_tokens.png"), dpi=130)
        plt.close(figure)
    largest = {(r["attn"], r["mode"]): r for r in bench.largest if "batch" in r}
    if largest:
        order = sorted(largest, key=lambda v: largest[v]["batch"])
        figure, axis = plt.subplots(figsize=(7, 3.8), layout="constrained")
        bars = axis.barh([NAMES[v] for v in order], [largest[v]["batch"] for v in order], color=[colours[v] for v in order])
        axis.bar_label(bars, padding=3)
        axis.set(xlabel=f"sequences of {largest[order[0]]['context']:,} tokens decoded together", xmargin=0.1)
        axis.set_title(f"Largest batch that fits beside paper-1b, {device}", fontsize=10)
        figure.savefig(bench.args.results.with_name("decode_largest.png"), dpi=130)
        plt.close(figure)


def main(args: Args) -> None:
    if args.device != "cpu" and not args.device.startswith("cuda"):
        raise BadInput(f"--device must be cpu or cuda, not {args.device!r}")
    if args.device != "cpu" and not torch.cuda.is_available():
        raise BadInput(f"--device {args.device}: no such device here; use cpu")
    if args.smoke and args.results.resolve() == RESULTS.resolve():
        raise BadInput("--smoke measures a toy, which does not belong among the results: name another file with --results")
    if unknown := [name for name in args.only if name not in [" ".join(v).strip() for v in VARIANTS]]:
        raise BadInput(f"--only {unknown[0]!r}: take any of {', '.join(' '.join(v).strip() for v in VARIANTS)}")
    if any(batch < 1 for batch in args.batches):
        raise BadInput(f"--batches must be positive, not {args.batches}")
    if args.steps < 1:
        raise BadInput(f"--steps must be at least 1, not {args.steps}")
    if args.nanogpt and not (args.nanogpt / "model.py").is_file():
        raise BadInput(f"--nanogpt {args.nanogpt}: no model.py there; name the folder of a nanoGPT checkout")
    parts = args.part or (("must", "profile", "baby", "llama", "grid", "plot") if args.device != "cpu" else ("tiny",))
    slow = [part for part in parts if part not in ("tiny", "plot")]
    if args.device == "cpu" and slow and not args.smoke:
        raise BadInput(f"--part {' '.join(slow)}: these need a GPU; on a CPU there are tiny and plot")
    if any(part != "plot" for part in parts) or not args.results.is_file():
        if parts == ("plot",):
            raise BadInput(f"--part plot: {args.results} is not there; measure first")
    bench = Bench(args)
    known = dict(
        kernels=kernels, must=must, profile=profile, baby=baby, llama=llama, grid=grid, tiny=tiny, plot=plot
    )  # fmt: skip
    for name in known:
        if name in parts:
            began = time.perf_counter()
            known[name](bench)
            print(f"{name}: {time.perf_counter() - began:.0f} s", flush=True)
    table(bench)


if __name__ == "__main__":
    run_command(main, Args)
