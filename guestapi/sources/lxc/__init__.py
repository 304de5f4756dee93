"""LXC: containers that include conf/lxc-guestapi.conf are registered when they start.

Rules: no code here parses what LXC parses. Before the init runs, the hook rings, and `/proc` and netlink show what LXC
made of the configuration. For what was missed then, `monitor` asks the process that supervises a running container. A
monitor answers nothing while a hook runs.
"""
