import base64
import datetime
import html
import io
import json
import re
import shutil

import numpy as np
import pytest
import torch
import yaml
from conftest import SCENES, scene_pictures, write_label_files
from fontTools.ttLib import TTFont
from PIL import Image

import lab7
from lab7.dataset import to_float
from lab7.estimates import Estimate
from lab7.evaluator import top_k_hits
from lab7.experiments import get_experiment
from lab7.labels import LABELS, encode, load_conditions
from lab7.layouts import ROOT, find_layout
from lab7.records import append_log, original_scores, read_record
from lab7.sampling import to_grid
from lab7.scoring import Verdicts, score_verdicts
from lab7.training import SAMPLED
from report import build as report_build
from report import printing
from report.facts import LISTINGS, listing
from report.fonts.subset import BIG5_ROWS, GB2312_ROWS
from report.handin import HandIn
from workshop.judges.evaluator_training import EvaluatorTraining
from workshop.judges.examination import calibration
from workshop.judges.fidelity import Agreement, Fidelity
from workshop.records import write_record
from workshop.standin.packing import write_pack

SETS = {
    "test": [["red cube"], ["blue cube", "green sphere"]],
    "new_test": [["red cube", "red sphere"], ["red sphere", "cyan cylinder", "cyan cube"]],
    "valid": [["red cube", "blue cube"], ["gray cylinder"], ["cyan cube", "red cube"]],
    "unseen": [["red cube", "green cube", "blue cube"]],
    "four_five": [["red cube", "green cube", "blue cube", "cyan cube", "gray cube"]],
}


def make_scores(conditions, errors, seed=0, repetitions=2):
    """What `draw_and_judge` would return for verdicts of which a share is wrong."""
    rng = torch.Generator().manual_seed(seed)
    condition = list(range(len(conditions))) * repetitions
    labels = encode(conditions)[condition]
    wrong = torch.rand(labels.shape, generator=rng) < errors
    noise = 0.2 * torch.rand(labels.shape, generator=rng)
    probabilities = (labels * 0.75 + noise) * ~wrong + (0.8 - labels * 0.6) * wrong
    seen = probabilities >= 0.5
    counts = seen + (torch.rand(labels.shape, generator=rng) < errors).long()
    verdicts = Verdicts(
        [list(labels) for labels in conditions],
        condition,
        list(range(len(condition))),
        top_k_hits(probabilities, labels).tolist(),
        [row.nonzero()[:, 0].tolist() for row in seen],
        [[i for i in range(24) for _ in range(row[i])] for row in counts.tolist()],
    )
    return score_verdicts(verdicts) | {
        "agreement": Agreement.of(verdicts),
        "fidelity": Fidelity(
            None if max(map(len, conditions)) > 3 else Estimate(0.0123, 0.0112, 0.0134),
            Estimate(1.234, 1.222, 1.246),
        ),
        "num_inference_steps": 20,
        "guidance_scale": 3.0,
        "scheduler": "sde-dpmsolver++",
        "timesteps": list(range(950, -1, -50)),
        "repetitions": repetitions,
        "first_seed": 0,
        "pictures": verdicts,
    }


def write_generator(root, name, data, errors, pictures, frames, **extra):
    """A record as `evaluate --record` writes it."""
    sets = {key: load_conditions(data / f"{key}.json") for key in SETS}
    metrics = {key: make_scores(sets[key], errors) for key in SETS}
    metrics["course"] = {"pictures": False, "evaluator": False}
    metrics["training"] = {
        "steps": 10_000,
        "images": 640_000,
        "seconds": 10_812.3,
        "images_per_second": 59.2,
        "final_loss": 0.0123,
        "parameters": 6_543_210,
        "machine": "a processor of two cores",
        "date": "2026-01-02T03:04:05+00:00",
        "git_commit": "0123456789abcdef",
    }
    config = get_experiment(name).config
    folder = write_record(name, config, metrics | extra, root)
    for key in ("test", "new_test"):
        to_grid(pictures(len(sets[key]))).save(folder / f"{key}.png")
    to_grid(frames, columns=len(frames)).save(folder / "denoising.png")
    for step in range(50, 10_001, 50):
        append_log(
            folder / "log.jsonl",
            {
                "step": step,
                "images": step * config.batch_size,
                "loss": 0.4 / step**0.4 * (1 + 0.1 * (step % 7 - 3) / 3),
                "lr": config.learning_rate * (1 - step / 10_000),
                "images_per_second": 59.2,
                "seconds": step * 1.08,
            },
        )


