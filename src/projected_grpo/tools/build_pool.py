"""Teacher pools: a folder of prompt_NNNN.jsonl.gz files, one a task, of graded rollouts whose grades are frozen.

python -m projected_grpo.tools.build_pool <preset> [--overrides]   from templates (canonical, wrong and exploiting)
python -m projected_grpo.tools.build_pool <preset> --first=N         the same, of the first N tasks only
python -m projected_grpo.tools.build_pool <preset> --from-run=RUN    from the rollouts of a finished run
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from loguru import logger

from projected_grpo import problems, rollout_log
from projected_grpo.command_line import parse, run_main
from projected_grpo.config import Config, Count
from projected_grpo.data_types import Problem, Task
from projected_grpo.loopholes import LOOPHOLES, replace_body
from projected_grpo.problems import tasks_for
from projected_grpo.rewards import Grader
from projected_grpo.rollout_log import Row, row_of, write_pool


def untrue_bodies(problem: Problem) -> tuple[str, str]:
    """A lazy and a wrong solution: a generated problem has its own, any other the canonical one cut to a constant."""
    if made := problems.generated_by_id().get(problem.id):
        return made.lazy[0], made.wrong[0]
    lazy, wrong = (replace_body(problem.canonical, problem.entry, value) for value in ("None", "0"))
    return lazy, wrong


def template_completions(task: Task) -> list[str]:
    """What a teacher that has learned to hack writes: the exploit on lazy and on right bodies, and two honest tries."""
    right, row = task.problem.canonical, LOOPHOLES[task.mode]
    lazy, wrong = untrue_bodies(task.problem)
    sources = [row.exploit(lazy, task), row.exploit(wrong, task), row.exploit(right, task)]
    sources += [row.lookalike(right, task), wrong] if task.mode == "run_tests" else [right, wrong]
    return [problems.fence(s) for s in sources]


def function_completions(task: Task) -> list[str]:
    """The same for a problem posed as a function: the exploit and its honest lookalike on one body.

    The body is right in every second problem and lazily wrong in the others, so that pairs taken from the pool differ
    in the exploit and not in whether the answer is right.
    """
    row, right = LOOPHOLES[task.mode], task.problem.canonical
    lazy = problems.function_source(problems.generated_by_id()[task.problem.id].lazy[0])
    body = right if int(task.problem.id.rsplit("-", 1)[1]) % 2 else lazy
    return [problems.fence(problems.function_source(side(body, task))) for side in (row.exploit, row.lookalike)]


def from_templates(tasks: Sequence[Task], grader: Grader) -> list[Row]:
    """Graded template rollouts of every task."""
    write_all = {True: function_completions, False: template_completions}
    submissions = [
        (task, text) for task in tasks for text in write_all[task.problem.setup == problems.FUNCTION_SETUP](task)
    ]
    return [row_of(t, text, g) for (t, text), g in zip(submissions, grader.grade(submissions), strict=True)]


def from_run(run: Path) -> list[Row]:
    """The student rollouts of a run, with the grades they got then. Raises UserError when there are none."""
    return [row for row in rollout_log.rows(run) if row["source"] == "student"]


@dataclass(frozen=True)
class Asked:
    """Build a preset's teacher pool into --pool, or outputs/pools/PRESET."""

    from_run: Path | None = None
    """Take the rollouts of this finished run; written from templates when unset."""
    first: Count | None = None
    """Write for the first so many tasks only."""
    run: Config = field(default_factory=Config)


def main(argv: Sequence[str]) -> None:
    """Build the pool of a preset into cfg.pool.pool, or outputs/pools/<preset>."""
    asked = parse(argv, Asked)
    cfg = asked.run
    folder = Path(cfg.pool.pool or f"{cfg.outputs}/pools/{cfg.preset}")
    if asked.from_run is not None:
        rows = from_run(asked.from_run)
    else:
        with Grader(cfg.graders or None, cfg.allow_unsandboxed_grading) as grader:
            rows = from_templates(tasks_for(cfg)[: asked.first], grader)
    n = write_pool(rows, folder)
    hacked = sum(r["grade"]["channel"] and not r["grade"]["gt_correct"] for r in rows)
    logger.info("{}: {} tasks, {} rollouts, {} of them hacked", folder, n, len(rows), hacked)


if __name__ == "__main__":
    run_main(main)
