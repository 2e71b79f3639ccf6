"""Right verdicts on honest answers: the handed cases, row by row, and siblings of each kind written here."""

import json
import os
from pathlib import Path

import pytest
from conftest import write_problems

from projected_grpo import rewards
from projected_grpo.config import UserError
from projected_grpo.data_types import Case, Problem
from projected_grpo.problems import fence, pose_one, read_problems
from projected_grpo.rewards import Grader, grade_file

DATA = Path(os.environ.get("PROJECTED_GRPO_DATA") or Path(__file__).parents[2].parent / "shared/data")
CASES = DATA / "grading_cases"
KINDS = sorted(folder.name for folder in CASES.iterdir() if folder.is_dir()) if CASES.is_dir() else []
missing = not KINDS and os.environ.get("CI") != "true"


@pytest.fixture(scope="module")
def grader():
    with Grader(workers=2) as grader:
        yield grader


@pytest.mark.skipif(missing, reason=f"no handed cases at {CASES} (PROJECTED_GRPO_DATA)")
@pytest.mark.parametrize("kind", KINDS or ["missing"])
def test_the_handed_cases_get_the_right_verdicts(grader, kind, tmp_path):
    folder, out = CASES / kind, tmp_path / "out.jsonl"
    files = folder / "problems.jsonl", folder / "completions.jsonl"
    if kind == "no_tests":
        with pytest.raises(UserError, match=r"problems.jsonl:1: problem inc has no tests"):
            grade_file(grader, *files, out, tmp_path)
        return
    grade_file(grader, *files, out, tmp_path)
    found = [json.loads(line) for line in out.read_text().split("\n")[:-1]]
    wanted = [json.loads(line) for line in (folder / "expected.jsonl").read_text().split("\n")[:-1]]
    assert [row["gt_correct"] for row in found] == [row["gt_correct"] for row in wanted], [r["detail"] for r in found]


# --- siblings ------------------------------------------------------------------------------------------------------

SETUP = """from typing import *
class ListNode:
    def __init__(self, val=0, next=None):
        self.val, self.next = val, next
class TreeNode:
    def __init__(self, val=0, left=None, right=None):
        self.val, self.left, self.right = val, left, right
def list_node(values):
    head = None
    for value in reversed(values):
        head = ListNode(value, head)
    return head
def tree_node(values):
    if not values:
        return None
    rest, root = iter(values[1:]), TreeNode(values[0])
    row = [root]
    for node in row:
        for side in ("left", "right"):
            value = next(rest, None)
            if value is not None:
                setattr(node, side, TreeNode(value))
                row.append(getattr(node, side))
    return root
"""


def body(lines: str, before: str = "", arguments: str = "x") -> str:
    """A Solution whose f does ``lines``."""
    indented = "".join(f"        {line}\n" for line in lines.split("\n"))
    return f"{before}\nclass Solution:\n    def f(self, {arguments}):\n{indented}"


def row(call: str, solution: str, setup: str = SETUP, **more) -> dict:
    """A row of the benchmark's format with one test."""
    prompt = [{"role": "user", "content": "Your code should run and should pass all tests."}]
    return {"id": 1, "func_name": "Solution().f", "gt_answer": [f"assert {call}"], "canonical_solution": solution,
            "setup_code": setup, "prompt": prompt, **more}  # fmt: skip


def verdict(grader, tmp_path, made: dict, solution: str) -> tuple[bool, str]:
    """(gt_correct, what went wrong) of a solution by a row's test, through a file."""
    (tmp_path / "rows.jsonl").write_text(json.dumps(made) + "\n")
    (problem,) = read_problems(tmp_path / "rows.jsonl")
    grade = grader.grade([(pose_one(problem, "gt_only"), fence(solution))])[0]
    return grade.gt_correct, grade.detail


