"""All callbacks: whole fits, columns of the epoch table, and calls like `validate` that must change nothing.

Each test runs for all of `kinds.KINDS`; what only one callback does is tested in its own folder."""
import warnings

import matplotlib.pyplot as plt, pytest
from fastai.basics import accuracy, nn, noop, partial, Recorder

from callback_helpers import all_same, at, collect, fit, follows_masks, masks, printed, raising, same, snapshot
from cases import in_a_loop
from fasterai_sparse.train.keep_masks import KeepMasks
from kinds import check_end, end_of, KINDS, kinds, LAYERS, n_zero, quiet, ready, state, unchanged, with_column

pytestmark = quiet

# --- whole fits

@kinds
@in_a_loop('how', ['fit', 'fit_one_cycle', 'fit_flat_cos', 'fit_sgdr'])
def test_a_fit_ends_sparse_and_later_fits_keep_it(name, how):
    kind, learn, n, cb = ready(name)
    keys = list(learn.model.state_dict())
    more = dict(cycle_len=1) if how == 'fit_sgdr' else {}
    fit(learn, 2, cb, how, **more)
    check_end(kind, learn, n)
    last = masks(learn.model)
    assert cb not in learn.cbs
    if name == 'keep_masks': learn.add_cb(cb)   # all others add one where there is none
    assert [type(c) for c in learn.cbs if 'fasterai_sparse' in type(c).__module__] == [KeepMasks]
    fit(learn, 2, how=how, **more)
    assert all_same(last, masks(learn.model)) and follows_masks(learn.model)
    assert list(learn.model.state_dict()) == keys

@kinds
def test_validation_is_of_masked_weights(name):
    kind, learn, n, cb = ready(name)
    events = 'before_validate', 'after_validate', 'after_epoch'
    watch = [collect(e, lambda learn: n_zero(learn) if learn.epoch else -1) for e in events]
    fit(learn, 4, [cb, *(w for w,_ in watch)])
    before, after, ends = [seen[1:] for _,seen in watch]
    assert len(before) == 3 and before == after == ends and all(before)

@kinds
def test_a_fit_of_no_epochs_changes_nothing(name):
    kind, learn, n, cb = ready(name)
    before = snapshot(learn.model)
    printed(lambda: fit(learn, 0, cb))
    assert same(before, snapshot(learn.model))
    fit(learn, 2, cb)
    check_end(kind, learn, n)

@pytest.mark.parametrize('name', [n for n in KINDS if n != 'lottery'])
def test_a_fit_that_starts_at_a_later_epoch(name):
    "The lottery is left out: it has no weights to reset to, and raises"
    kind, learn, n, cb = ready(name)
    fit(learn, 4, cb, start_epoch=2)
    check_end(kind, learn, n)

@kinds
def test_one_object_in_two_fits_and_two_learners(name):
    kind, learn, n, cb = ready(name)
    for _ in range(2):
        fit(learn, 2, cb)
        check_end(kind, learn, n)
    was, other = state(learn), kind.learner(4)
    n = n_zero(other)
    fit(other, 3, cb)
    check_end(kind, other, n)
    assert unchanged(learn, was)

@kinds
def test_given_twice_it_does_the_same_as_once(name):
    results = []
    for installed,given in ((0, 1), (0, 2), (1, 0), (1, 1)):
        kind = KINDS[name]
        learn, cb = kind.learner(), kind.make()
        if installed: learn.add_cb(cb)
        fit(learn, 3, [cb]*given)
        results.append((state(learn), list(learn.recorder.metric_names), log_of(cb)))
    for s,*rest in results: assert unchanged(learn, s) and rest == list(results[0][1:])

@kinds
def test_a_learner_without_recorder(name):
    results = [end_of(name, n_epoch=3, change=change)[0] for change in (noop, lambda learn: learn.remove_cb(Recorder))]
    assert same(*results)

# --- the epoch table

METRICS = dict(one=accuracy, none=[], two=[accuracy, accuracy])

