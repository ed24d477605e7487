"Layers of all types: groups of weights, tied weights, N:M patterns, blocks and FLOPs; fasterai's defects among them"
import re
from functools import partial

import pytest, torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm

from fasterai_sparse.core.criteria import Criteria, large_final, Normalizer, Reducer, wanda
from fasterai_sparse.core.input_norms import input_norms, squared_input
from fasterai_sparse.core.granularity import Granularities
from fasterai_sparse.core.layers import group_weights, out_in_axes
from fasterai_sparse.core.masks import get_mask, masked_params
from fasterai_sparse.core.patterns import block
from fasterai_sparse.core.report import sparsity_report
from fasterai_sparse.core.select import top_k_mask
from fasterai_sparse.core.sparsifier import Sparsifier

contexts = pytest.mark.parametrize('context', ['local', 'global'])

def zeros(w): return int((w==0).sum())
def sparsifier(model, granularity='weight', context='local', criteria=large_final, layer_type=None, **kwargs):
    return Sparsifier(model, granularity, context, criteria, layer_type=layer_type, **kwargs)
def sparse(model, percent, *args, **kwargs):
    sparsifier(model, *args, **kwargs).sparsify_model(percent)
    return model
def live_channels(t): return t.transpose(0, 1).flatten(1).any(1)

# Layer types

images = {1: (11,), 2: (9,8), 3: (5,6,7)}
convs = {'Conv1d': nn.Conv1d, 'Conv2d': nn.Conv2d, 'Conv3d': nn.Conv3d,
         'ConvTranspose1d': nn.ConvTranspose1d, 'ConvTranspose2d': nn.ConvTranspose2d,
         'ConvTranspose3d': nn.ConvTranspose3d}
batchnorm = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}

@pytest.mark.parametrize('groups', [1, 2, 4])
@pytest.mark.parametrize('conv', convs.values(), ids=convs)
def test_dropped_filters_are_silent_channels(conv, groups):
    d = int(conv.__name__[-2])
    net = nn.Sequential(conv(4, 16, 3, groups=groups), nn.ReLU(), batchnorm[d](16))
    nn.init.constant_(net[2].bias, .5)
    sparse(net, 50, 'filter')
    for training in (True, False):
        assert live_channels(net.train(training)(torch.randn(2, 4, *images[d]))).sum() == 8
    assert zeros(net[0].weight)*2 == net[0].weight.numel()
    assert zeros(net[0].bias) == zeros(net[2].weight) == zeros(net[2].bias) == 8

def test_grouped_transposed_filters():
    m = nn.ConvTranspose2d(6, 12, 3, groups=3)
    scores = m.weight.detach().abs().mean((0,2,3))
    sparse(m, 50, 'filter')
    dropped = scores.argsort()[:2]
    assert zeros(m.weight[:,dropped]) == m.weight[:,dropped].numel() and zeros(m.weight) == m.weight.numel()//2
    assert m.bias.view(3, 4)[:,dropped].abs().sum() == 0 and zeros(m.bias) == 6

def test_sparsify_batchnorm_of_grouped_transposed_filters():
    m, bn = nn.ConvTranspose2d(4, 8, 3, groups=2), nn.BatchNorm2d(8)
    s = sparsifier(m, 'filter')
    s.sparsify_model(50)
    s.sparsify_batchnorm(m, bn)
    assert torch.equal(bn.weight != 0, m.bias != 0) and zeros(bn.weight) == 4

def test_sparsify_batchnorm_by_hand():
    m, bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
    s = sparsifier(m, 'filter')
    s.sparsify_batchnorm(m, bn)
    assert get_mask(bn) is None
    s.sparsify_model(25)
    s.sparsify_batchnorm(m, bn)
    assert torch.equal(get_mask(bn), m.weight.flatten(1).any(1)) and torch.equal(get_mask(bn, 'bias'), get_mask(bn))

@pytest.mark.parametrize('make', [nn.Conv2d, nn.ConvTranspose2d])
@pytest.mark.parametrize('affine', [True, False])
def test_batchnorm_without_affine(make, affine):
    net = nn.Sequential(make(3, 8, 3), nn.BatchNorm2d(8, affine=affine))
    s = sparsifier(net, 'filter')
    s.sparsify_model(50)
    s.sparsify_batchnorm(net[0], net[1])
    assert live_channels(net(torch.randn(2,3,9,9))).sum() == 4

