"Every callback leaves the same masks and weights on both of two ranks; torchrun starts once for all"
import pytest

from kinds import kinds, KINDS
from ranks import needs_gloo, on_two_ranks

pytestmark = needs_gloo

@pytest.fixture(scope='module')
def fits(tmp_path_factory): return on_two_ranks('ddp_contract_worker.py', [], tmp_path_factory.mktemp('ddp'))

@kinds
def test_both_ranks_end_with_the_same(fits, name):
    fit, kind = fits[name], KINDS[name]
    for what in ('ends', 'masks', 'weights', 'zeros', 'rows'):
        if what == 'rows' and name == 'rb': continue   # each rank draws its own masks
        assert fit[what][0] == fit[what][1], what
    assert fit['held'] == [True, True] and fit['zeros'][0] > 0
    if isinstance(kind.n_end, int): assert fit['zeros'][0] == kind.n_end
