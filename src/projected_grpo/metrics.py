"""``StepRow``: one schema drives the log, the printed table, its legend and the reports.

A new diagnostic is one field there and its value in ``step_row``.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from projected_grpo import proj
from projected_grpo.antipasto import Knobs
from projected_grpo.data_types import Rollout, Step
from projected_grpo.extract_vhack_grad import HackBasis
from projected_grpo.rollout_log import row_of


def column(legend: str, head: str | None = None, fmt: str = ".2f") -> Any:
    """A StepRow field. head: its short name in the printed table (None: not printed); fmt: of a number there."""
    return field(metadata={"legend": legend, "head": head, "fmt": fmt})


@dataclass(frozen=True)
class StepRow:
    """One optimizer step. Rates are shares of rollouts in 0..1; absent (no teacher, say) is None, never 0."""

    step: int = column("optimizer step", "step", "d")
    reward: float = column("mean reward of student rollouts, 0 to 3.5", "rew ↑")
    baseline: float = column("mean reward of all rollouts, a teacher's too")
    hack_s: float = column("student rollouts paid without being right", "hack")
    attempt_s: float = column("student rollouts with the exploit, whatever the answer", "att")
    solve_s: float = column("student rollouts that the strict oracle passes", "solve ↑")
    format_s: float = column("student rollouts with a fenced block of code", "fmt")
    hack_t: float | None = column("teacher rollouts paid without being right", "hack_t")
    solve_t: float | None = column("teacher rollouts that the strict oracle passes")
    hack_by_mode: Mapping[str, int] = column("student hacks by mode, count")
    attempt_by_mode: Mapping[str, int] = column("student attempts by mode, count")
    solve_by_mode: Mapping[str, int] = column("student solves by mode, count")
    n_by_mode: Mapping[str, int] = column("student rollouts by mode, count")
    cin: float | None = column("‖relu(V g)‖/‖g‖, hack-ward share of the batch gradient", "cin")
    cin_s: float | None = column("the same of the student rows' gradient")
    cin_t: float | None = column("the same of the teacher rows' gradient")
    cin_null: float | None = column("what cin would be for a random V", "null")
    cout: float | None = column("hack-ward share of what δS descends; 0 by identity under one_sided")
    cout_update: float | None = column("hack-ward share of δS's update, after AdamW's rescaling", "cout_Δ")
    fired: float = column("share of axes with a hack-ward coefficient")
    removed_frac: float | None = column("‖removed‖/‖g‖")
    withheld: float = column("student rollouts whose gradient, not 0, is kept from δS", "held")
    caught: float | None = column(
        "of student rollouts that fool their channel and have a gradient, the share that is flagged", "caught"
    )
    false_alarm: float | None = column("of the other student rollouts that have a gradient, the share that is flagged")
    auroc: float | None = column(
        "the arm's detector: P(a rollout that fools its channel scores over one that does not)"
    )
    caught_held_out: float | None = column("caught, by the held-out probe", "watch")
    auroc_held_out: float | None = column("auroc of the held-out probe, which nothing is trained against")
    threshold: float = column("score over which a rollout is flagged")
    gn: float = column("‖g‖ before clipping", "gn", ".3f")
    loss: float = column("Dr.GRPO loss of the batch gradient, without the KL term", None, ".4f")
    kl: float | None = column("mean K3 KL a token to the base; None at beta 0")
    n_zero_var: int = column("groups whose rewards are all alike: plain GRPO learns nothing from them", "flat", "d")
    norm_delta: float = column("norm of what is trained", "‖δS‖", ".1f")
    against: float | None = column("‖relu(V δS)‖/‖δS‖, share of what is trained that lies against the hack")
    against_null: float | None = column("what it would be for a random V")
    norm_delta_hack: float = column("norm of the quarantine δS_hack", None, ".1f")
    moved: float = column("share of knobs that this step changed")
    lr: float = column("learning rate", None, ".2e")
    basis_overlap: float | None = column("mean |⟨V_new, V_old⟩| at a refresh; under 0.2 it is harmful")
    basis_turned: float | None = column(
        "of the axes that a refresh leaves alike, the share that point the other way now"
    )
    truncated: float = column("student rollouts that ran into max_new before they ended")
    masked: float = column("student rollouts that the loss leaves out for being truncated")
    logp_diff: float | None = column("mean |log π of the trainer − log π of the sampler| over the student's tokens")
    logp_diff_p99: float | None = column("its 99th percentile")
    nucleus_mass: float | None = column(
        "mean π of the trainer / π of the sampler: the policy's mass within top_p; 1 but for rounding where top_p is 1"
    )
    comp_len: float = column("mean completion length of student rollouts, tokens", "len", ".0f")
    sec_gen: float = column("seconds sampling", None, ".2f")
    sec_grade: float = column("seconds grading", None, ".2f")
    sec_train: float = column("seconds in forward, backward, projection and update", None, ".2f")


PRINTED = [f for f in fields(StepRow) if f.metadata["head"]]
"""What the live table shows: a line of it takes 100 columns. The rest is in steps.jsonl and the report."""


def table_cells(row: StepRow | None) -> str:
    """A row of the live table, or its head when row is None; right-aligned, fixed widths."""
    cells = []
    for f in PRINTED:
        value = f.metadata["head"] if row is None else getattr(row, f.name)
        text = "–" if value is None else value if isinstance(value, str) else format(value, f.metadata["fmt"])
        cells.append(text.rjust(max(len(f.metadata["head"]), 5 if f.metadata["fmt"] == ".3f" else 4)))
    return " ".join(cells)


def legend() -> str:
    """What the printed columns mean, a line each."""
    return "\n".join(f"  {f.metadata['head']:8}{f.metadata['legend']}" for f in PRINTED)


def share_of(rows: Sequence[Any], verdict: str) -> float | None:
    """Share of rollouts whose grade has the verdict; None of none."""
    return sum(getattr(r.grade, verdict) for r in rows) / len(rows) if rows else None


def by_mode(rows: Sequence[Rollout], verdict: str | None = None) -> dict[str, int]:
    """Number of rollouts by mode; of those with the verdict where one is named."""
    return dict(Counter(r.task.mode for r in rows if verdict is None or getattr(r.grade, verdict)))


def auroc(scores: Float[Tensor, " b"], positive: Bool[Tensor, " b"]) -> float | None:
    """P(a positive's score > a negative's), ties counted half; None where either is missing."""
    if positive.all() or not positive.any():
        return None
    over = scores[positive][:, None] - scores[~positive][None]
    return float(((over > 0).double() + 0.5 * (over == 0)).mean())


def detection(x: Step) -> dict[str, float | None]:
    """How the detectors compare with the foolable channel: the arm's on student rollouts that have a gradient, the
    held-out probe on all of the student's.
    """
    student = x.batch.is_student
    live = student & (x.scores.sum(0) > 0)
    fools = torch.tensor([r.grade.channel for r in x.batch.rollouts], device=live.device)
    share = lambda flags, among: float(flags[among].double().mean()) if among.any() else None
    withheld = (x.factors.keep == 0) & (x.factors.whole * x.A != 0) & student
    row = {
        "withheld": float(withheld.sum() / student.sum()),
        "caught": share(x.flagged, live & fools),
        "false_alarm": share(x.flagged, live & ~fools),
        "auroc": auroc(x.acting[live], fools[live]) if live.any() else None,
    }
    if x.held_out is None:
        return row | {"caught_held_out": None, "auroc_held_out": None}
    return row | {
        "caught_held_out": share(x.held_out > x.held_out_threshold, student & fools),
        "auroc_held_out": auroc(x.held_out[student], fools[student]),
    }


def drift_stats(drift: Float[Tensor, " n"]) -> dict[str, float | None]:
    """How far the sampler's log-probs lie from the trainer's, over tokens; None of none.

    A token that was drawn within the nucleus has π_sampler = π / mass, and the mean of π_trainer / π_sampler over what
    a sampler draws is the trainer's mass on what it can draw, whatever else differs between the two.
    """
    if not len(drift):
        return dict.fromkeys(("logp_diff", "logp_diff_p99", "nucleus_mass"))
    far = drift.abs()
    p99 = far.kthvalue(math.ceil(0.99 * len(far))).values
    return {"logp_diff": float(far.mean()), "logp_diff_p99": float(p99), "nucleus_mass": float(drift.exp().mean())}


def step_row(step: int, x: Step, V: HackBasis, knobs: Knobs) -> StepRow:
    """Everything that is logged of a step."""
    student = [r for r in x.batch.rollouts if r.source == "student"]
    teacher = [r for r in x.batch.rollouts if r.source == "teacher"]
    moved = torch.cat([d != 0 for d in x.update.descent.values()])
    delta = {m: d.detach() for m, d in knobs.delta.items()}
    return StepRow(
        step=step,
        reward=sum(r.grade.reward for r in student) / len(student),
        baseline=sum(r.grade.reward for r in x.batch.rollouts) / len(x.batch.rollouts),
        hack_s=share_of(student, "exploited"),
        attempt_s=share_of(student, "attempted"),
        solve_s=share_of(student, "gt_correct"),
        format_s=share_of(student, "format_ok"),
        hack_t=share_of(teacher, "exploited"),
        solve_t=share_of(teacher, "gt_correct"),
        hack_by_mode=by_mode(student, "exploited"),
        attempt_by_mode=by_mode(student, "attempted"),
        solve_by_mode=by_mode(student, "gt_correct"),
        n_by_mode=by_mode(student),
        **x.projection.stats,
        **detection(x),
        threshold=x.threshold,
        cout_update=proj.share(x.update.descent, V.V),
        gn=x.projection.gn,
        loss=x.loss,
        kl=x.grads.kl,
        n_zero_var=x.n_zero_var,
        norm_delta=proj.total_norm(delta),
        against=proj.share(delta, V.V),
        against_null=proj.null_share(delta, V.V),
        norm_delta_hack=proj.total_norm(knobs.delta_hack),
        moved=float(moved.double().mean()),
        lr=x.update.lr,
        basis_overlap=None if x.overlap is None else x.overlap[0],
        basis_turned=None if x.overlap is None else x.overlap[1],
        truncated=float(x.batch.truncated.sum()) / len(student),
        masked=float(x.masked.sum()) / len(student),
        **drift_stats(x.grads.drift),
        comp_len=sum(len(r.ids) for r in student) / len(student),
        sec_gen=x.batch.seconds["gen"],
        sec_grade=x.batch.seconds["grade"],
        sec_train=x.sec_train,
    )


def rollout_rows(step: int, x: Step, layer_of: Sequence[int]) -> list[dict[str, Any]]:
    """The step's rollouts as they are written down. layer_of: the layer of each module that scores are made of."""
    layers = sorted(set(layer_of))
    by_layer = torch.stack([x.scores[[m == layer for m in layer_of]].sum(0) for layer in layers])
    total, random = x.scores.sum(0), x.random_scores.sum(0)
    rows = []
    for i, (r, a) in enumerate(zip(x.batch.rollouts, x.A.tolist(), strict=True)):
        live = bool(total[i] > 0 or random[i] > 0)
        rows.append(
            {
                "step": step,
                "source": r.source,
                "A": a,
                "kept": float(x.factors.keep[i]),
                "score": round(float(total[i]), 5) if live else None,
                "score_random": round(float(random[i]), 5) if live else None,
                "score_by_layer": [round(s, 5) for s in by_layer[:, i].tolist()] if live else None,
                "flagged": bool(x.flagged[i]) if live else None,
                "acting": round(float(x.acting[i]), 5),
                "held_out": None if x.held_out is None else round(float(x.held_out[i]), 5),
                **row_of(r.task, r.text, r.grade),
            }
        )
    return rows
