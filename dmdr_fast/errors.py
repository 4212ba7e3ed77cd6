"""The exceptions that a user is meant to read."""


class UserError(Exception):
    """Something that the user can put right: a wrong key, a missing file, a checkpoint that does not fit.

    The message says what was wrong, what was expected and what to change. The command line prints it as one line
    on stderr and exits with code 2; it never shows a traceback.
    """


class RunEnded(Exception):
    """A run ended early, its checkpoint written; the message says why and how to go on. Exit code 1."""
