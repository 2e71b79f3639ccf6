"""The algorithm inside TRL: the same gradient and update as the loop, on one process and on two."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import ranks_worker
import torch

from projected_grpo import arms, data_types, proj, rollout_log, runs
from projected_grpo.command_line import parse
from projected_grpo.config import UserError
from projected_grpo.data_types import Grade, Rollout
from projected_grpo.extract_vhack_grad import HackBasis
from projected_grpo.prepare import set_up
from projected_grpo.problems import fence
from projected_grpo.rewards import Grader
from projected_grpo.scale import ranks, trl_trainer
from projected_grpo.scale.ranks import Ranks
from projected_grpo.scale.sharded import merged_parameters, unmerged
from projected_grpo.train import apply_step, make_optimizer

if not os.environ.get("CI"):  # CI installs the extra: there its absence is a failure
    pytest.importorskip("trl", reason="needs the extra trl")

LAUNCH = Path(trl_trainer.__file__).parent / "launch"
SMALL = [
    "--pairs=organism32", "--prompts-per-step=4", "--group=4", "--n-eval=1", "--eval-samples=1", "--graders=1",
    "--threads=1", "--refresh-every=0",
]  # fmt: skip


# --- two processes, the same rollouts: all arms


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> tuple[Path, list[dict]]:
    """The folder, and what each of two processes made of the written-down rollouts."""
    folder = tmp_path_factory.mktemp("two")
    ranks_worker.model_and_knobs(folder / "cache")  # the SVDs, once
    torch.multiprocessing.spawn(ranks_worker.process, (str(folder),), nprocs=2)
    return folder, [torch.load(folder / f"rank{r}.pt", weights_only=False) for r in (0, 1)]


@pytest.mark.parametrize("name", [*arms.ARMS, *(f"sharded {name}" for name in ranks_worker.SHARDED_ARMS)])
def test_two_processes_update_as_one_with_the_doubled_batch(two, name):
    folder, (first, second) = two
    made, state = ranks_worker.alone(folder / "cache", name.removeprefix("sharded "))
    factors, flagged, projection, grads, knobs = first[name][:5]
    assert torch.equal(flagged, made.flagged)
    assert all(torch.equal(getattr(factors, k), getattr(made.factors, k)) for k in ("whole", "keep"))
    torch.testing.assert_close(projection.kept, made.projection.kept, rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(projection.quarantined, made.projection.quarantined, rtol=1e-8, atol=1e-12)
    assert projection.gn == pytest.approx(made.projection.gn, rel=1e-9)
    torch.testing.assert_close(grads.objective, made.grads.objective, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(grads.drift.sort().values, made.grads.drift.sort().values)
    assert len(grads.drift) > 0
    torch.testing.assert_close(knobs, state, rtol=1e-6, atol=1e-9)
    assert all(torch.equal(knobs[n], t) for n, t in second[name][4].items()), "processes have drifted apart"


def test_the_arms_of_that_check_do_what_they_are_called_for(two):
    """The rollouts are such that arms differ: something is flagged, withheld, quarantined and removed."""
    _, (first, _) = two
    kept = {name: torch.cat(list(made[2].kept.values())) for name, made in first.items()}
    alike = {"none"}
    for name in arms.ARMS:
        assert torch.allclose(kept[name], kept["none"], rtol=1e-3, atol=0) == (name in alike), name
    assert 0 < int(first["gate_drop"][1].sum()) < len(first["gate_drop"][1])


def test_fsdp2_shards_weights_and_bases_and_leaves_the_knobs_whole(two):
    _, (first, second) = two
    share = first["sharded erase"][5]
    for name, (kind, local, whole) in share.items():
        if name.endswith((".delta", ".delta_hack")) or "embed" in name or name.endswith("model.norm.weight"):
            assert kind == "Parameter", name
            assert local == whole
        else:
            assert kind == "DTensor", name
            assert local + second["sharded erase"][5][name][1] == whole
    assert any(name.endswith(".U") for name in share)


def test_lots_are_evened_without_losing_a_row():
    lots, cpu = [torch.tensor([4, 2, 0]), torch.tensor([1])], torch.device("cpu")
    for n in (2, 3, 4, 5, 6):
        made = ranks.evened(lots, 6, n, cpu)
        rows = torch.cat(made).tolist()
        assert len(made) == n
        assert min(map(len, made)) > 0
        assert len(set(rows)) == len(rows)
        assert set(rows) >= {0, 1, 2, 4}
    with pytest.raises(ValueError, match="cannot be divided"):
        ranks.evened(lots, 6, 7, cpu)


# --- one process, TRL's own loss


class Seen(trl_trainer.ProjectedGRPOTrainer):
    """Keeps what TRL made of the step, before this project's loss sees it."""

    def batch(self, inputs):
        self.inputs = inputs
        return super().batch(inputs)


