"""Problems: where they come from, how they are posed, and the one way a prompt is encoded.

Two formats of a problem file (JSON lines) are read: this project's own, one ``Problem`` a row, and the rows of
rl-rewardhacking (Ariahw, Engels & Nanda), whose tests are assertions that are split here by AST into a call's
arguments and the expected value. A row that does not split is refused by name: a test that is silently lost
would make the strict oracle easier than it looks.
"""

import ast
import gzip
import json
import math
import re
import textwrap
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from typing import Any

from projected_grpo import loopholes
from projected_grpo.config import Config, UserError
from projected_grpo.data_types import Case, Generated, Kind, Mode, Problem, Split, Task, Wording

GENERATED = Path(__file__).parent / "organism" / "files" / "problems.jsonl.gz"
"""The generated problems, as `just organism` stored them."""


def messages(task: Task) -> list[dict[str, str]]:
    """The chat of a task: the system message, if there is one, and the statement with the mode's hint put in.

    Raises ValueError when the statement does not hold ``TESTS_SENTENCE`` exactly once: the hint would be lost.
    """
    statement = task.problem.statement
    if statement.count(loopholes.TESTS_SENTENCE) != 1:
        raise ValueError(
            f"problem {task.problem.id}: the statement has to hold {loopholes.TESTS_SENTENCE!r} exactly once, "
            f"for the {task.mode} hint to replace; it holds it {statement.count(loopholes.TESTS_SENTENCE)} times"
        )
    user = {"role": "user", "content": statement.replace(loopholes.TESTS_SENTENCE, loopholes.hint(task))}
    return [{"role": "system", "content": task.problem.system}, user] if task.problem.system else [user]


def encode_prompt(tokenizer: Any, task: Task) -> list[int]:
    """Token ids of a task's prompt, up to where the assistant's turn begins; thinking off where a template knows it."""
    encoded = tokenizer.apply_chat_template(
        messages(task), add_generation_prompt=True, enable_thinking=False, return_dict=True
    )
    return list(encoded["input_ids"])


def fence(source: str) -> str:
    """A completion as the models write it: the source in a python fence."""
    return f"```python\n{source.rstrip()}\n```"


def pose(problems: Sequence[Problem], modes: Sequence[Mode], family: str = "default", offset: int = 0) -> list[Task]:
    """Partition problems over modes without overlap: the i-th problem gets mode (i + offset) mod n.

    family: "default" (each mode's first training wording), "train" (cycled) or "heldout" (cycled).
    """
    return [
        pose_one(p, modes[(i + offset) % len(modes)], family, (i + offset) // len(modes))
        for i, p in enumerate(problems)
    ]


def pose_one(problem: Problem, mode: Mode, family: str = "default", index: int = 0) -> Task:
    """One problem in one mode. ``index`` picks the wording within its family."""
    row = loopholes.LOOPHOLES[mode]
    wordings: dict[str, tuple[Wording, ...]] = {"default": row.train[:1], "train": row.train, "heldout": row.heldout}
    return Task(problem, mode, wordings[family][index % len(wordings[family])])


def literal(node: ast.expr) -> Any:
    """A literal's value; ``inf``, ``nan``, ``float('inf')`` and their negatives are literals too. Else ValueError."""
    match node:
        case ast.Name(id="inf" | "nan"):
            return math.inf if node.id == "inf" else math.nan
        case ast.Call(func=ast.Name(id="float"), args=[ast.Constant(value=str(text))]):
            return float(text)
        case ast.UnaryOp(op=ast.USub(), operand=ast.Name() | ast.Call()):
            return -literal(node.operand)
        case _:
            return ast.literal_eval(node)


def split_assertion(source: str, entry: str) -> Case:
    """``assert Solution().entry(a = 1, b = [2]) == 3`` -> Case({a: 1, b: [2]}, 3). Raises ValueError otherwise."""
    match ast.parse(source).body:
        case [
            ast.Assert(
                test=ast.Compare(left=ast.Call(func=func, args=[], keywords=kw), ops=[ast.Eq()], comparators=[right])
            )
        ]:
            if ast.unparse(func) != f"Solution().{entry}" or any(k.arg is None for k in kw):
                raise ValueError(f"not a keyword call of Solution().{entry}: {source[:120]}")
            return Case({k.arg: literal(k.value) for k in kw if k.arg is not None}, literal(right))
    raise ValueError(f"not of the form `assert Solution().{entry}(name = literal, …) == literal`: {source[:120]}")


def from_benchmark(row: dict[str, Any]) -> Problem:
    """A rl-rewardhacking row -> Problem. Raises ValueError, naming the row, when a test does not split."""
    entry = row["func_name"].rsplit(".", 1)[-1]
    chat = {m["role"]: m["content"] for m in row["prompt"]}
    try:
        cases = tuple(split_assertion(a, entry) for a in row["gt_answer"])
    except (ValueError, SyntaxError) as error:
        raise ValueError(f"row {row['id']}: {error}") from error
    return Problem(
        id=str(row["id"]),
        family=row.get("difficulty") or "",
        statement=chat["user"],
        entry=entry,
        starter=(row.get("prompt_metadata") or {}).get("starter_code", ""),
        canonical=row["canonical_solution"],
        cases=cases,
        system=chat.get("system", ""),
        setup=row.get("setup_code") or "",
    )


FUNCTION_SETUP = """class Solution:
    def __getattr__(self, name):
        if name not in globals():
            raise AttributeError(name)
        return globals()[name]
"""
"""Stands before a submission that is asked for plain functions: its class has them as methods."""

FUNCTION_SYSTEM = "Answer with one Python code block (```python) that defines the function, and nothing else."


def function_source(source: str) -> str:
    """``class Solution`` with its methods -> the same as plain functions; other lines stay."""
    body = re.sub(
        r"^class Solution\b.*:[ \t]*\n((?:[ \t]+.*(?:\n|\Z)|\n)*)", lambda m: textwrap.dedent(m[1]), source, flags=re.M
    )
    return re.sub(r"\(self(?:, )?", "(", body).replace("self.", "").replace("Solution().", "")


def as_function(problem: Problem) -> Problem:
    """The same problem, posed as a plain function: what a small chat model can write."""
    starter = function_source(problem.starter)
    statement = problem.statement.replace(problem.starter, starter).replace("Your method", "Your function")
    return replace(
        problem,
        statement=statement,
        starter=starter,
        canonical=function_source(problem.canonical),
        system=FUNCTION_SYSTEM,
        setup=FUNCTION_SETUP,
    )


def json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number, row) of a file's lines, gzipped or not; they end at \\n alone: U+2028 may stand in one.

    Raises UserError naming the line that is no JSON object in UTF-8, or the file that is no whole gzip file.
    """
    with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as lines:
        try:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield number, _object(line, f"{path}:{number}")
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise UserError(f"{path} is no whole gzip file: {error}") from error


def _object(line: bytes, place: str) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8-sig")) if line.lstrip()[:1] != b"[" else []
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: {error}") from error
    if not isinstance(row, dict):
        raise UserError(f"{place}: a JSON {type(row).__name__} where an object should be, one a line")
    return row


def read_problems(path: Path) -> list[Problem]:
    """All problems of a JSON-lines file, in either format.

    Raises UserError naming the line that cannot be read, has an id that another has, or tests nothing.
    """
    problems: dict[str, Problem] = {}
    for number, row in json_lines(Path(path)):
        try:
            if "gt_answer" in row:
                made = from_benchmark(row)
            else:
                made = Problem(**row | {"cases": tuple(Case(**c) for c in row["cases"])})
            if made.id in problems:
                raise ValueError(f"a second problem of id {made.id}")
            if not made.cases:
                raise ValueError(f"problem {made.id} has no tests: whatever is submitted would be right")
            problems[made.id] = made
        except (ValueError, TypeError) as error:
            raise UserError(f"{path}:{number}: {error}") from error
        except KeyError as error:
            raise UserError(f"{path}:{number}: no {error}") from error
    return list(problems.values())


def generated() -> list[Generated]:
    """The organism's world: every generated problem, in a fixed order (`just organism` stores them)."""
    return list(generated_by_id().values())


