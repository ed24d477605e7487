"SparsifyCallback together with the rest of fastai: other callbacks, wrapped models, applications, restarts"
import random, subprocess, sys
from fractions import Fraction
from pathlib import Path

import pandas as pd, pytest
from fastai.basics import (CancelBackwardException, CancelBatchException, CancelEpochException,
                           CancelFitException, CancelStepException, CancelTrainException, L, Lamb, Larc, Lookahead,
                           OptimWrapper, RAdam, Recorder, TrainEvalCallback, load_learner, params, ranger)
from fastai.callback.core import FetchPredsCallback
from fastai.callback.data import CollectDataCallback
from fastai.callback.channelslast import ChannelsLast
from fastai.callback.hook import ActivationStats
from fastai.callback.mixup import CutMix, MixUp
from fastai.callback.progress import CSVLogger
from fastai.callback.tracker import EarlyStoppingCallback, ReduceLROnPlateau, TerminateOnNaNCallback
from fastai.callback.training import BnFreeze, GradientAccumulation, GradientClip
from fastai.data.block import CategoryBlock, DataBlock
from fastai.data.transforms import IndexSplitter, ItemGetter
from fastai.interpret import Interpretation
from fastai.layers import ConvLayer, PixelShuffle_ICNR
from fastai.tabular.all import Categorify, Normalize, TabularDataLoaders, tabular_learner
from fastai.text.all import (AWD_LSTM, WeightDropout, awd_lstm_clas_config, awd_lstm_lm_config,
                             language_model_learner, text_classifier_learner)
from fastai.vision.augment import Resize
from fastai.vision.core import TensorImage, TensorMask
from fastai.vision.data import ImageBlock
from fastai.vision.learner import unet_learner, vision_learner
from fastai.vision.models.xresnet import xresnet18
from sklearn.datasets import load_digits
from torchvision.models import resnet18

from callback_helpers import (
    all_same, at, at_batch, collect, convnet, dead_filters, fit, follows_masks, learner, loaders, masks, N, OnCPU,
    optimizer_state, printed, raising, same, snapshot, sparse, split, weights, zeros, zeros_hold)
from fastai.basics import (
    accuracy, Callback, CrossEntropyLossFlat, DataLoader, DataLoaders, nn, partial, set_seed, torch)
from fasterai_sparse.core.criteria import grad_crit, large_final, movement, updating_movement, wanda
from fasterai_sparse.core.masks import masked_params
from fasterai_sparse.core.schedules import agp, dsd, lin, one_shot
from fasterai_sparse.core.select import n_zeros
from fasterai_sparse.core.from_zeros import masks_from_zeros
from fasterai_sparse.train.keep_masks import KeepMasks
from fasterai_sparse.train.sparsify_callback import SparsifyCallback
from fasterai_sparse.train.updates import bake_masks

OPTIMIZERS = dict(ranger=ranger, lamb=Lamb, larc=Larc, radam=RAdam,
                  lookahead=lambda ps, **kw: Lookahead(RAdam(ps, **kw), k=3),
                  foreach=partial(OptimWrapper, opt=torch.optim.AdamW, foreach=True, amsgrad=True),
                  fused=partial(OptimWrapper, opt=torch.optim.AdamW, fused=True),
                  nesterov=partial(OptimWrapper, opt=torch.optim.SGD, momentum=.9, nesterov=True, weight_decay=.1))

pytestmark = [pytest.mark.filterwarnings(f'ignore:{w}') for w in
              ('numpy.core is deprecated', 'load_learner', '__array__ implementation', 'You are shadowing an attribute',
               '`torch.nn.utils.weight_norm` is deprecated', 'The given NumPy array is not writable')]
pytestmark.append(pytest.mark.usefixtures('in_tmp'))

def watching(event='after_batch'): return collect(event, lambda learn: zeros(learn.model))

def counts(learn): return [int((w==0).sum()) for w in weights(learn.model)]

def epoch_lines(out): return [l for l in out.splitlines() if 'end of epoch' in l]

def total(model, kinds): return sum(w.numel() for w in weights(model, kinds))

# --- the callback object

def test_one_object_in_two_fits_starts_its_schedule_anew():
    cb, learn = sparse(verbose=True, criteria=movement), learner()
    fit(learn, 3, cb)
    bake_masks(learn)
    with torch.no_grad():
        for w in weights(learn.model): w.normal_()
    watch, seen = watching('after_epoch')
    out = printed(lambda: fit(learn, 2, [cb, watch]))
    assert seen == [n_zeros(.45, N), n_zeros(.9, N)]
    assert [l.split(':')[0][-7:] for l in epoch_lines(out)] == ['epoch 0', 'epoch 1']

def test_one_object_twice_in_a_fit_keeps_its_schedule():
    cb, learn, (watch, seen) = sparse(verbose=True), learner(), watching('after_epoch')
    out = printed(lambda: fit(learn, 4, [cb, cb, watch]))
    assert seen == [n_zeros(.9*i/4, N) for i in (1,2,3,4)] and len(epoch_lines(out)) == 4

