"Run on two ranks by test_distributed.py with names of criteria: prints the results of each fit as JSON"
import hashlib, json, os, sys, types

os.environ['ACCELERATE_USE_CPU'] = 'true'

import torch, torch.distributed as dist
from fastai.basics import (
    CancelStepException, CrossEntropyLossFlat, DataLoader, DataLoaders, Learner, LongTensor, set_seed)
from torch import nn
from torch.nn.parallel import DistributedDataParallel

class Accelerator:
    "The part of accelerate that fastai uses, where accelerate is not installed"
    def __init__(self): dist.is_initialized() or dist.init_process_group('gloo')
    def prepare(self, model): return DistributedDataParallel(model)
    def backward(self, loss): loss.backward()

try: import accelerate
except ModuleNotFoundError:
    accelerate = sys.modules['accelerate'] = types.ModuleType('accelerate')
    accelerate.Accelerator = Accelerator

from fastai.callback.tracker import SaveModelCallback
from fastai.distributed import DistributedDL

import fasterai_sparse.core.criteria, fasterai_sparse.nm.permute_model   # the second adds `permute` to Sparsifier
from callback_helpers import at, collect, convnet, dead_filters, fit, masks, printed, sparse, weights, zeros
from fasterai_sparse.core.criteria import grad_crit, movement, wanda
from fasterai_sparse.core.schedules import dsd
from fasterai_sparse.core.sparsifier import Sparsifier

def broadcast(self, t, rank):
    t = LongTensor(t)
    dist.broadcast(t, rank)
    return t.tolist()

DistributedDL._broadcast = broadcast   # fastai's sends it to a GPU first

def digest(ts): return hashlib.sha1(b''.join(t.detach().contiguous().numpy().tobytes() for t in ts)).hexdigest()

class RecordingSparsifier(Sparsifier):
    "Records its masks after each update"
    def apply(self, *args, **kwargs):
        super().apply(*args, **kwargs)
        self.__dict__.setdefault('recorded', []).append(digest(masks(self.model)))

def items(n):
    g = torch.Generator().manual_seed(0)
    return list(zip(torch.randn(n, 2, 6, 6, generator=g), torch.randint(4, (n,), generator=g)))

def make(net=convnet):
    set_seed(dist.get_rank())   # nothing but the data is the same on both ranks
    dls = DataLoaders(DataLoader(items(48), bs=4, shuffle=True), DataLoader(items(8), bs=4), device='cpu')
    return Learner(dls, net(), loss_func=CrossEntropyLossFlat(), lr=1e-2)

def gathered(o):
    both = [None]*2
    dist.all_gather_object(both, o)
    return both

def finish(res):
    """Print `res` on the first rank and end the process at once.

    At a normal exit gloo's thread may drop its last tensor in an interpreter that is ending, and abort."""
    if dist.get_rank() == 0: print(json.dumps(res))
    dist.barrier()
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(0)

def train(learn, *cbs, n_epoch=2):
    state = lambda learn: (dist.get_world_size(), type(learn.model).__name__, len(learn.xb[0]))
    batches, seen = collect('before_batch', state)
    with learn.distrib_ctx(sync_bn=False, in_notebook=False): fit(learn, n_epoch, [batches, *cbs])
    assert seen == [(2, 'DistributedDataParallel', 4)]*6*n_epoch
    return learn

def left(learn, cb):
    recorded, ws = gathered(cb.sparsifier.recorded), gathered(digest(learn.model.parameters()))
    return dict(updates=len(recorded[0]), masks=recorded[0] == recorded[1], weights=ws[0] == ws[1],
                zeros=gathered(zeros(learn.model)))

def run(learn=None, net=convnet, cbs=(), **kwargs):
    data = torch.stack([x for x,_ in items(16)])
    cb = sparse(80, update_every=2, sparsifier=RecordingSparsifier, data=data, **kwargs)
    return left(train(learn or make(net), cb, *cbs), cb)

def twice():
    "A sparse fit, a plain one and one to a higher target; the model is wrapped again each time"
    learn = train(make(), sparse(50))
    n = zeros(train(learn).model)
    return dict(run(learn), plain=n)

def named():
    learn, cb = make(), sparse({'0': 50, '3': 75}, sparsifier=RecordingSparsifier, verbose=True)
    out = printed(lambda: train(learn, cb))
    return dict(left(learn, cb), counts=[int((w==0).sum()) for w in weights(learn.model)], out=gathered(out))

def filters():
    learn, cb = make(), sparse(50, granularity='filter', criteria=grad_crit, sparsifier=RecordingSparsifier)
    return dict(left(train(learn, cb), cb), counts=[int(dead_filters(w).sum()) for w in weights(learn.model)])

def back_to_dense(): return run(schedule=dsd)

def reloaded():
    "SaveModelCallback loads the file of the first rank on all ranks"
    return run(criteria=movement, cbs=[SaveModelCallback(with_opt=True)])

def loader_as_data():
    learn = make(unnormed)
    cb = sparse(80, criteria=wanda, data=learn.dls.valid, sparsifier=RecordingSparsifier)
    return left(train(learn, cb), cb)

def unnormed(): return nn.Sequential(*(m for m in convnet() if not isinstance(m, nn.BatchNorm2d)))

def wanda_without_batchnorm(): return run(net=unnormed, criteria=wanda)

def permuted():
    "Channels are permuted alike on both ranks, although each sees other batches"
    learn, cb = make(), sparse(50, nm=True, permute=True, update_every=2, sparsifier=RecordingSparsifier)
    train(learn, cb)
    found = cb.sparsifier.permutation
    return dict(left(learn, cb), moved=gathered(bool(found.kept.sum() > found.naive.sum())))

def one_loss_is_not_finite():
    "The last step is skipped on both ranks, as after an overflow; the loss is infinite on one of them"
    def last(learn): return learn.epoch == 1 and learn.iter == learn.n_iter-1
    def spoil(learn):
        if last(learn) and dist.get_rank() == 1: learn.loss = learn.loss*torch.inf
    def skip(learn):
        if last(learn): raise CancelStepException()
    return run(cbs=[at('after_loss', spoil), at('before_step', skip)])

SCENES = [twice, named, filters, back_to_dense, reloaded, loader_as_data, wanda_without_batchnorm, permuted,
          one_loss_is_not_finite]

if __name__ == '__main__':
    Accelerator()
    res = {f.__name__: f() for f in SCENES}
    for n in sys.argv[1:]:
        criteria = getattr(fasterai_sparse.core.criteria, n)
        for c in ('local', 'global'): res[f'{n}-{c}'] = run(criteria=criteria, context=c)
    finish(res)
