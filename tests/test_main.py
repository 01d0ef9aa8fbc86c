"""The command line: what it writes and prints, and one-line errors with exit code 2."""

import contextlib
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from conftest import SCENES, write_course, write_label_files
from PIL import Image

from lab7.__main__ import main
from lab7.dataset import CONDITION_FILES, DATA_DIR
from lab7.errors import UserError
from lab7.evaluator import Evaluator, build_network
from lab7.labels import encode, load_conditions
from lab7.layouts import ROOT
from lab7.model import ConditionalUNet
from lab7.records import read_record
from lab7.scoring import Verdicts
from workshop.course.handed_in import read_handed_in
from workshop.judges.judge_training import save_weights
from workshop.study.evaluation import save_failures


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("evaluator") / "evaluator.safetensors"
    save_weights(build_network(), path)
    return path


@pytest.fixture
def run(monkeypatch, capsys):
    def call(*arguments):
        monkeypatch.setattr("sys.argv", ["lab7", *map(str, arguments)])
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = stop.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def tiny(saved_pipeline, weights):
    return ["--checkpoint", saved_pipeline, "--evaluator", weights, "--device", "cpu"]


def assert_fails(result, *parts):
    code, out, err = result
    assert code == 2
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in err, err
    for part in parts:
        assert part in lines[0]


@pytest.mark.parametrize(
    "typed",
    [
        [" Red  cube, blue cylinder"],
        ['["red cube", "blue cylinder"]'],
        ["[red cube,", "blue cylinder]"],  # what a shell leaves of it without quotes around it
        ["red", "cube,", "blue", "cylinder"],
        ["red_cube", "blue-cylinder"],
    ],
)
def test_sample_draws_labels_as_people_type_them(run, tiny, tmp_path, typed):
    part = ["--guidance-interval", 300, 900]
    code, out, _ = run("sample", *typed, "--out", tmp_path / "o", *part, *tiny)
    assert code == 0 and "1 pictures in" in out
    assert Image.open(tmp_path / "o" / "0.png").size == (64, 64)
    summary = json.loads((tmp_path / "o" / "samples.json").read_text())
    assert summary["conditions"] == [["red cube", "blue cylinder"]]
    assert summary["settings"]["guidance_interval"] == [300, 900]


def test_sample_draws_a_condition_file_and_evaluate_scores_it(
    run, tiny, weights, tmp_path, embedded_root
):
    conditions = tmp_path / "mine.json"
    conditions.write_text('[["red cube"], ["gray sphere", "cyan cube"]]')
    out = tmp_path / "images" / "test"
    assert run("sample", "--conditions", conditions, "--out", out, *tiny)[0] == 0
    summary = json.loads((out / "samples.json").read_text())
    given = ["--images", out, "--conditions", conditions, "--evaluator", weights]
    given += ["--data", embedded_root, "--failures", tmp_path / "failures"]
    code, printed, _ = run("evaluate", *given)
    assert code == 0
    assert f"{summary['scores']['top_k']['value']:.4f}" in printed


def test_evaluate_prints_a_table_and_shows_failures(run, tiny, tmp_path, embedded_root):
    conditions = tmp_path / "mine.json"
    conditions.write_text('[["red cube"], ["gray sphere", "cyan cube"]]')
    given = ["--conditions", conditions, "--data", embedded_root, "--failures", tmp_path / "f"]
    code, out, _ = run("evaluate", "--repetitions", 2, *given, *tiny)
    assert code == 0
    rows = {line.split("  ")[0]: line for line in out.splitlines()}
    assert rows["pictures"].split() == ["pictures", "4"]
    assert rows["conditions"].split() == ["conditions", "2"]
    shares = ("top-k", "exact set", "precision", "recall", "F1")
    for name in (*shares, "exact scene", "extra", "missing", "swapped", "doubled", "other"):
        assert re.search(r"\d\.\d{4} \[\d\.\d{3}, \d\.\d{3}\] \d+/\d+$", rows[name]), name
    assert "kernel distance" in rows and "nearest distance" in rows
    assert "4 pictures of file-mine failed" in out
    assert (tmp_path / "f" / "file-mine.png").exists()


def test_a_figure_of_failures_goes_when_nothing_fails(tmp_path):
    figure = tmp_path / "test.png"
    figure.write_text("of an earlier call")
    right = Verdicts([["gray cube"]], [0], [0], [1], [[0]], [[0]])
    save_failures("test", right, None, tmp_path)
    assert not figure.exists()


