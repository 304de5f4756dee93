"""Who is calling: a connected Unix socket -> `Caller`.

Rules: only this package uses /proc, pidfds, namespaces and ioctls. It trusts kernel objects alone, never a process
title, a cgroup or anything else that a guest can choose. It does not know HTTP.
"""
