"Accelerated models compute what the original does: random networks over tokens, and unusual forward functions"
import copy, json, pickle, random

import pytest, torch
import torch.nn.functional as F
from torch import nn

from fasterai_sparse.core.criteria import large_final
from fasterai_sparse.core.sparsifier import Sparsifier
from fasterai_sparse.engine.accelerate import accelerate
from fasterai_sparse.engine.modules import Accelerated, Layerwise, SparseConv2d, SparseLinear
from fasterai_sparse.engine.ops import acts, Attention, engine_sets, Flat, Grid, MatVec, Program, Scale
from fasterai_sparse.engine.plan import Choices, Plan

SETS = list(engine_sets().items())
pytestmark = pytest.mark.skipif(not SETS, reason='no compiled library')
Plan.timed.__defaults__ = (0.,)   # these tests check results, not times

def thinned(model, share=.7):
    "`model` with a `share` of its weights set to zero at random"
    with torch.no_grad():
        for n,p in model.named_parameters():
            if p.dim() >= 2: p[torch.rand_like(p) < share] = 0
            else: p.add_(torch.randn_like(p)*.1)
    return model.eval()

def leaves(out):
    if isinstance(out, dict): out = list(out.values())
    return [l for o in out for l in leaves(o)] if isinstance(out, (tuple,list)) else [out]

def same(a, b, eps=1e-4):
    a, b = leaves(a), leaves(b)
    return len(a) == len(b) and all(same_leaf(x, y, eps) for x,y in zip(a, b))

def same_leaf(x, y, eps):
    if not torch.is_tensor(x): return x == y
    if x.shape != y.shape or x.dtype != y.dtype: return False
    return not x.numel() or bool((x-y).abs().max() <= eps*x.abs().max() + 1e-7)

class Net(nn.Module):
    def __init__(self, run, **mods):
        super().__init__()
        self.run = run
        for n,m in mods.items(): setattr(self, n, m)
    def forward(self, *x): return self.run(self, x)

class One(Net):
    def forward(self, x): return self.run(self, x)

class Three(Net):
    def forward(self, x, y, z): return self.run(self, x, y, z)

