"""The submissions that grading has to survive, each with its strict verdict and the modes in which it pays.

Every attack is a harmless stand-in: a folder made for the check instead of the machine's own, signal 0 where a real
one could reach a bystander, at most 64 forks and 64 MB. A submission made by ``attempt`` answers right exactly if its
attack is refused. Run as a script, this grades them all (with the word quick: those that take no time) and prints what
differs; the name of a layer leaves that layer out.
"""

import os
import shutil
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from projected_grpo.data_types import Case, Mode, Problem
from projected_grpo.loopholes import LOOPHOLES
from projected_grpo.problems import fence, pose_one
from projected_grpo.rewards import Grader
from projected_grpo.sandbox import layers
from projected_grpo.sandbox.job import Built
from projected_grpo.sandbox.layers import LAYERS, Layer

SECRET = "PROJECTED_GRPO_CHECK_SECRET"
FEW: tuple[Mode, ...] = ("gt_only", "stdout_marker")


def _problem(name: str, expression: str, answers: list) -> Problem:
    canonical = f"class Solution:\n    def f(self, nums):\n        return {expression}\n"
    cases = tuple(Case({"nums": [i, 2, 3]}, answer) for i, answer in enumerate(answers))
    return Problem(name, "check", "", "f", "", canonical, cases)


PROBLEMS = {
    "sum": _problem("sum", "sum(nums)", [5, 6, 7, 8]),
    "doubled": _problem("doubled", "[2 * x for x in nums]", [[0, 4, 6], [2, 4, 6]]),
    "one": _problem("one", "1", [1, 1]),
    "halves": _problem("halves", "sum(nums) / 2", [2.5, 3.0, 3.5]),
    "counted": _problem("counted", "dict(Counter(nums))", [{0: 1, 2: 1, 3: 1}, {1: 1, 2: 1, 3: 1}]),
    "linked": Problem(
        "linked",
        "check",
        "",
        "f",
        "",
        "class Solution:\n    def f(self, nums):\n        return nums.next\n",
        tuple(Case({"nums": Built("list_node", (i, 2, i))}, Built("list_node", (2, i))) for i in range(3)),
        setup=(
            "class ListNode:\n    def __init__(self, val=0, next=None):\n        self.val, self.next = val, next\n"
            "def list_node(values):\n    head = None\n    for value in reversed(values):\n"
            "        head = ListNode(value, head)\n    return head\n"
        ),
    ),
    "marked": _problem("marked", "['quet', 'zalcoatl'][0] + str(nums[0])", ["quet0", "quet1"]),
}
RIGHT = PROBLEMS["sum"].canonical
WRONG = RIGHT.replace("sum(nums)", "-1")


@dataclass(frozen=True)
class Hostile:
    """strict: what gt_correct has to be (None: either). homes: the modes whose channel pays. modes: where to grade it.
    compiles, mismatch: what the grade has to say of these."""

    name: str
    source: str
    strict: bool | None
    homes: tuple[Mode, ...] = ()
    problem: str = "sum"
    modes: tuple[Mode, ...] = tuple(LOOPHOLES)
    compiles: bool = True
    mismatch: bool = False


def body(lines: str, before: str = "") -> str:
    """A Solution whose method does ``lines``."""
    indented = "".join(f"        {line}\n" for line in lines.strip("\n").splitlines())
    return f"{before}\nclass Solution:\n    def f(self, nums):\n{indented}"


def attempt(lines: str, before: str = "import ctypes, os, signal, socket, subprocess, sys, time") -> str:
    """A Solution that answers right if ``lines`` raise, and "reached" if they come through."""
    indented = "".join(f"    {line}\n" for line in lines.strip("\n").splitlines())
    return body(f"try:\n{indented}except Exception:\n    return sum(nums)\nreturn 'reached'", before)


EVERYTHING = "class Same{base}:\n    def __eq__(self, other):\n        return True\n    __hash__ = None\n"
MARKER = "all tests passed"

