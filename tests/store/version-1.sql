-- A store as version 1 of the tables had it, with one of everything.
PRAGMA journal_mode = WAL;
BEGIN TRANSACTION;
CREATE TABLE config (
	instance_id INTEGER NOT NULL, 
	"key" TEXT NOT NULL, 
	value TEXT NOT NULL, 
	PRIMARY KEY (instance_id, "key"), 
	FOREIGN KEY(instance_id) REFERENCES instances (id) ON DELETE CASCADE
);
INSERT INTO "config" VALUES(1,'user.foo','bar');
CREATE TABLE devices (
	instance_id INTEGER NOT NULL, 
	name TEXT NOT NULL, 
	definition JSON NOT NULL, 
	PRIMARY KEY (instance_id, name), 
	FOREIGN KEY(instance_id) REFERENCES instances (id) ON DELETE CASCADE
);
INSERT INTO "devices" VALUES(1,'eth0','{"type": "nic"}');
CREATE TABLE image_aliases (
	alias TEXT NOT NULL, 
	fingerprint TEXT NOT NULL, 
	PRIMARY KEY (alias), 
	FOREIGN KEY(fingerprint) REFERENCES images (fingerprint) ON DELETE CASCADE
);
INSERT INTO "image_aliases" VALUES('web','aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa');
CREATE TABLE image_files (
	fingerprint TEXT NOT NULL, 
	number INTEGER NOT NULL, 
	extension TEXT NOT NULL, 
	size INTEGER NOT NULL, 
	mtime_ns INTEGER NOT NULL, 
	PRIMARY KEY (fingerprint, number), 
	FOREIGN KEY(fingerprint) REFERENCES images (fingerprint) ON DELETE CASCADE
);
INSERT INTO "image_files" VALUES('aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa',0,'.tar.gz',3,4);
CREATE TABLE images (
	fingerprint TEXT NOT NULL, 
	type TEXT NOT NULL, 
	public BOOLEAN NOT NULL, 
	cached BOOLEAN NOT NULL, 
	created FLOAT NOT NULL, 
	PRIMARY KEY (fingerprint)
);
INSERT INTO "images" VALUES('aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa','container',1,0,1.5);
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
	init_pid INTEGER, 
	init_start_time INTEGER, 
	init_boot_id TEXT, 
	init_namespace INTEGER, 
	UNIQUE (project, name), 
	UNIQUE (uuid)
);
INSERT INTO "instances" VALUES(1,2,1,'default','c1','container','11111111-2222-3333-4444-555555555555','11111111-2222-3333-4444-555555555555',NULL,0,4242,77,'99999999-2222-3333-4444-555555555555',4026531836);
CREATE TABLE notifications (
	id INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT, 
	instance_id INTEGER NOT NULL, 
	project TEXT NOT NULL, 
	instance TEXT NOT NULL, 
	type TEXT NOT NULL, 
	timestamp TEXT NOT NULL, 
	written FLOAT NOT NULL, 
	metadata TEXT NOT NULL, 
	for_guest BOOLEAN NOT NULL
);
INSERT INTO "notifications" VALUES(1,1,'default','c1','lifecycle','2026-11-22T20:34:23.406980515Z',1.79537966340698051451e+09,'{"action":"instance-added","name":"c1","project":"default"}',0);
INSERT INTO "notifications" VALUES(2,1,'default','c1','lifecycle','2026-11-22T20:34:23.409585471Z',1.79537966340958547589e+09,'{"action":"instance-started","name":"c1","project":"default"}',0);
CREATE INDEX instances_by_namespace ON instances (init_namespace);
CREATE INDEX notifications_by_instance ON notifications (instance_id, id);
CREATE INDEX image_aliases_by_image ON image_aliases (fingerprint);
DELETE FROM "sqlite_sequence";
INSERT INTO "sqlite_sequence" VALUES('instances',1);
INSERT INTO "sqlite_sequence" VALUES('notifications',2);
COMMIT;
PRAGMA user_version = 1;
