"From a trained model to a verified N:M pattern: verify_nm, prune_trained_model, and `permute=True`"
from copy import deepcopy

import pytest, torch
from fastai.vision.learner import vision_learner
from torchvision.models.resnet import BasicBlock, ResNet
from torch import nn

from callback_helpers import at, fit, learner, loaders, sparse
from fastai.basics import CrossEntropyLossFlat, partial, set_seed
from fasterai_sparse.core.criteria import large_final, movement, wanda
from fasterai_sparse.core.layers import maskable_weights
from fasterai_sparse.core.masks import get_mask, masked_params, remove_masks
from fasterai_sparse.core.schedules import agp, lin, one_shot
from fasterai_sparse.core.sparsifier import Sparsifier
from fasterai_sparse.train.opt_state import elementwise_state
from fasterai_sparse.train.updates import bake_masks
from fasterai_sparse.nm.verify import prune_trained_model, verify_nm

def net():
    return nn.Sequential(nn.Conv2d(2,16,3,padding=1,bias=False), nn.BatchNorm2d(16), nn.ReLU(),
                         nn.Conv2d(16,32,3,padding=1), nn.BatchNorm2d(32), nn.ReLU(),
                         nn.Conv2d(32,32,3,padding=1,groups=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(32,16), nn.ReLU(), nn.Linear(16,4))

def broken(model, n=2, m=4):
    "Number of N:M groups with too many live weights"
    count = 0
    for l in model.modules():
        if isinstance(l, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)) and l.weight.shape[1] % m == 0:
            w = l.weight.detach().movedim(1, -1).reshape(-1, m)
            count += int(((w != 0).sum(1) > n).sum())
    return count

@pytest.mark.parametrize('n,m', [(2,4), (1,4), (4,8), (1,2)])
@pytest.mark.parametrize('layer',
                         [lambda: nn.Linear(16,6), lambda: nn.Conv1d(16,6,3), lambda: nn.Conv2d(16,6,3),
                          lambda: nn.Conv3d(16,6,2), lambda: nn.Conv2d(32,8,3,groups=2),
                                   lambda: nn.ConvTranspose2d(16,6,3), lambda: nn.MultiheadAttention(16,2),
                                   lambda: nn.LSTM(16,8)])
