"permute_model on real and unusual networks, checked without relying on the library's own report"
import random
from copy import deepcopy
from types import SimpleNamespace

import numpy as np, pytest, torch, torchvision.models as tv
import torch.nn.functional as F
from fastai import optimizer as fastai_opt
from fastai.tabular.model import TabularModel
from fastai.text.models.awdlstm import AWD_LSTM
from fastai.text.models.core import get_language_model, get_text_classifier
from fastai.vision.all import DynamicUnet, create_body, create_head, ResBlock
from fastai.vision.models import xresnet
from torch import nn
from torch.nn.utils import parametrizations, prune

from nets import NetOfAnyInputs as Net
from fasterai_sparse.nm import permute_model as module
from fasterai_sparse.core.masks import get_mask, set_mask
from fasterai_sparse.nm.permute_model import permute_model

def stirred(model):
    "`model` with random values in all constant tensors, so that wrong permutations change the output"
    with torch.no_grad():
        for n,t in [*model.named_parameters(), *model.named_buffers()]:
            if t.is_floating_point() and t.numel() > 1 and t.min() == t.max():
                t.uniform_(.5, 1.5) if t.min() > .5 else t.normal_(0, .3)
    return model

def leaves(out):
    if torch.is_tensor(out): return [out]
    if isinstance(out, dict): out = out.values()
    return [t for o in (vars(out).values() if isinstance(out, SimpleNamespace) else out)
            for t in leaves(o)] if out is not None else []

def doubled(x):
    if isinstance(x, dict): return {k: doubled(v) for k,v in x.items()}
    if isinstance(x, tuple): return tuple(map(doubled, x))
    return x.to(torch.float64, copy=True) if torch.is_tensor(x) and x.is_floating_point() else x

def outputs(model, x, training):
    "Outputs of a copy of `model` in float64, with dropout off"
    model = deepcopy(model).double().train(training)
    for m in model.modules():
        for a in ('p', 'dropout', 'weight_p', 'embed_p'):
            if isinstance(getattr(m, a, None), float): setattr(m, a, 0.)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(1)
        x = doubled(x)
        return leaves(model(**x) if isinstance(x, dict) else model(*x) if isinstance(x, tuple) else model(x))

def difference(a, b):
    assert len(a) == len(b) > 0 and all(torch.equal(x.isfinite(), y.isfinite()) for x,y in zip(a, b))
    parts = [((x-y)[m].abs().max()/x[m].abs().max()).item()
             for x,y in zip(a, b) if (m := x.isfinite() & (x.abs() < 1e6)).any() and x[m].abs().max() > 0]
    assert parts   # a comparison of nothing shows nothing
    return max(parts)

def check(model, x, trains=True, **kwargs):
    "Permute `model`, compare it with what it was before, and return the report"
    modes = [False, True][:1+trains]
    was, mode = [outputs(model, x, t) for t in modes], torch.is_grad_enabled()
    was_training = [m.training for m in model.modules()]
    params = [id(p) for p in model.parameters()]
    sizes, keys = [(t.shape, t.dtype, t.stride()) for t in model.state_dict().values()], list(model.state_dict())
    rng, other_rng, numpy_rng = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    df = permute_model(model, x, time_budget=.01, **kwargs)
    assert torch.equal(torch.get_rng_state(), rng) and random.getstate() == other_rng
    assert (np.random.get_state()[1] == numpy_rng).all()
    assert torch.is_grad_enabled() == mode and [m.training for m in model.modules()] == was_training
    assert not any(hasattr(t, '_labels') for t in [*model.parameters(), *model.buffers()])
    assert [id(p) for p in model.parameters()] == params and list(model.state_dict()) == keys
    assert [(t.shape, t.dtype, t.stride()) for t in model.state_dict().values()] == sizes
    for t,before in zip(modes, was): assert difference(before, outputs(model, x, t)) < 1e-10
    assert df.kept.sum() >= df.naive.sum()*(1-1e-6)
    return df

@pytest.fixture
def rules_alone(monkeypatch):
    "Switch off the check of outputs, so that the rules must be right by themselves"
    monkeypatch.setattr(module, '_differ', lambda *args: False)

