"""A PEFT LoRA layer for chosen experts of a bank, and its configuration.

PEFT has no layer for *some* experts of a fused bank: `target_parameters` adapts every expert. The layer here holds A
and B for the chosen experts only, and uses `models.hooks.mask_and_add`: the stock forward runs with the routing weights
of the chosen experts set to 0, and their outputs, with LoRA at gate, up and down, are added.

Shape suffixes: T tokens, K experts per token, N tokens routed to one expert, D hidden size, F intermediate size,
U width of the up projection (2F with a gate, F without), R rank, I and O inputs and outputs of a projection.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from peft import LoraConfig
from peft.tuners.lora import LoraLayer, LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from superexperts.models.experts import (
    DOWN,
    GATE,
    UP,
    down_weight,
    expert_down,
    expert_inner,
    expert_norm,
    expert_up,
    is_bank,
    join_gate_up,
    up_projections,
)
from superexperts.models.experts import projections as bank_projections
from superexperts.models.hooks import mask_and_add

__all__ = ["RENAMED_BY_PEFT", "ExpertLoraConfig", "ExpertsLora", "is_projection", "linears"]

RENAMED_BY_PEFT = {"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"}
"""Last parts of a path that PEFT takes for former names of routed experts in `target_modules`, whatever the module is
(peft#3711). A linear map of such a name goes into `target_parameters` by its weight instead."""


@dataclasses.dataclass
class ExpertLoraConfig(LoraConfig):  # type: ignore[misc]  # PEFT has no types
    """PEFT's LoRA settings, and the experts they are for. `target_modules` holds all paths that are named here.

    Not frozen, because PEFT writes to its configurations.
    """

    experts: dict[str, list[int]] = dataclasses.field(default_factory=dict)
    """The numbers of the adapted experts, by the path of their bank."""
    shared: list[str] = dataclasses.field(default_factory=list)
    """Paths of adapted shared experts: of the MLPs that hold their linear maps."""
    linears: list[str] = dataclasses.field(default_factory=list)
    """Paths of other linear maps that `target_modules` cannot name; it holds the modules around them instead."""
    projections: list[str] = dataclasses.field(default_factory=lambda: [GATE, UP, DOWN])
    """Which projections of the experts, routed and shared, are adapted."""

    def __post_init__(self) -> None:
        super().__post_init__()
        # PEFT does not save the registration, so every configuration registers anew. It is for every module, because
        # the class of the banks is not known when an adapter is loaded; `_dispatch` recognises banks by structure.
        self._register_custom_module({nn.Module: _dispatch})


def _dispatch(target: nn.Module, adapter_name: str, config: ExpertLoraConfig, **settings: Any) -> nn.Module | None:
    """The module that PEFT puts in the place of a target: our layer for a bank, the MLP itself with LoRA inside for a
    shared expert; None, which lets PEFT choose, for anything else."""
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    if is_bank(base):
        return ExpertsLora(target, adapter_name, config=config, **settings)
    path = settings["target_name"]
    own_linears = linears(target) if path in config.shared else {}
    adapted = {name: linear for name, linear in own_linears.items() if is_projection(name, config.projections)}
    for name in config.linears:
        if name.rpartition(".")[0] == path:
            adapted[name.rpartition(".")[2]] = target.get_submodule(name.rpartition(".")[2])
    if not adapted:
        return None
    # PEFT cannot target `...shared_experts.gate_proj`: it takes that for a former name of the routed experts and adapts
    # those instead (peft#3711). So its layers are created here, and it never sees the name.
    for name, linear in adapted.items():
        parent, leaf = target.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        if isinstance(linear, LoraLayer):
            linear.update_layer(adapter_name, settings["r"], lora_alpha=settings["lora_alpha"], config=config)
        else:
            own = {**settings, "target_name": f"{path}.{name}"}
            setattr(parent, leaf, LoraModel._create_new_module(config, adapter_name, linear, **own))
    return target


def is_projection(name: str, projections: Collection[str]) -> bool:
    """Whether to adapt this linear map of a shared expert: one of `projections`, or one with any other name."""
    leaf = name.rpartition(".")[2]
    return leaf in projections or leaf not in (GATE, UP, DOWN)


def linears(module: nn.Module) -> dict[str, nn.Module]:
    """Linear maps below a module by path; one that PEFT has wrapped is there once."""
    found: dict[str, nn.Module] = {}
    for name, child in module.named_modules():
        inside = any(name.startswith(f"{other}.") for other in found)
        if not inside and isinstance(child, nn.Linear | LoraLayer):
            found[name] = child
    return found


# ---- the layer ----------------------------------------------------------------------------------------------------


class ExpertsLora(nn.Module, LoraLayer):  # type: ignore[misc]  # PEFT has no types
    """LoRA on chosen experts of one bank: y = W x + scaling * B A dropout(x) at each of their projections.

    Per adapter, `lora_A` holds `{expert}_{projection}` [R, I] and `lora_B` the same names [O, R], in the bank's dtype
    until PEFT raises half precision to float32. Keys of `rank_pattern` and `alpha_pattern` name an expert as
    `model.layers.2.mlp.experts.54`, or one of its projections as `...54.down_proj`. B starts at 0, A as in `nn.Linear`.
    Sums are taken in the adapter's dtype and rounded to the bank's, as PEFT's own linear layer does.
    """

    # Attributes of `LoraLayer`. The type checker would take a module's undeclared attributes for tensors.
    r: dict[str, int]
    lora_alpha: dict[str, float]
    scaling: dict[str, float]
    use_rslora: dict[str, bool]
    use_dora: dict[str, bool]
    lora_bias: dict[str, bool]
    lora_dropout: Any
    lora_A: Any  # PEFT's names
    lora_B: Any
    base_layer: Callable[..., Tensor]
    merged_adapters: list[str]
    merged: bool
    disable_adapters: bool
    active_adapters: list[str]
    get_base_layer: Any
    set_adapter: Any
    resolve_lora_variant: Any

    other_param_names = (*LoraLayer.other_param_names, "experts", "relative_scaling")

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: ExpertLoraConfig,
        r: int = 0,
        lora_alpha: float = 1,
        target_name: str = "",
        **kwargs: Any,
    ) -> None:
        super().__init__()
        LoraLayer.__init__(self, base_layer, **kwargs)
        self.experts: dict[str, tuple[int, ...]] = {}
        # Per adapter and {expert}_{projection}: the scaling there over the adapter's, which PEFT sets and multiplies.
        self.relative_scaling: dict[str, dict[str, float]] = {}
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha, config=config, target_name=target_name)

    def _get_in_out_features(self, module: nn.Module) -> tuple[None, None]:
        return None, None  # the projections differ

    def update_layer(
        self, adapter_name: str, r: int, lora_alpha: float, config: ExpertLoraConfig, target_name: str, **_: Any
    ) -> None:
        """Adds an adapter; `ValueError` for settings of PEFT that this layer does not have."""
        if self.resolve_lora_variant(config=config) is not None or config.lora_bias:
            raise ValueError("LoRA on experts has no DoRA, no other variant and no bias; leave them off")
        if not isinstance(config.init_lora_weights, bool):
            raise ValueError(f"init_lora_weights={config.init_lora_weights!r} is not for experts; use True or False")
        bank = self.get_base_layer()
        self.experts[adapter_name] = tuple(sorted(config.experts[target_name]))
        self.r[adapter_name] = r
        self.lora_alpha[adapter_name] = lora_alpha
        self.scaling[adapter_name] = _scaling(lora_alpha, r, config)
        self.relative_scaling[adapter_name] = {}
        self.use_rslora[adapter_name] = config.use_rslora
        self.use_dora[adapter_name] = False
        self.lora_bias[adapter_name] = False
        dropout = nn.Dropout(config.lora_dropout) if config.lora_dropout > 0 else nn.Identity()
        self.lora_dropout.update({adapter_name: dropout})
        a_RI, b_OR = nn.ParameterDict(), nn.ParameterDict()
        for expert in self.experts[adapter_name]:
            for projection, weight_OI in bank_projections(bank, expert).items():
                if projection not in config.projections:
                    continue
                # Drawn on the CPU, so that a seed gives the same adapter on every device.
                name, (outputs, inputs) = f"{expert}_{projection}", weight_OI.shape
                rank = _by_pattern(config.rank_pattern, target_name, expert, projection, r)
                alpha = _by_pattern(config.alpha_pattern, target_name, expert, projection, lora_alpha)
                own = _scaling(alpha, rank, config) / self.scaling[adapter_name]
                self.relative_scaling[adapter_name][name] = own
                a_RI[name] = nn.Parameter(torch.empty(rank, inputs))
                b_OR[name] = nn.Parameter(torch.zeros(outputs, rank))
                nn.init.kaiming_uniform_(a_RI[name], a=math.sqrt(5))
                if config.init_lora_weights is False:  # PEFT's way to ask for an adapter that does something at once
                    nn.init.kaiming_uniform_(b_OR[name], a=math.sqrt(5))
        self.lora_A[adapter_name], self.lora_B[adapter_name] = a_RI, b_OR
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        weight = down_weight(self.get_base_layer())
        for part in (self.lora_A[adapter_name], self.lora_B[adapter_name]):
            if not any(parameter.is_meta for parameter in part.parameters()):
                part.to(device or weight.device, dtype=weight.dtype)

    def forward(self, *arguments: Any, **kwargs: Any) -> Tensor:
        """The bank's forward (x_TD, index_TK, weight_TK, ...) -> [T, D]."""
        if kwargs.pop("adapter_names", None) is not None:
            raise ValueError("LoRA on experts takes one adapter per batch; leave adapter_names out")
        if self.disable_adapters and self.merged:
            self.unmerge()
        chosen = {expert for name in self.active_adapters for expert in self.experts.get(name, ())}
        if self.disable_adapters or self.merged or not chosen:
            return self.base_layer(*arguments, **kwargs)
        x_TD, index_TK, weight_TK, *rest = arguments

        def forward(x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
            return self.base_layer(x, index, weight, *rest, **kwargs)

        reached: set[int] = set()

        def answer(expert: int, x_ND: Tensor) -> Tensor:
            reached.add(expert)
            return self._adapted(expert, x_ND)

        edits = {expert: functools.partial(answer, expert) for expert in chosen}
        y_TD = mask_and_add(forward, x_TD, index_TK, weight_TK, edits)
        if torch.is_grad_enabled():
            # An expert that no token of the batch reached gets a gradient of 0 instead of none. Otherwise a batch that
            # reaches no adapted expert has no graph for a backward pass, and processes wait for missing gradients.
            idle = [parameter for expert in sorted(chosen - reached) for parameter in self._parameters_of(expert)]
            for parameter in idle:
                y_TD = y_TD + (parameter.sum() * 0).to(y_TD.dtype)
        return y_TD

    def _parameters_of(self, expert: int) -> list[Tensor]:
        """The trained A and B of an expert in every active adapter."""
        return [
            parameter
            for name in self._adapters_of(expert)
            for part in (self.lora_A[name], self.lora_B[name])
            for own, parameter in part.items()
            if own.partition("_")[0] == str(expert) and parameter.requires_grad
        ]

    def _adapted(self, expert: int, x_ND: Tensor) -> Tensor:
        """One chosen expert's output [N, D] with every active adapter."""
        bank = self.get_base_layer()
        up_NU = expert_up(bank, expert, x_ND)
        for name in self._adapters_of(expert):
            up_NF, gate_NF = (self._change(name, f"{expert}_{part}", x_ND) for part in (UP, GATE))
            if gate_NF is None and up_NF is None:
                continue
            if GATE in up_projections(bank):
                # Gate and up have the same shape, and one of them may have no adapter.
                some_NF = cast(Tensor, up_NF if gate_NF is None else gate_NF)
                halves = (torch.zeros_like(some_NF) if half is None else half for half in (gate_NF, up_NF))
                up_NF = join_gate_up(bank, *halves)
            up_NU = (up_NU + cast(Tensor, up_NF)).to(up_NU.dtype)
        inner_NF = expert_inner(bank, up_NU)
        y_ND = expert_down(bank, expert, inner_NF)
        for name in self._adapters_of(expert):
            change_ND = self._change(name, f"{expert}_{DOWN}", inner_NF)
            if change_ND is not None:
                y_ND = (y_ND + change_ND).to(y_ND.dtype)
        return expert_norm(bank, y_ND)

    def _adapters_of(self, expert: int) -> list[str]:
        return [name for name in self.active_adapters if expert in self.experts.get(name, ())]

    def scaling_of(self, adapter_name: str, name: str) -> float:
        """alpha / r of `{expert}_{projection}`."""
        return self.scaling[adapter_name] * self.relative_scaling[adapter_name][name]

    def _change(self, adapter_name: str, name: str, x_NI: Tensor) -> Tensor | None:
        """scaling * B A dropout(x) -> [N, O], in the adapter's dtype; None for a projection without an adapter."""
        if name not in self.lora_A[adapter_name]:
            return None
        a_RI, b_OR = self.lora_A[adapter_name][name], self.lora_B[adapter_name][name]
        x_NI = self.lora_dropout[adapter_name](x_NI.to(a_RI.dtype))
        return F.linear(F.linear(x_NI, a_RI), b_OR) * self.scaling_of(adapter_name, name)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Adds scaling * B A to the chosen experts' weights in place; no other weight is written."""
        for adapter_name in check_adapters_to_merge(self, adapter_names):
            if adapter_name in self.experts:
                changes = list(self._weight_changes(adapter_name))
                if safe_merge and not all(bool((weight + change).isfinite().all()) for weight, change in changes):
                    raise ValueError(
                        f"the merged weights are not finite; the adapter {adapter_name} seems to be broken"
                    )
                for weight_OI, change_OI in changes:
                    weight_OI.copy_(weight_OI + change_OI)
                self.merged_adapters.append(adapter_name)

    def unmerge(self) -> None:
        """Undoes `merge`, up to one rounding."""
        while self.merged_adapters:
            for weight_OI, change_OI in self._weight_changes(self.merged_adapters.pop()):
                weight_OI.copy_(weight_OI - change_OI)

    def _weight_changes(self, adapter_name: str) -> Iterable[tuple[Tensor, Tensor]]:
        """(the weight, its change) [O, I] of each adapted projection; the weight is a view of the bank's parameter."""
        a, b = self.lora_A[adapter_name], self.lora_B[adapter_name]
        for expert in self.experts[adapter_name]:
            for projection, weight_OI in bank_projections(self.get_base_layer(), expert).items():
                name = f"{expert}_{projection}"
                if name in a:
                    yield weight_OI, b[name].detach() @ a[name].detach() * self.scaling_of(adapter_name, name)

    def __repr__(self) -> str:
        return f"superexperts.{super().__repr__()}"


def _scaling(alpha: float, r: int, config: LoraConfig) -> float:
    return float(alpha / (math.sqrt(r) if config.use_rslora else r))


def _by_pattern(patterns: Mapping[str, Any], path: str, expert: int, projection: str, default: Any) -> Any:
    """The value of PEFT's patterns for a projection, or else for its expert, or else the default."""
    for name in (f"{path}.{expert}.{projection}", f"{path}.{expert}"):
        key = get_pattern_key(tuple(patterns), name)
        if key in patterns:
            return patterns[key]
    return default