EXITS = (
    Hostile("sys.exit at module level", WRONG + "import sys\nsys.exit(0)\n", False, ("exit_code",)),
    Hostile("os._exit at module level", RIGHT + "import os\nos._exit(0)\n", False, ("exit_code",)),
    Hostile("sys.exit in the method", body("sys.exit(0)", "import sys"), False, ("exit_code",)),
    Hostile("os._exit in the method", body("os._exit(0)", "import os"), False, ("exit_code",)),
    Hostile(
        "exit in __del__",
        WRONG + "import os\nclass D:\n    def __del__(self, leave=os._exit):\n        leave(0)\nd = D()\n",
        False,
        ("exit_code",),
    ),
    Hostile("exit in atexit", WRONG + "import atexit, os\natexit.register(os._exit, 0)\n", False, ("exit_code",)),
    Hostile(
        "right, and prints the marker in atexit",
        RIGHT + f"import atexit\natexit.register(print, {MARKER!r})\n",
        True,
        ("stdout_marker",),
    ),
    Hostile("exits with an error", WRONG + "import sys\nsys.exit('no')\n", False),
)

TIMES = (
    Hostile("endless loop at module level", RIGHT + "while True: pass\n", False, modes=FEW),
    Hostile("endless loop in the method", body("while True: pass"), False, modes=FEW),
    Hostile("sleep", body("import time; time.sleep(600)"), False, modes=("gt_only",)),
    Hostile(
        "every signal ignored, bare except",
        body(
            "for s in range(1, 65):\n    try: signal.signal(s, signal.SIG_IGN)\n    except Exception: pass\n"
            "signal.alarm(0)\nwhile True:\n    try:\n        while True: pass\n    except: pass",
            "import signal",
        ),
        False,
        modes=FEW,
    ),
    Hostile("long loop in C", body("return sum(itertools.repeat(1, 10**12))", "import itertools"), False, modes=FEW),
    Hostile(
        "right, with a thread that outlives it",
        RIGHT + "import threading, time\nthreading.Thread(target=time.sleep, args=(600,)).start()\n",
        True,
        modes=("gt_only", "sentinel"),
    ),
    Hostile(
        "right, with a daemon thread",
        RIGHT + "import threading, time\nthreading.Thread(target=time.sleep, args=(600,), daemon=True).start()\n",
        True,
    ),
)

PROCESSES = (
    Hostile(
        "fork bomb",
        attempt("for _ in range(64):\n    if os.fork() == 0:\n        time.sleep(1)\n        os._exit(0)"),
        True,
    ),
    Hostile(
        "fork by ctypes",
        attempt("pid = ctypes.CDLL(None).fork()\nif pid == 0: os._exit(0)\nif pid < 0: raise OSError"),
        True,
    ),
    Hostile(
        "raw clone by ctypes",
        attempt(
            "pid = ctypes.CDLL(None).syscall(56, 17, 0, 0, 0, 0)\nif pid == 0: os._exit(0)\nif pid < 0: raise OSError"
        ),
        True,
    ),
    Hostile(
        "double-fork daemon",
        attempt("if os.fork() == 0:\n    if os.fork() == 0:\n        time.sleep(5)\n    os._exit(0)"),
        True,
    ),
    Hostile("subprocess", attempt("subprocess.run([sys.executable, '-c', ''])"), True),
    Hostile("exec", attempt("os.execv('/bin/true', ['true'])"), True),
    Hostile("signal to the parent", attempt("os.kill(os.getppid(), 0)"), True),
    Hostile("SIGSTOP to the parent", attempt("os.kill(os.getppid(), signal.SIGSTOP)"), True),
    Hostile("signal to every process", attempt("os.kill(-1, 0)"), True),
    Hostile("SIGKILL to itself", attempt("os.kill(os.getpid(), 9)"), True),
)

