"""The engine beside dense engines, measured in turn in one process: `python benchmarks/engine.py`

Writes benchmarks/engine.md. ONNX Runtime (`onnx`, `onnxscript`, `onnxruntime`), `openvino` and, for its int8, `nncf`
are measured where they are installed; the table says which were.
Weights are random and sparse by magnitude; outputs are compared with torch's."""
import argparse, os, tempfile, time, warnings
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

os.environ.setdefault('OMP_NUM_THREADS', '1')
import torch, torchvision
from torch import nn

from fasterai_sparse.core.criteria import large_final
from fasterai_sparse.core.masks import remove_masks
from fasterai_sparse.core.patterns import block, NM
from fasterai_sparse.core.sparsifier import Sparsifier
from fasterai_sparse.engine.modules import Accelerated, SparseLinear
from fasterai_sparse.engine.ops import engine_sets
from runs import cpu_name

PATTERNS = {'weight': 'weight', '4x1': block(4,1), '16x1': block(16,1), '2:4': NM(2,4)}
# (network, images, percent, pattern, number of the instruction set) -> required speed relative to the best dense engine
CASES = {('resnet50', 1, 80, 'weight', 0): 1.7, ('resnet50', 1, 90, 'weight', 0): 2.8, ('resnet50', 1, 95, 'weight',
    0): 4.2, ('resnet50', 1, 90, 'weight', 1): 2.2, ('resnet50', 1, 80, '4x1', 0): 2.9,
         ('resnet50', 1, 90, '4x1', 0): 4.6, ('resnet50', 8, 90, 'weight', 0): 2.7, ('resnet18', 1, 90, 'weight',
             0): 2.4, ('mobilenet_v2', 1, 90, 'weight', 0): 1.25,
         ('efficientnet_lite0', 1, 90, 'weight', 0): 1.25, ('efficientnet_b0', 1, 90, 'weight', 0): None,
         ('minilm', 1, 80, 'weight', 0): None, ('minilm', 1, 90, 'weight', 0): 1.5, ('minilm', 1, 90, '4x1', 0): 1.9}
LINEARS, TOKENS = [(1024, 1024), (1536, 384), (384, 1536), (4096, 4096)], [1, 16, 128]   # outputs × inputs
LINEAR_CASES = [(80, 'weight'), (90, 'weight'), (80, '4x1'), (90, '4x1'), (90, '16x1'), (50, '2:4')]
INT8 = ('resnet50', 'resnet18', 'mobilenet_v2')

class MBConv(nn.Module):
    "An inverted residual of EfficientNet-Lite"
    def __init__(self, i, o, k, stride, expand):
        super().__init__()
        act = lambda n: [nn.BatchNorm2d(n), nn.ReLU6()]
        up = [nn.Conv2d(i, i*expand, 1, bias=False), *act(i*expand)] if expand > 1 else []
        self.layers = nn.Sequential(*up, nn.Conv2d(i*expand, i*expand, k, stride, k//2, groups=i*expand, bias=False),
                                    *act(i*expand), nn.Conv2d(i*expand, o, 1, bias=False), nn.BatchNorm2d(o))
        self.skip = stride == 1 and i == o
    def forward(self, x): return x + self.layers(x) if self.skip else self.layers(x)

def efficientnet_lite0():
    layers, i = [nn.Conv2d(3, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU6()], 32
    for expand,k,stride,o,n in ((1,3,1,16,1), (6,3,2,24,2), (6,5,2,40,2), (6,3,2,80,3), (6,5,1,112,3), (6,5,2,192,4),
                                (6,3,1,320,1)):
        for j in range(n): layers, i = [*layers, MBConv(i, o, k, stride if j == 0 else 1, expand)], o
    return nn.Sequential(*layers, nn.Conv2d(320, 1280, 1, bias=False), nn.BatchNorm2d(1280), nn.ReLU6(),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1280, 1000))

def minilm():
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(384, 12, 1536, activation='gelu', batch_first=True), 6,
                                 enable_nested_tensor=False)

