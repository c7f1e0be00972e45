"""Stands between the agent and a worker's program.

`python -I -S boot.py AGENT_PID ZYGOTE_SOCKET PROGRAM ARGS...` (about 10 ms) asks the zygote to fork the worker and
stands for it: passes signals on, ends as it ends. Without a zygote ("-", or one that refuses) it starts the program
itself and stands over it (`guardian`). Either way the worker dies when this process does, and that when the agent dies.
So even `kill -9` of an agent leaves nobody training.
"""

import _signal  # type: ignore[import-not-found]
import _socket  # see `tied`
import os
import resource
import select
import sys

if __name__ == "__main__":  # started by path, without site packages; ours come last
    sys.path.append(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

from launcher.workers import paths, tied

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from launcher.environment import Environment

_ZYGOTE_TIMEOUT_S = 120.0


def command(program: "Sequence[str]", zygote: str = "-") -> "list[str]":
    """The command line that runs `program` tied to this process: when this one dies, so does that."""
    return [sys.executable, "-I", "-S", __file__, str(os.getpid()), zygote, *program]


def main(argv: "list[str]") -> None:
    """Tie this process to its agent, then run the program warm if that can be, else cold."""
    paths.leave_folder_that_is_gone()
    agent_pid, zygote, program = int(argv[1]), argv[2], argv[3:]
    tied.die_with(agent_pid)
    if zygote != "-":
        try:
            connection = _ask(zygote, program[1:])
        except OSError as error:
            print(f"started cold: {error}", file=sys.stderr)
        else:
            _stand_for_worker(connection)
    stacks = _environment().stacks
    if program[:2] == [sys.executable, "-u"] and stacks:
        # A program that can write its stacks when it hangs; it runs the script as the interpreter would.
        here = os.path.dirname(os.path.abspath(__file__))
        program = [*program[:2], os.path.join(here, "program.py"), str(stacks), *program[1:]]
    from launcher.workers import guardian  # by cold workers only

    guardian.run(program, agent_pid, _claim)


def _environment() -> "Environment":
    from launcher.environment import Environment  # by cold workers only: it imports much

    return Environment.from_env(os.environ)


def _claim() -> None:
    """Tell the agent which process the worker is: it keeps its pid when it becomes its program."""
    if path := _environment().channel:
        from launcher.workers.channel import Channel

        try:
            Channel.attach(path, announce=False).claim()
        except (OSError, ValueError) as error:
            print(f"the agent is not told of pid {os.getpid()}: {error}", file=sys.stderr)


def _ask(zygote: str, argv: "list[str]") -> "_socket.socket":
    connection = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    connection.settimeout(_ZYGOTE_TIMEOUT_S)
    # A socket's address holds 107 bytes, and TMPDIR may be longer: the kernel looks from its folder on.
    folder = os.open(os.path.dirname(zygote), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        connection.connect(f"/proc/self/fd/{folder}/{os.path.basename(zygote)}")
    finally:
        os.close(folder)
    body = _request(argv)
    streams = b"".join(fd.to_bytes(4, sys.byteorder) for fd in (0, 1, 2))
    connection.sendmsg([_header(body)], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, streams)])
    connection.sendall(body)
    heard: list[int] = []
    worker: list[int] = []  # its pid and a descriptor of it, once they are known

    def pass_on(signum: int, _frame: object) -> None:
        try:
            if worker and not select.select([worker[1]], [], [], 0)[0] and os.getpgid(worker[0]) == worker[0]:
                os.killpg(worker[0], signum)  # the zygote may be busy for a second
                return
            heard.append(signum)
            body = b"%d" % signum
            connection.sendall(_header(body) + body)
        except OSError:
            pass  # the worker has just ended, and how is to be read from the connection; or the zygote is gone

    # From here on: the worker may run before its pid is told. What comes too early for it waits for it in the socket.
    before = {handled: _signal.signal(handled, pass_on) for handled in tied.PASSED_ON}
    word, text = _receive(connection)
    if word != "pid":
        for handled, handler in before.items():
            _signal.signal(handled, handler)
        for signum in heard:
            os.kill(os.getpid(), signum)
        raise OSError(text or "the zygote does not answer")
    connection.settimeout(None)
    try:
        worker += [int(text), os.pidfd_open(int(text))]
    except (OSError, AttributeError):  # it has ended, or this kernel or this Python has none: signals go by the zygote
        worker.clear()
    return connection


def _request(argv: "list[str]") -> bytes:
    """What a `ForkRequest` is made of: lists of texts, each after its length, and a NUL between any two."""
    umask = os.umask(0o077)
    os.umask(umask)
    limits = sorted(getattr(resource, name) for name in dir(resource) if name.startswith("RLIMIT_"))
    lists = (
        [os.fsencode(argument) for argument in argv],
        [name + b"=" + value for name, value in os.environb.items()],
        [os.getcwdb(), b"%d" % umask],
        [b"%d %d %d" % (which, *resource.getrlimit(which)) for which in dict.fromkeys(limits)],
        [b"%d" % s for s in sorted(_signal.valid_signals()) if _signal.getsignal(s) == _signal.SIG_IGN],
    )
    return b"\0".join(text for texts in lists for text in (b"%d" % len(texts), *texts))


def _stand_for_worker(connection: "_socket.socket") -> None:
    """Wait until the worker ends; then end in the same way."""
    word, text = _receive(connection)
    tied.end_as(int(text) if word == "status" else int(_signal.SIGKILL))  # a zygote that is gone took its workers along


def _receive(connection: "_socket.socket") -> "tuple[str, str]":
    """The zygote's next word, and what it says with it; nothing where it is gone."""
    header = _exactly(connection, 4)
    body = _exactly(connection, int.from_bytes(header, "big")) if len(header) == 4 else b""
    word, _, text = body.decode(errors="replace").partition(" ")
    return word, text


def _header(body: bytes) -> bytes:
    return len(body).to_bytes(4, "big")


def _exactly(connection: "_socket.socket", size_bytes: int) -> bytes:
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
