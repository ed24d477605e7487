"The examples of seeds 002 and 004, unchanged but on generated images, and the column of the epoch table"
import csv, json
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
from fastai.callback.schedule import SchedCos, sched_lin
from fastai.basics import L, ValueMetric, error_rate, mk_metric, params
from fastai.callback.progress import CSVLogger
from fastai.callback.tracker import EarlyStoppingCallback, SaveModelCallback
from fastai.vision.learner import vision_learner
from torchvision.models import resnet18

from callback_helpers import at, fit, learner, masks, printed, same, snapshot, weights, zeros
from fastai.basics import accuracy, CrossEntropyLossFlat, DataLoader, DataLoaders, nn, partial, set_seed, torch
from fasterai_sparse.core.criteria import large_final
from fasterai_sparse.core.schedules import agp, cos, dsd, iterative, lin, one_cycle, one_shot, Schedule
from fasterai_sparse.train.sparsify_callback import SparsifyCallback

pytestmark = [pytest.mark.usefixtures('in_tmp'),
              pytest.mark.filterwarnings('ignore:numpy.core is deprecated')]   # of fastai's load_model

golden = json.loads((Path(__file__).parent.parent/'golden'/'schedules.json').read_text())

LAYERS = {'0.0': 9408, '0.4.0.conv1': 36864, '0.4.0.conv2': 36864, '0.4.1.conv1': 36864, '0.4.1.conv2': 36864,
          '0.5.0.conv1': 73728, '0.5.0.conv2': 147456, '0.5.0.downsample.0': 8192,
          '0.5.1.conv1': 147456, '0.5.1.conv2': 147456,
          '0.6.0.conv1': 294912, '0.6.0.conv2': 589824, '0.6.0.downsample.0': 32768,
          '0.6.1.conv1': 589824, '0.6.1.conv2': 589824,
          '0.7.0.conv1': 1179648, '0.7.0.conv2': 2359296, '0.7.0.downsample.0': 131072,
          '0.7.1.conv1': 2359296, '0.7.1.conv2': 2359296}

per_layer_sparsity = {
    '0.4.0.conv1': 30, '0.4.0.conv2': 30, '0.4.1.conv1': 30, '0.4.1.conv2': 30,
    '0.5.0.conv1': 50, '0.5.0.conv2': 50, '0.5.1.conv1': 50, '0.5.1.conv2': 50,
    '0.6.0.conv1': 70, '0.6.0.conv2': 70, '0.6.1.conv1': 70, '0.6.1.conv2': 70,
    '0.7.0.conv1': 80, '0.7.0.conv2': 80, '0.7.1.conv1': 80, '0.7.1.conv2': 80}

# arguments, method and length of the fit, and name of the values that the seed prints
EXAMPLES = dict(
    one_cycle=(dict(sparsity=50, schedule=one_cycle), ('fit_one_cycle', 5), 'one_cycle_50_5'),
    per_layer=(dict(sparsity=per_layer_sparsity, schedule=cos), ('fit_one_cycle', 5), 'cos_mean_57_5_5'),
    one_shot=(dict(sparsity=90, schedule=one_shot), ('fit', 10), 'one_shot_90_10'),
    iterative=(dict(sparsity=90, schedule=iterative), ('fit', 10), 'iterative3_90_10'),
    five_steps=(dict(sparsity=90, schedule=partial(iterative, n_steps=5)), ('fit', 10), 'iterative5_90_10'),
    agp=(dict(sparsity=90, schedule=agp), ('fit', 10), 'agp_90_10'))

def pets():
    make = lambda n: list(zip(torch.randn(n, 2, 3, 32, 32), torch.randint(2, (n, 2))))
    return DataLoaders(DataLoader(make(2), bs=None), DataLoader(make(1), bs=None), device='cpu')

