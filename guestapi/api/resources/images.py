"""``/1.0/images/{fingerprint}/export``: an image of the host, for instances that may export images."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Protocol

import falcon

from guestapi.api import errors
from guestapi.api.ranges import ConditionResult, Range, http_date, judge, wanted_ranges
from guestapi.dialects import Dialect
from guestapi.model import Image, Instance
from guestapi.names import is_fingerprint
from guestapi.store.images import ImageFileError
from guestapi.wsgi import Content, FilePart

_BYTES = "application/octet-stream"
#: How many digits of the fingerprint are the boundary of parts: as many as Go's multipart.Writer has. No image contains
#: its own hash. With the same boundary each time, the same image has the same body, as a strong ETag promises.
_BOUNDARY_DIGITS = 60


class ImageStore(Protocol):
    """Where images are. `api.app.Store` implements it."""

    def image(self, fingerprint: str) -> Image | None:
        """As `store.reading.Reader.image`."""
        ...

    def open_image(self, image: Image) -> list[int]:
        """As `store.images.open_files`."""
        ...


class ImageExport:
    """``GET /1.0/images/{fingerprint}/export``: the image, whole or in parts."""

    def __init__(self, images: ImageStore, dialect: Dialect) -> None:
        self._images = images
        self._dialect = dialect

    def on_get(self, req: falcon.Request, resp: falcon.Response, fingerprint: str) -> None:
        """Answer with the image.

        Raises:
            NotAuthorized: the instance may not export images.
            ImageNotFound: it cannot have this image, whatever the reason.
        """
        instance: Instance = req.context.instance
        if not self._dialect.images_allowed(instance.config):
            raise errors.NotAuthorized
        image = self._images.image(fingerprint) if is_fingerprint(fingerprint) else None
        if image is None or not image.exported:
            raise errors.ImageNotFound(fingerprint, self._dialect)
        try:
            descriptors = self._images.open_image(image)
        except ImageFileError as error:
            # The guest cannot have the image. If it learns so at once, it can look elsewhere.
            errors.log.error("%s", error)
            raise errors.ImageNotFound(fingerprint, self._dialect) from None
        try:
            content = self._answer(req, resp, image, descriptors)
        except BaseException:
            _close(descriptors)
            raise
        if content is None or req.method == "HEAD":
            _close(descriptors)
        else:
            resp.stream = content

    def _answer(
        self, req: falcon.Request, resp: falcon.Response, image: Image, descriptors: Sequence[int]
    ) -> Content | None:
        """Set the header fields; return the body, or None if the response has none."""
        etag = f'"{image.fingerprint}"'
        modified = max(file.mtime_ns for file in image.files) // 10**9
        verdict = judge(req.env, etag, modified)
        if verdict is ConditionResult.FAILED:
            raise errors.PreconditionFailed
        unified = len(image.files) == 1
        fields = {"ETag": etag, "Last-Modified": http_date(modified)}
        if unified:
            fields["Content-Disposition"] = f"inline;filename={image.fingerprint}{image.files[0].extension}"
        if self._dialect.image_header is not None:
            name, value = self._dialect.image_header
            fields[name] = value
        resp.set_headers(fields)
        if verdict is ConditionResult.NOT_MODIFIED:
            resp.status = falcon.HTTP_304
            return None
        if unified:
            try:
                # RFC 9110, section 14.2: ranges are for GET alone.
                ranges = wanted_ranges(req.env, etag, modified, image.size) if req.method == "GET" else []
            except errors.RangeNotSatisfiable:
                resp.delete_header("ETag")
                resp.delete_header("Last-Modified")
                raise
            content = _unified(resp, image, descriptors[0], ranges)
        else:
            content = _split(resp, image, descriptors)
        resp.content_length = content.length
        return content


def _unified(resp: falcon.Response, image: Image, descriptor: int, ranges: Sequence[Range]) -> Content:
    resp.set_header("Accept-Ranges", "bytes")
    if not ranges:
        resp.content_type = _BYTES
        return Content([_part(image, 0, descriptor)], [descriptor])
    resp.status = falcon.HTTP_206
    if len(ranges) == 1:
        offset, length = ranges[0]
        resp.content_type = _BYTES
        resp.set_header("Content-Range", _content_range(offset, length, image.size))
        return Content([_part(image, 0, descriptor, offset, length)], [descriptor])
    resp.content_type = f"multipart/byteranges; boundary={_boundary(image)}"
    parts = [
        (
            f"Content-Range: {_content_range(offset, length, image.size)}\r\nContent-Type: {_BYTES}\r\n",
            _part(image, 0, descriptor, offset, length),
        )
        for offset, length in ranges
    ]
    return Content(_multipart(_boundary(image), parts), [descriptor])


def _split(resp: falcon.Response, image: Image, descriptors: Sequence[int]) -> Content:
    """The body that Incus sends for a split image: a form of two files."""
    names = ["metadata", "rootfs.img" if image.type == "virtual-machine" else "rootfs"]
    resp.content_type = f"multipart/form-data; boundary={_boundary(image)}"
    parts = []
    for number, (name, file) in enumerate(zip(names, image.files, strict=True)):
        file_name = f"{'' if number else 'meta-'}{image.fingerprint}{file.extension}"
        disposition = f'Content-Disposition: form-data; name="{name}"; filename="{file_name}"\r\n'
        parts.append((f"{disposition}Content-Type: {_BYTES}\r\n", _part(image, number, descriptors[number])))
    return Content(_multipart(_boundary(image), parts), descriptors)


def _part(image: Image, number: int, descriptor: int, offset: int = 0, length: int | None = None) -> FilePart:
    file = image.files[number]
    return FilePart(descriptor, offset, file.size if length is None else length, file.size, file.mtime_ns)


def _multipart(boundary: str, parts: Sequence[tuple[str, FilePart]]) -> list[bytes | FilePart]:
    """RFC 2046, section 5.1.1: each part after its header fields, between lines with the boundary."""
    pieces: list[bytes | FilePart] = []
    for fields, part in parts:
        start = "\r\n" if pieces else ""
        pieces += [f"{start}--{boundary}\r\n{fields}\r\n".encode(), part]
    return [*pieces, f"\r\n--{boundary}--\r\n".encode()]


def _boundary(image: Image) -> str:
    return image.fingerprint[:_BOUNDARY_DIGITS]


def _content_range(offset: int, length: int, size: int) -> str:
    return f"bytes {offset}-{offset + length - 1}/{size}"


def _close(descriptors: Sequence[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
