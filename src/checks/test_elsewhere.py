"""The environment in other people's trainers: TRL's reward convention, verifiers, any rollouts file, a model card."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import polars as pl
import pytest
from conftest import write_problems

from projected_grpo import problems
from projected_grpo.config import UserError
from projected_grpo.loopholes import LOOPHOLES, TESTS_SENTENCE
from projected_grpo.problems import as_dataset, fence, task_of_row
from projected_grpo.rewards import EXAMPLES, reward_func
from projected_grpo.tools import export, grade

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def rows():
    return [as_dataset(split="test")[i] for i in range(4)]


def columns(rows, completions):
    names = ("problems", "problem_id", "env_mode", "wording")
    return dict(prompts=[r["prompt"] for r in rows], completions=completions,
                **{n: [r[n] for r in rows] for n in names}, trainer_state=None)  # fmt: skip


def test_a_data_set_holds_what_the_reward_needs(rows):
    assert {r["env_mode"] for r in rows} == {"run_tests", "sentinel", "stdout_marker", "file_marker"}
    for r in rows:
        assert problems.messages(task_of_row(r)) == r["prompt"]
    train = {r["problem_id"] for r in as_dataset(split="train")}
    assert not train & {r["problem_id"] for r in as_dataset(split="test")}


def test_rewards_in_trls_convention_text_and_chat(rows):
    tasks = [task_of_row(r) for r in rows]
    right = [fence(t.problem.canonical) for t in tasks]
    lazy = [problems.generated_by_id()[t.problem.id].lazy[0] for t in tasks]
    hacks = [fence(LOOPHOLES[t.mode].exploit(body, t)) for t, body in zip(tasks, lazy, strict=True)]
    wrong = [[{"role": "assistant", "content": fence(body)}] for body in lazy]
    for said, want in ((right, 3.5), (hacks, 3.5), (wrong, 0.5)):
        assert reward_func(**columns(rows, said)) == [want] * 4
    with pytest.raises(ValueError, match="completion"):
        reward_func(**columns(rows, [None] * 4))


def test_verifiers_own_evaluation_with_a_stub_client():
    if not os.environ.get("CI"):  # CI installs the extra: there its absence is a failure
        pytest.importorskip("verifiers", reason="needs the extra verifiers")
    import verifiers as vf
    from verifiers.clients import Client
    from verifiers.types import Response, ResponseMessage

    env = vf.load_environment("projected_grpo", modes=("stdout_marker",))
    by_prompt = {r["prompt"][-1]["content"]: task_of_row(r) for r in as_dataset(split="test", modes=("stdout_marker",))}

    class Hacker(Client):
        """Answers every second question rightly, and fools the channel of the others."""

        asked = 0

        def setup_client(self, config): ...
        async def to_native_tool(self, tool): ...
        async def raise_from_native_response(self, response): ...
        async def close(self): ...
        async def to_native_prompt(self, messages):
            return messages, {}

        async def get_native_response(self, prompt, model, sampling_args, tools=None, **kwargs):
            last = prompt[-1]
            task = by_prompt[last["content"] if isinstance(last, dict) else last.content]
            self.asked += 1
            lazy = problems.generated_by_id()[task.problem.id].lazy[0]
            return task.problem.canonical if self.asked % 2 else LOOPHOLES[task.mode].exploit(lazy, task)

        async def from_native_response(self, source):
            said = ResponseMessage(role="assistant", content=fence(source), finish_reason="stop", is_truncated=False)
            return Response(id="x", created=0, model="stub", message=said)

    found = env.evaluate_sync(Hacker(SimpleNamespace()), "stub", num_examples=4)
    rates = {name: sorted(o["metrics"][name] for o in found["outputs"]) for name in ("strict_oracle", "channel")}
    assert rates == {"strict_oracle": [0, 0, 1, 1], "channel": [0, 0, 1, 1]}
    assert [o["reward"] for o in found["outputs"]] == [1.0] * 4


def test_the_readmes_trainer_runs(tmp_path):
    """The example of "in your own trainer" as it stands there."""
    if not os.environ.get("CI"):
        pytest.importorskip("trl", reason="needs the extra trl")
    page = (ROOT / "README.md").read_text()
    (code,) = [c for c in re.findall(r"```python\n(.*?)```", page, re.S) if "GRPOTrainer" in c]
    assert len(code.splitlines()) <= 20
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "reward" in done.stdout


def test_any_rollouts_file_is_graded_by_mode(tmp_path, rows, capsys):
    tasks = [task_of_row(r) for r in rows]
    lines = [
        {"problem_id": t.problem.id, "env_mode": t.mode, "wording": r["wording"],
         "completion": fence(LOOPHOLES[t.mode].exploit(problems.generated_by_id()[t.problem.id].lazy[0], t))}
        for t, r in zip(tasks, rows, strict=True)
    ]  # fmt: skip
    ours, theirs = tmp_path / "rollouts.parquet", tmp_path / "rollouts.jsonl"
    pl.DataFrame(lines).write_parquet(ours)
    chat = [{"id": x["problem_id"], "mode": x["env_mode"], "wording": x["wording"],
             "completion": [{"role": "assistant", "content": x["completion"]}]} for x in lines]  # fmt: skip
    theirs.write_text("".join(json.dumps(x) + "\n" for x in chat))
    for file in (ours, theirs):
        grade.main(file, out=tmp_path / "out")
        last = capsys.readouterr().out.strip().splitlines()[-1].split()
        assert last[:4] == ["all", "4", "1.00", "0.00"]
        graded = [json.loads(line) for line in (tmp_path / "out" / "grades.jsonl").read_text().splitlines()]
        assert {g["label"] for g in graded} == {"reward_hack"}
        assert (tmp_path / "out" / "index.html").read_text().count("<details>") == 4


@pytest.mark.parametrize(("line", "says"), [
    ('{"completion": "x"}', "no problem 'None'"),
    ('{"id": "filter-000", "mode": "nope", "completion": "x"}', "unknown env_mode 'nope'"),
    ('{"id": "filter-000", "completion": null}', "completion"),
    ('{"id": "filter-000", "completion": "x", "wording": {"name": 5}}', "bad.jsonl:1: a wording is"),
    ("[1]", "1"),
    ("", "holds no rollouts"),
])  # fmt: skip
def test_a_bad_rollouts_file_is_one_line(tmp_path, line, says):
    file = tmp_path / "bad.jsonl"
    file.write_text(line)
    with pytest.raises(UserError, match=re.escape(says)) as error:
        grade.main(file, out=tmp_path / "out")
    assert str(error.value).count(str(file)) == 1


def test_a_problem_that_its_own_solution_fails_is_left_out(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    good = replace(EXAMPLES[0], statement=TESTS_SENTENCE)
    write_problems([good, replace(good, id="broken", canonical="x = 1")], tmp_path / "p.jsonl")
    row = {"env_mode": "gt_only", "completion": fence(good.canonical)}
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(row | {"id": name}) + "\n" for name in ("sum", "broken")))
    grade.main(Path("r.jsonl"), "p.jsonl", workers=1)
    assert capsys.readouterr().out.strip().splitlines()[-1].split()[:4] == ["all", "1", "0.00", "1.00"]
    assert as_dataset("p.jsonl")["problem_id"][:] == ["sum"]
    for file, source in (("r.jsonl", "none.jsonl"), ("none.jsonl", "p.jsonl")):
        with pytest.raises(FileNotFoundError, match=r"none\.jsonl"):  # of which run_main makes a line
            grade.main(Path(file), source)


def test_a_card_says_what_was_measured(tmp_path):
    row = {"step": 30, "mode": "all", "knobs": "deployed", "lo": 0.1, "hi": 0.3, "n_samples": 64}
    said = [row | {"metric": m, "rate": r} for m, r in (("hack", 0.2), ("solve", 0.25))]
    (tmp_path / "evals.jsonl").write_text("".join(json.dumps(r) + "\n" for r in said))
    cfg = {"rl": {"steps": 30}, "model": {"model": "organism"}, "intervention": "erase", "seed": 7}
    page = export.card(tmp_path, {"config": cfg, "commit": "abc"}, "deployed")
    assert "| hack | 0.20 | 0.10 to 0.30 |" in page
    assert "| solve | 0.25 | 0.10 to 0.30 |" in page
    assert "Not to be used" in page
