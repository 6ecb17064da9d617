"""Time to import the package, list its models and create a small one, in separate processes, compared with timm and transformers.

python -m benchmarks.startup
"""

from __future__ import annotations

import subprocess
import sys
from functools import partial

from benchmarks.measure import compare, record

TINY = "hidden_size=64, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, linear_num_key_heads=4, linear_num_value_heads=4"
QUESTIONS = {
    "import": {"ours": "import zoo", "timm": "import timm", "transformers": "import transformers"},
    "names of all models": {
        "ours": "import zoo; zoo.list_models()",
        "timm": "import timm; timm.list_models()",
        "transformers": "import transformers; transformers.AutoConfig; list(transformers.CONFIG_MAPPING)",
    },
    "a small model": {
        "ours": "import zoo; zoo.create('gdn4-sleep4')",
        "timm": "import timm; timm.create_model('resnet10t')",
        "transformers": f"import transformers as t; t.AutoModelForCausalLM.from_config(t.Qwen3_5TextConfig({TINY}, vocab_size=64))",
        "torch alone": "import torch",
    },
}


def run(code: str) -> None:
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def main() -> None:
    rows = []
    for question, codes in QUESTIONS.items():
        contenders, problems = {}, {}
        for name, code in codes.items():
            try:
                run(code)
            except subprocess.CalledProcessError as error:
                problems[name] = error.stderr.decode().strip().splitlines()[-1][:60]
            else:
                contenders[name] = partial(run, code)
        row = compare(question, contenders, rounds=5, unit="s", target=1)
        rows.append(row | {"problems": problems})
    rows.append(
        compare("zoo list", {"ours": partial(run, "import sys; sys.argv = ['zoo', 'list']; from zoo.cli import main; main()")}, unit="s")
    )
    record("startup", rows)


if __name__ == "__main__":
    main()
