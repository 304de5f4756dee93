"""Responses that are sent again for the same request of the same caller, while nothing they depend on has changed.

A workload asks for the same key again and again. Parsing, routing and encoding would produce the very same bytes, so
the bytes are kept. A cached response is never stale, because:

- Only responses that the application marks as `CACHEABLE` are cached. They depend on the request and on one `Instance`
  alone, which is frozen. Of what the server adds, only the date changes, and it is written anew.
- The request is compared as it was received, byte by byte.
- What the gate decides is decided again or cannot have changed. The store must return the very same instance object, so
  its revision and run are the same (`store.reading` proves at each call that it is current). The init must be alive.
  For the first request of a connection the look that has identified its caller an instant ago stands for both.
  Init, run, user and dialect are those of the callers that a cache serves.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from weakref import ref

from guestapi.callers.identify import Caller, LiveInit
from guestapi.http.response import date_line
from guestapi.metrics.counters import Durations
from guestapi.model import Instance
from guestapi.server.exchange import Exchange
from guestapi.store.errors import StoreError
from guestapi.wsgi import CACHEABLE

#: The most bytes of a worker's caches together.
CACHE_BYTES = 8 * 1024 * 1024
#: The most bytes of one caller's cache, so that no instance can displace all others.
CALLER_BYTES = 128 * 1024
#: About how many bytes an entry takes besides response and request.
_OVERHEAD = 512
#: About how many bytes more it takes if its exchange is kept for the log, with its environ.
_EXCHANGE_OVERHEAD = 2560

#: How many bits remember which requests a caller has made, and after how many requests all are forgotten.
_SEEN_BITS = 1024
_MOST_SEEN = 128
#: Of how many callers requests are remembered.
_SEEN_CALLERS = 4096

#: Instance, user, dialect.
CallerKey = tuple[int, int, str]
#: An instance, where its responses are counted, and how many of them were sent again.
Hits = tuple[int, Durations, int]


class CachedResponse:
    """A response that may be sent again.

    Attributes:
        exchange: what is logged when it is sent again; None if nothing is.
        durations: where it is counted when it is sent again.
        hits: how often it was sent again since `ResponseCache.take_hits`.
        size: about how many bytes of memory it takes.
    """

    __slots__ = ("_after", "_before", "_bytes", "_date", "durations", "exchange", "hits", "size")

    def __init__(
        self, exchange: Exchange | None, before: bytes, after: bytes, request: bytes, durations: Durations
    ) -> None:
        """Keep a response.

        Args:
            exchange: to log when it is sent again; None for nothing.
            before: its bytes before the Date field.
            after: its bytes after the Date field.
            request: the request that it answers.
            durations: where it is counted when it is sent again.
        """
        self.exchange = exchange
        self.durations = durations
        self.hits = 0
        self._before = before
        self._after = after
        self._date = self._bytes = b""
        self.size = _OVERHEAD + 2 * (len(before) + len(after)) + len(request)
        if exchange is not None:
            self.size += _EXCHANGE_OVERHEAD

    def to_bytes(self) -> bytes:
        """Return all its bytes with the present date."""
        date = date_line()
        if date is not self._date:
            self._date = date
            self._bytes = b"".join((self._before, date, self._after))
        return self._bytes


class SeenRequests:
    """Which requests a caller has made lately, about.

    A response is cached when its request comes a second time: keeping one that is not sent again takes a tenth of the
    time of the whole request, and drives out others.
    """

    __slots__ = ("_bits", "_count")

    def __init__(self) -> None:
        self._bits = bytearray(_SEEN_BITS // 8)
        self._count = 0

    def add(self, request: bytes) -> bool:
        """Note a request; tell whether it was noted before. Rarely, that is taken for true of one that was not."""
        number = hash(request) % _SEEN_BITS
        place, bit = number >> 3, 1 << (number & 7)
        if self._bits[place] & bit:
            return True
        self._count += 1
        if self._count > _MOST_SEEN:
            self._bits = bytearray(_SEEN_BITS // 8)
            self._count = 1
        self._bits[place] |= bit
        return False


class CallerCache:
    """The responses for callers with the same instance, user and dialect, identified by the same init in one run.

    Attributes:
        key: instance, user and dialect.
        seen: requests of these callers.
        size: about how many bytes of memory it takes.
    """

    __slots__ = (
        "_get_instance",
        "_get_seen",
        "_hits",
        "_init",
        "_instance",
        "_responses",
        "_run",
        "key",
        "seen",
        "size",
    )

    def __init__(
        self,
        key: CallerKey,
        caller: Caller,
        get_instance: Callable[[int], Instance | None],
        get_seen: Callable[[int], Instance | None],
        hits: list[Hits],
        seen: SeenRequests,
    ) -> None:
        assert caller.init is not None
        self.key = key
        self.seen = seen
        self.size = 0
        #: Of the responses that were removed, for `ResponseCache.take_hits`.
        self._hits = hits
        self._run = caller.run
        self._get_instance = get_instance
        self._get_seen = get_seen
        self._responses: dict[bytes, CachedResponse] = {}
        # Weak references: an unused cache must keep neither the init, which has a descriptor, nor a large instance.
        self._init = ref(caller.init)
        self._instance: Callable[[], Instance | None] = _no_instance

    @property
    def instance(self) -> Instance | None:
        """The instance that the responses describe, as long as something else keeps it in memory."""
        return self._instance()

    def serves(self, caller: Caller) -> bool:
        """Tell whether the gate treats this caller as those whose responses are cached here."""
        return self._init() is caller.init and self._run == caller.run

    def get(self, request: bytes, init: LiveInit, *, just_identified: bool = False) -> CachedResponse | None:
        """Return the response to a request, if there is one that holds now.

        Args:
            request: all bytes of the request.
            init: of a caller that this cache `serves`.
            just_identified: whether the caller was identified after the request had come, and nothing has happened in
                this process since then.
        """
        response = self._responses.get(request)
        if response is None:
            return None
        # Does it describe the instance as it is now?
        instance = self._instance()
        if just_identified and instance is not None and self._get_seen(self.key[0]) is instance:
            return response
        try:
            holds = instance is not None and self._get_instance(self.key[0]) is instance and init.alive()
        except StoreError:
            # The application will report it.
            return None
        return response if holds else None

    def put(self, request: bytes, instance: Instance, response: CachedResponse) -> None:
        """Cache a response that describes `instance`."""
        if self._instance() is not instance:
            self.clear()
            self._instance = ref(instance)
        if self.size + response.size > CALLER_BYTES:
            self.clear()
        if response.size <= CALLER_BYTES and request not in self._responses:
            self._responses[request] = response
            self.size += response.size

    def take_hits(self) -> list[Hits]:
        """What was sent again since the last call."""
        found = []
        for response in self._responses.values():
            if response.hits:
                found.append((self.key[0], response.durations, response.hits))
                response.hits = 0
        return found

    def clear(self) -> None:
        """Remove all responses."""
        self._hits += self.take_hits()
        self._responses.clear()
        self.size = 0


class ResponseCache:
    """The caches of all callers of a worker.

    Attributes:
        size: about how many bytes of memory they take.
    """

    def __init__(
        self,
        get_instance: Callable[[int], Instance | None],
        logged_from: int,
        get_seen: Callable[[int], Instance | None] | None = None,
    ) -> None:
        """Begin empty.

        Args:
            get_instance: returns what the store has under an instance's id now: the same object while nothing changes.
            logged_from: the smallest status of a response that is logged when it is sent again.
            get_seen: as `get_instance`, as of the last identification of a caller; None if nothing knows that.
        """
        self._get_instance = get_instance
        self._get_seen = get_seen or get_instance
        self._logged_from = logged_from
        self._hits: list[Hits] = []
        self._caches: OrderedDict[CallerKey, CallerCache] = OrderedDict()
        self._seen: OrderedDict[CallerKey, SeenRequests] = OrderedDict()
        self.size = 0

    def of(self, caller: Caller, dialect: str) -> CallerCache | None:
        """Return the cache for a caller; None for one in no registered instance."""
        if caller.instance_id is None or caller.init is None:
            return None
        key = (caller.instance_id, caller.credentials.uid, dialect)
        cache = self._caches.get(key)
        return cache if cache is not None and cache.serves(caller) else self._new(key, caller)

    def _new(self, key: CallerKey, caller: Caller) -> CallerCache:
        seen = self._seen.get(key)
        if seen is None:
            seen = self._seen[key] = SeenRequests()
            if len(self._seen) > _SEEN_CALLERS:
                self._seen.popitem(last=False)
        return CallerCache(key, caller, self._get_instance, self._get_seen, self._hits, seen)

    def put(self, cache: CallerCache, request: bytes, exchange: Exchange, before: bytes, after: bytes) -> None:
        """Cache a response that was just sent, if the application allows it.

        Args:
            cache: of its caller.
            request: all bytes of the request.
            exchange: the exchange.
            before: bytes of the response before the Date field.
            after: bytes of the response after the Date field.
        """
        if not exchange.environ.get(CACHEABLE) or exchange.instance is None or exchange.code >= 500:
            return
        other = self._caches.pop(cache.key, None)
        if other is not None:
            self.size -= other.size
            if other is not cache:
                other.clear()
        # PERF: logging takes a tenth of the time that it takes to send a cached response.
        logged = exchange if exchange.code >= self._logged_from else None
        durations = exchange.durations or Durations()
        cache.put(request, exchange.instance, CachedResponse(logged, before, after, request, durations))
        exchange.detach()
        self._caches[cache.key] = cache
        self.size += cache.size
        while self.size > CACHE_BYTES:
            _key, oldest = self._caches.popitem(last=False)
            self.size -= oldest.size
            oldest.clear()

    def take_hits(self) -> list[Hits]:
        """What was sent again since the last call."""
        found = list(self._hits)
        self._hits.clear()
        for cache in self._caches.values():
            found += cache.take_hits()
        return found


def _no_instance() -> None:
    """Stand in for the reference while there is no instance."""
