"Exact numbers of zeros: fasterai's counting defects, then every granularity of every layer type"
import math, pickle
from copy import deepcopy
from fractions import Fraction
from functools import partial

import pytest, torch
from fastai.basics import Callback, DataLoader, DataLoaders, Learner
from torch import nn

from cases import in_a_loop
from fasterai_sparse.core.criteria import (
    Criteria, grad_crit, large_final, large_init, large_init_large_final, magnitude_increase, movement, movmag,
    Normalizer, random_criteria, Reducer, small_final, small_init, small_init_small_final, squared_final,
    updating_magnitude_increase, updating_movement, updating_movmag, wanda)
from fasterai_sparse.core.granularity import Granularities
from fasterai_sparse.core.masks import apply_masks, get_mask, masked_params
from fasterai_sparse.core.schedules import dsd
from fasterai_sparse.core.sparsifier import Sparsifier
from fasterai_sparse.train.sparsify_callback import SparsifyCallback

contexts = pytest.mark.parametrize('context', ['local', 'global'])

def zeros(m): return sum(int((p==0).sum()) for p in m.parameters() if p.dim() > 1)
def size(m): return sum(p.numel() for p in m.parameters() if p.dim() > 1)
def half_up(percent, n): return math.floor(Fraction(str(percent))*n/100 + Fraction(1,2))
def mlp(*sizes): return nn.Sequential(*[nn.Linear(a, b) for a,b in zip(sizes, sizes[1:])])
def cnn(): return nn.Sequential(nn.Conv2d(3,16,3), nn.ReLU(), nn.Conv2d(16,32,3), nn.ReLU(), nn.Conv2d(32,64,3))
def on(model, granularity='weight', context='local', criteria=large_final, layer_type=(nn.Linear,nn.Conv2d), **kwargs):
    return Sparsifier(model, granularity, context, criteria, layer_type=layer_type, **kwargs)
def sparse(model, sparsity, *args, round_to=None, **kwargs):
    on(model, *args, **kwargs).sparsify_model(sparsity, round_to)
    return model

@contexts
@pytest.mark.parametrize('percent,n', [(50,5), (100,10), (0,0), (90,9), (25,3), (24,2)])
@pytest.mark.parametrize('make', [lambda: nn.Linear(5,2), lambda: nn.Conv2d(5,2,1)], ids=['Linear', 'Conv2d'])
def test_one_zero_too_few(make, percent, n, context): assert zeros(sparse(make(), percent, context=context)) == n

@contexts
def test_ties_prune_nothing(context):
    net = mlp(6, 10, 4)
    for m in net: nn.init.constant_(m.weight, .5)
    assert zeros(sparse(net, 50, context=context)) == 50
    assert all(m.weight.any() for m in net)

def test_ties_go_to_the_lowest_index():
    m = nn.Linear(5, 4)
    nn.init.constant_(m.weight, -.5)
    sparse(m, 35)
    assert torch.equal(get_mask(m).flatten(), torch.arange(20) < 13)

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16, torch.float64])
def test_bf16_at_90_percent_is_short(dtype):
    m = sparse(nn.Linear(1000, 100).to(dtype), 90)
    assert zeros(m) == 90_000 and m.weight.dtype == dtype

@contexts
@pytest.mark.parametrize('criteria', [large_final, squared_final, small_final,
    Criteria(large_final, normalizer=Normalizer.sum)])
def test_weights_near_1e_15(criteria, context):
    net = mlp(30, 20, 10)
    for m in net: m.weight.data *= 1e-15
    assert zeros(sparse(net, 50, context=context, criteria=criteria)) == 400

def test_the_smallest_of_weights_near_1e_15():
    m = nn.Linear(30, 20)
    m.weight.data *= 1e-15
    w = m.weight.detach().clone()
    sparse(m, 50)
    assert w[m.weight==0].abs().max() < w[m.weight!=0].abs().min()

@contexts
def test_small_final_with_an_outlier(context):
    net = mlp(30, 20, 10)
    net[0].weight.data[3,4] = 1e6
    assert zeros(sparse(net, 50, context=context, criteria=small_final)) == 400
    assert net[0].weight[3,4] == 0

