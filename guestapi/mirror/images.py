"""Copies the images that a running Incus or LXD lets its instances export.

Only root may read the daemon's image files, so each image is downloaded once through the API and served from the copy.
Images are downloaded only while an instance may export images, which is off by default.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from email.message import Message
from functools import partial
from threading import Event

import falcon
import httpx
from falcon.media.multipart import MultipartForm, MultipartParseError, MultipartParseOptions
from falcon.util.reader import BufferedReader

from guestapi import model, names
from guestapi.dialects import DIALECTS
from guestapi.mirror.daemon import DaemonClient
from guestapi.mirror.daemon_model import DaemonError, DaemonImage, GoneError, RefusedError
from guestapi.settings import Settings
from guestapi.store import images
from guestapi.store.errors import ConflictError, StoreError
from guestapi.store.image_steps import set_image
from guestapi.store.images import ImageFileError, Part
from guestapi.store.lookup import list_images, list_instances
from guestapi.store.view import Views
from guestapi.store.writing import Writer

log = logging.getLogger(__name__)

#: Bytes that one read returns.
_BLOCK = 1 << 20
#: More bytes than any image has: a multipart body without a length ends at its last boundary.
_ENDLESS = 1 << 62


class ImageMirror:
    """Copies one daemon's images."""

    def __init__(self, settings: Settings, writer: Writer, store: Views, name: str, daemon: DaemonClient) -> None:
        """Copy nothing yet.

        Args:
            settings: the directory of the images.
            writer: for changes of the store.
            store: for reading the store.
            name: the mirror's name.
            daemon: the daemon with the images.
        """
        self._where = images.directory(settings)
        self._writer = writer
        self._store = store
        self._name = name
        self._daemon = daemon
        self._news = Event()
        #: Why images cannot be copied: one sentence each.
        self.faults: list[str] = []

    def look(self) -> None:
        """Request a comparison soon, without waiting for it."""
        self._news.set()

    def run(self) -> None:
        """Copy until the process ends. This runs in its own thread, because a large image takes long."""
        while True:
            self._news.wait()
            self._news.clear()
            try:
                self.faults = self.compare()
            except DaemonError as error:
                # When the daemon is back, everything is compared. The journal hears of it from who follows its events.
                self.faults = [f"images: {error}"]
            except StoreError as error:
                log.error("images: %s", error)
                self.faults = [str(error)]

    def compare(self) -> list[str]:
        """Copy new images, remove copies of deleted ones; return a sentence for each that cannot be copied.

        Raises:
            DaemonError: the daemon is lost.
            StoreError: the store cannot be used.
        """
        with self._store.view() as store:
            known = {one.fingerprint: one for one in list_images(store)}
            exporters = any(map(may_export, (one.config for one in list_instances(store, source=self._name))))
            wanted = self._exported() if exporters else {}
        faults = []
        for fingerprint, mirrored in known.items():
            if mirrored.source == self._name and fingerprint not in wanted:
                images.remove_image(self._writer, self._where, fingerprint)
        for fingerprint, (project, image) in wanted.items():
            there = known.get(fingerprint)
            try:
                if there is None:
                    self._fetch(project, image)
                elif there.source == self._name and (there.public, there.cached) != (image.public, image.cached):
                    with self._writer.change() as change:
                        set_image(change, there, public=image.public, cached=image.cached)
            except GoneError:
                continue  # Deleted meanwhile; an event follows.
            # An image that cannot be copied does not affect the others.
            except RefusedError as error:
                faults.append(f"image {fingerprint[:12]}: {error}")
            except (ImageFileError, ConflictError) as error:
                faults.append(str(error))
        return faults

    def _exported(self) -> dict[str, tuple[str, DaemonImage]]:
        """Return the images that instances may export: by fingerprint, a project that has it, and the image."""
        return {
            image.fingerprint: (project, image)
            for project in self._daemon.projects()
            for image in self._daemon.images(project)
            if (image.public or image.cached) and names.is_fingerprint(image.fingerprint)
        }

    def _fetch(self, project: str, image: DaemonImage) -> None:
        kind: model.InstanceType = "virtual-machine" if image.type == "virtual-machine" else "container"
        draft = model.Image(image.fingerprint, kind, image.public, image.cached, time.time(), (), (), self._name)
        with self._daemon.export(project, image.fingerprint) as response, ExitStack() as stack:
            stack.callback(response.close)
            images.receive_image(self._writer, self._where, draft, _parts(response, image))


def may_export(config: Mapping[str, str]) -> bool:
    """Whether an instance with this configuration may export images."""
    return any(dialect.images_allowed(config) for dialect in DIALECTS.values())


def _parts(response: httpx.Response, image: DaemonImage) -> Iterator[Part]:
    """Yield the files in a response: a single one, or metadata and root file system in a form.

    Raises:
        DaemonError: the response is neither.
    """
    kind = Message()
    kind["content-type"] = response.headers.get("content-type", "")
    if kind.get_content_type() != "multipart/form-data":
        disposition = Message()
        disposition["content-disposition"] = response.headers.get("content-disposition", "")
        yield disposition.get_filename(image.filename), response.iter_bytes(_BLOCK)
        return
    stream = BufferedReader(_Reader(response.iter_bytes(_BLOCK)).read, _ENDLESS, _BLOCK)
    options = MultipartParseOptions()
    try:
        for part in MultipartForm(stream, str(kind.get_boundary("")).encode(), None, options):
            yield part.filename or "", iter(partial(part.stream.read, _BLOCK), b"")
    except (MultipartParseError, falcon.HTTPError) as error:
        raise DaemonError(f"image {image.fingerprint[:12]}: the daemon's answer cannot be read: {error}") from None


class _Reader:
    """A readable file made of blocks of any size."""

    def __init__(self, blocks: Iterator[bytes]) -> None:
        self._blocks = blocks
        self._left = b""

    def read(self, size: int) -> bytes:
        """Return at most `size` bytes; none at the end."""
        if not self._left:
            self._left = next(self._blocks, b"")
        block, self._left = self._left[:size], self._left[size:]
        return block
