"""Accuracy on Fashion-MNIST of learned masks, and of magnitude masks renewed at each epoch

Run `python benchmarks/learned.py --jobs 2`.
Appends each finished run to benchmarks/learned.csv, skips those that are there, and writes benchmarks/learned.md and
benchmarks/learned.png from it. The data: Debian's `dataset-fashion-mnist`."""
import argparse, os, time
from copy import deepcopy
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from accuracy import DATA, FILES, LR, learner, n_params, small_resnet18   # first: it silences a warning
from torch import nn

from fasterai_sparse.core.criteria import large_final
from fasterai_sparse.core.report import sparsity_report
from fasterai_sparse.core.schedules import agp
from fasterai_sparse.core.sparsifier import Sparsifier
from fasterai_sparse.train.bn_adaptation import adapt_batchnorm
from fasterai_sparse.train.sparsify_callback import SparsifyCallback
from fasterai_sparse.nncf.magnitude import MagnitudeSparsityCallback
from fasterai_sparse.nncf.rb import RBSparsityCallback
from runs import asked_for, append, cell, cpu_name, percentage, positive, trained

ARMS = {   # what makes the callback of a sparsity in percent
    'RB': RBSparsityCallback,
    'magnitude, normed_abs': MagnitudeSparsityCallback,
    'magnitude, abs': partial(MagnitudeSparsityCallback, weight_importance='abs'),
    'gradual': lambda sparsity: SparsifyCallback(sparsity, 'weight', 'global', large_final, agp, layer_type=(nn.Conv2d,
        nn.Linear), verbose=False)}
ONE_SHOT, ADAPTED = 'one-shot', 'one-shot, BatchNorm adapted'   # of the dense network
N_SAMPLES = 2048

class Run(NamedTuple):
    "Settings that identify a run: the first columns of the csv"
    arm: str
    sparsity: float   # percent
    seed: int
    epochs: int
    bs: int
    images: int

KEY, MEASURED = list(Run._fields), ['accuracy', 'measured_sparsity', 'seconds']   # both in percent

def measured(learn):
    "Accuracy and sparsity of the learner's model, in percent"
    df = sparsity_report(learn.model)
    return f'{100*float(learn.validate()[-1]):.2f}', f'{100*df.zeros.sum()/df.params.sum():.3f}'

def one_shots(run, learn, sparsities):
    """Rows of the dense network of `learn` pruned in one shot to each of `sparsities`, before and after BatchNorm
    adaptation"""
    dense = deepcopy(learn.model)
    for s in sparsities:
        learn.model = deepcopy(dense)
        Sparsifier(learn.model, 'weight', 'global', large_final).sparsify_model(s)
        yield run._replace(arm=ONE_SHOT, sparsity=s), *measured(learn), ''
        start = time.perf_counter()
        adapt_batchnorm(learn, n_samples=N_SAMPLES, show=False)
        seconds = time.perf_counter() - start
        yield run._replace(arm=ADAPTED, sparsity=s), *measured(learn), f'{seconds:.1f}'

def train(run, path, sparsities):
    "The rows of `run`, with accuracy and sparsity at the end, and seconds of the fit"
    learn = learner(run, path)
    with learn.no_bar(), learn.no_logging():
        start = time.perf_counter()
        learn.fit_one_cycle(run.epochs, LR, cbs=ARMS[run.arm](run.sparsity) if run.arm in ARMS else None)
        seconds = time.perf_counter() - start
        rows = [(run, *measured(learn), f'{seconds:.1f}')]
        return rows if run.arm in ARMS else rows + list(one_shots(run, learn, sparsities))

def asked_runs(args):
    "All rows that `args` ask for, one seed after the other"
    same = args.epochs, args.bs, args.images
    for seed in range(args.seeds):
        yield Run('dense', 0., seed, *same)
        for a in (*ARMS, ONE_SHOT, ADAPTED):
            for p in args.sparsities: yield Run(a, p, seed, *same)

def run_all(missing, args, file):
    "Train the missing rows and append them to the csv `file`"
    runs = list(dict.fromkeys(r if r.arm in ARMS else r._replace(arm='dense', sparsity=0.) for r in missing))
    for i,rows in enumerate(trained(partial(train, sparsities=args.sparsities), runs, args.jobs, args.path), 1):
        for run,*what in rows:
            if run in missing: append(file, KEY+MEASURED, [*run, *what])
        run, *what = rows[0]
        print(f'{i}/{len(runs)}  {run.arm} {run.sparsity:g} % seed {run.seed}: accuracy {what[0]} %, sparsity '
              f'{what[1]} %, {what[2]} s', flush=True)

def span(values):
    "Smallest and greatest of `values`; one number where both print the same"
    return ' to '.join(dict.fromkeys(f'{v:.2f}' for v in (values.min(), values.max()))) if len(values) else '–'

