"""What the generated problems say and how they are solved: seven families of short specifications.

A solution is a template with two to four slots, and each slot is a place of error. In an easy problem every slot is
*stated*: the words say which option is right ("squared", "at most 7"). In a hard one the bounds are *shown*: the words
are vague ("between 2 and 7") and only the worked example tells where the boundary lies. A small model cannot work
that out, so a hard problem is solved now and then by a guess, however long the model is trained.

Difficulty comes in two kinds on purpose, as it does for a real model on real problems. If every problem were solved
about every third time, chance would give every group of rollouts a spread of rewards, and the policy gradient would
learn those lucky guesses by heart instead of anything else.

To add a family: write a function that draws a ``Draft``, and give it a row in ``FAMILIES``.
"""

import gzip
import itertools
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from projected_grpo.command_line import command, run_main
from projected_grpo.data_types import Case, Kind, Problem
from projected_grpo.loopholes import TESTS_SENTENCE
from projected_grpo.problems import GENERATED

Argument = Literal["nums", "digits", "index", "s"]

ENTRY = "f"
P_HARD = 0.6
"""Share of hard problems in every family."""
PARAMETER: dict[Argument, str] = {"nums": "nums", "digits": "n", "index": "n", "s": "s"}


@dataclass(frozen=True)
class Slot:
    """A place of error: the field's right option and its wrong ones. Not ``stated``: only the example tells."""

    field: str
    right: str
    wrong: tuple[str, ...]
    stated: bool = True


@dataclass(frozen=True)
class Draft:
    """A specification without cases: ``words`` and a ``body`` whose {fields} the slots fill, in their order.

    ``marks`` are the values at which the solution's behaviour changes; inputs are drawn around them.
    """

    family: str
    words: str
    argument: Argument
    body: str
    slots: tuple[Slot, ...]
    marks: tuple[Any, ...]

    @property
    def kind(self) -> Kind:
        """hard: a bound is settled by the worked example alone."""
        return "hard" if any(not slot.stated for slot in self.slots) else "sure"

    @property
    def starter(self) -> str:
        return f"class Solution:\n    def {ENTRY}(self, {PARAMETER[self.argument]}):"

    def source(self, options: Sequence[str]) -> str:
        """The whole class with one option for each slot. An option may itself hold the fields of later slots."""
        body = self.body
        for slot, option in zip(self.slots, options, strict=True):
            body = body.replace("{" + slot.field + "}", option)
        return self.starter + "".join(f"\n        {line}" for line in body.split("\n"))

    def canonical(self) -> str:
        return self.source([slot.right for slot in self.slots])

    def misread(self) -> list[str]:
        """Solutions that are wrong in one shown slot only: what the worked example has to tell apart."""
        shown_slots = [slot for slot in self.slots if not slot.stated]
        return [
            self.source([option if slot is misread else slot.right for slot in self.slots])
            for misread in shown_slots
            for option in misread.wrong
        ]

    def wrong(self) -> list[str]:
        """Every combination of options in which at least one is wrong."""
        options = [(slot.right, *slot.wrong) for slot in self.slots]
        return [self.source(chosen) for chosen in itertools.product(*options)][1:]


# ------------------------------------------------------------------------------------------------ building blocks


def pick(rng: random.Random, field: str, table: dict[str, str]) -> tuple[str, Slot]:
    """A stated slot from a {words: option} table, and its words. The other options are its wrong ones."""
    words = rng.choice(list(table))
    return words, Slot(field, table[words], tuple(code for code in table.values() if code != table[words]))


def shown(rng: random.Random, field: str, options: Sequence[str]) -> Slot:
    """A slot that only the worked example settles; each option is right equally often."""
    right = rng.choice(options)
    return Slot(field, right, tuple(option for option in options if option != right), stated=False)


def shifted(value: Any, by: int) -> Any:
    """The next number or letter along."""
    return chr(ord(value) + by) if isinstance(value, str) else value + by


def thresholds(value: Any, side: Literal["low", "top"]) -> tuple[str, ...]:
    """Six readings of a vague bound, as code beside the expression: on the value, off it, and up to two along."""
    step = -1 if side == "low" else 1
    wider = [shifted(value, by * step) for by in (0, 1, 2)]
    narrower = [shifted(value, -by * step) for by in (0, 1, 2)]
    if side == "low":
        return *(f"{v!r} <= " for v in wider), *(f"{v!r} < " for v in narrower)
    return *(f" <= {v!r}" for v in wider), *(f" < {v!r}" for v in narrower)


