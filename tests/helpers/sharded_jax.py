"""The JAX operator on eight simulated devices. Prints, per case, what the compiled text has and the largest error.

A program of its own, because JAX takes the number of devices from the environment when it starts.
"""

import json
import os
import sys

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tests.helpers.cases import Case
from tests.helpers.jax_calls import FORMS, function_of, inputs_of

CASE = Case("divided", levels=((4, 5), (3, 2)), N=8, M=4, D=4, queries=3)
# What divides images and heads, of a mesh with 4 times 2 devices.
DIVISIONS = {
    "images": ("x", None),
    "heads": (None, "y"),
    "images and heads": ("x", "y"),
    "images by two axes": (("x", "y"), None),
    "shard_map": ("x", "y"),
}
COLLECTIVES = ("all-gather", "all-to-all", "collective-permute")


def spec_of(name, images, heads):
    return PartitionSpec(images) if name == "references" else PartitionSpec(images, None, heads)


def run(form, division):
    images, heads = DIVISIONS[division]
    inputs = inputs_of(CASE, FORMS[form])
    function, arrays = function_of(inputs)
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("x", "y"))
    specs = {name: spec_of(name, images, heads) for name in arrays}
    output_spec = PartitionSpec(images, None, heads)

    def steps_of(function):
        def both(grad_output, *given):
            output, pullback = jax.vjp(function, *given)
            return (output, *pullback(grad_output))

        return jax.jit(both)

    given = {"grad_output": inputs.grad_output, **arrays}
    specs = {"grad_output": output_spec, **specs}
    divided = [jax.device_put(array, NamedSharding(mesh, specs[name])) for name, array in given.items()]
    whole = steps_of(function)(*given.values())
    if division == "shard_map":
        function = jax.shard_map(function, mesh=mesh, in_specs=tuple(specs.values())[1:], out_specs=output_spec)
    compiled = steps_of(function).lower(*divided).compile()
    results = compiled(*divided)
    errors = [
        float(np.linalg.norm(got - want) / np.linalg.norm(want)) for got, want in zip(results, whole, strict=True)
    ]
    kept = [result.sharding.is_equivalent_to(NamedSharding(mesh, spec), result.ndim)
            for result, spec in zip(results, (output_spec, *list(specs.values())[1:]), strict=True)]  # fmt: skip
    text = compiled.as_text()
    return {
        "collectives": [name for name in COLLECTIVES if name in text],
        "sums": "all-reduce" in text,
        "kept": all(kept),
        "error": max(errors),
        "calls": text.count('custom_call_target="cupy_msda"'),
    }


if __name__ == "__main__":
    print(json.dumps({f"{form}, {division}": run(form, division) for form in sys.argv[1:] for division in DIVISIONS}))
