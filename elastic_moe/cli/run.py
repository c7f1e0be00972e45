"""`elastic-moe run`: torchrun's command line, our agent.

The options are read by torchrun's own parser, so they are those of the installed torch, unchanged; ours are added.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import re
import uuid
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from elastic_moe.cli.console import log_to_console
from elastic_moe.cli.parser import PROG, positive_float
from elastic_moe.errors import UserError
from launcher import Auto, HangLimit, HangRules, MeshPlan, PreflightRules, plan

if TYPE_CHECKING:
    from elastic_moe.cli.parser import Subparsers
    from launcher import Planner
    from storage import CheckpointService

_OUR_TRAINER = ("-m", "elastic_moe", "train")
_SAVES = re.compile(r"^\s*(from|import) (storage|elastic_moe\.integrations)\b", re.MULTILINE)
_TEXT_CHARS_MAX = 1024 * 1024
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
    from launcher import Imports, fork_zygote

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
    found: tuple[str, ...] = ()
    if runs_ours:
        found = ("elastic_moe.config", "storage.checkpointer", "elastic_moe.trainer.run")
    elif _SAVES.search(text):
        found = ("storage.checkpointer",)
    return (*found, "storage.stores.s3.ahead") if found and "s3://" in text else found


def _text_of(argument: str) -> str:
    """The beginning of a script or job file that is named so, unless a `storage` of its own lies beside it; else ""."""
    beside = Path(argument).parent / "storage"
    if not argument.endswith((".py", ".toml")) or beside.exists() or beside.with_suffix(".py").exists():
        return ""
    try:
        with open(argument, encoding="utf-8", errors="replace") as file:
            return file.read(_TEXT_CHARS_MAX)
    except OSError:
        return ""


def handle(args: argparse.Namespace) -> int:
    """Run this node's agent."""
    from torch.distributed.run import config_from_args

    gc.freeze()  # torch is no garbage: the collector going through it while ours is imported costs a tenth of a second
    from launcher import Console, LaunchOptions, launch_agent

    given = _parse(args.arguments)
    log_to_console()
    logging.getLogger("torch.distributed").setLevel(logging.WARNING)
    logging.getLogger("torch.distributed.elastic.multiprocessing").setLevel(logging.ERROR)  # our events say it
    logging.getLogger("torch.distributed.run").setLevel(logging.ERROR)  # it warns of options that do not concern us
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    try:
        config, command, command_args = config_from_args(given)
    except (ValueError, AssertionError, RuntimeError) as error:
        raise UserError(str(error)) from error
    except OSError as error:
        raise UserError(f"--log-dir {given.log_dir}: {error.strerror}") from error
    if config.nproc_per_node < 1:
        raise UserError(f"--nproc-per-node {given.nproc_per_node}: a node runs at least one worker")
    if not isinstance(command, str):
        raise UserError("--run-path: not supported; leave it out, the script runs in a process of its own")
    extras = LaunchOptions(
        node_name=given.node_name,
        max_restarts=given.max_restarts_given,
        planner=_planner(given.mesh) if given.mesh else None,
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


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    from torch.distributed.run import get_args_parser

    parser = get_args_parser()
    parser.prog = f"{PROG} run"
    parser.description = "Run a script on this node as part of an elastic job."
    parser.epilog = _EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.allow_abbrev = False
    setattr(parser, "error", _usage_error)  # noqa: B010 (torchrun's parser tells its whole usage with each mistake)
    ours = parser.add_argument_group("elastic-moe")
    ours.add_argument("--node-name", default="", help="name of this node in events and logs (default: its host name)")
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
    _keep_apart_default(parser)
    given = parser.parse_args(arguments)
    given.max_restarts_given = given.max_restarts
    given.max_restarts = given.max_restarts or 0
    _check_silence(given)
    _choose_backend(given)
    _check_script(given)
    return given


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
        help="that process stores at most so many MiB a second (default: as fast as it goes)",
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


def _check_silence(given: argparse.Namespace) -> None:
    """Refuse --silence-timeout without output in files: every worker would look silent, or none."""
    streams = [part.rpartition(":")[2] for text in (given.redirects, given.tee) for part in text.split(",")]
    if given.silence_timeout is not None and set(streams) <= {"0"}:
        raise UserError("--silence-timeout: needs the workers' output in files to watch: add --tee 3 or --redirects 3")


def _keep_apart_default(parser: argparse.ArgumentParser) -> None:
    """Tell no --max-restarts from 0, which torchrun does not: without it the policy decides."""
    if parser.get_default("max_restarts") == 0:  # a string if PET_MAX_RESTARTS names one
        parser.set_defaults(max_restarts=None)


def _usage_error(message: str) -> NoReturn:
    raise UserError(f"{message} (see {PROG} run --help)")


def _choose_backend(given: argparse.Namespace) -> None:
    """Choose where nodes meet if the user left it open: one node needs no store, several meet at an embedded one, or in
    the folder or bucket that the endpoint names.
    """
    from launcher import BACKENDS, OUTLIVING, looks_like_bucket, unknown_backend

    alone = given.standalone or given.nnodes in ("1", "1:1")
    if given.rdzv_backend in ("static", "c10d"):
        given.rdzv_backend = "memory" if alone and not given.rdzv_endpoint else "embedded"
        if looks_like_bucket(given.rdzv_endpoint):
            given.rdzv_backend = "bucket"
    if given.rdzv_backend not in BACKENDS:
        raise UserError(f"--rdzv-backend {given.rdzv_backend}: {unknown_backend(given.rdzv_backend)}")
    if given.rdzv_backend == "embedded" and not given.rdzv_endpoint:
        raise UserError("--rdzv-endpoint: several nodes need HOST:PORT of the first one to meet at")
    if given.rdzv_backend == "embedded" and given.rdzv_endpoint.strip().endswith(":0") and not alone:
        raise UserError(
            f"--rdzv-endpoint {given.rdzv_endpoint}: port 0 is any free one, which other nodes could not know; give one"
        )
    if given.rdzv_backend == "etcd3" and not given.rdzv_endpoint:
        raise UserError("--rdzv-endpoint: etcd3 needs HOST:PORT of the etcd, or several, separated by commas")
    if given.rdzv_backend == "bucket" and not given.rdzv_endpoint:
        raise UserError("--rdzv-endpoint: bucket needs a folder that all nodes share, or a URL (s3://bucket/meet)")
    if given.rdzv_id in (None, "none"):
        if given.rdzv_backend in OUTLIVING:  # such a store outlives jobs: two that share a name would be one
            raise UserError(
                "--rdzv-id: jobs that share an etcd or a bucket need names of their own; the same on all nodes of one"
            )
        given.rdzv_id = uuid.uuid4().hex[:8] if given.rdzv_backend == "memory" else "default"
    if "/" in given.rdzv_id:  # it names a folder of --log-dir, and keys in the store
        raise UserError(f"--rdzv-id {given.rdzv_id!r}: may not hold a '/'")


def _check_script(given: argparse.Namespace) -> None:
    """Refuse a script that is not there at once, instead of by every worker of every restart."""
    if not given.module and not given.no_python and not Path(given.training_script).is_file():
        raise UserError(f"script {given.training_script!r}: no such file")


def _planner(job_path: str) -> Planner:
    from elastic_moe.config import load, mesh_spec

    spec = mesh_spec(load(job_path, environ=os.environ))

    def planner(slots: Sequence[int], previous: MeshPlan | None) -> MeshPlan:
        return plan(sum(slots), spec, ranks_per_node=list(slots), previous=previous)

    return planner
