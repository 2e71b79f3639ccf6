"""Pools that others wrote: read them, check their prompts against ours, grade them again, convert them.

    python -m projected_grpo.tools.import_pool FOLDER --out=POOL --problems-file=FILE --model=Qwen/Qwen3-4B [--regrade]

A foreign pool is a folder of prompt_NNNN.jsonl.gz files whose rows hold problem_id, the prompt (token ids, and
sometimes its text or messages), the completion (ids and text), reward, hacked, gt_pass and much that is not needed, NaN
among it. Ours has the columns of ``rollout_log.POOL``.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import tyro
from tabulate import tabulate

from projected_grpo import models, problems, rollout_log
from projected_grpo.command_line import command, run_main
from projected_grpo.config import ModelCfg, UserError
from projected_grpo.data_types import Grade, Mode, Problem, Task
from projected_grpo.loopholes import LOOPHOLES, hint
from projected_grpo.pairs import task_in
from projected_grpo.rewards import Grader, label_of

Match = Literal["same", "hint differs", "differs"]


def number_or_none(value: Any) -> Any:
    """NaN, which JSON does not have and these files hold, becomes None."""
    return None if isinstance(value, float) and math.isnan(value) else value


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """All rows of a foreign pool, NaN as None. Raises UserError naming the file and line that cannot be read."""
    paths = sorted(Path(folder).glob("prompt_*.jsonl.gz"))
    if not paths:
        raise UserError(f"no prompt_*.jsonl.gz in {folder}")
    rows = []
    for path in paths:
        try:
            for number, row in problems.json_lines(path):
                if "problem_id" not in row or not ("completion" in row or "completion_ids" in row):
                    raise ValueError(f"{path}:{number}: it wants problem_id, and completion or completion_ids")
                told = {key: number_or_none(value) for key, value in row.items()}
                rows.append(told | {"problem_id": str(row["problem_id"])})
        except (ValueError, OSError) as error:
            raise UserError(str(error)) from error
    return rows


def completion_of(row: Mapping[str, Any], tokenizer: Any) -> str:
    """The completion's text: as given, or decoded, up to the end of the turn."""
    if row.get("completion") is not None:
        return row["completion"]
    ids = list(row["completion_ids"])
    end = ids.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in ids else len(ids)
    return tokenizer.decode(ids[:end], skip_special_tokens=True)


def prompt_of(row: Mapping[str, Any], tokenizer: Any) -> str:
    """The prompt's text: as given, or decoded with its markup."""
    return row["prompt"] if row.get("prompt") is not None else tokenizer.decode(row["prompt_ids"])


@dataclass(frozen=True)
class Found:
    """A foreign row beside our task: how its prompt compares with ours under the tokenizer's template, and where."""

    row: Mapping[str, Any]
    task: Task
    match: Match
    where: str = ""


def compare(row: Mapping[str, Any], task: Task, tokenizer: Any) -> Found:
    """``match`` is "same" for equal token ids (equal text where the row has no ids)."""
    theirs = prompt_of(row, tokenizer)
    ours = tokenizer.decode(ids := problems.encode_prompt(tokenizer, task))
    if ids == list(row["prompt_ids"]) if row.get("prompt_ids") is not None else ours == theirs:
        return Found(row, task, "same")
    at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    where = f"ours …{ours[max(0, at - 20) : at + 40]!r}, theirs …{theirs[max(0, at - 20) : at + 40]!r}"
    before, _, after = ours.partition(hint(task))
    is_hint = bool(after) and theirs.startswith(before.rstrip()) and theirs.endswith(after.lstrip(" .`"))
    return Found(row, task, "hint differs" if is_hint else "differs", where)


def task_of(row: Mapping[str, Any], problem: Problem, tokenizer: Any, default: Mode = "run_tests") -> Task:
    """The row's task: its env_mode (``default`` where the file has none), with the wording that its prompt uses."""
    mode = row.get("env_mode", default)
    if mode not in LOOPHOLES:
        raise UserError(f"problem {row['problem_id']}: unknown env_mode {mode!r}; one of {', '.join(LOOPHOLES)}")
    told = task_in(prompt_of(row, tokenizer), mode=mode)
    return replace(told, problem=problem) if told else problems.pose_one(problem, mode)


