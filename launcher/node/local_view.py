"""What an agent may ask of its node's state: whether its workers may run, should stop, and where it takes part."""

from __future__ import annotations

from launcher.drain.draining import DrainOrder
from launcher.node.board import Board
from launcher.node.registration import Registration
from launcher.rounds.records import SUCCEEDED, Breakage, Node, Round, Status


class LocalView:
    """Reads and changes nothing. All times are those of the engine's clock."""

    def __init__(self, node_id: str, board: Board, own: Registration) -> None:
        self._node_id = node_id
        self._board = board
        self._own = own

    def fenced(self, now_s: float) -> bool:
        """Whether this node must not run workers."""
        return self._own.fenced(now_s)

    def broken(self, generation: int, now_s: float) -> Breakage | None:
        """Why the workers of `generation` cannot go on, or None while they can."""
        if self.fenced(now_s):
            return Breakage("this node's lease ended", graceful=False)
        current = self._board.round
        if current is None or current.generation != generation:
            return Breakage("another round was formed", graceful=False)
        if current.outcome and current.outcome != SUCCEEDED:
            return Breakage(f"the job is closed: {current.outcome}", graceful=False)
        return current.broken

    @property
    def outcome(self) -> str:
        """How the job ended, "" while it has not."""
        return self._board.round.outcome if self._board.round else ""

    def is_spare(self, now_s: float) -> bool:
        """Whether a round runs well without this node."""
        current = self._board.round
        return (
            current is not None
            and current.place_of(self._node_id) is None
            and self.broken(current.generation, now_s) is None
        )

    def drain_order(self) -> DrainOrder | None:
        """The order that names this node."""
        return next((order for order in self._board.drain_orders.values() if self._node_id in order.node_ids), None)

    def invitation(self, now_s: float) -> Round | None:
        """A round of a generation that this node has not joined, in which it takes part, and which it may join now."""
        current = self._board.round
        if (
            current is None
            or current.outcome
            or current.broken
            or current.generation <= self._own.record.generation
            or current.place_of(self._node_id) is None
            or self.fenced(now_s)
            or self._own.store_silent(now_s)  # workers would be asked to yield at once, again and again
        ):
            return None
        return current

    def is_known(self, record: Node) -> bool:
        """Whether `record` says no more of this node than that its workers are being stopped, as all were told to."""
        current = self._board.round
        told = current.broken if current is not None and current.generation == record.generation else None
        is_told = told is not None and not told.graceful
        return is_told and record.status is Status.STOPPING and record.failure is None

    def all_stopped(self, generation: int) -> bool:
        """Whether no participant's workers of `generation` need another's any more; those of the only one never do."""
        current = self._board.round
        if current is None or current.generation != generation or len(current.participants) == 1:
            return True
        return current.broken is not None and current.broken.all_stopped

    def stop_requested(self, generation: int) -> str:
        """Why the workers of `generation` should stop at their next step boundary; "" if they should not."""
        current = self._board.round
        return current.stop if current and current.generation == generation else ""
