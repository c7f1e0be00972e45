"""`make fuzz`: 10,000 damages to the files of a run, ours and stock DCP's, each of which must end well.

That is: the bytes that were written, the older checkpoint, or an error of our own tree; in 2 s and 300 MiB at most. A
process for each core tries them one after the other; one that hangs, dies or grows is ended, told by its case, and
another goes on behind it. Prints how many came to what, and writes JSON beside it. A case is its seed and number, and
the run that it damages, which is kept beside the JSON: `python -m tests.fuzz --seed SEED --only NUMBER` tries it again.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import logging
import os
import random
import resource
import select
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path

import torch

from tests.fuzz import runs
from tests.fuzz.faults import damaged
from tests.fuzz.runs import Specimen

NUM_CASES = 10_000
TIME_MAX_S = 2.0
MEMORY_MAX_MIB = 300
HANG_S = 30.0
_ADDRESS_SPACE_BYTES = 4 << 30  # beyond what is in use: an end before the machine's
_BAD = ("wrong tensor", "foreign", "slow", "memory", "hang", "died")


@dataclass(frozen=True)
class Case:
    """What came of one damage. `outcome` begins with one of `_BAD` where it is none of those allowed."""

    number: int
    what: str
    outcome: str
    detail: str = ""

    @property
    def is_bad(self) -> bool:
        return self.outcome.startswith(_BAD)


def attempt(seed: int, number: int, specimens: list[Specimen]) -> Case:
    """One damage, and what reading the run comes to."""
    rng = random.Random(f"{seed}/{number}")
    specimen = specimens[number % len(specimens)]
    what, objects = damaged(specimen.objects, rng)
    with contextlib.suppress(OSError):  # else the peak is that of all cases before
        Path("/proc/self/clear_refs").write_text("5")
    before_mib, began_s = peak_mib(), time.process_time()
    detail = ""
    try:
        outcome = runs.outcome(specimen, objects)
    except runs.Wrong as error:
        outcome, detail = "wrong tensor", str(error)
    except Exception as error:
        outcome, detail = f"foreign {type(error).__name__}", traceback.format_exc()
    took_s, grown_mib = time.process_time() - began_s, peak_mib() - before_mib
    if took_s > TIME_MAX_S:
        outcome, detail = f"slow ({outcome})", f"{took_s:.1f} s"
    if grown_mib > MEMORY_MAX_MIB:
        outcome, detail = f"memory ({outcome})", f"{grown_mib} MiB"
    return Case(number, f"{specimen.name}: {what}", outcome, detail)


def peak_mib() -> int:
    """Of this process, since it was last reset."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) // 1024


def work(seed: int, first: int, count: int, step: int, folder: Path) -> None:
    """Try every `step`th case from `first` on, with a line before each and one after."""
    logging.disable()
    torch.set_num_threads(1)
    specimens = runs.specimens(folder)
    for specimen in specimens:  # what is loaded at first use
        assert runs.outcome(specimen, specimen.objects) in (runs.RIGHT, runs.VERIFIED)
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + _ADDRESS_SPACE_BYTES,) * 2)
    for number in range(first, count, step):
        print(json.dumps(number), flush=True)
        print(json.dumps(vars(attempt(seed, number, specimens))), flush=True)


