# gunicorn's settings for guestapi: any of https://docs.gunicorn.org/en/stable/settings.html, except the sockets, the
# worker class and the logger class. 'systemctl reload guestapi' has the service read them.

# Worker processes. One answers thousands of requests a second. With two, one answers while the other is replaced.
# Default: 2.
workers = 2

# The most connections of one worker, of all instances together. Default: 10000.
worker_connections = 10000

# Seconds without a heartbeat after which a worker is killed and replaced. Default: 10.
timeout = 10

# Seconds after which a stopping worker is killed. Requests in progress have half of that. No request is lost when a
# worker stops: it answers the next one with 'Connection: close'. Must be well below WatchdogSec= and TimeoutStopSec= of
# the unit. Default: 4.
graceful_timeout = 4

# Requests after which a worker is replaced, and by how many to vary that; 0 is never. Default: 0.
max_requests = 0
max_requests_jitter = 0

# gunicorn's own access log, a file or "-" for standard output, in addition to [log] in guestapi.toml. Default: None.
accesslog = None
