import matplotlib
matplotlib.use('Agg')

import pytest, torch

torch.set_num_threads(1)

@pytest.fixture(autouse=True)
def seeded(): torch.manual_seed(0)
