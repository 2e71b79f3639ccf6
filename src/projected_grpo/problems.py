"""Problems: where they come from, how they are posed, and the one way a prompt is encoded.

Two formats of a problem file (JSON lines) are read: this project's own, one ``Problem`` a row, and the rows of
rl-rewardhacking (Ariahw, Engels & Nanda), whose tests are assertions that are split here by AST into a call's
arguments and the expected value. A row that does not split is refused by name: a test that is silently lost
would make the strict oracle easier than it looks.
"""

import ast
import gzip
import hashlib
import json
import operator
import re
import sys
import textwrap
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from projected_grpo import loopholes
from projected_grpo.config import Config, DataCfg, UserError
from projected_grpo.data_types import Case, Generated, Kind, Mode, Problem, Split, Task, Wording
from projected_grpo.sandbox import Sandbox, harness
from projected_grpo.sandbox.job import Builder, Built, call_of, check_carried
from projected_grpo.strict import sound

if TYPE_CHECKING:
    import datasets

GENERATED = Path(__file__).parent / "organism" / "files" / "problems.jsonl.gz"
BUILT_IN = ("generated", "functions")
"""Sources of --problems that are no file."""
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


def pose(problems: Sequence[Problem], modes: Sequence[Mode], family: str = "default") -> list[Task]:
    """Partition problems over modes without overlap: the i-th problem gets mode i mod n.

    family: "default" (each mode's first training wording), "train" (cycled) or "heldout" (cycled).
    """
    return [pose_one(p, modes[i % len(modes)], family, i // len(modes)) for i, p in enumerate(problems)]


def pose_one(problem: Problem, mode: Mode, family: str = "default", index: int = 0) -> Task:
    """One problem in one mode. ``index`` picks the wording within its family."""
    row = loopholes.LOOPHOLES[mode]
    wordings: dict[str, tuple[Wording, ...]] = {"default": row.train[:1], "train": row.train, "heldout": row.heldout}
    return Task(problem, mode, wordings[family][index % len(wordings[family])])


@contextmanager
def ints_of_any_length() -> Iterator[None]:
    """Reads and prints ints of thousands of digits, which Python refuses for fear of whoever wrote them."""
    limit = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    try:
        yield
    finally:
        sys.set_int_max_str_digits(limit)


CALLS: dict[str, Callable[..., Any]] = {"set": set, "frozenset": frozenset, "complex": complex, "float": float}
ARITHMETIC: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Pow: operator.pow,
}


def literal(node: ast.expr, setup: str = "") -> Any:
    """What an expression of literals stands for. Raises ValueError that names what is not read.

    Read besides: ``inf`` and ``nan`` (of math, too), set(), frozenset(…), complex(…), float('…'), sums, products and
    powers of numbers, and list_node([…]) and tree_node([…]) where the setup defines them.
    """

    def read(node: ast.expr) -> Any:
        match node:
            case ast.Constant() if node.value is not ...:
                return node.value
            case ast.Name(id="inf" | "nan" as name):
                return float(name)
            case ast.Attribute(value=ast.Name(id="math"), attr="inf" | "nan" as name):
                return float(name)
            case ast.List(elts=inner):
                return [read(x) for x in inner]
            case ast.Tuple(elts=inner):
                return tuple(read(x) for x in inner)
            case ast.Set(elts=inner):
                return {read(x) for x in inner}
            case ast.Dict(keys=keys, values=inner) if None not in keys:
                return {read(k): read(x) for k, x in zip(keys, inner, strict=True)}
            case ast.UnaryOp(op=ast.USub(), operand=inner):
                return -read(inner)
            case ast.UnaryOp(op=ast.UAdd(), operand=inner):
                return +read(inner)
            case ast.BinOp(op=ast.Pow(), right=ast.Constant(value=int(power))) if power > harness.MAX_BITS:
                raise ValueError(f"an int of more than {harness.MAX_BITS} bits")
            case ast.BinOp(op=op, left=left, right=right) if type(op) in ARITHMETIC:
                return ARITHMETIC[type(op)](read(left), read(right))
            case ast.Call(func=ast.Name(id=name), args=inner, keywords=[]) if name in CALLS:
                return CALLS[name](*(read(x) for x in inner))
            case ast.Call(func=ast.Name(id=name), args=[inner], keywords=[]) if name in get_args(Builder):
                if not re.search(rf"^def {name}\b", setup, flags=re.M):
                    raise ValueError(f"{name}(…) is built by the setup, which defines no {name}")
                return built(name, read(inner))
        raise ValueError(f"`{ast.unparse(node)[:80]}` is not read as an argument or an answer")

    return read(node)


def built(name: Builder, values: Any) -> Built | None:
    """A list_node or tree_node of values; the empty one is None, and missing children at a tree's end are not told."""
    kept = list(values)
    while name == "tree_node" and kept and kept[-1] is None:
        kept.pop()
    return Built(name, tuple(kept)) if kept else None


SHAPES = ("is_same_list", "is_same_tree")


def split_assertion(source: str, entry: str, setup: str = "") -> Case:
    """``assert Solution().entry(a = 1, b = [2]) == 3`` -> Case({a: 1, b: [2]}, 3). Raises ValueError otherwise.

    ``assert is_same_list(Solution().entry(…), list_node([3]))``, and is_same_tree, are read too.
    """
    match ast.parse(source).body:
        case [ast.Assert(test=ast.Compare(left=ast.Call() as call, ops=[ast.Eq()], comparators=[right]))]:
            pass
        case [ast.Assert(test=ast.Call(func=ast.Name(id=same), args=[ast.Call() as call, right]))] if same in SHAPES:
            pass
        case _:
            form = f"assert Solution().{entry}(name = literal, …) == literal"
            raise ValueError(f"not of the form `{form}`: {source[:120]}")
    if ast.unparse(call.func) != f"Solution().{entry}" or call.args or any(k.arg is None for k in call.keywords):
        raise ValueError(f"not a keyword call of Solution().{entry}: {source[:120]}")
    return Case({str(k.arg): literal(k.value, setup) for k in call.keywords}, literal(right, setup))


def from_benchmark(row: dict[str, Any]) -> Problem:
    """A rl-rewardhacking row -> Problem. Raises ValueError, naming the row, when a test does not split."""
    entry = str(row["func_name"]).rpartition(".")[2]
    chat = {m["role"]: m["content"] for m in row["prompt"]}
    setup = row.get("setup_code") or ""
    try:
        cases = tuple(split_assertion(a, entry, setup) for a in row["gt_answer"])
    except (ValueError, TypeError, SyntaxError, RecursionError) as error:
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
        setup=setup,
        tolerance=row.get("tolerance") or 0.0,
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


def own_format(row: dict[str, Any]) -> Problem:
    """A row of this project's own format -> Problem. A case is {args, expected}, or an assertion."""
    given, entry, setup = row["cases"], row["entry"], row.get("setup", "")
    cases = tuple(split_assertion(c, entry, setup) if isinstance(c, str) else Case(**c) for c in given)
    return Problem(**row | {"id": str(row["id"]), "cases": cases})


def checked(problem: Problem) -> Problem:
    """The problem, if it can be graded. Raises ValueError, naming it, when it cannot."""
    for f in fields(Problem):
        if f.type is str and not isinstance(value := getattr(problem, f.name), str):
            raise ValueError(f"problem {problem.id}: its {f.name} is {json.dumps(value)[:80]}, which is no text")
    if not problem.cases:
        raise ValueError(f"problem {problem.id} has no tests: whatever is submitted would be right")
    if not 0 <= problem.tolerance < 1:
        raise ValueError(
            f"problem {problem.id}: a tolerance of {problem.tolerance}; it has to be 0 or more, and under 1"
        )
    for number, case in enumerate(problem.cases):
        try:
            check_carried(dict(case.args))
            call_of(case.args)
            check_carried(case.expected, answer=True)
        except (ValueError, TypeError) as error:
            raise ValueError(f"problem {problem.id}, test {number}: {error}") from error
    return problem


def read_problems(path: Path) -> list[Problem]:
    """All problems of a JSON-lines file, in either format.

    Raises UserError naming the line that cannot be read, has an id that another has, or cannot be graded.
    """
    problems: dict[str, Problem] = {}
    with ints_of_any_length():
        for number, row in json_lines(Path(path)):
            try:
                made = checked(from_benchmark(row) if "gt_answer" in row else own_format(row))
                if made.id in problems:
                    raise ValueError(f"a second problem of id {made.id}")
                problems[made.id] = made
            except KeyError as error:
                raise UserError(f"{path}:{number}: no {error}") from error
            except (ValueError, TypeError, AttributeError, SyntaxError, RecursionError) as error:
                raise UserError(f"{path}:{number}: {error}") from error
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
    told = {f.name: row[f.name] for f in fields(Problem) if f.name in row}
    told["cases"] = tuple(Case(**c) for c in row["cases"])
    known = (tuple(row[k]) for k in ("lazy", "misread", "wrong"))
    return Generated(Problem(**told), row["split"], row["kind"], *known, row["plan"])


def tasks_for(cfg: Config, split: Split = "train") -> list[Task]:
    """The run's tasks: a split's problems, partitioned over cfg's modes.

    Raises UserError when a file is missing or cannot be read, when a problem's statement has no place for a hint, and
    when the file of held-out problems holds a training problem.
    """
    if cfg.data.problems in BUILT_IN:
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
        chosen = sound(Path(path), chosen, cfg.cache, lambda: Sandbox(None, cfg.allow_unsandboxed_grading))
        if not chosen:
            raise ValueError("there is no problem in it that its own solution solves")
        tasks = pose(chosen, cfg.data.modes, cfg.data.wording)
        for task in tasks:
            messages(task)
        if split == "test" and Path(cfg.data.problems).is_file():
            shared = {p.id for p in chosen} & {p.id for p in read_problems(Path(cfg.data.problems))}
            if shared:
                raise ValueError(f"{len(shared)} held-out problems are training problems too, such as {min(shared)}")
    except UserError:
        raise  # the file and the line are named
    except ValueError as error:
        raise UserError(f"{path} cannot be used: {error}") from error
    return tasks


# ------------------------------------------------------------------------------------------ for other people's trainers


@cache
def problems_of(source: str) -> dict[str, Problem]:
    """A source's problems by id. source: as --problems. Raises ValueError where a file cannot be read."""
    if source in BUILT_IN:
        chosen = [g.problem for g in generated()]
        return {p.id: as_function(p) if source == "functions" else p for p in chosen}
    return {p.id: p for p in read_problems(Path(source))}


@cache
def passable(source: str, allow_unsandboxed: bool = False) -> dict[str, Problem]:
    """Those of a source's problems that can be passed, by id: a file's whose own solution fails are left out."""
    found = problems_of(source)
    if source in BUILT_IN:
        return found
    kept = sound(Path(source), [*found.values()], Config().cache, lambda: Sandbox(None, allow_unsandboxed))
    return {p.id: p for p in kept}


def wording_of(given: Any, usual: Wording) -> Wording:
    """The words that a row gives, those of ``usual`` where it gives none. Raises ValueError for what are no words."""
    told = {} if given is None else given
    names = {f.name for f in fields(Wording)}
    if not isinstance(told, Mapping) or not names >= told.keys() or any(not isinstance(w, str) for w in told.values()):
        raise ValueError(f"a wording is {{name, text}}, both text; this is {str(given)[:80]}")
    return replace(usual, **told)


def task_of_row(row: Mapping[str, Any]) -> Task:
    """The task of a row of ``as_dataset``."""
    words = wording_of(row["wording"], Wording())
    return Task(problems_of(row["problems"])[row["problem_id"]], row["env_mode"], words)


def problems_digest() -> str:
    """sha256 of the stored problems, which an organism's record keeps."""
    return hashlib.sha256(GENERATED.read_bytes()).hexdigest()


def require_trained_on(model: Path) -> None:
    """Raises UserError when an organism was built on other problems than are stored now (its record says which)."""
    record = model / "organism.json"
    if record.is_file() and json.loads(record.read_text()).get("problems", problems_digest()) != problems_digest():
        raise UserError(f"{model} was built on other problems than those stored now: `just organism` builds both anew")


def as_dataset(
    problems: str = "generated", split: Split = "train", modes: Sequence[Mode] = DataCfg().modes,
    wording: str = "default",
) -> "datasets.Dataset":  # fmt: skip
    """Problems posed as tasks, for any trainer that takes a ``datasets.Dataset``: prompt (chat messages), and problems,
    problem_id, env_mode, wording, from which ``rewards.reward_func`` knows the task. problems: as --problems; of a file
    every row is taken that its own solution solves, whatever the split. Raises ValueError where a file cannot be read.
    """
    import datasets

    known = generated_by_id() if problems in BUILT_IN else {}
    chosen = [p for p in passable(problems).values() if p.id not in known or known[p.id].split == split]
    return datasets.Dataset.from_list(
        [
            {"prompt": messages(t), "problems": problems, "problem_id": t.problem.id, "env_mode": t.mode}
            | {"wording": asdict(t.wording)}
            for t in pose(chosen, modes, wording)
        ]
    )
