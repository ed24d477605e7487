"""Numbers of how the code is built, and the rules that hold for it.

`python docs/house.py` prints them for this checkout. `--before FOLDER` puts those of an older checkout beside them,
`--notebooks` lists every notebook, `--check` exits with 1 where a rule is broken."""
import argparse, ast, json, os, re, statistics, subprocess, sys
from collections import defaultdict
from functools import cached_property
from pathlib import Path

PACKAGE = 'fasterai_sparse'
FOLDERS = 'utils', 'core', 'train', 'dynamic', 'nncf', 'nm', 'oneshot', 'engine', 'files', 'speed'
FEW_IMPORTS = dict(engine=('utils', 'core'), files=('utils', 'core'))   # of all the folders above them, only these
MAX_COLUMNS, MAX_NAMES, MAX_COMPLEXITY = 120, 90, 10

def allowed(folder):
    "Folders that `folder` may import: those above it in `FOLDERS`; the top level ('') may import all of them"
    if folder in FEW_IMPORTS: return FEW_IMPORTS[folder]
    return FOLDERS[:FOLDERS.index(folder)] if folder else FOLDERS

# --- modules

def is_patch(node):
    "Is `node` a method that fastcore's `patch` adds to another class?"
    return any('patch' in ast.unparse(d) for d in getattr(node, 'decorator_list', []))

def defined_names(tree):
    "Names of the functions, classes and variables at the top level of a module"
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not is_patch(node): yield node.name
        if isinstance(node, ast.Assign): yield from (t.id for t in node.targets if isinstance(t, ast.Name))

def absolute(node, parts):
    "Full name of what `node` imports from, in a module of the package whose folders are `parts`"
    base = [PACKAGE, *parts][:len(parts)+2-node.level] if node.level else []
    return '.'.join(base + ([node.module] if node.module else []))

def imported_modules(tree, parts):
    "Full names that a module imports, inside functions too; strings like 'fasterai_sparse.core.masks' count"
    for node in ast.walk(tree):
        if isinstance(node, ast.Import): yield from (a.name for a in node.names)
        if isinstance(node, ast.ImportFrom): yield from (f'{absolute(node, parts)}.{a.name}' for a in node.names)
        if isinstance(node, ast.Constant) and re.fullmatch(rf'{PACKAGE}(\.\w+)+', str(node.value)): yield node.value

def function_sources(path):
    "Source of each function and method of a module, decorators not included"
    source = path.read_text(encoding='utf-8')
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef): yield node.name, ast.get_source_segment(source, node)

# --- notebooks

def source_of(cell): return ''.join(cell['source'])

def definitions(source):
    "Functions and classes that an export cell defines, without private helpers of up to three lines beside another one"
    nodes = [n for n in ast.parse(source).body if isinstance(n, (ast.FunctionDef, ast.ClassDef))]
    main = [n for n in nodes if n.name[0] != '_' or n.end_lineno > n.lineno + 2]
    return main or nodes[:1]

def only_imports(source): return all(isinstance(n, (ast.Import, ast.ImportFrom)) for n in ast.parse(source).body)

class Notebook:
    "The cells of a notebook by what they are for"
    def __init__(self, path): self.path, self.cells = path, json.loads(path.read_text(encoding='utf-8'))['cells']

    @cached_property
    def code(self): return [source_of(c) for c in self.cells if c['cell_type'] == 'code']
    @cached_property
    def exported(self): return [s for s in self.code if s.startswith('#| export')]
    @cached_property
    def export_cells(self): return [s for s in self.exported if not only_imports(s)]
    @cached_property
    def test_cells(self): return [s for s in self.code if is_test_or_example(s)]
    @property
    def words(self): return sum(len(source_of(c).split()) for c in self.cells if c['cell_type'] == 'markdown')
    @property
    def export_lines(self):
        return sum(bool(line.strip()) and line[:2] != '#|' for s in self.export_cells for line in s.splitlines())
    @property
    def crowded(self): return [definitions(s)[0].name for s in self.export_cells if len(definitions(s)) > 1]

