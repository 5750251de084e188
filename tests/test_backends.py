"""What every backend guarantees, asked of each; and what the one in memory promises beyond that."""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable
from typing import Any

import anyio
import msgspec
import pytest

from starlette_rt.backends import from_url
from starlette_rt.backends.base import MAX_ANSWER, Backend, Claim, Published
from starlette_rt.backends.memory import MemoryBroker, MemoryLedger, MemoryLimits, MemoryPresence, memory
from starlette_rt.backends.redis.broker import RedisBroker
from starlette_rt.exceptions import ConfigurationError
from starlette_rt.frames import encode
from starlette_rt.history import EPOCH_TTL, History, Position, Publication, Reading
from starlette_rt.limits import Buckets, Due, RateLimit
from starlette_rt.presence import Diff

pytestmark = [pytest.mark.unit, pytest.mark.anyio]

memory_module = importlib.import_module("starlette_rt.backends.memory")  # its name is also that of a function

GRACE = 10.0
HISTORY = History(3, 60)


class Stage:
    """One backend under test, what it reports, and a way to let time pass for it."""

    backend: Backend

    def __init__(self) -> None:
        self.delivered: list[Publication] = []
        self.changed: list[str] = []

    def resumed(self) -> None:
        """Delivery was interrupted and goes on."""

    async def start(self) -> None:
        await self.backend.broker.start(self.delivered.append, self.resumed)
        await self.backend.presence.start(self.changed.append)

    async def stop(self) -> None:
        await self.backend.presence.stop()
        await self.backend.broker.stop()

    async def settled(self) -> None:
        """Return when everything published so far has arrived; at once where nothing travels."""

    async def pass_time(self, seconds: float) -> None:
        raise NotImplementedError

    def wall(self) -> float:
        """What the clock shows by which revocations end."""
        raise NotImplementedError


