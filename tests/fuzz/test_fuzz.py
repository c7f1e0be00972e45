"""A few hundred of `make fuzz`'s cases, and that it would tell of the worst."""

from __future__ import annotations

import collections
import subprocess
from pathlib import Path

import pytest

from storage.stores.memory import MemoryStore
from tests.fuzz import __main__ as fuzz
from tests.fuzz import runs
from tests.fuzz.runs import Specimen

NUM_CASES = 400


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_no_damage_to_a_run_ends_badly() -> None:
    seed = 20261129
    specimens = runs.specimens()
    cases = [fuzz.attempt(seed, number, specimens) for number in range(NUM_CASES)]
    bad = [case for case in cases if case.is_bad]
    assert not bad, f"seed {seed}: {bad[0]}"
    outcomes = collections.Counter(case.outcome for case in cases)
    assert outcomes[runs.RIGHT] > 50 and outcomes[runs.OLD] > 10 and outcomes["error: Corrupt"] > 30, outcomes


def _hangs() -> str:
    while True:
        pass


@pytest.mark.parametrize(
    ("read", "outcome"),
    [
        (lambda: dict[str, int]()["key"], "foreign KeyError"),
        (lambda: str(len(bytearray(400 << 20))), "memory"),
        (lambda: runs.Wrong.__call__ and (_ for _ in ()).throw(runs.Wrong("other")), "wrong tensor"),  # type: ignore[truthy-function]
    ],
)
def test_what_it_must_tell_of_is_told(read: object, outcome: str) -> None:
    case = fuzz.attempt(0, 0, [Specimen("run", {"name": b"data"}, read)])  # type: ignore[arg-type]
    assert case.is_bad and case.outcome.startswith(outcome)


def test_a_case_that_hangs_or_dies_is_told_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "worker.sh"  # a shell has begun long before it counts as hung
    script.write_text(
        "n=$1\n"
        "while [ $n -lt 6 ]; do\n"
        "    echo $n\n"
        "    [ $n = 2 ] && exec sleep 600\n"
        "    [ $n = 3 ] && kill -ABRT $$\n"
        """    echo "{\\"number\\": $n, \\"what\\": \\"\\", \\"outcome\\": \\"right\\"}"\n"""
        "    n=$((n + $2))\n"
        "done\n"
    )

    def start(worker: fuzz.Worker) -> None:
        command = ["sh", str(script), str(worker.next), str(worker.step)]
        worker.take_over(subprocess.Popen(command, stdout=subprocess.PIPE))

    monkeypatch.setattr(fuzz.Worker, "start", start)
    monkeypatch.setattr(fuzz, "HANG_S", 3.0)
    cases = fuzz.supervise([], 2, 6)
    assert [(case.number, case.outcome) for case in cases] == [
        (0, "right"),
        (1, "right"),
        (2, "hang"),
        (3, "died"),
        (4, "right"),
        (5, "right"),
    ]


def test_the_store_of_a_case_is_its_own() -> None:
    specimen = Specimen("run", {"name": b"data"}, lambda: str(runs.objects()))
    assert runs.outcome(specimen, {"other": b"x"}) == str({"other": b"x"})
    assert isinstance(runs._store, MemoryStore)
