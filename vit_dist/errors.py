"""The exceptions that are shown as one line."""


class UserError(Exception):
    """Something the user gave cannot work.

    The message is one clear line: what is wrong, where (file, key, class), and what to do. The entry point
    prints it without a traceback and leaves with exit code 2.
    """


class LostProcess(Exception):
    """Another process of the job is gone, which is not this one's fault: its traceback would say nothing.

    The message is one clear line; exit code 1.
    """