@dataclass
class Worker:
    """A process, and the case that it is at."""

    args: list[str]
    next: int
    step: int
    process: subprocess.Popen[bytes] = field(init=False)
    since_s: float = field(init=False)
    _half: bytes = field(init=False)

    def __post_init__(self) -> None:
        self.start()

    def start(self) -> None:
        command = [
            sys.executable,
            "-W",
            "ignore",
            "-m",
            "tests.fuzz",
            *self.args,
            "--work",
            str(self.next),
            str(self.step),
        ]
        env = os.environ | {"MALLOC_ARENA_MAX": "2"}
        self.take_over(subprocess.Popen(command, stdout=subprocess.PIPE, env=env))

    def take_over(self, process: subprocess.Popen[bytes]) -> None:
        self.process, self.since_s, self._half = process, time.monotonic(), b""

    def lines(self) -> list[bytes] | None:
        """What it has said by now, within 50 ms; None when it has ended."""
        assert self.process.stdout is not None
        if not select.select([self.process.stdout], [], [], 0.05)[0]:
            return []
        data = os.read(self.process.stdout.fileno(), 1 << 16)
        *lines, self._half = (self._half + data).split(b"\n")
        self.since_s = time.monotonic()
        return lines if data else None

    def stop(self) -> None:
        assert self.process.stdout is not None
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()


def supervise(args: list[str], num_processes: int, count: int) -> list[Case]:
    """All cases, by processes that may hang or die."""
    cases: list[Case] = []
    workers = [Worker(args, first, num_processes) for first in range(num_processes)]
    try:
        while workers:
            for worker in list(workers):
                if not _follow(worker, count, cases):
                    worker.stop()
                    workers.remove(worker)
    finally:
        for worker in workers:
            worker.stop()
    return sorted(cases, key=lambda case: case.number)


def _follow(worker: Worker, count: int, cases: list[Case]) -> bool:
    """Take what it has said; whether it has more to do."""
    lines = worker.lines()
    for line in lines or ():
        told = json.loads(line)
        if isinstance(told, int):
            worker.next = told
        else:
            cases.append(Case(**told))
            worker.next += worker.step
            _tell(cases[-1])
    if lines or (lines is not None and time.monotonic() - worker.since_s < HANG_S):
        return True
    if worker.next >= count:
        return False
    worker.stop()
    how = "died" if lines is None else "hang"
    cases.append(Case(worker.next, "", how, f"exit code {worker.process.returncode}"))
    _tell(cases[-1])
    worker.next += worker.step
    worker.start()
    return worker.next < count


def _tell(case: Case) -> None:
    if case.is_bad:
        print(f"case {case.number}: {case.outcome}: {case.what}\n{case.detail}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    parser.add_argument("--count", type=int, default=NUM_CASES)
    parser.add_argument("--only", type=int, metavar="NUMBER", help="try this one again, and tell all of it")
    parser.add_argument("--processes", type=int, default=min(os.cpu_count() or 1, 4))
    parser.add_argument("--out", type=Path, default=Path("out/fuzz.json"))
    parser.add_argument("--work", type=int, nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    folder = args.out.with_suffix("")
    if args.work:
        work(args.seed, args.work[0], args.count, args.work[1], folder)
        return 0
    if args.only is not None:
        logging.basicConfig()
        case = attempt(args.seed, args.only, runs.specimens(folder))
        print(f"{case.what}: {case.outcome}\n{case.detail}")
        return int(case.is_bad)
    runs.keep(runs.specimens(), folder)
    print(f"seed {args.seed}, {args.count} cases, torch {torch.__version__}", flush=True)
    began_s = time.monotonic()
    passed_on = ["--seed", str(args.seed), "--count", str(args.count), "--out", str(args.out)]
    cases = supervise(passed_on, args.processes, args.count)
    outcomes = collections.Counter(case.outcome for case in cases)
    for outcome, number in outcomes.most_common():
        print(f"{number:7}  {outcome}")
    bad = [case for case in cases if case.is_bad]
    print(f"{len(cases)} cases in {time.monotonic() - began_s:.0f} s, {len(bad)} that may not be; seed {args.seed}")
    examples = {case.outcome: f"{case.number}: {case.what}" for case in reversed(cases)}
    found = {"seed": args.seed, "outcomes": outcomes, "examples": examples, "bad": [vars(case) for case in bad]}
    args.out.write_text(json.dumps(found, indent=1))
    return int(bool(bad) or len(cases) < args.count)


if __name__ == "__main__":
    sys.exit(main())
