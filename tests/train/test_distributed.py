"Training on two ranks keeps the same masks on both; torchrun starts once, and each test checks a part of its output"
import inspect

import pytest

from callback_helpers import N
from ranks import needs_gloo, on_two_ranks
from fasterai_sparse.core import criteria
from fasterai_sparse.core.select import n_zeros

pytestmark = needs_gloo

def is_score(f): return inspect.isfunction(f) and next(iter(inspect.signature(f).parameters), '') == 'p'

CRITERIA = [n for n in criteria.__all__ if is_score(f := getattr(criteria, n)) and f.__name__ == n]

@pytest.fixture(scope='module')
def fits(tmp_path_factory): return on_two_ranks('ddp_worker.py', CRITERIA, tmp_path_factory.mktemp('ddp'))

def assert_alike(fit, expected):
    assert fit['updates'] >= 4 and fit['masks'] and fit['weights'] and fit['zeros'] == [expected]*2

def test_all_criteria_are_there():
    assert len(CRITERIA) >= 16 and {'random_criteria', 'movement', 'grad_crit', 'wanda'} <= set(CRITERIA)

@pytest.mark.parametrize('context', ['local', 'global'])
@pytest.mark.parametrize('name', CRITERIA)
def test_masks_are_the_same_on_both_ranks(fits, name, context):
    assert_alike(fits[f'{name}-{context}'], n_zeros(.8, N))

def test_masks_that_are_there_when_the_model_is_wrapped_again(fits):
    assert_alike(fits['twice'], n_zeros(.8, N))
    assert fits['twice']['plain'] == n_zeros(.5, N)

def test_names_are_those_of_the_model_inside(fits):
    assert_alike(fits['named'], 72+864)
    assert fits['named']['counts'] == [72, 864]
    lines = fits['named']['out'][0].splitlines()
    assert any(l.split()[:2] == ['3', 'Conv2d'] for l in lines) and 'module' not in fits['named']['out'][0]

def test_only_the_first_rank_speaks(fits):
    first, second = fits['named']['out']
    assert 'Final Sparsity' in first and second == ''

def test_filters_with_their_batchnorm(fits):
    assert_alike(fits['filters'], 4*18 + 8*72)
    assert fits['filters']['counts'] == [4, 8]

def test_what_comes_back_is_the_same_on_both_ranks(fits): assert_alike(fits['back_to_dense'], 0)

def test_a_model_that_is_reloaded(fits):
    fit = fits['reloaded']
    assert fit['masks'] and fit['weights'] and fit['zeros'][0] == fit['zeros'][1] > 0

@pytest.mark.parametrize('scene', ['loader_as_data', 'wanda_without_batchnorm'])
def test_wanda(fits, scene): assert_alike(fits[scene], n_zeros(.8, N))

def test_channels_move_alike(fits):
    assert_alike(fits['permuted'], 1152//2)
    assert fits['permuted']['moved'] == [True, True]

def test_a_loss_that_is_not_finite_on_one_rank(fits):
    fit = fits['one_loss_is_not_finite']
    assert fit['masks'] and fit['weights'] and fit['zeros'][0] == fit['zeros'][1] > 0
