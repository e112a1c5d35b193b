"""The exceptions that are no bugs: the user can mend this, and the run was asked to stop."""


class UserError(ValueError):
    """Bad input. The message is one line that names the field and the remedy.

    The command line prints it without a traceback and exits with status 2.
    """


class Preempted(Exception):
    """The run was asked to stop and has; the message is one line that says after what, and how it goes on.

    The command line prints it and exits with status 143.
    """
