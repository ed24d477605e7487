"The permutation search: against brute force and dynamic programming, its backends against each other, and wrong input"
import itertools, math, random
from itertools import combinations

import numpy as np, pytest, torch

from fasterai_sparse.utils.native import instruction_sets, sum_max
from fasterai_sparse.core.patterns import NM
from fasterai_sparse.nm.search import NumpyMap, permutation_backends, search_permutation, TorchMap

BACKENDS = [b for b,why in permutation_backends().items() if not why and b != 'apex']   # apex has only a part of it
each_backend = pytest.mark.parametrize('backend', BACKENDS)

def kept(s, n=2, m=4): return np.sort(np.asarray(s, np.float64).reshape(len(s), -1, m), -1)[...,m-n:].sum()

def optimum(s, n=2, m=4):
    "Largest sum that n:m keeps of `s` in any order of columns, by dynamic programming over sets of placed columns"
    c = s.shape[1]
    of = {sum(1<<i for i in g): kept(s[:,list(g)], n, m) for g in combinations(range(c), m)}
    best = {0: 0.}
    for _ in range(c//m):
        further = {}
        for done,value in best.items():
            first, *rest = [i for i in range(c) if not done>>i & 1]
            for others in combinations(rest, m-1):
                g = 1<<first | sum(1<<i for i in others)
                if value+of[g] > further.get(done|g, -1.): further[done|g] = value+of[g]
        best = further
    value, = best.values()
    return value

def check(p, s, n=2, m=4):
    "`p` is an order of the columns of `s`, and its figures are right"
    c = s.shape[1]//m*m
    assert p.order.dtype == torch.int64 and p.order.sort().values.tolist() == list(range(s.shape[1]))
    assert p.order[c:].tolist() == list(range(c, s.shape[1]))
    assert p.naive == pytest.approx(kept(s[:,:c], n, m), rel=1e-6)
    assert p.kept == pytest.approx(kept(s[:,p.order[:c].numpy()], n, m), rel=1e-6)
    rows = np.sort(s[:,:c], 1)[:,c-c//m*n:].sum() if c else 0
    assert p.row_bound == pytest.approx(rows, rel=1e-5)
    assert p.unstructured == pytest.approx(np.sort(s[:,:c].ravel())[c*len(s)-c//m*n*len(s):].sum(), rel=1e-5)
    assert p.naive*(1-1e-6) <= p.kept <= p.row_bound*(1+1e-6) <= p.unstructured*(1+2e-6)

@each_backend
@pytest.mark.parametrize('rows,seed', [(8,0), (16,1), (24,2), (64,3), (3,4), (1,5)])
def test_sixteen_columns_get_the_optimum(backend, rows, seed):
    s = np.random.RandomState(seed).rand(rows, 16)
    p = search_permutation(s, backend=backend)
    check(p, s)
    assert p.kept == pytest.approx(optimum(s), rel=1e-6)

@each_backend
@pytest.mark.parametrize('n,m,c', [(1,2,12), (1,4,12), (3,4,12), (2,6,12), (1,3,12), (2,4,8), (4,8,16)])
def test_other_patterns_get_the_optimum(backend, n, m, c):
    s = np.random.RandomState(n+m).rand(10, c)
    p = search_permutation(s, n, m, backend=backend)
    check(p, s, n, m)
    assert p.kept == pytest.approx(optimum(s, n, m), rel=1e-6)

def best_in_groups(s, groups, n=2, m=4):
    "Largest sum that n:m keeps where columns move only within their group, by trying all orders of each group"
    places = {g: [i for i in range(len(groups)) if groups[i] == g] for g in set(groups) if g >= 0}
    best = 0.
    for dealt in itertools.product(*(itertools.permutations(p) for p in places.values())):
        order = list(range(len(groups)))
        for p,d in zip(places.values(), dealt):
            for i,j in zip(p, d): order[i] = j
        best = max(best, kept(s[:,order], n, m))
    return best

@each_backend
@pytest.mark.parametrize('groups',
                         [[0,0,1,1,0,1,1,0], [0,1,-1,-1,0,1,1,0], [0,0,0,-1,0,0,-1,-1], [-1]*8, [0,1,2,3,4,5,6,7],
                          [2,2,2,2,2,2,2,2], [0,0,0,0,1,1,1,1]])
def test_columns_move_within_their_group(backend, groups):
    for seed in range(3):
        s = np.random.RandomState(seed).rand(9, 8)
        p = search_permutation(s, backend=backend, groups=groups)
        check(p, s)
        assert (np.array(groups)[p.order.numpy()] == groups).all()
        assert all(o == i for i,o in enumerate(p.order.tolist()) if groups[i] < 0)
        assert p.kept == pytest.approx(best_in_groups(s, groups), rel=1e-6)

def test_groups_of_a_larger_matrix():
    s, groups = np.random.RandomState(0).rand(32, 64), np.arange(64) % 3 - 1
    p = search_permutation(s, groups=groups)
    check(p, s)
    assert (groups[p.order.numpy()] == groups).all() and search_permutation(s).kept > p.kept > 1.005*p.naive

@pytest.mark.parametrize('shape', [(4,512), (1,256), (2,1024)])
def test_it_ends_where_only_rounding_is_left_to_gain(shape):
    p = search_permutation(torch.rand(shape))
    assert p.efficacy > 99

@each_backend
@pytest.mark.parametrize('columns', [1, 3, 4, 5, 7, 8, 18, 23])
def test_columns_that_fill_no_stripe_stay(backend, columns):
    s = np.random.RandomState(columns).rand(12, columns)
    check(search_permutation(s, backend=backend), s)

@pytest.mark.parametrize('kind',
                         ['ties', 'zeros', 'one row', 'half zero', 'huge', 'tiny', 'heavy tail', 'all the same'])
def test_odd_scores(kind):
    r = np.random.RandomState(0)
    s = {'ties': r.randint(0, 3, (20,24)).astype(float), 'zeros': np.zeros((8,16)), 'one row': r.rand(1,40),
         'half zero': r.rand(16,32)*(r.rand(16,32) < .5), 'huge': r.rand(9,24)*1e30,
         'tiny': r.rand(9,24)*1e-30, 'heavy tail': r.pareto(1., (32,32)), 'all the same': np.ones((5,20))}[kind]
    for backend in BACKENDS: check(search_permutation(s, backend=backend), s)

def test_a_bad_order_is_mended():
    "An order that puts all large columns into one group is improved"
    s = np.repeat([[10., 10, 10, 10, 1, 1, 1, 1]], 6, 0)
    p = search_permutation(s)
    assert p.naive == 6*22 and p.kept == 6*40 and p.efficacy == 100

@pytest.mark.parametrize('n,m', [(2,4), (1,4), (2,8)])
def test_its_figures_are_what_the_pattern_keeps(n, m):
    w = torch.randn(24, 32)
    p = search_permutation(w.abs(), n, m)
    mask = NM(n, m).select(w[:,p.order].abs(), w.numel()*n//m)
    assert p.kept == pytest.approx((w[:,p.order].abs()*mask).sum().item(), rel=1e-5)

@each_backend
def test_the_same_seed_finds_the_same(backend):
    s = torch.rand(40, 64)
    orders = [search_permutation(s, seed=seed, backend=backend).order for seed in (0, 0, 1)]
    assert orders[0].equal(orders[1]) and not orders[0].equal(orders[2])

def test_no_global_state_is_touched():
    s = torch.rand(20, 32)
    torch.manual_seed(3), np.random.seed(3), random.seed(3)
    def state():
        numpy_state = np.random.get_state()[1].tolist()
        return torch.get_rng_state().tolist(), numpy_state, random.getstate(), torch.get_num_threads(), s.tolist()
    before = state()
    search_permutation(s, time_budget=.05)
    assert state() == before

def test_more_time_is_no_worse():
    s = np.random.RandomState(1).rand(64, 48)
    assert search_permutation(s, time_budget=.5).kept >= search_permutation(s, time_budget=.001).kept

def test_a_short_budget_is_kept():
    s = torch.rand(256, 512)
    # a step that has begun is finished, so with a wide margin
    assert search_permutation(s, time_budget=.05, backend=BACKENDS[0]).seconds < 5

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64, torch.int64])
def test_dtypes(dtype):
    s = (100*torch.rand(8, 16)).to(dtype)
    check(search_permutation(s), s.double().numpy())

def test_inputs_of_other_kinds():
    s = torch.rand(8, 16)
    orders = [search_permutation(x).order.tolist()
              for x in (s, s.numpy(), s.tolist(), s.T.contiguous().T, s.requires_grad_())]
    assert all(o == orders[0] for o in orders)

@pytest.mark.parametrize('kwargs,what', [
    (dict(scores=torch.rand(8)), r'\(8,\)'), (dict(scores=torch.rand(2,2,4)), r'\(2, 2, 4\)'),
    (dict(scores=torch.rand(0,8)), r'\(0, 8\)'), (dict(scores=torch.tensor([[1., math.nan]])), '1 of 2'),
    (dict(scores=torch.tensor([[1., math.inf]])), 'finite'), (dict(scores=torch.tensor([[1., -2.]])), '-2'),
    (dict(n=4), '4:4'), (dict(n=0), '0:4'), (dict(m=2.5), '2.5'), (dict(n=True), 'True:4'),
    (dict(time_budget=0), 'not 0'), (dict(time_budget=-1.), '-1.0'), (dict(time_budget='1'), "'1'"),
    (dict(backend='gpu'), "'gpu'"), (dict(groups=[0]*15), r'16 columns'), (dict(groups=[.5]*16), 'float64')])
def test_what_is_refused(kwargs, what):
    with pytest.raises(ValueError, match=what): search_permutation(**{'scores': torch.rand(8,16), **kwargs})

@pytest.mark.skipif('native' not in BACKENDS, reason='no compiled library')
@pytest.mark.parametrize('n,m', [(2,4), (1,4), (3,4), (2,8), (1,2)])
def test_native_map_equals_its_twin(n, m):
    x = torch.rand(24, 37)
    maps, order = [NumpyMap(x.numpy(), n, m), TorchMap(x, n, m)], np.random.RandomState(0).permutation(24)
    first, second = [e.refresh(order, np.arange(24//m)) for e in maps]
    assert first == pytest.approx(second, rel=1e-5) and np.allclose(maps[0].values, maps[1].values.numpy(), rtol=1e-5)
    (a, which), (b, other) = (e.swaps(order, np.array([0, 2])) for e in maps)
    assert np.allclose(a, b, rtol=1e-5)
    assert all((which == other)[i,j] for i in range(2) for j in range(24//m) if j != (0, 2)[i])
    holes = np.arange(0, 24, m)
    assert np.allclose(*(e.exchange(order, holes) for e in maps), rtol=1e-5)

@pytest.mark.skipif('native' not in BACKENDS, reason='no compiled library')
# the last is large enough for several threads
@pytest.mark.parametrize('a,b,k', [(1,1,16), (3,5,16), (4,4,32), (7,130,48), (64,9,1024), (97,130,1024)])
def test_instruction_sets_agree(a, b, k):
    h = np.random.RandomState(0).rand(a, k).astype(np.float32)
    x = np.random.RandomState(1).rand(b, k).astype(np.float32)
    want = np.maximum(h[:,None].astype(np.float64), x).sum(-1)
    for i in range(len(instruction_sets())):
        for threads in (1, 2, 5): assert np.allclose(sum_max(h, x, i, threads), want, rtol=1e-5)

def test_without_the_library(monkeypatch):
    import fasterai_sparse.nm.search as permutation
    monkeypatch.setattr(permutation, 'native_library', lambda: (None, 'not compiled'))
    s = torch.rand(8, 16)
    p = search_permutation(s)
    assert p.backend == 'torch' and permutation_backends()['native'] == 'not compiled'
    with pytest.raises(RuntimeError, match='not compiled'): search_permutation(s, backend='native')
