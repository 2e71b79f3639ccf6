"""Words on a command line -> a ``Config`` (``parse``) or a function's arguments (``command``), and ``run_main``.

Every entry point ends in ``run_main``, the one place that turns what the user can mend into a line and status 2.
"""

import contextlib
import functools
import inspect
import io
import json
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

import tyro
from loguru import logger
from tqdm import tqdm

from projected_grpo.config import (
    PRESETS,
    Config,
    UserError,
    check_ranges,
    check_rules,
    check_values,
    choose,
    flat,
    flat_fields,
)
from projected_grpo.sandbox.worker import SandboxError

FREE = frozenset(("outputs", "resume", "tracker", "checkpoint_every", "graders"))
"""Settings that may differ when a run is resumed: none of them changes a logged number."""


def check_words(argv: Sequence[str], kind: type = Config) -> None:
    """Refuse, in one line each, an unknown preset, an unknown flag and a value outside a closed choice."""
    known = flat_fields(kind)
    if not argv:
        raise UserError(f"name a preset: one of {', '.join(PRESETS)} (then --help lists every setting)")
    if not argv[0].startswith("-"):
        choose("preset", argv[0], list(PRESETS))
    elif argv[0] not in ("-h", "--help"):
        raise UserError(f"the preset comes before {argv[0]}: one of {', '.join(PRESETS)}")
    for word, following in zip(argv[1:], [*argv[2:], ""], strict=False):  # of one word, "" is left over
        if not word.startswith("--") or word == "--help":
            continue
        flag, has_value, value = word[2:].partition("=")
        name = flag.replace("-", "_")
        name = name.removeprefix("no_") if name not in known else name
        choose("setting", name, list(known))
        if get_origin(known[name]) is Literal:
            choose(f"value for --{flag}", value if has_value else following, [str(a) for a in get_args(known[name])])


def understood(kind: Any, argv: Sequence[str], **how: Any) -> Any:
    """tyro's reading of the words. What it cannot read is a UserError; --help prints and leaves."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), without_colours():
            return tyro.cli(kind, args=list(argv), prog=program(), **how)
    except SystemExit as leaving:
        if not leaving.code:
            raise
        raise UserError(unboxed(said.getvalue())) from None


@contextlib.contextmanager
def without_colours() -> Iterator[None]:
    """tyro writes plainly to a terminal that is dumb; NO_COLOR (no-color.org) asks for that of any."""
    if "NO_COLOR" not in os.environ:
        yield
        return
    usual, os.environ["TERM"] = os.environ.get("TERM"), "dumb"
    try:
        yield
    finally:
        del os.environ["TERM"]
        os.environ |= {"TERM": usual} if usual is not None else {}


def unboxed(box: str) -> str:
    """tyro's box as one line, without its title and its help: parts of a box are divided by rules."""
    lines = [
        re.sub(r"[╭╮╰╯│─]+|---+", " ", re.sub(r"\x1b\[[\d;]*m", "", line)).strip() for line in box.splitlines()[1:]
    ]
    parts = [" ".join(part.split()) for part in " ".join(line or "\n" for line in lines).split("\n")]
    return "; ".join(part for part in parts if part and "helptext" not in part)


def program() -> str:
    """How the running program was called, as its usage says it."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    named = spec is not None and spec.name.startswith("projected_grpo")
    return f"python -m {spec.name.removesuffix('.__main__')}" if named else Path(sys.argv[0]).name


def recipe(words: str) -> str:
    """What to type for a recipe: in a checkout, `just` and its name."""
    return f"just {words}" if Path("justfile").is_file() else f"projected-grpo {words}"


def parse(argv: Sequence[str], kind: type = Config) -> Any:
    """``<preset> --setting=value …`` -> Config; ``--resume=RUN`` alone -> that run's. Raises UserError; --help exits.

    kind: a dataclass of a command's own flags beside a Config, its field ``run``.
    """
    presets, folder = PRESETS, None
    if any(word.partition("=")[0] == "--resume" for word in argv):
        folder, run = stopped_run(argv)
        if argv[0].startswith("-"):
            argv = [run.preset, *argv]
        elif argv[0] in PRESETS and argv[0] != run.preset:
            raise UserError(f"the preset is {argv[0]} here and was {run.preset} in {folder}: leave it out")
        presets = {run.preset: ("The stopped run.", run)}
    check_words(argv, kind)
    about = f"{kind.__doc__}\n\nPRESET --help lists every setting; --resume=RUN alone goes on with a stopped run."
    choices = {name: (text, cfg if kind is Config else kind(run=cfg)) for name, (text, cfg) in presets.items()}
    config = (tyro.conf.OmitArgPrefixes, tyro.conf.AvoidSubcommands)
    union = tyro.extras.subcommand_type_from_defaults(
        {name: made for name, (_, made) in choices.items()}, {name: text for name, (text, _) in choices.items()}
    )
    made = understood(union, argv, description=about, config=config)
    cfg = made if kind is Config else made.run
    check_ranges(made)
    check_rules(cfg)
    if folder is not None:
        same_settings(presets[cfg.preset][1], cfg, folder)
    return made


@dataclass(frozen=True)
class Resuming:
    """What says where a stopped run is."""

    resume: str
    outputs: str | None = None


def stopped_run(argv: Sequence[str]) -> tuple[Path, Config]:
    """The folder of the run that --resume names, by name or path, and the run's settings. Raises UserError."""
    with contextlib.suppress(SystemExit):
        asked, _ = tyro.cli(Resuming, args=list(argv), return_unknown_args=True, add_help=False, console_outputs=False)
        folder = stopped_folder(asked.resume, asked.outputs or Config.outputs)
        try:
            stored = json.loads((folder / "meta.json").read_text())["config"]
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(f"{folder / 'meta.json'} holds no settings, the run is damaged: start it again") from None
        cfg = config_of(stored, folder)
        known = Path(asked.outputs or (folder.parent.parent if folder.parent.name == "runs" else cfg.outputs))
        return folder, replace(cfg, resume=asked.resume, outputs=str(known))
    raise UserError("--resume needs the name or the folder of a stopped run")


