"""Keep DNS out of torch's agent.

torch puts the host's full name into an event for every worker that starts or ends, and asks DNS for it each time
(`socket.getfqdn`): where DNS does not answer, that is ten seconds per worker in every restart, twice the resolver's
five. Our own events say which node it is, so torch's get the kernel's name.
"""

from __future__ import annotations

import socket

from torch.distributed.elastic.agent.server import api


def ask_no_dns() -> None:
    """Let torch's events name this host as the kernel does."""
    api._get_fq_hostname = socket.gethostname
