"All public names: `from fasterai_sparse.all import *`"
from .masks import *
from .granularity import *
from .criteria import *
from .allocation import *
from .schedules import *
from .graph import *
from .report import *
from .sparsifier import *
from .training import *
from .lottery import *
from .sparsify_callback import *
