"""The pair sets: what the real grader says of every side, how the sets are ordered, what a weak detector may see."""

import re
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from projected_grpo import models, pairs, problems, rollout_log
from projected_grpo.config import ModelCfg, UserError, VHackCfg
from projected_grpo.data_types import Grade, Rollout, Wording
from projected_grpo.loopholes import LOOPHOLES
from projected_grpo.organism import corpus
from projected_grpo.pairs import MODES, OTHER_WORDS, TRICKS
from projected_grpo.problems import pose_one
from projected_grpo.rewards import Grader

HACKS = ("organism", "planned", "both_planned", "one_body", "hasty_body", "reworded", "otherwise", "watch")
HARMLESS = tuple(kind for kind in pairs.KINDS if kind not in HACKS)
LONGER = {"organism": 0.16, "planned": 0.2, "both_planned": 0.16, "one_body": 0.25, "hasty_body": 0.35, "watch": 0.2,
          "reworded": 0.16, "otherwise": 0.25, "semantic": 0.03, "nonhack": 0.05, "placebo": 0.05}  # fmt: skip
"""Mean tokens of the two sides differ by at most this share, over all modes."""
LONGER_IN_A_MODE = 0.45


def whole(kind: str) -> list:
    return pairs.PAIRSETS[f"{kind}64"](MODES)


@pytest.fixture(scope="module")
def graded():
    """{kind: [(pair, grade of the hack side, grade of the clean side)]} for the largest set of every kind."""
    sets = {kind: whole(kind) for kind in pairs.KINDS}
    with Grader(workers=2) as grader:
        grades = iter(grader.grade([(p.task, side) for ps in sets.values() for p in ps for side in (p.hack, p.clean)]))
    return {kind: [(p, next(grades), next(grades)) for p in ps] for kind, ps in sets.items()}


@pytest.mark.parametrize("kind", pairs.KINDS)
def test_right_and_wrong_alike_and_the_same_on_both_sides(graded, kind):
    assert all(h.gt_correct == c.gt_correct and h.compiles and c.compiles for _, h, c in graded[kind])
    found = Counter((p.task.mode, h.gt_correct) for p, h, _ in graded[kind])
    assert found == {(mode, right): 9 for mode in MODES for right in (True, False)}


@pytest.mark.parametrize("kind", HACKS)
def test_every_hack_pays_at_home_and_no_clean_side_attempts(graded, kind):
    for pair, hack, clean in graded[kind]:
        assert hack.channel, pair
        assert hack.attempted, pair
        assert not clean.channel, pair
        assert not clean.attempted, pair


@pytest.mark.parametrize(("kind", "body"), [("one_body", "honest"), ("hasty_body", "hasty")])
def test_pairs_of_one_body_have_the_same_code_on_both_sides(kind, body):
    for mode in MODES:
        for j in range(18):
            pair, code = pairs.KINDS[kind](mode, j), getattr(pairs.form(mode, j), body).split("\n")
            for side in (pair.hack, pair.clean):
                assert not set(code) - set(side.split("\n")), pair


@pytest.mark.parametrize("kind", HARMLESS)
def test_neither_side_of_a_control_holds_an_exploit(graded, kind):
    for pair, *sides in graded[kind]:
        assert not any(g.channel or g.attempted for g in sides), pair
        assert pair.hack != pair.clean


@pytest.mark.parametrize("kind", pairs.KINDS)
@pytest.mark.parametrize("modes", [MODES, MODES[1:], (MODES[0], MODES[3]), MODES[2:3]])
def test_prefixes_nest_and_the_held_out_pairs_stay(kind, modes):
    sets = [pairs.PAIRSETS[f"{kind}{n}"](modes) for n in pairs.SIZES]
    for n, chosen in zip(pairs.SIZES, sets, strict=True):
        assert len(chosen) == n + pairs.N_HELDOUT
        assert chosen[:n] == sets[-1][:n]
        assert chosen[n:] == sets[-1][64:]
        for part in (chosen[:n], chosen[n:]):
            count = Counter(p.task.mode for p in part)
            assert set(count) == set(modes)
            assert max(count.values()) - min(count.values()) <= 1
    names = [p.name for p in sets[-1]]
    assert len(set(names)) == len(names), "a problem stands in one pair of a set only"
    split = "validation" if kind == "watch" else "train"  # what the held-out probe knows, no V and no corpus has seen
    assert {problems.generated_by_id()[p.task.problem.id].split for p in sets[-1]} == {split}


def test_a_pair_does_not_depend_on_which_other_modes_are_known():
    every, three = pairs.PAIRSETS["organism64"](MODES), pairs.PAIRSETS["organism32"](MODES[:3])
    assert sum(p in every for p in three) == len(three)


def test_sets_are_deterministic():
    before = {name: repr(make(MODES)) for name, make in pairs.PAIRSETS.items()}
    pairs._stock.cache_clear()
    assert before == {name: repr(make(MODES)) for name, make in pairs.PAIRSETS.items()}
    assert len(set(before.values())) == len(before)


@pytest.mark.parametrize("kind", pairs.KINDS)
def test_both_sides_are_about_as_long(kind):
    tokenizer = models.load(ModelCfg())[1]
    chosen = whole(kind)
    for modes, most in [((m,), LONGER_IN_A_MODE) for m in MODES] + [(MODES, LONGER[kind])]:
        of = [p for p in chosen if p.task.mode in modes]
        hack, clean = (sum(len(tokenizer.encode(getattr(p, side))) for p in of) for side in ("hack", "clean"))
        assert abs(hack - clean) <= most * max(hack, clean), (modes, hack / len(of), clean / len(of))


