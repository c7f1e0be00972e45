"""Any state that can be saved is there again after a restore, by any number of ranks; any other is refused at once."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from tests import sample
from tests.ranks import Ranks
from tests.storage.state_cases import restore_draws, save_draws

NUM_DRAWS = int(os.environ.get("STATE_DRAWS", "90" if sample.IS_WHOLE else "36"))
FIRST_SEED = int(os.environ.get("STATE_SEED", "0"))
_BATCH = 12


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_what_is_saved_is_what_is_restored(ranks: Ranks, tmp_path: Path) -> None:
    seeds = list(range(FIRST_SEED, FIRST_SEED + NUM_DRAWS))
    print(f"STATE_SEED={FIRST_SEED} STATE_DRAWS={NUM_DRAWS}")
    wrong = []
    for start in range(0, NUM_DRAWS, _BATCH):
        batch = seeds[start : start + _BATCH]
        pick = random.Random(start)
        num_saving, num_restoring = pick.choice([(1, 2), (2, 1), (2, 3), (3, 2), (1, 1)])
        saved = ranks.run(save_draws, str(tmp_path), batch, world_size=num_saving, timeout_s=600)
        for seed, of_ranks in zip(batch, zip(*saved, strict=True), strict=True):
            if any(of_ranks):
                wrong.append(f"seed {seed}, save by {num_saving}: {of_ranks[0]}")
        restored = ranks.run(restore_draws, str(tmp_path), batch, num_saving, world_size=num_restoring, timeout_s=600)
        for rank, results in enumerate(restored):
            wrong += [
                f"seed {seed}, {num_saving} -> {num_restoring} ranks, rank {rank}: {result}"
                for seed, result in zip(batch, results, strict=True)
                if result
            ]
    assert not wrong, "\n".join([f"{len(wrong)} wrong", *wrong[:10]])