class Registered(nn.Module):
    "Convolutions are registered before the BatchNorms, and each BatchNorm follows the other convolution"
    def __init__(self):
        super().__init__()
        self.c1, self.c2, self.b1, self.b2 = nn.Conv2d(3,8,3), nn.Conv2d(8,8,3), nn.BatchNorm2d(8), nn.BatchNorm2d(8)
    def forward(self, x): return self.b1(self.c2(F.relu(self.b2(self.c1(x)))))

def test_order_c1_c2_b1_b2():
    net = sparse(Registered(), {'c1': 25, 'c2': 75}, 'filter')
    assert torch.equal(get_mask(net.b2), get_mask(net.c1, 'bias'))
    assert torch.equal(get_mask(net.b1), get_mask(net.c2, 'bias'))
    assert (zeros(net.b2.weight), zeros(net.b1.weight)) == (2, 6)

def bn_after(between):
    class Net(nn.Module):
        def __init__(self): super().__init__(); self.conv, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        def forward(self, x): return self.bn(between(self.conv(x)))
    net = Net()
    nn.init.constant_(net.bn.bias, .5)
    return sparse(net, 50, 'filter')

@pytest.mark.parametrize('between', [lambda x: x, F.relu, torch.relu, lambda x: x.relu(), F.gelu],
                         ids=['nothing', 'F.relu', 'torch.relu', 'x.relu', 'F.gelu'])
def test_batchnorm_after_a_functional_activation(between):
    assert live_channels(bn_after(between).eval()(torch.randn(2,3,9,9))).sum() == 4

@pytest.mark.parametrize('between', [lambda x: x.flip(1), lambda x: x + x.flip(1), lambda x: x.roll(1, 1)],
    ids=['flip', 'sum', 'roll'])
def test_batchnorm_of_other_channels_is_left(between): assert get_mask(bn_after(between).bn) is None

def test_both_batchnorms_of_a_convolution_that_is_used_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.b1, self.b2 = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        def forward(self, x): return self.b1(self.conv(x)) + self.b2(self.conv(x.flip(2)))
    net = sparse(Twice(), 50, 'filter')
    assert torch.equal(get_mask(net.b1), get_mask(net.b2)) and zeros(net.b1.weight) == 4

def test_a_batchnorm_of_two_convolutions_belongs_to_neither():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.c1, self.c2, self.bn = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        def forward(self, x): return self.bn(self.c1(x)) + self.bn(self.c2(x))
    assert get_mask(sparse(Shared(), 50, 'filter').bn) is None

def test_linear_rows_take_bias_and_batchnorm():
    net = sparse(nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4)), {'0': 50}, 'row')
    assert live_channels(net[:2](torch.randn(5, 6))).sum() == 4 and zeros(net[3].weight) == 0

@pytest.mark.parametrize('granularity', ['weight', 'kernel', 'channel', 'shared_kernel', 'layer'])
def test_bias_and_batchnorm_stay_unless_filters_fall(granularity):
    net = sparse(nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8)), 50, granularity)
    assert get_mask(net[0], 'bias') is None and get_mask(net[1]) is None

@pytest.mark.parametrize('make', [lambda: nn.Embedding(12, 8), lambda: nn.EmbeddingBag(12, 8)],
    ids=['Embedding', 'EmbeddingBag'])
@pytest.mark.parametrize('granularity,dim', [('row', 1), ('column', 0)])
def test_embedding(make, granularity, dim):
    m = sparse(make(), 25, granularity)
    assert zeros(m.weight) == 24 and m.weight.any(dim).sum() == m.weight.shape[1-dim]*3//4
    assert m(torch.randint(12, (2,3))).isfinite().all()

@contexts
@pytest.mark.parametrize('make', [nn.RNN, nn.LSTM, nn.GRU])
def test_rnn_weights(make, context):
    net = sparse(make(6, 8, num_layers=2), 50, context=context)
    assert sum(zeros(p) for p in net.parameters()) * 2 == sum(p.numel() for p in net.parameters() if p.dim()==2)
    names = ['weight_ih_l0', 'weight_hh_l0', 'weight_ih_l1', 'weight_hh_l1']
    assert [n for _,n,*_ in masked_params(net)] == names
    net(torch.randn(3, 2, 6))[0].sum().backward()
    assert all(getattr(net, n).grad.isfinite().all() for n in names)

