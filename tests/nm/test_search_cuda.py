"""The CUDA kernels of the permutation search, and ASP's functions, against numpy or torch.

They are compiled for devices that need not be here, run thread by thread on the CPU, and on a GPU by the tests marked
`cuda`."""
import ctypes, re, shutil, subprocess, sys, types
from contextlib import nullcontext
from itertools import combinations

import numpy as np, pytest, torch

from fasterai_sparse.nm import search_cuda as permutation_cuda
from fasterai_sparse.utils.native import sum_max_torch
from fasterai_sparse.nm.search import _Search, search_permutation, TorchMap
from fasterai_sparse.nm.search_cuda import (
    _arguments, _CudaKernels, _deals, _launch, _nvrtc_files, _kernel_source, _swap_deals, asp_kernels, asp_search,
    ASPKernels, compile_cubin, CudaMap, nvrtc_library, sum_max_cuda)

on_device = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device')]
needs_nvrtc = pytest.mark.skipif(bool(nvrtc_library()[1]), reason=nvrtc_library()[1])

# --- compiling

@needs_nvrtc
@pytest.mark.parametrize('arch', ['sm_80', 'sm_90', 'sm_100'])
def test_kernels_compile(arch):
    cubin = compile_cubin(_kernel_source(), arch)
    assert cubin[:4] == b'\x7fELF' and compile_cubin(_kernel_source(), arch) is cubin
    for name in re.findall(r'^extern "C".* (\w+)\(', _kernel_source(), re.M): assert f'.text.{name}\0'.encode() in cubin

@needs_nvrtc
def test_a_wrong_source_shows_the_log():
    with pytest.raises(RuntimeError, match=r'(?s)sm_90.*permutation.cu\(2\).*"oops" is undefined'):
        compile_cubin('extern "C" __global__ void f(int* x) {\n*x = oops; }', 'sm_90')

@needs_nvrtc
@pytest.mark.parametrize('arch', ['sm_1', 'sm_90;', '90', ''])
def test_an_unknown_architecture_is_refused(arch):
    with pytest.raises(ValueError, match='sm_90'): compile_cubin(_kernel_source(), arch)

def test_without_nvrtc(monkeypatch):
    monkeypatch.setattr(permutation_cuda, '_nvrtc_files', lambda: ['libnvrtc.so.none', '/nowhere/libnvrtc.so'])
    lib, why = nvrtc_library.__wrapped__()
    assert lib is None and 'nvidia-cuda-nvrtc' in why
    monkeypatch.setattr(permutation_cuda, 'nvrtc_library', lambda: (None, why))
    with pytest.raises(RuntimeError, match='nvidia-cuda-nvrtc'): compile_cubin('// not seen before', 'sm_90')

@needs_nvrtc
def test_nvrtc_is_found_without_torchs_help():
    files = [f for f in _nvrtc_files()[1:] if '/nvidia/' in f or '/torch/' in f]
    if not files: pytest.skip('NVRTC is not in a wheel here')
    code = (f'import ctypes; lib = ctypes.CDLL({files[0]!r}); n = ctypes.c_int(); '
            'assert lib.nvrtcGetNumSupportedArchs(ctypes.byref(n)) == 0 and n.value > 5')
    subprocess.run([sys.executable, '-c', code], check=True, timeout=60)

def test_importing_touches_no_device_and_says_nothing():
    code = """import sys, torch, fasterai_sparse.nm.search_cuda as p
assert not torch.cuda.is_initialized() and 'permutation_search_cuda' not in sys.modules
assert all(f.cache_info().currsize == 0 for f in (p.nvrtc_library, p.compile_cubin, p._driver))"""
    out = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True, timeout=120)
    assert (out.returncode, out.stdout, out.stderr) == (0, '', '')

# --- kernels: by a CPU that takes the threads of a block in turns from one barrier to the next, and on a device

