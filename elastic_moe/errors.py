"""What the trainer and the command line refuse to do.

::

    UserError        the user's mistake: one line that names the field, the value and the mend; exit code 2
    NotSaved         the training is done, and its last state could not be saved; exit code 1

Errors of the other packages carry an `exit_code` as well (`launcher.errors`, `storage.errors`), so that the
command line needs no table of them.
"""

from __future__ import annotations


class UserError(Exception):
    """The user's mistake, told in one line without a traceback."""

    exit_code = 2


class NotSaved(Exception):
    """The last state could not be saved: the job must not be taken for done."""

    exit_code = 1
