"""Sources: registers the containers of each runtime as instances, without an operator's command.

Rules: a source observes its runtime and returns `Observed` instances; it does not use the store. `reconcile` makes the
store equal to what was observed, and is the same for all sources, the mirrors included. A hook only rings the doorbell
of its `Follower`, which then looks at the container itself.
"""
