"""Pure decisions about states in memory: which are held, which is whole, who holds copies, what is distrusted."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from storage.errors import Corrupt, NotFound
from storage.held.buddies import PeerCard, apart, buddy_of
from storage.held.choice import StoredState, held_states, join, worth_a_look
from storage.held.distrust import NUM_RESTORES_MAX, NUM_STEPS, Distrust, worn_out
from storage.held.inventory import HeldObject, HeldPart, Inventory
from storage.held.papers import dump_labels, dump_papers, load_labels, load_papers
from storage.held.rate import RateLimit
from tests.storage.held_cases import LINEAGE, Staged


def card(node: str, host: str = "", zone: str = "") -> PeerCard:
    return PeerCard(node=node, host=host or node, zone=zone, address="127.0.0.1", port=1, token="0" * 32)


@pytest.mark.parametrize("where", [str, lambda n: f"h{n // 2}"], ids=["alone", "two of a host"])
@pytest.mark.parametrize("zone", [lambda n: "", lambda n: f"z{n // 4}", lambda n: f"z{n // 2 % 2}"], ids="012")
@pytest.mark.parametrize("num_nodes", [2, 4, 8])
def test_where_all_are_alike_each_node_holds_the_copies_of_one(num_nodes: int, zone, where) -> None:
    cards = [card(f"n{number}", where(number), zone(number)) for number in range(num_nodes)]
    buddies = [buddy_of(one.node, cards) for one in cards]
    assert {buddy.node for buddy in buddies if buddy} == {one.node for one in cards}
    for one, buddy in zip(cards, buddies, strict=True):
        assert buddy is not None
        assert apart(one, buddy) == max(apart(one, other) for other in cards) > 0


def test_a_buddy_is_in_another_zone_if_there_is_one_else_on_another_host_else_another_node() -> None:
    cards = [card("a", "h1", "z1"), card("b", "h1", "z1"), card("c", "h2", "z1"), card("d", "h3", "z2")]
    assert [buddy_of(one.node, cards).node for one in cards] == ["d", "d", "d", "a"]
    assert buddy_of("a", cards[:3]).node == "c"
    assert buddy_of("a", cards[:2]).node == "b"
    assert buddy_of("a", cards[:1]) is None
    assert buddy_of("x", cards) is None
    assert apart(cards[0], card("d", "h1", "z2")) == 1  # a zone of another name does not make it another machine


def test_the_order_in_which_nodes_are_told_does_not_matter() -> None:
    cards = [card("a"), card("b"), card("c")]
    for order in itertools.permutations(cards):
        assert buddy_of("b", order).node == "c"


def labels(*parts: HeldPart):
    return [part.label for part in parts]


def test_what_is_newer_than_the_store_and_whole_is_worth_a_look() -> None:
    old, new, part_only = Staged(10), Staged(20), Staged(30)
    offers = [labels(old.part(0), new.part(0), part_only.part(0)), labels(old.part(1), new.part(1))]
    states = held_states(offers, LINEAGE)
    assert [(state.label.step, state.missing) for state in states] == [(30, [1]), (20, []), (10, [])]
    assert states[0].why_not == "nobody holds the part of rank 1"
    assert [state.label.step for state in worth_a_look(states, StoredState(10), unhealthy=False)] == [30, 20]
    assert worth_a_look(states, StoredState(30), unhealthy=False) == []
    assert states[1].holders == {0: (0,), 1: (1,)}


def test_a_later_generation_counts_for_more_than_a_higher_step() -> None:
    abandoned, gone_on = Staged(50, world_size=1, generation=3), Staged(40, world_size=1, generation=4)
    states = held_states([labels(abandoned.part(0), gone_on.part(0))], LINEAGE)
    assert [state.label.step for state in states] == [40, 50]
    assert worth_a_look(states[1:], StoredState(45, generation=4), unhealthy=False) == []


def test_states_of_other_jobs_and_unhealthy_ones_are_left_out() -> None:
    sick, foreign = Staged(20, world_size=1, healthy=False), Staged(30, world_size=1, lineage="another")
    states = held_states([labels(sick.part(0), foreign.part(0))], LINEAGE)
    assert [state.label.step for state in states] == [20]
    assert worth_a_look(states, None, unhealthy=False) == []
    assert len(worth_a_look(states, None, unhealthy=True)) == 1


def test_a_label_that_contradicts_the_others_of_its_attempt_is_left_out() -> None:
    staged = Staged(20)
    odd = staged.part(1).label.model_copy(update={"step": 99})
    (state,) = held_states([labels(staged.part(0)), [odd]], LINEAGE)
    assert (state.label.step, state.missing) == (20, [1])


def test_without_the_ranks_that_know_what_all_of_it_is_nothing_is_made() -> None:
    staged = Staged(20)
    (state,) = held_states([labels(staged.part(1))], LINEAGE)
    assert state.why_not == "nobody holds what it is made of"
    with pytest.raises(Corrupt, match="nobody holds what it is made of"):
        join([staged.part(1).papers])


def test_parts_make_a_manifest_and_a_part_that_is_missing_is_named() -> None:
    staged = Staged(20)
    joined = join([staged.part(1).papers, staged.part(0).papers])
    assert (joined.manifest.step, joined.manifest.attempt, joined.twins) == (20, staged.id, ())
    with pytest.raises(Corrupt, match=r"tensor 'w' has 40000 of 80000 elements"):
        join([staged.part(0).papers])


def test_of_replicas_one_is_taken_and_the_others_are_its_twins() -> None:
    staged = Staged(20, is_all=True)
    both = join([staged.part(0).papers, staged.part(1).papers])
    assert len(both.manifest.items) == 2
    assert len(both.twins) == 2
    assert {row.name.rsplit("/", 1)[1] for row in both.twins} == {"__0_0.distcp"}
    assert {name.rsplit("/", 1)[1] for row in both.twins for name, _ in row.others} == {"__1_0.distcp"}
    alone = join([staged.part(1).papers])  # rank 0 is gone: nothing is missing
    assert (len(alone.manifest.items), alone.twins) == (2, ())


def test_a_replica_of_other_bytes_is_no_twin() -> None:
    staged = Staged(20, is_all=True)
    other = staged.part(1).papers
    table = other.receipt.items.model_copy(update={"crc32c": other.receipt.items.crc32c + 1})
    odd = other.model_copy(update={"receipt": other.receipt.model_copy(update={"items": table})})
    assert join([staged.part(0).papers, odd]).twins == ()


def test_papers_come_back_as_they_were_and_a_flipped_bit_is_found() -> None:
    papers = Staged(20).part(0).papers
    data = dump_papers(papers)
    assert load_papers(data, "papers") == papers
    for place in range(0, len(data), max(1, len(data) // 50)):
        damaged = bytearray(data)
        damaged[place] ^= 4
        with pytest.raises(Corrupt):
            load_papers(bytes(damaged), "papers")
    assert load_labels(dump_labels([papers.label]), "labels") == (papers.label,)
    with pytest.raises(Corrupt):
        load_labels(b'[{"step": -1}]', "labels")


def test_papers_whose_label_is_of_another_part_are_refused() -> None:
    papers = Staged(20).part(0).papers
    for update in ({"rank": 1}, {"size_bytes": 1}, {"attempt": "deadbeef"}, {"has_contents": False}):
        odd = papers.model_copy(update={"label": papers.label.model_copy(update=update)})
        with pytest.raises(Corrupt, match="not those of one part"):
            load_papers(dump_papers(odd), "papers")


def held(inventory: Inventory) -> list[tuple[int, int]]:
    return [(label.step, label.rank) for label in inventory.labels()]


def test_the_newest_two_states_that_all_ranks_have_staged_are_held() -> None:
    inventory, freed = Inventory(), []
    for step in (10, 20, 30):
        for rank in (0, 1):
            inventory.add(Staged(step).part(rank, lambda key=(step, rank): freed.append(key)))
        if step == 20:
            inventory.add(Staged(25).part(0, lambda: freed.append((25, 0))))  # rank 1 has failed to stage it
            assert held(inventory)[0] == (25, 0)
    assert held(inventory) == [(30, 1), (30, 0), (20, 1), (20, 0)]
    assert sorted(freed) == [(10, 0), (10, 1), (25, 0)]


def test_states_that_one_rank_fails_to_stage_leave_the_others_a_slot() -> None:
    inventory = Inventory()
    for step in range(10, 100, 10):
        inventory.add(Staged(step).part(0))
        if step % 20:
            inventory.add(Staged(step).part(1))
        assert [rank for _, rank in held(inventory)].count(0) <= 3
    assert held(inventory) == [(90, 1), (90, 0), (70, 1), (70, 0)]


def test_what_some_ranks_never_stage_does_not_pile_up() -> None:
    inventory = Inventory()
    for rank in (0, 1):
        inventory.add(Staged(10).part(rank))
    for step in range(20, 90, 10):
        inventory.add(Staged(step).part(0))
    assert held(inventory) == [(80, 0), (70, 0), (10, 1), (10, 0)]


def test_copies_of_each_node_are_counted_apart() -> None:
    inventory = Inventory()
    for of_node in ("", "b", "c"):
        for step in (10, 20, 30):
            part = Staged(step, world_size=1).part(0)
            inventory.add(HeldPart(part.papers, part.objects, of_node))
    assert sorted(held(inventory)) == [(20, 0)] * 3 + [(30, 0)] * 3
    assert inventory.copied_bytes == 4 * Staged(10, world_size=1).part(0).label.size_bytes


def test_what_is_copied_stays_until_a_newer_state_has_copies_as_well() -> None:
    inventory, copied = Inventory(), (10, 20, 60, 80)
    seen = []
    for step in range(10, 90, 10):
        inventory.add(replace(Staged(step).part(0), is_copied=step in copied))
        if step in copied:
            inventory.add(replace(Staged(step).part(1), of_node="gone" if step < 60 else "b"))
        seen.append([step for step, rank in held(inventory) if not rank])
    assert seen[:5] == [[10], [20, 10], [30, 20, 10], [40, 30, 20, 10], [50, 40, 20, 10]]
    assert seen[5:] == [[60, 50, 20], [70, 60, 20], [80, 70, 60]]
    assert [step for step, rank in held(inventory) if rank] == [80, 60]


def test_copies_of_nodes_that_are_gone_do_not_pile_up() -> None:
    inventory = Inventory()
    for number, step in enumerate(range(10, 60, 10)):
        for staged in (Staged(step, generation=number), Staged(step + 1, generation=number)):
            inventory.add(staged.part(0))
            inventory.add(replace(staged.part(1), of_node=f"node-{number}"))  # which is another one each time
    assert held(inventory) == [(51, 1), (51, 0), (50, 1), (50, 0)]


def test_a_copy_that_a_state_still_needs_stays() -> None:
    inventory, staged = Inventory(), [Staged(step) for step in (10, 20, 30)]
    for one in staged[:2]:
        inventory.add(replace(one.part(1), of_node="gone"))
    inventory.add(staged[1].part(0))
    assert held(inventory) == [(20, 1), (20, 0), (10, 1)]
    inventory.add(staged[2].part(0))
    assert held(inventory) == [(30, 0), (20, 1), (20, 0)]


def test_memory_is_freed_once_nobody_reads_it_any_more() -> None:
    inventory, freed = Inventory(), []
    staged = Staged(10)
    inventory.add(staged.part(0, lambda: freed.append("freed")))
    with inventory.reading(staged.id, 0) as part:
        assert inventory.drop([staged.id]) == 1
        with pytest.raises(NotFound), inventory.reading(staged.id, 0):
            pass
        assert (part.label.step, freed) == (10, [])
    assert freed == ["freed"]


def test_a_rank_that_needs_memory_gets_that_of_its_oldest_state_but_not_of_its_only_one() -> None:
    inventory = Inventory()
    inventory.add(Staged(10).part(0))
    assert not inventory.make_room(0)
    inventory.add(Staged(20).part(0))
    assert inventory.make_room(0)
    assert held(inventory) == [(20, 0)]


def test_an_object_in_pieces_is_read_as_if_it_were_one() -> None:
    held_object, data = HeldObject([b"abc", b"", b"defgh", b"i"]), b"abcdefghi"
    assert held_object.size_bytes == len(data)
    for start, stop in itertools.combinations(range(len(data) + 1), 2):
        assert b"".join(held_object.views(start, stop - start)) == data[start:stop]


def test_an_unhealthy_state_soon_after_a_restore_from_memory_is_blamed_on_it() -> None:
    def after(*staged: tuple[int, bool]) -> bool:
        distrust = Distrust()
        distrust.restored("abcd0123", 100)
        found = [distrust.why_not(Staged(step, healthy=healthy).part(0).label) for step, healthy in staged]
        return found[-1] is not None

    assert after((101, False))
    assert after((100 + 5 * NUM_STEPS, False))  # nothing else was staged in between
    assert after((101, True), (100 + NUM_STEPS, False))
    assert not after((101, True), (101 + NUM_STEPS, False))
    assert Distrust().why_not(Staged(5, healthy=False).part(0).label) is None  # nothing was restored from memory


def test_a_state_that_is_gone_on_from_again_and_again_in_vain_is_worn_out() -> None:
    distrust = Distrust()
    for _ in range(NUM_RESTORES_MAX):
        assert worn_out([distrust.num_restores(), {}]) == []
        distrust.restored("abcd0123", 100)
    assert worn_out([{}, distrust.num_restores()]) == ["abcd0123"]
    distrust.why_not(Staged(101).part(0).label)
    assert worn_out([distrust.num_restores()]) == []


def test_a_rate_is_kept_on_average() -> None:
    rate = RateLimit(1000.0)
    pauses = [rate.pause_s(500, now_s) for now_s in (0.0, 0.0, 0.5, 3.0, 3.0)]
    assert pauses == pytest.approx([0.0, 0.5, 0.5, 0.0, 0.5])
    assert (rate.bite_bytes, RateLimit(None).pause_s(1 << 40, 0.0)) == (1000, 0.0)
