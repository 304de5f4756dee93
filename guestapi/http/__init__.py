"""HTTP/1.1 and WebSocket frames as pure functions: bytes in, values out.

Rules: no I/O, no greenlets, no instances. `request` parses a head, `target` a request target, `body` a body, `response`
writes responses, `websocket` frames and close codes; `errors` is what they raise. `body` reads from a `Source` that is
handed to it.
"""
