"""experiments/study/plot.py: its tables say what the results say."""

import math
import re
import shutil
import statistics

import pytest
import torch
from runs import ROOT, command
from study_rows import pairs, row

from experiments.bench import sharding, training
from experiments.study import conversion, plot, studies
from experiments.study.studies import (
    FIGURE1,
    FIGURE3,
    read_results,
    run_for,
)
from support.cli import BadInput
from support.generated import around, fill
from support.provenance import read_json

PAGE = ROOT / "experiments" / "RESULTS.md"


def test_cache_of_figure1():
    """Of MHA's: the comparisons that the claims rest on are at these sizes."""
    share = {arm: plot.sizes_of(run_for("figure1", arm, 1, 0))[2] for arm in FIGURE1}
    assert share["mha"] == 1 and share["mfa"] == share["mqa"] == share["mfa_kr_2d"] == 0.125
    assert share["mfa_half"] == 0.125 and share["mfa_kr"] == share["mfa_kr_half"] == 0.0625
    assert share["mfa_2d"] == share["gqa2"] == 0.25 and share["gqa4"] == 0.5
    assert share["mla_joint"] == share["mla_separate"] == share["mla_deepseek"] == 160 / 1024
    assert share["mla_joint_256"] == share["mla_separate_128"] == 288 / 1024


def test_no_results_do_not_empty_the_tables(tmp_path, capsys):
    page = tmp_path / "RESULTS.md"
    page.write_bytes(before := PAGE.read_bytes())
    (tmp_path / "other.jsonl").write_text("", encoding="utf-8")
    for name, says in (
        ("none.jsonl", "is not there"),
        ("other.jsonl", "has no result on pg-books-bpe8192"),
    ):
        assert (
            command(plot.main, plot.Args, [f"--results={tmp_path / name}", f"--page={page}"])
            == 2
        )
        assert says in capsys.readouterr().err and page.read_bytes() == before


def test_plots_and_tables(smoke):
    page = smoke.parents[1] / "RESULTS.md"
    shutil.copy(PAGE, page)
    assert (
        command(plot.main, plot.Args, ["--smoke", f"--results={smoke}", f"--page={page}"]) == 0
    )
    text = page.read_text(encoding="utf-8")
    for name in plot.PLOTS:
        assert (
            smoke.with_name(f"{name}.png").stat().st_size < 300_000
            and f"![{name}](results/{name}.png)" in text
        )
    assert "| not made |" not in text
    mqa = [
        r["ppl"]
        for r in plot.Results(read_results(smoke), "shakespeare-byte", toy=True).of(
            "figure1", "mqa"
        )
    ]
    assert f"| {sum(mqa) / 3:.2f} ± {torch.tensor(mqa, dtype=torch.float64).std():.2f} |" in text


def test_the_page_shows_the_committed_results(tmp_path):
    """python experiments/study/plot.py was run after the last change of results, tables or arms."""
    page, results = tmp_path / "RESULTS.md", tmp_path / "results" / "study.jsonl"
    results.parent.mkdir()
    for path in studies.RESULTS.parent.glob("*.json*"):
        shutil.copy(path, results.with_name(path.name))
    shutil.copy(PAGE, page)
    assert command(plot.main, plot.Args, [f"--results={results}", f"--page={page}"]) == 0
    assert page.read_text(encoding="utf-8") == PAGE.read_text(encoding="utf-8")
    drawn = {path.name for path in results.parent.glob("*.png")}
    assert drawn == {path.name for path in studies.RESULTS.parent.glob("*.png")}


def test_a_number_typed_into_a_generated_part_does_not_stay(tmp_path):
    text = PAGE.read_text(encoding="utf-8")
    for name in (*plot.PARTS, "copying", "rounding", "shapes", "decode", "training"):
        head, tail = around(text, name)
        assert fill(f"{head}\n1.05\n{tail}", {name: text[len(head) : -len(tail)].strip()}) == text


def test_the_shapes_are_counted_and_timed_as_one_model():
    def speed(attn, tokens_per_s, mode="", **other):
        size = 32 * 16384 * plot.cache_bytes(plot.preset("paper-1b", attn))
        row = dict(model="paper-1b", attn=attn, mode=mode, engine="ours", batch=32, context=16384)
        return row | dict(ms=1 / tokens_per_s, tokens_per_s=tokens_per_s, counts_bytes=size) | other

    rows = [speed("mha", 1000.0), speed("mfa_kr", 7000.0, "pre"), speed("mfa_kr", 8000.0, "post")]
    rows += [speed("mla", 9e9, "joint", counts_bytes=1)]  # of another size than the table's
    lines = [line.split(" | ") for line in plot.shapes_part(dict(rows=rows)).splitlines()]
    cells = {name.removeprefix("| "): rest[3:] for name, *rest in lines}
    assert cells["MHA"] == ["163,840", "100%", "336M", "1,000 |"]
    assert cells["MFA-KR"] == ["10,240", "6.25%", "187M", "pre 7,000, post 8,000 |"]
    assert cells["MLA, DeepSeek-V2-Lite's"][1:] == ["14.06%", "275M", "not measured |"]


