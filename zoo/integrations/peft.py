"""Default layers of peft's LoRA in models of this package, also in their transformers form: the projections of the blocks."""

from zoo.errors import ZooError

try:
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULT_LAYERS
except ImportError:
    raise ZooError("peft: not installed; pip install 'sleep-zoo[integrations]'") from None

DEFAULT_LAYERS["sleep_zoo"] = r"(.*\.)?blocks\..*_proj"
