"""How log lines look."""

import logging


def configure_logging(process: str, level: str) -> None:
    """Send log records of this process to standard error, one line each, marked with its name.

    Args:
        process: such as `attention/0`.
        level: a name of the logging module, such as `INFO`.
    """
    form = f"%(asctime)s %(levelname).1s {process}: %(message)s"
    logging.basicConfig(level=level.upper(), format=form, datefmt="%H:%M:%S", force=True)
    logging.getLogger("httpx").setLevel(logging.WARNING)
