"""Doctor's findings on a terminal: one table, levels in colour, what to do under what is there."""

from collections import Counter

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from mempar.tools.doctor.finding import ERROR, LEVELS, NOTE, OK, WARNING, Finding, named

_STYLES = {OK: "green", NOTE: "cyan", WARNING: "yellow", ERROR: "bold red"}


def show(findings: list[Finding], console: Console) -> None:
    """Print them in their order, and a last line that counts them."""
    table = Table(box=None, padding=(0, 1), show_header=False)
    for header in ("level", "check", "text"):
        # Long words, as paths are, are broken and not cut.
        table.add_column(header, no_wrap=header != "text", overflow="fold")
    subject = ""
    for finding in findings:
        before, (subject, _, name) = subject, finding.check.partition(".")
        if subject != before:
            table.add_row("", Text(subject, style="bold"), "")
        table.add_row(Text(finding.level, style=_STYLES[finding.level]), f" {name}", _text(finding))
    console.print(Group(table, Text(""), _summary(findings)))


def _text(finding: Finding) -> Text:
    text = Text(f"{named(finding.nodes)}: " if finding.nodes else "", style="bold")
    text.append(finding.what, style="not bold")
    if finding.rule:
        text.append(f": {finding.rule}", style="not bold dim")
    if finding.remedy:
        text.append(f"\n-> {finding.remedy}", style=_STYLES[finding.level].removeprefix("bold "))
    return text


def _summary(findings: list[Finding]) -> Text:
    counts = Counter(finding.level for finding in findings)
    text = Text()
    for level in reversed(LEVELS):
        if counts[level]:
            text.append(", " if text else "")
            plural = "s" if counts[level] > 1 and level != OK else ""
            text.append(f"{counts[level]} {level}{plural}", style=_STYLES[level])
    bad = dict.fromkeys(finding.check for finding in findings if finding.level == ERROR)
    text.append(f"; mend first: {', '.join(bad)}" if bad else "")
    return text
