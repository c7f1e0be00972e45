"""Be the program that `python ARGV...` would be, with two things added: a signal on which it writes its Python stacks,
and a file for the exception that ends it.

The zygote runs a forked worker through `run`; a worker that starts cold is `python program.py ARGV...`, which imports
nothing of ours, so that a script's own modules come first. Either way the script cannot tell (`sys.argv`, `__main__`,
`__file__`, `sys.path`, tracebacks).

The signal is a real-time one, which scripts hardly use. `faulthandler` answers it from C, without the GIL: also when
the main thread waits in a collective, or spins in an extension. A script that installs a handler of its own for it
keeps that, and has no stacks written.

The exception goes to the file in which torch's `multiprocessing.errors.record` writes those of scripts that use it, in
its form; so the agent knows why a worker failed whether its script uses that or not.
"""

from __future__ import annotations

import builtins
import contextlib
import faulthandler
import importlib.machinery
import json
import os
import runpy
import signal
import sys
import time
import traceback as tracebacks
import types

STACKS_SIGNAL = signal.SIGRTMIN + 7
STACKS_VARIABLE = "ELASTIC_MOE_STACKS"
ERROR_FILE_VARIABLE = "TORCHELASTIC_ERROR_FILE"
_ERROR_MAX_CHARS = 64 * 1024
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
    path = os.environ.get(ERROR_FILE_VARIABLE)
    if path and issubclass(kind, Exception):
        with contextlib.suppress(OSError):  # the agent will say less, but stderr has it all
            record_error(path, error.with_traceback(told))
    sys.__excepthook__(kind, error.with_traceback(told), told)


def record_error(path: str, error: BaseException) -> None:
    """Write `error` to `path` unless there is one already. At once or not at all: the agent may read meanwhile.

    Raises:
        OSError: it cannot be written.
    """
    if os.path.exists(path):
        return
    told = {
        "message": {
            "message": f"{type(error).__name__}: {error}"[:_ERROR_MAX_CHARS],
            "extraInfo": {
                "py_callstack": "".join(tracebacks.format_exception(error))[-_ERROR_MAX_CHARS:],
                "timestamp": str(int(time.time())),
            },
        }
    }
    unfinished = f"{path}.{os.getpid()}"
    fd = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with open(fd, "w") as file:
        json.dump(told, file)
    os.replace(unfinished, path)


if __name__ == "__main__":
    write_stacks_on_signal()
    run(sys.argv[1:])
