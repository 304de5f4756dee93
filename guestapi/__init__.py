"""guestapi: one Unix socket from which every instance of a container host asks its host about itself.

The way of one request, one direction, no way back::

    server/   accept, bytes -> WSGI environ          never sees a configuration key
    callers/  a connected socket -> who is asking    alone knows /proc, pidfds and ioctls
    api/      gate -> resource -> bytes              never sees a socket
    store/    what the host says of this instance    alone knows SQL

``dialects`` alone knows that there is more than one protocol. ``model`` holds the nouns, ``settings`` the
operator's choices, ``cli`` the operator's command. docs/design.md says why.
"""

__version__ = "0.2.0"
