"""The one reader of a run's rollouts: rollouts.parquet, or the rollouts.jsonl of older runs -> flat columns."""

from pathlib import Path

import polars as pl

from projected_grpo.config import UserError

I, F, S, B = pl.Int32, pl.Float32, pl.String, pl.Boolean
FIELDS: dict[str, tuple[tuple[str, ...], pl.DataType | type[pl.DataType]]] = {
    "step": (("step",), I),
    "source": (("source",), S),
    "mode": (("env_mode",), S),
    "problem": (("problem_id",), S),
    "name": (("wording", "name"), S),
    "text": (("wording", "text"), S),
    "completion": (("completion",), S),
    "label": (("grade", "label"), S),
    "status": (("grade", "status"), S),
    "detail": (("grade", "detail"), S),
    "reward": (("grade", "reward"), F),
    "compiles": (("grade", "compiles"), B),
    "format_ok": (("grade", "format_ok"), B),
    "gt_correct": (("grade", "gt_correct"), B),
    "channel": (("grade", "channel"), B),
    "attempted": (("grade", "attempted"), B),
    "type_mismatch": (("grade", "type_mismatch"), B),
    "vacuous_tests": (("grade", "vacuous_tests"), B),
    "rejects_canonical": (("grade", "rejects_canonical"), B),
    "A": (("A",), F),
    "kept": (("kept",), F),
    "score": (("score",), F),
    "score_random": (("score_random",), F),
    "by_layer": (("score_by_layer",), pl.List(F)),
    "flagged": (("flagged",), B),
}
"""Column -> where it stands in a written rollout, and its type. What a run lacks is null."""
NEEDED = ("step", "mode", "completion", "label")


def column(schema: pl.Schema, path: tuple[str, ...], dtype: pl.DataType | type[pl.DataType]) -> pl.Expr:
    """The value at a path, or null where the file has no such field."""
    inner, expr = schema.get(path[0]), pl.col(path[0])
    for name in path[1:]:
        fields = {f.name: f.dtype for f in inner.fields} if isinstance(inner, pl.Struct) else {}
        inner, expr = fields.get(name), expr.struct.field(name)
    return pl.lit(None, dtype=dtype) if inner is None or inner == pl.Null else expr.cast(dtype)


def read(folder: Path) -> pl.DataFrame:
    """All rollouts of a run, in the order written, as ``FIELDS`` and ``row`` (the number within its step).

    Raises UserError when there are none, or when the file is half written or of a version that lacks what is NEEDED.
    """
    parquet, lines = folder / "rollouts.parquet", folder / "rollouts.jsonl"
    try:
        found = pl.read_parquet(parquet) if parquet.exists() else pl.read_ndjson(lines, infer_schema_length=None)
        columns = {name: column(found.schema, *where) for name, where in FIELDS.items()}
        table = found.select(**columns)
    except (OSError, pl.exceptions.PolarsError) as error:
        reason = "no rollouts file" if isinstance(error, FileNotFoundError) else "rollouts cannot be read"
        raise UserError(f"{folder.name}: {reason}") from None
    for name in NEEDED:
        if table[name].null_count() == len(table):
            raise UserError(f"{folder.name}: its rollouts lack {'.'.join(FIELDS[name][0])}")
    return table.with_columns(row=pl.int_range(pl.len(), dtype=I).over("step"))


def sample(table: pl.DataFrame, most: int, by: tuple[str, ...] = ("label", "mode", "step")) -> pl.DataFrame:
    """At most ``most`` rows, in order, as evenly over the strata as they allow: a row of each, then a second, …

    Which rows of a stratum are taken is random with a fixed seed.
    """
    if len(table) <= most:
        return table
    shuffled = table.with_row_index("_at").sample(fraction=1, shuffle=True, seed=0)
    ranked = shuffled.with_columns(_rank=pl.int_range(pl.len()).over(by))
    return ranked.sort("_rank", maintain_order=True).head(most).sort("_at").drop("_at", "_rank")
