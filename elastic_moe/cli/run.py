"""`elastic-moe run`: torchrun's command line, our agent.

The options are read by torchrun's own parser, so they are those of the installed torch, unchanged; ours are added.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import logging
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from elastic_moe.cli.console import log_to_console
from elastic_moe.cli.parser import PROG, one_line, positive_float
from elastic_moe.cli.torchrun_options import (
    check_environment,
    check_machine,
    check_script,
    check_values,
    choose_backend,
    torchrun_parser,
)
from elastic_moe.errors import UserError
from launcher import Auto, HangLimit, HangRules, Infeasible, MeshPlan, MeshSpec, PreflightRules, idle_to_fit, plan

if TYPE_CHECKING:
    from torch.distributed.launcher.api import LaunchConfig

    from elastic_moe.cli.parser import Subparsers
    from launcher import Planner
    from storage import CheckpointService

log = logging.getLogger(__name__)

_OUR_TRAINER = ("-m", "elastic_moe", "train")
_BY_TEXT = (
    (r"elastic_moe\b", ("elastic_moe.worker",)),
    (r"elastic_moe\.integrations\b", ("elastic_moe.integrations.session",)),
    (r"(storage|elastic_moe\.integrations)\b", ("storage.checkpointer",)),
)
"""What a script imports, and what that leads to."""
_TEXT_CHARS_MAX = 1024 * 1024
_NODES_TRIED = 16
_EPILOG = """\
Exit codes: 0 the job is done; 1 it failed and --max-restarts is used up; 2 wrong usage, of this command or of the
workers' program; 70 the program fails at start, again in the same way, or without progress: do not requeue; 75 too few
nodes, no store, or failing nodes, or this node was asked to leave: requeue; 128 + N it left on signal N (SIGTERM and
SIGHUP first let the workers stop at a step boundary). All nodes of a failed job end with the same code.

--max-restarts: a cap on restarts after failures; not given, the class of the failure decides (docs/launcher.md).
"""


def register(verbs: Subparsers) -> None:
    """Add the verb `run`. Its arguments go to torchrun's parser as they are, so nothing here may look like one."""
    parser = verbs.add_parser(
        "run",
        help="run a script under torchrun's options, restarted and re-meshed as nodes come and go",
        prefix_chars="\0",
        add_help=False,
    )
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    parser.set_defaults(handler=handle, prepare=prepare, zygote=None, ends_at_once=True)


def prepare(args: argparse.Namespace) -> None:
    """Import torch, and fork what will fork the workers while this process has done nothing else: what it has imported
    is not imported again. In a worker this ends with its script.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # torchrun's default, without its warning; read with torch
    if {"--cold-workers", "--keep-children", "--help"} & set(args.arguments):
        return
    from launcher import Imports, UsageError, fork_zygote

    try:
        check_environment(os.environ)
    except (UserError, UsageError):
        return  # which `handle` tells
    imports = Imports(_imported_by(args.arguments))
    imports.make("torch")
    imports.make("torch.distributed.run")
    args.zygote = fork_zygote(imports)


def _imported_by(arguments: Sequence[str]) -> tuple[str, ...]:
    """What workers will import beyond torch, as far as that can be known: of our own trainer, or by the script's text.

    A node that joins has imported it before the others stand still for it.
    """
    runs_ours = _OUR_TRAINER in zip(arguments, arguments[1:], arguments[2:], strict=False)
    text = "\n".join([*arguments, *map(_text_of, arguments)])
    found: tuple[str, ...] = ("elastic_moe.config", "storage.checkpointer", "elastic_moe.trainer.run")
    if not runs_ours:
        parts = (part for what, part in _BY_TEXT if re.search(rf"^\s*(from|import) {what}", text, re.MULTILINE))
        found = tuple(itertools.chain.from_iterable(parts))
    return (*found, "storage.stores.s3.ahead") if "storage.checkpointer" in found and "s3://" in text else found


def _text_of(argument: str) -> str:
    """The beginning of a script or job file that is named so, unless it has a package of ours of its own; else ""."""
    beside = [os.path.join(os.path.dirname(argument), name) for name in ("elastic_moe", "launcher", "storage")]
    if not argument.endswith((".py", ".toml")) or any(os.path.exists(p) or os.path.exists(f"{p}.py") for p in beside):
        return ""
    try:
        with open(argument, encoding="utf-8", errors="replace") as file:
            return file.read(_TEXT_CHARS_MAX)
    except OSError:
        return ""


def handle(args: argparse.Namespace) -> int:
    """Run this node's agent."""
    check_environment(os.environ)
    from torch.distributed.run import config_from_args

    gc.freeze()  # torch is no garbage: the collector going through it while ours is imported costs a tenth of a second
    from launcher import Console, LaunchOptions, launch_agent

    log_to_console()
    given = _parse(args.arguments)
    check_machine(given)
    logging.getLogger("torch.distributed").setLevel(logging.WARNING)
    logging.getLogger("torch.distributed.elastic.multiprocessing").setLevel(logging.ERROR)  # our events say it
    logging.getLogger("torch.distributed.run").setLevel(logging.ERROR)  # it warns of options that do not concern us
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    try:
        config, command, command_args = config_from_args(given)
    except (ValueError, AssertionError, RuntimeError) as error:
        raise UserError(one_line(str(error))) from error
    except OSError as error:
        where = "folder for temporary files (TMPDIR)" if given.log_dir is None else f"--log-dir {given.log_dir}"
        raise UserError(f"{where}: {error.strerror}") from error
    assert isinstance(command, str), "--run-path is refused"
    _name_zone(config, given.zone)
    extras = LaunchOptions(
        node_name=given.node_name,
        max_restarts=given.max_restarts_given,
        signals=given.signals,
        planner=_planner(given.mesh, config) if given.mesh else None,
        warm_workers=not given.cold_workers,
        keep_children=given.keep_children,
        zygote=args.zygote,
        drain_grace_s=given.drain_grace,
        preemption_notices=tuple(given.preemption_notice),
        log_dir=Path(given.log_dir) if given.log_dir else None,
        hangs=HangRules(step=given.hang_timeout, startup=given.startup_timeout, silence_s=given.silence_timeout),
        preflight=PreflightRules(
            min_shm_mib=given.min_shm_mib,
            min_disk_mib=given.min_disk_mib,
            commands=tuple(given.preflight),
            timeout_s=given.preflight_timeout,
        ),
        sidecar=_checkpoint_service(given),
        events_path=Path(given.log_dir).absolute() / "events.jsonl" if given.log_dir else None,
    )
    gc.freeze()  # what the imports made is no garbage; looking through it again and again stops the agent for 50 ms
    with Console() as console:
        return launch_agent(config, [command, *command_args], replace(extras, console=console))