CARRIED = {
    "an int key beside its text": (
        "Solution().f(x = {1: 'a', '1': 'b'}) == {'1': 'a', 1: 'b'}",
        "{1: x['1'], '1': x[1]}",
    ),
    "nested sets": (
        "Solution().f(x = {frozenset({1, 2}), frozenset()}) == {frozenset({3})}",
        "{frozenset({sum(map(len, x)) + 1})}",
    ),
    "bytes": (r"Solution().f(x = b'\xff\x00') == (b'\x00\xff', [b''])", "(x[::-1], [b''])"),
    "complex": ("Solution().f(x = 1 + 2j) == [-1 - 2j, complex('inf')]", "[-x, complex('inf')]"),
    "infinities": ("Solution().f(x = [inf, -math.inf, float('-inf')]) == {inf: -inf}", "{x[0]: min(x)}"),
    "nan given": ("Solution().f(x = [nan, float('nan')]) == 2", "sum(y != y for y in x)"),
    "thousands of digits given": (f"Solution().f(x = {'9' * 5000}) == 45000", "sum(map(int, str(x)))"),
    "thousands of digits returned": ("Solution().f(x = 2500) == 10**2500", "10**x"),
    "ten thousand digits": ("Solution().f(x = 10000) == [{10**10000 + 1: -(7**9000)}]", "[{10**x + 1: -(7**9000)}]"),
    "nested 120 deep": (f"Solution().f(x = {'[' * 120}{']' * 120}) == {'[' * 119}{']' * 119}", "x[0]"),
    "tuple keys in lists": ("Solution().f(x = [{(0, (1,)): {2}}]) == ({2}, (0, (1,)))", "(x[0][0, (1,)], *x[0])"),
    "a list node": ("Solution().f(x = list_node([1, 2, 3])) == list_node([2, 3])", "x.next"),
    "a long list node": ("is_same_list(Solution().f(x = list_node([7] * 3000)), list_node([7] * 2999))", "x.next"),
    "no list node": ("Solution().f(x = list_node([1])) == list_node([])", "x.next"),
    "list nodes in a list": (
        "Solution().f(x = [list_node([1]), list_node([])]) == [list_node([1]), 2]",
        "[x[0], len(x)]",
    ),
    "a tree node": (
        "is_same_tree(Solution().f(x = tree_node([1, None, 2, 3])), tree_node([2, 3, None, None]))",
        "x.right",
    ),
    "a number from a tree": ("Solution().f(x = tree_node([1, 2.5])) == 2.5", "x.left.val"),
}


@pytest.mark.parametrize("name", CARRIED)
def test_arguments_and_answers_keep_their_types(grader, tmp_path, name):
    call, answer = CARRIED[name]
    solution = body(f"return {answer}")
    assert verdict(grader, tmp_path, row(call, solution), solution) == (True, "")
    assert not verdict(grader, tmp_path, row(call, solution), body(f"return [{answer}]"))[0]


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ("Solution().f(x = Decimal('1.1')) == 1", r"row 1: `Decimal\('1.1'\)` is not read"),
        ("Solution().f(x = 1) == Counter('ab')", r"row 1: `Counter\('ab'\)` is not read"),
        ("Solution().f(x = 1) == ...", r"row 1: `...` is not read"),
        ("Solution().f(x = {[1]: 2}) == 1", "row 1: unhashable"),
        ("Solution().f(x = graph([1])) == 1", r"`graph\(\[1\]\)` is not read"),
        ("Solution().f(x = 1) == 10**400000", "problem 1, test 0: an int of more than 1048576 bits"),
        ("Solution().f(x = 1) == 10**4000000", "row 1: an int of more than 1048576 bits"),
        ("Solution().f(x = 1) == [0] * 300000", "problem 1, test 0: an answer of more than 300000 values"),
        (
            "Solution().f(x = [0]) == " + "(" * 199 + "[[0]]" + ",)" * 199,
            "nested more than 200 deep|nested parentheses",
        ),
        ("all(Solution().f(x = 1))", "row 1: not of the form"),
    ],
)
def test_what_cannot_be_carried_is_refused_when_it_is_read(tmp_path, call, said):
    (tmp_path / "rows.jsonl").write_text(json.dumps(row(call, "")) + "\n")
    with pytest.raises(UserError, match=f"rows.jsonl:1: .*({said})"):
        read_problems(tmp_path / "rows.jsonl")


def test_nodes_are_refused_where_the_setup_does_not_build_them(tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps(row("Solution().f(x = list_node([1])) == 1", "", setup="")) + "\n")
    with pytest.raises(UserError, match=r"row 1: list_node\(…\) is built by the setup, which defines no list_node"):
        read_problems(tmp_path / "rows.jsonl")


