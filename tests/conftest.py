import inspect, os, tempfile
from functools import partial

import matplotlib
matplotlib.use('Agg')

import pytest, torch

torch.set_num_threads(1)
os.environ['OMP_NUM_THREADS'] = '1'   # also of the processes that tests start
# What the engine measures here is not kept
os.environ['XDG_CACHE_HOME'] = os.environ['LOCALAPPDATA'] = tempfile.mkdtemp()

@pytest.fixture(autouse=True)
def seeded(): torch.manual_seed(0)

@pytest.fixture
def in_tmp(tmp_path, monkeypatch):
    "The working directory is a temporary one; all tests of a file have it by `pytest.mark.usefixtures('in_tmp')`"
    monkeypatch.chdir(tmp_path)

def pytest_make_parametrize_id(config, val):
    "Name and arguments of a `partial`: its repr holds an address, which differs from run to run"
    if not isinstance(val, partial): return None   # pytest itself takes `__name__`
    args = [*map(str, val.args), *(f'{k}={v}' for k,v in val.keywords.items())]
    return f"{getattr(val.func, '__name__', 'partial')}({', '.join(args)})" if '0x' not in str(args) else None

def pytest_collection_modifyitems(items):
    "pytest-xdist needs the same names in each process"
    named = [i.nodeid for i in items if ' at 0x' in i.nodeid]
    if named: raise pytest.UsageError(f'Names of tests hold addresses: {named[:5]}')

def pytest_pycollect_makeitem(collector, name, obj):
    "Don't take `test_eq` and its like, which come with a star import, for tests"
    if inspect.isfunction(obj) and obj.__module__.split('.')[0] in ('fastcore', 'fastai'): return []
