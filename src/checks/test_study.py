"""Studies and their queues: the same definition here, under pueue and under Slurm; the live pictures of a run."""

import argparse
import json
import os
import shlex
import time
from dataclasses import fields
from pathlib import Path

import pytest
from mock_learner import write_lines

from projected_grpo import arms
from projected_grpo import rollout as evals
from projected_grpo.command_line import parse
from projected_grpo.config import UserError
from projected_grpo.metrics import StepRow, legend, table_cells
from projected_grpo.studies import results, run, watch
from projected_grpo.studies import rows as study

TINY = ("--steps=1", "--prompts-per-step=2", "--group=2", "--n-eval=1", "--eval-samples=1", "--max-new=12")


def tiny_study(*arms: str) -> run.Study:
    jobs = tuple(run.Job(arm, arm, TINY, 7, preset="smoke") for arm in arms)
    return run.Study("tiny", "H", "it's a check", "nothing; $HOME stays", jobs)


def finished(outputs: Path, job: run.Job, state: str = "complete") -> Path:
    folder = outputs / "runs" / job.name
    folder.mkdir(parents=True)
    (folder / "meta.json").write_text(json.dumps({"status": state}))
    return folder


def test_rows_name_arms_and_jobs_have_names_of_their_own():
    for s in run.STUDIES.values():
        assert len({job.name for job in s.jobs}) == len(s.jobs)
        assert all(job.intervention in arms.ARMS for job in s.jobs)
    for label in study.ROWS:
        row = study.ROWS[label]
        cfg = parse([*run.Job(label, row.arm, row.flags, 51).flags])
        assert (cfg.intervention, cfg.seed) == (row.arm, 51)


def test_status_of_a_job(tmp_path):
    job, broken, begun, missing = tiny_study("none", "erase", "route", "random_V").jobs
    finished(tmp_path, job)
    finished(tmp_path, broken, "running")
    (tmp_path / "runs" / f"{begun.name}.part").mkdir()
    assert [run.status(j, tmp_path) for j in (job, broken, begun, missing)] == ["done", "broken", "broken", "missing"]


def pueue_parser() -> argparse.ArgumentParser:
    """The subcommands used here, as pueue 3's and 4's --help documents them."""
    parser = argparse.ArgumentParser(prog="pueue", exit_on_error=False, allow_abbrev=False)
    sub = parser.add_subparsers(dest="sub", required=True)
    add = sub.add_parser("add", allow_abbrev=False)
    add.add_argument("-g", "--group")
    add.add_argument("-l", "--label")
    add.add_argument("-w", "--working-directory")
    add.add_argument("-e", "--escape", action="store_true")
    add.add_argument("command", nargs="+")
    group = sub.add_parser("group").add_subparsers(dest="action", required=True).add_parser("add")
    group.add_argument("name")
    group.add_argument("-p", "--parallel", type=int)
    parallel = sub.add_parser("parallel", allow_abbrev=False)
    parallel.add_argument("parallel_tasks", nargs="?", type=int)
    parallel.add_argument("-g", "--group")
    return parser


def test_pueue_commands_are_of_its_documented_syntax(tmp_path):
    chosen = tiny_study("none", "erase", "route")
    finished(tmp_path, chosen.jobs[1])
    group, parallel, *adds = (
        pueue_parser().parse_args(command[1:]) for command in run.pueue_commands(chosen, tmp_path / "a b", 3)
    )
    assert (group.sub, group.action, group.name) == ("group", "add", "tiny")
    assert (parallel.parallel_tasks, parallel.group) == (3, "tiny")
    assert len(adds) == 3  # "a b" holds no finished run
    assert len(run.pueue_commands(chosen, tmp_path, 3)) == 4
    for job, task in zip(chosen.jobs, adds, strict=True):
        assert task.group == "tiny"
        assert "why: it's a check resolve: nothing; $HOME stays" in task.label
        (line,) = task.command  # one argument: pueue joins them with blanks and gives them to a shell
        assert shlex.split(line) == run.queued(chosen, job, tmp_path / "a b")


