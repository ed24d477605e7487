"The code of seed 001, unchanged, block after block in one namespace that starts with a single import"
import warnings

import numpy as np, pytest
from PIL import Image
from sklearn.datasets import load_digits

BLOCKS = dict(
mask='''
mask = sparse_mask((10,5), 0.8)
test_eq(10, int(mask.sum()))
''',
params='''
s, m = 0.8, nn.Linear(5,10)
m.register_buffer('weight_mask', sparse_mask_like(m.weight, s))
m.register_buffer('weight_sparsity', tensor(s))
m.register_buffer('bias_mask', sparse_mask_like(m.bias, s))
param_mask_sparsity = sparse_params(m)
test_eq(2, len(param_mask_sparsity))
''',
apply='''
apply_masks(m)
test_eq(10, m.weight.abs().gt(0).sum())
''',
modules='''
def test_model():
    return nn.Sequential(
        nn.Conv2d(3,32,3), nn.ReLU(),
        nn.Conv2d(32,128,3), nn.ReLU(),
        nn.Conv2d(128,512,3), nn.ReLU(), AdaptiveAvgPool(), Flatten(),
        nn.Linear(512, 10))

model = test_model()
s_mods = sparseable_modules(model)
test_eq(4, len(s_mods))
''',
erdos_renyi='''
model = test_model()
s_params = L(sparseable_modules(model)).map(lambda m: m.weight)

sparsities = erdos_renyi_sparsity(s_params, 0.9)
n_nonzeros = sum([(1-s) * p.numel() for p, s in zip(s_params, sparsities)])
test_close(n_nonzeros, 0.1 * sum([p.numel() for p in s_params]), eps=len(s_params))
# test_eq([0., 0., 0., 0.], sparsities) # TODO: calc sparsities by hand and compare
''',
sparsify='''
model = test_model()
s_mods = sparseable_modules(model)
n_params = sum(m.weight.numel() for m in s_mods)
sparsify_model(model, 0.9, sparse_f=uniform_sparsity)
n_nonzeros = sum(m.weight.abs().gt(0).sum() for m in s_mods)
# increase `eps` to account for rounding to nearest whole weight
test_close(n_nonzeros, 0.1 * n_params, eps=len(s_mods))
p = s_mods[0].weight
test_close(p.abs().gt(0).sum(), 0.1 * p.numel(), eps=1)
''',
hooks='''
model = nn.Sequential(nn.Linear(1,50), nn.ReLU(), nn.Linear(50,1))
hooks = sparsify_model(model, 0.9)
model(torch.rand(10,1))
test_eq(10, sum([model[i].weight.abs().gt(0).sum() for i in (0,2)]))
hooks.remove()
for i in (0,2): model[i].weight.data = torch.ones_like(model[i].weight)
model(torch.rand(10,1))
test_eq(100, sum([model[i].weight.abs().gt(0).sum() for i in (0,2)]))
''',
top_k='''
t = torch.linspace(-0.9, 0.9, 20).reshape(4,5)
mask = top_k_mask(t, 5)
test_eq(0, mask[:3].sum())
test_eq(5, mask[3:].sum())
''',
toy='''
from fastai.test_utils import *
model = nn.Sequential(nn.Linear(1,32), nn.ReLU(), nn.Linear(32,32), nn.ReLU(), nn.Linear(32,1))
learn = synth_learner(data=synth_dbunch(bs=100), model=model)
sparse_hooks = sparsify_model(learn.model, 0.8, sparse_f=first_layer_dense_uniform)
cbs = DynamicSparseTrainingCallback(batches_per_update=None, stop_pct=0.5, grow_score_f=gradient_momentum)
learn.fit(10, lr=1e-2, cbs=cbs)
''',
images='''
from fastai.vision.all import *
dls = ImageDataLoaders.from_folder(untar_data(URLs.MNIST_TINY))
learn = cnn_learner(dls, resnet18, metrics=accuracy, pretrained=False)
sparse_hooks = sparsify_model(learn.model, 0.9, erdos_renyi_sparsity)
cbs = DynamicSparseTrainingCallback(batches_per_update=8, stop_pct=0.5, grow_score_f=gradient_momentum)
learn.fit_one_cycle(5, 1e-2, cbs=cbs)
''',
images_checked='''
test_close(1, learn.final_record[-1], eps=0.02) # better than 98% accuracy

for m in sparseable_modules(learn.model):
    for p, mask, s in sparse_params(m):
        n_alive = p.abs().gt(0).sum()
        n_total = p.numel()
        test_close(s, 1 - n_alive / n_total, eps=0.01) # layer sparsity = target sparsity
''')

@pytest.fixture(scope='module')
def digits(tmp_path_factory):
    "A folder of images of handwritten threes and sevens; training images also shifted by a pixel to each side"
    path, (xs, ys) = tmp_path_factory.mktemp('digits'), load_digits(return_X_y=True)
    for digit in (3, 7):
        for i,x in enumerate(xs[ys==digit].reshape(-1,8,8)*15.9):
            part = 'valid' if i%3 == 0 else 'train'
            (path/part/str(digit)).mkdir(parents=True, exist_ok=True)
            for j,(down,right) in enumerate([(0,0)] if part == 'valid' else [(0,0), (1,0), (-1,0), (0,1), (0,-1)]):
                moved = np.roll(np.pad(x, 1), (down,right), (0,1)).astype(np.uint8)
                Image.fromarray(moved).resize((28,28), Image.BILINEAR).save(path/part/str(digit)/f'{i}_{j}.png')
    return path

@pytest.fixture(scope='module')
def notebook():
    "Namespace of the notebook, and the list of blocks that have run in it"
    ns, done = {}, []
    exec('from fastai.vision.all import *\nfrom fastcore.test import *\nfrom fasterai_sparse.all import *', ns)
    return ns, done

def run(notebook, upto):
    "Run the blocks up to the one called `upto` that have not run yet"
    ns, done = notebook
    for name in list(BLOCKS)[:list(BLOCKS).index(upto)+1]:
        if name in done: continue
        if name == 'images': exec('from fastai.vision.all import *', ns); ns['torch'].manual_seed(0)
        exec(BLOCKS[name], ns)
        done.append(name)
    return ns

@pytest.mark.parametrize('name', [n for n in BLOCKS if not n.startswith('images')])
def test_block(notebook, name): run(notebook, name)

def test_what_the_toy_run_leaves(notebook):
    ns = run(notebook, 'toy')
    learn, cb = ns['learn'], ns['cbs']
    dense, *sparse = ns['sparseable_modules'](learn.model)
    assert ns['get_mask'](dense) is None and dense.weight.all()
    assert [int(m.weight.count_nonzero()) for m in sparse] == [205, 6]
    assert learn.recorder.values[-1][1] < learn.recorder.values[0][1]/3
    assert len(cb.log) == 4 and (cb.log.live == 211).all()      # epochs 1 to 4 of 10: at stop_pct it is over

def test_images(notebook, digits, monkeypatch):
    import fastai.vision.all as vision
    ns = notebook[0]
    monkeypatch.setattr(vision, 'untar_data', lambda url: digits)   # only the data differ from the seed
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')   # cnn_learner is deprecated
        run(notebook, 'images_checked')
    assert len(ns['cbs'].log) >= 3 and ns['cbs'].log.live.nunique() == 1
    assert ns['learn'].recorder.metric_names[-2] == 'accuracy'
