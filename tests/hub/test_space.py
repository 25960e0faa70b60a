"""The Space that `hf-rsheat space` writes: complete, without traces of this machine, and usable in a browser."""

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import pytest
import yaml
from PIL import Image

from hf_rsheat import VHeatForImageClassification, VHeatImageProcessor, export
from hf_rsheat.errors import ConfigurationError
from hf_rsheat.hub.space import write_space
from hf_rsheat.scenes import make_scene
from tests.zoo import ZOO, vheat_config

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
BROWSER_FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --window-size=1500,1500"
)


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    names = ("rs-vheat-pretraining", "vheat-classifier", "vheat-upernet", "vheat")
    return {name: export(ZOO[name].model(), ZOO[name].processor(size=128), root / name) for name in names}


@pytest.mark.parametrize("name", ["rs-vheat-pretraining", "vheat-classifier", "vheat-upernet", "vheat"])
def test_a_space_is_complete_and_names_no_machine(name, exported, tmp_path):
    for _ in range(2):  # again over the first
        space = write_space(exported[name], tmp_path / "space", title='A "model": ours')
    _, front, body = (space / "README.md").read_text().split("---\n", 2)
    card = yaml.safe_load(front)
    assert (card["sdk"], card["app_file"]) == ("gradio", "app.py")
    assert card["title"].strip()
    assert "models" not in card
    assert ("removed" in body) == (name == "rs-vheat-pretraining")
    compile((space / "app.py").read_text(), "app.py", "exec")
    assert "import hf_rsheat" not in (space / "app.py").read_text()
    assert "from hf_rsheat" not in (space / "app.py").read_text()
    assert "gradio" not in (space / "requirements.txt").read_text()  # the Space brings it, in the card's version
    assert {"config.json", "model.safetensors", "handler.py", "handler_images.py"} <= {
        file.name for file in (space / "model").iterdir()
    }
    examples = [file.name for file in (space / "examples").iterdir()]
    assert any(example.startswith("optical") for example in examples)
    assert any(example.startswith("sar") for example in examples) == name.startswith("rs")
    for file in (*space.glob("*.*"), *(space / "model").glob("*.*")):
        if file.suffix in {".py", ".md", ".json", ".txt"}:
            assert str(tmp_path.parent) not in file.read_text()


def test_a_space_for_a_model_on_the_hub_carries_no_copy(exported, tmp_path):
    space = write_space(exported["vheat"], tmp_path / "space", model_id="user/heat", revision="v1")
    assert not (space / "model").exists()
    assert json.loads((space / "space.json").read_text()) | {"title": ""} == {
        "title": "",
        "model": "user/heat",
        "revision": "v1",
    }
    assert "models:\n- user/heat\n" in (space / "README.md").read_text()


def test_what_cannot_become_a_space_is_refused(exported, tmp_path):
    with pytest.raises(ConfigurationError, match=r"config\.json"):
        write_space(tmp_path, tmp_path.parent / "space")
    with pytest.raises(ConfigurationError, match="lie in each other"):
        write_space(exported["vheat"], exported["vheat"] / "space")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="is a file"):
        write_space(exported["vheat"], tmp_path / "file")
    processor = VHeatImageProcessor(image_mean=[0.5] * 10, image_std=[0.5] * 10)
    bands = export(VHeatForImageClassification(vheat_config(num_channels=10)), processor, tmp_path / "bands")
    with pytest.raises(ConfigurationError, match="10 bands"):
        write_space(bands, tmp_path / "space")
    plain = ZOO["vheat"]
    plain.model().save_pretrained(tmp_path / "plain")
    plain.processor().save_pretrained(tmp_path / "plain")
    with pytest.raises(ConfigurationError, match="hf-rsheat export"):
        write_space(tmp_path / "plain", tmp_path / "space")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def served(request, exported, tmp_path):
    """Address of the running app of one model, in a process of its own."""
    if not CHROMIUM or not DRIVER:
        pytest.skip("needs Chromium and its driver (Debian packages chromium and chromium-driver)")
    for package in ("gradio", "selenium"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}: pip install {package}")
    space, port = write_space(exported[request.param], tmp_path / "space"), free_port()
    environment = {
        **os.environ,
        "GRADIO_SERVER_PORT": str(port),
        "GRADIO_ANALYTICS_ENABLED": "False",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "home"),
        "GRADIO_TEMP_DIR": str(tmp_path / "uploads"),
    }
    with (tmp_path / "log.txt").open("w") as log:
        app = subprocess.Popen([sys.executable, "app.py"], cwd=space, env=environment, stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}/"
    try:
        for _ in range(240):
            assert app.poll() is None, (tmp_path / "log.txt").read_text()[-3000:]
            try:
                urllib.request.urlopen(address, timeout=2).close()
                break
            except OSError:
                time.sleep(0.5)
        yield address
    finally:
        app.terminate()
        app.wait(30)


@pytest.fixture
def browser():
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        for flag in (*BROWSER_FLAGS.split(), f"--user-data-dir={profile}"):
            options.add_argument(flag)
        driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
        driver.set_page_load_timeout(120)
        yield driver
        driver.quit()


@pytest.mark.slow
@pytest.mark.parametrize(
    "served", ["rs-vheat-pretraining", "vheat-classifier", "vheat-upernet", "vheat"], indirect=True
)
def test_a_visitor_uploads_an_image_clicks_and_sees_the_result(served, browser, tmp_path, request):
    """Set HF_RSHEAT_SCREENSHOTS to a folder to look at the pages."""
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    def find(css: str, least: int = 1) -> list:
        return WebDriverWait(browser, 90).until(
            lambda page: len(found := page.find_elements(By.CSS_SELECTOR, css)) >= least and found
        )

    scene = tmp_path / "scene.png"
    Image.fromarray(make_scene(160, 3).optical).save(scene)
    browser.get(served)
    find("#run")
    assert find("#diffusivity img", 4)
    find("input[type=file]")[0].send_keys(str(scene))
    find("[data-testid=image] img, .image-container img, .image-frame img")
    find("#run")[0].click()
    name = request.node.callspec.params["served"]
    shown = {
        "rs-vheat-pretraining": ("#prediction img", 4),
        "vheat-classifier": ("#prediction .confidence-set, #prediction dd", 3),
        "vheat-upernet": ("#prediction img", 1),
        "vheat": ("#prediction textarea", 1),
    }[name]
    find("#conduction img", 5)
    assert find(*shown)
    if name == "vheat":
        assert find("#prediction textarea")[0].get_attribute("value").startswith("32 features")
    WebDriverWait(browser, 30).until(
        lambda page: page.execute_script("return [...document.images].every(i => i.complete && i.naturalWidth > 0)")
    )
    assert not [entry for entry in browser.find_elements(By.CSS_SELECTOR, ".toast-body.error") if entry.is_displayed()]
    if folder := os.environ.get("HF_RSHEAT_SCREENSHOTS"):
        time.sleep(1)
        browser.save_screenshot(str(Path(folder) / f"space_{name}.png"))


@pytest.mark.slow
@pytest.mark.parametrize("served", ["vheat-classifier"], indirect=True)
def test_a_visitor_without_an_image_is_told_so(served, browser):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    browser.get(served)
    WebDriverWait(browser, 60).until(lambda page: page.find_elements(By.CSS_SELECTOR, "#run"))[0].click()
    WebDriverWait(browser, 60).until(lambda page: "Upload an image" in page.find_element(By.TAG_NAME, "body").text)