def write_ceiling(root, data, pictures):
    """A record as `ceiling` writes it."""
    sets = {key: load_conditions(data / f"{key}.json") for key in SETS}
    metrics = {key: make_scores(sets[key], 0.001, seed=1) for key in SETS}
    folder = write_record("ceiling", {"repetitions": 2}, metrics, root)
    for key in ("test", "new_test"):
        to_grid(pictures(len(sets[key]))).save(folder / f"{key}.png")


def write_twin(root, name, data, errors, pictures, frames):
    """A record as `experiments` writes it."""
    found = make_scores(SETS["valid"], errors)
    milestones = [
        {"step": step, "scores": found["scores"], "audit": found["audit"]} for step in (500, 4000)
    ]
    write_generator(root, name, data, errors, pictures, frames, milestones=milestones)
    to_grid(pictures(2 * len(SAMPLED)), columns=len(SAMPLED)).save(root / name / "samples.png")


def write_evaluator(root):
    """A record as the evaluator's training writes it."""
    labels = torch.eye(24).repeat(4, 1)
    scores = {count: make_scores([LABELS[:count]] * 40, 0.0004, count) for count in range(1, 6)}
    metrics = {
        "test": make_scores([LABELS[:3]] * 60, 0.0003)["scores"],
        "test_small": make_scores([LABELS[:3]] * 60, 0.0006)["scores"],
        "recall_per_label": {label: 0.98 + 0.0007 * i for i, label in enumerate(LABELS)},
        "by_count": {count: scores[count]["scores"] for count in scores},
        "mistakes": [
            {"row": row, "labels": LABELS[row : row + 3], "seen": LABELS[row + 1 : row + 4]}
            for row in range(20)
        ],
        "validation": {"exact_set": 0.99, "top_k": 0.998, "num_pictures": 2000},
        "training": {"num_pictures": len(labels), "steps": 9000, "seconds": 3000.0, "bf16": True},
    }
    folder = write_record("evaluator", EvaluatorTraining(), metrics, root)
    to_grid(pictures(16)).save(folder / "mistakes.png")


def write_auditor(root):
    """A record as the auditor's training writes it."""
    audits = {n: make_scores([LABELS[:n]] * 40, 0.0004, n)["audit"] for n in range(1, 6)}
    metrics = {
        "test": make_scores([LABELS[:3]] * 60, 0.0003)["audit"],
        "by_count": audits,
        "repeated": make_scores([LABELS[:4]] * 60, 0.0003)["audit"],
        "training": {"num_pictures": 14_100, "parameters": 1_680_000},
    }
    write_record("auditor", {}, metrics, root)


def write_judges(root):
    """A record as `examine` writes it."""
    generator = torch.Generator().manual_seed(0)
    outputs, near = torch.rand(50, 24, generator=generator), Estimate(0.8125, 0.8, 0.83, 81, 100)
    labels = (torch.rand(50, 24, generator=generator) < outputs).float()
    both = {"evaluator": near, "auditor": near}
    rows = [{"amount": x, "exact_set": near, "exact_scene": near} for x in (0.0, 0.1)]
    kinds = ("as asked", "one too many", "one twice", "one missing", "swapped", "deceived")
    shown = {"num_pictures": 500, "top_k": near, "exact_set": near, "exact_scene": near}
    distances = Fidelity(Estimate(0.0456, 0.04, 0.05), Estimate(2.345, 2.3, 2.4))
    metrics = {
        "num_pictures": 3000,
        "calibration": {"num_pictures": 50} | calibration(outputs, labels),
        "recall": {part: {"<10": both, ">24": both} for part in ("count", "neighbor", "height")},
        "changes": {kind: rows for kind in ("blur", "brightness", "noise")},
        "fooled": {kind: shown for kind in kinds},
        "fidelity": dict.fromkeys(("real", "blurred", "few", "copied", "retouched"), distances),
    }
    write_record("judges", {}, metrics, root)


