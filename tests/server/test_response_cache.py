"""Cached responses: only the same response, to the same caller, and only while it is current."""

from __future__ import annotations

import gc
import tracemalloc
import weakref
from dataclasses import replace

import hypothesis
import pytest
from hypothesis import given
from hypothesis import strategies as st

from guestapi.callers.identify import Caller
from guestapi.http import response
from guestapi.metrics.counters import Durations
from guestapi.model import Instance
from guestapi.server import response_cache
from guestapi.server.exchange import Exchange
from guestapi.server.response_cache import CachedResponse, CallerCache, ResponseCache, SeenRequests
from guestapi.store.errors import StoreError
from guestapi.wsgi import CACHEABLE, CALLER, INSTANCE, Environ
from tests.api.fakes import StandIn, caller, instance
from tests.harness.containers import Container, request
from tests.harness.service import Service
from tests.server.inside import asking, talk

REQUEST = request("/1.0/config/user.foo")


class CachingHost:
    """A stand-in for the store with one instance, number 7, and a response cache."""

    def __init__(self) -> None:
        self.stored: Instance | None = instance({"user.foo": "bar"})
        self.fault: StoreError | None = None
        self.cache = ResponseCache(self.look, 0)

    def look(self, _number: int) -> Instance | None:
        """As `store.reading.Reader.instance`."""
        if self.fault:
            raise self.fault
        return self.stored

    def cache_of(self, who: Caller, dialect: str = "incus") -> CallerCache:
        """Return the cache of a caller."""
        cache = self.cache.of(who, dialect)
        assert cache is not None
        return cache

    def answer(
        self, who: Caller, *, raw: bytes = REQUEST, body: bytes = b"bar", code: int = 200, cacheable: bool = True
    ) -> None:
        """Put a response to the caller into the cache."""
        environ: Environ = {CACHEABLE: cacheable, INSTANCE: self.stored, CALLER: who}
        exchange = Exchange(environ, who, "incus", f"{code} Any", [], len(body), 0.1)
        self.cache.put(self.cache_of(who), raw, exchange, b"HTTP/1.1 200 OK\r\n", b"\r\n" + body)


@pytest.fixture
def host() -> CachingHost:
    """A host with one instance."""
    return CachingHost()


def found(host: CachingHost, who: Caller, raw: bytes = REQUEST, dialect: str = "incus") -> bytes | None:
    """Return the cached response for the caller, or None."""
    assert who.init is not None
    cached = host.cache_of(who, dialect).get(raw, who.init)
    return None if cached is None else cached.to_bytes()


def test_same_request_gets_the_same_response(host: CachingHost) -> None:
    """The same request of the same caller gets the same bytes with a Date; a differing request misses the cache."""
    guest = caller()
    host.answer(guest)
    assert found(host, guest) == b"HTTP/1.1 200 OK\r\n" + response.date_line() + b"\r\nbar"
    assert found(host, guest) == found(host, guest)
    for other in (REQUEST[:-1], REQUEST + b" ", REQUEST.lower(), REQUEST * 2, b""):
        assert found(host, guest, other) is None


