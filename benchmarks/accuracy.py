"""Accuracy on Fashion-MNIST, dense and made sparse while training: `python benchmarks/accuracy.py --jobs 2`

Appends each finished run to benchmarks/accuracy.csv, skips those that are there, and writes benchmarks/accuracy.md and
benchmarks/accuracy.png from it. The data: Debian's `dataset-fashion-mnist`."""
import argparse, os, time
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import NamedTuple

from fasterai_sparse.core import schedules
from fasterai_sparse.core.criteria import large_final
from fasterai_sparse.core.report import sparsity_report
from fasterai_sparse.train.sparsify_callback import SparsifyCallback
from fasterai_sparse.demo import fashion_mnist, whole_dls
import torch
from fastai.basics import CrossEntropyLossFlat, Learner, accuracy, set_seed
from fastai.layers import ConvLayer
from torch import nn

from runs import asked_for, append, cell, cpu_name, percentage, positive, trained

SCHEDULES = ['one_shot', 'iterative', 'agp', 'one_cycle']
DATA = '/usr/share/datasets/fashion-mnist'
FILES = [f'{s}-{kind}-ubyte.gz' for s in ('train', 't10k') for kind in ('images-idx3', 'labels-idx1')]
LR = 3e-3

class Run(NamedTuple):
    "Settings that identify a run: the first columns of the csv"
    schedule: str
    context: str
    sparsity: float   # percent
    seed: int
    epochs: int
    bs: int
    images: int

KEY, MEASURED = list(Run._fields), ['accuracy', 'measured_sparsity', 'seconds']   # both in percent

class Block(nn.Module):
    "Two 3×3 convolutions and a shortcut, which is a 1×1 convolution where the shape changes"
    def __init__(self, ni, nf, stride):
        super().__init__()
        self.convs = nn.Sequential(ConvLayer(ni, nf, stride=stride), ConvLayer(nf, nf, act_cls=None))
        self.shortcut = nn.Identity() if (ni, stride) == (nf, 1) else ConvLayer(ni, nf, 1, stride=stride, act_cls=None)

    def forward(self, x): return torch.relu(self.convs(x) + self.shortcut(x))

def small_resnet18(width=16):
    "ResNet-18 for one channel and ten classes, with a 3×3 stem of stride 2 and no max-pooling"
    widths = [width, width, 2*width, 4*width, 8*width]
    blocks = [b for i,(ni,nf) in enumerate(zip(widths, widths[1:])) for b in (Block(ni, nf, 2 if i else 1),
        Block(nf, nf, 1))]
    return nn.Sequential(ConvLayer(1, width, stride=2), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(widths[-1], 10))

def n_params(model):
    "Number of weights in convolutions, and of all parameters"
    return sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Conv2d)), sum(p.numel()
        for p in model.parameters())

def learner(run, path):
    "A learner with the same initial weights and batches for all runs of one seed"
    set_seed(run.seed)
    dls = fashion_mnist(run.bs, path)
    dls = whole_dls((dls.train.x[:run.images], dls.train.y[:run.images]), (dls.valid.x, dls.valid.y), run.bs)
    return Learner(dls, small_resnet18(), loss_func=CrossEntropyLossFlat(), metrics=accuracy)

def train(run, path):
    "`run` with its accuracy and sparsity at the end, in percent, and the seconds of `fit_one_cycle`"
    learn = learner(run, path)
    cbs = [] if run.schedule == 'dense' else [SparsifyCallback(run.sparsity, 'weight', run.context, large_final,
                                                               getattr(schedules, run.schedule), verbose=False)]
    with learn.no_bar(), learn.no_logging():
        start = time.perf_counter()
        learn.fit_one_cycle(run.epochs, LR, cbs=cbs)
        seconds = time.perf_counter() - start
        percent = 100*float(learn.validate()[-1])
    df = sparsity_report(learn.model, layer_type=nn.Conv2d)
    return run, f'{percent:.2f}', f'{100*df.zeros.sum()/df.params.sum():.3f}', f'{seconds:.1f}'

def asked_runs(args):
    "All runs that `args` ask for, one seed after the other"
    same = args.epochs, args.bs, args.images
    for seed in range(args.seeds):
        yield Run('dense', '-', 0., seed, *same)
        for c,s,p in product(args.contexts, SCHEDULES, args.sparsities): yield Run(s, c, p, seed, *same)

def run_all(runs, args, file):
    "Train `runs` and append each to the csv `file`"
    for i,(run,*measured) in enumerate(trained(train, runs, args.jobs, args.path), 1):
        append(file, KEY+MEASURED, [*run, *measured])
        print(f'{i}/{len(runs)}  {run.schedule} {run.context} {run.sparsity:g} % seed {run.seed}: accuracy '
              f'{measured[0]} %, '
              f'sparsity {measured[1]} %, {measured[2]} s', flush=True)

def span(values):
    "Smallest and greatest of `values`; one number where both print the same"
    return ' to '.join(dict.fromkeys(f'{v:.2f}' for v in (values.min(), values.max()))) if len(values) else '–'

def lines_of(args):
    "Label, schedule and context of each row of the table and line of the picture"
    return [(s if c == 'local' else f'{s}, {c}', s, c) for c,s in product(args.contexts, SCHEDULES)]

