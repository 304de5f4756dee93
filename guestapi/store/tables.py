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
)
from sqlalchemy.dialects import sqlite
from sqlalchemy.schema import CreateIndex, CreateTable

#: Kept in SQLite's ``user_version``. Grows with every change of the tables.
VERSION = 2

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
    # Which mirror it belongs to, and what that one's daemon holds of its readiness; null: it is the operator's.
    Column("source", Text),
    Column("told_ready", Boolean),
    # The identity of a running instance: model.Init. All set, or none.
    Column("init_pid", Integer),
    Column("init_start_time", Integer),
    Column("init_boot_id", Text),
    Column("init_namespace", Integer),
    UniqueConstraint("project", "name"),
    # An id is never given to another instance: a worker may still hold what it knows of the old one.
    sqlite_autoincrement=True,
)
Index("instances_by_namespace", instances.c.init_namespace)

config = Table(
    "config",
    metadata,
    Column("instance_id", ForeignKey("instances.id", ondelete="CASCADE"), primary_key=True),
    Column("key", Text, primary_key=True),
    Column("value", Text, nullable=False),
)

devices = Table(
    "devices",
    metadata,
    Column("instance_id", ForeignKey("instances.id", ondelete="CASCADE"), primary_key=True),
    Column("name", Text, primary_key=True),
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
    # Which mirror it belongs to; null: the operator's.
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

# How the mirrors of running daemons are: model.Mirror.
mirrors = Table(
    "mirrors",
    metadata,
    Column("name", Text, primary_key=True),
    Column("socket", Text, nullable=False),
    Column("connected", Boolean, nullable=False),
    Column("contact", Float, nullable=False),
    Column("lag", Float, nullable=False),
    Column("fault", Text, nullable=False),
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
    sqlite_autoincrement=True,
)
Index("notifications_by_instance", notifications.c.instance_id, notifications.c.id)


def plain(statement: CreateTable | CreateIndex | Select[Any]) -> str:
    """A statement as the driver takes it, with named parameters."""
    return str(statement.compile(dialect=sqlite.dialect(paramstyle="named")))