def test_one_object_installed_and_in_a_fit_keeps_its_schedule():
    cb, (watch, seen) = sparse(), watching('after_epoch')
    learn = learner(cbs=cb)
    fit(learn, 4, [cb, watch])
    assert seen == [n_zeros(.9*i/4, N) for i in (1,2,3,4)]

@pytest.mark.parametrize('criteria', [(large_final, movement), (grad_crit, updating_movement)])
def test_two_callbacks_on_two_layers(criteria):
    learn = learner()
    fit(learn, 2, [sparse({'0': 25}, criteria=criteria[0]), sparse({'3': 75}, agp, criteria=criteria[1])])
    assert counts(learn) == [36, 864] and sum(isinstance(cb, KeepMasks) for cb in learn.cbs) == 1
    fit(learn, 2)
    assert counts(learn) == [36, 864]

def test_two_callbacks_on_two_layer_types():
    learn = learner()
    fit(learn, 2, [sparse(90, context='global'), sparse(50, layer_type=nn.Linear, schedule=one_shot)])
    assert zeros(learn.model) == n_zeros(.9, N) and zeros(learn.model, nn.Linear) == 32

def test_two_callbacks_say_what_is_theirs():
    out = printed(lambda: fit(learner(), 1, [sparse({'0': 25}, verbose=True), sparse({'3': 75}, verbose=True)]))
    said_last = [l for l in out.splitlines() if l.startswith('Final')]
    assert said_last == ["Final Sparsity: {'0': 25.0}", "Final Sparsity: {'3': 75.0}"]

# --- calls that change nothing

def digits(size=16, bs=8, n=40):
    x,y = load_digits(return_X_y=True)
    items = [(a.reshape(8,8,1).repeat(3, 2).astype('uint8')*15, int(b)) for a,b in zip(x[:n], y)]
    block = DataBlock((ImageBlock, CategoryBlock), get_x=ItemGetter(0), get_y=ItemGetter(1),
                      splitter=IndexSplitter(range(n-8, n)), item_tfms=Resize(size))
    return block.dataloaders(items, bs=bs, num_workers=0, device='cpu')

def rgbnet(c=10): return nn.Sequential(nn.Conv2d(3,2,1), *convnet()[:-1], nn.Linear(16, c))

N_RGB = N + 6

def digits_learner(cbs=None, **kwargs): return learner(model=rgbnet(), dls=digits(), cbs=cbs, **kwargs)

LOOKS = dict(show_results=lambda l: l.show_results(max_n=4), tta=lambda l: l.tta(n=2), validate=lambda l: l.validate(),
             predict=lambda l: l.predict(l.dls.valid_ds[0][0]), summary=lambda l: l.summary(),
             preds=lambda l: l.get_preds(with_input=True, with_decoded=True),
             loss=lambda l: l.get_preds(ds_idx=0, with_loss=True),
             losses=lambda l: Interpretation.from_learner(l).top_losses(4),
             test_dl=lambda l: l.get_preds(dl=l.dls.test_dl([o[0] for o in l.dls.valid.items])),
             lr_find=lambda l: l.lr_find(num_it=6, show_plot=True, suggest_funcs=None))

@pytest.mark.parametrize('look', LOOKS)
def test_looking_changes_nothing_and_the_next_fit_still_reaches_its_target(look):
    learn = digits_learner(cbs=sparse(verbose=True))
    for n in (0, n_zeros(.9, N_RGB)):
        if n: printed(lambda: fit(learn, 1))
        before, kept = snapshot(learn.model), masks(learn.model)
        with learn.no_bar(), learn.no_logging(): out = printed(lambda: LOOKS[look](learn))
        assert zeros(learn.model) == n and same(before, snapshot(learn.model)) and all_same(kept, masks(learn.model))
        assert 'Sparsity at' not in out and 'Final' not in out
        assert look in ('tta', 'summary') or 'Pruning' not in out   # these two begin like a fit
    printed(lambda: fit(learn, 1))
    assert zeros(learn.model) == n_zeros(.9, N_RGB)

def test_recorder_plots():
    learn = fit(learner(), 2, sparse(), how='fit_one_cycle')
    learn.recorder.plot_loss()
    learn.recorder.plot_sched()
    assert len(learn.recorder.losses) == 12 and len(learn.recorder.values) == 2

# --- mixed precision

@pytest.mark.parametrize('criteria', [large_final, grad_crit])
def test_a_scale_that_overflows_at_first(criteria):
    amp = OnCPU(scale=2.**22)
    learn = fit(learner(cbs=amp), 2, sparse(criteria=criteria, update_every=1))
    assert 0 < amp.n_steps < 12 and zeros(learn.model) == n_zeros(.9, N)

