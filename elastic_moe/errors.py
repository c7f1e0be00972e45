"""What the trainer and the command line refuse to do.

::

    UserError        the user's mistake: one line that names the field, the value and the mend; exit code 2
    NotSaved         the training is done, and its last state could not be saved; exit code 1
    NotFinite        the training has gone wrong: loss, gradient or parameters are not finite; exit code 70
    Stopped          a signal has stopped the training at a step boundary: to be started again; exit code 75

Errors of the other packages carry an `exit_code` as well (`launcher.errors`, `storage.errors`), so that the
command line needs no table of them.
"""

from __future__ import annotations

__all__ = ["NotFinite", "NotSaved", "Stopped", "UserError"]


class UserError(Exception):
    """The user's mistake, told in one line without a traceback."""

    exit_code = 2


class NotFinite(Exception):
    """The training has gone wrong, and would go wrong again; told in one line, as a mistake is."""

    exit_code = 70  # EX_SOFTWARE of sysexits(3), as `elastic-moe run` says "do not requeue"


class NotSaved(Exception):
    """The last state could not be saved: the job must not be taken for done."""

    exit_code = 1


class Stopped(Exception):
    """A signal has stopped the training at a step boundary: started again, it goes on from there."""

    exit_code = 75  # EX_TEMPFAIL of sysexits(3), as `elastic-moe run` says of a node that was asked to leave
