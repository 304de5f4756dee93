-- A store as version 3 of the tables had it: instances that were added by hand, by followers with hooks.template, and
-- by the mirror of Incus.
PRAGMA journal_mode = WAL;
BEGIN TRANSACTION;
CREATE TABLE config (
	instance_id INTEGER NOT NULL, 
	"key" TEXT NOT NULL, 
	layer INTEGER NOT NULL, 
	size INTEGER NOT NULL, 
	value TEXT NOT NULL, 
	PRIMARY KEY (instance_id, "key", layer), 
	FOREIGN KEY(instance_id) REFERENCES instances (id) ON DELETE CASCADE
);
INSERT INTO "config" VALUES(1,'user.a',1,1,'1');
INSERT INTO "config" VALUES(2,'user.by',0,8,'template');
INSERT INTO "config" VALUES(2,'user.role',0,4,'none');
INSERT INTO "config" VALUES(3,'user.by',0,8,'template');
INSERT INTO "config" VALUES(3,'user.role',0,4,'none');
INSERT INTO "config" VALUES(4,'user.by',0,8,'template');
INSERT INTO "config" VALUES(4,'user.role',0,8,'frontend');
INSERT INTO "config" VALUES(5,'user.m',0,1,'1');
INSERT INTO "config" VALUES(3,'user.role',1,2,'db');
CREATE TABLE devices (
	instance_id INTEGER NOT NULL, 
	name TEXT NOT NULL, 
	layer INTEGER NOT NULL, 
	definition JSON NOT NULL, 
	PRIMARY KEY (instance_id, name, layer), 
	FOREIGN KEY(instance_id) REFERENCES instances (id) ON DELETE CASCADE
);
INSERT INTO "devices" VALUES(2,'eth0',0,'{"name": "eth0", "type": "nic"}');
CREATE TABLE image_aliases (
	alias TEXT NOT NULL, 
	fingerprint TEXT NOT NULL, 
	PRIMARY KEY (alias), 
	FOREIGN KEY(fingerprint) REFERENCES images (fingerprint) ON DELETE CASCADE
);
CREATE TABLE image_files (
	fingerprint TEXT NOT NULL, 
	number INTEGER NOT NULL, 
	extension TEXT NOT NULL, 
	size INTEGER NOT NULL, 
	mtime_ns INTEGER NOT NULL, 
	PRIMARY KEY (fingerprint, number), 
	FOREIGN KEY(fingerprint) REFERENCES images (fingerprint) ON DELETE CASCADE
);
CREATE TABLE images (
	fingerprint TEXT NOT NULL, 
	type TEXT NOT NULL, 
	public BOOLEAN NOT NULL, 
	cached BOOLEAN NOT NULL, 
	created FLOAT NOT NULL, 
	source TEXT, 
	PRIMARY KEY (fingerprint)
);
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
	source TEXT, 
	source_key TEXT, 
	hostname TEXT, 
	kept BOOLEAN DEFAULT 0 NOT NULL, 
	acknowledged_ready BOOLEAN, 
	init_pid INTEGER, 
	init_start_time INTEGER, 
	init_boot_id TEXT, 
	init_namespace INTEGER, 
	init_root_uid INTEGER, 
	init_user_namespace INTEGER, 
	UNIQUE (project, name), 
	UNIQUE (uuid)
);
INSERT INTO "instances" VALUES(1,1,0,'default','hand','container','f6c594e1-b4b6-47d6-a469-9204b2a5fd9d','f6c594e1-b4b6-47d6-a469-9204b2a5fd9d',NULL,0,NULL,NULL,NULL,1,NULL,NULL,NULL,NULL,NULL,NULL,NULL);
INSERT INTO "instances" VALUES(2,1,1,'default','web','container','66106b3c-9c93-4d0a-a123-704030e4099a','66106b3c-9c93-4d0a-a123-704030e4099a',NULL,0,'lxc','/var/lib/lxc web',NULL,0,NULL,100,1,'boot',4026531100,NULL,NULL);
INSERT INTO "instances" VALUES(3,2,1,'default','db','container','404912df-72db-43d2-ab5d-aea6fb3499e3','404912df-72db-43d2-ab5d-aea6fb3499e3',NULL,0,'lxc','/var/lib/lxc db',NULL,0,NULL,101,1,'boot',4026531101,NULL,NULL);
INSERT INTO "instances" VALUES(4,1,1,'shop','web','container','9c9b52c0-4dad-4906-a770-3336bd5f1b09','9c9b52c0-4dad-4906-a770-3336bd5f1b09',NULL,0,'podman','ffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff',NULL,0,NULL,102,1,'boot',4026531102,NULL,NULL);
INSERT INTO "instances" VALUES(5,1,1,'default','m1','container','0b6f5c4e-8f6c-4d06-9d3b-0d6a6f6c7d11','0b6f5c4e-8f6c-4d06-9d3b-0d6a6f6c7d11',NULL,0,'incus','0b6f5c4e-8f6c-4d06-9d3b-0d6a6f6c7d11',NULL,0,NULL,103,1,'boot',4026531103,NULL,NULL);
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
	by_guest BOOLEAN DEFAULT 0 NOT NULL
);
INSERT INTO "notifications" VALUES(1,1,'default','hand','lifecycle','2026-11-26T05:18:48.893660015Z',1.79567032889365983013e+09,'{"action":"instance-added","name":"hand","project":"default"}',0,0);
INSERT INTO "notifications" VALUES(2,2,'default','web','lifecycle','2026-11-26T05:18:48.901435238Z',1.79567032890143513674e+09,'{"action":"instance-added","name":"web","project":"default"}',0,0);
INSERT INTO "notifications" VALUES(3,2,'default','web','lifecycle','2026-11-26T05:18:48.901435238Z',1.79567032890143513674e+09,'{"action":"instance-started","name":"web","project":"default"}',0,0);
INSERT INTO "notifications" VALUES(4,3,'default','db','lifecycle','2026-11-26T05:18:48.902806114Z',1.7956703289028060436e+09,'{"action":"instance-added","name":"db","project":"default"}',0,0);
INSERT INTO "notifications" VALUES(5,3,'default','db','lifecycle','2026-11-26T05:18:48.902806114Z',1.7956703289028060436e+09,'{"action":"instance-started","name":"db","project":"default"}',0,0);
INSERT INTO "notifications" VALUES(6,4,'shop','web','lifecycle','2026-11-26T05:18:48.924618299Z',1.79567032892461824421e+09,'{"action":"instance-added","name":"web","project":"shop"}',0,0);
INSERT INTO "notifications" VALUES(7,4,'shop','web','lifecycle','2026-11-26T05:18:48.924618299Z',1.79567032892461824421e+09,'{"action":"instance-started","name":"web","project":"shop"}',0,0);
INSERT INTO "notifications" VALUES(8,5,'default','m1','lifecycle','2026-11-26T05:18:48.926023787Z',1.79567032892602372173e+09,'{"action":"instance-added","name":"m1","project":"default"}',0,0);
INSERT INTO "notifications" VALUES(9,5,'default','m1','lifecycle','2026-11-26T05:18:48.926023787Z',1.79567032892602372173e+09,'{"action":"instance-started","name":"m1","project":"default"}',0,0);
INSERT INTO "notifications" VALUES(10,3,'default','db','config','2026-11-26T05:18:48.933398762Z',1.79567032893339872359e+09,'{"key":"user.role","old_value":"none","value":"db"}',1,0);
CREATE TABLE source_problems (
	source TEXT NOT NULL, 
	"key" TEXT NOT NULL, 
	number INTEGER NOT NULL, 
	project TEXT NOT NULL, 
	name TEXT NOT NULL, 
	reason TEXT NOT NULL, 
	hint TEXT, 
	refused BOOLEAN NOT NULL, 
	PRIMARY KEY (source, "key", number)
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
INSERT INTO "sources" VALUES('lxc','/run/guestapi/sources/lxc.sock',1,1764000000.5,0.25,'');
CREATE INDEX instances_by_namespace ON instances (init_namespace);
CREATE UNIQUE INDEX instances_by_source ON instances (source, source_key);
CREATE INDEX notifications_by_guest ON notifications (instance_id, id) WHERE by_guest = 1;
CREATE INDEX notifications_by_instance ON notifications (instance_id, id);
CREATE INDEX notifications_not_by_guest ON notifications (id) WHERE by_guest = 0;
CREATE INDEX image_aliases_by_image ON image_aliases (fingerprint);
DELETE FROM "sqlite_sequence";
INSERT INTO "sqlite_sequence" VALUES('instances',5);
INSERT INTO "sqlite_sequence" VALUES('notifications',10);

COMMIT;
PRAGMA user_version = 3;
