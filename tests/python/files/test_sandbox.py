"""A stranger's program has an empty folder, the standard library, and nothing else."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from gptc.errors import GptcError
from gptc.files import sandbox
from gptc.files.sandbox import run_code
from sandboxed import needs_sandbox

pytestmark = needs_sandbox


@pytest.fixture(autouse=True)
def _busy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A verdict does not depend on the clock, however busy the machine is."""
    monkeypatch.setattr(sandbox, "_WAIT", 60)


FORKS = """
import os
n = 0
try:
    while True:
        os.fork()
        n += 1
except OSError:
    pass
assert n == 0
"""


# fork itself, which no library calls any more; on other machines than x86-64 it is another call.
SYSTEM_FORK = """
import ctypes, os
child = ctypes.CDLL(None).syscall(57)
if child == 0:
    os._exit(0)
assert child > 0
"""
# A file that is ready sends a signal, of any number, to its owner.
OWN_SIGNALS = """
import fcntl, os
reader, writer = os.pipe()
fcntl.fcntl(reader, fcntl.F_SETOWN, os.getppid())
"""
LONGER_LIFE = """
import ctypes
assert ctypes.CDLL(None).prctl(1, 0, 0, 0, 0) == 0
"""
PARENT = """
import subprocess, sys, time
from gptc.files.bounded import launcher
folder, state = sys.argv[1:]
command = [*launcher('jail.py'), folder, '60', str(1 << 29), state]
jail = subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=(int(state),))
jail.stdin.write(b'token\\nimport time; time.sleep(60)')
jail.stdin.close()
time.sleep(60)
"""
LOWER = """
import resource
from gptc.files.sandbox import run_code
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
resource.setrlimit(resource.RLIMIT_NOFILE, (50, 50))
print(run_code('import math'))
"""
# The clean-up of Python before 3.12 recurses, and a folder may have no rights.
DEEP = """
import os
for _ in range(1100):
    os.mkdir('a')
    os.chdir('a')
os.mkdir('empty', 0)
os.mkdir('b', 0o300)
open('b/a', 'w')
"""
BIG_FILE = """
import errno
try:
    with open('a', 'wb', 0) as file:
        while True:
            file.write(bytes(1 << 20))
except OSError as error:
    assert error.errno == errno.EFBIG
"""


@pytest.mark.parametrize(
    "program",
    [
        "import collections, json, math, re, zlib\nassert math.gcd(4, 6) == 2",
        "open('a', 'w').write('x')\nassert open('a').read() == 'x'",
        "import os\nassert os.listdir('.') == [] and not os.environ",
        "import threading\nt = threading.Thread(target=print)\nt.start()\nt.join()",
        FORKS,
        BIG_FILE,
    ],
)
def test_what_a_program_may_do(program: str) -> None:
    assert run_code(program) == "passed"


@pytest.mark.parametrize(
    "program",
    [
        "assert 1 == 2",
        "def",
        "import os\nos._exit(0)",
        "raise SystemExit(0)",
        "bytearray(1 << 30)",
        "x = []\nwhile True: x.append(bytearray(1 << 24))",
        "import socket\nsocket.socket()",
        "import socket\nsocket.socketpair()",
        "import subprocess, sys\nsubprocess.run([sys.executable, '-c', ''])",
        "import os\nos.execv('/bin/true', ['true'])",
        "import os\nos.kill(os.getppid(), 0)",
        "import os\nos.kill(os.getpid(), 0)",
        "import resource\nresource.setrlimit(resource.RLIMIT_CPU, (99, 99))",
        "import os, resource\nresource.prlimit(os.getppid(), resource.RLIMIT_CORE)",
        "import os\nopen('a', 'w')\nos.chmod('a', 0o777)",
        SYSTEM_FORK,
        "open('/proc/self/environ').read()",
        "import os\nos.listdir('/home')",
        "import ctypes\nassert ctypes.CDLL(None).unshare(0x10000000) == 0",
        "[open(f'a{i}', 'w') for i in range(100)] and None",
        "import os\nopen('a', 'w')\nos.chown('a', os.getuid(), os.getgid())",
        "import os\nos.setpriority(os.PRIO_PROCESS, 0, 19)",
        "import os\nos.sched_setaffinity(0, os.sched_getaffinity(0))",
        "import os\nos.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))",
        OWN_SIGNALS,
        LONGER_LIFE,
        "import fcntl, os\nfcntl.ioctl(open(os.__file__), 0x80086601, bytearray(8))",
        "import os, sys\nos.listdir(sys.base_prefix)",
    ],
)
def test_what_a_program_must_not_do(program: str) -> None:
    assert run_code(program) == "failed"