def test_a_scale_that_overflows_throughout_says_so():
    amp = OnCPU(scale=2.**60)
    out = printed(lambda: fit(learner(cbs=amp), 2, sparse(criteria=grad_crit, verbose=True)))
    assert amp.n_steps == 0 and 'The target was not reached' in out

# --- optimizers

@pytest.mark.parametrize('opt', OPTIMIZERS)
def test_zeros_are_exact_after_each_step_of_this_fit_and_the_next(opt):
    learn = learner(opt_func=OPTIMIZERS[opt])
    steps, seen = collect('after_step', lambda learn: follows_masks(learn.model))
    fit(learn, 2, [sparse(update_every=1), steps], how='fit_one_cycle')
    before, (counter, n) = masks(learn.model), watching('after_step')
    fit(learn, 2, [steps, counter])
    fit(learn, 2, [steps, counter], how='fit_one_cycle', wd=.1, reset_opt=True)
    assert all(seen) and len(seen) == 36 and set(n) == {n_zeros(.9, N)} and all_same(before, masks(learn.model))

def test_an_optimizer_that_is_built_already():
    net = convnet()
    learn = learner(model=net, opt_func=OptimWrapper(opt=torch.optim.AdamW(net.parameters())))
    steps, seen = collect('after_step', zeros_hold)
    fit(learn, 2, [sparse(), steps])
    fit(learn, 2, steps)
    assert zeros(net) == n_zeros(.9, N) and all(seen) and len(seen) == 24

@pytest.mark.parametrize('schedule', [lin, dsd])
@pytest.mark.parametrize('opt', OPTIMIZERS)
def test_optimizer_state_of_changed_weights_is_zero_right_after(opt, schedule):
    learn, old, n = learner(opt_func=OPTIMIZERS[opt]), {}, []
    def before(learn): old.update((m, mask.clone()) for m,_,_,mask in masked_params(learn.model))
    def check(learn):
        for m,_,p,mask in masked_params(learn.model):
            changed, past = mask != old.get(m, True), optimizer_state(learn.opt, p)
            n.append(int(changed.sum()))
            assert past and not any(s[changed].any() for s in past) and all(s.any() for s in past)
    fit(learn, 2, [sparse(50, schedule), at('before_step', before), at('after_step', check)])
    assert sum(n) == n_zeros(.5, N)*(2 if schedule is dsd else 1)

# --- other callbacks

BESIDE = dict(mixup=MixUp, cutmix=CutMix, clip=partial(GradientClip, .1), accumulate=partial(GradientAccumulation, 16),
              both=lambda: [GradientAccumulation(24), GradientClip(.1)],
              mixed=lambda: [MixUp(), OnCPU(), GradientClip(.1)], channels_last=ChannelsLast, frozen_bn=BnFreeze,
              csv=CSVLogger, plateau=partial(ReduceLROnPlateau, 'valid_loss', patience=1), nan=TerminateOnNaNCallback,
              stats=partial(ActivationStats, with_hist=True), preds=FetchPredsCallback, collect=CollectDataCallback)

@pytest.mark.parametrize('granularity', ['weight', 'filter'])
@pytest.mark.parametrize('name', BESIDE)
def test_target_beside_another_callback(name, granularity):
    learn, (batches, seen) = learner(7), collect('after_batch', zeros_hold)
    printed(lambda: fit(learn, 2, [sparse(75, granularity=granularity), batches, *L(BESIDE[name]())]))
    assert zeros(learn.model) == n_zeros(.75, N)
    printed(lambda: fit(learn, 2, [batches, *L(BESIDE[name]())]))
    assert zeros(learn.model) == n_zeros(.75, N) and len(seen) == 28 and all(seen)

def test_early_stopping():
    learn = learner()
    stop = EarlyStoppingCallback('valid_loss', min_delta=10., patience=2)
    out = printed(lambda: fit(learn, 6, [sparse(verbose=True), stop]))
    assert zeros(learn.model) == n_zeros(.45, N) and 'training ended when 50%' in out
    assert zeros(fit(learn, 1).model) == n_zeros(.45, N)
    watch, seen = watching()
    fit(learn, 2, [sparse(), watch])
    assert min(seen) == n_zeros(.45, N) and seen == sorted(seen) and seen[-1] == n_zeros(.9, N)

@pytest.mark.parametrize('criteria', [large_final, wanda])
def test_progressive_resizing(criteria):
    def bigger(n): return list(zip(torch.randn(n,4,2,12,12), torch.randint(4, (n,4))))
    learn, cb = learner(), sparse(50, criteria=criteria, data=torch.randn(4,2,6,6))
    fit(learn, 2, cb)
    learn.dls = loaders(9, bigger)
    fit(learn, 1)
    assert zeros(learn.model) == n_zeros(.5, N)
    watch, seen = watching()
    fit(learn, 2, [sparse(90, criteria=criteria, data=torch.randn(4,2,12,12), update_every=1), watch])
    assert seen == sorted(seen) and len(seen) == 18 and seen[-1] == n_zeros(.9, N)

