"Sparse safetensors files: exact round trips, refused files and models, sizes and memory"
import json, os, struct, tracemalloc, zlib
from copy import deepcopy

import pytest, torch
from torch import nn

from callback_helpers import at, fit, learner
from cases import in_a_loop
from fasterai_sparse.core.criteria import large_final
from fasterai_sparse.core.from_zeros import masks_from_zeros
from fasterai_sparse.core.layers import maskable_weights
from fasterai_sparse.core.masks import get_mask, masked_params, masks_off, remove_masks
from fasterai_sparse.core.report import sparsity_report
from fasterai_sparse.core.schedules import one_shot
from fasterai_sparse.core.sparsifier import Sparsifier
from fasterai_sparse.train.keep_masks import KeepMasks
from fasterai_sparse.train.sparsify_callback import SparsifyCallback
from fasterai_sparse.nncf.const import ConstSparsityCallback
from fasterai_sparse.nncf.magnitude import MagnitudeSparsityCallback
from fasterai_sparse.nncf.rb import RBSparsityCallback
from fasterai_sparse.nncf.soft_masks import SoftMasks
from fasterai_sparse.files.safetensors import load_sparse, save_sparse, sparse_contents
import fasterai_sparse.files.safetensors as sf

DTYPES = list(sf._torch_dtypes.values())
FLOATS = [torch.float32, torch.float16, torch.bfloat16, torch.float64]

def raw(t):
    "The bytes of `t`, in the order of its elements"
    flat = torch.cat([t.detach().as_subclass(torch.Tensor).resolve_conj().resolve_neg().reshape(-1)])
    return flat.view(torch.uint8).numpy().tobytes()

def same(a, b): return a.dtype == b.dtype and a.shape == b.shape and raw(a) == raw(b)

class Holder(nn.Module):
    "Tensors as buffers"
    def __init__(self, **tensors):
        super().__init__()
        for k,t in tensors.items(): self.register_buffer(k, t)

def round_trip(model, path):
    "Save and load, and check that every tensor is the same to the bit"
    df, state = save_sparse(model, path), load_sparse(path)
    with masks_off(deepcopy(model)) as plain: want = plain.state_dict()
    assert list(state) == list(want)
    for k in want: assert same(want[k], state[k]), k
    return df

def net():
    return nn.Sequential(nn.Conv2d(2,16,3,bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16,32,3), nn.ReLU(),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32,16), nn.Linear(16,4))

def sparse_net(sparsity=90, **kw):
    model = net()
    Sparsifier(model, 'weight', 'local', large_final, layer_type=(nn.Conv2d, nn.Linear), **kw).sparsify_model(sparsity)
    return model

@pytest.fixture
def path(tmp_path): return tmp_path/'m.safetensors'

# to the bit

@pytest.mark.parametrize('share', [0, .1, .5, 1])
@in_a_loop('dtype', DTYPES)
@in_a_loop('shape', [(), (0,), (3,0,2), (1,), (7,), (8,), (64,), (65,), (5,13), (3,4,5,2)])
def test_every_dtype_and_shape(path, dtype, shape, share):
    t = torch.randint(0, 2, shape).to(dtype) if dtype == torch.bool else (torch.randn(shape)*50).abs().to(dtype)
    t = torch.where(torch.rand(shape) < share, t, torch.zeros_like(t))
    round_trip(Holder(a=t, b=torch.ones(3)), path)

@pytest.mark.parametrize('dtype', FLOATS, ids=str)
@pytest.mark.parametrize('among', [0, 1000])
def test_special_values(path, dtype, among):
    i = torch.finfo(dtype)
    inf, nan = float('inf'), float('nan')
    t = torch.tensor([0., -0., inf, -inf, nan, i.tiny, -i.tiny, i.smallest_normal/4, i.max, i.min, i.eps, -0., 1.],
                     dtype=dtype)
    ints = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    nans = t[4:5].repeat(4).view(ints) + torch.tensor([1, 2, 3, 5], dtype=ints)   # other payloads
    t = torch.cat([t, nans.view(dtype), -nans.view(dtype), torch.zeros(among, dtype=dtype)])
    df = round_trip(Holder(a=t), path)
    assert df.stored[0] == ('bitmask' if among or dtype == torch.float64 else 'dense')
    assert torch.signbit(load_sparse(path)['a']).equal(torch.signbit(t))

@pytest.mark.parametrize('dtype', FLOATS, ids=str)
def test_minus_zero_takes_a_bit(path, dtype):
    t = torch.zeros(640, dtype=dtype)
    t[::10] = 1
    assert save_sparse(Holder(a=t), path).bytes[0] == 64*dtype.itemsize + 80
    t[5::7] = -0.
    df = round_trip(Holder(a=t), path)
    assert df.bytes[0] == 64*dtype.itemsize + 2*80 - sum(dtype.itemsize for i in range(5, 640, 7) if i % 10 == 0)
    assert torch.signbit(load_sparse(path)['a']).any()