def test_rnn_computes_with_its_zeros():
    net, x = nn.LSTM(6, 8), torch.randn(3, 2, 6)
    sparse(net, 100)
    assert torch.equal(net(x)[0], net(torch.zeros_like(x))[0])

def test_a_recurrent_layer_by_name():
    net = nn.ModuleDict(dict(rnn=nn.GRU(6, 8), head=nn.Linear(8, 2)))
    sparse(net, {'rnn': 50, 'head': 25})
    assert [zeros(net.rnn.weight_ih_l0), zeros(net.rnn.weight_hh_l0), zeros(net.head.weight)] == [72, 96, 4]
    sparse(net, {'rnn.weight_hh_l0': 75})
    assert [zeros(net.rnn.weight_ih_l0), zeros(net.rnn.weight_hh_l0)] == [72, 144]

def test_multihead_attention_in_proj_weight():
    m, x = nn.MultiheadAttention(8, 2), torch.randn(5, 3, 8)
    sparse(m, 50)
    assert zeros(m.in_proj_weight) == 96 and zeros(m.out_proj.weight) == 32
    assert get_mask(m, 'in_proj_weight').shape == (24, 8)
    assert m(x, x, x)[0].isfinite().all()

def test_multihead_attention_with_own_key_and_value_sizes():
    m = sparse(nn.MultiheadAttention(8, 2, kdim=4, vdim=6), 50, layer_type=nn.MultiheadAttention)
    assert [zeros(w) for w in (m.q_proj_weight, m.k_proj_weight, m.v_proj_weight, m.out_proj.weight)] == [32, 16, 24, 0]

def test_conv1d_has_not_the_granularities_of_linear():
    with pytest.raises(ValueError, match="'row'.*Conv1d.*'filter'"): sparsifier(nn.Conv1d(4, 8, 3), 'row')

def Conv1D(n_out=12, n_in=8):
    m = pytest.importorskip('transformers.pytorch_utils').Conv1D(n_out, n_in)
    nn.init.constant_(m.bias, .5)
    return m

def test_transformers_conv1d_rows_are_outputs():
    m = sparse(Conv1D(), 50, 'row')
    assert m.weight.any(0).sum() == 6 and m.weight.any(1).all()
    assert m(torch.randn(20, 8)).any(0).sum() == 6, 'the bias falls too'

def test_transformers_conv1d_rows_survive_a_reload():
    m = sparse(Conv1D(8, 8), 50, 'row')
    live = get_mask(m).clone()
    m.bias.data.zero_()
    m.load_state_dict({n: v.clone() for n,v in m.state_dict().items()})
    assert torch.equal(get_mask(m), live) and torch.equal(get_mask(m, 'bias'), live[0])

def test_transformers_conv1d_columns_are_inputs():
    m, x = sparse(Conv1D(), 50, 'column'), torch.randn(20, 8)
    live = m.weight.any(1)
    assert live.sum() == 4 and torch.allclose(m(x), m(x*live), atol=1e-6)

# Tied and shared

class LM(nn.Module):
    "A language model whose output weights are tied to the embedding"
    def __init__(self):
        super().__init__()
        self.emb, self.mid, self.out = nn.Embedding(10, 4), nn.Linear(4, 4), nn.Linear(4, 10, bias=False)
        self.out.weight = self.emb.weight
    def forward(self, x): return self.out(self.mid(self.emb(x)))

@contexts
def test_tied_weights_count_once(context):
    net = LM()
    s = sparsifier(net, context=context)
    s.sparsify_model(50)
    assert s.report().params.sum() == 56
    assert s.report().zeros.sum() == 28 == zeros(net.emb.weight) + zeros(net.mid.weight)
    assert net.out.weight is net.emb.weight and len(list(masked_params(net))) == 2

def test_a_tied_weight_by_its_other_layer():
    net = sparse(LM(), 50, layer_type=nn.Linear)
    assert zeros(net.out.weight) + zeros(net.mid.weight) == 28 and zeros(net.out.weight) == 20
    s = sparsifier(net)
    s.sparsify_layer(net.out, 75)
    assert zeros(net.emb.weight) == 30

def test_a_layer_that_is_used_twice_has_one_mask():
    m = nn.Linear(8, 8)
    net = sparse(nn.Sequential(m, nn.ReLU(), m), 50)
    assert zeros(m.weight) == 32 and sparsity_report(net).params.sum() == 64

# Inputs of the weights (Wanda)

