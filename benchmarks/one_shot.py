"""One-shot sparsification to 90 % beside fasterai 0.4.1, alternating in one process: `python benchmarks/one_shot.py`

Writes benchmarks/one_shot.md. A run creates the Sparsifier and calls `sparsify_model` on a fresh copy of the model."""
import gc, io, platform, time
from copy import deepcopy
from importlib.metadata import version
from pathlib import Path

import fasterai.core.criteria as their_criteria
import fasterai.sparse.sparsifier as theirs
import torch
from torch import nn
from torchvision.models import resnet18, resnet50

import fasterai_sparse.all as ours

N = 9
RUNS = [('resnet50', 'weight'), ('vit', 'weight'), *[('resnet50', g) for g in ('row', 'column', 'kernel')],
        *[('resnet50', g) for g in ('filter', 'channel', 'vertical_slice', 'horizontal_slice', 'shared_weight',
                                    'shared_kernel',
                                    'shared_channel', 'shared_column', 'shared_row')]]

class MLP(nn.Module):
    "The MLP of a ViT-B block"
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(768, 3072), nn.Linear(3072, 768)

MODELS = {'resnet50': (resnet50(), nn.Conv2d), 'resnet18': (resnet18(), nn.Conv2d),
          'vit': (nn.Sequential(*[MLP() for _ in range(12)]), nn.Linear)}

def sparsify_theirs(model, granularity, context, layer_type):
    s = theirs.Sparsifier(model, granularity, context, their_criteria.large_final, layer_type=layer_type)
    s.sparsify_model(.9)
    return s

def sparsify_ours(model, granularity, context, layer_type):
    s = ours.Sparsifier(model, granularity, context, ours.large_final, layer_type=layer_type)
    s.sparsify_model(90)
    return s

def seconds(f, model, *args):
    model = deepcopy(model)
    gc.collect()
    start = time.perf_counter()
    f(model, *args)
    return time.perf_counter() - start

def speed_rows():
    for name,granularity in RUNS:
        model, layer_type = MODELS[name]
        for context in ('local', 'global'):
            pairs = [(seconds(sparsify_ours, model, granularity, context, layer_type),
                      seconds(sparsify_theirs, model, granularity, context, layer_type)) for _ in range(N)]
            ours_s, theirs_s = (sorted(t) for t in zip(*pairs))
            yield (f'| {name} {granularity} {context} | {ours_s[N//2]/theirs_s[N//2]:.2f} | '
                   f'{ours_s[0]/theirs_s[0]:.2f} '
                   f'| {1e3*ours_s[N//2]:.0f} | {1e3*theirs_s[N//2]:.0f} |')

def tensor_bytes(root):
    "Bytes of all tensors that `root` holds on to, each storage once"
    seen, storages, todo = set(), {}, [root]
    while todo:
        o = todo.pop()
        if id(o) in seen or isinstance(o, (type, str, int, float, torch.dtype)): continue
        seen.add(id(o))
        if torch.is_tensor(o):
            storages[o.untyped_storage().data_ptr()] = o.untyped_storage().nbytes()
            if o.grad is not None: todo.append(o.grad)
        elif isinstance(o, dict): todo += [*o.keys(), *o.values()]
        elif isinstance(o, (list, tuple, set)): todo += list(o)
        elif hasattr(o, '__dict__'): todo += list(vars(o).values())
    return sum(storages.values())

def file_bytes(model):
    f = io.BytesIO()
    torch.save(model.state_dict(), f)
    return f.tell()

def memory_rows():
    for name in ('resnet18', 'resnet50', 'vit'):
        model, layer_type = MODELS[name]
        dense, dense_file = tensor_bytes(model), file_bytes(model)
        row = []
        for f in (sparsify_ours, sparsify_theirs):
            m = deepcopy(model)
            row += [tensor_bytes((m, f(m, 'weight', 'local', layer_type)))/dense, file_bytes(m)/dense_file]
        yield f'| {name} | {row[0]:.2f} | {row[2]:.2f} | {row[1]:.2f} | {row[3]:.2f} |'

def main():
    lines = ['# One-shot sparsification to 90 % by magnitude', '',
        f'`python benchmarks/one_shot.py`: fasterai_sparse {version("fasterai_sparse")} and fasterai '
        f'{version("fasterai")} '
        f'alternating in one process, {N} times each; torch {version("torch")}, {torch.get_num_threads()} threads, '
        f'{platform.machine()}. '
        'A run makes the Sparsifier and sparsifies a fresh copy. `vit` is the MLPs of ViT-B: 56.6 M weights.', '',
        '| work | ours / fasterai, median | of the minima | ours, ms | fasterai, ms |', '|---|---|---|---|---|']
    for row in speed_rows():
        print(row, flush=True)
        lines.append(row)
    lines += ['', '## Memory while sparse, and the checkpoint', '', 'Times the dense model: tensors held by model and '
                                                                    'Sparsifier, and the file of the `state_dict`.', '',
        '| model | resident, ours | resident, fasterai | checkpoint, ours | checkpoint, fasterai |',
        '|---|---|---|---|---|', *memory_rows()]
    Path(__file__).with_suffix('.md').write_text('\n'.join(lines) + '\n')

if __name__ == '__main__': main()