def network(name, percent, pattern):
    "(network, example input) by name"
    torch.manual_seed(0)
    net = (globals().get(name) or getattr(torchvision.models, name))().eval()
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d): m.running_mean.normal_(0, .1), m.running_var.uniform_(.5, 2)
    kinds = (nn.Linear, nn.MultiheadAttention) if name == 'minilm' else nn.Conv2d
    s = Sparsifier(net, PATTERNS[pattern], 'local', large_final, layer_type=kinds)
    if name == 'minilm': s.sparsify_model(percent)
    else:
        s.sparsify_model({n: percent for n,m in net.named_modules() if isinstance(m, nn.Conv2d) and m.groups == 1
                          and m.in_channels > 3})
    return remove_masks(net), torch.randn(1, 32, 384) if name == 'minilm' else torch.randn(1, 3, 224, 224)

def of_onnx(net, x, folder):
    "The network exported to an ONNX file"
    path = Path(folder)/'net.onnx'
    if not path.exists():
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            torch.onnx.export(net, (x,), path, dynamo=True, external_data=False, verbose=False)
    return path

def ort(net, x, folder, threads, path=None):
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = onnxruntime.InferenceSession(str(path or of_onnx(net, x, folder)), options,
                                           providers=['CPUExecutionProvider'])
    feed = {session.get_inputs()[0].name: x.numpy()}
    return lambda: torch.from_numpy(session.run(None, feed)[0])

def openvino(net, x, folder, threads, quantized=False):
    import openvino as ov
    model = ov.Core().read_model(str(of_onnx(net, x, folder)))
    if quantized:
        import nncf
        model = nncf.quantize(model, nncf.Dataset([x.numpy()]), subset_size=1)
    compiled = ov.Core().compile_model(model, 'CPU', {'INFERENCE_NUM_THREADS': threads, 'PERFORMANCE_HINT': 'LATENCY',
                                                      'INFERENCE_PRECISION_HINT': 'f32'})
    request, a = compiled.create_infer_request(), x.numpy()
    return lambda: torch.from_numpy(request.infer([a])[0].copy())

def ort_int8(net, x, folder, threads):
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process
    class One(CalibrationDataReader):
        def __init__(self, name): self.left = [{name: x.numpy()}]
        def get_next(self): return self.left.pop() if self.left else None
    import onnxruntime
    path, ready, int8 = of_onnx(net, x, folder), Path(folder)/'ready.onnx', Path(folder)/'int8.onnx'
    quant_pre_process(str(path), str(ready), skip_symbolic_shape=True)
    name = onnxruntime.InferenceSession(str(path), providers=['CPUExecutionProvider']).get_inputs()[0].name
    quantize_static(str(ready), str(int8), One(name), quant_format=QuantFormat.QDQ, per_channel=True)
    return ort(net, x, folder, threads, int8)

def have(*packages): return all(find_spec(p) for p in packages)

def engines(net, x, folder, threads, compiled=True):
    "Name -> function that runs `net` on `x` in float32"
    found = {'torch': lambda: net(x)}
    if x.dim() == 4:
        last = x.to(memory_format=torch.channels_last)
        found['torch, channels last'] = lambda: net(last)
    if compiled:
        inductor = torch.compile(net)
        found['torch.compile'] = lambda: inductor(x)
    if have('onnx', 'onnxscript', 'onnxruntime'): found['ONNX Runtime'] = ort(net, x, folder, threads)
    if have('onnx', 'onnxscript', 'openvino'): found['OpenVINO'] = openvino(net, x, folder, threads)
    return found

def engines_int8(net, x, folder, threads):
    found = {}
    if have('onnx', 'onnxscript', 'onnxruntime'): found['ONNX Runtime int8'] = ort_int8(net, x, folder, threads)
    if have('onnx', 'onnxscript', 'openvino', 'nncf'): found['OpenVINO int8'] = openvino(net, x, folder, threads, True)
    return found

def race(fs, seconds):
    "Least milliseconds of each function, measured in turn"
    best, start = dict.fromkeys(fs, float('inf')), time.perf_counter()
    for f in fs.values(): f()
    while time.perf_counter()-start < seconds or max(best.values()) == float('inf'):
        for n,f in fs.items():
            a = time.perf_counter()
            f()
            best[n] = min(best[n], 1000*(time.perf_counter()-a))
    return best

