"""Rollouts -> what the report's browser reads: columns with their repeated strings written once, gzipped."""

import base64
import gzip
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl

from projected_grpo import loopholes
from projected_grpo.data_types import Wording

CODED = ("source", "mode", "problem", "completion", "label", "status", "detail")
PLAIN = ("run", "step", "row", "task")
NUMBERS = ("reward", "A", "kept", "score", "score_random")
FLAGS = (
    "compiles", "format_ok", "gt_correct", "channel", "attempted", "type_mismatch", "vacuous_tests",
    "rejects_canonical", "flagged",
)  # fmt: skip
DIGITS = 3


@dataclass(frozen=True)
class RunRollouts:
    """Rollouts of a run as ``rollout_table.read`` gives them, and of how many they were sampled."""

    run: str
    arm: str
    seed: int
    rows: pl.DataFrame
    total: int


def exploit_pattern(mode: str, wording: Wording) -> str | None:
    """A regular expression, for Python (re.M) and JavaScript (gm) alike, of the lines that make up the exploit.

    A loophole's signature where it has one; of a test function that the model writes itself, the whole function.
    """
    row = loopholes.LOOPHOLES[mode]
    words = {"name": re.escape(wording.name), "text": re.escape(wording.text)}
    if row.signature is not None:
        return row.signature.format(**words)
    return rf"^def {words['name']}\b.*(?:\n[ \t]+.*)*" if wording.name else None


def task_rows(keys: Iterable[tuple[str, str, str]]) -> list[dict[str, Any]]:
    """What there is to say of each (mode, wording): the prompt's hint and the exploit's pattern."""
    out = []
    for mode, name, text in keys:
        known = mode in loopholes.LOOPHOLES
        hint = loopholes.LOOPHOLES[mode].hint.format(name=name, text=text) if known else None
        out.append({"hint": hint, "exploit": exploit_pattern(mode, Wording(name, text)) if known else None})
    return out


def coded(values: pl.Series) -> dict[str, Any]:
    """Each value once, and its number row by row; −1 for null."""
    unique = values.drop_nulls().unique(maintain_order=True)
    number = pl.DataFrame({"v": unique, "n": pl.int_range(len(unique), eager=True, dtype=pl.Int32)})
    codes = values.to_frame("v").join(number, on="v", how="left", maintain_order="left")["n"].fill_null(-1)
    return {"values": unique.to_list(), "codes": codes.to_list()}


def columns(parts: Sequence[RunRollouts], statements: Mapping[str, str]) -> dict[str, Any]:
    """The browser's data. statements: problem id -> its statement, with the sentence that a hint replaces."""
    table = pl.concat([p.rows.with_columns(run=pl.lit(i, dtype=pl.Int32)) for i, p in enumerate(parts)])
    keys = table.select("mode", "name", "text").fill_null("").unique(maintain_order=True)
    numbered = keys.with_columns(task=pl.int_range(pl.len(), dtype=pl.Int32))
    table = table.with_columns(pl.col("mode", "name", "text").fill_null("")).join(
        numbered, on=["mode", "name", "text"], how="left", maintain_order="left"
    )
    problems = coded(table["problem"])
    return {
        "n": len(table),
        "total": sum(p.total for p in parts),
        "runs": [{"run": p.run, "arm": p.arm, "seed": p.seed, "total": p.total} for p in parts],
        "tasks": task_rows(keys.rows()),
        "sentence": loopholes.TESTS_SENTENCE,
        "statements": [statements.get(p) for p in problems["values"]],
        "coded": {name: coded(table[name]) for name in CODED},
        "plain": {name: table[name].to_list() for name in PLAIN},
        "numbers": {name: table[name].cast(pl.Float64).round(DIGITS).to_list() for name in NUMBERS},
        "flags": {name: table[name].cast(pl.Int8).to_list() for name in FLAGS},
        "by_layer": [
            None if v is None else [round(x, DIGITS) for x in v] for v in table["by_layer"].cast(pl.List(pl.Float64))
        ],
    }


def packed(data: Mapping[str, Any]) -> str:
    """JSON, gzipped, in base64."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return base64.b64encode(gzip.compress(text.encode(), compresslevel=6, mtime=0)).decode()
