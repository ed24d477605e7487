"""All callbacks: copies of model, learner and callback, saved files, and wrapped models.

Each test runs for all of `kinds.KINDS`; what only one callback does is tested in its own folder."""
import pickle, subprocess, sys
from copy import deepcopy

import numpy as np, pytest, torch
from fastai.basics import Datasets, load_learner, Metric, nn, partial
from fastai.callback.tracker import SaveModelCallback

from callback_helpers import (
    all_same, at, at_batch, copied_by, exportable, fit, follows_masks, learner, loaders, masks, same, snapshot,
    zeros_hold)
from cases import in_a_loop
from fasterai_sparse.train.keep_masks import KeepMasks
from fasterai_sparse.train.updates import bake_masks, MaskUpdates
from kinds import check_end, end_of, KINDS, kinds, n_zero, quiet, ready, state, unchanged, values

pytestmark = quiet

# --- copies

COPIES = dict(deepcopy=deepcopy, pickle=lambda o: pickle.loads(pickle.dumps(o)))

@kinds
@pytest.mark.parametrize('how', COPIES)
def test_a_copy_of_the_model_in_a_fit(name, how):
    "A copy taken in a fit has the weights of that moment, and keeps them while the fit goes on"
    kind, learn, n, cb = ready(name)
    seen = []
    def take(learn): seen.append((COPIES[how](learn.model), state(learn)))
    within = at('before_backward', lambda learn: take(learn) if (learn.epoch, learn.iter) == (1, 3) else None)
    fit(learn, 2, [cb, within, at_batch(8, take), at('after_epoch', take)])
    assert len(seen) == 4
    last = state(learn)
    for model,(saved,then) in seen:
        assert same(snapshot(model), saved) and all_same(masks(model), then)
        assert not any(p._backward_hooks for p in model.parameters())
        other = fit(learner(model=model), 1, KeepMasks())
        assert all_same(masks(other.model), then) and zeros_hold(other)
    assert unchanged(learn, last)

@kinds
@pytest.mark.parametrize('how', COPIES)
@in_a_loop('event', ['before_batch', 'after_batch', 'after_epoch'])
def test_a_copy_of_the_learner_in_a_fit(name, how, event):
    "The copy trains on its own; the original fit ends as it would without a copy"
    if event == 'before_batch' and KINDS[name].soft: event = 'before_backward'
    results, copies = [], []
    for copied in (False, True):
        kind, learn, n, cb = ready(name, 4)
        learn.add_cb(cb)
        def take(learn):
            now = learn.epoch == 1 and (event == 'after_epoch' or learn.iter == 2)
            if copied and now and not copies: copies.append(copied_by(watch, COPIES[how]))
        fit(learn, 3, watch := at(event, take))
        results.append(state(learn))
    assert unchanged(learn, results[0]) and len(copies) == 1
    other, = copies
    assert other.model is not learn.model
    fit(other, 3)
    check_end(kind, other, n)
    assert unchanged(learn, results[0])

@kinds
@in_a_loop('how', COPIES)
def test_a_copy_of_the_callback(name, how):
    "A copy works before the first fit of the original, and after it"
    kind = KINDS[name]
    used = kind.make()
    fit(kind.learner(), 2, used)
    used.learn = None
    ends = []
    for cb in (kind.make(), COPIES[how](kind.make()), COPIES[how](used)):
        learn = kind.learner()
        fit(learn, 2, cb)
        ends.append(state(learn))
    for s,m in ends[1:]: assert same(s, ends[0][0]) and all_same(m, ends[0][1])

# --- files

@kinds
def test_export_and_load(name):
    kind, learn, n, cb = ready(name, dls=exportable())
    learn.add_cb(cb)
    fit(learn, 3)
    learn.export('l.pkl')
    other = load_learner('l.pkl')
    assert unchanged(other, state(learn))
    other.dls = loaders()
    fit(other, 3)
    check_end(kind, other, n)

LOAD = '''
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] == 'fasterai_sparse': raise ImportError('blocked')
sys.meta_path.insert(0, Block())
from fastai.basics import *
from fastai.callback.all import *
def zeros(model): return sum(int((m.weight==0).sum()) for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear)))
for f in sys.argv[1:]: print(zeros(load_learner(f).model))
'''

def test_baked_learners_load_where_the_package_is_absent():
    expected = []
    for name in KINDS:
        kind, learn, n, cb = ready(name, dls=exportable())
        learn.add_cb(cb)
        fit(learn, 2)
        expected.append(n_zero(learn))
        before = snapshot(learn.model)
        bake_masks(learn)
        assert same(before, snapshot(learn.model))
        if name == 'adapt_batchnorm': learn.remove_cb(cb)   # it changes no masks, so it is not taken away
        data = [torch.cat(o) for o in zip(*learn.dls.train.dataset)]
        learn.dls = Datasets(range(16), tfms=[[data[0].__getitem__], [data[1].__getitem__]]).dataloaders(bs=8)
        learn.export(f'{name}.pkl')
        assert not masks(learn.model) and not any(isinstance(c, (KeepMasks, MaskUpdates)) for c in learn.cbs)
        assert b'fasterai_sparse' not in open(f'{name}.pkl', 'rb').read()
    command = [sys.executable, '-W', 'ignore', '-c', LOAD, *(f'{n}.pkl' for n in KINDS)]
    r = subprocess.run(command, capture_output=True, text=True)
    assert [int(n) for n in r.stdout.split()] == expected, r.stderr[-500:]

class AtEpoch(Metric):
    "A metric that is lowest at the epoch `best`"
    name = 'at_epoch'
    def __init__(self, best): self.best = best
    def reset(self): pass
    def accumulate(self, learn): self.now = learn.epoch
    @property
    def value(self): return abs(self.now-self.best)

@kinds
@pytest.mark.parametrize('with_opt', [False, True])
@in_a_loop('best', [0, 1, 2])
def test_the_best_epoch_is_loaded_at_the_end(name, with_opt, best):
    "The masks are the zeros of that epoch, and later fits keep them; the saved file has the keys of a dense model"
    kind, learn, n, cb = ready(name, 4)
    learn.metrics, keys = [AtEpoch(best)], list(learn.model.state_dict())
    ends = []
    save = SaveModelCallback(monitor='at_epoch', comp=np.less, with_opt=with_opt)
    fit(learn, 3, [cb, save, at('after_epoch', lambda learn: ends.append(values(learn)))])
    assert all_same(values(learn), ends[best]) and follows_masks(learn.model)
    saved = torch.load('models/model.pth', weights_only=False)
    assert list(saved['model'] if with_opt else saved) == keys
    was = masks(learn.model)
    fit(learn, 1, KeepMasks())
    assert all_same(was, masks(learn.model)) and zeros_hold(learn)
    fit(learn, 3, cb)
    check_end(kind, learn, n)

# --- wrapped models

WRAPPED = dict(parallel=nn.DataParallel, compiled=partial(torch.compile, backend='eager'))

@kinds
@in_a_loop('wrap', WRAPPED)
def test_a_model_that_is_wrapped(name, wrap):
    def change(learn): learn.inner, learn.model = learn.model, WRAPPED[wrap](learn.model)
    plain, (_,wrapped) = end_of(name), end_of(name, change=change)
    assert all_same(plain[1], wrapped) and wrapped
