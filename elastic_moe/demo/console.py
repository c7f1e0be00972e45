"""What the demo shows: sentences as they come, and how far the training is.

On a terminal a bar stays below the sentences; elsewhere (a log, CI) a line now and then says the same.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import rich.console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from elastic_moe.demo.records import Record
from elastic_moe.demo.story import count
from elastic_moe.demo.summary import Summary

_LINES_PER_RUN = 5


class Console:
    """Writes sentences, and one progress bar at a time, to stdout."""

    def __init__(self) -> None:
        self._console = rich.console.Console(highlight=False, soft_wrap=True)
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._name = ""
        self._total = 0
        self._told = 0

    def say(self, *sentences: str) -> None:
        """Write sentences, above the bar if there is one."""
        for sentence in sentences:
            self._console.print(escape(sentence))

    @contextlib.contextmanager
    def progress(self, name: str, total: int) -> Iterator[None]:
        """Show a bar of `total` steps while the block runs."""
        self._name, self._total, self._told = name, total, 0
        if not self._console.is_terminal:
            yield
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[loss]}"),
        )
        with Progress(*columns, console=self._console, transient=True) as self._bar:
            self._task = self._bar.add_task(name, total=total, loss="")
            try:
                yield
            finally:
                self._bar = None

    def step(self, metrics: Record) -> None:
        """Move the bar on by a step."""
        if self._bar is not None:
            loss = f"loss {metrics['loss']:.3f}, {count(metrics['world_size'], 'rank')}"
            self._bar.update(self._task, completed=metrics["step"], loss=loss)
        elif not self._console.is_terminal and metrics["step"] * _LINES_PER_RUN // self._total > self._told:
            self._told = metrics["step"] * _LINES_PER_RUN // self._total
            self.say(f"          {self._name}: step {metrics['step']} of {self._total}, loss {metrics['loss']:.3f}")

    def tail(self, name: str, path: Path, lines: Sequence[str]) -> None:
        """Show the end of a process's log."""
        self.say("", f"--- {name}, the end of {path}", *lines)

    def summary(self, summary: Summary, out: Path) -> None:
        """Show the outcome, and where its records are."""
        recovered = "-" if summary.recovered_s is None else f"{summary.recovered_s:.1f} s"
        paused = "-" if summary.paused_s is None else f"{summary.paused_s:.1f} s"
        difference = f"largest relative difference of a loss {summary.loss_rel_diff_max:.1e}"
        if summary.loss_rel_diff_max == 0:
            difference = "every loss is equal to the last bit"
        self.say(
            "",
            f"outcome                    {'ok' if summary.ok else 'NOT OK'}",
            f"node lost to next step     {recovered}, {summary.steps_replayed} steps done again",
            *([f"  of which                 {_listed(summary.phases_s)}"] if summary.phases_s else []),
            f"node taken in              pause of {paused}, {summary.steps_lost_on_return} steps lost",
            f"loss                       {summary.loss_first:.3f} to {summary.loss_last:.3f} in {summary.steps} steps",
            f"against the unbroken run   {difference}",
            f"records                    {out}/summary.json, events.jsonl, metrics.jsonl, story.png",
            *(f"PROBLEM: {problem}" for problem in summary.problems),
        )


def _listed(phases_s: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {seconds:.2f}" for name, seconds in phases_s.items())