@pytest.mark.parametrize('kw', [dict(groups=2), dict(groups=4), dict(groups=2, stride=2, padding=1), dict(dilation=2),
    dict(padding='same'),
                                dict(padding=1, padding_mode='circular')], ids=str)
def test_wanda_on_grouped_conv(kw):
    m, x = nn.Conv2d(4, 8, 3, bias=False, **kw), torch.randn(2, 4, 9, 8)
    norms = squared_input(m, x).expand(m.weight.shape)
    for o,i,h,w in [(0,0,0,0), (7,0,1,2), (3,-1,2,1)]:
        m.weight.data.zero_()
        m.weight.data[o,i,h,w] = 1
        assert torch.allclose(m(x).square().sum(), norms[o,i,h,w], rtol=1e-4)
    nn.init.normal_(m.weight)
    assert zeros(sparse(m, 50, criteria=wanda, data=x).weight)*2 == m.weight.numel()

def test_wanda_on_B_T_C():
    m, x = nn.Linear(8, 6), torch.randn(4, 5, 8)
    w = m.weight.detach().clone()
    sparse(m, 50, criteria=wanda, data=x)
    scores = w.abs()*x.flatten(0,1).norm(dim=0)
    assert torch.equal(get_mask(m), top_k_mask(scores, 24)) and zeros(m.weight) == 24

def test_wanda_on_conv1d_and_transformers_conv1d():
    m, x = nn.Conv1d(4, 6, 3, stride=2), torch.randn(2, 4, 11)
    norms = torch.stack([x[...,k:k+9:2].square().sum((0,2)) for k in range(3)], 1).sqrt()
    assert torch.allclose(squared_input(m, x).sqrt(), norms.expand(6, 4, 3), rtol=1e-4)
    assert torch.allclose(squared_input(Conv1D(), torch.full((2,3,8), 2.)), torch.full((8,1), 24.))

def test_wanda_on_transposed_conv():
    m, x = nn.ConvTranspose2d(4, 6, 3, groups=2, bias=False), torch.randn(2, 4, 5, 5)
    norms = squared_input(m, x).expand(m.weight.shape)
    m.weight.data.zero_()
    m.weight.data[3,1,2,0] = 1
    assert torch.allclose(m(x).square().sum(), norms[3,1,2,0], rtol=1e-4)

def test_wanda_on_embeddings():
    tokens, n = torch.tensor([[0,1],[1,4]]), torch.tensor([[1.],[2],[0],[0],[1]])
    for m in (nn.Embedding(5, 2), nn.EmbeddingBag(5, 2)): assert torch.equal(squared_input(m, tokens), n)

@pytest.mark.parametrize('make', [nn.LSTM, lambda a,b: nn.MultiheadAttention(a, 2)], ids=['LSTM', 'MultiheadAttention'])
def test_wanda_where_a_layer_has_many_weights_is_refused(make):
    class Net(nn.Module):
        def __init__(self): super().__init__(); self.layer = make(8, 8)
        def forward(self, x): return self.layer(x) if isinstance(self.layer, nn.LSTM) else self.layer(x, x, x)
    with pytest.raises(ValueError, match='LSTM|MultiheadAttention|layer'):
        sparse(Net(), 50, criteria=wanda, data=torch.randn(3, 4, 8))

def test_wanda_of_a_layer_that_no_batch_reaches():
    class Net(nn.Module):
        def __init__(self): super().__init__(); self.used, self.unused = nn.Linear(8, 8), nn.Linear(8, 8)
        def forward(self, x): return self.used(x)
    with pytest.raises(ValueError, match='unused'): sparse(Net(), 50, criteria=wanda, data=torch.randn(3, 8))

@pytest.mark.parametrize('data', [[], iter([])], ids=['list', 'iterator'])
def test_wanda_without_a_batch(data):
    with pytest.raises(ValueError, match='data'): sparse(nn.Linear(8, 8), 50, criteria=wanda, data=data)

def test_wanda_on_batches_of_inputs_and_targets():
    x, y, masks = torch.randn(6, 8), torch.randn(6, 3), []
    for data in (x, (x, y), [(x[:2], y[:2]), (x[2:], y[2:])], [x[:4], x[4:]]):
        torch.manual_seed(0)
        masks.append(get_mask(sparse(nn.Linear(8, 4), 50, criteria=wanda, data=data)))
    assert all(torch.equal(m, masks[0]) for m in masks)

