"""One command that proves the GPU path on a card, or its list of checks on a CPU: ``just gpu-check``.

    python -m projected_grpo.bench.gpu_check [--device=cpu --tiny]

``STEPS``, each in its own try and its own budget of seconds. A line is written as soon as it is made, to the terminal,
to outputs/gpu-check/report.jsonl and to a Markdown table beside it, so that a run that dies leaves what it had. Beside
a measurement stands the figure that the memory plan or this device's own roofline (step 1) has for it. Neither network
nor pretrained weights are needed: Qwen3-4B is built on the device with random ones; the organism is in the package.

The exit status is the number of steps that failed; 2 where there is no device, in one line.
"""

import gc
import json
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Literal, TextIO

import torch
from loguru import logger

from projected_grpo.bench import gpu_cost, gpu_right
from projected_grpo.bench.gpu_parts import REAL, TINY, Check, Row
from projected_grpo.command_line import command, run_main
from projected_grpo.config import UserError


@dataclass(frozen=True)
class Step:
    """A step of the check, and the seconds that it may take."""

    name: str
    run: Callable[[Check], Iterator[Row]]
    seconds: float


STEPS = (
    Step("1 device", gpu_cost.device, 30),
    Step("2 organism", gpu_right.organism, 60),
    Step("3 padding", gpu_right.padded, 30),
    Step("4 SVD", gpu_right.bases, 90),
    Step("5 model", gpu_cost.built, 60),
    Step("6 merge", gpu_cost.merged, 20),
    Step("7 decoding", gpu_cost.decoded, 80),
    Step("8 graph", gpu_cost.graphed, 60),
    Step("9 gradient", gpu_cost.gradient, 90),
    Step("10 log-probs", gpu_right.logprobs, 20),
    Step("11 full step", gpu_cost.whole_step, 50),
    Step("12 cache", gpu_cost.cached, 10),
)
"""600 s together."""

HEAD = "| step | what | measured | unit | beside it | ratio | |\n|---|---|---|---|---|---|---|\n"
SAID = {True: "ok", False: "FAILED", None: ""}


@dataclass
class Report:
    """The lines of a run, each on disk and on the terminal as soon as it is made."""

    lines: TextIO
    table: TextIO
    failed: int = 0

    def write(self, step: str, row: Row, seconds: float) -> None:
        """One line of a step, ``seconds`` after it began."""
        self.lines.write(json.dumps({"step": step} | asdict(row) | {"ratio": row.ratio, "at_s": seconds}) + "\n")
        value, beside, ratio = (number(x) for x in (row.value, row.beside, row.ratio))
        beside = f"{beside} ({row.source})" if beside else ""
        what = row.what.replace("|", r"\|")
        self.table.write(f"| {step} | {what} | {value} | {row.unit} | {beside} | {ratio} | {SAID[row.ok]} |\n")
        for file in (self.lines, self.table):
            file.flush()
        compared = f", {beside}{f', ratio {ratio}' if ratio else ''}" if beside else ""
        print(f"{step:<14} {SAID[row.ok]:<6} {row.what}: {value} {row.unit}".rstrip(": ") + compared, flush=True)


def number(x: float | None) -> str:
    """Three digits; nothing for None."""
    return "" if x is None else f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.3g}"


@contextmanager
def budget(seconds: float) -> Iterator[None]:
    """Raises TimeoutError inside once so much time is over, as soon as the interpreter has the word again."""

    def over(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"over its budget of {seconds:.0f} s")

    usual = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, usual)


def cleared(check: Check) -> Iterator[Row]:
    """Gives a step's memory back, once the device has done all of it: a kernel may fail after its step has ended."""
    gc.collect()
    if check.device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    yield from ()


def take(step: Step, check: Check, report: Report) -> bool:
    """One step with its lines; whether it passed: no line says that it did not, and nothing was raised."""
    name, seconds = step.name, step.seconds * check.size.patience
    began, passed = time.perf_counter(), True
    for part in (step.run, cleared):
        try:
            with budget(seconds):
                for row in part(check):
                    report.write(name, row, time.perf_counter() - began)
                    passed &= row.ok is not False
        except Exception as error:  # whatever it is, the steps after it are worth their minutes
            reason = next(iter(str(error).splitlines()), "")
            report.write(name, Row(f"{type(error).__name__}: {reason}", ok=False), time.perf_counter() - began)
            passed = False
    taken = time.perf_counter() - began
    report.write(name, Row("the whole step", taken, "s", seconds, "budget", passed), taken)
    return passed


def main(
    device: Literal["cuda", "cpu"] = "cuda",
    tiny: bool = False,
    outputs: str = "outputs",
) -> int:
    """Check the GPU path, write outputs/gpu-check, and say what a step of `full` costs.

    Args:
        device: cpu runs the same list on the CPU, which says whether the list itself works; it needs --tiny.
        tiny: small shapes: a minute at most on a CPU.
        outputs: where outputs/gpu-check and the caches are.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "no CUDA device here, nothing to check: `just gpu-check --device=cpu --tiny` runs the same list on the CPU"
        )
    if device == "cpu" and not tiny:
        raise UserError("Qwen3-4B is too large for a CPU: add --tiny")
    folder = Path(outputs) / "gpu-check"
    folder.mkdir(parents=True, exist_ok=True)
    check = Check(torch.device(device), TINY if tiny else REAL, folder)
    logger.disable("projected_grpo")  # a line of the report is a line
    try:
        with (folder / "report.jsonl").open("w") as lines, (folder / "report.md").open("w") as table:
            return take_all(check, Report(lines, table))
    finally:
        logger.enable("projected_grpo")


def take_all(check: Check, report: Report) -> int:
    """Every step, and what they say of a step of `full`; the number of those that failed."""
    report.table.write(HEAD)
    for step in STEPS:
        report.failed += not take(step, check, report)
    said = gpu_cost.full_step(check)
    report.table.write(f"\n{said}\n")
    print(f"{said}\n{report.failed} of {len(STEPS)} steps failed; {report.table.name} has the table")
    return report.failed


if __name__ == "__main__":
    run_main(command(main))
