"""Signed tokens that say which instance their bearer is, signed in a process of its own.

`messages` has the requests of workers and their answers; workers load nothing else of this package. `keys` is the file
of the keys, `signer` makes tokens, and `service` is the process. `keys` and `signer` need the extra ``identity`` of
pyproject.toml.
"""
