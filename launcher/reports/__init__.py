"""Pure: what became of a job, for people to read: from log folders to events, and from these to where its time went.

`find_files` and `read_events` read the events of log folders, `jobs_of` tells which belong to one job, `offsets` and
`set_right` set its nodes' clocks right, and `account` says what each second was spent on. `describe_failure`,
`describe_root_cause` and `describe_fields` are events in words.
"""

from launcher.reports.clocks import offsets, set_right
from launcher.reports.files import find_files, read_events
from launcher.reports.goodput import Cause, Goodput, Interruption, Outage, account
from launcher.reports.jobs import jobs_of
from launcher.wording import describe_failure, describe_fields, describe_root_cause, name_some

__all__ = ["Cause", "Goodput", "Interruption", "Outage"]
__all__ += ["account", "find_files", "jobs_of", "offsets", "read_events", "set_right"]
__all__ += ["describe_failure", "describe_fields", "describe_root_cause", "name_some"]
