"""What runs inside a forked child: load one submission, do one probe, leave tagged JSON behind.

Standard library only: the zygote loads this file by path, apart from the package. Nothing here knows an expected
answer, so a submission that patches, walks or forges any of it can only report values that it computed itself.

Tagged JSON, by exact type: None, bool, str and int (up to PLAIN_BITS) are themselves, a list is a list, and the
rest are one-key objects: {"i": hex(int)} up to MAX_BITS, {"f": float.hex()}, {"c": [real, imaginary]}, {"t": tuple
items}, {"s": set}, {"z": frozenset}, {"d": [[k, v]..]}, {"b": bytes as hex}, {"n": values of a linked list}, {"r":
values of a tree, level by level}, {"o": type name} for whatever else; "e" beside "o" says that the object equals a
fresh object that nothing should equal (only the probe "equal" asks).

Exact standard types (STANDARD) and members of plain IntEnum, IntFlag and StrEnum classes are read through the base
type's own methods, so overriding any of theirs changes nothing. A submission's own subclass stays foreign.
"""

import ast
import atexit
import builtins
import enum
import gc
import io
import json
import marshal
import os
import random
import sys
import types
from collections import Counter, OrderedDict, defaultdict, deque

RESULT_FD = 3
COMPILED = b"compiled\n"
MAX_RESULT = 4_000_000
MAX_NODES = 300_000
MAX_DEPTH = 200
PLAIN_BITS = 8192
MAX_BITS = 1 << 20
MAX_STDOUT = 65_536
RECURSION = 550_000


class TooLarge(Exception):
    """A value past MAX_NODES or MAX_DEPTH (one that contains itself, for one)."""


class Nothing:
    """An object that equals nothing but itself."""


def encode(value, ask_equal=False, nodes=False):
    """``value`` as tagged JSON data; raises TooLarge.

    ask_equal: ask foreign ones ``x == Nothing()``. nodes: read linked lists and binary trees, by their attributes.
    """
    if type(value) in SELF or (type(value) is int and value.bit_length() <= PLAIN_BITS):
        return value
    budget = MAX_NODES

    def walk(x, depth):
        nonlocal budget
        budget -= 1
        if budget < 0 or depth > MAX_DEPTH:
            raise TooLarge
        kind = type(x)
        if kind in SELF:
            return x
        if kind is int:
            bits = x.bit_length()
            return x if bits <= PLAIN_BITS else {"i": hex(x)} if bits <= MAX_BITS else {"o": "int"}
        if kind is float:
            return {"f": x.hex()}
        if kind is list:
            return [walk(y, depth + 1) for y in x]
        if kind in TAGS:
            return {TAGS[kind]: [walk(y, depth + 1) for y in x]}
        if kind is dict:
            return {"d": [[walk(k, depth + 1), walk(y, depth + 1)] for k, y in x.items()]}
        if kind is bytes:
            return {"b": x.hex()}
        if kind is complex:
            return {"c": [x.real.hex(), x.imag.hex()]}
        read = STANDARD.get(kind) or reader(kind)
        if read is not None:
            return walk(read(x), depth + 1)
        if nodes and hasattr(x, "val"):
            for tag, parts in NODES.items():
                if all(hasattr(x, part) for part in parts):
                    return {tag: [walk(y, depth + 1) for y in level_order(x, parts)]}
        if ask_equal:
            return {"o": kind.__name__, "e": bool(x == Nothing())}
        return {"o": kind.__name__}

    return walk(value, 0)


SELF = frozenset((type(None), bool, str))
TAGS = {tuple: "t", set: "s", frozenset: "z"}
NODES = {"n": ("next",), "r": ("left", "right")}
STANDARD = {
    Counter: lambda x: dict(dict.items(x)),
    defaultdict: lambda x: dict(dict.items(x)),
    OrderedDict: lambda x: dict(dict.items(x)),
    deque: lambda x: list(deque.__iter__(x)),
    bytearray: lambda x: bytes(memoryview(x)),
}
ENUMS = ((enum.IntEnum, int, int.__int__), (enum.IntFlag, int, int.__int__), (enum.StrEnum, str, str.__str__))


