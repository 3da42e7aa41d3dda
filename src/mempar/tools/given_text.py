"""Texts that users give for a model to read: as arguments, in files, through standard input."""

import io
import sys
from contextlib import nullcontext
from pathlib import Path

from mempar.errors import ConfigError


def check_unicode(text: str, named: str) -> None:
    """Refuse an argument that is no text: what is not UTF-8 on a command line has halves of characters.

    Raises:
        ConfigError: naming it.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ConfigError(
            f"{named} is not UTF-8; tokenizers take text; convert it, as `iconv -t utf-8` does."
        ) from None


def read_text(path: Path | None, named: str, most: int = -1) -> tuple[str, bool]:
    """Read a text file as it is, ends of lines too.

    Args:
        path: of the file; None is standard input.
        named: the option with what stands behind it, for the message.
        most: letters to read; below 0 for all.

    Returns:
        The text, and whether that is all of it.

    Raises:
        ConfigError: when it cannot be read, or is not UTF-8.
    """
    try:
        with nullcontext(sys.stdin.buffer) if path is None else path.open("rb") as file:
            stream = io.TextIOWrapper(file, encoding="utf-8", newline="")
            try:
                text = stream.read(most)
                return text, not stream.read(1)
            finally:
                # Standard input stays open.
                stream.detach()
    except UnicodeDecodeError:
        reason = "it is not UTF-8"
    except OSError as error:
        reason = str(error.strerror)
    except ValueError as error:
        # Of a name that no file can have.
        reason = str(error)
    raise ConfigError(f"{named} cannot be read ({reason}); it is a text file in UTF-8; name another one.")
