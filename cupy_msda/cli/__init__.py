"""The commands of ``python -m cupy_msda``, one file each."""
