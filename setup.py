"Metadata from settings.ini; the version from the package"
import configparser, os, re
from glob import glob
from pathlib import Path
from setuptools import Extension, setup

here = Path(__file__).parent
ini = configparser.ConfigParser(delimiters=['='])
ini.read(here/'settings.ini', encoding='utf-8')
cfg = ini['DEFAULT']
git = cfg['git_url']
urls = {'Homepage': git, 'Documentation': cfg['doc_url'], 'Source': git, 'Issues': f'{git}/issues',
        'Changelog': f'{git}/blob/main/CHANGELOG.md'}
version = re.search(r'__version__ = "(.+)"', (here/'fasterai_sparse'/'__init__.py').read_text()).group(1)

# Kernels with a plain C interface, loaded with ctypes; where they can't be compiled the package does without
csrc, gnu = 'fasterai_sparse/csrc', os.name != 'nt'
def sources(*endings): return sorted(p for e in endings for p in glob(f'{csrc}/*.{e}', root_dir=here))
native = Extension(
    'fasterai_sparse._native', sources('cpp'), depends=sources('h', 'inc', 'def'), language='c++', optional=True,
    extra_compile_args=['-O3', '-g0', '-std=c++17', '-pthread', '-fno-math-errno', '-fno-trapping-math',
                        '-ffp-contract=fast'] if gnu else [],
    extra_link_args=['-pthread'] if gnu else [])

setup(version=version, description=cfg['description'], python_requires=f">={cfg['min_python']}",
      keywords=cfg['keywords'].split(), license=cfg['license'], project_urls=urls,
      long_description=(here/'README.md').read_text(encoding='utf-8'), long_description_content_type='text/markdown',
      ext_modules=[native], package_data={'fasterai_sparse': ['csrc/*']},
      install_requires=cfg['requirements'].split(),
      extras_require={o: cfg[f'{o}_requirements'].split() for o in ('onnx', 'dev', 'docs', 'bench')},
      entry_points={'console_scripts': cfg['console_scripts'].split(),
                    'nbdev': [f"{cfg['lib_name']}={cfg['lib_name']}._modidx:d"]})
