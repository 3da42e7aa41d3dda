"""The settings of a Hugging Face Llama as those of a run of ours. Nothing here imports torch.

What our engine does not compute is refused by the name of its setting; of training and data a config.json says nothing,
so that these are left at their defaults.
"""

import math
from pathlib import Path
from typing import Any

from mempar.errors import CheckpointError, ConfigError
from mempar.runtime.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from mempar.tools.convert.hf.model_files import settings_of

# Settings that say the same as their absence.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "partial_rotary_factor": (1, 1.0),
    "quantization_config": (),
    "sliding_window": (),
}
# transformers' own defaults, which its files may leave out.
_DEFAULTS = {"rms_norm_eps": 1e-6, "initializer_range": 0.02, "max_position_embeddings": 2048}
# What decides what an export of ours computes.
_COMPUTED = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "rms_norm_eps",
    "rope_theta",
    "tie_word_embeddings",
    "memories",
    "experts",
)
_DEFAULT_ROTARY_BASE = 10000.0
_MOST_VOCAB_MULTIPLE = 128
# Whatever is larger is no size of anything, and cannot be divided as a float.
_LARGEST_NUMBER = 1 << 53


def llama_run(config: dict[str, Any], root: Path, dtype: str) -> RunConfig:
    """Say a Llama's settings in ours.

    Args:
        config: the content of config.json.
        root: the model's directory, for messages and for its tokenizer.
        dtype: of training, as `train.dtype` has it.

    Raises:
        CheckpointError: for a setting that our engine does not compute, or that is missing or no number.
    """
    for name, neutral in _NEUTRAL.items():
        if config.get(name) is not None and config[name] not in neutral:
            raise _refused(root, name, config[name], f"it must be absent{''.join(f' or {v}' for v in neutral[:1])}")
    heads, width = _number(config, root, "num_attention_heads"), _number(config, root, "hidden_size")
    if config.get("head_dim") not in (None, width / max(1, heads)):
        raise _refused(root, "head_dim", config["head_dim"], f"hidden_size / num_attention_heads is {width / heads}")
    vocab_size = _number(config, root, "vocab_size")
    groups = config.get("num_key_value_heads")
    try:
        return RunConfig(
            model=ModelConfig(
                num_layers=_number(config, root, "num_hidden_layers"),
                hidden_size=width,
                num_attention_heads=heads,
                num_query_groups=0 if groups in (None, heads) else _number(config, root, "num_key_value_heads"),
                ffn_hidden_size=_number(config, root, "intermediate_size"),
                vocab_size=vocab_size,
                # The rows that there are, and no padding beside them.
                vocab_multiple=math.gcd(vocab_size, _MOST_VOCAB_MULTIPLE) or 1,
                rotary_base=_rotary_base(config, root),
                norm_epsilon=_real(config, root, "rms_norm_eps"),
                init_std=_real(config, root, "initializer_range"),
                tie_embeddings=config.get("tie_word_embeddings", False) is True,
            ),
            train=TrainConfig(
                dtype=dtype,
                seq_length=min(TrainConfig().seq_length, int(_real(config, root, "max_position_embeddings"))),
            ),
            data=DataConfig(tokenizer=_tokenizer(root)),
        )
    except CheckpointError:
        raise
    except ConfigError as error:
        raise CheckpointError(f"{root / 'config.json'} describes no model of ours: {error}") from None


def check_settings(config: dict[str, Any], root: Path, run: RunConfig) -> None:
    """Check that a config.json of an export of ours still says what its run does.

    Raises:
        CheckpointError: naming a setting that was changed.
    """
    ours = settings_of(run)
    given = {**config, "rope_theta": float(_rotary_base(config, root))}
    for name in _COMPUTED:
        if given.get(name) != ours.get(name):
            raise CheckpointError(
                f"{root / 'config.json'} has {name}={given.get(name)!r}, but {ours.get(name)!r} by the run that it was "
                "exported from; mempar trains what transformers computes; set both alike."
            )


def _rotary_base(config: dict[str, Any], root: Path) -> int:
    # transformers 5 has one section, 4 had a number and a section of changes to it.
    section = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(section, dict):
        raise _refused(root, "rope_parameters", section, "it is a section of settings")
    kind = section.get("rope_type", section.get("type", "default"))
    if kind != "default":
        raise _refused(root, "rope_scaling", kind, "positions turn by the unscaled angles here (rope_type default)")
    if section.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise _refused(root, "partial_rotary_factor", section["partial_rotary_factor"], "all of a head turns")
    base = section.get("rope_theta", config.get("rope_theta", _DEFAULT_ROTARY_BASE))
    if type(base) not in (int, float) or not 1 <= base < 2**53 or base != int(base):
        raise _refused(root, "rope_theta", base, "it is a whole number here (model.rotary_base)")
    return int(base)


def _tokenizer(root: Path) -> str:
    root = root.absolute()
    if not (root / "tokenizer.json").is_file() and (root / "tokenizer.model").is_file():
        return f"sentencepiece:{root / 'tokenizer.model'}"
    # Where there is none, whose it is is for the run that continues the model to say: none of ours is.
    return f"hf:{root}"


def _number(config: dict[str, Any], root: Path, name: str) -> int:
    value = config.get(name)
    if type(value) is not int or not 0 < value < _LARGEST_NUMBER:
        raise _refused(root, name, value, "it is a positive whole number")
    return value


def _real(config: dict[str, Any], root: Path, name: str) -> float:
    value = config.get(name, _DEFAULTS[name])
    if type(value) not in (int, float) or not 0 < value < _LARGEST_NUMBER:
        raise _refused(root, name, value, "it is a positive number")
    return value


def _refused(root: Path, name: str, value: Any, rule: str) -> CheckpointError:
    return CheckpointError(
        f"{root / 'config.json'} has {name}={value!r}, which mempar does not compute; {rule}; use a model without it."
    )