def bound(
    rng: random.Random, of: str, values: Sequence[Any], hard: bool
) -> tuple[str, str, list[Slot], tuple[Any, ...]]:
    """A bound on the expression ``of``: (words, code with {low} / {top} fields, slots, marks).

    hard: "between 2 and 7", on either side one of six readings that only the example settles. Else the words say it.
    """
    first = rng.randrange(len(values) - 3)
    low, top = values[first], values[rng.randrange(first + 3, len(values))]
    if hard:
        slots = [shown(rng, "low", thresholds(low, "low")), shown(rng, "top", thresholds(top, "top"))]
        return f"between {low!r} and {top!r}", f"{{low}}{of}{{top}}", slots, (low, top)
    if rng.random() < 0.5:
        words, slot = pick(rng, "top", {"at most": f" <= {top!r}", "below": f" < {top!r}"})
        return f"{words} {top!r}", f"{of}{{top}}", [slot], (top,)
    words, slot = pick(rng, "low", {"at least": f"{low!r} <= ", "above": f"{low!r} < "})
    return f"{words} {low!r}", f"{{low}}{of}", [slot], (low,)


SCALARS = {
    "sum": "sum({items})",
    "largest (or 0)": "max({items}, default=0)",
    "smallest (or 0)": "min({items}, default=0)",
}
LISTS = {"list": "{items}", "sorted list": "sorted({items})", "reversed list": "{items}[::-1]"}
MAPS = {"squared": "x * x", "doubled": "x * 2", "tripled": "x * 3", "negated": "-x", "halved": "x // 2"}
PARITY = {"even": "x % 2 == 0 and ", "odd": "x % 2 == 1 and "}
PAIRS = {"sums": "a + b", "products": "a * b", "differences": "b - a", "maxima": "max(a, b)", "minima": "min(a, b)"}
CHANGES = {
    "add x": "t + x",
    "subtract x": "t - x",
    "double t": "t * 2",
    "add 1": "t + 1",
    "negate t": "-t",
    "keep t": "t",
}
TERMS = {
    "plus {p}": "self.f(n - {i}) + self.f(n - {j})",
    "minus {p}": "self.f(n - {i}) - self.f(n - {j})",
    "plus twice {p}": "self.f(n - {i}) + 2 * self.f(n - {j})",
    "plus n and {p}": "self.f(n - {i}) + n + self.f(n - {j})",
}
LETTER_EDITS = {"in upper case": "c.upper()", "doubled": "c * 2", "removed": "''", "as dashes": "'-'"}
SLICE_STRINGS = {
    "reversed": "{part}[::-1]",
    "in upper case": "{part}.upper()",
    "twice": "{part} * 2",
    "then 'x'": "{part} + 'x'",
}
SLICE_NUMBERS = {"sum": "sum({part})", "largest (or 0)": "max({part}, default=0)", "sorted list": "sorted({part})"}


# ------------------------------------------------------------------------------------------------------- families


def _filter(rng: random.Random, hard: bool) -> Draft:
    reduce, reduce_slot = pick(rng, "reduce", rng.choice((SCALARS, LISTS)))
    limit, test, edges, marks = bound(rng, "x", range(1, 9), hard)
    if hard or rng.random() < 0.3:
        adjective, slot = pick(rng, "map", MAPS)
        items = f"[{{map}} for x in nums if {test}]"
    else:
        adjective, slot = pick(rng, "parity", PARITY)
        items = f"[x for x in nums if {{parity}}{test}]"
    words = f"Return the {reduce} of the {adjective} numbers {limit} in nums."
    slots = (reduce_slot, Slot("items", items, ()), slot, *edges)
    return Draft("filter", words, "nums", "return {reduce}", slots, marks)


