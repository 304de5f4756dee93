"""The store: what the host says about its instances, and the log of every change.

Rules: only this package knows SQL. A writer (`writing`) opens a transaction (`transaction`); the functions of `steps`,
`image_steps` and `statuses` change it, and write the new state and the change log together or not at all. `lookup`
queries an open store; `reading` is the workers' cache, and never waits for a writer. `tables` defines the tables,
`migrations` creates and upgrades them, `engine` opens the database, `errors` turns the driver's errors into sentences.
`layers` and `changes` are pure.
"""