def conv(i, o, k=3, **kw): return nn.Conv2d(i, o, k, **{'padding': k//2, **kw})
def heads(x, n): return x.view(x.shape[0], x.shape[1], n, -1).transpose(1, 2)
def fast_of(model, **kwargs): return Accelerated(copy.deepcopy(model), **{'threads': 1, 'cache': None, **kwargs})

def equals(model, *x, **kwargs):
    "Does the accelerated model give the outputs of the model, in two calls?"
    with torch.no_grad():
        want, fast = model(*x), fast_of(model, **kwargs)
        return all(same(want, fast(*x)) for _ in range(2)) and fast

# ---- tokens
class Attend(nn.Module):
    "Self-attention written with matrix products"
    def __init__(self, c, n, how, causal, scale):
        super().__init__()
        self.n, self.how, self.causal, self.scale = n, how, causal, scale
        self.qkv = nn.Linear(c, 3*c) if how != 'apart' else nn.ModuleList([nn.Linear(c, c) for _ in range(3)])
        self.out = nn.Linear(c, c)
    def forward(self, x):
        if self.how == 'apart': q, k, v = (heads(l(x), self.n) for l in self.qkv)
        elif self.how == 'chunk':
            q, k, v = self.qkv(x).chunk(3, -1)
            q, k, v = (heads(t, self.n) for t in (q, k, v))
        else: q, k, v = self.qkv(x).reshape(x.shape[0], x.shape[1], 3, self.n, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal, scale=self.scale)
        return self.out(y.transpose(1, 2).reshape(x.shape))

class Tokens(nn.Module):
    "A network of random layers over tokens"
    def __init__(self, rng, c):
        super().__init__()
        self.layers, self.kinds = nn.ModuleList(), []
        for _ in range(rng.randint(2, 6)):
            kind = rng.choice(['linear', 'linear', 'wide', 'norm', 'functional norm', 'attention', 'mha', 'encoder',
                               'act', 'turn', 'split', 'torch'])
            acts = [nn.ReLU(), nn.GELU(), nn.GELU('tanh'), nn.SiLU(), nn.Tanh(), nn.Sigmoid(), nn.Hardswish(),
                    nn.Hardsigmoid(), nn.ReLU6()]
            m = {'linear': lambda: nn.Linear(c, c, bias=rng.random() < .5),
                 'wide': lambda: nn.Sequential(nn.Linear(c, rng.choice([3*c, 2*c+5])), rng.choice(acts),
                                               nn.Dropout(.1)),
                 'norm': lambda: nn.LayerNorm(c, eps=rng.choice([1e-5, .1]), elementwise_affine=rng.random() < .7),
                 'act': lambda: rng.choice(acts),
                 'attention': lambda: Attend(c, rng.choice([1, 2, 4]),
                                             rng.choice(['apart', 'apart', 'chunk', 'fused']), rng.random() < .5,
                                             rng.choice([None, .3])),
                 'mha': lambda: nn.MultiheadAttention(c, rng.choice([1, 2, 4]), bias=rng.random() < .7,
                         batch_first=rng.random() < .8),
                 'encoder': lambda: nn.TransformerEncoderLayer(c, 4, 2*c,
                         activation=rng.choice(['relu', 'gelu', F.silu]), batch_first=rng.random() < .8,
                         norm_first=rng.random() < .5, bias=rng.random() < .7),
                 }.get(kind, nn.Identity)()
            if kind == 'wide': m.append(nn.Linear(m[0].out_features, c))
            self.layers.append(m), self.kinds.append((kind, rng.random() < .4))
    def forward(self, x):
        for (kind, residual), m in zip(self.kinds, self.layers):
            y = m(x, x, x, need_weights=False)[0] if kind == 'mha' else m(x)
            if kind == 'functional norm': y = F.layer_norm(x, x.shape[-1:], eps=1e-3)
            if kind == 'turn': y = x.transpose(0, 1).contiguous().transpose(0, 1)
            if kind == 'split':
                first, rest = x.split([1, x.shape[-1]-1], -1)
                y = torch.cat([rest, first*2], -1)
            if kind == 'torch': y = x.cumsum(1)
            x = x + y if residual else y
        return x

@pytest.mark.parametrize('seed', range(60))
def test_random_tokens(seed):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    c = rng.choice([8, 16, 20, 36])
    model = thinned(nn.Sequential(nn.Linear(c, c), Tokens(rng, c)), rng.choice([.5, .7, .95]))
    with torch.no_grad(): model[0].weight[torch.rand_like(model[0].weight) < .6] = 0   # what the engine begins with
    x = torch.randn(rng.choice([1, 2, 3]), rng.choice([1, 2, 5, 16, 17, 33]), c)
    with torch.no_grad(): want = model(x)
    plan = Plan(model, (x,), seed % len(SETS), rng.choice([1, 2]), tune=rng.random() < .4)
    assert same(want, plan(x))
    y = torch.randn_like(x)
    with torch.no_grad(): assert same(model(y), plan(y))   # memory is used again

@pytest.mark.parametrize('which', range(len(SETS)))
@pytest.mark.parametrize('tokens', [1, 3, 16, 33, 40])
@pytest.mark.parametrize('causal', [False, True])
def test_attention_beside_other_images(which, tokens, causal):
    "Attention of one image reads no keys and writes no outputs of the next; the padding between them stays zero"
    model = thinned(nn.Sequential(nn.Linear(24, 24), Attend(24, 4, 'apart', causal, .5), nn.Linear(24, 24)))
    x = torch.randn(3, tokens, 24)
    plan = Plan(model, (x,), which, 1, tune=False)
    assert any(isinstance(o, Attention) for o in plan.ops)
    with torch.no_grad(): assert same(model(x), plan(x), 1e-5)
    alone = Plan(model, (x[1:2],), which, 1, tune=False)
    assert same(plan(x)[1:2], alone(x[1:2]), 1e-5)
    between_stays_zero(plan)

def between_stays_zero(plan):
    for op in plan.ops:
        y = getattr(op, 'y', None)
        if not isinstance(y, Flat) or y.grid.one_position: continue
        inside = torch.zeros_like(y.memory, dtype=torch.bool)
        for o in [getattr(p, n, None) for p in plan.ops for n in ('x', 'y')]:
            if isinstance(o, Flat) and o.memory is y.memory:
                inside.as_strided(o.view.shape, o.view.stride(), o.begin).fill_(True)
        assert not y.memory[~inside].any(), op

@pytest.mark.parametrize('size', [(6,16), (1,16), (2,5,16), (1,1,16), (2,3,4,16), (1,1,1,16), (2,2,2,3,16)])
def test_linear_of_any_rank(size):
    model = thinned(nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16), nn.LayerNorm(16)))
    x = torch.randn(size)
    if len(size) < 5: assert equals(model, x)
    else:
        assert accelerate(model, x, cache=None)[1].attrs['note'] != 'the engine computes something else than the model'

