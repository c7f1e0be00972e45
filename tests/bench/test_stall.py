"""What `bench-stall` makes of its numbers, and that nothing outlives it."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.bench.stall_bars import MEMCPY, NOTHING, StallCell, bars, table
from tests.cluster import until


def cell(target: str, way: str, blocked_s: float, run_s: float) -> StallCell:
    return StallCell(target, way, [blocked_s] * 3, steps_s=[run_s], passes_s=[0.5], num_saves=3)


def test_the_bars_are_told_of_what_was_measured() -> None:
    measured = [
        *(("folder", NOTHING, 0.0, 10.0), ("folder", MEMCPY, 0.1, 10.0)),
        *(("folder", "service, sync", 0.11, 11.2), ("folder", "service, overlapped", 0.03, 13.0)),
        *(("folder", "async thread", 0.4, 14.0), ("folder", "async shared", 0.1, 13.0)),
        *(("s3", NOTHING, 0.0, 10.0), ("s3", "service, overlapped", 0.01, 13.0), ("s3", "dcp.save", 9.0, 13.0)),
    ]
    cells = {(target, way): cell(target, way, blocked_s, run_s) for target, way, blocked_s, run_s in measured}
    found = {(bar.target, bar.way, bar.allowed.split()[-1]): (bar.found, bar.holds) for bar in bars(cells)}
    assert found == {
        ("folder", "service, sync", "memcpys"): ("1.10 memcpys", True),
        ("folder", "service, overlapped", "memcpys"): ("0.30 memcpys", False),
        ("folder", "service, sync", "shared)"): ("0.400 s", True),
        ("folder", "service, overlapped", "shared)"): ("1.000 s", False),
        ("s3", "service, overlapped", "(dcp.save)"): ("1.000 s", False),
    }
    lines = table(bars(cells)).splitlines()
    assert len(lines) == 6
    assert lines[1].endswith("yes")
    assert lines[2].endswith("NO")


FAMILY = """
import subprocess, sys, time
from pathlib import Path
from tests.bench.family import ends_with_its_family
with ends_with_its_family(Path(sys.argv[1])):
    grandchild = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(600)'])"
    child = subprocess.Popen([sys.executable, "-c", grandchild], start_new_session=True)
    keeper = subprocess.Popen(
        f"exec {sys.executable} -c 'import time; time.sleep(600) # storage.service' --socket {sys.argv[1]}/x",
        shell=True, executable="/bin/bash", start_new_session=True,
    )
    print(child.pid, keeper.pid, flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_benchmark_with_all_that_it_has_started(tmp_path: Path, number: int) -> None:
    bench = subprocess.Popen(
        [sys.executable, "-c", FAMILY, str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]
    )
    try:
        assert bench.stdout is not None
        family = [psutil.Process(int(pid)) for pid in bench.stdout.readline().split()]
        family += until("the grandchild", lambda: family[0].children(recursive=True))
        bench.send_signal(number)
        assert bench.wait(60) == 128 + number
        _, alive = psutil.wait_procs(family, timeout=60)
        assert not alive
    finally:
        bench.kill()
        bench.communicate()
