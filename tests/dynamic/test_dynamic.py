"DynamicSparseTrainingCallback: updates, weights and optimizer state in real fits, and together with the rest of fastai"
import math, pickle, random, warnings
from contextlib import nullcontext
from copy import deepcopy
from fractions import Fraction

import numpy as np, pandas as pd, pytest
from fastai.basics import (Adam, CancelBatchException, CancelEpochException, CancelFitException, CancelStepException, L,
                           Lamb, Lookahead, OptimWrapper, RAdam, SGD, ranger)
from fastai.callback.schedule import sched_cos, sched_exp, sched_lin, sched_no
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.text.models.awdlstm import WeightDropout

from callback_helpers import (
    all_same, at, at_batch, collect, convnet, copied_by, exportable, fit, follows_masks, images, kept, learner,
    loaders, masks, OnCPU, optimizer_state, raising, same, snapshot, split, weights, zeros_hold)
from fastai.basics import (
    Callback, CrossEntropyLossFlat, DataLoader, DataLoaders, Learner, nn, partial, set_seed, torch)
from fasterai_sparse.core.allocation import (
    erdos_renyi_sparsity, first_layer_dense_uniform, global_sparsity, uniform_sparsity)
from fasterai_sparse.core.criteria import large_final, movement, wanda
from fasterai_sparse.core.masks import (
    apply_masks, get_mask, masked_params, masks_off, remove_masks, set_mask)
from fasterai_sparse.core.patterns import block, NM
from fasterai_sparse.core.select import n_zeros
from fasterai_sparse.core.sparsifier import Sparsifier
from fasterai_sparse.dynamic.callback import (
    DynamicSparseTrainingCallback, GraNet_presets, ITOP_presets, MEST_presets, RigL_presets, SET_presets,
    SNFS_presets)
from fasterai_sparse.dynamic.drop_grow import magnitude_and_gradient, random_score
from fasterai_sparse.dynamic.random_masks import (
    sparse_mask, sparse_mask_like, sparse_params, sparseable_modules, sparsify_model)

PRESETS = dict(SET=SET_presets, SNFS=SNFS_presets, RigL=RigL_presets, ITOP=ITOP_presets, MEST=MEST_presets,
               GraNet=dict(GraNet_presets, sparsity=90))
OPTIMIZERS = dict(sgd=partial(SGD, mom=.9), adam=Adam, radam=RAdam, lamb=Lamb, ranger=ranger,
                  lookahead=lambda ps, **kw: Lookahead(SGD(ps, mom=.9, **kw), k=2),
                  torch_sgd=partial(OptimWrapper, opt=torch.optim.SGD, momentum=.9, weight_decay=.1),
                  torch_adamw=partial(OptimWrapper, opt=torch.optim.AdamW, amsgrad=True))
TINY = 1e-20

pytestmark = [pytest.mark.usefixtures('in_tmp'),
              *(pytest.mark.filterwarnings(f'ignore:{w}') for w in ('numpy.core is deprecated', 'load_learner'))]

def dst(method='RigL', every=2, **kwargs):
    return DynamicSparseTrainingCallback(**{**PRESETS[method], 'batches_per_update': every, **kwargs})

# --- models

class Rows(nn.Module):
    "A classifier that reads the rows of an image as a sequence, with a recurrent layer or attention"
    def __init__(self, mid):
        super().__init__()
        self.inp, self.mid, self.out = nn.Linear(12, 8), mid, nn.Linear(8, 4)
    def forward(self, x):
        x = self.inp(x.movedim(2, 1).flatten(2))
        x,*_ = self.mid(x, x, x) if isinstance(self.mid, nn.MultiheadAttention) else self.mid(x)
        return self.out(x.mean(1))

def smooth(seed=0):
    "A random convolutional net without dead units, so that all gradients differ"
    rng = random.Random(seed)
    c, d, k = rng.randint(4, 9), rng.randint(6, 16), rng.choice([1, 3])
    return nn.Sequential(nn.Conv2d(2, c, k, padding=k//2), nn.BatchNorm2d(c), nn.SiLU(), nn.Conv2d(c, d, 3, padding=1),
                         nn.BatchNorm2d(d), nn.SiLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4*d, 4))

def mlp(seed=0):
    h = random.Random(seed).randint(10, 30)
    return nn.Sequential(nn.Flatten(), nn.Linear(72, h), nn.Tanh(), nn.Linear(h, h), nn.Tanh(), nn.Linear(h, 4))

MODELS = dict(conv=smooth, conv2=partial(smooth, 3), mlp=mlp, convnet=convnet,
              lstm=lambda: Rows(nn.LSTM(8, 8, batch_first=True)), gru=lambda: Rows(nn.GRU(8, 8, batch_first=True)),
              attention=lambda: Rows(nn.MultiheadAttention(8, 2, batch_first=True)))

def sparse_learner(model=None, sparsity=.75, sparse_f=uniform_sparsity, seed=0, **kwargs):
    learn = learner(model=model or smooth(), **kwargs)
    sparsify_model(learn, sparsity, sparse_f, enforce_mask=False, seed=seed)
    return learn

def for_method(method, model, **kwargs):
    "A learner whose model has the initial sparsity that the method expects"
    return sparse_learner(model, .5 if method=='GraNet' else .75, **kwargs)

# --- recording a fit

class Layer:
    "Copy of a weight, its mask and its optimizer state"
    def __init__(self, learn, p, mask):
        self.w, self.mask = p.detach().clone(), mask.bool().clone()
        self.past = [s.clone() for s in optimizer_state(learn.opt, p)]

class Update:
    "An update after batch `n`: layers before and after it, and the gradients it used"
    def __init__(self, n, grads, was, now): self.n, self.grads, self.was, self.now = n, grads, was, now
    def __iter__(self): return zip(self.grads, self.was, self.now)

def n_batches(learn):
    "Number of training batches of the fit up to this one"
    return learn.epoch*learn.n_iter + learn.iter + 1

class Watch(Callback):
    "Records the updates of `cb`"
    order, run_valid = 10.4, False   # right before the updates
    def __init__(self, cb): self.cb, self.updates = cb, []
    def _layers(self): return [Layer(self.learn, p, mask) for *_,p,mask in masked_params(self.learn.model)]
    def before_fit(self): self.n_rows = 0
    def before_step(self):
        self.grads, self.was = [p.grad.clone() for *_,p,_ in masked_params(self.learn.model)], self._layers()
    def after_step(self):
        if len(self.cb.log) == self.n_rows: self.was = self._layers()
    def after_batch(self):
        if len(self.cb.log) == self.n_rows: return
        self.n_rows = len(self.cb.log)
        self.updates.append(Update(n_batches(self.learn), self.grads, self.was, self._layers()))

class Everywhere(Callback):
    "Collects what `f(learn)` returns at every event, after all other callbacks"
    order = 90
    def __init__(self, f): self.f, self.seen = f, []
    def __call__(self, event_name): self.seen.append(self.f(self.learn))

def n_live(learn): return [int(mask.sum()) for *_,mask in masked_params(learn.model)]

def watched(learn, cb, n_epoch=2, cbs=(), **kwargs):
    "The updates that `cb` makes in a fit"
    watch = Watch(cb)
    fit(learn, n_epoch, [watch, cb, *L(cbs)], **kwargs)
    return watch.updates

# --- weights and optimizer state at every step

def check_changes(u):
    "Grown weights are almost zero and without optimizer state, dropped weights are zero, all others are unchanged"
    for _,was,now in u:
        born, dropped, stay = now.mask & ~was.mask, was.mask & ~now.mask, was.mask & now.mask
        assert now.w[born].all() and (now.w[born].abs() <= TINY).all() and not now.w[~now.mask].any()
        assert torch.equal(now.w[stay], was.w[stay]) and len(now.past) == len(was.past)
        for s0,s1 in zip(was.past, now.past): assert not s1[born | dropped].any() and torch.equal(s0[stay], s1[stay])

