"Lottery tickets: weights are reset at each step of the schedule, and tickets are saved under their masks"
import math, pickle
from copy import deepcopy
from pathlib import Path

import pytest
from fastai.callback.schedule import SchedCos, sched_lin
from fastai.basics import (Adam, CancelFitException, CancelStepException, L, OptimWrapper, SGD, ValueMetric, params,
                           ranger)
from fastai.callback.tracker import SaveModelCallback

from callback_helpers import (
    all_same, at, at_batch, collect, convnet, copied_by, fit, follows_masks, kept, learner, loaders, masks, N, printed,
    raising, same, snapshot, sparse, Spy, weights, zeros)
from fastai.basics import Callback, nn, partial, torch
from fasterai_sparse.utils.modes import unwrapped
from fasterai_sparse.core.criteria import grad_crit, large_init, movement, random_criteria, updating_movement
from fasterai_sparse.core.masks import masked_params, set_mask
from fasterai_sparse.core.schedules import agp, as_schedule, cos, dsd, iterative, lin, one_cycle, one_shot, Schedule
from fasterai_sparse.core.select import n_zeros
from fasterai_sparse.core.from_zeros import masks_from_zeros
from fasterai_sparse.core.sparsifier import Sparsifier
from fasterai_sparse.train.keep_masks import KeepMasks
from fasterai_sparse.train.lottery import RewindPoint, takes_steps

pytestmark = [pytest.mark.usefixtures('in_tmp'),
              pytest.mark.filterwarnings('ignore:numpy.core is deprecated')]   # of fastai's load_model

STEPS = dict(one_shot=(one_shot, [11]), iterative=(iterative, [4,11,17]),
             five_steps=(partial(iterative, n_steps=5), [4,8,12,16,20]),
             own=(lambda pos: math.floor(2*pos)/2, [11,23]),
             down=(lambda pos: (pos > .25)/(1 + (pos > .6)), [6,14]))   # batches of the steps, in 4 epochs of 6
CONTINUOUS = dict(agp=agp, one_cycle=one_cycle, cos=cos, lin=lin, dsd=dsd, sched_cos=SchedCos(0, 1),
                  power=lambda pos: pos**2, short=Schedule(sched_lin, .5, .53))

def lottery(sparsity=90, schedule=iterative, **kwargs): return sparse(sparsity, schedule, **{'lth': True, **kwargs})

def under_masks(saved, model):
    "The state `saved` with the masks of `model` applied"
    model = unwrapped(model)
    dropped = {id(p): ~mask for *_,p,mask in masked_params(model)}
    own = model.state_dict(keep_vars=True)
    return {n: t.masked_fill(dropped[id(own[n])], 0) if id(own[n]) in dropped else t for n,t in saved.items()}

def state(learn): return snapshot(unwrapped(learn.model))

def gone_back(saved): return lambda learn: same(under_masks(saved, learn.model), state(learn))

def rewound(learn, saved, cbs, n_epoch=4, **kwargs):
    "Numbers of the batches after which the model is back at `saved`"
    watch, seen = collect('after_batch', gone_back(saved))
    fit(learn, n_epoch, [*L(cbs), watch], **kwargs)
    return [i for i,back in enumerate(seen) if back]

def epoch_starts():
    "A callback that collects the model's state at the start of each epoch, before all others"
    return collect('before_epoch', state, order=0)

def tickets(folder='models'): return sorted(o.name for o in Path(folder).glob('*'))

def ticket(name, folder='models'): return torch.load(Path(folder)/name, weights_only=True)

class Kinds(nn.Module):
    "A network with embedding, LSTM, convolution, BatchNorm, a bare parameter, and a linear layer tied to the embedding"
    def __init__(self):
        super().__init__()
        self.emb, self.rnn = nn.Embedding(20, 8), nn.LSTM(8, 8, batch_first=True)
        self.conv, self.bn = nn.Conv1d(8, 8, 3, padding=1), nn.BatchNorm1d(8)
        self.scale, self.out, self.head = nn.Parameter(torch.rand(8)), nn.Linear(8, 20, bias=False), nn.Linear(20, 4)
        self.out.weight = self.emb.weight
    def forward(self, x):
        x = self.bn(self.conv(self.rnn(self.emb(x))[0].transpose(1, 2))).transpose(1, 2)
        return self.head(self.out(x[:,-1]*self.scale))

def text_batches(n): return list(zip(torch.randint(20, (n,8,5)), torch.randint(4, (n,8))))

def kinds_learner(): return learner(model=Kinds(), dls=loaders(6, make=text_batches))

# --- when weights are reset, and which

@pytest.mark.parametrize('granularity', ['weight', 'filter'])
@pytest.mark.parametrize('context', ['local', 'global'])
@pytest.mark.parametrize('name', STEPS)
def test_weights_go_back_at_each_step_and_at_no_other_batch(name, context, granularity):
    schedule, steps = STEPS[name]
    learn = learner()
    cb = lottery(schedule=schedule, context=context, granularity=granularity)
    assert rewound(learn, state(learn), cb) == steps

