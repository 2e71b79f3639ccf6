"""``just report [RUN | STUDY | RUN RUN …]``: one HTML file to look at, mail, or keep.

python -m projected_grpo.report [NAMES ...] [--outputs=outputs] [--rollouts=24000]     without a name: the newest run
"""

import re
import sys
import time
from pathlib import Path

import tyro

from projected_grpo import report_data, report_html, report_page
from projected_grpo.config import UserError


def make(names: tuple[str, ...], outputs: Path, store: Path, rollouts: int, to: Path | None = None) -> Path:
    """Write the report; its file. Raises UserError when there is nothing to report."""
    m = report_data.material(names, outputs / "runs", store, rollouts)
    stem = re.sub(r"[^\w.+-]+", "-", m.analysis.summary.name)
    path = to or outputs / "reports" / f"{stem}.html"
    report_html.write(report_page.page(m, " ".join(("just report", *names))), path)
    for name, why in m.left_out.items():
        if why != "not run":
            print(f"left out: {name}: {why}")
    return path


def main(
    names: tyro.conf.Positional[tuple[str, ...]] = (),
    outputs: str = "outputs",
    store: str = "docs/results",
    rollouts: int = report_data.MOST,
    to: str | None = None,
) -> None:
    """Write outputs/reports/NAME.html. rollouts: how many a report of several runs holds; one run's holds all."""
    start = time.perf_counter()
    path = make(names, Path(outputs), Path(store), rollouts, Path(to) if to else None)
    print(f"{path}  {path.stat().st_size / 1e6:.1f} MB in {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    try:
        tyro.cli(main)
    except UserError as error:
        sys.exit(f"error: {error}")
