"""The version of the package: what is measured for one version does not count for another."""

__version__ = "0.1.0"
