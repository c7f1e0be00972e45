"""Prints, as one JSON object, what a script can see of the process that it runs in."""

# ruff: noqa: E402 (what is imported at the start is looked at first)
import sys

AT_START = sorted(sys.modules)

import atexit
import builtins
import faulthandler
import gc
import io
import json
import locale
import logging
import multiprocessing
import os
import pickle
import random
import resource
import signal
import subprocess
import tempfile
import threading
import traceback
import warnings

OF_STDLIB = {*sys.stdlib_module_names, "__mp_main__"}
NOT_STANDARD = [name for name in AT_START if name.partition(".")[0] not in OF_STDLIB]
METHODS = ("spawn", "forkserver", "fork") if "--children" in sys.argv else ()


class OfMain:
    """Pickled by name."""


def say_name(queue):
    queue.put((__name__, OfMain.__module__, sys.argv, os.environ.get("SET_BY_SCRIPT")))


def in_child(method):
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    child = context.Process(target=say_name, args=(queue,))
    child.start()
    told = queue.get(timeout=60)
    child.join(60)
    return [*told, child.exitcode]


def of_stream(stream):
    kind = [type(part).__name__ for part in (stream, stream.buffer)]
    return [
        *kind,
        stream.name,
        stream.mode,
        stream.encoding,
        stream.errors,
        stream.line_buffering,
        stream.write_through,
        stream.newlines,
        stream.isatty(),
        stream.fileno(),
    ]


def of_handler(handler):
    return handler.__name__ if callable(handler) else repr(handler)


def of_mask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def of_spec(spec):
    return spec and [spec.name, spec.origin, spec.cached, spec.parent, type(spec.loader).__name__]


def of_interpreter():
    return {
        "warnings": [[f[0], str(f[1]), f[2].__name__, str(f[3]), f[4]] for f in warnings.filters],
        "showwarning": warnings.showwarning.__module__,
        "logging": [repr(logging.root.handlers), logging.root.level, logging.getLogger("torch").handlers == []],
        "hooks": [
            sys.excepthook is sys.__excepthook__,
            sys.unraisablehook is sys.__unraisablehook__,
            threading.excepthook is threading.__excepthook__,
            sys.displayhook is sys.__displayhook__,
            sys.breakpointhook is sys.__breakpointhook__,
            sys.gettrace(),
            sys.getprofile(),
        ],
        "gc": [gc.isenabled(), gc.get_threshold(), gc.get_debug(), gc.callbacks],
        "gc_frozen": gc.get_freeze_count(),
        "atexit": atexit._ncallbacks(),
        "faulthandler": faulthandler.is_enabled(),
        "locale": [
            locale.setlocale(locale.LC_CTYPE),
            locale.setlocale(locale.LC_NUMERIC),
            locale.getpreferredencoding(),
        ],
        "encodings": [
            sys.getdefaultencoding(),
            sys.getfilesystemencoding(),
            sys.getfilesystemencodeerrors(),
            io.text_encoding(None),
        ],
        "recursion": sys.getrecursionlimit(),
        "depth": len(traceback.extract_stack()),
        "switch_interval": sys.getswitchinterval(),
        "int_digits": sys.get_int_max_str_digits(),
        "bytecode": [sys.dont_write_bytecode, sys.pycache_prefix],
        "temporary": tempfile.gettempdir(),
        "streams": {s: of_stream(getattr(sys, s)) for s in ("stdin", "stdout", "stderr")},
        "streams_kept": [sys.stdout is sys.__stdout__, sys.stderr is sys.__stderr__, sys.stdin is sys.__stdin__],
    }


def main():
    os.environ["SET_BY_SCRIPT"] = "yes"
    main_module = sys.modules["__main__"]
    first = [random.random()]
    seen = {
        "flags": list(sys.flags),
        "xoptions": sys._xoptions,
        "warnoptions": sys.warnoptions,
        "argv": sys.argv,
        "orig_argv": sys.orig_argv,
        "path": sys.path,
        "executable": [sys.executable, sys._base_executable, sys.prefix, sys.exec_prefix],  # type: ignore[attr-defined]
        "meta_path": [getattr(finder, "__name__", type(finder).__name__) for finder in sys.meta_path],
        "path_hooks": len(sys.path_hooks),
        "modules": NOT_STANDARD,
        "is_main": [main_module.__dict__ is globals(), sys.modules.get("__mp_main__") is main_module],
        "main": {
            k: repr(v)
            for k, v in globals().items()
            if k in ("__name__", "__doc__", "__package__", "__file__", "__cached__", "__annotations__")
        },
        "main_builtins": __builtins__ is builtins,
        "main_loader": type(__loader__).__name__,  # type: ignore[name-defined]
        "main_spec": of_spec(__spec__),
        "main_names": sorted(k for k in globals() if k.startswith("__")),
        "code_file": main.__code__.co_filename,
        "pickled": pickle.dumps(OfMain()).hex(),
        "threads": [[t.name, t.daemon] for t in threading.enumerate()],
        "os_threads": len(os.listdir("/proc/self/task")),
        "children": {method: in_child(method) for method in METHODS},
        "signals": {signum.name: of_handler(signal.getsignal(signum)) for signum in signal.Signals},
        "mask": [int(signum) for signum in signal.pthread_sigmask(signal.SIG_BLOCK, ())],
        "fds": sorted(
            os.readlink(f"/proc/self/fd/{fd}").partition(":[")[0]
            for fd in os.listdir("/proc/self/fd")
            if os.path.lexists(f"/proc/self/fd/{fd}")
        ),
        "inherited": subprocess.run(
            [sys.executable, "-c", "import os; print(sorted(os.listdir('/proc/self/fd')))"],
            capture_output=True,
            text=True,
            close_fds=False,
            check=True,
        ).stdout,
        "umask": of_mask(),
        "cwd": os.getcwd(),
        "limits": {
            name: resource.getrlimit(getattr(resource, name)) for name in dir(resource) if name[:7] == "RLIMIT_"
        },
        "niceness": [os.getpriority(os.PRIO_PROCESS, 0), sorted(os.sched_getaffinity(0))],
        "session": [os.getsid(0) == os.getpid(), os.getpgrp() == os.getpid()],
        "environment": dict(os.environ),
        "random_is_repeated": first == [random.Random(0).random()],
        "hash_seed": hash("a string"),
        **of_interpreter(),
        "typed": sys.stdin.read(),
    }
    if METHODS:  # they end with this process, a moment later
        from multiprocessing import forkserver, resource_tracker

        forkserver._forkserver._stop()  # type: ignore[attr-defined]
        resource_tracker._resource_tracker._stop()  # type: ignore[attr-defined]
    sys.stdout.flush()
    sys.stdout.buffer.write(json.dumps(seen, default=repr).encode() + b"\n")


if __name__ == "__main__":
    main()
