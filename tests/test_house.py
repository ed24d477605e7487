"A folder of the package imports only folders above it, in the order of docs/house.py"
from pathlib import Path

import pytest

from house import FOLDERS, House, allowed, definitions
from picture import PLACES

ROOT = Path(__file__).parent.parent
house = House(ROOT)

def test_folders_import_only_folders_above(): assert not house.upward

def test_all_folders_have_a_place_in_the_order():
    assert {m.parts[0] for m in house.modules if len(m.parts) > 1} <= set(FOLDERS)

def test_every_folder_says_what_it_holds():
    for folder in house.folder_imports:
        if folder: assert (ROOT/'fasterai_sparse'/folder/'__init__.py').read_text().startswith('"')

def test_the_order():
    assert allowed('utils') == () and allowed('core') == ('utils',) and allowed('train') == ('utils', 'core')
    assert allowed('engine') == allowed('files') == ('utils', 'core')
    assert set(allowed('')) == set(FOLDERS)

UPWARD = {
    'relative': 'from ..train.updates import x',
    'relative, of a module': 'from ..train import updates',
    'relative, of a folder': 'from .. import train',
    'absolute': 'from fasterai_sparse.train.updates import x',
    'plain import': 'import fasterai_sparse.train.updates as updates',
    'inside a function': 'def f():\n    from ..train.updates import x\n    return x',
    'by name': 'import importlib\ndef f(): return importlib.import_module("fasterai_sparse.train.updates")'}

def package(folder, **modules):
    "A package in `folder` with the folders core and train, and these modules in core"
    for name in ('', 'core', 'train'):
        (folder/'fasterai_sparse'/name).mkdir(exist_ok=True)
        (folder/'fasterai_sparse'/name/'__init__.py').write_text('')
    (folder/'fasterai_sparse'/'train'/'updates.py').write_text('x = 1')
    for name,source in modules.items(): (folder/'fasterai_sparse'/'core'/f'{name}.py').write_text(source)
    return House(folder)

@pytest.mark.parametrize('how', UPWARD)
def test_an_upward_import_is_found(tmp_path, how):
    assert len(package(tmp_path, masks=UPWARD[how]).upward) == 1
    assert package(tmp_path, masks='from .report import y\nimport torch', report='y = 1').upward == []

def test_private_names_that_two_modules_define(tmp_path):
    both = package(tmp_path, masks='def _same(): pass\ndef _one(): pass', report='_same = 1\n_other = 2')
    assert both.repeated_private == {'_same': ['core/masks.py', 'core/report.py']}

def test_definitions_of_a_cell():
    cell = '#| export\ndef _short(x): return x\n\ndef long(x):\n    return _short(x)\n'
    assert [d.name for d in definitions(cell)] == ['long']
    assert len(definitions(cell + '\nclass Other: pass')) == 2
    assert len(definitions(cell + '\ndef _long(x):\n    "Doc"\n    x += 1\n    return x')) == 2
    assert [d.name for d in definitions('#| export\ndef _a(): pass\ndef _b(): pass')] == ['_a']

def test_the_picture_shows_all_folders(): assert set(PLACES) == set(house.titles)