@cache
def example(name):
    "Lines that the example prints, its model, and the last row of its table"
    kwargs, (how, n_epoch), _ = EXAMPLES[name]
    set_seed(0)
    learn = vision_learner(pets(), resnet18, metrics=accuracy, pretrained=False, n_out=2,
                           loss_func=CrossEntropyLossFlat())
    learn.unfreeze()
    sp_cb = SparsifyCallback(granularity='weight', context='local', criteria=large_final, **kwargs)
    out = printed(lambda: fit(learn, n_epoch, sp_cb, how=how))
    zeros = {n: int((m.weight == 0).sum()) for n,m in learn.model.named_modules() if isinstance(m, nn.Conv2d)}
    return SimpleNamespace(lines=out.splitlines(), zeros=zeros, row=list(learn.recorder.values[-1]))

def target(name, layer):
    "Sparsity in percent that the example asks of the layer"
    sparsity = EXAMPLES[name][0]['sparsity']
    return sparsity.get(layer, 0) if isinstance(sparsity, dict) else sparsity

def half_up(percent, n): return (percent*n + 50)//100

examples = pytest.mark.parametrize('name', EXAMPLES)

# --- the examples

@examples
def test_layers_have_the_seeds_names_and_exactly_their_share_of_zeros(name):
    assert example(name).zeros == {layer: half_up(target(name, layer), n) for layer,n in LAYERS.items()}

@examples
def test_lines_up_to_the_last_epoch(name):
    kwargs, (_, n_epoch), values = EXAMPLES[name]
    avg = 'avg=' if name == 'per_layer' else ''
    assert len(golden[values]) == n_epoch
    assert example(name).lines[:n_epoch+1] == [f"Pruning of weight until a sparsity of {kwargs['sparsity']}%",
        *[f'Sparsity at the end of epoch {i}: {avg}{v:.2f}%' for i,v in enumerate(golden[values])]]

@examples
def test_the_final_line(name):
    kwargs, (_, n_epoch), _ = EXAMPLES[name]
    final = {n: float(s) for n,s in per_layer_sparsity.items()} if name == 'per_layer' else f"{kwargs['sparsity']}.00%"
    assert example(name).lines[n_epoch+1] == f'Final Sparsity: {final}'

def row(layer, kind, n, z): return f'{layer:<30} {kind:<15} {n:<10,d} {z:<10,d} {100*z/n:>8.2f}%'

@examples
def test_the_report(name):
    rows = [(layer, 'Conv2d', n, half_up(target(name, layer), n)) for layer,n in LAYERS.items()]
    assert example(name).lines[EXAMPLES[name][1][1]+2:] == ['', 'Sparsity Report:', '-'*80,
        'Layer                          Type            Params     Zeros      Sparsity  ', '-'*80,
        *[row(*r) for r in rows], '-'*80, row('Overall', 'all', 11166912, sum(z for *_,z in rows))]

@pytest.mark.parametrize('name,line', [
    ('one_cycle', '0.5.0.conv2                    Conv2d          147,456    73,728        50.00%'),
    ('agp', '0.4.0.conv1                    Conv2d          36,864     33,178        90.00%'),
    ('agp', '0.5.0.downsample.0             Conv2d          8,192      7,373         90.00%'),
    ('one_shot', '0.7.1.conv2                    Conv2d          2,359,296  2,123,366     90.00%'),
    ('per_layer', '0.7.0.downsample.0             Conv2d          131,072    0              0.00%'),
    ('one_cycle', 'Overall                        all             11,166,912 5,583,456     50.00%')])
def test_single_rows_as_they_are_printed(name, line): assert line in example(name).lines

def test_overall_is_weighed_by_parameters():
    assert example('per_layer').lines[-1].split()[-1] == '74.80%'
    assert example('per_layer').row[2] == pytest.approx(57.5, abs=1e-3)   # the column, as the lines, has the plain mean

def test_every_golden_series_has_its_example(): assert {v for *_,v in EXAMPLES.values()} == set(golden) - {'note'}

# --- the seeds' other words for a schedule

class Wide(nn.Module):
    "A network with enough weights to tell two decimals of a percentage apart"
    def __init__(self):
        super().__init__()
        self.inner, self.out = nn.Linear(72, 1000), nn.Linear(1000, 100)
    def forward(self, x): return self.out(self.inner(x.flatten(1)))

def wide(**kwargs):
    set_seed(0)
    return learner(4, model=Wide(), **kwargs)

