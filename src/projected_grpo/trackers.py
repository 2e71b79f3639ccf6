"""``TRACKERS``: the logged numbers, sent to an experiment tracker through its own library. Offline by default.

The run's folder is the record; a tracker is a second view of it, which nothing here reads back.
"""

import importlib.util
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from projected_grpo.config import Config, UserError
from projected_grpo.evals import EvalRow

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


def require(kind: str) -> None:
    """Raises UserError when the tracker's library is not there."""
    package = TRACKERS[kind].package
    if package is not None and importlib.util.find_spec(package) is None:
        raise UserError(f"--tracker={kind} needs {package}: pip install {package}, or pip install -e '.[tracking]'")


def start(kind: str, name: str, cfg: Config, first_step: int = 0, rank: int = 0) -> Tracker:
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
