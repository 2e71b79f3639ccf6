"""The sandbox's layers: what confines a submission, how each is set up, and the canaries that prove it at start-up."""

import contextlib
import errno
import importlib.util
import json
import os
import pwd
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

Layer = Literal["bubblewrap", "uid", "dumpable", "rlimits", "no_new_privs", "landlock", "seccomp"]
LAYERS: tuple[Layer, ...] = get_args(Layer)
SCRATCH_IN_BUBBLE = "/scratch"
DENIED_SYSCALLS = """
    fork vfork execve execveat socket connect bind listen accept accept4
    kill tkill tgkill rt_sigqueueinfo rt_tgsigqueueinfo
    pidfd_send_signal pidfd_open pidfd_getfd ptrace process_vm_readv process_vm_writev process_madvise
    mount umount2 pivot_root chroot unshare setns open_tree move_mount fsopen fsmount fsconfig mount_setattr
    memfd_create memfd_secret symlink symlinkat link linkat mkdir mkdirat mknod mknodat
    chmod fchmod fchmodat fchmodat2 chown fchown lchown fchownat
    setxattr lsetxattr fsetxattr setxattrat removexattr lremovexattr fremovexattr
    shmget shmat msgget semget mq_open keyctl add_key request_key io_uring_setup io_uring_enter io_uring_register
    bpf perf_event_open userfaultfd name_to_handle_at open_by_handle_at inotify_init inotify_init1 fanotify_init
    setuid setgid setreuid setregid setresuid setresgid setgroups setfsuid setfsgid capset personality
    init_module finit_module delete_module kexec_load reboot swapon swapoff syslog acct quotactl
    settimeofday clock_settime adjtimex clock_adjtime sethostname setdomainname iopl ioperm vhangup
    sched_setaffinity sched_setscheduler sched_setattr setpriority ioprio_set
"""
CLONE_THREAD = 0x10000
AF_UNIX, SOCK_DGRAM, SOCK_RDM = 1, 2, 4

PRELOADED = (
    "abc array bisect builtins cmath collections copy dataclasses datetime decimal enum fractions functools heapq "
    "itertools json math numbers operator random re statistics string sys textwrap threading time traceback typing"
)

DEEP_STACK = """
import os, resource, sys
soft, hard = resource.getrlimit(resource.RLIMIT_STACK)
wanted = 512 << 20 if hard == resource.RLIM_INFINITY else min(512 << 20, hard)
if soft != resource.RLIM_INFINITY and soft < wanted:
    resource.setrlimit(resource.RLIMIT_STACK, (wanted, hard))
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""
"""Starts the interpreter with a stack that may grow to what RECURSION calls take (each cached one some 500 bytes);
where a stack lies is settled when a program starts. The limit itself costs nothing."""

OFFERED = ("numpy", "sortedcontainers")
"""Packages beside the standard library that a submission may import, where they are installed."""

INSTALL = "apt-get install libseccomp2 (a policy's code runs under seccomp), or bubblewrap where it works"


def seccomp_filter() -> bytes:
    """The filter as BPF: the syscalls above get EPERM, clone makes threads only, clone3 is ENOSYS.

    Raises ImportError, OSError or RuntimeError where pyseccomp or libseccomp.so.2 is missing.
    """
    import pyseccomp as seccomp  # here and not above: it raises where the system's libseccomp is missing

    made = seccomp.SyscallFilter(seccomp.ALLOW)
    with contextlib.suppress(OSError, ValueError):  # a binary tree (libseccomp 2.5) takes the kernel a third as long
        made.set_attr(seccomp.Attr.CTL_OPTIMIZE, 2)
    refuse = seccomp.ERRNO(errno.EPERM)
    for name in DENIED_SYSCALLS.split():
        try:
            number = seccomp.resolve_syscall(seccomp.Arch.NATIVE, name)
        except (OSError, ValueError):
            continue  # a libseccomp that does not know the name cannot refuse it; the canaries judge the result
        if number >= 0:
            made.add_rule(refuse, number)
    made.add_rule(refuse, "clone", seccomp.Arg(0, seccomp.MASKED_EQ, CLONE_THREAD, 0))
    made.add_rule(seccomp.ERRNO(errno.ENOSYS), "clone3")
    # asyncio wants a pair of stream sockets, which reaches nobody else; a datagram socket could be sent anywhere
    made.add_rule(refuse, "socketpair", seccomp.Arg(0, seccomp.NE, AF_UNIX))
    for bit in (SOCK_DGRAM, SOCK_RDM):  # of the kinds that AF_UNIX knows, these two bits are in all but SOCK_STREAM
        made.add_rule(refuse, "socketpair", seccomp.Arg(1, seccomp.MASKED_EQ, bit, bit))
    with tempfile.TemporaryFile() as file:
        made.export_bpf(file)
        file.seek(0)
        return file.read()


def interpreter_paths() -> list[str]:
    """What a child may read: the interpreter's standard library, shared libraries, time zones."""
    library = os.path.dirname(os.__file__)
    fixed = ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/share/zoneinfo", "/etc/ld.so.cache", "/dev/urandom"]
    return [library, os.path.join(sys.base_prefix, "lib"), *fixed]


