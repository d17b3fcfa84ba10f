"""The optional packages of these programs; modules of examples/train can be imported from here on."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "examples" / "train"))
from packages import Package

hf = Package("entmaxkv.hf", "bench")
matplotlib = Package("matplotlib", "bench")
np = Package("numpy", "bench")
plt = Package("matplotlib.pyplot", "bench")
rich = Package("rich", "bench")
safetensors = Package("safetensors", "bench")
transformers = Package("transformers", "bench")
