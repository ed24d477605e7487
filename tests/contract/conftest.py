import pytest

@pytest.fixture(autouse=True)
def each_in_tmp(in_tmp): pass
