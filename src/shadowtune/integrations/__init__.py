"""Adapters of this package for other training programs: a plugin of Axolotl and a tuner of ms-swift."""
