"""What the docs say of the code and of the results holds."""

import importlib
import re
from pathlib import Path

import pytest
from PIL import Image

import projected_grpo
from projected_grpo.report import figures
from projected_grpo.studies import results_docs

ROOT = Path(__file__).parents[2]


def test_tables_are_as_the_summaries_have_them():
    assert results_docs.stale(ROOT) == []


@pytest.mark.parametrize("page", ["docs/findings.md", "docs/evidence.md"])
def test_no_number_of_a_run_stands_in_the_prose_of_the_findings(page):
    prose = " ".join(results_docs.MARKED.sub("", (ROOT / page).read_text()).split())
    assert re.findall(r"\S*(?<!\w)[01]?\.\d\d\S*", prose) == []
    assert "<!-- results" not in prose


def test_figures_in_git_are_those_that_a_page_shows_and_docs_are_small():
    kept = {p.name for p in (ROOT / "docs" / "figures").glob("*")}  # no folder where no page shows one
    assert kept == figures.cited(ROOT)
    for name in kept:
        assert Image.open(ROOT / "docs" / "figures" / name).mode == "P", f"{name}: `just figures` writes 64 colours"
    assert sum(p.stat().st_size for p in (ROOT / "docs").rglob("*") if p.is_file()) < 3e6


def test_every_name_in_the_method_page_exists():
    page = (ROOT / "docs" / "method.md").read_text()
    modules = {p.stem for p in Path(projected_grpo.__file__).parent.glob("*.py")}
    named = {n for n in re.findall(r"`([a-z_]+\.[A-Za-z_.]+)`", page) if n.split(".")[0] in modules}
    assert len(named) > 30
    for name in named:
        module, *path = name.split(".")
        at = importlib.import_module(f"projected_grpo.{module}")
        for part in path:
            at = getattr(at, part)