def run_parser() -> argparse.ArgumentParser:
    """torchrun's parser, with our own options."""
    parser = torchrun_parser()
    parser.prog = f"{PROG} run"
    parser.description = "Run a script on this node as part of an elastic job."
    parser.epilog = _EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.allow_abbrev = False
    ours = parser.add_argument_group("elastic-moe")
    ours.add_argument("--node-name", default="", help="name of this node in events and logs (default: its host name)")
    ours.add_argument(
        "--zone",
        default="",
        metavar="NAME",
        help="what fails together with this node (a rack, an availability zone): ranks of one zone are neighbours, and "
        "copies of states in memory go to another one",
    )
    ours.add_argument(
        "--mesh", metavar="JOB.toml", help="plan the device mesh of every round for the model of this job file"
    )
    ours.add_argument(
        "--cold-workers",
        action="store_true",
        help="start every worker as a new process (default: fork them from one that has imported torch)",
    )
    ours.add_argument(
        "--keep-children",
        action="store_true",
        help="let processes that workers have started outlive them (default: they are ended with their worker)",
    )
    _add_service(ours)
    _add_leaving(ours)
    _add_watching(ours)
    _add_preflight(ours)
    return parser


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    given = run_parser().parse_args(arguments)
    given.max_restarts_given = given.max_restarts
    given.max_restarts = given.max_restarts or 0
    check_values(given)
    choose_backend(given)
    check_script(given)
    return given


def _name_zone(config: LaunchConfig, zone: str) -> None:
    """Put `--zone` where the launcher looks for it. Raises UserError: `--rdzv-conf` names another one."""
    named = config.rdzv_configs.setdefault("zone", zone) if zone else ""
    if named != zone:
        raise UserError(f"--zone {zone}: --rdzv-conf names another one, zone={named}")


def _add_service(ours: argparse._ArgumentGroup) -> None:
    ours.add_argument(
        "--no-checkpoint-service",
        action="store_true",
        help="let workers store their checkpoints themselves (default: a process of this node does, at low priority, "
        "and goes on when they have died)",
    )
    ours.add_argument(
        "--upload-limit",
        type=positive_float,
        metavar="MIB",
        help="that process stores at most so many MiB a second, and copies as many to other nodes' memory (default: as "
        "fast as it goes)",
    )


def _checkpoint_service(given: argparse.Namespace) -> CheckpointService | None:
    import storage

    if given.no_checkpoint_service:
        return None
    return storage.CheckpointService(None if given.upload_limit is None else given.upload_limit * 2**20)