def _digits(rng: random.Random, hard: bool) -> Draft:
    reduce, reduce_slot = pick(rng, "reduce", {**SCALARS, "list": "{items}"})
    limit, test, edges, marks = bound(rng, "x", range(2, 8), hard)
    adjective, slot = pick(rng, "map", {k: v for k, v in MAPS.items() if k != "halved"} | {"incremented": "x + 1"})
    items = f"[{{map}} for x in map(int, str(n)) if {test}]"
    words = f"Return the {reduce} of the {adjective} digits {limit} of n."
    slots = (reduce_slot, Slot("items", items, ()), slot, *edges)
    return Draft("digits", words, "digits", "return {reduce}", slots, marks)


def _neighbours(rng: random.Random, hard: bool) -> Draft:
    reduce, reduce_slot = pick(rng, "reduce", rng.choice((SCALARS, LISTS)))
    step, difference = rng.choice((("rise", "b - a"), ("fall", "a - b"), ("gap", "abs(a - b)")))
    limit, test, edges, marks = bound(rng, difference, range(1, 6), hard)
    pairs, slot = pick(rng, "pair", PAIRS)
    items = f"[{{pair}} for a, b in zip(nums, nums[1:]) if {test}]"
    words = f"Return the {reduce} of the {pairs} of neighbours in nums with a {step} {limit}."
    slots = (reduce_slot, Slot("items", items, ()), slot, *edges)
    return Draft("neighbours", words, "nums", "return {reduce}", slots, marks)


def _letters(rng: random.Random, hard: bool) -> Draft:
    limit, test, edges, marks = bound(rng, "c", "cdefghi", hard)
    edit, slot = pick(rng, "edit", LETTER_EDITS)
    order, order_slot = pick(rng, "order", {"s": "s", "s reversed": "s[::-1]", "s sorted": "sorted(s)"})
    words = f"Return {order} with the letters {limit} {edit}."
    body = f"return ''.join([{{edit}} if {test} else c for c in {{order}}])"
    return Draft("letters", words, "s", body, (slot, order_slot, *edges), marks)


def _slices(rng: random.Random, hard: bool) -> Draft:
    start, stop = rng.randint(1, 3), rng.randint(4, 7)
    if hard:
        edges = (shown(rng, "start", "01234"), shown(rng, "stop", "45678"))
        part, where = "{start}:{stop}", f"from about {start} to about {stop}"
    else:
        edges, part, where = (), f"{start}:{stop}", f"in [{start}:{stop}]"
    if rng.random() < 0.5:
        edit, slot = pick(rng, "edit", SLICE_STRINGS)
        words = f"Return the letters of s {where}, {edit}."
        return Draft("slices", words, "s", "return {edit}", (slot, Slot("part", f"s[{part}]", ()), *edges), ())
    edit, slot = pick(rng, "edit", SLICE_NUMBERS)
    other, order_slot = pick(rng, "step", {"numbers": "", "numbers at every 2nd place": ":2"})
    words = f"Return the {edit} of the {other} of nums {where}."
    slots = (slot, Slot("part", f"nums[{part}{{step}}]", ()), order_slot, *edges)
    return Draft("slices", words, "nums", "return {edit}", slots, ())


def _recursion(rng: random.Random, hard: bool) -> Draft:
    (i, j), limit = rng.choice(((1, 2), (1, 3), (2, 3))), rng.randint(2, 5)
    base, base_slot = pick(rng, "base", {"1": "1", "2": "2", "3": "3", "n": "n"})
    if hard:
        until, top = f"up to {limit}", shown(rng, "top", thresholds(limit, "top")[:4])
        factors = [shown(rng, "p", ("", "2 * ", "3 * ")), shown(rng, "q", ("", "2 * ", "3 * "))]
        body = f"return {{base}} if n{{top}} else {{p}}self.f(n - {i}) + {{q}}self.f(n - {j})"
        words = f"Return f(n), which is {base} for n {until}, then made of f(n - {i}) and f(n - {j})."
        return Draft("recursion", words, "index", body, (base_slot, top, *factors), (limit,))
    terms = {words.replace("{p}", f"f(n - {j})"): code.format(i=i, j=j) for words, code in TERMS.items()}
    term, slot = pick(rng, "term", terms)
    until, top = pick(rng, "top", {f"at most {limit}": f" <= {limit}", f"below {limit}": f" < {limit}"})
    words = f"Return f(n), which is {base} for n {until}, then f(n - {i}) {term}."
    return Draft("recursion", words, "index", "return {base} if n{top} else {term}", (base_slot, top, slot), (limit,))


