"""The sandbox: tagged JSON, layers, refusal, workers that die, endings that leave nothing behind."""

import json
import marshal
import math
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from projected_grpo.sandbox import Sandbox, harness, layers, worker
from projected_grpo.sandbox import child as sandbox_child
from projected_grpo.sandbox import job as sandbox_job
from projected_grpo.sandbox.job import Foreign, Job, call_of, check_carried, decode, outcome_of
from projected_grpo.sandbox.layers import LAYERS
from projected_grpo.sandbox.worker import SandboxError

CI = os.environ.get("CI") == "true"
WITHOUT_BUBBLE = [layer for layer in LAYERS if layer != "bubblewrap"]

plain = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([8191, 8192, 20_000, harness.MAX_BITS - 1]).map(lambda bits: -(2**bits))
    | st.floats()
    | st.complex_numbers()
    | st.text(st.characters(exclude_categories=()))
    | st.binary()
)
hashable = st.recursive(plain, lambda inner: st.tuples(inner) | st.frozensets(inner, max_size=3), max_leaves=5)
values = st.recursive(
    plain,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.tuples(inner, inner)
        | st.dictionaries(hashable, inner, max_size=3)
        | st.sets(hashable, max_size=3)
    ),
    max_leaves=12,
)


def job(body: str, before: str = "", **fields) -> Job:
    indented = "".join(f"        {line}\n" for line in body.splitlines())
    source = f"{before}\nclass Solution:\n    def f(self):\n{indented}"
    return Job(**{"source": source, "entry": "f", "calls": (call_of({}),), **fields})


def exact(a, b) -> bool:
    """Equal, of the same types all the way down; NaN is itself, -0.0 is not 0.0."""
    if type(a) is not type(b):
        return False
    if type(a) is complex:
        return exact(a.real, b.real) and exact(a.imag, b.imag)
    if type(a) is float:
        return (math.isnan(a) and math.isnan(b)) or (a == b and math.copysign(1, a) == math.copysign(1, b))
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(exact, a, b))
    if type(a) is dict:
        return len(a) == len(b) and all(exact(x, y) and exact(a[x], b[y]) for x, y in zip(a, b, strict=True))
    if isinstance(a, set | frozenset):
        return len(a) == len(b) and all(any(exact(x, y) for y in b) for x in a)
    return a == b


@given(values)
@settings(max_examples=300, deadline=None)
def test_tagged_json_gives_back_every_plain_value(value):
    sent = json.dumps(harness.encode(value))
    assert exact(decode(json.loads(sent)), value)
    check_carried(value, answer=True)
    assert exact(marshal.loads(call_of({"x": value})), {"x": value})


def test_tagged_json_of_what_is_not_plain():
    class Number(int):
        pass

    itself = []
    itself.append(itself)
    assert decode(harness.encode([Number(3)])) == [Foreign("Number")]
    assert decode(harness.encode(2**harness.MAX_BITS)) == Foreign("int")
    for value in (itself, [0] * (harness.MAX_NODES + 1)):
        with pytest.raises(harness.TooLarge):
            harness.encode(value)


@given(
    st.recursive(
        st.none() | st.integers() | st.text("fbtszdoe0x1p9", max_size=8),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("fbtszdoeq"), inner, max_size=2),
        max_leaves=8,
    )
)
@settings(max_examples=300, deadline=None)
def test_no_reply_upsets_the_reader(found):
    told = {"status": 0, "reason": "", "cpu_s": 0.0}
    for body in (found, {"values": found}, {"values": [found], "audit": found, "raised": found}):
        reply = harness.COMPILED + json.dumps(body).encode()
        assert outcome_of(Job(""), told, reply, b"", None).status in ("ok", "error", "bad_reply")
    for reply in (None, b"", b"comp", harness.COMPILED + b"[" * 500_000, harness.COMPILED + b"\xff"):
        assert outcome_of(Job(""), told, reply, b"", None).status in ("exit", "compile_error", "bad_reply")


def test_the_payload_holds_arguments_and_no_more():
    sent = marshal.loads(sandbox_job.payload_of(Job("x", calls=(call_of({"a": 1}),), file="result.txt")))
    assert set(sent) == {"source", "probe", "entry", "calls", "builders", "nodes", "setup", "cls", "name", "reference"}


def namespaces_work() -> bool:
    """Whether this machine (most containers do not) lets bubblewrap, or anyone, make namespaces."""
    command = ["bwrap", "--unshare-all", "--ro-bind", "/", "/", "true"]
    return (
        shutil.which("bwrap") is not None and subprocess.run(command, check=False, capture_output=True).returncode == 0
    )


