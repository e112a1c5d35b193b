"""The one exception that means "the user can mend this"."""


class UserError(ValueError):
    """Bad input. The message is one line that names the field and the remedy.

    The command line prints it without a traceback and exits with status 2.
    """
