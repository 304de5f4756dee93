"""The tables of a fleet's database, as the statements that make them and that upgrade older ones.

Rules: a version only adds. Each table has row-level security; `access` has the policies. A host's revision is raised
in the row of that host, whose lock is held until the commit: revisions are in the order of commits and have no holes.
"""

from __future__ import annotations

#: The version of these tables. Grows with every change of them.
VERSION = 2

#: Roles that cannot log in: the owner of everything, and the groups of those who can.
OWNER, HOSTS, OPERATORS, VIEWERS = "guestapi_fleet", "guestapi_host", "guestapi_operator", "guestapi_viewer"
#: What the role of a host begins with; the rest is the host's name.
ROLE_PREFIX = "guestapi_host_"
#: The longest name of a host: PostgreSQL's names have 63 bytes (NAMEDATALEN).
HOST_BYTES = 63 - len(ROLE_PREFIX)

_VERSION_1 = (
    """CREATE TABLE guestapi.fleet (
        id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
        version integer NOT NULL,
        -- Followers that know no newer version than this one do not follow.
        oldest_version integer NOT NULL
    )""",
    # A second row is refused.
    "CREATE UNIQUE INDEX one_fleet ON guestapi.fleet ((true))",
    """CREATE TABLE guestapi.hosts (
        name text PRIMARY KEY,
        role text NOT NULL UNIQUE,
        revision bigint NOT NULL DEFAULT 0,
        -- The log has every change of a revision greater than this one.
        oldest bigint NOT NULL DEFAULT 0,
        state text NOT NULL DEFAULT 'active' CHECK (state IN ('active', 'fenced'))
    )""",
    """CREATE TABLE guestapi.instances (
        uuid uuid PRIMARY KEY,
        project text NOT NULL CHECK (octet_length(project) BETWEEN 1 AND 1024),
        name text NOT NULL CHECK (octet_length(name) BETWEEN 1 AND 255),
        type text NOT NULL DEFAULT 'container' CHECK (type IN ('container', 'virtual-machine')),
        cloud_init_id uuid NOT NULL,
        host text NOT NULL REFERENCES guestapi.hosts,
        -- Grows when the instance goes to another host.
        epoch bigint NOT NULL DEFAULT 1,
        -- The host that gets the instance as soon as its host has released it.
        next_host text REFERENCES guestapi.hosts,
        -- The host's revision with the last change of the instance.
        revision bigint NOT NULL,
        UNIQUE (project, name)
    )""",
    "CREATE INDEX instances_by_host ON guestapi.instances (host)",
    # Values are bytes, because PostgreSQL's text has no NUL.
    """CREATE TABLE guestapi.config (
        uuid uuid NOT NULL REFERENCES guestapi.instances ON DELETE CASCADE,
        key text NOT NULL CHECK (octet_length(key) BETWEEN 1 AND 1024),
        value bytea NOT NULL,
        PRIMARY KEY (uuid, key)
    )""",
    # json, not jsonb, which has no NUL either.
    """CREATE TABLE guestapi.devices (
        uuid uuid NOT NULL REFERENCES guestapi.instances ON DELETE CASCADE,
        name text NOT NULL CHECK (octet_length(name) BETWEEN 1 AND 1024),
        definition json NOT NULL,
        PRIMARY KEY (uuid, name)
    )""",
    # Which instance changed, not how; or which profile that instances of the host have. No foreign key: it has those
    # that are gone.
    """CREATE TABLE guestapi.log (
        host text NOT NULL REFERENCES guestapi.hosts ON DELETE CASCADE,
        revision bigint NOT NULL,
        uuid uuid NOT NULL,
        PRIMARY KEY (host, revision, uuid)
    )""",
    # Operations that were done, so that one that is asked for again changes nothing.
    """CREATE TABLE guestapi.ops (
        op uuid PRIMARY KEY,
        at timestamptz NOT NULL DEFAULT now(),
        result json NOT NULL
    )""",
    # What a host says of an instance.
    """CREATE TABLE guestapi.said (
        uuid uuid PRIMARY KEY REFERENCES guestapi.instances ON DELETE CASCADE,
        host text NOT NULL REFERENCES guestapi.hosts ON DELETE CASCADE,
        epoch bigint NOT NULL,
        seq bigint NOT NULL,
        run bigint NOT NULL,
        running boolean NOT NULL,
        ready boolean NOT NULL
    )""",
    # How a host is, by the clock of the primary.
    """CREATE TABLE guestapi.seen (
        host text PRIMARY KEY REFERENCES guestapi.hosts ON DELETE CASCADE,
        contact timestamptz NOT NULL,
        applied bigint NOT NULL,
        version text NOT NULL CHECK (octet_length(version) <= 100),
        fault text NOT NULL CHECK (octet_length(fault) <= 1000)
    )""",
)

#: The version that followers must know from the first profile on: an older one would serve instances without theirs.
PROFILES_SINCE = 2
_VERSION_2 = (
    """CREATE TABLE guestapi.profiles (
        id uuid PRIMARY KEY,
        project text NOT NULL CHECK (octet_length(project) BETWEEN 1 AND 1024),
        name text NOT NULL CHECK (octet_length(name) BETWEEN 1 AND 255),
        -- Bytes, as values are.
        description bytea NOT NULL,
        UNIQUE (project, name)
    )""",
    """CREATE TABLE guestapi.profile_config (
        profile uuid NOT NULL REFERENCES guestapi.profiles ON DELETE CASCADE,
        key text NOT NULL CHECK (octet_length(key) BETWEEN 1 AND 1024),
        value bytea NOT NULL,
        PRIMARY KEY (profile, key)
    )""",
    """CREATE TABLE guestapi.profile_devices (
        profile uuid NOT NULL REFERENCES guestapi.profiles ON DELETE CASCADE,
        name text NOT NULL CHECK (octet_length(name) BETWEEN 1 AND 1024),
        definition json NOT NULL,
        PRIMARY KEY (profile, name)
    )""",
    # Which profiles an instance has; the one with the greatest position is the strongest of them. Whoever adds a row
    # waits for a change of that profile, which finds the hosts of its instances under the same lock (`plan`).
    """CREATE TABLE guestapi.instance_profiles (
        uuid uuid NOT NULL REFERENCES guestapi.instances ON DELETE CASCADE,
        position integer NOT NULL,
        profile uuid NOT NULL REFERENCES guestapi.profiles,
        PRIMARY KEY (uuid, position),
        UNIQUE (profile, uuid)
    )""",
)

#: The statements that make each version out of the one before.
UPGRADES: dict[int, tuple[str, ...]] = {1: _VERSION_1, 2: _VERSION_2}
