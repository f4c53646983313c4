"""Training without Ray: one step after the other, in one process or in step with others.

Processes of one `torch.distributed` group each take their share of a batch. What they compute is what one process
computes with the whole batch, however the shares are cut: a loss is a sum over pixels or images, divided by what the
batch has of them in all processes (see `loss`). Batch norms alone see their own process's part, unless they are
synchronised.
"""

import contextlib
import dataclasses
import hashlib
from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torchvision.models.segmentation.fcn import FCNHead

from segray import model
from segray.errors import SettingsError
from segray.loss import Loss
from segray.model import Checkpoint, Preprocessing
from segray.schedule import Optimization, rate

__all__ = ["Learner", "Strategy"]

Strategy = Literal["ddp", "fsdp"]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_PROBE_SIDE = 128


class Learner:
    """A model that learns.

    Attributes:
        num_steps_done: how many steps it has taken.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        settings: Optimization,
        loss: Loss,
        num_steps: int,
        *,
        device: str = "cpu",
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        strategy: Strategy = "ddp",
        auxiliary: float = 0.0,
        compiled: bool = False,
        sync_batch_norm: bool = False,
        seed: int = 0,
    ) -> None:
        """Builds the model on its device, in step with the other processes where there are any.

        Args:
            checkpoint: where it begins.
            settings: how it is optimised.
            loss: what it is to make small.
            num_steps: of the whole training, which the learning rate's schedule spans.
            device: torch's name of a device.
            dtype: what forward and backward compute in; weights, and the loss, are float32.
            strategy: what processes share: copies of the model (DDP), or its weights in pieces (FSDP2).
            auxiliary: weight of the loss of a second head (that of FCN) on the backbone's last but one features,
                which is left behind when training ends (Zhao et al. 2017); 0: there is none.
            compiled: whether torch.compile is used.
            sync_batch_norm: whether batch norms see the batches of all processes; on GPUs.
            seed: of dropout, and of the second head's weights.

        Raises:
            SettingsError: the settings do not go together, or the model has no place for a second head.
        """
        self._checkpoint = checkpoint
        self._settings = settings
        self._loss = loss
        self._num_steps = num_steps
        self._device = torch.device(device)
        self._dtype = _DTYPES[dtype]
        self._auxiliary = auxiliary
        self._seed = seed
        self.num_steps_done = 0
        self._world = dist.get_world_size() if dist.is_initialized() else 1
        self._rank = dist.get_rank() if dist.is_initialized() else 0
        if dtype == "float16" and strategy == "fsdp":
            raise SettingsError(
                "--dtype float16 needs a scaled loss, which does not go with --strategy fsdp; bfloat16 does"
            )

        torch.manual_seed(seed)
        bare = model.build(checkpoint)
        self._net = _Net(bare, checkpoint.preprocessing, with_auxiliary=auxiliary > 0)
        if sync_batch_norm:
            self._net = nn.SyncBatchNorm.convert_sync_batchnorm(self._net)  # type: ignore[no-untyped-call]
        self._net.to(self._device)
        if strategy == "ddp":  # FSDP takes weights in their plain order alone
            self._net.to(memory_format=torch.channels_last)
        self._frozen = _backbone(self._net.model) if settings.backbone_rate == 0 else None
        if self._frozen is not None:
            self._frozen.requires_grad_(False)
        self._train()
        if strategy == "fsdp" and self._world > 1:
            mesh = init_device_mesh(self._device.type, (self._world,))
            for child in _pieces(self._net.model):
                fully_shard(child, mesh=mesh)
            fully_shard(self._net, mesh=mesh)
        self._optimizer = _optimizer(self._net, settings)
        self._scaler = torch.amp.GradScaler(self._device.type, enabled=self._dtype == torch.float16)
        runs: Any = torch.compile(self._net) if compiled else self._net
        if strategy == "ddp" and self._world > 1:
            # Encoders of less than their full depth have layers that lead nowhere.
            runs = DistributedDataParallel(runs, find_unused_parameters=True)
        self._runs: Any = runs
        self._average = None
        if settings.ema is not None:
            self._average = {name: tensor.detach().clone() for name, tensor in self._net.model.state_dict().items()}

    def step(
        self,
        images: UInt8[Tensor, "batch height width 3"] | Float[Tensor, "batch height width bands"],
        targets: Int64[Tensor, "batch height width"],
    ) -> Float[Tensor, ""]:
        """Takes a step on this process's share of a batch.

        Args:
            images: RGB, or the values of bands, NaN where there are no data; on any device.
            targets: class ids.

        Returns:
            This share's part of the batch's loss, on the device; the sum over all processes is the loss.
        """
        settings = self._settings
        torch.manual_seed(self._step_seed())  # of dropout, so that what is resumed goes on as it would have
        for group in self._optimizer.param_groups:
            group["lr"] = group["full_rate"] * rate(settings, self.num_steps_done, self._num_steps)
        images, targets = (values.to(self._device, non_blocking=True) for values in (images, targets))
        denominators = self._loss.denominators(targets)
        if self._world > 1:
            dist.all_reduce(denominators)
        total = torch.zeros((), device=self._device)
        parts = list(
            zip(images.tensor_split(settings.accumulate), targets.tensor_split(settings.accumulate), strict=True)
        )
        for number, (image, target) in enumerate(parts, 1):
            with self._together(is_last=number == len(parts)):
                with torch.autocast(self._device.type, self._dtype, enabled=self._dtype != torch.float32):
                    outputs = self._runs(image)
                weights = (1.0, self._auxiliary)
                losses = [
                    weight * self._loss(_scaled_to(output, target), target, denominators)
                    for weight, output in zip(weights, outputs, strict=False)
                ]
                part = torch.stack(losses).sum()
                # DDP and FSDP take the mean over processes, where the sum is meant.
                self._scaler.scale(part * self._world).backward()  # type: ignore[no-untyped-call]
            total += part.detach()
        if settings.clip is not None:
            self._scaler.unscale_(self._optimizer)
            torch.nn.utils.clip_grad_norm_(self._net.parameters(), settings.clip)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._optimizer.zero_grad()
        self.num_steps_done += 1
        self._follow()
        return total

    @property
    def learning_rate(self) -> float:
        """Of the newest step, that of the head."""
        return self._settings.learning_rate * rate(self._settings, max(self.num_steps_done - 1, 0), self._num_steps)

    def _align(self) -> None:
        """Gives all processes the first one's batch norm statistics, so that they hold the same model."""
        if self._world > 1:
            for tensor in (*self._net.buffers(), *(self._average or {}).values()):
                if not isinstance(tensor, DTensor):
                    dist.broadcast(tensor, 0)

    def checkpoint(self) -> Checkpoint:
        """The model as it is, or its moving average where there is one; every process of a group has to call this."""
        self._align()
        source = self._average or self._net.model.state_dict()
        return dataclasses.replace(
            self._checkpoint, tensors={name: _whole(tensor).cpu() for name, tensor in source.items()}
        )

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Copies, on the CPU, of all that training goes on from; every process of a group has to call this.

        The same for any number of processes and either strategy.

        Returns:
            Tensors by name, and what is no tensor.
        """
        self._align()
        tensors = {f"net.{name}": tensor for name, tensor in self._net.state_dict().items()}
        tensors |= {f"average.{name}": tensor for name, tensor in (self._average or {}).items()}
        for name, parameter in self._net.named_parameters():
            for key, value in self._optimizer.state[parameter].items():
                if value is not None:
                    tensors[f"optimizer.{name}.{key}"] = value
        whole = {name: _whole(tensor).detach().to("cpu", copy=True) for name, tensor in tensors.items()}
        return whole, {"step": self.num_steps_done, "scaler": self._scaler.state_dict()}

    def load(self, tensors: dict[str, Tensor], scalars: dict[str, Any]) -> None:
        """Goes on from what `state` gave.

        Raises:
            KeyError: it is that of another model or of other settings.
        """
        with torch.no_grad():
            for name, tensor in self._net.state_dict().items():
                tensor.copy_(_as(tensors[f"net.{name}"], tensor))
            for name, tensor in (self._average or {}).items():
                tensor.copy_(_as(tensors[f"average.{name}"], tensor))
        parameters = dict(self._net.named_parameters())
        for full_name, value in tensors.items():
            if full_name.startswith("optimizer."):
                name, _, key = full_name.removeprefix("optimizer.").rpartition(".")
                parameter = parameters[name]
                # The optimisers keep their counts of steps on the CPU.
                self._optimizer.state[parameter][key] = value.clone() if key == "step" else _as(value, parameter)
        if scalars["scaler"] and self._scaler.is_enabled():  # it may go on in another precision
            self._scaler.load_state_dict(scalars["scaler"])
        self.num_steps_done = scalars["step"]

    def _train(self) -> None:
        self._net.train()
        if self._frozen is not None:
            self._frozen.eval()

    def _step_seed(self) -> int:
        text = f"{self._seed} {self.num_steps_done} {self._rank}"
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "big")

    @contextlib.contextmanager
    def _together(self, *, is_last: bool) -> Iterator[None]:
        """Has gradients meet those of other processes once a step: after a batch's last part."""
        if isinstance(self._net, FSDPModule):
            self._net.set_requires_gradient_sync(is_last)
        held_back = isinstance(self._runs, DistributedDataParallel) and not is_last
        with self._runs.no_sync() if held_back else contextlib.nullcontext():
            yield

    def _follow(self) -> None:
        """Brings the moving average nearer to the weights."""
        if self._average is None or self._settings.ema is None:
            return
        # Early on a short memory, or the random begin would stay in it for long.
        decay = min(self._settings.ema, (1 + self.num_steps_done) / (10 + self.num_steps_done))
        with torch.no_grad():
            now = self._net.model.state_dict()
            floating = [name for name, tensor in now.items() if tensor.is_floating_point()]
            update = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
            for is_cut in (False, True):  # what FSDP cuts, and what it leaves, do not go into one call
                names = [name for name in floating if isinstance(now[name], DTensor) == is_cut]
                if names:
                    update([self._average[name] for name in names], [now[name] for name in names], 0)
            for name in now.keys() - set(floating):
                self._average[name].copy_(now[name])


