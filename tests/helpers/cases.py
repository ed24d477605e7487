"Many small cases in one test, to keep the list of tests short"
import functools, inspect

import pytest, torch


def shown(value): return getattr(value, '__name__', None) or repr(value)

def in_a_loop(names, values):
    """Like `pytest.mark.parametrize`, but as a loop inside the test; a failure names its case.

    Each case starts from the same seed, as a test of its own does. Fixtures are shared by all cases."""
    names, values = names.split(','), list(values)
    def decorate(f):
        @functools.wraps(f)
        def run(**kwargs):
            for value in values:
                case = dict(zip(names, value, strict=True)) if len(names) > 1 else {names[0]: value}
                torch.manual_seed(0)
                try: f(**kwargs, **case)
                except (Exception, pytest.fail.Exception) as e:
                    text = ', '.join(f'{k}={shown(v)}' for k,v in case.items())
                    raise AssertionError(f'with {text}: {e or type(e).__name__}') from e
        sig = inspect.signature(f)
        run.__signature__ = sig.replace(parameters=[p for n,p in sig.parameters.items() if n not in names])
        return run
    return decorate
