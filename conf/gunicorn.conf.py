# gunicorn's settings for guestapi: any of https://docs.gunicorn.org/en/stable/settings.html but the sockets, the
# worker class and the logger class. 'systemctl reload guestapi' makes the service use them.

# Processes that answer. One answers thousands of requests a second; two let one be replaced while the other works.
# Default: 2.
workers = 2

# Connections that one worker holds at the most, all instances together. Default: 10000.
worker_connections = 10000

# Seconds without a sign of life after which a worker is killed and replaced. Default: 10.
timeout = 10

# Seconds after which a stopping worker is killed. It gives requests under way half of that. Clients notice nothing of a
# stop: their next request is answered with 'Connection: close'. Must be well below WatchdogSec= and TimeoutStopSec= of
# the unit. Default: 4.
graceful_timeout = 4

# Requests after which a worker is replaced, and by how much to vary that; 0 is never. Default: 0.
max_requests = 0
max_requests_jitter = 0

# gunicorn's own access log, a file or "-" for standard output, besides what [log] in guestapi.toml does. Default: None.
accesslog = None
