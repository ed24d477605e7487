"""Draw the folders and what they import, as measured: `python docs/picture.py` writes docs/_static/folders.svg.

An arrow that follows from others is left out. Colors are readable on light and dark pages."""
from pathlib import Path
from textwrap import wrap
from xml.sax.saxutils import escape

from house import House

root = Path(__file__).parent.parent
PLACES = dict(   # column and row of each folder
    dynamic=(0, 0), nncf=(1, 0), nm=(2, 0), train=(1, 1), engine=(3, 1), files=(4, 1), core=(2, 2), utils=(2, 3))
BOX, GAP = (180, 76), (24, 46)   # width and height
FILL, LINE, TEXT = '#dbe7f5', '#7f8c9b', '#16202c'

def direct(imports):
    "Folder -> those of its imports that no other of its imports has as well"
    return {f: sorted(i for i in found if not any(i in imports.get(other, ()) for other in found))
            for f,found in imports.items()}

def corner(folder):
    "Left and top of a folder's box"
    return [at*(size+gap) + 2 for at,size,gap in zip(PLACES[folder], BOX, GAP)]

def box(folder, title):
    "A box with the folder's name and what it holds"
    x,y = corner(folder)
    lines = [f'<text x="{x+BOX[0]/2:g}" y="{y+50+16*i:g}" font-size="12">{escape(line)}</text>'
             for i,line in enumerate(wrap(title, 27))]
    return [f'<rect x="{x}" y="{y}" width="{BOX[0]}" height="{BOX[1]}" rx="8" fill="{FILL}" stroke="{LINE}"/>',
            f'<text x="{x+BOX[0]/2:g}" y="{y+28}" font-size="17" font-weight="bold">{folder}</text>', *lines]

def arrow(a, b):
    "A curve from the bottom of `a` to the top of `b`"
    (xa,ya), (xb,yb) = corner(a), corner(b)
    x1, y1, x2, y2 = xa+BOX[0]/2, ya+BOX[1], xb+BOX[0]/2, yb-3
    middle = (y1+y2)/2
    return (f'<path d="M{x1:g},{y1:g} C{x1:g},{middle:g} {x2:g},{middle:g} {x2:g},{y2:g}" fill="none" '
            f'stroke="{LINE}" stroke-width="2" marker-end="url(#head)"/>')

def svg(imports, titles):
    "The picture as SVG; `imports` is folder -> folders, `titles` is folder -> what it holds"
    width, height = ((max(p[i] for p in PLACES.values())+1)*(BOX[i]+GAP[i]) - GAP[i] + 4 for i in (0, 1))
    arrows = [arrow(a, b) for a,found in direct(imports).items() for b in found]
    boxes = [line for f in imports for line in box(f, titles[f])]
    return '\n'.join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" role="img" '
        f'font-family="sans-serif" text-anchor="middle" fill="{TEXT}">',
        '<title>The folders of the package and what they import</title>',
        f'<defs><marker id="head" viewBox="0 0 10 10" refX="8" refY="5" markerWidth="6" markerHeight="6" orient="auto">'
        f'<path d="M0,0 L10,5 L0,10 z" fill="{LINE}"/></marker></defs>', *arrows, *boxes, '</svg>', ''])

if __name__ == '__main__':
    house = House(root)
    imports = {f: found for f,found in house.folder_imports.items() if f}
    (root/'docs'/'_static'/'folders.svg').write_text(svg(imports, house.titles), encoding='utf-8')
