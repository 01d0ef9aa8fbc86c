"""What is committed fits together: weights, records, settings, README and report."""

import re

import pytest

from lab7.diffusion import scheduler_name
from lab7.evaluator import WEIGHTS
from lab7.experiments import get_experiment
from lab7.layouts import ROOT
from lab7.pipeline import GENERATOR_DIR, load_pipeline
from lab7.records import read_record, read_records
from report.build import README_MARKS, accuracy_table, build
from workshop.records import file_hash

REFRESH = "run `make report`"
# What is drawn with; the settings beside it are chosen by search.
UNET = GENERATOR_DIR / "unet"


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("evaluator", WEIGHTS),
        *((name, UNET) for name in ("ours", "sweep", "search-sampler")),
    ],
)
def test_records_are_of_the_committed_weights(name, weights):
    assert read_record(name).environment["weights_sha256"] == file_hash(weights)


def test_settings_are_those_that_were_best_on_valid():
    config, pipeline, sweep = get_experiment("ours").config, load_pipeline(), read_record("sweep")
    shipped = pipeline.config
    assert shipped.guidance_scale == config.guidance_scale == sweep.get("best_guidance")
    chosen = read_record("search-sampler").get("chosen")
    for name in ("num_inference_steps", "guidance_interval"):  # and guidance by the sweep after it
        assert getattr(shipped, name) == getattr(config, name) == chosen[name], name
    best = max(sweep.get("schedulers"), key=lambda row: row["top_k"]["value"])
    assert scheduler_name(pipeline.scheduler) == config.scheduler == best["scheduler"]


def test_weights_and_scores_meet_their_goals():
    """The auditor only reports: nothing here depends on what it says."""
    files = [path for path in GENERATOR_DIR.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 14e6
    record = read_record("ours")
    for name in ("test", "new_test"):
        assert record.get(f"{name}.repetitions") >= 8
        assert record.get(f"{name}.scores.top_k.value") >= 0.99
    assert record.get("unseen.scores.top_k.value") >= 0.97


def test_readme_shows_the_records():
    readme, (begin, end) = (ROOT / "README.md").read_text(encoding="utf-8"), README_MARKS
    shown = readme.split(begin)[1].split(end)[0].strip()
    assert shown == accuracy_table(read_records()), REFRESH


def test_report_shows_the_records(tmp_path):
    build(tmp_path)
    pages = [folder / "report.html" for folder in (tmp_path, ROOT / "report")]
    texts = [re.sub(r'src="data:[^"]*"', "", page.read_text(encoding="utf-8")) for page in pages]
    assert texts[0] == texts[1], REFRESH
