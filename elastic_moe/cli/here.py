"""The current folder of a command: it may have been deleted meanwhile, or be one that this user may not look into."""

from __future__ import annotations

import errno
import os

from launcher import leave_folder_that_is_gone

_LEADS_NOWHERE = (errno.ENOENT, errno.EACCES, errno.EPERM, errno.ESTALE)
_MEND = "go to another one, or give whole paths"
_is_gone = False


def leave() -> None:
    """Go to another folder if this one has been deleted: what needs none works there."""
    global _is_gone
    _is_gone = leave_folder_that_is_gone()


def hint() -> str:
    """What to add to a mistake's line where it may come of the folder; "" elsewhere."""
    return f" (the current folder has been deleted: {_MEND})" if _is_gone else ""


def to_blame(error: OSError) -> str:
    """Why a relative path has led nowhere: the current folder is to blame. "" if it is not, or no such path failed."""
    named = error.filename if isinstance(error.filename, str) else ""
    try:
        here = os.getcwd()
    except OSError as problem:
        return f"the current folder is not there any more ({problem.strerror}): {_MEND}"
    if error.errno not in _LEADS_NOWHERE or (os.path.isabs(named) and not named.startswith(f"{here}/")):
        return ""
    if _is_gone:
        return f"{named}: {error.strerror}{hint()}"
    if not os.access(here, os.X_OK):
        return f"{named}: this user may not look into the current folder, {here}: {_MEND}"
    return ""
