"""`make bench-metadata`: from a checkpoint's index in a store to every rank's plan, ours and stock DCP's in turn.

The index is of 1024 tensors of 256 shards each, 262,144 entries, as 256 ranks would have saved them; two processes of
gloo stand for two of 256 ranks that load it, and ask for one shard of each tensor. Ours is measured on a checkpoint of
ours and on one of stock DCP, including the broadcast and the exchange of what each rank needs; stock DCP on its own
checkpoint: each rank unpickles `.metadata` and lets DCP's planner plan. There is no data behind the index, only files
of the right size. Prints a table and writes JSON beside it.

Also what a commit of as many entries costs the coordinator, which is a rank in training: from the receipts of 8 ranks
in a local folder to a `.metadata` that is read back.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import gc
import json
import os
import pickle
import platform
import statistics
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo

from storage import open_store
from storage.format import layout
from storage.format.checksum import crc32c, pack_crcs
from storage.format.dcp_pickle import dump_metadata
from storage.format.dcp_view import metadata_of
from storage.format.index import Index, of_manifest
from storage.format.manifest import ItemEntry, ItemTable, Manifest, ObjectEntry, Receipt, TensorEntry, dump_manifest
from storage.loading.casts import Casts
from storage.loading.exchange import agree, learn_crcs
from storage.loading.loadplan import SafeLoadPlanner
from storage.loading.reading import Axis
from storage.loading.request_builder import reads_by_item, requests_of
from storage.ranks.agreement import AgreeingGroup
from storage.run import catalog
from storage.run.attempt import Attempt, StateContents, build_manifest
from storage.run.job import Origin
from storage.run.owner import Claim, Owner, claim
from storage.saving.commit import publish
from storage.saving.receipts import Patience, await_receipts, put_receipt
from storage.verified.source import Source
from tests.ranks import Ranks

NUM_TENSORS, NUM_SHARDS = 1024, 256
NUM_WRITERS = 8  # each of them wrote 32 shards of every tensor
ROWS, COLUMNS = 8, 512  # of a shard
ITEM_SIZE_BYTES = 704 + ROWS * COLUMNS * 4 + 873
ATTEMPT = "00000000-1111-2222-3333-444444444444"
OURS, OURS_ON_STOCK, DCP = "ours", "ours, stock checkpoint", "stock DCP"


def key_of(tensor: int) -> str:
    return f"model.layers.{tensor // 16}.mlp.experts.w{tensor % 16}.weight"


def draft() -> Manifest:
    """What the coordinator has gathered when it commits."""
    shape = (NUM_SHARDS * ROWS, COLUMNS)
    crcs = np.random.default_rng(0).integers(1 << 32, size=(NUM_SHARDS * NUM_TENSORS, 3)).tolist()
    items = [
        ItemEntry(
            key=key_of(tensor),
            offsets=(rank * ROWS, 0),
            sizes=(ROWS, COLUMNS),
            object=rank,
            offset=tensor * ITEM_SIZE_BYTES,
            length=ITEM_SIZE_BYTES,
            raw_offset=704,
            crc32c=crcs[rank * NUM_TENSORS + tensor][0],
            block_size_bytes=16384,
            block_crcs=pack_crcs(crcs[rank * NUM_TENSORS + tensor][1:]),
        )
        for rank in range(NUM_SHARDS)
        for tensor in range(NUM_TENSORS)
    ]
    names = [layout.data_name(ATTEMPT, rank, 0) for rank in range(NUM_SHARDS)]
    tensors = {
        key_of(t): TensorEntry(
            dtype="float32", shape=shape, path=("model", "layers", t // 16, key_of(t).split(".", 3)[3])
        )
        for t in range(NUM_TENSORS)
    }
    return Manifest(
        step=1,
        attempt=ATTEMPT,
        created_unix_s=0.0,
        world_size=NUM_SHARDS,
        generation=0,
        lineage="",
        mesh=None,
        metadata_size_bytes=0,
        metadata_crc32c=0,
        objects=tuple(ObjectEntry(name=name, size_bytes=NUM_TENSORS * ITEM_SIZE_BYTES, etag="") for name in names),
        tensors=tensors,
        values={},
        items=ItemTable.of(items),
    )


def objects_of(index: Index) -> dcp.Metadata:
    """The same in DCP's objects, as its own save makes them."""
    columns, state, places = index.columns, {}, {}
    for key, entry in metadata_of(index).state_dict_metadata.items():
        assert isinstance(entry, dcp.TensorStorageMetadata)
        state[key] = entry
        first = index.entries[key].first
        for number, chunk in enumerate(entry.chunks):
            name = index.objects[columns.object[first + number]].name.rpartition("/")[2]
            place = _StorageInfo(name, int(columns.offset[first + number]), int(columns.length[first + number]))
            places[dcp.MetadataIndex(key, chunk.offsets, number)] = place
    paths = {key: entry.path for key, entry in index.entries.items()}
    return dcp.Metadata(state, planner_data=paths, storage_data=places, version="1.0.0")  # type: ignore[arg-type]