def test_what_the_findings_say_is_in_the_results():
    """The numbers that experiments/README.md types, and the order that its sentences claim."""
    text = " ".join((ROOT / "experiments" / "README.md").read_text(encoding="utf-8").split())
    results = plot.Results(read_results(studies.RESULTS))

    def ppl(study, arm, factor=None):
        return statistics.mean(row["ppl"] for row in results.of(study, arm, factor))

    adamw = {arm: ppl("figure1", arm) for arm in FIGURE1}
    muon = {arm: ppl("modern", arm) for arm in studies.MODERN}
    narrow, reused = ppl("why", "mqa_16", 1), adamw["mfa_kr"]
    middle = {arm: ppl("modern", arm, 1) for arm in muon}
    pool = plot.pooled_seeds(results, "modern", studies.MODERN)
    half = pool.half_interval(2, 2)

    def further(one, other):
        """By how much the loss of other is higher."""
        return plot.difference(*([row["val_loss"] for row in results.of("modern", arm)] for arm in (one, other)), pool)[0]

    assert f"Muon takes MHA from {adamw['mha']:.1f} to {muon['mha']:.1f}, a norm on query and key (`--qk_norm`) to {muon['mha_norm']:.1f}, the best here." in text
    assert muon["mha_norm"] == min(muon.values())
    advised = [muon[arm] for arm in ("mha_norm", "gqa2_norm", "mfa_norm", "mfa_kr_half_norm")]
    assert advised == sorted(advised)
    assert "MHA {:.1f}, GQA with a quarter {:.1f}, MFA with an eighth {:.1f}, MFA-KR with a sixteenth {:.1f}.".format(*advised) in text
    ours = further("mha_norm", "mfa_norm"), further("mha_norm", "mfa_kr_half_norm")
    assert f"at 30M and 2.2 it is {ours[0]:.3f} and {ours[1]:.3f}." in text
    assert f"MFA-KR {math.log(6.45 / 6.41):.3f} nats worse; here they are {ours[0]:.3f} and {ours[1]:.3f} worse." in text
    nats = pairs(results, "modern", "mfa_norm", "mqa_norm")
    small = [[row["val_loss"] for row in results.of("ratio_7m", f"muon_{arm}")] for arm in ("mfa_norm", "mqa_norm")]
    seven = plot.difference(*small, plot.pooled_seeds(results, "ratio_7m", studies.MUON_ARMS))
    pairs_at = f"five pairs of runs of one rate and seed, by {min(nats):.3f} to {max(nats):.3f} nats (at 7M by {seven[0]:.3f} ± {seven[1]:.3f})."
    assert len(nats) == 6 and pairs_at in text and min(nats) > 0
    deepseek = plot.spread([row["ppl"] for row in results.of("modern", "mla_deepseek")], 1)
    assert f"better than DeepSeek's MLA with more ({deepseek})" in text and further("mfa_norm", "mla_deepseek") > half
    without = "Without it MFA ({mfa:.1f}) is as good as MHA ({mha:.1f}) and better than MQA ({mqa:.1f}) and GQA ({gqa2:.1f})"
    assert without.format(**muon) in text
    assert abs(further("mfa", "mha")) < half < min(further("mfa", "mqa"), further("mfa", "gqa2"))
    gains = {arm: muon[arm] - muon[f"{arm}_norm"] for arm in ("mha", "gqa2", "mqa", "mfa")}
    of_mfa = gains.pop("mfa")
    assert f"the norm gains those {min(gains.values()):.1f} to {max(gains.values()):.1f}, and MFA {of_mfa:.1f}." in text
    assert abs(adamw["mfa"] - adamw["mqa"]) < 0.2 and len(mlas := [arm for arm in FIGURE1 if arm.startswith("mla")]) == 5
    assert all(adamw[arm] > adamw["mqa"] - 0.05 for arm in mlas)
    assert f"better than MQA with an eighth and no norm ({muon['mqa']:.1f}), worse than MQA with one ({muon['mqa_norm']:.1f})" in text
    assert further("mfa_kr_half_norm", "mqa") > half and min(pairs(results, "modern", "mqa_norm", "mfa_kr_half_norm")) > 0
    assert f"as good as the paper's MFA-KR ({narrow:.1f} and {reused:.1f}), with Muon worse ({muon['mqa_16']:.1f})" in text
    assert abs(narrow - reused) < 0.3
    at_3e_3 = "newer form {mfa_kr_half_norm:.1f}, paper's {mfa_kr:.1f}; DeepSeek-V4's core "
    at_3e_3 += "{mfa_kr_v4:.1f}; turned back alone {mfa_kr_inverse:.1f}, half rotated too {mfa_kr_half:.1f}."
    assert at_3e_3.format(**middle) in text
    of_first = {arm: {factor: run_for("modern", arm, factor, 0) for factor in studies.MUON_GRID} for arm in muon}
    of_first = {arm: {f: results.done[run]["val_loss"] for f, run in runs.items() if run in results.done} for arm, runs in of_first.items()}
    normed = [of_first[arm] for arm in muon if studies.MODERN[arm].model.get("qk_norm") and len(of_first[arm]) > 1]
    assert len(normed) == 5 and all(max(losses) == 27 / 8 == min(losses, key=losses.get) for losses in normed)
    edge = [losses[9 / 4] - losses[27 / 8] for losses in normed]
    behind = pairs(results, "modern", "mha_norm", "mfa_norm")
    assert f"At every rate tried MFA is {min(behind):.3f} to {max(behind):.3f} behind MHA." in text and len(behind) == 6
    lost = [of_first[arm][9 / 4] - of_first[arm][3 / 2] for arm in ("mfa", "mqa", "gqa2")]
    assert f"by {min(edge):.3f} to {max(edge):.3f} nats." in text
    assert f"Without it MFA, MQA and GQA lose {min(lost):.2f} to {max(lost):.2f} at 6.75e-3 already." in text
    tried = [arm for arm in muon if len(results.losses_by_rate("modern", arm)) >= 3]
    assert len(tried) == 11 and "eleven attentions at" in text
    assert results.of("modern", "mla_deepseek")[0]["lr"] == 2e-3 and "DeepSeek's MLA is best at 2e-3." in text
    assert abs(adamw["mfa_half"] - adamw["mha"]) < 0.1 and f"it takes MFA to MHA's {adamw['mha']:.1f}. So does C = 2d" in text
    assert abs(adamw["mfa_2d"] - adamw["mha"]) < 0.1 and f"where GQA is slightly worse ({adamw['gqa2']:.1f})" in text
    assert "With Muon the wider query brings nothing ({mfa_half:.1f} with it, {mfa:.1f} without; 3e-3, one seed)".format(**middle) in text
    assert f"nor does Step-3's norm on the latents with it ({middle['mfa_step3']:.1f})" in text
    assert middle["mfa"] < min(middle["mfa_half"], middle["mfa_step3"])
    by_place = [
        [statistics.mean(dict(row["by_position"])[p] for row in results.trained("modern", arm)) for p in (32, 64, 128, 256)]
        for arm in ("mha_norm", "mfa_kr_half_norm", "mfa_norm")
    ]
    newer, mfa = ([ours - mha for ours, mha in zip(losses, by_place[0], strict=True)] for losses in by_place[1:])
    assert newer == sorted(newer) and mfa[0] == min(mfa)
    assert f"the newer form's grows from {newer[0]:.3f} (token 32) to {newer[-1]:.3f}, MFA's from {mfa[0]:.3f} to {mfa[-1]:.3f}." in text
    scaled = {size: ppl("figure3", f"mfa_half_{size}") / ppl("figure3", f"mha_{size}") for size in ("2m", "60m")}
    assert f"{-math.log(scaled['2m']):.3f} nats better than MHA to {math.log(scaled['60m']):.3f} worse (one seed at 60M)" in text
    reused = [ppl("question_a", arm, 10 / 7) for arm in ("pre", "inverse", "post")]
    assert reused == sorted(reused) and f"(`pre`) are best, {reused[0]:.1f}" in text and f"clearly worse, {reused[2]:.1f}" in text
    gate, plain = ppl("table4", "gated"), ppl("table4", "vanilla")
    assert f"better than the plain key, {gate:.1f} against {plain:.1f}" in text
    assert f"whether its gate is ({ppl('table4', 'residual'):.1f} without) is open." in text
    assert f"as the paper has ({ppl('why', 'mha_16'):.1f}), MFA at an eighth is nearly as good" in text
    plain, wide, factored = (ppl("table3", arm) for arm in ("plain", "wide", "factored"))
    assert f"better by {plain - wide:.1f}, as in" in text and round((plain - wide) / (plain - factored)) == 5
    one, restored = ppl("table6", "single_value"), ppl("table6", "compressed_value")
    assert f"One shared value seems better than one from a latent ({one:.1f}, {restored:.1f})." in text
    low, high = (ppl("figure1", "mfa_kr", factor) for factor in (studies.GRID[0], studies.GRID[2]))
    assert f"MFA-KR gains {low - high:.1f} from 1e-3 to 2e-3" in text
    recipes = read_json(ROOT / "experiments" / "results" / "train.json")["seeds"]["recipes"]
    best = {}
    for attn in ("mfa", "mfa_kr"):
        for flags, rows in recipes.items():
            if len(found := [row["best"] for row in rows if row["attn"] == attn]) >= 3:
                best.setdefault(("muon" in flags, attn), []).append(statistics.mean(found))
    for attn in ("mfa", "mfa_kr"):
        assert f"{min(best[True, attn]):.2f}" == "1.41" and f"{min(best[False, attn]):.2f}" == "1.42"
    assert "the baby preset at 1.41** (MFA and MFA-KR with Muon, three seeds; AdamW: 1.42)" in text
    packed = {row["dataset"]: row for row in read_json(ROOT / "experiments" / "results" / "packing.json")["rows"] if row["context"] == 4096}
    wiki, books = packed["wikitext-2"], packed["pg-books"]
    assert f"cuts {wiki['cut_stream']:.0%} of wikitext-2's articles, `--packing best-fit` {wiki['cut_packed']:.0%}, with {wiki['padding']:.1%}" in text
    assert books["cut_stream"] == books["cut_packed"] == 1  # books are longer than that
    for study in ("table3", "table4", "table5", "table6"):
        agree = re.search(r"(\d+ of \d+) pairs", plot.order(results, study))[1]
        assert re.search(rf"{agree} (pairs )?of Table {study[-1]}", text)


