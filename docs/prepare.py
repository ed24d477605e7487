"Notebooks of nbs/ to Sphinx sources in docs/_src: nbdev runs `show_doc`, then directives and Quarto syntax become MyST"
import ast, json, re, shutil
from itertools import groupby
from pathlib import Path
from fastcore.nbio import NbCell, read_nb
from fastcore.utils import L, first
from nbdev.config import get_config, nbpath2html
from nbdev.doclinks import NbdevLookup
from nbdev.serve import proc_nbs
from nbdev.showdoc import showdoc_nm

from house import FOLDERS, House

cfg = get_config()
dest = cfg.config_path/'docs'/'_src'
tags = {'echo: false': 'remove-input', 'output: false': 'remove-output', 'include: false': 'remove-cell',
        'code-fold: true': 'hide-input'}
meta = dict(kernelspec=dict(name='python3', display_name='python3', language='python'),
            language_info=dict(name='python', pygments_lexer='ipython3'))
_fence = re.compile(r'^```.*?^```', re.S|re.M)
_head = re.compile(r'^(#+)\s+(.*)', re.M)
_entry = re.compile(r'^#+ .+?\n\n```python\n(.*?)\n```\n*(.*)', re.S|re.M)
_arg_sep = re.compile(r',\s*(?=\*{0,2}[A-Za-z_]\w*([:=,]|$))(?![^()\[\]{}]*[)\]}])')
_show_doc = re.compile(r'^show_doc\((.+?)[,)]', re.M)
_own = re.compile(r'\[(`[^`]+`)\]\(/([\w/.-]+\.html)#([^)]+)\)')
_docs = re.compile(r'\]\(\.\./((?:\.\./)*)docs/')
_nested = re.compile(r'\[(\[`[^`]+`\])\([^)]*\)\]')

def slug(title):
    "Anchor of the heading `title`, as nbdev has it: `Foo.bar_baz` is `foo.bar_baz`"
    return re.sub(r'[^\w.-]', '', re.sub(r'\s+', '-', title.lower()))

def cells(path): return [{**c, 'source': ''.join(c['source'])} for c in json.loads(path.read_bytes())['cells']]
def markdown(src): return dict(cell_type='markdown', metadata={}, source=src)
def notebook(cs): return dict(cells=cs, metadata=meta, nbformat=4, nbformat_minor=4)

def opening(path):
    "The title cell as written (nbdev makes front matter of it), without its `- key: value` lines"
    srcs = [c['source'] for c in cells(cfg.nbs_path/path) if c['cell_type']=='markdown']
    title = re.sub(r'^- [\w-]+: .*\n?', '', first(s for s in srcs if re.search(r'^# ', s, re.M)), flags=re.M)
    return dict(cell_type='markdown', source=NbdevLookup().linkify(title))

def definitions(path):
    "What the notebook defines, in order: the name, and whether it is a class"
    trees = L(read_nb(cfg.nbs_path/path).cells).map(NbCell.parsed_).filter().concat()
    defs = [t for t in trees if isinstance(t, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))]
    return {nm: isinstance(t, ast.ClassDef) for t in defs for nm in L(showdoc_nm(t))}

def headings(cs):
    "Level and text of all the headings in the markdown of `cs`"
    srcs = [_fence.sub('', c['source']) for c in cs if c['cell_type']=='markdown']
    return [(len(h),t.strip()) for s in srcs for h,t in _head.findall(s)]

def open_sections(cs):
    "The headings that enclose what comes after `cs`"
    res = []
    for l,t in headings(cs): res = [o for o in res if o[0]<l] + [(l,t)]
    return res

def level(nm, cs):
    "Heading level of the API entry `nm` after `cs`: below its class if that is open, else below its section"
    secs = open_sections(cs)
    own = [l for l,t in secs if t==f"`{nm.rpartition('.')[0]}`"]
    return own[0]+1 if own else min(2, max(l for l,t in secs if t[0]!='`'))+1

def arg_line(line):
    "A line of a signature without module names and types inferred from a default; a commented argument on its own line"
    c,sep,comment = line.partition(' # ')
    c = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r'\1', c)
    c = re.sub(r'((?<=[:>[])|(?<=\| ))([A-Za-z_]\w*\.)+(?=[A-Za-z_])', '', c)
    c = re.sub(r':(NoneType|type|function|builtin_function_or_method)=', '=', c)
    return (_arg_sep.sub(',\n    ', c) if sep else c) + sep + comment

def signature(sig, is_class):
    "The signature that `show_doc` prints, on one line where it has no comments and fits"
    sig = '\n'.join(map(arg_line, sig.splitlines()))
    one = re.sub(r'\n *', ' ', sig).replace('( ', '(').replace(' )', ')')
    if ' # ' not in sig and len(one) <= 100: sig = one
    return class_signature(sig) if is_class else sig