CPU = r'''
#include <math.h>
#include <algorithm>
#include <cstddef>
#include <cstring>
#include <ucontext.h>
#include <utility>
#include <vector>
using std::min; using std::max;
struct Index { unsigned x, y, z; };
static Index threadIdx, blockIdx, blockDim, gridDim;
static ucontext_t scheduler, threads[1024];
static int now;
static bool ended[1024];
static void __syncthreads() { swapcontext(&threads[now], &scheduler); }
#define __global__
#define __device__ static
#define __shared__ static
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(n)
#include SOURCE
static void (*body)(void**);
static void** arguments;
static void one_thread() { body(arguments); ended[now] = true; }
template<class... A, size_t... I>
static void call(void (*f)(A...), void** a, std::index_sequence<I...>) { f(*(A*)a[I]...); }
template<class... A> static void call(void (*f)(A...), void** a) { call(f, a, std::index_sequence_for<A...>{}); }
static void block(bool backwards) {
    static std::vector<char> stacks(1024*65536);
    const int n = blockDim.x;
    for (int t = 0; t < n; t++) {
        getcontext(&threads[t]);
        threads[t].uc_stack.ss_sp = &stacks[t*65536];
        threads[t].uc_stack.ss_size = 65536;
        threads[t].uc_link = &scheduler;
        makecontext(&threads[t], one_thread, 0);
        ended[t] = false;
    }
    for (int left = n; left;) for (int k = left = 0; k < n; k++) {
        now = threadIdx.x = backwards ? n-1-k : k;
        if (!ended[now]) swapcontext(&scheduler, &threads[now]);
        left += !ended[now];
    }
}
static void run(void (*f)(void**), int x, int y, int z, int n, int backwards, void** a) {
    body = f, arguments = a, blockDim = {(unsigned)n, 1, 1}, gridDim = {(unsigned)x, (unsigned)y, (unsigned)z};
    for (blockIdx.z = 0; blockIdx.z < gridDim.z; blockIdx.z++)
        for (blockIdx.y = 0; blockIdx.y < gridDim.y; blockIdx.y++)
            for (blockIdx.x = 0; blockIdx.x < gridDim.x; blockIdx.x++) block(backwards);
}
'''

DRIVER = r'''
extern "C" {   // a stand-in for the driver, particular about what it gets
typedef void (*Run)(int, int, int, int, int, void**);
static const struct { const char* name; Run run; } kernels[] = {KERNELS};
static char context, module_;
static void* current;
int cuInit(unsigned flags) { return flags; }
int cuDeviceGet(int* device, int i) { *device = i+7; return 0; }
int cuDevicePrimaryCtxRetain(void** c, int device) { *c = &context; return device != 7; }
int cuCtxSetCurrent(void* c) { current = c; return 0; }
int cuModuleLoadData(void** m, const char* cubin) {
    *m = &module_;
    return current != &context || memcmp(cubin, "\x7f" "ELF", 4);
}
int cuModuleGetFunction(void** f, void* m, const char* name) {
    for (auto& k : kernels) if (m == &module_ && !strcmp(name, k.name)) { *f = (void*)k.run; return 0; }
    return 500;
}
int cuLaunchKernel(void* f, unsigned x, unsigned y, unsigned z, unsigned n, unsigned ny, unsigned nz, unsigned shared,
                   void* stream, void** a, void** extra) {
    if (current != &context || stream != (void*)0x123456789abc || ny != 1 || nz != 1 || shared || extra) return 1;
    ((Run)f)(x, y, z, n, 0, a);
    return 0;
}
int cuGetErrorString(int code, const char** text) { *text = "the stand-in is not content"; return 0; }
}
'''

@pytest.fixture(scope='module')
def cpu_kernels(tmp_path_factory):
    "The kernels compiled for the CPU"
    if sys.platform != 'linux' or not shutil.which('g++'): pytest.skip('takes g++ on Linux')
    folder = tmp_path_factory.mktemp('kernels')
    names = re.findall(r'^extern "C".* (\w+)\(', _kernel_source(), re.M)
    assert len(names) == 7
    starts = [f'''extern "C" void run_{n}(int x, int y, int z, int threads, int backwards, void** a) {{
    run([](void** a) {{ call({n}, a); }}, x, y, z, threads, backwards, a);
}}
''' for n in names]
    (folder/'permutation.cu').write_text(_kernel_source())
    driver = DRIVER.replace('KERNELS', ', '.join(f'{{"{n}", run_{n}}}' for n in names))
    (folder/'kernels.cpp').write_text(CPU.replace('SOURCE', '"permutation.cu"') + ''.join(starts) + driver)
    subprocess.run(['g++', '-std=c++17', '-O1', '-w', '-shared', '-fPIC', '-o', folder/'kernels.so',
                    folder/'kernels.cpp'], check=True, timeout=300)
    return ctypes.CDLL(str(folder/'kernels.so'))

