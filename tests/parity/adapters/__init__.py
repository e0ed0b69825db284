"""One file per area; each function here turns parity cases into a call of our code. See ``tests.parity.harness``."""

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
