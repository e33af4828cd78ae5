"""What sample.py promises, one statement of fact a test."""

import os
import re
import sys

import pytest
import torch
from attentions import gpt, tokens
from runs import command, files_below, small

import sample
from mfa import ATTENTION, GPT, Config, KVCache
from sample import Sample, stream
from support.progress import Progress
from support.run_folder import load_checkpoint
from support.tokenizers import EOT, ByteTokenizer, CharTokenizer
from train import train

LINE = "-" * 40 + "\n"


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    """A folder with a run of every attention below out/, the mfa_kr one newest."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Progress, "plot", lambda *_: None)
        patch.setattr(Progress, "finish", lambda *_: None)
        for attn in ATTENTION:
            train(small(data, folder / "out" / f"tiny-{attn}", attn, max_iters=30, learning_rate=1e-2))
    return folder


@pytest.fixture
def run(runs, monkeypatch, capsys):
    """Calls sample.py there and returns (exit code, stdout, stderr)."""
    monkeypatch.chdir(runs)

    def call(*argv):
        code = command(sample.main, Sample, argv)
        return code, *capsys.readouterr()

    return call


def texts(printed: str) -> list[str]:
    """The samples, without the first line and the last."""
    return printed.split("\n\n", 1)[1].split(LINE)[:-1]


def test_it_finds_the_run_that_was_written_to_last(run, runs):
    assert run("--max_new_tokens=1")[1].startswith("out/tiny-mfa_kr/best.pt: mfa_kr, step ")
    latest = runs / "out" / "tiny-gqa" / "latest.pt"
    os.utime(latest, (latest.stat().st_atime, latest.stat().st_mtime + 60))  # as if it had gone on, and got no better
    assert run("--max_new_tokens=1")[1].startswith("out/tiny-gqa/best.pt: gqa, step ")
    os.utime(latest, (latest.stat().st_atime, latest.stat().st_mtime - 60))


def test_it_takes_a_run_that_has_not_been_evaluated_yet(run, runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "out" / "young"
    folder.mkdir(parents=True)
    (folder / "latest.pt").write_bytes((runs / "out" / "tiny-mfa" / "latest.pt").read_bytes())
    assert run("--max_new_tokens=1")[1].startswith("out/young/latest.pt: mfa")


def test_the_checkpoint_is_all_it_needs(run, runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "alone.pt").write_bytes((runs / "out" / "tiny-mla" / "best.pt").read_bytes())
    code, out, err = run("--checkpoint=alone.pt", "--max_new_tokens=20")
    assert (code, err) == (0, "") and len(texts(out)[0]) == 21


@pytest.mark.parametrize("attn", ATTENTION)
def test_the_text_is_the_same_with_and_without_the_cache(attn, run):
    # 60 tokens in a context of 16: the window starts anew several times.
    flags = f"--checkpoint=out/tiny-{attn}/best.pt", "--prompt=ROMEO:", "--max_new_tokens=60", "--top_p=0.9"
    with_cache, without = run(*flags), run(*flags, "--no-cache")
    assert texts(with_cache[1]) == texts(without[1]) and len(texts(with_cache[1])[0]) == 6 + 60 + 1
    assert with_cache[1].endswith("for 16 tokens\n") and without[1].endswith(", no cache\n")


def test_greedy_without_a_prompt_says_why_it_may_print_blank_lines(run):
    why = "no --prompt: the text begins after the end of a line or of a document, and at --temperature 0 what follows"
    assert run("--temperature=0", "--max_new_tokens=5")[1].splitlines()[1].startswith(why)
    for flags in (["--temperature=0", "--prompt=ROMEO"], ["--temperature=0.8"]):
        assert why not in run(*flags, "--max_new_tokens=5")[1]


def test_equal_seeds_give_equal_texts_and_other_seeds_others(run):
    a, b, c = (texts(run("--max_new_tokens=40", f"--seed={seed}")[1]) for seed in (1, 1, 2))
    assert a == b != c


def test_num_samples_gives_that_many_texts_the_kth_with_the_kth_seed_on(run):
    three = texts(run("--max_new_tokens=30", "--num_samples=3", "--seed=5")[1])
    assert len(three) == 3 and len(set(three)) == 3
    assert three == [texts(run("--max_new_tokens=30", f"--seed={seed}")[1])[0] for seed in (5, 6, 7)]


def test_greedy_needs_no_seed_and_top_k_1_and_a_tiny_temperature_and_top_p_are_greedy(run):
    greedy = texts(run("--temperature=0", "--max_new_tokens=40")[1])
    for flag in ("--seed=9 --temperature=0", "--top_k=1", "--temperature=1e-40", "--top_p=1e-9"):
        assert texts(run("--max_new_tokens=40", *flag.split())[1]) == greedy


@pytest.mark.parametrize("flag", ["--max_new_tokens", "--max-new-tokens"])
def test_flags_take_underscores_and_hyphens(flag, run):
    assert run(flag, "7")[1].splitlines()[-1].startswith("7 tokens in ")


def test_help_mentions_every_flag(run):
    code, told, _ = run("--help")
    flags = "checkpoint prompt max_new_tokens temperature top_k top_p num_samples seed no_cache device"
    flags += " cache_dtype keep_end stop no_graphs compile"
    assert code == 0 and [name for name in flags.split() if f"--{name}" not in told] == []


def test_text_is_written_as_it_is_made(run, runs, monkeypatch):
    seen, events = [], []

    class Out:
        encoding = "utf-8"

        def write(self, text):
            events.append(text)

        def flush(self):
            events.append("flush")

    plain = GPT.hidden
    monkeypatch.setattr(GPT, "hidden", lambda self, *a: (events.append("step"), plain(self, *a))[1])
    monkeypatch.setattr(sys, "stdout", Out())
    sample.main(Sample(max_new_tokens=10, device="cpu"))  # as graphs on a GPU the steps are not calls
    monkeypatch.undo()
    seen = events[events.index("step") : len(events) - events[::-1].index("step") + 2]
    assert len(seen) == 30 and all(seen[i] == "step" and seen[i + 2] == "flush" for i in range(0, 30, 3))
    assert all(len(text) == 1 for text in seen[1::3])


@pytest.mark.parametrize("attn", ATTENTION)
@pytest.mark.parametrize("n_new", [3, 50])
def test_the_last_line_gives_tokens_speed_and_the_size_of_the_cache_that_was_used(attn, n_new, run, runs, monkeypatch):
    made = []

    class Watched(KVCache):
        def __init__(self, *args, **more):
            super().__init__(*args, **more)
            made.append(self)

    monkeypatch.setattr(sample, "KVCache", Watched)
    flags = f"--checkpoint=out/tiny-{attn}/best.pt", f"--max_new_tokens={n_new}", "--num_samples=2", "--prompt=to be"
    last = run(*flags)[1].splitlines()[-1]
    found = re.fullmatch(r"([\d,]+) tokens in ([\d.]+) s, ([\d,]+) tokens/s, cache ([\d,]+) bytes for (\d+) tokens", last)
    assert int(found[1]) == 2 * n_new and int(found[5]) == made[0].capacity == min(16, 5 + n_new)
    assert len(made) == 2 and int(found[4].replace(",", "")) == made[0].nbytes()


# ---------------------------------------------------------------------------------------------------------------------
# Prompts


def checkpoint(path, runs, tokenizer, **config):
    """An untrained model with another tokenizer."""
    ckpt = load_checkpoint(runs / "out" / "tiny-mfa" / "best.pt")
    cfg = Config(**{**ckpt["config"], "vocab_size": tokenizer.n_vocab, **config})
    torch.save({**ckpt, "config": cfg.__dict__, "tokenizer": tokenizer.spec(), "model": GPT(cfg).state_dict()}, path)
    return f"--checkpoint={path}"


def test_the_prompt_comes_first_and_may_fill_the_context(run):
    for prompt in ("O", "to be or not to "):
        text = texts(run(f"--prompt={prompt}", "--max_new_tokens=5")[1])[0]
        assert text.startswith(prompt) and len(text) == len(prompt) + 5 + 1


def test_a_prompt_longer_than_the_context_is_refused(run):
    code, out, err = run("--prompt=to be or not to b")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: --prompt has 17 tokens; the model's context is 16: shorten it, or ")


def test_keep_end_uses_the_end_of_such_a_prompt(run):
    kept, end = run("--prompt=to be or not to b", "--keep_end"), run("--prompt=o be or not to b")
    assert kept[0] == 0 and texts(kept[1])[0] == "t" + texts(end[1])[0]


def test_stop_ends_a_text_at_the_end_of_its_document(run, runs, tmp_path):
    flags = checkpoint(tmp_path / "byte.pt", runs, ByteTokenizer()), "--max_new_tokens=1000", "--temperature=2"
    whole, stopped = run(*flags)[1], run(*flags, "--stop")[1]
    before = texts(whole)[0].split(EOT)[0]
    assert EOT in whole and texts(stopped) == [before + "\n"] and int(stopped.splitlines()[-1].split()[0]) < 1000


def test_the_cache_may_be_narrower_than_the_model(run):
    full, half = (run(f"--cache_dtype={dtype}")[1].splitlines()[-1] for dtype in ("float32", "bfloat16"))
    size = [int(re.search(r"cache ([\d,]+) bytes", line)[1].replace(",", "")) for line in (full, half)]
    assert size[0] == 2 * size[1]


def test_an_unknown_character_in_the_prompt_is_named(run):
    code, out, err = run("--prompt=to bé")
    assert (code, out) == (2, "") and err.startswith("error: --prompt: ") and "'é'" in err and err.count("\n") == 1


def test_without_a_prompt_a_char_model_starts_with_a_new_line_and_others_with_a_new_document(run, runs, tmp_path, monkeypatch):
    seen = []

    def noted(model, idx, *args, **options):
        seen.append(idx.tolist())
        return stream(model, idx, *args, **options)

    monkeypatch.setattr(sample, "stream", noted)
    run("--max_new_tokens=1")
    run(checkpoint(tmp_path / "byte.pt", runs, ByteTokenizer()), "--max_new_tokens=1")
    run(checkpoint(tmp_path / "no line ends.pt", runs, CharTokenizer("abc")), "--max_new_tokens=1")
    characters = load_checkpoint(runs / "out" / "tiny-mfa_kr" / "best.pt")["tokenizer"]["characters"]
    assert seen == [[[characters.index("\n")]], [[ByteTokenizer.eot]], [[0]]]


def test_bytes_that_make_no_character_do_not_stop_the_stream(run, runs, tmp_path):
    flag = checkpoint(tmp_path / "byte.pt", runs, ByteTokenizer())  # untrained: its bytes are rarely UTF-8
    code, out, err = run(flag, "--prompt=é", "--max_new_tokens=200", "--temperature=2")
    assert (code, err) == (0, "") and texts(out)[0].startswith("é") and "\ufffd" in out
    assert EOT in out or "200 tokens in" in out


def test_ids_that_the_tokenizer_does_not_know_are_not_shown(run, runs, tmp_path):
    flag = checkpoint(tmp_path / "padded.pt", runs, CharTokenizer("ab\n"), vocab_size=64)
    code, out, err = run(flag, "--prompt=ab", "--max_new_tokens=100")
    assert (code, err) == (0, "") and set(texts(out)[0]) <= set("ab\n") and len(texts(out)[0]) < 103


def test_a_reader_who_leaves_is_no_error(run, monkeypatch):
    class Closed:
        def write(self, text):
            raise BrokenPipeError

        def flush(self):
            raise BrokenPipeError

        def fileno(self):
            return os.open(os.devnull, os.O_WRONLY)

    monkeypatch.setattr(sys, "stdout", Closed())
    assert command(sample.main, Sample, ["--max_new_tokens=3"]) == 141


def test_sampling_writes_nothing(run, runs):
    before = files_below(runs)
    run("--max_new_tokens=3")
    assert files_below(runs) == before


# --------------------------------------------------------------------------------------------------
# stream()


def streamed(model, prompt, *args, **options) -> torch.Tensor:
    return torch.cat((prompt, *stream(model, prompt, *args, **options)), dim=1)


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_stream_is_what_generate_draws(use_cache):
    model = gpt("mfa_kr gated pre")  # block_size 24
    prompt = tokens(model.cfg, T=5)
    options = dict(temperature=1.3, top_k=9, top_p=0.8, use_cache=use_cache)
    drawn = [
        draw(model, prompt, 60, **options, generator=torch.Generator().manual_seed(3))
        for draw in (GPT.generate, streamed)
    ]
    assert torch.equal(*drawn)


def test_a_stream_leaves_training_mode_as_it_was_when_its_reader_has_seen_enough():
    model = gpt("mfa")
    for mode in (True, False):
        model.train(mode)
        tokens_of = stream(model, tokens(model.cfg, T=3), 5)
        next(tokens_of)
        tokens_of.close()
        assert model.training is mode


def test_a_sequence_that_has_drawn_stop_repeats_it_and_generation_ends_when_all_have():
    model, T = gpt("mfa"), 3
    prompt = tokens(model.cfg, T=T)
    free = model.generate(prompt, 15, temperature=0)
    stop = free[0, T + 2].item()
    first = [row.index(stop) if stop in row else 15 for row in free[:, T:].tolist()]
    out = streamed(model, prompt, 15, temperature=0, stop=stop)
    assert out.shape[1] == T + min(15, max(first) + 1)
    for row, whole, at in zip(out[:, T:], free[:, T:], first, strict=True):
        assert torch.equal(row[:at], whole[:at][: len(row)]) and (row[at:] == stop).all()


def test_a_prompt_beyond_block_size_can_be_cut_to_its_end():
    model = gpt("mfa")  # block_size 24
    prompt = tokens(model.cfg, T=17).repeat(1, 2)
    out = streamed(model, prompt, 9, temperature=0, keep_end=True)
    assert torch.equal(out[:, :34], prompt)
    assert torch.equal(out[:, 34:], model.generate(prompt[:, -24:], 9, temperature=0)[:, 24:])


def test_the_cache_of_generation_has_the_dtype_asked_for_and_the_decode_step_can_be_replaced():
    model, seen = gpt("mfa"), []

    def decode(model, new, cache):
        seen.append((new.shape, cache.length, cache.layers[0][0].dtype))
        return model.next_logits(new, cache)

    prompt = tokens(model.cfg, T=3)
    out = streamed(model, prompt, 4, temperature=0, cache_dtype=torch.bfloat16, decode=decode)
    assert seen == [((2, 1), length, torch.bfloat16) for length in (3, 4, 5)]  # after the prompt, one token at a time
    assert torch.equal(out, streamed(model, prompt, 4, temperature=0, cache_dtype=torch.bfloat16))


# --------------------------------------------------------------------------------------------------
# What a rebuilding might lose without a word


def test_all_options_of_drawing_reach_the_model_together(run, runs, tmp_path, monkeypatch):
    seen = []

    def noted(model, idx, n, **options):
        seen.append((n, dict(options)))
        return stream(model, idx, n, **options)

    monkeypatch.setattr(sample, "stream", noted)
    flags = "--temperature=1.5 --top_k=9 --top_p=0.7 --keep_end --stop --no-cache"
    flags += " --cache_dtype=bfloat16"
    flag = checkpoint(tmp_path / "byte.pt", runs, ByteTokenizer())
    run(flag, *flags.split(), "--max_new_tokens=3", "--seed=4", "--device=cpu")
    ((n, how),) = seen
    assert n == 3 and how.pop("generator").initial_seed() == 4 and how.pop("decode") is None
    assert how == dict(
        temperature=1.5, top_k=9, top_p=0.7, keep_end=True, stop=ByteTokenizer.eot,
        use_cache=False, cache_dtype=torch.bfloat16,
    )  # fmt: skip


def test_a_character_of_several_tokens_is_shown_whole_and_one_cut_short_is_marked(
    run, runs, tmp_path, monkeypatch
):
    ids = [*"é東".encode(), 0xC3]
    made = lambda *_, **__: (torch.tensor([[i]]) for i in ids)  # noqa: E731
    monkeypatch.setattr(sample, "stream", made)
    flag = checkpoint(tmp_path / "byte.pt", runs, ByteTokenizer())
    assert texts(run(flag, "--prompt=x", "--num_samples=2")[1]) == ["xé東\ufffd\n"] * 2


def test_of_ids_beyond_the_tokenizer_s_not_even_the_first_is_shown(
    run, runs, tmp_path, monkeypatch
):
    made = lambda *_, **__: (torch.tensor([[i]]) for i in (0, 3, 4, 2))  # noqa: E731
    monkeypatch.setattr(sample, "stream", made)
    flag = checkpoint(tmp_path / "padded.pt", runs, CharTokenizer("abc"), vocab_size=64)
    code, out, _ = run(flag, "--prompt=b")
    assert code == 0 and texts(out) == ["bac\n"]


def test_the_newest_run_is_the_one_written_to_last_not_touched_last(run, runs):
    latest = runs / "out" / "tiny-gqa" / "latest.pt"
    before = latest.stat()
    os.utime(latest, (before.st_atime, before.st_mtime - 3600))  # as a copy with its times kept
    assert run("--max_new_tokens=1")[1].startswith("out/tiny-mfa_kr/best.pt: mfa_kr, step ")
    os.utime(latest, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_a_seed_has_32_bits(run):
    assert run("--seed=4294967295", "--max_new_tokens=1")[0] == 0
    code, _, err = run("--seed=4294967296", "--max_new_tokens=1")
    assert code == 2 and err == "error: --seed must be from 0 to 2^32 - 1, not 4294967296\n"
