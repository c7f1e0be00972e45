"""`make bench-plan`: what the mesh planner says of memory and of step times, and what is measured.

Memory: the configurations that the planner's terms were found on, and as many others, each in fresh processes: the peak
of rank 0's resident memory over two steps, without what the process had before there was a model, beside the planner's.
With `--live` also the most that tensors had at once, without what malloc and libraries add. Step time: every mesh of
one to eight ranks on this machine for one job, with what a short probe has measured of the machine; the ranks of
predictions and measurements are compared (Spearman). Prints tables and writes JSON beside them.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from elastic_moe.config import JobConfig, mesh_spec
from elastic_moe.machine import write_calibration
from launcher import MeshPlan, MeshSpec, memory_use, step_time
from launcher.rounds.layouts import layouts
from tests.bench.plain_ranks import run_ranks
from tests.bench.plan_cases import FITTED, HELD_OUT, Case, a_batch, a_model
from tests.bench.plan_ranks import calibrated, step_times
from tests.ranks import Ranks

MIB = 1 << 20
TIMEOUT_S = 240.0
WITHIN = 0.15
LEAST_BYTES = 500 * MIB
NUM_TOKENS = 1 << 20


# Small enough for eight ranks on two cores, large enough for meshes to differ.
SPEED_MODEL = a_model(256, 4, 512, num_experts=8, top_k=2)
SPEED_BATCH, SPEED_POSITIONS = 16, 128


def tokens_file(folder: Path) -> Path:
    """Token ids that any of the vocabularies has."""
    path = folder / "tokens.npy"
    np.save(path, np.random.default_rng(0).integers(256, size=NUM_TOKENS, dtype=np.uint16))
    return path


def measured_bytes(case: Case, data: Path, what: str = "resident") -> int:
    """Peak of rank 0, from fresh processes."""
    args = (case.job(data).model_dump_json(), case.plan.to_json(), what)
    return int(
        json.loads(run_ranks("tests.bench.plan_ranks", *args, world_size=case.plan.world_size, timeout_s=TIMEOUT_S)[0])
    )


def memory_rows(cases: Sequence[Case], data: Path, *, with_live: bool) -> list[dict[str, Any]]:
    """Measure every case, and tell each as it is known."""
    print(f"\n{'memory of a rank, MiB':28}{'predicted':>10}{'measured':>10}{'ratio':>7}   of what")
    rows = []
    for case in cases:
        use = memory_use(case.plan, mesh_spec(case.job(data)).replace(cores_per_node=os.cpu_count()))
        measured = measured_bytes(case, data)
        ratio = use.total / measured
        terms = ", ".join(f"{name} {size / MIB:.0f}" for name, size in dataclasses.asdict(use).items() if size > MIB)
        if with_live:
            live, own = measured_bytes(case, data, "live"), use.total - use.runtime - use.optimizer
            terms = f"live {own / MIB:.0f} of {live / MIB:.0f}, {own / live:.2f}; {terms}"
        print(f"{case.name:28}{use.total / MIB:>10.0f}{measured / MIB:>10.0f}{ratio:>7.2f}   {terms}", flush=True)
        rows.append({"case": case.name, "predicted": dataclasses.asdict(use), "measured": measured, "ratio": ratio})
    for name, some in (("the terms were found on", FITTED), ("they were not", HELD_OUT)):
        names = {case.name for case in some}
        large = [row for row in rows if row["case"] in names and row["measured"] >= LEAST_BYTES]
        close = [row for row in large if abs(row["ratio"] - 1) <= WITHIN]
        print(f"of those that {name}, from 500 MiB on, {len(close)} of {len(large)} are within {WITHIN:.0%}")
    return rows


def meshes(spec: MeshSpec, sizes: Sequence[int]) -> list[MeshPlan]:
    """Every layout of every size, one round each."""
    return [MeshPlan(*layout, 0, -(-spec.global_batch // size), 1) for size in sizes for layout in layouts(size, spec)]


def _layout(plan: MeshPlan) -> str:
    return f"{plan.replicate} x {plan.shard} x {plan.expert}"


def speed_rows(fields: dict[str, Any], sizes: Sequence[int], num_steps: int) -> tuple[dict[str, float], list[Any]]:
    """The probe's findings, and what each mesh was said to take and took."""
    ranks = Ranks()
    rows: list[dict[str, Any]] = []
    try:
        machine = ranks.run(calibrated, fields, world_size=min(2, os.cpu_count() or 1), timeout_s=TIMEOUT_S)[0]
        print("\nthe machine, by its probe: " + ", ".join(f"{name} {value:.3g}" for name, value in machine.items()))
        spec = mesh_spec(JobConfig.model_validate(fields)).replace(**machine)
        print(f"{'replicate x shard x expert':28}{'predicted s':>12}{'measured s':>12}   of what")
        for size in sizes:
            plans = meshes(spec, [size])
            jobs = [(fields, plan) for plan in plans]
            times_s = ranks.run(step_times, jobs, num_steps, world_size=size, timeout_s=TIMEOUT_S)[0]
            for plan, measured_s in zip(plans, times_s, strict=True):
                step = step_time(plan, spec, ranks_per_node=size)
                terms = ", ".join(f"{n} {s:.2f}" for n, s in dataclasses.asdict(step).items() if s >= 0.005)
                print(f"{_layout(plan):28}{step.total:>12.3f}{measured_s:>12.3f}   {terms}", flush=True)
                mesh = dataclasses.asdict(plan)
                rows.append({"mesh": mesh, "predicted": dataclasses.asdict(step), "measured_s": measured_s})
    finally:
        ranks.close()
    return machine, rows


