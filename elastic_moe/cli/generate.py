"""`elastic-moe generate`: sample from a trained model."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from elastic_moe.cli.parser import natural_int, positive_int
from elastic_moe.cli.s3_options import with_s3_options
from elastic_moe.errors import UserError

if TYPE_CHECKING:
    from elastic_moe.cli.parser import Subparsers

_EPILOG = """\
For models that were trained on bytes, on one process and the CPU. The sample
goes to standard output as it is drawn, and says nothing else.

Exit codes: 0 done; 1 the checkpoint is damaged; 2 wrong usage, or there is no
checkpoint of `elastic-moe train` at the URL.
"""


def register(verbs: Subparsers) -> None:
    """Add the verb `generate`."""
    parser = verbs.add_parser(
        "generate",
        help="sample from a trained model",
        description="Sample from a trained model.",
        epilog=_EPILOG,
    )
    parser.add_argument("url", metavar="URL", help="a run's folder or URL, or one step of it")
    parser.add_argument("--prompt", default="\n", help="the text to go on from (default: a new line)")
    parser.add_argument("--tokens", type=positive_int, default=200, metavar="N", help="how many bytes (default 200)")
    parser.add_argument("--temperature", type=_temperature, default=0.8, help="0 takes the likeliest (default 0.8)")
    parser.add_argument("--seed", type=natural_int, default=0, metavar="N", help="of the draws (default 0)")
    parser.add_argument("--endpoint-url", metavar="URL", help="another server than AWS for s3:// URLs")
    parser.add_argument("--profile", metavar="NAME", help="the profile of the AWS configuration for s3:// URLs")
    parser.set_defaults(handler=handle)


def handle(args: argparse.Namespace) -> int:
    """Print the prompt and what follows it."""
    from elastic_moe.huggingface.tokenizer import NUM_BYTES
    from elastic_moe.model.sampling import sample
    from elastic_moe.trained import TrainedModel

    prompt = args.prompt.encode("utf-8", "surrogateescape")
    if not prompt:
        raise UserError("--prompt is empty: a model goes on from one byte at least")
    (url,) = with_s3_options(args, args.url)
    with TrainedModel(url) as trained:
        if trained.config.vocab_size != NUM_BYTES:
            raise UserError(
                f"the model at {args.url} has {trained.config.vocab_size} tokens, and only bytes are known here: "
                "export it, and give the folder its tokenizer"
            )
        out = sys.stdout.buffer
        out.write(prompt)
        tokens = sample(
            trained.decoder(), prompt, args.tokens, temperature=args.temperature, seed=args.seed, window=trained.seq_len
        )
        for token in tokens:
            out.write(bytes([token]))
            out.flush()
    out.write(b"\n")
    return 0


def _temperature(text: str) -> float:
    """For argparse's `type`."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number >= 0")
    return value