@pytest.fixture(params=['cpu', 'cpu backwards', pytest.param('cuda', marks=on_device)])
def device(request, monkeypatch):
    "Device of the kernels; on the CPU, threads in either order must give the same"
    if request.param == 'cuda': return 'cuda'
    lib = request.getfixturevalue('cpu_kernels')
    def launch(name, grid, block, *args):
        assert all(a.device.type == 'cpu' for a in args if isinstance(a, torch.Tensor)) and min(grid) > 0
        assert 0 < block <= 1024
        values, pointers = _arguments(args)
        getattr(lib, f'run_{name}')(*(*grid, 1, 1)[:3], block, int('backwards' in request.param), pointers)
    monkeypatch.setattr(permutation_cuda, '_launch', launch)
    return 'cpu'

@pytest.mark.parametrize('a,b,k',
                         [(1,1,1), (3,5,0), (8,64,16), (9,65,33), (31,3,100), (32,1,15), (64,128,64), (65,129,17),
                          (100,40,130), (2,3,1025)])
def test_sum_max(device, a, b, k):
    h, x = torch.randn(a, k), torch.randn(b, k)
    out = sum_max_cuda(h.to(device), x.to(device))
    assert out.shape == (a, b) and torch.allclose(out.cpu(), torch.maximum(h[:,None], x).sum(-1), rtol=1e-5, atol=1e-4)

def test_sum_max_repeats_itself_and_takes_views(device):
    h = torch.rand(40, 30, device=device).T
    assert torch.equal(sum_max_cuda(h, h), sum_max_cuda(h, h))
    assert torch.allclose(sum_max_cuda(h, h), sum_max_torch(h, h), rtol=1e-5)

@pytest.mark.parametrize('h,x',
                         [(torch.rand(2,3), torch.rand(2,4)), (torch.rand(2), torch.rand(2)),
                          (torch.rand(2,3).double(), torch.rand(2,3).double())])
def test_sum_max_refuses(h, x):
    with pytest.raises(ValueError, match=r'not torch.float'): sum_max_cuda(h, x)

@pytest.mark.parametrize('n,m,rows,columns',
                         [(2,4,37,24), (2,4,1,8), (1,4,5,12), (3,4,300,12), (1,2,20,10), (2,6,33,18), (4,8,70,16),
                          (2,4,19,160)])
