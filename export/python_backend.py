"""The model of Triton Inference Server's Python backend: one session of a bundle for each sequence of requests.

The `model.py` that `zoo-export --triton-server` writes imports it, so the server's Python needs this package.
"""

from __future__ import annotations

import importlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from zoo.errors import ZooError
from zoo.export.runtime import ExportedModel
from zoo.sessions.session import Session

SEQUENCES = 64  # read at the same time; more wait


class TritonPythonModel:
    """Answers requests of many sequences. The server calls these methods, from one thread."""

    def initialize(self, args: Mapping[str, str]) -> None:
        self._server: Any = importlib.import_module("triton_python_backend_utils")  # exists in the server's processes only
        torch.set_num_threads(1)  # the graphs run in onnxruntime
        self._model = ExportedModel(Path(args["model_repository"]) / args["model_version"])
        self._sessions: OrderedDict[int, Session] = OrderedDict()
        """The session of each sequence by its correlation id, the least recently used first."""

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Return the responses to requests of different sequences."""
        return [self._response(request) for request in requests]

    def _response(self, request: Any) -> Any:
        def tensor(name: str) -> Tensor:
            # not through NumPy: the server may be built for another version of it
            return from_dlpack(self._server.get_input_tensor_by_name(request, name))

        sequence = int(tensor("CORRID").item())
        try:
            if tensor("START").item():
                self._sessions[sequence] = Session(self._model)
                while len(self._sessions) > SEQUENCES:  # the server does not say that it has dropped a silent sequence
                    self._sessions.popitem(last=False)
            self._sessions.move_to_end(sequence)
            logits = self._sessions[sequence].feed(tensor("input_ids").clone())[:, -1:]
            response = self._server.InferenceResponse([self._server.Tensor.from_dlpack("logits", logits.contiguous())])
        except KeyError:
            return self._refused(f"sequence {sequence}: does not exist; its first request must be marked as the start")
        except ZooError as error:
            if tensor("START").item() or tensor("END").item():  # a refused start has no sequence; nothing follows an end
                self._sessions.pop(sequence, None)
            return self._refused(str(error))
        if tensor("END").item():
            del self._sessions[sequence]
        return response

    def _refused(self, message: str) -> Any:
        return self._server.InferenceResponse(error=self._server.TritonError(message))
