"""The surfaces (what of a model is tuned) by name."""

from gradientless.language.surfaces.head import HeadSurface

SURFACES: dict[str, type[HeadSurface]] = {"head": HeadSurface}

__all__ = ["SURFACES", "HeadSurface"]
