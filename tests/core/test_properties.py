"Properties that hold for random shapes and seeds"
import math
from copy import deepcopy
from fractions import Fraction

import pytest, torch
from torch import nn

from fasterai_sparse.core.allocation import _drop_counted, _drop_ranked, _drop_sorted, largest_remainder
from fasterai_sparse.core.criteria import large_final, random_criteria
from fasterai_sparse.core.granularity import Granularities
from fasterai_sparse.core.layers import out_in_axes
from fasterai_sparse.core.masks import get_mask, masked_params
from fasterai_sparse.core.select import kth_largest, top_k_mask
from fasterai_sparse.core.sparsifier import Sparsifier

contexts = pytest.mark.parametrize('context', ['local', 'global'])
seeds = pytest.mark.parametrize('seed', range(10))

def rand(low, high): return int(torch.randint(low, high+1, ()))
def pick(choices): return choices[rand(0, len(choices)-1)]
def half_up(percent, n): return math.floor(Fraction(str(percent))*n/100 + Fraction(1,2))
def masks(model): return [mask.clone() for *_,mask in masked_params(model)]
def zeros(model): return sum(int((p==0).sum()) for p in model.parameters() if p.dim() > 1)
def size(model): return sum(p.numel() for p in model.parameters() if p.dim() > 1)

def random_net():
    make = lambda: pick([lambda: nn.Linear(rand(1,20), rand(1,20)), lambda: nn.Conv2d(rand(1,8), rand(1,8), rand(1,3)),
        lambda: nn.ConvTranspose1d(rand(1,8), rand(1,8), 3), lambda: nn.Embedding(rand(1,20), rand(1,9))])()
    return nn.ModuleList([make() for _ in range(rand(1,6))])

def cnn(): return nn.Sequential(nn.Conv2d(3,10,3), nn.Conv2d(10,16,(3,2)), nn.Conv2d(16,7,1), nn.Conv2d(7,7,3))

def random_scores(n, n_levels=None, special=False):
    s = torch.randn(n) if n_levels is None else torch.randint(n_levels, (n,)).float()
    return s.masked_fill(torch.rand(n) < .2, -math.inf).masked_fill(torch.rand(n) < .1, math.inf) if special else s

def reference_mask(t, n_keep, live=None):
    "Mask of the highest scores by a stable sort"
    alive = torch.ones_like(t, dtype=torch.bool) if live is None else live
    order = t.flatten().argsort(descending=True, stable=True)
    mask = torch.zeros(t.numel(), dtype=torch.bool)
    mask[order[alive.flatten()[order]][:n_keep]] = True
    return mask.view(t.shape)

@seeds
def test_top_k_mask_is_a_stable_sort(seed):
    torch.manual_seed(seed)
    for n_levels in (None, 1, 2, 5, 100):
        t = random_scores(rand(1, 400), n_levels, special=rand(0,1)).view(1, -1)
        live = torch.rand(t.shape) > pick([0., .5, .95])
        k, k_live = rand(0, t.numel()), rand(0, int(live.sum()))
        assert torch.equal(top_k_mask(t, k), reference_mask(t, k))
        assert torch.equal(top_k_mask(t, k_live, live), reference_mask(t, k_live, live))

@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_top_k_mask_of_many(dtype):
    for n_levels in (None, 3):
        t = random_scores(20_000, n_levels).to(dtype)
        order = t.argsort(descending=True, stable=True)
        for k in (1, 7_777, 19_999):
            mask = top_k_mask(t, k)
            assert torch.equal(mask.nonzero()[:,0], order[:k].sort().values)

