"""The folder of a checkpoint, as `ShardReader` and `ShardWriter` hold it."""

from __future__ import annotations

import os
from typing import Any, ClassVar, Self

from storage.errors import UsageError
from storage.format import layout
from storage.stores.memory import MemoryStore
from storage.stores.objects import ObjectStore
from storage.stores.registry import as_url, has_store, open_store

Url = str | os.PathLike[str]


class CheckpointFolder:
    """A URL opened as the folder of a checkpoint: what readers and writers have in common.

    Its store is closed by `close`, or at the end of a `with`; DCP itself closes none. Pickled, it is its URL and its
    options: `AsyncCheckpointerType.PROCESS` sends its writer to another process.
    """

    _opened: ClassVar[tuple[str, ...]] = ("_store", "_run", "_prefix")
    _run: str | None = None
    """The URL of the open store."""

    def _open(self, url: object) -> None:
        text = as_url(url)
        run, prefix = layout.split_step_url(text)
        if run != self._run:
            store = open_store(run)
            self.close()
            self._store: ObjectStore = store
        self._url, self._run, self._prefix = text, run, prefix

    def close(self) -> None:
        """Let go of the store; `reset` opens it again."""
        if self._run is not None:
            self._run = None
            self._store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def checkpoint_id(self) -> str:
        """The URL."""
        return self._url

    def reset(self, checkpoint_id: Url | None = None) -> None:
        """Take another URL from now on; None for the same one anew. Raises BadURL."""
        self._open(self._url if checkpoint_id is None else checkpoint_id)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Url) -> bool:
        """Whether there is a store for that URL."""
        return has_store(checkpoint_id)

    def __getstate__(self) -> dict[str, Any]:
        if isinstance(self._store, MemoryStore):
            raise UsageError(f"{self._url} is the memory of this process; another one can neither read nor write it")
        return {name: value for name, value in self.__dict__.items() if name not in self._opened}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open(self._url)
