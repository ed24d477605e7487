"Run on two ranks by contract/test_two_ranks.py: prints masks and weights of both after each fit, as JSON"
from callback_helpers import collect, follows_masks, masks, zeros_hold
from ddp_worker import Accelerator, digest, finish, gathered, make, train
from kinds import KINDS, n_zero

def left_by(kind):
    learn = make()
    kind.prepare(learn)
    ends, seen = collect('after_epoch', lambda learn: digest(learn.model.parameters()))
    train(learn, kind.make(), ends, n_epoch=3)
    rows = [list(map(float, row[2:-1])) for row in learn.recorder.values]   # losses and accuracy are each rank's own
    here = dict(ends=seen, masks=digest(masks(learn.model)), weights=digest(learn.model.parameters()), rows=rows,
                zeros=n_zero(learn), held=zeros_hold(learn) and follows_masks(learn.model))
    return {k: gathered(v) for k,v in here.items()}

if __name__ == '__main__':
    Accelerator()
    finish({name: left_by(kind) for name,kind in KINDS.items()})