@seeds
def test_kth_largest_is_the_sorted_one(seed):
    torch.manual_seed(seed)
    for t in (random_scores(9_000), random_scores(9_000, 3), random_scores(9_000).relu(),
        random_scores(50, special=True)):
        ranked = t.sort(descending=True).values
        for k in (1, 2, len(t)//2, len(t)-1, len(t)): assert kth_largest(t, k) == ranked[k-1]

@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
def test_kth_largest_beside_a_common_value(dtype):
    t = torch.cat([torch.rand(700)+1, torch.zeros(9_000), -torch.rand(300)-1])[torch.randperm(10_000)].to(dtype)
    ranked = t.sort(descending=True).values
    for k in (1, 699, 700, 701, 702, 9_699, 9_700, 9_701, 9_702, 10_000): assert kth_largest(t, k) == ranked[k-1]

def test_what_has_no_rank():
    for n_keep in (1, 2, 9_999):
        t = torch.randn(10_000)
        t[77] = math.nan
        with pytest.raises(ValueError, match='NaN'): top_k_mask(t, n_keep)
        with pytest.raises(ValueError, match="Can't keep 5 of 4"): top_k_mask(t[:4], 5)

@seeds
def test_drop_counted_is_drop_sorted(seed):
    torch.manual_seed(seed)
    for _ in range(20):
        scores = [random_scores(rand(1, 300), pick([None, 1, 2, 6]), special=rand(0,1)) for _ in range(rand(1,6))]
        sizes = [pick([1, 1, 2, 3, 9, 50]) for _ in scores]
        total = sum(z*len(s) for s,z in zip(scores, sizes))
        for budget in (0, total, rand(0, total), rand(0, total)):
            assert _drop_counted(scores, sizes, budget, [None]*len(scores)) == _drop_sorted(scores, sizes, budget)

@seeds
def test_drop_counted_takes_the_dead_first(seed):
    torch.manual_seed(seed)
    for _ in range(20):
        scores = [random_scores(rand(1, 300), pick([None, 1, 2, 6])) for _ in range(rand(1,6))]
        sizes = [pick([1, 1, 2, 3, 9, 50]) for _ in scores]
        live = [pick([None, torch.rand(s.shape) > .4]) for s in scores]
        sunken = [s if l is None else torch.where(l, s, -torch.inf) for s,l in zip(scores, live)]
        dead = sum(z*int((~l).sum()) for z,l in zip(sizes, live) if l is not None)
        total = sum(z*len(s) for s,z in zip(scores, sizes))
        for budget in (dead, total, rand(dead, total), rand(dead, total)):
            assert _drop_counted(scores, sizes, budget, live) == _drop_sorted(sunken, sizes, budget)

def test_drop_counted_of_many():
    scores = [torch.randn(150_000), torch.randn(90_000)*3, torch.randn(2_000).relu()]
    for budget in (5, 100_000, 300_000, 401_000):
        assert _drop_counted(scores, [1,3,2], budget, [None]*3) == _drop_sorted(scores, [1,3,2], budget)

def test_dropped_groups_fit_the_budget():
    scores, sizes = [random_scores(500), random_scores(300, 4)], [2, 7]
    for budget in range(0, 3100, 111):
        assert 0 <= budget - sum(d*z for d,z in zip(_drop_ranked(scores, sizes, budget, [None]*2), sizes)) < 7

@contexts
@pytest.mark.parametrize('seed', range(25))
def test_the_total_is_exact(seed, context):
    torch.manual_seed(seed)
    net, percent = random_net(), pick([0, 100, rand(1,99), rand(1,999)/10])
    criteria = pick([large_final, random_criteria, lambda p: p*0])
    Sparsifier(net, 'weight', context, criteria, layer_type=None).sparsify_model(percent)
    floor = 0 if percent == 100 else len(net)
    assert zeros(net) == min(half_up(percent, size(net)), size(net)-floor)

@pytest.mark.parametrize('seed', range(25))
def test_a_layer_differs_by_one_at_most(seed):
    torch.manual_seed(seed)
    net, percent = random_net(), rand(1, 700)/10
    Sparsifier(net, 'weight', 'local', large_final, layer_type=None).sparsify_model(percent)
    for m in net: assert abs(zeros(m) - percent/100*m.weight.numel()) < 1 or m.weight.numel() == 1

@pytest.mark.parametrize('seed', range(10))
def test_largest_remainder_keeps_the_total(seed):
    torch.manual_seed(seed)
    for _ in range(20):
        shares = [Fraction(rand(0,300), rand(1,30)) for _ in range(rand(1,8))]
        caps = [math.floor(s) + rand(0,3) for s in shares]
        counts = largest_remainder(shares, caps)
        assert all(0 <= c <= cap for c,cap in zip(counts, caps))
        assert sum(counts) == min(math.floor(sum(shares) + Fraction(1,2)), sum(caps))

@pytest.mark.parametrize('falls', [False, True])
@pytest.mark.parametrize('biggest,most_layers', [(30, 30), (100, 12), (1000, 20)])
def test_rounding_is_exact_and_never_turns_back(biggest, most_layers, falls):
    for _ in range(100):
        sizes = [rand(1, pick([3, biggest])) for _ in range(rand(2, most_layers))]
        caps, now = [n-1 for n in sizes], [n-1 if falls else 0 for n in sizes]
        for s in sorted([rand(1, 950) for _ in range(15)], reverse=falls):
            shares = [Fraction(s, 1000)*n for n in sizes]
            counts = largest_remainder(shares, caps, now)
            total = min(math.floor(sum(shares) + Fraction(1,2)), sum(caps))
            assert sum(counts) == total
            assert all(c >= n if total >= sum(now) else c <= n for c,n in zip(counts, now))
            now = counts

@contexts
@pytest.mark.parametrize('granularity', Granularities.allowed_granularities(nn.Conv2d(1,1,1)))
def test_masks_are_nested_while_the_target_rises(granularity, context):
    net = cnn()
    s = Sparsifier(net, granularity, context, random_criteria)
    s.sparsify_model(0)
    for percent in (10, 25, 50, 51, 80, 99, 100):
        before = masks(net)
        s.sparsify_model(percent)
        assert not any((now & ~old).any() for now,old in zip(masks(net), before))

@contexts
@seeds
def test_rounding_revives_nothing_on_the_way_up(seed, context):
    torch.manual_seed(seed)
    net = nn.ModuleList([nn.Linear(rand(1, 200), rand(1, 3)) for _ in range(6)])
    s = Sparsifier(net, 'weight', context, large_final, layer_type=nn.Linear)
    s.sparsify_model(1)
    for i in range(11, 900, 7):
        before = masks(net)
        s.sparsify_model(i/10)
        assert not any((now & ~old).any() for now,old in zip(masks(net), before))
        assert zeros(net) == min(half_up(i/10, size(net)), size(net)-6)

@contexts
@seeds
def test_rounding_drops_nothing_on_the_way_down(seed, context):
    torch.manual_seed(seed)
    net = nn.ModuleList([nn.Linear(rand(1, 200), rand(1, 3)) for _ in range(6)])
    s = Sparsifier(net, 'weight', context, large_final, layer_type=nn.Linear)
    for i in range(900, 10, -7):
        before = masks(net)
        s.sparsify_model(i/10)
        assert not any((old & ~now).any() for now,old in zip(masks(net), before))
        assert zeros(net) == min(half_up(i/10, size(net)), size(net)-6)

@contexts
@pytest.mark.parametrize('granularity', ['weight', 'kernel', 'filter'])
def test_the_live_stay_while_the_target_falls(granularity, context):
    net = cnn()
    s = Sparsifier(net, granularity, context, large_final)
    s.sparsify_model(95)
    for percent in (90, 60, 59, 20, 0):
        before = masks(net)
        s.sparsify_model(percent)
        assert not any((old & ~now).any() for now,old in zip(masks(net), before))
    assert all(m.all() for m in masks(net))

@contexts
@pytest.mark.parametrize('granularity', ['weight', 'filter'])
def test_the_seed_decides(granularity, context):
    net = cnn()
    def drawn(seed):
        other = deepcopy(net)
        s = Sparsifier(other, granularity, context, random_criteria, seed=seed)
        for percent in (50, 80, 60): s.sparsify_model(percent)
        return masks(other)
    a, b, c = drawn(1), drawn(1), drawn(2)
    assert all(map(torch.equal, a, b)) and not all(map(torch.equal, a, c))

def test_chance_leaves_the_global_generator_alone():
    net = cnn()
    before = torch.get_rng_state()
    s = Sparsifier(net, 'weight', 'local', random_criteria)
    for percent in (50, 30): s.sparsify_model(percent)
    assert torch.equal(torch.get_rng_state(), before)

def test_each_call_draws_anew():
    nets = cnn(), cnn()
    for net in nets:
        s = Sparsifier(net, 'weight', 'local', random_criteria)
        if net is nets[1]: s.sparsify_model(0)
        s.sparsify_model(50)
    assert not all(map(torch.equal, masks(nets[0]), masks(nets[1])))

@contexts
def test_each_layer_draws_its_own(context):
    a, b = nn.Linear(30, 20), nn.Linear(30, 20)
    both = nn.ModuleDict(dict(a=a, b=b))
    Sparsifier(both, 'weight', context, random_criteria, layer_type=nn.Linear).sparsify_model(50)
    assert not torch.equal(get_mask(a), get_mask(b))

@seeds
def test_n_of_m_is_exact(seed):
    torch.manual_seed(seed)
    n, m = pick([(1,2), (2,4), (1,4), (3,4), (4,8), (1,16)])
    layer = pick([lambda: nn.Linear(m*rand(1,5), rand(1,9)), lambda: nn.Conv2d(m*rand(1,3), rand(1,5), 3),
        lambda: nn.ConvTranspose2d(m*rand(1,3), 4, 3)])()
    if rand(0,1): nn.init.constant_(layer.weight, 1.)
    net = nn.ModuleList([layer])
    s = Sparsifier(net, 'weight', 'local', large_final, nm=(n, m), layer_type=type(layer))
    for share in (.3, .7, 1): s.sparsify_model(float(100*Fraction(m-n, m)*Fraction(str(share))))
    axis = out_in_axes(layer)[1]
    assert (layer.weight.movedim(axis, -1).unflatten(-1, (-1, m)) != 0).sum(-1).unique().tolist() == [n]
