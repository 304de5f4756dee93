-- A store as version 8 of the tables had it: an instance with two profiles; a third profile is gone.
PRAGMA journal_mode = WAL;
BEGIN TRANSACTION;
CREATE TABLE attributes (
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
    );
CREATE TABLE config (
        instance_id INTEGER NOT NULL,
        key TEXT NOT NULL,
        layer INTEGER NOT NULL,
        -- Bytes of the value in UTF-8. It stands before it, so that a large value is not read for it.
        size INTEGER NOT NULL,
        value TEXT NOT NULL,
        PRIMARY KEY (instance_id, key, layer),
        FOREIGN KEY (instance_id) REFERENCES instances (id) ON DELETE CASCADE
    );
INSERT INTO "config" VALUES(1,'user.foo',1,3,'bar');
CREATE TABLE devices (
        instance_id INTEGER NOT NULL,
        name TEXT NOT NULL,
        layer INTEGER NOT NULL,
        definition JSON NOT NULL,
        PRIMARY KEY (instance_id, name, layer),
        FOREIGN KEY (instance_id) REFERENCES instances (id) ON DELETE CASCADE
    );
CREATE TABLE fleet (
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
    );
CREATE TABLE image_aliases (
        alias TEXT NOT NULL,
        fingerprint TEXT NOT NULL,
        PRIMARY KEY (alias),
        FOREIGN KEY (fingerprint) REFERENCES images (fingerprint) ON DELETE CASCADE
    );
CREATE TABLE image_files (
        fingerprint TEXT NOT NULL,
        number INTEGER NOT NULL,
        extension TEXT NOT NULL,
        size INTEGER NOT NULL,
        mtime_ns INTEGER NOT NULL,
        PRIMARY KEY (fingerprint, number),
        FOREIGN KEY (fingerprint) REFERENCES images (fingerprint) ON DELETE CASCADE
    );
CREATE TABLE images (
        fingerprint TEXT NOT NULL,
        type TEXT NOT NULL,
        public BOOLEAN NOT NULL,
        cached BOOLEAN NOT NULL,
        created FLOAT NOT NULL,
        -- Which source it belongs to; null: the operator's.
        source TEXT,
        PRIMARY KEY (fingerprint)
    );
CREATE TABLE instance_profiles (
        instance_id INTEGER NOT NULL,
        position INTEGER NOT NULL,
        profile_id INTEGER NOT NULL,
        PRIMARY KEY (instance_id, position),
        FOREIGN KEY (instance_id) REFERENCES instances (id) ON DELETE CASCADE,
        FOREIGN KEY (profile_id) REFERENCES profiles (id)
    );
INSERT INTO "instance_profiles" VALUES(1,0,1);
INSERT INTO "instance_profiles" VALUES(1,1,2);
CREATE TABLE instances (
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
    );
INSERT INTO "instances" VALUES(1,1,0,'default','c1','container','20aa2adb-a532-45cc-b71c-4cb3fd2323aa','20aa2adb-a532-45cc-b71c-4cb3fd2323aa',NULL,0,NULL,NULL,NULL,1,NULL,NULL,NULL,NULL,NULL,NULL,NULL);
CREATE TABLE notices (
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
    );
CREATE TABLE notification_parts (
        notification_id INTEGER NOT NULL,
        -- Its first byte's place in the metadata.
        start INTEGER NOT NULL,
        part BLOB NOT NULL,
        PRIMARY KEY (notification_id, start),
        FOREIGN KEY (notification_id) REFERENCES notifications (id) ON DELETE CASCADE
    );
CREATE TABLE notifications (
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
    );
INSERT INTO "notifications" VALUES(1,1,'default','c1','lifecycle','2026-11-27T07:31:44.533603752Z',1.7957647045336039066e+09,'{"action":"instance-added","name":"c1","project":"default"}',0,0,0);
CREATE TABLE permissions (
        project TEXT,
        instance_id INTEGER,
        feature TEXT NOT NULL,
        CHECK ((project IS NULL) <> (instance_id IS NULL)),
        FOREIGN KEY (instance_id) REFERENCES instances (id) ON DELETE CASCADE
    );