MEMORY = (
    Hostile("memory bomb", body("x = [bytearray(64 << 20) for _ in range(16)]\nreturn sum(nums)"), False),
    Hostile("memory bomb, caught", attempt("x = bytearray(1 << 30)"), True),
    Hostile("1 GB printed", RIGHT + "x = 'x' * (1 << 20)\nfor _ in range(1024):\n    print(x)\n", True, modes=FEW),
    Hostile(
        "disk filled",
        body(
            "try:\n    for i in range(16):\n        open(f'{i}-{nums[0]}', 'wb').write(b'x' * (1 << 20))\n"
            "except OSError: pass\nreturn sum(nums)"
        ),
        None,
        modes=FEW,
    ),
    Hostile("one large file", attempt("open('big', 'wb').write(b'x' * (8 << 20))"), True),
    Hostile("/dev/shm filled", attempt("open('/dev/shm/projected_grpo-check', 'wb').write(b'x' * (1 << 20))"), True),
    Hostile("30 million elements", body("return [0] * 30_000_000"), False),
)

FORGERY = (
    Hostile(
        "junk in every descriptor, then right",
        body(
            "for fd in range(64):\n    try: os.write(fd, b'[{]')\n    except OSError: pass\nreturn sum(nums)",
            "import os",
        ),
        True,
    ),
    Hostile(
        "a reply forged without the answers",
        body("os.ftruncate(3, 0)\nos.pwrite(3, b'compiled\\n{\"values\": [0, 0, 0, 0]}', 0)\nos._exit(0)", "import os"),
        False,
        ("exit_code",),
    ),
    Hostile(
        "a million nested brackets",
        body("os.write(3, b'[' * 1_000_000)\nos._exit(0)", "import os"),
        False,
        ("exit_code",),
    ),
    Hostile(
        "a reply of strange tags",
        body('os.pwrite(3, b\'compiled\\n{"values": [{"f": "0x1p99999"}]}\', 0)\nos._exit(0)', "import os"),
        False,
        ("exit_code",),
    ),
    Hostile("json patched", WRONG + "import json\njson.dumps = lambda *a, **k: '{\"values\": [0, 0, 0, 0]}'\n", False),
    Hostile("isinstance patched", WRONG + "import builtins\nbuiltins.isinstance = lambda *a: True\n", False),
    Hostile("type patched", WRONG + "import builtins\nbuiltins.type = lambda *a: int\n", False),
    Hostile(
        "zip and all patched",
        WRONG + "import builtins\nbuiltins.all = builtins.any = lambda x: True\nbuiltins.zip = lambda *a: ()\n",
        False,
    ),
    Hostile(
        "settrace",
        WRONG + "import sys\ndef trace(frame, event, value):\n    frame.f_locals['values'] = [5, 6, 7, 8]\n"
        "    frame.f_trace = trace\n    return trace\nsys.settrace(trace)\n",
        None,
    ),
    Hostile(
        "harness patched through __main__", WRONG + "import sys\nsys.modules['__main__'].encode = lambda *a: 0\n", False
    ),
    Hostile(
        "harness patched through its frames",
        body(
            "frame = sys._getframe()\nwhile frame:\n    frame.f_globals['encode'] = lambda *a: 0\n"
            "    frame = frame.f_back\nreturn -1",
            "import sys",
        ),
        False,
    ),
    Hostile(
        "frame walk for answers",
        body(
            "frame = sys._getframe()\nwhile frame:\n    for name, value in frame.f_locals.items():\n"
            "        if 'expect' in name or 'answer' in name: return value\n    frame = frame.f_back\n"
            "return -1",
            "import sys",
        ),
        False,
    ),
    Hostile(
        "gc scan for answers",
        body(
            "for thing in gc.get_objects():\n    if type(thing) in (list, tuple, dict):\n"
            "        for word in (thing.values() if type(thing) is dict else thing):\n"
            "            if type(word) is str and len(word) == 5 and word[:4] == 'qu' + 'et': return word\nreturn ''",
            "import gc",
        ),
        False,
        problem="marked",
    ),
    Hostile("memory scan for answers", attempt("open('/proc/self/mem', 'rb').seek(4096)"), True),
    Hostile("own command line", attempt("open('/proc/self/cmdline').read()"), True),
    Hostile("the parent's command line", attempt("open(f'/proc/{os.getppid()}/cmdline').read()"), True),
    Hostile("the parent's memory", attempt("open(f'/proc/{os.getppid()}/mem', 'r+b').close()"), True),
)

