"Modules made of parts and a function, for tests that need many small networks"
from torch import nn

class Net(nn.Module):
    "A module with the submodules `mods`; its forward is a function of itself and the input"
    def __init__(self, run, **mods):
        super().__init__()
        self.run = run
        for n,m in mods.items(): setattr(self, n, m)
    def forward(self, x): return self.run(self, x)

class NetOfAnyInputs(Net):
    "The same with any inputs, which torch.fx can not trace"
    def forward(self, *args, **kwargs): return self.run(self, *args, **kwargs)
