"""Find a policy by name or file: no registration, and errors that say what was wrong.

``row_power_cap`` is the class in ``testbed/policies/row_power_cap.py``; ``my.py:MyCap`` is
the class ``MyCap`` in that file, and ``my.py`` alone will do where the file has one policy.

>>> load_controller(PolicySpec(use="row_power_cap", params={"trip": 0.9})).trip
0.9
>>> load_router(PolicySpec(use="row_power_cap"))
Traceback (most recent call last):
...
testbed.core.errors.PolicyError: policy 'row_power_cap': found no class with a method route()
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import pkgutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import testbed.policies
from testbed.core.errors import PolicyError
from testbed.core.freeze import POLICY_MODULE
from testbed.core.spec import PolicySpec
from testbed.core.view import Controller, Router

_NOT_POLICIES = {"load", "serving_profile"}


def shipped_policies() -> list[str]:
    """Names of the policies in this folder."""
    found = pkgutil.iter_modules(testbed.policies.__path__)
    return sorted(module.name for module in found if module.name not in _NOT_POLICIES)


def load_controller(spec: PolicySpec) -> Controller:
    """The controller that ``spec`` names, with its parameters.

    Raises:
        PolicyError: no such file or class, or parameters that it does not take.
    """
    policy = cast(Controller, _load(spec, "step"))
    period_s = getattr(policy, "period_s", None)
    if not isinstance(period_s, int | float) or not 0 < period_s < 1e9:
        raise PolicyError(f"policy {spec.use!r}: period_s = {period_s!r} must be a positive number")
    return policy


def load_router(spec: PolicySpec) -> Router:
    """The router that ``spec`` names, with its parameters; raises as `load_controller`."""
    return cast(Router, _load(spec, "route"))


def _load(spec: PolicySpec, method: str) -> Any:
    name, _, class_name = spec.use.partition(":")
    module = _file_module(name) if name.endswith(".py") else _shipped_module(name)
    offered = getattr(module, "__all__", list(vars(module)))
    classes = [
        value
        for value in (getattr(module, name) for name in offered)
        if inspect.isclass(value)
        and f"{value.__module__}.".startswith(f"{module.__name__}.")
        and callable(getattr(value, method, None))
        and (not class_name or value.__name__ == class_name)
    ]
    if not classes:
        wanted = f"class {class_name!r}" if class_name else "class"
        raise PolicyError(f"policy {spec.use!r}: found no {wanted} with a method {method}()")
    if len(classes) > 1:
        names = ", ".join(found.__name__ for found in classes)
        raise PolicyError(f"policy {spec.use!r}: several classes ({names}): add :ClassName")
    try:
        inspect.signature(classes[0]).bind(**spec.params)
    except TypeError as error:
        raise PolicyError(
            f"policy {spec.use!r}: params {spec.params}: {error}; "
            f"it takes {inspect.signature(classes[0])}"
        ) from None
    try:
        return classes[0](**spec.params)
    except (TypeError, ValueError) as error:
        raise PolicyError(f"policy {spec.use!r}: params {spec.params}: {error}") from error


def _shipped_module(name: str) -> ModuleType:
    if name not in shipped_policies():
        known = ", ".join(shipped_policies())
        raise PolicyError(f"policy {name!r} is none of: {known}; a file of yours ends in .py")
    return importlib.import_module(f"testbed.policies.{name}")


def _file_module(name: str) -> ModuleType:
    path = Path(name)
    if not path.is_file():
        raise PolicyError(f"policy file {name}: no such file")
    # The same in every process: a checkpoint names its classes.
    place = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]
    module_name = f"{POLICY_MODULE}{path.stem}_{place}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None:
        raise PolicyError(f"policy file {name}: cannot be read as Python")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # so that dataclasses in the file can find their module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise PolicyError(f"policy file {name}: {type(error).__name__}: {error}") from error
    return module
