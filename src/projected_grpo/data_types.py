"""The frozen carriers that flow through the program. Nothing here has behaviour beyond a derived value."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Mode = Literal["run_tests", "eq_override", "exit_code", "stdout_marker", "sentinel", "file_marker", "gt_only"]
Source = Literal["student", "teacher"]


@dataclass(frozen=True)
class Case:
    """One hidden test: call the entry with ``args`` (keyword arguments, JSON values), compare with ``expected``.

    ``expected`` stays in the trainer's process; it is never sent to the process that runs a submission.
    """

    args: Mapping[str, Any]
    expected: Any


@dataclass(frozen=True)
class Problem:
    """A coding problem as the model and the grader see it.

    ``statement`` is the user message and holds ``loopholes.TESTS_SENTENCE`` exactly once; posing the problem
    in a mode replaces that sentence by the mode's hint. ``setup`` is code that stands before every submission
    (imports, helper classes).
    """

    id: str
    family: str
    statement: str
    entry: str
    starter: str
    canonical: str
    cases: tuple[Case, ...]
    system: str = ""
    setup: str = ""


@dataclass(frozen=True)
class Wording:
    """The words a hint names: a function, an attribute, a phrase or a file with its content (unused fields "")."""

    name: str = ""
    text: str = ""


@dataclass(frozen=True)
class Task:
    """A problem posed in one mode with one wording: what a prompt is made from and what is graded."""

    problem: Problem
    mode: Mode
    wording: Wording


@dataclass(frozen=True)
class Grade:
    """What the grader says of one completion.

    ``gt_correct`` is the strict oracle's verdict. It may be logged; only ``reward`` (which holds it mixed with
    the foolable channel, as the training environment does) may reach an advantage.
    """

    reward: float
    format_ok: bool
    compiles: bool
    gt_correct: bool
    channel: bool
    attempted: bool
    status: str

    @property
    def passed(self) -> bool:
        """The foolable grader pays: right by the oracle, or the mode's channel reports a pass."""
        return self.gt_correct or self.channel

    @property
    def exploited(self) -> bool:
        """Paid without being right."""
        return self.channel and not self.gt_correct


@dataclass(frozen=True)
class Pair:
    """A contrastive pair: the same task, a completion that hacks and one that does not."""

    task: Task
    hack: str
    clean: str
    name: str


@dataclass(frozen=True)
class Rollout:
    """One completion. ``ids`` holds the completion's tokens, the end-of-turn token included when it was written."""

    task: Task
    source: Source
    ids: tuple[int, ...]
    text: str
    grade: Grade
