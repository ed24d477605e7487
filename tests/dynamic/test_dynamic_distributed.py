"Dynamic sparse training on two ranks keeps the same masks on both; torchrun starts once for all presets"
import pytest

from ranks import needs_gloo, on_two_ranks
from fasterai_sparse.core.select import n_zeros

pytestmark = needs_gloo

PRESETS = ['SET', 'SNFS', 'RigL', 'GraNet']

@pytest.fixture(scope='module')
def fits(tmp_path_factory): return on_two_ranks('ddp_dynamic_worker.py', PRESETS, tmp_path_factory.mktemp('ddp'))

@pytest.mark.parametrize('name', PRESETS)
def test_all_begin_with_the_masks_of_the_first(fits, name):
    first, second = fits[name]['drawn']
    assert first != second and fits[name]['begun'] == [[first]]*2

@pytest.mark.parametrize('name', PRESETS)
def test_masks_are_the_same_on_both_ranks_after_each_update(fits, name):
    fit, (first, second) = fits[name], fits[name]['recorded']
    assert first == second and len(first) >= 20 and len(set(first)) > 15 and fit['held'] == [True, True]
    assert len(set(fit['weights'])) == len(set(fit['log'])) == 1

@pytest.mark.parametrize('name', PRESETS)
def test_as_many_weights_live_as_should(fits, name):
    fit = fits[name]
    first, second = fit['counts']
    assert first == second
    if name == 'GraNet': assert sum(first) == fit['n'] - n_zeros(.8, fit['n'])
    elif name == 'SNFS': assert sum(first) == sum(fit['start']) and first != fit['start']
    else: assert first == fit['start']
