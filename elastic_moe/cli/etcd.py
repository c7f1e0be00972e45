"""`elastic-moe etcd`: an installed etcd beside the agents, as a member of the cluster that nodes meet in. No torch."""

from __future__ import annotations

import argparse
import json
import os
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from elastic_moe.cli.parser import positive_float, positive_int
from elastic_moe.cli.timeline import moment
from elastic_moe.errors import UserError

if TYPE_CHECKING:
    from elastic_moe.cli.parser import Subparsers

_EPILOG = """\
Run the same command on every machine of the list, and give the nodes of jobs
  --rdzv-backend etcd3 --rdzv-endpoint HOST:PORT,...   (which it prints)
Three members bear the loss of one, five of two. The engine is an installed etcd
(3.5 or later), which is not part of this package.

A member that was lost is replaced: start this on another machine with a list in
which it stands in place of the lost one, or on the same machine with an empty
disk; it removes the lost member and joins. With --seats fewer than machines in
the list, those beyond stand by, and take the seat of a member that has not
answered for --replace-after.

Beyond loopback etcd listens only with TLS (--cacert, --cert, --key: it lets in
who shows a certificate of that authority, members and agents alike), or with
--insecure. It ends on SIGTERM; its data stay, and it is a member again when it
is started again. etcd's own log is DATA_DIR.log.

--json writes one object a line: "ts", "event" (starting, waiting, serving,
ended, removed, added, set_aside, standing_by) and its fields.

Exit codes: 0 ended on a signal; 1 etcd ends again and again; 2 wrong usage, or
no etcd is installed.
"""


def register(verbs: Subparsers) -> None:
    """Add the verb `etcd`."""
    parser = verbs.add_parser(
        "etcd",
        help="run an installed etcd beside the agents, for nodes to meet in",
        description="Run an installed etcd on this machine, as a member of a cluster.",
        epilog=_EPILOG,
    )
    parser.add_argument(
        "--members",
        required=True,
        metavar="HOST[:PORT],...",
        help="the machines of the cluster, the same list on each; a member takes PORT (2379) and the next one",
    )
    parser.add_argument("--self", dest="own", metavar="HOST[:PORT]", help="which of them this is (default: found out)")
    parser.add_argument(
        "--seats",
        type=positive_int,
        metavar="N",
        help="so many of them are members (default: all), the others stand by",
    )
    parser.add_argument(
        "--replace-after",
        type=positive_float,
        default=60.0,
        metavar="SECONDS",
        help="a member that has not answered for so long is lost to those that stand by (default: 60)",
    )
    parser.add_argument("--data-dir", type=Path, metavar="DIR", help="etcd's data (default: under ~/.local/state)")
    parser.add_argument("--cacert", type=Path, metavar="FILE", help="TLS: certificates of the authority (PEM)")
    parser.add_argument(
        "--cert", type=Path, metavar="FILE", help="TLS: this machine's certificate, for server and client"
    )
    parser.add_argument("--key", type=Path, metavar="FILE", help="TLS: its private key")
    parser.add_argument("--insecure", action="store_true", help="listen beyond loopback without TLS")
    parser.add_argument("--binary", type=Path, metavar="PATH", help="the etcd to run (default: the one in PATH)")
    parser.add_argument("--json", action="store_true", help="write JSON lines")
    parser.set_defaults(handler=handle)


def handle(args: argparse.Namespace) -> int:
    """Be a member until a signal comes."""
    try:
        from launcher import EtcdHost
    except ImportError as error:
        raise UserError(
            f"etcd: {error}; pip install python3-etcd3 grpcio, or install elastic-moe with its extra etcd"
        ) from error
    host = EtcdHost(_place(args), _tell_json if args.json else _tell)
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(signum, lambda *_: host.stop.set())
    host.run()
    return 0


def _place(args: argparse.Namespace) -> Any:
    from launcher import MAX_SEATS, EtcdPlace, find_binary, find_own, parse_members, read_tls, tied_command

    seats = parse_members(args.members)
    given = parse_members(args.own)[0] if args.own else None
    if given is not None and given not in seats:
        raise UserError(f"--self {args.own}: is not one of --members {args.members}")
    num_seats = args.seats or len(seats)
    if num_seats > len(seats):
        raise UserError(f"--seats {num_seats}: --members names {len(seats)} machines only")
    if num_seats > MAX_SEATS:
        raise UserError(f"--seats: {num_seats} members make etcd slow and hardly safer; {MAX_SEATS} at most, or 3 or 5")
    binary = find_binary(args.binary)
    own, address = find_own(seats, given)
    config = read_tls(seats, args.cacert, args.cert, args.key)
    _check_open(address, insecure=args.insecure, has_tls=config.tls is not None)
    data_dir = (args.data_dir or _state_dir() / f"etcd-{own.name}").absolute()
    _make(data_dir)
    return EtcdPlace(
        seats=seats,
        num_seats=num_seats,
        own=own,
        address=address,
        config=config,
        binary=binary,
        data_dir=data_dir,
        replace_after_s=args.replace_after,
        tie=tied_command,
    )


def _check_open(address: str, *, insecure: bool, has_tls: bool) -> None:
    from launcher import is_loopback

    if not is_loopback(address) and not has_tls and not insecure:
        raise UserError(
            f"--members: etcd would let in anybody who reaches {address}: give --cacert, --cert and --key, "
            "or --insecure where the network is closed"
        )


def _make(data_dir: Path) -> None:
    """Make the folder for data, for nobody else's eyes; etcd's log goes beside it."""
    try:
        data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--data-dir {data_dir}: {error.strerror}") from error
    if not os.access(data_dir.parent, os.W_OK | os.X_OK):
        raise UserError(f"--data-dir {data_dir}: etcd's log goes beside it, where nothing may be written")


def _state_dir() -> Path:
    try:
        return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "elastic-moe"
    except RuntimeError:
        raise UserError("--data-dir: this user has no home to keep etcd's data in: name a folder") from None


def _tell_json(event: str, **fields: object) -> None:
    print(json.dumps({"ts": round(time.time(), 3), "event": event, **fields}), flush=True)


_SENTENCES = {
    "starting": "starts, with its data in {data_dir}",
    "waiting": "waits: {reason}",
    "serving": "serves (etcd {version}): --rdzv-backend etcd3 --rdzv-endpoint {endpoint}",
    "ended": "has ended: {reason}",
    "removed": "removes member {member} ({member_id}): {reason}",
    "added": "is a member now, as {peer_url}",
    "set_aside": "moves its data to {path}: {reason}",
    "standing_by": "stands by: {reason}",
}


def _tell(event: str, **fields: object) -> None:
    print(f"{moment(time.time())} etcd {_SENTENCES[event].format_map(fields)}", flush=True)