def test_files_outside_the_folder_are_out_of_reach(tmp_path: Path) -> None:
    secret, link = tmp_path / "secret", tmp_path / "link"
    secret.write_text("x")
    link.symlink_to(secret)
    for action in (
        f"open({str(secret)!r}).read()",
        f"open({str(secret)!r}, 'w')",
        f"open({str(tmp_path / 'new')!r}, 'w')",
        f"import os; os.unlink({str(secret)!r})",
        f"import os; os.rename({str(secret)!r}, 'here')",
        f"import os; os.symlink({str(secret)!r}, 'a'); open('a').read()",
        f"import os; os.truncate({str(secret)!r}, 0)",
        f"import os; os.utime({str(link)!r}, (1, 1))",
        f"import os; os.mkdir({str(tmp_path / 'folder')!r})",
    ):
        assert run_code(action) == "failed", action
    assert secret.read_text() == "x"
    assert sorted(tmp_path.iterdir()) == [link, secret]
    assert secret.stat().st_mtime > 1


def test_a_loop_without_end_is_ended() -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert run_code("while True: pass", seconds=1) == "timed out"
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 5


def test_a_program_that_waits_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "_WAIT", 1)
    assert run_code("import time\ntime.sleep(60)", seconds=1) == "timed out"


def test_a_machine_that_is_too_busy_to_begin_is_no_lack(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "_WAIT", 1)
    waits = [sys.executable, "-I", "-S", "-c", "import time; time.sleep(60)"]
    monkeypatch.setattr(sandbox, "launcher", lambda name: waits)
    assert run_code("", seconds=1) == "timed out"


def test_a_program_ends_with_gptc(tmp_path: Path) -> None:
    """The other end of a pipe is closed when the last process that has it ends."""
    reader, writer = os.pipe()
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tmp_path), str(writer)], pass_fds=(writer,)
    )
    os.close(writer)
    assert os.read(reader, 100) == b"ready\n"
    parent.kill()
    parent.wait()
    assert os.read(reader, 100) == b""
    os.close(reader)


def test_limits_that_are_lower_already_stay() -> None:
    ran = subprocess.run([sys.executable, "-c", LOWER], capture_output=True, text=True)
    assert ran.stdout == "passed\n", ran.stderr


def test_a_deep_folder_on_disk_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the kernel does not let a process leave namespaces."""
    monkeypatch.setattr(sandbox.tempfile, "tempdir", str(tmp_path))
    _changed_jail(tmp_path, monkeypatch, "    leave_namespaces(folder)\n", "")
    try:
        assert run_code(DEEP) == "passed"
        assert [path.name for path in tmp_path.iterdir()] == ["jail.py"]
    finally:  # else it would break pytest's own clean-up
        subprocess.run(["rm", "-rf", *tmp_path.glob("gptc-code-*")], check=True)


def test_nothing_of_a_program_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox.tempfile, "tempdir", str(tmp_path))
    threads = threading.active_count()
    before = len(list(Path("/proc/self/fd").iterdir()))
    run_code("open('a', 'w').write('x')")
    assert not list(tmp_path.iterdir())
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    assert threading.active_count() == threads


def _changed_jail(folder: Path, monkeypatch: pytest.MonkeyPatch, old: str, new: str) -> None:
    real = Path(sandbox.__file__).with_name("jail.py").read_text()
    assert old in real
    jail = folder / "jail.py"
    jail.write_text(real.replace(old, new))
    launched = [sys.executable, "-I", "-S", str(jail)]
    monkeypatch.setattr(sandbox, "launcher", lambda name: launched)


@pytest.mark.parametrize("lack", ["syscall(446,", "prctl(22,"])
def test_a_kernel_without_a_means_runs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lack: str
) -> None:
    """The call of Landlock, or of seccomp, is one that no kernel has."""
    _changed_jail(tmp_path, monkeypatch, lack, lack.partition("(")[0] + "(9999,")
    mark = "it has begun"
    with pytest.raises(GptcError, match=r"cannot be run in a sandbox here \(\w+: .*leave out"):
        run_code(f"raise SystemError({mark!r})")
