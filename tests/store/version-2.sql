-- A store as version 2 of the tables had it, with one of everything: instances that were added by hand, by the hooks
-- of LXC and of OCI runtimes (with and without a name), and by the mirror of Incus.
PRAGMA journal_mode = WAL;
BEGIN TRANSACTION;
CREATE TABLE config (
	instance_id INTEGER NOT NULL, 
	"key" TEXT NOT NULL, 
	value TEXT NOT NULL, 
	PRIMARY KEY (instance_id, "key"), 
	FOREIGN KEY(instance_id) REFERENCES instances (id) ON DELETE CASCADE
);
INSERT INTO "config" VALUES(1,'user.a','1');
INSERT INTO "config" VALUES(2,'user.template','x');
INSERT INTO "config" VALUES(2,'user.role','frontend');
INSERT INTO "config" VALUES(3,'user.from-annotation','yes');
INSERT INTO "config" VALUES(5,'user.m','1');
INSERT INTO "config" VALUES(5,'security.guestapi','true');
CREATE TABLE devices (
	instance_id INTEGER NOT NULL, 
	name TEXT NOT NULL, 
	definition JSON NOT NULL, 
	PRIMARY KEY (instance_id, name), 
	FOREIGN KEY(instance_id) REFERENCES instances (id) ON DELETE CASCADE
);
INSERT INTO "devices" VALUES(1,'gpu','{"pci": "0000:01:00.0", "type": "gpu"}');
INSERT INTO "devices" VALUES(2,'data','{"path": "/data", "readonly": "true", "source": "/srv/data", "type": "disk"}');
INSERT INTO "devices" VALUES(2,'eth0','{"hwaddr": "00:16:3e:00:00:01", "name": "eth0", "nictype": "bridged", "parent": "br0", "type": "nic"}');
INSERT INTO "devices" VALUES(2,'root','{"path": "/", "type": "disk"}');
INSERT INTO "devices" VALUES(2,'gpu','{"type": "gpu"}');
INSERT INTO "devices" VALUES(5,'eth0','{"network": "lo", "type": "nic"}');
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
INSERT INTO "image_files" VALUES('aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa',0,'.tar.gz',10,1);
CREATE TABLE images (
	fingerprint TEXT NOT NULL, 
	type TEXT NOT NULL, 
	public BOOLEAN NOT NULL, 
	cached BOOLEAN NOT NULL, 
	created FLOAT NOT NULL, 
	source TEXT, 
	PRIMARY KEY (fingerprint)
);
INSERT INTO "images" VALUES('aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa','container',1,0,1764000000.0,NULL);
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
	told_ready BOOLEAN, 
	init_pid INTEGER, 
	init_start_time INTEGER, 
	init_boot_id TEXT, 
	init_namespace INTEGER, 
	UNIQUE (project, name), 
	UNIQUE (uuid)
);
INSERT INTO "instances" VALUES(1,1,0,'default','hand','container','00000000-0000-4000-8000-000000000001','00000000-0000-4000-8000-000000000001',NULL,0,NULL,NULL,NULL,NULL,NULL,NULL);
INSERT INTO "instances" VALUES(2,4,1,'default','web','container','00000000-0000-4000-8000-000000000002','00000000-0000-4000-8000-000000000002',NULL,0,NULL,NULL,4101,777,'2f0d1f2e-0000-4000-8000-000000000001',4026532001);
INSERT INTO "instances" VALUES(3,2,1,'default','db','container','00000000-0000-4000-8000-000000000003','00000000-0000-4000-8000-000000000003',NULL,0,NULL,NULL,4102,778,'2f0d1f2e-0000-4000-8000-000000000001',4026532002);
INSERT INTO "instances" VALUES(4,2,1,'default','9f86d081884c','container','00000000-0000-4000-8000-000000000004','00000000-0000-4000-8000-000000000004',NULL,0,NULL,NULL,4103,779,'2f0d1f2e-0000-4000-8000-000000000001',4026532003);
INSERT INTO "instances" VALUES(5,4,1,'default','m1','container','00000000-0000-4000-8000-000000000005','00000000-0000-4000-8000-000000000006','n1',1,'incus',1,4104,780,'2f0d1f2e-0000-4000-8000-000000000001',4026532004);
CREATE TABLE mirrors (
	name TEXT NOT NULL, 
	socket TEXT NOT NULL, 
	connected BOOLEAN NOT NULL, 
	contact FLOAT NOT NULL, 
	lag FLOAT NOT NULL, 
	fault TEXT NOT NULL, 
	PRIMARY KEY (name)
);
INSERT INTO "mirrors" VALUES('incus','/var/lib/incus/unix.socket',1,1764000000.5,0.25,'why');
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
INSERT INTO "notifications" VALUES(1,1,'default','hand','lifecycle','2026-11-26T00:48:45.817976204Z',1.79565412581797623639e+09,'{"action":"instance-added","name":"hand","project":"default"}',0);
INSERT INTO "notifications" VALUES(2,2,'default','web','lifecycle','2026-11-26T00:48:45.820886717Z',1.79565412582088685042e+09,'{"action":"instance-added","name":"web","project":"default"}',0);
INSERT INTO "notifications" VALUES(3,2,'default','web','lifecycle','2026-11-26T00:48:45.822661202Z',1.79565412582266116145e+09,'{"action":"instance-started","name":"web","project":"default"}',0);
INSERT INTO "notifications" VALUES(4,2,'default','web','config','2026-11-26T00:48:45.82333262Z',1.79565412582333254814e+09,'{"key":"user.role","old_value":"","value":"frontend"}',1);
INSERT INTO "notifications" VALUES(5,2,'default','web','device','2026-11-26T00:48:45.823956516Z',1.79565412582395648958e+09,'{"action":"added","config":{"type":"gpu"},"name":"gpu"}',1);
INSERT INTO "notifications" VALUES(6,3,'default','db','lifecycle','2026-11-26T00:48:45.824920989Z',1.79565412582492113114e+09,'{"action":"instance-added","name":"db","project":"default"}',0);
INSERT INTO "notifications" VALUES(7,3,'default','db','lifecycle','2026-11-26T00:48:45.825367883Z',1.79565412582536768917e+09,'{"action":"instance-started","name":"db","project":"default"}',0);
INSERT INTO "notifications" VALUES(8,4,'default','9f86d081884c','lifecycle','2026-11-26T00:48:45.827413471Z',1.79565412582741355893e+09,'{"action":"instance-added","name":"9f86d081884c","project":"default"}',0);
INSERT INTO "notifications" VALUES(9,4,'default','9f86d081884c','lifecycle','2026-11-26T00:48:45.827899373Z',1.79565412582789945606e+09,'{"action":"instance-started","name":"9f86d081884c","project":"default"}',0);
INSERT INTO "notifications" VALUES(10,5,'default','m1','lifecycle','2026-11-26T00:48:45.828940399Z',1.7956541258289403915e+09,'{"action":"instance-added","name":"m1","project":"default"}',0);
INSERT INTO "notifications" VALUES(11,5,'default','m1','config','2026-11-26T00:48:45.830874051Z',1.79565412583087420468e+09,'{"key":"security.guestapi","old_value":"","value":"true"}',0);
INSERT INTO "notifications" VALUES(12,5,'default','m1','config','2026-11-26T00:48:45.830874051Z',1.79565412583087420468e+09,'{"key":"user.m","old_value":"","value":"1"}',0);
INSERT INTO "notifications" VALUES(13,5,'default','m1','device','2026-11-26T00:48:45.830874051Z',1.79565412583087420468e+09,'{"action":"added","config":{"network":"lo","type":"nic"},"name":"eth0"}',0);
INSERT INTO "notifications" VALUES(14,5,'default','m1','lifecycle','2026-11-26T00:48:45.831931181Z',1.79565412583193111419e+09,'{"action":"instance-started","name":"m1","project":"default"}',0);
INSERT INTO "notifications" VALUES(15,5,'default','m1','lifecycle','2026-11-26T00:48:45.833902189Z',1.79565412583390212057e+09,'{"action":"instance-ready","name":"m1","project":"default"}',0);
CREATE INDEX instances_by_namespace ON instances (init_namespace);
CREATE INDEX notifications_by_instance ON notifications (instance_id, id);
CREATE INDEX image_aliases_by_image ON image_aliases (fingerprint);
DELETE FROM "sqlite_sequence";
INSERT INTO "sqlite_sequence" VALUES('instances',5);
INSERT INTO "sqlite_sequence" VALUES('notifications',15);
COMMIT;
PRAGMA user_version = 2;
