"""The runs that test_resume.py looks at: one without a stop, and one killed at each of ``KILLS`` in turn.

    python killed_runs.py OUTPUTS

Each is a fork of one process, so that imports are paid once. Not forks of pytest's process: once a process has run a
backward pass, its forks cannot.
"""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

SMALL = [
    "organism", "--intervention=route", "--pairs=organism8", "--known-modes", "run_tests", "stdout_marker",
    "--refresh-pairs=both", "--refresh-every=2", "--steps=5", "--relearn-steps=3", "--checkpoint-every=2",
    "--eval-every=4", "--prompts-per-step=4", "--group=4", "--max-new=48", "--n-eval=1", "--eval-samples=1",
    "--graders=1", "--threads=1",
]  # fmt: skip


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def after_append(file: str, n: int) -> None:
    """Die when the n-th block of rows has been appended to a log, half a line behind it."""
    from projected_grpo.runs import RunRecord

    append, left = RunRecord.append, [n]

    def counting(self, name, rows):
        append(self, name, rows)
        left[0] -= name == file
        if name == file and not left[0]:
            with (self.folder / name).open("a") as log:
                log.write('{"step": 3, "rew')
            die()

    RunRecord.append = counting


def in_checkpoint(n: int) -> None:
    """Die when half of the n-th checkpoint's tensors are written."""
    from projected_grpo import runs

    save_file, left = runs.save_file, [n]

    def torn(tensors, path):
        save_file(tensors, path)
        left[0] -= 1
        if not left[0]:
            os.truncate(path, path.stat().st_size // 2)
            die()

    runs.save_file = torn


def in_removal() -> None:
    """Die when an old checkpoint is half removed."""
    from projected_grpo import runs

    def half(folder):
        old = folder.with_name(folder.name + ".old")
        os.replace(folder, old)
        (old / "state.json").unlink()
        die()

    runs.remove_checkpoint = half


def in_finish() -> None:
    """Die when the run is marked complete and not yet moved."""
    from projected_grpo import runs

    write_json = runs.write_json

    def last(path, value):
        write_json(path, value)
        if value["status"] == "complete":
            die()

    runs.write_json = last


KILLS = (
    ("in the second checkpoint", lambda: in_checkpoint(2)),
    ("after a step's log", lambda: after_append("steps.jsonl", 3)),
    ("while an old checkpoint goes", in_removal),
    ("in the relearning attack", lambda: after_append("relearn.jsonl", 3)),
    ("before the folder is moved", in_finish),
)


def forked(argv: list[str], kill=lambda: None) -> int:
    """Train in a fork; how it ended, as waitpid says it: 0, or 9 when it was killed."""
    from projected_grpo.command_line import parse
    from projected_grpo.train import train

    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    kill()
    try:
        train(parse(argv))
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)


def make_runs(outputs: str) -> dict[str, int]:
    """The runs "whole" and "killed", "halted": a copy of killed.part as the first kill left it, and "early": the same
    without its checkpoint. How each process ended.
    """
    common = [*SMALL, f"--outputs={outputs}"]
    ended = {"whole": forked([*common, "--name=whole", "--tracker=trackio"])}
    folder = Path(outputs) / "runs"
    for i, (where, kill) in enumerate(KILLS):
        ended[where] = forked([*common, "--resume=killed" if i else "--name=killed"], kill)
        if not i:
            shutil.copytree(folder / "killed.part", folder / "halted.part")
            shutil.copytree(folder / "killed.part", folder / "early.part")
            shutil.rmtree(folder / "early.part" / "checkpoints" / "step-00002")
    ended["last"] = forked([*common, f"--resume={folder / 'killed.part'}"])
    return ended


if __name__ == "__main__":
    print(json.dumps(make_runs(sys.argv[1])))
