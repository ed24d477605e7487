"Whole models: a ResNet, torch's transformer, BERT and GPT-2 built from a configuration"
import io
from copy import deepcopy
from functools import cache

import pytest, torch
from torch import nn

from fasterai_sparse.core.criteria import grad_crit, large_final, movement, random_criteria, wanda
from fasterai_sparse.core.layers import maskable_weights, out_in_axes
from fasterai_sparse.core.masks import apply_masks, get_mask, masked_params
from fasterai_sparse.core.patterns import block
from fasterai_sparse.core.report import sparsity_report
from fasterai_sparse.core.sparsifier import Sparsifier

def resnet18():
    return pytest.importorskip('torchvision').models.resnet18(num_classes=10), torch.randn(2, 3, 64, 64), nn.Conv2d

def encoder():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    return nn.TransformerEncoder(layer, 2), torch.randn(2, 5, 16), None

def bert():
    t = pytest.importorskip('transformers')
    config = t.BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=12)
    return t.BertModel(config), torch.randint(50, (2, 7)), None

def gpt2():
    t = pytest.importorskip('transformers')
    config = t.GPT2Config(vocab_size=48, n_embd=16, n_layer=2, n_head=2, n_positions=12, bos_token_id=0, eos_token_id=0)
    return t.GPT2LMHeadModel(config), torch.randint(48, (2, 7)), None

@cache
def built(make):
    torch.manual_seed(0)
    return make()

models = pytest.mark.parametrize('make', [resnet18, encoder, bert, gpt2])
transformers = pytest.mark.parametrize('make', [encoder, bert, gpt2])
contexts = pytest.mark.parametrize('context', ['local', 'global'])

def fresh(make): return deepcopy(built(make))
def output(model, x):
    with torch.no_grad(): y = model.eval()(x)
    return y if torch.is_tensor(y) else y[0]
def sparse(make, percent, granularity='weight', context='local', criteria=large_final, **kwargs):
    model, x, layer_type = fresh(make)
    s = Sparsifier(model, granularity, context, criteria, layer_type=layer_type, **kwargs)
    s.sparsify_model(percent)
    return model, x, s
def weights(s): return [s.param(n).detach() for n in s.layers]
def zeros(s): return sum(int((w==0).sum()) for w in weights(s))
def size(s): return sum(w.numel() for w in weights(s))

@models
def test_every_matrix_is_found_once(make):
    model, _, layer_type = fresh(make)
    found = [id(m._parameters[p]) for _,m,p in maskable_weights(model, layer_type)]
    dims = (4,) if layer_type is nn.Conv2d else (2,)
    assert sorted(found) == sorted(id(p) for p in model.parameters() if p.dim() in dims)

@contexts
@pytest.mark.parametrize('percent', [50, 90])
@models
def test_counts_are_exact(make, percent, context):
    model, x, s = sparse(make, percent, context=context)
    assert zeros(s) == (percent*size(s)+50)//100 and all(w.any() for w in weights(s))
    assert output(model, x).isfinite().all()

@models
def test_zeros_stay_while_it_trains(make):
    model, x, s = sparse(make, 80)
    opt = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(2):
        model.train()(x)[0].float().square().sum().backward()
        opt.step()
        apply_masks(model)
    assert zeros(s) == (80*size(s)+50)//100

@models
def test_n_of_m_on_each(make):
    model, x, s = sparse(make, 50, nm=True)
    for n,(m,p) in s.layers.items():
        kept = (m._parameters[p].movedim(out_in_axes(m)[1], -1).unflatten(-1, (-1, 4)) != 0).sum(-1)
        assert kept.unique().tolist() == [2], n
    assert list(s.dense) == (['conv1'] if make is resnet18 else []) and output(model, x).isfinite().all()

@models
def test_blocks_on_each(make):
    model, x, s = sparse(make, 50, block(2,1), 'global')
    assert abs(zeros(s)/size(s) - .5) < .001 and output(model, x).isfinite().all()

@contexts
@pytest.mark.parametrize('granularity', ['row', 'column'])
@transformers
def test_rows_and_columns(make, granularity, context):
    model, x, s = sparse(make, 50, granularity, context)
    assert abs(zeros(s)/size(s) - .5) < .05 and output(model, x).isfinite().all()
    for w in weights(s): assert (w.any(0).logical_not().any() or w.any(1).logical_not().any()) or w.all()

