"""What lies under a path that a user has named; nothing here imports torch."""

import os
import stat
from pathlib import Path

from mempar.errors import ConfigError


def status_of(path: str | Path, named: str) -> os.stat_result | None:
    """Look at what lies under a path.

    Args:
        path: that a user has named.
        named: what it was named with, for the message: an option, or what it is to be.

    Returns:
        None where nothing lies there.

    Raises:
        ConfigError: when it cannot be looked at: no path can be called so, or the way to it is barred.
    """
    try:
        return os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        reason = str(error.strerror)
    except ValueError as error:
        # Zero bytes, and what no file system can write.
        reason = str(error)
    raise ConfigError(
        f"{named} {path} cannot be looked at ({reason}); a path is called as the file system allows, and lies where "
        "this user may look; name another one."
    )


def is_file(path: str | Path, named: str) -> bool:
    """Whether a file lies there; see `status_of`."""
    status = status_of(path, named)
    return status is not None and stat.S_ISREG(status.st_mode)


def is_directory(path: str | Path, named: str) -> bool:
    """Whether a directory lies there; see `status_of`."""
    status = status_of(path, named)
    return status is not None and stat.S_ISDIR(status.st_mode)