def test_what_the_sparsifier_sets_verifies(layer, n, m):
    model = nn.Sequential(layer())
    Sparsifier(model, 'weight', 'local', large_final, nm=(n, m), layer_type=None).sparsify_model(100*(m-n)/m)
    df = verify_nm(model, n, m)
    assert (df.pattern == f'{n}:{m}').all() and (df.broken == 0).all() and df.attrs['share'] == 1 and df.masked.all()
    assert (df.groups == [m_._parameters[p].numel()//m for _,m_,p in maskable_weights(model)]).all()

def test_each_broken_group_is_counted():
    model = nn.Sequential(nn.Conv2d(8,4,3))
    Sparsifier(model, 'weight', 'local', large_final, nm=True).sparsify_model(50)
    remove_masks(model)
    with torch.no_grad():
        model[0].weight[1,:4,0,0], model[0].weight[2,4:,2,1] = torch.tensor([1.,1,1,0]), 2.   # one too many, and two
    row = verify_nm(model).iloc[0]
    assert (row.broken, row.pattern, row.note) == (2, 'no', '2 of 72 groups keep more than 2')
    assert verify_nm(model).attrs['share'] == 0

def test_layers_without_a_pattern_are_reported_with_the_reason():
    model = nn.Sequential(nn.Linear(6,4), nn.Linear(8,4), nn.LazyLinear(4),
                          nn.utils.parametrizations.weight_norm(nn.Linear(8,4)))
    df = verify_nm(model)
    assert df.pattern.tolist()[:2] == ['dense', 'dense'] and df.note[0] == '6 inputs are no multiple of 4'
    assert 'lazy' in df.note[2] and 'parametrized' in df.note[3]
    with pytest.raises(ValueError, match='No layer of ReLU'): verify_nm(nn.ReLU())
    with pytest.raises(ValueError, match='4:4'): verify_nm(model, 4, 4)

@pytest.mark.parametrize('permute', [True, False])
@pytest.mark.parametrize('n,m', [(2,4), (1,4)])
def test_prune_trained_model_keeps_the_pattern(permute, n, m):
    learn = fit(learner(model=net()))
    df = prune_trained_model(learn, n, m, permute=permute)
    assert (df.pattern == f'{n}:{m}').tolist() == [False] + [True]*4 and broken(learn.model, n, m) == 0
    for *_,p,mask in masked_params(learn.model):
        past = list(elementwise_state(learn.opt, p))
        assert past and not any(bool(s[~mask].any()) for s in past)
    dead = {n_: m_.weight == 0 for n_,m_ in learn.model.named_modules() if isinstance(m_, (nn.Conv2d, nn.Linear))}
    fit(fit(learn), how='fit_one_cycle')
    assert broken(learn.model, n, m) == 0
    assert all((learn.model.get_submodule(k).weight == 0)[d].all() for k,d in dead.items())
    assert (df.attrs['permutation'] is None) != permute
    bake_masks(learn)
    assert not list(masked_params(learn.model)) and verify_nm(learn, n, m).broken.sum() == 0

def test_prune_trained_model_permutes_without_a_change():
    learn = fit(learner(model=net()))
    x = learn.dls.one_batch()[0]
    was = learn.model.eval()(x)
    s = Sparsifier(learn.model, 'weight', 'local', large_final, nm=True, permute=True,
                   layer_type=(nn.Linear, nn.Conv2d), data=x)
    s.permute(opt=learn.opt)
    assert torch.allclose(learn.model.eval()(x), was, atol=1e-5) and s.permutation.attrs['share'] > .9
    assert s.permutation.kept.sum() > s.permutation.naive.sum()
    assert not list(masked_params(learn.model))

def test_prune_trained_model_skips():
    learn = learner(model=net())   # never fitted: there is no optimizer
    df = prune_trained_model(learn, skip=['12', learn.model[3]]).set_index('layer')
    assert df.pattern['12'] == df.pattern['3'] == 'dense' and df.pattern['6'] == df.pattern['10'] == '2:4'
    fit(learn)
    assert verify_nm(learn).set_index('layer').pattern['10'] == '2:4'

@pytest.mark.parametrize('kwargs',
                         [dict(n=4), dict(skip=['none']), dict(skip=['3','6','10','12']), dict(layer_type=nn.Conv3d),
                          dict(criteria='large')])
def test_bad_calls_change_nothing(kwargs):
    learn = fit(learner(model=net()))
    was, cbs = deepcopy(learn.model.state_dict()), list(learn.cbs)
    with pytest.raises((ValueError, TypeError)): prune_trained_model(learn, **kwargs)
    assert all(torch.equal(v, was[k]) for k,v in learn.model.state_dict().items())
    assert not list(masked_params(learn.model)) and list(learn.cbs) == cbs

@pytest.mark.parametrize('criterion', [large_final, movement, wanda])
def test_criteria_and_their_snapshots_go_along(criterion):
    model, x = net(), torch.randn(8,2,6,6)
    s = Sparsifier(model, 'weight', 'local', criterion, nm=True, permute=True, layer_type=(nn.Conv2d, nn.Linear),
                   data=x)
    if s.init:   # initial weights that differ from the current ones
        was = {n: s.param(n).detach().clone() for n in s.layers}
        with torch.no_grad():
            for n in s.layers: s.param(n).mul_(2)
    s.sparsify_model(50)
    assert broken(model) == 0 and len(s.permutation)
    for n,t in s.init.items():
        live = get_mask(*s.layers[n])
        assert torch.equal(2*t[live], s.param(n)[live]) and not torch.equal(was[n], t)

def test_a_second_sparsifier_leaves_the_order():
    model, x = net(), torch.randn(8,2,6,6)
    make = lambda: Sparsifier(model, 'weight', 'local', large_final, nm=True, permute=True,
                              layer_type=(nn.Conv2d, nn.Linear), data=x)
    make().sparsify_model(50)
    was = deepcopy(model.state_dict())
    s = make()
    s.sparsify_model(50)
    assert s.permutation is None and all(torch.equal(v, was[k]) for k,v in model.state_dict().items())

def test_permute_is_for_patterns():
    with pytest.raises(ValueError, match="N:M pattern"): Sparsifier(net(), 'filter', 'local', large_final, permute=True)
    with pytest.raises(ValueError, match="N:M pattern"): fit(learner(model=net()), cbs=sparse(50, permute=True))
    with pytest.raises(ValueError, match='needs data='):
        Sparsifier(net(), 'weight', 'local', large_final, nm=True, permute=True).sparsify_model(50)

@pytest.mark.parametrize('schedule', [one_shot, lin, agp])
def test_the_callback_permutes_before_it_starts(schedule):
    learn = fit(learner(model=net()))
    x = learn.dls.one_batch()[0]
    was, seen = learn.model.eval()(x), []
    def first(l):
        if not seen: seen.append(deepcopy(l.model).eval()(x))
    fit(learn, 3,
        [sparse(50, schedule, nm=True, permute=True, layer_type=(nn.Conv2d, nn.Linear)), at('before_batch', first)])
    assert torch.allclose(seen[0], was, atol=1e-5) and broken(learn.model) == 0

def test_the_callback_rewinds_to_permuted_weights():
    learn = fit(learner(model=net()))
    start, types = deepcopy(learn.model), (nn.Conv2d, nn.Linear)
    Sparsifier(start, 'weight', 'local', large_final, nm=True, permute=True, layer_type=types,
               data=learn.dls.one_batch()).permute()
    was = {n: m._parameters[p].clone() for n,m,p in maskable_weights(start, types)}
    assert any(not torch.equal(was[n], m._parameters[p]) for n,m,p in maskable_weights(learn.model, types))
    fit(learn, 2, sparse(50, one_shot, nm=True, permute=True, layer_type=types, reset_end=True))
    for n,m,p in maskable_weights(learn.model, types):
        w = m._parameters[p]
        assert torch.equal(w[w != 0], was[n][w != 0])
    assert broken(learn.model) == 0

def test_a_fit_goes_on_in_its_order():
    learn = fit(learner(model=net()))
    cb = sparse(50, lin, nm=True, permute=True, layer_type=(nn.Conv2d, nn.Linear))
    fit(learn, 2, cb)
    dead = {n: (m.weight == 0).clone()
            for n,m in learn.model.named_modules() if hasattr(m, 'weight') and m.weight.dim() > 1}
    fit(learn, 2, cb)
    assert all(((learn.model.get_submodule(n).weight == 0) == d).all() for n,d in dead.items())
    assert broken(learn.model) == 0

def test_a_vision_learner():
    "A torchvision body with fastai's head of AdaptiveConcatPool, Flatten and BatchNorm1d"
    def small_resnet(pretrained=False): return ResNet(BasicBlock, [1,1,1,1])
    set_seed(0)
    dls = loaders(4, lambda n: list(zip(torch.randn(n, 8, 3, 32, 32), torch.randint(4, (n, 8)))))
    make = partial(vision_learner, dls, small_resnet, pretrained=False, n_out=4, normalize=False,
                   loss_func=CrossEntropyLossFlat())
    learn = make()
    learn.unfreeze()
    cb = sparse(50, one_shot, nm=True, permute=True, layer_type=(nn.Conv2d, nn.Linear))
    fit(learn, 1, cb)
    df = cb.sparsifier.permutation
    assert df.attrs['share'] == 1 and df.kept.sum() > 1.002*df.naive.sum() and broken(learn.model) == 0
    assert verify_nm(learn).pattern.tolist().count('dense') == 1   # the first reads three channels
    x = dls.one_batch()[0]
    model = make().model.eval()
    was = model(x)
    s = Sparsifier(model, 'weight', 'local', large_final, nm=True, permute=True, layer_type=(nn.Conv2d, nn.Linear),
                   data=x)
    s.permute()
    assert torch.allclose(model(x), was, atol=1e-4*was.abs().max().item()) and s.permutation.attrs['share'] == 1