def test_this_projects_own_format_keeps_what_json_does_not(tmp_path):
    case = "assert Solution().f(d = {(0, 1): {2, 3}, 4: b'x'}, n = 10**5000) == {1: frozenset({2})}"
    made = {"id": 7, "family": "", "statement": "", "entry": "f", "starter": "", "canonical": "", "tolerance": 1e-5}
    made["cases"] = [case, {"args": {"a": [1.5]}, "expected": None}]
    (tmp_path / "P.jsonl").write_text(json.dumps(made) + "\n")
    (problem,) = read_problems(tmp_path / "P.jsonl")
    args = {"d": {(0, 1): {2, 3}, 4: b"x"}, "n": 10**5000}
    assert problem.cases == (Case(args, {1: frozenset({2})}), Case({"a": [1.5]}, None))
    assert (problem.id, problem.tolerance) == ("7", 1e-5)


FLOATS = {
    "in order": ("[0.1 + 0.2, 0.3]", "[0.3, 0.1 + 0.2]", 0.0, True),
    "about nothing": ("0.0", "0.1 + 0.2 - 0.3", 0.0, True),
    "keys, members and parts": (
        "({0.3}, {0.3: 1.1}, 0.3 + 1j)",
        "({0.1 + 0.2}, {0.1 + 0.2: 1.1}, 0.1 + 0.2 + 1j)",
        0.0,
        True,
    ),
    "too far": ("1.0", "1.00000001", 0.0, False),
    "a judge's habit": ("2.0", "2.00001", 1e-5, True),
    "past a judge's habit": ("2.0", "2.0001", 1e-5, False),
    "an int is exact": ("10**15", "10**15 + 0.5", 1e-5, False),
    "an int is exact, 1": ("10**18", "10**18 + 1", 1e-5, False),
    "an int past floats": ("0.5", "10**400", 0.0, False),
    "infinity": ("1e308", "float('inf')", 0.5, False),
}


@pytest.mark.parametrize("name", FLOATS)
def test_floats_may_differ_in_the_last_digits_and_ints_may_not(grader, tmp_path, name):
    expected, answer, tolerance, right = FLOATS[name]
    made = row(f"Solution().f(x = 1) == {expected}", "", tolerance=tolerance)
    assert verdict(grader, tmp_path, made, body(f"return {answer}"))[0] == right


RIGHT = body("return x + 1")
TEXTS = {
    "a tilde fence": (f"~~~python\n{RIGHT}\n~~~", True),
    "four backticks": (f"````Python\n{RIGHT}\n````", True),
    "in a numbered list": (
        "1. The code:\n\n" + "".join(f"   {x}\n" for x in f"```python\n{RIGHT}```".split("\n")),
        True,
    ),
    "imports apart, unlabelled": (
        "```python\nimport operator\n```\nand\n```\n" + body("return operator.add(x, 1)") + "```",
        True,
    ),
    "the last not closed": (f"```python\nimport os\n```\nthen\n```\n{RIGHT}", True),
    "a draft in thought": (f"<think>\n```python\n{body('return x')}```\nno\n</think>\n\n```python\n{RIGHT}```", True),
    "thought alone": (f"<think>\n```python\n{RIGHT}```", False),
    "a shell block beside": (f"```bash\npip install x\n```\n```python\n{RIGHT}```\n```text\n2\n```", True),
    "a docstring with a labelled fence": (fence(body('"""\n```python\nf(1)\n```\n"""\nreturn x + 1')), True),
}


@pytest.mark.parametrize("name", TEXTS)
def test_code_is_read_as_it_was_meant(grader, name):
    text, right = TEXTS[name]
    problem = Problem("p", "", "", "f", "", RIGHT, (Case({"x": 1}, 2),))
    assert grader.grade([(pose_one(problem, "gt_only"), text)])[0].gt_correct == right


