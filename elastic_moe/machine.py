"""How fast the machines are that a mesh is planned for, as a job says it or a probe has measured it. No torch."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

from pydantic import Field, ValidationError

from elastic_moe.errors import UserError
from elastic_moe.section import Section
from elastic_moe.whole_files import write_whole


class MachineSpeed(Section):
    """What a rank achieves. The defaults are those of H100s with 200 Gbit/s each between nodes."""

    flops_per_s: float = Field(3e14, ge=1)
    """Floating-point operations per second that a rank achieves."""
    memory_bytes_per_s: float = Field(2.5e12, ge=1)
    """Bytes per second that a rank reads or writes in its own memory."""
    intra_node_bytes_per_s: float = Field(2e11, ge=1)
    """Bandwidth of a rank to another of its node."""
    inter_node_bytes_per_s: float = Field(2e10, ge=1)
    """Bandwidth of a rank to another node."""
    replica_bytes_per_s: float | None = Field(None, ge=1)
    """Bandwidth of a rank where gradients are summed over replicas within a node; none takes `intra_node_bytes_per_s`.
    Ranks that compute on processors gather and exchange through memory they share, and sum over replicas by sockets."""
    latency_s: float = Field(2e-5, gt=0, le=3600)
    """Fixed cost of a collective."""
    hop_s: float = Field(1e-6, gt=0, le=3600)
    """Further cost of a collective for each rank beyond the first."""
    layer_launch_s: float = Field(3e-4, gt=0, le=3600)
    """Fixed cost of a layer's forward and backward pass, whatever its size."""
    cores_per_node: int | None = Field(None, ge=1)
    """Processor cores that the ranks of a node share, where they compute on them; none where each has a device."""


def read_calibration(path: str | Path) -> dict[str, float]:
    """The fields of `MachineSpeed` that a file of `elastic_moe.calibrate` holds.

    Raises:
        UserError: there is no such file, or it holds something else.
    """
    try:
        fields = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"calibration {path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise UserError(f"calibration {path} is no JSON: make it with `python -m elastic_moe.calibrate`") from None
    if not isinstance(fields, dict):
        raise UserError(f"calibration {path} is no JSON object: make it with `python -m elastic_moe.calibrate`")
    for name, value in fields.items():
        if name not in MachineSpeed.model_fields:
            raise UserError(
                f"calibration {path}: unknown field {name}; known are {', '.join(MachineSpeed.model_fields)}"
            )
        whole = name == "cores_per_node"
        is_number = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
        if not is_number or not 0 < value < math.inf:
            raise UserError(
                f"calibration {path}: {name} = {value!r} must be a {'whole ' if whole else ''}number above 0"
            )
    try:
        MachineSpeed.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        allowed = first["msg"].replace("Input should", "it must")
        raise UserError(f"calibration {path}: {first['loc'][0]} = {first['input']!r}: {allowed}") from None
    return fields


def write_calibration(path: str | Path, fields: Mapping[str, float]) -> None:
    """Write what `read_calibration` reads. Raises UserError where that cannot be."""
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(dict(fields), indent=1) + "\n"
        write_whole(target, lambda file: file.write_text(text, encoding="utf-8"))
    except OSError as error:
        raise UserError(f"calibration {path} cannot be written: {error.strerror}") from None
