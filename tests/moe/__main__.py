"""All of these tests with other layers, one kind after another, and a table; exit code 1 if one fails.

python -m tests.moe [--processes N] [--layers recompute] [PATH ...]      all kinds and all of tests/moe by default
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tests.moe.variants import Tally

ROOT = Path(__file__).parent.parent.parent


class Kind(NamedTuple):
    """Other layers, as `tests.moe.variants` has them."""

    variant: str
    backend: str = ""

    def __str__(self) -> str:
        return f"{self.variant} ({self.backend})" if self.backend else self.variant


def kinds(*, has_compiler: bool) -> list[Kind]:
    """Each by itself, compiled as far as this machine can, and both together."""
    return [
        Kind("recompute"),
        Kind("compile", "inductor" if has_compiler else "aot_eager"),
        Kind("compile,recompute", "aot_eager"),
    ]


class Row(NamedTuple):
    """What became of the tests with one kind of layers."""

    kind: str
    passed: int
    failed: list[str]
    skipped: int
    seconds: float
    tally: dict[str, int]
    ended_well: bool

    def is_good(self, *, is_whole: bool) -> bool:
        """No test failed; and of all of the tests, some computed layers in each of the ways that the kind has."""
        wanted = {"compile": Tally.COMPILED, "recompute": Tally.AGAIN}
        has_all = all(self.tally[wanted[name]] for name in self.kind.split(","))
        return self.ended_well and not self.failed and (has_all or not is_whole)


def run(kind: Kind, paths: Sequence[str], processes: int) -> Row:
    """The tests at `paths` in a pytest of their own."""
    began_s = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="variants-") as folder:
        told, tally = Path(folder, "told.xml"), Path(folder, "tally")
        tally.touch()
        environment = {
            **os.environ,
            "MOE_VARIANT": kind.variant,
            "MOE_TALLY": str(tally),
            "TORCHINDUCTOR_CACHE_DIR": str(Path(folder, "inductor")),
            **({"MOE_BACKEND": kind.backend} if kind.backend else {}),
        }
        several = ["-n", str(processes), "--dist", "loadfile"] if processes > 1 else []
        command = [sys.executable, "-m", "pytest", "-q", *several, f"--junitxml={told}", *paths]
        code = subprocess.run(command, cwd=ROOT, env=environment).returncode
        cases = list(ET.parse(told).iter("testcase")) if told.exists() else []
        counts = tally.read_text()
    failed = [
        f"{case.get('classname')}::{case.get('name')}"
        for case in cases
        if case.find("failure") is not None or case.find("error") is not None
    ]
    skipped = sum(case.find("skipped") is not None for case in cases)
    return Row(
        kind=kind.variant,
        passed=len(cases) - skipped - len(failed),
        failed=failed,
        skipped=skipped,
        seconds=time.monotonic() - began_s,
        tally={one: counts.count(one) for one in Tally},
        ended_well=code == 0,
    )


def table(rows: Sequence[tuple[Kind, Row]], *, is_whole: bool) -> str:
    """The rows, aligned, and what has failed."""
    cells = [("LAYERS", "RESULT", "PASSED", "FAILED", "SKIPPED", "S", "LAYERS COMPILED", "EXACT", "COMPUTED AGAIN")]
    for kind, row in rows:
        numbers = [row.passed, len(row.failed), row.skipped, round(row.seconds), *(row.tally[one] for one in Tally)]
        cells.append((str(kind), "ok" if row.is_good(is_whole=is_whole) else "FAILED", *map(str, numbers)))  # type: ignore[arg-type]
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]
    return "\n".join(lines + [f"FAILED with {kind}: {name}" for kind, row in rows for name in row.failed])


def main(argv: Sequence[str] | None = None) -> int:
    """The table's exit code: 0 if no row has failed."""
    there_are = kinds(has_compiler=shutil.which(os.environ.get("CXX") or "g++") is not None)
    parser = argparse.ArgumentParser(prog="python -m tests.moe", description=__doc__, allow_abbrev=False)
    parser.add_argument("paths", nargs="*", metavar="PATH", default=[])
    parser.add_argument("--processes", type=int, default=2, metavar="N")
    parser.add_argument("--layers", choices=[kind.variant for kind in there_are])
    args = parser.parse_args(argv)
    chosen = [kind for kind in there_are if args.layers in (None, kind.variant)]
    is_whole = not args.paths
    rows = [(kind, run(kind, args.paths or ["tests/moe"], args.processes)) for kind in chosen]
    print(table(rows, is_whole=is_whole))
    return int(not all(row.is_good(is_whole=is_whole) for _, row in rows))


if __name__ == "__main__":
    sys.exit(main())
