"""`python -m appliance.builder --ipc ADDRESS --request FILE|JSON`."""

from __future__ import annotations

import sys

from appliance.builder.process import main

if __name__ == "__main__":
    sys.exit(main())
