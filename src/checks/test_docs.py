"""What the docs say of the code and of the results holds."""

import importlib
import re
from pathlib import Path

import projected_grpo
from projected_grpo.studies import tables


def test_this_repositorys_page_and_quotes_are_up_to_date():
    root = Path(__file__).parents[2]
    assert tables.problems(root / "docs", root / "README.md") == []


def test_every_name_in_the_method_page_exists():
    page = (Path(__file__).parents[2] / "docs" / "method.md").read_text()
    modules = {p.stem for p in Path(projected_grpo.__file__).parent.glob("*.py")}
    named = {n for n in re.findall(r"`([a-z_]+\.[A-Za-z_.]+)`", page) if n.split(".")[0] in modules}
    assert len(named) > 30
    for name in named:
        module, *path = name.split(".")
        at = importlib.import_module(f"projected_grpo.{module}")
        for part in path:
            at = getattr(at, part)
    bare = set(re.findall(r"`([a-z_]+)`", page))
    assert bare & modules, "some modules are named alone"
