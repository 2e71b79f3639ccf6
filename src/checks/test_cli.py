"""The command line: presets, overrides, and one clear line for whatever the user can mend."""

import ast
import functools
import importlib.util
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
import typing
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from projected_grpo import memory, prepare, problems, rewards
from projected_grpo.bench import grading, threads
from projected_grpo.command_line import command, parse, run_main, without_colours
from projected_grpo.config import PRESETS, In, UserError, check_ranges, check_rules, flat_fields, ranges
from projected_grpo.rewards import EXAMPLES
from projected_grpo.sandbox.worker import SandboxError
from projected_grpo.studies import results, run, watch
from projected_grpo.tools import build_pool, cli, grade
from projected_grpo.train import main

SMALL = ["--steps=2", "--prompts-per-step=2", "--group=2", "--n-eval=1", "--eval-samples=1", "--graders=1"]


def test_a_preset_alone_is_a_command():
    assert parse(["organism"]) == PRESETS["organism"][1]


def test_every_setting_is_one_flat_flag():
    groups = asdict(PRESETS["organism"][1])
    names = [n for k, v in groups.items() for n in (v if isinstance(v, dict) else [k])]
    assert len(names) == len(set(names)) == len(flat_fields())


def test_overrides_reach_their_group():
    cfg = parse(["organism", "--intervention=route", "--lr=1e-4", "--k", "3", "--modes", "sentinel", "run_tests"])
    assert (cfg.intervention, cfg.rl.lr, cfg.vhack.k, cfg.data.modes) == ("route", 1e-4, 3, ("sentinel", "run_tests"))
    assert cfg.preset == "organism"


def refused(main, argv, capsys) -> str:
    """The last line on standard error of an entry point that refuses its words."""
    with pytest.raises(SystemExit) as stop:
        run_main(main, argv)
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert said.splitlines()[-1].startswith("error: ")
    return said.splitlines()[-1]


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([], "name a preset"),
        (["organsm"], "did you mean 'organism'"),
        (["organism", "--lrr=1"], "did you mean 'lr'"),
        (["organism", "--gate=onesided"], "did you mean 'one_sided'"),
        (["organism", "--intervention=eraze"], "did you mean 'erase'"),
        (["organism", "--pairs=nope"], "unknown pair set"),
        (["organism", "--mix-ratio=0.5"], "just build-pool"),
        (["organism", "--mix-ratio=0.5", "--pool=/nonexistent/pool"], "no teacher pool"),
        (["organism", "--mix-ratio=0.01", "--pool=x"], "is 0 rollouts"),
        (["organism", "--model=/nonexistent/model"], "config.json is missing"),
        (["organism", "--problems=/nonexistent.jsonl"], "no problem file"),
        (["organism", "--group=1"], "raise --group"),
        (["organism", "--max-prompt=3"], "raise --max-prompt"),
        (["organism", "--k=65"], "lower --k"),
        (["organism", "--modes=nomode"], "nomode"),
        (["organism", "--n-heldout=1000"], "1000 of them held out, are too few"),
        (["--stesp=1", "smoke"], "the preset comes before --stesp=1"),
        (["fast"], "--device=cpu"),
    ],
)
def test_bad_input_ends_in_one_line_and_leaves_no_run(argv, says, tmp_path, capsys):
    said = refused(main, [*argv, f"--outputs={tmp_path}"] if argv else argv, capsys)
    assert says in said
    assert not list(tmp_path.glob("runs/*"))


BAD = [
    ("--temperature=0", "--temperature is 0.0: it has to be over 0"),
    ("--temperature=-1", "over 0"),
    ("--top-p=0", "in (0, 1]"),
    ("--steps=-3", "at least 1"),
    ("--steps=0", "at least 1"),
    ("--clip=nan", "over 0"),
    ("--micro-batch=0", "at least 1"),
    ("--k=0", "at least 1"),
    ("--k=1.5", "--k"),
    ("--svd-rank=0", "at least 1"),
    ("--lr=-1", "over 0"),
    ("--lr=inf", "over 0"),
    ("--lr=fast", "--lr"),
    ("--max-new=0", "at least 1"),
    ("--n-eval=0", "at least 1"),
    ("--checkpoint-every=0", "at least 1"),
    ("--betas 0.9 1", "in [0, 1)"),
    ("--scales 0.5 nan", "a finite number"),
    ("--layers 0.6 0.4", "beginning"),
    ("--modes", "--modes is empty"),
    ("--eval-modes", "--eval-modes is empty"),
    ("--modes sentinel sentinel", "each once"),
    ("--name=a/b", "slash"),
    ("--outputs=", "--outputs is empty"),
    ("--seed=-1", "--seed"),
    ("--threads=-1", "at least 0"),
    ("--learning-rate=1", "did you mean 'lr'?"),
    ("--num-generations=4", "did you mean 'group'?"),
    ("stray", "stray"),
    ("--resume=none-such", "is not there"),
]


@pytest.mark.parametrize(("words", "says"), BAD)
def test_a_bad_setting_is_named_when_it_is_parsed(words, says):
    with pytest.raises(UserError, match=re.escape(says)) as error:
        parse(["organism", *words.split()])
    assert "\n" not in str(error.value)


