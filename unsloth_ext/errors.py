"""Errors that a person reads: what is wrong, then what to do. The command line turns each into its exit code.

0 done · 1 the job ran and did not hold (a failed run, a claim, a difference) · 2 bad usage or input · 3 refused, nothing changed
"""


class UnslothExtError(Exception):
    """The job failed. `hint` is one sentence that says what to do next."""

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None):
        super().__init__(message)
        self.hint = hint

    def __str__(self) -> str:
        message = super().__str__()
        return f"{message}\n  {self.hint}" if self.hint else message


class UsageError(UnslothExtError):
    """A bad argument or a missing or unreadable input."""

    exit_code = 2


class Refused(UnslothExtError):
    """The request was understood and turned down before anything was changed."""

    exit_code = 3
