"""Where the engine's time goes: predicted from non-zeros, shapes and caches, beside the measured time

Run `python benchmarks/engine_model.py`.
Writes benchmarks/engine_model.md. Four speeds are measured (vector loads from L1, vector multiply-adds, bytes from L3
and from memory); everything else is counted.

A term of a block of r outputs loads r weights and u vectors of positions; a vector that does not begin at a cache line
counts twice. The term does r·u multiply-adds. The start and end of each row are counted as loads and stores too.
Activations come from L3; weights do too where all data of a run fit, else they come from memory.

    seconds = max(loads/speed of loads, products/speed of products, bytes/bandwidth)"""
import argparse, os, time
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault('OMP_NUM_THREADS', '1')
import numpy as np, torch

from fasterai_sparse.engine.modules import Accelerated
from fasterai_sparse.engine.ops import all_finite, Convolution, engine_sets, Flat, Grid, Program
from fasterai_sparse.engine.weights import Terms
from engine import network, table
from runs import cpu_name

@dataclass
class Machine:
    loads:float # Vectors a second, from the L1
    products:float # Vectors a second that are multiplied and added
    l3:float # Bytes a second
    memory:float
    l3_size:float # Bytes
    cores:int = 1
    barrier:float = 0. # Seconds until all threads have ended an operation

def least(f, n=20):
    best = float('inf')
    for _ in range(n):
        start = time.perf_counter()
        f()
        best = min(best, time.perf_counter()-start)
    return best

def l3_size():
    found = [p.read_text().strip() for p in Path('/sys/devices/system/cpu/cpu0/cache').glob('index3/size')]
    return 1024*int(found[0][:-1]) if found else 32*2**20

def machine(floats=16):
    "Speeds of this machine: dense layers whose inputs stay in L1, and 8 MB and 256 MB that are read once"
    def rate(size, tile, which):
        grid = Grid(1)
        grid.include(1, tile*floats)
        x, y = (Flat(c, 1, tile*floats, grid, floats) for c in (48, 16))
        op = Convolution(x, y, np.zeros(16, np.float32), *Terms(torch.randn(16, 48), x).conv_layout(size),
                         grid.mask(1, tile*floats,
            floats), tile=tile)
        return 200*counted(op, floats)[which]/least(Program([op]*200, 0, 1))
    small, large = torch.ones(2*2**20), torch.ones(64*2**20)
    return Machine(rate(1, 8, 0), rate(4, 6, 1), 4*small.numel()/least(lambda: all_finite(small)),
                   4*large.numel()/least(lambda: all_finite(large), 5), l3_size())

