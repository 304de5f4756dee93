"""The change log -> the listeners of this worker: each event once, in the order of commits.

Rules: pure of sockets, greenlets and HTTP. `events` says how an event is written, once for all its listeners.
`broker` reads the log and hands events to listeners; whoever serves a listener is woken by a callback.
"""
