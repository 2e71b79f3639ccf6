"""A run's folder: its logs, its checkpoints, its trackers, and what of it a stopped run goes on from.

    outputs/runs/NAME.part/        while it runs, and when it was stopped; NAME/ when it is complete
      meta.json                    settings, commit, V; status running, stopped, failed or complete
      steps.jsonl, evals.jsonl …   a row a step, a row a rate
      rollouts.part/               a file a step (rollout_log)
      checkpoints/step-00025/      state.safetensors and state.json, the last two of a phase

A checkpoint is written beside its place and renamed into it, so one that has its name is whole.
"""

import fcntl
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from loguru import logger
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from projected_grpo import problems, rollout_log
from projected_grpo.command_line import program, stopped_folder
from projected_grpo.config import Config, UserError
from projected_grpo.rollout import EvalRow

# ------------------------------------------------------------------------------------------------------------- files


def to_disk(paths: Iterable[Path]) -> None:
    """Return when the files' (or folders') content will outlive a power cut."""
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Write to a temporary name, then replace: a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    to_disk([part])
    os.replace(part, path)


def write_json(path: Path, value: Any) -> None:
    """The same of a value."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False))


def read_meta(folder: Path) -> dict[str, Any] | None:
    """meta.json; None when it is not there or cannot be read."""
    try:
        return json.loads((folder / "meta.json").read_text())
    except (OSError, ValueError):
        return None


def json_lines(path: Path) -> list[dict[str, Any]]:
    """Rows of a run's log; [] when it is not there. Raises UserError naming the line that cannot be read."""
    return [row for _, row in problems.json_lines(path)] if path.exists() else []


# ------------------------------------------------------------------------------------------------------- checkpoints


Phase = Literal["step", "relearn"]
"""Training, or the relearning attack after it."""
PHASES: tuple[Phase, ...] = ("step", "relearn")
KEEP = 2


@dataclass(frozen=True)
class Checkpoint:
    """What a run needs to go on after ``done`` steps of a phase. state: whatever JSON holds; its "sizes" are the
    lengths of the logs at that moment.
    """

    phase: Phase
    done: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]

    @property
    def order(self) -> tuple[int, int]:
        """Which of two checkpoints is the later."""
        return PHASES.index(self.phase), self.done


def places(run: Path) -> list[tuple[Phase, int, Path]]:
    """The run's whole checkpoints, oldest first."""
    found = [(re.fullmatch(r"(step|relearn)-(\d+)", p.name), p) for p in (run / "checkpoints").glob("*")]
    named = [(match[1], int(match[2]), path) for match, path in found if match]
    return sorted(named, key=lambda place: (PHASES.index(place[0]), place[1]))


def remove_checkpoint(folder: Path) -> None:
    """Remove a checkpoint; killed on the way, what is left of it does not have its name any more."""
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    os.replace(folder, old)
    shutil.rmtree(old)


def write_checkpoint(run: Path, made: Checkpoint) -> Path:
    """Write a checkpoint and remove all of its phase but the last two; its folder."""
    folder = run / "checkpoints" / f"{made.phase}-{made.done:05d}"
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    save_file({n: t.contiguous().cpu() for n, t in made.tensors.items()}, part / "state.safetensors")
    (part / "state.json").write_text(json.dumps(made.state))
    to_disk([*part.iterdir(), part])
    if folder.exists():
        remove_checkpoint(folder)
    os.replace(part, folder)
    to_disk([folder.parent])
    for _, _, old in [place for place in places(run) if place[0] == made.phase][:-KEEP]:
        remove_checkpoint(old)
    return folder


def read_checkpoint(phase: Phase, done: int, folder: Path) -> Checkpoint:
    """One checkpoint. Raises UserError naming the file that cannot be read."""
    path = folder / "state.json"
    try:
        state = dict(json.loads(path.read_text()))
        path = folder / "state.safetensors"
        return Checkpoint(phase, done, load_file(path), state)
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read ({error})") from None


