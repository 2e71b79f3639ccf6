"""``just watch``: what is running now, how far it is, and when it will be done.

python -m projected_grpo.studies.watch [--outputs=outputs] [--every=10] [--once]
"""

import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import tyro
from tabulate import tabulate

from projected_grpo.command_line import command, run_main
from projected_grpo.config import Positive, choose
from projected_grpo.studies import run

RECENT = 10
"""Steps that a run's pace is the median of."""
STALLED = 8
"""A run that has been silent for so many steps' time (and over a minute) may have died."""
BAR = 10


def finished_lines(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSON-lines file that is being written: a last line without its end is not read yet."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].split("\n") if line]


def span(seconds: float | None) -> str:
    """ "45 s", "12 min", "3.4 h" or "9 d"."""
    if seconds is None:
        return "–"
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172_800 else f"{seconds / 86_400:.0f} d"


def bar(share: float) -> str:
    """A share as a bar of BAR characters."""
    full = round(BAR * share)
    return "█" * full + "·" * (BAR - full)


def short(name: str, most: int = 26) -> str:
    """A name, its beginning cut where it is too long: digest and seed stand at the end."""
    return name if len(name) <= most else "…" + name[1 - most :]


def run_state(folder: Path, now: float) -> dict[str, Any] | None:
    """How far an unfinished run is; None where its folder holds nothing that can be read."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
        steps, total = finished_lines(folder / "steps.jsonl"), int(meta["config"]["rl"]["steps"])
        started = datetime.fromisoformat(meta["started"]).timestamp()
        status = str(meta["status"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    seconds = [sum(v for k, v in s.items() if k.startswith("sec_")) for s in steps[-RECENT:]]
    pace = statistics.median(seconds) if seconds else None
    silent = now - max((f.stat().st_mtime for f in folder.iterdir()), default=now)
    if status == "running" and silent > max(60, STALLED * (pace or 60)):
        status = f"silent for {span(silent)}"
    left = None if pace is None or status != "running" else pace * (total - len(steps))
    return {
        "run": folder.name.removesuffix(".part"), "status": status, "done": len(steps), "total": total,
        "left": left, "for": now - started, "last": steps[-1] if steps else {},
    }  # fmt: skip


def study_rows(outputs: Path, running: Mapping[str, dict[str, Any]], names: Sequence[str]) -> list[tuple[str, ...]]:
    """Studies that have a run going on, or that are named: runs done, and when the rest will be.

    The rest: what is left of the running runs, and the missing ones at the mean length of the running, shared among
    as many as run now.
    """
    rows = []
    for s in run.STUDIES.values():
        mine = [running[j.name] for j in s.jobs if j.name in running]
        active = [r for r in mine if r["left"] is not None]
        if not active and s.name not in names:
            continue
        done = sum(run.status(job, outputs) == "done" for job in s.jobs)
        missing = len(s.jobs) - done - len(active)
        left = None
        if active:
            whole = [r["left"] / (r["total"] - r["done"]) * r["total"] for r in active if r["done"] < r["total"]]
            length = statistics.mean(whole) if whole else 0.0
            left = (sum(r["left"] for r in active) + missing * length) / len(active)
        share = done / len(s.jobs)
        rows.append((s.name, bar(share), f"{done}/{len(s.jobs)}", str(len(active)), span(left)))
    return rows


def picture(outputs: Path, names: Sequence[str] = (), now: float | None = None) -> str:
    """The whole screen, at most 100 columns wide."""
    now = time.time() if now is None else now
    states = [s for p in sorted((outputs / "runs").glob("*.part")) if (s := run_state(p, now))]
    rows = []
    for s in states:
        numbers = [s["last"].get(k) for k in ("hack_s", "attempt_s", "solve_s", "cin", "norm_delta")]
        cells = ["–" if x is None else f"{x:.2f}" for x in numbers]
        told = span(s["left"]) if s["status"] == "running" else s["status"]
        rows.append((short(s["run"]), bar(s["done"] / s["total"]), f"{s['done']}/{s['total']}", told, *cells))
    headers = ("run", "", "step", "left", "hack↓", "att↓", "solve↑", "cin", "‖δS‖")
    parts = [time.strftime("%H:%M:%S", time.localtime(now))]
    parts.append(
        tabulate(rows, headers=headers, disable_numparse=True) if rows else f"nothing runs in {outputs / 'runs'}"
    )
    if rows:
        parts[-1] += "\nhack, att, solve: shares of rollouts, 0 to 1; cin: share of the gradient; ‖δS‖: a norm"
    if studies := study_rows(outputs, {s["run"]: s for s in states}, names):
        parts.append(tabulate(studies, headers=("study", "", "done", "running", "left"), disable_numparse=True))
    return "\n\n".join(parts)


def main(
    names: tyro.conf.Positional[tuple[str, ...]] = (),
    outputs: str = "outputs",
    every: Positive = 10.0,
    once: bool = False,
) -> None:
    """Show the running runs and their studies, and the named studies, again every few seconds until interrupted."""
    for name in names:
        choose("study", name, list(run.STUDIES))
    while True:
        screen = picture(Path(outputs), names)
        clear = "\033[H\033[J" if sys.stdout.isatty() else ""
        print(screen if once else f"{clear}{screen}\n\nevery {every:g} s; Ctrl-C ends", flush=True)
        if once:
            return
        try:
            time.sleep(every)
        except KeyboardInterrupt:
            return


if __name__ == "__main__":
    run_main(command(main))