@contexts
@pytest.mark.parametrize('granularity,n', [('weight', half_up(80, size(cnn()))), ('filter', None)])
def test_second_sparsification_with_a_lower_target(granularity, n, context):
    net = cnn()
    s = on(net, granularity, context)
    s.sparsify_model(90)
    kept = {m: get_mask(m).clone() for m in net[::2]}
    s.sparsify_model(80)
    assert zeros(net) == n if n else 78 < 100*zeros(net)/size(net) <= 82
    assert not any((k & ~get_mask(m)).any() for m,k in kept.items())

@contexts
def test_after_reloading_weights(context):
    net = cnn()
    dense = deepcopy(net.state_dict())
    s = on(net, context=context)
    for _ in range(2):
        s.sparsify_model(90)
        assert zeros(net) == half_up(90, size(net))
        with pytest.warns(UserWarning): net.load_state_dict(dense)
        assert zeros(net) == 0

class ZerosPerBatch(Callback):
    order, run_valid = 66, False
    def before_fit(self): self.n = []
    def after_batch(self): self.n.append(zeros(self.model))

def test_dsd_does_not_alternate():
    dl = DataLoader([(torch.randn(10), torch.randn(2)) for _ in range(80)], bs=4)
    learn, log = Learner(DataLoaders(dl, dl), mlp(10, 20, 2), loss_func=nn.MSELoss()), ZerosPerBatch()
    cb = SparsifyCallback(80, 'weight', 'local', large_final, dsd, layer_type=nn.Linear, update_every=1, verbose=False)
    with learn.no_logging(), learn.no_bar(): learn.fit(2, cbs=[cb, log])
    peak = log.n.index(max(log.n))
    assert log.n[peak] == half_up(80, 240) and log.n[-1] == 0 and len(log.n) == 40
    assert log.n[:peak] == sorted(log.n[:peak]) and log.n[peak:] == sorted(log.n[peak:], reverse=True)

@contexts
def test_layer_granularity_prunes(context):
    assert zeros(sparse(mlp(8, 8, 8), 100, 'layer', context)) == 128
    assert zeros(sparse(mlp(8, 8, 8), 0, 'layer', context)) == 0

def test_layer_granularity_prunes_one_layer():
    net = mlp(8, 8, 8)
    on(net, 'layer', 'global').sparsify_layer(net[0], 100)
    assert [zeros(m) for m in net] == [64, 0]

def test_layer_granularity_prunes_the_weakest_layers():
    net = mlp(*[8]*7)
    for m,scale in zip(net, (6, 1, 5, 2, 4, 3)): m.weight.data *= scale
    sparse(net, 50, 'layer', 'global')
    assert [zeros(m) for m in net] == [0, 64, 0, 64, 0, 64]

def test_layer_granularity_says_why_it_leaves_a_layer():
    s = on(mlp(8, 8, 8), 'layer')
    s.sparsify_model(50)
    assert zeros(s.model) == 0 and all('one group is kept' in note for note in s.report().note)

def test_random_with_global_context():
    net = cnn()
    s = on(net, context='global', criteria=random_criteria)
    drawn = {n: s.scores(n, {}) for n in s.layers}
    s.sparsify_model(50)
    live = torch.cat([get_mask(*s.layers[n]).flatten() for n in drawn])
    scores = torch.cat([d.flatten() for d in drawn.values()])
    assert zeros(net) == half_up(50, size(net)) and scores[~live].max() <= scores[live].min()

@pytest.mark.parametrize('percent', [30, 50, 90])
def test_global_over_groups_counts_weights(percent):
    net = cnn()
    largest = max(m.weight[0].numel() for m in net[::2])
    assert 0 <= percent/100*size(net) - zeros(sparse(net, percent, 'filter', 'global')) < largest

def test_global_over_groups_drops_the_lowest():
    net = cnn()
    w = [m.weight.detach().clone() for m in net[::2]]
    sparse(net, 60, 'filter', 'global')
    scores = torch.cat([x.abs().mean((1,2,3)) for x in w])
    live = torch.cat([m.weight.flatten(1).any(1) for m in net[::2]])
    assert scores[~live].max() < scores[live].min()

