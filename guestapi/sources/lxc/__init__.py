"""LXC: containers that include conf/lxc-guestapi.conf are registered when they start.

Rules: what LXC parses, nobody parses here. Before the init runs, `doorbell` rings, and `/proc` and netlink say what
LXC made of the configuration. `monitor` asks the process that looks after a running container for what was missed
then; it answers nobody while a hook runs.
"""
