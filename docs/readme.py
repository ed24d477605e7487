"Write README.md from nbs/index.ipynb: `python docs/readme.py`"
import json, re
from pathlib import Path

root = Path(__file__).parent.parent

def text_of(output):
    "What an output shows as plain text"
    if output['output_type'] == 'stream': return ''.join(output['text'])
    return ''.join(output.get('data', {}).get('text/plain', '')) + '\n'

def cell_text(cell):
    "A cell as markdown, with links to notebooks made to work from the top folder"
    source = ''.join(cell['source'])
    if cell['cell_type'] == 'markdown': return re.sub(r'\]\((\S+\.ipynb)', r'](nbs/\1', source).replace('](../', '](')
    if source.startswith('#| hide'): return ''
    outputs = ''.join(map(text_of, cell['outputs'])).strip('\n')
    return f'```python\n{source}\n```' + (f'\n\n```text\n{outputs}\n```' if outputs else '')

def readme(notebook):
    "The notebook as markdown"
    cells = json.loads(notebook.read_text(encoding='utf-8'))['cells']
    return '\n\n'.join(t for t in map(cell_text, cells) if t) + '\n'

if __name__ == '__main__': (root/'README.md').write_text(readme(root/'nbs'/'index.ipynb'), encoding='utf-8')
