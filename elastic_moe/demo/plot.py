"""The demo as a picture: both loss curves, the generations shaded, the faults marked."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from elastic_moe.demo.records import Record, last_by_step
from elastic_moe.demo.story import count
from elastic_moe.demo.summary import Generation, Summary
from launcher.reports import describe_mesh

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_INK = "#1f2430"
_MUTED = "#6b7280"
_GRID = "#e5e7eb"
_RUN = "#2563eb"
_UNBROKEN = "#f59e0b"
_FAULT = "#dc2626"
_RETURN = "#059669"
_SHADES = ("#eef2ff", "#fef2f2", "#ecfdf5")


def draw(
    path: Path, *, summary: Summary, metrics: Sequence[Record], unbroken: Sequence[Record], events: Sequence[Record]
) -> None:
    """Write `path`, a PNG of 1600 x 900 pixels."""
    import matplotlib as mpl

    mpl.use("Agg")  # no display needed, none opened
    import matplotlib.pyplot as plt

    style: dict[Any, Any] = {"font.family": "DejaVu Sans", "font.size": 10, "text.color": _INK, "axes.edgecolor": _GRID}
    with plt.rc_context(style):
        figure, (losses, differences) = plt.subplots(
            2, 1, figsize=(10.67, 6), dpi=150, sharex=True, height_ratios=[4, 1], layout="constrained"
        )
        _draw_losses(losses, metrics, unbroken)
        _draw_differences(differences, metrics, unbroken)
        for axes in (losses, differences):
            _shade(axes, summary.generations)
            axes.spines[["top", "right"]].set_visible(False)
            axes.tick_params(colors=_MUTED, length=0)
        _name_generations(losses, summary.generations)
        _mark_faults(losses, summary, events)
        losses.legend(loc="upper right", bbox_to_anchor=(1.0, 0.83), frameon=False)
        figure.suptitle(_title(summary), x=0.012, ha="left", fontsize=13, fontweight="bold", color=_INK)
        figure.savefig(path)
        plt.close(figure)


def _title(summary: Summary) -> str:
    recovered = f", training again after {summary.recovered_s:.1f} s" if summary.recovered_s is not None else ""
    return f"A node is lost{recovered}; it returns, {count(summary.steps_lost_on_return, 'step')} lost"


def _draw_losses(axes: Axes, metrics: Sequence[Record], unbroken: Sequence[Record]) -> None:
    final, expected = last_by_step(metrics), last_by_step(unbroken)
    axes.plot(
        list(expected), [r["loss"] for r in expected.values()], color=_UNBROKEN, lw=5, alpha=0.55,
        solid_capstyle="round", label="unbroken run, one process",
    )  # fmt: skip
    axes.plot(
        list(final), [r["loss"] for r in final.values()], color=_RUN, lw=1.6, label="this run, nodes lost and found"
    )
    axes.set_ylabel("loss (nats per byte)", color=_MUTED)
    axes.grid(axis="y", color=_GRID, lw=0.8)
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + 0.3 * (high - low))  # room for the generations' names
    axes.set_xlim(min(final, default=0), max(final, default=1))


def _draw_differences(axes: Axes, metrics: Sequence[Record], unbroken: Sequence[Record]) -> None:
    final, expected = last_by_step(metrics), last_by_step(unbroken)
    steps = [step for step in final if step in expected]
    floor = 1e-9  # equal to the last bit would be minus infinity on a logarithmic axis
    differences = [
        max(floor, abs(final[step]["loss"] - expected[step]["loss"]) / abs(expected[step]["loss"])) for step in steps
    ]
    if differences and max(differences) == floor:
        axes.text(
            0.5, 0.5, "every loss is equal to the last bit",
            transform=axes.transAxes, ha="center", va="center", color=_MUTED,
        )  # fmt: skip
    axes.plot(steps, differences, color=_RUN, lw=0, marker=".", ms=4)
    axes.set_yscale("log")
    axes.set_ylim(floor / 2, 1e-4)
    axes.axhline(1e-5, color=_FAULT, lw=0.8, ls=(0, (4, 4)))
    axes.set_ylabel("relative\ndifference", color=_MUTED)
    axes.set_xlabel("step", color=_MUTED)


def _shade(axes: Axes, generations: Sequence[Generation]) -> None:
    for index, (_, (first, last)) in enumerate(_trained(generations)):
        axes.axvspan(first, last, color=_SHADES[index % len(_SHADES)], lw=0, zorder=0)


def _name_generations(axes: Axes, generations: Sequence[Generation]) -> None:
    for generation, (first, last) in _trained(generations):
        # An axis a line: a generation may be narrow.
        mesh = "\n" + describe_mesh(generation.mesh).replace(" x ", "\n") if generation.mesh else ""
        axes.text(
            (first + last) / 2, 0.985, f"generation {generation.generation}\n{generation.world_size} ranks{mesh}",
            transform=axes.get_xaxis_transform(), ha="center", va="top", fontsize=9, color=_MUTED, linespacing=1.35,
        )  # fmt: skip


def _mark_faults(axes: Axes, summary: Summary, events: Sequence[Record]) -> None:
    killed = next((event for event in events if event["event"] == "demo_node_killed"), None)
    if killed is None:
        return
    after = f"\nnext step after {summary.recovered_s:.1f} s" if summary.recovered_s is not None else ""
    _mark(axes, killed["step"], f"{killed['node']} {killed['fault']}{after}", _FAULT, 0.5)
    back = next((g for g in summary.generations if g.reason.startswith("join") and g.steps), None)
    if back and back.steps:
        paused = f"\npause of {summary.paused_s:.1f} s" if summary.paused_s is not None else ""
        _mark(axes, back.steps[0], f"{killed['node']} is back{paused}", _RETURN, 0.36)


def _mark(axes: Axes, step: int, text: str, color: str, height: float) -> None:
    axes.axvline(step, color=color, lw=1.4)
    axes.annotate(
        text, (step, height), xycoords=axes.get_xaxis_transform(), xytext=(8, 0), textcoords="offset points",
        color=color, fontsize=9.5, fontweight="bold", va="bottom", ha="left", zorder=5,
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 2},
    )  # fmt: skip


def _trained(generations: Sequence[Generation]) -> list[tuple[Generation, tuple[int, int]]]:
    """Generations that completed steps, each with the span up to where the next one took over."""
    trained = [(each, each.steps) for each in generations if each.steps]
    spans = []
    for index, (generation, (first, last)) in enumerate(trained):
        end = trained[index + 1][1][0] if index + 1 < len(trained) else last
        spans.append((generation, (first, end)))
    return spans
