"""All callbacks: fits that are interrupted, and batches, epochs or fits that another callback cancels.

Each test runs for all of `kinds.KINDS`; what only one callback does is tested in its own folder."""
import pickle
from copy import deepcopy

import pytest
from fastai.basics import (
    CancelBackwardException, CancelBatchException, CancelEpochException, CancelFitException, CancelStepException,
    CancelTrainException, CancelValidException)

from callback_helpers import (
    all_same, at, collect, exportable, fit, follows_masks, masks, raising, same, snapshot, zeros_hold)
from cases import in_a_loop
from fasterai_sparse.train.keep_masks import KeepMasks
from kinds import check_end, kinds, n_masked, n_zero, of_each_class, quiet, ready

pytestmark = quiet

# --- interrupted fits, and what other callbacks cancel

EVENTS = ['before_epoch', 'before_train', 'before_batch', 'after_pred', 'after_loss', 'before_backward',
          'after_backward', 'before_step', 'after_step', 'after_batch', 'after_train', 'before_validate',
          'after_validate', 'after_epoch']
OF_BATCH = EVENTS[2:10]

def in_second_epoch(event, exc, order=66):
    "A callback that raises `exc` at `event` in the second epoch of a fit, in its third batch"
    def stop(learn):
        if learn.epoch == 1 and (learn.iter == 2 or event not in OF_BATCH): raise exc
    return at(event, stop, order, always=True)

BREAKS = [*((e, KeyboardInterrupt()) for e in EVENTS), ('after_pred', RuntimeError('stop')),
          ('after_batch', RuntimeError('stop')), ('before_validate', SystemExit()),
          *((e, CancelFitException()) for e in ('before_batch', 'after_step', 'after_epoch'))]

def check_masks_hold(kind, learn):
    "A plain fit keeps the zeros of hard masks; interrupted soft masks are gone, so all weights train"
    was = masks(learn.model)
    fit(learn, 1, [] if any(isinstance(cb, KeepMasks) for cb in learn.cbs) or not was else KeepMasks())
    assert all_same(was, masks(learn.model)) and zeros_hold(learn)
    if kind.soft and not was: assert n_zero(learn) == 0

@of_each_class
@in_a_loop('event,exc', BREAKS)
def test_a_fit_that_breaks_off_and_others(name, event, exc):
    kind, learn, n, cb = ready(name, dls=exportable(4))
    try: fit(learn, 3, [cb, in_second_epoch(event, exc)])
    except (KeyboardInterrupt, RuntimeError, SystemExit) as e: assert type(e) is type(exc)
    else: assert isinstance(exc, CancelFitException)
    assert kind.soft or zeros_hold(learn) or event == 'after_step'
    left = n_zero(learn)
    assert same(snapshot(deepcopy(learn.model)), snapshot(learn.model))
    if event in ('after_pred', 'after_batch', 'after_epoch'): learn.export('l.pkl'), pickle.dumps(cb)
    check_masks_hold(kind, learn)
    watch, seen = collect('after_epoch', n_zero)
    fit(learn, 2, [cb, watch])
    check_end(kind, learn, n)
    assert not any(p._backward_hooks for p in learn.model.parameters())
    if not kind.soft and name not in ('lottery', 'SNFS'): assert min(seen) >= min(left, n_masked(learn))
    if event not in ('after_pred', 'after_step', 'after_epoch'): return
    other = kind.learner(4)
    n = n_zero(other)
    fit(other, 2, cb)
    check_end(kind, other, n)

CANCELS = [*((CancelBatchException, e) for e in OF_BATCH[:-1]), (CancelStepException, 'before_step'),
           (CancelBackwardException, 'before_backward'),
           *((CancelTrainException, e) for e in ('before_train', 'after_pred', 'before_step', 'after_batch')),
           *((CancelEpochException, e) for e in ('before_epoch', 'after_pred', 'after_backward', 'after_step')),
           *((CancelFitException, e) for e in ('before_train', 'after_loss', 'after_step', 'after_epoch')),
           (CancelValidException, 'before_validate')]

@of_each_class
@pytest.mark.parametrize('order', [0, 66])
@in_a_loop('exc,event', CANCELS)
def test_cancelled_batches_epochs_and_fits(name, exc, event, order):
    "A cancelled batch or epoch does not change the end of a fit; a cancelled fit ends with the sparsity of that moment"
    kind, learn, n, cb = ready(name, 4)
    fit(learn, 3, [cb, in_second_epoch(event, exc(), order)])
    assert follows_masks(learn.model) and zeros_hold(learn) and n_zero(learn) > 0
    if exc is not CancelFitException: check_end(kind, learn, n)
    fit(learn, 1, KeepMasks())
    assert zeros_hold(learn)

@kinds
def test_a_fit_that_is_cancelled_before_it_starts(name):
    kind, learn, n, cb = ready(name)
    fit(learn, 1, [cb, at('before_fit', raising(CancelFitException()), order=0)])
    assert n_zero(learn) == n
    fit(learn, 2, cb)
    check_end(kind, learn, n)
