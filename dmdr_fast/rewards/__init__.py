"""One file per reward, behind the protocol in ``base``."""