@pytest.fixture(scope="module")
def organism(tmp_path_factory):
    cfg = parse(["organism", *SMALL, "--steps=1", "--warmup=0", "--clip=0.01",
                 f"--outputs={tmp_path_factory.mktemp('outputs')}"])  # fmt: skip
    return cfg, set_up(cfg)


def by_trls_loss(trainer: Seen) -> dict[str, torch.Tensor]:
    """Each rollout's gradient in δS of TRL's own loss, by autograd, as ``G`` in the order of the groups."""
    x, inputs = trainer.x, trainer.inputs
    knobs = unmerged(x.model, x.knobs)
    with knobs.row_gradients(len(inputs["row"])) as eps:
        super(trl_trainer.ProjectedGRPOTrainer, trainer)._compute_loss(x.model, inputs).backward()
    for name, module in x.knobs.modules.items():  # the merged adapters go back
        parent, _, leaf = name.rpartition(".")
        setattr(x.model.get_submodule(parent), leaf, module)
    return {m: e.grad[inputs["row"].argsort()] for m, e in eps.items()}


def test_projected_gradient_is_that_of_trls_own_loss_and_the_update_the_loops(organism):
    """With a teacher's rollout in each group, whose ratio TRL takes for 1 as it knows no log-probs of the sampler."""
    cfg, x = organism
    grade = asdict(Grade(3.5, True, True, True, False, False, "ok"))
    x.teacher = rollout_log.Pool(
        {(t.problem.id, t.mode): [{"completion": fence(t.problem.canonical), "grade": grade}] for t in x.tasks}
    )
    zero = {n: torch.zeros_like(t) for n, t in x.knobs.state().items()}
    with Grader(1) as grader:
        for name in ("none", "erase", "route"):
            cfg = parse(["organism", *SMALL, "--steps=1", "--warmup=0", "--clip=0.01", f"--intervention={name}",
                         "--mix-ratio=0.25", "--pool=by-hand", f"--outputs={cfg.outputs}"])  # fmt: skip
            x.knobs.load_state(zero)
            trainer = Seen(x, grader, None, cfg, Ranks())
            assert trainer.ref_model is None
            trainer.train()
            made, state = trainer.made, x.knobs.state()
            assert made.batch.is_student.tolist() == [True, True, True, False] * 4
            assert [r.source == "student" for r in made.batch.rollouts] == made.batch.is_student.tolist()
            assert made.n_zero_var < 4, "these rollouts carry no gradient"
            x.knobs.load_state(zero)
            V: HackBasis = x.directions.real
            G = by_trls_loss(trainer)
            sums = proj.sums(G, data_types.Factors.plain(16), made.batch.is_student)
            theirs = proj.decided(sums, V, V, arms.ARMS[name], cfg.vhack)
            for ours, other in ((made.projection.kept, theirs.kept), (made.projection.quarantined, theirs.quarantined)):
                if ours is not None:
                    error = proj.total_norm({m: ours[m] - other[m] for m in ours})
                    assert error < 1e-4 * theirs.gn, name
            apply_step(x.knobs, made.projection, make_optimizer(x.knobs, cfg), cfg.rl.clip)
            torch.testing.assert_close(state, x.knobs.state(), rtol=1e-6, atol=1e-9)
            assert any(bool(t.any()) for n, t in state.items() if n.endswith(".delta_hack")) == (name == "route")


# --- vLLM's weights, on a stub of its engine


def test_an_engine_is_given_the_merged_weights(tmp_path):
    """TRL's own sync, with an engine that only takes weights: loaded into a bare model they give the same logits."""
    vllm_generation = pytest.importorskip("trl.generation.vllm_generation")
    model, knobs = ranks_worker.model_and_knobs(tmp_path / "cache")
    ids, loaded = torch.arange(2, 12)[None], {}
    expected = model(input_ids=ids).logits
    engine = SimpleNamespace(load_weights=lambda pairs: loaded.update({n: t.clone() for n, t in pairs}))
    for part in ("model", "model_runner", "driver_worker", "model_executor"):
        engine = SimpleNamespace(**{part: engine})
    sync = object.__new__(vllm_generation.VLLMGeneration)
    sync.mode, sync.enable_sleep_mode, sync.accelerator = "colocate", False, SimpleNamespace(is_main_process=True)
    sync.llm = SimpleNamespace(llm_engine=engine, reset_prefix_cache=lambda: None)
    sync._iter_named_params = lambda: merged_parameters(model, knobs)
    sync.sync_weights()
    bare = type(model)(model.config).double().eval()
    missing, unexpected = bare.load_state_dict(loaded, strict=False)
    assert set(missing) <= {"lm_head.weight"}  # tied
    assert not unexpected
    torch.testing.assert_close(bare(input_ids=ids).logits, expected)
    with knobs.using("base"):
        assert not torch.allclose(model(input_ids=ids).logits, expected)


