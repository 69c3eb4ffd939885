"""The model families that are served, one module each: `plan_of` (what a configuration means), `Pruned` (the model).

A family is such a module and its row in `contract.FAMILIES`: nothing else knows it. They import vLLM's model classes,
so none is imported before a configuration asks for it.
"""
