"""What stands for a worker asks for it in few milliseconds, and says all of what the worker is to become."""

from __future__ import annotations

import os
import resource
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.frames import send_body
from launcher.workers import boot
from launcher.workers.fork_request import ForkRequest
from tests.cluster import until

_TELL = """
import sys
sys.path.append(sys.argv[1])
from launcher.workers import boot
print(*sys.modules)
"""
_ASK = """
import os, signal, socket, sys
sys.path.append(sys.argv[1])
from launcher.workers import boot
signal.signal(signal.SIGUSR2, signal.SIG_IGN)
os.umask(0o027)
body = boot._request([os.fsdecode(text) for text in eval(sys.argv[2])])
connection = socket.socket(fileno=int(sys.argv[3]))
socket.send_fds(connection, [boot._header(body)], [0, 1, 2])
connection.sendall(body)
"""
_HOME = os.path.dirname(os.path.dirname(os.path.dirname(boot.__file__)))
_ODD = [b"-u", b"", b"two words", b"line\nbreak", b"\xff\xfe", "ä€".encode(), b"1", b"="]


def test_it_imports_nothing_of_what_takes_long() -> None:
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", _TELL, _HOME], capture_output=True, text=True, check=True, timeout=60
    )
    found = set(done.stdout.split())
    assert "launcher.workers.tied" in found
    assert not found & {"enum", "json", "re", "signal", "socket", "contextlib", "launcher.environment"}


def test_a_request_says_all_that_a_worker_is_to_become(tmp_path: os.PathLike[str]) -> None:
    env = {b"PLAIN": b"1", b"EMPTY": b"", b"EQUAL": b"a=b=", b"BYTES": b"\xff\n\x01", b"LC_ALL": b"C.UTF-8"}
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours, theirs:
        ours.settimeout(60)
        subprocess.run(
            [sys.executable, "-I", "-S", "-c", _ASK, _HOME, repr(_ODD), str(theirs.fileno())],
            cwd=tmp_path,
            env=env,
            pass_fds=[theirs.fileno()],
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CORE, (0, 0)),
            check=True,
            timeout=60,
        )
        request = ForkRequest.receive(ours)
    for fd in request.fds:
        os.close(fd)
    assert [os.fsencode(argument) for argument in request.argv] == _ODD
    assert {os.fsencode(name): os.fsencode(value) for name, value in request.env.items()} == env
    assert os.path.samefile(request.cwd, tmp_path) and request.umask == 0o027
    assert (resource.RLIMIT_CORE, 0, 0) in request.limits
    assert signal.SIGUSR2 in request.ignored and signal.SIGTERM not in request.ignored


@pytest.mark.parametrize(
    "body",
    [b"", b"x", b"2\0only", b"-1", b"1\0a\0" + b"0\0" * 3, b"0\0" + b"0\0" + b"2\0/\0x\0" + b"0\0" + b"0"],
    ids=["empty", "no number", "too short", "negative", "no folder", "no umask"],
)
def test_what_is_no_request_is_refused_and_its_descriptors_are_closed(body: bytes) -> None:
    def num_open() -> int:
        return len(os.listdir("/proc/self/fd"))

    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours, theirs:
        before = num_open()
        socket.send_fds(theirs, [len(body).to_bytes(4, "big")], [0, 1, 2])
        theirs.sendall(body)
        with pytest.raises(ValueError):
            ForkRequest.receive(ours)
        assert num_open() == before


def handles(pid: int, signum: int) -> bool:
    """Whether a process has a handler for a signal; see proc_pid_status(5)."""
    (told,) = (row for row in Path(f"/proc/{pid}/status").read_text().splitlines() if row.startswith("SigCgt:"))
    return bool(int(told.split()[1], 16) >> (signum - 1) & 1)


@pytest.mark.parametrize("status", [0, 3 << 8, signal.SIGABRT])
def test_a_signal_that_comes_when_the_worker_has_just_ended_hides_not_how(tmp_path: Path, status: int) -> None:
    """The zygote has said it, and closed its connection, before what stands for the worker has read it."""
    ended = subprocess.Popen(["true"])
    ended.wait()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(tmp_path / "zygote"))
        listener.listen()
        listener.settimeout(60)
        with subprocess.Popen(boot.command(["python"], str(tmp_path / "zygote"))) as standing:
            try:
                connection, _ = listener.accept()
                with connection:
                    for fd in ForkRequest.receive(connection).fds:
                        os.close(fd)
                    # Where it has no descriptor of the worker, what it hears goes by the zygote.
                    send_body(connection, f"pid {ended.pid}".encode())
                    connection.shutdown(socket.SHUT_RD)
                    until("it passes signals on", lambda: handles(standing.pid, signal.SIGUSR2))
                    for signum in (signal.SIGTERM, signal.SIGUSR1):
                        standing.send_signal(signum)
                    send_body(connection, f"status {status}".encode())
                assert standing.wait(60) == os.waitstatus_to_exitcode(status)
            finally:
                standing.kill()
