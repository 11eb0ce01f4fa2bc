"""What a packed checkpoint's file of code imports, so that transformers loads it without ``import stoicc``.

    AutoModelForCausalLM.from_pretrained("packed", trust_remote_code=True)

transformers reads no entry points. What it does read from a checkpoint is a file of code, if it is told to trust it.
"""

from typing import Any

from transformers import AutoModelForCausalLM

import stoicc.quantizer  # noqa: F401  # registers itself


class PackedForCausalLM:
    """What the file hands to transformers: it loads the model's own class, now that our quantizer is known."""

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Asked of every class of remote code, which ours is not: nothing is to be saved of it."""

    @classmethod
    def from_pretrained(cls, path: str, *args: Any, config: Any, **options: Any) -> Any:
        # transformers has just made this class that of all models of the kind.
        AutoModelForCausalLM._model_mapping._extra_content.pop(type(config), None)
        options["trust_remote_code"] = False
        return AutoModelForCausalLM.from_pretrained(path, *args, config=config, **options)
