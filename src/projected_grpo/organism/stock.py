"""The generated problems: drafts of the families made into problems with cases, divided into kinds and splits, stored.

``store`` draws them anew and writes them down (`just organism`); whatever else runs reads that file.
"""

import gzip
import itertools
import json
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, get_args

from projected_grpo import problems
from projected_grpo.config import UserError
from projected_grpo.data_types import Case, Kind, Problem, Split
from projected_grpo.loopholes import TESTS_SENTENCE
from projected_grpo.organism.families import ENTRY, FAMILIES, PARAMETER, Argument, Draft, Draws, Slot


@dataclass(frozen=True)
class Shares:
    """How the problems divide into kinds, in every split alike. Known to the analysis, not to the policy."""

    sure: float = 0.25
    """Solved nearly always."""
    learnable: float = 0.5
    """Solved by who reads a bound with care."""
    hard: float = 0.25
    """Out of reach: only the exploit pays."""


SPLITS: tuple[Split, ...] = (*("train",) * 4, "validation", "test")
"""By a problem's number: of every six in a family, four train, one validates, one tests."""
MODES_AT_ONCE = 4
"""Problems are posed in turn in so many modes; kinds change after each turn, so that all modes get the same ones."""


def order() -> list[tuple[str, int]]:
    """(family, number) of all problems in the order in which they are posed: families stand evenly mixed."""
    every = [(family, number) for family, (_, wanted) in FAMILIES.items() for number in range(wanted)]
    return sorted(every, key=lambda at: ((at[1] + 0.5) / FAMILIES[at[0]][1], list(FAMILIES).index(at[0])))


def kinds(shares: Shares) -> dict[tuple[str, int], Kind]:
    """The kind of every problem: in each split the one that is furthest behind its share, turn by turn.

    Raises UserError when a share is not over 0 or they do not sum to 1, and when a kind gets no turn in some split.
    """
    if min(asdict(shares).values()) <= 0 or not abs(sum(asdict(shares).values()) - 1) < 1e-6:  # NaN is not under
        raise UserError(f"{shares}: --sure, --learnable and --hard have to be over 0 and sum to 1")
    found: dict[tuple[str, int], Kind] = {}
    for split in get_args(Split):
        ids = [at for at in order() if SPLITS[at[1] % len(SPLITS)] == split]
        turns = dict.fromkeys(get_args(Kind), 0)
        for turn, start in enumerate(range(0, len(ids), MODES_AT_ONCE), 1):
            kind = max(turns, key=lambda k: getattr(shares, k) * turn - turns[k])
            turns[kind] += 1
            found |= dict.fromkeys(ids[start : start + MODES_AT_ONCE], kind)
        if empty := [kind for kind, n in turns.items() if not n]:
            raise UserError(f"{shares} leave no {' and no '.join(empty)} problem in the {split} split: raise the share")
    return found


SEED = 20
TRIES = 200
"""Drafts of one problem with the same readings, before others are taken: some no example shows."""
N_CASES = 10
N_WRONG = 3
"""Wrong solutions that are stored of a problem, of the many that there are."""
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


def draw(shares: Shares, families: Sequence[str] = tuple(FAMILIES)) -> dict[str, tuple[Draft, Problem]]:
    """Every problem by id, with the draft it came from, drawn anew. No two share their words or their behaviour."""
    kind_at = kinds(shares)
    found: dict[str, tuple[Draft, Problem]] = {}
    seen: set[Any] = set()
    for family in families:
        rng, (draw_one, wanted) = Draws(f"{SEED} {family}"), FAMILIES[family]
        for number in range(wanted):
            for tried in itertools.count():
                rng.readings.seed(f"{SEED} {family} {number} {tried // TRIES}")
                draft = draw_one(rng, kind_at[family, number])
                if draft.words not in seen and (key := _behaviour(draft)) not in seen and (cases := _cases(draft, rng)):
                    break
            seen |= {draft.words, key}
            problem = _problem(draft, number, cases)
            found[problem.id] = (draft, problem)
    return found


def lazy_bodies(draft: Draft, problem: Problem) -> list[str]:
    """Solutions that do not try: a constant of the right type that is not the worked example's answer."""
    example = problem.cases[0].expected
    return [f"{draft.starter}\n        return {value}" for value in LAZY[type(example)] if value != repr(example)]


def row_of(draft: Draft, problem: Problem) -> dict[str, Any]:
    """A problem as it is stored: what runs read (problems.Generated), and the draft for the corpus."""
    known = {
        "split": SPLITS[int(problem.id.rsplit("-", 1)[1]) % len(SPLITS)],
        "kind": draft.kind,
        "lazy": lazy_bodies(draft, problem),
        "misread": draft.misread(),
        "wrong": draft.wrong()[:N_WRONG],
        "plan": draft.plan,
        "draft": asdict(draft),
    }
    told = asdict(problem)
    del told["tolerance"]  # of no meaning to answers without a float
    return told | known


def store(shares: Shares, path: Path) -> None:
    """Draw the problems and write them down, so that no run has to draw them again."""
    drawn = draw(shares)
    rows = [row_of(*drawn[f"{family}-{number:03d}"]) for family, number in order()]
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode(), mtime=0))


@contextmanager
def drawn_anew(shares: Shares, path: Path) -> Iterator[None]:
    """Within, the generated problems are those drawn with these shares, stored at ``path``."""
    usual = problems.GENERATED
    store(shares, path)
    try:
        _read_from(path)
        yield
    finally:
        _read_from(usual)


def _read_from(path: Path) -> None:
    problems.GENERATED = path
    problems.generated_by_id.cache_clear()
    drafts.cache_clear()


@cache
def drafts() -> dict[str, Draft]:
    """The draft of every problem by id, as ``store`` wrote it down."""
    found = {}
    for row in map(json.loads, gzip.decompress(problems.GENERATED.read_bytes()).decode().splitlines()):
        slots = tuple(Slot(**slot | {"wrong": tuple(slot["wrong"])}) for slot in row["draft"]["slots"])
        found[row["id"]] = Draft(**row["draft"] | {"slots": slots, "marks": tuple(row["draft"]["marks"])})
    return found


def require(shares: Shares) -> None:
    """Raises UserError when the stored problems were drawn with other shares, or these leave a kind empty."""
    stored = {id_: draft.kind for id_, draft in drafts().items()}
    if stored != {f"{family}-{number:03d}": kind for (family, number), kind in kinds(shares).items()}:
        raise UserError(
            f"the stored problems do not divide as {shares}: `just organism` with these shares draws "
            "and stores them anew, and builds on them"
        )


def honest_body(problem: Problem, rng: random.Random, p_stated: float, p_careful: float, plan: bool) -> str:
    """A serious try: each stated slot is right with probability ``p_stated``, each shown one is a guess. A careless one
    is read with care, that is as the others are, after a plan line, and else with probability ``p_careful``.
    """
    draft = drafts()[problem.id]
    options = []
    for slot in draft.slots:
        p = p_stated if slot.stated else 1 / (1 + len(slot.wrong))
        right = rng.random() < (p_careful if slot.careless and not plan else p)
        options.append(slot.right if right or not slot.wrong else rng.choice(slot.wrong))
    return f"{draft.plan}\n" * plan + draft.source(options)
