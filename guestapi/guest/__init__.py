"""Programs that run in instances.

Rules: each is one file of Python's standard library, for Python 3.6 and newer, that is copied into an instance and
imports nothing of this package. It speaks the guest API alone, so it also works where Incus or LXD serves the API.
"""
