"permute_model on real networks and odd ones: nothing that the library says of itself is believed here"
import inspect, random
from copy import deepcopy
from types import SimpleNamespace

import numpy as np, pytest, torch, torchvision.models as tv
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune

from fasterai_sparse import permute_model as module
from fasterai_sparse.masks import get_mask, set_mask
from fasterai_sparse.permute_model import permute_model

class Net(nn.Module):
    "Modules `mods` by name, and a function of them and the inputs as `forward`"
    def __init__(self, run, **mods):
        super().__init__()
        self.run = run
        for n,m in mods.items(): setattr(self, n, m)
    def forward(self, *args, **kwargs): return self.run(self, *args, **kwargs)

def stirred(model):
    "`model` with all that initialization leaves at a number filled with others, so that what goes wrong shows"
    with torch.no_grad():
        for n,t in [*model.named_parameters(), *model.named_buffers()]:
            if t.is_floating_point() and t.numel() > 1 and t.min() == t.max(): t.uniform_(.5, 1.5) if t.min() > .5 else t.normal_(0, .3)
    return model

def leaves(out):
    if torch.is_tensor(out): return [out]
    if isinstance(out, dict): out = out.values()
    return [t for o in (vars(out).values() if isinstance(out, SimpleNamespace) else out) for t in leaves(o)] if out is not None else []

def doubled(x):
    if isinstance(x, dict): return {k: doubled(v) for k,v in x.items()}
    if isinstance(x, tuple): return tuple(map(doubled, x))
    return x.to(torch.float64, copy=True) if torch.is_tensor(x) and x.is_floating_point() else x

def outputs(model, x, training):
    "What a copy of `model` gives in float64, with dropout off"
    model = deepcopy(model).double().train(training)
    for m in model.modules():
        if 'Dropout' in type(m).__name__ or hasattr(m, 'p') and isinstance(m.p, float): m.p = 0.
        if isinstance(getattr(m, 'dropout', None), float): m.dropout = 0.
        if hasattr(m, 'weight_p'): m.weight_p = 0.
        if hasattr(m, 'embed_p'): m.embed_p = 0.
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(1)
        x = doubled(x)
        return leaves(model(**x) if isinstance(x, dict) else model(*x) if isinstance(x, tuple) else model(x))

def difference(a, b):
    assert len(a) == len(b) > 0 and all(torch.equal(x.isfinite(), y.isfinite()) for x,y in zip(a, b))
    parts = [((x-y)[m].abs().max()/x[m].abs().max()).item() for x,y in zip(a, b) if (m := x.isfinite() & (x.abs() < 1e6)).any() and x[m].abs().max() > 0]
    assert parts   # a comparison of nothing shows nothing
    return max(parts)

def check(model, x, trains=True, **kwargs):
    "Permute `model` and hold it against what it was; returns the report"
    modes = [False, True][:1+trains]
    was, mode, was_training = [outputs(model, x, t) for t in modes], torch.is_grad_enabled(), [m.training for m in model.modules()]
    params, sizes, keys = [id(p) for p in model.parameters()], [(t.shape, t.dtype, t.stride()) for t in model.state_dict().values()], list(model.state_dict())
    rng, other_rng, numpy_rng = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    df = permute_model(model, x, time_budget=.01, **kwargs)
    assert torch.equal(torch.get_rng_state(), rng) and random.getstate() == other_rng and (np.random.get_state()[1] == numpy_rng).all()
    assert torch.is_grad_enabled() == mode and [m.training for m in model.modules()] == was_training and not any(hasattr(t, '_labels') for t in [*model.parameters(), *model.buffers()])
    assert [id(p) for p in model.parameters()] == params and list(model.state_dict()) == keys and [(t.shape, t.dtype, t.stride()) for t in model.state_dict().values()] == sizes
    for t,before in zip(modes, was): assert difference(before, outputs(model, x, t)) < 1e-10
    can = df[df.naive.notna()]
    assert can.kept.sum() >= can.naive.sum()*(1-1e-6)
    return df

@pytest.fixture
def rules_alone(monkeypatch):
    "Nothing is taken back: what the rules say has to be right by itself"
    monkeypatch.setattr(module, '_differ', lambda *args: False)

def measured(model, df):
    "Share of the weights that the report says were searched, computed anew"
    can = df[df.naive.notna()]
    return (can.searched.sum()/can.weights.sum())

image = lambda size=64: torch.randn(2, 3, size, size)
small_resnet = lambda **kw: tv.ResNet(tv.resnet.Bottleneck, [1,1,1,1], num_classes=10, **kw)
NETWORKS = {   # name -> what makes it, its input, the least share of its weights that has to move
    'resnet18': (lambda: tv.resnet18(num_classes=10), image, 1),
    'resnet bottleneck': (small_resnet, image, 1),
    'resnext': (lambda: small_resnet(groups=8, width_per_group=8), image, 1),
    'mobilenet_v2': (lambda: tv.mobilenet_v2(num_classes=10, width_mult=.5), image, 1),
    'mobilenet_v3': (lambda: tv.mobilenet_v3_small(num_classes=10), image, 1),
    'efficientnet': (lambda: tv.efficientnet_b0(num_classes=10), image, 1),
    'regnet': (lambda: tv.RegNet(tv.regnet.BlockParams.from_init_params(depth=4, w_0=24, w_a=24., w_m=2.5, group_width=8, se_ratio=.25), num_classes=10), image, 1),
    'convnext': (lambda: tv.ConvNeXt([tv.convnext.CNBlockConfig(16,32,1), tv.convnext.CNBlockConfig(32,64,1), tv.convnext.CNBlockConfig(64,None,1)], num_classes=10), image, 1),
    'densenet': (lambda: tv.DenseNet(8, (2,2,2), 16, num_classes=10), image, 1),
    'googlenet': (lambda: tv.googlenet(num_classes=10, aux_logits=True, init_weights=False), image, .57),
    'squeezenet': (lambda: tv.squeezenet1_1(num_classes=10), image, 1),
    'vgg': (lambda: tv.VGG(tv.vgg.make_layers([16,'M',32,'M',32,'M'], batch_norm=True), num_classes=10), image, 1),
    'shufflenet': (lambda: tv.shufflenet_v2_x0_5(num_classes=10), image, .8),
    'vit': (lambda: tv.VisionTransformer(32, 8, 2, 4, 64, 128, num_classes=10), lambda: image(32), 1),
    'swin': (lambda: tv.SwinTransformer([4,4], 32, [2,2], [2,4], [4,4], num_classes=10), image, 1),
    'swin_v2': (lambda: tv.SwinTransformer([4,4], 32, [2,2], [2,4], [4,4], num_classes=10, block=tv.swin_transformer.SwinTransformerBlockV2, downsample_layer=tv.swin_transformer.PatchMergingV2), image, .5),
}

@pytest.mark.parametrize('name', NETWORKS)
def test_networks_of_torchvision(name, rules_alone):
    make, x, share = NETWORKS[name]
    model = stirred(make())
    df = check(model, x(), trains=True)
    can = df[df.naive.notna()]
    print(name, df.attrs['share'], can.kept.sum()/can.naive.sum(), df[df.note != ''][['layer','weights','note']].to_string())
    assert can.kept.sum() > can.naive.sum()*1.001 and df.attrs['share'] >= .99*share
