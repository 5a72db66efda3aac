"""From the student's output at masked positions to the prediction of the target."""

from torch import nn

from d2v_fast.nn.config import Data2VecConfig
from d2v_fast.nn.encoder import init_linear


def build_head(config: Data2VecConfig) -> nn.Sequential:
    """[N, C] -> [N, C]: one linear layer (fairseq ``final_proj``), or an MLP of width 2C (``regression_head``)."""
    dim, widths = config.encoder.dim, [2 * config.encoder.dim] * (config.head_layers - 1)
    layers: list[nn.Module] = []
    for width_in, width_out in zip([dim, *widths], [*widths, dim], strict=True):
        layers += [nn.Linear(width_in, width_out), nn.GELU()]
    head = nn.Sequential(*layers[:-1])
    if config.modality != "speech":  # fairseq leaves the speech head at PyTorch's default initialisation
        for module in head:
            if isinstance(module, nn.Linear):
                init_linear(module, config.encoder)
    return head
