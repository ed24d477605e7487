"""Does RB sparsity reach its level with 11 M and with 0.7 M weights, for several optimizers of its logits?

Run `python benchmarks/rb_level.py`.
Writes benchmarks/rb_level.md and benchmarks/rb_level.png. The data: Debian's `dataset-fashion-mnist`."""
import argparse, os, time
from importlib.metadata import version
from pathlib import Path

from accuracy import DATA, small_resnet18   # first: it silences a warning
import torch
from fastai.basics import CrossEntropyLossFlat, Learner, accuracy, set_seed

from fasterai_sparse.core.report import sparsity_report
from fasterai_sparse.nncf.rb import RBSparsityCallback
from fasterai_sparse.demo import fashion_mnist, whole_dls
from runs import cpu_name, positive

SPARSITY, LR, WIDTHS = 90, 1e-3, (16, 64)

class OtherAdam(RBSparsityCallback):
    "RB whose logits are trained by Adam with the arguments `adam`"
    def __init__(self, *args, adam, **kwargs):
        super().__init__(*args, **kwargs)
        self.adam = adam

    def begin(self):
        super().begin()
        self.mask_opt = torch.optim.Adam(list(self.soft.logits.values()), lr=self.mask_lr, fused=True, **self.adam)

ARMS = {'ours': RBSparsityCallback, "torch's Adam, eps=1e-8": lambda s: OtherAdam(s, adam=dict(eps=1e-8)),
        "fastai's Adam, eps=1e-5": lambda s: OtherAdam(s, adam=dict(betas=(.9,.99), eps=1e-5))}

def train(width, name, args):
    "A row of the table, and the log of the callback"
    set_seed(0)
    dls = fashion_mnist(args.bs, args.path)
    dls = whole_dls((dls.train.x[:args.images], dls.train.y[:args.images]), (dls.valid.x, dls.valid.y), args.bs)
    learn, cb = Learner(dls, small_resnet18(width), loss_func=CrossEntropyLossFlat(),
                        metrics=accuracy), ARMS[name](SPARSITY)
    with learn.no_bar(), learn.no_logging():
        start = time.perf_counter()
        learn.fit_one_cycle(args.epochs, LR, cbs=cb)
        seconds, percent = time.perf_counter()-start, 100*float(learn.validate()[-1])
    df, log = sparsity_report(learn.model, layer_type=cb.layer_type), cb.log
    moved = (log.sparsity_pct > 1).to_numpy()
    return dict(weights=int(df.params.sum()), optimizer=name, reached=100*df.zeros.sum()/df.params.sum(),
                moved=int(moved.argmax()) if moved.any() else None,
                met=next((i for i,s in enumerate(log.sparsity_pct) if abs(s-SPARSITY) < 1), None), accuracy=percent,
                seconds=seconds), log

def command(args):
    "The command line that repeats what `args` asked for, without its folders"
    words = ['python benchmarks/rb_level.py']
    for n,default in dict(epochs=6, bs=128, images=12800, widths=list(WIDTHS), arms=list(ARMS), threads=2).items():
        v = getattr(args, n)
        if v != default:
            words += [f'--{n}', *(f'"{o}"' if ' ' in str(o) else str(o) for o in (v if isinstance(v, list) else [v]))]
    return ' '.join(words)

def main(args):
    import matplotlib.pyplot as plt
    torch.set_num_threads(args.threads)
    fig,axs = plt.subplots(1, len(args.widths), figsize=(5.2*len(args.widths),3.6), layout='constrained', sharey=True,
                           squeeze=False)
    rows = []
    for width,ax in zip(args.widths, axs[0]):
        for name in args.arms:
            row,log = train(width, name, args)
            rows.append(row)
            print(row, flush=True)
            ax.plot(log.epoch*(args.images//args.bs), log.sparsity_pct, label=name)
        ax.step(log.epoch*(args.images//args.bs), log.asked_pct, where='post', color='.6', ls='--', label='asked for')
        ax.set(xlabel='batch', title=f'{rows[-1]["weights"]:,} weights')
    axs[0,0].set_ylabel('sparsity of the masks without noise (%)')
    axs[0,-1].legend()
    fig.savefig(args.out/'rb_level.png', dpi=110)
    table = ['| weights | optimizer of the logits | sparsity reached, % | within 1 % of 90 first at batch | first '
             'masked at batch | accuracy, % | s |', '|---'*7 + '|',
             *(f'| {r["weights"]:,} | {r["optimizer"]} | {r["reached"]:.2f} | {"–" if r["met"] is None else r["met"]} '
               f'| {"–" if r["moved"] is None else r["moved"]} | {r["accuracy"]:.2f} | {r["seconds"]:.0f} |'
               for r in rows)]
    (args.out/'rb_level.md').write_text('\n'.join(['# Whether RB sparsity reaches its level', '',
        f'`{command(args)}`: `RBSparsityCallback({SPARSITY})`, one seed, `fit_one_cycle({args.epochs}, {LR:g})` over '
        f'{args.images//args.bs} batches of {args.bs} images of Fashion-MNIST an epoch; '
        f'ResNet-18 of widths {" and ".join(map(str, args.widths))}; the level rises over the first half, masks are '
        f'fixed after three quarters. fasterai_sparse {version("fasterai_sparse")}, torch {version("torch")}, '
        f'{cpu_name()}, {os.cpu_count()} cores, {args.threads} thread{"s"*(args.threads > 1)}.', '', *table, '',
        '![Sparsity by batch](rb_level.png)', '',
        '- The learning rate of the logits is the default, .1, and ours is `betas=(.9,.95), eps=1e-12`. The level is '
        '90 % from the middle of the fit on.',
        '- Accuracy is of 10,000 test images after training on so few: to compare the rows, not with other tables.',
        '']))

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0],
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument('--epochs', default=6, type=positive)
    p.add_argument('--bs', default=128, type=positive, help='images in a batch')
    p.add_argument('--images', default=12800, type=positive, help='use only the first of the 60,000 training images')
    p.add_argument('--widths', default=list(WIDTHS), nargs='+', type=positive, help='of the network')
    p.add_argument('--arms', default=list(ARMS), nargs='+', choices=list(ARMS), metavar='ARM',
                   help=f'optimizers of the logits: {list(ARMS)}')
    p.add_argument('--threads', default=2, type=positive)
    p.add_argument('--path', default=DATA, type=Path, help='folder of the data')
    p.add_argument('--out', default=Path(__file__).parent, type=Path, help='folder for rb_level.md and .png')
    main(p.parse_args())