def test_pieces_fit_together(path, monkeypatch):
    monkeypatch.setattr(sf, '_piece_size', 64)
    w = torch.randn(40,8,3,3)
    w[:,::4], w[:,1::4] = 0, 0
    ragged = torch.randn(1001)*(torch.rand(1001) > .8)
    signed = torch.randn(777)*(torch.rand(777) > .8)
    assert torch.signbit(signed[signed == 0]).any()
    model = Holder(ragged=ragged.abs(), signed=signed, i=(torch.rand(333) > .9).long())
    model.conv, model.lin = nn.Conv2d(8,40,3), nn.Linear(12,37,bias=False)
    model.conv.weight.data.copy_(w+0.)
    model.lin.weight.data.mul_(torch.tensor([1.,1,0,0]).repeat(3)).add_(0.)
    df = round_trip(model, path).set_index('tensor')
    assert df.stored.to_dict() == {'ragged': 'bitmask', 'signed': 'bitmask', 'i': 'bitmask', 'conv.weight': '2:4',
                                   'conv.bias': 'dense', 'lin.weight': '2:4'}

def test_memory_formats_and_views(path):
    model = sparse_net().to(memory_format=torch.channels_last)
    round_trip(model, path)
    other = load_sparse(path, net().to(memory_format=torch.channels_last))
    assert other[3].weight.is_contiguous(memory_format=torch.channels_last) and same(other[3].weight, model[3].weight)
    t = torch.randn(20,30)
    z = torch.randn(4, dtype=torch.complex64)
    round_trip(Holder(a=t.t(), b=t[::2,1::3], c=t[3:4].expand(5,30), d=z.conj(), e=z.conj().imag), path)
    # flat, but not in one piece
    round_trip(Holder(a=t[0,::2], b=t[:,::2], c=t[:,5], d=z.imag, e=z.real, f=torch.zeros(()).expand(9)), path)

def test_views_that_differ_in_a_sign_are_not_tied(path):
    z = torch.randn(4, dtype=torch.complex64)
    assert not round_trip(Holder(a=z, b=z.conj(), c=z.imag, d=z.conj().imag), path).stored.str.startswith('as ').any()

def test_training_dtypes_of_a_model(path):
    for dtype in FLOATS:
        model = sparse_net().to(dtype)
        round_trip(model, path)
        other = load_sparse(path, net())   # into fp32, as load_state_dict does
        assert other[3].weight.dtype == torch.float32 and torch.equal(other[3].weight.to(dtype), model[3].weight)

def test_non_ascii_and_odd_names(path):
    model = nn.ModuleDict({'größe "a"': nn.Linear(3,2), '日本': nn.Linear(2,3), 'a:b/c\\n': nn.Linear(1,1)})
    round_trip(model, path)
    assert sf.sparse_contents(path).layer[0] == 'größe "a"'

# tied, shared, buffers

class Tied(nn.Module):
    def __init__(self, tie=True):
        super().__init__()
        self.emb, self.block, self.head = nn.Embedding(50,16), nn.Linear(16,16), nn.Linear(16,50,bias=False)
        self.again = self.block
        if tie: self.head.weight = self.emb.weight
    def forward(self, x): return self.head(self.again(self.block(self.emb(x))))

def test_tied_weights_are_there_once(path):
    df = round_trip(Tied(), path).set_index('tensor')
    assert df.stored['head.weight'] == 'as emb.weight' and df.stored['again.weight'] == 'as block.weight'
    assert df.bytes['head.weight'] == 0
    assert path.stat().st_size < 4*(50*16 + 16*16 + 16) + 3000
    state = load_sparse(path)
    Sparsifier(sparse := Tied(), 'weight', 'local', large_final, layer_type=nn.Embedding).sparsify_model(60)
    assert save_sparse(sparse, tmp := path.with_name('s')).sparsity_pct[[0,3]].tolist() == [60, 60]
    assert sparse_contents(tmp).stored[3] == 'as emb.weight'
    assert state['head.weight'] is state['emb.weight']
    assert list(df.layer) == ['emb', 'block', '', '', '', '']
    model = load_sparse(path, Tied())
    assert model.head.weight is model.emb.weight and same(model.head.weight, state['emb.weight'])
    loose = load_sparse(path, Tied(tie=False))
    assert loose.head.weight is not loose.emb.weight and same(loose.head.weight, loose.emb.weight)

def test_equal_tensors_that_are_not_tied_stay_apart(path):
    t = torch.randn(6)
    df = round_trip(Holder(a=t, b=t.clone(), c=t[:3], d=t.view(2,3), e=torch.zeros(0), f=torch.zeros(0)), path)
    assert not df.stored.str.startswith('as ').any()

