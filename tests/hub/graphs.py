"""Models for the tests of exported graphs."""

import torch

from tests.zoo import ZOO

PRETRAINING = [name for name in ZOO if "pretraining" in name or "distillation" in name]
GRAPHS = [name for name in ZOO if name not in PRETRAINING and "instances" not in name]


def lively(name: str):
    """A model whose outputs show all of it: the heads of the zoo's add little to their biases."""
    model, generator = ZOO[name].model(), torch.Generator().manual_seed(4)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if parameter.ndim > 1 and path.startswith(("classifier", "decode_head", "auxiliary_head")):
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(noise * (2 / parameter[0].numel()) ** 0.5)
    return model
