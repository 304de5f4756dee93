"""The tables of the database, as the statements that make them."""

from __future__ import annotations

#: Kept in SQLite's ``user_version``. Grows with every change of the tables.
VERSION = 9
#: Bytes of a part of an entry's metadata, and of the largest metadata that is not divided.
PART_BYTES = 64 * 1024
#: How much of large metadata stands in the entry itself: it names the key, which has 1,024 bytes, six for each in JSON.
BEGINNING_BYTES = 8 * 1024

#: For each table, in an order in which they can be made: the statement that makes it.
TABLES = {
    "images": """CREATE TABLE images (
        fingerprint TEXT NOT NULL,
        type TEXT NOT NULL,
        public BOOLEAN NOT NULL,
        cached BOOLEAN NOT NULL,
        created FLOAT NOT NULL,
        -- Which source it belongs to; null: the operator's.
        source TEXT,
        PRIMARY KEY (fingerprint)
    )""",
    # AUTOINCREMENT: an id is never given to another instance, since a worker may still hold what it knows of the old
    # one.
    "instances": """CREATE TABLE instances (
        id INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT,
        revision INTEGER NOT NULL,
        run INTEGER NOT NULL,
        project TEXT NOT NULL,
        name TEXT NOT NULL,
        type TEXT NOT NULL,
        uuid TEXT NOT NULL,
        cloud_init_id TEXT NOT NULL,
        location TEXT,
        ready BOOLEAN NOT NULL,
        -- Which source it belongs to, and the source's own key of it. No source: it was added by hand. A source without
        -- a key: it was released, since the source has no such container any more.
        source TEXT,
        source_key TEXT,
        -- The host name inside, where it is not the instance's name.
        hostname TEXT,
        -- It stays when its source has it no more, although it has no configuration of the operator's.
        kept BOOLEAN DEFAULT 0 NOT NULL,
        -- What its source's daemon is known to hold of its readiness; null: nothing is known.
        acknowledged_ready BOOLEAN,
        -- The identity of a running instance: model.Init. The first four are all set, or none; the others may be
        -- unknown.
        init_pid INTEGER,
        init_start_time INTEGER,
        init_boot_id TEXT,
        init_namespace INTEGER,
        init_root_uid INTEGER,
        init_user_namespace INTEGER,
        UNIQUE (project, name),
        UNIQUE (uuid)
    )""",
    # The change log: ids are in the order of commits, without holes. No foreign key: it tells of instances that are
    # gone.
    "notifications": """CREATE TABLE notifications (
        id INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT,
        instance_id INTEGER NOT NULL,
        project TEXT NOT NULL,
        instance TEXT NOT NULL,
        type TEXT NOT NULL,
        timestamp TEXT NOT NULL,
        written FLOAT NOT NULL,
        metadata TEXT NOT NULL,
        for_guest BOOLEAN NOT NULL,
        -- The instance itself caused it. Such entries are limited for each instance, so that none drives out another's.
        by_guest BOOLEAN DEFAULT 0 NOT NULL,
        -- Bytes of the metadata in notification_parts, of which only the beginning stands here; 0: all is here.
        parts_size INTEGER DEFAULT 0 NOT NULL
    )""",
    # Large metadata in pieces, so that a worker reads as much of it at a time as it can send.
    "notification_parts": """CREATE TABLE notification_parts (
        notification_id INTEGER NOT NULL,
        -- Its first byte's place in the metadata.
        start INTEGER NOT NULL,
        part BLOB NOT NULL,
        PRIMARY KEY (notification_id, start),
        FOREIGN KEY (notification_id) REFERENCES notifications (id) ON DELETE CASCADE
    )""",
    # What could not be taken over from a source: model.Problem. Replaced whole for each key.
    "source_problems": """CREATE TABLE source_problems (
        source TEXT NOT NULL,
        key TEXT NOT NULL,
        number INTEGER NOT NULL,
        project TEXT NOT NULL,
        name TEXT NOT NULL,
        reason TEXT NOT NULL,
        hint TEXT,
        refused BOOLEAN NOT NULL,
        PRIMARY KEY (source, key, number)
    )""",
    # How the sources of instances are: model.SourceStatus.
    "sources": """CREATE TABLE sources (
        name TEXT NOT NULL,
        socket TEXT NOT NULL,
        connected BOOLEAN NOT NULL,
        contact FLOAT NOT NULL,
        lag FLOAT NOT NULL,
        fault TEXT NOT NULL,
        PRIMARY KEY (name)
    )""",
    # Named sets of configuration and devices that instances share. AUTOINCREMENT as of instances: a writer that knew a
    # profile does not change another one.
    "profiles": """CREATE TABLE profiles (
        id INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT,
        project TEXT NOT NULL,
        name TEXT NOT NULL,
        description TEXT DEFAULT '' NOT NULL,
        -- hooks.template of guestapi.toml was taken over into it: that is done once.
        has_template BOOLEAN DEFAULT 0 NOT NULL,
        -- The fleet's key of it; null: it is this host's own. Of a fleet, those are here that placed instances have.
        uuid TEXT,
        UNIQUE (uuid)
    )""",
    "profile_config": """CREATE TABLE profile_config (
        profile_id INTEGER NOT NULL,
        key TEXT NOT NULL,
        -- As of config.
        size INTEGER NOT NULL,
        value TEXT NOT NULL,
        PRIMARY KEY (profile_id, key),
        FOREIGN KEY (profile_id) REFERENCES profiles (id) ON DELETE CASCADE
    )""",
    "profile_devices": """CREATE TABLE profile_devices (
        profile_id INTEGER NOT NULL,
        name TEXT NOT NULL,
        definition JSON NOT NULL,
        PRIMARY KEY (profile_id, name),
        FOREIGN KEY (profile_id) REFERENCES profiles (id) ON DELETE CASCADE
    )""",
    # Which profiles an instance has; the one with the greatest position is the strongest of them. A profile that an
    # instance has is not removed, so nothing cascades from there.
    "instance_profiles": """CREATE TABLE instance_profiles (
        instance_id INTEGER NOT NULL,
        position INTEGER NOT NULL,
        profile_id INTEGER NOT NULL,
        PRIMARY KEY (instance_id, position),
        FOREIGN KEY (instance_id) REFERENCES instances (id) ON DELETE CASCADE,
        FOREIGN KEY (profile_id) REFERENCES profiles (id)
    )""",
    # Both in layers (store.layers): the source's, and the operator's, which wins. Profiles are weaker than both.
    "config": """CREATE TABLE config (
        instance_id INTEGER NOT NULL,
        key TEXT NOT NULL,
        layer INTEGER NOT NULL,
        -- Bytes of the value in UTF-8. It stands before it, so that a large value is not read for it.
        size INTEGER NOT NULL,
        value TEXT NOT NULL,
        PRIMARY KEY (instance_id, key, layer),
        FOREIGN KEY (instance_id) REFERENCES instances (id) ON DELETE CASCADE
    )""",
    "devices": """CREATE TABLE devices (
        instance_id INTEGER NOT NULL,
        name TEXT NOT NULL,
        layer INTEGER NOT NULL,
        definition JSON NOT NULL,
        PRIMARY KEY (instance_id, name, layer),
        FOREIGN KEY (instance_id) REFERENCES instances (id) ON DELETE CASCADE
    )""",
    "image_aliases": """CREATE TABLE image_aliases (
        alias TEXT NOT NULL,
        fingerprint TEXT NOT NULL,
        PRIMARY KEY (alias),
        FOREIGN KEY (fingerprint) REFERENCES images (fingerprint) ON DELETE CASCADE
    )""",
    # One or two an image: model.Image.files.
    "image_files": """CREATE TABLE image_files (
        fingerprint TEXT NOT NULL,
        number INTEGER NOT NULL,
        extension TEXT NOT NULL,
        size INTEGER NOT NULL,
        mtime_ns INTEGER NOT NULL,
        PRIMARY KEY (fingerprint, number),
        FOREIGN KEY (fingerprint) REFERENCES images (fingerprint) ON DELETE CASCADE
    )""",
    # What the operator has decided about keys (model.KeyPolicy), of a project or of one instance.
    "policies": """CREATE TABLE policies (
        id INTEGER NOT NULL PRIMARY KEY,
        project TEXT,
        instance_id INTEGER,
        pattern TEXT NOT NULL,
        hidden BOOLEAN NOT NULL,
        secret BOOLEAN NOT NULL,
        once BOOLEAN NOT NULL,
        -- JSON: a sorted list.
        uids TEXT NOT NULL,
        CHECK ((project IS NULL) <> (instance_id IS NULL)),
        FOREIGN KEY (instance_id) REFERENCES instances (id) ON DELETE CASCADE
    )""",
    # To whom the value of a key was given that is given once, and whether it counts as unset since.
    "spends": """CREATE TABLE spends (
        instance_id INTEGER NOT NULL,
        key TEXT NOT NULL,
        spent BOOLEAN NOT NULL,
        pid INTEGER NOT NULL,
        uid INTEGER NOT NULL,
        written FLOAT NOT NULL,
        PRIMARY KEY (instance_id, key),
        FOREIGN KEY (instance_id) REFERENCES instances (id) ON DELETE CASCADE
    )""",
    # What was announced to instances (store.notices): for one run of an instance.
    "notices": """CREATE TABLE notices (
        id TEXT NOT NULL,
        instance_id INTEGER NOT NULL,
        run INTEGER NOT NULL,
        type TEXT NOT NULL,
        text TEXT NOT NULL,
        -- In seconds of Unix time, as the clock was then; and in seconds since that boot, which count.
        not_before FLOAT NOT NULL,
        boot_id TEXT NOT NULL,
        due FLOAT NOT NULL,
        acknowledged BOOLEAN NOT NULL,
        PRIMARY KEY (id),
        FOREIGN KEY (instance_id) REFERENCES instances (id) ON DELETE CASCADE
    )""",
    # The fleet that this host follows (store.placements): one row, or none.
    "fleet": """CREATE TABLE fleet (
        number INTEGER NOT NULL PRIMARY KEY CHECK (number = 1),
        id TEXT NOT NULL,
        -- Up to where the store is as the fleet's database: every change of this host up to this revision.
        timeline INTEGER NOT NULL,
        revision INTEGER NOT NULL,
        -- How the follower is, as of sources.
        connected BOOLEAN DEFAULT 0 NOT NULL,
        contact FLOAT DEFAULT 0 NOT NULL,
        lag FLOAT DEFAULT 0 NOT NULL,
        fault TEXT DEFAULT '' NOT NULL
    )""",
    # Instances whose configuration is the fleet's: it stands in the operator's layer.
    "placements": """CREATE TABLE placements (
        instance_id INTEGER NOT NULL,
        epoch INTEGER NOT NULL,
        PRIMARY KEY (instance_id),
        FOREIGN KEY (instance_id) REFERENCES instances (id) ON DELETE CASCADE
    )""",
    # What the operator allows the instances of a project, or one instance (store.permissions).
    "permissions": """CREATE TABLE permissions (
        project TEXT,
        instance_id INTEGER,
        feature TEXT NOT NULL,
        CHECK ((project IS NULL) <> (instance_id IS NULL)),
        FOREIGN KEY (instance_id) REFERENCES instances (id) ON DELETE CASCADE
    )""",
    # What instances say of themselves (store.attributes).
    "attributes": """CREATE TABLE attributes (
        instance_id INTEGER NOT NULL,
        -- NAMESPACE/KEY.
        path TEXT NOT NULL,
        -- Bytes of the value. It stands before it, so that the value is not read for it.
        size INTEGER NOT NULL,
        -- When it was written last, in seconds of Unix time.
        written FLOAT NOT NULL,
        value BLOB NOT NULL,
        PRIMARY KEY (instance_id, path),
        FOREIGN KEY (instance_id) REFERENCES instances (id) ON DELETE CASCADE
    )""",
}