def test_batchnorm_buffers_and_fp16_neighbours(path):
    model = sparse_net()
    model.train()(torch.randn(4,2,9,9))
    model.register_buffer('odd', torch.ones(3, dtype=torch.float16))
    model.register_buffer('flags', torch.tensor([True, False, True]))
    round_trip(model, path)
    other = net()
    other.register_buffer('odd', torch.zeros(3, dtype=torch.float16))
    other.register_buffer('flags', torch.zeros(3, dtype=torch.bool))
    load_sparse(path, other)
    assert other[1].num_batches_tracked == 1 and same(other[1].running_var, model[1].running_var)
    assert other.flags.tolist() == [True, False, True]

# models with masks

def test_masks_stay_and_are_not_in_the_file(path):
    model = sparse_net()
    masks = {id(p): mask for *_,p,mask in masked_params(model)}
    save_sparse(model, path)
    assert {id(p): mask for *_,p,mask in masked_params(model)} == masks
    assert list(load_sparse(path)) == list(net().state_dict())
    assert not any(torch.signbit(p[p == 0]).any() for *_,p,_ in masked_params(model))

def test_what_a_mask_drops_is_zero_in_the_file(path):
    model = sparse_net()
    with torch.no_grad():
        model[3].weight += 1
        model[7].weight.masked_fill_(~get_mask(model[7]), float('inf'))
    save_sparse(model, path)
    state = load_sparse(path)
    assert torch.equal(state['3.weight'] != 0, get_mask(model[3]))
    assert torch.equal(state['7.weight'] != 0, get_mask(model[7]))

def test_masks_follow_into_a_model_with_others(path):
    save_sparse(model := sparse_net(80), path)
    other = sparse_net(50)
    ids = [id(mask) for *_,mask in masked_params(other)]
    with pytest.warns(UserWarning, match='80.*50'): assert load_sparse(path, other) is other
    assert [id(mask) for *_,mask in masked_params(other)] == ids
    for (*_,p,mask),(*_,q,want) in zip(masked_params(other), masked_params(model)):
        assert torch.equal(mask, want) and same(p, q)

def test_a_mask_that_is_saved_with_the_model(path):
    save_sparse(model := sparse_net(80), path)
    other = net()
    other[3].register_buffer('weight_mask', torch.ones_like(other[3].weight, dtype=torch.bool))
    load_sparse(path, other)
    assert torch.equal(other[3].weight_mask, model[3].weight != 0) and same(other[3].weight, model[3].weight)

@pytest.mark.parametrize('cb',
                         [lambda: MagnitudeSparsityCallback(80), lambda: RBSparsityCallback(50),
                          lambda: ConstSparsityCallback()])
def test_soft_masks_while_and_after_they_train(tmp_path, path, cb):
    learn = learner(model=sparse_net(30))
    seen = []
    def save(learn):
        dense = {k: t.clone() for k,t in learn.model.state_dict().items()}
        save_sparse(learn.model, path)
        seen.append(all(torch.equal(dense[k], t) for k,t in load_sparse(path).items()) and list(dense))
    fit(learn, cbs=[cb(), at('after_batch', save)])
    assert seen and all(k == list(net().state_dict()) for k in seen)
    round_trip(learn.model, path)

def test_loading_below_a_soft_mask_stays(path):
    save_sparse(want := net(), path)
    model = net()
    soft = SoftMasks({'3.weight': model[3].weight})
    soft.masks['3.weight'] = torch.rand_like(model[3].weight) > .5
    soft.lay()
    load_sparse(path, model)
    soft.lift()
    soft.end()
    assert same(model[3].weight, want[3].weight)

def test_wrapped_models(path):
    model = sparse_net()
    save_sparse(nn.DataParallel(model), path)
    assert '3.weight' in load_sparse(path)
    wrapped = nn.DataParallel(net())
    assert load_sparse(path, wrapped) is wrapped and same(wrapped.module[3].weight, model[3].weight)

def test_attention_lstm_and_transposed_layers(path):
    model = nn.ModuleList([nn.MultiheadAttention(16,2), nn.LSTM(16,8,2), nn.ConvTranspose2d(16,6,3), nn.GRUCell(16,4),
                           nn.Conv3d(16,4,2)])
    Sparsifier(model, 'weight', 'local', large_final, nm=True, layer_type=None).sparsify_model(50)
    df = round_trip(model, path)
    assert (df.stored[df.layer != ''] == '2:4').all() and (df.sparsity_pct[df.layer != ''] == 50).all()

# N:M

@in_a_loop('dtype', FLOATS)
@pytest.mark.parametrize('n,m,kind',
                         [(2,4,'2:4'), (1,4,'1:4'), (1,2,'1:2'), (2,8,'2:8'), (4,8,'bitmask'), (4,16,'4:16'),
                          (3,8,'bitmask'), (1,16,'1:16')])