@pytest.mark.parametrize('ties', [False, True])
def test_cuda_map_equals_its_twin(device, n, m, rows, columns, ties):
    x = torch.randint(0, 3, (columns, rows)).float() if ties else torch.rand(columns, rows)
    ours, twin, order = CudaMap(x, n, m, device), TorchMap(x, n, m), np.random.RandomState(0).permutation(columns)
    every = np.arange(columns//m)
    for stripes in (every, every[::2], every[-1:]):
        kept, wanted = (e.refresh(order, stripes) for e in (ours, twin))
        assert kept.shape == stripes.shape and kept == pytest.approx(wanted, rel=1e-5)
        assert torch.allclose(ours.values.cpu(), twin.values, rtol=1e-5, atol=1e-5)
        twin.values = ours.values.cpu()   # so that ties are the same
        (best, which), (wanted, its) = (e.swaps(order, stripes) for e in (ours, twin))
        assert np.array_equal(best, wanted) and best.dtype == np.float32
        i, j = np.divmod(which, m)
        here, there = (m*stripes[:,None] + i), (m*every + j)
        v = twin.values.numpy()
        assert np.array_equal(v[here,order[there]] + v[there,order[here]], best)
        assert (which == its).mean() > (0 if ties else .99)
        order[[0, -1]] = order[[-1, 0]]
        holes = every*m + 1
        assert np.array_equal(ours.exchange(order, holes), twin.exchange(order, holes))
        order[[0, -1]] = order[[-1, 0]]

@pytest.mark.parametrize('n,m', [(2,4), (1,4)])
def test_a_search_by_cuda_map_ends_where_its_twin_does(device, n, m):
    x = torch.rand(24, 30)
    kept = []
    for e in (CudaMap(x, n, m, device), CudaMap(x, n, m, device), TorchMap(x, n, m)):
        search = _Search(e, 24, 0, float('inf'))
        search.improve(8)
        kept.append((search.kept.sum(), search.order.tolist()))
        assert sorted(search.order) == list(range(24))
        assert search.kept.sum() == pytest.approx(x[search.order].view(-1, m, 30).topk(n, 1).values.sum().item(),
                                                  rel=1e-5)
    assert kept[0] == kept[1] and kept[0][0] == pytest.approx(kept[2][0], rel=.01)

@needs_nvrtc
def test_calls_of_the_driver(cpu_kernels, monkeypatch):
    stream = types.SimpleNamespace(cuda_stream=0x123456789abc)
    for name,o in (('_driver', lambda: cpu_kernels), ('_loaded', permutation_cuda._loaded.__wrapped__),
                   ('_kernel', permutation_cuda._kernel.__wrapped__)):
        monkeypatch.setattr(permutation_cuda, name, o)
    for name,o in (('device', lambda index: nullcontext()), ('current_stream', lambda: stream),
                   ('get_device_capability', lambda index: (9, 0))):
        monkeypatch.setattr(torch.cuda, name, o)
    monkeypatch.setattr(torch.Tensor, 'device', property(lambda t: types.SimpleNamespace(index=0)), raising=False)
    h, x, parts = torch.rand(20, 50), torch.rand(9, 50), torch.empty(2, 20, 9)
    _launch('distances_8x64', (1, 3, 2), 128, h, x, parts, 20, 9, 50, 32)
    assert torch.allclose(parts.sum(0), (h[:,None]-x).abs().sum(-1), rtol=1e-5)
    with pytest.raises(RuntimeError, match=r'cuModuleGetFunction: the stand-in is not content \(500\)'):
        _launch('nothing', (1,), 32, h)
    stream.cuda_stream = 0
    with pytest.raises(RuntimeError, match=r'cuLaunchKernel: .*\(1\)'):
        _launch('distances_8x64', (1, 3, 2), 128, h, x, parts, 20, 9, 50, 32)

@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device')
def test_current_stream_and_other_threads():
    from concurrent.futures import ThreadPoolExecutor
    h = torch.rand(500, 700, device='cuda')
    wanted = sum_max_torch(h, h)
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
        out = sum_max_cuda(h*1, h)
        torch.cuda.current_stream().synchronize()
    assert torch.allclose(out, wanted, rtol=1e-5)
    with ThreadPoolExecutor(1) as pool:
        assert torch.allclose(pool.submit(sum_max_cuda, h, h).result(), wanted, rtol=1e-5)

@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device')
@pytest.mark.parametrize('a,b,k', [(8, 2048, 2048), (2048, 2048, 512), (400, 1000, 40_000)])
def test_sum_max_of_large_matrices(a, b, k):
    h, x = torch.rand(a, k, device='cuda'), torch.rand(b, k, device='cuda')
    some = torch.randint(min(a, b), (8,))
    assert torch.allclose(sum_max_cuda(h, x)[some][:,some].double(),
                          torch.maximum(h[some,None].double(), x[some].double()).sum(-1), rtol=1e-6)

# --- ASP's four functions

def kept(x): return np.sort(np.abs(np.asarray(x, np.float64)).reshape(len(x), -1, 4), -1)[...,2:].sum()

def columns_of(stripes): return np.concatenate([np.arange(4*s, 4*s+4) for s in stripes])

class Fake(types.ModuleType):
    """A stand-in for Apex's compiled module.

    It checks types and sizes of its arguments as strictly as the compiled code, and computes with numpy."""
    def __init__(self):
        super().__init__('permutation_search_cuda')
        self.calls, self.twin, self.uploaded = [], permutation_cuda._NumpyKernels(), None

    def __getattr__(self, name):
        if name not in ('sum_after_2_to_4', 'build_permute_map', 'check_permutations', 'build_swap_map'):
            raise AttributeError(name)
        def call(*args):
            kinds = [a.dtype.name if isinstance(a, np.ndarray) else 'int' for a in args]
            assert kinds == {'sum_after_2_to_4': ['float32'] + ['int']*6 + ['float32'],
                             'build_permute_map': 'float32 int int uint32 int int uint32 int float32 uint32'.split(),
                             'check_permutations': 'float32 int int uint32 int int uint32 int float32 uint32'.split(),
                             'build_swap_map': 'float32 int int uint32 float32'.split()}[name]
            assert all(a.flags.c_contiguous and a.flags.aligned for a in args if isinstance(a, np.ndarray))
            self.calls.append((name, args))
            mat, rows, cols, *rest = args
            assert mat.size == rows*cols and cols%4 == 0
            getattr(self, f'_{name}')(mat, rows, cols, *rest)
        return call

    def _sum_after_2_to_4(self, mat, rows, cols, start, end, blocks, threads, out):
        each = (end-start)//4//blocks   # stripes that the blocks don't share evenly are left out
        self.twin.sum_after_2_to_4(mat, rows, cols, start, start+4*each*blocks, blocks, threads, out)
    def _build_permute_map(self, mat, rows, cols, stripes, num_groups, group_width, perms, perm_len, improvements,
                           best_idx):
        assert stripes.size == num_groups*group_width and perm_len == 4*group_width and perms.size%perm_len == 0
        assert improvements.size == best_idx.size == num_groups
        self.twin.build_permute_map(mat, rows, cols, stripes, num_groups, group_width, perms, perm_len, improvements,
                                    best_idx)
    def _check_permutations(self, mat, rows, cols, groups, width, num_groups, perms, num_perms, improvement, perm):
        assert groups.size == width*num_groups and perms.size == num_perms*4*width
        sizes = rows, cols, width, num_groups, num_perms
        if self.uploaded is None or self.uploaded[0] != sizes: self.uploaded = sizes, groups.copy(), perms.copy()
        self.twin.check_permutations(mat, rows, cols, self.uploaded[1], width, num_groups, self.uploaded[2], num_perms,
                                     improvement, perm)
    def _build_swap_map(self, mat, rows, cols, pairs, out):
        assert out.size == 16*(pairs.size//2)
        self.twin.build_swap_map(mat, rows, cols, pairs, out)

@pytest.fixture
def apex(monkeypatch):
    fake = Fake()
    monkeypatch.setitem(sys.modules, 'permutation_search_cuda', fake)
    monkeypatch.setattr(permutation_cuda, '_no_device', lambda: '')
    return fake

@pytest.fixture(params=['numpy', 'apex', 'cuda'])
def kernels(request):
    "`ASPKernels` with each implementation"
    if request.param == 'apex': request.getfixturevalue('apex')
    if request.param != 'cuda': return ASPKernels(request.param)
    res = ASPKernels()
    res.by = _CudaKernels(request.getfixturevalue('device_'))
    return res

@pytest.fixture
def device_(request, monkeypatch):
    if torch.cuda.is_available(): return 'cuda'
    lib = request.getfixturevalue('cpu_kernels')
    def launch(name, grid, block, *args):
        getattr(lib, f'run_{name}')(*(*grid, 1, 1)[:3], block, 0, _arguments(args)[1])
    monkeypatch.setattr(permutation_cuda, '_launch', launch)
    return 'cpu'

@pytest.mark.parametrize('rows,cols', [(1,4), (7,12), (130,20), (64,40)])
def test_sum_after_2_to_4(kernels, rows, cols):
    mat, out = np.random.RandomState(0).randn(rows, cols).astype(np.float32), np.zeros(1, np.float32)
    for blocks,threads in ((1,1), (2,33), (3,128), (9,256), (1,1024)):
        for start,end in ((0, cols), (cols-4, cols), (0, 4), (4*(cols//8), cols)):
            kernels.sum_after_2_to_4(mat.ravel(), rows, cols, start, end, blocks, threads, out)
            assert out[0] == pytest.approx(kept(mat[:,start:end]), rel=1e-5)

@pytest.mark.parametrize('size,rows', [(8,1), (8,65), (12,9)])
def test_build_permute_map(kernels, size, rows):
    mat, perms = np.random.RandomState(size).randn(rows, 20).astype(np.float32), _deals(size)
    groups = np.array(list(combinations(range(5), size//4))[::-1], np.uint32)
    gains, best = np.zeros(len(groups), np.float32), np.zeros(len(groups), np.uint32)
    kernels.build_permute_map(mat, rows, 20, groups, len(groups), size//4, perms, size, gains, best)
    for group,gain,b in zip(groups, gains, best):
        x = mat[:,columns_of(group)]
        all_ = np.array([kept(x[:,p]) for p in perms[::1 if size == 8 else 11]])
        assert gain == pytest.approx(kept(x[:,perms[b]])-kept(x), abs=1e-4) and gain >= (all_-all_[0]).max()-1e-4

def test_check_permutations(kernels):
    mat = np.random.RandomState(2).rand(9, 24).astype(np.float32)
    gain, best = np.zeros(1, np.float32), np.zeros(1, np.uint32)
    for seed in range(3):   # other permutations and stripes of the same sizes
        r = np.random.RandomState(seed)
        perms = np.array([np.arange(16)] + [r.permutation(16) for _ in range(40)], np.uint32)
        group = r.permutation(6)[:4].astype(np.uint32)
        kernels.check_permutations(mat, 9, 24, group, 4, 1, perms, len(perms), gain, best)
        all_ = np.array([kept(mat[:,columns_of(group)][:,p]) for p in perms])
        assert best[0] == all_.argmax() and gain[0] == pytest.approx(all_.max()-all_[0], abs=1e-4)
    kernels.check_permutations(mat, 9, 24, group, 4, 1, perms[1], 1, gain, best)
    assert (gain[0], best[0]) == (0, 0)

def test_build_swap_map(kernels):
    mat = np.random.RandomState(3).randn(33, 16).astype(np.float32)
    pairs = np.array([(0,1), (3,1), (2,3)], np.uint32)
    out = np.zeros(48, np.float32)
    kernels.build_swap_map(mat, 33, 16, pairs.ravel(), out)
    for p,(s,t) in enumerate(pairs):
        for i in range(4):
            for j in range(4):
                x = mat.copy()
                x[:,[4*s+i, 4*t+j]] = mat[:,[4*t+j, 4*s+i]]
                assert out[16*p + 4*i + j] == pytest.approx(kept(x)-kept(mat), abs=1e-4)

def test_equal_permutations_give_the_first(kernels):
    gains, best = np.ones(1, np.float32), np.ones(1, np.uint32)
    kernels.build_permute_map(np.ones((3, 8), np.float32), 3, 8, np.array([0, 1], np.uint32), 1, 2, _deals(8), 8, gains,
                              best)
    assert (gains[0], best[0]) == (0, 0)

def test_permutations():
    for size,n in ((8, 35), (12, 5775)):
        deals = _deals(size)
        assert deals.shape == (n, size) and deals.dtype == np.uint32 and deals[0].tolist() == list(range(size))
        assert len({frozenset(map(frozenset, d.reshape(-1, 4).tolist())) for d in deals}) == n
        assert (np.sort(deals, 1) == np.arange(size)).all()
    assert len(np.unique(_swap_deals(), axis=0)) == 17

M, Z = np.ones((3, 8), np.float32), np.zeros(1, np.float32)
U = lambda *a: np.array(a, np.uint32)

@pytest.mark.parametrize('call,what', [
    (lambda k: k.sum_after_2_to_4(M.astype(float), 3, 8, 0, 8, 1, 1, Z), 'mat .*float64'),
    (lambda k: k.sum_after_2_to_4(np.ones((8, 3), np.float32).T, 3, 8, 0, 8, 1, 1, Z), 'strides'),
    (lambda k: k.sum_after_2_to_4(M, 3, 4, 0, 4, 1, 1, Z), '12'),
    (lambda k: k.sum_after_2_to_4(M, 4, 6, 0, 4, 1, 1, Z), 'not 6'),
    (lambda k: k.sum_after_2_to_4(torch.ones(3, 8), 3, 8, 0, 8, 1, 1, Z), 'Tensor'),
    (lambda k: k.sum_after_2_to_4(M, 3, 8, 2, 8, 1, 1, Z), '2 and 8'),
    (lambda k: k.sum_after_2_to_4(M, 3, 8, 0, 12, 1, 1, Z), '0 and 12'),
    (lambda k: k.sum_after_2_to_4(M, 3, 8, 0, 8, 0, 1, Z), 'not 0'),
    (lambda k: k.sum_after_2_to_4(M, 3, 8, 0, 8, 1, 2000, Z), '2000'),
    (lambda k: k.sum_after_2_to_4(M, 3, 8, 0, 8, 1, 1, np.zeros(2, np.float32)), 'out .* 1 float32'),
    (lambda k: k.build_swap_map(M, 3, 8, U(0, 2), np.zeros(16, np.float32)), 'below 2'),
    (lambda k: k.build_swap_map(M, 3, 8, U(0, 1), Z), '16'),
    (lambda k: k.build_swap_map(M, 3, 8, np.array([0, 1]), np.zeros(16, np.float32)), 'uint32'),
    (lambda k: k.build_permute_map(M, 3, 8, U(0, 1), 1, 2, U(*range(8)), 4, Z, U(0)), 'perm_len'),
    (lambda k: k.build_permute_map(M, 3, 8, U(0, 1), 1, 2, U(*range(1, 9)), 8, Z, U(0)), 'below 8'),
    (lambda k: k.build_permute_map(M, 3, 8, U(0, 1), 1, 2, U(*range(7)), 8, Z, U(0)), '8 uint32'),
    (lambda k: k.check_permutations(M, 3, 8, U(0), 1, 1, U(0, 1, 2, 3), 2, Z, U(0)), '8 uint32'),
    (lambda k: k.check_permutations(M, 3, 8, U(0), 1, 1, U(), 0, Z, U(0)), 'and 0')])
def test_what_the_functions_refuse(call, what):
    with pytest.raises(ValueError, match=what): call(ASPKernels())

def test_apex_takes_four_stripes_at_most(apex):
    wide = np.ones((3, 20), np.float32)
    with pytest.raises(ValueError, match='not 5'):
        ASPKernels('apex').check_permutations(wide, 3, 20, U(*range(5)), 5, 1, U(*range(20)), 1, Z.copy(), U(0))
    assert not apex.calls

def test_what_is_there(monkeypatch):
    assert list(asp_kernels()) == ['numpy', 'cuda', 'apex'] and asp_kernels()['numpy'] == ''
    monkeypatch.setitem(sys.modules, 'permutation_search_cuda', None)   # makes its import fail
    assert "can't be imported" in asp_kernels()['apex']
    with pytest.raises(RuntimeError, match="can't be imported"): ASPKernels('apex')
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    assert asp_kernels()['cuda'] in ('no CUDA device', 'torch is built without CUDA')
    with pytest.raises(RuntimeError, match='CUDA'): ASPKernels('cuda')
    monkeypatch.setitem(sys.modules, 'permutation_search_cuda', Fake())
    assert 'CUDA' in asp_kernels()['apex']   # it would end the process
    with pytest.raises(ValueError, match="'torch'"): ASPKernels('torch')

# --- ASP's search

@pytest.mark.parametrize('kwargs,published', [(dict(strategy='channel_swap'), 2913.352), (dict(), 2919.757)])
def test_published_figures(kwargs, published):
    p = asp_search(np.random.RandomState(1).rand(128, 64), escape_attempts=0, **kwargs)
    assert p.kept == pytest.approx(published, abs=.02)

@pytest.mark.parametrize('kwargs', [dict(), dict(strategy='channel_swap'), dict(stripe_group_size=12)])
@pytest.mark.parametrize('rows,columns', [(20,16), (7,22), (1,40), (33,8), (4,4), (5,3), (6,1)])
def test_search_gives_valid_permutations(kwargs, rows, columns):
    s, c = np.random.RandomState(rows).rand(rows, columns), columns//4*4
    p, q = (asp_search(s, escape_attempts=3, seed=5, **kwargs) for _ in range(2))
    assert p.order.equal(q.order) and p.order.sort().values.tolist() == list(range(columns))
    assert p.order[c:].tolist() == list(range(c, columns))
    assert p.naive == pytest.approx(kept(s[:,:c]), rel=1e-5)
    assert p.kept == pytest.approx(kept(s[:,p.order[:c].numpy()]), rel=1e-5)
    assert p.naive*(1-1e-6) <= p.kept <= p.row_bound*(1+1e-6) <= p.unstructured*(1+2e-6) and p.backend == 'numpy'

@pytest.mark.parametrize('strategy,which', [('exhaustive', 2), ('channel_swap', 3)])
def test_more_escapes_are_no_worse(strategy, which):
    s = np.random.RandomState(which).rand(12, 40)
    found = [asp_search(s, strategy, escape_attempts=n).kept for n in (0, 10, 60)]
    assert found == sorted(found) and found[2] > found[0] > asp_search(s, strategy, escape_attempts=0).naive

def test_sixteen_columns_by_all_their_deals():
    s = np.random.RandomState(0).rand(12, 8)
    assert asp_search(s, escape_attempts=0).kept == pytest.approx(max(kept(s[:,d]) for d in _deals(8)), rel=1e-6)

def test_wide_matrices_are_halved(monkeypatch):
    "Above 512 columns groups of 12 are searched in each half, then groups of 8 in the whole"
    called, rng = [], np.random.default_rng(0)
    def search(x, strategy, kernels, escapes, rng):
        called.append((x.copy(), strategy.deals.shape[1], escapes, rng.permutation(x.shape[1])))
        return called[-1][-1]
    monkeypatch.setattr(permutation_cuda, '_asp_order', search)
    x = np.random.RandomState(0).rand(2, 524).astype(np.float32)
    order = permutation_cuda._exhaustive_order(x, None, 12, 7, rng)
    assert [(y.shape[1], size, escapes) for y,size,escapes,_ in called] == [(260, 12, 7), (264, 12, 7), (524, 8, 1000)]
    (a, *_, p), (b, *_, q), (whole, *_, r) = called
    assert np.array_equal(np.hstack([a, b]), x) and np.array_equal(whole, np.hstack([a[:,p], b[:,q]]))
    assert np.array_equal(whole[:,r], x[:,order])

@pytest.mark.parametrize('strategy', ['exhaustive', 'channel_swap'])
def test_search_by_each_implementation(kernels, strategy, monkeypatch):
    s = np.random.RandomState(4).rand(20, 24)
    by_numpy = asp_search(s, strategy, escape_attempts=2)
    monkeypatch.setattr(permutation_cuda, 'ASPKernels', lambda name: kernels)
    p = asp_search(s, strategy, escape_attempts=2)
    assert p.kept == pytest.approx(by_numpy.kept, rel=1e-3) and p.order.sort().values.tolist() == list(range(24))

def test_search_by_apex(apex):
    s = np.random.RandomState(4).rand(20, 24)
    p = asp_search(s, kernels='apex', escape_attempts=2)
    assert p.backend == 'apex' and p.order.equal(asp_search(s, escape_attempts=2).order)
    assert {name for name,_ in apex.calls} == {'build_permute_map', 'sum_after_2_to_4'}

def test_no_global_state_is_touched():
    np.random.seed(3), torch.manual_seed(3)
    before = (np.random.get_state()[1].tolist(), torch.get_rng_state())
    s = torch.rand(8, 16, generator=torch.Generator())
    copy = s.clone()
    asp_search(s, escape_attempts=3)
    assert np.random.get_state()[1].tolist() == before[0] and torch.equal(torch.get_rng_state(), before[1])
    assert s.equal(copy)

@pytest.mark.parametrize('kwargs,what',
                         [(dict(strategy='swap'), "'swap'"), (dict(stripe_group_size=16), '16'),
                          (dict(escape_attempts=-1), '-1'), (dict(escape_attempts=True), 'True'),
                          (dict(kernels='gpu'), "'gpu'"),
                                         (dict(scores=torch.rand(8)), r'\(8,\)'),
                                         (dict(scores=-torch.rand(2, 8)), 'negative')])
def test_what_the_search_refuses(kwargs, what):
    with pytest.raises(ValueError, match=what): asp_search(**{'scores': torch.rand(4, 8), **kwargs})

@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device')
def test_scores_on_a_device_are_searched_there():
    s = torch.rand(64, 128)
    p, q, r = search_permutation(s.cuda()), search_permutation(s.cuda()), search_permutation(s)
    assert p.backend == 'cuda' and p.order.equal(q.order) and abs(p.efficacy-r.efficacy) < 3
    assert search_permutation(s, backend='cuda').order.equal(p.order)
    assert search_permutation(s.cuda(), backend='torch').backend == 'torch'

@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device')
def test_asp_search_on_a_device():
    s = torch.rand(64, 64, device='cuda')
    p = asp_search(s, escape_attempts=5)
    assert p.backend == 'cuda' and p.kept == pytest.approx(asp_search(s.cpu(), escape_attempts=5).kept, rel=1e-2)