def test_sparsify_layer_in_global_context():
    net = mlp(10, 10, 10)
    s = on(net, context='global')
    s.sparsify_layer(net[0], 20)
    s.sparsify_layer('1', 90)
    s.sparsify_layer(net[0], 50)
    assert [zeros(m) for m in net] == [50, 90]

@contexts
@in_a_loop('percent', [20, 50, 90, 99])
@in_a_loop('granularity', Granularities.allowed_granularities(nn.Conv2d(1,1,1)))
def test_round_to_everywhere(granularity, percent, context):
    net = sparse(nn.Sequential(nn.Conv2d(12,24,(5,6))), percent, granularity, context, round_to=4)
    groups = as_groups(net[0].weight, spans(net[0], granularity)).any(1)
    n, kept = len(groups), int(groups.sum())
    n_weights = net[0].weight.numel()
    dropped = min(half_up(percent, n_weights)*n//n_weights, n-1)
    exact = n*(100-percent)/100 if context == 'local' else n - dropped
    assert kept == min(max(math.floor(exact/4 + .5)*4, 4), n)

@contexts
def test_round_to_64_filters_half_keeps_32(context):
    m = sparse(nn.Conv2d(8,64,3), 50, 'filter', context, round_to=8)
    assert m.weight.flatten(1).any(1).sum() == 32

def test_round_to_at_the_edges():
    kept = lambda n, percent, r: int(sparse(nn.Linear(3,n), percent, 'row', round_to=r).weight.any(1).sum())
    assert [kept(64, 100, 8), kept(64, 0, 7), kept(6, 50, 8), kept(64, 99, 8), kept(20, 50, 3)] == [0, 64, 6, 8, 9]

def by_name(*fs): return {f.__name__: f for f in fs}

by_change = by_name(large_init_large_final, magnitude_increase, movement, movmag, updating_magnitude_increase,
    updating_movement, updating_movmag)

@contexts
@pytest.mark.parametrize('criteria', by_change.values(), ids=by_change)
def test_movement_at_the_start(criteria, context):
    assert zeros(sparse(mlp(30, 20, 10), 50, context=context, criteria=criteria)) == 400

all_criteria = by_change | by_name(random_criteria, large_final, squared_final, small_final, large_init, small_init,
    small_init_small_final, wanda, grad_crit)

@contexts
@pytest.mark.parametrize('criteria', all_criteria.values(), ids=all_criteria)
def test_every_criterion_is_exact(criteria, context):
    net, x = cnn(), torch.randn(2, 3, 9, 9)
    s = on(net, context=context, criteria=criteria, data=x)
    for percent in (30, 75, 99):
        with torch.no_grad(): net[2].weight += .1*torch.randn_like(net[2].weight)
        apply_masks(net)
        net(x).square().sum().backward()
        s.sparsify_model(percent)
        assert zeros(net) == half_up(percent, size(net))

@contexts
@pytest.mark.parametrize('reducer', [Reducer.sum, Reducer.mean, Reducer.max, Reducer.l2])
@pytest.mark.parametrize('normalizer', [None, Normalizer.sum, Normalizer.mean, Normalizer.max,
    Normalizer.standardization, Normalizer.gaussian])
def test_reducers_and_normalizers(reducer, normalizer, context):
    net = sparse(mlp(16, 24, 16), 50, 'row', context, Criteria(large_final, reducer, normalizer))
    assert abs(zeros(net) - 384) < (24 if context=='global' else 1)

@contexts
@pytest.mark.parametrize('f', [lambda p, init, **kw: (p-init).abs(), lambda p: p.abs(),
    partial(lambda p, power, **kw: p.abs()**power, power=3)], ids=['state', 'one argument', 'partial'])
def test_plain_functions_are_criteria(f, context):
    assert zeros(sparse(mlp(30, 20, 10), 50, context=context, criteria=f)) == 400

@pytest.mark.parametrize('copy', [deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=['deepcopy', 'pickle'])
@pytest.mark.parametrize('granularity', ['weight', 'kernel', 'filter'])
def test_copies_keep_counts_and_masks(granularity, copy):
    net = sparse(cnn(), 60, granularity)
    again, n = copy(net), zeros(net)
    for p in again.parameters(): p.data += 1
    apply_masks(again)
    assert zeros(again) == n == zeros(net)
    assert zeros(sparse(again, 80, granularity)) > n == zeros(net)

@pytest.mark.parametrize('granularity', ['weight', 'kernel', 'filter'])
def test_state_dict_keeps_counts_and_masks(granularity):
    net, other = sparse(cnn(), 60, granularity), sparse(cnn(), 90, granularity)
    assert list(net.state_dict()) == list(cnn().state_dict())
    with pytest.warns(UserWarning): other.load_state_dict(net.state_dict())
    assert zeros(other) == zeros(net)
    assert all(torch.equal(a, b) for (*_,a),(*_,b) in zip(masked_params(net), masked_params(other)))
    cnn().load_state_dict(net.state_dict(), strict=True)

@pytest.mark.parametrize('percent', [1.005, 100-1e-9, 33.333333333, 99.99])
def test_counts_are_rounded_from_the_decimal(percent):
    assert zeros(sparse(mlp(100, 100), percent)) == min(half_up(percent, 10_000), 9_999)

@contexts
@pytest.mark.parametrize('percent', [90, 99, 99.9])
def test_no_layer_is_emptied(percent, context):
    net = mlp(4, 4, 4, 4, 4, 4, 4)
    for i,m in enumerate(net): m.weight.data *= 10.**i
    sparse(net, percent, context=context)
    assert all(m.weight.any() for m in net)
    assert zeros(net) == min(half_up(percent, 96), 90)

def test_only_a_layer_that_was_spared_is_called_so():
    net = mlp(4, 4, 4)
    for m,rows in zip(net, ([1.,2,3,200], [50.,51,52,53])): m.weight.data.copy_(torch.tensor(rows)[:,None].expand(4, 4))
    s = on(net, 'row', 'global')
    s.sparsify_model(37.5)
    assert zeros(net[0]) == 12 and not any('not empty' in note for note in s.report().note)   # its best is best of all
    net[1].weight.data += 1000
    s.sparsify_model(50)
    assert zeros(net[0]) == 12 and 'not empty' in s.report().note[0]

@contexts
def test_only_100_percent_empties(context):
    assert zeros(sparse(mlp(4, 4, 4), 100, context=context)) == 32
    assert zeros(sparse(cnn(), 100, 'filter', context)) == size(cnn())

def test_dict_by_name_and_module():
    net = mlp(10, 10, 10, 10)
    on(net).sparsify_model({'0': 30, net[2]: 100})
    assert [zeros(m) for m in net] == [30, 0, 100]

def test_a_function_as_context():
    first_dense = lambda params, model_sparsity, **kwargs: [0] + [model_sparsity]*(len(params)-1)
    assert [zeros(m) for m in sparse(mlp(10, 10, 10), 70, context=first_dense)] == [0, 70]

# Every granularity of every layer type: what it spans, by the letters of out, in, depth, height, width
conv_spans = dict(weight='', shared_weight='o', channel='i', column='h', row='w', vector='w', kernel='dhw',
    filter='idhw', shared_channel='oi', shared_column='oh', shared_row='ow', vertical_slice='ih', horizontal_slice='iw',
    shared_vertical_slice='oih', shared_horizontal_slice='oiw', shared_kernel='odhw', layer='oidhw')
names_1d = 'weight shared_weight channel vector kernel filter shared_channel shared_kernel layer'
conv1d_spans = {k: conv_spans[k] for k in names_1d.split()}
matrix_spans = dict(weight='', column='o', row='i', layer='oi')
axes = {nn.Conv1d: 'oiw', nn.Conv2d: 'oihw', nn.Conv3d: 'oidhw', nn.ConvTranspose1d: 'iow', nn.ConvTranspose2d: 'iohw',
    nn.ConvTranspose3d: 'iodhw'}

def Conv1D(): return pytest.importorskip('transformers.pytorch_utils').Conv1D(12, 8)

makers = {
    'Conv1d': lambda: nn.Conv1d(4,8,3), 'Conv1d grouped': lambda: nn.Conv1d(4,8,3,groups=2),
    'Conv2d': lambda: nn.Conv2d(6,8,(3,2)), 'Conv2d grouped': lambda: nn.Conv2d(6,9,(3,2),groups=3),
    'Conv2d depthwise': lambda: nn.Conv2d(8,8,3,groups=8), 'Conv3d': lambda: nn.Conv3d(3,4,(2,3,2)),
    'ConvTranspose1d': lambda: nn.ConvTranspose1d(4,6,3), 'ConvTranspose2d': lambda: nn.ConvTranspose2d(4,6,(3,2)),
    'ConvTranspose2d grouped': lambda: nn.ConvTranspose2d(4,6,(3,2),groups=2),
    'ConvTranspose3d': lambda: nn.ConvTranspose3d(3,4,(2,3,2)),
    'Linear': lambda: nn.Linear(12,10), 'Embedding': lambda: nn.Embedding(10,12),
    'EmbeddingBag': lambda: nn.EmbeddingBag(10,12), 'RNN': lambda: nn.RNN(6,8),
    'LSTM': lambda: nn.LSTM(6,8,num_layers=2,bidirectional=True),
    'LSTM projected': lambda: nn.LSTM(6,8,proj_size=4), 'GRU': lambda: nn.GRU(6,8),
    'LSTMCell': lambda: nn.LSTMCell(6,8), 'MultiheadAttention': lambda: nn.MultiheadAttention(8,2),
    'MultiheadAttention q k v': lambda: nn.MultiheadAttention(8,2,kdim=6,vdim=4), 'Conv1D': Conv1D}

def names_of(kind):
    if '1d' in kind: return conv1d_spans
    return conv_spans if '2d' in kind or '3d' in kind else matrix_spans

def spans(m, granularity):
    order = 'io' if type(m).__name__=='Conv1D' else axes.get(type(m), 'oi')
    return [order.index(a) for a in (conv_spans if type(m) in axes else matrix_spans)[granularity] if a in order]

def as_groups(w, dims):
    "`w` as groups x weights of a group"
    w, others = w.detach(), [d for d in range(w.dim()) if d not in dims]
    return w.permute(*others, *dims).reshape(math.prod(w.shape[d] for d in others), -1)

def own_weights(m): return [p for p in m.parameters(recurse=False) if p.dim() > 1]

@pytest.mark.parametrize('kind', makers)
def test_the_granularities_of_each_layer_type(kind):
    assert set(Granularities.allowed_granularities(makers[kind]())) == set(names_of(kind))

@contexts
@pytest.mark.parametrize('percent', [0, 50, 87.5, 100])
@in_a_loop('kind,granularity', ((k, g) for k in makers for g in names_of(k)))
def test_every_granularity(kind, granularity, context, percent):
    m = makers[kind]()
    before = [as_groups(w, spans(m, granularity)).abs() for w in own_weights(m)]
    sparse(nn.ModuleList([m]), percent, granularity, context, layer_type=type(m))
    live = [as_groups(w, spans(m, granularity)) != 0 for w in own_weights(m)]
    for b,l in zip(before, live):
        assert (l.any(1) == l.all(1)).all(), 'groups are whole'
        if l.any() and not l.all(): assert b.mean(1)[~l.any(1)].max() <= b.mean(1)[l.any(1)].min(), 'the lowest fall'
    check_counts(live, percent, context)

def check_counts(live, percent, context):
    dropped, groups, sizes = [int((~l.any(1)).sum()) for l in live], [len(l) for l in live], [l.shape[1] for l in live]
    total, n = sum(d*s for d,s in zip(dropped, sizes)), sum(g*s for g,s in zip(groups, sizes))
    if percent in (0, 100): assert total == n*percent/100
    elif max(sizes) == 1: assert total == half_up(percent, n)
    elif context == 'local': assert dropped == [min(half_up(percent, g), g-1) for g in groups]
    else:
        floor = 0 if max(groups) == 1 else sum(sizes)
        assert 0 <= min(half_up(percent, n), n-floor) - total < max(sizes)
        assert floor == 0 or all(d < g for d,g in zip(dropped, groups))
