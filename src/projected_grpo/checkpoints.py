"""Checkpoints on disk: folders ``checkpoints/step-00025/`` of state.safetensors and state.json, the last two kept.

A checkpoint is written beside its place and renamed into it, so one that has its name is whole.
"""

import json
import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from loguru import logger
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

Phase = Literal["step", "relearn"]
"""Training, or the relearning attack after it."""
PHASES: tuple[Phase, ...] = ("step", "relearn")
KEEP = 2


@dataclass(frozen=True)
class Checkpoint:
    """What a run needs to go on after ``done`` steps of a phase. state: whatever JSON holds."""

    phase: Phase
    done: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]


def to_disk(paths: Iterable[Path]) -> None:
    """Return when the files' (or folders') content will outlive a power cut."""
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def places(run: Path) -> list[tuple[Phase, int, Path]]:
    """The run's whole checkpoints, oldest first."""
    found = [(re.fullmatch(r"(step|relearn)-(\d+)", p.name), p) for p in (run / "checkpoints").glob("*")]
    named = [(match[1], int(match[2]), path) for match, path in found if match]
    return sorted(named, key=lambda place: (PHASES.index(place[0]), place[1]))


def remove(folder: Path) -> None:
    """Remove a checkpoint; killed on the way, what is left of it does not have its name any more."""
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    os.replace(folder, old)
    shutil.rmtree(old)


def write(run: Path, made: Checkpoint) -> Path:
    """Write a checkpoint and remove all of its phase but the last two; its folder."""
    folder = run / "checkpoints" / f"{made.phase}-{made.done:05d}"
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    save_file({n: t.contiguous().cpu() for n, t in made.tensors.items()}, part / "state.safetensors")
    (part / "state.json").write_text(json.dumps(made.state))
    to_disk([*part.iterdir(), part])
    os.replace(part, folder)
    to_disk([folder.parent])
    for _, _, old in [place for place in places(run) if place[0] == made.phase][:-KEEP]:
        remove(old)
    return folder


def newest(run: Path, phases: Iterable[Phase] = PHASES) -> Checkpoint | None:
    """The last checkpoint that can be read; None when there is none."""
    for phase, done, folder in reversed([place for place in places(run) if place[0] in phases]):
        try:
            state = json.loads((folder / "state.json").read_text())
            return Checkpoint(phase, done, load_file(folder / "state.safetensors"), state)
        except (OSError, ValueError, SafetensorError) as error:
            logger.warning("{} cannot be read, the one before it is tried: {}", folder, error)
    return None


def forget_after(run: Path, at: Checkpoint) -> None:
    """Remove what is later than ``at``, and what a kill left half-written."""
    now = (PHASES.index(at.phase), at.done)
    for phase, done, folder in places(run):
        if (PHASES.index(phase), done) > now:
            remove(folder)
    for left in [*(run / "checkpoints").glob("*.part"), *(run / "checkpoints").glob("*.old")]:
        shutil.rmtree(left)