def test_more_batches_in_the_second_fit_than_in_the_first_of_one_object():
    learn, cb = learner(3), sparse()
    fit(learn, 1, cb)
    bake_masks(learn)
    nn.init.normal_(learn.model[0].weight), nn.init.normal_(learn.model[3].weight)
    learn.dls = loaders(9)
    watch, seen = watching()
    fit(learn, 1, [sparse(update_every=1), watch])
    assert seen == [n_zeros(Fraction(i, 10), N) for i in range(1, 10)]

def test_loaders_that_change_between_the_epochs_of_a_fit():
    def swap(learn): learn.dls = loaders([3, 7, 5, 2][learn.epoch])
    learn, (watch, seen), (ends, at_ends) = learner(), watching(), watching('after_epoch')
    fit(learn, 4, [sparse(update_every=1), at('before_epoch', swap), watch, ends])
    assert len(seen) == 17 and seen == sorted(seen) and at_ends == [n_zeros(.9*i/4, N) for i in (1,2,3,4)]

# --- freezing

@pytest.mark.parametrize('context', ['local', 'global'])
def test_a_frozen_body_and_then_all(context):
    kinds = nn.Conv2d, nn.Linear
    learn, cb = learner(splitter=split), sparse(context=context, layer_type=kinds)
    learn.create_opt()
    learn.freeze()
    body = [w.detach().clone() for w in weights(learn.model)]
    fit(learn, 2, cb)
    assert all_same(body, weights(learn.model)) and zeros(learn.model, nn.Linear) == n_zeros(.9, 64)
    learn.unfreeze()
    watch, seen = collect('after_batch', lambda learn: zeros(learn.model, kinds))
    fit(learn, 2, [cb, watch], lr=slice(1e-4, 1e-2))
    assert zeros(learn.model, kinds) == n_zeros(.9, N+64) and seen == sorted(seen) and min(seen) >= n_zeros(.9, 64)

def test_freeze_to_leaves_what_is_below_alone():
    learn, cb = learner(splitter=split), sparse()
    learn.create_opt()
    learn.freeze_to(1)
    fit(learn, 2, cb, how='fit_one_cycle', lr_max=slice(1e-4, 1e-2))
    assert counts(learn) == [0, n_zeros(.9, 1152)]
    assert dict(zip(*cb.sparsifier.report()[['layer', 'note']].T.values))['0'].startswith('frozen')

@pytest.mark.parametrize('criteria', [large_final, movement, grad_crit])
@pytest.mark.parametrize('context', ['local', 'global'])
def test_fine_tune_where_the_head_has_layers_of_the_type(context, criteria):
    learn = learner(splitter=lambda m: [params(m[:3]), params(m[3:])])
    watch, seen = collect('after_batch', counts)
    fit(learn, 2, [sparse(context=context, criteria=criteria), watch], how='fine_tune', freeze_epochs=2, base_lr=1e-3)
    assert len(seen) == 24 and seen[11] == [0, n_zeros(.9, 1152)] and sum(seen[-1]) == n_zeros(.9, N)
    n = [sum(s) for s in seen]
    assert n == sorted(n) and all(s[0] == 0 for s in seen[:12])

def test_fine_tune_of_a_frozen_body_reaches_the_target_in_its_second_fit():
    learn, (watch, seen) = learner(splitter=lambda m: [params(m[:6]), params(m[6:])]), watching()
    fit(learn, 3, [sparse(), watch], how='fine_tune', freeze_epochs=2)
    assert seen[:12] == [0]*12 and len(seen) == 30 and seen[-1] == n_zeros(.9, N)
    assert zeros(fit(learn, 1).model) == n_zeros(.9, N)

# --- wrapped models

COMPILED = dict(wrapped=lambda learn: setattr(learn, 'model', torch.compile(learn.model, backend='eager')),
                in_place=lambda learn: learn.model.compile(backend='eager'))

@pytest.mark.parametrize('how', COMPILED)
def test_a_compiled_model(how):
    learn = learner()
    COMPILED[how](learn)
    watch, seen = collect('after_step', zeros_hold)
    fit(learn, 2, [sparse(update_every=1), watch])
    fit(learn, 2, watch)
    assert zeros(learn.model) == n_zeros(.9, N) and all(seen) and len(seen) == 24
    x = learn.dls.train.one_batch()[0]
    plain = convnet().eval()
    plain.load_state_dict({k.removeprefix('_orig_mod.'): v for k,v in learn.model.state_dict().items()})
    with torch.no_grad(): assert torch.allclose(learn.model.eval()(x), plain(x), atol=1e-5)

@pytest.mark.parametrize('how', COMPILED)
def test_a_compiled_model_has_its_own_names(how):
    learn, cb = learner(), sparse({'0': 50, '3': 90})
    COMPILED[how](learn)
    fit(learn, 2, cb)
    assert counts(learn) == [72, n_zeros(.9, 1152)] and list(cb.sparsifier.report().layer) == ['0', '3']

