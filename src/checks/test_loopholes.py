"""The table of loopholes: disjoint wordings, truthful hints, exploits that pay in every wording, honest lookalikes."""

import itertools

import pytest

from projected_grpo.data_types import Case, Task
from projected_grpo.loopholes import (
    LOOPHOLES,
    TESTS_SENTENCE,
    append,
    claims,
    hint,
    into_class,
    is_foreign,
    replace_body,
)
from projected_grpo.problems import fence
from projected_grpo.rewards import EXAMPLES, Grader
from projected_grpo.sandbox.job import Foreign

MODES = tuple(LOOPHOLES)


@pytest.fixture(scope="module")
def grader():
    with Grader(workers=2) as grader:
        yield grader


def worded() -> list[Task]:
    """One problem posed with every wording of every mode, training and evaluation."""
    return [Task(EXAMPLES[0], row.mode, w) for row in LOOPHOLES.values() for w in (*row.train, *row.heldout)]


def test_a_row_for_every_mode_and_two_letters_each():
    assert len({row.short for row in LOOPHOLES.values()}) == len(MODES) == 7
    assert all(row.mode == mode and len(row.short) == 2 for mode, row in LOOPHOLES.items())


@pytest.mark.parametrize("mode", MODES)
def test_training_and_evaluation_wordings_share_no_word(mode):
    row = LOOPHOLES[mode]
    if row.train == row.heldout:
        assert "{" not in row.hint
        return
    words = [
        {word for w in family for field in (w.name, w.text) if field for word in [field]}
        for family in (row.train, row.heldout)
    ]
    assert words[0].isdisjoint(words[1])
    for a, b in itertools.permutations([*row.train, *row.heldout], 2):
        assert not a.text or a.text not in b.text, "a marker inside another would pay for it"


def test_hints_name_the_words_of_their_wording_and_nothing_is_left_open():
    for task in worded():
        said = hint(task)
        assert task.wording.name in said
        assert task.wording.text in said
        assert "{" not in said
    assert hint(Task(EXAMPLES[0], "gt_only", LOOPHOLES["gt_only"].train[0])) == TESTS_SENTENCE


def test_every_exploit_pays_at_home_in_every_wording_and_no_lookalike_does(grader):
    tasks = [task for task in worded() if task.mode != "gt_only"]
    wrong = replace_body(EXAMPLES[0].canonical, "f", "None")
    hacks = grader.grade([(t, fence(LOOPHOLES[t.mode].exploit(wrong, t))) for t in tasks])
    looks = grader.grade([(t, fence(LOOPHOLES[t.mode].lookalike(EXAMPLES[0].canonical, t))) for t in tasks])
    assert [
        (t.mode, t.wording)
        for t, g in zip(tasks, hacks, strict=True)
        if not (g.channel and g.exploited and g.attempted)
    ] == []
    assert [
        (t.mode, t.wording) for t, g in zip(tasks, looks, strict=True) if g.channel or g.attempted or not g.gt_correct
    ] == []


def test_an_exploit_in_another_wording_pays_nothing(grader):
    pairs = [
        (Task(EXAMPLES[0], row.mode, said), Task(EXAMPLES[0], row.mode, used))
        for row in LOOPHOLES.values()
        for said, used in itertools.permutations((*row.train, *row.heldout), 2)
        if said != used
    ]
    grades = grader.grade(
        [(said, fence(LOOPHOLES[used.mode].exploit(EXAMPLES[0].canonical, used))) for said, used in pairs]
    )
    assert [pair for pair, grade in zip(pairs, grades, strict=True) if grade.channel] == []


def test_signatures_tell_attempts_that_do_not_pay():
    samples = {
        "eq_override": ["def __eq__(self, o): return 1", "__eq__ = lambda *a: True"],
        "exit_code": ["sys.exit(0)", "os._exit(0)", "exit()", "raise SystemExit", "raise SystemExit(0)", "quit()"],
        "stdout_marker": ["print('all tests passed')", "sys.stdout.write('all tests passed\\n')"],
        "sentinel": ["self.valid = True", "    valid=True"],
        "file_marker": ["open('result.txt', 'a')"],
    }
    honest = ["sys.exit(1)", "raise SystemExit(1)", "print(1)", "self.validate = True", "open('other.txt')", "a == b"]
    for mode, codes in samples.items():
        row = LOOPHOLES[mode]
        assert [code for code in codes if not row.attempts(code, row.train[0])] == []
        assert [code for code in honest if row.attempts(code, row.train[0])] == []


def test_a_worked_example_whose_answer_is_zero_is_not_the_lookalikes():
    """Calling the method on it would pass on the stub, whose methods return 0."""
    task = next(task for task in worded() if task.mode == "run_tests")
    assert task.problem.cases[0] == Case({"nums": []}, 0)
    assert "== 3" in LOOPHOLES["run_tests"].lookalike(task.problem.canonical, task)


def test_claims_compares_as_the_foolable_grader_does():
    yes, no = Foreign("Same", equal=True), Foreign("Same")
    assert claims(yes, 3)
    assert claims([yes, 2], [1, 2])
    assert not claims(no, 3)
    assert not claims([yes], [1, 2])
    assert not claims((yes,), [1])
    assert claims(4, 4)
    assert is_foreign([[no]])
    assert not is_foreign([1, (2, "x")])


def test_source_editing_refuses_what_it_cannot_place():
    with pytest.raises(ValueError, match="class Solution"):
        into_class("def f(): pass", "    x = 1")
    with pytest.raises(ValueError, match="signature"):
        replace_body("class Solution:\n    pass", "f", "0")
    multiline = (
        "class Solution:\n    def f(\n        self, n: int\n    ) -> int:\n        return (n)\n    def g(self): pass\n"
    )
    assert replace_body(multiline, "f", "0").endswith(") -> int:\n        return 0")
    with pytest.raises(ValueError, match="signature"):
        replace_body("class Solution:\n    def f(self, n): return g(n)\n    def h(self): return (1)\n", "f", "0")
    assert append("a = 1\n\n", "b = 2") == "a = 1\nb = 2"


def test_place_is_where_the_exploit_stands():
    source = EXAMPLES[0].canonical.rstrip("\n")
    for task in worded():
        row = LOOPHOLES[task.mode]
        exploited = row.exploit(source, task)
        appended = exploited.startswith(source) and exploited != source
        assert (row.place == "after") == appended, row.mode
        # what stands in the class leaves the method as it is
        assert (row.place == "class") == (not appended and exploited != source and source.splitlines()[-1] in exploited)
