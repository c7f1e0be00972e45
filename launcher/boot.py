"""Between the agent and a worker's program: makes the kernel kill the worker when its agent dies, then becomes it.

Run as a script (`python -I -S boot.py AGENT_PID PROGRAM ARGS...`), it costs about 15 ms and imports nothing of ours.
PR_SET_PDEATHSIG outlives exec (prctl(2)), so that even `kill -9` of an agent leaves no orphan that trains on.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main(argv: "list[str]") -> None:
    """Ask for the signal, make sure that the agent did not die before, and exec."""
    agent_pid, program = int(argv[1]), argv[2:]
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        sys.exit(f"prctl: {os.strerror(ctypes.get_errno())}")
    if os.getppid() != agent_pid:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        os.execvp(program[0], program)
    except OSError as error:
        sys.exit(f"cannot run {program[0]}: {error.strerror}")


if __name__ == "__main__":
    main(sys.argv)
