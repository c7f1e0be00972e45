"""`PerRank`: what each rank has of its own."""

from __future__ import annotations

from typing import Any, Generic, TypeVar

T = TypeVar("T")


class PerRank(Generic[T]):
    """A part of the state that every rank has of its own: random state, a data loader's position.

    ::

        state = {"model": model, "rng": PerRank(torch.get_rng_state()), "loader": PerRank(loader)}

    `value` is anything that the state may hold elsewhere. A restore fills an object in place (a loader's
    `load_state_dict` is called), and puts anything else into `value`.

    Each rank gets what the rank of the same number saved. On another world size ranks beyond those that saved keep what
    they have, what ranks saved that are no more is left out, and an event (`per_rank_resized`) says so.
    """

    def __init__(self, value: T) -> None:
        self.value = value

    def __repr__(self) -> str:
        return f"PerRank({self.value!r})"


def is_per_rank(value: Any) -> bool:
    """Whether each rank has one of its own: a `PerRank`, or torchdata's StatefulDataLoader, which is one by nature."""
    return isinstance(value, PerRank) or any(
        kind.__name__ == "StatefulDataLoader" and kind.__module__.startswith("torchdata.")
        for kind in type(value).__mro__
    )
