"Allocations: sparsity per layer against the closed form, on shapes of real networks, and wherever one is accepted"
from functools import cache

import pytest
from torchvision.models import mobilenet_v2, resnet50

from callback_helpers import loaders, printed
from fastai.basics import CrossEntropyLossFlat, Learner, nn, partial, torch
from fasterai_sparse.core.allocation import erdos_renyi_sparsity, first_layer_dense_uniform, uniform_sparsity
from fasterai_sparse.core.criteria import large_final
from fasterai_sparse.core.report import weight_uses
from fasterai_sparse.core.schedules import lin
from fasterai_sparse.core.select import n_zeros
from fasterai_sparse.core.sparsifier import Sparsifier
from fasterai_sparse.train.sparsify_callback import SparsifyCallback
from fasterai_sparse.dynamic.random_masks import sparsify_model

NETS = dict(resnet50=resnet50, mobilenet_v2=mobilenet_v2)

@cache
def layers(name):
    "Names and weights of all convolutions and the head, on the meta device"
    with torch.device('meta'): net = NETS[name]()
    return {n: m.weight for n,m in net.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}

def raw(w, kernel, power):
    dims = tuple(w.shape) if kernel else tuple(w.shape[:2])
    n = 1
    for d in dims: n *= d
    return (sum(dims)/n)**power

def closed_form(ws, sparsity, kernel, power):
    "Densities min(1, ε·p), with ε found by bisection so that the mean density is as asked"
    ps, ns = [raw(w, kernel, power) for w in ws], [w.numel() for w in ws]
    lo, hi = 0., 1/min(ps)
    for _ in range(200):
        eps = (lo+hi)/2
        if sum(min(1, eps*p)*n for p,n in zip(ps, ns)) < (1-sparsity)*sum(ns): lo = eps
        else: hi = eps
    return [min(1, lo*p) for p in ps]

@pytest.mark.parametrize('net', NETS)
@pytest.mark.parametrize('kernel,power', [(True, 1.), (False, 1.), (True, .5), (True, 0.)])
@pytest.mark.parametrize('sparsity', [.3, .5, .8, .9, .98])
def test_closed_form(net, kernel, power, sparsity):
    ws = list(layers(net).values())
    got = [1-s for s in erdos_renyi_sparsity(ws, sparsity, kernel, power)]
    assert got == pytest.approx(closed_form(ws, sparsity, kernel, power), abs=1e-6)
    assert sum(d*w.numel() for d,w in zip(got, ws)) == pytest.approx((1-sparsity)*sum(w.numel() for w in ws))
    assert power or got == pytest.approx([1-sparsity]*len(ws))

def test_dense_layers_of_resnet50():
    "Layers with the largest (Σ dims)/(Π dims), for which ERK at 90 % asks for a density above 1, stay dense"
    ws = list(layers('resnet50').values())
    got, ps = erdos_renyi_sparsity(ws, .9), [raw(w, True, 1.) for w in ws]
    dense = [p for s,p in zip(got, ps) if s == 0]
    assert 0 < len(dense) < len(ws) and min(dense) > max(p for s,p in zip(got, ps) if s > 0)

def test_depthwise_layers_of_mobilenet_are_densest():
    ws = list(layers('mobilenet_v2').values())
    got = erdos_renyi_sparsity(ws, .8)
    depthwise = [s for s,w in zip(got, ws) if w.shape[1:] == (1,3,3)]
    assert len(depthwise) == 17 and all(s == 0 for s in depthwise)

# dims 3·32·3·3 and so on, written out: raw densities 41/864, 166/36864, 646/589824, 522/5120
def test_by_hand():
    ws = [torch.empty(s, device='meta') for s in ((32,3,3,3), (128,32,3,3), (512,128,3,3), (10,512))]
    # the first and the last would be 2.6 and 5.5 times dense
    eps = (.1*(864+36864+589824+5120) - 864 - 5120)/(166+646)
    assert erdos_renyi_sparsity(ws, .9) == pytest.approx([0, 1-eps*166/36864, 1-eps*646/589824, 0])

# --- where allocations are accepted