def test_date_is_of_now(host: CachingHost, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cached response has the date of the moment at which it is sent."""
    guest = caller()
    host.answer(guest)
    dates = set()
    for second in (1_000_000_000, 1_000_000_000.9, 1_000_000_001):
        monkeypatch.setattr("guestapi.http.response.time.time", lambda at=second: at)
        whole = found(host, guest)
        assert whole is not None
        dates.add(whole)
    assert len(dates) == 2


def test_bytes_are_joined_once_a_second(host: CachingHost, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within a second the same bytes object is sent, because joining the bytes takes time."""
    monkeypatch.setattr("guestapi.http.response.time.time", lambda: 1_000_000_000)
    guest = caller()
    host.answer(guest)
    assert found(host, guest) is found(host, guest)


@pytest.mark.parametrize("what", ["changed", "same again", "removed", "fault", "ended"])
def test_not_reused_after_a_change(host: CachingHost, what: str) -> None:
    """A response is not reused when the store returns another object or fails, or when the init has ended."""
    init = StandIn()
    guest = caller()._replace(init=init)
    host.answer(guest)
    assert host.stored is not None
    before = host.stored
    if what == "changed":
        host.stored = replace(before, revision=2, config={"user.foo": "other"})
    elif what == "same again":
        host.stored = replace(before)
    elif what == "removed":
        host.stored = None
    elif what == "fault":
        host.fault = StoreError("no store")
    else:
        init.living = False
    assert found(host, guest) is None


@pytest.mark.parametrize("what", ["user", "run", "init", "dialect"])
def test_not_reused_for_another_caller(host: CachingHost, what: str) -> None:
    """A response is not reused for another caller whom the gate could treat differently."""
    guest = caller()
    host.answer(guest)
    other = {
        "user": guest._replace(credentials=guest.credentials._replace(uid=1)),
        "run": guest._replace(run=2),
        "init": guest._replace(init=StandIn()),
        "dialect": guest,
    }[what]
    assert found(host, other, dialect="lxd" if what == "dialect" else "incus") is None
    same = guest._replace(credentials=guest.credentials._replace(pid=4711))
    assert found(host, same) is not None


def test_only_cacheable_responses(host: CachingHost) -> None:
    """Responses that depend on more than request and instance are not cached, nor are internal errors."""
    guest = caller()
    host.answer(guest, cacheable=False)
    host.answer(guest, code=500)
    assert found(host, guest) is None
    host.answer(guest, code=404)
    assert found(host, guest) is not None
    assert host.cache.of(caller(instance_id=None), "incus") is None


def test_memory_of_one_caller(host: CachingHost) -> None:
    """The cache of one caller is bounded, whatever it requests."""
    guest = caller()
    for number in range(1000):
        host.answer(guest, raw=request(f"/1.0/config/user.{number}"), body=b"x" * 1000)
        assert host.cache_of(guest).size <= response_cache.CALLER_BYTES
    host.answer(guest, raw=REQUEST, body=b"x" * response_cache.CALLER_BYTES)
    assert found(host, guest) is None


@pytest.mark.parametrize("short", [0, 1])
def test_cache_that_is_just_full(host: CachingHost, monkeypatch: pytest.MonkeyPatch, short: int) -> None:
    """Two responses of exactly the permitted bytes are kept; with one byte less, the second one displaces the first."""
    guest, first, second = caller(), request("/1.0/config/user.a"), request("/1.0/config/user.b")
    host.answer(guest, raw=first)
    monkeypatch.setattr(response_cache, "CALLER_BYTES", 2 * host.cache.size - short)
    host.answer(guest, raw=second)
    assert found(host, guest, second) is not None
    assert (found(host, guest, first) is not None) == (short == 0)


def test_responses_that_are_not_logged(host: CachingHost) -> None:
    """A response that is not logged takes less memory, and its bytes are the same."""
    guest = caller()
    quiet = CachingHost()
    quiet.stored = host.stored
    quiet.cache = ResponseCache(quiet.look, logged_from=400)
    for one in (host, quiet):
        one.answer(guest)
        one.answer(guest, raw=request("/1.0/config/bad"), code=399)
        one.answer(guest, raw=request("/1.0/config/none"), code=400)
    assert found(quiet, guest) == found(host, guest)
    assert guest.init is not None
    raws = (REQUEST, request("/1.0/config/bad"), request("/1.0/config/none"))
    ours = [quiet.cache_of(guest).get(raw, guest.init) for raw in raws]
    assert [one is not None and one.exchange is not None for one in ours] == [False, False, True]
    assert quiet.cache_of(guest).size < host.cache_of(guest).size * 2 / 3


def test_memory_of_all_callers(host: CachingHost, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache has a size limit, beyond which the least recently extended cache of a caller is dropped."""
    guests = [caller(uid=uid) for uid in range(100)]
    host.answer(guests[0])
    each = host.cache.size
    monkeypatch.setattr(response_cache, "CACHE_BYTES", 20 * each)
    for guest in guests[1:20]:
        host.answer(guest)
    assert all(found(host, guest) for guest in guests[:20])
    # Another response to the first caller renews its cache; the new caller's response evicts the oldest one.
    host.answer(guests[0], raw=REQUEST)
    host.answer(guests[20])
    assert [number for number, guest in enumerate(guests) if found(host, guest)] == [0, *range(2, 21)]
    assert host.cache.size == 20 * each
    for guest in guests[21:]:
        host.answer(guest)
    assert [number for number, guest in enumerate(guests) if found(host, guest)] == [*range(80, 100)]


def test_one_guest_does_not_evict_the_cache_of_another(host: CachingHost) -> None:
    """However many responses a guest requests, the cached responses of another one stay."""
    modest, greedy = caller(uid=1), caller(uid=2)
    host.answer(modest)
    for number in range(1 + response_cache.CACHE_BYTES // 1000):
        host.answer(greedy, raw=request(f"/1.0/config/user.{number}"), body=b"x" * 1000)
    assert found(host, modest) is not None
    assert host.cache.size <= host.cache_of(modest).size + response_cache.CALLER_BYTES


def test_documented_size_limits(host: CachingHost) -> None:
    """The limits are 8 MiB in all and 128 KiB for one caller, as security.md states."""
    mib, kib = 1 << 20, 1 << 10
    for uid in range(4000):
        host.answer(caller(uid=uid))
        assert host.cache.size <= 8 * mib
    assert 8 * mib - 4 * kib < host.cache.size
    guest = caller(uid=5000)
    for number in range(60):
        host.answer(guest, raw=request(f"/{number}"), body=b"x" * 500)
        assert host.cache_of(guest).size <= 128 * kib
    # For a lone caller, the largest body that fits is cached, and one with a byte more is not. Each byte counts twice.
    small = CachingHost()
    small.answer(caller())
    most = len(b"bar") + (128 * kib - small.cache.size) // 2
    for size, kept in ((most, True), (most + 1, False)):
        alone = CachingHost()
        guest = caller()
        alone.answer(guest, body=b"x" * size)
        assert (found(alone, guest) is not None) == kept


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set small limits, for all callers and for each."""
    monkeypatch.setattr(response_cache, "CACHE_BYTES", 30_000)
    monkeypatch.setattr(response_cache, "CALLER_BYTES", 10_000)


@hypothesis.settings(
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture, hypothesis.HealthCheck.too_slow]
)
@given(
    st.lists(
        st.tuples(st.integers(0, 5), st.integers(0, 8), st.integers(0, 6000), st.sampled_from("aaaaaarc")), max_size=60
    )
)
@pytest.mark.usefixtures("small")
def test_size_is_the_sum_of_all_caches(steps: list[tuple[int, int, int, str]]) -> None:
    """After any sequence of responses, restarts and changes, the total is the sum of all caches and limited."""
    host = CachingHost()
    guests = [caller(uid=uid) for uid in range(6)]
    for who, path, size, what in steps:
        if what == "r":
            guests[who] = guests[who]._replace(run=guests[who].run + 1)
        elif what == "c":
            assert host.stored is not None
            host.stored = replace(host.stored, revision=host.stored.revision + 1)
        host.answer(guests[who], raw=request(f"/{path}"), body=b"x" * size)
        sizes = [host.cache_of(guest).size for guest in guests]
        assert max(sizes) <= response_cache.CALLER_BYTES
        assert sum(sizes) == host.cache.size <= response_cache.CACHE_BYTES


def test_nothing_is_kept_alive(host: CachingHost) -> None:
    """The cache keeps neither an instance nor an init alive."""
    guest = caller()
    host.answer(guest)
    assert host.stored is not None
    old = weakref.ref(host.stored), weakref.ref(guest.init)
    host.stored = None
    del guest
    gc.collect()
    assert [reference() for reference in old] == [None, None]


@pytest.mark.root
def test_cached_request_sees_every_change(service: Service, c1: Container) -> None:
    """On a connection that repeats a request, each response shows the last commit."""
    try:
        with talk(c1) as guest:
            for number in range(20):
                service.configure("c1", user_number=str(number))
                for _time in range(3):
                    assert guest.ask("/1.0/config/user.number").text == str(number)
                service.configure("c1", user_number="", security_guestapi="false" if number % 2 else "")
                for _time in range(2):
                    assert guest.ask("/1.0/config/user.number").status == (403 if number % 2 else 404)
                service.configure("c1", security_guestapi="")
    finally:
        service.configure("c1", user_number="", security_guestapi="")


@pytest.mark.root
@pytest.mark.parametrize(
    "path", ["/", "/1.0", "/1.0/config", "/1.0/config/user.foo", "/1.0/config/x", "/1.0/meta-data"]
)
@pytest.mark.parametrize("line", ["Accept: */*", "Connection: close", "X_Any: 1"])
@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS"])
def test_cached_response_is_the_same(c1: Container, path: str, line: str, method: str) -> None:
    """A repeated request gets the same head and body, on the same connection or another one."""
    answers = []
    for _connection in range(2):
        with talk(c1) as guest:
            for _time in range(1 if "close" in line else 3):
                guest.send(asking(path, line, method=method))
                (answer,) = guest.receive(1, method)
                answers.append((answer.status, {**answer.headers, "date": ""}, answer.body))
    assert answers == answers[:1] * len(answers)


def test_requests_are_kept_from_the_second_on() -> None:
    """A request counts as seen once it came before; so many others make room for new ones."""
    seen = SeenRequests()
    assert [seen.add(REQUEST) for _time in range(3)] == [False, True, True]
    new = sum(not seen.add(b"GET /%d" % number) for number in range(10_000))
    # By chance, some share a bit with another.
    assert new > 9000


def test_seen_requests_outlive_a_connection(host: CachingHost) -> None:
    """A caller whose requests were never cached has seen them all the same when it connects again."""
    assert not host.cache_of(caller()).seen.add(REQUEST)
    assert host.cache_of(caller()).seen.add(REQUEST)
    assert not host.cache_of(caller()._replace(credentials=caller().credentials._replace(uid=1))).seen.add(REQUEST)


def test_callers_that_are_remembered_are_bounded(host: CachingHost) -> None:
    """Of more than 4,096 callers, those that came first are forgotten."""
    for uid in range(4097):
        host.cache_of(caller(uid=uid)).seen.add(REQUEST)
    assert host.cache_of(caller(uid=1)).seen.add(REQUEST)
    assert not host.cache_of(caller(uid=0)).seen.add(REQUEST)


def test_estimated_size_of_a_response(host: CachingHost) -> None:
    """A response takes its bytes twice, its request, and what Python keeps beside them, more if it is logged."""
    assert CachedResponse(None, b"x" * 10, b"y" * 100, b"z" * 1000, Durations()).size == 512 + 2 * 110 + 1000
    host.answer(caller(), raw=b"", body=b"")
    assert host.cache.size == 512 + 2560 + 2 * len(b"HTTP/1.1 200 OK\r\n\r\n")


def test_just_identified_caller_needs_no_second_look() -> None:
    """Where the look that identified the caller saw the same instance, the store is not asked again; else it is."""
    host = CachingHost()
    seen: list[Instance | None] = []
    host.cache = ResponseCache(host.look, 0, lambda _number: seen.pop())
    guest = caller()
    assert guest.init is not None
    host.answer(guest)
    cache = host.cache_of(guest)
    seen.append(host.stored)
    host.fault = StoreError("the store was asked")
    assert cache.get(REQUEST, guest.init, just_identified=True) is not None
    assert cache.get(REQUEST, guest.init) is None, "without that look the store is asked"
    host.fault = None
    for other in (None, instance({"user.foo": "bar"})):
        seen.append(other)
        assert cache.get(REQUEST, guest.init, just_identified=True) is not None, "the store has it unchanged"
        host.stored, before = instance({"user.foo": "new"}), host.stored
        seen.append(other)
        assert cache.get(REQUEST, guest.init, just_identified=True) is None
        host.stored = before
    assert seen == []


def test_hits_of_removed_responses_are_counted(host: CachingHost) -> None:
    """How often a response was sent again is taken once, also of one that was removed before."""
    guest = caller()
    host.answer(guest)
    assert guest.init is not None
    cache = host.cache_of(guest)
    cached = cache.get(REQUEST, guest.init)
    assert cached is not None
    cached.hits = 3
    assert host.cache.take_hits() == [(7, cached.durations, 3)]
    assert host.cache.take_hits() == []
    cached.hits = 2
    cache.clear()
    assert host.cache.take_hits() == [(7, cached.durations, 2)]
    assert host.cache.take_hits() == []


def test_cache_of_an_earlier_run(host: CachingHost) -> None:
    """When a caller of another run gets a cache, that of the run before is emptied, and its hits are counted."""
    guest = caller()
    host.answer(guest)
    assert guest.init is not None
    old = host.cache_of(guest)
    cached = old.get(REQUEST, guest.init)
    assert cached is not None
    cached.hits = 3
    host.answer(guest._replace(run=guest.run + 1))
    assert host.cache.take_hits() == [(7, cached.durations, 3)]
    assert (old.size, old.get(REQUEST, guest.init)) == (0, None)


def test_uncached_request_does_not_ask_the_store() -> None:
    """A request without a cached response costs no look at the store, which the application will do."""
    guest, looks = caller(), list[int]()
    assert guest.init is not None

    def look(number: int) -> Instance | None:
        looks.append(number)
        return None

    held = instance()
    cache = CallerCache((7, 0, "incus"), guest, look, look, [], SeenRequests())
    cache.put(REQUEST, held, CachedResponse(None, b"", b"", REQUEST, Durations()))
    assert cache.get(REQUEST + b" ", guest.init) is None
    assert looks == []
    assert cache.get(REQUEST, guest.init) is None
    assert looks == [7]


def test_hits_of_a_cache_that_is_dropped(host: CachingHost, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hits in a cache that is dropped because all caches are too large are counted all the same."""
    guest, other = caller(uid=1), caller(uid=2)
    host.answer(guest)
    assert guest.init is not None
    cached = host.cache_of(guest).get(REQUEST, guest.init)
    assert cached is not None
    cached.hits = 3
    monkeypatch.setattr(response_cache, "CACHE_BYTES", host.cache.size)
    host.answer(other)
    assert found(host, guest) is None
    assert found(host, other) is not None
    assert host.cache.take_hits() == [(7, cached.durations, 3)]


def test_seen_requests_are_forgotten_after_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """128 requests are remembered; the next one makes all others be forgotten, again and again."""
    monkeypatch.setattr(response_cache, "hash", int, raising=False)
    seen = SeenRequests()
    for first in (0, 128, 256):
        requests = [b"%d" % number for number in range(first, first + 128)]
        assert [seen.add(one) for one in requests] == [False] * 128
        assert [seen.add(one) for one in requests] == [True] * 128
    assert not seen.add(b"0")


def test_memory_of_seen_requests() -> None:
    """What is remembered of a caller's requests takes the same few bytes, however many they are."""
    requests = [b"GET /%d" % number for number in range(300)]
    tracemalloc.start()
    try:
        before, _peak = tracemalloc.get_traced_memory()
        callers = [SeenRequests() for _number in range(20)]
        for seen in callers:
            for one in requests:
                seen.add(one)
        taken = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert taken < 20 * 400
