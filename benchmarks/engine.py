"""The engine beside dense engines, in turn in one process: `python benchmarks/engine.py`

Writes benchmarks/engine.md. ONNX Runtime (`onnx`, `onnxscript`, `onnxruntime`) and `openvino` stand beside where they are installed; the table says which were.
Weights are random, and zero where magnitude says; outputs are compared with torch's."""
import argparse, os, tempfile, time, warnings
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

os.environ.setdefault('OMP_NUM_THREADS', '1')
import torch, torchvision
from torch import nn

from fasterai_sparse.accelerate import Accelerated
from fasterai_sparse.all import NM, Sparsifier, block, large_final, remove_masks
from fasterai_sparse.engine import engine_sets
from runs import cpu_name

CASES = [('resnet50', 1, 80, 'weight'), ('resnet50', 1, 90, 'weight'), ('resnet50', 1, 95, 'weight'), ('resnet50', 1, 80, '4x1'), ('resnet50', 1, 90, '4x1'), ('resnet50', 8, 90, 'weight'),
         ('resnet18', 1, 90, 'weight'), ('mobilenet_v2', 1, 90, 'weight'), ('efficientnet_b0', 1, 90, 'weight')]   # network, images, percent, granularity
ASKED = {('resnet50', 1, 80, 'weight'): 1.7, ('resnet50', 1, 90, 'weight'): 2.8, ('resnet50', 1, 95, 'weight'): 4.2, ('resnet50', 1, 80, '4x1'): 2.9, ('resnet50', 1, 90, '4x1'): 4.6, ('resnet50', 8, 90, 'weight'): 2.7,
         ('resnet18', 1, 90, 'weight'): 2.4, ('mobilenet_v2', 1, 90, 'weight'): 1.25}

def network(name, percent, granularity):
    torch.manual_seed(0)
    net = getattr(torchvision.models, name)().eval()
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d): m.running_mean.normal_(0, .1), m.running_var.uniform_(.5, 2)
    layers = [n for n,m in net.named_modules() if isinstance(m, nn.Conv2d) and m.groups == 1 and m.in_channels > 3]
    s = Sparsifier(net, block(4,1) if granularity == '4x1' else granularity, 'local', large_final, layer_type=nn.Conv2d)
    s.sparsify_model({n: percent for n in layers})
    return remove_masks(net)

def of_onnx(net, x, folder):
    "The network as a file"
    path = Path(folder)/'net.onnx'
    if not path.exists():
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            torch.onnx.export(net, (x,), path, dynamo=True, external_data=False, verbose=False)
    return path

def ort(net, x, folder, threads):
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = onnxruntime.InferenceSession(str(of_onnx(net, x, folder)), options, providers=['CPUExecutionProvider'])
    feed = {session.get_inputs()[0].name: x.numpy()}
    return lambda: torch.from_numpy(session.run(None, feed)[0])

def openvino(net, x, folder, threads):
    import openvino as ov
    model = ov.Core().compile_model(str(of_onnx(net, x, folder)), 'CPU', {'INFERENCE_NUM_THREADS': threads, 'PERFORMANCE_HINT': 'LATENCY', 'INFERENCE_PRECISION_HINT': 'f32'})
    request, a = model.create_infer_request(), x.numpy()
    return lambda: torch.from_numpy(request.infer([a])[0].copy())

def engines(net, x, folder, threads):
    "Name -> function that runs `net` on `x`"
    last = x.to(memory_format=torch.channels_last) if x.dim() == 4 else x
    fast = Accelerated(net, threads)
    found = {'ours': lambda: fast(x), 'torch': lambda: net(x), 'torch, channels last': lambda: net(last)}
    if all(find_spec(p) for p in ('onnx', 'onnxscript', 'onnxruntime')): found['ONNX Runtime'] = ort(net, x, folder, threads)
    if all(find_spec(p) for p in ('onnx', 'onnxscript', 'openvino')): found['OpenVINO'] = openvino(net, x, folder, threads)
    return found

