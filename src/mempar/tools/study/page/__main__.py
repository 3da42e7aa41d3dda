"""Draw a study's page anew: `python -m mempar.tools.study.page DIR`."""

import sys
from pathlib import Path

from mempar.errors import MemparError
from mempar.tools.study.page.document import write_page


def main(arguments: list[str]) -> int:
    """Write the page of the directory that is named.

    Returns:
        The exit status.
    """
    if len(arguments) != 1:
        print("usage: python -m mempar.tools.study.page DIR", file=sys.stderr)
        return 2
    try:
        print(write_page(Path(arguments[0])))
    except MemparError as error:
        print(error, file=sys.stderr)
        return error.exit_status
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
