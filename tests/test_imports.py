"What `from fasterai_sparse.all import *` brings and leaves alone; docstrings; metadata"
import builtins, configparser, importlib, importlib.metadata, inspect, json, pkgutil, subprocess, sys
from dataclasses import FrozenInstanceError
from functools import cache
from pathlib import Path

import pytest

import fasterai_sparse
from cases import in_a_loop
from fasterai_sparse.core import criteria, schedules

ROOT = Path(__file__).parent.parent
MODULES = [m.name.removeprefix("fasterai_sparse.") for m in pkgutil.walk_packages(fasterai_sparse.__path__, "fasterai_sparse.") if not m.ispkg and not m.name.split(".")[-1].startswith("_")]

def python(code):
    r = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True)
    assert r.returncode == 0, r.stderr[-2000:]
    return r.stdout

def module(name): return importlib.import_module(f'fasterai_sparse.{name}')

# --- without vision

BLOCK = '''
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.startswith(('torchvision', 'fastai.vision')): raise ImportError(f'{name} is blocked')
sys.meta_path.insert(0, Block())
'''

def test_all_works_where_vision_is_absent():
    out = python(BLOCK + '''
import fasterai_sparse.all
from fasterai_sparse.all import *
from torch import nn
m = nn.Sequential(nn.Linear(4, 5))
Sparsifier(m, 'weight', 'local', large_final, layer_type=nn.Linear).sparsify_model(50)
print(int((m[0].weight==0).sum()))''')
    assert out.split() == ['10']

def test_the_block_blocks():
    assert 'is blocked' in python(BLOCK + '''
try: import torchvision
except ImportError as e: print(e)''')

def packages(lines):
    "Packages that are loaded when `lines` have run"
    return set(python(f'import sys; {lines}; print(*{{m.split(".")[0] for m in sys.modules}})').split())

def test_nothing_heavy_is_imported():
    fastai = packages('from fastai.basics import *; from fastai.callback.all import *')
    assert packages('import fasterai_sparse.all') - fastai == {'fasterai_sparse', 'hjson'}

# --- names

NAMESPACES = '''import json
mine, fastai = {}, {}
exec('from fasterai_sparse.all import *', mine)
exec('from fastai.basics import *\\nfrom fastai.callback.all import *', fastai)
mine = {n: o for n,o in mine.items() if n not in fastai or fastai[n] is not o}
firsts = ['from fastai.vision.all import *', 'from fastai.tabular.all import *', 'from fastai.text.all import *',
    'from fastai.collab import *', 'from fastai.basics import *\\nfrom fastai.callback.all import *',
    'from fastcore.all import *',
    'import random, math, torch, time, os, re, sys\\nimport numpy as np, pandas as pd, matplotlib.pyplot as plt\\n'
    'from pathlib import Path\\nfrom functools import partial, reduce\\nfrom copy import deepcopy, copy\\n'
    'from torch import nn, tensor, optim\\nimport torch.nn.functional as F\\n'
    'from torch.utils.data import DataLoader, Dataset']
found = {}
for f in firsts:
    ns = {}
    exec(f, ns)
    found[f] = sorted(n for n in mine if n in ns and not n.startswith('__') and ns[n] is not mine[n])
print(json.dumps([found, sorted(n for n in mine if not n.startswith('__'))]))'''

@cache
def namespaces():
    "First lines of a notebook -> names of theirs that the package binds anew; and all names of the package"
    return json.loads(python(NAMESPACES))

@pytest.mark.parametrize('which', range(7))
def test_nothing_bound_before_is_overridden(which):
    first, names = list(namespaces()[0].items())[which]
    assert names == [], f'after {first!r}'

USUAL = '''random math torch nn F np pd plt tensor Tensor L Path partial os sys re time copy deepcopy json pickle
    warnings inspect itertools block weight mask model learn dls data x y path opt loss metrics params groups
    scores name names layer layers cb sparsity'''.split()

@pytest.mark.parametrize('name', USUAL)
def test_no_usual_name_is_taken(name):
    import fasterai_sparse.all as public
    if name == 'block': assert inspect.isclass(public.block)   # documented: `block(4,1)`
    else: assert name not in namespaces()[1]

def test_no_builtin_is_shadowed():
    assert not {n for n in namespaces()[1] if hasattr(builtins, n)}

ENGINE = ('engine.ops', 'engine.weights', 'engine.trace', 'engine.plan')   # machinery, with names like Plan and Graph

def test_star_import_brings_its_own_and_fastais_names_only():
    own = {n for m in MODULES if m not in ('all', 'demo', *ENGINE) for n in module(m).__all__} | {'engine_sets'}
    assert set(namespaces()[1]) == own

@pytest.mark.parametrize('name', [m for m in MODULES if m != 'all'])
def test_all_of_a_module_exists(name):
    m = module(name)
    assert m.__all__ and len(set(m.__all__)) == len(m.__all__)
    for n in m.__all__: assert hasattr(m, n), n

