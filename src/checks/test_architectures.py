"""Every supported architecture, in float32 and bfloat16, through whole steps of every arm, refresh, resume and export.

The models are random and tiny, with the organism's tokenizer: what they write is nonsense, rewards are drawn.
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_models import KINDS, save_with_words
from transformers import AutoModelForCausalLM

from projected_grpo import arms, pairs, train
from projected_grpo.arms import ARMS
from projected_grpo.command_line import parse
from projected_grpo.config import Config
from projected_grpo.data_types import Grade
from projected_grpo.prepare import OWN_PAIRS, Experiment, directions_for, refresh, set_up
from projected_grpo.runs import RunRecord
from projected_grpo.tools import export
from projected_grpo.train import make_optimizer, take_step

CASES = [(kind, dtype) for kind in KINDS for dtype in ("float32", "bfloat16")]
ALWAYS = {"erase", "route", "gate_act_punish", "rebound_mul"}
SMALL = (
    "--pairs=organism8", "--n-heldout=2", "--k=2", "--steps=3", "--group=4", "--prompts-per-step=2", "--max-new=6",
    "--n-eval=1", "--eval-samples=1", "--refresh-every=2", "--checkpoint-every=1", "--graders=1", "--threads=1",
)  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A saved random model of each kind, with the organism's tokenizer."""
    return {kind: save_with_words(kind, tmp_path_factory.mktemp(kind)) for kind in KINDS}


def config(folder: Path, dtype: str, *more: str) -> Config:
    return parse(["organism", f"--model={folder}", f"--dtype={dtype}", f"--outputs={folder}", *SMALL, *more])


def as_arm(x: Experiment, cfg: Config, name: str) -> Config:
    """The same experiment under another arm, its knobs at zero."""
    cfg = replace(cfg, intervention=name)
    x.knobs.load_state({n: torch.zeros_like(t) for n, t in x.knobs.state().items()})
    own = OWN_PAIRS.get(arms.arm(name).basis)
    x.other_pairs = pairs.load(replace(cfg.vhack, pairs=own), None, x.tasks)[:10] if own else None
    x.directions = directions_for(x.model, x.knobs, x.tokenizer, x.pairs, x.other_pairs, x.watch_pairs, cfg)
    return cfg


class OneInFourHacks:
    """In each group of four one rollout hacks and is paid; the honest ones differ in reward as well."""

    def grade(self, submissions) -> list[Grade]:
        kinds = [(3.5, True), (0.5, False), (0.0, False), (3.5, False)]
        return [
            Grade(reward=reward, format_ok=True, compiles=True, gt_correct=reward == 3.5 and not hacked,
                  channel=hacked, attempted=hacked, status="ok")
            for reward, hacked in (kinds[i % 4] for i in range(len(submissions)))
        ]  # fmt: skip


@pytest.mark.parametrize("number", range(len(CASES)))
def test_every_arm_takes_a_step(number, folders):
    """Each arm on one of the six cases in turn, the principal ones on all of them."""
    kind, dtype = CASES[number]
    cfg = config(folders[kind], dtype, "--name=arms")
    x = set_up(cfg)
    for name in sorted(ALWAYS | set(list(ARMS)[number :: len(CASES)])):
        arm_cfg = as_arm(x, cfg, name)
        made = take_step(x, ARMS[name], OneInFourHacks(), make_optimizer(x.knobs, arm_cfg), arm_cfg, 0)
        change = torch.cat(list(made.update.descent.values()))
        assert torch.isfinite(change).all(), name
        assert change.any() or not made.factors.keep.any(), f"{name} kept rollouts and moved nothing"
        assert made.scores.dtype == torch.float32
        refresh(x, arm_cfg)


@pytest.mark.parametrize(("kind", "dtype"), CASES)
def test_a_run_is_resumed_and_exported(kind, dtype, folders, monkeypatch, tmp_path):
    """Stopped after two of three steps and resumed: the same rows and the same exported model as without a stop."""
    name = f"{kind}-{dtype}"
    whole = train.train(config(folders[kind], dtype, "--intervention=route", f"--name={name}"))
    rollouts = RunRecord.rollouts

    def dies(self, step, rows):
        rollouts(self, step, rows)
        if step == 2:
            raise KeyboardInterrupt

    stopped = config(folders[kind], dtype, "--intervention=route", f"--name={name}-cut")
    monkeypatch.setattr(RunRecord, "rollouts", dies)
    with pytest.raises(KeyboardInterrupt):
        train.train(stopped)
    monkeypatch.setattr(RunRecord, "rollouts", rollouts)
    resumed = train.train(config(folders[kind], dtype, "--intervention=route", f"--resume={name}-cut"))
    rows = [
        [{k: v for k, v in json.loads(line).items() if not k.startswith("sec_")} for line in f.read_text().splitlines()]
        for f in (whole / "steps.jsonl", resumed / "steps.jsonl")
    ]
    assert rows[0] == rows[1]
    ids = torch.arange(10, 30)[None]
    logits = []
    for run in (whole, resumed):
        export.export(run, tmp_path / run.name)
        with torch.no_grad():
            model = AutoModelForCausalLM.from_pretrained(tmp_path / run.name, dtype=getattr(torch, dtype)).eval()
            logits.append(model(ids).logits)
    assert torch.equal(*logits)
