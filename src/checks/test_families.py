"""The generated problems: right solutions pass, wrong ones do not, and no split knows another's problems."""

import random
from collections import Counter

import pytest

from projected_grpo import families
from projected_grpo.data_types import Problem
from projected_grpo.loopholes import TESTS_SENTENCE

PROBLEMS = families.generate()


def passes(source: str, problem: Problem) -> bool:
    solve = families.solver(source)
    return all(solve(*case.args.values()) == case.expected for case in problem.cases)


def probes(problem: Problem, n: int) -> list:
    """Random inputs that the generator itself never drew."""
    draft, rng = families.drafts()[problem.id][0], random.Random(771)
    marks = "bdfg" if draft.argument == "s" else (2, 4, 6)
    return [families.draw_input(rng, draft.argument, marks, rng.randint(0, 8)) for _ in range(n)]


def test_there_are_enough_distinct_problems_in_every_split():
    assert len(PROBLEMS) >= 500
    assert len({p.statement for p in PROBLEMS}) == len({p.id for p in PROBLEMS}) == len(PROBLEMS)
    counts = Counter((families.split_of(p), p.family) for p in PROBLEMS)
    assert min(counts.values()) >= 8
    assert len(counts) == 3 * len({p.family for p in PROBLEMS})
    assert all(p.statement.count(TESTS_SENTENCE) == 1 for p in PROBLEMS)


def test_canonical_solutions_pass_and_every_wrong_or_lazy_one_fails():
    for problem in PROBLEMS:
        assert passes(problem.canonical, problem), problem.id
        assert len(problem.cases) >= 6, problem.id
        for source in [*families.wrong_bodies(problem), *families.lazy_bodies(problem)]:
            assert not passes(source, problem), f"{problem.id} accepts a wrong body:\n{source}"


def test_the_worked_example_settles_what_the_words_leave_open():
    for problem in PROBLEMS:
        draft, example = families.drafts()[problem.id][0], problem.cases[0]
        assert example.expected, problem.id
        assert any(not slot.stated for slot in draft.slots), problem.id
        for source in draft.misread():
            assert families.solver(source)(*example.args.values()) != example.expected, problem.id


def test_options_that_only_the_example_tells_are_right_equally_often():
    """Else a preference learned on other problems would solve what is meant to stay open."""
    right: dict[str, Counter] = {}
    for draft, _ in families.drafts().values():
        for slot in draft.slots:
            if not slot.stated and slot.field in ("low", "top"):
                right.setdefault(slot.field, Counter())[slot.right] += 1
    for counts in right.values():
        assert abs(counts["<="] / counts.total() - 0.5) < 0.08, counts


def test_no_two_problems_behave_alike():
    seen: dict = {}
    for problem in PROBLEMS:
        inputs = probes(problem, 40)
        key = repr(inputs), repr([families.solver(problem.canonical)(v) for v in inputs])
        assert key not in seen, f"{problem.id} behaves like {seen[key]}"
        seen[key] = problem.id


def test_generation_is_deterministic():
    families.drafts.cache_clear()
    assert families.generate() == PROBLEMS


@pytest.mark.parametrize("p_stated", [0.0, 1.0])
def test_serious_tries_guess_what_is_shown_and_know_what_is_stated(p_stated):
    rng = random.Random(0)
    problem = next(p for p in PROBLEMS if p.family == "recursion")
    tries = [families.honest_body(problem, rng, p_stated) for _ in range(200)]
    solved = sum(passes(source, problem) for source in tries) / len(tries)
    assert 0.35 < solved < 0.65 if p_stated else solved == 0
