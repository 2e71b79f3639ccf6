"""Every submission of ``hostile``, under each way to confine it, as root and as an ordinary user."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import hostile
import pytest

from projected_grpo import sandbox
from projected_grpo.sandbox.layers import LAYERS


@pytest.fixture(scope="module")
def found() -> list[str]:
    """What went wrong with every layer in force."""
    return hostile.faults(hostile.ALL)


@pytest.mark.parametrize("row", hostile.ALL, ids=lambda row: row.name)
def test_it_gets_the_verdict_it_deserves(row, found):
    assert [line for line in found if line.startswith(f"{row.name}, in ")] == []


def test_nothing_outside_changes(found):
    assert [line for line in found if line.startswith("the folder outside")] == []


def test_verdicts_are_the_same_without_bubblewrap():
    """As root a user of its own stands in for it; as an ordinary user seccomp and Landlock are left."""
    assert hostile.faults(hostile.QUICK, [layer for layer in LAYERS if layer != "bubblewrap"]) == []


def open_to_others(*files: str) -> bool:
    """Whether any user may read these files."""
    folders = {folder for file in files for folder in Path(file).resolve().parents}
    return all(folder.stat().st_mode & 0o001 for folder in folders)


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("setpriv") is None, reason="only root can become someone else")
def test_verdicts_are_the_same_as_an_ordinary_user():
    """Where the interpreter or the checkout lies in root's home, that user may read everything and no more."""
    is_open = open_to_others(os.__file__, sys.executable, pytest.__file__, hostile.__file__, sandbox.__file__)
    rights = "-all" if is_open else "-all,+dac_read_search"
    become = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups"]
    become += [f"--inh-caps={rights}", f"--ambient-caps={rights}", f"--bounding-set={rights}"]
    command = [*become, sys.executable, str(Path(hostile.__file__)), "quick", "bubblewrap"]
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        environment = {**os.environ, "TMPDIR": folder, "HOME": folder, "PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)
        assert os.listdir(folder) == []
    said = done.stdout.splitlines()[-1:]
    assert (done.returncode, said) == (0, [f"{len(hostile.QUICK)} submissions, no fault"]), done.stdout + done.stderr