def _add_leaving(ours: argparse._ArgumentGroup) -> None:
    ours.add_argument(
        "--drain-grace",
        type=positive_float,
        default=30.0,
        metavar="SECONDS",
        help="a node that is told to leave (SIGTERM, `elastic-moe drain`, a preemption notice) is gone within so long: "
        "its workers may reach a step boundary and save, what still runs is killed (default: 30)",
    )
    ours.add_argument(
        "--preemption-notice",
        action="append",
        default=[],
        metavar="WATCHER",
        help="drain when this machine is about to be taken away: file:PATH (that appears), aws, gcp, azure, or the "
        "name of an installed watcher; may be given several times",
    )


def _add_watching(ours: argparse._ArgumentGroup) -> None:
    ours.add_argument(
        "--hang-timeout",
        metavar="SECONDS|auto|off",
        type=_limit,
        default=Auto.AUTO,
        help="workers without a heartbeat for so long after their first count as hung (default: auto, learnt from "
        "their steps)",
    )
    ours.add_argument(
        "--startup-timeout",
        metavar="SECONDS|auto|off",
        type=_limit,
        default=Auto.AUTO,
        help="workers without a first heartbeat for so long count as hung (default: auto, learnt from earlier starts)",
    )
    ours.add_argument(
        "--silence-timeout",
        metavar="SECONDS",
        type=positive_float,
        help="workers count as hung if those of rank 0's node write no output for so long; needs --redirects or --tee",
    )


def _add_preflight(ours: argparse._ArgumentGroup) -> None:
    defaults = PreflightRules()
    ours.add_argument(
        "--preflight",
        metavar="CMD",
        action="append",
        type=_command,
        default=[],
        help="run this in a shell before each round; where it fails, this node says why and stays out until it passes "
        "(may be repeated)",
    )
    ours.add_argument(
        "--preflight-timeout",
        metavar="SECONDS",
        type=positive_float,
        default=defaults.timeout_s,
        help=f"for each of these commands, and for the GPUs' driver to answer (default: {defaults.timeout_s:g})",
    )
    for option, default, where in (
        ("--min-shm-mib", defaults.min_shm_mib, "in /dev/shm"),
        ("--min-disk-mib", defaults.min_disk_mib, "for logs and temporary files"),
    ):
        ours.add_argument(
            option,
            metavar="MIB",
            type=_mib,
            default=default,
            help=f"this node stays out of rounds while less is free {where}; 0 does not look (default: {default:g})",
        )


def _command(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError(f"{text!r} is no command")
    return text


def _mib(text: str) -> float:
    return 0.0 if text == "0" else positive_float(text)


def _limit(text: str) -> HangLimit:
    """Seconds, or `auto` or `off`; for argparse's `type`."""
    if text in tuple(Auto):
        return Auto(text)
    try:
        return positive_float(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error}, nor one of {', '.join(Auto)}") from None


def _planner(job_path: str, config: LaunchConfig) -> Planner:
    """Plans meshes for the job of that file.

    Raises:
        UserError: the file is none, or the job has no mesh on this node, which is the only one.
    """
    import torch

    from elastic_moe.config import load, mesh_spec
    from elastic_moe.trainer.room import plan_in_room, room_of, share_of

    job = load(job_path, environ=os.environ)
    spec = mesh_spec(job)
    if why := _obstacle(spec, config):
        if config.max_nodes == 1:
            raise UserError(f"--mesh {job_path}: {why}")
        log.warning("--mesh %s: %s; nor for more nodes such as this one: the job waits for other ones", job_path, why)

    share_bytes = None
    if job.train.device == "cpu" or not torch.cuda.is_available():
        share_bytes = share_of(room_of(torch.device("cpu")), config.nproc_per_node)

    def planner(slots: Sequence[int], previous: MeshPlan | None) -> MeshPlan:
        each = list(slots)
        return plan_in_room(sum(each), spec, ranks_per_node=each, share_bytes=share_bytes, previous=previous)

    return planner


def _obstacle(spec: MeshSpec, config: LaunchConfig) -> str:
    """Why no number of nodes like this one has a mesh; "" if one has, among the first few that the job may have."""
    slots, found = config.nproc_per_node, ""
    for num_nodes in range(config.min_nodes, min(config.max_nodes, config.min_nodes + _NODES_TRIED - 1) + 1):
        try:
            plan(num_nodes * slots, spec, ranks_per_node=slots)
        except Infeasible as error:
            idle = idle_to_fit(num_nodes * slots, spec, slots) if not found else None
            found = found or str(error) + (f" (with mesh.max_idle = {idle} there is one)" if idle else "")
        else:
            return ""
    return found
