"""`guestapi`, the operator's command.

Rules: it says in one sentence on stderr what was wrong and exits 1 (2 if it was called wrongly); what it changes, it
changes in one transaction; whatever lists or shows has ``--format json``.
"""
