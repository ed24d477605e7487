"""One-shot sparsification and exact selection on a CUDA device, beside fasterai 0.4.1 in turns: `python benchmarks/cuda.py`

Writes benchmarks/cuda.md."""
import time
from importlib.metadata import version
from pathlib import Path

import torch
from one_shot import MODELS, sparsify_ours, sparsify_theirs

import fasterai_sparse.all as ours
from copy import deepcopy

N = 9

def seconds(f, *args):
    torch.cuda.synchronize()
    start = time.perf_counter()
    f(*args)
    torch.cuda.synchronize()
    return time.perf_counter() - start

def median_ms(f, *args): return 1e3*sorted(seconds(f, *args) for _ in range(N+2))[:N][N//2]

def one_shot_rows():
    for name in ('resnet50', 'vit'):
        model, layer_type = MODELS[name]
        model = deepcopy(model).cuda()
        for granularity in ('weight', 'row', 'kernel', 'filter') if name == 'resnet50' else ('weight',):
            for context in ('local', 'global'):
                pairs = [(seconds(sparsify_ours, deepcopy(model), granularity, context, layer_type),
                          seconds(sparsify_theirs, deepcopy(model), granularity, context, layer_type)) for _ in range(N)]
                a, b = (sorted(t)[N//2] for t in zip(*pairs))
                yield f'| {name} {granularity} {context} | {a/b:.2f} | {1e3*a:.0f} | {1e3*b:.0f} |'

def selection_rows():
    for label,t in (('distinct', torch.rand(11_000_000)), ('nine in ten equal', (torch.rand(11_000_000)-.9).relu())):
        t, k = t.cuda(), 1_100_000
        yield (f'| 11 M scores, {label} | {median_ms(ours.top_k_mask, t, k):.2f} | {median_ms(ours.kth_largest, t, k):.2f} '
               f'| {median_ms(lambda: t.kthvalue(len(t)-k+1)):.2f} | {median_ms(lambda: t.sort()):.2f} |')

def main():
    lines = ['# One shot to 90 % on a CUDA device', '', f'`python benchmarks/cuda.py` on an {torch.cuda.get_device_name()}, torch {version("torch")}; '
        f'fasterai {version("fasterai")} in turns, medians of {N}; both do more Python than arithmetic here.', '',
        '| work | ours / fasterai | ours, ms | fasterai, ms |', '|---|---|---|---|', *one_shot_rows(), '',
        '## Exact selection', '', '| scores | `top_k_mask` with ties resolved, ms | its threshold (`topk`) | `kthvalue` | `sort` |', '|---|---|---|---|---|', *selection_rows()]
    print('\n'.join(lines))
    Path(__file__).with_suffix('.md').write_text('\n'.join(lines) + '\n')

if __name__ == '__main__': main()
