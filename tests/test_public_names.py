"`from fasterai_sparse.all import *`: which names it binds, and that it replaces no others"
import builtins, importlib, json, pkgutil, subprocess, sys
from functools import cache

import pytest

import fasterai_sparse
import fasterai_sparse.all as public

MODULES = [m.name for m in pkgutil.walk_packages(fasterai_sparse.__path__, 'fasterai_sparse.')
           if not m.ispkg and not m.name.rpartition('.')[2].startswith('_')]

def python(code):
    "Output of `code` in a new process"
    r = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True)
    assert r.returncode == 0, r.stderr[-2000:]
    return r.stdout

# --- modules

@pytest.mark.parametrize('name', MODULES)
def test_a_module_has_what_it_exports(name):
    exported = importlib.import_module(name).__all__
    assert exported and len(set(exported)) == len(exported)
    for n in exported: assert hasattr(importlib.import_module(name), n), n

def test_walk_packages_finds_every_folder():
    folders = {name.split('.')[1] for name in MODULES if name.count('.') == 2}
    assert {'utils', 'core', 'train', 'dynamic', 'nncf', 'nm', 'engine', 'files'} <= folders

def test_no_name_is_exported_by_two_modules():
    owners = {}
    for name in MODULES:
        if name != 'fasterai_sparse.all':
            for n in importlib.import_module(name).__all__: owners.setdefault(n, []).append(name)
    assert not {n: names for n,names in owners.items() if len(names) > 1}

# --- the names

def test_the_star_import_brings_the_list_and_nothing_of_fastais():
    assert sorted(set(star_import()[0])-{'__builtins__'}) == sorted(public.__all__)
    assert len(set(public.__all__)) == len(public.__all__) <= 90

@pytest.mark.parametrize('name', public.__all__)
def test_a_public_name_is_ours(name):
    "A public name is defined in one of our modules, or is an object of one of our classes"
    o = getattr(public, name)
    if isinstance(o, dict): assert name.endswith('_presets')
    else: assert (o.__module__ if hasattr(o, '__module__') else type(o).__module__).startswith('fasterai_sparse.')

SEEDS = '''Sparsifier SparsifyCallback Criteria Schedule Granularities magnitude large_final one_shot iterative agp
    one_cycle cos lin dsd sparse_mask sparse_mask_like maybe_float sparse_params apply_masks
    is_sparseable_module sparseable_modules uniform_sparsity first_layer_dense_uniform erdos_renyi_sparsity
    sparsify_model random_score weight_magnitude gradient_magnitude gradient_momentum top_k_mask
    DynamicSparseTrainingCallback SET_presets SNFS_presets RigL_presets RBSparsityCallback
    MagnitudeSparsityCallback ConstSparsityCallback SparsityConfig callbacks_from_config'''.split()

def test_what_users_of_other_libraries_type_is_there(): assert not set(SEEDS) - set(public.__all__)

# --- beside other imports

NAMESPACES = '''import json
mine = {}
exec('from fasterai_sparse.all import *', mine)
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
    found[f] = sorted(n for n in mine if n in ns and not n.startswith('__'))
print(json.dumps([list(mine), found]))'''

@cache
def star_import():
    "Names of the star import, and: first lines of a notebook -> names that both they and the package bind"
    return json.loads(python(NAMESPACES))

@pytest.mark.parametrize('which', range(7))
def test_the_order_of_star_imports_does_not_matter(which):
    first, names = list(star_import()[1].items())[which]
    assert names == [], f'with {first!r}'

USUAL = '''random math torch nn F np pd plt tensor Tensor L Path partial os sys re time copy deepcopy json pickle
    warnings inspect itertools weight mask model learn dls data x y path opt loss metrics params group groups
    scores name names layer layers cb sparsity'''.split()

@pytest.mark.parametrize('name', USUAL)
def test_no_usual_name_is_taken(name): assert name not in public.__all__

def test_no_builtin_is_shadowed(): assert not [n for n in public.__all__ if hasattr(builtins, n)]

def test_modules_imported_before_survive():
    "A star import must not replace the module `copy` by the function, nor `random` by a criterion"
    out = python('''
import copy, random, math
from functools import partial
from pathlib import Path
import numpy as np, pandas as pd
import torch.nn.functional as F
from torch import nn
from fastcore.foundation import L
before = copy, random, math, partial, Path, np, pd, F, nn, L
from fasterai_sparse.all import *
assert all(a is b for a,b in zip(before, (copy, random, math, partial, Path, np, pd, F, nn, L)))
print(copy.deepcopy([1]), random.Random(0).random() < 1, math.floor(1.5))''')
    assert out.split() == ['[1]', 'True', '1']

# --- imports

BLOCK = '''
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.startswith(('torchvision', 'fastai.vision')): raise ImportError(f'{name} is blocked')
sys.meta_path.insert(0, Block())
'''

def test_all_works_where_vision_is_absent():
    out = python(BLOCK + '''
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

def test_verbs_of_the_learner_and_the_sparsifier_come_with_it():
    "Importing `all` is enough to have the methods that higher folders add to Learner and Sparsifier"
    out = python('''
import fasterai_sparse.all
from fastai.learner import Learner
print(*[hasattr(Learner, n) for n in ('accelerate', 'export_sparse')])''')
    assert out.split() == ['True', 'True']
