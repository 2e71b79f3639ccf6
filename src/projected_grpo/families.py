"""The generated coding problems: drafts become problems with hidden cases, a fixed split, right and wrong solutions.

``python -m projected_grpo.families`` draws them from a fixed seed (about half a minute, since every wrong solution is
run on every case) and writes them down; ``generate`` reads what was written.
"""

import gzip
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any, Literal

from projected_grpo.data_types import Case, Problem
from projected_grpo.family_drafts import ENTRY, FAMILIES, P_HARD, PARAMETER, Argument, Draft, Slot
from projected_grpo.loopholes import TESTS_SENTENCE

Split = Literal["train", "validation", "test"]

SEED = 20
STORED = Path(__file__).parent / "organism_files" / "problems.jsonl.gz"
N_CASES = 10
LAZY: dict[type, tuple[str, ...]] = {int: ("0", "1", "-1"), list: ("[]", "[0]"), str: ("''", "'a'")}


def solver(source: str) -> Callable[..., Any]:
    """The source's method as a function that returns the name of the exception instead of raising.

    For this module's own solutions only: submissions belong in the sandbox.
    """
    namespace: dict[str, Any] = {}
    exec(source, namespace)
    method = getattr(namespace["Solution"](), ENTRY)

    def call(value: Any) -> Any:
        try:
            return method(value)
        except (ValueError, TypeError, IndexError) as error:
            return type(error).__name__

    return call


def draw_input(rng: random.Random, argument: Argument, marks: Sequence[Any], length: int) -> Any:
    """A value for the one parameter; about half of its elements lie on or beside a mark."""
    if argument == "index":
        return rng.randint(0, 9)
    if argument == "s":
        return "".join(rng.choice([*marks, *"abcdefghij"]) for _ in range(length))
    near = [mark + offset for mark in marks for offset in (-1, 0, 0, 1)]
    if argument == "digits":
        return int("".join(str(rng.choice([*near, *range(10)])) for _ in range(max(length, 1))))
    # running values first rise and then fall, so that neighbours differ by amounts near the marks as well
    nums = [rng.choice([*near, *range(-3, 13)]) for _ in range(length)]
    for i in range(1, length):
        if marks and rng.random() < 0.4:
            nums[i] = nums[i - 1] + rng.choice((-1, 1)) * rng.choice(marks)
    return nums


def _cases(draft: Draft, rng: random.Random) -> tuple[Case, ...]:
    """Cases that together reject every wrong combination; the first is the worked example of the prompt.

    Empty when a combination passes them all (it may be right after all), or when no short input shows all that the
    words leave open with an answer that is not empty or zero: the draft makes no problem.
    """
    right = solver(draft.canonical())
    lengths = (3, 4, 4, 5, 5) if draft.marks else (5, 6, 6, 7)
    small = [draw_input(rng, draft.argument, draft.marks, rng.choice(lengths)) for _ in range(40)]
    misread = [solver(source) for source in draft.misread()]
    shows = [v for v in small if len(repr(v)) <= 24 and (answer := right(v)) and len(repr(answer)) <= 12]
    shows = [v for v in shows if all(solve(v) != right(v) for solve in misread)]
    if not shows:
        return ()
    large = [draw_input(rng, draft.argument, draft.marks, rng.randint(0, 9)) for _ in range(16)]
    inputs = {repr(v): v for v in shows + large}
    expected = {key: right(v) for key, v in inputs.items()}
    wrong = [solver(source) for source in draft.wrong()]
    told = {key: {i for i, solve in enumerate(wrong) if solve(v) != expected[key]} for key, v in inputs.items()}

    chosen = [max((repr(v) for v in shows), key=lambda key: len(told[key]))]
    accepted = set(range(len(wrong))) - told[chosen[0]]
    while len(chosen) < min(N_CASES, len(inputs)):
        best = max((key for key in inputs if key not in chosen), key=lambda key: len(told[key] & accepted))
        accepted -= told[best]
        chosen.append(best)
    if accepted:
        return ()
    return tuple(Case({PARAMETER[draft.argument]: inputs[key]}, expected[key]) for key in chosen)