def reader(kind):
    """How a value of an enumeration that leaves __eq__ alone, or of numpy's own scalars, is read; None otherwise."""
    line = kind.__mro__
    for base, plain, read in ENUMS:
        if base in line:
            return None if any("__eq__" in vars(k) for k in line[: line.index(plain)]) else read
    numpy = sys.modules.get("numpy")
    if numpy is not None and kind.__module__ == "numpy" and issubclass(kind, numpy.generic):
        return numpy.generic.item
    return None


def level_order(node, parts):
    """The values of what hangs on ``node``, level by level. In a tree None stands for a child that is missing."""
    values, row = [], [node]
    while row:
        following = []
        for item in row:
            if item is None:
                values.append(None)
                continue
            if type(item) is not type(node):
                raise TypeError(f"a {type(item).__name__} hangs on a {type(node).__name__}")
            values.append(item.val)
            following += [getattr(item, part) for part in parts]
            if len(values) > MAX_NODES:
                raise TooLarge
        row = following if any(item is not None for item in following) else []
    while len(parts) > 1 and values[-1] is None:
        values.pop()
    return values


class CappedStdout(io.RawIOBase):
    """Descriptor 1 up to MAX_STDOUT bytes; the rest is dropped without an error, so that printing much fails nobody."""

    def __init__(self):
        self.left = MAX_STDOUT

    def writable(self):
        return True

    def write(self, data):
        size = len(data)
        if self.left > 0:
            os.write(1, bytes(data[: self.left]))
            self.left -= size
        return size


def report(**found):
    """Leave ``found`` in the job's result descriptor, over whatever the submission wrote there."""
    data = json.dumps(found).encode()
    if len(data) > MAX_RESULT:
        data = json.dumps({"raised": "TooLarge: the reply is over 4 MB"}).encode()
    os.ftruncate(RESULT_FD, 0)
    data, offset = COMPILED + data, 0
    while offset < len(data):
        offset += os.pwrite(RESULT_FD, data[offset:], offset)


def describe(error):
    """``TypeError: message``, short, whatever the exception's own methods do."""
    try:
        return f"{type(error).__name__}: {error}"[:200]
    except BaseException:
        return "an exception that does not print"


def prepare(setup):
    """A module in which the setup has run, or None if it raises; the zygote does this once for all jobs of a setup."""
    module = types.ModuleType("submission")
    try:
        exec(setup, module.__dict__)
    except Exception:
        return None
    finally:
        random.seed(0)
    return module


def make_ready():
    """What the zygote does once for all its children: seed, limits as a judge's, a capped stdout, a script's names."""
    random.seed(0)
    sys.setrecursionlimit(RECURSION)
    sys.set_int_max_str_digits(0)
    builtins.exit = builtins.quit = sys.exit
    sys.stdout = io.TextIOWrapper(io.BufferedWriter(CappedStdout()), "utf-8", "backslashreplace")


def execute(job, code, name="submission"):
    """Run the submission in a module of its own, after the setup; its namespace."""
    module = job.pop("prepared", None)
    if module is None:
        module = types.ModuleType(name)
        exec(job["setup"], module.__dict__)
    module.__name__ = name
    sys.modules[name] = sys.modules["__main__"] = module
    job["made by"] = {name: module.__dict__[name] for name in job["builders"]}
    exec(code, module.__dict__)
    return module.__dict__


def entry_of(space, job):
    """A fresh instance's entry method."""
    return getattr(space[job["cls"]](), job["entry"])


def arguments_of(call, job):
    """A call's keyword arguments, made afresh: marshalled, or an expression over the setup's own functions."""
    found = marshal.loads(call)
    return found if type(found) is dict else eval(found, {"inf": float("inf"), "nan": float("nan"), **job["made by"]})


def probe_calls(job, code, ask_equal=False):
    """Call the entry on every argument set, each on a fresh instance and freshly decoded arguments."""
    values = []
    try:
        space = execute(job, code)
        for call in job["calls"]:
            values.append(encode(entry_of(space, job)(**arguments_of(call, job)), ask_equal, job["nodes"]))
    except Exception as error:
        report(values=values, raised=describe(error))
    else:
        report(values=values)


def probe_equal(job, code):
    """As "calls", and every foreign object says whether it equals an object that nothing equals."""
    probe_calls(job, code, ask_equal=True)


def probe_script(job, code):
    """Run as a script, call the entry once, then fail: exit status 1 unless the submission ends the process itself."""
    space = execute(job, code, "__main__")
    for call in job["calls"][:1]:
        try:
            entry_of(space, job)(**arguments_of(call, job))
        except Exception as error:
            report(raised=describe(error))
    raise SystemExit(1)


