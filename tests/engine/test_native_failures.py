"Failures inside the compiled library raise Python errors; the process goes on"
import os, subprocess, sys
from types import SimpleNamespace

import pytest, torch
from torch import nn

from fasterai_sparse.engine import ops
from fasterai_sparse.engine.modules import SparseConv2d, SparseLinear
from fasterai_sparse.engine.ops import (
    all_finite, Convolution, engine_library, engine_sets, Flat, Grid, Operation, Program, Transpose)
from fasterai_sparse.engine.plan import Plan
from fasterai_sparse.engine.weights import check_offsets, Terms
from fasterai_sparse.utils import native
from fasterai_sparse.utils.native import native_library, sum_max

compiled = pytest.mark.skipif(not engine_sets(), reason='no compiled library')
sanitized = 'san.so' in os.environ.get('LD_PRELOAD', '')   # a sanitizer needs all addresses
linux = pytest.mark.skipif(not sys.platform.startswith('linux') or sanitized, reason='limits memory as Linux does')

# ---- no threads, no memory
START = '''
import resource, sys, numpy as np, torch
from torch import nn
torch.set_num_threads(1)
from fasterai_sparse.engine.ops import Attention, Flat, Grid, MaxPool, Program
from fasterai_sparse.engine.plan import Plan
from fasterai_sparse.utils.native import sum_max

def limit_memory(more):
    "Let the process have `more` bytes of addresses than now: too few for the stack of a thread"
    now = int(open('/proc/self/statm').read().split()[0])*resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + more, now + more))

def refuses_threads():
    import threading
    try: threading.Thread(target=int).start()
    except RuntimeError: return True
'''

def run(code):
    p = subprocess.run([sys.executable, '-W', 'ignore', '-c', START + code], capture_output=True, text=True)
    assert p.returncode == 0, p.stderr[-2000:] or f'killed by signal {-p.returncode}'
    return p.stdout.strip()

@compiled
@linux
def test_refused_threads_leave_fewer():
    "Without other threads, the calling thread does all the work"
    assert run('''
net = nn.Sequential(nn.Conv2d(3,16,3,padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16,16,3,padding=1)).eval()
x = torch.randn(1,3,32,32)
with torch.no_grad():
    want, plan = net(x), Plan(net, [x], threads=1, tune=False)
    plan.program.threads = 4
    h = np.random.rand(600, 320).astype('float32')
    product = sum_max(h, h, threads=1)
    limit_memory(4<<20)
    assert refuses_threads()
    print(torch.allclose(plan(x), want, atol=1e-5), (sum_max(h, h, threads=4) == product).all())
''') == 'True True'

@compiled
@linux
@pytest.mark.parametrize('threads', [1, 2])
def test_no_memory_raises(threads):
    "Failed allocations inside the kernels (attention weights, rows of a pooling window) raise"
    assert run(f'''
n, grid, ones = 1<<25, Grid(1), Grid(1)
grid.include(1, n), ones.include(1, 2)
x, y = Flat(1, 1, n, grid, 4), Flat(1, 1, n, grid, 4)
small = Flat(1, 1, 2, ones, 4)
pool = MaxPool(small, small, (1,1), (1,1), (0,0))
attention, wide = Attention(x, x, x, y, 1, 1.), MaxPool(x, y, (1,1), (1,1), (0,0))
programs = Program([pool, attention], 0, {threads}), Program([wide], 0, {threads})
Program([pool], 0, {threads})()   # has started threads before
limit_memory(1<<20)
for p in programs:
    try: p()
    except MemoryError as e: print(e)
Program([pool], 0, 1)()
''').splitlines() == ['The engine could not run Attention (operation 1 of 2): there is not enough memory',
                      'The engine could not run MaxPool (operation 0 of 1): there is not enough memory']

@compiled
def test_an_instruction_set_that_is_not_there():
    x = torch.randn(2, 16)
    grid = Grid(1)
    grid.include(1, 2)
    program = Program([Transpose(x, Flat(16, 1, 2, grid, 4))], which=9)
    with pytest.raises(RuntimeError, match='no such instruction set'): program()
    with pytest.raises(ValueError, match='which=9'): sum_max(x, x, which=9)