conv = lambda i, o, k=1, **kw: nn.Conv2d(i, o, k, padding=k//2, **kw)
small, tokens, row = lambda: torch.randn(2,4,6,6), lambda: torch.randn(2,6,16), lambda: torch.randn(6,12)
ids = lambda: torch.randint(1, 20, (2,6))
lin = nn.Linear
image = lambda size=64: torch.randn(2, 3, size, size)
def small_resnet(**kwargs):
    model = tv.ResNet(tv.resnet.Bottleneck, [2,1,1,1], num_classes=10, **kwargs)
    model.layer4, model.fc = nn.Identity(), nn.Linear(1024,10)
    return model

def small_unet(**kwargs):
    return DynamicUnet(create_body(xresnet.XResNet(ResBlock, 1, [1,1,1], stem_szs=(8,8,64), widen=.5), pretrained=False,
                                   cut=-4), 5, (32,32), **kwargs)
class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.e, self.o = nn.Embedding(30, 16, padding_idx=0), nn.Linear(64, 4)
        self.r = kind(16, 16, 2, batch_first=True, dropout=.1, bidirectional=True)
    def forward(self, x):
        h = self.r(self.e(x))[0]
        return self.o(torch.cat([h.amax(1), h[:,-1]], 1))

NETWORKS = {   # name -> factory, input, the smallest share of its weights that must move
    'resnet18': (lambda: tv.resnet18(num_classes=10), image, 1), 'resnet bottleneck': (small_resnet, image, 1),
    'resnext': (lambda: small_resnet(groups=8, width_per_group=8), image, 1),
    'mobilenet_v2': (lambda: tv.mobilenet_v2(num_classes=10, width_mult=.5), image, 1),
    'mobilenet_v3': (lambda: tv.mobilenet_v3_small(num_classes=10), image, 1),
    'efficientnet': (lambda: tv.EfficientNet(
        (c := tv.efficientnet._efficientnet_conf('efficientnet_b0', width_mult=.5, depth_mult=.7))[0],
        .2, last_channel=c[1], num_classes=10), image, 1),
    'regnet': (lambda: tv.RegNet(
        tv.regnet.BlockParams.from_init_params(depth=4, w_0=24, w_a=24., w_m=2.5, group_width=8, se_ratio=.25),
        num_classes=10), image, 1),
    'convnext': (lambda: tv.ConvNeXt([tv.convnext.CNBlockConfig(16,32,1), tv.convnext.CNBlockConfig(32,64,1),
                                      tv.convnext.CNBlockConfig(64,None,1)], num_classes=10), image, 1),
    'densenet': (lambda: tv.DenseNet(8, (2,2,2), 16, num_classes=10), image, 1),
    'googlenet': (lambda: tv.googlenet(num_classes=10, aux_logits=True, init_weights=False), image, .57),
    'squeezenet': (lambda: tv.squeezenet1_1(num_classes=10), image, 1),
    'vgg': (lambda: nn.Sequential(tv.vgg.make_layers([16,'M',32,'M',32,'M'], batch_norm=True), nn.AdaptiveAvgPool2d(7),
                                  nn.Flatten(), lin(32*49,64), nn.ReLU(True), nn.Dropout(), lin(64,10)), image, .12),
    'shufflenet': (lambda: tv.shufflenet_v2_x0_5(num_classes=10), image, .8),
    'vit': (lambda: tv.VisionTransformer(32, 8, 2, 4, 64, 128, num_classes=10), lambda: image(32), 1),
    'swin': (lambda: tv.SwinTransformer([4,4], 32, [2,2], [2,4], [4,4], num_classes=10), image, 1),
    'swin_v2': (lambda: tv.SwinTransformer([4,4], 32, [2,2], [2,4], [4,4], num_classes=10,
                                           block=tv.swin_transformer.SwinTransformerBlockV2,
                                           downsample_layer=tv.swin_transformer.PatchMergingV2), image, 1),
    'xresnet': (lambda: xresnet.XResNet(ResBlock, 1, [2,1,1,1], n_out=10, stem_szs=(8,8,64), widen=.25), image, 1),
    'xse_resnext': (lambda: xresnet.XResNet(ResBlock, 4, [1,1,1,1], n_out=10, stem_szs=(8,8,64), widen=.25, groups=4,
                                            reduction=4), image, .9),
    'unet': (small_unet, lambda: image(32), 1),
    'head': (lambda: nn.Sequential(create_body(small_resnet(), pretrained=False), create_head(1024, 10, lin_ftrs=[64])),
             image, 1),
    'tabular': (lambda: TabularModel([(10,4),(7,8)], 4, 3, [32,16], ps=.1, y_range=(0,1)),
                lambda: (torch.randint(0, 7, (8,2)), torch.randn(8,4)), .75),
    'lstm': (lambda: Recurrent(nn.LSTM), ids, 1), 'gru': (lambda: Recurrent(nn.GRU), ids, 1),
}

@pytest.mark.parametrize('name', NETWORKS)
def test_networks(name, rules_alone):
    make, x, share = NETWORKS[name]
    df = check(stirred(make()), x())
    can = df[df.naive.notna()]
    assert can.kept.sum() > can.naive.sum()*1.001 and can.searched.sum() >= .99*share*can.weights.sum()
    assert abs(df.attrs['share'] - can.searched.sum()/can.weights.sum()) < 1e-9

def between(f, i=16, o=16, make=conv, /, **mods):
    """A network that computes `f` between two hidden layers.

    The layers around them have channels of their own, which must move whatever `f` is."""
    return Net(lambda s, x: s.m5(torch.relu(s.m4(s.m3(f(s, s.m2(s.m1(x))))))), m1=make(4 if make is conv else 16,12),
               m2=make(12,i), m3=make(o,12), m4=make(12,16), m5=make(16,4), **mods)
def between_tokens(f, i=16, o=16, /, **mods): return between(f, i, o, lin, **mods)

def heads(s, x, h=4, einsum=False):
    q, k, v = (l(x).unflatten(-1, (h,-1)) for l in (s.q, s.k, s.v))
    if einsum:
        return s.o(torch.einsum('bhqk,bkhd->bqhd', torch.einsum('bqhd,bkhd->bhqk', q, k).softmax(-1), v).flatten(2))
    return s.o(((q.transpose(1,2) @ k.transpose(1,2).mT/2).softmax(-1) @ v.transpose(1,2)).transpose(1,2).flatten(2))
def causal_attention(s, x):
    qkv = [l(x).unflatten(-1, (4,4)).transpose(1,2) for l in (s.q, s.k, s.v)]
    return s.o(F.scaled_dot_product_attention(*qkv, is_causal=True).transpose(1,2).flatten(2))
def each_step(s, x):
    "The states of the recurrent cell `s.n`, stacked"
    states = [s.n(x[:,0], None)]
    for t in range(1, 6): states.append(s.n(x[:,t], states[-1]))
    return torch.stack(states, 1)
attention = lambda: dict(q=lin(16,16), k=lin(16,16), v=lin(16,16), o=lin(16,16))

def written(x, at, f):
    x = x.clone()
    f(x[:,at])
    return x
def parts(x): return x[:,:8], x[:,8:]

ODD = {
    # where ASP is wrong or crashes
    'linear attention': (lambda: between_tokens(heads, **attention()), tokens),
    'channel shuffle': (lambda: between(lambda s, x: x.view(2,4,4,6,6).transpose(1,2).reshape(2,16,6,6)), small),
    'chunks in another order': (lambda: between(lambda s, x: torch.cat(x.chunk(2, 1)[::-1], 1)), small),
    'group_norm': (lambda: between(lambda s, x: F.group_norm(x, 4)), small),
    'roll': (lambda: between(lambda s, x: x.roll(3, 1)), small),
    'linear used twice': (lambda: between_tokens(lambda s, x: s.l(torch.relu(s.l(x))), l=lin(16,16)), tokens),
    'prelu': (lambda: between(lambda s, x: s.p(x), 64, 64, p=nn.PReLU(64)), small),
    'residual to the output': (lambda: Net(lambda s, x: s.y(torch.relu(s.c(h := s.a(x)))) + h, a=conv(4,16),
                                           c=conv(16,32), y=conv(32,16)), small),
    'some of the channels': (lambda: between_tokens(lambda s, x: x[...,:16], 32, 16), tokens),
    # operations on some of the channels
    'relu of some': (lambda: between(lambda s, x: torch.cat([(p := parts(x))[0].relu(), p[1]], 1)), small),
    'sum of some': (lambda: between(lambda s, x: x + parts(x)[0].sum(1, keepdim=True)), small),
    'softmax of some': (lambda: between(lambda s, x: torch.cat([parts(x)[0].softmax(1), parts(x)[1]], 1)), small),
    'norm of some': (lambda: between(lambda s, x: torch.cat([F.normalize(parts(x)[0], dim=1), parts(x)[1]], 1)), small),
    'product of some': (lambda: between_tokens(lambda s, x: x + (x[...,:8] @ x[...,:8].mT).sum(-1, keepdim=True)),
                        tokens),
    'pool of some': (lambda: between(lambda s, x: torch.cat([F.max_pool2d(parts(x)[0], 3, 1, 1), parts(x)[1]], 1)),
                     small),
    'one by all': (lambda: between(lambda s, x: x*x[:,5].mean()), small),
    'one in a product': (lambda: between(lambda s, x: x + (x[:,5] @ torch.ones(6,6).to(x).triu())[:,None]), small),
    'places of pairs': (lambda: between(
        lambda s, x: torch.cat([F.adaptive_max_pool2d(x, 6)[:,8:], F.avg_pool2d(x, 3, 1, 1), x.sigmoid()[:,:8]], 1),
        16, 32), small),
    'mean over an axis': (lambda: Net(lambda s, x: s.c((h := s.a(x)).mean(axis=(2,3))) + s.b(h).mean((2,3)),
                                      a=conv(4,16), b=conv(16,8), c=lin(16,8)), small),
    'written in part': (lambda: between(lambda s, x: written(x, slice(8), lambda p: p.mul_(2.))), small),
    'zeroed in part': (lambda: between(lambda s, x: written(x, slice(8), lambda p: p.zero_())), small),
    'setitem': (lambda: between(lambda s, x: ((y := x*1).__setitem__((slice(None),3), 0.), y)[1]), small),
    'copied into zeros': (lambda: between(lambda s, x: written(torch.zeros_like(x), slice(16), lambda p: p.copy_(x))),
                          small),
    'added to zeros': (lambda: between(lambda s, x: ((y := torch.zeros_like(x))[:,:8].add_(x[:,8:]), s.n(x) + y)[1],
                                       n=conv(16,16)), small),
    'unpacked': (lambda: between_tokens(
        lambda s, x: (lambda q, k, v: (q @ k.mT).softmax(-1) @ v)(*s.qkv(x).unflatten(-1, (3,16)).movedim(2,0)),
        qkv=lin(16,48)), tokens),
    'out=': (lambda: between(lambda s, x: torch.add(x, 1., out=torch.empty_like(x))), small),
    # weights that are not parameters of their layer, or of several
    'weight_norm': (lambda: between(lambda s, x: s.n(x), n=nn.utils.parametrizations.weight_norm(conv(16,16,3))),
                    small),
    'spectral_norm': (lambda: between(lambda s, x: s.n(x), n=parametrizations.spectral_norm(conv(16,16,3))), small),
    'orthogonal': (lambda: between_tokens(lambda s, x: s.n(x), n=parametrizations.orthogonal(lin(16,16))), tokens),
    'norm of an attention': (lambda: between_tokens(
        lambda s, x: s.n(x, x[...,:12], x)[0],
        n=parametrizations.weight_norm(nn.MultiheadAttention(16,2,kdim=12,batch_first=True), 'k_proj_weight')), tokens),
    'weight standardization': (lambda: between(
        lambda s, x: F.conv2d(x, (w := s.n.weight) - w.mean((1,2,3), keepdim=True), s.n.bias), n=conv(16,16)), small),
    'weight by hand': (lambda: between_tokens(lambda s, x: x @ s.n.weight.t() + s.n.bias, n=lin(16,16)), tokens),
    'computed bias': (lambda: between_tokens(lambda s, x: F.linear(x, s.n.weight, s.n.bias*2), n=lin(16,16)), tokens),
    'tied linears': (lambda: between_tokens(lambda s, x: F.linear(torch.relu(s.n(x)), s.n.weight.t()), n=lin(16,32)),
                     tokens),
    'clipped in the forward': (lambda: between_tokens(
        lambda s, x: (setattr(s.n.weight, 'data', torch.renorm(s.n.weight.data, 2, 0, 1.)), s.n(x))[1], n=lin(16,16)),
        tokens),
    # attention
    'einsum attention': (lambda: between_tokens(lambda s, x: heads(s, x, einsum=True), **attention()), tokens),
    'functional attention': (lambda: between_tokens(causal_attention, **attention()), tokens),
    'encoder': (lambda: between_tokens(lambda s, x: s.t(x), t=nn.TransformerEncoder(
        nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, norm_first=True), 2)), tokens),
    'encoder, batch second': (lambda: between_tokens(
        lambda s, x: s.t(x, src_key_padding_mask=torch.zeros(6,2).bool()),
        t=nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, activation='gelu'), 2)), tokens),
    'cross attention': (lambda: between_tokens(
        lambda s, x: s.t(x, s.e(x.sigmoid()), tgt_mask=torch.full((6,6), -torch.inf, dtype=torch.double).triu(1)),
        e=lin(16,16), t=nn.TransformerDecoder(nn.TransformerDecoderLayer(16, 4, 32, batch_first=True), 2)), tokens),
    'other keys and values': (lambda: between_tokens(
        lambda s, x: s.t(x, s.e(x), s.f(x))[0], e=lin(16,12), f=lin(16,20),
        t=nn.MultiheadAttention(16,4,kdim=12,vdim=20,batch_first=True,add_zero_attn=True)), tokens),
    'given out attention': (lambda: Net(lambda s, x: s.t(y := s.a(x), y, y, average_attn_weights=False), a=lin(16,16),
                                        t=nn.MultiheadAttention(16,4,batch_first=True)), tokens),
    # layers
    'bilinear': (lambda: between_tokens(lambda s, x: s.n(x, s.e(x)), n=nn.Bilinear(16,8,16), e=lin(16,8)), tokens),
    'conv1d': (lambda: nn.Sequential(nn.Conv1d(6,16,3), nn.BatchNorm1d(16), nn.GELU(), nn.Conv1d(16,8,3,groups=2),
                                     nn.Conv1d(8,4,1)), tokens),
    'conv3d': (lambda: nn.Sequential(nn.Conv3d(4,16,2), nn.InstanceNorm3d(16, affine=True, track_running_stats=True),
                                     nn.MaxPool3d(2), nn.Conv3d(16,8,1), nn.ReLU6(True), nn.ConvTranspose3d(8,4,2)),
               lambda: torch.randn(2,4,6,6,6)),
    'transposed in groups': (lambda: between(lambda s, x: s.n(x), n=nn.ConvTranspose2d(16,16,3,padding=1,groups=4)),
                             small),
    'transposed depthwise': (lambda: between(lambda s, x: s.n(x), n=nn.ConvTranspose2d(16,16,3,padding=1,groups=16)),
                             small),
    'transposed multiplier': (lambda: between(lambda s, x: s.n(x), 16, 32,
                                              n=nn.ConvTranspose2d(16,32,3,padding=1,groups=16)), small),
    'depth multiplier': (lambda: between(lambda s, x: s.b(s.n(x)), 16, 48, n=conv(16,48,3,groups=16),
                                         b=nn.BatchNorm2d(48)), small),
    'groups of different size': (lambda: between(lambda s, x: s.o(s.n(x)), 24, 24, n=conv(24,48,3,groups=3),
                                                 o=conv(48,24,groups=2)), small),
    'instance norm': (lambda: between(lambda s, x: s.n(s.o(x)), n=nn.InstanceNorm2d(16),
                                      o=nn.InstanceNorm2d(16, affine=True)), small),
    'group norm of one': (lambda: between(lambda s, x: s.n(x), n=nn.GroupNorm(1,16)), small),
    'layer norm over several': (lambda: between(lambda s, x: s.n(x), n=nn.LayerNorm((16,6,6))), small),
    'layer norm of heads': (lambda: between_tokens(lambda s, x: s.n(x.unflatten(-1, (4,4))).flatten(2),
                                                   n=nn.LayerNorm(4)), tokens),
    'batch norm of positions': (lambda: between_tokens(lambda s, x: s.n(x), n=nn.BatchNorm1d(6)), tokens),
    'glu': (lambda: between(lambda s, x: F.glu(x, 1), 32, 16), small),
    'swiglu of one layer': (lambda: between_tokens(lambda s, x: s.d((lambda g, u: F.silu(g)*u)(*s.g(x).chunk(2, -1))),
                                                   g=lin(16,64), d=lin(32,16)), tokens),
    'mixer': (lambda: between_tokens(lambda s, x: x + s.o(F.gelu(s.n(x.mT))).mT, n=lin(6,8), o=lin(8,6)), tokens),
    'squeeze and excite': (lambda: between(lambda s, x: x*s.o(s.n(x.mean((2,3))).relu()).sigmoid()[...,None,None],
                                           n=lin(16,8), o=lin(8,16)), small),
    'global scale': (lambda: between(lambda s, x: x*s.g + s.b, g=nn.Parameter(torch.rand(1,16,1,1)),
                                     b=nn.Parameter(torch.rand(16,1,1))), small),
    'layer scale': (lambda: between(lambda s, x: x + s.n(x).permute(0,2,3,1).mul(s.g).permute(0,3,1,2), n=conv(16,16),
                                    g=nn.Parameter(1e-6*torch.ones(16))), small),
    'position embedding': (lambda: between_tokens(lambda s, x: x + s.g[:,:x.shape[1]],
                                                  g=nn.Parameter(torch.randn(1,9,16))), tokens),
    'two concatenations': (lambda: between(
        lambda s, x: torch.cat([s.b(torch.cat([e := s.e(x), x], 1)), e, s.b(torch.cat([x[:,:8], e, x[:,8:]], 1))], 1),
        16, 28, e=conv(16,12), b=conv(28,8)), small),
    'cumulated': (lambda: between(lambda s, x: x.cumsum(1)), small),
    'by noise': (lambda: between(lambda s, x: x*torch.rand_like(x)), small),
    'shifted in part': (lambda: between(lambda s, x: torch.cat([x[:,:4].roll(1, 2), x[:,4:8].roll(-1, 3), x[:,8:]], 1)),
                        small),
    'space to depth': (lambda: between(lambda s, x: F.pixel_unshuffle(x, 2), 16, 64), small),
    'channels last weights': (
        lambda: between(lambda s, x: s.n(x), n=conv(16,16,3)).to(memory_format=torch.channels_last), small),
    'bfloat16': (lambda: between(lambda s, x: s.n(x), n=nn.BatchNorm2d(16)).bfloat16(), lambda: small().bfloat16()),
    # states and embeddings
    'lstm': (lambda: between_tokens(lambda s, x: s.n(x)[0], n=nn.LSTM(16,16,2,batch_first=True,dropout=.5)), tokens),
    'lstm from zeros': (lambda: between_tokens(lambda s, x: s.n(x, (x.new_zeros(1,2,16),)*2)[0],
                                               n=nn.LSTM(16,16,batch_first=True)), tokens),
    'gru with a learned state': (lambda: between_tokens(lambda s, x: s.n(x, s.h.expand(-1,2,-1).contiguous())[0],
                                                        n=nn.GRU(16,16,batch_first=True),
                                                        h=nn.Parameter(torch.randn(1,1,16))), tokens),
    'rnn from another': (lambda: between_tokens(lambda s, x: s.n(x, s.o(x)[1])[0], n=nn.RNN(16,16,batch_first=True),
                                                o=nn.RNN(16,16,batch_first=True)), tokens),
    'cell': (lambda: between_tokens(each_step, n=nn.GRUCell(16,16)), tokens),
    'tied decoder': (lambda: Net(lambda s, x: F.linear(s.b(F.gelu(s.a(s.e(x)))), s.e.weight),
                                 e=nn.Embedding(20,16,padding_idx=0), a=lin(16,32), b=lin(32,16)), ids),
    # inputs and outputs
    'dict': (lambda: Net(lambda s, image, row: dict(a=s.b(torch.relu(s.a(image))), more=[s.c(row)]), a=conv(4,16),
                         b=conv(16,8), c=lin(12,4)), lambda: dict(image=small(), row=row())),
    'tuple': (lambda: Net(lambda s, x, y=None: (s.b(torch.relu(s.a(x) + s.c(y))), None), a=lin(12,16), b=lin(16,8),
                          c=lin(8,16)), lambda: (row(), torch.randn(6,8))),
    'hooked': (lambda: hooked(between(lambda s, x: s.n(x), n=conv(16,16))), small),
}
def hooked(model):
    model.n.register_forward_hook(lambda m, x, out: out*out.new_tensor(2.) + x[0])
    model.n.register_forward_pre_hook(lambda m, x: (x[0].relu(),))
    return model

