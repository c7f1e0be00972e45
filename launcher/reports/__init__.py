"""Pure: what became of a job, for people to read: from log folders to events, and from these to where its time went.

`find_files` and `read_events` read the events of log folders, `jobs_of` tells which belong to one job, `offsets` and
`set_right` set its nodes' clocks right, and `account` says what each second was spent on. `sentence` is an
event in words.
"""

from launcher.reports.clocks import offsets, set_right
from launcher.reports.files import find_files, read_events
from launcher.reports.goodput import Cause, Goodput, Interruption, Outage, account
from launcher.reports.jobs import jobs_of
from launcher.reports.sentences import sentence
from launcher.rounds.mesh import describe_mesh
from launcher.text import name_some

__all__ = ["Cause", "Goodput", "Interruption", "Outage"]
__all__ += ["account", "find_files", "jobs_of", "offsets", "read_events", "set_right"]
__all__ += ["describe_mesh", "name_some", "sentence"]
