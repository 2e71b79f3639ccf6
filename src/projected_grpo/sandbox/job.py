"""What goes into the sandbox and what comes out of it: jobs, outcomes, and how a dead child's leavings are read."""

import json
import marshal
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from projected_grpo.sandbox.harness import COMPILED, MAX_BITS, MAX_DEPTH, MAX_NODES

Probe = Literal["calls", "equal", "script", "stub", "audit", "flag"]
Status = Literal["ok", "compile_error", "error", "exit", "cpu_limit", "wall_limit", "disk_limit", "signal", "bad_reply"]

PLAIN = frozenset({type(None), bool, int, str})
CARRIED = frozenset({*PLAIN, float, complex, bytes})
MAX_ALIKE = 1000
CONTAINERS = frozenset({list, tuple, set, frozenset, dict})
Builder = Literal["list_node", "tree_node"]


@dataclass(frozen=True)
class Job:
    """One run of one submission, all of it data. ``calls``: keyword arguments of each ``cls().entry`` (see call_of).

    ``setup`` is code that stands before the source; the worker runs it once for all its jobs, so it has to be
    trusted as the problems are. ``builders``: its functions that the calls' arguments are made by. ``nodes``: read
    linked lists and trees among the answers. ``file`` is a result file to read back. cpu_s is a limit.

    probe: "calls" returns what the calls return; "equal" also asks foreign values whether they equal an object that
    nothing equals; "script" runs it as a script that fails in the end; "stub" runs the function ``name`` on a class
    whose methods return 0; "audit" runs it on the submission's own class, on ``reference``'s and on an answer that
    equals nothing; "flag" reads the attribute ``name``.
    """

    source: str
    probe: Probe = "calls"
    entry: str = ""
    calls: tuple[bytes, ...] = ()
    builders: tuple[Builder, ...] = ()
    nodes: bool = False
    setup: str = ""
    cls: str = "Solution"
    name: str = ""
    file: str = ""
    reference: str = ""
    cpu_s: float = 2.0


@dataclass(frozen=True)
class Foreign:
    """A returned value of no plain builtin type. ``equal``: it claimed to equal an object that nothing equals."""

    kind: str
    equal: bool = False


@dataclass(frozen=True)
class Built:
    """What a function of the setup makes of ``values``: list_node a linked list, tree_node a tree (level by level)."""

    name: Builder
    values: tuple[Any, ...]

    def __repr__(self) -> str:
        return f"{self.name}({list(self.values)!r})"


def parts(value: Any) -> Iterator[Any]:
    """A value and all that it holds, keys included. Raises ValueError below MAX_DEPTH."""
    stack = [(value, 0)]
    while stack:
        x, depth = stack.pop()
        if depth > MAX_DEPTH:
            raise ValueError(f"nested more than {MAX_DEPTH} deep")
        yield x
        inner = x.values if type(x) is Built else x if type(x) in CONTAINERS else ()
        stack += [(y, depth + 1) for y in inner]
        stack += [(y, depth + 1) for y in x.values()] if type(x) is dict else []


def check_carried(value: Any, answer: bool = False) -> None:
    """Raises ValueError that says what of a value does not go into a job, or come back as an answer."""
    for number, x in enumerate(parts(value)):
        if type(x) not in CARRIED and type(x) not in CONTAINERS and type(x) is not Built:
            raise ValueError(f"a value of type {type(x).__name__} cannot be carried")
        if type(x) is int and x.bit_length() > MAX_BITS:
            raise ValueError(f"an int of more than {MAX_BITS} bits")
        if answer and number >= MAX_NODES:
            raise ValueError(f"an answer of more than {MAX_NODES} values")


def call_of(arguments: Mapping[str, Any]) -> bytes:
    """Keyword arguments as the child reads them, types kept: marshalled, or an expression where something is built."""
    found = dict(arguments)
    return marshal.dumps(repr(found) if builders_of(found) else found)


def builders_of(value: Any) -> set[Builder]:
    """The setup's functions that a value is made by."""
    return {x.name for x in parts(value) if type(x) is Built}


