"Run by test_with_fastai.py: `die` is killed in the middle of an epoch, `resume` continues from its last checkpoint"
import os, sys

from fastai.callback.tracker import SaveModelCallback

from callback_helpers import at, collect, fit, learner, sparse, zeros
from fasterai_sparse.core.from_zeros import masks_from_zeros

N_EPOCH, BROKEN = 6, 3

def die(learn):
    if (learn.epoch, learn.iter) == (BROKEN, 2): os._exit(1)

learn = learner()
if sys.argv[1] == 'die':
    fit(learn, N_EPOCH, [sparse(), SaveModelCallback(every_epoch=True, with_opt=True), at('after_batch', die)])
else:
    learn.load(f'model_{BROKEN-1}', with_opt=True)
    masks_from_zeros(learn.model)
    loaded = zeros(learn.model)
    watch, seen = collect('after_batch', lambda learn: zeros(learn.model))
    fit(learn, N_EPOCH, [sparse(), watch], start_epoch=BROKEN)
    last = zeros(learn.model)
    print(loaded, len(seen), min(seen), seen[5], last, zeros(fit(learn, 1).model))
