"Run the tests of the compiled kernels over builds that watch their memory and threads: `python tests/sanitize.py [address] [thread]`, both by default; Linux, with g++"
import ctypes, os, shutil, subprocess, sys, tempfile
from pathlib import Path

root = Path(__file__).parent.parent
tests = ['tests/engine/test_ops.py', 'tests/engine/test_accelerate.py', 'tests/nm/test_search.py']
builds = {'address': ['-fsanitize=address,undefined', '-fno-sanitize-recover=undefined', '-fno-omit-frame-pointer'], 'thread': ['-fsanitize=thread']}
runtimes = {'address': 'libasan.so', 'thread': 'libtsan.so'}
options = dict(ASAN_OPTIONS='detect_leaks=0', UBSAN_OPTIONS='print_stacktrace=1', TSAN_OPTIONS='ignore_noninstrumented_modules=1')   # Python frees little at its end; torch's threads aren't ours

call = "import numpy as np; from fasterai_sparse.utils.native import *; x = np.ones((256,256), 'float32'); native_library()[0].fs_sum_max(x.ctypes.data, x.ctypes.data, {}, 0, 2)"
strays = {'address': call.format('np.ones((256,256), "float32").ctypes.data, 256, 256, 512'), 'thread': call.format('x.ctypes.data, 256, 256, 256')}   # reads beyond; writes what another thread reads

def compiler(*args): return subprocess.run([os.environ.get('CXX', 'g++'), *args], check=True, stdout=subprocess.PIPE, text=True).stdout.strip()

def build(tmp, kind):
    "A copy of the package in `tmp`, with a library that is watched"
    for name in ('fasterai_sparse', 'tests'): shutil.copytree(root/name, tmp/name, ignore=shutil.ignore_patterns('__pycache__', '_native*'))
    shutil.copy(root/'pyproject.toml', tmp)
    compiler('-shared', '-fPIC', '-std=c++17', '-pthread', '-O1', '-g', *builds[kind], *map(str, (tmp/'fasterai_sparse'/'csrc').glob('*.cpp')), '-o', str(tmp/'fasterai_sparse'/'_native.so'))

def fixed_addresses(): ctypes.CDLL(None).personality(0x40000)   # the thread sanitizer knows only some layouts of memory; where it isn't allowed it may do without

def run(tmp, kind, *args, **kwargs):
    "Run Python in `tmp` with the sanitizer's runtime, and the C++ library that it has to find, before all others"
    preload = ' '.join(compiler(f'-print-file-name={lib}') for lib in (runtimes[kind], 'libstdc++.so'))
    return subprocess.run([sys.executable, *args], cwd=tmp, env={**os.environ, **options, 'PYTHONPATH': str(tmp), 'LD_PRELOAD': preload}, preexec_fn=fixed_addresses, **kwargs)

def check(kind):
    with tempfile.TemporaryDirectory() as d:
        tmp = Path(d)
        build(tmp, kind)
        stray = run(tmp, kind, '-c', strays[kind], capture_output=True, text=True)
        if not stray.returncode or 'Sanitizer' not in stray.stderr: sys.exit(f'The {kind} sanitizer does not see what it is there for:\n{stray.stderr}')
        if rc := run(tmp, kind, '-m', 'pytest', '--capture=sys', *tests).returncode: sys.exit(rc)   # what it reports goes to the terminal

if __name__ == '__main__':
    for kind in sys.argv[1:] or builds: check(kind)
