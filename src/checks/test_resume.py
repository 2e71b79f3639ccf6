"""A run that is killed and resumed is the run that was never stopped; what a finished run can be turned into."""

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from conftest import tiny_model
from killed_runs import KILLS, SMALL
from loguru import logger
from transformers import AutoModelForCausalLM, AutoTokenizer

from projected_grpo import antipasto, models, rollout_log
from projected_grpo import runs as checkpoints
from projected_grpo import runs as run_record
from projected_grpo import runs as trackers
from projected_grpo.command_line import parse
from projected_grpo.config import PRESETS, ModelCfg, UserError
from projected_grpo.rollout import EvalRow
from projected_grpo.runs import Checkpoint, json_lines
from projected_grpo.studies import run
from projected_grpo.tools import build_pool, export
from projected_grpo.train import train

STUB = """
import json, os
class Run:
    def log(self, numbers, step):
        with open(os.environ["STUB_LOG"], "a") as f:
            f.write(json.dumps({"step": step, **numbers}) + "\\n")
    def finish(self):
        pass
def init(project, name, resume, config, **more):
    with open(os.environ["STUB_LOG"] + ".init", "w") as f:
        json.dump({"project": project, "name": name, "resume": resume, "seed": config["seed"], **more}, f)
    return Run()
"""


@pytest.fixture(scope="module")
def outputs(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("outputs")


@pytest.fixture(scope="module")
def stubs(tmp_path_factory) -> Path:
    """Modules that stand for trackers' libraries: the part of their interface that is used, written to STUB_LOG."""
    folder = tmp_path_factory.mktemp("stubs")
    for name in ("wandb", "trackio"):
        (folder / f"{name}.py").write_text(STUB)
    return folder


@pytest.fixture(scope="module")
def runs(outputs, stubs) -> Path:
    """The folder of the runs that killed_runs.py makes."""
    path = os.pathsep.join([str(stubs), str(Path(__file__).parents[1])])
    environment = os.environ | {"PYTHONPATH": path, "STUB_LOG": str(outputs / "stub.jsonl"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).with_name("killed_runs.py")), str(outputs)]
    made = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert made.returncode == 0, made.stderr
    ended = json.loads(made.stdout.splitlines()[-1])
    expected = {"whole": 0, "last": 0} | {where: status for where, _, status in KILLS}
    assert ended == expected, made.stderr[-3000:]
    (outputs / "said").write_text(made.stderr)
    (outputs / "shown").write_text(made.stdout)
    return outputs / "runs"


def timeless(rows: list[dict]) -> list[dict]:
    return [{k: v for k, v in row.items() if not k.startswith("sec_")} for row in rows]


# --- resume --------------------------------------------------------------------------------------------------------


def test_killed_and_resumed_is_the_run_that_was_never_stopped(runs):
    for log, n in (("steps.jsonl", 5), ("relearn.jsonl", 3)):
        whole, killed = (timeless(json_lines(runs / name / log)) for name in ("whole", "killed"))
        assert len(whole) == n
        assert killed == whole
    for log in ("evals.jsonl", "eval_problems.jsonl"):
        assert json_lines(runs / "killed" / log) == json_lines(runs / "whole" / log)
    assert {row["step"] for row in json_lines(runs / "whole" / "evals.jsonl")} == {0, 4, 5}
    assert list(rollout_log.rows(runs / "killed")) == list(rollout_log.rows(runs / "whole"))
    for phase, done in (("step", 5), ("relearn", 2)):
        whole, killed = (checkpoints.newest_checkpoint(runs / name, (phase,)) for name in ("whole", "killed"))
        assert whole.done == killed.done == done
        assert whole.tensors.keys() == killed.tensors.keys()
        assert all(torch.equal(t, killed.tensors[n]) for n, t in whole.tensors.items())