def test_what_is_dropped_is_zero_and_the_rest_is_live():
    watch, seen = collect('after_batch', lambda learn: (zeros(learn.model), follows_masks(learn.model)))
    fit(learner(), 4, [lottery(), watch])
    assert [seen[i] for i in (4, 11, 17, 23)] == [(n_zeros(s, N), True) for s in (.3, .6, .9, .9)]

def test_every_kind_of_parameter_goes_back():
    learn = kinds_learner()
    start = state(learn)
    assert rewound(learn, start, lottery(50, one_shot, layer_type=None)) == [11]
    assert all(not torch.equal(t, start[n]) for n,t in state(learn).items())   # all of them train

def test_embeddings_only():
    learn = kinds_learner()
    assert rewound(learn, state(learn), lottery(50, one_shot, layer_type=nn.Embedding)) == [11]
    assert int((learn.model.out.weight == 0).sum()) == 80 and learn.model.out.weight is learn.model.emb.weight

def test_batchnorm_goes_back_to_what_it_had_learnt():
    learn = fit(learner(), 2)   # "pretrained"
    bn, (watch, seen) = learn.model[1], collect('after_batch', lambda learn: snapshot(learn.model[1]))
    start, default = snapshot(bn), snapshot(nn.BatchNorm2d(8))
    fit(learn, 4, [lottery(schedule=one_shot), watch])
    assert same(seen[11], start) and bn.num_batches_tracked == 12+12
    assert not any(torch.equal(start[n], default[n]) for n in default)

@pytest.mark.parametrize('schedule,start_epoch,epoch', [(one_shot, None, 1), (iterative, 2, 1), (iterative, 2, 2)])
def test_the_weights_are_those_of_rewind_epoch(schedule, start_epoch, epoch):
    (starts, saved), (watch, seen) = epoch_starts(), collect('after_batch', lambda learn: deepcopy(learn.model))
    fit(learner(), 4, [lottery(schedule=schedule, rewind_epoch=epoch, start_epoch=start_epoch), starts, watch])
    model = seen[11 if schedule is one_shot else 12]
    assert same(snapshot(model), under_masks(saved[epoch], model)) and zeros(model) > 0
    assert not any(torch.equal(saved[epoch][n], saved[epoch-1][n]) for n in saved[0])

def test_a_fit_that_starts_at_rewind_epoch():
    (starts, saved), learn = epoch_starts(), learner()
    fit(learn, 4, [lottery(schedule=one_shot, rewind_epoch=1, reset_end=True), starts], start_epoch=1)
    assert gone_back(saved[1])(learn) and zeros(learn.model) == n_zeros(.9, N)

def test_a_step_that_is_due_on_an_overflow_waits():
    def skip(learn):
        if learn.train_iter == 11: raise CancelStepException()
    learn = learner()
    assert rewound(learn, state(learn), [lottery(schedule=one_shot), at('before_step', skip)]) == [12]

def test_a_plain_fit_afterwards_resets_nothing():
    learn = fit(learner(), 4, lottery(schedule=one_shot))
    assert rewound(learn, state(learn), None) == [] and zeros(learn.model) == n_zeros(.9, N)

def test_without_lth_nothing_goes_back():
    learn = learner()
    assert rewound(learn, state(learn), sparse(schedule=iterative, save_tickets=True)) == []

def test_an_infinite_weight_that_is_dropped_is_zero_not_nan():
    def small(p, **kwargs): return -p.abs()
    learn = learner()
    start = RewindPoint(learn.model)
    start.saved['0.weight'][0,0,0,0] = math.inf
    Sparsifier(learn.model, 'weight', 'local', small).sparsify_model(50)
    set_mask(learn.model[0], kept(learn.model[0]).index_fill(0, torch.tensor(0), False))
    start.rewind()
    assert learn.model[0].weight.isfinite().all() and follows_masks(learn.model)
    assert start.ticket()['0.weight'].isfinite().all()

# --- the optimizer

OPTIMIZERS = dict(sgd=SGD, momentum=partial(SGD, mom=.9), adam=Adam, ranger=ranger,
                  adamw=partial(OptimWrapper, opt=torch.optim.AdamW),
                  torch_sgd=partial(OptimWrapper, opt=torch.optim.SGD, momentum=.9))

@pytest.mark.parametrize('opt', OPTIMIZERS)
def test_training_goes_on_as_a_fresh_start_would(opt):
    copies, kw = [], dict(opt_func=OPTIMIZERS[opt], wd=.1)
    learn = learner(**kw)
    fit(learn, 4, [lottery(schedule=one_shot), at_batch(11, lambda learn: copies.append(deepcopy(learn.model)))])
    fresh = learner(model=deepcopy(copies[0]), dls=learn.dls, **kw)
    fit(fresh, 2, KeepMasks())
    assert same(state(fresh), state(learn)) and not same(state(fresh), snapshot(copies[0]))

