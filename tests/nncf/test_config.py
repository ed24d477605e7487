"The same numbers as NNCF's, which a run of NNCF wrote into tests/golden/nncf.json"
import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest

import torch
from torch import nn

from fasterai_sparse.core.masks import get_mask
from fasterai_sparse.core.select import as_ratio, n_zeros
from fasterai_sparse.core.sparsifier import Sparsifier
from fasterai_sparse.train.bn_adaptation import adapt_batchnorm
from fasterai_sparse.nncf.config import _scope_matches, SparsityConfig
from fasterai_sparse.nncf.epoch_schedules import epoch_schedules, Polynomial
from fasterai_sparse.nncf.magnitude import weight_importances
from fasterai_sparse.nncf.rb import _LearnedMasks, RBSparsityCallback
from fasterai_sparse.nncf.soft_masks import CONV_AND_LINEAR

golden = json.loads((Path(__file__).parent.parent/'golden'/'nncf.json').read_text())
ids = lambda c: f"{c['kind']}-{'-'.join(map(str, c['params'].values()))}"

def make(case):
    kind = epoch_schedules[case['kind']]
    return kind(**{n: v for n,v in case['params'].items() if n in kind.__dataclass_fields__})

@pytest.mark.parametrize('case', [c for c in golden['schedulers'] if 'error' not in c], ids=ids)
def test_levels(case):
    s, state, levels, reached = make(case), None, [], []
    for e,measured in enumerate(case.get('measured_level_at_epoch', [None]*case['n_epochs'])):
        state = s.next(state, e, measured)
        levels.append(state.level)
        reached.append(state.n_reached)
    assert levels == pytest.approx(case['level_set_at_epoch'], abs=1e-9)
    assert [s.is_frozen(e) for e in range(len(levels))] == case['freeze_called_at_epoch']
    assert s.sparsity_target == case['target_level'] and s.sparsity_init == case['level_before_first_epoch']
    if 'bad_epoch_counter_after' in case: assert reached == case['bad_epoch_counter_after']

@pytest.mark.parametrize('case', [c for c in golden['schedulers'] if 'error' in c], ids=ids)
def test_what_fails_there_is_refused_here(case):
    with pytest.raises(ValueError): make(case)

@pytest.mark.parametrize('case', golden['polynomial_per_optimizer_step']['cases'], ids=lambda c: str(c['params']))
def test_levels_by_step(case):
    s, n = Polynomial(**case['params']), case['actual_steps_per_epoch']
    late = case['params'].get('steps_per_epoch') is None
    for e,epoch in enumerate(case['epochs']):
        if 'error' in epoch or any(l is None for l in epoch['level_set_at_step']): continue
        first = epoch['scheduler_epoch'] if late else e   # there, an epoch whose length is not given is only counted
        ours = [s.level(first, j, n) for j in range(len(epoch['level_set_at_step']))]
        assert ours == pytest.approx(epoch['level_set_at_step'], abs=1e-9)
    # ours counts from the first epoch on
    assert [s.level(0, j, n) for j in range(n)] != [s.level(1, j, n) for j in range(n)]

# --- BatchNorm adaptation

norm = golden['bn_adaptation_running_stats']

@pytest.mark.parametrize('case', norm['cases'], ids=lambda c: str(c['momentum']))
def test_running_statistics(case):
    bn = nn.BatchNorm1d(2, momentum=case['momentum'])
    bn.running_mean.copy_(torch.tensor([.5, 1.]))
    bn.running_var.copy_(torch.tensor([2., 3.]))
    seen = []
    drop = nn.Dropout()
    drop.register_forward_hook(lambda m, args, out: seen.append((m.training, bn.training)))
    model = nn.Sequential(bn, drop).train(case['model_in_train_mode_before'])
    adapt_batchnorm(model, list(torch.tensor(norm['inputs']).split(3)), n_samples=6)
    assert bn.running_mean.tolist() == pytest.approx(case['running_mean'], rel=1e-5)
    assert bn.running_var.tolist() == pytest.approx(case['running_var'], rel=1e-5)
    assert int(bn.num_batches_tracked) == case['num_batches_tracked']
    assert seen == [(False, True)]*case['batches_used']   # dropout trains there, and evaluates here
    assert bn.training == case['bn_training_after'] and drop.training