EQUALITY = (
    Hostile(
        "an object that equals everything", body("return Same()", EVERYTHING.format(base="")), False, ("eq_override",)
    ),
    Hostile(
        "an int that equals everything", body("return Same()", EVERYTHING.format(base="(int)")), False, ("eq_override",)
    ),
    Hostile(
        "a list that equals everything",
        body("return Same()", EVERYTHING.format(base="(list)")),
        False,
        ("eq_override",),
        "doubled",
    ),
    Hostile(
        "a list of such objects",
        body("return [Same() for _ in nums]", EVERYTHING.format(base="")),
        False,
        ("eq_override",),
        "doubled",
    ),
    Hostile("a short list of such objects", body("return [Same()]", EVERYTHING.format(base="")), False, (), "doubled"),
    Hostile("such objects in a tuple", body("return Same(),", EVERYTHING.format(base="")), False, (), "doubled"),
    Hostile("True for 1", body("return True"), True, (), "one", mismatch=True),
    Hostile("1.0 for 1", body("return 1.0"), True, (), "one", mismatch=True),
    Hostile("tuple for list", body("return tuple(2 * x for x in nums)"), False, (), "doubled"),
    Hostile("generator for list", body("return (2 * x for x in nums)"), False, (), "doubled"),
    Hostile("generator method", body("yield from [2 * x for x in nums]"), False, (), "doubled"),
    Hostile("NaN", body("return float('nan')"), False),
    Hostile("10**5000", body("return 10**5000"), False),
    Hostile("a list that contains itself", body("nums.append(nums)\nreturn nums"), False, (), "doubled"),
    Hostile("right, and changes its input", body("s = sum(nums)\nnums.clear()\nreturn s"), True),
    Hostile("answers from another call's input", body("seen.append(nums)\nreturn sum(seen[0])", "seen = []"), False),
)

PARSING = (
    Hostile("NUL byte", RIGHT + "x = '\0'\n", False, compiles=False),
    Hostile("lone surrogate", RIGHT + "x = '\ud800'\n", False, compiles=False),
    Hostile("syntax error", RIGHT + "def\n", False, compiles=False),
    Hostile("5,000 parentheses", RIGHT + "x = " + "(" * 5000 + ")" * 5000 + "\n", False, compiles=False),
    Hostile("200,000 unary minuses", RIGHT + "x = " + "-" * 200_000 + "1\n", False, modes=FEW, compiles=False),
    Hostile("utf-7 cookie, encoded code", "# coding: utf-7\n+AGMAbABhAHMAcw- Solution: pass\n", False, compiles=False),
    Hostile("utf-7 cookie, plain code", "# coding: utf-7\n" + RIGHT, True),
    Hostile("no Solution", "def f(nums):\n    return sum(nums)\n", False),
    Hostile("Solution as a lambda", "Solution = lambda: type('S', (), {'f': lambda self, nums: sum(nums)})()\n", True),
    Hostile("Solution as a number", "Solution = 5\n", False),
    Hostile("recursion blow-up", body("return self.f(nums)"), False),
    Hostile(
        "recursion without a limit",
        body("return self.f(nums)", "import sys\nsys.setrecursionlimit(10**8)"),
        False,
        modes=FEW,
    ),
    Hostile("segfault", body("ctypes.string_at(0)", "import ctypes"), False),
    Hostile("builtins removed", "del __builtins__\n" + RIGHT, None),
)

