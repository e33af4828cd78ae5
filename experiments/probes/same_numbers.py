"""Does this tree give another commit's numbers? experiments/probes/same_numbers.py --commit cad79c9

The other commit is checked out in a temporary worktree. In each tree this file runs again as a
worker, which imports that tree's mfa.py, uses public names alone and writes down what it finds; the
two findings are compared. Linux only, about 140 s on one core. Not seen: GPUs, compile, bfloat16.
"""

import argparse
import contextlib
import difflib
import hashlib
import json
import math
import os
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
MESSAGES = ("printed", "complaints", "flags")  # what --allow_messages lets differ
ATTENTIONS = "fpba mha mqa gqa mla mfa mfa_kr".split()
TEXT = "--file text.txt --data_dir data"
MODEL = "--n_layer 2 --dim 64 --head_dim 16 --block_size 32 --dropout 0.1 --device cpu"
RECIPE = "--batch_size 8 --warmup_iters 5 --eval_interval 10 --log_interval 5 --eval_tokens 2048"
RUNS = {"mha": "", "mla": "--tokenizer bpe --vocab_size 300 --joint_kv"}
RUNS |= {"mfa": "--grad_accum 2", "mfa_kr": ""}
BAD = [
    "train.py --attn nope",
    "train.py --dim 0",
    "train.py --latent_dim 7",
    "train.py --no_such_flag 1",
    "train.py --learning_rate -1",
    f"train.py {TEXT} --out new --batch_size 6 --grad_accum 4",
    f"train.py {TEXT} --out new --block_size 100000",
    f"train.py {TEXT} --out runs/mha {MODEL} --attn mha",  # holds a run
    "train.py --out runs/mha --resume --attn mha --dim 32 --max_iters 40",  # another model
    "sample.py --checkpoint missing.pt",
    "sample.py --checkpoint text.txt",
    "sample.py --checkpoint runs/mha/best.pt --prompt ~",
    "sample.py --checkpoint runs/mha/best.pt --top_p 2",
    "prepare_data.py --dataset nope",
    "prepare_data.py --file missing.txt --data_dir data",
    f"prepare_data.py {TEXT} --vocab_size 300",
]


# --------------------------------------------------------------------------------------------------
# The worker's first part: models


