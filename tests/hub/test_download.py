"""A download is resumed, and used only if it is the file that was asked for."""

import logging
import random
from urllib.parse import unquote

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import enable_progress_bars

from hf_rsheat.errors import ConfigurationError, TransferError, VerificationError
from hf_rsheat.hub.download import download, fetch
from hf_rsheat.hub.records import write_provenance
from hf_rsheat.hub.transfer import is_url, public_url
from tests.hub.hub_double import HubDouble, sha256

CONTENT = random.Random(0).randbytes(3_000_000)
DIGEST = sha256(CONTENT)
GET = "GET /files/"


@pytest.fixture
def hub(monkeypatch, naps):
    with HubDouble() as double:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        double.downloads = {"vheat.pth": CONTENT, "other.pth": b"other"}
        yield double


@pytest.fixture
def url(hub) -> str:
    return f"{hub.url}/files/vheat.pth"


def test_a_file_is_downloaded_once_and_named_as_in_the_url(hub, url, tmp_path, capfd):
    enable_progress_bars()  # a training run in this process switches them off, for every library
    path = download(url, DIGEST.upper(), cache_dir=tmp_path)
    assert path.read_bytes() == CONTENT
    assert path.name == "vheat.pth"
    assert "vheat.pth: 100%" in capfd.readouterr().err  # the progress bar
    assert download(url, DIGEST, cache_dir=tmp_path) == path
    assert hub.count(GET) == 1
    assert [file.name for file in path.parent.iterdir() if not file.name.startswith(".")] == ["vheat.pth"]


def test_a_cut_download_is_resumed_not_repeated(hub, url, tmp_path):
    for _ in range(3):
        hub.fail(GET, "cut")
    assert download(url, DIGEST, cache_dir=tmp_path).read_bytes() == CONTENT
    assert hub.sent < len(CONTENT) * 1.1
    assert hub.count(GET) == 4


def test_a_later_call_goes_on_where_an_earlier_one_failed(hub, url, tmp_path):
    hub.fail(GET, "cut")
    hub.fail(GET, times=100)
    with pytest.raises(TransferError, match=r"vheat\.pth.*500.*1\.50MB arrived and are kept"):
        download(url, DIGEST, cache_dir=tmp_path)
    hub.faults.clear()
    hub.sent = 0
    assert download(url, DIGEST, cache_dir=tmp_path).read_bytes() == CONTENT
    assert hub.sent == len(CONTENT) / 2


def test_a_server_that_cannot_resume_starts_again(hub, url, tmp_path):
    hub.honours_ranges = False
    hub.fail(GET, "cut")
    assert download(url, DIGEST, cache_dir=tmp_path).read_bytes() == CONTENT


def test_a_download_that_only_lacked_its_check_is_not_repeated(hub, url, tmp_path):
    path = download(url, DIGEST, cache_dir=tmp_path)
    path.rename(path.with_name("vheat.pth.incomplete"))
    hub.sent = 0
    assert download(url, DIGEST, cache_dir=tmp_path) == path
    assert hub.sent == 0


@pytest.mark.parametrize("kind", ["status", "drop", "lost"])
def test_passing_failures_are_waited_for(hub, url, tmp_path, naps, kind):
    hub.fail(GET, kind, times=4)
    hub.fail(GET, status=429, headers={"Retry-After": "9"})
    assert download(url, DIGEST, cache_dir=tmp_path).read_bytes() == CONTENT
    assert len(naps) == 5
    assert 15 + 9 <= sum(naps) <= 60


def test_another_hash_is_refused_and_the_file_deleted(hub, url, tmp_path):
    with pytest.raises(VerificationError, match=f"vheat.pth has SHA-256 {DIGEST}, not {'0' * 64}"):
        download(url, "0" * 64, cache_dir=tmp_path)
    hub.fail(GET, "corrupt")
    with pytest.raises(VerificationError, match="deleted"):
        download(url, DIGEST, cache_dir=tmp_path)
    assert not [path for path in tmp_path.rglob("*vheat*") if path.is_file()]
    assert download(url, DIGEST, cache_dir=tmp_path).read_bytes() == CONTENT


