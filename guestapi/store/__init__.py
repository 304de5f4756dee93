"""What the host says about its instances, and the log of every change to it.

Rules: only this room knows SQL. `writing` changes state and change log in one transaction, or neither. `reading` is
for the workers: it never waits for a writer. `tables` has the tables, `migrations` makes them, `engine` opens the
database, `errors` says what can go wrong.
"""
