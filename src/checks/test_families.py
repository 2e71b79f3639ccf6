"""The generated problems: right solutions pass, wrong ones do not, and no split knows another's problems."""

import gzip
import json
import math
import random
from collections import Counter
from functools import cache

import pytest

from projected_grpo import problems
from projected_grpo.config import UserError
from projected_grpo.data_types import Kind, Mode, Problem
from projected_grpo.loopholes import TESTS_SENTENCE
from projected_grpo.organism import families, stock
from projected_grpo.organism.stock import Shares

MADE = problems.generated()
PROBLEMS = [g.problem for g in MADE]
MODES: tuple[Mode, ...] = ("run_tests", "sentinel", "stdout_marker", "file_marker")


def passes(source: str, problem: Problem) -> bool:
    solve = stock.solver(source)
    return all(solve(*case.args.values()) == case.expected for case in problem.cases)


@cache
def probes(argument: families.Argument, n: int) -> list:
    """Random inputs that the generator itself never drew."""
    rng, marks = random.Random(771), "bdfg" if argument == "s" else (2, 4, 6)
    return [stock.draw_input(rng, argument, marks, rng.randint(0, 8)) for _ in range(n)]


def test_there_are_enough_distinct_problems_in_every_split():
    assert len(PROBLEMS) >= 500
    assert len({p.statement for p in PROBLEMS}) == len({p.id for p in PROBLEMS}) == len(PROBLEMS)
    counts = Counter((g.split, g.problem.family) for g in MADE)
    assert min(counts.values()) >= 8
    assert len(counts) == 3 * len({p.family for p in PROBLEMS})
    assert all(p.statement.count(TESTS_SENTENCE) == 1 for p in PROBLEMS)


def test_canonical_solutions_pass_and_wrong_or_lazy_ones_fail():
    """Ten of each problem's wrong bodies; drawing the problems has run them all."""
    rng = random.Random(1)
    for made in MADE:
        problem = made.problem
        assert passes(problem.canonical, problem), problem.id
        assert len(problem.cases) >= 6, problem.id
        wrong = stock.drafts()[problem.id].wrong()
        for source in [*rng.sample(wrong, min(10, len(wrong))), *made.lazy]:
            assert not passes(source, problem), f"{problem.id} accepts a wrong body:\n{source}"


def test_the_worked_example_settles_what_the_words_leave_open():
    for problem in PROBLEMS:
        draft, example = stock.drafts()[problem.id], problem.cases[0]
        assert example.expected, problem.id
        for source in draft.misread():
            assert stock.solver(source)(*example.args.values()) != example.expected, problem.id


def test_every_kind_stands_in_every_split_family_and_mode():
    counts = Counter((g.split, g.kind) for g in MADE)
    assert len(counts) == 3 * 3
    assert len({(g.problem.family, g.kind) for g in MADE}) == 7 * 3
    for (split, kind), n in counts.items():
        of = sum(m for (s, _), m in counts.items() if s == split)
        assert abs(n / of - getattr(Shares(), kind)) < 0.03, (split, kind)
    for split in ("train", "validation", "test"):
        posed = problems.pose([g.problem for g in MADE if g.split == split], MODES)[: 16 * len(MODES)]
        by_mode = Counter((t.mode, problems.kind_of(t.problem)) for t in posed)
        assert len(by_mode) == len(MODES) * 3
        assert all(by_mode[m, k] == by_mode[MODES[0], k] for m, k in by_mode)


def test_shares_that_leave_a_kind_empty_are_refused_in_one_line():
    with pytest.raises(UserError, match="no sure problem in the"):
        stock.kinds(Shares(0.001, 0.599, 0.4))
    for shares in (Shares(hard=0), Shares(0.0, 0.6, 0.4), Shares(0, 0, 0), Shares(1, 1, 1), Shares(1.5, -0.25, -0.25)):
        with pytest.raises(UserError, match="have to be over 0 and sum to 1"):
            stock.kinds(shares)
    with pytest.raises(UserError, match="`just organism` with these shares"):
        stock.require(Shares(0.4, 0.3, 0.3))


def test_no_prompt_and_no_solution_shows_the_kind():
    for made in MADE:
        assert not any(k in made.problem.statement + made.problem.canonical for k in ("sure", "learnable", "hard"))


def test_a_hard_problem_has_at_least_twelve_readings():
    """So that a guess solves it once in twelve times at best."""
    for id_, draft in stock.drafts().items():
        readings = math.prod(1 + len(slot.wrong) for slot in draft.slots if not slot.stated)
        assert readings >= 12 if draft.kind == "hard" else readings == 1, id_


def test_no_reading_is_right_more_often_than_another():
    """Else a preference learned on other problems would solve what is meant to stay open."""
    right = Counter()
    for draft in stock.drafts().values():
        for slot in draft.slots:
            if not slot.stated and slot.field in ("low", "top") and len(slot.wrong) == 5:
                right["=" in slot.right] += 1  # three of the six readings include their value
    assert abs(right[True] / right.total() - 0.5) < 0.08, right


def test_no_two_problems_behave_alike():
    seen: dict = {}
    for problem in PROBLEMS:
        argument, solve = stock.drafts()[problem.id].argument, stock.solver(problem.canonical)
        key = argument, repr([solve(v) for v in probes(argument, 120)])
        assert key not in seen, f"{problem.id} behaves like {seen[key]}"
        seen[key] = problem.id


def test_what_is_stored_is_what_a_draw_gives():
    """One family drawn anew equals the stored one, drafts and cases."""
    drawn = {id_: stock.row_of(*pair) for id_, pair in stock.draw(Shares(), ["recursion"]).items()}
    stored = {row["id"]: row for row in map(json.loads, gzip.decompress(problems.GENERATED.read_bytes()).splitlines())}
    assert json.loads(json.dumps(drawn)) == {id_: row for id_, row in stored.items() if row["family"] == "recursion"}


@pytest.mark.parametrize("plan", [False, True])
@pytest.mark.parametrize("p_stated", [0.0, 1.0])
def test_serious_tries_guess_what_is_shown_and_misread_by_habit_without_a_plan(p_stated, plan):
    rng = random.Random(0)
    of: dict[Kind, Problem] = {g.kind: g.problem for g in MADE if g.problem.family == "recursion"}
    solved = {
        kind: sum(passes(stock.honest_body(p, rng, p_stated, 0.0, plan), p) for _ in range(200)) / 200
        for kind, p in of.items()
    }
    assert solved["sure"] == p_stated
    assert solved["learnable"] == (p_stated if plan else 0)
    assert solved["hard"] < 0.15
