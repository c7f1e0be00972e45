"""`python -m storage.service`: the checkpoint service of a node. Its agent or a Checkpointer starts it."""

from __future__ import annotations

import argparse
import functools
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from storage.priority import let_background_step_back, wait_for_turn
from storage.service import keeper
from storage.service.sweeper import SWEEP

if TYPE_CHECKING:
    import socket


def main(arguments: Sequence[str] | None = None) -> int:
    """Keep a service running until it has nothing more to do."""
    parser = argparse.ArgumentParser(prog="python -m storage.service", description=__doc__, allow_abbrev=False)
    parser.add_argument("--socket", type=Path, required=True, help="where to listen, in a folder of mode 0700")
    parser.add_argument("--rate-limit", type=float, metavar="BYTES", help="send at most so many bytes a second")
    parser.add_argument("--nice", type=int, default=19, help="of threads that store and copy (default %(default)s)")
    parser.add_argument("--linger", type=float, default=10.0, metavar="S", help="end after S seconds with nobody there")
    parser.add_argument("--detach", action="store_true", help="go on as no child of who has called")
    parser.add_argument("--lifeline", type=int, metavar="FD", help="a pipe that ends with whoever wants the service")
    parser.add_argument(SWEEP, action="store_true", help="tell what a service before this one has left, and end")
    options = parser.parse_args(arguments)
    if options.detach and os.fork():
        os._exit(0)
    try:
        keeper.settle(options.socket)
    except FileNotFoundError as error:
        sys.stderr.write(f"the folder of the checkpoint service is gone, with whoever wanted it: {error}\n")
        return 1
    let_background_step_back(options.nice)
    wait_for_turn()
    if options.lifeline is not None:
        os.set_inheritable(options.lifeline, False)
    serve = functools.partial(_serve, options)
    return keeper.keep(options.socket, serve, options.lifeline, 0.0 if options.sweep else keeper.FIRST_CALLER_S)


def _serve(options: argparse.Namespace, listener: socket.socket, link: socket.socket, state: keeper.State) -> None:
    from storage.service.process import serve
    from storage.service.server import ServerOptions

    rules = ServerOptions(rate_bytes_per_s=options.rate_limit, linger_s=options.linger)
    serve(listener, link, state, rules, options.lifeline)


if __name__ == "__main__":
    sys.exit(main())
