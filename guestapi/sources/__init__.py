"""Who fills the store when nobody types: hooks of container runtimes.

Rules: one module a runtime turns what that runtime tells its hooks into a `register.Report`, and knows nothing of the
store; `register` writes it down, and knows nothing of runtimes.
"""
