"""A gunicorn worker on gevent with a connection loop of its own.

Rules: this package turns bytes into a WSGI environ and a response into bytes; it knows nothing of instances' data.
`arbiter` starts and watches workers; `worker` is one of them. `acceptor` accepts connections, `admission` admits them,
`scheduler` decides who is served next, `connection` is one connection's conversation over its `transport`.

Nothing of the standard library is monkey-patched: whatever may block in a worker runs in a thread, visibly.
"""
