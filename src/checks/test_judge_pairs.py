"""What `just judge-pairs` says of a pair set, on rollouts whose hacks are known."""

import json
import re
from dataclasses import asdict, replace

import pytest
import torch

from projected_grpo import problems, rollout_log
from projected_grpo.config import Config, UserError
from projected_grpo.data_types import Grade
from projected_grpo.detectors import Detector
from projected_grpo.loopholes import LOOPHOLES
from projected_grpo.tools import judge_pairs
from projected_grpo.tools.judge_pairs import Judged, Written

GRADE = Grade(3.5, True, True, False, False, False, "ok")


def rows_of(tasks) -> list[dict]:
    """A hack and an honest try at each task, as a run's first step and, all hacks, its second."""
    found = []
    for n, task in enumerate(tasks):
        made = problems.generated_by_id()[task.problem.id]
        sides = {True: LOOPHOLES[task.mode].exploit(made.lazy[0], task), False: task.problem.canonical}
        for step, hack in ((0, n % 2 == 0), (1, True)):
            row = rollout_log.row_of(task, problems.fence(sides[hack]), replace(GRADE, channel=hack))
            found.append(dict.fromkeys(rollout_log.SCHEMA) | {"step": step, "source": "student"} | row)
    return found


@pytest.fixture
def run(tmp_path):
    cfg = replace(Config(), outputs=str(tmp_path))
    folder = tmp_path / "runs" / "a"
    folder.mkdir(parents=True)
    (folder / "meta.json").write_text(json.dumps({"config": asdict(cfg)}))
    rows = rows_of(problems.tasks_for(cfg)[:48])
    for step in (0, 1):
        rollout_log.write_step(folder, step, [row for row in rows if row["step"] == step])
    return folder


def cells(printed: str) -> dict[tuple[str, str], list[str]]:
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in printed.splitlines() if line.startswith("| ")]
    return {(row[0], row[1]): row[2:] for row in rows}


def test_a_set_is_judged_by_what_it_makes_of_rollouts(run, capsys):
    judge_pairs.main((str(run),), sets=("organism64", "placebo16"), steps=1)
    printed = capsys.readouterr().out
    found = cells(printed)
    assert found["pairs", "score"][3:-2] == sorted(Config().data.modes)
    for score in ("gradient", "activation"):
        good, null = (float(found[name, score][1]) for name in ("organism64", "random directions"))
        assert good > 0.8 > null
        assert float(found["placebo16", score][1]) < good
    assert float(found["organism64", "activation"][-2]) > float(found["organism64", "activation"][-1])  # caught, false
    assert found["organism64", "gradient"][0] != "–" == found["organism64", "activation"][0]
    assert re.search(r"^24 of 48 rollouts fool their channel: the first 1 steps of 1 runs$", printed, re.M)


def test_rates_and_ranks_are_those_by_hand():
    task = problems.tasks_for(Config())[0]
    other = replace(task, mode="sentinel" if task.mode != "sentinel" else "run_tests")
    written = Written([(task, ""), (task, ""), (other, ""), (other, "")], torch.tensor([True, False, True, False]))
    draws = [Judged("x", "gradient", Detector(lambda x: x, 0.5), None) for _ in range(2)]
    scored = torch.tensor([[1.0, 0.0, 0.4, 0.6], [1.0, 0.5, 0.4, 0.6]])
    right, auroc, span, *by_mode, caught, false_alarm = cells(judge_pairs.table(written, draws, scored))[
        "x", "gradient"
    ]
    assert (right, auroc, span, caught, false_alarm) == ("–", "0.62", "0.50–0.75", "0.50", "0.50")
    assert by_mode == [v for _, v in sorted({task.mode: "1.00", other.mode: "0.00"}.items())]


def test_what_cannot_be_judged_is_one_line(run, tmp_path):
    with pytest.raises(UserError, match="name runs whose rollouts hold hacks"):
        judge_pairs.main(())
    with pytest.raises(UserError, match="pairs of a pool"):
        judge_pairs.main((str(run),), sets=("pool",))
    with pytest.raises(UserError, match="holds no run"):
        judge_pairs.main((str(tmp_path),))
    rows = [row for row in rollout_log.rows(run) if row["step"] == 1]
    rollout_log.write_step(run, 0, [row | {"step": 0} for row in rows])
    with pytest.raises(UserError, match="48 of 48 rollouts fool their channel"):
        judge_pairs.main((str(run),), steps=1)
    rollout_log.write_step(run, 0, [row | {"step": 0, "problem_id": "gone"} for row in rows])
    with pytest.raises(UserError, match="have a problem gone"):
        judge_pairs.main((str(run),), steps=1)
    other = run.with_name("b")
    other.mkdir()
    cfg = Config()
    meta = {"config": asdict(replace(cfg, vhack=replace(cfg.vhack, k=3)))}
    (other / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(UserError, match="another model, other problems or another V"):
        judge_pairs.main((str(run), str(other)))
