"""The errors whose message is all that a user needs; every other exception keeps its traceback."""


class UserError(ValueError):
    """What was given cannot work; the message names the value and the mend.

    The scripts print it as one line, without a traceback. Anything that is not a UserError is shown whole.

    Example:
      >>> raise UserError("batch_size must be at least 1, got 0")
      Traceback (most recent call last):
      pgjax.UserError: batch_size must be at least 1, got 0
    """

    __module__ = "pgjax"  # its public name

    def keeps_traceback(self) -> bool:
        """Say whether the traceback matters all the same, as where the user's own code raised the cause."""
        return False


class NotFiniteError(UserError, FloatingPointError):
    """A loss, a gradient or the model's weights hold NaN or infinities.

    Example:
      >>> issubclass(NotFiniteError, FloatingPointError)
      True
    """

    __module__ = "pgjax"


class MissingPackageError(UserError, ImportError):
    """A package that the asked-for work needs is not installed; the message says how to get it.

    Example:
      >>> issubclass(MissingPackageError, ImportError)
      True
    """

    __module__ = "pgjax"