def test_wanda_leaves_the_model_as_it_was():
    net, x = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 4)).train(), torch.randn(5, 8)
    net[2].eval()
    state = {n: v.clone() for n,v in net.state_dict().items()}
    for data in (x, x[:,:7]):   # the second fails on the way
        try: input_norms(net, data, {'0': net[0], '3': net[3]})
        except RuntimeError: pass
        assert [m.training for m in net] == [True, True, False, True] and not any(m._forward_pre_hooks for m in net)
    assert all(torch.equal(v, state[n]) for n,v in net.state_dict().items())

# N:M

def per_group(m, group=4, name='weight'):
    "Number of weights kept in each N:M group along the inputs"
    groups = getattr(m, name).movedim(out_in_axes(m)[1], -1).unflatten(-1, (-1, group))
    return set((groups != 0).sum(-1).flatten().tolist())

nm_layers = {'Linear': lambda: nn.Linear(16, 6), 'Conv1d': lambda: nn.Conv1d(8, 6, 3),
    'Conv2d': lambda: nn.Conv2d(8, 6, 3), 'Conv2d grouped': lambda: nn.Conv2d(16, 6, 3, groups=2),
    'Conv3d': lambda: nn.Conv3d(8, 3, 2), 'ConvTranspose2d': lambda: nn.ConvTranspose2d(8, 6, 3),
    'Embedding': lambda: nn.Embedding(5, 8), 'Conv1D': Conv1D}

@pytest.mark.parametrize('nm,percent,n,m', [(True, 50, 2, 4), ((1,4), 75, 1, 4), ((4,8), 50, 4, 8)])
@pytest.mark.parametrize('ties', [False, True])
@pytest.mark.parametrize('make', nm_layers.values(), ids=nm_layers)
def test_nm_on_ties_and_every_layer(make, ties, nm, percent, n, m):
    layer = make()
    if ties: nn.init.constant_(layer.weight, .5)
    sparse(layer, percent, nm=nm)
    assert per_group(layer, m) == {n} and zeros(layer.weight) == layer.weight.numel()*percent//100

@pytest.mark.parametrize('make', nm_layers.values(), ids=nm_layers)
def test_nm_keeps_the_largest_of_each_group(make):
    layer = make()
    axis = out_in_axes(layer)[1]
    groups = layer.weight.detach().abs().movedim(axis, -1).unflatten(-1, (-1, 4))
    sparse(layer, 50, nm=True)
    kept = get_mask(layer).movedim(axis, -1).unflatten(-1, (-1, 4))
    assert torch.equal((groups*kept).sum(-1), groups.topk(2, -1).values.sum(-1))

@pytest.mark.parametrize('m', [4, 32])
def test_nm_ties_go_to_the_first_of_each_group(m):
    layer = nn.Linear(64, 3)
    nn.init.constant_(layer.weight, .5)
    sparse(layer, 50, nm=(m//2, m))
    assert torch.equal(get_mask(layer), (torch.arange(64) % m < m//2).expand(3, 64))

def test_nm_on_recurrent_and_attention_weights():
    rnn = sparse(nn.GRU(8, 12), 50, nm=True)
    attention = sparse(nn.MultiheadAttention(8, 2), 50, nm=True, layer_type=nn.MultiheadAttention)
    for m,name in ((rnn,'weight_ih_l0'), (rnn,'weight_hh_l0'), (attention,'in_proj_weight')):
        assert set((getattr(m, name).unflatten(1, (-1,4)) != 0).sum(-1).flatten().tolist()) == {2}

def test_nm_leaves_what_does_not_fit_with_its_reason():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3, groups=8))
    s = sparsifier(net, nm=True)
    s.sparsify_model(50)
    assert [zeros(m.weight) for m in net] == [0, 288, 0]
    assert ['no multiple of 4' in note for note in s.report().note] == [True, False, True]

def test_nm_of_a_layer_that_does_not_fit_by_name():
    net = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8))
    with pytest.raises(ValueError, match="'0'.*no multiple of 4"): sparse(net, {'0': 50, '1': 50}, nm=True)
    assert zeros(net[1].weight) == 0

@pytest.mark.parametrize('make', [nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Linear(6, 4)])
def test_nm_where_nothing_fits(make):
    with pytest.raises(ValueError, match='no multiple of 4'): sparsifier(make, nm=True)

@pytest.mark.parametrize('kw', [dict(granularity='filter'), dict(granularity=block(4,1))])
def test_nm_is_a_pattern_of_single_weights(kw):
    with pytest.raises(ValueError, match="granularity='weight'"): sparsifier(nn.Linear(8, 8), nm=True, **kw)