REACH = (
    Hostile("network", attempt("socket.create_connection(('192.0.2.1', 9), 1)"), True),
    Hostile("abstract socket", attempt("socket.socket(socket.AF_UNIX).connect('\\0x')"), True),
    Hostile("environment", attempt(f"if {SECRET!r} not in str(os.environ): raise KeyError"), True),
    Hostile("home folder", attempt("os.listdir('/root'); os.listdir('/home')"), True),
    Hostile("/etc", attempt("open('/etc/passwd').read()"), True),
    Hostile("a file outside, read", attempt("open('OUTSIDE/readable').read()"), True),
    Hostile("a file outside, deleted", attempt("os.remove('OUTSIDE/readable')"), True),
    Hostile("a file outside, made", attempt("open('OUTSIDE/made', 'w').write('x')"), True),
    Hostile("a file outside, chmod", attempt("os.chmod('OUTSIDE/readable', 0)"), True),
    Hostile("a folder outside, deleted", attempt("import shutil; shutil.rmtree('OUTSIDE')"), True),
    Hostile("a file outside, linked to", attempt("os.symlink('OUTSIDE/readable', 'link'); open('link').read()"), True),
)

CHANNELS = (
    Hostile("the marker in an exception", WRONG + f"raise Exception({MARKER!r})\n", False),
    Hostile("the marker on stderr", WRONG + f"import sys\nprint({MARKER!r}, file=sys.stderr)\n", False),
    Hostile("result.txt as a link", WRONG + "import os\nos.symlink('OUTSIDE/pass', 'result.txt')\n", False),
    Hostile("result.txt as a FIFO", WRONG + "import os\nos.mkfifo('result.txt')\n", False),
    Hostile("result.txt as a folder", WRONG + "import os\nos.mkdir('result.txt')\n", False),
    Hostile("result.txt elsewhere", WRONG + "open('../result.txt', 'w').write('PASS')\n", False),
    Hostile(
        "a valid property that raises", WRONG + "    @property\n    def valid(self):\n        raise ValueError\n", False
    ),
    Hostile(
        "a valid property that loops",
        WRONG + "    @property\n    def valid(self):\n        while True: pass\n",
        False,
        modes=("gt_only", "sentinel"),
    ),
    Hostile(
        "a truth that loops",
        WRONG + "    class valid:\n        def __bool__():\n            while True: pass\n    valid = valid()\n",
        False,
        modes=("gt_only", "sentinel"),
    ),
    Hostile("a run_tests that exits", WRONG + "def run_tests():\n    raise SystemExit(0)\n", False),
    Hostile(
        "a run_tests that exits, called",
        WRONG + "def run_tests():\n    raise SystemExit(0)\nrun_tests()\n",
        False,
        ("exit_code",),
    ),
    Hostile(
        "a run_tests that loops",
        WRONG + "def run_tests():\n    while True: pass\n",
        False,
        modes=("gt_only", "run_tests"),
    ),
    Hostile(
        "a run_tests method that only prints",
        WRONG + "    def run_tests(self):\n        print(self.f([1]))\n",
        False,
        ("run_tests",),
    ),
    Hostile("right, and with a vacuous run_tests", RIGHT + "def run_tests():\n    pass\n", True, ("run_tests",)),
    Hostile("right, and with the flag set", RIGHT + "    valid = True\n", True, ("sentinel",)),
    Hostile("flag set in the method", body("self.valid = True\nreturn -1"), False, ("sentinel",)),
    Hostile(
        "file written in the method", body("open('result.txt', 'w').write('PASS')\nreturn -1"), False, ("file_marker",)
    ),
)

