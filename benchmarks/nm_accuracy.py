"""Accuracy on Fashion-MNIST of 2:4, with channels as trained and in the order that `permute_model` finds

Run `python benchmarks/nm_accuracy.py`.
Appends each finished row to benchmarks/nm_accuracy.csv, skips seeds whose rows are all there, and writes
benchmarks/nm_accuracy.md from it. The data: Debian's `dataset-fashion-mnist`."""
import argparse, os, time
from copy import deepcopy
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from accuracy import DATA, FILES, LR, learner, n_params, small_resnet18   # first: it silences a warning
import torch
from torch import nn

from fasterai_sparse.core.criteria import large_final, wanda
from fasterai_sparse.core.masks import masked_params
from fasterai_sparse.core.sparsifier import Sparsifier
from fasterai_sparse.train.keep_masks import KeepMasks
from fasterai_sparse.nm.channels import outputs_of
from fasterai_sparse.nm.permute_model import permute_model
from runs import asked_for, append, cell, cpu_name, positive, trained

# by which scores channels move
ORDERS = {'as trained': None, 'random': lambda p: torch.rand(p.shape,
                                                             generator=torch.Generator().manual_seed(p.numel())),
                                                             'permuted': large_final}
DENSE, TRAINED_ON = 'dense', 'dense, trained on'
ONE_SHOT, ADAPTED, TUNED = '2:4', '2:4, BatchNorm adapted', '2:4, fine-tuned'
BY_WANDA = ['2:4 by Wanda', '2:4 by Wanda, BatchNorm adapted', '2:4 by Wanda, fine-tuned']
STAGES = ONE_SHOT, ADAPTED, TUNED, *BY_WANDA
FT_LR = 1e-3

class Run(NamedTuple):
    "Settings that identify a row: the first columns of the csv"
    stage: str
    order: str
    seed: int
    epochs: int
    ft_epochs: int   # of fine-tuning
    bs: int
    images: int

# accuracy, kept and row_bound in percent; error: relative, of the logits in float64, after channels have moved
KEY, MEASURED = list(Run._fields), ['accuracy', 'loss', 'kept', 'row_bound', 'error', 'seconds']

def validated(learn, model):
    "Test accuracy in percent and loss of `model`"
    learn.model = model
    loss, acc = learn.validate()
    return dict(accuracy=f'{100*acc:.2f}', loss=f'{loss:.4f}')

def by_wanda(model, data, permute, recalibrate=False):
    "A 2:4 copy of `model` whose weights are kept by |w|·‖x‖; with `permute` the channel order too"
    model = deepcopy(model)
    Sparsifier(model, 'weight', 'local', wanda, nm=True, permute=permute, layer_type=(nn.Linear, nn.Conv2d),
               data=data).sparsify_model(50, recalibrate=recalibrate)
    return model

def sparse(model, recalibrate=False, data=None):
    "A 2:4 copy of `model`, and the percentage of the magnitude of its sparse layers that is kept"
    model = deepcopy(model)
    dense = {n: p.detach().clone() for n,p in model.named_parameters()}
    Sparsifier(model, 'weight', 'local', large_final, nm=True, layer_type=(nn.Linear, nn.Conv2d),
               data=data).sparsify_model(50, recalibrate=recalibrate)
    names = {id(p): n for n,p in model.named_parameters()}
    left = [((dense[names[id(p)]]*mask).abs().double().sum(), dense[names[id(p)]].abs().double().sum())
            for _,_,p,mask in masked_params(model)]
    return model, 100*float(sum(a for a,_ in left)/sum(b for _,b in left))

def tuned(run, path, model):
    "`model` after fine-tuning under its masks; all copies of one seed see the same batches"
    learn = learner(run._replace(seed=1000+run.seed), path)
    learn.model = model
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(run.ft_epochs, FT_LR, cbs=KeepMasks())
    return learn.model

def ordered(model, x, scores):
    "A copy of `model` with permuted channels, and the report of the permutation"
    if scores is None: return deepcopy(model), {}
    moved, start = deepcopy(model), time.perf_counter()
    df = permute_model(moved, x, scores=scores)
    seconds, can = time.perf_counter()-start, df[df.naive.notna()]
    before, after = (torch.cat([t.flatten() for outs in outputs_of(m, x)[0] for t in outs]) for m in (model, moved))
    bound = {} if scores is not large_final else dict(row_bound=f'{100*can.row_bound.sum()/can.total.sum():.3f}')
    return moved, dict(error=f'{float((before-after).abs().max()/before.abs().max()):.1e}', seconds=f'{seconds:.2f}',
                       **bound)