class MemoryStage(Stage):
    """Memory with a clock of the test's."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0
        clock: Callable[[], float] = lambda: self.now  # noqa: E731
        self.backend = Backend(
            MemoryBroker(clock), MemoryPresence(GRACE, clock), MemoryLimits(clock), MemoryLedger(wall=clock)
        )

    def wall(self) -> float:
        return self.now

    async def pass_time(self, seconds: float) -> None:
        self.now += seconds
        self.backend.presence.sweep()
        self.backend.broker.sweep()


@pytest.fixture(params=[MemoryStage], ids=["memory"])
def stage(request: pytest.FixtureRequest) -> Stage:
    made: Stage = request.param()
    return made


def publication(group: str = "a", data: Any = 1, id: str = "", once: bool = False) -> Publication:
    return Publication(group, "message", data, encode(data), exclude="x", ephemeral=True, key="k", id=id, once=once)


# Broker


async def test_a_publication_arrives_whole_and_is_shared(stage: Stage) -> None:
    await stage.start()
    assert await stage.backend.broker.publish(publication(id="i"), None) == Published(None, "yes")
    await stage.settled()
    assert stage.delivered == [publication(id="i")]
    await stage.stop()


async def test_publications_arrive_in_the_order_of_the_calls(stage: Stage) -> None:
    await stage.start()
    for number in range(20):
        group, history = ("a", None) if number % 3 else ("b", HISTORY)
        await stage.backend.broker.publish(publication(group, number), history)
    await stage.settled()
    for group, of_group in ("a", lambda number: number % 3 != 0), ("b", lambda number: number % 3 == 0):
        assert [each.data for each in stage.delivered if each.group == group] == list(filter(of_group, range(20)))
    assert len(stage.delivered) == 20
    await stage.stop()


async def test_nothing_arrives_before_the_start_or_after_the_stop(stage: Stage) -> None:
    await stage.backend.broker.publish(publication(), None)
    await stage.start()
    await stage.stop()
    await stage.backend.broker.publish(publication(), None)
    assert stage.delivered == []
    await stage.start()
    await stage.backend.broker.publish(publication(), None)
    await stage.settled()
    assert len(stage.delivered) == 1
    await stage.stop()


async def published(stage: Stage, *numbers: int, group: str = "a", id: str = "", once: bool = False) -> list[Position]:
    places = []
    for number in numbers:
        found = await stage.backend.broker.publish(publication(group, number, id, once), HISTORY)
        assert found.position is not None
        assert found.shared == "yes"
        places.append(found.position)
    return places


async def test_with_history_a_publication_arrives_with_its_place_in_the_chain(stage: Stage) -> None:
    await stage.start()
    places = await published(stage, 1, 2, 3, 4)
    assert [place.offset for place in places] == [1, 2, 3, 4]
    assert len({place.epoch for place in places}) == 1
    tags = [place.tag for place in places]
    assert len(set(tags)) == 4
    await stage.settled()
    assert [(each.offset, each.tag, each.prev) for each in stage.delivered] == list(
        zip([1, 2, 3, 4], tags, ["", *tags], strict=False)
    )
    bare = [msgspec.structs.replace(each, offset=None, tag="", prev="") for each in stage.delivered]
    assert bare == [publication(data=number) for number in (1, 2, 3, 4)]
    await stage.stop()


async def test_a_read_tells_where_the_log_ends_and_what_it_keeps(stage: Stage) -> None:
    await stage.start()
    places = await published(stage, 1, 2, 3, 4)
    await published(stage, 5, group="b")
    await stage.settled()
    reading = await stage.backend.broker.read("a", HISTORY)
    assert reading.position == places[-1] == await stage.backend.broker.position("a", HISTORY)
    assert list(reading.entries) == stage.delivered[1:4]
    await stage.stop()


async def test_the_epoch_is_made_by_the_first_who_asks(stage: Stage) -> None:
    await stage.start()
    broker = stage.backend.broker
    asked = await broker.position("a", HISTORY)
    assert asked.epoch
    assert (asked.offset, asked.tag) == (0, "")
    read = await broker.read("b", HISTORY)
    assert read == Reading(read.position, ())
    assert read.position.epoch not in ("", asked.epoch)
    (place,) = await published(stage, 1)
    assert (place.epoch, place.offset) == (asked.epoch, 1)
    await stage.stop()


async def test_what_a_log_keeps_goes_after_its_time_and_its_end_stays(stage: Stage) -> None:
    await stage.start()
    await published(stage, 1)
    await stage.pass_time(HISTORY.ttl * 0.7)
    places = await published(stage, 2)
    await stage.pass_time(HISTORY.ttl * 0.7)
    assert len((await stage.backend.broker.read("a", HISTORY)).entries) == 2
    await stage.pass_time(HISTORY.ttl * 0.6)
    assert await stage.backend.broker.read("a", HISTORY) == Reading(places[0], ())
    await stage.pass_time(EPOCH_TTL * 0.9)
    assert await stage.backend.broker.position("a", HISTORY) == places[0]
    await stage.pass_time(EPOCH_TTL * 1.1)
    assert (await stage.backend.broker.position("a", HISTORY)).epoch != places[0].epoch
    await stage.stop()


async def test_a_new_epoch_is_begun_once_for_all_who_saw_the_same_end(stage: Stage) -> None:
    await stage.start()
    broker = stage.backend.broker
    (place,) = await published(stage, 1)
    renewed = await broker.renew("a", HISTORY, place)
    assert renewed.epoch != place.epoch
    assert (renewed.offset, renewed.tag) == (1, place.tag)
    assert await broker.renew("a", HISTORY, place) == renewed
    (later,) = await published(stage, 2)
    assert later.epoch == renewed.epoch
    assert await broker.renew("a", HISTORY, renewed) == later
    assert [each.data for each in (await broker.read("a", HISTORY)).entries] == [1, 2]
    await stage.stop()


async def test_with_history_what_was_published_before_arrives_once_and_gets_the_same_answer(stage: Stage) -> None:
    await stage.start()
    (first,) = await published(stage, 1, id="i")
    await published(stage, 2, id="j")
    assert await published(stage, 1, id="i") == [first]
    assert await published(stage, 1, id="i", once=True) == [first]
    assert await published(stage, 1, id="i", group="b") != [first]
    await stage.settled()
    assert [each.data for each in stage.delivered] == [1, 2, 1]
    await stage.stop()


async def test_without_history_what_a_client_caused_arrives_once(stage: Stage) -> None:
    await stage.start()
    broker = stage.backend.broker
    for group in "aab":
        found = await broker.publish(publication(group, id="i", once=True), None)
        assert found == Published(None, "yes")
    await stage.settled()
    assert [each.group for each in stage.delivered] == ["a", "b"]
    await stage.stop()


# Presence


def refs(metas: Any) -> list[Any]:
    return [{name: value for name, value in meta.items() if name != "ref"} for meta in metas]


async def shown(stage: Stage, group: str = "a") -> dict[str, list[Any]]:
    return {key: refs(member.metas) for key, member in (await stage.backend.presence.members(group)).items()}


def told(diff: Diff | None) -> tuple[list[str], list[str]]:
    assert diff is not None
    return sorted(diff.joins), sorted(diff.leaves)


async def following(stage: Stage, group: str = "a") -> None:
    """Let the stage begin, and this node follow ``group``; from here on it reports what changes."""
    await stage.start()
    await stage.backend.presence.follow(group, "members")
    stage.changed.clear()


async def test_who_is_tracked_is_shown_at_once_and_reported(stage: Stage) -> None:
    await following(stage)
    await stage.backend.presence.track("a", "ada", "1", {"name": "Ada"})
    assert await shown(stage) == {"ada": [{"name": "Ada"}]}
    assert set(stage.changed) == {"a"}
    await stage.stop()


async def test_a_group_need_not_be_followed_to_be_asked(stage: Stage) -> None:
    await stage.start()
    presence = stage.backend.presence
    await presence.track("a", "ada", "1", {"name": "Ada", "raw": b"\xff\x00", "of": [1, 1.5, None, {"x": "ü"}]})
    await presence.track("a", "bob", "2", {"name": "Bob"})
    await presence.untrack("a", "bob", "2")
    assert await shown(stage) == {"ada": [{"name": "Ada", "raw": b"\xff\x00", "of": [1, 1.5, None, {"x": "ü"}]}]}
    assert await presence.count("a") == 1
    await stage.stop()


async def test_who_is_followed_can_be_counted_without_asking(stage: Stage) -> None:
    await following(stage)
    presence = stage.backend.presence
    assert presence.size("a") == 0
    for number, key in enumerate(("ada", "bob", "ada")):
        await presence.track("a", key, str(number), {})
    assert presence.size("a") == 2
    await stage.stop()


async def test_a_count_is_reported_once_for_each_change_of_the_number(stage: Stage) -> None:
    counts: list[tuple[str, int, int]] = []
    await stage.start()
    presence = stage.backend.presence
    presence.on_count = lambda *found: counts.append(found)
    await presence.track("a", "ada", "1", {})
    await presence.track("a", "ada", "2", {})
    await presence.track("a", "bob", "3", {})
    await presence.track("a", "bob", "3", {"at": 1})
    await presence.untrack("a", "bob", "3")
    await presence.untrack("a", "ada", "2")
    presence.close(["a"], "ada", "1")
    await stage.pass_time(GRACE * 1.1)
    assert counts == [("a", 0, 1), ("a", 1, 2), ("a", 2, 1), ("a", 1, 0)]
    await stage.stop()


async def test_a_member_has_one_meta_for_each_connection(stage: Stage) -> None:
    await stage.start()
    await stage.backend.presence.track("a", "ada", "1", {"at": 1})
    await stage.backend.presence.track("a", "ada", "2", {"at": 2})
    await stage.backend.presence.track("a", "ada", "1", {"at": 3})
    assert await shown(stage) == {"ada": [{"at": 2}, {"at": 3}]}
    assert await stage.backend.presence.count("a") == 1
    assert await stage.backend.presence.count("a", connections=True) == 2
    await stage.stop()


async def test_nobody_is_in_a_group_that_nobody_tracked(stage: Stage) -> None:
    await stage.start()
    presence = stage.backend.presence
    assert await presence.members("a") == {}
    assert await presence.count("a") == await presence.count("a", connections=True) == 0
    assert presence.take("a", watched=True) is None
    assert presence.known("a").members == ()
    await presence.untrack("a", "ada", "1")
    assert stage.changed == []
    await stage.stop()


async def test_a_diff_is_net_and_taken_once(stage: Stage) -> None:
    await following(stage)
    presence = stage.backend.presence
    await presence.track("a", "ada", "1", {})
    await presence.track("a", "bob", "2", {})
    await presence.untrack("a", "bob", "2")
    assert presence.known("a").members == ()
    assert told(presence.take("a", watched=True)) == (["ada"], [])
    assert presence.take("a", watched=True) is None
    assert [member.key for member in presence.known("a").members] == ["ada"]
    await stage.stop()


async def test_who_untracks_is_gone_at_once(stage: Stage) -> None:
    await following(stage)
    await stage.backend.presence.track("a", "ada", "1", {})
    stage.backend.presence.take("a", watched=True)
    await stage.backend.presence.untrack("a", "ada", "1")
    assert await shown(stage) == {}
    assert told(stage.backend.presence.take("a", watched=True)) == ([], ["ada"])
    assert set(stage.changed) == {"a"}
    await stage.stop()


async def test_who_closes_lingers_for_the_grace(stage: Stage) -> None:
    await following(stage)
    await stage.backend.presence.follow("b", "members")
    await stage.backend.presence.track("a", "ada", "1", {})
    await stage.backend.presence.track("b", "ada", "1", {})
    stage.backend.presence.close(["a", "b"], "ada", "1")
    await stage.pass_time(GRACE * 0.9)
    assert await shown(stage) == await shown(stage, "b") == {"ada": [{}]}
    stage.changed.clear()
    await stage.pass_time(GRACE * 0.2)
    assert await shown(stage) == await shown(stage, "b") == {}
    assert set(stage.changed) == {"a", "b"}
    await stage.stop()


async def test_who_comes_back_within_the_grace_was_never_away(stage: Stage) -> None:
    await following(stage)
    await stage.backend.presence.track("a", "ada", "1", {"at": 1})
    stage.backend.presence.take("a", watched=True)
    stage.backend.presence.close(["a"], "ada", "1")
    await stage.pass_time(GRACE * 0.5)
    await stage.backend.presence.track("a", "ada", "2", {"at": 1})
    await stage.pass_time(GRACE * 2)
    assert await shown(stage) == {"ada": [{"at": 1}]}
    assert stage.backend.presence.take("a", watched=True) is None
    await stage.stop()


async def test_members_can_be_asked_for_by_page_in_the_order_of_their_keys(stage: Stage) -> None:
    await stage.start()
    presence = stage.backend.presence
    for key in ("cleo", "ada", "dan", "bob"):
        await presence.track("a", key, f"of {key}", {})
    assert list(await presence.members("a", limit=3)) == ["ada", "bob", "cleo"]
    assert list(await presence.members("a", after="bob")) == ["cleo", "dan"]
    assert list(await presence.members("a", after="ada", limit=2)) == ["bob", "cleo"]
    assert await presence.members("a", after="dan", limit=2) == {}
    assert await presence.members("nowhere", limit=2) == {}
    await stage.stop()


async def test_who_comes_back_with_something_else_to_say_is_an_update(stage: Stage) -> None:
    await following(stage)
    presence = stage.backend.presence
    await presence.track("a", "ada", "1", {"at": 1})
    await presence.track("a", "ada", "2", {"at": 2})
    presence.take("a", watched=True)
    presence.close(["a"], "ada", "1")
    presence.close(["a"], "ada", "2")
    await presence.track("a", "ada", "3", {"at": 2})  # the one that says the same, though another has waited longer
    assert presence.take("a", watched=True) is None
    await presence.track("a", "ada", "4", {"at": 4})
    diff = presence.take("a", watched=True)
    assert diff is not None
    assert (refs(diff.leaves["ada"]), refs(diff.joins["ada"])) == ([{"at": 1}], [{"at": 4}])
    assert await shown(stage) == {"ada": [{"at": 2}, {"at": 4}]}
    await stage.stop()


async def test_a_connection_can_be_tracked_as_somebody_else(stage: Stage) -> None:
    await following(stage)
    presence = stage.backend.presence
    await presence.track("a", "guest", "1", {})
    await presence.track("a", "ada", "1", {})
    assert await shown(stage) == {"ada": [{}]}
    assert await presence.count("a", connections=True) == 1
    await stage.stop()


async def test_an_empty_group_is_forgotten_unless_it_is_watched(stage: Stage) -> None:
    await following(stage)
    presence = stage.backend.presence
    await presence.track("a", "ada", "1", {})
    presence.take("a", watched=True)
    await presence.untrack("a", "ada", "1")
    diff = presence.take("a", watched=True)
    assert diff is not None
    assert presence.known("a").version == diff.version == 2  # the watchers count on
    presence.unfollow("a", "members")
    presence.take("a", watched=False)
    assert presence.known("a").version == 0
    await stage.stop()


async def test_a_stop_forgets_who_was_present(stage: Stage) -> None:
    await stage.start()
    await stage.backend.presence.track("a", "ada", "1", {})
    await stage.stop()
    await stage.start()
    assert await shown(stage) == {}
    await stage.stop()


# Limits


def due(limit: RateLimit, amount: int = 1, *, subject: str = "ada", place: str = "Chat:0:user:") -> Due:
    return Due(place, subject, limit, amount)


async def test_a_budget_is_taken_and_says_when_to_come_again(stage: Stage) -> None:
    two = RateLimit("2/minute", per="user")
    take, seen = stage.backend.limits.take, Buckets()
    assert [await take([due(two)], seen), await take([due(two)], seen)] == [0.0, 0.0]
    assert 29 < await take([due(two)], seen) <= 30
    assert await take([due(two, 2, subject="bob")], seen) == 0.0
    assert await take([due(two, subject="bob")], seen) > 0
    await stage.pass_time(31)
    assert await take([due(two)], seen) == 0.0
    assert await take([due(two)], seen) > 0


async def test_what_a_budget_never_holds_never_passes(stage: Stage) -> None:
    take, seen = stage.backend.limits.take, Buckets()
    two = RateLimit("2/minute", per="user")
    assert await take([due(two, 3)], seen) == math.inf
    assert await take([due(two, 2)], seen) == 0.0


async def test_a_budget_that_refuses_takes_nothing_from_the_others_of_its_subject(stage: Stage) -> None:
    take, seen = stage.backend.limits.take, Buckets()
    one, ten = RateLimit("1/minute", per="user"), RateLimit("10/minute", per="user")
    both = [due(ten), due(one, place="Chat:1:user:")]
    assert await take(both, seen) == 0.0
    for _ in range(5):
        assert 59 < await take(both, seen) <= 60
    assert await take([due(ten, 9)], seen) == 0.0


async def test_all_rates_of_a_budget_must_agree(stage: Stage) -> None:
    take, seen = stage.backend.limits.take, Buckets()
    rates = [due(RateLimit("2/minute;3/hour", per="user"))]
    assert [await take(rates, seen), await take(rates, seen)] == [0.0, 0.0]
    assert 29 < await take(rates, seen) <= 30
    await stage.pass_time(60)
    assert await take(rates, seen) == 0.0
    await stage.pass_time(60)
    assert 1000 < await take(rates, seen) <= 1200


async def test_a_person_has_as_many_connections_as_may_be_and_others_have_theirs(stage: Stage) -> None:
    limits = stage.backend.limits
    assert [await limits.take_cap("ada", 2) for _ in range(3)] == [True, True, False]
    assert await limits.take_cap("bob", 2)
    limits.release_cap("ada")
    assert [await limits.take_cap("ada", 2) for _ in range(2)] == [True, False]


# Ledger


async def test_a_key_is_claimed_once_until_its_time_is_over(stage: Stage) -> None:
    claim = stage.backend.ledger.claim
    first = await claim("k", 10)
    assert (first.state, first.local) == ("first", False)
    assert await claim("k", 10) == Claim("running", first.holder)
    other = await claim("other", 10, shared=True)
    assert other.state == "first"
    assert other.holder != first.holder
    await stage.pass_time(11)
    assert (await claim("k", 10)).state == "first"


async def test_what_is_settled_is_answered_until_its_time_is_over_and_the_first_answer_stays(stage: Stage) -> None:
    ledger = stage.backend.ledger
    holder = (await ledger.claim("k", 10)).holder
    assert await ledger.settle("k", b"one", 30) == b"one"
    assert await ledger.settle("k", b"two", 30) == b"one"
    await stage.pass_time(20)
    assert (await ledger.claim("k", 10))[::2] == ("answered", b"one")
    await ledger.release("k", holder)
    assert (await ledger.outcome("k", 0))[::2] == ("answered", b"one")
    await stage.pass_time(11)
    assert (await ledger.claim("k", 10)).state == "first"


async def test_what_was_never_claimed_can_be_settled(stage: Stage) -> None:
    ledger = stage.backend.ledger
    await ledger.settle("k", b"late", 30)
    assert (await ledger.claim("k", 10))[::2] == ("answered", b"late")


async def test_of_an_answer_that_is_too_large_the_fact_is_kept(stage: Stage) -> None:
    ledger = stage.backend.ledger
    assert len(await ledger.settle("large", b"x" * MAX_ANSWER, 30)) == MAX_ANSWER
    assert await ledger.settle("too large", b"x" * (MAX_ANSWER + 1), 30) == b""
    assert (await ledger.claim("too large", 10))[::2] == ("answered", b"")


async def test_what_is_released_can_be_claimed_again(stage: Stage) -> None:
    ledger = stage.backend.ledger
    await ledger.release("k", "nobody's")
    await ledger.release("k", (await ledger.claim("k", 10)).holder)
    assert await ledger.outcome("k", 0) == Claim("free")
    assert (await ledger.claim("k", 10)).state == "first"


async def test_a_claim_that_is_over_cannot_give_back_the_one_that_followed(stage: Stage) -> None:
    ledger = stage.backend.ledger
    over = await ledger.claim("k", 10)
    await stage.pass_time(11)
    later = await ledger.claim("k", 10)
    await ledger.release("k", over.holder)
    assert await ledger.claim("k", 10) == Claim("running", later.holder)


@pytest.mark.parametrize("ends", ["settle", "release", "never"])
async def test_who_waits_for_an_outcome_gets_it_when_it_is_there(stage: Stage, ends: str) -> None:
    ledger = stage.backend.ledger
    holder = (await ledger.claim("k", 100)).holder
    found: list[Claim] = []

    async def wait() -> None:
        found.append(await ledger.outcome("k", 0.05 if ends == "never" else 10))

    with anyio.fail_after(5):
        async with anyio.create_task_group() as group:
            group.start_soon(wait)
            group.start_soon(wait)
            await anyio.wait_all_tasks_blocked()
            assert found == []
            if ends == "settle":
                await ledger.settle("k", b"done", 10)
            elif ends == "release":
                await ledger.release("k", holder)
    expected = {"settle": ("answered", b"done"), "release": ("free", b""), "never": ("running", b"")}
    assert [claim[::2] for claim in found] == [expected[ends]] * 2


async def test_an_outcome_is_waited_for_no_longer_than_the_claim_holds(stage: Stage) -> None:
    ledger = stage.backend.ledger
    await ledger.claim("k", 10)
    await stage.pass_time(11)
    assert await ledger.outcome("k", 10) == Claim("free")


async def test_a_revocation_holds_until_its_time_and_is_never_shortened(stage: Stage) -> None:
    ledger, start = stage.backend.ledger, stage.wall()
    assert not await ledger.revoked(["user:ada"])
    await ledger.revoke("user:ada", start + 20)
    await ledger.revoke("user:ada", start + 10)
    await stage.pass_time(15)
    assert await ledger.revoked(["token:1", "user:ada"])
    assert not await ledger.revoked(["token:1"])
    assert ledger.revocations() == [("user:ada", pytest.approx(start + 20, abs=0.001))]
    await stage.pass_time(6)
    assert not await ledger.revoked(["user:ada"])
    assert ledger.revocations() == []


async def test_a_revocation_that_another_node_has_told_of_holds_too(stage: Stage) -> None:
    ledger, start = stage.backend.ledger, stage.wall()
    ledger.note("user:ada", start + 20)
    ledger.note("user:ada", start + 10)
    ledger.note("user:bob", start - 1)
    assert await ledger.revoked(["user:ada"])
    assert not await ledger.revoked(["user:bob"])
    await ledger.load()
    assert [rule for rule, _ in ledger.revocations()] == ["user:ada"]
    await stage.pass_time(21)
    assert not await ledger.revoked(["user:ada"])


# The one in memory


async def test_a_roster_in_memory_is_gone_after_the_grace() -> None:
    stage = MemoryStage()
    presence = stage.backend.presence
    assert isinstance(presence, MemoryPresence)
    await stage.start()
    await presence.track("a", "ada", "1", {})
    presence.close(["a"], "ada", "1")
    await stage.pass_time(GRACE)
    presence.take("a", watched=False)
    await stage.pass_time(0)
    assert not presence._rosters
    assert not presence._lingering


async def test_a_roster_that_went_before_its_grace_was_over_is_swept_without_an_error() -> None:
    stage = MemoryStage()
    presence = stage.backend.presence
    assert isinstance(presence, MemoryPresence)
    await stage.start()
    await presence.track("a", "ada", "1", {})
    presence.close(["a"], "ada", "1")
    await presence.track("a", "ada", "2", {})  # takes the lingering meta over
    await presence.untrack("a", "ada", "2")
    presence.take("a", watched=False)
    await stage.pass_time(0)
    assert not presence._rosters
    assert not presence._lingering


def kept(broker: MemoryBroker) -> list[str]:
    return list(broker._logs)


async def test_the_log_in_memory_that_was_used_longest_ago_makes_room() -> None:
    broker = MemoryBroker(lambda: 0.0, logs=3)
    places = {name: await broker.position(name, HISTORY) for name in "abc"}
    assert await broker.position("a", HISTORY) == places["a"]
    await broker.position("d", HISTORY)
    assert kept(broker) == ["c", "a", "d"]
    again = await broker.position("b", HISTORY)
    assert again.epoch != places["b"].epoch  # who comes back to it is told that nothing can be proven


async def test_logs_in_memory_that_have_outlived_their_time_are_swept_however_many_there_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(memory_module, "LOOKS", 10)
    now = [0.0]
    broker = MemoryBroker(lambda: now[0])
    for number in range(100):
        await broker.publish(publication(str(number)), HISTORY)
    now[0] = HISTORY.ttl
    for _ in range(10):
        broker.sweep()
    assert not any(log._entries for log in broker._logs.values())
    now[0] = EPOCH_TTL - 1
    await broker.position("0", HISTORY)
    now[0] = EPOCH_TTL * 1.5
    for _ in range(10):
        broker.sweep()
    assert kept(broker) == ["0"]
    now[0] = EPOCH_TTL * 3
    await broker.position("0", HISTORY)  # it is begun anew
    broker.sweep()
    assert kept(broker) == ["0"]
    assert len(broker._hand) == 1


async def test_logs_in_memory_that_make_room_leave_nothing_behind() -> None:
    broker = MemoryBroker(lambda: 0.0, logs=10)
    for number in range(1000):
        await broker.publish(publication(str(number)), HISTORY)
    assert len(broker._logs) == 10
    assert len(broker._hand) <= 30


async def test_a_stop_forgets_what_was_published_in_memory() -> None:
    broker = MemoryBroker(lambda: 0.0)
    delivered: list[Publication] = []
    for _ in range(2):
        await broker.start(delivered.append, lambda: None)
        await broker.publish(publication(id="i", once=True), None)
        assert (await broker.publish(publication(), HISTORY)).position is not None
        await broker.stop()
        assert not broker._logs
        assert not broker._hand
    assert len(delivered) == 4


async def test_without_history_a_repetition_in_memory_is_recognised_as_long_as_it_is_remembered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(memory_module, "REPEATABLE", 10)
    broker = MemoryBroker()
    delivered: list[Publication] = []
    await broker.start(delivered.append, lambda: None)
    for number in (0, 0, *range(1, 20), 0):
        await broker.publish(publication(data=number, id=str(number), once=True), None)
    assert [each.data for each in delivered] == [*range(20), 0]
    for _ in range(2):
        await broker.publish(publication(id="own"), None)  # of the host's own words there is no repetition
    assert len(delivered) == 23


async def test_claims_in_memory_that_have_run_out_are_forgotten_with_the_next_one() -> None:
    now = [0.0]
    ledger = MemoryLedger(wall=lambda: now[0])
    for number in range(100):
        await ledger.claim(str(number), 10)
    await ledger.revoke("user:ada", 5)
    await ledger.revoke("user:ada", 30)
    await ledger.revoke("user:bob", -5)
    now[0] = 20
    await ledger.claim("new", 10)
    assert set(ledger._held) == {"new"}
    assert set(ledger._rules) == {"user:ada"}
    now[0] = 40
    await ledger.claim("gone at once", 0)
    await ledger.claim("and another", 0)
    assert set(ledger._held) == {"and another"}
    assert not ledger._rules
    assert len(ledger._due) == 1


async def test_answers_in_memory_are_bounded_in_number_and_the_oldest_goes() -> None:
    ledger = MemoryLedger(wall=lambda: 0.0, answers=3)
    for number in range(5):
        await ledger.claim(str(number), 10)
        await ledger.settle(str(number), b"x", 10)
    assert [(await ledger.outcome(str(number), 0)).state for number in range(5)] == ["free"] * 2 + ["answered"] * 3


async def test_answers_in_memory_are_bounded_in_bytes_and_what_runs_out_gives_its_room_back() -> None:
    now = [0.0]
    ledger = MemoryLedger(wall=lambda: now[0], size=10)
    await ledger.settle("a", b"1234", 10)
    await ledger.settle("b", b"1234", 20)
    await ledger.settle("c", b"123", 20)
    answers = [(await ledger.outcome(name, 0)) for name in "abc"]
    assert [(each.state, each.answer) for each in answers] == [
        ("answered", b""),  # it happened, and will not happen again
        ("answered", b"1234"),
        ("answered", b"123"),
    ]
    await ledger.settle("huge", b"12345678901", 20)
    assert [(await ledger.outcome(name, 0)).answer for name in ("b", "c", "huge")] == [b""] * 3
    await ledger.settle("d", b"1234567890", 20)
    now[0] = 30
    await ledger.settle("e", b"1234567890", 20)
    assert set(ledger._held) == {"e"}
    assert ledger._room == 0


async def test_times_in_memory_do_not_pile_up() -> None:
    ledger = MemoryLedger(wall=lambda: 0.0, answers=5)
    await ledger.revoke("user:ada", 100)
    for number in range(2000):
        await ledger.claim(str(number), 100)
        await ledger.settle(str(number), b"x", 100)
    assert len(ledger._held) == 5
    assert len(ledger._due) <= 120


async def test_memory_gives_the_four_roles() -> None:
    backend = memory(grace=GRACE, now=lambda: 0.0)
    assert [type(role) for role in backend] == [MemoryBroker, MemoryPresence, MemoryLimits, MemoryLedger]


async def test_a_url_chooses_the_backend_and_an_unknown_one_says_what_to_write() -> None:
    options: dict[str, Any] = {"grace": GRACE, "now": lambda: 0.0, "prefix": "t", "fail_open": True}
    assert isinstance(from_url("memory://", **options).broker, MemoryBroker)
    with pytest.raises(ConfigurationError, match="memory://"):
        from_url("carrier-pigeon://", **options)
    assert isinstance(from_url("redis://localhost", **options).broker, RedisBroker)


async def test_a_backend_that_is_not_installed_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    absent: Any = None
    for name in ("starlette_rt.backends.redis", "redis"):
        monkeypatch.setitem(sys.modules, name, absent)
    with pytest.raises(ConfigurationError, match=r'pip install "starlette-rt\[redis\]"'):
        from_url("redis://localhost", grace=GRACE, now=lambda: 0.0, prefix="t", fail_open=True)
