"""So that ``python -m hvd_quant.cli`` is the command ``hvd-quant``."""

from hvd_quant.cli import main

raise SystemExit(main())
