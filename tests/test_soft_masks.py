"Soft masks in a fit: what is masked when, what survives below, and how they get on with all else in a learner"
import json, math, pickle
from contextlib import nullcontext
from copy import deepcopy
from pathlib import Path

import numpy as np, pytest, torch.nn.functional as F
from fastai.basics import (Adam, CancelBackwardException, CancelBatchException, CancelEpochException, CancelFitException, CancelStepException,
                           CancelTrainException, CancelValidException, L, Lookahead, OptimWrapper, Recorder, SGD, load_learner, params, ranger)
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.schedule import sched_no
from fastai.callback.tracker import SaveModelCallback
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.text.models.awdlstm import WeightDropout
from torch.func import functional_call
from torch.nn.utils import parametrize

from callback_helpers import *

ALL = (nn.Conv2d, nn.Linear)
N_ALL = N + 64   # with the linear layer's

pytestmark = [pytest.mark.filterwarnings(f'ignore:{w}') for w in ('numpy.core is deprecated', 'load_learner', 'RB sparsity', 'The loaded weights are', 'You are shadowing')]

@pytest.fixture(autouse=True)
def in_tmp(tmp_path, monkeypatch): monkeypatch.chdir(tmp_path)

def defect(why): return pytest.mark.xfail(strict=True, reason=why)

class Stirred(RBSparsityCallback):
    "RB with logits that start anywhere, so that few steps show what takes many"
    def make_masks(self):
        known, soft, g = getattr(self.__dict__.get('soft'), 'logits', {}), super().make_masks(), torch.Generator().manual_seed(0)
        for s in (s for n,s in soft.logits.items() if n not in known): s.add_((torch.randn(s.shape, generator=g)*1.5 - 3.6).to(s))
        return soft

CLASSES = dict(rb=Stirred, magnitude=MagnitudeSparsityCallback)
both = pytest.mark.parametrize('kind', CLASSES)

def soft(kind, sparsity=70, schedule=None, **kwargs):
    return CLASSES[kind](None if isinstance(schedule, EpochSchedule) else sparsity, schedule, **kwargs)

def n_zero(learn): return zeros(learn.model, ALL)

def masks_of(cb):
    "The masks of now, soft or hard, by name"
    return {n: cb.soft.masks[n] if cb.soft.masks else get_mask(*cb.modules[n]) for n in cb.params if cb.soft.masks or cb.frozen}

def copies(d): return {n: t.detach().clone() for n,t in d.items()}

def column(learn, name='sparsity'):
    at = list(learn.recorder.metric_names).index(name) - 1
    return [row[at] for row in learn.recorder.values]

def has_hooks(model): return any(p._backward_hooks for p in model.parameters())

def check_sparse(learn):
    "Masks are hard, and exactly what they drop is zero"
    assert len(masks(learn.model)) >= 1 and follows_masks(learn.model) and not has_hooks(learn.model)
    assert any(isinstance(cb, KeepMasks) for cb in learn.cbs)

class Everywhere(Callback):
    "Calls `f(event, learn)` last of all at every event"
    order = 90
    def __init__(self, f): self.f = f
    def __call__(self, event_name): self.f(event_name, self.learn)

# --- 1. what holds at every step

RAW = {'before_train', 'after_backward', 'before_step', 'after_step', 'after_batch'}
OPTIMIZERS = dict(adam=Adam, sgd=partial(SGD, mom=.9), ranger=ranger, lookahead=lambda ps, **kw: Lookahead(SGD(ps, mom=.9, **kw), k=2),
                  torch_adamw=partial(OptimWrapper, opt=torch.optim.AdamW), fused=partial(OptimWrapper, opt=torch.optim.AdamW, fused=True))
WAYS = dict(pct=None, epoch=Polynomial(.2, .7, 3, 2))

@pytest.mark.parametrize('way', WAYS)
@pytest.mark.parametrize('opt', OPTIMIZERS)
@both
def test_what_is_masked_when(kind, opt, way):
    "Masked in each forward and backward pass and for all that looks; raw while the optimizer steps; hard from the freeze on"
    learn, cb, seen = learner(opt_func=OPTIMIZERS[opt]), soft(kind, schedule=WAYS[way]), {}
    keys, ps = list(learn.model.state_dict()), list(learn.model.parameters())
    def look(event, learn):
        assert list(learn.model.state_dict()) == keys and len(ps) == len(list(learn.model.parameters())) and all(p is q for p,q in zip(ps, learn.model.parameters()))
        if not (now := masks_of(cb) if cb.started else {}) or not seen and event in ('before_fit', 'before_epoch'): return
        raw = learn.training and event in RAW and not cb.frozen
        for n,p in cb.params.items(): assert p.all() if raw else torch.equal(p == 0, ~now[n]), (event, n)
        seen[raw, cb.frozen, learn.training] = seen.get((raw, cb.frozen, learn.training), 0) + sum(int((~m).sum()) for m in now.values())
    fit(learn, 5, [cb, Everywhere(look)], 'fit_one_cycle')
    assert len(seen) == 5 and all(seen.values()) and list(learn.model.state_dict()) == keys
    check_sparse(learn)