def class_signature(sig):
    "`show_doc` prints a class as a function, with `(*args, **kwargs)` or all events where it has no `__init__`"
    sig = re.sub(r'\(\s*\*, after_create=.*\)', '(*args, **kwargs)', sig, flags=re.S)
    return re.sub(r'^def (\w+)(\(\*args, \*\*kwargs\))?', r'class \1', sig).replace(')->None:', '):')

def entry(nm, md, cs, defs):
    "The output of `show_doc(nm)` as markdown: heading, signature, docstring without its italics"
    sig,doc = _entry.search(md).groups()
    doc = re.sub(r'\A\s*\*(.+)\*$', r'\1', doc, flags=re.M)
    return markdown(f"{'#'*level(nm, cs)} `{nm}`\n\n```python\n{signature(sig, defs.get(nm))}\n```\n\n{doc}")

def code(c):
    "Code cell without directives: those that hide something become tags"
    dirs = re.findall(r'^#\|\s*(.*?)\s*$', c['source'], re.M)
    src = re.sub(r'^#\|.*\n?', '', c['source'], flags=re.M)
    md = dict(tags=[tags[d] for d in dirs if d in tags])
    return dict(cell_type='code', metadata=md, source=src, execution_count=None, outputs=c['outputs'])

def convert(c, cs, path, defs):
    "MyST cell for the processed cell `c` after `cs`"
    if c['cell_type']=='raw': c = opening(path)
    if c['cell_type']=='markdown': return markdown(_docs.sub(r'](\1', _nested.sub(r'\1', c['source'])))
    shown = _show_doc.search(c['source'])
    return entry(shown[1], ''.join(c['outputs'][0]['data']['text/markdown']), cs, defs) if shown else code(c)

def in_order(cs, defs):
    "nbdev shows the definitions of one cell last to first: back to the order in which they are defined"
    def _pos(c): return list(defs).index(_show_doc.search(c['source'])[1])
    runs = groupby(cs, lambda c: 'has_sd' in c)
    return [c for added,run in runs for c in (sorted(run, key=_pos) if added else run)]

def page(proc, path):
    "All the cells of the page for the notebook `path`"
    res,defs = [],definitions(path)
    for c in in_order(cells(proc/path), defs):
        if not c['source'].startswith('<!-- WARNING'): res.append(convert(c, res, path, defs))
    return res

def anchors(cs):
    "Anchor of each API entry in `cs`: the later of two equal headings gets a number"
    heads = [t for _,t in headings(cs)]
    slugs = [slug(t) for t in heads]
    return {s: f'{s}-{slugs[:i].count(s)}'.removesuffix('-0') for i,s in enumerate(slugs) if heads[i][0]=='`'}

def relink(s, pages):
    "Send nbdev's links to this package's symbols to their headings, or to their page"
    urls = {str(nbpath2html(p)):p for p in pages}
    ids = {p:anchors(cs) for p,cs in pages.items()}
    def _link(m):
        p = urls.get(m[2])
        return m[1] if p is None else f"[{m[1]}](/{p}{'#'+ids[p][m[3]] if m[3] in ids[p] else ''})"
    return _own.sub(_link, s)

def toctree(caption, paths, opt):
    "Table of contents of `paths`, which the sidebar shows"
    return markdown('\n'.join(['```{toctree}', f':caption: {caption}', opt, '', *map(str, paths), '```']))

def captions(pages):
    "Caption in the sidebar -> pages below it: tutorials, one caption for each folder, then the rest"
    titles = House(cfg.config_path).titles
    in_folder = {f: [p for p in sorted(pages) if p.parent.name == f] for f in ('tutorials', *FOLDERS)}
    rest = [p for p in sorted(pages) if not p.parent.name and p.name != 'index.ipynb']
    return {'Tutorials': in_folder['tutorials'], 'The code': ['architecture', *rest],
            **{f'{f}: {titles[f]}': in_folder[f] for f in FOLDERS if f in titles}}

def index(pages):
    "The landing page: index.ipynb with hidden tables of contents"
    return pages[Path('index.ipynb')] + [toctree(c, ps, ':hidden:') for c,ps in captions(pages).items() if ps]

def copy_documents():
    "The written pages of docs/, whose links to notebooks start at the top of the site"
    for path in (cfg.config_path/'docs').glob('*.md'):
        (dest/path.name).write_text(path.read_text(encoding='utf-8').replace('](../nbs/', ']('), encoding='utf-8')
    shutil.copytree(cfg.config_path/'docs'/'_static', dest/'_static')

def main():
    proc = proc_nbs(n_workers=2, force=True)
    shutil.rmtree(dest, ignore_errors=True)
    shutil.copytree(proc, dest)
    pages = {p.relative_to(proc): page(proc, p.relative_to(proc)) for p in proc.rglob('*.ipynb')}
    for p,cs in {**pages, Path('index.ipynb'): index(pages)}.items():
        (dest/p).write_text(relink(json.dumps(notebook(cs)), pages), encoding='utf-8')
    copy_documents()

if __name__=='__main__': main()
