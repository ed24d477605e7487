"Small learners, callbacks that record or act at an event, and checks of masks and weights"
import io
from contextlib import redirect_stdout
from functools import partial

import torch
from fastai.basics import (
    accuracy, Callback, CrossEntropyLossFlat, DataLoader, DataLoaders, L, Learner, Optimizer, OptimWrapper, params,
    set_seed)
from fastai.callback.fp16 import MixedPrecision
from torch import nn

from fasterai_sparse.core.criteria import large_final
from fasterai_sparse.core.masks import get_mask, masked_params
from fasterai_sparse.core.schedules import lin
from fasterai_sparse.core.sparsifier import Sparsifier
from fasterai_sparse.train.sparsify_callback import SparsifyCallback

def images(n): return list(zip(torch.randn(n, 8, 2, 6, 6), torch.randint(4, (n, 8))))

def loaders(n=6, make=images):
    return DataLoaders(DataLoader(make(n), bs=None), DataLoader(make(2), bs=None), device='cpu')

class Images(list):
    "A dataset whose loaders can be exported"
    def new_empty(self): return Images()

def exportable(n=6):
    "Loaders that `Learner.export` can save"
    return loaders(n, lambda n: Images(images(n)))

def convnet():
    return nn.Sequential(nn.Conv2d(2,8,3,padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8,16,3,padding=1),
                         nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16,4))

N = 144 + 1152   # weights of convnet's convolutions

def split(model):
    "Three parameter groups of `convnet`"
    return [params(part) for part in (model[:3], model[3:6], model[6:])]

def learner(n=6, model=None, dls=None, **kwargs):
    set_seed(0)
    dls, model = dls or loaders(n), model or convnet()
    return Learner(dls, model, loss_func=CrossEntropyLossFlat(), metrics=accuracy, lr=1e-2, **kwargs)

def fit(learn, n_epoch=2, cbs=None, how='fit', **kwargs):
    with learn.no_logging(), learn.no_bar(): getattr(learn, how)(n_epoch, cbs=cbs, **kwargs)
    return learn

def sparse(sparsity=90, schedule=lin, granularity='weight', context='local', criteria=large_final, **kwargs):
    return SparsifyCallback(sparsity, granularity, context, criteria, schedule, **{'verbose': False, **kwargs})

def at(event, f, order=66, always=False):
    "A callback that calls `f(learn)` at `event`, by default after all others; `always`: when validating too"
    cb = Callback(**{event: lambda self: f(self.learn) if always or not self.learn.lock.locked() else None})
    cb.order, cb.run_valid = order, False
    return cb

def collect(event, f, order=66):
    "A callback that collects what `f(learn)` returns at each `event`, and the list"
    res = []
    return at(event, lambda learn: res.append(f(learn)), order), res

def at_batch(n, f, order=66):
    "A callback that calls `f(learn)` after the training batch number `n`"
    return at('after_batch', lambda learn: f(learn) if learn.epoch*learn.n_iter+learn.iter == n else None, order)

def raising(exc):
    def f(learn): raise exc
    return f

class Spy(Sparsifier):
    "Records the targets in `asked`, and calls `look(self)` before each is applied"
    look = staticmethod(lambda s: None)
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.asked = []
    def apply(self, target, *args, **kwargs):
        self.look(self)
        self.asked.append(target)
        super().apply(target, *args, **kwargs)

class OnCPU(MixedPrecision):
    """`MixedPrecision` with autocast and gradient scaler on the CPU.

    `overflows` are the batches whose step was skipped, `n_steps` counts the steps of the last fit."""
    def __init__(self, amp_mode='fp16', scale=8., autocast=True):
        super().__init__(amp_mode)
        self.scale, self.on, self.overflows, self.skipped = scale, autocast, [], False
    def before_fit(self):
        half = self.amp_mode.value == 'fp16'
        self.autocast = torch.autocast('cpu', torch.float16 if half and self.on else torch.bfloat16, enabled=self.on)
        self.scales, self.learn.scaler = L(), torch.amp.GradScaler('cpu', init_scale=self.scale, enabled=half)
    def after_batch(self):
        if self.skipped and self.training: self.overflows.append(self.learn.epoch*self.n_iter + self.iter)
    def after_fit(self):
        self.n_steps = len(self.scales)
        super().after_fit()

def optimizer_state(opt, p):
    "Tensors of the shape of `p` that `opt` keeps, with those of the optimizer that it wraps"
    slow, inner = getattr(opt, 'slow_weights', None) or [], opt.__dict__.get('opt')
    own = [s for pg,ps in zip(slow, opt.param_lists) for s,q in zip(pg, ps) if q is p]
    if isinstance(inner, (Optimizer, OptimWrapper)): return own + optimizer_state(inner, p)
    return own + [v for v in (inner or opt).state[p].values() if torch.is_tensor(v) and v.shape == p.shape]

def weights(model, kind=nn.Conv2d): return [m.weight for m in model.modules() if isinstance(m, kind)]

def zeros(model, kind=nn.Conv2d): return sum(int((w==0).sum()) for w in weights(model, kind))

def masks(model): return [mask.clone() for *_,mask in masked_params(model)]

def kept(m, name='weight'):
    "The mask of `m`'s parameter `name`, True where there is none"
    mask = get_mask(m, name)
    return torch.tensor(True) if mask is None else mask.clone()

def snapshot(model): return {k: v.clone() for k,v in model.state_dict().items()}

def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)

def follows_masks(model): return all(torch.equal(p!=0, mask) for *_,p,mask in masked_params(model))

def zeros_hold(learn):
    "Are all masked weights zero?"
    return not any(p[~mask.bool()].any() for *_,p,mask in masked_params(learn.model))

def all_same(xs, ys): return len(xs) == len(ys) and all(torch.equal(x, y) for x,y in zip(xs, ys))

def dead_filters(w): return (w.detach() == 0).flatten(1).all(1)

def printed(f):
    "The text that `f` prints"
    with redirect_stdout(io.StringIO()) as out: f()
    return out.getvalue()

def held_tensors(*roots):
    "Memory of all tensors reachable from `roots`, except through a learner or its data: pointer -> bytes"
    seen, todo, found = set(), list(roots), {}
    while todo:
        o = todo.pop()
        if id(o) in seen or isinstance(o, (Learner, DataLoaders, type)): continue
        seen.add(id(o))
        if torch.is_tensor(o): found[o.data_ptr()] = o.untyped_storage().nbytes(); continue
        if isinstance(o, dict): todo += [*o.keys(), *o.values()]
        elif isinstance(o, (list, tuple, set, frozenset)): todo += o
        elif isinstance(o, partial): todo += [o.func, o.args, o.keywords]
        if hasattr(o, '__self__'): todo.append(o.__self__)
        todo.append(getattr(o, '__dict__', None))
    return found

def copied_by(cb, f):
    "Result of `f(learn)` for the learner of `cb`, without `cb` and the batch's graph, which can't be copied"
    learn = cb.learn
    graph = {k: learn.__dict__.pop(k, None) for k in ('pred', 'loss', 'loss_grad')}
    learn.remove_cb(cb)
    res = f(learn)
    learn.add_cb(cb)
    learn.__dict__.update(graph)
    return res