def test_every_number_has_a_range_and_every_preset_lies_in_its_own():
    number = lambda kind: kind in (int, float) or any(number(a) for a in typing.get_args(kind))
    bare = [n for n, kind in flat_fields().items() if number(kind) and None in ranges(kind)]
    assert not bare
    for _, cfg in PRESETS.values():
        check_ranges(cfg)
        check_rules(cfg)


@pytest.mark.parametrize("interval", ["[0, 1]", "(0, 1]", "[0, 1)", "(0, inf)", "(0, inf]", "(-inf, inf)"])
def test_intervals_hold_what_mathematics_says(interval):
    low, high = map(float, interval[1:-1].split(","))
    bound = In(interval)
    assert bound.holds(low) == (interval[0] == "[")
    assert bound.holds(high) == (interval[-1] == "]")
    assert bound.holds(0.5)
    assert not bound.holds(math.nan)


def test_a_commands_own_flags_stand_beside_the_settings(capsys):
    asked = parse(["smoke", "--first=3", "--steps=2"], build_pool.Asked)
    assert (asked.first, asked.run.rl.steps, asked.run.preset) == (3, 2, "smoke")
    assert "did you mean 'first'" in refused(build_pool.main, ["smoke", "--frist=3"], capsys)
    assert "at least 1" in refused(build_pool.main, ["smoke", "--first=0"], capsys)
    assert "over 0" in refused(memory.main, ["smoke", "--device-gb=-1"], capsys)
    assert "Perhaps you meant: --outputs" in refused(command(results.main), ["--output=x"], capsys)


@pytest.mark.parametrize(
    ("function", "words", "says"),
    [
        (run.main, ["headline", "--parallel=0"], "--parallel is 0: it has to be at least 1"),
        (run.main, ["headline", "--hours=nan"], "over 0"),
        (watch.main, ["--once", "--every=-1"], "--every is -1.0: it has to be over 0"),
        (watch.main, ["--once", "nosuch"], "unknown study 'nosuch'"),
        (grade.main, ["x.jsonl", "--workers=-1"], "at least 1"),
        (rewards.main, ["--workers=0"], "at least 1"),
        (threads.main, ["--rounds=0"], "at least 1"),
        (grading.main, ["--against=x"], "--against needs --problems"),
    ],
)
def test_a_commands_own_numbers_have_ranges_too(function, words, says, capsys):
    assert says in refused(command(function), words, capsys)


def test_what_goes_wrong_on_the_way_is_a_line_too(tmp_path, capsys):
    def fails(error):
        def main(argv):
            raise error

        return main

    assert "none-such" in refused(lambda _: (tmp_path / "none-such").read_text(), [], capsys)
    assert "two workers" in refused(fails(SandboxError("a job failed in two workers")), [], capsys)
    with pytest.raises(ZeroDivisionError):
        run_main(fails(ZeroDivisionError()), [])


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_entry_point_ends_with_a_line(number, status, capsys, request):
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    for s, handler in usual.items():  # a shell starts what it puts in the background with SIGINT ignored
        request.addfinalizer(functools.partial(signal.signal, s, signal.signal(s, handler)))

    def main(argv):
        try:
            os.kill(os.getpid(), number)
            time.sleep(5)
        finally:
            assert {signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)} == {signal.SIG_DFL}

    with pytest.raises(SystemExit) as stop:
        run_main(main, [])
    assert stop.value.code == status
    assert capsys.readouterr().err == "\nstopped\n"
    assert {s: signal.getsignal(s) for s in usual} == usual


def test_a_terminal_that_is_not_utf8_shows_what_it_can(monkeypatch):
    written = io.BytesIO()
    terminal = io.TextIOWrapper(written, "ascii", write_through=True)
    monkeypatch.setattr(sys, "stdout", terminal)
    with pytest.raises(SystemExit):
        run_main(lambda _: print("‖δS‖ 1"), [])
    monkeypatch.undo()
    assert written.getvalue() == b"??S? 1\n"


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_a_closed_stream_is_as_good_as_none(name, monkeypatch):
    monkeypatch.setattr(sys, name, None)
    with pytest.raises(SystemExit) as stop:
        run_main(lambda _: print(getattr(sys, name).isatty(), file=getattr(sys, name)), [])
    assert stop.value.code is None


def test_a_reader_that_has_seen_enough_ends_it_quietly(monkeypatch, capsys):
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        with pytest.raises(SystemExit) as stop:
            run_main(lambda _: print("x", flush=True), [])
        monkeypatch.undo()
    assert stop.value.code == 141
    assert capsys.readouterr().err == ""


