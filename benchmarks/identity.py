"""Tokens of identity: what a signature costs, with which library, and how many an instance gets in a second."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from timeit import repeat
from typing import Any

import joserfc.jwt
import jwt
from joserfc.jwk import ECKey

from benchmarks.contenders import CONFIG, INSTANCE
from benchmarks.figures import Figure
from benchmarks.processes import SERVER_CORE, Inside, pin, processor_seconds
from benchmarks.scale import SOCKET
from guestapi.identity import keys
from guestapi.identity.messages import TokenRequest, encode
from guestapi.identity.signer import TokenMaker
from guestapi.settings import IdentitySettings
from tests.harness.service import Service
from tests.harness.signing import SigningProcess

AUDIENCE = "https://vault.example.org"
PATH = f"/1.0/guestapi/identity?audience={AUDIENCE}&nonce=4711"
#: Every instance may have as many as it wants here.
_TOML = '[log]\nrequests = "none"\n[limits]\nwrites_per_second = 1000000.0\nwrites_burst = 1000000\n'
_REQUEST = TokenRequest(
    audience=AUDIENCE,
    nonce="4711",
    uuid="6ba7b810-9dad-41d1-80b4-00c04fd430c8",
    name=INSTANCE,
    project="default",
    type="container",
    location="host1",
    run=3,
)
#: How often each is timed in a round.
_TIMES = 500


def measure(rounds: int, seconds: float) -> Iterator[Figure]:
    """Measure all of it."""
    yield from libraries(rounds)
    yield from service(rounds, seconds)


def libraries(rounds: int) -> Iterator[Figure]:
    """Compare the libraries, which take turns, and what the signer does besides."""
    with tempfile.TemporaryDirectory() as directory:
        stored = keys.rotate(Path(directory), 1.0).keys[0]
        maker = TokenMaker(IdentitySettings(trust_domain="x", audiences=(AUDIENCE,), keys=directory))
        first = stored.load()
        second = ECKey.import_key({**stored.public("sig"), "d": stored.d})
        head: dict[str, Any] = {"alg": "ES256", "kid": stored.kid, "typ": "JWT"}
        claims, message = maker.claims(_REQUEST, int(time.time())), encode(_REQUEST)
        calls: dict[str, Callable[[], object]] = {
            "a token by PyJWT": lambda: jwt.encode(claims, first, algorithm="ES256", headers={"kid": stored.kid}),
            "a token by joserfc": lambda: joserfc.jwt.encode(head, claims, second, algorithms=["ES256"]),
            "an answer of the signer": lambda: maker.answer(message),
        }
        found: dict[str, list[float]] = {name: [] for name in calls}
        for _round in range(rounds):
            for name, call in calls.items():
                found[name].append(min(repeat(call, number=_TIMES, repeat=3)) / _TIMES)
    for name, times in found.items():
        yield Figure(name, median(times) * 1e6, "µs")


def service(rounds: int, seconds: float) -> Iterator[Figure]:
    """Ask a worker, which asks the signer: both on one core, the load on another."""
    running = Service(workers=1, dialects=["incus"])
    with SigningProcess(running.root, (AUDIENCE,)) as signer:
        running.write_config(_TOML + signer.toml)
        running.command("identity", "keys", "rotate")
        signer.start(running.config)
        with running, running.container(INSTANCE, CONFIG) as container:
            # The first request loads what signs.
            if container.ask(PATH).status != 200:
                raise RuntimeError(signer.log.read_text() + running.log.read_text())
            pids = [*running.workers, signer.pid]
            pin([running.pid, *pids], SERVER_CORE)
            inside = Inside(container.pid)
            for connections in (1, 16):
                results = []
                for _round in range(rounds):
                    before = processor_seconds(pids)
                    result = inside.load(SOCKET, "keep", connections, seconds, [PATH])
                    if result["errors"]:
                        raise RuntimeError(f"errors: {result}")
                    used = (processor_seconds(pids) - before) / max(1, result["requests"])
                    results.append((result["requests"] / result["seconds"], result["p99"], used))
                rates, late, costs = (median(column) for column in zip(*results, strict=True))
                with_ = f"tokens, {connections} connection{'s' if connections > 1 else ''}"
                yield Figure(with_, rates, "a second")
                yield Figure("  p99", late / 1000, "ms")
                yield Figure("  processor time of each, both processes", costs * 1e6, "µs")
