"Soft masks in a fit: when weights are masked, that masked weights are kept, and together with the rest of fastai"
import json, math, pickle, warnings
from copy import deepcopy
from pathlib import Path

import pytest, torch.nn.functional as F
from fastai.basics import (Adam, CancelBackwardException, CancelBatchException, CancelEpochException,
                           CancelFitException, CancelStepException, CancelTrainException, Lookahead, OptimWrapper, SGD,
                           load_learner)
from fastai.callback.schedule import sched_no
from fastai.callback.tracker import SaveModelCallback
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.text.models.awdlstm import WeightDropout
from torch.func import functional_call
from torch.nn.utils import parametrize

from callback_helpers import (
    all_same, at, collect, convnet, copied_by, exportable, fit, follows_masks, images, kept, learner, loaders, masks,
    OnCPU, optimizer_state, printed, raising, same, snapshot, sparse, split, weights, zeros)
from fastai.basics import Callback, CrossEntropyLossFlat, DataLoader, DataLoaders, Learner, nn, partial, set_seed, torch
from cases import in_a_loop
from kinds import LAYERS as ALL, N_ALL, n_zero, Stirred
from fasterai_sparse.core.allocation import erdos_renyi_sparsity
from fasterai_sparse.core.criteria import large_final
from fasterai_sparse.core.from_zeros import masks_from_zeros
from fasterai_sparse.core.layers import maskable_weights
from fasterai_sparse.core.masks import get_mask, mask_sparsity, masked_params
from fasterai_sparse.core.report import format_report, sparsity_report
from fasterai_sparse.core.schedules import agp, cos, lin, sched_one_shot, Schedule
from fasterai_sparse.core.select import n_zeros
from fasterai_sparse.core.sparsifier import Sparsifier
from fasterai_sparse.train.bn_adaptation import adapt_batchnorm
from fasterai_sparse.train.keep_masks import KeepMasks
from fasterai_sparse.train.updates import bake_masks
from fasterai_sparse.dynamic.callback import DynamicSparseTrainingCallback, RigL_presets, SET_presets
from fasterai_sparse.dynamic.random_masks import sparsify_model
from fasterai_sparse.nncf.config import callbacks_from_config, SparsityConfig
from fasterai_sparse.nncf.const import ConstSparsityCallback
from fasterai_sparse.nncf.epoch_schedules import Adaptive, EpochSchedule, Exponential, Multistep, Polynomial
from fasterai_sparse.nncf.magnitude import MagnitudeSparsityCallback, weight_importances
from fasterai_sparse.nncf.rb import RBSparsityCallback
from fasterai_sparse.nncf.soft_masks import CONV_AND_LINEAR

pytestmark = [pytest.mark.filterwarnings(f'ignore:{w}')
              for w in ('numpy.core is deprecated', 'load_learner', 'RB sparsity', 'The loaded weights are',
                        'You are shadowing')]
pytestmark.append(pytest.mark.usefixtures('in_tmp'))

def defect(why): return pytest.mark.xfail(strict=True, reason=why)

CLASSES = dict(rb=Stirred, magnitude=MagnitudeSparsityCallback)
both = pytest.mark.parametrize('kind', CLASSES)

def soft(kind, sparsity=70, schedule=None, **kwargs):
    return CLASSES[kind](None if isinstance(schedule, EpochSchedule) else sparsity, schedule, **kwargs)

def masks_of(cb):
    "Name -> current mask, soft or hard"
    return {n: cb.soft.masks[n] if cb.soft.masks else get_mask(*cb.owners[n])
            for n in cb.params if cb.soft.masks or cb.frozen}

def copies(d): return {n: t.detach().clone() for n,t in d.items()}

def column(learn, name='sparsity'):
    at = list(learn.recorder.metric_names).index(name) - 1
    return [row[at] for row in learn.recorder.values]

def has_hooks(model): return any(p._backward_hooks for p in model.parameters())

def check_sparse(learn):
    "Masks are hard, and exactly the masked weights are zero"
    assert len(masks(learn.model)) >= 1 and follows_masks(learn.model) and not has_hooks(learn.model)
    assert any(isinstance(cb, KeepMasks) for cb in learn.cbs)

# --- 1. when weights are masked, and when raw

RAW = {'before_train', 'after_backward', 'before_step', 'after_step', 'after_batch'}
OPTIMIZERS = dict(adam=Adam, lookahead=lambda ps, **kw: Lookahead(SGD(ps, mom=.9, **kw), k=2),
                  torch_adamw=partial(OptimWrapper, opt=torch.optim.AdamW),
                  fused=partial(OptimWrapper, opt=torch.optim.AdamW, fused=True))
WAYS = dict(pct=None, epoch=Polynomial(.2, .7, 3, 2))

class Watch(Callback):
    """Checks at each event of a fit with `cb`, after all other callbacks, that weights are masked or raw as expected.

    `seen`: (raw, frozen, training) -> number of masked weights, over all events."""
    order = 90
    def __init__(self, cb): self.cb, self.seen = cb, {}
    def __call__(self, event):
        learn, cb, first = self.learn, self.cb, not self.seen and event in ('before_fit', 'before_epoch')
        if event == 'before_fit' and not self.seen:
            self.keys, self.ps = list(learn.model.state_dict()), list(learn.model.parameters())
        assert list(learn.model.state_dict()) == self.keys and len(self.ps) == len(list(learn.model.parameters()))
        assert all(p is q for p,q in zip(self.ps, learn.model.parameters()))
        if first or not (now := masks_of(cb) if cb.started else {}): return
        raw = learn.training and event in RAW and not cb.frozen
        for n,p in cb.params.items(): assert p.all() if raw else torch.equal(p == 0, ~now[n]), (event, n)
        key = raw, cb.frozen, learn.training
        self.seen[key] = self.seen.get(key, 0) + sum(int((~m).sum()) for m in now.values())

@pytest.mark.parametrize('way', WAYS)
@pytest.mark.parametrize('opt', OPTIMIZERS)
@both
def test_what_is_masked_when(kind, opt, way):
    "Weights are masked in forward and backward passes and for other callbacks, raw while the optimizer steps"
    learn, cb = learner(4, opt_func=OPTIMIZERS[opt]), soft(kind, schedule=WAYS[way])
    watch, keys = Watch(cb), list(learn.model.state_dict())
    fit(learn, 5, [cb, watch], 'fit_one_cycle')
    assert len(watch.seen) == 5 and all(watch.seen.values()) and list(learn.model.state_dict()) == keys
    check_sparse(learn)

@pytest.mark.parametrize('beside', [[], [GradientAccumulation(24)]], ids=['alone', 'accumulating'])
@both
def test_no_gradient_for_what_the_mask_drops(kind, beside):
    "Gradients are masked before the first `before_step`; accumulated ones by the mask of each batch"
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
    assert len(seen) == (18 if beside else 54) and sum(seen)

def plain_sgd(): return learner(opt_func=SGD)

@pytest.mark.parametrize('schedule', [None, Multistep(multistep_steps=(1, 3), multistep_sparsity_levels=(.7, .2, .6))],
                         ids=['line', 'falls'])
@both
def test_weights_survive_below_the_mask(kind, schedule):
    "Masked weights do not move in a step, and come back with their value"
    learn, cb, drawn, back = plain_sgd(), soft(kind, schedule=schedule, freeze_pct=1), [], []
    before, was = collect('before_batch', lambda l: copies(cb.params), 0)
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

@pytest.mark.parametrize('exc,event',
                         [(None, 'before_batch'), (CancelBatchException, 'after_pred'),
                          (CancelBatchException, 'after_backward'), (CancelStepException, 'before_step'),
                          (CancelBackwardException, 'before_backward'), (CancelTrainException, 'after_pred'),
                          (CancelTrainException, 'after_backward'), (CancelEpochException, 'after_loss'),
                          (CancelEpochException, 'after_step')],
                         ids=lambda o: o.__name__[6:-9] if isinstance(o, type) else o)
@both
def test_weights_survive_whatever_is_cancelled(kind, exc, event):
    "With a learning rate of 0, raw weights are those of the start to the bit"
    learn, cb = learner(4, opt_func=SGD), soft(kind, freeze_pct=1)
    dense, seen = copies(dict(learn.model.named_parameters())), []
    def stop(learn):
        if exc and learn.iter == 1 and learn.epoch < 2: raise exc
    def check(learn): seen.append(all(torch.equal(p, dense[n]) for n,p in learn.model.named_parameters()))
    fit(learn, 3,
        [cb, at(event, stop), at('before_batch', check, 0), at('after_batch', check), at('before_train', check)], lr=0.)
    assert all(seen) and len(seen) > 8 and n_zero(learn) > 0

@pytest.mark.parametrize('acc', [False, True])
@both
def test_a_backward_pass_by_another_callback(kind, acc):
    "Another callback's backward pass over raw weights is not masked, and adds no gradients of logits"
    learn, cb, n = learner(4), soft(kind, freeze_pct=1), []
    def extra(learn):
        grads = {k: s.grad.clone() for k,s in getattr(cb, 'logits', {}).items()}
        kept, drawn = [p.grad.clone() for p in learn.model.parameters()], copies(masks_of(cb))
        learn.model.zero_grad(set_to_none=False)
        learn.loss_func(learn.model(*learn.xb), *learn.yb).backward()
        for k,p in cb.params.items(): n.append(bool(p.grad[~drawn[k]].any()))
        assert all(torch.equal(s.grad, grads[k]) for k,s in getattr(cb, 'logits', {}).items())
        for p,g in zip(learn.model.parameters(), kept): p.grad.copy_(g)
    fit(learn, 2, [cb, at('after_batch', extra), *([GradientAccumulation(16)] if acc else [])])
    assert len(n) == 24 and all(n)

@pytest.mark.parametrize('when', ['after_batch', 'before_train'])
@both
def test_weights_that_move_to_another_order_in_memory(kind, when):
    learn, cb = learner(), soft(kind)
    fit(learn, 4, [cb, Watch(cb), at(when, lambda l: l.model.to(memory_format=torch.channels_last))])
    assert learn.model[3].weight.is_contiguous(memory_format=torch.channels_last)
    check_sparse(learn)

