"""Stands over one program: passes signals on, ends as it ends, and leaves nothing that it started.

`boot.py` runs a cold worker so, and `python -I -S guardian.py PARENT_PID PROGRAM ARGS...` is how the agent starts the
zygote. Orphans of the program become this process's children (`process_tree`). When the program has ended, what it
left is ended; when the parent dies, so does all of it, at once: a process that is killed with SIGKILL can clean up
nothing.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys

if __name__ == "__main__":  # started by path, without site packages
    sys.path.append(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

from launcher.workers import process_tree, tied

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType
    from typing import NoReturn

PARENT_DIED = signal.SIGRTMIN + 8


def run(program: list[str], parent_pid: int, prepare: Callable[[], None] = lambda: None) -> NoReturn:
    """Run `program` in a session of its own below this process, and end as it ends.

    `prepare` is called in the process that becomes the program.
    """

    def start() -> NoReturn:
        prepare()
        become(program)

    run_here(start, parent_pid)


def run_here(start: Callable[[], None], parent_pid: int) -> NoReturn:
    """Run `start`, and nothing after it, in a fork of this process; stand over that as `run` does."""
    from launcher.environment import Environment

    keep = Environment.from_env(os.environ).keep_children
    if not keep:
        process_tree.adopt_orphans()
    tied.die_with(parent_pid)
    own_pid = os.getpid()
    if os.getsid(0) != own_pid:
        os.setsid()  # neither Ctrl-C nor a signal to the agent's process group is for it
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, tied.PASSED_ON)  # until there is somebody to pass them on to
    pid = os.fork()  # before any handler: what is ignored here is ignored there
    if pid == 0:
        os.setsid()
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        tied.die_with(own_pid)
        start()
        sys.exit(0)
    os.closerange(3, 1024)  # the program's, whose ends somebody may wait for
    _stand_over(pid, parent_pid, mask, keep=keep)


def become(program: list[str]) -> NoReturn:
    """Become `program`; does not return."""
    try:
        os.execvp(program[0], program)
    except OSError as error:
        sys.exit(f"cannot run {program[0]}: {error.strerror}")


def _stand_over(pid: int, parent_pid: int, mask: set[int | signal.Signals], *, keep: bool) -> NoReturn:
    def pass_on(signum: int, _frame: FrameType | None) -> None:
        try:
            os.killpg(pid, signum)
        except ProcessLookupError:  # it has no group of its own yet; nobody has waited for it, so the pid is its
            os.kill(pid, signum)

    def parent_died(_signum: int, _frame: FrameType | None) -> None:
        if os.getppid() == parent_pid:
            return  # somebody's stray signal
        if keep:
            os.kill(pid, signal.SIGKILL)
        else:
            process_tree.end(_own, 0.0)
        os._exit(1)

    for handled in tied.PASSED_ON:
        signal.signal(handled, pass_on)
    signal.signal(PARENT_DIED, parent_died)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    tied.die_with(parent_pid, PARENT_DIED)
    while (ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT)) is None or ended.si_pid != pid:
        if ended:
            os.waitpid(ended.si_pid, 0)  # an orphan
    for handled in tied.PASSED_ON:  # before its pid can be another's
        signal.signal(handled, signal.SIG_IGN)
    _, status = os.waitpid(pid, 0)
    if not keep:
        found, left = process_tree.end(_own, process_tree.grace_after(status))
        if found:
            _tell(found, left)
    tied.end_as(status)


def _own() -> process_tree.ProcessesByPid:
    """Find the processes below this one, after the dead were taken from the process table."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return {}  # neither a child nor, since orphans come here, a descendant
    return process_tree.descendants([os.getpid()])


def _tell(ended: list[process_tree.Process], left: list[process_tree.Process]) -> None:
    """Tell what was left behind, on the worker's stderr, and in the agent's events if this is a worker's guardian."""
    rank = os.environ.get("RANK", "")
    who = f"rank {rank}" if rank else "the program"
    with contextlib.suppress(OSError):  # the console is gone
        os.write(2, f"{who} left processes behind, which are ended: {', '.join(map(str, ended))}\n".encode())
    from launcher.environment import Environment

    told = Environment.from_env(os.environ)
    if told.events:
        from launcher.events import EventName, append_event
        from launcher.text import name_some

        append_event(
            told.events,
            run_id=told.run_id,
            node=told.node,
            generation=told.generation,
            event=EventName.CHILDREN_ENDED,
            fields={
                "rank": int(rank or -1),
                "processes": name_some([*map(str, ended)]),
                "left": name_some([*map(str, left)]),
            },
        )


if __name__ == "__main__":
    run(sys.argv[2:], int(sys.argv[1]))