def test_the_runs_were_worth_comparing(runs):
    """They moved, refreshed, and filled a quarantine; pairs came from the student's own rollouts."""
    rows = json_lines(runs / "whole" / "steps.jsonl")
    assert [row["basis_overlap"] is not None for row in rows] == [False, False, True, False, True]
    assert rows[-1]["norm_delta"] > 0
    assert rows[-1]["norm_delta_hack"] > 0
    assert [row["norm_delta_hack"] for row in json_lines(runs / "whole" / "relearn.jsonl")] == [0, 0, 0]
    meta = run_record.read_meta(runs / "killed")
    assert meta["status"] == "complete"
    assert [r["at"] for r in meta["resumed"]] == [
        *("step 0", "step 2", "step 3", "step 4", "step 5", "relearn 2", "relearn 2")
    ]


def test_what_a_kill_left_is_readable_and_tidied_up(runs):
    halted = runs / "halted.part"
    assert run_record.read_meta(halted)["status"] == "running"
    assert len(json_lines(halted / "steps.jsonl")) == 4
    assert len(rollout_log.frame(halted)) == 4 * 16
    assert len(build_pool.from_run(halted)) == 4 * 16
    assert [p.name for _, _, p in checkpoints.places(halted)] == ["step-00000", "step-00002"]
    assert (halted / "checkpoints" / "step-00004.part").exists()
    assert not (runs / "halted").exists()
    with pytest.raises(UserError, match="remove it"):
        train(parse([*SMALL, f"--outputs={runs.parent}", "--name=halted"]))
    left = {p.name for p in (runs / "killed" / "checkpoints").iterdir()}
    assert left == {"step-00004", "step-00005", "relearn-00002"}
    assert not (runs / "killed" / "lock").exists()
    assert not (runs / "killed" / "rollouts.part").exists()


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--resume=halted", "--lr=0.5"], "--lr is 0.5 here and was 0.02"),
        (["--resume=halted", "--intervention=erase"], "--intervention is erase here and was route"),
        (["--resume=halted", "--modes", "run_tests", "stdout_marker", "sentinel"], "--modes is"),
        (["--resume=halted", "--name=other"], "--name is other here and was killed"),
        (["--resume=whole"], "is complete"),
        (["--resume=early"], "no checkpoint to go on from"),
        (["--resume=nothing"], "is not there"),
    ],
)
def test_what_cannot_be_resumed_is_refused_in_one_line(runs, outputs, flags, says):
    with pytest.raises(UserError, match=says) as refusal:
        run_record.stopped(parse([*SMALL, f"--outputs={outputs}", *flags]))
    assert "\n" not in str(refusal.value)


def test_stopped_runs_say_how_to_go_on_without_a_traceback(runs, outputs):
    said = (outputs / "said").read_text()
    line = f"stopped: {runs / 'killed.part'}; go on with it by: killed_runs.py --resume=killed --outputs={outputs}"
    assert said.splitlines().count(line) == 2
    assert "Traceback" not in said


def test_the_first_screen_fits_warns_of_nothing_and_says_what_to_type_next(outputs):
    shown = [line for line in (outputs / "shown").read_text().splitlines() if not line.startswith("{")]
    said = (outputs / "said").read_text().partition("stopped: ")[0]  # of what was never stopped
    bars = [line for line in said.splitlines() if "\r" in line or "%|" in line]
    assert max(len(line) for line in [*shown, *said.splitlines()] if line not in bars) <= 100
    assert "arning" not in said
    assert "in another terminal: just watch" in shown
    assert sum(line.startswith("next  just report ") for line in shown) == 2


def test_resume_alone_goes_on_with_the_runs_own_settings(runs, outputs, tmp_path):
    for words in (["--resume=halted"], ["organism", "--resume=halted"], ["--resume", "halted", "--lr=0.02"]):
        asked = parse([*words, f"--outputs={outputs}"])
        assert replace(asked, resume=None) == parse([*SMALL, f"--outputs={outputs}", "--name=killed"])
    free = parse(["--resume=halted", f"--outputs={outputs}", "--graders=3", "--tracker=trackio"])
    assert (free.graders, free.tracker, free.rl.steps) == (3, "trackio", 5)
    moved = tmp_path / "runs" / "moved.part"
    shutil.copytree(runs / "halted.part", moved)
    assert parse([f"--resume={moved}"]).outputs == str(tmp_path)


