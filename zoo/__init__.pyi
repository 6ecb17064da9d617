__version__: str

from zoo import export as export
from zoo import kernels as kernels
from zoo.config import ModelConfig as ModelConfig
from zoo.config import list_models as list_models
from zoo.costs import describe as describe
from zoo.kernels.registry import ZooError as ZooError
from zoo.model import Model as Model
from zoo.pool import PoolFullError as PoolFullError
from zoo.pool import SessionPool as SessionPool
from zoo.session import Session as Session
from zoo.state import Answers as Answers
from zoo.state import Output as Output
from zoo.state import State as State
from zoo.weights import create as create
from zoo.weights import load as load
from zoo.weights import save as save
