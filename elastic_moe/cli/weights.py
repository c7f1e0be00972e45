"""`elastic-moe ckpt export` and `import`: models to and from Hugging Face's form."""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from elastic_moe.cli.parser import local, positive_int
from elastic_moe.cli.s3_options import with_s3_options
from elastic_moe.errors import UserError
from elastic_moe.model.config import TRAINING_FIELDS

if TYPE_CHECKING:
    from elastic_moe.cli.parser import Subparsers
    from elastic_moe.model.config import ModelConfig

_EXPORT_EPILOG = """\
The folder holds a Mixtral: config.json, safetensors, and the tokenizer that the
model was trained with. `transformers` loads it by its path. One layer is in
memory at a time; the folder has its name once all of it is there.

Exit codes: 0 done; 1 the checkpoint is damaged; 2 wrong usage, there is no
checkpoint, or Mixtral has no such model.
"""
_IMPORT_EPILOG = """\
The job file is the folder's model and trains on from its weights, with its
tokenizer: each rank reads what it holds of them when the job starts for the
first time. A dense Llama or Mistral is upcycled (arXiv:2212.05055): each expert
begins as a copy of its layer's feed-forward network and routers at random, so
that the model begins by computing what the dense one does.

Exit codes: 0 done; 2 the folder is none of these, not whole, or has a key that
would change what the model computes in a way that is not known here.
"""


def register(actions: Subparsers) -> None:
    """Add the actions `export` and `import` to those of `ckpt`."""
    export = actions.add_parser(
        "export",
        help="write a trained model as a folder that transformers loads",
        description="Write a trained model as a folder that transformers loads.",
        epilog=_EXPORT_EPILOG,
    )
    export.add_argument("url", metavar="URL", help="a run's folder or URL, or one step of it")
    export.add_argument("folder", metavar="FOLDER", type=local, help="the folder to make")
    export.add_argument("--format", choices=("hf",), default="hf", help="the folder's form (default hf)")
    export.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="of the weights (default float32)",
    )
    export.add_argument("--quiet", action="store_true", help="show no progress")
    export.add_argument("--endpoint-url", metavar="URL", help="another server than AWS for s3:// URLs")
    export.add_argument("--profile", metavar="NAME", help="the profile of the AWS configuration for s3:// URLs")
    export.set_defaults(handler=_export)

    action = actions.add_parser(
        "import",
        help="write a job file that trains on from a folder of transformers",
        description="Write a job file that trains on from a folder of transformers.",
        epilog=_IMPORT_EPILOG,
    )
    action.add_argument("folder", metavar="FOLDER", type=local, help="holds config.json and safetensors")
    action.add_argument("--out", metavar="JOB.toml", type=local, help="the file to write (default: standard output)")
    action.add_argument("--upcycle-experts", type=positive_int, metavar="N", help="make N experts of a dense layer")
    action.add_argument("--top-k", type=positive_int, metavar="K", help="experts a token then goes to (default 2)")
    action.set_defaults(handler=_import)


def _export(args: argparse.Namespace) -> int:
    from elastic_moe.huggingface.export import export
    from elastic_moe.trained import TrainedModel

    (url,) = with_s3_options(args, args.url)

    def tell(done: int, total: int) -> None:
        if not args.quiet and sys.stderr.isatty():
            print(f"\r{done} of {total} parts", end="\n" if done == total else "", file=sys.stderr, flush=True)

    with _unwound_by_sigterm(), TrainedModel(url) as trained:
        has_tokenizer = export(trained, args.folder, args.dtype, tell)
    lacks = "" if has_tokenizer else ", without a tokenizer: the checkpoint does not know what its token ids stand for"
    print(f"step {trained.step} of {args.url} is in {args.folder}{lacks}")
    return 0


@contextlib.contextmanager
def _unwound_by_sigterm() -> Iterator[None]:
    """Let SIGTERM raise, as Ctrl-C does: what was begun is removed before the process ends."""

    def end(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _import(args: argparse.Namespace) -> int:
    from elastic_moe.huggingface.config import Upcycling
    from elastic_moe.huggingface.folder import WeightFolder

    if args.upcycle_experts is None and args.top_k is not None:
        raise UserError("--top-k is for --upcycle-experts: a Mixtral has its own")
    upcycling = args.upcycle_experts and Upcycling(args.upcycle_experts, 2 if args.top_k is None else args.top_k)
    found = WeightFolder(str(args.folder), upcycling)
    if upcycling and not found.is_dense:
        raise UserError(f"{args.folder} has experts already: --upcycle-experts is for dense models")
    found.check_tensors(_shapes(found.config))
    text = job_text(found.config, args.folder.resolve(), found.end_of_text)
    if args.out is None:
        print(text, end="")
        return 0
    _write_new(args.out, text)
    return 0


def _write_new(path: Path, text: str) -> None:
    """Write a file that must not be there yet; none is left where the disk is full.

    Raises:
        UserError: it is there, or cannot be written.
    """
    try:
        file = open(path, "x", encoding="utf-8")  # noqa: SIM115 - the block below must not catch what this raises
    except FileExistsError:
        raise UserError(f"{path} exists: name another file, or remove it") from None
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from None
    try:
        with file:
            file.write(text)
    except OSError as error:
        path.unlink(missing_ok=True)
        raise UserError(f"{path} cannot be written: {error.strerror}") from None


def _shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    import torch

    from elastic_moe.model.decoder import Decoder

    with torch.device("meta"):
        model = Decoder(config)
    return {name: tuple(param.shape) for name, param in model.named_parameters()}


def job_text(config: ModelConfig, folder: Path, end_of_text: int | None = None) -> str:
    """A job file of `config` that begins with the weights and the tokenizer in `folder`.

    What JSON makes of such values is TOML too.

    Args:
        end_of_text: the token by which documents end where the tokenizer does not say it itself, as that of bytes.

    Raises:
        UserError: the folder's name is no text.
    """
    if not str(folder).isprintable():
        raise UserError(f"{str(folder)!r} cannot be written into a job file: give the folder a name of letters")
    from elastic_moe.data.tokenizer import FILE

    fields = config.model_dump(exclude_none=True, exclude=set(TRAINING_FIELDS))
    model = [f"{name} = {json.dumps(value)}" for name, value in fields.items()]
    path = json.dumps(str(folder))
    data = ["", "[data]", f"tokenizer = {path}"] if (folder / FILE).exists() else []
    if data and end_of_text is not None and not _says_its_end(folder):
        data.append(f"end_of_document = {end_of_text}")
    return "\n".join(["[model]", *model, *data, "", "[train]", f"init_from = {path}"]) + "\n"


def _says_its_end(folder: Path) -> bool:
    from elastic_moe.data.tokenizer import FileTokenizer, read_tokenizer

    try:
        FileTokenizer(read_tokenizer(str(folder)), str(folder))
    except UserError:
        return False
    return True