@both
def test_weights_stay_where_they_are_in_memory(kind):
    learn, cb = learner(), soft(kind)
    where = lambda: [p.data_ptr() for p in learn.model.parameters()]
    at_first = where()
    fit(learn, 3, cb)
    assert where() == at_first
    with pytest.raises(RuntimeError): fit(learn, 3, [cb, at('after_pred', raising(RuntimeError('stop')))])
    left = [p.detach().clone() for p in learn.model.parameters()]
    begin, begun = collect('before_fit', lambda l: [p.detach().clone() for p in l.model.parameters()], 90)
    assert where() != at_first
    fit(learn, 1, [cb, begin])
    assert where() == at_first and all_same(left, begun[0])

# --- 2. fits one after the other, frozen layers, new optimizers

@pytest.mark.parametrize('how', ['fit', 'fit_one_cycle', 'fit_flat_cos'])
@both
def test_two_fits(kind, how):
    "The second fit starts its schedule anew, with soft masks, from the weights and logits of the first"
    learn, cb, begun = learner(4), soft(kind), []
    fit(learn, 4, cb, how)
    check_sparse(learn)
    first, logits = column(learn), copies(getattr(cb.soft, 'logits', {}))
    def look(learn): begun.append((masks(learn.model), copies(getattr(cb.soft, 'logits', {}))))
    fit(learn, 4, [cb, at('before_train', look)], how)
    assert begun[0][0] == [] and (not logits or same(begun[0][1], logits))
    assert sum(isinstance(c, KeepMasks) for c in learn.cbs) == 1
    check_sparse(learn)
    if kind == 'magnitude': assert first == column(learn) == [35, 70, 70, 70] and n_zero(learn) == n_zeros(.7, N_ALL)
    else: assert abs(column(learn)[0]-first[-1]) < 20 and column(learn)[-1] == round(100*n_zero(learn)/N_ALL, 2)
    last = masks(learn.model)
    fit(learn, 2)
    assert all_same(last, masks(learn.model)) and follows_masks(learn.model)

@both
def test_hard_masks_that_were_changed_in_between_stay(kind):
    learn, cb = learner(4), soft(kind, 50)
    fit(learn, 3, cb)
    fit(learn, 2, sparse(90, layer_type=ALL))
    dropped = [~m for m in masks(learn.model)]
    watch, seen = collect('before_backward', lambda l: stays_zero(l, dropped))
    fit(learn, 3, [cb, watch])
    assert len(seen) == 12 and all(seen) and min(column(learn)) >= 89.9 and cb.level >= .899
    check_sparse(learn)

def test_one_object_and_two_models():
    cb = RBSparsityCallback(70, mask_lr=.3)
    fit(learner(), 4, cb)
    other = fit(learner(), 1, cb)
    assert column(other) == column(fit(learner(), 1, RBSparsityCallback(70, mask_lr=.3)))

@both
def test_fine_tune(kind):
    "`fine_tune` trains the head alone at first, then all layers"
    learn, cb, ends = learner(4, splitter=split), soft(kind), []
    look = at('after_epoch', lambda l: ends.append([int((w == 0).sum()) for w in weights(l.model, ALL)]))
    fit(learn, 4, [cb, look], 'fine_tune', freeze_epochs=2, base_lr=1e-2)
    assert all(e[:2] == [0, 0] and e[2] for e in ends[:2]) and all(ends[-1]) and len(ends) == 6
    if kind == 'magnitude':
        assert [e[2] for e in ends[:2]] == [45]*2
        assert [sum(e) for e in ends[2:]] == [n_zeros(s, N_ALL) for s in (.35, .7, .7, .7)]
    check_sparse(learn)

def freeze(learn, which=slice(None)):
    for w in weights(learn.model, ALL)[which]: w.requires_grad_(False).grad = None   # else fastai goes on to step it

@both
def test_where_all_is_frozen_it_waits(kind):
    learn, cb = learner(), soft(kind)
    freeze(learn)
    before = [w.clone() for w in weights(learn.model, ALL)]
    out = printed(lambda: fit(learn, 2, cb))
    assert 'frozen' in out and all_same(before, weights(learn.model, ALL)) and masks(learn.model) == []
    assert column(learn) == [0, 0]

@both
def test_where_all_is_frozen_between_two_fits(kind):
    learn, cb = learner(4), soft(kind)
    fit(learn, 3, cb)
    before = [w.clone() for w in weights(learn.model, ALL)]
    freeze(learn)
    out, was = printed(lambda: fit(learn, 1, cb)), masks(learn.model)
    assert 'frozen' in out and all_same(before, weights(learn.model, ALL))
    assert column(learn) == [round(100*n_zero(learn)/N_ALL, 2)] and len(was) == 3
    for w in weights(learn.model, ALL): w.requires_grad_(True)
    fit(learn, 3, cb)
    check_sparse(learn)

@both
def test_a_frozen_layer_is_left_alone(kind):
    learn, cb = learner(4), soft(kind)
    freeze(learn, slice(1))
    was = learn.model[0].weight.clone()
    fit(learn, 3, cb)
    assert torch.equal(was, learn.model[0].weight) and get_mask(learn.model[0]) is None
    assert list(cb.params) == ['3', '8'] == list(cb.report().layer)
    assert column(learn)[-1] == round(100*n_zero(learn)/(1152+64), 2) > 0
    if kind == 'magnitude': assert n_zero(learn) == n_zeros(.7, 1152+64)

@both
def test_a_hard_mask_on_a_frozen_layer(kind):
    learn, cb = learner(4), soft(kind)
    Sparsifier(learn.model, 'weight', 'local', large_final).sparsify_layer(learn.model[0], 50)
    freeze(learn, slice(1))
    was, mask = learn.model[0].weight.clone(), kept(learn.model[0])
    fit(learn, 3, cb)
    assert torch.equal(was, learn.model[0].weight) and torch.equal(mask, kept(learn.model[0]))
    check_sparse(learn)

@pytest.mark.parametrize('when', ['between', 'after_epoch', 'after_batch'])
@both
def test_an_optimizer_that_is_made_anew(kind, when):
    learn, cb, anew = learner(4), soft(kind), lambda learn: learn.create_opt()
    fit(learn, 4, [cb] + ([] if when == 'between' else [at(when, anew)]))
    if when == 'between': anew(learn); fit(learn, 4, cb, reset_opt=True)
    check_sparse(learn)
    if kind == 'magnitude': assert n_zero(learn) == n_zeros(.7, N_ALL)

@pytest.mark.parametrize('opt', OPTIMIZERS)
@both
def test_optimizer_state_of_masked_weights_is_zero_after_the_fit(kind, opt):
    "After the fit neither momentum nor slow weights move a masked weight"
    learn, cb = learner(4, opt_func=OPTIMIZERS[opt]), soft(kind, freeze_pct=1)
    fit(learn, 2, cb)
    for *_,p,mask in masked_params(learn.model):
        kept = optimizer_state(learn.opt, p)
        assert kept and not any(t[~mask].any() for t in kept) and any(t[mask].any() for t in kept)
    fit(learn, 3)
    check_sparse(learn)

# --- 3. mixed precision

def logits_after(cbs=(), n_epoch=3, **kwargs):
    cb = soft('rb', freeze_pct=1, **kwargs)
    learn = fit(plain_sgd(), n_epoch, [cb, *cbs])
    return cb.soft.logits, dict(enumerate(weights(learn.model, ALL)))

@pytest.mark.parametrize('scale', [1., 1024., 2.**-6])
def test_a_scale_makes_no_difference(scale):
    "The loss scale changes neither the task's gradients of logits nor those of their level"
    for a,b in zip(logits_after(), logits_after([OnCPU(scale=scale, autocast=False)])): assert same(a, b)

