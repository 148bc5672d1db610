"""The release, in one place: packaging, checkpoints and ``qdiff.__version__`` read it here."""

__version__ = "0.1.0"