WRONG = ('relu of some', 'sum of some', 'softmax of some', 'norm of some', 'product of some', 'pool of some',
         'one by all', 'one in a product', 'places of pairs', 'written in part', 'shifted in part')

@pytest.mark.parametrize('name', ODD)
def test_odd_networks(name, rules_alone):
    make, x = ODD[name]
    df = check(stirred(make()), x()).set_index('layer')
    if 'm5' in df.index:
        # layers outside of the operation
        assert df.kept['m5'] > df.naive['m5'] and df.kept['m4'] > df.naive['m4']

@pytest.mark.parametrize('name', WRONG)
def test_what_the_rules_miss_is_taken_back(name): test_odd_networks(name, None)

text = dict(emb_sz=16, n_hid=24, n_layers=2, pad_token=1, bidir=False, output_p=0., hidden_p=.1, input_p=.1, embed_p=.1,
            weight_p=.5)
REFUSABLE = {   # may be refused, with a reason and before anything changes
    'weight_norm': (lambda: nn.Sequential(nn.utils.weight_norm(lin(12,16)), nn.ReLU(), lin(16,8)), row),
    'pruned by torch': (lambda: nn.Sequential(prune.random_unstructured(lin(12,16), 'weight', .5), nn.ReLU(),
                                              lin(16,8)), row),
    'language model': (lambda: get_language_model(AWD_LSTM, 30, {**text, 'tie_weights': True, 'out_bias': True}), ids),
    'text classifier': (lambda: get_text_classifier(AWD_LSTM, 30, 3, seq_len=6, config=text, max_len=12), ids),
    'packed': (lambda: Net(
        lambda s, x: s.b(s.n(nn.utils.rnn.pack_padded_sequence(s.a(x), [6,4], batch_first=True))[1][0]),
        a=lin(16,12), n=nn.GRU(12,16,batch_first=True), b=lin(16,4)), tokens),
    'a mask to look at': (lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), 1),
                          lambda: (tokens(), torch.zeros(6,6))),
}