def test_evaluate_and_sweep_write_records(run, tiny, tmp_path, monkeypatch, embedded_root):
    short = {name: [("red cube",), ("gray sphere", "cyan cube")] for name in CONDITION_FILES}
    monkeypatch.setattr("workshop.study.evaluation.find_conditions", lambda name, _: short[name])
    monkeypatch.setattr("lab7.dataset.named_conditions", lambda name, data: short[name])
    given = ["--repetitions", 1, "--results", tmp_path, "--data", embedded_root, *tiny]
    part = ["--guidance-interval", 300, 900]
    code, out, _ = run("evaluate", "--record", "mine", "--failures", tmp_path / "f", *part, *given)
    assert code == 0 and out.splitlines()[0].split() == [*CONDITION_FILES]
    record = read_record("mine", tmp_path)
    assert record.get("test.scores.num_pictures") == record.get("test.audit.num_pictures") == 2
    assert record.get("test.guidance_interval") == [300, 900]
    assert len(record.get("test.pictures.counted")) == 2
    assert record.get("test.fidelity.nearest_distance.value") > 0
    code, out, _ = run("sweep", "--guidance", 1, 2, "--steps", 1, "--schedulers", "ddim", *given)
    record = read_record("sweep", tmp_path)
    assert code == 0 and out.splitlines()[-1] == f"best guidance {record.get('best_guidance'):g}"
    assert "audit" not in record.metrics["guidance"][0], "the auditor has no part in choices"


def test_a_file_is_never_recorded_as_the_set_of_its_name(run, tiny, tmp_path, embedded_root):
    path = tmp_path / "my" / "test.json"
    path.parent.mkdir()
    path.write_text('[["red cube"], ["gray sphere", "cyan cube"]]')
    given = ["--conditions", path, "--data", embedded_root, "--failures", tmp_path / "f", *tiny]
    given += ["--repetitions", 1, "--record", "mine", "--results", tmp_path]
    code, out, _ = run("evaluate", *given)
    assert code == 0 and out.splitlines()[0].split() == ["file-test"]
    record = read_record("mine", tmp_path)
    assert "test" not in record.metrics
    assert record.get("file-test.pictures.conditions")[0] == ["red cube"]


def test_what_needs_renders_says_where_they_come_from(run, tmp_path):
    for command in ("examine", "train-auditor"):
        result = run(command, "--renders", tmp_path)
        assert_fails(result, f"no scenes in {tmp_path}", "python -m lab7 render auditor")


def test_train_runs_resumes_and_saves(run, embedded_root, tmp_path):
    arguments = ["train", "smoke", "--data", embedded_root, "--output", tmp_path / "run"]
    assert run(*arguments, "--device", "cpu")[0] == 0
    assert (tmp_path / "run" / "pipeline" / "model_index.json").exists()
    assert run(*arguments, "--device", "cpu")[0] == 0, "a finished run is just finished"
    assert run(*arguments, "--steps", 6)[0] == 0, "and can be extended"
    assert_fails(run(*arguments, "--batch-size", 2), "batch_size")


def test_the_courses_folder_serves_every_command(run, course_root, tmp_path, monkeypatch):
    torch.manual_seed(1)
    network = build_network()
    torch.save({"model": network.state_dict()}, course_root / "checkpoint.pth")
    monkeypatch.setenv("LAB7_DATA", str(course_root))
    mine, out = tmp_path / "run", tmp_path / "images"
    elsewhere = (course_root / "iclevr").rename(tmp_path / "elsewhere")
    given = ["--pictures", elsewhere, "--rescan"]
    code, printed, _ = run("train", "smoke", "--output", mine, *given)
    assert code == 0 and "minutes of training on cpu" in printed
    elsewhere.rename(course_root / "iclevr")
    given = ["--conditions", "test", "--checkpoint", mine / "pipeline"]
    assert run("sample", *given, "--out", out)[0] == 0
    assert json.loads((out / "samples.json").read_text())["conditions"][0] == ["red cube"]
    code, printed, _ = run(
        "evaluate", "--images", out, "--conditions", "test", "--failures", tmp_path / "failures"
    )
    wanted = Evaluator(network).eval(
        read_handed_in(out, {"test": 2})["test"][0],
        encode(load_conditions(course_root / "test.json")),
    )
    assert code == 0 and f"{wanted:.4f}" in printed, "judged by checkpoint.pth"