def check_fit(method, learn, **kwargs):
    budget, counts, holds = n_live(learn), Everywhere(n_live), Everywhere(zeros_hold)
    cb = dst(method)
    updates = watched(learn, cb, cbs=[counts, holds], **kwargs)
    assert len(updates) >= 4 and all(holds.seen)
    for u in updates: check_changes(u)
    assert all(l.past for l in updates[-1].now)
    assert any((now.mask & ~was.mask).any() for u in updates for _,was,now in u)
    totals = [sum(c) for c in counts.seen]
    if method == 'GraNet': assert totals == sorted(totals, reverse=True)
    elif method == 'SNFS': assert set(totals) == {sum(budget)} and n_live(learn) != budget
    else: assert all(c == budget for c in counts.seen)
    n = sum(mask.numel() for *_,mask in masked_params(learn.model))
    assert totals[-1] == (n-n_zeros(.9, n) if method == 'GraNet' else sum(budget))

@pytest.mark.parametrize('method', PRESETS)
@pytest.mark.parametrize('model', MODELS)
def test_what_holds_at_every_step_whatever_the_model(model, method):
    check_fit(method, for_method(method, MODELS[model](), sparse_f=erdos_renyi_sparsity))

@pytest.mark.parametrize('method', ['SET', 'SNFS', 'RigL', 'GraNet'])
@pytest.mark.parametrize('opt', OPTIMIZERS)
def test_what_holds_at_every_step_whatever_the_optimizer(opt, method):
    check_fit(method, for_method(method, smooth(1), opt_func=OPTIMIZERS[opt]), how='fit_one_cycle')

@pytest.mark.parametrize('every', [2, 3])
@pytest.mark.parametrize('start,context', [(0., 'global'), (.5, 'global'), (.5, 'local'), (.95, 'global')])
def test_granet_follows_its_schedule(start, context, every):
    learn = learner(model=smooth())
    if start: sparsify_model(learn, start, seed=0)
    cb = dst('GraNet', every, context=context, stop_pct=.8)
    updates = watched(learn, cb, 3)
    n = sum(mask.numel() for *_,mask in masked_params(learn.model))
    found = Fraction(n_zeros(start, n), n)
    agp = lambda t: float(found) + (.9-float(found))*(1-(1-t/.8)**3) if t < .8 else .9
    assert cb.log.live.tolist() == [n-n_zeros(agp(u.n/18), n) for u in updates]
    assert [u.n for u in updates] == [i for i in range(every, 15, every)] + [15]
    assert int(sum(p.count_nonzero() for *_,p,_ in masked_params(learn.model))) == n-n_zeros(.9, n)

@pytest.mark.parametrize('method', PRESETS)
def test_gradients_are_zero_at_the_start_of_each_batch(method):
    clear = lambda learn: not any(p.grad is not None and p.grad.any() for p in learn.model.parameters())
    watch, seen = collect('before_batch', clear)
    fit(for_method(method, smooth()), 2, [dst(method), watch])
    assert len(seen) == 12 and all(seen)

@pytest.mark.parametrize('replace', [True, False])
@pytest.mark.parametrize('method', ['SET', 'SNFS', 'RigL'])
def test_an_update_in_place_of_the_step(method, replace):
    "Parameters without a mask show whether the optimizer has stepped"
    bias = lambda learn: learn.model[0].bias.detach().clone()
    before, was = collect('before_step', bias, 5)
    after, now = collect('after_batch', bias)
    updates = watched(sparse_learner(), dst(method, 3, replace_step=replace, stop_pct=1.), cbs=[before, after])
    at_rest = [i+1 for i,(a,b) in enumerate(zip(was, now)) if torch.equal(a, b)]
    assert [u.n for u in updates] == [3, 6, 9] and at_rest == ([3, 6, 9] if replace else [])

def final_masks(method, **kwargs):
    set_seed(0)
    return masks(fit(sparse_learner(), 2, dst(method, **kwargs)).model)

@pytest.mark.parametrize('method', ['SET', 'SNFS', 'RigL', 'MEST'])
def test_the_same_seed_the_same_masks(method):
    a, b, c = [final_masks(method, seed=s) for s in (0, 0, 1)]
    assert all_same(a, b) and (method in ('SNFS', 'RigL')) == all_same(a, c)

# --- which weights are dropped and grown

def best(scores, among, n):
    "Mask of the `n` highest of `scores` where `among` is True, by a sort"
    at = np.flatnonzero(among.numpy())
    picked = torch.zeros(among.numel(), dtype=torch.bool)
    picked[at[np.argsort(-scores.flatten().numpy()[at], kind='stable')[:n]]] = True
    return picked.view(among.shape)

def share(t, a0, stop, start=0.): return .5*a0*(1+math.cos(math.pi*(t-start)/(stop-start)))

def n_left(live, share): return int(live.sum()) - math.floor(Fraction(str(share))*int(live.sum()) + Fraction(1, 2))

def check_rigl(updates, cb, total):
    "Each layer keeps its largest live weights, and grows those with the largest gradients among the others"
    regrown = 0
    for u in updates:
        for g,was,now in u:
            n = n_left(was.mask, share(u.n/total, cb.initial_drop_grow_pct, cb.stop_pct))
            kept = best(was.w.abs(), was.mask, n)
            grown = best(g.abs(), ~kept, int(was.mask.sum())-n)
            new = now.mask & ~kept
            assert not (kept & ~now.mask).any()
            assert torch.equal(g.abs()[new].sort()[0], g.abs()[grown].sort()[0])   # some are equal
            regrown += int((was.mask & grown).sum())
    assert regrown and any((now.mask != was.mask).any() for u in updates for _,was,now in u)

BESIDE = dict(nothing=lambda: None, clip=lambda: GradientClip(.01), accumulate=lambda: GradientAccumulation(16),
              amp=OnCPU, all=lambda: [GradientClip(.01), GradientAccumulation(16), OnCPU()])

@pytest.mark.parametrize('replace', [True, False])
@pytest.mark.parametrize('beside', BESIDE)
@pytest.mark.parametrize('opt', ['adam', 'lamb'])
def test_the_largest_gradients_grow(opt, beside, replace):
    cb = dst(every=3, replace_step=replace)
    updates = watched(sparse_learner(opt_func=OPTIMIZERS[opt]), cb, 4, BESIDE[beside]())
    assert len(updates) >= 4
    check_rigl(updates, cb, 24)

# convnet has dead units, whose gradients are all zero
@pytest.mark.parametrize('model', [m for m in MODELS if m != 'convnet'])
def test_the_largest_gradients_grow_in_layers_of_all_kinds(model):
    cb = dst(initial_drop_grow_pct=.6)
    check_rigl(watched(sparse_learner(MODELS[model]()), cb, 3), cb, 18)

@pytest.mark.parametrize('beside', ['nothing', 'clip'])
def test_a_score_that_is_the_gradient_itself(beside):
    cb = dst(grow_score_f=lambda p, grad, **kwargs: grad, stop_pct=1., replace_step=False)
    for u in watched(sparse_learner(), cb, cbs=BESIDE[beside]()):
        for g,was,now in u:
            n = n_left(was.mask, share(u.n/12, .3, 1.))
            kept = best(was.w.abs(), was.mask, n)
            assert torch.equal(now.mask, kept | best(g, ~kept, int(was.mask.sum())-n))

@pytest.mark.parametrize('beside', ['nothing', 'clip'])
@pytest.mark.parametrize('method,lam', [('SET', 0), ('MEST', .01), ('MEST', 1.)])
def test_the_weakest_go_where_chance_grows(method, lam, beside):
    "Clipping does not matter: scores use the gradient from before it"
    cb = dst(method, stop_pct=1., **(dict(keep_score_f=partial(magnitude_and_gradient, lam=1.)) if lam == 1 else {}))
    updates = watched(sparse_learner(), cb, cbs=BESIDE[beside]())
    for u in updates:
        for g,was,now in u:
            kept = best(was.w.abs() + lam*g.abs(), was.mask, n_left(was.mask, share(u.n/12, .3, 1.)))
            assert not (kept & ~now.mask).any() and now.mask.sum() == was.mask.sum()
    assert len(updates) == 5

