"""What differs between the protocols, as data.

Rules: a new dialect is a new row of `DIALECTS`. Nothing else in the project depends on a dialect's name. A listening
socket has one dialect, whoever connects to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from guestapi.switches import FALSE, INCUS, INCUS_IMAGES, LXD, LXD_IMAGES, TRUE


@dataclass(frozen=True, slots=True)
class Redirect:
    """How a request for an unclean path, like ``/1.0//config``, is redirected to the clean one.

    Attributes:
        status: of the response.
        page: whether GET and HEAD are answered with a page that names the clean path, and its Content-Type.
        literal: characters that stay as they are in the Location, besides letters and digits.
        keeps_authority: whether the Location of a target in absolute form has its scheme and host.
        covers_all: whether CONNECT and the target ``*`` are redirected too.
    """

    status: str = "307 Temporary Redirect"
    page: bool = True
    literal: str = "/%!$&'()*+,;=:@-._~"
    keeps_authority: bool = False
    covers_all: bool = False


@dataclass(frozen=True, slots=True)
class Dialect:
    """One protocol of the family.

    Attributes:
        name: as in ``FileDescriptorName=`` of a socket unit and in ``--socket NAME=PATH``.
        unit: systemd unit of its socket.
        socket: path of the socket on the host, unless configured otherwise.
        directory: directory in an instance where the socket is ``sock``.
        vsock_port: port of vsock(7) at which virtual machines ask; None for none.
        switch: configuration key that switches the API off for an instance (default: on).
        images_switch: configuration key that allows an instance to export images (default: off).
        image_header: name and value of the header field that every exported image has; None for none.
        readable: prefixes of the configuration keys that a guest may read.
        describes_instance: ``GET /1.0`` has state, type and location besides the version, and ``PATCH /1.0`` exists.
        listed_nic_types: None if ``/1.0/devices`` is one object with all devices. Otherwise it lists the URLs of the
            NICs of these ``nictype``s, and each has a resource ``/1.0/device/NAME``.
        name_is_instance_id: whether the meta-data's instance-id is the instance's name, not its cloud-init UUID.
        redirect: how unclean paths are redirected.
        decodes_routes: whether a percent-encoded letter of a fixed segment, as in ``/%31.0``, is that letter.
        checks_origin: whether a WebSocket needs an Origin that is the Host, if it sends one.
        checks_key: whether a WebSocket needs a key of 16 bytes; otherwise, any key.
        no_image: what the main API says of an image that is not there; ``{}`` stands for its name in quotes.
        main_api_end: what ends the main API's errors.
        lone_location: the location of an instance that is on no cluster member; None: the name of the host.
        patch_reads: whether ``PATCH /1.0`` is answered as GET, whatever was sent. A state that was sent is kept.
        description: what ``GET /1.0`` tells besides, in this order.
        meta_data_head: the first line of the meta-data.
        merges_ssh_keys: whether ``cloud-init.ssh-keys.*`` is in no list, but in vendor-data or user-data.
        words: what its daemon says for what the others say.
        bad_body: what stands before the sentence that says what is wrong with a body.
        knows_methods: methods that are 501 at an endpoint without them, where any other is 404; None: both are 405.
        ubuntu_pro: whether there is ``/1.0/ubuntu-pro``.
        deadline_factor: how many times as long as ``head_seconds`` and ``idle_seconds`` say its clients may take.
        open_when_off: endpoints, by method and path, that answer although the API is switched off for the instance.
    """

    name: str
    unit: str
    socket: str
    directory: str
    switch: str
    images_switch: str
    image_header: tuple[str, str] | None = None
    readable: tuple[str, ...] = ("cloud-init.", "user.")
    describes_instance: bool = True
    listed_nic_types: frozenset[str] | None = None
    name_is_instance_id: bool = False
    redirect: Redirect = Redirect()
    decodes_routes: bool = True
    checks_origin: bool = True
    checks_key: bool = True
    no_image: str = "Image {} not found"
    main_api_end: str = "\n"
    lone_location: str | None = None
    patch_reads: bool = False
    description: tuple[tuple[str, object], ...] = ()
    meta_data_head: str = "#cloud-config\n"
    merges_ssh_keys: bool = False
    words: Mapping[str, str] = field(default_factory=dict)
    bad_body: str = ""
    knows_methods: frozenset[str] | None = None
    ubuntu_pro: bool = False
    deadline_factor: float = 1.0
    open_when_off: frozenset[tuple[str, str]] = frozenset({("GET", "/"), ("GET", "/1.0")})
    vsock_port: int | None = None

    def is_readable(self, key: str) -> bool:
        """Tell whether a guest may read the configuration key `key`, be it set or not."""
        return key.startswith(self.readable)

    def switched_on(self, config: Mapping[str, str]) -> bool:
        """Tell whether the API is on for an instance with this configuration. Only a false value switches it off."""
        return config.get(self.switch, "").lower() not in FALSE

    def images_allowed(self, config: Mapping[str, str]) -> bool:
        """Tell whether an instance with this configuration may export images. Only a true value allows it."""
        return config.get(self.images_switch, "").lower() in TRUE


#: The router of LXD.
_LXD_REDIRECT = Redirect(
    status="301 Moved Permanently", page=False, literal="/%$&+,;=:@-._~", keeps_authority=True, covers_all=True
)

#: In the place of a dialect: the socket at which the relay hands over connections of virtual machines.
HANDOVER = "handover"
#: Path of that socket, unless configured otherwise, and systemd's unit of it.
HANDOVER_SOCKET = "/run/guestapi/handover.sock"
HANDOVER_UNIT = "guestapi-handover.socket"

DIALECTS: dict[str, Dialect] = {
    dialect.name: dialect
    for dialect in (
        Dialect(
            name="incus",
            unit="guestapi.socket",
            socket="/var/lib/incus/guestapi/sock",
            directory="/dev/incus",
            switch=INCUS,
            images_switch=INCUS_IMAGES,
            image_header=("X-Incus-Type", "incus"),
            vsock_port=8444,
        ),
        Dialect(
            name="lxd",
            unit="guestapi-lxd.socket",
            socket="/var/lib/lxd/devlxd/sock",
            directory="/dev/lxd",
            switch=LXD,
            images_switch=LXD_IMAGES,
            vsock_port=8445,
            redirect=_LXD_REDIRECT,
            decodes_routes=False,
            checks_origin=False,
            checks_key=False,
            no_image="Image not found",
            main_api_end="\n\n",
            lone_location="none",
            patch_reads=True,
            deadline_factor=20.0,
            open_when_off=frozenset({("GET", "/")}),
        ),
        Dialect(
            name="lxd-6",
            unit="guestapi-lxd.socket",
            socket="/var/lib/lxd/devlxd/sock",
            directory="/dev/lxd",
            switch=LXD,
            images_switch=LXD_IMAGES,
            redirect=_LXD_REDIRECT,
            decodes_routes=False,
            checks_origin=False,
            checks_key=False,
            no_image="Image not found",
            main_api_end="\n\n",
            lone_location="none",
            description=(("auth", "untrusted"), ("supported_storage_drivers", ())),
            meta_data_head="",
            merges_ssh_keys=True,
            words={
                "not authorized": "Forbidden",
                "not found": "Not Found",
                "pid not in container?": "Process ID not found in container",
            },
            bad_body="Invalid request body: ",
            knows_methods=frozenset({"DELETE", "GET", "PATCH", "POST", "PUT"}),
            ubuntu_pro=True,
            deadline_factor=20.0,
            open_when_off=frozenset({("GET", "/")}),
        ),
        Dialect(
            name="lxd-legacy",
            unit="guestapi-lxd.socket",
            socket="/var/lib/lxd/devlxd/sock",
            directory="/dev/lxd",
            switch=LXD,
            images_switch=LXD_IMAGES,
            readable=("user.",),
            describes_instance=False,
            listed_nic_types=frozenset({"ipvlan"}),
            name_is_instance_id=True,
        ),
    )
}