def logits_of_uses(model, knobs) -> list[torch.Tensor]:
    made = []
    for use in ("base", "deployed", "trained", 0.5):
        with knobs.using(use):
            made.append(model(input_ids=torch.arange(2, 12)[None]).logits)
    return made


def test_unmerged_adapters_are_the_same_function(tmp_path):
    model, knobs = ranks_worker.model_and_knobs(tmp_path / "cache")
    merged = logits_of_uses(model, knobs)
    torch.testing.assert_close(logits_of_uses(model, unmerged(model, knobs)), merged)
    assert not torch.allclose(merged[1], merged[2])


@pytest.mark.parametrize("vllm", ["off", "colocate", "server"])
def test_trl_generates_under_the_loops_rules(vllm):
    """Which tokens end a completion, and no others; vLLM's share of the memory and its longest row."""
    cfg = parse(["organism", "--vllm-memory=0.4", "--max-new=50", "--max-prompt=70"])
    made = trl_trainer.settings(cfg, Ranks(), vllm, 1, (3, 7))
    ends = {"eos_token_id": [3, 7]} if vllm == "off" else {"stop_token_ids": [3, 7], "ignore_eos": True}
    assert made.generation_kwargs == ends
    assert (made.vllm_gpu_memory_utilization, made.vllm_max_model_length) == (0.4, 120)
    assert made.vllm_enable_sleep_mode == (vllm == "colocate")


def test_what_vllm_drew_at_stands_in_the_batch(monkeypatch, organism):
    """Of the student's rows; NaN in the teacher's, and where vLLM gives none."""
    cfg, x = organism
    task, grade = x.tasks[0], Grade(0.5, True, True, False, False, False, "ok")
    end = x.tokenizer.ends[0]
    trainer = object.__new__(trl_trainer.ProjectedGRPOTrainer)
    cached = Rollout(task, "teacher", (8, end), "", grade)
    trainer.x, trainer.cfg, trainer.ranks, trainer.processed = x, cfg, Ranks(), True
    trainer.start, trainer.state, trainer.cached = 0, SimpleNamespace(global_step=0), [None, cached, None]
    answer = ([[5, 6, end], [7]], [[-0.5, None, -2.0], [-3.0]])
    monkeypatch.setattr(trl_trainer.GRPOTrainer, "_generate_single_turn", lambda self, *_: answer)
    written, _ = trainer._generate_single_turn([[1], [1], [1]], None, {})
    rows = [Rollout(task, "student" if r is None else "teacher", tuple(ids), "", grade)
            for r, ids in zip(trainer.cached, written, strict=True)]  # fmt: skip
    trainer.environment = SimpleNamespace(rollouts=rows, seconds=0.0)
    made = trainer.batch({"row": torch.arange(3), "is_teacher": torch.tensor([False, True, False])})
    nan = math.nan
    expected = torch.tensor([-0.5, nan, -2.0, nan, nan, -3.0])
    torch.testing.assert_close(made.drawn[made.mask], expected, equal_nan=True)
    assert made.drawn[~made.mask].isnan().all()
    assert made.truncated.tolist() == [False, False, True]


@pytest.mark.parametrize(("mode", "cap", "processed"), [
    ("processed_logprobs", 2.0, True), ("raw_logprobs", None, False), ("raw_logprobs", 2.0, None),
])  # fmt: skip
def test_a_servers_log_probs_have_to_be_of_what_it_draws_from(mode, cap, processed):
    trainer = object.__new__(trl_trainer.ProjectedGRPOTrainer)
    trainer.cfg, trainer.ranks = parse(["organism", *([f"--importance-cap={cap}"] if cap else [])]), Ranks()
    trainer.accelerator = SimpleNamespace(is_main_process=True)
    client = SimpleNamespace(get_server_info=lambda: {"model_config": {"logprobs_mode": mode}})
    trainer.vllm_generation = SimpleNamespace(vllm_client=client)
    if processed is None:
        with pytest.raises(UserError, match="--logprobs-mode processed_logprobs"):
            trainer.served_processed()
    else:
        assert trainer.served_processed() == processed


# --- refusals


