"ONNX export: zeros and patterns in the file, results in onnxruntime, and errors; needs the optional packages"
from copy import deepcopy
from importlib.util import find_spec

import numpy as np, pytest, torch
from torch import nn

import fasterai_sparse.files.onnx as ox
from fasterai_sparse.core.criteria import large_final
from fasterai_sparse.core.masks import masked_params
from fasterai_sparse.core.sparsifier import Sparsifier
from fasterai_sparse.nm.verify import verify_nm
from fasterai_sparse.files.onnx import export_onnx
from test_safetensors import net, sparse_net

class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb, self.a, self.b = nn.Embedding(20,16), nn.Linear(16,32), nn.Linear(32,16,bias=False)
        self.att, self.rnn = nn.MultiheadAttention(16,2,batch_first=True), nn.LSTM(16,8,batch_first=True)
        self.c = nn.Linear(8,16)
        self.out, self.t, self.unused = nn.Linear(16,20), nn.ConvTranspose1d(20,8,3), nn.Linear(16,32)
        self.out.weight = self.emb.weight
    def forward(self, x, scale):
        x = self.b(self.a(self.emb(x)).relu())
        x = self.c(self.rnn(self.att(x, x, x)[0])[0])
        return self.t(self.out(x).transpose(1,2)), x*scale

def mixed_input(): return torch.randint(0, 20, (2,5)), torch.tensor(2.)

def sparse_mixed():
    model = Mixed()
    Sparsifier(model, 'weight', 'local', large_final, nm=True, layer_type=None).sparsify_model(50)
    return model

has_onnx = find_spec('onnx') and find_spec('onnxscript')
onnx = pytest.mark.skipif(not has_onnx, reason='needs onnx and onnxscript')
ort = pytest.mark.skipif(not (has_onnx and find_spec('onnxruntime')), reason='needs onnx, onnxscript and onnxruntime')

def run_onnx(path, *inputs):
    import onnxruntime
    session = onnxruntime.InferenceSession(str(path))
    return session.run(None, {i.name: t.numpy() for i,t in zip(session.get_inputs(), inputs)})

def stubs(monkeypatch, *missing):
    monkeypatch.setattr(ox, 'find_spec', lambda n: None if n in missing else True)

@pytest.mark.parametrize('missing', [('onnx',), ('onnxscript',), ('onnx', 'onnxscript')])
def test_onnx_says_what_to_install(tmp_path, monkeypatch, missing):
    stubs(monkeypatch, *missing)
    with pytest.raises(ImportError, match='pip install ' + ' '.join(missing)):
        export_onnx(net(), tmp_path/'m.onnx', torch.randn(2,2,8,8))
    assert not list(tmp_path.iterdir())

@ort
@pytest.mark.parametrize('kw', [{}, {'dynamo': False}, {'optimize': False}, {'opset': 18}], ids=str)
@pytest.mark.filterwarnings('ignore')
def test_onnx_of_a_convnet(tmp_path, kw):
    model = sparse_net(90)
    model.train()(torch.randn(8,2,9,9))
    x = torch.randn(2,2,9,9)
    masks, was = [id(mask) for *_,mask in masked_params(model)], deepcopy(model.state_dict())
    model[8].eval()
    df = export_onnx(model, tmp_path/'m.onnx', x, **kw)
    assert model.training and model[0].training and not model[8].training
    assert [id(mask) for *_,mask in masked_params(model)] == masks
    assert all(torch.equal(was[k], t) for k,t in model.state_dict().items())
    assert [f.name for f in tmp_path.iterdir()] == ['m.onnx']
    weights = df[df.op != '']
    assert set(weights.op) <= {'Conv', 'Gemm', 'MatMul'}
    assert sorted(weights.zeros) == sorted(int((p == 0).sum()) for *_,p,_ in masked_params(model))
    assert (weights['sparsity_pct'] > 85).all() and (df.pattern[df.op == ''] == '').all()
    ours = verify_nm(model).set_index('shape').pattern
    assert all(r.pattern == ours[r.shape] for r in weights.itertuples()) and {'2:4', 'no'} == set(weights.pattern)
    out = run_onnx(tmp_path/'m.onnx', x)[0]
    assert np.abs(out - model.eval()(x).detach().numpy()).max() < 1e-4*np.abs(out).max()

@ort
@pytest.mark.parametrize('kw', [{}, {'dynamo': False}, {'optimize': False}], ids=str)
@pytest.mark.filterwarnings('ignore')
def test_onnx_of_transposed_and_folded_weights(tmp_path, kw):
    model = sparse_mixed()
    df = export_onnx(model, tmp_path/'m.onnx', mixed_input(), **kw)
    w = df[df.op != ''].set_index('name')
    assert (w.pattern == '2:4').all() and (w.zeros*2 == w['shape'].map(np.prod)).all(), w
    # which puts its gates into order
    assert set(w.op) >= {'MatMul', 'ConvTranspose'} and ('LSTM' in set(w.op)) == ('optimize' not in kw)
    assert len(w) >= 6 and (w[w.op == 'LSTM'].axis == 2).all() and (w[w.op == 'ConvTranspose'].axis == 0).all()
    df = export_onnx(model, tmp_path/'m.onnx', mixed_input(), nm=(1,4), **kw)
    assert (df[df.op != ''].pattern == 'no').all()