@pytest.mark.filterwarnings('ignore::FutureWarning')
@pytest.mark.parametrize('ran', [False, True])
@pytest.mark.parametrize('name', REFUSABLE)
def test_the_same_or_refused(name, ran):
    make, x = REFUSABLE[name]
    model, x = make().eval(), x()
    was = {k: v.clone() for k,v in model.state_dict().items()}
    run = lambda: leaves(model(*x) if isinstance(x, tuple) else model(x))
    before = run() if ran else None
    [m.reset() for m in model.modules() if hasattr(m, 'reset')]
    try: permute_model(model, x, time_budget=.01)
    except ValueError as e: assert "can't run on the example" in str(e) or 'decides by the values' in str(e)
    else: was = None
    assert was is None or all(torch.equal(was[k], v) for k,v in model.state_dict().items())
    [m.reset() for m in model.modules() if hasattr(m, 'reset')]
    assert not ran or all(torch.allclose(a, b, atol=1e-5) for a,b in zip(before, run(), strict=True))

# optimizers, copies and masks
mlp = lambda: stirred(nn.Sequential(lin(12,32), nn.BatchNorm1d(32), nn.ReLU(), lin(32,16), nn.ReLU(), lin(16,8)))
OPTIMIZERS = {
    'sgd': lambda ps: torch.optim.SGD(ps, .05, momentum=.9, weight_decay=.01),
    'adam': lambda ps: torch.optim.Adam(ps, .01, amsgrad=True),
    'rmsprop': lambda ps: torch.optim.RMSprop(ps, .01, momentum=.5, centered=True),
    'fastai sgd': lambda ps: fastai_opt.SGD(list(ps), .05, mom=.9),
    'fastai adam': lambda ps: fastai_opt.Adam(list(ps), .01),
    'wrapped': lambda ps: fastai_opt.OptimWrapper(list(ps), torch.optim.AdamW, lr=.01),
    'ranger': lambda ps: fastai_opt.ranger(list(ps), .01),
}
def trained(model, opt, batches):
    for x,y in batches:
        def loss():
            opt.zero_grad()
            (l := F.cross_entropy(model(x), y)).backward()
            return l
        if isinstance(opt, torch.optim.LBFGS): opt.step(loss)
        else: loss(), opt.step()