def test_a_setting_that_a_runs_code_did_not_have_stood_at_its_default(tmp_path):
    folder, words = tmp_path / "runs" / "old.part", ["--resume=old", f"--outputs={tmp_path}"]
    config = asdict(parse([*SMALL, f"--outputs={tmp_path}"]))
    del config["model"]["sampler"]
    state = {"sizes": {}, "scheduler": {}, "refreshed": None}
    checkpoints.write_checkpoint(folder, Checkpoint("step", 0, {"x": torch.zeros(1)}, state))
    run_record.write_json(folder / "meta.json", {"config": config, "argv": []})
    assert parse(words).model.sampler == "own"
    assert run_record.stopped(parse(words)).at.done == 0
    with pytest.raises(UserError, match="--sampler is vllm here and was own"):
        parse([*words, "--sampler=vllm"])
    config["model"]["temper"] = 1
    run_record.write_json(folder / "meta.json", {"config": config, "argv": [], "commit": None})
    with pytest.raises(UserError, match="whose setting temper"):
        parse(words)


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("checkpoints/step-00002/state.json", b"", 0),
        ("checkpoints/step-00002/state.json", b"{}", 0),
        ("checkpoints/step-00002/state.safetensors", b"", 0),
        ("rollouts.part/step-000001.parquet", b"", 0),
        ("rollouts.part/step-000000.parquet", None, 0),
        ("steps.jsonl", b"{", 0),
        ("meta.json", b"", "meta.json holds no settings"),
        ("meta.json", b"[]", "meta.json holds no settings"),
        ("meta.json", b'{"config": []}', "meta.json holds no settings"),
        ("meta.json", b'{"config": {"model": "x"}}', "meta.json holds no settings"),
    ],
)
def test_damage_is_found_at_resume_and_named(runs, tmp_path, file, content, says):
    """0: the checkpoint before it is used, since it needs none of the spoiled file."""
    folder = tmp_path / "runs" / "halted.part"
    shutil.copytree(runs / "halted.part", folder)
    (folder / file).unlink() if content is None else (folder / file).write_bytes(content)
    if says:
        with pytest.raises(UserError, match=says):
            parse(["--resume=halted", f"--outputs={tmp_path}"])
        return
    said: list[str] = []
    sink = logger.add(lambda text: said.append(str(text)), format="{message}", level="WARNING")
    assert run_record.stopped(parse(["--resume=halted", f"--outputs={tmp_path}"])).at.done == says
    logger.remove(sink)
    assert Path(file).name.partition(".")[0] in said[0]
    shutil.rmtree(folder / "checkpoints" / "step-00000")
    with pytest.raises(UserError, match=Path(file).name.partition(".")[0]):
        run_record.stopped(parse(["--resume=halted", f"--outputs={tmp_path}"]))


def test_a_run_that_goes_on_is_not_resumed(runs, outputs, tmp_path):
    cfg = parse([*SMALL, f"--outputs={outputs}", "--resume=halted", "--graders=3"])
    stopped = run_record.stopped(cfg)
    assert (stopped.at.phase, stopped.at.done) == ("step", 2)
    folder = tmp_path / "runs" / "halted.part"
    shutil.copytree(stopped.folder, folder)
    with run_record.RunRecord(cfg, {}, replace(stopped, folder=folder)) as rec:
        assert rec.name == "halted"
        assert len(json_lines(folder / "steps.jsonl")) == 2
        assert len(rollout_log.step_files(folder)) == 2
        with pytest.raises(UserError, match="still running"):
            run_record.RunRecord(cfg, {}, replace(stopped, folder=folder))


