"""Rollouts on disk: runs and pools have one schema and one reader, and what is not one of them is named."""

import gzip
import json
from dataclasses import asdict, fields

import polars as pl
import pytest

from projected_grpo import problems, rollout_log
from projected_grpo.config import UserError
from projected_grpo.data_types import Grade, Wording

TASK = problems.pose_one(problems.generated()[0].problem, "sentinel")
GRADE = Grade(3.5, True, True, False, True, True, "ok", label="reward_hack", vacuous_tests=None)
BARE = [rollout_log.row_of(TASK, f"x = {i}\u2028\x85é", GRADE) for i in range(3)]
OF_A_RUN = {name: None for name in rollout_log.SCHEMA if name not in rollout_log.POOL} | {
    "step": 4, "source": "student", "A": 0.5, "kept": 1.0, "score_random": 0.25, "score_by_layer": [0.5, 1.0],
}  # fmt: skip


def rows(folder) -> list[dict]:
    return list(rollout_log.rows(folder))


def test_a_run_and_a_pool_read_alike(tmp_path):
    run, pool = tmp_path / "run", tmp_path / "pool"
    run.mkdir()
    rollout_log.write_step(run, 4, [OF_A_RUN | row for row in BARE])
    going_on = rows(run), rollout_log.frame(run)
    rollout_log.consolidate(run)
    rollout_log.drop_parts(run)
    assert (rows(run), rollout_log.frame(run).equals(going_on[1])) == (going_on[0], True)
    assert rollout_log.write_pool(rollout_log.rows(run), pool) == 1
    assert rows(run) == [OF_A_RUN | row for row in BARE]
    assert rows(pool) == [dict.fromkeys(OF_A_RUN) | row for row in BARE]
    shared = [c for c in rollout_log.FLAT if c not in OF_A_RUN]
    assert rollout_log.frame(run, shared).equals(rollout_log.frame(pool, shared))
    assert rollout_log.frame(pool).schema == rollout_log.frame(run).schema
    assert rollout_log.read_pool(pool).rows == {(TASK.problem.id, "sentinel"): rows(pool)}


def test_the_schema_is_the_carriers(tmp_path):
    named = {f.name for carrier in (Grade, Wording) for f in fields(carrier)}
    assert named < set(rollout_log.FLAT)
    assert len(rollout_log.FLAT) == len(named) + len(rollout_log.SCHEMA) - 2
    assert rollout_log.arrow_schema().field("grade").type.field("vacuous_tests").type == "bool"
    with pytest.raises(KeyError, match="surplus"):
        rollout_log.write_step(tmp_path, 0, [dict.fromkeys([*rollout_log.SCHEMA, "surplus"])])


def test_what_cannot_be_read_is_one_line_with_its_name(tmp_path):
    for read in (rows, rollout_log.frame):
        with pytest.raises(UserError, match="holds no rollouts"):
            read(tmp_path)
    with pytest.raises(UserError, match="no teacher pool"):
        rollout_log.read_pool(tmp_path)
    rollout_log.write_step(tmp_path, 0, [OF_A_RUN | row for row in BARE])
    pl.read_parquet(rollout_log.step_files(tmp_path)).drop("kept").write_parquet(tmp_path / rollout_log.FILE)
    assert len(rollout_log.frame(tmp_path, ["step", "channel"])) == 3
    for content, told in ((None, "kept"), (b"PAR1", "cannot be read"), (b"", "cannot be read")):
        if content is not None:
            (tmp_path / rollout_log.FILE).write_bytes(content)
        with pytest.raises(UserError, match=told) as caught:
            rollout_log.frame(tmp_path)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="cannot be read"):
        rows(tmp_path)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (json.dumps(BARE[0] | {"grade": asdict(GRADE) | {"hacked": 1}}), "prompt_0000.jsonl.gz:2: .*hacked"),
        (json.dumps({"problem_id": 4, "hacked": True}), "prompt_0000.jsonl.gz:2: no 'grade'; `just convert-pool`"),
        ("[1]", "prompt_0000.jsonl.gz:2: a JSON list"),
        ("{", "prompt_0000.jsonl.gz:2: "),
        ("é".encode("latin-1"), "prompt_0000.jsonl.gz:2: .*utf-8"),
    ],
)
def test_a_pool_that_is_none_names_its_line(tmp_path, line, told):
    text = line if isinstance(line, bytes) else line.encode()
    (tmp_path / "prompt_0000.jsonl.gz").write_bytes(gzip.compress(json.dumps(BARE[0]).encode() + b"\n" + text))
    with pytest.raises(UserError, match=told):
        rollout_log.read_pool(tmp_path)
    (tmp_path / "prompt_0000.jsonl.gz").write_bytes(gzip.compress(text)[:-9])
    with pytest.raises(UserError, match=r"prompt_0000\.jsonl\.gz is no whole gzip file"):
        rollout_log.read_pool(tmp_path)