#: For each index: the statement that makes it. The two on who caused an entry answer what trimming asks for without a
#: look at the entries themselves, which may be large.
INDEXES = {
    "instances_by_namespace": "CREATE INDEX instances_by_namespace ON instances (init_namespace)",
    "instances_by_source": "CREATE UNIQUE INDEX instances_by_source ON instances (source, source_key)",
    "notifications_by_instance": "CREATE INDEX notifications_by_instance ON notifications (instance_id, id)",
    "notifications_by_guest": (
        "CREATE INDEX notifications_by_guest ON notifications (instance_id, id) WHERE by_guest = 1"
    ),
    "notifications_not_by_guest": "CREATE INDEX notifications_not_by_guest ON notifications (id) WHERE by_guest = 0",
    # The fleet's may have the same names as this host's own.
    "profiles_by_name": "CREATE UNIQUE INDEX profiles_by_name ON profiles (project, name) WHERE uuid IS NULL",
    "instance_profiles_by_profile": (
        "CREATE UNIQUE INDEX instance_profiles_by_profile ON instance_profiles (profile_id, instance_id)"
    ),
    "policies_by_scope": (
        "CREATE UNIQUE INDEX policies_by_scope ON policies (coalesce(project, ''), coalesce(instance_id, 0), pattern)"
    ),
    "policies_by_instance": "CREATE INDEX policies_by_instance ON policies (instance_id)",
    "notices_by_instance": "CREATE INDEX notices_by_instance ON notices (instance_id, run)",
    "permissions_by_scope": (
        "CREATE UNIQUE INDEX permissions_by_scope "
        "ON permissions (coalesce(project, ''), coalesce(instance_id, 0), feature)"
    ),
    "permissions_by_instance": "CREATE INDEX permissions_by_instance ON permissions (instance_id)",
    "image_aliases_by_image": "CREATE INDEX image_aliases_by_image ON image_aliases (fingerprint)",
}
