"""The one exception that a command answers with a sentence instead of a traceback."""


class UserError(Exception):
    """Bad input or a broken surrounding: the message is one sentence that says what is wrong, where, and what to do."""

    def __str__(self) -> str:
        # A worker's error arrives with its traceback as the message; the sentence is the end of it.
        return super().__str__().rpartition(f"{__name__}.UserError: ")[2].rstrip()
