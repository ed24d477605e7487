"Run on two ranks by test_soft_masks_distributed.py: prints the results of each fit with soft masks as JSON"
import sys

import torch
from fastai.basics import Callback
from fastai.callback.training import GradientAccumulation

from callback_helpers import follows_masks, masks, zeros
from ddp_worker import Accelerator, digest, finish, gathered, make, train
from kinds import LAYERS, Stirred
from fasterai_sparse.core.masks import set_mask
from fasterai_sparse.nncf.epoch_schedules import Polynomial
from fasterai_sparse.nncf.magnitude import MagnitudeSparsityCallback

class MaskLog(Callback):
    "Records the masks that `cb` draws, and the weights and logits after each step"
    order, run_valid = 90, False
    def __init__(self, cb):
        self.cb, self.masks, self.steps, self.spared, self.ends, self.drawn = cb, [], [], [], [], []
    def before_backward(self):
        if self.cb.frozen: return
        self.masks.append(digest(self.cb.soft.masks.values()))
        self.drawn.append({n: m.clone() for n,m in self.cb.soft.masks.items()})
    def before_step(self):
        "Are averaged gradients zero where both ranks have dropped a weight, and some not where only one has?"
        for n,p in self.cb.params.items() if self.drawn else ():
            here = sum(d[n].int() for d in self.drawn).tolist()
            kept, n_drawn = sum(torch.tensor(m) for m in gathered(here)), 2*len(self.drawn)
            partly = (0 < kept) & (kept < n_drawn)
            self.spared.append(not p.grad[kept == 0].any() and bool(p.grad[partly].any()) == bool(partly.any()))
        self.drawn = []
    def after_batch(self):
        self.steps.append(digest([*getattr(self.cb.soft, 'logits', {}).values(), *self.cb.params.values()]))
    def after_epoch(self):
        ps = self.cb.params.values()
        self.ends.append((digest(ps), sum(int((p == 0).sum()) for p in ps)))

def run_soft(cb, *cbs, learn=None, n_epoch=4):
    learn, log = learn or make(), MaskLog(cb)
    train(learn, cb, log, *cbs, n_epoch=n_epoch)
    at = list(learn.recorder.metric_names).index('sparsity') - 1
    here = dict(drawn=log.masks, steps=log.steps, spared=log.spared, ends=log.ends,
                masks=digest(masks(learn.model)), weights=digest(learn.model.parameters()),
                zeros=zeros(learn.model, LAYERS), held=follows_masks(learn.model),
                column=[float(v[at]) for v in learn.recorder.values])
    return {k: gathered(v) for k,v in here.items()}

def rb(): return run_soft(Stirred(60))
def rb_local(): return run_soft(Stirred(60, context='local'))
def rb_to_the_end(): return run_soft(Stirred(60, freeze_pct=1))
def rb_accumulates(): return run_soft(Stirred(60, freeze_pct=1), GradientAccumulation(8))
def magnitude(): return run_soft(MagnitudeSparsityCallback(60))
def magnitude_adapts():
    schedule = Polynomial(.2, .6, 3, 2)
    return run_soft(MagnitudeSparsityCallback(schedule=schedule, num_bn_adaptation_samples=8))

def again():
    learn, cb = make(), Stirred(40)
    run_soft(cb, learn=learn)
    return run_soft(cb, learn=learn)

def from_masks_of_the_rank():
    "The ranks start from different masks, as without a common seed"
    learn = make()
    for m in (learn.model[0], learn.model[3]): set_mask(m, torch.rand_like(m.weight) > .3)
    return run_soft(Stirred(60), learn=learn)

if __name__ == '__main__':
    Accelerator()
    res = {n: globals()[n]() for n in sys.argv[1:]}
    finish(res)
