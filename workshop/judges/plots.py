"""Figures of how far evaluator and auditor can be trusted.

They are in the style of `lab7.plots`; the evaluator is drawn first and so in blue, the auditor in
orange.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.ticker import MaxNLocator

from lab7.plots import (
    INK,
    Chart,
    draw_estimates,
    field,
    make_panels,
    styled,
    words,
)

_JUDGES = ("evaluator", "auditor")
_ASIDE = 0.1  # how far dots are moved apart, so that none hides another
_PARTS = {  # of a recall, see `workshop.judges.examination.object_recall`
    "count": "objects in the picture",
    "neighbor": "pixels to the nearest other",
    "height": "pixels from the top: far to near",
}
_CHANGES = {
    "blur": "blur, σ in pixels",
    "brightness": "brightness, added",
    "noise": "noise, σ of the full range",
}


@styled
def scores_by_count(by_count: Mapping[Any, Mapping[str, Any]]) -> Chart:
    """Show top-k and exact-set accuracy by the number of objects in a picture.

    Args:
        by_count: By number of objects, scores with `top_k` and `exact_set` estimates.
    """
    chart, (axes,) = make_panels(2.2)
    places = np.arange(len(by_count))
    for score, aside in (("top_k", -_ASIDE), ("exact_set", _ASIDE)):
        estimates = [field(row, score) for row in by_count.values()]
        draw_estimates(axes, places + aside, estimates, words(score))
    axes.set_xticks(places, list(by_count))
    axes.set(xlabel="objects in the picture", ylabel="score", ylim=(None, 1.005))
    axes.margins(x=0.15)
    chart.legend_below()
    return chart


@styled
def reliability(calibration: Mapping[str, Any]) -> Chart:
    """Compare the evaluator's probabilities, those not close to 0 or 1, with how often labels
    of such a probability are present.

    Args:
        calibration: "error" and "bins", see `workshop.judges.examination.calibration`. The left
            panel shows the share of labels that are present over their probability, the right one
            how many labels have it.
    """
    chart, (left, right) = make_panels(2.5, 2, width_ratios=(3, 2))
    bins = calibration["bins"]
    mean, there = [row["mean"] for row in bins], [row["there"] for row in bins]
    left.plot([0, 1], [0, 1], ":", color=INK, marker="", linewidth=1, label="calibrated")
    draw_estimates(left, mean, there, "evaluator")
    left.set(xlabel="probability", ylabel="share of labels present", xlim=(0, 1), ylim=(0, 1))
    left.set_title(f"Calibration error {calibration['error']:.3f}")
    left.legend(loc="upper left")
    right.bar(mean, [field(row, "total") for row in there], width=0.08)
    right.set(title="Number of labels", xlabel="probability", xlim=(0, 1))
    right.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    return chart


@styled
def recall_by(recall: Mapping[str, Mapping[str, Any]], parts: Sequence[str] = (*_PARTS,)) -> Chart:
    """Show the share of objects that the judges see, by what may matter.

    Args:
        recall: By part and group, estimates by judge, see
            `workshop.judges.examination.object_recall`.
        parts: The panels.
    """
    chart, panels = make_panels(2.4, len(parts), sharey=True)
    for axes, part in zip(panels, parts, strict=True):
        places = np.arange(len(recall[part]))
        for judge, aside in zip(_JUDGES, (-_ASIDE, _ASIDE), strict=True):
            estimates = [row[judge] for row in recall[part].values()]
            draw_estimates(axes, places + aside, estimates, judge)
        axes.set_xticks(places, list(recall[part]))
        axes.tick_params(axis="x", labelsize=6.5)
        axes.set_xlabel(_PARTS[part])
    panels[0].set(ylabel="share of objects seen", ylim=(None, 1.003))
    chart.legend_below()
    return chart


@styled
def changed_pictures(changes: Mapping[str, Sequence[Mapping[str, Any]]]) -> Chart:
    """Show how often the judges are right on changed pictures.

    Args:
        changes: By kind of change, rows with "amount", "exact_set" of the evaluator and
            "exact_scene" of the auditor, see `workshop.judges.examination.score_changes`.
    """
    chart, panels = make_panels(2.4, len(changes), sharey=True)
    for axes, (kind, rows) in zip(panels, changes.items(), strict=True):
        amount = [row["amount"] for row in rows]
        for judge, score in zip(_JUDGES, ("exact_set", "exact_scene"), strict=True):
            draw_estimates(axes, amount, [row[score] for row in rows], judge, "-")
        axes.set_xlabel(_CHANGES[kind])
        axes.xaxis.set_major_formatter("{x:g}")
    panels[0].set(ylabel="share judged right", ylim=(0, 1.02))
    chart.legend_below()
    return chart


@styled
def fooled_judges(fooled: Mapping[str, Mapping[str, Any]]) -> Chart:
    """Show what the judges say of pictures that are not as asked.

    Args:
        fooled: By kind of picture "top_k", "exact_set" and "exact_scene", see
            `workshop.judges.examination.score_fooled`.
    """
    chart, (axes,) = make_panels(0.9 + 0.36 * len(fooled))
    places = -np.arange(len(fooled), dtype=float)
    for score, label, aside in (
        ("exact_set", "exact set, evaluator", 0),
        ("exact_scene", "exact scene, auditor", -2 * _ASIDE),
        ("top_k", "top-k, the course's score", 2 * _ASIDE),
    ):
        found = [row[score] for row in fooled.values()]
        draw_estimates(axes, places + aside, found, label, horizontal=True)
    named = {"deceived": "adversarial"}  # as the record has it, and as it is called
    axes.set_yticks(places, [named.get(kind, kind) for kind in fooled])
    axes.set(xlim=(-0.02, 1.02), xlabel="score")
    chart.legend_below()
    return chart
