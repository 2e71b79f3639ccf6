"""``just gpu-check``: the whole list on a CPU, in an image that lacks everything optional; what its runner promises."""

import json
import os
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

from projected_grpo.bench import gpu_check, gpu_cost
from projected_grpo.bench.gpu_check import Step
from projected_grpo.bench.gpu_parts import Row
from projected_grpo.config import UserError

BARE = ["torch", "transformers", "tyro", "loguru", "beartype", "jaxtyping", "einops", "polars"]
"""What a bare image with a GPU has, beside what these need themselves."""


def bare_site(folder: Path) -> Path:
    """A folder of links to the packages ``BARE`` and what they require."""
    todo, seen = list(BARE), set()
    while todo:
        name = todo.pop().lower().replace("_", "-")
        if name in seen:
            continue
        seen.add(name)
        try:
            found = distribution(name)
        except PackageNotFoundError:  # for another platform
            continue
        for part in {file.parts[0] for file in found.files or ()} - {"..", "__pycache__"}:
            if not (folder / part).exists():
                (folder / part).symlink_to(Path(str(found.locate_file(part))).resolve())
        asked = map(Requirement, found.requires or ())
        todo += [r.name for r in asked if r.marker is None or r.marker.evaluate({"extra": ""})]
    return folder


def test_every_step_passes_on_a_cpu_with_what_a_bare_image_has(tmp_path):
    site = bare_site(tmp_path)
    assert not {"pyarrow", "scipy", "tabulate"} & {p.name for p in site.iterdir()}
    path = os.pathsep.join((str(site), str(Path(gpu_check.__file__).parents[2])))
    command = [sys.executable, "-S", "-m", "projected_grpo.bench.gpu_check", "--device=cpu", "--tiny"]
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    folder = tmp_path / "outputs" / "gpu-check"
    lines = [json.loads(line) for line in (folder / "report.jsonl").read_text().splitlines()]
    last = {line["step"]: line for line in lines}
    assert list(last) == [step.name for step in gpu_check.STEPS]
    assert all((line["what"], line["ok"]) == ("the whole step", True) for line in last.values())
    table = (folder / "report.md").read_text()
    assert table.count("| ok |") == sum(line["ok"] is True for line in lines) > 40
    said = done.stdout.splitlines()[-2]
    assert said in table
    assert said.startswith("a step of `full` (tiny shapes)")
    assert "200 steps" in said


def test_steps_that_fail_are_counted_and_leave_what_they_had(tmp_path, monkeypatch, capsys):
    def raises(check):
        yield Row("before", 1.0, "s", 2.0, "plan")
        assert "before" in (check.folder / "report.jsonl").read_text()  # written as it was made
        assert "| before | 1 | s | 2 (plan) | 0.5 | |" in (check.folder / "report.md").read_text().replace("  ", " ")
        raise ValueError("two\nlines")

    def slow(check):
        yield Row("begun")
        time.sleep(5)

    def wrong(check):
        yield Row("a limit", 2.0, "", 1.0, "at most", False)
        yield Row("after it")

    def right(check):
        yield Row("measured", 3.0)

    steps = (Step("1", raises, 9), Step("2", slow, 0.1), Step("3", wrong, 9), Step("4", right, 9))
    monkeypatch.setattr(gpu_check, "STEPS", steps)
    assert gpu_check.main("cpu", True, str(tmp_path)) == 3
    lines = [json.loads(line) for line in (tmp_path / "gpu-check" / "report.jsonl").read_text().splitlines()]
    passed = {line["step"]: line["ok"] for line in lines if line["what"] == "the whole step"}
    assert passed == {"1": False, "2": False, "3": False, "4": True}
    said = [line["what"] for line in lines]
    assert "ValueError: two" in said
    assert "TimeoutError: over its budget of 1 s" in said
    assert {"begun", "after it"} <= set(said)
    out = capsys.readouterr().out
    assert "not to be said" in out
    assert "3 of 4 steps failed" in out


def test_without_a_card_it_is_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for given, said in ((("cuda", False), "no CUDA device here"), (("cpu", False), "add --tiny")):
        with pytest.raises(UserError, match=said) as error:
            gpu_check.main(*given)
        assert "\n" not in str(error.value)


def test_the_budgets_are_ten_minutes_and_a_step_is_extrapolated_from_what_was_timed(tmp_path):
    assert sum(step.seconds for step in gpu_check.STEPS) <= 600
    check = gpu_check.Check(torch.device("cpu"), gpu_check.REAL, tmp_path)
    check.turn_s = {512: 0.010, 1500: 0.012, 3000: 0.0151}
    check.took = {"tokens/s": 20_000.0, "project": 0.5, "update": 1.0, "merge": 2.0}
    turn = 0.010 + 0.002 * (481 + 768 - 512) / (1500 - 512)
    whole = 4 * 1536 * turn + 256 * (481 + 1536) / 20_000 + 0.5 + 3.0
    said = gpu_cost.full_step(check)
    assert f": {whole:.3g} s (" in said
    assert f"200 steps: {200 * whole / 3600:.3g} h" in said
    check.took.pop("merge")
    assert "not to be said" in gpu_cost.full_step(check)