def slow_weights(opt): return [s for o in (opt.slow_weights or []) for s in o]

def test_slow_weights_of_lookahead_go_back():
    slow, fast = (collect('after_batch', f) for f in (lambda l: [s.clone() for s in slow_weights(l.opt)],
                                                      lambda l: [p.detach().clone() for p in l.model.parameters()]))
    fit(learner(opt_func=ranger), 4, [lottery(schedule=one_shot), slow[0], fast[0]])
    assert all_same(slow[1][11], fast[1][11]) and not all_same(slow[1][12], fast[1][12])

def test_what_fastai_knows_of_parameters_survives():
    learn = fit(learner(), 4, lottery(schedule=one_shot, reset_end=True))
    flags = [[learn.opt.state[p].get(k) for k in ('do_wd', 'force_train')] for p in learn.model.parameters()]
    assert flags == [[None, None], [False, None], [False, True], [False, True]]*2 + [[None, None], [False, None]]

def test_optimizer_state_of_another_part_stays():
    body, head = convnet()[:6], convnet()[6:]
    learn = learner(model=nn.Sequential(body, head), opt_func=partial(SGD, mom=.9))
    start = snapshot(body)
    past = lambda m: [bool(learn.opt.state[p].get('grad_avg', torch.zeros(1)).any()) for p in m.parameters()]
    back = lambda: same(under_masks(start, body), snapshot(body))
    watch, seen = collect('after_batch', lambda learn: (back(), past(body), past(head)))
    before = snapshot(head)
    fit(learn, 4, [lottery(schedule=one_shot, model=body), watch])
    assert [i for i,s in enumerate(seen) if s[0]] == [11]
    assert seen[11] == (True, [False]*8, [True]*2) and seen[12][1] == [True]*8
    assert not any(torch.equal(t, before[n]) for n,t in snapshot(head).items())

# --- arguments

@pytest.mark.parametrize('name', CONTINUOUS)
def test_a_schedule_without_steps_is_refused_at_construction(name):
    with pytest.raises(ValueError) as e: lottery(schedule=CONTINUOUS[name])
    assert all(w in str(e.value) for w in ('one_shot', 'iterative', 'n_steps', 'update_every'))
    for kw in (dict(reset_end=True), dict(save_tickets=True)): sparse(schedule=CONTINUOUS[name], **kw)

def test_update_every_makes_steps_of_any_schedule():
    learn = learner()
    assert rewound(learn, state(learn), lottery(schedule=lin, update_every=4)) == [3,5,7,11,15,17,19,23]

@pytest.mark.parametrize('f,steps', [
    (lambda pos: .5, True), (lambda pos: float(pos > .3), True), (lambda pos: math.floor(50*pos)/50, True),
    (lambda pos: pos, False), (lambda pos: max(pos-.97, 0), False)], ids=['flat', 'one', 'fifty', 'all', 'late'])
def test_takes_steps(f, steps): assert takes_steps(as_schedule(f)) == steps

LATE = dict(
    after_the_first_step=(dict(schedule=iterative, rewind_epoch=1), {}, 'first step'),
    just_after_the_step_at_an_epochs_end=(dict(schedule=one_shot, rewind_epoch=2), {}, 'first step'),
    just_after_the_step_at_start_epoch=(dict(schedule=one_shot, rewind_epoch=1, start_epoch=1), dict(n_epoch=3),
                                        'first step'),
    after_a_start_sparsity=(dict(schedule=iterative, rewind_epoch=1, start_epoch=2, start_sparsity=10), {},
                            'first step'),
    never=(dict(schedule=one_shot, rewind_epoch=4, start_epoch=3), {}, 'never comes'),
    skipped=(dict(schedule=one_shot), dict(start_epoch=1), 'is over'))

@pytest.mark.parametrize('what', ['lth', 'reset_end', 'save_tickets'])
@pytest.mark.parametrize('case', LATE)
def test_a_rewind_epoch_that_is_not_there_is_refused_before_anything_changes(case, what):
    kwargs, how, words = LATE[case]
    learn, started = learner(), []
    before, n_epoch = state(learn), how.get('n_epoch', 4)
    with pytest.raises(ValueError, match=f"rewind_epoch={kwargs.get('rewind_epoch', 0)}.*{words}"):
        fit(learn, n_epoch, [sparse(**{what: True}, **kwargs), at('before_batch', lambda learn: started.append(1))],
            **{k: v for k,v in how.items() if k != 'n_epoch'})
    assert same(before, state(learn)) and not started and not masks(learn.model) and not Path('models').exists()
    assert not any(isinstance(cb, KeepMasks) for cb in learn.cbs)

@pytest.mark.parametrize('case', [c for c in LATE if c != 'skipped'])   # a fit starts with the weights of epoch 0
def test_a_criterion_with_init_refuses_a_missing_rewind_epoch_too(case):
    kwargs, how, words = LATE[case]
    cb = sparse(criteria=movement, **kwargs)
    with pytest.raises(ValueError, match=words): fit(learner(), how.get('n_epoch', 4), cb)

