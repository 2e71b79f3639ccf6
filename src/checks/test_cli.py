"""The command line: presets, overrides, and one clear line for whatever the user can mend."""

import os
import subprocess
import sys
from dataclasses import asdict

import pytest

from projected_grpo.command_line import parse, run_main
from projected_grpo.config import PRESETS, UserError, flat_fields
from projected_grpo.train import main

SMALL = ["--steps=2", "--prompts-per-step=2", "--group=2", "--n-eval=1", "--eval-samples=1", "--graders=1"]


def test_a_preset_alone_is_a_command():
    assert parse(["organism"]) == PRESETS["organism"][1]


def test_every_setting_is_one_flat_flag():
    groups = asdict(PRESETS["organism"][1])
    names = [n for k, v in groups.items() for n in (v if isinstance(v, dict) else [k])]
    assert len(names) == len(set(names)) == len(flat_fields())


def test_overrides_reach_their_group():
    cfg = parse(["organism", "--intervention=route", "--lr=1e-4", "--k", "3", "--modes", "sentinel", "run_tests"])
    assert (cfg.intervention, cfg.rl.lr, cfg.vhack.k, cfg.data.modes) == ("route", 1e-4, 3, ("sentinel", "run_tests"))
    assert cfg.preset == "organism"


def refused(main, argv, capsys) -> str:
    """The last line on standard error of an entry point that refuses its words."""
    with pytest.raises(SystemExit) as stop:
        run_main(main, argv)
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert said.splitlines()[-1].startswith("error: ")
    return said.splitlines()[-1]


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([], "name a preset"),
        (["organsm"], "did you mean 'organism'"),
        (["organism", "--lrr=1"], "did you mean 'lr'"),
        (["organism", "--gate=onesided"], "did you mean 'one_sided'"),
        (["organism", "--intervention=eraze"], "did you mean 'erase'"),
        (["organism", "--pairs=nope"], "unknown pair set"),
        (["organism", "--mix-ratio=0.5"], "just build-pool"),
        (["organism", "--mix-ratio=0.5", "--pool=/nonexistent/pool"], "no teacher pool"),
        (["organism", "--mix-ratio=0.01", "--pool=x"], "is 0 rollouts"),
        (["organism", "--model=/nonexistent/model"], "config.json is missing"),
        (["organism", "--problems=/nonexistent.jsonl"], "no problem file"),
        (["organism", "--group=1"], "raise --group"),
        (["organism", "--max-prompt=3"], "raise --max-prompt"),
        (["organism", "--k=65"], "lower --k"),
        (["organism", "--modes=nomode"], "nomode"),
        (["fast"], "--device=cpu"),
    ],
)
def test_bad_input_ends_in_one_line_and_leaves_no_run(argv, says, tmp_path, capsys):
    said = refused(main, [*argv, f"--outputs={tmp_path}"] if argv else argv, capsys)
    assert says in said
    assert not list(tmp_path.glob("runs/*"))


def test_unwritable_outputs(tmp_path, capsys):
    blocked = tmp_path / "outputs"
    blocked.write_text("a file where a folder should be")
    assert "--outputs" in refused(main, ["smoke", f"--outputs={blocked}", *SMALL], capsys)


def test_user_errors_are_one_line():
    with pytest.raises(UserError) as error:
        parse(["organism", "--nosuchthing=1"])
    assert "\n" not in str(error.value)


def test_beartype_catches_a_planted_shape_error():
    """Two arguments that share a dimension name and differ in it: refused under BEARTYPE=1 and not without."""
    planted = (
        "import torch; from projected_grpo.proj import split; "
        "split(torch.zeros(3), torch.zeros(1, 3)); "
        "from projected_grpo.arms import advantages; advantages(torch.zeros(3))"
    )
    loose = subprocess.run(
        [sys.executable, "-c", planted], capture_output=True, text=True, env={**os.environ, "BEARTYPE": "0"}
    )
    strict = subprocess.run(
        [sys.executable, "-c", planted], capture_output=True, text=True, env={**os.environ, "BEARTYPE": "1"}
    )
    assert "TypeCheckError" not in loose.stderr
    assert "TypeCheckError" in strict.stderr
