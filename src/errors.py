"""The one exception that a command answers with a sentence instead of a traceback."""


class UserError(Exception):
    """Bad input or a broken surrounding: the message is one sentence that says what is wrong, where, and what to do."""
