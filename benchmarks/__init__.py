"""The speed of guestapi, compared with other servers. `make bench` runs it; see docs/performance.md.

Rules: everything that is compared runs in turns, in one run, on the same cores, under the same load from inside a real
container, so that noise affects all equally and identification is real. Nothing here is part of the test suite.
"""