@pytest.mark.parametrize('n_out', [1, 15, 16, 33])
@pytest.mark.parametrize('density', [0, .1, .5, 1])
@pytest.mark.parametrize('act', [None, 'relu', 'gelu', 'sigmoid'])
def test_one_position_in_each_form(n_out, density, act):
    from fasterai_sparse.engine.weights import Terms
    grid, w, b = Grid(1), torch.randn(n_out, 40), torch.randn(n_out).numpy()
    grid.include(1, 1)
    w[torch.rand_like(w) >= density] = 0
    four = w.view(n_out, 10, 4)
    if density == .5: four.scatter_(2, four.abs().argsort(2)[...,:2], 0)
    for which,(_, floats) in enumerate(SETS):
        x, y, r = (Flat(n, 1, 1, grid, floats) for n in (40, n_out, n_out))
        x.view.copy_(torch.randn(1, 40, 1, 1)), r.view.copy_(torch.randn(1, n_out, 1, 1))
        terms = Terms(w, x)
        for size in [1, 16] + [24]*terms.is_24():
            for chunks in (1, 3):
                p = Program([MatVec(x, y, b, *terms.matvec_layout(size), size, act, r, chunks)], which, chunks)
                assert torch.equal(p.ops[0].weight(), w)
                p()
                sums = (w.double() @ x.view.flatten().double() + torch.from_numpy(b)).float()
                assert same(acts[act](sums + r.view.flatten()), y.view.flatten(), 1e-5)
        assert terms.is_24() == bool(((four != 0).sum(2) <= 2).all())

@pytest.mark.parametrize('kwargs',
                         [dict(), dict(norm_first=True), dict(activation='gelu'), dict(bias=False),
                          dict(batch_first=False), dict(activation=nn.SiLU())])
def test_transformer_encoder(kwargs):
    layer = nn.TransformerEncoderLayer(16, 4, 32, **{'batch_first': True, **kwargs})
    model = thinned(nn.Sequential(nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(16), enable_nested_tensor=False)))
    x, mask = torch.randn(5, 5, 16), torch.zeros(5, 5).masked_fill(torch.ones(5, 5).triu(1) == 1, -float('inf'))
    fast = equals(model, x)
    assert fast
    assert any(isinstance(o, Attention) for p in fast.plans.values() for o in p.ops) == layer.self_attn.batch_first
    masked = One(lambda s, x: s.l(s.e(x, mask=s.mask)), e=model[0], l=thinned(nn.Linear(16, 16)))
    masked.register_buffer('mask', mask)
    assert equals(masked.eval(), x)

def test_weights_of_attention_that_are_used():
    mha = lambda: nn.MultiheadAttention(16, 4, batch_first=True)
    for run in (lambda s, x: s.m(y := s.l(x), y, y), lambda s, x: s.m(y := s.l(x), y, y)[1],
                lambda s, x: s.m(y := s.l(x), y, x)[0],
                lambda s, x: s.m(x, x, s.l(x), key_padding_mask=x[:,:,0] > 1e9)[0],
                lambda s, x: s.m(y := s.l(x), y, y, attn_mask=s.l(x)[0,:,:5] > 9)[0],
                lambda s, x: s.m(y := s.l(x), y, y)[0] + y, lambda s, x: (o := s.m(y := s.l(x), y, y))[0] + o[0]):
        assert equals(thinned(One(run, m=mha(), l=nn.Linear(16, 16))), torch.randn(2, 5, 16))

