"""Which job saves, as its claim on a run and its manifests say it."""

from __future__ import annotations

import json
import socket
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from storage.agent import AgentEnvironment, num_local_ranks, number_in
from storage.errors import UsageError
from storage.run.owner import Owner


@dataclass(frozen=True)
class Origin:
    """Who saves: recorded in the manifest, and claims the run. `rendezvous` is torchrun's `--rdzv-id`."""

    generation: int = 0
    lineage: str = ""
    mesh: dict[str, Any] | None = None
    run_id: str = ""
    rendezvous: str = ""

    def claimant(self) -> Owner:
        """A fresh claim of this process for the job; its epoch follows from the claim before."""
        return Owner(
            lineage=self.lineage,
            generation=self.generation,
            epoch=0,
            token=uuid.uuid4().hex,
            run_id=self.run_id,
            host=socket.gethostname(),
            rendezvous=self.rendezvous,
        )


@dataclass(frozen=True)
class JobIdentity:
    """What a script says of its job. Whatever is None is as the launcher, or torchrun, tells its workers.

    Args:
        lineage: the store in which generations are counted; jobs of one lineage are one job, restarted.
        generation: the number of this start of the job, >= 0. A lower one cannot take a run from a higher one.
        run_id: the job's name, for messages to people.
        mesh: a JSON object with the mesh of the ranks, for the manifest.
    """

    lineage: str | None = None
    generation: int | None = None
    run_id: str | None = None
    mesh: Mapping[str, Any] | None = None

    def resolve(self, env: Mapping[str, str]) -> Origin:
        """Complete it by the environment.

        Raises:
            UsageError: a generation or a mesh that is none, or a variable that is read later does not hold a number.
        """
        told = AgentEnvironment.from_env(env)
        number_in(env, "RANK")
        num_local_ranks(env)
        if self.generation is not None and not str(self.generation).isdecimal():
            raise UsageError(f"the generation is {self.generation!r}; it must be a whole number >= 0")
        from_env = number_in(env, AgentEnvironment.variable("generation")) if self.generation is None else 0
        mesh = _parse_mesh(told.mesh) if self.mesh is None and told.mesh else self.mesh
        if mesh is not None and not isinstance(mesh, Mapping):
            raise UsageError(f"the mesh is {mesh!r}; it must be an object with the mesh's fields")
        rendezvous = env.get("TORCHELASTIC_RUN_ID", "")
        return Origin(
            generation=from_env if self.generation is None else int(self.generation),
            lineage=told.lineage if self.lineage is None else self.lineage,
            mesh=None if mesh is None else dict(mesh),
            run_id=told.run_id or rendezvous if self.run_id is None else self.run_id,
            rendezvous=rendezvous,
        )


def _parse_mesh(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise UsageError(f"{AgentEnvironment.variable('mesh')} is not JSON: {text!r}") from None