@pytest.mark.parametrize('how', COMPILED)
def test_a_compiled_model_is_saved_as_a_plain_one(how):
    learn, cb = learner(), sparse()
    COMPILED[how](learn)
    fit(learn, 1, cb)
    cb.sparsifier.save_model('m.pth', weights_only=True)
    plain = convnet()
    plain.load_state_dict(torch.load('m.pth'))
    assert zeros(plain) == n_zeros(.9, N)

def test_filters_of_a_compiled_model_take_their_batchnorm_along():
    learn = learner()
    convs = learn.model[:6]
    learn.model = torch.compile(learn.model, backend='eager')
    fit(learn, 2, sparse(50, granularity='filter'))
    dead = [dead_filters(convs[i].weight) for i in (0,3)]
    assert [int(d.sum()) for d in dead] == [4, 8]
    assert not any(convs[i+1].weight[d].any() or convs[i+1].bias[d].any() for i,d in zip((0,3), dead))

def test_a_compiled_part():
    learn = learner(model=nn.Sequential(convnet()[:6], convnet()[6:]))
    part = learn.model[0]
    learn.model = torch.compile(learn.model, backend='eager')
    fit(learn, 2, sparse({'0': 25, '3': 75}, model=part))
    assert counts(learn) == [36, 864]

def test_a_model_compiled_between_two_fits():
    learn = fit(learner(), 1, sparse(50))
    learn.model = torch.compile(learn.model, backend='eager')
    fit(learn, 1)
    assert zeros(learn.model) == n_zeros(.5, N)
    fit(learn, 1, sparse(90))
    assert zeros(learn.model) == n_zeros(.9, N)

@pytest.mark.parametrize('inner', [lambda m: m, partial(torch.compile, backend='eager')], ids=['plain', 'compiled'])
def test_names_under_data_parallel(inner):
    learn, cb = learner(model=nn.DataParallel(inner(convnet()))), sparse({'0': 50, '3': 90}, verbose=True)
    out = printed(lambda: fit(learn, 2, cb))
    assert counts(learn) == [72, n_zeros(.9, 1152)] and list(cb.sparsifier.report().layer) == ['0', '3']
    assert 'module' not in out and '_orig_mod' not in out
    fit(learn, 2)
    assert counts(learn) == [72, n_zeros(.9, 1152)]

class Parallel(Callback):
    "Wraps the model during a fit, as `ParallelTrainer` does"
    run_after, run_before = TrainEvalCallback, Recorder
    def before_fit(self): self.learn.model = nn.DataParallel(self.learn.model)
    def after_fit(self): self.learn.model = self.learn.model.module

def test_a_model_wrapped_only_while_it_trains():
    learn = learner(cbs=Parallel())
    fit(learn, 2, sparse({'0': 50, '3': 90}))
    fit(learn, 2)
    assert counts(learn) == [72, n_zeros(.9, 1152)] and isinstance(learn.model, nn.Sequential)

# --- applications

def assert_lasting(learn, kinds, n, n_epoch=1):
    "`n` zeros in the layers of type `kinds`, and the same after another fit"
    assert zeros(learn.model, kinds) == n and zeros_hold(learn)
    fit(learn, n_epoch)
    assert zeros(learn.model, kinds) == n and zeros_hold(learn)

@pytest.mark.parametrize('context', ['local', 'global'])
def test_xresnet(context):
    learn = learner(model=xresnet18(n_out=10), dls=digits(n=24))
    fit(learn, 1, sparse(context=context))
    assert_lasting(learn, nn.Conv2d, n_zeros(.9, total(learn.model, nn.Conv2d)))
    if context == 'local': assert all(abs(c - .9*w.numel()) < 1 for c,w in zip(counts(learn), weights(learn.model)))

def test_filters_of_an_xresnet_take_their_batchnorm_along():
    learn = learner(model=xresnet18(n_out=10), dls=digits(n=24))
    fit(learn, 1, cb := sparse(50, granularity='filter'))
    for w in weights(learn.model): assert int(dead_filters(w).sum()) == len(w)//2
    fit(learn, 1)
    after = [(dead_filters(m.weight), bn) for m,bns in cb.sparsifier.batchnorms.items() for bn in bns]
    assert len(after) == sum(isinstance(m, nn.BatchNorm2d) for m in learn.model.modules())
    assert all(dead.any() and not bn.weight[dead].any() and not bn.bias[dead].any() for dead,bn in after)

def test_vision_learner_fine_tuned():
    learn = vision_learner(digits(n=24), resnet18, pretrained=False, metrics=accuracy)
    learn.freeze()
    body, kinds = learn.model[0][0].weight.detach().clone(), (nn.Conv2d, nn.Linear)
    waits = at('after_fit', lambda learn: first.append(torch.equal(body, learn.model[0][0].weight)), always=True)
    first = []
    fit(learn, 1, [sparse(80, layer_type=kinds, context='global'), waits], how='fine_tune')
    assert first == [True, False]
    assert_lasting(learn, kinds, n_zeros(.8, total(learn.model, kinds)))

