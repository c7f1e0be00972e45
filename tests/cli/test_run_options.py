"""What `run` makes of torchrun's options."""

from __future__ import annotations

import pytest

from elastic_moe.cli.main import main
from elastic_moe.cli.run import _parse


@pytest.mark.parametrize(
    ("given", "environment", "cap", "workers_see"),
    [
        ([], "", None, 0),
        (["--max-restarts", "0"], "", 0, 0),
        (["--max_restarts", "3"], "", 3, 3),
        ([], "2", 2, 2),
        ([], "0", 0, 0),
        (["--max-restarts", "4"], "2", 4, 4),
    ],
)
def test_a_number_of_restarts_is_a_cap_only_if_it_is_given(
    monkeypatch: pytest.MonkeyPatch, given: list[str], environment: str, cap: int | None, workers_see: int
) -> None:
    if environment:
        monkeypatch.setenv("PET_MAX_RESTARTS", environment)
    parsed = _parse([*given, __file__])
    assert (parsed.max_restarts_given, parsed.max_restarts) == (cap, workers_see)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--rdzv-id", "a b/../c"], "--rdzv-id 'a b/../c': may not hold a '/'"),
        (["--nproc-per-node", "0"], "--nproc-per-node 0: a node runs at least one worker"),
        (["--nproc-per-node", "-2"], "--nproc-per-node -2: a node runs at least one worker"),
    ],
)
def test_what_torch_takes_without_a_word_is_refused_in_one_line(
    given: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", *given, __file__]) == 2
    assert capsys.readouterr().err == f"elastic-moe: error: {message}\n"