def spearman(first: Sequence[float], second: Sequence[float]) -> float:
    """Correlation of the ranks of two lists; equal values share the mean of their ranks."""

    def ranked(values: Sequence[float]) -> np.ndarray:
        array = np.asarray(values)
        return np.array([(array < value).sum() + ((array == value).sum() - 1) / 2 for value in array])

    return float(np.corrcoef(ranked(first), ranked(second))[0, 1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="*", default=["memory", "speed"], choices=["memory", "speed"])
    parser.add_argument("--cases", nargs="*", help="these configurations of memory alone, by their names")
    parser.add_argument("--live", action="store_true", help="measure what torch has allocated, too")
    parser.add_argument("--quick", action="store_true", help="four configurations, meshes of up to four ranks")
    parser.add_argument("--steps", type=int, help="measured steps of each mesh (default 5, quick 2)")
    parser.add_argument("--out", type=Path, default=Path("out/bench-plan.json"))
    args = parser.parse_args()
    machine = f"{os.cpu_count()} cores, torch {torch.__version__}, Python {platform.python_version()}"
    print(f"{machine}; load {os.getloadavg()[0]:.1f}")
    began_s = time.perf_counter()
    results: dict[str, Any] = {"machine": machine, "load": os.getloadavg()[0]}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        data = tokens_file(Path(folder))
        if "memory" in args.parts:
            cases = [case for case in FITTED + HELD_OUT if args.cases is None or case.name in args.cases]
            rows = memory_rows(cases[:8:2] if args.quick else cases, data, with_live=args.live)
            results["memory"] = rows
        if "speed" in args.parts:
            train = a_batch(SPEED_BATCH, SPEED_POSITIONS, metrics=None, device="cpu")
            fields = {"model": SPEED_MODEL, "train": train, "data": {"url": str(data)}}
            sizes = range(1, 5 if args.quick else 9)
            speed, rows = speed_rows(fields, sizes, args.steps or (2 if args.quick else 5))
            write_calibration(args.out.with_name("machine.json"), speed)
            rho = spearman([sum(row["predicted"].values()) for row in rows], [row["measured_s"] for row in rows])
            print(f"{len(rows)} meshes: Spearman {rho:.2f}")
            results |= {"calibration": speed, "speed": rows, "spearman": rho}
    results["seconds"] = time.perf_counter() - began_s
    args.out.write_text(json.dumps(results, indent=1))
    print(f"{results['seconds']:.0f} s; {args.out}")


if __name__ == "__main__":
    main()