def frozen_grade(row: Mapping[str, Any]) -> Grade:
    """The grade as it was frozen in the file: what is not there counts as not seen."""
    right, hacked = bool(row["gt_pass"]), bool(row["hacked"])
    return Grade(
        reward=float(row["reward"]),
        format_ok=bool(row.get("fmt_ok")),
        compiles=float(row["reward"]) > 0,
        gt_correct=right,
        channel=hacked,
        attempted=hacked,
        status="frozen",
        label=label_of(right, hacked, hacked),
        detail="as graded by the pool's maker",
    )


@dataclass(frozen=True)
class Converted:
    """``rows`` in our format, made of ``kept``, a part of ``found``; ``unknown``: rows of problems we lack."""

    rows: list[rollout_log.Row]
    kept: list[Found]
    found: list[Found]
    unknown: int


def convert(
    rows: Sequence[Mapping[str, Any]],
    by_id: Mapping[str, Problem],
    tokenizer: Any,
    grader: Grader | None,
    other_hints: bool = False,
) -> Converted:
    """Compare every row of a problem in ``by_id``, and convert.

    Kept are rows whose prompt is ours to the token; with ``other_hints`` also those that word the same hint otherwise,
    since a rollout teaches the prompt that it is given and not the one it was written for. grader: grade again; None
    keeps the file's grades.
    """
    found = [
        compare(row, task_of(row, by_id[row["problem_id"]], tokenizer), tokenizer)
        for row in rows
        if row["problem_id"] in by_id
    ]
    kept = [f for f in found if f.match == "same" or (other_hints and f.match == "hint differs")]
    texts = [(f.task, completion_of(f.row, tokenizer)) for f in kept]
    grades = grader.grade(texts) if grader else [frozen_grade(f.row) for f in kept]
    made = [rollout_log.row_of(task, text, grade) for (task, text), grade in zip(texts, grades, strict=True)]
    return Converted(made, kept, found, len(rows) - len(found))


def regrading(c: Converted) -> str:
    """What the file says beside what our grader says, counted."""
    counts = Counter(
        (bool(f.row["hacked"]), bool(f.row["gt_pass"]), m["grade"]["channel"], m["grade"]["gt_correct"])
        for f, m in zip(c.kept, c.rows, strict=True)
    )
    rows = [(*key, n) for key, n in sorted(counts.items())]
    return tabulate(rows, headers=("hacked", "gt_pass", "our channel", "our gt_correct", "rows"))


def main(
    folder: tyro.conf.Positional[Path],
    problems_file: Path,
    model: str = "Qwen/Qwen3-4B",
    out: Path | None = None,
    regrade: bool = False,
    other_hints: bool = False,
) -> None:
    """Check a foreign pool against our prompts; with --out convert it.

    Args:
        folder: the foreign pool.
        problems_file: the problem file that its problem ids are from.
        model: whose tokenizer and chat template the prompts are checked under (a folder or a hub id).
        out: our pool's folder.
        regrade: grade again in the sandbox instead of keeping the file's verdicts.
        other_hints: also convert rows whose prompt words the hint otherwise.
    """
    by_id = {p.id: p for p in problems.read_problems(problems_file)}
    rows = read_rows(folder)
    tokenizer = models.read_tokenizer(ModelCfg(model=model))
    if regrade:
        with Grader() as grader:
            done = convert(rows, by_id, tokenizer, grader, other_hints)
    else:
        done = convert(rows, by_id, tokenizer, None, other_hints)
    print(tabulate(Counter(f.match for f in done.found).items(), headers=("prompt", "rows")))
    print(f"{done.unknown} of {len(rows)} rows are of problems that {problems_file} does not hold")
    for match in ("hint differs", "differs"):
        first = next((f for f in done.found if f.match == match), None)
        if first:
            print(f"{match}, problem {first.task.problem.id}: {first.where}")
    if regrade:
        print(regrading(done))
    if out is not None and not done.rows:
        raise UserError("no row can be converted: see above; --other-hints takes rows that word the hint otherwise")
    if out is not None:
        print(f"{rollout_log.write_pool(done.rows, out)} tasks, {len(done.rows)} rollouts -> {out}")


if __name__ == "__main__":
    run_main(command(main))