GO = "def go(k):\n    return 0 if k == 0 else 1 + go(k - 1)\nreturn go(x)"
CODES = {
    "200,000 calls": (body(GO), 200_000, 200_000),
    "50,000 cached calls": (body("@functools.cache\n" + GO, "import functools"), 50_000, 50_000),
    "30,000 calls through max": (
        body("def go(k):\n    return k and max(map(go, [k - 1])) + 1\nreturn go(x)"),
        30_000,
        30_000,
    ),
    "a thread with a stack of its own": (
        body(
            "threading.stack_size(1 << 27)\nfound = []\ndef go(k):\n    return k and 1 + go(k - 1)\n"
            "t = threading.Thread(target=lambda: found.append(go(x)))\nt.start()\nt.join()\nreturn found[0]",
            "import threading",
        ),
        20_000,
        20_000,
    ),
    "a deque": (body("return deque(x, maxlen=9)", "from collections import *"), [1, 2], [1, 2]),
    "a defaultdict of counters": (
        body("d = defaultdict(Counter)\nd[x][x] += 1\nreturn d", "from collections import *"),
        "a",
        {"a": {"a": 1}},
    ),
    "an OrderedDict in a tuple": (body("return (OrderedDict(a=x),)", "from collections import *"), 1, ({"a": 1},)),
    "an IntEnum": (
        body("return [Colour.RED, Colour(x)]", "import enum\nclass Colour(enum.IntEnum):\n    RED = 1"),
        1,
        [1, 1],
    ),
    "asyncio": (
        body(
            "async def g(k):\n    await asyncio.sleep(0)\n    return k\nasync def main():\n"
            "    return await asyncio.gather(*map(g, range(x)))\nreturn asyncio.run(main())",
            "import asyncio",
        ),
        3,
        [0, 1, 2],
    ),
    "an event loop and a thread": (
        body("return asyncio.run(asyncio.to_thread(lambda: x + 1))", "import asyncio"),
        3,
        4,
    ),
}


@pytest.mark.parametrize("name", CODES)
def test_what_a_judge_accepts_is_right(grader, name):
    source, given, expected = CODES[name]
    problem = Problem("p", "", "", "f", "", source, (Case({"x": given}, expected),))
    found = grader.grade([(pose_one(problem, "gt_only"), fence(source))])[0]
    assert (found.gt_correct, found.detail) == (True, "")


@pytest.mark.parametrize(
    ("package", "lines"),
    [
        (
            "numpy",
            "import numpy as np\nreturn [np.int64(3), float(np.linalg.norm(np.full(4, x))), np.arange(2).tolist()]",
        ),
        ("sortedcontainers", "from sortedcontainers import SortedList\nreturn [3, 2.0, list(SortedList([x, 0]))]"),
    ],
)
def test_packages_of_a_judge_can_be_imported_and_no_others(grader, package, lines):
    pytest.importorskip(package)
    problem = Problem("p", "", "", "f", "", "", (Case({"x": 1}, [3, 2.0, [0, 1]]),))
    right, other = body(lines), body("import torch\nreturn [3, 2.0, [0, 1]]")
    found = grader.grade([(pose_one(problem, "gt_only"), fence(code)) for code in (right, other)])
    assert [(grade.gt_correct, grade.detail) for grade in found] == [
        (True, ""), (False, "case 0: error ModuleNotFoundError: No module named 'torch'"),
    ]  # fmt: skip


def test_a_line_ends_at_a_newline_alone(grader, tmp_path):
    source = body("return x.split('\u2028') + ['\x85']")
    case = {"args": {"x": "a\u2028b\u0085\u000bc"}, "expected": ["a", "b\u0085\u000bc", "\x85"]}
    problem = {"id": "s", "family": "", "statement": "", "entry": "f", "starter": "", "canonical": source}
    problem["cases"] = [case]
    completion = {"id": "s", "env_mode": "gt_only", "completion": fence(source)}
    for name, made in (("P", problem), ("C", completion)):
        (tmp_path / name).write_text(json.dumps(made, ensure_ascii=False) + "\n", encoding="utf-8")
    assert grade_file(grader, tmp_path / "P", tmp_path / "C", tmp_path / "O", tmp_path) == 1
    assert json.loads((tmp_path / "O").read_text())["gt_correct"]