# ---- forward functions
CODE = {
    'F.linear with a bias by name': (lambda s, x: F.linear(x.mean(2), s.l.weight, bias=s.l.bias),
                                     dict(l=nn.Linear(8, 4))),
    'F.linear without': (lambda s, x: F.linear(x.mean(2), s.l.weight), dict(l=nn.Linear(8, 4))),
    'dims=': (lambda s, x: s.l(s.a(x).permute(dims=(0,2,3,1))), dict(a=conv(3, 8), l=nn.Linear(8, 4))),
    'ConvNeXt': (lambda s, x: s.a(x) + s.k(F.gelu(s.l(s.n(s.d(s.a(x)).permute(0,2,3,1))))).permute(0,3,1,2),
                 dict(a=conv(3, 8), d=conv(8, 8, groups=8), n=nn.LayerNorm(8, 1e-2), l=nn.Linear(8, 16),
                      k=nn.Linear(16, 8))),
    'LayerNorm2d': (
        lambda s, x: s.b(F.layer_norm(s.a(x).permute(0,2,3,1), (8,), s.n.weight, s.n.bias, .1).permute(0,3,1,2)),
        dict(a=conv(3, 8), n=nn.LayerNorm(8), b=conv(8, 4))),
    'mean over channels of what is pooled': (lambda s, x: F.adaptive_avg_pool2d(s.a(x), 1).mean((1,2)),
                                             dict(a=conv(3, 8))),
    'Linear of one': (lambda s, x: s.l(F.adaptive_avg_pool2d(s.a(x), 1)), dict(a=conv(3, 8), l=nn.Linear(1, 4))),
    'norm of one': (lambda s, x: s.l(F.adaptive_avg_pool2d(s.a(x), 1)), dict(a=conv(3, 8), l=nn.LayerNorm(1))),
    'convolved channels': (lambda s, x: s.a(x)*torch.sigmoid(
        s.e(F.adaptive_avg_pool2d(s.a(x), 1).squeeze(-1).transpose(1, 2)).transpose(1, 2)[...,None]),
        dict(a=conv(3, 8), e=nn.Conv1d(1, 1, 3, padding=1))),
    'pool of three dimensions': (lambda s, x: s.p(F.relu(s.a(x[:,:,0]))),
                                 dict(a=nn.Conv1d(3, 8, 3), p=nn.MaxPool2d(2))),
    'mean of three dimensions': (lambda s, x: s.p(s.a(x[:,:,0])), dict(a=nn.Conv1d(3, 8, 3), p=nn.AvgPool2d(2))),
    '1-d': (lambda s, x: s.c(F.relu(s.n(s.b(F.relu(s.a(x[:,:,0])))))),
            dict(a=nn.Conv1d(3, 8, 5, stride=2, padding=2), b=nn.Conv1d(8, 8, 3, padding='same', dilation=2),
                 n=nn.BatchNorm1d(8), c=nn.Conv1d(8, 4, 3))),
    'Linear across': (lambda s, x: (y := s.a(x), s.d(s.c(s.b(y))), s.l(y)),
                      dict(a=conv(3, 4), b=conv(4, 4), c=conv(4, 4), d=conv(4, 4), l=nn.Linear(8, 8))),
    'padded': (lambda s, x: s.a(F.pad(x, (2, 0, 1, 3))), dict(a=conv(3, 4, stride=2, padding=0))),
    'padded to a multiple': (lambda s, x: s.a(F.pad(x, (0, 5-x.shape[3]%5, 0, 5-x.shape[2]%5))),
                             dict(a=conv(3, 4, 5, stride=5, padding=0))),
    'padded by a module': (lambda s, x: s.a(s.p(x)), dict(p=nn.ZeroPad2d((1, 2, 3, 0)), a=conv(3, 4, padding=1))),
    'padded with ones': (lambda s, x: s.a(F.pad(x, (1, 1, 1, 1), value=1.)), dict(a=conv(3, 4))),
    'padded with itself': (lambda s, x: s.a(F.pad(x, (1, 1, 1, 1), 'reflect')), dict(a=conv(3, 4))),
    'cropped': (lambda s, x: s.a(F.pad(x, (-1, 1, -1, 1))), dict(a=conv(3, 4))),
    'pools': (lambda s, x: (s.p(y := F.relu(s.a(x))), s.q(y), s.r(y), s.t(y), s.p(s.a(x))),
              dict(a=conv(3, 4), p=nn.MaxPool2d(3, 2, 1), q=nn.MaxPool2d((2, 3), (3, 1), (1, 0), ceil_mode=True),
                   r=nn.MaxPool2d(4, 1, 2), t=nn.AvgPool2d(3, 2, 1))),
    'pools of their own': (lambda s, x: (s.p(y := s.a(x)), s.q(y), s.r(y)),
                           dict(a=conv(3, 4), p=nn.AvgPool2d(3, 2, 1, count_include_pad=False),
                                q=nn.AvgPool2d(2, ceil_mode=True), r=nn.AvgPool2d(2, divisor_override=3))),
    'BatchNorm alone': (lambda s, x: s.n(torch.cat([s.a(x), F.relu(s.a(x))], 1)),
                        dict(a=conv(3, 4), n=nn.BatchNorm2d(8))),
    'added with a factor': (lambda s, x: torch.add(s.b(y := s.a(x)), y, alpha=3), dict(a=conv(3, 4), b=conv(4, 4))),
    'squeeze by Linear': (
        lambda s, x: (y := s.a(x))*torch.sigmoid(s.l(y.mean((2,3)))).view(y.size(0), y.size(1), 1, 1),
        dict(a=conv(3, 8), l=nn.Linear(8, 8))),
    'attention of one head': (lambda s, x: F.scaled_dot_product_attention(y := s.l(x.flatten(2)), y, y),
                              dict(l=nn.Linear(64, 64))),
    'a scale from a shape': (lambda s, x: F.scaled_dot_product_attention(
        y := heads(s.l(x.flatten(2)), 4), y, y, scale=y.shape[-1]**-1.).transpose(1, 2).flatten(2),
        dict(l=nn.Linear(64, 64))),
    'heads of other values': (lambda s, x: F.scaled_dot_product_attention(
        heads(s.l(y := x.flatten(2)), 4), heads(s.k(y), 4), heads(s.l(y) + s.k(y), 4)).transpose(1, 2).flatten(2),
        dict(l=nn.Linear(64, 64), k=nn.Linear(64, 64))),
    'scores with a mask': (lambda s, x: F.scaled_dot_product_attention(
        y := heads(s.l(x.flatten(2)), 4), y, y, attn_mask=x[:,None,:,0,:3]).transpose(1, 2).flatten(2),
        dict(l=nn.Linear(64, 64))),
    'itself and its input': (lambda s, x: (s.a(x), x, s.a.weight[:1], x[:1]), dict(a=conv(3, 4))),
    'a dictionary': (lambda s, x: {'a': (y := s.a(x)), 'b': [y.flatten(1), None]}, dict(a=conv(3, 4))),
    'of half': (lambda s, x: s.a(x).half().float() + s.a(x), dict(a=conv(3, 4))),
}