@with_column
@pytest.mark.parametrize('metrics', METRICS)
def test_columns_stand_between_the_validation_loss_and_the_metrics(name, metrics):
    kind, learn, n, cb = ready(name)
    learn.metrics = METRICS[metrics]
    total = {l: sum(m.weight.numel() for m in learn.model.modules() if isinstance(m, l)) for l in (nn.Conv2d, LAYERS)}
    ends, seen = collect('after_epoch', n_zero)
    fit(learn, 3, [cb, ends])
    n_metrics, names, rows = len(learn.metrics), list(learn.recorder.metric_names), learn.recorder.values
    assert names == ['epoch', 'train_loss', 'valid_loss', *kind.columns, *['accuracy']*n_metrics, 'time']
    assert [len(row) for row in rows] == [len(names)-2]*3
    shown = [row[names.index(kind.columns[0])-1] for row in rows]
    size = total[nn.Conv2d if kind.make().__class__.__name__ == 'SparsifyCallback' else LAYERS]
    if kind.columns[0] == 'live_weights': assert shown == [size-z for z in seen]
    else: assert shown == pytest.approx([100*z/size for z in seen], abs=.006)
    learn.recorder.plot_loss()
    drawn = [line.get_ydata().tolist() for line in plt.gca().lines]
    plt.close('all')
    assert [row[1] for row in rows] in drawn
    assert learn.validate()[-1] == (rows[-1][-1] if n_metrics else rows[-1][1])
    fit(learn, 1)
    assert not set(kind.columns) & set(learn.recorder.metric_names)

# --- calls that change nothing

def looked(learn, look):
    with learn.no_bar(), learn.no_logging(), warnings.catch_warnings():
        if look not in BEGINS_A_FIT: warnings.simplefilter('error', UserWarning)
        return printed(lambda: LOOKS[look](learn))

LOOKS = dict(validate=lambda l: l.validate(), preds=lambda l: l.get_preds(),
             train_loss=lambda l: l.get_preds(ds_idx=0, with_loss=True),
             lr_find=lambda l: l.lr_find(num_it=6, show_plot=False, suggest_funcs=None), summary=lambda l: l.summary(),
             no_epochs=lambda l: l.fit(0))

BEGINS_A_FIT = 'summary', 'no_epochs'

def log_of(cb): return cb.log.to_csv() if hasattr(cb, 'log') else ''

@kinds
@in_a_loop('look', LOOKS)
def test_looking_changes_nothing(name, look):
    "Calls that only look change nothing before a fit, and nothing after it"
    kind, learn, n, cb = ready(name, 4)
    if name == 'adapt_batchnorm' and look == 'no_epochs': return   # which is a fit
    learn.add_cb(cb)
    for n_epoch in (3, 0):
        before, log = state(learn), log_of(cb)
        text = looked(learn, look)
        after = state(learn)
        assert same(before[0], after[0])
        if kind.changes and look not in BEGINS_A_FIT: assert all_same(before[1], after[1])
        if look not in BEGINS_A_FIT: assert text == '' and log == log_of(cb)
        if n_epoch: fit(learn, n_epoch)
    fit(learn, 2)
    check_end(kind, learn, n)

@kinds
@in_a_loop('event', ['before_epoch', 'after_train', 'after_validate', 'after_epoch'])
def test_looking_within_a_fit_changes_nothing(name, event):
    looks = [at(event, partial(looked, look=l), 5) for l in ('validate', 'preds')]
    results = [end_of(name, *cbs) for cbs in ([], *([l] for l in looks))]
    for s,m in results[1:]: assert same(s, results[0][0]) and all_same(m, results[0][1])

@kinds
@in_a_loop('look', ['validate', 'preds', 'lr_find'])
def test_a_look_that_is_interrupted_does_not_switch_it_off(name, look):
    kind, learn, n, cb = ready(name)
    learn.add_cb(cb)
    stop = at('before_batch' if look == 'lr_find' else 'before_validate', raising(KeyboardInterrupt()), always=True)
    learn.add_cb(stop)
    with pytest.raises(KeyboardInterrupt): looked(learn, look)
    learn.remove_cb(stop)
    fit(learn, 3)
    check_end(kind, learn, n)