def rows_of(run, path):
    "All rows of a seed, as (run, measured)"
    learn = learner(run, path)
    with learn.no_bar(), learn.no_logging():
        start = time.perf_counter()
        learn.fit_one_cycle(run.epochs, LR)
        seconds, dense, x = time.perf_counter()-start, deepcopy(learn.model), learn.dls.valid.x[:8]
        yield run, dict(validated(learn, dense), seconds=f'{seconds:.1f}')
        yield run._replace(stage=TRAINED_ON), validated(learn, tuned(run, path, deepcopy(dense)))
        for order,scores in ORDERS.items():
            moved, what = ordered(dense, x, scores)
            if scores is not None: yield run._replace(order=order), dict(validated(learn, moved), **what)
            one_shot, kept = sparse(moved)
            yield run._replace(stage=ONE_SHOT, order=order), dict(validated(learn, one_shot), kept=f'{kept:.3f}')
            calibration = learner(run._replace(seed=2000+run.seed), path).dls.train   # of one seed, the same for all
            yield run._replace(stage=ADAPTED, order=order), validated(learn, sparse(moved, True, calibration)[0])
            yield run._replace(stage=TUNED, order=order), validated(learn, tuned(run, path, one_shot))
            batches = [b for b,_ in zip(calibration, range(-(-2048//run.bs)))]
            start, permute = (dense, True) if order == 'permuted' else (moved, False)
            one_shot = by_wanda(start, batches, permute)
            for stage,m in zip(BY_WANDA, (one_shot, by_wanda(start, batches, permute, True))):
                yield run._replace(stage=stage, order=order), validated(learn, m)
            yield run._replace(stage=BY_WANDA[2], order=order), validated(learn, tuned(run, path, one_shot))

def train(run, path): return list(rows_of(run, path))

def asked_runs(args):
    "All rows that `args` ask for, one seed after the other"
    for seed in range(args.seeds):
        same = seed, args.epochs, args.ft_epochs, args.bs, args.images
        yield Run(TRAINED_ON, 'as trained', *same)
        for order in ORDERS:
            for stage in (DENSE, *STAGES): yield Run(stage, order, *same)

def run_all(missing, args, file):
    "Train the seeds with missing rows, and append their rows to the csv `file`"
    seeds = list(dict.fromkeys(r._replace(stage=DENSE, order='as trained') for r in missing))
    for rows in trained(train, seeds, args.jobs, args.path):
        for run,what in rows:
            if run in missing: append(file, KEY+MEASURED, [*run, *(what.get(m, '') for m in MEASURED)])
            print(f'seed {run.seed}  {run.stage}, {run.order}: {what}', flush=True)

def table(df, args):
    "Yield the lines of the markdown tables"
    def at(stage, order, what='accuracy'):
        return df[(df.stage==stage) & (df.order==order)].set_index('seed')[what].dropna()
    signed = lambda v: ', '.join(f'{d:+.2f}' for d in v.sort_index())
    yield ('| accuracy, % | ' + ' | '.join(ORDERS) + ' | permuted over as trained, seed by seed | random over as '
                                                     'trained, seed by seed |')
    yield '|---'*(len(ORDERS)+3) + '|'
    for s in (DENSE, *STAGES):
        more = [at(s, o)-at(s, 'as trained') for o in ('permuted', 'random')]
        yield f'| {s} | ' + ' | '.join(cell(at(s, o), args.seeds)
                                       for o in ORDERS) + ' | ' + ' | '.join(f'{cell(d.dropna(), args.seeds)} '
                                           f'({signed(d.dropna())})' for d in more) + ' |'
    yield f'| {TRAINED_ON} | {cell(at(TRAINED_ON, "as trained"), args.seeds)} |' + ' |'*(len(ORDERS)+1)
    yield ''
    yield '| test loss | ' + ' | '.join(ORDERS) + ' | permuted over as trained, seed by seed |'
    yield '|---'*(len(ORDERS)+2) + '|'
    for s in STAGES:
        losses = ' | '.join(f'{at(s, o, "loss").mean():.3f}' for o in ORDERS)
        paired = (at(s, 'permuted', 'loss')-at(s, 'as trained', 'loss')).dropna()
        yield f'| {s} | {losses} | ' + ', '.join(f'{d:+.3f}' for d in paired) + ' |'
    yield ''
    yield '| magnitude that 2:4 keeps, % | ' + ' | '.join(ORDERS) + ' | row bound | efficacy, % |'
    yield '|---'*(len(ORDERS)+3) + '|'
    kept, bound = {o: at(ONE_SHOT, o, 'kept') for o in ORDERS}, at(DENSE, 'permuted', 'row_bound')
    efficacy = 100*(kept['permuted']-kept['as trained'])/(bound-kept['as trained'])
    yield ('| all sparse layers | ' + ' | '.join(cell(k, args.seeds) for k in kept.values())
           + f' | {cell(bound, args.seeds)} | {cell(efficacy.dropna(), args.seeds)} |')

def command(args):
    "The command line that repeats what `args` asked for"
    words = []
    for a in parser()._actions:
        if a.dest in ('help', 'jobs', 'out', 'path', 'table_only') or (v := getattr(args, a.dest)) == a.default:
            continue
        words += [a.option_strings[0], str(v)]
    return ' '.join(['python benchmarks/nm_accuracy.py', *words])

def write_md(df, args, file):
    "Write the settings and the tables of the results `df`"
    moved = df[(df.stage==DENSE) & (df.order!='as trained')]
    file.write_text('\n'.join(['# 2:4 before and after the channels have moved, on Fashion-MNIST', '',
        f'`{command(args)}`: test accuracy, mean ± standard deviation over {args.seeds} seeds, each in a process of '
        f'one thread; '
        f'fasterai_sparse {version("fasterai_sparse")}, torch {version("torch")}, fastai {version("fastai")}, '
        f'{cpu_name()}, {os.cpu_count()} cores.', '',
        *table(df, args), '',
        f'- Data: {args.images:,} training and 10,000 test images, no augmentation. Network: ResNet-18 of width 16 '
        f'with a stride-2 stem, {n_params(small_resnet18())[1]:,} parameters; 2:4 are all convolutions but '
        'the first, which has one input, and the head.',
        f'- Dense: Adam, `fit_one_cycle({args.epochs}, {LR:g})`, batches of {args.bs}. All orders of a seed start '
        f'from the same dense network; a test image is 0.01 points.',
        f'- permuted: `permute_model` with its defaults; random: the same with random scores, another order that '
        f'computes the same. What it changes is chance: a difference of the permuted order says something only as far '
        f'as it goes beyond that. '
        f'Largest relative error of the logits after moving, in float64: {moved.error.max():.1e}; seconds of '
        f'`permute_model`: {moved.seconds.astype(float).max():.2f} at most, on one thread.',
        f'- 2:4: `Sparsifier(…, nm=True)` by magnitude, without any training; adapted: the same with '
        f'`recalibrate=True`, 2,048 training images; fine-tuned: the former after `fit_one_cycle({args.ft_epochs}, '
        f'{FT_LR:g})` with `KeepMasks`, '
        'the same batches for all orders; trained on: the dense network after the same. By Wanda: |w|·‖x‖ in place of '
        '|w|, for what stays and for the order (`permute=True`), from 2,048 training images.',
        '- Each row: nm_accuracy.csv.']) + '\n')

def parser():
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0],
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument('--epochs', default=4, type=positive, help='epochs of the dense training')
    p.add_argument('--ft-epochs', default=1, type=positive, help='epochs of fine-tuning')
    p.add_argument('--bs', default=128, type=positive, help='images in a batch')
    p.add_argument('--seeds', default=3, type=positive, help='how many seeds, from 0')
    p.add_argument('--images', default=60000, type=positive, help='use only the first of the 60,000 training images')
    p.add_argument('--jobs', default=1, type=positive, help='seeds at a time, each in a process of one thread')
    p.add_argument('--out', default=Path(__file__).parent, type=Path, help='folder for nm_accuracy.csv and .md')
    p.add_argument('--path', default=DATA, type=Path, help='folder of the data')
    p.add_argument('--table-only', action='store_true', help='train nothing: write the tables from the csv')
    return p

def main():
    df, args = asked_for(parser(), 'nm_accuracy', asked_runs, run_all, KEY, MEASURED, FILES)
    write_md(df, args, args.out/'nm_accuracy.md')

if __name__ == '__main__': main()
