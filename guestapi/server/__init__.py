"""A gunicorn worker on gevent with a connection loop of its own.

Rules: this room turns bytes into a WSGI environ and an answer into bytes; it knows nothing of instances' data. `http`
is the protocol as pure functions, without I/O; `connection` is one connection's loop; `worker` is a process full of
them; `master` starts and watches workers; `systemd` is what is said to and heard from systemd.

Nothing of the standard library is monkey-patched: whatever may block in a worker runs in gevent's thread pool, in
plain sight.
"""