@pytest.fixture(scope="module")
def course_work(tmp_path_factory):
    """The course's folder, a generator trained on it, and its records, all by commands."""
    root = tmp_path_factory.mktemp("work")
    course, mine, results = write_course(root / "course", SCENES), root / "run", root / "results"
    torch.manual_seed(1)
    torch.save({"model": build_network().state_dict()}, course / "checkpoint.pth")
    checkpoint = ["--checkpoint", mine / "pipeline", "--results", results, "--data", course]
    brief = "--guidance 1 2 --steps 2 --schedulers ddim sde-dpmsolver++ --repetitions 1 --keep"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LAB7_CACHE", str(root / "cache"))
        for command in (
            ["train", "smoke", "--output", mine, "--data", course],
            ["sweep", *checkpoint, *brief.split()],
            ["evaluate", "--record", "ours", "--repetitions", 1, "--failures", root, *checkpoint],
        ):
            patch.setattr("sys.argv", ["lab7", *map(str, command)])
            main()
    return course, mine / "pipeline", results


def test_records_of_the_courses_pictures_say_so(course_work):
    course, _, results = course_work
    record = read_record("ours", results)
    assert record.get("course") == {"pictures": True, "evaluator": True}
    assert record.get("test.scores.num_conditions") == 2
    assert record.get("unseen.scores.num_conditions") == 136
    assert 64 < record.get("valid.scores.num_conditions") < 128, "without what is tested"


def test_report_on_the_courses_files(run, course_work, tmp_path, cache_dir):
    course, _, results = course_work
    given = ["report", "--output", tmp_path / "r", "--results", results]
    assert_fails(run(*given), "does not hold the pictures of the records", "--data or LAB7_DATA")
    assert run(*given, "--data", course)[0] == 0
    page = (tmp_path / "r" / "report.html").read_text()
    assert "The training set has 9 pictures" in page and "checkpoint.pth" in page
    assert "trained on the course’s pictures" in page and "Mitsuba" not in page
    assert "ground is not the course" not in page and "its own were trained on" not in page
    assert "The auditor on renders that it never saw" in page and "Reliability of" not in page


def test_a_record_is_of_the_pictures_trained_on(run, course_work, tmp_path, weights):
    _, checkpoint, _ = course_work
    given = ["--checkpoint", checkpoint, "--evaluator", weights, "--results", tmp_path]
    assert_fails(run("evaluate", "--record", "ours", *given), "trained on other pictures", "--data")
    assert not (tmp_path / "ours" / "metrics.json").exists()


def test_handin_on_the_courses_conditions_with_the_shipped_report(
    run, tiny, course_root, tmp_path, monkeypatch
):
    """The report stays about the pictures that its records are of, and says what is handed in."""
    asked = []

    monkeypatch.setattr(
        "workshop.course.handin.file_hash",
        lambda _: read_record("ours").environment["weights_sha256"],
    )

    def build(folder, results, data, handin):
        asked.append((data, handin))
        (folder / "report.pdf").write_bytes(b"no PDF")

    monkeypatch.setattr("workshop.course.handin.build", build)
    monkeypatch.setattr("workshop.course.handin.LEAST_FRAMES", 3)
    given = ["--data", course_root, "--output", tmp_path, *tiny]
    result = run("handin", "1", "王小明", "--year", "2024", *given)
    assert_fails(result, "report.pdf is no complete PDF")
    assert not list(tmp_path.glob("*.zip"))
    ((data, handin),) = asked
    assert data is None
    assert handin.course_conditions and not handin.course_evaluator
    assert (handin.student, handin.task) == ("1 王小明", "Lab 6, spring 2024")
    assert handin.denoised == ("red sphere", "yellow cube", "cyan cylinder")


