"""A small model, seams for it, and a framework module that ``d2v_fast.patch`` finds them in."""

import sys
from types import ModuleType

import torch
from torch import nn

from d2v_fast.patches._core import Options, Patch, Seam, Site, fall_back, state_of

X = torch.linspace(-1, 1, 8).reshape(2, 4)


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x, scale=1.0):
        """[N, 4] -> [N, 4]"""
        return self.linear(x) * scale


class Lazy(Layer):
    """Inherits its forward."""


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList((Layer(), Lazy()))
        self.register_buffer("counter", torch.zeros(()))

    @staticmethod
    def spread(x):
        return x.max() - x.min()

    @classmethod
    def build(cls):
        return cls()

    @property
    def depth(self):
        return len(self.layers)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def make_double(original, options):
    def forward(self, x, scale=1.0):
        if len(x) == 1:
            fall_back(self, "forward", "a single row", options)
            return original(self, x, scale)
        state_of(self).cache["calls"] = True
        return original(self, x, scale) * 2

    return forward


def make_spread(original, options):
    return lambda x: original(x) * 10


def inner_seam(attribute, **options):
    """A seam that adds one to whatever the method returns."""

    def make(original, options):
        return lambda self, *args: original(self, *args) + 1

    return Seam("loss", attribute, make, "one more", **options)


DOUBLE = Seam("norms", "forward", make_double, "twice as much")
SPREAD = Seam("metrics", "spread", make_spread, "ten times as much")


def make() -> Toy:
    """The same weights each time; without biases, so that what is doubled twice is four times as much."""
    torch.manual_seed(0)
    model = Toy()
    for layer in model.layers:
        nn.init.zeros_(layer.linear.bias)
    return model


def sites(model, *seams):
    """The layers' forward, and ``seams`` of the model itself."""
    layers = [Site(f"layers.{i}", layer, DOUBLE) for i, layer in enumerate(model.layers)]
    return layers + [Site("", model, seam) for seam in seams]


def patched(model, *seams, strict=False) -> Patch:
    """Its layers double then."""
    return Patch("toy").apply(sites(model, *seams), Options(strict=strict))


def two_layers(model, x=X):
    """What upstream computes."""
    return model.layers[1].linear(model.layers[0].linear(x))


def doubled(model, x=X) -> bool:
    return torch.equal(model(x), 4 * two_layers(model, x))


def framework(**members) -> ModuleType:
    """A module as ``patches.FRAMEWORKS`` names them, for :class:`Toy`."""
    module = ModuleType("d2v_fast.patches.toy")
    module.SUPPORTED = ("Toy",)
    module.matches = lambda model: type(model).__name__ == "Toy"
    module.sites = lambda model, patch, options: sites(model, SPREAD)
    module.CLASSES = {}
    vars(module).update(members)
    return module


def install(monkeypatch, **members) -> None:
    """Make it the only framework."""
    monkeypatch.setitem(sys.modules, "d2v_fast.patches.toy", framework(**members))
    monkeypatch.setattr("d2v_fast.patches.FRAMEWORKS", ("toy",))


def snapshot(model) -> list[dict]:
    """The ``__dict__`` of every module."""
    return [dict(module.__dict__) for module in model.modules()]