def newest_checkpoint(
    run: Path, phases: Iterable[Phase] = PHASES, fits: Callable[[Checkpoint], None] = lambda at: None
) -> Checkpoint | None:
    """The last checkpoint that can be read and used; None when there is none. fits: raises UserError for one that
    cannot be used. When there are some and none of them is of use, the oldest one's UserError is raised.
    """
    trouble = None
    for place in reversed([place for place in places(run) if place[0] in phases]):
        try:
            at = read_checkpoint(*place)
            fits(at)
            return at
        except UserError as error:
            logger.warning("{}: the checkpoint before it is tried", error)
            trouble = error
    if trouble is not None:
        raise trouble
    return None


def forget_after(run: Path, at: Checkpoint) -> None:
    """Remove what is later than ``at``, and what a kill left half-written."""
    for phase, done, folder in places(run):
        if (PHASES.index(phase), done) > at.order:
            remove_checkpoint(folder)
    for left in [*(run / "checkpoints").glob("*.part"), *(run / "checkpoints").glob("*.old")]:
        shutil.rmtree(left)


# ---------------------------------------------------------------------------------------------------------- trackers


PROJECT = "projected_grpo"


@runtime_checkable
class Tracker(Protocol):
    """Where numbers go."""

    def log(self, step: int, numbers: Mapping[str, float]) -> None: ...
    def close(self) -> None: ...


class Nothing:
    """No tracker."""

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        pass

    def close(self) -> None:
        pass


