"""Hides in a forked worker what the zygote has imported, until the script imports it.

`sys.modules` begins as in a new interpreter, but for the standard library; a package comes out of the stash with the
script's own `import` of it. So the first import of torch is seen, and with it whether the script has set variables
that torch reads only then: for torch in this process it is too late, and the worker starts again, cold.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import sys
import types
import warnings
from collections.abc import Callable
from importlib.machinery import ModuleSpec, PathFinder

from launcher.workers import paths


class Stash:
    """Holds modules by package and gives them to whoever imports them: the first finder of `sys.meta_path`."""

    def __init__(self, with_torch: frozenset[str], before: Callable[[str], None], seen: Callable[[], None]) -> None:
        """Take the modules out of `sys.modules`.

        Args:
            with_torch: the packages that `import torch` imports too.
            before: called with a package's name before it comes out, until torch has; may not return.
            seen: called with each import that `sys.modules` does not answer.
        """
        self._with_torch = with_torch
        self._before = before
        self._seen = seen
        self._torch_is_out = False
        self._packages: dict[str, dict[str, types.ModuleType]] = {}
        kept = {*sys.stdlib_module_names, *paths.modules_at_start, "__main__", "__mp_main__"}
        for name in list(sys.modules):
            package = name.partition(".")[0]
            if package not in kept:
                self._packages.setdefault(package, {})[name] = sys.modules.pop(name)
        # What never comes out is not taken apart at the end either: an interpreter needs a third of a second for torch.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._packages))
        known = logging.root.manager.loggerDict.values()
        self._loggers = [logger for logger in known if isinstance(logger, logging.Logger)]
        at_start = warnings.filters if paths.filters_at_start is None else paths.filters_at_start
        self._filters = [f for f in warnings.filters if f not in at_start]
        warnings.filters[:] = at_start  # type: ignore[index]
        _filters_mutated()

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        """As `importlib.abc.MetaPathFinder.find_spec`."""
        self._seen()
        module = self._packages.get(name.partition(".")[0], {}).get(name)
        if module is None:
            return None
        if "." not in name and self._is_hidden(name, module):
            self._packages.pop(name)
            return None
        spec = ModuleSpec(name, _Loader(self))  # type: ignore[arg-type]
        if (known := getattr(module, "__spec__", None)) is not None:
            spec.origin, spec.submodule_search_locations = known.origin, known.submodule_search_locations
            spec.has_location, spec.cached, spec.loader_state = known.has_location, known.cached, known.loader_state
        return spec

    def _is_hidden(self, name: str, module: types.ModuleType) -> bool:
        """Whether the script, which may have changed `sys.path`, would find another module by that name."""
        found, known = PathFinder.find_spec(name), getattr(module, "__spec__", None)
        return found is not None and known is not None and found.origin not in (None, known.origin)

    def take_out(self, name: str) -> types.ModuleType:
        """Put a module's whole package into `sys.modules`."""
        package = name.partition(".")[0]
        module = self._packages.get(package, {}).get(name)
        if module is None:  # a spec that was asked for before its package came out
            return sys.modules[name]
        if not self._torch_is_out:
            self._before(package)
        if package == "torch" and not self._torch_is_out:
            self._torch_is_out = True
            warnings.filters[:0] = self._filters  # type: ignore[index]
            _filters_mutated()
            rebind_log_handlers()
            for logger in self._loggers:
                logger.disabled = False  # by a configuration that they were not there for
            for other in self._with_torch:
                self._let_go(other)
        self._let_go(package)
        return module

    def _let_go(self, package: str) -> None:
        for name, module in self._packages.pop(package, {}).items():
            sys.modules.setdefault(name, module)


class _Loader:
    """Gives the module that is there already in place of the new one that the import system has made."""

    def __init__(self, stash: Stash) -> None:
        self._stash = stash

    def create_module(self, spec: ModuleSpec) -> None:
        """Leave it to the import system to make a module, which is thrown away."""

    def exec_module(self, module: types.ModuleType) -> None:
        """Put the known module into `sys.modules`: what is there afterwards is what `import` returns."""
        known = self._stash.take_out(module.__name__)
        module.__dict__.update(known.__dict__)
        sys.modules[module.__name__] = known


_stderr = sys.stderr


def rebind_log_handlers() -> None:
    """Give log handlers the present `sys.stderr`: torch's took that of the zygote when they were made."""
    loggers = [logging.root, *logging.root.manager.loggerDict.values()]
    for logger in loggers:
        for handler in getattr(logger, "handlers", ()):
            if getattr(handler, "stream", None) is _stderr:
                handler.stream = sys.stderr


def _filters_mutated() -> None:
    with contextlib.suppress(AttributeError):
        warnings._filters_mutated()  # type: ignore[attr-defined]
