"""Imported once by the server that ranks are forked from. Starts no thread and touches no tensor: forks would inherit
half of it.
"""

import gc
import os

os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")
if "LONGFT_TEST_ON_GPUS" not in os.environ:  # set by tests/gpu
    os.environ.update(DS_ACCELERATOR="cpu", CUDA_VISIBLE_DEVICES="")

import datasets  # noqa: F401
import deepspeed  # noqa: F401
import matplotlib.pyplot  # noqa: F401
import transformers.models.llama.modeling_llama  # noqa: F401
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

if "LONGFT_TEST_ON_GPUS" not in os.environ:
    # peft brings bitsandbytes, which asks CUDA what device there is: no fork can use the device then
    import peft  # noqa: F401

    import ds_longft.train.engine
    import ds_longft.train.run  # noqa: F401

# Made with the first model that is loaded, a thousand regular expressions: by each rank, were it not for this.
get_checkpoint_conversion_mapping("llama")

# DeepSpeed collects garbage with each engine, which would walk through all that is imported here: a second each time.
gc.collect()
gc.freeze()
