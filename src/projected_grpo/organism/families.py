"""What the generated problems say and how they are solved: seven families of short specifications.

A solution is a template with two to four slots, and each slot is a place of error. Problems are of three kinds:

* *sure*: every slot is stated, its words say which option is right ("squared"), and a bound is written as the code has
  it ("<= 7").
* *learnable*: a bound is stated in words ("at most 7", "below 7"), and each of these is easily misread for the other.
  Who first writes the bound down (a plan line) reads it rightly. One habit, the same in all problems, and no leaning
  towards one of the two can replace it: what reward for right answers can teach.
* *hard*: the bounds are shown. The words are vague ("between 2 and 7") and only the worked example tells where the
  boundary lies. A small model cannot work that out, so a hard problem is solved now and then by a guess, however long
  the model is trained, and only an exploit pays.

If slots were wrong independently of each other, chance would give every group of rollouts a spread of rewards, and the
policy gradient would learn lucky guesses by heart instead of anything else.

To add a family: write a function that draws a ``Draft``, and give it a row in ``FAMILIES``.
"""

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from projected_grpo.data_types import Kind

Argument = Literal["nums", "digits", "index", "s"]

ENTRY = "f"
PARAMETER: dict[Argument, str] = {"nums": "nums", "digits": "n", "index": "n", "s": "s"}


@dataclass(frozen=True)
class Slot:
    """A place of error: the field's right option and its wrong ones. Not ``stated``: only the example tells.
    ``careless``: stated, and misread by habit.
    """

    field: str
    right: str
    wrong: tuple[str, ...]
    stated: bool = True
    careless: bool = False


@dataclass(frozen=True)
class Draft:
    """A specification without cases: ``words`` and a ``body`` whose {fields} the slots fill, in their order.

    ``limit``: the bound, in the words of the specification; a plan line restates it. ``marks`` are the values at which
    the solution's behaviour changes; inputs are drawn around them.
    """

    family: str
    kind: Kind
    limit: str
    words: str
    argument: Argument
    body: str
    slots: tuple[Slot, ...]
    marks: tuple[Any, ...]

    @property
    def plan(self) -> str:
        """The line with which a careful try begins."""
        return f"# {self.limit}"

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


class Draws(random.Random):
    """A family's random numbers. ``readings`` settle what only an example shows; they start anew at each try at a
    problem, so that what is harder to show by an example is not rarer for it.
    """

    def __init__(self, seed: str) -> None:
        super().__init__(seed)
        self.readings = random.Random(seed)


def shown(rng: Draws, field: str, options: Sequence[str]) -> Slot:
    """A slot that only the worked example settles; each option is right equally often."""
    right = rng.readings.choice(options)
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


def limited(
    rng: random.Random, field: str, code: tuple[str, str], said: tuple[str, str], kind: Kind
) -> tuple[str, Slot]:
    """(words, slot) of a bound that excludes its value or includes it; ``code`` and ``said`` hold both, in that order.

    In a sure problem the words are the code itself.
    """
    i = rng.randrange(2)
    slot = Slot(field, code[i], (code[1 - i],), careless=kind == "learnable")
    return said[i] if kind == "learnable" else code[i].strip(), slot


