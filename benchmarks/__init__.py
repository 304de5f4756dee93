"""How fast guestapi is, measured beside what its speed is compared with. `make bench` runs it; see docs/performance.md.

Rules: everything that is compared is run in turns, in one go, on the same cores, by the same load from inside a real
container, so that noise meets all alike and identity is real. Nothing here is part of the test suite.
"""
