"""`elastic-moe demo`: a node is lost and found again, on one machine, in about two minutes."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from elastic_moe.cli.parser import natural_int, positive_int
from elastic_moe.errors import UserError

if TYPE_CHECKING:
    from elastic_moe.cli.parser import Subparsers

_STEPS_LEAST = 80  # fewer are over before the killed node is back
_EPILOG = """\
Two nodes of two workers each train a small Mixture-of-Experts model on this
machine, each node a replica. Node 2 is killed, node 1 goes on from the state
that its workers had after their last step, node 2 comes back. With --sharded
each node holds a half of the state, so node 1 goes back to the last checkpoint,
on another mesh. The same job is then trained unbroken in one process, and the
losses compared.

DIR gets summary.json, events.jsonl, metrics.jsonl and story.png.

Exit codes: 0 all went as it should, 1 it did not, 2 wrong usage.
"""


def register(verbs: Subparsers) -> None:
    """Add the verb `demo`."""
    parser = verbs.add_parser(
        "demo",
        help="lose a node and take it back, on this machine",
        description="Watch a training job survive the loss of a node.",
        epilog=_EPILOG,
    )
    parser.add_argument("--out", type=Path, default=Path("demo-out"), metavar="DIR", help="default demo-out")
    parser.add_argument(
        "--steps", type=positive_int, default=140, metavar="N", help=f"default 140, at least {_STEPS_LEAST}"
    )
    parser.add_argument("--seed", type=natural_int, default=0, metavar="N", help="default 0")
    parser.add_argument("--sharded", action="store_true", help="one replica of the state, a half on each node")
    parser.add_argument("--freeze", action="store_true", help="stop node 2 (SIGSTOP) instead of killing it")
    parser.set_defaults(handler=handle, ends_with_reader=True)


def handle(args: argparse.Namespace) -> int:
    """Run the demo; 1 when its summary is not ok."""
    if args.steps < _STEPS_LEAST:
        raise UserError(
            f"--steps {args.steps}: too few for the killed node to come back in, use {_STEPS_LEAST} or more"
        )
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError(
            "the demo draws with matplotlib: pip install matplotlib, or install elastic-moe with its extra demo"
        )
    from elastic_moe.demo.console import Console
    from elastic_moe.demo.driver import Demo, Fault, Script

    console = Console()
    out = args.out.absolute()
    fault = Fault.FROZEN if args.freeze else Fault.KILLED
    script = Script(steps=args.steps, seed=args.seed, sharded=args.sharded, fault=fault)
    summary = Demo(out, script, console).run()
    console.summary(summary, out)
    return 0 if summary.ok else 1
