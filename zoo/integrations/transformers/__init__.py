"""Sleep Zoo models in transformers: import this module, and AutoModelForCausalLM loads them."""

from zoo.errors import ZooError

try:
    import transformers  # noqa: F401
except ImportError:
    raise ZooError("transformers: not installed; pip install 'sleep-zoo[integrations]'") from None

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from zoo.integrations.transformers.modeling_sleep_zoo import SleepZooConfig, SleepZooForCausalLM, SleepZooModel
from zoo.integrations.transformers.streams import Streams

__all__ = ["SleepZooConfig", "SleepZooForCausalLM", "SleepZooModel", "Streams"]

AutoConfig.register(SleepZooConfig.model_type, SleepZooConfig)
AutoModel.register(SleepZooConfig, SleepZooModel)
AutoModelForCausalLM.register(SleepZooConfig, SleepZooForCausalLM)
# save_pretrained copies the code of these into the folder, for trust_remote_code
SleepZooConfig.register_for_auto_class()
SleepZooModel.register_for_auto_class("AutoModel")
SleepZooForCausalLM.register_for_auto_class("AutoModelForCausalLM")