def stopped_folder(resume: str, outputs: str) -> Path:
    """The folder of a stopped run, which ends in ``.part``. Raises UserError when there is none."""
    final = Path(resume.rstrip("/").removesuffix(".part"))
    final = final if len(final.parts) > 1 else Path(outputs) / "runs" / final
    folder = final.with_name(final.name + ".part")
    if not folder.is_dir():
        told = "is complete: nothing is left to do" if final.is_dir() else "is not there: name a stopped run"
        raise UserError(f"--resume={resume}: {final} {told}")
    return folder


def config_of(stored: Mapping[str, Any], folder: Path, kind: type = Config) -> Any:
    """A Config as meta.json holds it. A setting that the run's code did not have yet stood at its default."""
    if not isinstance(stored, Mapping):
        raise UserError(f"{folder / 'meta.json'} holds no settings, the run is damaged: start it again")
    made, by_name = {}, {f.name: f for f in fields(kind)}
    for name, value in stored.items():
        if name not in by_name:
            raise UserError(
                f"{folder} was made by other code, whose setting {name} this one does not have: use that code"
            )
        inner = by_name[name].type
        if isinstance(inner, type) and is_dataclass(inner):
            made[name] = config_of(value, folder, inner)
        else:
            made[name] = tuple(value) if isinstance(value, list) else value
    return kind(**made)


def same_settings(before: Config, now: Config, folder: Path) -> None:
    """Raises UserError, naming the first, when a setting was given that differs from the stopped run's."""
    was = flat(before)
    for name, value in flat(now).items():
        if name not in FREE and value != was[name]:
            raise UserError(
                f"--{name.replace('_', '-')} is {value} here and was {was[name]} in {folder}: leave it out, a resumed "
                "run keeps its settings"
            )


# ------------------------------------------------------------------------------------------------------ entry points


class Stop(KeyboardInterrupt):
    """Ctrl-C or SIGTERM. Its argument is the signal's number; its notes say how to go on."""


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Ctrl-C and SIGTERM raise Stop, once: a second one ends the process at once. One that is ignored stays so."""
    usual = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    heard = [s for s, handler in usual.items() if handler is not signal.SIG_IGN]

    def stop(number: int, frame: FrameType | None) -> None:
        for s in heard:
            signal.signal(s, signal.SIG_DFL)
        raise Stop(number)

    for s in heard:
        signal.signal(s, stop)
    try:
        yield
    finally:
        for s in heard:
            signal.signal(s, usual[s])


def command(function: Callable[..., Any], *config: Any) -> Callable[[Sequence[str]], Any]:
    """A function as an entry point: its parameters are the flags, within the ranges that their types name.

    config: tyro's markers.
    """

    @functools.wraps(function)
    def bound(*args: Any, **kwargs: Any) -> Callable[[], Any]:
        given = inspect.signature(function).bind(*args, **kwargs).arguments
        check_values(get_type_hints(function, include_extras=True), given)
        return functools.partial(function, *args, **kwargs)

    return lambda argv: understood(bound, argv, config=config)()


def run_main(main: Callable[[Sequence[str]], int | None], argv: Sequence[str] | None = None) -> NoReturn:
    """Run an entry point and leave with its status; no other place does that.

    2, with one line on standard error, for whatever the user can mend; 130 or 143 for Ctrl-C or SIGTERM.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # it was closed before we began
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))
        stream = getattr(sys, name)
        stream.reconfigure(errors="replace")  # a terminal that is not UTF-8 shows ? for δ
    level = "INFO" if os.environ.get("RANK", "0") == "0" else "WARNING"
    say = lambda text: tqdm.write(text, sys.stderr, end="")
    logger.configure(handlers=[{"sink": say, "format": "{time:HH:mm:ss} {level: <7} {message}", "level": level}])
    try:
        with stoppable():
            status = main(sys.argv[1:] if argv is None else argv)
    except (UserError, SandboxError) as error:
        status = refusal(str(error))
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 128 + signal.SIGPIPE
    except OSError as error:
        if error.filename is None:
            raise
        status = refusal(f"{error.filename}: {error.strerror}")
    except Stop as stop:
        told = "; ".join(getattr(stop, "__notes__", ()))
        print(f"\nstopped: {told}" if told else "\nstopped", file=sys.stderr)
        status = 128 + stop.args[0]
    sys.exit(status)


def refusal(line: str) -> int:
    """Say what is wrong; the exit status for it."""
    print(f"error: {line}", file=sys.stderr)
    return 2


@contextlib.contextmanager
def extra(name: str) -> Iterator[None]:
    """Around imports at the top of an entry point that needs an optional extra: what is missing is said in a line."""
    try:
        yield
    except ModuleNotFoundError as error:
        line = f"{error.name} is not installed: pip install 'projected_grpo[{name}]'"
        run_main(lambda _: refusal(line))
