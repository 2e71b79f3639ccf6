"""A table as data, and as Markdown or a terminal shows it.

It stays (title, heads, rows, note) until the last moment; the report's page.html makes HTML of it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tabulate import tabulate

NOTHING = "–"


@dataclass(frozen=True)
class Table:
    """What a table says. A cell is anything with a ``str``; None is nothing to tell."""

    title: str
    heads: tuple[str, ...]
    rows: tuple[tuple[object, ...], ...]
    note: str = ""

    @property
    def cells(self) -> list[list[str]]:
        """The rows as they are printed."""
        return [
            [NOTHING if c is None else f"{c:.2f}" if isinstance(c, float) else str(c) for c in r] for r in self.rows
        ]


def made(title: str, heads: Sequence[str], rows: Iterable[Sequence[object]], note: str = "") -> Table | None:
    """The table without the columns in which no row has anything; None without rows."""
    found = [tuple(row) for row in rows]
    kept = [i for i in range(len(heads)) if any(row[i] is not None for row in found)]
    if not found:
        return None
    return Table(title, tuple(heads[i] for i in kept), tuple(tuple(r[i] for i in kept) for r in found), note)


def grid(table: Table) -> str:
    """A Markdown table that reads well raw too, without its title."""
    cells = [[c.replace("|", "\\|") for c in row] for row in table.cells]
    return tabulate(cells, headers=table.heads, tablefmt="pipe", disable_numparse=True)


def markdown(table: Table) -> str:
    """The table under its title, its note below."""
    return "\n\n".join(part for part in (f"### {table.title}", grid(table), table.note) if part)


def terminal(table: Table) -> str:
    """The table as a terminal shows it, numbers to the right; its title is not printed."""
    columns = list(zip(*table.rows, strict=True)) or [()] * len(table.heads)
    align = ["right" if all(c is None or isinstance(c, int | float) for c in column) else "left" for column in columns]
    text = tabulate(table.cells, headers=table.heads, disable_numparse=True, colalign=align if table.rows else None)
    return "\n\n".join(part for part in (text, table.note) if part)
