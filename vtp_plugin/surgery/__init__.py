"""How a cut is made: towers, prompts, decoder layers. Nothing here knows a method or a model family."""