def offered(to_all: bool = False) -> dict[str, str]:
    """The folder of each package of OFFERED that is installed; to_all: where any user may read it."""
    found = {}
    for name in OFFERED:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations:
            folder = Path(spec.submodule_search_locations[0]).resolve()
            if not to_all or all(place.stat().st_mode & 0o001 for place in (folder, *folder.parents)):
                found[name] = str(folder)
    return found


def with_libraries(folders: Collection[str]) -> list[str]:
    """Package folders, and the folders of shared libraries that wheels lay beside them."""
    return [*folders, *(f"{folder}.libs" for folder in folders if os.path.isdir(f"{folder}.libs"))]


def bubble_command(inner: list[str]) -> list[str]:
    """``inner`` under bubblewrap: own namespaces, no capability, read-only interpreter, a sized scratch folder."""
    binds = [sys.base_prefix, sys.prefix, os.path.dirname(__file__), "/lib", "/lib64", "/usr/lib", "/usr/lib64"]
    binds += ["/etc/ld.so.cache", *with_libraries(offered().values())]
    parts = ["bwrap", "--unshare-all", "--cap-drop", "ALL", "--as-pid-1", "--die-with-parent", "--new-session"]
    for path in dict.fromkeys(binds):
        parts += ["--ro-bind-try", path, path]
    parts += ["--dev", "/dev", "--remount-ro", "/dev", "--proc", "/proc"]
    parts += ["--size", str(32 << 20), "--tmpfs", SCRATCH_IN_BUBBLE, "--remount-ro", "/"]
    return [*parts, "--", *inner]


def zygote_command(bubble: bool, descriptor: int) -> list[str]:
    """How to start a worker whose socket is ``descriptor``."""
    script = str(Path(__file__).with_name("child.py"))
    flags = ["-P", "-s", "-S", "-B"]
    inner = [sys.executable, "-I", "-S", "-c", DEEP_STACK, *flags, script, str(descriptor)]
    return bubble_command(inner) if bubble else inner


def bubblewrap_works() -> str:
    """ "" if bubblewrap can start the interpreter here, else why not."""
    if shutil.which("bwrap") is None:
        return "bwrap is not installed (optional)"
    command = bubble_command([sys.executable, "-P", "-s", "-S", "-B", "-c", "import ctypes"])
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return "" if done.returncode == 0 else (done.stderr.strip().splitlines() or ["bwrap failed"])[-1][:120]


def open_to_all() -> bool:
    """Whether any user can read the standard library and reach the folder for temporary files."""
    library, scratch = Path(os.__file__).resolve(), Path(tempfile.gettempdir()).resolve()
    folders = [*library.parents, scratch, *scratch.parents]
    return all(folder.stat().st_mode & 0o001 for folder in folders) and bool(library.stat().st_mode & 0o004)


def uid_change_fails(why: Mapping[Layer, str]) -> str:
    """ "" if children can run as another user, given the other layers, else why not."""
    if os.geteuid() != 0:
        return "not root"
    if not why["bubblewrap"]:
        return "bubblewrap stands in"
    if not open_to_all() and (why["landlock"] or why["seccomp"]):
        # a child would need the right to read everything, which is harmless under both of these alone
        return f"other users cannot read {sys.base_prefix}, and Landlock or seccomp is off"
    return ""


def unused_uid() -> int:
    """A user id that no account and no running process has."""
    taken = {entry.pw_uid for entry in pwd.getpwall()}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            taken.add(path.stat().st_uid)
        except OSError:
            continue
    start = 61_184 + os.getpid() % 2_000
    return next(uid for uid in range(start, 65_534) if uid not in taken)


