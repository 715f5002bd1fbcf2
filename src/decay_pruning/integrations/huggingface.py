"""Hugging Face Transformers: pruning inside of its `Trainer`, and pruned models that its stock classes load.

    trainer = Trainer(model, args, ..., callbacks=[DecayPruningCallback(inputs, 0.5, host=DepGraph(uniform=True))])
    trainer.train()
    save(trainer.model, "pruned")  # stock `from_pretrained("pruned")` loads it

`pip install transformers accelerate`.
"""

try:
    import transformers  # noqa: F401
except ImportError as error:
    raise ImportError(
        "decay_pruning.integrations.huggingface needs transformers and accelerate: "
        "pip install transformers accelerate"
    ) from error

from decay_pruning.integrations._hf_save import push_to_hub, save
from decay_pruning.integrations._hf_trainer import DecayPruningCallback

__all__ = ["DecayPruningCallback", "push_to_hub", "save"]
