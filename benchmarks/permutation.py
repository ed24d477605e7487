"""Permutation search for 2:4: kept magnitude and time: `python benchmarks/permutation.py`

Writes benchmarks/permutation.md. Uniform matrices are `np.random.seed(1); np.random.rand(rows, columns)`; those of
ResNet-50 are Gaussian, with the shapes of the layers that read the same channels, stacked."""
import argparse, os, time
from importlib.metadata import version
from pathlib import Path

import numpy as np, torch

from fasterai_sparse.nm.search import search_permutation
from fasterai_sparse.nm.search_cuda import asp_search
from runs import cpu_name

# rows, columns, seconds that are asked for (None: a budget), efficacy that is asked for, Apex's with 8,100 escapes
CASES = [(128, 64, .02, 36.2, 35.47), (256, 256, .06, 28.5, 26.73), (1024, 512, .3, 16.0, 14.29),
         (2048, 2048, 5., 12.7, 11.42)]

def resnet50_shapes():
    "(rows, columns) of the stacked layers of ResNet-50 that read the same channels, without the classifier"
    planes, blocks, shapes = (64,128,256,512), (3,4,6,3), []
    for s,(p,n) in enumerate(zip(planes, blocks)):
        # the stream: first convolution and shortcut of this stage, first ones of the last
        shapes.append(((p+4*p) + (0 if s == 0 else planes[s-1]*(blocks[s-1]-1)), 64 if s == 0 else 4*planes[s-1]))
        shapes += [(9*p, p), (4*p, p)]*n
    return [*shapes, (planes[-1]*(blocks[-1]-1), 4*planes[-1])]

def uniform(rows, columns):
    np.random.seed(1)
    return np.random.rand(rows, columns)

def best_of(n, s, **kwargs):
    "The quickest of `n` searches; all find the same order"
    return min((search_permutation(s, **kwargs) for _ in range(n)), key=lambda p: p.seconds)

def rows(repeats):
    yield '| matrix | efficacy | asked | Apex, 8,100 escapes | kept | s | asked | torch back end, s (times) |'
    yield '|---'*8 + '|'
    for r,c,seconds,asked,apex in CASES:
        s = uniform(r, c)
        p, slow = best_of(repeats if c < 2048 else 1, s), search_permutation(s, backend='torch') if c < 2048 else None
        yield (f'| uniform {r}×{c} | {p.efficacy:.2f} | ≥ {asked} | {apex} | {p.kept:.2f} | {p.seconds:.3f} | ≤ '
               f'{seconds} | ' + (f'{slow.seconds:.2f} ({slow.seconds/p.seconds:.1f}) |' if slow else '|'))
    p = search_permutation(uniform(128, 64), time_budget=1.)
    yield f'| uniform 128×64, a budget of 1 s | {p.efficacy:.2f} | | | {p.kept:.2f} (≥ 2926.0) | {p.seconds:.3f} | | |'
    rng, found, start = np.random.default_rng(0), [], time.perf_counter()
    for shape in resnet50_shapes(): found.append(search_permutation(np.abs(rng.standard_normal(shape))))
    yield (f'| ResNet-50, {len(found)} matrices, Gaussian | {np.mean([p.efficacy for p in found]):.2f} (mean) | ≥ '
           f'14.0 | | | {time.perf_counter()-start:.2f} | ≤ 12 | |')

def asp_rows():
    yield '| ASP\'s strategies with our numpy kernels, uniform 128×64 | efficacy | kept | s |'
    yield '|---'*4 + '|'
    for strategy,group in (('channel_swap', 8), ('exhaustive', 8)):
        p = asp_search(uniform(128, 64), strategy=strategy, stripe_group_size=group, escape_attempts=0, kernels='numpy')
        yield (f'| {strategy}{f" {group}" if strategy == "exhaustive" else ""}, 0 escapes | {p.efficacy:.2f} | '
               f'{p.kept:.2f} | {p.seconds:.3f} |')

def main(repeats, out):
    search_permutation(uniform(16, 16))   # loads the library
    lines = [*rows(repeats), '', *asp_rows()]
    print('\n'.join(lines))
    (out/'permutation.md').write_text('\n'.join(['# Permutation search for 2:4', '',
        f'`python benchmarks/permutation.py`: fasterai_sparse {version("fasterai_sparse")}, back end '
        f'{search_permutation(uniform(16, 16)).backend}, torch {version("torch")}, {torch.get_num_threads()} threads, '
        f'{cpu_name()}, {os.cpu_count()} cores.', '',
        *lines, '', '- Efficacy: how much of the way from the order that is there to the best of each row by itself '
                    '(Pool & Yu 2021). Apex: as measured elsewhere, with its control flow; seconds: the quickest of '
        f'{repeats}, default settings.', '']))

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--repeats', type=int, default=3, help='searches of each matrix')
    parser.add_argument('--out', default=Path(__file__).parent, type=Path, help='folder for permutation.md')
    args = parser.parse_args()
    main(args.repeats, args.out)
