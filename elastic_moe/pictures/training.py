"""Draws a run: loss and validation, throughput, how level the experts' loads are; generations shaded, faults marked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from elastic_moe.pictures.story import RunStory, curve, loads
from elastic_moe.whole_files import write_whole
from launcher.reports import describe_mesh

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_INK = "#1f2430"
_MUTED = "#6b7280"
_GRID = "#e5e7eb"
_RUN = "#2563eb"
_VALIDATION = "#d97706"
_LOST = "#9ca3af"
_LEAST = "#0d9488"
_SHADES = ("#eef2ff", "#fef9ec")
_NAMED_FROM = 0.08  # part of the picture's width that a generation must fill to be named
_MOST_EXPERTS_NAMED = 12
_SPARSE = 60  # steps up to which each is drawn as a point as well


@dataclass(frozen=True)
class Mark:
    """Something that happened to the job after `step`, in a few words."""

    step: int
    text: str
    is_fault: bool


def draw_training(path: Path, story: RunStory, marks: Sequence[Mark], title: str) -> None:
    """Write `path`, a picture in the format that its name ends with. There is at least one step."""
    import matplotlib as mpl

    mpl.use("Agg")  # no display needed, none opened
    import matplotlib.pyplot as plt

    style: dict[Any, Any] = {"font.family": "DejaVu Sans", "font.size": 10, "text.color": _INK, "axes.edgecolor": _GRID}
    load_steps, columns = loads(story.kept)
    heights = [4, 2, 2, 3] if columns else [4, 2, 2]
    with plt.rc_context(style):
        figure, all_axes = plt.subplots(
            len(heights), 1, figsize=(10.67, 9 if columns else 7), dpi=150, sharex=True, height_ratios=heights,
            layout="constrained",
        )  # fmt: skip
        try:
            _draw_loss(all_axes[0], story)
            _draw_speed(all_axes[1], story)
            _draw_levels(all_axes[2], story)
            for axes in all_axes[:3]:
                _shade(axes, story)
                for mark in marks:
                    axes.axvline(mark.step, color="#dc2626" if mark.is_fault else "#059669", lw=1.1, ls=(0, (4, 3)))
                axes.spines[["top", "right"]].set_visible(False)
                axes.tick_params(colors=_MUTED, length=0)
                axes.grid(axis="y", color=_GRID, lw=0.8)
            _name(all_axes[0], story, marks)
            if columns:
                _draw_experts(figure, all_axes[3], load_steps, columns)
            all_axes[-1].set_xlabel("step", color=_MUTED)
            figure.suptitle(title, x=0.012, ha="left", fontsize=13, fontweight="bold", color=_INK)
            write_whole(path, figure.savefig)
        finally:
            plt.close(figure)


def _draw_loss(axes: Axes, story: RunStory) -> None:
    marker = "." if len(story.kept) <= _SPARSE else ""
    for number, lines in enumerate(story.lost):
        axes.plot(
            *curve(lines, "loss"), color=_LOST, lw=1.2, ls=(0, (2, 2)), marker=marker, ms=3,
            label="done again later" if number == 0 else None,
        )  # fmt: skip
    axes.plot(*story.curve("loss"), color=_RUN, lw=1.5, marker=marker, ms=4, label="training")
    validated = [record for record in story.kept if record.get("val_loss") is not None]
    if validated:
        axes.plot(
            [record["step"] for record in validated], [record["val_loss"] for record in validated],
            color=_VALIDATION, lw=1.2, marker="o", ms=4, label="validation",
        )  # fmt: skip
    axes.set_ylabel("loss, nats", color=_MUTED)
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + 0.3 * (high - low))  # room for the generations' names
    first, last = story.kept[0]["step"], story.kept[-1]["step"]
    axes.set_xlim(first, max(last, first + 1))
    axes.legend(loc="upper right", bbox_to_anchor=(1.0, 0.72), frameon=False)  # below the names


def _draw_speed(axes: Axes, story: RunStory) -> None:
    for lines in story.lost:
        axes.plot(*curve(lines, "tokens_per_s"), color=_LOST, lw=1.0, ls=(0, (2, 2)))
    axes.plot(*story.curve("tokens_per_s"), color=_RUN, lw=1.2)
    axes.set_ylabel("tokens/s", color=_MUTED)
    axes.set_ylim(bottom=0)
    known = [record["mfu"] for record in story.kept if record.get("mfu") is not None]
    if known:
        middle = sorted(known)[len(known) // 2]
        axes.text(
            0.995, 0.06, f"{middle:.1%} of the devices' peak (median MFU)",
            transform=axes.transAxes, ha="right", va="bottom", fontsize=9, color=_MUTED,
        )  # fmt: skip


def _draw_levels(axes: Axes, story: RunStory) -> None:
    axes.axhline(1.0, color=_MUTED, lw=0.8)
    axes.plot(*story.curve("load_max"), color=_VALIDATION, lw=1.2, label="busiest expert")
    axes.plot(*story.curve("load_min"), color=_LEAST, lw=1.2, label="least busy")
    axes.set_ylim(bottom=0)
    axes.set_ylabel("rows over\nthe mean", color=_MUTED)
    axes.legend(loc="upper right", ncols=2, frameon=False)


def _draw_experts(figure: Figure, axes: Axes, steps: Sequence[int], columns: Sequence[Sequence[float]]) -> None:
    """A row for each expert, a column for each step that tells of loads, as wide as to the one before."""
    from matplotlib.colors import TwoSlopeNorm

    first = max(1, steps[0] - (steps[1] - steps[0] if len(steps) > 1 else 1))
    edges = [first, *steps] if first < steps[0] else [steps[0] - 1, *steps]
    rows = list(zip(*columns, strict=True))
    norm = TwoSlopeNorm(vcenter=1.0, vmin=0.0, vmax=max(2.0, *(max(column) for column in columns)))
    mesh = axes.pcolormesh(edges, range(len(rows) + 1), rows, cmap="RdBu_r", norm=norm, rasterized=True)
    every = -(-len(rows) // _MOST_EXPERTS_NAMED)
    axes.set_yticks([at + 0.5 for at in range(0, len(rows), every)], [str(at) for at in range(0, len(rows), every)])
    axes.set_ylabel("expert", color=_MUTED)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=_MUTED, length=0)
    bar = figure.colorbar(mesh, ax=axes, orientation="horizontal", location="bottom", aspect=60, pad=0.02)
    bar.set_label("rows of an expert over the mean, layers averaged", color=_MUTED, fontsize=9)
    bar.ax.tick_params(colors=_MUTED, labelsize=8)


def _shade(axes: Axes, story: RunStory) -> None:
    for number, (start, end) in enumerate(_extents(story)):
        axes.axvspan(start, end, color=_SHADES[number % len(_SHADES)], lw=0, zorder=0)


def _extents(story: RunStory) -> list[tuple[int, int]]:
    """Where each span is drawn: to where the next one begins."""
    starts = [span.first for span in story.spans]
    return list(zip(starts, [*starts[1:], story.spans[-1].last], strict=True))


def _name(axes: Axes, story: RunStory, marks: Sequence[Mark]) -> None:
    low, high = axes.get_xlim()
    for span, (start, end) in zip(story.spans, _extents(story), strict=True):
        if end - start < _NAMED_FROM * (high - low):
            continue
        ranks = f"{span.world_size} rank{'s' if span.world_size != 1 else ''}"
        mesh = "\n" + describe_mesh(span.mesh).replace(" x ", "\n") if span.mesh else ""
        told = f"generation {span.generation}\n{ranks}{mesh}" if span.generation else f"{ranks}{mesh}"
        axes.text(
            (start + end) / 2, 0.985, told,
            transform=axes.get_xaxis_transform(), ha="center", va="top", fontsize=8.5, color=_MUTED, linespacing=1.3,
        )  # fmt: skip
    for number, mark in enumerate(marks):
        axes.annotate(
            mark.text, (mark.step, 0.05 + 0.09 * (number % 3)), xycoords=axes.get_xaxis_transform(), xytext=(5, 0),
            textcoords="offset points", color="#dc2626" if mark.is_fault else "#059669", fontsize=8.5, va="bottom",
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1.5}, zorder=5,
        )  # fmt: skip
