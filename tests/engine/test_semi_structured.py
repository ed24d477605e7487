"""2:4 layers on CUDA: which layers fit, which are faster, and conversion back.

Without a GPU, torch's unpacking replaces the kernels."""
import io, math, pickle, subprocess, sys
from copy import deepcopy

import pytest, torch
import torch.nn.functional as F
from fastai.basics import TensorBase
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.sparse import (
    SparseSemiStructuredTensor, SparseSemiStructuredTensorCUSPARSELT, SparseSemiStructuredTensorCUTLASS)
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass, sparse_semi_structured_to_dense_cutlass)

from fasterai_sparse.core.criteria import large_final
from fasterai_sparse.core.masks import masked_params
from fasterai_sparse.core.sparsifier import Sparsifier
from fasterai_sparse.nm.verify import verify_nm
from fasterai_sparse.engine.semi_structured import (
    _Layer24, accelerate_cuda, backends_24, Conv24, cuda_race, Linear24, probe_24, Reference24, to_dense, why_not_24)

HALF = [torch.float16, torch.bfloat16]
CUSPARSELT, CUTLASS = SparseSemiStructuredTensorCUSPARSELT, SparseSemiStructuredTensorCUTLASS

def gpu(test):
    for mark in (pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device')):
        test = mark(test)
    return test

def two_four(*shape, dtype=torch.float16):
    "Random values, two of four zero, at random places"
    w = torch.randn(shape).to(dtype)
    w[w == 0] = 1
    groups = w.view(-1, 4)
    groups.scatter_(1, torch.rand(groups.shape).argsort(1)[:,:2], 0)
    return w

def pruned(m, dtype=torch.float16):
    m.to(dtype)
    w = two_four(m.weight.shape[0], m.weight[0].numel(), dtype=dtype)
    m.weight.data = (w/w.shape[1]**.5).view(m.weight.shape)
    return m

def race(quick=('Linear24', 'Conv24'), whole=True):
    "Replace the clock: layers of the classes `quick` take half the time, and so does a model with them if `whole`"
    def ms(f):
        m = getattr(f.func, '__self__', f.func)
        f()
        if type(m).__name__ in ('Linear24', 'Conv24', 'Linear', 'Conv2d') and hasattr(f.func, '__self__'):
            return .5 if type(m).__name__ in quick else 1.
        return 1. if not any(isinstance(c, _Layer24) for c in m.modules()) else .5 if whole else 2.
    return lambda *fs: [ms(f) for f in fs]

def fast_of(model, *x, **kwargs):
    kwargs = dict(backends=[Reference24], race=race()) | kwargs
    return accelerate_cuda(model, *x, **kwargs)

class Net(nn.Module):
    def __init__(self, dtype=torch.float16):
        super().__init__()
        self.conv, self.norm = pruned(nn.Conv2d(64, 128, 1), dtype), nn.BatchNorm2d(128, dtype=dtype)
        self.up, self.down = pruned(nn.Linear(128, 256), dtype), pruned(nn.Linear(256, 64, bias=False), dtype)
        self.drop, self.head = nn.Dropout(.5), nn.Linear(64, 10, dtype=dtype)
    def forward(self, x): return self.head(self.drop(self.down(F.gelu(self.up(self.norm(self.conv(x)).flatten(2).mT)))))

def kinds(model): return [type(m).__name__ for m in model.children()]
def same(a, b):
    return all(torch.equal(p, q) for p,q in zip(a.state_dict().values(), b.state_dict().values(), strict=True))

# --- the oracle

@pytest.mark.parametrize('dtype', HALF)
@pytest.mark.parametrize('shape', [(32,64), (64,64), (32,192), (160,320), (1024,256)])
def test_compression_is_bit_exact(shape, dtype):
    w = two_four(*shape, dtype=dtype)
    packed, meta = sparse_semi_structured_from_dense_cutlass(w)
    assert packed.shape == (shape[0], shape[1]//2) and packed.dtype == dtype
    assert torch.equal(sparse_semi_structured_to_dense_cutlass(packed, meta).view(torch.int16), w.view(torch.int16))

@pytest.mark.parametrize('dtype', HALF)
@pytest.mark.parametrize('live', [0, 1, 2])
def test_groups_with_fewer_live_weights(live, dtype):
    w = two_four(32, 64, dtype=dtype)
    w.view(-1, 4)[:,live:] = 0
    assert torch.equal(Reference24.from_dense(w).to_dense(), w)

@pytest.mark.parametrize('dtype', HALF)
def test_smallest_and_largest_values_come_back(dtype):
    w, info = two_four(32, 64, dtype=dtype), torch.finfo(dtype)
    w.view(-1, 4)[:2] = torch.tensor([[info.tiny, 0, 0, -info.tiny], [0, info.max, info.min, 0]], dtype=dtype)
    assert torch.equal(Reference24.from_dense(w).to_dense(), w)

@pytest.mark.parametrize('dtype', HALF)
@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('shape', [(128,), (1,128), (7,128), (2,3,128), (2,0,128), (2,3,4,128)])
@pytest.mark.parametrize('mode', [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_linear(shape, bias, dtype, mode):
    m, x = pruned(nn.Linear(128, 64, bias), dtype), torch.randn(shape).to(dtype)
    fast, _ = fast_of(m, torch.randn(3, 128).to(dtype))
    assert type(fast) is Linear24 and isinstance(fast.weight, SparseSemiStructuredTensor)
    with mode(): torch.testing.assert_close(fast(x), m(x), rtol=2e-2, atol=2e-2)

@pytest.mark.parametrize('shape', [(2,128,5,7), (1,128,1,1), (128,5,7), (0,128,5,7)])
@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
def test_conv(shape, layout):
    m, x = pruned(nn.Conv2d(128, 64, 1)), torch.randn(shape).half()
    if x.dim() == 4: x = x.to(memory_format=layout)
    fast, _ = fast_of(m.to(memory_format=layout), torch.randn(1, 128, 2, 2).half())
    assert type(fast) is Conv24 and fast.weight.shape == (64,128)
    torch.testing.assert_close(fast(x), m(x), rtol=2e-2, atol=2e-2)

def test_inputs_that_are_not_contiguous():
    m, x = pruned(nn.Linear(128, 64)), torch.randn(128, 6, 2).half().permute(2, 1, 0)
    fast, _ = fast_of(m, x)
    with torch.inference_mode(): torch.testing.assert_close(fast(x), m(x), rtol=2e-2, atol=2e-2)

# --- reasons

def with_broken(n):
    m = pruned(nn.Linear(64, 32))
    m.weight.data.view(-1, 4)[:n] = 1
    return m

def changed(m, **kwargs):
    for k,v in kwargs.items(): setattr(m, k, v)
    return m

class Scaled(nn.Linear):
    def forward(self, x): return 2*super().forward(x)

class Standardized(nn.Conv2d):
    def _conv_forward(self, x, weight, bias): return super()._conv_forward(x, weight-weight.mean(), bias)

class Renamed(nn.Linear): pass

REASONS = [(lambda: pruned(nn.Linear(64, 32)), ''), (lambda: pruned(nn.Linear(64, 32), torch.bfloat16), ''),
           (lambda: pruned(Renamed(64, 32)), ''),
    (lambda: pruned(nn.Conv2d(64, 32, 1)), ''), (lambda: pruned(nn.Conv2d(64, 32, 1, padding='same')), ''),
    (lambda: pruned(nn.Conv2d(64, 32, 1, dilation=2)), ''),
    (lambda: pruned(nn.Linear(64, 1000)), 'out=1000 is not a multiple of 16'),
    (lambda: pruned(nn.Linear(72, 32)), 'in=72 is not a multiple of 16'),
    (lambda: pruned(nn.Linear(64, 8)), 'out=8 is not a multiple of 16'),
    (lambda: pruned(nn.Conv2d(64, 24, 1)), 'out=24 is not a multiple of 16'),
    (lambda: pruned(nn.Linear(64, 32), torch.float32), 'no 2:4 for float32: call .half() or .bfloat16() on the model'),
    (lambda: pruned(nn.Linear(64, 32), torch.float64), 'no 2:4 for float64: call .half() or .bfloat16() on the model'),
    (lambda: nn.Linear(64, 32).half(), 'its weight is dense'),
    (lambda: with_broken(1), 'not 2:4: 1 of 512 groups keep more than 2'),
    (lambda: with_broken(511), 'not 2:4: 511 of 512 groups keep more than 2'),
    (lambda: pruned(nn.Conv2d(64, 32, 3)), '3×3: only a 1×1 convolution is a matmul'),
    (lambda: pruned(nn.Conv2d(64, 32, (1,3))), '1×3: only a 1×1 convolution is a matmul'),
    (lambda: pruned(nn.Conv2d(64, 32, 1, stride=2)), 'stride=(2, 2): only stride 1 is a matmul'),
    (lambda: pruned(nn.Conv2d(64, 32, 1, groups=2)), 'groups=2: not one matmul'),
    (lambda: pruned(nn.Conv2d(64, 32, 1, padding=1)), 'padding=(1, 1): only an unpadded 1×1 convolution is a matmul'),
    (lambda: nn.Conv1d(64, 32, 1).half(), 'neither Linear nor a 1×1 convolution'),
    (lambda: nn.ConvTranspose2d(64, 32, 1).half(), 'neither Linear nor a 1×1 convolution'),
    (lambda: nn.LSTM(64, 32).half(), 'neither Linear nor a 1×1 convolution'),
    (lambda: pruned(Scaled(64, 32)), 'Scaled has a forward of its own'),
    (lambda: pruned(Standardized(64, 32, 1)), 'Standardized has a forward of its own'),
    (lambda: changed(pruned(nn.Linear(64, 32)), forward=lambda x: x), 'Linear has a forward of its own'),
    (lambda: nn.LazyLinear(32), 'is lazy: pass one batch through the model first'),
    (lambda: prune.l1_unstructured(nn.Linear(64, 32), 'weight', .5),
     'is computed from weight_orig (torch.nn.utils.prune or spectral_norm): remove that first'),
    (lambda: parametrizations.orthogonal(nn.Linear(64, 32)),
     'is parametrized: call parametrize.remove_parametrizations first')]

@pytest.mark.parametrize('make,why', REASONS, ids=range(len(REASONS)))
def test_reasons(make, why): assert why_not_24(make()) == why

@pytest.mark.parametrize('value', [math.inf, -math.inf, math.nan])
def test_values_that_are_not_finite(value):
    m = pruned(nn.Linear(64, 32))
    m.weight.data.view(-1, 4)[5] = torch.tensor([0, value, 0, 1])
    assert why_not_24(m) == 'its weight is not finite'

@pytest.mark.parametrize('backend,rows,cols', [(CUSPARSELT, 16, 16), (CUTLASS, 32, 64), (Reference24, 32, 64)])
@pytest.mark.parametrize('dtype', HALF)
def test_shapes_that_fit(backend, rows, cols, dtype):
    for out in range(8, 200, 8):
        for n in range(8, 200, 8):
            why = why_not_24(pruned(nn.Linear(n, out)), backend, dtype)
            fits = f'in={n} is not a multiple of {cols}' if n % cols else ''
            assert why == (f'out={out} is not a multiple of {rows}' if out % rows else fits)

def test_asking_for_another_type():
    assert why_not_24(pruned(nn.Linear(64, 32), torch.float32), dtype=torch.bfloat16) == ''

def test_nothing_is_promised_of_a_cpu():
    whys = probe_24('cpu')
    assert list(whys) == ['cusparselt', 'cutlass'] and all(whys.values())
    assert probe_24('cpu', backends=[Reference24]) == {'reference': ''}

def test_a_kernel_that_computes_something_else_is_found():
    class Wrong(Reference24):
        BACKEND = 'wrong'
        def _mm(self, *args, **kwargs): return 1.1*super()._mm(*args, **kwargs)
    assert 'differs from dense by' in probe_24('cpu', backends=[Wrong])['wrong']

# --- whole models

@pytest.mark.parametrize('dtype', HALF)
def test_there_and_back(dtype):
    net, x = Net(dtype).train(), torch.randn(4, 64, 5, 5).to(dtype)
    before = deepcopy(net)
    fast, report = fast_of(net, x)
    assert same(net, before) and net.training and kinds(net)[0] == 'Conv2d'
    assert not any(m._forward_hooks or 'forward' in vars(m) for m in (*net.modules(), *fast.modules()))
    assert type(fast) is Net and not fast.training
    assert kinds(fast) == ['Conv24', 'BatchNorm2d', 'Linear24', 'Linear24', 'Dropout', 'Linear']
    with torch.no_grad(): torch.testing.assert_close(fast(x), net.eval()(x), rtol=5e-2, atol=5e-2)
    ours, theirs = net.parameters(), [p for p in fast.parameters() if type(p) is nn.Parameter]
    assert not {p.data_ptr() for p in ours} & {p.data_ptr() for p in theirs}
    dense = to_dense(fast)
    assert dense is fast and kinds(dense) == kinds(net) and same(dense, before)
    assert all(p.requires_grad for p in dense.parameters()) and 'dense_form' not in vars(dense.up)
    dense.train()(x).sum().backward()
    assert all(p.grad is not None for p in dense.parameters())

def test_report():
    net = Net()
    net.idle, net.big = pruned(nn.Linear(64, 32)), nn.Conv2d(64, 64, 3).half()
    fast, report = fast_of(net, torch.randn(4, 64, 5, 5).half(), race=race(quick=('Linear24',)))
    assert list(report) == ['layer', 'kind', 'sparsity_pct', 'dense_ms', 'sparse_ms', 'form', 'note']
    rows = report.set_index('layer')
    assert list(rows.index) == ['conv', 'up', 'down', 'head', 'idle', 'big']
    assert list(rows.kind) == ['Conv2d', 'Linear', 'Linear', 'Linear', 'Linear', 'Conv2d']
    assert list(rows.sparsity_pct[:3]) == [50]*3 and rows.sparsity_pct['big'] == 0
    assert dict(rows.form) == dict(conv='dense', up='2:4, reference', down='2:4, reference', head='dense',
                                   idle='dense', big='dense')
    assert dict(rows.note) == dict(conv='dense is quicker', up='', down='', head='out=10 is not a multiple of 32',
                                   idle='is not called with this batch: its weight is read elsewhere, or not at all',
                                   big='3×3: only a 1×1 convolution is a matmul')
    assert tuple(rows.loc['conv', ['dense_ms', 'sparse_ms']]) == (1, 1)
    assert tuple(rows.loc['up', ['dense_ms', 'sparse_ms']]) == (1, .5)
    assert rows.loc[['head', 'idle', 'big'], ['dense_ms', 'sparse_ms']].isna().all(None)
    assert report.attrs == dict(dense_ms=1, sparse_ms=.5, note='')
    assert kinds(fast) == ['Conv2d', 'BatchNorm2d', 'Linear24', 'Linear24', 'Dropout', 'Linear', 'Linear', 'Conv2d']

def test_the_model_itself_where_the_whole_is_not_quicker():
    net = Net()
    fast, report = fast_of(net, torch.randn(4, 64, 5, 5).half(), race=race(whole=False))
    assert fast is net and kinds(net)[0] == 'Conv2d'
    assert report.attrs == dict(dense_ms=1, sparse_ms=2, note='the model is quicker as it is: 1.00 ms, and 2.00 as 2:4')

@pytest.mark.parametrize('kwargs,change,note', [
    (dict(race=race(quick=())), lambda m: m, 'no layer is quicker as 2:4'),
    ({}, lambda m: m.apply(lambda c: c.weight.data.fill_(1) if hasattr(c, 'weight') else c), 'no layer can run as 2:4'),
    ({}, nn.Module.float, 'no 2:4 for float32: call .half() or .bfloat16() on the model'),
    ({}, lambda m: changed(m, head=nn.Linear(64, 10, device='meta')),
     'its parameters are on cpu, meta, not on one GPU')])
def test_the_model_itself_where_nothing_is_gained(kwargs, change, note):
    net = change(Net())
    x = torch.randn(4, 64, 5, 5).to(net.conv.weight.dtype)
    fast, report = fast_of(net, x, **kwargs)
    assert fast is net and report.attrs == dict(note=note) and len(report) == 4 and list(report.form) == ['dense']*4

def test_no_kernel_on_a_cpu():
    net = Net()
    fast, report = accelerate_cuda(net, torch.randn(4, 64, 5, 5).half())
    assert fast is net and report.attrs['note'].startswith('no 2:4 kernel runs here: cusparselt: ')
    assert 'cutlass: ' in report.attrs['note']
    assert report.note[3] == 'out=10 is not a multiple of 16' and report.note[0].startswith('RuntimeError')

def test_models_without_layers_or_parameters():
    for net, note in ((nn.ReLU(), 'its parameters are on no device, not on one GPU'),
                      (nn.LayerNorm(4).half(), 'no layer can run as 2:4')):
        fast, report = fast_of(net, torch.ones(4).half())
        assert fast is net and report.attrs == dict(note=note) and report.empty

class Slow(Reference24):
    BACKEND = 'slow'
    @classmethod
    def from_dense(cls, w, alg_id=0): return super().from_dense(w)

def test_the_quicker_backend_of_two():
    def by_backend(*fs):
        names = [getattr(getattr(f.func, '__self__', None), 'weight', None) for f in fs]
        return [.5 if type(w) is Reference24 else .7 if type(w) is Slow else 1-.5*i for i,w in enumerate(names)]
    fast, report = fast_of(Net(), torch.randn(4, 64, 5, 5).half(), backends=[Slow, Reference24], race=by_backend)
    assert list(report.form) == ['2:4, reference']*3 + ['dense'] and type(fast.up.weight) is Reference24

def test_the_reason_is_that_of_a_backend_that_runs():
    fast, report = fast_of(Net(), torch.randn(4, 64, 5, 5).half(), backends=[CUSPARSELT, Reference24])
    assert list(report.note) == ['', '', '', 'out=10 is not a multiple of 32']
    assert list(report.form[:3]) == ['2:4, reference']*3

def test_half_layers_in_a_float32_model():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(64, 64), pruned(nn.Linear(64, 64))
        def forward(self, x): return self.b(self.a(x).half())
    fast, report = fast_of(Mixed(), torch.randn(4, 64))
    assert list(report.form) == ['dense', '2:4, reference'] and report.note[0].startswith('no 2:4 for float32')

def test_a_compression_that_loses_values():
    class Lossy(Reference24):
        BACKEND = 'lossy'
        @classmethod
        def from_dense(cls, w, alg_id=0): return super().from_dense(w if w.shape == (128,128) else w*1.01)
    fast, report = fast_of(Net(), torch.randn(4, 64, 5, 5).half(), backends=[Lossy])
    assert set(report.note[:3]) == {'RuntimeError: the values change when they are compressed'}

def failing(**methods): return type('Failing', (Reference24,), dict(BACKEND='failing', **methods))

def after_probe(error):
    "A backend whose products are passed to `error`, except in the shape of the probe"
    def mm(self, B, **kwargs):
        out = Reference24._mm(self, B, **kwargs)
        if tuple(self.shape) == (128,128): return out
        return error(out)
    return failing(_mm=mm)

def boom(out): raise RuntimeError('no kernel for this shape\nand more')

@pytest.mark.parametrize('error,note',
                         [(boom, 'RuntimeError: no kernel for this shape'),
                          (lambda out: out*1.5, 'differs from dense by 50.0%'),
                          (lambda out: out*math.nan, 'differs from dense by nan%')])
def test_a_kernel_that_goes_wrong_at_a_layer(error, note):
    net = Net()
    fast, report = fast_of(net, torch.randn(4, 64, 5, 5).half(), backends=[after_probe(error)])
    assert fast is net and set(report.note[:3]) == {note} and report.attrs == dict(note='no layer is quicker as 2:4')

def test_another_backend_stands_in_where_one_goes_wrong():
    fast, report = fast_of(Net(), torch.randn(4, 64, 5, 5).half(), backends=[after_probe(boom), Reference24])
    assert list(report.form[:3]) == ['2:4, reference']*3

def test_a_model_that_goes_wrong_as_a_whole():
    class Picky(Net):
        def forward(self, x):
            if any(isinstance(m, _Layer24) for m in self.modules()): raise TypeError('not mine')
            return super().forward(x)
    fast, report = fast_of(net := Picky(), torch.randn(4, 64, 5, 5).half())
    assert fast is net and report.attrs == dict(note='as 2:4 the model raises TypeError: not mine')
    class Other(Net):
        def forward(self, x):
            return super().forward(x)*(2 if any(isinstance(m, _Layer24) for m in self.modules()) else 1)
    fast, report = fast_of(net := Other(), torch.randn(4, 64, 5, 5).half())
    assert fast is net and report.attrs == dict(note='as 2:4 the model differs from dense by 100.0%')

def test_a_model_that_fails_leaves_nothing_behind():
    net = Net()
    with pytest.raises(RuntimeError): fast_of(net, torch.randn(4, 3, 5, 5).half())
    assert not any('forward' in vars(m) for m in net.modules())

def test_a_layer_that_is_called_often():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = self.b = pruned(nn.Linear(64, 64))
        def forward(self, x): return self.b(self.a(self.a(input=x)))[:1] + self.a(x[:1])
    fast, report = fast_of(net := Twice(), torch.randn(4, 64).half())
    assert len(report) == 1 and (report.dense_ms[0], report.sparse_ms[0]) == (4, 2) and fast.a is fast.b
    assert type(fast.a) is Linear24
    assert same(to_dense(fast), net) and fast.a is fast.b

def test_tied_weights_stay_dense():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.e, self.a, self.head = nn.Embedding(64, 64).half(), pruned(nn.Linear(64, 64)), nn.Linear(64, 64).half()
            self.b, self.c = pruned(nn.Linear(64, 64)), nn.Linear(64, 64).half()
            self.head.weight, self.c.weight = self.e.weight, self.b.weight
            self.e.weight.data = two_four(64, 64)
        def forward(self, x): return self.head(self.c(self.b(self.a(self.e(x)))))
    fast, report = fast_of(Tied(), torch.arange(8))
    assert list(report.note) == ['', *['shares its weight with another layer']*3]
    assert kinds(fast) == ['Embedding', 'Linear24', 'Linear', 'Linear', 'Linear'] and fast.head.weight is fast.e.weight
    assert fast.b.weight is fast.c.weight

def test_masks_and_frozen_weights():
    net = Net().float()
    for m in (net.conv, net.up, net.down): nn.init.normal_(m.weight)
    s = Sparsifier(net, 'weight', 'local', large_final, nm=True, layer_type=(nn.Linear, nn.Conv2d))
    s.sparsify_model(dict(conv=50, up=50, down=50))
    net.half().up.weight.requires_grad_(False)
    masks = [m for *_,m in masked_params(net)]
    fast, report = fast_of(net, torch.randn(4, 64, 5, 5).half())
    assert list(report.form[:3]) == ['2:4, reference']*3 and not list(masked_params(fast))
    assert all(a is b for a,b in zip(masks, [m for *_,m in masked_params(net)], strict=True))
    assert [p.requires_grad for p in to_dense(fast).parameters()] == [p.requires_grad for p in net.parameters()]
    assert set(verify_nm(fast, layer_type=nn.Linear).pattern[:2]) == {'2:4'}

def test_a_subclass_and_its_hooks_come_back():
    m = pruned(Renamed(64, 32))
    m.extra, seen = 'kept', []
    m.register_forward_hook(lambda *args: seen.append(1))
    fast, _ = fast_of(m, torch.randn(2, 64).half())
    n = len(seen)
    assert type(fast) is Linear24 and fast.extra == 'kept' and isinstance(fast, nn.Linear)
    fast(torch.randn(2, 64).half())
    assert len(seen) == n+1 and type(to_dense(fast)) is Renamed

def test_transformer_encoder_layers_stay_on_their_fast_path():
    net = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True).eval()
    for m in (net.linear1, net.linear2): pruned(m)
    net.half()
    x = torch.randn(2, 5, 64).half()
    with torch.no_grad(): want = net(x)
    fast, report = fast_of(net, x)
    assert fast is net and all('is not called' in n for n in report.note[1:])
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        fast, report = fast_of(net, x)
        assert kinds(fast).count('Linear24') == 2
        with torch.no_grad(): torch.testing.assert_close(fast(x), want, rtol=5e-2, atol=5e-2)
    finally: torch.backends.mha.set_fastpath_enabled(True)

def test_bert():
    transformers = pytest.importorskip('transformers')
    config = transformers.BertConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128,
                                     vocab_size=100)
    net = transformers.BertModel(config).bfloat16()
    Sparsifier(net, 'weight', 'local', large_final, nm=True, layer_type=nn.Linear).sparsify_model(50)
    ids = torch.randint(100, (2, 7))
    fast, report = fast_of(net, ids)
    assert list(report.form) == ['2:4, reference']*13 and isinstance(fast, transformers.BertModel)
    with torch.no_grad():
        torch.testing.assert_close(fast(ids).last_hidden_state, net.eval()(ids).last_hidden_state, rtol=.1, atol=.1)

# --- using the converted model

@pytest.fixture
def fast():
    fast, _ = fast_of(Net(), torch.randn(4, 64, 5, 5).half())
    return fast

X = torch.randn(4, 64, 5, 5).half()

def test_deepcopy(fast):
    other = deepcopy(fast)
    assert kinds(other) == kinds(fast) and isinstance(other.up.weight, nn.Parameter)
    assert other.up.weight.packed.data_ptr() != fast.up.weight.packed.data_ptr()
    assert torch.equal(other(X), fast(X)) and same(to_dense(other), to_dense(fast))

def test_a_pickle_is_dense(fast):
    f = io.BytesIO()
    torch.save(fast, f)
    f.seek(0)
    other = torch.load(f, weights_only=False)
    assert kinds(other)[:3] == ['Conv2d', 'BatchNorm2d', 'Linear'] and not other.training and not other.up.training
    assert kinds(fast)[0] == 'Conv24'
    assert same(other, to_dense(fast)) and torch.equal(pickle.loads(pickle.dumps(fast)).conv.weight, fast.conv.weight)
    assert other.conv.weight.requires_grad

def test_a_pickle_loads_where_this_package_is_absent(tmp_path):
    fast, _ = fast_of(nn.Sequential(pruned(nn.Linear(64, 32))), torch.randn(2, 64).half())
    torch.save(fast, tmp_path/'m.pt')
    load = f'torch.load({str(tmp_path/"m.pt")!r}, weights_only=False)'
    code = f'import sys, torch; sys.modules["fasterai_sparse"] = None; print(type({load}[0]).__name__)'
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True).stdout.split() == ['Linear']

def test_state_dict_is_that_of_the_dense_model(fast):
    state, net = fast.state_dict(), Net()
    assert list(state) == list(net.state_dict()) and all(type(v) is torch.Tensor for v in state.values())
    net.load_state_dict(state)
    f = io.BytesIO()
    torch.save(state, f)
    f.seek(0)
    torch.load(f, weights_only=True)
    assert same(net, to_dense(fast))

def test_what_would_write_into_it_is_refused(fast):
    for f in (fast.train, lambda: fast.load_state_dict(Net().state_dict()), lambda: fast.up.train()):
        with pytest.raises(RuntimeError, match='to_dense'): f()
    with pytest.raises(ValueError, match='to_dense'): fast_of(fast, X)
    assert not fast.eval().up.training and not fast.up.weight.requires_grad

def test_moves(fast):
    w = fast.up.weight
    for move in (fast.cpu, fast.half, lambda: fast.to('cpu', torch.float16),
                 lambda: fast.to(memory_format=torch.channels_last), fast.eval):
        assert move().up.weight is w and list(fast.up._parameters) == ['weight', 'bias']
    dense = fast.state_dict()['up.weight']
    assert fast.float() is fast and kinds(fast)[:3] == ['Conv2d', 'BatchNorm2d', 'Linear']
    assert torch.equal(fast.up.weight, dense.float())
    fast.train()

@pytest.mark.parametrize('dtype', HALF)
def test_autocast(dtype):
    net, x = nn.Sequential(pruned(nn.Linear(64, 128)), nn.GELU(), pruned(nn.Linear(128, 64))), torch.randn(4, 64)
    fast, _ = fast_of(net, x.half())
    with torch.no_grad(), torch.autocast('cpu', dtype): out, want = fast(x), net(x)
    assert kinds(fast)[0] == 'Linear24' and out.dtype == want.dtype == dtype
    torch.testing.assert_close(out, want, rtol=5e-2, atol=5e-2)

def test_inside_autocast():
    with torch.autocast('cpu', torch.float16): fast, report = fast_of(Net(), X.float())
    assert list(report.form[:3]) == ['2:4, reference']*3

def test_fastai_tensors(fast):
    out = fast(TensorBase(X))
    assert torch.equal(torch.Tensor(out), fast(X)) and fast_of(Net(), TensorBase(X))[0].up.weight.shape == (256,128)

def test_compiles(fast):
    compiled = torch.compile(fast, backend='aot_eager', fullgraph=True)
    with torch.no_grad(): torch.testing.assert_close(compiled(X), fast(X), rtol=2e-2, atol=2e-2)

def test_wrapped_models():
    fast, report = fast_of(nn.DataParallel(Net()), X)
    assert type(fast) is Net and list(report.layer) == ['conv', 'up', 'down', 'head']

# --- on a GPU

@gpu
@pytest.mark.parametrize('dtype', HALF)
def test_cuda_products_are_those_of_the_reference(dtype):
    ran = [b for b in backends_24 if not probe_24('cuda', dtype)[b.BACKEND]]
    if not ran: pytest.skip(str(probe_24()))
    for backend in ran:
        for out, n, shape in ((32, 64, (8,64)), (64, 128, (3,5,128)), (256, 64, (64,)), (128, 1024, (1,1024)),
                              (1024, 256, (250,256))):
            w, b, x = two_four(out, n, dtype=dtype), torch.randn(out).to(dtype), torch.randn(shape).to(dtype)
            s = backend.from_dense(w.cuda())
            assert torch.equal(s.to_dense().cpu(), w)
            with torch.inference_mode():
                want = F.linear(x.float(), Reference24.from_dense(w).to_dense().float(), b.float()).to(dtype)
                got = F.linear(x.cuda(), s, b.cuda()).cpu()
                torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2*n**.5)

