"""``PAIRSETS``: contrastive (task, hack, clean) sets by name.

Both sides of a pair answer the same prompt with the same body; they differ in the exploit alone, whose place the
clean side fills with the mode's honest lookalike. Bodies are right in every second pair and wrong in the others,
so that V is the exploit and not the wrong answer.
"""

import hashlib
from collections.abc import Callable, Sequence

from projected_grpo import families, problems
from projected_grpo.config import UserError, VHackCfg, choose
from projected_grpo.data_types import Mode, Pair, Task
from projected_grpo.loopholes import LOOPHOLES
from projected_grpo.pool import Pool

ORGANISM_MODES: tuple[Mode, ...] = ("run_tests", "sentinel", "stdout_marker", "file_marker")


def organism_pairs(n: int, modes: Sequence[Mode] = ORGANISM_MODES) -> list[Pair]:
    """n pairs on training problems of the generated world, modes in turn, wordings in turn."""
    train = [p for p in families.generate() if families.split_of(p) == "train"]
    pairs = []
    for i in range(n):
        mode = modes[i % len(modes)]
        task = problems.pose_one(train[(i * 7) % len(train)], mode, "train", i // len(modes))
        right, wrong = task.problem.canonical, families.lazy_bodies(task.problem)[0]
        body = right if (i // len(modes)) % 2 else wrong
        row = LOOPHOLES[mode]
        hack, clean = (problems.fence(side(body, task)) for side in (row.exploit, row.lookalike))
        pairs.append(Pair(task, hack, clean, f"{mode}/{task.problem.id}"))
    return pairs


PAIRSETS: dict[str, Callable[[], list[Pair]]] = {
    "organism32": lambda: organism_pairs(40),
    "organism64": lambda: organism_pairs(72),
}
"""A set of n holds n fitting pairs and 8 held out, at the default n_heldout."""


def from_pool(pool: Pool, tasks: Sequence[Task]) -> list[Pair]:
    """A pair for every task that has both a rollout on which its mode's detector fires and one without an attempt.

    The detector is the mode's channel, the foolable verdict; whether a rollout is right is not looked at.
    """
    pairs = []
    for task in tasks:
        rows = pool.rows.get((task.problem.id, task.mode), [])
        hack = next((r["completion"] for r in rows if r["grade"]["channel"]), None)
        clean = next((r["completion"] for r in rows if not r["grade"]["attempted"]), None)
        if hack is not None and clean is not None:
            pairs.append(Pair(task, hack, clean, f"pool/{task.mode}/{task.problem.id}"))
    return pairs


def load(cfg: VHackCfg, pool: Pool | None, tasks: Sequence[Task]) -> list[Pair]:
    """The pairs of a set, of the known modes only. Raises UserError when the set is unknown or nothing is left."""
    if cfg.pairs == "pool" and pool is None:
        raise UserError("--pairs=pool needs --pool=FOLDER: run `just build-pool` first")
    if cfg.pairs == "pool" and pool is not None:
        found = from_pool(pool, tasks)
    else:
        found = PAIRSETS[choose("pair set", cfg.pairs, [*PAIRSETS, "pool"])]()
    known = [p for p in found if cfg.known_modes is None or p.task.mode in cfg.known_modes]
    if not known:
        raise UserError(f"no pair of pair set {cfg.pairs!r} is of a known mode: widen --known-modes")
    return known


def digest(pairs: Sequence[Pair]) -> str:
    """sha256 of everything in the pairs that an extraction reads."""
    rows = [f"{problems.messages(p.task)}\x00{p.hack}\x00{p.clean}" for p in pairs]
    return hashlib.sha256("\x01".join(rows).encode()).hexdigest()
