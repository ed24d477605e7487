"""2:4 beside dense on a GPU, in turn in one process: `python benchmarks/semi_structured.py`

Writes benchmarks/semi_structured.md: MLPs of ViT-B and ViT-L, and BERT-base (`transformers`), with random weights that
are 2:4 by magnitude. Needs a CUDA device."""
import argparse
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn

from fasterai_sparse.core.criteria import large_final
from fasterai_sparse.core.masks import remove_masks
from fasterai_sparse.core.sparsifier import Sparsifier
from fasterai_sparse.engine.semi_structured import accelerate_cuda, cuda_race, Linear24, probe_24

NETWORKS = ('ViT-B MLP', 'ViT-L MLP', 'BERT-base')
BATCHES = (1, 4, 16, 64, 256)
TOKENS = {'ViT-B MLP': 197, 'ViT-L MLP': 197, 'BERT-base': 384}

class Bert(nn.Module):
    "BERT-base with random weights, from token ids to the last hidden state"
    def __init__(self):
        from transformers import BertConfig, BertModel
        super().__init__()
        self.bert = BertModel(BertConfig(), add_pooling_layer=False)
    def forward(self, ids): return self.bert(ids).last_hidden_state

def mlp(n): return nn.Sequential(nn.Linear(n, 4*n), nn.GELU(), nn.Linear(4*n, n))

def network(name, dtype, device):
    torch.manual_seed(0)
    net = (Bert() if name == 'BERT-base' else mlp(768 if name == 'ViT-B MLP' else 1024)).to(device).eval()
    Sparsifier(net, 'weight', 'local', large_final, nm=True, layer_type=nn.Linear).sparsify_model(50)
    return remove_masks(net).to(dtype)

def batch_for(name, images, dtype, device):
    if name == 'BERT-base': return torch.randint(30_000, (images, TOKENS[name]), device=device)
    return torch.randn(images, TOKENS[name], 768 if name == 'ViT-B MLP' else 1024, device=device, dtype=dtype)

def compiled(net, x):
    "`net` through torch.compile, or None where that fails"
    try:
        fast = torch.compile(net)
        fast(x)
        return fast
    except Exception as e: print(f'torch.compile: {type(e).__name__}: {str(e).splitlines()[0]}', flush=True)

@torch.no_grad()
def measure(name, images, dtype, compile, device='cuda'):
    "Milliseconds of each variant, number of layers that run as 2:4, the error, and why none does"
    torch.compiler.reset()
    net, x = network(name, dtype, device), batch_for(name, images, dtype, device)
    fast, report = accelerate_cuda(net, x)
    nets = dict(dense=net, ours=fast) | ({'dense, compiled': compiled(net, x), 'ours, compiled': compiled(fast, x)}
                                         if compile else {})
    want, got = net(x).float(), fast(x).float()
    nets = {n: m for n,m in nets.items() if m is not None}
    ms = dict(zip(nets, cuda_race(*(partial(m, x) for m in nets.values()))))
    return ms, sum(isinstance(m, Linear24)
                   for m in fast.modules()), len(report), float((got-want).norm()/want.norm()), report.attrs['note']

def ratio(ms, a, b): return f'{ms[a]/ms[b]:.2f}' if a in ms and b in ms else '–'

def row(case, found):
    name, images, dtype = case
    start = f'| {name}, {images} | {str(dtype).removeprefix("torch.")} | '
    if found is None: return start + 'out of memory' + ' |'*9
    ms, n, total, error, note = found
    times = ' | '.join(f'{ms[k]:.3f}' if k in ms else '–' for k in ('dense', 'ours', 'dense, compiled',
                                                                    'ours, compiled'))
    return (start + f'{ratio(ms, "dense", "ours")} | {ratio(ms, "dense, compiled", "ours, compiled")} | {n} of '
                    f'{total} | {times} | {error:.0e} | {note} |')

def table(rows, probed):
    packages = ', '.join(f'{p} {version(p)}' for p in ('fasterai_sparse', 'torch', 'transformers') if find_spec(p))
    return '\n'.join(['# 2:4 beside dense on a GPU', '',
        f'`python benchmarks/semi_structured.py`: {packages}; {torch.cuda.get_device_name()}; the least of each, in '
        f'turn.', '',
        '| network, batch | type | dense / ours | both compiled | layers as 2:4 | dense, ms | ours, ms | dense '
        'compiled, ms | ours compiled, ms | error | note |', '|---'*11 + '|', *rows, '',
        '- What `accelerate_cuda` returns at that batch: layers that are quicker as 2:4, or the dense model (0 '
        'layers, ratio 1 but for noise), and then why.',
        f'- Tokens: {", ".join(f"{n} {t}" for n,t in TOKENS.items())}. Error: distance from the dense output over its '
        f'length.',
        '- Back ends: ' + '; '.join(f'{n}: {why or "runs"}' for n,why in probed.items()) + '.', ''])

def main(args):
    probed, rows = probe_24(), []
    print(probed, flush=True)
    for name in NETWORKS:
        for dtype in (torch.float16, torch.bfloat16):
            for images in args.batches:
                try: found = measure(name, images, dtype, not args.eager)
                except torch.OutOfMemoryError: found = None
                torch.cuda.empty_cache()
                rows.append(row((name, images, dtype), found))
                print(rows[-1], flush=True)
    (args.out/'semi_structured.md').write_text(table(rows, probed))

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--batches', default=BATCHES, type=int, nargs='+')
    parser.add_argument('--eager', action='store_true', help='without torch.compile')
    parser.add_argument('--out', default=Path(__file__).parent, type=Path, help='folder for semi_structured.md')
    args = parser.parse_args()
    if not torch.cuda.is_available(): parser.exit(1, 'benchmarks/semi_structured.py needs a CUDA device\n')
    main(args)