@transformers
def test_rows_take_their_bias_along(make):
    model, _, s = sparse(make, 50, 'row')
    for n,(m,p) in s.layers.items():
        if p == 'weight' and getattr(m, 'bias', None) is not None:
            mask, axis = get_mask(m, 'bias'), 1 - out_in_axes(m)[0]
            assert mask is not None and torch.equal(mask, m.weight.detach().any(axis)), n

@contexts
def test_filters_of_a_resnet_silence_their_batchnorm(context):
    model, x, s = sparse(resnet18, 50, 'filter', context)
    blocks = [f'layer{a}.{b}.' for a in (1,2,3,4) for b in (0,1)]
    convs = {'conv1': 'bn1'} | {f'{n}conv{i}': f'{n}bn{i}' for n in blocks for i in (1,2)}
    convs |= {f'layer{a}.0.downsample.0': f'layer{a}.0.downsample.1' for a in (2,3,4)}
    assert len(convs) == 20
    for c,b in convs.items():
        live, bn = model.get_submodule(c).weight.flatten(1).any(1), model.get_submodule(b)
        assert torch.equal(get_mask(bn), live) and torch.equal(get_mask(bn, 'bias'), live) and bool(live.any())
    assert output(model, x).isfinite().all()

@models
def test_a_state_dict_goes_into_a_dense_model(make):
    model, x, s = sparse(make, 90)
    file, dense = io.BytesIO(), fresh(make)[0]
    torch.save(model.state_dict(), file)
    file.seek(0)
    dense.load_state_dict(torch.load(file, weights_only=True), strict=True)
    assert torch.allclose(output(dense, x), output(model, x), atol=1e-6)

@models
def test_undo_on_each(make):
    model, _, s = sparse(make, 90, context='global', undo=True)
    s.sparsify_model(95)
    s.undo(), s.undo()
    assert all(torch.equal(a, b) for a,b in zip(model.parameters(), fresh(make)[0].parameters()))
    assert not list(masked_params(model))

@models
def test_the_report_measures_all(make):
    _, x, s = sparse(make, 75)
    df = s.report(x)
    assert df.zeros.sum() == zeros(s) and df.params.sum() == size(s) and (df.note == '').all()
    assert 0 < df.sparse_flops.sum() < .5*df.flops.sum()
    assert df.packed_bytes.sum() < .3*df.bytes.sum()

def test_flops_of_a_resnet():
    model, x, _ = fresh(resnet18)
    assert sparsity_report(model, torch.randn(1, 3, 224, 224)).flops.sum() == 2*1_814_073_344 - 2*512*990

@transformers
def test_flops_of_a_transformer_leave_no_product_out(make):
    model, x, _ = fresh(make)
    df = sparsity_report(model, x).set_index('layer')
    lookups = [n for n in df.index if 'embeddings' in n or n == 'transformer.wpe']
    assert not df.flops[lookups].any() and df.flops.drop(lookups).all()

def loss(y):
    return y.square().sum() if torch.is_tensor(y) else sum(t.square().sum() for t in y.to_tuple() if torch.is_tensor(t))

@pytest.mark.parametrize('criteria', [wanda, grad_crit, movement, random_criteria])
@pytest.mark.parametrize('make', [resnet18, bert, gpt2])
def test_criteria_on_each(make, criteria):
    model, x, _ = fresh(make)
    kind = {resnet18: nn.Conv2d, bert: nn.Linear,
        gpt2: type(model.transformer.h[0].mlp.c_fc) if make is gpt2 else None}[make]
    s = Sparsifier(model, 'weight', 'global', criteria, layer_type=kind, data=x)
    loss(model(x)).backward()
    s.sparsify_model(60)
    assert zeros(s) == (60*size(s)+50)//100

def test_wanda_where_attention_hides_its_input():
    model, x, _ = fresh(encoder)
    s = Sparsifier(model, 'weight', 'local', wanda, layer_type=nn.Linear, data=x)
    s.sparsify_model(50)
    notes = s.report().set_index('layer').note
    assert all(('attention' in why) == ('out_proj' in n) for n,why in notes.items())
    assert any('out_proj' in n for n in notes.index)

def test_tied_embeddings_of_gpt2_count_once():
    model, _, s = sparse(gpt2, 50)
    assert model.lm_head.weight is model.transformer.wte.weight and 'transformer.wte' in s.layers
    assert 'lm_head' not in s.layers
    s.sparsify_layer('transformer.wte', 75)
    assert int((model.lm_head.weight == 0).sum()) == 48*16*3//4
