"""Fail where a notebook is not clean, or where modules, README or the picture of the folders are not up to date.

The check works on a copy; the checkout is left as it is."""
import shutil, subprocess, sys, tempfile
from filecmp import cmp
from pathlib import Path

root = Path(__file__).parent.parent
kept = 'nbs', 'fasterai_sparse', 'docs', 'pyproject.toml', 'settings.ini', 'setup.py', 'README.md'
not_copied = shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints', '_build', '_src')
commands = ['nbdev-clean'], ['nbdev-export'], [sys.executable, 'docs/readme.py'], [sys.executable, 'docs/picture.py']
written = 'README.md', 'docs/_static/folders.svg'

def copy_to(folder):
    "Copy what the commands read and write"
    for name in kept:
        if (root/name).is_dir(): shutil.copytree(root/name, folder/name, ignore=not_copied)
        else: shutil.copy(root/name, folder/name)

def files(folder):
    "Paths of the notebooks, modules and other generated files"
    found = [f.relative_to(folder) for d in ('nbs', 'fasterai_sparse') for f in (folder/d).rglob('*')]
    code = {f for f in found if f.suffix in ('.ipynb', '.py') and '.ipynb_checkpoints' not in f.parts}
    return code | {Path(name) for name in written}

def same(a, b): return a.exists() and b.exists() and cmp(a, b, shallow=False)

def main():
    with tempfile.TemporaryDirectory() as d:
        copy = Path(d)
        copy_to(copy)
        for command in commands: subprocess.run(command, cwd=copy, check=True)
        different = sorted(str(f) for f in files(root) | files(copy) if not same(root/f, copy/f))
    if different: sys.exit('Out of sync; run make export:\n' + '\n'.join(different))

if __name__ == '__main__': main()
