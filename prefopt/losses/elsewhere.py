"""Names people type that are no loss here, and what to write instead. `<name>` stands for a loss of this room."""

from __future__ import annotations

import re
from collections.abc import Collection

_SENTENCES = {
    "sdpo": (
        "`{}` is the name of three methods, so it is refused: segment-level SDPO (arXiv 2501.01821) is the loss "
        "<segment_dpo>; stepwise sDPO (arXiv 2403.19270) is the procedure `stepwise` around any pair loss; "
        "self-distillation policy optimisation (arXiv 2601.20802, `sdpo` in TRL) is online RL and not part of prefopt."
    ),
    "rpo": (
        "`{}` names several methods, so it is refused: DPO with a likelihood term (arXiv 2404.19733, 2405.16436) is a "
        "mixture of <dpo> and <sft>; reward-aware preference optimisation (arXiv 2406.11704) is not part of prefopt."
    ),
    "tdpo": "`{}` is two losses: <tdpo1> and <tdpo2> (both arXiv 2404.11999; its authors recommend the second).",
    "robust_dpo": "`{}` is <rdpo> here; length-regularised R-DPO is another method.",
    "conservative_dpo": "`{}` is <cdpo> here.",
    "rso": "`{}` (arXiv 2309.06657) is a way to draw answers; the loss of its paper is <hinge>.",
    "slic_hf": "`{}` is <slic> here; the hinge on log-ratios, TRL's `hinge`, is <hinge>.",
    "dpo_positive": "`{}` is <dpop> here.",
    "f_dpo": "`{}` is <fdpo> here.",
    "r_dpo": "`{}` is length-regularised DPO (arXiv 2403.19159), not part of prefopt; robust DPO is <rdpo>.",
    "spin": "`{}` (arXiv 2401.01335) is a procedure, not a loss: rounds of self-play around <dpo>.",
    "stepwise": "`{}` (sDPO, arXiv 2403.19270) is a procedure, not a loss: it runs any pair loss in steps.",
    "online": "`{}` is a procedure, not a loss: rounds of sampling, judging and training with any pair loss.",
}

# Only names that differ.
IN_TRL = {
    "sigmoid": "dpo",
    "sigmoid_norm": "dpo_norm",
    "robust": "rdpo",
    "exo_pair": "exo",
    "nca_pair": "nca",
    "bco_pair": "bco",
    "sppo_hard": "sppo",
    "kto_pair": "kto",
    "aot_pair": "aot",
}
# Called the same here, once they are: `hinge` (RSO's, not SLiC's) and `ipo` are. Anyone may register the others.
_SAME_IN_TRL = {"aot", "aot_unpaired", "apo_down", "apo_zero", "apo_zero_unpaired", "cpo", "discopop", "orpo"}


def explain(name: str, registered: Collection[str]) -> str:
    """What `name` means and what to write instead; empty when nothing is known of it."""
    key = name.lower().replace("-", "_")
    if key in IN_TRL:
        target = IN_TRL[key]
        return f"TRL's `{name}` is `{target}` here{'.' if target in registered else ', but not in this version.'}"
    if key in _SAME_IN_TRL:
        return f"TRL's `{name}` is not in this version."
    sentence = _SENTENCES.get(key, "").format(name)
    return re.sub(r"<(\w+)>", lambda found: _here(found[1], registered), sentence)


def is_taken(name: str) -> bool:
    """Whether `name` means something else already, so that no loss may register it."""
    return name in _SENTENCES or name in IN_TRL


def _here(name: str, registered: Collection[str]) -> str:
    return f"`{name}`" if name in registered else f"`{name}` (not in this version)"
