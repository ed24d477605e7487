"Results on CUDA are those on the CPU"
from copy import deepcopy

import pytest, torch
from fastai.basics import CrossEntropyLossFlat, DataLoader, DataLoaders, Learner, math
from fasterai_sparse.core.criteria import grad_crit, large_final, movement, random_criteria, small_final, wanda
from fasterai_sparse.core.masks import mask_sparsity, masked_params
from fasterai_sparse.core.patterns import block
from fasterai_sparse.core.schedules import agp, lin
from fasterai_sparse.core.select import n_zeros, top_k_mask
from fasterai_sparse.core.sparsifier import Sparsifier
from fasterai_sparse.train.sparsify_callback import SparsifyCallback
from fasterai_sparse.nm.permute_model import permute_model
from fasterai_sparse.nm.verify import verify_nm
from fasterai_sparse.engine.modules import Accelerated
from torch import nn


pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device')]

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4,16,3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16,32,3,groups=2),
                         nn.BatchNorm2d(32), nn.ReLU(),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32,8))

def same_masks(a, b):
    return all(torch.equal(x.cpu(), y.cpu()) for (*_,x),(*_,y) in zip(masked_params(a), masked_params(b), strict=True))

@pytest.mark.parametrize('scores',
                         [torch.rand(1_000_003), torch.rand(100_000).mul(9).round(), torch.ones(70_001),
                          torch.randn(999).bfloat16(),
                                    (torch.rand(500_000)-.9).relu(), torch.randn(10_000).double()])
@pytest.mark.parametrize('share', [.001, .1, .5, .9, .9999])
def test_top_k_mask_equals_its_cpu_twin(scores, share):
    k = int(share*scores.numel())
    assert torch.equal(top_k_mask(scores.cuda(), k).cpu(), top_k_mask(scores, k))

def test_top_k_mask_among_live():
    scores, live = torch.rand(100_000), torch.rand(100_000) > .7
    assert torch.equal(top_k_mask(scores.cuda(), 5_000, live.cuda()).cpu(), top_k_mask(scores, 5_000, live))
    with pytest.raises(ValueError, match='NaN'): top_k_mask(torch.tensor([1., math.nan, 3]).cuda(), 1)

@pytest.mark.parametrize('criteria', [large_final, random_criteria, small_final, movement])
@pytest.mark.parametrize('context', ['local', 'global'])
@pytest.mark.parametrize('granularity', ['weight', 'row', 'kernel', 'filter', 'shared_kernel', block(4,1)])
def test_sparsifier_makes_the_masks_of_the_cpu(criteria, context, granularity):
    cpu = net()
    gpu = deepcopy(cpu).cuda()
    for m in (cpu, gpu):
        s = Sparsifier(m, granularity, context, criteria)
        s.sparsify_model(40)
        s.sparsify_model(75)
    assert same_masks(cpu, gpu)

@pytest.mark.parametrize('nm', [True, (1,4)])
def test_nm_makes_the_masks_of_the_cpu(nm):
    cpu = net()
    gpu = deepcopy(cpu).cuda()
    for m in (cpu, gpu):
        Sparsifier(m, 'weight', 'local', large_final, nm=nm, layer_type=(nn.Conv2d, nn.Linear)).sparsify_model(50)
    assert same_masks(cpu, gpu)

def test_wanda_on_cuda():
    torch.manual_seed(0)
    cpu, x = net(), torch.randn(8, 4, 12, 12)
    gpu = deepcopy(cpu).cuda()
    for m in (cpu, gpu): Sparsifier(m, 'weight', 'local', wanda, data=x).sparsify_model(50)
    differ = sum(int((a.cpu() != b.cpu()).sum()) for (*_,a),(*_,b) in zip(masked_params(cpu), masked_params(gpu)))
    assert differ <= 4   # sums in another order

def test_masks_move_and_follow():
    m = net()
    Sparsifier(m, 'weight', 'local', large_final).sparsify_model(50)
    m.cuda()
    assert all(mask.is_cuda for *_,mask in masked_params(m))
    m.load_state_dict(net().state_dict())
    assert mask_sparsity(m) == 0
    m.cpu()

def learner(cbs=None):
    torch.manual_seed(0)
    x, y = torch.randn(256, 4, 12, 12), torch.randint(8, (256,))
    ds = list(zip(x, y))
    dls = DataLoaders(DataLoader(ds, bs=64, shuffle=True), DataLoader(ds, bs=64)).cuda()
    return Learner(dls, net().cuda(), loss_func=CrossEntropyLossFlat(), cbs=cbs)

def zeros(m): return sum(int((c.weight==0).sum()) for c in m.modules() if isinstance(c, nn.Conv2d))

@pytest.mark.parametrize('precision', ['to_fp32', 'to_fp16', 'to_bf16'])
@pytest.mark.parametrize('context', ['local', 'global'])
def test_callback_reaches_its_target_in_every_precision(precision, context):
    learn = getattr(learner(), precision)()
    n = sum(c.weight.numel() for c in learn.model.modules() if isinstance(c, nn.Conv2d))
    with learn.no_bar(), learn.no_logging():
        learn.fit(2, cbs=SparsifyCallback(90, 'weight', context, large_final, agp, verbose=False))
        assert zeros(learn.model) == n_zeros(.9, n)
        learn.fit(1)
    assert zeros(learn.model) == n_zeros(.9, n)

def test_gradient_criterion_under_a_grad_scaler():
    learn = learner().to_fp16()
    with learn.no_bar(), learn.no_logging():
        learn.fit(2, cbs=SparsifyCallback(50, 'weight', 'local', grad_crit, lin, verbose=False))
    assert abs(mask_sparsity(learn.model) - .5) < 1e-3

def test_permute_model_and_verified_pattern():
    cpu = net().eval()
    gpu, x = deepcopy(cpu).cuda(), torch.randn(2,4,12,12)
    df, on_gpu = permute_model(cpu, x), permute_model(gpu, x.cuda())
    assert on_gpu.attrs['share'] == df.attrs['share'] and on_gpu.kept.sum() == pytest.approx(df.kept.sum(), rel=.01)
    torch.testing.assert_close(gpu(x.cuda()).cpu(), net().eval()(x), rtol=1e-4, atol=1e-4)
    Sparsifier(gpu, 'weight', 'local', large_final, nm=True, layer_type=(nn.Conv2d, nn.Linear)).sparsify_model(50)
    assert (verify_nm(gpu).pattern == '2:4').all()
    with pytest.raises(TypeError, match='on the CPU|float32'): Accelerated(deepcopy(cpu))(x.cuda())