def test_no_name_is_exported_by_two_modules():
    owners = {}
    for m in MODULES:
        if m not in ('all', 'demo'):
            for n in module(m).__all__: owners.setdefault(n, []).append(m)
    assert not {n: ms for n,ms in owners.items() if len(ms) > 1}

# --- docstrings

def documented():
    for m in MODULES:
        for n in getattr(module(m), '__all__', []):
            o = getattr(module(m), n)
            ours = getattr(o, '__module__', '').startswith('fasterai_sparse')
            if ours and (inspect.isfunction(o) or inspect.isclass(o)): yield f'{m}.{n}', o

@in_a_loop('name,o', documented())
def test_docstrings(name, o):
    doc = o.__dict__.get('__doc__') if inspect.isclass(o) else o.__doc__
    assert doc and doc.strip() and not doc.startswith(f'{o.__name__}(')   # a dataclass without one gets its signature
    assert len(doc.strip().splitlines()[0]) <= 160

def public_methods(cls):
    own = lambda f: (inspect.isfunction(f) or inspect.ismethod(f)) and f.__module__.startswith('fasterai_sparse')
    return {n: f for n,f in inspect.getmembers(cls, own) if n[0] != '_'}

@pytest.mark.parametrize('cls', ['Sparsifier', 'Schedule', 'Granularities'])
def test_docstrings_of_methods(cls):
    methods = public_methods(getattr(module('all'), cls))
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

# --- metadata

def settings():
    ini = configparser.ConfigParser(delimiters=['='])
    ini.read(ROOT/'settings.ini', encoding='utf-8')
    return ini['DEFAULT']

META = importlib.metadata.metadata('fasterai_sparse')

def test_version(): assert fasterai_sparse.__version__ == importlib.metadata.version('fasterai_sparse')

def test_metadata_is_that_of_settings():
    s = settings()
    assert META['Name'].replace('-', '_') == s['lib_name'] == 'fasterai_sparse'
    assert META['Summary'] == s['description']
    assert META['Requires-Python'] == f">={s['min_python']}"
    assert (META['License-Expression'] or META['License']) == s['license']
    assert set(META['Keywords'].replace(',', ' ').split()) == set(s['keywords'].split())

def requirements():
    "Extra, or None -> what it requires"
    res = {}
    for r in importlib.metadata.requires('fasterai_sparse'):
        req, _, extra = r.partition(';')
        res.setdefault(extra.split('==')[1].strip(' "\'') if extra else None, set()).add(req.replace(' ', ''))
    return res

def normal(r): return {o.replace('>=', ' >= ').replace('==', ' == ').replace(' ', '') for o in r.split()}

def test_requirements_are_those_of_settings():
    s = settings()
    extras = {e: normal(s[f'{e}_requirements']) for e in ('onnx', 'dev', 'docs', 'bench')}
    assert requirements() == {None: normal(s['requirements']), **extras}

def test_requirements_are_ranges_and_the_core_has_no_torchvision():
    core = normal(settings()['requirements'])
    assert not any('==' in r for r in core) and not any(r.startswith('torchvision') for r in core)

def test_constraints_fit_the_ranges():
    from packaging.requirements import Requirement
    lines = (ROOT/'constraints.txt').read_text().splitlines()
    pins = dict(l.split('==') for l in lines if '==' in l and not l.startswith('#'))
    s = settings()
    reqs = [Requirement(r) for k in ('requirements', 'dev_requirements', 'docs_requirements') for r in s[k].split()]
    assert {'torch', 'fastai'} <= pins.keys()
    assert not [str(r) for r in reqs if r.name in pins and not r.specifier.contains(pins[r.name].split(';')[0].strip())]

def test_console_script():
    name, target = settings()['console_scripts'].split('=')
    ep, = [e for e in importlib.metadata.entry_points(group='console_scripts') if e.name == name]
    assert ep.value == target and callable(ep.load())

def test_nbdev_entry_point():
    ep, = [e for e in importlib.metadata.entry_points(group='nbdev') if e.name == 'fasterai_sparse']
    assert 'settings' in ep.load()

def test_the_readmes_headline_was_measured():
    rows = [[c.strip() for c in l.split('|')[1:-1]] for l in (ROOT/'README.md').read_text().split('## What zeros bring')[1].split('## ')[0].splitlines() if l.startswith('| ') and '%' in l]
    measured = [[c.strip() for c in l.split('|')[1:-1]] for l in (ROOT/'benchmarks'/'engine.md').read_text().splitlines() if l.startswith('|')]
    assert len(rows) > 5
    for name,zeros,ratio,ms,*_ in rows: assert any(m[0].split(',')[0].replace('_', '') in name.lower().replace('-', '') and m[1] == zeros.replace(' %', '') and ratio in m and ms in m for m in measured if len(m) > 1), (name, zeros, ratio, ms)
