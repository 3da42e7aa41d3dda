"""What describes an exported model: config.json, generation_config.json, the model card. Nothing here imports torch."""

import json
from typing import Any

from mempar import __version__
from mempar.memory.config import MemoryConfig
from mempar.runtime.config import RunConfig
from mempar.runtime.overrides import to_mapping
from mempar.tools.convert.hf.kept_settings import LENGTH, TOKENS, KeptSettings
from mempar.tools.convert.hf.tokenizer_files import TokenizerFiles

MODELING = "modeling_mempar.py"
CONFIG, GENERATION_CONFIG, CARD = "config.json", "generation_config.json", "README.md"
# In config.json, what is needed for the way back: transformers keeps it, but makes nothing of it.
OURS = "mempar"
# More of them would make every step of generation slow.
_MOST_SUPPRESSED = 1024
# Settings of a memory that decide what it computes, beside its place and its sizes.
_MEMORY_KEYS = (
    "variant",
    "beside",
    "num_subkeys",
    "heads",
    "top_k",
    "key_dim",
    "score_dtype",
    "qk_norm",
    "scalar_gate",
)


def is_llama(run: RunConfig) -> bool:
    """Whether a model is a plain Llama, which transformers knows by itself."""
    return not run.memories and not run.moe.enabled


def model_config(
    run: RunConfig, vocab_rows: int, dtype: str, eod: int | None, progress: dict[str, Any], kept: KeptSettings
) -> bytes:
    """The content of config.json.

    Args:
        run: the model, and the run that made it.
        vocab_rows: rows of the embedding, padding included.
        dtype: of the parameters, as torch spells it.
        eod: the token that ends documents.
        progress: how far the run was.
        kept: what the model that it began with said.
    """
    config = settings_of(run)
    # Again the names of 4 and 5.
    config |= {"vocab_size": vocab_rows, "eos_token_id": eod, "torch_dtype": dtype, "dtype": dtype} | kept.config
    config[LENGTH] = max(run.train.seq_length, kept.config.get(LENGTH, 0))
    config[OURS] = {"version": __version__, "run": to_mapping(run), "progress": progress}
    return _json(config)


def settings_of(run: RunConfig) -> dict[str, Any]:
    """The settings of config.json that a run decides."""
    model = run.model
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.query_groups,
        "head_dim": model.hidden_size // model.num_attention_heads,
        "hidden_act": "silu",
        "rms_norm_eps": model.norm_epsilon,
        # The first name is that of transformers 4, the second that of 5.
        "rope_theta": float(model.rotary_base),
        "rope_parameters": {"rope_type": "default", "rope_theta": float(model.rotary_base)},
        "max_position_embeddings": run.train.seq_length,
        "initializer_range": model.init_std,
        "tie_word_embeddings": model.tie_embeddings,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": None,
        "pad_token_id": None,
    }
    if not is_llama(run):
        module = MODELING.removesuffix(".py")
        config |= {
            "architectures": ["MemparForCausalLM"],
            "model_type": "mempar",
            "auto_map": {
                "AutoConfig": f"{module}.MemparConfig",
                "AutoModelForCausalLM": f"{module}.MemparForCausalLM",
            },
            "memories": [_memory(run, name, memory) for name, memory in run.memories.items()],
            "experts": _experts(run),
        }
    return config


def _memory(run: RunConfig, name: str, memory: MemoryConfig) -> dict[str, Any]:
    settings = {key: getattr(memory, key) for key in _MEMORY_KEYS}
    return {"name": name, "layers": list(memory.layers), "value_dim": run.value_dim_of(memory), **settings}


def _experts(run: RunConfig) -> dict[str, Any] | None:
    if not run.moe.enabled:
        return None
    return {
        "layers": list(run.moe_layers),
        "num_experts": run.moe.num_experts,
        "top_k": run.moe.top_k,
        "intermediate_size": run.expert_ffn_hidden_size,
    }


def generation_config(eod: int | None, vocab_size: int | None, vocab_rows: int, kept: KeptSettings) -> bytes:
    """The content of generation_config.json.

    Args:
        eod: the token that ends documents.
        vocab_size: tokens that the tokenizer has, where that is known.
        vocab_rows: rows of the embedding, padding included.
        kept: what the model that it began with said.
    """
    config: dict[str, Any] = {} if eod is None else {"eos_token_id": eod, "pad_token_id": eod}
    for section in (kept.config, kept.generation):
        config |= {name: section[name] for name in TOKENS if name in section}
    padding = vocab_rows - (vocab_rows if vocab_size is None else vocab_size)
    if vocab_size is not None and 0 < padding <= _MOST_SUPPRESSED:
        special = [token for ids in config.values() for token in (ids if isinstance(ids, list) else [ids])]
        # Nobody trained them, and no text says them.
        suppressed = [token for token in range(vocab_size, vocab_rows) if token not in special]
        config |= {"suppress_tokens": suppressed} if suppressed else {}
    return _json(config)


def model_card(run: RunConfig, num_params: int, tokenizer: TokenizerFiles) -> bytes:
    """The content of README.md: what the model is and how it is loaded."""
    trust = "" if is_llama(run) else ", trust_remote_code=True"
    parts = [f"{run.model.num_layers} blocks of width {run.model.hidden_size}"]
    parts += [
        f"a {memory.variant} of {memory.num_slots} slots {'beside' if memory.beside else 'in place of'} the "
        f"feed-forward networks of blocks {', '.join(map(str, memory.layers))}"
        for memory in run.memories.values()
    ]
    if run.moe.enabled:
        parts.append(f"{run.moe.num_experts} experts in blocks {', '.join(map(str, run.moe_layers))}")
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [mempar]",
        "---",
        "",
        f"# {run.name}",
        "",
        f"A language model of {num_params:,} parameters, trained with mempar {__version__}: {'; '.join(parts)}.",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f"model = AutoModelForCausalLM.from_pretrained(path{trust})",
        *([] if tokenizer.note else [f"tokenizer = AutoTokenizer.from_pretrained(path{trust})"]),
        "```",
        "",
    ]
    if tokenizer.note:
        lines += [tokenizer.note, ""]
    if run.memories:
        lines += [
            "The tables of its memory stay on disk: rows are read from memory-mapped files when they are needed, so "
            "they may be larger than the machine's memory. `model.to(...)` and `model.half()` leave them as they are.",
            "",
        ]
    return "\n".join(lines).encode()


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()
