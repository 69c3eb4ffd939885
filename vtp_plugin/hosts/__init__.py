"""The hosts: evaluation frameworks and model packages. No other room knows one, the adapters of families aside."""