@pytest.mark.parametrize('mode,dtype', [('fp16', torch.float16), ('bf16', torch.bfloat16)])
@both
def test_half_precision(kind, mode, dtype):
    learn, cb, dtypes = learner(4), soft(kind), set()
    learn.model[3].register_forward_hook(lambda m, x, out: dtypes.add(out.dtype))
    fit(learn, 4, [cb, OnCPU(mode)])
    assert dtypes == {dtype} and all(w.dtype == torch.float32 for w in weights(learn.model, ALL))
    assert all(s.dtype == torch.float32 for s in getattr(cb.soft, 'logits', {}).values())
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
    fit(plain_sgd(), 3,
        [cb, amp, at('before_backward', spoil), before, after, *([GradientAccumulation(16)] if acc else [])])
    spoiled = {i//2 for i in skipped} if acc else skipped
    for i,(a,b) in enumerate(zip(was, now)):
        rests = i//2 in spoiled or i % 2 == 0 if acc else i in spoiled
        assert same(a, b) == rests and all(t.isfinite().all() for t in b.values()), i
    if not acc: assert set(amp.overflows) == skipped
    assert not any(s.grad.any() for s in cb.soft.logits.values())

# --- 4. gradients, by autograd and torch's own optimizers

def recorded_noise(cb):
    "List to which `cb` appends the noise it draws masks from"
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

def by_hand(net, logits, noise, batches, level, local, n_acc, clip, adam, lr=1e-2, p=.05):
    "Logits and weights after training by RB's formulas, written out"
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
        whole = torch.cat([d.flatten() for d in density.values()])
        shares = [d.mean() for d in density.values()] if local else [whole.mean()]
        sum((d - (1-level))**2 for d in shares).div(p**2).backward()
        if clip: nn.utils.clip_grad_norm_(net.parameters(), clip)
        for o in (opt, mask_opt): o.step(), o.zero_grad()
        for t in s.values(): t.data.clamp_(-8, 8)
    return {n: t.detach() for n,t in s.items()}, {n: net.get_submodule(n).weight.detach() for n in s}

@pytest.mark.parametrize('context', ['global', 'local'])
@pytest.mark.parametrize('clip', [None, .05])
@pytest.mark.parametrize('n_acc', [None, 16, 24])
def test_gradients_of_weights_and_logits(n_acc, clip, context):
    "Each micro-batch is computed with its own mask; clipping applies to gradients of weights only"
    learn, cb, start = plain_sgd(), soft('rb', 40, Schedule(sched_one_shot), context=context, freeze_pct=1), []
    net, noise = deepcopy(learn.model), recorded_noise(cb)
    begin = at('before_train', lambda l: start.extend([copies(cb.soft.logits), cb.mask_opt.defaults]))
    raw = at('after_batch', lambda l: start.append(copies(cb.params)))   # of the last batch, before the masks are baked
    fit(learn, 2,
        [cb, begin, raw, *([GradientAccumulation(n_acc)] if n_acc else []), *([GradientClip(clip)] if clip else [])])
    adam = {k: start[1][k] for k in ('lr', 'betas', 'eps', 'weight_decay')}
    assert adam['lr'] == cb.mask_lr and adam['eps'] <= 1e-8 and adam['weight_decay'] == 0
    logits, ws = by_hand(net, start[0], noise, list(learn.dls.train)*2, .4, context == 'local', n_acc, clip, adam)
    for n in logits:
        torch.testing.assert_close(cb.soft.logits[n], logits[n], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(start[-1][n], ws[n], rtol=1e-3, atol=1e-5)
        assert not torch.allclose(logits[n], start[0][n], atol=.05)

@pytest.mark.parametrize('n_acc', [16, 24])
def test_magnitude_accumulates(n_acc):
    "Accumulated gradients give the weights of a training by hand with the masks of the epoch"
    learn, cb = plain_sgd(), soft('magnitude', 50, Schedule(sched_one_shot), freeze_pct=1)
    net, epoch, raw = deepcopy(learn.model), [], []
    fit(learn, 1,
        [cb, GradientAccumulation(n_acc), at('before_backward', lambda l: epoch.append(copies(cb.soft.masks))),
         at('after_batch', lambda l: raw.append(copies(cb.params)))])
    opt = torch.optim.SGD(net.parameters(), 1e-2)
    for i,(x,y) in enumerate(learn.dls.train):
        ws = {f'{n}.weight': net.get_submodule(n).weight*m for n,m in epoch[0].items()}
        (F.cross_entropy(functional_call(net, ws, x), y)*len(x)/n_acc).backward()
        if (i+1)*len(x) % n_acc == 0: opt.step(), opt.zero_grad()
    for n,w in raw[-1].items():
        torch.testing.assert_close(w, net.get_submodule(n).weight.detach(), rtol=1e-4, atol=1e-6)

@pytest.mark.parametrize('n', [7, 4097])
def test_noise_is_uniform(n):
    soft = RBSparsityCallback(70, seed=3)
    soft.params = {'p': nn.Parameter(torch.ones(n))}
    noise, s = soft.make_masks()._uniform, torch.zeros(n)
    xi = torch.stack([noise(s) for _ in range(2**16//n)])
    assert xi.dtype == torch.float32 and 0 < xi.min() < 1e-3 and 1-1e-3 < xi.max() < 1
    assert xi.mean() == pytest.approx(.5, abs=.01) and xi.var() == pytest.approx(1/12, abs=.005)
    assert torch.histc(xi, 8, 0, 1).min() > .95*xi.numel()/8 and xi.unique().numel() > .6*min(xi.numel(), 2**16)

@pytest.mark.parametrize('n', [0, 72])
def test_logits_stay_where_they_can_come_back(n):
    # a target of 0 leaves the logits to the task, which moves them up and down
    learn, cb = learner(), RBSparsityCallback(0, mask_lr=20., freeze_pct=1)
    if n: Sparsifier(learn.model, 'weight', 'local', large_final).sparsify_layer(learn.model[0], 50)
    watch, seen = collect('after_batch', lambda l: torch.cat([s.flatten() for s in cb.logits.values()]))
    fit(learn, 3, [cb, watch])
    for s in seen: assert int(s.isneginf().sum()) == n and s[~s.isneginf()].abs().max() <= 8
    assert max(s[~s.isneginf()].abs().max() for s in seen) == 8

@pytest.mark.parametrize('loss', [math.nan, math.inf])
def test_logits_rest_where_gradients_are_not_finite(loss):
    "Without mixed precision, and where another callback cancels the step"
    cb, n = soft('rb', freeze_pct=1), []
    before, was = collect('before_step', lambda l: copies(cb.logits), 0)
    after, now = collect('after_step', lambda l: copies(cb.logits))
    def spoil(learn):
        n.append(0)
        if len(n) == 5: learn.loss_grad = learn.loss_grad*loss
    def spare(learn):
        if not all(p.grad.isfinite().all() for p in learn.model.parameters()): raise CancelStepException
    fit(plain_sgd(), 2, [cb, before, after, at('after_loss', spoil), at('before_step', spare, 70)])
    assert [same(a, b) for a,b in zip(was, now)] == [i == 4 for i in range(12)]
    assert all(s.isfinite().all() for s in cb.logits.values())

def test_the_same_seed_the_same_masks():
    "The same seed gives the same masks, and torch's global generator is not used"
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
    "Index of the first batch with hard masks, which must then stay; the learner; nonzero weights after each epoch"
    learn, cb, seen = learner(), soft(kind, **kwargs), []
    def look(learn):
        seen.append((cb.frozen, masks(learn.model), copies(getattr(cb.soft, 'logits', {})),
                     [w.detach().clone() for w in weights(learn.model, ALL)]))
    settled, last = collect('after_epoch', lambda l: [w != 0 for w in weights(l.model, ALL)])
    fit(learn, n_epoch, [cb, at('before_batch', look), settled])
    first = next((i for i,s in enumerate(seen) if s[0]), len(seen))
    for _,m,logits,ws in seen[first:]:
        assert all_same(m, seen[first][1]) and same(logits, seen[first][2]) and all_same(m, [w != 0 for w in ws])
        assert len(m) == 3
    assert not any(s[0] or s[1] for s in seen[:first]) and all_same(last[-1], masks(learn.model))
    if first < len(seen)-1: assert not all_same(seen[first][3], seen[-1][3])
    check_sparse(learn)
    return first, learn, last

@pytest.mark.parametrize('pct,first', [(.25, 6), (.5, 12), (.6, 15), (.75, 18), (1, 24), (.01, 1)])
@both
def test_frozen_from_a_share_of_the_fit(kind, pct, first):
    at_batch, learn, _ = frozen_at(kind, 4, freeze_pct=pct, schedule=Schedule(lin.sched_func, end_pct=min(pct, .5)))
    assert at_batch == first
    if kind == 'rb': assert [l == 0 for l in column(learn, 'rb_loss')] == [6*e >= first for e in range(4)]

@pytest.mark.parametrize('schedule,first', [(None, 12), (lin, 24), (Schedule(lin.sched_func, end_pct=.6), 15)])
@both
def test_not_frozen_before_the_schedule_ends(kind, schedule, first):
    assert frozen_at(kind, 4, freeze_pct=.1, schedule=schedule)[0] == first

SCHEDULES = dict(polynomial=Polynomial(.1, .6, 3, 2), exponential=Exponential(.1, .6, 3, 2),
                 adaptive=Adaptive(.1, .6, 3, 1, .2),
                 multistep=Multistep(sparsity_freeze_epoch=3, multistep_steps=(1,), multistep_sparsity_levels=(.2, .6)),
                 moving=Polynomial(.1, .6, 3, 2, update_per_optimizer_step=True))

@pytest.mark.parametrize('name', SCHEDULES)
@both
def test_frozen_from_an_epoch(kind, name):
    "From the epoch of the freeze on, masks are those that the epoch before was validated with"
    first, learn, ends = frozen_at(kind, 5, schedule=SCHEDULES[name])
    assert first == 18 and all_same(ends[2], ends[-1]) and column(learn)[2] == column(learn)[4]
    if kind == 'rb': assert column(learn, 'rb_loss')[3:] == [0, 0] and all(column(learn, 'rb_loss')[:3])

@both
def test_frozen_from_the_start(kind):
    first, learn, _ = frozen_at(kind, 2, schedule=Polynomial(.3, .6, 0, 2))
    assert first == 0 and (kind == 'rb' or n_zero(learn) == n_zeros(.3, N_ALL))

@pytest.mark.parametrize('s',
                         [Polynomial(.1, .6, 6, 4), Adaptive(.1, .6, 6, step=.1),
                          Multistep(multistep_steps=(2, 4), multistep_sparsity_levels=(.1, .3, .6))],
                         ids=['polynomial', 'adaptive', 'multistep'])
@both
def test_a_fit_that_starts_later(kind, s):
    "Epochs before `start_epoch` count as reached"
    if kind == 'rb' and isinstance(s, Adaptive): return   # RB has no sparsity to measure before it starts
    learn = learner()
    cb, (levels, seen) = soft(kind, schedule=s), collect('before_batch', lambda l: cb.level)
    fit(learn, 6, [cb, levels], start_epoch=3)
    assert seen == [l for l in s.levels(6)[3:] for _ in range(6)]
    if kind == 'magnitude': assert n_zero(learn) == n_zeros(s.levels(6)[-1], N_ALL)

@both
def test_a_fit_that_starts_after_the_freeze(kind):
    "A fit that starts after the freeze takes the masks from the zeros of the weights"
    learn, cb, s = learner(), soft(kind, schedule=Polynomial(.1, .6, 3, 2)), Polynomial(.1, .6, 3, 2)
    fit(learn, 5, [cb, at('after_epoch', lambda l: l.save('m') if l.epoch == 3 else None)])
    other, again = learner(), soft(kind, schedule=s)
    other.load('m')
    zero = [w == 0 for w in weights(other.model, ALL)]
    assert sum(int(z.sum()) for z in zero) == n_zero(learn)
    fit(other, 5, again, start_epoch=4)
    assert all_same(zero, [w == 0 for w in weights(other.model, ALL)])

# --- 6. levels

def ends_of(learn, cb, n_epoch, *cbs, **kwargs):
    "Raw weights at the start of each epoch; level, zeros by layer and weights at its end"
    raw, levels = [], []
    begin = at('before_train', lambda l: raw.append(copies(cb.params)))
    end = at('after_epoch',
             lambda l: levels.append((cb.level, [int((p == 0).sum()) for p in cb.params.values()], copies(cb.params))))
    fit(learn, n_epoch, [cb, begin, end, *cbs], **kwargs)
    return raw, levels

@pytest.mark.parametrize('importance', ['abs', 'normed_abs'])
@pytest.mark.parametrize('context', ['global', 'local', erdos_renyi_sparsity])
def test_the_least_important_are_dropped(context, importance):
    "As many weights as the level says are dropped, in all or in each layer, and they are the least important"
    s = Polynomial(.1, .8, 4, 3)
    learn, cb = learner(4), soft('magnitude', schedule=s, context=context, weight_importance=importance)
    with torch.no_grad(): learn.model[0].weight.mul_(4)
    raw, ends = ends_of(learn, cb, 6)
    score = lambda w: w.abs()/(w.norm() if importance == 'normed_abs' else 1)
    for ws,(level,zs,now) in zip(raw[:4], ends):
        scores = [(score(ws[n])[now[n] == 0].max().item() if (now[n] == 0).any() else 0.,
                   score(ws[n])[now[n] != 0].min().item()) for n in ws]
        assert sum(zs) == n_zeros(level, N_ALL) and all(d <= k for d,k in scores)
        if context == 'global': assert max(d for d,_ in scores) <= min(k for _,k in scores)
        if context == 'local': assert all(abs(z-level*p.numel()) <= 1 for z,p in zip(zs, cb.params.values()))
    assert [l for l,*_ in ends] == [*s.levels(4), s.levels(4)[-1], s.levels(4)[-1]]
    shares = [z/p.numel() for z,p in zip(ends[-1][1], cb.params.values())]
    assert (max(shares)-min(shares) < .02) == (context == 'local')

@both
def test_the_column_shows_the_measured_sparsity(kind):
    learn, cb = learner(4), soft(kind)
    _, ends = ends_of(learn, cb, 5)
    assert column(learn) == [round(100*sum(z)/N_ALL, 2) for _,z,_ in ends] and sum(ends[-1][1]) == n_zero(learn)
    extra = ['sparsity', 'rb_loss'] if kind == 'rb' else ['sparsity']
    assert list(learn.recorder.metric_names) == ['epoch', 'train_loss', 'valid_loss', *extra, 'accuracy', 'time']
    assert all(len(v) == 3+len(extra) for v in learn.recorder.values)
    fit(learn, 1)
    assert 'sparsity' not in learn.recorder.metric_names

@pytest.mark.parametrize('schedule,levels',
                         [(None, [.35, .7, .7, .7]), (Schedule(sched_one_shot), [.7]*4), (agp, None), (cos, None),
                          (lin, [.175, .35, .525, .7]), (sched_no, [0.]*4)])
@both
def test_levels_of_a_schedule_in_percent(kind, schedule, levels):
    cb = soft(kind, schedule=schedule)
    _, ends = ends_of(learner(4), cb, 4)
    if levels is None: levels = [.7*schedule.progress((e+1)/4) for e in range(4)]
    assert [l for l,*_ in ends] == pytest.approx(levels)

@pytest.mark.parametrize('steps', [None, 10])
@both
def test_a_level_for_each_batch(kind, steps):
    learn, s = learner(), Polynomial(.1, .6, 4, 3, update_per_optimizer_step=True, steps_per_epoch=steps)
    cb = soft(kind, schedule=s)
    watch, seen = collect('before_backward', lambda l: (cb.level, n_zero(l)))
    fit(learn, 5, [cb, watch, Watch(cb)])
    assert [l for l,_ in seen[:24]] == [s.level(e, i, 6) for e in range(4) for i in range(6)]
    assert len({l for l,_ in seen[24:]}) == 1
    if kind == 'magnitude': assert [z for _,z in seen] == [n_zeros(l, N_ALL) for l,_ in seen]
    else: assert column(learn, 'rb_loss')[4] == 0 < column(learn, 'rb_loss')[3]

@pytest.mark.parametrize('start,rises', [(None, False), (-2., True)])
def test_an_adaptive_level_waits_for_rb(start, rises):
    "The level rises only once it is reached: never with all weights kept, always with nearly all dropped"
    learn, cb = learner(), RBSparsityCallback(schedule=Adaptive(.1, .5, step=.1), mask_lr=1e-6)
    if start:
        cb.load_state_dict({'logits': {n: torch.full_like(learn.model.get_parameter(f'{n}.weight'), start)
                                       for n in ('0', '3', '8')}})
    _, ends = ends_of(learn, cb, 5)
    assert [l for l,*_ in ends] == pytest.approx([.2, .3, .4, .5, .5] if rises else [.2]*5)

def test_an_adaptive_level_of_magnitudes():
    learn = learner()
    _, ends = ends_of(learn, soft('magnitude', schedule=Adaptive(.1, .5, 4, step=.1, patience=2)), 6)
    assert [sum(z) for _,z,_ in ends] == [n_zeros(l, N_ALL) for l in (.1, .2, .2, .3, .3, .3)]

def blobs(n, bs=16, d=16):
    g = torch.Generator().manual_seed(1)
    centres, y = torch.randn(4, d, generator=g), torch.randint(4, (n*bs,), generator=g)
    return list(zip((centres[y] + .7*torch.randn(n*bs, d, generator=g)).split(bs), y.split(bs)))

def blob_net():
    return nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 32), nn.BatchNorm1d(32),
                         nn.ReLU(), nn.Linear(32, 4))

@pytest.mark.parametrize('schedule', [None, Polynomial(.05, .7, 5, 2)], ids=['line', 'polynomial'])
@pytest.mark.parametrize('context', ['global', 'local'])
def test_rb_lands_on_its_target(context, schedule):
    learn = learner(model=blob_net(), dls=loaders(40, blobs))
    with warnings.catch_warnings():
        warnings.filterwarnings('error', '.*has (reached|come)')
        fit(learn, 6, RBSparsityCallback(None if schedule else 70, schedule, mask_lr=.1, context=context), lr=5e-3)
    shares = [float((w == 0).float().mean()) for w in weights(learn.model, nn.Linear)]
    assert abs(n_zero(learn)/1664 - .7) < .01 and column(learn, 'accuracy')[-1] > .9
    if context == 'local': assert all(abs(s-.7) < .03 for s in shares)
    else: assert max(shares)-min(shares) > .1
    check_sparse(learn)

@pytest.mark.parametrize('cb,why',
                         [(partial(RBSparsityCallback, 70, mask_lr=1e-3), 'reached 0.00 % of 70.00 %.*mask_lr'),
                          (partial(MagnitudeSparsityCallback, schedule=Polynomial(.1, .7, 9, 4, power=1.)),
                           'reached 25.00 % of 70.00 %.*the fit ended'),
                          (partial(MagnitudeSparsityCallback, schedule=Polynomial(.1, .7, 1, 4)),
                           'reached 10.00 % of 70.00 %.*frozen')])
def test_a_target_that_was_not_reached_is_warned_about(cb, why):
    with pytest.warns(UserWarning, match=f'{cb.func.__name__} has {why}'): fit(learner(), 2, cb())

def test_a_target_that_was_reached_is_not():
    with warnings.catch_warnings():
        warnings.filterwarnings('error', '.*has (reached|come)')
        fit(learner(), 2, soft('magnitude'))
        fit(learner(), 2, soft('magnitude', schedule=lin))

# --- 7. copies, files, interrupted fits, and calls that change nothing

@pytest.mark.parametrize('when', ['after_epoch', 'after'])
@both
def test_export_and_load(kind, when):
    learn, cb = learner(dls=exportable(5)), soft(kind)
    learn.add_cb(cb)
    def export(learn):
        if learn.epoch == 1 and when == 'after_epoch': copied_by(take, lambda l: l.export('l.pkl'))
    take = at('after_epoch', export)
    zero = collect('after_epoch', lambda l: [w == 0 for w in weights(l.model, ALL)])
    fit(learn, 4, [take, zero[0]])
    if when == 'after': learn.export('l.pkl')
    check_sparse(learn)
    other = load_learner('l.pkl')
    assert all_same(zero[1][-1 if when == 'after' else 1], [w == 0 for w in weights(other.model, ALL)])
    assert when == 'after_epoch' or all_same(masks(learn.model), masks(other.model))
    other.dls = loaders()
    fit(other, 4)
    check_sparse(other)
    if kind == 'magnitude': assert n_zero(other) == n_zero(learn) == n_zeros(.7, N_ALL)

def zeros_of(path):
    return sum(int((t == 0).sum()) for n,t in torch.load(path).items() if n in ('0.weight', '3.weight', '8.weight'))

@both
def test_what_is_saved_after_each_epoch(kind):
    "Files saved after an epoch hold the masked weights that were validated, with the keys of a dense model"
    learn, cb = learner(4), soft(kind)
    keys = list(learn.model.state_dict())
    own = at('after_epoch', lambda l: torch.save(l.model.state_dict(), f'own_{l.epoch}.pth'), 0)
    validated, seen = collect('before_validate', lambda l: snapshot(l.model))
    fit(learn, 5, [cb, own, validated, SaveModelCallback(every_epoch=True)])
    for e,c in enumerate(column(learn)):
        for f in (f'models/model_{e}.pth', f'own_{e}.pth'): assert round(100*zeros_of(f)/N_ALL, 2) == c > 0
        saved = torch.load(f'models/model_{e}.pth')
        assert list(saved) == keys and all(torch.equal(saved[k], v) for k,v in seen[e].items() if 'running' not in k)

@pytest.mark.parametrize('event', ['after_epoch', 'before_epoch', 'after_validate'])
@both
def test_what_is_loaded_between_epochs_takes_effect(kind, event):
    "Weights loaded between epochs take effect, also the masked ones"
    learn, cb = learner(4), soft(kind, freeze_pct=1)
    learn.save('dense')
    dense = copies(dict(learn.model.named_parameters()))
    raw, seen = collect('before_train', lambda l: snapshot(l.model))
    fit(learn, 4, [cb, raw, at(event, lambda l: l.load('dense') if l.epoch == 2 else None)])
    at_epoch = 2 if event == 'before_epoch' else 3
    assert [all(torch.equal(s[n], t) for n,t in dense.items()) for s in seen] == [e in (0, at_epoch) for e in range(4)]
    check_sparse(learn)

STOPS = ['before_epoch', 'before_train', 'before_batch', 'after_pred', 'after_loss', 'before_backward',
         'after_backward', 'before_step', 'after_step', 'after_batch',
         'after_train', 'before_validate', 'after_validate', 'after_epoch']

def broken_off(kind, event, exc=RuntimeError('stop'), beside=()):
    "A learner whose second epoch was interrupted at `event`, its callback, and the masks of that moment"
    learn, cb, then = learner(dls=exportable(5)), soft(kind), {}
    def stop(learn):
        if cb.n_epochs != 1 or learn.training and event in STOPS[2:10] and learn.iter != 4: return
        then.update(copies(masks_of(cb)))
        raise exc
    with pytest.raises(type(exc)): fit(learn, 4, [cb, at(event, stop), *beside])
    assert then and cb.learn is None
    return learn, cb, then

@in_a_loop('event', STOPS)
@both
def test_weights_after_an_interrupted_fit(kind, event):
    "An interrupted fit leaves masked weights, except between backward pass and end of batch, or before the first batch"
    learn, cb, then = broken_off(kind, event, KeyboardInterrupt())
    for n,p in cb.params.items(): assert p.all() if event in RAW else torch.equal(p == 0, ~then[n])

@defect('the weights below the mask are still there while the next batch is loaded')
@both
def test_weights_after_a_fit_interrupted_while_loading(kind):
    class Broken(list):
        def __getitem__(self, i):
            if i == 4 and cb.n_epochs: raise KeyboardInterrupt
            return super().__getitem__(i)
    learn, cb = learner(dls=loaders(6, lambda n: Broken(images(n)))), soft(kind)
    with pytest.raises(KeyboardInterrupt): fit(learn, 3, cb)
    assert n_zero(learn) > 0

@pytest.mark.parametrize('event', ['before_epoch', 'after_pred', 'after_backward', 'after_step', 'after_train'])
@both
def test_fits_after_one_that_broke_off(kind, event):
    "After an interrupted fit: plain fits, fits with the same callback or another, copies and exports"
    for again in (None, 'same', 'other'):
        learn, cb, then = broken_off(kind, event)
        if again is None: learn.export('l.pkl'), deepcopy(learn.model), deepcopy(cb), pickle.dumps(cb)
        new = {None: None, 'same': cb, 'other': soft(kind)}[again]
        before = {n: p.detach().clone() for n,p in cb.params.items()}
        fit(learn, 3,
            new or at('before_step', lambda l: [check_some(p.grad, ~then[n]) for n,p in cb.params.items()], 0))
        if new: check_sparse(learn)
        else:
            assert masks(learn.model) == [] and n_zero(learn) == 0
            assert not any(torch.equal(before[n], p) for n,p in cb.params.items())
        if kind == 'magnitude' and new: assert n_zero(learn) == n_zeros(.7, N_ALL)

def check_some(t, at): assert t[at].any()

@both
def test_a_plain_fit_after_one_that_broke_off_while_it_accumulated(kind):
    learn, cb, then = broken_off(kind, 'after_pred', beside=[GradientAccumulation(16)])
    fit(learn, 1, at('before_step', lambda l: [check_some(p.grad, ~then[n]) for n,p in cb.params.items()], 0))

@both
def test_a_fit_after_one_that_broke_off_ends_without_hooks(kind):
    learn, cb, then = broken_off(kind, 'after_pred')
    fit(learn, 3, soft(kind))
    check_sparse(learn)

@in_a_loop('event,order', [*((e, 66) for e in STOPS[:13]), ('before_batch', 0), ('before_step', 0), ('after_train', 0)])
@both
def test_what_is_saved_of_an_epoch_that_was_cancelled(kind, event, order):
    learn, cb = learner(4), soft(kind)
    def stop(learn):
        if cb.n_epochs == 1 and (learn.iter == 2 or event not in STOPS[2:10]): raise CancelEpochException
    watch, seen = collect('after_epoch', n_zero)
    fit(learn, 3, [cb, at(event, stop, order), watch])
    assert all(seen)

@in_a_loop('event,order,level',
           [('before_epoch', 0, 2/3), ('before_epoch', 66, 2/3), ('before_train', 0, 2/3), ('after_epoch', 66, 2/3),
            ('before_train', 66, 1), ('after_loss', 66, 1), ('after_step', 66, 1), ('after_validate', 66, 1),
            ('after_epoch', 0, 1)])
def test_a_fit_that_is_cancelled_ends_at_the_level_of_that_moment(event, order, level):
    learn, cb = learner(4), soft('magnitude')
    def stop(learn):
        if cb.n_epochs == 1 and (learn.iter == 2 or event not in STOPS[2:10]): raise CancelFitException
    fit(learn, 3, [cb, at(event, stop, order)])
    assert n_zero(learn) == n_zeros(.7*level, N_ALL)

LOOKS = dict(validate=lambda l: l.validate(), preds=lambda l: l.get_preds(),
             train_loss=lambda l: l.get_preds(ds_idx=0, with_loss=True),
             lr_find=lambda l: l.lr_find(num_it=6, show_plot=False, suggest_funcs=None), summary=lambda l: l.summary(),
             fit0=lambda l: l.fit(0))

def looked(learn, look):
    with learn.no_bar(), learn.no_logging(): printed(lambda: LOOKS[look](learn))

@in_a_loop('look', LOOKS)
@both
def test_looking_after_a_fit_changes_nothing(kind, look):
    cb = soft(kind)
    learn = learner(4, cbs=cb)
    fit(learn, 4)
    before, was, logits = snapshot(learn.model), masks(learn.model), copies(getattr(cb.soft, 'logits', {}))
    looked(learn, look)
    assert same(before, snapshot(learn.model)) and all_same(was, masks(learn.model))
    assert same(logits, getattr(cb.soft, 'logits', {})) and cb.level == .7

@both
def test_validation_is_of_masked_weights(kind):
    learn, cb, seen = learner(), soft(kind), []
    def look(m, args, name):
        if learn.model.training: return
        zero = m.weight == 0
        seen.append(torch.equal(zero, ~masks_of(cb)[name]) and bool(zero.any()))
    for n,m in learn.model.named_modules():
        if isinstance(m, ALL): m.register_forward_pre_hook(partial(look, name=n))
    fit(learn, 4, cb)
    assert len(seen) == 4*2*3 and all(seen)

def test_logits_of_a_checkpoint():
    "A new callback continues from loaded logits, and starts anew without them"
    learn, cb, saved = learner(), soft('rb', freeze_pct=1), []
    assert cb.logits == {} == cb.state_dict()['logits']
    def save(learn):
        if learn.epoch == 1: learn.save('m'), torch.save(cb.state_dict(), 'rb.pth'), saved.append(copies(cb.logits))
    fit(learn, 4, [cb, at('after_epoch', save)])
    assert not same(saved[0], cb.logits)
    other, again = learner(), RBSparsityCallback(70, freeze_pct=1)
    other.load('m')
    again.load_state_dict(torch.load('rb.pth'))
    begin, begun = collect('before_train', lambda l: copies(again.soft.logits))
    fit(other, 4, [again, begin], start_epoch=2)
    assert same(begun[0], saved[0]) and same(again.logits, again.state_dict()['logits'])
    assert not same(again.logits, saved[0])
    assert same(torch.load('rb.pth')['logits'], saved[0])
    check_sparse(other)
    again.load_state_dict({'logits': {'0': torch.zeros(3)}})
    with pytest.raises(ValueError, match="'0' of shape \\(3,\\)"): fit(learner(), 1, again)

# --- 8. before and after other ways to sparsify

def by_callback(learn): fit(learn, 2, sparse(40, layer_type=ALL, context='global'))
def at_once(learn): Sparsifier(learn.model, 'weight', 'local', large_final, layer_type=nn.Conv2d).sparsify_model(40)
def dynamically(learn):
    sparsify_model(learn.model, .4, seed=0)
    fit(learn, 2, DynamicSparseTrainingCallback(**{**RigL_presets, 'batches_per_update': 2}))
def from_zeros(learn):
    at_once(learn)
    bake_masks(learn)
    masks_from_zeros(learn.model)
def by_filters(learn): Sparsifier(learn.model, 'filter', 'local', large_final).sparsify_model(50)

@pytest.mark.parametrize('sparsity', [10, 70])
@pytest.mark.parametrize('before', [by_callback, at_once, dynamically, from_zeros, by_filters])
@both
def test_what_was_dropped_before_stays_dropped(kind, before, sparsity):
    "Weights masked before the fit stay zero and count for the level"
    learn, cb = learner(), soft(kind, sparsity, freeze_pct=1)
    before(learn)
    had = {id(p): ~mask for *_,p,mask in masked_params(learn.model)}
    own = sum(int((~m).sum()) for m in (kept(l) for l in (learn.model[0], learn.model[3], learn.model[8])))
    had = {k: v.clone() for k,v in had.items()}
    def look(learn): return not any(p[had[id(p)]].any() for p in learn.model.parameters() if id(p) in had)
    watch, seen = collect('before_backward', look)
    after, steps = collect('after_step', look)
    _, ends = ends_of(learn, cb, 4, watch, after)
    assert own > 0 and all(seen) and all(steps) and len(seen) == 24 and cb.hard_share() == own/N_ALL
    assert all(level >= own/N_ALL and sum(z) >= own for level,z,_ in ends)
    if kind == 'magnitude' and before is by_callback:
        assert [sum(z) for _,z,_ in ends] == [max(own, n_zeros(sparsity/100*s, N_ALL)) for s in (.5, 1, 1, 1)]
    check_sparse(learn)
    if kind == 'rb':
        assert all(torch.equal(cb.soft.logits[n].isneginf(), had[id(p)]) for n,p in cb.params.items() if id(p) in had)
        assert not any(s.isnan().any() for s in cb.soft.logits.values())

@both
def test_what_was_dropped_before_stays_dropped_in_a_second_fit(kind):
    learn, cb = learner(), soft(kind)
    by_callback(learn)
    dropped = [~m for m in masks(learn.model)]
    fit(learn, 2, cb)
    assert not any(w[d].any() for w,d in zip(weights(learn.model, ALL), dropped))
    watch, seen = collect('before_backward',
                          lambda l: stays_zero(l, dropped))
    fit(learn, 3, [cb, watch])
    assert all(seen)

@pytest.mark.parametrize('context', ['global', 'local'])
@both
def test_a_layer_that_is_sparser_than_the_level(kind, context):
    "A layer sparser than the level stays so; the other layers share the rest"
    learn, cb = learner(4), soft(kind, 30, context=context, freeze_pct=1)
    Sparsifier(learn.model, 'weight', 'local', large_final, layer_type=None).sparsify_layer('0', 90)
    was = kept(learn.model[0])
    _, ends = ends_of(learn, cb, 4)
    assert not (kept(learn.model[0]) & ~was).any() and all(level >= n_zeros(.9, 144)/N_ALL for level,*_ in ends)
    if kind == 'magnitude':
        zs = ends[-1][1]
        if context == 'global': assert sum(zs) == n_zeros(.3, N_ALL)
        else: assert zs[1:] == [n_zeros(.3, 1152), n_zeros(.3, 64)]
    check_sparse(learn)

@pytest.mark.parametrize('context', ['local', 'global'])
@both
def test_sparsify_callback_after_soft_masks(kind, context):
    "SparsifyCallback continues from the sparsity that soft masks have reached; no dropped weight comes back"
    learn = fit(learner(4), 3, soft(kind))
    dropped, n = [~m for m in masks(learn.model)], n_zero(learn)
    watch, seen = collect('after_batch',
                          lambda l: (n_zero(l), not any(w[d].any() for w,d in zip(weights(l.model, ALL), dropped))))
    fit(learn, 3, [sparse(90, layer_type=ALL, context=context, update_every=1), watch])
    counts = [z for z,_ in seen]
    assert n_zero(learn) == n_zeros(.9, N_ALL) and counts == sorted(counts) and counts[0] >= n
    assert all(h for _,h in seen)

@both
def test_masks_in_later_fits_of_other_kinds(kind):
    "Masks are kept by a plain fit and by constant sparsity, changed by dynamic training, and removed by a bake"
    learn = fit(learner(4), 3, soft(kind, 50))
    n, was = n_zero(learn), masks(learn.model)
    watch, seen = collect('after_step', lambda l: follows_masks(l.model))
    fit(learn, 2, watch)
    fit(learn, 2, [watch, cb := ConstSparsityCallback()])
    assert all(seen) and all_same(was, masks(learn.model)) and cb.zeros_at_start.percent == pytest.approx(100*n/N_ALL)
    assert column(learn) == [round(cb.zeros_at_start.percent, 2)]*2
    fit(learn, 2, DynamicSparseTrainingCallback(**{**SET_presets, 'batches_per_update': 2}))
    assert n_zero(learn) == n and not all_same(was, masks(learn.model))
    before = snapshot(learn.model)
    bake_masks(learn)
    assert same(before, snapshot(learn.model)) and masks(learn.model) == []
    assert not any(isinstance(c, KeepMasks) for c in learn.cbs)
    other = convnet()
    other.load_state_dict(learn.model.state_dict())
    with pytest.raises(AssertionError): check_sparse(fit(learn, 1))

@both
def test_soft_masks_after_a_bake(kind):
    "Zeros of baked masks are ordinary weights, and may come back"
    learn, cb = learner(4), soft(kind)
    fit(learn, 3, cb)
    bake_masks(learn)
    fit(learn, 3, cb)
    check_sparse(learn)
    if kind == 'magnitude': assert n_zero(learn) == n_zeros(.7, N_ALL)

@both
def test_two_callbacks_on_two_layers(kind):
    learn, one = learner(4), soft(kind, 50, layers=['0'])
    two = MagnitudeSparsityCallback(80, layers=['3', '8'], context='local')
    fit(learn, 3, [one, two, Watch(one), Watch(two)])
    assert learn.recorder.metric_names.count('sparsity') == 1
    assert column(learn, 'sparsity_2')[-1] == round(100*n_zeros(.8, 1152+64)/(1152+64), 2)
    assert column(learn)[-1] == round(100*zeros(learn.model[:1])/144, 2) and list(one.report().layer) == ['0']
    assert list(two.report().layer) == ['3', '8']
    check_sparse(learn)

@both
def test_two_callbacks_on_one_layer_are_refused(kind):
    learn = learner()
    before = snapshot(learn.model)
    with pytest.raises(ValueError, match="both.*'3'.*layers="):
        fit(learn, 1, [soft(kind, layers=['0', '3']), MagnitudeSparsityCallback(80, layers=['3', '8'])])
    assert same(before, snapshot(learn.model)) and masks(learn.model) == [] and not has_hooks(learn.model)
    fit(learn, 2, soft(kind))
    check_sparse(learn)

@pytest.mark.parametrize('first', [True, False])
@both
def test_beside_a_sparsifying_callback(kind, first):
    "Weights that SparsifyCallback drops in the same fit stay dropped and count for the level"
    learn, cb, other = learner(4), soft(kind, 30, freeze_pct=1), sparse(70, layer_type=ALL, update_every=1)
    watch, seen = collect('after_batch', lambda l: mask_sparsity(l.model))
    fit(learn, 4, [cb, other, watch] if first else [other, cb, watch])
    assert seen == sorted(seen) and seen[-1] == pytest.approx(n_zeros(.7, N_ALL)/N_ALL)
    assert n_zero(learn) >= n_zeros(.7, N_ALL)
    check_sparse(learn)

def half_empty(share=.5):
    learn, g = learner(4), torch.Generator().manual_seed(1)
    for w in weights(learn.model, ALL): w.data[torch.rand(w.shape, generator=g) < share] = 0
    return learn, [w == 0 for w in weights(learn.model, ALL)]

def stays_zero(learn, zero): return not any(w[z].any() for w,z in zip(weights(learn.model, ALL), zero))

def rewrites(learn):
    with torch.no_grad():
        for p in learn.model.parameters(): p.mul_(64).floor_().add_(.5).div_(64)

FITS = dict(plain=lambda: [], rewritten=lambda: [at('after_step', rewrites, 5)],
            frozen=lambda: [at('before_fit', freeze, -30)], sparsify=lambda: [sparse(70, layer_type=ALL)],
            sparsify_global=lambda: [sparse(70, layer_type=ALL, context='global', update_every=1)],
            little=lambda: [sparse(20, layer_type=ALL)], clip=lambda: [GradientClip(.1)],
            accumulate=lambda: [GradientAccumulation(24)], amp=lambda: [OnCPU()], rb=lambda: [soft('rb')],
            magnitude=lambda: [soft('magnitude')], magnitude_little=lambda: [soft('magnitude', 20)])

@pytest.mark.parametrize('first', [True, False], ids=['first', 'last'])
@pytest.mark.parametrize('beside', FITS)
def test_constant_zeros(beside, first, request):
    "Zeros stay in training and validation, whatever else is in the fit; live weights are trained"
    if beside == 'little': request.applymarker(defect('a target below what is zero takes the masks back to it'))
    learn, zero = half_empty()
    cb, others, before = ConstSparsityCallback(), FITS[beside](), snapshot(learn.model)
    watch, seen = collect('after_batch',
                          lambda l: beside in ('rb', 'magnitude', 'magnitude_little') or stays_zero(l, zero))
    valid, shown = collect('before_validate', lambda l: stays_zero(l, zero))
    fit(learn, 3, [cb, *others, watch, valid] if first else [*others, cb, watch, valid])
    assert stays_zero(learn, zero) and follows_masks(learn.model) and all(seen) and all(shown)
    assert cb.zeros_at_start.percent == pytest.approx(100*sum(int(z.sum()) for z in zero)/N_ALL)
    assert not same(before, snapshot(learn.model))
    if beside == 'rewritten': assert learn.model[3].weight.unique().numel() < 60
    n = n_zero(learn)
    fit(learn, 1)
    assert n_zero(learn) == n

def test_constant_zeros_of_some_layers():
    for kwargs,want in ((dict(layers=['0']), [0]), (dict(layer_type=nn.Linear), [8]), (dict(layer_type=ALL), [0, 3, 8]),
                        (dict(layer_type=nn.Conv2d, layers='3'), [3])):
        learn, zero = half_empty()
        fit(learn, 1, ConstSparsityCallback(**kwargs))
        still_zero = [i for i,z in zip((0, 3, 8), zero) if not learn.model[i].weight[z].any()]
        assert still_zero == [i for i in (0, 3, 8) if get_mask(learn.model[i]) is not None] == want

def test_the_column_is_of_the_layers_that_are_meant():
    learn, zero = half_empty()
    fit(learn, 1, ConstSparsityCallback(layers=['0']))
    assert column(learn)[-1] == round(100*int(zero[0].sum())/144, 2)

def test_constant_zeros_of_a_layer_that_is_not_there():
    with pytest.raises(ValueError, match='nope'): fit(learner(), 1, ConstSparsityCallback(layers=['nope']))

def test_nothing_to_keep():
    learn = learner()
    with pytest.warns(UserWarning, match='no zero'): fit(learn, 1, ConstSparsityCallback())
    assert masks(learn.model) == [] and column(learn) == [0]

def test_constant_zeros_twice_and_copied():
    learn, zero = half_empty()
    cb = ConstSparsityCallback()
    fit(learn, 1, [cb, cb])
    assert list(learn.recorder.metric_names).count('sparsity') == 1
    fit(learn, 2, deepcopy(cb))
    assert stays_zero(learn, zero)
    for look in ('validate', 'preds', 'lr_find', 'summary', 'fit0'):
        learn.add_cb(cb)
        before, was = snapshot(learn.model), masks(learn.model)
        looked(learn, look)
        learn.remove_cb(cb)
        assert same(before, snapshot(learn.model)) and all_same(was, masks(learn.model))

# --- 9. models of all kinds

class Twice(nn.Module):
    "A network that calls one layer twice, and two of whose layers share a weight"
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2)
        self.mid, self.lin, self.out = nn.Linear(72, 72), nn.Linear(72, 72), nn.Linear(72, 4)
        self.lin.weight = self.mid.weight
    def forward(self, x):
        return self.out(self.lin(self.mid(self.bn(self.conv(self.conv(x))).relu().flatten(1)).relu()).relu())

class Words(nn.Module):
    def __init__(self, mid, **kwargs):
        super().__init__()
        self.emb, self.norm, self.mid, self.out = nn.Embedding(20, 8, **kwargs), nn.BatchNorm1d(8), mid, nn.Linear(8, 4)
    def forward(self, x):
        x = self.norm(self.emb(x).movedim(2, 1)).movedim(1, 2)
        x,*_ = self.mid(x, x, x) if isinstance(self.mid, nn.MultiheadAttention) else self.mid(x)
        return self.out(x.mean(1))

def words(n): return list(zip(torch.randint(20, (n, 8, 5)), torch.randint(4, (n, 8))))

def doubles(n): return [(x.double(), y) for x,y in images(n)]

def bf16(n): return [(x.bfloat16(), y) for x,y in images(n)]

class Float(nn.Module):
    def forward(self, x): return x.float()

class Alone(nn.Module):
    def forward(self, x): return x,

def around(layer, n): return nn.Sequential(layer, nn.Flatten(), nn.BatchNorm1d(n), nn.Linear(n, 4))

def mlp():
    return nn.Sequential(nn.Flatten(), nn.Linear(72, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 4))

def sliced():
    net = mlp()
    net[1].weight = nn.Parameter(torch.randn(12, 144)[:,::2])
    return net

def turned():
    net = mlp()
    net[1].weight = nn.Parameter(torch.randn(72, 12).t())
    return net

lstm = lambda: nn.LSTM(8, 8, batch_first=True)
MODELS = dict(tied_and_twice=Twice, mlp=mlp, turned=turned,
              channels_last=lambda: convnet().to(memory_format=torch.channels_last),
              pointwise=lambda: nn.Sequential(nn.Conv2d(2, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1),
                                              nn.AdaptiveAvgPool2d(1), nn.Flatten()),
              pointwise_last=lambda: nn.Sequential(
                  nn.Conv2d(2, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1), nn.AdaptiveAvgPool2d(1),
                  nn.Flatten()).to(memory_format=torch.channels_last),
              grouped=lambda: around(nn.Conv2d(2, 8, 3, groups=2), 128),
              transposed=lambda: around(nn.ConvTranspose2d(2, 4, 3), 256),
              doubles=(lambda: convnet().double(), doubles),
              bfloat16=(lambda: nn.Sequential(*convnet().bfloat16(), Float()), bf16),
              embedding=(lambda: Words(Alone()), words), lstm=(lambda: Words(lstm()), words),
              attention=(lambda: Words(nn.MultiheadAttention(8, 2, batch_first=True)), words),
              dropped=(lambda: Words(WeightDropout(lstm(), .3)), words),
              one_weight=lambda: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(2, 1, 1), nn.Flatten(),
                                               nn.Linear(1, 1, bias=False), nn.BatchNorm1d(1), nn.Linear(1, 4)))

@pytest.mark.parametrize('model', MODELS)
@both
def test_models_of_all_kinds(kind, model):
    make, data = MODELS[model] if isinstance(MODELS[model], tuple) else (MODELS[model], images)
    learn, cb = learner(model=make(), dls=loaders(4, data)), soft(kind, layer_type=None)
    params = dict(learn.model.named_parameters())
    forms = {n: (p.dtype, p.stride()) for n,p in learn.model.named_parameters()}
    fit(learn, 4, [cb, Watch(cb)])
    assert forms == {n: (p.dtype, p.stride()) for n,p in learn.model.named_parameters()}
    assert all(params[n] is p for n,p in learn.model.named_parameters())
    assert [n for n,*_ in maskable_weights(learn.model)] == list(cb.params) == list(cb.report().layer)
    n = sum(p.numel() for p in cb.params.values())
    want = n_zeros(.7, n) if kind == 'magnitude' else round(column(learn)[-1]*n/100)
    assert model == 'one_weight' or sum(int((p == 0).sum()) for p in cb.params.values()) == want > 0
    if model == 'tied_and_twice': assert learn.model.lin.weight is learn.model.mid.weight and n == 36 + 72*72 + 288
    check_sparse(learn)
    fit(learn, 1)
    assert follows_masks(learn.model)

@both
def test_a_parameter_that_is_a_slice(kind):
    learn, cb = learner(model=sliced()), soft(kind)
    fit(learn, 3, [cb, Watch(cb)])

@pytest.mark.parametrize('kwargs,why', [(dict(max_norm=.5), 'renormalizes its weight'),
                                        (dict(sparse=True), 'sparse gradients')])
@both
def test_embeddings_that_can_not_have_one_are_refused(kind, kwargs, why):
    learn = learner(model=Words(Alone(), **kwargs), dls=loaders(6, words), opt_func=SGD)
    before = copies(dict(learn.model.named_parameters()))
    with pytest.raises(ValueError, match=f"'emb'.*{why}"): fit(learn, 3, soft(kind, layer_type=None))
    assert all(torch.equal(p, before[n]) for n,p in learn.model.named_parameters())

WRAPPED = dict(parallel=nn.DataParallel, compiled=partial(torch.compile, backend='eager'))

@pytest.mark.parametrize('wrap', WRAPPED)
@both
def test_a_model_that_is_wrapped(kind, wrap):
    ends = []
    for f in (lambda m: m, WRAPPED[wrap]):
        learn, cb = learner(4), soft(kind)
        inner, learn.model = learn.model, f(learn.model)
        fit(learn, 3, cb)
        ends.append(snapshot(inner))
    assert same(*ends) and list(cb.params) == ['0', '3', '8'] and follows_masks(learn.model)

class SameNoise(Stirred):
    "Draws noise that does not depend on the memory format of the weights"
    def make_masks(self):
        soft = super().make_masks()
        soft._uniform = lambda s: torch.full_like(s, float(soft.rng.random_raw(1)[0] % 97 + 1)/99)
        return soft

@both
def test_channels_last_makes_no_difference(kind):
    ends = []
    for form in (torch.contiguous_format, torch.channels_last):
        set_seed(0)
        learn = learner(4, model=convnet().to(memory_format=form), opt_func=SGD)
        cb = SameNoise(70) if kind == 'rb' else soft(kind)
        fit(learn, 3, cb)
        ends.append((masks(learn.model), [w.detach().clone() for w in weights(learn.model, ALL)]))
    assert all_same(ends[0][0], ends[1][0])
    for a,b in zip(ends[0][1], ends[1][1]): torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)

