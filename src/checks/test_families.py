"""The generated problems: right solutions pass, wrong ones do not, and no split knows another's problems."""

import gzip
import json
import math
import random
from collections import Counter

import pytest

from projected_grpo import problems
from projected_grpo.data_types import Problem
from projected_grpo.loopholes import TESTS_SENTENCE
from projected_grpo.organism import families
from projected_grpo.organism.families import P_HARD

MADE = problems.generated()
PROBLEMS = [g.problem for g in MADE]


def passes(source: str, problem: Problem) -> bool:
    solve = families.solver(source)
    return all(solve(*case.args.values()) == case.expected for case in problem.cases)


def probes(problem: Problem, n: int) -> list:
    """Random inputs that the generator itself never drew."""
    draft, rng = families.drafts()[problem.id], random.Random(771)
    marks = "bdfg" if draft.argument == "s" else (2, 4, 6)
    return [families.draw_input(rng, draft.argument, marks, rng.randint(0, 8)) for _ in range(n)]


def test_there_are_enough_distinct_problems_in_every_split():
    assert len(PROBLEMS) >= 500
    assert len({p.statement for p in PROBLEMS}) == len({p.id for p in PROBLEMS}) == len(PROBLEMS)
    counts = Counter((g.split, g.problem.family) for g in MADE)
    assert min(counts.values()) >= 8
    assert len(counts) == 3 * len({p.family for p in PROBLEMS})
    assert all(p.statement.count(TESTS_SENTENCE) == 1 for p in PROBLEMS)


def test_canonical_solutions_pass_and_wrong_or_lazy_ones_fail():
    """Forty of each problem's wrong bodies; drawing the problems has run them all."""
    rng = random.Random(1)
    for made in MADE:
        problem = made.problem
        assert passes(problem.canonical, problem), problem.id
        assert len(problem.cases) >= 6, problem.id
        wrong = families.drafts()[problem.id].wrong()
        for source in [*rng.sample(wrong, min(40, len(wrong))), *made.lazy]:
            assert not passes(source, problem), f"{problem.id} accepts a wrong body:\n{source}"


def test_the_worked_example_settles_what_the_words_leave_open():
    for problem in PROBLEMS:
        draft, example = families.drafts()[problem.id], problem.cases[0]
        assert example.expected, problem.id
        for source in draft.misread():
            assert families.solver(source)(*example.args.values()) != example.expected, problem.id


def test_easy_and_hard_problems_stand_in_every_family_and_split():
    counts = Counter((g.split, g.problem.family, g.kind) for g in MADE)
    assert len(counts) == 3 * 7 * 2
    hard = sum(n for (_, _, kind), n in counts.items() if kind == "hard") / len(PROBLEMS)
    assert abs(hard - P_HARD) < 0.06


def test_a_hard_problem_has_at_least_twelve_readings():
    """So that a guess solves it once in twelve times at best."""
    for id_, draft in families.drafts().items():
        readings = math.prod(1 + len(slot.wrong) for slot in draft.slots if not slot.stated)
        assert readings >= 12 if draft.kind == "hard" else readings == 1, id_


def test_no_reading_is_right_more_often_than_another():
    """Else a preference learned on other problems would solve what is meant to stay open."""
    right = Counter()
    for draft in families.drafts().values():
        for slot in draft.slots:
            if not slot.stated and slot.field in ("low", "top") and len(slot.wrong) == 5:
                right["=" in slot.right] += 1  # three of the six readings include their value
    assert abs(right[True] / right.total() - 0.5) < 0.08, right


def test_no_two_problems_behave_alike():
    seen: dict = {}
    for problem in PROBLEMS:
        inputs = probes(problem, 40)
        key = repr(inputs), repr([families.solver(problem.canonical)(v) for v in inputs])
        assert key not in seen, f"{problem.id} behaves like {seen[key]}"
        seen[key] = problem.id


def test_what_is_stored_is_what_a_draw_gives(monkeypatch):
    """The first family drawn anew equals the stored one, drafts and cases."""
    monkeypatch.setattr(families, "FAMILIES", {"filter": families.FAMILIES["filter"]})
    drawn = {id_: families.row_of(*pair) for id_, pair in families.draw().items()}
    stored = {row["id"]: row for row in map(json.loads, gzip.decompress(problems.GENERATED.read_bytes()).splitlines())}
    assert json.loads(json.dumps(drawn)) == {id_: row for id_, row in stored.items() if row["family"] == "filter"}


@pytest.mark.parametrize("p_stated", [0.0, 1.0])
def test_serious_tries_guess_what_is_shown_and_know_what_is_stated(p_stated):
    rng = random.Random(0)
    of = {g.kind: g.problem for g in MADE if g.problem.family == "recursion"}
    easy, hard = of["sure"], of["hard"]
    solved = {
        p.id: sum(passes(families.honest_body(p, rng, p_stated), p) for _ in range(200)) / 200 for p in (easy, hard)
    }
    assert solved[easy.id] == p_stated
    assert solved[hard.id] < 0.15
