"""torch's private names, as `storage` uses them: a line for each that is gone or has changed in this torch.

What is found here is mended in `storage/torch_private.py`.
"""

from __future__ import annotations

import ast
import contextlib
import io
import pickle
import sys
import threading
import zipfile
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint import metadata as dcp_metadata
from torch.distributed.checkpoint.filesystem import FileSystemWriter, _StorageInfo
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy
from torch.distributed.tensor import DTensor

import storage
from storage import torch_private
from tests.private_names import used_in

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
ROOM = Path(torch_private.__file__)


def broken(what: str, where: str) -> str:
    """The line that says what broke, and where it is used."""
    return f"torch {torch.__version__}: {what}, which storage/torch_private.py has for {where}"


@contextlib.contextmanager
def alone_in_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def names_in(value: object) -> set[tuple[str, str]]:
    """The names in the pickle of what `torch.save` makes of a value."""
    sink = io.BytesIO()
    torch.save(value, sink)
    with zipfile.ZipFile(sink) as archive:
        data = archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))
    return names_in_pickle(data)


def names_in_pickle(data: bytes) -> set[tuple[str, str]]:
    found = set()

    class Finder(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> object:
            found.add((module, name))
            return super().find_class(module, name)

        def persistent_load(self, pid: tuple[object, ...]) -> object:
            return torch.storage.TypedStorage(
                wrap_storage=torch.UntypedStorage(64), dtype=torch.float32, _internal=True
            )

    Finder(io.BytesIO(data)).load()
    return found


@pytest.mark.parametrize(
    ("name", "value", "where"),
    [
        ("REBUILD_TENSOR_V2", torch.ones(2), "values and stock items"),
        ("REBUILD_TENSOR_V3", torch.ones(2, dtype=torch.uint16), "values and stock items"),
        ("REBUILD_PARAMETER", nn.Parameter(torch.ones(2)), "values"),
    ],
)
def test_torch_save_names_what_makes_a_tensor(name: str, value: object, where: str) -> None:
    place = getattr(torch_private, name)
    assert place in names_in(value), broken(f"torch.save does not name {place}", f"{name}, {where}")


@pytest.mark.parametrize("name", ["GET_LAYOUT", "STORAGE_INFO", "MEMORY_FORMAT"])
def test_stock_metadata_names_its_classes(name: str, tmp_path: Path) -> None:
    dcp.save({"w": torch.ones(2)}, storage_writer=FileSystemWriter(tmp_path), no_dist=True)
    found, place = names_in_pickle((tmp_path / ".metadata").read_bytes()), getattr(torch_private, name)
    assert place in found, broken(f"DCP's metadata does not name {place}", f"{name}, format/dcp_metadata.py")


def test_a_contiguous_tensor_has_its_number_in_stock_metadata() -> None:
    value = dcp_metadata._MEM_FORMAT_ENCODING.TORCH_CONTIGUOUS_FORMAT.value
    assert value == torch_private.CONTIGUOUS_FORMAT, broken(
        f"that of a contiguous tensor is {value}", "CONTIGUOUS_FORMAT, format/dcp_pickle.py"
    )
    assert _StorageInfo.__name__ == torch_private.STORAGE_INFO[1]
    found = str(torch.strided)
    assert found == torch_private.STRIDED, broken(f"that of a dense layout is {found}", "STRIDED, format/dcp_pickle.py")


def test_a_state_dict_has_its_versions_in_an_attribute() -> None:
    told = nn.Linear(1, 1).state_dict().__dict__
    where = "STATE_DICT_VERSIONS, format/safe_pickle.py"
    assert [*told] == [torch_private.STATE_DICT_VERSIONS], broken(f"a state_dict has {[*told]}", where)


def test_extra_state_is_in_a_state_dict_under_its_name() -> None:
    class Module(nn.Module):
        def get_extra_state(self) -> object:
            return 1

    found = [*nn.Sequential(Module()).state_dict()]
    assert found == [f"0.{torch_private.EXTRA_STATE}"], broken(
        f"extra state is named {found}", "EXTRA_STATE, state/fit.py"
    )


def test_a_compiled_module_keeps_its_own_under_its_name() -> None:
    module = nn.Linear(1, 1)
    compiled = torch.compile(module)
    where = "COMPILED_MODULE, state/modules.py"
    assert getattr(compiled, torch_private.COMPILED_MODULE, None) is module, broken(
        "a compiled module keeps its own elsewhere", where
    )
    assert type(compiled).__name__ == "OptimizedModule", broken(
        f"a compiled module is a {type(compiled).__name__}", where
    )


def test_a_module_with_checkpointed_activations_keeps_its_own_under_its_name() -> None:
    found = [*checkpoint_wrapper(nn.Linear(1, 1, bias=False)).named_modules()][1][0]
    where = "CHECKPOINTED_MODULE, the advice of state/misfit.py"
    assert found == torch_private.CHECKPOINTED_MODULE, broken(f"the module inside is {found}", where)


def test_fsdp1_keeps_its_module_and_marks_its_parameters() -> None:
    with alone_in_group():
        wrapped = FullyShardedDataParallel(
            nn.Linear(2, 2), sharding_strategy=ShardingStrategy.NO_SHARD, device_id=torch.device("cpu")
        )
        (name, parameter), *_ = wrapped.named_parameters()
    where = "FSDP1_MODULE, the advice of state/misfit.py"
    assert name.startswith(torch_private.FSDP1_MODULE), broken(f"a parameter is {name}", where)
    where = "is_flattened_by_fsdp1, state/optimizers.py"
    assert torch_private.is_flattened_by_fsdp1(parameter), broken("a flat parameter has no mark", where)
    assert not torch_private.is_flattened_by_fsdp1(nn.Parameter(torch.ones(1)))


def test_a_tensor_of_zeros_without_memory_is_known() -> None:
    zeros = torch._efficientzerotensor((2,))
    where = "is_without_memory, arena/moves.py and loading/requests.py"
    assert torch_private.is_without_memory(zeros), broken("zeros without memory do not tell", where)
    assert not torch_private.is_without_memory(torch.zeros(2))


def test_the_changes_of_a_tensor_are_counted_with_those_of_its_views() -> None:
    weight = nn.Parameter(torch.ones(2, 2))
    seen = weight.detach()[0]
    before = torch_private.version_of(seen)
    with torch.no_grad():
        weight[1].mul_(2)
    where = "version_of, arena/changes.py"
    assert before is not None and torch_private.version_of(seen) != before, broken("a change is not counted", where)
    with torch.inference_mode():
        assert torch_private.version_of(torch.ones(1)) is None


def test_many_tensors_are_copied_by_one_call() -> None:
    sources = [nn.Parameter(torch.ones(2)), torch.arange(6).reshape(2, 3), torch.ones((), dtype=torch.bfloat16)]
    targets = [torch.zeros_like(source, requires_grad=False) for source in sources]
    torch_private.copy_all(targets, sources)
    where = "copy_all, arena/moves.py"
    assert all(map(torch.equal, targets, sources)), broken("tensors are not copied as they are", where)


def test_a_dtensor_tells_how_it_is_written() -> None:
    where = "MAKES_WRITE_ITEMS, saving/describe.py"
    assert hasattr(DTensor, torch_private.MAKES_WRITE_ITEMS), broken("a DTensor has no such method", where)


def test_the_shards_of_a_sharded_tensor_are_told() -> None:
    from torch.distributed._shard.metadata import ShardMetadata
    from torch.distributed._shard.sharded_tensor import Shard, init_from_local_shards

    part = torch.ones(2)
    with alone_in_group():
        shard = Shard(part, ShardMetadata([0], [2], "rank:0/cpu"))
        whole = init_from_local_shards([shard], 2)
        found = torch_private.shards_of(whole)
        chunks = torch_private.local_chunks(whole)
    where = "shards_of, saving/describe.py"
    assert found is not None and found[0].data_ptr() == part.data_ptr(), broken(
        "a ShardedTensor does not give its shards", where
    )
    assert [(*chunk.offsets, *chunk.sizes) for chunk in chunks] == [(0, 2)]
    assert torch_private.shards_of(part) is None


def test_the_box_of_a_tensor_is_told() -> None:
    (chunk,) = torch_private.local_chunks(torch.ones(2, 3))
    where = "local_chunks, loading/loadplan.py"
    assert (tuple(chunk.offsets), tuple(chunk.sizes)) == ((0, 0), (2, 3)), broken(
        f"the box of a tensor is {chunk}", where
    )


def test_an_optimizer_makes_its_state_and_no_step() -> None:
    parameter = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([parameter], lr=0.5)
    torch_private.init_optimizer_state(optimizer)
    where = "init_optimizer_state, state/optimizers.py"
    assert "exp_avg" in optimizer.state[parameter], broken("an optimizer has no state after it", where)
    assert parameter.tolist() == [1.0, 1.0], broken("the optimizer has moved its parameters", where)


def test_the_ranks_of_a_load_are_on_the_stack(tmp_path: Path) -> None:
    dcp.save({"w": torch.ones(2)}, storage_writer=FileSystemWriter(tmp_path), no_dist=True)
    found: list[object] = []

    class Reader(dcp.FileSystemReader):
        def read_metadata(self, *args: object, **kwargs: object) -> dcp_metadata.Metadata:
            frame = sys._getframe(1)
            while frame is not None:
                found.extend(filter(None, map(torch_private.ranks_of_dcp, list(frame.f_locals.values()))))
                frame = frame.f_back  # type: ignore[assignment]
            return super().read_metadata(*args, **kwargs)

    dcp.load({"w": torch.zeros(2)}, storage_reader=Reader(tmp_path), no_dist=True)
    assert (False, None) in found, broken(f"{found} is on the stack", "ranks_of_dcp, ranks/callers.py")


def test_the_thread_of_an_async_save_has_its_name(tmp_path: Path) -> None:
    names: list[str] = []

    class Writer(FileSystemWriter):
        def write_data(self, plan: object, planner: object) -> object:  # type: ignore[override]
            names.append(threading.current_thread().name)
            return super().write_data(plan, planner)  # type: ignore[arg-type]

    with alone_in_group():
        dcp.async_save({"w": torch.ones(2)}, storage_writer=Writer(tmp_path)).result(60)  # type: ignore[union-attr]
    where = "ASYNC_SAVE_THREAD, dcp/writer.py"
    assert names[0].startswith(torch_private.ASYNC_SAVE_THREAD), broken(
        f"async_save writes in a thread named {names}", where
    )


def test_the_process_of_async_save_runs_a_function_of_that_name() -> None:
    from torch.distributed.checkpoint._async_process_executor import _AsyncCheckpointProcess

    found = getattr(_AsyncCheckpointProcess, torch_private.ASYNC_SAVE_PROCESS, None)
    assert callable(found), broken("async_save's process runs another function", "ASYNC_SAVE_PROCESS, dcp/writer.py")


def test_how_long_a_groups_collectives_wait_is_told() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=timedelta(seconds=77))
    try:
        found = torch_private.timeout_s_of(None, torch.device("cpu"))
    finally:
        dist.destroy_process_group()
    assert found == 77, broken(f"a group that waits 77 s says {found}", "timeout_s_of, ranks/group.py")
    for backend in (object(), Mock(options=None)):  # somebody else's, and torch's own for tests
        group = Mock(_get_backend=Mock(return_value=backend))
        assert torch_private.timeout_s_of(group, torch.device("cpu")) is None


