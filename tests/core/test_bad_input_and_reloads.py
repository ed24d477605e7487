"Bad input and unusual models either work, or raise an error that names them and leave everything unchanged"
import math, pickle, subprocess, sys, warnings
from copy import deepcopy

import pytest, torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, remove_weight_norm, spectral_norm, weight_norm

from fasterai_sparse.core.criteria import (
    grad_crit, large_final, magnitude_increase, movement, movmag, random_criteria, small_final, squared_final,
    updating_movement)
from fasterai_sparse.core.masks import apply_masks, get_mask, masked_params, remove_masks, set_mask
from fasterai_sparse.core.patterns import block
from fasterai_sparse.core.report import format_report, sparsity_report
from fasterai_sparse.core.select import top_k_mask
from fasterai_sparse.core.sparsifier import Sparsifier

contexts = pytest.mark.parametrize('context', ['local', 'global'])
pytestmark = pytest.mark.filterwarnings('ignore:.*weight_norm.*:FutureWarning', 'ignore:.*quantiz.*', 'ignore:.*lazy.*',
    'ignore:.*zero-element.*')

def sparsifier(model, granularity='weight', context='local', criteria=large_final, layer_type=(nn.Linear,nn.Conv2d),
    **kwargs):
    return Sparsifier(model, granularity, context, criteria, layer_type=layer_type, **kwargs)
def sparse(model, percent, *args, **kwargs):
    sparsifier(model, *args, **kwargs).sparsify_model(percent)
    return model
def zeros(m): return sum(int((p==0).sum()) for p in m.parameters() if p.dim() > 1)
def size(m): return sum(p.numel() for p in m.parameters() if p.dim() > 1)
def mlp(n=3): return nn.Sequential(*[nn.Linear(10, 10) for _ in range(n)])
def cnn(bn=True):
    norm = nn.BatchNorm2d if bn else nn.Identity
    return nn.Sequential(nn.Conv2d(3,8,3), norm(8), nn.ReLU(), nn.Conv2d(8,16,3), norm(16), nn.ReLU(), nn.Flatten(),
        nn.Linear(144,10))
def train(model, steps=5, lr=.1):
    opt = torch.optim.SGD(model.parameters(), lr, momentum=.9)
    for _ in range(steps):
        opt.zero_grad()
        nn.functional.cross_entropy(model(torch.randn(16,3,7,7)), torch.randint(10, (16,))).backward()
        opt.step()
        apply_masks(model)

def tensors(model):
    "All parameters, buffers and masks as bytes"
    named = [*model.named_parameters(), *model.named_buffers()]
    real = {n: t.detach() for n,t in named if not nn.parameter.is_lazy(t) and not t.is_meta}
    return {n: t.clone().contiguous().reshape(-1).view(torch.uint8) for n,t in real.items()}
def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)

# Layers that can't have a mask

def int8(m):
    m.weight = nn.Parameter(torch.ones(10, 10, dtype=torch.int8), requires_grad=False)
    return m