def race(fs, seconds):
    "Least milliseconds of each function, in turn"
    best, start = dict.fromkeys(fs, float('inf')), time.perf_counter()
    for f in fs.values(): f()
    while time.perf_counter()-start < seconds or max(best.values()) == float('inf'):
        for n,f in fs.items():
            a = time.perf_counter()
            f()
            best[n] = min(best[n], 1000*(time.perf_counter()-a))
    return best

@torch.no_grad()
def measure(case, threads, seconds):
    name, images, percent, granularity = case
    net, x = network(name, percent, granularity), torch.randn(images, 3, 224, 224)
    with tempfile.TemporaryDirectory() as folder:
        fs = engines(net, x, folder, threads)
        start = time.perf_counter()
        got = fs['ours']()
        tuning, want = time.perf_counter()-start, net(x)
        error = max(float((f()-want).abs().max()/want.abs().max()) for f in fs.values())
        if error > 1e-3: raise RuntimeError(f'{name}: outputs differ by {error:.1e}')
        own = float((got-want).abs().max()/want.abs().max())
        return race(fs, seconds), own, tuning

@torch.no_grad()
def scaling(name, seconds):
    "Milliseconds of `name` at 90 %, one image, with one thread and with two"
    net, x = network(name, 90, 'weight'), torch.randn(1, 3, 224, 224)
    one, two = (Accelerated(net, t) for t in (1, 2))
    return race({1: lambda: one(x), 2: lambda: two(x)}, seconds)

def main(threads, seconds, out):
    torch.set_num_threads(threads)
    rows, names = [], []
    for case in CASES:
        ms, error, tuning = measure(case, threads, seconds)
        names = list(ms)
        dense = {n: v for n,v in ms.items() if n != 'ours'}
        best = min(dense, key=dense.get)
        rows.append((case, dense[best]/ms['ours'], best, ms, error, tuning))
        print(case, f'{rows[-1][1]:.2f} times as fast as {best}', {n: round(v, 2) for n,v in ms.items()}, flush=True)
    packages = ', '.join(f'{p} {version(p)}' for p in ('fasterai_sparse', 'torch', 'onnxruntime', 'openvino') if find_spec(p))
    lines = ['# The engine beside dense engines', '',
             f'`python benchmarks/engine.py`: {packages}; float32, {threads} thread{"s" if threads > 1 else ""}, {next(iter(engine_sets()))}, {cpu_name()}; the least of each, in turn, in {seconds:g} s.', '',
             '| network, images | sparsity, % | times the best dense engine | asked | which | ' + ' | '.join(f'{n}, ms' for n in names) + ' | error | tuning, s |', '|---'*(len(names)+7) + '|']
    for case,ratio,best,ms,error,tuning in rows:
        lines.append(f'| {case[0]}, {case[1]} | {case[2]}{", 4×1" if case[3] == "4x1" else ""} | {ratio:.2f} | {ASKED.get(case, "")} | {best} | ' + ' | '.join(f'{ms[n]:.2f}' for n in names) + f' | {error:.0e} | {tuning:.1f} |')
    lines += ['', '| 90 %, one image | 1 thread, ms | 2 threads, ms | times as fast |', '|---|---|---|---|']
    for name in ('resnet50', 'mobilenet_v2'):
        ms = scaling(name, seconds)
        lines.append(f'| {name} | {ms[1]:.2f} | {ms[2]:.2f} | {ms[1]/ms[2]:.2f} |')
    lines += ['', '- Random weights; all convolutions but the first and depthwise ones are sparse by magnitude, the head is dense. Error: largest difference from torch over the largest output.',
              '- The dense engines run the same weights, zeros and all, in float32. Int8 and bfloat16 are not in this table.', '']
    (out/'engine.md').write_text('\n'.join(lines))

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--threads', default=1, type=int)
    parser.add_argument('--seconds', default=6., type=float, help='of each row')
    parser.add_argument('--out', default=Path(__file__).parent, type=Path, help='folder for engine.md')
    args = parser.parse_args()
    main(args.threads, args.seconds, args.out)