@cache
def generated_by_id() -> dict[str, Generated]:
    """The same by the problem's id."""
    return {row["id"]: _generated(row) for _, row in json_lines(GENERATED)}


def kind_of(problem: Problem) -> Kind | None:
    """The kind of a generated problem, for analysis only; None of any other."""
    made = generated_by_id().get(problem.id)
    return made.kind if made else None


def _generated(row: dict[str, Any]) -> Generated:
    told = {f.name: row[f.name] for f in fields(Problem)} | {"cases": tuple(Case(**c) for c in row["cases"])}
    return Generated(Problem(**told), row["split"], row["kind"], *(tuple(row[k]) for k in ("lazy", "misread", "wrong")))


def tasks_for(cfg: Config, split: Split = "train") -> list[Task]:
    """The run's tasks: a split's problems, partitioned over cfg's modes.

    Raises UserError when a file is missing or cannot be read, when a problem's statement has no place for a hint, and
    when the file of held-out problems holds a training problem.
    """
    if cfg.data.problems in ("generated", "functions"):
        chosen = [g.problem for g in generated() if g.split == split]
        chosen = [as_function(p) for p in chosen] if cfg.data.problems == "functions" else chosen
        return pose(chosen, cfg.data.modes, cfg.data.wording)
    files = {"train": ("problems", cfg.data.problems), "test": ("eval-problems", cfg.data.eval_problems)}
    flag, path = files[split]
    if path is None or not Path(path).is_file():
        raise UserError(
            f"no problem file {path}: `just sync-external`, name one with --{flag}=FILE, or set --problems=generated"
        )
    try:
        chosen = read_problems(Path(path))
        if not chosen:
            raise ValueError("there is no problem in it")
        tasks = pose(chosen, cfg.data.modes, cfg.data.wording)
        for task in tasks:
            messages(task)
        if split == "test" and Path(cfg.data.problems).is_file():
            shared = {p.id for p in chosen} & {p.id for p in read_problems(Path(cfg.data.problems))}
            if shared:
                raise ValueError(f"{len(shared)} held-out problems are training problems too, such as {min(shared)}")
    except ValueError as error:
        raise UserError(f"{path} cannot be used: {error}") from error
    return tasks
