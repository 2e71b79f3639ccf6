"""Run folders with planted effects go through the whole analysis, which has to find them again."""

import json
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
from mock_learner import MODES, Plant, job, study, write_lines, write_run
from scipy import stats as scipy_stats

from projected_grpo import arms
from projected_grpo.config import UserError
from projected_grpo.studies import layout, results_docs, run, summaries, tables
from projected_grpo.studies.analysis import Analysis
from projected_grpo.studies.run import STUDIES

PLANTS = {
    "none": ("none", Plant(0.80, 0.30, relearn_onset=20)),
    "drop": ("drop", Plant(0.10, 0.34, shift=2.0, relearn_onset=40)),
    "erase": ("erase", Plant(0.58, 0.28)),
    "weak": ("erase", Plant(0.78, 0.30, caught=0.3)),
    "broken": ("drop", Plant(0.05, 0.05, caught=0.3, watched=0.2)),
    "route": ("route", Plant(0.30, 0.30, quarantined=True)),
    "random_V": ("random_V", Plant(0.79, 0.30, shift=0.0)),
    "drop_random": ("drop_random", Plant(0.80, 0.30)),
    "penalty acc .9": ("penalty", Plant(0.02, 0.40)),
    "honest": ("honest", Plant(0.03, 0.60)),
    "keep": ("keep", Plant(0.04, 0.58)),
    "brake": ("keep", Plant(0.04, 0.30)),
    "brake_random": ("keep_random", Plant(0.60, 0.20)),
    "sure": ("sure", Plant(0.04, 0.45, by_kind=(("sure", 0.99), ("learnable", 0.40), ("hard", 0.0)))),
    "keep_random": ("keep_random", Plant(0.60, 0.20)),
}
CONTROLS = {"erase": "random_V", "drop": "drop_random", "keep": "keep_random"}
ORACLES = ("penalty", "honest")
QUOTED = """
[tables.first]
study = "headline"
[tables.first.columns]
"hack ↓" = "deploy_hack"
"gain kept" = "gain_kept"
"its random control: hack" = "deploy_hack of random"
aim = "aim"
[tables.first.rows]
base = "untrained"
keep = ""
honest = "paid for right answers"
"""
README = """# A page

Before.

<!-- table: first -->
stale
<!-- end -->

After.
"""
HELD_OUT = Plant(0.10, 0.30, by_mode=(("sentinel", 0.35),))
HELD_OUT_RANDOM = Plant(0.80, 0.30, by_mode=(("sentinel", 0.80),))
SEEDS = range(41, 46)
FLAGS = {"weak": ("--weak",), "broken": ("--broken",), "brake": ("--brake",), "brake_random": ("--brake",)}
"""Of labels whose arm another label has. A control has the flags of what it controls."""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(studies, folder of runs, folder of docs) with summaries and results.md written; the arms' controls in ARMS."""
    root, jobs = tmp_path_factory.mktemp("world"), []
    for label, (arm, plant) in PLANTS.items():
        for seed in SEEDS:
            jobs.append(job(label, arm, seed, *FLAGS.get(label, ())))
            write_run(root / "runs", jobs[-1], plant, oracle=arm in ORACLES)
    fold = [j for j in jobs if j.label in ("none", "random_V")]
    for seed in SEEDS:
        fold.append(job("drop but sentinel", "drop", seed, "--known-modes=rest"))
        write_run(root / "runs", fold[-1], HELD_OUT, known=tuple(m for m in MODES if m != "sentinel"))
        fold.append(job("drop_random but sentinel", "drop_random", seed, "--known-modes=rest"))
        write_run(root / "runs", fold[-1], HELD_OUT_RANDOM, known=tuple(m for m in MODES if m != "sentinel"))
        fold.append(job("drop only run_tests", "drop", seed, "--known-modes=run_tests"))
        write_run(root / "runs", fold[-1], HELD_OUT, known=("run_tests",))
    with pytest.MonkeyPatch.context() as patch:
        for arm in {j.intervention for j in jobs}:
            row = SimpleNamespace(control=CONTROLS.get(arm), oracle=arm in ORACLES, rows="drop", is_control=False)
            patch.setitem(arms.ARMS, arm, row)
        studies = (study("headline", jobs), study("leave_one_out", fold))
        summaries.update(studies, root / "runs", root / "docs" / "results")
        (root / "docs" / "results" / "quoted.toml").write_text(QUOTED)
        (root / "README.md").write_text(README)
        results_docs.main(str(root), str(root / "outputs"))
        yield SimpleNamespace(root=root, runs=root / "runs", docs=root / "docs", studies=studies)


