"""Samples by odd wishes: temperatures, seeds, and models that are not well."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from elastic_moe.cli.main import main
from elastic_moe.errors import UserError
from elastic_moe.model.sampling import sample

LOGITS = torch.tensor([1.0, 3.0, 2.999, -80.0])


def drawn(temperature: float, logits: torch.Tensor = LOGITS, **how: Any) -> list[int]:
    """Tokens by a model that always says the same."""

    def model(tokens_BS: torch.Tensor) -> SimpleNamespace:
        assert tokens_BS.shape[1] <= 5
        return SimpleNamespace(logits_BSV=logits.expand(1, tokens_BS.shape[1], -1))

    given = {"seed": 0, "window": 5, **how}
    return list(sample(cast(Any, model), [1, 2, 3], 40, temperature=temperature, **given))


@pytest.mark.parametrize("temperature", [0.0, 5e-324, 1e-300, 1e-45, 1e-9])
def test_hardly_any_temperature_takes_the_likeliest(temperature: float) -> None:
    assert drawn(temperature) == [1] * 40


@pytest.mark.parametrize("temperature", [1e9, 1e308])
def test_any_heat_draws_from_all(temperature: float) -> None:
    assert set(drawn(temperature)) == {0, 1, 2, 3}


def test_only_what_stands_for_text_is_drawn() -> None:
    assert drawn(0.0, num_known=1) == [0] * 40
    assert set(drawn(1e9, num_known=3)) == {0, 1, 2}


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_are_told(bad: float) -> None:
    with pytest.raises(UserError, match="logits are not finite: take a healthy step"):
        drawn(0.8, torch.tensor([0.0, bad, 1.0]))


@pytest.mark.parametrize("seed", ["9223372036854775808", "-1", "1.5", "x"])
def test_seeds_that_no_generator_takes(seed: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["generate", "nowhere", "--seed", seed])
    assert ended.value.code == 2
    assert "argument --seed" in capsys.readouterr().err


def test_the_largest_seed_is_taken() -> None:
    assert len(drawn(1.0, seed=2**63 - 1)) == 40
