"""Virtual machines: connections over vsock(7), brought to the workers.

Rules: the relay is the only process that listens on AF_VSOCK. It reads nothing that a guest sends, and knows neither
store nor HTTP.
"""
