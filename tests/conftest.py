import inspect, os, tempfile

import matplotlib
matplotlib.use('Agg')

import pytest, torch

torch.set_num_threads(1)
os.environ['XDG_CACHE_HOME'] = os.environ['LOCALAPPDATA'] = tempfile.mkdtemp()   # what the engine finds out here is not kept

@pytest.fixture(autouse=True)
def seeded(): torch.manual_seed(0)

def pytest_pycollect_makeitem(collector, name, obj):
    "Don't take `test_eq` and its like, which come with a star import, for tests"
    if inspect.isfunction(obj) and obj.__module__.split('.')[0] in ('fastcore', 'fastai'): return []
