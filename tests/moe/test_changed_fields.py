"""A resume with another value of each field of a job file: refused, taken with a line, or of no consequence."""

from __future__ import annotations

import typing
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest

from elastic_moe.config import JobConfig
from elastic_moe.data.corpus import TokenKind
from elastic_moe.errors import UserError
from elastic_moe.trainer.changes import changes
from elastic_moe.trainer.setup import data_state
from elastic_moe.trainer.state import DataProgress, DataState
from storage import Checkpointer

REFUSED = {"seed", "global_batch", "seq_len", "validation", "document_mask"}
OF_THE_DATA = {"url", "format", "text_field", "tokenizer", "end_of_document"}
"""Refused by what they make of the data: its fingerprint, and the tokenizer's."""
NO_CONSEQUENCE = {
    "data": {"may_change", "cache", "cache_gib"},
    # how it is computed and not what; when a job gives up; what is told of it
    "train": {"max_micro_batch", "device", "keep_gathered", "recompute", "max_skipped"}
    | {"validate_every", "validation_sequences", "metrics", "log_every", "progress", "peak_flops", "tensorboard"}
    | {"wandb"},
}


def other(value: Any, annotation: Any) -> Any:
    """Another value of a field; nothing validates it."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    for choices in (annotation, *typing.get_args(annotation)):
        if typing.get_origin(choices) is Literal:
            return next(choice for choice in typing.get_args(choices) if choice != value)
    values = {bool: False, int: 7, float: 0.5}
    return next((found for kind, found in values.items() if kind in typing.get_args(annotation)), "another")


def fields() -> Iterator[tuple[str, str, Any]]:
    """Each field, its section and another value of it."""
    job = JobConfig()
    for section, info in JobConfig.model_fields.items():
        for name, field in getattr(info.annotation, "model_fields").items():  # noqa: B009
            if name != "preset":  # a name for other fields, which is gone once it was read
                yield section, name, other(getattr(getattr(job, section), name), field.annotation)


def state_of(job: JobConfig) -> DataState:
    corpus: Any = SimpleNamespace(fingerprint="f" * 64, tokenizer_digest="", tokenizer=None, tokens=TokenKind.BYTES)
    return data_state(job, corpus)


def changed(section: str, name: str, value: Any) -> JobConfig:
    job = JobConfig()
    return job.model_copy(update={section: getattr(job, section).model_copy(update={name: value})})


def fate(section: str, name: str, value: Any) -> str:
    """What becomes of a resume; a line names the field."""
    saved, now = state_of(JobConfig()), state_of(changed(section, name, value))
    told = changes(saved, now)
    refusals: list[str] = []
    try:
        now.check(saved)
    except UserError as error:
        refusals.append(str(error))
    for line in (*told, *refusals):
        assert f"{section}.{name}" in line
        assert "\n" not in line
    assert len(told) + len(refusals) <= 1
    return "told" if told else "refused" if refusals else "no consequence"


def test_each_field_is_refused_or_told_or_of_no_consequence() -> None:
    expected = {}
    for section, name, _ in fields():
        if section in ("checkpoint", "mesh") or name in NO_CONSEQUENCE.get(section, ()):
            expected[section, name] = "no consequence"
        elif section == "data":
            expected[section, name] = "refused" if name in REFUSED else "no consequence"
        elif section == "model":
            is_told = name in ("balance_coeff", "balance_rate", "z_loss_coeff", "init_std")
            expected[section, name] = "told" if is_told else "refused"
        else:
            expected[section, name] = "refused" if name in REFUSED else "told"
    assert {(section, name): fate(section, name, value) for section, name, value in fields()} == expected
    assert OF_THE_DATA | REFUSED & {"validation", "document_mask"} == {
        name for section, name, _ in fields() if section == "data" and name not in NO_CONSEQUENCE["data"]
    }


@pytest.mark.parametrize(
    ("section", "name", "value", "line"),
    [
        (*("optim", "lr", 0.5), "optim.lr is 0.5 from here on; the checkpoint was trained with 0.001"),
        (*("optim", "clip_norm", None), "optim.clip_norm is none from here on; the checkpoint was trained with 1.0"),
        (*("train", "compile", True), "train.compile is true from here on; the checkpoint was trained with false"),
        (
            *("train", "init_from", "mixtral"),
            "train.init_from is mixtral and is not read: the checkpoint's weights go on, which began as random weights",
        ),
    ],
)
def test_the_lines(section: str, name: str, value: Any, line: str) -> None:
    assert changes(state_of(JobConfig()), state_of(changed(section, name, value))) == [line]


def test_a_checkpoint_that_does_not_say_is_taken(tmp_path: Path) -> None:
    """One of before settings and the kind of tokens were kept, restored by what keeps them."""
    job = JobConfig()

    class Former(DataProgress):
        def state_dict(self) -> dict[str, Any]:
            return {name: value for name, value in super().state_dict().items() if name not in ("settings", "tokens")}

    with Checkpointer(tmp_path / "run") as ckpt:
        ckpt.save(3, {"data": Former(state_of(job), horizon=100)}, wait=True)
    progress = DataProgress(state_of(changed("optim", "lr", 0.5)), horizon=100)
    with Checkpointer(tmp_path / "run") as ckpt:
        assert ckpt.restore({"data": progress}) == 3
    assert progress.loaded == replace(state_of(job), settings="", tokens="")
    assert changes(progress.loaded, progress.data) == []
