"""A trained ResNet-18, dense and sparse, from training to the saved file

Run `python benchmarks/engine_trained.py --folder DIR`.
Trains on Fashion-MNIST the networks missing in the folder, each a row of benchmarks/engine_trained.csv; then measures
accuracy, milliseconds and megabytes, and writes benchmarks/engine_trained.md.
ONNX Runtime (`onnx`, `onnxscript`, `onnxruntime`) and `openvino` are measured where they are installed. The data:
Debian's `dataset-fashion-mnist`."""
import argparse, tempfile, time
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from accuracy import DATA, LR, n_params, small_resnet18   # first: it silences a warning
import torch
from fastai.basics import Callback, CancelValidException, CrossEntropyLossFlat, Learner, set_seed
from torch import nn

from engine import engines, race
from fasterai_sparse.core.patterns import block
from fasterai_sparse.core.report import sparsity_report
from fasterai_sparse.core.schedules import agp
from fasterai_sparse.train.sparsify_callback import SparsifyCallback
from fasterai_sparse.engine.accelerate import accelerate
from fasterai_sparse.engine.modules import Accelerated
from fasterai_sparse.engine.ops import engine_sets
from fasterai_sparse.files.safetensors import load_sparse
from fasterai_sparse.demo import fashion_mnist, file_bytes, whole_dls
from runs import append, cpu_name, positive

# percent, granularity
NETWORKS = {'dense': None, '80 %': (80, 'weight'), '90 %': (90, 'weight'), '90 %, 4×1': (90, block(4,1))}
START, ENGINE = 'before', 'in the engine'   # what all of them start from; a row of the second table
FT_LR, BATCHES = 1e-3, (1, 64)

class Run(NamedTuple):
    "Settings that identify a training: the first columns of the csv"
    network: str
    seed: int
    epochs: int
    ft_epochs: int   # of going on, with the sparsity rising or dense
    width: int
    bs: int
    images: int

    def file(self, folder):
        "Path of the trained network"
        name = self.network.replace(' %', '').replace(', ', '-').replace('×', 'x')
        return folder/('_'.join(map(str, (name, *self[1:]))) + '.safetensors')

class BFloat16(Callback):
    "Mixed precision on a CPU; fastai's callback is for CUDA"
    run_valid = False
    def before_batch(self): self.autocast = torch.autocast('cpu', torch.bfloat16).__enter__()
    def after_pred(self): self.learn.pred = self.pred.float()
    def after_loss(self): self.autocast.__exit__(None, None, None)

class NoValid(Callback):
    "Skips validation: the test images are used once, at the end"
    def before_validate(self): raise CancelValidException

def trained(run, data, folder):
    "File of the trained network, and seconds of the training"
    starts = run.network == START
    set_seed(run.seed + 1000*(not starts))   # those that go on see the same batches
    dls = whole_dls((data.train.x[:run.images], data.train.y[:run.images]), (data.valid.x, data.valid.y), run.bs)
    net = small_resnet18(run.width).to(memory_format=torch.channels_last)
    if not starts: load_sparse(run._replace(network=START).file(folder), net)
    learn, cbs = Learner(dls, net, loss_func=CrossEntropyLossFlat(), path=folder), [BFloat16(), NoValid()]
    if NETWORKS.get(run.network):
        percent, granularity = NETWORKS[run.network]
        cbs.append(SparsifyCallback(dict.fromkeys(sparse_layers(net), percent), granularity, schedule=agp,
                                    verbose=False))
    begin = time.perf_counter()
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(run.epochs if starts else run.ft_epochs, LR if starts else FT_LR, cbs=cbs)
    seconds = time.perf_counter()-begin
    learn.export_sparse(run.file(folder).name)
    return seconds

def sparse_layers(net):
    "Names of all convolutions but the first"
    return [n for n,m in net.named_modules() if isinstance(m, nn.Conv2d) and m.in_channels > 1]

@torch.no_grad()
def outputs(f, x, bs=64): return torch.cat([f(b) for b in x.split(bs)])

def loaded(run, folder): return load_sparse(run.file(folder), small_resnet18(run.width)).eval()

def qualities(run, data, folder):
    "A row of the table of networks: accuracy in torch and accelerated, and file sizes"
    net, x, y = loaded(run, folder), data.valid.x, data.valid.y
    fast, _ = accelerate(net, x[:64], threads=1, cache=None)
    want, got = outputs(net, x), outputs(fast, x)
    zeros = sparsity_report(net, layer_type=nn.Conv2d).set_index('layer').loc[sparse_layers(net)]
    right = [100*(o.argmax(1) == y).double().mean().item() for o in (want, got)]
    return dict(sparsity=100*float(zeros.zeros.sum()/zeros.params.sum()), torch=right[0], accelerated=right[1],
                differ=int((want.argmax(1) != got.argmax(1)).sum()),
                error=float((want-got).abs().max()/want.abs().max()), saved=file_bytes(net)/1e6,
                sparse=run.file(folder).stat().st_size/1e6, same=fast is net)

@torch.no_grad()
def latencies(runs, data, images, seconds, folder):
    "Least milliseconds: the dense network in each dense engine, and each network accelerated, in turn"
    nets, x = {r.network: loaded(r, folder) for r in runs}, data.valid.x[:images].clone()
    with tempfile.TemporaryDirectory() as d:
        fs = {f'dense, {n}': f for n,f in engines(nets['dense'], x, d, 1).items() if n != 'ours'}
        fs |= {f'{n}, {ENGINE}': partial(Accelerated(net, 1, None), x) for n,net in nets.items()}
        return race(fs, seconds)

