"""``python -m verl_troll`` is ``verl-troll``."""

from verl_troll.tools.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
