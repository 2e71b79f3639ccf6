"""All finished runs -> one table.

just results [--outputs=outputs] [--where "arm = 'erase' and hack_s < 0.2"] [--sort deploy_hack]
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import polars as pl
from loguru import logger

from projected_grpo.command_line import command, run_main
from projected_grpo.config import UserError
from projected_grpo.rollout import HEADLINE, LAST
from projected_grpo.runs import json_lines
from projected_grpo.studies.analysis import HONEST
from projected_grpo.studies.layout import Table, terminal

WORLD, AFTER = ("model", "data", "rl", "eval"), ("relearn_steps", "scales", "eval_every")
"""Groups of settings that change what there is to gain, and those in them that only say what is done afterwards."""


def world(cfg: Mapping[str, Any]) -> str:
    """Preset, seed, the teacher's share and what of the settings an honest run has to share."""
    groups = [{k: v for k, v in (cfg.get(group) or {}).items() if k not in AFTER} for group in WORLD]
    modes = [group.pop(k, None) for group in groups for k in ("eval_modes", "modes")]
    groups.append({"evaluated": next(filter(None, modes), None)})
    return json.dumps([cfg["preset"], cfg["seed"], cfg["pool"]["mix_ratio"], *groups], sort_keys=True)


def run_summary(folder: Path) -> dict[str, Any] | None:
    """One finished run as a flat row: what it was, means of its last 5 steps, and its last deploy evaluation.

    None, with a warning, when the folder does not hold a complete run.
    """
    try:
        meta = json.loads((folder / "meta.json").read_text())
        steps, evals = json_lines(folder / "steps.jsonl"), json_lines(folder / "evals.jsonl")
        cfg, last = meta["config"], pl.DataFrame(steps[-LAST:], infer_schema_length=None)
        pooled = [row for row in evals if row["mode"] == "all"]
        end = [row for row in pooled if row["step"] == max(r["step"] for r in evals)]
        base = [row["rate"] for row in pooled if row["step"] == 0 and row["metric"] == "solve"]
        deployed = {row["metric"]: row for row in end if row["knobs"] == "deployed"}
        kept = {row["metric"]: row["rate"] for row in end if row["knobs"] == "trained"}
        return {
            "preset": cfg["preset"],
            "arm": cfg["intervention"],
            "seed": cfg["seed"],
            "steps": len(steps),
            "mix": cfg["pool"]["mix_ratio"],
            **{name: last[name].mean() for name in HEADLINE},
            **{f"deploy_{m}": r["rate"] for m, r in deployed.items()},
            "hack_lo": deployed["hack"]["lo"],
            "hack_hi": deployed["hack"]["hi"],
            "base_solve": base[0] if base else None,
            "solve_lo": deployed["solve"]["lo"],
            "kept_hack": kept.get("hack"),
            "minutes": sum(s["sec_gen"] + s["sec_grade"] + s["sec_train"] for s in steps) / 60,
            "run": folder.name,
            "world": world(cfg),
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, pl.exceptions.PolarsError) as error:
        logger.warning("{} left out: {}: {}", folder.name, type(error).__name__, error)
        return None


def with_gain_kept(table: pl.DataFrame) -> pl.DataFrame:
    """gain_kept of each run that has an honest one beside it: (solve − its base's) / (honest's solve − its base's).

    None also where the low end of honest's interval, clustered by problem, is not over the base's solve.
    """
    gain = pl.col("deploy_solve") - pl.col("base_solve")
    shown = table.filter((pl.col("arm") == HONEST) & (pl.col("solve_lo") > pl.col("base_solve")))
    honest = shown.unique("world", keep="last", maintain_order=True).select("world", whole=gain)
    return (
        table.join(honest, on="world", how="left", maintain_order="left")
        .with_columns(gain_kept=gain / pl.col("whole"))
        .drop("whole", "world")
    )


def collect(outputs: Path) -> pl.DataFrame:
    """All complete runs below outputs/runs, a row each. Raises UserError when there are none."""
    folders = sorted(p for p in (outputs / "runs").glob("*") if p.is_dir() and p.suffix != ".part")
    rows = [row for row in map(run_summary, folders) if row is not None]
    if not rows:
        raise UserError(f"no finished run in {outputs / 'runs'}: `just smoke` makes one")
    table = pl.DataFrame(rows, infer_schema_length=None)
    return with_gain_kept(table).sort("preset", "mix", "steps", "arm", "seed")


SHOWN = {
    "preset": "preset", "arm": "arm", "seed": "seed", "steps": "steps", "mix": "teacher",
    "hack_s": "hack ↓", "attempt_s": "att ↓", "solve_s": "solve ↑", "cin": "cin", "cin_null": "null",
    "deploy_hack": "dep hack ↓", "hack_lo": "lo ↓", "hack_hi": "hi ↓", "kept_hack": "kept hack ↓",
    "deploy_attempt": "dep att ↓", "deploy_solve": "dep solve ↑",
    "gain_kept": "gain kept ↑", "minutes": "min", "run": "run",
}  # fmt: skip
"""Column -> its head in the printed table."""


def chosen(table: pl.DataFrame, where: str, sort: str) -> pl.DataFrame:
    """The rows for which a SQL condition holds, sorted by a SQL expression; " desc" after it turns the order round.

    Raises UserError, naming the columns, for an expression that polars does not take, or that is no condition.
    """
    column, _, order = sort.strip().rpartition(" ")
    key, descending = (column, order.lower() == "desc") if order.lower() in ("asc", "desc") else (sort.strip(), False)
    try:
        if where:
            table = table.filter(pl.sql_expr(where))
        if key:
            table = table.sort(pl.sql_expr(key), descending=descending, nulls_last=True, maintain_order=True)
    except pl.exceptions.PolarsError as error:
        first = str(error).splitlines()[0]
        raise UserError(f"{first}; --where and --sort take SQL over {', '.join(table.columns)}") from None
    return table


def main(outputs: str = "outputs", where: str = "", sort: str = "") -> None:
    """Print one table over all finished runs; training columns are means of the last 5 steps.

    where: a SQL condition over the columns that `--where=x` lists; sort: a SQL expression, " desc" to turn it round.
    """
    table = chosen(collect(Path(outputs)), where, sort)
    note = (
        f"{len(table)} runs. Shares, 0 to 1; min: minutes. Training: student rollouts, mean of the last {LAST} steps.\n"
        "dep: held-out problems, quarantine ablated, [lo, hi] 95 % clustered by problem; kept hack: quarantine kept.\n"
        "gain kept: of what the honest run of the same preset, seed and settings gains over the base.\n"
        "teacher: share of a group; cin: hack-ward share of the gradient; null: cin of a random V."
    )
    print(terminal(Table("Runs", tuple(SHOWN.values()), tuple(table.select(list(SHOWN)).rows()), note)))


if __name__ == "__main__":
    run_main(command(main))