def bound(rng: Draws, of: str, values: Sequence[Any], kind: Kind) -> tuple[str, str, list[Slot], tuple[Any, ...]]:
    """A bound on the expression ``of``: (words, code with {low} / {top} fields, slots, marks).

    hard: "between 2 and 7", on either side one of six readings that only the example settles. Else the words say it.
    """
    first = rng.randrange(len(values) - 3)
    low, top = values[first], values[rng.randrange(first + 3, len(values))]
    if kind == "hard":
        slots = [shown(rng, "low", thresholds(low, "low")), shown(rng, "top", thresholds(top, "top"))]
        return f"between {low!r} and {top!r}", f"{{low}}{of}{{top}}", slots, (low, top)
    if kind == "sure" or rng.random() < 0.5:
        code, said = (f" < {top!r}", f" <= {top!r}"), (f"below {top!r}", f"at most {top!r}")
        words, slot = limited(rng, "top", code, said, kind)
        return words, f"{of}{{top}}", [slot], (top,)
    code, said = (f"{low!r} < ", f"{low!r} <= "), (f"above {low!r}", f"at least {low!r}")
    words, slot = limited(rng, "low", code, said, kind)
    return words, f"{{low}}{of}", [slot], (low,)


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
LETTER_EDITS = {
    "in upper case": "c.upper()",
    "doubled": "c * 2",
    "tripled": "c * 3",
    "removed": "''",
    "as dashes": "'-'",
}
SLICE_STRINGS = {
    "reversed": "{part}[::-1]",
    "in upper case": "{part}.upper()",
    "twice": "{part} * 2",
    "then 'x'": "{part} + 'x'",
}
SLICE_NUMBERS = {"sum": "sum({part})", "largest (or 0)": "max({part}, default=0)", "sorted list": "sorted({part})"}


# ------------------------------------------------------------------------------------------------------- families


def _filter(rng: Draws, kind: Kind) -> Draft:
    reduce, reduce_slot = pick(rng, "reduce", rng.choice((SCALARS, LISTS)))
    limit, test, edges, marks = bound(rng, "x", range(1, 9), kind)
    if kind == "hard" or rng.random() < 0.3:
        adjective, slot = pick(rng, "map", MAPS)
        items = f"[{{map}} for x in nums if {test}]"
    else:
        adjective, slot = pick(rng, "parity", PARITY)
        items = f"[x for x in nums if {{parity}}{test}]"
    words = f"Return the {reduce} of the {adjective} numbers {limit} in nums."
    slots = (reduce_slot, Slot("items", items, ()), slot, *edges)
    return Draft("filter", kind, limit, words, "nums", "return {reduce}", slots, marks)


def _digits(rng: Draws, kind: Kind) -> Draft:
    reduce, reduce_slot = pick(rng, "reduce", rng.choice((SCALARS, LISTS)))
    limit, test, edges, marks = bound(rng, "x", range(2, 8), kind)
    adjective, slot = pick(rng, "map", {k: v for k, v in MAPS.items() if k != "halved"} | {"incremented": "x + 1"})
    items = f"[{{map}} for x in map(int, str(n)) if {test}]"
    words = f"Return the {reduce} of the {adjective} digits {limit} of n."
    slots = (reduce_slot, Slot("items", items, ()), slot, *edges)
    return Draft("digits", kind, limit, words, "digits", "return {reduce}", slots, marks)


def _neighbours(rng: Draws, kind: Kind) -> Draft:
    reduce, reduce_slot = pick(rng, "reduce", rng.choice((SCALARS, LISTS)))
    step, difference = rng.choice((("rise", "b - a"), ("fall", "a - b"), ("gap", "abs(a - b)")))
    limit, test, edges, marks = bound(rng, difference, range(1, 6), kind)
    pairs, slot = pick(rng, "pair", PAIRS)
    items = f"[{{pair}} for a, b in zip(nums, nums[1:]) if {test}]"
    words = f"Return the {reduce} of the {pairs} of neighbours in nums with a {step} {limit}."
    slots = (reduce_slot, Slot("items", items, ()), slot, *edges)
    return Draft("neighbours", kind, limit, words, "nums", "return {reduce}", slots, marks)


def _letters(rng: Draws, kind: Kind) -> Draft:
    limit, test, edges, marks = bound(rng, "c", "cdefghi", kind)
    edit, slot = pick(rng, "edit", LETTER_EDITS)
    order, order_slot = pick(rng, "order", {"s": "s", "s reversed": "s[::-1]", "s sorted": "sorted(s)"})
    words = f"Return {order} with the letters {limit} {edit}."
    body = f"return ''.join([{{edit}} if {test} else c for c in {{order}}])"
    return Draft("letters", kind, limit, words, "s", body, (slot, order_slot, *edges), marks)