def test_what_is_said_of_the_papers_ratio_and_of_recall_is_in_the_results():
    text = " ".join((ROOT / "experiments" / "README.md").read_text(encoding="utf-8").split())
    rows = read_results(studies.RESULTS)
    results = plot.Results(rows)
    arms = ("mha_norm", "gqa2_norm", "mla_deepseek", "mfa_norm", "mqa_norm", "mfa_kr_half_norm")
    ppl = {arm: statistics.mean(row["ppl"] for row in results.trained("ratio_7m", f"muon_{arm}")) for arm in arms}
    names = "(MHA {:.1f}, GQA {:.1f}, MLA {:.1f}, MFA {:.1f}, MQA {:.1f}, MFA-KR {:.1f};"
    assert names.format(*ppl.values()) in text and [*ppl.values()] == sorted(ppl.values())

    def behind(recipe, arm):
        loss = [statistics.mean(row["val_loss"] for row in results.trained("ratio_7m", f"{recipe}_{a}")) for a in ("mha_norm", arm)]
        return loss[1] - loss[0]

    of = {arm: [behind(recipe, arm) for recipe in ("short", "muon")] for arm in ("mfa_norm", "mqa_norm", "mfa_kr_half_norm")}
    assert [*of] == sorted(of, key=lambda arm: of[arm][0]) == sorted(of, key=lambda arm: of[arm][1])
    assert all(0.35 < late / early < 0.51 for early, late in of.values())
    sentence = "about halved, too: MFA {:.3f} at 2.2 tokens and {:.3f} at 18.5, MFA-KR {:.3f} and {:.3f} ("
    assert sentence.format(*of["mfa_norm"], *of["mfa_kr_half_norm"]) in text
    long = [results.trained("ratio", f"muon_{arm}") for arm in ("mha_norm", "mfa_norm", "mfa_kr_half_norm")]
    assert [len(found) for found in long] == [1, 1, 1]  # one seed
    assert "MHA {:.2f}, MFA {:.2f}, MFA-KR {:.2f}.".format(*(row["ppl"] for (row,) in long)) in text
    mha, *others = (row["val_loss"] for (row,) in long)
    close = [other - mha for other in others]
    assert "MFA is {:.3f} nats behind MHA, MFA-KR {:.3f}; at 30M and 2.2".format(*close) in text
    for arm in (arm for arm in studies.RATIO if results.trained("ratio", arm)):  # at the rate best at 7M
        (found,) = results.losses_by_rate("ratio", arm)
        assert found == min(tried := results.losses_by_rate("ratio_7m", arm), key=lambda rate: statistics.mean(tried[rate].values()))
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert "MFA is {:.3f} nats behind MHA and MFA-KR {:.3f}, about half of what they are at 2.2 (one seed).".format(*close) in readme
    early = [statistics.mean(row["val_loss"] for row in results.trained("modern", arm)) for arm in ("mha_norm", "mfa_norm", "mfa_kr_half_norm")]
    assert all(0.4 < now / (then - early[0]) < 0.55 for now, then in zip(close, early[1:], strict=True))
    lines = plot.behind_mha(results)  # of the README's figure
    assert [point.nats for point in lines["30M, 18.6 tokens a parameter, one seed"][1:]] == pytest.approx(close)
    assert [point.nats for point in lines["7M, 2.2 tokens a parameter"][1:]] == pytest.approx([of[arm][0] for arm in ("mfa_norm", "mfa_kr_half_norm")])
    assert len(lines) == 4 and all(points[0].nats == 0 for points in lines.values())
    broken = [row for row in rows if studies.untrained(row)]
    assert len(broken) == 1 and broken[0]["arm"] == "muon_mha_norm" and not broken[0]["diverged"]
    rose = broken[0]["curve"][-1][1] - broken[0]["curve"][-2][1]
    assert f"Of {len(rows)} runs one did (MHA, 7M, by {rose:.2f})" in text and broken[0] not in results.done.values()
    paper = {arm: results.of("ratio_7m", f"adamw_{arm}", 1)[0] for arm in ("mha", "mfa", "mqa")}  # at 2e-3
    assert "at 18.5 one seed: MHA {:.1f}, MFA {:.1f}, MQA {:.1f})".format(*(row["ppl"] for row in paper.values())) in text
    short = [statistics.mean(row["val_loss"] for row in results.of("figure3", f"{arm}_7m")) for arm in ("mha", "mfa")]
    stays = short[1] - short[0], paper["mfa"]["val_loss"] - paper["mha"]["val_loss"]
    assert {f"{loss:.3f}" for loss in stays} == {"0.044"} and "With AdamW and no norm MFA's stays at 0.044 (7M, 2e-3;" in text
    late = [row["curve"][-1][1] - row["curve"][-2][1] for row in rows if row not in broken and row["curve"]]
    assert max(late) < 0.01

    costs = plot.words_by_arm(results, plot.words.read(plot.words.RESULTS))
    shares = [[100 * plot.words.mean_of(found) for found in costs["ratio_7m", f"muon_{arm}"].blimp] for arm in arms]
    every = sum(shares, [])
    assert f"BLiMP (chance: 50%) is at {min(every):.0f}% to {max(every):.0f}% for all at 7M" in text
    larger = [100 * plot.words.mean_of(found) for (study, _), cost in costs.items() if study == "ratio" for found in cost.blimp]
    assert len(larger) == 3 and f"and at {min(larger):.0f}% to {max(larger):.0f}% at 30M." in text
    assert f"seeds up to {max(max(of) - min(of) for of in shares):.1f} apart" in text

    def loss(recipe, arm, part, study="ratio_7m"):
        return statistics.mean(found[part][1] for found in costs[study, f"{recipe}_{arm}"].recall)

    rare = [loss("muon", arm, "rare") for arm in ("mha_norm", "gqa2_norm", "mfa_norm", "mqa_norm", "mla_deepseek", "mfa_kr_half_norm")]
    assert "costs at 7M MHA {:.1f} nats, GQA {:.1f}, MFA {:.1f}, MQA {:.1f}, MLA {:.1f}, MFA-KR {:.1f} (".format(*rare) in text
    rare = [loss("muon", arm, "rare", "ratio") for arm in ("mha_norm", "mfa_norm", "mfa_kr_half_norm")]
    assert "and at 30M MHA {:.1f}, MFA {:.1f}, MFA-KR {:.1f} (one seed).".format(*rare) in text
    mha, *others = (loss("short", arm, "rare") for arm in ("mha_norm", "mfa_norm", "mqa_norm", "mfa_kr_half_norm"))
    assert f"it costs MHA {mha:.1f}, MFA, MQA and MFA-KR {min(others):.1f} to {max(others):.1f}" in text
    apart = [[found["rare"][1] for found in costs["ratio_7m", f"muon_{arm}"].recall] for arm in arms]
    assert f"(seeds up to {max(max(of) - min(of) for of in apart):.1f} apart)" in text
    assert "With AdamW MHA {:.1f}, MFA-KR {:.1f}.".format(*(loss("adamw", arm, "rare") for arm in ("mha", "mfa_kr"))) in text
    found = costs["ratio_7m", "muon_mfa_norm"].recall[0]
    n = {part: found[part][0] for part in ("new", "seen")}
    lost = {part: n[part] * (loss("muon", "mfa_norm", part) - loss("muon", "mha_norm", part)) for part in n}
    assert n["new"] / sum(n.values()) > 0.85 and lost["new"] / sum(lost.values()) == pytest.approx(0.75, abs=0.05)


