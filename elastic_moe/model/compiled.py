"""Functions that torch.compile makes graphs of, for as long as it can."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch

from elastic_moe.model.compile_cache import without_torn
from elastic_moe.torch_private import compile_backward_at_once

_P = ParamSpec("_P")
_R = TypeVar("_R")
_REASON_LENGTH_MAX = 300


class Compiling:
    """Compiles functions of tensors whole, and has all of them run as they are once one of them cannot be.

    What is compiled at the first call may fail there for many reasons that are none of the model's: no compiler that
    works, no Python headers, no room in the cache of what was compiled. All functions of one object end so together,
    because what fails one of them takes its time to fail the next.
    """

    def __init__(
        self, backend: str | Callable[..., Any] = "inductor", on_failure: Callable[[str], None] | None = None
    ) -> None:
        """`on_failure` hears, once, in one line why nothing is compiled any more; without it that is raised."""
        self.backend = backend
        self.on_failure = on_failure
        self.has_failed = False
        compile_backward_at_once()

    def __call__(self, function: Callable[_P, _R]) -> Callable[_P, _R]:
        """`function`, compiled. It must be one that can be called again after a call that has failed."""
        compiled = torch.compile(function, backend=self.backend, fullgraph=True)

        def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            if self.has_failed:
                return function(*args, **kwargs)
            try:
                return compiled(*args, **kwargs)
            except Exception as error:
                if self.on_failure is None:
                    raise
                try:
                    return without_torn(lambda: compiled(*args, **kwargs), error)
                except Exception as last:  # noqa: BLE001 - the same
                    result = function(*args, **kwargs)  # whose own error is no failure of the compiler's
                    self.has_failed = True
                    self.on_failure(in_one_line(last))
                    return result

        return call


def in_one_line(error: BaseException) -> str:
    """What went wrong, of all that torch says of it: the line of a compiler that names an error, if there is one."""
    inner = getattr(error, "inner_exception", None) or error.__cause__ or error
    lines = [line.strip() for line in str(inner).splitlines() if line.strip()] or [""]
    line = next((line for line in lines if "error:" in line), lines[0])
    return f"{type(inner).__name__}: {line}"[:_REASON_LENGTH_MAX]