_file_link = re.compile(r'\]\((?!\w+:)([^)#\s]+\.(?:ipynb|md|py|svg|png|cff|txt))[^)]*\)')

def is_test_or_example(source):
    "Does a code cell show or test something? Hidden cells count where they test"
    if source.startswith(('#| export', '#| default_exp', '#| eval')): return False
    return not source.startswith('#| hide') or 'test_' in source or 'assert' in source

# --- a checkout

class House:
    "A checkout of the project, measured"
    def __init__(self, root): self.root, self.package = Path(root).resolve(), Path(root).resolve()/PACKAGE

    @cached_property
    def modules(self):
        "Path in the package -> path of each generated or written module"
        return {p.relative_to(self.package): p for p in sorted(self.package.rglob('*.py')) if p.name != '_modidx.py'}

    @cached_property
    def trees(self): return {rel: ast.parse(p.read_text(encoding='utf-8')) for rel,p in self.modules.items()}

    @cached_property
    def pages(self):
        "All notebooks"
        return [Notebook(p) for p in sorted((self.root/'nbs').rglob('*.ipynb')) if '.ipynb_checkpoints' not in p.parts]

    @cached_property
    def notebooks(self):
        "Notebooks that write modules: all but the index and the tutorials"
        return [nb for nb in self.pages if nb.exported]

    @cached_property
    def edges(self):
        "Pairs (module, module it imports), both as paths in the package"
        return sorted({(rel, found) for rel,tree in self.trees.items() if rel.name != 'all.py'
                       for name in imported_modules(tree, rel.parts[:-1])
                       for found in self.module_of(name) if found != rel})

    def module_of(self, name):
        "The module of this package that the import of `name` loads, in a list; none for other packages"
        first, *parts = name.split('.')
        if first != PACKAGE: return []
        stems = [Path(*parts[:n]) for n in range(len(parts), 0, -1)]
        return [f for stem in stems for f in (stem.with_suffix('.py'), stem/'__init__.py') if f in self.modules][:1]

    @cached_property
    def folder_imports(self):
        "Folder -> the other folders that it imports"
        found = {folder: set() for folder in FOLDERS if (self.package/folder).is_dir()}
        for a,b in self.edges:
            if folder_of(a) != folder_of(b): found.setdefault(folder_of(a), set()).add(folder_of(b))
        return found

    @cached_property
    def titles(self):
        "Folder -> what it holds, in a few words: the docstring of its `__init__` up to the colon"
        docs = {f: ast.get_docstring(self.trees[Path(f)/'__init__.py']) for f in self.folder_imports if f}
        return {f: doc.partition(': ')[0] for f,doc in docs.items()}

    @cached_property
    def upward(self):
        "Imports of a folder that is not above the one that imports it"
        return [f'{a} imports {b}' for a,b in self.edges
                if folder_of(a) != folder_of(b) and folder_of(b) not in allowed(folder_of(a))]

    @cached_property
    def public(self):
        "Names that the star import binds, and those of them that other packages define"
        code = (f'import warnings; warnings.simplefilter("ignore"); d = {{}}; exec("from {PACKAGE}.all import *", d);'
                f'print(*[n for n in d if n != "__builtins__"])')
        env = {**os.environ, 'PYTHONPATH': str(self.root)}
        names = subprocess.run([sys.executable, '-c', code], cwd=self.root, env=env,
                               capture_output=True, text=True, check=True).stdout.split()
        own = {n for tree in self.trees.values() for n in defined_names(tree)}
        return names, [n for n in names if n not in own]

    @cached_property
    def repeated_private(self):
        "Private name -> the modules that define it, where there are two or more"
        found = defaultdict(set)
        for rel,tree in self.trees.items():
            for name in defined_names(tree):
                if name[0] == '_' and name not in ('__all__', '_all_', '__version__'): found[name].add(str(rel))
        return {n: sorted(rels) for n,rels in sorted(found.items()) if len(rels) > 1}

    @cached_property
    def wide(self):
        "Part of the checkout -> places of lines that are over 120 columns wide"
        docs = [p for pattern in ('docs/*.py', 'docs/*.md', '*.md', '*.py') for p in self.root.glob(pattern)]
        texts = {'modules': self.modules.values(), 'csrc': (self.package/'csrc').glob('*.*'),
                 'tests': (self.root/'tests').rglob('*.py'), 'benchmarks': (self.root/'benchmarks').rglob('*.py'),
                 'docs and top level': docs}
        found = {part: [w for p in paths for w in wide_lines(p.relative_to(self.root), p.read_text(encoding='utf-8'))]
                 for part,paths in texts.items()}
        return {**found, 'notebooks': [w for nb in self.pages for c in nb.cells
                                       for w in wide_lines(nb.path.relative_to(self.root), source_of(c))]}

    @cached_property
    def dead_links(self):
        "Links of notebooks and of the documents at the top to notebooks and documents that are not there"
        texts = [(nb.path, source_of(c)) for nb in self.pages for c in nb.cells if c['cell_type'] == 'markdown']
        documents = [p for pattern in ('*.md', 'docs/*.md', 'llms.txt') for p in self.root.glob(pattern)]
        texts += [(p, p.read_text(encoding='utf-8')) for p in documents]
        return [f'{p.relative_to(self.root)}: {link}' for p,text in texts for link in _file_link.findall(text)
                if not (p.parent/link).exists()]

    @cached_property
    def functions(self):
        "Characters and name of each function, shortest first"
        return sorted((len(s), f'{rel}:{name}') for rel,p in self.modules.items() for name,s in function_sources(p))

    @cached_property
    def complex(self):
        "Functions with more than ten paths through them, as ruff counts"
        command = [sys.executable, '-m', 'ruff', 'check', '--isolated', '--select', 'C901', '--output-format', 'json',
                   '--exit-zero',
                   '--config', f'lint.mccabe.max-complexity={MAX_COMPLEXITY}', str(self.package)]
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return [e['message'] for e in json.loads(found)]

    def total(self, count): return sum(count(nb) for nb in self.notebooks)

    def ratio(self, count, other): return f'{self.total(count)/self.total(other):.2f}'

