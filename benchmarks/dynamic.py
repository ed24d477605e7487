"""Accuracy on Fashion-MNIST of networks that are sparse from the start: `python benchmarks/dynamic.py --jobs 2`

Appends each finished run to benchmarks/dynamic.csv, skips those that are there, and writes benchmarks/dynamic.md and
benchmarks/dynamic.png from it. The data: Debian's `dataset-fashion-mnist`."""
import argparse, os, signal, sys, time
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Callable, NamedTuple

from accuracy import DATA, FILES, LR, learner, n_params, small_resnet18   # first: it silences a warning
from fastai.basics import Adam, Callback, SGD
from fastai.callback.schedule import sched_no
from torch import nn

from fasterai_sparse.core.allocation import erdos_renyi_sparsity
from fasterai_sparse.core.criteria import large_final
from fasterai_sparse.core.layers import maskable_weights
from fasterai_sparse.core.masks import get_mask
from fasterai_sparse.core.report import sparsity_report, weight_uses
from fasterai_sparse.core.schedules import agp, Schedule
from fasterai_sparse.train.keep_masks import KeepMasks
from fasterai_sparse.train.sparsify_callback import SparsifyCallback
from fasterai_sparse.dynamic.callback import (
    DynamicSparseTrainingCallback, GraNet_presets, MEST_presets, RigL_presets, SET_presets, SNFS_presets)
from fasterai_sparse.dynamic.random_masks import sparsify_model
from runs import append, cell, cpu_name, percentage, positive, results, trained

@dataclass(frozen=True)
class Arm:
    "A way to train a sparse network; by default random masks that never change"
    # Arguments of `DynamicSparseTrainingCallback`, of which `sparsity` is set to the run's where it is there
    dst:dict = None
    start:float = None # Percent of the weights that are zero at the start; None: as many as at the end
    schedule:Schedule = None # Of a `SparsifyCallback`
    times:int = 1 # Epochs, in those asked for
    opt_func:Callable = Adam
    lr:float = LR
    base:str = 'static' # The arm that it is to beat

def dst(presets, **kwargs):
    "Arguments of the callback, with an update every `--every` batches unless `kwargs` say otherwise"
    return {**presets, 'batches_per_update': None, **kwargs}

RIGL, SGD_ARM = dst(RigL_presets), dict(opt_func=SGD, lr=.05, base='static, SGD')
ARMS = {'dense': Arm(start=0), 'static': Arm(), 'SET': Arm(dst(SET_presets)), 'SNFS': Arm(dst(SNFS_presets)),
        'RigL': Arm(RIGL),
        'GraNet': Arm(dst(GraNet_presets, sparsity=None), start=50), 'gradual': Arm(start=0, schedule=agp),
        'RigL 2x': Arm(RIGL, times=2)}
MAIN = list(ARMS)
ARMS |= {   # to find out why
    'static 2x': Arm(times=2), 'SET 2x': Arm(dst(SET_presets), times=2), 'dense 2x': Arm(start=0, times=2),
    'gradual to 75 %': Arm(start=0, schedule=replace(agp, end_pct=.75)), 'GraNet from dense': Arm(dst(GraNet_presets,
        sparsity=None), start=0),
    'RigL, step first': Arm(dst(RigL_presets, replace_step=False)),
    'RigL, drop .5': Arm(dst(RigL_presets, initial_drop_grow_pct=.5)),
    'RigL, drop .1': Arm(dst(RigL_presets, initial_drop_grow_pct=.1)),
    'RigL to the end': Arm(dst(RigL_presets, stop_pct=1.)),
    'SET, drop kept': Arm(dst(SET_presets, drop_schedule=sched_no)), 'SET to 75 %': Arm(dst(SET_presets, stop_pct=.75)),
    'SNFS, not shared out': Arm(dst(SNFS_presets, redistribute=None)), 'MEST': Arm(dst(MEST_presets)),
    **{f'{n} every {k}': Arm({**p, 'batches_per_update': k}) for n,p in (('RigL', RigL_presets), ('SET', SET_presets),
        ('SNFS', SNFS_presets)) for k in (5, 10, 50, 100, 200)},
    'dense, SGD': Arm(start=0, **SGD_ARM), 'static, SGD': Arm(**SGD_ARM), 'SET, SGD': Arm(dst(SET_presets), **SGD_ARM),
    'SNFS, SGD': Arm(dst(SNFS_presets), **SGD_ARM), 'RigL, SGD': Arm(RIGL, **SGD_ARM), 'gradual, SGD': Arm(start=0,
        schedule=agp, **SGD_ARM)}