@dataclass(frozen=True)
class Outcome:
    """What a job left behind. ``values`` are the calls' results up to the first that raised (``raised`` says what)."""

    status: Status
    compiled: bool
    values: tuple[Any, ...] = ()
    raised: str = ""
    flag: bool = False
    audit: Mapping[str, bool] | None = None
    stdout: str = ""
    file: bytes | None = None
    exit_code: int | None = None
    cpu_s: float = 0.0


def decode(data: Any) -> Any:
    """The value of tagged JSON (see harness). Raises ValueError or TypeError otherwise."""
    if type(data) in PLAIN:
        return data
    if type(data) is list:
        return [item if type(item) in PLAIN else decode(item) for item in data]
    if type(data) is not dict:
        raise ValueError("not tagged JSON")
    if "o" in data:
        return Foreign(str(data["o"])[:80], data.get("e") is True)
    ((tag, content),) = data.items()
    match tag:
        case "f":
            return float.fromhex(content)
        case "i":
            return bounded(content)
        case "c":
            real, imaginary = content
            return complex(float.fromhex(real), float.fromhex(imaginary))
        case "b":
            return bytes.fromhex(content)
        case "t":
            return tuple(decode(item) for item in content)
        case "s":
            return set(members(content))
        case "z":
            return frozenset(members(content))
        case "d":
            keys = members([key for key, _ in content])
            return {key: decode(item) for key, (_, item) in zip(keys, content, strict=True)}
        case "n":
            return Built("list_node", tuple(decode(item) for item in content))
        case "r":
            return Built("tree_node", tuple(decode(item) for item in content))
    raise ValueError(f"unknown tag {tag[:20]!r}")


def members(content: list[Any]) -> list[Any]:
    """What a set is to be made of. Many of one hash, which would keep this process busy for minutes, are refused."""
    found = [decode(item) for item in content]
    if len(found) > MAX_ALIKE and len(found) - len(set(map(hash, found))) > MAX_ALIKE:
        raise ValueError("too many members of one hash")
    return found


def bounded(text: str) -> int:
    """An int of at most MAX_BITS from hexadecimal digits; ValueError otherwise."""
    if len(text) > MAX_BITS // 4 + 3:
        raise ValueError("more digits than the harness sends")
    return int(text, 16)


def payload_of(job: Job) -> bytes:
    """What the child reads."""
    fields = ("source", "probe", "entry", "calls", "builders", "nodes", "setup", "cls", "name", "reference")
    return marshal.dumps({key: getattr(job, key) for key in fields})


def outcome_of(job: Job, told: Mapping[str, Any], reply: bytes | None, stdout: bytes, file: bytes | None) -> Outcome:
    """Judge by the wait status and what the dead child left. A reply that does not decode is the submission's doing."""
    code = os.waitstatus_to_exitcode(told["status"])
    compiled = reply is not None and reply.startswith(COMPILED)
    found: dict[str, Any] = {}
    status: Status = "ok"
    if told["reason"]:
        status = {"cpu": "cpu_limit", "wall": "wall_limit", "disk": "disk_limit"}[told["reason"]]
    elif code < 0:
        status = "cpu_limit" if told["cpu_s"] >= 0.9 * job.cpu_s else "signal"
    elif not compiled:
        status = "compile_error" if reply == b"" else "bad_reply"
    body = reply[len(COMPILED) :] if compiled else b""
    if body:
        try:
            if body.count(b"[") + body.count(b"{") > 2 * MAX_NODES:
                raise ValueError("more nodes than the harness sends")
            found = json.loads(body)
            found = {**found, "values": tuple(decode(value) for value in found.get("values", ()))}
        except Exception:  # whatever a forged reply provokes is the submission's doing
            found, status = {}, "bad_reply"
    elif status == "ok":
        status = "exit"
    if status == "ok" and found.get("raised"):
        status = "error"
    audit = found.get("audit")
    return Outcome(
        status=status,
        compiled=compiled,
        values=found.get("values", ()),
        raised=str(found.get("raised", ""))[:200],
        flag=found.get("flag") is True,
        audit={key: value is True for key, value in audit.items()} if isinstance(audit, dict) else None,
        stdout=stdout.decode("utf-8", "replace"),
        file=file,
        exit_code=code,
        cpu_s=told["cpu_s"],
    )