@pytest.mark.parametrize('name', CODE)
def test_code(name):
    run, mods = CODE[name]
    model = thinned(One(run, **copy.deepcopy(mods)), .6)
    for m in model.modules():
        if hasattr(m, 'running_var'): m.running_mean.normal_(), m.running_var.uniform_(.5, 2)
    for n in (1, 3): assert equals(model, torch.randn(n, 3, 8, 8))

IN_PLACE = {
    'a function': lambda s, x: (y := s.a(x), torch.relu_(y), s.b(y))[-1],
    'a view': lambda s, x: (y := s.a(x), y[:,:2].mul_(2), s.b(y))[-1],
    'by position': lambda s, x: (y := s.a(x), F.relu(y, True), s.b(y))[-1],
    'what was read': lambda s, x: s.b(y := s.a(x)) + y.mul_(2),
    'the input': lambda s, x: s.a(x.mul(1)) + s.a(x.mul_(2)),
    'a parameter': lambda s, x: s.b(s.a(x)) + s.b.bias.view(1, 4, 1, 1).mul_(.5),
}

@pytest.mark.parametrize('name', IN_PLACE)
def test_changes_in_place_are_refused(name):
    model, x = thinned(One(IN_PLACE[name], a=conv(3, 4), b=conv(4, 4))), torch.randn(2, 3, 8, 8)
    was = x.clone()
    with torch.no_grad(), pytest.raises(ValueError, match='in place'): fast_of(model).plan(x)
    assert torch.equal(x, was)

def test_changes_in_place_of_ones_own():
    def run(s, x): return s.b(F.relu_(s.a(x)).view(x.shape[0], 4, 8, 8).mul_(2)) + (y := s.a(x)).mul_(y.shape[1])
    model = thinned(One(run, a=conv(3, 4), b=conv(4, 4)))
    assert equals(model, torch.randn(2, 3, 8, 8))

@pytest.mark.parametrize('run',
                         [lambda s, x: s.a(x)*x.max().item(), lambda s, x: s.a(x).mean() + x[x > 0].shape[0],
                          lambda s, x: s.l(x[x[:,0,0,0] > 0]), lambda s, x: s.l(x.flatten(1)[:,:8].unique(dim=0))])
def test_what_depends_on_values_is_refused(run):
    with torch.no_grad(), pytest.raises(ValueError, match='depends on the values'):
        fast_of(thinned(One(run, a=conv(3, 4), l=nn.Linear(8, 8)))).plan(torch.randn(4, 3, 8, 8))

