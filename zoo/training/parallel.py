"""Data-parallel training in the processes that torchrun starts: collectives, DDP, FSDP2, and sharded tensors in files."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from zoo.checkpoints.checksum import add_checksum, metadata
from zoo.devices import usable_device
from zoo.files import replacing
from zoo.model import Model
from zoo.state import Answers

Parallel = Literal["ddp", "fsdp"]
Answer = Callable[..., Answers]
"""`Model.answers`, possibly wrapped for DDP or FSDP2."""
GLOO = 0.1
"""Seconds in which gloo's threads drop their last tensors, for which they need the GIL: while Python exits, that aborts the process."""


class Team:
    """The processes that train one model. Every method is a collective: all processes call it. With one process it is trivial."""

    def __init__(self, device: torch.device, rank: int = 0, size: int = 1) -> None:
        self.device, self.rank, self.size = device, rank, size
        self._replicated: list[nn.Parameter] = []

    @property
    def is_main(self) -> bool:
        """True on rank 0, which writes files and reports."""
        return self.rank == 0

    def rows(self, count: int) -> Tensor:
        """Return the indices of this rank's shard of `count` sequences; every rank gets at least one, repeated if there are too few."""
        return torch.arange(max(count, self.size)).tensor_split(self.size)[self.rank] % count

    def sum(self, number: float) -> float:
        """All-reduce: the sum over the processes."""
        return self._all_reduce(torch.tensor(number, dtype=torch.float64), dist.ReduceOp.SUM).item()

    def max(self, tensor: Tensor) -> Tensor:
        """All-reduce: the element-wise maximum over the processes."""
        return self._all_reduce(tensor, dist.ReduceOp.MAX)

    def any(self, flag: bool) -> bool:
        """True if the flag is set on any process."""
        return self.sum(flag) > 0

    def broadcast(self, text: str | None) -> str:
        """Broadcast the text of rank 0 and return it."""
        texts = [text]
        if self.size > 1:
            dist.broadcast_object_list(texts, device=self.device)
        assert texts[0] is not None
        return texts[0]

    def barrier(self) -> None:
        """Wait at a barrier until all processes have arrived."""
        self.sum(0)

    def save(self, tensors: Mapping[str, Tensor], file: Path) -> None:
        """Write a safetensors file atomically.

        Each process writes its shards of sharded tensors (torch.distributed.checkpoint), then rank 0 joins them into one file,
        which does not depend on the number of processes.
        """
        if not any(isinstance(tensor, DTensor) for tensor in tensors.values()):
            if self.is_main:
                contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
                with replacing(file) as scratch:
                    save_file(contiguous, scratch, metadata=metadata(contiguous))
            return
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
        from torch.distributed.checkpoint.state_dict_saver import save

        parts = file.with_name(f".{file.stem}-00000000")  # the same name on all ranks
        writer = HuggingFaceStorageWriter(str(parts), save_distributed=True, enable_consolidation=True)
        save(dict(tensors), storage_writer=writer)
        if self.is_main:
            _fill_scalars(tensors, joined := parts / "model-00001-of-00001.safetensors")
            with replacing(file) as scratch:
                add_checksum(joined, scratch)
            shutil.rmtree(parts)

    def _all_reduce(self, tensor: Tensor, operation: Any) -> Tensor:
        if self.size == 1:
            return tensor
        reduced = tensor.to(self.device)
        dist.all_reduce(reduced, operation)
        return reduced.to(tensor.device)

    def parallelize(self, model: Model, strategy: Parallel) -> Answer:
        """Wrap `model` for training on all processes and return its `answers`. Gradients are averaged over the processes.

        ddp: every process holds the full model. fsdp: each holds a shard of the rows of every parameter, gradient and
        optimiser state (FSDP2). Parameters stay gathered from the first chunk of a step to its last gradient, since a sleeping
        model reads each of them many times. The float32 parameters of a 16-bit model, which are small, are not sharded, since
        FSDP2 takes one dtype per block; `average_replicated` averages their gradients.
        """
        if self.size == 1:
            return model.answers
        if strategy == "ddp":
            # an exit gate may get no gradient, nor may the injection while a ramp is at one pass, nor gates of a span with a dead end
            unused = model.exit is not None or bool(model.config.inject) or model.config.residual_gates > 0
            unused |= model.config.learned_positions == "asleep"  # nor positions while nothing sleeps
            return nn.parallel.DistributedDataParallel(_Answers(model), find_unused_parameters=unused)
        self._replicated = [p for p in model.parameters() if p.dtype != model.dtype and p.requires_grad]
        # harmless: blocks never change a tensor in place
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

        options: Any = {
            "mesh": dist.device_mesh.init_device_mesh(self.device.type, (self.size,)),
            "reshard_after_forward": False,
            "mp_policy": MixedPrecisionPolicy(reduce_dtype=torch.float32),
            "ignored_params": set(self._replicated),
        }
        for block in model.blocks:
            fully_shard(block, **options)
        sharded = fully_shard(model, **options)
        sharded.set_reshard_after_backward(False)
        register_fsdp_forward_method(model, "answers")
        return model.answers

    def average_replicated(self) -> None:
        """Average the gradients of the parameters that FSDP2 does not shard. A collective."""
        if gradients := [p.grad for p in self._replicated if p.grad is not None]:
            mean = self._all_reduce(torch.cat([gradient.flatten() for gradient in gradients]), dist.ReduceOp.SUM) / self.size
            for gradient, part in zip(gradients, mean.split([gradient.numel() for gradient in gradients]), strict=True):
                gradient.copy_(part.view_as(gradient))


