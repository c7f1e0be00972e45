"""`elastic-moe train --dry-run`: a job's mesh and memory on every number of nodes. Imports no torch."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable

from elastic_moe.cli.planning import GIB, IdleToFit, Row, about_guests, add_machines, as_json, job_spec, table
from elastic_moe.errors import UserError
from launcher import MeshSpec

_DEFAULT_MEMORY_GIB = 80
_OPTIONS = ("nodes", "slots_per_node", "memory_gib", "calibration", "json")


def add_dry_run(parser: argparse.ArgumentParser) -> None:
    """Add `--dry-run` and what it may be told."""
    group = parser.add_argument_group("before a machine is rented")
    group.add_argument(
        "--dry-run",
        action="store_true",
        help="train nothing: show the mesh and each rank's memory for every number of nodes",
    )
    add_machines(group, "memory of one rank (default: mesh.memory_gib of the job, or else 80)")
    group.add_argument("--json", action="store_true", help="write JSON, with the fields that `plan --json` has")


def refuse_without(args: argparse.Namespace) -> None:
    """Raises UserError for an option of the dry run that is given without it."""
    for name in _OPTIONS:
        if getattr(args, name):
            raise UserError(f"--{name.replace('_', '-')} is of the dry run: give --dry-run too, or leave it out")


def dry_run(args: argparse.Namespace) -> int:
    """Print the table; 1 where the job fits on no number of nodes."""
    spec = job_spec(args.job, args)
    if args.memory_gib or spec.memory_cap_bytes is None:
        spec = spec.replace(memory_cap_bytes=round((args.memory_gib or _DEFAULT_MEMORY_GIB) * GIB))
    if args.json:
        rows = list(table(spec, args))
        print(json.dumps(as_json(spec, rows), indent=2))
        return 0 if any(row.priced for row in rows) else 1
    idle = IdleToFit()
    fits = _print(spec, idle.noting(table(spec, args)))
    if hint := idle.hint("mesh.max_idle"):
        print(hint)
    return 0 if fits else 1


def _print(spec: MeshSpec, rows: Iterable[Row]) -> bool:
    """Print each row as it comes; whether any has a mesh that fits."""
    total = spec.dense_params + spec.expert_params
    share = min(1.0, spec.top_k / spec.num_experts) if spec.num_experts else 1.0
    active = spec.dense_params + spec.expert_params * share
    assert spec.memory_cap_bytes is not None
    print(
        f"{_billions(total)} parameters, {_billions(active)} of them active; {spec.global_batch} sequences of "
        f"{spec.tokens_per_sample} tokens a step; {8 * spec.activation_bytes}-bit activations\n"
        f"GiB of one rank when it holds the most, of {spec.memory_cap_bytes / GIB:g}:"
    )
    if assumed := about_guests(spec):
        print(assumed)
    heads = ("nodes", "ranks", "replicate x shard x expert", "idle", "batch")
    terms = ("params", "optim", "grads", "activ", "logits", "gathered", "working", "total")
    widths = (5, 5, 26, 4, 9)
    print(" ".join(f"{head:>{width}}" for head, width in zip(heads, widths, strict=True)), end=" ")
    print(" ".join(f"{head:>8}" for head in terms) + "  fits")
    has_mesh = False
    for row in rows:
        has_mesh = has_mesh or row.priced is not None
        option = row.priced or row.leanest
        if option is None:
            print(f"{row.nodes:>5} {row.slots:>5}  {row.infeasible}")
            continue
        mesh, use = option.plan, option.memory
        cells = (
            row.nodes,
            row.slots,
            f"{mesh.replicate} x {mesh.shard} x {mesh.expert}",
            mesh.idle,
            f"{mesh.rounds} x {mesh.micro_batch}",
        )
        numbers = [use.params, use.optimizer, use.gradients, use.activations, use.logits, use.gathered]
        numbers += [use.working + use.runtime, use.total]
        print(" ".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True)), end=" ")
        print(" ".join(f"{number / GIB:>8.2f}" for number in numbers) + ("  yes" if row.priced else "  no"))
    return has_mesh


def _billions(number: float) -> str:
    return f"{number / 1e9:.1f} billion" if number >= 1e9 else f"{number / 1e6:.1f} million"