def fp8(m):
    m.weight = nn.Parameter(m.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    return m

odd = {'pruned by torch': lambda m: prune.l1_unstructured(m, 'weight', .5), 'weight_norm': weight_norm,
    'spectral_norm': spectral_norm, 'parametrized weight_norm': parametrizations.weight_norm,
    'parametrized spectral_norm': parametrizations.spectral_norm,
    'lazy': lambda m: nn.LazyLinear(10), 'meta': lambda m: m.to('meta'), 'int8': int8, 'fp8': fp8}
reasons = dict(zip(odd, ('prune', 'weight-normed', 'spectral_norm', 'parametrized', 'parametrized', 'lazy', 'meta',
    'int8', 'float8')))

def odd_net(kind):
    net = mlp(3)
    net[1] = odd[kind](net[1])
    return net

@contexts
@pytest.mark.parametrize('kind', odd)
def test_refused_by_name_and_nothing_changed(kind, context):
    net = odd_net(kind)
    before, s = tensors(net), sparsifier(net, context=context)
    with pytest.raises(ValueError, match=f"'1'.*{reasons[kind]}"): s.sparsify_model(50)
    assert same(tensors(net), before)

@pytest.mark.parametrize('by', ['name', 'module'])
@pytest.mark.parametrize('kind', odd)
def test_refused_in_a_dict_and_as_a_layer(kind, by):
    net = odd_net(kind)
    before, s, key = tensors(net), sparsifier(net), '1' if by == 'name' else net[1]
    with pytest.raises(ValueError, match=reasons[kind]): s.sparsify_model({'0': 50, key: 50})
    with pytest.raises(ValueError, match=reasons[kind]): s.sparsify_layer(key, 50)
    assert same(tensors(net), before)

@pytest.mark.parametrize('kind', odd)
def test_the_others_can_be_named_and_the_report_says_why(kind):
    net = odd_net(kind)
    s = sparsifier(net)
    s.sparsify_model({'0': 50, net[2]: 80})
    notes = s.report().set_index('layer').note
    assert [zeros(net[0]), zeros(net[2])] == [50, 80]
    assert reasons[kind] in notes['1'] and notes['0'] == notes['2'] == ''
    assert reasons[kind] in format_report(sparsity_report(net))

@pytest.mark.parametrize('kind', odd)
def test_a_model_of_nothing_else_fails_at_construction(kind):
    with pytest.raises(ValueError, match=f"model .*{reasons[kind]}"): sparsifier(odd[kind](nn.Linear(10, 10)))

@pytest.mark.parametrize('kind,undone', [('pruned by torch', lambda m: prune.remove(m, 'weight')),
    ('weight_norm', remove_weight_norm),
    ('parametrized weight_norm', lambda m: parametrize.remove_parametrizations(m, 'weight')),
    ('lazy', lambda m: m(torch.ones(1, 10)))])
def test_what_the_message_advises_helps(kind, undone):
    m = odd[kind](nn.Linear(10, 10))
    undone(m)
    assert zeros(sparse(m, 75)) == 75

@pytest.mark.parametrize('wrap', [lambda m: weight_norm(m, 'weight_hh_l0'),
    lambda m: parametrizations.weight_norm(m, 'weight_hh_l0'),
    lambda m: prune.l1_unstructured(m, 'weight_hh_l0', .5)], ids=['weight_norm', 'parametrized', 'pruned'])
def test_recurrent_weights_that_are_computed_are_refused(wrap):
    net = nn.ModuleDict(dict(rnn=wrap(nn.LSTM(6, 6)), head=nn.Linear(6, 2)))
    before, s = tensors(net), sparsifier(net, layer_type=None)
    assert list(s.layers) == ['rnn.weight_ih_l0', 'head'] and list(s.refused) == ['rnn.weight_hh_l0']
    with pytest.raises(ValueError, match='rnn.weight_hh_l0'): s.sparsify_model(50)
    assert same(tensors(net), before)

def test_pruned_attention_is_refused():
    m = prune.l1_unstructured(nn.MultiheadAttention(8, 2), 'in_proj_weight', .5)
    with pytest.raises(ValueError, match='in_proj_weight.*prune'): sparsifier(m, layer_type=nn.MultiheadAttention)

@pytest.mark.parametrize('kind', ['dynamic', 'static'])
def test_quantized_modules_are_refused(kind):
    q = pytest.importorskip('torch.ao.nn.quantized')
    layer = (q.dynamic if kind == 'dynamic' else q).Linear
    net = nn.Sequential(nn.Linear(10, 10), layer(10, 10))
    before, s = tensors(net), sparsifier(net, layer_type=(nn.Linear, layer))
    with pytest.raises(ValueError, match="'1'.*quantized"): s.sparsify_model(50)
    assert same(tensors(net), before)
    assert 'quantized' in s.report().set_index('layer').note['1']

def test_a_quantized_model_has_nothing_to_sparsify():
    q = pytest.importorskip('torch.ao.nn.quantized')
    with pytest.raises(ValueError, match="No layer.*Linear.*Sequential"):
        sparsifier(nn.Sequential(q.dynamic.Linear(4, 4)), layer_type=nn.Linear)

@pytest.mark.parametrize('break_it', [lambda net: prune.random_unstructured(net[3], 'bias', .5),
    lambda net: prune.random_unstructured(net[4], 'weight', .5),
    lambda net: parametrize.register_parametrization(net[3], 'bias', nn.Identity()),
    lambda net: net[3]._parameters.update(bias=nn.Parameter(torch.ones(16, device='meta')))],
    ids=['pruned bias', 'pruned BatchNorm', 'parametrized bias', 'meta bias'])
def test_a_bias_or_batchnorm_that_can_not_be_masked(break_it):
    net = cnn()
    break_it(net)
    before = tensors(net)
    with pytest.raises(ValueError, match='bias|weight'): sparse(net, 50, 'filter', layer_type=nn.Conv2d)
    assert same(tensors(net), before)

@contexts
@pytest.mark.parametrize('granularity', ['weight', 'row'])
def test_a_layer_without_elements_is_left_alone(granularity, context):
    net = nn.Sequential(nn.Linear(10, 10), nn.Linear(0, 10), nn.Linear(10, 10))
    s = sparsifier(net, granularity, context)
    for percent in (80, 50): s.sparsify_model(percent)
    assert zeros(net) == 100

def test_a_mask_of_the_wrong_shape_changes_nothing():
    m = nn.Linear(4, 4)
    before = tensors(m)
    with pytest.raises((RuntimeError, ValueError)): set_mask(m, torch.ones(3, 3, dtype=torch.bool))
    assert same(tensors(m), before)

# Values

@contexts
@pytest.mark.parametrize('granularity', ['weight', 'row'])
@pytest.mark.parametrize('criteria', [large_final, small_final, squared_final, movement])
def test_nan_weights_raise_with_the_layer_s_name(criteria, granularity, context):
    net = mlp()
    net[1].weight.data[2,3] = math.nan
    before = tensors(net)
    with pytest.raises(ValueError, match=r"scores of 1 contain NaN"): sparse(net, 50, granularity, context, criteria)
    assert same(tensors(net), before)

def test_nan_gradients_raise():
    net = mlp()
    net(torch.ones(1, 10)).sum().backward()
    net[2].weight.grad[0,0] = math.nan
    before = tensors(net)
    with pytest.raises(ValueError, match=r"scores of 2 contain NaN"): sparse(net, 50, criteria=grad_crit)
    assert same(tensors(net), before)

@contexts
@pytest.mark.parametrize('value', [math.inf, -math.inf])
def test_inf_is_kept(value, context):
    net = mlp()
    net[1].weight.data[2,3] = value
    assert zeros(sparse(net, 90, context=context)) == 270 and net[1].weight[2,3] == value

@contexts
@pytest.mark.parametrize('value', [math.inf, -math.inf])
def test_a_pruned_inf_is_zero(value, context):
    net = mlp()
    net[1].weight.data[2,3:5] = torch.tensor([value, -value])
    sparse(net, 10, context=context, criteria=small_final)
    assert zeros(net) == 30 and (net[1].weight[2,3:5] == 0).all() and net[1].weight.isfinite().all()

def test_filters_of_inf():
    net = cnn(bn=False)
    net[0].weight.data[2] = math.inf
    sparse(net, 50, 'filter', criteria=small_final, layer_type=nn.Conv2d)
    assert (net[0].weight[2] == 0).all() and zeros(net[0]) == size(net[0])//2

@contexts
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16])
def test_a_zero_initialised_layer(dtype, context):
    net, x = mlp().to(dtype), torch.randn(4, 10, dtype=dtype)
    for m in net: nn.init.zeros_(m.weight)
    dense = net(x)
    sparse(net, 40, context=context)
    assert zeros(net) == 120 and torch.allclose(net(x).float(), dense.float(), atol=2e-3)
    masks = [mask.clone() for *_,mask in masked_params(net)]
    net.load_state_dict(deepcopy(net.state_dict()))
    assert all(torch.equal(a, b) for a,(*_,b) in zip(masks, masked_params(net)))