def test_every_name_of_the_room_has_a_canary() -> None:
    here = Path(__file__).read_text()
    names = [name for name in vars(torch_private) if name.isupper() or callable(vars(torch_private)[name])]
    names = [name for name in names if not name.startswith("_") and name != "TYPE_CHECKING" and name != "Sequence"]
    assert len(names) > 15
    assert not [name for name in names if name not in here]


def test_no_other_file_of_storage_has_such_a_name() -> None:
    """A private name there is of ours: some class or module of the package has it; and so is every text.

    `used_in` goes by what is imported from torch; attributes of a tensor, say, are found by being nobody's here.
    """
    assert used_in("storage") == []
    package = Path(storage.__file__).parent
    sources = {path: ast.parse(path.read_text()) for path in package.rglob("*.py") if path != ROOM}
    used = [(path, node) for path, tree in sources.items() for node in ast.walk(tree) if is_private(name_of(node))]
    ours = {name_of(node) for _, node in used if is_made(node)}
    ours |= {"_exit", "_getframe", "_register_atexit", "_strip_protocol"}  # Python's and fsspec's
    constants = [value for name, value in vars(torch_private).items() if name.strip("_").isupper()]
    theirs = {text for value in constants for text in (value if isinstance(value, tuple) else (value,))}
    found = [
        f"{path.relative_to(package)}:{node.lineno}: {name_of(node)}"  # type: ignore[attr-defined]
        for path, node in used
        if (name_of(node) in theirs if isinstance(node, ast.Constant) else name_of(node) not in ours)
    ]
    assert found == [], "these belong into storage/torch_private.py, with a canary here"


def name_of(node: ast.AST) -> str:
    """What a node names: a function or a class, a variable, an attribute, a module or what is in it, a text."""
    for field in ("attr", "id", "name", "value"):
        if isinstance(name := getattr(node, field, None), str):
            return name
    return ""


def is_made(node: ast.AST) -> bool:
    """Whether the node makes what it names."""
    if isinstance(node, ast.Attribute):
        return isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
    return isinstance(node, ast.FunctionDef | ast.ClassDef) or isinstance(getattr(node, "ctx", None), ast.Store)


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")
