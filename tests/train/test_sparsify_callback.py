"SparsifyCallback and KeepMasks in real fits: exact targets, zeros that stay, optimizers, interruptions, checkpoints"
import math, warnings

import pytest
from fastai.callback.schedule import SchedCos, sched_lin
from fastai.basics import (Adam, CancelBatchException, CancelFitException, CancelStepException, L, Lamb, Larc,
                           Lookahead, OptimWrapper, RAdam, SGD, ValueMetric, params, ranger, tensor)
from fastai.callback.tracker import SaveModelCallback
from fastai.callback.training import GradientClip, ShortEpochCallback
from sklearn.datasets import load_digits

from callback_helpers import (
    all_same, at, at_batch, collect, convnet, dead_filters, fit, follows_masks, held_tensors, kept, learner, loaders,
    masks, N, optimizer_state, printed, raising, same, snapshot, sparse, Spy, weights, zeros)
from fastai.basics import Callback, DataLoader, DataLoaders, nn, partial, torch
from cases import in_a_loop
from fasterai_sparse.core.criteria import (
    grad_crit, large_final, large_init_large_final, magnitude_increase, movement, movmag, random_criteria,
    small_final, updating_movement, updating_movmag, wanda)
from fasterai_sparse.core.masks import get_mask, masked_params
from fasterai_sparse.core.schedules import agp, cos, dsd, iterative, lin, one_cycle, one_shot, Schedule
from fasterai_sparse.core.select import as_ratio, n_zeros, top_k_mask
from fasterai_sparse.core.from_zeros import masks_from_zeros
from fasterai_sparse.core.sparsifier import Sparsifier
from fasterai_sparse.train.keep_masks import KeepMasks
from fasterai_sparse.train.updates import bake_masks

SCHEDULES = dict(one_shot=one_shot, iterative=iterative, agp=agp, one_cycle=one_cycle, cos=cos, lin=lin,
                 iterative5=partial(iterative, n_steps=5), sched_cos=SchedCos(0, 1), power=lambda pos: pos**2)
OPTIMIZERS = dict(adam=Adam, momentum=partial(SGD, mom=.9), radam=RAdam, ranger=ranger, larc=Larc, lamb=Lamb,
                  lookahead=lambda ps, **kw: Lookahead(SGD(ps, mom=.9, **kw), k=3),
                  adamw=partial(OptimWrapper, opt=torch.optim.AdamW))

pytestmark = [pytest.mark.usefixtures('in_tmp'),
              pytest.mark.filterwarnings('ignore:numpy.core is deprecated')]   # of fastai's load_model

# --- the target

