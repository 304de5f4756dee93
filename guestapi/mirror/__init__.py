"""Makes the store equal to a running Incus or LXD, in a process of its own, the only one that may talk to the daemon.

Rules: `daemon` knows the REST API, and nothing of guestapi; `sync_queue` collects from events where to look;
`translate` and `keys` are pure; `mirror` and `images` observe the daemon, and `sources.reconcile` writes the
observations. The store gets what the daemon has, never the content of an event.
"""
