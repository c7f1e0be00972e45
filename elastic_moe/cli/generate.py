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
    from elastic_moe.data.tokenizer import ByteTokenizer, FileTokenizer
    from elastic_moe.trained import TrainedModel

_BYTES = "bytes"
_EPILOG = """\
On one process and the CPU. The model's tokenizer is in its checkpoint, unless
it was trained on token ids alone: if these are bytes, say --tokenizer bytes.
The sample goes to standard output as it is drawn, and says nothing else.

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
    parser.add_argument("--tokens", type=positive_int, default=200, metavar="N", help="how many tokens (default 200)")
    parser.add_argument(
        "--tokenizer", metavar="PATH", help="a tokenizer.json or its folder, where the checkpoint has none; or `bytes`"
    )
    parser.add_argument("--temperature", type=_temperature, default=0.8, help="0 takes the likeliest (default 0.8)")
    parser.add_argument("--seed", type=natural_int, default=0, metavar="N", help="of the draws (default 0)")
    parser.add_argument("--endpoint-url", metavar="URL", help="another server than AWS for s3:// URLs")
    parser.add_argument("--profile", metavar="NAME", help="the profile of the AWS configuration for s3:// URLs")
    parser.set_defaults(handler=handle, ends_with_reader=True)


def handle(args: argparse.Namespace) -> int:
    """Print the prompt and what follows it."""
    from elastic_moe.model.sampling import sample
    from elastic_moe.trained import TrainedModel

    prompt = args.prompt.encode("utf-8", "surrogateescape")
    if not prompt:
        raise UserError("--prompt is empty: a model goes on from one token at least")
    (url,) = with_s3_options(args, args.url)
    with TrainedModel(url) as trained:
        tokenizer = _tokenizer(trained, args)
        ids = [int(each) for each in tokenizer.encode([prompt], "--prompt")[0]]
        if not ids:
            raise UserError(f"--prompt is {args.prompt!r}, which the tokenizer makes no token of: give another")
        if max(ids) >= trained.config.vocab_size:
            raise UserError(
                f"--prompt holds the byte {max(ids)}, and the model at {args.url} has {trained.config.vocab_size} "
                "tokens: give another"
            )
        out = sys.stdout.buffer
        out.write(prompt)
        drawn = sample(
            trained.decoder(),
            ids,
            args.tokens,
            temperature=args.temperature,
            seed=args.seed,
            window=trained.seq_len,
            num_known=tokenizer.num_tokens,
        )
        for text in tokenizer.decode(ids, drawn):
            out.write(text)
            out.flush()
    out.write(b"\n")
    return 0


def _tokenizer(trained: TrainedModel, args: argparse.Namespace) -> ByteTokenizer | FileTokenizer:
    from elastic_moe.data.tokenizer import ByteTokenizer, FileTokenizer, read_tokenizer

    vocab_size = trained.config.vocab_size
    if args.tokenizer == _BYTES or (args.tokenizer is None and trained.is_of_bytes):
        return ByteTokenizer()  # of which the model may lack the last ones, if its text has none of them
    if args.tokenizer is not None:
        try:
            found = FileTokenizer(read_tokenizer(args.tokenizer), args.tokenizer)
        except UserError as error:  # as a job has it, its field is named
            raise UserError(str(error).replace("data.tokenizer", "--tokenizer")) from error
    elif trained.tokenizer is not None:
        found = FileTokenizer(trained.tokenizer, "the checkpoint's tokenizer")
    else:
        raise UserError(
            f"the model at {args.url} has {vocab_size} tokens, and its checkpoint no tokenizer: give one by --tokenizer"
            f" (or --tokenizer {_BYTES}, if its ids are bytes)"
        )
    if found.num_tokens > vocab_size:
        raise UserError(
            f"--tokenizer has {found.num_tokens} tokens and the model at {args.url} {vocab_size}: give its own"
        )
    return found


def _temperature(text: str) -> float:
    """For argparse's `type`."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number >= 0")
    return value
