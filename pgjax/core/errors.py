"""The errors that scripts print as one line, without a traceback."""


class UserError(ValueError):
    """An input is wrong; the message names the value and says how to correct it.

    Scripts print it as one line, without a traceback. Every other exception keeps its traceback.

    Example:
      >>> raise UserError("batch_size must be at least 1, got 0")
      Traceback (most recent call last):
      pgjax.UserError: batch_size must be at least 1, got 0
    """

    __module__ = "pgjax"  # its public name

    def keeps_traceback(self) -> bool:
        """Return whether scripts print the traceback all the same, as they do where the user's own code raised the cause."""
        return False


class NotFiniteError(UserError, FloatingPointError):
    """A loss, a gradient or the model's weights hold NaN or infinities.

    Example:
      >>> issubclass(NotFiniteError, FloatingPointError)
      True
    """

    __module__ = "pgjax"


class MissingPackageError(UserError, ImportError):
    """A package that an option needs is not installed; the message says how to install it.

    Example:
      >>> issubclass(MissingPackageError, ImportError)
      True
    """

    __module__ = "pgjax"
