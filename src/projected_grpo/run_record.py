"""A run's folder: what is written, when, and how it is moved into place.

A run is built in ``outputs/runs/<name>.part/`` and moved to ``outputs/runs/<name>/`` when it is complete. What was
logged before a kill stays readable in the .part folder, and ``--resume`` goes on from its last checkpoint. Files:

    meta.json                argv, config, versions, git commit, sandbox layers, V's quality, status
    steps.jsonl              a StepRow a line
    evals.jsonl              an EvalRow a line; eval_problems.jsonl: counts by problem
    relearn.jsonl            a StepRow a line, of a relearning attack
    rollouts.parquet         every rollout with its grade; while the run goes on, a file a step in rollouts.part/
    checkpoints/step-00025/  the last two; relearn-00025: of the relearning attack
"""

import fcntl
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from loguru import logger
from torch import Tensor

from projected_grpo import checkpoints, rollout_log, trackers
from projected_grpo.checkpoints import Checkpoint, Phase
from projected_grpo.config import Config, UserError

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
    meta, at = read_meta(folder), checkpoints.newest(folder)
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
        self.tracker = trackers.start(cfg.tracker, self.name, cfg, first, int(os.environ.get("RANK", "0")))

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
        checkpoints.forget_after(self.folder, at)

    def append(self, file: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append rows to a JSON-lines file, and flush."""
        with (self.folder / file).open("a") as f:
            f.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

    def rollouts(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write a step's rollouts down."""
        rollout_log.write_step(self.folder, step, rows)

    def checkpoint(self, phase: Phase, done: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Keep what is needed to go on after ``done`` steps of a phase, and how long the logs are at this moment."""
        logs = sorted(self.folder.glob("*.jsonl"))
        checkpoints.to_disk([*logs, *rollout_log.step_files(self.folder)])
        sizes = {path.name: path.stat().st_size for path in logs}
        checkpoints.write(self.folder, Checkpoint(phase, done, dict(tensors), {**state, "sizes": sizes}))

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