@contexts
@pytest.mark.parametrize('granularity,n', [('weight', 210), ('row', 210), ('column', 210)])
def test_bf16_and_fp16_round_trip(granularity, n, context):
    for dtype in (torch.bfloat16, torch.float16):
        net = sparse(mlp().to(dtype), 70, granularity, context)
        again = mlp().to(dtype)
        again.load_state_dict(net.state_dict())
        assert zeros(net) == zeros(again) == n and next(net.parameters()).dtype == dtype

def test_masks_survive_half_and_double():
    net = sparse(mlp(), 60)
    for cast in (nn.Module.double, nn.Module.half, nn.Module.float):
        cast(net)
        for p in net.parameters(): p.data += 1
        apply_masks(net)
        assert zeros(net) == 180 and all(mask.dtype == torch.bool for *_,mask in masked_params(net))

@contexts
@pytest.mark.parametrize('granularity', ['weight', 'kernel', 'channel', 'shared_kernel', 'filter', block(2,1)])
def test_channels_last_weights(granularity, context):
    plain = cnn()
    last = deepcopy(plain).to(memory_format=torch.channels_last)
    for net in (plain, last):
        s = sparsifier(net, granularity, context, layer_type=nn.Conv2d)
        for percent in (30, 70, 50): s.sparsify_model(percent)
    assert all(torch.equal(a, b) for a,b in zip(plain.parameters(), last.parameters()))
    assert last[3].weight.is_contiguous(memory_format=torch.channels_last)
    assert get_mask(last[3]).stride() == last[3].weight.stride()