@pytest.mark.parametrize('beside', [[], [GradientAccumulation(24)]], ids=['alone', 'accumulating'])
@both
def test_no_gradient_for_what_the_mask_drops(kind, beside):
    "The first callback of a step, and so the optimizer and what clips, sees none; what is accumulated was masked batch by batch"
    learn, cb, seen, drawn = learner(), soft(kind, freeze_pct=1), [], []
    def look(learn):
        drawn.append(masks_of(cb))
        drawn[-1] = copies(drawn[-1])
    def check(learn):
        for n,p in cb.params.items():
            ever = torch.stack([d[n] for d in drawn]).any(0)
            assert not p.grad[~ever].any() and p.grad[ever].any()
            seen.append(int((~ever).sum()))
        drawn.clear()
    fit(learn, 3, [cb, at('before_backward', look), at('before_step', check, 7), *beside])
    assert len(seen) == (18 if beside else 54)//(3 if not beside else 1) * (3 if not beside else 1) and sum(seen) > 0

def plain_sgd(): return learner(opt_func=SGD)

@pytest.mark.parametrize('schedule', [None, Multistep(multistep_steps=(1, 3), multistep_sparsity_levels=(.7, .2, .6))], ids=['line', 'falls'])
@both
def test_weights_survive_below_the_mask(kind, schedule):
    "What the mask drops does not move in a step, and comes back with its value"
    learn, cb, (before, was), drawn, back = plain_sgd(), soft(kind, schedule=schedule, freeze_pct=1), collect('before_batch', lambda l: copies(cb.params), 0), [], []
    look = at('before_backward', lambda l: drawn.append(copies(masks_of(cb))))
    after = at('after_batch', lambda l: back.append(copies(cb.params)))
    fit(learn, 4, [cb, before, look, after])
    returned = moved = 0
    for i,(a,m,b) in enumerate(zip(was, drawn, back)):
        for n in a:
            assert torch.equal(a[n][~m[n]], b[n][~m[n]]) and a[n].all()
            moved += int((a[n] != b[n]).sum())
            if i+1 < len(was): assert torch.equal(was[i+1][n], b[n])
            if i: returned += int((m[n] & ~drawn[i-1][n]).sum())
    assert len(drawn) == 24 and moved and (returned or kind == 'magnitude' and schedule is None)

# --- 2. fits one after the other, frozen layers, optimizers that are made anew

@pytest.mark.parametrize('how', ['fit', 'fit_one_cycle', 'fit_flat_cos'])
@both
def test_two_fits(kind, how):
    "The second starts its schedule anew, with soft masks, from what the first has learned"
    learn, cb, begun = learner(), soft(kind), []
    fit(learn, 4, cb, how)
    check_sparse(learn)
    first, logits = column(learn), copies(getattr(cb.soft, 'logits', {}))
    def look(learn): begun.append((masks(learn.model), copies(getattr(cb.soft, 'logits', {}))))
    fit(learn, 4, [cb, at('before_train', look)], how)
    assert begun[0][0] == [] and (not logits or same(begun[0][1], logits)) and sum(isinstance(c, KeepMasks) for c in learn.cbs) == 1
    check_sparse(learn)
    if kind == 'magnitude': assert first == column(learn) == [35, 70, 70, 70] and n_zero(learn) == n_zeros(.7, N_ALL)
    else: assert abs(column(learn)[0]-first[-1]) < 20 and column(learn)[-1] == round(100*n_zero(learn)/N_ALL, 2)
    last = masks(learn.model)
    fit(learn, 2)
    assert all_same(last, masks(learn.model)) and follows_masks(learn.model)