@pytest.fixture(scope="module")
def headline(world):
    return Analysis(summaries.load(world.docs / "results", "headline"))


def test_planted_levels_are_found(headline):
    for label, (_, plant) in PLANTS.items():
        for measure in ("hack", "deploy_hack"):
            found = np.mean(list(headline.level(label, measure).values()))
            assert found == pytest.approx(plant.hack, abs=0.06), (label, measure)
        assert np.mean(list(headline.level(label, "deploy_solve").values())) == pytest.approx(plant.solve, abs=0.08)
        assert list(headline.level(label, "hack")) == list(SEEDS)
    assert np.mean(list(headline.base("hack").values())) == pytest.approx(0.05, abs=0.02)
    assert np.mean(list(headline.rates["route", "last", "trained", "all", "hack"].values())) > 0.8


def test_planted_verdicts_are_recovered(headline):
    found = {x.name: headline.h1(x, none, "deploy_") for x, none in headline.candidates()}
    assert {name: h.verdict for name, h in found.items()} == {
        "drop": "supported", "erase": "undecided", "weak": "falsified", "broken": "falsified", "keep": "supported",
        "brake": "supported",
    }  # fmt: skip
    assert "solve fell by over 15" in found["broken"].why
    assert "cut under 15" in found["weak"].why
    assert found["drop"].cut.mean == pytest.approx(0.70, abs=0.06)
    assert found["drop"].over_control.lo > 0.5


def test_differences_are_paired_by_seed_and_agree_with_scipy(headline):
    c = headline.compare("drop", "none", "deploy_hack")
    a, b = ([headline.level(x, "deploy_hack")[s] for s in SEEDS] for x in ("drop", "none"))
    theirs = scipy_stats.ttest_rel(a, b).confidence_interval()
    assert (c.t.lo, c.t.hi) == pytest.approx((theirs.low, theirs.high))
    assert c.boot.mean == pytest.approx(c.t.mean, abs=1e-4)
    assert (c.flip.p, c.split.p) == pytest.approx((2 / 32, 2 / 252))
    none = headline.compare("random_V", "none", "deploy_hack")
    assert none.t.lo < 0 < none.t.hi
    assert headline.matched("random_V", "none", "deploy_solve").holds
    assert not headline.matched("broken", "none", "deploy_solve").holds


def test_onsets_peaks_and_relearning(headline):
    assert headline.onsets("none").median == pytest.approx(21, abs=2)
    assert headline.onsets("drop").median is None
    assert headline.onsets("none", "relearn").median == pytest.approx(21, abs=2)
    assert headline.onsets("drop", "relearn").median == pytest.approx(42, abs=2)
    assert np.mean(list(headline.peak("none").values())) == pytest.approx(0.84, abs=0.06)


def test_planted_detector_quality(headline):
    table = headline.joined("detector").filter((pl.col("mode") == "all") & (pl.col("phase") == "0-19"))
    means = table.group_by("label", "score").agg(pl.col("auroc").mean())
    found = {(r["label"], r["score"]): r["auroc"] for r in means.iter_rows(named=True)}
    expected = scipy_stats.norm.cdf(2.0 / np.sqrt(2))
    assert found["drop", "own"] == pytest.approx(expected, abs=0.02)
    assert found["drop", "random"] == pytest.approx(0.5, abs=0.03)
    assert found["random_V", "own"] == pytest.approx(0.5, abs=0.03)


def test_the_held_out_mode_is_told_from_the_known(world):
    a = Analysis(summaries.load(world.docs / "results", "leave_one_out"))
    label = a.labels["drop but sentinel"]
    assert label.heldout == ("sentinel",)
    assert np.mean(list(a.pooled(label.name, "hack", label.heldout).values())) == pytest.approx(0.35, abs=0.1)
    known = [m for m in MODES if m != "sentinel"]
    assert np.mean(list(a.pooled(label.name, "hack", known).values())) == pytest.approx(0.10, abs=0.05)


def test_h2_is_read_on_the_mode_left_out_against_the_random_control(world):
    a = Analysis(summaries.load(world.docs / "results", "leave_one_out"))
    (row,) = tables.h2(a).rows  # a single known mode has no control here, random_V is one itself
    assert row[:3] == ("drop but sentinel", "sentinel", "supported")
    assert row[5].mean == pytest.approx(0.45, abs=0.1)


