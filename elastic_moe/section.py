"""What all sections of a job file have in common. No torch."""

from __future__ import annotations

import typing
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, field_validator, model_validator

NONE = "none"  # TOML has no other word for it
_LIMIT = 1 << 63
_STRICT = ConfigDict(strict=True)  # by itself: type checkers would then refuse the paths that a `PathOrUrl` takes


class Section(BaseModel):
    """A section of a job file: no other fields than those declared, whose values are of the very types that they say.

    So nothing is read into a mistake: `steps = true` is no 1, `"100"` no number, and numbers are finite. A field that
    may be none is that by `"none"`.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False, **_STRICT
    )

    @model_validator(mode="before")
    @classmethod
    def _read_none(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        return {name: None if value == NONE and cls.may_be_none(name) else value for name, value in given.items()}

    @classmethod
    def may_be_none(cls, name: str) -> bool:
        """Whether `"none"` is a value of that field."""
        field = cls.model_fields.get(name)
        return field is not None and type(None) in typing.get_args(field.annotation)

    @field_validator("*")
    @classmethod
    def _is_no_absurd_number(cls, value: Any) -> Any:
        if isinstance(value, int) and abs(value) >= _LIMIT:
            raise ValueError(f"{value:.3g} is too large" if value < 10**300 else "it is too large")
        return value
