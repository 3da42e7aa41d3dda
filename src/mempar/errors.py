"""The exceptions that users see.

Every message has three parts: what is wrong (with the values), the rule that it breaks, and what
to change. The command line prints the message alone, without a traceback, and exits with the
class's `exit_status`.
"""


class MemparError(Exception):
    """A failure that is explained to the user in one message."""

    exit_status = 1


class ConfigError(MemparError):
    """Bad input: a setting, a file or a combination of them that cannot be run."""

    exit_status = 2


class CheckpointError(ConfigError):
    """A checkpoint that is missing, damaged, or of another model."""


class DamagedError(CheckpointError):
    """A checkpoint that is not what was written: another one has to do."""


class UnreadableError(CheckpointError):
    """A checkpoint that could not be read for a reason that may pass: nothing says that it is damaged."""

    exit_status = 1