class Run(NamedTuple):
    "Settings that identify a run: the first columns of the csv"
    arm: str
    sparsity: float   # percent
    every: int   # batches from one update to the next, 0 where there are none
    seed: int
    epochs: int
    bs: int
    images: int

KEY = list(Run._fields)
# accuracy and explored in percent, FLOPs in dense ones
MEASURED = ['accuracy', 'live', 'weights', 'training_flops', 'inference_flops', 'explored', 'updates', 'seconds']

class CountFlops(Callback):
    "Records at each training batch the FLOPs of a forward pass of one image under the current masks"
    run_valid = False
    def before_fit(self):
        self.uses, self.passes, self.per_epoch = weight_uses(self.model, self.dls.valid.x[:1]), [], len(self.dls.train)
        self.dense = self.flops(lambda m, p: m._parameters[p].numel())
    def flops(self, n): return sum(2*self.uses[id(m._parameters[p])]*n(m, p) for _,m,p in maskable_weights(self.model))
    def n_live(self, m, p):
        return m._parameters[p].numel() if get_mask(m, p) is None else int(get_mask(m, p).count_nonzero())
    def before_batch(self): self.passes.append(self.flops(self.n_live))

def training_flops(count, dst=None):
    """FLOPs of the fit per image, relative to a dense fit of as many batches: three sparse passes per batch, and
    a dense weight gradient where growth needs it"""
    needs = set() if dst is None else dst.sparsifier.grow.needs
    at = ()   # batches whose gradient is dense
    if 'opt' in needs: at = range(len(count.passes))
    elif 'grad' in needs: at = (dst.log.epoch*count.per_epoch).round().astype(int)-1
    return (3*sum(count.passes) + sum(count.dense-count.passes[i] for i in at)) / (3*count.dense*len(count.passes))

def callbacks(run, arm):
    if arm.schedule is not None:
        return [SparsifyCallback(run.sparsity, 'weight', 'global', large_final, arm.schedule, layer_type=(nn.Conv2d,
            nn.Linear), verbose=False)]
    if arm.dst is None: return [KeepMasks()]
    to = {'sparsity': run.sparsity} if 'sparsity' in arm.dst else {}
    return [DynamicSparseTrainingCallback(**{**arm.dst, 'batches_per_update': run.every, 'seed': run.seed, **to})]

def train(run, path):
    "`run` and its measurements"
    arm, learn = ARMS[run.arm], learner(run, path)
    learn.opt_func = arm.opt_func
    start = run.sparsity if arm.start is None else arm.start
    if start: sparsify_model(learn.model, start/100, erdos_renyi_sparsity, enforce_mask=False, seed=run.seed)
    cbs, count = callbacks(run, arm), CountFlops()
    with learn.no_bar(), learn.no_logging():
        begin = time.perf_counter()
        learn.fit_one_cycle(run.epochs, arm.lr, cbs=[*cbs, count])
        seconds = time.perf_counter() - begin
        percent = 100*float(learn.validate()[-1])
    df, cb = sparsity_report(learn.model, learn.dls.valid.x[:1]), cbs[0] if arm.dst else None
    explored = f'{100*cb.log.explored.max():.2f}' if cb else ''
    live, flops = df.params.sum()-df.zeros.sum(), arm.times*training_flops(count, cb)
    return run, f'{percent:.2f}', live, df.params.sum(), f'{flops:.4f}', \
           f'{df.sparse_flops.sum()/df.flops.sum():.4f}', explored, len(cb.log) if cb else 0, f'{seconds:.1f}'

def run_of(name, sparsity, seed, args):
    "The run of the arm called `name`"
    arm = ARMS[name]
    every = 0 if arm.dst is None else arm.dst['batches_per_update'] or args.every
    return Run(name, 0. if arm.start == 0 and arm.dst is None and arm.schedule is None else sparsity, every, seed,
               args.epochs*arm.times, args.bs, args.images)

def asked_runs(args):
    return list(dict.fromkeys(run_of(a, p, seed, args) for seed in range(args.seeds) for p in args.sparsities
                              for a in args.arms))

