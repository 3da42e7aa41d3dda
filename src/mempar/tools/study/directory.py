"""The directory of a study, which the same command goes on with.

study.json     settings, and what the facts depend on: another study is refused
corpus/        facts, tokenizer and training data (`corpus.py`)
runs/NAME/     of each run: config.yaml, log, curve.jsonl, and result.json when it is done
results.json   one object a run that is done
report.html, plots.png, summary.txt   what they show
"""

import json
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
        self.runs = root / "runs"
        self.results = root / "results.json"
        self.page = root / "report.html"
        self.picture = root / "plots.png"
        self.summary = root / "summary.txt"

    def open(self, size: str, settings: Settings) -> None:
        """Make the directory of a new study, or see that it holds this one.

        Args:
            size: of the study, for readers.
            settings: that its runs share.

        Raises:
            ConfigError: when it holds something else, or cannot be written.
        """
        wanted = {"size": size, "settings": settings.to_json(), "sources": sources()}
        try:
            names = {path.name for path in self.root.iterdir()} if self.root.exists() else set()
            if self.description.exists():
                self._check_same(wanted)
            elif names - {LOCK_NAME, RANKS_LOCK_NAME}:
                raise ConfigError(
                    f"{self.root} exists and is not the directory of a study; a new one needs a directory of its own; "
                    "choose another --out."
                )
            self.runs.mkdir(parents=True, exist_ok=True)
            replace_file(self.description, (json.dumps(wanted, indent=1) + "\n").encode())
        except OSError as error:
            raise ConfigError(
                f"{self.root} cannot be used ({error.strerror}); a study needs a writable directory with room; choose "
                "another --out."
            ) from None

    def _check_same(self, wanted: dict[str, Any]) -> None:
        found = read_json(self.description)
        differing = []
        for part in ("settings", "sources"):
            before, now = _mapping(found, part), wanted[part]
            differing += [
                f"{name} is {before.get(name, 'not there')} there and {now.get(name, 'not there')} here"
                for name in dict.fromkeys((*now, *before))
                if before.get(name) != now.get(name)
            ]
        if differing:
            raise ConfigError(
                f"{self.root} holds another study: {'; '.join(differing)}; runs of one study share their settings and "
                "facts; give the same, or choose another --out."
            )


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