def test_a_missing_file_fails_at_once(hub, tmp_path, naps):
    with pytest.raises(TransferError, match="404"):
        download(f"{hub.url}/files/none.pth", DIGEST, cache_dir=tmp_path)
    assert naps == []


def test_no_answer_ends_in_one_clear_sentence(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(TransferError, match="HF_HUB_OFFLINE"):
        download(f"{hub.url}/files/vheat.pth", DIGEST, cache_dir=tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(TransferError, match="same command again"):
        download("http://127.0.0.1:1/vheat.pth", DIGEST, cache_dir=tmp_path)


def test_neither_tokens_are_sent_nor_signatures_shown(hub, tmp_path, caplog, capfd, monkeypatch):
    caplog.set_level(logging.DEBUG, logger="hf_rsheat")
    monkeypatch.setenv("HF_TOKEN", "hf_secret_token")
    address = hub.url.replace("//", "//name:s3cret-password@") + "/files/vheat.pth?X-Signature=s3cret-query#s3cret-hash"
    hub.fail(GET, times=100)
    with pytest.raises(TransferError) as caught:
        download(address, DIGEST, cache_dir=tmp_path)
    hub.faults.clear()
    path = download(address, DIGEST, cache_dir=tmp_path)
    with pytest.raises(ConfigurationError) as missing:
        fetch(address)
    output = capfd.readouterr()
    texts = [str(caught.value), str(missing.value), str(path), caplog.text, output.out, output.err]
    assert not any("s3cret" in text for text in texts)
    assert caught.value.__suppress_context__
    assert not any("hf_secret_token" in value for value in hub.credentials)
    assert public_url(address) == f"{hub.url}/files/vheat.pth"


@pytest.mark.parametrize(
    ("path", "name"),
    [("a%2F..%2F..%2Fevil.pth", "evil.pth"), ("..%5Cevil.pth", "_evil.pth"), ("%2E%2E", "checkpoint"), ("", None)],
)
def test_a_name_never_leaves_the_folder(hub, tmp_path, path, name):
    hub.downloads[unquote(path)] = CONTENT
    if name is None:
        with pytest.raises(TransferError):
            download(f"{hub.url}/files/{path}", DIGEST, cache_dir=tmp_path)
        return
    target = download(f"{hub.url}/files/{path}", DIGEST, cache_dir=tmp_path)
    assert target.name == name
    assert target.resolve().is_relative_to(tmp_path / "hf_rsheat" / "downloads" / DIGEST)


@pytest.mark.parametrize("digest", ["", "abc", "g" * 64, "0" * 63, "0" * 65, "../" + "0" * 61])
def test_what_is_no_hash_is_refused(url, digest, tmp_path):
    with pytest.raises(ConfigurationError, match="64 hexadecimal digits"):
        download(url, digest, cache_dir=tmp_path)


@pytest.mark.parametrize("address", ["ftp://host/file", "file:///etc/passwd", "http://", "weights.pth"])
def test_what_is_no_address_is_refused(address, tmp_path):
    with pytest.raises(ConfigurationError, match="address"):
        download(address, DIGEST, cache_dir=tmp_path)


def test_fetch_takes_paths_and_urls_but_no_url_without_hash(url, tmp_path):
    local = tmp_path / "local.pth"
    local.write_bytes(CONTENT)
    assert fetch(local) == fetch(str(local), DIGEST) == local
    with pytest.raises(VerificationError, match=r"local\.pth"):
        fetch(local, "0" * 64)
    assert local.is_file()
    with pytest.raises(ConfigurationError, match="--sha256"):
        fetch(url)
    assert fetch(url, DIGEST, cache_dir=tmp_path).read_bytes() == CONTENT
    assert is_url("HTTPS://host/file")
    assert not is_url(local)


def test_the_command_in_provenance_keeps_no_credentials(monkeypatch, tmp_path):
    address = "https://name:s3cret@host/folder/vheat.pth?X-Signature=s3cret"
    monkeypatch.setattr("sys.argv", ["hf-rsheat", "convert", "vheat", address, "model", "--sha256", DIGEST])
    write_provenance(tmp_path, {})
    text = (tmp_path / "provenance.json").read_text()
    assert f"convert vheat vheat.pth model --sha256 {DIGEST}" in text
    assert "s3cret" not in text