def test_what_is_said_of_muon_by_heads_of_conversion_and_of_several_gpus_is_in_the_results():
    text = " ".join((ROOT / "experiments" / "README.md").read_text(encoding="utf-8").split())
    results = plot.Results(read_results(studies.RESULTS))
    gains = {}
    for attn in ("mha", "mfa"):
        stacked, apart = ([row["val_loss"] for row in results.of("muon_heads", f"{attn}_{how}")] for how in ("stacked", "apart"))
        assert len(apart) == 3 and all(a < s for a, s in zip(apart, stacked, strict=True))
        gains[attn] = statistics.mean(stacked) - statistics.mean(apart)
    assert f"by {gains['mha']:.3f} nats for MHA and {gains['mfa']:.3f} for MFA" in text
    behind = [
        statistics.mean(row["val_loss"] for row in results.of("muon_heads", f"mfa_{how}"))
        - statistics.mean(row["val_loss"] for row in results.of("muon_heads", f"mha_{how}"))
        for how in ("stacked", "apart")
    ]
    assert f"which is {behind[0]:.3f} behind MHA there, then {behind[1]:.3f}." in text
    made = {one.attn: one for one in plot.converted(conversion.read_results(conversion.RESULTS), results)}
    worse = {attn: math.exp(list(one.losses.values())[-1]) - math.exp(one.scratch) for attn, one in made.items()}
    sentence = "a GQA {gqa:.1f} worse than one from scratch. An MLA is {mla:.1f} worse, an MFA {mfa:.1f}."
    assert sentence.format(**worse) in text
    assert "MFA-KR (inverse, half rotated) is {mfa_kr:.1f} worse".format(**worse) in text
    train = read_json(studies.RESULTS.with_name("train.json"))
    nano = train["baby"]["nanoGPT"]["seconds_to_target"]
    quick = {row["flags"]: row["timed"]["seconds_to_target"] or math.inf for row in train["baby"]["quick"]}
    muon = next(s for flags, s in quick.items() if "muon" in flags and "--max_iters 450" in flags)
    adamw = min(s for flags, s in quick.items() if "adamw" in flags)
    assert f"{nano / muon:.1f} times as fast (450 steps of Muon in {muon:.1f} s against {nano:.1f}, one seed" in text
    assert f"AdamW {adamw:.1f} s" in text
    rows = train["muon"]["rows"]
    shares = {size: [training.added(row, "muon") for name, row in rows.items() if size in name] for size in ("small", "baby")}
    assert f"Muon adds {max(shares['small']):.1%} to a step of the preset small (MHA, 16 pieces)," in text
    worst = max((row for name, row in rows.items() if "baby" in name), key=lambda row: training.added(row, "muon"))["ms"]
    slower = f"{worst['muon']:.1f} ms instead of {worst['adamw']:.1f}"
    assert f"at most {max(shares['baby']):.0%} to baby's ({slower})" in text
    baby = [row["ms"] for name, row in rows.items() if "baby" in name]
    longer = [ms["muon_heads"] / ms["muon"] - 1 for ms in baby]
    assert f"A small model's step takes {min(longer) * 100:.0f} to {max(longer):.0%} longer." in text
    two = read_json(studies.RESULTS.with_name("many_gpus.json"))["speed"]["figures"][1]
    assert two["processes"] == 2 and f"train {2 * two['scaling']:.2f} times as fast as one" in text
    rows = [row for row in sharding.read(sharding.RESULTS) if row["preset"] == "paper-7b" and row["fits"]]
    two, one = sorted(rows, key=lambda row: -row["processes"])
    assert two["shard"] and f"at a context of {two['context']:,}, at {two['tokens_per_s']:,.0f} tokens/s" in text
    assert not one["shard"] and f"One trains it at {one['context']:,} ({one['peak_bytes'] / 1e9:.0f} GB)" in text
    ends = one["losses"][0], statistics.mean(one["losses"][-5:])
    assert f"{len(one['losses'])} steps take its loss from {ends[0]:.1f} to {ends[1]:.1f}." in text