def small(pretrained=False): return nn.Sequential(*(ConvLayer(a, b, stride=2) for a,b in ((3,8), (8,16))), nn.Flatten())

@pytest.mark.parametrize('granularity', ['weight', 'filter'])
def test_unet_learner(granularity):
    x = torch.rand(12, 8, 3, 16, 16)
    batches = [(TensorImage(o), TensorMask((o.mean(1) > .5).long())) for o in x]
    dls = DataLoaders(DataLoader(batches[:10], bs=None), DataLoader(batches[10:], bs=None), device='cpu')
    learn = unet_learner(dls, small, normalize=False, pretrained=False, n_out=2, cut=2,
                         loss_func=CrossEntropyLossFlat(axis=1))
    fit(learn, 2, cb := sparse(75, granularity=granularity))
    if granularity == 'weight': n = n_zeros(.75, total(learn.model, nn.Conv2d))
    else: n = sum(min(n_zeros(.75, len(w)), len(w)-1)*w[0].numel() for w in weights(learn.model))
    assert len(cb.sparsifier.layers) >= 10
    assert_lasting(learn, nn.Conv2d, n)

def test_unet_of_weight_norm_is_refused_by_name_and_the_rest_can_be_named():
    model = nn.Sequential(ConvLayer(2, 8), PixelShuffle_ICNR(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    learn = learner(model=model)
    with pytest.raises(ValueError, match="'1.0.0' is weight-normed"): fit(learn, 1, sparse())
    fit(learn, 1, sparse({'0.0': 50}))
    assert int((model[0][0].weight == 0).sum()) == 72
    nn.utils.remove_weight_norm(model[1][0][0])
    learn.create_opt()
    fit(learn, 1, sparse(90))
    assert_lasting(learn, nn.Conv2d, n_zeros(.9, 144+256))

@pytest.mark.parametrize('context', ['local', 'global'])
def test_tabular_learner(context):
    df = pd.DataFrame([dict(a=f'c{i%7}', b=i*.1, y=str(i%3)) for i in range(80)])
    dls = TabularDataLoaders.from_df(df, cat_names=['a'], cont_names=['b'], y_names='y', procs=[Categorify, Normalize],
                                     bs=8, device='cpu')
    learn, kinds = tabular_learner(dls, layers=[32,16], metrics=accuracy), (nn.Linear, nn.Embedding)
    fit(learn, 2, sparse(80, context=context, layer_type=kinds), how='fit_one_cycle')
    assert_lasting(learn, kinds, n_zeros(.8, total(learn.model, kinds)))

SMALL = dict(emb_sz=8, n_hid=12, n_layers=2)

def text_loaders(y):
    dls = loaders(6, lambda n: list(zip(torch.randint(2, 20, (n,8,6)), y(n))))
    dls.vocab = [str(i) for i in range(20)]
    return dls

def language_model():
    set_seed(0)
    dls = text_loaders(lambda n: torch.randint(2, 20, (n,8,6)))
    return language_model_learner(dls, AWD_LSTM, config={**awd_lstm_lm_config, **SMALL}, pretrained=False)

def text_classifier():
    set_seed(0)
    dls = text_loaders(lambda n: torch.randint(4, (n,8)))
    return text_classifier_learner(dls, AWD_LSTM, seq_len=3, config={**awd_lstm_clas_config, **SMALL}, pretrained=False,
                                   n_out=4, max_len=6, loss_func=CrossEntropyLossFlat(), lin_ftrs=[10])

def test_the_tied_decoder_of_a_language_model():
    learn = language_model()
    fit(learn, 2, cb := sparse(layer_type=nn.Linear))
    decoder = learn.model[1].decoder
    assert decoder.weight is learn.model[0].encoder.weight and len(cb.sparsifier.layers) == 1
    assert_lasting(learn, nn.Linear, n_zeros(.9, 160))

def test_the_head_of_a_text_classifier():
    learn = text_classifier()
    fit(learn, 2, sparse(layer_type=nn.Linear), how='fine_tune')
    assert_lasting(learn, nn.Linear, n_zeros(.9, total(learn.model, nn.Linear)))

@pytest.mark.parametrize('make', [language_model, text_classifier])
def test_computed_weights_of_an_awd_lstm_are_refused_by_name(make):
    learn = make()
    before = snapshot(learn.model)
    with pytest.raises(ValueError, match='weight_hh_l0'): fit(learn, 1, sparse(layer_type=nn.LSTM))
    assert same(before, snapshot(learn.model))

@pytest.mark.parametrize('make', [language_model, text_classifier])
def test_the_other_weights_of_an_awd_lstm_can_be_named(make):
    learn = make()
    names = [n for n,_ in learn.model.named_parameters() if n.endswith('weight_ih_l0')]
    fit(learn, 2, sparse(dict.fromkeys(names, 75), layer_type=nn.LSTM))
    n_zero = lambda: [int((learn.model.get_parameter(n) == 0).sum()) for n in names]
    expected = [n_zeros(.75, learn.model.get_parameter(n).numel()) for n in names]
    assert n_zero() == expected and len(names) == 2
    fit(learn, 1)
    assert n_zero() == expected

def raw_weights(model): return [m.weight_hh_l0_raw for m in model.modules() if isinstance(m, WeightDropout)]

@pytest.mark.parametrize('make', [language_model, text_classifier])
def test_the_raw_weights_of_weight_dropout_can_be_sparse(make):
    learn = make()
    watch, seen = collect('after_step', lambda learn: sum(int((w==0).sum()) for w in raw_weights(learn.model)))
    fit(learn, 2, [cb := sparse(layer_type=WeightDropout), watch])
    n = n_zeros(.9, sum(w.numel() for w in raw_weights(learn.model)))
    assert seen[-1] == n and len(raw_weights(learn.model)) == 2
    assert all(name.endswith('weight_hh_l0_raw') for name in cb.sparsifier.layers)
    seen.clear()
    fit(learn, 2, watch)
    assert set(seen) == {n} and len(seen) == 12
    learn.get_preds()
    computed = [m.module.weight_hh_l0 for m in learn.model.modules() if isinstance(m, WeightDropout)]
    assert sum(int((w==0).sum()) for w in computed) == n

# --- few batches, no validation, epochs that are skipped

@pytest.mark.parametrize('criteria', [large_final, updating_movement, grad_crit])
def test_epochs_of_one_batch(criteria):
    watch, seen = watching()
    fit(learner(1), 4, [sparse(criteria=criteria), watch])
    assert seen == [n_zeros(Fraction(9, 40)*i, N) for i in (1,2,3,4)]

def test_no_validation_set():
    items = [(torch.randn(2,6,6), i%4) for i in range(20)]
    for valid in (DataLoader(items[:0], bs=8), DataLoader([], bs=None)):
        learn = learner(dls=DataLoaders(DataLoader(items, bs=8), valid, device='cpu'))
        out = printed(lambda: fit(learn, 3, sparse(verbose=True)))
        assert zeros(learn.model) == n_zeros(.9, N) and len(epoch_lines(out)) == 3

@pytest.mark.parametrize('start', [1, 2, 3])
def test_nothing_is_said_of_epochs_that_are_skipped(start):
    learn, (watch, seen) = learner(), watching()
    out = printed(lambda: fit(learn, 4, [sparse(verbose=True), watch], start_epoch=start))
    assert [l.split(':')[0] for l in epoch_lines(out)] == [f'Sparsity at the end of epoch {i}' for i in range(start, 4)]
    assert len(seen) == 6*(4-start) and seen[-1] == n_zeros(.9, N)

def test_the_schedule_goes_on_where_skipped_epochs_end():
    learn, (watch, seen) = learner(), watching('after_train')
    fit(learn, 4, [sparse(), watch], start_epoch=2)
    assert [s for s in seen if s] == [n_zeros(.675, N), n_zeros(.9, N)]

# --- copies and files

def test_export_with_the_callbacks_of_a_sparse_learner():
    learn = digits_learner(cbs=sparse())
    fit(learn, 1)
    learn.export('m.pkl')
    loaded = load_learner('m.pkl')
    assert zeros(loaded.model) == n_zeros(.9, N_RGB) and all_same(masks(learn.model), masks(loaded.model))
    loaded.dls = digits()
    loaded.remove_cb(SparsifyCallback)
    assert_lasting(loaded, nn.Conv2d, n_zeros(.9, N_RGB))

def test_a_baked_export_predicts_the_same_and_is_plain():
    learn = fit(digits_learner(cbs=sparse()), 1)
    item = learn.dls.valid_ds[0][0]
    with learn.no_bar(): expected = learn.predict(item)[2]
    bake_masks(learn).export('m.pkl')
    loaded = load_learner('m.pkl')
    assert b'fasterai_sparse' not in Path('m.pkl').read_bytes() and not masks(loaded.model)
    assert zeros(loaded.model) == n_zeros(.9, N_RGB)
    assert not any(isinstance(cb, (KeepMasks, SparsifyCallback)) for cb in loaded.cbs)
    with loaded.no_bar(): assert torch.equal(loaded.predict(item)[2], expected)

# --- interruptions

@pytest.mark.parametrize('exc', [CancelBatchException, CancelTrainException, CancelEpochException, CancelFitException])
@pytest.mark.parametrize('sparsify', [True, False], ids=['sparsify', 'keep'])
def test_a_cancel_between_the_last_step_and_its_masks(sparsify, exc):
    def stop(learn):
        if (learn.epoch, learn.iter) == (1, 5): raise exc()
    learn = fit(learner(), 1, sparse())
    fit(learn, 2, [at('after_step', stop, order=0), *([sparse(95)] if sparsify else [])])
    n_masked = sum(int((~m).sum()) for m in masks(learn.model))
    assert zeros_hold(learn) and zeros(learn.model) == n_masked >= n_zeros(.9, N)

def test_an_interrupt_between_a_step_and_its_masks():
    learn = fit(learner(), 1, sparse())
    with pytest.raises(KeyboardInterrupt): fit(learn, 1, at('after_step', raising(KeyboardInterrupt()), order=0))
    assert zeros(fit(learn, 1).model) == n_zeros(.9, N)

@pytest.mark.parametrize('exc', [CancelEpochException, CancelTrainException])
@pytest.mark.parametrize('event', ['before_batch', 'after_step', 'after_batch'])
def test_an_epoch_that_is_cut_short(event, exc):
    def stop(learn):
        if learn.epoch == 1 and learn.iter == 3: raise exc()
    learn, (watch, seen), (ends, at_ends) = learner(), watching(), watching('after_epoch')
    out = printed(lambda: fit(learn, 4, [sparse(update_every=1, verbose=True), at(event, stop, 67), watch, ends]))
    assert seen == sorted(seen) and at_ends[2:] == [n_zeros(.675, N), n_zeros(.9, N)]
    assert len(epoch_lines(out)) == 4 and 'not reached' not in out

def test_a_last_epoch_that_is_cut_short_is_said():
    def stop(learn):
        if learn.epoch == 3 and learn.iter == 2: raise CancelEpochException()
    learn = learner()
    out = printed(lambda: fit(learn, 4, [sparse(update_every=1, verbose=True), at('after_batch', stop, 67)]))
    assert zeros(learn.model) == n_zeros(Fraction(9, 10)*21/24, N)
    assert 'The target was not reached: training ended when 88% of it was done' in out

@pytest.mark.parametrize('criteria', [large_final, grad_crit, movement])
@pytest.mark.parametrize('seed', range(4))
def test_batches_that_are_skipped_at_random(seed, criteria):
    rng = random.Random(seed)
    def skip(learn):
        if rng.random() < .12: raise CancelBatchException()
    events = 'before_batch', 'after_pred', 'after_loss', 'before_backward', 'after_backward', 'before_step'
    skips = [at(e, skip, order=rng.choice([0, 70])) for e in events]
    watch, seen = collect('after_batch', lambda learn: (zeros(learn.model), zeros_hold(learn)))
    fit(learner(10), 3, [sparse(criteria=criteria), watch, *skips])
    n = [z for z,_ in seen]
    assert len(seen) == 30 and n == sorted(n) and n[-1] == n_zeros(.9, N) and all(ok for _,ok in seen)

@pytest.mark.parametrize('exc,event', [(CancelStepException, 'before_step'),
                                       (CancelBackwardException, 'before_backward')])
@pytest.mark.parametrize('seed', range(3))
def test_steps_that_are_skipped_at_random(seed, exc, event):
    rng = random.Random(seed)
    def skip(learn):
        if rng.random() < .4: raise exc()
    learn, (watch, seen) = learner(10), watching()
    fit(learn, 2, [sparse(), watch, at(event, skip, order=0)])
    assert len(seen) == 20 and seen == sorted(seen) and seen[-1] == n_zeros(.9, N)

# --- a killed process

def test_a_killed_process_is_taken_up_again():
    cmd = [sys.executable, '-W', 'ignore', Path(__file__).parent.parent/'helpers'/'resume_worker.py']
    run = lambda what: subprocess.run([*cmd, what], capture_output=True, text=True)
    died = run('die')
    assert died.returncode == 1 and died.stderr == '', died.stderr[-800:]
    assert sorted(o.name for o in Path('models').iterdir()) == [f'model_{i}.pth' for i in range(3)]
    resumed = run('resume')
    assert resumed.returncode == 0, resumed.stderr[-800:]
    loaded, n_batches, least, first_end, last, plain = map(int, resumed.stdout.split())
    assert loaded == n_zeros(.45, N) and n_batches == 18 and least >= loaded
    assert first_end == n_zeros(.6, N) and last == plain == n_zeros(.9, N)

def n_dead(model): return sum(int(dead_filters(w).sum()) for w in weights(model))

def test_filters_of_a_checkpoint_are_taken_up_again():
    first, save = learner(), at_batch(12, lambda learn: learn.save('half'))
    with pytest.raises(KeyboardInterrupt):
        fit(first, 4, [sparse(50, granularity='filter'), save, at_batch(14, raising(KeyboardInterrupt()))])
    learn = learner().load('half')
    n, (watch, seen) = n_dead(masks_from_zeros(learn.model)), collect('after_batch', lambda learn: n_dead(learn.model))
    fit(learn, 4, [sparse(50, granularity='filter'), watch], start_epoch=2)
    assert 0 < n <= min(seen) and seen[-1] == 12
    for conv,bn in (learn.model[:2], learn.model[3:5]):
        assert not any(p[dead_filters(conv.weight)].any() for p in (conv.bias, bn.weight, bn.bias))
