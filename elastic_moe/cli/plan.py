"""`elastic-moe plan`: the mesh for every world size, before any machine is rented. Imports no torch."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from typing import TYPE_CHECKING

from elastic_moe.cli.parser import add_set, natural_int, positive_int
from elastic_moe.cli.planning import (
    GIB,
    IdleToFit,
    Row,
    about_guests,
    add_machines,
    as_json,
    job_spec,
    seconds,
    table,
)
from elastic_moe.errors import UserError
from launcher import MeshSpec

if TYPE_CHECKING:
    from elastic_moe.cli.parser import Subparsers

_EPILOG = """\
Without --job the model has the shape of Mixtral 8x7B with --experts experts,
its layers computed again in the backward pass, on ranks of 141 GiB (H200).

--json writes one object: "spec" (what was planned for), and "plans", one for
each number of nodes: "nodes", "slots", and either "mesh" (replicate, shard,
expert, idle, micro_batch, rounds), "step_s" and "memory_bytes" (both modelled,
for one rank), "step" and "memory" (what they are made of) and "node_loss", or
"infeasible" with the reason, "leanest" (the same of the plan that takes the
least memory) where memory is what does not suffice, and "idle_to_fit" where
fewer ranks would have a mesh: the slots that would stay idle, for --max-idle.

What losing one node costs ("a lost node", "node_loss"): "0 steps" where the
other nodes hold replicas of all that it held, so that the state after the last
complete step goes on; else what was done since a copy of the state went to a
peer ("to the last peer save"), or since the last one in the store ("to the last
checkpoint"). Among meshes that are equally fast, those that lose no step win.

Exit codes: 0 some world size has a mesh, 1 none has, 2 wrong usage.
"""

_MIXTRAL = {
    "model": {"preset": "mixtral-8x7b"},
    "train": {"global_batch": 1024, "seq_len": 4096, "dtype": "bfloat16", "recompute": True},
    "mesh": {"memory_gib": 141},
}


def register(verbs: Subparsers) -> None:
    """Add the verb `plan`."""
    parser = verbs.add_parser(
        "plan",
        help="show the device mesh for every world size",
        description="Show the device mesh that a job gets for every number of nodes.",
        epilog=_EPILOG,
    )
    add_machines(parser, "memory of one rank")
    parser.add_argument("--job", metavar="JOB.toml", help="plan for this job")
    add_set(parser)
    parser.add_argument("--experts", type=natural_int, metavar="N", help="experts in a layer; 0 for a dense model")
    parser.add_argument("--global-batch", type=positive_int, metavar="N", help="samples in a step")
    parser.add_argument("--max-idle", type=natural_int, metavar="N", help="slots that may stay idle")
    parser.add_argument("--expert-parallel", type=positive_int, metavar="N", help="fix the expert-parallel degree")
    parser.add_argument("--json", action="store_true", help="write JSON")
    parser.set_defaults(handler=handle)


def handle(args: argparse.Namespace) -> int:
    """Print the table; 1 when no world size has a mesh."""
    spec = _spec(args)
    if spec.expert is not None and spec.expert > max(1, spec.num_experts):
        raise UserError(
            f"--expert-parallel {spec.expert} is more than there are experts ({spec.num_experts}): "
            "some ranks would never hold one"
        )
    if args.json:
        rows = list(table(spec, args))
        print(json.dumps(as_json(spec, rows), indent=2))
        return 0 if any(row.priced for row in rows) else 1
    idle = IdleToFit()
    has_mesh = _print_table(idle.noting(table(spec, args)))
    if hint := idle.hint("--max-idle"):
        print(hint)
    if assumed := about_guests(spec):
        print(assumed)
    return 0 if has_mesh else 1


def mixtral() -> MeshSpec:
    """What is planned for without a job."""
    from elastic_moe.config import JobConfig, mesh_spec  # pydantic is slow to import

    return mesh_spec(JobConfig.model_validate(_MIXTRAL))


def _spec(args: argparse.Namespace) -> MeshSpec:
    """The spec of the job that `--job` names, or Mixtral's, with the other options laid over it."""
    measured: dict[str, float] = {}
    if args.job:
        spec = job_spec(args.job, args)
    elif args.sets:
        raise UserError("--set changes a field of a job: name the job with --job JOB.toml")
    else:
        spec = mixtral()
        if args.calibration:
            from elastic_moe.machine import read_calibration

            measured = read_calibration(args.calibration)
    changes: dict[str, int | float | None] = {
        **measured,
        "global_batch": args.global_batch,
        "max_idle": args.max_idle,
        "memory_cap_bytes": round(args.memory_gib * GIB) if args.memory_gib else None,
        "expert": args.expert_parallel,
    }
    if args.experts is not None:
        each = spec.expert_params // spec.num_experts if spec.num_experts else 0
        changes |= {"num_experts": args.experts, "expert_params": each * args.experts}
    return spec.replace(**{name: value for name, value in changes.items() if value is not None})


def _print_table(rows: Iterable[Row]) -> bool:
    """Print each row as it comes; whether any has a mesh."""
    has_mesh = False
    heads = ("nodes", "slots", "replicate", "shard", "expert", "idle", "batch", "step", "memory")
    print(" ".join(f"{head:>9}" for head in heads) + "  a lost node")
    for row in rows:
        start = f"{row.nodes:>9} {row.slots:>9}"
        if row.priced is None:
            print(f"{start}  {row.infeasible}")
            continue
        has_mesh = True
        mesh = row.priced.plan
        batch = f"{mesh.rounds} x {mesh.micro_batch}"
        cells = [mesh.replicate, mesh.shard, mesh.expert, mesh.idle, batch, seconds(row.priced.step_s)]
        cells.append(f"{row.priced.memory_bytes / GIB:.1f} GiB")
        print(" ".join([start, *(f"{cell:>9}" for cell in cells)]) + f"  {row.loss}")
    return has_mesh
