"""Several processes that train one model, started by torchrun: who does what of a batch, and what DDP and FSDP2 share."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from zoo.files import replacing
from zoo.model import Model
from zoo.state import Answers

Parallel = Literal["ddp", "fsdp"]
Answer = Callable[..., Answers]
"""`Model.answers`, whatever stands between."""


class Team:
    """The processes that train together. Every method is called by all of them at the same time; one process has no wait."""

    def __init__(self, device: torch.device, rank: int = 0, size: int = 1) -> None:
        self.device, self.rank, self.size = device, rank, size

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes files and reports."""
        return self.rank == 0

    def rows(self, count: int) -> Tensor:
        """The sequences of a batch of `count` that this process takes; where there are too few, some are taken twice."""
        return torch.arange(max(count, self.size)).tensor_split(self.size)[self.rank] % count

    def total(self, number: float) -> float:
        """Sum over the processes."""
        return self._reduced(torch.tensor(number, dtype=torch.float64), dist.ReduceOp.SUM).item()

    def most(self, tensor: Tensor) -> Tensor:
        """The largest over the processes, element by element."""
        return self._reduced(tensor, dist.ReduceOp.MAX)

    def any(self, flag: bool) -> bool:
        return self.total(flag) > 0

    def told(self, text: str | None) -> str:
        """What the first process says."""
        said = [text]
        if self.size > 1:
            dist.broadcast_object_list(said, device=self.device)
        assert said[0] is not None
        return said[0]

    def wait(self) -> None:
        """Until all have come here."""
        self.total(0)

    def save(self, tensors: Mapping[str, Tensor], file: Path) -> None:
        """Write a safetensors file, whole or not at all.

        Of tensors that are shared out each process writes what it holds (torch.distributed.checkpoint), then the first puts the
        parts together, so that the file is the same whoever wrote it.
        """
        if not any(isinstance(tensor, DTensor) for tensor in tensors.values()):
            if self.first:
                with replacing(file) as scratch:
                    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, scratch, metadata={"format": "pt"})
            return
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
        from torch.distributed.checkpoint.state_dict_saver import save

        parts = file.with_name(f".{file.stem}")
        writer = HuggingFaceStorageWriter(str(parts), save_distributed=True, enable_consolidation=True)
        save(dict(tensors), storage_writer=writer)
        if self.first:
            _fill_scalars(tensors, joined := parts / "model-00001-of-00001.safetensors")
            os.replace(joined, file)
            shutil.rmtree(parts)

    def _reduced(self, tensor: Tensor, how: Any) -> Tensor:
        if self.size == 1:
            return tensor
        there = tensor.to(self.device)
        dist.all_reduce(there, how)
        return there.to(tensor.device)

    def spread(self, model: Model, how: Parallel) -> Answer:
        """Let `model` train on all processes; returns its `answers`. Gradients are means over the processes.

        ddp: every process holds the whole model. fsdp: each holds a share of the rows of every parameter, gradient and
        optimiser state (FSDP2), and the whole parameters from the first chunk of a step to its last gradient: a sleeping
        model reads each many times, so they are gathered once.
        """
        if self.size == 1:
            return model.answers
        if how == "ddp":
            # an exit gate may have no gradient
            return nn.parallel.DistributedDataParallel(_Answers(model), find_unused_parameters=model.exit is not None)
        # blocks never change a tensor in place
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

        options: Any = {
            "mesh": dist.device_mesh.init_device_mesh(self.device.type, (self.size,)),
            "reshard_after_forward": False,
            "mp_policy": MixedPrecisionPolicy(reduce_dtype=torch.float32),
        }
        for block in model.blocks:
            fully_shard(block, **options)
        sharded = fully_shard(model, **options)
        sharded.set_reshard_after_backward(False)
        register_fsdp_forward_method(model, "answers")
        return model.answers


class _Answers(nn.Module):
    """A model whose forward pass is `answers`, for DDP to wrap."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **options: Any) -> Answers:
        return self.model.answers(*args, **options)


def _fill_scalars(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Write the tensors without dimensions, which torch forgets when it puts the parts of a file together (seen in 2.13)."""
    with file.open("r+b") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(size))
        for name, tensor in tensors.items():
            if tensor.ndim == 0:
                stream.seek(8 + size + header[name]["data_offsets"][0])
                stream.write(tensor.reshape(1).cpu().view(torch.uint8).numpy().tobytes())


def is_first() -> bool:
    """Whether this is the only process of a run, or the first that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def join(device: str | None) -> Iterator[Team]:
    """The team that torchrun started this process in, or a team of one.

    Args:
        device: default cuda where there is one (of several, that of this process), else cpu.
    """
    kind = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Team(kind)
        return
    if kind.type == "cuda":
        kind = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(kind)
    if started := not dist.is_initialized():
        dist.init_process_group("nccl" if kind.type == "cuda" else "gloo")
    yield Team(kind, dist.get_rank(), dist.get_world_size())
    if started:  # not after an error: the others may be waiting for this process to end, not to say goodbye
        dist.destroy_process_group()


def forget_gathered(model: Model) -> None:
    """The optimisers have changed the shares of the parameters: gather them again when they are next read."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def whole(tensor: Tensor) -> Tensor:
    """The tensor of which every process may hold a share. Called by all."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def held(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shared_like(tensor: Tensor, like: Tensor | None) -> Tensor:
    """This process's share of a whole tensor, if `like` is of the same shape and shared."""
    if not isinstance(like, DTensor) or like.shape != tensor.shape:
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