def test_no_color_is_heeded(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    for asked in (True, False):
        monkeypatch.setenv("NO_COLOR", "1") if asked else monkeypatch.delenv("NO_COLOR")
        with without_colours():
            assert os.environ["TERM"] == ("dumb" if asked else "xterm")
        assert os.environ["TERM"] == "xterm"


@pytest.mark.parametrize(
    ("words", "idle", "size", "threads", "graders"),
    [
        ([], 4.0, 1e6, 2, 8),
        ([], 1.2, 1e6, 1, 2),
        ([], 1.2, 1e9, 1, 2),
        ([], 2.9, 1e9, 3, 6),
        ([], 0.1, 1e9, 1, 2),
        (["--threads=3"], 2.0, 1e9, 3, 4),
        (["--graders=1"], 2.0, 1e6, 2, 1),
    ],
)
def test_threads_and_graders_follow_the_model_and_what_is_idle(words, idle, size, threads, graders, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(prepare, "idle_cores", lambda: idle)
    monkeypatch.setattr(memory, "skeleton", lambda cfg: torch.nn.Linear(int(size), 1, bias=False, device="meta"))
    cfg = prepare.settled(parse(["smoke", *words]))
    assert (cfg.threads, cfg.graders) == (threads, graders)
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert prepare.settled(parse(["smoke"])).threads == torch.get_num_threads()


def test_idle_cores_are_counted():
    assert 0 <= prepare.idle_cores(0.05) <= os.cpu_count()


# --- the package ---------------------------------------------------------------------------------------------------


def test_every_data_file_is_named_for_the_wheel_and_every_command_is_a_module():
    root = Path(__file__).parents[2]
    made = tomllib.loads((root / "pyproject.toml").read_text())
    package = root / "src" / "projected_grpo"
    patterns = made["tool"]["setuptools"]["package-data"]["projected_grpo"]
    named = {path for pattern in patterns for path in package.glob(pattern)}
    there = {p for p in package.rglob("*") if p.is_file() and p.suffix not in (".py", ".pyc")}
    assert there - named == set()
    module, _, name = made["project"]["scripts"]["projected-grpo"].partition(":")
    assert callable(getattr(importlib.import_module(module), name))


def test_every_entry_point_is_a_command_whose_numbers_have_ranges():
    package, entries = Path(cli.__file__).parents[1], {}
    for path in package.rglob("*.py"):
        source = path.read_text()
        if "run_main(" in source.partition('\nif __name__ == "__main__":')[2]:
            name = ".".join(path.relative_to(package).with_suffix("").parts).removesuffix(".__main__")
            entries[name] = next(f for f in ast.parse(source).body if getattr(f, "name", None) == "main")
    assert entries.keys() == {module for module, _ in cli.COMMANDS.values()}
    given = {f"{name} {a.arg}": ast.unparse(a.annotation) for name, f in entries.items() for a in f.args.args}
    assert {flag: kind for flag, kind in given.items() if re.search(r"\b(int|float)\b", kind)} == {}


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
def test_the_console_script_names_its_commands_and_hands_over(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["projected-grpo"])
    assert cli.main(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(f"\n  {word} " in said for word in [*cli.COMMANDS, *PRESETS])
    assert max(map(len, said.splitlines())) <= 100
    assert "did you mean 'results'" in refused(cli.main, ["reslts"], capsys)
    assert "did you mean 'steps'" in refused(cli.main, ["smoke", "--stesp=1"], capsys)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "there is no problem in it"),
        (b"[\n{}\n]", ":1: a JSON list where an object should be"),
        (b"\n" + json.dumps({"id": "x"}).encode(), ":2: no 'cases'"),
        ('\n\n{"id": "é"}'.encode("latin-1"), ":3: 'utf-8' codec"),
        (2 * (json.dumps(asdict(EXAMPLES[0])) + "\n").encode(), ":2: a second problem of id sum"),
    ],
)
def test_a_problem_file_that_cannot_be_read_is_named_with_its_line(content, says, tmp_path):
    (tmp_path / "p.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=re.escape(f"p.jsonl{says}" if says[0] == ":" else says)) as error:
        problems.tasks_for(parse(["organism", f"--problems={tmp_path / 'p.jsonl'}"]))
    assert "\n" not in str(error.value)


def test_unwritable_outputs(tmp_path, capsys):
    blocked = tmp_path / "outputs"
    blocked.write_text("a file where a folder should be")
    assert "--outputs" in refused(main, ["smoke", f"--outputs={blocked}", *SMALL], capsys)


def test_user_errors_are_one_line():
    with pytest.raises(UserError) as error:
        parse(["organism", "--nosuchthing=1"])
    assert "\n" not in str(error.value)


PLANTED = """
import os, sys, torch
for on in "01":
    os.environ["BEARTYPE"] = on
    for name in [name for name in sys.modules if name.startswith("projected_grpo")]:
        del sys.modules[name]
    from projected_grpo.arms import advantages
    from projected_grpo.proj import split
    for planted in (lambda: split(torch.zeros(3), torch.zeros(1, 4)), lambda: advantages(torch.zeros(3))):
        try:
            planted()
        except Exception as error:
            print(on, type(error).__name__)
"""
"""Arguments of other shapes than their annotations say."""


def test_beartype_catches_a_planted_shape_error():
    """Refused under BEARTYPE=1 and not without, in one process, which imports torch once."""
    told = subprocess.run([sys.executable, "-c", PLANTED], capture_output=True, text=True, check=True).stdout
    assert "0 TypeCheckError" not in told
    assert told.splitlines().count("1 TypeCheckError") == 2
