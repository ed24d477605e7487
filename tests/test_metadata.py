"The installed package's metadata is that of settings.ini; the README's figures were measured"
import configparser, importlib.metadata
from pathlib import Path

import fasterai_sparse

ROOT = Path(__file__).parent.parent

def settings():
    ini = configparser.ConfigParser(delimiters=['='])
    ini.read(ROOT/'settings.ini', encoding='utf-8')
    return ini['DEFAULT']

META = importlib.metadata.metadata('fasterai_sparse')

def test_version(): assert fasterai_sparse.__version__ == importlib.metadata.version('fasterai_sparse')

def test_metadata_is_that_of_settings():
    s = settings()
    assert META['Name'].replace('-', '_') == s['lib_name'] == 'fasterai_sparse'
    assert META['Summary'] == s['description']
    assert META['Requires-Python'] == f">={s['min_python']}"
    assert (META['License-Expression'] or META['License']) == s['license']
    assert set(META['Keywords'].replace(',', ' ').split()) == set(s['keywords'].split())

def requirements():
    "Extra, or None -> its requirements"
    res = {}
    for r in importlib.metadata.requires('fasterai_sparse'):
        req, _, extra = r.partition(';')
        res.setdefault(extra.split('==')[1].strip(' "\'') if extra else None, set()).add(req.replace(' ', ''))
    return res

def normal(r): return {o.replace('>=', ' >= ').replace('==', ' == ').replace(' ', '') for o in r.split()}

def test_requirements_are_those_of_settings():
    s = settings()
    extras = {e: normal(s[f'{e}_requirements']) for e in ('onnx', 'dev', 'docs', 'bench')}
    assert requirements() == {None: normal(s['requirements']), **extras}

def test_requirements_are_ranges_and_the_core_has_no_torchvision():
    core = normal(settings()['requirements'])
    assert not any('==' in r for r in core) and not any(r.startswith('torchvision') for r in core)

def test_constraints_fit_the_ranges():
    from packaging.requirements import Requirement
    lines = (ROOT/'constraints.txt').read_text().splitlines()
    pins = dict(l.split('==') for l in lines if '==' in l and not l.startswith('#'))
    s = settings()
    reqs = [Requirement(r) for k in ('requirements', 'dev_requirements', 'docs_requirements') for r in s[k].split()]
    assert {'torch', 'fastai'} <= pins.keys()
    assert not [str(r) for r in reqs if r.name in pins and not r.specifier.contains(pins[r.name].split(';')[0].strip())]

def test_console_script():
    name, target = settings()['console_scripts'].split('=')
    ep, = [e for e in importlib.metadata.entry_points(group='console_scripts') if e.name == name]
    assert ep.value == target and callable(ep.load())

def test_nbdev_entry_point():
    ep, = [e for e in importlib.metadata.entry_points(group='nbdev') if e.name == 'fasterai_sparse']
    assert 'settings' in ep.load()

def test_the_citation_names_this_version():
    assert f'\nversion: {fasterai_sparse.__version__}\n' in (ROOT/'CITATION.cff').read_text(encoding='utf-8')

def test_urls():
    urls = dict(u.split(', ') for u in META.get_all('Project-URL'))
    assert set(urls) == {'Homepage', 'Documentation', 'Source', 'Issues', 'Changelog'}
    assert all(u.startswith(f"https://{settings()['user']}.") or f"/{settings()['user']}/" in u for u in urls.values())

def table_rows(text):
    "Cells of the rows of markdown tables in `text`"
    return [[c.strip() for c in line.split('|')[1:-1]] for line in text.splitlines() if line.startswith('|')]

def network(cell): return cell.split(',')[0].replace('_', '')

def test_the_readmes_headline_was_measured():
    "Each row of the README's table is a row of benchmarks/engine.md: network, zeros, ratio and milliseconds"
    section = (ROOT/'README.md').read_text(encoding='utf-8').split('## Measured')[1].split('\n## ')[0]
    rows = [row for row in table_rows(section) if len(row) == 6 and '%' in row[1]]
    measured = [row for row in table_rows((ROOT/'benchmarks'/'engine.md').read_text(encoding='utf-8')) if len(row) > 1]
    assert len(rows) > 5
    for name,zeros,ratio,ms,*_ in rows:
        same_network = [m for m in measured if network(m[0]) in name.lower().replace('-', '')]
        assert any(m[1] == zeros.replace(' %', '') and ratio in m and ms in m for m in same_network), (name, zeros)
