"""How much one peer may say, and how many may come.

The law of this file: arithmetic on numbers and two dictionaries. Time is an argument, in seconds of one
clock that never steps back (the event loop's); an answer is a fact that the caller counts, logs and
sends. Nothing here waits, reads a clock or knows what a message is. A refusal takes nothing, and what
has refilled is forgotten. The grammar of rates is that of the `limits` library; the bucket is our own,
because that library's async memory storage sweeps all its keys on every hit.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Literal, NamedTuple, get_args

from limits import parse_many

from .exceptions import ConfigurationError

Per = Literal["connection", "user", "ip"]
Unit = Literal["messages", "bytes"]
Bound = Literal["total", "per_ip", "per_user", "rate"]
Tats = tuple[float, ...]  # one theoretical arrival time per rate of a limit

SLACK = 1e-6  # a microsecond is forgiven: what rounding makes of times that should be equal
RETRY_AFTER = 5.0  # nobody knows when a connection slot falls free; seconds


def gcra(tat: float, now: float, interval: float, tolerance: float, cost: float = 1) -> tuple[bool, float, float]:
    """Say whether ``cost`` cells may pass ``now``: ``(allowed, new tat, retry_after)``.

    The generic cell rate algorithm in its virtual scheduling form (ITU-T I.371, annex A; ATM Forum
    Traffic Management 4.0). ``interval`` is the seconds between two cells at the steady rate, ``tat``
    the theoretical arrival time of the next one, ``tolerance`` how far a cell may come before it: a
    rested bucket passes ``tolerance / interval + 1`` cells at once. A refusal leaves ``tat`` as it was
    and tells the seconds to wait, which are ``math.inf`` if ``cost`` is more than the bucket ever holds.
    """
    need, depth = cost * interval, interval + tolerance
    if need > depth + SLACK:
        return False, tat, math.inf
    after = max(tat, now) + need
    wait = after - now - depth
    return (True, after, 0.0) if wait <= SLACK else (False, tat, wait)


def _parse(text: str) -> tuple[tuple[float, float], ...]:
    """Return the (interval, tolerance) of each rate in ``text``."""
    try:
        rates = [(item.amount, item.get_expiry() / item.amount) for item in parse_many(text)]
    except (ValueError, ZeroDivisionError) as error:
        raise ConfigurationError(f'{text!r} is no rate; write "20/second" or "5/second;100/minute"') from error
    return tuple((interval, interval * (amount - 1)) for amount, interval in rates)


@dataclass(frozen=True, slots=True)
class RateLimit:
    """How often something may be done: ``RateLimit("20/second")``, ``RateLimit("5/second;100/minute")``.

    "20/second" lets a rested peer do 20 at once and then one each 50 ms. ``per`` says who shares the
    budget: one connection, all connections of one user, or all of one address. A guest is no user and
    has no limit per user. ``cost`` is what one message (or one byte, with ``unit="bytes"``) takes.
    Raises ConfigurationError for what is no rate, and for a cost that the rate could never pay.
    """

    rate: str
    _: KW_ONLY
    per: Per = "connection"
    cost: int = 1
    unit: Unit = "messages"
    rates: tuple[tuple[float, float], ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        _one_of("per", self.per, get_args(Per))
        _one_of("unit", self.unit, get_args(Unit))
        _positive("cost", self.cost)
        object.__setattr__(self, "rates", _parse(self.rate))
        if quote(None, self, 0.0, self.cost)[0]:
            raise ConfigurationError(f"cost={self.cost} is more than {self.rate!r} ever lets pass; lower the cost")

    def amount(self, size: int) -> int:
        """Return what one message of ``size`` bytes takes. An empty one counts as one byte."""
        return self.cost if self.unit == "messages" else self.cost * max(size, 1)


def _one_of(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigurationError(f"{name}={value!r} is not known; write one of {', '.join(map(repr, choices))}")


def _positive(name: str, value: object) -> None:
    if not isinstance(value, int) or value < 1:
        raise ConfigurationError(f"{name}={value!r} must be a whole number of at least 1")


def quote(tats: Tats | None, limit: RateLimit, now: float, amount: int = 1) -> tuple[float, Tats]:
    """Ask without taking: the seconds to wait (0.0: go on), and the state to keep if it is done.

    ``tats`` is the state kept last time, None for a rested bucket. All rates of ``limit`` must agree.
    """
    if len(limit.rates) == 1:  # as nearly all have: no loop, for it is asked for every message
        interval, tolerance = limit.rates[0]
        _, next_tat, later = gcra(-math.inf if tats is None else tats[0], now, interval, tolerance, amount)
        return later, (next_tat,)
    wait, after = 0.0, []
    for tat, (interval, tolerance) in zip(tats or (-math.inf,) * len(limit.rates), limit.rates, strict=True):
        _, next_tat, later = gcra(tat, now, interval, tolerance, amount)
        after.append(next_tat)
        wait = max(wait, later)
    return wait, tuple(after)


class Buckets:
    """The state of many limits of many peers, one entry per key, rested ones forgotten.

    A key names one subject under one limit. Whoever adds a key looks at two others and drops those that
    have refilled, so that no check ever pays for the number of keys; ``sweep`` does the same for an owner
    with time to spare. At ``max_keys`` a new key takes the place of the one that is soonest full again
    among the four that were looked at longest ago: its owner's debt is forgiven, a newcomer is not locked
    out by others. ``evicted`` counts these. An entry takes about 180 bytes with a short key.
    """

    __slots__ = ("_hand", "_tats", "evicted", "max_keys")

    def __init__(self, max_keys: int = 100_000) -> None:
        _positive("max_keys", max_keys)
        self.max_keys: int = max_keys
        self.evicted: int = 0
        self._tats: dict[str, Tats] = {}
        self._hand: deque[str] = deque()  # every key once, the one looked at longest ago first

    def __len__(self) -> int:
        return len(self._tats)

    def hit(self, key: str, limit: RateLimit, now: float, amount: int = 1) -> float:
        """Take ``amount`` and return 0.0, or take nothing and return the seconds to wait.

        The wait is ``math.inf`` where ``amount`` is more than the limit ever lets pass at once.
        """
        wait, tats = quote(self._tats.get(key), limit, now, amount)
        if not wait:
            self.put(key, tats, now)
        return wait

    def get(self, key: str) -> Tats | None:
        """Return the state kept under ``key``, if it has any."""
        return self._tats.get(key)

    def put(self, key: str, tats: Tats, now: float) -> None:
        """Keep the state that ``quote`` returned."""
        if key not in self._tats:
            self.sweep(now)
            if len(self._tats) >= self.max_keys:
                self._evict()
            self._hand.append(key)
        self._tats[key] = tats

    def sweep(self, now: float, steps: int = 2) -> int:
        """Look at the next ``steps`` keys; return how many had refilled and were dropped."""
        before = len(self._hand)
        for _ in range(min(steps, before)):
            key = self._hand.popleft()
            if max(self._tats[key]) <= now:
                del self._tats[key]
            else:
                self._hand.append(key)
        return before - len(self._hand)

    def _evict(self) -> None:
        looked_at = [self._hand.popleft() for _ in range(min(4, len(self._hand)))]
        soonest = min(looked_at, key=lambda key: max(self._tats[key]))
        looked_at.remove(soonest)
        self._hand.extend(looked_at)
        del self._tats[soonest]
        self.evicted += 1


class Due(NamedTuple):
    """What one message takes from one budget: that of ``subject`` under ``limit`` of ``place``."""

    place: str
    subject: str
    limit: RateLimit
    amount: int

    @property
    def key(self) -> str:
        """The name of the budget."""
        return self.place + self.subject


class Meter:
    """The limits of one place, such as an endpoint class: made once, asked for every message.

    ``name`` keeps the shared budgets of different places apart; the same name and limits in another
    process mean the same budgets.
    """

    __slots__ = ("_places", "per_user", "shared")

    def __init__(self, name: str, limits: Sequence[RateLimit]) -> None:
        self.shared: bool = any(limit.per != "connection" for limit in limits)  # else each connection has its own
        self.per_user: bool = any(limit.per == "user" for limit in limits)  # else nobody need know whose it is
        self._places = [
            (limit, f"{name}:{number}:{limit.per}:", get_args(Per).index(limit.per))
            for number, limit in enumerate(limits)
        ]

    def check(
        self, own: dict[str, Tats], shared: Buckets, user: str | None, ip: str | None, size: int, now: float
    ) -> float:
        """Take one message of ``size`` bytes from every limit and return 0.0, or the longest wait and take nothing.

        ``own`` is the connection's dictionary, empty until the first message under a limit of its own.
        A limit per user or address is passed over where there is none (None). ``math.inf``: never.
        """
        subjects, wait, taken = ("", user, ip), 0.0, []
        if len(self._places) == 1 and not self._places[0][2]:  # one for the connection: what most places have
            limit, key, _ = self._places[0]
            wait, tats = quote(own.get(key), limit, now, limit.amount(size))
            if not wait:
                own[key] = tats
            return wait
        for limit, prefix, which in self._places:
            if (subject := subjects[which]) is None:
                continue
            key = prefix + subject
            later, tats = quote((shared if which else own).get(key), limit, now, limit.amount(size))
            wait = max(wait, later)
            taken.append((which, key, tats))
        if not wait:
            for which, key, tats in taken:
                if which:
                    shared.put(key, tats, now)
                else:
                    own[key] = tats
        return wait

    def dues(self, user: str | None, ip: str | None, size: int) -> list[Due]:
        """Return what one message of ``size`` bytes takes from the budgets that connections share."""
        subjects = ("", user, ip)
        return [
            Due(prefix, subject, limit, limit.amount(size))
            for limit, prefix, which in self._places
            if which and (subject := subjects[which]) is not None
        ]


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """How many connections one process takes: in all, from one address, of one user; and how fast they come.

    ``rate`` is the rate of new connections from one address, "10/second;100/minute". None is no bound. With a backend
    that several processes share, ``per_user`` counts the connections of all of them; the others are for each process.
    Guests are not counted per user, peers without an address not per address.
    Raises ConfigurationError for a bound below 1 and for what is no rate.
    """

    total: int | None = None
    per_ip: int | None = None
    per_user: int | None = None
    rate: str | None = None

    def __post_init__(self) -> None:
        for name in ("total", "per_ip", "per_user"):
            if (bound := getattr(self, name)) is not None:
                _positive(name, bound)
        if self.rate is not None:
            _parse(self.rate)


@dataclass(frozen=True, slots=True)
class Refused:
    """Why a connection may not come in: the bound that is exhausted and the seconds after which to try again."""

    bound: Bound
    retry_after: float


class ConnectionCounter:
    """Counts the connections of this process against their ConnectionLimits, and keeps nothing of those that left."""

    __slots__ = ("_caps", "_counts", "_rate", "_rates", "per_user")

    def __init__(self, limits: ConnectionLimits) -> None:
        self.per_user: int | None = limits.per_user
        caps: dict[Bound, int | None] = {"per_ip": limits.per_ip, "per_user": limits.per_user}
        self._caps: dict[Bound, float] = {bound: cap for bound, cap in caps.items() if cap is not None}
        self._caps["total"] = math.inf if limits.total is None else limits.total
        self._counts: dict[tuple[Bound, str], int] = {}
        self._rate = None if limits.rate is None else RateLimit(limits.rate, per="ip")
        self._rates = Buckets()

    @property
    def connections(self) -> int:
        """How many are in now."""
        return self._counts.get(("total", ""), 0)

    def take(self, ip: str | None, user: str | None, now: float) -> Refused | None:
        """Let one connection in and return None, or take nothing and say what stands against it."""
        slots = self._slots(ip, user)
        for slot in slots:
            if self._counts.get(slot, 0) >= self._caps[slot[0]]:
                return Refused(slot[0], RETRY_AFTER)
        if self._rate and ip is not None and (wait := self._rates.hit(ip, self._rate, now)):
            return Refused("rate", wait)
        for slot in slots:
            self._counts[slot] = self._counts.get(slot, 0) + 1
        return None

    def release(self, ip: str | None, user: str | None) -> None:
        """Give back what ``take`` took for the same address and user. Raises KeyError if it took nothing."""
        for slot in self._slots(ip, user):
            self._counts[slot] -= 1
            if not self._counts[slot]:
                del self._counts[slot]

    def _slots(self, ip: str | None, user: str | None) -> list[tuple[Bound, str]]:
        subjects: dict[Bound, str | None] = {"total": "", "per_ip": ip, "per_user": user}
        return [(bound, subject) for bound in self._caps if (subject := subjects[bound]) is not None]
