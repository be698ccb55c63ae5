"""Entry point of ``python -m hvd_quant.cli``, the command ``hvd-quant``."""

from hvd_quant.cli import main

raise SystemExit(main())