def error(want, got): return float((got-want).abs().max()/want.abs().max())

def packed_mb(net): return sum(4*int(p.count_nonzero()) + p.numel()/8 for p in net.parameters())/1e6

@torch.no_grad()
def measure(case, threads, seconds, compiled):
    name, images, percent, pattern, which = case
    net, x = network(name, percent, pattern)
    x = torch.cat([torch.randn_like(x) for _ in range(images)])
    fast = Accelerated(net, threads, cache=None, which=which)
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        got = fast(x)
        row, want = dict(tuning=time.perf_counter()-start, packed=packed_mb(net)), net(x)
        dense = engines(net, x, folder, threads, compiled)
        worst = max(error(want, f()) for f in dense.values())
        if worst > 1e-3: raise RuntimeError(f'{name}: outputs differ by {worst:.1e}')
        in_int8 = name in INT8 and (images, percent, pattern, which) == (1, 90, 'weight', 0)
        int8 = engines_int8(net, x, folder, threads) if in_int8 else {}
        plan = fast.last[1]
        row |= dict(ms=race({'ours': lambda: fast(x)} | dense | int8, seconds), error=error(want, got),
                    weights=plan.weights.taken/1e6, activations=plan.activations.taken/1e6)
        return row | dict(dense=list(dense), int8=list(int8))

@torch.no_grad()
def linear(n_out, n_in, tokens, threads, seconds):
    "Case -> speed relative to the better of torch and ONNX Runtime, for one Linear layer"
    x, fs = torch.randn(tokens, n_in), {}
    for percent,pattern in LINEAR_CASES:
        layer = nn.Linear(n_in, n_out, bias=False)
        Sparsifier(nn.Sequential(layer), PATTERNS[pattern], 'local', large_final,
                   layer_type=nn.Linear).sparsify_model(percent)
        remove_masks(nn.Sequential(layer))
        fs[percent,pattern] = partial(SparseLinear(layer, threads, cache=None), x)
        if error(layer(x), fs[percent,pattern]()) > 1e-4: raise RuntimeError(f'{n_out}×{n_in}: outputs differ')
    with tempfile.TemporaryDirectory() as folder:
        dense = engines(nn.Linear(n_in, n_out, bias=False), x, folder, threads, compiled=False)
        dense.pop('OpenVINO', None)
        ms = race(dense | fs, seconds)
    return {c: min(ms[d] for d in dense)/ms[c] for c in LINEAR_CASES}, {d: ms[d] for d in dense}

@torch.no_grad()
def scaling(name, seconds):
    "Milliseconds of `name` at 90 %, one image, with one thread and with two"
    net, x = network(name, 90, 'weight')
    one, two = (Accelerated(net, t, cache=None) for t in (1, 2))
    return race({1: lambda: one(x), 2: lambda: two(x)}, seconds)

def table(head, rows):
    return ['| ' + ' | '.join(head) + ' |', '|---'*len(head) + '|', *('| ' + ' | '.join(map(str, r)) + ' |'
                                                                      for r in rows), '']