def linears(sparsity=90, schedule=None, **kwargs):
    return SparsifyCallback(sparsity, 'weight', 'local', large_final, schedule, layer_type=nn.Linear, **kwargs)

def epoch_values(learn, n_epoch, cbs):
    "Percentages printed at the ends of epochs"
    out = printed(lambda: fit(learn, n_epoch, cbs))
    return [float(l.split()[-1].removeprefix('avg=')[:-1]) for l in out.splitlines() if 'end of epoch' in l]

@pytest.mark.parametrize('schedule,values', [
    (one_shot, [0, 0] + [90]*8), (iterative, [0, 0, 0, 30, 30, 60, 60, 90, 90, 90]),
    (partial(iterative, n_steps=5), [0, 0, 0, 18, 36, 54, 54, 72, 90, 90]),
    (agp, [0, 0, 0, 33.32, 57.20, 73.21, 82.92, 87.90, 89.74, 90])], ids=['one_shot', 'iterative', 'five_steps', 'agp'])
def test_three_epochs_without_and_seven_with(schedule, values):
    assert epoch_values(wide(), 10, linears(schedule=schedule, start_epoch=3)) == values

def test_fine_tune_counts_epochs_from_where_the_layers_train():
    learn = wide(splitter=lambda m: [params(m.inner), params(m.out)])
    out = printed(lambda: fit(learn, 4, linears({'inner': 80}, lin, start_epoch=2), how='fine_tune'))
    ends = [l.split('avg=')[1] for l in out.splitlines() if 'end of epoch' in l]
    assert ends == ['0.00%', '0.00%', '40.00%', '80.00%']

def test_end_epoch():
    assert epoch_values(wide(), 8, linears(80, lin, start_epoch=2, end_epoch=6)) == [0, 0, 20, 40, 60, 80, 80, 80]
    assert epoch_values(wide(), 4, linears(80, lin, end_epoch=2)) == [40, 80, 80, 80]

def test_start_sparsity():
    assert epoch_values(wide(), 4, linears(80, lin, start_sparsity=20)) == [35, 50, 65, 80]
    assert epoch_values(wide(), 4, linears(80, lin, start_sparsity=20, start_epoch=1)) == [20, 40, 60, 80]
    assert epoch_values(wide(), 2, linears(80, Schedule(sched_lin, start_val=.5), start_sparsity=0)) == [40, 80]

def own(start, end, pos): return start + pos**2*(end-start)

@pytest.mark.parametrize('f,values', [(lin, [20, 40, 60, 80]), (sched_lin, [20, 40, 60, 80]),
                                      (SchedCos(0, 1), [11.72, 40, 68.28, 80]), (own, [5, 20, 45, 80]),
                                      (lambda pos: pos**2, [5, 20, 45, 80])])
def test_end_sparsity_and_sched_func(f, values):
    assert epoch_values(wide(), 4, linears(None, None, end_sparsity=80, sched_func=f)) == values

def test_all_of_them_together():
    cb = linears(None, None, start_sparsity=10, end_sparsity=90, start_epoch=1, end_epoch=3, sched_func=sched_lin)
    assert epoch_values(wide(), 4, cb) == [10, 50, 90, 90]

def test_end_sparsity_may_be_a_dict():
    assert epoch_values(wide(), 2, linears(None, lin, end_sparsity={'inner': 20, 'out': 60})) == [20, 40]

@pytest.mark.parametrize('kwargs,words', [
    (dict(sparsity=50, end_sparsity=50), 'sparsity.*end_sparsity.*not both'),
    (dict(sparsity=None), 'sparsity.*end_sparsity'),
    (dict(sched_func=lin), 'schedule.*sched_func.*not both'), (dict(schedule=None), 'schedule.*sched_func'),
    (dict(start_sparsity=95), '95'), (dict(sparsity={'out': 50}, start_sparsity=10), 'start_sparsity'),
    (dict(start_sparsity=-1), '-1'), (dict(sparsity=None, end_sparsity=101), '101'),
    (dict(schedule=None, sched_func='lin'), 'lin')])
def test_both_or_none_of_a_pair_are_errors_at_construction(kwargs, words):
    with pytest.raises(ValueError, match=words): linears(**{'schedule': lin, **kwargs})

