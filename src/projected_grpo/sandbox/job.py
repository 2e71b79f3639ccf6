"""What goes into the sandbox and what comes out of it: jobs, outcomes, and how a dead child's leavings are read."""

import json
import marshal
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from projected_grpo.sandbox.harness import COMPILED, MAX_NODES

Probe = Literal["calls", "equal", "script", "stub", "audit", "flag"]
Status = Literal["ok", "compile_error", "error", "exit", "cpu_limit", "wall_limit", "disk_limit", "signal", "bad_reply"]

PLAIN = frozenset({type(None), bool, int, str})


@dataclass(frozen=True)
class Job:
    """One run of one submission, all of it data. ``calls``: keyword arguments of each ``cls().entry``, as JSON text.

    ``setup`` is code that stands before the source; the worker runs it once for all its jobs, so it has to be
    trusted as the problems are. ``file`` is a result file to read back. cpu_s is a limit.

    probe: "calls" returns what the calls return; "equal" also asks foreign values whether they equal an object that
    nothing equals; "script" runs it as a script that fails in the end; "stub" runs the function ``name`` on a class
    whose methods return 0; "audit" runs it on the submission's own class, on ``reference``'s and on an answer that
    equals nothing; "flag" reads the attribute ``name``.
    """

    source: str
    probe: Probe = "calls"
    entry: str = ""
    calls: tuple[str, ...] = ()
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
        case "b":
            return bytes.fromhex(content)
        case "t":
            return tuple(decode(item) for item in content)
        case "s":
            return {decode(item) for item in content}
        case "z":
            return frozenset(decode(item) for item in content)
        case "d":
            return {decode(key): decode(item) for key, item in content}
    raise ValueError(f"unknown tag {tag[:20]!r}")


@lru_cache(maxsize=4096)
def arguments_of(calls: tuple[str, ...]) -> tuple[bytes, ...]:
    """Each call's arguments marshalled apart, so that each is decoded afresh, in a third of the time JSON takes."""
    return tuple(marshal.dumps(json.loads(call)) for call in calls)


def payload_of(job: Job) -> bytes:
    """What the child reads."""
    fields = ("source", "probe", "entry", "setup", "cls", "name", "reference")
    return marshal.dumps({key: getattr(job, key) for key in fields} | {"calls": arguments_of(job.calls)})


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
