# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""`RandomWalk` and `Damped`, the shift and the anchor that `docs/engine.md` writes, as who types them has them.

Here they have a module, without which they would not pickle.
"""

import doctest
from pathlib import Path

PAGE = Path(__file__).parent.parent / "docs" / "engine.md"
_written, _, _tried = PAGE.read_text().partition("## Run and test your engine")
assert _tried
for _example in doctest.DocTestParser().get_examples(_written):
    exec(compile(_example.source, str(PAGE), "exec"))