def missing_layers(found, expected) -> list[str]:
    return [f"{name}: {found['layers'][name]}" for name in expected if found["layers"][name] != "on"]


@pytest.mark.parametrize("use", [LAYERS, WITHOUT_BUBBLE], ids=["all", "without bubblewrap"])
def test_layers_hold_and_their_canaries_prove_it(use):
    with Sandbox(workers=1, use=use) as sandbox:
        found = sandbox.layers
    expected = ["dumpable", "rlimits", "no_new_privs", "landlock", "seccomp"]
    if "bubblewrap" in use and namespaces_work():
        expected += ["bubblewrap"]
    elif os.geteuid() == 0:
        expected += ["uid"]
    missing = missing_layers(found, expected)
    if missing and not CI:
        pytest.skip(f"this machine lacks {missing}; CI has to have them")
    assert not missing
    assert {act: met for act, met in found["canaries"].items() if not met.startswith("refused")} == {}


def test_the_canaries_get_through_where_nothing_holds():
    with Sandbox(workers=1, allow_unsandboxed=True, use=()) as sandbox:
        met = sandbox.layers["canaries"]
        assert all(state == "off: not asked for" for state in sandbox.layers["layers"].values())
    free = {act for act, what in met.items() if not what.startswith("refused")}
    assert {"fork", "read outside", "write outside", "chmod outside", "kill the parent", "fill the disk"} <= free


def test_grading_is_refused_without_seccomp_and_namespace_unless_allowed():
    with pytest.raises(SandboxError, match=r"(?s)refusing to grade.*apt-get install.*--allow-unsandboxed-grading"):
        Sandbox(workers=1, use=("rlimits",))
    with Sandbox(workers=1, use=("rlimits",), allow_unsandboxed=True) as sandbox:
        assert sandbox.layers["allow_unsandboxed"] is True
        assert sandbox.run([job("return 3")])[0].values == (3,)


def test_a_machine_without_libseccomp_is_told_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyseccomp", None)
    with pytest.raises(SandboxError, match=r"(?s)seccomp: off: ModuleNotFoundError.*libseccomp2"):
        Sandbox(workers=1, use=WITHOUT_BUBBLE)


def test_a_layer_whose_canary_gets_through_is_not_claimed():
    why = dict.fromkeys(LAYERS, "")
    found = layers.verdict(why, [{"fork": "'forked'"}, {"seccomp": False, "landlock": True}])
    assert found["layers"]["seccomp"] == "off: its canary got through"
    assert found["layers"]["landlock"] == "on"
    assert not layers.is_sandboxed(found)
    assert not layers.is_sandboxed(layers.verdict(why, None))


@pytest.fixture(scope="module")
def two():
    with Sandbox(workers=2) as sandbox:
        yield sandbox


def test_outcomes_come_in_order_and_alike_from_every_worker(two):
    ordered = two.run([job(f"time.sleep({(9 - i) / 100})\nreturn {i}", "import time") for i in range(10)])
    assert [outcome.values for outcome in ordered] == [(i,) for i in range(10)]
    chance = job("return [list({'a', 'b', 'c', 'd', 'e'}), random.random()]", "import random")
    assert len({repr(outcome.values) for outcome in two.run([chance] * 20)}) == 1


def test_setup_runs_before_every_submission_and_none_sees_another(two):
    setup = "import math\nseen = []\ndef helper():\n    return name"
    jobs = [job("seen.append(1)\nreturn [len(seen), helper()]", f"name = {i}", setup=setup) for i in range(8)]
    assert [outcome.values for outcome in two.run(jobs)] == [([1, i],) for i in range(8)]
    assert two.run([job("return 1", setup="raise KeyError('no')")])[0].raised == "KeyError: 'no'"


def test_a_scratch_folder_is_empty_for_the_next_job(two):
    jobs = [job("import os\nopen('left', 'w').write('x')\nreturn os.listdir()")] * 6
    assert [outcome.values for outcome in two.run(jobs)] == [(["left"],)] * 6


@pytest.mark.parametrize("use", [LAYERS, ()], ids=["every layer", "plain fork"])
def test_a_child_holds_its_own_descriptors_and_no_other(use):
    """Least of all the worker's socket, whose number in the trainer's process may be a large one."""
    look = "found = []\nfor fd in range(9000):\n    try:\n        os.fstat(fd)\n        found.append(fd)\n"
    look += "    except OSError: pass\nreturn found"
    held = [os.open(os.devnull, os.O_RDONLY) for _ in range(300)]
    try:
        with Sandbox(workers=1, allow_unsandboxed=True, use=use) as sandbox:
            assert sandbox._workers[0].socket.fileno() > 300
            assert sandbox.run([job(look, "import os")])[0].values == ([0, 1, 2, 3],)
    finally:
        for fd in held:
            os.close(fd)


