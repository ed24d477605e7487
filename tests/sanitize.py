"""Run the tests of the compiled kernels with the address and thread sanitizers; Linux, with g++:
`python tests/sanitize.py [address] [thread]`, both by default"""
import ctypes, os, shutil, subprocess, sys, tempfile
from pathlib import Path

root = Path(__file__).parent.parent
tests = ['tests/engine/test_ops.py', 'tests/engine/test_accelerate.py', 'tests/engine/test_native_failures.py',
         'tests/nm/test_search.py']
builds = {
    'address': ['-fsanitize=address,undefined', '-fno-sanitize-recover=undefined', '-fno-omit-frame-pointer'],
    'thread': ['-fsanitize=thread']}
runtimes = {'address': 'libasan.so', 'thread': 'libtsan.so'}
options = dict(
    ASAN_OPTIONS='detect_leaks=0',   # Python frees little when it ends
    UBSAN_OPTIONS='print_stacktrace=1',
    TSAN_OPTIONS='ignore_noninstrumented_modules=1')   # torch's threads are not ours

# Faults that the sanitizers must report, or they would miss those of the tests too: one call reads beyond an array,
# one writes what another thread reads
call = '''
import numpy as np
from fasterai_sparse.utils.native import native_library
x = np.ones((256, 256), 'float32')
native_library()[0].fs_sum_max(x.ctypes.data, x.ctypes.data, {}, 0, 2)
'''
faults = {
    'address': call.format('np.ones((256, 256), "float32").ctypes.data, 256, 256, 512'),
    'thread': call.format('x.ctypes.data, 256, 256, 256')}

def compiler(*args):
    run = subprocess.run([os.environ.get('CXX', 'g++'), *args], check=True, stdout=subprocess.PIPE, text=True)
    return run.stdout.strip()

def build(tmp, kind):
    "Copy the package to `tmp` and compile its library with the sanitizer `kind`"
    ignored = shutil.ignore_patterns('__pycache__', '_native*')
    for name in ('fasterai_sparse', 'tests'): shutil.copytree(root/name, tmp/name, ignore=ignored)
    shutil.copy(root/'pyproject.toml', tmp)
    package = tmp/'fasterai_sparse'
    sources = [str(p) for p in (package/'csrc').glob('*.cpp')]
    flags = ['-shared', '-fPIC', '-std=c++17', '-pthread', '-O1', '-g', *builds[kind]]
    compiler(*flags, *sources, '-o', str(package/'_native.so'))

def fixed_addresses():
    """Switch random addresses off, as the thread sanitizer knows only some layouts of memory.

    Where the system refuses that, the sanitizer may work all the same."""
    ctypes.CDLL(None).personality(0x40000)

def run(tmp, kind, *args, **kwargs):
    "Run Python in `tmp`, with the sanitizer's runtime and the C++ library it needs loaded before all other libraries"
    preload = ' '.join(compiler(f'-print-file-name={lib}') for lib in (runtimes[kind], 'libstdc++.so'))
    env = {**os.environ, **options, 'PYTHONPATH': str(tmp), 'LD_PRELOAD': preload}
    return subprocess.run([sys.executable, *args], cwd=tmp, env=env, preexec_fn=fixed_addresses, **kwargs)

def check(kind):
    with tempfile.TemporaryDirectory() as d:
        tmp = Path(d)
        build(tmp, kind)
        fault = run(tmp, kind, '-c', faults[kind], capture_output=True, text=True)
        if not fault.returncode or 'Sanitizer' not in fault.stderr:
            sys.exit(f'The {kind} sanitizer does not report a fault that was made for it:\n{fault.stderr}')
        failed = run(tmp, kind, '-m', 'pytest', '--capture=sys', *tests).returncode   # reports go to the terminal
        if failed: sys.exit(failed)

if __name__ == '__main__':
    for kind in sys.argv[1:] or builds: check(kind)