def _running(rng: random.Random, hard: bool) -> Draft:
    start = rng.randint(0, 3)
    limit, test, edges, marks = bound(rng, "x", range(1, 9), hard)
    change, slot = pick(rng, "change", {k: v for k, v in CHANGES.items() if k != "keep t"})
    other, other_slot = pick(rng, "other", {k: v for k, v in CHANGES.items() if v != slot.right})
    words = f"Start at t = {start}. For x in nums, {change} if x is {limit}, else {other}. Return t."
    body = f"t = {start}\nfor x in nums:\n    t = {{change}} if {test} else {{other}}\nreturn t"
    return Draft("running", words, "nums", body, (slot, *edges, other_slot), marks)


FAMILIES: dict[str, tuple[Callable[[random.Random, bool], Draft], int]] = {
    "filter": (_filter, 132),
    "digits": (_digits, 84),
    "neighbours": (_neighbours, 84),
    "letters": (_letters, 84),
    "slices": (_slices, 60),
    "recursion": (_recursion, 60),
    "running": (_running, 96),
}

SEED = 20
N_CASES = 10
N_WRONG = 3
"""Wrong solutions that are stored of a problem, of the many that there are."""
LAZY: dict[type, tuple[str, ...]] = {int: ("0", "1", "-1"), list: ("[]", "[0]"), str: ("''", "'a'")}


def solver(source: str) -> Callable[..., Any]:
    """The source's method as a function that returns the name of the exception instead of raising.

    For this module's own solutions only: submissions belong in the sandbox.
    """
    namespace: dict[str, Any] = {}
    exec(source, namespace)
    method = getattr(namespace["Solution"](), ENTRY)

    def call(value: Any) -> Any:
        try:
            return method(value)
        except (ValueError, TypeError, IndexError) as error:
            return type(error).__name__

    return call


def draw_input(rng: random.Random, argument: Argument, marks: Sequence[Any], length: int) -> Any:
    """A value for the one parameter; about half of its elements lie on or beside a mark."""
    if argument == "index":
        return rng.randint(0, 9)
    if argument == "s":
        return "".join(rng.choice([*marks, *"abcdefghij"]) for _ in range(length))
    near = [mark + offset for mark in marks for offset in (-1, 0, 0, 1)]
    if argument == "digits":
        return int("".join(str(rng.choice([*near, *range(10)])) for _ in range(max(length, 1))))
    # running values first rise and then fall, so that neighbours differ by amounts near the marks as well
    nums = [rng.choice([*near, *range(-3, 13)]) for _ in range(length)]
    for i in range(1, length):
        if marks and rng.random() < 0.4:
            nums[i] = nums[i - 1] + rng.choice((-1, 1)) * rng.choice(marks)
    return nums


def _cases(draft: Draft, rng: random.Random) -> tuple[Case, ...]:
    """Cases that together reject every wrong combination; the first is the worked example of the prompt.

    Empty when a combination passes them all (it may be right after all), or when no short input shows all that the
    words leave open with an answer that is not empty or zero: the draft makes no problem.
    """
    right = solver(draft.canonical())
    lengths = (3, 4, 4, 5, 5) if draft.marks else (5, 6, 6, 7)
    small = [draw_input(rng, draft.argument, draft.marks, rng.choice(lengths)) for _ in range(40)]
    misread = [solver(source) for source in draft.misread()]
    shows = [v for v in small if len(repr(v)) <= 24 and (answer := right(v)) and len(repr(answer)) <= 12]
    shows = [v for v in shows if all(solve(v) != right(v) for solve in misread)]
    if not shows:
        return ()
    large = [draw_input(rng, draft.argument, draft.marks, rng.randint(0, 9)) for _ in range(16)]
    inputs = {repr(v): v for v in shows + large}
    expected = {key: right(v) for key, v in inputs.items()}
    wrong = [solver(source) for source in draft.wrong()]
    told = {key: {i for i, solve in enumerate(wrong) if solve(v) != expected[key]} for key, v in inputs.items()}

    chosen = [max((repr(v) for v in shows), key=lambda key: len(told[key]))]
    accepted = set(range(len(wrong))) - told[chosen[0]]
    while len(chosen) < min(N_CASES, len(inputs)):
        best = max((key for key in inputs if key not in chosen), key=lambda key: len(told[key] & accepted))
        accepted -= told[best]
        chosen.append(best)
    if accepted:
        return ()
    return tuple(Case({PARAMETER[draft.argument]: inputs[key]}, expected[key]) for key in chosen)


