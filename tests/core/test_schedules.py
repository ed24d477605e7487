"Schedules: the values printed by the seeds, start and end, and wrong arguments"
import json, math, pickle
from functools import partial
from pathlib import Path

import pytest
from fastai.callback.schedule import SchedCos, SchedExp, SchedPoly, combine_scheds

from fasterai_sparse.core.schedules import (
    agp, as_schedule, cos, dsd, iterative, lin, one_cycle, one_shot, plot_schedules, sched_agp, Schedule)

golden = json.loads((Path(__file__).parent.parent/'golden'/'schedules.json').read_text())
printed = {'one_cycle_50_5': (one_cycle, 50), 'cos_mean_57_5_5': (cos, 57.5), 'agp_90_10': (agp, 90),
    'iterative3_90_10': (iterative, 90),
           'iterative5_90_10': (partial(iterative, n_steps=5), 90), 'one_shot_90_10': (one_shot, 90)}
table = dict(one_shot=one_shot, iterative=iterative, agp=agp, one_cycle=one_cycle, cos=cos, lin=lin)

def test_every_golden_series_is_tested(): assert set(printed) == set(golden) - {'note'}

@pytest.mark.parametrize('name', printed)
def test_golden_values(name):
    sched, target = printed[name]
    n = len(golden[name])
    for i,want in enumerate(golden[name]):
        assert target*as_schedule(sched).progress((i+1)/n) == pytest.approx(want, abs=.01)

@pytest.mark.parametrize('sched', table.values(), ids=table)
def test_start_end_and_never_down(sched):
    values = [sched.progress(i/1000) for i in range(1001)]
    assert values[0] == 0 and values[-1] == 1
    assert values == sorted(values)

def test_dsd_is_dense_sparse_dense():
    values = [dsd.progress(i/100) for i in range(101)]
    assert [values[i] for i in (0,50,100)] == pytest.approx([0,1,0])
    assert values[:51] == sorted(values[:51]) and values[50:] == sorted(values[50:], reverse=True)

@pytest.mark.parametrize('pct', [1, 1.0000000000000004])
def test_just_past_the_end_is_the_end(pct):
    for sched in table.values(): assert sched.progress(pct) == 1

def test_iterative_is_not_lifted_by_rounding():
    steps = {round(iterative.progress(.2+.8*k/3 + e), 9) for k in (1,2) for e in (-1e-12, 1e-12)}
    assert steps == {round(1/3, 9), round(2/3, 9)}

@pytest.mark.parametrize('f,at_half', [(SchedCos(0,1), .5), (SchedPoly(0,1,2), .25), (lambda pos: pos**2, .25),
    (lambda start,end,pos: end*pos, .5),
    (combine_scheds([.5,.5], [SchedCos(0,1), SchedCos(1,1)]), 1), (partial(agp), 1-.625**3), (lin, .5)])
def test_functions_and_fastai_schedules_can_be_schedules(f, at_half):
    assert as_schedule(f).progress(.5) == pytest.approx(at_half)

@pytest.mark.parametrize('bad', [None, 'agp', 3, lambda a,b: a, lambda pos: 2*pos, lambda pos: -pos,
    lambda pos: math.nan, SchedExp(.1, 2.)])
def test_other_values_are_refused_as_schedules(bad):
    with pytest.raises(ValueError): as_schedule(bad)

@pytest.mark.parametrize('kw', [dict(start_pct=.5, end_pct=.5), dict(start_pct=-.1), dict(end_pct=1.2),
    dict(start_val=-1), dict(end_val=50)])
def test_bad_windows(kw):
    with pytest.raises(ValueError): Schedule(sched_agp, **kw)

def test_a_window_and_its_values():
    s = Schedule(straight, .25, .75, .2, .6)
    assert [s.progress(p) for p in (0, .2, .5, .75, 1)] == pytest.approx([.2, .2, .4, .6, .6])

def straight(start, end, pos): return start + (end-start)*pos

@pytest.mark.parametrize('sched', [*table.values(), dsd, partial(iterative, n_steps=5)])
def test_pickle(sched):
    again = pickle.loads(pickle.dumps(as_schedule(sched)))
    assert [again.progress(i/10) for i in range(11)] == [as_schedule(sched).progress(i/10) for i in range(11)]

def test_schedules_can_not_be_changed():
    with pytest.raises(AttributeError): agp.start_pct = 0

def test_plots_over_epochs():
    ax = plot_schedules(table, sparsity=90, n_epochs=3)
    assert [l.get_ydata()[-1] for l in ax.lines] == pytest.approx([90]*len(table)) and ax.lines[0].get_xdata()[-1] == 3
    assert agp.plot(50).lines[0].get_ydata()[-1] == 50
