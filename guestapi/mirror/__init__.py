"""Keeps the store as a running Incus or LXD is, in a process of its own that alone may speak to the daemon.

Rules: `daemon` knows the REST API, and nothing of us; `sync_queue` turns events into where to look; `translate` and
`keys` are pure; `mirror` and `images` look at the daemon, and what they see is written by `sources.reconcile`. What is
written is always what the daemon has, never what an event says.
"""