def test_modes_like_the_known_one_are_told_from_those_unlike_it(world):
    a = Analysis(summaries.load(world.docs / "results", "leave_one_out"))
    (row,) = tables.transfer(a).rows
    label, known, like, unlike, *cells = row
    assert (label, known, like, unlike) == ("drop only run_tests", "run_tests", "stdout_marker file_marker", "sentinel")
    left = [float(c.split(" of ")[0]) for c in cells]
    assert left == pytest.approx([0.10, 0.10, 0.35], abs=0.1)
    assert all(float(c.split(" of ")[1]) == pytest.approx(0.80, abs=0.1) for c in cells)


def test_gain_kept_is_what_was_planted(headline):
    """(solve − .30) / (.60 − .30), seeds paired; on learnable problems each rate is 1.25 times as high."""
    planted = {"honest": 1.0, "keep": 0.93, "brake": 0.0, "none": 0.0, "drop": 0.13, "keep_random": -0.33, "sure": 0.5}
    for name, kept in planted.items():
        found = headline.gain_kept(headline.labels[name])
        assert found.mean == pytest.approx(kept, abs=0.15), name
        assert found.lo <= kept <= found.hi, name
        assert found.n == len(SEEDS)
    for name, kept in {"keep": 0.93, "brake": 0.0, "sure": 0.07}.items():  # what "sure" gains is not the learnable's
        assert headline.gain_kept(headline.labels[name], "learnable").mean == pytest.approx(kept, abs=0.2), name
    mine, whole = headline.gains(headline.labels["keep"])
    base = headline.deployed("honest", "solve", when="first")
    assert mine == {s: headline.deployed("keep", "solve")[s] - base[s] for s in SEEDS}
    assert whole == {s: headline.deployed("honest", "solve")[s] - base[s] for s in SEEDS}


def test_the_aim_tells_what_keeps_learning_from_a_brake(headline):
    found = {x.name: headline.aim(x) for x, _ in headline.candidates()}
    assert found["keep"].verdict == "supported"
    assert found["keep"].over_control.mean == pytest.approx(1.26, abs=0.2)
    assert found["brake"].verdict == "falsified"
    assert "gain kept" in found["brake"].why
    assert "hack over base" in found["erase"].why


@pytest.mark.parametrize(
    ("plants", "told"),
    [
        ({"none": 0.3, "erase": 0.3}, "no honest run"),
        ({"none": 0.3, "honest": 0.3}, "honest's own gain is not clear of 0: "),
        ({"none": 0.3, "honest 3x": 0.6}, "no honest run"),
        ({"honest": 0.6}, "no run of plain GRPO"),
        ({"none": 0.3, "honest": 0.6, "erase 3x": 0.5, "random_V 3x": 0.4}, "plain GRPO (none) at --steps=180"),
        ({"honest": 0.6, "none": 0.3, "erase": 0.5, "random_V": 0.4}, None),
        ({"honest": 0.6, "erase": 0.5, "random_V": 0.4}, "no run of plain GRPO"),
        ({"honest": 0.6, "none loophole": 0.6, "erase": 0.5, "random_V": 0.4}, "no run of plain GRPO"),
        ({"none": 0.3, "honest": 0.6}, None),
    ],
)
def test_missing_landmarks_are_one_line_and_nothing_is_lost(tmp_path, plants, told):
    jobs = []
    for label, solve in plants.items():
        arm, *more = label.split()
        flags = {"3x": ["--steps=180"], "loophole": ["--modes", "gt_only"]}
        for seed in SEEDS:
            jobs.append(job(label, arm, seed, *(flag for word in more for flag in flags[word])))
            write_run(tmp_path, jobs[-1], Plant(0.1, solve), oracle=arm == "honest")
    a = Analysis(summaries.summarise(study("s", jobs), tmp_path))
    lacks = a.without_landmarks()
    assert (lacks is None) if told is None else (told in lacks and "\n" not in lacks)
    page = results_docs.section(a)
    assert ("Landmarks: " in page) == (told is not None)
    assert ("| gain kept" in page) == any(a.gain_kept(label) for label in a.labels.values())
    assert ("### The aim" in page) == {"honest", "erase"}.issubset(plants), "which asks nothing of none"
    assert ("### H1" in page) == {"none", "erase"}.issubset(plants)
    for label in plants:
        assert f"| {label}" in page