class _Answers(nn.Module):
    """A model whose forward pass is `answers`, for DDP to wrap."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **options: Any) -> Answers:
        return self.model.answers(*args, **options)


def _fill_scalars(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Write the scalar tensors, which torch 2.13 leaves empty when it joins the shards of a file."""
    with file.open("r+b") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(size))
        for name, tensor in tensors.items():
            if tensor.ndim == 0:
                stream.seek(8 + size + header[name]["data_offsets"][0])
                stream.write(tensor.reshape(1).cpu().view(torch.uint8).numpy().tobytes())


def is_main_process() -> bool:
    """True in rank 0 of torchrun, and without torchrun."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def join(device: str | None) -> Iterator[Team]:
    """Join the process group that torchrun started; without torchrun, a team of one.

    Args:
        device: default: cuda if available (the GPU of this local rank), else cpu.
    """
    kind = usable_device(device or ("cuda" if torch.cuda.is_available() else "cpu"), meta=False)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Team(kind)
        return
    if kind.type == "cuda":
        kind = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(kind)
    if started := not dist.is_initialized():
        if dist.is_torchelastic_launched():
            threading.Thread(target=_end_with_launcher, args=[os.getppid()], daemon=True).start()
        dist.init_process_group("nccl" if kind.type == "cuda" else "gloo")
    try:
        yield Team(kind, dist.get_rank(), dist.get_world_size())
    finally:
        if started:
            time.sleep(GLOO)
    if started:  # not after an error: the other ranks may never reach this collective
        dist.destroy_process_group()


def _end_with_launcher(launcher: int) -> None:
    """End this rank when torchrun has been killed, which leaves the other ranks without a rendezvous."""
    while os.getppid() == launcher:
        time.sleep(1)
    os._exit(1)


def reshard(model: Model) -> None:
    """Drop the gathered parameters of FSDP2, so that the next step gathers the new ones."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def clip_gradients(parameters: Iterable[nn.Parameter], norm: float) -> Tensor:
    """Scale gradients, of which some may be sharded, to a total norm of at most `norm`; returns their norm. A collective."""
    found = [p for p in parameters if p.grad is not None]
    groups = [[p for p in found if isinstance(p.grad, DTensor) is sharded] for sharded in (True, False)]
    norms = [full(nn.utils.get_total_norm([p.grad for p in group if p.grad is not None])) for group in groups if group]
    total = norms[0] if len(norms) == 1 else torch.stack(norms).norm()
    for group in groups:
        nn.utils.clip_grads_with_norm_(group, norm, total)
    return total


def full(tensor: Tensor) -> Tensor:
    """Gather a tensor that may be sharded. A collective."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a tensor, or the tensor if it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shard_like(tensor: Tensor, like: Tensor | None) -> Tensor:
    """Shard a full tensor the way `like` is sharded, if `like` is of the same shape and sharded."""
    if not isinstance(like, DTensor) or like.shape != tensor.shape:
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
