"""What the agent that runs a worker tells the Checkpointers in it, by environment variables.

It is the launcher's contract with its workers (`launcher.environment`), as far as it concerns checkpoints. Storage
imports no launcher and works under anything that sets these variables, so their names are spelled here once more.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

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