def main(threads, seconds, out, compiled, only):
    torch.set_num_threads(threads)
    rows = {}
    for case in [c for c in CASES if not only or only in c[0]]:
        rows[case] = r = measure(case, threads, seconds, compiled)
        best = min(r['dense'], key=r['ms'].get)
        r |= dict(best=best, ratio=r['ms'][best]/r['ms']['ours'])
        print(case, f'{r["ratio"]:.2f} times as fast as {best}', {n: round(v, 2) for n,v in r['ms'].items()},
              flush=True)
    names = list(dict.fromkeys(n for r in rows.values() for n in r['dense']))
    ms = lambda r, n: f'{r["ms"][n]:.2f}' if n in r['ms'] else ''
    label = lambda c: [f'{c[0]}, {c[1]}', f'{c[2]}' + (f', {c[3].replace("x", "×")}' if c[3] != 'weight' else ''),
                       list(engine_sets())[c[4]]]
    packages = ', '.join(f'{p} {version(p)}' for p in ('fasterai_sparse', 'torch', 'onnxruntime', 'openvino', 'nncf')
                         if find_spec(p))
    lines = ['# The engine beside dense engines', '',
             f'`python benchmarks/engine.py`: {packages}; float32, {threads} thread{"s" if threads > 1 else ""}, '
             f'{cpu_name()}; the least of each, in turn, in {seconds:g} s.', '', '## Networks', '',
             *table(['network, images', 'sparsity, %', 'instructions', 'times the best dense engine', 'asked', 'which',
                     'ours, ms', *(f'{n}, ms' for n in names), 'error'],
                    [[*label(c), f'{r["ratio"]:.2f}', CASES[c] or '', r['best'], *(ms(r, n) for n in ['ours', *names]),
                      f'{r["error"]:.0e}'] for c,r in rows.items()]),
             'Random weights. All convolutions but the first and depthwise ones are sparse by magnitude and the head '
             'is dense; of `minilm` (6 layers of 384, 12 heads, 1536 between, 32 tokens) all Linear layers.',
             'Error: largest difference from torch over the largest output. The dense engines run the same weights, '
             'zeros and all.', '']
    if any(r['int8'] for r in rows.values()):
        names8 = list(dict.fromkeys(n for r in rows.values() for n in r['int8']))
        lines += ['## Beside dense int8', '', *table(['network, 90 %', 'ours, float32, ms',
                                                      *(f'{n}, ms' for n in names8)],
                                                      [[c[0], ms(r, 'ours'), *(ms(r, n) for n in names8)]
                                                       for c,r in rows.items() if r['int8']]),
                  'Eight bits need calibration and change outputs; what they do to accuracy is not measured here.', '']
    lines += ['## Memory and tuning', '', *table(['network, images', 'sparsity, %', 'instructions', 'tuning, s',
                                                  'weights in the engine, MB', 'values and a bit per weight, MB',
                                                  'activations, MB'],
              [[*label(c), *(f'{r[n]:.1f}' for n in ('tuning', 'weights', 'packed', 'activations'))]
               for c,r in rows.items()]),
              'Tuning includes tracing, and the plan for one image where several came. The dense model is kept as '
              'well, for inputs that are not finite.', '']
    if not only:
        lines += ['## Linear layers', '']
        found = []
        for n_out,n_in in LINEARS:
            for tokens in TOKENS:
                ratios, dense = linear(n_out, n_in, tokens, threads, seconds/2)
                found.append([f'{n_out}×{n_in}', tokens, *(f'{r:.2f}' for r in ratios.values()),
                              *(f'{v:.3f}' for v in dense.values())])
                print(found[-1], flush=True)
        lines += table(['outputs × inputs', 'tokens', *(f'{p} %' + (f', {g.replace("x", "×")}' if g != 'weight'
                                                                    else '') for p,g in LINEAR_CASES),
                                                                    *(f'{d}, ms' for d in dense)], found)
        lines += ['How often as fast as the better of torch and ONNX Runtime `SparseLinear` is, as a module that is '
                  'called from Python. Asked of 90 %, from 16 tokens on: 2, and 3 of 4×1.', '',
                  '## Threads', '', *table(['90 %, one image', '1 thread, ms', '2 threads, ms', 'times as fast'],
                                           [[n, f'{t[1]:.2f}', f'{t[2]:.2f}', f'{t[1]/t[2]:.2f}'] for n in ('resnet50',
                                               'mobilenet_v2') for t in [scaling(n, seconds)]])]
    (out/'engine.md').write_text('\n'.join(lines))

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--threads', default=1, type=int)
    parser.add_argument('--seconds', default=6., type=float, help='of each row')
    parser.add_argument('--out', default=Path(__file__).parent, type=Path, help='folder for engine.md')
    parser.add_argument('--no-compile', action='store_true', help='leave out torch.compile, which takes a minute for '
                                                                  'each network')
    parser.add_argument('--only', default='', help='networks whose name has this')
    args = parser.parse_args()
    main(args.threads, args.seconds, args.out, not args.no_compile, args.only)