def stand_in(answer, own):
    """A class decorator: every public method of the class returns ``answer`` and does nothing, except ``own``."""

    def decorate(cls):
        space = {"__init__": lambda self, *args, **kwargs: None}
        for name in dir(cls):
            value = getattr(cls, name)
            if not name.startswith("__"):
                is_method = callable(value) and name != own
                space[name] = (lambda self, *args, **kwargs: answer) if is_method else vars(cls).get(name, value)
        return type(cls.__name__, (), space)

    return decorate


def run_named(job, decorate):
    """True if the submission's function ``job["name"]`` returns with every top-level class ``job["cls"]`` decorated.

    The function may be global or a method of the class. Not there: False. Its exceptions propagate.
    """
    tree = ast.parse(job["source"])
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == job["cls"]:
            node.decorator_list.insert(0, ast.copy_location(ast.Name("__stand_in__", ast.Load()), node))
    builtins.__stand_in__ = decorate
    space = execute(job, compile(ast.fix_missing_locations(tree), "submission", "exec"))
    function = space.get(job["name"])
    if function is None and job["name"] in vars(space.get(job["cls"], object)):
        function = getattr(space[job["cls"]](), job["name"])
    if function is None:
        return False
    function()
    return True


def probe_stub(job, code):
    """Does the named function pass when every method of the class returns 0?"""
    try:
        report(flag=run_named(job, stand_in(0, job["name"])))
    except Exception as error:
        report(flag=False, raised=describe(error))


def probe_audit(job, code):
    """Three verdicts on the named function: on the submission's own class, on ``reference``'s, on one that answers
    with an object that nothing equals."""

    def reference(cls):
        space = {"__name__": "reference"}
        exec(job["setup"], space)
        exec(job["reference"], space)
        if job["name"] in vars(cls):
            setattr(space[job["cls"]], job["name"], vars(cls)[job["name"]])
        return space[job["cls"]]

    verdicts = {}
    for key, decorate in (
        ("own", lambda cls: cls),
        ("reference", reference),
        ("nothing", stand_in(Nothing(), job["name"])),
    ):
        try:
            verdicts[key] = run_named(job, decorate)
        except Exception:
            verdicts[key] = False
        report(audit=verdicts)


def probe_flag(job, code):
    """Is the attribute ``job["name"]`` of an instance truthy, as made or after one call of the entry?"""
    try:
        space = execute(job, code)
        instance = space[job["cls"]]()
        flag = bool(getattr(instance, job["name"], False))
        if not flag:
            try:
                for call in job["calls"][:1]:
                    getattr(instance, job["entry"])(**arguments_of(call, job))
            finally:
                flag = bool(getattr(instance, job["name"], False))
                report(flag=flag)
        report(flag=flag)
    except Exception as error:
        report(flag=bool(locals().get("flag", False)), raised=describe(error))


PROBES = {
    "calls": probe_calls,
    "equal": probe_equal,
    "script": probe_script,
    "stub": probe_stub,
    "audit": probe_audit,
    "flag": probe_flag,
}


def shut_down():
    """What the interpreter does at its end, in its order: wait for threads, atexit functions, finalisers, output.

    Done by hand because a real shutdown tears down every preloaded module as well, three times a job's cost.
    """
    if "threading" in sys.modules:
        sys.modules["threading"]._shutdown()
    atexit._run_exitfuncs()
    sys.modules["__main__"].__dict__.clear()
    gc.collect()
    sys.stdout.flush()


def status_of(leaving):
    """The exit status that a SystemExit stands for."""
    code = leaving.code
    return code & 0xFF if type(code) is int else int(code is not None)


def main(payload, prepared):
    """Do the job in ``payload`` (marshalled by the trainer) and end the process, whatever the submission raises."""
    job, status = {**marshal.loads(payload), "prepared": prepared}, 0
    try:
        run(job)
    except SystemExit as leaving:
        status = status_of(leaving)
    except BaseException:
        status = 1
    try:
        if job["probe"] == "script":
            shut_down()
    finally:
        os._exit(status)


def run(job):
    """Compile the submission, note that it compiles, do the probe."""
    code = compile(job["source"], "submission", "exec")
    os.write(RESULT_FD, COMPILED)
    PROBES[job["probe"]](job, code)
