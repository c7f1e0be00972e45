"""Several ranks: resharding, interchange with stock DCP, failures of one rank, and death at every step of a save."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from storage import Checkpointer, JobIdentity, inspection, open_store
from tests import sample
from tests.ranks import RankFailure, Ranks
from tests.storage import sharded_cases as cases
from tests.storage import sharded_faults as faults


def test_every_layout_loads_on_every_other_bitwise(ranks: Ranks, tmp_path: Path) -> None:
    urls = {name: str(tmp_path / name) for name in cases.LAYOUTS}
    saved = {
        name: ranks.run(cases.save, urls[name], name, world_size=world)[0] for name, (world, _) in cases.LAYOUTS.items()
    }
    extra = torch.arange(70.0).reshape(10, 7) * 2
    for number, (target, (world, _)) in enumerate(cases.LAYOUTS.items()):
        sources = {name: urls[name] for name in sample.turn(list(urls), number, 2)}
        for found in ranks.run(cases.load, sources, target, world_size=world):
            assert found.keys() == sources.keys()
            for source, tensors in found.items():
                expected = {**saved[source], "columns": extra, "replicated": extra}
                assert tensors.keys() == expected.keys()
                assert sum("exp_avg" in key for key in expected) == 10
                for key, tensor in expected.items():
                    assert torch.equal(tensors[key], tensor), (source, target, key)
    for url in urls.values():
        verdicts = [
            inspection.verify(open_store(url), prefix) for prefix in inspection.checkpoints(inspection.locate(url))
        ]
        assert [verdict.problems for verdict in verdicts] == [(), ()]


@pytest.mark.parametrize("layout", [sample.rest("fsdp3"), "ep2x2"])
def test_stock_dcp_reads_ours_and_we_read_stock(ranks: Ranks, tmp_path: Path, layout: str) -> None:
    ranks.run(cases.interchange, str(tmp_path), layout, world_size=cases.LAYOUTS[layout][0])


@pytest.mark.parametrize(("victim", "where"), [(0, ".distcp"), (1, ".distcp"), (0, "receipt-"), (0, ".metadata")])
def test_a_failing_writer_fails_the_save_on_all_ranks_and_kills_none(
    ranks: Ranks, tmp_path: Path, victim: int, where: str
) -> None:
    for events in ranks.run(faults.fail_on_one_rank, str(tmp_path), victim, where, world_size=3):
        names = [name for name, _ in events if name != "checkpoint_committed"]
        assert names == ["checkpoint_staged", "checkpoint_failed", "checkpoint_staged"]
        assert "no more space" in events[1][1]["reason"]
        if where == ".distcp":
            assert f"rank {victim} failed" in events[1][1]["reason"]


def test_a_mistake_that_one_rank_sees_is_raised_by_all(ranks: Ranks, tmp_path: Path) -> None:
    for messages in ranks.run(faults.mistake_on_one_rank, str(tmp_path), world_size=2):
        assert len(messages) == 3
        assert "UnsupportedValue: rank 1: state 'extra'" in messages[0]
        assert "UsageError: state 'only' differs between rank 0 and rank 1" in messages[1]
        assert "WrongModel" in messages[2]
        assert "it has no 'other'" in messages[2]


def test_damage_that_one_rank_sees_makes_all_fall_back(ranks: Ranks, tmp_path: Path) -> None:
    ranks.run(faults.save_rows, str(tmp_path), (1, 2), world_size=2)
    victim = next(tmp_path.glob("step-000000002/attempt-*/__1_0.distcp"))
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    results = ranks.run(faults.fall_back, str(tmp_path), world_size=2)
    assert [(step, number) for step, number, _ in results] == [(1, 1), (1, 1)]
    assert results[0][2] == ["checkpoint_quarantined", "restored"]


def test_a_value_that_is_not_loaded_is_no_damage_on_any_rank(ranks: Ranks, tmp_path: Path) -> None:
    for restored, loaded, events in ranks.run(faults.unloadable, str(tmp_path), world_size=2):
        assert restored.startswith("UnloadableValue: the checkpoint of step 2") and "'value' holds" in restored
        assert "UnloadableValue" in loaded and "Unregistered" in loaded
        assert not {"checkpoint_quarantined", "restored"} & set(events)
    states = [row.state for row in inspection.summaries(inspection.locate(str(tmp_path)))]
    assert states == ["committed", "committed"]


def test_a_rank_with_bad_memory_is_named_and_nothing_is_set_aside(ranks: Ranks, tmp_path: Path) -> None:
    ranks.run(faults.save_rows, str(tmp_path), (1, 2), world_size=2)
    for message in ranks.run(faults.bad_reader, str(tmp_path), world_size=2):
        assert message.startswith("Disputed: the checkpoint of step 2 reads as damaged (rank 1 on ")
        assert "rank 0 on" not in message
        assert "replaced data while it was read" in message and "the memory or the storage mount" in message
    states = [row.state for row in inspection.summaries(inspection.locate(str(tmp_path)))]
    assert states == ["committed", "committed"]


def test_after_the_run_was_taken_over_saving_is_an_error_on_all_ranks(ranks: Ranks, tmp_path: Path) -> None:
    for messages in ranks.run(faults.fenced, str(tmp_path), world_size=2):
        assert messages == ["the run now belongs to another job (generation 0), epoch 2; this process held epoch 1"] * 2


def test_all_ranks_read_the_same_step_of_a_run(ranks: Ranks, tmp_path: Path) -> None:
    ranks.run(faults.save_rows, str(tmp_path), (1, 2), world_size=2)
    assert ranks.run(faults.read_while_saving, str(tmp_path), world_size=2) == [[2, 2], [2, 1]]


def test_a_folder_that_is_not_shared_is_noticed_at_once(ranks: Ranks, tmp_path: Path) -> None:
    for message in ranks.run(faults.not_shared, str(tmp_path), world_size=2):
        assert message.startswith("UsageError: rank 1 does not see")


def test_a_rank_that_stays_silent_is_named(ranks: Ranks, tmp_path: Path) -> None:
    reasons = ranks.run(faults.silent_rank, str(tmp_path), world_size=3)
    assert reasons[0] == "gave up waiting for the receipts of ranks 1"
    assert reasons[1] == "swallowed"
    assert reasons[2] in (reasons[0], "gave up waiting for the coordinator to commit")


def test_an_outage_is_not_taken_for_damage(ranks: Ranks, tmp_path: Path) -> None:
    ranks.run(faults.save_rows, str(tmp_path), (1, 2), world_size=2)
    for victim in tmp_path.glob("step-000000002/attempt-*/*.distcp"):
        victim.write_bytes(bytes(victim.stat().st_size))
    assert ranks.run(faults.damage_and_outage, str(tmp_path), world_size=2) == ["Transient", "Transient"]
    assert (tmp_path / "step-000000002/.metadata").exists()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_death_at_any_step_of_a_save_leaves_the_old_or_the_new_checkpoint(ranks: Ranks, tmp_path: Path) -> None:
    base, run = tmp_path / "base", tmp_path / "run"
    ranks.run(faults.save_rows, str(base), (10,), world_size=2)
    shutil.copytree(base, run)
    num_changes = ranks.run(faults.save_and_die, str(run), 20, -1, -1, "", world_size=2)
    assert num_changes == [13, 2]  # owner, data, receipt, 2 x manifest, .metadata, 7 of the old; data, receipt
    # of the victim, or what the other sees
    death = r"rank \d of 2 died|Connection closed by peer|Connection reset|Broken pipe|PeerGone"
    num_puts = [6, 2]
    outcomes = set()
    for victim, num in enumerate(num_changes):
        # after a change is before the next one; a delete has no middle
        moments = [("before", at) for at in range(num)] + [("middle", at) for at in range(num_puts[victim])]
        for moment, kill_at in [*moments[:: 1 if sample.IS_WHOLE else 2], ("after", num - 1)]:
            shutil.rmtree(run)
            shutil.copytree(base, run)
            print(f"rank {victim} dies {moment} change {kill_at}")
            with pytest.raises(RankFailure, match=death):
                ranks.run(faults.save_and_die, str(run), 20, victim, kill_at, moment, world_size=2)
            outcomes.add(check_after_death(run))
    assert outcomes == {10, 20}


def check_after_death(run: Path) -> int:
    """`verify` and `restore` agree about every checkpoint, and the run goes on; the step that is restored."""
    good = [
        int(prefix.removeprefix("step-").rstrip("/"))
        for prefix in inspection.checkpoints(inspection.locate(str(run)))
        if not inspection.verify(open_store(str(run)), prefix).problems
    ]
    assert good == [row.step for row in inspection.summaries(inspection.locate(str(run))) if row.state == "committed"]
    events: list[str] = []
    state = {"w": torch.zeros(8, 5000), "n": 0}
    with Checkpointer(
        str(run), keep=1, job=JobIdentity(lineage="a"), on_event=lambda name, fields: events.append(name)
    ) as ckpt:
        step = ckpt.restore(state)
        assert step == good[0]
        assert state["n"] == step
        assert (state["w"] == step).all()  # type: ignore[attr-defined]
        assert events == ["restored"]
        ckpt.save(30, state, wait=True)
        assert ckpt.wait()
    assert [row.step for row in inspection.summaries(inspection.locate(str(run)))] == [30]
    assert len(list(run.glob("step-000000030/attempt-*"))) == 1
    return step