def table(df, args):
    "Yield the lines of a markdown table of accuracies"
    at = lambda s, c, p: df.accuracy[(df.schedule==s) & (df.context==c) & (df.sparsity==p)]
    yield '| schedule | 0 % | ' + ' | '.join(f'{p:g} %' for p in args.sparsities) + ' |'
    yield '|---'*(len(args.sparsities)+2) + '|'
    yield f'| dense | {cell(at("dense", "-", 0), args.seeds)} |' + ' |'*len(args.sparsities)
    for label,s,c in lines_of(args):
        yield f'| {label} | | ' + ' | '.join(cell(at(s, c, p), args.seeds) for p in args.sparsities) + ' |'
    yield '| sparsity measured | ' + ' | '.join(span(df.measured_sparsity[df.sparsity==p])
                                                for p in [0, *args.sparsities]) + ' |'

def window(name):
    "Part of the fit in which the schedule called `name` prunes"
    s = getattr(schedules, name)
    return f'{name} at {s.start_pct:.0%}' if name == 'one_shot' else f'{name} from {s.start_pct:.0%} to {s.end_pct:.0%}'

def command(args):
    "The command line that repeats what `args` asked for"
    words = []
    for a in parser()._actions:
        if a.dest in ('help', 'jobs', 'out', 'path', 'table_only') or (v := getattr(args, a.dest)) == a.default:
            continue
        words += [a.option_strings[0], *(f'{o:g}' if isinstance(o, float) else str(o)
                                         for o in (v if isinstance(v, list) else [v]))]
    return ' '.join(['python benchmarks/accuracy.py', *words])

def write_md(df, args, file):
    "Write the settings and the table of the results `df`"
    n_conv, n_all = n_params(small_resnet18())
    epochs = f'{args.epochs} epoch' + 's'*(args.epochs != 1)
    file.write_text('\n'.join(['# Accuracy on Fashion-MNIST after training to a sparsity', '',
        f'`{command(args)}`: test accuracy in percent, mean ± standard deviation over {args.seeds} seeds, after the '
        f'last of {epochs}, '
        f'of a network trained dense or with `SparsifyCallback`, each run in a process of one thread; fasterai_sparse '
        f'{version("fasterai_sparse")}, '
        f'torch {version("torch")}, fastai {version("fastai")}, {cpu_name()}, {os.cpu_count()} cores.', '',
        *table(df, args), '', '![Accuracy against sparsity](accuracy.png)', '',
        f'- Data: {args.images:,} training and 10,000 test images, no augmentation.',
        f'- Network: ResNet-18 of width 16 with a stride-2 stem, {n_all:,} parameters. Sparse are the weights of all '
        f'convolutions, '
        f'{n_conv:,} or {n_conv/n_all:.1%} of them; the sparsity is of these, counted in the trained model (last row).',
        f'- Training, the same for all: Adam, `fit_one_cycle({args.epochs}, {LR:g})`, batches of {args.bs}. '
        'A seed sets the first weights and the order of the batches, for all rows alike.',
        f'- Sparsifying: single weights by magnitude (`large_final`), context {" and ".join(args.contexts)}, the '
        f'default rule of updates. '
        f'In shares of the training: {", ".join(map(window, SCHEDULES))}.',
        '- Each run: accuracy.csv.']) + '\n')

def plot(df, args, file):
    "Save accuracy against sparsity as a picture, a line per schedule and a band for dense"
    import matplotlib.pyplot as plt
    fig,ax = plt.subplots(figsize=(7,4.5), layout='constrained')
    dense = df.accuracy[df.schedule=='dense']
    if len(dense):
        m, sd = dense.mean(), dense.std() if len(dense) > 1 else 0
        ax.axhspan(m-sd, m+sd, color='.85')
        ax.axhline(m, color='.5', lw=1, label='dense')
    lines = lines_of(args)
    for i,(label,s,c) in enumerate(lines):
        g = df[(df.schedule==s) & (df.context==c)].groupby('sparsity').accuracy
        # side by side, so that no bar hides another
        xs = [args.sparsities.index(p) + .06*(i-(len(lines)-1)/2) for p in g.groups]
        ax.errorbar(xs, g.mean(), g.std().fillna(0), label=label, color=f'C{SCHEDULES.index(s)}', ls='-' if c=='local'
                    else '--', marker='o', ms=4, capsize=3)
    ax.set_xticks(range(len(args.sparsities)), [f'{p:g}' for p in args.sparsities])
    ax.set(xlabel='sparsity of the convolutions (%)', ylabel=f'test accuracy (%), mean ± sd of {args.seeds} seeds')
    ax.legend()
    fig.savefig(file, dpi=110)
    plt.close(fig)

def parser():
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0],
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument('--epochs', default=3, type=positive, help='epochs of each run')
    p.add_argument('--bs', default=128, type=positive, help='images in a batch')
    p.add_argument('--seeds', default=3, type=positive, help='how many seeds, from 0')
    p.add_argument('--sparsities', default=[50., 80., 90., 95.], nargs='+', type=percentage, metavar='S',
                   help='targets in percent')
    p.add_argument('--contexts', default=['local'], nargs='+', choices=['local', 'global'],
                   help='each layer for itself, one ranking of all, or both')
    p.add_argument('--images', default=60000, type=positive, help='use only the first of the 60,000 training images')
    p.add_argument('--jobs', default=1, type=positive, help='runs at a time, each in a process of one thread')
    p.add_argument('--out', default=Path(__file__).parent, type=Path, help='folder for accuracy.csv, .md and .png')
    p.add_argument('--path', default=DATA, type=Path, help='folder of the data')
    p.add_argument('--table-only', action='store_true', help='train nothing: write the table and the picture from the '
                                                             'csv')
    return p

def main():
    df, args = asked_for(parser(), 'accuracy', asked_runs, run_all, KEY, MEASURED, FILES)
    write_md(df, args, args.out/'accuracy.md')
    plot(df, args, args.out/'accuracy.png')

if __name__ == '__main__': main()
