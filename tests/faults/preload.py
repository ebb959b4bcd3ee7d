"""Imported once by the server that ranks are forked from. Starts no thread and touches no tensor: forks would inherit
half of it.
"""

import os

os.environ.update(
    DS_ACCELERATOR="cpu",
    OMP_NUM_THREADS="1",
    CUDA_VISIBLE_DEVICES="",
    TOKENIZERS_PARALLELISM="false",
    HF_HUB_OFFLINE="1",
)

import datasets  # noqa: F401
import deepspeed  # noqa: F401
import matplotlib.pyplot  # noqa: F401
import peft  # noqa: F401
import transformers.models.llama.modeling_llama  # noqa: F401

import ds_longft.train.engine
import ds_longft.train.run  # noqa: F401
