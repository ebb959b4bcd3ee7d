"""Imported once by the server that ranks are forked from. Starts no thread and touches no tensor: forks would inherit
half of it."""

import os

os.environ.update(DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")

import datasets  # noqa: E402, F401
import deepspeed  # noqa: E402, F401
import matplotlib.pyplot  # noqa: E402, F401
import peft  # noqa: E402, F401
import transformers.models.llama.modeling_llama  # noqa: E402, F401

import ds_longft.train.engine  # noqa: E402
import ds_longft.train.run  # noqa: E402, F401