@pytest.mark.parametrize('bad', [-1, 1.5, True, '1'])
def test_no_epoch(bad):
    with pytest.raises(ValueError, match='rewind_epoch'): lottery(rewind_epoch=bad)

# --- the end

@pytest.mark.parametrize('lth', [False, True])
@pytest.mark.parametrize('granularity', ['weight', 'filter'])
def test_reset_end_ends_with_rewound_weights_under_the_final_mask(granularity, lth):
    learn = learner()
    start, (watch, seen) = state(learn), collect('after_batch', lambda learn: masks(learn.model))
    fit(learn, 4, [sparse(50, schedule=one_shot, lth=lth, reset_end=True, granularity=granularity), watch])
    assert gone_back(start)(learn) and all_same(masks(learn.model), seen[-1]) and zeros(learn.model) == N//2

@pytest.mark.parametrize('opt', OPTIMIZERS)
def test_the_fit_after_reset_end_is_a_fresh_start(opt):
    kw = dict(opt_func=OPTIMIZERS[opt], wd=.1)
    learn = fit(learner(**kw), 2, sparse(reset_end=True))
    fresh = learner(model=deepcopy(learn.model), dls=learn.dls, **kw)
    assert same(state(fit(fresh, 1, KeepMasks())), state(fit(learn, 1)))

def test_reset_end_of_a_fit_that_ends_early():
    learn = learner()
    start = state(learn)
    fit(learn, 4, [sparse(reset_end=True), at_batch(14, raising(CancelFitException()))])
    assert gone_back(start)(learn) and 0 < zeros(learn.model) < n_zeros(.9, N)

def test_reset_end_keeps_the_masks_that_were_loaded_last():
    learn = learner()
    start, learn.metrics = state(learn), L(ValueMetric(lambda: [0,1,0,0][learn.epoch], 'pick'))
    with pytest.warns(UserWarning, match='where the model was'):
        fit(learn, 4, [sparse(reset_end=True, save_tickets='t'), SaveModelCallback(monitor='pick')])
    assert zeros(learn.model) == n_zeros(.45, N) and gone_back(start)(learn)
    assert same(ticket(f'winning_ticket_{100*n_zeros(.45, N)/N:.2f}.pth', 't'), state(learn))

def test_save_model_saves_what_was_trained():
    cb, learn = lottery(save_tickets=True), learner()
    start = state(learn)
    fit(learn, 4, cb)
    cb.sparsifier.save_model('m.pth')
    cb.sparsifier.save_model('w.pth', weights_only=True)
    assert same(snapshot(torch.load('m.pth', weights_only=False)), state(learn))
    assert same(ticket('w.pth', '.'), state(learn))
    assert not gone_back(start)(learn)

# --- tickets

def retrained(learn, name):
    "Load a ticket and retrain it, by the three lines of the documentation"
    learn.load(name, with_opt=False)
    masks_from_zeros(learn.model)
    return fit(learn, 2, KeepMasks(), how='fit_one_cycle')

def measured(name, folder='models', layers=('0.weight', '3.weight')):
    t = ticket(name, folder)
    return f'winning_ticket_{100*sum(int((t[n]==0).sum()) for n in layers)/sum(t[n].numel() for n in layers):.2f}.pth'

@pytest.mark.parametrize('granularity', ['weight', 'kernel', 'filter'])
@pytest.mark.parametrize('context', ['local', 'global'])
def test_tickets_are_named_by_what_is_in_them(context, granularity):
    watch, seen = collect('after_batch', lambda learn: zeros(learn.model))
    fit(learner(), 4, [lottery(save_tickets=True, context=context, granularity=granularity), watch])
    assert tickets() == sorted({f'winning_ticket_{100*seen[i]/N:.2f}.pth' for i in (4,11,17)}) and len(tickets()) == 3
    assert all(measured(o) == o for o in tickets())

@pytest.mark.parametrize('folder', ['a/b', Path('c')])
def test_tickets_go_to_the_folder_that_is_given(folder):
    fit(learner(), 2, sparse(schedule=one_shot, save_tickets=folder))
    assert tickets(folder) == ['winning_ticket_89.97.pth'] and not Path('models').exists()

def test_tickets_go_where_the_learner_has_its_models():
    fit(learner(path='p', model_dir='m'), 2, sparse(schedule=one_shot, save_tickets=True))
    assert tickets('p/m') == ['winning_ticket_89.97.pth']

@pytest.mark.parametrize('lth', [False, True])
def test_tickets_hold_rewound_weights_under_the_mask(lth):
    learn = learner()
    start, (watch, seen) = state(learn), collect('after_batch', lambda learn: deepcopy(learn.model))
    fit(learn, 4, [sparse(schedule=iterative, lth=lth, save_tickets=True), watch])
    for i,name in zip((4,11,17), tickets(), strict=True): assert same(ticket(name), under_masks(start, seen[i]))
    assert not same(ticket(tickets()[-1]), state(learn)) and all_same(masks(seen[17]), masks(learn.model))

