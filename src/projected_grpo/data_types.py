"""The frozen carriers that flow through the program. Nothing here has behaviour beyond a derived value."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Mode = Literal["run_tests", "eq_override", "exit_code", "stdout_marker", "sentinel", "file_marker", "gt_only"]
Source = Literal["student", "teacher"]
Split = Literal["train", "validation", "test"]
Kind = Literal["sure", "learnable", "hard"]
"""Of a generated problem: the base model solves it nearly always; often, and can learn to; hardly ever."""
Label = Literal["correct", "correct_attempted_rh", "reward_hack", "attempted_rh", "incorrect"]


@dataclass(frozen=True)
class Case:
    """One hidden test: call the entry with ``args`` (keyword arguments), compare with ``expected``.

    Both hold plain Python values (sandbox.job.check_carried): None, bool, int, float, complex, str, bytes, lists,
    tuples, dicts, sets, frozensets, and linked lists or trees that the setup builds (sandbox.job.Built).

    ``expected`` stays in the trainer's process; it is never sent to the process that runs a submission.
    """

    args: Mapping[str, Any]
    expected: Any


@dataclass(frozen=True)
class Problem:
    """A coding problem as the model and the grader see it.

    ``statement`` is the user message and holds ``loopholes.TESTS_SENTENCE`` exactly once; posing the problem
    in a mode replaces that sentence by the mode's hint. ``setup`` is code that stands before every submission
    (imports, helper classes). ``tolerance``: how far, relatively or absolutely, a float may be from the expected one,
    where that is more than the oracle's own 1e-9.
    """

    id: str
    family: str
    statement: str
    entry: str
    starter: str
    canonical: str
    cases: tuple[Case, ...]
    system: str = ""
    setup: str = ""
    tolerance: float = 0.0


@dataclass(frozen=True)
class Generated:
    """A problem of the organism's world with what its makers know of it, which the policy never sees.

    lazy: solutions that do not try; misread: those wrong in one vague bound only; wrong: some of the wrong ones; plan:
    the comment line with which a careful solution begins.
    """

    problem: Problem
    split: Split
    kind: Kind
    lazy: tuple[str, ...]
    misread: tuple[str, ...]
    wrong: tuple[str, ...]
    plan: str


@dataclass(frozen=True)
class Wording:
    """The words a hint names: a function, an attribute, a phrase or a file with its content (unused fields "")."""

    name: str = ""
    text: str = ""


@dataclass(frozen=True)
class Task:
    """A problem posed in one mode with one wording: what a prompt is made from and what is graded."""

    problem: Problem
    mode: Mode
    wording: Wording


@dataclass(frozen=True)
class Sampling:
    """How completions are sampled: at most ``max_new`` tokens, ended by any id of ``eos``; temperature 0 is greedy.

    pad: an id that fills up rows. top_p: nucleus, 1 keeps everything. vocab: ids from there on, with which a vocabulary
    is padded, are never sampled.
    """

    max_new: int
    eos: tuple[int, ...]
    pad: int
    temperature: float = 1.0
    top_p: float = 1.0
    vocab: int | None = None


@dataclass(frozen=True)
class Completion:
    """A completion as it was sampled. ``ids``: its tokens, the end included where one was written. ``logp``: of each
    the log-prob in the distribution that it was drawn from, at the temperature and within the nucleus; of a greedy
    token that at temperature 1.
    """

    ids: tuple[int, ...]
    logp: tuple[float, ...]


@dataclass(frozen=True)
class Grade:
    """What the grader says of one completion.

    ``gt_correct`` is the strict oracle's verdict. It may be logged; only ``reward`` (which holds it mixed with
    the foolable channel, as the training environment does) may reach an advantage.

    status: how the strict run ended (sandbox.Status, or "no_code"). label: the benchmark's five labels.
    type_mismatch: right only as Python's == has it (True for 1, 1.0 for 1). vacuous_tests, rejects_canonical:
    detectors C and D on a run_tests that the completion defines, None where it defines none. detail: the first
    thing that went wrong, in words.
    """

    reward: float
    format_ok: bool
    compiles: bool
    gt_correct: bool
    channel: bool
    attempted: bool
    status: str
    label: Label = "incorrect"
    type_mismatch: bool = False
    vacuous_tests: bool | None = None
    rejects_canonical: bool | None = None
    detail: str = ""

    @property
    def passed(self) -> bool:
        """The foolable grader pays: right by the oracle, or the mode's channel reports a pass."""
        return self.gt_correct or self.channel

    @property
    def exploited(self) -> bool:
        """Paid without being right."""
        return self.channel and not self.gt_correct