@pytest.mark.parametrize('name', OPTIMIZERS)
def test_training_goes_on(name):
    model = mlp().double()
    opt = OPTIMIZERS[name](model.parameters())
    batches = [(torch.randn(16,12).double(), torch.randint(8, (16,))) for _ in range(16)]
    trained(model, opt, batches[:7])
    twin, twin_opt = deepcopy((model, opt))
    df = check(model, batches[0][0], opt=opt)
    assert df.kept.sum() > df.naive.sum()
    trained(model, opt, batches[7:]), trained(twin, twin_opt, batches[7:])
    assert difference(outputs(twin, batches[0][0], False), outputs(model, batches[0][0], False)) < 1e-7

@pytest.mark.parametrize('make',
                         [lambda ps: torch.optim.Adafactor(ps, .01), lambda ps: torch.optim.LBFGS(ps, .1, max_iter=2)])
def test_state_that_can_not_go_along_is_refused(make):
    model = mlp()
    opt = make(model.parameters())
    trained(model, opt, [(torch.randn(16,12), torch.randint(8, (16,)))]*2)
    was = deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="not of the weight's shape"):
        permute_model(model, row(), time_budget=.01, opt=opt)
    assert all(torch.equal(was[k], v) for k,v in model.state_dict().items())

def test_copies_go_along():
    model, x = mlp(), row()
    average, ema = torch.optim.swa_utils.AveragedModel(model), deepcopy(model)
    with torch.no_grad(): [p.add_(torch.randn_like(p)) for p in [*ema.parameters(), *average.parameters()]]
    was = [outputs(m, x, t) for m in (ema, average) for t in (False, True)]
    check(model, x, copies=[ema, average])
    assert all(difference(a, b) < 1e-10
               for a,b in zip(was, [outputs(m, x, t) for m in (ema, average) for t in (False, True)]))

