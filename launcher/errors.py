"""What can go wrong in the launcher.

::

    LauncherError                    exit code 1
    ├── UsageError                   the user's mistake: one line, exit code 2
    ├── KVError
    │   ├── KVUnavailable            the store does not answer now; the caller may try again
    │   │   └── StoreHostSilent      the same, of a store that one of the nodes hosts
    │   └── Compacted                a watch asked for revisions that the store has forgotten; list again
    ├── JobClosed                    the job ended: succeeded, or failed with a reason
    ├── Drained                      this node was asked to leave, and does; exit code 75, or 128 + signal
    └── RendezvousTimeout            no round was formed in the time given; exit code 75
"""

__all__ = [
    "Compacted",
    "Drained",
    "JobClosed",
    "KVError",
    "KVUnavailable",
    "LauncherError",
    "RendezvousTimeout",
    "StoreHostSilent",
    "UsageError",
]

DRAINED_EXIT_CODE = 75
"""EX_TEMPFAIL of sysexits(3): neither done nor failed, another start makes sense."""


class LauncherError(Exception):
    """Root of the launcher's errors; `exit_code` is what the command line returns for it."""

    exit_code = 1


class UsageError(LauncherError):
    """The user's mistake, in one line that names the field, the value and the mend."""

    exit_code = 2


class KVError(LauncherError):
    """The rendezvous store refused or failed."""


class KVUnavailable(KVError):
    """No answer from the store. A write may or may not have happened: read before writing again."""


class StoreHostSilent(KVUnavailable):
    """The node that hosts the store does not answer; `refused`: its machine does, and the store's process is gone."""

    def __init__(self, what: str, node_id: str, *, refused: bool) -> None:
        super().__init__(what)
        self.node_id = node_id
        self.refused = refused


class Compacted(KVError):
    """The revisions that a watch wants are gone: list again and watch from the listing's revision."""


class JobClosed(LauncherError):
    """The job has ended; `outcome` is "succeeded" or says why it failed."""

    def __init__(self, outcome: str) -> None:
        super().__init__(f"the job is closed: {outcome}")
        self.outcome = outcome


class Drained(LauncherError):
    """This node leaves the job because it was asked to; the job goes on without it, or can be resumed."""

    def __init__(self, reason: str, exit_code: int = DRAINED_EXIT_CODE) -> None:
        super().__init__(reason)
        self.exit_code = exit_code


class RendezvousTimeout(LauncherError):
    """No round was formed in the time given; the message says what was waited for."""

    exit_code = 75
