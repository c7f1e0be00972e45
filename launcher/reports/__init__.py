"""Pure: what became of a job, for people to read: from log folders to events, and from these to where its time went.

`find_files` and `read_events` read the events of log folders, `steady` undoes that clocks were set meanwhile (a
`ClockJump` each), `jobs_of` tells which belong to one job, `offsets` and `set_right` set its nodes' clocks right, of
which `doubtful` names those that cannot be, and `account` says what each second was spent on. `sentence` is an event in
words.
"""

from launcher.reports.clocks import ClockJump, doubtful, offsets, set_right, steady
from launcher.reports.files import find_files, read_events
from launcher.reports.goodput import Cause, Goodput, Interruption, Outage, account
from launcher.reports.jobs import jobs_of
from launcher.reports.sentences import sentence
from launcher.rounds.mesh import describe_mesh
from launcher.text import name_some

__all__ = ["Cause", "ClockJump", "Goodput", "Interruption", "Outage"]
__all__ += ["account", "doubtful", "find_files", "jobs_of", "offsets", "read_events", "set_right", "steady"]
__all__ += ["describe_mesh", "name_some", "sentence"]
