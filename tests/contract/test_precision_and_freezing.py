"""All callbacks: mixed precision, accumulated gradients and frozen layers.

Each test runs for all of `kinds.KINDS`; what only one callback does is tested in its own folder."""
import pytest, torch
from fastai.callback.training import GradientAccumulation, GradientClip

from callback_helpers import (
    all_same, at, at_batch, collect, fit, follows_masks, masks, OnCPU, printed, raising, split, zeros_hold)
from cases import in_a_loop
from fasterai_sparse.train.keep_masks import KeepMasks
from kinds import changing, check_end, kinds, LAYERS, n_zero, quiet, randomly_masked, ready, values

pytestmark = quiet

# --- mixed precision, gradients that are accumulated or clipped

@kinds
@pytest.mark.parametrize('mode', ['fp16', 'bf16'])
def test_mixed_precision(name, mode):
    kind, learn, n, cb = ready(name)
    dtypes = set()
    learn.model[3].register_forward_hook(lambda m, x, out: dtypes.add(out.dtype) if learn.training else None)
    learn.add_cb(OnCPU(mode))
    steps, holds = collect('after_step', lambda learn: kind.soft or zeros_hold(learn))
    fit(learn, 3, [cb, steps])
    check_end(kind, learn, n)
    assert len(holds) == 18 and all(holds) and all(w.dtype == torch.float32 for w in values(learn))
    last = n_zero(learn)
    fit(learn, 2, KeepMasks())
    assert n_zero(learn) == last and dtypes == {dict(fp16=torch.float16, bf16=torch.bfloat16)[mode]}

@kinds
@in_a_loop('to', ['to_fp16', 'to_bf16'])
def test_to_half_precision_and_back(name, to):
    kind, learn, n, cb = ready(name)
    getattr(learn, to)()
    fit(learn, 3, [cb, GradientClip(.1)])
    check_end(kind, learn, n)
    fit(learn.to_fp32(), 3, cb)
    check_end(kind, learn, n)

@kinds
@in_a_loop('skipped', [{0}, {3, 4}, {1, 5, 6, 7}, {17}, {16, 17}])
def test_gradients_that_overflow(name, skipped):
    "Masks do not change in a skipped step, and the target is reached even if the last step is skipped"
    if name == 'gradient' and 17 in skipped: return   # no gradients to score by in the last batch
    kind, learn, n, cb = ready(name)
    amp, count, finite = OnCPU(), [], []
    def spoil(learn):
        if len(count) in skipped: learn.loss_grad = learn.loss_grad*torch.inf
        count.append(0)
    watch = at('after_batch', lambda learn: finite.append(all(p.isfinite().all() for p in learn.model.parameters())))
    fit(learn, 3, [cb, amp, at('before_backward', spoil), watch])
    check_end(kind, learn, n)
    assert set(amp.overflows) == skipped and len(finite) == 18 and all(finite)

@kinds
@in_a_loop('n_acc', [16, 24, 1000])
def test_gradient_accumulation(name, n_acc):
    kind, learn, n, cb = ready(name, 7)
    fit(learn, 3, [cb, GradientAccumulation(n_acc), GradientClip(.1)])
    check_end(kind, learn, n)
    last = n_zero(learn)
    fit(learn, 1, [KeepMasks(), GradientAccumulation(n_acc)])
    assert n_zero(learn) == last

# --- frozen layers

def train(learn, on, which=slice(None)):
    "Freeze or unfreeze weights and drop their gradients, which fastai would use in its next step"
    for m in [m for m in learn.model if isinstance(m, LAYERS)][which]: m.weight.requires_grad_(on).grad = None
    learn.opt = None   # it has only the parameters that were trainable when it was made

@changing
@in_a_loop('after', ['nothing', 'a fit', 'an interrupted fit', 'an interrupted wait'])
def test_where_all_is_frozen_it_waits(name, after):
    "While all layers are frozen, masks and weights stay and the columns of the epoch table are filled"
    kind, learn, n, cb = ready(name)
    if name == 'GraNet': randomly_masked(learn)   # it waits only where there are masks
    learn.add_cb(cb)
    if after == 'a fit': fit(learn, 2)
    if after == 'an interrupted fit':
        with pytest.raises(KeyboardInterrupt): fit(learn, 2, at_batch(8, raising(KeyboardInterrupt())))
        if kind.soft: return   # soft masks are gone
    train(learn, False)
    if after == 'an interrupted wait':
        with pytest.raises(KeyboardInterrupt): fit(learn, 1, at_batch(2, raising(KeyboardInterrupt())))
    was, before = masks(learn.model), values(learn)
    printed(lambda: fit(learn, 2))
    names, rows = list(learn.recorder.metric_names), learn.recorder.values
    assert all_same(before, values(learn)) and names[3:-2] == list(kind.columns)
    assert [len(r) for r in rows] == [len(names)-2]*2
    if not n_zero(learn) and 'sparsity' in kind.columns: assert [r[2] for r in rows] == [0, 0]
    if not kind.soft: assert all_same(was, masks(learn.model))
    train(learn, True)
    fit(learn, 3)
    check_end(kind, learn, n)

@changing
def test_a_frozen_layer_is_left_alone(name):
    kind, learn, n, cb = ready(name)
    train(learn, False, slice(1))
    before = values(learn)[0]
    fit(learn, 3, cb)
    assert torch.equal(before, values(learn)[0]) and follows_masks(learn.model) and n_zero(learn) > 0

@kinds
def test_fine_tune(name):
    "`fine_tune` trains the head alone at first, then all layers"
    kind, learn, n, cb = ready(name, splitter=split)
    bodies = []
    look = at('before_fit', lambda learn: bodies.append((values(learn), masks(learn.model))), 0)
    fit(learn, 4, [cb, look], 'fine_tune', freeze_epochs=2, base_lr=1e-2)
    (first, masks0), (second, masks1) = bodies
    assert len(bodies) == 2 and all_same(first[:2], second[:2])
    if masks0: assert all_same(masks0[:2], masks1[:2])
    check_end(kind, learn, n)
    last = n_zero(learn)
    learn.freeze()
    fit(learn, 1, KeepMasks())
    assert n_zero(learn) == last