def plan(wanted: Collection[Layer]) -> tuple[dict[str, Any], dict[Layer, str]]:
    """(configuration for a zygote, why each layer is not tried: "" where it is) on this machine."""
    why: dict[Layer, str] = {name: "" if name in wanted else "not asked for" for name in LAYERS}
    if sys.platform != "linux":
        why = {name: why[name] or "needs Linux" for name in LAYERS}
    if not why["bubblewrap"]:
        why["bubblewrap"] = bubblewrap_works()
    program = b""
    if not why["seccomp"]:
        try:
            program = seccomp_filter()
        except (ImportError, OSError, RuntimeError) as error:
            why["seccomp"] = f"{type(error).__name__}: {error}"[:120]
    if not why["uid"]:
        why["uid"] = uid_change_fails(why)
    read_all = not why["uid"] and not open_to_all()
    packages = offered(to_all=not why["uid"] and not read_all)
    config = {
        "bubble": not why["bubblewrap"],
        "uid": 0 if why["uid"] else unused_uid(),
        "read_all": read_all,
        "hide_memory": not why["dumpable"],
        "rlimits": not why["rlimits"],
        "no_new_privs": not why["no_new_privs"] or bool(program),
        "landlock": [] if why["landlock"] else [*interpreter_paths(), *with_libraries(packages.values())],
        "offered": packages,
        "seccomp": program.hex(),
        "preload": PRELOADED.split(),
        "confine": str(Path(__file__).with_name("confine.py")),
        "harness": str(Path(__file__).with_name("harness.py")),
    }
    return config, why


CANARY = """
import ctypes, mmap, os, resource, socket
outside = {outside!r}
zygote = os.getppid()
def attempt(action):
    try:
        return repr(action())[:60]
    except BaseException as error:
        return "refused: " + type(error).__name__ + " " + str(getattr(error, "errno", ""))
def fork():
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    return "forked"
def connect():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        udp.connect(("192.0.2.1", 9))
    return "a route out"
def write():
    with open(outside + "/new", "w") as file:
        return file.write("x")
def own_chmod():
    open("canary", "w").close()
    os.chmod("canary", 0o644)
    return "changed"
def too_big():
    with open("canary", "wb") as file:
        for _ in range(9):
            file.write(b"x" * (1 << 20))
            file.flush()
    return "9 MB"
libc = ctypes.CDLL(None)
class Solution:
    def look(self):
        found = {{
            "fork": attempt(fork),
            "exec": attempt(lambda: os.execv(outside + "/no-such-program", ["x"])),
            "network": attempt(connect),
            "read outside": attempt(lambda: open(outside + "/readable").read()),
            "write outside": attempt(write),
            "chmod outside": attempt(lambda: os.chmod(outside + "/readable", 0o600)),
            "kill the parent": attempt(lambda: os.kill(zygote, 0)),
            "the parent's memory": attempt(lambda: open("/proc/%d/mem" % zygote, "r+b").close()),
            "fill the disk": attempt(too_big),
            "take 2 GB": attempt(lambda: len(mmap.mmap(-1, 2 << 30))),
        }}
        proofs = {{
            "bubblewrap": zygote == 1,
            "uid": os.getuid() != 0 and os.getuid() == {uid},
            "dumpable": libc.prctl(3, 0, 0, 0, 0) == 0,
            "rlimits": resource.getrlimit(resource.RLIMIT_FSIZE)[1] > 0,
            "no_new_privs": libc.prctl(39, 0, 0, 0, 0) == 1,
            "landlock": attempt(lambda: open("/proc/self/stat").read()) == "refused: PermissionError 13",
            "seccomp": attempt(own_chmod) == "refused: PermissionError 1",
            "imports": attempt(lambda: bool(__import__("colorsys"))) == "True",
        }}
        return [found, proofs]
"""
CONTAINED = (
    "fork",
    "exec",
    "network",
    "read outside",
    "write outside",
    "chmod outside",
    "kill the parent",
    "the parent's memory",
    "fill the disk",
    "take 2 GB",
)


def canary_source(outside: str, uid: int) -> str:
    """A submission whose ``Solution().look()`` tries each forbidden act, harmlessly, and says what happened."""
    return CANARY.format(outside=outside, uid=uid)


def verdict(why: Mapping[Layer, str], values: list[Any] | None) -> dict[str, Any]:
    """Layers in force and acts contained, from what the canary saw (None: it did not come back)."""
    found, proofs = values or ({}, {})
    missing = "off: its canary got through" if values else "off: the canary did not come back"
    layers = {}
    for name in LAYERS:
        if why[name]:
            layers[name] = f"off: {why[name]}"
        else:
            layers[name] = "on" if proofs.get(name) else missing
    contained = {act: str(found.get(act, "no answer")) for act in CONTAINED}
    return {"layers": layers, "canaries": contained}


def is_sandboxed(found: Mapping[str, Any]) -> bool:
    """Whether seccomp or a namespace is proven to be in force."""
    return "on" in (found["layers"]["seccomp"], found["layers"]["bubblewrap"])


def outside_folder() -> str:
    """A folder that any user could read and write, for the canary to fail on."""
    folder = tempfile.mkdtemp(prefix=f"projected_grpo-{os.getpid()}-")
    Path(folder, "readable").write_text(json.dumps("outside"))
    os.chmod(folder, 0o777)
    os.chmod(Path(folder, "readable"), 0o666)
    return folder