@pytest.mark.parametrize('nm,percent', [(True, 50.1), (True, 100), ((1,4), 80)])
def test_nm_past_its_reach(nm, percent):
    m = nn.Linear(8, 8)
    with pytest.raises(ValueError, match='at most'): sparsifier(m, nm=nm).sparsify_model(percent)
    assert zeros(m.weight) == 0 and get_mask(m) is None

@pytest.mark.parametrize('path', [(50, 25, 50), (10, 40, 20, 50), (30, 0, 50)])
def test_nm_is_whole_after_lowering_and_raising(path):
    m = nn.Linear(64, 32)
    s = sparsifier(m, nm=True)
    for percent in path:
        s.sparsify_model(percent)
        assert abs(zeros(m.weight) - percent/100*2048) <= 2
    assert per_group(m) == {2}

@pytest.mark.parametrize('percent', [5, 30, 45])
def test_nm_on_a_model_that_is_sparse_already(percent):
    m = sparse(nn.Linear(64, 32), percent)
    sparse(m, 50, nm=True)
    assert max(per_group(m)) <= 2

def test_nm_round_to():
    with pytest.raises(ValueError, match='round_to'):
        sparsifier(nn.Linear(8, 8), nm=True).sparsify_model(50, round_to=8)

# Blocks

block_layers = {'Conv1d': lambda: nn.Conv1d(4, 8, 3), 'Conv2d': lambda: nn.Conv2d(4, 8, 3),
    'Conv2d grouped': lambda: nn.Conv2d(8, 8, 3, groups=2),
    'Conv3d': lambda: nn.Conv3d(2, 8, 2), 'ConvTranspose1d': lambda: nn.ConvTranspose1d(4, 8, 3),
    'ConvTranspose2d': lambda: nn.ConvTranspose2d(4, 8, (3,2)),
    'Linear': lambda: nn.Linear(12, 8), 'Embedding': lambda: nn.Embedding(8, 12), 'Conv1D': lambda: Conv1D(8, 12)}

def blocks(m, rows, cols, w=None):
    "The weight as blocks: rows of blocks x columns of blocks x weights of a block"
    w = (m.weight.detach() if w is None else w).movedim(out_in_axes(m)[0], 0).flatten(1)
    return w.unflatten(1, (-1, cols)).unflatten(0, (-1, rows)).transpose(1, 2).flatten(2)

