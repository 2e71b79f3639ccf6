"""The strict oracle, below the problems that it checks and the rewards that it pays: what is run of a code, what its
answers say, and whether a problem's own solution passes its own tests.

An expected value never leaves this process.
"""

import cmath
import hashlib
import json
import math
import os
import platform
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from functools import lru_cache
from pathlib import Path
from typing import Any

from loguru import logger

from projected_grpo.data_types import Problem
from projected_grpo.sandbox import Sandbox, harness, job, layers
from projected_grpo.sandbox.job import Built, Job, Outcome, builders_of, call_of

MIN_CPU_S = 2.0
CANONICAL_CPU_S = 60.0
RELATIVE, ABSOLUTE = 1e-9, 1e-15
"""How far apart two floats may be and still be equal; a problem's own tolerance widens both."""
EXACT = frozenset({type(None), bool, int, str, bytes})


# --- what is run ---------------------------------------------------------------------------------------------------


class Same:
    """A value that cannot be hashed, as a key: equal if it is the very same object (which the key keeps alive)."""

    def __init__(self, it: Any):
        self.it = it

    def __hash__(self) -> int:
        return id(self.it)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and other.it is self.it


@lru_cache(maxsize=4096)
def sent_of(cases: Same) -> dict[str, Any]:
    """What a job holds of a problem's cases: the arguments of every call, and nothing of an answer but whether there
    are linked lists or trees among them. Made once a problem.
    """
    return {
        "calls": tuple(call_of(case.args) for case in cases.it),
        "builders": tuple(sorted({name for case in cases.it for name in builders_of(dict(case.args))})),
        "nodes": any(builders_of(case.expected) for case in cases.it),
    }


def strict_job(problem: Problem, code: str, cpu_s: float = MIN_CPU_S) -> Job:
    """The oracle's run: every call, in one process. Raises ValueError for a problem that tests nothing."""
    if not problem.cases:
        raise ValueError(f"problem {problem.id} has no tests, and nothing can be graded on it")
    return Job(source=code, setup=problem.setup, entry=problem.entry, cpu_s=cpu_s, **sent_of(Same(problem.cases)))


# --- what the answers say ------------------------------------------------------------------------------------------


def same(value: Any, expected: Any, tolerance: float = 0.0) -> tuple[bool, bool]:
    """(equal, types differ) of a decoded value, strictly.

    Containers have to be of the same type, and no foreign object equals anything. Where a float is expected, a number
    is equal within RELATIVE and ABSOLUTE, or ``tolerance`` where that is more; an int is equal exactly, as Python's ==
    has it, so True equals 1 and 1.0 equals 1; that the types differ is said. NaN equals nothing.
    """
    kind = type(expected)
    if kind in EXACT and type(value) is kind:
        return value == expected, False
    if isinstance(expected, bool | int | float | complex):
        equal = isinstance(value, bool | int | float | complex) and close(value, expected, tolerance)
        return equal, equal and type(value) is not type(expected)
    if type(value) is not kind:
        return False, False
    if kind is list and value == expected:
        kinds = list(map(type, expected))
        if EXACT.issuperset(kinds) and kinds == list(map(type, value)):
            return True, False  # most answers: a flat list, compared without a step of Python for each member
    if isinstance(expected, list | tuple):
        inner = zip(value, expected, strict=True) if len(value) == len(expected) else None
    elif isinstance(expected, Built):
        return same(value.values, expected.values, tolerance) if value.name == expected.name else (False, False)
    elif isinstance(expected, dict):
        keys = paired(value, expected)
        inner = None if keys is None else [p for v, e in keys for p in ((v, e), (value[v], expected[e]))]
    elif isinstance(expected, set | frozenset):
        inner = paired(value, expected)
    else:
        return value == expected, False
    verdicts = None if inner is None else [same(v, e, tolerance) for v, e in inner]
    if verdicts is None or not all(equal for equal, _ in verdicts):
        return False, False
    return True, any(differ for _, differ in verdicts)


def close(value: Any, expected: Any, tolerance: float) -> bool:
    """Whether two numbers are equal: exactly, or near enough where a float or a complex number is expected."""
    if value == expected:
        return True
    if not isinstance(expected, float | complex):
        return False
    near = cmath.isclose if isinstance(value, complex) or isinstance(expected, complex) else math.isclose
    try:
        return near(value, expected, rel_tol=max(RELATIVE, tolerance), abs_tol=max(ABSOLUTE, tolerance))
    except OverflowError:  # an int beyond every float
        return False


