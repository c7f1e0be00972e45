"""`make bench-start`: from the command to its end, for a job of a worker that does nothing, ours and torchrun in turn.

What is left is what a launcher takes for itself. Besides an empty script, one that imports torch and makes a tensor:
torchrun's worker imports it again. Prints a table and writes JSON beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

BIN = Path(sys.executable).parent
OURS, COLD, STOCK = "elastic-moe run", "elastic-moe run --cold-workers", "torchrun"
COMMANDS = {
    OURS: (str(BIN / "elastic-moe"), "run"),
    COLD: (str(BIN / "elastic-moe"), "run", "--cold-workers"),
    STOCK: (str(BIN / "torchrun"),),
}
SCRIPTS = {"ends at once": "", "imports torch": "import torch\ntorch.ones(1).sum().item()\n"}
_TIMEOUT_S = 300.0


def measure(command: Sequence[str], script: Path) -> tuple[float, float]:
    """Wall seconds of one job, and processor seconds of all of its processes."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began_s = time.perf_counter()
    subprocess.run(
        [*command, "--nproc-per-node", "1", str(script)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        timeout=_TIMEOUT_S,
        check=True,
    )
    seconds = time.perf_counter() - began_s
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--launchers", nargs="*", default=list(COMMANDS), choices=list(COMMANDS))
    parser.add_argument("--out", type=Path, default=Path("out/bench-start.json"))
    args = parser.parse_args()
    machine = f"{os.cpu_count()} cores, torch {torch.__version__}, Python {platform.python_version()}"
    print(f"{machine}; {args.repeats} times each, after one that is not counted; load {os.getloadavg()[0]:.1f}")
    print(
        f"{'script':16}{'launcher':32}{'median s':>10}{'min':>8}{'max':>8}{'CPU s':>8}{'to torchrun':>14}", flush=True
    )
    results: dict[str, dict[str, list[tuple[float, float]]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, source in SCRIPTS.items():
            script = Path(folder) / "script.py"
            script.write_text(source)
            got: dict[str, list[tuple[float, float]]] = {launcher: [] for launcher in args.launchers}
            for turn in range(args.repeats + 1):
                for launcher in args.launchers:
                    found = measure(COMMANDS[launcher], script)
                    if turn:  # the first reads files that the others find in memory
                        got[launcher].append(found)
            stock_s = statistics.median(s for s, _ in got[STOCK]) if got.get(STOCK) else None
            for launcher, runs in got.items():
                seconds = sorted(s for s, _ in runs)
                median_s, cpu_s = statistics.median(seconds), statistics.median(c for _, c in runs)
                ratio = f"{median_s - stock_s:+.2f} s {median_s / stock_s:5.2f}x" if stock_s else ""
                print(
                    f"{name:16}{launcher:32}{median_s:10.2f}{seconds[0]:8.2f}{seconds[-1]:8.2f}{cpu_s:8.2f}{ratio:>16}",
                    flush=True,
                )
            results[name] = got
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps({"machine": machine, "results": results}, indent=1))


if __name__ == "__main__":
    main()
