"""Who may do what in a fleet's database: functions, policies and grants, written anew by each upgrade.

Rules: a host's role reads its own rows and writes no table. It changes something only through the functions of
`_CALLED`, which run as the owner, and which find out by the role of the session which host is calling. A table without
a policy shows nothing to anybody but the owner.
"""

from __future__ import annotations

from collections.abc import Iterator

from guestapi.fleet.schema import HOSTS, OPERATORS, OWNER, VIEWERS

#: Revisions of a host that are kept in the log; up to a tenth more may be there.
_KEEP = 10_000
_FUNCTION = (
    "CREATE OR REPLACE FUNCTION guestapi.{head} LANGUAGE {language} {volatility} SECURITY DEFINER "
    "SET search_path = pg_catalog, pg_temp AS $body$ {body} $body$"
)

#: The host whose role has opened this session; null for all others, and for a fenced host. With the collation of a
#: name, the index would not be used. Each question asks this several times, and PL/pgSQL keeps the plan.
_ME = """
BEGIN
    RETURN (SELECT name FROM guestapi.hosts WHERE role = session_user COLLATE "default" AND state = 'active');
END
"""

# What a host is told at each look: the state of the database; whether what changed is small enough to be read at once;
# the profiles of it, in the first row; and a row for each that changed: its UUID, the first revision that changed it,
# and the instance, if it is one of this host.
_LOOK_COLUMNS = (
    "id text, version integer, oldest_version integer, host text, revision bigint, oldest bigint, timeline text, "
    "readable boolean, profiles json, "
    "changed text, first bigint, uuid text, project text, name text, epoch bigint, leaving boolean, size bigint, "
    "type text, cloud_init_id text, config json, devices json, applied text[]"
)
_SIZE = "SELECT coalesce(sum(octet_length(value)), 0)::bigint FROM guestapi"
_CONFIG = "SELECT json_object_agg(key, encode(value, 'hex')) FROM guestapi"
# PERF: row-level security would find out anew for each table who is calling, and which profiles are this host's. The
# function is STABLE, so all is of one moment. What changed and is no instance of this host may be a profile, which is
# read if an instance of this host has it: the scalar subquery is not made a join, which would read other hosts' rows.
_LOOK = f"""
#variable_conflict use_column
BEGIN
    SELECT fleet.id::text, fleet.version, fleet.oldest_version, hosts.name, hosts.revision, hosts.oldest,
            -- It begins with the timeline, in hexadecimal digits.
            left(pg_walfile_name(pg_current_wal_lsn()), 8)
        INTO look.id, look.version, look.oldest_version, look.host, look.revision, look.oldest, look.timeline
        FROM guestapi.fleet, guestapi.hosts
        WHERE hosts.role = session_user COLLATE "default" AND hosts.state = 'active';
    IF NOT FOUND THEN
        RETURN;
    END IF;
    IF (look.id, look.timeline) IS DISTINCT FROM (fleet_, timeline_) OR look.oldest > revision_
            OR look.revision <= revision_ THEN
        RETURN NEXT;
        RETURN;
    END IF;
    RETURN QUERY
        WITH changes AS MATERIALIZED (
            SELECT log.uuid AS changed, min(log.revision) AS first FROM guestapi.log
            WHERE log.host = look.host AND log.revision > revision_ GROUP BY log.uuid
        ), found AS MATERIALIZED (
            SELECT changes.*, instances.*, ({_SIZE}.config WHERE config.uuid = instances.uuid) AS size,
                (SELECT array_agg(profile ORDER BY position) FROM guestapi.instance_profiles
                WHERE instance_profiles.uuid = instances.uuid) AS applied
            FROM changes LEFT JOIN guestapi.instances ON instances.uuid = changed AND instances.host = look.host
        ), shared AS MATERIALIZED (
            SELECT profiles.*, ({_SIZE}.profile_config WHERE profile = profiles.id) AS size FROM guestapi.profiles
            WHERE id = ANY(ARRAY(SELECT changed FROM found WHERE uuid IS NULL UNION SELECT unnest(applied) FROM found))
            AND EXISTS (SELECT FROM guestapi.instances WHERE instances.host = look.host AND
                (SELECT true FROM guestapi.instance_profiles AS users
                WHERE users.profile = profiles.id AND users.uuid = instances.uuid))
        ), total AS MATERIALIZED (
            SELECT coalesce(sum(size), 0) <= most_ AS readable
            FROM (SELECT size FROM found UNION ALL SELECT size FROM shared) AS sizes
        )
        SELECT look.id, look.version, look.oldest_version, look.host, look.revision, look.oldest, look.timeline,
            total.readable,
            CASE WHEN total.readable AND row_number() OVER (ORDER BY first) = 1 THEN
                (SELECT json_agg(json_build_array(shared.id, shared.project, shared.name, encode(description, 'hex'),
                    ({_CONFIG}.profile_config WHERE profile = shared.id),
                    (SELECT json_object_agg(profile_devices.name, definition) FROM guestapi.profile_devices
                    WHERE profile = shared.id))) FROM shared) END,
            changed::text, first, found.uuid::text, project, name, epoch, next_host IS NOT NULL, found.size, type,
            cloud_init_id::text,
            CASE WHEN total.readable THEN ({_CONFIG}.config WHERE config.uuid = found.uuid) END,
            CASE WHEN total.readable THEN
                (SELECT json_object_agg(devices.name, definition) FROM guestapi.devices WHERE devices.uuid = found.uuid)
            END, applied::text[]
        FROM total LEFT JOIN found ON true ORDER BY first;
END
"""