def test_seeds_that_honest_lacks_are_named_and_gain_kept_says_how_many_it_has(tmp_path):
    jobs = [job(arm, arm, seed) for arm in ("none", "honest", "erase") for seed in SEEDS[: 2 if arm == "honest" else 3]]
    for j in jobs:
        write_run(tmp_path, j, Plant(0.1, {"honest": 0.6}.get(j.label, 0.4)), oracle=j.label == "honest")
    a = Analysis(summaries.summarise(study("s", jobs), tmp_path))
    assert f"no honest at seed {SEEDS[2]}" in a.without_landmarks()
    asked = {"study": "s", "columns": {"gain kept": "gain_kept"}, "rows": {"erase": ""}}
    table = results_docs.quoted_table({"s": a}, "t", {"tables": {"t": asked}})
    kept = a.gain_kept(a.labels["erase"])
    assert kept.n == 2
    assert f"{kept} (2)" in table


def test_a_reference_is_read_on_the_mode_that_the_row_left_out(world):
    a = Analysis(summaries.load(world.docs / "results", "leave_one_out"))
    name, none = "drop but sentinel", a.deployed("none", "hack", "sentinel")
    assert results_docs.number(a, name, "held_hack of none").mean == pytest.approx(np.mean(list(none.values())))
    mine = a.deployed(name, "hack", "sentinel")
    under = results_docs.number(a, name, "held_hack under none")
    assert under.mean == pytest.approx(np.mean([none[s] - mine[s] for s in SEEDS]))


def test_pairs_are_read_against_the_presets_own_at_the_same_seeds(tmp_path):
    jobs = [job("erase", "erase", seed) for seed in SEEDS]
    jobs += [job("erase other", "erase", seed, "--pairs=other8") for seed in SEEDS[:2]]
    jobs += [job("erase low", "erase", seed, "--pairs=other8", "--k-use=1") for seed in SEEDS[:2]]
    for j in jobs:
        write_run(tmp_path, j, Plant(0.1, 0.5 if j.label == "erase" else 0.2))
    a = Analysis(summaries.summarise(study("s", jobs), tmp_path))
    lost = [a.deployed("erase", "solve")[s] - a.deployed("erase other", "solve")[s] for s in SEEDS[:2]]
    assert results_docs.number(a, "erase other", "deploy_solve under default").mean == pytest.approx(np.mean(lost))
    assert results_docs.number(a, "erase low", "deploy_solve under default") is None
    assert results_docs.number(a, "erase", "deploy_solve under default") is None


def test_the_relearning_attack_stands_beside_plain_grpo_at_the_same_steps(headline):
    row = next(r for r in tables.relearning(headline).rows if r[0] == "drop")
    after, plain = headline.relearn["drop", "attempt_s"], headline.curves["none", "attempt_s"]
    assert row[4] == pytest.approx(np.mean([after[s][-tables.TAIL :].mean() for s in SEEDS]))
    assert row[6] == pytest.approx(np.mean([plain[s][: len(after[s])][-tables.TAIL :].mean() for s in SEEDS]))
    whole = {"study": "headline", "table": "relearning"}
    assert "attempts at the end" in results_docs.quoted_table({"headline": headline}, "t", {"tables": {"t": whole}})


def test_a_seed_at_which_honest_gains_nothing_does_not_blow_up_what_others_keep(tmp_path):
    """Of fewer seeds than the protocol asks for, honest's gain is its mean over all its seeds."""
    jobs = [job("honest", "honest", seed) for seed in SEEDS] + [job("route", "route", SEEDS[0])]
    for j in jobs:
        solve = 0.05 if j.label == "route" else 0.31 if j.seed == SEEDS[0] else 0.6
        write_run(tmp_path, j, Plant(0.1, solve), oracle=j.label == "honest")
    a = Analysis(summaries.summarise(study("s", jobs), tmp_path))
    route, gain = a.labels["route"], a.honest_gain(a.labels["honest"]).mean
    lost = a.deployed("route", "solve")[SEEDS[0]] - a.deployed("honest", "solve", when="first")[SEEDS[0]]
    assert a.gain_kept(route).mean == pytest.approx(lost / gain)
    assert a.kept_by_seed(route) == {SEEDS[0]: pytest.approx(lost / gain)}
    assert a.gain_kept(route).lo is None


