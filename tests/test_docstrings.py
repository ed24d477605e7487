"Every public name of a module has a docstring; criteria and schedules keep no state in their modules"
import importlib, inspect, pkgutil
from dataclasses import FrozenInstanceError

import pytest

import fasterai_sparse
from fasterai_sparse.core import criteria, schedules
from fasterai_sparse.core.granularity import Granularities
from fasterai_sparse.core.schedules import Schedule
from fasterai_sparse.core.sparsifier import Sparsifier

MODULES = [importlib.import_module(m.name) for m in pkgutil.walk_packages(fasterai_sparse.__path__, 'fasterai_sparse.')
           if not m.ispkg and not m.name.rpartition('.')[2].startswith('_')]

# --- docstrings

def documented():
    for m in MODULES:
        for name,o in ((n, getattr(m, n)) for n in m.__all__):
            if m.__name__ == getattr(o, '__module__', '') and (inspect.isfunction(o) or inspect.isclass(o)):
                yield pytest.param(o, id=f"{m.__name__.removeprefix('fasterai_sparse.')}.{name}")

@pytest.mark.parametrize('o', list(documented()))
def test_docstrings(o):
    doc = o.__dict__.get('__doc__') if inspect.isclass(o) else o.__doc__
    assert doc and doc.strip() and not doc.startswith(f'{o.__name__}(')   # a dataclass without one gets its signature
    assert len(doc.strip().splitlines()[0]) <= 160

def public_methods(cls):
    own = lambda f: (inspect.isfunction(f) or inspect.ismethod(f)) and f.__module__.startswith('fasterai_sparse')
    return {n: f for n,f in inspect.getmembers(cls, own) if n[0] != '_'}

@pytest.mark.parametrize('cls', [Sparsifier, Schedule, Granularities])
def test_docstrings_of_methods(cls):
    methods = public_methods(cls)
    assert not [n for n,f in methods.items() if not f.__doc__] and methods

# --- no state in modules

@pytest.mark.parametrize('m', [criteria, schedules], ids=lambda m: m.__name__)
def test_no_mutable_module_state(m):
    assert not {n for n,o in vars(m).items() if isinstance(o, (dict, list, set)) and not n.startswith('__')}

@pytest.mark.parametrize('name', criteria.__all__)
def test_criteria_carry_nothing(name):
    o = getattr(criteria, name)
    if not inspect.isfunction(o): return
    assert not vars(inspect.unwrap(o)) and not any(isinstance(d, (dict, list, set)) for d in o.__defaults__ or ())

@pytest.mark.parametrize('name', ['one_shot', 'iterative', 'agp', 'one_cycle', 'cos', 'lin', 'dsd'])
def test_schedules_are_immutable(name):
    s = getattr(schedules, name)
    with pytest.raises(FrozenInstanceError): s.start_pct = .3
    assert hash(s) == hash(getattr(schedules, name))