def folder_of(rel): return rel.parts[0] if len(rel.parts) > 1 else ''

def wide_lines(where, text):
    "Lines that are too wide; the first of `__all__` is left out, as nbdev wraps it at 120 without its `__all__ = `"
    lines = (line for line in text.splitlines() if not line.startswith('__all__ = ['))
    return [f'{where}: {line.strip()[:60]}…' for line in lines if len(line) > MAX_COLUMNS]

# --- what is printed

def definitions_per_cell(house):
    n = [len(definitions(s)) for nb in house.notebooks for s in nb.export_cells]
    return f'{statistics.mean(n):.2f}, {statistics.median(n):g}'

def percentiles(house):
    n = [c for c,_ in house.functions]
    return f'{statistics.median(n):g}, {statistics.quantiles(n, n=10)[-1]:.0f}, {n[-1]:,}'

NUMBERS = {
    'modules, notebooks with exports': lambda h: f'{len(h.modules)-1}, {len(h.notebooks)}',
    'imports between modules': lambda h: len(h.edges),
    'imports between folders': lambda h: sum(map(len, h.folder_imports.values())),
    'imports of a folder that is not above': lambda h: len(h.upward),
    'names of the star import': lambda h: len(h.public[0]),
    'of these from other packages': lambda h: len(h.public[1]),
    **{f'lines over {MAX_COLUMNS} columns, {part}': lambda h, part=part: len(h.wide[part])
       for part in ('modules', 'csrc', 'notebooks', 'tests', 'benchmarks', 'docs and top level')},
    'links to files that are not there': lambda h: len(h.dead_links),
    'definitions per export cell (mean, median)': definitions_per_cell,
    'export cells with more than one definition': lambda h: h.total(lambda nb: len(nb.crowded)),
    'export cells': lambda h: h.total(lambda nb: len(nb.export_cells)),
    'test and example cells': lambda h: h.total(lambda nb: len(nb.test_cells)),
    'export cells per test or example cell':
        lambda h: h.ratio(lambda nb: len(nb.export_cells), lambda nb: len(nb.test_cells)),
    'words of prose per exported line': lambda h: h.ratio(lambda nb: nb.words, lambda nb: nb.export_lines),
    'functions': lambda h: len(h.functions),
    'characters of a function (median, p90, longest)': percentiles,
    f'functions with a complexity over {MAX_COMPLEXITY}': lambda h: len(h.complex),
    'private names defined in two modules': lambda h: len(h.repeated_private),
}