def test_a_control_is_one_at_the_same_settings(tmp_path):
    """A random probe of other pairs, or of another threshold, controls nothing."""
    jobs = [
        job(label, arm, seed, *flags)
        for seed in SEEDS
        for label, arm, *flags in (
            ("gate_act", "gate_act"), ("low", "gate_act", "--threshold-sd=0.5"),
            ("twin low", "gate_act_random", "--threshold-sd=0.5"), ("none", "none"), ("honest", "honest"),
        )
    ]  # fmt: skip
    for j in jobs:
        write_run(tmp_path, j, Plant(0.1, 0.6 if j.label == "honest" else 0.3), oracle=j.label == "honest")
    a = Analysis(summaries.summarise(study("s", jobs), tmp_path))
    assert tables.random_of(a, a.labels["low"]).name == "twin low"
    assert tables.random_of(a, a.labels["gate_act"]) is None
    assert a.aim(a.labels["gate_act"]).over_control is None
    assert a.aim(a.labels["low"]).over_control.n == len(SEEDS)


def test_evasion_is_told_from_hiding(headline):
    table = tables.probes(headline)
    told = {row[0]: dict(zip(table.heads, row, strict=True)) for row in table.rows}
    assert {name: row["policy"] for name, row in told.items()} == dict.fromkeys(
        (headline.labels[name].shown for name in PLANTS), "–"
    ) | {"weak": "evades", "broken": "hides"}
    assert told["weak"]["acting start"] == pytest.approx(0.9, abs=0.03)
    assert told["weak"]["acting end"] == pytest.approx(0.3, abs=0.03)
    assert told["broken"]["held out change"].mean == pytest.approx(-0.6, abs=0.05)


def test_what_a_lucky_detector_prevents_is_told(tmp_path, monkeypatch):
    """Of arms that obey a detector, by what it ranked in its first steps alone; a fitted one is no luck and stays out
    of the correlation, an arm that draws lots out of the table.
    """
    plants = {f"lucky {x}": ("lucky", Plant(hack, 0.3, auroc=x)) for x, hack in ((0.3, 0.7), (0.1, 0.9), (0.7, 0.2))}
    plants |= {"fitted": ("fitted", Plant(0.9, 0.3, auroc=0.95)), "coin": ("coin", Plant(0.5, 0.3, auroc=0.9))}
    for arm, rows in (("lucky", "punish"), ("fitted", "drop"), ("coin", "punish_count")):
        row = SimpleNamespace(control=None, oracle=False, rows=rows, is_control=arm != "fitted")
        monkeypatch.setitem(arms.ARMS, arm, row)
    jobs = [job(label, arm, seed, f"--label={label}") for label, (arm, _) in plants.items() for seed in SEEDS[:2]]
    for j in jobs:
        write_run(tmp_path / "runs", j, plants[j.label][1])
    table = tables.ranks(Analysis(summaries.summarise(study("luck", jobs), tmp_path / "runs")))
    found = [dict(zip(table.heads, row, strict=True)) for row in table.rows]
    assert [(row["label"], row["seed"]) for row in found] == [
        (label, seed) for label in ("lucky 0.1", "lucky 0.3", "lucky 0.7", "fitted") for seed in SEEDS[:2]
    ]
    assert [row["AUROC"] for row in found] == pytest.approx([0.1, 0.1, 0.3, 0.3, 0.7, 0.7, 0.95, 0.95])
    rho = scipy_stats.spearmanr(*zip(*((r["AUROC"], r["deployed hack"]) for r in found[:6]), strict=True)).statistic
    assert f"over the 6 runs of controls: ρ = {rho:.2f}, p = 0." in table.note
    assert rho < -0.9


def test_the_page_says_it_all(world):
    page, whole = (p.read_text() for p in (world.docs / "results.md", world.root / "outputs/results/headline.md"))
    assert page.startswith("# Results")
    assert "Written by `just results-docs`" in page
    assert "<!--" not in page
    for text in (
        "### The aim", "### H1, the floor", "penalty acc .9 (ORACLE)", "honest (ORACLE)", "base (untrained)",
        "gain kept, learnable", "supported", "| gain kept",
    ):  # fmt: skip
        assert text in page, text
    for text in ("cin null", "Relearning", "0.062 (0.062)", "0.008 (0.008)", "all runs [Welch]", "by kind of problem"):
        assert text in whole, text
    folds = (world.root / "outputs" / "results" / "leave_one_out.md").read_text()
    assert "Held-out modes" in folds
    assert "°" in folds
    assert "drop (ORACLE)" not in page
    for line in (page + whole + folds).splitlines():
        assert "nan" not in line.split(), line


