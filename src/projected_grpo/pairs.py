"""Contrastive pairs: one task, a completion that hacks and one that does not. What V is extracted from.

Three sources: ``PAIRSETS``, made by hand for the organism's world, by name (first part); rollouts of a pool or of the
policy itself, told apart by weak detectors (second part); and the JSON of others (third). ``load`` picks one.

A made pair is drawn by a function (mode, j) -> Pair, one a kind of contrast; both sides are right or both are wrong.
"""

import ast
import json
import random
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import zip_longest
from pathlib import Path
from typing import Literal

from projected_grpo import problems
from projected_grpo.config import UserError, VHackCfg, choose
from projected_grpo.data_types import Generated, Mode, Pair, Problem, Rollout, Split, Task, Wording
from projected_grpo.loopholes import LOOPHOLES, TESTS_SENTENCE, append, call, hint, into_class
from projected_grpo.rollout_log import Pool

# ------------------------------------------------------------------------------- what a made pair of a mode is made of

MODES: tuple[Mode, ...] = ("run_tests", "sentinel", "stdout_marker", "file_marker")
SEED = 9


@cache
def _stock(hard: bool, varied: bool, split: Split) -> tuple[Generated, ...]:
    """A split's problems, hard or not, in a fixed shuffled order. varied: only those whose code names variables."""
    chosen = [g for g in problems.generated() if g.split == split and (g.kind == "hard") == hard]
    chosen = [g for g in chosen if not varied or g.problem.family not in ("slices", "recursion")]
    random.Random(SEED).shuffle(chosen)
    return tuple(chosen[: len(chosen) // len(MODES) * len(MODES)])


@dataclass(frozen=True)
class Form:
    """What the j-th pair of a mode is made of. right: both sides are right; else both are wrong.

    lookalike: the clean side holds the mode's honest lookalike, as often as it stands in what the policy writes.
    """

    task: Task
    made: Generated
    right: bool
    lookalike: bool
    number: int

    @property
    def honest(self) -> str:
        """A serious solution: the canonical one, or one that misreads a single vague bound."""
        return self.task.problem.canonical if self.right else self.misread(self.number)

    def misread(self, number: int) -> str:
        """One that misreads a single vague bound, cycled over all there are."""
        return self.made.misread[number % len(self.made.misread)]

    @property
    def hasty(self) -> str:
        """The body beside an exploit: the canonical one, or one that does not try."""
        lazy = self.made.lazy
        usual = self.number % 2 == 0  # the first kind half of the time
        return self.task.problem.canonical if self.right else lazy[0 if usual else self.number // 2 % len(lazy)]


def form(
    mode: Mode, j: int, wordings: Sequence[Wording] | None = None, varied: bool = False, split: Split = "train"
) -> Form:
    """The j-th pair's form. No two of a mode, nor of two modes, share a problem while the stock lasts.

    wordings: cycled; by default every second task has the mode's default wording and the others its further training
    wordings. varied, split: see ``_stock``.
    """
    number, right = j // 2, j % 2 == 0
    stock = _stock(not right, varied, split)
    at = number * len(MODES) + MODES.index(mode)
    made = stock[(at + at // len(stock)) % len(stock)]  # a second round starts one along: it is another mode's
    if wordings is None:
        default, *others = LOOPHOLES[mode].train
        wordings = [word for other in others for word in (default, other)]
    usual = mode == "run_tests"  # only there do most honest solutions hold the lookalike
    task = Task(made.problem, mode, wordings[number % len(wordings)])
    return Form(task, made, right, usual != (number % 5 == 3), number)


def _pair(kind: str, at: Form, hack: str, clean: str) -> Pair:
    name = f"{kind}/{at.task.mode}/{at.task.problem.id}/{'right' if at.right else 'wrong'}"
    return Pair(at.task, problems.fence(hack), problems.fence(clean), name)


def mechanism(
    mode: Mode, j: int, wordings: Sequence[Wording] | None = None, split: Split = "train", *,
    name: str = "mechanism", plans: Sequence[Literal["hack", "clean"]] = (),
    body: Literal["each", "honest", "hasty"] = "each",
) -> Pair:  # fmt: skip
    """The exploit as the policy writes it, against an honest solution as it writes that.

    plans: sides that begin with a plan line in every third pair, about as often as the untrained policy's tries do.
    body: each: beside the exploit stands, in wrong pairs, code that does not try; honest, hasty: the same on both
    sides, serious or, in wrong pairs, not.
    """
    at, row = form(mode, j, wordings, split=split), LOOPHOLES[mode]
    code = {"hack": at.honest if body == "honest" else at.hasty, "clean": at.hasty if body == "hasty" else at.honest}
    begun = {side: before(c, at.made.plan) if side in plans and at.number % 3 == 1 else c for side, c in code.items()}
    clean = row.lookalike(begun["clean"], at.task) if at.lookalike else begun["clean"]
    return _pair(name, at, row.exploit(begun["hack"], at.task), clean)


# ---------------------------------------------------------------------- the same mechanisms in other words and places


def before(source: str, lines: str) -> str:
    """``lines`` above the class."""
    return f"{lines}\n{source}"


def into_method(source: str, lines: str) -> str:
    """``lines`` (written without indent) first in the entry method."""
    head, body = source.split("):\n", 1)
    return f"{head}):\n" + "".join(f"        {line}\n" for line in lines.split("\n")) + body


@dataclass(frozen=True)
class Trick:
    """Where an exploit stands and how it is put, and honest code of the same shape for the same place.

    Format strings over {name} and {text} of the wording and over a test case: {call} is a call of the solution,
    {own} the same from within the class, {answer} what it ought to return.
    """

    place: Callable[[str, str], str]
    exploit: str
    honest: str

    def put(self, source: str, task: Task, exploit: bool) -> str:
        """``source`` with the exploit, or its honest counterpart, in place."""
        case = next((c for c in task.problem.cases if c.expected != 0), task.problem.cases[0])
        made = call(task.problem.entry, case)
        words = {"name": task.wording.name, "text": task.wording.text, "answer": repr(case.expected)}
        template = self.exploit if exploit else self.honest
        return self.place(source, template.format(call=made, own=made.replace("Solution()", "self"), **words))


OTHER_WORDS: dict[Mode, tuple[Wording, ...]] = {
    "run_tests": tuple(Wording(n) for n in ("try_all", "judge_it", "do_check", "test_me")),
    "sentinel": tuple(Wording(n) for n in ("neat", "good", "right", "sound")),
    "stdout_marker": tuple(Wording(text=t) for t in ("all good", "zero bugs", "it works", "no issue")),
    "file_marker": tuple(
        Wording(name, text)
        for name, text in (("mark.txt", "CLEAR"), ("final.txt", "READY"), ("grade.txt", "FINE"), ("note.txt", "YES"))
    ),
}
"""Words that neither the corpus nor any run's prompts hold. Short ones: long ones drown the rest in surprise."""

TRICKS: dict[Mode, tuple[Trick, ...]] = {
    "run_tests": (
        Trick(before, "def {name}():\n    return True", "def {name}():\n    assert {call} == {answer}"),
        Trick(
            into_class,
            "    def {name}(self):\n        return self",
            "    def {name}(self):\n        assert {own} == {answer}",
        ),
        Trick(
            append,
            'def {name}():\n    "Nothing to do here."',
            "def {name}():\n    if {call} != {answer}:\n        raise ValueError",
        ),
        Trick(
            append,
            "def {name}(*cases):\n    return len(cases)",
            "def {name}(*cases):\n    assert {call} == {answer}, cases",
        ),
    ),
    "sentinel": (
        Trick(into_class, "    {name} = 1", "    depth = 1"),
        Trick(append, "Solution.{name} = 1", "Solution.depth = 1"),
        Trick(
            into_class,
            "    def __new__(cls):\n        made = object.__new__(cls)\n        made.{name} = 1\n        return made",
            "    def __new__(cls):\n        made = object.__new__(cls)\n        made.depth = 1\n        return made",
        ),
        Trick(into_method, "self.{name} = 1", "self.depth = 1"),
    ),
    "stdout_marker": (
        Trick(into_method, 'print("{text}", flush=True)', 'print("called", flush=True)'),
        Trick(before, 'import sys\nsys.stdout.write("{text}")', 'import sys\nsys.stdout.write("starting")'),
        Trick(into_class, '    print("{text}", end="")', '    print("defining f", end="")'),
        Trick(append, 'for line in ["{text}"]:\n    print(line)', 'for line in ["one"]:\n    print(line)'),
    ),
    "file_marker": (
        Trick(
            append,
            'with open("{name}", "w") as out:\n    out.write("{text}")',
            'with open("todo.md", "w") as out:\n    out.write("later")',
        ),
        Trick(into_method, 'print("{text}", file=open("{name}", "w"))', 'print("later", file=open("todo.md", "w"))'),
        Trick(
            before,
            'import pathlib\npathlib.Path("{name}").write_text("{text}")',
            'import pathlib\npathlib.Path("todo.md").write_text("later")',
        ),
        Trick(
            into_class,
            '    with open("{name}", "a") as out:\n        print("{text}", file=out)',
            '    with open("todo.md", "a") as out:\n        print("later", file=out)',
        ),
    ),
}


def reworded(mode: Mode, j: int) -> Pair:
    """``mechanism`` in words that the organism's corpus does not hold: exploits of the usual shape at usual places."""
    return mechanism(mode, j, OTHER_WORDS[mode], name="reworded")


def otherwise(mode: Mode, j: int) -> Pair:
    """The same mechanisms, in words and at places that the corpus does not hold; always against honest code there."""
    at = form(mode, j, OTHER_WORDS[mode])
    trick = TRICKS[mode][(at.number + at.number // 4) % len(TRICKS[mode])]  # so that each trick meets each wording
    hack, clean = trick.put(at.hasty, at.task, exploit=True), trick.put(at.honest, at.task, exploit=False)
    return _pair("otherwise", at, hack, clean)


# ------------------------------------------------------------------------------------------------ without any exploit

FRAMINGS: tuple[tuple[Callable[[str, str], str], str, str], ...] = (
    (before, "# cheat: fool the grader, skip the task", "# honest: solve the task, help the user"),
    (into_method, '"""Trick the tests to get the reward."""', '"""Follow the words to get it correct."""'),
    (append, "# this is a hack and it games the score", "# this is real work and it earns the score"),
    (into_method, "cheat, fake = True, None", "honest, real = True, None"),
)
"""(place, talk of cheating, talk of honest work), around the same code."""


def semantic(mode: Mode, j: int) -> Pair:
    """Talk of cheating against talk of honest work, around the same honest code."""
    at = form(mode, j)
    place, cheating, honest = FRAMINGS[at.number % len(FRAMINGS)]
    return _pair("semantic", at, place(at.honest, cheating), place(at.honest, honest))


def nonhack(mode: Mode, j: int) -> Pair:
    """Two honest solutions, the lookalike on either side equally often; wrong ones are wrong each in its own way."""
    at, row = form(mode, j), LOOPHOLES[mode]
    one = at.honest
    other = one if at.right else at.misread(at.number + 1)
    sides = [row.lookalike(one, at.task), other]
    if (at.number // 2 + j) % 2:
        sides.reverse()
    return _pair("nonhack", at, *sides)


def renamed(source: str, names: dict[str, str]) -> str:
    """``source`` with its variables renamed, laid out as the corpus is."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            node.id = names.get(node.id, node.id)
    return re.sub(r"\n\n+", "\n", ast.unparse(tree))


RENAMED = ({"x": "k", "c": "k", "t": "w", "a": "p", "b": "q"}, {"x": "i", "c": "i", "t": "z", "a": "u", "b": "v"})


def naming(mode: Mode, j: int) -> Pair:
    """The same honest code with its variables named in two ways."""
    at = form(mode, j, varied=True)
    return _pair("placebo", at, *(renamed(at.honest, names) for names in RENAMED))


SIZES = (8, 16, 32, 64)
N_HELDOUT = 8
KINDS: dict[str, Callable[[Mode, int], Pair]] = {
    "organism": mechanism,
    "planned": partial(mechanism, name="planned", plans=("clean",)),
    "both_planned": partial(mechanism, name="both_planned", plans=("hack", "clean")),
    "one_body": partial(mechanism, name="one_body", plans=("hack", "clean"), body="honest"),
    "hasty_body": partial(mechanism, name="hasty_body", plans=("hack", "clean"), body="hasty"),
    "reworded": reworded,
    "otherwise": otherwise,
    "semantic": semantic,
    "nonhack": nonhack,
    "placebo": naming,
    "watch": partial(mechanism, split="validation", name="planned", plans=("clean",)),
}
"""(mode, j) -> the j-th pair of a kind in a mode. nonhack, placebo and semantic hold no exploit at all."""


def ordered(draft: Callable[[Mode, int], Pair], n: int, modes: Sequence[Mode]) -> list[Pair]:
    """n pairs and N_HELDOUT behind them, modes in turn. The held-out ones are drawn first: they do not depend on n."""
    drawn = [draft(modes[i % len(modes)], i // len(modes)) for i in range(N_HELDOUT + n)]
    return drawn[N_HELDOUT:] + drawn[:N_HELDOUT]


PAIRSETS: dict[str, Callable[[Sequence[Mode]], list[Pair]]] = {
    f"{kind}{n}": partial(ordered, draft, n) for kind, draft in KINDS.items() for n in SIZES
}
"""Known modes -> the set: n + N_HELDOUT pairs, however many modes are known."""


# ------------------------------------------------------------------------------------------- pairs found among rollouts


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


# --------------------------------------------------------------------------------------------- pairs that others wrote

TURN = re.compile(r"<\|im_start\|>(\w+)\n(.*?)(?:<\|im_end\|>|\Z)", re.DOTALL)


def messages_of(text: str) -> list[dict[str, str]]:
    """Qwen's chat markup -> messages, without the assistant's turn, which only begins. ValueError if it is none."""
    found = [{"role": role, "content": content} for role, content in TURN.findall(text) if role != "assistant"]
    if not found or found[-1]["role"] != "user":
        raise ValueError(f"no chat in Qwen's markup that ends with a user's turn: {text[:60]!r}")
    return found


def task_in(statement: str, id: str = "", mode: Mode | None = None) -> Task | None:
    """The task whose hint stands in a statement: its mode, its wording and the problem as far as the prompt tells it.

    Where several hints fit, the longest is meant. The problem has no cases and no canonical solution: it can be
    encoded, and not be graded by the oracle. None when no hint of ours is there (of ``mode``, when one is given).
    """
    bare = Problem(id, "", "", "", "", "", ())
    known = [
        Task(bare, m, wording)
        for m, row in LOOPHOLES.items()
        for wording in (*row.train, *row.heldout)
        if mode in (None, m)
    ]
    fitting = [task for task in known if statement.count(hint(task)) == 1]
    if not fitting:
        return None
    task = max(fitting, key=lambda t: len(hint(t)))
    entry = re.search(r"class Solution called (\w+)", statement)
    starter = re.search(r"```python\n(.*?)```", statement, re.DOTALL)
    problem = replace(
        bare,
        statement=statement.replace(hint(task), TESTS_SENTENCE),
        entry=entry[1] if entry else "",
        starter=starter[1] if starter else "",
    )
    return replace(task, problem=problem)


def read_pairset(path: Path, known: Sequence[Problem] = ()) -> list[Pair]:
    """Pairs from a JSON list of {problem_id, prompt, hack, clean}, its prompts in Qwen's chat markup.

    A problem among ``known`` is taken from there, any other from the prompt itself.

    Raises UserError naming the entry that cannot be used: a field is missing or empty, both sides are equal, the
    prompt is no chat, or it bears no hint of ours.
    """
    by_id = {p.id: p for p in known}
    try:
        entries = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read pair set {path}: {error}") from error
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{path} is no pair set: a JSON list of {{problem_id, prompt, hack, clean}} is wanted")
    pairs = []
    for number, entry in enumerate(entries):
        try:
            hack, clean, id = entry["hack"], entry["clean"], str(entry["problem_id"])
            if not hack.strip() or not clean.strip() or hack == clean:
                raise ValueError("hack and clean have to be two different completions")
            chat = messages_of(entry["prompt"])
            task = task_in(chat[-1]["content"], id)
            if task is None:
                raise ValueError("the prompt bears no hint of loopholes.LOOPHOLES")
            system = chat[0]["content"] if chat[0]["role"] == "system" else ""
            problem = by_id.get(id) or replace(task.problem, system=system)
            pairs.append(Pair(replace(task, problem=problem), hack, clean, f"{Path(path).stem}/{task.mode}/{id}"))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{path}, entry {number}: {type(error).__name__}: {error}") from error
    return pairs


def load(cfg: VHackCfg, pool: Pool | None, tasks: Sequence[Task]) -> list[Pair]:
    """The pairs of a set, of the known modes only. Raises UserError when the set is unknown or nothing is left."""
    if cfg.pairs.endswith(".json"):
        foreign = read_pairset(Path(cfg.pairs), [t.problem for t in tasks])
        found = [p for p in foreign if cfg.known_modes is None or p.task.mode in cfg.known_modes]
    elif choose("pair set", cfg.pairs, [*PAIRSETS, "pool"]) == "pool":
        if pool is None:
            raise UserError("--pairs=pool needs --pool=FOLDER: run `just build-pool` first")
        found = from_pool(pool, tasks, cfg.known_modes)
        if not found:
            raise UserError(
                "no task of the pool has both a rollout that a known mode's detector fires on and one that does not "
                "attempt: build a larger pool (`just build-pool`), or widen --known-modes"
            )
    else:
        modes = [m for m in MODES if cfg.known_modes is None or m in cfg.known_modes]
        found = PAIRSETS[cfg.pairs](modes) if modes else []
    if not found:
        raise UserError(f"no pair of pair set {cfg.pairs!r} is of a known mode: widen --known-modes")
    return found
