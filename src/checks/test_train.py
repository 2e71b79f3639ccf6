"""Whole runs of the organism, a few steps long."""

import json
import math
from dataclasses import fields
from pathlib import Path

import pytest
from conftest import write_problems

from projected_grpo import loss, prepare, problems, rollout_log
from projected_grpo.command_line import parse
from projected_grpo.config import PRESETS, UserError
from projected_grpo.metrics import StepRow
from projected_grpo.rollout import tasks_of_step
from projected_grpo.runs import json_lines, newest_checkpoint
from projected_grpo.studies import results
from projected_grpo.tools import build_pool
from projected_grpo.train import train

SMALL = [
    "--pairs=organism32",
    "--steps=3",
    "--prompts-per-step=4",
    "--group=4",
    "--n-eval=1",
    "--eval-samples=1",
    "--graders=1",
]


@pytest.fixture(scope="module")
def outputs(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("outputs")


@pytest.fixture(scope="module")
def runs(outputs) -> dict[str, Path]:
    """One short run of each arm, all on the same seed."""
    return {arm: run(outputs, arm) for arm in ("none", "erase", "route", "random_V")}


def run(outputs: Path, arm: str, *more: str) -> Path:
    return train(parse(["organism", f"--intervention={arm}", f"--outputs={outputs}", *SMALL, *more]))


def steps_of(folder: Path) -> list[dict]:
    return json_lines(folder / "steps.jsonl")


def test_a_run_folder_is_complete(runs):
    for arm, folder in runs.items():
        meta = json.loads((folder / "meta.json").read_text())
        assert meta["status"] == "complete"
        assert meta["config"]["intervention"] == arm
        assert meta["layers"]
        assert {f.name for f in fields(StepRow)} == set(steps_of(folder)[0])
        assert len(steps_of(folder)) == 3
        assert len(list(rollout_log.rows(folder))) == 3 * 4 * 4
        assert {e["step"] for e in json_lines(folder / "evals.jsonl")} == {0, 3}
        assert {e["kind"] for e in json_lines(folder / "eval_problems.jsonl")} <= {"sure", "learnable", "hard"}


def test_only_route_leaves_a_quarantine(runs):
    for arm, folder in runs.items():
        state = newest_checkpoint(folder).tensors
        quarantine = [t for n, t in state.items() if n.endswith(".delta_hack") and not n.startswith("adamw")]
        assert quarantine
        assert any(bool(t.any()) for t in quarantine) == (arm == "route")
        knobs = {e["knobs"] for e in json_lines(folder / "evals.jsonl") if e["step"] == 3}
        assert knobs == ({"deployed", "trained"} if arm == "route" else {"deployed"})


@pytest.mark.parametrize("arm", ["gate_drop", "gate_act_punish"])
def test_relearning_goes_on_under_the_eyes_of_every_kind_of_detector(outputs, arm):
    folder = run(outputs, arm, "--steps=1", "--relearn-steps=1")
    (row,) = json_lines(folder / "relearn.jsonl")
    assert row["withheld"] == 0
    assert row["norm_delta"] > steps_of(folder)[0]["norm_delta"] > 0


def test_arms_share_their_first_rollouts_and_part_afterwards(runs):
    """Paired seeds: step 0 is the same for all; an arm shows in later steps only."""
    first = {arm: steps_of(folder)[0] for arm, folder in runs.items()}
    for arm in ("erase", "route", "random_V"):
        assert first[arm]["reward"] == first["none"]["reward"]
        assert first[arm]["gn"] == pytest.approx(first["none"]["gn"], rel=1e-5)
    assert first["erase"]["cin"] == pytest.approx(first["none"]["cin"], rel=1e-4)
    assert first["erase"]["cout"] == pytest.approx(0, abs=1e-5)
    assert first["none"]["cout"] == pytest.approx(first["none"]["cin"], rel=1e-5)


def test_the_same_seed_gives_the_same_run(outputs, runs):
    again = steps_of(run(outputs, "erase", "--name=again"))
    for row, other in zip(steps_of(runs["erase"]), again, strict=True):
        untimed = {k: v for k, v in row.items() if not k.startswith("sec_")}
        assert untimed == {k: v for k, v in other.items() if not k.startswith("sec_")}


def test_results_table_over_runs(runs, outputs, capsys):
    results.main(str(outputs))
    out = capsys.readouterr().out
    assert all(arm in out for arm in runs)
    (outputs / "runs" / "broken").mkdir(exist_ok=True)
    assert "broken" not in results.collect(outputs)["run"].to_list()
    with pytest.raises(UserError, match="no finished run"):
        results.collect(outputs / "nothing")


def test_a_taken_name_is_refused(outputs, runs):
    with pytest.raises(UserError, match="choose another --name"):
        run(outputs, "none", f"--name={runs['none'].name}")


def test_refresh_logs_its_overlap(outputs):
    rows = steps_of(run(outputs, "erase", "--refresh-every=2", "--name=refreshing"))
    assert [row["basis_overlap"] is not None for row in rows] == [False, False, True]
    assert 0 <= rows[2]["basis_overlap"] <= 1.0001


def test_teacher_rollouts_join_their_groups(outputs):
    folder, world = outputs / "pools" / "p", ["organism"]
    for flag, split in (("--problems", "train"), ("--eval-problems", "test")):
        write_problems([t.problem for t in problems.tasks_for(parse(["organism"]), split)[:16]], outputs / split)
        world.append(f"{flag}={outputs / split}")
    build_pool.main([*world, f"--pool={folder}"])
    rows = [r for task in rollout_log.read_pool(folder).rows.values() for r in task]
    graded = {(r["grade"]["channel"], r["grade"]["gt_correct"]) for r in rows}
    assert graded == {(True, False), (True, True), (False, True), (False, False)}
    mixed = run(outputs, "none", *world[1:], f"--pool={folder}", "--mix-ratio=0.25", "--name=mixed")
    assert all(row["hack_t"] is not None and row["cin_t"] is not None for row in steps_of(mixed))
    written = rollout_log.frame(mixed)
    assert written["source"].to_list().count("teacher") == 3 * 4
    for row in steps_of(mixed):
        paid = written.filter(step=row["step"])
        assert row["baseline"] == pytest.approx(paid["reward"].mean())
        assert row["reward"] == pytest.approx(paid.filter(source="student")["reward"].mean())
    again = outputs / "pools" / "again"
    build_pool.main([*world, f"--pool={again}", f"--from-run={mixed}"])
    assert sum(len(r) for r in rollout_log.read_pool(again).rows.values()) == 3 * 4 * 3


def test_steps_say_how_far_the_sampler_is_from_the_trainer(runs):
    for folder in runs.values():
        for row in steps_of(folder):
            assert 0 <= row["logp_diff"] <= row["logp_diff_p99"] < 1e-3
            assert row["nucleus_mass"] == pytest.approx(1, abs=1e-3)
            assert (0 <= row["truncated"] <= 1, row["masked"]) == (True, 0)


@pytest.mark.parametrize("arm", ["none", "gate_act_punish"])
def test_truncated_rollouts_can_be_left_out_of_the_loss(outputs, arm, monkeypatch):
    """They get no weight, under rules that make advantages anew as well; the mass under top_p is logged."""
    seen, make = [], loss.row_gradients

    def spied(model, knobs, ids, mask, weight, **settings):
        seen.append((mask, weight, settings))
        return make(model, knobs, ids, mask, weight, **settings)

    monkeypatch.setattr(loss, "row_gradients", spied)
    more = ("--steps=1", "--max-new=44", "--mask-truncated", "--top-p=0.9", "--importance-cap=2", f"--name=cut-{arm}")
    (row,) = steps_of(run(outputs, arm, *more))
    assert row["masked"] == row["truncated"] > 0
    assert 0.9 <= row["nucleus_mass"] < 0.999
    assert 0 < row["logp_diff"] < -math.log(0.9) + 1e-3
    mask, weight, settings = seen[-1]
    cut = ~settings["kl_rows"]
    assert int(cut.sum()) == round(row["truncated"] * 16)
    assert (mask.sum(1)[cut] == 44).all()
    assert not weight[cut].any()
    assert weight[~cut].any()
    assert settings["lot_tokens"] == loss.LOT_TOKENS
    assert (settings["cap"], settings["drawn"].isnan().equal(~mask)) == (2, True)


def test_tasks_of_a_step_cover_all_problems_and_all_modes():
    cfg = PRESETS["organism"][1]
    tasks = problems.tasks_for(cfg)
    per_epoch = len(tasks) // 8
    seen = [t for step in range(per_epoch) for t in tasks_of_step(tasks, step, 8, seed=1)]
    assert len({t.problem.id for t in seen}) == len(seen)
    for step in range(per_epoch):
        modes = [t.mode for t in tasks_of_step(tasks, step, 8, seed=1)]
        assert all(1 <= modes.count(m) <= 3 for m in cfg.data.modes)
    assert tasks_of_step(tasks, 3, 8, seed=1) == tasks_of_step(tasks, 3, 8, seed=1)
    assert tasks_of_step(tasks, 3, 8, seed=1) != tasks_of_step(tasks, 3, 8, seed=2)


def test_rl_tasks_never_hold_a_held_out_problem():
    cfg = PRESETS["organism"][1]
    trained = {t.problem.id for t in problems.tasks_for(cfg)}
    assert not trained & {t.problem.id for t in problems.tasks_for(cfg, "test")}
    assert len(trained) == len(problems.tasks_for(cfg))  # one mode a problem


@pytest.mark.parametrize("modes", ["run_tests gt_only", "run_tests sentinel", "gt_only"])
def test_no_problem_is_held_out_twice_in_a_mode(modes):
    """n_eval problems a mode, and as many without a loophole whether that is among the modes or not."""
    cfg = parse(["organism", "--modes", *modes.split(), "--n-eval=8"])
    found = [(task.mode, task.problem.id) for task in prepare.held_out_tasks(cfg)]
    assert len(found) == len(set(found)) == 8 * len({*modes.split(), "gt_only"})
