"""Cost of a batch while masks are learned, or renewed from magnitudes: `python benchmarks/soft_masks.py`

Writes benchmarks/soft_masks.md. All fits of one network run in one process and alternate batch by batch, as in
training.py."""
import argparse, platform, time
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Callable, NamedTuple

from accuracy import small_resnet18   # first: it silences a warning
import greenlet, torch
from fastai.basics import Callback, CrossEntropyLossFlat, DataLoader, DataLoaders, Learner, SGD, noop, set_seed
from fastai.callback.progress import ProgressCallback
from torchvision.models import resnet18

from fasterai_sparse.core.criteria import large_final
from fasterai_sparse.core.schedules import sched_one_shot, Schedule
from fasterai_sparse.core.sparsifier import Sparsifier
from fasterai_sparse.train.keep_masks import KeepMasks
from fasterai_sparse.nncf.magnitude import MagnitudeSparsityCallback
from fasterai_sparse.nncf.rb import RBSparsityCallback
from one_shot import tensor_bytes
from training import GiveTurns, TakeTurns, mean_of

N_EPOCHS, SPARSITY = 3, 70

class Net(NamedTuple):
    make: Callable
    shape: tuple      # of a batch of images
    per_epoch: int    # batches of an epoch that a mask drawn at its start is divided by

NETS = {'ResNet-18, 11.2 M weights, 16×3×32×32': Net(partial(resnet18, num_classes=10), (16,3,32,32), 469),
        'ResNet-18 of width 16, 0.7 M weights, 128×1×28×28': Net(small_resnet18, (128,1,28,28), 469)}

class TimedMagnitude(MagnitudeSparsityCallback):
    "Records the seconds of each renewal of the masks"
    def before_fit(self):
        self.seconds = []
        super().before_fit()

    def new_masks(self, level):
        start = time.perf_counter()
        super().new_masks(level)
        self.seconds.append(time.perf_counter() - start)

def keep_masks(learn):
    Sparsifier(learn.model, 'weight', 'global', large_final).sparsify_model(SPARSITY)
    return KeepMasks()

at_once = Schedule(sched_one_shot)
ARMS = {'dense': lambda learn: [], 'hard masks': lambda learn: [keep_masks(learn)],
        'RB': lambda learn: [RBSparsityCallback(SPARSITY, at_once)],
        'magnitude': lambda learn: [TimedMagnitude(SPARSITY, at_once)]}
ASKED = {('RB', 1): '≤ 1.4', ('magnitude', 0): '≤ 1.1', ('magnitude', 1): '≤ 1.1'}   # by arm and number of the network

def learner(net, n_batches):
    set_seed(0)
    x, y = torch.randn(net.shape), torch.randint(10, net.shape[:1])
    dls = DataLoaders(DataLoader([(x,y)]*n_batches, bs=None), DataLoader([(x,y)], bs=None))
    learn = Learner(dls, net.make(), loss_func=CrossEntropyLossFlat(), opt_func=partial(SGD, mom=.9), lr=1e-3)
    learn.logger = noop
    return learn.remove_cb(ProgressCallback)

def fit_together(net, n_batches):
    "Seconds of each batch, and the callbacks, by arm, of fits that alternate batch by batch"
    times, cbs, fits = {name: [] for name in ARMS}, {}, {}
    for name,make in ARMS.items():
        learn, taken = learner(net, n_batches), TakeTurns(times[name])
        cbs[name] = make(learn)
        fits[name] = greenlet.greenlet(partial(learn.fit, N_EPOCHS, cbs=[taken, GiveTurns(taken), *cbs[name]]))
    while fits := {name: fit for name,fit in fits.items() if not fit.dead}:
        for fit in fits.values(): fit.switch()
    return times, cbs

def memory(net, name):
    "Bytes of all tensors that a learner holds in the middle of a fit, after a backward pass"
    seen, learn = [], learner(net, 4)
    look = Callback(after_backward=lambda self: seen.append(tensor_bytes(self.learn)) if self.training
                    and self.epoch == 1 and self.iter == 1 else None)
    look.order = 40
    learn.fit(N_EPOCHS, cbs=[look, *ARMS[name](learn)])
    return seen[0]

def rows(i, net, n_batches):
    "Yield the lines of the table of the `i`th network"
    yield '| | a batch, in dense ones | asked | ms | new masks at an epoch\'s start, ms | tensors held, in dense ones |'
    yield '|---'*6 + '|'
    times, cbs = fit_together(net, n_batches)
    held = {name: memory(net, name) for name in ARMS}
    draw = {name: median(cbs[name][0].seconds) if name == 'magnitude' else 0. for name in ARMS}
    mean = {name: mean_of(t) + draw[name]/net.per_epoch for name,t in times.items()}
    for name in ARMS:
        yield (f'| {name} | {mean[name]/mean["dense"]:.2f} | {ASKED.get((name, i), "")} | {1e3*mean[name]:.1f} | '
               f'{f"{1e3*draw[name]:.0f}" if draw[name] else ""} | '
               f'{held[name]/held["dense"]:.2f} |')

def main(n_batches, out):
    lines = [l for i,(name,net) in enumerate(NETS.items()) for l in (f'## {name}', '', *rows(i, net, n_batches), '')]
    print('\n'.join(lines))
    (out/'soft_masks.md').write_text('\n'.join(['# A batch with soft masks', '',
        f'`python benchmarks/soft_masks.py`: fasterai_sparse {version("fasterai_sparse")}, for each network '
        f'{len(ARMS)} fits in one process that take turns batch by batch, {N_EPOCHS*n_batches} batches each; '
        f'SGD with momentum, level {SPARSITY} % from the first epoch on; torch {version("torch")}, '
        f'{torch.get_num_threads()} threads, {platform.machine()}.', '', *lines,
        '- A batch: the mean over all, without pauses of the machine (over five times the median); the masks that '
        'magnitude sparsity draws at the start of an epoch are shared out over 469 batches, those of Fashion-MNIST at '
        '128.',
        '- hard masks: `KeepMasks`. RB draws a mask of each weight at each batch, and trains a logit for it with an '
        'Adam of its own.',
        '- Tensors held: bytes of all tensors that the learner holds in the middle of a fit, after a backward pass. '
        'Magnitude: a second copy of the weights and a byte for each. '
        'RB besides: logits, their gradients, two averages of Adam and the slopes, 4 bytes each.', '']))

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--batches', type=int, default=100, help=f'batches per epoch, of which there are {N_EPOCHS}')
    parser.add_argument('--out', default=Path(__file__).parent, type=Path, help='folder for soft_masks.md')
    args = parser.parse_args()
    main(args.batches, args.out)
