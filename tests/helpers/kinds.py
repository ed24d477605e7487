"The callbacks of the contract tests: how to make each, how to prepare its model, and what a fit must leave behind"
from functools import partial

import pytest, torch
from fastai.basics import noop
from torch import nn

from callback_helpers import all_same, fit, follows_masks, learner, masks, N, same, snapshot, sparse, zeros_hold
from fasterai_sparse.core.criteria import grad_crit, large_final, movement
from fasterai_sparse.core.masks import masked_params
from fasterai_sparse.core.schedules import iterative, one_shot
from fasterai_sparse.core.select import n_zeros
from fasterai_sparse.core.sparsifier import Sparsifier
from fasterai_sparse.train.bn_adaptation import AdaptBatchNorm
from fasterai_sparse.train.keep_masks import KeepMasks
from fasterai_sparse.dynamic.callback import (
    DynamicSparseTrainingCallback, GraNet_presets, MEST_presets, RigL_presets, SET_presets, SNFS_presets)
from fasterai_sparse.dynamic.random_masks import sparsify_model
from fasterai_sparse.nncf.const import ConstSparsityCallback
from fasterai_sparse.nncf.magnitude import MagnitudeSparsityCallback
from fasterai_sparse.nncf.rb import RBSparsityCallback

LAYERS = nn.Conv2d, nn.Linear
N_ALL = N + 64   # with the linear layer's weights

class Stirred(RBSparsityCallback):
    "RB with randomly initialized logits, so that masks change within few steps"
    def make_masks(self):
        soft, g = super().make_masks(), torch.Generator().manual_seed(0)
        for s in soft.logits.values():
            noise = torch.randn(s.shape, generator=g)*1.5 - 3.6
            if (s == s.flatten()[0]).all(): s.add_(noise.to(s))   # not those that an earlier fit has learned
        return soft

def dense(learn): pass

def masked(learn): Sparsifier(learn.model, 'weight', 'local', large_final, layer_type=LAYERS).sparsify_model(75)

def kept(learn):
    masked(learn)
    learn.add_cb(KeepMasks())

def randomly_masked(learn): sparsify_model(learn, .75, enforce_mask=False, seed=0)

def half_empty(learn):
    "Set half of the weights to zero, without masks"
    g = torch.Generator().manual_seed(1)
    for m in learn.model.modules():
        if isinstance(m, LAYERS): m.weight.data[torch.rand(m.weight.shape, generator=g) < .5] = 0

class Kind:
    """A callback and what the contract tests expect of it.

    `make()` gives one with the usual arguments; `prepare(learn)` is called on the learner before a fit. `columns` are
    its columns of the epoch table. `n_end` is the number of zeros after a complete fit, None if it is random, 'start'
    if it does not change. `soft`: weights are unmasked while the optimizer steps, and masks become buffers only at the
    end. `changes`: the masks change, so the callback waits while all layers are frozen."""
    def __init__(self, make, prepare=dense, columns=('sparsity',), n_end='start', soft=False, changes=True):
        self.make, self.prepare, self.columns = make, prepare, columns
        self.n_end, self.soft, self.changes = n_end, soft, changes

    def learner(self, n=6, **kwargs):
        learn = learner(n, **kwargs)
        self.prepare(learn)
        return learn

def dynamic(presets, **kwargs):
    return partial(DynamicSparseTrainingCallback, **{**presets, 'batches_per_update': 2, **kwargs})

def of_presets(presets): return Kind(dynamic(presets), randomly_masked, ('live_weights',))

on_target = dict(n_end=n_zeros(.9, N))

KINDS = dict(
    gradual=Kind(sparse, **on_target), one_shot=Kind(partial(sparse, schedule=one_shot), **on_target),
    movement=Kind(partial(sparse, criteria=movement), **on_target),
    gradient=Kind(partial(sparse, criteria=grad_crit), **on_target),
    lottery=Kind(partial(sparse, schedule=iterative, lth=True), **on_target),
    SET=of_presets(SET_presets), SNFS=of_presets(SNFS_presets), RigL=of_presets(RigL_presets),
    MEST=of_presets(MEST_presets),
    GraNet=Kind(dynamic(GraNet_presets, sparsity=90), columns=('live_weights',), n_end=n_zeros(.9, N_ALL)),
    rb=Kind(partial(Stirred, 70), columns=('sparsity', 'rb_loss'), n_end=None, soft=True),
    magnitude=Kind(partial(MagnitudeSparsityCallback, 70), n_end=n_zeros(.7, N_ALL), soft=True),
    const=Kind(ConstSparsityCallback, half_empty, changes=False),
    keep_masks=Kind(KeepMasks, masked, (), changes=False),
    adapt_batchnorm=Kind(partial(AdaptBatchNorm, 16), kept, (), changes=False))

def n_masked(learn): return sum(int((~mask.bool()).sum()) for *_,mask in masked_params(learn.model))

def n_zero(learn): return sum(int((m.weight == 0).sum()) for m in learn.model.modules() if isinstance(m, LAYERS))

def check_end(kind, learn, n_start=None):
    "A complete fit leaves masks, exactly the masked weights are zero, and their number is as expected"
    assert follows_masks(learn.model) and zeros_hold(learn) and n_masked(learn) == n_zero(learn) > 0
    assert sum(isinstance(cb, KeepMasks) for cb in learn.cbs) <= 1
    if kind.n_end == 'start': assert n_zero(learn) == n_start or n_start is None
    elif kind.n_end is not None: assert n_zero(learn) == kind.n_end

kinds = pytest.mark.parametrize('name', KINDS)
changing = pytest.mark.parametrize('name', [n for n,k in KINDS.items() if k.changes])
with_column = pytest.mark.parametrize('name', [n for n,k in KINDS.items() if k.columns])
of_each_class = pytest.mark.parametrize('name', ['gradual', 'gradient', 'lottery', 'RigL', 'GraNet', 'rb', 'magnitude',
                                                 'const', 'keep_masks', 'adapt_batchnorm'])
quiet = [pytest.mark.filterwarnings(f'ignore:{w}') for w in
         ('numpy.core is deprecated', 'load_learner', 'RB sparsity', 'The loaded weights', '.*Callback has', '.*frozen',
          '.*CUDA is not available', '.*GradScaler is enabled', '.*masks will not change')]

def ready(name, n=6, **kwargs):
    "The kind called `name`, a learner for it, its number of zeros, and a callback"
    kind = KINDS[name]
    learn = kind.learner(n, **kwargs)
    return kind, learn, n_zero(learn), kind.make()

def state(learn): return snapshot(learn.model), masks(learn.model)

def unchanged(learn, before): return same(before[0], snapshot(learn.model)) and all_same(before[1], masks(learn.model))

def end_of(name, *cbs, n_epoch=2, change=noop, **kwargs):
    "State after a fit; all calls start from the same seed"
    kind, learn, n, cb = ready(name, **kwargs)
    change(learn)
    fit(learn, n_epoch, [cb, *cbs])
    return state(learn)

def values(learn): return [m.weight.detach().clone() for m in learn.model.modules() if isinstance(m, LAYERS)]