def test_a_spoiled_checkpoint_is_passed_over(tmp_path):
    for done in (1, 2, 3):
        checkpoints.write_checkpoint(
            tmp_path, Checkpoint("step", done, {"x": torch.full((3,), float(done))}, {"n": done})
        )
    assert [done for _, done, _ in checkpoints.places(tmp_path)] == [2, 3]
    os.truncate(tmp_path / "checkpoints" / "step-00003" / "state.safetensors", 40)
    found = checkpoints.newest_checkpoint(tmp_path)
    assert (found.done, found.state, found.tensors["x"].tolist()) == (2, {"n": 2}, [2.0, 2.0, 2.0])
    checkpoints.forget_after(tmp_path, found)
    assert [done for _, done, _ in checkpoints.places(tmp_path)] == [2]


@pytest.mark.parametrize(("commit", "goes_on"), [("abc", True), ("abd", False), ("abc+", False), (None, False)])
def test_a_study_goes_on_with_a_broken_run_of_the_same_code(tmp_path, monkeypatch, commit, goes_on):
    job = run.Job("label", "none", (), 41)
    folder = tmp_path / "runs" / f"{job.name}.part"
    checkpoints.write_checkpoint(folder, Checkpoint("step", 1, {"x": torch.zeros(1)}, {}))
    run_record.write_json(folder / "meta.json", {"status": "running", "commit": commit})
    said = []
    monkeypatch.setattr(run, "git_commit", lambda: "abc" if commit != "abc+" else "abc+")
    monkeypatch.setattr(
        run.subprocess, "run", lambda command, **_: said.append(command) or subprocess.CompletedProcess(command, 0)
    )
    run.run_here(job, tmp_path)
    assert (f"--resume={job.name}" in said[0], folder.exists()) == (goes_on, goes_on)


# --- export --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use", ["deployed", "trained"])
def test_an_exported_run_gives_the_same_logits(runs, outputs, tmp_path, use):
    folder = export.export(runs / "whole", tmp_path / use, use)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    model, tokenizer = models.load(ModelCfg())
    knobs = antipasto.wrap(model, outputs / "cache")
    knobs.load_state(checkpoints.newest_checkpoint(runs / "whole", ("step",)).tensors)
    ids = torch.tensor([tokenizer.encode("def solve(x):\n    return")])
    with torch.no_grad():
        untrained = AutoModelForCausalLM.from_pretrained(models.ORGANISM, dtype="auto").eval()(ids).logits
        with knobs.using(use):
            assert torch.equal(plain(ids).logits, model(ids).logits)
        with knobs.using("trained" if use == "deployed" else "deployed"):
            assert not torch.equal(plain(ids).logits, model(ids).logits)
    assert not torch.equal(plain(ids).logits, untrained)
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == tokenizer.get_vocab()
    with pytest.raises(UserError, match="is there already"):
        export.export(runs / "whole", folder)
    with pytest.raises(UserError, match="no finished run"):
        export.export(runs / "halted.part", tmp_path / "other")


def test_a_bfloat16_model_is_exported_to_the_bit(tmp_path):
    model = tiny_model(torch.bfloat16)
    knobs = antipasto.wrap(model, tmp_path / "cache")
    with torch.no_grad():
        for m in knobs.modules.values():
            m.delta.normal_(generator=torch.Generator().manual_seed(1)).mul_(0.1)
    knobs.merge("deployed")
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        logits = model(ids).logits
        export.unwrap(model, knobs, "deployed").save_pretrained(tmp_path / "out")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").eval()
        assert torch.equal(again(ids).logits, logits)
        assert again.dtype is torch.bfloat16
        assert not torch.equal(tiny_model(torch.bfloat16)(ids).logits, logits)


# --- trackers ------------------------------------------------------------------------------------------------------