def test_what_is_said_of_training_and_prefill_is_in_the_results():
    text = " ".join((ROOT / "experiments" / "README.md").read_text(encoding="utf-8").split())
    rows = plot.equal_time.read(plot.equal_time.RESULTS)
    long = "1B, context 8192"
    of = {(shape, what): rows[shape, what, "mfa"]["of_mha"] for shape in ("124M", "1B", long) for what in ("train", "prefill")}
    assert f"{of['124M', 'train']:.2f}" == f"{of['1B', 'train']:.2f}" and f"{of['1B', 'train']:.2f} of MHA's speed at 124M and at 1B" in text
    more = rows[long, "train", "mfa"]["flops_per_token"] / rows[long, "train", "mha"]["flops_per_token"] - 1
    assert f"and at {of[long, 'train']:.2f} at 1B with a context of 8,192, where its wider heads ask for {more:.0%} more operations" in text
    gqa = {shape: rows[shape, "prefill", "gqa2"]["of_mha"] for shape in ("124M", "1B", long)}
    ours, theirs = ([f"{of:.2f}" for of in all] for all in ((of[shape, "prefill"] for shape in gqa), gqa.values()))
    assert "prefill runs at {}, {} and {} (124M, 1B, 1B at 8,192), GQA's at {}, {} and {}.".format(*ours, *theirs) in text
    free = [row["of_mha"] for (shape, _, arm), row in rows.items() if arm in ("mqa", "gqa2") and shape != "30M"]
    assert min(free) > 0.97  # they train as fast as MHA
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"at 1B, trains at {of['1B', 'train']:.2f} of MHA's speed ({of[long, 'train']:.2f} at a context of 8,192)" in readme


