"""What a reader should know about a run's numbers: one finding for each check that was made.

A check that found nothing is a finding too, and so is one that could not be made, with its reason:
silence would pass for "fine".
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rich.console import Console

SHOWN = 3  # items on the console
LISTED = 100  # items in results.json; their count is always there


@dataclass(frozen=True)
class Finding:
    """What one check found."""

    check: str  # saturated ranges
    status: Literal["fine", "warning", "not measured"]
    text: str  # one sentence
    items: tuple[str, ...] = ()  # what it is about, worst first

    def __str__(self) -> str:
        """One line for a console."""
        more = len(self.items) - SHOWN
        shown = [*self.items[:SHOWN], *([f"and {more:,} more"] if more > 0 else [])]
        return f"{self.check}: {self.text}" + (f" ({listed(shown)})" if shown else "")

    def as_json(self) -> dict[str, Any]:
        """As ``results.json`` holds it."""
        return {
            "check": self.check,
            "status": self.status,
            "text": self.text,
            "items": list(self.items[:LISTED]),
            "count": len(self.items),
        }


def listed(items: Sequence[str]) -> str:
    """Items in one line; those that are sentences have commas of their own."""
    return ("; " if any("," in item for item in items) else ", ").join(items)


def show_findings(findings: Sequence[Finding], console: Console) -> None:
    """The warnings; what is fine stands in the results."""
    for finding in findings:
        if finding.status == "warning":
            console.print("[yellow]take note[/]: ", end="")
            # Names in it come from files: shown, never read as markup.
            console.print(str(finding), markup=False, highlight=False, soft_wrap=True)