@pytest.mark.parametrize('sparsity', [.4, .9])
def test_what_chance_grows_is_spread_over_all_free_places(sparsity):
    grown = torch.zeros(30, 72)
    for seed in range(12):
        learn = sparse_learner(nn.Sequential(nn.Flatten(), nn.Linear(72, 30), nn.Linear(30, 4)), sparsity, n=3)
        was = masks(learn.model)[0]
        grown += masks(fit(learn, 1, dst('SET', seed=seed, initial_drop_grow_pct=.6)).model)[0] & ~was
    counts = [float(part.mean()) for part in grown[~was].split(len(grown[~was])//4)[:4]]
    assert min(counts) > .7*max(counts) > 0 and grown.max() < 12

def shared(total, weights, caps):
    "Shares of `total` in proportion to `weights`, none above its cap"
    res, left, free = [0.]*len(caps), total, set(range(len(caps)))
    while True:
        part = {i: left*weights[i]/sum(weights[j] for j in free) for i in free}
        over = {i for i in free if part[i] > caps[i]}
        if not over: break
        for i in over: res[i], left = caps[i], left-caps[i]
        free -= over
    for i in free: res[i] = part[i]
    whole = [math.floor(r+1e-9) for r in res]
    for i in sorted(free, key=lambda i: whole[i]-res[i])[:total-sum(whole)]: whole[i] += 1
    return whole

@pytest.mark.parametrize('opt,beside', [('sgd', 'nothing'), ('adam', 'clip'), ('torch_sgd', 'accumulate')])
@pytest.mark.parametrize('sparsity', [.5, .8])
def test_snfs_shares_out_by_the_average_of_the_dense_gradient(sparsity, opt, beside):
    avgs, full, moved = {}, 0, 0
    def track(learn):
        for *_,p,_ in masked_params(learn.model): avgs[id(p)] = .9*avgs.get(id(p), 0) + .1*p.grad
        averages.append([avgs[id(p)].abs() for *_,p,_ in masked_params(learn.model)])
    averages = []
    cb, learn = dst('SNFS', 4), sparse_learner(mlp(1), sparsity, opt_func=OPTIMIZERS[opt])
    updates = watched(learn, cb, 4, [at('before_step', track, 10.3), *L(BESIDE[beside]())])
    steps_per_batch = .5 if beside == 'accumulate' else 1
    assert [u.n for u in updates] == [4, 8, 12, 16, 20]
    for u in updates:
        avg = averages[int(u.n*steps_per_batch)-1]
        left = [n_left(was.mask, share(u.n/24, .5, 1.)) for was in u.was]
        n_free = [was.mask.numel()-n for was,n in zip(u.was, left)]
        n_dropped = sum(int(was.mask.sum()) for was in u.was) - sum(left)
        n_grow = shared(n_dropped, [float(a[was.mask].mean()) for a,was in zip(avg, u.was)], n_free)
        for a,was,now,n,g in zip(avg, u.was, u.now, left, n_grow):
            kept = best(was.w.abs(), was.mask, n)
            assert torch.equal(now.mask, kept | best(a, ~kept, g))
            moved += now.mask.sum() != was.mask.sum()
        full += sum(g == f for g,f in zip(n_grow, n_free))
    assert moved and (full or sparsity == .8)

# --- when updates come

def due(every, total, start=0., stop=1., skipped=()):
    "Batches after which an update is due; the optimizer does not step in those of `skipped`"
    res, waiting = [], False
    for n in range(1, total+1):
        waiting = waiting or n % every == 0
        if n in skipped: continue
        if waiting and start <= n/total < stop: res.append(n)
        waiting = False
    return res

def batches(cb, n_iter=6): return [round(e*n_iter) for e in cb.log.epoch]

@pytest.mark.parametrize('method', ['SET', 'RigL'])
@pytest.mark.parametrize('f', [sched_cos, sched_lin, sched_no])
@pytest.mark.parametrize('start,stop', [(0., .75), (0., 1.), (.3, .8), (.5, 1.)])
def test_when_updates_come_and_how_much_they_drop(start, stop, f, method):
    cb = dst(method, 2, start_pct=start, stop_pct=stop, initial_drop_grow_pct=.4, drop_schedule=f)
    learn = fit(sparse_learner(), 3, cb)
    assert batches(cb) == due(2, 18, start, stop)
    cos = [share(n/18, .4, stop, start) for n in batches(cb)]
    lin = [.4*(1-(n/18-start)/(stop-start)) for n in batches(cb)]
    assert np.allclose(cb.log.drop_share, cos if f is sched_cos else lin if f is sched_lin else .4)
    n_dropped = [sum(n-n_left(torch.ones(n), s) for n in n_live(learn)) for s in cb.log.drop_share]
    assert all(d <= n for d,n in zip(cb.log.dropped, n_dropped)) and cb.log.dropped.sum() > sum(n_dropped)/4

@pytest.mark.parametrize('epochs,every', [(None, 6), (2, 12), (.5, 3), (1/3, 2), (.01, 1), (1.5, 9)])
def test_epochs_per_update(epochs, every):
    cb = dst('SET', None, epochs_per_update=epochs)
    fit(sparse_learner(), 5, cb)
    assert batches(cb) == due(every, 30)

@pytest.mark.parametrize('skipped', [{3}, {3, 4}, {1, 5, 6, 7, 12}, {1, 2, 3}, {2, 3, 4, 5, 6, 7}])
@pytest.mark.parametrize('method', ['SET', 'SNFS', 'RigL'])
def test_an_update_waits_while_gradients_overflow(method, skipped):
    def spoil(learn):
        if n_batches(learn) in skipped: learn.loss_grad *= math.inf
    cb, amp = dst(method, 3, stop_pct=1.), OnCPU()
    learn = sparse_learner(smooth())
    for u in watched(learn, cb, 3, [amp, at('before_backward', spoil)]): check_changes(u)
    assert {i+1 for i in amp.overflows} == skipped and batches(cb) == due(3, 18, skipped=skipped)

@pytest.mark.parametrize('method', PRESETS)
def test_an_update_waits_while_the_loss_is_not_a_number(method):
    "Without mixed precision, where another callback cancels the step"
    skipped = {1, 5, 6, 7, 12}
    def spoil(learn):
        if n_batches(learn) in skipped: learn.loss_grad = learn.loss_grad*math.nan
    def spare(learn):
        if not all(p.grad.isfinite().all() for p in learn.model.parameters()): raise CancelStepException
    cb, learn = dst(method, 3, stop_pct=1.), for_method(method, smooth())
    for u in watched(learn, cb, 3, [at('after_loss', spoil), at('before_step', spare, 70)]): check_changes(u)
    assert batches(cb) == due(3, 18, skipped=skipped) + [18]*(method == 'GraNet')
    assert follows_masks(learn.model)

@pytest.mark.parametrize('loss', [math.nan, math.inf])
@pytest.mark.parametrize('method', ['SET', 'SNFS', 'RigL', 'GraNet'])
def test_weights_that_are_not_numbers_any_more(method, loss):
    def spoil(learn):
        if learn.epoch == 1: learn.loss_grad = learn.loss_grad*loss
    cb, learn = dst(method, 3, stop_pct=1.), for_method(method, smooth())
    fit(learn, 3, [cb, at('after_loss', spoil)])
    assert batches(cb) == [3, 6] and not torch.cat([w.flatten() for w in weights(learn.model)]).isfinite().all()

@pytest.mark.parametrize('replace,order', [(True, 5), (False, 5), (False, 70)])
def test_an_update_waits_while_another_callback_cancels_the_step(replace, order):
    def skip(learn):
        if n_batches(learn) in (3, 4, 9): raise CancelStepException
    cb = dst(every=3, replace_step=replace, stop_pct=1.)
    for u in watched(sparse_learner(), cb, 3, at('before_step', skip, order)): check_changes(u)
    assert batches(cb) == [5, 6, 10, 12, 15]

@pytest.mark.parametrize('every', [2, 3, 4])
def test_updates_come_with_real_steps_only(every):
    cb = dst(every=every, stop_pct=1.)
    updates = watched(sparse_learner(), cb, 3, GradientAccumulation(24))
    assert batches(cb) == [u.n for u in updates] == due(every, 18, skipped={n for n in range(19) if n % 3})

# --- resuming, loading and copying

def at_epoch(n, f): return at('after_epoch', lambda learn: f(learn) if learn.epoch == n else None)

@pytest.mark.parametrize('opt,every', [('adam', 3), ('torch_sgd', 3), ('adam', 5)])
@pytest.mark.parametrize('method', ['SET', 'RigL', 'MEST', 'SNFS', 'GraNet'])
def test_a_fit_that_goes_on_from_a_checkpoint(method, opt, every):
    "With `every=3` an update comes right before the checkpoint"
    saved, make = [], lambda seed: for_method(method, smooth(), opt_func=OPTIMIZERS[opt], seed=seed)
    def save(learn): learn.save('half', with_opt=True); saved.extend(masks(learn.model))
    cb, watch = dst(method, every), Everywhere(n_live)
    whole = fit(make(0), 4, [cb, at_epoch(1, save)])
    learn = make(1).load('half', with_opt=True)
    assert all_same(saved, masks(learn.model)) and follows_masks(learn.model)
    again = dst(method, every)
    fit(learn, 4, [again, watch], start_epoch=2)
    rest = cb.log[cb.log.epoch > 2]
    assert again.log.epoch.tolist() == rest.epoch.tolist() and again.log.drop_share.tolist() == rest.drop_share.tolist()
    if method in ('SET', 'RigL', 'MEST'): assert all_same(masks(learn.model), masks(whole.model))
    if method == 'SNFS': assert {sum(n) for n in watch.seen} == {sum(n_live(whole))}
    else: assert n_live(learn) == n_live(whole) or method == 'GraNet' and sum(n_live(learn)) == sum(n_live(whole))
    assert again.log.live.tolist() == rest.live.tolist()

def test_a_checkpoint_fits_a_dense_model_and_one_that_is_sparse_in_other_places():
    learn = sparse_learner()
    fit(learn, 1, [dst(every=3), at_epoch(0, lambda learn: learn.save('m'))])
    dense, other = learner(model=smooth()).load('m'), sparse_learner(sparsity=.4, seed=5)
    assert list(dense.model.state_dict()) == list(learn.model.state_dict())
    with pytest.warns(UserWarning, match='masks follow'): other.load('m')
    assert same(snapshot(dense.model), snapshot(learn.model)) and all_same(masks(other.model), masks(learn.model))
    for _,mask,s in sparse_params(other.model): assert s == pytest.approx(1-int(mask.sum())/mask.numel())

HOW = dict(deepcopy=deepcopy, pickle=lambda o: pickle.loads(pickle.dumps(o)))

@pytest.mark.parametrize('how', HOW)
@pytest.mark.parametrize('method', ['SNFS', 'RigL'])
def test_a_copy_of_the_learner_taken_while_it_trains(method, how):
    cb, copies = dst(method), []
    take = at_batch(5, lambda learn: copies.append(copied_by(take, HOW[how])))
    learn = fit(sparse_learner(), 2, [cb, take])
    (other,), was, log, counts = copies, masks(learn.model), cb.log, Everywhere(n_live)
    fit(other, 3, counts)
    assert batches(other.dynamic_sparse_training) == due(2, 18, stop=cb.stop_pct) and zeros_hold(other)
    assert {sum(n) for n in counts.seen} == {sum(n_live(learn))}
    assert all_same(was, masks(learn.model)) and cb.log.equals(log)

# --- interrupted fits, and callbacks that are used again

def helpers(learn): return [cb for cb in learn.cbs if type(cb).__module__ == 'fasterai_sparse.dynamic.callback']

@pytest.mark.parametrize('exc,method', [(RuntimeError('stop'), 'RigL'), (KeyboardInterrupt(), 'SNFS'),
                                        (CancelFitException(), 'RigL')], ids=['error', 'interrupt', 'cancel'])
@pytest.mark.parametrize('event', ['before_batch', 'after_pred', 'after_backward', 'before_step', 'after_step',
                                   'after_batch', 'before_validate'])
def test_a_fit_that_breaks_off_and_others(event, exc, method):
    def stop(learn):
        if learn.epoch == 1 and (learn.iter == 3 or event == 'before_validate'): raise exc
    learn, cb = sparse_learner(dls=exportable()), dst(method)
    n = sum(n_live(learn))
    try: fit(learn, 3, [cb, at(event, stop, 70, always=True)])
    except (RuntimeError, KeyboardInterrupt) as e: assert type(e) is type(exc)
    was, n_rows = masks(learn.model), len(cb.log)
    fit(learn, 2)
    assert all_same(was, masks(learn.model)) and follows_masks(learn.model) and len(cb.log) == n_rows >= 3
    learn.export('learner.pkl')
    watch = Everywhere(n_live)
    fit(learn, 2, [cb, watch])
    assert batches(cb) == due(2, 12, stop=cb.stop_pct) and {sum(c) for c in watch.seen} == {n} and not helpers(learn)
    fit(sparse_learner(), 2, cb)
    assert batches(cb) == due(2, 12, stop=cb.stop_pct)

@pytest.mark.parametrize('exc', [CancelBatchException, CancelEpochException])
@pytest.mark.parametrize('event', ['before_batch', 'after_loss', 'before_step', 'after_step'])
def test_batches_and_epochs_that_are_cut_short(event, exc):
    def stop(learn):
        if learn.iter == 3: raise exc
    learn, counts = sparse_learner(), Everywhere(lambda learn: (n_live(learn), zeros_hold(learn)))
    updates = watched(learn, cb := dst(), 3, [at(event, stop, 0 if event == 'after_step' else 70), counts])
    assert len(cb.log) >= 3 and len({tuple(n) for n,_ in counts.seen}) == 1 and zeros_hold(learn)
    for u in updates: check_changes(u)

def test_the_same_object_in_two_fits_and_two_learners():
    cb, learn = dst(), sparse_learner()
    fit(learn, 2, cb)
    log, was = cb.log, masks(learn.model)
    fit(learn, 2, cb)
    assert cb.log.epoch.equals(log.epoch) and cb.log.drop_share.equals(log.drop_share)
    assert not all_same(was, masks(learn.model))
    assert cb.log.overlap.iloc[0] > log.overlap.iloc[-1] and not helpers(learn)
    other = sparse_learner(mlp(), .5)
    n = n_live(other)
    fit(other, 3, cb)
    assert batches(cb) == due(2, 18, stop=.75) and n_live(other) == n and follows_masks(learn.model)

def test_two_callbacks_on_different_layers():
    learn = sparse_learner()
    convs = [m for m in learn.model if isinstance(m, nn.Conv2d)]
    one, two = dst(sparse_modules=convs[:1]), dst('SET', 3, sparse_modules=convs[1:])
    n, was = n_live(learn), masks(learn.model)
    fit(learn, 2, [one, two])
    now = masks(learn.model)
    assert n_live(learn) == n and [torch.equal(a, b) for a,b in zip(was, now)] == [False, False, True]
    assert len(one.log) >= 3 and len(two.log) >= 2 and zeros_hold(learn)

# --- freezing, and layers that learn nothing

@pytest.mark.parametrize('method', PRESETS)
def test_fine_tune(method):
    "Masks of the head change in the first fit, those of the body in the second"
    learn, cb, body = for_method(method, smooth(), splitter=split), dst(method), []
    n = n_live(learn)
    look = at('before_fit', lambda learn: body.append(masks(learn.model)), 70)
    fit(learn, 2, [cb, look], 'fine_tune', freeze_epochs=2, base_lr=1e-2)
    first, second, now = *body, masks(learn.model)
    assert all_same(first[:2], second[:2]) and not torch.equal(first[2], second[2])
    assert not any(torch.equal(a, b) for a,b in zip(second[:2], now[:2])) and follows_masks(learn.model)
    assert method in ('SNFS', 'GraNet') or n_live(learn) == n

@pytest.mark.parametrize('method', PRESETS)
def test_where_all_is_frozen_it_warns_and_waits(method):
    learn, cb = for_method(method, smooth()), dst(method)
    for m in sparseable_modules(learn.model): m.weight.requires_grad_(False)
    was, before = masks(learn.model), [w.clone() for w in weights(learn.model)]
    with pytest.warns(UserWarning, match='frozen'): fit(learn, 2, cb)
    assert all_same(was, masks(learn.model)) and all_same(before, weights(learn.model)) and len(cb.log) == 0
    for m in sparseable_modules(learn.model): m.weight.requires_grad_(True)
    learn.opt = None   # fastai's has only the parameters that were trainable when it was made
    fit(learn, 2, cb)
    assert batches(cb)[:2] == [2, 4] and not any(torch.equal(a, b) for a,b in zip(was, masks(learn.model)))

def test_where_all_is_frozen_after_a_fit_that_broke_off():
    cb = dst()
    learn = sparse_learner(cbs=cb)
    with pytest.raises(KeyboardInterrupt): fit(learn, 1, at_batch(3, raising(KeyboardInterrupt())))
    for m in sparseable_modules(learn.model): m.weight.requires_grad_(False)
    was = masks(learn.model)
    with pytest.warns(UserWarning, match='frozen'): fit(learn, 2)
    assert all_same(was, masks(learn.model)) and len(cb.log) == 0

def test_a_layer_that_is_frozen_while_others_change():
    learn, cb = sparse_learner(), dst()
    learn.model[3].weight.requires_grad_(False)
    was = masks(learn.model)
    fit(learn, 2, cb)
    assert [torch.equal(a, b) for a,b in zip(was, masks(learn.model))] == [False, True, False]
    assert list(cb.layer_sparsities) == ['0', '8'] and cb.log.live.nunique() == 1

class Unused(nn.Module):
    "A network with a head that is never called"
    def __init__(self): super().__init__(); self.net, self.head = smooth(), nn.Linear(8, 8)
    def forward(self, x): return self.net(x)

@pytest.mark.parametrize('method', PRESETS)
def test_a_layer_that_no_gradient_reaches_is_left_alone(method):
    learn = for_method(method, Unused())
    w, mask = learn.model.head.weight.detach().clone(), kept(learn.model.head)
    was = masks(learn.model.net)
    fit(learn, 2, dst(method))
    assert torch.equal(w, learn.model.head.weight) and torch.equal(mask, kept(learn.model.head))
    assert not any(torch.equal(a, b) for a,b in zip(was, masks(learn.model.net)))

def some_inputs(n):
    "Batches of images in which only the first 12 of 72 inputs are not zero"
    x = torch.randn(n, 8, 72)
    x[:,:,12:] = 0
    return list(zip(x.view(n, 8, 2, 6, 6), torch.randint(4, (n, 8))))

@pytest.mark.parametrize('method', ['RigL', 'SNFS'])
def test_chance_decides_where_gradients_are_all_zero(method):
    last = []
    for seed in (0, 1):
        set_seed(0)
        learn = sparse_learner(mlp(), dls=loaders(6, some_inputs))
        updates = watched(learn, dst(method, initial_drop_grow_pct=.9, redistribute=None, seed=seed, stop_pct=1.))
        was, now = updates[0].was[0], updates[0].now[0]
        grown, n = now.mask & ~was.mask, int(was.mask.sum())
        assert all(int(l.mask.sum()) == n for u in updates for l in u.now[:1])
        tied = grown[:,12:].clone()
        lowest = best(torch.zeros_like(tied, dtype=torch.float), ~was.mask[:,12:], int(tied.sum()))
        assert now.mask[:,:12].all() and tied.sum() > 50 and (tied & lowest).sum() < .7*tied.sum()
        rows = tied.sum(1)
        assert rows[:len(rows)//2].sum() < 1.5*rows[len(rows)//2:].sum() < 2.5*rows[:len(rows)//2].sum()
        last.append(now.mask)
    assert not torch.equal(*last)

@pytest.mark.parametrize('n_iter,n_epoch', [(0, 2), (1, 4), (6, 0), (1, 1)])
@pytest.mark.parametrize('method', PRESETS)
def test_short_fits(method, n_iter, n_epoch):
    learn, cb = for_method(method, smooth(), n=n_iter), dst(method, None, stop_pct=1.)
    n = n_live(learn)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        fit(learn, n_epoch, cb)
    due_at = list(range(1, n_iter*n_epoch)) if n_iter == 1 else []
    assert batches(cb, n_iter or 1) == due_at + [n_epoch]*(method == 'GraNet' and n_iter == 1)
    assert sum(n_live(learn)) == sum(n) or method == 'GraNet' and n_iter == 1

def test_a_fit_in_which_no_update_can_come_says_so():
    for kwargs in (dict(every=100), dict(every=None, stop_pct=.5), dict(every=3, start_pct=.3, stop_pct=.4)):
        cb, learn = dst('SET', **kwargs), sparse_learner()
        was = masks(learn.model)
        with pytest.warns(UserWarning, match='masks will not change'): fit(learn, 2, cb)
        assert len(cb.log) == 0 and all_same(was, masks(learn.model))
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        fit(sparse_learner(), 2, dst('SET', 5, stop_pct=.5))

# --- layers of all kinds, and masks of the user's own

class Own(nn.Module):
    "A linear layer whose weight is called `kernel`, with a mask registered by its author"
    def __init__(self, i, o, dtype=torch.bool, share=.5):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(o, i)/i**.5)
        self.register_buffer('kernel_mask', sparse_mask_like(self.kernel, share, seed=0).to(dtype))
        self.register_buffer('kernel_sparsity', torch.tensor(share))
        apply_masks(self)
    def forward(self, x): return x @ self.kernel.t()

def around(layer, n, *before):
    "A classifier around `layer`, which has `n` outputs per image"
    return nn.Sequential(*before, layer, nn.Flatten(), nn.Tanh(), nn.Linear(n, 4))

def own(*args): return around(Own(72, 20, *args), 20, nn.Flatten())

KINDS = dict(conv1d=lambda: around(nn.Conv1d(2, 8, 5), 256, nn.Flatten(2)),
             conv3d=lambda: around(nn.Conv3d(1, 6, (1,3,3)), 192, nn.Unflatten(1, (1,2))),
             transpose1d=lambda: around(nn.ConvTranspose1d(2, 6, 5), 240, nn.Flatten(2)),
             transpose2d=lambda: around(nn.ConvTranspose2d(2, 8, 3), 512),
             grouped=lambda: around(nn.Conv2d(2, 8, 3, groups=2), 128),
             grouped_transpose=lambda: around(nn.ConvTranspose2d(2, 8, 3, groups=2), 512),
             own=own, own_float=partial(own, torch.float), own_uint8=partial(own, torch.uint8))

@pytest.mark.parametrize('kind', KINDS)
def test_layers_of_all_kinds(kind):
    net = KINDS[kind]()
    if 'own' not in kind: sparsify_model(net, .6, seed=0)
    learn, cb = learner(model=net), dst(initial_drop_grow_pct=.5)
    n, holds = n_live(learn), Everywhere(zeros_hold)
    updates = watched(learn, cb, 3, holds)
    check_rigl(updates, cb, 18)
    for u in updates: check_changes(u)
    assert all(holds.seen) and n_live(learn) == n

@pytest.mark.parametrize('dtype', [torch.bool, torch.float, torch.uint8])
def test_a_mask_of_the_users_own(dtype):
    learn = learner(model=own(dtype))
    layer, cb = learn.model[1], dst()
    was = layer.kernel_mask.clone()
    fit(learn, 2, cb)
    assert list(cb.layer_sparsities) == ['1.kernel'] and layer.kernel_mask.dtype == dtype
    assert layer.kernel_sparsity == .5
    assert not torch.equal(was, layer.kernel_mask) and was.sum() == layer.kernel_mask.sum() == 720
    assert torch.equal(layer.kernel != 0, layer.kernel_mask.bool())
    learn.save('own')
    other = learner(model=own(dtype, .2))
    with pytest.warns(UserWarning, match='masks follow'): fit(other, 1, dst()), other.load('own')
    assert same(snapshot(learn.model), snapshot(other.model))
    assert fit(other, 1, dst()).model[1].kernel_mask.sum() == 720 and zeros_hold(other)

def test_zeros_that_the_users_own_mask_keeps():
    learn = learner(model=own())
    learn.model[1].kernel.data[:5] = 0.
    watch, seen = collect('before_batch',
                          lambda learn: torch.equal(learn.model[1].kernel != 0, learn.model[1].kernel_mask))
    fit(learn, 1, [dst(), watch])
    assert len(seen) == 6 and all(seen)

@pytest.mark.parametrize('dtype', [torch.bool, torch.float, torch.uint8])
def test_a_mask_of_the_users_own_that_is_open_at_first(dtype):
    learn = learner(model=own(dtype, 0.))
    fit(learn, 2, dst('GraNet', sparsity=80, sparse_modules=[learn.model[1]]))
    layer = learn.model[1]
    assert layer.kernel.count_nonzero() == layer.kernel_mask.sum() == 288 and layer.kernel_sparsity == pytest.approx(.8)
    assert torch.equal(layer.kernel != 0, layer.kernel_mask.bool())

@pytest.mark.parametrize('method', PRESETS)
def test_a_model_in_channels_last(method):
    learn = for_method(method, convnet().to(memory_format=torch.channels_last))
    n, (watch, seen) = n_live(learn), collect('after_step', zeros_hold)
    updates = watched(learn, dst(method), cbs=watch)
    for u in updates: check_changes(u)
    assert learn.model[3].weight.is_contiguous(memory_format=torch.channels_last) and all(seen) and len(updates) >= 4
    assert method in ('SNFS', 'GraNet') or n_live(learn) == n

def test_channels_last_makes_no_difference():
    ends = []
    for form in (torch.contiguous_format, torch.channels_last):
        set_seed(0)
        learn = sparse_learner(smooth().to(memory_format=form))
        ends.append(watched(learn, dst(stop_pct=1.), 1)[0])
    for (_,was0,now0),(_,was1,now1) in zip(*ends): assert all_same([was0.mask, now0.mask], [was1.mask, now1.mask])

def doubles(n): return [(x.double(), y) for x,y in images(n)]

@pytest.mark.parametrize('method', ['SET', 'SNFS', 'RigL'])
def test_a_model_of_doubles(method):
    learn, cb = sparse_learner(smooth().double(), dls=loaders(6, doubles)), dst(method)
    n = sum(n_live(learn))
    for u in watched(learn, cb): check_changes(u)
    assert sum(n_live(learn)) == n and len(cb.log) >= 4 and follows_masks(learn.model)

@pytest.mark.parametrize('choose', [lambda m: [m[0], m[8]], lambda m: (l for l in (m[0], m[8])),
                                    lambda m: sparseable_modules(m)[0,2]], ids=['list', 'generator', 'found'])
@pytest.mark.parametrize('method', ['SET', 'RigL', 'GraNet'])
def test_only_some_layers(method, choose):
    learn = for_method(method, smooth())
    n, was, cb = n_live(learn), masks(learn.model), dst(method, sparse_modules=choose(learn.model))
    fit(learn, 2, cb)
    assert [torch.equal(a, b) for a,b in zip(was, masks(learn.model))] == [False, True, False]
    assert (n_live(learn) == n) == (method != 'GraNet') and zeros_hold(learn)
    assert list(cb.layer_sparsities) == ['0', '8']
    fit(learn, 1, cb := dst(method, sparse_modules=learn.model[3]))
    assert list(cb.layer_sparsities) == ['3']

@pytest.mark.parametrize('choose', [lambda m: [m[0]], lambda m: [m[0][0], m[0][3]], lambda m: sparseable_modules(m[0])])
def test_a_part_of_a_dense_model_becomes_sparse(choose):
    learn = learner(model=nn.Sequential(smooth()[:6], smooth()[6:]))
    fit(learn, 2, dst('GraNet', sparse_modules=choose(learn.model)))
    ws = [learn.model[0][i].weight for i in (0, 3)]
    n = sum(w.numel() for w in ws)
    assert sum(int(w.count_nonzero()) for w in ws) == n-n_zeros(.9, n) and len(masks(learn.model)) == 2

def test_a_recurrent_layer_with_dropped_weights():
    cb = dst(initial_drop_grow_pct=.5)
    updates = watched(sparse_learner(Rows(WeightDropout(nn.LSTM(8, 8, batch_first=True), .3))), cb, 3)
    check_rigl(updates, cb, 18)
    for u in updates: check_changes(u)
    assert list(cb.layer_sparsities) == ['inp', 'mid.weight_hh_l0_raw', 'mid.module.weight_ih_l0', 'out']

@pytest.mark.parametrize('model,names', [('lstm', ['mid.weight_ih_l0', 'mid.weight_hh_l0']),
                                         ('attention', ['mid.in_proj_weight', 'mid.out_proj'])])
def test_all_weights_of_a_layer_change(model, names):
    learn, cb = sparse_learner(MODELS[model]()), dst('SET')
    was = masks(learn.model)
    fit(learn, 2, cb)
    assert list(cb.layer_sparsities) == ['inp', *names, 'out']
    assert not any(torch.equal(a, b) for a,b in zip(was, masks(learn.model)))

WRAPPED = dict(parallel=nn.DataParallel, compiled=partial(torch.compile, backend='eager'))

@pytest.mark.parametrize('wrap', WRAPPED)
def test_a_model_that_is_wrapped(wrap):
    ends = []
    for f in (lambda m: m, WRAPPED[wrap]):
        set_seed(0)
        learn, cb = sparse_learner(), dst()
        inner, learn.model = learn.model, f(learn.model)
        fit(learn, 2, cb)
        ends.append(masks(inner))
    assert all_same(*ends) and list(cb.layer_sparsities) == ['0', '3', '8']
    assert cb.log.grown.all() and follows_masks(learn.model)

@pytest.mark.parametrize('method', ['SET', 'RigL', 'SNFS'])
def test_groups_that_stand_or_fall_together(method):
    g = block(4, 1)
    learn = learner(model=nn.Sequential(nn.Flatten(), nn.Linear(72, 16), nn.Tanh(), nn.Linear(16, 4)))
    Sparsifier(learn.model, g, 'local', random_score, layer_type=nn.Linear).sparsify_model({'1': 50, '3': 75})
    n, was = n_live(learn), masks(learn.model)
    blocks = lambda learn: [m.view(len(m)//4, 4, -1) for m in masks(learn.model)]
    watch, seen = collect('after_batch', lambda learn: all(torch.equal(b.all(1), b.any(1)) for b in blocks(learn)))
    fit(learn, 2, [dst(method, granularity=g), watch])
    assert all(seen) and sum(n_live(learn)) == sum(n) and follows_masks(learn.model)
    assert not all_same(was, masks(learn.model))

@pytest.mark.parametrize('context', ['local', 'global', erdos_renyi_sparsity])
def test_how_granet_shares_its_sparsity(context):
    learn = learner(model=smooth())
    fit(learn, 2, dst('GraNet', sparsity=80, context=context))
    ws = [w for *_,w in sparse_weights(learn.model)]
    n, shares = [w.numel() for w in ws], [1-int(w.count_nonzero())/w.numel() for w in ws]
    assert sum(int((w==0).sum()) for w in ws) == n_zeros(.8, sum(n)) and follows_masks(learn.model)
    if context == 'global': assert max(shares)-min(shares) > .05
    else: assert np.allclose(shares, [.8]*3 if context == 'local' else context(ws, .8), atol=1/min(n))

@pytest.mark.parametrize('start', [0., .9])
@pytest.mark.parametrize('sparsity', [0, 50, 100])
@pytest.mark.parametrize('context', ['global', 'local'])
def test_granet_up_and_down(context, sparsity, start):
    learn, cb = sparse_learner(sparsity=start), dst('GraNet', sparsity=sparsity, context=context)
    for u in watched(learn, cb): check_changes(u)
    n, falls = sum(w.numel() for *_,w in sparse_weights(learn.model)), sparsity < 100*start
    live = cb.log.live.tolist()
    assert live[-1] == n_live_weights(learn.model) == n-n_zeros(sparsity/100, n) and follows_masks(learn.model)
    assert live == sorted(live, reverse=not falls) and (len(set(live)) > 3 or sparsity == 100*start)

@pytest.mark.parametrize('sparsity', [.5, .99, 1.])
@pytest.mark.parametrize('pct', [0., 1.])
@pytest.mark.parametrize('method', ['SNFS', 'RigL', 'MEST'])
def test_extremes(method, pct, sparsity):
    learn = sparse_learner(sparsity=sparsity)
    n, first = sum(n_live(learn)), masks(learn.model)
    updates = watched(learn, cb := dst(method, initial_drop_grow_pct=pct, drop_schedule=sched_no))
    for u in updates:
        check_changes(u)
        if method == 'MEST': continue
        for _,was,now in u: assert not was.mask.any() or now.mask.flatten()[was.w.abs().argmax()]   # one stays
    assert len(updates) >= 4 and sum(n_live(learn)) == n and cb.log.live.eq(n).all()
    assert (pct == 0 or n == 0) == all_same(first, masks(learn.model))

# --- errors

WRONG = dict(batches_per_update=[0, 2.5, -3, '7', True], epochs_per_update=[0, -1.5, '2', math.nan, math.inf],
             initial_drop_grow_pct=[30, -.25, '.3', math.nan], stop_pct=[75, -.5, '.75', 0], start_pct=[.9, -.1, '.2'],
             keep_score_f=['magnitude'], grow_score_f=['gradient', 3], drop_schedule=['cos', .3, sched_exp],
             redistribute=['momentum', .5], sparsity=[120, -7, '90', True], context=['local'])

@pytest.mark.parametrize('name,value', [(n, v) for n,vs in WRONG.items() for v in vs])
def test_a_wrong_value_is_named(name, value):
    with pytest.raises((ValueError, TypeError)) as e: DynamicSparseTrainingCallback(**{name: value})
    assert str(value) in str(e.value)

@pytest.mark.parametrize('name,value', [('context', 'globally'), ('sparsity_schedule', 'agp')])
def test_a_wrong_value_beside_a_sparsity_is_named(name, value):
    with pytest.raises(ValueError, match=value): DynamicSparseTrainingCallback(sparsity=90, **{name: value})

def test_two_intervals_are_refused():
    with pytest.raises(ValueError, match='2.*3|3.*2'): dst(every=2, epochs_per_update=3)

MISFITS = dict(granularity=(dict(granularity='paths'), 'paths'), pattern=(dict(granularity=NM(2,4)), 'N:M'),
               grow_init=(dict(grow_score_f=movement), 'init'), grow_data=(dict(grow_score_f=wanda), 'data'),
               keep_data=(dict(keep_score_f=wanda), 'data'), other=(dict(sparse_modules=[nn.Linear(2, 2)]), 'Linear'),
               name=(dict(sparse_modules=['0']), 'str'), none=(dict(sparse_modules=[]), 'mask|sparse_modules'))

@pytest.mark.parametrize('masked', [True, False])
@pytest.mark.parametrize('sparsity', [None, 90])
@pytest.mark.parametrize('misfit', MISFITS)
def test_what_does_not_fit_the_model_is_refused_before_anything_changes(misfit, sparsity, masked):
    (kwargs, named), learn = MISFITS[misfit], learner(model=smooth())
    if masked: sparsify_model(learn, .5, seed=0, enforce_mask=False)
    else: learn.model[0].weight.data.view(-1)[0] = 0.
    before, was, n_cbs = snapshot(learn.model), masks(learn.model), len(learn.cbs)
    with pytest.raises((ValueError, TypeError), match=named if masked or sparsity else '.'):
        fit(learn, 1, DynamicSparseTrainingCallback(sparsity=sparsity, **kwargs))
    assert same(before, snapshot(learn.model)) and all_same(was, masks(learn.model)) and len(learn.cbs) == n_cbs

def test_without_masks_it_says_what_to_do():
    learn = learner(model=smooth())
    with pytest.raises(ValueError, match='sparsify_model'): fit(learn, 1, dst())
    sparsify_model(learn, .5)
    remove_masks(learn.model[3])
    with pytest.raises(ValueError, match='Conv2d of sparse_modules has no mask'):
        fit(learn, 1, dst(sparse_modules=[learn.model[0], learn.model[3]]))

def test_momentum_that_is_not_there():
    learn, cb = sparse_learner(opt_func=partial(OptimWrapper, opt=torch.optim.SGD)), dst('SNFS')
    fit(learn, 2, cb)   # the callback keeps an average of its own
    assert len(cb.log) == 5 and cb.log.grown.gt(0).all()

# --- schedules of other shapes

@pytest.mark.parametrize('f', [lambda start, end, pos: start + (end-start)*pos**2, lambda pos: pos**2],
                         ids=['of_three', 'of_one'])
def test_schedules_of_the_users_own(f):
    learn, both = learner(model=smooth()), dict(drop_schedule=f, sparsity_schedule=f)
    cb = dst('GraNet', sparsity=80, stop_pct=1., initial_drop_grow_pct=.4, **both)
    fit(learn, 2, cb)
    n = sum(mask.numel() for mask in masks(learn.model))
    pos = [(i/12)**2 for i in range(2, 13, 2)]
    assert np.allclose(cb.log.drop_share, [.4*(1-p) for p in pos[:-1]] + [0])
    assert cb.log.live.tolist() == [n-n_zeros(.8*p, n) for p in pos]

# --- the table and the log

def dead_outputs(m, mask):
    out = 1 if isinstance(m, nn.ConvTranspose2d) else 0
    return int((~mask.movedim(out, 0).flatten(1).any(1)).sum())

@pytest.mark.parametrize('method', PRESETS)
@pytest.mark.parametrize('model', ['conv', 'transposed'])
def test_the_log(model, method):
    learn = for_method(method, smooth() if model == 'conv' else KINDS['transpose2d']())
    layers = {n: m for n,m in learn.model.named_modules() if get_mask(m) is not None}
    cb, first = dst(method, initial_drop_grow_pct=.9), torch.cat([m.flatten() for m in masks(learn.model)])
    updates, ever, rows = watched(learn, cb, 3), first.clone(), []
    for u in updates:
        was, now = [torch.cat([l.mask.flatten() for l in ls]) for ls in (u.was, u.now)]
        ever |= now
        grown = (now & ~was).sum()
        rows.append(dict(epoch=u.n/6, dropped=(was & ~now).sum(), grown=grown, changed=grown/now.sum(), live=now.sum(),
                         explored=ever.float().mean(), overlap=(now & first).sum()/first.sum(),
                         dead=sum(dead_outputs(m, l.mask) for m,l in zip(layers.values(), u.now))))
    log = cb.log
    assert list(log) == ['epoch', 'drop_share', *list(rows[0])[1:]] and len(log) >= 4
    assert log.explored.is_monotonic_increasing
    for k in rows[0]: assert np.allclose(log[k], [float(r[k]) for r in rows], rtol=1e-6)
    sparsities = pd.DataFrame([[100*(1-l.mask.float().mean().item()) for l in u.now] for u in updates])
    assert list(cb.layer_sparsities) == list(layers) and np.allclose(cb.layer_sparsities.index, [0., *log.epoch])
    assert np.allclose(cb.layer_sparsities.iloc[1:], sparsities, atol=1e-4)

def test_an_empty_log():
    cb = dst()
    columns = ['epoch', 'drop_share', 'dropped', 'grown', 'changed', 'live', 'explored', 'overlap', 'dead']
    assert list(cb.log) == columns and len(cb.log) == 0
    fit(sparse_learner(), 2, cb := dst(every=5, stop_pct=.5))
    assert len(cb.log) == 1
    fit(sparse_learner(), 0, cb)
    assert list(cb.log) == columns and len(cb.log) == 0 and len(cb.layer_sparsities) == 1 and len(cb.plot()) == 2

def test_the_plot():
    cb = dst('SNFS')
    fit(sparse_learner(), 2, cb)
    layers, both = cb.plot()
    assert len(layers.lines) == 3 and [len(l.get_xdata()) for l in layers.lines] == [6]*3
    for line,(_,ys) in zip(layers.lines, cb.layer_sparsities.items()): assert line.get_ydata().tolist() == ys.tolist()
    overlap, explored = [l.get_ydata() for l in both.lines]
    assert np.allclose(overlap, [100, *100*cb.log.overlap]) and np.allclose(explored[-5:], 100*cb.log.explored)

@pytest.mark.parametrize('method', ['SNFS', 'GraNet'])
def test_sparsity_buffers_follow(method):
    learn, measured = for_method(method, smooth()), lambda p: pytest.approx(1-int(p.count_nonzero())/p.numel())
    watch, seen = collect('after_batch', lambda learn: all(s == measured(p) for p,_,s in sparse_params(learn.model)))
    start = [s for *_,s in sparse_params(learn.model)]
    fit(learn, 2, [dst(method), watch])
    assert all(seen) and start != [s for *_,s in sparse_params(learn.model)]

# --- sparse from the start

ALLOCATIONS = dict(uniform=uniform_sparsity, first=first_layer_dense_uniform, ERK=erdos_renyi_sparsity,
                   ER=partial(erdos_renyi_sparsity, include_kernel=False), ranked=global_sparsity)

@pytest.mark.parametrize('model', [*MODELS, *(k for k in KINDS if 'own' not in k)])
@pytest.mark.parametrize('f', ALLOCATIONS)
def test_the_whole_is_exact(f, model):
    for sparsity in (.3, .8, .9):
        net = {**MODELS, **KINDS}[model]()
        keys, n = list(net.state_dict()), sum(w.numel() for _,_,w in sparse_weights(net))
        first = 0 if f != 'first' else next(w.numel() for *_,w in sparse_weights(net))
        sparsify_model(net, sparsity, ALLOCATIONS[f])
        zero = sum(int((w==0).sum()) for _,_,w in sparse_weights(net))
        assert zero == n_zeros(sparsity, n-first) and list(net.state_dict()) == keys and follows_masks(net)
        for p,mask,s in sparse_params(net): assert s == pytest.approx(1-int(mask.sum())/mask.numel()) and not mask.all()

@pytest.mark.parametrize('s,n', [(.29, 15), (.57, 29), (.5, 25), (0, 0), (1, 50)])
def test_shares_are_what_they_are_written_as(s, n):
    net = nn.Linear(10, 5)
    sparsify_model(net, s)
    assert int((net.weight == 0).sum()) == n == int((~sparse_mask((10, 5), s)).sum())

def sparse_weights(net):
    "(module, name, weight) of all weights that `sparsify_model` should find"
    return [(m, n, p) for m in net.modules() for n,p in m._parameters.items() if p is not None and p.dim() > 1]

@pytest.mark.parametrize('model', MODELS)
def test_hooks_hold_in_a_plain_loop(model):
    net, (x, y) = MODELS[model](), images(1)[0]
    hooks = sparsify_model(net, .75, seed=0)
    opt, live = torch.optim.Adam(net.parameters(), 1e-2), n_live_weights(net)
    for _ in range(4):
        opt.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        assert n_live_weights(net) == live
        opt.step()
    assert n_live_weights(net) > live   # until the next call
    net(x)
    assert n_live_weights(net) == live and follows_masks(net)
    hooks.remove()
    opt.step(), net(x)
    assert n_live_weights(net) > live

def n_live_weights(net): return sum(int(p.count_nonzero()) for *_,p,_ in masked_params(net))

@pytest.mark.parametrize('f', [uniform_sparsity, global_sparsity, erdos_renyi_sparsity])
def test_the_largest_are_kept(f):
    net = smooth()
    old = [w.detach().abs().clone() for *_,w in sparse_weights(net)]
    sparsify_model(net, .8, f, scores=large_final)
    live = [w != 0 for *_,w in sparse_weights(net)]
    assert all_same(live, [best(w, torch.ones_like(l), int(l.sum())) for w,l in zip(old, live)])
    if f is not global_sparsity: return
    assert max(w[~l].max() for w,l in zip(old, live)) < min(w[l].min() for w,l in zip(old, live))

def holds(net, x):
    "Does the model enforce its masks when it is called?"
    for *_,p,_ in masked_params(net): p.data.fill_(1)
    net(x)
    return follows_masks(net)

def test_what_is_saved_is_plain_and_hooks_are_back_after():
    net, x = smooth(), images(1)[0][0]
    sparsify_model(net, .75, seed=0)
    was = masks(net)
    with masks_off(net) as plain:
        assert sparse_params(plain) == [] and b'fasterai_sparse' not in pickle.dumps(plain)
        plain(x)
    assert all_same(was, masks(net)) and holds(net, x)
    Sparsifier(net, 'weight', 'local', large_final, layer_type=None).save_model('m.pth')
    assert all_same(was, masks(net)) and holds(net, x)
    assert b'fasterai_sparse' not in open('m.pth', 'rb').read()
    assert sparse_params(torch.load('m.pth', weights_only=False)) == []

def test_removing_masks_takes_hooks_and_buffers():
    net, x = smooth(), images(1)[0][0]
    sparsify_model(net, .75)
    n = n_live_weights(net)
    assert remove_masks(net) is net and sparse_params(net) == []
    assert sum(int(w.count_nonzero()) for *_,w in sparse_weights(net)) == n
    for *_,w in sparse_weights(net): w.data.fill_(1)
    net(x)
    assert all(w.all() for *_,w in sparse_weights(net)) and b'fasterai_sparse' not in pickle.dumps(net)
    assert not any(n.endswith(('_mask', '_sparsity')) for n,_ in net.named_buffers())
    assert not any(m._forward_pre_hooks or m._load_state_dict_post_hooks for m in net.modules())

def test_percent_is_refused():
    net = smooth()
    with pytest.raises(ValueError, match='0.9'): sparsify_model(net, 90)
    assert masks(net) == [] and all(w.all() for *_,w in sparse_weights(net))

def test_hooks_and_a_fit_beside_each_other():
    ends = []
    for enforce in (True, False):
        set_seed(0)
        learn = learner(model=smooth())
        sparsify_model(learn, .75, seed=0, enforce_mask=enforce)
        ends.append(snapshot(fit(learn, 2, dst()).model))
    assert same(*ends)

# --- regressions

def tied():
    net = nn.Sequential(nn.Linear(16,16), nn.ReLU(), nn.Linear(16,16), nn.Flatten(), nn.Linear(16,4))
    net[2].weight = net[0].weight
    return net

def rows(n): return list(zip(torch.randn(n, 8, 16), torch.randint(4, (n, 8))))

def row_learner(net):
    return Learner(DataLoaders(*[DataLoader(rows(6), bs=None) for _ in range(2)], device='cpu'), net,
                   loss_func=CrossEntropyLossFlat(), lr=1e-2)

def test_tied_weights_have_one_mask_that_opens():
    learn = row_learner(tied())
    fit(learn, 3, dst('GraNet', sparsity=80))
    assert len(masks(learn.model)) == 2 and sum(n_live(learn)) == 320-n_zeros(.8, 320)
    assert learn.model[2].weight is learn.model[0].weight and follows_masks(learn.model)

@pytest.mark.parametrize('kwargs',
                         [dict(granularity='row'), dict(context=partial(erdos_renyi_sparsity, fixed={'nope': .5}))],
                         ids=['granularity', 'context'])
def test_what_fails_when_masks_are_open_leaves_the_model_as_it_was(kwargs):
    learn = row_learner(tied())
    set_mask(learn.model[4], torch.rand(4,16) < .5)
    learn.model[0].weight.data[0,0] = 0
    before, was = snapshot(learn.model), masks(learn.model)
    with pytest.raises(ValueError):
        fit(learn, 2, DynamicSparseTrainingCallback(sparsity=80, grow_score_f=random_score, **kwargs))
    assert same(before, snapshot(learn.model)) and all_same(was, masks(learn.model))

def test_the_last_update_comes_also_where_the_last_batches_take_no_step():
    learn = row_learner(tied())
    cb = dst('GraNet', sparsity=80, stop_pct=1.)
    fit(learn, 2, [cb, GradientAccumulation(40)])
    assert sum(n_live(learn)) == 320-n_zeros(.8, 320) and follows_masks(learn.model)

def test_layers_that_the_optimizer_does_not_know_are_left_alone():
    learn = row_learner(tied())
    sparsify_model(learn.model, .5, seed=0)
    learn.splitter = lambda m: [list(m[4].parameters())]
    before, was = learn.model[0].weight.clone(), kept(learn.model[0])
    fit(learn, 3, dst())
    assert torch.equal(before, learn.model[0].weight) and torch.equal(was, kept(learn.model[0]))

def test_an_update_by_epochs_comes_after_the_epoch_was_validated():
    learn, seen = sparse_learner(), []
    cb = dst('SET', None, stop_pct=1.)
    look = at('after_validate', lambda learn: seen.append(masks(learn.model)))
    start = masks(learn.model)
    fit(learn, 3, [cb, look])
    assert cb.log.epoch.tolist() == [1, 2] and all_same(start, seen[0]) and not all_same(seen[0], seen[1])

@pytest.mark.parametrize('share', [torch.tensor(2.), 3, float('nan'), -1.])
def test_what_a_layer_counts_is_a_number(share):
    learn = sparse_learner()
    cb = DynamicSparseTrainingCallback(redistribute=lambda p, live: share, batches_per_update=2)
    with nullcontext() if share >= 0 else pytest.raises(ValueError, match='a number from 0'): fit(learn, 2, cb)
