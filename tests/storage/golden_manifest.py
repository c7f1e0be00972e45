"""The manifest of the golden file."""

from __future__ import annotations

from pathlib import Path

from storage.format import layout
from storage.format.checksum import crc32c, pack_crcs
from storage.format.containers import Container
from storage.format.manifest import (
    ItemEntry,
    ItemTable,
    Manifest,
    ObjectEntry,
    Receipt,
    TensorEntry,
    ValueEntry,
)
from storage.run.attempt import Attempt, StateContents, build_manifest
from storage.run.job import Origin

GOLDEN = Path(__file__).with_name("golden_manifest.json")
ATTEMPT = "00000000-1111-2222-3333-444444444444"


def golden_manifest() -> Manifest:
    def item(key: str, offsets: tuple[int, ...] | None, at: int, rank_object: int) -> ItemEntry:
        sizes = None if offsets is None else (2, 3)
        crcs = pack_crcs([crc32c(key.encode())])
        return ItemEntry(
            key=key,
            offsets=offsets,
            sizes=sizes,
            object=rank_object,
            offset=at,
            length=1577,
            raw_offset=704 if sizes else 0,
            crc32c=crc32c(key.encode()),
            block_size_bytes=16384,
            block_crcs=crcs,
        )

    receipts = [
        Receipt(
            rank=rank,
            attempt=ATTEMPT,
            objects=(ObjectEntry(name=layout.data_name(ATTEMPT, rank, 0), size_bytes=size, etag=f"etag-{rank}"),),
            items=ItemTable.of(items),
        )
        for rank, size, items in (
            (0, 3154, (item("model.weight", (0, 0), 0, 0), item("step", None, 1577, 0))),
            (1, 1577, (item("model.weight", (2, 0), 0, 0),)),
        )
    ]
    contents = StateContents(
        tensors={"model.weight": TensorEntry(dtype="float32", shape=(4, 3), path=("model", "weight"))},
        values={"step": ValueEntry(path=("step",))},
        containers=(
            Container(path=("seen",), kind="Counter", keys=(("int", "3"), "3"), names=("3(int)", "3")),
            Container(path=("rows",), kind="defaultdict", factory="int"),
        ),
    )
    origin = Origin(generation=7, lineage="launch-a", mesh={"replicate": 1, "shard": 2, "expert": 1})
    manifest, _ = build_manifest(Attempt.of_step(120, ATTEMPT, 2), origin, contents, receipts, 1700000000.5)
    # the pickle's bytes belong to torch's version, not to this format
    return manifest.model_copy(update={"metadata_size_bytes": 1234, "metadata_crc32c": 567})
