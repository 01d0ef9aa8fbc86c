"""What a student's own copy of the report has: whose it is, and the pictures that are handed in."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lab7 import plots
from lab7.scoring import label_names


@dataclass(frozen=True)
class HandIn:
    """Pictures that are handed in, with their scores, and by whom.

    Attributes:
        student: ID and name, as they shall be printed.
        task: For instance "Lab 6, spring 2026".
        scored: By "test" and "new_test" what `lab7.scoring.draw_and_judge` returned for one
            picture a condition.
        denoised: Labels of the denoising row.
        frames: (N, 3, 64, 64) in [-1, 1], from noise to the picture.
        course_conditions: Whether the conditions are the course's or this project's own.
        course_evaluator: Whether the judge was the course's.
    """

    student: str
    task: str
    scored: dict[str, tuple[dict[str, Any], Tensor]]
    denoised: tuple[str, ...]
    frames: Tensor
    course_conditions: bool
    course_evaluator: bool

    def charts(self) -> dict[str, plots.Chart]:
        """Draw the grids and the denoising row; they take the place of the record's."""
        charts = {"denoising.webp": draw_denoising(self.frames)}
        for name, (metrics, images) in self.scored.items():
            verdicts = metrics["pictures"]
            charts[f"{name}.webp"] = plots.picture_grid(
                images, verdicts.conditions, label_names(verdicts.seen)
            )
        return charts

    def facts(self) -> dict[str, Any]:
        """Return what report.typ prints."""
        accuracy = {name: metrics["scores"] for name, (metrics, _) in self.scored.items()}
        return {
            "student": self.student,
            "task": self.task,
            "course_conditions": self.course_conditions,
            "course_evaluator": self.course_evaluator,
            "first_seed": self.scored["test"][0]["first_seed"],
            "accuracy": {
                name: {
                    "pictures": scores.num_pictures,
                    "labels": scores.top_k.total,
                    "right": scores.top_k.hits,
                    "value": scores.top_k.value,
                }
                for name, scores in accuracy.items()
            },
        }


def draw_denoising(frames: Any) -> plots.Chart:
    """Show the states of a reverse process, (N, 3, 64, 64)."""
    return plots.picture_grid(
        frames, ["noise", *[""] * (len(frames) - 2), "picture"], columns=len(frames)
    )
