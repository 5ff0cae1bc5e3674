"""The CPU path: `run` takes a call to the tier that runs (`tier`), that of NumPy or the compiled one (`compiled`).

In the tier of NumPy, `fused` makes locations and weights; `forward` and `backward` do the rest.

Work is divided into tasks (`tasks`) that run on threads (`threads`). Both directions share `sampling`. The backward
groups samples by the four pixels around them (`cells`) and adds its sums to the gradient of value (`scatter`).
"""
