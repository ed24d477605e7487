"Run on two ranks by test_dynamic_distributed.py with names of presets: prints the results of each fit as JSON"
import sys

from fastai.basics import Callback

from callback_helpers import collect, masks, zeros_hold
from ddp_worker import Accelerator, digest, finish, gathered, make, train
from fasterai_sparse.dynamic import callback as dynamic
from fasterai_sparse.dynamic.callback import DynamicSparseTrainingCallback
from fasterai_sparse.dynamic.random_masks import sparsify_model


class MaskLog(Callback):
    "Records the masks after each update of `cb`"
    order, run_valid = 90, False
    def __init__(self, cb): self.cb, self.recorded = cb, []
    def after_batch(self):
        if len(self.cb.log) > len(self.recorded): self.recorded.append(digest(masks(self.learn.model)))

def n_kept(learn): return [int(mask.sum()) for mask in masks(learn.model)]

def preset(name):
    kwargs = dict(sparsity=80) if name == 'GraNet' else {}
    return {**getattr(dynamic, f'{name}_presets'), 'batches_per_update': 2, 'stop_pct': 1., **kwargs}

def run_preset(name):
    "A fit of 42 batches that starts from different random masks on each rank"
    learn, cb = make(), DynamicSparseTrainingCallback(**preset(name))
    sparsify_model(learn.model, .5)
    drawn, start, mask_log = digest(masks(learn.model)), n_kept(learn), MaskLog(cb)
    begin, begun = collect('before_fit', lambda learn: digest(masks(learn.model)), 90)
    step, holds = collect('after_step', zeros_hold, 90)
    train(learn, cb, mask_log, begin, step, n_epoch=7)
    here = dict(drawn=drawn, begun=begun, recorded=mask_log.recorded, weights=digest(learn.model.parameters()),
                held=all(holds), log=cb.log.to_csv(), counts=n_kept(learn))
    n = sum(mask.numel() for mask in masks(learn.model))
    return dict({k: gathered(v) for k,v in here.items()}, start=start, n=n)

if __name__ == '__main__':
    Accelerator()
    res = {n: run_preset(n) for n in sys.argv[1:]}
    finish(res)