def run_all(runs, args, file):
    "Train `runs` and append each to the csv `file`"
    for i,(run,*measured) in enumerate(trained(train, runs, args.jobs, args.path), 1):
        append(file, KEY+MEASURED, [*run, *measured])
        m = dict(zip(MEASURED, measured))
        print(f'{i}/{len(runs)}  {run.arm} {run.sparsity:g} % seed {run.seed}: accuracy {m["accuracy"]} %, '
              f'{m["live"]:,} live, training '
              f'{m["training_flops"]}, inference {m["inference_flops"]}, {m["updates"]} updates, explored '
              f'{m["explored"] or "–"}, {m["seconds"]} s', flush=True)

def rows_of(df, name, sparsity, args):
    "The results of the arm called `name`, by seed"
    runs = [run_of(name, sparsity, seed, args) for seed in range(args.seeds)]
    return df[df.index.isin(runs)].reset_index().set_index('seed')

def mean(values, form='{:.2f}'):
    "Mean of `values`, formatted by `form`"
    return form.format(values.mean()) if len(values.dropna()) else '–'

def beside(rows, base):
    "Accuracy of `rows` minus that of `base`, paired by seed: mean ± standard deviation, and how many seeds are better"
    d = (rows.accuracy - base.accuracy).dropna()
    if not len(d): return '– | –'
    sd = f' ± {d.std():.2f}' if len(d) > 1 else ''
    return f'{d.mean():+.2f}{sd} | {(d > 0).sum()} of {len(d)}'

def table(df, sparsity, args):
    "Yield the lines of a markdown table for one sparsity"
    yield ('| | accuracy, % | paired with static | seeds above it | live weights | FLOPs to train | FLOPs to predict '
           '| explored, % | updates |')
    yield '|---'*9 + '|'
    for name in args.arms:
        rows, base = rows_of(df, name, sparsity, args), rows_of(df, ARMS[name].base, sparsity, args)
        yield (f'| {name} | {cell(rows.accuracy, args.seeds)} | '
               f'{" | " if name == ARMS[name].base else beside(rows, base)} | {mean(rows.live, "{:,.0f}")} | '
               f'{mean(rows.training_flops, "{:.3f}")} | {mean(rows.inference_flops, "{:.3f}")} | '
               f'{mean(rows.explored, "{:.1f}") if ARMS[name].dst else ""} | '
               f'{mean(rows.updates, "{:.0f}") if ARMS[name].dst else ""} |')

def command(args):
    "The command line that repeats what `args` asked for"
    words = []
    for a in parser()._actions:
        if a.dest in ('help', 'jobs', 'out', 'path', 'table_only') or (v := getattr(args, a.dest)) == a.default:
            continue
        words += [a.option_strings[0], *(f'{o:g}' if isinstance(o, float) else f"'{o}'" if ' ' in str(o) else str(o)
                                         for o in (v if isinstance(v, list) else [v]))]
    return ' '.join(['python benchmarks/dynamic.py', *words])

def write_md(df, args, file):
    "Write the settings and the tables of the results `df`"
    tables = [line for p in args.sparsities for line in (f'## {p:g} %', '', *table(df, p, args), '')]
    file.write_text('\n'.join(['# Sparse from the start, on Fashion-MNIST', '',
        f'`{command(args)}`: test accuracy in percent, mean ± standard deviation over {args.seeds} seeds, after '
        f'{args.epochs} epochs of {args.images//args.bs} batches '
        f'(2x: twice as many), each run in a process of one thread; fasterai_sparse {version("fasterai_sparse")}, '
        f'torch {version("torch")}, fastai {version("fastai")}, '
        f'{cpu_name()}, {os.cpu_count()} cores.', '', *tables, '![Accuracy against the cost of training](dynamic.png)',
        '',
        f'- Data: {args.images:,} training and 10,000 test images, no augmentation. Network: ResNet-18 of width 16 '
        f'with a stride-2 stem, {n_params(small_resnet18())[1]:,} parameters, '
        'of which the weights of all convolutions and of the head are sparse.',
        f'- Training: `fit_one_cycle`, Adam at {LR:g} (SGD with momentum at {SGD_ARM["lr"]:g} where a row says so), '
        f'batches of {args.bs}. '
        'A seed sets the first weights, the first masks and the order of the batches, for all rows alike; the paired '
        'column is the difference seed by seed, ± its standard deviation.',
        '- static: random masks of `sparsify_model(model, s, erdos_renyi_sparsity)` that stay. SET, SNFS, RigL and '
        'GraNet: the presets, from these masks '
        f'(GraNet: from 50 %), an update every {args.every} batches. gradual: `SparsifyCallback` from dense weights, '
        f'by magnitude in one ranking of all layers, schedule agp.',
        '- Live weights, explored and updates are measured: the weights that are not zero after training, the share '
        'of all that were ever under a mask\'s True (R_s of Liu et al. 2021), and the rows of `cb.log`.',
        '- FLOPs: of convolutions and head, in those of the dense network (to train: of as many epochs as dense, so '
        '2x counts double). A layer\'s forward pass takes 2 · uses of a weight per image · '
        'weights under its mask\'s True, counted at each batch. A training batch takes three of these: forward, '
        'gradient of the inputs, gradient of the live weights. '
        'Where growth asks for the gradient of all weights, the third is a dense one: for RigL and GraNet at the '
        'batches of an update, for SNFS, which averages it, at all. To predict: of the weights that are not zero.',
        '- Each run: dynamic.csv.']) + '\n')