@pytest.mark.parametrize('kwargs', [dict(start_epoch=4), dict(start_epoch=3, end_epoch=3), dict(start_epoch=-1),
                                    dict(end_epoch=5), dict(end_epoch=0)])
def test_a_window_outside_of_the_fit_is_refused_before_anything_changes(kwargs):
    learn = wide()
    before = snapshot(learn.model)
    with pytest.raises(ValueError, match='start_epoch < end_epoch <= 4'): fit(learn, 4, linears(schedule=lin, **kwargs))
    assert same(before, snapshot(learn.model)) and not masks(learn.model)

def test_both_lines_of_the_seeds_banner_where_weights_are_saved():
    out = printed(lambda: fit(wide(), 4, linears(schedule=one_shot, lth=True))).splitlines()
    assert out[:2] == ['Pruning of weight until a sparsity of 90%', 'Saving Weights at epoch 0']

# --- the table

def record(learn):
    "Name -> value in the last row of the epoch table"
    names, values = list(learn.recorder.metric_names), list(learn.recorder.values[-1])
    assert len(names) == len(values) + 2   # epoch and time
    return dict(zip(names[1:], values))

def measured(m): return 100*zeros(m, nn.Linear)/sum(w.numel() for w in weights(m, nn.Linear))

def test_the_column_is_measured_and_comes_before_the_metrics():
    learn = wide()
    learn.metrics = L(accuracy, error_rate).map(mk_metric)
    values = epoch_values(learn, 4, linears(schedule=agp))
    r = record(learn)
    assert list(r) == ['train_loss', 'valid_loss', 'sparsity', 'accuracy', 'error_rate']
    assert [round(v[2], 2) for v in learn.recorder.values] == values and r['sparsity'] == measured(learn.model) == 90
    loss, acc, err = (float(o) for o in learn.validate())
    assert (r['valid_loss'], r['accuracy'], r['error_rate']) == pytest.approx((loss, acc, err)) and acc == 1-err

def test_no_metrics_at_all():
    learn = wide()
    learn.metrics = L()
    r = record(fit(learn, 2, linears(schedule=lin, verbose=False)))
    assert list(r) == ['train_loss', 'valid_loss', 'sparsity'] and r['sparsity'] == 90   # `plot_loss` reads the second
    assert list(learn.validate()) == [r['valid_loss']]

@pytest.mark.parametrize('train,valid', [(True, True), (True, False)])
def test_metrics_of_training(train, valid):
    def run(cbs):
        learn = wide()
        learn.recorder.train_metrics, learn.recorder.valid_metrics = train, valid
        return record(fit(learn, 1, cbs))
    plain, r = run(None), run(linears(schedule=one_shot, end_epoch=1, start_epoch=.99, verbose=False))
    assert r.pop('sparsity') == 90 and list(plain) == list(r)
    assert [r[n] for n in r if 'train' in n] == pytest.approx([plain[n] for n in r if 'train' in n])
    assert 0 <= r[list(r)[-1]] <= 1

def test_two_callbacks_have_a_column_each():
    learn = wide()
    fit(learn, 2, [linears({'inner': 25}, lin, verbose=False), linears({'out': 75}, lin, verbose=False)])
    r = record(learn)
    loss, acc = (float(o) for o in learn.validate())
    assert sorted(r) == ['accuracy', 'sparsity', 'sparsity_2', 'train_loss', 'valid_loss'] and list(r)[-1] == 'accuracy'
    assert (r['sparsity'], r['sparsity_2'], r['valid_loss'], r['accuracy']) == pytest.approx((25, 75, loss, acc))
    assert learn.recorder.values[-1][-1] == pytest.approx(acc)

def test_a_metric_of_the_same_name_keeps_its_own():
    learn = wide()
    learn.metrics = L(ValueMetric(lambda: .5, 'sparsity'))
    fit(learn, 1, linears(schedule=lin, verbose=False))
    assert {n: v for n,v in record(learn).items() if 'loss' not in n} == {'sparsity_2': 90, 'sparsity': .5}
    assert learn.final_record[-1] == learn.validate()[-1] == .5

