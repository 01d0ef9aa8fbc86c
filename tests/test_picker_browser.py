"""The label picker, clicked in a real browser: JupyterLab in Chromium.

With LAB7_RENEW_SCREENSHOT=1 in the environment, notebooks/picker.png is made anew as well, with the
shipped weights: what a notebook shows in the place of the picker to readers without a kernel.
"""

import io
import json
import os
import secrets
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.error import URLError
from urllib.request import Request, urlopen

import nbformat
import pytest
from PIL import Image
from playwright.sync_api import Locator, Page, expect, sync_playwright

from lab7.picker import SCREENSHOT

CHROMIUM = Path("/usr/bin/chromium")
FLAGS = (
    "--no-sandbox --disable-gpu --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
SECONDS = 120  # for anything that a slow machine may take long for
NOTEBOOK = "picker.ipynb"
CELL = """
import torch
from diffusers import DDPMScheduler
from lab7.evaluator import Evaluator, build_network
from lab7.experiments import get_experiment
from lab7.model import ConditionalUNet
from lab7.pipeline import ConditionalDDPMPipeline
from lab7.picker import LabelPicker

torch.set_num_threads(1)
config = get_experiment("smoke").config
pipeline = ConditionalDDPMPipeline(
    ConditionalUNet(**config.unet).eval(), DDPMScheduler(**config.noise), 1000
)
LabelPicker(pipeline, Evaluator(build_network(), "cpu"), labels=())
"""
SHIPPED = """
from lab7.evaluator import Evaluator
from lab7.picker import LabelPicker
from lab7.pipeline import load_pipeline
from lab7.sampling import DENOISING_CONDITION

LabelPicker(load_pipeline(), Evaluator.load(), DENOISING_CONDITION)
"""
FILL = {"cyan": "rgb(41, 208, 208)", "green": "rgb(29, 105, 20)"}
LARGEST = 150_000  # bytes of the screenshot
RENEW = os.environ.get("LAB7_RENEW_SCREENSHOT") == "1"
STATUS = "window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel?.status"
PIXELS = """async image => {
    const bytes = new Uint8Array(await (await fetch(image.src)).arrayBuffer());
    return String.fromCharCode(...bytes.slice(0, 8)) + bytes.reduce((a, b) => (31 * a + b) | 0, 7);
}"""


class Lab:
    """A JupyterLab server on this machine, with folders and a token of its own."""

    def __init__(self, folder: Path):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url, self.token = f"http://127.0.0.1:{port}", secrets.token_hex(16)
        self.log = (folder / "lab.log").open("w+")
        command = (
            f"-m jupyterlab --no-browser --allow-root --ip=127.0.0.1 --port={port} "
            f"--ServerApp.port_retries=0 --IdentityProvider.token={self.token} "
            f"--ServerApp.root_dir={folder} --LabApp.expose_app_in_browser=True "
            "--LabApp.extension_manager=readonly"
        )
        self.process = subprocess.Popen(
            [sys.executable, *command.split()],
            env=os.environ | _own_folders(folder),
            stdout=self.log,
            stderr=subprocess.STDOUT,
        )

    def start_kernel(self, notebook: str) -> None:
        """Open a session, so that the page finds its kernel at work."""
        kernel = {"path": notebook, "name": notebook, "type": "notebook"}
        body = json.dumps(kernel | {"kernel": {"name": "python3"}}).encode()
        headers = {"Authorization": f"token {self.token}", "Content-Type": "application/json"}
        deadline = time.monotonic() + SECONDS
        while True:
            try:
                with urlopen(Request(f"{self.url}/api/sessions", body, headers), timeout=SECONDS):
                    return
            except URLError:
                if self.process.poll() is not None or time.monotonic() > deadline:
                    self.log.seek(0)
                    pytest.fail(f"JupyterLab did not start:\n{self.log.read()}")
                time.sleep(0.1)

    def close(self) -> None:
        """Stop the server, and its kernels with it."""
        self.process.terminate()
        self.process.wait(30)
        self.log.close()


def _own_folders(folder: Path) -> dict[str, str]:
    settings = folder / "settings" / "@jupyterlab"
    overrides = {
        "apputils-extension/notification": {"fetchNews": "false"},
        "docmanager-extension/plugin": {"autosave": False},
    }
    for name, content in overrides.items():
        file = settings / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps(content))
    own = ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR")
    return {name: str(folder / name.lower()) for name in own} | {
        "JUPYTERLAB_SETTINGS_DIR": str(settings.parent),
        "JUPYTERLAB_WORKSPACES_DIR": str(folder / "workspaces"),
        "PYTHONPATH": str(Path(__file__).resolve().parents[1]),
        "LAB7_STATIC": "0",
    }