def table(df, args):
    "Yield the lines of a markdown table of accuracies, with the reached sparsities below"
    at = lambda arm, p: df[(df.arm==arm) & (df.sparsity==p)].set_index('seed')
    yield '| | 0 % | ' + ' | '.join(f'{p:g} %' for p in args.sparsities) + ' |'
    yield '|---'*(len(args.sparsities)+2) + '|'
    yield f'| dense | {cell(at("dense", 0).accuracy, args.seeds)} |' + ' |'*len(args.sparsities)
    for a in (*ARMS, ONE_SHOT, ADAPTED):
        yield f'| {a} | | ' + ' | '.join(cell(at(a, p).accuracy, args.seeds) for p in args.sparsities) + ' |'
    for a in ARMS:
        if a != 'gradual':
            yield f'| {a}, over gradual seed by seed | | ' + ' | '.join(cell((at(a, p).accuracy - at('gradual',
                p).accuracy).dropna(), args.seeds) for p in args.sparsities) + ' |'
    yield '| adapted, over one-shot | | ' + ' | '.join(cell((at(ADAPTED, p).accuracy - at(ONE_SHOT,
        p).accuracy).dropna(), args.seeds) for p in args.sparsities) + ' |'
    for a in ARMS:
        yield f'| sparsity measured: {a} | | ' + ' | '.join(span(at(a, p).measured_sparsity)
                                                            for p in args.sparsities) + ' |'

def command(args):
    "The command line that repeats what `args` asked for"
    words = []
    for a in parser()._actions:
        if a.dest in ('help', 'jobs', 'out', 'path', 'table_only') or (v := getattr(args, a.dest)) == a.default:
            continue
        words += [a.option_strings[0], *(f'{o:g}' if isinstance(o, float) else str(o)
                                         for o in (v if isinstance(v, list) else [v]))]
    return ' '.join(['python benchmarks/learned.py', *words])

def write_md(df, args, file):
    "Write the settings and the table of the results `df`"
    file.write_text('\n'.join(['# Learned and magnitude masks, on Fashion-MNIST', '',
        f'`{command(args)}`: test accuracy in percent, mean ± standard deviation over {args.seeds} seeds, after the '
        f'last of {args.epochs} epochs of {args.images//args.bs} batches, each run in a process of '
        f'one thread; fasterai_sparse {version("fasterai_sparse")}, torch {version("torch")}, fastai '
        f'{version("fastai")}, {cpu_name()}, {os.cpu_count()} cores.', '',
        *table(df, args), '', '![Accuracy against sparsity](learned.png)', '',
        f'- Data: {args.images:,} training and 10,000 test images, no augmentation. Network: ResNet-18 of width 16 '
        f'with a stride-2 stem, {n_params(small_resnet18())[1]:,} parameters, '
        'of which the weights of all convolutions and of the head are sparse; the sparsity is of these, counted in '
        'the trained model.',
        f'- Training, the same for all: Adam, `fit_one_cycle({args.epochs}, {LR:g})`, batches of {args.bs}. A seed '
        f'sets the first weights and the order of the batches, for all rows alike.',
        '- RB and magnitude: the callbacks with their defaults, levels at the start of each epoch along a line over '
        'the first half of the fit, masks fixed in its last quarter. gradual: `SparsifyCallback`, schedule agp, '
        'one ranking of all layers.',
        f'- one-shot: the dense network after `sparsify_model`, one ranking of all layers, without any training; '
        f'adapted: after {N_SAMPLES:,} training images through `adapt_batchnorm`.',
        '- Each run: learned.csv.']) + '\n')

def plot(df, args, file):
    "Save accuracy against sparsity as a picture, a line per arm and a band for dense"
    import matplotlib.pyplot as plt
    fig,ax = plt.subplots(figsize=(7,4.5), layout='constrained')
    dense = df.accuracy[df.arm=='dense']
    if len(dense):
        m, sd = dense.mean(), dense.std() if len(dense) > 1 else 0
        ax.axhspan(m-sd, m+sd, color='.85')
        ax.axhline(m, color='.5', lw=1, label='dense')
    for i,a in enumerate(ARMS):
        g = df[df.arm==a].groupby('sparsity').accuracy
        # side by side, so that no bar hides another
        xs = [args.sparsities.index(p) + .06*(i-(len(ARMS)-1)/2) for p in g.groups]
        ax.errorbar(xs, g.mean(), g.std().fillna(0), label=a, color=f'C{i}', marker='o', ms=4, capsize=3)
    ax.set_xticks(range(len(args.sparsities)), [f'{p:g}' for p in args.sparsities])
    ax.set(xlabel='sparsity (%)', ylabel=f'test accuracy (%), mean ± sd of {args.seeds} seeds')
    ax.legend()
    fig.savefig(file, dpi=110)
    plt.close(fig)

def parser():
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0],
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument('--epochs', default=4, type=positive, help='epochs of each run')
    p.add_argument('--bs', default=128, type=positive, help='images in a batch')
    p.add_argument('--seeds', default=3, type=positive, help='how many seeds, from 0')
    p.add_argument('--sparsities', default=[70., 80., 90.], nargs='+', type=percentage, metavar='S',
                   help='targets in percent')
    p.add_argument('--images', default=60000, type=positive, help='use only the first of the 60,000 training images')
    p.add_argument('--jobs', default=1, type=positive, help='runs at a time, each in a process of one thread')
    p.add_argument('--out', default=Path(__file__).parent, type=Path, help='folder for learned.csv, .md and .png')
    p.add_argument('--path', default=DATA, type=Path, help='folder of the data')
    p.add_argument('--table-only', action='store_true', help='train nothing: write the table and the picture from the '
                                                             'csv')
    return p

def main():
    df, args = asked_for(parser(), 'learned', asked_runs, run_all, KEY, MEASURED, FILES)
    write_md(df, args, args.out/'learned.md')
    plot(df, args, args.out/'learned.png')

if __name__ == '__main__': main()