# ---- no library
def entries():
    x, grid = torch.randn(2, 8), Grid(1)
    grid.include(1, 2)
    return dict(
        linear=lambda: SparseLinear(nn.Linear(8, 4).requires_grad_(False))(x),
        conv=lambda: SparseConv2d(nn.Conv2d(3, 4, 3).requires_grad_(False))(torch.randn(1, 3, 8, 8)),
        plan=lambda: Plan(nn.Sequential(nn.Conv2d(3, 4, 3)), [torch.randn(1, 3, 8, 8)]),
        program=lambda: Program([Transpose(x, Flat(8, 1, 2, grid, 4))])(),
        all_finite=lambda: all_finite(x), library=engine_library)

@pytest.mark.parametrize('entry', entries())
def test_each_entry_says_why_there_is_no_engine(entry, monkeypatch):
    monkeypatch.setattr(ops, 'native_library', lambda: (None, 'not compiled'))
    assert engine_sets() == {}
    with pytest.raises(RuntimeError, match='^The engine is not available: not compiled$'): entries()[entry]()

def test_sum_max_says_why_there_is_no_library(monkeypatch):
    monkeypatch.setattr(native, 'native_library', lambda: (None, 'not compiled'))
    assert native.instruction_sets() == []
    with pytest.raises(RuntimeError, match='not compiled'): native.sum_max(torch.ones(1, 16), torch.ones(1, 16))

@compiled
def test_a_library_without_a_usable_instruction_set(monkeypatch):
    monkeypatch.setattr(ops, '_engine_of', lambda lib: ({}, {}))
    with pytest.raises(RuntimeError, match='not available: .*no kernels for this processor'): all_finite(torch.ones(3))

def test_twins_need_no_library(monkeypatch):
    monkeypatch.setattr(ops, 'native_library', lambda: (None, 'not compiled'))
    grid, x = Grid(1), torch.randn(2, 8)
    grid.include(1, 2)
    y = Flat(8, 1, 2, grid, 4)
    Program([Transpose(x, y)]).run_torch()
    assert torch.equal(y.view[0,:,0].T, x)

# ---- a library of another version
@pytest.fixture
def fresh():
    "The lists of operations and activations are compared again, as when the library is loaded"
    ops._engine_of.cache_clear()
    yield
    ops._engine_of.cache_clear()

@compiled
def test_the_lists_are_the_same(fresh):
    kinds, _ = ops._engine_of(native_library()[0])
    ours = [op.kernel for op in Operation.__subclasses__() if op.__module__ == ops.__name__]
    assert sorted(kinds) == sorted(ours)

@compiled
@pytest.mark.parametrize('types', [dict(list(Convolution.types.items())[::-1]), {**Convolution.types, 'rows': 'number'},
                                   {**Convolution.types, 'more': 'integer'}])
def test_other_arguments_are_refused(types, monkeypatch, fresh):
    monkeypatch.setattr(Convolution, 'types', types)
    with pytest.raises(RuntimeError, match=r'\(conv differ\): install fasterai_sparse again'): engine_library()

@compiled
@pytest.mark.parametrize('acts', [['relu', None], [*ops.acts, 'other']])
def test_other_activations_are_refused(acts, monkeypatch, fresh):
    monkeypatch.setattr(ops, 'acts', dict.fromkeys(acts))
    with pytest.raises(RuntimeError, match='activations differ'): engine_library()

def test_a_library_without_a_function_is_refused(monkeypatch):
    monkeypatch.setattr(native.ctypes, 'CDLL', lambda path: SimpleNamespace())
    monkeypatch.setattr(native.Path, 'glob', lambda self, pattern: [native.Path('_native.so')])
    with pytest.raises(RuntimeError, match='install fasterai_sparse again'): native_library.__wrapped__()

# ---- offsets beyond 32 bits
def test_offsets_beyond_32_bits_are_refused():
    check_offsets(-(1<<31), (1<<31) - 1)
    with pytest.raises(ValueError, match='fewer or smaller images'): check_offsets(0, 1<<31)
    far = SimpleNamespace(stride=1<<28, grid=SimpleNamespace(width=10))
    assert Terms(torch.ones(1, 8), far).offset.max() == 7<<28
    with pytest.raises(ValueError, match='2,147,483,648 floats away'): Terms(torch.ones(1, 9), far)
    rows = SimpleNamespace(stride=1, grid=SimpleNamespace(width=1<<30))
    column = torch.ones(1, 1, 7, 1)
    with pytest.raises(ValueError, match='3,221,225,472 floats away'): Terms(column, rows, before=(3, 0))
