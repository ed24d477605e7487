"Each test checks the right behaviour for a defect of fasterai 0.4.1's callback; counts and layers have their own files"
import math
from fastai.callback.schedule import SchedCos
from functools import partial

import pytest
from fastai.basics import L, ValueMetric
from fastai.callback.tracker import SaveModelCallback
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from callback_helpers import (
    all_same, at, at_batch, collect, convnet, dead_filters, fit, follows_masks, learner, loaders, masks, N, printed,
    raising, same, snapshot, sparse, weights, zeros)
from fastai.basics import nn, torch
from fasterai_sparse.core.criteria import random_criteria
from fasterai_sparse.core.masks import masked_params
from fasterai_sparse.core.schedules import agp, iterative, one_cycle, one_shot
from fasterai_sparse.core.select import n_zeros
from fasterai_sparse.train.keep_masks import copy_masks
from fasterai_sparse.train.updates import bake_masks

pytestmark = [pytest.mark.usefixtures('in_tmp'),
              *(pytest.mark.filterwarnings(f'ignore:{w}') for w in ('numpy.core is deprecated', 'The loaded weights'))]

TARGET = n_zeros(.9, N)

def lottery(schedule=one_shot, **kwargs): return sparse(schedule=schedule, lth=True, **kwargs)

# --- reports

def test_the_log_is_the_schedule_not_the_model():
    out = printed(lambda: fit(learner(), 1, sparse(granularity='filter', verbose=True)))
    share = f'{100*(7*18 + 14*72)/N:.2f}%'
    assert f'end of epoch 0: {share}' in out and f'Final Sparsity: {share}' in out

def test_the_last_batch_is_short_of_the_end():
    for n,n_epoch in ((7, 3), (11, 3), (1, 6)):
        assert zeros(fit(learner(n), n_epoch, sparse(schedule=agp)).model) == TARGET

def test_no_matching_layer_reports_success():
    with pytest.raises(ValueError, match='No layer of type Conv3d'): fit(learner(), 1, sparse(layer_type=nn.Conv3d))

def test_an_unknown_name_reports_success():
    with pytest.raises(ValueError, match="No layer 'conv1'.*'0', '3'"): fit(learner(), 1, sparse({'conv1': 50}))

def test_validate_prints_the_whole_banner():
    learn = learner(cbs=sparse(verbose=True))
    with learn.no_bar(): assert printed(learn.validate) == ''

# --- masks in later fits

def test_a_plain_fit_afterwards_loses_the_zeros():
    assert zeros(fit(fit(learner(), 2, sparse()), 1).model) == TARGET

def test_a_second_fit_with_the_same_callback_starts_dense():
    cb, (watch, seen) = sparse(), collect('after_batch', lambda learn: zeros(learn.model))
    fit(fit(learner(), 2, cb), 2, [cb, watch])
    assert set(seen) == {TARGET}

def test_save_model_callback_fails_to_reload():
    learn = learner()
    learn.metrics = L(ValueMetric(lambda: float(learn.epoch == 1), 'pick'))
    fit(learn, 4, [sparse(), SaveModelCallback(monitor='pick')])
    assert zeros(learn.model) == n_zeros(.45, N)

def test_lr_find_fails_with_the_callback_installed():
    learn = learner(cbs=sparse())
    with learn.no_logging(), learn.no_bar(): learn.lr_find(num_it=5, show_plot=False)
    assert zeros(learn.model) == 0 and zeros(fit(learn, 2).model) == TARGET

def test_a_checkpoint_of_the_middle_does_not_load():
    fit(learner(), 2, [sparse(), at_batch(5, lambda learn: learn.save('mid'))])
    assert zeros(learner().load('mid').model) == n_zeros(.45, N)

def interrupted(cb):
    learn = learner()
    with pytest.raises(KeyboardInterrupt): fit(learn, 2, [cb, at_batch(8, raising(KeyboardInterrupt()))])
    return learn

def test_an_interrupted_fit_leaves_buffers():
    learn = interrupted(sparse())
    keys = convnet().state_dict().keys()
    assert learn.model.state_dict().keys() == keys and bake_masks(learn).model.state_dict().keys() == keys
    assert {n for n,_ in learn.model.named_buffers()} == {n for n,_ in convnet().named_buffers()}

def test_an_interrupted_fit_leaves_the_schedule_dirty():
    values = [agp.progress(i/20) for i in range(21)]
    interrupted(sparse(schedule=agp))
    assert [agp.progress(i/20) for i in range(21)] == values
    watch, seen = collect('after_epoch', lambda learn: zeros(learn.model))
    fit(learner(), 2, [sparse(schedule=agp), watch])
    assert seen == [n_zeros(.9*agp.progress(.5), N), TARGET]

# --- dropped weights

def test_the_shadow_of_an_ema_has_no_zeros():
    learn = learner()
    ema = AveragedModel(learn.model, multi_avg_fn=get_ema_multi_avg_fn(.9))
    def average(learn): copy_masks(learn.model, ema).update_parameters(learn.model)
    fit(learn, 2, [sparse(), at('after_batch', average)])
    pairs = list(zip(weights(ema), weights(learn.model), strict=True))
    assert zeros(ema) == TARGET and all(torch.equal(e != 0, w != 0) and not torch.equal(e, w) for e,w in pairs)

def test_batchnorm_of_dead_filters_regrows():
    learn = fit(fit(learner(), 2, sparse(granularity='filter')), 2)
    conv, bn = learn.model[3:5]
    dead = dead_filters(conv.weight)
    assert dead.sum() == 14 and not any(p[dead].any() for p in (conv.bias, bn.weight, bn.bias))