def print_numbers(house, before=None):
    "One line for each number; with `before`, that of the older checkout first"
    houses = ([before] if before else []) + [house]
    if before: print(f'{"":50}{"before":>16}{"now":>16}')
    for label,number in NUMBERS.items(): print(f'{label:50}' + ''.join(f'{number(h):>16}' for h in houses))

def print_folders(house):
    "Each folder with the folders it imports, in the order of `FOLDERS`"
    print('\nfolder     imports')
    for folder,imports in house.folder_imports.items():
        print(f'{folder or "(top)":10} {", ".join(f for f in FOLDERS if f in imports) or "none"}')

def print_notebooks(house):
    "Cells, definitions and prose of each notebook"
    print(f'\n{"notebook":40}{"export cells":>14}{"definitions":>14}{"tests, examples":>18}{"words/line":>12}')
    for nb in house.notebooks:
        n_defs = sum(len(definitions(s)) for s in nb.export_cells)
        print(f'{str(nb.path.relative_to(house.root/"nbs")):40}{len(nb.export_cells):>14}{n_defs:>14}'
              f'{len(nb.test_cells):>18}{nb.words/max(nb.export_lines, 1):>12.1f}')

def broken_rules(house):
    "Rule -> where it is broken, for the rules that always hold"
    n = len(house.public[0])
    return {'A folder imports only folders above it': house.upward,
            f'The star import brings at most {MAX_NAMES} names': [f'{n} names'] if n > MAX_NAMES else [],
            f'Lines have at most {MAX_COLUMNS} columns': [w for wide in house.wide.values() for w in wide],
            'A link leads to a file that is there': house.dead_links,
            'An export cell holds one definition': [f'{nb.path.name}: the cell of {name}' for nb in house.notebooks
                                                    for name in nb.crowded],
            'A private name is defined in one module': [f'{name}: {", ".join(rels)}'
                                                        for name,rels in house.repeated_private.items()]}

def print_broken(house):
    "Whether a rule is broken, after printing where"
    broken = {rule: places for rule,places in broken_rules(house).items() if places}
    for rule,places in broken.items(): print(f'\n{rule}. Broken {len(places)} times:', *places, sep='\n  ')
    return bool(broken)

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--root', type=Path, default=Path(__file__).parent.parent, help='the checkout to measure')
    parser.add_argument('--before', type=Path, help='an older checkout, whose numbers are put beside')
    parser.add_argument('--notebooks', action='store_true', help='list every notebook')
    parser.add_argument('--check', action='store_true', help='exit with 1 where a rule is broken')
    args = parser.parse_args()
    house = House(args.root)
    print_numbers(house, House(args.before) if args.before else None)
    print_folders(house)
    if args.notebooks: print_notebooks(house)
    if args.check: sys.exit(print_broken(house))

if __name__ == '__main__': main()
