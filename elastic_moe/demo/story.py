"""The demo told in sentences. Pure: records in, sentences out; the driver prints them as they happen."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from elastic_moe.demo.records import Record
from launcher import EventName
from launcher.reports import describe_mesh, sentence


class Story:
    """Hears the events of both nodes and of the driver, and the metrics, in the order of time.

    It remembers what a sentence needs from earlier records: who was killed and when, the rounds, how far each
    generation trained.
    """

    def __init__(self, start_ts: float) -> None:
        self._start_ts = start_ts
        self._kill: Record | None = None
        self._lost: set[str] = set()
        self._mesh: dict[str, int] | None = None
        self._last: Record | None = None
        self._tellers: dict[str, Callable[[Record], str | None]] = {
            EventName.NODE_JOINED: sentence,
            EventName.NODE_LOST: self._node_lost,
            EventName.ROUND_FORMED: self._formed,
            EventName.LIVE_STATE_CAPTURED: sentence,
            EventName.RESTORED: self._restored,
            EventName.STOP_REQUESTED: sentence,
            EventName.WORKER_FAILED: sentence,
            EventName.CHECKPOINT_FAILED: sentence,
            EventName.FINISHED: sentence,
            "demo_node_killed": self._killed,
            "demo_node_started": self._started,
        }

    def hear(self, event: Record) -> Iterator[str]:
        """Return what an event adds to the story: no sentence or one."""
        teller = self._tellers.get(event["event"])
        if teller and (sentence := teller(event)):
            yield self.stamped(event["ts"], sentence)

    def hear_metrics(self, record: Record) -> Iterator[str]:
        """As `hear`, for one line of the metrics: the first step of a generation ends an interruption."""
        last, self._last = self._last, record
        if last is None:
            sentence = f"training: step {record['step']}, loss {record['loss']:.3f}"
        elif record["generation"] != last["generation"]:
            sentence = self._resumed(record, last)
        else:
            return
        yield self.stamped(record["ts"], sentence)

    def stamped(self, ts: float, sentence: str) -> str:
        """A sentence of the story, with the seconds since its start."""
        # Node ids carry a suffix that is new with each start; the story's nodes have names.
        named = re.sub(r"\b(?:node )?(node-\d+)-[0-9a-f]{8}\b", r"\1", sentence)
        return f"{ts - self._start_ts:6.1f} s  {named}"

    def _started(self, event: Record) -> str:
        again = " again" if event["node"] in self._lost else ""
        return f"{event['node']} is started{again}"

    def _killed(self, event: Record) -> str:
        self._kill = event
        self._lost.add(event["node"])
        signal = {"killed": "SIGKILL", "frozen": "SIGSTOP"}[event["fault"]]
        return (
            f"{event['node']} is {event['fault']} whole ({signal}: its agent and"
            f" {count(event['num_workers'], 'worker')}) while step {event['step'] + 1} runs"
        )

    def _node_lost(self, event: Record) -> str:
        noticed = f", {event['ts'] - self._kill['ts']:.1f} s after it was {self._kill['fault']}" if self._kill else ""
        return sentence(event) + noticed

    def _formed(self, event: Record) -> str:
        before, self._mesh = self._mesh, event["mesh"]
        reason = event["reason"].partition(": its ")[0]  # the details were told with the loss itself
        formed = sentence({**event, "reason": reason, "mesh": None})
        if self._mesh is None:
            return formed
        planned = "mesh" if before is None else "mesh re-planned to" if before != self._mesh else "mesh still"
        batch = f"{count(self._mesh['rounds'], 'round')} of {count(self._mesh['micro_batch'], 'sample')} a rank"
        return f"{formed}; {planned} {describe_mesh(self._mesh)}, {batch}"

    def _restored(self, event: Record) -> str | None:
        return sentence(event) if event.get("rank", 0) == 0 and event["step"] else None

    def _resumed(self, record: Record, last: Record) -> str:
        again = last["step"] + 1 - record["step"]
        lost = f"{count(again, 'step')} done again" if again > 0 else "no step lost"
        if self._kill and last["generation"] == self._kill["generation"]:
            waited = f"{record['ts'] - self._kill['ts']:.1f} s after {self._kill['node']} was {self._kill['fault']}"
            lost = f"{count(max(0, again), 'step')} done again"
        else:
            waited = f"{record['ts'] - last['ts']:.1f} s after step {last['step']}"
        return f"training goes on: step {record['step']}, loss {record['loss']:.3f}, {waited}, {lost}"


def count(number: int, noun: str) -> str:
    """Write a number with its noun: `1 step`, `2 steps`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"