def always(*fs):
    "Fake timings in which the first function is the slowest"
    for f in fs: f()
    return [1/(1+i) for i in range(len(fs))]

@gpu
@pytest.mark.parametrize('dtype', HALF)
def test_cuda_there_and_back(dtype):
    net, x = Net(dtype).cuda(), X.to(dtype).cuda()
    if all(probe_24('cuda').values()): pytest.skip(str(probe_24('cuda')))
    fast, report = accelerate_cuda(net, x, race=always)
    assert kinds(fast)[:3] == ['Conv24', 'BatchNorm2d', 'Linear24']
    assert all(f.startswith('2:4, cu') for f in report.form[:3])
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with mode(): torch.testing.assert_close(fast(x), net.eval()(x), rtol=5e-2, atol=5e-2)
    assert torch.equal(deepcopy(fast)(x), fast(x)) and kinds(pickle.loads(pickle.dumps(fast))) == kinds(net)
    assert fast.cuda().half().up.weight is not None and kinds(deepcopy(fast).cpu()) == kinds(net)
    assert same(to_dense(fast), net)

@gpu
def test_cuda_autocast():
    net, x = nn.Sequential(pruned(nn.Linear(64, 128)), nn.GELU(), pruned(nn.Linear(128, 64))).cuda(), torch.randn(4,
            64, device='cuda')
    if all(probe_24('cuda').values()): pytest.skip(str(probe_24('cuda')))
    fast, _ = accelerate_cuda(net, x.half(), race=always)
    for dtype in HALF:
        with torch.no_grad(), torch.autocast('cuda', dtype): out, want = fast(x), net(x)
        assert out.dtype == want.dtype == dtype
        torch.testing.assert_close(out, want, rtol=5e-2, atol=5e-2)

@gpu
def test_cuda_clock_and_winners():
    a, b = torch.randn(2, 4096, 4096).half().cuda()
    small, large = cuda_race(lambda: a[:64] @ b, lambda: [a @ b for _ in range(20)])
    assert 0 < small < large
    up, down, head = pruned(nn.Linear(4096, 16384)), pruned(nn.Linear(16384, 4096)), nn.Linear(4096, 1000).half()
    net = nn.Sequential(up, nn.GELU(), down, head).cuda()
    fast, report = accelerate_cuda(net, torch.randn(4096, 4096).half().cuda())
    assert report.note[2] == 'out=1000 is not a multiple of 16' or all(probe_24('cuda').values())
    assert (fast is net) == bool(report.attrs['note'])
    if fast is not net: assert report.attrs['sparse_ms'] < report.attrs['dense_ms']

@gpu
def test_cuda_float32_says_what_to_do():
    fast, report = accelerate_cuda(net := Net(torch.float32).cuda(), X.float().cuda())
    assert fast is net and '.half()' in report.attrs['note']