def small():
    return nn.Sequential(nn.Conv2d(2,8,3,padding=1), nn.ReLU(), nn.Conv2d(8,16,3,padding=1), nn.AdaptiveAvgPool2d(1),
                         nn.Flatten(), nn.Linear(16,4))

TYPES = nn.Conv2d, nn.Linear

def one_shot_zeros(context, percent):
    model = small()
    Sparsifier(model, 'weight', context, large_final, layer_type=TYPES).sparsify_model(percent)
    return model

def trained_zeros(context, percent):
    learn = Learner(loaders(), small(), loss_func=CrossEntropyLossFlat())
    with learn.no_bar(), learn.no_logging():
        learn.fit(2, cbs=SparsifyCallback(percent, context=context, schedule=lin, layer_type=TYPES, verbose=False))
    return learn.model

def started_zeros(context, percent):
    model = small()
    sparsify_model(model, percent/100, context)
    return model

MAKERS = [one_shot_zeros, trained_zeros, started_zeros]

def counts(model): return [int((m.weight == 0).sum()) for m in model if isinstance(m, TYPES)]

@pytest.mark.parametrize('make', MAKERS)
@pytest.mark.parametrize('context', [uniform_sparsity, first_layer_dense_uniform, erdos_renyi_sparsity,
                                     partial(erdos_renyi_sparsity, include_kernel=False),
                                     partial(erdos_renyi_sparsity, fixed={'5': .5})])
@pytest.mark.parametrize('percent', [50, 77, 90])
def test_budgets_are_exact(make, context, percent):
    ws = [m.weight for m in small() if isinstance(m, TYPES)]
    given = context.keywords if isinstance(context, partial) else {}
    f = context.func if isinstance(context, partial) else context
    fractions = f(ws, percent/100, **given, names=['0', '2', '5']) if 'fixed' in given else f(ws, percent/100, **given)
    got = counts(make(context, percent))
    assert sum(got) == n_zeros(sum(s*w.numel() for s,w in zip(fractions, ws))/sum(w.numel() for w in ws),
                               sum(w.numel() for w in ws))
    for n,s,w in zip(got, fractions, ws): assert abs(n - s*w.numel()) < 1
    if 'fixed' in given: assert got[-1] == 32

@pytest.mark.parametrize('make', MAKERS)
def test_the_first_layer_stays_dense_and_the_rest_is_as_asked(make):
    first, *rest = counts(make(first_layer_dense_uniform, 90))
    assert first == 0 and sum(rest) == n_zeros(.9, 1152+64)

def test_the_report_shows_the_flops_that_it_costs():
    ratio = {}
    for f in (uniform_sparsity, erdos_renyi_sparsity):
        model = small()
        model[2].stride = 3, 3   # the larger layer at fewer positions, as in most networks
        s = Sparsifier(model, 'weight', f, large_final, layer_type=TYPES)
        s.sparsify_model(80)
        df = s.report(torch.randn(1,2,6,6))
        ratio[f] = df.sparse_flops.sum()/df.flops.sum()
        assert f'{ratio[f]:.1%}' in printed(lambda: s.print_sparsity(torch.randn(1,2,6,6)))
    assert ratio[erdos_renyi_sparsity] > ratio[uniform_sparsity] == pytest.approx(.2, abs=.01)

@pytest.mark.parametrize('sparsity,erk,uniform', [(.8, .42, .23), (.9, .24, .13)])
def test_flops_of_resnet50_are_those_of_the_paper(sparsity, erk, uniform):
    "Evci et al. 2020, table 1: inference FLOPs as a share of dense, at 224×224"
    ws = layers('resnet50')
    with torch.device('meta'): uses = weight_uses(resnet50(), torch.empty(1,3,224,224))
    assert len(uses) >= 54
    used = list(uses.values())
    flops = [u*w.numel() for u,w in zip(used, ws.values())]
    cost = lambda fractions: sum((1-s)*f for s,f in zip(fractions, flops))/sum(flops)
    assert cost(erdos_renyi_sparsity(list(ws.values()), sparsity)) == pytest.approx(erk, abs=.01)
    assert cost(first_layer_dense_uniform(list(ws.values()), sparsity)) == pytest.approx(uniform, abs=.011)