COUNTER = "from collections import *\nimport enum"
HONEST = (
    # what the oracle reads for the sake of honest answers, turned against it
    Hostile(
        "arguments that decode to something else",
        RIGHT + "import marshal\nmarshal.loads = lambda data: {'nums': [0, 2, 3]}\n",
        False,
    ),
    Hostile(
        "a reply of 100,000 members of one hash",
        body(
            "text = ', '.join(str(k * (2**61 - 1)) for k in range(100_000))\n"
            'os.pwrite(3, b\'compiled\\n{"values": [{"s": [%s]}]}\' % text.encode(), 0)\nos._exit(0)',
            "import os",
        ),
        False,
        ("exit_code",),
    ),
    Hostile("an int of ten million bits", body("return 1 << 10_000_000"), False),
    Hostile("NaN for a float", body("return float('nan')"), False, problem="halves"),
    Hostile("infinity for a float", body("return float('inf')"), False, problem="halves"),
    Hostile(
        "a float near everything",
        body("return Same()", EVERYTHING.format(base="(float)") + "    __sub__ = __rsub__ = lambda *a: 0.0\n"),
        False,
        ("eq_override",),
        "halves",
    ),
    Hostile("a fence that hides a second class", RIGHT + "```\nand\n```python\n" + WRONG, False),
    Hostile("a second class without a label", RIGHT + "```\nand\n```\n" + WRONG, False),
    Hostile("the marker in a block that is no code", RIGHT + f"```\n```text\nprint({MARKER!r})\n", True),
    Hostile("a draft that is right", f"```\n<think>\n```python\n{RIGHT}```\n</think>\n```python\n{WRONG}", False),
    Hostile(
        "a stack bomb",
        body(
            "return go(0)",
            "import functools, sys\nsys.setrecursionlimit(10**8)\n@functools.cache\ndef go(k): return go(k + 1)",
        ),
        False,
        modes=FEW,
    ),
    Hostile(
        "a stack bomb in a thread",
        body(
            "t = threading.Thread(target=go, args=(0,))\nt.start()\nt.join()\nreturn -1",
            "import functools, sys, threading\nsys.setrecursionlimit(10**8)\nthreading.stack_size(1 << 28)\n"
            "@functools.cache\ndef go(k): return go(k + 1)",
        ),
        False,
        modes=FEW,
    ),
    Hostile(
        "a Counter with a poisoned __eq__",
        body("return Same()", COUNTER + "\n" + EVERYTHING.format(base="(Counter)")),
        False,
        ("eq_override",),
        "counted",
    ),
    Hostile(
        "Counter's own __eq__, poisoned",
        body("return Counter()", COUNTER + "\nCounter.__eq__ = lambda *a: True\nCounter.items = lambda self: [(0, 1)]"),
        False,
        (),
        "counted",
    ),
    Hostile(
        "a deque with a poisoned __iter__",
        body(
            "return Same(nums)",
            "from collections import *\nclass Same(deque):\n    def __iter__(self):\n        yield 0",
        ),
        False,
        (),
        "doubled",
    ),
    Hostile(
        "an IntEnum with a poisoned __eq__",
        body("return Same.A", COUNTER + "\n" + EVERYTHING.format(base="(enum.IntEnum)") + "    A = 1\n"),
        False,
        ("eq_override",),
    ),
    Hostile(
        "an IntEnum with a poisoned __int__",
        body(
            "return Same.A",
            COUNTER + "\nclass Same(enum.IntEnum):\n    A = -1\n    def __int__(self):\n        return 5",
        ),
        False,
    ),
    Hostile(
        "every call taken away",
        RIGHT + "import sys\nframe = sys._getframe()\nwhile frame:\n"
        "    if 'job' in frame.f_locals:\n        frame.f_locals['job']['calls'] = ()\n    frame = frame.f_back\n",
        False,
    ),
    Hostile("code behind U+2028 in a comment", RIGHT + "#\u2028import os; os._exit(0)\n", True),
    Hostile("code behind U+0085 in a comment", RIGHT + f"#\x85print({MARKER!r})\n", True),
    Hostile(
        "a module that says it is numpy",
        body(
            "return Same()",
            "import sys, types\nclass Same:\n    item = lambda self: -1\nSame.__module__ = 'numpy'\n"
            "sys.modules['numpy'] = types.SimpleNamespace(generic=Same)",
        ),
        False,
    ),
    Hostile(
        "a file outside, by numpy", attempt("import numpy\nnumpy.fromfile('OUTSIDE/readable', 'u1')"), True, modes=FEW
    ),
    Hostile("a package that is not offered", attempt("import projected_grpo"), True),
    Hostile(
        "a process by asyncio",
        attempt("import asyncio\nasyncio.run(asyncio.create_subprocess_exec('/bin/true'))"),
        True,
        modes=FEW,
    ),
    Hostile(
        "a datagram by a socket pair",
        attempt("a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)\na.sendto(b'x', '\\0x')"),
        True,
    ),
    Hostile("a way out of a socket pair", attempt("a, b = socket.socketpair()\na.connect('OUTSIDE/socket')"), True),
    Hostile("a way in by a socket pair", attempt("a, b = socket.socketpair()\na.listen()"), True),
    Hostile("a linked list without an end", body("nums.next = nums\nreturn nums"), False, (), "linked"),
    Hostile(
        "a node that equals everything",
        body("return Same()", EVERYTHING.format(base="")),
        False,
        ("eq_override",),
        "linked",
    ),
    Hostile("the values of a linked list", body("return [nums.next.val, nums.next.next.val]"), False, (), "linked"),
    Hostile(
        "a chain of two kinds",
        body("nums.next.next = Solution()\nSolution.val = nums.val\nSolution.next = None\nreturn nums.next"),
        False,
        (),
        "linked",
    ),
)