_CONTACT = """
BEGIN
    INSERT INTO guestapi.seen AS s (host, contact, applied, version, fault)
        SELECT name, clock_timestamp(), applied_, version_, fault_ FROM guestapi.hosts
        WHERE role = session_user COLLATE "default" AND state = 'active'
        ON CONFLICT (host) DO UPDATE SET contact = excluded.contact, applied = excluded.applied,
            version = excluded.version, fault = excluded.fault;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'this role is not an active host of the fleet' USING ERRCODE = 'insufficient_privilege';
    END IF;
END
"""

# A report that arrives late, or from a host that has lost the instance, changes nothing.
_REPORT = """
DECLARE
    changed integer;
BEGIN
    PERFORM 1 FROM guestapi.instances
        WHERE instances.uuid = uuid_ AND host = guestapi.me() AND instances.epoch = epoch_ FOR SHARE;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    INSERT INTO guestapi.said AS s (uuid, host, epoch, seq, run, running, ready)
        VALUES (uuid_, guestapi.me(), epoch_, seq_, run_, running_, ready_)
        ON CONFLICT (uuid) DO UPDATE SET host = excluded.host, epoch = excluded.epoch, seq = excluded.seq,
            run = excluded.run, running = excluded.running, ready = excluded.ready
        WHERE (s.epoch, s.seq) < (excluded.epoch, excluded.seq);
    GET DIAGNOSTICS changed = ROW_COUNT;
    RETURN changed = 1;
END
"""

# Rows of hosts are locked in the order of their names, as by every other change, so that two changes never wait for
# each other. The instance is looked at again after that.
_RELEASE = """
DECLARE
    old_host text := guestapi.me();
    new_host text;
    number bigint;
BEGIN
    SELECT next_host INTO new_host FROM guestapi.instances
        WHERE instances.uuid = uuid_ AND host = old_host AND instances.epoch = epoch_ AND next_host IS NOT NULL;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    PERFORM 1 FROM guestapi.hosts WHERE name IN (old_host, new_host) ORDER BY name FOR UPDATE;
    PERFORM 1 FROM guestapi.instances
        WHERE instances.uuid = uuid_ AND host = old_host AND instances.epoch = epoch_ AND next_host = new_host
        FOR UPDATE;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    PERFORM guestapi.note(old_host, ARRAY[uuid_]);
    number := guestapi.note(new_host, ARRAY[uuid_]);
    UPDATE guestapi.instances SET host = new_host, epoch = instances.epoch + 1, next_host = NULL, revision = number
        WHERE instances.uuid = uuid_;
    RETURN true;
END
"""