def test_arguments():
    class Defaults(Net):
        def forward(self, x, y=None, *, twice=False): return self.a(x if y is None else x + y)*(2 if twice else 1)
    x, y = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
    model = thinned(Defaults(None, a=conv(3, 4)))
    fast = fast_of(model)
    with torch.no_grad(): assert same(model(x), fast(x)) and same(model(x, y), fast(x, y)) and same(model(y), fast(y))
    assert equals(thinned(Net(lambda s, x: s.a(x[0]) + s.b(x[1]), a=conv(3, 4), b=conv(3, 4))), x, y)

def test_weights_by_two_names():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb, self.dec, self.l = nn.Embedding(20, 16), nn.Linear(16, 20, bias=False), nn.Linear(20, 16)
            self.dec.weight = self.emb.weight
            self.register_buffer('fixed', torch.randn(8, 20))
        def forward(self, i):
            return F.linear(self.l(self.dec(self.emb(i))), self.emb.weight), F.linear(self.dec(self.emb(i)), self.fixed)
    model, ids = thinned(Tied()), torch.randint(0, 20, (3, 5))
    model.fixed[torch.rand_like(model.fixed) < .8] = 0
    assert equals(model, ids)
    fast, report = accelerate(model, ids, cache=None)
    assert 'untraceable' not in report.attrs['note'] and {'dec', 'l', 'fixed'} <= set(report.layer)

def test_masks_and_parametrizations():
    model, x = nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 4)).eval(), torch.randn(2, 3, 8, 8)
    sparsifier = Sparsifier(model, 'weight', 'local', large_final, layer_type=nn.Conv2d)
    sparsifier.sparsify_model(80)
    with torch.no_grad(): want = model(x)
    fast, report = accelerate(model, x, cache=None)
    assert report.sparsity_pct.tolist() == pytest.approx([80, 80], abs=.5) and same(want, fast(x).detach())
    assert same(want, model(x).detach())
    assert equals(nn.Sequential(torch.nn.utils.parametrizations.weight_norm(conv(3, 8)), conv(8, 4)).eval(), x)

@pytest.mark.parametrize('dtype', [torch.float64, torch.float16, torch.bfloat16])
def test_other_types_come_back(dtype):
    model, x = thinned(nn.Sequential(conv(3, 4), nn.ReLU(), conv(4, 4))).to(dtype), torch.randn(2, 3, 8, 8, dtype=dtype)
    fast, report = accelerate(model, x, cache=None)
    assert fast is model and 'float32' in report.attrs['note']

# ---- batches
def test_images_that_influence_each_other():
    for first in (torch.ones(4, 3, 8, 8), torch.zeros(4, 3, 8, 8), torch.randn(4, 3, 8, 8)):
        model, x = thinned(One(lambda s, x: s.a(x - x.mean(0)), a=conv(3, 4))), torch.randn(4, 3, 8, 8)
        fast = fast_of(model, room=300)
        with torch.no_grad(): fast(first); assert same(model(x), fast(x))

@pytest.mark.parametrize('run',
                         [lambda s, x: s.a(x), lambda s, x: {'y': s.a(x), 'z': (s.a(x).mean((2,3)), [x])},
                          lambda s, x: (s.a(x), x.shape[0]), lambda s, x: (s.a(x), s.a.bias), lambda s, x: s.a(x).sum(),
                          lambda s, x: s.a(x).mean((0,2,3)),
                          lambda s, x: torch.max(s.a(x), 1), lambda s, x: (s.a(x), None),
                          lambda s, x: s.a(x).flatten(0, 1)])
def test_batches_taken_apart(run):
    fast = equals(thinned(One(run, a=conv(3, 4))), torch.randn(7, 3, 8, 8), room=600)
    assert fast

def test_as_many_at_once_as_fit():
    fast = equals(thinned(nn.Sequential(conv(3, 4))), torch.randn(7, 3, 8, 8), room=600)
    assert sorted({k[0][0][0] for k in fast.plans}) == [1, 2]   # 4·8·8 floats for an image
    fast = equals(thinned(nn.Sequential(conv(3, 4))), torch.randn(7, 3, 8, 8), n_plans=1)
    assert len(fast.plans) == 1

