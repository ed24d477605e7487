"Run a worker on two ranks"
import json, os, subprocess, sys
from pathlib import Path

import pytest, torch.distributed as dist

has_gloo = dist.is_available() and dist.is_gloo_available()
needs_gloo = pytest.mark.skipif(not has_gloo, reason='needs torch.distributed with gloo')

def on_two_ranks(worker, args, folder):
    "JSON printed by the first rank of `worker`, a file of this folder, run with `args` in `folder`"
    cmd = [sys.executable, '-W', 'ignore', '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2']
    r = subprocess.run([*cmd, Path(__file__).parent/worker, *args], cwd=folder, capture_output=True, text=True,
                       env={**os.environ, 'OMP_NUM_THREADS': '1'}, timeout=300)
    of_ranks = [l for l in r.stderr.splitlines() if l.startswith('[rank')]
    assert r.returncode == 0, '\n'.join(of_ranks)[-1500:] or r.stderr[:1500]
    return json.loads(r.stdout.splitlines()[-1])