CREATE TABLE placements (
        instance_id INTEGER NOT NULL,
        epoch INTEGER NOT NULL,
        PRIMARY KEY (instance_id),
        FOREIGN KEY (instance_id) REFERENCES instances (id) ON DELETE CASCADE
    );
CREATE TABLE policies (
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
    );
CREATE TABLE profile_config (
        profile_id INTEGER NOT NULL,
        key TEXT NOT NULL,
        -- As of config.
        size INTEGER NOT NULL,
        value TEXT NOT NULL,
        PRIMARY KEY (profile_id, key),
        FOREIGN KEY (profile_id) REFERENCES profiles (id) ON DELETE CASCADE
    );
INSERT INTO "profile_config" VALUES(2,'user.role',5,'front');
CREATE TABLE profile_devices (
        profile_id INTEGER NOT NULL,
        name TEXT NOT NULL,
        definition JSON NOT NULL,
        PRIMARY KEY (profile_id, name),
        FOREIGN KEY (profile_id) REFERENCES profiles (id) ON DELETE CASCADE
    );
INSERT INTO "profile_devices" VALUES(2,'eth0','{"type": "nic"}');
CREATE TABLE profiles (
        id INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT,
        project TEXT NOT NULL,
        name TEXT NOT NULL,
        description TEXT DEFAULT '' NOT NULL,
        -- hooks.template of guestapi.toml was taken over into it: that is done once.
        has_template BOOLEAN DEFAULT 0 NOT NULL,
        UNIQUE (project, name)
    );
INSERT INTO "profiles" VALUES(1,'default','default','',0);
INSERT INTO "profiles" VALUES(2,'default','web','front',0);
CREATE TABLE source_problems (
        source TEXT NOT NULL,
        key TEXT NOT NULL,
        number INTEGER NOT NULL,
        project TEXT NOT NULL,
        name TEXT NOT NULL,
        reason TEXT NOT NULL,
        hint TEXT,
        refused BOOLEAN NOT NULL,
        PRIMARY KEY (source, key, number)
    );
CREATE TABLE sources (
        name TEXT NOT NULL,
        socket TEXT NOT NULL,
        connected BOOLEAN NOT NULL,
        contact FLOAT NOT NULL,
        lag FLOAT NOT NULL,
        fault TEXT NOT NULL,
        PRIMARY KEY (name)
    );
CREATE TABLE spends (
        instance_id INTEGER NOT NULL,
        key TEXT NOT NULL,
        spent BOOLEAN NOT NULL,
        pid INTEGER NOT NULL,
        uid INTEGER NOT NULL,
        written FLOAT NOT NULL,
        PRIMARY KEY (instance_id, key),
        FOREIGN KEY (instance_id) REFERENCES instances (id) ON DELETE CASCADE
    );
CREATE INDEX instances_by_namespace ON instances (init_namespace);
CREATE UNIQUE INDEX instances_by_source ON instances (source, source_key);
CREATE INDEX notifications_by_instance ON notifications (instance_id, id);
CREATE INDEX notifications_by_guest ON notifications (instance_id, id) WHERE by_guest = 1;
CREATE INDEX notifications_not_by_guest ON notifications (id) WHERE by_guest = 0;
CREATE UNIQUE INDEX instance_profiles_by_profile ON instance_profiles (profile_id, instance_id);
CREATE UNIQUE INDEX policies_by_scope ON policies (coalesce(project, ''), coalesce(instance_id, 0), pattern);
CREATE INDEX policies_by_instance ON policies (instance_id);
CREATE INDEX notices_by_instance ON notices (instance_id, run);
CREATE UNIQUE INDEX permissions_by_scope ON permissions (coalesce(project, ''), coalesce(instance_id, 0), feature);
CREATE INDEX permissions_by_instance ON permissions (instance_id);
CREATE INDEX image_aliases_by_image ON image_aliases (fingerprint);
DELETE FROM "sqlite_sequence";
INSERT INTO "sqlite_sequence" VALUES('profiles',3);
INSERT INTO "sqlite_sequence" VALUES('instances',1);
INSERT INTO "sqlite_sequence" VALUES('notifications',1);
COMMIT;
PRAGMA user_version = 8;