@pytest.mark.parametrize('layer',
                         [lambda: nn.Linear(32,6), lambda: nn.Conv2d(32,6,3), lambda: nn.ConvTranspose1d(32,6,3)])
def test_patterns(path, layer, n, m, kind, dtype):
    model = nn.Sequential(layer())
    s = Sparsifier(model, 'weight', 'local', large_final, nm=(n, m), layer_type=type(model[0]))
    s.sparsify_model(100*(m-n)/m)
    model.to(dtype)
    df = round_trip(model, path)
    w = model[0].weight
    bitmask = 8*-(-w.numel()//64) + (w != 0).sum().item()*w.itemsize
    assert df.stored[0] == kind and df.bytes[0] <= bitmask

def test_a_stray_weight_breaks_the_pattern(path):
    model = nn.Sequential(nn.Linear(64,64))
    Sparsifier(model, 'weight', 'local', large_final, nm=True, layer_type=nn.Linear).sparsify_model(50)
    assert round_trip(model, path).stored[0] == '2:4'
    remove_masks(model)
    with torch.no_grad():
        model[0].weight += 0.
        dead = (model[0].weight == 0).nonzero()[-1]
        model[0].weight[tuple(dead)] = 1.
    assert round_trip(model, path).stored[0] == 'bitmask'

def test_a_pattern_with_minus_zeros(path):
    model = nn.Sequential(nn.Linear(64,64))
    model[0].weight.data.mul_(torch.tensor([1.,1,0,0]).repeat(16))
    assert torch.signbit(model[0].weight[:,2]).any()
    df = round_trip(model, path)
    assert df.stored[0] == 'bitmask' and df.bytes[0] == 64*32*4 + 2*64*8

def test_groups_that_keep_less_and_values_as_kernels_want_them(path):
    from safetensors import safe_open
    model = nn.Sequential(nn.Linear(8,2,bias=False))
    with torch.no_grad(): model[0].weight.copy_(torch.tensor([[0,1,0,2, 0,0,0,3.], [4,0,0,5, 6,0,7,0]]))
    round_trip(model, path)
    layer = torch.zeros(64,64)
    layer[:,2::4], layer[:,3::4] = 1, 2
    model = nn.Sequential(nn.Linear(64,64,bias=False))
    # of 2048 weights that the pattern keeps; a percent of the bytes
    for zeros,kind in ((0, '2:4'), (21, '2:4'), (22, 'bitmask')):
        model[0].weight.data.copy_(layer)
        model[0].weight.data[:zeros,2] = 0
        assert round_trip(model, path).stored[0] == kind
    model[0].weight.data.copy_(layer)
    save_sparse(model, path)
    with safe_open(path, 'pt') as f:
        values, at = f.get_tensor('0.weight.values'), f.get_tensor('0.weight.indices')
    assert values.shape == (64,32) and values[:,0].eq(1).all() and values[:,1].eq(2).all()
    assert at.eq(0b11101110).all()   # 2, 3, 2, 3 from the lowest bits up

# sizes

@pytest.mark.parametrize('sparsity', [50, 80, 90, 95])
@pytest.mark.parametrize('dtype,share', [(torch.float32, 1/32), (torch.float16, 1/16), (torch.bfloat16, 1/16)], ids=str)
def test_sizes(path, dtype, share, sparsity):
    model = nn.Sequential(nn.Conv2d(64,256,3,bias=False), nn.Linear(1024,512,bias=False))
    Sparsifier(model, 'weight', 'local', large_final, layer_type=None).sparsify_model(sparsity)
    save_sparse(model.to(dtype), path)
    ratio = path.stat().st_size/sum(p.nbytes for p in model.parameters())
    assert abs(ratio - (1-sparsity/100) - share) < .002
    if sparsity == 90 and dtype == torch.float32: assert ratio <= .14

def test_a_dense_model_takes_hardly_more(path):
    model = nn.Sequential(nn.Linear(256,512), nn.BatchNorm1d(512), nn.Linear(512,256))
    df = save_sparse(model, path)
    dense = sum(t.nbytes for t in model.state_dict().values())
    assert (df.bytes <= df.dense_bytes).all() and df.bytes.sum() <= dense and path.stat().st_size < dense + 500*len(df)
    assert 'dense' == df.stored[0]

def test_contents(path):
    model = sparse_net()
    df = save_sparse(model, path)
    report = sparsity_report(model)
    assert abs(df.attrs['sparsity_pct'] - 100*report.zeros.sum()/report.params.sum()) < 1e-9
    of_layers = df[df.layer != ''].set_index('layer').sparsity_pct
    assert of_layers.to_dict() == pytest.approx(report.set_index('layer').sparsity_pct.to_dict())
    again = sparse_contents(path)
    assert again.equals(df) and again.attrs == df.attrs
    n = int.from_bytes(path.read_bytes()[:8], 'little')
    assert path.stat().st_size == 8 + n + df.bytes.sum() and n % 8 == 0
    assert save_sparse(nn.ReLU(), path).empty and load_sparse(path) == {}

@pytest.mark.parametrize('model', [sparse_net, Tied, lambda: sparse_net().half()])
def test_the_safetensors_package_reads_it(path, model):
    pytest.importorskip('safetensors')
    from safetensors import safe_open
    from safetensors.torch import load_file
    save_sparse(model := model(), path)
    tensors = load_file(path)
    for k,t in tensors.items():
        if k in model.state_dict(): assert same(t, model.state_dict()[k])
    with safe_open(path, 'pt') as f: meta = f.metadata()
    assert meta['format_version'] == '1'
    assert abs(100*float(meta['sparsity']) - save_sparse(model, path).attrs['sparsity_pct']) < 1e-3
    assert set(json.loads(meta['layers'])) == {n for n,*_ in maskable_weights(model)}

def test_parts_are_aligned(path):
    model = Holder(a=torch.tensor([1.,0]*50).half(), b=torch.tensor(3), c=torch.randn(3), d=torch.tensor([True]),
                   e=(torch.rand(999) > .9).double())
    save_sparse(model, path)
    with open(path, 'rb') as f: stored, at = sf._read_header(f, path)
    for s in stored:
        for part,(dtype,_) in s.parts().items(): assert at[part][0] % sf._torch_dtypes[dtype].itemsize == 0

# memory

def peak(f):
    "Peak of the bytes that `f` allocates through Python and numpy"
    tracemalloc.start()
    try:
        f()
        return tracemalloc.get_traced_memory()[1]
    finally: tracemalloc.stop()

@pytest.mark.parametrize('nm', [False, True])
def test_memory_of_one_tensor(path, nm):
    layers = [nn.Linear(1024,1024,bias=False) for _ in range(6)]
    model, size = nn.Sequential(*layers), 1024*1024*4
    targets = {'0': 50, '1': 50, '2': 50} if nm else {'0': 50, '1': 90, '2': 60, '3': 30}
    Sparsifier(model, 'weight', 'local', large_final, layer_type=None, nm=nm).sparsify_model(targets)
    assert peak(lambda: save_sparse(model, path)) < size/2   # the rest is for a copy of what is not contiguous
    assert peak(lambda: load_sparse(path, model)) < size/2   # beside the tensor itself, which torch allocates

@pytest.mark.parametrize('shape', [(8,1<<18), (1<<18,8), (2,4,1<<18), (4,1<<18,2), (1,1<<20), (3,(1<<18)+4)], ids=str)
def test_memory_of_long_rows(path, shape):
    model = nn.Sequential(nn.Linear(shape[1], shape[0]) if len(shape) == 2 else nn.Conv1d(shape[1], shape[0], shape[2]))
    w = model[0].weight.data
    w[:,::4], w[:,1::4] = 0, 0
    size = w.nbytes
    assert round_trip(model, path).stored[0] == '2:4'
    # eight rows at a time, where the indices of one are no whole bytes
    most = size/2 if shape[1] % 32 == 0 else 6*size
    assert peak(lambda: save_sparse(model, path)) < most and peak(lambda: load_sparse(path, model)) < most

def test_loading_lets_go_of_each_tensor(path, monkeypatch):
    import weakref
    model = nn.Sequential(*[nn.Linear(8,8) for _ in range(5)])
    save_sparse(model, path)
    made, real = [], sf._decoded
    def decoded(*args):
        assert not any(r() is not None for r in made)
        made.append(weakref.ref(t := real(*args)))
        return t
    monkeypatch.setattr(sf, '_decoded', decoded)
    load_sparse(path, model)
    assert len(made) == 10

# what is refused

def changed(path, edit=lambda header, data: None, checksum=True):
    "Rewrite the file with `edit` applied to its header and data, and with a valid checksum of the header"
    blob = path.read_bytes()
    n = int.from_bytes(blob[:8], 'little')
    header, data = json.loads(blob[8:8+n]), bytearray(blob[8+n:])
    entries = json.loads(header['__metadata__']['tensors'])
    header['__metadata__']['tensors'] = entries
    edit(header, data)
    header['__metadata__']['tensors'] = json.dumps(entries)
    if checksum:
        header['__metadata__'].pop('checksum')
        header['__metadata__']['checksum'] = f'{zlib.crc32(json.dumps(header, sort_keys=True).encode()):08x}'
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack('<Q', len(text)) + text + data)