def test_several_inputs():
    model = thinned(Three(lambda s, i, x, t: s.l(s.e(i).mean(1)) + s.a(x).mean((2,3)) + t, e=nn.Embedding(9, 8),
                          l=nn.Linear(8, 4), a=conv(3, 4)))
    for n,m in ((3, 3), (3, 1), (1, 3)):
        assert equals(model, torch.randint(0, 9, (n, 6)), torch.randn(m, 3, 8, 8), torch.tensor(2.))

def test_a_plan_refuses_other_sizes_and_types():
    "A plan refuses inputs of other sizes or types, rather than read beyond a tensor"
    model = thinned(nn.Sequential(conv(3, 4)))
    plan = Plan(model, (torch.randn(2, 3, 8, 8),), tune=False)
    for x in (torch.randn(1, 3, 8, 8), torch.randn(2, 3, 8, 8).double()):
        with pytest.raises(RuntimeError, match='the plan was made for'): plan(x)

# ---- values
def test_values_that_are_not_finite_inside():
    model = thinned(nn.Sequential(conv(3, 4), nn.ReLU(), conv(4, 4), nn.ReLU6(), nn.AdaptiveAvgPool2d(1)), 0)
    x = torch.randn(2, 3, 8, 8)
    model[0].weight.data[0,0,0,0] = float('nan')
    with torch.no_grad(): assert fast_of(model)(x).isnan().any(1).all() and model(x).isnan().any(1).all()

def test_an_overflow_does_not_affect_the_next_call():
    "A call that overflows does not affect the next one"
    def run(s, x):
        return s.e((y := s.p(F.relu(s.a(x)))) + (z := s.b(y))*torch.sigmoid(s.c(F.adaptive_avg_pool2d(z, 1))))
    mods = dict(a=conv(3, 8), b=conv(8, 8), c=conv(8, 8, 1), e=conv(8, 8), p=nn.MaxPool2d(3, 2, 1))
    model = thinned(One(run, **mods), .3)
    fast, x = fast_of(model), torch.randn(2, 3, 9, 9)
    with torch.no_grad():
        for big in (1e30, 1e37, 1e38, 3e38): fast(x.sign()*big)
        assert same(model(x), fast(x))
        tiny = x*1e-42
        assert same(model(tiny), fast(tiny)) and same(model(x.sign()*2e38), fast(x.sign()*2e38)) is not None

@pytest.mark.parametrize('which', range(len(SETS)))
def test_a_factor_that_is_infinite_stays_on_its_image(which):
    floats, grid, ones = SETS[which][1], Grid(2), Grid(2)
    grid.include(5, 7, 1, 1, 1, 1), ones.include(1, 1)
    x, y, f = Flat(3, 5, 7, grid, floats), Flat(3, 5, 7, grid, floats), Flat(3, 1, 1, ones, floats)
    x.view.copy_(torch.rand(2, 3, 5, 7) + 1), f.view.fill_(float('inf'))
    Program([Scale(x, y, f, grid.mask(5, 7, floats))], which, 1)()
    assert y.view.isinf().all() and not y.memory.isnan().any() and int(y.memory.isinf().sum()) == 2*3*5*7

def test_autocast_and_inference_mode():
    model, x = thinned(One(lambda s, x: s.l(s.a(x)), a=conv(3, 4), l=nn.Linear(8, 8)), .3), torch.randn(2, 3, 8, 8)
    fast = fast_of(model)
    with torch.no_grad():
        want = model(x)
        with torch.autocast('cpu', torch.bfloat16): assert same(want, fast(x))
        assert same(want, fast(x))
    with torch.inference_mode(): assert same(want, fast(x.clone())) and same(want, fast_of(model)(x.clone()))

# ---- compiled and exported
def compiled_equals(model, x):
    fast = fast_of(model)
    with torch.no_grad():
        want = fast(x)
        got = torch.compile(fast, fullgraph=True, backend='eager')(x)
    return type(want) is type(got) and same(want, got)

def test_compiled():
    x = torch.randn(2, 3, 8, 8)
    for run in (lambda s, x: s.a(x), lambda s, x: ((y := s.a(x)), y, y.flatten(1)), lambda s, x: [s.a(x), x]):
        assert compiled_equals(thinned(One(run, a=conv(3, 4))), x)
    for run in (lambda s, x: (s.a(x), [x]), lambda s, x: (s.a(x), None), lambda s, x: {'y': s.a(x)}):
        with pytest.raises(Exception, match='can be compiled or exported'):
            compiled_equals(thinned(One(run, a=conv(3, 4))), x)

