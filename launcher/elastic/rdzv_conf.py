"""What `--rdzv-conf` may say, checked before anything starts."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from pydantic import Field, ValidationError

from launcher.errors import UsageError
from launcher.kv.options import StoreOptions
from launcher.rounds.membership import Rules
from launcher.rounds.policy import Limits

_EXPECTED = {
    "bool_parsing": "expected true or false",
    "int_parsing": "expected a whole number",
    "float_parsing": "expected a number of seconds",
    "finite_number": "expected a number of seconds",
}
"""What a value should have been, by the type of pydantic's error, where its own words are none for a user."""

_LEASE_TTL_S = 2.0
_BUCKET_LEASE_TTL_S = 4.0  # each renewal is a request that costs

_FROM_TORCHRUN = "rank"
"""torchrun's launcher puts its `--node-rank` among the values for a static rendezvous; nobody has written it."""


class RendezvousConf(StoreOptions):
    """`--rdzv-conf key=value,key=value`, with how the store is reached. Times are in seconds; torchrun's own names stay
    valid.
    """

    lease_ttl: float | None = Field(None, ge=1.0, le=600)
    """A node that is silent for this long is lost (default: 2; on a bucket 4). Its agent stops its workers before."""
    last_call: float = Field(2.0, ge=0, alias="last_call_timeout")
    """The first round, once it has min nodes, waits for so much quiet for more. Paid at the start only."""
    join_cooldown: float = Field(5.0, ge=0)
    """No round is interrupted for joiners before it is this old."""
    join_settle: float = Field(0.5, ge=0)
    """Joiners are taken in together once none has come for this long."""
    drain_settle: float = Field(0.5, ge=0)
    """After a node began to drain, the next round waits for so long for others that do."""
    timeout: float = Field(900.0, gt=0, alias="join_timeout")
    """A node waits this long for a round, a job this long for min nodes."""
    connect_timeout: float | None = Field(None, gt=0)
    """An endpoint that has not answered by then is reported (default: 10 embedded, 6 etcd3)."""
    stop_timeout: float = Field(60.0, gt=0)
    """A node whose workers have not stopped by then is left out of the next round."""
    yield_timeout: float = Field(300.0, gt=0)
    """Workers asked to stop at a step boundary have so long to reach one and save."""
    crash_loop: int = Field(6, ge=1)
    """So many failures in a row without progress end the job."""
    strikes: int = Field(3, ge=1)
    """So many failures that speak against a node, or departures of it, within `strike_window` exclude it."""
    strike_window: float = Field(600.0, gt=0)
    """See `strikes`."""
    exclusion: float = Field(300.0, ge=0)
    """A node is excluded for so long the first time, twice as long each further time, at most eight times as long."""
    zone: str = Field("", max_length=256)
    """Nodes of one zone get adjacent ranks, and copies of states in memory go to another one."""

    def lease_ttl_s(self, backend: str) -> float:
        """Return how long a node may be silent, by the store that its lease lies in."""
        return self.lease_ttl or (_BUCKET_LEASE_TTL_S if backend == "bucket" else _LEASE_TTL_S)

    def rules(self, min_nodes: int, max_nodes: int, max_restarts: int | None = None) -> Rules:
        """Return the rules by which a job of this configuration forms its rounds."""
        return Rules(
            min_nodes=min_nodes,
            max_nodes=max_nodes,
            last_call_s=self.last_call,
            join_cooldown_s=self.join_cooldown,
            join_settle_s=self.join_settle,
            drain_settle_s=self.drain_settle,
            max_restarts=max_restarts,
            limits=self.limits(),
            quorum_timeout_s=self.timeout,
            stop_timeout_s=self.stop_timeout,
        )

    def limits(self) -> Limits:
        """Return what concerns the restart policy."""
        return Limits(
            crash_loop=self.crash_loop,
            strikes=self.strikes,
            strike_window_s=self.strike_window,
            exclusion_s=self.exclusion,
        )

    @classmethod
    def parse(cls, given: Mapping[str, Any]) -> RendezvousConf:
        """Check what the user gave: strings, or what torchrun has made of them.

        Raises:
            UsageError: an unknown key, or a value that is missing, of another type or out of range.
        """
        by_alias = {field.alias: name for name, field in cls.model_fields.items() if field.alias}
        known = [*cls.model_fields, *by_alias]
        for key, value in given.items():
            if key in ("password", "token"):
                raise UsageError(
                    f"--rdzv-conf {key}: every user of a machine can read its command lines; use {key}_file"
                )
            if key not in (*known, _FROM_TORCHRUN):
                close = get_close_matches(key, known, n=1)
                hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(cls.model_fields)}"
                raise UsageError(f"--rdzv-conf {key}: no such key; {hint}")
            if value == "":
                raise UsageError(f"--rdzv-conf {key}=: a value is missing")
        named = {by_alias.get(key, key): value for key, value in given.items() if key != _FROM_TORCHRUN}
        try:
            return cls.model_validate(named, by_name=True)
        except ValidationError as error:
            first = error.errors()[0]
            why = _EXPECTED.get(first["type"], first["msg"].lower())
            raise UsageError(f"--rdzv-conf {first['loc'][0]}={first['input']}: {why}") from error

    @classmethod
    def parse_text(cls, text: str) -> RendezvousConf:
        """Check `key=value,key=value`, for commands that torchrun's parser does not read.

        Raises:
            UsageError: as `parse`, or the text is no list of pairs.
        """
        given = {}
        for pair in filter(None, (part.strip() for part in text.split(","))):
            key, equals, value = pair.partition("=")
            if not equals or not key.strip():
                raise UsageError(f"--rdzv-conf {pair}: expected KEY=VALUE,...")
            given[key.strip()] = value.strip()
        return cls.parse(given)