def test_handin(run, course_work, tmp_path, cache_dir, monkeypatch):
    course, checkpoint, results = course_work
    monkeypatch.setenv("LAB7_DATA", str(course))
    given = ["--checkpoint", checkpoint, "--results", results, "--output", tmp_path]
    given = ["handin", "312551000", "Ada O'Neill 王", *given]
    assert_fails(run(*given), "a denoising row of 3 pictures", "at least 8")
    assert not list(tmp_path.glob("*.zip"))
    monkeypatch.setattr("workshop.course.handin.LEAST_FRAMES", 3)
    code, out, _ = run(*given)
    assert code == 0 and "images/test: pictures, 2 of 64×64 pixels" in out
    path = tmp_path / "DL_LAB6_312551000_Ada_O'Neill_王.zip"
    with zipfile.ZipFile(path) as pack:
        names = pack.namelist()
    wanted = {"report.pdf", "source/lab7/training.py", "source/Makefile", "source/report/build.py"}
    assert wanted < set(names)
    pictures = ["images/test/0.png", "images/test/1.png", "images/new_test/0.png"]
    assert [name for name in names if name.startswith("images")] == pictures, "and nothing else"
    assert not any(name.endswith((".pth", ".safetensors")) for name in names)
    assert run("handin", "--check", path)[0] == 0


def test_handin_of_other_weights_than_the_records_is_refused(run, course_work, tmp_path):
    _, checkpoint, results = course_work
    assert_fails(run("handin", "1", "a/b", "--output", tmp_path), "name 'a/b'", "'/'")
    assert_fails(run("handin", "1", "--output", tmp_path), "give ID and name", "--check ZIP")
    assert_fails(run("handin", "1", "a", "--year", "2022"), "unknown year '2022'", "2023-spring")
    assert_fails(run("handin", "1", "a", "--seed", -1), "seed -1 is not within 0 … 2**63 - 1")
    assert_fails(run("handin", "", "a", "--output", tmp_path), "ID ''", "make handin ID=")
    result = run("handin", "1", "a", "--results", results, "--output", tmp_path)
    assert_fails(result, "other weights than", "evaluate --checkpoint")
    assert list(tmp_path.iterdir()) == []


def test_handin_checks_anybodys_zip(run, tmp_path):
    path = tmp_path / "DL_LAB6_1_a.zip"
    with zipfile.ZipFile(path, "w") as pack:
        pack.writestr("x/report.pdf", "no PDF")
        pack.writestr("x/images/test/0.png", "no PNG")
        pack.writestr("x/images/test/grid.png", "one too many")
    result = run("handin", "--check", path)
    assert_fails(result, "DL_LAB6_1_a.zip has to be mended: see the 6 lines above")
    assert "against the list of spring 2026" in result[1]
    for line in (
        "wrong     report.pdf is no complete PDF",
        "missing   images/new_test/0.png … 31.png",
        "too much  images/test: grid.png",
    ):
        assert line in result[1]


@pytest.mark.parametrize(
    "text, parts",
    [
        ("red cubes", ["red cubes", "did you mean 'red cube'"]),
        ("red cube, red cube", ["red cube"]),
        ("", []),
    ],
)
def test_bad_labels(run, tiny, tmp_path, text, parts):
    assert_fails(run("sample", text, "--out", tmp_path / "o", *tiny), *parts)
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("content", ["", "[]", '["red cube"]', '[["red cube"', "{}", '[["x"]]'])
def test_bad_condition_files(run, tiny, tmp_path, content):
    path = tmp_path / "bad.json"
    path.write_text(content)
    result = run("sample", "--conditions", path, "--out", tmp_path / "o", *tiny)
    assert_fails(result, "bad.json")
    assert not (tmp_path / "o").exists()


