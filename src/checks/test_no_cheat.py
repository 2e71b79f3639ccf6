"""The strict oracle's verdict is logged and goes nowhere else: not into an advantage, a gate, an update or a pair.

Two routes. Poisoned grades raise when the verdict is read, and a whole step is taken with them. And the modules that
make advantages, gates and pairs do not name the verdict at all.
"""

import ast
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_models import save_with_words

import projected_grpo
from projected_grpo import arms, pairs, problems, rollout_log
from projected_grpo.arms import ARMS
from projected_grpo.config import PRESETS, Config
from projected_grpo.data_types import Grade
from projected_grpo.prepare import Experiment, refresh, set_up
from projected_grpo.train import make_optimizer, take_step

VERDICTS = {"gt_correct", "exploited", "solve_s", "hack_s", "label"}
"""The oracle's verdict and what is derived from it."""
MODULES = (
    "loss", "arms", "proj", "detectors", "extract_vhack_grad", "rollout", "pairs", "prepare", "antipasto", "decoding",
    "train", "scale/vllm_sampling", "scale/ranks", "scale/sharded", "scale/trl_trainer",
)  # fmt: skip
"""Modules in which an advantage, a gate, V or a pair is made, or a step is taken."""
MAY_NAME_IT = {"arms": {"monitor", "environment_alone"}, "train": {"learn", "say_outcome"},
               "rollout": {"VERDICTS", "HEADLINE", "h4_decision"}}  # fmt: skip
"""What arms marked oracle ask; what prints the log's numbers; and the evaluation on held-out problems."""


class Poisoned(Grade):
    """A grade whose strict verdict must not be read."""

    def __getattribute__(self, name):
        if name in VERDICTS:
            raise AssertionError(f"a step read {name}")
        return super().__getattribute__(name)


class BlindGrader:
    """Pays every second rollout, through the channel, and poisons the verdict."""

    def grade(self, submissions):
        return [
            Poisoned(reward=3.5 if paid else 0.5, format_ok=True, compiles=True, gt_correct=False, channel=paid,
                     attempted=paid, status="ok")
            for paid in (i % 2 == 1 for i in range(len(submissions)))
        ]  # fmt: skip


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Path:
    """One random model and one cache for all arms: the weights' SVD and the pairs' gradients are the same."""
    return save_with_words("qwen3", tmp_path_factory.mktemp("outputs"))


def experiment(name: str, outputs: Path) -> tuple[Experiment, Config]:
    """A small experiment of that arm, its pairs and directions made as in a run."""
    cfg = PRESETS["smoke"][1]
    cfg = replace(
        cfg,
        model=replace(cfg.model, model=str(outputs)),
        intervention=name,
        outputs=str(outputs),
        rl=replace(cfg.rl, group=4, prompts_per_step=4, max_new=12),
        vhack=replace(cfg.vhack, pairs="organism8", n_heldout=2, known_modes=("run_tests", "sentinel")),
        eval=replace(cfg.eval, n_eval=1),
    )
    return set_up(cfg), cfg


@pytest.mark.parametrize("name", [name for name, arm in ARMS.items() if not arm.oracle])
def test_a_step_never_reads_the_verdict(name, shared):
    """A whole step, and a refresh from the student's own rollouts after it, with grades that raise when read."""
    x, cfg = experiment(name, shared)
    made = take_step(x, arms.arm(name), BlindGrader(), make_optimizer(x.knobs, cfg), cfg, 0)
    assert made.batch.rewards.std() > 0
    assert any(bool(torch.any(d != 0)) for d in made.update.descent.values())
    x.recent.append(made.batch.rollouts)
    assert pairs.from_rollouts(made.batch.rollouts, cfg.vhack.known_modes)
    refresh(x, replace(cfg, vhack=replace(cfg.vhack, refresh_pairs="both")))


@pytest.mark.parametrize("name", [name for name, arm in ARMS.items() if arm.oracle])
def test_an_oracle_arm_does_read_it(name, shared):
    """The poison bites where the verdict is read, so its silence elsewhere means something."""
    x, cfg = experiment(name, shared)
    with pytest.raises(AssertionError, match="a step read"):
        take_step(x, arms.arm(name), BlindGrader(), make_optimizer(x.knobs, cfg), cfg, 0)


def test_pairs_from_a_pool_do_not_depend_on_the_verdict():
    tasks = problems.tasks_for(PRESETS["smoke"][1])[:8]

    def rows(verdict: bool) -> rollout_log.Pool:
        made = {}
        for t in tasks:
            grade = {"gt_correct": verdict}
            made[t.problem.id, t.mode] = [
                {"completion": "hacks", "grade": grade | {"channel": True, "attempted": True}},
                {"completion": "does not", "grade": grade | {"channel": False, "attempted": False}},
            ]
        return rollout_log.Pool(made)

    assert pairs.from_pool(rows(True), tasks) == pairs.from_pool(rows(False), tasks)
    assert len(pairs.from_pool(rows(True), tasks)) == 8


@pytest.mark.parametrize("module", MODULES)
def test_the_modules_that_make_gradients_do_not_name_the_verdict(module):
    tree = ast.parse((Path(projected_grpo.__file__).parent / f"{module}.py").read_text())
    allowed = MAY_NAME_IT.get(module, set())
    name_of = lambda s: s.targets[0].id if isinstance(s, ast.Assign) and isinstance(s.targets[0], ast.Name) else None
    tree.body = [s for s in tree.body if getattr(s, "name", name_of(s)) not in allowed]
    named = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
    named |= {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
    named |= {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    assert not named & VERDICTS


def test_the_poison_works():
    with pytest.raises(AssertionError, match="gt_correct"):
        _ = BlindGrader().grade([None])[0].gt_correct