def masked(model):
    for m in (model[3], model[5]): set_mask(m, torch.rand_like(m.weight) < .5)
    return model
def follows(model): return all(torch.equal(get_mask(m), m.weight != 0) for m in (model[3], model[5]))

def test_masks_go_along():
    check(model := masked(mlp()), row())
    assert follows(model)

def test_masks_of_copies_go_along():
    ema = deepcopy(model := masked(mlp()))
    permute_model(model, row(), time_budget=.01, copies=[ema])
    assert follows(ema)

def test_an_optimizer_of_other_parameters_is_refused():
    with pytest.raises(ValueError):
        permute_model(mlp(), row(), time_budget=.01, opt=torch.optim.Adam(mlp().parameters()))

# networks whose outputs do not show a wrong permutation
def some(s, x): return s.o(torch.cat([(h := s.n(x))[...,:16].relu(), h[...,16:]], -1))
pair = lambda: dict(n=lin(12,32), o=lin(32,12))
def shared(model):
    model.b.weight = nn.Parameter(model.a.weight.data)
    return model
gated = lambda: Net(lambda s, x, keep: s.o(s.n(x).relu()*keep), **pair())
BLIND = {   # name -> factory, input, another input, a change that training may make
    'shared memory': (lambda: shared(Net(lambda s, x: s.c(torch.relu(s.b(torch.relu(s.a(x))))), a=lin(12,12),
                                         b=lin(12,12), c=lin(12,4))), row, row, None),
    'an object': (lambda: Net(lambda s, x: (s.o(h := s.n(x)), SimpleNamespace(hidden=h)), **pair()), row, row, None),
    'gate at zero': (lambda: Net(lambda s, x: x + s.g*some(s, x), g=nn.Parameter(torch.zeros(1)), **pair()), row, row,
                     lambda m: m.g.fill_(1.)),
    'beside minus infinity': (lambda: Net(lambda s, x: some(s, x).masked_fill(torch.arange(12) > 9, -torch.inf),
                                          **pair()), row, row, None),
    'beside a big number': (lambda: Net(lambda s, x: some(s, x).masked_fill(torch.arange(12) > 9, -1e30), **pair()),
                            row, row, None),
    'gates': (gated, lambda: (row(), torch.ones(6,32)), lambda: (row(), torch.rand(6,32)), None),
    'switches': (gated, lambda: (row(), torch.ones(6,32).bool()), lambda: (row(), torch.rand(6,32) < .5), None),
    'threshold': (lambda: Net(lambda s, x: s.o(s.n(x)*(x.repeat(1,3)[:,:32] > -5)), **pair()), row, lambda: row()*10,
                  None),
}

