"""The benchmark's own repository beside ours: cloned at a pinned commit, never modified, never committed.

python -m projected_grpo.tools.external            clone it, or say that it is there (`just sync-external`)
"""

import os
import shutil
import subprocess
from pathlib import Path
from typing import Literal

from loguru import logger

from projected_grpo.command_line import command, run_main
from projected_grpo.config import UserError

URL = "https://github.com/ariahw/rl-rewardhacking"
COMMIT = "bf5cdb8d1a047032a9e23e00272aab938b12354b"
FOLDER = Path("external/rl-rewardhacking")
FILES: dict[Literal["train", "test", "holdout"], str] = {
    "train": "results/data/leetcode_train_medhard_filtered.jsonl",
    "test": "results/data/leetcode_test_medhard.jsonl",
    "holdout": "results/data/leetcode_train_medhard_holdout.jsonl",
}
"""The benchmark's problem files, by split; presets name train as --problems and test as --eval-problems."""


def git(folder: Path, *words: str) -> str:
    """What git prints. Raises CalledProcessError, or TimeoutExpired after ten minutes; never asks for a password."""
    env = os.environ | {"GIT_TERMINAL_PROMPT": "0"}
    command = ["git", "-C", str(folder), *words]
    return subprocess.run(command, check=True, capture_output=True, text=True, env=env, timeout=600).stdout.strip()


def state(folder: Path, commit: str = COMMIT) -> str | None:
    """What is wrong with the checkout in ``folder``: None when it is the pinned commit, unmodified."""
    if not (folder / ".git").exists():
        return f"{folder} is no git checkout"
    try:
        head, changed = git(folder, "rev-parse", "HEAD"), git(folder, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError) as error:
        return f"git cannot read {folder}: {error}"
    if head != commit:
        return f"{folder} is at {head[:12]}, not at the pinned {commit[:12]}"
    return f"{folder} was modified: {changed.splitlines()[0].strip()}" if changed else None


def sync(folder: Path = FOLDER, url: str = URL, commit: str = COMMIT) -> bool:
    """Have the pinned commit in ``folder``. Returns whether it had to be fetched.

    Fetched beside it and moved into place when complete. Raises UserError when something else is there, or when it
    cannot be had.
    """
    if folder.exists():
        wrong = state(folder, commit)
        if wrong:
            raise UserError(f"{wrong}; remove {folder} and run `just sync-external` again")
        return False
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)  # of an attempt that failed
    part.mkdir(parents=True)
    try:
        git(part, "init", "--quiet")
        git(part, "fetch", "--quiet", "--depth=1", url, commit)
        git(part, "-c", "advice.detachedHead=false", "checkout", "--quiet", "FETCH_HEAD")
    except FileNotFoundError:
        raise UserError("git is not installed: install it, then run `just sync-external` again") from None
    except subprocess.TimeoutExpired:
        raise UserError(f"{url} did not answer within ten minutes: run `just sync-external` again") from None
    except subprocess.CalledProcessError as error:
        shutil.rmtree(part)
        lines = (error.stderr or "").strip().splitlines()
        raise UserError(
            f"cannot fetch {url}: {lines[-1] if lines else 'git failed'}. Offline? Copy a checkout of commit "
            f"{commit[:12]} to {folder}, or name problem files with --problems=FILE --eval-problems=FILE"
        ) from None
    part.replace(folder)
    return True


def main() -> None:
    """Clone, and say what is there."""
    fetched = sync()
    logger.info("{} {} at {}", FOLDER, "fetched" if fetched else "is there", COMMIT[:12])
    for split, name in FILES.items():
        logger.info("{:8} {}{}", split, FOLDER / name, "" if (FOLDER / name).is_file() else "   MISSING")


if __name__ == "__main__":
    run_main(command(main))
