import pytest

@pytest.fixture(autouse=True)
def in_tmp(tmp_path, monkeypatch): monkeypatch.chdir(tmp_path)
