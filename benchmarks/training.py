"""Cost of a training batch with SparsifyCallback, beside fasterai 0.4.1: `python benchmarks/training.py`

Writes benchmarks/training.md. All fits run in one process and alternate batch by batch, so that other load on the
machine affects all of them alike; a time is that of a whole batch, from `before_batch` to the end of `after_batch`."""
import argparse, io, platform, time
from contextlib import redirect_stdout
from importlib.metadata import version
from pathlib import Path
from statistics import fmean

import fasterai.core.criteria as their_criteria
import fasterai.core.schedule as their_schedules
import fasterai.sparse.sparsify_callback as theirs
import torch
from fastai.basics import Callback, CrossEntropyLossFlat, DataLoader, DataLoaders, Learner, noop, partial, set_seed, SGD
from fastai.callback.progress import ProgressCallback
from torchvision.models import resnet18

import fasterai_sparse.all as ours
from fasterai_sparse.core.schedules import sched_one_shot
import greenlet
from one_shot import tensor_bytes

N_EPOCHS = 6

def ours_cb(sparsity=90, granularity='weight', context='local', schedule=ours.lin, **kwargs):
    return ours.SparsifyCallback(sparsity, granularity, context, ours.large_final, schedule, verbose=False, **kwargs)

def theirs_cb(sparsity=.9, granularity='weight', context='local', **kwargs):
    # their module-level ones would be shared by the fits
    schedule = their_schedules.Schedule(their_schedules.sched_lin)
    return theirs.SparsifyCallback(sparsity, granularity, context, their_criteria.large_final, schedule, **kwargs)

RUNS = {   # name -> what makes our callback, theirs, and what is asked of ours, in dense batches
    'masks only, from the first batch': (partial(ours_cb, schedule=ours.Schedule(sched_one_shot, end_pct=1e-6)),
                                         None, 1.12),
    'weight local lin': (ours_cb, theirs_cb, 1.3),
    'weight global lin': (partial(ours_cb, context='global'), partial(theirs_cb, context='global'), 1.4),
    'filter local lin': (partial(ours_cb, granularity='filter'), partial(theirs_cb, granularity='filter'), 1.1),
    'kernel local lin': (partial(ours_cb, granularity='kernel'), partial(theirs_cb, granularity='kernel'), 1.2),
    '2:4 lin': (partial(ours_cb, sparsity=50, nm=True), partial(theirs_cb, sparsity=.5, nm=True), 1.3),
}

class TakeTurns(Callback):
    "Records the seconds of each training batch, and yields to the other fits after it"
    order, run_valid = -100, False
    def __init__(self, times): self.times = times
    def before_batch(self): self.start = time.perf_counter()

class GiveTurns(Callback):
    order, run_valid = 100, False
    def __init__(self, taken): self.taken = taken
    def after_batch(self):
        self.taken.times.append(time.perf_counter() - self.taken.start)
        greenlet.getcurrent().parent.switch()

class TimedSparsifier(ours.Sparsifier):
    "Records the seconds of each update"
    seconds = []
    def apply(self, *args, **kwargs):
        start = time.perf_counter()
        super().apply(*args, **kwargs)
        self.seconds.append(time.perf_counter() - start)

def learner(n_batches):
    set_seed(0)
    x, y = torch.randn(16,3,32,32), torch.randint(10,(16,))
    dls = DataLoaders(DataLoader([(x,y)]*n_batches, bs=None), DataLoader([(x,y)], bs=None))
    learn = Learner(dls, resnet18(num_classes=10), loss_func=CrossEntropyLossFlat(), opt_func=SGD, lr=1e-3)
    learn.logger = noop
    return learn.remove_cb(ProgressCallback)

