"""What is known of a rank's part of a state in memory: its label, and its papers as a sealed document."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import Field, TypeAdapter, ValidationError

from storage.errors import Corrupt
from storage.format import layout
from storage.format.containers import Container
from storage.format.manifest import Receipt, TensorEntry, ValueEntry
from storage.format.sealed import Document, seal, unseal
from storage.run.attempt import Attempt, StateContents
from storage.run.job import Origin

_KIND = "part"
_NUM_RANKS_MAX = 1 << 20
_ID = r"^[0-9a-f-]{8,64}$"


class PartLabel(Document):
    """Whose part it is, and of which attempt at which state.

    `run` is the URL of the run as the rank that staged it has opened it. `is_all`: the rank has staged all that it
    holds, replicas of what others hold too, and not only what a save gives it to write. `has_contents`: its papers say
    what the whole state holds.
    """

    run: str
    lineage: str
    generation: int = Field(ge=0)
    step: int = Field(ge=0, lt=layout.STEP_LIMIT)
    attempt: str = Field(pattern=_ID)
    world_size: int = Field(ge=1, le=_NUM_RANKS_MAX)
    rank: int = Field(ge=0)
    size_bytes: int = Field(ge=0)
    healthy: bool = True
    is_all: bool = False
    has_contents: bool = False

    @property
    def age(self) -> tuple[int, int]:
        """What is larger is newer: a later generation has gone on from what it found, and its steps count."""
        return self.generation, self.step

    @property
    def of_attempt(self) -> Attempt:
        """The attempt that it is a part of."""
        return Attempt.of_step(self.step, self.attempt, self.world_size)


class Contents(Document):
    """`StateContents` as a document."""

    tensors: dict[str, TensorEntry]
    values: dict[str, ValueEntry]
    containers: tuple[Container, ...] = ()

    @classmethod
    def of(cls, contents: StateContents) -> Contents:
        """The document of those contents."""
        return cls(tensors=contents.tensors, values=contents.values, containers=contents.containers)

    @property
    def contents(self) -> StateContents:
        """What the document says."""
        return StateContents(self.tensors, self.values, self.containers)


class PartPapers(Document):
    """All that is known of a part but its bytes. `mesh` is that of the ranks, for the index."""

    label: PartLabel
    receipt: Receipt
    created_unix_s: float
    mesh: dict[str, Any] | None = None
    contents: Contents | None = None

    @property
    def origin(self) -> Origin:
        """Who has staged it."""
        return Origin(generation=self.label.generation, lineage=self.label.lineage, mesh=self.mesh)


def dump_papers(papers: PartPapers) -> bytes:
    """The bytes of the papers."""
    return seal(_KIND, papers)


def load_papers(data: bytes, name: str) -> PartPapers:
    """The papers in `data`; `name` is for messages. Raises Corrupt, also where label and receipt contradict."""
    papers = unseal(_KIND, PartPapers, data, name)
    label, receipt = papers.label, papers.receipt
    names = [layout.data_name(label.attempt, label.rank, number) for number in range(len(receipt.objects))]
    size_bytes = sum(entry.size_bytes for entry in receipt.objects)
    if (
        (receipt.rank, receipt.attempt, size_bytes) != (label.rank, label.attempt, label.size_bytes)
        or label.rank >= label.world_size
        or label.has_contents != (papers.contents is not None)
        or names != [entry.name for entry in receipt.objects]
        or receipt.items.object.max(initial=-1) >= len(names)
    ):
        raise Corrupt(f"{name} are not those of one part")
    return papers


_labels = TypeAdapter(tuple[PartLabel, ...])


def dump_labels(labels: Sequence[PartLabel]) -> bytes:
    """JSON for the way to others."""
    return _labels.dump_json(tuple(labels))


def load_labels(data: bytes, name: str) -> tuple[PartLabel, ...]:
    """Read what `dump_labels` wrote. Raises Corrupt."""
    try:
        return _labels.validate_json(data)
    except ValidationError as error:
        raise Corrupt(f"{name}: not a list of labels ({error.error_count()} errors)") from None
