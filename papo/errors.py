"""The one error a user is meant to read: one line with what, which value and what to do."""


class PapoError(Exception):
    """A failure explained in one line; printed without a traceback, from rank 0 only."""
