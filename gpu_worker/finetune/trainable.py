"""Selects the trained parameters: LoRA adapters (with peft), or the weights of all projections.

The model computes in the dtype it was loaded in. The optimizer updates fp32 master copies, which are rounded into the
model after each step. In bfloat16 alone, small updates would be lost.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gpu_worker.models.loading import LoadedModel
from protocol.errors import ModelError
from protocol.results.finetuning import Recipe


@dataclass(frozen=True)
class Trained:
    """Trained parameters of the model, and their fp32 masters in the same order."""

    in_model: tuple[nn.Parameter, ...]
    masters: tuple[nn.Parameter, ...]

    @property
    def count(self) -> int:
        """Return the number of trained parameters."""
        return sum(master.numel() for master in self.masters)

    def write_back(self) -> None:
        """Round the masters into the model."""
        with torch.no_grad():
            for parameter, master in zip(self.in_model, self.masters, strict=True):
                parameter.copy_(master)

    def load(self, values: Sequence[Tensor]) -> None:
        """Copy `values` into the masters and the model. Raises ModelError if their sizes differ."""
        if [value.shape for value in values] != [master.shape for master in self.masters]:
            raise ModelError("the checkpoint holds weights of other sizes")
        with torch.no_grad():
            for master, value in zip(self.masters, values, strict=True):
                master.copy_(value)
        self.write_back()


@contextmanager
def trained(model: LoadedModel, recipe: Recipe) -> Iterator[Trained]:
    """Set the model to training mode and yield its trained parameters, whose gradients are added up in their masters.

    On exit, LoRA adapters are merged in fp32, so that the model has its original modules and no gradients. After an
    error the model must not be used.
    """
    parameters, merge = _low_rank(model, recipe) if recipe.method == "lora" else _projections(model)
    masters = tuple(nn.Parameter(parameter.detach().float().clone()) for parameter in parameters)
    handles = [
        parameter.requires_grad_(True).register_post_accumulate_grad_hook(_into(master))  # type: ignore[no-untyped-call]
        for parameter, master in zip(parameters, masters, strict=True)
    ]
    model.causal_lm.train()
    yield Trained(parameters, masters)
    model.causal_lm.eval()
    for handle in handles:
        handle.remove()
    for parameter, master in zip(parameters, masters, strict=True):
        parameter.data = master.detach() if recipe.method == "lora" else parameter.data
    merge()
    model.causal_lm.requires_grad_(False)


def _into(master: nn.Parameter) -> Callable[[Tensor], None]:
    """Return a hook that adds a parameter's gradient to its master's, so that micro-batches accumulate in fp32."""

    def gather(parameter: Tensor) -> None:
        assert parameter.grad is not None
        if master.grad is None:
            master.grad = parameter.grad.float()
        else:
            master.grad += parameter.grad
        parameter.grad = None

    return gather


def _low_rank(model: LoadedModel, recipe: Recipe) -> tuple[tuple[nn.Parameter, ...], Callable[[], object]]:
    """Add LoRA adapters to the seven projections of every decoder layer, in the model's dtype."""
    import peft

    projections = {id(linear) for layer in model.decoder.layers for linear in layer.linears}
    names = [name for name, module in model.causal_lm.named_modules() if id(module) in projections]
    config = peft.LoraConfig(
        r=recipe.rank, lora_alpha=recipe.alpha, lora_dropout=recipe.dropout, target_modules=names, bias="none"
    )
    torch.manual_seed(recipe.seed)
    # `get_peft_model` is not used, because its wrapper is for other tasks and needs more settings.
    adapted = peft.LoraModel(model.causal_lm, config, "default")
    dtype = model.decoder.head.weight.dtype
    parameters = [parameter for parameter in model.causal_lm.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.data = parameter.data.to(dtype)
    return tuple(parameters), adapted.merge_and_unload


def _projections(model: LoadedModel) -> tuple[tuple[nn.Parameter, ...], Callable[[], object]]:
    """Return all parameters of the decoder layers' projections."""
    found = [p for layer in model.decoder.layers for linear in layer.linears for p in linear.parameters()]
    return tuple(found), lambda: None
