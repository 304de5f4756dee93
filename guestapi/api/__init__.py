"""The guest API: a WSGI application that answers one caller about one instance.

Rules: it finds the `Caller` in the environ and never sees a socket. Each request goes through the gate first, then to
the resource of its endpoint; errors are exceptions, rendered in one place. What differs between dialects comes from
`dialects.Dialect`, as data.
"""
