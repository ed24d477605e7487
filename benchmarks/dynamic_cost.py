"""Cost of a batch while masks change during training, beside fastsparse 0.0.5

Run `python benchmarks/dynamic_cost.py`.
Writes benchmarks/dynamic_cost.md. All fits run in one process and alternate batch by batch, as in training.py."""
import argparse, io, platform, time, warnings
from contextlib import redirect_stdout
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Callable, NamedTuple

import fastsparse.core as theirs
import greenlet, torch
from fastai.basics import Callback, CrossEntropyLossFlat, DataLoader, DataLoaders, Learner, SGD, noop, set_seed
from fastai.callback.progress import ProgressCallback
from torchvision.models import resnet18

import fasterai_sparse.all as ours
from one_shot import tensor_bytes
from training import GiveTurns, N_EPOCHS, TakeTurns, mean_of

SPARSITY = .9

class Timed(ours.DynamicSparseTrainingCallback):
    "Records when each update happened and its seconds: reading gradients, and changing masks"
    def before_fit(self):
        self.updates = []
        super().before_fit()

    def _is_due(self):
        self.since = time.perf_counter()
        return super()._is_due()

    def _see_gradients(self):
        due = super()._see_gradients()
        self.spent = time.perf_counter() - self.since
        if due and self.replace_step: self.note(self.spent)
        return due

    def _update(self):
        start = time.perf_counter()
        super()._update()
        if not self.replace_step: self.note(self.spent + time.perf_counter()-start)

    def note(self, seconds): self.updates.append((self.n_batches()-1, seconds))

class TheirsTimed(theirs.DynamicSparseTrainingCallback):
    def before_fit(self):
        self.updates = []
        super().before_fit()

    def after_backward(self):
        start = time.perf_counter()
        try: super().after_backward()
        finally:
            if self.is_update_step:
                self.updates.append((self.learn.epoch*self.learn.n_iter + self.learn.iter, time.perf_counter()-start))

class HalfZero(Callback):
    "Half of the gradients are exactly zero, as those behind inactive ReLUs"
    run_valid = False
    def before_fit(self): self.zeros = [(p, torch.rand_like(p) < .5) for p in self.model.parameters()]
    def after_backward(self):
        for p,zero in self.zeros: p.grad.masked_fill_(zero, 0)

class Arm(NamedTuple):
    package: object = None   # whose masks; None: dense
    presets: dict = None     # of its callback, None: masks that stay
    every: int = None        # batches from one update to the next
    cbs: Callable = lambda: []   # what else the fit has

    def callbacks(self, every):
        if self.presets is None: return self.cbs()
        return [(Timed if self.package is ours else TheirsTimed)(**{**self.presets, 'batches_per_update': every}),
                *self.cbs()]

keep = lambda: [ours.KeepMasks()]
DENSE, STATIC, HALF = 'dense', 'static masks', 'RigL every 20, half of the gradients zero'
ARMS = {DENSE: Arm(), STATIC: Arm(ours, cbs=keep),
        'RigL every 100': Arm(ours, ours.RigL_presets, 100), 'RigL every 20': Arm(ours, ours.RigL_presets, 20),
        HALF: Arm(ours, ours.RigL_presets, 20, lambda: [HalfZero()]),
        'SET every 100': Arm(ours, ours.SET_presets, 100), 'SNFS every 100': Arm(ours, ours.SNFS_presets, 100),
        'fastsparse: static masks': Arm(theirs), 'fastsparse: RigL every 100': Arm(theirs, theirs.RigL_presets, 100),
        'fastsparse: SET every 100': Arm(theirs, theirs.SET_presets, 100), 'fastsparse: SNFS every 100': Arm(theirs,
            theirs.SNFS_presets, 100)}

def learner(arm, n_batches):
    set_seed(0)
    x, y = torch.randn(16,3,32,32), torch.randint(10,(16,))
    dls, model = DataLoaders(DataLoader([(x,y)]*n_batches, bs=None),
                             DataLoader([(x,y)], bs=None)), resnet18(num_classes=10)
    if arm.package is ours: ours.sparsify_model(model, SPARSITY, ours.erdos_renyi_sparsity, enforce_mask=False)
    if arm.package is theirs: theirs.sparsify_model(model, SPARSITY, theirs.erdos_renyi_sparsity)
    learn = Learner(dls, model, loss_func=CrossEntropyLossFlat(), opt_func=partial(SGD, mom=.9), lr=1e-3)
    learn.logger = noop
    return learn.remove_cb(ProgressCallback)

