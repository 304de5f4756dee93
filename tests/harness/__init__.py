"""What tests stand on: real unprivileged containers, the real service as an unprivileged user, raw exchanges."""
