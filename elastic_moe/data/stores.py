"""What the file systems of others raise, beside `OSError`. No torch."""

from __future__ import annotations

import sys

_OF_STORES = frozenset({"asyncio", "concurrent", "http", "socket", "ssl", "tarfile", "urllib", "xml", "zipfile"})
"""Of the standard library: what speaks with servers, and reads what they answer and archives hold."""
_OF_MISTAKES = (sys.stdlib_module_names - _OF_STORES) | {
    *("builtins", "elastic_moe", "launcher", "storage"),
    *("numpy", "pydantic", "torch"),
}


def tells_of_a_store(error: Exception) -> bool:
    """Whether an error is of a class that a store's library has made: botocore's and aiohttp's are no `OSError`.

    Python's own, and ours, tell of mistakes in the code, and need their traceback.
    """
    return type(error).__module__.partition(".")[0] not in _OF_MISTAKES
