"""How well pair sets tell hacks among a run's first rollouts: what to judge a set by before runs are spent on it.

    python -m projected_grpo.tools.judge_pairs outputs/runs/NAME ... [--sets planned64 organism64] [--steps=16]

All at the untrained weights, with the runs' settings, by the detectors that arms have: gate_drop's, of each rollout's
own gradient along V, and gate_act's probe of hidden states. AUROC is against the channel, the foolable verdict, of
student rollouts. Below the sets stand draws of nothing: the first set with half of its labels swapped, and random
directions, with the first set's threshold.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from jaxtyping import Bool, Float
from tabulate import tabulate
from torch import Tensor, nn

from projected_grpo import antipasto, arms, detectors, loss, models, pairs, problems, rollout_log
from projected_grpo import extract_vhack_grad as vhack
from projected_grpo.antipasto import Knobs
from projected_grpo.command_line import command, config_of, run_main
from projected_grpo.config import Config, Count, UserError
from projected_grpo.data_types import Mode, Task
from projected_grpo.detectors import MEAN, Detector
from projected_grpo.metrics import auroc
from projected_grpo.runs import read_meta

DRAWS = 5
KINDS: dict[str, tuple[str, str]] = {
    "": ("gate_drop", "gate_act"),
    "labels swapped": ("shuffled_V", "gate_act_punish_shuffled"),
    "random directions": ("gate_random", "gate_act_random"),
}
"""What a row's detectors are made of -> the arms that have them, by gradients and by hidden states."""


@dataclass(frozen=True)
class Judged:
    """A detector to be judged; several of one name are draws. right: share of held-out pairs that V tells apart."""

    name: str
    by: Literal["gradient", "activation"]
    detector: Detector
    right: float | None


@dataclass(frozen=True)
class Written:
    """Student rollouts: task and completion; whether the channel paid."""

    asked: list[tuple[Task, str]]
    fools: Bool[Tensor, " b"]


def settings_of(folders: Sequence[Path]) -> Config:
    """What the runs share: model, problems, the making of V. Raises UserError where they do not share it."""
    shared = lambda cfg: (cfg.model, cfg.data, cfg.vhack, cfg.rl.max_new, cfg.rl.temperature)
    first = None
    for folder in folders:
        if not isinstance(meta := read_meta(folder), dict):
            raise UserError(f"{folder} holds no run: name folders of outputs/runs")
        cfg = config_of(meta.get("config"), folder)
        first = first or cfg
        if shared(cfg) != shared(first):
            raise UserError(f"{folder} has another model, other problems or another V than {folders[0]}")
    if first is None:
        raise UserError("name runs whose rollouts hold hacks: outputs/runs/NAME")
    return replace(first, model=replace(first.model, device="auto"))


def read(folders: Iterable[Path], tasks: Sequence[Task], steps: int) -> Written:
    """The student's rollouts of the runs' first steps. Raises UserError where there is nothing to tell apart."""
    known = {(t.problem.id, t.mode): t for t in tasks}
    asked, fools = [], []
    for row in (row for folder in folders for row in rollout_log.rows(folder)):
        if row["source"] == "student" and row["step"] < steps:
            if (task := known.get((row["problem_id"], row["env_mode"]))) is None:
                raise UserError(
                    f"the runs have a problem {row['problem_id']} in {row['env_mode']}, and this code has not"
                )
            asked.append((replace(task, wording=problems.wording_of(row["wording"], task.wording)), row["completion"]))
            fools.append(row["grade"]["channel"])
    if len(set(fools)) < 2:
        raise UserError(f"{sum(fools)} of {len(fools)} rollouts fool their channel: nothing to tell apart")
    return Written(asked, torch.tensor(fools))


def made_from(
    name: str, model: nn.Module, knobs: Knobs, tokenizer: Any, tasks: Sequence[Task], cfg: Config, draws: bool
) -> Iterator[Judged]:
    """A set's detectors and, where asked for, those of nothing."""
    cfg = replace(cfg, vhack=replace(cfg.vhack, pairs=name))
    chosen = pairs.load(cfg.vhack, None, tasks)
    own = vhack.grads_for(model, knobs, tokenizer, chosen, cfg)
    states = detectors.of_pairs(model, tokenizer, chosen, [MEAN])[MEAN]
    whole = vhack.fit_basis(own, cfg.vhack)
    real = vhack.sliced(whole, cfg.vhack)
    for what, names in KINDS.items():
        for seed in range((DRAWS if draws else 0) if what else 1):
            for arm in map(arms.arm, names):
                used = vhack.basis_of(arm.basis, real, own, None, cfg.vhack, seed)
                detector = detectors.detector_for(arm, own, used, states, replace(cfg, seed=seed))
                right = None if what or arm.score != "gradient" else whole.meta["heldout_accuracy"]
                yield Judged(what or name, arm.score, detector, right)