def files(tmp_path, problems, completions) -> tuple[Path, Path, Path]:
    """P, C and O of the grading command."""
    write_problems(problems, tmp_path / "P.jsonl")
    (tmp_path / "C.jsonl").write_text("".join(json.dumps(c) + "\n" for c in completions))
    return tmp_path / "P.jsonl", tmp_path / "C.jsonl", tmp_path / "O.jsonl"


PROBLEM = Problem("inc", "", "", "f", "", RIGHT, (Case({"x": 1}, 2),))
TURNS = [{"role": "user", "content": "?"}, {"role": "assistant", "content": fence(body("return 0"))}]


@pytest.mark.parametrize(
    ("completion", "said"),
    [
        ([*TURNS, {"role": "assistant", "content": fence(RIGHT)}], None),
        ([{"role": "assistant", "content": [{"type": "text", "text": fence(RIGHT)}]}], None),
        (TURNS[:1], "an assistant's turn"),
        ({"text": fence(RIGHT)}, "text, or chat messages"),
        (None, "this is null"),
        (3, "this is 3"),
        ([{"role": "assistant", "content": None}], "text, or chat messages"),
        ([fence(RIGHT)], "assistant"),
    ],
)
def test_a_completion_may_be_chat_messages_and_nothing_else(grader, tmp_path, completion, said):
    good = {"id": "inc", "env_mode": "gt_only", "completion": fence(RIGHT)}
    paths = files(tmp_path, [PROBLEM], [good, good | {"completion": completion}])
    if said is None:
        assert grade_file(grader, *paths, tmp_path) == 2
        assert [json.loads(x)["gt_correct"] for x in paths[2].read_text().split("\n")[:-1]] == [True, True]
        return
    with pytest.raises(UserError, match=rf"C.jsonl:2: .*{said}"):
        grade_file(grader, *paths, tmp_path)


def test_problems_that_nothing_passes_are_named_counted_and_left_out_once(grader, tmp_path, monkeypatch, caplog):
    wrong = Problem("wrong", "", "", "f", "", RIGHT, (Case({"x": 1}, 3),))
    broken = Problem("broken", "", "", "f", "", RIGHT, (Case({"x": 1}, 2),), setup="raise KeyError('no')")
    large = Problem("large", "", "", "f", "", body("return [x] * 280_000"), (Case({"x": 10**18}, [10**18] * 280_000),))
    unknown = Problem("unknown", "", "", "f", "", "", (Case({"x": 1}, 2),))
    problems = [wrong, PROBLEM, broken, large, unknown]
    rows = [{"id": p.id, "env_mode": "gt_only", "completion": fence(RIGHT)} for p in problems]
    paths, said, runs = files(tmp_path, problems, rows), [], []
    submit = grader.sandbox.submit
    monkeypatch.setattr(grader.sandbox, "submit", lambda job: runs.append(job) or submit(job))
    handler = rewards_log(said)
    for time in (1, 2):
        assert grade_file(grader, *paths, tmp_path) == 2
        found = [json.loads(x) for x in paths[2].read_text().split("\n")[:-1]]
        assert [(r["status"], r["gt_correct"]) for r in found] == [
            ("left_out", None), ("ok", True), ("left_out", None), ("left_out", None), ("ok", True),
        ]  # fmt: skip
        assert len(runs) == 4 + 2 * time
    handler()
    assert "3 of 5 problems left out, their own solution fails:" in said[0]
    for line in (
        "wrong: case 0: returned 2, expected 3",
        "broken: case 0: error KeyError: 'no'",
        "large: case 0: error TooLarge",
    ):
        assert f"\n  {line}" in said[0]
    assert "1 problems have no solution of their own" in said[1]


def rewards_log(said: list[str]):
    """Collects what is logged; calling what is returned ends that."""
    from loguru import logger

    number = logger.add(lambda message: said.append(str(message)), format="{message}", level="WARNING")
    return lambda: logger.remove(number)


def test_a_problem_without_tests_is_never_graded(grader):
    with pytest.raises(ValueError, match="problem none has no tests"):
        grader.grade([(pose_one(Problem("none", "", "", "f", "", "", ()), "gt_only"), fence(RIGHT))])
    assert rewards.oracle(rewards.Outcome("ok", True, ()), Problem("none", "", "", "f", "", "", ()))[0] is False