def test_order_names_the_pairs_that_differ():
    losses = dict(mha=3.7, mfa=3.8, vanilla=3.9, gated=None)
    rows = [
        row(studies.Task("table4", arm, run_for("table4", arm, 1, 0)), loss)
        for arm, loss in losses.items()
    ]
    text = plot.order(plot.Results(rows), "table4")
    assert (
        text
        == f"Order: 2 of 3 pairs as in the paper. The other way round here: MHA ({math.exp(3.7):.2f}) better than MFA ({math.exp(3.8):.2f})."
    )
    table = plot.main_table(plot.Results(rows), "table4")
    assert "1 of 1 failed" in table and table.count("not made") == 2
    mfa, mha, proj = (("table4", arm) for arm in ("mfa", "mha", "proj"))
    assert plot.difference_cells(plot.Results(rows), mfa, mha)[3:] == ["-0.1000", "in 0 of 1 seeds"]
    assert plot.difference_cells(plot.Results(rows), mfa, proj)[1:] == [
        "+ extra value projection",
        "6.25%",
        "–",
        "not made",
    ]


def test_a_run_that_did_not_train_is_counted_and_not_averaged():
    def rows(*ends):
        tasks = [
            studies.Task("why", "mha_16", run_for("why", "mha_16", 1, seed))
            for seed in range(len(ends))
        ]
        return [
            row(task, end) | dict(curve=[[500, 4.7], [4000, end]])
            for task, end in zip(tasks, ends, strict=True)
        ]

    results = plot.Results(rows(3.7, 4.7, 3.9))
    assert (
        plot.outcome(results.of("why", "mha_16"), "val_loss") == "3.80 ± 0.14, 1 of 3 failed"
    )
    assert [found["val_loss"] for found in results.trained("why", "mha_16")] == [3.7, 3.9]
    assert plot.outcome(rows(5.0)) == "1 of 1 failed"


def test_runs_whose_gradient_rounding_moves_far_are_named():
    def line(seed, *off):
        looks = [[step, each] for step, each in enumerate(off, 1)]
        return row(studies.Task("why", "mha_16", run_for("why", "mha_16", 1, seed)), 3.7) | dict(
            name="MHA", rounding=looks
        )

    rows = [line(0, 0.01, 0.3, 0.2), line(1, 0.01, 0.04), line(2, 0.02, None)]
    *head, last = plot.gradient_part(plot.Results([*rows, line(0) | dict(seed=3)])).splitlines()
    assert head[2:4] == [
        "| why: MHA | 0.0014 | 0 | 1% | 30% | 20% | 40.45 |",
        "| why: MHA | 0.0014 | 2 | 2% | not finite | not finite | 40.45 |",
    ]
    assert (
        last
        == "Rounding moves the gradient of the other 1 of 3 runs that were asked by 4.0% at most."
    )


