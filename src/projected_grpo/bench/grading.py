"""What grading costs, and whether it holds out: ``python -m projected_grpo.bench.grading [--problems=FILE]``.

``--against=CHECKOUT`` grades the same completions by this code and by that checkout's, in turn, in one run.
The bench runs canonical solutions three ways on the same machine in the same run: a cold ``python -c`` a grade, the
sandbox with every layer, the sandbox as a plain fork. It counts executions, so repeats save nothing.
``--soak-submissions=N`` grades N submissions, one in ten hostile, and watches this process: its memory, descriptors,
children, temporary files, and how long it ever stood still.
"""

import os
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from loguru import logger
from tabulate import tabulate

from projected_grpo.command_line import command, run_main
from projected_grpo.config import Natural, UserError
from projected_grpo.data_types import Problem, Task
from projected_grpo.loopholes import LOOPHOLES, replace_body
from projected_grpo.problems import fence, pose_one, read_problems
from projected_grpo.rewards import EXAMPLES, Grader
from projected_grpo.sandbox import Sandbox, cores
from projected_grpo.strict import CANONICAL_CPU_S, oracle, strict_job

LIGHT_S = 0.1
MIN_RATIO, MIN_RATE, MAX_OVERHEAD, MIN_SPEED = 8.0, 50.0, 1.25, 0.95

_METHOD = "import ctypes, os, sys, threading, time\nclass Solution:\n    def f(self, nums):\n        {}\n"
HOSTILE = (
    _METHOD.format("while True: pass"),
    _METHOD.format("os._exit(0)"),
    _METHOD.format("return [0] * 10_000_000"),
    _METHOD.format("return bytearray(1 << 30)"),
    _METHOD.format("return nums.append(nums) or nums"),
    _METHOD.format("return [os.write(fd, b'x' * 4096) for fd in (1, 3)]"),
    _METHOD.format("os.write(3, b'[' * 1_000_000); os._exit(0)"),
    _METHOD.format("return ctypes.string_at(0)"),
    _METHOD.format("return [open(str(i), 'wb').write(b'x' * 65536) for i in range(40)]"),
    _METHOD.format("return [os.fork() for _ in range(4)]"),
    _METHOD.format("return os.kill(os.getppid(), 0)"),
    _METHOD.format("threading.Thread(target=time.sleep, args=(60,)).start(); return 0"),
    _METHOD.format("print('x' * 1_000_000); return 0"),
    _METHOD.format("return self.f(nums)"),
    "import sys\nsys.setrecursionlimit(10**6)\n" + _METHOD.format("return self.f(nums)"),
    "x = " + "(" * 5000 + ")" * 5000,
    "x = " + "-" * 100_000 + "1",
    "x = '\ud800'",
)


def cold(problem: Problem) -> list[str]:
    """The command that grades a canonical solution in a process of its own, assertions and all."""
    calls = [f"assert Solution().{problem.entry}(**{dict(c.args)!r}) == {c.expected!r}" for c in problem.cases]
    source = "\n".join((problem.setup, problem.canonical, "inf = float('inf')", *calls))
    return [sys.executable, "-c", source]


def parents() -> dict[int, int]:
    """The parent of every process on this machine."""
    found: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            found[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue  # it ended while we looked
    return found


def descendants() -> set[int]:
    """Every process that descends from this one."""
    table, found, fringe = parents(), set(), {os.getpid()}
    while fringe:
        fringe = {pid for pid, parent in table.items() if parent in fringe}
        found |= fringe
    return found


def cpu_of_all() -> float:
    """CPU seconds of this process, of what descends from it, and of those of its children that have ended."""
    ticks = 0
    for pid in descendants():
        try:
            ticks += sum(map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:15]))
        except OSError:
            continue
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + ended.ru_utime + ended.ru_stime + ticks / os.sysconf("SC_CLK_TCK")


def cost(action: Callable[[], object], grades: int) -> tuple[float, float]:
    """(wall, CPU) seconds a grade, our own process and all others counted."""
    start, cpu = time.perf_counter(), cpu_of_all()
    action()
    return (time.perf_counter() - start) / grades, (cpu_of_all() - cpu) / grades