def make(folder: Path) -> dict[str, Any]:
    """Both checkpoints; how long it took to write their `.metadata`, once all is gathered."""
    manifest = draft()
    began_s = time.process_time()
    index = of_manifest("", manifest)
    metadata = dump_metadata(index, ATTEMPT)
    ours_s = time.process_time() - began_s
    gc.collect()
    began_s = time.process_time()
    stock_metadata = pickle.dumps(objects_of(index))  # in a flat folder, as stock DCP has them
    stock_s = time.process_time() - began_s
    sums = {"metadata_size_bytes": len(metadata), "metadata_crc32c": crc32c(metadata)}
    sealed = dump_manifest(manifest.model_copy(update=sums))
    stock_objects = [entry.model_copy(update={"name": entry.name.rpartition("/")[2]}) for entry in manifest.objects]
    for name, data in ((OURS, metadata), (DCP, stock_metadata)):
        step = folder / name / layout.step_folder(1)
        for entry in manifest.objects if name == OURS else stock_objects:
            (step / entry.name).parent.mkdir(parents=True, exist_ok=True)
            with (step / entry.name).open("wb") as file:
                file.truncate(entry.size_bytes)
        (step / ".metadata").write_bytes(data)
        if name == OURS:
            (step / "manifest.json").write_bytes(sealed)
            (step / layout.manifest_name(ATTEMPT)).write_bytes(sealed)
    return {"write": {OURS: ours_s, DCP: stock_s}, "size_bytes": {OURS: len(metadata), DCP: len(stock_metadata)}}