def test_momentum_stays_on_pruned_weights():
    def past(learn):
        states = [(learn.opt.state[p], ~mask) for *_,p,mask in masked_params(learn.model)]
        return [bool(s[k][dropped].any()) for s,dropped in states for k in ('grad_avg', 'sqr_avg')]
    watch, seen = collect('after_batch', past)
    fit(learner(), 2, [sparse(schedule=one_shot), watch])
    assert seen[5] == [False]*4

def test_a_pruned_inf_becomes_nan():
    def few(p, **kwargs): return p.abs().nan_to_num(posinf=0.)   # ranks what overflowed last
    def overflow(learn):
        if learn.train_iter == 5: learn.model[3].weight.data[0,0] = math.inf
    learn = learner()
    fit(learn, 2, [sparse(criteria=few, schedule=one_shot), at('after_step', overflow, order=5)])
    assert zeros(learn.model) == TARGET and learn.model[3].weight.isfinite().all()

# --- lottery tickets

def test_lth_with_one_cycle_resets_at_every_step():
    with pytest.raises(ValueError, match='one_shot, iterative.*update_every='): lottery(one_cycle)

def test_lth_resets_pretrained_batchnorm_to_defaults():
    learn = fit(learner(), 2)
    start, (watch, seen) = snapshot(learn.model[1]), collect('after_batch', lambda learn: snapshot(learn.model[1]))
    fit(learn, 2, [lottery(), watch])
    assert same(seen[5], start) and not same(start, snapshot(nn.BatchNorm2d(8)))

def test_lth_keeps_optimizer_state():
    flags = {'do_wd', 'force_train'}
    watch, seen = collect('after_batch', lambda learn: [k for s in learn.opt.state.values() for k in s.keys()-flags])
    fit(learner(), 2, [lottery(), watch])
    assert seen[4] and not seen[5] and seen[6]

def test_lth_crashes_on_embedding():
    model = nn.Sequential(nn.Embedding(20, 8), nn.Flatten(), nn.Linear(40, 4))
    dls = loaders(6, make=lambda n: list(zip(torch.randint(20, (n,8,5)), torch.randint(4, (n,8)))))
    weight = lambda learn: learn.model[0].weight.detach().clone()
    start, (watch, seen) = model[0].weight.detach().clone(), collect('after_batch', weight)
    fit(learner(model=model, dls=dls), 2, [lottery(sparsity=50, layer_type=nn.Embedding), watch])
    assert torch.equal(seen[5], start*(seen[5] != 0)) and int((seen[5] == 0).sum()) == 80

def test_tickets_are_misnamed(tmp_path):
    fit(learner(), 2, lottery(save_tickets='t', granularity='filter'))
    file, = (tmp_path/'t').iterdir()
    t = torch.load(file, weights_only=True)
    n = sum(int((t[k] == 0).sum()) for k in ('0.weight', '3.weight'))
    assert n == 7*18 + 14*72 and file.name == f'winning_ticket_{100*n/N:.2f}.pth'

def test_save_model_saves_rewound_weights():
    learn, cb = learner(), lottery()
    fit(learn, 2, cb)
    cb.sparsifier.save_model('m.pth', weights_only=True)
    assert same(torch.load('m.pth'), snapshot(learn.model)) and follows_masks(learn.model)

# --- wrapped and frozen

def test_under_data_parallel_names_gain_module_and_nothing_is_pruned():
    learn, cb = learner(model=nn.DataParallel(convnet())), sparse({'0': 50, '3': 90})
    fit(learn, 2, cb)
    assert [int((w==0).sum()) for w in weights(learn.model)] == [72, n_zeros(.9, 1152)]
    assert list(cb.sparsifier.report().layer) == ['0', '3']

def test_random_masks_of_two_ranks_disagree():
    "Random masks differ between ranks, as their generators do; test_distributed.py runs two ranks"
    def rank(i):
        draws = at('before_batch', lambda learn: torch.rand(i))
        return masks(fit(learner(), 2, [sparse(criteria=random_criteria), draws]).model)
    one, other = rank(0), rank(7)
    assert all_same(one, other) and not one[0].all()

def test_frozen_layers_get_pruned():
    learn = learner()
    learn.model[3].requires_grad_(False)
    frozen = learn.model[3].weight.detach().clone()
    fit(learn, 2, sparse())
    assert torch.equal(learn.model[3].weight, frozen) and zeros(learn.model) == n_zeros(.9, 144)

# --- schedules

def test_a_partial_of_iterative_fails():
    watch, seen = collect('after_epoch', lambda learn: zeros(learn.model))
    fit(learner(), 10, [sparse(schedule=partial(iterative, n_steps=5)), watch])
    assert seen == [n_zeros(s/100, N) for s in (0, 0, 18, 36, 36, 54, 72, 72, 90, 90)]

def test_fastais_annealers_fail():
    watch, seen = collect('after_epoch', lambda learn: zeros(learn.model))
    fit(learner(), 2, [sparse(schedule=SchedCos(0, 1)), watch])
    assert seen == [n_zeros(.45, N), TARGET]

def test_lambdas_fail():
    watch, seen = collect('after_epoch', lambda learn: zeros(learn.model))
    fit(learner(), 2, [sparse(schedule=lambda pos: pos**2), watch])
    assert seen == [n_zeros(.225, N), TARGET]