def test_pueue_is_called_and_its_refusal_is_told(tmp_path, monkeypatch):
    fake, log = tmp_path / "pueue", tmp_path / "calls"
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    refuses = '[ "$1" = {} ] && {{ echo no >&2; exit 1; }}\n'
    for refused, told in (("group", None), ("add", "no")):  # the group may be there already
        fake.write_text(f'#!/bin/sh\necho "$@" >> {log}\n{refuses.format(refused)}exit 0\n')
        fake.chmod(0o755)
        if told is None:
            run.add_to_pueue(tiny_study("none", "erase"), tmp_path, 2)
            assert len(log.read_text().splitlines()) == 4
        else:
            with pytest.raises(UserError, match=told):
                run.add_to_pueue(tiny_study("none", "erase"), tmp_path, 2)
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    with pytest.raises(UserError, match="not installed"):
        run.add_to_pueue(tiny_study("none"), tmp_path, 2)


def test_queued_command_names_one_job_of_the_study(tmp_path, capsys, monkeypatch):
    s = run.STUDIES["headline"]
    ran = []
    monkeypatch.setattr(run, "run_here", lambda job, outputs: ran.append((job, outputs)) or "done")
    _, _, module, name, *flags = run.queued(s, s.jobs[3], tmp_path)
    assert module == "projected_grpo.studies.run"
    options = dict(flag[2:].split("=", 1) for flag in flags)
    run.main(name, **options)
    assert ran == [(s.jobs[3], tmp_path)]
    with pytest.raises(UserError, match="job"):
        run.main(name, only="no-such-job", outputs=str(tmp_path))


def test_slurm_runs_a_study_through_submitit(tmp_path):
    pytest.importorskip("submitit")
    chosen = tiny_study("erase")
    jobs = run.submit(chosen, tmp_path, 2, 0.2, "local", ("partition=cpu",))
    assert [job.result() for job in jobs] == ["done"]
    assert [run.status(job, tmp_path) for job in chosen.jobs] == ["done"]
    assert run.submit(chosen, tmp_path, 2, 0.2, "local") == []  # finished runs are kept


def test_slurm_needs_its_command(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="sbatch"):
        run.submit(tiny_study("none"), tmp_path, 2, 1, "slurm")


# --- terminal ----------------------------------------------------------------------------------------------------


def a_row(**values: object) -> StepRow:
    row = {f.name: 0.5 for f in fields(StepRow)} | {f"{k}_by_mode": {} for k in ("hack", "attempt", "solve", "n")}
    return StepRow(**row | {"step": 1999, "n_zero_var": 16, "norm_delta": 12.3, "comp_len": 1024.0} | values)


def test_live_table_fits_100_columns():
    head = table_cells(None)
    for row in (a_row(), a_row(hack_t=None, cin=None, caught=None)):
        assert len(table_cells(row)) == len(head) <= 100
    for word in ("hack", "att", "solve", "cin", "null", "cout_Δ", "gn"):
        assert word in head
        assert word in legend()


def running(outputs: Path, job: run.Job, done: int, half_line: bool = False) -> Path:
    folder = outputs / "runs" / f"{job.name}.part"
    folder.mkdir(parents=True)
    started = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(time.time() - 100))
    meta = {"status": "running", "started": started, "config": {"rl": {"steps": 50}}}
    (folder / "meta.json").write_text(json.dumps(meta))
    times = {"sec_gen": 1.0, "sec_grade": 0.5, "sec_train": 1.5}
    rows = [{"step": i, "hack_s": 0.25, "attempt_s": 0.5, "solve_s": 0.125, "cin": None, **times} for i in range(done)]
    write_lines(folder / "steps.jsonl", rows)
    if half_line:
        with (folder / "steps.jsonl").open("a") as f:
            f.write('{"step": 1')
    return folder


def test_watch_tells_progress_and_when(tmp_path):
    headline = run.STUDIES["headline"]
    first, second, third, fourth, *_ = headline.jobs
    finished(tmp_path, first)
    running(tmp_path, second, 30, half_line=True)
    running(tmp_path, third, 0)
    silent = running(tmp_path, fourth, 10)
    for file in silent.iterdir():
        os.utime(file, (0, 0))
    (tmp_path / "runs" / "junk.part").mkdir()
    screen = watch.picture(tmp_path)
    assert max(map(len, screen.splitlines())) <= 100
    lines = {line.split()[0]: line for line in screen.splitlines() if line}
    assert "30/50" in lines[second.name]
    assert "60 s" in lines[second.name]  # 20 steps of 3 s
    assert "0.25  0.50  0.12" in " ".join(lines[second.name].split()).replace(" ", "  ")
    assert "silent" in lines[fourth.name]
    assert f"1/{len(headline.jobs)}" in lines["headline"]
    missing = len(headline.jobs) - 1 - 1  # the silent run and the one without a step count as missing
    assert watch.span((60 + missing * 150) / 1) in lines["headline"]
    assert "nothing runs" in watch.picture(tmp_path / "other")