def test_tickets_hold_every_kind_of_parameter():
    learn = kinds_learner()
    start = state(learn)
    fit(learn, 4, sparse(50, one_shot, layer_type=None, save_tickets=True))
    assert same(ticket('winning_ticket_50.00.pth'), under_masks(start, learn.model))

def test_tickets_of_a_schedule_without_steps():
    learn = learner()
    start = state(learn)
    fit(learn, 4, sparse(schedule=agp, save_tickets=True))
    assert len(tickets()) > 4 and all(measured(o) == o for o in tickets())
    assert same(ticket(tickets()[-1]), under_masks(start, learn.model))

def test_a_live_weight_that_starts_from_zero_survives():
    learn = learner()
    with torch.no_grad(): learn.model[3].weight[:8] = 0
    cb = sparse(50, one_shot, lth=True, save_tickets=True)
    watch, seen = collect('after_batch', lambda learn: follows_masks(learn.model) and zeros(learn.model))
    fit(learn, 4, [cb, watch])
    t, live = ticket('winning_ticket_50.00.pth'), kept(learn.model[3])
    assert seen[11] == N//2 and live[:8].any() and torch.equal(t['3.weight'] != 0, live)
    assert t['3.weight'][:8].abs().max() < 1e-15

@pytest.mark.parametrize('granularity', ['weight', 'kernel', 'filter'])
@pytest.mark.parametrize('lth', [False, True])
def test_a_ticket_trains_again_in_three_lines(granularity, lth):
    first = learner()
    fit(first, 4, sparse(75, iterative, granularity=granularity, lth=lth, save_tickets=True))
    n = zeros(first.model)
    learn = retrained(learner(), f'winning_ticket_{100*n/N:.2f}')
    assert all_same(masks(learn.model), masks(first.model))
    assert len(masks(learn.model)) == (8 if granularity == 'filter' else 2)
    assert follows_masks(learn.model) and zeros(learn.model) == n

def test_a_ticket_of_a_pattern():
    first = fit(learner(), 4, sparse(50, one_shot, nm=True, save_tickets=True))
    again = retrained(learner(), 'winning_ticket_50.00')
    assert all_same(masks(again.model), masks(first.model)) and follows_masks(again.model)

def test_a_ticket_of_a_part():
    body, head = convnet()[:6], convnet()[6:]
    learn = learner(model=nn.Sequential(body, head))
    start = state(learn)
    fit(learn, 4, lottery({'0': 25, '3': 75}, one_shot, model=body, save_tickets=True))
    name = f'winning_ticket_{100*900/N:.2f}.pth'
    t = ticket(name)
    assert tickets() == [name] and t.keys() == start.keys()
    assert all(torch.equal(t[n], o) for n,o in under_masks(start, learn.model).items() if n.startswith('0.'))
    again = retrained(learner(model=nn.Sequential(convnet()[:6], convnet()[6:])), name[:-4])
    assert all_same(masks(again.model), masks(learn.model)) and follows_masks(again.model)

def test_a_ticket_of_a_part_holds_the_rest_as_it_is():
    learn = learner(model=nn.Sequential(convnet()[:6], convnet()[6:]))
    fit(learn, 4, sparse(50, one_shot, model=learn.model[0], save_tickets=True))
    t, now = ticket('winning_ticket_50.00.pth'), state(learn)
    assert all(torch.equal(t[n], o) == n.startswith('1.') for n,o in now.items() if 'num_batches' not in n)

def test_tickets_of_a_dict_are_named_by_its_layers():
    learn = fit(learner(), 4, sparse({'3': 75}, one_shot, save_tickets=True))
    assert tickets() == ['winning_ticket_75.00.pth'] == [measured(tickets()[0], layers=['3.weight'])]
    again = retrained(learner(), 'winning_ticket_75.00')
    assert all_same(masks(again.model), masks(learn.model))
    assert [int((w==0).sum()) for w in weights(again.model)] == [0, 864]

def data_parallel(learn): learn.model = nn.DataParallel(learn.model)
def compiled(learn): learn.model = torch.compile(learn.model, backend='eager')

@pytest.mark.parametrize('wrap', [data_parallel, compiled])
def test_a_wrapped_model(wrap):
    learn = learner()
    wrap(learn)
    start = state(learn)
    assert rewound(learn, start, lottery(schedule=one_shot, save_tickets=True)) == [11]
    assert same(ticket('winning_ticket_89.97.pth'), under_masks(start, learn.model))
    again = learner().load('winning_ticket_89.97', with_opt=False)   # a plain one, whatever the other was
    masks_from_zeros(again.model)
    wrap(again)
    fit(again, 2, KeepMasks())
    assert all_same(masks(again.model), masks(learn.model)) and follows_masks(again.model)

