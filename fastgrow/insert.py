"""`fg.insert_layer`: a new layer between two, without changing what the network computes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .arguments import as_list, copies_of, whole
from .between import Spot, activation_of, find_spot, keeps
from .closures import inputs_of, preserved, undrawn_on_failure
from .distributed import replicas_of, together
from .errors import GrowthError
from .grow import observe_closure, observing
from .growth_report import GrowthReport, SiteGrowth
from .how import GradMax, How
from .insertions import Insertion, LayerSpec, attach, insertions
from .integrations.config import follow_configs
from .names import find_module
from .newborns import Newborns, Start
from .nn import twin
from .observe import observe
from .optimizer_state import rates_of
from .plan import check_units
from .rehearsal import restored
from .room import has_room
from .sites import LayerCall, as_call, discover, evaluation, tensors_of, untouched, unwrap
from .stages import newest_stage
from .trial import find_sites

__all__ = ["insert_layer"]

# What a forward pass through an identity may lose: a GPU's convolutions multiply float32 in tf32 by default.
_ROUNDING = {torch.float64: 1e-9, torch.float32: 2e-3}


def insert_layer(
    model: nn.Module,
    after: str,
    *,
    before: str | None = None,
    units: int | None = None,
    how: How | None = None,
    kernel_size: int | Sequence[int] | None = None,
    norm: bool = False,
    activation: nn.Module | Literal["same"] | None = "same",
    example_inputs: Any = None,
    closure: Callable[[], Tensor] | None = None,
    optimizer: Any = None,
    also: nn.Module | Iterable[nn.Module] = (),
) -> GrowthReport:
    """Put a new layer into a model as it is written, all or nothing; what the model computes stays.

    after: the name of a layer, as in ``model.named_modules()``, or of a block that returns one tensor. The new
    layer reads what `after`, its norm and its activation write, or, with ``before=``, stands on the way to that
    one reader alone. It comes in one of two forms:

    **An identity** (``units=None``): ``h' = f(norm(W h + b))``, of the same width, with W = I (Dirac for
    convolutions), b = 0: Net2DeeperNet. f must keep what it reads, f(h) = h: ReLU behind ReLU, no activation
    (None), or ``nn.PReLU(init=1.0)``, whose slope is then learned. norm: a batch norm between them that begins with
    the statistics of h in one batch (gamma = sqrt(var + eps), beta = mean): the identity in evaluation mode, and in
    training mode on that batch; on others up to the difference of their statistics.

    **New units beside a layer** (``units=k``), GradMax, App. A, "Growing Layers":
    ``z_l = W_l h + W_out f(norm(W_in h + b_in))``, between what `after` writes, h, and the pre-activation z_l of the
    layer that reads it. They start by `how` (GradMax by default) from the growth matrix ``M = E[dL/dz_l h^T]``:
    W_in = 0 and W_out along the leading left singular vectors of M, its columns' norms relative to those of W_l, so
    that ``dL/dW_in = f'(0) W_out^T M`` is as large as orthogonal columns of those norms allow (eqs. 9-11, 20). They
    are a site like any other: `fastgrow.grow` adds to them. how: GradMax, Random, ZeroOutgoing or ZeroBoth.

    kernel_size: of a convolution (1-d to 3-d), odd; that of `after` by default where it is odd, 1 otherwise. W_out
    has the geometry of W_l. activation: a module of ``torch.nn``, a kind of which a fresh one is built; "same": the
    kind behind `after` (beside a layer without one: ReLU). example_inputs, as in `find_sites`, or the closure's
    own; closure: returns the loss, needed where `how` reads gradients (called once, twice without example_inputs).
    optimizer: one or a list; new weights join the param group of the weight of `after` (with a block: of its last
    layer), biases and norms that of its bias or norm, and take over its dtype, device, memory format and
    requires_grad. also: copies that must follow.

    The model stays a plain module: the place, an activation's, norm's or layer's module, becomes an
    ``nn.Sequential`` of itself and the new modules (or a `fastgrow.nn.Beside`, which `fastgrow.finalize` turns into
    torch's own), so that its tensors get longer names (``conv2.weight`` -> ``conv2.2.weight``): the report's
    evidence lists them under "renamed". Sites found before are refused afterwards: find them again. `fastgrow.save`
    and `fastgrow.load` know inserted layers.

    Returns a `GrowthReport` whose one entry is the new layer, grown from width 0. Raises `GrowthError`, with
    everything as it was, where no place is found, an activation would change the function, or the model does not
    run or does not compute the same with the layer inside (tried on the inputs, in evaluation mode).
    """
    started = time.perf_counter()
    optimizers, copies, inner = as_list(optimizer), copies_of(also), unwrap(model)
    for argument, given in (("after", after), ("before", before)):
        if not isinstance(given, str) and (given is not None or argument == "after"):
            raise GrowthError(f"insert_layer: {argument}={given!r} was given; wanted the name of a module")
    if units is None and how is not None:
        raise GrowthError(f"insert_layer: how.{how.name} starts units beside a layer: say how many with units=")
    if example_inputs is None:
        if closure is None:
            raise GrowthError("insert_layer: give example_inputs=, or a closure= from whose call they can be found")
        example_inputs = inputs_of(model, closure)
    replicas = replicas_of(model)
    if replicas is not None:
        replicas.check_renewable()
    with undrawn_on_failure(model):
        with torch.inference_mode(False), torch.no_grad():
            with together(replicas):
                _refuse_sharded(inner)
                if has_room(inner):
                    raise GrowthError(
                        "insert_layer: the model has room reserved for growth, whose zeros a new layer would not keep; "
                        "call fg.release first, and reserve again afterwards"
                    )
                graph = discover(model, example_inputs).graph
                assert graph is not None
                spot = find_spot(inner, graph, _plain_name(inner, after), before, units is not None)
                ways = _Layers(inner, spot, kernel_size, norm, activation)
                specs = ways.identity() if units is None else ways.branch(whole("insert_layer", "units", units))
                insertion = _insertion(inner, spot, specs)
                modules = insertion.build(inner)
                if units is None:
                    _be_identity(inner, insertion, modules, example_inputs)
            start = Start()
            if units is not None:
                how = how if how is not None else GradMax()
                how.check_optimizers(optimizers)
                start = _start(model, spot, insertion, modules, how, units, example_inputs, closure)
            with together(replicas):
                _check_kept(inner, insertion, modules, example_inputs)
        if replicas is not None:
            replicas.share_([tensor.detach() for module in modules for tensor in tensors_of(module).values()])
        names = {id(parameter): name for name, parameter in inner.named_parameters()}
        attach(inner, insertion, modules, optimizers=optimizers, also=copies)
    if replicas is not None:
        replicas.renew()
    if how is not None:
        how.settle(model, optimizers)
    follow_configs(inner)
    renamed = {names[id(p)]: name for name, p in inner.named_parameters() if names.get(id(p), name) != name}
    width = spot.channels if units is None else units
    first = modules[0].get_parameter("weight")  # learns first: what reads it starts away from zero, it does not
    rate = rates_of(optimizers).get(id(first)) if first.requires_grad else None
    gain = None if rate is None or start.attained is None else rate * float(start.attained)
    name = f"{insertion.place}.{insertion.name(0)}"
    return GrowthReport(
        [SiteGrowth(name, 0, width, start.captured, gain, random_units=start.random)],
        f"inserted {spot.way} {insertion.place}: {'identity' if how is None else how.name}",
        time.perf_counter() - started,
        sum(parameter.numel() for parameter in inner.parameters()),
        evidence={"renamed": renamed},
    )


def _refuse_sharded(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "device_mesh"):
            raise GrowthError(f"insert_layer: {name!r} is sharded over a device mesh; insert before fully_shard")


def _plain_name(model: nn.Module, name: str) -> str:
    """A module's name without the components of wrappers around the model."""
    module = find_module(model, name)
    return next((known for known, other in model.named_modules() if other is module), name)


class _Layers:
    """Which modules are to be built at a place."""

    def __init__(
        self,
        model: nn.Module,
        spot: Spot,
        kernel_size: int | Sequence[int] | None,
        norm: bool,
        activation: nn.Module | Literal["same"] | None,
    ) -> None:
        self.model, self.spot, self.norm, self.activation = model, spot, norm, activation
        self.kernel = self._kernel(kernel_size)
        if norm and spot.dims is None and len(spot.shape) != 2:
            raise GrowthError(
                f"insert_layer: norm=True behind {spot.source.name!r}, whose values have shape {spot.shape}: a batch "
                "norm wants (N, C) or a convolution's; leave it out"
            )

    def _kernel(self, wanted: int | Sequence[int] | None) -> tuple[int, ...]:
        dims = self.spot.dims
        if dims is None:
            if wanted is not None:
                raise GrowthError(f"insert_layer: kernel_size={wanted!r} was given, but the new layer is linear")
            return ()
        own = getattr(find_module(self.model, self.spot.source.name), "kernel_size", None)
        if wanted is None:
            fits = isinstance(own, tuple) and len(own) == dims and all(size % 2 for size in own)
            return own if fits and own is not None else (1,) * dims
        sizes = tuple(wanted) if isinstance(wanted, Sequence) else (wanted,) * dims
        sizes = tuple(whole("insert_layer", "kernel_size", size) for size in sizes)
        if len(sizes) != dims or not all(size % 2 for size in sizes):
            raise GrowthError(
                f"insert_layer: kernel_size={wanted!r} was given; wanted {dims} odd sizes, or one: an even kernel has "
                "no centre, so it keeps neither the size of the map nor its values"
            )
        return sizes

    def _layer(self, into: int, out: int, bias: bool) -> LayerSpec:
        if self.spot.dims is None:
            return LayerSpec("Linear", {"in_features": into, "out_features": out, "bias": bias})
        padding = tuple(size // 2 for size in self.kernel)
        sizes = {"in_channels": into, "out_channels": out, "kernel_size": self.kernel, "padding": padding}
        return LayerSpec(f"Conv{self.spot.dims}d", {**sizes, "bias": bias})

    def _norm(self, channels: int) -> list[LayerSpec]:
        return [LayerSpec(f"BatchNorm{self.spot.dims or 1}d", {"num_features": channels})] if self.norm else []

    def _known(self) -> LayerSpec | None:
        return None if self.spot.activation is None else activation_of(self.spot.activation)

    def identity(self) -> list[LayerSpec]:
        """A layer of the same width, the norm, an activation that keeps what it reads."""
        channels, known = self.spot.channels, self._known()
        layers = [self._layer(channels, channels, not self.norm), *self._norm(channels)]
        new = known if self.activation == "same" else _spec(self.activation)
        if new is None:
            return layers
        if not keeps(new.build(), None if known is None else known.build()):
            behind = "what is no activation" if known is None else f"{known.kind}"
            raise GrowthError(
                f"insert_layer: {new.kind} behind {behind} at {self.spot.place!r} changes what it reads, so a layer "
                "that starts as the identity would not keep the function; give activation=nn.PReLU(init=1.0), the "
                "identity at first, or activation=None, or units=, new units beside the layer that reads it"
            )
        return [*layers, new]

    def branch(self, units: int) -> list[LayerSpec]:
        """A layer of so many units, the norm, the activation, and a layer like the reader."""
        reader = self.spot.reader
        assert reader is not None
        known = self._known() or LayerSpec("ReLU")
        new = known if self.activation == "same" else _spec(self.activation)
        if new is None:
            raise GrowthError("insert_layer: new units beside a layer need an activation=; without, they are one layer")
        weight = tensors_of(self.model)[reader.weight]
        out, into = int(weight.shape[reader.out_dim]), self.spot.channels
        if self.spot.dims is None:
            last = LayerSpec("Linear", {"in_features": units, "out_features": out, "bias": False})
        else:
            module = find_module(self.model, reader.name)
            if reader.kind != "conv" or not isinstance(module, nn.modules.conv._ConvNd):
                raise GrowthError(
                    f"insert_layer: {reader.name!r} ({reader.kind}) is no plain convolution, so no units can be put "
                    "beside it; name another reader with before=, or insert an identity (units=None)"
                )
            geometry = ("kernel_size", "stride", "padding", "dilation", "padding_mode")
            arguments = {name: getattr(module, name) for name in geometry}
            arguments |= {"in_channels": units, "out_channels": out, "bias": False}
            last = LayerSpec(f"Conv{self.spot.dims}d", arguments)
        return [self._layer(into, units, not self.norm), *self._norm(units), new, last]


def _spec(activation: Any) -> LayerSpec | None:
    if activation is None:
        return None
    if not isinstance(activation, nn.Module):
        raise GrowthError(f"insert_layer: activation={activation!r} was given; wanted a module, 'same' or None")
    return LayerSpec.of(activation)


def _insertion(model: nn.Module, spot: Spot, layers: Sequence[LayerSpec]) -> Insertion:
    number = 1 + max((known.number for known in insertions(model).values()), default=0)
    plain = Insertion(number, spot.place, spot.way, tuple(layers), newest_stage(model) + 1, {})
    source, found = spot.source, tensors_of(model)
    own = source.bias if source.bias in found else source.weight
    norm = f"{spot.norm}.weight" if spot.norm is not None and f"{spot.norm}.weight" in found else own
    follows: dict[str, str] = {}
    for position, layer in enumerate(layers):
        is_layer = layer.kind == "Linear" or layer.kind.startswith("Conv")
        for leaf, _ in layer.build().named_parameters():
            follows[f"{plain.name(position)}.{leaf}"] = (
                norm if not is_layer else source.weight if leaf == "weight" else own
            )
    return Insertion(number, spot.place, spot.way, tuple(layers), plain.stage, follows)


def _be_identity(model: nn.Module, insertion: Insertion, modules: Sequence[nn.Module], example_inputs: Any) -> None:
    layer = modules[0]
    weight = layer.get_parameter("weight")
    nn.init.eye_(weight) if weight.dim() == 2 else nn.init.dirac_(weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.get_parameter("bias"))
    norms = [module for module in modules if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    if norms:
        read = _read_at(model, insertion, example_inputs)
        over = [dim for dim in range(read.dim()) if dim != 1]
        variance, mean = torch.var_mean(read.to(torch.promote_types(read.dtype, torch.float32)), over, correction=0)
        norm = norms[0]
        norm.get_buffer("running_mean").copy_(mean)
        norm.get_buffer("running_var").copy_(variance)
        norm.get_parameter("weight").copy_((variance + norm.eps).sqrt())
        norm.get_parameter("bias").copy_(mean)


def _read_at(model: nn.Module, insertion: Insertion, example_inputs: Any) -> Tensor:
    """What the new layer will read, on the example inputs, in the model's present mode."""
    seen: list[Any] = []
    module = find_module(model, insertion.place)
    assert module is not None
    if insertion.way == "behind":
        handle = module.register_forward_hook(lambda _, args, output: seen.append(output))
    else:
        handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    args, kwargs = as_call(example_inputs)
    try:
        with preserved(model), untouched(model):
            model(*args, **kwargs)
    finally:
        handle.remove()
    if len(seen) != 1 or not isinstance(seen[0], Tensor):
        raise GrowthError(f"insert_layer: {insertion.place!r} passes no single tensor; leave norm=True out")
    return seen[0]


def _start(
    model: nn.Module,
    spot: Spot,
    insertion: Insertion,
    modules: list[nn.Module],
    how: How,
    units: int,
    example_inputs: Any,
    closure: Callable[[], Tensor] | None,
) -> Start:
    """Give the new units of a branch the weights that a growth method starts units with."""
    if how.rewrites or how.needs_closure or how.solves:
        raise GrowthError(
            f"insert_layer: how.{how.name} starts from units that are there already; give GradMax, Random, "
            "ZeroOutgoing or ZeroBoth"
        )
    inner, first, last = unwrap(model), modules[0], modules[-1]
    weights = [first.get_parameter("weight"), last.get_parameter("weight")]
    biases = [] if first.bias is None else [first.get_parameter("bias")]
    for tensor in (*weights, *biases):
        nn.init.zeros_(tensor)
    names = [f"{insertion.place}.{insertion.name(position)}" for position in range(len(modules))]
    assert spot.reader is not None
    present = tensors_of(inner)
    columns = _mean_norm(present, spot.reader, spot.reader.in_dim)
    rows = _mean_norm(present, spot.source, spot.source.out_dim)
    with restored(inner):
        with together(replicas_of(model)):
            if how.needs_directions and closure is None:
                raise GrowthError(f"{how.name} reads gradients: give closure=, a function that returns the loss")
            attach(inner, insertion, modules)
            sites = find_sites(model, example_inputs, include=names[0])
            site = sites[names[0]]
            wanted = {site.name: check_units(sites, sites.widths(model), site.name, units, how)}
        seen = None
        if how.needs_directions:
            assert closure is not None
            watching = observe(model, sites, nagn=False, **observing(sites, wanted, how))
            seen = observe_closure(model, watching, closure)
        with together(replicas_of(model)):
            # There are no present units: their norms are those of the layers before and beside.
            _fill_norm(weights[0], 0, rows)
            _fill_norm(weights[1], 1, columns)
            newborns = Newborns(inner, sites, site, units)
            if seen is not None:
                newborns.directions = seen.site_directions(site.name, how.rank(site, units))
            start = how.start(newborns)
    for tensor in (*weights, *biases):
        nn.init.zeros_(tensor)
    given: dict[str, Tensor] = {
        **{f"{name}.weight": value for name, value in (start.incoming | start.outgoing).items()},
        **{f"{name}.bias": value for name, value in start.bias.items()},
        **start.values,
    }
    for name, module in zip(names, modules, strict=True):
        for leaf, value in tensors_of(module).items():
            if f"{name}.{leaf}" in given:
                value.copy_(given[f"{name}.{leaf}"])
    if how.swaps(site):
        modules[:] = [twin(module) or module for module in modules]
    return start


def _mean_norm(tensors: Mapping[str, Tensor], call: LayerCall, dim: int) -> float:
    weight = tensors[call.weight].detach()
    return float(weight.float().movedim(dim, 0).flatten(1).norm(dim=1).mean())


def _fill_norm(weight: Tensor, dim: int, norm: float) -> None:
    """Every slice of this dimension gets this norm."""
    weight.fill_(norm / (weight.numel() / weight.shape[dim]) ** 0.5)


def _check_kept(model: nn.Module, insertion: Insertion, modules: Sequence[nn.Module], example_inputs: Any) -> None:
    """Run the model with and without the new layer, in evaluation mode."""
    args, kwargs = as_call(example_inputs)
    where = f"insert_layer: with a layer {insertion.way} {insertion.place!r} the model"
    calls: list[None] = []
    with preserved(model), untouched(model), evaluation(model):
        with torch.random.fork_rng(devices=[]):
            expected = [leaf for leaf in pytree.tree_leaves(model(*args, **kwargs)) if isinstance(leaf, Tensor)]
        attach(model, insertion, modules)
        first, modes = modules[0], [(module, module.training) for module in modules]

        def counted(x: Tensor) -> Any:
            calls.append(None)
            return type(first).forward(first, x)

        try:
            vars(first)["forward"] = counted  # not by a hook: torch's fast paths step aside for one
            for module in modules:
                module.eval()
            actual = [leaf for leaf in pytree.tree_leaves(model(*args, **kwargs)) if isinstance(leaf, Tensor)]
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise GrowthError(
                f"{where} does not run ({reason}): its code uses the module there for more than a call; name another "
                "layer, or wrap it in a module of its own"
            ) from error
        finally:
            vars(first).pop("forward", None)
            for module, training in modes:
                module.train(training)
    if len(calls) != 1:
        raise GrowthError(
            f"{where} calls it {len(calls)} times in evaluation mode; wanted once. Where its code reads the module's "
            "weights itself (torch's fast path of nn.TransformerEncoderLayer), name another layer"
        )
    for one, other in zip(actual, expected, strict=True):
        if not _same(one, other):
            raise GrowthError(
                f"{where} computes something else; give another activation=, or units= with how.ZeroOutgoing"
            )


def _same(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or not other.is_floating_point():
        return one.shape == other.shape
    allowed = _ROUNDING.get(other.dtype, 2e-2) * float(other.nan_to_num(0, 0, 0).abs().max()) if other.numel() else 0.0
    return torch.allclose(one, other, rtol=0.0, atol=allowed, equal_nan=True)
