"""The one exception that a user is meant to read."""


class UserError(Exception):
    """Something the user can put right: its message is one line that says what to do.

    The programs print it without a traceback and exit with code 2 (see :mod:`nanomr.cli`).
    """