def run_with(
    outputs: Path, name: str, arm: str, hack: float, solve: float = 0.3, seed: int = 1, steps: int = 1
) -> None:
    folder = outputs / "runs" / name
    folder.mkdir(parents=True)
    config = {
        "preset": "organism",
        "intervention": arm,
        "seed": seed,
        "pool": {"mix_ratio": 0.0},
        "rl": {"steps": steps},
    }
    (folder / "meta.json").write_text(json.dumps({"status": "complete", "config": config}))
    step = dict.fromkeys(evals.HEADLINE, hack) | {"step": 0, "sec_gen": 1.0, "sec_grade": 1.0, "sec_train": 1.0}
    write_lines(folder / "steps.jsonl", [step])
    rows = [
        {"step": at, "knobs": "deployed", "mode": "all", "metric": m, "rate": rate, "lo": rate - 0.1, "hi": 1.0}
        for at, reached in ((0, 0.25), (1, solve))
        for m, rate in (("hack", hack), ("attempt", hack), ("solve", reached))
    ]
    write_lines(folder / "evals.jsonl", rows)


def test_results_are_filtered_and_sorted_by_expressions(tmp_path, capsys):
    for name, arm, hack in (("a", "erase", 0.1), ("b", "erase", 0.3), ("c", "none", 0.9), ("d", "erase", 0.15)):
        run_with(tmp_path, name, arm, hack)
    for name, file, content in (("e", "steps.jsonl", ""), ("f", "meta.json", '{"config": []}')):  # are left out
        run_with(tmp_path, name, "erase", 0.1)
        (tmp_path / "runs" / name / file).write_text(content)
    table = results.collect(tmp_path)
    assert results.chosen(table, "arm = 'erase' and hack_s < 0.2", "deploy_hack desc")["run"].to_list() == ["d", "a"]
    assert results.chosen(table, "", "hack_s - 2 * deploy_hack")["run"].to_list() == ["c", "b", "d", "a"]
    assert results.chosen(table, "", "").equals(table)
    results.main(str(tmp_path), where="hack_s > 0.2", sort="run desc")
    printed = capsys.readouterr().out
    assert "2 runs" in printed
    for where, sort in (("arm = ", ""), ("nothing_here > 1", ""), ("hack_s", ""), ("", "no_column")):
        with pytest.raises(UserError, match="deploy_hack"):
            results.chosen(table, where, sort)


def test_no_loophole_is_read_against_honest_of_the_modes_it_is_evaluated_on():
    base = {"preset": "organism", "seed": 1, "model": {}, "rl": {"steps": 150}, "eval": {"n_eval": 64}}
    base |= {"pool": {"mix_ratio": 0.0}}
    honest = base | {"data": {"modes": ["run_tests", "sentinel"], "eval_modes": None}}
    no_loophole = base | {"data": {"modes": ["gt_only"], "eval_modes": ["run_tests", "sentinel"]}}
    elsewhere = base | {"data": {"modes": ["gt_only"], "eval_modes": None}}
    taught = honest | {"pool": {"mix_ratio": 0.125}}
    assert results.world(honest) == results.world(no_loophole) != results.world(elsewhere)
    assert results.world(taught) != results.world(honest)
    assert honest["data"]["modes"] == ["run_tests", "sentinel"], "what was given is left as it was"


def test_gain_kept_stands_where_an_honest_run_is_like_it(tmp_path):
    for name, arm, solve, seed, steps in (
        ("h", "honest", 0.65, 1, 1), ("e", "erase", 0.45, 1, 1), ("n", "none", 0.05, 1, 1), ("o", "erase", 0.45, 2, 1),
        ("l", "erase", 0.45, 1, 3), ("w", "honest", 0.30, 3, 1), ("x", "erase", 0.30, 3, 1),
    ):  # fmt: skip
        run_with(tmp_path, name, arm, 0.1, solve, seed, steps)
    found = dict(results.collect(tmp_path).select("run", "gain_kept").rows())
    assert {k: v for k, v in found.items() if v is not None} == pytest.approx({"h": 1.0, "e": 0.5, "n": -0.5})
    assert {k for k, v in found.items() if v is None} == {"o", "l", "w", "x"}  # no honest; longer; honest gains nothing