def fit_together(makers, n_batches):
    "Name -> seconds of each batch, of fits with the callbacks from `makers` that alternate batch by batch"
    times, fits = {name: [] for name in makers}, {}
    for name,make in makers.items():
        taken = TakeTurns(times[name])
        cbs = [taken, GiveTurns(taken), *([] if make is None else [make()])]
        fits[name] = greenlet.greenlet(partial(learner(n_batches//3 if 'theirs' in name else n_batches).fit, N_EPOCHS,
                                               cbs=cbs))
    while fits := {name: fit for name,fit in fits.items() if not fit.dead}:
        for fit in fits.values(): fit.switch()
    return times

def mean_of(times):
    "Mean of `times` without pauses of the machine, batches that took over five times the median"
    median = sorted(times)[len(times)//2]
    return fmean(t for t in times if t < 5*median)

def memory(make):
    "Bytes of all tensors that a learner holds in the middle of a fit, after a backward pass"
    seen = []
    look = Callback(after_backward=lambda self: seen.append(tensor_bytes(self.learn)) if self.training
                    and self.epoch == N_EPOCHS//2 and self.iter == 1 else None)
    learner(4).fit(N_EPOCHS, cbs=[look, *([] if make is None else [make()])])
    return seen[0]

def main(n_batches, only_ours):
    makers = {'dense': None}
    for name,(our,their,_) in RUNS.items():
        makers[name] = partial(our, sparsifier=partial(type(name, (TimedSparsifier,), {'seconds': []})))
        if their and not only_ours: makers[name, 'theirs'] = their
    updates = {name: make.keywords['sparsifier'].func.seconds for name,make in makers.items() if name in RUNS}
    with redirect_stdout(io.StringIO()): times = fit_together(makers, n_batches)
    mean = {name: mean_of(t) for name,t in times.items()}
    dense = mean['dense']
    table = ['| schedule and granularity | ours, dense batches | asked | fasterai, dense batches | one update of '
             'ours, dense batches (median) | updates | ours, ms | fasterai, ms |', '|---|---|---|---|---|---|---|---|']
    for name,(_,_,asked) in RUNS.items():
        ups, other = sorted(updates[name]), mean.get((name,'theirs'))
        table.append(f'| {name} | {mean[name]/dense:.2f} | {asked} | {f"{other/dense:.2f}" if other else ""} | '
                     f'{ups[len(ups)//2]/dense:.2f} | {len(ups)} | {1e3*mean[name]:.0f} | '
                     f'{f"{1e3*other:.0f}" if other else ""} |')
        print(table[-1], flush=True)
    print(f'dense {1e3*dense:.1f} ms')
    if only_ours: return
    with redirect_stdout(io.StringIO()):
        held = {n: memory(m) for n,m in (('dense', None), ('ours', ours_cb), ('theirs', theirs_cb))}
    Path(__file__).with_suffix('.md').write_text('\n'.join(['# A batch of training', '',
        f'`python benchmarks/training.py`: fasterai_sparse {version("fasterai_sparse")} and fasterai '
        f'{version("fasterai")}, {len(makers)} fits in one process that take turns '
        f'batch by batch, {N_EPOCHS*n_batches} batches each (fasterai, which updates at every batch: a third); '
        f'ResNet-18, 16×3×32×32, SGD, default update rule, to 90 % (2:4 to 50 %); torch {version("torch")}, '
        f'{torch.get_num_threads()} threads, {platform.machine()}; means over all batches but for pauses of the '
        f'machine (over five times the median), a dense batch is {1e3*dense:.0f} ms.', '', *table, '',
        '## Memory while training', '', 'Bytes of the tensors that the learner holds in the middle of the fit, after '
                                        'a backward pass: '
        f'{held["ours"]/held["dense"]:.2f} times the dense learner\'s (fasterai: {held["theirs"]/held["dense"]:.2f}).',
        '']))

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--batches', type=int, default=80, help=f'batches per epoch, of which there are {N_EPOCHS}')
    parser.add_argument('--only-ours', action='store_true', help='leave fasterai out, and write nothing')
    main(**{k: v for k,v in zip(('n_batches', 'only_ours'), vars(parser.parse_args()).values())})