@contexts
@pytest.mark.parametrize('rows,cols', [(4,1), (1,4), (2,2), (8,4), (2,1)])
@pytest.mark.parametrize('make', block_layers.values(), ids=block_layers)
def test_blocks_are_whole_and_the_weakest_fall(make, rows, cols, context):
    m = make()
    scores = blocks(m, rows, cols).abs().mean(-1)
    sparse(m, 50, block(rows, cols), context)
    live = blocks(m, rows, cols) != 0
    n, n_dropped = live[...,0].numel(), int((~live[...,0]).sum())
    assert torch.equal(live.all(-1), live.any(-1)) and n_dropped in {n//2, (n+1)//2}
    assert scores[~live.any(-1)].max() < scores[live.any(-1)].min()

def test_blocks_that_do_not_fit():
    net = nn.Sequential(nn.Linear(12, 10), nn.Linear(10, 8))
    s = sparsifier(net, block(4,1))
    s.sparsify_model(50)
    assert [zeros(m.weight) for m in net] == [0, 40] and 'no multiple of the block 4 x 1' in s.report().note[0]
    with pytest.raises(ValueError, match='no multiple of the block 3 x 7'): sparsifier(net, block(3,7))

@pytest.mark.parametrize('rows,cols', [(0,1), (1,-1), (2.,1), (None,1)])
def test_bad_blocks(rows, cols):
    with pytest.raises(ValueError, match='positive whole'): block(rows, cols)

def test_blocks_round_to():
    m = nn.Linear(16, 64)
    sparsifier(m, block(4,4)).sparsify_model(60, round_to=8)
    assert blocks(m, 4, 4).any(-1).sum() == 24   # of 64, 25.6 are due

# Criteria and arguments

def test_criteria_noop_leaves_weights():
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    before = [m.weight.detach().clone() for m in net]
    for normalizer in (None, Normalizer.gaussian, Normalizer.standardization, Normalizer.sum):
        for m in net: Criteria(lambda p: p, Reducer.sum, normalizer)(m.weight)
        s = sparsifier(net, 'row', criteria=Criteria(lambda p, **kwargs: p, normalizer=normalizer))
        for n in s.layers: s.scores(n, {})
    assert all(torch.equal(m.weight, w) for m,w in zip(net, before))

bad_arguments = [dict(granularity='filters'), dict(granularity=3), dict(granularity=None),
    dict(granularity=('weight','filter')),
    dict(context='gloal'), dict(context=None), dict(context=3),
    dict(criteria='magnitude'), dict(criteria=None), dict(criteria=3),
    dict(nm=3), dict(nm='2:4'), dict(nm=(4,2)), dict(nm=(2,4,8)), dict(nm=None), dict(nm=(2.,4)),
    dict(layer_type='Linear'), dict(layer_type=3), dict(layer_type=nn.Linear(2,2)), dict(layer_type=nn.Conv2d),
    dict(layer_type=nn.ReLU)]

@pytest.mark.parametrize('bad', bad_arguments, ids=str)
def test_bad_arguments_fail_at_construction(bad):
    (name, value), = bad.items()
    shown = getattr(value, '__name__', str(value)) if isinstance(value, type) else str(value)
    shown = '4:2' if value == (4,2) else '2.0:4' if value == (2.,4) else shown
    with pytest.raises((ValueError, TypeError), match=re.escape(shown)):
        sparsifier(nn.Sequential(nn.Linear(8, 8)), **bad)

@pytest.mark.parametrize('criteria', [lambda p, hessian: p, lambda p, w0, **kw: p,
    partial(lambda p, power, **kw: p**power)])
def test_criteria_that_ask_for_unknown_state(criteria):
    with pytest.raises(ValueError, match="asks for.*'init', 'prev', 'grad', 'opt', 'data', 'generator'"):
        sparsifier(nn.Linear(8, 8), criteria=criteria)

def test_wanda_without_data():
    with pytest.raises(ValueError, match="'wanda' needs data="): sparsifier(nn.Linear(8, 8), criteria=wanda)

@pytest.mark.parametrize('bad', [{}, None, {'pair': 'rows'}, {'pair': 0.5}, {'pair': -1}])
def test_bad_granularities_are_refused(bad, monkeypatch):
    monkeypatch.setattr(Granularities, '_dims', dict(Granularities._dims))
    with pytest.raises(ValueError): Granularities.add_granularity(nn.Bilinear, bad)

def test_a_granularity_of_one_s_own(monkeypatch):
    monkeypatch.setattr(Granularities, '_dims', dict(Granularities._dims))
    Granularities.add_granularity(nn.Bilinear, {'slice': (2,3)})
    m = sparse(nn.Bilinear(4, 5, 6), 50, 'slice')
    assert m.weight.flatten(1).any(1).sum() == 3 and 'slice' in Granularities.available_granularities()[nn.Bilinear]
    monkeypatch.undo()
    with pytest.raises(ValueError, match='No granularities for Bilinear'): group_weights(m, 'slice')

def test_a_granularity_of_dimensions_that_are_not_there(monkeypatch):
    monkeypatch.setattr(Granularities, '_dims', dict(Granularities._dims))
    Granularities.add_granularity(nn.Bilinear, {'far': 4})
    with pytest.raises(ValueError, match="'far'"): sparsifier(nn.Bilinear(4, 5, 6), 'far')

def test_subclasses_have_the_granularities_of_their_base():
    class MyConv(nn.Conv2d): pass
    net = sparse(nn.Sequential(MyConv(3, 8, 3), nn.BatchNorm2d(8)), 50, 'filter', layer_type=nn.Conv2d)
    assert zeros(net[0].weight)*2 == net[0].weight.numel() and zeros(net[1].weight) == 4

# FLOPs: twice the weights times the positions each is used at

flops = {
    'Conv2d': (lambda: nn.Conv2d(3, 8, 3, stride=2, padding=1), (2,3,8,8), 2 * 8*3*9 * 2*4*4),
    'Conv2d grouped': (lambda: nn.Conv2d(4, 8, 3, groups=2, padding=1), (1,4,5,6), 2 * 8*2*9 * 30),
    'Conv2d depthwise': (lambda: nn.Conv2d(4, 4, 3, groups=4), (1,4,5,6), 2 * 4*9 * 12),
    'Conv1d': (lambda: nn.Conv1d(4, 6, 3, dilation=2), (2,4,11), 2 * 6*4*3 * 2*7),
    'Conv3d': (lambda: nn.Conv3d(2, 3, 2), (1,2,4,5,6), 2 * 3*2*8 * 3*4*5),
    'ConvTranspose2d': (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2), (1,4,5,5), 2 * 4*6*9 * 25),
    'ConvTranspose2d grouped': (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), (2,4,5,5), 2 * 4*3*9 * 50),
    'Linear': (lambda: nn.Linear(6, 8), (5,6), 2 * 48 * 5),
    'Linear on (B,T,C)': (lambda: nn.Linear(6, 8), (2,5,6), 2 * 48 * 10),
    'GRU': (lambda: nn.GRU(5, 7), (3,2,5), 2 * (21*5 + 21*7) * 6),
    'Conv1D': (lambda: Conv1D(12, 8), (2,5,8), 2 * 96 * 10)}