def test_rb_warns_without_batchnorm():
    net = nn.Sequential(nn.Flatten(), nn.Linear(72, 12), nn.ReLU(), nn.Linear(12, 4))
    with pytest.warns(UserWarning, match='BatchNorm'): fit(learner(model=net), 1, soft('rb'))
    with warnings.catch_warnings():
        warnings.filterwarnings('error', '.*BatchNorm')
        fit(learner(), 1, soft('rb'))
        fit(learner(model=deepcopy(net)), 1, soft('magnitude'))

@pytest.mark.parametrize('layer_type,names',
                         [(nn.Conv2d, ['0', '3']), (nn.Linear, ['8']), ((nn.Conv2d, nn.Linear), ['0', '3', '8']),
                          (None, ['0', '3', '8'])])
@both
def test_layers_of_a_type_or_by_name(kind, layer_type, names):
    for kwargs in (dict(layer_type=layer_type), dict(layers=names)):
        learn, cb = learner(4), soft(kind, **kwargs)
        fit(learn, 3, cb)
        assert list(cb.params) == names
        assert [n for n,m in learn.model.named_modules() if get_mask(m) is not None] == names
        assert [n for n,m in learn.model.named_modules() if isinstance(m, ALL) and (m.weight == 0).any()] == names

WRONG = dict(context=['globally', None, 3], freeze_pct=[0, 1.5, -1, True, '.5', math.nan],
             sparsity=[120, -5, '70', True], schedule=['agp', 3, lambda pos: 2*pos])
