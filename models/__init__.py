"""Architectures as nn.Modules; each returns its own loss breakdown from forward."""

import kernels

if not hasattr(kernels, "eigen_scan"):
    raise ImportError(
        f"'kernels' was imported from {kernels.__file__}, which is another project's package of the same name; "
        "run `pip install -e .` in the Tenfold checkout and start from there, so that Tenfold's own comes first"
    )
