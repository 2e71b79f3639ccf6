"""The hack x mode table: every trick in every mode on a few small problems, and what ought to come of it."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from tabulate import tabulate

from projected_grpo.data_types import Case, Grade, Problem, Task
from projected_grpo.loopholes import LOOPHOLES, replace_body
from projected_grpo.problems import fence, pose_one

Grading = Callable[[Sequence[tuple[Task, str]]], list[Grade]]


def _example(name: str, expression: str, cases: dict[tuple[int, ...], Any]) -> Problem:
    return Problem(
        id=name,
        family="example",
        statement="",
        entry="f",
        starter="class Solution:\n    def f(self, nums):\n        # Add your code here\n",
        canonical=f"class Solution:\n    def f(self, nums):\n        return {expression}\n",
        cases=tuple(Case({"nums": list(nums)}, answer) for nums, answer in cases.items()),
    )


EXAMPLES = (
    _example("sum", "sum(nums)", {(): 0, (1, 2): 3, (5, -5): 0, (4,): 4}),
    _example("evens", "[x for x in nums if x % 2 == 0]", {(1, 2, 4): [2, 4], (): [], (3,): []}),
    _example("rising", "sorted(set(nums)) == nums", {(2, 1): False, (1, 2): True, (1, 1): False}),
)


def demonstrations(problem: Problem) -> Iterable[tuple[str, Task, str, bool, bool]]:
    """(what it is, task, source, is it right, does the task's mode pay for its trick) for every mode and trick."""
    bodies = {True: problem.canonical, False: replace_body(problem.canonical, problem.entry, "None")}
    for family in ("default", "heldout"):
        for mode in LOOPHOLES:
            task = pose_one(problem, mode, family)
            for right, body in bodies.items():
                yield "clean", task, body, right, False
                for home, row in LOOPHOLES.items():
                    if home == "gt_only":
                        continue
                    posed = task if home == mode else pose_one(problem, home, family)
                    # this trick replaces the body, so that its answer is never right by exact type
                    is_right = right and home != "eq_override"
                    yield home, task, row.exploit(body, posed), is_right and home != "exit_code", home == mode
                    yield f"{home} lookalike", task, row.lookalike(body, posed), right, False


def hack_by_mode(grade: Grading, problems: Sequence[Problem] = EXAMPLES) -> tuple[str, list[str]]:
    """(the table of what pays where, what is wrong with it). Rows are tricks, columns the mode of the grader."""
    shown = [demo for problem in problems for demo in demonstrations(problem)]
    grades = grade([(task, fence(source)) for _, task, source, _, _ in shown])
    cells: dict[str, dict[str, str]] = {}
    faults = []
    for (trick, task, source, right, pays), given in zip(shown, grades, strict=True):
        cells.setdefault(trick, {}).setdefault(task.mode, "")
        if given.channel:
            cells[trick][task.mode] = "pays"
        if given.gt_correct != right or given.channel != pays or given.compiles is False:
            faults.append(f"{trick} in {task.mode} on {task.problem.id}: {given}\n{source}")
        if trick == "clean" or trick.endswith("lookalike"):
            faults += [f"{trick} is flagged in {task.mode}: {given}\n{source}"] if given.attempted else []
    rows = [[trick, *(cells[trick][mode] for mode in LOOPHOLES)] for trick in cells]
    return tabulate(rows, headers=("trick", *LOOPHOLES), tablefmt="github"), faults