class TensorBoard:
    """Event files in ``outputs/tensorboard/<run>/``; what a resumed run does again is purged."""

    def __init__(self, name: str, cfg: Config, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = Path(cfg.outputs) / "tensorboard" / name
        self.writer = SummaryWriter(str(folder), purge_step=first_step or None)

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        for tag, value in numbers.items():
            self.writer.add_scalar(tag, value, step)

    def close(self) -> None:
        self.writer.close()


class Wandb:
    """wandb, and trackio, which has its interface. Offline: files in ``outputs/wandb/`` for `wandb sync` unless
    WANDB_MODE says otherwise; a database in ``outputs/trackio/`` (or TRACKIO_DIR) that `trackio show` opens.
    """

    def __init__(self, library: Literal["wandb", "trackio"], name: str, cfg: Config, first_step: int) -> None:
        os.environ.setdefault("TRACKIO_DIR", str(Path(cfg.outputs).resolve() / "trackio"))
        own = {"id": name, "dir": cfg.outputs, "mode": os.environ.get("WANDB_MODE", "offline")}
        self.run = importlib.import_module(library).init(
            project=PROJECT, name=name, resume="allow", config=asdict(cfg), **own if library == "wandb" else {}
        )

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        self.run.log(dict(numbers), step=step)

    def close(self) -> None:
        self.run.finish()


TRACKERS: dict[str, Callable[[str, Config, int], Tracker]] = {
    "none": lambda name, cfg, first_step: Nothing(),
    "tensorboard": TensorBoard,
    "wandb": partial(Wandb, "wandb"),
    "trackio": partial(Wandb, "trackio"),
}
"""By the name of the library that each needs."""


def require_tracker(kind: str) -> None:
    """Raises UserError when the tracker's library is not there."""
    if kind != "none" and importlib.util.find_spec(kind) is None:
        raise UserError(f"--tracker={kind} needs {kind}: pip install {kind}, or pip install -e '.[tracking]'")


def start_tracker(kind: str, name: str, cfg: Config, first_step: int = 0, rank: int = 0) -> Tracker:
    """The tracker of a run that logs from ``first_step`` on. Only rank 0 of several processes reports."""
    return TRACKERS[kind](name, cfg, first_step) if rank == 0 else Nothing()


def numbers_of(prefix: str, row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a logged row by tag; counts by mode are opened, and what is absent has no tag."""
    found: dict[str, float] = {}
    for name, value in row.items():
        if isinstance(value, Mapping):
            found |= numbers_of(f"{prefix}/{name}", value)
        elif isinstance(value, int | float) and name != "step":
            found[f"{prefix}/{name}"] = value
    return found


def numbers_of_evals(rows: Iterable[EvalRow]) -> dict[str, float]:
    """Each rate with the ends of its interval."""
    return {
        f"eval/{r.knobs}/{r.mode}/{r.metric}{end}": value
        for r in rows
        for end, value in (("", r.rate), ("_lo", r.lo), ("_hi", r.hi))
    }


# -------------------------------------------------------------------------------------------------------- the folder


PACKAGES = ("torch", "transformers", "safetensors", "tokenizers")


def git_commit() -> str | None:
    """The commit of the code that runs, with + when the tree is changed; None where it is in no repository of its own
    or there is no git.
    """
    here, git = Path(__file__).parent, partial(subprocess.run, capture_output=True, text=True)
    try:
        if git(["git", "ls-files", "--error-unmatch", Path(__file__).name], cwd=here).returncode:
            return None
        asked = git(["git", "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"], cwd=here)
    except FileNotFoundError:
        return None
    return asked.stdout.strip() or None if asked.returncode == 0 else None


def provenance(cfg: Config) -> dict[str, Any]:
    """What a reader needs to make the run again."""
    return {
        "argv": sys.argv,
        "config": asdict(cfg),
        "commit": git_commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "started": time.strftime("%Y-%m-%dT%H:%M:%S"),
    }


@dataclass(frozen=True)
class Stopped:
    """A run that was stopped, with the checkpoint to go on from."""

    folder: Path
    meta: dict[str, Any]
    at: Checkpoint


def stopped(cfg: Config) -> Stopped | None:
    """What --resume names, a run's name or its folder; None without. Raises UserError when it cannot be gone on with:
    it is not there, complete, damaged, or without a checkpoint. (That its settings are cfg's, parse has seen to.)
    """
    if cfg.resume is None:
        return None
    folder = stopped_folder(cfg.resume, cfg.outputs)
    meta = read_meta(folder)
    at = newest_checkpoint(folder, fits=lambda at: check_logs(folder, at, cfg))
    if meta is None or at is None:
        raise UserError(f"{folder} holds no checkpoint to go on from: remove it and start again without --resume")
    if meta.get("commit") != git_commit():
        begun = meta.get("commit") or "none that is known"
        logger.warning("{} was begun at commit {}, which this is not: numbers may differ", folder, begun)
    return Stopped(folder, meta, at)


def check_logs(folder: Path, at: Checkpoint, cfg: Config) -> None:
    """Raises UserError, naming the file, when the logs up to a checkpoint, or its own state, are not all there."""
    if lost := {"sizes", "scheduler", "refreshed"} - at.state.keys():
        raise UserError(f"{folder}: the state of {at.phase} {at.done} lacks {', '.join(sorted(lost))}")
    for name, size in at.state["sizes"].items():
        if not (folder / name).exists() or (folder / name).stat().st_size < size:
            raise UserError(f"{folder / name} is shorter than at {at.phase} {at.done}")
    spoiled = rollout_log.first_spoiled(folder, at.done if at.phase == "step" else cfg.rl.steps)
    if spoiled is not None:
        raise UserError(f"{spoiled} is missing or cannot be read, which {at.phase} {at.done} needs")


class RunRecord:
    """The folder of one run, open for appending. Use as a context manager: an exception leaves status "failed", and
    Ctrl-C or SIGTERM "stopped" with a checkpoint of the last step.

    ``resumed``: go on in that run's folder, its logs cut back to its checkpoint. Raises UserError when the folder
    cannot be made, the name is taken, or another process has the run open.
    """

    def __init__(self, cfg: Config, meta: Mapping[str, Any], resumed: Stopped | None = None) -> None:
        stamp = time.strftime("%Y%m%d-%H%M%S")
        self.name = cfg.name or f"{cfg.preset}-{cfg.intervention}-s{cfg.seed}-{stamp}"
        self.final = Path(cfg.outputs) / "runs" / self.name
        if resumed is not None:
            self.final = resumed.folder.with_name(resumed.folder.name.removesuffix(".part"))
            self.name = self.final.name
        elsewhere = "" if cfg.outputs == Config.outputs else f" --outputs={cfg.outputs}"
        self.go_on = f"{program()} --resume={self.name}{elsewhere}"
        self.folder = self.final.with_name(self.name + ".part")
        self.last: Checkpoint | None = None
        if self.final.exists():
            raise UserError(f"{self.final} is there already: choose another --name or remove it")
        try:
            self.folder.mkdir(parents=True, exist_ok=resumed is not None)
        except FileExistsError:
            raise UserError(
                f"{self.folder} is there: a run of that name is going on or was killed; go on with it by "
                f"--resume={self.name}, or remove it"
            ) from None
        self._lock = (self.folder / "lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{self.folder} is still running: wait, or stop that process first") from None
        self.meta = {"status": "running", **provenance(cfg), **meta}
        if resumed is not None:
            again = {"at": f"{resumed.at.phase} {resumed.at.done}"}
            again |= {k: self.meta[k] for k in ("argv", "commit", "started")}
            self.meta = {**resumed.meta, "status": "running", "resumed": [*resumed.meta.get("resumed", ()), again]}
            self.meta.pop("error", None)
            self._cut_back(resumed.at)
        write_json(self.folder / "meta.json", self.meta)
        first = 0 if resumed is None else resumed.at.done + (cfg.rl.steps if resumed.at.phase == "relearn" else 0)
        self.tracker = start_tracker(cfg.tracker, self.name, cfg, first, int(os.environ.get("RANK", "0")))

    def _cut_back(self, at: Checkpoint) -> None:
        """Forget what was logged after the checkpoint, half-written lines included."""
        sizes = at.state["sizes"]
        for path in self.folder.glob("*.jsonl"):
            if path.name in sizes:
                os.truncate(path, sizes[path.name])
            else:
                path.unlink()
        if at.phase == "step":
            rollout_log.cut(self.folder, at.done)
        forget_after(self.folder, at)

    def append(self, file: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append rows to a JSON-lines file, and flush."""
        with (self.folder / file).open("a") as f:
            f.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

    def rollouts(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write a step's rollouts down."""
        rollout_log.write_step(self.folder, step, rows)

    def checkpoint(
        self, phase: Phase, done: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any], write: bool
    ) -> None:
        """Keep what is needed to go on after ``done`` steps of a phase, and how long the logs are at this moment: on
        disk where ``write`` says so, else in memory until the next, for the case that the run is stopped.
        """
        sizes = {path.name: path.stat().st_size for path in sorted(self.folder.glob("*.jsonl"))}
        self.last = Checkpoint(phase, done, dict(tensors), {**state, "sizes": sizes})
        if write:
            self._write_last()

    def _write_last(self) -> None:
        if self.last is not None:
            to_disk([*(self.folder / name for name in self.last.state["sizes"]), *rollout_log.step_files(self.folder)])
            write_checkpoint(self.folder, self.last)
            self.last = None

    def finish(self) -> Path:
        """Mark the run complete and move its folder into place; the folder."""
        rollout_log.consolidate(self.folder)
        self.meta |= {"status": "complete", "finished": time.strftime("%Y-%m-%dT%H:%M:%S")}
        write_json(self.folder / "meta.json", self.meta)
        (self.folder / "lock").unlink()
        os.replace(self.folder, self.final)
        rollout_log.drop_parts(self.final)  # not before: a run that is stopped before it moved is resumed with them
        return self.final

    def __enter__(self) -> "RunRecord":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, KeyboardInterrupt) and self.folder.exists():
            self._write_last()
            self.meta |= {"status": "stopped"}
            write_json(self.folder / "meta.json", self.meta)
            error.add_note(f"{self.folder}; go on with it by: {self.go_on}")
        elif kind is not None and self.folder.exists():
            self.meta |= {"status": "failed", "error": f"{kind.__name__}: {error}"}
            write_json(self.folder / "meta.json", self.meta)
        self.tracker.close()
        self._lock.close()