def processes_below(pid: int) -> set[int]:
    """Every process that descends from ``pid``."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    found, fringe = set(), {pid}
    while fringe:
        fringe = {child for child, parent in parents.items() if parent in fringe} - found
        found |= fringe
    return found


def gone(pids: set[int], seconds: float = 20) -> set[int]:
    """Those of ``pids`` that are still there after waiting for them."""
    deadline = time.monotonic() + seconds
    while (left := {pid for pid in pids if Path(f"/proc/{pid}").exists()}) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


def test_a_worker_killed_in_mid_job_loses_no_job():
    with Sandbox(workers=1, use=WITHOUT_BUBBLE) as sandbox:
        futures = [sandbox.submit(job("time.sleep(0.5)\nreturn 7", "import time")) for _ in range(3)]
        time.sleep(0.2)
        os.kill(sandbox._workers[0].process.pid, signal.SIGKILL)
        assert [future.result().values for future in futures] == [(7,)] * 3


def test_a_job_that_fails_in_two_workers_is_an_error_and_never_a_verdict():
    with Sandbox(workers=1, use=WITHOUT_BUBBLE) as sandbox:
        future = sandbox.submit(job("time.sleep(1.5)\nreturn 7", "import time"))
        killed = set()
        while len(killed) < 2:
            time.sleep(0.2)
            process = sandbox._workers[0].process
            if process is not None and process.pid not in killed:
                time.sleep(0.4)
                os.kill(process.pid, signal.SIGKILL)
                killed.add(process.pid)
        with pytest.raises(SandboxError, match="two workers"):
            future.result()
        assert sandbox.run([job("return 1")])[0].values == (1,)


def test_closing_in_mid_job_is_prompt_and_complete():
    folders = set(Path(tempfile.gettempdir()).glob(f"projected_grpo-{os.getpid()}-*"))
    sandbox = Sandbox(workers=2)
    below = processes_below(os.getpid())
    futures = [sandbox.submit(job("while True: pass")) for _ in range(20)]
    time.sleep(0.2)
    start = time.monotonic()
    sandbox.close()
    sandbox.close()
    assert time.monotonic() - start < 15
    assert all(future.done() for future in futures)
    assert not gone(below - processes_below(os.getpid()))
    assert set(Path(tempfile.gettempdir()).glob(f"projected_grpo-{os.getpid()}-*")) <= folders


RUNS_FOREVER = """
import sys
from projected_grpo.sandbox import Sandbox
from projected_grpo.sandbox.job import Job, call_of
endless = Job("class Solution:\\n    def f(self):\\n        while True: pass", entry="f", calls=(call_of({}),))
with Sandbox(workers=2) as sandbox:
    print("started", flush=True)
    while True:
        sandbox.run([endless] * 4)
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL], ids=["Ctrl-C", "SIGKILL"])
def test_an_interrupted_run_leaves_no_process_and_no_folder(how, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", RUNS_FOREVER], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        env={**os.environ, "TMPDIR": str(tmp_path)}, start_new_session=True,
    )  # fmt: skip
    assert process.stdout.readline() == b"started\n"
    deadline = time.monotonic() + 20
    while len(below := processes_below(process.pid)) < 4 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(below) >= 4
    os.killpg(process.pid, how)
    process.wait(timeout=30)
    process.stdout.close()
    assert not gone(below)
    assert [path for path in tmp_path.iterdir() if path.name.startswith("projected_grpo-")] == []


