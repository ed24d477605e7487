"Training with soft masks on two ranks gives both the same masks and weights; torchrun starts once for all fits"
import pytest

from ranks import needs_gloo, on_two_ranks
from fasterai_sparse.core.select import n_zeros
from fasterai_sparse.nncf.epoch_schedules import Polynomial

pytestmark = needs_gloo

RB = ['rb', 'rb_local', 'rb_to_the_end', 'rb_accumulates', 'again']
FITS = [*RB, 'magnitude', 'magnitude_adapts', 'from_masks_of_the_rank']
N = 1360

@pytest.fixture(scope='module')
def fits(tmp_path_factory): return on_two_ranks('ddp_soft_worker.py', FITS, tmp_path_factory.mktemp('ddp'))

@pytest.mark.parametrize('name', FITS)
def test_both_ranks_take_the_same_steps(fits, name):
    "Both ranks have the same weights and logits after each step, and the same masks and columns at the end"
    fit = fits[name]
    for what in ('steps', 'ends', 'masks', 'weights', 'zeros', 'column'): assert fit[what][0] == fit[what][1], what
    assert len(fit['steps'][0]) == 24 and len(set(fit['steps'][0])) == (13 if name == 'rb_accumulates' else 24)
    assert fit['held'] == [True, True]
    assert all(fit['spared'][0]) and all(fit['spared'][1]) and fit['zeros'][0] == fit['ends'][0][-1][1]

@pytest.mark.parametrize('name', RB)
def test_each_rank_draws_its_own_masks(fits, name):
    first, second = fits[name]['drawn']
    assert len(first) == len(second) == (24 if name in ('rb_to_the_end', 'rb_accumulates') else 18)
    assert not set(first) & set(second) and len(set(first)) == len(first)
    assert fits[name]['column'][0][-1] == round(100*fits[name]['zeros'][0]/N, 2) > 10

@pytest.mark.parametrize('name,levels',
                         [('magnitude', [.3, .6, .6, .6]), ('magnitude_adapts', Polynomial(.2, .6, 3, 2).levels(4))])
def test_magnitudes_mask_the_same_on_both(fits, name, levels):
    first, second = fits[name]['drawn']
    assert first == second and [z for _,z in fits[name]['ends'][0]] == [n_zeros(l, N) for l in levels]