def plot(df, args, file):
    "Save accuracy against the FLOPs of training as a picture, axes per sparsity"
    import matplotlib.pyplot as plt
    fig,axs = plt.subplots(1, len(args.sparsities), figsize=(5.5*len(args.sparsities),4.2), layout='constrained',
                           sharey=True, squeeze=False)
    for ax,p in zip(axs[0], args.sparsities):
        for i,name in enumerate(args.arms):
            rows = rows_of(df, name, p, args)
            if not len(rows): continue
            ax.errorbar(rows.training_flops.mean(), rows.accuracy.mean(), 0 if len(rows) < 2 else rows.accuracy.std(),
                        label=name, color=f'C{i%10}', marker='os^v'[i//10%4], ls='', ms=5, capsize=3)
        ax.set(xscale='log', xlabel='FLOPs to train, in dense ones', title=f'{p:g} % sparse')
        ax.set_xticks(ticks := [t for t in (.02, .05, .1, .2, .5, 1, 2) if ax.get_xlim()[0] < t < ax.get_xlim()[1]],
                      [f'{t:g}' for t in ticks])
        ax.minorticks_off()
    fig.legend(*axs[0,0].get_legend_handles_labels(), loc='outside right center')
    axs[0,0].set_ylabel(f'test accuracy (%), mean ± sd of {args.seeds} seeds')
    fig.savefig(file, dpi=110)
    plt.close(fig)

def parser():
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0],
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument('--arms', default=MAIN, nargs='+', choices=list(ARMS), metavar='ARM', help='ways to train: '
                   + ', '.join(f"'{a}'" for a in ARMS).replace('%', '%%'))
    p.add_argument('--epochs', default=3, type=positive, help='epochs of each run')
    p.add_argument('--every', default=20, type=positive, help='batches from one update to the next')
    p.add_argument('--bs', default=128, type=positive, help='images in a batch')
    p.add_argument('--seeds', default=3, type=positive, help='how many seeds, from 0')
    p.add_argument('--sparsities', default=[95., 98.], nargs='+', type=percentage, metavar='S', help='in percent')
    p.add_argument('--images', default=60000, type=positive, help='use only the first of the 60,000 training images')
    p.add_argument('--jobs', default=1, type=positive, help='runs at a time, each in a process of one thread')
    p.add_argument('--out', default=Path(__file__).parent, type=Path, help='folder for dynamic.csv, .md and .png')
    p.add_argument('--path', default=DATA, type=Path, help='folder of the data')
    p.add_argument('--table-only', action='store_true', help='train nothing: write the tables and the picture from '
                                                             'the csv')
    return p

def main():
    p = parser()
    args = p.parse_args()
    if not args.bs <= args.images <= 60000:
        p.error(f'--images must be from --bs ({args.bs}) to 60000, not {args.images}')
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))   # so that the workers end too
    file, asked = args.out/'dynamic.csv', asked_runs(args)
    missing = [] if args.table_only else [r for r in asked if r not in results(file, KEY, MEASURED).index]
    if missing and (lost := [f for f in FILES if not (args.path/f).exists()]):
        p.exit(2, f'No {", ".join(lost)} in {args.path}: install the Debian package dataset-fashion-mnist, or give '
                  f'the folder of its four .gz files with --path\n')
    args.out.mkdir(parents=True, exist_ok=True)
    run_all(missing, args, file)
    df = results(file, KEY, MEASURED)
    if not df.index.isin(asked).any(): p.exit(2, f'No run of these settings in {file}: leave out --table-only\n')
    write_md(df, args, args.out/'dynamic.md')
    plot(df, args, args.out/'dynamic.png')

if __name__ == '__main__': main()
