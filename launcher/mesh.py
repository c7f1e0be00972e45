"""Which device mesh a world of a given size trains on. Pure: no torch, no clocks, no processes.

A world of W slots is laid out as ``replicate x shard x expert`` ranks (HSDP x FSDP x expert parallelism) and
``idle`` slots without a worker:

- dense parameters are sharded over ``shard * expert`` ranks and held ``replicate`` times;
- the experts are split ``expert`` ways, each part sharded over ``shard`` ranks, and held ``replicate`` times.
"""

from __future__ import annotations

import dataclasses
import json


@dataclasses.dataclass(frozen=True, slots=True)
class MeshPlan:
    """The mesh of one generation, and how its ranks share the global batch.

    Every rank runs ``rounds`` forward and backward passes of ``micro_batch`` samples a step, so
    ``micro_batch * rounds * world_size`` is at least the global batch; samples beyond it are padding of weight 0.
    """

    replicate: int
    shard: int
    expert: int
    idle: int
    micro_batch: int
    rounds: int

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name == "idle" else 1
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"MeshPlan.{field.name} is {value!r}; it must be a whole number >= {least}")

    @property
    def world_size(self) -> int:
        """How many ranks train; idle slots are not among them."""
        return self.replicate * self.shard * self.expert

    def to_json(self) -> str:
        """One line of JSON with every field: what ``ELASTIC_MOE_MESH`` carries."""
        return json.dumps(dataclasses.asdict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> MeshPlan:
        """The plan that `to_json` wrote. Raises ValueError when the text is not one."""
        try:
            fields = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"not a mesh plan: {error}") from None
        names = [field.name for field in dataclasses.fields(cls)]
        if not isinstance(fields, dict) or sorted(fields) != sorted(names):
            raise ValueError(f"not a mesh plan: expected an object with {', '.join(names)}")
        return cls(**fields)

    def __str__(self) -> str:
        idle = f", {self.idle} idle" if self.idle else ""
        return f"replicate {self.replicate} x shard {self.shard} x expert {self.expert}{idle}"
