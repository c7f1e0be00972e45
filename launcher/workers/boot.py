"""Between the agent and a worker's program.

`python -I -S boot.py AGENT_PID ZYGOTE_SOCKET PROGRAM ARGS...` (about 25 ms; imports nothing of ours) asks the zygote to
fork the worker and stands for it: passes signals on, ends as it ends. Without a zygote ("-", or one that refuses) it
becomes the program itself. Either way the kernel kills it when the agent dies: PR_SET_PDEATHSIG outlives exec
(prctl(2)), and the zygote kills a worker whose boot is gone. So even `kill -9` of an agent leaves nobody training.
"""

import ctypes
import json
import os
import resource
import signal
import socket
import struct
import sys

_PR_SET_PDEATHSIG = 1
_ZYGOTE_TIMEOUT_S = 120.0
_PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)


def main(argv: "list[str]") -> None:
    """Tie this process to its agent, then run the program warm if that can be, else cold."""
    agent_pid, zygote, program = int(argv[1]), argv[2], argv[3:]
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        sys.exit(f"prctl: {os.strerror(ctypes.get_errno())}")
    if os.getppid() != agent_pid:
        os.kill(os.getpid(), signal.SIGKILL)
    if zygote != "-":
        try:
            connection = _ask(zygote, program[1:])
        except OSError as error:
            print(f"started cold: {error}", file=sys.stderr)
        else:
            _stand_for_worker(connection)
    if program[0] == sys.executable and "ELASTIC_MOE_STACKS" in os.environ:
        # A program that can write its stacks when it hangs; it runs the script as the interpreter would.
        after = 2 if program[1] == "-u" else 1
        program[after:after] = [os.path.join(os.path.dirname(os.path.abspath(__file__)), "program.py")]
    try:
        os.execvp(program[0], program)
    except OSError as error:
        sys.exit(f"cannot run {program[0]}: {error.strerror}")


def _ask(zygote: str, argv: "list[str]") -> "socket.socket":
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(_ZYGOTE_TIMEOUT_S)
    connection.connect(zygote)
    body = json.dumps({"argv": argv, "env": dict(os.environ), "cwd": os.getcwd()}).encode()
    socket.send_fds(connection, [struct.pack(">I", len(body))], [0, 1, 2])
    connection.sendall(body)
    answer = _receive(connection)
    if "pid" not in answer:
        raise OSError(answer.get("cold", "the zygote does not answer"))
    connection.settimeout(None)
    return connection


def _stand_for_worker(connection: "socket.socket") -> None:
    """Pass signals on until the worker ends, then end in the same way."""

    def pass_on(signum: int, _frame: object) -> None:
        body = json.dumps({"signal": signum}).encode()
        connection.sendall(struct.pack(">I", len(body)) + body)

    for handled in _PASSED_ON:
        signal.signal(handled, pass_on)
    status = int(_receive(connection).get("status", "9"))  # a zygote that is gone took its workers along
    if os.WIFEXITED(status):
        os._exit(os.WEXITSTATUS(status))
    signum = os.WTERMSIG(status)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # the worker has left its own core, if any
    signal.signal(signum, signal.SIG_DFL) if signum != signal.SIGKILL else None
    os.kill(os.getpid(), signum)


def _receive(connection: "socket.socket") -> "dict[str, str]":
    header = _exactly(connection, 4)
    if len(header) < 4:
        return {}
    body = _exactly(connection, struct.unpack(">I", header)[0])
    return dict(json.loads(body)) if body else {}


def _exactly(connection: "socket.socket", size_bytes: int) -> bytes:
    data = b""
    while len(data) < size_bytes:
        try:
            part = connection.recv(size_bytes - len(data))
        except OSError:
            return b""
        if not part:
            return b""
        data += part
    return data


if __name__ == "__main__":
    main(sys.argv)
