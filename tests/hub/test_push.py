"""A push arrives whole or not at all, survives what networks do, and nothing leaks on the way."""

import json
import logging
import os
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.utils import get_session
from safetensors.torch import load_file

from hf_rsheat import RSVHeatImageProcessor, RSVHeatModel, export
from hf_rsheat.errors import ConfigurationError, TransferError, VerificationError
from hf_rsheat.hub.push import push
from hf_rsheat.hub.records import visible_files
from tests.hub.hub_double import TOKEN, HubDouble, sha256
from tests.zoo import ZOO, randomize, rs_vheat_config

REPO = "user/heat"
COMMIT = r"POST .*/commit/"
UPLOAD = r"PUT /lfs-store/"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    entry = ZOO["vheat-classifier"]
    return export(entry.model(), entry.processor(), tmp_path_factory.mktemp("push") / "heat")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> Path:
    entry = ZOO["rs-vheat-pretraining"]
    return export(entry.model(), entry.processor(), tmp_path_factory.mktemp("push") / "sharded", max_shard_size="100KB")


@pytest.fixture
def hub(monkeypatch, naps):
    with HubDouble() as double:
        monkeypatch.setattr(constants, "ENDPOINT", double.url)
        template = double.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield double


def content(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in visible_files(folder)}


def held(hub: HubDouble, revision: str = "main") -> dict[str, bytes]:
    return {path: data for path, data in hub.repos[REPO].files(revision).items() if path != ".gitattributes"}


def statuses(result) -> dict[str, str]:
    return {change.path: change.status for change in result.changes}


def test_a_push_makes_the_repository_equal_and_verifies_what_comes_back(hub, folder, caplog):
    caplog.set_level(logging.INFO)
    result = push(folder, REPO)
    assert held(hub) == content(folder)
    assert result.revision == hub.repos[REPO].branches["main"]
    assert result.committed
    assert result.created
    assert result.report.ok
    assert result.pull_request is None
    assert set(statuses(result).values()) == {"added"}
    assert {change.path: change.size for change in result.changes} == {
        path: len(data) for path, data in content(folder).items()
    }
    assert "added" in caplog.text
    assert "model.safetensors" in caplog.text
    assert hub.count(r"GET /user/heat/resolve/[0-9a-f]{40}/model.safetensors") == 1


def test_pushing_again_commits_and_sends_nothing_but_verifies_again(hub, folder):
    first = push(folder, REPO)
    hub.log.clear()
    again = push(folder, REPO)
    assert again.revision == first.revision
    assert not again.committed
    assert not again.created
    assert again.report.ok
    assert set(statuses(again).values()) == {"same"}
    assert not hub.count(f"^(POST|{UPLOAD})")


def test_a_changed_export_replaces_shards_and_sends_only_what_is_new(hub, sharded, tmp_path):
    push(sharded, REPO)
    entry = ZOO["rs-vheat-pretraining"]
    whole = export(entry.model(), entry.processor(), tmp_path / "whole")
    hub.log.clear()
    result = push(whole, REPO)
    assert held(hub) == content(whole)
    changes = statuses(result)
    assert changes["model.safetensors"] == "added"
    assert changes["model.safetensors.index.json"] == "removed"
    assert changes["manifest.json"] == "changed"
    assert changes["config.json"] == "same"
    assert hub.count(UPLOAD) == 1
    assert "removed" in str(result)
    assert "config.json" not in str(result)


def test_what_does_not_verify_is_refused_before_anything_is_sent(hub, folder, tmp_path):
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for name, data in content(folder).items():
        (damaged / name).write_bytes(data)
    weights = bytearray((damaged / "model.safetensors").read_bytes())
    weights[-5] ^= 1
    (damaged / "model.safetensors").write_bytes(weights)
    with pytest.raises(VerificationError, match=r"nothing was pushed.*changed: model\.safetensors"):
        push(damaged, REPO)
    plain = tmp_path / "plain"
    ZOO["vheat"].model().save_pretrained(plain)
    with pytest.raises(VerificationError, match="plain save_pretrained"):
        push(plain, REPO)
    assert hub.log == []