def test_exported_for_any_batch():
    model, x = thinned(nn.Sequential(conv(3, 4), nn.ReLU(), conv(4, 4))), torch.randn(2, 3, 8, 8)
    fast = fast_of(model)
    with torch.no_grad():
        fast(x)
        exported = torch.export.export(fast, (x,), dynamic_shapes=(({0: torch.export.Dim('n')},),)).module()
        for n in (2, 5): assert same(model(y := torch.randn(n, 3, 8, 8)), exported(y))

# ---- layer by layer
def test_layers_by_themselves():
    model = thinned(nn.Linear(16, 24))
    fast = SparseLinear(model, 1, None)
    with torch.no_grad():
        for size in ((16,), (1,16), (2,3,16), (0,16), (130,16), (2,2,2,2,16)):
            assert same(model(x := torch.randn(size)), fast(input=x))
        assert same(model.double()(torch.randn(2,16).double()), fast.model(torch.randn(2,16).double())) is not None
    assert fast.weight is fast.model[0].weight and fast.in_features == 16
    c = thinned(conv(3, 4))
    fast = pickle.loads(pickle.dumps(SparseConv2d(c, 1, None)))
    with torch.no_grad():
        for size in ((2,3,8,8), (3,8,8), (1,3,1,1)): assert same(c(x := torch.randn(size)), fast(input=x))
    for f,size in ((fast, (1,3,8,8)), (SparseLinear(thinned(nn.Linear(16, 4)), 1, None), (2,16))):
        with pytest.raises(RuntimeError, match='no gradients'): f(torch.randn(size).requires_grad_())

def test_named_arguments(monkeypatch):
    "Sparse layers are replaced where that is faster; here all of them are"
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.l, self.k = nn.Linear(16, 16), nn.Linear(16, 16)
        def forward(self, ids=None): return {'y': self.k(input=self.l(ids).to(self.k.weight.dtype))}
    races = iter([[2., 1.]]*99)
    monkeypatch.setattr('fasterai_sparse.engine.accelerate.least_ms', lambda *fs, **kw: next(races))
    for model,name in ((thinned(Named()), 'ids'), (thinned(nn.Linear(16, 16)), 'input')):
        x = {name: torch.randn(4, 16)}
        fast, report = accelerate(model, x, cache=None)
        assert isinstance(fast, Layerwise) and (report.form == 'by itself').all()
        assert any(isinstance(m, SparseLinear) for m in fast.modules())
        with torch.no_grad(): assert same(model(**x), fast(**x)) and same(model(**x), copy.deepcopy(fast)(**x))
        with pytest.raises(RuntimeError, match='no gradients'): fast(**{name: x[name].requires_grad_()})

def test_bert():
    BertConfig, BertModel = (getattr(pytest.importorskip('transformers'), n) for n in ('BertConfig', 'BertModel'))
    config = BertConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
                        max_position_embeddings=32)
    model = thinned(BertModel(config), .8)
    x = dict(input_ids=torch.randint(0, 50, (2, 7)), attention_mask=torch.tensor([[1]*7, [1]*4 + [0]*3]))
    fast, report = accelerate(model, x, cache=None)
    with torch.no_grad():
        assert same(model(**x)['last_hidden_state'], fast(**x)['last_hidden_state']) and len(report) == 13

# ---- the file of forms
@pytest.mark.parametrize('text', ['', '{', '[]', 'null', '{"a": 1}', b'\xff\xfe'])
def test_a_file_that_is_no_good(tmp_path, text):
    path = tmp_path/'engine.json'
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert equals(thinned(nn.Sequential(conv(3, 4))), torch.randn(2, 3, 8, 8), cache=path)
    assert json.loads(path.read_text())

def test_forms_are_found_once(tmp_path):
    model, x = thinned(nn.Sequential(conv(3, 4), conv(4, 4))), torch.randn(2, 3, 8, 8)
    path = tmp_path/'new'/'engine.json'
    choices = Choices(path)
    assert len(Plan(model, (x,), choices=choices).untried) == 2 and not Plan(model, (x,), choices=choices).untried
    assert not Plan(model, (x,), choices=Choices(path)).untried
    found = json.loads(path.read_text())
    for bad in ([1, 1, 99, 1], [1, 1], 'x', [1, 1, 1.5, 1], None):   # of another version
        path.write_text(json.dumps({k: bad for k in found}))
        assert equals(model, x, cache=path)
    assert equals(model, x, cache=tmp_path)   # a folder
