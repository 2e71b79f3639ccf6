"""``just gpu-check``: the whole list on a CPU, in an image that lacks everything optional; what its runner promises."""

import json
import os
import resource
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from torch.utils.flop_counter import FlopCounterMode

from projected_grpo import antipasto, decoding, loss, memory, models
from projected_grpo.bench import gpu_check, gpu_cost, gpu_right
from projected_grpo.bench.gpu_check import Report, Step
from projected_grpo.bench.gpu_parts import TINY, Check, Row
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
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 60
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


def test_a_device_that_fails_after_a_step_has_ended_fails_that_step_alone(tmp_path, monkeypatch):
    cleared = iter((None, RuntimeError("an illegal memory access\nwas encountered"), None))

    def empty_cache():
        if error := next(cleared):
            raise error

    monkeypatch.setattr(torch.cuda, "empty_cache", empty_cache)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(gpu_check, "STEPS", [Step(n, lambda check: iter([Row("measured", 1.0)]), 9) for n in "123"])
    with (tmp_path / "jsonl").open("w") as lines, (tmp_path / "md").open("w") as table:
        assert gpu_check.take_all(Check(torch.device("cuda"), TINY, tmp_path), Report(lines, table)) == 1
    rows = [json.loads(line) for line in (tmp_path / "jsonl").read_text().splitlines()]
    assert {r["step"]: r["ok"] for r in rows if r["what"] == "the whole step"} == {"1": True, "2": False, "3": True}
    assert "RuntimeError: an illegal memory access" in [r["what"] for r in rows if r["step"] == "2"]


@pytest.fixture
def check(tmp_path) -> Check:
    """A CPU's, with the large model of the tiny size."""
    made = Check(torch.device("cpu"), TINY, tmp_path)
    assert all(row.ok is not False for row in gpu_cost.built(made))
    return made


WRONG = {"right": (0, 1.0), "positions off by 5": (5, 1.0), "logits half as large again": (0, 1.5)}


@pytest.mark.parametrize("what", WRONG)
def test_padding_and_log_probs_fail_where_the_sampler_is_wrong(what, check, monkeypatch):
    shift, scale = WRONG[what]
    admit, logits_of = decoding.Slots.admit, decoding.logits_of

    def shifted(slots, *args):
        admit(slots, *args)
        slots.position += shift

    monkeypatch.setattr(decoding.Slots, "admit", shifted)
    monkeypatch.setattr(decoding, "logits_of", lambda head, h: scale * logits_of(head, h))
    for step in (gpu_right.padded, gpu_right.logprobs):
        failed = {row.what.partition(":")[0] for row in step(check) if row.ok is False}
        assert failed == (set() if what == "right" else {"bfloat16", "float32"}), step


def test_every_measurement_of_the_merge_forms_every_merged_weight(check, monkeypatch):
    made, by_call, seconds = [], [], Check.seconds
    rounded = antipasto.round_stochastic
    monkeypatch.setattr(antipasto, "round_stochastic", lambda *a: (made.append(a), rounded(*a))[1])

    def counted(self, *args, **kw):
        before, taken = len(made), seconds(self, *args, **kw)
        by_call.append(len(made) - before)
        return taken

    monkeypatch.setattr(Check, "seconds", counted)
    rows = list(gpu_cost.merged(check))
    assert by_call == [len(check.model[1].modules)] * 2  # the peak's and the time's
    assert all(row.ok is not False for row in rows)
    planned = gpu_cost.parts(check)["forming one W'"]
    for peak, ok in ((0.0, False), (0.9 * planned, True), (1.2 * planned, False)):
        monkeypatch.setattr(Check, "peak", lambda self, call, peak=peak: (call(), peak))
        assert [row.ok for row in gpu_cost.merged(check) if row.what.startswith("bytes")] == [ok]


def test_the_step_of_full_is_extrapolated_from_the_presets_own_gradients(check, monkeypatch):
    called, row_gradients = [], loss.row_gradients

    def noted(model, knobs, ids, *args, **kw):
        called.append((loss.checkpoints(model), kw.get("beta"), kw.get("lot_tokens"), kw.get("micro_batch"), len(ids)))
        return row_gradients(model, knobs, ids, *args, **kw)

    cfg = TINY.cfg
    own = (cfg.model.gradient_checkpointing, cfg.rl.beta, memory.LOTS[0], cfg.rl.micro_batch, cfg.rl.micro_batch)
    # whatever is not as the preset has it is a thousand times as fast
    monkeypatch.setattr(Check, "peak", lambda self, call: (call(), (2.0 if called[-1] == own else 2e-3, None))[1])
    monkeypatch.setattr(loss, "row_gradients", noted)
    rows = list(gpu_cost.gradient(check))
    assert check.took["tokens/s"] == own[-1] * TINY.length / 2.0
    assert (
        len({x[:3] for x in called if x[1] is not None})
        == 1 + 2 * 2 * len(TINY.lots)
        == sum(row.unit == "TFLOP/s" for row in rows)
    )
    called.clear()
    assert all(row.ok is not False for row in gpu_cost.whole_step(check))
    assert [x[:4] for x in called] == [own[:4]]


@pytest.mark.parametrize("chunked", [False, True])
def test_the_work_of_gradients_is_what_a_counter_counts(chunked, check, monkeypatch):
    model, knobs = check.model
    ids, mask, weight = gpu_cost.batch(check, 2, TINY.length)
    if chunked:
        monkeypatch.setattr(loss, "LOGIT_BUDGET", 4 * TINY.shape["vocab_size"])
    for again in (False, True):
        models.recompute(model, again)
        for beta in (0.0, 0.1):
            counter, forwards = FlopCounterMode(display=False), []
            linear = next(m for n, m in knobs.modules.items() if "layers.1" in n)
            hook = linear.register_forward_hook(lambda *_, forwards=forwards: forwards.append(1))
            with counter:
                loss.row_gradients(model, knobs, ids, mask, weight, beta=beta, kl_weight=1.0)
            hook.remove()
            assert len(forwards) == 1 + bool(beta) + again * (1 + bool(beta))
            counted = sum(n for op, n in counter.get_flop_counts()["Global"].items() if "mm" in str(op))
            first = [
                m for n, m in knobs.modules.items() if "layers.0." in n and n[-6:] in ("q_proj", "k_proj", "v_proj")
            ]
            # what is not recomputed sends nothing back to the embeddings
            unsent = 0 if again else 2 * mask.numel() * sum(m.linear.weight.numel() for m in first)
            assert gpu_cost.work_of(model, knobs, mask, beta, again) == counted + (1 + bool(beta)) * unsent


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
    check.took = {"tokens/s": 20_000.0, "project": 0.5, "update": 3.0}
    turn = 0.010 + 0.002 * (481 + 768 - 512) / (1500 - 512)
    whole = 4 * 1536 * turn + 256 * (481 + 1536) / 20_000 + 0.5 + 3.0
    said = gpu_cost.full_step(check)
    assert f": {whole:.3g} s (" in said
    assert f"200 steps: {200 * whole / 3600:.3g} h" in said
    check.took.pop("update")
    assert "not to be said" in gpu_cost.full_step(check)