def test_a_wrapped_learner_loads_its_ticket():
    learn = learner(model=nn.DataParallel(convnet()))
    fit(learn, 4, sparse(schedule=one_shot, save_tickets=True))
    again = retrained(learner(model=nn.DataParallel(convnet())), 'winning_ticket_89.97')
    assert all_same(masks(again.model), masks(learn.model)) and follows_masks(again.model)

def test_what_is_no_tensor_is_in_the_ticket_too():
    class WithNote(nn.Conv2d):
        note = 'as made'
        def get_extra_state(self): return dict(note=self.note)
        def set_extra_state(self, s): self.note = s['note']
    net = convnet()
    net[0] = WithNote(2, 8, 3, padding=1)
    learn = learner(model=net)
    net[0].note = 'as trained'
    fit(learn, 2, lottery(schedule=one_shot, save_tickets=True))
    net[0].note = 'later'
    net.load_state_dict(ticket('winning_ticket_89.97.pth'))
    assert net[0].note == 'as trained' and follows_masks(net)

def break_save(monkeypatch):
    def half(obj, f, *args, **kwargs):
        f.write(b'half')
        raise OSError('No space left on device')
    monkeypatch.setattr(torch, 'save', half)

def test_no_half_written_file_is_left(monkeypatch):
    learn = learner()
    with monkeypatch.context() as m, pytest.raises(OSError):
        break_save(m)
        fit(learn, 4, lottery(schedule=one_shot, save_tickets='t'))
    assert tickets('t') == []
    fit(learn, 4, sparse(schedule=one_shot, save_tickets='t'))
    assert tickets('t') == ['winning_ticket_89.97.pth'] == [measured(tickets('t')[0], 't')]

def test_a_ticket_is_not_lost_to_one_that_fails(monkeypatch):
    fit(learner(), 4, sparse(schedule=one_shot, save_tickets='t'))
    before = ticket('winning_ticket_89.97.pth', 't')
    break_save(monkeypatch)
    with pytest.raises(OSError): fit(learner(), 4, sparse(schedule=one_shot, save_tickets='t'))
    assert same(ticket('winning_ticket_89.97.pth', 't'), before) and len(tickets('t')) == 1

# --- fits and copies

def test_a_second_fit_goes_back_to_its_own_start():
    cb, learn = lottery(schedule=one_shot, reset_end=True), learner()
    first = state(learn)
    fit(learn, 4, cb)
    fit(learn, 1)
    second = state(learn)
    fit(learn, 4, cb)
    assert gone_back(second)(learn) and not gone_back(first)(learn)

def test_a_second_fit_that_ends_early_does_not_go_back_to_the_first():
    cb, learn = sparse(schedule=one_shot, rewind_epoch=1, reset_end=True, save_tickets='t', context='global'), learner()
    (starts, saved), (watch, seen) = epoch_starts(), collect('after_batch', state)
    fit(learn, 4, [cb, starts])
    before = {o: Path('t', o).stat().st_mtime_ns for o in tickets('t')}
    fit(learn, 4, [cb, watch, at_batch(3, raising(CancelFitException()))])
    assert same(state(learn), seen[3]) and not gone_back(saved[1])(learn)
    assert before == {o: Path('t', o).stat().st_mtime_ns for o in tickets('t')}

@pytest.mark.parametrize('context', ['local', 'global'])
def test_a_second_fit_goes_back_at_no_other_batch_than_the_steps(context):
    cb, learn = lottery(context=context), learner()
    fit(learn, 4, cb)
    assert set(rewound(learn, state(learn), cb)) <= {4, 11, 17}

@pytest.mark.parametrize('context', ['local', 'global'])
def test_a_second_fit_with_a_later_rewind_epoch(context):
    learn, (starts, saved) = learner(), epoch_starts()
    cb = lottery(schedule=one_shot, rewind_epoch=1, reset_end=True, context=context)
    for _ in range(2): fit(learn, 4, [cb, starts])
    assert gone_back(saved[5])(learn) and zeros(learn.model) == n_zeros(.9, N)

def test_a_higher_target_in_a_second_fit():
    learn = fit(learner(), 4, lottery(50, one_shot))
    second, (starts, saved) = lottery(90, one_shot, rewind_epoch=1), epoch_starts()
    watch, seen = collect('after_batch', lambda learn: deepcopy(learn.model))
    fit(learn, 4, [second, starts, watch])
    assert same(snapshot(seen[11]), under_masks(saved[1], seen[11])) and zeros(seen[11]) == n_zeros(.9, N)

def test_a_lower_target_in_a_second_fit():
    learn, (starts, saved) = fit(learner(), 4, lottery(90, one_shot)), epoch_starts()
    fit(learn, 4, [lottery(50, one_shot, rewind_epoch=1, reset_end=True, save_tickets='t'), starts])
    assert gone_back(saved[1])(learn) and zeros(learn.model) == N//2
    assert all(measured(o, 't') == o for o in tickets('t'))