def test_a_difference_of_means_has_students_interval():
    d, half = plot.difference([1.0, 2.0, 3.0], [2.0, 3.0, 4.0])
    assert d == 1 and half == pytest.approx(
        2.776 * math.sqrt(2 / 3)
    )  # equal variances of 1, 4 degrees of freedom
    assert plot.difference([1.0], [2.0, 3.0, 4.0]) == (2.0, None)


def test_a_size_is_compared_at_the_seeds_that_all_its_attentions_have_trained():
    def line(arm, seed, end):
        return row(studies.Task("figure3", arm, run_for("figure3", arm, 1, seed)), end) | dict(
            curve=[[1, 4.7], [2, end]]
        )

    rows = [line(arm, seed, 3.7) for arm in ("mha_2m", "mfa_2m", "mha_7m") for seed in (0, 1)]
    rows += [line("mfa_kr_2m", 0, 3.8), line("mfa_kr_2m", 1, 4.8)]  # the second did not train
    seeds = {
        arm: [found["seed"] for found in lines]
        for arm, lines in plot.same_seeds(plot.Results(rows), "figure3").items()
    }
    assert seeds["mha_2m"] == seeds["mfa_2m"] == seeds["mfa_kr_2m"] == [0]
    assert seeds["mha_7m"] == [0, 1] and seeds["mha_60m"] == []
    table = plot.figure3_part(plot.Results([*rows, line("mfa_7m", 0, 4.8)]))
    assert "| 1 of 1 failed |" in table and table.count("not made") == len(FIGURE3) - 5


def test_distances_from_mha_by_position_are_of_means_over_seeds():
    def line(arm, seed, *losses):
        by = dict(by_position=[[1 << i >> 1, loss] for i, loss in enumerate(losses)])
        return row(studies.Task("figure1", arm, run_for("figure1", arm, 1, seed)), 3.7) | by

    rows = [line("mfa", 0, 5.0, 4.0, 3.0), line("mfa", 1, 5.2, 4.0, 3.0)]
    assert plot.positions_part(plot.Results(rows)) == "MHA was not made."
    text = plot.positions_part(plot.Results([*rows, line("mha", 0, 5.0, 4.1, 3.0)]))
    assert text.startswith("| nats worse than MHA, position | 0 | 1 | 2 to 3 |") and "MHA |" not in text
    assert (
        "| 0.100 | -0.100 | 0.000 |" in text
        and text.count("| not made | not made | not made |") == len(FIGURE1) - 2
    )


def test_power_law():
    a, b, rms = plot.power_law([(x, 20 * x**-0.05) for x in (1e12, 1e13, 1e15)])
    assert (a, b) == (pytest.approx(20), pytest.approx(0.05)) and rms < 1e-9


def test_a_missing_mark():
    with pytest.raises(BadInput, match="<!-- status -->"):
        fill("no marks", {"status": "text"})
    assert (
        fill("a\n<!-- x -->\nold\n<!-- /x -->\nb", {"x": r"\new"})
        == "a\n<!-- x -->\n\\new\n<!-- /x -->\nb"
    )


