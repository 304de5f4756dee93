"""Answers that are given again: to the same bytes from the same place, while nothing that they are made of has changed.

Most requests have been made before: a workload asks for the same key again and again. To parse, route and encode once
more would come to the very same bytes, so the bytes are kept. Why none of them can be stale:

- Kept are only answers that the application marks as `CACHEABLE`: they depend on the request and on one `Instance`
  alone, which is frozen. On what else the server lets them depend, the date, is written anew.
- The request is compared as it was received, every byte of it.
- Everything that the gate asks is asked again or cannot have changed: what the store says of the instance now must be
  the very same object, so of the same revision and run (`store.reading` proves that to be current at each look); its
  init must be alive; init, run, user and dialect are those of the callers whom the shelf serves.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from weakref import ref

from guestapi.callers.identify import Caller, LiveInit
from guestapi.http.response import date_line
from guestapi.model import Instance
from guestapi.server.answer import Answer
from guestapi.store.errors import StoreError
from guestapi.wsgi import CACHEABLE

#: Bytes that are kept at the most, of the worker and of one shelf, so that no instance can push all others out.
KEPT_BYTES, SHELF_BYTES = 8 * 1024 * 1024, 128 * 1024
#: About how many bytes an answer takes besides its own and those of its request, and how many if it is accounted for:
#: then its environ is kept.
_OVERHEAD, _ACCOUNT = 512, 2560

#: Instance, user, dialect.
Place = tuple[int, int, str]


class Repeat:
    """An answer that may be given again.

    Attributes:
        answer: what is logged of it; None if nobody wants to know.
        size: about how many bytes of memory it takes.
    """

    __slots__ = ("_after", "_before", "_date", "_whole", "answer", "size")

    def __init__(self, answer: Answer | None, before: bytes, after: bytes, request: bytes) -> None:
        """Args:
        answer: as it was given; None if nobody wants to know when it is given again.
        before, after: its bytes around the Date field.
        request: what it answers.
        """
        self.answer = answer
        self._before = before
        self._after = after
        self._date = self._whole = b""
        self.size = _OVERHEAD + 2 * (len(before) + len(after)) + len(request)
        if answer is not None:
            self.size += _ACCOUNT

    def whole(self) -> bytes:
        """All its bytes, as of now."""
        date = date_line()
        if date is not self._date:
            self._date = date
            self._whole = b"".join((self._before, date, self._after))
        return self._whole


class Shelf:
    """The answers for callers of one place, recognised by the same init in the same run.

    Attributes:
        size: about how many bytes of memory it takes.
    """

    __slots__ = ("_answers", "_init", "_instance", "_look", "_number", "_run", "place", "size")

    def __init__(self, place: Place, caller: Caller, look: Callable[[int], Instance | None]) -> None:
        assert caller.init is not None
        self.place = place
        self.size = 0
        self._number = place[0]
        self._run = caller.run
        self._look = look
        self._answers: dict[bytes, Repeat] = {}
        # Neither is to be kept by answers that may never be asked for again: it has a descriptor, this may be large.
        self._init = ref(caller.init)
        self._instance: Callable[[], Instance | None] = _nothing

    def serves(self, caller: Caller) -> bool:
        """Whether the gate makes no difference between this caller and those whose answers are here."""
        return self._init() is caller.init and self._run == caller.run

    def find(self, request: bytes, init: LiveInit) -> Repeat | None:
        """The answer to these bytes, if there is one that holds now; `init` is that of a caller whom this `serves`."""
        repeat = self._answers.get(request)
        if repeat is None:
            return None
        instance = self._instance()
        try:
            if instance is None or self._look(self._number) is not instance or not init.alive():
                return None
        except StoreError:
            # Whoever answers in earnest will say so.
            return None
        return repeat

    @property
    def instance(self) -> Instance | None:
        """Of whom the answers are made, as long as somebody else keeps it."""
        return self._instance()

    def put(self, request: bytes, instance: Instance, repeat: Repeat) -> None:
        """Keep an answer that was made of `instance`."""
        if self._instance() is not instance:
            self.empty()
            self._instance = ref(instance)
        if self.size + repeat.size > SHELF_BYTES:
            self.empty()
        if repeat.size <= SHELF_BYTES and request not in self._answers:
            self._answers[request] = repeat
            self.size += repeat.size

    def empty(self) -> None:
        """Keep nothing."""
        self._answers.clear()
        self.size = 0


class Repeats:
    """All shelves of a worker."""

    def __init__(self, look: Callable[[int], Instance | None], account_from: int = 0) -> None:
        """Args:
        look: what the store holds under an instance's id now: the same object as long as nothing has changed.
        account_from: the smallest status of those answers of which somebody wants to know when they are given again.
        """
        self._look = look
        self._account_from = account_from
        self._shelves: OrderedDict[Place, Shelf] = OrderedDict()
        self._size = 0

    def shelf(self, caller: Caller, dialect: str) -> Shelf | None:
        """Where answers for this caller are; None for one that is in no instance."""
        if caller.instance_id is None or caller.init is None:
            return None
        place = (caller.instance_id, caller.credentials.uid, dialect)
        shelf = self._shelves.get(place)
        return shelf if shelf is not None and shelf.serves(caller) else Shelf(place, caller, self._look)

    def keep(self, shelf: Shelf, request: bytes, answer: Answer, before: bytes, after: bytes) -> None:
        """Note an answer that was just given, if it will last; arguments as of `Repeat`."""
        if not answer.environ.get(CACHEABLE) or answer.instance is None or answer.code >= 500:
            return
        other = self._shelves.pop(shelf.place, None)
        if other is not None:
            self._size -= other.size
            if other is not shelf:
                other.empty()
        # PERF: to account for an answer takes a tenth of the time that it takes to give it again.
        kept = answer if answer.code >= self._account_from else None
        shelf.put(request, answer.instance, Repeat(kept, before, after, request))
        answer.forget()
        self._shelves[shelf.place] = shelf
        self._size += shelf.size
        while self._size > KEPT_BYTES:
            _place, oldest = self._shelves.popitem(last=False)
            self._size -= oldest.size
            oldest.empty()


def _nothing() -> None:
    """What a reference comes to before there is an instance."""
