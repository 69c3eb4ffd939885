"""The hosts: the only files that know an evaluation framework or a model package."""
