"""Where the reference model's scores come from. A loss cannot tell the sources apart.

- `none`: the loss needs no reference, and nothing is loaded.
- `live`: the reference runs beside the policy: a frozen copy of the starting policy, the policy with its adapter
  switched off, or another model.
"""

from prefopt.reference.live import AdapterOff, FrozenModel, NoReference, Reference, plan_reference

__all__ = ["AdapterOff", "FrozenModel", "NoReference", "Reference", "plan_reference"]
