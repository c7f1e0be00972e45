"""What `plan` and `train --dry-run` share: machines to plan for, a plan for each number of nodes. No torch."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from elastic_moe.cli.parser import node_range, positive_float, positive_int
from elastic_moe.errors import UserError
from launcher import Infeasible, MeshSpec, NodeLoss, Priced, idle_to_fit, node_loss, price

GIB = 1 << 30
DEFAULT_NODES = range(1, 17)
DEFAULT_SLOTS_PER_NODE = 8
_TELL_EVERY_S = 5.0
_SLOTS_MAX = 10**8
_NODES_NAMED = 16
_HINTED_SLOTS_MAX = 10**4  # beyond which dozens of further plans take their time


def add_machines(parser: argparse.ArgumentParser | argparse._ArgumentGroup, memory_help: str) -> None:
    """Add the options that say which machines to plan for; None where they are not given."""
    parser.add_argument("--nodes", type=node_range, metavar="MIN:MAX", help="default 1:16")
    parser.add_argument("--slots-per-node", type=positive_int, metavar="N", help="default 8")
    parser.add_argument("--memory-gib", type=_gib, metavar="GIB", help=memory_help)
    parser.add_argument(
        "--calibration", metavar="FILE", help="speeds that `python -m elastic_moe.calibrate` has measured"
    )


def _gib(text: str) -> float:
    """For argparse's `type`: within what a job's mesh.memory_gib may be."""
    value = positive_float(text)
    if not 1e-3 <= value <= 1e9:
        raise argparse.ArgumentTypeError(f"{text!r} is not between 0.001 and 1e9")
    return value


def job_spec(path: str, args: argparse.Namespace) -> MeshSpec:
    """The spec of the job in `path`, with `--set` and `--calibration` laid over it. Raises UserError as `load` does."""
    from elastic_moe.config import load, mesh_spec  # pydantic is slow to import, and for a job alone

    sets = [*args.sets, *([f"mesh.calibration={json.dumps(args.calibration)}"] if args.calibration else [])]
    return mesh_spec(load(path, sets=sets, environ=os.environ))


@dataclasses.dataclass(frozen=True)
class Row:
    """The plan of one number of nodes: `priced` and what the loss of one costs, or the reason why there is none.

    Where only memory does not suffice, `leanest` is what would take the least. `idle_to_fit`: where fewer ranks have a
    mesh, so many slots would stay idle.
    """

    nodes: int
    slots: int
    priced: Priced | None
    infeasible: str = ""
    loss: NodeLoss | None = None
    leanest: Priced | None = None
    idle_to_fit: int | None = None


class IdleToFit:
    """Notes, of rows that go by, which numbers of nodes would have a mesh if some slots might stay idle."""

    def __init__(self) -> None:
        self._nodes_by_idle: dict[int, list[int]] = {}

    def noting(self, rows: Iterable[Row]) -> Iterator[Row]:
        """The rows as they come."""
        for row in rows:
            if row.idle_to_fit:
                self._nodes_by_idle.setdefault(row.idle_to_fit, []).append(row.nodes)
            yield row

    def hint(self, option: str) -> str:
        """A line for each number that `option` might be given; "" where that would help nobody."""
        return "\n".join(
            f"with {option} {idle} these would train too, on {idle} rank{'s'[: idle - 1]} fewer: {_named(nodes)}"
            for idle, nodes in sorted(self._nodes_by_idle.items())
        )


def _named(nodes: Sequence[int]) -> str:
    more = len(nodes) - _NODES_NAMED
    named = ", ".join(map(str, nodes[:_NODES_NAMED]))
    return f"{named}{f' and {more} more numbers of' if more > 0 else ''} node{'' if nodes == [1] else 's'}"


def table(spec: MeshSpec, args: argparse.Namespace) -> Iterator[Row]:
    """Plan the mesh for each number of nodes by itself, one after the other.

    With `--json` nothing is written before the last of them: every few seconds stderr says how far it is.

    Raises:
        UserError: at once, there are more slots than any cluster has.
    """
    slots_per_node = args.slots_per_node or DEFAULT_SLOTS_PER_NODE
    sizes = args.nodes or DEFAULT_NODES
    if sizes[-1] * slots_per_node > _SLOTS_MAX:  # a slip, whose factors would be looked for for hours
        raise UserError(f"--nodes {sizes[-1]} with --slots-per-node {slots_per_node}: at most {_SLOTS_MAX:,} slots")
    return _planned(spec, sizes, slots_per_node, tells=args.json)


def _planned(spec: MeshSpec, sizes: range, slots_per_node: int, *, tells: bool) -> Iterator[Row]:
    told_s = time.monotonic()
    for num_done, num_nodes in enumerate(sizes):
        if tells and time.monotonic() - told_s >= _TELL_EVERY_S:
            told_s = time.monotonic()
            print(f"planned for {num_done} of {len(sizes)} numbers of nodes", file=sys.stderr, flush=True)
        slots = num_nodes * slots_per_node
        try:
            priced = price(slots, spec, ranks_per_node=slots_per_node)
            yield Row(num_nodes, slots, priced, loss=node_loss(priced.plan, slots_per_node))
        except Infeasible as error:
            idle = idle_to_fit(slots, spec, slots_per_node) if slots <= _HINTED_SLOTS_MAX else None
            yield Row(num_nodes, slots, None, str(error), leanest=error.leanest, idle_to_fit=idle)


def as_json(spec: MeshSpec, rows: Iterable[Row]) -> dict[str, Any]:
    """The table as `--json` prints it; the help of `plan` describes the fields."""
    plans: list[dict[str, Any]] = []
    for row in rows:
        outcome: dict[str, Any] = {"infeasible": row.infeasible}
        if row.idle_to_fit:
            outcome["idle_to_fit"] = row.idle_to_fit
        if row.leanest:
            outcome["leanest"] = _modelled(row.leanest)
        if row.priced:
            outcome = {**_modelled(row.priced), "node_loss": row.loss}
        plans.append({"nodes": row.nodes, "slots": row.slots, **outcome})
    return {"spec": dataclasses.asdict(spec), "plans": plans}


def _modelled(priced: Priced) -> dict[str, Any]:
    return {
        "mesh": dataclasses.asdict(priced.plan),
        "step_s": priced.step_s,
        "step": dataclasses.asdict(priced.step),
        "memory_bytes": priced.memory_bytes,
        "memory": dataclasses.asdict(priced.memory),
    }


def about_guests(spec: MeshSpec) -> str:
    """What is taken for granted of a job that has replicas of hot experts; "" for one that has none."""
    if not spec.expert_replicas:
        return ""
    return (
        f"memory holds {spec.expert_replicas} more experts in each layer (train.expert_replicas), if expert > 1; step "
        "times take every expert to get as many tokens as any other"
    )


def seconds(time_s: float) -> str:
    """A time in the unit that suits it."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if time_s >= scale:
            return f"{time_s / scale:.1f} {unit}"
    return f"{time_s * 1e6:.1f} us"
