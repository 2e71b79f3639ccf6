"""Many submissions, one in ten hostile: nothing leaks, nothing grows. The large soak is a command: docs/grading.md."""

from projected_grpo import problems, rewards
from projected_grpo.bench import grading


def test_a_mixture_leaves_no_process_descriptor_or_file_behind():
    before = grading.footprint()
    rows = grading.soak(200, step=100)
    assert [row["graded"] for row in rows] == [100, 200]
    assert all(row["right"] >= 30 and row["paid by a channel"] >= 10 for row in rows)
    for name in ("descriptors", "processes", "temporary files"):
        assert rows[0][name] == rows[-1][name], name
        assert grading.footprint()[name] == before[name], name
    assert rows[-1]["memory MB"] - rows[0]["memory MB"] < 40


def test_hostile_submissions_of_the_soak_are_never_right():
    with rewards.Grader(workers=2, min_cpu_s=1.0) as grader:
        task = problems.pose_one(rewards.EXAMPLES[0], "gt_only")
        grades = grader.grade([(task, problems.fence(source)) for source in grading.HOSTILE])
    assert [grade for grade in grades if grade.gt_correct or grade.reward > 0.5] == []


def test_the_bench_prints_its_table_and_its_targets(capsys):
    grading.bench(rewards.EXAMPLES[:1], repeats=1, batches=1)
    said = capsys.readouterr().out
    assert "cold python -c" in said
    assert said.count("🟢") + said.count("🔴") == 4
