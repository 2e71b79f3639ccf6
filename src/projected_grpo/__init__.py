"""projected_grpo: take the reward-hacking direction out of the GRPO gradient.

With ``BEARTYPE=1`` in the environment every function's shapes and types are checked at call time
(jaxtyping's import hook, so that dimension names must agree across the arguments of one call). Launch
modules with ``python -m``, or the checks do not reach the entry point.
"""

import os
from typing import Any

if os.environ.get("BEARTYPE") == "1":
    from beartype import BeartypeConf, beartype
    from jaxtyping import install_import_hook

    check = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is a float, as annotations have it
    install_import_hook("projected_grpo", "projected_grpo.check")


def __getattr__(name: str) -> Any:
    """``load_environment``, where the verifiers library looks for it; imported when it is asked for."""
    if name == "load_environment":
        from projected_grpo.tools.environment import load_environment

        return load_environment
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