@pytest.mark.parametrize('make,shape,n', flops.values(), ids=flops)
def test_flops_by_hand(make, shape, n):
    m, x = make(), torch.randn(shape)
    assert sparsity_report(m, x).flops.sum() == n
    df = sparsity_report(sparse(m, 50), x)
    assert df.flops.sum() == n == 2*df.sparse_flops.sum()

def test_flops_of_a_layer_that_is_used_twice():
    m = nn.Linear(6, 6)
    assert sparsity_report(nn.Sequential(m, m), torch.randn(5, 6)).flops.tolist() == [2*36*10]

def test_flops_of_tied_weights():
    df = sparsity_report(LM(), torch.randint(10, (2, 3))).set_index('layer')
    assert df.flops.to_dict() == {'emb': 2*40*6, 'mid': 2*16*6}   # the lookup is free, the product is not

def test_flops_of_attention():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    df = sparsity_report(layer, torch.randn(2, 5, 8)).set_index('layer')
    assert df.flops.to_dict() == {'self_attn.in_proj_weight': 2*192*10, 'self_attn.out_proj': 2*64*10,
        'linear1': 2*128*10, 'linear2': 2*128*10}

@pytest.mark.parametrize('wrap', [lambda m: prune.l1_unstructured(m, 'weight', .5), spectral_norm,
    parametrizations.weight_norm], ids=['pruned', 'spectral_norm', 'parametrized'])
def test_flops_of_weights_that_are_computed(wrap):
    net = nn.Sequential(nn.Linear(6, 8), wrap(nn.Linear(8, 4)), wrap(nn.Linear(4, 2)))
    assert sparsity_report(net, torch.randn(5, 6)).flops.tolist() == [480, 320, 80]

def test_flops_of_an_embedding_are_none():
    assert sparsity_report(nn.Embedding(10, 4), torch.randint(10, (2,3))).flops.tolist() == [0]

def test_flops_where_a_layer_is_called_by_keyword():
    class Net(nn.Module):
        def __init__(self): super().__init__(); self.fc = nn.Linear(6, 8)
        def forward(self, x): return self.fc(input=x)
    assert sparsity_report(Net(), torch.randn(5, 6)).flops.tolist() == [480]

def test_flops_leave_the_model_as_it_was():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout()).train()
    net[1].eval()
    before = net[1].running_mean.clone()
    sparsity_report(net, torch.randn(2,3,8,8))
    assert [m.training for m in net] == [True, False, True] and torch.equal(net[1].running_mean, before)
    assert not net[0]._forward_hooks

def test_bytes():
    df = sparsity_report(sparse(nn.Sequential(nn.Linear(100, 10), nn.Linear(10, 3).half()), {'0': 90}))
    assert df.bytes.tolist() == [4000, 60] and df.packed_bytes.tolist() == [125 + 400, 60]

def test_the_printed_report(capsys):
    s = sparsifier(nn.Sequential(nn.Linear(100, 10), nn.Linear(10, 3)))
    s.sparsify_model({'0': 90})
    s.print_sparsity()
    lines = capsys.readouterr().out.split('\n')
    row = '{:<30} {:<15} {:<10} {:<10} '.format
    assert lines[1] == 'Sparsity Report:' and lines[2] == '-'*80
    assert lines[3] == row('Layer', 'Type', 'Params', 'Zeros') + 'Sparsity  '
    assert lines[5] == row('0', 'Linear', '1,000', '900') + '   90.00%'
    assert lines[8] == row('Overall', 'all', '1,030', '900') + '   87.38%'
