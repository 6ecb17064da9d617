__version__: str

from zoo import export as export
from zoo import kernels as kernels
from zoo.checkpoints.own import load as load
from zoo.checkpoints.own import save as save
from zoo.config import ModelConfig as ModelConfig
from zoo.costs import describe as describe
from zoo.errors import ZooError as ZooError
from zoo.facets import list_models as list_models
from zoo.factory import create as create
from zoo.model import Model as Model
from zoo.products import arrange_weights as arrange_weights
from zoo.products import matmul_precision as matmul_precision
from zoo.sessions.pool import PoolFullError as PoolFullError
from zoo.sessions.pool import SessionPool as SessionPool
from zoo.sessions.session import Session as Session
from zoo.state import Answers as Answers
from zoo.state import Output as Output
from zoo.state import State as State
