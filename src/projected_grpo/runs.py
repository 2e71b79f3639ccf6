"""Checkpoints on disk: folders ``checkpoints/step-00025/`` of state.safetensors and state.json, the last two kept.

A checkpoint is written beside its place and renamed into it, so one that has its name is whole.
"""

import fcntl
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
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from loguru import logger
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from projected_grpo import problems, rollout_log
from projected_grpo.config import Config, UserError
from projected_grpo.evals import EvalRow

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
    os.replace(part, folder)
    to_disk([folder.parent])
    for _, _, old in [place for place in places(run) if place[0] == made.phase][:-KEEP]:
        remove_checkpoint(old)
    return folder


def newest_checkpoint(run: Path, phases: Iterable[Phase] = PHASES) -> Checkpoint | None:
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
            remove_checkpoint(folder)
    for left in [*(run / "checkpoints").glob("*.part"), *(run / "checkpoints").glob("*.old")]:
        shutil.rmtree(left)


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
    """Files in ``outputs/wandb/`` for `wandb sync`, unless WANDB_MODE says otherwise."""

    def __init__(self, name: str, cfg: Config, first_step: int) -> None:
        import wandb

        self.run = wandb.init(
            project=PROJECT, name=name, id=name, resume="allow", config=asdict(cfg), dir=cfg.outputs,
            mode=os.environ.get("WANDB_MODE", "offline"),
        )  # fmt: skip

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        self.run.log(dict(numbers), step=step)

    def close(self) -> None:
        self.run.finish()


class Trackio:
    """A database in ``outputs/trackio/`` (or TRACKIO_DIR) that `trackio show` opens."""

    def __init__(self, name: str, cfg: Config, first_step: int) -> None:
        os.environ.setdefault("TRACKIO_DIR", str(Path(cfg.outputs).resolve() / "trackio"))
        import trackio

        self.run = trackio.init(project=PROJECT, name=name, resume="allow", config=asdict(cfg))

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        self.run.log(dict(numbers), step=step)

    def close(self) -> None:
        self.run.finish()


@dataclass(frozen=True)
class Row:
    """package: what has to be installed. open: (run's name, config, first step) -> Tracker."""

    package: str | None
    open: Callable[[str, Config, int], Tracker]


TRACKERS: dict[str, Row] = {
    "none": Row(None, lambda name, cfg, first_step: Nothing()),
    "tensorboard": Row("tensorboard", TensorBoard),
    "wandb": Row("wandb", Wandb),
    "trackio": Row("trackio", Trackio),
}


def require_tracker(kind: str) -> None:
    """Raises UserError when the tracker's library is not there."""
    package = TRACKERS[kind].package
    if package is not None and importlib.util.find_spec(package) is None:
        raise UserError(f"--tracker={kind} needs {package}: pip install {package}, or pip install -e '.[tracking]'")


def start_tracker(kind: str, name: str, cfg: Config, first_step: int = 0, rank: int = 0) -> Tracker:
    """The tracker of a run that logs from ``first_step`` on. Only rank 0 of several processes reports."""
    return TRACKERS[kind].open(name, cfg, first_step) if rank == 0 else Nothing()


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


PACKAGES = ("torch", "transformers", "safetensors", "tokenizers")
FREE = frozenset(("name", "outputs", "resume", "tracker", "checkpoint_every", "graders"))
"""Settings that may differ when a run is resumed: none of them changes a logged number."""


def git_commit() -> str | None:
    """The commit of the code that runs, with + when the tree is changed; None outside a checkout."""
    here = Path(__file__).parent
    asked = subprocess.run(
        ["git", "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"],
        cwd=here,
        capture_output=True,
        text=True,
    )
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


def write_json(path: Path, value: Any) -> None:
    """Write to a temporary name, then replace: a reader never sees half a file."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(value, indent=1, ensure_ascii=False))
    os.replace(part, path)


def read_meta(folder: Path) -> dict[str, Any] | None:
    """meta.json; None when it is not there or cannot be read."""
    try:
        return json.loads((folder / "meta.json").read_text())
    except (OSError, ValueError):
        return None


@dataclass(frozen=True)
class Stopped:
    """A run that was stopped, with the checkpoint to go on from."""

    folder: Path
    meta: dict[str, Any]
    at: Checkpoint


def settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config as JSON holds it, groups opened: field names are unique over all groups."""
    plain = json.loads(json.dumps(config))
    groups = {k: v if isinstance(v, dict) else {k: v} for k, v in plain.items()}
    return {name: value for group in groups.values() for name, value in group.items()}