@both
def test_hard_masks_that_were_changed_in_between_stay(kind):
    learn, cb = learner(), soft(kind, 50)
    fit(learn, 3, cb)
    fit(learn, 2, sparse(90, layer_type=ALL))
    dropped, (watch, seen) = [~m for m in masks(learn.model)], collect('before_backward', lambda l: not any(w[d].any() for w,d in zip(weights(l.model, ALL), dropped)))
    fit(learn, 3, [cb, watch])
    assert len(seen) == 18 and all(seen) and min(column(learn)) >= 89.9 and cb.level >= .899
    check_sparse(learn)

@both
@defect('the logits of one model are those that another, unrelated one starts with')
def test_one_object_and_two_models(kind):
    if kind == 'magnitude': pytest.xfail('it has nothing that it could carry over')
    cb = RBSparsityCallback(70, mask_lr=.3)
    fit(learner(), 4, cb)
    other = fit(learner(), 1, cb)
    assert column(other) == column(fit(learner(), 1, RBSparsityCallback(70, mask_lr=.3)))

def split(model): return [params(model[:3]), params(model[3:6]), params(model[6:])]

@both
def test_fine_tune(kind):
    "The head by itself at first, then all"
    learn, cb, ends = learner(splitter=split), soft(kind), []
    look = at('after_epoch', lambda l: ends.append([int((w == 0).sum()) for w in weights(l.model, ALL)]))
    fit(learn, 4, [cb, look], 'fine_tune', freeze_epochs=2, base_lr=1e-2)
    assert all(e[:2] == [0, 0] and e[2] for e in ends[:2]) and all(ends[-1]) and len(ends) == 6
    if kind == 'magnitude': assert [e[2] for e in ends[:2]] == [45]*2 and [sum(e) for e in ends[2:]] == [n_zeros(s, N_ALL) for s in (.35, .7, .7, .7)]
    check_sparse(learn)

def freeze(learn, which=slice(None)):
    for w in weights(learn.model, ALL)[which]: w.requires_grad_(False)

@both
@defect('after_validate measures layers that are not there: ZeroDivisionError')
def test_where_all_is_frozen_it_waits(kind):
    learn, cb = learner(), soft(kind)
    freeze(learn)
    before = [w.clone() for w in weights(learn.model, ALL)]
    out = said(lambda: fit(learn, 2, cb))
    assert 'frozen' in out and all_same(before, weights(learn.model, ALL)) and masks(learn.model) == [] and column(learn) == [0, 0]

@both
@defect('as above')
def test_where_all_is_frozen_between_two_fits(kind):
    learn, cb = learner(), soft(kind)
    fit(learn, 3, cb)
    before = [w.clone() for w in weights(learn.model, ALL)]
    freeze(learn)
    said(lambda: fit(learn, 1, cb))
    assert all_same(before, weights(learn.model, ALL))
    for w in weights(learn.model, ALL): w.requires_grad_(True)
    fit(learn, 3, cb)
    check_sparse(learn)

@both
def test_a_frozen_layer_is_left_alone(kind):
    learn, cb = learner(), soft(kind)
    freeze(learn, slice(1))
    was = learn.model[0].weight.clone()
    fit(learn, 3, cb)
    assert torch.equal(was, learn.model[0].weight) and get_mask(learn.model[0]) is None and list(cb.params) == ['3', '8'] == list(cb.report().layer)
    assert column(learn)[-1] == round(100*n_zero(learn)/(1152+64), 2) > 0
    if kind == 'magnitude': assert n_zero(learn) == n_zeros(.7, 1152+64)

@both
def test_a_hard_mask_on_a_frozen_layer(kind):
    learn, cb = learner(), soft(kind)
    Sparsifier(learn.model, 'weight', 'local', large_final).sparsify_layer(learn.model[0], 50)
    freeze(learn, slice(1))
    was, mask = learn.model[0].weight.clone(), kept(learn.model[0])
    fit(learn, 3, cb)
    assert torch.equal(was, learn.model[0].weight) and torch.equal(mask, kept(learn.model[0]))
    check_sparse(learn)

@pytest.mark.parametrize('when', ['between', 'after_epoch', 'after_batch'])
@both
def test_an_optimizer_that_is_made_anew(kind, when):
    learn, cb, anew = learner(), soft(kind), lambda learn: learn.create_opt()
    fit(learn, 4, [cb] + ([] if when == 'between' else [at(when, anew)]))
    if when == 'between': anew(learn); fit(learn, 4, cb, reset_opt=True)
    check_sparse(learn)
    if kind == 'magnitude': assert n_zero(learn) == n_zeros(.7, N_ALL)

