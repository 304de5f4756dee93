"""The tables of the database."""

from __future__ import annotations

from typing import Any

from sqlalchemy import (
    JSON,
    Boolean,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    Select,
    Table,
    Text,
    UniqueConstraint,
    text,
)
from sqlalchemy.dialects import sqlite
from sqlalchemy.schema import CreateIndex, CreateTable

#: Kept in SQLite's ``user_version``. Grows with every change of the tables.
VERSION = 3

metadata = MetaData()

instances = Table(
    "instances",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("revision", Integer, nullable=False, default=1),
    Column("run", Integer, nullable=False, default=0),
    Column("project", Text, nullable=False),
    Column("name", Text, nullable=False),
    Column("type", Text, nullable=False),
    Column("uuid", Text, nullable=False, unique=True),
    Column("cloud_init_id", Text, nullable=False),
    Column("location", Text),
    Column("ready", Boolean, nullable=False, default=False),
    # Which source it belongs to, and the source's own key of it. No source: it was added by hand. A source without a
    # key: it was released, since the source has no such container any more.
    Column("source", Text),
    Column("source_key", Text),
    # The host name inside, where it is not the instance's name.
    Column("hostname", Text),
    # It stays when its source has it no more, although it has no configuration of the operator's.
    Column("kept", Boolean, nullable=False, server_default=text("0")),
    # What its source's daemon is known to hold of its readiness; null: nothing is known.
    Column("acknowledged_ready", Boolean),
    # The identity of a running instance: model.Init. The first four are all set, or none; the others may be unknown.
    Column("init_pid", Integer),
    Column("init_start_time", Integer),
    Column("init_boot_id", Text),
    Column("init_namespace", Integer),
    Column("init_root_uid", Integer),
    Column("init_user_namespace", Integer),
    UniqueConstraint("project", "name"),
    # An id is never given to another instance: a worker may still hold what it knows of the old one.
    sqlite_autoincrement=True,
)
Index("instances_by_namespace", instances.c.init_namespace)
Index("instances_by_source", instances.c.source, instances.c.source_key, unique=True)

# Both in layers (store.layers): the source's, and the operator's, which wins.
config = Table(
    "config",
    metadata,
    Column("instance_id", ForeignKey("instances.id", ondelete="CASCADE"), primary_key=True),
    Column("key", Text, primary_key=True),
    Column("layer", Integer, primary_key=True),
    # Bytes of the value in UTF-8. It stands before it, so that a large value is not read for it.
    Column("size", Integer, nullable=False),
    Column("value", Text, nullable=False),
)

devices = Table(
    "devices",
    metadata,
    Column("instance_id", ForeignKey("instances.id", ondelete="CASCADE"), primary_key=True),
    Column("name", Text, primary_key=True),
    Column("layer", Integer, primary_key=True),
    Column("definition", JSON, nullable=False),
)

images = Table(
    "images",
    metadata,
    Column("fingerprint", Text, primary_key=True),
    Column("type", Text, nullable=False),
    Column("public", Boolean, nullable=False),
    Column("cached", Boolean, nullable=False),
    Column("created", Float, nullable=False),
    # Which source it belongs to; null: the operator's.
    Column("source", Text),
)

# One or two an image: model.Image.files.
image_files = Table(
    "image_files",
    metadata,
    Column("fingerprint", ForeignKey("images.fingerprint", ondelete="CASCADE"), primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("extension", Text, nullable=False),
    Column("size", Integer, nullable=False),
    Column("mtime_ns", Integer, nullable=False),
)

image_aliases = Table(
    "image_aliases",
    metadata,
    Column("alias", Text, primary_key=True),
    Column("fingerprint", ForeignKey("images.fingerprint", ondelete="CASCADE"), nullable=False),
)
Index("image_aliases_by_image", image_aliases.c.fingerprint)

# How the sources of instances are: model.SourceStatus.
sources = Table(
    "sources",
    metadata,
    Column("name", Text, primary_key=True),
    Column("socket", Text, nullable=False),
    Column("connected", Boolean, nullable=False),
    Column("contact", Float, nullable=False),
    Column("lag", Float, nullable=False),
    Column("fault", Text, nullable=False),
)

# What could not be taken over from a source: model.Problem. Replaced whole for each key.
source_problems = Table(
    "source_problems",
    metadata,
    Column("source", Text, primary_key=True),
    Column("key", Text, primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("project", Text, nullable=False),
    Column("name", Text, nullable=False),
    Column("reason", Text, nullable=False),
    Column("hint", Text),
    Column("refused", Boolean, nullable=False),
)

# The change log: ids are in the order of commits, without holes.
notifications = Table(
    "notifications",
    metadata,
    Column("id", Integer, primary_key=True),
    # No foreign key: the log tells of instances that are gone.
    Column("instance_id", Integer, nullable=False),
    Column("project", Text, nullable=False),
    Column("instance", Text, nullable=False),
    Column("type", Text, nullable=False),
    Column("timestamp", Text, nullable=False),
    Column("written", Float, nullable=False),
    Column("metadata", Text, nullable=False),
    Column("for_guest", Boolean, nullable=False),
    # The instance itself caused it. Such entries are limited for each instance, so that none drives out another's.
    Column("by_guest", Boolean, nullable=False, server_default=text("0")),
    sqlite_autoincrement=True,
)
Index("notifications_by_instance", notifications.c.instance_id, notifications.c.id)
# What trimming asks for, without a look at the entries themselves, which may be large.
NOT_BY_GUEST, BY_GUEST = text("by_guest = 0"), text("by_guest = 1")
Index("notifications_not_by_guest", notifications.c.id, sqlite_where=NOT_BY_GUEST)
Index("notifications_by_guest", notifications.c.instance_id, notifications.c.id, sqlite_where=BY_GUEST)


def plain(statement: CreateTable | CreateIndex | Select[Any]) -> str:
    """A statement as the driver takes it, with named parameters."""
    return str(statement.compile(dialect=sqlite.dialect(paramstyle="named")))
