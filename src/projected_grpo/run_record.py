"""A run's folder: what is written, when, and how it is moved into place.

A run is built in ``outputs/runs/<name>.part/`` and moved to ``outputs/runs/<name>/`` when it is complete. What was
logged before a kill stays readable in the .part folder. Files:

    meta.json          argv, config, versions, git commit, sandbox layers, V's quality, status
    steps.jsonl        a StepRow a line
    evals.jsonl        an EvalRow a line
    rollouts.jsonl     every rollout with its grade
    checkpoint.safetensors   knobs and optimizer moments of the last checkpoint
"""

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from projected_grpo.config import Config, UserError

PACKAGES = ("torch", "transformers", "safetensors", "tokenizers")


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


class RunRecord:
    """The folder of one run, open for appending. Use as a context manager: an exception leaves status "failed".

    Raises UserError when the folder cannot be made or the name is taken.
    """

    def __init__(self, cfg: Config, meta: Mapping[str, Any]) -> None:
        stamp = time.strftime("%Y%m%d-%H%M%S")
        self.name = cfg.name or f"{cfg.preset}-{cfg.intervention}-s{cfg.seed}-{stamp}"
        self.final = Path(cfg.outputs) / "runs" / self.name
        self.folder = self.final.with_name(self.name + ".part")
        if self.final.exists():
            raise UserError(f"{self.final} is there already: choose another --name or remove it")
        try:
            self.folder.mkdir(parents=True)
        except FileExistsError:
            raise UserError(
                f"{self.folder} is there: a run of that name is going on or was killed; remove it"
            ) from None
        self.meta = {"status": "running", **provenance(cfg), **meta}
        write_json(self.folder / "meta.json", self.meta)

    def append(self, file: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append rows to a JSON-lines file, and flush."""
        with (self.folder / file).open("a") as f:
            f.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

    def checkpoint(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Keep the tensors of the last checkpoint, replaced atomically."""
        part = self.folder / "checkpoint.part"
        save_file({n: t.contiguous().cpu() for n, t in tensors.items()}, part, metadata={"step": str(step)})
        os.replace(part, self.folder / "checkpoint.safetensors")

    def finish(self, **summary: Any) -> Path:
        """Mark the run complete and move its folder into place; the folder."""
        self.meta |= {"status": "complete", "finished": time.strftime("%Y-%m-%dT%H:%M:%S"), **summary}
        write_json(self.folder / "meta.json", self.meta)
        os.replace(self.folder, self.final)
        return self.final

    def __enter__(self) -> "RunRecord":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if kind is not None:
            self.meta |= {"status": "failed", "error": f"{kind.__name__}: {error}"}
            write_json(self.folder / "meta.json", self.meta)
