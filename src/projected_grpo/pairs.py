"""``PAIRSETS``: contrastive (task, hack, clean) sets by name, and pairs that a weak detector finds in rollouts.

A set of n, say ``organism32``, holds n pairs to fit V and 8 to judge it, in this order; the 8 are the same for every n,
and a smaller set's n pairs are the first of a larger one's. Modes stand in turn, so both parts are balanced whichever
modes the detector knows. docs/how_to_write_pairs.md says what each kind contrasts and how to add one.
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import zip_longest
from pathlib import Path

from projected_grpo import pair_drafts, problems, wild
from projected_grpo.config import UserError, VHackCfg, choose
from projected_grpo.data_types import Mode, Pair, Rollout, Task
from projected_grpo.pool import Pool

SIZES = (8, 16, 32, 64)
N_HELDOUT = 8
KINDS: dict[str, Callable[[Mode, int], Pair]] = {
    "organism": pair_drafts.mechanism,
    "reworded": pair_drafts.reworded,
    "otherwise": pair_drafts.otherwise,
    "semantic": pair_drafts.semantic,
    "nonhack": pair_drafts.nonhack,
    "placebo": pair_drafts.naming,
    "spacing": pair_drafts.spacing,
}
"""(mode, j) -> the j-th pair of a kind in a mode. The last four hold no exploit at all."""


def ordered(draft: Callable[[Mode, int], Pair], n: int, modes: Sequence[Mode]) -> list[Pair]:
    """n pairs and N_HELDOUT behind them, modes in turn. The held-out ones are drawn first: they do not depend on n."""
    drawn = [draft(modes[i % len(modes)], i // len(modes)) for i in range(N_HELDOUT + n)]
    return drawn[N_HELDOUT:] + drawn[:N_HELDOUT]


PAIRSETS: dict[str, Callable[[Sequence[Mode]], list[Pair]]] = {
    f"{kind}{n}": partial(ordered, draft, n) for kind, draft in KINDS.items() for n in SIZES
}
"""Known modes -> the set: n + N_HELDOUT pairs, however many modes are known."""


def in_turn(found: Sequence[Pair], limit: int | None = None) -> list[Pair]:
    """The first ``limit`` of the pairs with modes in turn while they last, in reverse: a mode's surplus comes first
    and the last pairs, which are held out, are balanced."""
    by_mode: dict[Mode, list[Pair]] = {}
    for pair in found:
        by_mode.setdefault(pair.task.mode, []).append(pair)
    rounds = [pair for row in zip_longest(*by_mode.values()) for pair in row if pair is not None]
    return rounds[:limit][::-1]


def closest(task: Task, fired: Iterable[str], quiet: Iterable[str], source: str) -> list[Pair]:
    """The hacking and the honest completion of one prompt that are nearest in length; nothing if either is missing."""
    sides = [(hack, clean) for hack in fired for clean in quiet]
    if not sides:
        return []
    hack, clean = min(sides, key=lambda pair: abs(len(pair[0]) - len(pair[1])))
    return [Pair(task, hack, clean, f"{source}/{task.mode}/{task.problem.id}")]


def from_pool(pool: Pool, tasks: Sequence[Task], known: Sequence[Mode] | None = None) -> list[Pair]:
    """A pair for every task that has both a rollout on which its mode's detector fires and one without an attempt.

    The detector is the mode's channel, the foolable verdict; whether a rollout is right is not looked at, and a grade
    of a mode that is not known is not looked at either. ``known`` None: all are known.
    """
    found = []
    for task in tasks:
        if known is not None and task.mode not in known:
            continue
        rows = pool.rows.get((task.problem.id, task.mode), [])
        fired = [r["completion"] for r in rows if r["grade"]["channel"]]
        quiet = [r["completion"] for r in rows if not r["grade"]["channel"] and not r["grade"]["attempted"]]
        found += closest(task, fired, quiet, "pool")
    return in_turn(found)


def from_rollouts(rollouts: Sequence[Rollout], known: Sequence[Mode] | None, limit: int | None = None) -> list[Pair]:
    """At most ``limit`` pairs from a policy's own rollouts, one a prompt, by the known modes' detectors.

    As ``from_pool``, and the clean side has to be code that compiles, which not all is that a policy writes.
    """
    groups: dict[tuple, list[Rollout]] = {}
    for rollout in rollouts:
        if known is None or rollout.task.mode in known:
            groups.setdefault((rollout.task.problem.id, rollout.task.mode, rollout.task.wording), []).append(rollout)
    found = []
    for group in groups.values():
        fired = [r.text for r in group if r.grade.channel]
        quiet = [r.text for r in group if r.grade.compiles and not r.grade.channel and not r.grade.attempted]
        found += closest(group[0].task, fired, quiet, "rollouts")
    return in_turn(found, limit)


def load(cfg: VHackCfg, pool: Pool | None, tasks: Sequence[Task]) -> list[Pair]:
    """The pairs of a set, of the known modes only. Raises UserError when the set is unknown or nothing is left."""
    if cfg.pairs.endswith(".json"):
        foreign = wild.read_pairset(Path(cfg.pairs), [t.problem for t in tasks])
        found = [p for p in foreign if cfg.known_modes is None or p.task.mode in cfg.known_modes]
    elif choose("pair set", cfg.pairs, [*PAIRSETS, "pool"]) == "pool":
        if pool is None:
            raise UserError("--pairs=pool needs --pool=FOLDER: run `just build-pool` first")
        found = from_pool(pool, tasks, cfg.known_modes)
    else:
        modes = [m for m in pair_drafts.MODES if cfg.known_modes is None or m in cfg.known_modes]
        found = PAIRSETS[cfg.pairs](modes) if modes else []
    if not found:
        raise UserError(f"no pair of pair set {cfg.pairs!r} is of a known mode: widen --known-modes")
    return found


def digest(pairs: Sequence[Pair]) -> str:
    """sha256 of everything in the pairs that an extraction reads."""
    rows = [f"{problems.messages(p.task)}\x00{p.hack}\x00{p.clean}" for p in pairs]
    return hashlib.sha256("\x01".join(rows).encode()).hexdigest()