def test_a_dry_run_changes_nothing_and_needs_no_token(hub, folder, monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    result = push(folder, REPO, dry_run=True)
    assert result.created
    assert not result.committed
    assert result.revision is result.report is None
    assert "(new repository)" in str(result)
    assert set(statuses(result).values()) == {"added"}
    assert not hub.count("^(POST|PUT)")
    with pytest.raises(ConfigurationError, match="hf auth login"):
        push(folder, REPO)


@pytest.mark.parametrize(
    ("repo_id", "options"),
    [("heat", {}), ("a/b/c", {}), ("../up", {}), (REPO, {"create_pr": True, "revision": "next"})],
)
def test_impossible_options_are_refused(hub, folder, repo_id, options):
    with pytest.raises(ConfigurationError):
        push(folder, repo_id, **options)
    with pytest.raises(ConfigurationError, match="no folder"):
        push("nowhere", REPO)
    assert hub.log == []


def test_private_is_honoured_or_refused_but_never_ignored(hub, folder):
    push(folder, REPO, private=True)
    assert hub.repos[REPO].private
    push(folder, REPO, private=True)
    hub.create("user/open")
    with pytest.raises(ConfigurationError, match="public"):
        push(folder, "user/open", private=True)
    assert set(hub.repos["user/open"].files()) == {".gitattributes"}


def test_files_of_others_are_neither_removed_nor_pushed_beside(hub, folder):
    hub.create(REPO).commit("main", {".gitattributes": b"", "notes.txt": b"mine", "pytorch_model.bin": b"old"})
    with pytest.raises(VerificationError, match=r"notes\.txt, pytorch_model\.bin"):
        push(folder, REPO)
    assert set(hub.repos[REPO].files()) == {".gitattributes", "notes.txt", "pytorch_model.bin"}


@pytest.mark.parametrize("manifest", [b"", b"[]", b"{}", b'{"files": 3}', b"\xff"])
def test_a_foreign_manifest_gives_no_right_to_remove_files(hub, folder, manifest):
    hub.create(REPO).commit("main", {"manifest.json": manifest, "notes.txt": b"mine"})
    with pytest.raises(VerificationError, match=r"notes\.txt"):
        push(folder, REPO)


def test_a_branch_is_created_and_main_left_alone(hub, folder):
    hub.create(REPO)
    result = push(folder, REPO, revision="next/try")
    assert held(hub, "next/try") == content(folder)
    assert held(hub) == {}
    assert push(folder, REPO, revision="next/try").revision == result.revision


def test_a_pull_request_is_opened_once(hub, folder):
    hub.create(REPO)
    result = push(folder, REPO, create_pr=True)
    assert result.pull_request == f"{hub.url}/{REPO}/discussions/1"
    assert result.report.ok
    assert held(hub) == {}
    assert held(hub, "refs/pr/1") == content(folder)
    again = push(folder, REPO, create_pr=True)
    assert (again.pull_request, again.revision, again.committed) == (result.pull_request, result.revision, False)
    assert len(hub.repos[REPO].requests) == 1


def test_a_pull_request_with_other_content_is_not_taken_for_ours(hub, folder):
    repo = hub.create(REPO)
    for files in ({"notes.txt": b"other"}, {"README.md": b"other"}):
        repo.requests.append("Upload with hf_rsheat 0")
        repo.commit(f"refs/pr/{len(repo.requests)}", files)
    assert push(folder, REPO, create_pr=True).pull_request.endswith("/3")


REQUESTS = {
    "look": rf"GET /api/models/{REPO}",
    "create": "POST /api/repos/create",
    "branch": "POST .*/branch/",
    "list": "GET .*/tree/",
    "card": "POST /api/validate-yaml",
    "announce": "POST .*/preupload/",
    "batch": "POST .*/objects/batch",
    "upload": UPLOAD,
    "confirm": "POST /api/lfs-verify",
    "commit": COMMIT,
    "download": r"GET .*/resolve/.*safetensors",
    "head": r"HEAD .*/resolve/.*safetensors",
}


@pytest.mark.parametrize("request_", REQUESTS)
def test_a_push_survives_every_fault_at_every_request(hub, folder, naps, request_):
    hub.fail(REQUESTS[request_], status=429, headers={"Retry-After": "7"})
    hub.fail(REQUESTS[request_], status=500)
    hub.fail(REQUESTS[request_], "drop")
    hub.fail(REQUESTS[request_], "lost")
    result = push(folder, REPO, revision="next")
    assert all(fault.times == 0 for fault in hub.faults), "a fault was never met"
    assert held(hub, "next") == content(folder)
    assert result.committed
    assert result.report.ok
    assert len(hub.repos[REPO].commits) == 2  # the first, empty one, and ours: never twice
    # The client parses the answer about the card before it looks at the status, and does not wait after a first HEAD.
    if request_ not in ("card", "head"):
        assert max(naps) >= 7  # as the server asked


def test_a_pull_request_whose_answer_was_lost_is_not_opened_twice(hub, folder):
    hub.create(REPO)
    hub.fail(COMMIT, "lost")
    result = push(folder, REPO, create_pr=True)
    assert result.committed
    assert result.pull_request.endswith("/1")
    assert len(hub.repos[REPO].requests) == 1


def test_a_download_cut_in_the_middle_is_resumed(hub, folder):
    hub.fail(r"GET .*/resolve/.*/model\.safetensors", "cut")
    assert push(folder, REPO).report.ok


def test_an_interrupted_push_goes_on_with_what_is_missing(hub, sharded):
    weights = sorted(sharded.glob("model-*.safetensors"))
    last = sha256(weights[-1].read_bytes())
    hub.fail(UPLOAD + last, times=100)
    with pytest.raises(
        TransferError, match=f"Error while uploading '{weights[-1].name}'.*same command again"
    ) as caught:
        push(sharded, REPO)
    assert "Signature" not in str(caught.value)
    assert held(hub) == {}
    arrived = set(hub.lfs)
    assert len(arrived) == len(weights)  # all but the last shard, and the reference outputs
    hub.faults.clear()
    hub.log.clear()
    result = push(sharded, REPO)
    assert held(hub) == content(sharded)
    assert result.committed
    assert [path for method, path, _ in hub.log if method == "PUT"] == [f"/lfs-store/{last}"]


def test_a_hub_that_stays_broken_ends_in_one_clear_sentence(hub, folder, naps):
    hub.fail(COMMIT, times=1000)
    with pytest.raises(TransferError, match=r"500.*Run the same command again") as caught:
        push(folder, REPO)
    assert "\n" not in str(caught.value)
    assert "signed" not in str(caught.value)
    assert sum(naps) < 120
    hub.faults.clear()
    hub.fail(COMMIT, status=429, headers={"Retry-After": "86400"})
    with pytest.raises(TransferError, match="429"):
        push(folder, REPO)
    assert max(naps) < 400


def test_offline_mode_is_named(hub, folder, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(TransferError, match="HF_HUB_OFFLINE"):
        push(folder, REPO)


@pytest.mark.parametrize("name", ["model.safetensors", "README.md", "config.json", "manifest.json"])
def test_a_corrupted_download_is_detected(hub, folder, name):
    hub.fail(rf"GET .*/resolve/.*/{name}", "corrupt")
    with pytest.raises(VerificationError, match=rf"damaged.*not as sent: {name}"):
        push(folder, REPO)
    result = push(folder, REPO)
    assert not result.committed
    assert result.report.ok


def test_a_commit_of_somebody_else_in_between_is_seen(hub, folder):
    repo = hub.create(REPO)
    hub.fail(COMMIT, "race", action=lambda: repo.commit("main", {**repo.files(), "README.md": b"theirs"}))
    assert push(folder, REPO).committed
    assert held(hub) == content(folder)
    other = hub.repos[REPO] = hub.create(REPO)
    hub.fail(COMMIT, "race", action=lambda: other.commit("main", {**other.files(), "notes.txt": b"theirs"}))
    with pytest.raises(VerificationError, match=r"notes\.txt"):
        push(folder, REPO)
    assert held(hub) == {"notes.txt": b"theirs"}


def test_a_card_the_hub_rejects_is_reported_in_its_words(hub, folder):
    hub.fail("POST /api/validate-yaml", "refuse card")
    with pytest.raises(TransferError, match=r"Invalid metadata in README.md.*licence unknown"):
        push(folder, REPO)
    assert held(hub) == {}
    assert hub.lfs == {}


def test_wrong_bytes_are_never_stored(hub):
    digest = sha256(b"right")
    answer = get_session().put(f"{hub.url}/lfs-store/{digest}?X-Signature=signed5", content=b"wrong")
    assert answer.status_code == 400
    assert hub.lfs == {}


@pytest.mark.parametrize("request_", REQUESTS)
def test_the_token_never_appears(hub, folder, request_, tmp_path, monkeypatch, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    hub.fail(REQUESTS[request_], "echo", times=100)
    with pytest.raises(TransferError) as caught:
        push(folder, REPO, revision="next")
    hub.faults.clear()
    result = push(folder, REPO, revision="next")
    output = capfd.readouterr()
    texts = [str(caught.value), repr(caught.value.__cause__), str(result), repr(result), output.out, output.err]
    texts += [caplog.text, *(str(path.read_bytes()) for path in tmp_path.rglob("*") if path.is_file())]
    texts += [str(data) for data in hub.repos[REPO].files().values()]
    assert not any(TOKEN in text for text in texts)
    assert caught.value.__suppress_context__


# What a user without the package runs, one process for all repositories.
CHILD = """
import json, sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "hf_rsheat":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Blocker())
import torch, transformers
from PIL import Image
from safetensors.torch import save_file
results = {}
for name, (repo, revision, auto_class) in json.loads(sys.argv[1]).items():
    options = {"trust_remote_code": True, "revision": revision}
    model = getattr(transformers, auto_class).from_pretrained(repo, **options)
    segmenter = auto_class.endswith("Segmentation")
    base = model if segmenter else transformers.AutoModel.from_pretrained(repo, **options)
    processor = transformers.AutoImageProcessor.from_pretrained(repo, **options)
    assert "transformers_modules" in type(model).__module__, type(model)
    assert "transformers_modules" in type(base).__module__, type(base)
    assert "transformers_modules" in type(processor).__module__, type(processor)
    pixel_values = torch.linspace(-1, 1, 3 * 64 * 64).reshape(1, 3, 64, 64).to(model.dtype)
    with torch.no_grad():
        outputs = model(pixel_values)
    keys = ("logits", "reconstruction", "last_hidden_state")
    results[name] = next(outputs[key] for key in keys if key in outputs).contiguous()
    image = Image.new("RGB", (80, 70), (90, 120, 60))
    task = {"AutoModelForImageClassification": "image-classification", "AutoModel": "image-feature-extraction",
            "AutoModelForSemanticSegmentation": "image-segmentation"}.get(auto_class)
    if task is not None:
        answer = transformers.pipeline(task, model=repo, **options)(image)
        assert len(answer) > 0, answer
        if task != "image-feature-extraction":
            assert {a["label"] for a in answer} <= set(model.config.id2label.values()), answer
save_file(results, sys.argv[2])
"""


def test_pushed_models_load_by_name_and_revision_without_the_package(hub, folder, sharded, tmp_path):
    folders = {
        "classifier": (folder, "AutoModelForImageClassification", ZOO["vheat-classifier"].model()),
        "sharded": (sharded, "AutoModelForPreTraining", ZOO["rs-vheat-pretraining"].model()),
    }
    entry = ZOO["vheat-upernet"]
    segmenter = export(entry.model(), entry.processor(), tmp_path / "segmenter")
    folders["segmenter"] = (segmenter, "AutoModelForSemanticSegmentation", entry.model())
    for dtype in (torch.bfloat16, torch.float16):
        model = RSVHeatModel(rs_vheat_config())
        randomize(model)
        name = str(dtype).removeprefix("torch.")
        model = model.to(dtype).eval()
        folders[name] = (export(model, RSVHeatImageProcessor(), tmp_path / name), "AutoModel", model)
    jobs = {
        name: (f"user/{name}", push(path, f"user/{name}", private=True).revision, auto_class)
        for name, (path, auto_class, _) in folders.items()
    }
    script = tmp_path / "child.py"
    script.write_text(CHILD)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
    }
    run = subprocess.run(
        [sys.executable, script, json.dumps(jobs), tmp_path / "results.safetensors"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    results = load_file(tmp_path / "results.safetensors")
    pixel_values = torch.linspace(-1, 1, 3 * 64 * 64).reshape(1, 3, 64, 64)
    keys = {"classifier": "logits", "sharded": "reconstruction", "segmenter": "logits"}
    for name, (_, _, model) in folders.items():
        with torch.no_grad():
            expected = model(pixel_values.to(model.dtype))[keys.get(name, "last_hidden_state")]
        assert results[name].dtype == expected.dtype
        tolerance = 1e-6 if expected.dtype == torch.float32 else 1e-2
        torch.testing.assert_close(results[name], expected, atol=tolerance, rtol=tolerance)


@pytest.mark.skipif(not os.environ.get("HF_TOKEN"), reason="pushes to the real Hub: set HF_TOKEN to run it")
def test_live_push_to_the_real_hub(folder, monkeypatch):
    """Creates a private repository in the token's account, pushes twice, loads it, and deletes it."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    api = HfApi()
    repo_id = f"{api.whoami()['name']}/hf-rsheat-live-test-{uuid.uuid4().hex[:8]}"
    try:
        first = push(folder, repo_id, private=True)
        assert first.committed
        assert first.report.ok
        assert not push(folder, repo_id, private=True).committed
        assert push(folder, repo_id, revision="next").report.ok
        assert content(Path(snapshot_download(repo_id, revision=first.revision))) == content(folder)
    finally:
        api.delete_repo(repo_id, missing_ok=True)