def table(found, ms):
    "Yield the lines of the markdown tables"
    yield ('| network | sparsity, % | accuracy in torch, % | accelerated, % | predictions that differ | error | '
           '`torch.save`, MB | `save_sparse`, MB |')
    yield '|---'*8 + '|'
    for n,f in found.items():
        yield (f'| {n} | {f["sparsity"]:.1f} | {f["torch"]:.2f} | {f["accelerated"]:.2f}{" (as it was)"*f["same"]} | '
               f'{f["differ"]} of 10,000 | {f["error"]:.0e} | {f["saved"]:.1f} | {f["sparse"]:.1f} |')
    best = {b: min(v for n,v in t.items() if ENGINE not in n) for b,t in ms.items()}
    yield ''
    yield '| | ' + ' | '.join(f'{b} image{"s"*(b>1)}, ms | times the best dense engine | times torch'
                              for b in ms) + ' |'
    yield '|---'*(1+3*len(ms)) + '|'
    for n in next(iter(ms.values())):
        yield f'| {n} | ' + ' | '.join(f'{t[n]:.2f} | {best[b]/t[n]:.2f} | {t["dense, torch"]/t[n]:.2f}'
                                       for b,t in ms.items()) + ' |'

def write_md(found, ms, args):
    "Write the settings and the tables"
    packages = ', '.join(f'{p} {version(p)}' for p in ('fasterai_sparse', 'torch', 'fastai', 'onnxruntime', 'openvino')
                         if find_spec(p))
    (args.out/'engine_trained.md').write_text('\n'.join(['# A trained network: accuracy, milliseconds, megabytes', '',
        f'`python benchmarks/engine_trained.py --folder DIR`: {packages}; float32, 1 thread, '
        f'{next(iter(engine_sets()))}, {cpu_name()}; the least of each, in turn, in {args.seconds:g} s for each '
        f'number of images. One seed.', '',
        *table(found, ms), '',
        f'- Data: Fashion-MNIST, {args.images:,} training and 10,000 test images of 28×28 pixels, no augmentation. '
        f'Network: ResNet-18 of width {args.width} with a 3×3 stem of stride 2 and BatchNorm, '
        f'{n_params(small_resnet18(args.width))[1]:,} parameters; sparse are all convolutions but the first, and '
        f'sparsity is of these.',
        f'- All four start from one dense network, trained with `fit_one_cycle({args.epochs}, {LR:g})`, and go on for '
        f'`fit_one_cycle({args.ft_epochs}, {FT_LR:g})` over the same batches of {args.bs}: the dense one as it is, '
        f'the others with `SparsifyCallback(…, schedule=agp)`. Adam, in bfloat16 where autocast says so. Of one seed, '
        f'differences of a few tenths of a point in accuracy say nothing.',
        '- Accelerated: `accelerate(model, x)` with 64 images, which gives a model back as it was where the engine is '
        'not quicker. Error: largest difference from torch over the largest output.',
        '- In the engine: what `accelerate` takes it from, dense or not. The dense engines run the dense network; the '
        'engine\'s row for that says what is not due to zeros.',
        '- 4×1: blocks of four outputs, `block(4,1)`. Files: weights and BatchNorm, float32. Each training: '
        'engine_trained.csv.']) + '\n')

def main(args):
    torch.set_num_threads(1)
    same = args.seed, args.epochs, args.ft_epochs, args.width, args.bs, args.images
    start, *runs = (Run(n, *same) for n in (START, *NETWORKS))
    if args.time_only and (lost := [r.file(args.folder).name for r in runs if not r.file(args.folder).exists()]):
        raise SystemExit(f'No {", ".join(lost)} in {args.folder}: leave out --time-only')
    args.folder.mkdir(parents=True, exist_ok=True)
    data = fashion_mnist(args.bs, args.path)
    for r in () if args.time_only else (start, *runs):
        if r.file(args.folder).exists(): continue
        seconds = trained(r, data, args.folder)
        right = 100*(outputs(loaded(r, args.folder), data.valid.x).argmax(1) == data.valid.y).double().mean().item()
        append(args.out/'engine_trained.csv', [*Run._fields, 'accuracy', 'seconds'],
               [*r, f'{right:.2f}', f'{seconds:.1f}'])
        print(f'{r.network}: {right:.2f} %, trained in {seconds:.0f} s', flush=True)
    found = {r.network: qualities(r, data, args.folder) for r in runs}
    ms = {b: latencies(runs, data, b, args.seconds, args.folder) for b in BATCHES}
    for what in (*found.items(), *ms.items()): print(*what, flush=True)
    write_md(found, ms, args)

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('--folder', required=True, type=Path, help='where the trained networks are kept')
    parser.add_argument('--time-only', action='store_true', help='train nothing: the networks must be in the folder')
    parser.add_argument('--epochs', default=3, type=positive, help='of the dense training')
    parser.add_argument('--ft-epochs', default=1, type=positive, help='of going on, while the sparsity rises')
    parser.add_argument('--width', default=64, type=positive, help='channels of the first stage')
    parser.add_argument('--bs', default=128, type=positive, help='images in a batch of training')
    parser.add_argument('--images', default=60000, type=positive, help='use only the first of the 60,000 training '
        'images')
    parser.add_argument('--seed', default=0, type=int)
    parser.add_argument('--seconds', default=20., type=float, help='of each race')
    parser.add_argument('--path', default=DATA, type=Path, help='folder of the data')
    parser.add_argument('--out', default=Path(__file__).parent, type=Path, help='folder for engine_trained.md and .csv')
    main(parser.parse_args())
