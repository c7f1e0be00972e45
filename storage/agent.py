"""What the agent that runs a worker tells the Checkpointers in it, by environment variables.

It is the launcher's contract with its workers (`launcher.environment`), as far as it concerns checkpoints. Storage
imports no launcher and works under anything that sets these variables, so their names are spelled here once more.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass

from storage.errors import UsageError

_NUMBER = re.compile("[0-9]{1,18}")
_SHOWN_CHARS = 80
PREFIX = "ELASTIC_MOE_"


@dataclass(frozen=True)
class AgentEnvironment:
    """The texts of the variables, each named by its field; "" for one that is not set."""

    generation: str = ""
    lineage: str = ""
    run_id: str = ""
    node: str = ""
    mesh: str = ""
    """A JSON object."""
    events: str = ""
    """Path of the file to which events are appended."""
    checkpoint: str = ""
    """Path of the file that says which checkpoint was committed last."""
    zone: str = ""
    """The failure domain that the node is in, as whoever launched it says."""
    address: str = ""
    """Under which other nodes reach the node."""
    service: str = ""
    """Path of the socket of this node's checkpoint service."""

    @classmethod
    def from_env(cls, env: Mapping[str, str]) -> AgentEnvironment:
        """Read the variables."""
        return cls(**{f.name: env.get(cls.variable(f.name), "") for f in dataclasses.fields(cls)})

    def variables(self) -> dict[str, str]:
        """The variables that are set."""
        return {self.variable(f.name): value for f in dataclasses.fields(self) if (value := getattr(self, f.name))}

    @staticmethod
    def variable(name: str) -> str:
        """The name of the variable that a field stands for."""
        return f"{PREFIX}{name.upper()}"


def number_in(env: Mapping[str, str], variable: str, default: int = 0, *, at_least: int = 0) -> int:
    """The number that a variable of `env` holds; `default` where it is not there, or empty.

    Raises:
        UsageError: it holds anything else.
    """
    text = env.get(variable, "").strip() or str(default)
    if not _NUMBER.fullmatch(text) or int(text) < at_least:
        raise UsageError(f"{variable} is {env[variable][:_SHOWN_CHARS]!r}; it must be a whole number >= {at_least}")
    return int(text)


def num_local_ranks(env: Mapping[str, str]) -> int:
    """How many ranks a launcher has started on this node together. Raises UsageError, as above."""
    return number_in(env, "LOCAL_WORLD_SIZE", 1, at_least=1)