@pytest.mark.parametrize('opt', OPTIMIZERS)
@both
def test_the_past_of_what_is_baked_is_forgotten(kind, opt):
    "Momentum does not move what is zero, nor do slow weights bring it back"
    learn, cb = learner(opt_func=OPTIMIZERS[opt]), soft(kind)
    fit(learn, 2, cb)
    fit(learn, 3)
    check_sparse(learn)

# --- 3. mixed precision

class OnCPU(MixedPrecision):
    "`MixedPrecision` with its scaler on the CPU, and autocast to `dtype`"
    def __init__(self, scale=8., dtype=torch.float16): super().__init__(); self.scale, self.dtype, self.overflows, self.skipped = scale, dtype, [], False
    def before_fit(self):
        self.autocast, self.scales = torch.autocast('cpu', self.dtype or torch.bfloat16, enabled=self.dtype is not None), L()
        self.learn.scaler = torch.amp.GradScaler('cpu', init_scale=self.scale, enabled=self.dtype is not torch.bfloat16)
    def after_batch(self):
        if self.training: self.overflows.append(self.skipped)

def logits_after(cbs=(), n_epoch=3, **kwargs):
    cb = soft('rb', freeze_pct=1, **kwargs)
    learn = fit(plain_sgd(), n_epoch, [cb, *cbs])
    return cb.soft.logits, dict(enumerate(weights(learn.model, ALL)))

@pytest.mark.parametrize('scale', [1., 1024., 2.**-6])
def test_a_scale_makes_no_difference(scale):
    "The gradients of logits are unscaled, those of their level were never scaled"
    for a,b in zip(logits_after(), logits_after([OnCPU(scale, None)])): assert same(a, b)

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@both
def test_half_precision(kind, dtype):
    learn, cb, dtypes = learner(), soft(kind), set()
    learn.model[3].register_forward_hook(lambda m, x, out: dtypes.add(out.dtype))
    fit(learn, 4, [cb, OnCPU(dtype=dtype)])
    assert dtypes == {dtype} and all(w.dtype == torch.float32 for w in weights(learn.model, ALL))
    assert all(s.dtype == torch.float32 for s in getattr(cb.soft, 'logits', {}).values())
    check_sparse(learn)

@pytest.mark.filterwarnings('ignore:.*CUDA is not available', 'ignore:.*GradScaler is enabled')
@pytest.mark.parametrize('to', ['to_fp16', 'to_bf16'])
@both
def test_to_half_precision_and_back(kind, to):
    learn = getattr(learner(), to)()
    fit(learn, 3, soft(kind, 50))
    check_sparse(learn)
    fit(learn.to_fp32(), 3, soft(kind, 70))
    check_sparse(learn)

