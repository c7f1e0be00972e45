"""What a worker's end means. Pure."""

from __future__ import annotations

from launcher.channel import Phase, Progress

USAGE_EXIT_CODE = 2


def is_restartable(exit_code: int, progress: Progress) -> bool:
    """Whether running the same workers again may help.

    A program that exits with 2 before its first step was given something it cannot work with: a wrong option, a
    missing file, a bad configuration. It would do so again.
    """
    return not (exit_code == USAGE_EXIT_CODE and progress.phase not in (Phase.RUNNING, Phase.YIELDED))