class _Net(nn.Module):
    """A model from bytes to logits, with a second head where one is asked for."""

    def __init__(self, bare: nn.Module, preprocessing: Preprocessing, *, with_auxiliary: bool) -> None:
        super().__init__()
        self.model = bare
        self._preprocessing = preprocessing
        self.head: nn.Module | None = None
        if with_auxiliary:
            features = _features(bare)
            if features is None:
                raise SettingsError(
                    f"--auxiliary: {type(bare).__name__} has no place for a second head; FCN, DeepLabV3 with a ResNet "
                    "and the models of segmentation-models-pytorch have"
                )
            features.register_forward_hook(self._keep)
            self._kept: Tensor | None = None
            with torch.no_grad():
                out = model.logits(bare.eval(), torch.zeros(1, len(preprocessing.channels), _PROBE_SIDE, _PROBE_SIDE))
            assert self._kept is not None
            self.head = FCNHead(self._kept.shape[1], out.shape[1])

    def _keep(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self._kept = output if isinstance(output, Tensor) else output[-2]

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """(batch, height, width, channels) → logits of the model, and of the second head, each of its own size."""
        values = model.normalised(images.permute(0, 3, 1, 2), self._preprocessing)
        if self._preprocessing.bands is not None:
            values = values.nan_to_num(nan=0.0)  # what holds no data is the band's mean, as in labelling
        logits = model.logits(self.model, values.contiguous(memory_format=torch.channels_last))
        if self.head is None:
            return (logits,)
        kept, self._kept = self._kept, None
        return logits, self.head(kept)


def _features(bare: nn.Module) -> nn.Module | None:
    """The module whose output, or whose last but one, is a backbone's last but one features."""
    encoder: Any = getattr(bare, "encoder", None)
    if encoder is not None:
        found: nn.Module = encoder
        return found
    backbone: Any = getattr(bare, "backbone", {})
    return backbone["layer3"] if "layer3" in backbone else None


def _backbone(bare: nn.Module) -> nn.Module:
    """What published weights of a classifier would fill."""
    encoder: Any = getattr(bare, "encoder", None)
    backbone: nn.Module = encoder if encoder is not None else bare.backbone  # type: ignore[assignment]
    return backbone


def _pieces(bare: nn.Module) -> Iterator[nn.Module]:
    """The parts of a model whose weights are brought together at one time: those whose own `forward` is called."""
    for child in bare.children():
        if any(True for _ in child.parameters()):
            yield child


def _optimizer(net: _Net, settings: Optimization) -> torch.optim.Optimizer:
    """With groups of parameters: the backbone's at a rate of their own, biases and norms without decay."""
    of_backbone = {id(parameter) for parameter in _backbone(net.model).parameters()}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for parameter in net.parameters():
        if parameter.requires_grad:
            full_rate = settings.learning_rate * (settings.backbone_rate if id(parameter) in of_backbone else 1)
            decay = settings.weight_decay if parameter.ndim > 1 else 0.0
            groups.setdefault((full_rate, decay), []).append(parameter)
    described = [
        {"params": some, "lr": full_rate, "full_rate": full_rate, "weight_decay": decay}
        for (full_rate, decay), some in groups.items()
    ]
    if settings.optimizer == "sgd":
        return torch.optim.SGD(described, momentum=settings.momentum)
    return torch.optim.AdamW(described)


def _scaled_to(logits: Tensor, target: Tensor) -> Tensor:
    if logits.shape[-2:] == target.shape[-2:]:
        return logits.float()
    return F.interpolate(logits.float(), target.shape[-2:], mode="bilinear", align_corners=False)


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _as(whole: Tensor, like: Tensor) -> Tensor:
    """A copy, cut and placed as another of its shape is."""
    there = whole.to(like.device, copy=True)
    if isinstance(like, DTensor) and whole.shape == like.shape:
        return distribute_tensor(there, like.device_mesh, like.placements)
    return there
