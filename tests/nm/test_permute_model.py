"permute_model on small networks: outputs stay the same, and all channels that can move do"
from copy import deepcopy

import pytest, torch
import torch.nn.functional as F
from fastai.layers import AdaptiveConcatPool2d, Flatten
from torch import nn

from nets import Net
from fasterai_sparse.core.masks import get_mask, set_mask
from fasterai_sparse.nm import rules
from fasterai_sparse.nm.channels import outputs_of
from fasterai_sparse.nm.permute_model import permute_model
from fasterai_sparse.utils.compat import BatchNorm
from fasterai_sparse.utils.operations import kind_of

conv = lambda i, o, k=1, **kw: nn.Conv2d(i, o, k, padding=k//2, **kw)
image, tokens, row = lambda: torch.randn(2,4,6,6), lambda: torch.randn(2,5,16), lambda: torch.randn(3,12)

# name -> factory, input, and the layers whose inputs can move
MOVE = {
    'chain': (lambda: nn.Sequential(conv(4,16,3), nn.BatchNorm2d(16), nn.ReLU(), conv(16,16,3,bias=False),
                                    nn.Hardswish(), conv(16,8)), image, ['3', '5']),
    'residual': (lambda: Net(lambda s, x: s.d(s.a(x) + s.c(torch.relu(s.b(s.a2(x))))), a=conv(4,16), a2=conv(4,24),
                             b=conv(24,12), c=conv(12,16), d=conv(16,4)), image, ['b', 'c', 'd']),
    'concat': (lambda: Net(lambda s, x: s.c(s.bn(torch.cat([s.a(x), s.b(x)], 1))), a=conv(4,8), b=conv(4,12),
                           bn=nn.BatchNorm2d(20), c=conv(20,8)), image, ['c']),
    'depthwise': (lambda: nn.Sequential(conv(4,16), conv(16,16,3,groups=16), nn.BatchNorm2d(16), nn.ReLU6(),
                                        conv(16,8)), image, ['4']),
    'depth multiplier': (lambda: nn.Sequential(conv(4,8), conv(8,16,3,groups=8), conv(16,8)), image, []),
    'groups': (lambda: nn.Sequential(conv(4,16), conv(16,32,3,groups=2), nn.BatchNorm2d(32), conv(32,8)), image,
               ['1', '3']),
    'group norm': (lambda: nn.Sequential(conv(4,16), nn.GroupNorm(2,16), nn.PReLU(16), conv(16,8)), image, ['3']),
    'transposed': (lambda: nn.Sequential(conv(4,16), nn.ConvTranspose2d(16,16,2,2), nn.LeakyReLU(), conv(16,8)), image,
                   ['1', '3']),
    'head': (lambda: nn.Sequential(conv(4,16), AdaptiveConcatPool2d(1), Flatten(), nn.BatchNorm1d(32), nn.Linear(32,16),
                                   nn.ReLU(), nn.Dropout(.5), nn.Linear(16,3)), image, ['4', '7']),
    'flat': (lambda: nn.Sequential(conv(4,8), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(72,16), nn.Tanh(),
                                   nn.Linear(16,2)), image, ['5']),
    'squeeze and excite': (lambda: Net(
        lambda s, x: s.d((y := s.a(x)) * torch.sigmoid(s.c(F.relu(s.b(F.adaptive_avg_pool2d(y, 1)))))),
        a=conv(4,16), b=conv(16,8), c=conv(8,16), d=conv(16,4)), image, ['b', 'c', 'd']),
    'mlp': (lambda: nn.Sequential(nn.Linear(12,32), nn.GELU(), nn.BatchNorm1d(32), nn.Linear(32,16), nn.ReLU(),
                                  nn.Linear(16,2)), row, ['3', '5']),
    'layer norm': (lambda: nn.Sequential(nn.Linear(16,32), nn.LayerNorm(32), nn.SiLU(), nn.Linear(32,8)), tokens,
                   ['3']),
    'channels last': (lambda: Net(lambda s, x: s.c(F.layer_norm(s.a(x).permute(0,2,3,1), (16,), s.ln.weight,
                                                                s.ln.bias).permute(0,3,1,2)), a=conv(4,16),
                                  ln=nn.LayerNorm(16), c=conv(16,8)), image, ['c']),
    'transformer': (lambda: nn.Sequential(nn.Linear(16,32), nn.TransformerEncoderLayer(32, 4, 64, batch_first=True),
                                          nn.Linear(32,8)), tokens,
                    ['1.self_attn.out_proj', '1.linear1', '1.linear2', '2']),
    'heads': (lambda: Net(heads, q=nn.Linear(16,32), k=nn.Linear(16,32), v=nn.Linear(16,32), o=nn.Linear(32,24),
                          e=nn.Linear(24,8)), tokens, ['o', 'e']),
    'lstm': (lambda: Net(lambda s, x: s.c(s.rnn(s.a(x))[0][:,-1]), a=nn.Linear(16,24),
                         rnn=nn.LSTM(24,16,2,batch_first=True,bidirectional=True), c=nn.Linear(32,4)), tokens,
             ['rnn.weight_ih_l0', 'c']),
    'gru': (lambda: Net(lambda s, x: s.c(s.rnn(s.a(x))[1].transpose(0,1).flatten(1)), a=nn.Linear(16,24),
                        rnn=nn.GRU(24,16,batch_first=True), c=nn.Linear(16,4)), tokens, ['rnn.weight_ih_l0', 'c']),
    'pixel shuffle': (lambda: Net(lambda s, x: s.d(F.pixel_shuffle(s.b(s.a(x)), 2)), a=conv(4,16), b=conv(16,32),
                                  d=conv(8,4)), image, ['b', 'd']),
    'called twice': (lambda: Net(lambda s, x: s.c(torch.relu(s.b(torch.relu(s.b(s.a(x)))))), a=conv(4,16),
                                 b=conv(16,16), c=conv(16,8)), image, ['b', 'c']),
    'by its norm': (lambda: Net(lambda s, x: s.b(F.normalize(s.a(x), dim=1)), a=conv(4,16), b=conv(16,8)), image,
                    ['b']),
    'position embedding': (lambda: Net(
        lambda s, x: s.b(s.ln(torch.cat([s.cls.weight[None].expand(len(x),-1,-1), s.a(x)], 1) + s.pos.weight)),
        a=nn.Linear(16,32), cls=nn.Embedding(1,32), pos=nn.Embedding(6,32), ln=nn.LayerNorm(32), b=nn.Linear(32,4)),
        tokens, ['b']),
    'scale': (lambda: Net(lambda s, x: s.b(s.a(x)*s.gamma.weight.view(1,-1,1,1)), a=conv(4,16), b=conv(16,8),
                          gamma=nn.BatchNorm1d(16)), image, None),
    'attention': (lambda: Net(lambda s, x: s.d(s.attn(y := s.ln(s.a(x)), y, y, need_weights=False)[0]),
                              a=nn.Linear(16,32), ln=nn.LayerNorm(32),
                              attn=nn.MultiheadAttention(32,2,batch_first=True), d=nn.Linear(32,8)), tokens,
                  ['attn.out_proj', 'd']),
    # d reads the channels of b, and those of c
    'unet': (lambda: Net(lambda s, x: s.d(torch.cat([y := s.a(x),
                                                     F.interpolate(s.c(F.max_pool2d(s.b(y), 2)), scale_factor=2)], 1)),
                         a=conv(4,8,3), b=conv(8,16,3), c=conv(16,12,3), d=conv(20,4)), image, ['c']),
    'pooled': (lambda: Net(lambda s, x: s.b(s.a(x).mean((2,3))), a=conv(4,16), b=nn.Linear(16,2)), image, ['b']),
    'sliced': (lambda: Net(lambda s, x: s.c(torch.cat([(y := s.a(x))[:,:8], y[:,8:]], 1)), a=conv(4,16), c=conv(16,8)),
               image, ['c']),
    'rolled': (lambda: Net(lambda s, x: s.c(torch.roll(s.a(x), 1, 1)), a=conv(4,16), c=conv(16,8)), image, ['c']),
    'flipped': (lambda: Net(lambda s, x: s.c(s.a(x).flip(1)), a=conv(4,16), c=conv(16,8)), image, ['c']),
    'shuffled': (lambda: Net(lambda s, x: s.c(s.a(x).view(2,4,4,6,6).transpose(1,2).reshape(2,16,6,6)), a=conv(4,16),
                             c=conv(16,8)), image, []),
    'chunked': (lambda: Net(lambda s, x: s.c(torch.cat(s.a(x).chunk(2, 1)[::-1], 1)), a=conv(4,16), c=conv(16,8)),
                image, ['c']),
}
# inputs of the layer `c` can not move, as they go through an operation that depends on their order
STAY = {
    'softmax over channels': lambda s, x: s.c(s.a(x).cumsum(1)),
    'added to the input': lambda s, x: s.c(s.a(x) + torch.cat([x]*4, 1)),
    'given out': lambda s, x: (s.c(y := s.a(x)), y),
    'a constant': lambda s, x: s.c(s.a(x) + torch.arange(16.).view(1,16,1,1).to(x)),
    'group norm as a function': lambda s, x: s.c(F.group_norm(s.a(x), 4, torch.ones(16).to(x))),
    'sorted': lambda s, x: s.c(s.a(x).sort(1).values),
    'multiplied as a matrix': lambda s, x: s.c(
        (s.a(x).flatten(2).transpose(1,2) @ torch.ones(16,16).to(x).tril()).transpose(1,2).view(2,16,6,6)),
}

def heads(s, x):
    split = lambda t: t.view(len(x), -1, 4, 8).transpose(1, 2)
    q, k, v = split(s.q(x)), split(s.k(x)), split(s.v(x))
    return s.e(s.o(((q @ k.transpose(-1,-2)/8**.5).softmax(-1) @ v).transpose(1, 2).flatten(2)))

def stirred(model):
    "`model` with random BatchNorm statistics and weights, in evaluation mode"
    for m in model.modules():
        if isinstance(m, BatchNorm):
            m.running_mean.normal_(), m.running_var.uniform_(.5, 2)
            m.weight.data.uniform_(.5, 2), m.bias.data.normal_()
    return model.eval()

def outputs(model, x): return [t for outs in outputs_of(model, x)[0] for t in outs]

def same(a, b): return all((x-y).abs().max() <= 1e-10*x.abs().max() for x,y in zip(a, b, strict=True))

def permuted(model, x):
    before, keys, sizes = outputs(model, x), list(model.state_dict()), [p.shape for p in model.parameters()]
    ids = [id(p) for p in model.parameters()]
    df = permute_model(model, x)
    assert same(before, outputs(model, x)) and list(model.state_dict()) == keys
    assert [p.shape for p in model.parameters()] == sizes and [id(p) for p in model.parameters()] == ids
    can = df[df.naive.notna()]
    assert (can.kept >= can.naive*(1-1e-6)).all() or len(can) > 1   # layers that share channels may give to one another
    assert can.kept.sum() >= can.naive.sum()*(1-1e-6)
    return df

@pytest.mark.parametrize('name', MOVE)
def test_channels_that_can_move_do(name):
    make, x, layers = MOVE[name]
    model = stirred(make())
    df = permuted(model, x())
    if layers is None: return
    gained = df[df.kept > df.naive*(1+1e-6)].layer.tolist()
    assert [l for l in layers if l not in gained] == [] and not any(df.set_index('layer').note[l] for l in layers)

@pytest.mark.parametrize('name', STAY)
def test_channels_that_can_not_move_stay(name):
    model = stirred(Net(STAY[name], a=conv(4,16), c=conv(16,8)))
    was = deepcopy(model.state_dict())
    df = permuted(model, image())
    assert all(torch.equal(was[k], v) for k,v in model.state_dict().items()) and df.attrs['share'] == 0
    assert df.set_index('layer').note['c']

def test_only_the_refused_stay():
    model = Net(lambda s, x: s.e(torch.relu(s.d(torch.cumsum(s.a(x), 1)))), a=conv(4,16), d=conv(16,32), e=conv(32,8))
    df = permuted(model, image()).set_index('layer')
    assert 'cumsum' in df.note['d'] and df.kept['e'] > df.naive['e'] and 0 < df.attrs['share'] < 1

def test_tied_weights_stay():
    model = Net(lambda s, x: s.c(torch.relu(s.b(torch.relu(s.a(x))))), a=nn.Linear(12,12), b=nn.Linear(12,12),
                c=nn.Linear(12,4))
    model.b.weight = model.a.weight
    permuted(model, row())

def test_twice_is_safe():
    model, x = stirred(MOVE['chain'][0]()), image()
    first, second = permuted(model, x), permuted(model, x)
    assert second.kept.dropna().sum() >= first.kept.dropna().sum()*(1-1e-6)

def test_masks_and_gradients_go_along():
    model = stirred(nn.Sequential(nn.Linear(12,16), nn.ReLU(), nn.Linear(16,8)))
    mask = torch.rand(8,16) < .5
    set_mask(model[2], mask)
    model(row()).sum().backward()
    w, g = model[2].weight.detach().clone(), model[2].weight.grad.clone()
    permuted(model, row())
    order = [int((w.T == c).all(1).nonzero()[0,0]) for c in model[2].weight.detach().T]
    assert sorted(order) == list(range(16)) and order != list(range(16))
    assert torch.equal(get_mask(model[2]), mask[:,order]) and torch.equal(model[2].weight.grad, g[:,order])

@pytest.mark.parametrize('training', [True, False])
def test_modes_and_statistics_are_left(training):
    model, x = stirred(MOVE['residual'][0]()).train(training), image()
    permute_model(model, x)
    assert all(m.training == training for m in model.modules())

def test_what_decides_by_values_is_refused():
    model = Net(lambda s, x: s.a(x) if x.sum() > 0 else s.c(x), a=conv(4,16), c=conv(4,16))
    was = deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="Net decides by the values"): permute_model(model, image())
    assert all(torch.equal(was[k], v) for k,v in model.state_dict().items())

def test_a_wrong_rule_moves_nothing(monkeypatch):
    "A wrong rule is found by its outputs: the channels it moved go back, others stay moved"
    monkeypatch.setattr(rules, 'kind_of', lambda name: 'elementwise' if name == 'cumsum' else kind_of(name))
    model = Net(lambda s, x: s.e(torch.relu(s.d(torch.cumsum(s.a(x), 1)))), a=conv(4,16), d=conv(16,32), e=conv(32,8))
    df = permuted(model, image()).set_index('layer')
    assert 'output would change' in df.note['d'] and df.kept['e'] > df.naive['e']

def test_a_head_of_zeros_hides_nothing(monkeypatch):
    "A wrong rule is found even if the output is zero, as that of a new head can be"
    monkeypatch.setattr(rules, 'kind_of', lambda name: 'elementwise' if name == 'cumsum' else kind_of(name))
    model = Net(lambda s, x: s.f(torch.relu(s.d(torch.cumsum(s.a(x), 1)))), a=conv(4,16), d=conv(16,32), f=conv(32,8))
    nn.init.zeros_(model.f.weight), nn.init.zeros_(model.f.bias)
    assert 'output would change' in permuted(model, image()).set_index('layer').note['d']
