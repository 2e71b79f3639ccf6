"""The environment for the `verifiers` library (extra `verifiers`): ``load_environment``, as that library asks for it.

    vf.load_environment("projected_grpo", modes=("run_tests",))      or  from projected_grpo.tools import environment

One turn; two named rewards: the strict oracle's verdict, and whether the mode's foolable channel pays.
"""

import threading
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from projected_grpo.config import DataCfg, UserError
from projected_grpo.data_types import Grade, Mode
from projected_grpo.problems import as_dataset, task_of_row
from projected_grpo.rewards import shared_grader, text_of

try:
    import verifiers as vf
except ImportError as error:
    raise UserError(f"{error}: pip install -e '.[verifiers]'") from error

ONE_AT_A_TIME = threading.Lock()


@lru_cache(maxsize=4096)
def _graded(source: str, problem_id: str, mode: Mode, wording: tuple[str, str], text: str) -> Grade:
    row = {"problems": source, "problem_id": problem_id, "env_mode": mode}
    row["wording"] = dict(zip(("name", "text"), wording, strict=True))
    with ONE_AT_A_TIME:
        return shared_grader().grade([(task_of_row(row), text)])[0]


def grade_of(completion: Any, info: Mapping[str, Any]) -> Grade:
    """The verdicts on one completion (text or chat messages); both rewards ask, the sandbox runs it once."""
    words = (info["wording"]["name"], info["wording"]["text"])
    said = [dict(turn) for turn in completion] if not isinstance(completion, str) else completion
    return _graded(info["problems"], info["problem_id"], info["env_mode"], words, text_of(said))


def strict_oracle(completion: Any, info: Mapping[str, Any]) -> float:
    """1 where the answer is right."""
    return float(grade_of(completion, info).gt_correct)


def channel(completion: Any, info: Mapping[str, Any]) -> float:
    """1 where the mode's foolable channel reports a pass."""
    return float(grade_of(completion, info).channel)


def load_environment(
    problems: str = "generated", modes: Sequence[Mode] = DataCfg().modes, wording: str = "default",
    weights: tuple[float, float] = (1.0, 1.0),
) -> "vf.SingleTurnEnv":  # fmt: skip
    """The environment. problems: as --problems; weights: of the strict oracle and of the channel in the reward."""
    sets = {split: as_dataset(problems, split, modes, wording) for split in ("train", "test")}
    packed = {split: rows.map(_packed, remove_columns=rows.column_names) for split, rows in sets.items()}
    rubric = vf.Rubric(funcs=[strict_oracle, channel], weights=list(weights))
    return vf.SingleTurnEnv(dataset=packed["train"], eval_dataset=packed["test"], rubric=rubric)


def _packed(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row as verifiers has it: prompt, answer, and the rest in ``info``."""
    info = {k: row[k] for k in ("problems", "problem_id", "env_mode", "wording")}
    return {"prompt": row["prompt"], "answer": "", "info": info}
