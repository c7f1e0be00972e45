"""Sampling from a model, a token at a time; without a cache of keys, for samples of a few hundred tokens.

Shape suffixes: S positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from elastic_moe.errors import UserError
from elastic_moe.model.decoder import Decoder


@torch.no_grad()
def sample(
    model: Decoder,
    prompt: Sequence[int],
    num_tokens: int,
    *,
    temperature: float,
    seed: int,
    window: int,
    num_known: int | None = None,
) -> Iterator[int]:
    """Yield `num_tokens` tokens that follow `prompt`.

    Args:
        prompt: token ids, one at least.
        temperature: divides the logits; 0 takes the likeliest token.
        window: most positions that the model sees, as many as it was trained on.
        num_known: only the first so many tokens are drawn, which stand for text; None draws any.

    Raises:
        UserError: the model's logits are not finite.
    """
    draw = torch.Generator().manual_seed(seed)
    tokens_S = list(prompt)
    for _ in range(num_tokens):
        logits_V = model(torch.tensor([tokens_S[-window:]])).logits_BSV[0, -1, :num_known].double()
        if not logits_V.isfinite().all():
            raise UserError("the model's logits are not finite: take a healthy step of the run (`elastic-moe ckpt ls`)")
        if temperature > 0:
            # However near to 0 the temperature is, the likeliest token divides to 0 and the others to less.
            scores_V = (logits_V - logits_V.max()) / temperature
            token = int(torch.multinomial(scores_V.softmax(0), 1, generator=draw))
        else:
            token = int(logits_V.argmax())
        tokens_S.append(token)
        yield token