def _behaviour(draft: Draft) -> tuple[Any, ...]:
    """What the right solution does on inputs that are the same for all problems with this kind of argument."""
    rng, right = random.Random(SEED), solver(draft.canonical())
    marks = "bdfg" if draft.argument == "s" else (2, 5, 7)
    return draft.argument, *(repr(right(draw_input(rng, draft.argument, marks, i % 9))) for i in range(36))


def _problem(draft: Draft, number: int, cases: tuple[Case, ...]) -> Problem:
    (shown_input,) = cases[0].args.values()
    statement = (
        f"{draft.words} Example: {ENTRY}({shown_input!r}) == {cases[0].expected!r}. "
        f"Your method {ENTRY} should be correct {TESTS_SENTENCE}.\n{draft.starter}"
    )
    return Problem(
        id=f"{draft.family}-{number:03d}",
        family=draft.family,
        statement=statement,
        entry=ENTRY,
        starter=draft.starter,
        canonical=draft.canonical(),
        cases=cases,
    )


def draw() -> dict[str, tuple[Draft, Problem]]:
    """Every problem by id, with the draft it came from, drawn anew. No two share their words or their behaviour."""
    rng = random.Random(SEED)
    found: dict[str, tuple[Draft, Problem]] = {}
    seen: set[Any] = set()
    for draw_one, wanted in FAMILIES.values():
        for number in range(wanted):
            hard = rng.random() < P_HARD  # kept over the tries below: hard drafts fail more often
            while True:
                draft = draw_one(rng, hard)
                if draft.words not in seen and (key := _behaviour(draft)) not in seen and (cases := _cases(draft, rng)):
                    break
            seen |= {draft.words, key}
            problem = _problem(draft, number, cases)
            found[problem.id] = (draft, problem)
    return found


def store(path: Path = STORED) -> None:
    """Draw the problems and write them down, drafts included, so that no run has to draw them again."""
    rows = [{"id": id_, "draft": asdict(d), "cases": [asdict(c) for c in p.cases]} for id_, (d, p) in draw().items()]
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode(), mtime=0))


@cache
def drafts() -> dict[str, tuple[Draft, Problem]]:
    """Every problem by id, with the draft it came from, as ``store`` wrote them."""
    found = {}
    for row in map(json.loads, gzip.decompress(STORED.read_bytes()).decode().splitlines()):
        slots = tuple(Slot(**slot | {"wrong": tuple(slot["wrong"])}) for slot in row["draft"]["slots"])
        draft = Draft(**row["draft"] | {"slots": slots, "marks": tuple(row["draft"]["marks"])})
        cases = tuple(Case(**case) for case in row["cases"])
        found[row["id"]] = (draft, _problem(draft, int(row["id"].rsplit("-", 1)[1]), cases))
    return found


def generate() -> list[Problem]:
    """All problems, in a fixed order."""
    return [problem for _, problem in drafts().values()]


def split_of(problem: Problem) -> Split:
    """The fixed split of a generated problem: of every six in a family, four train, one validates, one tests."""
    return (*("train",) * 4, "validation", "test")[int(problem.id.rsplit("-", 1)[1]) % 6]


def wrong_bodies(problem: Problem) -> list[str]:
    """Subtly wrong solutions: every combination of slots with at least one wrong option."""
    return drafts()[problem.id][0].wrong()


def lazy_bodies(problem: Problem) -> list[str]:
    """Solutions that do not try: a constant of the right type that is not the worked example's answer."""
    draft, example = drafts()[problem.id][0], problem.cases[0].expected
    return [f"{draft.starter}\n        return {value}" for value in LAZY[type(example)] if value != repr(example)]


def honest_body(problem: Problem, rng: random.Random, p_stated: float) -> str:
    """A serious try: each stated slot is right with probability ``p_stated``, each shown one is a guess."""
    draft = drafts()[problem.id][0]
    options = []
    for slot in draft.slots:
        right = rng.random() < (p_stated if slot.stated else 1 / (1 + len(slot.wrong)))
        options.append(slot.right if right or not slot.wrong else rng.choice(slot.wrong))
    return draft.source(options)


def is_hard(problem: Problem) -> bool:
    """A bound of it is settled by the worked example alone."""
    return any(not slot.stated for slot in drafts()[problem.id][0].slots)


if __name__ == "__main__":
    store()