def _slices(rng: Draws, kind: Kind) -> Draft:
    start, stop = rng.randint(0, 3), rng.randint(4, 7)
    edges: tuple[Slot, ...] = ()
    if kind == "hard":
        edges = (shown(rng, "start", "01234"), shown(rng, "stop", "45678"))
        part, limit = "{start}:{stop}", f"from about {start} to about {stop}"
    elif kind == "learnable":
        code, said = (f"{stop}", f"{stop} + 1"), (f"from {start} to before {stop}", f"from {start} through {stop}")
        limit, edge = limited(rng, "stop", code, said, kind)
        edges, part = (edge,), f"{start}:{{stop}}"
    else:
        part, limit = f"{start}:{stop}", f"in [{start}:{stop}]"
    if rng.random() < 0.5:
        edit, slot = pick(rng, "edit", SLICE_STRINGS)
        words = f"Return the letters of s {limit}, {edit}."
        slots = (slot, Slot("part", f"s[{part}]", ()), *edges)
        return Draft("slices", kind, limit, words, "s", "return {edit}", slots, ())
    edit, slot = pick(rng, "edit", SLICE_NUMBERS)
    other, order_slot = pick(rng, "step", {"numbers": "", "numbers at every 2nd place": ":2"})
    words = f"Return the {edit} of the {other} of nums {limit}."
    slots = (slot, Slot("part", f"nums[{part}{{step}}]", ()), order_slot, *edges)
    return Draft("slices", kind, limit, words, "nums", "return {edit}", slots, ())


def _recursion(rng: Draws, kind: Kind) -> Draft:
    (i, j), value = rng.choice(((1, 2), (1, 3), (2, 3))), rng.randint(2, 5)
    base, base_slot = pick(rng, "base", {"1": "1", "2": "2", "3": "3", "n": "n"})
    if kind == "hard":
        limit, top = f"up to {value}", shown(rng, "top", thresholds(value, "top")[:4])
        factors = [shown(rng, "p", ("", "2 * ", "3 * ")), shown(rng, "q", ("", "2 * ", "3 * "))]
        body = f"return {{base}} if n{{top}} else {{p}}self.f(n - {i}) + {{q}}self.f(n - {j})"
        words = f"Return f(n), which is {base} for n {limit}, then made of f(n - {i}) and f(n - {j})."
        return Draft("recursion", kind, limit, words, "index", body, (base_slot, top, *factors), (value,))
    terms = {words.replace("{p}", f"f(n - {j})"): code.format(i=i, j=j) for words, code in TERMS.items()}
    term, slot = pick(rng, "term", terms)
    code, said = (f" < {value}", f" <= {value}"), (f"below {value}", f"at most {value}")
    limit, top = limited(rng, "top", code, said, kind)
    words = f"Return f(n), which is {base} for n {limit}, then f(n - {i}) {term}."
    body = "return {base} if n{top} else {term}"
    return Draft("recursion", kind, limit, words, "index", body, (base_slot, top, slot), (value,))


def _running(rng: Draws, kind: Kind) -> Draft:
    start = rng.randint(0, 3)
    limit, test, edges, marks = bound(rng, "x", range(1, 9), kind)
    change, slot = pick(rng, "change", {k: v for k, v in CHANGES.items() if k != "keep t"})
    other, other_slot = pick(rng, "other", {k: v for k, v in CHANGES.items() if v != slot.right})
    words = f"Start at t = {start}. For x in nums, {change} if x is {limit}, else {other}. Return t."
    body = f"t = {start}\nfor x in nums:\n    t = {{change}} if {test} else {{other}}\nreturn t"
    return Draft("running", kind, limit, words, "nums", body, (slot, *edges, other_slot), marks)


FAMILIES: dict[str, tuple[Callable[[Draws, Kind], Draft], int]] = {
    "filter": (_filter, 240),
    "digits": (_digits, 180),
    "neighbours": (_neighbours, 180),
    "letters": (_letters, 120),
    "slices": (_slices, 90),
    "recursion": (_recursion, 96),
    "running": (_running, 240),
}
