"Sphinx configuration; prepare.py writes the sources, _src/*.ipynb"
import sys
from importlib import metadata
from pathlib import Path
from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml

sys.path.insert(0, str(Path(__file__).parent))
project = html_title = 'fasterai_sparse'
version = release = metadata.version(project)
extensions = ['myst_nb']
nb_execution_mode = 'off'
nb_merge_streams = True
nb_render_markdown_format = 'myst'
nb_ipywidgets_js = {}
myst_enable_extensions = ['dollarmath']
myst_heading_anchors = 5
myst_heading_slug_func = 'prepare.slug'
html_theme = 'furo'
html_static_path = ['_static']
html_css_files = ['custom.css']
html_show_sphinx = html_show_copyright = html_copy_source = False
html_math_renderer = 'mathml'

def _math(display):
    "Math as MathML, which browsers draw without a script"
    def _visit(self, node):
        self.body.append(tex2mathml(node.astext()).replace('<math', f'<math display="{display}"', 1))
        raise nodes.SkipNode
    return _visit, None

def setup(app): app.add_html_math_renderer('mathml', _math('inline'), _math('block'))