def test_folders_of_dead_processes_are_cleared_away_at_the_next_start(tmp_path, monkeypatch):
    """Killed together with its workers, a process leaves its folders; those of a live one, or of a locked one, stay."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    dead, locked, live, foreign = (
        tmp_path / name
        for name in (
            *(f"projected_grpo-{ended.pid}-a", f"projected_grpo-{ended.pid}-b"),
            *(f"projected_grpo-{os.getpid()}-c", "projected_grpo-elsewhere"),
        )
    )
    for folder in (dead, locked, live, foreign):
        folder.mkdir()
        (folder / "left").touch()
    lock = worker.locked(str(locked))
    with Sandbox(workers=1, allow_unsandboxed=True, use=()) as sandbox:
        assert sandbox.run([job("return 1")])[0].values == (1,)
        (own,) = (p for p in tmp_path.iterdir() if p not in (locked, live, foreign))
        assert own.name.startswith(f"projected_grpo-{os.getpid()}-")
        assert worker.locked(str(own), wait=False) is None
    assert set(tmp_path.iterdir()) == {locked, live, foreign}
    os.close(lock)


def test_descriptors_and_memory_files_are_given_back(two):
    two.run([job("return 1")] * 4)
    before = len(os.listdir("/proc/self/fd"))
    two.run([job("open('result.txt', 'w').write('x')\nreturn 1", file="result.txt")] * 40)
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(
    "make", ["os.symlink('/etc/hostname', 'r')", "os.mkfifo('r')", "os.mkdir('r')", "open('r', 'w').write('x' * 70000)"]
)
def test_a_result_that_is_no_small_file_is_no_result(make):
    with Sandbox(workers=1, allow_unsandboxed=True, use=()) as sandbox:
        outcome, after = sandbox.run(
            [job(f"{make}\nreturn 1", "import os", file="r"), job("return os.listdir()", "import os")]
        )
        assert (outcome.values, outcome.file) == ((1,), None)
        assert after.values == ([],)


def test_orphans_of_a_job_are_ended_where_nothing_forbids_a_fork():
    lines = (
        "if os.fork() == 0:",
        "    if os.fork() == 0:",
        "        os.setsid()",
        "        time.sleep(30)",
        "    os._exit(0)",
    )
    daemon = "\n".join((*lines, "return 1"))
    with Sandbox(workers=1, allow_unsandboxed=True, use=()) as sandbox:
        idle = processes_below(os.getpid())
        assert sandbox.run([job(daemon, "import os, time")])[0].values == (1,)
        assert processes_below(os.getpid()) == idle


def test_cleaning_a_folder_deeper_than_any_path_may_be(tmp_path):
    here = os.getcwd()
    try:
        os.chdir(tmp_path)
        for _ in range(1200):
            os.mkdir("d" * 20)
            os.chdir("d" * 20)
        Path("file").write_text("x")
    finally:
        os.chdir(here)
    sandbox_child.clean(tmp_path)
    assert os.listdir(tmp_path) == []


def test_a_worker_that_cannot_start_says_why(monkeypatch):
    monkeypatch.setattr(layers, "zygote_command", lambda bubble, fd: [sys.executable, "-c", "1 / 0"])
    with pytest.raises(SandboxError, match=r"(?s)did not start.*ZeroDivisionError"):
        Sandbox(workers=1)


def test_it_runs_without_the_calls_that_only_linux_has(monkeypatch):
    """A stand-in for macOS: no prctl, pidfd_open or memfd_create on either side, no layer at all."""
    script = str(Path(sandbox_child.__file__))
    wrapper = (
        "import ctypes, os, runpy, sys\ndel os.pidfd_open, os.memfd_create\n"
        "ctypes.CDLL = lambda *a, **k: object()\n"
        "sys.argv = sys.argv[1:]\nrunpy.run_path(sys.argv[0], run_name='__main__')"
    )
    command = [sys.executable, "-P", "-s", "-S", "-c", wrapper, script]
    monkeypatch.setattr(layers, "zygote_command", lambda bubble, fd: [*command, str(fd)])
    monkeypatch.delattr(os, "memfd_create")
    monkeypatch.delattr(os, "sched_getaffinity")
    with Sandbox(workers=2, allow_unsandboxed=True, use=()) as sandbox:
        outcomes = sandbox.run([job("return 5"), job("while True: pass", cpu_s=1.0)])
        assert [outcome.status for outcome in outcomes] == ["ok", "cpu_limit"]


def test_the_wall_limit_ends_a_sleeper_and_not_a_worker(two):
    sleeper = job("time.sleep(60)", "import time", cpu_s=0.1)
    start = time.monotonic()
    outcomes = two.run([sleeper, job("return 1")])
    assert [outcome.status for outcome in outcomes] == ["wall_limit", "ok"]
    assert time.monotonic() - start < 20


def test_many_threads_may_submit_at_once(two):
    results: dict[int, tuple] = {}
    threads = [
        threading.Thread(target=lambda i=i: results.update({i: two.submit(job(f"return {i}")).result().values}))
        for i in range(12)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {i: (i,) for i in range(12)}


def test_the_command_prints_the_layers(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["sandbox"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("projected_grpo.sandbox", run_name="__main__")
    said = capsys.readouterr().out
    assert "seccomp" in said
    assert "the parent's memory" in said
    if CI:
        assert ended.value.code == 0, said