def cases():
    """(name, Config) of every model."""
    from mfa import PRESETS, Config, preset

    for name, attn in product(PRESETS, ATTENTIONS):
        if attn == "fpba":
            cfg = preset(name, attn, dim=24, n_layer=2, vocab_size=65)
        else:
            cfg = preset(name, attn)
        if name != "tiny":  # seconds, not minutes; whole_preset has the full sizes
            cfg = replace(cfg, n_layer=2, vocab_size=min(cfg.vocab_size, 256))
        if name.startswith("paper"):
            ffns = ("ffn_dim", "moe_ffn_dim", "shared_ffn_dim")
            thinner = {name: getattr(cfg, name) // 16 for name in ffns}
            cfg = replace(cfg, dim=min(cfg.dim, 512), n_kv_head=2, **thinner)
        yield f"{name} {attn}", cfg
    small = dict(vocab_size=50, block_size=24, n_layer=2, dim=48, head_dim=8, rope_dim=4)
    small |= dict(latent_dim=12, mfa_n_head=5)
    variants = [dict(attn=attn) for attn in ATTENTIONS]
    reuses, places = "gated vanilla proj residual".split(), "pre post inverse".split()
    variants += [
        dict(attn="mfa_kr", key_reuse=r, key_reuse_rope=p) for r, p in product(reuses, places)
    ]
    for joint, compress in product((False, True), (False, True)):
        mla = dict(attn="mla", joint_kv=joint, compress_query=compress)
        variants += [mla, mla | dict(latent_norm=True)] if joint else [mla]
    for attn in ("mla", "mfa", "mfa_kr"):
        variants += [dict(attn=attn, q_rank=20), dict(attn=attn, n_head=3, latent_dim=0)]
    variants += [dict(attn=attn, latent_norm=True) for attn in ("mfa", "mfa_kr")]
    experts = dict(n_expert=5, n_expert_active=2, moe_ffn_dim=16)
    variants += [dict(attn=a, **experts, shared_ffn_dim=s) for a in ATTENTIONS[1:] for s in (0, 24)]
    variants += [dict(attn=a, tied=False, dropout=0.2, vo_std=0.1) for a in ATTENTIONS]
    for fields, pos in product(variants, ("rope", "alibi", "none")):
        if pos != "rope" and ("n_expert" in fields or "tied" in fields):
            continue
        name = " ".join(f"{k}={v}" if k != "attn" else v for k, v in fields.items())
        width = dict(dim=16, head_dim=8) if fields["attn"] == "fpba" else {}
        yield f"{name} {pos}", Config(**small | width | fields, pos=pos)


def sha(tensors: dict) -> str:
    """Of names, types, shapes and values."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        t = tensors[name].detach().contiguous()
        found.update(f"{name} {t.dtype} {tuple(t.shape)}".encode())
        found.update(t.flatten().view(torch.uint8).numpy())
    return found.hexdigest()


def thin(t):
    """At most 16384 of a tensor's values: enough to say how large a difference is."""
    return t.detach().flatten()[:: max(1, t.numel() // 16384)].clone()


def model_numbers(cfg) -> dict:
    """Everything that one model computes."""
    from mfa import ATTENTION, GPT, KVCache

    torch.manual_seed(1)
    model = GPT(cfg)
    state = model.state_dict()
    found = {"weights": sha(state), "names": list(state), "counts": ATTENTION[cfg.attn].counts(cfg)}
    found["counts"] = tuple(found["counts"])
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:  # gates are 0 and gains 1 at first: that would hide much
                p.add_(torch.rand(p.shape) - 0.5)
    T = min(cfg.block_size, 24)
    idx, targets = torch.randint(cfg.vocab_size, (2, 2, T))
    targets[0, :3] = -1
    model.train()
    torch.manual_seed(2)
    loss = model(idx, targets)[1]
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    values = {name: thin(gradient) for name, gradient in gradients.items()}
    found["gradients"] = {"sha256": sha(gradients), "values": values}
    model.zero_grad(set_to_none=True)
    model.eval()
    with torch.no_grad():
        logits, eval_loss = model(idx, targets)
        found |= {"training loss": loss.detach(), "loss": eval_loss, "logits": logits}
        cache = KVCache(model, 2, T)
        pieces = [model(piece, cache=cache)[0] for piece in idx.split([1, 6, 1, 1, T - 9], dim=1)]
        found["cached logits"] = torch.cat(pieces, dim=1)
        found["cache"] = cache.numel(), cache.nbytes()
        attn = next(m for m in model.modules() if isinstance(m, ATTENTION[cfg.attn]))
        if cfg.dim <= 48 and not cfg.latent_norm:
            found["factorization"] = attn.factorization(torch.randn(2, 4, cfg.dim))
    prompt, n = idx[:, :15], 14 if cfg.block_size == 24 else 4  # 15 + 14 go beyond a context of 24
    ways = dict(greedy=dict(temperature=0.0), top_k=dict(top_k=5, temperature=0.7))
    ways |= dict(top_p=dict(top_p=0.8), sampled=dict(temperature=1.3))
    for (way, options), use_cache in product(ways.items(), (True, False)):
        options = dict(options, generator=torch.Generator().manual_seed(3), use_cache=use_cache)
        found[f"{way}{'' if use_cache else ', no cache'}"] = model.generate(prompt, n, **options)
    return found


def whole_preset(cfg) -> dict:
    """Names and shapes of a preset's weights at full size, on tensors without memory."""
    from mfa import ATTENTION, GPT

    with torch.device("meta"):
        state = GPT(cfg).state_dict()
    shapes = {name: tuple(t.shape) for name, t in state.items()}
    counts = ATTENTION[cfg.attn].counts(cfg)
    return {"shapes": shapes, "counts": tuple(counts), "config": asdict(cfg)}


def attempt(measure, cfg) -> dict:
    try:
        return measure(cfg)
    except Exception:
        return {"error": traceback.format_exc()}


def models(say, **_) -> dict:
    from mfa import PRESETS, preset

    found = {}
    for name, attn in product(PRESETS, ATTENTIONS[1:]):
        found[f"whole {name} {attn}"] = attempt(whole_preset, preset(name, attn))
    for i, (name, cfg) in enumerate(cases()):
        if i % 20 == 0:
            say(f"model {i}: {name}")
        found[name] = attempt(model_numbers, cfg)
    return found


# --------------------------------------------------------------------------------------------------
# The worker's second part: commands


def in_a_process(tree: Path, line: str) -> dict:
    """`python line` in a forked process, which has torch already: exit code, stdout and stderr."""
    sys.stdout.flush()
    if not (child := os.fork()):
        code = 1
        try:
            for number, name in ((1, "stdout"), (2, "stderr")):
                os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            script, *sys.argv[1:] = line.split()
            sys.argv[0], sys.path[0] = script, str(tree)
            runpy.run_path(str(tree / script), run_name="__main__")
            code = 0
        except SystemExit as e:
            code = e.code if isinstance(e.code, int) else int(e.code is not None)
            if isinstance(e.code, str):
                print(e.code, file=sys.stderr)
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(BaseException):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    out, err = (Path(name).read_text(errors="replace") for name in ("stdout", "stderr"))
    masks = [(re.escape(str(tree)), "TREE"), (r"[\d,.]+(?= (tokens/s|a second|min\b|s\b))", "#")]
    masks += [(" +", " "), ("─+", "─")]  # a frame is as wide as the tree's path
    text = out.partition("\n\n")[2].rpartition("-" * 40)[0]  # of sample.py
    for pattern, instead in masks:
        out, err = re.sub(pattern, instead, out), re.sub(pattern, instead, err)
    found = {"exit code": status, "printed": out, "complaints": err}
    return found | {"text": text} if "sample.py" in line and not status else found


def run_numbers(out: Path) -> dict:
    """What a training leaves in its folder, without what a clock says."""
    rows = [json.loads(row) for row in (out / "metrics.jsonl").read_text().splitlines()]
    clock = ("seconds", "tokens_per_s")
    found = {"metrics": [{k: v for k, v in row.items() if k not in clock} for row in rows]}
    for name in ("latest.pt", "best.pt"):
        ckpt = torch.load(out / name, weights_only=True)
        found[f"{name} weights"], found[f"{name} optimizer"] = ckpt["model"], ckpt["optimizer"]
        apart = ("model", "optimizer", "args", "seconds", "versions")
        found[f"{name} rest"] = {k: v for k, v in ckpt.items() if k not in apart}
        # Each tree's commands run in a folder of their own.
        found["flags"] = re.sub(r"[^']*[\\/](old|new)[\\/]work", ".", str(ckpt["args"]))
    return found


def commands(say, tree: Path, old_runs: Path, **_) -> dict:
    """Run in an empty folder, with relative paths: what is printed is the same in every tree."""
    import matplotlib.figure  # noqa: F401  (once, not in every command)
    import tyro  # noqa: F401

    found = {}

    def call(line: str, name: str = "", folder: Path | None = None) -> dict:
        say(line)
        found[name or line] = result = in_a_process(tree, line)
        if result["exit code"] and line not in BAD:  # or both trees might fail in the same way
            result["error"] = result["complaints"]
        if folder and not result["exit code"]:
            result |= run_numbers(folder)
        return result

    def sample(run: Path, options: str, name: str = "") -> None:
        line = f"sample.py --checkpoint {run / 'best.pt'} --max_new_tokens 60 {options}"
        call(line, name or f"sample.py {run.name} {options}")

    text = (ROOT / "data" / "shakespeare.txt").read_text(encoding="utf-8")[:60_000]
    Path("text.txt").write_text(text + "\nnaïve 漢字 …\n", encoding="utf-8")
    for options in ("char", "byte", "bpe --vocab_size 300"):
        result = call(f"prepare_data.py {TEXT} --tokenizer {options}")
        for path in sorted(Path("data").glob(f"*-{options.split()[0]}*/*")):
            result[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    for attn, options in RUNS.items():
        run = Path("runs", attn)
        line = f"train.py --attn {attn} --out {run} {TEXT} {MODEL} {RECIPE} {options}"
        call(f"{line} --max_iters 20", f"train {attn}", run)
        if run.is_dir():
            shutil.copytree(run, Path("stopped", attn))
        call(f"train.py --resume --out {run} --max_iters 30", f"train {attn}, resumed", run)
    for attn in RUNS:
        sample(Path("runs", attn), "--temperature 0")
    ways = ("--prompt KING:", "--top_k 5 --num_samples 2", "--top_p 0.7", "--no-cache --seed 5")
    for options, attn in product(ways, ("mla", "mfa_kr")):
        sample(Path("runs", attn), options)
    for attn in RUNS:  # the old tree's checkpoints; in the old tree they are its own
        run = Path("old", attn)
        shutil.copytree(old_runs / "stopped" / attn, run)
        name = f"old checkpoint of {attn}"
        sample(run, "--top_k 9", f"{name}, sampled")
        call(f"train.py --resume --out {run} --max_iters 30", f"{name}, resumed", run)
    for line in BAD + [f"{script}.py --help" for script in ("train", "sample", "prepare_data")]:
        call(line)
    return found


# --------------------------------------------------------------------------------------------------
# The comparison


def difference(a, b) -> float:
    """0 if equal to the bit, else the largest difference over the largest value; inf: no number."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        if sha({"": a}) == sha({"": b}):
            return 0.0
        if a.shape != b.shape or a.dtype != b.dtype or not a.is_floating_point():
            return math.inf
        if torch.equal(a, b):  # 0 and -0
            return sys.float_info.min
        a, b = a.double(), b.double()
        gap = ((a - b).abs().max() / a.abs().max()).item()
        return gap if gap > 0 else math.inf
    if isinstance(a, dict) and isinstance(b, dict):
        if a.keys() != b.keys():
            return math.inf
        if a.keys() == {"sha256", "values"}:  # all values, and some of them
            same = a["sha256"] == b["sha256"]
            return 0.0 if same else difference(a["values"], b["values"]) or math.inf
        return max((difference(a[k], b[k]) for k in a), default=0.0)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return max(map(difference, a, b), default=0.0) if len(a) == len(b) else math.inf
    if type(a) is float and type(b) is float and a != b:
        return abs(a - b) / max(abs(a), abs(b))
    if type(a) is str and type(b) is str and a != b:
        return gap_in_words(a, b)
    return 0.0 if type(a) is type(b) and a == b else math.inf


def gap_in_words(a: str, b: str) -> float:
    """As `difference`, for texts that differ in their numbers alone."""
    number = r"\d[\d,]*\.?\d*"
    if re.sub(number, "#", a) != re.sub(number, "#", b):
        return math.inf
    pairs = zip(re.findall(number, a), re.findall(number, b), strict=True)
    return max(difference(*(float(x.replace(",", "")) for x in pair)) for pair in pairs)


def allowed(case: str, thing: str, tolerance: float) -> float:
    """mfa_kr's arithmetic may be reordered, but its weights start, and are named, as they did."""
    if "mfa_kr" not in case or not tolerance or thing in ("weights", "names", "cache", "counts"):
        return 0.0
    trained = re.match("sample.py mfa_kr|train mfa_kr|old checkpoint of mfa_kr", case)
    return max(tolerance, 1e-4 if trained else 0.0)


def compare(old: dict, new: dict, args) -> tuple[list[str], list[str]]:
    """Print the table. Returns what fails, and the words that differ, side by side."""
    failed, words = [], []
    for case in dict.fromkeys([*old, *new]):
        a, b, said = old.get(case, {}), new.get(case, {}), []
        if "error" in a:
            failed.append(f"{case}: fails in the old tree: {a['error'].strip().splitlines()[-1]}")
        for thing in dict.fromkeys([*a, *b]):
            x, y = a.get(thing), b.get(thing)
            gap = difference(x, y)
            if not gap:
                continue
            said.append(f"{thing} {'differs' if gap == math.inf else f'by {gap:.1e}'}")
            if thing in (*MESSAGES, "text", "names", "exit code", "error"):
                lines = (str(found).splitlines() for found in (x, y))
                changed = list(difflib.unified_diff(*lines, n=0, lineterm=""))[2:]
                words.append("\n    ".join([f"{case}: {thing} (- old, + new)", *changed]))
            if not gap <= allowed(case, thing, args.mfa_kr_tolerance):  # nan, too
                if not (thing in MESSAGES and args.allow_messages):
                    failed.append(f"{case}: {said[-1]}")
        print(f"{case[:80]:<80}  {', '.join(said) or f'same to the bit ({len(a)} things)'}")
    return failed, words


def work(part: str, tree: Path, folder: Path, old_runs: Path) -> dict:
    """One part, done by a process of its own that imports from tree."""
    folder.mkdir(exist_ok=True)
    found = folder / f"{part}.pt"
    cwd = tree if part == "models" else folder / "work"
    cwd.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "COLUMNS": "250"}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, __file__, "--work", part, str(tree), str(found), str(old_runs)]
    subprocess.run(command, cwd=cwd, env=environment, check=True)
    return torch.load(found, weights_only=True)


def worker(part: str, tree: str, found: str, old_runs: str) -> None:
    began, label = time.perf_counter(), Path(found).parent.name

    def say(what: str) -> None:
        print(f"{label} {time.perf_counter() - began:4.0f} s  {what[:100]}", flush=True)

    torch.set_num_threads(1)
    if part == "models":
        import mfa

        if not Path(mfa.__file__).is_relative_to(tree):
            raise SystemExit(f"mfa came from {mfa.__file__}, not from {tree}")
    do = {"models": models, "commands": commands}[part]
    torch.save(do(say, tree=Path(tree), old_runs=Path(old_runs)), found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--commit", default="HEAD", help="whose tree this one is compared with")
    tolerance = "largest relative difference of mfa_kr; what is trained with it gets 1e-4 then"
    parser.add_argument("--mfa_kr_tolerance", type=float, default=0.0, help=tolerance)
    words_may = "differing words are no failure"
    parser.add_argument("--allow_messages", action="store_true", help=words_may)
    parser.add_argument("--parts", nargs="+", default=["models", "commands"], help="of these two")
    parser.add_argument("--work", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        return worker(*args.work)
    git, failed, words, began = ["git", "-C", str(ROOT)], [], [], time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary).resolve()
        tree = place / "tree"
        checkout = ["worktree", "add", "--quiet", "--detach", str(tree), args.commit]
        subprocess.run([*git, *checkout], check=True)
        try:
            for part in args.parts:
                old_runs = place / "old" / "work"
                old = work(part, tree, place / "old", old_runs)
                new = work(part, ROOT, place / "new", old_runs)
                for found, more in zip((failed, words), compare(old, new, args), strict=True):
                    found += more
        finally:
            subprocess.run([*git, "worktree", "remove", "--force", str(tree)], check=True)
    print("\n".join(["", *words]))
    if failed:
        print(f"\n{len(failed)} things differ from {args.commit}:", *failed, sep="\n  ")
    took = f"{time.perf_counter() - began:.0f} s"
    print(f"\n{'NOT the same' if failed else 'same'} as {args.commit}, in {took}")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
