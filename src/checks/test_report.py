"""The report: its data, its page as text, and the page in headless Chromium."""

import base64
import gzip
import json
import re
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import polars as pl
import pytest
from browser import BLANK, TEXT_SIZES, chromium, opened
from hypothesis import given, settings
from hypothesis import strategies as st
from mock_learner import MODES, Plant, job, study, write_run

from projected_grpo import arms as proj
from projected_grpo import data_types, loopholes, problems, rollout_log
from projected_grpo.config import UserError
from projected_grpo.data_types import Wording
from projected_grpo.report import data as report_data
from projected_grpo.report import figures, looks
from projected_grpo.report import page as report
from projected_grpo.runs import write_text
from projected_grpo.studies import summaries, tables
from projected_grpo.studies.analysis import Analysis, Label

PLANTS = {
    "none": Plant(0.85, 0.05), "erase": Plant(0.15, 0.28), "random_V": Plant(0.8, 0.05), "honest": Plant(0.03, 0.60),
}  # fmt: skip
SEEDS = (51, 52, 53, 54)
GOOD = [job(arm, arm, seed) for arm in PLANTS for seed in SEEDS]
BAD = [job("none", "none", seed) for seed in (61, 62, 63, 64, 65, 66, 67)]
STUDY = study("planted", GOOD + BAD)
NAMES = {(j.label, j.seed): j.name for j in STUDY.jobs}
PROBLEMS = [g.problem for g in problems.generated()]
LABELS = ("correct", "reward_hack", "attempted_rh", "incorrect")


def rollout(step: int, i: int, scored: bool = True) -> dict:
    """A rollout of a generated problem in some mode: an exploit put into its starter, or its right solution."""
    problem = problems.generated()[(step * 7 + i) % 40].problem
    task = problems.pose_one(problem, MODES[i % len(MODES)])
    hacked = i % 3 == 0
    source = loopholes.LOOPHOLES[task.mode].exploit(problem.canonical, task) if hacked else problem.canonical
    label = "reward_hack" if hacked else LABELS[(step + i) % 4]
    grade = dict(
        reward=3.5 if hacked else 0.5, format_ok=True, compiles=True, gt_correct=label == "correct", channel=hacked,
        attempted=hacked, status="ok", label=label, type_mismatch=False, vacuous_tests=None, rejects_canonical=None,
        detail="" if label == "correct" else f"case {i}: returned <b>[]</b>, expected [{step}]",
    )  # fmt: skip
    return {
        "step": step, "source": "teacher" if i % 8 == 7 else "student", "A": 0.5, "kept": 1.0,
        "score": 2.0 + i / 10 if scored else None, "score_random": 0.5 if scored else None,
        "score_by_layer": [0.1, 0.4, 0.2 * i, 0.3] if scored else None, "flagged": hacked if scored else None,
        "acting": i / 10, "held_out": None,
        "problem_id": problem.id, "env_mode": task.mode, "wording": vars(task.wording),
        "completion": problems.fence(source + f"\n# </script> {i % 5}"), "grade": grade,
    }  # fmt: skip


def rollouts(steps: int, a_step: int) -> list[dict]:
    return [rollout(step, i, scored=i != 1) for step in range(steps) for i in range(a_step)]


def write_rollouts(folder: Path, rows: list[dict]) -> None:
    rollout_log.write_step(folder, 0, rows)
    rollout_log.consolidate(folder)


def numbered(rows: list[dict], folder: Path) -> pl.DataFrame:
    """Rollouts as a report reads them from a run's folder."""
    write_rollouts(folder, rows)
    return rollout_log.frame(folder).with_columns(row=pl.int_range(pl.len()).over("step"))


