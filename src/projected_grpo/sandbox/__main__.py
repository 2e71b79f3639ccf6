"""Runs the canaries and prints the layers in force: ``python -m projected_grpo.sandbox``."""

from collections.abc import Mapping
from typing import Any

from tabulate import tabulate

from projected_grpo.command_line import command, run_main
from projected_grpo.sandbox import Sandbox


def table(found: Mapping[str, Any]) -> str:
    """The layers in force and what the canaries met, as text."""
    layers = tabulate(found["layers"].items(), headers=("layer", "state"))
    held = {True: "held", False: "GOT THROUGH"}
    acts = [(act, held[met.startswith("refused")], met) for act, met in found["canaries"].items()]
    return f"{layers}\n\n{tabulate(acts, headers=('a submission tries', '', 'and meets'))}"


def main(allow_unsandboxed_grading: bool = False) -> int:
    """Print the sandbox's layers; 0 if submissions can be graded safely here.

    Args:
        allow_unsandboxed_grading: say what holds even where neither seccomp nor a namespace does.
    """
    with Sandbox(workers=1, allow_unsandboxed=allow_unsandboxed_grading) as sandbox:
        print(table(sandbox.layers))
        return 0 if all(met.startswith("refused") for met in sandbox.layers["canaries"].values()) else 1


if __name__ == "__main__":
    run_main(command(main))