@pytest.mark.parametrize('case', golden['bn_adaptation_steps']['cases'], ids=str)
def test_number_of_batches(case):
    bn, n = nn.BatchNorm1d(2), case['batch_size']
    adapt_batchnorm(bn, (torch.randn(n, 2) for _ in range(100)), case['num_samples'])
    assert int(bn.num_batches_tracked) == case['batches']

# --- RB sparsity

rb = golden['rb']
near = lambda t, want, rel: t.flatten().tolist() == pytest.approx(want, rel=rel, abs=1e-8)

def rb_masks():
    "Parameters and their RB masks, with the logits of the golden file"
    params = {n: nn.Parameter(torch.tensor(l['weights']).view(l['shape'])) for n,l in rb['layers'].items()}
    soft = _LearnedMasks(params, 0)
    for n,s in soft.logits.items():
        assert s.flatten()[0] == pytest.approx(rb['init_logit_float32'])
        s.copy_(torch.tensor(rb['layers'][n]['logits']).view_as(s))
    xi = iter(rb['layers'].values())
    soft._uniform = lambda s: torch.tensor(next(xi)["uniform_xi"]).view_as(s).clamp(1e-6, 1-1e-6)
    return params, soft

@pytest.mark.parametrize('which', ['train', 'eval_or_frozen'])
def test_rb_masks_and_gradients(which):
    params, soft = rb_masks()
    soft.draw() if which == 'train' else soft.settle()
    soft.lay()
    for n,l in rb['layers'].items():
        p, want = params[n], l[which]
        assert soft.masks[n].flatten().int().tolist() == want['mask'] and near(p.detach(), want['output'], 1e-6)
        (p*torch.tensor(l['upstream_grad']).view_as(p)).sum().backward()
        soft.mask_grads()
        assert near(p.grad, want['grad_weight'], 1e-6)
        if which == 'train':
            assert near(soft.logits[n].grad, want['grad_logits'], .06)   # ξ at its bounds is known to float32 only
    soft.lift()
    for n,l in rb['layers'].items(): assert near(params[n].detach(), l['weights'], 1e-7)

def rb_callback(level, soft):
    cb = RBSparsityCallback(70)
    cb.learn, cb.hard, cb.hard_zeros = SimpleNamespace(cbs=[], loss_grad=torch.zeros(()), model=None), {}, {}
    cb.mask_opt = SimpleNamespace(step=lambda: None, zero_grad=lambda **kwargs: None)
    cb.soft, cb.level = soft, level
    cb.after_loss()
    cb._step_logits()
    return cb

@pytest.mark.parametrize('case', rb['loss_cases'], ids=lambda c: str(c['target_level']))
def test_rb_loss(case):
    _, soft = rb_masks()
    cb = rb_callback(case['target_level'], soft)
    assert cb.losses == [pytest.approx(case['loss'], rel=1e-5)]
    assert float(cb.learn.loss_grad) == pytest.approx(case['loss'], rel=1e-5)
    for n,want in case['grad_logits'].items(): assert near(soft.logits[n].grad, want, 1e-4)

@pytest.mark.parametrize('case', golden['rb_loss_at_init']['cases'], ids=lambda c: str(c['level']))
def test_rb_loss_at_the_start(case):
    soft = _LearnedMasks({'p': nn.Parameter(torch.ones(case['n']))}, 0)
    cb = rb_callback(case['level'], soft)
    assert cb.losses[0] == pytest.approx(case['loss'], rel=1e-4)
    assert near(soft.logits['p'].grad, [case['grad_per_logit']]*case['n'], 1e-3)

# --- magnitude sparsity

mag = golden['magnitude']

def test_magnitude_weights_return():
    "Masks are chosen by the unmasked weights at each step, and stay after the freeze"
    net = nn.Sequential(nn.Linear(8, 1, bias=False))
    s = Sparsifier(net, 'weight', 'local', weight_importances['abs'], layer_type=nn.Linear)
    for row in golden['magnitude_regrowth']['sequence']:
        if row['frozen']: continue
        net[0].weight.data = torch.tensor([row['raw_weights']])
        (_, mask), = s.choose(.4)
        assert mask.flatten().int().tolist() == row['mask'] and get_mask(net[0]) is None