def test_weights_that_are_views_of_another_tensor():
    net, flat = mlp(2), torch.randn(200)
    for i,m in enumerate(net): m.weight = nn.Parameter(flat[100*i:100*i+100].view(10, 10).t())
    assert zeros(sparse(net, 30)) == 60 and (flat == 0).sum() == 60

# Arguments

bad_sparsities = [-1, -1e-9, 100.5, math.nan, math.inf, -math.inf, True, False, '50', None, [50], (50,), 50+0j]

@pytest.mark.parametrize('bad', bad_sparsities, ids=str)
def test_sparsity_out_of_range(bad):
    net = mlp()
    before, s = tensors(net), sparsifier(net)
    for f in (s.sparsify_model, lambda v: s.sparsify_layer('1', v), lambda v: s.sparsify_model({'0': 50, '1': v})):
        with pytest.raises((ValueError, TypeError), match='0 to 100'): f(bad)
    assert same(tensors(net), before)

@pytest.mark.parametrize('percent,instead', [(.9, '90'), (.5, '50'), (.001, '0.1')])
def test_a_fraction_warns(percent, instead):
    net = mlp()
    for f in (sparsifier(net).sparsify_model, lambda v: sparsifier(net).sparsify_model({'0': v}),
        lambda v: sparsifier(net).sparsify_layer('0', v)):
        with pytest.warns(UserWarning, match=f'write {instead}$'): f(percent)

@pytest.mark.parametrize('percent', [0, 1, 1.0, 50, 100])
def test_a_percentage_does_not_warn(percent):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        sparse(mlp(), percent)

@pytest.mark.parametrize('bad', [0, -8, 2.5, True, '8', [8]], ids=str)
def test_bad_round_to(bad):
    net = mlp()
    before = tensors(net)
    with pytest.raises(ValueError, match='round_to'): sparsifier(net, 'row').sparsify_model(50, round_to=bad)
    with pytest.raises(ValueError, match='round_to'): sparsifier(net, 'row').sparsify_layer('0', 50, round_to=bad)
    assert same(tensors(net), before)

def test_an_empty_dict():
    with pytest.raises(ValueError, match=r"empty.*'0', '1', '2'"): sparsifier(mlp()).sparsify_model({})

@pytest.mark.parametrize('key', ['conv1', '', '0.weight.x', 3, None, nn.Linear(2, 2)], ids=str)
def test_unknown_names(key):
    net = mlp()
    before, s = tensors(net), sparsifier(net)
    with pytest.raises(ValueError, match=r"use one of \['0', '1', '2'\]"): s.sparsify_model({'0': 50, key: 50})
    with pytest.raises(ValueError, match=r"use one of \['0', '1', '2'\]"): s.sparsify_layer(key, 50)
    assert same(tensors(net), before)

def test_a_dict_needs_local_context():
    net = mlp()
    with pytest.raises(ValueError, match="context='local'"): sparsifier(net, context='global').sparsify_model({'0': 50})
    assert zeros(net) == 0

@pytest.mark.parametrize('layer_type', [nn.Conv3d, (nn.Conv1d, nn.Embedding)])
def test_no_matching_layer(layer_type):
    with pytest.raises(ValueError, match=r"No layer of type.*(Conv3d|Embedding).*Sequential.*'Conv2d', 'Linear'"):
        sparsifier(cnn(), layer_type=layer_type)

@pytest.mark.parametrize('model', [nn.Sequential(), nn.Sequential(nn.ReLU()), nn.ReLU()], ids=str)
def test_models_without_weights(model):
    with pytest.raises(ValueError, match='No layer'): sparsifier(model)
    with pytest.raises(ValueError, match='No layer'): sparsity_report(model)

@pytest.mark.parametrize('alloc', [lambda params, s, **kw: [s], lambda params, s, **kw: [1.5]*3,
    lambda params, s, **kw: [-.1]*3,
    lambda params, s, **kw: [math.nan]*3, lambda params, s, **kw: 1/0],
    ids=['too few', 'above 1', 'below 0', 'NaN', 'fails'])
