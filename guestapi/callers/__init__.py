"""Who is calling: a connected Unix socket -> `Caller`.

Rules: only this room knows /proc, pidfds, namespaces and ioctls. It believes kernel objects alone, never a process
title, a cgroup or anything else that a guest can choose. It does not know HTTP.
"""