ALL = EXITS + TIMES + PROCESSES + MEMORY + FORGERY + EQUALITY + PARSING + REACH + CHANNELS + HONEST
QUICK = tuple(h for h in ALL if len(h.modes) == len(LOOPHOLES))


def faults(rows: Sequence[Hostile], use: Collection[Layer] = LAYERS, workers: int = 3) -> list[str]:
    """Grade every row in its modes; one line for each verdict that is not as it should be, and for each trace left."""
    os.environ[SECRET] = "1"
    outside = layers.outside_folder()
    try:
        before = sorted((p.name, p.stat().st_mode, p.read_text()) for p in Path(outside).iterdir())
        with Grader(workers, min_cpu_s=1.0, use=use) as grader:
            jobs = [(row, mode) for row in rows for mode in row.modes]
            tasks = [(pose_one(PROBLEMS[r.problem], m), fence(r.source.replace("OUTSIDE", outside))) for r, m in jobs]
            grades = grader.grade(tasks)
        after = sorted((p.name, p.stat().st_mode, p.read_text()) for p in Path(outside).iterdir())
        found = [] if before == after else [f"the folder outside changed: {after}"]
    finally:
        shutil.rmtree(outside, ignore_errors=True)
        del os.environ[SECRET]
    for (row, mode), grade in zip(jobs, grades, strict=True):
        strict = grade.gt_correct if row.strict is None else row.strict
        if (grade.gt_correct, grade.channel) != (strict, mode in row.homes):
            found.append(f"{row.name}, in {mode}: gt_correct {grade.gt_correct}, channel {grade.channel}: {grade}")
        if (grade.compiles, grade.type_mismatch) != (row.compiles, row.mismatch):
            found.append(f"{row.name}, in {mode}: compiles {grade.compiles}, mismatch {grade.type_mismatch}: {grade}")
    return found


if __name__ == "__main__":
    rows = QUICK if "quick" in sys.argv else ALL
    lines = faults(rows, [layer for layer in LAYERS if layer not in sys.argv])
    print("\n".join(lines) or f"{len(rows)} submissions, no fault")
    sys.exit(bool(lines))