@pytest.mark.parametrize('name', BLIND)
def test_outputs_for_other_inputs_where_the_check_is_blind(name):
    make, x, other_input, learned = BLIND[name]
    twin, x, z = deepcopy(model := make()), x(), other_input()
    permute_model(model, x, time_budget=.01)
    with torch.no_grad(): learned and [learned(m) for m in (model, twin)]
    assert all(difference(outputs(twin, z, t), outputs(model, z, t)) < 1e-10 for t in (False, True))

def test_statistics_in_float32():
    def rms_norm(s, x): return (x*x.float().square().mean(-1, keepdim=True).add(1e-6).rsqrt()).to(x.dtype)*s.g
    model = stirred(between_tokens(rms_norm, g=nn.Parameter(torch.rand(16))))
    df = permute_model(model, tokens(), time_budget=.01)
    assert not df.note.str.contains('would change').any()

# state that must not change
def test_what_is_used_in_training_only_is_said():
    model = stirred(Net(lambda s, x: (s.b(h := s.n(s.a(x)).relu()), s.c(h)) if s.training else s.b(s.n(s.a(x)).relu()),
                        a=lin(12,16), n=nn.BatchNorm1d(16), b=lin(16,8), c=lin(16,4)))
    with pytest.warns(UserWarning, match="in training mode .*c.bias"): check(model, row()[:1], trains=False)

def test_gpus_are_not_seeded(monkeypatch):
    seeded = []
    monkeypatch.setattr(torch.cuda, 'manual_seed_all', seeded.append)
    permute_model(mlp(), row(), time_budget=.01)
    assert not seeded

def test_a_model_that_draws_by_itself_leaves_no_trace():
    check(Net(lambda s, x: s.b(s.a(x).relu()) if random.random() < 2 else x, a=lin(12,16), b=lin(16,8)), row())

def test_the_example_is_left():
    x = row().double()
    was = x.clone()
    permute_model(Net(lambda s, x: s.o(s.n(x.mul_(2.)).relu()), **pair()).double(), x, time_budget=.01)
    assert torch.equal(x, was)

def test_a_check_that_fails_leaves_the_model(monkeypatch):
    def fail(*args): raise MemoryError
    monkeypatch.setattr(module, '_differ', fail)
    was = deepcopy((model := mlp()).state_dict())
    with pytest.raises(MemoryError): permute_model(model, row(), time_budget=.01)
    assert all(torch.equal(was[k], v) for k,v in model.state_dict().items())
