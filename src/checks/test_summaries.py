"""Run folders with planted effects go through the whole analysis, which has to find them again."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
from mock_learner import MODES, Plant, job, study, write_run
from scipy import stats as scipy_stats

from projected_grpo import arms
from projected_grpo.config import UserError
from projected_grpo.studies import summaries, tables
from projected_grpo.studies.analysis import Analysis
from projected_grpo.studies.run import STUDIES

PLANTS = {
    "none": ("none", Plant(0.80, 0.30, relearn_onset=20)),
    "drop": ("drop", Plant(0.10, 0.34, shift=2.0, relearn_onset=40)),
    "erase": ("erase", Plant(0.58, 0.28)),
    "weak": ("erase", Plant(0.78, 0.30)),
    "broken": ("drop", Plant(0.05, 0.05)),
    "route": ("route", Plant(0.30, 0.30, quarantined=True)),
    "random_V": ("random_V", Plant(0.79, 0.30, shift=0.0)),
    "drop_random": ("drop_random", Plant(0.80, 0.30)),
    "penalty acc .9": ("penalty", Plant(0.02, 0.40)),
}
CONTROLS = {"erase": "random_V", "drop": "drop_random"}
HELD_OUT = Plant(0.10, 0.30, by_mode=(("sentinel", 0.75),))
SEEDS = range(41, 46)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(studies, folder of runs, folder of docs) with summaries and results.md written; the arms' controls in ARMS."""
    root, jobs = tmp_path_factory.mktemp("world"), []
    for label, (arm, plant) in PLANTS.items():
        for seed in SEEDS:
            jobs.append(job(label, arm, seed, f"--label={label}"))
            write_run(root / "runs", jobs[-1], plant, oracle=arm == "penalty")
    fold = [j for j in jobs if j.label in ("none", "random_V")]
    for seed in SEEDS:
        fold.append(job("drop but sentinel", "drop", seed, "--known-modes=rest"))
        write_run(root / "runs", fold[-1], HELD_OUT, known=tuple(m for m in MODES if m != "sentinel"))
        fold.append(job("drop only run_tests", "drop", seed, "--known-modes=run_tests"))
        write_run(root / "runs", fold[-1], HELD_OUT, known=("run_tests",))
    with pytest.MonkeyPatch.context() as patch:
        for arm in {j.intervention for j in jobs}:
            row = SimpleNamespace(control=CONTROLS.get(arm), oracle=arm == "penalty")
            patch.setitem(arms.ARMS, arm, row)
        studies = (study("headline", jobs), study("leave_one_out", fold))
        summaries.update(studies, root / "runs", root / "docs" / "results")
        (root / "README.md").write_text("nothing\n")
        tables.main(str(root / "docs"), str(root / "README.md"))
        yield SimpleNamespace(root=root, runs=root / "runs", docs=root / "docs", studies=studies)


@pytest.fixture(scope="module")
def headline(world):
    return Analysis(summaries.load(world.docs / "results" / "headline"))


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
        "drop": "supported", "erase": "undecided", "weak": "falsified", "broken": "falsified",
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
    a = Analysis(summaries.load(world.docs / "results" / "leave_one_out"))
    label = a.labels["drop but sentinel"]
    assert label.heldout == ("sentinel",)
    assert np.mean(list(a.pooled(label.name, "hack", label.heldout).values())) == pytest.approx(0.75, abs=0.1)
    known = [m for m in MODES if m != "sentinel"]
    assert np.mean(list(a.pooled(label.name, "hack", known).values())) == pytest.approx(0.10, abs=0.05)


def test_modes_like_the_known_one_are_told_from_those_unlike_it(world):
    a = Analysis(summaries.load(world.docs / "results" / "leave_one_out"))
    (row,) = [line.strip("| ").split("|") for line in tables.transfer(a).splitlines() if "drop only" in line]
    label, known, like, unlike, *cells = [c.strip() for c in row]
    assert (label, known, like, unlike) == ("drop only run_tests", "run_tests", "stdout_marker file_marker", "sentinel")
    left = [float(c.split(" of ")[0]) for c in cells[::2]]
    assert left == pytest.approx([0.10, 0.10, 0.75], abs=0.1)
    assert all(float(c.split(" of ")[1]) == pytest.approx(0.80, abs=0.1) for c in cells[::2])


def test_the_page_says_it_all(world):
    page = (world.docs / "results.md").read_text()
    assert page.startswith("# Results")
    assert "Generated by `just results-docs`" in page
    for text in (
        "**H1, drop, deployed: supported**", "**H1, weak, deployed: falsified**", "penalty acc .9 **ORACLE**",
        "base (untrained)", "cin null", "Held-out modes", "Relearning", "0.062 (0.062)", "0.008 (0.008)", "°",
    ):  # fmt: skip
        assert text in page, text
    assert "drop **ORACLE**" not in page
    for line in page.splitlines():
        assert "nan" not in line.split(), line


