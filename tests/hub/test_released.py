"""Folders exported by a released version stay known to later ones."""

import json

import pytest

from hf_rsheat.hub import released


def test_a_recorded_release_stays_known_when_the_code_changes(tmp_path, monkeypatch):
    table = tmp_path / "released_code.json"
    table.write_text("{}")
    released.record("1.0", table)
    old = ("modeling_vheat.py", released.own_code()["modeling_vheat.py"])
    monkeypatch.setattr(released, "own_code", lambda: {"modeling_vheat.py": "0" * 64})
    assert {old, ("modeling_vheat.py", "0" * 64)} <= released.known_code(table)
    with pytest.raises(ValueError, match="raise the version"):
        released.record("1.0", table)
    released.record("1.1", table)
    assert list(json.loads(table.read_text())) == ["1.0", "1.1"]


def test_the_shipped_table_is_readable_and_our_own_code_is_known():
    assert set(released.own_code().items()) <= released.known_code()