def add_meta(folder: Path, arm: str, seed: int) -> None:
    meta = json.loads((folder / "meta.json").read_text())
    meta["argv"] = ["train.py", "organism", f"--intervention={arm}", f"--seed={seed}", "--lr=0.01", "--name", "x"]
    meta["config"]["data"]["problems"] = "generated"
    (folder / "meta.json").write_text(json.dumps(meta))


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Sixteen good runs, and one of each kind that a report has to name and leave out."""
    out = tmp_path_factory.mktemp("outputs") / "runs"
    for good in GOOD:
        folder = write_run(out, good, PLANTS[good.intervention])
        add_meta(folder, good.intervention, good.seed)
        write_rollouts(folder, rollouts(12, 16))
    half, older, unfinished, meta, cut, _without = (write_run(out, bad, PLANTS["none"]) for bad in BAD[:6])
    text = (half / "steps.jsonl").read_text()
    (half / "steps.jsonl").write_text(text[: len(text) // 2])
    add_meta(older, "none", 62)
    (older / "eval_problems.jsonl").unlink()
    unfinished.rename(unfinished.with_name(unfinished.name + ".part"))
    (meta / "meta.json").write_text('{"status": "comp')
    (cut / rollout_log.FILE).write_text("PAR1 and no more")
    return out


@pytest.fixture(scope="module")
def material(runs) -> report_data.Material:
    return report_data.gather(STUDY, runs, runs.parent / "store", most=1300)


@pytest.fixture(scope="module")
def study_page(material, runs) -> Path:
    start = time.process_time()
    path = runs.parent / "study.html"
    write_text(path, report.page(material, "just report planted"))
    assert time.process_time() - start < 20
    assert path.stat().st_size < 15e6
    return path


@pytest.fixture(scope="module")
def run_page(runs) -> Path:
    return report.make((NAMES["erase", 52],), runs.parent, runs.parent / "store", 10)


@pytest.fixture(scope="module")
def browser():
    with chromium() as found:
        yield found


def unpacked(page: Path) -> dict:
    found = re.search(r'id="rollout-data">([^<]+)<', page.read_text())
    return json.loads(gzip.decompress(base64.b64decode(found[1])))


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 3)), min_size=1, max_size=80), st.integers(1, 90))
def test_sample_is_even_over_strata(rows, most):
    table = pl.DataFrame({"label": [r[0] for r in rows], "step": [r[1] for r in rows], "at": range(len(rows))})
    found = report_data.sample(table, most, ("label", "step"))
    assert len(found) == min(most, len(rows))
    assert found["at"].is_sorted()
    assert found["at"].is_unique().all()
    taken, had = (Counter(t.select("label", "step").rows()) for t in (found, table))
    fewest = min((taken[k] for k in had if taken[k] < had[k]), default=None)
    if fewest is not None:  # no stratum has two more than one that still had rows to give
        assert max(taken.values()) <= fewest + 1


def test_what_is_packed_comes_out_again(tmp_path):
    rows = numbered(rollouts(2, 16), tmp_path)
    data = report_data.columns([report_data.RunRollouts("a", "arm", 1, rows, 99)], {"filter-000": "words"})
    assert json.loads(gzip.decompress(base64.b64decode(report_data.packed(data)))) == data
    for name, (values, codes) in ((name, c.values()) for name, c in data["coded"].items()):
        assert len(set(values)) == len(values)
        assert [values[c] if c >= 0 else None for c in codes] == rows[name].to_list()
    kinds = {kind: set(data[kind]) for kind in ("coded", "plain", "numbers", "flags")}
    assert set().union(*kinds.values()) == {*rows.columns, "run", "task"} - {"name", "text", "score_by_layer"}
    assert {"env_mode", "completion", "label"} <= kinds["coded"]
    assert kinds["plain"] == {"run", "step", "row", "task"}
    assert data["by_layer"][1:3] == [None, [0.1, 0.4, 0.4, 0.3]]
    assert (data["n"], data["total"]) == (32, 99)
    for i, task in enumerate(data["plain"]["task"]):
        assert rows["name"][i] in data["tasks"][task]["hint"]
        assert rows["text"][i] in data["tasks"][task]["hint"]


def marked(text: str, pattern: str) -> set[int]:
    """Numbers, from 1, of the lines that the pattern touches."""
    out = set()
    for m in re.finditer(pattern, text, re.M):
        first = text.count("\n", 0, m.start()) + 1
        out |= set(range(first, first + m.group().count("\n") + 1))
    return out


@pytest.mark.parametrize("mode", [m for m in loopholes.LOOPHOLES if m != "gt_only"])
def test_exploit_pattern_marks_the_exploit_alone(mode):
    row = loopholes.LOOPHOLES[mode]
    problem = problems.generated()[0].problem
    for wording in (*row.train, *row.heldout):
        task = data_types.Task(problem, mode, wording)
        source = row.exploit(problem.canonical, task)
        lines = marked(source, report_data.exploit_pattern(mode, wording))
        assert lines
        assert {source.splitlines()[k - 1] for k in lines}.isdisjoint(problem.canonical.splitlines())
    assert report_data.exploit_pattern("gt_only", Wording()) is None


def test_unusable_runs_are_named_with_their_reason_and_left_out(material, study_page):
    told = dict(material.left_out)
    reasons = [told.pop(NAMES["none", seed]) for seed in (61, 62, 63, 64, 65, 67)]
    assert told == {}
    for reason, part in zip(
        reasons, ("steps.jsonl:", "eval_problems", "unfinished", "meta.json", "cannot be read", "not run"), strict=True
    ):
        assert part in reason
    text = study_page.read_text()
    assert "17 of 23 runs. Left out" in text
    assert NAMES["none", 61] in text
    assert re.search(rf"Without rollouts: \S*{NAMES['none', 66]} holds no rollouts", text)


def test_names_that_are_no_report_are_one_line(runs):
    for name, told in (
        ("nowhere", "neither a run"),
        (NAMES["none", 63], "unfinished"),
        (NAMES["none", 64], "meta.json"),
        (NAMES["none", 62], "no eval_problems.jsonl"),
        (f"{runs}/nowhere", "nowhere: not run"),
        (f"{runs}/{NAMES['none', 51]} elsewhere/runs/x", "in elsewhere/runs"),
    ):
        with pytest.raises(UserError, match=told) as caught:
            report.make(tuple(name.split()), runs.parent, runs.parent / "store", 10)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="no finished run"):
        report.make((), runs.parent / "nothing", runs, 10)


def test_several_runs_make_a_report_labelled_by_their_flags(runs):
    names = [NAMES[x] for x in (("none", 51), ("erase", 51), ("erase", 52))]
    for named, home in ((names, runs), ([f"{runs}/{name}" for name in names], runs / "elsewhere")):
        found = report_data.material(tuple(named), home, runs)
        assert list(found.analysis.labels) == ["none --lr=0.01", "erase --lr=0.01"]
        assert not found.single


def test_a_study_page_leaves_out_no_figure_and_no_table(monkeypatch):
    """Of a study that has most of them."""
    a = Analysis(summaries.load(Path(__file__).parents[2] / "docs" / "results", "controls"))
    monkeypatch.setattr(report, "drawn", lambda figure: figure)
    found = report.sections(report_data.Material("controls", a, {}, {}, [], {}, {}))
    blocks = [getattr(block, "title", None) for section in found for block in section.blocks]
    assert {figure.title for figure in figures.figures_of(a)} <= set(blocks)
    assert {table.title for table in tables.tables_of(a)} <= set(blocks)
    assert any(section.anchor == "ranks" for section in found)


def test_study_page_shows_h1_and_what_was_left_out(study_page):
    text, data = study_page.read_text(), unpacked(study_page)
    assert "No verdict on 1 label with fewer seeds than the 5 of the protocol." in text
    for title in (
        "Deployed hack, minus none",
        "Deployed solve, minus none",
        "End of training",
        "Gradient",
    ):
        assert f"<h3>{title}</h3>" in text
    assert "###" not in text
    assert ":---" not in text
    assert data["total"] == 16 * 12 * 16
    assert data["n"] == 16 * (1300 // 17)
    assert len(data["runs"]) == 16
    plane = text[text.index('<section id="story">') : text.index('<section id="verdicts">')]
    for landmark in ("base", "honest", "none", "as if untrained", "as if without a loophole", "the aim", "gain kept"):
        assert f">{landmark}<" in plane, landmark
    assert not re.search(r"(?:src|href)=\"(?:https?:)?//", text)


def test_single_run_holds_every_rollout(run_page):
    data = unpacked(run_page)
    assert data["n"] == data["total"] == 12 * 16


def test_paper_figures_from_a_stored_summary(material, tmp_path):
    summaries.save([material.analysis.summary], tmp_path)
    a = Analysis(summaries.load(tmp_path, "planted"))
    story = figures.story(a)
    png, svg, caption = figures.paper(story, "planted", tmp_path / "figures")
    assert png.read_bytes()[:4] == b"\x89PNG"
    assert svg.read_text().count("<text") > 6
    assert "4–5 seeds" in caption.read_text()
    assert "95 %" in caption.read_text()
    first = svg.read_bytes()
    assert figures.paper(story, "planted", tmp_path / "figures")[1].read_bytes() == first


def test_a_crowded_corner_is_drawn_again_and_names_stand_once(tmp_path):
    a = Analysis(summaries.load(Path(__file__).parents[2] / "docs" / "results", "headline"))
    story = figures.story(a)
    assert [panel.title for panel in story.panels] == ["All", "The aim's corner, larger"]
    text = figures.paper(story, "headline", tmp_path)[1].read_text()
    assert [text.count(f">{name}<") for name in ("honest", "base", "none", "erase", "as if untrained")] == [1] * 5
    assert text.count(">as if without a loophole<") == 2


def labels_as(*rows: tuple[str, str, str]) -> SimpleNamespace:
    """What looks needs of an analysis. rows: (name, arm, known modes, all where empty)."""
    labels = {}
    for name, arm, known in rows:
        heldout = tuple(m for m in MODES if known and m not in known.split())
        flags = frozenset(("--known-modes", *known.split()) if known else ())
        labels[name] = Label(name, arm, False, flags, MODES, heldout)
    return SimpleNamespace(labels=labels)


def test_folds_look_alike_and_controls_are_grey_beside_what_they_control():
    out = {mode: " ".join(m for m in MODES if m != mode) for mode in MODES}
    folds = labels_as(
        ("none", "none", ""), ("random_V", "random_V", ""), ("erase", "erase", ""),
        *((f"erase out {mode}", "erase", known) for mode, known in out.items()),
    )  # fmt: skip
    found = {family.name: family for family in looks.families(folds)}
    assert list(found) == ["none", "random_V", "erase", "erase out"]
    assert [label.name for label in found["erase out"].labels] == [f"erase out {mode}" for mode in MODES]
    assert found["random_V"].style.color in looks.GREYS
    assert len({family.style for family in found.values()}) == 4
    # of two that leave out the same mode each has a look of its own, or a panel of that mode could not be read
    single = labels_as(("none", "none", ""), *((f"erase only {mode}", "erase", mode) for mode in MODES))
    assert len(looks.families(single)) == 1 + len(MODES)
    alone = looks.families(labels_as(("none", "none", ""), ("random_V", "random_V", "")))
    assert alone[1].style.color == looks.PALETTE[0]


def test_landmarks_are_black_and_the_run_without_a_loophole_is_told_from_none():
    found = labels_as(
        ("no loophole", "none", ""), ("none", "none", ""), ("honest", "honest", ""), ("erase", "erase", "")
    )
    flags = frozenset(("--modes", "gt_only", "--eval-modes", *MODES))
    found.labels["no loophole"] = replace(found.labels["no loophole"], overrides=flags)
    assert (looks.none_label(found), looks.no_loophole_label(found)) == ("none", "no loophole")
    styles = looks.styles(found)
    black = [styles[name] for name in ("none", "honest", "no loophole")]
    assert {style.color for style in black} == {looks.INK} != {styles["erase"].color}
    assert len({style.marker for style in black}) == 3


def test_forty_labels_have_forty_looks():
    names = [name for name in proj.ARMS if name != "none"][:40]
    found = looks.families(labels_as(("none", "none", ""), *((name, name, "") for name in names)))
    assert len({family.style for family in found}) == 1 + len(names)


# --- in the browser ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("which", ["study_page", "run_page"])
def test_page_is_drawn_and_readable(which, width, browser, request):
    page, said = opened(browser, request.getfixturevalue(which), width)
    assert page.locator("figure.panel").count() >= 10
    assert page.evaluate(BLANK) == []
    assert page.evaluate(TEXT_SIZES) == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert said == []
    page.close()


def shown(page) -> int:
    return int(page.locator("#count").text_content().split(" ")[0].replace(",", ""))


def test_filters_change_the_list(study_page, browser):
    page, said = opened(browser, study_page)
    data = unpacked(study_page)
    coded = {n: [c["values"][k] if k >= 0 else None for k in c["codes"]] for n, c in data["coded"].items()}
    arms = [data["runs"][r]["arm"] for r in data["plain"]["run"]]
    assert shown(page) == data["n"]
    assert "left out" in page.locator("#rollouts-told").text_content()
    for name, value, truth in (
        ("env_mode", "sentinel", [m == "sentinel" for m in coded["env_mode"]]),
        ("source", "teacher", [s == "teacher" for s in coded["source"]]),
        ("label", "reward_hack", [x == "reward_hack" for x in coded["label"]]),
        ("arm", "erase", [a == "erase" for a in arms]),
        ("flagged", "yes", [f == 1 for f in data["flags"]["flagged"]]),
    ):
        page.select_option(f"[name={name}]", label=value)
        assert 0 < shown(page) == sum(truth) < data["n"]
        page.select_option(f"[name={name}]", label="all")
    page.fill("[name=from]", "3")
    page.fill("[name=to]", "5")
    page.fill("[name=contains]", "CLASS solution")
    assert shown(page) == sum(3 <= s <= 5 for s in data["plain"]["step"])
    assert page.locator("#list .item").first.text_content().startswith("3")
    page.fill("[name=contains]", "in no completion")
    assert shown(page) == 0
    page.click("text=Clear")
    page.wait_for_function(f"document.getElementById('count').textContent.startsWith('{data['n']:,}')")
    assert said == []
    page.close()


def test_anchor_keyboard_and_detail(run_page, browser):
    page, said = opened(browser, run_page, anchor="#step-9-row-12")
    head = page.locator("#detail .caption").first
    assert "step 9, row 12" in head.text_content()
    assert page.locator("#list [aria-selected=true]").count() == 1
    row = rollout(9, 12)
    assert "".join(page.locator(".code div").all_text_contents()) == row["completion"].replace("\n", "")
    assert row["grade"]["detail"] in page.locator(".grade").text_content()
    assert page.locator(".task mark").text_content() in problems.messages(problems.pose_one(
        problems.generated()[(9 * 7 + 12) % 40].problem, "run_tests"))[-1]["content"]  # fmt: skip
    assert page.locator(".heat div").all_text_contents() == ["0.10", "0.40", "2.40", "0.30"]
    page.keyboard.press("j")
    assert "step 9, row 13" in head.text_content()
    assert page.url.endswith("#step-9-row-13")
    page.keyboard.press("k")
    page.keyboard.press("k")
    assert "step 9, row 11" in head.text_content()
    page.locator("#list").focus()
    page.keyboard.press("ArrowDown")
    assert "step 9, row 12" in head.text_content()
    page.evaluate("location.hash = '#step-2-row-3'")
    page.wait_for_function("document.querySelector('#detail .caption').textContent.includes('step 2, row 3')")
    page.evaluate("location.hash = '#step-99-row-3'")
    page.wait_for_function("document.getElementById('detail').textContent.includes('is not in this report')")
    assert said == []
    page.close()


def test_page_marks_the_lines_that_python_marks(run_page, browser):
    page, _ = opened(browser, run_page)
    for i in (0, 3, 6, 9):  # an exploit in each mode
        row = rollout(1, i)
        wording = Wording(**row["wording"])
        lines = marked(row["completion"], report_data.exploit_pattern(row["env_mode"], wording))
        page.evaluate(f"location.hash = '#step-1-row-{i}'")
        page.wait_for_function(f"document.querySelector('#detail .caption').textContent.includes('row {i},')")
        found = page.locator(".code .exploit").evaluate_all("all => all.map((x) => +x.dataset.n)")
        assert set(found) == lines
        assert found
    page.close()


def test_fifty_thousand_rollouts_filter_under_200_ms(tmp_path, browser):
    rows = pl.concat([numbered(rollouts(2, 50), tmp_path)] * 500).with_columns(
        step=pl.int_range(50_000) // 250,
        completion=pl.col("completion") + pl.int_range(50_000).cast(pl.String),  # none is like another
    )
    rows = rows.with_columns(row=pl.int_range(pl.len()).over("step"))
    data = report_data.columns([report_data.RunRollouts("big", "none", 1, rows, 50_000)], {})
    path = tmp_path / "big.html"
    found = [report.Section("rollouts", "Rollouts", browser=True)]
    write_text(path, report.rendered("big", "Rollouts", found, report_data.packed(data)))
    assert path.stat().st_size < 15e6
    page, said = opened(browser, path)
    assert shown(page) == 50_000
    taken = page.evaluate("""() => {
      const form = document.getElementById("filters"), best = {};
      const change = (name, value) => {
        const start = performance.now();
        form.elements[name].value = value;
        form.dispatchEvent(new Event("input"));
        document.getElementById("list").getBoundingClientRect();
        return performance.now() - start;
      };
      const asked = { env_mode: "1", label: "0", from: "150", contains: "4999", flagged: "1" };
      for (const [name, value] of Object.entries(asked)) {
        best[name] = Infinity;
        for (let k = 0; k < 5; k++) { best[name] = Math.min(best[name], change(name, value)); change(name, ""); }
      }
      return best;
    }""")
    print("filtering 50,000 rollouts, ms:", taken)
    assert max(taken.values()) < 200, taken
    assert said == []
    page.close()
