"""The exceptions that a user is meant to read."""


class UserError(Exception):
    """Something the user can put right: its message is one line that says what to do.

    The programs print it without a traceback and exit with code 2 (see :mod:`nanomr.cli`).
    """

    head = "error:"  # what they print before it


class NoClass(UserError, ValueError):
    """A network answers with NaN or infinite logits: that is no class, so no accuracy, no attack and no proof."""
