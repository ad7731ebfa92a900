"""The one exception that stands for a user's mistake."""


class UserError(ValueError):
    """A mistake the user can mend: the message names the value, the rule and the cure, in one line.

    Commands print the message alone and exit with code 2 (`cft_jax.common.cli`); every other exception is our own
    mistake and keeps its stack trace.
    """