def write_sweep(root):
    """A record as `sweep` writes it."""

    def row(guidance_scale, num_inference_steps, top_k, scheduler="sde-dpmsolver++"):
        return {
            "scheduler": scheduler,
            "guidance_scale": guidance_scale,
            "num_inference_steps": num_inference_steps,
            "repetitions": 2,
            "top_k": Estimate(top_k, top_k - 0.02, top_k + 0.02),
            "exact_set": Estimate(top_k - 0.1, top_k - 0.13, top_k - 0.07),
        }

    guidance = [row(w, 20, 0.92 - 0.02 * (w - 3) ** 2) for w in (1.0, 1.5, 2.0, 3.0, 4.0, 6.0)]
    steps = [row(3.0, n, 0.93 - 0.4 / n) for n in (5, 10, 15, 20, 25, 50)]
    names = ("sde-dpmsolver++", "dpmsolver++", "ddpm", "ddim")
    schedulers = [row(3.0, 20, 0.9 - 0.02 * i, name) for i, name in enumerate(names)]
    metrics = {"guidance": guidance, "steps": steps, "schedulers": schedulers}
    metrics["best_guidance"] = 3.0
    write_record("sweep", {}, metrics, root)


def write_results(root, data, pictures, frames):
    """The records that a report needs, and one of the optional experiments."""
    write_evaluator(root)
    write_auditor(root)
    write_judges(root)
    write_sweep(root)
    write_ceiling(root, data, pictures)
    write_generator(root, "ours", data, 0.01, pictures, frames)
    write_generator(root, "original-cosine", data, 0.05, pictures, frames)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A data set of three scenes with all condition files."""
    root = tmp_path_factory.mktemp("data")
    write_label_files(root)
    for name, conditions in SETS.items():
        (root / f"{name}.json").write_text(json.dumps(conditions))
    scenes = [(scene, scene_pictures(labels)) for scene, labels in SCENES.items()]
    write_pack(root / "pictures.zip", scenes, speed=8)
    return root


def pictures(count):
    """Pictures (count, 3, 64, 64) in [-1, 1]."""
    scene = torch.from_numpy(scene_pictures(["red cube", "blue sphere", "cyan cube"]))
    return to_float(scene.permute(0, 3, 1, 2)).repeat(count, 1, 1, 1)[:count]


@pytest.fixture(scope="module")
def results(tmp_path_factory, data):
    root = tmp_path_factory.mktemp("results")
    write_results(root, data, pictures, pictures(10))
    return root


@pytest.fixture(scope="module")
def report(tmp_path_factory, results, data):
    """The folder of a finished report."""
    output = tmp_path_factory.mktemp("built") / "report"
    paths = report_build.build(output, results, data)
    assert sorted(paths) == sorted(path for path in output.rglob("*") if path.is_file())
    return output


@pytest.fixture
def work(tmp_path, report, results, data):
    """All that report.typ reads, ready for `typeset`."""
    shutil.copytree(report / "figures", tmp_path / "figures")
    records = report_build.read_records(results)
    report_build.gather(records, results, find_layout(data), tmp_path)
    return tmp_path


def edit_json(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_report_is_a_pdf_and_a_page_that_needs_nothing_else(report):
    assert (report / "report.pdf").read_bytes().startswith(b"%PDF-")
    page = (report / "report.html").read_text()
    figures = list((report / "figures").iterdir())
    assert page.count("<img") == page.count('src="data:image/') == len(figures) == 19
    assert page.count("alt=") == len(figures)


def test_report_says_what_the_records_say(report, results):
    page = (report / "report.html").read_text().replace("\xa0", " ")
    for name, keys in {
        "ours": ("test.scores.top_k", "new_test.scores.top_k", "unseen.scores.top_k"),
        "evaluator": ("test.top_k", "test.exact_set", "test_small.exact_set"),
        "original-cosine": ("test.scores.top_k", "new_test.scores.top_k"),
    }.items():
        record = read_record(name, results)
        for key in keys:
            value, low, high = (record.get(f"{key}.{part}") for part in ("value", "low", "high"))
            assert f"{value:.3f} ({low:.3f}–{high:.3f})" in page, (name, key)
    for name, key in {
        "ours": "new_test.audit.exact_scene",
        "auditor": "repeated.exact_scene",
        "judges": "fidelity.copied.nearest_distance",
    }.items():
        estimate = read_record(name, results).get(key)
        assert "{value:.3f} ({low:.3f}–{high:.3f})".format(**estimate) in page, (name, key)
    assert page.count("<td>45.60 (40.00–50.00)</td>") == 5, (
        "kernel distances are written a thousandfold"
    )
    assert "6.5 million parameters" in page and "0.0123" in page and "10,000 steps" in page
    for row in original_scores().values():
        written = (f"{e.value:.3f} ({e.low:.3f}–{e.high:.3f})" for e in row.values())
        assert "".join(f"<td>{text}</td>" for text in written) in page
    ceiling = read_record("ceiling", results).get("new_test.scores.top_k")
    assert "{value:.3f} ({low:.3f}–{high:.3f})".format(**ceiling) in page
    assert "original-cosine, trained here" in page
    assert "original-baseline, original-channels" in re.sub("</?code>", "", page)


def test_readme_table_says_what_the_records_say(results, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- results -->\nold\n<!-- /results -->\nafter\n")
    records = report_build.read_records(results)
    report_build.write_readme(records, readme)
    report_build.write_readme(records, readme)
    text = readme.read_text()
    assert text.startswith("before\n<!-- results -->\n| top-k accuracy |") and "old" not in text
    assert text.endswith("\n<!-- /results -->\nafter\n")
    for split in ("test", "new_test", "unseen"):
        assert (
            "{value:.3f} ({low:.3f}–{high:.3f})".format(
                **read_record("ours", results).get(f"{split}.scores.top_k")
            )
            in text
        )
    assert (
        "| 0.931 (0.848–0.970) | 0.976 (0.917–0.993) | – |" in text
        and "| 0.972 | 0.964 | – |" in text
    )
    assert "trained for 3.0 hours on a processor of two cores" in text
    exact = read_record("ours", results).get("new_test.audit.exact_scene.value")
    assert f" and {exact:.1%} of the pictures for `test` and `new_test` show exactly" in text


def test_each_place_beside_published_figures_says_what_ours_are_of(report, results):
    page = (report / "report.html").read_text().replace("\xa0", " ")
    captions = re.findall(r"<figcaption>.*?</figcaption>", page, re.DOTALL)
    beside = [text for text in captions if "published" in text and "here" in text]
    assert len(beside) == 2, "the chart and the table of accuracies"
    for text in beside:
        assert "own condition files, own evaluator" in text and "rendered" in text
    abstract = page.split('<div class="summary">')[1]
    assert "All results here are of a stand-in" in abstract
    real, own = 0.972, read_record("evaluator", results).get("test.top_k")
    assert f"<td>{real}</td>" in page, "the ceiling of the course's evaluator"
    assert "<td>{value:.3f} ({low:.3f}–{high:.3f})</td>".format(**own) in page, "and of ours"
    table = report_build.accuracy_table(report_build.read_records(results))
    assert "| **this model**, on the stand-in |" in table and "| 0.972 |" in table
    assert "rendered pictures, condition files of our own and our own evaluator" in table
    assert "| ceiling of the stand-in: renders of the same conditions |" in table
    assert (
        "| ceiling of our evaluator: renders of one to five objects | {:.3f} (".format(own["value"])
        in table
    )


def test_abstract_stands_in_chinese_too_in_the_font_of_the_project(report, results, tmp_path):
    page = (report / "report.html").read_text("utf-8")
    found = re.search(r'<div lang="zh-Hant">(.*?)</div>', page, re.DOTALL)[1]
    text = re.sub(r"<[^>]*>|\s", "", found)
    assert "摘要。" in text and "替代品" in text
    for name in ("test", "new_test"):
        estimate = read_record("ours", results).get(f"{name}.scores.top_k")
        assert "{value:.3f}（{low:.3f}–{high:.3f}）".format(**estimate) in text
    printing.unpack_font(tmp_path)
    assert printing.missing_characters(text, tmp_path, system_fonts=False) == []
    embedded = re.search(r"url\(data:font/otf;base64,([^)]*)\)", page)[1]
    font = TTFont(io.BytesIO(base64.b64decode(embedded)))
    chinese = {ord(character) for character in text if ord(character) > 0x2E7F}
    assert chinese <= set(font.getBestCmap()) and len(embedded) < 200_000
    assert b"NotoSerifCJKtc" in (report / "report.pdf").read_bytes()


def test_page_has_a_table_of_contents_whose_links_lead_somewhere(report):
    page = (report / "report.html").read_text("utf-8")
    contents = page.split('<nav role="doc-toc">')[1].split("</nav>")[0]
    targets = re.findall(r'href="#([^"]+)"', contents)
    assert len(targets) == len(set(targets)) == len(re.findall(r"<h[23][ >]", page)) - 1
    assert all(f'id="{target}"' in page for target in targets)
    assert "Results</a>" in contents and "How the judges were validated</a>" in contents


def test_report_says_who_when_and_how_to_cite(report, results):
    page = (report / "report.html").read_text("utf-8")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert citation["version"] == lab7.__version__
    day = datetime.date.fromisoformat(read_record("ours", results).environment["date"][:10])
    assert f"{citation['authors'][0]['name']} · {day.day} {day:%B %Y}, the day" in page
    assert f"<em>{citation['title']}</em>, version {lab7.__version__}" in page


def test_report_shows_the_code_as_it_is(report):
    page = (report / "report.html").read_text("utf-8")
    shown = html.unescape(re.sub(r"<[^>]+>", "", page.replace("<br>", "\n")))
    for name, parts in LISTINGS.items():
        assert listing(*parts).strip() in shown, name


def test_twins_are_shown_and_compared_as_far_as_they_were_run(results, data, tmp_path):
    root, pages = tmp_path / "results", {}
    shutil.copytree(results, root)
    write_twin(root, "twin-baseline", data, 0.1, pictures, pictures(10))
    alone = report_build.read_records(root)
    write_twin(root, "twin-cosine", data, 0.02, pictures, pictures(10))
    report_build.build(tmp_path / "built", root, data)
    work = tmp_path / "work"
    shutil.copytree(tmp_path / "built" / "figures", work / "figures")
    report_build.gather(alone, root, find_layout(data), work)
    texts = (
        printing.typeset(work, "html").decode(),
        (tmp_path / "built/report.html").read_text("utf-8"),
    )
    for count, text in enumerate(texts, 1):
        pages[count] = html.unescape(re.sub(r"</?(code|span)[^>]*>", "", text))
    assert "Not run yet: twin-channels, twin-one-layer, twin-half-channels, twin" in pages[1]
    assert "None of the original report’s four questions" in pages[1]
    assert "None of the original report’s four questions" not in pages[2]
    assert "<td>twin-cosine</td><td>twin-baseline</td>" in pages[2]


def test_report_does_without_optional_records(results, data, tmp_path):
    fewer = tmp_path / "results"
    shutil.copytree(results, fewer)
    for name in ("ceiling", "original-cosine"):
        shutil.rmtree(fewer / name)
    paths = report_build.build(tmp_path / "report", fewer, data)
    assert "beside.webp" not in [path.name for path in paths]
    assert "<td>not measured</td>" in (tmp_path / "report" / "report.html").read_text()


def test_sampling_times_are_those_of_the_record(work):
    metrics = {"ours": {"seconds_a_picture": 1.25}, "original": {"seconds_a_picture": 321.5}}
    config = {"pictures": 16, "timed_steps": 4}
    write_record("sampling", config, metrics, work / "results")
    edit_json(work / "facts.json", lambda facts: facts["records"].append("sampling"))
    page = printing.typeset(work, "html").decode().replace("\xa0", " ")
    assert "<td>1.25 s</td><td>322 s</td>" in page and "<td>not measured</td>" not in page


def test_report_counts_the_data(report):
    page = (report / "report.html").read_text()
    assert "The training set has 9 pictures" in page
    assert "of the 276 pairs 3, and of the 2,024 triples 3" in page
    assert "<td><code>valid</code></td><td>3</td><td>5</td>" in page
    assert "draws of this project’s own. The others are additions." in page


def test_report_is_the_same_each_time(report, results, data, tmp_path):
    for path in report_build.build(tmp_path / "again", results, data):
        before = report / path.relative_to(tmp_path / "again")
        assert path.read_bytes() == before.read_bytes(), path.name


def test_pdf_has_no_warnings(work):
    _, warnings = printing.typst.compile_with_warnings(
        work / "report.typ",
        root=work,
        font_paths=[work / "fonts"],
        format="pdf",
        ignore_system_fonts=True,
    )
    assert [warning.message for warning in warnings] == []


def test_a_students_report_shows_what_is_handed_in(tmp_path, report, results, data):
    sets = {name: load_conditions(data / f"{name}.json") for name in ("test", "new_test")}
    scored = {
        name: (make_scores(conditions, 0.05, repetitions=1), -pictures(len(conditions)))
        for name, conditions in sets.items()
    }
    row = ("red sphere", "yellow cube", "cyan cylinder")
    handin = HandIn(
        "B11107122 張欀齡", "Lab 6, spring 2024", scored, row, -pictures(9), True, False
    )
    report_build.build(tmp_path, results, data, handin)
    page = (tmp_path / "report.html").read_text("utf-8")
    assert "B11107122 張欀齡" in page and "Lab 6, spring 2024" in page
    assert "the condition “red sphere, yellow cube, cyan cylinder”" in page
    assert (
        "of the course’s <code>test.json</code>" in page and "show the pictures handed in" in page
    )
    for name, (metrics, _) in scored.items():
        found = metrics["scores"].top_k
        cells = (f"<code>images/{name}</code>", len(sets[name]), found.total, found.hits)
        assert "".join(f"<td>{cell}</td>" for cell in cells) in page
        assert f"<strong>{found.value:.4f}</strong>" in page
    for name in ("test.webp", "new_test.webp", "denoising.webp"):
        paths = [folder / "figures" / name for folder in (tmp_path, report)]
        assert paths[0].read_bytes() != paths[1].read_bytes(), name
    assert b"NotoSerifCJKtc" in (tmp_path / "report.pdf").read_bytes()


@pytest.mark.parametrize("encoding, rows", [("big5", BIG5_ROWS), ("gb2312", GB2312_ROWS)])
def test_common_characters_can_be_printed(tmp_path, encoding, rows):
    printing.unpack_font(tmp_path)
    cells = range(0xA1, 0xFF)
    text = "".join(bytes((row, cell)).decode(encoding, "ignore") for row in rows for cell in cells)
    assert printing.FONT.stat().st_size < 3e6 and len(text) > 3700
    assert set(printing.missing_characters(text, tmp_path, False)) <= set("ˍ‾∼≒")


def test_rare_characters_come_from_the_machine_or_are_refused(monkeypatch):
    for name in ("Ada Łukasz 王小明", "买买提·凃堃", "邬钰 闫颢炜"):
        assert not printing.needs_system_fonts(name)
    with pytest.raises(ValueError, match=r"no font has . \(U\+10FFF0\) of"):
        printing.needs_system_fonts("王\U0010fff0")
    monkeypatch.setattr(
        printing,
        "missing_characters",
        lambda text, folder, system_fonts: [] if system_fonts else ["㛢"],
    )
    assert printing.needs_system_fonts("李㛢")


@pytest.mark.parametrize(
    ("file", "parent", "key", "message"),
    [
        ("ours/metrics.json", "training", "seconds", "seconds"),
        ("ours/metrics.json", "unseen", "scores", "'ours' has no 'metrics.unseen.scores'"),
        ("ours/config.json", "noise", "beta_schedule", "beta_schedule"),
        ("evaluator/metrics.json", None, "test_small", "'evaluator' has no 'metrics.test_small"),
        ("auditor/metrics.json", None, "repeated", "'auditor' has no 'metrics.repeated'"),
        ("sweep/metrics.json", None, "guidance", "'sweep' has no 'metrics.guidance'"),
    ],
)
def test_missing_key_is_named(work, file, parent, key, message):
    def remove(content):
        del (content[parent] if parent else content)[key]

    edit_json(work / "results" / file, remove)
    with pytest.raises(ValueError, match=message):
        report_build.typeset(work, "pdf")


@pytest.mark.parametrize(
    ("name", "key", "message"),
    [
        ("sweep", None, "unknown record of .* 'sweep'"),
        ("ours", "test.pictures", "metric of record 'ours' 'test.pictures.counted'"),
    ],
)
def test_missing_result_leaves_nothing_behind(results, data, tmp_path, name, key, message):
    broken = tmp_path / "results"
    shutil.copytree(results, broken)
    if key is None:
        shutil.rmtree(broken / name)
    else:
        edit_json(broken / name / "metrics.json", lambda metrics: metrics["test"].pop("pictures"))
    with pytest.raises(ValueError, match=message):
        report_build.build(tmp_path / "report", broken, data)
    assert not (tmp_path / "report").exists()


def test_missing_picture_is_named(results, data, tmp_path):
    broken = tmp_path / "results"
    shutil.copytree(results, broken)
    (broken / "ours" / "denoising.png").unlink()
    with pytest.raises(FileNotFoundError, match="denoising.png"):
        report_build.build(tmp_path / "report", broken, data)


def test_text_that_no_longer_fits_the_model_stops_the_build(work):
    def change(config):
        config["noise"]["prediction_type"] = "epsilon"

    edit_json(work / "results" / "ours" / "config.json", change)
    with pytest.raises(ValueError, match="report.typ describes v-prediction"):
        report_build.typeset(work, "html")


def test_scenes_show_objects_being_added(report):
    sheet = np.asarray(Image.open(report / "figures" / "scenes.webp").convert("RGB"))
    first, second = sheet[0:192, 0:192].astype(int), sheet[210:402, 0:192].astype(int)
    assert sheet.shape[1] == 3 * 192 + 2 * 18  # three scenes side by side
    assert np.abs(first - second).mean() > 2
