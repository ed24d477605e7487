"NNCF's numbers, produced by running it: tests/golden/nncf.json"
import json
from pathlib import Path

import pytest

import torch
from torch import nn

from fasterai_sparse.bn_adaptation import *
from fasterai_sparse.epoch_schedules import *

golden = json.loads((Path(__file__).parent/'golden'/'nncf.json').read_text())
ids = lambda c: f"{c['kind']}-{'-'.join(map(str, c['params'].values()))}"

def make(case): return epoch_schedules[case['kind']](**{n: v for n,v in case['params'].items() if n in {f for f in epoch_schedules[case['kind']].__dataclass_fields__}})

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
    s, n, late = Polynomial(**case['params']), case['actual_steps_per_epoch'], case['params'].get('steps_per_epoch') is None
    for e,epoch in enumerate(case['epochs']):
        if 'error' in epoch or any(l is None for l in epoch['level_set_at_step']): continue
        first = epoch['scheduler_epoch'] if late else e   # there, an epoch whose length is not given is only counted
        ours = [s.level(first, j, n) for j in range(len(epoch['level_set_at_step']))]
        assert ours == pytest.approx(epoch['level_set_at_step'], abs=1e-9)
    assert [s.level(0, j, n) for j in range(n)] != [s.level(1, j, n) for j in range(n)]   # ours counts from the first epoch on

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