def test_bad_allocations_change_nothing(alloc):
    net = mlp()
    before = tensors(net)
    with pytest.raises((ValueError, ZeroDivisionError)): sparse(net, 50, context=alloc)
    assert same(tensors(net), before)

def test_gradients_that_are_missing():
    net = mlp()
    before = tensors(net)
    with pytest.raises(ValueError, match="'grad_crit' needs gradients, and 0 has none"):
        sparse(net, 50, criteria=grad_crit)
    assert same(tensors(net), before)

# Failures in the middle, and undo

class Boom(Exception): pass

def fails_at(shape):
    def score(p, **kwargs):
        if p.shape == shape: raise Boom
        return p.abs()
    return score

@contexts
@pytest.mark.parametrize('granularity', ['weight', 'filter'])
@pytest.mark.parametrize('sparse_already', [False, True])
def test_a_criterion_that_fails_in_the_middle(granularity, context, sparse_already):
    net = cnn()
    if sparse_already: sparse(net, 40, granularity, context, layer_type=nn.Conv2d)
    before = tensors(net)
    for criteria in (fails_at(net[3].weight.shape), lambda p: p.sum(), lambda p: p.abs() if len(p) == 8 else None):
        with pytest.raises((Boom, ValueError, AttributeError)):
            sparse(net, 60, granularity, context, criteria, layer_type=nn.Conv2d)
        assert same(tensors(net), before)

def test_a_selection_that_fails_in_the_middle():
    class Fails(Sparsifier):
        def new_mask(self, name, scores, n_keep):
            if name == '3': raise Boom
            return super().new_mask(name, scores, n_keep)
    net = cnn()
    before = tensors(net)
    with pytest.raises(Boom): Fails(net, 'filter', 'local', large_final).sparsify_model(50)
    assert same(tensors(net), before)

def test_after_a_failure_it_goes_on():
    net = mlp()
    s = sparsifier(net)
    s.sparsify_model(20)
    with pytest.raises(ValueError): s.sparsify_model({'0': 50, 'x': 50})
    s.sparsify_model(60)
    assert zeros(net) == 180

@contexts
@pytest.mark.parametrize('granularity', ['weight', 'kernel', 'filter'])
def test_undo_is_exact_to_the_bit(granularity, context):
    net = cnn()
    net[0].weight.data[0,0,0] = torch.tensor([math.inf, -0., 1e-40])
    nn.init.normal_(net[1].weight)
    s, states = sparsifier(net, granularity, context, undo=True, layer_type=nn.Conv2d), []
    for percent in (30, 80, 50):
        states.append(tensors(net))
        s.sparsify_model(percent)
    for state in reversed(states):
        s.undo()
        assert same(tensors(net), state)
    with pytest.raises(ValueError, match='Nothing to undo'): s.undo()

def test_undo_of_a_layer_a_batchnorm_and_a_pattern():
    net, before = cnn(), None
    for s,f in [(sparsifier(net, 'filter', layer_type=nn.Conv2d, undo=True), lambda s: s.sparsify_layer(net[0], 50)),
                (sparsifier(net, nm=True, undo=True), lambda s: s.sparsify_model(50))]:
        before = tensors(net)
        f(s)
        assert not same(tensors(net), before)
        s.undo()
        assert same(tensors(net), before)

def test_undo_after_training():
    net = cnn()
    s = sparsifier(net, 'filter', undo=True, layer_type=nn.Conv2d)
    before = [p.detach().clone() for p in net[:6].parameters()]
    s.sparsify_model(50)
    train(net)
    s.undo()
    assert all(torch.equal(a, b) for a,b in zip(net[:6].parameters(), before)) and not list(masked_params(net))

def test_undo_must_be_asked_for():
    s = sparsifier(mlp())
    s.sparsify_model(50)
    with pytest.raises(ValueError, match='undo=True'): s.undo()

# Saving and loading

load_without_package = """
import sys
sys.modules['fasterai_sparse'] = None
import torch
from torch import nn
path, kind = sys.argv[1:]
if kind == 'model': m = torch.load(path, weights_only=False)
else:
    m = nn.Sequential(nn.Conv2d(3,8,3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8,16,3), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Flatten(), nn.Linear(144,10))
    m.load_state_dict(torch.load(path, weights_only=True))
m.load_state_dict(m.state_dict())
print(sum(int((p==0).sum()) for p in m.parameters() if p.dim() > 1), len(list(m.buffers())),
    m.eval()(torch.ones(1,3,7,7)).sum().item())
"""

