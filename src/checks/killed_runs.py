"""The runs that test_resume.py looks at: one without a stop, and one stopped or killed at each of ``KILLS`` in turn.

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


def die(number: int = signal.SIGKILL) -> None:
    os.kill(os.getpid(), number)


def in_the_first_evaluation() -> None:
    """Ctrl-C before there is a first step."""
    from projected_grpo import train

    evaluate = train.evaluate
    train.evaluate = lambda *words: (die(signal.SIGINT), evaluate(*words))[1]


def after_append(file: str, n: int, number: int = signal.SIGKILL) -> None:
    """Die when the n-th block of rows has been appended to a log, half a line behind it."""
    from projected_grpo.runs import RunRecord

    append, left = RunRecord.append, [n]

    def counting(self, name, rows):
        append(self, name, rows)
        left[0] -= name == file
        if name == file and not left[0]:
            with (self.folder / name).open("a") as log:
                log.write('{"step": 3, "rew')
            die(number)

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
    ("by Ctrl-C in the first evaluation", in_the_first_evaluation, 130),
    ("in the second checkpoint", lambda: in_checkpoint(2), -9),
    ("by SIGTERM in a step", lambda: after_append("steps.jsonl", 2, signal.SIGTERM), 143),
    ("after a step's log", lambda: after_append("steps.jsonl", 2), -9),
    ("while an old checkpoint goes", in_removal, -9),
    ("in the relearning attack", lambda: after_append("relearn.jsonl", 3), -9),
    ("before the folder is moved", in_finish, -9),
)


def forked(argv: list[str], kill=lambda: None) -> int:
    """Train in a fork; the status that it left with, -9 when it was killed."""
    from projected_grpo.command_line import run_main
    from projected_grpo.train import main

    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    kill()
    try:
        run_main(main, argv)
    except SystemExit as leaving:
        os._exit(leaving.code or 0)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)


def make_runs(outputs: str) -> dict[str, int]:
    """The runs "whole" and "killed", "halted": a copy of killed.part as the first kill left it, and "early": the same
    without its checkpoints. How each process ended. A resumed one is told the run's name, and nothing of its settings.
    """
    ended = {"whole": forked([*SMALL, f"--outputs={outputs}", "--name=whole", "--tracker=trackio"])}
    folder = Path(outputs) / "runs"
    for i, (where, kill, _) in enumerate(KILLS):
        words = ["--resume=killed"] if i else [*SMALL, "--name=killed"]
        ended[where] = forked([*words, f"--outputs={outputs}"], kill)
        if where == "in the second checkpoint":
            shutil.copytree(folder / "killed.part", folder / "halted.part")
            shutil.copytree(folder / "killed.part", folder / "early.part")
            shutil.rmtree(folder / "early.part" / "checkpoints")
    ended["last"] = forked([f"--resume={folder / 'killed.part'}"])
    return ended


if __name__ == "__main__":
    print(json.dumps(make_runs(sys.argv[1])))
