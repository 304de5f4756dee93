"""Container images made by hand: an OCI image layout (github.com/opencontainers/image-spec), and Docker's archive.

An image is untrusted, so tests put into it whatever an attacker could: annotations, labels, volumes.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_LAYER = "application/vnd.oci.image.layer.v1.tar"
_CONFIG = "application/vnd.oci.image.config.v1+json"
_MANIFEST = "application/vnd.oci.image.manifest.v1+json"


@dataclass(frozen=True)
class ContainerImage:
    """The content and the metadata of an image.

    Attributes:
        rootfs: the directory that it contains.
        annotations: of its manifest; Docker's archive has none.
        labels, environment, volumes: of its configuration.
    """

    rootfs: Path
    annotations: Mapping[str, str] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    environment: Sequence[str] = ("PATH=/usr/bin:/bin",)
    volumes: Sequence[str] = ()

    def _layer(self) -> bytes:
        buffer = io.BytesIO()

        def plain(member: tarfile.TarInfo) -> tarfile.TarInfo:
            member.uid = member.gid = member.mtime = 0
            return member

        with tarfile.open(fileobj=buffer, mode="w") as archive:
            archive.add(self.rootfs, arcname=".", filter=plain)
        return buffer.getvalue()

    def _config(self, layer: bytes) -> bytes:
        document = {
            "architecture": "amd64",
            "os": "linux",
            "config": {
                "Env": list(self.environment),
                "Cmd": ["sleep", "1000"],
                "Labels": dict(self.labels),
                "Volumes": {volume: {} for volume in self.volumes},
            },
            "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(layer).hexdigest()}"]},
        }
        return json.dumps(document).encode()

    def write_layout(self, directory: Path) -> None:
        """Write the image as an OCI image layout, which podman accepts as ``oci:DIRECTORY``."""
        (directory / "blobs/sha256").mkdir(parents=True)
        layer = self._layer()
        config = self._config(layer)
        manifest = {
            "schemaVersion": 2,
            "mediaType": _MANIFEST,
            "config": _blob(directory, config, _CONFIG),
            "layers": [_blob(directory, layer, _LAYER)],
            "annotations": dict(self.annotations),
        }
        index = {"schemaVersion": 2, "manifests": [_blob(directory, json.dumps(manifest).encode(), _MANIFEST)]}
        (directory / "index.json").write_text(json.dumps(index))
        (directory / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')

    def write_archive(self, file: Path, tag: str) -> None:
        """Write the image as an archive for ``docker load``."""
        layer = self._layer()
        config = self._config(layer)
        name = hashlib.sha256(config).hexdigest()
        manifest = [{"Config": f"{name}.json", "RepoTags": [tag], "Layers": ["layer.tar"]}]
        with tarfile.open(file, "w") as archive:
            for path, content in {
                f"{name}.json": config,
                "layer.tar": layer,
                "manifest.json": json.dumps(manifest).encode(),
            }.items():
                member = tarfile.TarInfo(path)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))


def _blob(directory: Path, content: bytes, kind: str) -> dict[str, Any]:
    digest = hashlib.sha256(content).hexdigest()
    (directory / "blobs/sha256" / digest).write_bytes(content)
    return {"mediaType": kind, "digest": f"sha256:{digest}", "size": len(content)}