def stopped(cfg: Config) -> Stopped | None:
    """What --resume names, a run's name or its folder; None without. Raises UserError when it cannot be gone on with:
    it is not there, complete, without a checkpoint, or was made with other settings.
    """
    if cfg.resume is None:
        return None
    runs, named = Path(cfg.outputs) / "runs", Path(cfg.resume)
    final = named.with_name(named.name.removesuffix(".part"))
    final = final if len(final.parts) > 1 else runs / final
    folder = final.with_name(final.name + ".part")
    if not folder.is_dir():
        told = "is complete: nothing is left to do" if final.is_dir() else "is not there: name a stopped run"
        raise UserError(f"--resume={cfg.resume}: {final} {told}")
    meta, at = read_meta(folder), newest_checkpoint(folder)
    if meta is None or at is None:
        raise UserError(f"{folder} holds no checkpoint to go on from: remove it and start again without --resume")
    # a setting that the run's code did not have yet stood at its default
    before, now = settings(asdict(Config())) | settings(meta["config"]), settings(asdict(cfg))
    for name in sorted((before.keys() | now.keys()) - FREE):
        if before.get(name) != now.get(name):
            raise UserError(
                f"--{name.replace('_', '-')} is {now.get(name)} here and was {before.get(name)} in {folder}: resume "
                f"with that run's settings: {' '.join(meta['argv'][1:])}"
            )
    if meta["commit"] != git_commit():
        logger.warning("{} was begun at commit {}, which this is not: numbers may differ", folder, meta["commit"])
    return Stopped(folder, meta, at)


class RunRecord:
    """The folder of one run, open for appending. Use as a context manager: an exception leaves status "failed".

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
        self.folder = self.final.with_name(self.name + ".part")
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
            if path.name not in sizes:
                path.unlink()
            elif path.stat().st_size < sizes[path.name]:
                raise UserError(f"{path} is shorter than at the checkpoint: the run is damaged, start it again")
            else:
                os.truncate(path, sizes[path.name])
        if at.phase == "step":
            rollout_log.cut(self.folder, at.done)
        forget_after(self.folder, at)

    def append(self, file: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append rows to a JSON-lines file, and flush."""
        with (self.folder / file).open("a", encoding="utf-8") as f:
            f.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

    def rollouts(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write a step's rollouts down."""
        rollout_log.write_step(self.folder, step, rows)

    def checkpoint(self, phase: Phase, done: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Keep what is needed to go on after ``done`` steps of a phase, and how long the logs are at this moment."""
        logs = sorted(self.folder.glob("*.jsonl"))
        to_disk([*logs, *rollout_log.step_files(self.folder)])
        sizes = {path.name: path.stat().st_size for path in logs}
        write_checkpoint(self.folder, Checkpoint(phase, done, dict(tensors), {**state, "sizes": sizes}))

    def finish(self, **summary: Any) -> Path:
        """Mark the run complete and move its folder into place; the folder."""
        rollout_log.consolidate(self.folder)
        self.meta |= {"status": "complete", "finished": time.strftime("%Y-%m-%dT%H:%M:%S"), **summary}
        write_json(self.folder / "meta.json", self.meta)
        (self.folder / "lock").unlink()
        os.replace(self.folder, self.final)
        rollout_log.drop_parts(self.final)  # not before: a run that is stopped before it moved is resumed with them
        return self.final

    def __enter__(self) -> "RunRecord":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if kind is not None and self.folder.exists():
            self.meta |= {"status": "failed", "error": f"{kind.__name__}: {error}"}
            write_json(self.folder / "meta.json", self.meta)
        self.tracker.close()
        self._lock.close()


def json_lines(path: Path) -> list[dict[str, Any]]:
    """Rows of a run's log; [] when it is not there. Raises UserError naming the line that cannot be read."""
    return [row for _, row in problems.json_lines(path)] if path.exists() else []
