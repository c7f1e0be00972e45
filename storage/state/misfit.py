"""The line that says how a checkpoint and a state do not fit. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence

from storage.torch_private import CHECKPOINTED_MODULE, COMPILED_MODULE, FSDP1_MODULE

NUM_SHOWN = 5
_WRAPPERS = ("module", COMPILED_MODULE, FSDP1_MODULE, CHECKPOINTED_MODULE)
_WRAPPED = re.compile(rf"(^|\.)({'|'.join(_WRAPPERS)})(?=\.|$)")


def misfit(where: str, odd: Sequence[str], vain: Sequence[str], surplus: Sequence[str]) -> str:
    """The line that says what is wrong and what to do.

    Args:
        where: the checkpoint, in words.
        odd: sentences about entries of another shape or kind.
        vain: names that only the state has.
        surplus: names that only the checkpoint has.
    """
    parts = []
    if odd:
        parts.append(_first(odd, "; "))
    if vain:
        parts.append(f"it has no {_first([repr(name) for name in vain], ', ')}")
    if surplus:
        parts.append(f"the state does not ask for its {_first([repr(name) for name in surplus], ', ')}")
    advice = "" if odd else _hint(vain, surplus) or _ALLOW
    return f"{where} does not fit the state: {'; '.join(parts)}{advice}"


_ALLOW = " (restore(..., strict=False) takes what fits, ignore=['name.*'] leaves names alone)"


def _first(texts: Sequence[str], separator: str) -> str:
    more = f"{separator}and {len(texts) - NUM_SHOWN} more" if len(texts) > NUM_SHOWN else ""
    return separator.join(texts[:NUM_SHOWN]) + more


def _hint(vain: Sequence[str], surplus: Sequence[str]) -> str:
    """Advice where names differ only by what wrappers put into them, or by how they begin; "" where there is none."""
    plain = {_WRAPPED.sub("", name).lstrip("."): name for name in surplus}
    for name in vain:
        other = plain.get(_WRAPPED.sub("", name).lstrip("."))
        if other is not None:
            wrapper = next((w for w in _WRAPPERS if (w in other.split(".")) != (w in name.split("."))), None)
            if wrapper is not None:
                side = "the checkpoint" if wrapper in other.split(".") else "the state"
                return (
                    f" (the names in {side} have {wrapper + '.'!r} in them: give the module, not the state_dict of what"
                    f" it is wrapped in, or nest the state alike: {{..., {{{wrapper!r}: ...}}}})"
                )
    for name in vain:
        for other in surplus:
            longer, shorter = (other, name) if len(other) > len(name) else (name, other)
            if name != other and longer.endswith("." + shorter.partition(".")[2]) and shorter.count("."):
                return f" ({name!r} in the state may be {other!r} in the checkpoint: nest the state as it was saved)"
        break
    return ""
