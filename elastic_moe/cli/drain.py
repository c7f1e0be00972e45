"""`elastic-moe drain`: ask nodes of a running job to save, leave, and let the others go on. Imports no torch."""

from __future__ import annotations

import argparse
import getpass
import os
import socket
import sys
import time
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from elastic_moe.cli.parser import positive_float
from elastic_moe.cli.store_options import JobStore, add_store_options, open_store
from elastic_moe.errors import UserError
from launcher.coordination.lookup import look_up
from launcher.coordination.orders import give_order
from launcher.drain.draining import DrainOrder
from launcher.errors import KVUnavailable
from launcher.health.liveness import is_refused
from launcher.kv.endpoint import parse_endpoint
from launcher.rounds.records import Node

if TYPE_CHECKING:
    from elastic_moe.cli.parser import Subparsers

_POLL_S = 0.25
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
    add_store_options(parser)
    parser.set_defaults(handler=handle)


def handle(args: argparse.Namespace) -> int:
    """Write the order, and follow what becomes of it."""
    if bool(args.nodes) == args.all:
        raise UserError("drain: name the nodes, or give --all")
    with open_store(args) as store:
        here = list(look_up(store.kv, store.run_id).nodes.values())
        if not here:
            raise UserError(f"job {store.run_id!r} at {store.endpoint} has no live node")
        chosen = [node.node_id for node in here] if args.all else choose(here, args.nodes)
        order = DrainOrder(tuple(chosen), by=f"{_user()}@{socket.gethostname()}", grace_s=args.grace)
        give_order(store.kv, store.run_id, order)
        print(f"asked to leave: {', '.join(chosen)}", flush=True)
        return 0 if args.no_wait else _wait(store, chosen, args)


def choose(nodes: Sequence[Node], names: Collection[str]) -> list[str]:
    """The ids of the nodes that a person means: by id, by --node-name, or by host.

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


def _wait(store: JobStore, chosen: Sequence[str], args: argparse.Namespace) -> int:
    """Tell each step of each node until all have left."""
    began_s = time.monotonic()
    told = dict.fromkeys(chosen, "")
    while True:
        states = _states(store, chosen, args)
        for node_id, state in states.items():
            if state != told[node_id]:
                told[node_id] = state
                print(f"{time.monotonic() - began_s:6.1f} s  {node_id}: {state}", flush=True)
        remaining = [node_id for node_id, state in told.items() if state != "left"]
        if not remaining:
            return 0
        if time.monotonic() - began_s >= args.timeout:
            print(f"not gone within {args.timeout:g} s: {', '.join(remaining)}", file=sys.stderr)
            return 1
        time.sleep(_POLL_S)


def _states(store: JobStore, chosen: Sequence[str], args: argparse.Namespace) -> dict[str, str]:
    """What each chosen node does now, as far as the store tells."""
    try:
        nodes = look_up(store.kv, store.run_id).nodes
    except KVUnavailable:
        # The host of an embedded store leaves last, and takes it along.
        if args.rdzv_backend == "etcd3" or not is_refused(*parse_endpoint(store.endpoint)):
            return {}
        nodes = {}
    return {node_id: nodes[node_id].status.value if node_id in nodes else "left" for node_id in chosen}
