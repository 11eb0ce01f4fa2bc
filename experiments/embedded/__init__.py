"""The embedded model: a four-million-parameter LLaMA, its text, its task, and the two scripts that made them.

It exists so that every method can be run, compared and tested from nothing but a clone, in minutes, without a GPU.

=====================  ========================================================================================
``model/``             bfloat16 weights, configuration, tokenizer, training log, model card (`train`, `build_data`)
``text/``              Wikipedia leads in three parts that share no article (`build_data`), licence in LICENSE.md
``tasks/``             a multiple-choice task over the test part, for lm-eval (`build_data`)
=====================  ========================================================================================
"""

from pathlib import Path

DIRECTORY = Path(__file__).parent
MODEL = DIRECTORY / "model"
TEXT = DIRECTORY / "text"
TASKS = DIRECTORY / "tasks"
