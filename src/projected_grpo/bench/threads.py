"""Whether the default numbers of threads and graders are the right ones, on an idle machine and on a busy one.

    python -m projected_grpo.bench.threads [--rounds=2] [--steps=8] [--no-busy]

Every candidate is a whole ``train smoke`` of a few steps in a process of its own, in turn within each round; the busy
half of the table runs beside one endless loop. What is timed are the run's own seconds (sampling, grading, training:
its sec_ columns), without imports and extraction.
"""

import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from loguru import logger
from tabulate import tabulate

from projected_grpo import sandbox
from projected_grpo.command_line import command, run_main
from projected_grpo.config import Count, UserError
from projected_grpo.runs import json_lines, read_meta


@contextlib.contextmanager
def beside(busy: bool) -> Iterator[None]:
    """One endless loop beside what is measured."""
    loop = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if busy else None
    try:
        yield
    finally:
        if loop is not None:
            loop.kill()
            loop.wait()


def seconds(preset: str, flags: list[str], steps: int, outputs: Path) -> tuple[float, str]:
    """(a run's seconds without imports and extraction, what it ran with)."""
    words = [preset, f"--steps={steps}", f"--outputs={outputs}", "--name=timed", *flags]
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    done = subprocess.run(
        [sys.executable, "-m", "projected_grpo.train", *words], env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise UserError(f"{' '.join(words)} failed: {done.stderr.strip().splitlines()[-1]}")
    run = outputs / "runs" / "timed"
    config = (read_meta(run) or {})["config"]
    took = sum(v for row in json_lines(run / "steps.jsonl") for k, v in row.items() if k.startswith("sec_"))
    run.rename(run.with_name(f"timed-{len(list(run.parent.iterdir()))}"))
    return took, f"{config['threads']} / {config['graders']}"


def main(preset: str = "smoke", rounds: Count = 2, steps: Count = 8, busy: bool = True) -> None:
    """Time the defaults against fixed numbers of threads and of graders; a Markdown table.

    Args:
        preset: what is run.
        rounds: runs of each candidate.
        steps: steps of a run.
        busy: also beside one endless loop.
    """
    cores = sandbox.cores()
    fixed = [f"--threads={t} --graders={g}" for t in (1, cores) for g in (2, 2 * cores)]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        seconds(preset, ["--threads=1"], 1, Path(folder))  # fills the caches
        for loud in (False, True) if busy else (False,):
            found: dict[str, list[float]] = {name: [] for name in ("default", *fixed)}
            ran: dict[str, str] = {}
            with beside(loud):
                for round_ in range(rounds):
                    for name in found:
                        took, ran[name] = seconds(
                            preset, name.split() if name != "default" else [], steps, Path(folder)
                        )
                        found[name].append(took)
                        logger.info("{} round {} {}: {:.1f} s", "busy" if loud else "idle", round_ + 1, name, took)
            best = min(statistics.mean(times) for times in found.values())
            rows += [
                ("busy" if loud else "idle", name, ran[name], " ".join(f"{t:.1f}" for t in times),
                 f"{statistics.mean(times) / best:.2f}")
                for name, times in found.items()
            ]  # fmt: skip
    print(f"{preset}, {steps} steps, {cores} cores, load {os.getloadavg()[0]:.1f}")
    heads = ("machine", "flags", "threads / graders", "s", "over the best")
    print(tabulate(rows, headers=heads, tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    run_main(command(main))