# One revision for all instances that a change concerns; hosts that listen are rung at the commit. Now and then, what is
# old of the log is removed: a host that has been away for longer looks at everything.
_NOTE = """
DECLARE
    number bigint;
BEGIN
    UPDATE guestapi.hosts SET revision = revision + 1 WHERE name = host_ RETURNING revision INTO number;
    INSERT INTO guestapi.log (host, revision, uuid) SELECT host_, number, unnest(uuids);
    IF number % {every} = 0 THEN
        DELETE FROM guestapi.log WHERE host = host_ AND revision <= number - {keep};
        UPDATE guestapi.hosts SET oldest = greatest(oldest, number - {keep}) WHERE name = host_;
    END IF;
    PERFORM pg_notify('guestapi_' || host_, '');
    RETURN number;
END
""".replace("{keep}", str(_KEEP)).replace("{every}", str(_KEEP // 10))

# PERF: a policy that looks through instance_profiles by itself would read those of all hosts, and so would a join.
# PL/pgSQL keeps the plan.
_MY_PROFILES = """
BEGIN
    RETURN QUERY SELECT DISTINCT unnest(
            ARRAY(SELECT profile FROM guestapi.instance_profiles WHERE instance_profiles.uuid = instances.uuid)
        ) FROM guestapi.instances WHERE host = guestapi.me();
END
"""

# What an operator may change of the fleet's own row.
_REQUIRE = """
BEGIN
    UPDATE guestapi.fleet SET oldest_version = version_ WHERE oldest_version < version_ AND version >= version_;
    RETURN FOUND;
END
"""

#: Functions by their signature, then what they return, language, volatility and body.
_FUNCTIONS = {
    "me()": ("text", "plpgsql", "STABLE", _ME),
    "note(host_ text, uuids uuid[])": ("bigint", "plpgsql", "", _NOTE),
    "look(fleet_ text, timeline_ text, revision_ bigint, most_ bigint)": (
        f"TABLE ({_LOOK_COLUMNS})",
        "plpgsql",
        "STABLE",
        _LOOK,
    ),
    "contact(applied_ bigint, version_ text, fault_ text)": ("void", "plpgsql", "", _CONTACT),
    "report(uuid_ uuid, epoch_ bigint, seq_ bigint, run_ bigint, running_ boolean, ready_ boolean)": (
        "boolean",
        "plpgsql",
        "",
        _REPORT,
    ),
    "release(uuid_ uuid, epoch_ bigint)": ("boolean", "plpgsql", "", _RELEASE),
    "my_profiles()": ("SETOF uuid", "plpgsql", "STABLE", _MY_PROFILES),
    "require(version_ integer)": ("boolean", "plpgsql", "", _REQUIRE),
}
#: Those that a host calls.
_CALLED = ("me", "look", "contact", "report", "release", "my_profiles")

#: Whose the rows of a table are. The subquery is evaluated once for a query, not for each row.
_MINE = "host = (SELECT guestapi.me())"
_INSTANCE_MINE = f"uuid IN (SELECT uuid FROM guestapi.instances WHERE {_MINE})"
_PROFILE_MINE = "IN (SELECT guestapi.my_profiles())"
#: The rows of each table that a host reads.
_READ = {
    "fleet": "(SELECT guestapi.me()) IS NOT NULL",
    "hosts": "name = (SELECT guestapi.me())",
    "instances": _MINE,
    "config": _INSTANCE_MINE,
    "devices": _INSTANCE_MINE,
    "profiles": f"id {_PROFILE_MINE}",
    "profile_config": f"profile {_PROFILE_MINE}",
    "profile_devices": f"profile {_PROFILE_MINE}",
    "instance_profiles": _INSTANCE_MINE,
    "log": _MINE,
    "ops": "false",
    "said": _MINE,
    "seen": _MINE,
}
#: What operators change.
_CHANGED = (
    "hosts",
    "instances",
    "config",
    "devices",
    "profiles",
    "profile_config",
    "profile_devices",
    "instance_profiles",
    "log",
    "ops",
)

#: Functions of PostgreSQL with which a role without any right on a table could fill the disk, or the table of locks
#: that all sessions share. Everybody may call them by default.
_DANGEROUS = (
    r"proname ~ '^lo_|^lo(creat|_creat|read|write)|^pg_(try_)?advisory_' "
    "AND pronamespace = 'pg_catalog'::regnamespace"
)
_REVOKE_DANGEROUS = f"""DO $body$
DECLARE
    one regprocedure;
BEGIN
    FOR one IN SELECT oid::regprocedure FROM pg_proc WHERE {_DANGEROUS} LOOP
        EXECUTE format('REVOKE EXECUTE ON FUNCTION %s FROM PUBLIC', one);
    END LOOP;
END
$body$"""
_REVOKE_DATABASE = f"""DO $body$
BEGIN
    EXECUTE format('REVOKE ALL ON DATABASE %I FROM PUBLIC', current_database());
    EXECUTE format('GRANT CONNECT ON DATABASE %I TO {HOSTS}, {OPERATORS}, {VIEWERS}', current_database());
END
$body$"""


def statements() -> Iterator[str]:
    """Yield the statements that set functions, policies and grants, whatever they were before."""
    for signature, (result, language, volatility, body) in _FUNCTIONS.items():
        head = f"{signature} RETURNS {result}"
        yield _FUNCTION.format(head=head, language=language, volatility=volatility, body=body)
    yield "REVOKE ALL ON ALL FUNCTIONS IN SCHEMA guestapi FROM PUBLIC"
    for signature in _FUNCTIONS:
        name = signature.partition("(")[0]
        yield f"GRANT EXECUTE ON FUNCTION guestapi.{name} TO {OPERATORS}"
        if name in _CALLED:
            yield f"GRANT EXECUTE ON FUNCTION guestapi.{name} TO {HOSTS}"
    yield f"GRANT USAGE ON SCHEMA guestapi TO {HOSTS}, {OPERATORS}, {VIEWERS}"
    for table, mine in _READ.items():
        yield f"ALTER TABLE guestapi.{table} ENABLE ROW LEVEL SECURITY"
        rules = {"host": (HOSTS, "SELECT", mine), "viewer": (VIEWERS, "SELECT", "true")}
        rules["operator"] = (OPERATORS, "ALL" if table in _CHANGED else "SELECT", "true")
        for name, (role, command, rows) in rules.items():
            yield f"DROP POLICY IF EXISTS {name} ON guestapi.{table}"
            yield f"CREATE POLICY {name} ON guestapi.{table} FOR {command} TO {role} USING ({rows})"
            yield f"GRANT SELECT ON guestapi.{table} TO {role}"
        if table in _CHANGED:
            yield f"GRANT INSERT, UPDATE, DELETE ON guestapi.{table} TO {OPERATORS}"


def administrators_statements() -> Iterator[str]:
    """Yield the statements that only a superuser of the database may execute."""
    yield _REVOKE_DATABASE
    yield "REVOKE CREATE ON SCHEMA public FROM PUBLIC"
    yield _REVOKE_DANGEROUS
    yield f"ALTER SCHEMA guestapi OWNER TO {OWNER}"
