"""What watched ranks did in a simulated step, as the trace that `mempar profile` writes of a real one.

A collective lasts from a rank's arrival until it goes on, as a mark would measure it: waiting for others is part of it.
"""

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mempar import marks
from mempar.errors import ConfigError
from mempar.runtime.durable import replace_file
from mempar.tools.profile.trace import trace
from mempar.tools.simulate.timeline import Span

_PS_PER_NS = 1000
# Groups of a hop as marks name them.
_GROUPS = {"inside": "mp_inside", "across": "mp_across"}


def marked(spans: Sequence[Span]) -> dict[int, list[marks.Span]]:
    """Spans of each rank as marks record them, in nanoseconds; bytes are not told."""
    found: dict[int, list[marks.Span]] = defaultdict(list)
    for span in spans:
        start, end = span.start // _PS_PER_NS, span.end // _PS_PER_NS
        found[span.rank].append(
            marks.Span(
                step=1,
                layer=span.layer,
                micro_batch=span.micro_batch,
                phase=span.phase,
                group=_GROUPS.get(span.group, span.group),
                start_ns=start,
                end_ns=end,
                exposed_ns=end - start if span.group else 0,
            )
        )
    return found


def write_trace(path: Path, spans: Sequence[Span]) -> None:
    """Write a trace, whole or not at all.

    Raises:
        ConfigError: where it cannot be written.
    """
    content: dict[str, Any] = trace(marked(spans))
    try:
        replace_file(path, json.dumps(content, separators=(",", ":")).encode())
    except OSError as error:
        raise ConfigError(
            f"the trace {path} cannot be written: {error.strerror}; its directory must exist and take files; name "
            "another file."
        ) from None