def test_the_column_of_a_dict_is_the_mean_of_its_layers():
    learn = fit(wide(), 2, linears({'inner': 20, 'out': 60}, lin, verbose=False))
    assert record(learn)['sparsity'] == 40

def logged(learn, n_epoch, cbs):
    "Rows that the learner logs, without the time"
    rows = []
    learn.logger = rows.append
    with learn.no_bar(): learn.fit(n_epoch, cbs=cbs)
    return [list(r)[:-1] for r in rows]

@pytest.mark.parametrize('event,order', [('before_epoch', 5), ('after_epoch', 66)])
def test_a_validation_within_the_fit_leaves_the_rows_whole(event, order):
    def validate(learn):
        with learn.no_logging(): learn.validate()
    plain = logged(wide(), 3, linears(schedule=lin, verbose=False))
    nested = logged(wide(), 3, [linears(schedule=lin, verbose=False), at(event, validate, order)])
    value = lambda r: r[2:]   # the nested fit resets the smoothed training loss
    assert [r[3] for r in plain] == pytest.approx([30, 60, 90]) and list(map(value, plain)) == list(map(value, nested))

def test_csv_logger():
    learn = wide()
    fit(learn, 2, [CSVLogger('h.csv'), linears(schedule=lin, verbose=False)])
    rows = list(csv.DictReader(Path('h.csv').open()))
    assert list(rows[0]) == ['epoch', 'train_loss', 'valid_loss', 'sparsity', 'accuracy', 'time']
    assert [(r['epoch'], float(r['sparsity'])) for r in rows] == [('0', 45), ('1', 90)]
    assert float(rows[1]['accuracy']) == pytest.approx(float(learn.validate()[-1]))

def test_save_model_callback_by_sparsity():
    learn = wide()
    with pytest.warns(UserWarning, match=r'are 90\.00% sparse where the model was 0\.00%'):
        out = printed(lambda: fit(learn, 4, [linears(schedule=dsd), SaveModelCallback(monitor='sparsity')]))
    assert measured(learn.model) == 90 and 'Final Sparsity: 90.00%\nThis is not the target' in out
    assert [l for l in out.splitlines() if 'Better' in l] == [
        f'Better model found at epoch {i} with sparsity value: {v}.' for i,v in ((0, 45.0), (1, 90.0))]

def test_early_stopping_by_sparsity():
    learn = wide()
    out = printed(lambda: fit(learn, 10, [linears(schedule=iterative), EarlyStoppingCallback(monitor='sparsity')]))
    assert len(learn.recorder.values) == 2
    assert 'Final Sparsity: 0.00%\nThe target was not reached: training ended when 20% of it was done' in out

# --- SaveModelCallback takes an epoch before the end

def best_is(epoch, sparsity, learn):
    "Message of a fit that ends with the weights of `epoch`"
    learn.metrics = L(ValueMetric(lambda: float(learn.epoch == epoch), 'pick'))
    out = printed(lambda: fit(learn, 10, [linears(sparsity, iterative), SaveModelCallback(monitor='pick')]))
    return out.splitlines()

@pytest.mark.parametrize('sparsity,trained,final,overall', [
    (90, '90.00%', '30.00%', 30), ({'inner': 30, 'out': 90}, 'avg=60.00%', "{'inner': 10.0, 'out': 30.0}", 21.63)],
    ids=['number', 'dict'])
def test_a_reload_of_a_less_sparse_epoch_is_said(sparsity, trained, final, overall):
    learn = wide()
    with pytest.warns(UserWarning, match='are .*% sparse where the model was .*%; its masks follow them'):
        lines = best_is(2, sparsity, learn)
    i = lines.index(f'Final Sparsity: {final}')
    assert lines[i-1] == f'Sparsity at the end of epoch 9: {trained}'
    assert f'less sparse than those trained last ({trained})' in lines[i+1] and 'SaveModelCallback' in lines[i+1]
    assert round(measured(fit(learn, 1).model), 2) == overall

def test_a_reload_of_an_epoch_that_is_as_sparse_is_not_worth_a_word():
    lines = best_is(7, 90, wide())
    i = lines.index('Final Sparsity: 90.00%')
    assert lines[i+1:i+3] == ['', 'Sparsity Report:']
