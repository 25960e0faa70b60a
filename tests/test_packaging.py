"""The wheel works outside the checkout, and importing costs what we promise."""

import ast
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent
OURS_AND_TRANSFORMERS = {"hf_rsheat", "transformers", "tokenizers", "__editable___hf_rsheat_finder"}


def run(*command: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**clean, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """Scripts folder of a fresh environment that holds our wheel and sees this environment's dependencies."""
    root = tmp_path_factory.mktemp("wheel")
    source = root / "source"
    for folder in ("hf_rsheat", "conversion", "model_cards"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    pip = (sys.executable, "-m", "pip")
    built = run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", root, source, cwd=root)
    assert built.returncode == 0, built.stderr
    environment = root / "environment"
    venv.create(environment, with_pip=False)
    site = next(environment.glob("lib/python*/site-packages"))
    # A plain path: it is searched after the environment's own packages, and the editable install's hook stays off.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    wheel = next(root.glob("*.whl"))
    target = run(*pip, "--python", environment / "bin/python", "install", "--no-deps", wheel, cwd=root)
    assert target.returncode == 0, target.stderr
    return environment / "bin"


def test_the_wheel_converts_a_checkpoint_outside_the_checkout(installed, golden, tmp_path):
    shutil.copy(golden / "vheat/prenorm.pth", tmp_path / "upstream.pth")
    result = run(installed / "hf-rsheat", "convert", "vheat", "upstream.pth", "model", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "model/model.safetensors").is_file()
    assert (tmp_path / "model/README.md").read_text().startswith("---\n")


def test_every_verb_knows_our_models_without_importing_the_package_first(installed, golden, tmp_path):
    """The console script registers inside its verbs; forgetting it in one asks to trust remote code instead."""
    shutil.copy(golden / "vheat/postnorm_ls.pth", tmp_path / "upstream.pth")
    assert run(installed / "hf-rsheat", "convert", "vheat", "upstream.pth", "model", cwd=tmp_path).returncode == 0
    (tmp_path / "images").mkdir()
    Image.effect_noise((70, 64), 60).convert("RGB").save(tmp_path / "images/a.png")
    for arguments in (("verify", "model"), ("embed", "model", "images", "out.parquet"), ("export", "model", "again")):
        result = run(installed / "hf-rsheat", *arguments, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
    assert (tmp_path / "out.parquet").is_file()
    assert (tmp_path / "again/config.json").is_file()


def test_the_wheel_holds_the_mapped_packages_and_no_tests(installed, tmp_path):
    code = (
        "import hf_rsheat, importlib.resources as r, hf_rsheat.conversion as c; print(hf_rsheat.__file__);"
        "print(c.__file__); print(sorted(f.name for f in r.files('hf_rsheat.model_cards').iterdir()))"
    )
    result = run(installed / "python", "-c", code, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    package, conversion, cards = result.stdout.splitlines()
    assert str(installed.parent) in package
    assert str(installed.parent) in conversion
    assert "vheat.md" in cards
    assert "rs_vheat.md" in cards


def test_bad_input_gets_one_sentence_and_exit_status_1(installed, tmp_path):
    (tmp_path / "not-a-checkpoint.pth").write_text("hello")
    result = run(installed / "hf-rsheat", "convert", "vheat", "not-a-checkpoint.pth", "model", cwd=tmp_path)
    assert result.returncode == 1
    # torch warns of torchao's classes where that is installed.
    said = [line for line in result.stderr.splitlines() if "torch/utils" not in line]
    assert len(said) == 1
    assert said[0].startswith("Error: ")
    debug = run(installed / "hf-rsheat", "--debug", "convert", "vheat", "not-a-checkpoint.pth", "model", cwd=tmp_path)
    assert "Traceback" in debug.stderr


def test_help_imports_neither_torch_nor_transformers(installed, tmp_path):
    code = (
        "import sys; sys.argv = ['hf-rsheat', '--help']\n"
        "from hf_rsheat.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print([name for name in ('torch', 'transformers', 'datasets') if name in sys.modules])"
    )
    result = run(installed / "python", "-c", code, cwd=tmp_path)
    assert result.stdout.splitlines()[-1] == "[]", result.stdout + result.stderr


def test_importing_the_package_brings_no_heavy_module_beyond_transformers_auto_classes(tmp_path):
    """The cost on top of `from transformers import AutoModel ...` is a count of modules here, not a time."""
    code = (
        "import sys; from transformers import AutoModel, AutoImageProcessor, AutoBackbone; before = set(sys.modules)\n"
        "import hf_rsheat; print(sorted({m.split('.')[0] for m in set(sys.modules) - before}))"
    )
    result = run(sys.executable, "-c", code, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert set(ast.literal_eval(result.stdout.splitlines()[-1])) <= OURS_AND_TRANSFORMERS
