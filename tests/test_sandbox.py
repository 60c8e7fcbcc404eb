"""Hostile programs in the sandbox: none gets out, each is ended within its limits, and nothing of it is left."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

import rlpost.sandbox.bubblewrap as sandbox
from rlpost.sandbox import End, Limits, Unavailable, problem, run

pytestmark = [
    pytest.mark.skipif(problem() is not None, reason=f"no sandbox on this machine: {problem()}"),
    pytest.mark.thorough,
]
LIMITS = Limits(seconds=4.0, cpu_seconds=2, memory_mib=128, processes=8, files_mib=4, output_kib=16)
SECRET = "planted-in-the-environment-and-in-a-file"


def python(code: str, limits: Limits = LIMITS, **options):
    return run({"main.py": code}, limits=limits, **options)


def test_a_program_gets_its_files_and_its_input_and_gives_its_output():
    result = run(
        {
            "main.py": "import sys, helper; print(helper.twice(int(sys.stdin.read())))",
            "helper.py": "def twice(x): return 2 * x",
        },
        ["python3", "-c", "import sys; sys.path.insert(0, '/sandbox'); exec(open('main.py').read())"],
        stdin="21",
    )
    assert result.passed and result.stdout == "42\n" and result.stderr == ""
    assert run({"a/b/c.txt": b"\x00\xff"}, ["cat", "a/b/c.txt"]).stdout == "\x00\N{REPLACEMENT CHARACTER}"
    assert python("raise SystemExit(3)").code == 3
    failed = python("1 / 0")
    assert not failed.passed and failed.code == 1 and "ZeroDivisionError" in failed.stderr


@pytest.mark.parametrize("name", ["/etc/x", "../x", "a/../../x", ""])
def test_a_file_name_that_leads_out_is_refused(name):
    with pytest.raises(ValueError, match="no name of a file in the sandbox"):
        run({name: ""}, ["true"])


# Each prints ESCAPED when it has got what it wanted.
READS = {
    "a file of the user": "open({secret!r}).read()",
    "the password file": "open('/etc/shadow').read()",
    "a home folder": "os.listdir('/home')",
    "the root user's folder": "open('/root/.bashrc').read()",
    "the environment of the trainer": "os.environ['PLANTED']",
    "the environment of process 1": "1 / (b'PLANTED' in open('/proc/1/environ', 'rb').read())",
    "another process's memory": "open('/proc/{pid}/mem', 'rb').read(1)",
    "the trainer's command line": "open('/proc/{pid}/cmdline').read()",
    "the trainer's descriptors": "1 / any(int(f) > 3 and os.path.exists('/proc/self/fd/' + f) for f in FDS)",
    "by a symbolic link": "(os.symlink({secret!r}, 'link'), open('link').read())",
    "by a hard link": "(os.link({secret!r}, 'link'), open('link').read())",
    "by a path with dots": "open('/sandbox/../../../../..{secret}').read()",
    "the kernel's memory": "open('/dev/mem', 'rb').read(1)",
    "a disk": "open('/dev/sda', 'rb').read(1)",
    "shared memory of others": "1 / len(os.listdir('/dev/shm'))",
    "the system's log": "open('/dev/kmsg').read(1)",
}
WRITES = {
    "the system": "open('/usr/bin/x', 'w')",
    "the interpreter": "open(os.path.join(os.path.dirname(os.__file__), 'x.py'), 'w')",
    "the root folder": "open('/x', 'w')",
    "the sandbox's own name": "open('/proc/sys/kernel/hostname', 'w').write('x')",
    "what is run at a crash": "open('/proc/sys/kernel/core_pattern', 'w').write('x')",
    "the system's keys": "open('/proc/sysrq-trigger', 'w').write('h')",
    "memory's settings": "open('/proc/sys/vm/drop_caches', 'w').write('1')",
    "a file of the user": "open({secret!r}, 'w')",
    "the binary of the interpreter": "os.chmod(sys.executable, 0o777)",
}
DOES = {
    "connects to the internet": "socket.create_connection(('1.1.1.1', 53), 1)",
    "asks for a name": "socket.gethostbyname('example.com')",
    "connects to the machine": "socket.create_connection(('127.0.0.1', {port}), 1)",
    "connects to an abstract socket": "socket.socket(socket.AF_UNIX).connect('\\0planted-{pid}')",
    "opens a raw socket": "socket.socket(socket.AF_INET, socket.SOCK_RAW, 1)",
    "becomes root": "os.setuid(0)",
    "changes its root": "os.chroot('/sandbox')",
    "mounts": "1 / (libc.mount(b'none', b'/sandbox', b'tmpfs', 0, None) == 0)",
    "unmounts": "1 / (libc.umount2(b'/proc', 2) == 0)",
    "makes namespaces": "1 / (libc.unshare(0x10000000) == 0)",
    "makes a device": "os.mknod('/sandbox/d', 0o60666, os.makedev(8, 0))",
    "kills the trainer": "os.kill({pid}, 9)",
    "traces the trainer": "1 / (libc.ptrace(16, {pid}, 0, 0) == 0)",
    "sets the clock": "time.clock_settime(time.CLOCK_REALTIME, 0)",
    "raises its limits": "resource.setrlimit(resource.RLIMIT_AS, (2**40, 2**40))",
    "gets a better priority": "os.nice(-5)",
    "reboots": "1 / (libc.reboot(0x1234567) == 0)",
    "loads a module": "1 / (libc.syscall(175, 0, 0, b'') == 0)",
    "writes to the user's terminal": "os.open('/dev/tty', os.O_WRONLY)",
    "runs sudo": "1 / (os.system('sudo -n true 2>/dev/null') == 0)",
    "uses a setuid program": "1 / (os.system('su -c true nobody 2>/dev/null </dev/null') == 0)",
}
HEAD = "import ctypes, os, resource, socket, sys, time\nlibc, FDS = ctypes.CDLL(None), os.listdir('/proc/self/fd')\n"


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """A file that only this user can read, a port, a variable: what a program would like to have."""
    secret = tmp_path_factory.mktemp("secret") / "planted"
    secret.write_text(SECRET)
    secret.chmod(0o600)
    os.environ["PLANTED"] = SECRET
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as abstract:
        abstract.bind(f"\0planted-{os.getpid()}")
        abstract.listen()
        yield {"secret": str(secret), "pid": os.getpid(), "port": server.getsockname()[1]}
    del os.environ["PLANTED"]
    assert secret.read_text() == SECRET


@pytest.mark.parametrize("name", [*(f"reads {n}" for n in READS), *(f"writes {n}" for n in WRITES), *DOES])
def test_nothing_outside_can_be_had(planted, name):
    kind, _, rest = name.partition(" ")
    attempt = {"reads": READS, "writes": WRITES}.get(kind, {}).get(rest) or DOES[name]
    result = python(
        f"{HEAD}try:\n    {attempt.format(**planted)}\n"
        "except BaseException as error:\n    print(type(error).__name__)\nelse:\n    print('ESCAPED')\n"
    )
    assert "ESCAPED" not in result.stdout and SECRET not in result.stdout + result.stderr, result
    assert result.seconds < LIMITS.seconds + 1


ENDED = {
    "loops": ("while True: pass", (End.TIME, End.EXITED)),
    "sleeps": ("import time; time.sleep(1000)", (End.TIME,)),
    "waits for input": ("import sys; sys.stdin.read(); import time; time.sleep(100)", (End.TIME,)),
    "ignores signals": (
        "import signal, time\nfor n in range(1, 64):\n  try: signal.signal(n, signal.SIG_IGN)\n  except OSError: pass\n"
        "time.sleep(100)",
        (End.TIME,),
    ),
    "forks without end": (
        "import os\nwhile True:\n  try: os.fork()\n  except OSError: pass",
        (End.PROCESSES, End.TIME),
    ),
    "leaves a child that sleeps": (
        "import os, time\nif os.fork() == 0:\n  os.setsid()\n  if os.fork() == 0: time.sleep(1000)\n  os._exit(0)",
        (End.EXITED, End.TIME),
    ),
    "closes every descriptor and sleeps": ("import os, time; os.closerange(0, 64); time.sleep(1000)", (End.TIME,)),
    "starts threads without end": (
        "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(99,)).start()",
        (End.EXITED, End.TIME, End.MEMORY),
    ),
    "takes memory": ("x = []\nwhile True: x.append(bytearray(10**6))", (End.EXITED, End.MEMORY)),
    "takes memory in many processes": (
        "import os, time\nfor _ in range(6): os.fork()\nx = bytearray(60 * 10**6); time.sleep(60)",
        (End.MEMORY, End.PROCESSES),
    ),
    "fills the folder": ("f = open('x', 'wb')\nwhile True: f.write(bytes(10**6))", (End.EXITED,)),
    "fills the temporary folder": (
        "import itertools\nfor i in itertools.count(): open(f'/tmp/{i}', 'wb').write(bytes(10**5))",
        (End.EXITED,),
    ),
    "makes a huge sparse file": ("open('x', 'wb').truncate(10**12)", (End.EXITED,)),
    "writes without end": ("while True: print('x' * 1000)", (End.OUTPUT,)),
    "writes errors without end": ("import sys\nwhile True: sys.stderr.write('x' * 1000)", (End.OUTPUT,)),
    "recurses without end": ("import sys\nsys.setrecursionlimit(10**9)\ndef f(): f()\nf()", (End.EXITED, End.MEMORY)),
    "counts to the sky": ("10 ** 10 ** 10", (End.TIME, End.EXITED, End.MEMORY)),
    "kills itself": ("import os; os.kill(os.getpid(), 9)", (End.EXITED,)),
    "kills the sandbox's first process": ("import os, time; os.kill(1, 9); time.sleep(99)", (End.TIME, End.EXITED)),
    "kills all": ("import os; os.kill(-1, 9)", (End.EXITED,)),
}


@pytest.mark.thorough
@pytest.mark.parametrize("name", ENDED)
def test_each_is_ended_within_its_limits_and_leaves_nothing(name):
    code, ends = ENDED[name]
    before = {p.pid for p in psutil.Process().children(recursive=True)}
    result = python(code)
    assert result.end in (*ends, End.TIME) and not (result.passed and name != "leaves a child that sleeps"), result
    assert result.seconds < LIMITS.seconds + 30  # it is ended, also where the machine is busy
    assert len(result.stdout) <= LIMITS.output_kib * 1024
    assert {p.pid for p in psutil.Process().children(recursive=True)} <= before


def test_a_sandbox_dies_with_whoever_asked_for_it(tmp_path):
    code = "from rlpost.sandbox import Limits, run; run({'main.py': 'import time; time.sleep(77)'}, limits=Limits(seconds=60))"
    asker = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[1])
    try:
        until = time.monotonic() + 30
        while not (inside := psutil.Process(asker.pid).children(recursive=True)) or len(inside) < 3:
            assert time.monotonic() < until
            time.sleep(0.05)
    finally:
        asker.kill()
        asker.wait()
    gone, alive = psutil.wait_procs(inside, timeout=5)
    assert not alive


def test_many_at_once():
    found: list = []
    threads = [threading.Thread(target=lambda i=i: found.append((i, python(f"print({i})").stdout))) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == [(i, f"{i}\n") for i in range(16)]


def test_without_a_sandbox_nothing_is_run(monkeypatch):
    monkeypatch.setattr(sandbox, "problem", lambda: "user namespaces are switched off")
    with pytest.raises(Unavailable, match="user namespaces are switched off.*nothing is run without"):
        run({"main.py": ""})


def test_a_machine_without_bubblewrap_says_what_to_install(monkeypatch):
    monkeypatch.setattr(sandbox, "_program", lambda: None)
    assert "install bubblewrap" in sandbox.problem.__wrapped__()
    monkeypatch.setattr(sandbox.sys, "platform", "darwin")
    assert "for Linux" in sandbox.problem.__wrapped__()