OF_ONE = dict(rb=dict(mask_lr=[0, -1., math.nan, math.inf, True], p=[0, -.05, math.inf], seed=[-1, 1.5, 'a', True]),
              magnitude=dict(weight_importance=['l2', None]))
CHOICES = dict(context="'global'", weight_importance="'normed_abs', 'abs'", freeze_pct='above 0 and up to 1',
               sparsity='0 to 100', schedule='agp|0 to 1', mask_lr='positive', p='positive', seed='whole number')

@pytest.mark.parametrize('kind,name,value',
                         [(k, n, v) for k in CLASSES for n,vs in {**WRONG, **OF_ONE[k]}.items() for v in vs])
def test_a_wrong_value_is_named_with_the_choices(kind, name, value):
    with pytest.raises((ValueError, TypeError), match=CHOICES[name]) as e:
        CLASSES[kind](**{'sparsity': 70, name: value})
    assert repr(value) in str(e.value) or name == 'schedule' and callable(value) or str(value) in str(e.value)

@pytest.mark.parametrize('kind,name,value',
                         [('rb', 'mask_lr', 'fast'), ('rb', 'mask_lr', None), ('rb', 'p', 'small'),
                          ('magnitude', 'weight_importance', ['abs'])])
def test_a_value_of_a_wrong_type_is_named(kind, name, value):
    with pytest.raises((ValueError, TypeError), match=f'{name} (is|must be) '): CLASSES[kind](70, **{name: value})

