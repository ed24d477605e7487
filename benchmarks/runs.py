"""Shared by the accuracy benchmarks: runs in processes of one thread, appended to a csv as they finish, and cells of
tables"""
import csv, platform, signal, sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import active_children, get_context
from pathlib import Path

import pandas as pd, torch

def results(file, key, measured):
    "The finished runs in the csv `file`, indexed by the columns `key`"
    df = pd.read_csv(file) if file.exists() else pd.DataFrame(columns=[*key, *measured])
    return df.drop_duplicates(key).set_index(key)

def append(file, header, row):
    "Add `row` to the csv `file`, with `header` where it is new"
    with file.open('a', newline='') as f:
        writer = csv.writer(f, lineterminator='\n')
        if f.tell() == 0: writer.writerow(header)
        writer.writerow(row)

def trained(train, runs, jobs, path):
    "Yield what `train(run, path)` returns for each of `runs` as it ends, `jobs` at a time in processes of one thread"
    with ProcessPoolExecutor(jobs, get_context('spawn'), torch.set_num_threads, (1,)) as pool:
        try:
            for f in as_completed([pool.submit(train, r, path) for r in runs]): yield f.result()
        except BaseException:
            for p in active_children(): p.terminate()   # or leaving the pool waits for runs that nobody will read
            raise

def cell(values, n_seeds):
    "Mean ± standard deviation, with the number of seeds where some are missing"
    if not len(values): return '–'
    sd = f' ± {values.std():.2f}' if len(values) > 1 else ''
    return f'{values.mean():.2f}{sd}' + (f' ({len(values)} of {n_seeds})' if len(values) < n_seeds else '')

def cpu_name():
    "Model name of the processor, on Linux"
    info = Path('/proc/cpuinfo')
    names = [l.split(':', 1)[1].strip() for l in info.read_text().splitlines()
             if l.startswith('model name')] if info.exists() else []
    return names[0] if names else platform.machine()

def positive(s):
    "`s` as a positive whole number"
    if int(s) < 1: raise ValueError
    return int(s)

def percentage(s):
    "`s` as a sparsity in percent, between 0 and 100"
    if not 0 < float(s) < 100: raise ValueError
    return float(s)

def asked_for(parser, name, asked_runs, run_all, key, measured, files):
    "Finished runs that the command line asks for, after training those missing in the csv of `name`; and the arguments"
    args = parser.parse_args()
    if not args.bs <= args.images <= 60000:
        parser.error(f'--images must be from --bs ({args.bs}) to 60000, not {args.images}')
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))   # so that the workers end too
    file, asked = args.out/f'{name}.csv', list(asked_runs(args))
    missing = [] if args.table_only else [r for r in asked if r not in results(file, key, measured).index]
    if missing and (lost := [f for f in files if not (args.path/f).exists()]):
        parser.exit(2, f'No {", ".join(lost)} in {args.path}: install the Debian package dataset-fashion-mnist, or '
                       f'give the folder of its four .gz files with --path\n')
    args.out.mkdir(parents=True, exist_ok=True)
    run_all(missing, args, file)
    df = results(file, key, measured)
    df = df[df.index.isin(asked)].reset_index()
    if df.empty: parser.exit(2, f'No run of these settings in {file}: leave out --table-only\n')
    return df, args
