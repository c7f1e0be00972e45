"""torch's private names, as elastic_moe uses them: a line for each that is gone or has changed in this torch.

What is found here is mended in `elastic_moe/torch_private.py`.
"""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from tests.private_names import used_in
from tests.ranks import Ranks


def there_and_back() -> tuple[list[float], list[float]]:
    """Rank 0 sends one row to itself and two to rank 1, which sends nothing; what this rank receives, and gradients."""
    from elastic_moe.torch_private import exchange_rows

    rank, group = dist.get_rank(), dist.group.WORLD
    assert group is not None
    send, receive = ([1, 2], [1, 0]) if rank == 0 else ([0, 0], [2, 0])
    x_RD = torch.arange(1.0, 1.0 + sum(send)).reshape(-1, 1).requires_grad_()
    received_QD = exchange_rows(x_RD, send, receive, group)
    (received_QD * (rank + 1)).sum().backward()
    return received_QD.flatten().tolist(), [] if x_RD.grad is None else x_RD.grad.flatten().tolist()


def test_rows_are_exchanged_and_their_gradients_come_back(ranks: Ranks) -> None:
    changed = f"torch {torch.__version__}: all_to_all_single_autograd has changed, by which AllToAllDispatch sends rows"
    assert ranks.run(there_and_back, world_size=2) == [([1.0], [1.0, 2.0, 2.0]), ([2.0, 3.0], [])], changed


def test_onednn_multiplies_matrices_that_lie_transposed_as_well() -> None:
    from elastic_moe.torch_private import onednn_linear

    changed = f"torch {torch.__version__}: mkldnn::_linear_pointwise has changed, by which fp32 experts go on the CPU"
    draw = torch.Generator().manual_seed(0)
    x, weight = torch.randn(24, 40, generator=draw), torch.randn(56, 40, generator=draw)
    for rows, matrix in ((x, weight), (x.T.contiguous().T, weight.T.contiguous().T), (x[:, :16], weight[:, :16])):
        torch.testing.assert_close(onednn_linear(rows, matrix), rows @ matrix.T, msg=changed)


def test_the_folders_of_compiled_graphs_are_where_torch_has_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._inductor.codecache import _HEADER_DIR, get_path
    from torch._inductor.runtime.cache_dir_utils import cache_dir, default_cache_dir

    from elastic_moe.torch_private import COMPILE_CACHE, compile_caches

    changed = f"torch {torch.__version__}: cache_dir has changed, in which files are torn where a compiler is killed"
    monkeypatch.delenv(COMPILE_CACHE, raising=False)
    assert compile_caches() == [default_cache_dir()], changed
    assert f"{default_cache_dir()}/precompiled_headers" == _HEADER_DIR, changed
    monkeypatch.setenv(COMPILE_CACHE, str(tmp_path))
    assert compile_caches() == [cache_dir(), default_cache_dir()] == [str(tmp_path), default_cache_dir()], changed
    assert get_path("cab.main", "so")[2] == str(tmp_path / "ab" / "cab.main.so"), changed


def test_what_has_failed_to_compile_is_made_again() -> None:
    from torch._inductor.codecache import CppCodeCache

    from elastic_moe.torch_private import forget_compiled

    changed = f"torch {torch.__version__}: clear_caches has changed, after which a header that was torn is made again"
    CppCodeCache.cache["of a test"] = lambda: torch
    forget_compiled()
    assert "of a test" not in CppCodeCache.cache, changed


class NotingSeat:
    """Places by the parameter's number, and what was heard in which order."""

    def __init__(self) -> None:
        self.places: dict[int, torch.Tensor] = {}
        self.heard = ""

    def place(self, index: int, num: int, dtype: torch.dtype) -> torch.Tensor:
        self.places[index] = torch.zeros(num, dtype=dtype)
        return self.places[index]

    def take(self) -> None:
        self.heard += "("

    def leave(self) -> None:
        self.heard += ")"


def gathered_where_told(world_size: int) -> tuple[str, bool]:
    """What was heard of gathering, and whether two parameters were gathered there, twice, and not freed between."""
    from elastic_moe.torch_private import gather_into

    linear = torch.nn.Linear(4, 4)
    unit = fully_shard(linear, mesh=init_device_mesh("cpu", (world_size,)))
    unit.set_gradient_divide_factor(1.0)
    unit.set_force_sum_reduction_for_comms(True)  # gloo cannot average
    seat = NotingSeat()
    gather_into(unit, seat)
    for _ in range(2):
        linear(torch.ones(2, 4)).sum().backward()
    held = [seat.places[index].untyped_storage().size() for index in range(2)]
    whole = [param.full_tensor().flatten() for param in linear.parameters() if isinstance(param, DTensor)]
    same = all(torch.equal(seat.places[index], value) for index, value in enumerate(whole))
    return seat.heard, same and held == [4 * 16, 4 * 4]


@pytest.mark.parametrize("world_size", [1, 2])
def test_parameters_are_gathered_where_they_are_told_to(ranks: Ranks, world_size: int) -> None:
    """Each time both are heard of before, and after they were given up; this unit is gathered once a round."""
    changed = f"torch {torch.__version__}: FSDPParam has changed, by which layers are gathered into memory that stays"
    found = ranks.run(gathered_where_told, world_size, world_size=world_size)
    assert found == [("(())" * 2, True)] * world_size, changed


def waited_s(timeout_s: float) -> float:
    """For how long a group that is made so waits for a rank."""
    from elastic_moe.torch_private import group_timeout_s

    group = dist.new_group(timeout=timedelta(seconds=timeout_s))
    assert isinstance(group, dist.ProcessGroup)
    return group_timeout_s(group)


def test_a_group_tells_how_long_it_waits(ranks: Ranks) -> None:
    changed = f"torch {torch.__version__}: a group's time-out is elsewhere, by which ranks of one machine wait by pipes"
    assert ranks.run(waited_s, 12.0, world_size=2) == [12.0, 12.0], changed


def test_no_other_file_uses_private_names_of_torch() -> None:
    assert used_in("elastic_moe") == [], "these belong into elastic_moe/torch_private.py, with a canary here"