def assert_on_target(model, granularity, context, s=.9):
    ws, dims = weights(model), dict(weight=4, kernel=2, filter=1)[granularity]
    dropped = [int((w.detach().flatten(dims) == 0).all(-1).sum()) if dims < 4 else int((w == 0).sum()) for w in ws]
    sizes = [w[0].numel() if dims == 1 else 9 if dims == 2 else 1 for w in ws]
    n_zero = sum(d*z for d,z in zip(dropped, sizes))
    assert n_zero == zeros(model)
    if granularity == 'weight': assert n_zero == n_zeros(s, N)
    elif context == 'global': assert n_zeros(s, N)-max(sizes) < n_zero <= n_zeros(s, N)
    else: assert dropped == [min(n_zeros(s, w.numel()//z), w.numel()//z-1) for w,z in zip(ws, sizes)]

@pytest.mark.parametrize('granularity', ['weight', 'kernel', 'filter'])
@pytest.mark.parametrize('context', ['local', 'global'])
@pytest.mark.parametrize('name', SCHEDULES)
def test_target_is_reached_on_the_last_step(name, context, granularity):
    learn = fit(learner(), 2, sparse(schedule=SCHEDULES[name], context=context, granularity=granularity))
    assert_on_target(learn.model, granularity, context)

@pytest.mark.parametrize('n_epoch', [1, 3, 5])
@pytest.mark.parametrize('n_batches', [1, 2, 7])
def test_short_epochs_end_on_target(n_batches, n_epoch):
    learn = fit(learner(n_batches), n_epoch, sparse(schedule=agp), how='fit_one_cycle')
    assert zeros(learn.model) == n_zeros(.9, N)

@pytest.mark.parametrize('sparsity', [0, .5, 1, 33.3, 99.9, 100])
def test_any_percentage_is_exact(sparsity):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        learn = fit(learner(), 1, sparse(sparsity))
    floor = N-2 if sparsity < 100 else N
    assert zeros(learn.model) == min(n_zeros(as_ratio(sparsity)/100, N), floor)

def test_target_is_not_reached_before_the_last_step():
    cb, seen = collect('after_batch', lambda learn: zeros(learn.model))
    fit(learner(), 2, [sparse(update_every=1), cb])
    assert seen == sorted(seen) and seen[-2] < seen[-1] == n_zeros(.9, N)

def test_fit_of_no_epochs():
    learn = learner()
    before = snapshot(learn.model)
    out = printed(lambda: fit(learn, 0, sparse(verbose=True)))
    assert same(before, snapshot(learn.model)) and zeros(learn.model) == 0
    assert 'Final Sparsity: 0.00%' in out

def test_a_dict_reaches_each_target():
    learn = fit(learner(), 2, sparse({'0': 25, '3': 75}))
    assert [int((w==0).sum()) for w in weights(learn.model)] == [36, 864]

def test_modules_are_keys_too():
    learn = learner()
    fit(learn, 1, sparse({learn.model[3]: 75}))
    assert [int((w==0).sum()) for w in weights(learn.model)] == [0, 864]

def test_names_are_relative_to_the_part_that_is_given():
    body, head = convnet()[:6], convnet()[6:]
    learn = learner(model=nn.Sequential(body, head))
    fit(learn, 2, sparse({'0': 25, '3': 75}, model=body, layer_type=(nn.Conv2d, nn.Linear)))
    assert [int((w==0).sum()) for w in weights(body)] == [36, 864]
    assert zeros(head, nn.Linear) == 0

def test_two_callbacks_on_two_parts():
    learn = learner(model=nn.Sequential(convnet()[:3], convnet()[3:]))
    fit(learn, 2, [sparse(25, model=learn.model[0]), sparse(75, schedule=agp, model=learn.model[1])])
    assert [int((w==0).sum()) for w in weights(learn.model)] == [36, 864]

def test_round_to_and_nm():
    learn = fit(learner(), 2, sparse(80, granularity='filter', round_to=4))
    assert [int(dead_filters(w).sum()) for w in weights(learn.model)] == [4, 12]
    learn = fit(learner(), 2, sparse(50, nm=True))
    assert torch.equal((learn.model[3].weight==0).unflatten(1, (2,4)).sum(2), torch.full((16,2,3,3), 2))
    assert not (learn.model[0].weight==0).any()

# --- during the fit

EPOCH_ENDS = [(50, one_cycle, [1.96, 20.07, 45.86, 49.74, 50.00]),
              (90, agp, [0, 0, 29.71, 52.03, 68.03, 78.75, 85.25, 88.59, 89.82, 90]),
              (90, iterative, [0, 0, 30, 30, 60, 60, 60, 90, 90, 90]),
              (90, partial(iterative, n_steps=5), [0, 0, 18, 36, 36, 54, 72, 72, 90, 90]),
              (90, one_shot, [0]*4 + [90]*6)]

@pytest.mark.parametrize('sparsity,schedule,values', EPOCH_ENDS)
def test_sparsity_at_epoch_ends_is_the_schedules(sparsity, schedule, values):
    watch, seen = collect('after_epoch', lambda learn: [int((w==0).sum()) for w in weights(learn.model)])
    fit(learner(7), len(values), [sparse(sparsity, schedule), watch])
    for counts,v in zip(seen, values, strict=True):   # 5e-5: the values have two decimals
        assert all(abs(c - v/100*n) <= 1 + 5e-5*n for c,n in zip(counts, (144, 1152)))

def updates(n, n_epoch, cb):
    "Numbers of the batches after which the masks were updated"
    watch, seen = collect('after_batch', lambda learn: len(cb.sparsifier.asked))
    fit(learner(n), n_epoch, [cb, watch])
    return [i for i,(a,b) in enumerate(zip([0]+seen, seen)) if b > a]

def test_no_update_on_a_plateau():
    assert updates(6, 4, sparse(schedule=one_shot, sparsifier=Spy)) == [11]
    assert len(updates(10, 3, sparse(schedule=iterative, sparsifier=Spy))) == 3
    assert len(updates(10, 2, sparse(schedule=lambda pos: .5, sparsifier=Spy))) == 1

def test_default_update_rule():
    assert updates(21, 2, sparse(sparsifier=Spy)) == [3,7,11,15,19,20, 24,28,32,36,40,41]

def test_small_moves_wait():
    when = updates(300, 1, sparse(sparsifier=Spy, schedule=lambda pos: pos/3))   # 0.1 % of the weights in each batch
    assert when[-1] == 299 and all(6 <= b-a <= 11 for a,b in zip([-1]+when, when[:-1]))

def test_no_move_waits_for_ever():
    when = updates(100, 1, sparse(sparsifier=Spy, schedule=lambda pos: pos/50))
    assert when == [31, 63, 95, 99]

def test_update_every():
    assert updates(12, 2, sparse(update_every=5, sparsifier=Spy)) == [4,9,11,14,19,23]
    assert updates(4, 2, sparse(update_every=1, sparsifier=Spy)) == list(range(8))
    assert updates(4, 2, sparse(update_every=100, sparsifier=Spy)) == [3,7]

def test_the_end_of_the_window_is_not_missed():
    watch, seen = collect('after_batch', lambda learn: zeros(learn.model))
    fit(learner(7), 1, [sparse(schedule=Schedule(sched_lin, end_pct=.5), update_every=100), watch])
    assert seen == [0]*3 + [n_zeros(.9, N)]*4

# --- zeros stay

@pytest.mark.parametrize('opt', OPTIMIZERS)
def test_zeros_stay_in_later_fits(opt):
    learn = fit(learner(opt_func=OPTIMIZERS[opt]), 2, sparse())
    before = masks(learn.model)
    for how in ('fit', 'fit_one_cycle', 'fit_flat_cos'): fit(learn, 2, how=how)
    assert all_same(before, masks(learn.model))
    assert all(torch.equal(w!=0, m) for w,m in zip(weights(learn.model), before, strict=True))

@pytest.mark.parametrize('opt', OPTIMIZERS)
def test_no_zero_wakes_up_between_batches(opt):
    watch, seen = collect('after_batch', lambda learn: follows_masks(learn.model))
    fit(learner(opt_func=OPTIMIZERS[opt]), 2, [sparse(), watch])
    assert all(seen) and len(seen) == 12

def test_bake_masks_frees_the_model():
    learn = fit(learner(), 2, sparse())
    bake_masks(learn)
    assert zeros(learn.model) == n_zeros(.9, N) and not masks(learn.model)
    fit(learn, 1)
    assert zeros(learn.model) < n_zeros(.9, N)

def test_a_second_fit_goes_on():
    cb, learn = sparse(), learner()
    fit(learn, 2, cb)
    watch, seen = collect('after_batch', lambda learn: zeros(learn.model))
    fit(learn, 2, [cb, watch])
    assert min(seen) == max(seen) == n_zeros(.9, N)

@pytest.mark.parametrize('context', ['local', 'global'])
def test_a_lower_target_is_reached_too(context):
    learn = fit(learner(), 1, sparse(90, context=context))
    before = masks(learn.model)
    fit(learn, 2, sparse(50, context=context))
    assert zeros(learn.model) == n_zeros(.5, N)
    assert all((new | ~old).all() for old,new in zip(before, masks(learn.model)))

def test_another_granularity_is_reached_too():
    learn = fit(learner(), 1, sparse(50))
    fit(learn, 2, sparse(50, granularity='filter'))
    assert [int(dead_filters(w).sum()) for w in weights(learn.model)] == [4, 8] and silent(learn.model) == (12, True)

def test_one_callback_for_two_learners():
    cb, one = sparse(schedule=agp), learner()
    fit(one, 1, cb)
    watch, seen = collect('after_batch', lambda learn: zeros(learn.model))
    fit(learner(), 2, [cb, watch])
    assert seen[0] == 0 and seen[-1] == n_zeros(.9, N) == zeros(one.model)

def test_dict_targets_that_swap_are_reached():
    learn = fit(learner(), 1, sparse({'0': 75, '3': 25}))
    fit(learn, 2, sparse({'0': 25, '3': 75}))
    assert [int((w==0).sum()) for w in weights(learn.model)] == [36, 864]

def test_a_higher_target_starts_from_what_is_there():
    learn = fit(learner(), 1, sparse(50))
    watch, seen = collect('after_batch', lambda learn: zeros(learn.model))
    fit(learn, 2, [sparse(90, update_every=1), watch])
    assert seen == sorted(seen) and seen[0] == n_zeros(.5, N) and seen[-1] == n_zeros(.9, N)

# --- the optimizer

@pytest.mark.parametrize('schedule', [lin, dsd])
@pytest.mark.parametrize('opt', OPTIMIZERS)
def test_changed_weights_lose_their_optimizer_state(opt, schedule):
    old, n_changed = [], []
    def before(s): old[:] = [(s.param(n), kept(*l).expand_as(s.param(n))) for n,l in s.layers.items()]
    def check(learn):
        for (p, was), now in zip(old, masks(learn.model)):
            n_changed.append(int((was != now).sum()))
            kept = optimizer_state(learn.opt, p)
            assert kept and not any(s[was != now].any() for s in kept)
        old.clear()
    Look = type('Look', (Spy,), dict(look=staticmethod(before)))
    fit(learner(9, opt_func=OPTIMIZERS[opt]), 2, [sparse(schedule=schedule, sparsifier=Look), at('after_batch', check)])
    assert sum(n_changed) >= n_zeros(.9, N)

def test_live_weights_keep_their_optimizer_state():
    learn = learner()
    def alive(learn):
        return [bool(s[m].all()) for *_,p,m in masked_params(learn.model) for s in optimizer_state(learn.opt, p)]
    watch, seen = collect('after_batch', alive)
    fit(learn, 1, [sparse(50), watch])
    assert sum(map(len, seen)) > 0 and all(map(all, seen))

def grad_norm(learn, masked):
    "Norm of all gradients, those under masks left out if `masked`"
    ps = [(m, n, p) for m in learn.model.modules() for n,p in m._parameters.items() if p is not None]
    return math.sqrt(sum(float((p.grad*(kept(m, n) if masked else 1)).square().sum()) for m,n,p in ps))

def test_gradient_clip_does_not_see_masked_gradients():
    norms, expected, raw = [], [], []
    class Clip(GradientClip):
        def before_step(self): norms.append(float(nn.utils.clip_grad_norm_(self.parameters(), self.max_norm)))
    def look(learn): expected.append(grad_norm(learn, True)); raw.append(grad_norm(learn, False))
    fit(learner(), 2, [sparse(schedule=one_shot), at('before_step', look, 10), Clip(.1)])
    assert norms == pytest.approx(expected) and norms[-1] < raw[-1]*.99

@pytest.mark.parametrize('opt_func', [Larc, Lamb])
def test_layerwise_optimizers_do_not_see_masked_gradients(opt_func):
    def n_left(learn): return sum(int(p.grad[~m].count_nonzero()) for *_,p,m in masked_params(learn.model))
    watch, seen = collect('before_step', n_left)
    fit(learner(opt_func=opt_func), 2, [sparse(schedule=one_shot), watch])
    assert not any(seen)

def test_discriminative_learning_rates():
    learn = learner(splitter=lambda m: [params(m[:3]), params(m[3:])])
    fit(learn, 2, sparse(), how='fit_one_cycle', lr_max=slice(1e-4, 1e-2))
    assert zeros(learn.model) == n_zeros(.9, N)

# --- mixed precision

class Scaled(Callback):
    "`MixedPrecision` on a CPU, with gradients that overflow in the batches `bad`"
    order = 10
    def __init__(self, bad): self.bad = bad
    def before_fit(self): self.learn.scaler, self.n_skipped = torch.amp.GradScaler('cpu', init_scale=8.), 0
    def before_batch(self):
        self.autocast = torch.autocast('cpu', torch.bfloat16)
        self.autocast.__enter__()
    def after_pred(self): self.learn.pred = self.pred.float()
    def after_loss(self): self.autocast.__exit__(None, None, None)
    def before_backward(self):
        self.learn.loss_grad = self.scaler.scale(self.loss_grad) * (math.inf if self.train_iter in self.bad else 1)
    def before_step(self):
        self.skipped = True
        self.scaler.step(self)
        self.n_skipped += self.skipped
        if self.skipped: raise CancelStepException()
    def after_step(self): self.scaler.update()
    @property
    def param_groups(self): return self.opt.param_groups
    def step(self, *args, **kwargs): self.skipped = False

@pytest.mark.parametrize('criteria', [large_final, movement, random_criteria])
@pytest.mark.parametrize('bad', [[11], [10, 11], [0, 3, 5, 11], range(12)])
def test_overflow_does_not_lose_the_target(bad, criteria):
    amp = Scaled(bad)
    learn = fit(learner(), 2, [sparse(criteria=criteria), amp])
    assert amp.n_skipped == len(bad) and zeros(learn.model) == n_zeros(.9, N)

@pytest.mark.parametrize('bad', [[3], [5, 8]])
def test_overflow_with_gradient_criteria(bad):
    learn = fit(learner(), 2, [sparse(criteria=grad_crit, update_every=1), Scaled(bad)])
    assert zeros(learn.model) == n_zeros(.9, N)

def test_no_gradients_at_all_is_no_crash():
    skip = at('before_batch', raising(CancelBatchException()), order=0)
    out = printed(lambda: fit(learner(), 1, [sparse(criteria=grad_crit, verbose=True), skip]))
    assert 'Final Sparsity: 0.00%' in out and 'target' in out.split('Final Sparsity')[1]

def test_gradient_criteria_are_never_scored_on_an_overflow():
    ok = []
    def finite(p, grad, **kwargs):
        ok.append(bool(grad.isfinite().all() and grad.any()))
        return (p*grad.nan_to_num()).square()
    fit(learner(), 2, [sparse(criteria=finite, update_every=1), Scaled([3, 5, 8])])
    assert ok and all(ok)

def test_an_update_due_on_an_overflow_waits_for_a_step():
    cb = sparse(update_every=2, sparsifier=Spy)
    watch, seen = collect('after_batch', lambda learn: len(cb.sparsifier.asked))
    fit(learner(), 1, [cb, watch, Scaled([1])])
    assert seen[:3] == [0, 0, 1] and zeros(cb.sparsifier.model) == n_zeros(.9, N)

# --- batches that are skipped

@in_a_loop('event', ['before_batch', 'after_pred', 'after_loss', 'before_backward', 'after_backward'])
@in_a_loop('bad', [0, 5, 11])
def test_a_skipped_batch_does_not_lose_the_target(event, bad):
    def skip(learn):
        if learn.train_iter == bad: raise CancelBatchException()
    assert zeros(fit(learner(), 2, [sparse(), at(event, skip, order=0)]).model) == n_zeros(.9, N)

def test_short_epochs_of_shortepochcallback():
    out = printed(lambda: fit(learner(), 2, [sparse(verbose=True), ShortEpochCallback(.5)]))
    assert 'The target was not reached' in out

# --- checkpoints

def picking(learn, values):
    "A SaveModelCallback that keeps the epoch where `values` is highest"
    learn.metrics = L(ValueMetric(lambda: values[learn.epoch], 'pick'))
    return SaveModelCallback(monitor='pick', fname='best')

@pytest.mark.parametrize('best,share', [([3,2,1,0], .225), ([0,3,2,1], .45), ([0,1,2,3], .9)])
def test_save_model_callback_in_a_gradual_fit(best, share):
    learn = learner()
    keys = set(learn.model.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', UserWarning)
        fit(learn, 4, [sparse(), picking(learn, best)])
    assert zeros(learn.model) == n_zeros(share, N) and set(torch.load('models/best.pth')) == keys
    assert follows_masks(learn.model)
    fit(learn, 1)
    assert zeros(learn.model) == n_zeros(share, N)

def test_a_reload_that_changes_the_sparsity_is_reported():
    learn = learner()
    with pytest.warns(UserWarning, match=r'44\.98% sparse where the model was 89\.97%') as ws:
        out = printed(lambda: fit(learn, 4, [sparse(verbose=True), picking(learn, [0,3,2,1])]))
    assert sum('where the model was' in str(w.message) for w in ws) == 1
    assert 'Final Sparsity: 44.98%' in out
    assert 'loaded at the end are less sparse than those trained last (89.97%)' in out

def test_a_reload_is_reported_once_where_a_part_is_sparsified():
    learn = learner(model=nn.Sequential(convnet()[:6], convnet()[6:]))
    learn.save('dense', with_opt=False)
    fit(learn, 1, sparse(model=learn.model[0]))
    with pytest.warns(UserWarning) as ws: learn.load('dense', with_opt=False)
    assert sum('where the model was' in str(w.message) for w in ws) == 1

def test_a_reload_at_the_same_sparsity_is_silent():
    learn = learner()
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        fit(learn, 4, [sparse(schedule=one_shot), picking(learn, [0,0,2,1])])
    assert zeros(learn.model) == n_zeros(.9, N)

@pytest.mark.parametrize('with_opt', [False, True])
def test_a_dense_checkpoint_in_a_sparse_learner(with_opt):
    dense, learn = fit(learner(), 1), fit(learner(), 1, sparse())
    dense.save('dense', with_opt=with_opt)
    with pytest.warns(UserWarning, match=r'are 0\.00% sparse where the model was 89\.97%'):
        learn.load('dense', with_opt=with_opt)
    assert same(snapshot(dense.model), snapshot(learn.model)) and all(m.all() for m in masks(learn.model))
    fit(learn, 2, sparse())
    assert zeros(learn.model) == n_zeros(.9, N)

@pytest.mark.parametrize('with_opt', [False, True])
def test_a_sparse_checkpoint_in_a_dense_learner(with_opt):
    learn, dense = fit(learner(), 1, sparse()), fit(learner(), 1)
    learn.save('sparse', with_opt=with_opt)
    dense.load('sparse', with_opt=with_opt)
    assert same(snapshot(dense.model), snapshot(learn.model)) and not masks(dense.model)
    fit(dense, 2, sparse(95))
    assert zeros(dense.model) == n_zeros(.95, N)

@pytest.mark.parametrize('with_opt', [False, True])
def test_a_checkpoint_of_the_middle_of_a_fit(with_opt):
    learn = learner()
    fit(learn, 2, [sparse(), at_batch(7, lambda learn: learn.save('mid', with_opt=with_opt))])
    with pytest.warns(UserWarning, match='where the model was'): learn.load('mid', with_opt=with_opt)
    n = zeros(learn.model)
    assert 0 < n < n_zeros(.9, N) and n == sum(int((~m).sum()) for m in masks(learn.model))
    fit(learn, 1)
    assert zeros(learn.model) == n

# --- validation and other calls that do not train

def idle(learn):
    with learn.no_logging(), learn.no_bar():
        learn.validate()
        learn.get_preds()
        learn.get_preds(ds_idx=0, with_loss=True)
        learn.lr_find(num_it=12, show_plot=False, suggest_funcs=None)

@pytest.mark.parametrize('criteria', [large_final, movement, grad_crit])
def test_validate_get_preds_and_lr_find_change_and_print_nothing(criteria):
    learn = learner(cbs=sparse(criteria=criteria, verbose=True))
    before = snapshot(learn.model)
    assert printed(lambda: idle(learn)) == ''
    assert same(before, snapshot(learn.model)) and not masks(learn.model)
    fit(learn, 2)
    assert zeros(learn.model) == n_zeros(.9, N)

def quiet_validate(learn):
    with learn.no_logging(): learn.validate()

@pytest.mark.parametrize('event', ['before_epoch', 'after_train', 'after_validate', 'after_epoch'])
def test_validate_inside_a_fit_does_not_restart_the_schedule(event):
    watch, seen = collect('after_epoch', lambda learn: zeros(learn.model))
    fit(learner(), 4, [sparse(), at(event, quiet_validate, order=5), watch])
    assert seen == [n_zeros(.9*i/4, N) for i in (1,2,3,4)]

def validate_and_return(learn):
    "Validate after a batch, and put back what fastai needs to go on training"
    if learn.iter % 3: return
    kept = {k: getattr(learn, k) for k in ('iter', 'n_iter', 'dl', 'epoch', 'train_iter', 'pct_train', 'loss')}
    quiet_validate(learn)
    for k,v in kept.items(): setattr(learn, k, v)
    learn.training = True
    learn.model.train()

def test_validate_between_batches_does_not_restart_the_schedule():
    watch, seen = collect('after_epoch', lambda learn: zeros(learn.model))
    out = printed(lambda: fit(learner(), 4, [sparse(verbose=True), at('after_batch', validate_and_return), watch]))
    assert seen == [n_zeros(.9*i/4, N) for i in (1,2,3,4)]
    assert [out.count(s) for s in ('Pruning of', 'Sparsity at the end of epoch', 'Final Sparsity')] == [1, 4, 1]

@pytest.mark.parametrize('event', ['before_epoch', 'after_epoch'])
def test_epochs_are_numbered_whoever_validates(event):
    out = printed(lambda: fit(learner(), 3, [sparse(verbose=True), at(event, quiet_validate, order=5)]))
    assert [l for l in out.splitlines() if 'end of epoch' in l] == \
        [f'Sparsity at the end of epoch {i}: {100*n_zeros(.3*(i+1), N)/N:.2f}%' for i in range(3)]

def recorded(name, log):
    "A criterion that logs the state `name` it is given"
    def init(p, init, **kwargs): log.append(init.clone()); return (p-init).abs()
    def prev(p, prev, **kwargs): log.append((p.clone(), prev.clone())); return (p-prev).abs()
    def grad(p, grad, **kwargs): log.append(grad.clone()); return (p*grad).square()
    return dict(init=init, prev=prev, grad=grad)[name]

@pytest.mark.parametrize('cbs', [None, at('after_batch', validate_and_return)], ids=['alone', 'validating'])
def test_init_is_the_weights_at_the_start_of_the_fit(cbs):
    log, learn = [], fit(learner(), 1)
    start = [w.detach().clone() for w in weights(learn.model)]
    fit(learn, 2, [sparse(criteria=recorded('init', log)), *L(cbs)])
    assert len(log) >= 4 and all(any(torch.equal(o, s) for s in start) for o in log)
    assert zeros(learn.model) == n_zeros(.9, N)

@pytest.mark.parametrize('cbs', [None, at('after_batch', validate_and_return)], ids=['alone', 'validating'])
def test_prev_is_the_weights_at_the_last_update(cbs):
    log, learn = [], fit(learner(), 1)
    last = {w.shape: w.detach().clone() for w in weights(learn.model)}
    fit(learn, 2, [sparse(criteria=recorded('prev', log)), *L(cbs)])
    for p,prev in log:
        assert torch.equal(prev!=0, last[p.shape]!=0) or (prev[last[p.shape]==0] == 0).all()
        assert (prev-last[p.shape])[prev!=0].abs().max() == 0
        last[p.shape] = p
    assert len(log) >= 8 and zeros(learn.model) == n_zeros(.9, N)

# --- interruptions

def test_early_end_is_said():
    out = printed(lambda: fit(learner(), 4, [sparse(verbose=True), at_batch(11, raising(CancelFitException()))]))
    assert 'Final Sparsity: 44.98%' in out
    assert any('target was not reached' in l and '50%' in l for l in out.splitlines())

# --- frozen layers

def test_frozen_layers_are_left_alone():
    learn = learner()
    learn.model[3].requires_grad_(False)
    frozen, cb = learn.model[3].weight.detach().clone(), sparse()
    fit(learn, 2, cb)
    assert torch.equal(learn.model[3].weight, frozen) and get_mask(learn.model[3]) is None
    assert [int((w==0).sum()) for w in weights(learn.model)] == [n_zeros(.9, 144), 0]
    assert dict(zip(*cb.sparsifier.report()[['layer','note']].T.values))['3'].startswith('frozen')

def split(model): return [params(model[:6]), params(model[6:])]

VALIDATING = dict(no=[], batch=[at('after_batch', validate_and_return)], epoch=[at('after_epoch', quiet_validate, 5)])

@pytest.mark.parametrize('extra', VALIDATING.values(), ids=VALIDATING)
def test_fine_tune_waits_until_layers_train(extra):
    learn = learner(splitter=split)
    start, seen = [w.detach().clone() for w in weights(learn.model)], []
    look = at('before_fit', lambda learn: seen.append([w.detach().clone() for w in weights(learn.model)]), order=0)
    out = printed(lambda: fit(learn, 2, [sparse(verbose=True), look, *extra], how='fine_tune'))
    assert len(seen) == 2 and all_same(seen[1], start)
    assert out.count('waiting') == 1 and out.count('Pruning of') == 1
    assert zeros(learn.model) == n_zeros(.9, N)

def test_layers_masked_before_they_freeze_stay_as_they_are():
    learn = fit(learner(splitter=split), 1, sparse(50))
    before = masks(learn.model)
    learn.freeze()
    fit(learn, 1, sparse(90))
    assert all_same(before, masks(learn.model)) and zeros(learn.model) == n_zeros(.5, N)

# --- criteria that need state

def test_gradients_are_there_when_a_criterion_asks():
    log = []
    learn = fit(learner(), 2, sparse(criteria=recorded('grad', log), update_every=1))
    assert len(log) >= 20 and all(g.count_nonzero() for g in log)
    assert zeros(learn.model) == n_zeros(.9, N)

@pytest.mark.parametrize('context', ['local', 'global'])
@pytest.mark.parametrize('granularity', ['weight', 'filter'])
@pytest.mark.parametrize('criteria', [movement, movmag, magnitude_increase, updating_movement, updating_movmag,
                                      grad_crit, small_final, large_init_large_final], ids=lambda f: f.__name__)
def test_criteria_with_state_reach_the_target(criteria, granularity, context):
    learn = fit(learner(), 2, sparse(criteria=criteria, granularity=granularity, context=context))
    assert_on_target(learn.model, granularity, context)

@pytest.mark.parametrize('opt,key', [(o, 'grad_avg') for o in ('adam', 'ranger', 'momentum')] + [('adamw', 'exp_avg')])
@pytest.mark.parametrize('n_before', [0, 1])
def test_a_criterion_may_read_the_optimizer(opt, key, n_before):
    log = []
    def by_momentum(p, opt, **kwargs): log.append(opt[key].any()); return opt[key].abs()
    learn = learner(opt_func=OPTIMIZERS[opt])
    if n_before: fit(learn, n_before)
    fit(learn, 2, sparse(criteria=by_momentum))
    assert log and all(log) and zeros(learn.model) == n_zeros(.9, N)

@pytest.mark.filterwarnings('ignore:The loaded weights')
def test_a_criterion_reads_the_optimizer_after_a_load():
    log, learn = [], fit(learner(), 1)
    def by_momentum(p, opt, **kwargs): log.append(float(opt['grad_avg'].abs().sum())); return opt['grad_avg'].abs()
    learn.save('o')
    learn.load('o')
    fit(learn, 2, [sparse(criteria=by_momentum, update_every=1), at_batch(3, lambda learn: learn.load('o'))])
    assert len(set(log)) == len(log) >= 20

@pytest.mark.parametrize('as_loader', [False, True])
def test_wanda_takes_data(as_loader):
    learn = learner()
    data = learn.dls.valid if as_loader else learn.dls.train.one_batch()[0]
    watch, seen = collect('after_batch', lambda learn: learn.model.training)
    fit(learn, 2, [sparse(criteria=wanda, data=data), watch])
    assert zeros(learn.model) == n_zeros(.9, N) and all(seen)

def test_random_masks_repeat_for_the_same_seed():
    def run(seed, noise):
        learn = learner()
        torch.manual_seed(noise)
        return masks(fit(learn, 2, sparse(criteria=random_criteria, sparsifier=partial(Sparsifier, seed=seed))).model)
    assert all_same(run(0, 0), run(0, 1)) and not all_same(run(0, 0), run(1, 0))

# --- dense-sparse-dense

def test_dsd_ends_dense_and_trains_what_came_back():
    learn, watch = learner(), None
    watch, seen = collect('after_batch', lambda learn: zeros(learn.model))
    fit(learn, 4, [sparse(schedule=dsd), watch])
    assert max(seen) == n_zeros(.9, N) == seen[11] and seen[-1] == 0 and seen[12:] == sorted(seen[12:], reverse=True)
    fit(learn, 2)
    assert all((w.abs() > 1e-12).all() for w in weights(learn.model))

def test_dsd_revives_what_the_gradient_wants():
    checked, before = [], []
    def look(s):
        before[:] = [(s.param(n).grad.abs(), kept(*l).expand_as(s.param(n))) for n,l in s.layers.items()]
    def check(learn):
        for (g, old), new in zip(before, masks(learn.model)):
            born, dead = new & ~old, ~new
            if born.any() and dead.any(): checked.append(bool(g[~old].any() and g[born].min() >= g[dead].max()))
    Look = type('Look', (Spy,), dict(look=staticmethod(look)))
    fit(learner(), 4, [sparse(schedule=dsd, sparsifier=Look), at('after_batch', check), GradientClip(.1)])
    assert len(checked) >= 4 and all(checked)

def test_dsd_of_filters_gives_their_batchnorm_back():
    learn = fit(learner(), 4, sparse(schedule=dsd, granularity='filter'))
    fit(learn, 3)
    with torch.no_grad(): out = learn.model[:5](torch.cat([x for x,_ in learn.dls.train.dataset]))
    assert zeros(learn.model) == 0 and (out.std((0,2,3)) > 1e-3).all()

# --- structure

def silent(model):
    "Number of dropped filters, and whether their biases and BatchNorm parameters are zero"
    pairs = [(model[0], model[1]), (model[3], model[4])]
    dead = [dead_filters(c.weight) for c,_ in pairs]
    ok = all(not t[d].any() for d,(c,b) in zip(dead, pairs) for t in (c.bias, b.weight, b.bias))
    return sum(int(d.sum()) for d in dead), ok

@pytest.mark.parametrize('context', ['local', 'global'])
def test_dropped_filters_are_silent_at_every_application(context):
    watch, seen = collect('after_batch', lambda learn: silent(learn.model))
    learn = fit(learner(), 2, [sparse(granularity='filter', context=context, update_every=1), watch])
    n = [c for c,_ in seen]
    assert all(ok for _,ok in seen) and n == sorted(n) and n[-1] > n[2] > 0
    fit(learn, 2)
    assert silent(learn.model) == (n[-1], True)
    dead = dead_filters(learn.model[3].weight)
    assert dead.any() and not learn.model.eval()[:5](torch.randn(3,2,6,6))[:,dead].any()

def tabular_batches(n): return list(zip(torch.randint(9, (n,8,1)), torch.randn(n,8,3), torch.randint(4, (n,8))))

@pytest.mark.parametrize('context', ['local', 'global'])
def test_tabular_model(context):
    from fastai.tabular.model import TabularModel
    learn = learner(model=TabularModel([(10,4)], 3, 4, [32,16]), dls=loaders(6, make=tabular_batches))
    kinds = (nn.Linear, nn.Embedding)
    fit(learn, 2, sparse(context=context, layer_type=kinds))
    n = sum(w.numel() for w in weights(learn.model, kinds))
    assert zeros(learn.model, kinds) == n_zeros(.9, n) == zeros(fit(learn, 1).model, kinds)

def test_tabular_rows_take_their_batchnorm_along():
    from fastai.tabular.model import TabularModel
    learn = learner(model=TabularModel([(10,4)], 3, 4, [32,16]), dls=loaders(6, make=tabular_batches))
    names = [n for n,m in learn.model.named_modules() if isinstance(m, nn.Linear)][:2]
    fit(learn, 2, sparse({n: 50 for n in names}, granularity='row', layer_type=nn.Linear))
    for n in names:
        dead = (learn.model.get_submodule(n).weight == 0).all(1)
        assert dead.sum() == len(dead)//2
        bn, = [m for m in learn.model.get_submodule(n.rpartition('.')[0]) if isinstance(m, nn.BatchNorm1d)]
        assert not bn.weight[dead].any() and not bn.bias[dead].any()

class Text(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb, self.head = nn.Embedding(20, 8), nn.Linear(24, 4)
        self.rnn = nn.LSTM(8, 12, num_layers=2, batch_first=True, bidirectional=True)
    def forward(self, x): return self.head(self.rnn(self.emb(x))[0][:,-1])

def text_batches(n): return list(zip(torch.randint(20, (n,8,5)), torch.randint(4, (n,8))))

@pytest.mark.parametrize('context', ['local', 'global'])
def test_lstm_text_model(context):
    learn = learner(model=Text(), dls=loaders(6, make=text_batches))
    fit(learn, 2, cb := sparse(context=context, layer_type=(nn.LSTM, nn.Embedding, nn.Linear)))
    n = sum(p.numel() for k,p in learn.model.named_parameters() if 'weight' in k)
    zero = lambda: sum(int((p==0).sum()) for k,p in learn.model.named_parameters() if 'weight' in k)
    assert zero() == n_zeros(.9, n) and len(cb.sparsifier.layers) == 10
    fit(learn, 1)
    assert zero() == n_zeros(.9, n)

def test_weight_dropped_lstm_is_refused_or_reported():
    from fastai.text.models.awdlstm import AWD_LSTM
    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = AWD_LSTM(20, 8, 12, 2), nn.Linear(8, 4)
        def forward(self, x): return self.head(self.body(x)[:,-1])
        def reset(self): self.body.reset()
    learn, cb = learner(model=Classifier(), dls=loaders(6, make=text_batches)), sparse(layer_type=(nn.LSTM, nn.Linear))
    try: fit(learn, 2, cb)
    except ValueError as e: assert 'weight_hh_l0' in str(e)   # refused by name
    else: assert any('weight_hh_l0' in n for n in cb.sparsifier.report().layer)

def test_learning_survives_on_digits():
    x,y = load_digits(return_X_y=True)
    items = list(zip((tensor(x).float().view(-1,1,8,8)/16)[:1792].split(64), tensor(y)[:1792].split(64)))
    dls = DataLoaders(DataLoader(items[:22], bs=None, shuffle=True), DataLoader(items[22:], bs=None), device='cpu')
    net = nn.Sequential(nn.Conv2d(1,8,3,padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8,16,3,stride=2),
                        nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(144,10))
    learn = fit(learner(model=net, dls=dls), 6, sparse(70, one_cycle), how='fit_one_cycle')
    assert zeros(learn.model) == n_zeros(.7, 72+1152) and learn.final_record[-1] > .85

# --- memory

@pytest.mark.parametrize('granularity', ['weight', 'filter'])
def test_resident_memory_is_close_to_the_dense_models(granularity):
    learn, cb, seen = learner(), sparse(granularity=granularity), []
    dense = sum(t.numel()*t.element_size() for t in learn.model.state_dict().values())
    def measure(learn): seen.append(sum(held_tensors(learn.model, cb, learn.keep_masks).values()))
    fit(learn, 2, [cb, at('after_batch', measure)])
    assert dense <= max(seen) <= 1.3*dense
    learn.save('m', with_opt=False)
    assert sum(t.numel()*t.element_size() for t in torch.load('models/m.pth').values()) == dense

def test_state_is_kept_only_where_a_criterion_asks():
    for criteria,copies in ((large_final, 0), (movement, 1), (updating_movement, 1), (grad_crit, 0)):
        cb = sparse(criteria=criteria)
        learn = fit(learner(), 1, cb)
        mine = held_tensors(cb.sparsifier).keys() - held_tensors(learn.model).keys()
        assert len(mine) == 2*copies, criteria.__name__

# --- bad arguments

BAD = [(ValueError, dict(sparsity=101)), (ValueError, dict(sparsity=-1)), (ValueError, dict(sparsity=math.nan)),
       (TypeError, dict(sparsity='50')), (TypeError, dict(sparsity=True)), (ValueError, dict(sparsity=None)),
       (ValueError, dict(sparsity={})), (ValueError, dict(sparsity={'9': 50})), (ValueError, dict(sparsity={'0': 150})),
       (ValueError, dict(sparsity={'2': 50})), (ValueError, dict(sparsity={'0': 50}, context='global')),
       (ValueError, dict(granularity='filters')), (ValueError, dict(context='lokal')),
       (ValueError, dict(criteria='magnitude')), (ValueError, dict(schedule='agp')),
       (ValueError, dict(schedule=lambda pos: 2*pos)), (ValueError, dict(layer_type=nn.Conv3d)),
       ((TypeError, ValueError), dict(layer_type='conv')),
       (ValueError, dict(round_to=0)), ((TypeError, ValueError), dict(round_to=2.5)), (ValueError, dict(nm=(4,2))),
       (ValueError, dict(nm=True)), (ValueError, dict(sparsity=50, nm=True, granularity='filter')),
       (ValueError, dict(sparsity=50, nm=True, round_to=4)), (ValueError, dict(update_every=0)),
       (ValueError, dict(update_every=1.5)), (ValueError, dict(update_every=True)), (ValueError, dict(criteria=wanda)),
       (ValueError, dict(criteria=lambda p, foo: p)), (ValueError, dict(model=convnet()))]

def shown(kwargs):
    if not isinstance(kwargs, dict): return ''
    return ' '.join(f'{k}={getattr(v, "__name__", v)}' for k,v in kwargs.items())[:40]

@pytest.mark.parametrize('error,kwargs', BAD, ids=shown)
def test_bad_arguments_raise_before_training(error, kwargs):
    learn, started = learner(), []
    before = snapshot(learn.model)
    with pytest.raises(error): fit(learn, 1, [sparse(**kwargs), at('before_batch', lambda learn: started.append(1))])
    assert same(before, snapshot(learn.model)) and not started
    assert not masks(learn.model) and not any(isinstance(cb, KeepMasks) for cb in learn.cbs)
    assert zeros(fit(learn, 1, sparse()).model) == n_zeros(.9, N)

@pytest.mark.parametrize('kwargs,words', [
    (dict(sparsity=101), ['101', '0 to 100']), (dict(granularity='filters'), ['filters', 'Conv2d', "'filter'"]),
    (dict(context='lokal'), ['lokal', 'global']), (dict(sparsity={'9': 50}), ["'9'", "'0'", "'3'"]),
    (dict(layer_type=nn.Conv3d), ['Conv3d', 'Conv2d']), (dict(criteria=wanda), ['wanda', 'data'])])
def test_errors_name_the_value_and_the_choices(kwargs, words):
    with pytest.raises(ValueError) as e: fit(learner(), 1, sparse(**kwargs))
    assert all(w in str(e.value) for w in words)

def test_a_fraction_is_warned_of():
    with pytest.warns(UserWarning, match='0.9 %.*write 90'): sparse(.9)

def test_weights_that_cannot_carry_a_mask_are_refused_by_name():
    learn = learner()
    nn.utils.parametrizations.weight_norm(learn.model[3])
    before = snapshot(learn.model)
    with pytest.raises(ValueError, match="'3' is parametrized"): fit(learn, 1, sparse())
    assert same(before, snapshot(learn.model))

# --- messages

class Wide(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.out = nn.Linear(72, 1000), nn.Linear(1000, 100)
    def forward(self, x): return self.out(self.inner(x.flatten(1)))

def test_epoch_lines_and_final_report(capsys):
    fit(learner(model=Wide()), 5, sparse(50, one_cycle, layer_type=nn.Linear, verbose=True), how='fit_one_cycle')
    assert capsys.readouterr().out.splitlines() == [
        'Pruning of weight until a sparsity of 50%',
        *[f'Sparsity at the end of epoch {i}: {v}%' for i,v in enumerate(['1.96', '20.07', '45.86', '49.74', '50.00'])],
        'Final Sparsity: 50.00%', '', 'Sparsity Report:', '-'*80,
        'Layer                          Type            Params     Zeros      Sparsity  ', '-'*80,
        'inner                          Linear          72,000     36,000        50.00%',
        'out                            Linear          100,000    50,000        50.00%', '-'*80,
        'Overall                        all             172,000    86,000        50.00%']

def test_lines_of_a_dict(capsys):
    targets = {'inner': 30, 'out': 85}
    fit(learner(model=Wide()), 5, sparse(targets, cos, layer_type=nn.Linear, verbose=True))
    lines = capsys.readouterr().out.splitlines()
    assert lines[:7] == ["Pruning of weight until a sparsity of {'inner': 30, 'out': 85}%",
        *[f'Sparsity at the end of epoch {i}: avg={v}%' for i,v in enumerate('5.49 19.87 37.63 52.01 57.50'.split())],
        "Final Sparsity: {'inner': 30.0, 'out': 85.0}"]
    assert lines[-1].split() == ['Overall', 'all', '172,000', '106,600', '61.98%']

def test_the_report_is_measured():
    out = printed(lambda: fit(learner(), 1, sparse(90, granularity='filter', verbose=True)))
    n = 7*18 + 14*72
    assert f'Final Sparsity: {100*n/N:.2f}%' in out and 'groups are dropped as a whole' in out

def test_what_stays_dense_is_reported_with_its_reason():
    out = printed(lambda: fit(learner(), 1, sparse(50, nm=True, verbose=True)))
    assert '0: stays dense: 2 inputs are no multiple of 4' in out

def test_verbose_false_says_nothing():
    learn, cb = learner(splitter=split), sparse()
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for how in ('fine_tune', 'fit', 'fit_one_cycle'): assert printed(lambda: fit(learn, 1, cb, how=how)) == ''

# --- wrapped models

def test_data_parallel_is_looked_through(tmp_path):
    learn, cb = learner(model=nn.DataParallel(convnet())), sparse({'0': 50, '3': 90})
    fit(learn, 2, cb)
    assert [int((w==0).sum()) for w in weights(learn.model)] == [72, n_zeros(.9, 1152)]
    cb.sparsifier.save_model(tmp_path/'m.pth', weights_only=True)
    convnet().load_state_dict(torch.load(tmp_path/'m.pth'))
    with pytest.warns(UserWarning, match='0.00% sparse'): learn.model.module.load_state_dict(convnet().state_dict())

def test_zeros_from_a_file_are_held(tmp_path):
    learn = fit(learner(), 2, sparse())
    torch.save(learn.model.state_dict(), tmp_path/'m.pth')
    fresh = learner(cbs=KeepMasks())
    fresh.model.load_state_dict(torch.load(tmp_path/'m.pth'))
    masks_from_zeros(fresh.model)
    assert zeros(fit(fresh, 2).model) == n_zeros(.9, N) and all_same(masks(fresh.model), masks(learn.model))

# --- waiting, and rounding

def test_rounding_to_whole_weights_is_no_shortfall():
    out = printed(lambda: fit(learner(), 2, sparse({'0': 30, '3': 80}, verbose=True)))   # 43 of 144 weights are 29.86 %
    assert 'not the target' not in out and "'0': 29.86" in out

# --- masked weights after each step

@pytest.mark.parametrize('granularity', ['weight', 'kernel', 'filter'])
def test_nothing_is_left_under_the_masks_after_any_step(granularity):
    spy, left = collect('after_batch',
                        lambda l: sum(int((p*~mask).count_nonzero()) for *_,p,mask in masked_params(l.model)))
    fit(learner(), 4, [sparse(80, granularity=granularity), spy])
    assert len(left) == 24 and not any(left)

def test_nothing_is_left_in_dropped_rows_after_any_step():
    # nothing between them stops the gradient of a dropped row
    model = nn.Sequential(nn.Flatten(), nn.Linear(72,32), nn.Linear(32,4))
    spy, left = collect('before_batch',
                        lambda l: sum(int((p*~mask).count_nonzero()) for *_,p,mask in masked_params(l.model)))
    fit(learner(model=model), 4, [sparse(80, granularity='row', layer_type=nn.Linear), spy])
    assert len(left) == 24 and not any(left)

def test_live_groups_follow_what_is_loaded():
    model = convnet()
    s = Sparsifier(model, 'filter', 'local', large_final)
    s.sparsify_model(50)
    with warnings.catch_warnings(): warnings.simplefilter('ignore'); model.load_state_dict(convnet().state_dict())
    before = weights(model)[1].detach().abs().mean((1,2,3))
    s.sparsify_model(25)
    dropped = ~kept(model[3]).flatten(1).any(1)
    assert torch.equal(dropped, ~top_k_mask(before, 12))
