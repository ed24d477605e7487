"""Winning tickets beside fresh weights under the same masks: `python benchmarks/lottery.py`

Finds tickets on Fashion-MNIST with SparsifyCallback(lth=True), then trains each mask twice for as many epochs as the
dense network: from the ticket's weights, and from fresh random ones. Writes benchmarks/lottery.md."""
import argparse, tempfile
from importlib.metadata import version
from pathlib import Path

import torch
from fastai.basics import accuracy, Adam, CrossEntropyLossFlat, Learner, partial, set_seed
from fasterai_sparse.core.masks import set_mask
from fasterai_sparse.core.schedules import iterative
from fasterai_sparse.train.keep_masks import KeepMasks
from fasterai_sparse.train.sparsify_callback import SparsifyCallback
from fasterai_sparse.demo import fashion_mnist
from torch import nn


N_STEPS, LR = 5, 1.2e-3

def lenet():
    "LeNet-300-100, of the lottery ticket paper"
    return nn.Sequential(nn.Flatten(), nn.Linear(784,300), nn.ReLU(), nn.Linear(300,100), nn.ReLU(), nn.Linear(100,10))

def learner(dls, seed, path=None):
    set_seed(seed)
    return Learner(dls, lenet(), loss_func=CrossEntropyLossFlat(), metrics=accuracy, opt_func=Adam, lr=LR, path=path)

def trained(learn, n_epoch, cbs=None):
    "Accuracy in percent after each epoch of a fit"
    with learn.no_bar(), learn.no_logging(): learn.fit(n_epoch, cbs=cbs)
    return [100*row[-1] for row in learn.recorder.values]

def find_ticket(dls, seed, sparsity, n_epoch, path):
    "File of the ticket of `sparsity`, found in `N_STEPS` steps of `n_epoch` epochs each"
    cb = SparsifyCallback(sparsity, schedule=partial(iterative, n_steps=N_STEPS), start_epoch=n_epoch, lth=True,
                          save_tickets=path,
                          layer_type=nn.Linear, verbose=False)
    trained(learner(dls, seed), n_epoch*(N_STEPS+1), cb)
    return max(Path(path).glob('winning_ticket_*.pth'))

def with_mask(learn, file, fresh):
    "`learn` with the mask of the ticket in `file`, and with its weights unless `fresh`"
    ticket = torch.load(file, weights_only=True)
    if not fresh: learn.model.load_state_dict(ticket)
    for n,m in learn.model.named_modules():
        if isinstance(m, nn.Linear): set_mask(m, ticket[f'{n}.weight'] != 0)
    return learn

def run(dls, seed, sparsity, n_epoch):
    "Accuracies of ticket and fresh weights under the same mask"
    with tempfile.TemporaryDirectory() as d:
        file = find_ticket(dls, seed, sparsity, n_epoch, d)
        return [trained(with_mask(learner(dls, seed+1000), file, fresh), n_epoch, KeepMasks()) for fresh in (False,
            True)]

def cell(values):
    t = torch.tensor(values)
    return f'{t.mean():.2f} ± {t.std():.2f}'

def main(sparsities, n_seeds, n_epoch, images):
    full = fashion_mnist()
    dls = type(full)(type(full.train)(full.train.x[:images], full.train.y[:images], bs=128, shuffle=True,
                                      drop_last=True), full.valid)
    dense = [trained(learner(dls, s), n_epoch)[-1] for s in range(n_seeds)]
    lines = ['# Lottery tickets on Fashion-MNIST', '', f'`python benchmarks/lottery.py`: LeNet-300-100, {images:,} '
                                                       f'training images, Adam at {LR}, {n_epoch} epochs; '
        f'tickets found by `SparsifyCallback(…, schedule=partial(iterative, n_steps={N_STEPS}), lth=True)`, a step '
        f'every {n_epoch} epochs, rewound to the start; {n_seeds} seeds; '
        f'test accuracy in percent, mean ± standard deviation; fasterai_sparse {version("fasterai_sparse")}, torch '
        f'{version("torch")}. '
        f'Dense: {cell(dense)}.', '', '| sparsity | ticket − fresh weights under its mask (paired) | ticket | fresh '
                                      'weights | after the first epoch: ticket | fresh |', '|---|---|---|---|---|---|']
    for sparsity in sparsities:
        runs = [run(dls, s, sparsity, n_epoch) for s in range(n_seeds)]
        ticket, fresh, ticket1, fresh1 = ([r[i][j] for r in runs] for j in (-1, 0) for i in (0, 1))
        lines.append(f'| {sparsity:g} % | {cell([t-f for t,f in zip(ticket, fresh)])} | {cell(ticket)} | '
                     f'{cell(fresh)} | {cell(ticket1)} | {cell(fresh1)} |')
        print(lines[-1], flush=True)
    Path(__file__).with_suffix('.md').write_text('\n'.join(lines) + '\n')

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--sparsities', type=float, nargs='+', default=[80, 90, 95])
    parser.add_argument('--seeds', type=int, default=4)
    parser.add_argument('--epochs', type=int, default=4)
    parser.add_argument('--images', type=int, default=60_000)
    args = parser.parse_args()
    torch.set_num_threads(1)
    main(args.sparsities, args.seeds, args.epochs, args.images)
