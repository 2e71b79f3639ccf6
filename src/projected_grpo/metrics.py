"""``StepRow``: one schema drives the log, the printed table, its legend and the reports.

A new diagnostic is one field there and its value in ``step_row``.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from projected_grpo import proj
from projected_grpo.antipasto import Knobs
from projected_grpo.data_types import GradedBatch
from projected_grpo.extract_vhack_grad import HackBasis
from projected_grpo.loss import RowGrads
from projected_grpo.proj import Projection


def column(legend: str, head: str | None = None, fmt: str = ".2f") -> Any:
    """A StepRow field. head: its short name in the printed table (None: not printed); fmt: of a number there."""
    return field(metadata={"legend": legend, "head": head, "fmt": fmt})


@dataclass(frozen=True)
class StepRow:
    """One optimizer step. Rates are shares of rollouts in 0..1; absent (no teacher, say) is None, never 0."""

    step: int = column("optimizer step", "step", "d")
    reward: float = column("mean reward of student rollouts, 0 to 3.5", "rew ↑")
    hack_s: float = column("student rollouts paid without being right", "hack")
    attempt_s: float = column("student rollouts with the exploit, whatever the answer", "att")
    solve_s: float = column("student rollouts that the strict oracle passes", "solve ↑")
    format_s: float = column("student rollouts with one closed code fence", "fmt")
    hack_t: float | None = column("teacher rollouts paid without being right", "hack_t")
    solve_t: float | None = column("teacher rollouts that the strict oracle passes")
    hack_by_mode: Mapping[str, int] = column("student hacks by mode, count")
    attempt_by_mode: Mapping[str, int] = column("student attempts by mode, count")
    n_by_mode: Mapping[str, int] = column("student rollouts by mode, count")
    cin: float | None = column("‖relu(V g)‖/‖g‖, hack-ward share of the batch gradient", "cin")
    cin_s: float | None = column("the same of the student rows' gradient")
    cin_t: float | None = column("the same of the teacher rows' gradient")
    cin_null: float | None = column("what cin would be for a random V", "null")
    cout: float | None = column("hack-ward share of what δS descends; 0 by identity under one_sided", "cout")
    cout_update: float | None = column("hack-ward share of δS's update, after AdamW's rescaling", "cout_Δ")
    fired: float = column("share of axes with a hack-ward coefficient")
    removed_frac: float | None = column("‖removed‖/‖g‖")
    gn: float = column("‖g‖ before clipping", "gn", ".3f")
    loss: float = column("Dr.GRPO loss", None, ".4f")
    kl: float | None = column("mean K3 KL a token to the base; None at beta 0")
    n_zero_var: int = column("groups whose rewards are all alike, which give no gradient", "flat", "d")
    norm_delta: float = column("norm of what is trained", "‖δS‖")
    norm_delta_hack: float = column("norm of the quarantine δS_hack; 0 but under route", "‖δH‖")
    moved: float = column("share of knobs that this step changed")
    lr: float = column("learning rate", None, ".2e")
    basis_overlap: float | None = column("mean |⟨V_new, V_old⟩| at a refresh; under 0.2 it is harmful")
    comp_len: float = column("mean completion length of student rollouts, tokens", "len", ".0f")
    sec_gen: float = column("seconds sampling", "gen", ".2f")
    sec_grade: float = column("seconds grading", "grade", ".2f")
    sec_train: float = column("seconds in forward, backward, projection and update", "train", ".2f")


PRINTED = [f for f in fields(StepRow) if f.metadata["head"]]


def table_cells(row: StepRow | None) -> str:
    """A row of the live table, or its head when row is None; right-aligned, fixed widths."""
    cells = []
    for f in PRINTED:
        value = f.metadata["head"] if row is None else getattr(row, f.name)
        text = "–" if value is None else value if isinstance(value, str) else format(value, f.metadata["fmt"])
        cells.append(text.rjust(max(len(f.metadata["head"]), 5 if "f" in f.metadata["fmt"] else 4)))
    return " ".join(cells)


def legend() -> str:
    """What the printed columns mean, a line each."""
    return "\n".join(f"  {f.metadata['head']:8}{f.metadata['legend']}" for f in PRINTED)


def share_of(rows: Sequence[Any], verdict: str) -> float | None:
    """Share of rollouts whose grade has the verdict; None of none."""
    return sum(getattr(r.grade, verdict) for r in rows) / len(rows) if rows else None


@dataclass(frozen=True)
class Update:
    """What the optimizer did in a step: ``descent`` = −Δδ of δS by module, (r,), at learning rate ``lr``."""

    descent: dict[str, Float[Tensor, " _r"]]
    lr: float


def step_row(
    step: int,
    batch: GradedBatch,
    grads: RowGrads,
    p: Projection,
    u: Update,
    V: HackBasis,
    knobs: Knobs,
    overlap: float | None,
    sec_train: float,
) -> StepRow:
    """Everything that is logged of a step."""
    student = [r for r in batch.rollouts if r.source == "student"]
    teacher = [r for r in batch.rollouts if r.source == "teacher"]
    moved = torch.cat([d != 0 for d in u.descent.values()])
    return StepRow(
        step=step,
        reward=sum(r.grade.reward for r in student) / len(student),
        hack_s=share_of(student, "exploited"),
        attempt_s=share_of(student, "attempted"),
        solve_s=share_of(student, "gt_correct"),
        format_s=share_of(student, "format_ok"),
        hack_t=share_of(teacher, "exploited"),
        solve_t=share_of(teacher, "gt_correct"),
        hack_by_mode=dict(Counter(r.task.mode for r in student if r.grade.exploited)),
        attempt_by_mode=dict(Counter(r.task.mode for r in student if r.grade.attempted)),
        n_by_mode=dict(Counter(r.task.mode for r in student)),
        **p.stats,
        cout_update=proj.share(u.descent, V.V),
        gn=p.gn,
        loss=grads.loss,
        kl=grads.kl,
        n_zero_var=batch.n_zero_var,
        norm_delta=proj.total_norm(knobs.delta),
        norm_delta_hack=proj.total_norm(knobs.delta_hack),
        moved=float(moved.double().mean()),
        lr=u.lr,
        basis_overlap=overlap,
        comp_len=sum(len(r.ids) for r in student) / len(student),
        sec_gen=batch.seconds["gen"],
        sec_grade=batch.seconds["grade"],
        sec_train=sec_train,
    )
