"""The guest API: a WSGI application that answers one caller about one instance.

Rules: it reads the `Caller` from the environ and never sees a socket; `guestapi.wsgi` is all that it shares with the
server. Each request passes the gate first, then reaches the resource of its endpoint. Errors are exceptions, rendered
in one place. What differs between dialects comes from `dialects.Dialect`, as data.
"""
