"""What of a model is trained: LoRA's additions by peft, or the weights of all projections.

The model computes in the type it was loaded in. Steps are made on copies in fp32, which are rounded into the model
after each: in bfloat16 alone small steps would vanish.
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
    """Parameters in the model, and what steps are made on: fp32, in the same order."""

    in_model: tuple[nn.Parameter, ...]
    masters: tuple[nn.Parameter, ...]

    @property
    def count(self) -> int:
        """How many numbers are trained."""
        return sum(master.numel() for master in self.masters)

    def write_back(self) -> None:
        """Round the masters into the model."""
        with torch.no_grad():
            for parameter, master in zip(self.in_model, self.masters, strict=True):
                parameter.copy_(master)

    def load(self, values: Sequence[Tensor]) -> None:
        """Take these values for the masters, and into the model. Raises ModelError where they are of other sizes."""
        if [value.shape for value in values] != [master.shape for master in self.masters]:
            raise ModelError("the checkpoint holds weights of other sizes")
        with torch.no_grad():
            for master, value in zip(self.masters, values, strict=True):
                master.copy_(value)
        self.write_back()


@contextmanager
def trained(model: LoadedModel, recipe: Recipe) -> Iterator[Trained]:
    """While it lasts, the model learns and its trained parameters gather gradients in their masters.

    At its end LoRA's additions are merged, from fp32: the model then has the modules that it had before, and nothing
    needs a gradient. After an error the model is of no further use.
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
    """What moves a parameter's gradient on to its master, where micro-batches add up in fp32."""

    def gather(parameter: Tensor) -> None:
        assert parameter.grad is not None
        if master.grad is None:
            master.grad = parameter.grad.float()
        else:
            master.grad += parameter.grad
        parameter.grad = None

    return gather


def _low_rank(model: LoadedModel, recipe: Recipe) -> tuple[tuple[nn.Parameter, ...], Callable[[], object]]:
    """LoRA's additions to each of the seven projections of every decoder layer, in the type of the model."""
    import peft

    projections = {id(linear) for layer in model.decoder.layers for linear in layer.linears}
    names = [name for name, module in model.causal_lm.named_modules() if id(module) in projections]
    config = peft.LoraConfig(
        r=recipe.rank, lora_alpha=recipe.alpha, lora_dropout=recipe.dropout, target_modules=names, bias="none"
    )
    torch.manual_seed(recipe.seed)
    # Not `get_peft_model`: what that wraps around the model is for other tasks, and asks its config for more.
    adapted = peft.LoraModel(model.causal_lm, config, "default")
    dtype = model.decoder.head.weight.dtype
    parameters = [parameter for parameter in model.causal_lm.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.data = parameter.data.to(dtype)
    return tuple(parameters), adapted.merge_and_unload


def _projections(model: LoadedModel) -> tuple[tuple[nn.Parameter, ...], Callable[[], object]]:
    """All parameters of the decoder layers' projections."""
    found = [p for layer in model.decoder.layers for linear in layer.linears for p in linear.parameters()]
    return tuple(found), lambda: None
