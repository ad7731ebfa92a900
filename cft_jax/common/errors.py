"""The exceptions that are told in one line: a user's mistake, and what may go better another time."""


class UserError(ValueError):
    """A mistake the user can mend: the message names the value, the rule and the fix, in one line.

    Commands print the message alone and exit with code 2 (`cft_jax.common.cli`); every other exception is our own
    mistake and keeps its stack trace.
    """

    exit_code = 2


class TryAgainError(UserError):
    """Nothing is wrong with the command, but it could not go on now: other machines did not come, say.

    Its exit code is EX_TEMPFAIL, by which launchers know that the same command is worth another attempt.
    """

    exit_code = 75
