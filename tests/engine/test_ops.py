"The engine's operations against torch's, accelerated networks against the original, and copies, threads and refusals"
import copy, pickle, random, re, threading

import pytest, torch
import torch.nn.functional as F
from torch import nn

from cases import in_a_loop
from nets import Net
from fasterai_sparse.core.criteria import large_final
from fasterai_sparse.core.masks import remove_masks
from fasterai_sparse.core.patterns import block, NM
from fasterai_sparse.core.sparsifier import Sparsifier
from fasterai_sparse.engine.accelerate import accelerate
from fasterai_sparse.engine.modules import Accelerated
from fasterai_sparse.engine.ops import acts, Convolution, engine_sets, Flat, Grid, Program, Split
from fasterai_sparse.engine.plan import Plan
from fasterai_sparse.engine.weights import conv_taps, Terms

SETS = list(engine_sets().items())
compiled = pytest.mark.skipif(not SETS, reason='no compiled library')
Plan.timed.__defaults__ = (0.,)   # these tests check results, not times
each_set = pytest.mark.parametrize('which', range(len(SETS)))

def sparse(model, percent=80, granularity='weight', layer_type=nn.Conv2d):
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(0, .3), m.running_var.uniform_(.5, 2)
            if m.affine: m.weight.data.uniform_(.5, 2), m.bias.data.normal_(0, .3)
    if percent: Sparsifier(model, granularity, 'local', large_final, layer_type=layer_type).sparsify_model(percent)
    return remove_masks(model).eval()

def same(a, b, eps=1e-5):
    a, b = (list(t) if isinstance(t, (tuple,list)) else [t] for t in (a, b))
    return len(a) == len(b) and all(x.shape == y.shape and bool((x-y).abs().max() <= eps*x.abs().max() + 1e-7)
                                    for x,y in zip(a, b))

def planned(model, x, which=0, threads=1, tune=True):
    plan = Plan(model, (x,), which, threads, tune=tune)
    return plan, plan(x)

