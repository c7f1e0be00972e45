"""Be the program that `python ARGV...` would be, with one thing added: a signal on which it writes its Python stacks.

The zygote runs a forked worker through `run`; a worker that starts cold is `python program.py ARGV...`, which imports
nothing of ours, so that a script's own modules come first. Either way the script cannot tell (`sys.argv`, `__main__`,
`__file__`, `sys.path`, tracebacks).

The signal is a real-time one, which scripts hardly use. `faulthandler` answers it from C, without the GIL: also when
the main thread waits in a collective, or spins in an extension. A script that installs a handler of its own for it
keeps that, and has no stacks written.
"""

from __future__ import annotations

import builtins
import contextlib
import faulthandler
import importlib.machinery
import os
import runpy
import signal
import sys
import types

STACKS_SIGNAL = signal.SIGRTMIN + 7
STACKS_VARIABLE = "ELASTIC_MOE_STACKS"
_OWN_FRAMES = (__file__, "<frozen runpy>")


def write_stacks_on_signal() -> None:
    """Write the stacks of all threads to the file that the agent made, at every `STACKS_SIGNAL`; no file, no stacks.

    The file is opened now: a process that hangs may be unable to open one.
    """
    path = os.environ.get(STACKS_VARIABLE)
    if not path:
        return
    with contextlib.suppress(OSError):  # the agent says so when it finds no stacks
        fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        faulthandler.register(STACKS_SIGNAL, file=fd, all_threads=True, chain=False)


def run(argv: list[str]) -> None:
    """Run `[-u] SCRIPT ARGS...` or `[-u] -m MODULE ARGS...` as `__main__`."""
    sys.excepthook = _tell_error
    rest = argv[1:] if argv[0] == "-u" else argv
    if rest[0] == "-m":
        sys.argv = rest[1:]
        _set_first_path(os.getcwd())
        runpy.run_module(rest[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = rest
        _run_script(os.path.abspath(rest[0]))


def _set_first_path(folder: str) -> None:
    """Modules beside the program come first, unless the interpreter was told otherwise (PYTHONSAFEPATH)."""
    if not sys.flags.safe_path:
        sys.path[0] = folder


def _run_script(path: str) -> None:
    """What Python does with a script; `runpy.run_path` would change `sys.argv[0]` or leave `__file__` relative."""
    _set_first_path(os.path.dirname(os.path.realpath(path)))
    main_module = types.ModuleType("__main__")
    main_module.__file__ = path
    main_module.__loader__ = importlib.machinery.SourceFileLoader("__main__", path)
    main_module.__dict__["__builtins__"] = builtins
    sys.modules["__main__"] = main_module
    with open(path, "rb") as file:
        code = compile(file.read(), path, "exec", dont_inherit=True)
    exec(code, main_module.__dict__)


def _tell_error(kind: type[BaseException], error: BaseException, traceback: types.TracebackType | None) -> None:
    """Python's own way, from the script's first frame on: it would not have ours."""
    told, passed = traceback, False
    while told is not None and (not passed or told.tb_frame.f_code.co_filename in _OWN_FRAMES):
        passed = passed or told.tb_frame.f_code.co_filename == __file__
        told = told.tb_next
    told = told or traceback
    sys.__excepthook__(kind, error.with_traceback(told), told)


if __name__ == "__main__":
    write_stacks_on_signal()
    run(sys.argv[1:])