@both
def test_a_target_is_given_once(kind):
    for args in ((None, None), (70, Polynomial()), (None, agp)):
        with pytest.raises(ValueError, match='sparsity='): CLASSES[kind](*args)
    with pytest.warns(UserWarning, match='0.7'): CLASSES[kind](.7)

def parametrized():
    net = convnet()
    parametrize.register_parametrization(net[3], 'weight', nn.Identity())
    return net

BAD = dict(name=(convnet, dict(layers=['0', 'nope']), "'nope'.*'0', '3', '8'"),
           one=(convnet, dict(layers='nope'), "'nope'.*'0', '3', '8'"),
           kind=(convnet, dict(layer_type=nn.Conv3d), 'No layer.*Sequential'),
           parametrized=(parametrized, {}, "'3' is parametrized"))

@pytest.mark.parametrize('bad', BAD)
@both
def test_what_does_not_fit_the_model_is_refused_before_anything_changes(kind, bad):
    make, kwargs, named = BAD[bad]
    learn = learner(model=make())
    before, n_cbs = snapshot(learn.model), len(learn.cbs)
    with pytest.raises(ValueError, match=named): fit(learn, 1, soft(kind, schedule=Polynomial(.3, .7, 3, 2), **kwargs))
    assert same(before, snapshot(learn.model)) and masks(learn.model) == [] and len(learn.cbs) == n_cbs
    assert not has_hooks(learn.model)

