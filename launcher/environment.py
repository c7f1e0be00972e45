"""The environment variables that are the project's own. Nothing else in launcher or elastic_moe spells their names.

storage, which knows no launcher, reads those that concern checkpoints by itself: `storage/agent.py`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from launcher.errors import UsageError

_NUMBER = re.compile("[0-9]{1,18}")
_SHOWN_CHARS = 80


@dataclass(frozen=True)
class Environment:
    """What the variables hold; the field `run_id` is that of ELASTIC_MOE_RUN_ID, and so on.

    The agent sets all of them for its workers but the last two, which a user sets for agents and the command line.
    """

    prefix: ClassVar[str] = "ELASTIC_MOE_"
    """With which every name begins."""

    generation: int = 0
    """The number of the round, strictly growing within its lineage; 0 without an agent."""
    lineage: str = ""
    """The store in which generations are counted."""
    run_id: str = ""
    """The job's name, `--rdzv-id`."""
    node: str = ""
    """The id of the worker's node, as in events."""
    mesh: str | None = None
    """The round's `MeshPlan` as JSON, where the job has a planner."""
    channel: Path | None = None
    """The file by which this worker tells its progress (`launcher.workers.channel`)."""
    stacks: Path | None = None
    """The file into which this worker writes its Python stacks when the agent signals for them."""
    events: Path | None = None
    """The node's `events.jsonl`."""
    checkpoint: Path | None = None
    """The file in which a Checkpointer says what it has committed last."""
    zone: str = ""
    """The failure domain that the node is in, `--zone`."""
    address: str = ""
    """Under which other nodes reach the node."""
    service: Path | None = None
    """The socket of the node's checkpoint service."""
    keep_children: bool = False
    """Whether processes that workers have started may outlive them; a user may set it for an agent as well."""
    token: str | None = field(default=None, repr=False)
    """The secret that nodes share who meet at an embedded store."""
    etcd_password: str | None = field(default=None, repr=False)
    """The password of the etcd user whom `--rdzv-conf user=` names."""

    @classmethod
    def from_env(cls, env: Mapping[str, str]) -> Environment:
        """Read the variables; one that is not there, or empty, leaves its field at the default.

        Raises:
            UsageError: the generation is no whole number.
        """
        held = {f.name: text for f in dataclasses.fields(cls) if (text := env.get(cls.variable(f.name)))}
        return cls(
            generation=whole_number(env, cls.variable("generation")),
            lineage=held.get("lineage", ""),
            run_id=held.get("run_id", ""),
            node=held.get("node", ""),
            zone=held.get("zone", ""),
            address=held.get("address", ""),
            mesh=held.get("mesh"),
            **{
                name: Path(held[name])
                for name in ("channel", "stacks", "events", "checkpoint", "service")
                if name in held
            },
            keep_children="keep_children" in held,
            token=held.get("token"),
            etcd_password=held.get("etcd_password"),
        )

    def to_env(self) -> dict[str, str]:
        """The variables that hold this; none for what is None or False."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {
            self.variable(name): "1" if value is True else str(value)
            for name, value in fields.items()
            if value is not None and value is not False
        }

    @classmethod
    def variable(cls, name: str) -> str:
        """The name of the variable that a field stands for."""
        return f"{cls.prefix}{name.upper()}"


def whole_number(env: Mapping[str, str], variable: str, default: int = 0, *, at_least: int = 0) -> int:
    """The number that a variable of `env` holds; `default` where it is not there, or empty.

    Raises:
        UsageError: it holds anything else.
    """
    text = env.get(variable, "").strip() or str(default)
    if not _NUMBER.fullmatch(text) or int(text) < at_least:
        raise UsageError(f"{variable} is {env[variable][:_SHOWN_CHARS]!r}; it must be a whole number >= {at_least}")
    return int(text)