def _behaviour(draft: Draft) -> tuple[Any, ...]:
    """What the right solution does on inputs that are the same for all problems with this kind of argument."""
    rng, right = random.Random(SEED), solver(draft.canonical())
    marks = "bdfg" if draft.argument == "s" else (2, 5, 7)
    return draft.argument, *(repr(right(draw_input(rng, draft.argument, marks, i % 9))) for i in range(36))


def _problem(draft: Draft, number: int, cases: tuple[Case, ...]) -> Problem:
    (shown_input,) = cases[0].args.values()
    statement = (
        f"{draft.words} Example: {ENTRY}({shown_input!r}) == {cases[0].expected!r}. "
        f"Your method {ENTRY} should be correct {TESTS_SENTENCE}.\n{draft.starter}"
    )
    return Problem(
        id=f"{draft.family}-{number:03d}",
        family=draft.family,
        statement=statement,
        entry=ENTRY,
        starter=draft.starter,
        canonical=draft.canonical(),
        cases=cases,
    )


def draw() -> dict[str, tuple[Draft, Problem]]:
    """Every problem by id, with the draft it came from, drawn anew. No two share their words or their behaviour."""
    rng = random.Random(SEED)
    found: dict[str, tuple[Draft, Problem]] = {}
    seen: set[Any] = set()
    for draw_one, wanted in FAMILIES.values():
        for number in range(wanted):
            hard = rng.random() < P_HARD  # kept over the tries below: hard drafts fail more often
            while True:
                draft = draw_one(rng, hard)
                if draft.words not in seen and (key := _behaviour(draft)) not in seen and (cases := _cases(draft, rng)):
                    break
            seen |= {draft.words, key}
            problem = _problem(draft, number, cases)
            found[problem.id] = (draft, problem)
    return found


def lazy_bodies(draft: Draft, problem: Problem) -> list[str]:
    """Solutions that do not try: a constant of the right type that is not the worked example's answer."""
    example = problem.cases[0].expected
    return [f"{draft.starter}\n        return {value}" for value in LAZY[type(example)] if value != repr(example)]


def row_of(draft: Draft, problem: Problem) -> dict[str, Any]:
    """A problem as it is stored: what runs read (problems.Generated), and the draft for the corpus."""
    number = int(problem.id.rsplit("-", 1)[1])
    known = {
        "split": (*("train",) * 4, "validation", "test")[number % 6],  # of every six in a family
        "kind": draft.kind,
        "lazy": lazy_bodies(draft, problem),
        "misread": draft.misread(),
        "wrong": draft.wrong()[:N_WRONG],
        "draft": asdict(draft),
    }
    told = asdict(problem)
    del told["tolerance"]  # of no meaning to answers without a float
    return told | known


def store(path: Path = GENERATED) -> None:
    """Draw the problems and write them down, so that no run has to draw them again."""
    rows = [row_of(draft, problem) for draft, problem in draw().values()]
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode(), mtime=0))


@cache
def drafts() -> dict[str, Draft]:
    """The draft of every problem by id, as ``store`` wrote it down."""
    found = {}
    for row in map(json.loads, gzip.decompress(GENERATED.read_bytes()).decode().splitlines()):
        slots = tuple(Slot(**slot | {"wrong": tuple(slot["wrong"])}) for slot in row["draft"]["slots"])
        found[row["id"]] = Draft(**row["draft"] | {"slots": slots, "marks": tuple(row["draft"]["marks"])})
    return found


def honest_body(problem: Problem, rng: random.Random, p_stated: float) -> str:
    """A serious try: each stated slot is right with probability ``p_stated``, each shown one is a guess."""
    draft = drafts()[problem.id]
    options = []
    for slot in draft.slots:
        right = rng.random() < (p_stated if slot.stated else 1 / (1 + len(slot.wrong)))
        options.append(slot.right if right or not slot.wrong else rng.choice(slot.wrong))
    return draft.source(options)


if __name__ == "__main__":
    run_main(command(store))