def studied(study: str, losses: dict[str, list[float]]) -> list[dict]:
    """Lines of an arm's seeds, with weights whose sha256 is "arm-seed"."""
    rows = []
    for arm, ends in losses.items():
        for seed, end in enumerate(ends):
            r = run_for(study, arm, 1, seed)
            tokens = r.max_iters * r.batch_size * r.cfg.block_size
            line = row(studies.Task(study, arm, r), end) | dict(name=arm, tokens=tokens)
            line |= dict(dataset=studies.dataset_of(study), steps=r.max_iters)
            line |= dict(curve=[[r.max_iters // 2, end + 0.3], [r.max_iters, end]])
            rows.append(line | dict(weights=dict(file="f.pt", sha256=f"{study}-{arm}-{seed}")))
    return rows


RATIO_LOSSES = dict(muon_mha_norm=[3.2, 3.3], muon_mfa_norm=[3.26], muon_mfa_kr_half_norm=[3.3], adamw_mha=[3.4])
MODERN_LOSSES = dict(mha_norm=[3.64], mfa_norm=[3.66])


def test_a_section_without_rows_is_left_out():
    results = plot.Results(studied("modern", MODERN_LOSSES))
    assert plot.ratio_part(results) == plot.muon_heads_part(results) == ""
    assert plot.words_part(results, {}) == plot.equal_time_part(results, {}) == ""
    assert plot.words_plot(results, {}) is plot.equal_time_plot(results, {}) is None


def test_the_ratio_is_shown_by_recipe():
    results = plot.Results(studied("ratio", RATIO_LOSSES))
    text = plot.ratio_part(results)
    assert "**30M**: 555M tokens, 18.6 a parameter, in 16,940 steps of 64 x 512." in text
    mean, deviation = (math.exp(3.2) + math.exp(3.3)) / 2, (math.exp(3.3) - math.exp(3.2)) / 2**0.5
    assert f"| MHA, qk_norm | 16,384 | 100.00% | 29.89M | 0.003 | 2 | {mean:.2f} ± {deviation:.2f} | not made |" in text
    assert f"| MHA | 16,384 | 100.00% | 29.89M | 0.0014 | 1 | {math.exp(3.4):.2f} | not made |" in text
    assert "| GQA, 2 KV heads, qk_norm | 4,096 | 25.00% | 29.89M | – | 0 | not made | – | not made | – |" in text
    half = 12.71 * 0.1 / 2**0.5 * (1 + 1 / 2) ** 0.5  # the two MHAs' deviation, one degree of freedom
    assert f"| MFA, qk_norm | MHA, qk_norm | 100.00% | -0.0100 ± {half:.4f} | in 0 of 1 seeds |" in text
    assert "deviation, 0.0707 nats, from all arms with several seeds together, 1 degrees of freedom" in text
    axes = plot.figure1(results).axes
    assert [ax.get_title().splitlines() for ax in axes] == [
        ["AdamW, 30M, the paper's 18.5 a parameter", "one rate, one seed"],
        ["Muon and a norm, 30M, the paper's 18.5 a parameter", "one rate, mean ± deviation of 1 to 2 seeds"],
    ]


def measured_words(*names: str) -> dict:
    found = {}
    for i, name in enumerate(names):
        blimp = {"island_effects": {"a": 0.5 + i / 10, "b": 0.7}, "binding": {"c": 0.9}}
        distance = [[1, 5, 3.0 + i, 2, 4.0], [2, 7, 2.0 + i, 0, None]]
        recall = dict(new=[10, 5.0 + i], seen=[12, 2.5 + i], rare=[2, 4.0 + i], distance=distance)
        found |= {(name, "blimp"): dict(found=blimp), (name, "recall"): dict(found=recall)}
    return found


def test_words_stand_beside_the_cache():
    """Means over seeds; models that were not measured, and checkpoints of no study, are left out."""
    results = plot.Results(studied("ratio", RATIO_LOSSES))
    measured = measured_words("ratio-muon_mha_norm-0", "ratio-muon_mha_norm-1", "ratio-muon_mfa_norm-0", "somebody's")
    text = plot.words_part(results, measured)
    mha, mfa, ngram = (next(line for line in text.splitlines() if line.startswith(name)) for name in ("| MHA, qk_norm, Muon, 30M, 555M tokens", "| MFA, qk_norm, Muon", "| n-gram"))
    assert mha.endswith("| 71.7 ± 2.4 | 5.5000 ± 0.7071 | 3.0000 ± 0.7071 | 4.5000 ± 0.7071 |")
    assert mfa.startswith("| MFA, qk_norm, Muon, 30M, 555M tokens | 2,048 | 12.50% |") and mfa.endswith("| 76.7 | 7.0000 | 4.5000 | 6.0000 |")
    assert ngram == "| n-gram, published | – | – | – | 61.2 | – | – | – |"
    assert "| island effects, 2 paradigms | 62.5 ± 3.5 | 70.0 |" in text
    assert "| MHA, qk_norm, Muon, 30M, 555M tokens | 3.5000 | 2.5000 |" in text and "| 1 | 2 to 3 |" in text
    _, rare, right = plot.words_plot(results, measured).axes
    assert [[*line.get_ydata()] for line in rare.lines] == [[4, 5], [6]]
    assert [[*line.get_ydata()] for line in right.lines] == [[0, 0], [1.5, 1.5]]


def speeds(**tokens_per_s: float) -> dict:
    found = {}
    for arm, speed in tokens_per_s.items():
        for what in ("train", "prefill"):
            cfg = run_for("modern", arm, 1, 0).cfg
            line = dict(tokens_per_s=speed, of_mha=speed / tokens_per_s["mha"], params=30e6)
            line |= dict(flops_per_token=2e8, cache_bytes=plot.cache_bytes(cfg), config=vars(cfg))
            line |= dict(command="python x", commit="1234567", device="a card", versions=dict(torch="2"))
            found["30M", what, arm] = line
    return found


def test_losses_stand_beside_the_seconds_that_they_took():
    rows = studied("modern", MODERN_LOSSES) + studied("ratio", RATIO_LOSSES)
    results, measured = plot.Results(rows), speeds(mha=1e6, mha_norm=1e6, mfa_norm=0.8e6)
    text = plot.equal_time_part(results, measured)
    assert "| MFA, qk_norm | 30.0M | 12.50% | 0.200 | 800,000 | 0.80 | 800,000 | 0.80 |" in text
    assert "## At equal time\n\n| 30M, 64 x 512 tokens, muon |" in text and "124M" not in text
    slope = (3.26 - 3.66) / math.log(16_940 * 64 / (4000 * 32))
    in_time = [end + slope * math.log(0.8) for end in (3.66, 3.26)]
    assert f"| MFA, qk_norm | 66M | 3.6600 | 13.1 | 82 | {in_time[0]:.4f} |" in text
    assert f"| MFA, qk_norm | 555M | 3.2600 | 111.0 | 694 | {in_time[1]:.4f} |" in text
    assert "| MHA, qk_norm | 555M | 3.2500 ± 0.0707 | 111.0 | 555 | 3.2500 |" in text
    alone = plot.equal_time_part(plot.Results(rows[:2]), measured)
    assert "| MFA, qk_norm | 66M | 3.6600 | 13.1 | 82 |\n" in alone and "in MHA's seconds" not in alone
    figure = plot.equal_time_plot(results, measured)
    assert len(figure.axes) == 4
    ends = [[line.get_xdata()[-1] for line in ax.lines] for ax in figure.axes[2:]]
    assert ends[0] == pytest.approx([111.02] * 2, rel=1e-3) and ends[1] == pytest.approx([555.1, 693.9], rel=1e-3)