def fit_together(arms, n_batches):
    "Name -> seconds of each batch, and (number, seconds) of each update, of fits that alternate batch by batch"
    times, cbs, fits = {name: [] for name in arms}, {name: a.callbacks(a.every) for name,a in arms.items()}, {}
    for name,arm in arms.items():
        taken = TakeTurns(times[name])
        fits[name] = greenlet.greenlet(partial(learner(arm, n_batches).fit, N_EPOCHS, cbs=[taken, GiveTurns(taken),
            *cbs[name]]))
    while fits := {name: fit for name,fit in fits.items() if not fit.dead}:
        for fit in fits.values(): fit.switch()
    return times, {name: c[0].updates if arms[name].presets else [] for name,c in cbs.items()}

def mean_batch(times, updates):
    "Mean of `times` without pauses of the machine; batches with and without an update are filtered separately"
    at = {i for i,_ in updates}
    parts = [[t for i,t in enumerate(times) if (i in at) == is_update] for is_update in (False, True)]
    return sum(len(p)*mean_of(p) for p in parts if p)/len(times)

def memory(arm):
    "Bytes of all tensors that a learner holds in the middle of a fit, after a backward pass"
    seen = []
    look = Callback(after_backward=lambda self: seen.append(tensor_bytes(self.learn)) if self.training
                    and self.epoch == N_EPOCHS//2 and self.iter == 1 else None)
    learner(arm, 4).fit(N_EPOCHS, cbs=[look, *arm.callbacks(2)])
    return seen[0]

def rows(mean, updates, held):
    "Yield the lines of the table"
    yield ('| | a batch, in that of static masks | asked | in dense ones | ms | updates | one update, ms (median) | '
           'asked | tensors held, in dense ones |')
    yield '|---'*9 + '|'
    for name,arm in ARMS.items():
        ups, asked = [s for _,s in updates[name]], arm.package is ours and arm.presets is not None
        batch = [f'{mean[name]/mean[STATIC]:.2f}', '≤ 1.15' if asked else '', f'{mean[name]/mean[DENSE]:.2f}',
                 f'{1e3*mean[name]:.0f}']
        update = [len(ups) if arm.presets else '', f'{1e3*median(ups):.0f}' if ups else '', '≤ 60' if asked else '']
        memory = f'{held[name]/held[DENSE]:.2f}' if name != HALF else ''
        cells = [name, *(batch if name != HALF else ['']*4), *update, memory]
        yield f'| {" | ".join(map(str, cells))} |'

def main(n_batches, out):
    # by names that fastsparse chose, and of what `tensor_bytes` looks at
    warnings.filterwarnings('ignore', message='You are shadowing|The .grad attribute')
    with redirect_stdout(io.StringIO()):
        times, updates = fit_together(ARMS, n_batches)
        held = {name: memory(arm) for name,arm in ARMS.items()}
    mean = {name: mean_batch(t, updates[name]) for name,t in times.items()}
    table = list(rows(mean, updates, held))
    print('\n'.join(table))
    (out/'dynamic_cost.md').write_text('\n'.join(['# A batch of dynamic sparse training', '',
        f'`python benchmarks/dynamic_cost.py`: fasterai_sparse {version("fasterai_sparse")} and fastsparse '
        f'{version("fastsparse")}, {len(ARMS)} fits in one process that take turns batch by batch, '
        f'{N_EPOCHS*n_batches} batches each; ResNet-18, 16×3×32×32, SGD with momentum, {SPARSITY:.0%} by ERK, the '
        f'presets; torch {version("torch")}, {torch.get_num_threads()} threads, {platform.machine()}.', '',
        *table, '',
        '- A batch: the mean over all, updates included, without pauses of the machine (over five times the median of '
        'batches with an update, or of those without).',
        '- static masks: `KeepMasks`, zeros after each step. fastsparse applies its masks before each forward pass of '
        'a layer, by hooks; its SNFS goes by the momentum that SGD keeps of all weights, ours by an average of its '
        'own.',
        '- One update: looking at the gradients and changing the masks. fastsparse leaves out the step at an update, '
        'and so does RigL here.',
        f'- {HALF}: what zeroes them takes time and memory of its own, so these are left out.',
        '- Tensors held: bytes of all tensors that the learner holds in the middle of a fit, after a backward pass, '
        'here with an update every 2 batches.', '']))

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--batches', type=int, default=150, help=f'batches per epoch, of which there are {N_EPOCHS}')
    parser.add_argument('--out', default=Path(__file__).parent, type=Path, help='folder for dynamic_cost.md')
    args = parser.parse_args()
    main(args.batches, args.out)