def magnitude_net():
    shapes = {n: w['shape'] for n,w in mag['weights'].items()}
    def layer(shape):
        o, i, *size = shape
        return nn.Conv2d(i, o, size, bias=False) if size else nn.Linear(i, o, bias=False)
    net = nn.ModuleDict({n.split('.')[0]: layer(s) for n,s in shapes.items()})
    for n,w in mag['weights'].items(): net[n.split('.')[0]].weight.data = torch.tensor(w['flat']).view(w['shape'])
    return net

@pytest.mark.parametrize('case', mag['cases'], ids=lambda c: f"{c['importance']}-{c['mode']}-{c['level']}")
def test_magnitude_masks(case):
    "Our counts are exact and leave no layer empty; NNCF has a strict threshold, so up to one zero more in each scope"
    s = Sparsifier(magnitude_net(), 'weight', case['mode'], weight_importances[case['importance']],
                   layer_type=CONV_AND_LINEAR)
    masks = dict(s.choose(as_ratio(case['level'])))
    theirs = {n.split('.')[0]: torch.tensor(m).view_as(masks[n.split('.')[0]]).bool()
              for n,m in case['masks_flat'].items()}
    zeros, emptied = sum(int((~m).sum()) for m in masks.values()), sum(not m.any() for m in theirs.values())
    assert zeros == min(n_zeros(case['level'], case['n_total']), case['n_total']-len(masks))
    assert all(m.any() for m in masks.values())
    scopes = 1 if case['mode'] == 'global' else len(masks)
    differ = sum(int((masks[n] != theirs[n]).sum()) for n in masks)
    assert abs(zeros - case['n_zero']) <= scopes+emptied and differ <= 2*(scopes+emptied)
    if zeros == case['n_zero'] and case['mode'] == 'global' and not emptied: assert differ == 0

# --- configuration

silent = pytest.mark.filterwarnings('ignore:The schedule')
# the code of seed 003, unchanged
SEED = (Path(__file__).parent.parent/'golden'/'nncf_blocks.txt').read_text().split('\n---\n')

@silent
@pytest.mark.parametrize('block', SEED, ids=['rb', 'magnitude', 'const'])
def test_the_seeds_blocks_load_as_they_stand(block, tmp_path):
    a, = SparsityConfig.from_json(block).algorithms
    (tmp_path/'c.json').write_text(block)
    for path in (tmp_path/'c.json', str(tmp_path/'c.json')):
        assert SparsityConfig.from_json(path) == SparsityConfig((a,))
    assert a.target_scopes is None and a.ignored_scopes == ()
    if a.algorithm == 'const_sparsity': return
    assert [a.schedule.level(e) for e in (0, 9, 10, 19, 20, 49)] == [.2, .2, .5, .5, .7, .7]
    assert a.schedule.is_frozen(50)
    assert a.sparsity_init == .05 and a.bn_samples == (2048 if a.algorithm == 'magnitude_sparsity' else 0)

def test_what_a_schedule_does_not_use_is_warned_about():
    with pytest.warns(UserWarning, match='multistep.*does not use patience, sparsity_target, sparsity_target_epoch'):
        SparsityConfig.from_json(SEED[0])

@pytest.mark.parametrize('case', golden['config_validation']['cases'], ids=lambda c: c['name'])
def test_what_is_valid(case):
    with nullcontext() if case['valid'] else pytest.raises(ValueError):
        SparsityConfig.from_json({'compression': case['compression']})

@pytest.mark.parametrize('case', golden['scopes']['cases'], ids=str)
def test_scopes(case):
    ids = golden['scopes']['ids']
    as_list = lambda v: [v] if isinstance(v, str) else v
    ignored, target = as_list(case['ignored_scopes']) or [], as_list(case['target_scopes'])
    assert [i
            for i in ids
            if (target is None or any(_scope_matches(s, [i]) for s in target))
            and not any(_scope_matches(s, [i]) for s in ignored)] == case['selected']

def test_an_unreadable_file_gets_line_and_column(tmp_path):
    (tmp_path/'c.json').write_text('{\n"algorithm": "rb_sparsity",\n"params": {]\n}')
    with pytest.raises(ValueError, match='line 3, column'): SparsityConfig.from_json(tmp_path/'c.json')

@silent
@pytest.mark.parametrize('block', SEED[:2])
def test_round_trip(block):
    cfg = SparsityConfig.from_json(block)
    assert SparsityConfig.from_json(cfg.to_json()) == cfg and SparsityConfig.from_json(json.loads(cfg.to_json())) == cfg