@pytest.mark.parametrize('kind', ['model', 'state'])
def test_saved_models_load_where_the_package_is_absent(kind, tmp_path):
    net = cnn()
    s = sparsifier(net, 'filter', layer_type=nn.Conv2d)
    s.sparsify_model(50)
    train(net)
    path = tmp_path/'net.pth'
    s.save_model(path, weights_only=kind=='state')
    out = subprocess.run([sys.executable, '-c', load_without_package, path, kind], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    n, n_buffers, y = out.stdout.split()
    assert (int(n), int(n_buffers)) == (zeros(net), 6)
    assert float(y) == pytest.approx(net.eval()(torch.ones(1,3,7,7)).sum().item(), rel=1e-5)

def test_save_model_writes_the_trained_model_and_leaves_it_as_it_is(tmp_path):
    net = cnn()
    s = sparsifier(net)
    s.sparsify_model(70)
    train(net)
    before = deepcopy(dict(net.named_parameters()) | dict(net.named_buffers()))
    s.save_model(tmp_path/'net.pth')
    again = torch.load(tmp_path/'net.pth', weights_only=False)
    now = dict(net.named_parameters()) | dict(net.named_buffers())
    # except for signs of zeros
    assert now.keys() == before.keys() and all(torch.equal(now[k], v) for k,v in before.items())
    assert not list(masked_params(again))
    assert all(torch.equal(a, b) for a,b in zip(net.parameters(), again.parameters()))
    assert [m.training for m in again.modules()] == [m.training for m in net.modules()]
    with pytest.warns(UserWarning, match=r'0\.00%'): net.load_state_dict(cnn().state_dict())
    assert zeros(net) == 0 and all(mask.all() for *_,mask in masked_params(net))

def test_save_model_writes_another_model(tmp_path):
    net, other = mlp(), mlp()
    s = sparsifier(net)
    s.save_model(tmp_path/'net.pth', other)
    assert torch.equal(torch.load(tmp_path/'net.pth', weights_only=False)[0].weight, other[0].weight)

def test_a_save_that_fails_leaves_the_old_file(tmp_path):
    net = mlp()
    s = sparsifier(net)
    s.save_model(tmp_path/'net.pth')
    old = (tmp_path/'net.pth').read_bytes()
    net.f = lambda x: x
    with pytest.raises((pickle.PicklingError, AttributeError)): s.save_model(tmp_path/'net.pth')
    assert (tmp_path/'net.pth').read_bytes() == old and [f.name for f in tmp_path.iterdir()] == ['net.pth']
    with pytest.raises((FileNotFoundError, RuntimeError)): s.save_model(tmp_path/'none'/'net.pth', weights_only=True)

@contexts
@pytest.mark.parametrize('granularity', ['weight', 'kernel', 'filter'])
@pytest.mark.parametrize('assign', [False, True])
def test_a_dense_checkpoint_opens_the_masks(granularity, context, assign):
    dense = cnn()
    for m in (dense[0], dense[1], dense[3], dense[4]): nn.init.zeros_(m.bias)
    net = sparse(deepcopy(dense), 50, granularity, context, layer_type=nn.Conv2d)
    with pytest.warns(UserWarning, match=r'0\.00%.*(4|5)\d\.\d\d%'):
        net.load_state_dict(deepcopy(dense.state_dict()), assign=assign)
    assert all(mask.all() for *_,mask in masked_params(net))
    train(net)
    assert zeros(net) == 0 and all(p.all() for p in net[:6].parameters())

@pytest.mark.parametrize('granularity', ['weight', 'filter'])
def test_an_equally_sparse_checkpoint_closes_them_without_a_word(granularity):
    net, other = (sparse(cnn(), 50, granularity, layer_type=nn.Conv2d, criteria=random_criteria) for _ in range(2))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        other.load_state_dict(net.state_dict())
    train(other)
    assert all(torch.equal(a, b) for (*_,a),(*_,b) in zip(masked_params(net), masked_params(other), strict=True))
    assert [zeros(m) for m in other] == [zeros(m) for m in net]

@pytest.mark.parametrize('make', [nn.Conv2d, nn.ConvTranspose2d])
def test_biases_follow_into_masks_that_are_open(make):
    net, other = (nn.Sequential(make(8, 8, 3), nn.BatchNorm2d(8)) for _ in range(2))
    sparse(net, 50, 'filter', layer_type=make), sparse(other, 0, 'filter', layer_type=make)
    with pytest.warns(UserWarning): other.load_state_dict(net.state_dict())
    assert all(torch.equal(a, b) for (*_,a),(*_,b) in zip(masked_params(net), masked_params(other), strict=True))

def test_a_sparser_checkpoint_is_said_too():
    net, other = sparse(mlp(), 50), sparse(mlp(), 90)
    with pytest.warns(UserWarning, match=r'90\.00%.*50\.00%'): net.load_state_dict(other.state_dict())
    assert zeros(net) == 270

def test_zero_initialised_batchnorms_survive_a_reload():
    net = cnn()
    nn.init.zeros_(net[4].weight)   # as torchvision's ResNets start with zero_init_residual=True
    sparse(net, 50, 'filter', layer_type=nn.Conv2d)
    masks = [mask.clone() for *_,mask in masked_params(net)]
    net.load_state_dict(deepcopy(net.state_dict()))
    assert all(torch.equal(a, b) for a,(*_,b) in zip(masks, masked_params(net)))

def test_a_part_can_be_loaded():
    net = sparse(cnn(), 50)
    net[3].load_state_dict(cnn()[3].state_dict())
    assert get_mask(net[3]).all() and zeros(net[0]) == 108 and not get_mask(net[0]).all()

def test_a_load_that_fails_leaves_no_trace():
    net = sparse(mlp(), 50)
    before = tensors(net)
    with pytest.raises(RuntimeError): net.load_state_dict({'nothing': torch.ones(1)})
    assert same(tensors(net), before) and not any('before_load' in k for m in net.modules() for k in vars(m))

def test_removed_masks_leave_a_plain_model():
    net = remove_masks(sparse(cnn(), 50, layer_type=nn.Conv2d))
    assert zeros(net[:6]) == size(net[:6])//2 and b'fasterai' not in pickle.dumps(net)
    train(net)
    assert zeros(net[:6]) == 0

# More than one call, more than one Sparsifier

@contexts
@pytest.mark.parametrize('granularity', ['weight', 'filter'])
def test_two_sparsifiers_on_one_model(granularity, context):
    net = cnn()
    first = sparsifier(net, granularity, context, large_final, layer_type=nn.Conv2d)
    second = sparsifier(net, granularity, context, random_criteria, layer_type=nn.Conv2d)
    first.sparsify_model(40)
    old = [mask.clone() for *_,mask in masked_params(net)]
    second.sparsify_model(75)
    new = [mask for *_,mask in masked_params(net)]
    assert not any((n & ~o).any() for n,o in zip(new, old)) and abs(zeros(net[:6])/size(net[:6]) - .75) < .03
    first.sparsify_model(90)
    assert .87 < zeros(net[:6])/size(net[:6]) <= .9

def test_two_sparsifiers_for_two_layer_types():
    net = cnn()
    convs, linears = sparsifier(net, 'filter', layer_type=nn.Conv2d), sparsifier(net, layer_type=nn.Linear)
    convs.sparsify_model(50)
    linears.sparsify_model(80)
    train(net)
    assert zeros(net[7]) == 1152 and zeros(net[:6]) == size(net[:6])//2

def test_two_sparsifiers_warn_once():
    net = mlp()
    dense = deepcopy(net.state_dict())
    sparse(net, 40), sparse(net, 60)
    with pytest.warns(UserWarning) as warned: net.load_state_dict(dense)
    assert len(warned) == 1

def test_filters_of_a_model_whose_weights_are_sparse():
    net = sparse(cnn(), 30, layer_type=nn.Conv2d)
    weights = [get_mask(net[i]).clone() for i in (0,3)]
    sparse(net, 50, 'filter', layer_type=nn.Conv2d)
    assert [int(net[i].weight.flatten(1).any(1).sum()) for i in (0,3)] == [4, 8]
    assert not any((get_mask(net[i]) & ~w).any() for i,w in zip((0,3), weights))

@contexts
@pytest.mark.parametrize('granularity', ['weight', 'filter'])
def test_lowering_a_target_from_90_to_80(granularity, context):
    net = cnn()
    s = sparsifier(net, granularity, context, layer_type=nn.Conv2d)
    s.sparsify_model(90)
    live = [mask.clone() for *_,mask in masked_params(net)]
    s.sparsify_model(80)
    assert not any((l & ~mask).any() for l,(*_,mask) in zip(live, masked_params(net)))
    assert all(torch.equal(p != 0, mask) for *_,p,mask in masked_params(net) if p.dim() > 1)
    n = size(net[:6])
    assert zeros(net[:6]) == round(.8*n) if granularity == 'weight' else .75*n < zeros(net[:6]) <= .83*n

def test_what_comes_back_is_where_the_gradient_is_largest():
    m = nn.Linear(10, 10)
    s = sparsifier(m)
    s.sparsify_model(90)
    live = get_mask(m).clone()
    m.weight.grad = torch.randn(10, 10)
    s.sparsify_model(70)
    assert torch.equal(get_mask(m), live | top_k_mask(m.weight.grad.abs(), 20, ~live))

def test_sparse_gradients():
    m = nn.Embedding(10, 8, sparse=True)
    m(torch.tensor([1,2,3])).square().sum().backward()
    for criteria in (large_final, grad_crit):
        s = sparsifier(m, criteria=criteria, layer_type=nn.Embedding)
        for percent in (90, 80): s.sparsify_model(percent)
        assert zeros(m) == 64
    assert m.weight[1:4].count_nonzero() == 16, 'only those have a gradient'

@pytest.mark.parametrize('granularity', ['weight', 'filter'])
@pytest.mark.parametrize('bn', [False, True])
def test_what_comes_back_learns_again(granularity, bn):
    net = cnn(bn)
    s = sparsifier(net, granularity, layer_type=nn.Conv2d)
    s.sparsify_model(50)
    train(net)
    dead = net[3].weight.detach() == 0
    s.sparsify_model(0)
    train(net, 50)
    assert (net[3].weight[dead].abs() > 1e-4).float().mean() > .5

@contexts
@pytest.mark.parametrize('criteria', [movement, movmag, magnitude_increase, updating_movement])
def test_movement_with_a_rising_target(criteria, context):
    net = cnn()
    s = sparsifier(net, context=context, criteria=criteria, layer_type=nn.Conv2d)
    masks = []
    for percent in (20, 50, 80):
        s.sparsify_model(percent)
        assert zeros(net[:6]) == math.floor(percent/100*size(net[:6]) + .5)
        now = [mask.clone() for *_,mask in masked_params(net)]
        assert not any((n & ~o).any() for n,o in zip(now, masks))
        masks = now
        train(net)

def test_updating_criteria_measure_from_the_last_update():
    m = nn.Linear(10, 10)
    s = sparsifier(m, criteria=updating_movement)
    m.weight.data += torch.rand(10, 10)
    s.sparsify_model(20)
    live, change = get_mask(m).clone(), torch.rand(10, 10)
    m.weight.data += change*live
    s.sparsify_model(60)
    assert torch.equal(get_mask(m), top_k_mask(change, 40, live))

def test_a_sparsifier_follows_weights_that_are_replaced():
    net = mlp()
    s = sparsifier(net)
    s.sparsify_model(50)
    net[1].weight = nn.Parameter(torch.randn(10, 10))
    s.sparsify_model(60)
    assert zeros(net) == 180

def test_frozen_weights_can_be_sparsified():
    net = mlp().requires_grad_(False)
    assert zeros(sparse(net, 50)) == 150 and not any(p.requires_grad for p in net.parameters())

def test_gradients_are_left_alone():
    net = mlp()
    net(torch.randn(3, 10)).sum().backward()
    before = [p.grad.clone() for p in net.parameters()]
    sparse(net, 50)
    assert all(torch.equal(p.grad, g) for p,g in zip(net.parameters(), before))
    assert all(p.is_leaf for p in net.parameters())

def test_a_model_that_can_not_be_traced_keeps_its_batchnorm_and_says_so():
    class Branching(nn.Module):
        def __init__(self): super().__init__(); self.conv, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        def forward(self, x): return self.bn(self.conv(x)) if x.sum() > 0 else x
    net = Branching()
    s = sparsifier(net, 'filter')
    s.sparsify_model(50)
    assert get_mask(net.bn) is None and zeros(net.conv) == 108 and (net.conv.bias == 0).sum() == 4
    assert 'could not be traced' in s.report().note[0]