@pytest.mark.parametrize('installed', [False, True])
def test_a_fit_after_an_interrupted_one(installed):
    cb = lottery(schedule=one_shot, save_tickets='t')
    learn, cbs = learner(cbs=cb if installed else None), [] if installed else [cb]
    with pytest.raises(KeyboardInterrupt): fit(learn, 4, [*cbs, at_batch(8, raising(KeyboardInterrupt()))])
    start = state(learn)
    assert tickets('t') == [] and rewound(learn, start, cbs) == [11]
    assert same(ticket('winning_ticket_89.97.pth', 't'), under_masks(start, learn.model))

def test_a_plain_fit_after_an_interrupted_one():
    cb, learn = lottery(save_tickets='t', reset_end=True), learner()
    with pytest.raises(KeyboardInterrupt): fit(learn, 4, [cb, at_batch(13, raising(KeyboardInterrupt()))])
    before, start = tickets('t'), state(learn)
    out = printed(lambda: fit(learn, 1))
    assert tickets('t') == before and len(before) == 2 and out == '' and not gone_back(start)(learn)

@pytest.mark.parametrize('rewind_epoch', [0, 1])
def test_fine_tune_goes_back_to_where_the_layers_started_to_train(rewind_epoch):
    learn, (starts, saved) = learner(splitter=lambda m: [params(m[:6]), params(m[6:])]), epoch_starts()
    fit(learn, 4, [lottery(schedule=one_shot, reset_end=True, rewind_epoch=rewind_epoch), starts], how='fine_tune')
    assert gone_back(saved[1+rewind_epoch])(learn) and zeros(learn.model) == n_zeros(.9, N)

def test_two_callbacks_each_with_its_part():
    learn = learner(model=nn.Sequential(convnet()[:3], convnet()[3:]))
    one, two = learn.model
    starts, saved = epoch_starts()
    def epochs_of(learn, part):
        now, there = state(learn), [under_masks(o, learn.model) for o in saved]
        return [e for e,o in enumerate(there) if all(torch.equal(o[n], now[n]) for n in now if n.startswith(part))]
    def look(learn): return [epochs_of(learn, part) for part in ('0.', '1.')]
    watch, seen = collect('after_batch', look)
    fit(learn, 4, [lottery(50, one_shot, model=one), lottery(50, one_shot, model=two, rewind_epoch=1), starts, watch])
    assert seen[11] == [[0], [1]] and [i for i,s in enumerate(seen) if s != [[], []]] == [11]

def pickled(o): return pickle.loads(pickle.dumps(o))

class Copied(Callback):
    "Takes a copy of the learner after batch 13"
    order, run_valid = 66, False
    def __init__(self, copy): self.f, self.copy = copy, None
    def after_batch(self):
        if self.train_iter != 14 or self.copy: return
        self.copy = copied_by(self, self.f)

def by_callback(learn): return pickled(learn.sparsify).learn

@pytest.mark.parametrize('copy', [deepcopy, pickled, by_callback])
def test_a_copy_in_the_middle_of_a_fit_goes_back_by_itself(copy):
    take, learn = Copied(copy), learner(cbs=lottery(reset_end=True, save_tickets='t'))
    start = state(learn)
    fit(learn, 4, take)
    end, other = state(learn), take.copy
    assert gone_back(start)(learn) and not gone_back(start)(other)
    other.sparsify.rewind_point.rewind()
    assert gone_back(start)(other) and zeros(other.model) == n_zeros(.6, N) and same(end, state(learn))
    fit(other, 4)
    assert zeros(other.model) == n_zeros(.9, N) and same(end, state(learn))

def test_a_copy_does_not_disturb_the_fit():
    ends = [state(fit(learner(cbs=lottery()), 4, cbs)) for cbs in (None, Copied(deepcopy))]
    assert same(*ends)

# --- criteria that use earlier weights

@pytest.mark.parametrize('kwargs', [dict(rewind_epoch=1), dict(rewind_epoch=1, lth=True), dict(lth=True),
                                    dict(rewind_epoch=1, save_tickets=True)])
def test_init_is_the_weights_at_the_start_of_rewind_epoch(kwargs):
    log, (starts, saved) = [], epoch_starts()
    def from_init(p, init, **kwargs): log.append(init.clone()); return (p-init).abs()
    learn = fit(learner(), 4, [sparse(50, one_shot, criteria=from_init, **kwargs), starts])
    want = saved[kwargs.get('rewind_epoch', 0)]
    assert all_same(log, [want['0.weight'], want['3.weight']]) and zeros(learn.model) == N//2

@pytest.mark.parametrize('criteria', [movement, updating_movement], ids=lambda f: f.__name__)
def test_criteria_that_look_back_beside_a_frozen_layer(criteria):
    learn = learner()
    learn.model[3].requires_grad_(False)
    start = state(learn)
    fit(learn, 4, lottery(criteria=criteria, schedule=one_shot, reset_end=True))
    assert zeros(learn.model) == n_zeros(.9, 144) and gone_back(start)(learn)

