"Fail where notebooks are not clean, or modules and README not what they export; the checkout is left as it is"
import shutil, subprocess, sys, tempfile
from filecmp import cmp
from pathlib import Path

root = Path(__file__).parent.parent
kept = ('nbs', 'fasterai_sparse', 'docs', 'pyproject.toml', 'settings.ini', 'setup.py', 'README.md')

def copy_to(tmp):
    for name in kept:
        if (root/name).is_dir(): shutil.copytree(root/name, tmp/name, ignore=shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints', '_build', '_src'))
        else: shutil.copy(root/name, tmp/name)

def files(folder):
    found = [f.relative_to(folder) for d in ('nbs', 'fasterai_sparse') for f in (folder/d).rglob('*')]
    return {Path('README.md'), *(f for f in found if f.suffix in ('.ipynb', '.py') and '.ipynb_checkpoints' not in f.parts)}

def main():
    with tempfile.TemporaryDirectory() as d:
        tmp = Path(d)
        copy_to(tmp)
        for command in (['nbdev-clean'], ['nbdev-export'], [sys.executable, 'docs/readme.py']): subprocess.run(command, cwd=tmp, check=True)
        both = files(root) | files(tmp)
        off = sorted(str(f) for f in both if not ((root/f).exists() and (tmp/f).exists() and cmp(root/f, tmp/f, shallow=False)))
    if off: sys.exit('Out of sync; run make export:\n' + '\n'.join(off))

if __name__ == '__main__': main()