def counted(op, floats):
    "(vectors loaded, vectors multiplied, bytes of weights, bytes of activations) of a Convolution"
    tiles, size, terms = -(-op.y.vectors//op.tile), op.block, len(op.terms)
    u, line = op.y.vectors/tiles, 64//(4*floats)
    crossing = (op.terms['at'] % 16 != 0).mean() if terms and line == 1 else 0.
    rows, parts = op.starts.shape[1]-1, len(op.starts)
    # mask, store, what was there; and starting each row
    ends = rows*size*tiles*u*(2*parts + parts-1 + (op.residual is not None)) + rows*parts*tiles*4
    read = (op.x.channels + op.y.channels*(2 + (op.residual is not None)))*op.y.vectors*4*floats
    return terms*(size + u*(1+crossing))*tiles + ends, terms*size*u*tiles, op.terms.nbytes, read

def predicted(loads, products, weights, activations, m, total=0):
    def fetched(n_bytes, of): return n_bytes/m.l3/m.cores if of < m.l3_size else n_bytes/m.memory/min(m.cores, 8)
    return max(loads/m.loads/m.cores, products/m.products/m.cores, fetched(weights, total) + fetched(activations,
        activations)) + m.barrier

def layers(name, percent, pattern, floats, images=1):
    net, x = network(name, percent, pattern)
    fast = Accelerated(net, 1, cache=None)
    with torch.no_grad(): fast(x)
    plan = fast.last[1]
    seconds = plan.timed([x], .5)
    total = plan.weights.taken + plan.activations.taken
    return [(plan.ops[i], l, seconds[i]) for i,l in plan.weighted.items() if isinstance(plan.ops[i],
        Convolution)], sum(seconds), total

def main(out):
    torch.set_num_threads(1)
    floats = next(iter(engine_sets().values()))
    m, rows, kept = machine(floats), [], {}
    for case in (('resnet50', 80, 'weight'), ('resnet50', 90, 'weight'), ('resnet50', 95, 'weight'),
                 ('resnet50', 90, '4x1'), ('resnet18', 90, 'weight'), ('mobilenet_v2', 90, 'weight'),
                 ('minilm', 90, 'weight')):
        ops, all_s, total = layers(*case, floats)
        counts = [counted(o, floats) for o,*_ in ops]
        guess, real = np.array([predicted(*c, m, total) for c in counts]), np.array([s for *_,s in ops])
        rows.append([case[0], f'{case[1]}' + (', 4×1' if case[2] == '4x1' else ''), f'{1000*guess.sum():.2f}',
                     f'{1000*real.sum():.2f}', f'{guess.sum()/real.sum():.2f}',
                     f'{100*np.median(abs(guess/real-1)):.0f} %',
                     f'{np.corrcoef(guess, real)[0,1]:.3f}', f'{1000*all_s:.2f}'])
        kept[case] = counts, all_s - real.sum(), total
        if case == ('resnet50', 90, 'weight'):
            each = [[l.name, f'{len(o.terms):,d}', o.y.vectors, '×'.join(map(str, o.choice[:3])), f'{1e6*g:.0f}',
                     f'{1e6*r:.0f}'] for (o,l,_),g,r in zip(ops, guess, real)]
        print(rows[-1], flush=True)
    lines = ['# What the engine\'s time is made of', '', f'`python benchmarks/engine_model.py`: 1 thread, '
                                                         f'{next(iter(engine_sets()))}, {cpu_name()}.', '',
                                                         *[l.strip() for l in __doc__.split("\n\n", 2)[2].splitlines()],
                                                         '',
             f'Measured here: {m.loads/1e9:.1f} billion vectors loaded a second, {m.products/1e9:.1f} billion '
             f'multiplied and added, {m.l3/1e9:.0f} GB/s from the L3 ({m.l3_size/2**20:.0f} MB), {m.memory/1e9:.0f} '
             f'GB/s from memory.', '',
             *table(['network', 'sparsity, %', 'predicted, ms', 'measured, ms', 'ratio', 'median error of a layer',
                     'correlation', 'with all other operations, ms'], rows),
             'Predicted and measured are of the operations with weights (`Convolution`), in the course of a run.', '',
             '## What it says of other networks and machines', '',
             *elsewhere(kept['resnet50', 90, 'weight'], m), '', '## Layer by layer', '',
             'ResNet-50 at 90 %; form: outputs together × parts of the inputs × vectors together.', '',
             *table(['layer', 'terms', 'vectors of positions', 'form', 'predicted, µs', 'measured, µs'], each)]
    (out/'engine_model.md').write_text('\n'.join(lines))

def elsewhere(case, m):
    "Predictions for other machines, not measured"
    counts, rest, total = case
    n_ops = len(counts) + 10
    dense_macs, dense_bytes = 4.09e9, 4*25.5e6   # of ResNet-50, one image
    def ours(k, machine, larger):   # k times the weights, at the same positions: √k times the channels
        return sum(predicted(c*k, p*k, w*k, a*k**.5, machine, total if not larger else 1e12)
                   for c,p,w,a in counts) + rest*k**.5/machine.cores
    def dense(k, machine, larger):
        return dense_macs*k/16/machine.products/machine.cores + dense_bytes*k/(machine.memory if larger
            else machine.l3)/min(machine.cores, 8) + n_ops*machine.barrier
    server = Machine(m.loads, m.products, m.l3, m.memory, 256*2**20, 64, 3e-6)
    rows = []
    for name,k,machine,larger in (('ResNet-50', 1, m, False), ('100 times the weights (10 times the channels)', 100, m,
                                                               True), ('ResNet-50, 64 cores', 1, server, False),
                                                               ('100 times the weights, 64 cores', 100, server, True)):
        a, b = ours(k, machine, larger), dense(k, machine, larger)
        rows.append([name, f'{1000*a:.2f}', f'{1000*b:.2f}', f'{b/a:.1f}'])
    return [*table(['90 %, one image', 'sparse, ms', 'dense, ms', 'times as fast'], rows),
            'Predictions, not measurements. Dense engines are taken to add products as fast as was measured. 64 cores '
            'are taken to have eight times one core\'s bandwidth to memory, and to wait 3 µs after each operation.',
            'The larger network has to fetch 8 bytes for each weight that is not zero, against 4 for each weight: at '
            '90 % a fifth, so where memory is the limit the gain is about five, and where positions are many it stays '
            'as it is.',
            'On 64 cores one image of ResNet-50 is done in so few microseconds for each layer that waiting for each '
            'other decides; larger networks and batches use the cores.']

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--out', default=Path(__file__).parent, type=Path, help='folder for engine_model.md')
    main(parser.parse_args().out)