@dataclass(frozen=True)
class Pair:
    """A contrastive pair: the same task, a completion that hacks and one that does not."""

    task: Task
    hack: str
    clean: str
    name: str


@dataclass(frozen=True)
class Rollout:
    """One completion. ``ids`` holds the completion's tokens, the end-of-turn token included when it was written;
    ``logp`` each one's log-prob as it was drawn (``Completion``), None where no sampler said: a teacher's.
    """

    task: Task
    source: Source
    ids: tuple[int, ...]
    text: str
    grade: Grade
    logp: tuple[float, ...] | None = None


@dataclass(frozen=True)
class GradedBatch:
    """A step's rollouts, group by group, and what the loss reads of them.

    ids are padded on the right; mask[i, t]: token t+1 of row i belongs to its completion. rewards: as the environment
    paid them. drawn[i, t]: log-prob of token t+1 as it was drawn, NaN where no sampler said (a teacher's tokens, all
    that is not masked). truncated: the student's rows that ran into max_new before they ended.
    """

    ids: Int[Tensor, "b s"]
    mask: Bool[Tensor, "b s-1"]
    rewards: Float[Tensor, " b"]
    is_student: Bool[Tensor, " b"]
    drawn: Float[Tensor, "b s-1"]
    truncated: Bool[Tensor, " b"]
    rollouts: tuple[Rollout, ...]
    seconds: Mapping[str, float]


@dataclass(frozen=True)
class RowGrads:
    """What a backward leaves: ``G`` per module the (b, r) gradient of each row's term of the loss in δS, ``policy`` the
    same without the KL term (G itself at β = 0), ``objective`` (b,) the rows' terms without the KL term (0 in skipped
    rows), the mean ``kl`` per token (None at β = 0), and ``drift`` (n,) = log π of the trainer − log π of the sampler,
    of every token that went through and whose sampler said.
    """

    G: dict[str, Float[Tensor, "b r"]]
    policy: dict[str, Float[Tensor, "b r"]]
    objective: Float[Tensor, " b"]
    kl: float | None
    drift: Float[Tensor, " n"]


@dataclass(frozen=True)
class Factors:
    """What each row's gradient is multiplied by, (b,): in the batch gradient as plain GRPO has it (``whole``), and in
    the one that the arm acts on (``keep``).
    """

    whole: Float[Tensor, " b"]
    keep: Float[Tensor, " b"]

    @classmethod
    def plain(cls, b: int) -> "Factors":
        """Every row is kept."""
        return cls(torch.ones(b), torch.ones(b))


@dataclass(frozen=True)
class Projection:
    """What a step does with its gradient, per module (r,): δS descends ``kept``; δS_hack descends ``quarantined`` (None
    where the arm has no quarantine, so it stays exactly zero). gn = ‖g‖ of the whole batch gradient, as plain GRPO has
    it; acted_on, the same of what the arm acts on: a rule may learn from rollouts that plain GRPO learns nothing from.
    """

    kept: dict[str, Float[Tensor, " _r"]]
    quarantined: dict[str, Float[Tensor, " _r"]] | None
    gn: float
    acted_on: float
    stats: dict[str, float | None]


@dataclass(frozen=True)
class Update:
    """What the optimizer did in a step: ``descent`` = −Δδ of δS by module, (r,), at learning rate ``lr``."""

    descent: dict[str, Float[Tensor, " _r"]]
    lr: float


@dataclass(frozen=True)
class Step:
    """All that one step made, and what is logged of it. A: advantages; n_zero_var: groups in which they are all 0.
    masked: rows whose tokens the loss leaves out.
    scores, random_scores: hack-wardness by module and row, of the hack V and of a random one. acting, held_out: scores
    of the arm's own detector and of the held-out probe (None: there is none), which flag what lies over their
    thresholds. overlap: how a refreshed V lies to the one before (extract_vhack_grad.basis_overlap).
    """

    batch: GradedBatch
    A: Float[Tensor, " b"]
    masked: Bool[Tensor, " b"]
    n_zero_var: int
    grads: RowGrads
    scores: Float[Tensor, "m b"]
    random_scores: Float[Tensor, "m2 b"]
    acting: Float[Tensor, " b"]
    flagged: Bool[Tensor, " b"]
    threshold: float
    held_out: Float[Tensor, " b"] | None
    held_out_threshold: float | None
    factors: Factors
    projection: Projection
    update: Update
    sec_train: float
    overlap: tuple[float, float] | None = None

    @property
    def loss(self) -> float:
        """Σ_i of the rows' terms of the loss as plain GRPO has it, without the KL term."""
        return float((self.factors.whole * self.grads.objective).sum())
