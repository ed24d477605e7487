"Fail where the notebooks are not clean, or the modules not what the notebooks export; nothing in the checkout is changed"
import shutil, subprocess, sys, tempfile
from filecmp import cmp
from pathlib import Path

root = Path(__file__).parent.parent
kept = ('nbs', 'fasterai_sparse', 'pyproject.toml', 'settings.ini', 'setup.py', 'README.md')

def copy_to(tmp):
    for name in kept:
        if (root/name).is_dir(): shutil.copytree(root/name, tmp/name, ignore=shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints'))
        else: shutil.copy(root/name, tmp/name)

def files(folder): return {f.relative_to(folder) for d in ('nbs', 'fasterai_sparse') for f in (folder/d).rglob('*') if f.suffix in ('.ipynb', '.py') and '.ipynb_checkpoints' not in f.parts}

def main():
    with tempfile.TemporaryDirectory() as d:
        tmp = Path(d)
        copy_to(tmp)
        for command in ('nbdev-clean', 'nbdev-export'): subprocess.run([command], cwd=tmp, check=True)
        both = files(root) | files(tmp)
        off = sorted(str(f) for f in both if not ((root/f).exists() and (tmp/f).exists() and cmp(root/f, tmp/f, shallow=False)))
    if off: sys.exit('Out of sync; run nbdev-clean && nbdev-export:\n' + '\n'.join(off))

if __name__ == '__main__': main()