def put_receipts(folder: str) -> None:
    """What 8 ranks leave in a run's folder before its coordinator commits."""
    manifest, rows = draft(), defaultdict(list)
    store, attempt = open_store(folder), Attempt.of_step(1, ATTEMPT, NUM_WRITERS)
    num_objects = NUM_SHARDS // NUM_WRITERS
    for entry in manifest.objects:
        path = Path(folder, attempt.prefix, entry.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            file.truncate(entry.size_bytes)
    for item in manifest.items.rows():
        rank, number = divmod(item.object, num_objects)
        rows[rank].append(dataclasses.replace(item, object=number))
    for rank, items in rows.items():
        objects = manifest.objects[rank * num_objects : (rank + 1) * num_objects]
        put_receipt(store, attempt, Receipt(rank=rank, attempt=ATTEMPT, objects=objects, items=ItemTable.of(items)))


def commit(folder: str, contents: StateContents) -> dict[str, float]:
    """Commit what lies in the folder; CPU seconds up to each stage, and the process's peak memory above its start."""
    store, attempt = open_store(folder), Attempt.of_step(1, ATTEMPT, NUM_WRITERS)
    held = Claim(store, claim(store, Owner(lineage="", generation=0, epoch=0, token=ATTEMPT))[0])
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here, see proc(5)
    before_mib, began_s = memory_mib("VmRSS"), time.process_time()
    receipts = await_receipts(store, attempt, Patience(time.monotonic() + 60, threading.Event()), held)
    read_s = time.process_time() - began_s
    manifest, metadata = build_manifest(attempt, Origin(), contents, receipts, 0.0)
    built_s = time.process_time() - began_s
    publish(store, attempt, manifest, metadata, held)
    cpu_s = time.process_time() - began_s
    return {"read_s": read_s, "built_s": built_s, "cpu_s": cpu_s, "peak_mib": memory_mib("VmHWM") - before_mib}


def commit_cost(repeats: int) -> list[dict[str, float]]:
    """`commit` in fresh processes, each of which has imported what a training has."""
    draft_of_all = draft()
    contents = StateContents(draft_of_all.tensors, draft_of_all.values)
    found = []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            for function, args in ((put_receipts, ()), (commit, (contents,))):
                ranks = Ranks()
                try:
                    found += ranks.run(function, folder, *args, world_size=1, timeout_s=600)
                finally:
                    ranks.close()
    return [cost for cost in found if cost is not None]


def memory_mib(name: str) -> float:
    """VmRSS or VmHWM of this process."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith(name + ":")).split()[1]) / 1024


def state_of(rank: int) -> dict[str, torch.Tensor]:
    """One shard of each tensor, without memory for the rest of it."""
    state = {}
    for tensor in range(NUM_TENSORS):
        value = torch.zeros(1).expand(NUM_SHARDS * ROWS, COLUMNS)
        shard = torch.zeros(ROWS, COLUMNS)
        chunk = dcp.ChunkStorageMetadata(torch.Size((rank * ROWS, 0)), torch.Size((ROWS, COLUMNS)))
        value.__create_chunk_list__ = functools.partial(list, [chunk])  # type: ignore[attr-defined]
        value.__get_tensor_shard__ = lambda index, shard=shard: shard  # type: ignore[attr-defined]
        state[key_of(tensor)] = value
    return state


def read_ours(url: str, state: dict[str, Any]) -> None:
    """What `Checkpointer.restore` does before it reads data."""
    group, store = AgreeingGroup(), open_store(url)
    prefix = layout.step_folder(1) + "/"
    index = group.share(lambda: catalog.open_commit(catalog.find_commit(store, prefix)), Index.load)
    assert index is not None and len(index) == NUM_TENSORS * NUM_SHARDS
    planner = SafeLoadPlanner(index)
    planner.set_up_planner(state, metadata_of(index), group.is_coordinator)
    reads = reads_by_item(index, planner.create_local_plan().items)
    source = Source(store, learn_crcs(group, index, reads))
    requests = requests_of(source, reads, planner, Casts())
    assert len(requests.places) == NUM_TENSORS
    axis = Axis(index)
    agree(group, requests, axis.blocks, axis.starts)


def read_stock(url: str, state: dict[str, Any]) -> None:
    """What `dcp.load` does before it reads data."""
    metadata = FileSystemReader(f"{url}/{layout.step_folder(1)}").read_metadata()
    planner = DefaultLoadPlanner()
    planner.set_up_planner(state, metadata, dist.get_rank() == 0)
    assert len(planner.create_local_plan().items) == NUM_TENSORS


def measure(folder: str, repeats: int) -> dict[str, list[tuple[float, float]]]:
    """(seconds, CPU seconds) of this rank, for each reader in turn."""
    state = state_of(17 + dist.get_rank())
    readers: dict[str, Callable[[], None]] = {
        OURS: lambda: read_ours(f"{folder}/{OURS}", state),
        OURS_ON_STOCK: lambda: read_ours(f"{folder}/{DCP}", state),
        DCP: lambda: read_stock(f"{folder}/{DCP}", state),
    }
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in readers}
    for _ in range(repeats):
        for name, read in readers.items():
            gc.collect()
            dist.barrier()
            began_s, cpu_s = time.perf_counter(), time.process_time()
            read()
            found[name].append((time.perf_counter() - began_s, time.process_time() - cpu_s))
    return found


def print_commit(costs: list[dict[str, float]]) -> None:
    read_s, built_s, cpu_s, peak_mib = (
        statistics.median(cost[name] for cost in costs) for name in ("read_s", "built_s", "cpu_s", "peak_mib")
    )
    stages = f"receipts {read_s:.2f}, manifest and .metadata {built_s - read_s:.2f}, publishing {cpu_s - built_s:.2f}"
    print(f"commit of {NUM_TENSORS * NUM_SHARDS} entries: {cpu_s:.2f} CPU s ({stages}), peak {peak_mib:.0f} MiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("out/bench-metadata.json"))
    args = parser.parse_args()
    machine = f"{os.cpu_count()} cores, torch {torch.__version__}, Python {platform.python_version()}"
    print(f"{machine}; {NUM_TENSORS * NUM_SHARDS} entries, {args.repeats} times each", flush=True)
    ranks = Ranks()
    try:
        with tempfile.TemporaryDirectory() as folder:
            written = make(Path(folder))
            by_rank = ranks.run(measure, folder, args.repeats, world_size=2, timeout_s=1200)
    finally:
        ranks.close()
    print(f"{'until planned':26}{'median s':>10}{'min':>8}{'max':>8}{'CPU s, rank 0':>15}{'rank 1':>8}{'ratio':>8}")
    # the slower rank of each run: nobody reads data before both have planned
    seconds = {name: [max(found[name][i][0] for found in by_rank) for i in range(args.repeats)] for name in by_rank[0]}
    for name, took in seconds.items():
        cpu = [statistics.median(run[1] for run in found[name]) for found in by_rank]
        ratio = statistics.median(seconds[DCP]) / statistics.median(took)
        row = f"{statistics.median(took):10.2f}{min(took):8.2f}{max(took):8.2f}{cpu[0]:15.2f}{cpu[1]:8.2f}{ratio:7.1f}x"
        print(f"{name:26}{row}")
    costs = commit_cost(args.repeats)
    print_commit(costs)
    for name, cpu_s in written["write"].items():
        print(f".metadata written by {name:14}{cpu_s:8.2f} CPU s, {written['size_bytes'][name] / 1e6:.0f} MB")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    results = {"machine": machine, "until_planned": by_rank, "commit": costs, **written}
    args.out.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