def light_problems(problems: Sequence[Problem]) -> list[Problem]:
    """Those whose canonical solution is right, and takes less than LIGHT_S of CPU time."""
    found = []
    with Grader() as grader:
        outcomes = grader.sandbox.run([strict_job(p, p.canonical, CANONICAL_CPU_S) for p in problems])
    for problem, outcome in zip(problems, outcomes, strict=True):
        if not oracle(outcome, problem)[0]:
            raise UserError(f"problem {problem.id}: its canonical solution fails: {oracle(outcome, problem)[2]}")
        if outcome.cpu_s < LIGHT_S:
            found.append(problem)
    return found


def bench(problems: Sequence[Problem], repeats: int = 4, batches: int = 3) -> bool:
    """Print the table of costs; whether the targets hold. The best of some interleaved repeats counts."""
    light = light_problems(problems)
    jobs = [strict_job(p, p.canonical) for p in light] * batches
    measured: dict[str, list[tuple[float, float]]] = {}
    with (
        Sandbox(workers=1) as full,
        Sandbox(workers=1, allow_unsandboxed=True, use=()) as plain,
        Sandbox() as pool,
    ):
        ways = {
            "cold python -c a grade": lambda: [subprocess.run(cold(p), check=True, capture_output=True) for p in light],
            "sandbox as a plain fork, one worker": lambda: plain.run(jobs),
            "sandbox with every layer, one worker": lambda: full.run(jobs),
            f"sandbox with every layer, {2 * cores()} workers": lambda: pool.run(jobs),
        }
        for name, action in list(ways.items()) * repeats:
            grades = len(light) if name.startswith("cold") else len(jobs)
            measured.setdefault(name, []).append(cost(action, grades))
    walls = {name: min(wall for wall, _ in costs) for name, costs in measured.items()}
    cpus = {name: min(cpu for _, cpu in costs) for name, costs in measured.items()}
    rows = [(name, 1e3 * walls[name], 1e3 * cpus[name], 1 / walls[name]) for name in ways]
    head = f"canonical solutions of {len(light)} of {len(problems)} problems (under {LIGHT_S:g} s)"
    print(tabulate(rows, headers=(head, "ms a grade", "ms of CPU", "grades/s"), floatfmt=".1f", tablefmt="github"))
    one, bare, every, many = ways
    layers, speedup = cpus[every] / cpus[bare], walls[one] / walls[many]
    checks = (
        (f"pool against python -c: {speedup:.1f}x", speedup >= MIN_RATIO),
        (f"grades per second of CPU: {1 / cpus[every]:.0f}", 1 / cpus[every] >= MIN_RATE),
        (f"CPU of every layer against a plain fork: {layers:.2f}", layers <= MAX_OVERHEAD),
        (f"CPU against python -c, for information: {cpus[one] / cpus[every]:.1f}x", True),
    )
    print(f"\nSHOULD: pool >= {MIN_RATIO:g}x, >= {MIN_RATE:g} grades/s of CPU, layers <= {MAX_OVERHEAD:g}")
    for said, holds in checks:
        print("🟢" if holds else "🔴", said)
    return all(holds for _, holds in checks)


RACER = """
import sys, time
from projected_grpo.problems import fence, pose_one, read_problems
from projected_grpo.rewards import Grader
names = set(sys.argv[2].split(","))
problems = [p for p in read_problems(sys.argv[1]) if p.id in names]
with Grader() as grader:
    number = 0
    for line in sys.stdin:
        batch = [(pose_one(p, "gt_only"), fence(f"{p.canonical}\\n# {number} {i}")) for i in range(3) for p in problems]
        number += 1
        start = time.perf_counter()
        right = sum(grade.gt_correct for grade in grader.grade(batch))
        print(len(batch) / (time.perf_counter() - start), right / len(batch), flush=True)
"""
"""Grades one batch of different completions for each line that it reads; written for what both checkouts have."""


