"""Two replicas of the server behind Ray Serve: a conversation stays on one, and the other continues it if that one is lost.

pip install 'ray[serve]'; python examples/ray_serve.py FOLDER STORE [PORT]; requests carry the header X-Session-Id
"""

import sys
from pathlib import Path
from typing import Any

from ray import serve
from ray.serve.config import RequestRouterConfig
from ray.serve.experimental.consistent_hash_router import ConsistentHashRouter

import zoo
from zoo.serving.app import make_app
from zoo.text.tokenizers import load_tokenizer


# Every replica reads the same store; a session belongs to the replica that used it last.
@serve.deployment(num_replicas=2, request_router_config=RequestRouterConfig(request_router_class=ConsistentHashRouter))
@serve.ingress()
class Replica:
    """The app of `zoo serve` in a process of Ray's."""

    def __init__(self, folder: str, store: str) -> None:
        self.folder, self.store = Path(folder), store
        self.pool = zoo.SessionPool(zoo.load(folder), streams=64)

    def __serve_build_asgi_app__(self) -> Any:
        config = self.pool.model.config
        return make_app(self.pool, load_tokenizer(self.folder, config.vocab_size), config.name, store=self.store)


if __name__ == "__main__":
    folder, store, *port = sys.argv[1:]
    serve.start(http_options={"host": "127.0.0.1", "port": int(port[0]) if port else 8000})
    serve.run(Replica.bind(folder, store), blocking=True)  # Ctrl-C or SIGTERM: replicas answer, write their sessions, and end