@ort
@pytest.mark.filterwarnings('ignore')
def test_onnx_inputs_by_name(tmp_path):
    x, scale = mixed_input()
    export_onnx(sparse_mixed(), tmp_path/'m.onnx', {'scale': scale, 'x': x})
    export_onnx(sparse_mixed(), tmp_path/'m.onnx', {'x': x, 'scale': scale})
    model = sparse_net()
    export_onnx(model, tmp_path/'d.onnx', torch.randn(2,2,9,9), dynamic_shapes=({0: torch.export.Dim('n')},))
    assert run_onnx(tmp_path/'d.onnx', torch.randn(5,2,9,9))[0].shape == (5,4)

@ort
@pytest.mark.filterwarnings('ignore')
def test_onnx_that_computes_something_else_is_refused(tmp_path, monkeypatch):
    real = torch.onnx.export
    def worse(scale, where):
        def export(model, args, f, **kw):
            model = deepcopy(model)
            with torch.no_grad(): where(model).mul_(scale)
            return real(model, args, f, **kw)
        return export
    model, x = sparse_net(), torch.randn(2,2,9,9)
    (tmp_path/'m.onnx').write_bytes(b'old')
    monkeypatch.setattr(torch.onnx, 'export', worse(1.001, lambda m: m[0].weight))
    monkeypatch.setattr(torch.onnx, 'export', worse(1.01, lambda m: m[8].bias))
    with pytest.raises(ValueError, match='output 0 is off by'): export_onnx(model, tmp_path/'m.onnx', x)
    assert (tmp_path/'m.onnx').read_bytes() == b'old' and len(list(tmp_path.iterdir())) == 1
    assert len(list(masked_params(model))) == 4
    def dense(model, args, f, **kw):
        model = deepcopy(model)
        with torch.no_grad(): model[3].weight += 1e-12
        return real(model, args, f, **kw)
    monkeypatch.setattr(torch.onnx, 'export', dense)
    with pytest.raises(ValueError, match="would lose zeros: the weight of '3'"):
        export_onnx(model, tmp_path/'m.onnx', x)
    assert (tmp_path/'m.onnx').read_bytes() == b'old'

@ort
@pytest.mark.filterwarnings('ignore')
def test_onnx_with_weights_beside_it(tmp_path):
    model = sparse_net()
    export_onnx(model, tmp_path/'m.onnx', torch.randn(2,2,9,9), external_data=True)
    assert sorted(f.name for f in tmp_path.iterdir()) == ['m.onnx', 'm.onnx.data']
    assert run_onnx(tmp_path/'m.onnx', torch.randn(2,2,9,9))[0].shape == (2,4)

@ort
def test_onnx_does_not_make_a_noise(tmp_path, capfd, recwarn):
    recwarn.clear()
    export_onnx(sparse_mixed(), tmp_path/'m.onnx', mixed_input())
    export_onnx(sparse_net(), tmp_path/'m.onnx', torch.randn(2,2,9,9))
    assert not recwarn.list and capfd.readouterr() == ('', '')

@ort
@pytest.mark.filterwarnings('ignore')
def test_onnx_wants_the_version_that_was_asked(tmp_path):
    import onnx
    export_onnx(net(), tmp_path/'m.onnx', torch.randn(2,2,9,9), opset=20)
    assert onnx.load(tmp_path/'m.onnx').opset_import[0].version == 20
    old = (tmp_path/'m.onnx').read_bytes()
    with pytest.raises(ValueError, match='opset=17 here: the file would have 18'):
        export_onnx(net(), tmp_path/'m.onnx', torch.randn(2,2,9,9), opset=17)
    assert (tmp_path/'m.onnx').read_bytes() == old

@ort
@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float64], ids=str)
def test_onnx_that_the_runtime_cannot_run(tmp_path, dtype):
    with pytest.raises(ValueError, match="can't run the export"):
        export_onnx(sparse_net().to(dtype), tmp_path/'m.onnx', torch.randn(2,2,9,9).to(dtype))
    assert not list(tmp_path.iterdir())

class Several(nn.Linear):
    def forward(self, unused, x):
        y = super().forward(x)
        return {'z': y.masked_fill(y < 0, float('-inf')), 'a': (y.argmax(1), None), 'b': y > 0}

@ort
@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('kw', [{}, {'dynamo': False}, {'dynamo': False, 'input_names': ['a','b']}], ids=str)
def test_onnx_outputs_of_any_kind(tmp_path, kw):
    export_onnx(Several(8,8), tmp_path/'m.onnx', (torch.randn(3,8), torch.randn(3,8)), **kw)

@onnx
@pytest.mark.filterwarnings('ignore')
def test_onnx_without_the_runtime(tmp_path, monkeypatch):
    stubs(monkeypatch, 'onnxruntime')
    assert len(export_onnx(sparse_net(), tmp_path/'m.onnx', torch.randn(2,2,9,9))) > 4

@ort
@pytest.mark.filterwarnings('ignore')
def test_onnx_wants_a_pattern(tmp_path):
    with pytest.raises(ValueError, match='4:4'): export_onnx(net(), tmp_path/'m.onnx', torch.randn(2,2,9,9), nm=(4,4))
