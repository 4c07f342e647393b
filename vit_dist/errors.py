"""The one exception that means: the user can mend this."""


class UserError(Exception):
    """Something the user gave cannot work.

    The message is one clear line: what is wrong, where (file, key, class), and what to do. The entry point
    prints it without a traceback and leaves with exit code 2.
    """