@pytest.mark.parametrize(
    ("env", "argv", "here", "vllm", "words"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, [], Ranks(), "off", "DeepSpeed steps inside"),
        ({"FSDP_VERSION": "1"}, [], Ranks(0, 2, True), "off", "fsdp_version: 2"),
        ({"MASTER_ADDR": "127.0.0.1"}, [], Ranks(), "off", "cpu.yaml"),
        ({}, ["--prompts-per-step=3"], Ranks(0, 2), "off", "multiple of the 2 processes"),
        ({}, ["--relearn-steps=1"], Ranks(), "off", "projected_grpo.train"),
        ({}, ["--importance-cap=2"], Ranks(), "off", "--vllm=colocate or --vllm=server"),
    ],
)
def test_what_cannot_work_is_refused(monkeypatch, env, argv, here, vllm, words):
    for name in ("WORLD_SIZE", "MASTER_ADDR", "FSDP_VERSION", "ACCELERATE_USE_DEEPSPEED"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=words):
        trl_trainer.refuse(parse(["organism", *argv]), here, vllm)


# --- a launched run of two processes, one of which is killed


def children(pid: int) -> list[int]:
    """The processes that one has started."""
    return [int(p) for t in Path(f"/proc/{pid}/task").glob("*/children") for p in t.read_text().split()]


RUN = ["organism", "--intervention=erase", "--name=pair", *SMALL, "--steps=500", "--checkpoint-every=1", "--beta=0.01"]


def test_a_launched_run_logs_once_and_a_killed_process_ends_it(tmp_path, monkeypatch):
    """Two processes: one log, different rollouts, and an end within a minute of one's death, with a checkpoint."""
    command = [
        *(sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(LAUNCH / "cpu.yaml")),
        *("-m", "projected_grpo.scale.trl_trainer", *RUN, f"--outputs={tmp_path}"),
    ]
    with (tmp_path / "said").open("w") as said:
        launcher = subprocess.Popen(command, stdout=said, stderr=said, env=os.environ | {"OMP_NUM_THREADS": "1"})
    folder = tmp_path / "runs" / "pair.part"
    try:
        for _ in range(6000):
            if (folder / "steps.jsonl").exists() and (folder / "steps.jsonl").read_text().count("\n") >= 2:
                break
            assert launcher.poll() is None, (tmp_path / "said").read_text()[-3000:]
            time.sleep(0.1)
        assert json.loads((folder / "meta.json").read_text())["trainer"]["n"] == 2
        is_second = lambda p: b"\0RANK=1\0" in b"\0" + Path(f"/proc/{p}/environ").read_bytes()
        os.kill(next(filter(is_second, children(launcher.pid))), signal.SIGKILL)
        launcher.wait(60)
    finally:
        launcher.kill()
    assert launcher.returncode != 0
    text = (tmp_path / "said").read_text()
    assert "Signal 9 (SIGKILL)" in text or "exitcode  : -9" in text
    meta = json.loads((folder / "meta.json").read_text())
    assert meta["status"] == "failed"
    assert re.search("another process of the run ended", meta["error"])
    steps, rows = runs.json_lines(folder / "steps.jsonl"), list(rollout_log.rows(folder))
    assert [s["step"] for s in steps] == list(range(len(steps)))
    assert len(rows) == 16 * len(steps)
    halves = [[r["completion"] for r in rows[half * 8 : half * 8 + 8]] for half in (0, 1)]
    assert not set(halves[0]) & set(halves[1])
    assert all(s["kl"] is not None and math.isfinite(s["kl"]) for s in steps)
    assert text.count("step rew ↑") == 1, "the table's head is printed once"
    goes_on_alone(tmp_path, runs.newest_checkpoint(folder), monkeypatch)


def goes_on_alone(outputs: Path, at: runs.Checkpoint, monkeypatch) -> None:
    """One process takes the next step of what two have begun."""
    record = trl_trainer.ProjectedGRPOTrainer.record

    def once(trainer) -> None:
        record(trainer)
        raise KeyboardInterrupt

    monkeypatch.setattr(trl_trainer.ProjectedGRPOTrainer, "record", once)
    with pytest.raises(KeyboardInterrupt):
        trl_trainer.train(parse([*RUN, f"--outputs={outputs}", "--resume=pair"]))
    folder = outputs / "runs" / "pair.part"
    steps = runs.json_lines(folder / "steps.jsonl")
    assert [s["step"] for s in steps] == list(range(at.done + 1))
    after = runs.newest_checkpoint(folder)
    assert after.done == at.done + 1
    counts = {float(t) for n, t in after.tensors.items() if n.startswith("adamw.") and n.endswith(".step")}
    assert counts == {after.done}
    assert json.loads((folder / "meta.json").read_text())["resumed"][0]["at"] == f"step {at.done}"
