"""The one shape of what runs for a while: made without effect, begun by `start`, ended by `close`."""

from __future__ import annotations

from typing import Self


class Closing:
    """Something that is closed when it is no longer used; as a context manager, at the end of the block."""

    def close(self) -> None:
        """Let go of what is held. It does nothing the second time."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Lifecycle(Closing):
    """Something that holds threads, processes or sockets between `start` and `close`; a context manager of both."""

    def start(self) -> None:
        """Begin. What `start` raises leaves nothing behind."""
        raise NotImplementedError

    def close(self) -> None:
        """End. It does nothing before `start`, and nothing the second time."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        self.start()
        return self