@pytest.fixture
def lab(tmp_path, request):
    if not CHROMIUM.exists():
        message = f"{CHROMIUM} is missing: apt-get install chromium"
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
    cell = nbformat.v4.new_code_cell(getattr(request, "param", CELL).strip())
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), tmp_path / NOTEBOOK)
    lab = Lab(tmp_path)
    yield lab
    lab.close()


@pytest.fixture
def page(lab):
    """The notebook with its cell run, 900 pixels wide, on a dense screen."""
    lab.start_kernel(NOTEBOOK)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport={"width": 900, "height": 1000}, device_scale_factor=1.5)
        page.set_default_timeout(1000 * SECONDS)
        page.goto(f"{lab.url}/lab/tree/{NOTEBOOK}?token={lab.token}")
        page.wait_for_function(f"{STATUS} === 'idle'")
        page.evaluate("jupyterapp.commands.execute('notebook:run-all-cells')")
        page.locator(".lab7-generate").wait_for()
        yield page
        browser.close()


def fill(field: Locator) -> str:
    """The colors of a bar of the verdict."""
    return field.evaluate("field => getComputedStyle(field, '::after').backgroundImage")


def set_steps(page: Page, steps: int) -> None:
    readout = page.locator(".lab7-sliders .widget-readout").first
    readout.fill(str(steps))
    readout.press("Enter")


def test_picker_draws_judges_and_stops(page):
    expect.set_options(timeout=1000 * SECONDS)
    generate, stop = page.locator(".lab7-generate"), page.locator(".lab7-stop")
    picture, verdict = page.locator("img.lab7-picture"), page.locator(".lab7-verdict")
    status = page.locator(".lab7-status")
    before = picture.evaluate(PIXELS)
    expect(generate).to_be_disabled()
    expect(stop).to_be_disabled()
    expect(verdict.locator("td.lab7-asked")).to_have_count(0)
    expect(verdict).not_to_contain_text("%")

    page.locator(".lab7-green-sphere").click()
    page.locator(".lab7-cyan-cube").press("Space")
    expect(page.locator(".lab7-objects .mod-active")).to_have_count(2)
    set_steps(page, 2)
    generate.click()
    expect(status.locator(".lab7-done")).to_contain_text("2 steps, guidance 1, seed 0: ")
    expect(status).to_contain_text("Asked for: cyan cube, green sphere")
    expect(status).to_contain_text("The evaluator sees: ")
    after = picture.evaluate(PIXELS)
    assert all(pixels.startswith("\x89PNG") for pixels in (before, after))
    assert before != after
    expect(verdict.locator("td.lab7-asked")).to_have_count(2)
    expect(verdict.locator("td span")).to_contain_text(["%"] * 24)
    cube, sphere = verdict.locator("td.lab7-asked").all()
    assert fill(cube).count(FILL["cyan"]) == fill(sphere).count(FILL["green"]) == 1

    set_steps(page, 1000)
    generate.click()
    expect(stop).to_be_enabled()
    expect(generate).to_be_disabled()
    page.locator(".lab7-red-cube").click()
    stop.click()
    expect(status).to_contain_text("Stopped after step")
    expect(status).to_contain_text("Asked for: cyan cube, green sphere")
    expect(generate).to_be_enabled()
    expect(stop).to_be_disabled()
    expect(verdict).not_to_contain_text("%")
    assert picture.evaluate(PIXELS) != after

    outputs = page.locator(".jp-OutputArea-output")
    expect(outputs).to_have_count(1)
    expect(outputs).not_to_contain_text("Error")


@pytest.mark.skipif(not RENEW, reason="LAB7_RENEW_SCREENSHOT=1 makes notebooks/picker.png anew")
@pytest.mark.parametrize("lab", [SHIPPED], indirect=True)
def test_the_screenshot_is_made_anew(page):
    expect.set_options(timeout=1000 * SECONDS)
    page.set_viewport_size({"width": 1400, "height": 1000})  # beside the file browser: all of it
    page.locator(".lab7-generate").click()
    expect(page.locator(".lab7-status")).to_contain_text("The evaluator sees: ")
    page.mouse.move(0, 0)
    shot = Image.open(io.BytesIO(page.locator(".lab7-picker").screenshot())).convert("RGB")
    for step in (1, 3, 5, 15):  # of the colors: the finest that makes the file small enough
        rounded = shot.point([round(value / step) * step for value in range(256)] * 3)
        rounded.save(SCREENSHOT, optimize=True)
        if SCREENSHOT.stat().st_size <= LARGEST:
            return
    pytest.fail(f"{SCREENSHOT} has more than {LARGEST} bytes")