def refuses(path, *words):
    "Loading raises an error with all `words`, with and without a model; the model stays unchanged"
    for model in (None, sparse_net(40)):
        was = model and deepcopy(model.state_dict())
        with pytest.raises(ValueError) as e: load_sparse(path, model)
        for w in (path.name, *words): assert w in str(e.value), e.value
        for k in was or (): assert same(was[k], model.state_dict()[k])

def test_truncated_anywhere(path):
    save_sparse(sparse_net(), path)
    blob = path.read_bytes()
    n = int.from_bytes(blob[:8], 'little')
    with open(path, 'rb') as f: stored, at = sf._read_header(f, path)
    for cut in [0, 3, 8, 9, 8+n//2, 8+n-1]:
        path.write_bytes(blob[:cut])
        refuses(path, 'cut short')
    for s in stored:
        for part in s.parts():
            for cut in {at[part][0], sum(at[part])-1} if at[part][1] else ():
                path.write_bytes(blob[:cut])
                refuses(path, 'cut short')
                if cut == sum(at[part])-1: refuses(path, repr(s.name))
    path.write_bytes(blob + b'\0')
    refuses(path, '1 bytes after')

def test_each_flipped_byte_is_named(path):
    save_sparse(sparse_net(), path)
    blob = path.read_bytes()
    with open(path, 'rb') as f: stored, at = sf._read_header(f, path)
    for s in stored:
        for part in s.parts():
            for i in {at[part][0], at[part][0]+at[part][1]//2, sum(at[part])-1} if at[part][1] else ():
                bad = bytearray(blob)
                bad[i] ^= 16
                path.write_bytes(bad)
                refuses(path, 'damaged', repr(s.name))

def test_flipped_bytes_in_the_header(path):
    save_sparse(nn.Linear(4,3), path)
    blob, want = path.read_bytes(), load_sparse(path)
    n = int.from_bytes(blob[:8], 'little')
    for i in range(8+n):
        for bit in (1, 64):
            bad = bytearray(blob)
            bad[i] ^= bit
            path.write_bytes(bad)
            try: state = load_sparse(path)
            except ValueError: continue
            # a space that is another
            assert list(state) == list(want) and all(same(state[k], want[k]) for k in want), i

def test_a_bitmask_for_another_number_of_values(path):
    model = sparse_net()
    save_sparse(model, path)
    def edit(header, data):
        for s in header['__metadata__']['tensors']:
            if s['name'] == '3.weight':
                a, b = header['3.weight.bitmask']['data_offsets']
                data[a] |= 255
                va, vb = header['3.weight.values']['data_offsets']
                s['crc32'] = f'{zlib.crc32(data[a:b], zlib.crc32(data[va:vb])):08x}'
    changed(path, edit)
    refuses(path, "'3.weight'", 'values and a bitmask for')

@pytest.mark.parametrize('version', ['2', '0', 'x', '', 1])
def test_unknown_versions(path, version):
    save_sparse(sparse_net(), path)
    changed(path, lambda header, data: header['__metadata__'].update(format_version=version))
    refuses(path, f'format version {version!r}', "'1'")

def entry(tensor, **kw):
    def edit(header, data): next(s for s in header['__metadata__']['tensors'] if s['name'] == tensor).update(kw)
    return edit

@pytest.mark.parametrize('edit', [*(entry('3.weight', **kw) for kw in (
    dict(shape=[16,16,3,4]), dict(shape=[-32,-16,3,3]), dict(shape='x'), dict(shape=[1.5]), dict(shape=[True,True]),
    dict(shape=None), dict(zeros=-1), dict(zeros=10**9), dict(zeros=7), dict(kind='dense'), dict(kind='2:4'),
    dict(kind='7:9'), dict(kind=None), dict(dtype='F128'), dict(dtype='F16'), dict(dtype=[]), dict(axis=9),
    dict(axis=True), dict(axis=-1), dict(signs=True), dict(signs=[]), dict(same_as='nothing'), dict(same_as='3.weight'),
    dict(same_as=[1]), dict(name='3.bias'), dict(name=[1]), dict(name={}), dict(name=5), dict(layer=5), dict(layer=[1]),
    dict(evil=1), dict(crc32=5))),
    lambda h, d: h['__metadata__']['tensors'].pop(), lambda h, d: h['__metadata__']['tensors'].clear(),
    lambda h, d: h['3.bias'].update(shape=[31]), lambda h, d: h['3.bias'].update(data_offsets=[0, 128]),
    lambda h, d: h.pop('3.bias'), lambda h, d: h.update(more=h['3.bias']),
    lambda h, d: h['3.bias'].update(dtype='I32')])
def test_headers_that_make_no_sense(path, edit):
    save_sparse(sparse_net(), path)
    changed(path, edit)
    refuses(path)

@pytest.mark.parametrize('shape', [[2**63,0], [2**62,2**62,0], [2**40,0,2**40]])
def test_sizes_that_no_tensor_can_have(path, shape):
    save_sparse(Holder(e=torch.zeros(0)), path)
    def edit(header, data): header['e']['shape'] = header['__metadata__']['tensors'][0]['shape'] = shape
    changed(path, edit)
    refuses(path, "'e'")

def test_a_header_that_is_not_what_was_written(path):
    save_sparse(sparse_net(), path)
    changed(path, lambda header, data: header['__metadata__'].update(sparsity='0.1'), checksum=False)
    refuses(path, 'damaged header')

def test_a_name_that_is_there_twice(path):
    save_sparse(sparse_net(), path)
    twice = dict(name='3.bias', shape=[32], dtype='F32', same_as='3.bias')
    changed(path, lambda header, data: header['__metadata__']['tensors'].append(twice))
    refuses(path, 'contradicts itself')

def test_a_tied_tensor_of_another_shape(path):
    save_sparse(Tied(), path)
    changed(path, entry('head.weight', shape=[16,50]))
    refuses(path, 'contradicts itself')

def test_other_files(path):
    from safetensors.torch import save_file
    save_file({'a': torch.ones(3)}, path)
    refuses(path, 'not written by save_sparse')
    torch.save(net(), path)
    refuses(path)
    for text in (b'[]', b'{', b'\xff\xfe', b'['*100000, b'3', b'{"__metadata__": 5}',
                 b'{"__metadata__": {"format_version": "1"}}'):
        path.write_bytes(struct.pack('<Q', len(text)) + text)
        refuses(path)
    path.write_bytes(struct.pack('<Q', 2**63) + b'{}')
    refuses(path, 'cut short')
    with pytest.raises(FileNotFoundError): load_sparse(path.with_name('no'))

def test_keys_and_shapes_of_a_model(path):
    save_sparse(sparse_net(), path)
    other = net()
    other[8] = nn.Linear(16,5)
    was = deepcopy(other.state_dict())
    with pytest.raises(ValueError, match=r"8.weight is \(4, 16\) in the file and \(5, 16\) in the model; 8.bias"):
        load_sparse(path, other)
    other = net().append(nn.Linear(4,4))
    with pytest.raises(ValueError, match=r"lacks \['9.weight', '9.bias'\] and has \[\]"): load_sparse(path, other)
    with pytest.raises(ValueError, match=r"lacks \[\] and has \['8.bias', '8.weight'\]"): load_sparse(path, net()[:-1])
    other = net()
    was = deepcopy(other.state_dict())
    with pytest.raises(ValueError): load_sparse(path, other.append(nn.Linear(2,2)))
    assert all(same(was[k], other.state_dict()[k]) for k in was)
    other = net()
    other[8].register_buffer('other_mask', torch.ones(3))
    with pytest.raises(ValueError, match="8.other_mask"): load_sparse(path, other)

@pytest.mark.parametrize('inference', [False, True])
def test_a_model_that_cannot_be_written_into(path, inference):
    model = Holder(a=torch.ones(3), b=torch.ones(2,3))
    save_sparse(model, path)
    with torch.inference_mode(inference):
        other = Holder(a=torch.zeros(3), b=torch.zeros(2,3) if inference else torch.zeros(1,3).expand(2,3))
    with pytest.raises(ValueError, match='b was made in inference mode' if inference else 'b is expanded'):
        load_sparse(path, other)
    assert not other.a.any()
    with torch.inference_mode(inference):
        if inference: assert load_sparse(path, other).b.all()

class Extra(nn.Linear):
    def get_extra_state(self): return {'a': 1}
    def set_extra_state(self, s): pass

@pytest.mark.parametrize('model,word',
                         [(lambda: nn.LazyLinear(3), 'lazy'), (lambda: nn.Linear(3,3,device='meta'), 'meta'),
                          (lambda: Extra(2,2), '_extra_state is a dict, not a tensor'),
                          (lambda: Holder(a=torch.ones(3,3).to_sparse()), 'sparse_coo'),
                          (lambda: Holder(a=torch.ones(3, dtype=torch.complex128)), 'complex128')])
def test_what_cannot_be_stored(path, model, word):
    path.write_bytes(b'old')
    model = nn.ModuleDict({'layer': model()})
    with pytest.raises(ValueError, match=f'layer.*{word}'): save_sparse(model, path)
    assert path.read_bytes() == b'old' and len(list(path.parent.iterdir())) == 1

def test_what_cannot_be_stored_stays_as_it_is(path):
    model = sparse_net().append(Extra(4,4))
    with torch.no_grad(): model[3].weight += 5
    was = model[3].weight.clone()
    with pytest.raises(ValueError): save_sparse(model, path)
    assert same(was, model[3].weight)

class Colliding(nn.Module):
    def state_dict(self, *args, **kwargs): return {'a': torch.zeros(1000), 'a.values': torch.ones(3)}

def test_names_that_collide(path):
    with pytest.raises(ValueError, match="called 'a.values'"): save_sparse(Colliding(), path)

def test_the_old_file_survives(path, monkeypatch):
    model = sparse_net()
    save_sparse(model, path)
    old, real, n = path.read_bytes(), sf._encoded, []
    def fails(*args):
        n.append(1)
        if len(n) > 3: raise OSError('disk full')
        return real(*args)
    monkeypatch.setattr(sf, '_encoded', fails)
    with pytest.raises(OSError, match='disk full'): save_sparse(net(), path)
    assert path.read_bytes() == old and [f.name for f in path.parent.iterdir()] == [path.name]
    with pytest.raises(OSError): save_sparse(model, path)
    assert len(list(masked_params(model))) == 4   # its masks are back

def test_two_threads_write_the_same_file(path, monkeypatch):
    import threading
    models, real, both, failed = [sparse_net(80), sparse_net(95)], sf._encoded, threading.Barrier(2, timeout=60), []
    def encoded(*args):
        both.wait()
        return real(*args)
    monkeypatch.setattr(sf, '_encoded', encoded)
    def save(m):
        try: save_sparse(m, path)
        except Exception as e: failed.append(e)
    threads = [threading.Thread(target=save, args=(m,)) for m in models]
    [t.start() for t in threads], [t.join() for t in threads]
    assert not failed and [f.name for f in path.parent.iterdir()] == [path.name]
    state = load_sparse(path)
    assert any(all(same(t, state[k]) for k,t in m.state_dict().items()) for m in models)

def test_parametrized_and_torch_pruned_layers(path):
    from torch.nn.utils import parametrizations, prune
    def make():
        model = nn.Sequential(parametrizations.weight_norm(nn.Linear(8,8)),
                              parametrizations.spectral_norm(nn.Linear(8,8)), nn.Linear(8,64))
        prune.l1_unstructured(model[2], 'weight', .9)
        return model
    model, other = make(), make()
    save_sparse(model, path)
    load_sparse(path, other)
    assert all(same(a, b) for a,b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))
    x = torch.randn(3,8)
    assert same(model.eval()(x), other.eval()(x))

def test_bits_of_any_kind_reach_a_model(path):
    for dtype,ints in ((torch.bfloat16, torch.int16), (torch.float16, torch.int16), (torch.float32, torch.int32),
                       (torch.float64, torch.int64)):
        # NaNs with all payloads among them
        t = torch.randint(torch.iinfo(ints).min, torch.iinfo(ints).max, (1000,), dtype=ints)
        t[::3] = 0
        for w in (t.view(dtype).view(25,40), t.view(dtype).view(40,25).t()):
            model, other = nn.Linear(40,25,bias=False), nn.Linear(40,25,bias=False).to(dtype)
            model.weight = nn.Parameter(w)
            save_sparse(model, path)
            assert same(load_sparse(path, other).weight, model.weight)

def test_nothing_is_run(path, monkeypatch):
    import builtins, pickle
    save_sparse(model := sparse_net(), path)
    def never(*args, **kwargs): raise AssertionError
    for m,n in ((pickle, 'loads'), (pickle, 'load'), (pickle, 'Unpickler'), (torch, 'load'), (builtins, 'eval'),
                (builtins, 'exec')):
        monkeypatch.setattr(m, n, never)
    load_sparse(path, model)

@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_on_a_gpu(path):
    model = sparse_net().cuda()
    df = save_sparse(model, path)
    state = load_sparse(path)
    assert all(same(t.cpu(), state[k]) for k,t in model.state_dict().items()) and df.stored[0] == 'bitmask'
    other = load_sparse(path, sparse_net().cuda().to(memory_format=torch.channels_last))
    assert all(torch.equal(mask, get_mask(model[i])) and mask.is_cuda
               for i,(*_,mask) in zip((0,3,7,8), masked_params(other)))
    assert same(other[3].weight.cpu().contiguous(), state['3.weight'])

# learners

def test_learner(tmp_path):
    learn = learner(model=net())
    learn.path = tmp_path/'new'
    fit(learn, cbs=SparsifyCallback(80, granularity='weight', context='local', criteria=large_final, schedule=one_shot,
                                    layer_type=(nn.Conv2d, nn.Linear)))
    df = learn.export_sparse()
    assert round(df.attrs['sparsity_pct']) == 80 and sum(1 for _ in masked_params(learn.model))
    for k,t in load_sparse(tmp_path/'new'/'model.safetensors').items(): assert same(t, learn.model.state_dict()[k])
    other = learner(model=net())
    load_sparse(tmp_path/'new'/'model.safetensors', other.model)
    masks_from_zeros(other.model, layer_type=(nn.Conv2d, nn.Linear))
    fit(other, cbs=KeepMasks())
    assert torch.equal(other.model[3].weight != 0, learn.model[3].weight != 0)
    learn.export_sparse('sub/x.safetensors')
    assert (tmp_path/'new'/'sub'/'x.safetensors').exists()
    before = (tmp_path/'new'/'model.safetensors').read_bytes()
    os.environ['RANK'] = '1'
    try: assert learn.export_sparse() is None
    finally: del os.environ['RANK']
    assert (tmp_path/'new'/'model.safetensors').read_bytes() == before
