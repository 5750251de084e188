"""What every backend guarantees, asked of each; and what the one in memory promises beyond that."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from starlette_rt import ConfigurationError, RateLimit
from starlette_rt.backends import from_url
from starlette_rt.backends.base import Backend, Publication, Published
from starlette_rt.backends.memory import MemoryBroker, MemoryLedger, MemoryLimits, MemoryPresence, memory
from starlette_rt.presence import Diff

pytestmark = [pytest.mark.unit, pytest.mark.anyio]

GRACE = 10.0


class Stage:
    """One backend under test, what it reports, and a way to let time pass for it."""

    backend: Backend

    def __init__(self) -> None:
        self.delivered: list[Publication] = []
        self.changed: list[str] = []

    async def start(self) -> None:
        await self.backend.broker.start(self.delivered.append)
        await self.backend.presence.start(self.changed.append)

    async def stop(self) -> None:
        await self.backend.presence.stop()
        await self.backend.broker.stop()

    async def pass_time(self, seconds: float) -> None:
        raise NotImplementedError


class MemoryStage(Stage):
    """Memory with a clock of the test's."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0
        clock: Callable[[], float] = lambda: self.now  # noqa: E731
        self.backend = Backend(
            MemoryBroker(), MemoryPresence(GRACE, clock), MemoryLimits(clock), MemoryLedger(wall=clock)
        )

    async def pass_time(self, seconds: float) -> None:
        self.now += seconds
        self.backend.presence.sweep()


@pytest.fixture(params=[MemoryStage], ids=["memory"])
def stage(request: pytest.FixtureRequest) -> Stage:
    made: Stage = request.param()
    return made


def publication(group: str = "a", data: Any = 1) -> Publication:
    return Publication(group, "message", data, b"1", exclude="x", ephemeral=True, key="k")


# Broker


async def test_a_publication_arrives_whole_and_is_shared(stage: Stage) -> None:
    await stage.start()
    assert await stage.backend.broker.publish(publication()) == Published(None, "yes")
    assert stage.delivered == [publication()]
    await stage.stop()


async def test_publications_arrive_in_the_order_of_the_calls(stage: Stage) -> None:
    await stage.start()
    for number in range(20):
        await stage.backend.broker.publish(publication("ab"[number % 2], number))
    assert [each.data for each in stage.delivered] == list(range(20))
    await stage.stop()


async def test_nothing_arrives_before_the_start_or_after_the_stop(stage: Stage) -> None:
    await stage.backend.broker.publish(publication())
    await stage.start()
    await stage.stop()
    await stage.backend.broker.publish(publication())
    assert stage.delivered == []
    await stage.start()
    await stage.backend.broker.publish(publication())
    assert len(stage.delivered) == 1
    await stage.stop()


# Presence


def refs(metas: Any) -> list[Any]:
    return [{name: value for name, value in meta.items() if name != "ref"} for meta in metas]


async def shown(stage: Stage, group: str = "a") -> dict[str, list[Any]]:
    return {key: refs(member.metas) for key, member in (await stage.backend.presence.members(group)).items()}


def told(diff: Diff | None) -> tuple[list[str], list[str]]:
    assert diff is not None
    return sorted(diff.joins), sorted(diff.leaves)


async def test_who_is_tracked_is_shown_at_once_and_reported(stage: Stage) -> None:
    await stage.start()
    await stage.backend.presence.track("a", "ada", "1", {"name": "Ada"})
    assert await shown(stage) == {"ada": [{"name": "Ada"}]}
    assert stage.changed == ["a"]
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
    await stage.start()
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
    await stage.start()
    await stage.backend.presence.track("a", "ada", "1", {})
    stage.backend.presence.take("a", watched=True)
    await stage.backend.presence.untrack("a", "ada", "1")
    assert await shown(stage) == {}
    assert told(stage.backend.presence.take("a", watched=True)) == ([], ["ada"])
    assert stage.changed == ["a", "a"]
    await stage.stop()


async def test_who_closes_lingers_for_the_grace(stage: Stage) -> None:
    await stage.start()
    await stage.backend.presence.track("a", "ada", "1", {})
    await stage.backend.presence.track("b", "ada", "1", {})
    stage.backend.presence.close(["a", "b"], "ada", "1")
    await stage.pass_time(GRACE * 0.9)
    assert await shown(stage) == await shown(stage, "b") == {"ada": [{}]}
    stage.changed.clear()
    await stage.pass_time(GRACE * 0.2)
    assert await shown(stage) == await shown(stage, "b") == {}
    assert sorted(stage.changed) == ["a", "b"]
    await stage.stop()


async def test_who_comes_back_within_the_grace_was_never_away(stage: Stage) -> None:
    await stage.start()
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


async def test_an_empty_group_is_forgotten_unless_it_is_watched(stage: Stage) -> None:
    await stage.start()
    presence = stage.backend.presence
    await presence.track("a", "ada", "1", {})
    presence.take("a", watched=True)
    await presence.untrack("a", "ada", "1")
    diff = presence.take("a", watched=True)
    assert diff is not None
    assert presence.known("a").version == diff.version == 2  # the watchers count on
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


async def test_a_budget_is_taken_and_says_when_to_come_again(stage: Stage) -> None:
    limit = RateLimit("2/second")
    hit = stage.backend.limits.hit
    assert [await hit("k", limit), await hit("k", limit)] == [0.0, 0.0]
    assert 0 < await hit("k", limit) <= 0.5
    assert await hit("other", limit, 2) == 0.0
    assert await hit("other", limit) > 0
    await stage.pass_time(0.6)
    assert await hit("k", limit) == 0.0


# Ledger


async def test_a_key_is_claimed_once_until_its_time_is_over(stage: Stage) -> None:
    claim = stage.backend.ledger.claim
    assert await claim("k", 10)
    assert not await claim("k", 10)
    assert await claim("other", 10)
    await stage.pass_time(11)
    assert await claim("k", 10)


async def test_a_revocation_holds_until_its_time_and_is_never_shortened(stage: Stage) -> None:
    ledger, start = stage.backend.ledger, 1000.0
    assert not await ledger.revoked(["user:ada"])
    await ledger.revoke("user:ada", start + 20)
    await ledger.revoke("user:ada", start + 10)
    await stage.pass_time(15)
    assert await ledger.revoked(["token:1", "user:ada"])
    assert not await ledger.revoked(["token:1"])
    await stage.pass_time(6)
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


async def test_claims_in_memory_that_have_run_out_are_forgotten_with_the_next_one() -> None:
    now = [0.0]
    ledger = MemoryLedger(wall=lambda: now[0])
    for number in range(100):
        await ledger.claim(str(number), 10)
    await ledger.revoke("user:ada", 5)
    await ledger.revoke("user:ada", 30)
    now[0] = 20
    await ledger.claim("new", 10)
    assert set(ledger._until) == {"user:ada", "new"}
    now[0] = 40
    await ledger.claim("gone at once", 0)
    assert not ledger._until
    assert not ledger._order


async def test_memory_gives_the_four_roles() -> None:
    backend = memory(grace=GRACE, now=lambda: 0.0)
    assert [type(role) for role in backend] == [MemoryBroker, MemoryPresence, MemoryLimits, MemoryLedger]


async def test_a_url_chooses_the_backend_and_an_unknown_one_says_what_to_write() -> None:
    assert isinstance(from_url("memory://", grace=GRACE, now=lambda: 0.0).broker, MemoryBroker)
    with pytest.raises(ConfigurationError, match="memory://"):
        from_url("carrier-pigeon://", grace=GRACE, now=lambda: 0.0)
