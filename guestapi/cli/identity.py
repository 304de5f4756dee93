"""``guestapi identity``: the keys with which this host signs who its instances are, and the process that signs."""

from __future__ import annotations

import socket
import time
from pathlib import Path

import click

from guestapi import journal
from guestapi.audit import AuditRecord
from guestapi.cli.common import Operator, print_json
from guestapi.cli.grouping import Noun, Verb
from guestapi.cli.times import Duration
from guestapi.errors import OperatorError
from guestapi.identity.messages import MESSAGE_BYTES, TokenRequest, decode_answer, encode
from guestapi.settings import IdentitySettings, load

#: The longest time until a new key signs, in seconds.
_MOST_SECONDS = 30 * 86400
#: Seconds to wait for an answer of the signer.
_ANSWER_SECONDS = 5.0
#: A request for which there is no token: no operator's list has an audience that cannot be printed.
_NOTHING = TokenRequest(
    audience="\0",
    uuid="0" * 8 + "-0000-0000-0000-" + "0" * 12,
    name="-",
    project="-",
    type="container",
    location="",
    run=0,
)


@click.group(cls=Noun)
def identity() -> None:
    """Sign tokens with which instances show others who they are. docs/identity.md describes it."""


@identity.group("keys", cls=Noun)
def key_file() -> None:
    """The keys of this host, in the directory identity.keys of guestapi.toml."""


@key_file.command()
@click.option(
    "--in",
    "seconds",
    type=Duration(_MOST_SECONDS),
    default="1h",
    metavar="TIME",
    help="When the new key signs (default: 1h): 60s, 5m, 2h, up to 30d. By then everybody who verifies has to know it.",
)
@click.option("--compromised", is_flag=True, help="It signs at once, and what the earlier keys signed is void.")
@click.pass_obj
def rotate(operator: Operator, seconds: float, compromised: bool) -> None:
    """Make a new key. The first one signs at once; a further one takes the place of the one before after a while.

    Until then, and for ten minutes more, 'guestapi identity keys jwks' prints both. The service need not be told.
    """
    from guestapi.identity import keys
    from guestapi.identity.service import protect_memory

    protect_memory()
    ring = keys.rotate(Path(operator.settings.identity.keys), seconds, compromised=compromised)
    operator.audit([AuditRecord("identity.rotate")])
    newest, now = ring.keys[-1], time.time()
    if newest.nbf <= now:
        click.echo(f"key {newest.kid} signs from now on")
    else:
        click.echo(f"key {newest.kid} signs from {_written(newest.nbf)} on")


@key_file.command()
@click.option("--spiffe", is_flag=True, help="As a bundle of SPIFFE, whose keys are for JWT-SVIDs.")
@click.pass_obj
def jwks(operator: Operator, spiffe: bool) -> None:
    """Print the public keys as a JSON Web Key Set, for everybody who verifies tokens. Nothing of it is secret."""
    from guestapi.identity import keys
    from guestapi.identity.service import protect_memory

    protect_memory()
    directory = Path(operator.settings.identity.keys)
    print_json(keys.require(directory).jwks(time.time(), spiffe=spiffe))


@identity.command(cls=Verb)
@click.pass_obj
def signer(operator: Operator) -> None:
    """Sign what workers ask for. Stays in the foreground; guestapi-signer.socket starts it."""
    from guestapi.identity.service import serve

    journal.set_up(operator.settings.log.level)
    serve(lambda: load(operator.file).identity)


def check_identity(settings: IdentitySettings) -> tuple[object, str]:
    """Check whether tokens can be signed.

    Args:
        settings: of guestapi.toml, with a trust domain.

    Returns:
        The keys, and what was found.

    Raises:
        KeysError: others can read the keys, there are none, they cannot be used, or a library is missing.
        OperatorError: nobody could have a token, or the signer cannot be reached.
    """
    from guestapi.identity import keys

    ring, now = keys.require(Path(settings.keys)), time.time()
    for one in ring.keys:
        one.load()
    if not settings.audiences:
        raise OperatorError("identity.audiences is empty, so nobody gets a token", "docs/identity.md says what it is")
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
            connection.settimeout(_ANSWER_SECONDS)
            connection.connect(settings.socket)
            connection.send(encode(_NOTHING))
            answer = decode_answer(connection.recv(MESSAGE_BYTES))
    except OSError as error:
        raise OperatorError(
            f"{settings.socket}: the signer does not answer: {error.strerror or error}",
            "'systemctl enable --now guestapi-signer.socket' starts it",
        ) from None
    if answer.refused != "audience":
        raise OperatorError(
            f"{settings.socket}: the signer cannot use the keys", "'journalctl -u guestapi-signer' says why"
        )
    newest, signing = ring.keys[-1], ring.signing(now)
    text = f"{settings.trust_domain}, key {signing.kid} signs since {_written(signing.nbf)}"
    if newest.nbf > now:
        text += f", {newest.kid} from {_written(newest.nbf)} on"
    return ring, text


def _written(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