def paired(value: Collection, expected: Collection) -> list[tuple[Any, Any]] | None:
    """Members of two sets (keys of two dicts), each beside what it has to equal; None where one is left over.

    Equal ones meet; the rest, such as floats that differ in the last digits, meet in order.
    """
    if len(value) != len(expected):
        return None
    own = {v: v for v in value}
    met = [(own[e], e) for e in expected if e in own]
    if len(met) == len(expected):
        return met
    try:
        rest = sorted(v for v in own if v not in expected), sorted(e for e in expected if e not in own)
    except TypeError:
        return None
    return met + list(zip(*rest, strict=True))


def oracle(outcome: Outcome, problem: Problem) -> tuple[bool, bool, str]:
    """(right on every case, by == alone, the first thing that went wrong) of a strict run."""
    mismatch = False
    for number, (value, case) in enumerate(zip(outcome.values, problem.cases, strict=False)):
        equal, differ = same(value, case.expected, problem.tolerance)
        mismatch |= differ
        if not equal:
            return False, False, f"case {number}: returned {_short(value)}, expected {_short(case.expected)}"
    if outcome.status != "ok":
        return False, False, f"case {len(outcome.values)}: {outcome.status} {outcome.raised}".rstrip()
    if len(outcome.values) != len(problem.cases) or not problem.cases:
        return False, False, f"{len(outcome.values)} of {len(problem.cases)} answers"
    return True, mismatch, ""


def _short(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # an int of thousands of digits
        return f"a {type(value).__name__} too long to print"
    return text if len(text) <= 60 else text[:57] + "..."


# --- a problem's own solution --------------------------------------------------------------------------------------


def failing(sandbox: Sandbox, problems: Sequence[Problem]) -> dict[str, str]:
    """Problems whose own solution is wrong by their own tests, by id, and what went wrong first.

    Nothing could pass such a problem. One without a solution is taken as it is.
    """
    checked = [p for p in problems if p.canonical.strip()]
    outcomes = sandbox.run([strict_job(p, p.canonical, CANONICAL_CPU_S) for p in checked])
    verdicts = {p.id: oracle(outcome, p) for p, outcome in zip(checked, outcomes, strict=True)}
    return {id: detail for id, (right, _, detail) in verdicts.items() if not right}


def cached_failing(
    path: Path, problems: Sequence[Problem], cache: Path, sandbox: Callable[[], AbstractContextManager[Sandbox]]
) -> dict[str, str]:
    """``failing`` for the problems of a file: kept by the file's content, the grader's and what it may import."""
    makers = (__file__, harness.__file__, job.__file__)
    parts = [platform.python_version(), *sorted(layers.offered()), *(Path(f).read_bytes() for f in (path, *makers))]
    name = hashlib.sha256(repr(parts).encode()).hexdigest()[:32]
    kept = cache / "canonical" / f"{name}.json"
    if kept.exists():
        try:
            return dict(json.loads(kept.read_text()))
        except (ValueError, TypeError):
            logger.warning("{} is damaged, and made anew", kept)
    with sandbox() as opened:
        found = failing(opened, problems)
    kept.parent.mkdir(parents=True, exist_ok=True)
    part = kept.with_name(f"{name}.{os.getpid()}.part")
    part.write_text(json.dumps(found))
    os.replace(part, kept)
    return found


def sound(
    path: Path, problems: Sequence[Problem], cache: Path, sandbox: Callable[[], AbstractContextManager[Sandbox]]
) -> list[Problem]:
    """The problems of a file that can be passed. The others are named in the log, and counted."""
    left_out = cached_failing(path, problems, cache, sandbox)
    if left_out:
        said = "".join(f"\n  {id}: {why}" for id, why in left_out.items())
        logger.warning(f"{path}: {len(left_out)} of {len(problems)} problems left out, their own solution fails:{said}")
    unproven = sum(not p.canonical.strip() for p in problems)
    if unproven:
        logger.warning(f"{path}: {unproven} problems have no solution of their own, so nobody knows whether one passes")
    return [p for p in problems if p.id not in left_out]