@pytest.mark.parametrize('n', [-5, 1.5, '2048', True])
def test_samples_for_batchnorm_are_a_whole_number(n):
    with pytest.raises(ValueError, match=f'samples.*{n}'):
        MagnitudeSparsityCallback(schedule=Polynomial(.3, .7), num_bn_adaptation_samples=n)

@both
def test_a_layer_type_is_a_class(kind):
    with pytest.raises(ValueError, match='layer_type.*Conv2d'): fit(learner(), 1, soft(kind, layer_type='Conv2d'))

# --- 10. reports

stats = json.loads((Path(__file__).parent.parent/'golden'/'nncf.json').read_text())['statistics']
GOLDEN = {c['config']['algorithm'] + '_'*('ignored_scopes' in c['config']): c for c in stats['cases']}

def golden_learner():
    net = nn.Sequential()
    for n,m in dict(conv=nn.Conv2d(1, 3, 2), bn=nn.BatchNorm2d(3), flat=nn.Flatten(), fc=nn.Linear(3, 2),
                    fc2=nn.Linear(2, 2, bias=False)).items():
        net.add_module(n, m)
    for n,v in stats['params'].items(): net.get_parameter(n).data.copy_(torch.tensor(v).view_as(net.get_parameter(n)))
    dls = DataLoaders(*[DataLoader([(torch.randn(4, 1, 2, 2), torch.randint(2, (4,)))], bs=None) for _ in range(2)],
                      device='cpu')
    return Learner(dls, net, loss_func=CrossEntropyLossFlat(), opt_func=SGD)

