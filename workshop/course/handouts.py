"""What the course's hand-outs ask for, by term, as their public copies show them."""

import re
from dataclasses import dataclass

from lab7.errors import unknown
from lab7.sampling import DENOISING_CONDITION


@dataclass(frozen=True)
class Handout:
    """What one term wants handed in: a zip with the report as PDF, the source, and pictures.

    Attributes:
        term: For instance "spring 2026".
        lab: The lab's number in that term.
        prefix: How the zip's name begins; the student's ID and name follow.
        denoising: Labels of the denoising row. The terms of 2023 asked for none.
        images: Whether images/test and images/new_test with numbered PNGs are asked for.
    """

    term: str
    lab: str
    prefix: str
    denoising: tuple[str, ...] = DENOISING_CONDITION
    images: bool = False

    def title(self, student_id: str, name: str) -> str:
        """Return the zip's name without its ending."""
        return f"{self.prefix}_{student_id}_{name.replace(' ', '_')}"


HANDOUTS = {
    "2023-spring": Handout("spring 2023", "Lab 7", "DLP_LAB7"),
    "2023-summer": Handout("summer 2023", "Lab 6", "DLP_LAB6"),
    "2024": Handout(
        "spring 2024", "Lab 6", "DL_LAB6", ("red sphere", "yellow cube", "cyan cylinder")
    ),
    "2025": Handout("spring 2025", "Lab 6", "DL_LAB6", images=True),
    "2026": Handout("spring 2026", "Lab 6", "DL_LAB6", images=True),
}
NEWEST = "2026"


def find_handout(year: str | None = None) -> Handout:
    """Return the hand-out of a year.

    Args:
        year: For instance "2026", "2023-summer" or "summer 2023"; None takes the newest.

    Raises:
        UserError: It is none, or that of two terms; the message names all.
    """
    words = set(re.findall(r"\w+", (NEWEST if year is None else year).lower()))
    found = [name for name, handout in HANDOUTS.items() if words <= {*handout.term.split()}]
    if len(found) != 1:
        raise unknown("year", year, found or HANDOUTS, f"Choose one of {', '.join(HANDOUTS)}")
    return HANDOUTS[found[0]]