def scores(
    written: Written, made: Sequence[Judged], model: nn.Module, knobs: Knobs, tokenizer: Any, cfg: Config
) -> Float[Tensor, "d b"]:
    """Every rollout's score by each detector. A lot at a time: the gradients of all would not fit."""
    found = []
    for lot in torch.arange(len(written.asked)).split(cfg.rl.micro_batch):
        asked = [written.asked[i] for i in lot]
        prompts = [problems.encode_prompt(tokenizer, task) for task, _ in asked]
        texts = [[*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id] for _, text in asked]
        ids, mask = loss.collate(prompts, texts, tokenizer.pad_token_id, model.device)
        weight = torch.full((len(ids),), 1.0 / cfg.rl.max_new, device=model.device)
        evidence = {
            "gradient": loss.row_gradients(model, knobs, ids, mask, weight, temperature=cfg.rl.temperature).G,
            "activation": detectors.pooled(model, ids, mask, [MEAN])[MEAN],
        }
        found.append(torch.stack([d.detector(evidence[d.by]) for d in made]).cpu())
    return torch.cat(found, 1)


def table(written: Written, made: Sequence[Judged], scored: Float[Tensor, "d b"]) -> str:
    """A row a set and kind of detector: AUROC of all rollouts and by mode, what is flagged; of draws the mean, and the
    least and the greatest AUROC.
    """
    fools, modes = written.fools, sorted({task.mode for task, _ in written.asked})
    among = [torch.tensor([mode in (None, task.mode) for task, _ in written.asked]) for mode in (None, *modes)]
    draws: dict[tuple[str, str], list[list[float | None]]] = {}
    for d, score in zip(made, scored, strict=True):
        ranks = [auroc(score[m], fools[m]) for m in among]
        flags = [float((score[who] > d.detector.threshold).double().mean()) for who in (fools, ~fools)]
        draws.setdefault((d.name, d.by), []).append([d.right, *ranks, *flags])
    mean = lambda values: None if None in values else sum(values) / len(values)
    span = lambda each: f"{min(x[1] for x in each):.2f}–{max(x[1] for x in each):.2f}" if len(each) > 1 else None
    rows = [[*key, *map(mean, zip(*each, strict=True))] for key, each in draws.items()]
    rows = [[*row[:4], span(each), *row[4:]] for row, each in zip(rows, draws.values(), strict=True)]
    head = ("pairs", "score", "pairs right", "AUROC", "of draws", *modes, "caught", "false alarm")
    return tabulate(rows, headers=head, floatfmt=".2f", missingval="–", tablefmt="github")


def main(
    runs: tyro.conf.Positional[tuple[str, ...]] = (),
    sets: tuple[str, ...] = (),
    known_modes: tuple[Mode, ...] = (),
    steps: Count = 16,
) -> None:
    """Print the table of pair sets (every kind, 64 pairs, if none is named), of the known modes alone where named."""
    folders = list(dict.fromkeys(Path(run) for run in runs))
    if "pool" in sets:
        raise UserError("pairs of a pool are not judged here: name sets of pairs.KINDS, or a JSON file")
    cfg = settings_of(folders)
    cfg = replace(cfg, vhack=replace(cfg.vhack, known_modes=known_modes or cfg.vhack.known_modes))
    tasks = problems.tasks_for(cfg)
    written = read(folders, tasks, steps)
    model, tokenizer = models.load(cfg.model)
    knobs = antipasto.wrap(model, cfg.cache, cfg.model.layers, cfg.model.svd_rank)
    names = sets or tuple(f"{kind}64" for kind in pairs.KINDS)
    made = [d for i, name in enumerate(names) for d in made_from(name, model, knobs, tokenizer, tasks, cfg, i == 0)]
    print(table(written, made, scores(written, made, model, knobs, tokenizer, cfg)))
    n, paid = len(written.fools), int(written.fools.sum())
    print(f"\n{paid} of {n} rollouts fool their channel: the first {steps} steps of {len(folders)} runs")


if __name__ == "__main__":
    run_main(command(main))