@pytest.mark.parametrize('name', GOLDEN)
def test_statistics(name):
    "NNCF's statistics, except that NNCF drops both weights of a tie at the threshold"
    case, learn = GOLDEN[name], golden_learner()
    cb = callbacks_from_config(SparsityConfig.from_json(case['config']), learn)[0]
    fit(learn, 1, cb, lr=0.)
    want, const = case['model_statistics'], name == 'const_sparsity'
    df = sparsity_report(learn.model, layer_type=CONV_AND_LINEAR) if const else cb.report()
    tie = int('normed' not in name and name == 'magnitude_sparsity')
    assert df.attrs['model_params'] == 33 and df.attrs['model_zeros'] == round(33*want['model_level']) - tie
    assert df.zeros.sum()+tie == round(want['sparsified_layers_level']*df.params.sum())
    assert len(df) == len(want['layers'])
    for row,layer in zip(df.itertuples(), want['layers']):
        assert f'[{row.layer}]' in layer['id'] and list(row.shape) == layer['shape']
        assert abs(row.zeros - layer['level']*row.params) < 1e-6 + tie
        if not const:
            assert row.threshold == pytest.approx(case['thresholds'][layer['id']], rel=1e-5)
            assert row.level_pct == 100*case['target_sparsity_level']
    if const: assert cb.zeros_at_start.percent == pytest.approx(100*want['sparsified_layers_level'])

@pytest.mark.parametrize('name', [n for n in GOLDEN if n[0] == 'm'])
def test_shares_are_of_what_is_sparsified(name):
    case, learn = GOLDEN[name], golden_learner()
    cb = callbacks_from_config(SparsityConfig.from_json(case['config']), learn)[0]
    fit(learn, 1, cb, lr=0.)
    assert cb.report().share_pct.tolist() == pytest.approx([l['percent_of_sparsified_weights']
                                                            for l in case['model_statistics']['layers']])

def test_the_loss_along_a_schedule():
    "With constant logits the loss is the squared difference to the level, in units of 5 %"
    rows = json.loads((Path(__file__).parent.parent/'golden'/'nncf.json').read_text())['rb_schedule_to_loss']['rows']
    learn = learner()
    fit(learn, 4, RBSparsityCallback(schedule=Polynomial(.2, .6, 3, 2, power=1.), mask_lr=1e-9))
    assert column(learn, 'rb_loss') == pytest.approx([rows[0]['loss'], rows[1]['loss'], (.6/.05)**2, rows[2]['loss']],
                                                     rel=1e-4)

@pytest.mark.parametrize('context', ['global', 'local'])
@both
def test_the_report(kind, context):
    learn, cb, seen = learner(4), soft(kind, context=context, freeze_pct=1), []
    with pytest.raises(ValueError, match='before a fit'): cb.report()
    fit(learn, 4,
        [cb,
         at('after_epoch',
            lambda l: seen.append((cb.report(), cb.level, copies(cb.params), copies(getattr(cb.soft, 'logits', {})))))])
    for df,level,ps,logits in [*seen,
                               (cb.report(), cb.level, copies(cb.params), copies(getattr(cb.soft, 'logits', {})))]:
        own = 'threshold' if kind == 'magnitude' else 'probability'
        assert list(df) == ['layer', 'type', 'shape', 'params', 'zeros', 'sparsity_pct', 'share_pct', 'bytes',
                            'packed_bytes', 'level_pct', own, 'note']
        assert df.layer.tolist() == ['0', '3', '8'] and df.zeros.tolist() == [int((p == 0).sum()) for p in ps.values()]
        assert df.share_pct.sum() == pytest.approx(100)
        assert df.level_pct.tolist() == [100*level]*3
        assert df.attrs['model_params'] == sum(p.numel() for p in learn.model.parameters())
        assert df.attrs['model_zeros'] >= df.zeros.sum()
        if kind == 'magnitude':
            assert df.threshold.nunique() == (1 if context == 'global' else 3) and (df.threshold > 0).all()
        else: assert df.probability.tolist() == pytest.approx([s.sigmoid().mean().item() for s in logits.values()])
    text = format_report(df)
    assert 'Level asked for: 70.00%' in text and f'{own}: ' in text and 'Model' in text and 'not zero' not in text

@both
def test_the_log(kind):
    "One row for each new mask (RB: for each batch until the freeze); each fit starts a new log"
    learn, cb = learner(), soft(kind)
    assert list(cb.log) == ['epoch', 'asked_pct', 'sparsity_pct'] and len(cb.log) == 0
    watch, seen = collect('before_backward',
                          lambda l: 100*sum(int((s <= 0).sum()) for s in cb.soft.logits.values())/N_ALL if kind == 'rb'
                          else 0)
    for n_epoch in (4, 2):
        seen.clear()
        fit(learn, n_epoch, [cb, watch])
        n, asked = 6*n_epoch*3//4, [35.]*6 + [70.]*12 if n_epoch == 4 else [70.]*9
        if kind == 'rb': want = [i/6 for i in range(n)], asked, seen[:n]
        else: want = [0, *range(n_epoch)], [35., 35., 70., 70., 70.] if n_epoch == 4 else [70.]*3, None
        for name,values in zip(cb.log, want):
            if values is not None: assert cb.log[name].tolist() == pytest.approx(values)
        if kind == 'magnitude':
            assert cb.log.sparsity_pct.tolist() == pytest.approx([100*n_zeros(a/100, N_ALL)/N_ALL
                                                                  for a in cb.log.asked_pct])
    measured, ax = cb.log.sparsity_pct.tolist(), cb.plot()
    lines = {l.get_label(): l for l in ax.lines}
    assert lines['measured'].get_ydata().tolist() == measured
    assert lines['asked for'].get_ydata().tolist() == cb.log.asked_pct.tolist()
    assert all(l.get_xdata().tolist() == cb.log.epoch.tolist() for l in ax.lines) and cb.plot(ax) is ax

@both
def test_the_log_by_batch(kind):
    s = Polynomial(.1, .6, 2, 2, update_per_optimizer_step=True)
    learn, cb = learner(), soft(kind, schedule=s)
    fit(learn, 3, cb)
    start = 2 if kind == 'magnitude' else 0   # at the start of the fit, and of its first epoch
    at, asked = cb.log.epoch.tolist()[start:], cb.log.asked_pct.tolist()[start:]
    assert len(at) == (11 if kind == 'magnitude' else 12) and asked == pytest.approx([100*s.level(e) for e in at])

@pytest.mark.parametrize('importance', ['abs', 'normed_abs'])
@pytest.mark.parametrize('context', ['global', 'local'])
def test_thresholds(context, importance):
    "The threshold is the largest importance of a masked weight"
    learn = learner(opt_func=SGD)
    cb = soft('magnitude', context=context, weight_importance=importance, schedule=Schedule(sched_one_shot))
    raw, ends = ends_of(learn, cb, 1, lr=0.)
    score = {n: (w.abs()/(w.norm() if importance == 'normed_abs' else 1.))[ends[0][2][n] == 0].max().item()
             for n,w in raw[0].items()}
    want = list(score.values()) if context == 'local' else [max(score.values())]*3
    assert cb.report().threshold.tolist() == pytest.approx(want, rel=1e-5)

def test_weights_are_back_where_the_adaptation_fails():
    class Broken(list):
        def __getitem__(self, i): raise RuntimeError('no such file')
    learn = learner(dls=DataLoaders(DataLoader(Broken(images(4)), bs=None), DataLoader(images(2), bs=None),
                                    device='cpu'))
    before = snapshot(learn.model)
    with pytest.raises(RuntimeError, match='no such file'):
        fit(learn, 1, soft('magnitude', schedule=Polynomial(.4, .7, 3, 2), num_bn_adaptation_samples=8))
    assert same(before, snapshot(learn.model)) and masks(learn.model) == []

@pytest.mark.parametrize('n', [8, 30])
def test_batchnorm_is_adapted_to_the_first_masks(n):
    "Adaptation uses as many batches as hold the samples and restores raw weights; the fit still sees all batches"
    s, learn = Polynomial(.4, .7, 3, 2), learner()
    net, dense = deepcopy(learn.model), snapshot(learn.model)
    raw, seen = collect('before_train', lambda l: snapshot(l.model))
    data, batches = collect('before_batch', lambda l: l.xb[0])
    fit(learn, 1, [soft('magnitude', schedule=s, num_bn_adaptation_samples=n), raw, data])
    Sparsifier(net, 'weight', 'global', weight_importances['normed_abs'], layer_type=ALL).sparsify_model(40)
    adapt_batchnorm(net, learn.dls.train, n)
    assert all(torch.equal(seen[0][k], v if 'running' not in k and 'tracked' not in k else net.state_dict()[k])
               for k,v in dense.items())
    assert not torch.equal(seen[0]['4.running_mean'], dense['4.running_mean'])
    assert all_same(batches, [x for x,_ in learn.dls.train])

@pytest.mark.filterwarnings('ignore:The schedule')
@pytest.mark.parametrize('first', ['const', 'soft'])
def test_a_configuration_with_two_algorithms(first):
    "With const and magnitude sparsity, initial zeros stay and the rest follows the schedule"
    (learn, zero), const = half_empty(.2), {'algorithm': 'const_sparsity'}
    mag = {'algorithm': 'magnitude_sparsity', 'sparsity_init': .05,
           'params': {'schedule': 'multistep', 'multistep_steps': [1], 'multistep_sparsity_levels': [.1, .6],
                      'sparsity_freeze_epoch': 3}}
    cbs = callbacks_from_config(SparsityConfig.from_json([const, mag] if first == 'const' else [mag, const]), learn)
    fit(learn, 1, cbs)
    assert stays_zero(learn, zero)
    fit(learn, 4, cbs)
    assert stays_zero(learn, zero) and n_zero(learn) == n_zeros(.6, N_ALL)
