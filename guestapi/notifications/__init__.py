"""The change log -> the subscriptions of this worker: each event once, in the order of commits.

Rules: no sockets, no greenlets, no HTTP. `events` writes an event, once for all subscriptions. `broker` reads the
change log and delivers each event to every `subscription` that it is for. A callback wakes whoever serves that one.
"""
