"""Be the program that `python ARGV...` would be, with two things added: a signal on which it writes its Python stacks,
and a file for the exception that ends it.

The zygote runs a forked worker through `run`; a worker that starts cold is `python program.py STACKS ARGV...`, which
imports nothing but what every interpreter has loaded, so that a script's own modules come first, be they called `types`
or `json`. Either way the script cannot tell (`sys.argv`, `sys.orig_argv`, `__main__`, `sys.path`, tracebacks).

The signal is a real-time one, which scripts hardly use. `faulthandler` answers it from C, without the GIL: also when
the main thread waits in a collective, or spins in an extension. A script that installs a handler of its own for it
keeps that, and has no stacks written.

The exception goes to the file in which torch's `multiprocessing.errors.record` writes those of scripts that use it, in
its form; so the agent knows why a worker failed whether its script uses that or not.
"""

import _signal  # type: ignore[import-not-found]
import builtins
import faulthandler
import os
import sys
import time
from _frozen_importlib_external import SourceFileLoader, SourcelessFileLoader

TYPE_CHECKING = False
if TYPE_CHECKING:
    import types

STACKS_SIGNAL = _signal.SIGRTMIN + 7
ERROR_FILE_VARIABLE = "TORCHELASTIC_ERROR_FILE"
_ERROR_MAX_CHARS = 64 * 1024
_OWN_PACKAGES = ("elastic_moe", "launcher", "storage")
_HOME = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
_STDLIB = os.path.dirname(os.__file__)


def write_stacks_on_signal(path: str) -> None:
    """Write the stacks of all threads to the file `path`, which the agent made, at every `STACKS_SIGNAL`.

    The file is opened now: a process that hangs may be unable to open one.
    """
    try:
        fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        faulthandler.register(STACKS_SIGNAL, file=fd, all_threads=True, chain=False)
    except OSError:  # the agent says so when it finds no stacks
        pass


def run(argv: list[str]) -> None:
    """Run `[-u] SCRIPT ARGS...` or `[-u] -m MODULE ARGS...` as `__main__`."""
    sys.excepthook = _tell_error
    sys.orig_argv = [sys.executable, *argv]
    rest = argv[1:] if argv[0] == "-u" else argv
    main_module = type(sys)("__main__")
    main_module.__dict__.update(__builtins__=builtins, __annotations__={})
    sys.modules["__main__"] = main_module
    if "__mp_main__" in sys.modules:  # by multiprocessing: where what was pickled by name is looked for
        sys.modules["__mp_main__"] = main_module
    if rest[0] == "-m":
        sys.argv = ["-m", *rest[2:]]
        _set_first_path(os.getcwd())
        import runpy  # as the interpreter does, and no sooner

        runpy._run_module_as_main(rest[1])  # type: ignore[attr-defined]
    else:
        sys.argv = rest
        _run_script(rest[0], main_module)


def _set_first_path(folder: str) -> None:
    """Have modules beside the program come first, unless the interpreter was told otherwise (PYTHONSAFEPATH)."""
    if not sys.flags.safe_path:
        sys.path[0] = folder


def _run_script(given: str, main_module: "types.ModuleType") -> None:
    """Run a script as Python does; `runpy.run_path` would change `sys.argv[0]` or leave `__file__` relative."""
    path = given if os.path.isabs(given) else os.path.join(os.getcwd(), given.removeprefix("./"))
    if _is_archive(path):
        sys.path.insert(0, path) if sys.flags.safe_path else _set_first_path(path)
        import runpy

        runpy._run_module_as_main("__main__", False)  # type: ignore[attr-defined]
        return
    _set_first_path(os.path.dirname(os.path.realpath(path)))
    compiled = path.endswith(".pyc")
    loader = SourcelessFileLoader("__main__", path) if compiled else SourceFileLoader("__main__", path)
    main_module.__dict__.update(__file__=path, __cached__=None, __loader__=loader)
    if compiled:
        code = loader.get_code("__main__")
    else:
        with open(path, "rb") as file:
            code = compile(file.read(), path, "exec", dont_inherit=True)
    exec(code, main_module.__dict__)  # type: ignore[arg-type]


def _is_archive(path: str) -> bool:
    """Whether a path is a folder or a zip file with a `__main__.py`, which Python runs as well."""
    if os.path.isdir(path):
        return True
    import zipimport

    try:
        zipimport.zipimporter(path)
    except zipimport.ZipImportError:
        return False
    return True


def _tell_error(kind: type[BaseException], error: BaseException, traceback: "types.TracebackType | None") -> None:
    """Show an exception as Python does, from the script's first frame on: Python's own report would not have ours."""
    told, passed = traceback, False
    while told is not None and (not passed or told.tb_frame.f_code.co_filename == __file__):
        passed = passed or told.tb_frame.f_code.co_filename == __file__
        told = told.tb_next
    told = told or traceback
    _name_what_hides_ours(error)
    path = os.environ.get(ERROR_FILE_VARIABLE)
    if path and issubclass(kind, Exception):
        try:  # noqa: SIM105 (contextlib may be the script's)
            record_error(path, error.with_traceback(told))
        except Exception:  # noqa: BLE001 (the agent will say less, but stderr has it all)
            pass
    sys.__excepthook__(kind, error.with_traceback(told), told)


def _name_what_hides_ours(error: BaseException) -> None:
    """Add a note to an error of a script that has a `storage` of its own, and misses in it what ours has."""
    if isinstance(error, ImportError):
        name = error.name
    elif isinstance(error, AttributeError):
        name = getattr(error.obj, "__name__", None) if isinstance(error.obj, type(sys)) else None
    else:
        return
    root = name.partition(".")[0] if isinstance(name, str) else ""
    module = sys.modules.get(root)
    if root not in _OWN_PACKAGES or module is None:
        return
    spec = getattr(module, "__spec__", None)
    origin = getattr(spec, "origin", None) or ""
    if os.path.realpath(origin) != os.path.realpath(os.path.join(_HOME, root, "__init__.py")):
        error.add_note(
            f"{root!r} is {origin or module!r} in this process, which hides elastic-moe's own package "
            f"{os.path.join(_HOME, root)}. If the latter is wanted, rename the former, or move it into a package of "
            f"your own (`from yourpackage import {root}`)."
        )


def record_error(path: str, error: BaseException) -> None:
    """Write `error` to `path` unless there is one already. At once or not at all: the agent may read meanwhile.

    Raises:
        OSError: it cannot be written.
    """
    if os.path.exists(path):
        return
    json, tracebacks = _import_from_stdlib("json"), _import_from_stdlib("traceback")
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


def _import_from_stdlib(name: str) -> "types.ModuleType":
    """Import Python's own module of that name: the script may have others by that name, or by those of its imports."""
    found, path = dict(sys.modules), sys.path[:]
    standard = (_STDLIB, os.path.join(_STDLIB, "lib-dynload"))
    for loaded, module in found.items():
        origin = getattr(getattr(module, "__spec__", None), "origin", None)
        is_standard = loaded.partition(".")[0] in sys.stdlib_module_names and loaded != "__main__"
        if is_standard and isinstance(origin, str) and origin.endswith(".py") and not origin.startswith(_STDLIB):
            del sys.modules[loaded]
    sys.path[:] = [p for p in path if os.path.abspath(p) in standard] or standard
    try:
        return __import__(name)
    finally:
        sys.modules.update(found)
        sys.path[:] = path


if __name__ == "__main__":
    write_stacks_on_signal(sys.argv[1])
    run(sys.argv[2:])
