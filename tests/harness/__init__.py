"""The harness of the tests: real unprivileged containers, the real service as an unprivileged user, raw exchanges."""