@pytest.mark.parametrize('skipped', [{0}, {1, 4, 5}, {6, 7, 8, 17}])
@pytest.mark.parametrize('acc', [False, True])
def test_logits_rest_while_gradients_overflow(skipped, acc):
    cb, amp, n = soft('rb', freeze_pct=1), OnCPU(), [0]
    before, was = collect('before_batch', lambda l: copies(cb.soft.logits))
    after, now = collect('after_batch', lambda l: copies(cb.soft.logits))
    def spoil(learn):
        if n[0] in skipped: learn.loss_grad *= math.inf
        n[0] += 1
    fit(plain_sgd(), 3, [cb, amp, at('before_backward', spoil), before, after, *([GradientAccumulation(16)] if acc else [])])
    spoiled = {i//2 for i in skipped} if acc else skipped
    for i,(a,b) in enumerate(zip(was, now)):
        rests = i//2 in spoiled or i % 2 == 0 if acc else i in spoiled
        assert same(a, b) == rests and all(t.isfinite().all() for t in b.values()), i
    if not acc: assert {i for i,o in enumerate(amp.overflows) if o} == skipped
    assert not any(s.grad.any() for s in cb.soft.logits.values())

# --- 4. gradients, by autograd and torch's own optimizers

def noted_noise(cb):
    "Have what `cb` draws its masks from noted in a list"
    noise, make = [], cb.make_masks
    def make_masks():
        soft = make()
        draw = soft._uniform
        def uniform(s): noise.append(draw(s).clone()); return noise[-1]
        soft._uniform = uniform
        return soft
    cb.make_masks = make_masks
    return noise

def through(hard, smooth): return hard + smooth - smooth.detach()

def by_hand(net, logits, noise, batches, level, local, n_acc, clip, lr=1e-2, p=.05, **adam):
    "Logits and weights of a training of RB as its formulas are written"
    s, noise = {n: t.clone().requires_grad_() for n,t in logits.items()}, iter(noise)
    opt, mask_opt = torch.optim.SGD(net.parameters(), lr), torch.optim.Adam(s.values(), **adam)
    for i,(x,y) in enumerate(batches):
        ws = {}
        for n,t in s.items():
            xi = next(noise).view_as(t)
            drawn = (t + xi.log() - (1-xi).log()).sigmoid()
            ws[f'{n}.weight'] = net.get_submodule(n).weight*through((drawn > .5).float(), drawn)
        (F.cross_entropy(functional_call(net, ws, x), y)*(len(x)/n_acc if n_acc else 1)).backward()
        if n_acc and (i+1)*len(x) % n_acc: continue
        density = {n: through((t > 0).float(), t.sigmoid()) for n,t in s.items()}
        shares = [d.mean() for d in density.values()] if local else [torch.cat([d.flatten() for d in density.values()]).mean()]
        sum((d - (1-level))**2 for d in shares).div(p**2).backward()
        if clip: nn.utils.clip_grad_norm_(net.parameters(), clip)
        for o in (opt, mask_opt): o.step(), o.zero_grad()
    return {n: t.detach() for n,t in s.items()}, {n: net.get_submodule(n).weight.detach() for n in s}

@pytest.mark.parametrize('context', ['global', 'local'])
@pytest.mark.parametrize('clip', [None, .05])
@pytest.mark.parametrize('n_acc', [None, 16, 24])
def test_gradients_of_weights_and_logits(n_acc, clip, context):
    "Each micro-batch counts under its own mask; clipping is of weights' gradients alone"
    learn, cb, start = plain_sgd(), soft('rb', 40, Schedule(sched_one_shot), context=context, freeze_pct=1), []
    net, noise = deepcopy(learn.model), noted_noise(cb)
    begin = at('before_train', lambda l: start.append(copies(cb.soft.logits)))
    raw = at('after_batch', lambda l: start.append(copies(cb.params)))   # of the last batch, before the masks are baked
    fit(learn, 2, [cb, begin, raw, *([GradientAccumulation(n_acc)] if n_acc else []), *([GradientClip(clip)] if clip else [])])
    adam = {k: cb.mask_opt.defaults[k] for k in ('lr', 'betas', 'eps', 'weight_decay')}
    assert adam['lr'] == 3e-2 and adam['eps'] <= 1e-8 and adam['weight_decay'] == 0
    logits, ws = by_hand(net, start[0], noise, list(learn.dls.train)*2, .4, context == 'local', n_acc, clip, **adam)
    for n in logits:
        torch.testing.assert_close(cb.soft.logits[n], logits[n], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(start[-1][n], ws[n], rtol=1e-3, atol=1e-5)
        assert not torch.allclose(logits[n], start[0][n], atol=.05)

@pytest.mark.parametrize('n_acc', [16, 24])
def test_magnitude_accumulates(n_acc):
    "As by hand, with the masks of the epoch"
    learn, cb = plain_sgd(), soft('magnitude', 50, Schedule(sched_one_shot), freeze_pct=1)
    net, epoch, raw = deepcopy(learn.model), [], []
    fit(learn, 1, [cb, GradientAccumulation(n_acc), at('before_backward', lambda l: epoch.append(copies(cb.soft.masks))), at('after_batch', lambda l: raw.append(copies(cb.params)))])
    opt = torch.optim.SGD(net.parameters(), 1e-2)
    for i,(x,y) in enumerate(learn.dls.train):
        ws = {f'{n}.weight': net.get_submodule(n).weight*m for n,m in epoch[0].items()}
        (F.cross_entropy(functional_call(net, ws, x), y)*len(x)/n_acc).backward()
        if (i+1)*len(x) % n_acc == 0: opt.step(), opt.zero_grad()
    for n,w in raw[-1].items(): torch.testing.assert_close(w, net.get_submodule(n).weight.detach(), rtol=1e-4, atol=1e-6)

def test_the_same_seed_the_same_masks():
    "And nothing is drawn from torch's own generator, which orders the data"
    a, b, c = [logits_after(seed=s)[0] for s in (0, 0, 1)]
    assert same(a, b) and not same(a, c)
    set_seed(0)
    learn, cb = plain_sgd(), soft('rb')
    fit(learn, 0, cb)
    was = torch.get_rng_state()
    cb.soft = cb.make_masks()
    cb.soft.draw()
    cb.soft.end()
    assert torch.equal(was, torch.get_rng_state())

# --- 5. the freeze

def frozen_at(kind, n_epoch, **kwargs):
    "Batch from which masks are hard, and what held from there on: masks, logits, weights, columns"
    learn, cb, seen = learner(), soft(kind, **kwargs), []
    def look(learn): seen.append((cb.frozen, masks(learn.model), copies(getattr(cb.soft, 'logits', {})), [w.detach().clone() for w in weights(learn.model, ALL)]))
    settled, last = collect('after_epoch', lambda l: [w != 0 for w in weights(l.model, ALL)])
    fit(learn, n_epoch, [cb, at('before_batch', look), settled])
    first = next((i for i,s in enumerate(seen) if s[0]), len(seen))
    for _,m,logits,ws in seen[first:]:
        assert all_same(m, seen[first][1]) and same(logits, seen[first][2]) and all_same(m, [w != 0 for w in ws]) and len(m) == 3
    assert not any(s[0] or s[1] for s in seen[:first]) and all_same(last[-1], masks(learn.model))
    if first < len(seen)-1: assert not all_same(seen[first][3], seen[-1][3])
    check_sparse(learn)
    return first, learn, last

@pytest.mark.parametrize('pct,first', [(.25, 6), (.5, 12), (.6, 15), (.75, 18), (1, 24), (.01, 1)])
@both
def test_frozen_from_a_share_of_the_fit(kind, pct, first):
    at_batch, learn, _ = frozen_at(kind, 4, freeze_pct=pct)
    assert at_batch == first
    if kind == 'rb': assert [l == 0 for l in column(learn, 'rb_loss')] == [6*e >= first for e in range(4)]

SCHEDULES = dict(polynomial=Polynomial(.1, .6, 3, 2), exponential=Exponential(.1, .6, 3, 2), adaptive=Adaptive(.1, .6, 3, 1, .2),
                 multistep=Multistep(sparsity_freeze_epoch=3, multistep_steps=(1,), multistep_sparsity_levels=(.2, .6)), moving=Polynomial(.1, .6, 3, 2, update_per_optimizer_step=True))

@pytest.mark.parametrize('name', SCHEDULES)
@both
def test_frozen_from_an_epoch(kind, name):
    "With the masks with which the epoch before it was validated"
    first, learn, ends = frozen_at(kind, 5, schedule=SCHEDULES[name])
    assert first == 18 and all_same(ends[2], ends[-1]) and column(learn)[2] == column(learn)[4]
    if kind == 'rb': assert column(learn, 'rb_loss')[3:] == [0, 0] and all(column(learn, 'rb_loss')[:3])

@pytest.mark.parametrize('kind', [pytest.param('rb', marks=defect('its masks are trained for one epoch more')), 'magnitude'])
def test_frozen_from_the_start(kind):
    first, learn, _ = frozen_at(kind, 2, schedule=Polynomial(.3, .6, 0, 2))
    assert first == 0 and (kind == 'rb' or n_zero(learn) == n_zeros(.3, N_ALL))

@both
def test_a_fit_that_starts_later(kind):
    "The epochs before count as reached"
    s, learn = Polynomial(.1, .6, 6, 4), learner()
    cb, (levels, seen) = soft(kind, schedule=s), collect('before_batch', lambda l: cb.level)
    fit(learn, 6, [cb, levels], start_epoch=3)
    assert seen == [l for l in s.levels(6)[3:] for _ in range(6)]
    if kind == 'magnitude': assert n_zero(learn) == n_zeros(.6, N_ALL)

@defect('magnitude freezes what sparsity_init drops, RB trains its masks for an epoch')
@both
def test_a_fit_that_starts_after_the_freeze(kind):
    "Masks are those that the weights have, at the level of the freeze"
    learn, cb, s = learner(), soft(kind, schedule=Polynomial(.1, .6, 3, 2)), Polynomial(.1, .6, 3, 2)
    fit(learn, 5, [cb, at('after_epoch', lambda l: l.save('m') if l.epoch == 3 else None)])
    other, again = learner(), soft(kind, schedule=s)
    other.load('m')
    zero = [w == 0 for w in weights(other.model, ALL)]
    assert sum(int(z.sum()) for z in zero) == n_zero(learn)
    fit(other, 5, again, start_epoch=4)
    assert all_same(zero, [w == 0 for w in weights(other.model, ALL)])