ANY = [movement, large_init, updating_movement, grad_crit, random_criteria]

@pytest.mark.parametrize('criteria', ANY, ids=lambda f: f.__name__)
@pytest.mark.parametrize('context', ['local', 'global'])
def test_any_criterion_finds_tickets(criteria, context):
    learn = learner()
    assert rewound(learn, state(learn), lottery(criteria=criteria, context=context)) == [4,11,17]
    assert zeros(learn.model) == n_zeros(.9, N)

def test_movement_keeps_what_has_moved_most_since_the_last_step():
    learn, ok = learner(), []
    start = state(learn)
    class Look(Spy):
        def apply(self, *args, **kwargs):
            moves = [(self.param(n)-start[f'{n}.weight']).abs() for n in self.layers]
            live = [m.masked_fill(~kept(*l), -1) for m,l in zip(moves, self.layers.values())]
            super().apply(*args, **kwargs)
            ok.extend(bool(m[kept(*l)].min() >= m[~kept(*l)].max()) for m,l in zip(live, self.layers.values()))
    fit(learn, 4, lottery(criteria=movement, sparsifier=Look))
    assert ok == [True]*6

# --- messages

def lines(learn, cb, n_epoch=2, cbs=()):
    "Printed lines without the report"
    return printed(lambda: fit(learn, n_epoch, [cb, *cbs])).split('\n\nSparsity Report')[0].splitlines()

def test_what_is_said_of_a_lottery():
    cb = sparse(90, one_shot, lth=True, save_tickets=True, reset_end=True, verbose=True)
    assert lines(learner(), cb) == [
        'Pruning of weight until a sparsity of 90%', 'Saving Weights at epoch 0',
        'Resetting Weights to their epoch 0 values', 'Saving Intermediate Ticket',
        'Sparsity at the end of epoch 0: 89.97%', 'Sparsity at the end of epoch 1: 89.97%',
        'Saving Final Ticket', 'Resetting Weights to their epoch 0 values', 'Final Sparsity: 89.97%']

def test_the_epoch_is_named():
    out = lines(learner(), lottery(schedule=one_shot, rewind_epoch=1, verbose=True), 4)
    said_of = [l for l in out if 'Weights' in l]
    assert said_of == ['Saving Weights at epoch 1', 'Resetting Weights to their epoch 1 values']
    assert out.index('Saving Weights at epoch 1') == out.index('Sparsity at the end of epoch 0: 0.00%')+1

@pytest.mark.parametrize('kwargs,expected', [
    (dict(), []), (dict(criteria=movement), []), (dict(rewind_epoch=1), []),
    (dict(lth=True), ['Saving Weights at epoch 0', 'Resetting Weights to their epoch 0 values']),
    (dict(reset_end=True), ['Saving Weights at epoch 0', 'Resetting Weights to their epoch 0 values']),
    (dict(save_tickets=True), ['Saving Weights at epoch 0', 'Saving Intermediate Ticket', 'Saving Final Ticket'])])
def test_only_what_is_done_is_said(kwargs, expected):
    out = lines(learner(), sparse(90, one_shot, verbose=True, **kwargs), 4)
    assert [l for l in out if 'Weights' in l or 'Ticket' in l] == expected

def test_nothing_is_said_of_weights_that_were_never_taken():
    cb, learn = sparse(90, one_shot, reset_end=True, save_tickets=True, rewind_epoch=1, verbose=True), learner()
    out = lines(learn, cb, 4, [at_batch(3, raising(CancelFitException()))])
    assert not [l for l in out if 'Weights' in l or 'Ticket' in l] and not Path('models').exists()

def test_a_fit_of_no_epochs_saves_and_resets_nothing():
    learn = learner()
    before = state(learn)
    out = lines(learn, lottery(reset_end=True, save_tickets=True, verbose=True), 0)
    assert not [l for l in out if 'Weights' in l or 'Ticket' in l] and same(before, state(learn))

def test_nothing_is_said_while_layers_are_frozen():
    learn = learner(splitter=lambda m: [params(m[:6]), params(m[6:])])
    learn.freeze()
    out = lines(learn, lottery(reset_end=True, save_tickets=True, verbose=True))
    assert len(out) == 1 and 'waiting' in out[0] and not Path('models').exists()

def test_verbose_false_says_nothing_and_writes_all_the_same():
    assert lines(learner(), lottery(save_tickets=True, reset_end=True, verbose=False)) == [] and tickets()

def test_validate_and_lr_find_take_no_tickets():
    learn = learner(cbs=lottery(save_tickets=True, reset_end=True, verbose=True))
    before = state(learn)
    def idle():
        with learn.no_logging(), learn.no_bar():
            learn.validate()
            learn.lr_find(num_it=12, show_plot=False, suggest_funcs=None)
    out = printed(idle)
    assert out == '' and same(before, state(learn)) and not [o for o in tickets() if 'ticket' in o]