def test_every_table_tells_of_gain_kept(headline):
    for table in tables.tables_of(headline):
        assert any(head.startswith("gain kept") for head in table.heads), table.title


def test_a_table_is_the_same_whatever_it_is_rendered_to():
    table = layout.made("T", ("label", "n", "empty", "x | y"), [("a|b", 3, None, 0.256), ("c", 4, None, None)])
    assert table.heads == ("label", "n", "x | y")
    assert table.cells == [["a|b", "3", "0.26"], ["c", "4", "–"]]
    assert layout.markdown(table).startswith("### T\n\n| label   | n   | x | y")
    assert "a\\|b" in layout.grid(table)
    lines = layout.terminal(table).splitlines()
    assert lines[2].split() == ["a|b", "3", "0.26"]
    assert layout.made("T", ("label",), []) is None


def test_tables_between_markers_are_written_and_stale_ones_are_told(world):
    readme, page = world.root / "README.md", world.docs / "results.md"
    good = readme.read_text()
    assert "stale" not in good
    assert good.startswith("# A page\n\nBefore.\n\n<!-- table: first -->\n| arm")
    assert good.endswith("\n<!-- end -->\n\nAfter.\n")
    rows = [[c.strip() for c in line.strip("| ").split("|")] for line in good.splitlines() if line.startswith("|")][2:]
    assert [row[0] for row in rows] == ["base", "keep", "honest (ORACLE)"]
    assert [row[1] for row in rows] == ["5", "5", "5"]
    assert [row[3] == "–" for row in rows] == [True, False, False]
    assert re.fullmatch(r"0\.\d\d \[0\.\d\d, \d\.\d\d\]", rows[1][3])
    assert rows[2][3] == "1.00 [1.00, 1.00]"
    assert [row[5] for row in rows] == ["–", "supported", "–"], "the aim, of arms that it can be asked of"
    assert float(rows[1][4]) == pytest.approx(0.60, abs=0.06)
    assert results_docs.stale(world.root) == []
    for path, edit in ((readme, lambda t: t.replace("0.0", "0.1")), (page, lambda t: t + "edited by hand")):
        text = path.read_text()
        path.write_text(edit(text))
        with pytest.raises(UserError, match=f"stale: .*{path.name}; run"):
            results_docs.main(str(world.root), check=True)
        path.write_text(text)
    readme.write_text(good.replace("first", "second"))
    with pytest.raises(UserError, match=r"no table 'second' in quoted.toml, which has first"):
        results_docs.main(str(world.root), check=True)
    readme.write_text(good)


def test_a_whole_table_of_a_study_may_be_quoted(world):
    analyses = {"leave_one_out": Analysis(summaries.load(world.docs / "results", "leave_one_out"))}
    quoted = results_docs.quoted_table(
        analyses, "second", {"tables": {"second": {"study": "leave_one_out", "table": "h2"}}}
    )
    whole = tables.h2(analyses["leave_one_out"])
    assert whole is not None
    assert quoted == layout.grid(whole)


def test_the_page_and_the_summaries_regenerate_to_the_byte(world, tmp_path):
    for one in world.studies[::-1]:
        summaries.update([one], world.runs, tmp_path)
    files = {p.name for p in tmp_path.iterdir()}
    assert files == {"headline.json", "leave_one_out.json", *(f"{name}.parquet" for name in summaries.SCHEMAS)}
    for file in files:
        assert (tmp_path / file).read_bytes() == (world.docs / "results" / file).read_bytes(), file
    again = summaries.load(world.docs / "results", "headline")
    assert results_docs.section(Analysis(summaries.load(tmp_path, "headline")), (tables.deployed,)) == (
        results_docs.section(Analysis(again), (tables.deployed,))
    )


def test_summaries_stay_small(world):
    sizes = sum(f.stat().st_size for f in (world.docs / "results").glob("*.parquet"))
    runs = {job.name for one in world.studies for job in one.jobs}
    assert len(runs) < sum(len(one.jobs) for one in world.studies)
    assert sizes / len(runs) < 15_000  # bytes a run, whatever studies it is in: 200 of them under 3 MB