# ---- operations
def conv_op(x, c, floats, act=None, residual=None, size=1, parts=1):
    "The operations that convolve the images `x` by `c`, and their output"
    with torch.no_grad(): out = c(x)
    (sy, sx) = ([s for _,s in conv_taps(k, s_, d, b)]
                for k,s_,d,b in zip(c.kernel_size, c.stride, c.dilation, c.padding))
    taps = [conv_taps(k, s_, d, b) for k,s_,d,b in zip(c.kernel_size, c.stride, c.dilation, c.padding)]
    phases = sorted({(a, b) for a,_ in taps[0] for b,_ in taps[1]})
    h, w = (-(-n//s) for n,s in zip(x.shape[2:], c.stride))
    grid = Grid(len(x))
    grid.include(h, w, max(0, -min(sy)), max(0, -min(sx)))
    grid.include(*out.shape[2:], 0, 0, max(0, *sy), max(0, *sx))
    taken, y = Flat(x.shape[1]*len(phases), h, w, grid, floats), Flat(out.shape[1], *out.shape[2:], grid, floats)
    r = None
    if residual is not None:
        r = Flat(out.shape[1], *out.shape[2:], grid, floats)
        r.view.copy_(residual)
    terms = Terms(c.weight, taken, c.groups, c.stride, c.dilation, c.padding, phases)
    mask = grid.mask(*out.shape[2:], floats)
    return [Split(x, taken, tuple(c.stride), phases),
            Convolution(taken, y, c.bias.detach().numpy(), *terms.conv_layout(size, parts), mask, act, r,
                        1 if size == 16 else 3)], y

CONVS = [dict(kernel_size=3, padding=1), dict(kernel_size=1), dict(kernel_size=5, padding=2, stride=2),
         dict(kernel_size=3, dilation=2, padding=2), dict(kernel_size=3), dict(kernel_size=(1,7), padding=(0,3)),
         dict(kernel_size=2, stride=2), dict(kernel_size=3, padding=1, groups=4),
         dict(kernel_size=3, padding=1, groups=8), dict(kernel_size=4, stride=3, padding=1),
         dict(kernel_size=3, padding=2), dict(kernel_size=(3,2), stride=(1,2), padding=(2,0))]

@compiled
@each_set
@in_a_loop('kwargs', CONVS)
@in_a_loop('act', acts)
def test_convolutions(which, kwargs, act):
    floats = SETS[which][1]
    x, c = torch.randn(2, 8, 11, 14), nn.Conv2d(8, 16, **kwargs)
    with torch.no_grad():
        c.weight[torch.rand_like(c.weight) < .6] = 0
        residual = torch.randn_like(c(x))
        want = c(x) + residual
        want = acts[act](want)
    for size,parts in ((1, 1), (1, 2), (4, 1), (16, 1)):
        if c.groups > 1 and (size > 1 or parts > 1): continue
        for run in ('torch', 1, 3):
            ops, y = conv_op(x, c, floats, act, residual, size, parts)
            p = Program(ops, which, None if run == 'torch' else run)
            p.run_torch() if run == 'torch' else p()
            assert same(want, y.view)
            inside = torch.zeros_like(y.memory, dtype=torch.bool)
            inside.as_strided(y.view.shape, y.view.stride(), y.begin).fill_(True)
            assert not y.memory[~inside].any()   # what lies between rows is the next layer's padding

@compiled
@each_set
@pytest.mark.parametrize('size', [(1,1), (3,5), (8,16), (17,31), (32,33)])
@pytest.mark.parametrize('stride', [(2,2), (1,2), (3,2), (2,1)])
def test_parts_equal_their_twin(which, size, stride):
    phases = [(a, b) for a in range(stride[0]) for b in range(stride[1])]
    grids = Grid(2), Grid(2)
    grids[0].include(*size, 1, 1), grids[1].include(*(-(-n//s) for n,s in zip(size, stride)), 1, 1)
    x = Flat(3, *size, grids[0], SETS[which][1])
    x.view.copy_(torch.randn(2, 3, *size))
    got = []
    for native in (False, True):
        y = Flat(3*len(phases), *(-(-n//s) for n,s in zip(size, stride)), grids[1], SETS[which][1])
        y.view.fill_(7.)   # of another use
        p = Program([Split(x, y, stride, phases)], which, 1)
        p() if native else p.run_torch()
        got.append(y.flat.clone())
    assert torch.equal(*got)

# ---- networks
conv = lambda i, o, k=3, **kw: nn.Conv2d(i, o, k, **{'padding': k//2, **kw})
NETS = {
    'chain': lambda: nn.Sequential(conv(3,8), nn.BatchNorm2d(8), nn.ReLU(), conv(8,16,stride=2), nn.SiLU(),
                                   conv(16,8,1,bias=False), nn.Hardswish()),
    'residual': lambda: Net(lambda s, x: F.relu(s.c(F.relu6(s.b(y := s.a(x)))) + y), a=conv(3,8), b=conv(8,16),
                            c=conv(16,8)),
    'residual first': lambda: Net(lambda s, x: F.relu((y := s.a(x)) + s.c(F.relu(s.b(y)))), a=conv(3,8), b=conv(8,16),
                                  c=conv(16,8)),
    'downsample': lambda: Net(lambda s, x: F.relu(s.bn(s.b(y := F.relu(s.a(x)))) + s.d(y)), a=conv(3,8),
                              b=conv(8,16,stride=2), bn=nn.BatchNorm2d(16), d=conv(8,16,1,stride=2)),
    'to the input': lambda: Net(lambda s, x: x + s.a(x), a=conv(3,3)),
    'doubled': lambda: Net(lambda s, x: s.b((y := s.a(x)) + y), a=conv(3,8), b=conv(8,4)),
    'pools': lambda: nn.Sequential(conv(3,8), nn.ReLU(), nn.MaxPool2d(3,2,1), conv(8,8), nn.MaxPool2d(2), conv(8,8),
                                   nn.ReLU(), nn.MaxPool2d(3,1,1), nn.AvgPool2d(2), conv(8,4)),
    'ceil': lambda: nn.Sequential(conv(3,8), nn.ReLU(), nn.MaxPool2d(3,2,ceil_mode=True), conv(8,4)),
    'head': lambda: nn.Sequential(conv(3,8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(.5),
                                  nn.Linear(8,5)),
    'two Linears': lambda: nn.Sequential(conv(3,8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(.5),
                                         nn.Linear(8,12), nn.ReLU(), nn.Dropout(.1), nn.Linear(12,5,bias=False)),
    'read flat and not': lambda: Net(lambda s, x: (s.b((y := s.p(s.a(x))).flatten(1)), y, y.flatten(1)*2), a=conv(3,8),
                                     p=nn.AdaptiveAvgPool2d(1), b=nn.Linear(8,5)),
    'features are added': lambda: Net(lambda s, x: s.c((y := s.a(x).mean((2,3))) + s.b(y)), a=conv(3,8),
                                      b=nn.Linear(8,8), c=nn.Linear(8,5)),
    'mean': lambda: Net(lambda s, x: s.b(s.a(x).mean((2,3))), a=conv(3,8), b=nn.Linear(8,5)),
    'kept mean': lambda: Net(lambda s, x: s.b(s.a(x).mean([-2,-1], keepdim=True)), a=conv(3,8), b=conv(8,5,1)),
    'squeeze and excite': lambda: Net(
        lambda s, x: s.d((y := s.a(x))*torch.sigmoid(s.c(F.relu(s.b(F.adaptive_avg_pool2d(y, 1)))))),
        a=conv(3,8), b=conv(8,4,1), c=conv(4,8,1), d=conv(8,4)),
    'concat': lambda: Net(lambda s, x: s.c(torch.cat([s.a(x), s.b(x)], 1)), a=conv(3,8), b=conv(3,4,1), c=conv(12,4)),
    'valid': lambda: nn.Sequential(conv(3,8,padding=0), nn.ReLU(), conv(8,8,5,padding=0), conv(8,8,padding=2),
                                   conv(8,4,1,padding=1)),
    'depthwise': lambda: nn.Sequential(conv(3,8), nn.ReLU6(), conv(8,16,groups=8), nn.ReLU6(), conv(16,4,1)),
    'same': lambda: nn.Sequential(conv(3,8,4,padding='same'), nn.ReLU(), conv(8,4,3,padding='same',dilation=3)),
    'reflected': lambda: nn.Sequential(conv(3,8), conv(8,8,padding_mode='reflect'), conv(8,4)),
    'transposed': lambda: nn.Sequential(conv(3,8), nn.ConvTranspose2d(8,8,2,2), conv(8,4)),
    'shapes': lambda: Net(lambda s, x: s.b((y := s.a(x)).view(y.shape[0], -1, y.size(2), y.size(3)) * y.shape[1]),
                          a=conv(3,8), b=conv(8,4)),
    'several outputs': lambda: Net(lambda s, x: ((y := F.relu(s.a(x))), s.b(y), [y.flatten(1)]), a=conv(3,8),
                                   b=conv(8,4)),
    'unet': lambda: Net(lambda s, x: s.d(torch.cat([y := F.relu(s.a(x)),
                                                    F.interpolate(s.c(F.relu(s.b(y))), size=y.shape[-2:])], 1)),
                        a=conv(3,8), b=conv(8,16,stride=2), c=conv(16,8), d=conv(16,4)),
    'shared': lambda: Net(lambda s, x: s.b(F.relu(s.b(s.a(x)))), a=conv(3,8), b=conv(8,8)),
    'all zero': lambda: nn.Sequential(conv(3,8), nn.ReLU(), conv(8,4)).apply(
        lambda m: isinstance(m, nn.Conv2d) and nn.init.zeros_(m.weight)),
    'images folded': lambda: Net(
        lambda s, x: s.b(F.relu(s.a(x.reshape(-1, 1, x.shape[2], x.shape[3])))
                         .reshape(x.shape[0], -1, x.shape[2], x.shape[3])), a=conv(1,4), b=conv(12,4)),
    'eps': lambda: nn.Sequential(conv(3,8), nn.BatchNorm2d(8, eps=.5), nn.ReLU(), conv(8,4)),
    'no affine': lambda: nn.Sequential(conv(3,8), nn.BatchNorm2d(8, affine=False), nn.ReLU(), conv(8,4)),
}
flattened = lambda out: [t for o in (out if isinstance(out, (tuple,list)) else [out])
                         for t in (o if isinstance(o, (tuple,list)) else [o])]

@compiled
@pytest.mark.parametrize('name', NETS)
@pytest.mark.parametrize('shape', [(1,3,16,16), (3,3,13,19)])
def test_networks(name, shape):
    model = sparse(NETS[name](), 0 if name == 'all zero' else 70)
    x = torch.randn(shape)
    with torch.no_grad(): want = flattened(model(x))
    for which in range(len(SETS)):
        plan, got = planned(model, x, which, 1 + which)
        assert same(want, flattened(got)) and plan.layers
        for _ in range(2): assert same(want, flattened(plan(x)))   # memory is used again

def random_conv(rng, c, o):
    size, stride = rng.choice([1,3,5]), rng.choice([1,1,2])
    padding, dilation = rng.randint(0, size//2 + 1), rng.choice([1,1,2]) if size == 3 else 1
    return nn.Conv2d(c, o, size, stride, padding, dilation, bias=rng.random() < .5)

RANDOM_LAYERS = dict(   # kind -> a layer for `c` channels, if it can have `o` outputs
    conv=random_conv,
    depthwise=lambda rng, c, o: nn.Conv2d(c, c*2, 3, 1, 1, groups=c),
    act=lambda rng, c, o: rng.choice([nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish])(),
    bn=lambda rng, c, o: nn.BatchNorm2d(c),
    residual=lambda rng, c, o: nn.Conv2d(c, c, 3, 1, 1),
    pool=lambda rng, c, o: nn.MaxPool2d(3, rng.choice([1,2]), 1),
    cat=lambda rng, c, o: nn.Conv2d(c, 4, 1),
    sigmoid=lambda rng, c, o: nn.Sigmoid())

class RandomNet(nn.Module):
    "A network of random layers with residuals and concatenations"
    def __init__(self, rng):
        super().__init__()
        self.mods, self.kinds, c = nn.ModuleList(), [], 3
        for _ in range(rng.randint(3, 9)):
            o, kind = rng.choice([4, 8, 12]), rng.choice(['conv', 'conv', *RANDOM_LAYERS])
            self.mods.append(RANDOM_LAYERS[kind](rng, c, o)), self.kinds.append(kind)
            c = getattr(self.mods[-1], 'out_channels', c) + (c if kind == 'cat' else 0)
    def forward(self, x):
        for m,kind in zip(self.mods, self.kinds):
            x = x + m(x) if kind == 'residual' else torch.cat([x, m(x)], 1) if kind == 'cat' else m(x)
        return x

@compiled
@pytest.mark.parametrize('seed', range(60))
def test_random_networks(seed):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    model, x = sparse(RandomNet(rng), 0), torch.randn(rng.choice([1,2]), 3, rng.randint(12, 24), rng.randint(12, 24))
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 4: p[torch.rand_like(p) < rng.random()] = 0
        try: want = model(x)
        except RuntimeError: return   # the images have become too small
    if not any(isinstance(m, (nn.Conv2d, nn.BatchNorm2d)) for m in model.modules()): return   # nothing for the engine
    _, got = planned(model, x, rng.randrange(len(SETS)), rng.choice([1,2]), tune=rng.random() < .5)
    assert same(want, got, 1e-4)

@compiled
@pytest.mark.parametrize('granularity', ['weight', 'filter', 'kernel', NM(2,4), block(4,1)])
def test_patterns(granularity):
    model = sparse(nn.Sequential(conv(4,16), nn.ReLU(), conv(16,32), nn.ReLU(), conv(32,8)), 50, granularity)
    x = torch.randn(2,4,12,12)
    with torch.no_grad(): assert same(model(x), planned(model, x)[1])

# ---- the accelerated model
def small():
    return sparse(nn.Sequential(conv(3,16), nn.ReLU(), conv(16,16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                                nn.Linear(16,4)), 90)

@compiled
def test_report():
    model = sparse(nn.Sequential(conv(3,64), nn.ReLU(), conv(64,64), nn.ReLU(), conv(64,64), nn.AdaptiveAvgPool2d(1),
                                 nn.Flatten(), nn.Linear(64,4)), 95)
    x = torch.randn(1,3,64,64)
    before = copy.deepcopy(model.state_dict())
    fast, df = accelerate(model, x, threads=1)
    assert df.layer.tolist() == ['0', '2', '4', '7'] and df.sparsity_pct[1] == pytest.approx(95, abs=.1)
    assert df.note[3] == '0 % sparse: little to skip' and (df.sparse_ms > 0).all() and (df.dense_ms > 0).all()
    assert df.attrs['weights_mb'] > 0 and (accelerate(model, x, threads=2)[1].sparse_ms > 0).all()
    assert df.attrs['note'] == '' and isinstance(fast, Accelerated) or 'as it is' in df.attrs['note'] and fast is model
    assert all(torch.equal(v, before[k]) for k,v in model.state_dict().items())

@compiled
def test_what_is_not_finite_goes_through():
    model, fast = (m := small()), Accelerated(copy.deepcopy(m))
    for bad in (float('nan'), float('inf'), -float('inf')):
        x = torch.randn(2,3,8,8)
        x[0,1,2,3] = bad
        with torch.no_grad():
            assert torch.equal(model(x).isnan(), fast(x).isnan()) and torch.equal(model(x).isinf(), fast(x).isinf())

@compiled
def test_other_inputs():
    model = small()
    fast, x = Accelerated(copy.deepcopy(model)), torch.randn(4,3,9,10)
    with torch.no_grad():
        for y in (x, x.to(memory_format=torch.channels_last), x[::2], x[:,:,:,::2], x[:1], torch.randn(2,3,20,7)):
            assert same(model(y), fast(y))
        assert fast(x[:0]).shape == (0, 4) and len(fast.plans) <= 8
    for bad in (x.double(), x.half(), x.to(torch.complex64)):
        with pytest.raises(TypeError, match='float32'): fast(bad)
    with pytest.raises(RuntimeError, match='no gradients'): fast(x.requires_grad_())
    with pytest.raises(RuntimeError, match='for inference'): fast.train()
    assert not fast.eval().training

@compiled
def test_outputs_are_their_own():
    for make in (small, lambda: sparse(nn.Sequential(conv(3,4,1), nn.ReLU()), 50),
                 lambda: sparse(NETS['several outputs']())):
        fast = Accelerated(make())
        with torch.no_grad():
            first = flattened(fast(torch.randn(1,3,4,4)))
            was = [t.clone() for t in first]
            fast(torch.randn(1,3,4,4))
        assert all(torch.equal(a, b) for a,b in zip(first, was))

@compiled
def test_copies_and_pickles():
    fast, x = Accelerated(small()), torch.randn(2,3,8,8)
    with torch.no_grad():
        want = fast(x)
        for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
            assert same(want, other(x)) and other.plans and other.number != fast.number

@compiled
def test_several_threads_at_once():
    fast, xs, failed = Accelerated(small(), threads=2), [torch.randn(1+i%2,3,8,8) for i in range(8)], []
    with torch.no_grad(): want = [fast.model(x) for x in xs]
    def work(i):
        try:
            with torch.no_grad():
                for n in range(30):
                    if not same(want[i], fast(xs[i])): failed.append(i)
                    traces = n % 10 == i   # while the other threads compute
                    if traces and not same(want[i], Accelerated(fast.model, 1, None)(xs[i])): failed.append(i)
        except Exception as e: failed.append(e)
    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    [t.start() for t in threads], [t.join() for t in threads]
    assert not failed

def test_what_can_not_be_accelerated_comes_back():
    x = torch.randn(2,3,8,8)
    decides = Net(lambda s, x: s.a(x) if x.sum() > 0 else x, a=conv(3,3))
    for model,why in ((decides, 'untraceable .*control flow|no engine'),
                      (nn.Sequential(nn.Flatten(), nn.Linear(192,4)), 'no convolution|no engine')):
        fast, df = accelerate(model, x)
        assert fast is model and re.search(why, df.attrs['note']) and len(df)
    with pytest.raises(ValueError, match='needs example_input='): accelerate(decides)

@compiled
def test_changes_in_place():
    "A model that changes a value in place while other operations read it is returned unchanged"
    model = sparse(Net(lambda s, x: (y := s.a(x)) + s.b(F.relu(y, inplace=True)), a=conv(3,4), b=conv(4,4)))
    x = torch.randn(1,3,8,8)
    fast, df = accelerate(model, x)
    assert fast is model and 'in place' in df.attrs['note']

@compiled
def test_no_memory_beyond_is_read():
    "The zero padding around activations stays zero"
    model, x = sparse(NETS['pools']()), torch.randn(2,3,16,16)
    plan, _ = planned(model, x)
    for op in plan.ops:
        y = getattr(op, 'y', None)
        if isinstance(y, Flat):
            inside = torch.zeros_like(y.memory, dtype=torch.bool)
            for other in plan.ops:
                o = getattr(other, 'y', None)
                if isinstance(o, Flat) and o.memory is y.memory:
                    inside.as_strided(o.view.shape, o.view.stride(), o.begin).fill_(True)
            assert not y.memory[~inside].any()

@compiled
def test_a_learner():
    from callback_helpers import learner
    learn = learner(model=sparse(nn.Sequential(conv(2,32), nn.ReLU(), conv(32,32), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
                                               nn.Flatten(), nn.Linear(32,4)), 90))
    fast, report = learn.accelerate()
    with learn.no_bar(), learn.no_logging(), fast.no_bar(), fast.no_logging():
        assert same(learn.get_preds()[0], fast.get_preds()[0])
        assert list(learn.validate()) == pytest.approx(list(fast.validate()), rel=1e-4)
    assert report.layer.tolist() == ['0', '2', '6'] and 'dense_ms' in report.attrs
