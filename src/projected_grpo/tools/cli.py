"""The command that the package installs: ``projected-grpo PRESET`` trains, ``projected-grpo COMMAND`` does the rest.

A command is a module's own entry point, by the name of its recipe: ``just report`` in a checkout is
``projected-grpo report`` where there is none.
"""

import runpy
import sys
from collections.abc import Sequence

from projected_grpo.command_line import run_main
from projected_grpo.config import PRESETS, choose

COMMANDS = {
    "train": ("train", "one run of a preset; the word may be left out"),
    "results": ("studies.results", "one table over all finished runs"),
    "report": ("report.page", "one HTML file of a run, several runs or a study"),
    "figures": ("report.figures", "a study's figures, for pages and papers"),
    "watch": ("studies.watch", "what runs now, and when it is done"),
    "study": ("studies.run", "list the studies, or run what one of them misses"),
    "summaries": ("studies.summaries", "finished runs of studies as the small summaries that are kept"),
    "results-docs": ("studies.results_docs", "the tables of the docs from kept summaries, or what is stale"),
    "export": ("tools.export", "a finished run as a plain Hugging Face folder"),
    "grade": ("tools.grade", "what a rollouts file did, by mode, as a table and one HTML page"),
    "grader-table": ("rewards", "what pays in which mode; with files, grade them"),
    "sandbox": ("sandbox", "which layers of the sandbox hold on this machine"),
    "memory": ("memory", "what a preset needs of the device's memory"),
    "extract": ("extract_vhack_grad", "the hack direction of a preset, module by module"),
    "build-pool": ("tools.build_pool", "a teacher pool for a preset"),
    "convert-pool": ("tools.import_pool", "a pool in the wild, checked and converted"),
    "sync-external": ("tools.external", "clone the benchmark at its pinned commit"),
    "verify-external": ("tools.verify_external", "our grader beside the benchmark's own evaluator"),
    "judge-pairs": ("tools.judge_pairs", "how well pair sets tell hacks among a run's first rollouts"),
    "base-report": ("tools.base_report", "what a preset's model can do before training"),
    "trl": ("scale.trl_trainer", "a run inside TRL's trainer (extra trl)"),
    "organism": ("organism.build", "rebuild the embedded tiny model, or a larger one"),
    "bench": ("bench.bench", "where a step's time goes (extra bench)"),
    "gpu-check": ("bench.gpu_check", "whether the GPU path works, and what a step of `full` costs"),
    "bench-memory": ("bench.memory", "what the loss needs of memory, ours and that of full logits"),
    "bench-threads": ("bench.threads", "whether the default numbers of threads and graders are right"),
    "bench-grading": ("bench.grading", "what grading costs, and whether it holds out"),
}
"""Word -> module, and what it does."""


def usage() -> str:
    """The commands and the presets, a line each."""
    presets = [f"  {name:<15} {text}" for name, (text, _) in PRESETS.items()]
    commands = [f"  {name:<15} {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        (
            "usage: projected-grpo PRESET [--setting=value ...]",
            "       projected-grpo COMMAND ...",
            "",
            "presets (PRESET --help lists every setting):",
            *presets,
            "",
            "commands (COMMAND --help says more):",
            *commands,
        )
    )


def main(argv: Sequence[str]) -> int:
    """Hand over to the command's own entry point, which ends the process."""
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0 if argv else 2
    name, rest = (argv[0], argv[1:]) if argv[0] in COMMANDS else ("train", argv)
    if rest is argv and not argv[0].startswith("-"):
        choose("preset or command", argv[0], [*PRESETS, *COMMANDS])
    sys.argv = [f"projected-grpo {name}", *rest]
    runpy.run_module(f"projected_grpo.{COMMANDS[name][0]}", run_name="__main__")
    return 0


def script() -> None:
    """What the console script calls."""
    run_main(main)
