"""Run the checks, each in a process of its own, and print a table; exit code 1 if one fails.

python -m tests.gpu [--cpu] [NAME ...]        those whose name contains one of the words; all by default
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tests.gpu import staging_checks  # noqa: F401 - registers its checks
from tests.gpu.checks import CHECKS, LIMITS_S, NEEDED, ROOT

TIME_S_MAX = 350.0
"""Of all checks together; what has not begun by then has failed."""


class Row(NamedTuple):
    """One line of the table."""

    name: str
    result: str
    figure: str
    seconds: float = 0.0


def missing(needed: Sequence[str] = NEEDED) -> list[str]:
    """Packages that are not installed."""
    return [name for name in needed if importlib.util.find_spec(name) is None]


def run_one(name: str, device: str) -> int:
    """One check in this process; its last line is JSON."""
    import torch

    if device == "cuda":
        torch.cuda.set_device(0)
    with tempfile.TemporaryDirectory(prefix="check-") as folder:
        try:
            figure = CHECKS[name](torch.device(device, 0 if device == "cuda" else None), Path(folder))  # type: ignore[arg-type]
        except Exception as error:
            traceback.print_exc()
            text = str(error).strip().splitlines() or [""]
            print(json.dumps({"result": "FAILED", "figure": f"{type(error).__name__}: {text[0]}"[:200]}), flush=True)
            return 1
    print(json.dumps({"result": "ok", "figure": figure}), flush=True)
    return 0


def run(name: str, device: str, limit_s: float) -> Row:
    """One check in a process of its own."""
    began_s = time.monotonic()
    command = [sys.executable, "-m", "tests.gpu", "--one", name, "--device", device]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit_s)
    except subprocess.TimeoutExpired:
        return Row(name, "FAILED", f"not done after {limit_s:.0f} s", limit_s)
    took_s = time.monotonic() - began_s
    try:
        told = json.loads(done.stdout.splitlines()[-1])
        row = Row(name, told["result"], told["figure"], took_s)
    except (IndexError, ValueError, KeyError):
        row = Row(name, "FAILED", f"ended with exit code {done.returncode}", took_s)
    if row.result != "ok":
        print(done.stdout, done.stderr, sep="\n", file=sys.stderr)
    return row


def table(rows: Sequence[Row]) -> str:
    """The rows, aligned."""
    cells = [("CHECK", "RESULT", "S", "FIGURE")]
    cells += [(row.name, row.result, f"{row.seconds:.1f}", row.figure) for row in rows]
    widths = [max(len(line[column]) for line in cells) for column in range(3)]
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(line, widths, strict=False)), line[3]]).rstrip()
        for line in cells
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The table's exit code: 0 if no row has failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.gpu", description=__doc__, allow_abbrev=False)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--cpu", action="store_true", help="the CPU's form of each check, whatever there is")
    parser.add_argument("--one", metavar="NAME", help=argparse.SUPPRESS)
    parser.add_argument("--device", default="cpu", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if lacking := missing():
        print(f"missing: pip install {' '.join(lacking)}")
        return 1
    if args.one:
        return run_one(args.one, args.device)
    chosen = [name for name in CHECKS if not args.names or any(word in name for word in args.names)]
    if not chosen:
        print(f"no check is called {' or '.join(args.names)}; there are: {', '.join(CHECKS)}")
        return 2
    import torch

    has_gpu = torch.cuda.is_available()
    device = "cuda" if has_gpu and not args.cpu else "cpu"
    rows = [Row("accelerator", "ok" if has_gpu else "skipped", _describe(has_gpu))]
    ends_s = time.monotonic() + TIME_S_MAX
    for name in chosen:
        left_s = ends_s - time.monotonic()
        rows.append(
            run(name, device, min(LIMITS_S[name], left_s)) if left_s > 0 else Row(name, "FAILED", "no time left")
        )
        print(f"{rows[-1].name}: {rows[-1].result}, {rows[-1].figure}", file=sys.stderr, flush=True)
    print(table(rows))
    return int(any(row.result == "FAILED" for row in rows))


def _describe(has_gpu: bool) -> str:
    import torch

    if not has_gpu:
        return f"skipped: no GPU (torch {torch.__version__}); the checks below ran on the CPU"
    return f"{torch.cuda.get_device_name(0)}, {torch.cuda.device_count()} in all, torch {torch.__version__}"


if __name__ == "__main__":
    sys.exit(main())
