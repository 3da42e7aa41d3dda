"""The directory of a study, which the same command goes on with.

study.json     settings, and what the facts depend on: another study is refused
corpus.json    checksums of the corpus that runs have begun with: another one is refused
corpus/        facts, tokenizer and training data (`corpus.py`)
runs/NAME/     of each run: config.yaml, log, curve.jsonl, times.jsonl, and result.json when it is done
results.json   one object a run that is done
report.html, plots.png, summary.txt   what they show
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mempar.errors import ConfigError
from mempar.runtime.durable import replace_file
from mempar.runtime.launch.lock import LOCK_NAME, RANKS_LOCK_NAME
from mempar.tools.study.facts import sources
from mempar.tools.study.settings import Settings


class StudyDir:
    """Paths of one study's directory."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.description = root / "study.json"
        self.corpus = root / "corpus"
        self.checksums = root / "corpus.json"
        self.runs = root / "runs"
        self.results = root / "results.json"
        self.page = root / "report.html"
        self.picture = root / "plots.png"
        self.summary = root / "summary.txt"

    @property
    def begun(self) -> bool:
        """Whether there are runs."""
        return self.runs.is_dir() and any(self.runs.iterdir())

    def check(self, settings: Settings) -> None:
        """See that a study can be done here; nothing is written.

        Args:
            settings: that its runs share.

        Raises:
            ConfigError: when the directory holds something else, or cannot be read.
        """
        try:
            names = {path.name for path in self.root.iterdir()} if self.root.exists() else set()
            begun = self.begun
        except OSError as error:
            raise self._unusable(error) from None
        if begun and self.description.exists():
            self._check_same(_content("", settings))
        elif self.results.exists():
            raise ConfigError(
                f"{self.root} holds the results of a study without its runs; a study goes on from its runs; draw it "
                "again with --report, or choose another --out."
            )
        elif not self.description.exists() and names - {LOCK_NAME, RANKS_LOCK_NAME}:
            raise ConfigError(
                f"{self.root} exists and is not the directory of a study; a new one needs a directory of its own; "
                "choose another --out."
            )

    def open(self, size: str, settings: Settings) -> None:
        """Make the directory of a new study, or see that it holds this one.

        What was made for other settings and has not been used by any run is made anew.

        Args:
            size: of the study, for readers.
            settings: that its runs share.

        Raises:
            ConfigError: when it holds something else, or cannot be written.
        """
        self.check(settings)
        wanted = _content(size, settings)
        try:
            if not self.begun and self.description.exists() and _differences(read_json(self.description), wanted):
                shutil.rmtree(self.corpus, ignore_errors=True)
            self.runs.mkdir(parents=True, exist_ok=True)
            replace_file(self.description, (json.dumps(wanted, indent=1) + "\n").encode())
        except OSError as error:
            raise self._unusable(error) from None

    def remember(self, checksums: dict[str, str]) -> None:
        """Keep checksums of the corpus, or see that they are those of the one that runs have begun with.

        Args:
            checksums: of the corpus that is there, by names of files; a study that has none of before goes on.

        Raises:
            ConfigError: when it is another corpus.
            OSError: when they cannot be written.
        """
        if self.begun and self.checksums.exists():
            before = _mapping({"files": read_json(self.checksums)}, "files")
            differing = [name for name in checksums if before.get(name) != checksums[name]]
            if differing:
                raise ConfigError(
                    f"{self.corpus} is not the corpus that the runs of this study have begun with: "
                    f"{', '.join(differing)} differ{'s' * (len(differing) == 1)}; all runs of a study learn from the "
                    "same; go on with the versions of mempar and its packages that began it, or choose another --out."
                )
        replace_file(self.checksums, (json.dumps(checksums, indent=1) + "\n").encode())

    def _check_same(self, wanted: dict[str, Any]) -> None:
        differing = _differences(read_json(self.description), wanted)
        if differing:
            raise ConfigError(
                f"{self.root} holds another study: {'; '.join(differing)}; runs of one study share their settings and "
                "facts; give the same, or choose another --out."
            )

    def _unusable(self, error: OSError) -> ConfigError:
        return ConfigError(
            f"{self.root} cannot be used ({error.strerror}); a study needs a writable directory with room; choose "
            "another --out."
        )


def _content(size: str, settings: Settings) -> dict[str, Any]:
    """What study.json holds."""
    return {"size": size, "settings": settings.to_json(), "sources": sources()}


def _differences(found: Any, wanted: dict[str, Any]) -> list[str]:
    """A phrase for each setting and source in which two studies differ."""
    return [
        f"{name} is {before.get(name, 'not there')} there and {now.get(name, 'not there')} here"
        for part in ("settings", "sources")
        for before, now in [(_mapping(found, part), wanted[part])]
        for name in dict.fromkeys((*now, *before))
        if before.get(name) != now.get(name)
    ]


@contextmanager
def needs_room(path: Path) -> Iterator[None]:
    """Turn a failure of what is done in a study's directory into the message about it.

    Args:
        path: where it is done, in case that the system does not say.

    Raises:
        ConfigError: naming the file and the reason.
    """
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"{error.filename or path} cannot be used ({error.strerror or error}); a study keeps all that it makes in "
            "its directory; make room or see to the disk, and the same command goes on."
        ) from None


def read_json(path: Path) -> Any:
    """Read a file of JSON.

    Raises:
        ConfigError: when it is not there or is none.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; name the directory of a study.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read ({error}); a study writes it whole; restore or delete it.") from None


def _mapping(found: Any, part: str) -> dict[str, Any]:
    inner = found.get(part) if isinstance(found, dict) else None
    return inner if isinstance(inner, dict) else {}
