"""Hugging Face: models of ours as ones that transformers loads, and Llamas as models of ours.

tensor_names          which tensors of the one are which parts of the other's
safetensors_file      files of tensors, written in any order and read without trust
modeling_mempar       the model as torch and transformers compute it; copied into what is exported
model_files           config.json and the model card
tokenizer_files       the tokenizer, as far as there is one that transformers can load
to_hf, from_hf        the way there, and the way back
llama_config          the settings of a Llama as those of a run
kept_settings         what a Llama says beside them, for an export to say again
"""

from mempar.tools.convert.hf.from_hf import HfSource
from mempar.tools.convert.hf.to_hf import plan_hf

__all__ = ["HfSource", "plan_hf"]