def test_missing_and_broken_pictures_are_named(run, weights, tmp_path, monkeypatch):
    monkeypatch.setattr("workshop.study.evaluation.load_judges", None)  # is not reached
    conditions = tmp_path / "c.json"
    conditions.write_text('[["red cube"], ["gray sphere"]]')
    folder = tmp_path / "pictures"
    folder.mkdir()
    given = ["evaluate", "--images", folder, "--conditions", conditions, "--evaluator", weights]
    picture = Image.fromarray(np.zeros((64, 64, 3), np.uint8))
    picture.save(folder / "0.png")
    assert_fails(run(*given), "1.png")
    picture.save(folder / "1.png")
    whole = (folder / "1.png").read_bytes()
    (folder / "1.png").write_bytes(whole[: len(whole) // 2])
    assert_fails(run(*given), "1.png")
    picture.resize((50, 50)).save(folder / "1.png")
    assert_fails(run(*given), "1.png", "50")


class Bomb:
    def __reduce__(self):
        return exec, ("raise SystemExit('code ran')",)


def test_bad_weights_are_refused(run, saved_pipeline, tmp_path):
    given = ["sample", "red cube", "--out", tmp_path / "o", "--checkpoint"]
    assert_fails(run(*given, tmp_path / "nothing"), "nothing")
    path = tmp_path / "checkpoint.pth"
    evaluator = ["--evaluator", path]
    assert_fails(run(*given, saved_pipeline, *evaluator), "checkpoint.pth")
    path.write_bytes(pickle.dumps({"model": Bomb()}))
    assert_fails(run(*given, saved_pipeline, *evaluator), "refused")
    state = build_network().state_dict()
    torch.save({"model": state | {"fc.0.bias": torch.zeros(10)}}, path)
    assert_fails(run(*given, saved_pipeline, *evaluator), "fc.0.bias", "(10,)", "(24,)")
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("mistake", [ValueError, FileNotFoundError, RuntimeError])
@pytest.mark.parametrize("where", ["__init__", "forward"])
def test_a_mistake_in_model_py_keeps_its_traceback(
    run, tiny, tmp_path, monkeypatch, where, mistake
):
    def changed(self, *args, **kwargs):
        raise mistake("of a student")

    monkeypatch.setattr(ConditionalUNet, where, changed)
    for command in (["sample", "red cube", "--out", tmp_path / "o", *tiny], ["train", "smoke"]):
        with pytest.raises(mistake, match="of a student") as error:
            run(*command)
        assert not isinstance(error.value, UserError) and error.traceback[-1].name == "changed"


# Runs several commands in one process: loading PyTorch takes seconds.
RUN_ALL = """
import contextlib, io, json, sys, traceback
from lab7.__main__ import main
results = []
for arguments in json.load(sys.stdin):
    sys.argv, shown = ["lab7", *arguments], io.StringIO()
    with contextlib.redirect_stderr(shown), contextlib.redirect_stdout(shown):
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = stop.code
        except Exception:
            code = 1
            traceback.print_exc()
    results.append((code, "", shown.getvalue()))
print(json.dumps(results))
"""


@pytest.mark.skipif(os.name != "posix", reason="needs the permissions of Unix")
def test_places_without_permission_are_named(tiny, tmp_path):
    # Permissions stop root only when it has given up the right to pass over them.
    bound = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search"]
    bound = bound if os.geteuid() == 0 else []
    if bound and shutil.which("setpriv") is None:
        pytest.skip("as root this test needs setpriv, of util-linux")
    closed = tmp_path / "closed"
    closed.mkdir()
    shutil.copy(DATA_DIR / "test.json", tmp_path / "test.json")
    tmp_path.chmod(0o555)
    closed.chmod(0)
    (tmp_path / "test.json").chmod(0)
    commands = [
        ["train", "smoke", "--output", tmp_path / "mine"],
        ["render", "--output", tmp_path / "mine"],
        ["sample", "red cube", *tiny, "--out", tmp_path / "mine"],
        ["evaluate", "--record", "mine", *tiny, "--results", tmp_path / "mine"],
        ["evaluate", *tiny, "--failures", tmp_path / "mine"],
        ["report", "--output", tmp_path / "mine"],
        ["sample", *tiny, "--conditions", tmp_path / "test.json"],
        ["sample", *tiny, "--conditions", closed / "test.json"],
        ["sample", "red cube", "--checkpoint", closed / "pipeline"],
        ["sample", "red cube", *tiny[:2], "--evaluator", closed / "evaluator.safetensors"],
        ["train", "smoke", "--data", closed],
        ["evaluate", *tiny, "--images", closed / "images"],
        ["experiments", "smoke", "--plan", "--results", closed / "results"],
        ["examine", "--renders", closed / "renders"],
        ["report", "--results", closed / "results"],
        ["adopt", closed / "mine.pth"],
    ]
    arguments = json.dumps([list(map(str, command)) for command in commands])
    done = subprocess.run(
        [*bound, sys.executable, "-c", RUN_ALL],
        cwd=ROOT, input=arguments, capture_output=True, text=True,
    )  # fmt: skip
    for result in json.loads(done.stdout.splitlines()[-1]):
        assert_fails(result, f"Permission denied: {tmp_path}")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["closed", "test.json"]
    closed.chmod(0o755)  # for pytest, which removes it


@contextlib.contextmanager
def largest_file(size):
    """Let no file grow beyond so many bytes, as on a disk that is full then."""
    resource = pytest.importorskip("resource")  # of Unix
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.filterwarnings("ignore:.*there is no cache")
def test_a_full_disk_is_one_line(run, tiny, tmp_path, embedded_root):
    conditions = tmp_path / "c.json"
    conditions.write_text('[["red cube"]]')
    given = ["--conditions", conditions, "--data", embedded_root, "--repetitions", 1, *tiny]
    commands = (
        ["sample", "red cube", "--out", tmp_path / "o", *tiny],
        ["evaluate", "--failures", tmp_path / "o", *given],
        ["report", "--output", tmp_path / "o"],
    )
    for command in commands:
        with largest_file(500):
            result = run(*command)
        assert_fails(result, "File too large")
        assert not [path for path in tmp_path.glob("o/**/*") if path.is_file()]
    with largest_file(100_000):
        result = run("train", "smoke", "--data", embedded_root, "--output", tmp_path / "run")
    assert_fails(result, "training state", "File too large")


@pytest.mark.parametrize(
    "arguments, wanted",
    [
        (["sample", "--cuont", "3"], "--count"),
        (["sample", "--count", "many"], "--count"),
        (["sampel"], "sample"),
        (["render", "tarin"], "train"),
        ([], "evaluate"),
    ],
)
def test_wrong_options_are_named(run, arguments, wanted):
    code, _, err = run(*arguments)
    assert code == 2 and wanted in err and "Traceback" not in err


@pytest.mark.skipif(os.name != "posix", reason="needs the pipes of Unix")
def test_a_reader_that_has_enough_is_no_error():
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "lab7", "--help"]
    done = subprocess.run(command, cwd=ROOT, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/nowhere"])
def test_places_that_are_none(run, tiny, tmp_path, embedded_root, place):
    (tmp_path / "file").write_text("mine")
    named = place if place.startswith("/") else "file"
    conditions = tmp_path / "c.json"
    conditions.write_text('[["red cube"]]')
    place, data = tmp_path / place, ["--data", embedded_root]
    scored = ["evaluate", "--conditions", conditions, *tiny]
    commands = (
        ["train", "smoke", *data, "--output", place],
        ["train", "smoke", "--output", tmp_path / "run", "--data", place],
        ["train", "smoke", "--output", tmp_path / "run", *data, "--init-from", place],
        ["sample", "red cube", *tiny, "--out", place],
        ["sample", "red cube", "--out", tmp_path / "o", "--checkpoint", place],
        ["sample", "red cube", "--out", tmp_path / "o", *tiny[:2], "--evaluator", place],
        ["sample", *tiny, "--conditions", place],
        [*scored, *data, "--images", place, "--failures", tmp_path / "f"],
        [*scored, *data, "--failures", place],
        [*scored, *data, "--record", "mine", "--results", place],
        [*scored, "--data", place],
        ["sweep", *tiny, *data, "--results", place],
        ["experiments", "smoke", *data, "--results", tmp_path / "results", "--output", place],
        ["render", "evaluator", "--scenes", 1, "--output", place / "inner"],
        ["render", "evaluator", "--scenes", 1, "--output", tmp_path / "o", "--work", place],
        ["train-evaluator", "--renders", place],
        ["examine", *data, "--renders", place],
        ["report", "--output", tmp_path / "o", "--results", place],
        ["handin", "1", "a", "--output", place],
    )
    for command in commands:
        assert_fails(run(*command), named)
    if named == "file":  # the other place shows when all is made
        assert_fails(run("report", "--output", place), "file is a file, not a folder")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_that_is_not_the_courses_is_refused(run, tmp_path):
    (tmp_path / "data").mkdir()
    result = run("train", "smoke", "--data", tmp_path / "data", "--output", tmp_path / "run")
    assert_fails(result, "objects.json", "train.json", "iclevr")


def test_unknown_names_get_the_nearest(run, tiny, tmp_path):
    assert_fails(run("train", "original-cosin"), "did you mean 'original-cosine'")
    given = ["sample", "red cube", "--out", tmp_path / "o", *tiny]
    assert_fails(run(*given, "--scheduler", "dpmsolver"), "dpmsolver++")
    assert_fails(run("sample", "--conditions", "tests.json", *tiny), "tests.json")
    assert_fails(run("sample", "--conditions", "new_tset", *tiny), "did you mean 'new_test'")
    assert_fails(run("evaluate", "--conditions", "no/new_tset", *tiny), "no file no/new_tset")


def test_a_device_that_is_not_here_is_refused(run, tiny, tmp_path):
    out = ["--out", tmp_path / "o"]
    assert_fails(run("sample", "red cube", *out, *tiny[:4], "--device", "gpu"), "'gpu'", "cpu")
    assert_fails(run("sample", "red cube", *out, *tiny[:4], "--device", "cpu:1"), "'cpu:1'")
    assert_fails(run("sample", "red cube", *out, *tiny[:4], "--device", "cpu:x"), "'cpu:x'")
    assert run("sample", "red cube", *out, *tiny[:4], "--device", "cpu:0")[0] == 0


def test_settings_that_make_no_sense_are_named(run, tiny, tmp_path, embedded_root):
    before = sorted(tmp_path.iterdir())
    given = ["sample", "red cube", "--out", tmp_path / "o", *tiny]
    assert_fails(run(*given, "--guidance", "nan"), "guidance_scale nan")
    assert_fails(run(*given, "--guidance-interval", 9, 3), "guidance_interval 9 3", "0 … 999")
    assert_fails(run(*given, "--steps", 0), "num_inference_steps 0", "1 … 1000")
    assert_fails(run(*given, "--count", 0), "count 0")
    assert_fails(run(*given, "--seed", 2**64), f"seed {2**64} is not within 0")
    records = ["--results", tmp_path / "results", "--data", embedded_root, *tiny]
    assert_fails(run("evaluate", "--repetitions", 0, *records), "repetitions 0")
    assert_fails(run("sweep", "--guidance", "--steps", 1, *records), "guidance")
    training = ["train", "smoke", "--output", tmp_path / "run", "--data", embedded_root]
    assert_fails(run(*training, "--learning-rate", "nan"), "learning_rate nan")
    assert_fails(run(*training, "--budget", 0), "budget_seconds 0")
    assert_fails(run(*training, "--seed", -1), "seed -1 is not within 0")
    assert_fails(run(*training, "--minutes", -1), "max_seconds -60")
    assert_fails(run("train-evaluator", "--epochs", 0), "epochs 0")
    rendering = ["render", "evaluator", "--output", tmp_path / "renders"]
    assert_fails(run(*rendering, "--scenes", 0), "scenes 0", "9000")
    assert_fails(run(*rendering, "--workers", 0), "workers 0")
    assert_fails(run("render", "--scenes", 3), "--output")
    (tmp_path / "cache").rename(tmp_path / "embedded" / "cache")
    assert sorted(tmp_path.iterdir()) == before


def test_a_record_with_another_name_is_refused_before_the_work(run, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("workshop.study.evaluation.load_judges", None)  # is not reached
    monkeypatch.setattr("lab7.evaluator.Evaluator.load", None)
    results = ["--results", tmp_path / "results"]
    for name in ("../x", "a/b", "my run", ""):
        assert_fails(
            run("evaluate", "--record", name, *results, *tiny), "record's name", repr(name)
        )
        assert_fails(run("sweep", "--record", name, *results, *tiny), "record's name")
        assert_fails(run("examine", "--record", name, *results), "record's name")
    assert list(tmp_path.iterdir()) == []


def test_labels_and_conditions_exclude_each_other(run, tiny, tmp_path):
    assert_fails(run("sample", *tiny), "--conditions")
    both = ["sample", "red cube", "--conditions", DATA_DIR / "test.json", *tiny]
    assert_fails(run(*both), "--conditions")
    (tmp_path / "0.png").touch()
    assert_fails(run("evaluate", "--images", tmp_path, *tiny[2:]), "--conditions")


def test_a_record_needs_the_training_pictures_before_anything_is_drawn(
    run, tiny, tmp_path, monkeypatch
):
    files = tmp_path / "file"
    files.mkdir()
    write_label_files(files)
    for module in ("evaluation", "recording"):
        monkeypatch.setattr(f"workshop.study.{module}.draw_and_judge", None)
    given = ["--data", files, "--results", tmp_path / "results", *tiny]
    assert_fails(run("evaluate", "--record", "mine", *given), "training pictures", "--pictures")
    assert_fails(run("sweep", *given), "pictures", "--pictures")