def spoil(folder: Path, file: str, edit) -> None:
    (folder / file).write_text(edit((folder / file).read_text()))


SPOILED = {
    "no such folder": (None, "not run"),
    "no file": (lambda f: (f / "meta.json").unlink(), "meta.json: FileNotFoundError"),
    "cut short": (lambda f: spoil(f, "steps.jsonl", lambda t: t[: len(t) // 2]), "steps.jsonl:31: Untermin"),
    "steps missing": (lambda f: spoil(f, "steps.jsonl", lambda t: t[: t.index("\n") + 1]), "1 of 60 steps"),
    "failed": (lambda f: spoil(f, "meta.json", lambda t: t.replace("complete", "failed")), "status failed"),
    "older": (lambda f: (f / "eval_problems.jsonl").unlink(), "no eval_problems.jsonl"),
    "another column": (lambda f: spoil(f, "steps.jsonl", lambda t: t.replace("cin_null", "null")), "lacks 'cin_null'"),
    "another arm": (lambda f: spoil(f, "meta.json", lambda t: t.replace('"none"', '"erase"')), "is arm erase"),
    "not a table": (lambda f: (f / "rollouts.parquet").write_text("PAR1"), "cannot be read"),
    "strings": (lambda f: spoil(f, "evals.jsonl", lambda t: "[1]\n"), "evals.jsonl:1: a JSON list"),
}


def test_broken_runs_are_named_and_left_out(tmp_path):
    jobs = [job("none", "none", seed) for seed in range(len(SPOILED) + 2)]
    for each, (break_it, _) in zip(jobs[2:], SPOILED.values(), strict=True):
        if break_it:
            break_it(write_run(tmp_path, each, PLANTS["none"][1]))
    write_run(tmp_path, jobs[0], PLANTS["none"][1])
    write_run(tmp_path, jobs[1], PLANTS["none"][1]).rename(tmp_path / f"{jobs[1].name}.part")
    found = summaries.summarise(study("s", jobs), tmp_path)
    assert found.tables["runs"]["seed"].to_list() == [0]
    assert found.missing[jobs[1].name] == "unfinished"
    for each, (name, (_, why)) in zip(jobs[2:], SPOILED.items(), strict=True):
        assert why in found.missing[each.name], name
        assert str(tmp_path) not in found.missing[each.name]
    page = results_docs.section(Analysis(found), (tables.deployed,))
    assert all(each.name in page for each in jobs[1:] if found.missing[each.name] != "not run")
    assert "not run: 1" in page


def test_runs_that_are_stored_stay_where_the_runs_are_not(world, tmp_path):
    headline, store = world.studies[0], world.docs / "results"
    before = (store / "runs.parquet").read_bytes()
    summaries.update([headline], tmp_path, store)
    assert (store / "runs.parquet").read_bytes() == before
    halves = [replace(headline, jobs=jobs) for jobs in (headline.jobs[10:], headline.jobs[:10])]
    summaries.update(halves[:1], world.runs, tmp_path)
    assert run.stored_names(tmp_path) == {job.name for job in headline.jobs[10:]}
    summaries.update([headline], world.runs / "elsewhere", tmp_path)
    assert len(summaries.load(tmp_path, "headline").tables["runs"]) == len(headline.jobs) - 10
    for part in headline.jobs[:10]:
        (tmp_path / "some").mkdir(exist_ok=True)
        (tmp_path / "some" / part.name).symlink_to((world.runs / part.name).resolve())
    summaries.update([headline], tmp_path / "some", tmp_path)
    one, other = (summaries.load(folder, "headline") for folder in (tmp_path, store))
    assert all(one.tables[name].equals(other.tables[name]) for name in summaries.SCHEMAS)
    assert one.missing == other.missing
    summaries.update([replace(headline, jobs=headline.jobs[:5])], world.runs, tmp_path, force=True)
    assert len(summaries.load(tmp_path, "headline").tables["runs"]) == 5
    with pytest.raises(UserError, match="holds no readable summary"):
        summaries.load(tmp_path, "nothing")


@pytest.mark.parametrize(
    ("spoilt", "told"),
    [
        (lambda runs: runs.head(0), "leave_one_out names runs that are not stored"),
        (lambda runs: runs.drop("arm"), "runs of another version: move it away"),
        (None, "holds no readable runs"),
    ],
)
def test_a_store_that_is_not_whole_is_one_line(world, tmp_path, spoilt, told):
    summaries.update(world.studies[1:], world.runs, tmp_path)
    path = tmp_path / "runs.parquet"
    if spoilt:
        spoilt(pl.read_parquet(path)).write_parquet(path)
    else:
        path.unlink()
    with pytest.raises(UserError, match=told):
        summaries.load(tmp_path, "leave_one_out")


def test_a_write_that_was_cut_short_loses_nothing(world, tmp_path, monkeypatch):
    """Killed after each of its files in turn, an update leaves a store that loads, or is one line and done again."""
    store, both = tmp_path / "store", world.studies
    half = replace(both[1], jobs=both[1].jobs[:5])
    for cut in range(len(summaries.SCHEMAS) + 1):
        summaries.update([half], world.runs, store)
        (store / "headline.json.part").write_text("{")  # what a kill left of another write stays a leftover
        left, real = iter(range(cut)), os.replace

        def replace_some(a, b):
            if next(left, None) is None:  # noqa: B023
                raise KeyboardInterrupt
            real(a, b)  # noqa: B023

        monkeypatch.setattr(os, "replace", replace_some)
        with pytest.raises(KeyboardInterrupt):
            summaries.update([both[1]], world.runs, store)
        monkeypatch.setattr(os, "replace", real)
        after = summaries.load(store, "leave_one_out")
        assert len(after.tables["runs"]) == 5
        assert {run for t in after.tables.values() for run in t["run"]} == {job.name for job in half.jobs}
        summaries.update([both[1]], world.runs, store)
        assert len(summaries.load(store, "leave_one_out").tables["runs"]) == len(both[1].jobs)
        assert not (store / "headline.json").exists()
        shutil.rmtree(store)


def test_an_update_waits_for_the_one_that_holds_the_store(world, tmp_path, monkeypatch):
    """It reads what is stored only then, so that none of two at once is lost."""
    first, second = (summaries.summarise(each, world.runs) for each in world.studies)
    monkeypatch.setattr(summaries, "summarise", lambda each, runs: second)  # at once
    with ThreadPoolExecutor(1) as pool:
        with summaries.locked(tmp_path):
            waiting = pool.submit(summaries.update, world.studies[1:], world.runs, tmp_path)
            with pytest.raises(TimeoutError):
                waiting.result(timeout=1)
            assert not list(tmp_path.iterdir())
            summaries.save([first], tmp_path)
        waiting.result(timeout=60)
    assert {each.name for each in summaries.stored(tmp_path)} == {first.name, second.name}


def test_a_file_that_is_no_study_is_named(world, tmp_path):
    summaries.update(world.studies[1:], world.runs, tmp_path)
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(UserError, match="is no stored study"):
        summaries.update(world.studies[1:], world.runs, tmp_path)


def test_a_run_without_scores_or_kinds_is_still_used(tmp_path):
    run = job("none", "none", 41)
    folder = write_run(tmp_path, run, PLANTS["weak"][1])
    rows = [json.loads(line) for line in (folder / "eval_problems.jsonl").read_text().splitlines()]
    write_lines(folder / "eval_problems.jsonl", [row | {"kind": None} for row in rows])
    found = summaries.summarise(study("s", [run]), tmp_path)
    assert not found.missing
    assert found.tables["detector"].is_empty()
    assert Analysis(found).kinds == {}
    assert "| none" in results_docs.section(Analysis(found), (tables.deployed,))


def test_a_seed_twice_is_refused(tmp_path):
    jobs = (job("none", "none", 41), job("none", "none", 41, "--k=3"))
    for each in jobs:
        write_run(tmp_path, each, PLANTS["none"][1])
    found = summaries.summarise(study("s", jobs), tmp_path)
    with pytest.raises(UserError, match="two runs of 'none' have seed 41"):
        results_docs.section(Analysis(found))


def test_studies_of_a_stored_summary_keep_their_text(world):
    text = json.loads((world.docs / "results" / "headline.json").read_text())
    assert text["H"] == "the planted effects are there"
    assert text["n_jobs"] == len(PLANTS) * len(SEEDS)
    assert text["missing"] == {}


def test_no_study_has_a_label_twice_at_a_seed():
    for each in STUDIES.values():
        names = [(j.label, j.seed) for j in each.jobs]
        assert len(names) == len(set(names)), each.name