def race(path: Path, against: Path, rounds: int = 12) -> bool:
    """Print grades a second of this code and of the checkout ``against``, which take turns; whether ours is as fast."""
    names = ",".join(p.id for p in light_problems(read_problems(path)))
    here = Path(__file__).parents[2]
    racers = {
        name: subprocess.Popen(
            [sys.executable, "-c", RACER, str(path), names],
            env={**os.environ, "PYTHONPATH": str(source)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name, source in (("this code", here), (str(against), against / "src"))
    }
    rates: dict[str, list[float]] = {name: [] for name in racers}
    for number in range(rounds):
        for name in list(racers)[:: 1 if number % 2 else -1]:
            racer = racers[name]
            racer.stdin.write("\n")
            racer.stdin.flush()
            rate, right = map(float, racer.stdout.readline().split())
            if right != 1:
                raise ValueError(f"{name} calls {1 - right:.0%} of the canonical solutions wrong")
            rates[name] += [rate] if number else []  # the first warms up
    for racer in racers.values():
        racer.stdin.close()
        racer.wait()
    ours, theirs = rates.values()
    ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
    rows = [(name, statistics.median(found), max(found)) for name, found in rates.items()]
    head = f"{names.count(',') + 1} canonical solutions, {rounds - 1} rounds"
    print(tabulate(rows, headers=(head, "grades/s, median", "best"), floatfmt=".1f", tablefmt="github"))
    print(f"{'🟢' if ratio >= MIN_SPEED else '🔴'} median ratio of a round: {ratio:.3f} (SHOULD: >= {MIN_SPEED:g})")
    return ratio >= MIN_SPEED


@dataclass
class Ticker:
    """A thread that wants to wake every 5 ms; ``worst`` is the longest it was kept from it, in seconds."""

    worst: float = 0.0
    stop: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        """Tick until stopped."""
        last = time.perf_counter()
        while not self.stop.wait(0.005):
            now = time.perf_counter()
            self.worst, last = max(self.worst, now - last - 0.005), now


def memory_mb() -> float:
    """Resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE") / 2**20


def footprint() -> dict[str, float]:
    """What grading must not let grow in this process."""
    return {
        "memory MB": round(memory_mb(), 1),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "processes": len(descendants()),
        "temporary files": len(list(Path(tempfile.gettempdir()).glob(f"projected_grpo-{os.getpid()}-*"))),
    }


def mixture(number: int) -> list[tuple[Task, str]]:
    """``number`` different submissions in every mode: right, wrong, exploits, lookalikes; one in ten is hostile."""
    found = []
    for i in range(number):
        problem, mode = EXAMPLES[i % len(EXAMPLES)], list(LOOPHOLES)[i % len(LOOPHOLES)]
        task, row = pose_one(problem, mode, "train", i), LOOPHOLES[mode]
        body = problem.canonical if i % 3 else replace_body(problem.canonical, problem.entry, "1")
        source = (body, row.exploit(body, task), row.lookalike(body, task))[i // 7 % 3]
        if i % 10 == 0:
            source = HOSTILE[i // 10 % len(HOSTILE)]
        found.append((task, fence(f"{source.rstrip()}\n# {i}")))
    return found


def soak(number: int, step: int = 500) -> list[dict[str, float]]:
    """Grade a mixture in steps; the footprint after each, with the worst standstill of this process so far."""
    ticker, rows = Ticker(), []
    submissions = mixture(number)
    thread = threading.Thread(target=ticker.run)
    with Grader(min_cpu_s=1.0) as grader:
        grader.grade(submissions[:step])
        thread.start()
        try:
            for start in range(0, number, step):
                began = time.perf_counter()
                grades = grader.grade(submissions[start : start + step])
                rows.append(
                    {
                        "graded": start + len(grades),
                        "right": sum(grade.gt_correct for grade in grades),
                        "paid by a channel": sum(grade.channel for grade in grades),
                        "seconds": round(time.perf_counter() - began, 1),
                        **footprint(),
                        "worst standstill ms": round(1e3 * ticker.worst, 1),
                    }
                )
                logger.info(" ".join(f"{key}={value}" for key, value in rows[-1].items()))
        finally:
            ticker.stop.set()
            thread.join()
    return rows


def main(problems: Path | None = None, soak_submissions: Natural = 0, against: Path | None = None) -> int:
    """Bench the grader on a file's problems (a few built-in ones without), or soak it.

    Args:
        problems: JSON lines of problems, in this project's format or rl-rewardhacking's.
        soak_submissions: how many submissions to soak with instead.
        against: another checkout of this project, to grade the problems' own solutions in turn with.
    """
    if against is not None:
        if problems is None:
            raise UserError("--against needs --problems=FILE")
        return 0 if race(problems, against) else 1
    if soak_submissions:
        print(tabulate(soak(soak_submissions), headers="keys", tablefmt="github"))
        return 0
    return 0 if bench(read_problems(problems) if problems else EXAMPLES) else 1


if __name__ == "__main__":
    run_main(command(main))