def test_a_run_sends_its_numbers_to_its_tracker(runs, outputs):
    """trackio, by a stub of its interface."""
    sent = json_lines(outputs / "stub.jsonl")
    for row in json_lines(runs / "whole" / "steps.jsonl"):
        there = next(s for s in sent if s["step"] == row["step"] and "train/reward" in s)
        assert there["train/gn"] == row["gn"]
        assert "train/kl" not in there
        assert all(there[f"train/n_by_mode/{mode}"] == n for mode, n in row["n_by_mode"].items())
    assert {s["step"] for s in sent if "eval/deployed/all/hack_lo" in s} == {0, 4, 5}
    assert sum("relearn/reward" in s for s in sent) == 3
    assert json.loads((outputs / "stub.jsonl.init").read_text())["name"] == "whole"


def test_wandb_is_offline_unless_told_otherwise(stubs, tmp_path, monkeypatch):
    """By a stub of its interface."""
    monkeypatch.syspath_prepend(str(stubs))
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setenv("STUB_LOG", str(tmp_path / "log"))
    for mode in (None, "online"):
        monkeypatch.delenv("WANDB_MODE", raising=False)
        if mode:
            monkeypatch.setenv("WANDB_MODE", mode)
        trackers.start_tracker("wandb", "a", PRESETS["organism"][1]).close()
        assert json.loads((tmp_path / "log.init").read_text())["mode"] == (mode or "offline")
    sys.modules.pop("wandb")


def test_tensorboard_reads_back_what_was_logged(tmp_path):
    pytest.importorskip("tensorboard", reason="the extra `tracking` is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    cfg = replace(PRESETS["organism"][1], outputs=str(tmp_path))
    tracker = trackers.start_tracker("tensorboard", "a", cfg)
    row = {"step": 3, "gn": 0.5, "kl": None, "hack_by_mode": {"sentinel": 2}}
    tracker.log(3, trackers.numbers_of("train", row))
    tracker.log(3, trackers.numbers_of_evals([EvalRow(3, "deployed", "all", "hack", 0.25, 0.125, 0.5, 4, 8)]))
    tracker.close()
    trackers.start_tracker("tensorboard", "b", cfg, rank=1).log(1, {"train/gn": 1.0})
    events = EventAccumulator(str(tmp_path / "tensorboard" / "a"))
    events.Reload()
    read = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert read == {
        "train/gn": [(3, 0.5)],
        "train/hack_by_mode/sentinel": [(3, 2.0)],
        "eval/deployed/all/hack": [(3, 0.25)],
        "eval/deployed/all/hack_lo": [(3, 0.125)],
        "eval/deployed/all/hack_hi": [(3, 0.5)],
    }
    assert not (tmp_path / "tensorboard" / "b").exists()


def test_a_missing_tracker_library_is_one_line(monkeypatch):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    trackers.require_tracker("none")
    for kind in ("tensorboard", "wandb", "trackio"):
        with pytest.raises(UserError, match=f"pip install {kind}") as error:
            trackers.require_tracker(kind)
        assert "\n" not in str(error.value)


# --- rollouts ------------------------------------------------------------------------------------------------------


def test_rollouts_load_with_datasets(runs, tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    files = str(runs / "whole" / "rollouts.parquet")
    loaded = datasets.load_dataset("parquet", data_files=files, split="train")
    assert [dict(row) for row in loaded] == list(rollout_log.rows(runs / "whole"))
    flat = [row | row["wording"] | row["grade"] for row in rollout_log.rows(runs / "whole")]
    assert rollout_log.frame(runs / "whole").to_dicts() == [{c: row[c] for c in rollout_log.FLAT} for row in flat]


def test_writing_rollouts_costs_under_three_percent_of_a_step(runs, tmp_path):
    steps = json_lines(runs / "whole" / "steps.jsonl")
    shortest = min(row["sec_gen"] + row["sec_grade"] + row["sec_train"] for row in steps)
    rows = [row for row in rollout_log.rows(runs / "whole") if row["step"] == 0]
    cost = []
    for step in range(5):
        start = time.process_time()
        rollout_log.write_step(tmp_path, step, rows)
        cost.append(time.process_time() - start)
    assert min(cost) < 0.03 * shortest
