"""The one error that a user is meant to read: what is wrong, with which value, and what to do."""


class PapoError(Exception):
    """A failure explained in one line; printed without a traceback, from rank 0 only."""


def first_line(error: BaseException) -> str:
    """The first line of the error's text that is not blank, or its type's name if there is none."""
    lines = (line.strip() for line in str(error).splitlines())
    return next((line for line in lines if line), type(error).__name__)
