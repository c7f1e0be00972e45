"""`elastic-moe drain`: ask nodes of a running job to save, leave, and let the others go on. Imports no torch."""

from __future__ import annotations

import argparse
import getpass
import os
import socket
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING

from elastic_moe.cli.job_options import add_job_options, open_named_job
from elastic_moe.cli.parser import positive_float
from elastic_moe.errors import UserError
from launcher import KVUnavailable

if TYPE_CHECKING:
    from elastic_moe.cli.parser import Subparsers
    from launcher import JobClient, Node

_EPILOG = """\
The workers of all nodes stop at one step boundary and save, the node leaves,
the others go on without it. Its agent ends with exit code 75. Nodes of a stock
torchrun do not follow orders: stop them with SIGTERM.

Exit codes: 0 the nodes have left (with --no-wait: have been asked to); 1 not in
time, or the store does not answer any more; 2 there is no such node, or wrong
usage.
"""


def register(verbs: Subparsers) -> None:
    """Add the verb `drain`."""
    parser = verbs.add_parser(
        "drain",
        help="ask nodes of a running job to save and leave",
        description="Ask nodes of a running job to save and leave.",
        epilog=_EPILOG,
    )
    parser.add_argument("nodes", nargs="*", metavar="NODE", help="id of a node, or its name or host if no other has it")
    parser.add_argument("--all", action="store_true", help="all nodes: the job stops and can be resumed")
    parser.add_argument(
        "--grace",
        type=positive_float,
        metavar="SECONDS",
        help="gone within so long (default: what its --drain-grace says)",
    )
    parser.add_argument("--no-wait", action="store_true", help="do not wait until the nodes have left")
    parser.add_argument(
        "--timeout",
        type=positive_float,
        default=300.0,
        metavar="SECONDS",
        help="wait so long at most (default: 300)",
    )
    add_job_options(parser)
    parser.set_defaults(handler=handle)


def handle(args: argparse.Namespace) -> int:
    """Give the order, and wait until the nodes have left."""
    if bool(args.nodes) == args.all:
        raise UserError("drain: name the nodes, or give --all")
    from launcher import DrainOrder

    with open_named_job(args) as job:
        here = job.nodes()
        if not here:
            raise UserError(f"job {job.run_id!r} at {job.endpoint} has no live node")
        chosen = [node.node_id for node in here] if args.all else choose(here, args.nodes)
        job.drain(DrainOrder(tuple(chosen), by=f"{_user()}@{socket.gethostname()}", grace_s=args.grace))
        print(f"asked to leave: {', '.join(chosen)}", flush=True)
        return 0 if args.no_wait else _wait(job, chosen, args.timeout)


def choose(nodes: Sequence[Node], names: Collection[str]) -> list[str]:
    """Find the ids of the nodes that a person means: by id, by --node-name, or by host.

    Raises:
        UserError: a name is nobody's, or several nodes'.
    """
    chosen: dict[str, None] = {}
    for name in names:
        found = [n for n in nodes if n.node_id == name]
        found = found or [n for n in nodes if name in (n.node_id.rpartition("-")[0], n.host)]
        if len(found) > 1:
            raise UserError(f"node {name!r}: {len(found)} are called so: {', '.join(n.node_id for n in found)}")
        if not found:
            raise UserError(f"node {name!r}: not in this job; there are {', '.join(n.node_id for n in nodes)}")
        chosen[found[0].node_id] = None
    return list(chosen)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user need not have a name
        return f"uid {os.getuid()}"


def _wait(job: JobClient, chosen: Sequence[str], timeout_s: float) -> int:
    """Print what each node does until all have left, and return the exit code."""
    began_s = time.monotonic()
    told = dict.fromkeys(chosen, "")
    for states in _states(job):
        for node_id in chosen:
            state = states.get(node_id, "left")
            if state != told[node_id]:
                told[node_id] = state
                print(f"{time.monotonic() - began_s:6.1f} s  {node_id}: {state}", flush=True)
        remaining = [node_id for node_id, state in told.items() if state != "left"]
        if not remaining:
            return 0
        if time.monotonic() - began_s >= timeout_s:
            print(f"not gone within {timeout_s:g} s: {', '.join(remaining)}", file=sys.stderr)
            return 1
    raise AssertionError("a job is followed for ever")


def _states(job: JobClient) -> Iterator[dict[str, str]]:
    """What each live node does, whenever something has changed and each second."""
    states: dict[str, str] = {}
    try:
        for status, trouble in job.follow():
            if not trouble:
                states = {node.node_id: node.status.value for node in status.nodes}
            elif job.has_gone_with_its_store():
                states = {}
            yield states
    except KVUnavailable:
        if not job.has_gone_with_its_store():
            raise
        yield {}