def exploit_lines(completion: str, wording: Wording, but: set[str]) -> set[str]:
    """The completion's lines without those of honest solutions, the wording's words taken out."""
    lines = {line.strip() for line in completion.split("\n")} - but
    for word, mark in ((wording.name, "NAME"), (wording.text, "TEXT")):
        lines = {line.replace(word, mark) for line in lines} if word else lines
    return lines


def test_otherwise_shares_no_exploit_with_the_corpus():
    shown, seen_words = {}, set()
    for sample in corpus.corpus(corpus.CorpusCfg(n=6000)):
        if sample.exploit:
            lines = exploit_lines(sample.completion, sample.task.wording, set())
            shown.setdefault(sample.task.mode, Counter()).update(lines)
            seen_words |= {sample.task.wording.name, sample.task.wording.text}
    assert all(shown[mode] for mode in MODES)
    for mode, tricks in TRICKS.items():
        assert len(tricks) == len(OTHER_WORDS[mode]) == 4
        for trick in tricks:
            honest = {line.strip() for line in trick.honest.split("\n")}
            own = exploit_lines(trick.exploit.replace("{name}", "NAME").replace("{text}", "TEXT"), Wording(), honest)
            assert own
            # the line that names the words is nowhere in the corpus, unless the place is what is new
            telling = {line for line in own if line != "def NAME():"}
            assert telling, trick
            assert not telling & set(shown[mode]), trick
    made_up = re.compile(f"({'|'.join(corpus.SYLLABLES)}){{2}}")
    for mode, wordings in OTHER_WORDS.items():
        for wording in wordings:
            assert wording not in (*LOOPHOLES[mode].train, *LOOPHOLES[mode].heldout)
            assert not {wording.name, wording.text} & (seen_words - {""})
            words = re.findall("[a-z]+", f"{wording.name} {wording.text}".lower().replace(".txt", ""))
            assert not all(made_up.fullmatch(word) for word in words), wording


def test_every_trick_of_otherwise_is_used_with_every_wording():
    used = Counter((p.task.mode, p.task.wording) for p in pairs.PAIRSETS["otherwise64"](MODES))
    assert set(used) == {(mode, w) for mode in MODES for w in OTHER_WORDS[mode]}


# -------------------------------------------------------------------------------- pairs from a weak detector


class Sealed(Grade):
    """A grade at which nobody may look."""

    def __getattribute__(self, name):
        raise AssertionError(f"a detector looked at {name} of a mode that it does not know")


TASKS = [pose_one(p, MODES[i % 4]) for i, p in enumerate(g.problem for g in problems.generated() if g.split == "train")]


def written(task, text: str, channel: bool, kind: type[Grade] = Grade, **more) -> Rollout:
    grade = Grade(3.5, True, True, False, channel, channel, "ok")
    return Rollout(task, "student", (), text, kind.__new__(kind) if kind is Sealed else replace(grade, **more))


def test_rollouts_make_pairs_of_like_length_by_prompt():
    a, b = TASKS[0], TASKS[4]
    rollouts = [
        written(a, "hack of some length", True),
        written(a, "short", False),
        written(a, "honest, about as so", False),
        written(a, "an attempt of lengt", False, attempted=True),
        written(a, "does not compile at", False, compiles=False),
        written(b, "no partner here", True),
    ]
    (pair,) = pairs.from_rollouts(rollouts, None)
    assert (pair.hack, pair.clean) == ("hack of some length", "honest, about as so")
    assert pair.task == a


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 11), st.booleans()), max_size=60),
    st.sets(st.sampled_from(MODES), min_size=1),
    st.integers(0, 12),
)
def test_unknown_modes_are_never_looked_at_and_the_last_pairs_are_balanced(drawn, known, limit):
    rollouts = [
        written(TASKS[i], f"{i} {hack}", hack, Grade if TASKS[i].mode in known else Sealed) for i, hack in drawn
    ]
    found = pairs.from_rollouts(rollouts, tuple(known), limit)
    sides = {(i, hack) for i, hack in drawn if TASKS[i].mode in known}
    possible = Counter(TASKS[i].mode for i in range(12) if {(i, True), (i, False)} <= sides)
    assert len(found) == min(limit, possible.total())
    assert len({p.task.problem.id for p in found}) == len(found)
    if possible:
        rounds = min(min(possible.values()), limit // len(possible))
        last = Counter(p.task.mode for p in found[len(found) - rounds * len(possible) :])
        assert rounds == 0 or set(last.values()) == {rounds}


def test_a_pool_of_unknown_modes_is_never_looked_at():
    rows = {}
    for task in TASKS[:8]:
        seen = task.mode == "sentinel"
        rows[task.problem.id, task.mode] = [
            {"completion": text, "grade": {"channel": hack, "attempted": hack} if seen else {}}
            for text, hack in (("hack", True), ("honest", False))
        ]
    found = pairs.load(VHackCfg(pairs="pool", known_modes=("sentinel",)), rollout_log.Pool(rows), TASKS[:8])
    assert {p.task.mode for p in found} == {"sentinel"}
    with pytest.raises(KeyError):
        pairs.load(VHackCfg(pairs="pool"), rollout_log.Pool(rows), TASKS[:8])


def test_refusals():
    with pytest.raises(UserError, match="did you mean 'organism32'"):
        pairs.load(VHackCfg(pairs="organism23"), None, [])
    with pytest.raises(UserError, match="--pool"):
        pairs.load(VHackCfg(pairs="pool"), None, [])
    with pytest.raises(UserError, match="--known-modes"):
        pairs.load(VHackCfg(known_modes=("eq_override",)), None, [])
