"""The embedded default: a small LLaVA, the scenes it was trained on and the recipe. Nothing here loads by itself."""