def test_the_page_and_the_summaries_regenerate_to_the_byte(world, tmp_path):
    summaries.update(world.studies[1:], world.runs, tmp_path / "results")
    files = sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*") if p.is_file())
    assert len(files) == 8
    for file in files:
        assert (tmp_path / file).read_bytes() == (world.docs / file).read_bytes(), file
    summaries.save(summaries.load(world.docs / "results" / "headline"), tmp_path / "results")
    tables.main(str(tmp_path), str(world.root / "README.md"))
    assert (tmp_path / "results.md").read_bytes() == (world.docs / "results.md").read_bytes()
    (tmp_path / "results.md").write_text("edited by hand")
    with pytest.raises(UserError, match="is stale"):
        tables.main(str(tmp_path), str(world.root / "README.md"), check=True)


def test_summaries_stay_small(world):
    sizes = sum(f.stat().st_size for f in (world.docs / "results" / "headline").iterdir())
    assert sizes / 45 < 15_000  # bytes a run: 200 of them under 3 MB


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
    page = tables.render([Analysis(found)])
    assert all(each.name in page for each in jobs[1:] if found.missing[each.name] != "not run")
    assert "not run: 1" in page


def test_a_summary_is_not_lost_where_the_runs_are_not(world, tmp_path):
    headline, store = world.studies[0], world.docs / "results"
    before = (store / "headline" / "runs.parquet").read_bytes()
    summaries.update([headline], tmp_path, store)
    assert (store / "headline" / "runs.parquet").read_bytes() == before
    fewer = replace(headline, jobs=headline.jobs[:10])
    summaries.update([fewer], world.runs, tmp_path)
    summaries.update([replace(headline, jobs=headline.jobs[:5])], world.runs, tmp_path)
    assert len(summaries.load(tmp_path / "headline").tables["runs"]) == 10
    summaries.update([replace(headline, jobs=headline.jobs[:5])], world.runs, tmp_path, force=True)
    assert len(summaries.load(tmp_path / "headline").tables["runs"]) == 5
    with pytest.raises(UserError, match="holds no readable summary"):
        summaries.load(tmp_path / "nothing")


def test_a_run_without_a_detector_or_later_columns_is_still_used(tmp_path):
    run = job("none", "none", 41)
    folder = write_run(tmp_path, run, PLANTS["drop"][1])
    rows = pl.read_parquet(folder / "rollouts.parquet")
    rows.with_columns(pl.lit(None, pl.Float64).alias("score_random")).write_parquet(folder / "rollouts.parquet")
    spoil(folder, "steps.jsonl", lambda t: t.replace('"withheld": 0.1, ', ""))
    found = summaries.summarise(study("s", [run]), tmp_path)
    assert not found.missing
    assert set(found.tables["detector"]["score"]) == {"own"}
    rows.drop("flagged").write_parquet(folder / "rollouts.parquet")
    assert "flagged" in summaries.summarise(study("s", [run]), tmp_path).missing[run.name]
    assert found.tables["steps"]["withheld"].null_count() == 60
    assert "| none" in tables.render([Analysis(found)])


def test_a_seed_twice_is_refused(tmp_path):
    jobs = (job("none", "none", 41), job("none", "none", 41, "--k=3"))
    for each in jobs:
        write_run(tmp_path, each, PLANTS["none"][1])
    found = summaries.summarise(study("s", jobs), tmp_path)
    with pytest.raises(UserError, match="two runs of 'none' have seed 41"):
        tables.render([Analysis(found)])


def test_quoted_numbers_are_checked(headline, world):
    known = tables.quoted_numbers(headline)
    value = known["headline/drop/deploy_hack"]
    good = f"It hacks {value:.2f} <!-- results: headline/drop/deploy_hack --> of the time."
    assert tables.wrong(good, known) == []
    assert tables.wrong(f"{100 * value:.0f} % <!-- results: headline/drop/deploy_hack -->", known) == []
    assert "which is" in tables.wrong("0.55 <!-- results: headline/drop/deploy_hack -->", known)[0]
    assert "no stored summary" in tables.wrong("0.55 <!-- results: headline/drop/nothing -->", known)[0]
    assert "no number" in tables.wrong("text <!-- results: headline/drop/deploy_hack -->", known)[0]
    assert tables.wrong("`0.1 <!-- results: a/b/c -->` is how", known) == []
    assert known["headline/drop/cut_hack"] == pytest.approx(0.70, abs=0.06)
    assert known["headline/base/deploy_solve"] == pytest.approx(0.30, abs=0.04)
    page = world.root / "other.md"
    page.write_text("0.99 <!-- results: headline/drop/deploy_hack -->")
    found = tables.bad_quotes([headline], [page])
    assert len(found) == 1
    assert "other.md: 0.99 quotes headline/drop/deploy_hack, which is" in found[0]


def test_studies_of_a_stored_summary_keep_their_text(world):
    text = json.loads((world.docs / "results" / "headline" / "study.json").read_text())
    assert text["H"] == "the planted effects are there"
    assert text["n_jobs"] == 45
    assert text["missing"] == {}


def test_no_study_has_a_label_twice_at_a_seed():
    for each in STUDIES.values():
        names = [(j.label, j.seed) for j in each.jobs]
        assert len(names) == len(set(names)), each.name
