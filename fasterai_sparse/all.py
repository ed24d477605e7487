"All public names, and fastai's that a notebook needs beside them: `from fasterai_sparse.all import *`"
from fastai.basics import *
from fastai.callback.all import *

from .masks import *
from .granularity import *
from .criteria import *
from .allocation import *
from .schedules import *
from .graph import *
from .bn_adaptation import *
from .report import *
from .native import *
from .permutation import *
from .permutation_cuda import *
from .channels import *
from .permute_model import *
from .sparsifier import *
from .training import *
from .lottery import *
from .sparsify_callback import *
from .from_scratch import *
from .drop_grow import *
from .dynamic import *
from .epoch_schedules import *
from .soft_masks import *
from .config import *
